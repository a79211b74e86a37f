"""From files to documents: find the files, decode them, clean and cut what they hold.

Which files are novels and which general text is decided here, and never by what they say.
"""

import functools
import json
import logging
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain, count, product
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from wuxia_core.corpus.chapters import passages, split_chapters
from wuxia_core.corpus.cleaning import NOVELS_ONLY, Tally, clean
from wuxia_core.corpus.overlap import to_simplified
from wuxia_core.errors import CorpusError, DataError

logger = logging.getLogger(__name__)

# Files.
NO_NOVELS = {"general.txt", "lexicon.txt"}
OWN_FOLDERS = {"sample", "tiny_base", "mixed"}  # below data_dir they are not the user's novels
OTHER_FORMATS = (b"PK\x03\x04", b"%PDF", b"{\\rtf", b"\xd0\xcf\x11\xe0")
BLOCK = 32_000_000  # bytes read at a time

# Encodings.
BOMS = {b"\xef\xbb\xbf": "utf-8-sig", b"\xff\xfe": "utf-16", b"\xfe\xff": "utf-16"}
UTF_16 = ("utf-16-le", "utf-16-be")
ENCODINGS = ("utf-8", "gb18030", "cp950", *UTF_16)
LINE_ENCODINGS = ("utf-8", "gb18030", "cp950", "big5hkscs")
CLEAR, FAR_MORE = 0.8, 0.2  # plausibility of a line that is fine; a difference that decides
BROKEN = "\ufffd\ufffe\uffff"  # what decoding leaves of bytes that mean nothing
MOST_BROKEN = 0.001  # share of characters: more than that undecodable, and it is not this encoding
CONTROL = re.compile("[\x00-\x08\x0b\x0e-\x19\x1b-\x1f]")

# Documents, in characters.
PASSAGE = 200  # shorter lines of general text are gathered up to this length
SHORTEST = 20  # less than that is no book
LONGEST_LINE = 6000  # a longer one is cut at sentence ends
LONG = re.compile(
    rf"(.{{{LONGEST_LINE // 2},{LONGEST_LINE - 1}}}?[。！？!?]|.{{{LONGEST_LINE}}})(?=.)"
)


@dataclass(frozen=True)
class File:
    """A text file: `source` is "wuxia" or "general", `book` is what its documents go by.

    `name` is the path below `data_dir`, or the last part of a path elsewhere.
    """

    path: Path
    source: str
    book: str
    name: str


def find_files(
    data_dir: Path, general: Path | None, novels: Path | None = None, lexicon: Path | None = None
) -> list[File]:
    """List the novels below `data_dir`, then the general text, each in order of their paths.

    Neither a lexicon nor a file called general.txt or lexicon.txt is a novel.

    `novels` is a JSONL that stands in for the novels. A novel's `book` is its name without the
    suffix, a general text's is its stem; where two would have the same, the later is numbered.

    Raises `DataError` where there is no novel, or `general` holds neither .txt nor .jsonl.
    """
    if not data_dir.is_dir():
        raise DataError(f"data.data_dir {data_dir}: no such folder; novels are .txt files in one")
    named = [path.resolve() for path in (general, lexicon) if path]
    texts = [
        path
        for path in _below(data_dir, ".txt")
        if path.relative_to(data_dir).parts[0] not in OWN_FOLDERS
        and not any(path.resolve().is_relative_to(other) for other in named)
    ]
    paths = [novels] if novels else [path for path in texts if path.name.lower() not in NO_NOVELS]
    if not paths:
        raise DataError(f"data.data_dir {data_dir}: no novel in it; put .txt files there")
    files = []
    for source, found in (("wuxia", paths), ("general", _find_general(texts, general))):
        taken: set[str] = set()
        for path in found:
            inside = path.is_relative_to(data_dir)
            name = str(path.relative_to(data_dir)) if inside else path.name
            title = name.removesuffix(path.suffix) if source == "wuxia" else path.stem
            book = _unused(title, taken, path)
            files.append(File(path, source, book, name))
    return files


def _unused(title: str, taken: set[str], path: Path) -> str:
    """Put a number behind a title that is taken, and remember what it has become."""
    names = chain([title], (f"{title} ({number})" for number in count(2)))
    name = next(name for name in names if name not in taken)
    if name != title:
        logger.warning("%s: another file is called %s too; this is %s", path, title, name)
    taken.add(name)
    return name


def _below(folder: Path, *suffixes: str) -> list[Path]:
    """List the files below a folder, linked folders once; a link that leads nowhere is named."""
    files: list[Path] = []
    seen: set[str] = set()
    for parent, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(parent)
        folders[:] = sorted(x for x in folders if real not in seen and not x.startswith("."))
        files += [Path(parent, name) for name in names if real not in seen]
        seen.add(real)
    return sorted(path for path in files if path.suffix.lower() in suffixes and _is_usable(path))


def _is_usable(path: Path) -> bool:
    if not path.is_file():
        logger.warning("%s: a link that leads nowhere or in a circle; left out", path)
    elif str(path).encode("utf-8", "replace").decode() != str(path):
        logger.warning("%r: left out, its name is not UTF-8; rename it", str(path))
    else:
        return True
    return False


def _find_general(texts: list[Path], general: Path | None) -> list[Path]:
    """List what `general` names, and any general.txt among the novels."""
    files = [path for path in texts if path.name.lower() == "general.txt"]
    if general is not None:
        named = [general] if general.is_file() else _below(general, ".txt", ".jsonl")
        if not named:
            raise DataError(f"data.general_file {general}: no .txt or .jsonl file there")
        files += named
    return sorted({path.resolve(): path for path in files}.values())


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


class Document(NamedTuple):
    """A chapter, or one general text: the unit of the split and of every statistic."""

    source: str  # "wuxia" or "general"
    book: str
    chapter: str
    text: str


@dataclass
class FileReport:
    """What became of a file. `characters` and `kept` count before and after cleaning."""

    file: File
    encoding: str = ""
    characters: int = 0
    kept: int = 0
    documents: int = 0
    cleaning: dict[str, Tally] = field(default_factory=dict)  # by rule
    skip_reason: str = ""  # why the file, or what is left of it, was left out


def read_documents(
    report: FileReport,
    encoding: str | None = None,
    skip: frozenset[str] = frozenset(),
    simplify: bool = False,
) -> Iterator[Document]:
    """Read, clean and cut a file; one that is no text, or has none left, is refused in its report.

    The report is filled in. `encoding` is Python's name, detected by default; `skip` names
    cleaning rules to leave out; `simplify` turns traditional characters into simplified ones.

    Raises `DataError` naming file and line, where a line of JSONL is not an object with a `text`.
    """
    file, lines = report.file, 0
    jsonl = file.path.suffix.lower() == ".jsonl"
    if jsonl or file.source == "general":
        skip |= NOVELS_ONLY | ({"spaces", "blank_lines"} if jsonl else set())
    try:
        for block in read_blocks(file.path, encoding, BLOCK):
            used = [*report.encoding.split("+"), *block.encoding.split("+")]
            report.encoding = "+".join(dict.fromkeys(filter(None, used)))
            text = block.text
            texts = _records(text, report, skip, lines) if jsonl else _parts(text, report, skip)
            for name, part in texts:
                report.documents += 1
                part = to_simplified(part) if simplify else part
                yield Document(file.source, file.book, name, part)
            lines += text.count("\n")
    except CorpusError as error:
        report.skip_reason = str(error)
    if not report.documents:
        report.skip_reason = report.skip_reason or _nothing_left(report)


def _cleaned(text: str, report: FileReport, skip: frozenset[str]) -> str:
    """Clean a text and put that into the report."""
    cleaned, tallies = clean(text, skip)
    report.characters += len(text)
    report.kept += len(cleaned)
    for tally in tallies:
        report.cleaning.setdefault(tally.rule, Tally(tally.rule)).add(tally)
    return cleaned


def _parts(text: str, report: FileReport, skip: frozenset[str]) -> list[tuple[str, str]]:
    """Clean a text and cut it into chapters, or into passages where it is general text."""
    text = _with_breaks(_cleaned(text, report, skip), report.file.path)
    if len(text) < SHORTEST:
        return []
    return split_chapters(text) if report.file.source == "wuxia" else passages(text, PASSAGE)


def _with_breaks(text: str, path: Path) -> str:
    """Break lines that no window or tokenizer could hold, after a sentence's end."""
    lines = text.split("\n")
    if long := sum(len(line) > LONGEST_LINE for line in lines):
        logger.warning("%s: %d lines are over %d characters, cut", path, long, LONGEST_LINE)
    return "\n".join(LONG.sub(r"\1\n", x) if len(x) > LONGEST_LINE else x for x in lines)


def _nothing_left(report: FileReport) -> str:
    left = f"{report.kept} of {report.characters} characters are left"
    rules = sorted(report.cleaning.values(), key=lambda tally: tally.inserted - tally.removed)
    most = f", most removed by the rule {rules[0].rule}" if rules else ""
    return f"{report.file.path}: {left} after cleaning{most}; nothing to train on"


def _records(
    text: str, report: FileReport, skip: frozenset[str], lines: int
) -> Iterator[tuple[str, str]]:
    """Read the `text` of each line of JSONL; `lines` stand before them in the file."""
    for number, line in enumerate(text.split("\n"), lines + 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)["text"]
            value.encode("utf-8")  # fails at half a character (a lone surrogate)
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            place = f"{report.file.path}:{number}"
            raise DataError(f'{place}: must be an object like {{"text": "…"}} ({error})') from None
        if cleaned := _cleaned(value, report, skip):
            yield str(number), cleaned
