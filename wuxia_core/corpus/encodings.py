"""From bytes to text: find the encoding, decode, and mend what was decoded wrongly before.

What is right is told from what is wrong by one measure, the sense of a text: its characters that
are common in any Chinese prose, less those that are rare.
"""

import codecs
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
from wuxia_core.text import CJK_TEXT, Edit, codes

logger = logging.getLogger(__name__)

OTHER_FORMATS = (b"PK\x03\x04", b"%PDF", b"{\\rtf", b"\xd0\xcf\x11\xe0")

# Sense. Half of what is written, in old prose and new, in either script, are these characters.
COMMON = (
    "的不一是之人了我有以在他也为来这而子说上大中得时于其着者道所自生可个国到们你那然去此里无文下"
    "后事出地如天学家要就十又能年心见二知她三日与过多同和只作么好都已想会看当则起书小言前成明用还"
    "今本方法相将行经意没至因何四从种亦先便面回样太老正外两等但五非主世实分对王发故名民西现把情头"
    "话儿即命使曰云问字公些真未什必几月长声若身理义论力女死很间定教开进做己门及东吗呢啊爲來這說時"
    "於個國們裏無後學見與過麼會當則書還將經沒從種樣兩實對發現頭話兒雲問幾長聲義論間開進門東嗎麽説"
    "，。：；？！、“”‘’「」『』《》（）…—āáǎàēéěèīíǐìōóǒòūúǔùǖǘǚǜü"
)
# Controls, ㄅㄆㄇ, Han, private use: rare unless they are everyday.
RARE = ((0, 9), (14, 32), (0x3100, 0x3130), (0x3400, 0xA000), (0xE000, 0xFB00), (0x20000, 0x32000))
LOST, BROKEN = -5, "\ufffd\ufffe\uffff"  # what decoding leaves of bytes that mean nothing

# Encodings.
BOMS = {b"\xef\xbb\xbf": "utf-8", b"\xff\xfe": "utf-16", b"\xfe\xff": "utf-16"}
UTF_16 = ("utf-16", "utf-16-le", "utf-16-be")
LINE_ENCODINGS = ("utf-8", "gb18030", "cp950")
ENCODINGS = (*LINE_ENCODINGS, *UTF_16[1:])
# What web pages mean by a name (the Encoding Standard of WHATWG): the widest of a family.
WIDEST = dict.fromkeys(
    ("gb2312", "gbk", "x-gbk", "gb_2312", "gb_2312-80", "csgb2312"), "gb18030"
) | dict.fromkeys(("big5", "cp950", "cn-big5", "x-x-big5"), "big5hkscs")
# Where Big5-HKSCS has another sign than Big5 as everybody writes it.
SIGNS = tuple(zip("•､∼♁☉／＼¥¢£‾￭", "‧﹑～⊕⊙∕﹨￥￠￡¯▓", strict=True))
MOST_BROKEN = 0.001  # share of characters: more than that undecodable, and it is not this encoding
ANY_FEW, ANY_TEXT = 3, 0.02  # number, share: with more undecodable it is no text
NEAREST = "nearest"  # the name of the way to read what is undecodable
CONTROL = re.compile("[\x00-\x08\x0b\x0e-\x19\x1b-\x1f]")
GAIN, GAIN_UTF_8 = 5, 2  # of sense, from which a line is in another encoding than its file
GOOD = 0.2  # sense a character: what makes less is no prose

# Text that was decoded wrongly once.
CP1252 = {c: n for n in range(0x80, 0xA0) for c in map(ord, bytes([n]).decode("cp1252", "ignore"))}
SPECIAL = "".join(map(chr, CP1252))
LATIN = re.compile(rf"[\x80-\x9f\xa1-\xff][ -\xff{SPECIAL}]*[\x80-\xff{SPECIAL}][@-~]?")
MISREADINGS = (("gb18030", "utf-8"), ("gb18030", "big5hkscs"), ("big5hkscs", "utf-8"),
               ("big5hkscs", "gb18030"), ("gb18030", "gb18030"))  # fmt: skip
MOSTLY = 0.8  # of the bytes, or of the characters
FEW, MANY = 4, 10  # rare characters more than common ones: worth a try; kinds of them: proof
WINDOW, EDGE = 12, 20  # characters
LINE = re.compile(".+")
# Each by itself and with a literal to begin with, or the search is seven times slower.
LOST_TEXTS = ("锟斤拷[锟斤拷]*", "烫烫烫烫烫烫烫*", "屯屯屯屯屯屯屯*")
CLAUSE = re.compile("[，。：；？！…”」』]")
Way = tuple[str, str]  # decoded as, should have been decoded as


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
    blocks = list(read_blocks(path, encoding, size=-1))
    return blocks[0] if blocks else decode_block(b"", path, encoding, 0)


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
                    by_line = _ranked(data)[0] not in UTF_16
                    data += file.readline() if by_line else file.read()
                yield decode_block(data, path, encoding, start)
                start += len(data)
    except OSError as error:
        raise CorpusError(f"{path}: cannot be read ({error.strerror})", str(path)) from None


def decode_block(data: bytes, path: Path, encoding: str | None, start: int) -> Book:
    """Decode bytes that stand at `start` in a file; raises `CorpusError` where they are no text."""
    if data.startswith(OTHER_FORMATS):
        raise CorpusError(f"{path}: a Word, PDF or ZIP file; export it as text", str(path), 0)
    try:
        text, name = (_read(data, encoding), encoding) if encoding else _decode(data)
    except (LookupError, UnicodeError):
        raise CorpusError(f"{path}: {encoding} is no encoding of text", str(path)) from None
    broken = _broken(text)
    if broken > MOST_BROKEN * len(text):
        before = re.split(f"[{BROKEN}]", text, maxsplit=1)[0]
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
    head = text[:100_000]
    if (strange := len(CONTROL.findall(head))) > MOST_BROKEN * len(head):
        raise CorpusError(f"{path}: not text ({strange} control characters)", str(path), 0)
    return Book(path.stem, text, path, name)


def codec(name: str) -> str:
    """Name Python's codec for what the web means by a name: `"gb2312"` is `"gb18030"`.

    Raises `LookupError` where no encoding is called that.
    """
    name = name.lower()
    name = name if name in WIDEST else codecs.lookup(name).name
    return WIDEST.get(name, name)


def _ranked(data: bytes) -> tuple[str, ...]:
    """Rank the encodings, the likeliest first: by byte-order mark, else by what makes most sense.

    What is valid UTF-8 is no GB18030 or Big5, and without zeros no UTF-16.
    """
    for bom, name in BOMS.items():
        if data.startswith(bom):
            return (name, *(other for other in ENCODINGS if other != name))
    sample = _sample(data)
    readings = {name: sample.decode(codec(name), "replace") for name in ENCODINGS}
    valid = _broken(readings["utf-8"]) <= MOST_BROKEN * len(readings["utf-8"])
    sense = {name: _sense(text) for name, text in readings.items()}
    out = {*LINE_ENCODINGS[1:], *(() if 0 in sample else UTF_16)} if valid else set()
    out |= {name for name in UTF_16 if sense.get(name, 0) < 0}
    return tuple(sorted(ENCODINGS, key=lambda name: (name in out, -sense[name])))


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


def _sense(text: str, least: int = LOST) -> int:
    """Count the common characters, less the rare ones and `-least` times the undecodable ones."""
    return int(np.maximum(_weights()[codes(text)], least).sum())


@functools.cache
def _weights() -> npt.NDArray[np.int8]:
    """Weigh characters: common 1, rare -1, undecodable -5; of GB2312 and Big5 level 1 is 0."""
    cells = range(0xA1, 0xFF)
    gb = bytes(chain(*product(range(0xB0, 0xD8), cells)))
    big5 = bytes(chain(*product(range(0xA4, 0xC7), [*range(0x40, 0x7F), *cells])))
    everyday = gb.decode("gb2312", "ignore") + big5.decode("big5", "ignore")
    weights = np.zeros(0x110000, np.int8)
    for first, end in RARE:
        weights[first:end] = -1
    for characters, weight in ((everyday, 0), (COMMON, 1), (BROKEN, LOST)):
        weights[codes(characters)] = weight
    return weights


def _read(data: bytes, name: str) -> str:
    """Decode; what no encoding of the family has becomes �, and what follows is not shifted."""
    python = codec(name)
    sample = _sample(data).decode(python, "replace")
    few = _broken(sample) <= max(ANY_FEW, ANY_TEXT * len(sample))
    text = data.decode(python, NEAREST if few and python in WIDEST.values() else "replace")
    if python == "big5hkscs":
        for hong_kong, common in SIGNS:
            text = text.replace(hong_kong, common)
    return text


def _nearest(error: UnicodeError) -> tuple[str, int]:
    """Read an undecodable pair as Windows does, else as �, and go on where more sense follows."""
    assert isinstance(error, UnicodeDecodeError)
    data, at, name = error.object, error.start, error.encoding
    pair = data[at : at + 2]
    if name == "big5hkscs" and (read := pair.decode("cp950", "ignore")) > "\x7f":
        return read, at + 2
    ends = (at + 2, at + 1) if pair[1:] >= b"@" else (at + 1,)  # a line's end is never in a pair
    sense = {end: _sense(data[end : end + 16].decode(name, "ignore")) for end in ends}
    return "\ufffd", max(ends, key=lambda end: sense[end])


codecs.register_error(NEAREST, _nearest)


def _decode(data: bytes) -> tuple[str, str]:
    """Decode, line by line unless all is UTF-8 or UTF-16, and name the encodings that were used."""
    name = _ranked(data)[0]
    data = data.removeprefix(codecs.BOM_UTF8)
    text = _read(data, name)
    if name in UTF_16 or (name == "utf-8" and not _broken(text)):
        return text, name
    lines, raw, used = text.split("\n"), data.split(b"\n"), [name]
    for number in _senseless(text):
        lines[number], other = _reread(raw[number], lines[number], name)
        used.append(other)
    return "\n".join(lines), "+".join(dict.fromkeys(used))


def _senseless(text: str) -> list[int]:
    """List the lines with more rare characters than common ones."""
    characters = codes(text + "\n")
    starts = np.append(0, np.flatnonzero(characters == ord("\n"))[:-1] + 1)
    sense = np.add.reduceat(_weights()[characters], starts, dtype=np.int64)
    return [int(number) for number in np.flatnonzero(sense < 0)]


def _reread(line: bytes, text: str, name: str) -> tuple[str, str]:
    """Read a line in an encoding that makes far more sense of it than `name`, which gave it."""
    readings = {name: _read(line, name) for name in LINE_ENCODINGS}
    best = max(readings, key=lambda name: _sense(readings[name]))
    reading, sense = readings[best], _sense(readings[best])
    surely = best == "utf-8" and CJK_TEXT.search(reading)  # what is valid is hardly so by chance
    good = surely or sense > 0 or _broken(text)
    far_more = sense - _sense(text) >= (GAIN_UTF_8 if surely else GAIN)
    return (reading, best) if good and far_more else (text, name)


def mojibake(text: str) -> Iterator[Edit]:
    """Passages that were decoded wrongly once, or lost a byte, and can be decoded back."""
    done = 0
    for start, end, repaired in sorted([*_from_latin(text), *_from_asian(text)]):
        if start >= done:
            yield start, end, repaired
            done = end


def _from_latin(text: str) -> Iterator[Edit]:
    """Undo that a text was decoded as Latin-1, or as Windows-1252."""
    for match in LATIN.finditer(text):
        data = match.group().translate(CP1252).encode("latin-1")
        readings = {name: data.decode(codec(name), "ignore") for name in LINE_ENCODINGS}
        valid = len(readings["utf-8"].encode()) > MOSTLY * len(data)
        repaired = readings["utf-8"] if valid else max(readings.values(), key=_sense)
        proof = len(set(CJK_TEXT.findall(repaired))) + (FEW if valid else _sense(repaired))
        if proof > FEW:
            yield *match.span(), repaired


def _from_asian(text: str) -> Iterator[Edit]:
    """Undo that one encoding of Chinese was decoded as another; the edges are where it is best."""
    for start, end in _nonsense(text):
        first = max(text.rfind("\n", 0, start) + 1, start - EDGE)
        last = end + len(text[end : end + EDGE].split("\n")[0])
        sense = functools.partial(_sense_undone, text[first:last], first)
        way = max(MISREADINGS, key=lambda way: sense(start, end, way))
        start = max(range(start, first - 1, -1), key=lambda place: sense(place, end, way))
        to_utf8 = way[1] == "utf-8"  # in which no good character gets lost
        ends = range(end, last + 1)[:: -1 if to_utf8 else 1]
        end = max(ends, key=lambda place: sense(start, place, way))
        undone = _undone(text[start:end], way)
        repaired = undone.replace("\ufffd", "")
        gain = _sense(repaired) - _sense(text[start:end], -1)
        certain = to_utf8 and len(CJK_TEXT.findall(undone)) > MOSTLY * len(undone)
        if gain >= FEW and (certain or _sense(repaired) >= max(2, GOOD * len(repaired))):
            yield start, end, repaired


def _sense_undone(line: str, at: int, start: int, end: int, way: Way) -> int:
    undone = _undone(line[start - at : end - at], way)
    return _sense(line[: start - at] + undone + line[end - at :], -1)


def _undone(text: str, way: Way) -> str:
    """Decode again what was decoded wrongly; of one and the same encoding, a byte later."""
    data = text.replace("\ufffd", "").encode(way[0], "ignore")[way[0] == way[1] :]
    return data.decode(way[1], "replace")


def _nonsense(text: str) -> Iterator[tuple[int, int]]:
    """Find, in a line, where rare characters prevail: from the first to the last of them."""
    sense = np.maximum(_weights()[codes("\n" + text + "\n" * WINDOW)], -1)
    total = np.cumsum(sense, dtype=np.int32)
    low = np.flatnonzero(total[WINDOW:] - total[:-WINDOW] <= -FEW)
    for places in np.split(low, np.flatnonzero(np.diff(low) > 2 * WINDOW) + 1) if len(low) else ():
        for match in LINE.finditer(text, places[0], places[-1] + WINDOW):
            rare = np.flatnonzero(sense[match.start() + 1 : match.end() + 1] < 0) + match.start()
            if len(rare) >= FEW:
                yield int(rare[0]), int(rare[-1]) + 1


def garbled(text: str) -> Iterator[Edit]:
    """Clauses of 锟斤拷 and the like, or of rare characters without sense: beyond repair."""
    lost = (match.span() for pattern in LOST_TEXTS for match in re.finditer(pattern, text))
    hopeless = (span for span in _nonsense(text) if _is_hopeless(text[slice(*span)]))
    done = 0
    for start, end in sorted([*lost, *hopeless]):
        if start < done:
            continue
        while start > done and not _is_edge(text, start, text[start - 1], start - WINDOW):
            start -= 1
        while end < len(text) and not _is_edge(text, end, text[end], end):
            end += 1
        whole_line = start == 0 or text[start - 1] == "\n"
        done = end + (whole_line and text.startswith("\n", end))
        yield start, done, ""


def _is_edge(text: str, place: int, beyond: str, window: int) -> bool:
    """Whether a line ends at a place, or a clause beyond which it makes sense."""
    near = text[max(0, window) : window + WINDOW]
    return beyond == "\n" or bool(CLAUSE.match(text, place - 1) and _sense(near) > 0)


def _is_hopeless(text: str) -> bool:
    """Whether the rare characters are of too many kinds for a list of fish, of jewels, of horses.

    What has one radical stands together in Unicode, so kinds are told by the code without 7 bits.
    """
    characters = codes(text)
    sense = _weights()[characters]
    kinds = len(np.unique(characters[sense < 0] >> 7)) + text.count("\ufffd")
    return kinds - int(np.count_nonzero(sense > 0)) >= MANY
