"""From files to documents: find the files, decode them, clean and cut what they hold.

Which files are novels and which general text is decided here, and never by what they say.
"""

import json
import logging
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from itertools import chain, count
from pathlib import Path, PurePath
from typing import NamedTuple

from wuxia_core.corpus.chapters import passages, split_chapters
from wuxia_core.corpus.cleaning import NOVELS_ONLY, Tally, clean
from wuxia_core.corpus.formats import ADVICE, READ, Text, contents, read, squeeze
from wuxia_core.corpus.overlap import to_simplified
from wuxia_core.errors import CorpusError, DataError
from wuxia_core.text import visible

logger = logging.getLogger(__name__)

# Files.
OWN_FOLDERS = {"sample", "tiny_base", "mixed"}  # below data_dir they are not the user's novels
NO_BOOKS = {"readme.md": "describes a folder"}
# Silently; `._` are what macOS leaves behind.
IGNORED = re.compile(r"^\._|^lexicon\.txt$|\.(?:ya?ml|json|npy|parquet|py|ipynb)$")
UNKNOWN = "if it is a book, save it as .txt"
SHOWN = 3  # names in a warning
WRITTEN = ({"manifest.json", "windows.parquet"}, {"mixture.json", "config.yaml"})  # mixture, run
BLOCK = 32_000_000  # bytes read at a time

# Documents, in characters.
PASSAGE = 200  # shorter lines of general text are gathered up to this length
TOO_LONG = 30_000  # a longer chapter may be several
SHORTEST = 20  # less than that is no book
LONGEST_LINE = 6000  # a longer one is cut at sentence ends
LONG = re.compile(
    rf"(.{{{LONGEST_LINE // 2},{LONGEST_LINE - 1}}}?[。！？!?]|.{{{LONGEST_LINE}}})(?=.)"
)


@dataclass(frozen=True)
class File:
    """A file or a member of an archive: `source` is "wuxia", "general", or "" where it is left out.

    `book` is what its documents go by. `name` is the path below `data_dir`, or the last part of a
    path elsewhere, and goes on into an archive: `合集.zip/书.txt`.
    """

    path: Path
    source: str
    book: str
    name: str
    member: str = ""
    left_out: str = ""  # why

    @property
    def place(self) -> Path:
        """The path, which goes on into an archive."""
        return Path(self.path, self.member)


def find_files(
    data_dir: Path, general: Path | None, novels: Path | None = None, lexicon: Path | None = None
) -> list[File]:
    """List the novels below `data_dir`, the general text and what is left out, each by its path.

    Neither a lexicon nor a file called general.txt or lexicon.txt is a novel.

    `novels` is a JSONL that stands in for the novels. A novel's `book` is its name without the
    suffix, a general text's is its stem; where two would have the same, the later is numbered.

    Raises `DataError` where there is no novel, or nothing to read in `general`.
    """
    if not data_dir.is_dir():
        raise DataError(f"data.data_dir {data_dir}: no such folder; novels are .txt files in one")
    named = [os.path.realpath(path) for path in (general, lexicon) if path]
    found = _look_into(_of_user(data_dir, named), data_dir)
    if novels:
        found = [file for file in found if file.source == "general"]
        found += _look_into({novels: ""}, data_dir, "wuxia", {".jsonl"})
    none = "no novel in it; put .txt files there"
    _refuse_if_none(found, "wuxia", f"data.data_dir {data_dir}: {none}")
    if general is not None:
        paths = {general: ""} if general.is_file() else _below(general)
        more = _look_into(paths, data_dir, "general", {".jsonl", general.suffix.lower()})
        none = "no .txt or .jsonl file there"
        _refuse_if_none(more, "general", f"data.general_file {general}: {none}")
        found += more
    for reason in _reasons(found):
        logger.warning("left out: %s", reason)
    left_out = sorted((file for file in found if file.left_out), key=lambda file: file.name)
    return [*_named(found, "wuxia"), *_named(found, "general"), *left_out]


def _refuse_if_none(found: list[File], source: str, message: str) -> None:
    if not any(file.source == source for file in found):
        raise DataError("\n".join([message, *_reasons(found)]))


def _reasons(found: list[File]) -> Iterator[str]:
    """Say why files are left out, a line a reason."""
    for why in dict.fromkeys(file.left_out for file in found if file.left_out):
        names = [file.name for file in found if file.left_out == why]
        more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
        yield visible(f"{', '.join(names[:SHOWN])}{more}: {why}")


def _named(found: list[File], source: str) -> Iterator[File]:
    """Give the files of a source, each once, with the names of their books."""
    taken: set[str] = set()
    named = {file.place: file for file in found if file.source == source}
    if source == "general":  # one named twice
        named = {Path(os.path.realpath(place)): file for place, file in named.items()}
    for file in sorted(named.values(), key=lambda file: file.place):
        title = PurePath(file.name if source == "wuxia" else file.place.name).with_suffix("")
        yield replace(file, book=_unused(str(title), taken, file.place))


def _unused(title: str, taken: set[str], path: Path) -> str:
    """Put a number behind a title that is taken, and remember what it has become."""
    names = chain([title], (f"{title} ({number})" for number in count(2)))
    name = next(name for name in names if name not in taken)
    if name != title:
        logger.warning("%s: another file is called %s too; this is %s", path, title, name)
    taken.add(name)
    return name


def _of_user(data_dir: Path, named: list[str]) -> dict[Path, str]:
    """List what is below `data_dir`, but not what is named, and the project's own folders whole."""
    found: dict[Path, str] = {}
    for path, fault in _below(data_dir).items():
        top = data_dir / (*path.relative_to(data_dir).parts, "")[0]
        if top.name not in OWN_FOLDERS:
            real = Path(os.path.realpath(path))
            found |= {} if any(map(real.is_relative_to, named)) else {path: fault}
        elif path.suffix.lower() in READ:
            found[top] = "called like a folder of this project; rename it, or name it in data_dir"
    return found


def _below(folder: Path) -> dict[Path, str]:
    """List what is below a folder, and what is wrong with it; a linked folder is entered once."""
    found: dict[Path, str] = {}
    seen: set[str] = set()
    errors: list[OSError] = []
    for parent, folders, names in os.walk(folder, onerror=errors.append, followlinks=True):
        real = os.path.realpath(parent)
        if real in seen or any(files.issubset(names) for files in WRITTEN):
            folders.clear()
        else:
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            found |= {path: _fault(path) for path in (Path(parent, name) for name in names)}
        seen.add(real)
    found |= {Path(error.filename): f"cannot be read ({error.strerror})" for error in errors}
    return dict(sorted(found.items()))


def _fault(path: Path) -> str:
    if not os.path.isfile(path):  # noqa: PTH113 - no error where a folder cannot be entered
        return "a link that leads nowhere or in a circle, or no file at all"
    return "" if _printable(path) == str(path) else "its name is not UTF-8; rename it"


def _printable(path: Path) -> str:
    return str(path).encode("utf-8", "backslashreplace").decode()


def _look_into(
    paths: dict[Path, str], root: Path, source: str = "", also: Iterable[str] = ()
) -> list[File]:
    """Tell what files and archives hold: as what it is read, or why it is not.

    Kinds in `also` are read too; without a `source` it goes by the name.
    """
    files = []
    for path, fault in paths.items():
        inside = path.relative_to(root) if path.is_relative_to(root) else Path(path.name)
        for member, kind, wrong in [("", "", fault)] if fault else contents(path):
            name = _printable(inside / member)
            last = name.rpartition("/")[2].lower()
            if kind not in {*READ, *also} and not wrong:
                wrong = f"{kind or 'no suffix'}: not read; {ADVICE.get(kind, UNKNOWN)}"
            wrong = wrong or NO_BOOKS.get(last, "")
            if not (IGNORED.search(last) or (wrong and last[0] == ".")):
                what = source or ("general" if last == "general.txt" else "wuxia")
                what = "" if wrong else what
                files.append(File(path, what, "", name, member, wrong))
    return files


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
    chapters: int = 0  # documents that have a heading
    broken: int = 0  # characters that cannot be decoded
    notes: list[str] = field(default_factory=list)  # what is odd
    cleaning: dict[str, Tally] = field(default_factory=dict)  # by rule
    skip_reason: str = ""  # why the file, or what is left of it, was left out


def read_documents(
    report: FileReport,
    encoding: str | None = None,
    skip: frozenset[str] = frozenset(),
    simplify: bool = False,
) -> Iterator[Document]:
    """Read, clean and cut a file; one that is no text, or has none left, is refused in its report.

    The report is filled in; of a file that was left out nothing is read. `encoding` is Python's
    name, detected by default; `skip` names cleaning rules to leave out; `simplify` turns
    traditional characters into simplified ones.

    Raises `DataError` naming file and line, where a line of JSONL is not an object with a `text`.
    """
    file, lines = report.file, 0
    jsonl = file.place.suffix.lower() == ".jsonl"
    if jsonl or file.source == "general":
        skip |= NOVELS_ONLY | ({"spaces", "blank_lines"} if jsonl else set())
    try:
        for block in () if file.left_out else read(file.path, file.member, encoding, BLOCK):
            used = [*report.encoding.split("+"), *block.encoding.split("+")]
            report.encoding = "+".join(dict.fromkeys(filter(None, used)))
            report.broken += block.text.count("\ufffd")
            report.notes += block.notes
            records = _records(block.text, report, skip, lines)
            texts = records if jsonl else _parts(block, report, skip)
            for name, part in texts:
                report.documents += 1
                part = to_simplified(part) if simplify else part
                yield Document(file.source, file.book, name, part)
            lines += block.text.count("\n")
    except CorpusError as error:
        report.skip_reason = str(error)
    if not report.documents and not file.left_out:
        report.skip_reason = report.skip_reason or _nothing_left(report)


def _cleaned(text: str, report: FileReport, skip: frozenset[str]) -> str:
    """Clean a text and put that into the report."""
    cleaned, tallies = clean(text, skip)
    report.characters += len(text)
    report.kept += len(cleaned)
    for tally in tallies:
        report.cleaning.setdefault(tally.rule, Tally(tally.rule)).add(tally)
    return cleaned


def _parts(block: Text, report: FileReport, skip: frozenset[str]) -> list[tuple[str, str]]:
    """Clean a text and cut it into chapters, or into passages where it is general text."""
    text = _with_breaks(_cleaned(block.text, report, skip), report.file.place)
    if len(text) < SHORTEST:
        return []
    if report.file.source == "general":
        return passages(text, PASSAGE)
    parts = split_chapters(text)
    titled = _cut_at(block.titles, text)
    if not _have_headings(parts) and len(titled) > 1:
        parts = titled
    report.chapters += len(parts) * _have_headings(parts)
    report.notes += chapter_notes(parts)
    return parts


def _cut_at(titles: frozenset[str], text: str) -> list[tuple[str, str]]:
    """Cut a text at what its format calls titles, unless there is nothing between two."""
    parts: list[list[str]] = [[]]
    for line in text.split("\n"):
        if squeeze(line) in titles and any(squeeze(x) not in titles for x in parts[-1]):
            parts.append([])
        parts[-1].append(line)
    return [(lines[0] if squeeze(lines[0]) in titles else "", "\n".join(lines)) for lines in parts]


def _have_headings(parts: list[tuple[str, str]]) -> bool:
    """Whether parts are chapters; `passages` gives numbers that the text has not."""
    return any(text.startswith(heading) for heading, text in parts if heading)


def chapter_notes(parts: list[tuple[str, str]]) -> list[str]:
    """Say what is odd about a book's chapters: no headings, or some that were not found."""
    if not _have_headings(parts):
        return [f"no headings found, cut into {len(parts)} parts"]
    long = [(name, len(text)) for name, text in parts if len(text) > TOO_LONG]
    return [f"{size:,} characters in {name or 'the part before the first'}" for name, size in long]


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
    return f"{report.file.place}: {left} after cleaning{most}; nothing to train on"


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
            place = f"{report.file.place}:{number}"
            raise DataError(f'{place}: must be an object like {{"text": "…"}} ({error})') from None
        if cleaned := _cleaned(value, report, skip):
            yield str(number), cleaned
