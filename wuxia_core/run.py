"""The run folder: which one, its lock, its checkpoints, going on from one, and `metrics.jsonl`."""

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
from wuxia_core.mixing import Mixture, manifest_of, read_json, read_manifest
from wuxia_core.model import ADAPTER_WEIGHTS

LOCK, METRICS, MANIFEST = "run.lock", "metrics.jsonl", "MANIFEST.json"
RUN_MIXTURE = "mixture.json"  # by which a folder is known as a run's
STAGING = ".tmp-step-"
FEWEST = 2  # whole checkpoints that are never pruned, so that a damaged one can be done without
PACKAGES = ("torch", "transformers", "peft", "accelerate", "numpy")
# Settings that may change on resuming; not how many texts the best adapter is chosen by.
FREE = ("plan.", "evaluation.", "training.output_dir")
FIXED = "evaluation.max_documents"
logger = logging.getLogger(__name__)


@contextmanager
def acquire(
    config: Config, *, named: bool, resume: bool, rendezvous: str | None = None
) -> Iterator[Path]:
    """Choose the run folder, make it and keep other runs out of it.

    It is the one that was named, or the first free one of `sample`, `sample-2` and so on; to go on
    with a run, the newest of these that is not finished.

    Raises `ConfigError` where the folder holds a run that is not to go on, or none that could;
    `MachineError` where another run is at work there, or it cannot be written.
    """
    wanted = expand(config.training.output_dir)
    folder = wanted if named else _newest(wanted) if resume else _first_free(wanted)
    if occupied(folder) and not resume:
        remedy = "is never overwritten; go on with it (--resume), or name another folder"
        raise ConfigError(f"training.output_dir {folder}: the run there {remedy}")
    _refuse_strangers(folder)
    if resume and read_manifest(folder, RUN_MIXTURE) is None:
        raise ConfigError(f"--resume: no run in {folder}; name its folder or leave --resume out")
    new = not folder.exists()
    try:
        with locked(folder, rendezvous):
            yield folder
    finally:
        with suppress(OSError):  # it is not empty: something came of the run
            if new:
                folder.rmdir()


def _refuse_strangers(folder: Path) -> None:
    """Refuse a folder that is neither empty nor a run's; hidden files are anybody's.

    Raises `ConfigError`.
    """
    key = f"training.output_dir {folder}"
    if folder.resolve() in {Path("/"), Path.cwd(), Path.home(), PROJECT}:
        raise ConfigError(f"{key}: a folder of other things; name one below it")
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"{key}: not a folder; name another")
    there = [path.name for path in folder.glob("[!.]*") if path.name != LOCK]
    if there and read_manifest(folder, RUN_MIXTURE) is None:
        what = f"holds {min(there)}, and is no run's"
        raise ConfigError(f"{key}: {what}, so it is left alone; name another, or an empty one")


def occupied(folder: Path) -> bool:
    """Whether a folder already holds a run, finished or not."""
    return (folder / METRICS).exists() or (folder / ADAPTER_WEIGHTS).exists()


def _numbered(path: Path) -> Iterator[Path]:
    """Count `sample`, `sample-2`, `sample-3`, … without end."""
    yield path
    yield from (path.with_name(f"{path.name}-{number}") for number in count(2))


def _first_free(folder: Path) -> Path:
    return next(path for path in _numbered(folder) if not path.exists() or not any(path.iterdir()))


def _newest(folder: Path) -> Path:
    """Find the last of the numbered folders whose run is not finished; the first without any."""
    runs = filter(occupied, takewhile(Path.exists, _numbered(folder)))
    return [folder, *(path for path in runs if not (path / ADAPTER_WEIGHTS).exists())][-1]


def open_folder(config: Config, mixture: Mixture, folder: Path) -> None:
    """Write into the run folder the resolved config, and which mixture it is for.

    Raises `MachineError` where that cannot be done.
    """
    with raise_machine_error(f"training.output_dir {folder}"):
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".") as name:  # other machines may read
            staging = Path(name)
            shutil.copyfile(mixture.folder / "manifest.json", staging / RUN_MIXTURE)
            config.save(staging / "config.yaml")
            for written in (RUN_MIXTURE, "config.yaml"):
                (staging / written).replace(folder / written)


def is_main_launcher(folder: Path) -> bool:
    """Whether this launcher started the first process of all, which writes for the others."""
    launcher = (read_json(folder / "environment.json") or {}).get("launcher")
    return launcher == [socket.gethostname(), os.getpid()]


@contextmanager
def locked(folder: Path, rendezvous: str | None = None) -> Iterator[None]:
    """Keep other runs out of a folder; launchers of the same rendezvous share it.

    The lock is the operating system's, on `run.lock`: it lasts as long as one of the launchers, or
    of the processes that `hold_lock`, lives. The last launcher to end well removes the file.

    Raises `MachineError` where a run is at work there, or the folder cannot be written.
    """
    path = folder / LOCK
    ours = {"host": socket.gethostname(), "pid": os.getpid(), "id": uuid.uuid4().hex}
    ours["rendezvous"] = rendezvous
    with raise_machine_error(f"training.output_dir {folder}"):
        folder.mkdir(parents=True, exist_ok=True)
        file = _lock_shared(path, ours)
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
            with suppress(BlockingIOError):  # others hold it still
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink()


def _lock_shared(path: Path, owner: dict[str, Any]) -> TextIO:
    """Open a lock file and take a shared lock; write `owner` into it where nobody else has one.

    For writing the lock is exclusive; nobody keeps it so, and waiting to share it takes no time.
    """
    while True:
        file = path.open("a+", encoding="utf-8")
        with suppress(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            file.truncate(0)
            file.write(json.dumps(owner))
            file.flush()
        fcntl.flock(file, fcntl.LOCK_SH)
        if os.fstat(file.fileno()).st_nlink:
            return file
        file.close()  # removed meanwhile by the run before


def hold_lock(folder: Path) -> None:
    """Share the folder's lock, where there is one, for the life of this process.

    A worker may outlive its launcher.
    """
    if (folder / LOCK).exists():
        fcntl.flock(os.open(folder / LOCK, os.O_RDONLY), fcntl.LOCK_SH)  # never closed


def write_manifest(checkpoint: Path, facts: dict[str, Any]) -> None:
    """Write the manifest of a folder's files, and have the disk take all of them."""
    files = {path.name: _describe(path) for path in sorted(checkpoint.iterdir())}
    manifest = facts | {"files": files}
    text = json.dumps(manifest | {"sha256": _hash(manifest)}, indent=1)
    (checkpoint / MANIFEST).write_text(text, encoding="utf-8")
    for path in checkpoint.iterdir():
        fsync(path)


def publish(staged: Path, folder: Path) -> None:
    """Give a checkpoint that has its manifest its place in the run folder, in one step."""
    staged.replace(folder / staged.name)
    shutil.rmtree(staged.parent)
    fsync(folder)


def fsync(path: Path) -> None:
    """Have the disk take a file's content, or the names in a folder."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def find_damage(checkpoint: Path) -> str | None:
    """Find what keeps a checkpoint from being used; None where it is whole."""
    whole = manifest(checkpoint)
    if not whole:
        return f"{MANIFEST} is missing or damaged"
    for name, written in whole["files"].items():
        try:
            now = _describe(checkpoint / name)
        except OSError as error:
            return f"{name} cannot be read ({error.strerror})"
        if now != written:
            return f"{name} has changed ({written['bytes']:,} bytes then, {now['bytes']:,} now)"
    return None


def manifest(checkpoint: Path) -> dict[str, Any]:
    """Read what a checkpoint says of itself; nothing where that is missing or damaged."""
    found = read_json(checkpoint / MANIFEST) or {}
    return found if found.pop("sha256", None) == _hash(found) else {}


def _describe(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"bytes": path.stat().st_size, "sha256": digest}


def _hash(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def step_of(checkpoint: Path) -> int:
    """Read the step from a checkpoint's name: 40 of `checkpoint-40`."""
    return int(checkpoint.name.partition("-")[2])


def checkpoints(folder: Path) -> list[Path]:
    """List what goes by the name of a checkpoint, by step."""
    found = (path for path in folder.glob("checkpoint-*") if path.name[11:].isdigit())
    return sorted(found, key=step_of)


def newest_whole(folder: Path) -> Path | None:
    """Find the newest checkpoint that is whole; damaged ones are renamed, and named in the log."""
    for checkpoint in reversed(checkpoints(folder)):
        damage = find_damage(checkpoint)
        if damage is None:
            return checkpoint
        aside = _first_free(checkpoint.with_name(f"{checkpoint.name}.broken"))
        with suppress(FileNotFoundError):  # another machine's launcher was faster
            checkpoint.rename(aside)
            logger.warning("%s: %s; set aside as %s", checkpoint, damage, aside.name)
    return None


def prune(folder: Path, limit: int) -> None:
    """Keep the newest `limit` whole checkpoints, two at least, and delete older ones of a run."""
    whole = 0
    for checkpoint in reversed(checkpoints(folder)):
        if whole >= max(limit, FEWEST):
            if manifest(checkpoint):
                shutil.rmtree(checkpoint)
        else:
            whole += find_damage(checkpoint) is None


def clear_staging(folder: Path) -> None:
    """Delete what a save that was cut off left behind."""
    for staging in folder.glob(f"{STAGING}*"):
        shutil.rmtree(staging)


def versions() -> dict[str, str]:
    """Versions of what the numbers depend on."""
    return {package: version(package) for package in PACKAGES}


def how_to_measure(folder: Path) -> str:
    """Name the command that measures a finished run and writes its page."""
    return f"python -m wuxia_core.report {quote(str(folder))} measures it and writes its page"


def resume_point(folder: Path) -> Path | None:
    """Find the checkpoint that a stopped run goes on from; None where it has to start again.

    Raises `ConfigError` where the run is finished.
    """
    if (folder / ADAPTER_WEIGHTS).exists():
        raise ConfigError(f"--resume: {folder} is finished; {how_to_measure(folder)}")
    checkpoint = newest_whole(folder)
    if checkpoint is None:
        logger.warning("--resume: no whole checkpoint in %s, so it starts again", folder)
    elif (then := manifest(checkpoint)["versions"]) != versions():
        changed = [f"{p} {then[p]} (now {now})" for p, now in versions().items() if then[p] != now]
        logger.warning("%s was saved with %s; numbers may differ", checkpoint, ", ".join(changed))
    return checkpoint


def check_unchanged(
    config: Config, folder: Path, checkpoint: Path | None, processes: int, insist: bool = False
) -> None:
    """Refuse to go on with other settings, texts or processes than the run began with.

    Raises `ConfigError` naming each that differs; who insists is only told.
    """
    written = load_config(folder / "config.yaml")
    if config.training.warmup_steps is None:
        config.training.warmup_steps = written.training.warmup_steps
    before, now = _settings(written), _settings(config)
    before["processes"] = manifest(checkpoint)["world_size"] if checkpoint else processes
    now["processes"] = processes  # --nproc times --nnodes
    differing = [f"{k}: {before[k]} then, {now[k]} now" for k in now if before[k] != now[k]]
    if manifest_of(config) != read_manifest(folder, RUN_MIXTURE):
        differing.append(f"the texts, or how they are cut, are not those in {folder}/{RUN_MIXTURE}")
    if differing:
        what = "\n  ".join([f"another run than the one in {folder}:", *differing])
        if not insist:
            raise ConfigError(f"--resume: {what}\nSet them back, or insist with --allow-changed")
        logger.warning("--allow-changed: from here on it is %s", what)


def _settings(config: Config) -> dict[str, Any]:
    """Give the settings that the adapter depends on, such as `training.seed`, by name."""
    sections = config.model_dump()
    named = {f"{s}.{key}": value for s in sections for key, value in sections[s].items()}
    return {name: v for name, v in named.items() if name == FIXED or not name.startswith(FREE)}


def read_rows(folder: Path) -> list[dict[str, Any]]:
    """Read a run's rows without what a resumed attempt did again; a row that was cut off is left.

    Of `step 1, 2, 3, resumed at 2, 3` the first 3 is dropped.
    """
    rows: list[dict[str, Any]] = []
    for line in (folder / METRICS).read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
        except ValueError:  # the process was killed while it wrote
            continue
        if row.get("event") in ("started", "resumed"):
            rows = [old for old in rows if old["step"] <= row["step"]]
        rows.append(row)
    return rows


def append(folder: Path, row: dict[str, Any]) -> None:
    """Add a row, on a line of its own also where the last one was cut off."""
    with (folder / METRICS).open("ab+") as file:
        if file.tell():
            file.seek(-1, 2)
            if file.read(1) != b"\n":
                file.write(b"\n")
        file.write(json.dumps(row).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())
