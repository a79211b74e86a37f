from collections import Counter
from itertools import combinations, pairwise

import numpy as np
import pytest

from wuxia_core.errors import ConfigError
from wuxia_core.masking import IGNORE_INDEX, SINGLE, SPAN, MaskCollator, SpanMasker
from wuxia_core.mixing import Window

MASK, PAD = 1, 0


def blocks(row):
    """Masked blocks of a row as (start, end, kind)."""
    edges = np.flatnonzero(np.diff(row, prepend=0, append=0))
    return [(a, b, row[a]) for a, b in pairwise(edges) if row[a]]


def window(ids, key=0, epoch=0):
    ids = np.asarray(ids, np.int32)
    places = np.arange(len(ids), dtype=np.int32)
    return Window(ids, places, places, key, epoch)


def collate(windows, objective="masked", **kwargs):
    collator = MaskCollator(SpanMasker(**kwargs), MASK, PAD, frozenset({PAD, MASK}), objective)
    return {name: tensor.numpy() for name, tensor in collator(windows).items()}


@pytest.mark.parametrize("length", [64, 256, 1024])
def test_shares_are_the_recipes(length):
    kinds = SpanMasker().kinds(np.ones((400, length), bool), range(400))
    assert np.all(np.abs((kinds > 0).sum(1) - 0.15 * length) <= 1)
    assert abs((kinds == SPAN).sum() / (kinds > 0).sum() - 0.5) < 0.03


def test_blocks_stand_apart_and_spans_are_three_to_five():
    lengths = Counter()
    for row in SpanMasker().kinds(np.ones((300, 512), bool), range(300)):
        found = blocks(row)
        assert all(b[0] > a[1] for a, b in pairwise(found))
        assert all(end - start == 1 for start, end, kind in found if kind == SINGLE)
        lengths.update(int(end - start) for start, end, kind in found if kind == SPAN)
    assert set(lengths) == {3, 4, 5}
    assert max(lengths.values()) < 1.1 * min(lengths.values())


def test_arrangements_of_a_short_row_are_uniform():
    masker = SpanMasker(0.5, 0.0)
    drawn = Counter(
        tuple(np.flatnonzero(row)) for row in masker.kinds(np.ones((6000, 6), bool), range(6000))
    )
    allowed = [c for c in combinations(range(6), 3) if c[1] - c[0] > 1 and c[2] - c[1] > 1]
    assert set(drawn) == set(allowed)
    expected = 6000 / len(allowed)
    chi2 = sum((drawn[c] - expected) ** 2 / expected for c in allowed)
    assert chi2 < 16.3  # 99.9 % of the distribution with three degrees of freedom


def test_a_mask_hangs_on_seed_epoch_and_key_alone():
    maskable = np.ones((4, 128), bool)
    together = SpanMasker(seed=3).kinds(maskable, [5, 6, 7, 8], epoch=2)
    alone = SpanMasker(seed=3).kinds(maskable[:1], [7], epoch=2)
    assert np.array_equal(together[2], alone[0])
    for other in (
        SpanMasker(seed=4).kinds(maskable[:1], [7], epoch=2),
        SpanMasker(seed=3).kinds(maskable[:1], [7], epoch=3),
        SpanMasker(seed=3).kinds(maskable[:1], [9], epoch=2),
    ):
        assert not np.array_equal(alone, other)


def test_the_mask_of_a_key_never_changes_between_versions():
    row = SpanMasker(seed=42).kinds(np.ones((1, 40), bool), [0])[0]
    assert "".join(map(str, row)) == GOLDEN


GOLDEN = "0001000222200000000000010000000000000000"


def test_nothing_is_masked_where_it_must_not_be():
    maskable = np.ones((50, 200), bool)
    maskable[:, 0] = maskable[:, 90:95] = maskable[:, 150:] = False
    kinds = SpanMasker(0.4).kinds(maskable, range(50))
    assert not kinds[~maskable].any()
    assert np.all(np.abs((kinds > 0).sum(1) - 0.4 * maskable.sum(1)) <= 1)


def test_rows_too_short_for_a_span_get_singles_and_empty_rows_nothing():
    kinds = SpanMasker().kinds(np.ones((500, 6), bool), range(500))
    assert set(np.unique(kinds)) == {0, SINGLE}
    assert not SpanMasker().kinds(np.zeros((2, 9), bool), [0, 1]).any()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"mask_ratio": 0.7}, "0.62"),
        ({"mask_ratio": 0.0}, "mask_ratio 0.0"),
        ({"span_ratio": 1.2}, "span_ratio 1.2"),
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
    assert abs((kinds > 0).mean() - 0.61) < 0.01


def test_spans_of_words_start_and_end_on_word_boundaries():
    rng = np.random.default_rng(0)
    words = np.cumsum(rng.random((100, 256)) < 0.6, axis=1).astype(np.int32)
    kinds = SpanMasker().kinds(np.ones((100, 256), bool), range(100), word_ids=words)
    for row, ids in zip(kinds, words, strict=True):
        for start, end, kind in blocks(row):
            if kind == SPAN:
                assert start == 0 or ids[start] != ids[start - 1]
                assert end == 256 or ids[end] != ids[end - 1]
                assert 3 <= end - start <= 5
    assert abs((kinds > 0).mean() - 0.15) < 0.005
    assert abs((kinds == SPAN).sum() / (kinds > 0).sum() - 0.5) < 0.05


def test_which_logit_scores_which_token():
    batch = collate([window(range(10, 40))], mask_ratio=0.3)
    asked = np.flatnonzero(batch["labels"][0] != IGNORE_INDEX)
    assert np.array_equal(np.flatnonzero(batch["logits_to_keep"][0]), asked - 1)
    assert np.all(batch["input_ids"][0, asked] == MASK)
    assert np.array_equal(batch["labels"][0, asked], asked + 10)
    kept = np.setdiff1d(np.arange(30), asked)
    assert np.array_equal(batch["input_ids"][0, kept], kept + 10)


def test_first_token_padding_and_special_tokens_are_never_asked():
    ids = np.arange(10, 74)
    ids[[20, 21, 40]] = PAD, MASK, PAD
    windows = [window(ids, key) for key in range(60)] + [window(ids[:9], 60)]
    for objective in ("masked", "clm"):
        asked = collate(windows, objective, mask_ratio=0.5)["labels"] != IGNORE_INDEX
        assert not asked[:, [0, 20, 21, 40]].any()
        assert not asked[60, 9:].any()


def test_the_three_objectives():
    windows = [window(range(10, 74), key) for key in range(4)]
    masked, clm, mixed = (collate(windows, name) for name in ("masked", "clm", "mixed"))
    assert np.all(clm["input_ids"] >= 10)
    assert (clm["labels"][:, 1:] != IGNORE_INDEX).all()
    for row in range(4):
        like = masked if row % 2 == 0 else clm
        assert all(np.array_equal(mixed[name][row], like[name][row]) for name in mixed)
    other = collate([window(range(10, 74), 0, epoch=1)], "mixed")
    assert np.all(other["input_ids"] >= 10)  # the window that was masked is plain an epoch later


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
        collator = MaskCollator(SpanMasker(), MASK, PAD, frozenset({PAD, MASK}), "clm")
        batch = collator(windows)
        batch.pop("labels")
        with torch.no_grad():
            return model(**batch).logits

    together = logits([packed(*texts), packed(*texts[:2])])
    apart = torch.cat([logits([text]) for text in (*texts, *texts[:2])])
    assert together.shape == apart.shape == (31 + 7 + 20 + 31 + 7 - 5, 8192)
    assert torch.allclose(together, apart, atol=2e-5)


def test_the_first_token_of_a_text_is_never_hidden_and_no_span_runs_into_the_next():
    texts = [window(range(10, 22)) for _ in range(40)]
    joined = packed(*texts)
    for key in range(40):
        labels = collate([joined._replace(key=key)])["labels"][0] != IGNORE_INDEX
        assert labels.any() and not labels[joined.position_ids == 0].any()


def test_only_packed_batches_carry_positions():
    texts = [window(range(10, 22)), window(range(10, 15))]
    assert "position_ids" not in collate(texts)
    assert collate([packed(*texts), texts[0]])["position_ids"].shape == (2, 17)
