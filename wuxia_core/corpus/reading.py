"""From files to documents: find the files, decode them, clean and cut the texts in them.

Which files are novels and which general text is decided here, by place and name, never by content.
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
from wuxia_core.corpus.formats import READABLE, contents, read
from wuxia_core.corpus.overlap import to_simplified
from wuxia_core.errors import CorpusError, DataError
from wuxia_core.text import visible

logger = logging.getLogger(__name__)
_warn = functools.cache(logger.warning)  # once a text: a launch lists the folder again and again

# Files.
OWN_FOLDERS = {"sample", "tiny_base", "mixed"}  # of this project: no novels of the user's
OWN = "called like a folder of this project; rename it, or name it in data_dir"
# Names of files that are left out silently; those that begin with `._` macOS leaves behind.
IGNORED = re.compile(r"^\._|^lexicon\.txt$|\.(?:ya?ml|json|npy|parquet|py|ipynb)$")
# What the user may do, by kind of file.
ADVICE = {kind: advice for advice, kinds in (
    ("convert it with Calibre to .epub or .txt",
     ".mobi .azw .azw3 .azw4 .kfx .prc .pdb .pdf .chm .fb2 .lit .djvu .umd .caj"),
    ("unpack it", ".rar .7z .gz .tgz .tar .bz2 .xz"),
    ("save it as .docx or .txt", ".doc .rtf .odt .wps"),
    ("if it is general text, name it as --general or data.general_file", ".jsonl"),
) for kind in kinds.split()}  # fmt: skip
OTHER = "if it is a book, save it as .txt"
GENERAL = re.compile("(?<![a-z])general(?![a-z])|wiki|baike|通用|维基|百科|语料")  # in a name
NO_NOVEL = "called like general text; name it as --general or data.general_file, or rename it"
NAMES_SHOWN = 3  # in a warning
BLOCK = 32_000_000  # bytes read at a time

# Documents, in characters.
PASSAGE = 200  # shorter lines of general text are gathered up to this length
SHORTEST = 20  # a shorter text is no book
LONG_LINE = re.compile("^.{6001,}", re.MULTILINE)  # no window or tokenizer could hold it
PIECE = re.compile("(.{3000,5999}?[。！？!?]|.{6000})(?=.)")  # of it, up to a sentence's end


@dataclass(frozen=True)
class File:
    """A file, or a member of an archive, that is read or left out."""

    path: Path  # of the file or the archive
    source: str  # "wuxia", "general", or "" where the file is left out
    book: str  # name of the book, under which the file's documents go
    # The path below `data_dir`, or the last part of a path elsewhere, with the member of an
    # archive: `合集.zip/书.txt`.
    name: str
    member: str = ""  # name in the archive; "" for a file
    left_out: str = ""  # the reason; "" for a file that is read

    @property
    def place(self) -> Path:
        """The path, followed by the member's name where the path is an archive."""
        return Path(self.path, self.member)


def find_files(
    data_dir: Path, general: Path | None, novels: Path | None = None, lexicon: Path | None = None
) -> list[File]:
    """List the novels, then the general text, then the files that are left out, each by path.

    Novels are the files below `data_dir`, or `novels`, a JSONL that stands in for them. General
    text is the file or folder `general`, and any file called general.txt. A lexicon is no novel
    (`lexicon`, or a file called lexicon.txt); a file that is called like general text, such as
    wiki.txt, is left out. A novel's `book` is its name without the suffix, a general text's is its
    stem; where two would have the same, the later is numbered.

    Raises `DataError` where there is no novel, or nothing to read in `general`.
    """
    if not data_dir.is_dir():
        raise DataError(f"data.data_dir {data_dir}: no such folder; novels are .txt files in one")
    not_novels = [os.path.realpath(path) for path in (general, lexicon) if path]
    real = {path: Path(os.path.realpath(path)) for path in _list_paths(data_dir)}
    paths = [path for path in real if not any(map(real[path].is_relative_to, not_novels))]
    files = list(dict.fromkeys(file for path in paths for file in _look_into(path, data_dir)))
    if novels:
        files = [file for file in files if file.source == "general"]
        files += _look_into(novels, data_dir, "wuxia", ".jsonl")
    _check(files, "wuxia", f"data.data_dir {data_dir}: no novel in it; put .txt files there")
    if general is not None:
        options = (data_dir, "general", ".jsonl", general.suffix.lower())
        paths = [general] if general.is_file() else _list_paths(general)
        more = [file for path in paths for file in _look_into(path, *options)]
        _check(more, "general", f"data.general_file {general}: no .txt or .jsonl file there")
        files += more
    files.sort(key=lambda file: file.place)
    by_source = {x: [file for file in files if file.source == x] for x in ("wuxia", "general", "")}
    return [*_name_books(by_source["wuxia"]), *_name_books(by_source["general"]), *by_source[""]]


def _check(files: list[File], source: str, message: str) -> None:
    """Warn of the files that are left out, once for each reason.

    Raises `DataError` with the message and the reasons where no file is of the source.
    """
    warnings = []
    for reason in dict.fromkeys(file.left_out for file in files if file.left_out):
        names = [file.name for file in files if file.left_out == reason]
        more = f" and {len(names) - NAMES_SHOWN} more" if len(names) > NAMES_SHOWN else ""
        warnings.append(visible(f"{', '.join(names[:NAMES_SHOWN])}{more}: {reason}"))
    if not any(file.source == source for file in files):
        raise DataError("\n".join([message, *warnings]))
    for warning in warnings:
        _warn(f"left out: {warning}")


def _name_books(files: list[File]) -> Iterator[File]:
    """Give each file of a source the name of its book; a name that is taken gets a number."""
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


def _list_paths(folder: Path) -> list[Path]:
    """List the files below a folder, and the folders that cannot be read.

    A folder that links lead to again is listed once; folders that begin with a dot are passed over.
    """
    paths: list[Path] = []
    listed: set[str] = set()  # real paths of folders
    errors: list[OSError] = []
    for parent, folders, names in os.walk(folder, onerror=errors.append, followlinks=True):
        real = os.path.realpath(parent)
        # os.walk goes on into the folders that are left in its list.
        folders[:] = sorted(x for x in folders if real not in listed and not x.startswith("."))
        paths += [Path(parent, name) for name in names if real not in listed]
        listed.add(real)
    return sorted(paths + [Path(error.filename) for error in errors])


def _look_into(path: Path, root: Path, source: str = "", *also_read: str) -> Iterator[File]:
    """Yield a file, or the members of an archive, with the source or the reason to leave it out.

    A file below `root` is named by its path from there. Without a `source` the file's name tells
    it. `also_read` are suffixes that are read besides the usual ones.
    """
    inside = path.relative_to(root) if path.is_relative_to(root) else Path(path.name)
    if not source and inside.parts[0] in OWN_FOLDERS:
        yield File(root / inside.parts[0], "", "", inside.parts[0], left_out=OWN)
        return
    for member, kind, reason in contents(path):
        name = str(inside / member).encode("utf-8", "backslashreplace").decode()
        last_part = PurePath(name).name.lower()
        if kind not in {*READABLE, *also_read}:
            reason = reason or f"{kind or 'no suffix'}: not read; {ADVICE.get(kind, OTHER)}"
        reason = reason if name == str(inside / member) else "its name is not UTF-8; rename it"
        reason = "describes a folder" if last_part == "readme.md" else reason
        if not (reason or source or last_part == "general.txt") and GENERAL.search(name.lower()):
            reason = NO_NOVEL
        if not (IGNORED.search(last_part) or (reason and last_part[0] == ".")):
            file_source = source or ("general" if last_part == "general.txt" else "wuxia")
            yield File(path, "" if reason else file_source, "", name, member, reason)


class Document(NamedTuple):
    """A chapter of a novel, or one general text: the unit of the split and of every statistic."""

    source: str  # "wuxia" or "general"
    book: str  # the file's `book`
    chapter: str  # its heading, or a number in general text
    text: str


@dataclass
class FileReport:
    """What was found and done while a file was read; filled in by `read_documents`."""

    file: File
    encoding: str = ""  # or several, joined by +
    characters: int = 0  # before cleaning
    kept: int = 0  # characters after cleaning
    documents: int = 0  # number of documents
    broken: int = 0  # number of characters that cannot be decoded
    notes: list[str] = field(default_factory=list)  # see `chapter_notes`
    cleaning: dict[str, Tally] = field(default_factory=dict)  # by name of the rule
    skip_reason: str = ""  # why the file, or the rest of it, is left out


def read_documents(
    report: FileReport,
    encoding: str | None = None,
    skip: frozenset[str] = OFF,
    simplify: bool = False,
) -> Iterator[Document]:
    """Read, clean and cut the file of a report into documents, and fill in the report.

    `encoding` is the name of the file's encoding, detected by default; `skip` names cleaning rules
    to leave out; `simplify` turns traditional characters into simplified ones. A file that is no
    text, or has none left after cleaning, gets a `skip_reason`; one that was left out is not read.

    Raises `DataError` naming file and line where a line of JSONL is not an object with a `text`.
    """
    file, lines_read = report.file, 0
    is_jsonl = file.place.suffix.lower() == ".jsonl"
    if is_jsonl or file.source == "general":
        skip |= NOVELS_ONLY | ({"spaces", "blank_lines"} if is_jsonl else set())
    try:
        for block in () if file.left_out else read(file.path, file.member, encoding, BLOCK):
            encodings = [*report.encoding.split("+"), *block.encoding.split("+")]
            report.encoding = "+".join(dict.fromkeys(filter(None, encodings)))
            report.broken += block.text.count("\ufffd")
            read_parts = (
                functools.partial(_records, lines_before=lines_read) if is_jsonl else _parts
            )
            for name, text in read_parts(block.text, report, skip):
                report.documents += 1
                text = to_simplified(text) if simplify else text
                yield Document(file.source, file.book, name, text)
            lines_read += block.text.count("\n")
    except CorpusError as error:
        report.skip_reason = str(error)
    if not report.documents and not file.left_out:
        report.skip_reason = report.skip_reason or _nothing_left(report)


def _clean_and_count(text: str, report: FileReport, skip: frozenset[str]) -> str:
    """Clean a text, and add the characters and the tallies of its cleaning to the report."""
    cleaned, tallies = clean(text, skip)
    report.characters += len(text)
    report.kept += len(cleaned)
    for tally in tallies:
        report.cleaning.setdefault(tally.rule, Tally(tally.rule)).add(tally)
    return cleaned


def _parts(text: str, report: FileReport, skip: frozenset[str]) -> list[tuple[str, str]]:
    """Clean a text and cut it into parts, `(heading, text)`; general text has numbers as headings.

    Lines of more than 6,000 characters are cut before, and the notes on chapters go to the report.
    """
    text = _clean_and_count(text, report, skip)
    text, long_lines = LONG_LINE.subn(lambda line: PIECE.sub(r"\1\n", line[0]), text)
    if long_lines:
        note = "lines of over 6,000 characters, cut behind sentences; nothing is lost"
        logger.warning("%s: %d %s", report.file.place, long_lines, note)
    if len(text) < SHORTEST:
        return []
    if report.file.source == "general":
        return passages(text, PASSAGE)
    parts = split_chapters(text)
    report.notes += chapter_notes(parts)
    return parts


def _nothing_left(report: FileReport) -> str:
    """Write the reason to skip a file of which cleaning left no document."""
    rest = f"{report.kept} of {report.characters} characters are left"
    rules = sorted(report.cleaning.values(), key=lambda tally: tally.inserted - tally.removed)
    main_rule = f", most removed by the rule {rules[0].rule}" if rules else ""
    return f"{report.file.place}: {rest} after cleaning{main_rule}; nothing to train on"


def _records(
    text: str, report: FileReport, skip: frozenset[str], lines_before: int
) -> Iterator[tuple[str, str]]:
    """Clean the `text` of each line of JSONL, and yield `(number of the line, text)`.

    `lines_before` is the number of the file's lines before this block. Raises as `read_documents`.
    """
    for number, line in enumerate(text.split("\n"), lines_before + 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)["text"]
            value.encode("utf-8")  # fails at half a character (a lone surrogate)
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            place = f"{report.file.place}:{number}"
            raise DataError(f'{place}: must be an object like {{"text": "…"}} ({error})') from None
        if cleaned := _clean_and_count(value, report, skip):
            yield str(number), cleaned
