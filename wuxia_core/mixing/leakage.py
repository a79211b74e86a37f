"""Keep held-out text apart from training text: no sentence of it may stand in both.

Runs of 13 characters are compared, spaces aside, as is usual for decontamination (Brown et al. 2020
use 13 words). Closing formulas such as 且听下回分解 make up most of what novels share; they go too,
so that nothing scored was seen.
"""

import re
from array import array
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from wuxia_core.corpus.ngrams import Codes, Hashes, codes, distinct, ngrams
from wuxia_core.mixing.store import Flags

RUN = 13
FILTER_BITS = np.uint64(24)
SENTENCE = re.compile(r"[^。！？!?\n]*(?:[。！？!?]+[”’』」）]*|\n|\Z)")


@dataclass
class Leakage:
    """Runs of 13 characters of held-out text that training text has too.

    `longest` is the longest stretch of such runs in a row, in characters.
    """

    runs: int = 0
    shared: int = 0
    longest: int = 0

    @property
    def share(self) -> float:
        """Shared runs among all."""
        return self.shared / max(1, self.runs)

    def add(self, shared: Flags) -> None:
        """Count a text's runs, flagged where they are shared."""
        self.runs += len(shared)
        self.shared += int(shared.sum())
        stretch = _longest(shared)
        self.longest = max(self.longest, stretch + RUN - 1 if stretch else 0)


class HeldOutRuns:
    """The runs of held-out texts, and which of them training text has."""

    def __init__(self, texts: Iterable[str]) -> None:
        hashes = array("Q", [np.iinfo(np.uint64).max])
        for text in texts:
            hashes.frombytes(ngrams(_written(text)[0], RUN).tobytes())
        self._known = distinct(np.frombuffer(hashes, np.uint64))
        self._seen = np.zeros(len(self._known), np.bool_)
        self._filter = np.zeros(1 << int(FILTER_BITS), np.bool_)
        self._filter[self._known >> (np.uint64(64) - FILTER_BITS)] = True

    def see(self, text: str) -> None:
        """Note the runs of a training text."""
        hashes = ngrams(_written(text)[0], RUN)
        known, places = self._find(hashes[self._filter[hashes >> (np.uint64(64) - FILTER_BITS)]])
        self._seen[places[known]] = True

    def shared(self, text: str) -> Flags:
        """Flag the runs of a text that stand in held-out and in training text."""
        known, places = self._find(ngrams(_written(text)[0], RUN))
        return known & self._seen[places]

    def _find(self, hashes: Hashes) -> tuple[Flags, npt.NDArray[np.int64]]:
        """Say which hashes are held-out text's, and where; the last entry stands in for none."""
        places = np.searchsorted(self._known[:-1], hashes)
        return self._known[places] == hashes, places


def without(text: str, shared: Flags) -> str:
    """Drop the sentences in which a flagged run has its middle."""
    middles = _written(text)[1][np.flatnonzero(shared) + RUN // 2]
    if not len(middles):
        return text
    spans = [match.span() for match in SENTENCE.finditer(text)]
    starts = np.array([start for start, _ in spans])
    dropped = set((np.searchsorted(starts, middles, side="right") - 1).tolist())
    kept = "".join(text[a:b] for n, (a, b) in enumerate(spans) if n not in dropped)
    return re.sub(r"\n+", "\n", kept).strip("\n")


def _written(text: str) -> tuple[Codes, npt.NDArray[Any]]:
    """Characters that are not spaces, and where in the text they stand."""
    characters = codes(text)
    places = np.flatnonzero((characters > 0x20) & (characters != 0x3000))
    return characters[places], places


def _longest(flags: Flags) -> int:
    """Length of the longest stretch of flags: `[1, 0, 1, 1] -> 2`."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], flags, [False]])))
    return int(np.diff(edges)[::2].max(initial=0))
