"""Which tokens are masked: spans and singles, arranged exactly and keyed."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from wuxia_core.errors import ConfigError

KEPT, SINGLE, SPAN = 0, 1, 2

Bools = npt.NDArray[np.bool_]
Ints = npt.NDArray[np.int64]
Words = npt.NDArray[np.int32]
Kinds = npt.NDArray[np.int8]


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
                f"masking.span_length {list(self.span_length)}: must be [short, long]"
            )
        if not 0 < self.mask_ratio <= self.largest_ratio:
            raise ConfigError(
                f"masking.mask_ratio {self.mask_ratio}: must lie in (0, {self.largest_ratio:.2f}]; "
                "above that no unmasked token is left between two masked blocks"
            )

    @property
    def largest_ratio(self) -> float:
        """Masked share at which each block has just one unmasked token beside it."""
        return 1 / (1 + self.span_ratio / self._mean_length + (1 - self.span_ratio))

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
            within one token; no two blocks touch and none leaves a run of maskable tokens.
        """
        kinds = np.zeros(maskable.shape, np.int8)
        for row, key in enumerate(keys):
            rng = np.random.default_rng([self.seed, epoch, int(key)])
            words = None if word_ids is None else word_ids[row]
            self._fill_row(kinds[row], maskable[row], words, rng)
        return kinds

    def _fill_row(
        self, kinds: Kinds, maskable: Bools, words: Words | None, rng: np.random.Generator
    ) -> None:
        """Share the row's masked tokens among its runs of maskable tokens and fill each run."""
        seen, dither = 0, rng.random()
        for start, end in _runs(maskable):
            n = end - start
            count = _share(seen + n, self.mask_ratio, dither) - _share(
                seen, self.mask_ratio, dither
            )
            seen += n
            if words is None:
                kinds[start:end] = self._arrange(n, count, rng)
            else:
                kinds[start:end] = self._arrange_words(words[start:end], count, rng)

    def _lengths(self, count: int, rng: np.random.Generator) -> Ints:
        """Draw span lengths whose sum is near `span_ratio * count` and at most `count`.

        Lengths come from shuffled rounds of every allowed length, so each is uniform and the sum
        strays little.
        """
        shortest, longest = self.span_length
        spans = int(count * self.span_ratio / self._mean_length + rng.random())
        each = np.arange(shortest, longest + 1)
        rounds = rng.permuted(np.tile(each, (-(-spans // len(each)), 1)), axis=1)
        lengths = rounds.ravel()[:spans]
        return lengths[np.cumsum(lengths) <= count]

    def _arrange(self, n: int, count: int, rng: np.random.Generator) -> Kinds:
        """Place blocks in `n` tokens, uniform over all arrangements with a gap between blocks.

        Stars and bars: choosing `len(blocks)` of `n - count + 1` places is choosing the gaps.
        """
        spans = self._lengths(count, rng)
        blocks = np.concatenate([spans, np.ones(count - spans.sum(), np.int64)])
        blocks = blocks[: n - count + 1]  # more blocks than that leave no room for the gaps
        kind = np.where(np.arange(len(blocks)) < len(spans), SPAN, SINGLE)
        order = rng.permutation(len(blocks))
        blocks, kind = blocks[order], kind[order]
        places = np.sort(rng.choice(n - blocks.sum() + 1, len(blocks), replace=False))
        kinds = np.zeros(n, np.int8)
        kinds[np.repeat(places, blocks) + np.arange(blocks.sum())] = np.repeat(kind, blocks)
        return kinds

    def _arrange_words(self, words: Words, count: int, rng: np.random.Generator) -> Kinds:
        """Place spans of whole words first, then singles where nothing touches them."""
        kinds = np.zeros(len(words), np.int8)
        spans = _whole_words(words, self.span_length)
        target = count * self.span_ratio - self._mean_length * rng.random()
        for start, end in spans[rng.permutation(len(spans))]:
            if (kinds > 0).sum() > target:
                break
            if (kinds > 0).sum() + end - start <= count:
                _place(kinds, start, end, SPAN)
        for start in rng.permutation(len(words)):
            if (kinds > 0).sum() >= count:
                break
            _place(kinds, start, start + 1, SINGLE)
        return kinds


def _share(n: int, ratio: float, dither: float) -> int:
    return int(n * ratio + dither)


def _runs(maskable: Bools) -> list[tuple[int, int]]:
    """Find the runs of maskable tokens: `[0, 1, 1, 0, 1] -> [(1, 3), (4, 5)]`."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], maskable, [False]])))
    return [(int(start), int(end)) for start, end in edges.reshape(-1, 2)]


def _whole_words(words: Words, span_length: tuple[int, int]) -> Ints:
    """List every span of whole words of an allowed length.

    Words `[0, 0, 1, 2, 2]` and lengths 3 to 5 give `[[0, 3], [0, 5], [2, 5]]`.
    """
    edges = np.flatnonzero(np.diff(words, prepend=-1, append=-1))
    lengths = edges[None, :] - edges[:, None]
    first, last = np.nonzero((lengths >= span_length[0]) & (lengths <= span_length[1]))
    return np.stack([edges[first], edges[last]], axis=1)


def _place(kinds: Kinds, start: int, end: int, kind: int) -> None:
    """Mark `[start, end)` unless a masked token lies in it or beside it."""
    if not kinds[max(0, start - 1) : end + 1].any():
        kinds[start:end] = kind
