"""The run folder: chosen, locked, opened."""

import hashlib
import json
import logging
import os
import shutil
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from itertools import count
from pathlib import Path
from typing import Any, TextIO

import psutil

from wuxia_core.config import Config, load_config
from wuxia_core.errors import ConfigError, MachineError, raise_machine_error
from wuxia_core.mixing import Mixture, exclusive_lock, manifest_of, read_json, read_manifest

ADAPTER = "adapter_model.safetensors"
LOCK = "run.lock"
SAME_START = 5  # seconds; a start time is reckoned from the clock, which may be set meanwhile
MANIFEST = "MANIFEST.json"
KEPT = 2  # checkpoints that are never pruned, so that one that is damaged can be done without
STAGING = ".tmp-step-"

logger = logging.getLogger(__name__)
PACKAGES = ("torch", "transformers", "peft", "accelerate", "numpy")
FREE = (  # do not touch the adapter
    "plan.", "training.output_dir", "evaluation.minutes", "evaluation.wits_margin",
    "evaluation.general_margin", "evaluation.max_copied", "evaluation.max_extracted",
)  # fmt: skip
METRICS = "metrics.jsonl"


def occupied(folder: Path) -> bool:
    """Whether a folder already holds a run, finished or not."""
    return (folder / "metrics.jsonl").exists() or (folder / ADAPTER).exists()


@contextmanager
def acquire(
    config: Config, *, named: bool, resume: bool, rendezvous: str | None = None
) -> Iterator[Path]:
    """Choose the run folder and keep others out of it.

    It is the one that was named, or the first free one of `sample`, `sample-2` and so on; to go on
    with a run, the newest of these that is not finished.

    Raises `ConfigError` where the folder holds a run that is not to go on, or none that could;
    `MachineError` where another run is at work there, or it cannot be written.
    """
    wanted = Path(config.training.output_dir).expanduser()
    folder = wanted if named else _newest(wanted) if resume else _first_free(wanted)
    if occupied(folder) and not resume:
        raise ConfigError(
            f"training.output_dir {folder}: already holds a run, which is never overwritten; go on "
            "with it (--resume), or name another folder with --set training.output_dir=..."
        )
    if resume and not occupied(folder):
        raise ConfigError(f"--resume: no run in {folder}; name its folder or leave --resume out")
    with _made(folder), locked(folder, rendezvous):
        yield folder


def open_folder(config: Config, mixture: Mixture, folder: Path) -> None:
    """Write into the run folder the resolved config, and which mixture it is for.

    Raises `MachineError` where that cannot be done.
    """
    with raise_machine_error(f"training.output_dir {folder}"):
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as staging:  # other machines may read
            config.save(Path(staging) / "config.yaml")
            shutil.copyfile(mixture.folder / "manifest.json", Path(staging) / "mixture.json")
            for path in Path(staging).iterdir():
                path.replace(folder / path.name)


def is_main_launcher(folder: Path) -> bool:
    """Whether this launcher started the first process of all, which writes for the others."""
    launcher = (read_json(folder / "environment.json") or {}).get("launcher")
    return launcher == [socket.gethostname(), os.getpid()]


def _numbered(folder: Path) -> Iterator[Path]:
    yield folder
    yield from (folder.with_name(f"{folder.name}-{number}") for number in count(2))


def _first_free(folder: Path) -> Path:
    return next(path for path in _numbered(folder) if not path.exists() or not any(path.iterdir()))


def _newest(folder: Path) -> Path:
    """Find the last of the numbered folders whose run is not finished; the first without any."""
    newest = folder
    for path in _numbered(folder):
        if not path.exists():
            return newest
        if occupied(path) and not (path / ADAPTER).exists():
            newest = path
    raise AssertionError("numbers do not end")


@contextmanager
def _made(folder: Path) -> Iterator[None]:
    """Make a folder, and remove it where nothing came of it."""
    with raise_machine_error(f"training.output_dir {folder}"):
        folder.mkdir(parents=True, exist_ok=True)
    try:
        yield
    finally:
        if not any(folder.iterdir()):
            folder.rmdir()


@contextmanager
def locked(folder: Path, rendezvous: str | None = None) -> Iterator[None]:
    """Keep other runs out of a folder; launchers of the same rendezvous share it.

    Raises `MachineError` where a run is at work there, or the folder cannot be written. A lock
    whose processes are all dead is taken over.
    """
    path = folder / LOCK
    ours = _take(path, rendezvous)
    try:
        yield
    finally:
        if ours:
            with exclusive_lock(path) as file:
                here = [h for h in _alive(file) if h["host"] == socket.gethostname()]
                if {holder["pid"] for holder in here} <= {os.getpid()}:
                    path.unlink()


def join(folder: Path) -> None:
    """Add this process to the folder's lock, where there is one: it may outlive its launcher."""
    if (folder / LOCK).exists():
        with exclusive_lock(folder / LOCK) as file:
            others = _alive(file)
            file.write(_line(others[0]["rendezvous"] if others else None))


def _take(path: Path, rendezvous: str | None) -> bool:
    """Make the lock; say whether it is ours, or that of a launcher that we meet."""
    with exclusive_lock(path) as file:
        alive = _alive(file)
        if rendezvous and rendezvous in [holder["rendezvous"] for holder in alive]:
            return False
        if alive:
            raise MachineError(_refusal(path, alive[0]))
        file.truncate(0)
        file.write(_line(rendezvous))
    return True


def _line(rendezvous: str | None) -> str:
    me = psutil.Process()
    facts = {"host": socket.gethostname(), "pid": me.pid, "started": me.create_time()}
    return json.dumps(facts | {"rendezvous": rendezvous}) + "\n"


def _alive(file: TextIO) -> list[dict[str, Any]]:
    """List the processes that a lock names and that still run."""
    file.seek(0)
    holders = []
    for line in file:
        try:
            holders.append(json.loads(line))
        except ValueError:  # cut off with its machine
            continue
    return [holder for holder in holders if _runs(holder)]


def _runs(holder: dict[str, Any]) -> bool:
    """Whether a process still runs; one on another machine is taken to."""
    if holder["host"] != socket.gethostname():
        return True
    try:
        process = psutil.Process(holder["pid"])
        same = abs(process.create_time() - holder["started"]) < SAME_START
        return same and process.status() != "zombie"
    except psutil.NoSuchProcess:
        return False


def _refusal(path: Path, holder: dict[str, Any]) -> str:
    return (
        f"{path.parent}: a run is at work there (process {holder['pid']} on {holder['host']}); "
        "wait for it, stop it, or name another training.output_dir. If that machine is gone, "
        f"delete {path}"
    )


def write_manifest(checkpoint: Path, facts: dict[str, Any]) -> None:
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


def find_damage(checkpoint: Path) -> str | None:
    """Find what keeps a checkpoint from being used; None where it is whole."""
    manifest = read_json(checkpoint / MANIFEST)
    if manifest is None or manifest.pop("sha256", None) != _hash(manifest):
        return f"{MANIFEST} is missing or damaged"
    try:
        return next((said for said in _damaged_files(checkpoint, manifest["files"]) if said), None)
    except OSError as error:
        return f"cannot be read ({error.strerror})"


def _hash(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _damaged_files(checkpoint: Path, files: dict[str, Any]) -> Iterator[str]:
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
        found = find_damage(checkpoint)
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
        whole += find_damage(checkpoint) is None


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


def resume_point(folder: Path) -> Path | None:
    """Find the checkpoint that a stopped run goes on from; None where it has to start again.

    Raises `ConfigError` where the run is finished.
    """
    if (folder / ADAPTER).exists():
        raise ConfigError(
            f"--resume: {folder} is finished; python -m wuxia_core.evaluate {folder} measures it"
        )
    checkpoint = newest_whole(folder)
    if checkpoint is None:
        logger.warning("--resume: no whole checkpoint in %s, so it starts again", folder)
    elif (then := manifest(checkpoint)["versions"]) != versions():
        changed = [f"{p} {then[p]} (now {now})" for p, now in versions().items() if then[p] != now]
        logger.warning("%s was saved with %s; numbers may differ", checkpoint, ", ".join(changed))
    return checkpoint


def versions() -> dict[str, str]:
    """Versions of what the numbers depend on."""
    return {package: version(package) for package in PACKAGES}


def check_unchanged(
    config: Config, folder: Path, checkpoint: Path | None, processes: int, insist: bool = False
) -> None:
    """Refuse to go on with other settings, texts or processes than the run began with.

    Raises `ConfigError` naming each that differs; who insists is only told.
    """
    before = load_config(folder / "config.yaml")
    differing = list(_settings(before, config))
    was = manifest(checkpoint)["world_size"] if checkpoint else processes
    if was != processes:
        differing.append(f"processes: {was} then, {processes} now (--nproc, --nnodes)")
    if manifest_of(config) != read_manifest(folder, "mixture.json"):
        differing.append(f"the texts, or how they are cut, are not those in {folder}/mixture.json")
    if differing:
        what = "\n  ".join(differing)
        if insist:
            logger.warning("--allow-changed: from here on it is another run:\n  %s", what)
            return
        raise ConfigError(
            f"--resume: this would be another run than the one in {folder}:\n  {what}\n"
            "Set them back, or insist with --allow-changed"
        )


def manifest(checkpoint: Path) -> dict[str, Any]:
    """Read what a whole checkpoint says of itself."""
    facts: dict[str, Any] = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))
    return facts


def _settings(before: Config, now: Config) -> Iterator[str]:
    """Name the settings that differ."""
    for (section, then), current in zip(before, dict(now).values(), strict=True):
        for (key, old), new in zip(then, dict(current).values(), strict=True):
            name = f"{section}.{key}"
            if old != new and not name.startswith(FREE):
                yield f"{name}: {old} then, {new} now"


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
