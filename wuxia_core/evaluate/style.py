"""Style in numbers: Burrows's Delta, style strength, human or model, AI clichés.

White space is layout and never counts. A classifier takes texts of one length, so that length tells
it nothing: cut them with `pieces`. No automatic metric is known to follow *perceived* style.
"""

import heapq
import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from wuxia_core.errors import DataError
from wuxia_core.text import Codes, codes, ngrams

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
Gram = tuple[str, ...]
Most = dict[Gram, list[tuple[int, int]]]

TIMES = 3  # a loop is a period written so often at the end of a text
LOOP = 30  # characters it covers at least, or a third of a shorter text
ORDER = 4  # of BLEU


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


def distinct_n(texts: Sequence[str], n: int) -> tuple[Floats, Ints]:
    """Count the different n-grams of characters of all texts together, and all of them.

    Distinct-n (Li et al. 2016, there of words) is the sum of the first over the sum of the second.
    The first is a text's jackknife value: the n-grams only it has, and an equal part of the shared.
    `["剑光", "剑影"]` with n 1 gives (1.5, 1.5) and (2, 2): 3 of 4.

    Returns
    -------
    (N,) and (N,), a value a text.

    Raises
    ------
    DataError
        Where no text has n characters.
    """
    grams = [ngrams(codes(text), n) for text in texts]
    total = np.array([len(row) for row in grams], np.int64)
    if not total.any():
        raise DataError(f"distinct-{n}: {len(texts)} texts, none of {n} characters or more")
    own = [np.unique(row) for row in grams]
    _, place, having = np.unique(np.concatenate(own), return_inverse=True, return_counts=True)
    owner = np.repeat(np.arange(len(own)), [len(row) for row in own])
    alone = np.bincount(owner[having[place] == 1], minlength=len(own))
    return alone + (len(having) - alone.sum()) / len(own), total


def repetition(text: str, n: int = 4) -> float:
    """Measure how much of a text repeats itself: 1 - unique/all n-grams of characters.

    It is rep-n of Welleck et al. (2020), of characters. `哈哈哈哈哈` with n 4 gives 1/2.

    Raises `DataError` where the text has fewer than n characters.
    """
    grams = ngrams(codes(text), n)
    if not len(grams):
        raise DataError(f"repetition: a text of {len(text)} characters, fewer than {n}")
    return 1 - len(np.unique(grams)) / len(grams)


def loops(text: str) -> bool:
    """Tell whether a text ends in a loop, by our own definition.

    At its end a period of any length stands at least 3 times in a row, cut off anywhere, and the
    repetitions cover at least 30 characters, or a third of a text shorter than 90.
    """
    characters = codes(text.rstrip())
    least = min(LOOP, len(characters) / 3)
    periods = range(1, len(characters) // TIMES + 1)
    return any(_run(characters, p) >= max(least, TIMES * p) for p in periods)


def _run(characters: Codes, period: int) -> int:
    """Count the characters at the end that repeat with a period."""
    differ = np.flatnonzero(characters[period:] != characters[:-period])
    return len(characters) - (int(differ[-1]) + 1 if len(differ) else 0)


def self_bleu(texts: Sequence[str]) -> Floats:
    """Score texts against all others as references; the mean, 0 to 100, is high where they agree.

    Self-BLEU (Zhu et al. 2018) of order 4, sacrebleu's sentence score over its `zh` tokens, which
    are single characters in Chinese. In linear time of n-grams, where pairs would take quadratic.

    Returns
    -------
    (N,), jackknife values: their mean is that of the texts' scores, a single one is no score.

    Raises
    ------
    DataError
        Where there are fewer than three texts.
    """
    from sacrebleu.metrics.bleu import BLEU
    from sacrebleu.metrics.helpers import extract_all_word_ngrams

    if len(texts) < 3:
        raise DataError(f"self-BLEU: {len(texts)} texts, fewer than 3")
    bleu = BLEU(tokenize="zh")
    found = [extract_all_word_ngrams(bleu.tokenizer(text.rstrip()), 1, ORDER) for text in texts]
    most = _most([grams for grams, _ in found])
    lengths = [length for _, length in found]
    scores = np.zeros((len(texts), len(texts)))  # of the row's text, without the column's
    for text, (grams, length) in enumerate(found):
        total, right = _matches(text, grams, most, len(texts))
        closest = _closest(text, lengths)
        for out, matches in enumerate(right.tolist()):
            near = closest[1] if out == closest[0] else closest[0]
            score = bleu.compute_bleu(matches, total, length, lengths[near], "exp", None, True)
            scores[text, out] = score.score
    own = scores.diagonal()  # nothing is left out: a text is no reference of its own
    without = (scores.sum(0) - own) / (len(texts) - 1)
    return np.asarray(own.mean() - (len(texts) - 1) * (without - without.mean()))


def _most(texts: Sequence[Counter[Gram]]) -> Most:
    """List for each n-gram the three texts with most of it, as (count, text)."""
    having: Most = defaultdict(list)
    for text, grams in enumerate(texts):
        for gram, count in grams.items():
            having[gram].append((count, text))
    return {gram: heapq.nlargest(3, pairs) for gram, pairs in having.items()}


def _matches(text: int, grams: Counter[Gram], most: Most, n: int) -> tuple[list[int], Ints]:
    """Count a text's n-grams, (ORDER,), and those another has, without each in turn, (n, ORDER)."""
    total, right = [0] * ORDER, [0] * ORDER
    lost = np.zeros((n, ORDER), np.int64)
    for gram, count in grams.items():
        total[len(gram) - 1] += count
        others = [pair for pair in most[gram] if pair[1] != text]
        (first, owner), (second, _) = (*others, (0, text), (0, text))[:2]
        right[len(gram) - 1] += min(count, first)
        lost[owner, len(gram) - 1] += min(count, first) - min(count, second)
    return total, np.array(right) - lost


def _closest(text: int, lengths: Sequence[int]) -> list[int]:
    """Find the two other texts nearest in length, the shorter first: BLEU's reference length."""
    others = [other for other in range(len(lengths)) if other != text]
    return heapq.nsmallest(
        2, others, key=lambda other: (abs(lengths[other] - lengths[text]), lengths[other])
    )
