"""Random numbers that hang on (seed, epoch, key of the row, place) alone, for many rows at once.

NumPy's generators would do, but starting one for each row takes longer than the mask itself, and
their streams may change between versions. This is SplitMix64 (Steele, Lea & Flood 2014, "Fast
splittable pseudorandom number generators", figure 16).
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Bits = npt.NDArray[np.uint64]

MOST = np.uint64(2**64 - 1)
GAMMA = np.uint64(0x9E3779B97F4A7C15)


def row_states(seed: int, epoch: int, keys: Sequence[int] | npt.NDArray[np.int64]) -> Bits:
    """Make a state for each row, (B,)."""
    states = np.array(keys, np.int64).astype(np.uint64)
    for number in (seed, epoch):
        states = mixed(states + np.array([number], np.uint64) * GAMMA)
    return states


def branch(states: Bits, name: int) -> Bits:
    """Make independent states for another purpose, (B,)."""
    return mixed(states ^ np.uint64(name))


def mixed(values: Bits) -> Bits:
    """Scramble 64-bit numbers, in place."""
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        values ^= values >> np.uint64(shift)
        values *= np.uint64(factor)
    values ^= values >> np.uint64(31)
    return values


def bits(states: Bits, count: int) -> Bits:
    """Draw 64 random bits `count` times a row, (B, count)."""
    return mixed(states[:, None] + GAMMA * np.arange(1, count + 1, dtype=np.uint64))


def uniforms(states: Bits, count: int) -> npt.NDArray[np.float64]:
    """Draw from [0, 1) in steps of 2^-32, (B, count): sums with small integers are exact."""
    return (bits(states, count) >> np.uint64(32)).astype(np.float64) * 2.0**-32
