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
from wuxia_core.text import name_some, visible

logger = logging.getLogger(__name__)
_warn = functools.cache(logger.warning)  # once a text: a launch lists the folder again and again

# Files.
OWN_FOLDERS = {"sample", "tiny_base", "mixed"}  # of this project; no novels of the user's in them
OWN = "called like a folder of this project; rename it, or name it in data_dir"
# Names of files that are left out without a warning; those that begin with `._` come from macOS.
IGNORED = re.compile(r"^\._|^lexicon\.txt$|\.(?:ya?ml|json|npy|parquet|py|ipynb)$")
# What the user may do with a file that is not read, by its kind.
ADVICE = {kind: advice for advice, kinds in (
    ("convert it with Calibre to .epub or .txt",
     ".mobi .azw .azw3 .azw4 .kfx .prc .pdb .pdf .chm .fb2 .lit .djvu .umd .caj"),
    ("unpack it", ".rar .7z .gz .tgz .tar .bz2 .xz"),
    ("save it as .docx or .txt", ".doc .rtf .odt .wps"),
    ("if it is general text, name it as --general or data.general_file", ".jsonl"),
) for kind in kinds.split()}  # fmt: skip
OTHER = "if it is a book, save it as .txt"
# A file is no novel if this occurs in its path below `data_dir`, which is made lower case first.
GENERAL = re.compile("(?<![a-z])general(?![a-z])|wiki|baike|通用|维基|百科|语料")
NO_NOVEL = "called like general text; name it as --general or data.general_file, or rename it"
NOT_UTF8 = "its name is not UTF-8; rename it, or set PYTHONUTF8=1"
BLOCK = 32_000_000  # bytes read at a time

# Documents, in characters.
PASSAGE = 200  # lines of general text are gathered into a document until it has this length
SHORTEST = 20  # a block of text that is shorter after cleaning gives no document
LONG_LINE = re.compile("^.{6001,}", re.MULTILINE)  # no window or tokenizer could hold it
# A piece of a long line, which more text must follow. It ends at the first end of a sentence behind
# 3,000 characters; if there is none before 6,000 characters, it ends there.
PIECE = re.compile("(.{3000,5999}?[。！？!?]|.{6000})(?=.)")


@dataclass(frozen=True)
class File:
    """A file, or a member of an archive, that is read or left out."""

    path: Path  # path of the file or of the archive
    source: str  # "wuxia", "general", or "" if the file is left out
    book: str  # the book to which the file's documents belong; "" if the file is left out
    # The path below `data_dir`, or, of a file that is elsewhere, the path's last part; followed by
    # the member's name in an archive: `合集.zip/书.txt`.
    name: str
    member: str = ""  # name in the archive; "" for a file
    left_out: str = ""  # why it is left out; "" for a file that is read

    @property
    def place(self) -> Path:
        """The path, followed by the member's name if there is one."""
        return Path(self.path, self.member)


def find_files(
    data_dir: Path, general: Path | None, novels: Path | None = None, lexicon: Path | None = None
) -> list[File]:
    """List the novels, then the general text, then the files that are left out, each by path.

    Novels are the files below `data_dir` or, in place of them all, the JSONL `novels`. General text
    is the file or folder `general`, and any general.txt below `data_dir`. A lexicon (`lexicon`, or
    a file called lexicon.txt) is not listed. A file below `data_dir` that is called like general
    text, such as wiki.txt, is left out. A novel's `book` is its `name` without the suffix, that of
    a general text is the stem of its path. If two files of one source would have the same `book`,
    the later one is numbered, `书 (2)`.

    Logs a warning of the files that are left out. Raises `DataError` if `data_dir` is no folder
    that can be read, if there is no novel, or if nothing in `general` can be read.
    """
    listed = _list_paths(data_dir) if data_dir.is_dir() else [data_dir]
    if data_dir in listed:
        reason = "no such folder, or it cannot be read; novels are .txt files in one"
        raise DataError(f"data.data_dir {data_dir}: {reason}")
    not_novels = [os.path.realpath(path) for path in (general, lexicon) if path]
    real = {path: Path(os.path.realpath(path)) for path in listed}
    paths = [path for path in real if not any(map(real[path].is_relative_to, not_novels))]
    # All files in a folder of OWN_FOLDERS give equal entries, of which `fromkeys` keeps one.
    files = list(dict.fromkeys(file for path in paths for file in _look_into(path, data_dir)))
    if novels:
        files = [file for file in files if file.source == "general"]
        files += _look_into(novels, data_dir, "wuxia", ".jsonl")
    _require(files, "wuxia", f"data.data_dir {data_dir}: no novel in it; put .txt files there")
    if general is not None:
        # If `general` is a file, it is read whatever its suffix is.
        suffix = general.suffix.lower() if general.is_file() else ".jsonl"
        options = (data_dir, "general", ".jsonl", suffix)
        paths = [general] if general.is_file() else _list_paths(general)
        more = [file for path in paths for file in _look_into(path, *options)]
        _require(more, "general", f"data.general_file {general}: no .txt or .jsonl file there")
        files += more
    files.sort(key=lambda file: file.place)
    by_source = {x: [file for file in files if file.source == x] for x in ("wuxia", "general", "")}
    return [*_name_books(by_source["wuxia"]), *_name_books(by_source["general"]), *by_source[""]]


def _require(files: list[File], source: str, message: str) -> None:
    """Raise `DataError` with `message` if no file is of `source`; warn of the files left out.

    There is a warning for each reason to leave files out, with the names of three files at most. If
    the error is raised, the warnings are not logged but stand below `message` in the error.
    """
    warnings = []
    for reason in dict.fromkeys(file.left_out for file in files if file.left_out):
        names = [file.name for file in files if file.left_out == reason]
        warnings.append(visible(f"{name_some(names)}: {reason}"))
    if not any(file.source == source for file in files):
        raise DataError("\n".join([message, *warnings]))
    for warning in warnings:
        _warn(f"left out: {warning}")


def _name_books(files: list[File]) -> Iterator[File]:
    """Yield the files of one source with their `book`: `书`, or `书 (2)` if `书` is taken.

    Logs a warning for each file whose first choice is taken.
    """
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
    """List the files below a folder, and the folders that cannot be read, by path.

    Links are followed, but a folder that links reach a second time is listed only once. Folders
    whose name begins with a dot are not listed.
    """
    paths: list[Path] = []
    listed: set[str] = set()  # real paths of folders
    errors: list[OSError] = []
    for parent, folders, names in os.walk(folder, onerror=errors.append, followlinks=True):
        real = os.path.realpath(parent)
        # os.walk visits only the folders that stay in its list `folders`.
        folders[:] = sorted(x for x in folders if real not in listed and not x.startswith("."))
        paths += [Path(parent, name) for name in names if real not in listed]
        listed.add(real)
    return sorted(paths + [Path(error.filename) for error in errors])


def _look_into(path: Path, root: Path, source: str = "", *also_read: str) -> Iterator[File]:
    """Yield a file, or the members of a .zip, each with its source or the reason to leave it out.

    The `name` of each is the path from `root`, or the path's last part if it is not below `root`.
    What cannot be read, and a readme.md, is left out. Without a `source`, so is a file in one of
    `OWN_FOLDERS` (the entry is the folder) or called like general text, except a general.txt, which
    is general text. Any other file is of `source` or, without it, a novel. `also_read` are suffixes
    that are read besides `READABLE`. A file whose name `IGNORED` matches is not yielded, nor is a
    hidden file that is left out.
    """
    inside = path.relative_to(root) if path.is_relative_to(root) else Path(path.name)
    if not source and inside.parts[0] in OWN_FOLDERS:
        yield File(root / inside.parts[0], "", "", inside.parts[0], left_out=OWN)
        return
    for member, kind, reason in contents(path):
        # If a name is not valid UTF-8, its invalid bytes become escapes, such as \udcff.
        name = str(inside / member).encode("utf-8", "backslashreplace").decode()
        last_part = PurePath(name).name.lower()
        if kind not in {*READABLE, *also_read}:
            reason = reason or f"{kind or 'no suffix'}: not read; {ADVICE.get(kind, OTHER)}"
        reason = reason if name == str(inside / member) else NOT_UTF8
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
    chapter: str  # the chapter's heading; or a number, of a general passage or a line of JSONL
    text: str


@dataclass
class FileReport:
    """What was found and done while a file was read; `read_documents` fills it in."""

    file: File
    encoding: str = ""  # name of the encoding; of several the names, joined by +
    characters: int = 0  # number of characters before cleaning
    kept: int = 0  # number of characters after cleaning
    documents: int = 0  # number of documents
    broken: int = 0  # number of �, which stand for bytes that cannot be decoded
    notes: list[str] = field(default_factory=list)  # see `chapter_notes`
    cleaning: dict[str, Tally] = field(default_factory=dict)  # what each rule did, by its name
    skip_reason: str = ""  # why the file, or the rest of it, is left out


def read_documents(
    report: FileReport,
    encoding: str | None = None,
    skip: frozenset[str] = OFF,
    simplify: bool = False,
) -> Iterator[Document]:
    """Read the file of a report, clean it, yield its documents, and fill in the report.

    `encoding` is the name of the file's encoding; by default the encoding is detected. `skip` names
    cleaning rules to leave out; general text and JSONL go without rules for novels only, too.
    With `simplify` documents in traditional characters become simplified, see `to_simplified`. The
    report gets a `skip_reason` if the file, or the rest of it, cannot be read as text, or if no
    text is left after cleaning. A file that is `left_out` is not read.

    Raises `DataError` naming file and line if a line of JSONL is not an object with a `text`.
    """
    file, lines_read = report.file, 0
    is_jsonl = file.place.suffix.lower() == ".jsonl"
    if is_jsonl or file.source == "general":
        skip |= NOVELS_ONLY
    if is_jsonl:  # whoever made the JSONL has decided on spaces and blank lines
        skip |= {"spaces", "blank_lines"}
    blocks = () if file.left_out else read(file.path, file.member, encoding, BLOCK)
    try:
        for block in blocks:
            encodings = [*report.encoding.split("+"), *block.encoding.split("+")]
            report.encoding = "+".join(dict.fromkeys(filter(None, encodings)))
            report.broken += block.text.count("\ufffd")
            options = (block.text, report, skip)
            parts = _records(*options, lines_read) if is_jsonl else _parts(*options)
            for name, text in parts:
                report.documents += 1
                text = to_simplified(text) if simplify else text
                yield Document(file.source, file.book, name, text)
            lines_read += block.text.count("\n")
    except CorpusError as error:
        report.skip_reason = str(error)
    if not report.documents and not file.left_out:
        report.skip_reason = report.skip_reason or _nothing_left(report)


def _clean_and_count(text: str, report: FileReport, skip: frozenset[str]) -> str:
    """Return a text cleaned; add its numbers of characters and the rules' tallies to the report."""
    cleaned, tallies = clean(text, skip)
    report.characters += len(text)
    report.kept += len(cleaned)
    for tally in tallies:
        report.cleaning.setdefault(tally.rule, Tally(tally.rule)).add(tally)
    return cleaned


def _parts(text: str, report: FileReport, skip: frozenset[str]) -> list[tuple[str, str]]:
    """Clean a text and cut it into parts, `(heading, text)`; general text has numbers as headings.

    After cleaning, lines of more than 6,000 characters are broken, with a warning; a text of less
    than 20 characters then gives no part. Adds counts, and notes on chapters, to the report.
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
    """Return a message for the user: why a file of which cleaning left no document is skipped."""
    rest = f"{report.kept} of {report.characters} characters are left, and a book has {SHORTEST}"
    # The rule that removed most comes first.
    rules = sorted(report.cleaning.values(), key=lambda tally: tally.inserted - tally.removed)
    main_rule = f", most removed by the rule {rules[0].rule}" if rules else ""
    return f"{report.file.place}: after cleaning {rest}{main_rule}; nothing to train on"


def _records(
    block: str, report: FileReport, skip: frozenset[str], lines_before: int
) -> Iterator[tuple[str, str]]:
    """Clean the `text` of each line of JSONL, and yield `(number of the line, text)`.

    `block` has whole lines of the file; `lines_before` is the number of lines before the block.
    Blank lines, and lines of which cleaning leaves nothing, are skipped. Raises `DataError`, naming
    file and line, if a line is not a JSON object with a `text` that is a string.
    """
    for number, line in enumerate(block.split("\n"), lines_before + 1):
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
