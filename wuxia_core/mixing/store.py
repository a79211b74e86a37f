"""The mixture folder: opening it, its windows as datasets, and what a build writes it with.

It does not decide what is in the folder; `mixing.build` does.
"""

import fcntl
import functools
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, TextIO

import numpy as np
import numpy.typing as npt
import pandas as pd

from wuxia_core.config import Config, effective_batch, expand, locate
from wuxia_core.errors import ConfigError, DataError, raise_machine_error
from wuxia_core.masking import Bools, Tokens, Window

TRAIN, VALIDATION, UNUSED, DUPLICATE = "train", "validation", "unused", "duplicate"
OUTLINE = ["source", "book", "chapter", "split", "characters"]

FORMAT = 5  # raise it when the folder's content changes, so that older ones are built again
MANIFEST, PREPARATION = "manifest.json", "preparation.json"
DOCUMENTS, WINDOWS = "documents.parquet", "windows.parquet"
TOKENS, WORD_STARTS = "tokens.npy", "word_starts.npy"
TEXTS = "texts"  # of a folder that becomes a mixture
FILES = {MANIFEST, PREPARATION, DOCUMENTS, WINDOWS, TOKENS, WORD_STARTS}


@dataclass(frozen=True)
class Mixture:
    """What a run trains and is judged on.

    `tokens` (N,) int32 are all documents, each behind `<|endoftext|>`, and `word_starts` (N,) bool
    flags the tokens that begin a word, both memory-mapped; `windows` has a row a chunk, as in the
    package's docstring.
    """

    tokens: Tokens
    word_starts: Bools
    windows: pd.DataFrame
    folder: Path

    @functools.cached_property
    def outline(self) -> pd.DataFrame:
        """Source, book, chapter, split and characters of each document."""
        return pd.read_parquet(self.folder / DOCUMENTS, columns=OUTLINE)

    @functools.cached_property
    def documents(self) -> pd.DataFrame:
        """The outline and the texts, which take as much memory as the corpus has."""
        return pd.read_parquet(self.folder / DOCUMENTS)

    def texts(self, numbers: Sequence[int]) -> list[str]:
        """Read the texts of some documents."""
        from pyarrow import dataset

        table = dataset.dataset(self.folder / DOCUMENTS)
        return [str(t) for t in table.take(list(numbers), columns=["text"])["text"].to_pylist()]

    def draw(self, seed: int, source: str, *splits: str) -> list[int]:
        """Put the documents of some splits in the order in which they are drawn by key."""
        outline = self.outline
        there = outline.index[(outline["source"] == source) & outline["split"].isin(splits)]
        return shuffled(there, seed, "held out")

    def training_texts(self) -> Iterator[tuple[str, str]]:
        """Read all texts that are trained on, each behind its book and chapter."""
        from pyarrow import parquet

        for batch in parquet.ParquetFile(self.folder / DOCUMENTS).iter_batches(256):
            for row in batch.to_pandas().query("split == @TRAIN").itertuples():
                yield f"{row.book} {row.chapter}".strip(), row.text

    @functools.cached_property
    def preparation(self) -> dict[str, Any]:
        """What became of each file, what was there twice, what held-out text shared."""
        return read_json(self.folder / PREPARATION) or {}

    @property
    def report(self) -> pd.DataFrame:
        """Training windows by source."""
        train = self.windows[self.windows["split"] == TRAIN]
        sources = train.assign(tokens=train["end"] - train["start"]).groupby("source")
        table = sources.agg(documents=("document", "nunique"), tokens=("tokens", "sum"))
        table["share"] = table["tokens"] / table["tokens"].sum()
        return table.sort_index(ascending=False).reset_index()


class Windows:
    """Windows as a dataset: `windows[3]` at epoch 0, `windows[2, 3]` at epoch 2.

    The epoch travels with the index, so that a worker or a resumed run needs to be told nothing.

    Attributes
    ----------
    packed : (windows,) bool
        Whether a window holds more than one chunk.
    characters : int
        Of the documents in all; 0 for training windows.
    """

    def __init__(self, mixture: Mixture, chunks: pd.DataFrame, characters: int = 0) -> None:
        self._tokens, self._word_starts = mixture.tokens, mixture.word_starts
        self._spans = chunks[["start", "end"]].to_numpy()  # in order of windows
        self._keys, counts = np.unique(chunks["window"], return_counts=True)
        self._bounds = np.append(0, np.cumsum(counts))
        self.packed = counts > 1
        self.characters = characters

    def __len__(self) -> int:
        return len(self._keys)

    def __getitem__(self, index: int | tuple[int, int]) -> Window:
        epoch, row = index if isinstance(index, tuple) else (0, index)
        spans = self._spans[self._bounds[row] : self._bounds[row + 1]]
        places = np.concatenate([np.arange(start, end) for start, end in spans])
        positions = np.concatenate([np.arange(end - start, dtype=np.int32) for start, end in spans])
        words = np.cumsum(self._word_starts[places] | (positions == 0), dtype=np.int32)
        key = int(self._keys[row])
        return Window(self._tokens[places], words, positions, key, epoch, row)


def open_mixture(folder: Path) -> Mixture:
    """Map a mixture folder into memory.

    Raises `DataError` where the folder holds none, or a damaged one.
    """
    try:
        tokens = np.load(folder / TOKENS, mmap_mode="r")
        word_starts = np.load(folder / WORD_STARTS, mmap_mode="r")
        windows = pd.read_parquet(folder / WINDOWS)
    except (OSError, ValueError) as error:
        raise DataError(f"{folder}: no whole mixture there ({error}); mix again") from None
    return Mixture(tokens, word_starts, windows, folder)


def open_run_mixture(run: Path, processed_data_file: str) -> Mixture:
    """Open the mixture that a run folder was made for.

    Raises `DataError` where another one lies there by now: what was trained on then would be held
    out now.
    """
    folder = locate(str(mixture_folder(processed_data_file)))
    wanted = read_manifest(run, "mixture.json")
    if wanted is None:
        raise DataError(f"{run}: no run folder of this project (mixture.json is missing)")
    if not is_built(folder, wanted):
        where = f"nothing is there from {Path.cwd()}; go where the run was launched, or "
        remedy = f"mix the same texts again with {run / 'config.yaml'}"
        remedy = remedy if folder.exists() else where + remedy
        raise DataError(f"{folder}: not the mixture that {run} was trained on; {remedy}")
    return open_mixture(folder)


def mixture_folder(processed_data_file: str) -> Path:
    """Turn `data/processed.jsonl`, as older files have it, into the folder `data/processed`."""
    path = expand(processed_data_file)
    return path.with_suffix("") if path.suffix == ".jsonl" else path


def train_windows(mixture: Mixture) -> Windows:
    """All training windows."""
    return Windows(mixture, mixture.windows[mixture.windows["split"] == TRAIN])


def run_steps(config: Config, windows: npt.ArrayLike, processes: int) -> Any:
    """Count the optimizer steps of a run over so many training windows."""
    epoch = np.ceil(np.divide(windows, effective_batch(config, processes)))
    steps, most = np.ceil(epoch * config.training.num_train_epochs), config.training.max_steps
    return steps if most < 0 else np.full_like(steps, most)


def held_out_windows(
    mixture: Mixture, limit: int, seed: int, most: int | None = None
) -> dict[str, Windows]:
    """Windows by source of at most `limit` held-out documents each, drawn by key.

    Of these `most` windows, drawn likewise; a document counts with the characters that its part of
    them has on average.
    """
    chosen = {}
    for source, documents in mixture.outline.query("split == @VALIDATION").groupby("source"):
        drawn = mixture.draw(seed, str(source), VALIDATION)[:limit]
        chunks = mixture.windows[mixture.windows["document"].isin(drawn)]
        kept = shuffled(chunks["window"].unique(), seed, "windows")[:most]
        sizes, part = chunks["end"] - chunks["start"], chunks["window"].isin(kept)
        shares = (sizes * part).groupby(chunks["document"]).sum()
        shares /= sizes.groupby(chunks["document"]).sum()
        characters = (documents["characters"] * shares).sum()
        if len(chunks):
            chosen[source] = Windows(mixture, chunks[part], round(characters))
    return chosen


def hash_key(seed: int, *names: object) -> str:
    """Turn a seed and names into a key to sort by: the same order on any machine."""
    return hashlib.sha256(repr((seed, *names)).encode()).hexdigest()


def shuffled(documents: Iterable[int], seed: int, *purpose: str) -> list[int]:
    """Put documents in the order in which they are drawn for a purpose."""
    return sorted(map(int, documents), key=lambda number: hash_key(seed, *purpose, number))


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other builds of a folder waiting; a process that dies lets go of the lock.

    Raises `MachineError` where the lock, or what is built, cannot be written.
    """
    with _may_fail(folder), _open_beside(folder, "lock") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextmanager
def in_use(run: Path, processed_data_file: str) -> Iterator[None]:
    """Keep the mixture of a run from being replaced while the run needs it.

    Raises `MachineError` where that cannot be noted beside the mixture.
    """
    with _open_beside(mixture_folder(processed_data_file), "users") as file:
        fcntl.flock(file, fcntl.LOCK_SH)
        print(run, file=file, flush=True)
        yield


@contextmanager
def replaceable(folder: Path) -> Iterator[None]:
    """Replace a mixture, which no run may begin to use meanwhile.

    Raises `ConfigError` where one uses it, naming the runs that share it.
    """
    with _open_beside(folder, "users") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            runs = ", ".join(dict.fromkeys(file.read().splitlines()))
            remedy = "wait for its end, or name another folder"
            what = f"the mixture there is in use, by {runs}, and this one differs"
            raise ConfigError(f"data.processed_data_file {folder}: {what}; {remedy}") from None
        file.truncate(0)
        yield


def _may_fail(folder: Path) -> AbstractContextManager[None]:
    return raise_machine_error(f"data.processed_data_file {folder}")


def _open_beside(folder: Path, kind: str) -> TextIO:
    with _may_fail(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        return folder.with_name(f".{folder.name}.{kind}").open("a+", encoding="utf-8")


@contextmanager
def staged(folder: Path) -> Iterator[Path]:
    """Give a folder to write into, which takes the place of `folder` when all went well.

    A folder that is not empty cannot be replaced in one step: it is moved aside, and deleted once
    the new one is in its place. What a killed build left behind is mended before and after.
    """
    staging = folder.with_name(f".{folder.name}-building")
    new, old = staging / "new", staging / "old"
    try:
        _mend(folder, staging)
        new.mkdir(parents=True)
        yield new
        if folder.exists():
            folder.replace(old)
        new.replace(folder)
    finally:
        _mend(folder, staging)


def _mend(folder: Path, staging: Path) -> None:
    """Put back a folder that was moved aside and not replaced; delete the rest."""
    if (staging / "old").exists() and not folder.exists():
        (staging / "old").replace(folder)
    shutil.rmtree(staging, ignore_errors=True)


class Texts:
    """A list of texts in a file; `texts[3] = text` writes it at the end, also to replace one."""

    def __init__(self, file: IO[bytes], spans: Iterable[tuple[int, int]] = ()) -> None:
        self._file = file
        self.spans = list(spans)  # first byte, bytes

    def __setitem__(self, number: int, text: str) -> None:
        span = self._file.seek(0, os.SEEK_END), self._file.write(text.encode("utf-8"))
        self.spans[number : number + 1] = [span]  # one behind the last makes the list longer

    def __getitem__(self, number: int) -> str:
        start, size = self.spans[number]
        self._file.seek(start)
        return self._file.read(size).decode("utf-8")


def is_built(folder: Path, manifest: dict[str, Any]) -> bool:
    """Whether a folder holds the whole mixture that a manifest describes."""
    whole = all((folder / name).is_file() for name in FILES)
    return whole and read_manifest(folder) == manifest


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
