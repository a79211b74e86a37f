import html
import io
import json
import os
import re
import time
import zipfile
from pathlib import Path

import pytest
from conftest import has_chinese

from wuxia_core import mix, show
from wuxia_core.corpus import (
    File,
    FileReport,
    clean,
    find_files,
    formats,
    read_book,
    read_documents,
    split_chapters,
)
from wuxia_core.errors import DataError

PROSE = "话说那日天色将晚，老镖师独自坐在门前磨刀，忽听得远处马蹄声急，心中一惊。" * 9
CONTAINER = (
    '<?xml version="1.0"?><container><rootfiles><rootfile full-path="OEBPS/content.opf" '
    'media-type="application/oebps-package+xml"/></rootfiles></container>'
)
NOVELS = ["七剑十三侠", "三侠五义", "儿女英雄传", "水浒传", "续小五义", "绿牡丹"]


def packed(members: dict[str, str | bytes]) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return file.getvalue()


def epub(pages: dict[str, str], nav: str = "", opf: str = "", spine: str = "", **more) -> bytes:
    """An e-book of pages by name; `nav` is the body of its list of contents."""
    items = "".join(f'<item id="i{n}" href="{x}" media-type="x"/>' for n, x in enumerate(pages))
    refs = "".join(f'<itemref idref="i{n}"/>' for n in range(len(pages)))
    items += '<item id="nav" href="nav.xhtml" properties="nav" media-type="x"/>' if nav else ""
    package = f"<package><manifest>{items}{opf}</manifest><spine>{spine}{refs}</spine></package>"
    files = {"META-INF/container.xml": CONTAINER, "OEBPS/content.opf": package}
    files |= {"OEBPS/nav.xhtml": f"<html><body>{nav}</body></html>"} if nav else {}
    return packed(files | {f"OEBPS/{name}": page for name, page in pages.items()} | more)


def page(body: str, title: str = "书") -> str:
    return (
        '<?xml version="1.0" encoding="utf-8"?>\n<!DOCTYPE html PUBLIC "-//W3C//DTD XHTML 1.1//EN" '
        '"http://www.w3.org/TR/xhtml11/DTD/xhtml11.dtd">\n'
        f"<html>\n<head>\n<title>{title}</title>\n<style>p {{ text-indent: 2em }}</style>\n</head>"
        f"\n<body>\n{body}\n</body>\n</html>"
    )


def parts_of(text: str) -> list[tuple[str, list[str]]]:
    """A book as converters get it: headings, each with the lines of its chapter."""
    headings = {"".join(heading.split()) for heading, _ in split_chapters(clean(text)[0])} - {""}
    parts: list[tuple[str, list[str]]] = [("", [])]
    for line in filter(str.strip, text.splitlines()):
        if "".join(line.split()) in headings:
            parts.append((line.strip(), []))
        else:
            parts[-1][1].append(line.strip())
    return parts if parts[0][1] else parts[1:]


def paragraphs(lines):
    return "\n".join(f"  <p>{html.escape(line)}</p>" for line in lines)


def breaks(lines):
    return "<div>" + "<br/>\n".join(f"　　{html.escape(line)}" for line in lines) + "</div>"


def indented(lines):
    return "".join(f"<p>&nbsp;&nbsp;&nbsp;&nbsp;{html.escape(x)}</p>\n<p>&nbsp;</p>" for x in lines)


def numbered(lines):
    return "\n".join(f"<p>\n  {''.join(f'&#{ord(c)};' for c in line)}\n</p>" for line in lines)


def boxes(lines):
    return "".join(f'<DIV CLASS="p">&#12288;&#12288;{html.escape(x)}</DIV>\r\n' for x in lines)


BODIES = [paragraphs, breaks, indented, numbered, boxes]


def write(folder: Path, name: str, data: str | bytes) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return path


def read(path: Path, source="wuxia"):
    report = FileReport(File(path, source, path.stem, path.name))
    return [(d.chapter, d.text) for d in read_documents(report)], report


def chapter_pages(parts, body, level="h2"):
    return {
        f"Text/第{n}章.xhtml": page(
            (f"<{level}>{html.escape(heading)}</{level}>\n" if heading else "") + body(lines)
        )
        for n, (heading, lines) in enumerate(parts)
    }


def halves(parts, body):
    """Each chapter in two pages."""
    pages = {}
    for n, (heading, lines) in enumerate(parts):
        middle = len(lines) // 2
        title = f'<h1 class="c">\n  {html.escape(heading)}\n</h1>' if heading else ""
        pages[f"a{n}.html"] = page(title + body(lines[:middle]), f"{n}")
        pages[f"b{n}.html"] = page(body(lines[middle:]), f"{n}")
    return pages


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) for name in NOVELS[:-1]] + NOVELS[-1:]
)
def test_a_novel_as_epub_or_html_reads_as_its_txt_does(novels, tmp_path, name):
    original = novels / "wuxia" / f"{name}.txt"
    parts, body = parts_of(read_book(original).text), BODIES[NOVELS.index(name) % len(BODIES)]
    whole = page("".join((f"<h2>{html.escape(h)}</h2>" if h else "") + body(x) for h, x in parts))
    links = "".join(
        f'<li><a href="Text/%E7%AC%AC{n}%E7%AB%A0.xhtml">{html.escape(heading)}</a></li>'
        for n, (heading, _) in enumerate(parts)
        if heading
    )
    nav = f'<nav epub:type="toc"><ol>{links}</ol></nav>'
    pages = chapter_pages(parts, body)
    untitled = {key: re.sub("</?h2>", "\n<!-- > -->\n", x) for key, x in pages.items()}
    untitled = {key: re.sub("-->.*<!--", "--><!--", x) for key, x in untitled.items()}
    files = {
        "a.html": whole,
        "b.htm": whole.encode("gb18030"),
        "c.epub": epub(pages, nav),
        "d.epub": epub(untitled, nav),
        "e.epub": epub(halves(parts, body)),
        "f.html": page(f"<pre>{html.escape(read_book(original).text)}</pre>"),
    }
    expected = read(original)[0]
    for file, data in files.items():
        assert read(write(tmp_path, file, data))[0] == expected, file


CHAPTERS = [
    (f"第{n}回　剑起{n}", [f"{n}{PROSE}", "他说：“走罢 & 去罢。”", PROSE]) for n in "一二三四"
]
TEXT = "\n".join(line for heading, lines in CHAPTERS for line in [heading, *lines])
PAGES = chapter_pages(CHAPTERS, paragraphs)
NCX = "".join(
    f"<navPoint><navLabel><text>{heading}</text></navLabel>\n<content src='all.html#c{n}'/>"
    for n, (heading, _) in enumerate(CHAPTERS)
)
NCX = f"<navMap>{NCX}</navMap><pageList><text>7</text><content src='all.html#c1'/></pageList>"
NCX_ITEM = '<item id="ncx" href="toc.ncx" media-type="application/x-dtbncx+xml"/>'
GUIDE = "</manifest><guide><reference type='cover' href='c.html'/></guide><manifest>"
PLAIN = "".join(f"<p id='c{n}'>{h}</p>" + paragraphs(x) for n, (h, x) in enumerate(CHAPTERS))
WHOLE = page("".join(f"<h3>{h}</h3>" + paragraphs(x) for h, x in CHAPTERS))
LINKED = page("<h1>目录</h1>" + "".join(f"<p><a href='{x}'>{x}</a></p>" for x in [*PAGES] * 2))
NOTE = '<aside epub:type="footnote" id="n1"><p>注：剑，兵器也。</p></aside>'
DUOKAN = '<ol class="duokan-footnote-content"><li id="f1"><p>注：剑，兵器也。</p></li></ol>'
NOTED = {
    name: text.replace("<p>", '<p><a epub:type="noteref" href="#n1">[1]</a>', 1).replace(
        "</body>", NOTE + "</body>"
    )
    for name, text in PAGES.items()
}


def docx(chapters) -> bytes:
    style = '<w:pPr><w:pStyle w:val="Heading1"/></w:pPr>\n'
    hidden = (
        "<w:instrText>PAGE</w:instrText></w:r><w:del><w:r><w:delText>删</w:delText></w:r></w:del>"
    )
    text = (
        '<w:p>{}<w:r><w:t xml:space="preserve">{}</w:t>' + hidden + "<w:r><w:t>{}</w:t></w:r></w:p>"
    )
    body = "".join(
        text.format(style, heading[:2], heading[2:])
        + "".join(text.format("", html.escape(x[:5]), html.escape(x[5:])) for x in lines)
        for heading, lines in chapters
    )
    return packed({"[Content_Types].xml": "<Types/>", "word/document.xml": body})


def markdown(chapters) -> str:
    return "\n\n".join(f"## {heading}\n\n" + "\n\n".join(x) for heading, x in chapters)


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("a.epub", epub({"cover.html": page("<img src='x'/>"), **PAGES})),
        ("a.epub", epub({"toc.html": LINKED, **PAGES})),
        ("a.epub", epub({"c.html": page("封面"), **PAGES}, opf=GUIDE)),
        ("a.epub", epub(NOTED)),
        (
            "a.epub",
            epub({"cover.html": page("<h1>书名</h1>"), **PAGES, "notes.html": page("注：剑")}),
        ),
        (
            "a.epub",
            epub({"x.html": page("书").replace("<body", "<body epub:type='cover'"), **PAGES}),
        ),
        ("a.epub", epub({x: y.replace("</h2>", "</h2>" + DUOKAN) for x, y in PAGES.items()})),
        ("a.epub", epub({x: y.encode("utf-16") for x, y in PAGES.items()})),
        ("a.epub", epub({"all.html": page(PLAIN)}, opf=NCX_ITEM, **{"OEBPS/toc.ncx": NCX})),
        ("renamed.txt", epub(PAGES)),
        ("renamed.txt", docx(CHAPTERS)),
        ("a.docx", docx(CHAPTERS)),
        ("a.md", markdown(CHAPTERS)),
        ("a.md", markdown(CHAPTERS).replace("\n\n", "\r\n\r\n").replace("走罢", "**走罢**")),
        ("a.html", page(TEXT.replace("&", "&amp;").replace("\n", "<br>\n"))),
        ("a.html", WHOLE.replace("　", "<br/>")),
        ("a.html", WHOLE.replace("剑", "<ruby>剑<rt>jian</ruby>")),
        ("a.html", WHOLE.replace("老镖师", "老镖师<span style='font-size:0px'>盗版</span>")),
        ("a.html", WHOLE.replace("磨刀", "<!-- a > b --><i>磨</i>\n   刀")),
        ("a.html", WHOLE.replace("<p>", '<P title="a>b" class=x>').encode("gbk")),
    ],
)
def test_a_format_gives_the_text_and_chapters_of_a_txt(tmp_path, name, data):
    expected = read(write(tmp_path, "expected.txt", TEXT))[0]
    found, report = read(write(tmp_path, name, data))
    assert (report.skip_reason, report.notes, found) == ("", [], expected)


def found(folder: Path, general=None) -> dict[str, str]:
    """What is found in a folder: names, and as what, or why not."""
    return {file.name: file.source or file.left_out for file in find_files(folder, general)}


@pytest.mark.parametrize(
    ("names", "data", "advice"),
    [
        ("a.mobi b.azw3 c.azw d.pdf e.chm f.umd g.caj", b"x", "Calibre to .epub or .txt"),
        ("a.rar b.7z c.gz", b"x", "unpack it"),
        ("a.doc b.rtf", b"x", "save it as .docx or .txt"),
        ("a.jpg b c.xyz", b"x", "save it as .txt"),
        ("书.txt", b"%PDF-1.7\n...", ".pdf: not read; convert it with Calibre"),
        ("书.txt", b"x" * 60 + b"BOOKMOBI", ".mobi: not read; convert it with Calibre"),
        ("书.epub", b"Rar!\x1a\x07\x00", ".rar: not read; unpack it"),
        ("书.html", b"7z\xbc\xaf\x27\x1c", ".7z: not read; unpack it"),
        ("书.txt", b"\xd0\xcf\x11\xe0\xa1\xb1", ".doc: not read; save it as .docx"),
        ("书.md", b"ITSF\x03", ".chm: not read; convert it with Calibre"),
        ("书.txt", b"\x89\x9b\x9a\xde", ".umd: not read; convert it with Calibre"),
        ("书.epub 书.docx 书.zip 书.txt", b"PK\x03\x04 and no more", "damaged or incomplete"),
    ],
)
def test_what_is_not_read_is_named_with_what_to_do(tmp_path, caplog, names, data, advice):
    write(tmp_path, "好.txt", TEXT)
    for name in names.split():
        write(tmp_path, f"子/{name}", data)
    rows = found(tmp_path)
    assert rows.pop("好.txt") == "wuxia"
    assert set(rows) == {f"子/{name}" for name in names.split()}
    assert all(advice in reason and has_chinese(reason) for reason in rows.values())
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == len(set(rows.values()))  # a line a kind
    assert all(min(rows) in lines[0] and advice in line for line in lines)


def gbk_zip() -> bytes:
    """As a Chinese Windows packs it: names in GBK, and no flag that says so."""
    members = {
        "武侠/雪岭.txt": TEXT,
        "武侠/劍俠傳.txt": TEXT,
        "readme.md": "x",
        "武侠/封面.jpg": "x",
    }
    names = {name: name.encode("gbk").decode("cp437") for name in members}
    data = packed({f"{n:02}" + "x" * (len(names[x]) - 2): members[x] for n, x in enumerate(names)})
    for n, name in enumerate(names):
        raw = names[name].encode("cp437")
        data = data.replace((f"{n:02}" + "x" * (len(raw) - 2)).encode(), raw)
    return data


def test_an_archive_is_as_many_books_as_it_holds(tmp_path):
    write(tmp_path, "合集.zip", gbk_zip())
    renamed = {"Über.html": page(paragraphs([PROSE])), "b.epub": epub(PAGES)}
    renamed |= {"c.docx": docx(CHAPTERS), "d.md": markdown(CHAPTERS)}
    write(tmp_path, "改名.txt", packed(renamed))
    hostile = dict.fromkeys(["../../etc/逃.txt", "/tmp/绝.txt", "..\\反.txt", "g.pdf"], TEXT)
    write(tmp_path, "逃.zip", packed(hostile | {"里.zip": packed({"x.txt": TEXT})}))
    rows = found(tmp_path)
    wuxia = "合集.zip/武侠/雪岭.txt 合集.zip/武侠/劍俠傳.txt 改名.txt/Über.html 改名.txt/b.epub"
    wuxia += " 改名.txt/c.docx 改名.txt/d.md 逃.zip/etc/逃.txt 逃.zip/tmp/绝.txt 逃.zip/反.txt"
    wuxia = set(wuxia.split())
    others = {"合集.zip/readme.md", "合集.zip/武侠/封面.jpg", "逃.zip/里.zip", "逃.zip/g.pdf"}
    assert {name for name in rows if rows[name] == "wuxia"} == wuxia
    assert set(rows) - wuxia == others
    files = [file for file in find_files(tmp_path, None) if file.source]
    assert {file.book for file in files} == {name.rpartition(".")[0] for name in wuxia}
    for file in files:
        report = FileReport(file)
        texts = [document.text for document in read_documents(report)]
        assert "".join(texts).startswith(PROSE if "Über" in file.name else "第一回"), file.name
    assert not list(tmp_path.rglob("逃.txt"))


def locked_zip() -> bytes:
    data = bytearray(packed({"锁.txt": TEXT}))
    for mark, place in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        data[data.index(mark) + place] |= 1
    return bytes(data)


LAUGHS = "".join(f'<!ENTITY l{n + 1} "{f"&l{n};" * 10}">' for n in range(12))
LAUGHS = f'<?xml version="1.0"?><!DOCTYPE x [<!ENTITY l0 "哈">{LAUGHS}]>'
DRM = (
    '<encryption><enc:EncryptedData><enc:CipherReference URI="OEBPS/Text/%E7%AC%AC0%E7%AB%A0.xhtml"'
    "/></enc:EncryptedData></encryption>"
)
FONTS = DRM.replace("Text/", "Fonts/")


@pytest.mark.parametrize(
    ("name", "data", "reason"),
    [
        ("a.zip", packed({"a.txt": TEXT})[:-30], "damaged or incomplete"),
        ("a.epub", epub(PAGES)[:-200], "damaged or incomplete"),
        ("a.epub", packed({"a.xhtml": PAGES["Text/第0章.xhtml"]}), "META-INF/container.xml"),
        ("a.epub", packed({"META-INF/container.xml": CONTAINER}), "OEBPS/content.opf"),
        ("a.epub", packed({"META-INF/container.xml": "<x>"}), "damaged or incomplete"),
        ("a.epub", epub({}), "0 of 0 characters"),
        ("a.epub", epub({}, opf='<item id="a" href="b.html"/>', spine='<itemref idref="a"/>'),
         "OEBPS/b.html"),
        ("a.epub", epub(PAGES, **{"META-INF/encryption.xml": DRM}), "encrypted (DRM)"),
        ("a.epub", b"", "damaged or incomplete"),
        ("a.docx", b"", "damaged or incomplete"),
        ("a.docx", packed({"xl/workbook.xml": "<x/>"}), "word/document.xml"),
        ("a.html", b"", "0 of 0 characters"),
        ("a.md", b"", "0 of 0 characters"),
        ("a.zip", b"", "damaged or incomplete"),
        ("a.zip", packed({}), "an empty archive"),
        ("a.zip", locked_zip(), "encrypted"),
        ("a.html", LAUGHS + "<html><body><p>&l12;</p></body></html>", "characters are left"),
        ("a.docx", packed({"word/document.xml": LAUGHS + "<w:p><w:t>&l12;</w:t></w:p>"}),
         "characters are left"),
    ],
)  # fmt: skip
def test_what_is_damaged_or_malicious_has_one_clear_reason(tmp_path, caplog, name, data, reason):
    write(tmp_path, "好.txt", TEXT)
    write(tmp_path, name, data)
    reports = [FileReport(file) for file in find_files(tmp_path, None)]
    documents = [document for report in reports for document in read_documents(report)]
    assert {document.book for document in documents} == {"好"}
    reasons = [report.skip_reason or report.file.left_out for report in reports]
    assert len(reasons) == 2 and reason in max(reasons) and "\n" not in max(reasons)
    place = f"{reports[1 if reasons[1] else 0].file.place}: "
    assert has_chinese(max(reasons).removeprefix(place))


@pytest.mark.parametrize("name", ["a.zip", "a.epub", "a.docx"])
@pytest.mark.parametrize("sizes", [[9_000_000], [900_000] * 40])
def test_what_unpacks_to_far_more_than_a_book_is_not_unpacked(tmp_path, monkeypatch, name, sizes):
    monkeypatch.setattr(formats, "LARGEST", 1_000_000)
    members = {f"{n}.txt": b"0" * size for n, size in enumerate(sizes)}
    write(tmp_path, name, packed(members | {formats.MAIN_MEMBER.get(name[1:], "x.txt"): "x"}))
    write(tmp_path, "好.txt", TEXT)
    reports = [FileReport(file) for file in find_files(tmp_path, None)]
    assert len([document for report in reports for document in read_documents(report)]) == 4
    reasons = [report.skip_reason or report.file.left_out for report in reports]
    assert f"unpacks to {sum(sizes) / 1e6:.0f} MB" in max(reasons)


def test_fonts_may_be_scrambled(tmp_path):
    data = epub(PAGES, **{"META-INF/encryption.xml": FONTS})
    assert len(read(write(tmp_path, "a.epub", data))[0]) == len(CHAPTERS)


PIECES = ["<", "<a ", '<a "', "<a x='", "<a\n", "<!--", "<script>", "<!DOCTYPE [", "</", "<p>"]
PIECES += ["&", "[", "![](", "**", "#", "\n", " ", "第"]


@pytest.mark.parametrize("piece", PIECES)
@pytest.mark.parametrize("name", ["a.html", "a.md"])
def test_the_time_of_hostile_pages_grows_with_their_size(tmp_path, name, piece):
    seconds = []
    for size in (30_000, 300_000):
        path = write(tmp_path, name, piece * (size // len(piece)))
        started = time.process_time()
        list(formats.read(path, "", None, -1))
        seconds.append(time.process_time() - started)
    assert seconds[1] < 0.1 + 20 * seconds[0]


def test_own_folders_links_and_readmes_are_named_and_junk_is_not(tmp_path, caplog, monkeypatch):
    for name in ("甲.txt", "mixed/一.txt", "mixed/二.txt", "sample/x.epub", "子/mixed/三.txt",
                 "README.md", "lexicon.txt", ".DS_Store", "子/._甲.txt", ".git/z.txt"):  # fmt: skip
        write(tmp_path, name, TEXT)
    for name in ("tokens.npy", "manifest.json", "windows.parquet"):
        write(tmp_path, f"out/{name}", b"x")
    (tmp_path / "断").symlink_to(tmp_path / "nowhere")
    os.mkfifo(tmp_path / "管.txt")
    write(tmp_path, "锁/x.txt", TEXT)
    scandir = os.scandir

    def refuse(path):
        if Path(path).name == "锁":
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    rows = found(tmp_path)
    assert rows.pop("甲.txt") == rows.pop("子/mixed/三.txt") == "wuxia"
    assert set(rows) == {"mixed", "sample", "README.md", "断", "管.txt", "锁"}
    assert "rename it" in rows["mixed"] and "cannot be read" in rows["锁"]
    assert rows["断"] == "a link that leads nowhere" and rows["管.txt"] == "a pipe"
    for name in rows:
        assert any(name in record.getMessage() for record in caplog.records), name


def test_a_folder_without_a_novel_says_what_is_in_it(tmp_path):
    write(tmp_path, "书.azw3", b"x")
    with pytest.raises(DataError, match=r"no novel in it.*\n书.azw3: .azw3: not read; convert it"):
        find_files(tmp_path, None)
    write(tmp_path, "书.txt", TEXT)
    write(tmp_path, "通用/百科.pdf", b"x")
    with pytest.raises(DataError, match=r"no .txt or .jsonl.*\n通用/百科.pdf: .pdf: not read"):
        find_files(tmp_path, tmp_path / "通用")


def test_general_text_comes_in_the_same_formats(tmp_path):
    write(tmp_path, "书.txt", TEXT)
    write(tmp_path, "通用/百科.html", page(paragraphs([PROSE])))
    members = {"一.jsonl": json.dumps({"text": PROSE}), "二.txt": PROSE, "general.txt": PROSE}
    write(tmp_path, "通用/新闻.zip", packed(members))
    write(tmp_path, "随笔.log", PROSE)
    files = find_files(tmp_path, tmp_path / "通用")
    general = {file.name: file.book for file in files if file.source == "general"}
    names = {"百科.html": "百科", "新闻.zip/一.jsonl": "一", "新闻.zip/二.txt": "二"}
    names["新闻.zip/general.txt"] = "general"
    assert general == {f"通用/{name}": book for name, book in names.items()}
    reports = [FileReport(file) for file in files if file.source == "general"]
    texts = [document.text for report in reports for document in read_documents(report)]
    assert texts == [PROSE] * 4
    write(tmp_path, "书/书.txt", TEXT)
    named = find_files(tmp_path / "书", tmp_path / "随笔.log")  # what is named is read as text
    assert [file.name for file in named if file.source == "general"] == ["随笔.log"]


def test_the_table_of_files_says_what_is_odd(tmp_path, config):
    write(tmp_path, "书.txt", TEXT)
    write(tmp_path, "无题.txt", "\n".join(f"{n}，{PROSE}" for n in range(60)))
    write(tmp_path, "长.txt", f"{TEXT}\n" + f"{PROSE}\n" * 120)
    write(tmp_path, "损.txt", TEXT.encode() + b"\xff\n" + PROSE.encode())
    write(tmp_path, "坏.epub", b"PK\x03\x04")
    write(tmp_path, "书.pdf", b"%PDF-")
    write(tmp_path, "general.txt", PROSE * 9)
    config.data.data_dir, config.data.general_file = str(tmp_path), None
    config.data.processed_data_file = str(tmp_path / "out")
    config.data.deduplicate, config.data.max_general_epochs = False, 100
    mixture = mix(config)
    table = show.files_table(mixture).set_index("path")
    notes = table["note"].to_dict()
    assert "no headings found, cut into 6 parts" in notes["无题.txt"]
    assert "characters in 第四回　剑起四" in notes["长.txt"]
    assert "undecodable characters (�): 1" in notes["损.txt"]
    assert notes["书.pdf"] == ".pdf: not read; convert it with Calibre to .epub or .txt"
    assert notes["坏.epub"].startswith("a damaged or incomplete")
    assert notes["书.txt"] == ""
    chapters = table["chapters"].dropna().astype(int).to_dict()
    assert chapters == {"书.txt": 4, "长.txt": 4, "损.txt": 4}
    page = show.table(table.reset_index()).to_html()
    assert "nan" not in page and "&lt;NA&gt;" not in page and "<NA>" not in page
    assert mix(config).folder == mixture.folder and find_files(tmp_path, None)
