"""From bytes to text: find the encoding, decode, and mend what was decoded wrongly before.

What is right is told from what is wrong by one measure, the sense of a text: its characters that
are common in any Chinese prose, less those that are rare.
"""

import codecs
import functools
import logging
import re
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from wuxia_core.errors import CorpusError
from wuxia_core.text import CJK_TEXT, Edit, codes

logger = logging.getLogger(__name__)

DATA = tomllib.loads(Path(__file__).with_suffix(".toml").read_text("utf-8"))
MAGIC: dict[bytes, str] = {mark.encode("latin-1"): kind for mark, kind in DATA["magic"].items()}
COMMON = "".join(DATA["common"])
WIDEST: dict[str, str] = {x: widest for widest, names in DATA["widest"].items() for x in names}
SIGNS = str.maketrans(*DATA["big5hkscs_signs"])
STANDARD = str.maketrans(*DATA["gb18030_2022"])

# Sense.
# Controls, ㄅㄆㄇ, Han, private use: rare unless they are everyday.
RARE = ((0, 9), (14, 32), (0x3100, 0x3130), (0x3400, 0xA000), (0xE000, 0xFB00), (0x20000, 0x32000))
BROKEN = -5  # of a character that cannot be decoded

# Encodings.
LINE_ENCODINGS = ("utf-8", "gb18030", "cp950")
ENCODINGS = (*LINE_ENCODINGS, "utf-16-le", "utf-16-be")
SAMPLE = 49_152  # bytes at the beginning that tell; lines in another encoding are found later
MOST_BROKEN = 0.001  # share of characters: more than that undecodable, and it is not this encoding
ANY_BROKEN = 0.1  # share: with more it is another encoding, and no byte is worth a thought
GAIN = 5  # of sense, from which what was read is taken to be in another encoding

# Text that was decoded wrongly once.
CP1252 = {c: n for n in range(0x80, 0xA0) for c in map(ord, bytes([n]).decode("cp1252", "ignore"))}
SPECIAL = "".join(map(chr, CP1252))
LATIN = re.compile(rf"[\x80-\x9f\xa1-\xff][ -\xff{SPECIAL}]*[\x80-\xff{SPECIAL}][@-~]?")
MOSTLY = 0.8  # of the bytes that are not ASCII
CLAUSE_ENDS = "，。：；？！…”」』\n"
LOST = "锟斤拷"  # two � in UTF-8, read as GBK
MANY = 10  # kinds of rare characters more than common ones


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
        A name of the encoding, see `codec`; by default it is detected, for each line where lines
        differ.

    Raises
    ------
    CorpusError
        With `path`, `offset` (byte) and `tried` (nearest first), where the file cannot be read, is
        not text, or more than 0.1 % of its characters cannot be decoded.
    """
    path = Path(path)
    empty = Book(path.stem, "", path, encoding or "utf-8")
    return next(read_blocks(path, encoding, size=-1), empty)


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
                    data += file.readline() if _ranked(data)[0] in LINE_ENCODINGS else file.read()
                yield decode_block(data, path, encoding, start)
                start += len(data)
    except OSError as error:
        raise CorpusError(f"{path}: cannot be read ({error.strerror})", str(path)) from None


def decode_block(data: bytes, path: Path, encoding: str | None, start: int) -> Book:
    """Decode bytes that stand at `start` in a file; raises `CorpusError` where they are no text."""
    if kind := other_format(data):
        raise CorpusError(f"{path}: Word, PDF … ({kind}); export it as text", str(path), 0)
    try:
        text, name = (_read(data, encoding), encoding) if encoding else _decode(data)
    except (LookupError, UnicodeError):
        raise CorpusError(f"{path}: {encoding} is no encoding of text", str(path)) from None
    broken = _broken(text)
    if broken > MOST_BROKEN * len(text):
        before = re.split("[\ufffd\0]", text, maxsplit=1)[0]
        place = start + len(before.encode(codec(name.split("+")[0]), "replace"))
        tried = _ranked(data)
        message = (
            f"{path}: not text, or damaged: {broken:,} of {len(text):,} characters cannot be "
            f"decoded as {name} (the first at byte {place}); {tried[0]} and {tried[1]} come nearest"
            f"; save it as UTF-8, or name its encoding (data.encoding: {{{path.name}: {tried[1]}}})"
        )
        raise CorpusError(message, str(path), place, tried)
    if broken:
        logger.warning("%s: %d undecodable characters are shown as �", path, broken)
    return Book(path.stem, text, path, name)


def other_format(head: bytes) -> str:
    """Tell the kind of a file that is no text: `".pdf"` of `b"%PDF-1.7"`; `""` where unknown."""
    for mark, kind in MAGIC.items():
        if head.startswith(mark) or head.startswith(mark, 60):
            return kind
    return ""


def codec(name: str) -> str:
    """Name Python's codec for what the web means by a name: `"gb2312"` is `"gb18030"`.

    Raises `LookupError` where no encoding is called that.
    """
    known = WIDEST.get(name.lower()) or codecs.lookup(name).name
    return WIDEST.get(known, known)


def _ranked(data: bytes) -> tuple[str, ...]:
    """Rank the encodings, the likeliest first: by byte-order mark, else by what makes most sense.

    What is valid UTF-8 is nothing else, and UTF-16, in which all bytes mean something, must make
    sense.
    """
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return ("utf-16", *ENCODINGS)
    sample = data[:SAMPLE]
    readings = {name: sample.decode(codec(name), "replace") for name in ENCODINGS}
    sense = {name: _sense(text) for name, text in readings.items()}
    if _broken(readings["utf-8"]) <= MOST_BROKEN * len(readings["utf-8"]):
        sense["utf-8"] = len(sample)
    likely = [name for name in ENCODINGS if name in LINE_ENCODINGS or sense[name] >= 0]
    return tuple(sorted(likely, key=sense.__getitem__, reverse=True))


def _broken(text: str) -> int:
    """Count undecodable characters and zeros; not a last one that the file's end cuts through."""
    return sum(map(text.removesuffix("\ufffd").count, "\ufffd\0"))


def _sense(text: str) -> int:
    """Count the common characters, less the rare ones and five times the undecodable ones."""
    return int(_weights()[codes(text)].sum(dtype=np.int64))


@functools.cache
def _weights() -> npt.NDArray[np.int8]:
    """Weigh characters: common 1, rare -1, undecodable -5; of GB2312 and Big5 level 1 is 0."""
    weights = np.zeros(0x110000, np.int8)
    for first, end in RARE:
        weights[first:end] = -1
    for code in range(0x4E00, 0xA000):
        gb, big5 = (chr(code).encode(name, "ignore") for name in ("gb2312", "big5"))
        weights[code] = 0 if b"\xb0" <= gb < b"\xd8" or b"\xa4" <= big5 < b"\xc7" else -1
    weights[codes(COMMON)] = 1
    weights[codes("\ufffd" + LOST[0])] = BROKEN  # a clause with either makes no sense
    return weights


def _read(data: bytes, name: str) -> str:
    """Decode; what no encoding of the family has becomes �, and what follows is not shifted."""
    python = codec(name)
    text = data.decode(python, "replace")
    if python in WIDEST.values() and 0 < text.count("\ufffd") < ANY_BROKEN * len(text):
        text = data.decode(python, "nearest")
    return text.translate(SIGNS) if python == "big5hkscs" else text


def _nearest(error: UnicodeError) -> tuple[str, int]:
    """Read an undecodable pair as Windows does, else as �, and go on where more sense follows."""
    assert isinstance(error, UnicodeDecodeError)
    data, at, name = error.object, error.start, error.encoding
    pair = data[at : at + 2]
    if name == "big5hkscs" and (read := pair.decode("cp950", "ignore")) > "\x7f":
        return read, at + 2
    ends = (at + 2, at + 1) if pair[1:] >= b"@" else (at + 1,)  # a line's end is never in a pair
    return "\ufffd", max(ends, key=lambda end: _sense(data[end : end + 16].decode(name, "ignore")))


codecs.register_error("nearest", _nearest)


def _decode(data: bytes) -> tuple[str, str]:
    """Decode, line by line unless all is UTF-8 or UTF-16, and name the encodings that were used."""
    if data.isascii() and b"~{" in data and not _broken(text := data.decode("hz", "replace")):
        return text, "hz"  # of mail in the nineties: ~{4:O~~} is 春晓
    name = _ranked(data)[0]
    data = data.removeprefix(codecs.BOM_UTF8)
    text = _read(data, name)
    if name not in LINE_ENCODINGS or (name == "utf-8" and not _broken(text)):
        return text, name
    lines, raw, used = text.split("\n"), data.split(b"\n"), [name]
    for number in np.flatnonzero(_parts(text, "\n")[1] < 0):
        lines[number], other = _reread(raw[number], lines[number], name)
        used.append(other)
    return "\n".join(lines), "+".join(dict.fromkeys(used))


def _parts(text: str, marks: str) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Cut a text behind each of `marks`: where its N parts begin and the last ends, their sense."""
    characters = codes(text + "\n")
    weights, ends = _weights()[characters], np.flatnonzero(np.isin(characters, codes(marks)))
    weights[ends] = 0
    starts = np.append(0, ends + 1)
    return starts, np.add.reduceat(weights, starts[:-1], dtype=np.int64)


def _reread(line: bytes, text: str, name: str) -> tuple[str, str]:
    """Read a line in an encoding that makes far more sense of it than `name`, which gave it."""
    readings = {name: _read(line, name) for name in LINE_ENCODINGS}
    best = max(readings, key=lambda name: _sense(readings[name]))
    reading, sense = readings[best], _sense(readings[best])
    valid = best == "utf-8" and CJK_TEXT.search(reading)  # that is hardly so by chance
    far_more = sense - _sense(text) >= GAIN and (sense > 0 or _broken(text))
    return (reading, best) if valid or far_more else (text, name)


def mojibake(text: str) -> Iterator[Edit]:
    """Passages that were decoded as Latin-1 or Windows-1252, and can be decoded back."""
    for match in LATIN.finditer(text):
        data = match.group().translate(CP1252).encode("latin-1")
        best = max((data.decode(name, "ignore") for name in ("gb18030", "big5hkscs")), key=_sense)
        certain = _sense(best) + len(set(CJK_TEXT.findall(best))) >= GAIN
        if repaired := _if_utf8(data) or (best if certain else ""):
            yield *match.span(), repaired


def _if_utf8(data: bytes) -> str:
    """Decode what is mostly UTF-8 and Chinese; `""` for what is not."""
    text = data.decode("utf-8", "ignore")
    not_ascii = sum(byte >= 0x80 for byte in data)
    return text if 3 * len(CJK_TEXT.findall(text)) > MOSTLY * not_ascii else ""


def garbled(text: str) -> Iterator[Edit]:
    """Clauses of rare characters without sense: UTF-8 read as GBK, others are beyond repair."""
    starts, sense = _parts(text, CLAUSE_ENDS)
    edges = np.flatnonzero(np.diff(sense < 0, prepend=False, append=False))
    for start, end in starts[edges].reshape(-1, 2).tolist():
        damaged = text[start:end]
        data = damaged.replace("\ufffd", "").encode("gb18030", "ignore")
        shifted = data[1:].decode("gb18030", "ignore")  # as if a byte had been lost
        repaired = _if_utf8(data)
        if repaired or LOST in damaged or _sense(shifted) >= GAIN or _is_hopeless(damaged):
            cut_line = text[start - 1 : start] not in {"", "\n"} and damaged.endswith("\n")
            yield start, start + len(damaged), repaired or "\n" * cut_line


def _is_hopeless(text: str) -> bool:
    """Whether the rare characters are of too many kinds for a list of fish, of jewels, of horses.

    What has one radical stands together in Unicode, so kinds are told by the code without 7 bits.
    """
    characters = codes(text)
    sense = _weights()[characters]
    kinds = len(np.unique(characters[sense < 0] >> 7)) + text.count("\ufffd")
    return kinds - int(np.count_nonzero(sense > 0)) >= MANY
