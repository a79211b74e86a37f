"""Pieces of documents, how often each is trained on, and the windows they are packed into."""

import bisect
import logging
from collections.abc import Iterable
from math import ceil, floor

import numpy as np
import numpy.typing as npt
import pandas as pd

from wuxia_core.config import DataConfig
from wuxia_core.errors import DataError
from wuxia_core.mixing.store import TRAIN, draw

log = logging.getLogger(__name__)

Counts = npt.NDArray[np.int64]


def cut(
    documents: pd.DataFrame, starts: Counts, lengths: Counts, settings: DataConfig
) -> pd.DataFrame:
    """Cut documents into pieces of a window's length at most: `document`, `start`, `end`.

    The tail is kept, and nothing overlaps without a stride. `starts` and `lengths` say where the
    tokens of each document stand; one that has none, or too few, has no piece.
    """
    size, step = settings.max_length, settings.stride or settings.max_length
    rows = []
    for document, (offset, length) in enumerate(
        zip(starts.tolist(), lengths.tolist(), strict=True)
    ):
        short = length < shortest(settings)
        for start in [] if short else range(0, max(1, length - size + step), step):
            rows.append((document, offset + start, offset + min(start + size, length)))
    pieces = pd.DataFrame(rows, columns=["document", "start", "end"], dtype=np.int64)
    about = documents[["source", "split"]].iloc[pieces["document"]].reset_index(drop=True)
    return pd.concat([pieces, about], axis=1)


def shortest(settings: DataConfig) -> int:
    """Tokens of the shortest document that is used; one of them stands before the text."""
    return max(1, settings.min_length) + 1


def copies(weights: npt.NDArray[np.float64], seed: int) -> Counts:
    """Say how often each document is trained on, (documents,).

    A weight of 2.3 gives two copies of every document and a third of about 0.3 of them.
    """
    chance = np.array([int(draw(seed, "weight", n)[:8], 16) / 2**32 for n in range(len(weights))])
    return (np.floor(weights) + (chance < weights % 1)).astype(np.int64)


def repeat(pieces: pd.DataFrame, times: Counts) -> pd.DataFrame:
    """Repeat the training pieces of each document so many times; held-out ones stand once."""
    each = np.where(pieces["split"] == TRAIN, times[pieces["document"]], 1)
    return pieces.loc[pieces.index.repeat(each)].reset_index(drop=True)


def choose_general(pieces: pd.DataFrame, wanted: float, seed: int) -> pd.DataFrame:
    """Keep general training pieces of `wanted` tokens in all, whole documents in keyed order.

    The last piece is the one whose end is nearest. Where there is not enough, all is kept and
    repeated from the start.
    """
    general = pieces[_training(pieces, "general")]
    lengths = (general["end"] - general["start"]).to_numpy()
    if not len(general):
        return pieces
    place = {number: n for n, number in enumerate(keyed(general["document"].unique(), seed))}
    order = np.argsort(general["document"].map(place).to_numpy(), kind="stable")
    rounds = np.tile(order, int(wanted / lengths.sum()) + 1)
    reached = np.concatenate([[0], np.cumsum(lengths[rounds])])
    chosen = general.iloc[np.sort(rounds[: int(np.abs(reached - wanted).argmin())])]
    return pd.concat([pieces.drop(index=general.index), chosen], ignore_index=True)


def keyed(documents: Iterable[int], seed: int) -> list[int]:
    """Put documents in the order in which they are drawn."""
    return sorted(map(int, documents), key=lambda number: draw(seed, number))


def wanted_general(pieces: pd.DataFrame, ratio: float) -> float:
    """Tokens of general text that make `ratio` of the training tokens."""
    return ratio / (1 - ratio) * _tokens(pieces[_training(pieces, "wuxia")])


def general_epochs(
    pieces: pd.DataFrame, wanted: float, share: float, settings: DataConfig
) -> float:
    """Count passes over the general text in one over the novels; `pieces` hold a `share` of it.

    Raises `DataError` where that is more than `max_general_epochs`.
    """
    there = _tokens(pieces[_training(pieces, "general")].drop_duplicates("start"))
    if not wanted or not there:
        return 0.0
    there, most = int(there / share), settings.max_general_epochs
    epochs = wanted / there
    novels = wanted * (1 / settings.general_ratio - 1)
    enough = there * most / (novels + there * most)
    if epochs > most:
        raise DataError(
            f"data.general_ratio {settings.general_ratio} takes {wanted:,.0f} tokens of general "
            f"text and there are {there:,}, which would be read {epochs:.2f} times. Add general "
            f"text, --set data.general_ratio={floor(1000 * enough) / 1000}, or repeat it: "
            f"--set data.max_general_epochs={ceil(100 * epochs) / 100}"
        )
    if epochs > 1:
        log.warning("general text is repeated: %.2f epochs of it in one of the novels", epochs)
    return epochs


def _training(pieces: pd.DataFrame, source: str) -> pd.Series:
    return (pieces["split"] == TRAIN) & (pieces["source"] == source)


def _tokens(pieces: pd.DataFrame) -> int:
    return int((pieces["end"] - pieces["start"]).sum())


def pack(pieces: pd.DataFrame, size: int) -> pd.DataFrame:
    """Put short training pieces of one source into windows together, best fit first.

    The longest piece goes first, each into the window with the least room that still holds it.
    Held-out pieces and full ones have a window for themselves.
    """
    lengths = (pieces["end"] - pieces["start"]).to_numpy()
    window = np.arange(len(pieces))
    short = (pieces["split"] == TRAIN).to_numpy() & (lengths < size)
    for source in pieces["source"].unique():
        rows = np.flatnonzero(short & (pieces["source"] == source).to_numpy())
        window[rows] = rows[_best_fit(lengths[rows], size)]
    numbers = np.unique(window, return_inverse=True)[1]
    return pieces.assign(window=numbers).sort_values("window", kind="stable", ignore_index=True)


def _best_fit(lengths: Counts, size: int) -> Counts:
    """Say for each piece which piece opened its window: `[5, 9, 4]` in 10 gives `[0, 1, 0]`."""
    opener = np.arange(len(lengths))
    room: list[tuple[int, int]] = []  # (tokens left, opener), sorted
    for piece in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[piece])
        place = bisect.bisect_left(room, (length, -1))
        left, opener[piece] = room.pop(place) if place < len(room) else (size, piece)
        bisect.insort(room, (left - length, int(opener[piece])))
    return opener
