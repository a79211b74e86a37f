"""The run folder: choosing and locking it, its checkpoints, resuming, and `metrics.jsonl`.

A checkpoint is undamaged if all its files are as its `MANIFEST.json` describes them.
"""

import fcntl
import hashlib
import json
import logging
import os
import shutil
import socket
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import version
from itertools import count, takewhile
from pathlib import Path
from shlex import quote
from typing import Any, TextIO

from wuxia_core.config import PROJECT, Config, expand, load_config
from wuxia_core.errors import ConfigError, MachineError, raise_machine_error
from wuxia_core.mixing import RUN_MIXTURE, Mixture, manifest_of, read_json, read_manifest
from wuxia_core.model import ADAPTER_WEIGHTS

LOCK, METRICS, MANIFEST = "run.lock", "metrics.jsonl", "MANIFEST.json"
CONFIG = "config.yaml"
STAGING = ".tmp-step-"  # begins the name of a folder in which a checkpoint is written
FEWEST = 2  # undamaged checkpoints that are never pruned: should one be damaged later, one is left
PACKAGES = ("torch", "transformers", "peft", "accelerate", "numpy")  # see `versions`
# Settings that may change on resuming, by the beginnings of their names. EXCEPTION may not: the
# best adapter is chosen by so many held-out documents.
CHANGEABLE, EXCEPTION = ("plan.", "evaluation.", "training.output_dir"), "evaluation.max_documents"
logger = logging.getLogger(__name__)


@contextmanager
def acquire(
    config: Config, *, named: bool, resume: bool, rendezvous: str | None = None
) -> Iterator[Path]:
    """Choose the run folder, make it, keep other runs out of it while it is used, and yield it.

    If the user `named` it, it is `training.output_dir`; else that is the first of the numbered
    folders `sample`, `sample-2` and so on, and the first free one is taken or, to `resume`, the
    newest one whose run is not finished. Launchers on several machines that start one run together
    have the same `rendezvous`, an address.

    Raises `ConfigError` where the folder holds a run and is not to be resumed, or holds none and
    is to be; `MachineError` where another run is at work there, or the folder cannot be written.
    """
    base = expand(config.training.output_dir)
    folder = base if named else _newest_unfinished(base) if resume else _first_free(base)
    if occupied(folder) and not resume:
        remedy = "is never overwritten; go on with it (--resume), or name another folder"
        raise ConfigError(f"training.output_dir {folder}: the run there {remedy}")
    _refuse_other_folder(folder)
    if resume and read_manifest(folder, RUN_MIXTURE) is None:
        raise ConfigError(f"--resume: no run in {folder}; name its folder or leave --resume out")
    is_new = not folder.exists()
    try:
        with locked(folder, rendezvous):
            yield folder
    finally:
        with suppress(OSError):  # a folder that is not empty stays: the run wrote something
            if is_new:
                folder.rmdir()


def _refuse_other_folder(folder: Path) -> None:
    """Raise `ConfigError` if a folder is neither empty nor a run's; hidden files do not count."""
    key = f"training.output_dir {folder}"
    if folder.resolve() in {Path("/"), Path.cwd(), Path.home(), PROJECT}:
        raise ConfigError(f"{key}: a folder of other things; name one below it")
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"{key}: not a folder; name another")
    names = [path.name for path in folder.glob("[!.]*") if path.name != LOCK]
    if names and read_manifest(folder, RUN_MIXTURE) is None:
        reason = f"holds {min(names)}, and is no run's"
        raise ConfigError(f"{key}: {reason}, so it is left alone; name another, or an empty one")


def occupied(folder: Path) -> bool:
    """Whether a run was started in a folder, finished or not."""
    return (folder / METRICS).exists() or (folder / ADAPTER_WEIGHTS).exists()


def _numbered(path: Path) -> Iterator[Path]:
    """Yield `sample`, `sample-2`, `sample-3`, … without end."""
    yield path
    yield from (path.with_name(f"{path.name}-{number}") for number in count(2))


def _first_free(folder: Path) -> Path:
    """Give the first of the numbered folders that does not exist or is empty."""
    return next(path for path in _numbered(folder) if not path.exists() or not any(path.iterdir()))


def _newest_unfinished(folder: Path) -> Path:
    """Give the last of the numbered folders whose run is not finished; without any, the first."""
    runs = filter(occupied, takewhile(Path.exists, _numbered(folder)))
    return [folder, *(path for path in runs if not (path / ADAPTER_WEIGHTS).exists())][-1]


def open_folder(config: Config, mixture: Mixture, folder: Path) -> None:
    """Make the run folder and write into it the resolved config and the mixture's manifest.

    Raises `MachineError` where they cannot be written.
    """
    with raise_machine_error(f"training.output_dir {folder}"):
        folder.mkdir(parents=True, exist_ok=True)
        # other machines may be reading, so that a file must be complete when it gets its name
        with tempfile.TemporaryDirectory(dir=folder, prefix=".") as staging:
            shutil.copyfile(mixture.folder / "manifest.json", Path(staging, RUN_MIXTURE))
            config.save(Path(staging, CONFIG))
            for name in (RUN_MIXTURE, CONFIG):
                Path(staging, name).replace(folder / name)


def is_main_launcher(folder: Path) -> bool:
    """Whether this process launched rank 0: only the launcher that did evaluates the run."""
    launcher = (read_json(folder / "environment.json") or {}).get("launcher")
    return launcher == [socket.gethostname(), os.getpid()]


@contextmanager
def locked(folder: Path, rendezvous: str | None = None) -> Iterator[None]:
    """Keep other runs out of a folder; launchers of the same `rendezvous` share its lock.

    The lock is the operating system's, on `run.lock`. It lasts as long as any of the launchers, or
    of the processes that called `hold_lock`, lives. The last one to leave this context removes the
    file, unless it is killed.

    Raises `MachineError` where a run is at work there, or the folder cannot be written.
    """
    path = folder / LOCK
    ours = {"host": socket.gethostname(), "pid": os.getpid(), "id": uuid.uuid4().hex}
    ours["rendezvous"] = rendezvous
    with raise_machine_error(f"training.output_dir {folder}"):
        folder.mkdir(parents=True, exist_ok=True)
        file = _lock_shared(path, ours)  # writes `ours` only where nobody shares the lock
    with file:
        file.seek(0)
        holder = json.load(file)
        if holder != ours and (rendezvous is None or holder["rendezvous"] != rendezvous):
            who = f"process {holder['pid']} on {holder['host']}"
            remedy = f"stop it, or name another folder; if that machine is gone, delete {path}"
            raise MachineError(f"{folder}: a run is at work there, of {who}; {remedy}")
        try:
            yield
        finally:
            with suppress(BlockingIOError):  # another process still shares the lock
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink()


def _lock_shared(path: Path, owner: dict[str, Any]) -> TextIO:
    """Open a lock file and share its lock; if nobody else does, write `owner` into the file first.

    Only to write is the lock taken exclusively, for a moment: the wait for a share of it is short.
    """
    while True:
        file = path.open("a+", encoding="utf-8")
        with suppress(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            file.truncate(0)
            file.write(json.dumps(owner))
            file.flush()
        fcntl.flock(file, fcntl.LOCK_SH)
        if os.fstat(file.fileno()).st_nlink:  # the file still has a name
            return file
        file.close()  # the run before has removed it meanwhile, so that a new one is needed


def hold_lock(folder: Path) -> None:
    """Share the folder's lock, if there is one, until this process ends.

    A worker may outlive its launcher, and the folder is then still in use.
    """
    if (folder / LOCK).exists():
        fcntl.flock(os.open(folder / LOCK, os.O_RDONLY), fcntl.LOCK_SH)  # stays open


def write_manifest(checkpoint: Path, facts: dict[str, Any]) -> None:
    """Write the manifest of a checkpoint's files, with `facts`, and flush all files to the disk."""
    files = {path.name: _describe(path) for path in sorted(checkpoint.iterdir())}
    manifest = facts | {"files": files}
    text = json.dumps(manifest | {"sha256": _hash(manifest)}, indent=1)
    (checkpoint / MANIFEST).write_text(text, encoding="utf-8")
    for path in checkpoint.iterdir():
        fsync(path)


def publish(checkpoint: Path, folder: Path) -> None:
    """Move a checkpoint, in one step, from its staging folder into the run folder.

    The checkpoint has its manifest by then, and the staging folder is deleted.
    """
    checkpoint.replace(folder / checkpoint.name)
    shutil.rmtree(checkpoint.parent)
    fsync(folder)


def fsync(path: Path) -> None:
    """Flush a file's content, or the names in a folder, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def find_damage(checkpoint: Path) -> str | None:
    """Describe the first difference of a checkpoint from its manifest; None if it is undamaged."""
    facts = manifest(checkpoint)
    if not facts:
        return f"{MANIFEST} is missing or damaged"
    for name, before in facts["files"].items():
        try:
            now = _describe(checkpoint / name)
        except OSError as error:
            return f"{name} cannot be read ({error.strerror})"
        if now != before:
            return f"{name} has changed ({before['bytes']:,} bytes then, {now['bytes']:,} now)"
    return None


def manifest(checkpoint: Path) -> dict[str, Any]:
    """Read a checkpoint's manifest: `files` and facts. Empty if it is missing or damaged."""
    facts = read_json(checkpoint / MANIFEST) or {}
    return facts if facts.pop("sha256", None) == _hash(facts) else {}


def _describe(path: Path) -> dict[str, Any]:
    """Give a file's size in bytes and its hash."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"bytes": path.stat().st_size, "sha256": digest}


def _hash(facts: dict[str, Any]) -> str:
    """Hash a manifest without its own `sha256`."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def step_of(checkpoint: Path) -> int:
    """Read the step from a checkpoint's name: 40 of `checkpoint-40`."""
    return int(checkpoint.name.partition("-")[2])


def checkpoints(folder: Path) -> list[Path]:
    """List the folders `checkpoint-STEP` by step, damaged ones included."""
    paths = (path for path in folder.glob("checkpoint-*") if path.name.partition("-")[2].isdigit())
    return sorted(paths, key=step_of)


def newest_checkpoint(folder: Path) -> Path | None:
    """Find the newest undamaged checkpoint, and rename newer ones, which are damaged.

    A damaged `checkpoint-40` becomes `checkpoint-40.broken`, with a warning in the log. None if no
    checkpoint is undamaged.
    """
    for checkpoint in reversed(checkpoints(folder)):
        damage = find_damage(checkpoint)
        if damage is None:
            return checkpoint
        broken = _first_free(checkpoint.with_name(f"{checkpoint.name}.broken"))
        with suppress(FileNotFoundError):  # another machine's launcher has renamed it already
            checkpoint.rename(broken)
            logger.warning("%s: %s; set aside as %s", checkpoint, damage, broken.name)
    return None


def prune(folder: Path, limit: int) -> None:
    """Keep the newest `limit` undamaged checkpoints, two at least, and delete the older ones.

    A folder without a readable manifest is not deleted: it may not be this run's.
    """
    undamaged = 0
    for checkpoint in reversed(checkpoints(folder)):
        if undamaged >= max(limit, FEWEST):
            if manifest(checkpoint):
                shutil.rmtree(checkpoint)
        else:
            undamaged += find_damage(checkpoint) is None


def clear_staging(folder: Path) -> None:
    """Delete the checkpoints that were being written when their process ended."""
    for staging in folder.glob(f"{STAGING}*"):
        shutil.rmtree(staging)


def versions() -> dict[str, str]:
    """Give the installed versions of the packages that a run's numbers depend on."""
    return {package: version(package) for package in PACKAGES}


def how_to_measure(folder: Path) -> str:
    """Say which command measures a finished run and writes its page."""
    return f"python -m wuxia_core.report {quote(str(folder))} measures it and writes its page"


def resume_point(folder: Path) -> Path | None:
    """Find the checkpoint that a stopped run resumes from; None if it has to start again.

    A checkpoint that other package versions wrote is taken with a warning. Raises `ConfigError`
    where the run is finished.
    """
    if (folder / ADAPTER_WEIGHTS).exists():
        raise ConfigError(f"--resume: {folder} is finished; {how_to_measure(folder)}")
    checkpoint = newest_checkpoint(folder)
    if checkpoint is None:
        logger.warning("--resume: no whole checkpoint in %s, so it starts again", folder)
    elif (old := manifest(checkpoint)["versions"]) != versions():
        changed = [f"{p} {old[p]} (now {new})" for p, new in versions().items() if old[p] != new]
        logger.warning("%s was saved with %s; numbers may differ", checkpoint, ", ".join(changed))
    return checkpoint


def check_unchanged(
    config: Config, folder: Path, checkpoint: Path | None, processes: int, insist: bool = False
) -> None:
    """Refuse to resume a run with other settings, texts or processes than it began with.

    `checkpoint` is that of `resume_point`, and `processes` is their number now. Raises
    `ConfigError` with all changes, or with `insist` logs them as a warning. A
    `training.warmup_steps` that is not set is copied into `config` from the run's.
    """
    saved = load_config(folder / CONFIG)
    if config.training.warmup_steps is None:
        config.training.warmup_steps = saved.training.warmup_steps
    before, now = _settings(saved), _settings(config)
    before["processes"] = manifest(checkpoint)["world_size"] if checkpoint else processes
    now["processes"] = processes  # --nproc times --nnodes
    changes = [f"{k}: {before[k]} then, {now[k]} now" for k in now if before[k] != now[k]]
    if manifest_of(config) != read_manifest(folder, RUN_MIXTURE):
        changes.append(f"the texts, or how they are cut, are not those in {folder}/{RUN_MIXTURE}")
    if changes:
        text = "\n  ".join([f"another run than the one in {folder}:", *changes])
        if not insist:
            raise ConfigError(f"--resume: {text}\nSet them back, or insist with --allow-changed")
        logger.warning("--allow-changed: from here on it is %s", text)


def _settings(config: Config) -> dict[str, Any]:
    """Give the settings that must not change on resuming, by name, such as `training.seed`."""
    sections = config.model_dump()
    values = {f"{s}.{key}": value for s in sections for key, value in sections[s].items()}
    return {k: v for k, v in values.items() if k == EXCEPTION or not k.startswith(CHANGEABLE)}


def read_rows(folder: Path) -> list[dict[str, Any]]:
    """Read the rows of a run's metrics.jsonl, without those that were written again on resuming.

    A run that reached step 3, was resumed at step 2 and wrote step 3 again: the first row of step 3
    is dropped. So is a row that is cut off.
    """
    rows: list[dict[str, Any]] = []
    for line in (folder / METRICS).read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
        except ValueError:  # the process was killed while it wrote
            continue
        if row.get("event") in ("started", "resumed"):
            rows = [earlier for earlier in rows if earlier["step"] <= row["step"]]
        rows.append(row)
    return rows


def append(folder: Path, row: dict[str, Any]) -> None:
    """Add a row to metrics.jsonl, on a line of its own also if the last line was cut off."""
    with (folder / METRICS).open("ab+") as file:
        if file.tell():  # the file is not empty
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                file.write(b"\n")
        file.write(json.dumps(row).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())
