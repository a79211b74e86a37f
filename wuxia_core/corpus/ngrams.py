"""Runs of n characters as numbers, so that millions of them can be compared."""

import functools

import numpy as np
import numpy.typing as npt

Hashes = npt.NDArray[np.uint64]
Codes = npt.NDArray[np.uint32]

FACTOR = 0x9E3779B97F4A7C15
INVERSE = pow(FACTOR, -1, 1 << 64)
MIX = np.uint64(0xBF58476D1CE4E5B9)  # splitmix64's


def codes(text: str) -> Codes:
    """Code points, (C,)."""
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)


def is_han(characters: Codes) -> npt.NDArray[np.bool_]:
    """Flag CJK ideographs, (C,)."""
    return (characters >= 0x3400) & (characters < 0xA000)


def ngrams(characters: Codes, n: int) -> Hashes:
    """Hash every run of n characters: (C - n + 1,), empty where there are fewer.

    A rolling hash (Karp & Rabin 1987) modulo 2^64, by differences of running sums.
    """
    count = max(0, len(characters) - n + 1)
    up, down = _powers(len(characters))
    sums = np.zeros(len(characters) + 1, np.uint64)
    np.cumsum(characters * down, out=sums[1:])
    hashes = (sums[n:] - sums[:count]) * up[:count] if count else np.empty(0, np.uint64)
    hashes ^= hashes >> np.uint64(31)
    hashes *= MIX
    return np.asarray(hashes ^ (hashes >> np.uint64(29)))


def distinct(hashes: Hashes) -> Hashes:
    """Sort in place and keep each once; numpy's `unique` is slower and takes twice the memory."""
    hashes.sort()
    new = np.append(True, hashes[1:] != hashes[:-1])[: len(hashes)]
    return np.asarray(hashes[new])


def _powers(length: int) -> tuple[Hashes, Hashes]:
    """Powers of the factor and of its inverse, (length,) each."""
    up, down = _power_table(1 << max(length, 4096).bit_length())
    return up[:length], down[:length]


@functools.cache
def _power_table(length: int) -> tuple[Hashes, Hashes]:
    powers = []
    for factor in (FACTOR, INVERSE):
        steps = np.full(length, factor, np.uint64)
        steps[0] = 1
        powers.append(np.cumprod(steps))
    return powers[0], powers[1]
