"""Style in numbers: Burrows's Delta, a classifier of style, variety and repetition.

White space is layout and never counts. A classifier takes texts of one length, so that length tells
it nothing: cut them with `chunks`. No automatic metric is known to follow *perceived* style.
"""

import re
from collections import Counter
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from wuxia_core.errors import DataError
from wuxia_core.evaluate.statistics import Floats

if TYPE_CHECKING:
    from sklearn.pipeline import Pipeline

Flags = npt.NDArray[np.bool_]

POOL = 2000  # characters that shares are measured over, for Delta
FEWEST_POOLS, FEWEST_TEXTS = 5, 20  # human pools for a standard deviation; texts of each kind
HIDDEN = "■"  # stands for every character that a classifier shall not see


def strip_whitespace(text: str) -> str:
    """Drop all white space, inside the text too."""
    return "".join(text.split())


def chunks(text: str, chars: int) -> list[str]:
    """Cut a text without its white space into chunks of exactly `chars` characters, no rest.

    `一 二三四五` by 2 gives `["一二", "三四"]`.
    """
    whole = strip_whitespace(text)
    return [whole[at : at + chars] for at in range(0, len(whole) - chars + 1, chars)]


def top_characters(texts: Sequence[str], n: int = 300) -> str:
    """List the n commonest characters of human texts, which a classifier may see."""
    return "".join(c for c, _ in Counter(strip_whitespace("".join(texts))).most_common(n))


class BurrowsDelta:
    """Distance of pooled texts from a human style by its commonest characters (Burrows 2002).

    `mean` and `sd` (V,) of the share of each character come from human training text alone;
    `centroid` (V,) is the z-score of the human target. Delta grows as a pool gets smaller: compare
    pools of one size.

    `target` is the style to measure the distance from; `other` is more human text for `mean` and
    `sd`. To find the nearer of two styles, fit twice with the two exchanged; each should be of one
    genre. Raises `DataError` where `target` has fewer than 5 pools of 2,000 characters.
    """

    def __init__(
        self, target: Sequence[str], other: Sequence[str] = (), characters: int = 500
    ) -> None:
        from sklearn.feature_extraction.text import CountVectorizer

        own, rest = chunks("".join(target), POOL), chunks("".join(other), POOL)
        if len(own) < FEWEST_POOLS:
            fewest = FEWEST_POOLS * POOL
            raise DataError(f"Burrows's Delta: human text of fewer than {fewest:,} characters")
        self._counter = CountVectorizer(analyzer="char", lowercase=False, max_features=characters)
        shares = self._counter.fit_transform([*own, *rest]).toarray() / POOL  # (M, V)
        self.mean, self.sd = shares.mean(0), shares.std(0, ddof=1)
        self.sd[self.sd == 0] = np.inf  # a share that never changes tells nothing: its z-score is 0
        self.centroid = (shares[: len(own)].mean(0) - self.mean) / self.sd

    def counts(self, texts: Sequence[str]) -> tuple[Floats, Floats]:
        """Count each of the V characters, and all, in each text: (N, V) and (N,)."""
        each = [strip_whitespace(text) for text in texts]
        return self._counter.transform(each).toarray(), np.array([len(text) for text in each])

    def delta(self, counts: npt.ArrayLike, chars: npt.ArrayLike) -> Floats:
        """Mean absolute difference of z-scores between pools and the target, 0 or more.

        What `counts` gave goes in summed over the texts of a pool: (V,) and a number give a number;
        (B, V) and (B,), the pools of B resamples, give (B,). Raises `DataError` where pools have
        fewer than 2,000 characters, resamples on average.
        """
        if (size := np.asarray(chars).mean()) < POOL:
            raise DataError(f"Burrows's Delta: {size:,.0f} characters in all, fewer than {POOL:,}")
        scores = (np.asarray(counts) / np.asarray(chars)[..., None] - self.mean) / self.sd
        return np.asarray(np.abs(scores - self.centroid).mean(-1))


def style_classifier(texts: Sequence[str], target: Flags, kept: str) -> "Pipeline":
    """Tell two kinds of text apart: TF-IDF of runs of 1 to 3 characters, logistic regression.

    Its `decision_function` gives the log-odds of the kind that `target` (N,) flags. It sees the
    characters in `kept` only (those of `top_characters`), so that names and props (剑, 掌门) tell
    nothing. Raises `DataError` where a kind has fewer than 20 texts.
    """
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    fewest = min(np.sum(target), np.sum(~target))
    if fewest < FEWEST_TEXTS:
        raise DataError(f"classifier: {fewest} texts of a kind, fewer than {FEWEST_TEXTS}")
    hide = partial(re.compile(f"[^{re.escape(kept)}]").sub, HIDDEN)
    how = {"analyzer": "char", "ngram_range": (1, 3), "min_df": 2, "sublinear_tf": True}
    logistic = LogisticRegression(C=10, class_weight="balanced", max_iter=1000)
    classifier = make_pipeline(TfidfVectorizer(preprocessor=hide, **how), logistic)
    return classifier.fit(texts, target)


def held_out_logits(
    classifier: "Pipeline", texts: Sequence[str], target: Flags, groups: Sequence[str]
) -> Floats:
    """Let a classifier of the same settings, fitted anew on other groups (books), judge each text.

    Logits, (N,). Five folds, or as many as a kind has groups. Raises `DataError` where a kind has
    fewer than two groups.
    """
    from sklearn.model_selection import StratifiedGroupKFold, cross_val_predict

    fewest = min(len(np.unique(np.array(groups)[kind])) for kind in (target, ~target))
    if fewest < 2:
        raise DataError(f"classifier: {fewest} book of a kind, fewer than 2")
    how = {"cv": StratifiedGroupKFold(min(5, fewest)), "method": "decision_function"}
    return np.asarray(cross_val_predict(classifier, texts, target, groups=groups, **how))


def distinct_n(texts: Sequence[str], n: int) -> tuple[Floats, Floats]:
    """Count the different n-grams of characters of all texts together, and all of them.

    Distinct-n (Li et al. 2016, there of words) is the sum of the first over the sum of the second.
    The first is a text's jackknife value: the n-grams only it has, and an equal part of the shared.
    `["剑光", "剑影"]` with n 1 gives (1.5, 1.5) and (2, 2): 3 of 4.

    Returns
    -------
    (N,) and (N,), a value a text.
    """
    grams = [[text[at : at + n] for at in range(len(text) - n + 1)] for text in texts]
    having = Counter(gram for own in grams for gram in set(own))
    alone = np.array([sum(having[gram] == 1 for gram in set(own)) for own in grams])
    return alone + (len(having) - alone.sum()) / len(texts), np.array([len(own) for own in grams])


def repetition(text: str, n: int = 4) -> float:
    """Measure how much of a text repeats itself: 1 - unique/all n-grams of characters.

    It is rep-n of Welleck et al. (2020), of characters. `哈哈哈哈哈` with n 4 gives 1/2. The text
    has n characters at least.
    """
    grams = [text[at : at + n] for at in range(len(text) - n + 1)]
    return 1 - len(set(grams)) / len(grams)
