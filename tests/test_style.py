import numpy as np
import pytest
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import StratifiedGroupKFold, cross_val_predict

from wuxia_core.errors import DataError
from wuxia_core.evaluate.writing import (
    BurrowsDelta,
    chunks,
    distinct_n,
    repetition,
    strip_whitespace,
    style_classifier,
    top_characters,
)

# Diversity


def test_distinct_n_by_hand():
    unique, total = distinct_n(["剑光剑光", "剑影"], 1)
    assert unique.sum() / total.sum() == 3 / 6  # 剑 光 影 of six
    assert unique.tolist() == [1.5, 1.5] and total.tolist() == [4, 2]  # 光, 影; half of 剑
    unique, total = distinct_n(["剑光剑光", "剑影"], 2)
    assert unique.sum() / total.sum() == 3 / 4  # 剑光 twice, 光剑, 剑影


def test_distinct_n_of_texts_all_alike_and_all_different():
    unique, total = distinct_n(["一二三四"] * 5, 2)
    assert unique.sum() / total.sum() == pytest.approx(1 / 5)
    unique, total = distinct_n(["一二三四", "五六七八", ""], 2)
    assert unique.sum() / total.sum() == pytest.approx(1) and total.tolist() == [3, 3, 0]


def test_values_are_the_jackknife():
    texts = ["剑光一闪，人已不见", "剑影一闪，人又来了", "雨下得很大，灯灭了", "剑光又起，雨未停"]
    rest = [texts[:out] + texts[out + 1 :] for out in range(len(texts))]
    without = np.array([len({t[at : at + 2] for t in r for at in range(len(t) - 1)}) for r in rest])
    unique, _ = distinct_n(texts, 2)
    assert unique - unique.mean() == pytest.approx(without.mean() - without)


def test_repetition_by_hand():
    assert repetition("哈哈哈哈哈") == 1 / 2  # 哈哈哈哈 twice
    assert repetition("一二三四五六") == 0
    assert repetition("一二一二一二", n=2) == 1 - 2 / 5


# Burrows's Delta


def test_delta_by_hand():
    human = ["剑" * n + "\n" + "雨" * (2000 - n) for n in (800, 800, 1000, 1200, 1200)]
    delta = BurrowsDelta(human, [], characters=2)  # mean 0.5 and 0.5, sd 0.1 and 0.1
    counts = delta.counts(["剑" * 1000 + "雨 " * 300, "剑" * 400 + "雨" * 100 + "灯" * 200])
    assert counts.tolist() == [[1000, 300, 1300], [400, 100, 700]]
    # shares 0.7 and 0.2, z-scores 2 and -3
    assert delta.delta(counts.sum(0)) == pytest.approx(2.5)
    assert delta.delta([[1400, 400, 2000], [1000, 1000, 2000]]) == pytest.approx([2.5, 0])


def test_the_target_is_where_delta_is_zero():
    wuxia = ["剑" * n + "雨" * (2000 - n) for n in (800, 900, 1000, 1100, 1200)]
    other = ["剑" * n + "雨" * (2000 - n) for n in (200, 300, 400)]
    delta = BurrowsDelta(wuxia, other, characters=2)
    assert delta.delta([1000, 1000, 2000]) == pytest.approx(0)
    assert delta.centroid[0] > 0 > delta.centroid[1]  # 剑 above the mean of all, 雨 below


def test_delta_needs_enough_text():
    with pytest.raises(DataError, match="fewer than 10,000"):
        BurrowsDelta(["剑" * 9999], [])
    delta = BurrowsDelta(["剑" * n + "雨" * (2000 - n) for n in range(800, 805)], [])
    with pytest.raises(DataError, match="1,999 characters in all, fewer than 2,000"):
        delta.delta([1000, 999, 1999])


# Classifiers


COMMON = "之乎者也而已矣焉哉兮"
ALL = COMMON + "剑车"


def toy(character, n, seed):
    """Texts of 40 characters of which a fifth is one character."""
    rng = np.random.default_rng(seed)
    letters = list(COMMON + character * 2)
    return ["".join(rng.choice(letters, 40)) for _ in range(n)]


def test_chunks_are_of_one_length():
    assert chunks("一 二三\n　四五", 2) == ["一二", "三四"]
    assert chunks("一", 2) == []
    assert strip_whitespace(" 一\r\n二") == "一二"


def held_out_auc(target, other, kept, books):
    """Judge each text by a classifier of the same settings, fitted on other books."""
    texts, flags = [*target, *other], [True] * len(target) + [False] * len(other)
    how = {"cv": StratifiedGroupKFold(5), "method": "decision_function", "groups": books}
    logits = cross_val_predict(style_classifier(target, other, kept), texts, flags, **how)
    return roc_auc_score(flags, logits)


def test_the_classifier_tells_two_kinds_apart():
    model = style_classifier(toy("剑", 30, 0), toy("车", 30, 1), ALL)
    new = model.decision_function(toy("剑", 10, 2) + toy("车", 10, 3))
    assert new.shape == (20,) and roc_auc_score(np.arange(20) < 10, new) > 0.95


def test_masked_it_sees_no_topic():
    kinds, books = (toy("剑", 60, 0), toy("车", 60, 1)), [n % 20 for n in range(120)]
    assert held_out_auc(*kinds, ALL, books) > 0.95
    assert 0.3 < held_out_auc(*kinds, COMMON, books) < 0.7
    assert top_characters(["之之之 乎乎", "者"], 2) == "之乎"


def test_a_classifier_needs_enough():
    with pytest.raises(DataError, match="19 texts of a kind, fewer than 20"):
        style_classifier(["剑" * 9] * 20, ["车" * 9] * 19, ALL)


# On real novels


def read(folder, chars):
    """Start of each book of a folder, white space dropped; the encyclopaedia is left out."""
    books = [p for p in sorted(folder.glob("*.txt")) if not p.name.startswith("zhwiki")]
    return {path.stem: strip_whitespace(path.read_text("utf-8-sig"))[:chars] for path in books}


def test_delta_finds_the_style_of_a_held_out_book(novels):
    wuxia, other = read(novels / "wuxia", 30_000), read(novels / "general", 30_000)
    right = []
    for side, rest in ((wuxia, other), (other, wuxia)):
        for book, text in side.items():
            same = [side[name] for name in side if name != book]
            others = list(rest.values())
            near, far = BurrowsDelta(same, others), BurrowsDelta(others, same)
            pools = near.counts(chunks(text, 2000)[::3])
            right += (near.delta(pools) < far.delta(pools)).tolist()
    assert len(right) >= 50 and np.mean(right) >= 0.95


def test_style_shows_in_common_characters_of_held_out_books(novels):
    kinds = [
        [
            (book, piece)
            for book, text in read(novels / folder, 60_000).items()
            for piece in chunks(text, 200)[:: len(text) // 6000]
        ]
        for folder in ("wuxia", "general")
    ]
    wuxia, general = ([piece for _, piece in kind] for kind in kinds)
    books = [book for kind in kinds for book, _ in kind]
    assert held_out_auc(wuxia, general, top_characters(wuxia + general), books) >= 0.95


def test_people_hardly_repeat_themselves(novels):
    texts = [
        piece for text in read(novels / "wuxia", 60_000).values() for piece in chunks(text, 200)
    ]
    assert max(map(repetition, texts)) < 0.5


def test_intervals_of_distinct_n_hold(novels):
    """Between samples of the same books about one interval in twenty leaves 0 out."""
    books = read(novels / "wuxia", 60_000)
    texts = [piece for text in books.values() for piece in chunks(text, 100)]
    rng = np.random.default_rng(0)
    missed = 0
    for _ in range(300):
        sides = [[texts[n] for n in row] for row in rng.choice(len(texts), (2, 24), replace=False)]
        base, tuned = (distinct_n(side, 2)[0] for side in sides)
        times = rng.multinomial(24, np.full(24, 1 / 24), 500)
        low, high = np.percentile(times @ (tuned - base), [2.5, 97.5])
        missed += not low <= 0 <= high
    assert missed <= 30
