"""From bytes to text: find the encoding, decode, and mend what was decoded wrongly before."""

import functools
import logging
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, product
from pathlib import Path

import numpy as np
import numpy.typing as npt

from wuxia_core.errors import CorpusError
from wuxia_core.text import CJK_TEXT, Edit, lines_with

logger = logging.getLogger(__name__)

OTHER_FORMATS = (b"PK\x03\x04", b"%PDF", b"{\\rtf", b"\xd0\xcf\x11\xe0")

# Encodings.
BOMS = {b"\xef\xbb\xbf": "utf-8-sig", b"\xff\xfe": "utf-16", b"\xfe\xff": "utf-16"}
UTF_16 = ("utf-16-le", "utf-16-be")
ENCODINGS = ("utf-8", "gb18030", "cp950", *UTF_16)
LINE_ENCODINGS = ("utf-8", "gb18030", "cp950", "big5hkscs")
CLEAR, FAR_MORE = 0.8, 0.2  # plausibility of a line that is fine; a difference that decides
BROKEN = "\ufffd\ufffe\uffff"  # what decoding leaves of bytes that mean nothing
MOST_BROKEN = 0.001  # share of characters: more than that undecodable, and it is not this encoding
CONTROL = re.compile("[\x00-\x08\x0b\x0e-\x19\x1b-\x1f]")

# Text that was decoded wrongly once.
# ，。的你在是我同不了这 and an opening quotation mark as they look when UTF-8 is read as GBK
AS_GBK = "[锛銆鐨浣鍦鏄鎴鍚涓浜杩鈥]"
MISREAD = re.compile(rf"[\xc0-\xff][\x80-\xff\u0152-\u2122]|{AS_GBK}")
MISREADINGS = (("gb18030", "utf-8"), ("cp1252", "utf-8"), ("cp1252", "gb18030"),
               ("latin-1", "utf-8"), ("latin-1", "gb18030"))  # fmt: skip
OFTEN = AS_GBK.replace("浣", "")  # a name may have it three times
GARBLED = re.compile(rf"锟斤拷|烫{{6}}|屯{{6}}|{OFTEN}(?:[^\n]{{0,20}}{OFTEN}){{2}}")
LONG_LINE = 500  # characters
GARBLED_SENTENCE = re.compile(rf"[^。！？\n]{{0,200}}?(?:{GARBLED.pattern})[^。！？\n]{{0,200}}")


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
    path = Path(path)
    blocks = list(read_blocks(path, encoding, size=-1))
    return blocks[0] if blocks else _decode_block(b"", path, encoding, 0)


def read_blocks(path: Path, encoding: str | None, size: int) -> Iterator[Book]:
    """Decode a file in blocks of `size` bytes and what is left of the last line; -1 is one block.

    UTF-16, whose lines end otherwise, is read as a whole. Raises `CorpusError` as `read_book` does;
    the blocks before a bad one have been given then.
    """
    start = 0
    try:
        with path.open("rb") as file:
            while data := file.read(size):
                if len(data) == size:  # there may be more
                    by_line = not _detect(_sample(data)).startswith("utf-16")
                    data += file.readline() if by_line else file.read()
                yield _decode_block(data, path, encoding, start)
                start += len(data)
    except OSError as error:
        raise CorpusError(f"{path}: cannot be read ({error.strerror})", str(path)) from None


def _decode_block(data: bytes, path: Path, encoding: str | None, start: int) -> Book:
    """Decode bytes that stand at `start` in a file; refuse what is no text."""
    if data.startswith(OTHER_FORMATS):
        raise CorpusError(f"{path}: a Word, PDF or ZIP file; export it as text", str(path), 0)
    try:
        text, name = (data.decode(encoding, "replace"), encoding) if encoding else _decode(data)
    except (LookupError, UnicodeError):
        raise CorpusError(f"{path}: {encoding} is no encoding of text", str(path)) from None
    broken = _broken(text)
    if broken > MOST_BROKEN * len(text):
        before = re.split(f"[{BROKEN}]", text, maxsplit=1)[0]
        place = start + len(before.encode(name.split("+")[0], "replace"))
        message = (
            f"{path}: not text, or damaged: {broken:,} of {len(text):,} characters cannot be "
            f"decoded as {name} (the first at byte {place}); save it as UTF-8, or name its "
            "encoding in data.encoding"
        )
        raise CorpusError(message, str(path), place, ENCODINGS)
    if broken:
        logger.warning("%s: %d undecodable characters are shown as �", path, broken)
    head = text[:100_000]
    if (strange := len(CONTROL.findall(head))) > MOST_BROKEN * len(head):
        raise CorpusError(f"{path}: not text ({strange} control characters)", str(path), 0)
    return Book(path.stem, text, path, name)


def _detect(data: bytes) -> str:
    """Name the encoding: by byte-order mark, else by what makes most sense.

    What is valid UTF-8 is never GB18030 or Big5, but a few characters of UTF-16 can look like it.
    """
    for bom, name in BOMS.items():
        if data.startswith(bom):
            return name
    as_utf8 = data.decode("utf-8", errors="replace")
    valid = _broken(as_utf8) <= MOST_BROKEN * len(as_utf8)
    names, sample = ("utf-8", *UTF_16) if valid else ENCODINGS, _sample(data)
    return max(names, key=lambda name: _plausibility(sample, name))


def _broken(text: str) -> int:
    """Count undecodable characters, but not a last one that the file's end cuts through."""
    return sum(map(text.removesuffix("\ufffd").count, BROKEN))


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
    cells = range(0xA1, 0xFF)
    gb = bytes(chain(*product(range(0xB0, 0xD8), cells)))
    big5 = bytes(chain(*product(range(0xA4, 0xC7), [*range(0x40, 0x7F), *cells])))
    han = gb.decode("gb2312", "ignore") + big5.decode("big5", "ignore")
    weights = np.zeros(0x10000)  # by UTF-16 unit
    weights[0x20:0x7F] = 0.5
    weights[[ord(c) for c in han + "，。：；？！、“”‘’「」『』《》（）…—　\n\r\t "]] = 1.0
    return weights


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


def mojibake(text: str) -> Iterator[Edit]:
    """Lines that were decoded wrongly once and can be decoded back."""
    for start, end in lines_with(MISREAD, text):
        repaired = _repaired(text[start:end])
        if repaired is not None:
            yield start, end, repaired


def _repaired(line: str) -> str | None:
    """Undo a wrong decoding; None unless that gives nothing but ordinary text."""
    for wrong, right in MISREADINGS:
        try:
            repaired = line.encode(wrong).decode(right)
        except UnicodeError:
            continue
        if len(CJK_TEXT.findall(repaired)) > 0.8 * len(repaired.strip()):
            return repaired
    return None


def garbled(text: str) -> Iterator[Edit]:
    """Lines of 锟斤拷 and the like, which nothing can recover; of a long line a sentence."""
    for start, end in lines_with(GARBLED, text):
        if end - start <= LONG_LINE:
            yield start, min(end + 1, len(text)), ""
        else:
            for match in GARBLED_SENTENCE.finditer(text, start, end):
                yield *match.span(), ""
