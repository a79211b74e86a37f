"""What a mixture was built from, so that it is built anew only when that has changed.

Texts and tokenizer are known by their SHA-256. Sizes and times are looked at first, so that an
unchanged corpus is known without reading it.
"""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from wuxia_core.config import Config
from wuxia_core.corpus import File
from wuxia_core.model import tokenizer_files

FORMAT = 4  # raise it when the folder's content changes, so that older ones are built again
MANIFEST, SEEN = "manifest.json", "inputs.json"


class Fingerprints:
    """SHA-256 of files; one whose size and times are as remembered in `inputs.json` is not read."""

    def __init__(self, folder: Path) -> None:
        self._remembered = read_json(folder / SEEN) or {}
        self._seen: dict[str, list[Any]] = {}

    def of(self, path: Path) -> str:
        """Hash a file; one that cannot be read is left to the reader to complain of."""
        name, stat = str(path.resolve()), path.stat()
        now = [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]
        *before, digest = self._remembered.get(name, [""])
        if before != now:
            try:
                with path.open("rb") as file:
                    digest = hashlib.file_digest(file, "sha256").hexdigest()
            except OSError:
                return "unreadable"
        self._seen[name] = [*now, digest]
        return str(digest)

    def remember(self, folder: Path) -> None:
        """Write what was seen, where that is news; a folder that is not ours to write is left."""
        if self._seen != self._remembered and os.access(folder, os.W_OK):
            (folder / SEEN).write_text(json.dumps(self._seen, ensure_ascii=False), "utf-8")


def make_manifest(
    config: Config, files: list[File], lexicon: tuple[str, ...], fingerprints: Fingerprints
) -> dict[str, Any]:
    """Say everything that the content of a mixture hangs on."""
    tokenizer = tokenizer_files(config.model.model_name_or_path)
    paths = {"data_dir", "general_file", "processed_data_file", "lexicon"}
    return {
        "format": FORMAT,
        "seed": config.training.seed,
        "data": config.data.model_dump(exclude=paths),
        "lexicon": hashlib.sha256("\n".join(sorted(lexicon)).encode()).hexdigest(),
        "tokenizer": {path.name: fingerprints.of(path) for path in tokenizer},
        "inputs": [
            {
                "name": file.name,
                "source": file.source,
                "book": file.book,
                "sha256": fingerprints.of(file.path),
            }
            for file in files
        ],
    }


def read_manifest(folder: Path, name: str = MANIFEST) -> dict[str, Any] | None:
    """Read what a mixture was built from; None where there is no whole mixture."""
    manifest = read_json(folder / name)
    return manifest if manifest and "inputs" in manifest else None


def read_json(path: Path) -> dict[str, Any] | None:
    """Read an object from a file; None where there is none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None
