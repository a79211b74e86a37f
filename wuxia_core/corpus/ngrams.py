"""Runs of n characters as numbers, so that millions of them can be compared."""

import numpy as np
import numpy.typing as npt

Hashes = npt.NDArray[np.uint64]
Codes = npt.NDArray[np.uint32]

FACTOR = np.uint64(0x9E3779B97F4A7C15)
MIX = np.uint64(0xBF58476D1CE4E5B9)  # splitmix64's


def codes(text: str) -> Codes:
    """Code points, (C,)."""
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)


def is_han(characters: Codes) -> npt.NDArray[np.bool_]:
    """Flag CJK ideographs, (C,)."""
    return (characters >= 0x3400) & (characters < 0xA000)


def ngrams(characters: Codes, n: int) -> Hashes:
    """Hash every run of n characters: (C - n + 1,), empty where there are fewer."""
    count = max(0, len(characters) - n + 1)
    hashes = np.zeros(count, np.uint64)
    for place in range(n):
        hashes *= FACTOR
        hashes += characters[place : place + count]
    hashes ^= hashes >> np.uint64(31)
    hashes *= MIX
    return np.asarray(hashes ^ (hashes >> np.uint64(29)))
