"""From the formats that books come in to text as a .txt has it: pages, e-books, Word, archives.

Nothing is unpacked to disk, and nothing that a file defines (entities, scripts, links) is followed.
It knows neither the rules of cleaning nor what a chapter is.
"""

import functools
import html
import posixpath
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from io import BytesIO
from itertools import chain
from lzma import LZMAError
from pathlib import Path, PurePath
from typing import IO, NamedTuple
from urllib.parse import unquote
from zipfile import BadZipFile, ZipFile, ZipInfo

from wuxia_core.corpus.encodings import _decode_block, read_blocks
from wuxia_core.errors import CorpusError
from wuxia_core.text import CJK_TEXT

# Kinds of files, by suffix.
READ = frozenset({".txt", ".md", ".html", ".htm", ".xhtml", ".epub", ".docx", ".zip"})
ADVICE = {kind: what for what, kinds in (
    ("convert it with Calibre to .epub or .txt",
     ".mobi .azw .azw3 .azw4 .kfx .prc .pdb .pdf .chm .fb2 .lit .djvu .umd .caj"),
    ("unpack it", ".rar .7z .gz .tgz .tar .bz2 .xz"),
    ("save it as .docx or .txt", ".doc .rtf .odt .wps"),
) for kind in kinds.split()}  # fmt: skip
PARTS = {".epub": "META-INF/container.xml", ".docx": "word/document.xml"}  # which each has
HEAD = 100  # bytes that tell a kind
MAGIC = (
    (b"PK\x03\x04", 0, ".zip"), (b"PK\x05\x06", 0, ".zip"), (b"%PDF", 0, ".pdf"),
    (b"BOOKMOBI", 60, ".mobi"), (b"TEXtREAd", 60, ".pdb"), (b"\x89\x9b\x9a\xde", 0, ".umd"),
    (b"ITSF", 0, ".chm"), (b"CAJ\x00", 0, ".caj"), (b"\xd0\xcf\x11\xe0", 0, ".doc"),
    (b"{\\rtf", 0, ".rtf"), (b"Rar!", 0, ".rar"), (b"7z\xbc\xaf", 0, ".7z"),
    (b"\x1f\x8b\x08", 0, ".gz"), (b"\xfd7zXZ", 0, ".xz"),
)  # fmt: skip

# Archives.
LARGEST = 256_000_000  # bytes of a member
MOST = 100  # times its own size that an archive may unpack to; text comes to about 3
DAMAGED = (BadZipFile, zlib.error, LZMAError, OSError, EOFError, RuntimeError, ValueError,
           LookupError)  # fmt: skip

# Pages.
GONE = re.compile(
    r"<!--.*?(?:-->|\Z)|<(?:script|style)\b[^<>]*(?<!/)>.*?(?:</(?:script|style)\s*>|\Z)"
    r"|<!DOCTYPE\b[^<>\[]*(?:\[(?:[^\]<>]|<[^<>]*>)*+\])?[^<>]*>|<!\[CDATA\[|\]\]>|<[!?][^<>]*>",
    re.DOTALL | re.IGNORECASE,
)
TAG = re.compile(r"<(/?)(?:\w+:)?([a-zA-Z]\w*)((?:[^<>\"']|\"[^\"<]*\"|'[^'<]*'|[\"'])*+)>")
ATTRIBUTE = re.compile(r"([\w:-]+)(?:\s*=\s*(?:\"([^\"]*)\"|'([^']*)'|([^\s\"'>]+)))?")
BLOCK = re.compile(
    "/?(?:address|article|aside|blockquote|body|center|d[dlt]|div|fig\\w+|footer|form|h[1-6r]|head"
    "|header|li|main|ol|p|pre|section|t(?:able|[dhr])|ul)"
)
TITLED = re.compile("h[1-3]")
HIDDEN = re.compile("nav|title|r[tp]|noscript|template|select|button|instrtext|deltext|fallback")
NO_STORY = re.compile(
    r"\b(?:cover|toc|(?:foot|end|rear)?notes?|landmarks|noteref|page-list|pagebreak)\b"
)
TOC = re.compile(r"\bnav\b|dtbncx")
UNSEEN = re.compile(r"display\s*:\s*none|font-size\s*:\s*0+(?:px|pt|em|%)?\s*(?:;|$)")
UNENDED = {"p", "br", "hr", "img"}  # with no end of their own they hide nothing
WHITE = re.compile(r"[ \t\n\f]+")
WRAP = re.compile(r"(?<=[!-~])\r+(?=[!-~])")
UNBROKEN = 3000  # characters: in a longer line the source's newlines are line ends
LINKS = 5  # fewer are no table of contents
MARKDOWN = re.compile(
    r"^(#{1,6})[ \t]++|\*\*([^*\n]{1,500})\*\*"
    r"|(?:!\[[^\[\]\n]{0,200}\]|\[([^\[\]\n]{0,200})\])\([^()\n]{0,500}\)",
    re.MULTILINE,
)
WORD_TITLE = re.compile("(?:heading|标题)? ?[1-4]", re.IGNORECASE)
TITLE = "\x01"  # what a heading begins with, while a page is read
BLANK = " \t\r\xa0　" + TITLE
ENCRYPTION = "META-INF/encryption.xml"

Tag = tuple[str, dict[str, str], str]  # "p" or "/p", attributes, the text behind it
Titles = dict[str, list[str]]  # of pages


class Text(NamedTuple):
    """Decoded text; `titles` are the lines that its format calls headings, without blanks."""

    text: str
    encoding: str
    titles: frozenset[str] = frozenset()
    notes: tuple[str, ...] = ()


def kind_of(name: str, file: IO[bytes]) -> str:
    """Tell what a file is: its suffix, unless it holds something else.

    `"书.txt"` that begins with `%PDF` is `".pdf"`, one that is an e-book `".epub"`.
    """
    suffix, head = PurePath(name).suffix.lower(), file.read(HEAD)
    kind = next((kind for mark, at, kind in MAGIC if head.startswith(mark, at)), suffix)
    if suffix not in {*READ, "", ".jsonl"} or kind != ".zip":
        return kind if suffix in {*READ, "", ".jsonl"} else suffix
    names = ZipFile(file).namelist()
    inside = next((kind for kind, part in PARTS.items() if part in names), kind)
    return suffix if suffix in PARTS else inside


def contents(path: Path) -> Iterator[tuple[str, str, str]]:
    """List what is in a file: `(member, kind, what is wrong with it)`; "" is the file itself."""
    try:
        with path.open("rb") as file:
            kind = kind_of(path.name, file)
        if kind != ".zip":
            yield "", kind, ""
            return
        members = _members(path, path.stat().st_mtime_ns)[1]
        if not members:
            yield "", "", "an empty archive"
        for name, info in members.items():
            kind = PurePath(name).suffix.lower()
            nested = "an archive in an archive; unpack it" if kind == ".zip" else ""
            yield name, kind, "encrypted; unpack it" if info.flag_bits & 1 else nested
    except OSError:
        yield "", path.suffix.lower(), ""  # who reads it will tell
    except DAMAGED as error:
        yield "", "", _damage(error)


def _damage(error: Exception) -> str:
    what = "a damaged or incomplete archive, e-book or Word file"
    return f"{what} ({error or type(error).__name__}); get it anew"


def _open(source: Path | BytesIO) -> ZipFile:
    """Open an archive, unless it unpacks to far more than text does."""
    archive = ZipFile(source)
    sizes = [info.file_size for info in archive.infolist()]
    if max(sizes, default=0) > LARGEST or sum(sizes) > LARGEST + MOST * archive.start_dir:
        raise ValueError(f"it unpacks to {sum(sizes) / 1e6:,.0f} MB, more than books do")
    return archive


def _name(member: ZipInfo) -> str:
    """Decode a member's name, which is UTF-8, GBK or cp437, and keep it inside the archive.

    Read as cp437, a name in GBK has signs in it, not only letters.
    """
    name = member.filename
    if not member.flag_bits & 0x800 and not all(c < "\x80" or "À" <= c <= "ɏ" for c in name):
        raw = name.encode("cp437", "replace")
        valid = (raw.decode(encoding, "replace") for encoding in ("utf-8", "gb18030"))
        name = next((decoded for decoded in valid if "\ufffd" not in decoded), name)
    return "/".join(part for part in re.split(r"[/\\]", name) if part not in {"", ".", ".."})


def read(path: Path, member: str, encoding: str | None, size: int) -> Iterator[Text]:
    """Read a file, or a member of an archive, as text: plain text in blocks of `size` bytes.

    Raises `CorpusError` where it is no text, of a kind that is not read, damaged or encrypted.
    """
    place = Path(path, member)
    try:
        with BytesIO(_unpacked(path, member)) if member else path.open("rb") as file:
            kind = kind_of(place.name, file)
            file.seek(0)
            data = file.read() if member or kind in READ - {".txt"} else b""
        if kind in ADVICE:
            raise CorpusError(f"{place}: {kind}: not read; {ADVICE[kind]}", str(place))
        if member or data:
            yield _convert(data, kind, place, encoding)
        else:
            for block in read_blocks(path, encoding, size):
                yield Text(block.text, block.encoding)
    except DAMAGED as error:
        raise CorpusError(f"{place}: {_damage(error)}", str(place)) from None


def _unpacked(path: Path, member: str) -> bytes:
    archive, members = _members(path, path.stat().st_mtime_ns)
    return archive.read(members[member])


@functools.lru_cache(maxsize=1)  # one archive stays open: it has as many members as it has books
def _members(path: Path, _changed: int) -> tuple[ZipFile, dict[str, ZipInfo]]:
    """Open an archive and list its files, by their names in order."""
    archive = _open(path)
    files = {_name(info): info for info in archive.infolist() if not info.is_dir()}
    return archive, dict(sorted(files.items()))


def _convert(data: bytes, kind: str, place: Path, encoding: str | None) -> Text:
    if kind == ".epub":
        return _epub(data, place, encoding)
    if kind == ".docx":
        with _open(BytesIO(data)) as archive:
            data = archive.read(PARTS[kind])
    block = _decode_block(data, place, encoding, 0)
    lines = [block.text]
    if kind == ".md":
        lines = MARKDOWN.sub(_unmarked, block.text).split("\n")
    elif kind in READ - {".txt"}:
        lines = _lines(_tags(block.text))
    return _joined(lines, block.encoding)


def _unmarked(match: re.Match[str]) -> str:
    return TITLE if match[1] else match[2] or match[3] or ""


def _epub(data: bytes, place: Path, encoding: str | None) -> Text:
    """Read an e-book's pages in their order, without cover, contents and notes."""
    with _open(BytesIO(data)) as archive:

        def page(name: str) -> list[Tag]:
            return _tags(_decode_block(archive.read(name), place / name, encoding, 0).text)

        spine, titles, out = _package(page)
        locks = page(ENCRYPTION) if ENCRYPTION in archive.namelist() else []
        if not {unquote(values.get("uri", "")) for _, values, _ in locks}.isdisjoint(spine):
            raise CorpusError(f"{place}: encrypted (DRM); get it without", str(place))
        pages = {name: page(name) for name in spine}
    titles = titles or _own_titles(pages)
    out |= {name for name in spine if _is_contents(pages[name])}
    lines = (_titled(_lines(pages[x]), titles.get(x, [])) for x in spine if x not in out)
    left_out = ", ".join(name for name in spine if name in out)
    notes = (f"left out as cover, contents or notes: {left_out}",) if left_out else ()
    return _joined(chain(*lines), "utf-8", notes, chain(*titles.values()))


def _package(page: Callable[[str], list[Tag]]) -> tuple[list[str], Titles, set[str]]:
    """Find an e-book's pages in order, their titles, and the pages that are no story."""
    roots = [values["full-path"] for tag, values, _ in page(PARTS[".epub"]) if tag == "rootfile"]
    if not roots:
        raise ValueError(f"no rootfile in {PARTS['.epub']}")
    items, spine, out = {}, [], set()
    titles: Titles = {}
    for tag, values, _ in page(roots[0]):
        name = _target(roots[0], values.get("href", ""))
        if tag == "item":
            items[values["id"]] = name
            out |= {name} if NO_STORY.fullmatch(PurePath(name).stem) else set()
        if tag == "itemref" and values.get("linear") != "no" and values["idref"] in items:
            spine.append(items[values["idref"]])
        if tag == "reference" and NO_STORY.fullmatch(values.get("type", "")):
            out.add(name)  # with a place behind # it is no page, but a part of one
        if TOC.search(f"{values.get('properties')} {values.get('media-type')}"):
            out.add(name)
            for href, title in _contents(page(name)):
                titles.setdefault(_target(name, href).partition("#")[0], []).append(title)
    return spine, titles, out


def _target(base: str, href: str) -> str:
    """Resolve a link: from `"OEBPS/a.opf"`, `"b%20c.html#d"` leads to `"OEBPS/b c.html#d"`."""
    return posixpath.normpath(posixpath.join(posixpath.dirname(base), unquote(href)))


def _contents(page: list[Tag]) -> Iterator[tuple[str, str]]:
    """List the links and titles in an e-book's table of contents, of either kind."""
    section = title = href = ""
    for tag, values, text in page:
        if tag in {"nav", "navmap", "pagelist", "navlist"}:
            section = values.get("epub:type", tag)
        title = text if tag in {"a", "text"} else title + text
        href = values.get("href") or values.get("src") or href
        if tag in {"/a", "content"} and section in {"toc", "navmap"}:
            yield href, WHITE.sub(" ", title).strip()


def _own_titles(pages: Mapping[str, list[Tag]]) -> Titles:
    """Take the titles of pages, but not the book's, which stands in all of them."""
    own = {name: text.strip() for name in pages for tag, _, text in pages[name] if tag == "title"}
    times = Counter(own.values())
    fit = {name for name in own if times[own[name]] == 1 < len(own) and CJK_TEXT.search(own[name])}
    return {name: [own[name]] for name in fit}


def _titled(lines: list[str], titles: list[str]) -> list[str]:
    """Put a page's first title above it, unless it has one, or no text."""
    beginning = squeeze("".join(lines[:3]))
    titled = any(line.startswith(TITLE) for line in lines) or not beginning
    there = titled or not titles or beginning.startswith(squeeze(titles[0]))
    return lines if there else [titles[0], *lines]


def _is_contents(page: list[Tag]) -> bool:
    """Whether most of a page's text stands in links."""
    links = [text for tag, values, text in page if tag == "a" and "href" in values]
    total = sum(len(text.strip()) for _, _, text in page)
    return len(links) >= LINKS and 2 * len("".join(links)) > total


def _tags(text: str) -> list[Tag]:
    """List a page's tags in small letters, without prefixes such as `w:`."""
    first, *rest = TAG.split(GONE.sub("", text.replace("\r\n", "\n").replace("\r", "\n")))
    found: list[Tag] = [("", {}, html.unescape(first))]
    for end, name, values, behind in zip(*[iter(rest)] * 4, strict=True):
        named = {key.lower(): html.unescape(max(v)) for key, *v in ATTRIBUTE.findall(values)}
        found.append((end + name.lower(), named, ""))
        if values.endswith("/"):
            found.append((f"/{name.lower()}", {}, ""))
        found[-1] = (*found[-1][:2], html.unescape(behind))
    return found


def _visible(page: Iterable[Tag]) -> Iterator[Tag]:
    """Leave out what a reader is not shown, and notes."""
    hidden, depth = "", 0
    for tag, values, text in page:
        if depth:
            depth += (tag == hidden) - (tag == f"/{hidden}")
            depth *= tag != "/ruby"  # <rt> needs no end
        elif HIDDEN.fullmatch(tag) or (tag not in UNENDED and _is_apart(values)):
            hidden, depth = tag, 1
        if not depth:
            yield tag, values, text


def _is_apart(values: Mapping[str, str]) -> bool:
    duokan = values.get("class", "").partition("duokan-")[2]  # a reader that has its own names
    kinds = f"{values.get('epub:type')} {values.get('role')} {duokan}"
    unseen = "hidden" in values or UNSEEN.search(values.get("style", ""))
    return bool(unseen or NO_STORY.search(kinds))


def _lines(page: Iterable[Tag]) -> list[str]:
    r"""Put a page's text in lines.

    Until the end \v stands between blocks, and \r for a newline of the source.
    """
    pieces, heading, pre = [], False, False
    for tag, values, text in _visible(page):
        name = tag.removeprefix("/")
        heading = tag == name if TITLED.fullmatch(name) else heading
        pre = tag == name if name == "pre" else pre
        pieces += [_sign(tag, values, heading), text if pre else WHITE.sub(_source, text)]
    return list(chain(*(_blocks(line) for line in "".join(pieces).split("\n"))))


def _sign(tag: str, values: Mapping[str, str], heading: bool) -> str:
    """Say what a tag puts into the text."""
    if TITLED.fullmatch(tag) or (tag == "pstyle" and WORD_TITLE.fullmatch(values["w:val"])):
        return f"\v{TITLE}"
    if tag == "br":
        return "　" if heading else "\n"
    return "\t" * (tag == "tab") or "\v" * bool(BLOCK.fullmatch(tag))


def _source(match: re.Match[str]) -> str:
    return "\r" if "\n" in match.group() else match.group()


def _blocks(line: str) -> list[str]:
    """Cut a line into blocks that have text; a newline of the source is a space between words."""
    blocks = [block for block in line.split("\v") if block.strip(BLANK)]
    unwrapped = (
        [WRAP.sub(" ", block).replace("\r", "")] if len(block) < UNBROKEN else block.split("\r")
        for block in blocks
    )
    return list(chain(*unwrapped)) or [""]


def squeeze(line: str) -> str:
    """Leave out a line's blanks, and its mark."""
    return "".join(line.split()).lstrip(TITLE)


def _joined(
    lines: Iterable[str], used: str, notes: tuple[str, ...] = (), titles: Iterable[str] = ()
) -> Text:
    """Join lines, and remember which are titles."""
    lines = list(lines)
    names = {squeeze(x) for x in (*titles, *(x for x in lines if x.startswith(TITLE)))} - {""}
    return Text("\n".join(line.lstrip(TITLE) for line in lines), used, frozenset(names), notes)
