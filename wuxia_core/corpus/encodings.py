"""Decode a text file by what its bytes say, never by the first encoding that does not fail."""

import functools
import logging
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from wuxia_core.errors import CorpusError

log = logging.getLogger(__name__)

CHINESE, UTF_16 = ("gb18030", "cp950"), ("utf-16-le", "utf-16-be")
LINE_ENCODINGS = ("utf-8", "gb18030", "cp950", "big5hkscs")
CLEAR, FAR_MORE = 0.8, 0.2  # plausibility of a line that is fine; a difference that decides
BOMS = {b"\xef\xbb\xbf": "utf-8-sig", b"\xff\xfe": "utf-16", b"\xfe\xff": "utf-16"}
OTHER_FORMATS = (b"PK\x03\x04", b"%PDF", b"{\\rtf", b"\xd0\xcf\x11\xe0")
BLOCK = 32_000_000  # bytes
BROKEN = "\ufffd\ufffe\uffff"  # what decoding leaves of bytes that mean nothing
CONTROL = re.compile("[\x00-\x08\x0b\x0e-\x19\x1b-\x1f]")
PLACES_NAMED = 5
MOST_BROKEN = 0.001  # share of characters: more than that undecodable, and it is not this encoding


@dataclass(frozen=True)
class Book:
    """A file, decoded and not yet cleaned."""

    title: str
    text: str
    path: Path
    encoding: str


def read_book(path: str | Path, encoding: str | None = None) -> Book:
    """Decode a text file.

    Parameters
    ----------
    path : str or Path
        The file; its stem is the title.
    encoding : str, optional
        Python's name of the encoding; by default it is detected, for each line where lines differ.

    Raises
    ------
    CorpusError
        With `path`, `offset` (byte) and `tried`, where the file cannot be read, is not text, or
        more than 0.1 % of its characters cannot be decoded.
    """
    blocks = list(_read(Path(path), size=-1))
    return _book(blocks[0] if blocks else b"", Path(path), encoding)


def read_blocks(path: Path, encoding: str | None = None) -> Iterator[Book]:
    """Decode a file in blocks of 32 MB or more that end with a line; small files are one block.

    Raises `CorpusError` as `read_book` does; the blocks before a bad one have been given then.
    """
    start = 0
    for data in _read(path, BLOCK):
        yield _book(data, path, encoding, start)
        start += len(data)


def _read(path: Path, size: int) -> Iterator[bytes]:
    """Read bytes in blocks that end with a line; UTF-16, whose lines end otherwise, as a whole."""
    try:
        with path.open("rb") as file:
            while data := file.read(size):
                if len(data) == size:  # there may be more
                    by_line = not _detect(_sample(data)).startswith("utf-16")
                    data += file.readline() if by_line else file.read()
                yield data
    except OSError as error:
        raise CorpusError(f"{path}: cannot be read ({error.strerror})", str(path)) from None


def _book(data: bytes, path: Path, encoding: str | None, start: int = 0) -> Book:
    """Decode bytes that stand at `start` in a file."""
    if data.startswith(OTHER_FORMATS):
        raise CorpusError(f"{path}: a Word, PDF or ZIP file; export it as text", str(path), 0)
    try:
        text, name = (data.decode(encoding, "replace"), encoding) if encoding else _decode(data)
    except (LookupError, UnicodeError):
        raise CorpusError(f"{path}: {encoding} is no encoding of text", str(path)) from None
    book = Book(path.stem, text, path, name)
    _refuse_what_is_no_text(book, data, start, "as was asked" if encoding else "which fitted best")
    return book


def _detect(data: bytes) -> str:
    """Name the encoding: by byte-order mark, else by what makes most sense.

    What is valid UTF-8 is never GB18030 or Big5, but a few characters of UTF-16 can look like it.
    """
    for bom, name in BOMS.items():
        if data.startswith(bom):
            return name
    as_utf8 = data.decode("utf-8", errors="replace")
    valid = _broken(as_utf8) <= MOST_BROKEN * len(as_utf8)
    names = ("utf-8", *UTF_16) if valid else ("utf-8", *CHINESE, *UTF_16)
    sample = _sample(data)
    return max(names, key=lambda name: _plausibility(sample, name))


def _broken(text: str) -> int:
    """Count undecodable characters, but not a last one that the file's end cuts through."""
    text = text.removesuffix("\ufffd")
    return sum(map(text.count, BROKEN))


def _sample(data: bytes) -> bytes:
    """Head, middle and tail, cut at multiples of four bytes so that UTF-16 stays in step."""
    part = 16384
    if len(data) <= 3 * part:
        return data
    middle, tail = len(data) // 8 * 4, (len(data) - part) // 4 * 4
    return data[:part] + data[middle : middle + part] + data[tail:]


def _plausibility(sample: bytes, encoding: str) -> float:
    """Share of everyday characters, less five times the share of undecodable ones."""
    text = sample.decode(encoding, errors="replace").removesuffix("\ufffd")
    units = np.frombuffer(text.encode("utf-16-le"), np.uint16)
    return float(_everyday()[units].sum() - 5 * _broken(text)) / max(1, len(text))


@functools.cache
def _everyday() -> npt.NDArray[np.float64]:
    """Weigh the level-1 characters of GB2312 and Big5 and Chinese punctuation 1, ASCII a half."""
    gb = bytes(b for row in range(0xB0, 0xD8) for cell in range(0xA1, 0xFF) for b in (row, cell))
    big5 = bytes(b for row in range(0xA4, 0xC7) for cell in _big5_cells() for b in (row, cell))
    han = gb.decode("gb2312", errors="replace") + big5.decode("big5", errors="replace")
    weights = np.zeros(0x10000)  # by UTF-16 unit
    weights[0x20:0x7F] = 0.5
    weights[[ord(c) for c in han + "，。：；？！、“”‘’「」『』《》（）…—　\n\r\t "]] = 1.0
    weights[[ord(c) for c in BROKEN]] = 0.0
    return weights


def _big5_cells() -> list[int]:
    return [*range(0x40, 0x7F), *range(0xA1, 0xFF)]


def _decode(data: bytes) -> tuple[str, str]:
    """Decode, line by line unless all is UTF-8 or UTF-16, and name the encodings that were used."""
    chosen = _detect(data)
    as_a_whole = data.decode(chosen, errors="replace")
    if chosen not in LINE_ENCODINGS or (chosen == "utf-8" and not _broken(as_a_whole)):
        return as_a_whole, chosen
    lines = data.split(b"\n")
    names = [_line_encoding(line, chosen) for line in lines]
    text = "\n".join(x.decode(n, errors="replace") for x, n in zip(lines, names, strict=True))
    return text, "+".join(dict.fromkeys([chosen, *names]))


def _line_encoding(line: bytes, chosen: str) -> str:
    """Choose another encoding than the file's where it makes far more sense of a line."""
    if line.isascii() or (score := _plausibility(line, chosen)) >= CLEAR:
        return chosen
    best = max(LINE_ENCODINGS, key=lambda name: _plausibility(line, name))
    return best if _plausibility(line, best) > score + FAR_MORE else chosen


def _refuse_what_is_no_text(book: Book, data: bytes, start: int, why: str) -> None:
    """Refuse a book that was decoded from bytes at `start`, in an encoding chosen for a reason."""
    text, path = book.text, book.path
    broken = _broken(text)
    if broken > MOST_BROKEN * len(text):
        places = _broken_places(data, book.encoding.split("+")[0], start)
        where = f" (bytes {', '.join(map(str, places))} …)" if places else ""
        raise CorpusError(
            f"{path}: not text, or damaged: {broken:,} of {len(text):,} characters cannot be "
            f"decoded{where}; read as {book.encoding}, {why}: save it as UTF-8, or name it in "
            "data.encoding",
            str(path), next(iter(places), None), ("utf-8", *CHINESE, *UTF_16),
        )  # fmt: skip
    if broken:
        log.warning("%s: %d undecodable characters are shown as \ufffd", path, broken)
    head = text[:100_000]
    strange = len(CONTROL.findall(head))
    if strange > MOST_BROKEN * len(head):
        raise CorpusError(f"{path}: not text ({strange} control characters)", str(path), 0)


def _broken_places(data: bytes, encoding: str, start: int) -> list[int]:
    """Find the first bytes that mean nothing in an encoding, five at most."""
    places: list[int] = []
    done = 0
    while len(places) < PLACES_NAMED:
        try:
            data[done:].decode(encoding)
            break
        except UnicodeDecodeError as error:
            places.append(start + done + error.start)
            done += error.end
    return places
