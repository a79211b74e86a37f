"""Headings of many forms, lines that only look like them, and what is odd in a book."""

import re
import time
import timeit

import pytest
from conftest import has_chinese

from wuxia_core.corpus import chapter, clean, read_book, split_chapters
from wuxia_core.corpus.chapters import _number, asides, chapter_notes, headings, table_of_contents
from wuxia_core.errors import DataError


def table(text):
    """Split a table of examples, which stand between bars or on lines of their own."""
    return re.split(r"[|\n]", text)


CLAUSES = table(
    """他拔剑而起|众人无不变色|那老者淡淡一笑|窗外雪落无声|马蹄声由远而近|她握紧了缰绳|灯火摇曳不定
两人对视良久|谁也没有先开口|山道上空无一人|茶已经凉了|掌柜的叹了口气|刀光一闪而没"""
)
TITLES = table(
    "风起|雪夜访友|断刀|谁是凶手|孤灯|归人|长街一战|旧友|不速之客|酒馆里的秘密|松林一剑|归尘"
)
HAN = table("零|一|二|三|四|五|六|七|八|九|十|十一|十二|十三")
LONG = "这一章的题目长得出奇足足有四十多个字为的是试一试题目超过四十个字的时候还能不能认得出来"


PROSE = "话说那日天色将晚，老镖师独自坐在门前磨刀，忽听得远处马蹄声急，心中一惊。" * 3


def prose(seed, paragraphs=10):
    """Paragraphs of two to four clauses, always the same for a seed."""
    lines = []
    for n in range(paragraphs):
        chosen = [CLAUSES[(seed * 5 + n * 3 + k * 4) % len(CLAUSES)] for k in range(2 + n % 3)]
        lines.append("　　" + "，".join(chosen) + "。")
    return "\n".join(lines)


def fill(form, n):
    """Turn the heading of chapter three, 断刀, into that of chapter n: 第三章 断刀."""
    by = {"三": HAN[n], "003": f"{n:03d}", "03": f"{n:02d}", "3": str(n), "断刀": TITLES[n - 1]}
    by |= {"③": chr(0x245F + n), "Ⅲ": chr(0x215F + n), "长题": LONG + TITLES[n - 1]}
    return re.sub("|".join(by), lambda match: by[match.group()], form)


def book(names, paragraphs=10, extra=None):
    """Write a book of these headings, with more lines in the middle of some chapters."""
    front = "青灯引\n某某著"
    texts = []
    for n, name in enumerate(names, 1):
        inside = f"\n{extra[n]}\n{prose(n + 7, 5)}" if extra and n in extra else ""
        texts.append(f"{name}\n{prose(n, paragraphs)}{inside}")
    return "\n".join([front, *texts])


def found(text):
    """Split a text as it is and cleaned: the same headings, and not a character lost."""
    parts = split_chapters(text)
    assert "\n".join(part for _, part in parts) == text
    cleaned, _ = clean(text)
    again = split_chapters(cleaned)
    assert "\n".join(part for _, part in again) == cleaned
    assert len(again) == len(parts)
    return [heading for heading, _ in parts if not heading.startswith("part ")]


FOUND_BEFORE = """第三章 断刀|第3章|第3章断刀|第003章|第 3 章 断刀|第3章　断刀|003 断刀
003、断刀|3.断刀|3|三|【第三章】断刀|正文 第三章|番外三|番外（三）|第一卷 笼中 第3章
第三章：断刀|第三章、断刀|第三章.断刀|第三章——断刀|第三章 断刀！|第三章 断刀……
第三章 “断刀”|第3章断刀？|# 第三章 断刀|第两百零三章|第一二三章|第卅三章 断刀"""
FOUND_NOW = """（三）|(3)|（三）断刀|(3) 断刀|「第三章」|[第3章]|[第3章]断刀|〖第三章〗
『第三章』 断刀|〔三〕|《第三章 断刀》|★第3章★|☆、第3章|☆、第3章 断刀|■ 第3章 断刀
== 第3章 ==|◆第三章 断刀|※ 第三章|正文第三章|正文第三章断刀|正文卷 第三章 断刀
正文卷.第三章 断刀|VIP章节 003|VIP章节 003 断刀|[VIP]第三章 断刀|【VIP】第3章断刀|Chapter 3
Chapter 3 断刀|CHAPTER 03：断刀|chapter 3 - 断刀|Chapter.3|外传三|外传三 断刀|外传（三）
卷一 (笼中) 第三章|卷一·笼中 第三章 断刀|1-3|1-3 断刀|3-断刀|青灯引 第三章
《青灯引》第三章 断刀|《青灯引》（三）|青灯引 3|青灯引：第三章 断刀|第三幕|第三集 断刀
第三篇：断刀|第三部 断刀|第三折|第三夜 断刀|第三段|第三则 断刀|第三出 断刀|第三囘 断刀
第三話 断刀|第三场|第三卷 断刀|卷三|卷之三|卷三 断刀|三章|三章 断刀|003章|003章断刀|3回 断刀
第③章|第③章 断刀|第Ⅲ章 断刀|③|Ⅲ|③、断刀|苐3章 断刀|笫三章断刀|第3.5章 断刀
第—百零三章 断刀|第一○三回|第一O三回 断刀|第一万零三章 断刀|第\xa03\xa0章|\xa0\xa0第3章 断刀
\u2003第3章\u2003断刀|第\u2003三\u2003章|第3章 长题|第三回　长题　长题|第3章长题
第一卷第三章 断刀|第二卷第三章|第三回断刀，断刀|第三篇 断刀（上）"""


@pytest.mark.parametrize("form", table(f"{FOUND_BEFORE}|{FOUND_NOW}"))
def test_a_book_of_one_form_has_twelve_chapters(form):
    names = [fill(form, n) for n in range(1, 13)]
    expected = [name.split("\n")[0].strip() for name in names]
    assert found(book(names)) == expected


STORY = """第四回中既将赵家母子在庄里寄居等事略已表明，此处暂可不写
第四回中既将此事表明．此处不写﹒|第三回了！|第四节竹子忽然裂开|第二卷残页
第三回他没有输，只是把刀收了起来不肯再向前走|第四章法混乱，不成体统|第六章程上写明了，叛门者死
第一回合，双方战成平手|第三节课上到一半，窗外忽然下起雪来|第九卷轴里夹着一封信
第二回的话，且按下不表。|第三回！|第五回了，他还是不死心|第三章讲的是步法，第四章讲的是心法。
第七部队奉命开拔|第三篇文章写得最好|第一夜无事|第二夜，雪更大了|第四天
第二折戏唱完，台下一片叫好|第三出戏还没开锣，客人已经散了一半|第二卷书里夹着半张地图
第六回来的时候，她已经不在了|第三话音未落，刀已出鞘|三回之后，他再也没有输过|三章约法，杀人者死
五回合之内必败|一、二、三！众人齐声发喊，石门应声而开。|4 比 2|三 比 一|12 个人围了上来
1937年的冬天特别冷|一、不得欺师|二 掌柜的不在|第八场 雪|「第三回了！」|他翻到第三章 看了起来
第三回便是这样输的|第二章里写得明明白白|序言里说得很清楚|尾声渐渐低了下去|番外人士不得入内
引子已经备好了|前言不搭后语|大结局还早着呢|跋山涉水，走了三个月|卷三残页|单章难成书
第三回 他没有输，只是把刀收了起来，不肯再向前走。|第五章 的纸页已经发黄，字迹模糊。|第6次
三、二、一，放！|2. 他说|3、你听我说"""
FORMS = table(
    """第三章 断刀|第三回|第3章断刀|第三章断刀|003 断刀
三、断刀|三|（三）|第三节 断刀|第三卷 断刀"""
)


@pytest.mark.parametrize(("n", "line"), list(enumerate(table(STORY))))
def test_a_line_of_story_opens_no_chapter(n, line):
    for form, place in ((FORMS[n % 10], 2), (FORMS[(n + 3) % 10], 5), (FORMS[(n + 7) % 10], 8)):
        names = [fill(form, k) for k in range(1, 9)]
        assert found(book(names, extra={place: line})) == names
    assert found(f"{prose(1, 20)}\n{line}\n{prose(2, 20)}") == []


LIST = "一、不得欺师\n二、不得滥杀\n三、不得贪财"
MANUAL = "剑谱的目录上写着：\n第一章 起手\n第二章 拔剑\n第三章 回风\n第四章 落雪\n第五章 归尘"


@pytest.mark.parametrize("told", [LIST, MANUAL])
@pytest.mark.parametrize("form", ["第三章 断刀", "第3章断刀", "三", "003 断刀", "（三）"])
@pytest.mark.parametrize("place", [1, 4, 8])
def test_a_list_told_in_the_story_stays_where_it_is(told, form, place):
    names = [fill(form, n) for n in range(1, 9)]
    text = book(names, extra={place: told})
    assert found(text) == names
    assert told in clean(text)[0]
    assert found(f"{prose(1, 40)}\n{told}\n{prose(2, 40)}") == []


@pytest.mark.parametrize(
    "numbers",
    [
        table("一|二|三|五|六|七|八|九|十"),
        [f"{n:03d} 题{n}" for n in (1, 2, 3, 4, 6, 7, 8, 9, 10, 11, 12)],
        [f"{n} 题" for n in (*range(1, 7), *range(1, 9))],
        ["第一章 风", "第二章 云", "第三章 断刀", "第三章 雪", "第四章 尘"],
        [f"第{n}章 {TITLES[n % 12]}" for n in (1, 2, 3, 13, 5, 6, 5, 8, 9)],
        [f"第{n}章" for n in range(9, 0, -1)],
        [f"{n}" for n in range(101, 113)],
        [f"第{n}章 题" for n in (1, 2, 5, 6, 9, 10, 20, 21)],
        [f"第{n}章断刀（{half}）" for n in range(1, 7) for half in "上"],
        [f"第{HAN[n]}章 断刀（{half}）" for n in range(1, 7) for half in "上中下"],
        ["第1章 风", "第2章 云", "第3章 断刀", *(f"第{n}章{TITLES[n]}" for n in range(4, 9))],
        [f"第{n}{'章节回章章章'[n % 6]} {TITLES[n]}" for n in range(3, 12)],
        ["楔子", *(f"☆、第{n}章 题" for n in range(1, 8))],
    ],
)  # fmt: skip
def test_gaps_misprints_and_restarts_end_nothing(numbers):
    assert found(book(numbers)) == numbers


def test_volumes_stand_above_chapters_that_start_again():
    for volume in ("第{}卷 雪", "卷{}", "第{}部", "卷之{} 雪"):
        names = [f"第{HAN[n]}章 {TITLES[n]}" for n in (*range(1, 7), *range(1, 7))]
        texts = [f"{name}\n{prose(n, 60 if n < 6 else 9)}" for n, name in enumerate(names)]
        texts[0], texts[6] = (
            f"{volume.format(n)}\n{text}" for n, text in (("一", texts[0]), ("二", texts[6]))
        )
        assert found("\n".join(texts)) == names
    assert found(book([f"第{HAN[1 + n // 6]}卷 笼中 第{n % 6 + 1}章" for n in range(12)])) == [
        f"第{HAN[1 + n // 6]}卷 笼中 第{n % 6 + 1}章" for n in range(12)
    ]


@pytest.mark.parametrize(
    "name",
    table("""终章|最终章|大结局(上)|大结局（下）|楔子 雪夜|序章：风起|引子 雪|尾声 归人|序幕|序曲
前言|前传|跋|附录|外传|外传 旧事|间章|特别篇|番外 雪|番外：雪|后记：写在最后|自序|最终章：归尘
番外之雪夜篇|尾声"""),
)  # fmt: skip
def test_special_chapters_may_have_titles(name):
    names = [f"第{HAN[n]}章 {TITLES[n]}" for n in range(1, 9)]
    assert found(book([*names, name])) == [*names, name]
    assert found(book([name, *names])) == [name, *names]


@pytest.mark.parametrize(
    ("title", "story"),
    [
        ("雪夜孤灯访旧友　松林一剑退群雄", "话说那青衣人…"),
        ("雪夜孤灯访旧友　松林一剑退群雄", "那青衣人走到门前，停下了脚步。"),
        ("雪夜访友 孤灯论剑", " 那青衣人走到门前，停下了脚步。"),
        ("断刀", "　　那青衣人走到门前，停下了脚步。"),
        ("断刀", " 那青衣人走到门前，停下了脚步。"),
        ("断刀", " 却说那青衣人走到门前，停下了脚步。" + "他走了，一直走到天黑。" * 30),
    ],
)
def test_prose_on_the_line_of_a_heading_is_story(title, story):
    names = [f"第{HAN[n]}回　{title}" for n in range(1, 7)]
    text = "\n".join(f"{name}{story}\n{prose(n, 12)}" for n, name in enumerate(names))
    assert found(text) == names
    cleaned, _ = clean(text)
    assert cleaned.count(f"\n{story.strip()}\n") == 6
    assert [part.split("\n")[0] for _, part in split_chapters(cleaned)] == names


def apply(rule, text):
    for start, end, new in reversed(list(rule(text))):
        text = text[:start] + new + text[end:]
    return text


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("第3章 大战（求月票、推荐票！）", "第3章 大战"),
        ("第3章 大战【4000字大章】", "第3章 大战"),
        ("第3章 大战（第二更）（求订阅）", "第3章 大战"),
        ("第3章 大战（上）", "第3章 大战（上）"),
        ("第3章 大战（三更天）", "第3章 大战（三更天）"),
        ("第三回\n-----\n标题", "第三回 标题"),
        ("第三回\n\n＝＝＝＝\n　　标题", "第三回 标题"),
        ("第三回\n-----\n他走了，再也没有回来。", "第三回\n-----\n他走了，再也没有回来。"),
    ],
)
def test_a_heading_keeps_its_title_and_no_more(before, after):
    assert apply(headings, f"{before}\n{prose(1)}") == f"{after}\n{prose(1)}"


@pytest.mark.parametrize(
    "name", table("完本感言|上架感言|卷末感言|请假条|单章|作品相关|人物介绍|单章：求票")
)
def test_chapters_that_are_no_story_are_left_out(name):
    names = [f"第{HAN[n]}章 {TITLES[n]}" for n in range(1, 6)]
    for place, talk in (
        (0, "今天请假。"),
        (3, "今天请假，明日一定补更，请大家见谅。"),
        (5, "写完了。"),
    ):
        texts = [f"{x}\n{prose(n)}" for n, x in enumerate(names)]
        without = "\n".join(texts)
        texts.insert(place, f"{name}\n{talk}")
        assert apply(asides, "\n".join(texts)).strip() == without
    for story in (
        f"{name}\n“我病了。”他说，“写个条子吧。”\n{prose(3)}",
        f"{name}\n{prose(3, 300)}",
    ):
        text = book(names[:3]) + "\n" + story
        assert apply(asides, text) == text


@pytest.mark.parametrize("form", table("第三回 断刀|【3】|3、断刀|Chapter 3|003 断刀"))
def test_the_form_of_headings_may_change_in_a_long_book(form):
    names = [f"第{n}章 {TITLES[n]}" for n in range(1, 12)] + [fill(form, n) for n in range(1, 13)]
    assert found(book(names, 120)) == ["", *names][-len(names) :]


def test_blanks_in_headings_and_numbers_of_two_chapters():
    names = table(
        "楔　子|第一章 甲|第 二 章 乙|第三-四章 丙|第五、六章|第七章|第8—9章 丁|尾 声|后　记"
    )
    assert found(book(names)) == names


def test_a_table_of_contents_comes_again():
    names = [f"第{HAN[n]}章 {TITLES[n]}" for n in range(1, 9)]
    text = book(names)
    contents = "\n".join(names)
    assert apply(table_of_contents, f"{contents}\n{text}").strip() == text
    assert found(f"{contents}\n{prose(9)}\n{text}")[-8:] == names
    assert (
        apply(table_of_contents, f"{prose(1)}\n{MANUAL}\n{text}") == f"{prose(1)}\n{MANUAL}\n{text}"
    )


def test_what_is_odd_is_said():
    names = [f"第{n}章 {TITLES[n]}" for n in (1, 2, 3, 6, 7, 9)]
    assert chapter_notes(split_chapters(book(names[:3]))) == []
    jump = "numbers jump from 第3章 谁是凶手 to 第6章 长街一战, one of 2 jumps"
    assert chapter_notes(split_chapters(book(names))) == [jump] and has_chinese(jump)
    long = split_chapters(book(names[:2]) + f"\n第3章 孤灯\n{prose(1, 2000)}")
    assert chapter_notes(long) == [f"{len(long[2][1]):,} characters in 第3章 孤灯"]
    parts = split_chapters(prose(1, 2000))
    assert chapter_notes(parts) == [f"no headings found, cut into {len(parts)} parts"]
    assert has_chinese(chapter_notes(long)[0]) and has_chinese(chapter_notes(parts)[0])
    assert [name for name, _ in parts[:2]] == ["part 1", "part 2"]
    assert chapter_notes([]) == []


def test_two_chapters_under_one_heading_are_no_jump():
    names = [f"第{n}章 {TITLES[k]}" for k, n in enumerate(["1", "2", "3-4", "5", "6", "7和8", "9"])]
    assert found(book(names)) == names and chapter_notes(split_chapters(book(names))) == []


def test_a_volume_and_a_chapter_in_one_number_are_no_jump():
    names = [f"第{v}-{c}章 {TITLES[c]}" for v in (1, 2, 3) for c in range(1, 7)]
    assert chapter_notes(split_chapters(book(names))) == []


def test_a_word_at_the_head_of_a_long_text_is_no_division():
    parts = split_chapters(f"楔子\n{prose(1, 3000)}")
    assert chapter_notes(parts) == [f"no headings found, cut into {len(parts)} parts"]
    assert len(parts) > 5


@pytest.mark.parametrize(
    "unit", ["第", "一\n", "　", "1 ", "第一章", "第一章 风\n", "（", "A1-", "卷一\n"]
)
def test_time_grows_with_the_text_and_no_faster(unit):
    seconds = []
    for size in (10_000, 80_000):
        text = unit * (size // len(unit))

        def read(text=text):
            split_chapters(text)
            list(headings(text)), list(table_of_contents(text))

        seconds.append(min(timeit.repeat(read, timer=time.process_time, repeat=2, number=1)))
    assert seconds[1] < 0.1 + 20 * seconds[0]  # eight times the text; 64 were the square


def test_chapters_are_cut_at_headings_and_lose_nothing():
    body = "他拔剑而起，众人无不变色。" * 5
    headings = ["第一回　剑起", "第二十回 风停", "尾声"]
    text = "书名\n" + "\n".join(f"{name}\n{body}\n他说第二回再来。" for name in headings)
    parts = split_chapters(text)
    assert [heading for heading, _ in parts] == headings
    assert "\n".join(part for _, part in parts) == text


def test_a_book_without_headings_is_cut_into_sections():
    text = "\n".join([PROSE] * 100)
    parts = split_chapters(text)
    assert all(3000 <= len(part) < 3300 for _, part in parts[:-1])
    assert "\n".join(part for _, part in parts) == text


@pytest.mark.parametrize(
    ("numeral", "number"),
    [("一百二十", 120), ("一二〇", 120), ("一二○", 120), ("廿三", 23), ("十五", 15), ("001", 1),
     ("二五", 25), ("一百零八", 108), ("一百一十九", 119), ("４２", 42), ("百二十", 120)],
)  # fmt: skip
def test_numerals(numeral, number):
    assert _number(numeral) == number


def test_contents_doubled_headings_and_volumes_open_no_chapter():
    body = "\n".join(f"第{n}句话说他拔剑而起，众人无不变色。" for n in "甲乙丙丁戊己庚辛")
    contents = "\n".join(f"第{n}回 风起云涌{n}　剑气纵横{n}" for n in "一二三四五六七八九")
    text = f"{contents}\n上卷\n" + "\n".join(
        f"正文 第{n}回 风起云涌{n}　剑气纵横{n}\n第{n}回 风起云涌{n}　剑气纵横{n}\n{body}"
        for n in "一二三四五六七八九"
    )
    text += f"\n第九回 (2)\n{body}"
    parts = split_chapters(text)
    assert "\n".join(part for _, part in parts) == text
    assert [heading[:3] for heading, _ in parts] == [
        "",
        *(f"第{n}回" for n in "一二三四五六七八九"),
    ]


@pytest.mark.parametrize(
    "heading",
    ["第{}章 剑起", "【第{}章】剑起", "第 {} 章 剑起", "第{}章谁是凶手？", "第{}章：谁是，谁知道",
     "第一卷 风云 第{}章 夜雨", "正文 第{}章 剑起", "## 第{}章 剑起", "{}、剑起", "{} 剑起",
     "第{}节", "番外{}"],
)  # fmt: skip
@pytest.mark.parametrize("numerals", ["一二三四", "1234", ["001", "002", "003", "004"], "壹贰叁肆"])
def test_headings_of_many_kinds_are_found(heading, numerals):
    body = "\n".join(f"第{n}句话说他拔剑而起，众人无不变色。" for n in "甲乙丙丁戊己庚辛")
    headings = [heading.format(numeral) for numeral in numerals]
    text = "\n".join(f"{name}\n{body}\n第一回合，战成平手" for name in headings)
    parts = split_chapters(text)
    assert [name for name, _ in parts] == headings
    assert "\n".join(part for _, part in parts) == text


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("wuxia/三侠五义", 120),
        ("wuxia/七剑十三侠", 180),
        ("wuxia/绿牡丹", 64),
        ("wuxia/儿女英雄传", 40),
        ("wuxia/续小五义", 124),
        ("wuxia/水浒传", 120),
        ("messy/三俠五義_big5", 120),
        ("messy/七劍十三俠_big5", 180),
        ("messy/水浒传_gbk_硬换行_广告", 120),
        ("messy/水浒传_utf8_网站广告", 120),
        ("messy/三国演义_gbk_站点模板", 120),
        ("pretrain/红楼梦", 120),
        ("pretrain/西游记", 100),
        ("pretrain/封神演义", 100),
        ("pretrain/儒林外史", 56),
        ("pretrain/隋唐演义", 100),
        ("pretrain/民国通俗演义", 160),
        ("pretrain/玉梨魂", 30),
    ],
)
def test_chapters_of_real_novels(novels, name, count):
    text, _ = clean(read_book(novels / f"{name}.txt").text)
    parts = split_chapters(text)
    assert sum("第" in heading for heading, _ in parts) == count
    assert "\n".join(part for _, part in parts) == text


def test_a_chapter_is_asked_for_by_its_number():
    text = "\n".join(f"第{n}回 题\n" + "他走了。" * 40 for n in "一二三四")
    assert chapter(text, 3).startswith("第三回")
    for number in (0, 5, -1):
        with pytest.raises(DataError, match=f"chapter {number}: there are 4"):
            chapter(text, number)
