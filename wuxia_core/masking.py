"""Which tokens of a window are masked, what stands in their place, and what the model is asked.

`SpanMasker` draws the positions, `Corruption` what the model sees there, `MaskCollator` makes
windows into model inputs. A draw depends only on (seed, epoch, key of the window): each window has
generators of its own, so its mask is the same in any batch, on any rank and in any worker.

Masks are arranged by stars and bars. A run of n maskable tokens is seen as n + 1 places, tiled by
kept tokens of one place each and by masked blocks with the kept token behind them: a span of L
tokens takes L + 1 places, a single two. The orders of the tiles are the arrangements in which no
two blocks touch, so that shuffled tiles are a random arrangement.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import numpy as np
import numpy.typing as npt
from numpy.random import Generator

from wuxia_core.errors import ConfigError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

KEPT, SINGLE, SPAN = 0, 1, 2
UNTOUCHED, MASKED, RANDOM, UNCHANGED = 0, 1, 2, 3
IGNORE_INDEX = -100

Bools = npt.NDArray[np.bool_]
Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Kinds = npt.NDArray[np.int8]
Tokens = npt.NDArray[np.int32]
Keys = Sequence[int] | Ints
Shares = tuple[float, float, float]

FOR_MASKS, FOR_ACTIONS, FOR_TOKENS = 0, 1, 2  # what a window's generators draw


class Window(NamedTuple):
    """Chunks of one or more documents, one behind the other, as the collator takes them."""

    input_ids: Tokens  # (T,)
    word_ids: Tokens  # (T,)
    position_ids: Tokens  # (T,), from 0 in each chunk
    key: int
    epoch: int
    row: int = 0  # its place among the windows of its split


@dataclass(frozen=True)
class SpanMasker:
    """Draw which tokens are masked.

    `SpanMasker(0.5, 0, seed=1).kinds(np.ones((1, 6), bool), [0])` masks three of the six tokens,
    each alone: `[[1, 0, 1, 0, 0, 1]]`, say. A value that is out of range, or a ratio that cannot be
    arranged, is a `ConfigError`.

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
                f"masking.span_length {[*self.span_length]}: must be [shortest, longest]"
            )
        # one unmasked token is left a block; spans count as the longest
        mean = (shortest + longest) / 2
        dense = 1 / (1 + self.span_ratio / mean + (1 - self.span_ratio))
        largest = min(dense, mean / (longest + 1) / (self.span_ratio or 1))
        if not 0 < self.mask_ratio <= largest:
            bounds = f"(0, {int(1000 * largest) / 1000:.3f}]"
            why = f"must lie in {bounds}, to leave a token between two masked blocks"
            raise ConfigError(f"masking.mask_ratio {self.mask_ratio}: {why}")

    def kinds(
        self, maskable: Bools, keys: Keys, epoch: int = 0, word_ids: Tokens | None = None
    ) -> Kinds:
        """Draw one mask a row, (B, T) int8: 0 kept, 1 single, 2 in a span.

        `mask_ratio` of a row's maskable tokens is masked, to within one token, and `span_ratio` of
        that in spans, to within half a span as long as a row has some tens of tokens; no two blocks
        touch and none leaves a run of maskable tokens. Whole words may leave too little room for
        that at ratios above 0.5. Runs get their share by length; inside a run every arrangement is
        equally likely.

        Parameters
        ----------
        maskable : (B, T) bool
            Where a token may be masked: no special token, no padding, no first token of a chunk.
        keys : (B,) int
            What tells the windows apart.
        epoch : int
            Each epoch has its own masks.
        word_ids : (B, T) int32, optional
            Number of the word each token belongs to; spans then cover whole words.
        """
        ended = np.pad(maskable, ((0, 0), (0, 1)))
        kinds: Kinds = np.zeros(ended.shape, np.int8)
        words = [None] * len(kinds) if word_ids is None else word_ids
        for row, tokens, ids, key in zip(kinds, ended, words, keys, strict=True):
            self._fill(row, tokens, ids, _generator(FOR_MASKS, self.seed, epoch, key))
        return kinds[:, :-1]

    def _fill(self, row: Kinds, maskable: Bools, words: Tokens | None, rng: Generator) -> None:
        """Write the mask of a row, (T + 1,): the last run, too, has a place behind it."""
        count = int(np.count_nonzero(maskable) * self.mask_ratio + _dither(rng))
        if words is not None:
            self._place_word_spans(row, maskable, words, count, rng)
            spans = row > KEPT
            maskable = maskable & ~(spans | np.roll(spans, 1) | np.roll(spans, -1))
        places = maskable | np.roll(maskable, 1)  # the tokens of a run and the one behind it
        rooms = np.diff(np.flatnonzero(~maskable[places]), prepend=-1)  # places of a run, (R,)
        span_rooms = rooms // (self.span_length[1] + 1)
        lengths: Ints = np.empty(0, np.int64)
        if words is None:
            lengths = self._draw_lengths(count, int(span_rooms.sum()), rng)
        singles = int(count - np.count_nonzero(row) - lengths.sum())
        row[places] = _arrange(rooms, lengths, span_rooms, singles, rng)

    def _draw_lengths(self, count: int, room: int, rng: Generator) -> Ints:
        """Draw the lengths of a row's spans, at most `room` of them, in random order.

        77 masked tokens, half of them in spans of 3 to 5: `[4, 3, 5, 3, 5, 4, 3, 4, 5, 3]`, say.
        Their sum is `span_ratio * count` on average and at most half a span from it, and each
        length is as likely as the others: one dither moves the sum by as much as it moves the
        number of spans.
        """
        shortest, longest = self.span_length
        mean, dither = (shortest + longest) / 2, _dither(rng)
        wanted = min(count * self.span_ratio, room * mean)
        spans = max(int(wanted / mean + dither), int(wanted > mean / 2))
        spans = min(spans, count // shortest)
        total = int(wanted + mean * (dither - 0.5) + 0.5)
        total = max(shortest * spans, min(total, longest * spans, count))
        longer = self._longer_than(spans, total, _dither(rng))
        return rng.permutation(shortest + (np.arange(spans)[:, None] < longer).sum(1))

    def _longer_than(self, spans: int, total: int, dither: float) -> Ints:
        """Count the spans longer than the shortest length, than the next one, …, (K - 1,).

        10 spans of 3 to 5, `total` 39 tokens: 6 exceed 3 and 3 exceed 4, or 7 and 2. These are the
        counts of a uniform draw, moved evenly so that they add up to what `total` needs. Where so
        few spans cannot do that, all lengths come nearer to the shortest or the longest.
        """
        shortest, longest = self.span_length
        steps = np.arange(longest - shortest, 0, -1)
        even = spans / (len(steps) + 1)  # of each length
        # all are shortest, or uniform and moved down or up as far as can be, or longest: (4, K - 1)
        counts = np.array([0 * steps, even * (steps - 1), even * (steps + 1), 0 * steps + spans])
        needed, sums = total - shortest * spans, counts.sum(1)
        longer = [np.interp(needed, sums, column) for column in counts.T]
        return _rounded(np.cumsum(longer), dither)

    def _place_word_spans(
        self, row: Kinds, maskable: Bools, words: Tokens, count: int, rng: Generator
    ) -> None:
        """Write spans of whole words into a row: about `span_ratio` of `count` tokens.

        Spans start at words taken in random order; one that would touch another is dropped.
        """
        wanted, most = self.span_ratio * count, count
        begins = np.concatenate([[True], words[1:] != words[:-1], [True]])  # (T + 1,)
        for start in rng.permutation(np.flatnonzero(begins & maskable)).tolist():
            ends = self._word_ends(begins, start, start + int(maskable[start:].argmin()))
            if not ends:
                continue
            end = ends[int(rng.random() * len(ends))]
            length = end - start
            if wanted < length / 2:
                break
            if length <= most and not row[max(0, start - 1) : end + 1].any():
                row[start:end] = SPAN
                wanted, most = wanted - length, most - length

    def _word_ends(self, begins: Bools, start: int, stop: int) -> list[int]:
        """Where a span from `start` may end: where a word does, at `stop` at the latest.

        A word of up to twice the longest span is one by itself: a rare idiom takes more tokens
        than a common one.
        """
        shortest, longest = self.span_length
        word_end = start + 1 + int(begins[start + 1 :].argmax())
        if longest < word_end - start <= 2 * longest and word_end <= stop:
            return [word_end]
        ends = range(start + shortest, min(start + longest, stop) + 1)
        return [end for end in ends if begins[end]]


def coverage(masker: SpanMasker, maskable: Bools, keys: Keys, epochs: int) -> Floats:
    """Share of the maskable tokens that was masked at least once after each epoch, (epochs,).

    Independent draws would cover 1 - (1 - mask_ratio)^E after E epochs: 0.15, 0.2775, 0.3859, ….
    """
    masked = np.stack([masker.kinds(maskable, keys, epoch) > KEPT for epoch in range(epochs)])
    return np.asarray(np.maximum.accumulate(masked).sum((1, 2)) / maskable.sum())


def _generator(purpose: int, seed: int, epoch: int, key: int) -> Generator:
    return np.random.default_rng([purpose, seed, epoch, int(key) % 2**64])  # a key may be negative


def _dither(rng: Generator) -> float:
    """Draw from [0, 1) in steps of 2^-24, so that sums with integers are exact."""
    return float(rng.random(dtype=np.float32))


def _rounded(totals: Floats, dither: float) -> Ints:
    """Round numbers, given by their running totals, so that each keeps its value on average.

    6.5 and 2.5, given as `[6.5, 9]`, become `[6, 3]` for dithers below 0.5, else `[7, 2]`.
    """
    return np.diff(np.floor(totals + dither + 1e-10), prepend=0).astype(np.int64)


def _share_out(count: int, rooms: Ints, dither: float) -> Ints:
    """Share `count` among runs in proportion to their room: 3 among `[4, 8]` are `[1, 2]`."""
    return _rounded(count * rooms.cumsum() / max(1, rooms.sum()), dither)


def _arrange(rooms: Ints, lengths: Ints, span_rooms: Ints, singles: int, rng: Generator) -> Kinds:
    """Arrange spans and singles in the places of a row's runs, (sum of `rooms`,).

    A span of 3 and a single in 10 places: the tiles `2220 10 0 0 0 0` are shuffled, to
    `0 0 2220 0 10 0`, say. Singles that there is no room for are left out.
    """
    runs = np.arange(len(rooms))
    spans = _share_out(len(lengths), span_rooms, _dither(rng))
    taken = np.bincount(runs.repeat(spans), lengths + 1, len(runs)).astype(np.int64)
    halves = (rooms - taken) // 2
    alone = _share_out(min(singles, halves.sum()), halves, _dither(rng))

    tiles = np.array([spans, alone, rooms - taken - 2 * alone])  # (3, R)
    kind = np.array([SPAN, SINGLE, KEPT] * len(runs), np.int8).repeat(tiles.T.ravel())
    size = 1 + (kind == SINGLE)
    size[kind == SPAN] = lengths + 1
    order = (runs.repeat(tiles.sum(0)) + rng.random(len(kind))).argsort()
    kind, size = kind[order], size[order]
    arranged = kind.repeat(size)
    arranged[size.cumsum() - 1] = KEPT  # the last place of a tile
    return arranged


@dataclass(frozen=True, eq=False)
class Corruption:
    """Corrupt masked tokens one by one; the draw depends only on (seed, epoch, key).

    BERT's is `shares=(0.8, 0.1, 0.1)` (Devlin et al. 2019, section 3.1).
    """

    mask_token_id: int  # the row that the adapter trains
    ordinary_ids: Ints  # (N,), what a random token is drawn from: no special token is among them
    shares: Shares = (1.0, 0.0, 0.0)  # of the masked: mask, random, unchanged
    seed: int = 0

    def __post_init__(self) -> None:
        check_shares(self.shares)

    @classmethod
    def of(
        cls, tokenizer: "PreTrainedTokenizerBase", mask_token_id: int, shares: Shares, seed: int = 0
    ) -> Self:
        """Draw random tokens from all of a tokenizer's that are neither special nor added."""
        added = set(tokenizer.added_tokens_decoder) | set(tokenizer.all_special_ids)
        ordinary = set(tokenizer.get_vocab().values()) - added - {mask_token_id}
        return cls(mask_token_id, np.array(sorted(ordinary), np.int64), shares, seed)

    def actions(self, masked: Bools, keys: Keys, epoch: int = 0) -> Kinds:
        """Draw what becomes of each token, (B, T): MASKED, RANDOM, UNCHANGED; 0 if not masked."""
        draws = self._draw(FOR_ACTIONS, keys, epoch, masked.shape[1])
        chosen = np.digitize(draws, np.cumsum(self.shares[:2])) + MASKED
        return np.where(masked, chosen, UNTOUCHED).astype(np.int8)

    def apply(self, input_ids: Ints, actions: Kinds, keys: Keys, epoch: int = 0) -> Ints:
        """Return the corrupted tokens, (B, T): `[7, 8, 9]`, actions `[0, 1, 3]`: `[7, mask, 9]`."""
        draws = self._draw(FOR_TOKENS, keys, epoch, actions.shape[1])
        others = self.ordinary_ids[(draws * len(self.ordinary_ids)).astype(np.int64)]
        corrupted = np.where(actions == RANDOM, others, input_ids)
        return np.where(actions == MASKED, self.mask_token_id, corrupted)

    def _draw(self, purpose: int, keys: Keys, epoch: int, count: int) -> Floats:
        """Draw from [0, 1) for each window, (B, count)."""
        return np.stack([_generator(purpose, self.seed, epoch, key).random(count) for key in keys])


def check_shares(shares: Shares) -> None:
    """Refuse shares that are negative or do not add up to 1."""
    if not (min(shares) >= 0 and abs(sum(shares) - 1) <= 1e-6):  # NaN too
        raise ConfigError(f"masking.corruption {list(shares)}: must be three shares of 1 in all")


def padded(rows: Sequence[npt.NDArray[Any]], fill: int) -> Ints:
    """Stack rows of unequal lengths to (B, T) int64: `[1, 2], [3]` to `[[1, 2], [3, fill]]`."""
    stacked = np.full((len(rows), max(map(len, rows))), fill, np.int64)
    for place, row in zip(stacked, rows, strict=True):
        place[: len(row)] = row
    return stacked


def model_inputs(
    input_ids: Ints, labels: Ints, position_ids: Ints | None = None
) -> "dict[str, torch.Tensor]":
    """Add the positions whose logits are needed: (B, T) `input_ids`, `labels`, `logits_to_keep`.

    `labels` is -100 everywhere but at the target positions. The logit that scores token i stands at
    i - 1, so `logits_to_keep` (bool) is the target positions moved left by one: labels
    `[-100, -100, 7, 8]` keep `[0, 1, 1, 0]`. Position 0 cannot be a target. No attention mask is
    needed: padding stands behind the text, where causal attention never looks. `position_ids` that
    restart within a row keep its chunks apart, at the price of a (B, 1, T, T) mask; without them
    attention takes the fast path.
    """
    import torch

    keep = np.pad(labels[:, 1:] != IGNORE_INDEX, ((0, 0), (0, 1)))
    inputs = {"input_ids": input_ids, "labels": labels, "logits_to_keep": keep}
    if position_ids is not None:
        inputs["position_ids"] = position_ids
    return {name: torch.from_numpy(values) for name, values in inputs.items()}


def masked_this_epoch(row: int, epoch: int) -> bool:
    """Say whether `mixed` masks a window in this epoch: window 3 in epochs 1, 3, 5, …."""
    return (row + epoch) % 2 == 0


@dataclass(frozen=True)
class MaskCollator:
    """Make a batch of windows into model inputs, for any objective.

    `masked` masks tokens, which are the targets; `clm` masks nothing, and every token is a target;
    `meap` masks tokens, and every token is a target (arXiv 2502.07490); `mixed` does as `masked` or
    as `clm` by turns, window by window and epoch by epoch, and the sampler sees to it that a batch
    has as many of both. Tokens in `special_ids` are never masked and never targets. With
    `span_unit` "word" spans cover whole words.
    """

    masker: SpanMasker
    corruption: Corruption
    pad_token_id: int
    special_ids: frozenset[int]
    objective: str = "masked"
    span_unit: str = "token"

    def __call__(self, windows: Sequence[Window]) -> "dict[str, torch.Tensor]":
        """Make the model's inputs, as `model_inputs` describes them, from windows of one epoch."""
        input_ids = padded([window.input_ids for window in windows], self.pad_token_id)
        keys, epoch = [window.key for window in windows], windows[0].epoch
        masks: Bools | bool = self.objective in {"masked", "meap"}
        if self.objective == "mixed":
            masks = np.array([[masked_this_epoch(window.row, epoch)] for window in windows])
        masked = (self.kinds(windows) > KEPT) & masks
        only_masked = masks & (self.objective != "meap")
        targets = np.where(only_masked, masked, self._maskable(windows))
        labels = np.where(targets, input_ids, IGNORE_INDEX)
        actions = self.corruption.actions(masked, keys, epoch)
        corrupted = self.corruption.apply(input_ids, actions, keys, epoch)
        positions = [window.position_ids for window in windows]
        packed = any((row[1:] == 0).any() for row in positions)
        return model_inputs(corrupted, labels, padded(positions, 0) if packed else None)

    def kinds(self, windows: Sequence[Window]) -> Kinds:
        """Draw the masks of windows of one epoch, (B, T), as `SpanMasker.kinds` gives them."""
        keys, epoch = [window.key for window in windows], windows[0].epoch
        words = padded([window.word_ids for window in windows], 0).astype(np.int32)
        by_words = self.span_unit == "word"
        return self.masker.kinds(self._maskable(windows), keys, epoch, words if by_words else None)

    def _maskable(self, windows: Sequence[Window]) -> Bools:
        """Mark what may be masked, (B, T): nothing predicts the first token of a chunk."""
        input_ids = padded([window.input_ids for window in windows], self.pad_token_id)
        position_ids = padded([window.position_ids for window in windows], 0)
        return ~np.isin(input_ids, list(self.special_ids)) & (position_ids > 0)
