"""From documents to windows: tokenize, cut into chunks, choose general text, pack.

A chunk is a run of a document's tokens that is no longer than a window; tables of chunks have the
columns `document`, `start` and `end` (offsets into the tokens), `source` and `split`.
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

BATCH = 200_000  # characters a call of the tokenizer
HEADER = 128  # bytes of an .npy file before its numbers
PLAIN = {".txt", ".jsonl", ".md"}  # what is in such a file is about as long as the file


def repeat_counts(weights: Sequence[float], seed: int) -> Ints:
    """Say how often each document is trained on, (documents,).

    A weight of 2.3 gives two copies of every document and a third of about 0.3 of them.
    """
    keys = [int(hash_key(seed, "weight", n)[:8], 16) / 2**32 for n in range(len(weights))]
    return (np.floor(weights) + (np.array(keys) < np.mod(weights, 1))).astype(np.int64)


def write_chunks(
    texts: Texts,
    encode: "Encoder",
    files: tuple[BinaryIO, BinaryIO],
    data: DataConfig,
    documents: pd.DataFrame,
    enough: float = inf,
) -> tuple[pd.DataFrame, float]:
    """Tokenize documents, write their tokens and word starts into `files` and cut them into chunks.

    It ends after `enough` tokens of training text. `documents` has the columns `source`, `split`,
    `characters` and `copies`. Returns the chunks, and which share of the characters they are.
    """
    rows, characters = [], 0
    bar = tqdm(documents.itertuples(), messages("bars")["tokenizing"], len(documents), leave=False)
    encoded = encode(texts[number] for number in documents.index)
    for document, (ids, starts) in zip(bar, encoded, strict=True):
        first = files[1].tell() - HEADER  # a byte a token
        files[0].write(ids.tobytes())
        files[1].write(starts.tobytes())
        chunks = cut(len(ids), data)
        for start, end in chunks:
            row = document.Index, first + start, first + end, document.source, document.split
            rows += [row] * document.copies
        characters += document.characters
        enough -= document.copies * len(ids) if chunks else 0
        if enough < 0:
            break
    share = characters / max(1, documents["characters"].sum())
    return pd.DataFrame(rows, columns=["document", "start", "end", "source", "split"]), share


def write_headers(tokens: BinaryIO, word_starts: BinaryIO) -> None:
    """Say in .npy files how many tokens they hold; numbers go behind it, and it is said again."""
    length = max(0, word_starts.tell() - HEADER)
    for file, kind in ((tokens, "<i4"), (word_starts, "|b1")):
        file.seek(0)
        facts = {"descr": kind, "fortran_order": False, "shape": (length,)}
        np.lib.format.write_array_header_1_0(file, facts)


def cut(length: int, data: DataConfig) -> list[tuple[int, int]]:
    """Cut a document of so many tokens into chunks of a window's length at most.

    The tail is kept, and nothing overlaps without a stride; one that is too short gives no chunk.
    700 tokens in windows of 256 give `[(0, 256), (256, 512), (512, 700)]`.
    """
    if length <= max(1, data.min_length):  # one of the tokens stands before the text
        return []
    size, step = data.max_length, data.stride or data.max_length
    starts = range(0, max(1, length - size + step), step)
    return [(start, min(start + size, length)) for start in starts]


def general_budget(chunks: pd.DataFrame, ratio: float) -> float:
    """Tokens of general text that make `ratio` of the training tokens."""
    return ratio / (1 - ratio) * _tokens(chunks.query("source == 'wuxia' and split == @TRAIN"))


def general_epochs(chunks: pd.DataFrame, budget: float, share: float, data: DataConfig) -> float:
    """Count passes over the general text in one over the novels; `chunks` are a `share` of it.

    Raises `DataError` where that is more than `max_general_epochs`.
    """
    there = int(_tokens(chunks.drop_duplicates("start")) / share)
    epochs = _epochs(budget * (1 / data.general_ratio - 1), there, data)
    if epochs > 1:
        logger.warning("general text is repeated: %.2f epochs of it in one of the novels", epochs)
    return epochs


def check_sizes(files: Sequence[File], data: DataConfig) -> None:
    """Refuse a ratio that the sizes of the files rule out, before any is read.

    A file's bytes tell its tokens to a quarter, and cleaning may take some; of formats that are
    packed they tell nothing. Raises `DataError` where the general text is not even half of enough.
    """
    sizes = {"wuxia": 0.0, "general": 0.0}
    for file in files:
        if file.source and file.path.suffix.lower() in PLAIN:
            sizes[file.source] += data.weights.get(file.place.name, 1.0) * utf8_size(file.path)
        elif file.source == "general":
            return
    _epochs(sizes["wuxia"], sizes["general"], data, margin=2.0)


def utf8_size(path: Path) -> float:
    """Bytes of a file's text in UTF-8, which writes three where GBK, Big5 and UTF-16 write two.

    Packed text (.epub, .docx, .zip) comes to about 2.4 times the size of its file.
    """
    with path.open("rb") as file:
        beginning = file.read(4096).decode("utf-8", errors="replace")
    utf8 = beginning.count("\N{REPLACEMENT CHARACTER}") <= 1  # the last one may be cut
    times = 2.4 if beginning.startswith("PK") else 1.0 if utf8 else 1.5
    return path.stat().st_size * times


def _epochs(novels: float, there: float, data: DataConfig, margin: float = 1.0) -> float:
    """Count the passes over `there` that the ratio takes beside `novels`, in tokens or bytes.

    Raises `DataError` where they are `margin` times too many; then the figures are about right.
    """
    ratio, most = data.general_ratio, data.max_general_epochs
    epochs = ratio / (1 - ratio) * novels / there if there else 0.0
    if epochs > most * margin:
        safe = margin**0.5
        reachable = there * most / (novels + there * most)
        by = ", by the files' sizes" if margin > 1 else ""
        raise DataError(
            f"data.general_ratio {ratio} takes more general text than there is{by}: it would come "
            f"out as {reachable:.3f}, or be read {epochs:.2f} times. Add general text "
            f"({epochs / most:.1f} times what is there), --set data.general_ratio="
            f"{floor(1000 * reachable / safe) / 1000}, or repeat it: --set data.max_general_epochs="
            f"{ceil(100 * epochs * safe) / 100}"
        )
    return epochs


def choose_general(general: pd.DataFrame, budget: float) -> pd.DataFrame:
    """Keep the first chunks, as they were drawn, of `budget` tokens in all; sort them by document.

    The last chunk is the one whose end is nearest. Where there is not enough, all is kept and
    repeated from the start.
    """
    lengths = (general["end"] - general["start"]).to_numpy()
    rounds = np.tile(np.arange(len(general)), int(budget / lengths.sum()) + 1)
    reached = np.concatenate([[0], np.cumsum(lengths[rounds])])
    chosen = general.iloc[rounds[: int(np.abs(reached - budget).argmin())]]
    return chosen.sort_values(["document", "start"])


def _tokens(chunks: pd.DataFrame) -> int:
    return int((chunks["end"] - chunks["start"]).sum())


def pack(chunks: pd.DataFrame, size: int) -> pd.DataFrame:
    """Put short training chunks of one source into windows together, best fit first.

    The longest chunk goes first, each into the window with the least room that still holds it.
    Held-out chunks and full ones have a window for themselves.
    """
    lengths = (chunks["end"] - chunks["start"]).to_numpy()
    window = np.arange(len(chunks))
    short = (chunks["split"] == TRAIN).to_numpy() & (lengths < size)
    for source in chunks["source"].unique():
        rows = np.flatnonzero(short & (chunks["source"] == source).to_numpy())
        window[rows] = rows[_best_fit(lengths[rows], size)]
    numbers = np.unique(window, return_inverse=True)[1]
    return chunks.assign(window=numbers).sort_values("window", kind="stable", ignore_index=True)


def _best_fit(lengths: Ints, size: int) -> Ints:
    """Say for each chunk which chunk opened its window: `[5, 9, 4]` in 10 gives `[0, 1, 0]`."""
    opener = np.arange(len(lengths))
    room: list[tuple[int, int]] = []  # (tokens left, opener), sorted
    for chunk in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[chunk])
        place = bisect.bisect_left(room, (length, -1))
        left, opener[chunk] = room.pop(place) if place < len(room) else (size, chunk)
        bisect.insort(room, (left - length, int(opener[chunk])))
    return opener


class Encoder:
    """Encodes texts, each behind `<|endoftext|>`, and flags the tokens that begin a word.

    A novel that happens to contain the letters of a special token does not make one.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", segmenter: Segmenter) -> None:
        self._segmenter = segmenter
        tokenizer("", split_special_tokens=True)  # sets the backend so
        self._backend = tokenizer.backend_tokenizer
        self._start_id = document_start_id(tokenizer)

    def __call__(self, texts: Iterable[str]) -> Iterator[tuple[Tokens, Bools]]:
        """Give the tokens and flags of each text, (T + 1,), encoding one batch ahead."""
        encode = partial(self._backend.encode_batch, add_special_tokens=False)
        with ThreadPoolExecutor(1) as pool:
            batches = chain(gather(texts, BATCH), [[]])
            pending = ((batch, pool.submit(encode, batch)) for batch in batches)
            for (batch, encodings), _ in pairwise(pending):
                for text, encoding in zip(batch, encodings.result(), strict=True):
                    yield self._flagged(text, encoding)

    def passage(self, text: str) -> tuple[Window, list[tuple[int, int]]]:
        """Make a window of one text, as training has it, and say where each token stands in it.

        The window begins with `<|endoftext|>`; the offsets, in characters, are of the tokens
        behind it.
        """
        encoding = self._backend.encode(text, add_special_tokens=False)
        ids, starts = self._flagged(text, encoding)
        words, positions = np.cumsum(starts, dtype=np.int32), np.arange(len(ids), dtype=np.int32)
        return Window(ids, words, positions, key=0, epoch=0), encoding.offsets

    def _flagged(self, text: str, encoding: "Encoding") -> tuple[Tokens, Bools]:
        """Flag what begins a word, as a token with the end of one and the start of the next does.

        Tokens of one character all end with it.
        """
        ends = np.array([end for _, end in encoding.offsets], np.int64)
        edges = np.cumsum([0, *map(len, self._segmenter.cut(text))])
        flags = np.zeros(len(ends) + 1, np.bool_)
        flags[np.searchsorted(ends, edges[:-1], side="right")] = True
        ids = np.array([self._start_id, *encoding.ids], np.int32)
        # Characters behind the last token, which its normalizer dropped, begin none.
        return ids, np.append(True, flags[:-1])
