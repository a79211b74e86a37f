"""From bytes to text: find the encoding, decode, and mend what was decoded wrongly before.

One measure tells a right reading from a wrong one, the text's score: the number of its characters
that are common in any Chinese prose, less the number of its rare characters, less five for each
character that could not be decoded.
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
# For the bytes with which a file of another format begins, the suffix of that format.
MAGIC: dict[bytes, str] = {mark.encode("latin-1"): kind for mark, kind in DATA["magic"].items()}
# For the name of an encoding, the widest encoding of its family: "gb18030" for "gb2312".
WIDEST: dict[str, str] = {x: widest for widest, names in DATA["widest"].items() for x in names}
# Tables for `str.translate`: from signs that only Big5-HKSCS has to the usual ones, and from
# private characters, as Python decodes GB18030, to those of GB18030-2022.
BIG5_SIGNS = str.maketrans(*DATA["big5hkscs_signs"])
GB18030_2022 = str.maketrans(*DATA["gb18030_2022"])

# Scores.
# Ranges of code points, [first, end): controls, ㄅㄆㄇ, Han, private use, rarer Han. A character in
# them is rare, and weighs -1, unless `_weights` finds that it is in everyday use.
RARE = ((0, 9), (14, 32), (0x3100, 0x3130), (0x3400, 0xA000), (0xE000, 0xFB00), (0x20000, 0x32000))

# Encodings.
LINE_ENCODINGS = ("utf-8", "gb18030", "cp950")  # byte 10 is always a newline in them
ENCODINGS = (*LINE_ENCODINGS, "utf-16-le", "utf-16-be")  # the ones that are detected
SAMPLE = 49_152  # bytes at the beginning by which the encoding of the whole text is guessed
MOST_BROKEN = 0.001  # share of undecodable characters: a text with more is not in it
MOST_MENDED = 0.1  # share of undecodable characters: with as many `_mend_pair` is not tried
LEAST_GAIN = 5  # least score, or gain in score, for which a text is read in another encoding

# Text that was decoded wrongly once.
# For a code point that Windows-1252 has at a byte from 0x80 to 0x9F, that byte: 0x80 for €.
CP1252 = {c: n for n in range(0x80, 0xA0) for c in map(ord, bytes([n]).decode("cp1252", "ignore"))}
CP1252_SIGNS = "".join(map(chr, CP1252))
# A passage of bytes read as Latin-1 or Windows-1252: from the first character that is not ASCII to
# the last one on the line. The first must be of Latin-1, as “ and … (of Windows-1252) stand in
# Chinese, too. An ASCII character behind the last may be the second byte of a pair: it belongs to
# the passage.
LATIN = re.compile(rf"[\x80-\x9f\xa1-\xff][ -\xff{CP1252_SIGNS}]*[\x80-\xff{CP1252_SIGNS}][@-~]?")
LEAST_CHINESE = 0.8  # Chinese characters must take more than this share of the bytes above 0x7F
CLAUSE_ENDS = "，。：；？！…”」』\n"
LOST = "锟斤拷"  # two � in UTF-8, read as GBK
HOPELESS = 10  # at least so many more kinds of rare characters than common characters


@dataclass(frozen=True)
class Book:
    """A file or a block of it, decoded and not yet cleaned."""

    title: str  # stem of the file's name
    text: str
    path: Path
    encoding: str  # as it was named, or as detected; those of lines that differ are joined by +


def read_book(path: str | Path, encoding: str | None = None) -> Book:
    """Read a text file as a whole, and decode it.

    Parameters
    ----------
    path : str or Path
        The file; its stem is the title.
    encoding : str, optional
        A name of the encoding, see `codec`; by default the encoding is detected, also that of
        single lines which are in another one.

    Raises
    ------
    CorpusError
        The file cannot be read, is of another format (PDF, an archive), `encoding` is no encoding
        of text, or more than 0.1 % of the characters cannot be decoded. The error has the `path`.
        In the last case it has the `offset` of the first undecodable character, in bytes and about
        right, and the encodings that were `tried`, the likeliest first.
    """
    path = Path(path)
    # A file without bytes has no block; its encoding is never looked at.
    return next(read_blocks(path, encoding, -1), Book(path.stem, "", path, encoding or "utf-8"))


def read_blocks(path: Path, encoding: str | None, size: int) -> Iterator[Book]:
    """Yield a file in decoded blocks, each of `size` bytes and the rest of its last line.

    With -1 as `size` the file is one block. If a block is in UTF-16 or UTF-32, in which the byte 10
    is not always a newline, all the rest of the file belongs to it. An empty file has no block.

    Raises `CorpusError` if the file cannot be read, or at the first block that begins as a file of
    another format (PDF, an archive) does or of which more than 0.1 % of the characters cannot be
    decoded: the blocks before it have been yielded. Also raises it if `encoding` is no encoding of
    text.
    """
    start = 0
    try:
        with path.open("rb") as file:
            while data := file.read(size):
                if len(data) == size:  # there may be more
                    data += file.read() if _is_utf16_or_32(data, encoding) else file.readline()
                yield decode_block(data, path, encoding, start)
                start += len(data)
    except OSError as error:
        raise CorpusError(f"{path}: cannot be read ({error.strerror})", str(path)) from None


def _is_utf16_or_32(data: bytes, encoding: str | None) -> bool:
    """Whether `encoding`, or without it the likeliest encoding of `data`, is UTF-16 or UTF-32.

    False if no encoding is called `encoding`: `decode_block` then raises the error.
    """
    with suppress(LookupError):
        return codec(encoding or _guesses(data)[0]).startswith(("utf-16", "utf-32"))
    return False


def decode_block(data: bytes, path: Path, encoding: str | None, start: int) -> Book:
    """Decode `data`, the bytes of the file `path` from `start` on; without `encoding`, detect it.

    Logs a warning if some characters are undecodable (see `_count_broken`). Raises `CorpusError` if
    more than 0.1 % are, if `data` begins as a file of another format does (see `MAGIC`), or if
    `encoding` is no encoding of text.
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
        # In "gb18030+utf-8" most lines are in GB18030, so the place, in bytes, is about right.
        place = start + len(before.encode(codec(name.split("+")[0]), "replace"))
        if not encoding and data.startswith(codecs.BOM_UTF8):  # `_decode` has removed it
            place += len(codecs.BOM_UTF8)
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
    """Return the suffix of the format in `MAGIC` whose mark begins `head` or is at byte 60.

    `other_format(b"%PDF-1.7")` is `".pdf"`; without such a mark the suffix is `""`.
    """
    for mark, kind in MAGIC.items():
        if head.startswith(mark) or head.startswith(mark, 60):  # a .mobi has its mark at byte 60
            return kind
    return ""


def codec(name: str) -> str:
    """Return Python's name of the encoding that web pages mean by `name`.

    For `"GB2312"` it is `"gb18030"`, as pages use the name for the whole family (see `WIDEST`).
    Case does not matter. Raises `LookupError` if no encoding has that name.
    """
    python_name = WIDEST.get(name.lower()) or codecs.lookup(name).name
    return WIDEST.get(python_name, python_name)


def _guesses(data: bytes) -> tuple[str, ...]:
    """List the names of the encodings that `data` may be in, the likeliest first.

    If `data` begins with a byte-order mark of UTF-16, UTF-16 comes first. Else the first 49,152
    bytes are decoded in each of `ENCODINGS`, which are sorted by the scores of these readings; in a
    tie the order of `ENCODINGS` decides. But UTF-8 comes first if at most 0.1 % of its reading is
    undecodable, as text in other encodings is hardly ever valid UTF-8. UTF-16 makes characters of
    almost any bytes: it is listed only if its reading scores 0 or more.
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
    """Count the undecodable characters (�) and the zeros (U+0000) of a text.

    A � at the very end does not count: the end of the data may cut through a character.
    """
    text = text.removesuffix("\ufffd")
    return text.count("\ufffd") + text.count("\0")


def _score(text: str) -> int:
    """Return a text's score: the number of its common, less rare, less 5 × undecodable characters.

    `_score("他的剑鐨�")` is 2 - 1 - 5 = -4: 剑 is neither common nor rare.
    """
    return int(_weights()[codes(text)].sum(dtype=np.int64))


@functools.cache
def _weights() -> npt.NDArray[np.int8]:
    """Return the weight of every code point, what it adds to a text's score: (0x110000,).

    A common character weighs 1, a rare one -1, an undecodable one (�) -5, any other 0. The Han
    characters of level 1 of GB2312 or Big5, which are in use, weigh 0 unless they are common.
    """
    weights = np.zeros(0x110000, np.int8)
    for first, end in RARE:
        weights[first:end] = -1
    for code in range(0x4E00, 0xA000):
        gb, big5 = (chr(code).encode(name, "ignore") for name in ("gb2312", "big5"))
        # Of level 1 the first byte is B0 to D7 in GB2312, A4 to C6 in Big5.
        weights[code] = 0 if b"\xb0" <= gb < b"\xd8" or b"\xa4" <= big5 < b"\xc7" else -1
    weights[codes("".join(DATA["common"]))] = 1
    weights[codes("\ufffd" + LOST[0])] = -5  # 锟 begins 锟斤拷, which is �� read as GBK
    return weights


def _decode_as(name: str, data: bytes) -> str:
    """Decode `data` in the encoding `name`; bytes that cannot be decoded become �.

    In GB18030 and Big5, if less than 10 % of the characters are �, `data` is decoded again, and
    `_mend_pair` decides at each undecodable byte what stands for it and where decoding goes on.
    Raises `LookupError` or `UnicodeError` if `name` is no encoding of text.
    """
    python_name = codec(name)
    text = data.decode(python_name, "replace")
    if python_name in WIDEST.values() and 0 < text.count("\ufffd") < MOST_MENDED * len(text):
        text = data.decode(python_name, "mend_pair")
    return text.translate(BIG5_SIGNS) if python_name == "big5hkscs" else text


def _mend_pair(error: UnicodeError) -> tuple[str, int]:
    """Return a character for bytes that cannot be decoded, and the place where decoding goes on.

    In Big5, if Windows' code page 950 has a character for the bad byte and the next one, it is that
    character, and decoding goes on behind the two bytes. Else the character is �. Decoding then
    goes on behind the first byte; but if the second may belong to a pair, behind it or behind both,
    whichever place has next 16 bytes with the higher score, in a tie the later place.
    """
    assert isinstance(error, UnicodeDecodeError)
    data, start, name = error.object, error.start, error.encoding
    pair = data[start : start + 2]
    character = pair.decode("cp950", "ignore")  # "" or ASCII (the second byte) if cp950 has none
    if name == "big5hkscs" and not character.isascii():
        return character, start + 2
    # A pair's second byte is 0x40 or above; a byte below it (digit, sign, line end) stands alone.
    may_be_pair = len(pair) == 2 and pair[1] >= 0x40
    places = (start + 2, start + 1) if may_be_pair else (start + 1,)
    return "\ufffd", max(places, key=lambda x: _score(data[x : x + 16].decode(name, "ignore")))


# Python calls it for each error in `bytes.decode(name, "mend_pair")`.
codecs.register_error("mend_pair", _mend_pair)


def _decode(data: bytes) -> tuple[str, str]:
    """Detect the encoding of `data`; return the text and the encoding's name.

    Each line with a score below 0 may be in another encoding: it is given to `_reread`, unless the
    whole text is UTF-16 or valid UTF-8. If some lines are in another encoding, the name has those
    of all, with that of the whole text first: `"gb18030+utf-8"`.
    """
    if data.isascii() and b"~{" in data and not _count_broken(text := data.decode("hz", "replace")):
        return text, "hz"  # Chinese in ASCII, of mail in the nineties: ~{4:O~~} is 春晓
    name = _guesses(data)[0]
    data = data.removeprefix(codecs.BOM_UTF8)
    text = _decode_as(name, data)
    if name not in LINE_ENCODINGS or (name == "utf-8" and not _count_broken(text)):
        return text, name
    lines, encoded_lines, names = text.split("\n"), data.split(b"\n"), [name]
    _, scores = _part_scores(text, "\n")
    for number in np.flatnonzero(scores < 0):
        lines[number], line_name = _reread(encoded_lines[number], lines[number], name)
        names.append(line_name)
    return "\n".join(lines), "+".join(dict.fromkeys(names))


def _part_scores(text: str, ends: str) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    r"""Add a newline to a text, cut it behind each character in `ends`, and score the N parts.

    `ends` must contain the newline; its characters weigh 0. Returns the places where the parts
    begin, followed by the text's length plus 1, (N + 1,); and the scores of the parts, (N,).
    `_part_scores("他笑，剑", "，\n")` gives 0, 3, 5 and 1, 0.
    """
    characters = codes(text + "\n")
    weights, places = _weights()[characters], np.flatnonzero(np.isin(characters, codes(ends)))
    weights[places] = 0
    starts = np.append(0, places + 1)
    return starts, np.add.reduceat(weights, starts[:-1], dtype=np.int64)


def _reread(line: bytes, text: str, name: str) -> tuple[str, str]:
    """Decode a line anew if another encoding fits it better than `name`, which gave `text`.

    The line is read in each of `LINE_ENCODINGS`. The reading with the highest score replaces `text`
    if it is UTF-8 and has a Chinese character, or if it scores at least `LEAST_GAIN` more than
    `text`; in the second case it must also score above 0, or `text` have undecodable characters.
    Returns the reading and the name of its encoding, else `text` and `name`.
    """
    readings = {encoding: _decode_as(encoding, line) for encoding in LINE_ENCODINGS}
    best = max(readings, key=lambda encoding: _score(readings[encoding]))
    reading, score = readings[best], _score(readings[best])
    is_chinese_utf8 = best == "utf-8" and CJK_TEXT.search(reading)  # hardly so by chance
    is_far_better = score - _score(text) >= LEAST_GAIN and (score > 0 or _count_broken(text))
    return (reading, best) if is_chinese_utf8 or is_far_better else (text, name)


def mojibake(text: str) -> Iterator[Edit]:
    """Propose edits that decode anew what was decoded as Latin-1 or Windows-1252 by mistake.

    The bytes of such a passage (`LATIN`) are decoded as UTF-8 if that gives mostly Chinese. If not,
    they are decoded as GB18030 or Big5, whichever reading scores higher; if that reading has too
    little Chinese to be certain, the passage stays as it is.
    """
    for match in LATIN.finditer(text):
        data = match.group().translate(CP1252).encode("latin-1")
        best = max((data.decode(name, "ignore") for name in ("gb18030", "big5hkscs")), key=_score)
        # A few words have few common characters, so each different Chinese character counts too.
        is_certain = _score(best) + len(set(CJK_TEXT.findall(best))) >= LEAST_GAIN
        repaired = _decode_chinese_utf8(data) or (best if is_certain else "")
        if repaired:
            yield *match.span(), repaired


def _decode_chinese_utf8(data: bytes) -> str:
    """Decode bytes as UTF-8, leaving out invalid ones; return `""` if they are not mostly Chinese.

    They are mostly Chinese if Chinese characters and marks take more than 80 % of the bytes above
    0x7F.
    """
    text = data.decode("utf-8", "ignore")
    not_ascii = sum(byte >= 0x80 for byte in data)
    # A Chinese character is three bytes in UTF-8.
    return text if 3 * len(CJK_TEXT.findall(text)) > LEAST_CHINESE * not_ascii else ""


def garbled(text: str) -> Iterator[Edit]:
    """Propose edits that mend or delete Chinese that was decoded in another encoding of Chinese.

    A passage is a row of consecutive clauses that each score below 0. It is mended if it is UTF-8
    that was read as GBK. Else it is deleted if it contains 锟斤拷, if it is GBK that a lost byte
    put out of step, or if `_is_hopeless` says so; a newline at its end stays if the passage begins
    within a line. Other passages stay as they are.
    """
    starts, scores = _part_scores(text, CLAUSE_ENDS)
    # Numbers of clauses: by turns the first one of a passage, and the first one behind it.
    edges = np.flatnonzero(np.diff(scores < 0, prepend=False, append=False))
    for start, end in starts[edges].reshape(-1, 2).tolist():
        damaged = text[start:end]
        data = damaged.replace("\ufffd", "").encode("gb18030", "ignore")
        shifted = data[1:].decode("gb18030", "ignore")  # as if a byte had been lost
        repaired = _decode_chinese_utf8(data)
        if repaired or LOST in damaged or _score(shifted) >= LEAST_GAIN or _is_hopeless(damaged):
            begins_line = text[start - 1 : start] in {"", "\n"}
            newline = "\n" if damaged.endswith("\n") and not begins_line else ""
            yield start, start + len(damaged), repaired or newline


def _is_hopeless(text: str) -> bool:
    """Whether a text's rare characters are of too many kinds for a list of fish, jewels or horses.

    Each common character makes up for one kind; if `HOPELESS` kinds or more are left, they are too
    many. Characters with the same radical stand together in Unicode, so a character's kind is its
    code without the lowest 7 bits. All � together are one kind, and each � adds one more.
    """
    characters = codes(text)
    weights = _weights()[characters]
    kinds = len(np.unique(characters[weights < 0] >> 7)) + text.count("\ufffd")
    return kinds - int(np.count_nonzero(weights > 0)) >= HOPELESS
