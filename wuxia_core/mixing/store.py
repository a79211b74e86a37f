"""The mixture folder: opening it, its windows as datasets, and the tools that a build writes with.

The module `mixing.build` decides what is in the folder.
"""

import fcntl
import functools
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, TextIO

import numpy as np
import numpy.typing as npt
import pandas as pd

from wuxia_core.config import Config, effective_batch, expand, locate
from wuxia_core.errors import ConfigError, DataError, raise_machine_error
from wuxia_core.masking import Bools, Tokens, Window

# Values of the column `split`. UNUSED is training text without a window (too short, of weight 0, or
# general text beyond what the ratio takes); DUPLICATE is a copy of another book, or empty.
TRAIN, VALIDATION, UNUSED, DUPLICATE = "train", "validation", "unused", "duplicate"
# All columns of documents.parquet but `text`.
OUTLINE = ["source", "book", "chapter", "split", "characters"]

FORMAT = 8  # raise it when the code writes other content, so that older folders are built again
MANIFEST, PREPARATION = "manifest.json", "preparation.json"
RUN_MIXTURE = "mixture.json"  # a run folder's copy of the manifest; other folders have none
DOCUMENTS, WINDOWS = "documents.parquet", "windows.parquet"
TOKENS, WORD_STARTS = "tokens.npy", "word_starts.npy"
TEXTS = "texts"  # the file of a build's `Texts`, in a folder of its own
FILES = {MANIFEST, PREPARATION, DOCUMENTS, WINDOWS, TOKENS, WORD_STARTS}  # of a mixture folder


@dataclass(frozen=True)
class Mixture:
    """An opened mixture folder: the documents that a run trains on and is judged on.

    `tokens`, (N,) int32, are the tokens of all documents, each document behind `<|endoftext|>`.
    `word_starts`, (N,) bool, flags the tokens that begin a word. Both are memory-mapped. `windows`
    has a row for each chunk, with the columns that the docstring of `mixing` lists.
    """

    tokens: Tokens
    word_starts: Bools
    windows: pd.DataFrame
    folder: Path

    @functools.cached_property
    def outline(self) -> pd.DataFrame:
        """The table of all documents without their texts; its columns are those in `OUTLINE`."""
        return pd.read_parquet(self.folder / DOCUMENTS, columns=OUTLINE)

    @functools.cached_property
    def documents(self) -> pd.DataFrame:
        """The table of all documents with their texts, which takes as much memory as the corpus."""
        return pd.read_parquet(self.folder / DOCUMENTS)

    def texts(self, numbers: Sequence[int]) -> list[str]:
        """Read the texts of the documents `numbers` (rows of `outline`), in that order."""
        from pyarrow import dataset

        table = dataset.dataset(self.folder / DOCUMENTS)
        return [str(t) for t in table.take(list(numbers), columns=["text"])["text"].to_pylist()]

    def draw(self, seed: int, source: str, *splits: str) -> list[int]:
        """List the numbers of the documents of `source` in any of `splits`, shuffled by `seed`."""
        chosen = self.outline.query("source == @source and split in @splits").index
        return shuffled(chosen, seed, "held out")  # the order does not depend on `splits`

    def training_texts(self) -> Iterator[tuple[str, str]]:
        """Yield `(book and chapter, text)` of each document that is trained on."""
        from pyarrow import parquet

        for batch in parquet.ParquetFile(self.folder / DOCUMENTS).iter_batches(256):
            for row in batch.to_pandas().query("split == @TRAIN").itertuples():
                yield f"{row.book} {row.chapter}".strip(), row.text

    @functools.cached_property
    def preparation(self) -> dict[str, Any]:
        """What became of each file, which copies were found, what held-out text shared.

        The content of preparation.json; `{}` if that file is missing or damaged.
        """
        return read_json(self.folder / PREPARATION) or {}

    @property
    def report(self) -> pd.DataFrame:
        """What an epoch trains on: a row for each `source` with `documents`, `tokens` and `share`.

        `documents` is the number of documents. `tokens` is the number of tokens; a text counts as
        often as it is trained on in an epoch. `share` is the source's share of all these tokens.
        The row of "wuxia" comes first.
        """
        train = self.windows[self.windows["split"] == TRAIN]
        sources = train.assign(tokens=train["end"] - train["start"]).groupby("source")
        table = sources.agg(documents=("document", "nunique"), tokens=("tokens", "sum"))
        table["share"] = table["tokens"] / table["tokens"].sum()
        return table.sort_index(ascending=False).reset_index()


class Windows:
    """Windows as a dataset: `windows[3]` at epoch 0, `windows[2, 3]` at epoch 2.

    The epoch is part of the index, so a worker process or a resumed run need not be told of it.

    Parameters
    ----------
    mixture : Mixture
        The mixture that has the tokens of the chunks.
    chunks : DataFrame
        Rows of `mixture.windows`, sorted by window: all chunks of the windows in the dataset.
    characters : int
        See the attribute.

    Attributes
    ----------
    packed : (windows,) bool
        Whether a window holds more than one chunk.
    characters : int
        Characters of the text in all windows together; 0 for training windows.
    """

    def __init__(self, mixture: Mixture, chunks: pd.DataFrame, characters: int = 0) -> None:
        self._tokens, self._word_starts = mixture.tokens, mixture.word_starts
        self._spans = chunks[["start", "end"]].to_numpy()  # (chunks, 2)
        # the windows' numbers in the mixture, on which the random draws of their masks depend
        self._keys, counts = np.unique(chunks["window"], return_counts=True)
        # window n has the chunks from bounds[n] to bounds[n + 1]
        self._bounds = np.append(0, np.cumsum(counts))
        self.packed = counts > 1
        self.characters = characters

    def __len__(self) -> int:
        return len(self._keys)

    def __getitem__(self, index: int | tuple[int, int]) -> Window:
        """Join a window's chunks to a `masking.Window`; `index` is its row, or (epoch, row)."""
        epoch, row = index if isinstance(index, tuple) else (0, index)
        spans = self._spans[self._bounds[row] : self._bounds[row + 1]]
        places = np.concatenate([np.arange(start, end) for start, end in spans])
        positions = np.concatenate([np.arange(end - start, dtype=np.int32) for start, end in spans])
        # the first token of a chunk begins a word, even if the chunk was cut inside a word
        words = np.cumsum(self._word_starts[places] | (positions == 0), dtype=np.int32)
        key = int(self._keys[row])
        return Window(self._tokens[places], words, positions, key, epoch, row)


def open_mixture(folder: Path) -> Mixture:
    """Open a mixture folder; the tokens are mapped into memory, not read.

    Raises `DataError` if a file in the folder is missing or damaged.
    """
    try:
        tokens = np.load(folder / TOKENS, mmap_mode="r")
        word_starts = np.load(folder / WORD_STARTS, mmap_mode="r")
        mixture = Mixture(tokens, word_starts, pd.read_parquet(folder / WINDOWS), folder)
        if mixture.outline.empty or not mixture.preparation:
            raise ValueError(f"{DOCUMENTS} or {PREPARATION}")
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"{folder}: no whole mixture there ({error}); mix again") from None
    return mixture


def open_run_mixture(run: Path, processed_data_file: str) -> Mixture:
    """Open the mixture that the run in the folder `run` was trained on.

    `processed_data_file` is the key `data.processed_data_file` of the run's config. Raises
    `DataError` if `run` is no run folder, or if the mixture is missing, damaged or replaced
    by another one: texts that the run was trained on could be held out in that one.
    """
    folder = locate(str(mixture_folder(processed_data_file)))
    manifest = read_manifest(run, RUN_MIXTURE)
    if manifest is None:
        raise DataError(f"{run}: no run folder of this project ({RUN_MIXTURE} is missing)")
    mixture = open_built(folder, manifest)
    if mixture is None:
        absent = f"nothing is there from {Path.cwd()}; go where the run was launched, or "
        place = "" if folder.exists() else absent  # the path may be relative to another folder
        remedy = f"{place}mix the same texts again with {run / 'config.yaml'}"
        raise DataError(f"{folder}: not the mixture that {run} was trained on; {remedy}")
    return mixture


def mixture_folder(processed_data_file: str) -> Path:
    """Return the mixture's folder: `data/a` for `data/a`, and for `data/a.jsonl` of old configs."""
    path = expand(processed_data_file)
    return path.with_suffix("") if path.suffix == ".jsonl" else path


def train_windows(mixture: Mixture) -> Windows:
    """Return the training windows of a mixture as a dataset."""
    return Windows(mixture, mixture.windows[mixture.windows["split"] == TRAIN])


def run_steps(config: Config, windows: npt.ArrayLike, processes: int) -> Any:
    """Count the optimizer steps of a whole run on `processes` processes.

    `windows` is the number of training windows in an epoch, or an array of such numbers; the steps
    are then an array too. If `training.max_steps` is not negative, it is the number of steps.
    """
    training, batch = config.training, effective_batch(config, processes)
    steps = np.ceil(np.ceil(np.divide(windows, batch)) * training.num_train_epochs)
    return steps if training.max_steps < 0 else np.full_like(steps, training.max_steps)


def held_out_windows(
    mixture: Mixture, limit: int, seed: int, max_windows: int | None = None
) -> dict[str, Windows]:
    """Draw held-out documents, at most `limit` of each source; return their windows by source.

    Of the windows of a source's drawn documents, at most `max_windows` are drawn (None: all). The
    scored tokens of a document are those in drawn windows, except the first token of each chunk;
    where `data.stride` makes chunks overlap, a token is scored several times and counts as often.
    `Windows.characters` adds up each document's characters times the scored share of its tokens. A
    source without windows is left out.
    """
    windows = {}
    for source, documents in mixture.outline.query("split == @VALIDATION").groupby("source"):
        drawn = mixture.draw(seed, str(source), VALIDATION)[:limit]
        chunks = mixture.windows[mixture.windows["document"].isin(drawn)]
        numbers = shuffled(chunks["window"].unique(), seed, "windows")[:max_windows]
        is_drawn, of_document = chunks["window"].isin(numbers), chunks.groupby("document")
        scored = (chunks["end"] - chunks["start"] - 1).where(is_drawn, 0)  # tokens of each chunk
        # Tokens of each document, except the first one: `<|endoftext|>` has no characters.
        tokens = of_document["end"].max() - of_document["start"].min() - 1
        shares = scored.groupby(chunks["document"]).sum() / tokens
        characters = (documents["characters"] * shares).sum()  # NaN, not added, if not drawn
        if len(chunks):
            windows[source] = Windows(mixture, chunks[is_drawn], round(characters))
    return windows


def hash_key(seed: int, *names: object) -> str:
    """Hash a seed and names, in hexadecimal; sorting by it shuffles, alike on any machine."""
    return hashlib.sha256(repr((seed, *names)).encode()).hexdigest()


def shuffled(numbers: Iterable[int], seed: int, *purpose: str) -> list[int]:
    """Shuffle numbers into a list; the order depends only on `numbers`, `seed` and `purpose`."""
    return sorted(map(int, numbers), key=lambda number: hash_key(seed, *purpose, number))


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Wait for other builds of `folder`, and make others wait until the `with` block ends.

    If the process ends first, so does the lock. Raises `MachineError` if the lock's file, or a file
    that the block writes, cannot be written.
    """
    place = f"data.processed_data_file {folder}"
    with raise_machine_error(place), _open_beside(folder, "lock") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextmanager
def in_use(run: Path, processed_data_file: str) -> Iterator[None]:
    """Keep the mixture of the run in the folder `run` from being replaced in the `with` block.

    The path `run` is written into a file beside the mixture, for the message of `kept_unused`.
    Waits while the mixture is being replaced. Raises `MachineError` if the file cannot be opened.
    """
    with _open_beside(mixture_folder(processed_data_file), "users") as file:
        fcntl.flock(file, fcntl.LOCK_SH)
        print(run, file=file, flush=True)
        yield


@contextmanager
def kept_unused(folder: Path) -> Iterator[None]:
    """Keep runs from beginning to use the mixture in `folder` until the `with` block ends.

    Raises `ConfigError` if a run uses the mixture now. The message names all runs that have used it
    since it was last replaced. Raises `MachineError` if the file of the runs cannot be opened.
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
        file.truncate(0)  # it had the names of runs that have ended
        yield


def _open_beside(folder: Path, kind: str) -> TextIO:
    """Open a hidden file to read and append: `data/.mixed.lock` for `data/mixed` and "lock".

    A missing file or folder is made. Raises `MachineError` if that, or opening the file, fails.
    """
    with raise_machine_error(f"data.processed_data_file {folder}"):
        folder.parent.mkdir(parents=True, exist_ok=True)
        return folder.with_name(f".{folder.name}.{kind}").open("a+", encoding="utf-8")


@contextmanager
def staged(folder: Path) -> Iterator[Path]:
    """Yield an empty folder to write into; if no error is raised, it takes the place of `folder`.

    A folder that is not empty cannot be replaced in one step, so the old one is moved aside first.
    If an error is raised before the new one is in place, the old one is put back at once. If the
    process is killed there, the next build puts it back.
    """
    staging = folder.with_name(f".{folder.name}-building")
    new, old = staging / "new", staging / "old"
    try:
        _restore_and_clear(folder, staging)  # after a build that was killed
        new.mkdir(parents=True)
        yield new
        if folder.exists():
            folder.replace(old)
        new.replace(folder)
    finally:
        _restore_and_clear(folder, staging)


def _restore_and_clear(folder: Path, staging: Path) -> None:
    """If `folder` is missing, move `staging`/old back to it; then delete `staging`."""
    if (staging / "old").exists() and not folder.exists():
        (staging / "old").replace(folder)
    shutil.rmtree(staging, ignore_errors=True)


class Texts:
    """A list of texts in a file: `texts[3]` reads one, `texts[3] = text` adds or replaces one.

    A text is always written at the end of the file, even if it replaces one; the old bytes stay.
    `spans[3]` is the place of text 3 in the file and its length, both in bytes.
    """

    def __init__(self, file: IO[bytes], spans: Iterable[tuple[int, int]] = ()) -> None:
        self._file = file
        self.spans = list(spans)

    def __setitem__(self, number: int, text: str) -> None:
        start = self._file.seek(0, os.SEEK_END)
        size = self._file.write(text.encode("utf-8"))
        self.spans[number : number + 1] = [(start, size)]  # appends it if number is len(spans)

    def __getitem__(self, number: int) -> str:
        start, size = self.spans[number]
        self._file.seek(start)
        return self._file.read(size).decode("utf-8")


def open_built(folder: Path, manifest: dict[str, Any]) -> Mixture | None:
    """Open the mixture in a folder; None if it is damaged or was built from another `manifest`."""
    with suppress(DataError):
        return open_mixture(folder) if read_manifest(folder) == manifest else None
    return None


def read_manifest(folder: Path, name: str = MANIFEST) -> dict[str, Any] | None:
    """Read a manifest (see `build.manifest_of`) from the file `name`; None if there is none."""
    manifest = read_json(folder / name)
    return manifest if manifest and "inputs" in manifest else None


def read_json(path: Path) -> dict[str, Any] | None:
    """Read a JSON object from a file; None if the file cannot be read or holds no object."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None
