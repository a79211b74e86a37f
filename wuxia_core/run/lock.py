"""One run at a time in a run folder: a file that says who is at work there."""

import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

import psutil

from wuxia_core.errors import MachineError
from wuxia_core.mixing.staging import alone

LOCK = "run.lock"
SAME_START = 5  # seconds; a start time is reckoned from the clock, which may be set meanwhile


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
            with alone(path) as file:
                here = [h for h in _alive(file) if h["host"] == socket.gethostname()]
                if {holder["pid"] for holder in here} <= {os.getpid()}:
                    path.unlink()


def join(folder: Path) -> None:
    """Add this process to the folder's lock, where there is one: it may outlive its launcher."""
    if (folder / LOCK).exists():
        with alone(folder / LOCK) as file:
            others = _alive(file)
            file.write(_line(others[0]["rendezvous"] if others else None))


def _take(path: Path, rendezvous: str | None) -> bool:
    """Make the lock; say whether it is ours, or that of a launcher that we meet."""
    with alone(path) as file:
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
