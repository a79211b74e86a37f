"""From the formats that books come in to text as a .txt has it: pages, e-books, Word, archives.

Nothing is unpacked to disk, and nothing that a file defines (entities, scripts, links) is followed.
Text is not cleaned here, and not cut into chapters.
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
READABLE = frozenset({".txt", ".md", ".html", ".htm", ".xhtml", ".epub", ".docx", ".zip"})
# The member that tells a kind of archive, and is read first in it.
MAIN_MEMBER = {".epub": "META-INF/container.xml", ".docx": "word/document.xml"}
LARGEST = 256_000_000  # bytes to which a member may unpack, and any archive
MOST_UNPACKED = 100  # times its own size that an archive may unpack to besides; text comes to 3
# What the libraries that unpack and parse raise on a damaged file.
DAMAGE_ERRORS = (BadZipFile, zlib.error, OSError, EOFError, RuntimeError, ValueError, LookupError,
           ParserRejectedMarkup)  # fmt: skip
# What a path that is no plain file may be, with the check for it; the first that holds is named.
NO_FILE_CHECKS = {
    "a pipe": Path.is_fifo, "a socket": Path.is_socket, "a device": Path.is_char_device,
    "a disk": Path.is_block_device, "a folder that cannot be read": Path.is_dir,
    "a link that leads nowhere": Path.is_symlink,
}  # fmt: skip
PACKED = "encrypted, or an archive in an archive; unpack it"
DAMAGE = "a damaged or incomplete archive, e-book or Word file ({}); get it anew"

# Pages.
ENCRYPTION = "META-INF/encryption.xml"  # of an e-book: it lists the members that are encrypted
BLOCKS = r"article|blockquote|body|center|d[dt]|div|fig\w+|h[1-6r]|li|p|pre|t[dhr]"  # names of tags
MARKDOWN = re.compile(r"^#{1,6}[ \t]+|\*\*", re.MULTILINE)
# A page does not show a tag whose name is HIDDEN, or whose class or style is UNSEEN.
HIDDEN = re.compile("nav|title|noscript|select|button|instrtext|deltext|fallback")
UNSEEN = re.compile(r"duokan-footnote|display\s*:\s*none|font-size\s*:\s*0+(?:px|pt|em)?\s*(?:;|$)")
# In the type or the role of a tag, the type of a reference, and names of pages without story.
NO_STORY = re.compile(r"\b(?:cover|toc|\w*notes?|landmarks|noteref|page-list|pagebreak)\b")
# Selectors: in an e-book's package its tables of contents (EPUB 3, EPUB 2); in one its entries.
TABLES = "item[properties~=nav], item[media-type*=dtbncx]"
ENTRIES = r'nav[epub\:type="toc"] a[href], navmap content[src]'
# A newline of the source, written \r: group 1 where it stands between words of Latin letters.
SOURCE_NEWLINE = re.compile(r"(?<=[!-~])((?:\r[ \t]*)+)(?=[!-~])|\r[ \t]*")


def contents(path: Path) -> list[tuple[str, str, str]]:
    """List what is in a file: `(member, kind, problem)` for each member of an archive.

    A file that is no archive is one entry whose member is `""`. A kind is a suffix such as
    `".txt"`; the problem is why the member cannot be read, `""` if its kind alone decides.
    """
    try:
        if not path.is_file():
            names = (name for name, holds in NO_FILE_CHECKS.items() if holds(path))
            return [("", "", next(names, "gone"))]
        with path.open("rb") as file:
            kind = _kind(path.name, file)
        if kind != ".zip":
            return [("", kind, "")]
        members = []
        for name, info in sorted(_open(path, modified=path.stat().st_mtime).NameToInfo.items()):
            kind = PurePath(name).suffix.lower()
            # The lowest bit is set for an encrypted member.
            members.append((name, kind, PACKED if info.flag_bits & 1 or kind == ".zip" else ""))
        return members or [("", "", "an empty archive")]
    except DAMAGE_ERRORS as error:
        return [("", "", DAMAGE.format(error))]


def _kind(name: str, file: IO[bytes]) -> str:
    """Tell the kind of a file: its suffix, unless its first bytes or members tell another kind.

    A `"书.txt"` that begins with `%PDF` is a `".pdf"`, one that is an e-book an `".epub"`.
    """
    suffix, head = PurePath(name).suffix.lower(), file.read(99)
    kind = (suffix in {*READABLE, "", ".jsonl"} and other_format(head)) or suffix
    if kind == ".zip":
        names, default = ZipFile(file).namelist(), suffix if suffix in MAIN_MEMBER else kind
        kind = next((kind for kind, member in MAIN_MEMBER.items() if member in names), default)
    return kind


@functools.lru_cache(maxsize=2)  # an archive, and an e-book in it, stay open while they are read
def _open(source: Path | BytesIO, modified: float = 0) -> ZipFile:
    """Open an archive, with its members' names decoded and its folders left out.

    `modified`, the file's time of change, only makes the cache open a changed file anew. Raises
    `ValueError` where the archive unpacks to far more than text does (a zip bomb).
    """
    archive = ZipFile(source)
    sizes = [info.file_size for info in archive.infolist()]
    # start_dir is where the packed data end.
    if max(sizes, default=0) > LARGEST or sum(sizes) > LARGEST + MOST_UNPACKED * archive.start_dir:
        raise ValueError(f"it unpacks to {sum(sizes) / 1e6:,.0f} MB, more than books do")
    archive.NameToInfo = {_member_name(x): x for x in archive.infolist() if not x.is_dir()}
    return archive


def _member_name(member: ZipInfo) -> str:
    """Decode a member's name, which is UTF-8, GBK or cp437, and keep it inside the archive.

    `ZipFile` reads as cp437 a name that is not marked as UTF-8 (bit 0x800). If a name so read has
    signs in it, not only letters, the archive's program wrote UTF-8 or GBK.
    """
    name = member.filename
    if not member.flag_bits & 0x800 and not all(c < "\x80" or "À" <= c <= "ɏ" for c in name):
        raw = name.encode("cp437", "replace")
        readings = (raw.decode(encoding, "replace") for encoding in ("utf-8", "gb18030"))
        name = next((reading for reading in readings if "\ufffd" not in reading), name)
    return "/".join(part for part in re.split(r"[/\\]", name) if part not in {"", ".", ".."})


def read(path: Path, member: str, encoding: str | None, size: int) -> Iterator[Book]:
    """Read a file, or the `member` of an archive (`""` for none), as text.

    A plain text file comes in blocks of `size` bytes and the rest of a line, all else as one block.
    `encoding` is detected where it is None. Raises `CorpusError` where the file or member is no
    text, damaged or encrypted.
    """
    place = Path(path, member)
    try:
        with (
            _open(path, modified=path.stat().st_mtime).open(member)
            if member
            else path.open("rb") as file
        ):
            kind = _kind(place.name, file)
            if member or kind in READABLE - {".txt"}:
                file.seek(0)
                yield _convert(file.read(), kind, place, encoding)
                return
        yield from read_blocks(path, encoding, size)
    except DAMAGE_ERRORS as error:
        raise CorpusError(f"{place}: {DAMAGE.format(error)}", str(place)) from None


def _convert(data: bytes, kind: str, place: Path, encoding: str | None) -> Book:
    """Decode the bytes of a file of some kind, and take the text out of its format."""
    if kind in MAIN_MEMBER:
        archive = _open(BytesIO(data))
        data = archive.read(MAIN_MEMBER[kind])
    book = decode_block(data, place, encoding, 0)
    text = MARKDOWN.sub("", book.text) if kind == ".md" else book.text
    if kind == ".epub":
        text = _epub_text(archive, text, place)
    elif kind in READABLE - {".txt", ".md"}:
        text = _page_text(_parse(text))
    return Book(book.title, text, place, book.encoding)


def _parse(text: str) -> BeautifulSoup:
    r"""Parse a page, with \v put before and behind each block, and \r for a newline of the source.

    The `<nav>-->` put behind the page ends a comment or a tag that the page leaves open: the parser
    would look for its end again and again. Where none is open it is a `nav`, which is not shown.
    """
    text = "\r".join(map(str.rstrip, text.splitlines()))
    text = re.sub(r"(</?)\w+:|<!\[(?!CDATA\[)[^<>\r]{0,99}>?", r"\1", text)  # <w:p>, <![if !x]>
    text = re.sub(r"(?i)(?=<br\b)", "\n", text)
    text = re.sub(rf"(?i)(?=</?(?:{BLOCKS})\b)", "\v", text)
    return BeautifulSoup(f"<html>{text}<nav>-->", "html.parser")


def _page_text(page: BeautifulSoup) -> str:
    r"""Give the text of a parsed page, a line for each block; the page's tags are changed by it.

    A heading is one line. A newline of the source is kept in a `pre`, is a space between words of
    Latin letters, and nothing elsewhere.
    """
    for tag in page.find_all(_is_left_out):
        tag.decompose()
    for tag in page.select("h1, h2, h3, pre"):
        old, new = ("\r", "\n") if tag.name == "pre" else ("\n", "　")
        tag.string = tag.get_text().replace(old, new)
    blocks = [block for block in page.get_text().split("\v") if block.strip()]
    return SOURCE_NEWLINE.sub(lambda match: " " if match[1] else "", "\n".join(blocks))


def _is_left_out(tag: Tag) -> bool:
    """Whether the content of a tag is hidden from the reader of the page, or is no story."""
    hidden = HIDDEN.fullmatch(tag.name) or UNSEEN.search(f"{tag.get('class')} {tag.get('style')}")
    return bool(hidden or NO_STORY.search(f"{tag.get('epub:type')} {tag.get('role')}"))


def _epub_text(archive: ZipFile, container: str, place: Path) -> str:
    """Give the text of an e-book's pages in their order, without cover, contents and notes.

    `container` is the text of META-INF/container.xml, which names the package: the file that lists
    all pages and their order (the spine). Raises `CorpusError` where a page is encrypted.
    """

    def parse(name: str) -> BeautifulSoup:
        return _parse(decode_block(archive.read(name), place / name, None, 0).text)

    root = str(_parse(container).select("rootfile")[0]["full-path"])
    package = parse(root)
    items = {item["id"]: _target(root, item) for item in package.select("item[href]")}
    refs = package.select("itemref:not([linear=no])")
    spine = [items[ref["idref"]] for ref in refs if ref["idref"] in items]
    encrypted = ENCRYPTION in archive.NameToInfo and parse(ENCRYPTION).select("cipherreference")
    if any(unquote(str(data["uri"])) in spine for data in encrypted or ()):
        raise CorpusError(f"{place}: encrypted (DRM); get a copy without", str(place))
    tables = sorted({_target(root, x) for x in package.select(TABLES)} & archive.NameToInfo.keys())
    titles = {page: title for table in tables for page, title in _entries(table, parse(table))}
    skip = {*tables, *(_target(root, x) for x in package.find_all("reference", type=NO_STORY))}
    skip |= {page for page in spine if NO_STORY.fullmatch(PurePath(page).stem)}
    return "\n".join(_titled_text(parse(x), titles.get(x, "")) for x in spine if x not in skip)


def _target(base: str, link: Tag) -> str:
    """Resolve a link: from `"OEBPS/a.opf"`, `"b%20c.html#d"` leads to `"OEBPS/b c.html#d"`."""
    return unquote(urljoin(base, str(link.get("href") or link["src"])))


def _entries(table: str, page: BeautifulSoup) -> Iterator[tuple[str, str]]:
    """Yield `(page, title)` for the entries of a table of contents (EPUB 2 or 3), from the last on.

    `table` is the name of the table's member, `page` its content. In a dictionary of the entries
    the first entry for a page then has the last word.
    """
    for entry in reversed(page.select(ENTRIES)):
        title = entry if entry.name == "a" else entry.find_previous("text") or entry
        yield _target(table, entry).partition("#")[0], "".join(title.get_text().splitlines())


def _titled_text(page: BeautifulSoup, title: str) -> str:
    """Give a page's text with the title above it, unless the page has a heading, or no text."""
    headings, text = page.select("h1, h2, h3"), _page_text(page)
    is_titled = headings or "".join(title.split()) in "".join(text.split())
    return text if is_titled or not text else f"{title.strip()}\n{text}"
