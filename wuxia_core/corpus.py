"""From files to clean documents: find novels, decode them, cut them into chapters.

It does not split, mix or tokenize. A document is a chapter of a novel, or one general text.
"""

import functools
import json
import logging
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from tqdm import tqdm

from wuxia_core.errors import CorpusError, DataError

log = logging.getLogger(__name__)

OWN_FOLDERS = {"sample", "tiny_base", "mixed"}  # below data_dir they are not the user's novels
CANDIDATES = ("gb18030", "cp950", "utf-16-le", "utf-16-be")
BOMS = {b"\xef\xbb\xbf": "utf-8-sig", b"\xff\xfe": "utf-16", b"\xfe\xff": "utf-16"}
MOST_BROKEN = 0.001  # share of characters: more than that undecodable, and it is not this encoding
SECTION = 3000  # characters: length of a part where a book has no chapters
PASSAGE = 200  # characters: shorter lines of general text are gathered up to this length

NUMERAL = "[0-9０-９一二三四五六七八九十百千零〇○两廿卅]+"
HEADING = re.compile(
    rf"^(?:第{NUMERAL}[回章节卷](?![^\s　]*[。！？”]$).{{0,40}}"
    r"|楔子|引首|引子|序|序章|序言|自序|尾声|后记)$",
    re.MULTILINE,
)


@dataclass(frozen=True)
class Book:
    """A file, decoded and not yet cleaned."""

    title: str
    text: str
    path: Path
    encoding: str


@dataclass(frozen=True)
class Document:
    """A chapter, or one general text: the unit of the split and of every statistic."""

    source: str  # "wuxia" or "general"
    book: str
    chapter: str
    text: str


def read_book(path: str | Path, encoding: str | None = None) -> Book:
    """Decode a text file.

    Parameters
    ----------
    path : str or Path
        The file; its stem is the title.
    encoding : str, optional
        Python's name of the encoding; by default it is detected.

    Raises
    ------
    CorpusError
        With `path`, `offset` (byte) and `tried`, where the file cannot be read, is not text, or
        more than 0.1 % of its characters cannot be decoded.
    """
    path = Path(path)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise CorpusError(f"{path}: cannot be read ({error.strerror})", str(path)) from None
    chosen = encoding or _detect(data)
    text = _decode(data, chosen, path)
    return Book(path.stem, text, path, chosen)


def _detect(data: bytes) -> str:
    """Name the encoding: by byte-order mark, as UTF-8, else by common characters."""
    for bom, name in BOMS.items():
        if data.startswith(bom):
            return name
    as_utf8 = data.decode("utf-8", errors="replace")
    if as_utf8.count("\ufffd") <= MOST_BROKEN * len(as_utf8):
        return "utf-8"
    return max(CANDIDATES, key=lambda name: _plausibility(_sample(data), name))


def _sample(data: bytes) -> bytes:
    """Head, middle and tail, cut at multiples of four bytes so that UTF-16 stays in step."""
    part = 16384
    if len(data) <= 3 * part:
        return data
    middle, tail = len(data) // 8 * 4, (len(data) - part) // 4 * 4
    return data[:part] + data[middle : middle + part] + data[tail:]


def _plausibility(sample: bytes, encoding: str) -> float:
    """Share of everyday characters, less five times the share of undecodable ones."""
    text = sample.decode(encoding, errors="replace")
    common = sum(character in _everyday() for character in text)
    return (common - 5 * text.count("\ufffd")) / max(1, len(text))


@functools.cache
def _everyday() -> frozenset[str]:
    """ASCII text, Chinese punctuation and the level-1 characters of GB2312 and Big5."""
    gb = bytes(b for row in range(0xB0, 0xD8) for cell in range(0xA1, 0xFF) for b in (row, cell))
    big5 = bytes(b for row in range(0xA4, 0xC7) for cell in _big5_cells() for b in (row, cell))
    han = gb.decode("gb2312", errors="replace") + big5.decode("big5", errors="replace")
    ascii_text = "".join(map(chr, range(0x20, 0x7F))) + "\n\r\t"
    return frozenset(han + ascii_text + "，。：；？！、“”‘’「」『』《》（）…—　") - {"\ufffd"}


def _big5_cells() -> list[int]:
    return [*range(0x40, 0x7F), *range(0xA1, 0xFF)]


def _decode(data: bytes, encoding: str, path: Path) -> str:
    try:
        text = data.decode(encoding)
    except LookupError:
        raise CorpusError(f"{path}: no encoding is called {encoding}", str(path)) from None
    except UnicodeDecodeError as error:
        text = data.decode(encoding, errors="replace")
        broken = text.count("\ufffd")
        if broken > MOST_BROKEN * len(text):
            raise CorpusError(
                f"{path}: {broken:,} of {len(text):,} characters cannot be decoded, the first at "
                f"byte {error.start}; tried {', '.join(('utf-8', *CANDIDATES))}: save it as UTF-8",
                str(path), error.start, ("utf-8", *CANDIDATES),
            ) from None  # fmt: skip
        log.warning("%s: %d undecodable characters are shown as \ufffd", path, broken)
    strange = sum(
        character < " " and character not in "\t\n\r\f\x1a" for character in text[:100_000]
    )
    if strange > MOST_BROKEN * min(len(text), 100_000):
        raise CorpusError(f"{path}: not text ({strange} control characters)", str(path), 0)
    return text


def clean(text: str) -> str:
    r"""Strip lines and drop empty ones: `"　　甲。\r\n\r\n　　乙。"` becomes `"甲。\n乙。"`."""
    lines = (line.strip(" \t　\ufeff\xa0") for line in text.splitlines())
    return "\n".join(line for line in lines if line)


def chapters(text: str) -> list[tuple[str, str]]:
    """Cut cleaned text into `(heading, text)`; the heading is the first line of its text.

    What stands before the first heading is a part of its own, or goes to the first chapter if it
    is under 50 characters. A book without headings is cut between paragraphs into parts of about
    3,000 characters. Joined by newlines the parts are the text.
    """
    starts = [match.start() for match in HEADING.finditer(text)]
    if not starts:
        return [(str(n), part) for n, part in enumerate(_gather(text.split("\n"), SECTION), 1)]
    edges = [*sorted({0, *starts}), len(text) + 1]
    parts = [text[a : b - 1] for a, b in pairwise(edges)]
    return [(_heading(part), part) for part in _join_short(parts)]


def _join_short(parts: list[str]) -> list[str]:
    """Join a part under 50 characters, a title or a lone heading, to the part behind it."""
    joined: list[str] = []
    pending = ""
    for part in parts:
        pending = f"{pending}\n{part}" if pending else part
        if len(pending) >= 50:
            joined.append(pending)
            pending = ""
    if pending:
        joined.append(pending)
    return joined


def _heading(part: str) -> str:
    match = HEADING.search(part[:200])
    return match.group() if match else ""


def _gather(lines: list[str], length: int) -> Iterator[str]:
    """Join consecutive lines to passages of at least `length` characters."""
    passage: list[str] = []
    for line in lines:
        passage.append(line)
        if sum(map(len, passage)) >= length:
            yield "\n".join(passage)
            passage = []
    if passage:
        yield "\n".join(passage)


def find_novels(data_dir: Path, general: Path | None) -> list[Path]:
    """List the .txt files below `data_dir` that are novels, in order of their paths.

    Raises
    ------
    DataError
        Where the folder is missing or holds no .txt file.
    """
    if not data_dir.is_dir():
        raise DataError(f"data.data_dir {data_dir}: no such folder; put novels (.txt) there")
    files = sorted(path for path in data_dir.rglob("*") if path.suffix.lower() == ".txt")
    novels = [path for path in files if path.is_file() and _is_novel(path, data_dir, general)]
    if not novels:
        raise DataError(
            f"data.data_dir {data_dir}: no novel in it ({len(files)} .txt files, all of them "
            "general text or in this project's own folders); put novels as .txt files there"
        )
    return novels


def _is_novel(path: Path, data_dir: Path, general: Path | None) -> bool:
    folders = path.relative_to(data_dir).parts[:-1]
    if folders and (folders[0] in OWN_FOLDERS or any(name.startswith(".") for name in folders)):
        return False
    resolved = path.resolve()
    named = general is not None and resolved.is_relative_to(general.resolve())
    return not named and path.name.lower() != "general.txt"


def find_general(data_dir: Path, general: Path | None) -> list[Path]:
    """List the files of general text: what `general` names and any general.txt below `data_dir`.

    Raises
    ------
    DataError
        Where `general` does not exist or holds neither .txt nor .jsonl.
    """
    files = [p for p in data_dir.rglob("*.txt") if p.name.lower() == "general.txt"]
    files = [p for p in files if p.relative_to(data_dir).parts[0] not in OWN_FOLDERS]
    if general is not None:
        named = [general] if general.is_file() else general.rglob("*")
        files += [path for path in named if path.suffix.lower() in {".txt", ".jsonl"}]
        if not files:
            raise DataError(f"data.general_file {general}: no .txt or .jsonl file there")
    return sorted(set(files))


def read_novels(paths: list[Path], data_dir: Path) -> list[Document]:
    """Read, clean and cut novels; a file that cannot be read is named in a warning and left out.

    Raises
    ------
    DataError
        Where no file could be read, with the reason for each.
    """
    documents: list[Document] = []
    refused: list[str] = []
    for path in tqdm(paths, desc="reading novels", unit="book"):
        try:
            text = clean(read_book(path).text)
        except CorpusError as error:
            log.warning("left out: %s", error)
            refused.append(str(error))
            continue
        book = str(path.relative_to(data_dir).with_suffix(""))
        documents += [Document("wuxia", book, name, part) for name, part in chapters(text) if part]
    if not documents:
        reasons = "\n".join(refused) or "every file is empty"
        raise DataError(f"data.data_dir {data_dir}: nothing to train on\n{reasons}")
    return documents


def read_general(path: Path, source: str = "general") -> list[Document]:
    """Read general text: JSONL with a `text` field, or text with a paragraph a line.

    Raises
    ------
    DataError
        Naming the file and the line that is not an object with a `text` string.
    """
    if path.suffix.lower() == ".jsonl":
        passages = list(_jsonl_texts(path))
    else:
        lines = clean(read_book(path).text).split("\n")
        passages = [passage for passage in _gather(lines, PASSAGE) if passage]
    return [Document(source, path.stem, str(n), text) for n, text in enumerate(passages, 1)]


def _jsonl_texts(path: Path) -> Iterator[str]:
    for number, line in enumerate(read_book(path).text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"{path}:{number}: not JSON ({error.msg}); one object a line") from None
        text = record.get("text") if isinstance(record, dict) else None
        if not isinstance(text, str):
            raise DataError(f'{path}:{number}: must be an object like {{"text": "…"}}')
        if text.strip():
            yield clean(text)
