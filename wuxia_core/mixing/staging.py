"""Files that grow while a mixture is built, so that no more than a piece of it is in memory."""

import fcntl
import os
import shutil
import tempfile
from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Self, TextIO

import numpy as np
import numpy.typing as npt

from wuxia_core.errors import MachineError


@contextmanager
def written(what: str) -> Iterator[None]:
    """Raise `MachineError` where something cannot be written in here."""
    try:
        yield
    except OSError as error:
        raise MachineError(
            f"{what}: cannot be written ({error.strerror}); free some space or name another folder"
        ) from None


@contextmanager
def alone(path: Path) -> Iterator[TextIO]:
    """Open a file for this process alone; others wait, and a process that dies lets go of it.

    Raises `MachineError` where it cannot be written.
    """
    with written(str(path.parent)):
        path.parent.mkdir(parents=True, exist_ok=True)
        while True:
            with path.open("a+", encoding="utf-8") as file:
                fcntl.flock(file, fcntl.LOCK_EX)
                if path.exists() and path.stat().st_ino == os.fstat(file.fileno()).st_ino:
                    yield file
                    return


@contextmanager
def staged(folder: Path) -> Iterator[Path]:
    """Give a folder to write into that takes the place of `folder` when all went well.

    Raises `MachineError` where it cannot be written.
    """
    with written(f"data.processed_data_file {folder}"):
        folder.parent.mkdir(parents=True, exist_ok=True)
        prefix = f".{folder.name}-building-"
        for left in folder.parent.glob(f"{prefix}*"):  # by a process that was killed
            shutil.rmtree(left)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=prefix) as name:
            staging = Path(name) / folder.name
            staging.mkdir()
            yield staging
            if folder.exists():
                folder.rename(Path(name) / "before")
            staging.replace(folder)


class Texts:
    """Texts in a file: `texts.append(text)`, `texts[3]`; `texts[3] = text` writes it at the end."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("w+b")
        self._places: array[int] = array("q")
        self._sizes: array[int] = array("q")  # bytes

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def append(self, text: str) -> None:
        """Write a text behind the others."""
        self._places.append(0)
        self._sizes.append(0)
        self[-1] = text

    def __setitem__(self, number: int, text: str) -> None:
        data = text.encode("utf-8")
        self._places[number] = self._file.seek(0, 2)
        self._sizes[number] = self._file.write(data)

    def __getitem__(self, number: int) -> str:
        self._file.seek(self._places[number])
        return self._file.read(self._sizes[number]).decode("utf-8")


class ArrayFile:
    """A .npy file of one dimension that grows."""

    def __init__(self, path: Path, dtype: npt.DTypeLike) -> None:
        self._file = path.open("wb")
        self._dtype = np.dtype(dtype)
        self.length = 0
        self._write_header()

    def append(self, values: npt.NDArray[np.generic]) -> None:
        """Write values behind the others."""
        self._file.write(np.asarray(values, self._dtype).tobytes())
        self.length += len(values)

    def close(self) -> None:
        """Write how many there are; numpy leaves room in the header for that."""
        self._file.seek(0)
        self._write_header()
        self._file.close()

    def _write_header(self) -> None:
        np.lib.format.write_array_header_1_0(
            self._file, {"descr": self._dtype.str, "fortran_order": False, "shape": (self.length,)}
        )
