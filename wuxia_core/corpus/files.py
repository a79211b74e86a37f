"""Find the files: novels, and general text, which is never taken for a novel."""

import logging
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from wuxia_core.errors import DataError

log = logging.getLogger(__name__)

NO_NOVELS = {"general.txt", "lexicon.txt"}
OWN_FOLDERS = {"sample", "tiny_base", "mixed"}  # below data_dir they are not the user's novels


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
        what = "a file; name its folder" if data_dir.exists() else "no such folder"
        raise DataError(f"data.data_dir {data_dir}: {what}; novels are .txt files in a folder")
    there = [path for path in _below(data_dir) if not _is_own(path, data_dir)]
    paths = [novels] if novels else _find_novels(there, data_dir, [general, lexicon])
    books = [(path, _name(path, data_dir).removesuffix(path.suffix)) for path in paths]
    texts = [(path, path.stem) for path in _find_general(there, general)]
    return [
        File(path, source, book, _name(path, data_dir))
        for source, found in (("wuxia", books), ("general", texts))
        for path, book in _told_apart(found)
    ]


def _name(path: Path, data_dir: Path) -> str:
    return str(path.relative_to(data_dir)) if path.is_relative_to(data_dir) else path.name


def _told_apart(files: list[tuple[Path, str]]) -> Iterator[tuple[Path, str]]:
    """Give a number to the books that are called like an earlier one."""
    times: Counter[str] = Counter()
    taken: set[str] = set()
    for path, title in files:
        name = title
        while name in taken:
            times[title] += 1
            name = f"{title} ({times[title] + 1})"
        if name != title:
            log.warning("%s: another file is called %s too; this one goes by %s", path, title, name)
        taken.add(name)
        yield path, name


def _find_novels(there: list[Path], data_dir: Path, others: list[Path | None]) -> list[Path]:
    texts = [path for path in there if path.suffix.lower() == ".txt"]
    novels = [path for path in texts if _is_novel(path, others)]
    if not novels:
        what = "nothing but general text" if texts else "no .txt file, own folders aside"
        raise DataError(f"data.data_dir {data_dir}: no novel in it ({what}); put .txt files there")
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
    return sorted(path for path in files if _is_usable(path))


def _is_usable(path: Path) -> bool:
    if not path.is_file():
        log.warning("%s: a link that leads nowhere or in a circle; left out", path)
        return False
    if str(path).encode("utf-8", "replace").decode() != str(path):
        log.warning("%r: left out, its name is not UTF-8; rename it", str(path))
        return False
    return True


def _is_novel(path: Path, others: list[Path | None]) -> bool:
    named = any(other and path.resolve().is_relative_to(other.resolve()) for other in others)
    return not named and path.name.lower() not in NO_NOVELS


def _is_own(path: Path, data_dir: Path) -> bool:
    folders = path.relative_to(data_dir).parts[:-1]
    return bool(folders) and folders[0] in OWN_FOLDERS


def _find_general(there: list[Path], general: Path | None) -> list[Path]:
    """List what `general` names, and any general.txt among the novels."""
    files = [path for path in there if path.name.lower() == "general.txt"]
    if general is not None:
        named = [general] if general.is_file() else _below(general)
        named = [path for path in named if path.suffix.lower() in {".txt", ".jsonl"}]
        if not named:
            raise DataError(f"data.general_file {general}: no .txt or .jsonl file there")
        files += named
    return sorted({path.resolve(): path for path in files}.values())
