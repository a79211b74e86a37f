"""Find the files, and read them into documents: a chapter of a novel, or one general text."""

import json
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from tqdm import tqdm

from wuxia_core.corpus.chapters import chapters, gather
from wuxia_core.corpus.cleaning import clean
from wuxia_core.corpus.encodings import read_book
from wuxia_core.errors import CorpusError, DataError

log = logging.getLogger(__name__)

OWN_FOLDERS = {"sample", "tiny_base", "mixed"}  # below data_dir they are not the user's novels
PASSAGE = 200  # characters: shorter lines of general text are gathered up to this length


@dataclass(frozen=True)
class Document:
    """A chapter, or one general text: the unit of the split and of every statistic."""

    source: str  # "wuxia" or "general"
    book: str
    chapter: str
    text: str


def find_novels(data_dir: Path, general: Path | None) -> list[Path]:
    """List the .txt files below `data_dir` that are novels, in order of their paths.

    Raises `DataError` where the folder is missing or holds no .txt file.
    """
    if not data_dir.is_dir():
        raise DataError(f"data.data_dir {data_dir}: no such folder; put novels (.txt) there")
    files = sorted(path for path in data_dir.rglob("*") if path.suffix.lower() == ".txt")
    novels = [path for path in files if path.is_file() and _is_novel(path, data_dir, general)]
    if not novels:
        why = "general text or in this project's own folders" if files else "none"
        raise DataError(
            f"data.data_dir {data_dir}: no novel in it ({len(files)} .txt files, {why}); "
            "put novels there as .txt files"
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

    Raises `DataError` where `general` does not exist or holds neither .txt nor .jsonl.
    """
    files = [path for path in data_dir.rglob("*") if path.name.lower() == "general.txt"]
    files = [path for path in files if path.relative_to(data_dir).parts[0] not in OWN_FOLDERS]
    if general is not None:
        named = [general] if general.is_file() else list(general.rglob("*"))
        named = [path for path in named if path.suffix.lower() in {".txt", ".jsonl"}]
        if not named:
            raise DataError(f"data.general_file {general}: no .txt or .jsonl file there")
        files += named
    return sorted({path.resolve(): path for path in files if path.is_file()}.values())


def read_novels(
    paths: list[Path], data_dir: Path, encodings: Mapping[str, str] = MappingProxyType({})
) -> list[Document]:
    """Read, clean and cut novels; a file that cannot be read is named in a warning and left out.

    Raises `DataError` where no file could be read, with the reason for each.
    """
    documents: list[Document] = []
    refused: list[str] = []
    for path in tqdm(paths, desc="reading novels", unit="book"):
        try:
            text = clean(read_book(path, encodings.get(path.name)).text)
        except CorpusError as error:
            refused.append(str(error))
            continue
        book = str(path.relative_to(data_dir).with_suffix(""))
        documents += [Document("wuxia", book, name, part) for name, part in chapters(text) if part]
    if not documents:
        reasons = "\n".join(refused) or "every file is empty"
        raise DataError(f"data.data_dir {data_dir}: nothing to train on\n{reasons}")
    for reason in refused:
        log.warning("left out: %s", reason)
    return documents


def read_general(
    path: Path, encoding: str | None = None, source: str = "general"
) -> list[Document]:
    """Read general text: JSONL with a `text` field, or text with a paragraph a line.

    Raises `DataError` naming the file and the line that is not an object with a `text` string.
    """
    if path.suffix.lower() == ".jsonl":
        passages = list(_jsonl_texts(path, encoding))
    else:
        lines = clean(read_book(path, encoding).text).split("\n")
        passages = [passage for passage in gather(lines, PASSAGE) if passage]
    return [Document(source, path.stem, str(n), text) for n, text in enumerate(passages, 1)]


def _jsonl_texts(path: Path, encoding: str | None) -> Iterator[str]:
    for number, line in enumerate(read_book(path, encoding).text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"{path}:{number}: not JSON ({error.msg}); one object a line") from None
        text = record.get("text") if isinstance(record, dict) else None
        if not isinstance(text, str):
            raise DataError(f'{path}:{number}: must be an object like {{"text": "…"}}')
        if any("\ud800" <= character <= "\udfff" for character in text):
            raise DataError(f"{path}:{number}: half a character (a lone surrogate) in the text")
        if text.strip():
            yield clean(text)
