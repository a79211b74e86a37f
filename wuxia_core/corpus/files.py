"""Find the files: novels, and general text, which is never taken for a novel."""

import logging
import os
from dataclasses import dataclass
from pathlib import Path

from wuxia_core.errors import DataError

log = logging.getLogger(__name__)

OWN_FOLDERS = {"sample", "tiny_base", "mixed"}  # below data_dir they are not the user's novels


@dataclass(frozen=True)
class File:
    """A text file: `source` is "wuxia" or "general", `book` is what its documents go by."""

    path: Path
    source: str
    book: str


def find_files(data_dir: Path, general: Path | None, novels: Path | None = None) -> list[File]:
    """List the novels below `data_dir`, then the general text, each in order of their paths.

    `novels` is a JSONL that stands in for the novels. A novel's `book` is its path below
    `data_dir` without the suffix; where two would have the same, they keep their suffix.

    Raises `DataError` where there is no novel, or `general` holds neither .txt nor .jsonl.
    """
    paths = [novels] if novels else _find_novels(data_dir, general)
    books = [File(path, "wuxia", _name(path, data_dir)) for path in paths]
    texts = [File(path, "general", path.stem) for path in _find_general(data_dir, general)]
    return _told_apart(books) + _told_apart(texts)


def _name(path: Path, data_dir: Path) -> str:
    return str(path.relative_to(data_dir)) if path.is_relative_to(data_dir) else path.name


def _told_apart(files: list[File]) -> list[File]:
    """Drop suffixes where that leaves the names apart; else number the ones that are the same."""
    short = [str(Path(file.book).with_suffix("")) for file in files]
    named = []
    for number, (file, name) in enumerate(zip(files, short, strict=True)):
        if short.count(name) > 1:
            log.warning("%s: another file is called %s too; both are read", file.path, name)
            name = f"{name} ({short[: number + 1].count(name)})"
        named.append(File(file.path, file.source, name))
    return named


def _find_novels(data_dir: Path, general: Path | None) -> list[Path]:
    if not data_dir.is_dir():
        raise DataError(f"data.data_dir {data_dir}: no such folder; put novels (.txt) there")
    texts = [path for path in _below(data_dir) if path.suffix.lower() == ".txt"]
    novels = [path for path in texts if _is_novel(path, data_dir, general)]
    if not novels:
        why = "general text or in this project's own folders" if texts else "none"
        raise DataError(
            f"data.data_dir {data_dir}: no novel in it ({len(texts)} .txt files, {why}); "
            "put novels there as .txt files"
        )
    return novels


def _below(folder: Path) -> list[Path]:
    """List every file below a folder, linked folders once; a link that leads nowhere is named."""
    files: list[Path] = []
    seen: set[str] = set()
    for parent, folders, names in os.walk(folder, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        if os.path.realpath(parent) in seen:
            folders.clear()
            continue
        seen.add(os.path.realpath(parent))
        files += [Path(parent, name) for name in names]
    for path in files:
        if not path.is_file():
            log.warning("%s: a link that leads nowhere or in a circle; left out", path)
    return sorted(path for path in files if path.is_file())


def _is_novel(path: Path, data_dir: Path, general: Path | None) -> bool:
    if _is_own(path, data_dir):
        return False
    named = general is not None and path.resolve().is_relative_to(general.resolve())
    return not named and path.name.lower() != "general.txt"


def _is_own(path: Path, data_dir: Path) -> bool:
    folders = path.relative_to(data_dir).parts[:-1]
    return bool(folders) and folders[0] in OWN_FOLDERS


def _find_general(data_dir: Path, general: Path | None) -> list[Path]:
    """List what `general` names, and any general.txt below `data_dir`."""
    files = [path for path in _below(data_dir) if path.name.lower() == "general.txt"]
    files = [path for path in files if not _is_own(path, data_dir)]
    if general is not None:
        named = [general] if general.is_file() else _below(general)
        named = [path for path in named if path.suffix.lower() in {".txt", ".jsonl"}]
        if not named:
            raise DataError(f"data.general_file {general}: no .txt or .jsonl file there")
        files += named
    return sorted({path.resolve(): path for path in files}.values())
