"""Spans of whole words: they start and end where a word does."""

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from wuxia_core.masking import keyed
from wuxia_core.masking.arrange import SPAN, Bools, Floats, Ints, Kinds

Words = npt.NDArray[np.int32]


def place_word_spans(
    kinds: Kinds,
    maskable: Bools,
    word_ids: Words,
    count: Floats,
    span_ratio: float,
    span_length: tuple[int, int],
    states: keyed.Bits,
) -> None:
    """Write spans of whole words into `kinds`: `span_ratio` of each row's `count` (B,) of tokens.

    Their sum comes as near to that as whole words can, and never above the count. Spans are taken
    in random order, none that touches another.
    """
    draws = keyed.bits(states, kinds.shape[1])
    lengths = candidates(maskable, word_ids, span_length, draws)
    draws[lengths == 0] = keyed.MOST
    order = np.argsort(draws, axis=1)
    counts = np.count_nonzero(lengths, axis=1)
    for row, most in enumerate(count.tolist()):
        places = order[row, : counts[row]]
        spans = zip(places.tolist(), lengths[row, places].tolist(), strict=True)
        for start, end in _apart(spans, kinds.shape[1], span_ratio * most, most):
            kinds[row, start:end] = SPAN


def candidates(
    maskable: Bools, word_ids: Words, span_length: tuple[int, int], draws: keyed.Bits
) -> Ints:
    """Choose for each token the length of the span that would start there, (B, T), 0 if none can.

    It is drawn from the lengths at which a word ends. A longer word, up to twice the longest span,
    is a span by itself: a rare idiom takes more tokens than a common one.
    """
    rows, tokens = maskable.shape
    shortest, longest = span_length
    edge = np.ones((rows, tokens + longest + 1), np.bool_)  # a word ends before the token
    edge[:, 1:tokens] = word_ids[:, 1:] != word_ids[:, :-1]
    places = np.arange(tokens)
    run = _next(~maskable) - places
    word = _next(edge[:, 1 : tokens + 1]) + 1 - places
    starts = edge[:, :tokens] & maskable
    fits = {
        length: starts & edge[:, length : length + tokens] & (run >= length)
        for length in range(shortest, longest + 1)
    }
    lengths = np.where(starts & (word > longest) & (word <= np.minimum(run, 2 * longest)), word, 0)
    left = (draws & np.uint64(0xFFFF)) % np.maximum(1, sum(fits.values(), np.uint64(0)))
    for length, fit in fits.items():
        lengths[fit & (left == 0)] = length
        left -= fit
    return lengths


def _next(flags: Bools) -> Ints:
    """Find the first flag at or behind each place, (B, T); T where there is none."""
    places = np.where(flags, np.arange(flags.shape[1]), flags.shape[1])
    return np.minimum.accumulate(places[:, ::-1], axis=1)[:, ::-1]


def _apart(
    spans: Iterator[tuple[int, int]], tokens: int, wanted: float, most: float
) -> Iterator[tuple[int, int]]:
    """Take spans (start, length) that touch none before: about `wanted` tokens, `most` at most."""
    taken = bytearray(tokens + 1)
    for start, length in spans:
        if wanted < length / 2:
            return
        end = start + length
        if length <= most and not any(taken[max(0, start - 1) : end + 1]):
            taken[start:end] = b"\1" * length
            wanted, most = wanted - length, most - length
            yield start, end
