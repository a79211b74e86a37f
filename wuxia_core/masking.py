"""Which tokens of a window are masked, what the model sees in their place, which are targets.

`SpanMasker` draws which tokens are masked, `Corruption` what the model sees in their place, and
`MaskCollator` makes windows into model inputs. A draw depends only on (seed, epoch, key of the
window): each window has random generators of its own, so that its mask is the same in any batch, on
any rank and in any worker.

A run is an unbroken stretch of maskable tokens, between unmaskable ones; a block is a masked span
or a single masked token. Blocks are arranged by shuffling tiles. A run of n tokens has n + 1
places: its tokens and the unmaskable token behind it (a row gets one more such token at its end). A
kept token is a tile of one place. A block and the kept token behind it are one tile: a span of L
tokens takes L + 1 places, a single takes two. In any order of the tiles no two blocks touch, and
every arrangement in which no two blocks touch is one order of the tiles: shuffled tiles are a
random arrangement.
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

KEPT, SINGLE, SPAN = 0, 1, 2  # kinds of tokens: not masked, masked alone, masked in a span
UNTOUCHED, MASKED, RANDOM, UNCHANGED = 0, 1, 2, 3  # actions, see `Corruption.actions`
IGNORE_INDEX = -100  # the label of a token that is no target, as in PyTorch

Bools = npt.NDArray[np.bool_]
Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Kinds = npt.NDArray[np.int8]
Tokens = npt.NDArray[np.int32]
Keys = Sequence[int] | Ints  # (B,), the key of each window of a batch, see `Window`
Shares = tuple[float, float, float]  # of the masked tokens, those with MASKED, RANDOM, UNCHANGED

MASK_DRAWS, ACTION_DRAWS, TOKEN_DRAWS = 0, 1, 2  # a window has a generator for each purpose


class Window(NamedTuple):
    """An example to train or measure on: chunks of documents, joined end to end, of T tokens."""

    input_ids: Tokens  # (T,)
    word_ids: Tokens  # (T,), the number of the word that a token belongs to
    position_ids: Tokens  # (T,), each token's index in its chunk
    key: int  # the window's number in its mixture, on which its random draws depend
    epoch: int  # from 0; the random draws depend on it too
    row: int = 0  # the window's index among the windows of its split


@dataclass(frozen=True)
class SpanMasker:
    """Draw which tokens are masked.

    `SpanMasker(0.5, 0, seed=1).kinds(np.ones((1, 6), bool), [0])` masks three of the six tokens,
    none beside another: `[[1, 0, 1, 0, 0, 1]]`. Raises `ConfigError` if a value is out of range, or
    if `mask_ratio` leaves too few tokens to stand between masked blocks.

    Parameters
    ----------
    mask_ratio : float
        Share of the maskable tokens that is masked.
    span_ratio : float
        Share of the masked tokens that lies in spans; the others are single.
    span_length : (int, int)
        Lengths of the shortest and the longest span, in tokens. Each length from the one to the
        other is equally frequent, except in spans of whole words.
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
        mean_length = (shortest + longest) / 2
        # a masked token makes span_ratio / mean_length spans and 1 - span_ratio singles on average,
        # and each of these blocks has one unmasked token behind it
        max_for_blocks = 1 / (1 + self.span_ratio / mean_length + (1 - self.span_ratio))
        # `_draw_row` reserves longest + 1 places for each of the span_ratio * mask_ratio /
        # mean_length spans a token; `or 1`: at a span_ratio of 0 the bound above decides, 1/2
        max_ratio = min(max_for_blocks, mean_length / (longest + 1) / (self.span_ratio or 1))
        if not 0 < self.mask_ratio <= max_ratio:
            bounds = f"(0, {int(1000 * max_ratio) / 1000:.3f}]"  # rounded down
            rule = f"must lie in {bounds}, to leave a token between two masked blocks"
            raise ConfigError(f"masking.mask_ratio {self.mask_ratio}: {rule}")

    def kinds(
        self, maskable: Bools, keys: Keys, epoch: int = 0, word_ids: Tokens | None = None
    ) -> Kinds:
        """Draw a mask for each row: (B, T) int8 of KEPT (0), SINGLE (1) and SPAN (2).

        `mask_ratio` of a row's maskable tokens is masked, to within one token, and `span_ratio` of
        the masked tokens lie in spans, to within half a span if the row has some tens of tokens.
        For want of room, spans of whole words may cover less, and a `mask_ratio` of 0.5 or more may
        not be reached beside them or in short runs. No two blocks touch, and a block lies in one
        run. Without `word_ids` a run shorter than the longest span has no spans, runs share the
        masked tokens about in proportion to their length, and inside a run every arrangement of its
        blocks is equally likely.

        Parameters
        ----------
        maskable : (B, T) bool
            Whether a token may be masked; `MaskCollator` excepts special tokens, padding and the
            first token of each chunk.
        keys : (B,) int
            The key of each row's window; rows with different keys are drawn independently.
        epoch : int
            Each epoch has its own masks.
        word_ids : (B, T) int32, optional
            Number of the word each token belongs to; spans then cover whole words.
        """
        maskable = np.pad(maskable, ((0, 0), (0, 1)))  # an unmaskable token behind the last run
        kinds: Kinds = np.zeros(maskable.shape, np.int8)
        words = [None] * len(kinds) if word_ids is None else word_ids
        for row, tokens, ids, key in zip(kinds, maskable, words, keys, strict=True):
            self._draw_row(row, tokens, ids, _generator(MASK_DRAWS, self.seed, epoch, key))
        return kinds[:, :-1]

    def _draw_row(self, row: Kinds, maskable: Bools, words: Tokens | None, rng: Generator) -> None:
        """Draw one row's mask, spans of words first; write it into `row`, which is all KEPT before.

        `row` and `maskable`, (T + 1,), end with an unmaskable token: a run has one behind it, and
        `np.roll` carries nothing round. `words`, (T,), is None unless spans cover whole words.
        """
        masked_count = int(np.count_nonzero(maskable) * self.mask_ratio + _dither(rng))
        free = maskable  # without the tokens in and beside spans of words
        if words is not None:
            self._place_word_spans(row, maskable, words, masked_count, rng)
            in_spans = row == SPAN
            free = maskable & ~(in_spans | np.roll(in_spans, 1) | np.roll(in_spans, -1))
        is_place = free | np.roll(free, 1)  # the tokens of each run and the one behind it
        # of a run's places only the last is not free: a size is the distance between two of these
        sizes = np.diff(np.flatnonzero(~free[is_place]), prepend=-1)  # in places, (R,)
        max_spans = sizes // (self.span_length[1] + 1)  # as many as fit if all are longest, (R,)
        lengths: Ints = np.empty(0, np.int64)  # of the spans that are not placed yet, in tokens
        if words is None:
            lengths = self._draw_lengths(masked_count, int(max_spans.sum()), rng)
        singles = int(masked_count - np.count_nonzero(row) - lengths.sum())
        row[is_place] = _arrange(sizes, max_spans, lengths, singles, rng)

    def _draw_lengths(self, masked_count: int, max_spans: int, rng: Generator) -> Ints:
        """Draw the lengths of a row's spans, at most `max_spans` of them, in random order.

        77 masked tokens, half of them in spans of 3 to 5: 38.5 tokens are to lie in spans, which
        makes 9.625 spans of 4 tokens on average. One number in [0, 1), the dither, rounds both: at
        0.5 there are floor(9.625 + 0.5) = 10 spans of 39 tokens in all, `[4, 3, 5, 3, 5, 4, 3, 4,
        5, 3]`, say; at 0.1 there are floor(9.625 + 0.1) = 9 spans of 37 tokens in all. So both
        numbers are right on average, the number of tokens differs from 38.5 by at most half a span
        but for rounding, and each length from 3 to 5 is equally frequent.
        """
        shortest, longest = self.span_length
        mean_length, dither = (shortest + longest) / 2, _dither(rng)
        wanted = min(masked_count * self.span_ratio, max_spans * mean_length)  # tokens in spans
        min_spans = 1 if wanted > mean_length / 2 else 0
        spans = min(max(int(wanted / mean_length + dither), min_spans), masked_count // shortest)
        total = int(wanted + mean_length * (dither - 0.5) + 0.5)  # 38.5 - 4 * 0.4 + 0.5: 37 tokens
        total = max(shortest * spans, min(total, longest * spans, masked_count))
        longer = self._count_longer(spans, total, _dither(rng))
        # longer[0] spans are a token longer than the shortest, and of these longer[1] two tokens, …
        return rng.permutation(shortest + (np.arange(spans)[:, None] < longer).sum(1))

    def _count_longer(self, spans: int, total: int, dither: float) -> Ints:
        """Count the spans longer than each length but the longest: (K - 1,) for K lengths.

        10 spans of 3 to 5 tokens with a `total` of 39 give `[6, 3]` or `[7, 2]`, by the `dither`.
        In `[6, 3]` 6 spans exceed 3 tokens and 3 of these exceed 4: 4 spans of 3, 3 of 4, 3 of 5.
        The counts add up to the 39 - 10 * 3 = 9 tokens above the shortest length. Uniform lengths
        would have `[6.67, 3.33]`, which add up to 10; both are moved by -0.5, to `[6.17, 2.83]`,
        and then rounded. For other totals both move by up to 3.33, to `[3.33, 0]` or `[10, 6.67]`,
        and from there towards `[0, 0]`, all spans shortest, or `[10, 10]`, all spans longest.
        """
        shortest, longest = self.span_length
        ranks = np.arange(longest - shortest, 0, -1)  # how many lengths are longer: K - 1, …, 1
        even = spans / (len(ranks) + 1)  # spans of each length if uniform: even * ranks are longer
        # all shortest; uniform, moved down by `even` and moved up by it; all longest: (4, K - 1)
        counts = np.array([0 * ranks, even * (ranks - 1), even * (ranks + 1), 0 * ranks + spans])
        excess, sums = total - shortest * spans, counts.sum(1)  # tokens above the shortest length
        longer = [np.interp(excess, sums, column) for column in counts.T]
        return _rounded(np.cumsum(longer), dither)

    def _place_word_spans(
        self, row: Kinds, maskable: Bools, words: Tokens, masked_count: int, rng: Generator
    ) -> None:
        """Write spans of whole words into `row`: about `span_ratio` of `masked_count` tokens.

        Words are tried in random order as a span's first word; `_span_ends` gives the ends to draw
        from. A span is left out if it would touch an earlier one, or if more than `masked_count`
        tokens would be masked. `_draw_row` describes the arrays.
        """
        wanted, room = self.span_ratio * masked_count, masked_count  # tokens to go: about, at most
        starts_word = np.concatenate([[True], words[1:] != words[:-1], [True]])  # (T + 1,)
        for start in rng.permutation(np.flatnonzero(starts_word & maskable)).tolist():
            run_end = start + int(maskable[start:].argmin())  # the first unmaskable token behind
            ends = self._span_ends(starts_word, start, run_end)
            if not ends:
                continue
            end = ends[int(rng.random() * len(ends))]
            length = end - start
            if wanted < length / 2:  # it would overshoot by more than is still wanted
                break
            if length <= room and not row[max(0, start - 1) : end + 1].any():  # with its neighbours
                row[start:end] = SPAN
                wanted, room = wanted - length, room - length

    def _span_ends(self, starts_word: Bools, start: int, run_end: int) -> list[int]:
        """List the ends, `run_end` at most, that a span of whole words from `start` may have.

        `starts_word`, (T + 1,), flags the tokens that begin a word, and the one behind the last.
        With spans of 3 to 5 tokens and words of 2, 2 and 7 tokens the ends are `[4]` for a `start`
        of 0, `[]` for 2 and `[11]` for 4. A word longer than the longest span, but at most twice as
        long, is a span by itself: a rare idiom takes more tokens than a common one.
        """
        shortest, longest = self.span_length
        word_end = start + 1 + int(starts_word[start + 1 :].argmax())
        if longest < word_end - start <= 2 * longest and word_end <= run_end:
            return [word_end]
        ends = range(start + shortest, min(start + longest, run_end) + 1)
        return [end for end in ends if starts_word[end]]


def coverage(masker: SpanMasker, maskable: Bools, keys: Keys, epochs: int) -> Floats:
    """Give the share of the maskable tokens that are masked in the first 1, 2, … epochs: (epochs,).

    A token that is masked in several epochs counts once. Independent draws would cover
    1 - (1 - mask_ratio)^E after E epochs: 0.15, 0.2775, 0.3859, ….
    """
    masked = np.stack([masker.kinds(maskable, keys, epoch) > KEPT for epoch in range(epochs)])
    return np.asarray(np.maximum.accumulate(masked).sum((1, 2)) / maskable.sum())


def _generator(purpose: int, seed: int, epoch: int, key: int) -> Generator:
    """Make a window's own random generator for one purpose, such as `MASK_DRAWS`."""
    return np.random.default_rng([purpose, seed, epoch, int(key) % 2**64])  # a key may be negative


def _dither(rng: Generator) -> float:
    """Draw a number from [0, 1) that, added before rounding down, makes a value right on average.

    It is a multiple of 2^-24, so that its sums with integers are exact.
    """
    return float(rng.random(dtype=np.float32))


def _rounded(totals: Floats, dither: float) -> Ints:
    """Round numbers, given by their running totals, so that each keeps its value on average.

    6.5 and 2.5, given as `[6.5, 9]`, become `[6, 3]` for a `dither` below 0.5, else `[7, 2]`.
    """
    # 1e-10: a total that is an integer but for the rounding of floats must not fall below it
    return np.diff(np.floor(totals + dither + 1e-10), prepend=0).astype(np.int64)


def _share_out(count: int, capacities: Ints, dither: float) -> Ints:
    """Share `count` blocks among runs in proportion to their `capacities`, (R,); return (R,).

    Shares of 3 blocks in runs with room for `[4, 8]` blocks are `[1, 2]`. If `count` is at most the
    sum of the capacities, no run gets more blocks than its capacity.
    """
    return _rounded(count * capacities.cumsum() / max(1, capacities.sum()), dither)


def _arrange(sizes: Ints, max_spans: Ints, lengths: Ints, singles: int, rng: Generator) -> Kinds:
    """Arrange spans and singles in the places of a row's runs; return the places' kinds.

    `sizes` (R,) counts each run's places (the module's docstring says what a place is), `max_spans`
    (R,) the spans that fit into it; `lengths` has each span's tokens, `singles` is the number of
    singles. A span of 3 and a single in one run of 10 places: the tiles `2220 10 0 0 0 0` are
    shuffled, to `0 0 2220 0 10 0`, say. Singles that no run has room for are left out.
    """
    runs = np.arange(len(sizes))
    spans = _share_out(len(lengths), max_spans, _dither(rng))  # of each run, (R,)
    places = sizes - np.bincount(runs.repeat(spans), lengths + 1, len(runs)).astype(np.int64)
    max_singles = places // 2  # in the `places` beside the spans; a single takes two
    run_singles = _share_out(min(singles, max_singles.sum()), max_singles, _dither(rng))

    # tiles of each kind in each run, (3, R); what blocks leave free is kept tokens
    tiles = np.array([spans, run_singles, places - 2 * run_singles])
    kinds = np.array([SPAN, SINGLE, KEPT] * len(runs), np.int8).repeat(tiles.T.ravel())  # of tiles
    tile_sizes = 1 + (kinds == SINGLE)  # in places: of a single 2, of a kept token 1
    tile_sizes[kinds == SPAN] = lengths + 1
    # sorted by the run's number plus a random fraction: shuffled within each run
    order = (runs.repeat(tiles.sum(0)) + rng.random(len(kinds))).argsort()
    kinds, tile_sizes = kinds[order], tile_sizes[order]
    mask = kinds.repeat(tile_sizes)
    mask[tile_sizes.cumsum() - 1] = KEPT  # the last place of each tile
    return mask


@dataclass(frozen=True, eq=False)
class Corruption:
    """Choose what the model sees in the place of each masked token.

    A choice depends only on (seed, epoch, key of the window). BERT's shares are `(0.8, 0.1, 0.1)`
    (Devlin et al. 2019, section 3.1). Raises `ConfigError` unless `shares` are ≥ 0 and add up to 1.
    """

    mask_token_id: int  # of the token whose embedding row the adapter trains
    ordinary_ids: Ints  # (N,), the tokens that a random one is drawn from
    shares: Shares = (1.0, 0.0, 0.0)  # of the masked tokens: mask token, random token, unchanged
    seed: int = 0

    def __post_init__(self) -> None:
        check_shares(self.shares)

    @classmethod
    def of(
        cls, tokenizer: "PreTrainedTokenizerBase", mask_token_id: int, shares: Shares, seed: int = 0
    ) -> Self:
        """Make a `Corruption` that draws random tokens from all but special, added, mask ones."""
        added = set(tokenizer.added_tokens_decoder) | set(tokenizer.all_special_ids)
        ordinary = set(tokenizer.get_vocab().values()) - added - {mask_token_id}
        return cls(mask_token_id, np.array(sorted(ordinary), np.int64), shares, seed)

    def actions(self, masked: Bools, keys: Keys, epoch: int = 0) -> Kinds:
        """Draw an action for each token that is `masked`, (B, T), by `shares`: (B, T) int8.

        MASKED (1), RANDOM (2) and UNCHANGED (3) mean that the model sees the mask token, a random
        token or the token itself. A token that is not masked gets UNTOUCHED (0).
        """
        numbers = self._draw_uniform(ACTION_DRAWS, keys, epoch, masked.shape[1])
        # `digitize` gives 0, 1 or 2: below the first share, below the sum of two, or neither
        actions = np.digitize(numbers, np.cumsum(self.shares[:2])) + MASKED
        return np.where(masked, actions, UNTOUCHED).astype(np.int8)

    def apply(self, input_ids: Ints, actions: Kinds, keys: Keys, epoch: int = 0) -> Ints:
        """Do the `actions` on `input_ids`, both (B, T); return what the model sees, (B, T).

        `[7, 8, 9]` with the actions `[0, 1, 3]` becomes `[7, mask_token_id, 9]`.
        """
        numbers = self._draw_uniform(TOKEN_DRAWS, keys, epoch, actions.shape[1])
        random_ids = self.ordinary_ids[(numbers * len(self.ordinary_ids)).astype(np.int64)]
        corrupted = np.where(actions == RANDOM, random_ids, input_ids)
        return np.where(actions == MASKED, self.mask_token_id, corrupted)

    def _draw_uniform(self, purpose: int, keys: Keys, epoch: int, count: int) -> Floats:
        """Draw `count` numbers from [0, 1) for each window, (B, count)."""
        return np.stack([_generator(purpose, self.seed, epoch, key).random(count) for key in keys])


def check_shares(shares: Shares) -> None:
    """Raise `ConfigError` if one of `shares` is negative or NaN, or they do not add up to 1."""
    if not (min(shares) >= 0 and abs(sum(shares) - 1) <= 1e-6):  # `not`, to be true of NaN too
        raise ConfigError(f"masking.corruption {list(shares)}: must be three shares of 1 in all")


def padded(rows: Sequence[npt.NDArray[Any]], fill: int) -> Ints:
    """Stack `rows` of unequal lengths, one at least, into (B, T) int64, with `fill` behind them.

    `[1, 2]` and `[3]` become `[[1, 2], [3, fill]]`.
    """
    stacked = np.full((len(rows), max(map(len, rows))), fill, np.int64)
    for padded_row, row in zip(stacked, rows, strict=True):
        padded_row[: len(row)] = row
    return stacked


def model_inputs(
    input_ids: Ints, labels: Ints, position_ids: Ints | None = None
) -> "dict[str, torch.Tensor]":
    """Make the model's inputs from arrays (B, T), with the positions whose logits are needed.

    The keys are `input_ids`, `labels`, `logits_to_keep`, and `position_ids` unless that is None.
    `labels` are -100 except at targets; column 0 has no target. Token i is scored by the logits at
    position i - 1, so `logits_to_keep`, (B, T) bool, flags the positions one to the left of the
    targets: labels `[-100, -100, 7, 8]` keep `[0, 1, 1, 0]`. No attention mask is needed: padding
    stands behind the text, where causal attention never looks. `position_ids` that restart within a
    row keep its chunks from seeing each other, at the price of a (B, 1, T, T) mask inside the
    model; without `position_ids` attention takes the fast path.
    """
    import torch

    keep = np.pad(labels[:, 1:] != IGNORE_INDEX, ((0, 0), (0, 1)))
    inputs = {"input_ids": input_ids, "labels": labels, "logits_to_keep": keep}
    if position_ids is not None:
        inputs["position_ids"] = position_ids
    return {name: torch.from_numpy(values) for name, values in inputs.items()}


def masked_this_epoch(row: int, epoch: int) -> bool:
    """Whether the objective `mixed` masks window `row` in `epoch`: row 3 in epochs 1, 3, 5, …."""
    return (row + epoch) % 2 == 0


@dataclass(frozen=True)
class MaskCollator:
    """Make a batch of windows into model inputs, for any objective.

    `masked` masks tokens, and these are the targets; `clm` masks nothing, and every token is a
    target; `meap` masks tokens, and every token is a target (arXiv 2502.07490); `mixed` treats a
    window as `masked` in one epoch and as `clm` in the next, and `trainer.EpochSampler` makes
    half of a batch of each kind. Tokens in `special_ids` and the first of each chunk are never
    masked and never targets. With `span_unit` "word" spans cover whole words.
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
        has_masks: Bools | bool = self.objective in {"masked", "meap"}  # for all, or (B, 1)
        if self.objective == "mixed":
            has_masks = np.array([[masked_this_epoch(window.row, epoch)] for window in windows])
        masked = (self.kinds(windows) > KEPT) & has_masks
        only_masked = has_masks & (self.objective != "meap")  # whether no other token is a target
        targets = np.where(only_masked, masked, self._maskable(windows))
        labels = np.where(targets, input_ids, IGNORE_INDEX)
        actions = self.corruption.actions(masked, keys, epoch)
        corrupted = self.corruption.apply(input_ids, actions, keys, epoch)
        positions = [window.position_ids for window in windows]
        packed = any((row[1:] == 0).any() for row in positions)  # 0 again: a second chunk
        return model_inputs(corrupted, labels, padded(positions, 0) if packed else None)

    def kinds(self, windows: Sequence[Window]) -> Kinds:
        """Draw masks for windows of one epoch: (B, T) of KEPT, SINGLE and SPAN; padding is KEPT."""
        keys, epoch, word_ids = [window.key for window in windows], windows[0].epoch, None
        if self.span_unit == "word":
            word_ids = padded([window.word_ids for window in windows], 0).astype(np.int32)
        return self.masker.kinds(self._maskable(windows), keys, epoch, word_ids)

    def _maskable(self, windows: Sequence[Window]) -> Bools:
        """Flag the tokens that may be masked or be targets, (B, T).

        Special tokens and padding may not, nor the first token of a chunk: no token of its chunk
        stands before it to predict it from.
        """
        input_ids = padded([window.input_ids for window in windows], self.pad_token_id)
        position_ids = padded([window.position_ids for window in windows], 0)  # 0 in padding too
        return ~np.isin(input_ids, list(self.special_ids)) & (position_ids > 0)
