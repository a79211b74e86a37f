"""Checkpoints that are whole: sealed with a manifest, named in one step, checked before use.

A checkpoint is what transformers' Trainer saves, and beside it MANIFEST.json: the SHA-256 and size
of each file, the step, the processes, and what the run depends on.
"""

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from wuxia_core.mixing import read_json

MANIFEST = "MANIFEST.json"
KEPT = 2  # checkpoints that are never pruned, so that one that is damaged can be done without
STAGING = ".tmp-step-"

logger = logging.getLogger(__name__)


def seal(checkpoint: Path, facts: dict[str, Any]) -> None:
    """Write the manifest of a folder's files, and have the disk take all of them."""
    files = {}
    for path in sorted(checkpoint.iterdir()):
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            os.fsync(file.fileno())
        files[path.name] = {"bytes": path.stat().st_size, "sha256": digest}
    manifest = facts | {"files": files}
    with (checkpoint / MANIFEST).open("w", encoding="utf-8") as file:
        json.dump(manifest | {"sha256": _hash(manifest)}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())


def publish(staged: Path, folder: Path) -> None:
    """Give a sealed checkpoint its place in the run folder, in one step."""
    staged.replace(folder / staged.name)
    shutil.rmtree(staged.parent)
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def step_of(checkpoint: Path) -> int:
    """Read the step from a checkpoint's name."""
    return int(checkpoint.name.partition("-")[2])


def fault(checkpoint: Path) -> str | None:
    """Find what keeps a checkpoint from being used; None where it is whole."""
    manifest = read_json(checkpoint / MANIFEST)
    if manifest is None or manifest.pop("sha256", None) != _hash(manifest):
        return f"{MANIFEST} is missing or damaged"
    try:
        return next((said for said in _faults(checkpoint, manifest["files"]) if said), None)
    except OSError as error:
        return f"cannot be read ({error.strerror})"


def _hash(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _faults(checkpoint: Path, files: dict[str, Any]) -> Iterator[str]:
    for name, facts in files.items():
        path = checkpoint / name
        if not path.is_file():
            yield f"{name} is missing"
            continue
        if path.stat().st_size != facts["bytes"]:
            yield f"{name} has {path.stat().st_size:,} bytes, not {facts['bytes']:,}"
            continue
        with path.open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != facts["sha256"]:
                yield f"{name} has changed since it was written"


def checkpoints(folder: Path) -> list[Path]:
    """List what goes by the name of a checkpoint, by step."""
    found = {path.name.partition("-")[2]: path for path in folder.glob("checkpoint-*")}
    return [found[step] for step in sorted(filter(str.isdigit, found), key=int)]


def newest_whole(folder: Path) -> Path | None:
    """Find the newest checkpoint that is whole; damaged ones are renamed, and named in the log."""
    for checkpoint in reversed(checkpoints(folder)):
        found = fault(checkpoint)
        if found is None:
            return checkpoint
        aside = _free(checkpoint.with_name(f"{checkpoint.name}.broken"))
        try:
            checkpoint.rename(aside)
        except FileNotFoundError:  # another machine's launcher was faster
            continue
        logger.warning("%s: %s; set aside as %s", checkpoint, found, aside.name)
    return None


def prune(folder: Path, limit: int) -> None:
    """Delete what is older than the newest `limit` whole checkpoints, and at least two."""
    whole = 0
    for checkpoint in reversed(checkpoints(folder)):
        if whole >= max(limit, KEPT):
            shutil.rmtree(checkpoint)
        whole += fault(checkpoint) is None


def clear_staging(folder: Path) -> None:
    """Delete what a save that was cut off left behind."""
    for staging in folder.glob(f"{STAGING}*"):
        shutil.rmtree(staging)


def _free(path: Path) -> Path:
    candidate, number = path, 1
    while candidate.exists():
        number += 1
        candidate = path.with_name(f"{path.name}-{number}")
    return candidate
