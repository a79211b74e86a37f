"""Style in numbers: Burrows's Delta, style strength, human or model, AI clichés.

White space is layout and never counts. A classifier takes texts of one length, so that length tells
it nothing: cut them with `pieces`. No automatic metric is known to follow *perceived* style.
"""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from wuxia_core.corpus.ngrams import Codes, codes
from wuxia_core.errors import DataError

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Flags = npt.NDArray[np.bool_]

POOL = 2000  # characters that shares are measured over, for Delta
FEWEST_CHUNKS = 5  # of human text: fewer give no standard deviation
FEWEST_TEXTS = 20  # of each kind, for a classifier
FOLDS = 5
HIDDEN = "■"

# What language models write more of than authors do, by our own reading of generated 武侠 prose; it
# is no published list. Many are good Chinese: only a rate beside the human rate tells something.
CLICHES = (
    *("嘴角勾起一抹", "嘴角微微上扬", "不禁", "仿佛", "与此同时", "眼中闪过一丝", "深吸一口气"),
    *("空气仿佛凝固", "时间仿佛静止", "心中涌起一股", "一股强大的", "眼神变得", "目光如炬"),
    *("眼神坚定", "目光坚定", "语气坚定", "意味深长", "若有所思", "不由自主", "前所未有"),
    *("难以置信", "难以言喻", "命运的齿轮", "在这一刻", "就在这时", "缓缓开口", "淡淡一笑"),
    *("微微一笑", "声音低沉", "带着一丝", "透着一股", "宛如", "此时此刻", "心头一震"),
)


def bare(text: str) -> str:
    """Drop the white space."""
    return "".join(text.split())


def pieces(text: str, chars: int) -> list[str]:
    """Cut a text without its white space into pieces of exactly `chars` characters, no rest.

    `一 二三四五` by 2 gives `["一二", "三四"]`.
    """
    whole = bare(text)
    return [whole[at : at + chars] for at in range(0, len(whole) - chars + 1, chars)]


@dataclass(frozen=True)
class BurrowsDelta:
    """Distance of pooled texts from a human style by its commonest characters (Burrows 2002).

    `mean` and `sd` (V,) of the share of each of `characters` (V,) come from human text alone;
    `centroid` (V,) is the z-score of the human target. Delta grows as a pool gets smaller: compare
    pools of one size.
    """

    characters: Codes
    mean: Floats
    sd: Floats
    centroid: Floats

    @classmethod
    def fit(cls, target: Sequence[str], other: Sequence[str] = (), characters: int = 500) -> Self:
        """Take the commonest characters and their shares from human training texts.

        `target` is the style to measure the distance from; `other` is more human text for `mean`
        and `sd`. To find the nearer of two styles, fit twice with the two exchanged; each should be
        of one genre. V is `characters`, less those whose share never changes. Raises `DataError`
        where `target` has fewer than 5 chunks of 2,000 characters.
        """
        own = _chunks(target)
        if len(own) < FEWEST_CHUNKS:
            size = f"{FEWEST_CHUNKS * POOL:,} characters"
            raise DataError(f"Burrows's Delta: the human texts have fewer than {size}")
        chunks = own + _chunks(other)
        count = np.bincount(np.concatenate(chunks))  # by code point
        common = np.sort(np.argsort(-count, kind="stable")[:characters]).astype(np.uint32)
        shares = np.array([_count(chunk, common) / len(chunk) for chunk in chunks])  # (M, V)
        mean, sd = shares.mean(0), shares.std(0, ddof=1)
        varied = sd > 0
        centroid = (shares[: len(own)].mean(0) - mean)[varied] / sd[varied]
        return cls(common[varied], mean[varied], sd[varied], centroid)

    def counts(self, texts: Sequence[str]) -> tuple[Ints, Ints]:
        """Count each of the V characters, and all, in each text: (N, V) and (N,)."""
        each = [codes(bare(text)) for text in texts]
        counts = np.array([_count(text, self.characters) for text in each], np.int64)
        return counts.reshape(-1, len(self.characters)), np.array([len(t) for t in each], np.int64)

    def scores(self, counts: npt.ArrayLike, chars: npt.ArrayLike) -> Floats:
        """Z-scores of pools: counts (V,) or (B, V) and characters, a number or (B,), like it."""
        shares = np.asarray(counts) / np.asarray(chars)[..., None]
        return np.asarray((shares - self.mean) / self.sd)

    def delta(self, counts: npt.ArrayLike, chars: npt.ArrayLike) -> Floats:
        """Mean absolute difference of z-scores between pools and the target, 0 or more.

        What `counts` gave goes in summed over the texts of a pool: (V,) and a number give a number;
        (B, V) and (B,), the pools of B resamples, give (B,). Raises `DataError` where pools have
        fewer than 2,000 characters, resamples on average.
        """
        size = np.mean(np.asarray(chars, np.float64))
        if size < POOL:
            raise DataError(f"Burrows's Delta: {size:,.0f} characters in all, fewer than {POOL:,}")
        return np.asarray(np.abs(self.scores(counts, chars) - self.centroid).mean(-1))


def _chunks(texts: Sequence[str]) -> list[Codes]:
    """Cut texts, one behind the other, into chunks of 2,000 characters or a little more."""
    whole = codes(bare("".join(texts)))
    return np.array_split(whole, len(whole) // POOL) if len(whole) >= POOL else []


def _count(text: Codes, common: Codes) -> Ints:
    """Count each of the sorted characters in a text, (V,)."""
    place = np.searchsorted(common, text).clip(max=len(common) - 1)
    return np.bincount(place[common[place] == text], minlength=len(common))


def commonest(texts: Sequence[str], n: int = 300) -> str:
    """List the n commonest characters of human texts, for the masked form of a classifier."""
    return "".join(character for character, _ in Counter(bare("".join(texts))).most_common(n))


@dataclass(frozen=True)
class StyleClassifier:
    """Tell two kinds of text apart: TF-IDF of runs of 1 to 3 characters, logistic regression.

    The masked form shows it the characters in `kept` only, so that names and props (剑, 掌门) tell
    nothing: report that one. `chars` is the length of the texts it was fitted on.
    """

    pipeline: Any
    kept: str | None
    chars: int

    @classmethod
    def fit(cls, texts: Sequence[str], target: Flags, kept: str | None = None) -> Self:
        """Fit on texts made by `pieces`; `target` (N,) says which shall get a positive logit.

        `kept` is made by `commonest`; None shows every character. Raises `DataError` where a kind
        has fewer than 20 texts, or lengths differ.
        """
        _enough(target)
        seen = _seen(texts, kept, len(texts[0]))
        return cls(_pipeline().fit(seen, target), kept, len(texts[0]))

    def logit(self, texts: Sequence[str]) -> Floats:
        """Log-odds of the target's kind, (N,); `DataError` for a text of another length."""
        return np.asarray(self.pipeline.decision_function(_seen(texts, self.kept, self.chars)))


def held_out_logits(
    texts: Sequence[str], target: Flags, groups: Sequence[str], kept: str | None = None
) -> Floats:
    """Let a classifier judge each text that saw none of its group (book, prompt): logits, (N,).

    Five folds, or as many as a kind has groups. Raises `DataError` as `StyleClassifier.fit` does,
    and where a kind has fewer than two groups.
    """
    from sklearn.model_selection import StratifiedGroupKFold, cross_val_predict

    _enough(target)
    names = np.array(groups)
    fewest = min(len(np.unique(names[kind])) for kind in (target, ~target))
    if fewest < 2:
        raise DataError(f"classifier: {fewest} book or prompt of a kind, fewer than 2")
    folds = StratifiedGroupKFold(min(FOLDS, fewest))
    seen, how = _seen(texts, kept, len(texts[0])), "decision_function"
    logits = cross_val_predict(_pipeline(), seen, target, groups=names, cv=folds, method=how)
    return np.asarray(logits)


def human_or_model(
    human: tuple[Sequence[str], Sequence[str]],
    base: tuple[Sequence[str], Sequence[str]],
    tuned: tuple[Sequence[str], Sequence[str]],
    kept: str | None = None,
) -> tuple[Floats, Floats, Floats]:
    """Judge whether people wrote the texts, held out by prompt or document.

    A side is (texts, their prompts or documents); logits of the three come back, positive for
    human. The mean of `wins(human, model)` is 0.5 where a model passes for human, 1 where each text
    gives it away; logits of all folds count as of one judge. One judge sees both models: with one
    each, the chance in fitting them would make intervals of their difference too narrow. Raises
    `DataError` as `held_out_logits` does.
    """
    texts, groups = ([item for side in (human, base, tuned) for item in side[n]] for n in (0, 1))
    first, second = len(human[0]), len(human[0]) + len(base[0])
    logits = held_out_logits(texts, np.arange(len(texts)) < first, groups, kept)
    return logits[:first], logits[first:second], logits[second:]


def _pipeline() -> Any:
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    tfidf = TfidfVectorizer(
        analyzer="char", ngram_range=(1, 3), lowercase=False, min_df=2, sublinear_tf=True
    )
    return make_pipeline(tfidf, LogisticRegression(C=10, class_weight="balanced", max_iter=1000))


def _enough(target: Flags) -> None:
    fewest = min(np.sum(target), np.sum(~target))
    if fewest < FEWEST_TEXTS:
        raise DataError(f"classifier: {fewest} texts of a kind, fewer than {FEWEST_TEXTS}")


def _seen(texts: Sequence[str], kept: str | None, chars: int) -> list[str]:
    """Hide what the classifier shall not see."""
    odd = next((len(text) for text in texts if len(text) != chars), None)
    if odd is not None:
        raise DataError(
            f"classifier: a text of {odd} characters among texts of {chars}: cut all by pieces()"
        )
    if kept is None:
        return list(texts)
    hidden = re.compile(f"[^{re.escape(kept)}]")
    return [hidden.sub(HIDDEN, text) for text in texts]


def wins(positive: Floats, negative: Floats) -> Floats:
    """Compare every score of one side with every one of the other: 1, 1/2 or 0, (N, M).

    The mean is the area under the ROC curve, AUC (Mann & Whitney 1947); with v (N,) and w (M,) the
    times that a resample drew each text, it is v @ wins @ w / (v.sum() * w.sum()).
    """
    return np.asarray((np.sign(np.subtract.outer(positive, negative)) + 1) / 2)


def cliches(texts: Sequence[str]) -> tuple[Ints, Ints]:
    """Count the clichés of `CLICHES` and the characters of each text: (N,) and (N,).

    Their sums' ratio times 1,000 is the rate (after arXiv 2510.13939). No character counts twice:
    空气仿佛凝固 is one cliché. Raises `DataError` below 1,000 characters in all.
    """
    found = re.compile("|".join(sorted(CLICHES, key=len, reverse=True)))
    each = [bare(text) for text in texts]
    chars = np.array([len(text) for text in each], np.int64)
    if chars.sum() < 1000:
        raise DataError(f"clichés per 1,000 characters: {chars.sum()} characters, fewer than 1,000")
    return np.array([len(found.findall(text)) for text in each], np.int64), chars
