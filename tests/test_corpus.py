import os

import pytest
from conftest import has_chinese

from wuxia_core.corpus import (
    RULES,
    File,
    FileReport,
    find_files,
    read_book,
    read_documents,
    reading,
)
from wuxia_core.corpus.encodings import read_blocks
from wuxia_core.errors import DataError

PROSE = "话说那日天色将晚，老镖师独自坐在门前磨刀，忽听得远处马蹄声急，心中一惊。" * 3
TRADITIONAL = "話說那日天色將晚，老鏢師獨自坐在門前磨刀，忽聽得遠處馬蹄聲急，心中一驚。" * 3


def read(path, source="wuxia", **settings):
    account = FileReport(File(path, source, path.stem, path.name))
    return list(read_documents(account, **settings)), account


def test_a_long_file_is_read_in_blocks_that_end_with_a_line(tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "BLOCK", 2000)
    path = tmp_path / "长.txt"
    path.write_text("\n".join([PROSE] * 60), encoding="gb18030")
    blocks = list(read_blocks(path, None, 2000))
    assert len(blocks) > 3 and all(block.text.endswith("\n") for block in blocks[:-1])
    assert "".join(block.text for block in blocks) == read_book(path).text
    jsonl = tmp_path / "长.jsonl"
    jsonl.write_text(('{"text": "甲乙丙丁"}\n' * 200) + '{"text": 5}\n')
    with pytest.raises(DataError, match=r"jsonl:201: must be an object"):
        read(jsonl, "general")
    path.write_text("\n".join([PROSE] * 60), encoding="utf-16")
    assert [block.text for block in read_blocks(path, None, 2000)] == [read_book(path).text]


def test_general_text_and_own_folders_are_never_novels(tmp_path):
    files = (
        "书.txt 子/书.TXT General.TXT general.txt 子/general.txt sample/x.txt 通用/y.txt .git/z.txt"
    )
    for name in [*files.split(), "mixed/w.txt", "说明.md"]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(PROSE, encoding="utf-8")
    files = find_files(tmp_path, tmp_path / "通用")
    paths = {
        source: {str(file.path.relative_to(tmp_path)) for file in files if file.source == source}
        for source in ("wuxia", "general")
    }
    assert paths["wuxia"] == {"书.txt", "子/书.TXT", "说明.md"}
    assert paths["general"] == {"General.TXT", "general.txt", "子/general.txt", "通用/y.txt"}


@pytest.mark.parametrize("name", ["my_general.txt", "通用语料.txt", "zhwiki/aa.txt", "百科.jsonl"])
def test_general_text_that_nobody_named_is_left_out_and_what_to_do_is_said(tmp_path, name, caplog):
    for each in ("将军令 The Generals.txt", name):
        (tmp_path / each).parent.mkdir(exist_ok=True)
        (tmp_path / each).write_text(PROSE, encoding="utf-8")
    files = {file.name: file for file in find_files(tmp_path, None)}
    assert files["将军令 The Generals.txt"].source == "wuxia" and not files[name].source
    assert caplog.text.count("left out") == 1
    assert name in caplog.text and "name it as --general or data.general_file" in caplog.text
    assert has_chinese(files[name].left_out)


def test_a_folder_that_may_not_be_read_says_so(tmp_path):
    data_dir = tmp_path / "locked"
    data_dir.mkdir(mode=0)
    for parent in (tmp_path, tmp_path.parent, tmp_path.parent.parent):
        parent.chmod(0o755)
    user = os.geteuid()
    os.seteuid(user or 65534)  # root may read all
    try:
        with pytest.raises(DataError, match="locked: no such folder, or it cannot be read"):
            find_files(data_dir, None)
    finally:
        os.seteuid(user)
        data_dir.chmod(0o755)


@pytest.mark.parametrize("folder", ["wiki", "wiki.x"])
def test_what_a_general_folder_is_called_does_not_tell_what_is_read(tmp_path, folder):
    (tmp_path / "novels").mkdir()
    (tmp_path / "novels" / "书.txt").write_text(PROSE)
    (tmp_path / folder).mkdir()
    for name in ("a.txt", "b.x", "Makefile"):
        (tmp_path / folder / name).write_text(PROSE)
    files = find_files(tmp_path / "novels", tmp_path / folder)
    assert [file.name for file in files if file.source] == ["书.txt", "a.txt"]
    named = find_files(tmp_path / "novels", tmp_path / folder / "b.x")
    assert [file.name for file in named if file.source] == ["书.txt", "b.x"]


def test_an_empty_folder_says_so(tmp_path):
    with pytest.raises(DataError, match="no novel in it"):
        find_files(tmp_path, None)
    with pytest.raises(DataError, match="no such folder"):
        find_files(tmp_path / "absent", None)


def test_books_of_one_title_keep_apart(tmp_path, caplog):
    for name in ("书.txt", "书.TXT", "甲/书.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(PROSE, encoding="utf-8")
    assert [file.book for file in find_files(tmp_path, None)] == ["书", "书 (2)", "甲/书"]
    assert "another file is called 书 too" in caplog.text


def test_links_in_a_circle_and_folders_called_txt(tmp_path, caplog):
    (tmp_path / "x.txt").mkdir()
    (tmp_path / "x.txt" / "书.txt").write_text(PROSE, encoding="utf-8")
    (tmp_path / "圈").symlink_to(tmp_path)
    (tmp_path / "自.txt").symlink_to(tmp_path / "自.txt")
    (tmp_path / "断.txt").symlink_to(tmp_path / "absent.txt")
    files = find_files(tmp_path, None)
    assert [file.book for file in files if file.source] == ["x.txt/书"]
    assert [file.name for file in files if "a link" in file.left_out] == ["断.txt", "自.txt"]
    assert "断.txt, 自.txt: a link" in caplog.text


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"", "0 of 0 characters"),
        ("侠客行".encode(), "3 of 3 characters"),
        (b"\x00" * 500, "not text"),
        (b"PK\x03\x04 and the rest", "Word"),
        (("【更多精彩小说请访问 www.example.com 全文阅读】\n" * 99).encode(), "by the rule ads"),
        (PROSE.encode("gbk") + b"\xff\xff\xff" * 99, "cannot be decoded"),
        (f"{PROSE}\n".encode() * 9 + b"\xff" * 9, "at byte 2925"),
    ],
)
def test_a_bad_file_is_refused_in_its_account(tmp_path, content, why):
    path = tmp_path / "坏.txt"
    path.write_bytes(content)
    documents, account = read(path)
    assert documents == []
    assert account.skip_reason.startswith(f"{path}: ") and why in account.skip_reason
    assert has_chinese(account.skip_reason.removeprefix(f"{path}: "))


def test_a_line_without_end_is_cut_after_sentences(tmp_path, caplog):
    path = tmp_path / "长.txt"
    path.write_text(PROSE * 400, encoding="utf-8")
    documents, account = read(path)
    assert "".join(document.text for document in documents).replace("\n", "") == PROSE * 400
    assert max(len(line) for d in documents for line in d.text.split("\n")) <= 6000
    assert "1 lines of over 6,000" in caplog.text and account.kept == len(PROSE) * 400


def test_an_account_says_what_became_of_a_file(tmp_path):
    path = tmp_path / "书.txt"
    path.write_text(f"　　{PROSE}\r\n\r\n　　第一回 起\r\n{PROSE}\r\n", encoding="gb18030")
    documents, account = read(path)
    assert (account.encoding, account.documents) == ("gb18030", len(documents) == 2 and 2)
    inserted = sum(tally.inserted for tally in account.cleaning.values())
    removed = sum(tally.removed for tally in account.cleaning.values())
    assert account.characters + inserted - removed == account.kept
    assert read(path, skip=frozenset(RULES))[1].cleaning == {}


def test_traditional_text_is_converted_where_asked(tmp_path):
    path = tmp_path / "書.txt"
    path.write_text(TRADITIONAL, encoding="cp950")
    assert read(path)[0][0].text == TRADITIONAL
    assert read(path, simplify=True)[0][0].text == PROSE


def test_short_lines_of_general_text_are_gathered(tmp_path):
    lines = ["短句。"] * 100 + ["长" * 450]
    (tmp_path / "g.txt").write_text("\n".join(lines), encoding="utf-8")
    texts = [document.text for document in read(tmp_path / "g.txt", "general")[0]]
    assert "\n".join(texts) == "\n".join(lines)
    assert all(len(text) >= 200 for text in texts)


@pytest.mark.parametrize(
    "line", ['{"text": "\\ud800"}', '{"text": 5}', '{"txt": "甲"}', '["甲"]', '{"text": "甲"']
)
@pytest.mark.parametrize("after", ["", '\n{"text": "乙"}\n'])
def test_a_bad_line_of_jsonl_is_numbered(tmp_path, line, after):
    path = tmp_path / "g.jsonl"
    path.write_text('{"text": "甲"}\n' + line + after, encoding="utf-8")
    with pytest.raises(DataError, match=r"g\.jsonl:2"):
        read(path, "general")
