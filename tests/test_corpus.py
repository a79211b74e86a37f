import pytest

from wuxia_core.corpus import (
    chapters,
    clean,
    find_general,
    find_novels,
    read_book,
    read_general,
    read_novels,
)
from wuxia_core.corpus.chapters import _number
from wuxia_core.errors import CorpusError, DataError

PROSE = "话说那日天色将晚，老镖师独自坐在门前磨刀，忽听得远处马蹄声急，心中一惊。" * 3
TRADITIONAL = "話說那日天色將晚，老鏢師獨自坐在門前磨刀，忽聽得遠處馬蹄聲急，心中一驚。" * 3


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
    with pytest.raises(CorpusError, match="no encoding is called gkb"):
        read_book(tmp_path / "a.txt", encoding="gkb")


def test_what_is_not_text_is_refused_by_name(tmp_path):
    (tmp_path / "a.txt").write_bytes(bytes(range(256)) * 40)
    with pytest.raises(CorpusError) as error:
        read_book(tmp_path / "a.txt")
    assert error.value.path == str(tmp_path / "a.txt")
    (tmp_path / "docx.txt").write_bytes(b"PK\x03\x04 and the rest")
    with pytest.raises(CorpusError, match="Word"):
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


def test_cleaning_keeps_paragraphs_and_drops_indentation():
    assert clean("\ufeff　　甲。\r\n\r\n\r\n  乙 丙。　\n") == "甲。\n乙 丙。"


def test_chapters_are_cut_at_headings_and_lose_nothing():
    body = "他拔剑而起，众人无不变色。" * 5
    headings = ["第一回　剑起", "第二十回 风停", "尾声"]
    text = "书名\n" + "\n".join(f"{name}\n{body}\n他说第二回再来。" for name in headings)
    parts = chapters(text)
    assert [heading for heading, _ in parts] == headings
    assert "\n".join(part for _, part in parts) == text


def test_a_book_without_headings_is_cut_into_sections():
    text = "\n".join([PROSE] * 100)
    parts = chapters(text)
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
    parts = chapters(text)
    assert "\n".join(part for _, part in parts) == text
    assert [heading[:3] for heading, _ in parts] == [
        "",
        *(f"第{n}回" for n in "一二三四五六七八九"),
    ]


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
    ],
)
def test_chapters_of_real_novels(novels, name, count):
    text = clean(read_book(novels / f"{name}.txt").text)
    parts = chapters(text)
    assert sum("第" in heading for heading, _ in parts) == count
    assert "\n".join(part for _, part in parts) == text


def test_general_text_and_own_folders_are_never_novels(tmp_path):
    files = (
        "书.txt 子/书.TXT General.TXT general.txt 子/general.txt sample/x.txt 通用/y.txt .git/z.txt"
    )
    for name in [*files.split(), "mixed/w.txt", "说明.md"]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(PROSE, encoding="utf-8")
    general = tmp_path / "通用"
    found = [str(path.relative_to(tmp_path)) for path in find_novels(tmp_path, general)]
    assert sorted(found) == sorted(["书.txt", "子/书.TXT"])
    texts = {str(path.relative_to(tmp_path)) for path in find_general(tmp_path, general)}
    assert texts == {"General.TXT", "general.txt", "子/general.txt", "通用/y.txt"}


def test_an_empty_folder_says_so(tmp_path):
    with pytest.raises(DataError, match="no novel in it"):
        find_novels(tmp_path, None)
    with pytest.raises(DataError, match="no such folder"):
        find_novels(tmp_path / "absent", None)


def test_a_bad_file_is_left_out_and_named(tmp_path, caplog):
    (tmp_path / "好.txt").write_text(PROSE, encoding="utf-8")
    (tmp_path / "坏.txt").write_bytes(b"\x00" * 500)
    documents = read_novels(sorted(tmp_path.iterdir()), tmp_path)
    assert {document.book for document in documents} == {"好"}
    assert "坏.txt" in caplog.text
    with pytest.raises(DataError, match=r"坏\.txt"):
        read_novels([tmp_path / "坏.txt"], tmp_path)


def test_short_lines_of_general_text_are_gathered(tmp_path):
    lines = ["短句。"] * 100 + ["长" * 450]
    (tmp_path / "g.txt").write_text("\n".join(lines), encoding="utf-8")
    texts = [document.text for document in read_general(tmp_path / "g.txt")]
    assert "\n".join(texts) == "\n".join(lines)
    assert all(len(text) >= 200 for text in texts)


@pytest.mark.parametrize(
    "line", ['{"text": "\\ud800"}', '{"text": 5}', '{"txt": "甲"}', '["甲"]', '{"text": "甲"']
)
def test_a_bad_line_of_jsonl_is_numbered(tmp_path, line):
    path = tmp_path / "g.jsonl"
    path.write_text('{"text": "甲"}\n' + line + "\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"g\.jsonl:2"):
        read_general(path)
