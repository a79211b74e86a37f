"""The mixture folder: opening it, its windows as datasets, and the tools that a build writes with.

What is in the folder is decided by `mixing.build`.
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

# Splits of documents. UNUSED is training text without a window (too short, of weight 0, or general
# text beyond what the ratio takes); DUPLICATE is a copy of another book, or empty.
TRAIN, VALIDATION, UNUSED, DUPLICATE = "train", "validation", "unused", "duplicate"
OUTLINE = ["source", "book", "chapter", "split", "characters"]  # documents' columns but the text

FORMAT = 5  # raise it when the folder's content changes, so that older ones are built again
MANIFEST, PREPARATION = "manifest.json", "preparation.json"
RUN_MIXTURE = "mixture.json"  # a run folder's copy of the manifest; without one it is no run's
DOCUMENTS, WINDOWS = "documents.parquet", "windows.parquet"
TOKENS, WORD_STARTS = "tokens.npy", "word_starts.npy"
TEXTS = "texts"  # the file of a build's `Texts`
FILES = {MANIFEST, PREPARATION, DOCUMENTS, WINDOWS, TOKENS, WORD_STARTS}


@dataclass(frozen=True)
class Mixture:
    """An opened mixture folder: the documents that a run trains on and is judged on.

    `tokens` (N,) int32 are those of all documents, each behind `<|endoftext|>`, and `word_starts`
    (N,) bool flags the tokens that begin a word; both are memory-mapped. `windows` has a row for
    each chunk, with the columns that the package's docstring lists.
    """

    tokens: Tokens
    word_starts: Bools
    windows: pd.DataFrame
    folder: Path

    @functools.cached_property
    def outline(self) -> pd.DataFrame:
        """A table of all documents without their texts; its columns are those in `OUTLINE`."""
        return pd.read_parquet(self.folder / DOCUMENTS, columns=OUTLINE)

    @functools.cached_property
    def documents(self) -> pd.DataFrame:
        """The table of all documents with their texts, which takes as much memory as the corpus."""
        return pd.read_parquet(self.folder / DOCUMENTS)

    def texts(self, numbers: Sequence[int]) -> list[str]:
        """Read the texts of documents, given by their numbers: rows of `outline`."""
        from pyarrow import dataset

        table = dataset.dataset(self.folder / DOCUMENTS)
        return [str(t) for t in table.take(list(numbers), columns=["text"])["text"].to_pylist()]

    def draw(self, seed: int, source: str, *splits: str) -> list[int]:
        """List the numbers of a source's documents in some splits, shuffled by `seed`."""
        outline = self.outline  # a row a document, without the texts
        chosen = outline.index[(outline["source"] == source) & outline["split"].isin(splits)]
        return shuffled(chosen, seed, "held out")

    def training_texts(self) -> Iterator[tuple[str, str]]:
        """Yield a title, of book and chapter, and the text of each document that is trained on."""
        from pyarrow import parquet

        for batch in parquet.ParquetFile(self.folder / DOCUMENTS).iter_batches(256):
            for row in batch.to_pandas().query("split == @TRAIN").itertuples():
                yield f"{row.book} {row.chapter}".strip(), row.text

    @functools.cached_property
    def preparation(self) -> dict[str, Any]:
        """What became of each file, which copies were found, what held-out text shared."""
        return read_json(self.folder / PREPARATION) or {}

    @property
    def report(self) -> pd.DataFrame:
        """Documents and tokens that are trained on, and share of these tokens: a row a source."""
        train = self.windows[self.windows["split"] == TRAIN]
        sources = train.assign(tokens=train["end"] - train["start"]).groupby("source")
        table = sources.agg(documents=("document", "nunique"), tokens=("tokens", "sum"))
        table["share"] = table["tokens"] / table["tokens"].sum()
        return table.sort_index(ascending=False).reset_index()


class Windows:
    """Windows as a dataset: `windows[3]` at epoch 0, `windows[2, 3]` at epoch 2.

    The index bears the epoch, so that a worker process or a resumed run need not be told of it.

    Attributes
    ----------
    packed : (windows,) bool
        Whether a window holds more than one chunk.
    characters : int
        Characters of the text in all windows together; 0 for training windows.
    """

    def __init__(self, mixture: Mixture, chunks: pd.DataFrame, characters: int = 0) -> None:
        self._tokens, self._word_starts = mixture.tokens, mixture.word_starts
        self._spans = chunks[["start", "end"]].to_numpy()  # `pack` sorts by window
        # the numbers of the windows, by which their masks are drawn
        self._keys, counts = np.unique(chunks["window"], return_counts=True)
        self._bounds = np.append(0, np.cumsum(counts))  # each window's first span, and the end
        self.packed = counts > 1
        self.characters = characters

    def __len__(self) -> int:
        return len(self._keys)

    def __getitem__(self, index: int | tuple[int, int]) -> Window:
        """Join the chunks of a window; `index` is its row, or (epoch, row)."""
        epoch, row = index if isinstance(index, tuple) else (0, index)
        spans = self._spans[self._bounds[row] : self._bounds[row + 1]]
        places = np.concatenate([np.arange(start, end) for start, end in spans])
        positions = np.concatenate([np.arange(end - start, dtype=np.int32) for start, end in spans])
        words = np.cumsum(self._word_starts[places] | (positions == 0), dtype=np.int32)
        key = int(self._keys[row])
        return Window(self._tokens[places], words, positions, key, epoch, row)


def open_mixture(folder: Path) -> Mixture:
    """Open a mixture folder; the tokens are mapped into memory, not read.

    Raises `DataError` where the folder holds no mixture, or a damaged one.
    """
    try:
        tokens = np.load(folder / TOKENS, mmap_mode="r")
        word_starts = np.load(folder / WORD_STARTS, mmap_mode="r")
        windows = pd.read_parquet(folder / WINDOWS)
    except (OSError, ValueError) as error:
        raise DataError(f"{folder}: no whole mixture there ({error}); mix again") from None
    return Mixture(tokens, word_starts, windows, folder)


def open_run_mixture(run: Path, processed_data_file: str) -> Mixture:
    """Open the mixture that the run in the folder `run` was made for.

    Raises `DataError` where the mixture's folder holds another one by now: texts that the run was
    trained on could be held out in that one.
    """
    folder = locate(str(mixture_folder(processed_data_file)))
    manifest = read_manifest(run, RUN_MIXTURE)
    if manifest is None:
        raise DataError(f"{run}: no run folder of this project ({RUN_MIXTURE} is missing)")
    if not is_built(folder, manifest):
        absent = f"nothing is there from {Path.cwd()}; go where the run was launched, or "
        remedy = f"mix the same texts again with {run / 'config.yaml'}"
        remedy = remedy if folder.exists() else absent + remedy
        raise DataError(f"{folder}: not the mixture that {run} was trained on; {remedy}")
    return open_mixture(folder)


def mixture_folder(processed_data_file: str) -> Path:
    """Give the mixture's folder: of `data/processed.jsonl`, as in old configs, `data/processed`."""
    path = expand(processed_data_file)
    return path.with_suffix("") if path.suffix == ".jsonl" else path


def train_windows(mixture: Mixture) -> Windows:
    """Select the training windows of a mixture."""
    return Windows(mixture, mixture.windows[mixture.windows["split"] == TRAIN])


def run_steps(config: Config, windows: npt.ArrayLike, processes: int) -> Any:
    """Count the optimizer steps of a run over so many training windows, a number or an array."""
    training, batch = config.training, effective_batch(config, processes)
    steps = np.ceil(np.ceil(np.divide(windows, batch)) * training.num_train_epochs)
    return steps if training.max_steps < 0 else np.full_like(steps, training.max_steps)


def held_out_windows(
    mixture: Mixture, limit: int, seed: int, max_windows: int | None = None
) -> dict[str, Windows]:
    """Draw held-out documents, at most `limit` of each source; give their windows by source.

    Of each source's windows at most `max_windows` are drawn and the others left out. The attribute
    `characters` then counts of each document the share of its tokens that is in drawn windows.
    """
    windows = {}
    for source, documents in mixture.outline.query("split == @VALIDATION").groupby("source"):
        drawn = mixture.draw(seed, str(source), VALIDATION)[:limit]
        chunks = mixture.windows[mixture.windows["document"].isin(drawn)]
        numbers = shuffled(chunks["window"].unique(), seed, "windows")[:max_windows]
        tokens, is_drawn = chunks["end"] - chunks["start"], chunks["window"].isin(numbers)
        shares = (tokens * is_drawn).groupby(chunks["document"]).sum()
        shares /= tokens.groupby(chunks["document"]).sum()
        characters = (documents["characters"] * shares).sum()  # no share: not drawn
        if len(chunks):
            windows[source] = Windows(mixture, chunks[is_drawn], round(characters))
    return windows


def hash_key(seed: int, *names: object) -> str:
    """Hash a seed and names, in hexadecimal; sorting by hashes shuffles alike on any machine."""
    return hashlib.sha256(repr((seed, *names)).encode()).hexdigest()


def shuffled(numbers: Iterable[int], seed: int, *purpose: str) -> list[int]:
    """Shuffle numbers; the order depends only on the seed, the purpose and the numbers."""
    return sorted(map(int, numbers), key=lambda number: hash_key(seed, *purpose, number))


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Make other builds of a folder wait; the lock ends with the process at the latest.

    Raises `MachineError` where the lock, or a file that is written inside, cannot be written.
    """
    with _may_fail(folder), _open_beside(folder, "lock") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextmanager
def in_use(run: Path, processed_data_file: str) -> Iterator[None]:
    """Keep the mixture of the run in the folder `run` from being replaced while it is needed.

    The run's name is written into a file beside the mixture, for the message of `replaceable`.
    Raises `MachineError` where this file cannot be written.
    """
    with _open_beside(mixture_folder(processed_data_file), "users") as file:
        fcntl.flock(file, fcntl.LOCK_SH)
        print(run, file=file, flush=True)
        yield


@contextmanager
def replaceable(folder: Path) -> Iterator[None]:
    """Keep runs from beginning to use a mixture while it is replaced.

    Raises `ConfigError`, naming the runs, where some use it already.
    """
    with _open_beside(folder, "users") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            runs = ", ".join(dict.fromkeys(file.read().splitlines()))
            remedy = "wait for its end, or name another folder"
            reason = f"the mixture there is in use, by {runs}, and this one differs"
            raise ConfigError(f"data.processed_data_file {folder}: {reason}; {remedy}") from None
        file.truncate(0)
        yield


def _may_fail(folder: Path) -> AbstractContextManager[None]:
    """Turn errors of writing inside into `MachineError` with the name of the mixture's folder."""
    return raise_machine_error(f"data.processed_data_file {folder}")


def _open_beside(folder: Path, kind: str) -> TextIO:
    """Open a hidden file beside a folder: `data/.mixed.lock` for `data/mixed` and "lock"."""
    with _may_fail(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        return folder.with_name(f".{folder.name}.{kind}").open("a+", encoding="utf-8")


@contextmanager
def staged(folder: Path) -> Iterator[Path]:
    """Yield an empty folder to write into; if no error is raised, it takes the place of `folder`.

    A folder that is not empty cannot be replaced in one step: the old one is moved aside first.
    Where an error or a kill comes between the two steps, it is put back, by the next build at the
    latest.
    """
    staging = folder.with_name(f".{folder.name}-building")
    new, old = staging / "new", staging / "old"
    try:
        _restore_or_clear(folder, staging)
        new.mkdir(parents=True)
        yield new
        if folder.exists():
            folder.replace(old)
        new.replace(folder)
    finally:
        _restore_or_clear(folder, staging)


def _restore_or_clear(folder: Path, staging: Path) -> None:
    """Delete `staging`, but put back an old folder there that no new one has replaced."""
    if (staging / "old").exists() and not folder.exists():
        (staging / "old").replace(folder)
    shutil.rmtree(staging, ignore_errors=True)


class Texts:
    """A list of texts in a file: `texts[3]` reads one, `texts[3] = text` adds or replaces one.

    A text is always written at the end of the file, and `spans` then points there.
    """

    def __init__(self, file: IO[bytes], spans: Iterable[tuple[int, int]] = ()) -> None:
        self._file = file
        self.spans = list(spans)  # of each text: its first byte in the file, its bytes

    def __setitem__(self, number: int, text: str) -> None:
        span = self._file.seek(0, os.SEEK_END), self._file.write(text.encode("utf-8"))
        self.spans[number : number + 1] = [span]  # with number = len(spans) it is appended

    def __getitem__(self, number: int) -> str:
        start, size = self.spans[number]
        self._file.seek(start)
        return self._file.read(size).decode("utf-8")


def is_built(folder: Path, manifest: dict[str, Any]) -> bool:
    """Whether a folder holds the complete mixture that a manifest describes."""
    is_complete = all((folder / name).is_file() for name in FILES)
    return is_complete and read_manifest(folder) == manifest


def read_manifest(folder: Path, name: str = MANIFEST) -> dict[str, Any] | None:
    """Read a mixture's manifest: what it was built from. None if it is missing or damaged."""
    manifest = read_json(folder / name)
    return manifest if manifest and "inputs" in manifest else None


def read_json(path: Path) -> dict[str, Any] | None:
    """Read a JSON object from a file; None if the file is missing or holds none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None
