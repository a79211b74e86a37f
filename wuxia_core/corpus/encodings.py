"""From bytes to text: find the encoding, decode, and mend what was decoded wrongly before.

A right reading is told from a wrong one by one measure, the text's score: the number of its
characters that are common in any Chinese prose, less the number of those that are rare.
"""

import codecs
import functools
import logging
import re
import tomllib
from collections.abc import Iterator
from contextlib import suppress
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
# From a name to the widest encoding of its family: "gb2312" to "gb18030".
WIDEST: dict[str, str] = {x: widest for widest, names in DATA["widest"].items() for x in names}
BIG5_SIGNS = str.maketrans(*DATA["big5hkscs_signs"])
GB18030_2022 = str.maketrans(*DATA["gb18030_2022"])

# Scores.
# Ranges of code points: controls, ㄅㄆㄇ, Han, private use. In them a character is rare, and weighs
# -1, unless `_weights` finds it to be an everyday one.
RARE = ((0, 9), (14, 32), (0x3100, 0x3130), (0x3400, 0xA000), (0xE000, 0xFB00), (0x20000, 0x32000))
UNDECODABLE_WEIGHT = -5

# Encodings.
LINE_ENCODINGS = ("utf-8", "gb18030", "cp950")  # in them a newline is the byte 10, and only that
ENCODINGS = (*LINE_ENCODINGS, "utf-16-le", "utf-16-be")
SAMPLE = 49_152  # bytes at the beginning that tell; lines in another encoding are found later
MOST_BROKEN = 0.001  # share of characters: with more undecodable ones it is not this encoding
MOST_MENDED = 0.1  # share of characters: with more it is not this encoding, so none is mended
LEAST_GAIN = 5  # in score, from which on a text is taken to be in another encoding

# Text that was decoded wrongly once.
# From code points to the bytes 0x80 to 0x9F that Windows-1252 reads as them: from € to 0x80.
CP1252 = {c: n for n in range(0x80, 0xA0) for c in map(ord, bytes([n]).decode("cp1252", "ignore"))}
CP1252_SIGNS = "".join(map(chr, CP1252))
# Bytes read as Latin-1 or Windows-1252; a last ASCII character may be the second byte of a pair.
LATIN = re.compile(rf"[\x80-\x9f\xa1-\xff][ -\xff{CP1252_SIGNS}]*[\x80-\xff{CP1252_SIGNS}][@-~]?")
LEAST_CHINESE = 0.8  # share of the bytes that are not ASCII
CLAUSE_ENDS = "，。：；？！…”」』\n"
LOST = "锟斤拷"  # two � in UTF-8, read as GBK
HOPELESS = 10  # kinds of rare characters more than common characters


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
        A name of the encoding, see `codec`; by default the encoding is detected, for each line
        where lines differ.

    Raises
    ------
    CorpusError
        The file cannot be read, is not text, or more than 0.1 % of its characters cannot be
        decoded, or `encoding` is none of text. The error has `path`, `offset` (of the first bad
        byte) and `tried` (the encodings, the likeliest first).
    """
    path = Path(path)
    # A file without bytes has no block.
    return next(read_blocks(path, encoding, -1), Book(path.stem, "", path, encoding or "utf-8"))


def read_blocks(path: Path, encoding: str | None, size: int) -> Iterator[Book]:
    """Decode a file in blocks of `size` bytes and the rest of the last line; -1 is one block.

    UTF-16 and UTF-32, whose lines do not end with the byte 10, are read as a whole. Raises
    `CorpusError` as `read_book` does, at a bad block: the blocks before it have been yielded.
    """
    start = 0
    try:
        with path.open("rb") as file:
            while data := file.read(size):
                if len(data) == size:  # there may be more
                    data += file.read() if _is_wide(data, encoding) else file.readline()
                yield decode_block(data, path, encoding, start)
                start += len(data)
    except OSError as error:
        raise CorpusError(f"{path}: cannot be read ({error.strerror})", str(path)) from None


def _is_wide(data: bytes, encoding: str | None) -> bool:
    """Whether a character takes two bytes or more in an encoding, by default the likeliest one."""
    with suppress(LookupError):  # `decode_block` refuses a name that no encoding has
        return codec(encoding or _guesses(data)[0]).startswith(("utf-16", "utf-32"))
    return False


def decode_block(data: bytes, path: Path, encoding: str | None, start: int) -> Book:
    """Decode bytes that stand at `start` in a file, by default in the encoding that is detected.

    Raises `CorpusError` where the bytes are of another format, more than 0.1 % of the characters
    cannot be decoded, or `encoding` is no encoding of text.
    """
    if kind := other_format(data):
        raise CorpusError(f"{path}: Word, PDF … ({kind}); export it as text", str(path), 0)
    try:
        text, name = (_decode_as(encoding, data), encoding) if encoding else _decode(data)
    except (LookupError, UnicodeError):
        raise CorpusError(f"{path}: {encoding} is no encoding of text", str(path)) from None
    broken_count = _count_broken(text)
    if broken_count > MOST_BROKEN * len(text):
        before = re.split("[\ufffd\0]", text, maxsplit=1)[0]
        # of "gb18030+utf-8", where lines differ, most are in the first: the place is about right
        place = start + len(before.encode(codec(name.split("+")[0]), "replace"))
        tried = _guesses(data)
        message = (
            f"{path}: not text, or damaged: {broken_count:,} of {len(text):,} characters cannot be "
            f"decoded as {name} (the first at byte {place}); {tried[0]} and {tried[1]} come nearest"
            f"; save it as UTF-8, or name its encoding (data.encoding: {{{path.name}: {tried[1]}}})"
        )
        raise CorpusError(message, str(path), place, tried)
    if broken_count:
        logger.warning("%s: %d undecodable characters are shown as �", path, broken_count)
    return Book(path.stem, text, path, name)


def other_format(head: bytes) -> str:
    """Tell the kind of a file that is no text by its first bytes; `""` where they tell none.

    `other_format(b"%PDF-1.7")` is `".pdf"`.
    """
    for mark, kind in MAGIC.items():
        if head.startswith(mark) or head.startswith(mark, 60):  # a .mobi has its mark at byte 60
            return kind
    return ""


def codec(name: str) -> str:
    """Name the Python codec for an encoding as web pages call it: for `"gb2312"` it is `"gb18030"`.

    Raises `LookupError` where no encoding has that name.
    """
    python_name = WIDEST.get(name.lower()) or codecs.lookup(name).name
    return WIDEST.get(python_name, python_name)


def _guesses(data: bytes) -> tuple[str, ...]:
    """Name the encodings that bytes may be in, the likeliest first, by the score of each reading.

    A byte-order mark of UTF-16 decides alone. Bytes that are valid UTF-8 are hardly anything else,
    so it comes first then. UTF-16 reads any bytes as characters, so it needs a score of 0 or more.
    """
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return ("utf-16", *ENCODINGS)
    sample = data[:SAMPLE]
    readings = {name: sample.decode(codec(name), "replace") for name in ENCODINGS}
    scores = {name: _score(text) for name, text in readings.items()}
    if _count_broken(readings["utf-8"]) <= MOST_BROKEN * len(readings["utf-8"]):
        scores["utf-8"] = len(sample)  # the highest score there can be
    likely = [name for name in ENCODINGS if name in LINE_ENCODINGS or scores[name] >= 0]
    return tuple(sorted(likely, key=scores.__getitem__, reverse=True))


def _count_broken(text: str) -> int:
    """Count the zeros and the undecodable characters (�) of a text.

    A � at the very end does not count: there the file's end may cut through a character.
    """
    return sum(map(text.removesuffix("\ufffd").count, "\ufffd\0"))


def _score(text: str) -> int:
    """Count the common characters, less the rare ones and five times the undecodable ones."""
    return int(_weights()[codes(text)].sum(dtype=np.int64))


@functools.cache
def _weights() -> npt.NDArray[np.int8]:
    """Give the weight of every code point in a text's score: (0x110000,).

    A common character weighs 1, a rare one -1, an undecodable one (�) -5, any other 0. The Han
    characters of level 1 of GB2312 and of Big5, which are in use but not common, weigh 0.
    """
    weights = np.zeros(0x110000, np.int8)
    for first, end in RARE:
        weights[first:end] = -1
    for code in range(0x4E00, 0xA000):
        gb, big5 = (chr(code).encode(name, "ignore") for name in ("gb2312", "big5"))
        weights[code] = 0 if b"\xb0" <= gb < b"\xd8" or b"\xa4" <= big5 < b"\xc7" else -1
    weights[codes(COMMON)] = 1
    weights[codes("\ufffd" + LOST[0])] = UNDECODABLE_WEIGHT  # 锟 stands for � that was read as GBK
    return weights


def _decode_as(name: str, data: bytes) -> str:
    """Decode bytes with the named encoding; each character that it has not becomes a �.

    In GB18030 and Big5 the byte pairs behind such a character are kept in step, see `_mend_pair`.
    """
    python_name = codec(name)
    text = data.decode(python_name, "replace")
    if python_name in WIDEST.values() and 0 < text.count("\ufffd") < MOST_MENDED * len(text):
        text = data.decode(python_name, "mend_pair")
    return text.translate(BIG5_SIGNS) if python_name == "big5hkscs" else text


def _mend_pair(error: UnicodeError) -> tuple[str, int]:
    """Give a character for an undecodable pair of bytes, and the place where decoding goes on.

    The character is the one that Windows reads in Big5, else �. Decoding goes on behind one byte or
    behind two, where the 16 bytes that follow score higher. Python calls this at each error.
    """
    assert isinstance(error, UnicodeDecodeError)
    data, start, name = error.object, error.start, error.encoding
    pair = data[start : start + 2]
    if name == "big5hkscs" and (character := pair.decode("cp950", "ignore")) > "\x7f":
        return character, start + 2
    # A second byte is @ or above; below that are signs and line ends, which belong to no pair.
    ends = (start + 2, start + 1) if pair[1:] >= b"@" else (start + 1,)
    return "\ufffd", max(ends, key=lambda end: _score(data[end : end + 16].decode(name, "ignore")))


codecs.register_error("mend_pair", _mend_pair)


def _decode(data: bytes) -> tuple[str, str]:
    """Detect the encoding of bytes, decode them, and name the encodings: `"gb18030+utf-8"`.

    Unless all is UTF-8 or UTF-16, each line with a score below 0 is tried in other encodings.
    """
    if data.isascii() and b"~{" in data and not _count_broken(text := data.decode("hz", "replace")):
        return text, "hz"  # of mail in the nineties: ~{4:O~~} is 春晓
    name = _guesses(data)[0]
    data = data.removeprefix(codecs.BOM_UTF8)
    text = _decode_as(name, data)
    if name not in LINE_ENCODINGS or (name == "utf-8" and not _count_broken(text)):
        return text, name
    lines, encoded_lines, names = text.split("\n"), data.split(b"\n"), [name]
    for number in np.flatnonzero(_part_scores(text, "\n")[1] < 0):
        lines[number], line_name = _reread(encoded_lines[number], lines[number], name)
        names.append(line_name)
    return "\n".join(lines), "+".join(dict.fromkeys(names))


def _part_scores(text: str, ends: str) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Cut a text behind each of the characters `ends`, and score its N parts.

    Returns the places where the parts begin, followed by the text's length plus 1 (a newline is put
    behind the text): (N + 1,); and the parts' scores: (N,).
    """
    characters = codes(text + "\n")
    weights, places = _weights()[characters], np.flatnonzero(np.isin(characters, codes(ends)))
    weights[places] = 0
    starts = np.append(0, places + 1)
    return starts, np.add.reduceat(weights, starts[:-1], dtype=np.int64)


def _reread(line: bytes, text: str, name: str) -> tuple[str, str]:
    """Decode a line anew where another encoding fits it better than `name`, which gave `text`.

    An encoding fits better if it is UTF-8 and gives Chinese, or if its reading scores higher by
    `LEAST_GAIN`. Returns the reading and its encoding; where none fits better, `text` and `name`.
    """
    readings = {encoding: _decode_as(encoding, line) for encoding in LINE_ENCODINGS}
    best = max(readings, key=lambda encoding: _score(readings[encoding]))
    reading, score = readings[best], _score(readings[best])
    is_chinese_utf8 = best == "utf-8" and CJK_TEXT.search(reading)  # hardly so by chance
    is_far_better = score - _score(text) >= LEAST_GAIN and (score > 0 or _count_broken(text))
    return (reading, best) if is_chinese_utf8 or is_far_better else (text, name)


def mojibake(text: str) -> Iterator[Edit]:
    """Decode anew the passages that were decoded as Latin-1 or Windows-1252 by mistake."""
    for match in LATIN.finditer(text):
        data = match.group().translate(CP1252).encode("latin-1")
        best = max((data.decode(name, "ignore") for name in ("gb18030", "big5hkscs")), key=_score)
        is_certain = _score(best) + len(set(CJK_TEXT.findall(best))) >= LEAST_GAIN
        if repaired := _decode_chinese_utf8(data) or (best if is_certain else ""):
            yield *match.span(), repaired


def _decode_chinese_utf8(data: bytes) -> str:
    """Decode bytes that are mostly Chinese in UTF-8, without the others; give `""` for any else."""
    text = data.decode("utf-8", "ignore")
    not_ascii = sum(byte >= 0x80 for byte in data)
    # A Chinese character is three bytes in UTF-8.
    return text if 3 * len(CJK_TEXT.findall(text)) > LEAST_CHINESE * not_ascii else ""


def garbled(text: str) -> Iterator[Edit]:
    """Mend clauses of rare characters that are UTF-8 read as GBK; delete those beyond repair."""
    starts, scores = _part_scores(text, CLAUSE_ENDS)
    edges = np.flatnonzero(np.diff(scores < 0, prepend=False, append=False))
    for start, end in starts[edges].reshape(-1, 2).tolist():  # of consecutive clauses below 0
        damaged = text[start:end]
        data = damaged.replace("\ufffd", "").encode("gb18030", "ignore")
        shifted = data[1:].decode("gb18030", "ignore")  # as if a byte had been lost
        repaired = _decode_chinese_utf8(data)
        if repaired or LOST in damaged or _score(shifted) >= LEAST_GAIN or _is_hopeless(damaged):
            ends_line = text[start - 1 : start] not in {"", "\n"} and damaged.endswith("\n")
            yield start, start + len(damaged), repaired or "\n" * ends_line


def _is_hopeless(text: str) -> bool:
    """Whether a text's rare characters are of too many kinds for a list of fish, jewels or horses.

    Characters with one radical stand together in Unicode, so the code without its lowest 7 bits is
    taken as the kind. Each � counts as a kind, and each common character makes up for one.
    """
    characters = codes(text)
    weights = _weights()[characters]
    kinds = len(np.unique(characters[weights < 0] >> 7)) + text.count("\ufffd")
    return kinds - int(np.count_nonzero(weights > 0)) >= HOPELESS
