import re
from itertools import product

import pytest

from wuxia_core.corpus import RULES, clean, read_book
from wuxia_core.corpus.encodings import read_blocks
from wuxia_core.corpus.overlap import to_simplified
from wuxia_core.errors import CorpusError

PROSE = "话说那日天色将晚，老镖师独自坐在门前磨刀，忽听得远处马蹄声急，心中一惊。" * 3
TRADITIONAL = "話說那日天色將晚，老鏢師獨自坐在門前磨刀，忽聽得遠處馬蹄聲急，心中一驚。" * 3
STORY = "他拔剑而起，众人无不变色。"
MISREAD = [
    "“你终于来了。”他说。",
    "他问：“是谁？”",
    "那汉子把酒碗往桌上一顿，酒水溅得满桌都是，众人都不敢作声。",
    "疑似芙蓉初映水，宛如菡萏舞临泉。",
    "苏涓拔剑，雨停了。",
]


@pytest.fixture
def decode(tmp_path):
    """Write bytes to a file and read it as a book."""

    def decode(data, encoding=None):
        (tmp_path / "书.txt").write_bytes(data)
        return read_book(tmp_path / "书.txt", encoding)

    return decode


@pytest.mark.parametrize(
    ("encoding", "text"),
    [
        ("utf-8", PROSE),
        ("utf-8-sig", PROSE),
        ("gb18030", PROSE),
        ("gb2312", PROSE),
        ("cp950", TRADITIONAL),
        ("utf-16", PROSE),
        ("utf-16-le", PROSE),
        ("utf-16-be", PROSE),
    ],
)
def test_an_encoding_is_told_from_the_bytes(tmp_path, encoding, text):
    (tmp_path / "书.txt").write_bytes(text.encode(encoding))
    assert read_book(tmp_path / "书.txt").text == text


def test_lines_of_another_encoding_are_recovered(tmp_path):
    lines = [PROSE.encode("utf-8" if n % 3 == 0 else "gb18030") for n in range(9)]
    (tmp_path / "a.txt").write_bytes(b"\n".join(lines))
    book = read_book(tmp_path / "a.txt")
    assert book.text == "\n".join([PROSE] * 9)
    assert set(book.encoding.split("+")) == {"gb18030", "utf-8"}


def test_a_named_encoding_is_used(tmp_path):
    (tmp_path / "a.txt").write_bytes("剑".encode("gbk"))
    assert read_book(tmp_path / "a.txt", encoding="gbk").text == "剑"
    with pytest.raises(CorpusError, match="gkb is no encoding"):
        read_book(tmp_path / "a.txt", encoding="gkb")


def test_what_is_not_text_is_refused_by_name(tmp_path):
    (tmp_path / "a.txt").write_bytes(bytes(range(256)) * 40)
    with pytest.raises(CorpusError) as error:
        read_book(tmp_path / "a.txt")
    assert error.value.path == str(tmp_path / "a.txt")
    for magic in (b"PK\x03\x04", b"%PDF", b"Rar!", b"x" * 60 + b"BOOKMOBI"):
        (tmp_path / "docx.txt").write_bytes(magic + b" and the rest")
        with pytest.raises(CorpusError, match=r"Word.* export it as text"):
            read_book(tmp_path / "docx.txt")
    with pytest.raises(CorpusError, match="cannot be read"):
        read_book(tmp_path / "absent.txt")


@pytest.mark.parametrize(
    ("name", "encoding", "opening"),
    [
        ("三俠五義_big5", "cp950", "三俠五義"),
        ("水浒传_gbk_硬换行_广告", "gb18030", "水浒"),
        ("水浒传_utf8_网站广告", "utf-8", "水浒"),
    ],
)
def test_real_files_are_decoded(novels, name, encoding, opening):
    book = read_book(novels / "messy" / f"{name}.txt")
    assert book.encoding.split("+")[0] == encoding
    assert opening in book.text[:2000]
    assert book.text.count("\ufffd") < 0.001 * len(book.text)


def test_big5_and_its_extensions_are_read_together(decode):
    big5 = ("他道：「今日…」\r\n" * 200).encode("cp950")
    for odd, read in (
        ("那水〔".encode("cp950") + b"\x8b\xd0" + "舌〕石子的鳥，從溪邊飛過，…".encode("cp950"),
         "那水〔氵舌〕石子的鳥，從溪邊飛過，…"),
        ("玎璫一聲，".encode("cp950") + "他拿着".encode("big5hkscs"), "玎璫一聲，他拿着"),
        (b"\xa3\xe1\xa1\xe3\xa2\x44\xf9\xd8", "€～￥裏"),
        (b"\xc6\xe7\xc6\xa1", "ぁ①"),
        ("張媽愣".encode("cp950") + b"\x8b\xcb\xa5\x69" + "的功又不是".encode("cp950"),
         "張媽愣忄可的功又不是"),
    ):  # fmt: skip
        assert decode(big5 + odd + b"\r\n").text.split("\n")[-2] == read + "\r"


def test_what_follows_an_undecodable_byte_is_not_shifted(decode):
    around = "他拔劍而起，眾人無不變色。\n" * 200
    for odd in (b"\xff", b"\x80", b"\x81", b"\xc7\xff"):
        line = "鬧到這".encode("cp950") + odd + "早晚了，我餓的受不得了。".encode("cp950")
        assert decode(around.encode("cp950") + line).text.endswith("晚了，我餓的受不得了。")


@pytest.mark.parametrize(
    ("encoding", "around", "lines"),
    [
        ("cp950", TRADITIONAL, "鱖鰣 磽埆 魑魅魍魎 齷齪 餛飩 鰥寡 觳觫 囁嚅 玎璫"),
        ("gb18030", PROSE, "ài ì òu nǐ zhuān lüè àáǎ ①② 鳜鲥 硗埆 魑魅魍魉 饕餮 一 摹 佶屈聱牙"),
    ],
)
def test_too_little_evidence_never_leaves_the_encoding_of_the_file(decode, encoding, around, lines):
    for line in lines.split(" "):
        text = f"{around}\r\n" * 100 + f"{line}\r\n" + f"{around}\r\n" * 100
        book = decode(text.encode(encoding))
        assert (book.text, book.encoding) == (text, encoding)


@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("line", ["他说：“你来了。”", PROSE])
@pytest.mark.parametrize("place", [0, 30, 60])
def test_a_line_of_gbk_in_utf8_is_recovered_with_and_without_bom(decode, bom, line, place):
    lines = [STORY.encode()] * 60
    lines.insert(place, line.encode("gbk"))
    book = decode(bom + b"\n".join(lines))
    assert book.text.split("\n") == [STORY] * place + [line] + [STORY] * (60 - place)
    assert book.encoding == "utf-8+gb18030"


def test_long_lines_of_hong_kong_are_read(decode):
    text = f"{TRADITIONAL}他們都看着那柄長劍。\r\n" * 50
    assert decode(text.encode("big5hkscs")).text == text


@pytest.mark.parametrize(
    ("name", "text", "bytes_of"),
    [
        *((name, "镕、囧、着", "gb18030") for name in
          ("gb2312", "GB2312", "gbk", "x-gbk", "gb_2312-80", "chinese", "gb18030")),
        *((name, "着、他", "big5hkscs") for name in
          ("big5", "Big5-HKSCS", "cn-big5", "x-x-big5", "cp950")),
    ],
)  # fmt: skip
def test_a_name_means_what_the_web_means_by_it(decode, name, text, bytes_of):
    assert decode(text.encode(bytes_of), name).text == text


def test_valid_utf8_is_never_read_as_utf16(decode):
    text = "“你终于来了。”他说。\n" * 50
    book = decode(text.encode("gbk").decode("latin-1").encode())
    assert book.encoding == "utf-8"
    assert clean(book.text)[0] == text.rstrip()


def test_a_refusal_names_the_nearest_encodings_and_what_to_write(decode):
    with pytest.raises(CorpusError) as error:
        decode(f"{PROSE}\n".encode("gbk") * 9 + b"\xff" * 9)
    assert error.value.tried[:2] == ("gb18030", "cp950")
    assert error.value.offset == 9 * len(f"{PROSE}\n".encode("gbk"))
    assert "gb18030 and cp950 come nearest" in str(error.value)
    assert re.search(r"data\.encoding: \{书\.txt: cp950\}", str(error.value))


@pytest.mark.parametrize(
    ("right", "line"),
    [*product(("utf-8", "gbk"), MISREAD), ("utf-8", TRADITIONAL), ("cp950", TRADITIONAL)],
)
@pytest.mark.parametrize("wrong", ["latin-1", "cp1252"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_chinese_read_as_latin_is_repaired(right, line, wrong, end):
    try:
        misread = line.encode(right).decode(wrong)
    except UnicodeError:
        pytest.skip("has a byte that Windows-1252 leaves out")
    text, tallies = clean(f"{STORY}{end}{misread}{end}{STORY}")
    assert text == f"{STORY}\n{line}\n{STORY}"
    assert tallies[0].rule == "mojibake" and tallies[0].examples


@pytest.mark.parametrize(
    ("wrong", "right"),
    [("gb18030", "utf-8"), ("big5hkscs", "gb18030"), ("gb18030", "cp950"), ("big5hkscs", "utf-8")],
)
@pytest.mark.parametrize("lost", ["ignore", "replace"])
def test_one_encoding_of_chinese_read_as_another_is_repaired_or_goes(wrong, right, lost):
    line = TRADITIONAL if right == "cp950" else PROSE
    misread = line.encode(right).decode(wrong, lost)
    text, tallies = clean(f"{STORY}\n{misread}\n{STORY}")
    kept = text.removeprefix(STORY).removesuffix(STORY)
    assert sum(character not in line for character in kept) < 0.2 * len(line)
    assert {tally.rule for tally in tallies} <= {"mojibake", "garbled", "invisible", "blank_lines"}


@pytest.mark.parametrize("line", [*MISREAD, PROSE, "剑起", "第三回　灯下"])
@pytest.mark.parametrize("lost", ["ignore", "replace"])
def test_utf8_read_as_gbk_is_repaired_but_for_the_lost(line, lost):
    misread = line.encode().decode("gb18030", lost)
    text, tallies = clean(f"{STORY}\n{misread}\n{STORY}")
    assert [tally.rule for tally in tallies] == ["garbled"] and tallies[0].examples
    repaired = text.split("\n")[1]
    assert len(repaired) > 0.7 * len(line.encode().decode("gb18030", "ignore")) * 2 / 3
    assert set(repaired) <= set(line)


def test_what_a_lost_byte_put_out_of_step_goes(novels):
    book = read_book(novels / "messy" / "三国演义_gbk_站点模板.txt")
    text, tallies = clean(book.text)
    tally = next(tally for tally in tallies if tally.rule == "garbled")
    assert (tally.count, len(tally.examples)) == (3, 3) and 400 < tally.removed < 500
    for good in ("操大喜，\n却说侯成有马十五匹", "赵颜哭拜于地而求寿，\n操大喜，即差人往平原"):
        assert good in text
    assert not re.search("[恚骸罚粕烤]{2}", text)


@pytest.mark.parametrize(
    "text",
    [
        "苏涓拔剑。\n“苏涓，你来了？”苏涓一笑，苏涓不语。\n雨停了。",
        "他在浣花溪畔的浣花剑庐住了三年，鐨、鏄、鍦都是他不认得的字。",
        "骅骝骐骥，騄駬纤离；龙媒紫燕，挟翼骕骦；駃騠银騔，騕褭飞黄；騊駼翻羽，赤兔超光。",
        "魑魅魍魉饕餮梼杌獬豸狻猊貔貅睚眦狴犴螭吻",
        "鯾鲌起黄鱨。鲨鲻吃鮆鲭鱼走，牡蛎擒蛏蛤蚌",
        "呖呖，呖呖，呖呖；呖呖，呖呖，呖呖，呖呖",
        "揭谛揭谛波罗揭谛波罗僧揭谛菩提萨婆诃",
        "鼗鼓磬钲铙钹笙箫箜篌琵琶筚篥筝瑟埙篪",
        "Ça va très bien, déjà vu à l'été, Zoë Brontë, São Paulo é bonito, ÄÖÜäöüß",
        "Où es-tu, Noël ? À l'ombre des forêts où l'été fut très chaud, il a déjà rêvé ÀÉ.",
        "约翰·史密斯·金，¥100 §3 ¶5，±5°C，“¿Qué hora es? ¡Adiós!”",
        "半断食时服リチネ[ リチネ：西药名。",
        "他说：“Здравствуйте, товарищ!”又写道：ἐν ἀρχῇ ἦν ὁ λόγος。",
        "──克嚓──噗哧──",
        "曹锟、吴佩孚，和他的三斤拷绸。",
    ],
)
def test_rare_characters_and_other_languages_are_no_damage(text):
    assert clean(text) == (text, [])


def test_damage_in_a_line_goes_and_the_line_stays(novels):
    book = read_book(novels / "messy" / "三俠五義_big5.txt")
    text, tallies = clean(book.text, set(RULES) - {"garbled"})
    assert "就知是有來歷的，" in text and "只見包公立起身來，" in text
    assert not re.search("[潰骸叭骯]{2}", text)
    tally = tallies[0]
    assert (tally.rule, tally.count) == ("garbled", 4) and len(tally.examples) == 4
    assert 500 < tally.removed < 700


@pytest.mark.parametrize("lost", ["锟斤拷锟斤拷锟斤拷", "他的剑锟斤拷的"])
def test_of_a_line_only_the_lost_clause_goes(lost):
    assert clean(f"他拔剑而起，{lost}，众人无不变色。")[0] == STORY
    assert clean(f"{STORY}\n{lost}\n{STORY}")[0] == f"{STORY}\n{STORY}"


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("他笑著說，沿著河走，心中著急，睡不著覺。", "他笑着说，沿着河走，心中着急，睡不着觉。"),
        (
            "著名的劍客著書立說，著有《劍譜》，是部名著。",
            "著名的剑客著书立说，著有《剑谱》，是部名著。",
        ),
        (
            "他指著名單，寫著名姓，帶著書僮，忙著作揖。",
            "他指着名单，写着名姓，带着书僮，忙着作揖。",
        ),
        ("惡名昭著的土著，見微知著，戰功卓著。", "恶名昭著的土著，见微知著，战功卓著。"),
        ("石玉崑　著", "石玉昆　著"),
    ],
)
def test_zhe_of_taiwan_and_hong_kong(before, after):
    assert to_simplified(f"{TRADITIONAL}\n{before}").split("\n")[1] == after
    assert to_simplified(f"{PROSE * 9}\n{before}") == f"{PROSE * 9}\n{before}"


def test_hz_is_decoded(tmp_path):
    text = "“你来了。”他说。\n雪下得很大，他把刀收了起来。\n" * 20
    (tmp_path / "hz.txt").write_bytes(text.encode("hz"))
    assert read_book(tmp_path / "hz.txt").text == text
    (tmp_path / "code.txt").write_text("if (~{a}) { b = ~{c}; }\n" * 20)
    assert read_book(tmp_path / "code.txt").text.startswith("if (~{a})")


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be", "utf-32-le"])
def test_blocks_of_an_encoding_that_is_named_cut_no_character(tmp_path, encoding):
    """Rare characters look like another encoding, whose lines end with the byte 10."""
    text, path = "鏢局ㄠ匾齉龘靐齾\n" * 400, tmp_path / "书.txt"
    path.write_bytes(text.encode(encoding))
    assert "".join(block.text for block in read_blocks(path, encoding, 1001)) == text


def test_blocks_of_an_encoding_that_does_not_exist_are_refused(tmp_path):
    path = tmp_path / "书.txt"
    path.write_text(PROSE, encoding="utf-8")
    with pytest.raises(CorpusError, match="nope is no encoding"):
        list(read_blocks(path, "nope", 50))
