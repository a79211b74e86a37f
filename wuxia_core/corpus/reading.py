"""From files to documents: find the files, decode them, clean and cut what they hold.

Which files are novels and which general text is decided here, and never by what they say.
"""

import functools
import json
import logging
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import chain, count
from pathlib import Path, PurePath
from typing import NamedTuple

from wuxia_core.corpus.chapters import chapter_notes, passages, split_chapters
from wuxia_core.corpus.cleaning import NOVELS_ONLY, OFF, Tally, clean
from wuxia_core.corpus.formats import READ, contents, read
from wuxia_core.corpus.overlap import to_simplified
from wuxia_core.errors import CorpusError, DataError
from wuxia_core.text import visible

logger = logging.getLogger(__name__)
_warn = functools.cache(logger.warning)  # once: a launch looks at the folder again and again

# Files.
OWN_FOLDERS = {"sample", "tiny_base", "mixed"}  # below data_dir they are not the user's novels
OWN = "called like a folder of this project; rename it, or name it in data_dir"
# Silently; `._` are what macOS leaves behind.
IGNORED = re.compile(r"^\._|^lexicon\.txt$|\.(?:ya?ml|json|npy|parquet|py|ipynb)$")
ADVICE = {kind: what for what, kinds in (
    ("convert it with Calibre to .epub or .txt",
     ".mobi .azw .azw3 .azw4 .kfx .prc .pdb .pdf .chm .fb2 .lit .djvu .umd .caj"),
    ("unpack it", ".rar .7z .gz .tgz .tar .bz2 .xz"),
    ("save it as .docx or .txt", ".doc .rtf .odt .wps"),
    ("if it is general text, name it as --general or data.general_file", ".jsonl"),
) for kind in kinds.split()}  # fmt: skip
UNKNOWN = "if it is a book, save it as .txt"
GENERAL = re.compile("(?<![a-z])general(?![a-z])|wiki|baike|通用|维基|百科|语料")  # in a name
NO_NOVEL = "called like general text; name it as --general or data.general_file, or rename it"
SHOWN = 3  # names in a warning
BLOCK = 32_000_000  # bytes read at a time

# Documents, in characters.
PASSAGE = 200  # shorter lines of general text are gathered up to this length
SHORTEST = 20  # less than that is no book
LONG = re.compile("^.{6001,}", re.MULTILINE)  # lines that no window or tokenizer could hold
PIECE = re.compile("(.{3000,5999}?[。！？!?]|.{6000})(?=.)")  # of one, up to a sentence's end


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

    Neither a lexicon nor a file called general.txt or lexicon.txt is a novel; one that is called
    like general text, such as wiki.txt, is left out.

    `novels` is a JSONL that stands in for the novels. A novel's `book` is its name without the
    suffix, a general text's is its stem; where two would have the same, the later is numbered.

    Raises `DataError` where there is no novel, or nothing to read in `general`.
    """
    if not data_dir.is_dir():
        raise DataError(f"data.data_dir {data_dir}: no such folder; novels are .txt files in one")
    named = [os.path.realpath(path) for path in (general, lexicon) if path]
    real = {path: Path(os.path.realpath(path)) for path in _below(data_dir)}
    paths = [path for path in real if not any(map(real[path].is_relative_to, named))]
    found = list(dict.fromkeys(file for path in paths for file in _look_into(path, data_dir)))
    if novels:
        found = [file for file in found if file.source == "general"]
        found += _look_into(novels, data_dir, "wuxia", ".jsonl")
    _check(found, "wuxia", f"data.data_dir {data_dir}: no novel in it; put .txt files there")
    if general is not None:
        also = (data_dir, "general", ".jsonl", general.suffix.lower())
        paths = [general] if general.is_file() else _below(general)
        more = [file for path in paths for file in _look_into(path, *also)]
        _check(more, "general", f"data.general_file {general}: no .txt or .jsonl file there")
        found += more
    found.sort(key=lambda file: file.place)
    by_source = {x: [file for file in found if file.source == x] for x in ("wuxia", "general", "")}
    return [*_named(by_source["wuxia"]), *_named(by_source["general"]), *by_source[""]]


def _check(found: list[File], source: str, none: str) -> None:
    """Say what is left out, a line a reason; raise `DataError` where nothing is of a source."""
    reasons = []
    for why in dict.fromkeys(file.left_out for file in found if file.left_out):
        names = [file.name for file in found if file.left_out == why]
        more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
        reasons.append(visible(f"{', '.join(names[:SHOWN])}{more}: {why}"))
    if not any(file.source == source for file in found):
        raise DataError("\n".join([none, *reasons]))
    for reason in reasons:
        _warn(f"left out: {reason}")


def _named(files: list[File]) -> Iterator[File]:
    """Give the files of a source the names of their books; one that is taken gets a number."""
    taken: set[str] = set()
    for file in files:
        path = PurePath(file.place.name if file.source == "general" else file.name)
        title = str(path.with_suffix(""))
        names = chain([title], (f"{title} ({number})" for number in count(2)))
        book = next(name for name in names if name not in taken)
        taken.add(book)
        if book != title:
            _warn(f"{file.place}: another file is called {title} too; this is {book}")
        yield replace(file, book=book)


def _below(folder: Path) -> list[Path]:
    """List the files below a folder, linked folders once, and the folders that cannot be read."""
    found: list[Path] = []
    seen: set[str] = set()
    errors: list[OSError] = []
    for parent, folders, names in os.walk(folder, onerror=errors.append, followlinks=True):
        real = os.path.realpath(parent)
        folders[:] = sorted(x for x in folders if real not in seen and not x.startswith("."))
        found += [Path(parent, name) for name in names if real not in seen]
        seen.add(real)
    return sorted(found + [Path(error.filename) for error in errors])


def _look_into(path: Path, root: Path, source: str = "", *also: str) -> Iterator[File]:
    """Tell what a file or an archive holds: as what it is read, or why it is not.

    Kinds in `also` are read too; without a `source` it goes by the name.
    """
    inside = path.relative_to(root) if path.is_relative_to(root) else Path(path.name)
    if not source and inside.parts[0] in OWN_FOLDERS:
        yield File(root / inside.parts[0], "", "", inside.parts[0], left_out=OWN)
        return
    for member, kind, wrong in contents(path):
        name = str(inside / member).encode("utf-8", "backslashreplace").decode()
        last = PurePath(name).name.lower()
        if kind not in {*READ, *also}:
            wrong = wrong or f"{kind or 'no suffix'}: not read; {ADVICE.get(kind, UNKNOWN)}"
        wrong = wrong if name == str(inside / member) else "its name is not UTF-8; rename it"
        wrong = "describes a folder" if last == "readme.md" else wrong
        if not (wrong or source or last == "general.txt") and GENERAL.search(name.lower()):
            wrong = NO_NOVEL
        if not (IGNORED.search(last) or (wrong and last[0] == ".")):
            what = source or ("general" if last == "general.txt" else "wuxia")
            yield File(path, "" if wrong else what, "", name, member, wrong)


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
    broken: int = 0  # characters that cannot be decoded
    notes: list[str] = field(default_factory=list)  # what is odd
    cleaning: dict[str, Tally] = field(default_factory=dict)  # by rule
    skip_reason: str = ""  # why the file, or what is left of it, was left out


def read_documents(
    report: FileReport,
    encoding: str | None = None,
    skip: frozenset[str] = OFF,
    simplify: bool = False,
) -> Iterator[Document]:
    """Read, clean and cut a file; one that is no text, or has none left, is refused in its report.

    The report is filled in; of a file that was left out nothing is read. `encoding` is its
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
            text = block.text
            texts = _records(text, report, skip, lines) if jsonl else _parts(text, report, skip)
            for name, part in texts:
                report.documents += 1
                part = to_simplified(part) if simplify else part
                yield Document(file.source, file.book, name, part)
            lines += text.count("\n")
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


def _parts(text: str, report: FileReport, skip: frozenset[str]) -> list[tuple[str, str]]:
    """Clean a text and cut it into chapters, or into passages where it is general text."""
    text, long = LONG.subn(lambda line: PIECE.sub(r"\1\n", line[0]), _cleaned(text, report, skip))
    if long:
        what = "lines of over 6,000 characters, cut behind sentences; nothing is lost"
        logger.warning("%s: %d %s", report.file.place, long, what)
    if len(text) < SHORTEST:
        return []
    if report.file.source == "general":
        return passages(text, PASSAGE)
    parts = split_chapters(text)
    report.notes += chapter_notes(parts)
    return parts


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
