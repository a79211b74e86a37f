"""Place spans and singles in runs of tokens so that every arrangement of a run is equally likely.

A run of n maskable tokens is seen as n + 1 places that are tiled by kept tokens, one place each,
and by blocks with the kept token behind them: a span of L takes L + 1 places, a single two. The
orders of the tiles are the arrangements in which no two blocks touch, so that a random order of
the tiles is a random arrangement.
"""

from dataclasses import dataclass
from typing import Self

import numpy as np
import numpy.typing as npt

from wuxia_core.masking import keyed

KEPT, SINGLE, SPAN = 0, 1, 2

Bools = npt.NDArray[np.bool_]
Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Kinds = npt.NDArray[np.int8]

TILE_BITS, RUN_BITS = 20, 18  # of 64; the rest is chance
TOKENS = 1 << 17  # that are arranged at a time
SLACK = 6.0  # standard deviations


@dataclass(frozen=True)
class Runs:
    """The runs of maskable tokens in (B, T), in reading order; each array is (R,)."""

    rows: int
    row: Ints
    start: Ints  # in the flattened (B, T)
    length: Ints

    @classmethod
    def of(cls, maskable: Bools) -> Self:
        """Find them: `[[0, 1, 1], [1, 0, 1]]` has runs of 2, 1 and 1 tokens at 1, 3 and 5."""
        rows, tokens = maskable.shape
        padded = np.zeros((rows, tokens + 2), np.int8)
        padded[:, 1:-1] = maskable
        edges = np.flatnonzero(padded[:, 1:] != padded[:, :-1]).reshape(-1, 2)
        row, start = np.divmod(edges[:, 0], tokens + 1)
        return cls(rows, row, row * tokens + start, edges[:, 1] - edges[:, 0])

    def per_row(self, values: Ints) -> Ints:
        """Add up values of the runs by row, (B,)."""
        return np.bincount(self.row, values, self.rows).astype(np.int64)

    def share_out(self, count: Ints, room: Ints, dither: Floats) -> Ints:
        """Share each row's `count` (B,) among its runs in proportion to their `room` (R,).

        Rounding is systematic: a run gets its share to within one, and never more than its room
        where the count is at most the row's room. Returns (R,).
        """
        reached = np.cumsum(room)
        reached -= (reached - room)[np.searchsorted(self.row, self.row)]
        total = np.maximum(1, self.per_row(room))[self.row]
        upto, before = (
            np.floor(places * count[self.row] / total + dither[self.row])
            for places in (reached, reached - room)
        )
        return (upto - before).astype(np.int64)


def span_room(length: Ints, longest: int) -> Ints:
    """How many spans of any length surely fit into runs of these lengths."""
    return (length + 1) // (longest + 1)


def arrange(
    kinds: Kinds, runs: Runs, spans: Ints, longest: int, singles: Ints, states: keyed.Bits
) -> None:
    """Write spans and singles into `kinds` (B, T).

    Parameters
    ----------
    spans : (B, S) int
        Lengths of each row's spans in random order, then zeros; as many as its runs have room for.
    longest : int
        Length that a span may have.
    singles : (B,) int
        How many singles each row gets. Those there is no room for are left out.
    states : (B,) uint64
        What decides the arrangement.
    """
    dithers = keyed.uniforms(keyed.branch(states, 1), 2)
    span_count = runs.share_out((spans > 0).sum(1), span_room(runs.length, longest), dithers[:, 0])
    lengths = spans[spans > 0]  # (all spans,) run after run
    span_run = np.repeat(np.arange(len(runs.row)), span_count)
    room = runs.length + 1 - np.bincount(span_run, lengths + 1, len(runs.row)).astype(np.int64)
    single_room = room // 2
    singles = np.minimum(singles, runs.per_row(single_room))
    single_count = runs.share_out(singles, single_room, dithers[:, 1])

    tiles, blocks = room - single_count + span_count, span_count + single_count
    drawn = _draw_tiles(runs, tiles, blocks, states)
    first = np.cumsum(blocks) - blocks
    span_tiles = drawn[ragged(first, span_count)]
    single_tiles = drawn[ragged(first + span_count, single_count)]

    sizes = np.ones(tiles.sum(), np.int64)
    sizes[span_tiles], sizes[single_tiles] = lengths + 1, 2
    places = np.cumsum(sizes) - sizes
    shift = runs.start - (np.cumsum(runs.length + 1) - (runs.length + 1))
    flat = kinds.reshape(-1)
    flat[places[single_tiles] + np.repeat(shift, single_count)] = SINGLE
    flat[ragged(places[span_tiles] + shift[span_run], lengths)] = SPAN


def _draw_tiles(runs: Runs, tiles: Ints, blocks: Ints, states: keyed.Bits) -> Ints:
    """Draw as many of each run's tiles as it has blocks, in random order; run after run.

    They are those with the smallest random numbers. Few that are above a threshold can be among
    them, so only the others are sorted, and all of them where those were too few.
    """
    draws = _numbers(runs, tiles, states)
    share = np.minimum(1, (blocks + SLACK * (1 + np.sqrt(blocks))) / tiles)
    ceiling = (share * float(1 << (64 - RUN_BITS))).astype(np.uint64)
    small = np.flatnonzero(draws <= np.repeat(ceiling, tiles))
    ends = np.cumsum(tiles)
    found = np.diff(np.searchsorted(small, ends), prepend=0)
    if (found < blocks).any():
        small, found = np.arange(len(draws)), tiles
    order = _sorted(draws[small], small, found)
    return order[ragged(np.cumsum(found) - found, blocks)]


def _numbers(runs: Runs, tiles: Ints, states: keyed.Bits) -> keyed.Bits:
    """Give each tile a random number that hangs on its row's state and its place in the row."""
    in_row = runs.per_row(tiles)
    first = (np.cumsum(in_row) - in_row).astype(np.uint64)
    numbers = np.arange(tiles.sum(), dtype=np.uint64)
    numbers *= keyed.GAMMA
    numbers += np.repeat(states - first * keyed.GAMMA, in_row)
    return keyed.mixed(numbers) >> np.uint64(RUN_BITS)


def _sorted(draws: keyed.Bits, tiles: Ints, counts: Ints) -> Ints:
    """Sort the tiles of each run by their random numbers.

    Run, random number and tile stand in one 64-bit number, so that a plain sort does it, the same
    on any machine.
    """
    low = np.uint64((1 << TILE_BITS) - 1)
    run = np.repeat(np.arange(len(counts), dtype=np.uint64), counts)
    numbers = (run << np.uint64(64 - RUN_BITS)) | (draws & ~low) | tiles.astype(np.uint64)
    numbers.sort()
    return (numbers & low).astype(np.int64)


def ragged(start: Ints, count: Ints) -> Ints:
    """Count on from each start: `[5, 9], [2, 3] -> [5, 6, 9, 10, 11]`."""
    return np.repeat(start - (np.cumsum(count) - count), count) + np.arange(count.sum())
