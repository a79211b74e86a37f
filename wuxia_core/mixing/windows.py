"""From documents to windows: tokenize, cut into chunks, choose general text, pack.

A chunk is a stretch of a document's tokens that is no longer than a window. A table of chunks has a
row a chunk and the columns `document` (its number), `start` and `end` (offsets into the tokens of
all documents, [start, end)), `source` ("wuxia" or "general") and `split`.
"""

import bisect
import logging
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import chain, pairwise
from math import ceil, floor, inf
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np
import pandas as pd
from tqdm import tqdm

from wuxia_core.config import DataConfig
from wuxia_core.corpus import File, Segmenter, gather
from wuxia_core.errors import DataError
from wuxia_core.masking import Bools, Ints, Tokens, Window
from wuxia_core.messages import messages
from wuxia_core.mixing.store import TRAIN, Texts, hash_key
from wuxia_core.model import document_start_id

if TYPE_CHECKING:
    from tokenizers import Encoding
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

BATCH = 200_000  # characters of texts that are tokenized in one call
HEADER = 128  # bytes of an .npy file's header; the array follows
PLAIN_SUFFIXES = {".txt", ".jsonl", ".md"}  # files about as long as the text in them


def repeat_counts(weights: Sequence[float], seed: int) -> Ints:
    """Turn the documents' weights into how often each is trained on, (documents,).

    A weight of 2.3 gives two copies of every document, and a third copy of about 0.3 of them.
    """
    # eight hexadecimal digits make a number in [0, 1)
    draws = [int(hash_key(seed, "weight", n)[:8], 16) / 2**32 for n in range(len(weights))]
    return (np.floor(weights) + (np.array(draws) < np.mod(weights, 1))).astype(np.int64)


def write_chunks(
    texts: Texts,
    encode: "Encoder",
    files: tuple[BinaryIO, BinaryIO],
    data: DataConfig,
    documents: pd.DataFrame,
    budget: float = inf,
) -> tuple[pd.DataFrame, float]:
    """Tokenize documents, write their tokens and word starts into `files`, cut them into chunks.

    `files` are the open tokens.npy and word_starts.npy; `documents` has the columns `source`,
    `split`, `characters` and `copies`. Documents are taken in order until those that gave chunks,
    copies included, hold more than `budget` tokens. Returns the table of chunks, and the share of
    the characters of `documents` that was tokenized.
    """
    rows, characters = [], 0
    bar = tqdm(documents.itertuples(), messages("bars")["tokenizing"], len(documents), leave=False)
    encoded = encode(texts[number] for number in documents.index)
    for document, (ids, starts) in zip(bar, encoded, strict=True):
        offset = files[1].tell() - HEADER  # tokens so far: a word start is one byte
        files[0].write(ids.tobytes())
        files[1].write(starts.tobytes())
        chunks = cut(len(ids), data)
        for start, end in chunks:
            row = document.Index, offset + start, offset + end, document.source, document.split
            rows += [row] * document.copies
        characters += document.characters
        budget -= document.copies * len(ids) if chunks else 0
        if budget < 0:
            break
    share = characters / max(1, documents["characters"].sum())
    return pd.DataFrame(rows, columns=["document", "start", "end", "source", "split"]), share


def write_headers(tokens: BinaryIO, word_starts: BinaryIO) -> None:
    """Write the headers of two .npy files, each `HEADER` bytes long, with their number of tokens.

    It is called twice: on the empty files, to reserve the headers' bytes (the number is then 0),
    and after the data, to overwrite the headers with the final number.
    """
    token_count = max(0, word_starts.tell() - HEADER)  # a word start is one byte
    for file, dtype in ((tokens, "<i4"), (word_starts, "|b1")):
        file.seek(0)
        header = {"descr": dtype, "fortran_order": False, "shape": (token_count,)}
        np.lib.format.write_array_header_1_0(file, header)


def cut(length: int, data: DataConfig) -> list[tuple[int, int]]:
    """Cut a document of `length` tokens into chunks of `data.max_length`: their [start, end).

    The last chunk may be shorter. Chunks overlap only if `data.stride` is set. A document of no
    more than `data.min_length` tokens gives no chunk. 700 tokens in windows of 256 give
    `[(0, 256), (256, 512), (512, 700)]`.
    """
    if length <= max(1, data.min_length):  # the first token is <|endoftext|>, before the text
        return []
    size, step = data.max_length, data.stride or data.max_length
    starts = range(0, max(1, length - size + step), step)
    return [(start, min(start + size, length)) for start in starts]


def general_budget(chunks: pd.DataFrame, ratio: float) -> float:
    """Give the tokens of general text that make `ratio` of all, beside the novels in `chunks`."""
    return ratio / (1 - ratio) * _sum_tokens(chunks.query("source == 'wuxia' and split == @TRAIN"))


def general_epochs(chunks: pd.DataFrame, budget: float, share: float, data: DataConfig) -> float:
    """Count how often general text is read, on average, while the novels are read once.

    `budget` is that of `general_budget`; `chunks` are those of a `share` of the general text, as
    `write_chunks` returns both. Raises `DataError` where the count is over `max_general_epochs`.
    """
    available = int(_sum_tokens(chunks.drop_duplicates("start")) / share)  # without copies
    # the tokens of novels that `general_budget` made the budget from
    epochs = _count_epochs(budget * (1 / data.general_ratio - 1), available, data)
    if epochs > 1:
        logger.warning("general text is repeated: %.2f epochs of it in one of the novels", epochs)
    return epochs


def check_sizes(files: Sequence[File], data: DataConfig) -> None:
    """Refuse a `data.general_ratio` that the sizes of the files rule out, before any is read.

    From a file's size its tokens are known to within a quarter, and cleaning may take some out; the
    size of a general file in a packed format says too little, so that nothing is then refused.
    Raises `DataError` where the general text is not even half of what the ratio takes.
    """
    sizes = {"wuxia": 0.0, "general": 0.0}
    for file in files:
        if file.source and file.path.suffix.lower() in PLAIN_SUFFIXES:
            sizes[file.source] += data.weights.get(file.place.name, 1.0) * utf8_size(file.path)
        elif file.source == "general":
            return
    _count_epochs(sizes["wuxia"], sizes["general"], data, margin=2.0)


def utf8_size(path: Path) -> float:
    """Estimate how many bytes of UTF-8 a file's text takes, from its size and its beginning."""
    with path.open("rb") as file:
        beginning = file.read(4096).decode("utf-8", errors="replace")
    is_utf8 = beginning.count("\N{REPLACEMENT CHARACTER}") <= 1  # 4,096 bytes may end inside one
    # The text in .epub, .docx and .zip is about 2.4 times their size; GBK, Big5 and UTF-16 write a
    # character in two bytes, UTF-8 in three.
    factor = 2.4 if beginning.startswith("PK") else 1.0 if is_utf8 else 1.5
    return path.stat().st_size * factor


def _count_epochs(novels: float, available: float, data: DataConfig, margin: float = 1.0) -> float:
    """Count how often general text is read for `data.general_ratio` while the novels are read once.

    `novels` and the `available` general text are both in tokens, or both in bytes. Raises
    `DataError` where the count is over `margin` times `max_general_epochs`. A `margin` over 1 says
    that the sizes are estimates: the remedies in the message then leave its square root as room.
    """
    ratio, max_epochs = data.general_ratio, data.max_general_epochs
    epochs = ratio / (1 - ratio) * novels / available if available else 0.0
    if epochs > max_epochs * margin:
        room = margin**0.5
        reachable = available * max_epochs / (novels + available * max_epochs)
        basis = ", by the files' sizes" if margin > 1 else ""
        raise DataError(
            f"data.general_ratio {ratio} takes more general text than there is{basis}: it would "
            f"come out as {reachable:.3f}, or be read {epochs:.2f} times. Add general text "
            f"({epochs / max_epochs:.1f} times what is there), --set data.general_ratio="
            f"{floor(1000 * reachable / room) / 1000}, or repeat it: --set data.max_general_epochs="
            f"{ceil(100 * epochs * room) / 100}"
        )
    return epochs


def choose_general(general: pd.DataFrame, budget: float) -> pd.DataFrame:
    """Choose general chunks from the top of the table, of about `budget` tokens, and sort them.

    The number of chunks is the one that comes nearest to the budget. If all are not enough, the
    table is gone through again from its top. The result is sorted by document and start.
    """
    lengths = (general["end"] - general["start"]).to_numpy()
    rows = np.tile(np.arange(len(general)), int(budget / lengths.sum()) + 1)
    totals = np.concatenate([[0], np.cumsum(lengths[rows])])  # tokens of the first 0, 1, 2, … rows
    chosen = general.iloc[rows[: int(np.abs(totals - budget).argmin())]]
    return chosen.sort_values(["document", "start"])


def _sum_tokens(chunks: pd.DataFrame) -> int:
    """Add up the tokens of chunks."""
    return int((chunks["end"] - chunks["start"]).sum())


def pack(chunks: pd.DataFrame, size: int) -> pd.DataFrame:
    """Put short training chunks of one source into windows of `size` tokens together.

    Held-out chunks and chunks of `size` tokens have a window for themselves. Returns the chunks
    sorted by window, with the window's number in the column `window`.
    """
    lengths = (chunks["end"] - chunks["start"]).to_numpy()
    openers = np.arange(len(chunks))  # the chunk that opened the window of each chunk
    short = (chunks["split"] == TRAIN).to_numpy() & (lengths < size)
    for source in chunks["source"].unique():
        rows = np.flatnonzero(short & (chunks["source"] == source).to_numpy())
        openers[rows] = rows[_best_fit(lengths[rows], size)]
    numbers = np.unique(openers, return_inverse=True)[1]
    return chunks.assign(window=numbers).sort_values("window", kind="stable", ignore_index=True)


def _best_fit(lengths: Ints, size: int) -> Ints:
    """Pack chunks into windows; return for each chunk the index of the one that opened its window.

    The longest chunk goes first, and each into the window with the least room that still holds it:
    `[5, 9, 4]` in windows of 10 gives `[0, 1, 0]`.
    """
    openers = np.arange(len(lengths))
    windows: list[tuple[int, int]] = []  # (tokens of room, opener) of each window, sorted
    for chunk in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[chunk])
        place = bisect.bisect_left(windows, (length, -1))
        room, openers[chunk] = windows.pop(place) if place < len(windows) else (size, chunk)
        bisect.insort(windows, (room - length, int(openers[chunk])))
    return openers


class Encoder:
    """Encode texts, each behind the token `<|endoftext|>`, and flag the tokens that begin a word.

    A text that spells out a special token, such as "<|endoftext|>", gets ordinary tokens for it.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", segmenter: Segmenter) -> None:
        self._segmenter = segmenter
        tokenizer("", split_special_tokens=True)  # the backend keeps this setting
        self._backend = tokenizer.backend_tokenizer
        self._start_id = document_start_id(tokenizer)

    def __call__(self, texts: Iterable[str]) -> Iterator[tuple[Tokens, Bools]]:
        """Yield `<|endoftext|>` and a text's T tokens, and flags of word starts: each (T + 1,).

        While the texts of one batch are yielded, a thread encodes the next batch.
        """
        encode = partial(self._backend.encode_batch, add_special_tokens=False)
        with ThreadPoolExecutor(1) as pool:
            # `pairwise` submits a batch before it yields the one ahead, and drops the empty last
            batches = chain(gather(texts, BATCH), [[]])
            pending = ((batch, pool.submit(encode, batch)) for batch in batches)
            for (batch, encodings), _ in pairwise(pending):
                for text, encoding in zip(batch, encodings.result(), strict=True):
                    yield self._flag_word_starts(text, encoding)

    def passage(self, text: str) -> tuple[Window, list[tuple[int, int]]]:
        """Make a window of one text, as training sees it, and say where its tokens stand in it.

        Returns the window, which begins with `<|endoftext|>`, and [start, end) in characters of
        each token behind that first one.
        """
        encoding = self._backend.encode(text, add_special_tokens=False)
        ids, starts = self._flag_word_starts(text, encoding)
        words, positions = np.cumsum(starts, dtype=np.int32), np.arange(len(ids), dtype=np.int32)
        return Window(ids, words, positions, key=0, epoch=0), encoding.offsets

    def _flag_word_starts(self, text: str, encoding: "Encoding") -> tuple[Tokens, Bools]:
        """Return a text's tokens behind `<|endoftext|>`, and flags of those that begin a word.

        A token begins a word if the word's first character is in it, also behind the end of the
        word before. Of several tokens that are bytes of one character the first one begins the
        word: the offsets of all of them end where the character ends.
        """
        ends = np.array([end for _, end in encoding.offsets], np.int64)
        edges = np.cumsum([0, *map(len, self._segmenter.cut(text))])
        flags = np.zeros(len(ends) + 1, np.bool_)
        flags[np.searchsorted(ends, edges[:-1], side="right")] = True
        ids = np.array([self._start_id, *encoding.ids], np.int32)
        # A word whose characters the tokenizer's normalizer dropped behind the last token has none:
        # its flag stands behind the last token and is cut off here.
        return ids, np.append(True, flags[:-1])
