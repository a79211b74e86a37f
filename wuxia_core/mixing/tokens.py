"""From text to token ids, with the tokens that begin a word, written as they come."""

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import numpy.typing as npt

from wuxia_core.corpus.chapters import gather
from wuxia_core.corpus.ngrams import codes
from wuxia_core.corpus.segment import Segmenter
from wuxia_core.mixing.staging import ArrayFile, Texts
from wuxia_core.mixing.store import Flags, Tokens, Window
from wuxia_core.model import document_start_id

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Ends = npt.NDArray[np.int64]

BATCH = 200_000  # characters a call of the tokenizer


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
