"""The run folder: chosen, locked, opened."""

import os
import shutil
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path

from wuxia_core.config import Config
from wuxia_core.errors import ConfigError
from wuxia_core.mixing import Mixture, read_json
from wuxia_core.mixing.staging import written
from wuxia_core.run.lock import locked

ADAPTER = "adapter_model.safetensors"


def occupied(folder: Path) -> bool:
    """Whether a folder already holds a run, finished or not."""
    return (folder / "metrics.jsonl").exists() or (folder / ADAPTER).exists()


@contextmanager
def claimed(
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
    with written(f"training.output_dir {folder}"):
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as staging:  # other machines may read
            config.save(Path(staging) / "config.yaml")
            shutil.copyfile(mixture.folder / "manifest.json", Path(staging) / "mixture.json")
            for path in Path(staging).iterdir():
                path.replace(folder / path.name)


def led_here(folder: Path) -> bool:
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
    with written(f"training.output_dir {folder}"):
        folder.mkdir(parents=True, exist_ok=True)
    try:
        yield
    finally:
        if not any(folder.iterdir()):
            folder.rmdir()
