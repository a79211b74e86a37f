"""From the formats that books come in to text as a .txt has it: pages, e-books, Word, archives.

Nothing is unpacked to disk, and nothing that a file defines (entities, scripts, links) is followed.
It knows neither the rules of cleaning nor what a chapter is.
"""

import functools
import re
import zlib
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path, PurePath
from typing import IO
from urllib.parse import unquote, urljoin
from zipfile import BadZipFile, ZipFile, ZipInfo

from bs4 import BeautifulSoup, ParserRejectedMarkup, Tag

from wuxia_core.corpus.encodings import Book, decode_block, other_format, read_blocks
from wuxia_core.errors import CorpusError

# Kinds of files, by suffix.
READ = frozenset({".txt", ".md", ".html", ".htm", ".xhtml", ".epub", ".docx", ".zip"})
PARTS = {".epub": "META-INF/container.xml", ".docx": "word/document.xml"}  # which each has
LARGEST = 256_000_000  # bytes of a member
MOST = 100  # times its own size that an archive may unpack to; text comes to about 3
DAMAGED = (BadZipFile, zlib.error, OSError, EOFError, RuntimeError, ValueError, LookupError,
           ParserRejectedMarkup)  # fmt: skip
NO_FILES = {
    "a pipe": Path.is_fifo, "a socket": Path.is_socket, "a device": Path.is_char_device,
    "a disk": Path.is_block_device, "a folder that cannot be read": Path.is_dir,
    "a link that leads nowhere": Path.is_symlink,
}  # fmt: skip
PACKED = "encrypted, or an archive in an archive; unpack it"
DAMAGE = "a damaged or incomplete archive, e-book or Word file ({}); get it anew"

# Pages.
ENCRYPTION = "META-INF/encryption.xml"
BLOCKS = r"article|blockquote|body|center|d[dt]|div|fig\w+|h[1-6r]|li|p|pre|t[dhr]"
MARKDOWN = re.compile(r"^#{1,6}[ \t]+|\*\*", re.MULTILINE)
HIDDEN = re.compile("nav|title|noscript|select|button|instrtext|deltext|fallback")
UNSEEN = re.compile(r"duokan-footnote|display\s*:\s*none|font-size\s*:\s*0+(?:px|pt|em)?\s*(?:;|$)")
NO_STORY = re.compile(r"\b(?:cover|toc|\w*notes?|landmarks|noteref|page-list|pagebreak)\b")
TABLES = "item[properties~=nav], item[media-type*=dtbncx]"
ENTRIES = r'nav[epub\:type="toc"] a[href], navmap content[src]'
WRAP = re.compile(r"(?<=[!-~])((?:\r[ \t]*)+)(?=[!-~])|\r[ \t]*")


def contents(path: Path) -> list[tuple[str, str, str]]:
    """List what is in a file: `(member, kind, what is wrong with it)`; "" is the file itself."""
    try:
        if not path.is_file():
            what = (word for word, is_one in NO_FILES.items() if is_one(path))
            return [("", "", next(what, "gone"))]
        with path.open("rb") as file:
            kind = _kind(path.name, file)
        if kind != ".zip":
            return [("", kind, "")]
        found = []
        for name, info in sorted(_open(path, path.stat().st_mtime).NameToInfo.items()):
            kind = PurePath(name).suffix.lower()
            found.append((name, kind, PACKED if info.flag_bits & 1 or kind == ".zip" else ""))
        return found or [("", "", "an empty archive")]
    except DAMAGED as error:
        return [("", "", DAMAGE.format(error))]


def _kind(name: str, file: IO[bytes]) -> str:
    """Tell what a file is: its suffix, unless it holds something else.

    `"书.txt"` that begins with `%PDF` is `".pdf"`, one that is an e-book `".epub"`.
    """
    suffix, head = PurePath(name).suffix.lower(), file.read(99)
    kind = (suffix in {*READ, "", ".jsonl"} and other_format(head)) or suffix
    if kind == ".zip":
        names, usual = ZipFile(file).namelist(), suffix if suffix in PARTS else kind
        kind = next((kind for kind, part in PARTS.items() if part in names), usual)
    return kind


@functools.lru_cache(maxsize=2)  # an archive, and an e-book in it, stay open while they are read
def _open(source: Path | BytesIO, _changed: float = 0) -> ZipFile:
    """Open an archive, its names decoded, unless it unpacks to far more than text does."""
    archive = ZipFile(source)
    sizes = [info.file_size for info in archive.infolist()]
    if max(sizes, default=0) > LARGEST or sum(sizes) > LARGEST + MOST * archive.start_dir:
        raise ValueError(f"it unpacks to {sum(sizes) / 1e6:,.0f} MB, more than books do")
    archive.NameToInfo = {_name(info): info for info in archive.infolist() if not info.is_dir()}
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


def read(path: Path, member: str, encoding: str | None, size: int) -> Iterator[Book]:
    """Read a file, or a member of an archive, as text: plain text in blocks of `size` bytes.

    Raises `CorpusError` where it is no text, damaged or encrypted.
    """
    place = Path(path, member)
    try:
        with _open(path, path.stat().st_mtime).open(member) if member else path.open("rb") as file:
            kind = _kind(place.name, file)
            if member or kind in READ - {".txt"}:
                file.seek(0)
                yield _convert(file.read(), kind, place, encoding)
                return
        yield from read_blocks(path, encoding, size)
    except DAMAGED as error:
        raise CorpusError(f"{place}: {DAMAGE.format(error)}", str(place)) from None


def _convert(data: bytes, kind: str, place: Path, encoding: str | None) -> Book:
    if kind in PARTS:
        archive = _open(BytesIO(data))
        data = archive.read(PARTS[kind])
    book = decode_block(data, place, encoding, 0)
    text = MARKDOWN.sub("", book.text) if kind == ".md" else book.text
    if kind == ".epub":
        text = _epub(archive, text, place)
    elif kind in READ - {".txt", ".md"}:
        text = _text(_page(text))
    return Book(book.title, text, place, book.encoding)


def _page(text: str) -> BeautifulSoup:
    r"""Parse a page in which \v is put between blocks, and \r for a newline of the source.

    What is put behind it is hidden, and ends what is open: the parser would look for its end again
    and again.
    """
    text = "\r".join(map(str.rstrip, text.splitlines()))
    text = re.sub(r"(</?)\w+:|<!\[(?!CDATA\[)[^<>\r]{0,99}>?", r"\1", text)  # <w:p>, <![if !x]>
    text = re.sub(r"(?i)(?=<br\b)", "\n", text)
    text = re.sub(rf"(?i)(?=</?(?:{BLOCKS})\b)", "\v", text)
    return BeautifulSoup(f"<html>{text}<nav>-->", "html.parser")


def _text(page: BeautifulSoup) -> str:
    """Put what a page shows in lines; a heading is one, and a newline between words a space."""
    for tag in page.find_all(_is_apart):
        tag.decompose()
    for tag in page.select("h1, h2, h3, pre"):
        old, new = ("\r", "\n") if tag.name == "pre" else ("\n", "　")
        tag.string = tag.get_text().replace(old, new)
    blocks = [block for block in page.get_text().split("\v") if block.strip()]
    return WRAP.sub(lambda match: " " if match[1] else "", "\n".join(blocks))


def _is_apart(tag: Tag) -> bool:
    """Whether a reader is not shown what is in a tag, or it is no story."""
    hidden = HIDDEN.fullmatch(tag.name) or UNSEEN.search(f"{tag.get('class')} {tag.get('style')}")
    return bool(hidden or NO_STORY.search(f"{tag.get('epub:type')} {tag.get('role')}"))


def _epub(archive: ZipFile, container: str, place: Path) -> str:
    """Read an e-book's pages in their order, without cover, contents and notes."""

    def page(name: str) -> BeautifulSoup:
        return _page(decode_block(archive.read(name), place / name, None, 0).text)

    root = str(_page(container).select("rootfile")[0]["full-path"])
    package = page(root)
    items = {item["id"]: _target(root, item) for item in package.select("item[href]")}
    refs = package.select("itemref:not([linear=no])")
    spine = [items[ref["idref"]] for ref in refs if ref["idref"] in items]
    drm = page(ENCRYPTION).select("cipherreference") if ENCRYPTION in archive.NameToInfo else []
    if any(unquote(str(data["uri"])) in spine for data in drm):
        raise CorpusError(f"{place}: encrypted (DRM); get a copy without", str(place))
    toc = sorted({_target(root, x) for x in package.select(TABLES)} & archive.NameToInfo.keys())
    titles = {name: title for file in toc for name, title in _entries(file, page(file))}
    skip = {*toc, *(_target(root, x) for x in package.find_all("reference", type=NO_STORY))}
    skip |= {name for name in spine if NO_STORY.fullmatch(PurePath(name).stem)}
    return "\n".join(_titled(page(x), titles.get(x, "")) for x in spine if x not in skip)


def _target(base: str, link: Tag) -> str:
    """Resolve a link: from `"OEBPS/a.opf"`, `"b%20c.html#d"` leads to `"OEBPS/b c.html#d"`."""
    return unquote(urljoin(base, str(link.get("href") or link["src"])))


def _entries(table: str, page: BeautifulSoup) -> Iterator[tuple[str, str]]:
    """List the pages in a table of contents, of either kind, and their titles; the first last."""
    for entry in reversed(page.select(ENTRIES)):
        title = entry if entry.name == "a" else entry.find_previous("text") or entry
        yield _target(table, entry).partition("#")[0], "".join(title.get_text().splitlines())


def _titled(page: BeautifulSoup, title: str) -> str:
    """Put a page's title above its text, unless it has one, or no text."""
    headed, text = page.select("h1, h2, h3"), _text(page)
    there = headed or "".join(title.split()) in "".join(text.split())
    return text if there or not text else f"{title.strip()}\n{text}"
