"""From text to token ids, with the tokens that begin a word, written as they come."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Self

import numpy as np
import numpy.typing as npt

from wuxia_core.mixing.staging import ArrayFile, Texts
from wuxia_core.mixing.store import Flags, Tokens
from wuxia_core.model import document_start_id

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BATCH = 200_000  # characters a call of the tokenizer


def tokenize(
    texts: Iterable[str], tokenizer: "PreTrainedTokenizerBase"
) -> Iterator[tuple[Tokens, Flags]]:
    """Encode texts, each behind `<|endoftext|>`, and flag the tokens that begin a word.

    A novel that happens to contain the letters of a special token does not make one.
    """
    start_id = document_start_id(tokenizer)
    for batch in _batches(texts):
        encoded = tokenizer(
            batch, add_special_tokens=False, split_special_tokens=True, return_offsets_mapping=True
        )
        for text, ids, offsets in zip(
            batch, encoded.input_ids, encoded.offset_mapping, strict=True
        ):
            flat = np.fromiter(chain.from_iterable(offsets), np.int64, 2 * len(offsets))
            yield np.array([start_id, *ids], np.int32), _word_starts(text, flat.reshape(-1, 2))


class TokenWriter:
    """Writes `tokens.npy` and `word_starts.npy`, and knows where each document's tokens stand."""

    def __init__(
        self, folder: Path, texts: Texts, documents: int, tokenizer: "PreTrainedTokenizerBase"
    ) -> None:
        self._texts, self._tokenizer = texts, tokenizer
        self._tokens = ArrayFile(folder / "tokens.npy", np.int32)
        self._word_starts = ArrayFile(folder / "word_starts.npy", np.bool_)
        self.start = np.zeros(documents, np.int64)
        self.length = np.zeros(documents, np.int64)

    def __enter__(self) -> Self:
        return self

    def write(self, numbers: Sequence[int]) -> Iterator[int]:
        """Tokenize documents; give the number of each when its tokens are written."""
        texts = (self._texts[number] for number in numbers)
        for number, (ids, flags) in zip(numbers, tokenize(texts, self._tokenizer), strict=True):
            self.start[number], self.length[number] = self._tokens.length, len(ids)
            self._tokens.append(ids)
            self._word_starts.append(flags)
            yield number

    def __exit__(self, *_: object) -> None:
        self._tokens.close()
        self._word_starts.close()


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    size = 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if size >= BATCH:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _word_starts(text: str, offsets: npt.NDArray[np.int64]) -> Flags:
    """Flag tokens that begin a word, from their (T, 2) character offsets; (T + 1,) with the first.

    A token that holds the end of one word and the start of the next counts as a start.
    """
    import rjieba

    edges = np.cumsum([0, *map(len, rjieba.cut(text))])
    is_edge = np.zeros(len(text) + 1, np.int64)
    is_edge[edges] = 1
    before = np.concatenate([[0], np.cumsum(is_edge)])  # edges before each character
    inside = before[offsets[:, 1]] - before[offsets[:, 0]] > 0
    new_character = np.diff(offsets[:, 0], prepend=-1) > 0  # not a later byte of the same one
    return np.concatenate([[True], inside & new_character])
