"""The run folder: choosing and locking it, its checkpoints, resuming, and `metrics.jsonl`.

A checkpoint is undamaged if each file that its `MANIFEST.json` names has the size and hash there.
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
FEWEST = 2  # undamaged checkpoints that are always kept: if one is damaged later, one is left
PACKAGES = ("torch", "transformers", "peft", "accelerate", "numpy")  # see `versions`
# How the names of the settings begin that may change on resuming. EXCEPTION may not, though its
# name begins so: all measurements that choose the best adapter are of as many documents.
CHANGEABLE, EXCEPTION = ("plan.", "evaluation.", "training.output_dir"), "evaluation.max_documents"
logger = logging.getLogger(__name__)


@contextmanager
def acquire(
    config: Config, *, named: bool, resume: bool, rendezvous: str | None = None
) -> Iterator[Path]:
    """Choose the run folder, make it, yield it, and keep other runs out of it until the block ends.

    If `named`, the user chose the folder: it is `training.output_dir`. If not, it is this folder or
    a numbered one: of `sample`, `sample-2`, `sample-3` and so on the first that is free or, with
    `resume`, the last whose run is not finished. If the folder is new and still empty at the end of
    the block, it is removed. Launchers on several machines that start one run pass the same address
    as `rendezvous`: they share the folder.

    Raises `ConfigError` if a run in the folder has begun to train and `resume` is False, if no run
    was prepared there and `resume` is True, or if the folder holds other things; `MachineError` if
    another run is at work in the folder, or the folder cannot be written.
    """
    base = expand(config.training.output_dir)
    choose = _newest_unfinished if resume else _first_free
    folder = base if named else choose(base)
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
        if is_new:
            with suppress(OSError):  # a folder that is not empty stays: the run wrote something
                folder.rmdir()


def _refuse_other_folder(folder: Path) -> None:
    """Raise `ConfigError` if a folder holds other things than a run, or is a file.

    `/`, the home folder, the working directory and `PROJECT` are refused too, even if they are
    empty. Hidden files and `run.lock` do not count as other things.
    """
    key = f"training.output_dir {folder}"
    if folder.resolve() in {Path("/"), Path.cwd(), Path(os.environ.get("HOME", "/")), PROJECT}:
        raise ConfigError(f"{key}: a folder of other things; name one below it")
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"{key}: not a folder; name another")
    names = [path.name for path in folder.glob("[!.]*") if path.name != LOCK]
    if names and read_manifest(folder, RUN_MIXTURE) is None:
        if RUN_MIXTURE in names:
            remedy = "copy the manifest.json of the run's mixture over it"
            raise ConfigError(f"{key}: {RUN_MIXTURE} there is damaged; {remedy}")
        reason = f"holds {min(names)}, and is no run's"
        raise ConfigError(f"{key}: {reason}, so it is left alone; name another, or an empty one")


def occupied(folder: Path) -> bool:
    """Whether a run in a folder has begun to train; True for a finished run too."""
    return (folder / METRICS).exists() or (folder / ADAPTER_WEIGHTS).exists()


def _numbered(path: Path) -> Iterator[Path]:
    """Yield a path, then numbered paths without end: `sample`, `sample-2`, `sample-3`, …."""
    yield path
    yield from (path.with_name(f"{path.name}-{number}") for number in count(2))


def _first_free(folder: Path) -> Path:
    """Give the first of the paths of `_numbered` that does not exist or is an empty folder."""
    return next(path for path in _numbered(folder) if not path.exists() or not any(path.iterdir()))


def _newest_unfinished(folder: Path) -> Path:
    """Give the last of `folder`, `folder-2`, `folder-3`, … whose run has begun but not finished.

    The search ends at the first folder that does not exist. If no run is unfinished, `folder` is
    returned, even if it does not exist.
    """
    runs = filter(occupied, takewhile(Path.exists, _numbered(folder)))
    unfinished = [path for path in runs if not (path / ADAPTER_WEIGHTS).exists()]
    return unfinished[-1] if unfinished else folder


def write_setup(config: Config, mixture: Mixture, folder: Path) -> None:
    """Write the whole config and the mixture's manifest into the run folder; make it if missing.

    Raises `MachineError` if they cannot be written.
    """
    with raise_machine_error(f"training.output_dir {folder}"):
        folder.mkdir(parents=True, exist_ok=True)
        # a file is complete when it gets its name: other machines may read it at any time
        with tempfile.TemporaryDirectory(dir=folder, prefix=".") as staging:
            shutil.copyfile(mixture.folder / "manifest.json", Path(staging, RUN_MIXTURE))
            config.save(Path(staging, CONFIG))
            for name in (RUN_MIXTURE, CONFIG):  # `acquire` refuses a folder with CONFIG alone
                fsync(Path(staging, name))
                Path(staging, name).replace(folder / name)


def is_main_launcher(folder: Path) -> bool:
    """Whether this process launched rank 0, and so is the one launcher that evaluates the run.

    Rank 0 writes host name and process id of its launcher into environment.json, by
    `train.write_environment`. False if that file does not exist.
    """
    launcher = (read_json(folder / "environment.json") or {}).get("launcher")
    return launcher == [socket.gethostname(), os.getpid()]


@contextmanager
def locked(folder: Path, rendezvous: str | None = None) -> Iterator[None]:
    """Make a folder and keep other runs out of it until the `with` block ends.

    The lock is the operating system's, on `run.lock`. Launchers with the same `rendezvous`, if that
    is not None, share the lock. It lasts as long as any of them is in its block, or any process
    that called `hold_lock` lives. At the end of its block a launcher removes the file if nobody
    else shares the lock; a launcher that is killed leaves the file, without harm.

    Raises `MachineError` if another run is at work in the folder, or the folder cannot be written.
    """
    path = folder / LOCK
    ours = {"host": socket.gethostname(), "pid": os.getpid(), "id": uuid.uuid4().hex}
    ours["rendezvous"] = rendezvous
    with raise_machine_error(f"training.output_dir {folder}"):
        folder.mkdir(parents=True, exist_ok=True)
        file = _lock_shared(path, ours)  # writes `ours` only if nobody shares the lock
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

    The lock is exclusive only for the moment of writing, so nobody waits long for a share of it.
    The file is returned open, since closing it would give the lock up.
    """
    while True:
        file = path.open("a+", encoding="utf-8")
        with suppress(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # raises if anybody shares the lock
            file.truncate(0)
            file.write(json.dumps(owner))
            file.flush()
        fcntl.flock(file, fcntl.LOCK_SH)  # replaces the exclusive lock, if that was got
        if os.fstat(file.fileno()).st_nlink:  # number of its names; 0: it was removed
            return file
        file.close()  # the run before has removed it meanwhile; open a new one


def hold_lock(folder: Path) -> None:
    """Share the folder's lock, if there is one, until this process ends.

    A process that trains may outlive its launcher, and the folder is then still in use.
    """
    if (folder / LOCK).exists():
        fcntl.flock(os.open(folder / LOCK, os.O_RDONLY), fcntl.LOCK_SH)  # the file is never closed


def is_at_work(folder: Path) -> bool:
    """Whether the launcher that locked a run folder lives; one on another machine counts as alive.

    The lock itself is not tried, since that would keep a launcher out for a moment. On a system
    without /proc every launcher counts as alive. False if there is no lock file.
    """
    holder = read_json(folder / LOCK)
    if holder and holder["host"] == socket.gethostname():
        return Path("/proc", str(holder["pid"])).exists() or not Path("/proc").exists()
    return holder is not None


def write_manifest(checkpoint: Path, facts: dict[str, Any]) -> None:
    """Write MANIFEST.json into the folder `checkpoint`, then flush all files there to the disk.

    MANIFEST.json holds `facts`, such as the step; under `files` the size and hash of each file, by
    name; and under `sha256` a hash of all that, by which `manifest` sees damage to MANIFEST.json.
    """
    files = {path.name: _size_and_hash(path) for path in sorted(checkpoint.iterdir())}
    content = facts | {"files": files}
    text = json.dumps(content | {"sha256": _hash(content)}, indent=1)
    (checkpoint / MANIFEST).write_text(text, encoding="utf-8")
    for path in checkpoint.iterdir():
        fsync(path)


def publish(checkpoint: Path, folder: Path) -> None:
    """Move a checkpoint in one step from its staging folder, its parent, into the run folder.

    The checkpoint must have its manifest already (`write_manifest`). The staging folder is deleted.
    """
    checkpoint.replace(folder / checkpoint.name)
    shutil.rmtree(checkpoint.parent)
    fsync(folder)


def fsync(path: Path) -> None:
    """Flush a file's content, or the list of names in a folder, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def find_damage(checkpoint: Path) -> str | None:
    """Describe the first difference of a checkpoint from its manifest; None if it is undamaged.

    Files that the manifest does not name do not count.
    """
    facts = manifest(checkpoint)
    if not facts:
        return f"{MANIFEST} is missing or damaged"
    for name, then in facts["files"].items():
        try:
            now = _size_and_hash(checkpoint / name)
        except OSError as error:
            return f"{name} cannot be read ({error.strerror})"
        if now != then:
            return f"{name} has changed ({then['bytes']:,} bytes then, {now['bytes']:,} now)"
    return None


def manifest(checkpoint: Path) -> dict[str, Any]:
    """Read a checkpoint's manifest: the facts and `files`, without its own hash.

    The dictionary is empty if the manifest is missing, or does not agree with its hash.
    """
    facts = read_json(checkpoint / MANIFEST) or {}
    own_hash = facts.pop("sha256", None)
    return facts if own_hash == _hash(facts) else {}


def _size_and_hash(path: Path) -> dict[str, Any]:
    """Give a file's size in `bytes` and its `sha256`."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"bytes": path.stat().st_size, "sha256": digest}


def _hash(facts: dict[str, Any]) -> str:
    """Hash a manifest that lacks its own `sha256`; the order of its entries does not matter."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def step_of(checkpoint: Path) -> int:
    """Read the step from a checkpoint's name: 40 from `checkpoint-40`."""
    return int(checkpoint.name.partition("-")[2])


def checkpoints(folder: Path) -> list[Path]:
    """List the folders `checkpoint-STEP` in `folder`, damaged ones too, from the first step on."""
    paths = (path for path in folder.glob("checkpoint-*") if path.name.partition("-")[2].isdigit())
    return sorted(paths, key=step_of)


def newest_checkpoint(folder: Path) -> Path | None:
    """Find the newest undamaged checkpoint, and rename the damaged ones that are newer.

    A damaged `checkpoint-40` becomes `checkpoint-40.broken`, with a warning in the log. If no
    checkpoint is undamaged, all are renamed and None is returned.
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
    """Keep the newest `limit` undamaged checkpoints, two at least, and delete all older ones.

    A folder without an undamaged manifest is not deleted: it may not be this run's.
    """
    undamaged = 0  # number of undamaged checkpoints so far, from the newest on
    for checkpoint in reversed(checkpoints(folder)):
        if undamaged < max(limit, FEWEST):
            undamaged += 1 if find_damage(checkpoint) is None else 0
        elif manifest(checkpoint):
            shutil.rmtree(checkpoint)


def clear_staging(folder: Path) -> None:
    """Delete the staging folders, whose checkpoints were not complete when their process ended."""
    for staging in folder.glob(f"{STAGING}*"):
        shutil.rmtree(staging)


def versions() -> dict[str, str]:
    """Give the installed versions of `PACKAGES`, on which a run's numbers depend, by name."""
    return {package: version(package) for package in PACKAGES}


def how_to_measure(folder: Path) -> str:
    """Say for a message how to measure a run: `python -m wuxia_core.report FOLDER measures …`."""
    return f"python -m wuxia_core.report {quote(str(folder))} measures it and writes its page"


def resume_point(folder: Path) -> Path | None:
    """Find the checkpoint from which the run in `folder` resumes; None if it has to start again.

    It is the newest undamaged checkpoint; `newest_checkpoint` renames damaged ones that are newer.
    A warning is logged if there is none, or if other versions of `PACKAGES` wrote it. Raises
    `ConfigError` if the run is finished.
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
    """Refuse to resume a run with other settings, texts or number of processes.

    Three things are compared: `config` with the one in `folder`; the texts as they are now with the
    mixture of the run; `processes`, the number on all machines, with the number that wrote
    `checkpoint`. `checkpoint` is from `resume_point`; if it is None, any number will do. A
    `training.warmup_steps` of None is first set in `config` to the run's.

    Raises `ConfigError` with all changes, or with `insist` logs them as a warning. Raises also what
    `mixing.manifest_of` raises if texts, a `data` key or the tokenizer are unfit.
    """
    saved = load_config(folder / CONFIG)  # as `write_setup` wrote it
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
    sections = config.model_dump().items()
    values = {f"{name}.{key}": value for name, keys in sections for key, value in keys.items()}
    return {k: v for k, v in values.items() if k == EXCEPTION or not k.startswith(CHANGEABLE)}


def read_rows(folder: Path) -> list[dict[str, Any]]:
    """Read the rows of a run's metrics.jsonl, without those of steps that were undone.

    A row with the `event` "resumed" at step 2 drops the rows of later steps above it; one with the
    `event` "started" drops all rows above it. A row that is cut off or damaged is dropped too.
    """
    rows: list[dict[str, Any]] = []
    for line in (folder / METRICS).read_text("utf-8", "replace").splitlines():
        try:
            row = json.loads(line)
        except ValueError:  # the process was killed while it wrote
            continue
        if not isinstance(row, dict) or "step" not in row:
            continue
        if row.get("event") == "resumed":
            rows = [earlier for earlier in rows if earlier["step"] <= row["step"]]
        elif row.get("event") == "started":
            rows = []
        rows.append(row)
    return rows


def append(folder: Path, row: dict[str, Any]) -> None:
    """Add a row to metrics.jsonl and flush it to the disk.

    The row gets a line of its own even if the last line of the file is cut off.
    """
    with (folder / METRICS).open("ab+") as file:
        if file.tell():  # the file is not empty
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                file.write(b"\n")
        file.write(json.dumps(row).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())
