"""From documents to windows: tokenize, cut into chunks, choose general text, pack.

A chunk is a stretch of a document's tokens that is no longer than a window. A table of chunks has a
row for each copy of a chunk and the columns `document` (its number), `start` and `end` (offsets
into the tokens of all documents, [start, end)), `source` ("wuxia" or "general") and `split`.
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
from wuxia_core.corpus import File, Segmenter, group_texts
from wuxia_core.errors import DataError
from wuxia_core.masking import Bools, Ints, Tokens, Window
from wuxia_core.messages import messages
from wuxia_core.mixing.store import TRAIN, Texts, hash_key
from wuxia_core.model import document_start_id

if TYPE_CHECKING:
    from tokenizers import Encoding
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

BATCH = 200_000  # least number of characters that are tokenized in one call; the last has fewer
HEADER = 128  # bytes of an .npy file's header; the array follows
PLAIN_SUFFIXES = {".txt", ".jsonl", ".md"}  # of files that are about as long as the text in them


def repeat_counts(weights: Sequence[float], seed: int) -> Ints:
    """Turn the documents' weights into how often each is trained on in an epoch, (documents,).

    A weight of 2.3 gives two copies of every document, and a third copy of about 0.3 of them, which
    `seed` chooses.
    """
    # For each document a number in [0, 1), of eight hexadecimal digits. If it is below the fraction
    # of the document's weight, the document gets one copy more.
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

    `files` are tokens.npy and word_starts.npy, open behind their headers. `documents` has the
    columns `source`, `split`, `characters` and `copies`, and its index holds the documents' numbers
    in `texts`. Documents are taken in order until those that gave chunks have more than `budget`
    tokens, copies included. Returns the table of chunks (see the module's docstring), and which
    share of the characters of `documents` was tokenized.
    """
    rows, characters = [], 0  # of chunks, copies included; number tokenized so far
    tokens, word_starts = files
    bar = tqdm(documents.itertuples(), messages("bars")["tokenizing"], len(documents), leave=False)
    encoded = encode(texts[number] for number in documents.index)
    for document, (ids, starts) in zip(bar, encoded, strict=True):
        # number of tokens written so far: each has one byte in the file of word starts
        offset = word_starts.tell() - HEADER
        tokens.write(ids.tobytes())
        word_starts.write(starts.tobytes())
        chunks = cut(len(ids), data)
        for start, end in chunks:
            row = document.Index, offset + start, offset + end, document.source, document.split
            rows += [row] * document.copies
        characters += document.characters
        if chunks:
            budget -= document.copies * len(ids)  # what is left of it, in tokens
        if budget < 0:
            break
    share = characters / max(1, documents["characters"].sum())
    return pd.DataFrame(rows, columns=["document", "start", "end", "source", "split"]), share


def write_headers(tokens: BinaryIO, word_starts: BinaryIO) -> None:
    """Write an .npy header of `HEADER` bytes, with the number of tokens, at the start of two files.

    Call it twice: first on the empty files, to reserve the headers' bytes (with 0 as the number),
    then with `word_starts` at its end, to overwrite the headers with the final number. Each call
    leaves the position in both files right behind the header.
    """
    token_count = max(0, word_starts.tell() - HEADER)  # a token has one byte in this file
    for file, dtype in ((tokens, "<i4"), (word_starts, "|b1")):  # int32 and bool
        file.seek(0)
        header = {"descr": dtype, "fortran_order": False, "shape": (token_count,)}
        np.lib.format.write_array_header_1_0(file, header)  # padded to `HEADER` bytes


def cut(length: int, data: DataConfig) -> list[tuple[int, int]]:
    """Cut a document of `length` tokens into chunks of `data.max_length`; return [start, end) each.

    700 tokens with a `max_length` of 256 give `[(0, 256), (256, 512), (512, 700)]`: the last chunk
    may be shorter. If `data.stride` is set, a chunk starts every `stride` tokens. `length` includes
    the `<|endoftext|>` before the text. A text of fewer than `data.min_length` tokens, or without
    any token, gives no chunk.
    """
    if length <= max(1, data.min_length):
        return []
    size, step = data.max_length, data.stride or data.max_length
    starts = range(0, max(1, length - size + step), step)
    return [(start, min(start + size, length)) for start in starts]


def general_budget(chunks: pd.DataFrame, ratio: float) -> float:
    """Return how many tokens of general text an epoch needs for the share `ratio` of all tokens.

    All other tokens are those of the novels' training chunks in `chunks`, copies included: with 900
    such tokens and a `ratio` of 0.1 the result is 100.
    """
    return ratio / (1 - ratio) * _sum_tokens(chunks.query("source == 'wuxia' and split == @TRAIN"))


def general_epochs(chunks: pd.DataFrame, budget: float, share: float, data: DataConfig) -> float:
    """Count how often general text is read, on average, while the novels are read once.

    `budget` is what `general_budget` returns, in tokens. `chunks` and `share` are what
    `write_chunks` returns for general text: the chunks, and which share of the text they come from.
    Logs a warning if the count is over 1. Raises `DataError` if it is over
    `data.max_general_epochs`.
    """
    # Estimated number of tokens of all general text; copies, which have the same start, count once.
    available = int(_sum_tokens(chunks.drop_duplicates("start")) / share)
    # The first argument is the number of the novels' tokens, found again from the budget.
    epochs = _count_epochs(budget * (1 / data.general_ratio - 1), available, data)
    if epochs > 1:
        logger.warning("general text is repeated: %.2f epochs of it in one of the novels", epochs)
    return epochs


def check_sizes(files: Sequence[File], data: DataConfig) -> None:
    """Raise `DataError` if, by the files' sizes, the general text is far too short.

    It is far too short if it would have to be read over 2 × `data.max_general_epochs` times for
    `data.general_ratio`. The factor 2 is needed as a file's size gives its number of tokens only to
    within a quarter, and as cleaning may delete some. The size of a file whose suffix is not in
    `PLAIN_SUFFIXES` tells too little: such a novel is not counted, and if such a file is general
    text, no error is raised.
    """
    sizes = {"wuxia": 0.0, "general": 0.0}  # by source: bytes of UTF-8, times the files' weights
    for file in files:
        if file.source and file.path.suffix.lower() in PLAIN_SUFFIXES:
            sizes[file.source] += data.weights.get(file.place.name, 1.0) * utf8_size(file.path)
        elif file.source == "general":
            return
    _count_epochs(sizes["wuxia"], sizes["general"], data, margin=2.0)


def utf8_size(path: Path) -> float:
    """Estimate how many bytes of UTF-8 a file's text takes, from its size and first 4,096 bytes."""
    with path.open("rb") as file:
        beginning = file.read(4096).decode("utf-8", errors="replace")
    # one � is allowed, as the 4,096 bytes may end inside a character
    is_utf8 = beginning.count("\N{REPLACEMENT CHARACTER}") <= 1
    # GBK, Big5 and UTF-16 write a Chinese character in two bytes, UTF-8 in three. The text in an
    # .epub, .docx or .zip, which begin with PK, is about 2.4 times the file's size.
    unpacked_factor = 1.0 if is_utf8 else 1.5
    return path.stat().st_size * (2.4 if beginning.startswith("PK") else unpacked_factor)


def _count_epochs(novels: float, available: float, data: DataConfig, margin: float = 1.0) -> float:
    """Count how often general text is read for `data.general_ratio` while the novels are read once.

    `novels` and `available`, the sizes of the novels and of the general text, are both in tokens or
    both in bytes; if `available` is 0, the count is 0. At a ratio of 0.1 novels of 900 tokens need
    100 tokens of general text, so 50 available tokens are read 2 times.

    Raises `DataError` if the count is over `margin` times `data.max_general_epochs`. A `margin`
    over 1 says that the sizes are estimates. The values that the message advises are then safer by
    a factor of the square root of `margin`.
    """
    ratio, max_epochs = data.general_ratio, data.max_general_epochs
    epochs = ratio / (1 - ratio) * novels / available if available else 0.0
    if epochs > max_epochs * margin:
        room = margin**0.5
        # the ratio that results if general text is read `max_epochs` times
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
    """Choose chunks from the top of the table `general` that have about `budget` tokens.

    The number of chunks is the one whose tokens are nearest to the budget, the smaller one in a
    tie. If all chunks are not enough, they are repeated from the top. Returns the chosen chunks
    sorted by document and start.
    """
    lengths = (general["end"] - general["start"]).to_numpy()
    rows = np.tile(np.arange(len(general)), int(budget / lengths.sum()) + 1)
    totals = np.concatenate([[0], np.cumsum(lengths[rows])])  # tokens of the first 0, 1, 2, … rows
    count = int(np.abs(totals - budget).argmin())
    return general.iloc[rows[:count]].sort_values(["document", "start"])


def _sum_tokens(chunks: pd.DataFrame) -> int:
    """Add up the tokens of all rows of a table of chunks."""
    return int((chunks["end"] - chunks["start"]).sum())


def pack(chunks: pd.DataFrame, size: int) -> pd.DataFrame:
    """Put training chunks that are shorter than `size` tokens together into windows of that size.

    A window has chunks of one source. A held-out chunk has a window for itself, and so has a chunk
    of `size` tokens. Returns the chunks sorted by window, with the window's number, from 0 on, in
    the column `window`.
    """
    lengths = (chunks["end"] - chunks["start"]).to_numpy()  # tokens
    openers = np.arange(len(chunks))  # for each chunk the one that opened its window; now itself
    short = (chunks["split"] == TRAIN).to_numpy() & (lengths < size)
    for source in chunks["source"].unique():
        rows = np.flatnonzero(short & (chunks["source"] == source).to_numpy())
        openers[rows] = rows[_best_fit(lengths[rows], size)]
    numbers = np.unique(openers, return_inverse=True)[1]  # windows, in the order of openers
    return chunks.assign(window=numbers).sort_values("window", kind="stable", ignore_index=True)


def _best_fit(lengths: Ints, size: int) -> Ints:
    """Pack chunks into windows; return for each chunk the index of the one that opened its window.

    `lengths` are the chunks' numbers of tokens, at most `size` each. Chunks are packed from the
    longest to the shortest. Each goes into the window with the least room that still holds it, or
    into a new one if no window has enough room: `[5, 9, 4]` in windows of 10 gives `[0, 1, 0]`.
    """
    openers = np.empty_like(lengths)
    windows: list[tuple[int, int]] = []  # (tokens of room, opener) of each window, sorted
    for chunk in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[chunk])
        place = bisect.bisect_left(windows, (length, -1))  # the least room that is enough
        if place == len(windows):  # none has enough room: the chunk opens a window
            windows.append((size, chunk))
        room, openers[chunk] = windows.pop(place)
        bisect.insort(windows, (room - length, int(openers[chunk])))
    return openers


class Encoder:
    """Encode texts, each behind the token `<|endoftext|>`, and flag the tokens that begin a word.

    If a text has the name of a special token in it, such as "<|endoftext|>", the name becomes
    ordinary tokens.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", segmenter: Segmenter) -> None:
        self._segmenter = segmenter
        # The backend keeps this setting: names of special tokens in a text are ordinary text.
        tokenizer("", split_special_tokens=True)
        self._backend = tokenizer.backend_tokenizer
        self._start_id = document_start_id(tokenizer)

    def __call__(self, texts: Iterable[str]) -> Iterator[tuple[Tokens, Bools]]:
        """Yield for each text `<|endoftext|>` and its T tokens, and flags of word starts: (T + 1,).

        While the texts of one batch are yielded, a thread encodes the next batch.
        """
        encode = partial(self._backend.encode_batch, add_special_tokens=False)
        with ThreadPoolExecutor(1) as pool:
            # `pairwise` takes the next batch, and so submits it to the thread, before it yields the
            # pair. The last batch is never the first of a pair: so an empty batch is added.
            batches = chain(group_texts(texts, BATCH), [[]])
            pending = ((batch, pool.submit(encode, batch)) for batch in batches)
            for (batch, encodings), _ in pairwise(pending):
                for text, encoding in zip(batch, encodings.result(), strict=True):
                    yield self._flag_word_starts(text, encoding)

    def passage(self, text: str) -> tuple[Window, list[tuple[int, int]]]:
        """Make a window of one text, as training sees it, and find its tokens' places in the text.

        Returns the window, which begins with `<|endoftext|>`, and for each token behind that one
        its place [start, end), in characters. The window's `key` and `epoch` are 0.
        """
        encoding = self._backend.encode(text, add_special_tokens=False)
        ids, starts = self._flag_word_starts(text, encoding)
        words, positions = np.cumsum(starts, dtype=np.int32), np.arange(len(ids), dtype=np.int32)
        return Window(ids, words, positions, key=0, epoch=0), encoding.offsets

    def _flag_word_starts(self, text: str, encoding: "Encoding") -> tuple[Tokens, Bools]:
        """Return `<|endoftext|>` and the T tokens of `text`, and flags of word starts: (T + 1,).

        A token begins a word if it has the word's first character, even if it also has the end of
        the word before. If several tokens are bytes of that character, the first of them begins the
        word: the offsets of all of them end where the character ends. `<|endoftext|>` is a word.
        """
        # the ends of the T tokens, and the edges of the W words, (W + 1,), in characters
        ends = np.array([end for _, end in encoding.offsets], np.int64)
        edges = np.cumsum([0, *map(len, self._segmenter.cut(text))])
        flags = np.zeros(len(ends) + 1, np.bool_)
        # for each word the first token that ends behind the word's start
        flags[np.searchsorted(ends, edges[:-1], side="right")] = True
        ids = np.array([self._start_id, *encoding.ids], np.int32)
        # A word at the end may have no token, if the tokenizer's normalizer dropped its characters:
        # its flag stands behind the last token and is cut off here.
        return ids, np.append(True, flags[:-1])
