"""Which tokens are masked: how many in spans and how many single, and where."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from wuxia_core.errors import ConfigError, DataError
from wuxia_core.masking import keyed
from wuxia_core.masking.arrange import (
    RUN_BITS,
    SPAN,
    TOKENS,
    Bools,
    Floats,
    Ints,
    Kinds,
    Runs,
    arrange,
    span_room,
)
from wuxia_core.masking.words import Words, place_word_spans


@dataclass(frozen=True)
class SpanMasker:
    """Draw which tokens are masked.

    `SpanMasker(0.5, 0, seed=1).kinds(np.ones((1, 6), bool), [0])` masks three of the six tokens,
    each alone: `[[1, 0, 1, 0, 0, 1]]`, say.

    Parameters
    ----------
    mask_ratio : float
        Share of the maskable tokens that is masked.
    span_ratio : float
        Share of the masked tokens that lies in spans; the others are single.
    span_length : (int, int)
        Shortest and longest span, tokens, both included; lengths are uniform between them.
    seed : int
        With a window's key and the epoch it decides the mask.

    Raises
    ------
    ConfigError
        Where a value is out of range or the ratio cannot be arranged.
    """

    mask_ratio: float = 0.15
    span_ratio: float = 0.5
    span_length: tuple[int, int] = (3, 5)
    seed: int = 0

    def __post_init__(self) -> None:
        shortest, longest = self.span_length
        if not 0 <= self.span_ratio <= 1:
            raise ConfigError(f"masking.span_ratio {self.span_ratio}: must lie in [0, 1]")
        if not 1 <= shortest <= longest:
            raise ConfigError(
                f"masking.span_length {list(self.span_length)}: must be [shortest, longest], the "
                "shortest first and at least 1"
            )
        if self.seed < 0:
            raise ConfigError(f"training.seed {self.seed}: must be at least 0")
        if not 0 < self.mask_ratio <= self.largest_ratio:
            largest = math.floor(1000 * self.largest_ratio) / 1000
            raise ConfigError(
                f"masking.mask_ratio {self.mask_ratio}: must lie in (0, {largest:.3f}]; "
                "above that no unmasked token is left between two masked blocks"
            )

    @property
    def largest_ratio(self) -> float:
        """Masked share at which each block has just one unmasked token beside it.

        Room for a span is counted as if it were of the longest.
        """
        mean, longest = self._mean_length, self.span_length[1]
        dense = 1 / (1 + self.span_ratio / mean + (1 - self.span_ratio))
        return min(dense, mean / (longest + 1) / self.span_ratio) if self.span_ratio else dense

    @property
    def _mean_length(self) -> float:
        return sum(self.span_length) / 2

    def kinds(
        self,
        maskable: Bools,
        keys: Sequence[int] | Ints,
        epoch: int = 0,
        word_ids: Words | None = None,
    ) -> Kinds:
        """Draw one mask a row.

        Parameters
        ----------
        maskable : (B, T) bool
            Where a token may be masked: no special token, no padding, no first token of a document.
        keys : (B,) int
            What tells the windows apart.
        epoch : int
            Each epoch has its own masks.
        word_ids : (B, T) int32, optional
            Number of the word each token belongs to; spans then cover whole words.

        Returns
        -------
        (B, T) int8
            0 kept, 1 single, 2 in a span. `mask_ratio` of a row's maskable tokens is masked, to
            within one token, and `span_ratio` of that in spans, to within half a span as long as a
            row has some tens of tokens; no two blocks touch and none leaves a run of maskable
            tokens. Whole words may leave too little room for that at ratios above 0.5. Runs get
            their share by length; inside a run every arrangement is equally likely.

        Raises
        ------
        DataError
            Where a row is too long.
        """
        if maskable.shape[1] >= 1 << RUN_BITS:
            raise DataError(
                f"masks are drawn for rows of {(1 << RUN_BITS) - 1:,} tokens at most, not of "
                f"{maskable.shape[1]:,}; cut the text"
            )
        kinds = np.zeros(maskable.shape, np.int8)
        states = keyed.row_states(self.seed, epoch, keys)
        step = max(1, TOKENS // (maskable.shape[1] + 1))
        for start in range(0, len(kinds), step):
            rows = slice(start, start + step)
            words = None if word_ids is None else word_ids[rows]
            self._fill(kinds[rows], maskable[rows], words, states[rows])
        return kinds

    def _fill(
        self, kinds: Kinds, maskable: Bools, word_ids: Words | None, states: keyed.Bits
    ) -> None:
        """Draw the masks of some rows: spans and singles at once, or spans of whole words first."""
        longest = self.span_length[1]
        runs = Runs.of(maskable)
        dithers = keyed.uniforms(states, 3)
        count = np.floor(runs.per_row(runs.length) * self.mask_ratio + dithers[:, 0])
        if word_ids is None:
            room = runs.per_row(span_room(runs.length, longest))
            spans = self._draw_lengths(count, room, dithers[:, 1:], keyed.branch(states, 2))
        else:
            recipe = self.span_ratio, self.span_length
            place_word_spans(kinds, maskable, word_ids, count, *recipe, keyed.branch(states, 2))
            count -= (kinds == SPAN).sum(1)
            runs, spans = Runs.of(maskable & ~_beside(kinds)), np.zeros((len(kinds), 0), np.int64)
        singles = count.astype(np.int64) - spans.sum(1)
        arrange(kinds, runs, spans, longest, singles, keyed.branch(states, 3))

    def _draw_lengths(self, count: Floats, room: Ints, dithers: Floats, states: keyed.Bits) -> Ints:
        """Draw the lengths of each row's spans in random order, (B, S), zeros behind them.

        Their sum is `span_ratio * count` (B,) on average and at most half a span from it, and each
        length is as likely as the others: one dither moves the sum by as much as it moves the
        number of spans. A row has at most `room` (B,) spans.
        """
        shortest, longest = self.span_length
        mean = self._mean_length
        wanted = np.minimum(count * self.span_ratio, room * mean)
        spans = np.maximum(np.floor(wanted / mean + dithers[:, 0]), wanted > mean / 2)
        spans = np.minimum(spans, count // shortest)
        total = np.floor(wanted + mean * (dithers[:, 0] - 0.5) + 0.5)
        total = np.clip(total, shortest * spans, np.minimum(longest * spans, count))
        longer = self._longer_than(spans, total, dithers[:, 1])
        places = np.arange(int(spans.max(initial=0)))
        there = places < spans[:, None]
        lengths = np.where(there, shortest + (places[:, None] < longer[:, None]).sum(2), 0)
        draws = np.where(there, keyed.uniforms(states, len(places)), 1)
        order = np.argsort(draws, axis=1, kind="stable")
        return np.take_along_axis(lengths, order, axis=1)

    def _longer_than(self, spans: Floats, total: Floats, dither: Floats) -> Floats:
        """Count each row's spans that exceed the shortest length, the next, … (B, K - 1).

        A uniform draw's counts, moved evenly so that they add up to what `total` asks for. Where so
        few spans cannot do that, the lengths come nearer to the shortest or the longest.
        """
        shortest, longest = self.span_length
        steps = longest - shortest
        most, wanted = steps * spans, total - shortest * spans
        uniform = np.arange(steps, 0, -1) / (steps + 1)
        even = spans / (steps + 1)
        over = np.clip((wanted - most / 2) / max(1, steps), -even, even)
        expected = spans[:, None] * uniform + over[:, None]  # (B, K - 1)
        got = expected.sum(1)
        fewer = np.minimum(1, wanted / np.maximum(got, 1e-9))[:, None]
        more = np.minimum(1, (most - wanted) / np.maximum(most - got, 1e-9))[:, None]
        expected = spans[:, None] - (spans[:, None] - expected * fewer) * more
        reached = np.floor(np.cumsum(expected, axis=1) + dither[:, None] + 1e-10)
        return np.diff(reached, axis=1, prepend=0)


def coverage(
    masker: SpanMasker,
    maskable: Bools,
    keys: Sequence[int] | Ints,
    epochs: int,
    word_ids: Words | None = None,
) -> Floats:
    """Share of the maskable tokens that was masked at least once after each epoch, (epochs,).

    Independent draws would cover 1 - (1 - mask_ratio)^E after E epochs.
    """
    seen = np.zeros(maskable.shape, np.bool_)
    shares = []
    for epoch in range(epochs):
        seen |= masker.kinds(maskable, keys, epoch, word_ids) > 0
        shares.append(seen.sum() / maskable.sum())
    return np.array(shares)


def _beside(kinds: Kinds) -> Bools:
    """Mark masked tokens and their neighbours."""
    masked = kinds > 0
    beside = masked.copy()
    beside[:, 1:] |= masked[:, :-1]
    beside[:, :-1] |= masked[:, 1:]
    return beside
