from collections import Counter
from itertools import pairwise

import numpy as np
import pytest

from wuxia_core.errors import ConfigError
from wuxia_core.masking import (
    IGNORE_INDEX,
    MASKED,
    RANDOM,
    SINGLE,
    SPAN,
    UNCHANGED,
    Corruption,
    MaskCollator,
    SpanMasker,
    Window,
    coverage,
)

MASK, PAD = 1, 0


def blocks(row):
    """Masked blocks of a row as (start, end, kind)."""
    edges = np.flatnonzero(np.diff(row, prepend=0, append=0))
    return [(a, b, row[a]) for a, b in pairwise(edges) if row[a]]


def window(ids, key=0, epoch=0):
    ids = np.asarray(ids, np.int32)
    places = np.arange(len(ids), dtype=np.int32)
    return Window(ids, places, places, key, epoch, row=key)


def collate(windows, objective="masked", **kwargs):
    collator = MaskCollator(
        SpanMasker(**kwargs), corruption(), PAD, frozenset({PAD, MASK}), objective
    )
    return {name: tensor.numpy() for name, tensor in collator(windows).items()}


@pytest.mark.parametrize("ratio", [0.15, 0.4, 0.6])
@pytest.mark.parametrize("length", [40, 64, 256, 1024])
def test_each_row_keeps_the_shares(length, ratio):
    kinds = SpanMasker(ratio).kinds(np.ones((400, length), bool), range(400))
    masked, in_spans = (kinds > 0).sum(1), (kinds == SPAN).sum(1)
    assert np.all(np.abs(masked - ratio * length) < 1)
    assert np.all(np.abs(in_spans - masked / 2) <= 2.5)  # half the longest span
    assert abs(in_spans.sum() / masked.sum() - 0.5) < (0.015 if length > 40 else 0.1)


def test_blocks_stand_apart_and_lengths_are_uniform():
    lengths = Counter()
    for row in SpanMasker().kinds(np.ones((3000, 512), bool), range(3000)):
        found = blocks(row)
        assert all(b[0] > a[1] for a, b in pairwise(found))
        assert all(end - start == 1 for start, end, kind in found if kind == SINGLE)
        lengths.update(int(end - start) for start, end, kind in found if kind == SPAN)
    assert set(lengths) == {3, 4, 5}
    assert max(lengths.values()) < 1.02 * min(lengths.values())


def arrangements(n, lengths):
    """Every way to put blocks of these lengths into n tokens, a kept one between two of them."""
    if not lengths:
        return {(0,) * n}
    rows = set()
    for length in set(lengths):
        rest = list(lengths)
        rest.remove(length)
        block = ((SPAN if length > 1 else SINGLE),) * length
        for start in range(n - length + 1):
            behind = n - start - length
            tails = arrangements(behind - 1, rest) if behind else ({()} if not rest else set())
            gap = (0,) if behind else ()
            rows |= {(0,) * start + block + gap + tail for tail in tails}
    return rows


def chi2_limit(freedom):
    """What χ² exceeds in one of ten thousand cases (Wilson & Hilferty 1931)."""
    return freedom * (1 - 2 / (9 * freedom) + 3.72 * np.sqrt(2 / (9 * freedom))) ** 3


@pytest.mark.parametrize(
    ("n", "runs", "settings"),
    [
        (6, 25, {"mask_ratio": 0.5, "span_ratio": 0.0}),
        (8, 25, {"mask_ratio": 0.5, "span_ratio": 0.75, "span_length": (3, 3)}),
        pytest.param(
            *(9, 1, {"mask_ratio": 0.5, "span_ratio": 0.5, "span_length": (2, 3)}),
            marks=pytest.mark.slow,
        ),
        (12, 25, {"mask_ratio": 0.5, "span_ratio": 0.5}),
    ],
)
def test_every_arrangement_of_the_same_blocks_is_equally_likely(n, runs, settings):
    maskable = np.tile(np.arange(n + 1) < n, (100_000 // runs, runs))  # a token between two runs
    kinds = SpanMasker(**settings).kinds(maskable, range(len(maskable)))
    draws = kinds.reshape(-1, n + 1)[:, :n]
    by_blocks = {}
    for row, count in Counter(map(tuple, draws.tolist())).items():
        lengths = tuple(sorted(int(end - start) for start, end, _ in blocks(np.array(row))))
        by_blocks.setdefault(lengths, Counter())[row] = count
    for lengths, drawn in by_blocks.items():
        allowed = arrangements(n, list(lengths))
        assert set(drawn) <= allowed
        expected = sum(drawn.values()) / len(allowed)
        chi2 = sum((drawn[row] - expected) ** 2 / expected for row in allowed)
        assert expected < 10 or len(allowed) == 1 or chi2 < chi2_limit(len(allowed) - 1)


@pytest.mark.slow
def test_far_from_the_edges_every_position_is_masked_as_often():
    """Hotelling's T², which is χ² for so many draws: positions of a row depend on each other."""
    kinds = SpanMasker().kinds(np.ones((100_000, 60), bool), range(100_000))
    masked = (kinds[:, 5:-5] > 0).astype(float)  # more than five tokens from an edge
    contrasts = masked[:, 1:] - masked[:, :-1]
    mean = contrasts.mean(0)
    chi2 = len(masked) * mean @ np.linalg.solve(np.cov(contrasts.T), mean)
    assert chi2 < chi2_limit(len(mean))


def test_a_mask_depends_only_on_seed_epoch_and_key():
    rng = np.random.default_rng(0)
    maskable = rng.random((300, 900)) > 0.01
    words = np.cumsum(rng.random((300, 900)) < 0.6, axis=1).astype(np.int32)
    for word_ids in (None, words):
        alone = None if word_ids is None else word_ids[250:251]
        together = SpanMasker(seed=3).kinds(maskable, range(300), 2, word_ids)
        draw = SpanMasker(seed=3).kinds(maskable[250:251], [250], 2, alone)
        assert np.array_equal(together[250:251], draw)
        for seed, epoch, key in ((4, 2, 250), (3, 3, 250), (3, 2, 251)):
            other = SpanMasker(seed=seed).kinds(maskable[250:251], [key], epoch, alone)
            assert not np.array_equal(draw, other)


def test_padding_behind_a_row_does_not_change_its_mask():
    short = np.ones((1, 50), bool)
    padded = np.zeros((1, 80), bool)
    padded[:, :50] = True
    words = np.arange(80, dtype=np.int32)[None] // 2
    for longer, shorter in ((None, None), (words, words[:, :50])):
        row = SpanMasker().kinds(padded, [9], 0, longer)
        assert np.array_equal(row[:, :50], SpanMasker().kinds(short, [9], 0, shorter))


def test_the_mask_of_a_key_never_changes_between_versions():
    row = SpanMasker(seed=42).kinds(np.ones((1, 40), bool), [0])[0]
    assert "".join(map(str, row)) == GOLDEN


GOLDEN = "0000010000000000000000000000000000222220"


@pytest.mark.parametrize("ratio", [0.15, 0.6])
@pytest.mark.parametrize("kept_share", [0.005, 0.05, 0.3])
def test_rows_of_many_runs_keep_the_shares_and_no_block_leaves_its_run(kept_share, ratio):
    maskable = np.random.default_rng(1).random((200, 1024)) > kept_share
    maskable[:, 900:] = False
    kinds = SpanMasker(ratio).kinds(maskable, range(200))
    assert not kinds[~maskable].any()
    masked, in_spans = (kinds > 0).sum(1), (kinds == SPAN).sum(1)
    assert np.all(np.abs(masked - ratio * maskable.sum(1)) < 1)
    assert np.all(np.abs(in_spans - masked / 2) <= 2.5) or kept_share == 0.3
    assert all(
        end - start == 1 if kind == SINGLE else 3 <= end - start <= 5
        for row in kinds
        for start, end, kind in blocks(row)
    )


def test_runs_share_the_masks_by_their_length():
    maskable = np.ones((4000, 301), bool)
    maskable[:, 100] = False
    kinds = SpanMasker().kinds(maskable, range(4000)) > 0
    assert abs(kinds[:, :100].sum() / kinds.sum() - 1 / 3) < 0.005


def test_rows_too_short_for_a_span_get_singles_and_empty_rows_nothing():
    kinds = SpanMasker().kinds(np.ones((500, 6), bool), range(500))
    assert set(np.unique(kinds)) == {0, SINGLE}
    assert not SpanMasker().kinds(np.zeros((2, 9), bool), [0, 1]).any()
    mixed_rows = np.zeros((3, 40), bool)
    mixed_rows[0] = mixed_rows[2, 3] = True
    kinds = SpanMasker().kinds(mixed_rows, [0, 1, 2])
    assert (kinds[0] > 0).sum() == 6 and not kinds[1].any()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"mask_ratio": 0.7}, "0.615"),
        ({"mask_ratio": 0.0}, "mask_ratio 0.0"),
        ({"mask_ratio": 1.0}, "mask_ratio 1.0"),
        ({"span_ratio": 1.2}, "span_ratio 1.2"),
        ({"span_ratio": -0.1}, "span_ratio -0.1"),
        ({"span_length": (5, 3)}, r"span_length \[5, 3\]"),
        ({"span_length": (0, 3)}, r"span_length \[0, 3\]"),
    ],
)
def test_what_cannot_be_arranged_is_refused(settings, said):
    with pytest.raises(ConfigError, match=said):
        SpanMasker(**settings)


def test_the_largest_ratio_can_be_arranged():
    masker = SpanMasker(0.61)
    kinds = masker.kinds(np.ones((50, 500), bool), range(50))
    assert np.all(np.abs((kinds > 0).sum(1) - 0.61 * 500) < 1)


def test_spans_of_words_start_and_end_on_word_boundaries():
    rng = np.random.default_rng(0)
    words = np.cumsum(rng.random((300, 256)) < 0.6, axis=1).astype(np.int32)
    maskable = rng.random((300, 256)) > 0.01
    kinds = SpanMasker().kinds(maskable, range(300), word_ids=words)
    sizes = Counter()
    for row, ids in zip(kinds, words, strict=True):
        for start, end, kind in blocks(row):
            assert kind == SPAN or end - start == 1
            if kind == SPAN:
                assert start == 0 or ids[start] != ids[start - 1]
                assert end == 256 or ids[end] != ids[end - 1]
                sizes[end - start] += 1
    assert not kinds[~maskable].any()
    assert sum(sizes[n] for n in (3, 4, 5)) > 0.95 * sizes.total()
    assert np.all(np.abs((kinds > 0).sum(1) - 0.15 * maskable.sum(1)) < 1)
    assert abs((kinds == SPAN).sum() / (kinds > 0).sum() - 0.5) < 0.02


@pytest.mark.parametrize("span_length", [(1, 1), (1, 3), (2, 9), (7, 7)])
@pytest.mark.parametrize("span_ratio", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("by_words", [False, True])
def test_any_settings_keep_the_ratio_and_the_gaps(span_length, span_ratio, by_words):
    rng = np.random.default_rng(7)
    masker = SpanMasker(0.3, span_ratio, span_length, seed=2**32 - 1)
    for tokens in (1, 3, 8, 40, 200):
        maskable = rng.random((30, tokens)) > 0.03
        words = np.cumsum(rng.random((30, tokens)) < 0.4, axis=1).astype(np.int32)
        kinds = masker.kinds(maskable, range(-15, 15), 3, words if by_words else None)
        assert not kinds[~maskable].any()
        wanted = 0.3 * maskable.sum(1)
        assert np.all((kinds > 0).sum(1) - wanted < 1)
        if not by_words and tokens >= 40:
            assert np.all(wanted - (kinds > 0).sum(1) < 1)
            assert (kinds == SPAN).any() == (span_ratio > 0)
        for row in kinds:
            found = blocks(row)
            assert all(b[0] > a[1] for a, b in pairwise(found))
            assert all(end - start == 1 for start, end, kind in found if kind == SINGLE)


def test_spans_of_words_have_all_lengths_and_stand_anywhere():
    words = np.arange(256, dtype=np.int32)[None].repeat(400, 0)
    kinds = SpanMasker().kinds(np.ones((400, 256), bool), range(400), word_ids=words)
    spans = [(start, end - start) for row in kinds for start, end, k in blocks(row) if k == SPAN]
    sizes = Counter(length for _, length in spans)
    assert set(sizes) == {3, 4, 5} and min(sizes.values()) > 0.25 * len(spans)
    assert 0.45 < np.mean([start < 128 for start, _ in spans]) < 0.55


def test_a_long_row_keeps_the_shares():
    kinds = SpanMasker().kinds(np.ones((1, 2**18), bool), [0])
    masked, in_spans = (kinds > 0).sum(), (kinds == SPAN).sum()
    assert abs(masked - 0.15 * 2**18) < 1
    assert abs(in_spans - masked / 2) <= 2.5


def test_only_spans_cannot_be_as_dense_as_singles():
    masker = SpanMasker(0.66, span_ratio=1.0)
    kinds = masker.kinds(np.ones((50, 1024), bool), range(50))
    assert np.all(np.abs((kinds > 0).sum(1) - 0.66 * 1024) < 1)
    with pytest.raises(ConfigError, match=r"mask_ratio 0.7: must lie in \(0, 0.666\]"):
        SpanMasker(0.7, span_ratio=1.0)


def test_a_word_longer_than_any_span_is_masked_whole_or_not_in_a_span():
    words = np.repeat(np.arange(20, dtype=np.int32), 8)[None].repeat(200, 0)
    kinds = SpanMasker().kinds(np.ones((200, 160), bool), range(200), word_ids=words)
    assert {end - start for row in kinds for start, end, kind in blocks(row) if kind == SPAN} == {8}


def test_every_position_is_masked_at_least_once_as_often_as_chance_has_it():
    maskable = np.ones((50, 256), bool)
    maskable[:, 0] = False
    shares = coverage(SpanMasker(), maskable, range(50), 20)
    assert shares[0] == pytest.approx(0.15, abs=0.002)
    assert shares == pytest.approx(1 - 0.85 ** np.arange(1, 21), abs=0.01)


def corruption(shares=(1.0, 0.0, 0.0), seed=0):
    return Corruption(MASK, np.arange(100, 200), shares, seed)


def test_masked_tokens_become_mask_random_or_unchanged_by_their_shares():
    ids = np.arange(100, 200)[np.random.default_rng(0).integers(0, 100, (400, 500))]
    masked = SpanMasker().kinds(np.ones(ids.shape, bool), range(400)) > 0
    actions = corruption((0.8, 0.1, 0.1)).actions(masked, range(400))
    assert not actions[~masked].any()
    for action, share in ((MASKED, 0.8), (RANDOM, 0.1), (UNCHANGED, 0.1)):
        assert abs((actions[masked] == action).mean() - share) < 0.005
    seen = corruption((0.8, 0.1, 0.1)).apply(ids, actions, range(400))
    assert np.all(seen[actions == MASKED] == MASK)
    same = (actions == UNCHANGED) | ~masked
    assert np.array_equal(seen[same], ids[same])
    replaced = seen[actions == RANDOM]
    assert replaced.min() >= 100 and replaced.max() < 200  # ordinary tokens only
    assert Counter(replaced.tolist()).most_common(1)[0][1] < 100  # of some 3,000


def test_corruption_depends_only_on_seed_epoch_and_key():
    ids = np.full((3, 300), 150)
    masked = np.ones(ids.shape, bool)
    third = corruption((0.4, 0.3, 0.3))

    def draw(corrupt, rows, keys, epoch):
        actions = corrupt.actions(masked[:rows], keys, epoch)
        return corrupt.apply(ids[:rows], actions, keys, epoch)

    together = draw(third, 3, [7, 8, 9], 1)
    assert np.array_equal(together[2:], draw(third, 1, [9], 1))
    assert not np.array_equal(together[2:], draw(third, 1, [9], 2))
    assert not np.array_equal(together[2:], draw(corruption((0.4, 0.3, 0.3), 1), 1, [9], 1))


def test_random_tokens_are_never_special_nor_the_mask(tokenizer):
    assert 500 not in Corruption.of(tokenizer, 500, (1.0, 0.0, 0.0)).ordinary_ids
    ordinary = set(Corruption.of(tokenizer, 1, (1.0, 0.0, 0.0)).ordinary_ids.tolist())
    assert not ordinary & set(tokenizer.all_special_ids)
    assert len(ordinary) + len(tokenizer.added_tokens_decoder) == len(tokenizer)


NO_SHARES = [(0.8, 0.1, 0.2), (1.1, 0.0, -0.1), (0.5, 0.2, 0.2), (float("nan"), 0.5, 0.5)]


@pytest.mark.parametrize("shares", NO_SHARES)
def test_shares_that_are_none_are_refused(shares):
    with pytest.raises(ConfigError, match=r"masking.corruption \[.*\]: must be three shares"):
        corruption(shares)


def test_which_logit_scores_which_token():
    batch = collate([window(range(10, 40))], mask_ratio=0.3)
    targets = np.flatnonzero(batch["labels"][0] != IGNORE_INDEX)
    assert np.array_equal(np.flatnonzero(batch["logits_to_keep"][0]), targets - 1)
    assert np.all(batch["input_ids"][0, targets] == MASK)
    assert np.array_equal(batch["labels"][0, targets], targets + 10)
    kept = np.setdiff1d(np.arange(30), targets)
    assert np.array_equal(batch["input_ids"][0, kept], kept + 10)


def test_first_token_padding_and_special_tokens_are_never_targets():
    ids = np.arange(10, 74)
    ids[[20, 21, 40]] = PAD, MASK, PAD
    windows = [window(ids, key) for key in range(60)] + [window(ids[:9], 60)]
    for objective in ("masked", "meap", "clm"):
        targets = collate(windows, objective, mask_ratio=0.5)["labels"] != IGNORE_INDEX
        assert not targets[:, [0, 20, 21, 40]].any()
        assert not targets[60, 9:].any()


def test_the_four_objectives():
    """masked: 15 % are masked and targets; clm: all are targets, none masked; mixed: half each.

    meap: the input of masked, the targets of clm.
    """
    windows = [window(range(10, 74), key) for key in range(4)]
    masked, clm, mixed, meap = (
        collate(windows, name) for name in ("masked", "clm", "mixed", "meap")
    )
    assert np.array_equal(meap["input_ids"], masked["input_ids"])
    assert all(np.array_equal(meap[name], clm[name]) for name in ("labels", "logits_to_keep"))
    assert ((masked["labels"] != IGNORE_INDEX) == (masked["input_ids"] == MASK)).all()
    assert np.all(clm["input_ids"] >= 10)
    assert (clm["labels"][:, 1:] != IGNORE_INDEX).all()
    for row in range(4):
        like = masked if row % 2 == 0 else clm
        assert all(np.array_equal(mixed[name][row], like[name][row]) for name in mixed)


def test_mixed_takes_each_window_by_turns_whatever_stands_beside_it():
    for neighbours in ([], [2], [6, 7]):
        windows = [window(range(10, 74), key) for key in (*neighbours, 5)]
        assert not (collate(windows, "mixed")["input_ids"][-1] == MASK).any()
    later = collate([window(range(10, 74), 5, epoch=1)], "mixed")
    assert (later["input_ids"] == MASK).any()


def packed(*pieces):
    ids, places = zip(*((w.input_ids, w.position_ids) for w in pieces), strict=True)
    words = np.cumsum(np.concatenate(places) == 0)
    return Window(np.concatenate(ids), words, np.concatenate(places), 0, 0)


def test_packed_and_unpacked_give_the_same_logits():
    """Texts that share a window are to each other as if they were not there."""
    import torch

    from wuxia_core.model import load_base

    model = load_base("data/tiny_base", torch.float32).eval()
    rng = np.random.default_rng(0)
    texts = [window(rng.integers(10, 8000, length)) for length in (31, 7, 20)]

    def logits(windows):
        collator = MaskCollator(SpanMasker(), corruption(), PAD, frozenset({PAD, MASK}), "clm")
        batch = collator(windows)
        batch.pop("labels")
        with torch.no_grad():
            return model(**batch).logits

    together = logits([packed(*texts), packed(*texts[:2])])
    apart = torch.cat([logits([text]) for text in (*texts, *texts[:2])])
    assert together.shape == apart.shape == (31 + 7 + 20 + 31 + 7 - 5, 8192)
    assert torch.allclose(together, apart, atol=2e-5)


def test_the_first_token_of_a_text_is_never_masked_and_no_span_runs_into_the_next():
    texts = [window(range(10, 22)) for _ in range(40)]
    joined = packed(*texts)
    for key in range(40):
        labels = collate([joined._replace(key=key)])["labels"][0] != IGNORE_INDEX
        assert labels.any() and not labels[joined.position_ids == 0].any()


def test_only_packed_batches_carry_positions():
    texts = [window(range(10, 22)), window(range(10, 15))]
    assert "position_ids" not in collate(texts)
    assert collate([packed(*texts), texts[0]])["position_ids"].shape == (2, 17)
