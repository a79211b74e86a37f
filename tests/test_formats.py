import html
import io
import re
import zipfile
from pathlib import Path

import pytest

from wuxia_core.corpus import File, FileReport, clean, read_book, read_documents, split_chapters

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
    """A book as converters get it: headings, each with its lines."""
    parts: list[tuple[str, list[str]]] = []
    for heading, part in split_chapters(clean(text)[0]):
        lines = part.split("\n")
        parts.append((heading, lines[1:] if heading == lines[0].strip() else lines))
    return parts


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
