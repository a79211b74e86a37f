"""The mixture folder, read: documents, tokens and windows, and the windows as datasets."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd

from wuxia_core.config import locate
from wuxia_core.errors import DataError

TRAIN, VALIDATION, UNUSED = "train", "validation", "unused"

Tokens = npt.NDArray[np.int32]
Flags = npt.NDArray[np.bool_]


class Window(NamedTuple):
    """A stretch of one document, as the collator takes it."""

    input_ids: Tokens  # (T,)
    word_ids: Tokens  # (T,)
    key: int
    epoch: int


@dataclass(frozen=True)
class Mixture:
    """What a run trains and is judged on.

    `tokens` (N,) int32 are all documents, each behind `<|endoftext|>`, and `word_starts` (N,) bool
    flags the tokens that begin a word, both memory-mapped; `windows` and `documents` are as in the
    package's docstring.
    """

    tokens: Tokens
    word_starts: Flags
    windows: pd.DataFrame
    documents: pd.DataFrame
    folder: Path

    @property
    def report(self) -> pd.DataFrame:
        """Training windows by source."""
        train = self.windows[self.windows["split"] == TRAIN]
        lengths = train["end"] - train["start"]
        table = pd.DataFrame(
            {
                "documents": train.groupby("source")["document"].nunique(),
                "tokens": lengths.groupby(train["source"]).sum(),
            }
        )
        table["share"] = table["tokens"] / table["tokens"].sum()
        return table.sort_index(ascending=False).reset_index()


class Windows:
    """Windows as a dataset: `windows[3]` at epoch 0, `windows[2, 3]` at epoch 2.

    The epoch travels with the index, so that a worker or a resumed run needs to be told nothing.
    """

    def __init__(self, mixture: Mixture, rows: pd.DataFrame) -> None:
        self._tokens, self._word_starts = mixture.tokens, mixture.word_starts
        self.documents = rows["document"].to_numpy()  # (windows,) which document each is from
        self._keys = rows.index.to_numpy()
        self._starts, self._ends = rows["start"].to_numpy(), rows["end"].to_numpy()

    def __len__(self) -> int:
        return len(self._keys)

    def __getitem__(self, index: int | tuple[int, int]) -> Window:
        epoch, row = index if isinstance(index, tuple) else (0, index)
        place = slice(self._starts[row], self._ends[row])
        word_ids = np.cumsum(self._word_starts[place], dtype=np.int32)
        return Window(self._tokens[place], word_ids, int(self._keys[row]), epoch)


def open_mixture(folder: Path) -> Mixture:
    """Map a mixture folder into memory.

    Raises `DataError` where the folder holds none.
    """
    if read_manifest(folder) is None:
        raise DataError(f"{folder}: no mixture there (manifest.json is missing); mix again")
    return Mixture(
        tokens=np.load(folder / "tokens.npy", mmap_mode="r"),
        word_starts=np.load(folder / "word_starts.npy", mmap_mode="r"),
        windows=pd.read_parquet(folder / "windows.parquet"),
        documents=pd.read_parquet(folder / "documents.parquet"),
        folder=folder,
    )


def open_run_mixture(run: Path, processed_data_file: str) -> Mixture:
    """Open the mixture that a run folder was made for.

    Raises `DataError` where another one lies there by now: what was trained on then would be held
    out now.
    """
    folder = locate(str(mixture_folder(processed_data_file)))
    wanted = read_manifest(run, "mixture.json")
    if wanted is None:
        raise DataError(f"{run}: no run folder of this project (mixture.json is missing)")
    if read_manifest(folder) != wanted:
        raise DataError(
            f"{folder}: not the mixture that {run} was trained on; mix again from the same texts "
            f"with the settings of {run / 'config.yaml'}"
        )
    return open_mixture(folder)


def mixture_folder(processed_data_file: str) -> Path:
    """Turn `data/processed.jsonl`, as older files have it, into the folder `data/processed`."""
    path = Path(processed_data_file).expanduser()
    return path.with_suffix("") if path.suffix == ".jsonl" else path


def read_manifest(folder: Path, name: str = "manifest.json") -> dict[str, Any] | None:
    """Read what a mixture was built from; None where there is no whole mixture."""
    try:
        manifest = json.loads((folder / name).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return manifest if isinstance(manifest, dict) and "inputs" in manifest else None


def train_windows(mixture: Mixture) -> Windows:
    """All training windows."""
    return Windows(mixture, mixture.windows[mixture.windows["split"] == TRAIN])


def held_out_windows(mixture: Mixture, limit: int, seed: int) -> dict[str, Windows]:
    """Windows by source of at most `limit` held-out documents each, drawn by key."""
    chosen = {}
    held_out = mixture.documents[mixture.documents["split"] == VALIDATION]
    for source, documents in held_out.groupby("source"):
        drawn = sorted(documents.index, key=lambda number: draw(seed, "held out", number))[:limit]
        rows = mixture.windows[mixture.windows["document"].isin(drawn)]
        if len(rows):
            chosen[source] = Windows(mixture, rows)
    return chosen


def draw(seed: int, *names: object) -> str:
    """Turn a seed and names into a key to sort by: the same order on any machine."""
    return hashlib.sha256(repr((seed, *names)).encode()).hexdigest()
