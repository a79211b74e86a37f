"""From files to documents: find the files, decode them, clean and cut what they hold.

Which files are novels and which general text is decided here, and never by what they say.
"""

import json
import logging
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain, count
from pathlib import Path
from typing import NamedTuple

from wuxia_core.corpus.chapters import passages, split_chapters
from wuxia_core.corpus.cleaning import NOVELS_ONLY, Tally, clean
from wuxia_core.corpus.encodings import read_blocks
from wuxia_core.corpus.overlap import to_simplified
from wuxia_core.errors import CorpusError, DataError

logger = logging.getLogger(__name__)

# Files.
NO_NOVELS = {"general.txt", "lexicon.txt"}
OWN_FOLDERS = {"sample", "tiny_base", "mixed"}  # below data_dir they are not the user's novels
BLOCK = 32_000_000  # bytes read at a time

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
