"""From the formats that books come in to text as a .txt has it: HTML, e-books, Word, archives.

No file is unpacked to disk, and nothing that a file defines (entities, scripts, links) is followed.
Text is neither cleaned nor cut into chapters here.
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
# For a kind of archive, the member that a plain .zip does not have; it is read first.
MAIN_MEMBER = {".epub": "META-INF/container.xml", ".docx": "word/document.xml"}
LARGEST = 256_000_000  # bytes, unpacked: an archive with a larger member is refused
# An archive whose members unpack to more than LARGEST + MOST_UNPACKED × its own size is refused,
# too. An archive of text unpacks to about 3 times its size.
MOST_UNPACKED = 100
# What the libraries that unpack and parse raise on a damaged file.
DAMAGE_ERRORS = (BadZipFile, zlib.error, OSError, EOFError, RuntimeError, ValueError, LookupError,
           ParserRejectedMarkup)  # fmt: skip
# What a path may be that is no plain file, with the check for it; the first that holds is reported.
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
# The signs that Markdown puts before a heading and around bold letters; they are taken out.
MARKDOWN = re.compile(r"^#{1,6}[ \t]+|\*\*", re.MULTILINE)
# A page does not show a tag if HIDDEN matches its name, or UNSEEN occurs in its class or style.
HIDDEN = re.compile("nav|title|noscript|select|button|instrtext|deltext|fallback")
UNSEEN = re.compile(r"duokan-footnote|display\s*:\s*none|font-size\s*:\s*0+(?:px|pt|em)?\s*(?:;|$)")
# Matches what has no story: the type or role of a tag; the name of a page; or the type of the
# reference to a page in an e-book's package.
NO_STORY = re.compile(r"\b(?:cover|toc|\w*notes?|landmarks|noteref|page-list|pagebreak)\b")
# CSS selectors for EPUB 3 and EPUB 2: TABLES finds the tables of contents in the package (the list
# of an e-book's members), ENTRIES the entries in a table of contents.
TABLES = "item[properties~=nav], item[media-type*=dtbncx]"
ENTRIES = r'nav[epub\:type="toc"] a[href], navmap content[src]'
# Newlines of the source, for which `_parse` puts \r; group 1 is set if they stand between words of
# Latin letters.
SOURCE_NEWLINE = re.compile(r"(?<=[!-~])((?:\r[ \t]*)+)(?=[!-~])|\r[ \t]*")


def contents(path: Path) -> list[tuple[str, str, str]]:
    """List what is in a file as entries `(member, kind, problem)`.

    A .zip has an entry for each member, sorted by name. Any other file has one entry, whose member
    is `""`, and so does an archive that is empty or damaged. The kind is a suffix such as `".txt"`,
    or `""`. The problem says why the entry cannot be read. `""` says that no problem was found: the
    caller decides by the kind whether to read the entry.
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
    """Return the kind of a file: the suffix of `name`, unless its bytes or members show another.

    A file `"书.txt"` that begins with `%PDF` has the kind `".pdf"`; an e-book has `".epub"`. If the
    suffix is of a format that is not read, it is the kind. Moves the position in `file`.
    Raises one of `DAMAGE_ERRORS`, such as `BadZipFile`, if the file is a damaged archive.
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
    """Open an archive; the names in its `NameToInfo` are decoded, and folders are left out of it.

    `modified`, the time of the file's last change, is only a key of the cache: a file that has
    changed is opened anew. Raises `ValueError` if the archive unpacks to far more than text does (a
    zip bomb), another of `DAMAGE_ERRORS`, such as `BadZipFile`, if it is damaged.
    """
    archive = ZipFile(source)
    sizes = [info.file_size for info in archive.infolist()]  # bytes, unpacked
    # start_dir is the place where the packed data end: about the archive's own size in bytes.
    if max(sizes, default=0) > LARGEST or sum(sizes) > LARGEST + MOST_UNPACKED * archive.start_dir:
        raise ValueError(f"it unpacks to {sum(sizes) / 1e6:,.0f} MB, more than books do")
    archive.NameToInfo = {_member_name(x): x for x in archive.infolist() if not x.is_dir()}
    return archive


def _member_name(member: ZipInfo) -> str:
    r"""Return a member's name, decoded, as a path that does not lead out of the archive.

    `ZipFile` reads a name as cp437 if it is not marked as UTF-8 (bit 0x800). If the result has
    characters other than ASCII and Latin letters, the name's bytes are read again: as UTF-8 or, if
    they are not valid UTF-8, as GBK. `"..\\武侠\\书.txt"` becomes `"武侠/书.txt"`.
    """
    name = member.filename
    is_latin = all(character.isascii() or "À" <= character <= "ɏ" for character in name)
    if not (member.flag_bits & 0x800 or is_latin):
        raw = name.encode("cp437", "replace")
        readings = (raw.decode(encoding, "replace") for encoding in ("utf-8", "gb18030"))
        name = next((reading for reading in readings if "\ufffd" not in reading), name)
    return "/".join(part for part in re.split(r"[/\\]", name) if part not in {"", ".", ".."})


def read(path: Path, member: str, encoding: str | None, size: int) -> Iterator[Book]:
    """Yield the text of the file `path` or, unless `member` is `""`, of that member of it.

    A file of plain text is yielded in blocks, see `read_blocks`; any other file, and a member, is
    one block. Without `encoding` the encoding is detected. Raises `CorpusError` if the file or
    member cannot be read, is no text, or is damaged or encrypted.
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
    """Decode `data`, the bytes of a file of the suffix `kind`, to a book without markup.

    `place`, the file's path, becomes that of the book. Raises `CorpusError` if the file is no text
    or is encrypted, one of `DAMAGE_ERRORS` if it is damaged.
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

    \v is put before each tag that opens or closes a block, \n before each `<br>`; \r replaces each
    newline of the source. Tags lose their namespace: `<w:p>` becomes `<p>`.

    `<nav>-->` is put behind the page. It ends a comment or a tag that the page leaves open: without
    it the parser would look for the end anew at each place. If nothing is open, it makes a `nav`,
    which `_page_text` leaves out.
    """
    text = "\r".join(map(str.rstrip, text.splitlines()))
    text = re.sub(r"(</?)\w+:", r"\1", text)
    # Word's <![if !x]> is deleted: the parser rejects a page that has an unknown one.
    text = re.sub(r"<!\[(?!CDATA\[)[^<>\r]{0,99}>?", "", text)
    text = re.sub(r"(?i)(?=<br\b)", "\n", text)
    text = re.sub(rf"(?i)(?=</?(?:{BLOCKS})\b)", "\v", text)
    return BeautifulSoup(f"<html>{text}<nav>-->", "html.parser")


def _page_text(page: BeautifulSoup) -> str:
    """Return the text of a page that `_parse` parsed, a line for each block that is not blank.

    A heading is one line, with a wide space for each `<br>`. A newline of the source is kept in a
    `pre`, becomes a space between words of Latin letters, and is deleted elsewhere. What
    `_is_left_out` names is left out. Changes `page`: do not use it afterwards.
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

    `container` is the text of META-INF/container.xml. It names the package: the member that lists
    all pages and their order (the spine). A page's title in the table of contents may be put above
    its text, see `_titled_text`. `place` is the e-book's path, for messages. Raises `CorpusError`
    if a page is encrypted or is no text, one of `DAMAGE_ERRORS` if a member or an attribute is
    missing.
    """

    def parse(name: str) -> BeautifulSoup:
        return _parse(decode_block(archive.read(name), place / name, None, 0).text)

    root = str(_parse(container).select("rootfile")[0]["full-path"])
    package = parse(root)
    pages = {item["id"]: _target(root, item) for item in package.select("item[href]")}
    refs = package.select("itemref:not([linear=no])")  # "no": beside the story
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
    """Return the name of the member to which the `href` or `src` of the tag `link` leads.

    `base` is the name of the member that has the tag. In `"OEBPS/a.opf"` a link to `"b%20c.html#d"`
    leads to `"OEBPS/b c.html#d"`.
    """
    return unquote(urljoin(base, str(link.get("href") or link["src"])))


def _entries(table: str, content: BeautifulSoup) -> Iterator[tuple[str, str]]:
    """Yield `(page, title)` for each entry of a table of contents (EPUB 2 or 3), the last first.

    The page is the name of a member. `table` is the name of the table's member, `content` what that
    member holds. As the last entry comes first, a dictionary made of the entries keeps for each
    page the entry that stands first in the table.
    """
    for entry in reversed(content.select(ENTRIES)):
        # In EPUB 2 the title stands in a tag `text` before the link.
        title = entry if entry.name == "a" else entry.find_previous("text") or entry
        text = "".join(title.get_text().splitlines())  # without the \v and \r of `_parse`
        yield _target(table, entry).partition("#")[0], text


def _titled_text(page: BeautifulSoup, title: str) -> str:
    """Return a page's text, with `title` as a line above it if the page needs a title.

    The page needs none if it has no text, has a heading (h1 to h3), or has the title in its text
    (white space is not compared). Changes `page`, see `_page_text`.
    """
    headings, text = page.select("h1, h2, h3"), _page_text(page)
    is_titled = headings or "".join(title.split()) in "".join(text.split())
    return text if is_titled or not text else f"{title.strip()}\n{text}"
