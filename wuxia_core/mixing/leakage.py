"""Keep held-out text apart from training text: no sentence of it may stand in both.

Runs of 13 characters are compared, spaces aside, as is usual for decontamination (Brown et al. 2020
use 13 words). Closing formulas such as 且听下回分解 make up most of what novels share; they go too,
so that nothing scored was seen.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from wuxia_core.corpus.ngrams import Codes, Hashes, codes, ngrams

RUN = 13
FILTER_BITS = np.uint64(24)
SENTENCE = re.compile(r"[^。！？!?\n]*(?:[。！？!?]+[”’』」）]*|\n|\Z)")


@dataclass(frozen=True)
class Leakage:
    """Runs of 13 characters of held-out text that training text has too.

    `longest` is the longest stretch of such runs in a row, in characters.
    """

    runs: int
    shared: int
    longest: int

    @property
    def share(self) -> float:
        """Shared runs among all."""
        return self.shared / max(1, self.runs)


class HeldOutRuns:
    """The runs of held-out texts, and which of them training text has."""

    def __init__(self, texts: Iterable[str]) -> None:
        hashes = [ngrams(_written(text)[0], RUN) for text in texts]
        none = np.array([np.iinfo(np.uint64).max], np.uint64)
        self._known = np.unique(np.concatenate([none, *hashes]))
        self._seen = np.zeros(len(self._known), np.bool_)
        self._filter = np.zeros(1 << int(FILTER_BITS), np.bool_)
        self._filter[self._known >> (np.uint64(64) - FILTER_BITS)] = True

    def see(self, text: str) -> None:
        """Note the runs of a training text."""
        hashes = ngrams(_written(text)[0], RUN)
        known, places = self._find(hashes[self._filter[hashes >> (np.uint64(64) - FILTER_BITS)]])
        self._seen[places[known]] = True

    def shared(self, text: str) -> npt.NDArray[np.bool_]:
        """Flag the runs of a text that stand in held-out and in training text."""
        known, places = self._find(ngrams(_written(text)[0], RUN))
        return known & self._seen[places]

    def _find(self, hashes: Hashes) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.int64]]:
        """Say which hashes are held-out text's, and where; the last entry stands in for none."""
        places = np.searchsorted(self._known[:-1], hashes)
        return self._known[places] == hashes, places

    def without_shared(self, text: str) -> str:
        """Drop the sentences in which a shared run has its middle."""
        middles = _written(text)[1][np.flatnonzero(self.shared(text)) + RUN // 2]
        if not len(middles):
            return text
        spans = [match.span() for match in SENTENCE.finditer(text)]
        starts = np.array([start for start, _ in spans])
        dropped = set((np.searchsorted(starts, middles, side="right") - 1).tolist())
        kept = "".join(text[a:b] for n, (a, b) in enumerate(spans) if n not in dropped)
        return re.sub(r"\n+", "\n", kept).strip("\n")

    def leakage(self, texts: Iterable[str]) -> Leakage:
        """Count what held-out texts share with the training text seen."""
        flags = [self.shared(text) for text in texts]
        longest = max((_longest(flag) for flag in flags), default=0)
        return Leakage(
            runs=sum(map(len, flags)),
            shared=sum(int(flag.sum()) for flag in flags),
            longest=longest + RUN - 1 if longest else 0,
        )


def _written(text: str) -> tuple[Codes, npt.NDArray[Any]]:
    """Characters that are not spaces, and where in the text they stand."""
    characters = codes(text)
    places = np.flatnonzero((characters > 0x20) & (characters != 0x3000))
    return characters[places], places


def _longest(flags: npt.NDArray[np.bool_]) -> int:
    """Length of the longest stretch of flags: `[1, 0, 1, 1] -> 2`."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], flags, [False]])))
    return int(np.diff(edges)[::2].max(initial=0))
