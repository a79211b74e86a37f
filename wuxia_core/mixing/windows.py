"""Pieces of documents, how often each is trained on, and the windows they are packed into."""

import bisect
import logging
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import chain
from math import ceil, floor
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import numpy.typing as npt
import pandas as pd

from wuxia_core.config import DataConfig
from wuxia_core.corpus import Segmenter, gather
from wuxia_core.errors import DataError
from wuxia_core.mixing.store import TRAIN, ArrayFile, Flags, Texts, Tokens, Window, hash_key
from wuxia_core.model import document_start_id
from wuxia_core.text import codes

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


logger = logging.getLogger(__name__)

Counts = npt.NDArray[np.int64]
Ends = npt.NDArray[np.int64]

BATCH = 200_000  # characters a call of the tokenizer


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
    chance = np.array(
        [int(hash_key(seed, "weight", n)[:8], 16) / 2**32 for n in range(len(weights))]
    )
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
    return sorted(map(int, documents), key=lambda number: hash_key(seed, number))


def general_budget(pieces: pd.DataFrame, ratio: float) -> float:
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
        logger.warning("general text is repeated: %.2f epochs of it in one of the novels", epochs)
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


class Encoder:
    """Encodes texts, each behind `<|endoftext|>`, and flags the tokens that begin a word.

    A novel that happens to contain the letters of a special token does not make one.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", segmenter: Segmenter) -> None:
        self._segmenter = segmenter
        tokenizer("", split_special_tokens=True)  # sets the backend so
        self._backend = tokenizer.backend_tokenizer
        self._start_id = np.int32(document_start_id(tokenizer))
        known = tokenizer.get_vocab()
        numbers = np.fromiter(known.values(), np.int64, len(known))
        self._sizes = np.zeros(numbers.max() + 1, np.int64)
        self._sizes[numbers] = np.fromiter(map(len, known), np.int64, len(known))

    def __call__(self, texts: Iterable[str]) -> Iterator[tuple[Tokens, Flags]]:
        """Give the tokens and flags of each text, (T + 1,), encoding one batch ahead."""
        encode = self._backend.encode_batch_fast
        with ThreadPoolExecutor(1) as pool:
            ahead: tuple[list[str], Future[Any]] | None = None
            for batch in chain(gather(texts, BATCH), [[]]):
                following = batch, pool.submit(encode, batch, add_special_tokens=False)
                current, ahead = ahead, following
                for text, row in (
                    zip(current[0], current[1].result(), strict=True) if current else ()
                ):
                    ids = np.array([self._start_id, *row.ids], np.int32)
                    yield (
                        ids,
                        np.append(
                            True, _word_starts(self._segmenter, text, self._ends(text, ids[1:]))
                        ),
                    )

    def _ends(self, text: str, ids: Tokens) -> Ends:
        """Where each token ends in the text's UTF-8, (T,); tokens of one character end together.

        In a byte-level vocabulary, such as Qwen's, a token has as many bytes as characters in its
        name. Where that does not add up, the vocabulary is of another kind and is asked.
        """
        ends = np.cumsum(self._sizes[ids])
        if len(ends) and ends[-1] != len(text.encode()):
            offsets = self._backend.encode(text, add_special_tokens=False).offsets
            ends = _byte_places(text)[[end for _, end in offsets]]
        return ends


def _byte_places(text: str) -> Ends:
    """Bytes of UTF-8 before each character, and of all: (C + 1,)."""
    characters = codes(text)
    sizes = np.ones(len(characters), np.int64)
    for bound in (0x80, 0x800, 0x10000):
        sizes += characters >= bound
    return np.append(0, np.cumsum(sizes))


def _word_starts(segmenter: Segmenter, text: str, ends: Ends) -> Flags:
    """Flag the tokens that begin a word, (T,), by where they end in the text's UTF-8.

    A token that holds the end of one word and the start of the next counts as a start.
    """
    edges = np.cumsum([0, *map(len, segmenter.cut(text))])
    starts = _byte_places(text)[edges[:-1]]
    flags = np.zeros(len(ends) + 1, np.bool_)
    flags[np.searchsorted(ends, starts, side="right")] = True
    return flags[:-1]  # characters behind the last token, which its normalizer dropped, are none


def encode_passage(
    text: str, tokenizer: "PreTrainedTokenizerBase", segmenter: Segmenter
) -> tuple[Window, list[tuple[int, int]]]:
    """Make a window of one text, as training has it, and say where each token stands in it.

    The window begins with `<|endoftext|>`; the offsets, in characters, are of the tokens behind it.
    """
    encoded = tokenizer(
        text, add_special_tokens=False, split_special_tokens=True, return_offsets_mapping=True
    )
    ids = np.array([document_start_id(tokenizer), *encoded.input_ids], np.int32)
    offsets = [(int(start), int(end)) for start, end in encoded.offset_mapping]
    ends = _byte_places(text)[[end for _, end in offsets]]
    words = np.cumsum(np.append(True, _word_starts(segmenter, text, ends)), dtype=np.int32)
    return Window(ids, words, np.arange(len(ids), dtype=np.int32), key=0, epoch=0), offsets


class TokenWriter:
    """Writes `tokens.npy` and `word_starts.npy`, and knows where each document's tokens stand."""

    def __init__(self, folder: Path, texts: Texts, documents: int, encode: Encoder) -> None:
        self._texts, self._encode = texts, encode
        self._tokens = ArrayFile(folder / "tokens.npy", np.int32)
        self._word_starts = ArrayFile(folder / "word_starts.npy", np.bool_)
        self.start = np.zeros(documents, np.int64)
        self.length = np.zeros(documents, np.int64)

    def __enter__(self) -> Self:
        return self

    def write(self, numbers: Sequence[int]) -> Iterator[int]:
        """Tokenize documents; give the number of each when its tokens are written."""
        texts = (self._texts[number] for number in numbers)
        for number, (ids, flags) in zip(numbers, self._encode(texts), strict=True):
            self.start[number], self.length[number] = self._tokens.length, len(ids)
            self._tokens.append(ids)
            self._word_starts.append(flags)
            yield number

    def __exit__(self, *_: object) -> None:
        self._tokens.close()
        self._word_starts.close()
