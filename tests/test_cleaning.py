import re

import pytest

from wuxia_core.corpus import RULES, clean, read_book
from wuxia_core.corpus.cleaning import NOVELS_ONLY

STORY = "他拔剑而起，众人无不变色。"
WRAPPED = "\n".join(
    "　　" + "那汉子把酒碗往桌上一顿，酒水溅得满桌都是，" * 3 + "众人都不敢作声。"
    for _ in range(30)
)

VERSE = "\n".join(["昨夜星辰昨夜风画楼西畔桂堂东"] * 40)


def hard_wrapped(text, width):
    return "\n".join(
        line[at : at + width] for line in text.split("\n") for at in range(0, len(line), width)
    )


@pytest.mark.parametrize(
    ("rule", "before", "after"),
    [
        ("line_ends", f"{STORY}\r\n{STORY}\r{STORY}", f"{STORY}\n{STORY}\n{STORY}"),
        ("invisible", f"\ufeff{STORY[:4]}\u200b{STORY[4:]}\x01", STORY),
        ("page_marks", "众人无\n\n_分节阅读_12\n\n不变色。", "众人无不变色。"),
        ("page_marks", f"{STORY}\n第 12 页\n{STORY}", f"{STORY}\n{STORY}"),
        ("markup", "他拔剑<br/>而起&nbsp;，<!-- 广告 -->众人<p class='x'>无不变色。",
         "他拔剑\n而起\xa0，众人\n无不变色。"),
        ("markup", f"[url=x]{STORY}[/url]", STORY),
        ("mojibake", STORY.encode("gbk").decode("latin-1"), STORY),
        ("garbled", f"{STORY}\n锟斤拷锟斤拷锟斤拷\n{STORY}", f"{STORY}\n{STORY}"),
        ("stamps", f"第一回\n更新时间:2007-11-16 7:55 本章字数:4567\n{STORY}",
         f"第一回\n{STORY}"),
        ("stamps", f"更新时间:2012-3-4 12:00　　{STORY}", STORY),
        ("stamps", f"第一章 起 更新时间:2012-3-4 12:00 本章字数：3000\n{STORY}",
         f"第一章 起 \n{STORY}"),
        ("page_marks", "众人无\n分节阅读_1\n分节阅读_2\n不变色。", "众人无不变色。"),
        ("page_marks", "昨夜星辰昨夜风\n分节阅读_3\n第二章 剑起", "昨夜星辰昨夜风\n第二章 剑起"),
        ("headings", f"{STORY}　　第二章 剑起　　{STORY}", f"{STORY}\n第二章 剑起\n{STORY}"),
        ("hard_wrap", VERSE, VERSE),
        ("garbled", f"{STORY}\n锛岄偅姹夊瓙鎷斿墤鑰岃捣锛屼紬浜烘棤涓嶅彉鑹层€?\n{STORY}",
         f"{STORY}\n{STORY}"),
        ("ads", f"{STORY}\n一秒记住本书，手机用户请到m.example.com阅读。\n{STORY}",
         f"{STORY}\n{STORY}"),
        ("ads", f"{STORY}\nＷＷＷ．ｘｉａｏｓｈｕｏ．ＣＯＭ\n{STORY}", f"{STORY}\n{STORY}"),
        ("ads", f"{STORY}\n上一章 目录 下一章\n{STORY}", f"{STORY}\n{STORY}"),
        ("ads", f"{STORY}\n本书由某某网站首发，请到 www.example.com 下载\n{STORY}",
         f"{STORY}\n{STORY}"),
        ("ads", "他拔剑而起http://www.example.com/book，众人无不变色。", STORY),
        ("boilerplate", f"===============\n{STORY}\n（本章完）\n", f"{STORY}\n"),
        ("boilerplate", f"正文 第一回 起\n{STORY}", f"第一回 起\n{STORY}"),
        ("table_of_contents",
         "\n".join(f"第{n}回 甲" for n in "一二三四五六") + f"\n第一回 甲\n{STORY}",
         f"第一回 甲\n{STORY}"),
        ("hard_wrap", hard_wrapped(WRAPPED, 38), WRAPPED),
        ("spaces", "　　他拔 剑而起， 众人无不变色。  ", "他拔剑而起，众人无不变色。"),
        ("spaces", "第一回　剑起　风停\n昨夜星辰　昨夜风", "第一回　剑起　风停\n昨夜星辰　昨夜风"),
        ("private_use", "\ue816\ue000□", "𠂇\ue000□"),
        ("blank_lines", f"\n{STORY}\n\n\n{STORY}\n", f"{STORY}\n{STORY}"),
    ],
)  # fmt: skip
def test_a_rule_does_what_it_says(rule, before, after):
    text, tallies = clean(before, set(RULES) - {rule})
    assert text == after
    for tally in tallies:
        assert tally.rule == rule and tally.count >= 1 and len(tally.examples) >= 1
        assert len(before) - tally.removed + tally.inserted == len(text)


@pytest.mark.parametrize(
    "line",
    [
        "“阁下可是为那张藏宝图而来？”他沉声问道，手已按在剑柄之上。",
        "他手下有个书友，专好收藏古籍，家中常满，城中人无不艳羡，见他来了便都起身相迎。",
        "那少年道：“我叫张三，江湖上人称‘草上飞’——你待怎样？”",
        "第二回的话，且按下不表。",
        "一、二、三！众人齐声发喊，石门应声而开。",
        "昨夜星辰昨夜风　画楼西畔桂堂东",
        "——————",
        "神识扫描之下，那枚玉简中的功法尽数录入他的脑海。",
        "藏经阁中，几名老僧正逐字校对经文，录入简册，见他进来，都合十为礼。",
        "“叮！系统提示：你已成功下载《独孤九剑》电子书一本。”",
        "他在浣花溪畔的浣花剑庐住了三年，剑法大进，又娶了一房妻室，生了两个儿子。",
        "“烫烫烫烫！”小二叫道。他用锛子锛了一下。",
        "第一回合，双方战成平手",
        "第十二章 大战（求月票、推荐票！）",
        "若 a<b 且 c>d，则成立；print(a[i], b[u])，List<int> 亦然。",
    ],
)
def test_story_is_left_as_it_is(line):
    text = f"{STORY}\n{line}\n{STORY}"
    assert clean(text) == (text, [])


def test_general_text_keeps_what_only_novels_have_too_much_of():
    text = "请到本站下载电子书，网址 www.example.com 。\n第1部分\n（第3/4页）"
    assert clean(text, NOVELS_ONLY)[0] == text
    assert clean(text)[0] != text


@pytest.mark.parametrize(
    "name", ["三侠五义", "七剑十三侠", "绿牡丹", "儿女英雄传", "续小五义", "水浒传"]
)
def test_clean_novels_lose_no_story(novels, name):
    text = read_book(novels / "wuxia" / f"{name}.txt").text
    cleaned, tallies = clean(text)
    assert {t.rule for t in tallies} <= {
        "line_ends",
        "spaces",
        "blank_lines",
        "private_use",
        "invisible",
    }
    assert re.sub(r"\s|\ufeff", "", cleaned) == re.sub(r"\s|\ufeff", "", text)
    assert len(text) - sum(t.removed - t.inserted for t in tallies) == len(cleaned)


ADVERTISED = re.compile(
    r"http|www|\.com|下载|本站|网站|分节阅读|更新时间|本章字数|<br|&quot;|&nbsp;|<!--"
)


@pytest.mark.parametrize(
    ("name", "paragraphs"),
    [
        ("水浒传_gbk_硬换行_广告", 6933 + 120),
        ("三国演义_gbk_站点模板", None),
        ("水浒传_utf8_网站广告", None),
        ("三俠五義_big5", None),
        ("七劍十三俠_big5", None),
    ],
)
def test_no_advertisement_is_left_in_messy_novels(novels, name, paragraphs):
    text = read_book(novels / "messy" / f"{name}.txt").text
    cleaned, tallies = clean(text)
    assert not ADVERTISED.findall(cleaned)
    assert len(text) - sum(t.removed - t.inserted for t in tallies) == len(cleaned)
    if paragraphs:  # indented openings, and headings
        assert cleaned.count("\n") + 1 == pytest.approx(paragraphs, rel=0.02)
