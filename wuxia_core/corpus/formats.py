"""From the formats that books come in to text as a .txt has it: HTML, e-books, Word, archives.

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
# The member by which a kind of archive is told from a plain .zip, and which is read first in it.
MAIN_MEMBER = {".epub": "META-INF/container.xml", ".docx": "word/document.xml"}
LARGEST = 256_000_000  # bytes, unpacked: an archive with a larger member is refused
# So is one whose members have in all more than LARGEST plus so many times its own size; text has 3
# times its size.
MOST_UNPACKED = 100
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
DAMAGE = "a damaged or incomplete archive, e-book or Word file ({}); get it anew"  # {}: the error

# Pages.
ENCRYPTION = "META-INF/encryption.xml"  # of an e-book: it lists the members that are encrypted
# Names of the tags that begin a line of their own.
BLOCKS = r"article|blockquote|body|center|d[dt]|div|fig\w+|h[1-6r]|li|p|pre|t[dhr]"
# What Markdown puts before a heading, and around bold letters; it is taken out.
MARKDOWN = re.compile(r"^#{1,6}[ \t]+|\*\*", re.MULTILINE)
# A page does not show a tag if HIDDEN matches its name, or UNSEEN occurs in its class or style.
HIDDEN = re.compile("nav|title|noscript|select|button|instrtext|deltext|fallback")
UNSEEN = re.compile(r"duokan-footnote|display\s*:\s*none|font-size\s*:\s*0+(?:px|pt|em)?\s*(?:;|$)")
# What has no story is called like this: a tag by its type or role, a page by its name, or by the
# type of the reference that the package of an e-book has to it.
NO_STORY = re.compile(r"\b(?:cover|toc|\w*notes?|landmarks|noteref|page-list|pagebreak)\b")
# Selectors for EPUB 3 and EPUB 2: of the tables of contents in the package, which lists an e-book's
# members; of the entries in a table of contents.
TABLES = "item[properties~=nav], item[media-type*=dtbncx]"
ENTRIES = r'nav[epub\:type="toc"] a[href], navmap content[src]'
# A newline of the source, which is \r here; group 1 is set if it stands between words of Latin
# letters.
SOURCE_NEWLINE = re.compile(r"(?<=[!-~])((?:\r[ \t]*)+)(?=[!-~])|\r[ \t]*")


def contents(path: Path) -> list[tuple[str, str, str]]:
    """List what is in a file: `(member, kind, problem)`, for a .zip by the names of its members.

    A file that is no .zip is one entry, whose member is `""`; so is an archive that is empty or
    damaged. The kind is a suffix such as `".txt"`, or `""`. The problem is why the entry cannot be
    read; `""` means that its kind decides.
    """
    try:
        if not path.is_file():
            problems = (problem for problem, holds in NO_FILE_CHECKS.items() if holds(path))
            return [("", "", next(problems, "gone"))]
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
    """Return the kind of a file: the suffix of `name`, unless its bytes or members tell another.

    A `"书.txt"` that begins with `%PDF` is a `".pdf"`, one that is an e-book an `".epub"`. If the
    suffix is of a format that is not read, it alone decides. The place in `file` moves. Raises what
    `ZipFile` does on a damaged archive.
    """
    suffix, head = PurePath(name).suffix.lower(), file.read(99)
    found = other_format(head) if suffix in {*READABLE, "", ".jsonl"} else ""
    kind = found or suffix
    if kind == ".zip":
        members = ZipFile(file).namelist()
        default = suffix if suffix in MAIN_MEMBER else ".zip"
        kind = next((kind for kind, main in MAIN_MEMBER.items() if main in members), default)
    return kind


@functools.lru_cache(maxsize=2)  # an archive, and an e-book in it, stay open while they are read
def _open(source: Path | BytesIO, modified: float = 0) -> ZipFile:
    """Open an archive; in its `NameToInfo` names are decoded, and folders left out.

    `modified`, the file's time of change, only makes the cache open a changed file anew. Raises
    `ValueError` if the archive unpacks to far more than text does (a zip bomb), and what `ZipFile`
    does on a damaged one.
    """
    archive = ZipFile(source)
    sizes = [info.file_size for info in archive.infolist()]  # bytes, unpacked
    # start_dir is the place where the packed data end, so about the archive's own size.
    if max(sizes, default=0) > LARGEST or sum(sizes) > LARGEST + MOST_UNPACKED * archive.start_dir:
        raise ValueError(f"it unpacks to {sum(sizes) / 1e6:,.0f} MB, more than books do")
    archive.NameToInfo = {_member_name(x): x for x in archive.infolist() if not x.is_dir()}
    return archive


def _member_name(member: ZipInfo) -> str:
    r"""Return a member's name, decoded, as a path that does not lead out of the archive.

    `ZipFile` reads as cp437 a name that is not marked as UTF-8 (bit 0x800). If a name so read has
    other characters than ASCII and Latin letters, the archive's program wrote UTF-8 or, if it is
    not valid UTF-8, GBK. `"..\\武侠\\书.txt"` becomes `"武侠/书.txt"`.
    """
    name = member.filename
    is_latin = all(character.isascii() or "À" <= character <= "ɏ" for character in name)
    if not (member.flag_bits & 0x800 or is_latin):
        raw = name.encode("cp437", "replace")
        readings = (raw.decode(encoding, "replace") for encoding in ("utf-8", "gb18030"))
        name = next((reading for reading in readings if "\ufffd" not in reading), name)
    return "/".join(part for part in re.split(r"[/\\]", name) if part not in {"", ".", ".."})


def read(path: Path, member: str, encoding: str | None, size: int) -> Iterator[Book]:
    """Yield the text of a file or, unless `member` is `""`, of that member of the archive `path`.

    A file of plain text comes in blocks, see `read_blocks`; all else is one block. Without
    `encoding` the encoding is detected. Raises `CorpusError` if the file or member cannot be read,
    is no text, damaged or encrypted.
    """
    place = Path(path, member)
    try:
        archive = _open(path, modified=path.stat().st_mtime) if member else None
        with archive.open(member) if archive else path.open("rb") as file:
            kind = _kind(place.name, file)
            if member or kind in READABLE - {".txt"}:
                file.seek(0)
                yield _convert(file.read(), kind, place, encoding)
                return
        yield from read_blocks(path, encoding, size)
    except DAMAGE_ERRORS as error:
        raise CorpusError(f"{place}: {DAMAGE.format(error)}", str(place)) from None


def _convert(data: bytes, kind: str, place: Path, encoding: str | None) -> Book:
    """Decode `data`, a file of the suffix `kind`, and take the text out of that format.

    Raises `CorpusError` if it is no text or encrypted, one of `DAMAGE_ERRORS` if it is damaged.
    """
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
    r"""Parse a page of HTML or XML, with signs put into its text for `_page_text`.

    \v stands before the tags that open and close a block, \n before a `<br>`, and \r for a newline
    of the source. Tags lose their namespace: `<w:p>` becomes `<p>`.

    The `<nav>-->` put behind the page ends a comment or a tag that the page leaves open: the parser
    would look for its end again and again. If none is open, it is a `nav`, which is not shown.
    """
    text = "\r".join(map(str.rstrip, text.splitlines()))
    # Word's <![if !x]> goes, too: the parser rejects a page with one that it does not know.
    text = re.sub(r"(</?)\w+:|<!\[(?!CDATA\[)[^<>\r]{0,99}>?", r"\1", text)
    text = re.sub(r"(?i)(?=<br\b)", "\n", text)
    text = re.sub(rf"(?i)(?=</?(?:{BLOCKS})\b)", "\v", text)
    return BeautifulSoup(f"<html>{text}<nav>-->", "html.parser")


def _page_text(page: BeautifulSoup) -> str:
    """Return the text of a page that `_parse` parsed, a line for each block that is not blank.

    A heading is one line, with a wide space for each `<br>`. A newline of the source is kept in a
    `pre`, is a space between words of Latin letters, and nothing elsewhere. `page` itself is
    changed on the way.
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
    """Return the text of an e-book's pages in their order, without cover, contents and notes.

    `container` is the text of META-INF/container.xml, which names the package: the member that
    lists all pages and their order (the spine). A page has the title that the table of contents
    gives it, see `_titled_text`. Raises `CorpusError` if a page is encrypted or is no text, one of
    `DAMAGE_ERRORS` if a member or an attribute is missing.
    """

    def parse(name: str) -> BeautifulSoup:
        return _parse(decode_block(archive.read(name), place / name, None, 0).text)

    root = str(_parse(container).select("rootfile")[0]["full-path"])
    package = parse(root)
    pages = {item["id"]: _target(root, item) for item in package.select("item[href]")}
    refs = package.select("itemref:not([linear=no])")  # "no" is for what is read by the way
    spine = [pages[ref["idref"]] for ref in refs if ref["idref"] in pages]
    # References to the members that are encrypted.
    locked = parse(ENCRYPTION).select("cipherreference") if ENCRYPTION in archive.NameToInfo else []
    if any(unquote(str(reference["uri"])) in spine for reference in locked):
        raise CorpusError(f"{place}: encrypted (DRM); get a copy without", str(place))
    tables = sorted({_target(root, x) for x in package.select(TABLES)} & archive.NameToInfo.keys())
    titles = {page: title for table in tables for page, title in _entries(table, parse(table))}
    skip = {*tables, *(_target(root, x) for x in package.find_all("reference", type=NO_STORY))}
    skip |= {page for page in spine if NO_STORY.fullmatch(PurePath(page).stem)}
    return "\n".join(_titled_text(parse(x), titles.get(x, "")) for x in spine if x not in skip)


def _target(base: str, link: Tag) -> str:
    """Return the name of the member to which the `href` or `src` of a tag in `base` leads.

    From `"OEBPS/a.opf"`, `"b%20c.html#d"` leads to `"OEBPS/b c.html#d"`.
    """
    return unquote(urljoin(base, str(link.get("href") or link["src"])))


def _entries(table: str, content: BeautifulSoup) -> Iterator[tuple[str, str]]:
    """Yield `(page, title)` for each entry of a table of contents (EPUB 2 or 3), from the last on.

    A page is given by its member's name. `table` is that of the table, `content` what it holds. The
    order lets a dictionary
    of the entries keep the first one for each page.
    """
    for entry in reversed(content.select(ENTRIES)):
        # In EPUB 2 the title stands in a tag `text` before the link.
        title = entry if entry.name == "a" else entry.find_previous("text") or entry
        text = "".join(title.get_text().splitlines())  # without the \v and \r of `_parse`
        yield _target(table, entry).partition("#")[0], text


def _titled_text(page: BeautifulSoup, title: str) -> str:
    """Return a page's text, with `title` as a line above it unless it needs none.

    It needs none if it has no text, has a heading (h1 to h3), or has the title in its text, white
    space aside.
    """
    headings, text = page.select("h1, h2, h3"), _page_text(page)
    is_titled = headings or "".join(title.split()) in "".join(text.split())
    return text if is_titled or not text else f"{title.strip()}\n{text}"
