"""Did it copy? What generated texts share with the training text.

Characters are compared after NFC, white space aside, on both sides; nothing shared runs across two
documents. The training text is read a document at a time, so it may be far larger than memory.
"""

import unicodedata
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd
from tqdm import tqdm

from wuxia_core.corpus.ngrams import Codes, codes, ngrams

Documents = Callable[[], Iterable[tuple[str, str]]]
Places = npt.NDArray[np.int64]

# Characters. 14,853 pieces of 200 characters of six old novels share 6 or 7 with the other five
# (median), 99 % at most 11, and none over 19 but a poem that two of them quote.
FLAGGED = 30
RUN = 13  # characters, as mixing/leakage.py keeps held-out text apart
SEEDS = (8, 4, 2, 1)  # characters
BLOCK = 1 << 14  # characters hashed at a time
TABLE_BITS = np.uint64(20)
TEXT_END, BLOCK_END = 0x110000, 0x110001  # beyond Unicode, and not equal to each other
AROUND = 20  # characters shown on either side of a passage
COLUMNS = ["length", "passage", "generated", "start", "source", "offset", "title"]
NOTHING = (0, "", "", -1, "", -1, "")


def overlap(texts: Sequence[str], documents: Documents) -> pd.DataFrame:
    """Find each text's longest common substring with the training text, and its known 13-grams.

    Runs of 8 characters that both have are found by a rolling hash (Karp & Rabin 1987) and compared
    as far as they go, so that colliding hashes change nothing; a text that shares none is looked
    for by runs of 4, 2 and 1. Give all texts at once: the training text is read each time.
    `["一剑光寒"]` against `[("书", "剑光")]` gives length 2, start 1, offset 0.

    Parameters
    ----------
    texts : sequence of str
        Empty ones share nothing.
    documents : callable
        Gives (title, text) of every training document anew each time it is called.

    Returns
    -------
    A row a text. `length` in characters, `passage`; the same in 【】 with 20 characters on either
    side as `generated` and in the `source`, the first document that has it (`title`); `start` in
    the text and `offset` in the document, in characters after NFC, white space too; 0, -1 and ""
    where nothing is shared. `flagged`: 30 characters or more. Of the text's `runs` of 13 characters
    `shared` stand in the training text (containment: Broder 1997).
    """
    sought = _Sought(texts)
    for n in SEEDS:
        index = _Index(sought, n, [row[0] < n for row in sought.rows])
        if index.size:
            for title, text in tqdm(documents(), "copying", unit="document", leave=False):
                sought.compare(index, title, _Written.of(text))
    table = pd.DataFrame(sought.rows, columns=COLUMNS)
    return table.assign(
        flagged=table["length"] >= FLAGGED,
        runs=np.bincount(sought.owner[sought.room >= RUN], minlength=len(texts)),
        shared=np.bincount(sought.owner[sought.known], minlength=len(texts)),
    )


class _Written(NamedTuple):
    """Characters of a text after NFC that are not white space, and where in it they stand."""

    characters: Codes
    places: Places

    @classmethod
    def of(cls, text: str) -> "_Written":
        characters = codes(unicodedata.normalize("NFC", text))
        places = np.flatnonzero((characters > 0x20) & (characters != 0x3000))
        return cls(characters[places], places)

    def show(self, start: int, length: int) -> tuple[str, str, int]:
        """Return a passage, the same in 【】 with what stands around it, and where it begins."""
        edges = [max(0, start - AROUND), start, start + length, start + length + AROUND]
        parts = [part.tobytes() for part in np.split(self.characters, edges)[1:4]]
        before, passage, after = (part.decode("utf-32-le", "surrogatepass") for part in parts)
        return passage, f"{before}【{passage}】{after}", int(self.places[start])


class _Sought:
    """The texts, one behind the other (Q,), and what of them was found so far."""

    def __init__(self, texts: Sequence[str]) -> None:
        self.texts = [_Written.of(text) for text in texts]
        lengths = np.array([len(text.characters) for text in self.texts], np.int64)
        parts = [np.append(text.characters, np.uint32(TEXT_END)) for text in self.texts]
        self.characters = np.concatenate([np.empty(0, np.uint32), *parts])
        self.owner = np.repeat(np.arange(len(texts)), lengths + 1)
        self.starts = np.cumsum(lengths + 1) - lengths - 1
        self.room = (self.starts + lengths)[self.owner] - np.arange(len(self.owner))  # to the end
        self.longest = int(lengths.max(initial=0))
        self.known = np.zeros(len(self.owner), np.bool_)  # a run of 13 begins here
        self.rows = [NOTHING] * len(texts)

    def compare(self, index: "_Index", title: str, source: _Written) -> None:
        """Look for the indexed texts in a document, a block at a time."""
        for first in range(0, len(source.characters), BLOCK):
            block = source.characters[first : first + BLOCK + self.longest]
            p, q = index.find(block)
            begins = (p == 0) | (block[p - 1] != self.characters[q - 1])  # else one to its left
            p, q = p[begins], q[begins]
            length = _extend(block, p, self.characters, q)
            for at in np.flatnonzero(length >= RUN):
                self.known[q[at] : q[at] + length[at] - RUN + 1] = True
            order = np.argsort(-length, kind="stable")
            owners, best = np.unique(self.owner[q[order]], return_index=True)
            for number, at in zip(owners.tolist(), order[best].tolist(), strict=True):
                if length[at] > self.rows[number][0]:
                    start, size = q[at] - self.starts[number], int(length[at])
                    there = source.show(first + p[at], size)[1:]
                    self.rows[number] = (size, *self.texts[number].show(start, size), *there, title)


class _Index:
    """Hashes of the runs of n characters of some of the texts, sorted, and where they stand."""

    def __init__(self, sought: _Sought, n: int, wanted: Sequence[bool]) -> None:
        places = np.flatnonzero((sought.room >= n) & np.array(wanted, np.bool_)[sought.owner])
        hashes = ngrams(sought.characters, n)[places]
        order = np.argsort(hashes, kind="stable")
        self.n, self.size = n, len(places)
        self._hashes, self._places = hashes[order], places[order]
        self._table = np.zeros(1 << int(TABLE_BITS), np.bool_)  # keeps most out of the search
        self._table[hashes >> (np.uint64(64) - TABLE_BITS)] = True

    def find(self, block: Codes) -> tuple[Places, Places]:
        """Pair places of a block and of the texts whose runs have one hash, (M,) each."""
        hashes = ngrams(block, self.n)
        p = np.flatnonzero(self._table[hashes >> (np.uint64(64) - TABLE_BITS)])
        left = np.searchsorted(self._hashes, hashes[p])
        count = np.searchsorted(self._hashes, hashes[p], "right") - left
        first = np.repeat(left - np.cumsum(count) + count, count)
        return np.repeat(p, count), self._places[first + np.arange(len(first))]


def _extend(block: Codes, p: Places, texts: Codes, q: Places) -> Places:
    """Count the characters that are equal from each pair of places on, (M,)."""
    block = np.append(block, np.uint32(BLOCK_END))
    length = np.zeros(len(p), np.int64)
    alive = np.arange(len(p))
    while len(alive):
        at = length[alive]
        alive = alive[block[p[alive] + at] == texts[q[alive] + at]]
        length[alive] += 1
    return length


def passages(overlaps: pd.DataFrame, count: int = 10) -> pd.DataFrame:
    """Show the longest passages of `overlap`'s table beside their source, longest first.

    At most `count` rows: number of the `text`, `length`, `flagged`, `generated`, `source`, `title`
    and `offset`. Texts that share nothing are left out.
    """
    shared = overlaps[overlaps["length"] > 0].sort_values("length", ascending=False, kind="stable")
    columns = ["length", "flagged", "generated", "source", "title", "offset"]
    return shared[columns].head(count).rename_axis("text").reset_index()
