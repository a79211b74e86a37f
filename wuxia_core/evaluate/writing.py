"""Passages that a model writes, and their style in numbers: the same prompts and seeds for both.

White space is layout and never counts. A classifier takes texts of one length, so that length tells
it nothing: cut them with `chunks`. No automatic metric is known to follow *perceived* style.
"""

import functools
import re
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from wuxia_core.errors import DataError
from wuxia_core.evaluate.context import EvalContext
from wuxia_core.evaluate.copying import longest_runs, overlap, strip_whitespace
from wuxia_core.evaluate.statistics import FEWEST, Floats, Metric, Row, compare, ratio, reason
from wuxia_core.mixing import TRAIN, UNUSED, VALIDATION
from wuxia_core.write import Sampling, encode_prompt, seeded

if TYPE_CHECKING:
    from sklearn.pipeline import Pipeline


# Beside the openings of held-out chapters; written for this, in no book.
WRITTEN = Path(__file__).with_name("prompts.txt")
WRITERS = ("base", "tuned", "few_shot")
AT_ONCE = 16  # passages
OPENING = 40  # characters of a chapter that serve as its prompt
CHARACTERS = 150  # of each passage that are compared, without white space: all of one length
MEAN = ratio("value", "count")

POOL = 2000  # characters that shares are measured over, for Delta
FEWEST_POOLS, FEWEST_TEXTS = 5, 20  # human pools for a standard deviation; texts of each kind
HIDDEN = "■"  # stands for every character that a classifier shall not see

# Makes of a writer's rows what the metric's statistic takes.
Measure = Callable[[pd.DataFrame], pd.DataFrame]


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

    def __init__(self, target: Sequence[str], other: Sequence[str], characters: int = 500) -> None:
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

    def counts(self, texts: Sequence[str]) -> npt.NDArray[np.int64]:
        """Count each of the V characters in each text, and in the last column all: (N, V + 1)."""
        each = [strip_whitespace(text) for text in texts]
        return np.column_stack([self._counter.transform(each).toarray(), [*map(len, each)]])

    def delta(self, counts: npt.ArrayLike) -> Floats:
        """Mean absolute difference of z-scores between pools and the target, 0 or more.

        What `counts` gave goes in summed over the texts of a pool: (V + 1,) gives a number,
        (B, V + 1), the pools of B resamples, give (B,). Raises `DataError` where pools have fewer
        than 2,000 characters, resamples on average.
        """
        known, chars = np.split(np.asarray(counts), [-1], axis=-1)
        if (size := chars.mean()) < POOL:
            raise DataError(f"Burrows's Delta: {size:,.0f} characters in all, fewer than {POOL:,}")
        scores = (known / chars - self.mean) / self.sd
        return np.asarray(np.abs(scores - self.centroid).mean(-1))


def style_classifier(target: Sequence[str], other: Sequence[str], kept: str) -> "Pipeline":
    """Tell two kinds of text apart: TF-IDF of runs of 1 to 3 characters, logistic regression.

    Its `decision_function` gives the log-odds of the `target`. It sees the characters in `kept`
    only (those of `top_characters`), so that names and props (剑, 掌门) tell nothing. Raises
    `DataError` where a kind has fewer than 20 texts.
    """
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    fewest = min(len(target), len(other))
    if fewest < FEWEST_TEXTS:
        raise DataError(f"classifier: {fewest} texts of a kind, fewer than {FEWEST_TEXTS}")
    hide = functools.partial(re.compile(f"[^{re.escape(kept)}]").sub, HIDDEN)
    how = {"analyzer": "char", "ngram_range": (1, 3), "min_df": 2, "sublinear_tf": True}
    logistic = LogisticRegression(C=10, class_weight="balanced", max_iter=1000)
    classifier = make_pipeline(TfidfVectorizer(preprocessor=hide, **how), logistic)
    return classifier.fit([*target, *other], [True] * len(target) + [False] * len(other))


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


def generate(
    context: EvalContext, prompts: Sequence[str], seed: int, tokens: int = Sampling.tokens
) -> list[str]:
    """Sample exactly so many tokens behind each prompt, with the defaults of `Sampling`.

    The same `seed` gives the same passages on the same kind of machine.
    """
    rows = [encode_prompt(context.tokenizer, prompt, chat=False) for prompt in prompts]
    settings = Sampling(tokens).settings() | {"min_new_tokens": tokens}
    with seeded(context.model, seed):
        return context.continue_rows(rows, settings)


def prompts(context: EvalContext) -> list[dict[str, Any]]:
    """Give ten prompts of ours and openings of held-out chapters, whose own text is `human`."""
    chapters = context.mixture.texts(context.documents("wuxia", VALIDATION, limit=30))
    written = WRITTEN.read_text(encoding="utf-8").splitlines()
    rows = [{"prompt": prompt, "human": ""} for prompt in written]
    return rows + [{"prompt": t[:OPENING], "human": t[OPENING:]} for t in chapters]


def write_passages(context: EvalContext) -> list[dict[str, Any]]:
    """Let base and tuned go on from the same prompts, and the base after an example of 武侠 too.

    Returns rows with `prompt`, `human`, `base`, `tuned` and `few_shot`.
    """
    chapter = next(iter(context.mixture.texts(context.documents("wuxia", TRAIN, limit=1))), "")
    example = chapter[len(chapter) // 2 :][:60]
    rows: list[dict[str, Any]] = []
    for chunk in context.within_budget("prompts written to", prompts(context), AT_ONCE, 0.25):
        texts, seed = [row["prompt"] for row in chunk], context.seed + len(rows)
        base, tuned = context.base_and_tuned(functools.partial(generate, context, texts, seed))
        with context.model.disable_adapter():
            few_shot = generate(context, [f"{example}\n{prompt}" for prompt in texts], seed)
        table = pd.DataFrame(chunk).assign(base=base, tuned=tuned, few_shot=few_shot)
        rows += table.to_dict("records")
    return rows


def score_generations(context: EvalContext, written: list[dict[str, Any]]) -> dict[str, Any]:
    """Measure the passages, each cut to 150 characters.

    Returns
    -------
    `metrics`; `copied`, the longest runs that tuned passages copied, uncut; `texts`, a row a
    passage: its `writer`, `number` (of the passage in `written`; of people's, their own), longest
    `copied` run and `style` logit.
    """
    whole = [n for n, row in enumerate(written) if all(_cut(row[w]) for w in WRITERS)]
    rows = [(writer, n, _cut(written[n][writer])) for writer in WRITERS for n in whole]
    held_out = _chunks(context.human_texts("wuxia", VALIDATION))
    places = np.linspace(0, len(held_out) - 1, min(len(whole), len(held_out))).astype(int)
    rows += [("human", n, held_out[place]) for n, place in enumerate(places)]
    table = pd.DataFrame(rows, columns=["writer", "number", "text"])
    uncut = [row["tuned"] for row in written]
    shared = overlap([*table["text"], *uncut], context.mixture.training_texts)  # reads all: once
    people = _People(context)
    table["copied"], table["style"] = shared["length"][: len(table)], None
    with suppress(DataError):  # said in the row of style_strength
        if whole:
            table["style"] = people.classifier.decision_function(table["text"])
    return {
        "metrics": [_row(*each, table, context.seed) for each in _measures(people)],
        "copied": longest_runs(shared[len(table) :].reset_index(drop=True)).to_dict("records"),
        "texts": table.drop(columns="text").to_dict("records"),
    }


class _People:
    """What judges texts by people's writing; fitted when first needed.

    Both raise `DataError` where there is too little to fit them on.
    """

    def __init__(self, context: EvalContext) -> None:
        wuxia = context.human_texts("wuxia", TRAIN)
        self.human = wuxia, context.human_texts("general", TRAIN, UNUSED)

    @functools.cached_property
    def delta(self) -> BurrowsDelta:
        return BurrowsDelta(*self.human)

    @functools.cached_property
    def classifier(self) -> "Pipeline":
        wuxia, general = (_chunks(texts)[:1000] for texts in self.human)
        return style_classifier(wuxia, general, top_characters(wuxia + general))


def _measures(people: _People) -> list[tuple[Metric, Measure]]:
    """List the metrics of passages, each with what makes a writer's items of its rows."""

    def pooled(items: pd.DataFrame, weights: Floats) -> Floats:
        return people.delta.delta(weights @ items.to_numpy())

    delta = Metric("burrows_delta", "mean |z|, lower is nearer", "wuxia", pooled)
    strength = Metric("style_strength", "logit, function words only", "wuxia", MEAN)
    distinct = Metric("distinct_2", "distinct/all bigrams", "wuxia", MEAN)
    repeated = Metric("repetition", "share of repeated 4-grams", "wuxia", MEAN)
    copied = Metric("copied_length", "characters shared with training text", "training", MEAN)
    return [
        (delta, lambda rows: pd.DataFrame(people.delta.counts(rows["text"]))),
        (strength, lambda rows: _values(people.classifier.decision_function(rows["text"]))),
        (distinct, lambda rows: _values(*distinct_n(rows["text"], 2))),
        (repeated, lambda rows: _values(rows["text"].map(repetition))),
        (copied, lambda rows: _values(rows["copied"])),
    ]


def _row(metric: Metric, measure: Measure, table: pd.DataFrame, seed: int) -> Row:
    """Compare base and tuned; the controls' figures stand beside them."""
    n = int((table["writer"] == "base").sum())
    if n < FEWEST:
        return metric.row(n, reason=reason("passages", n, characters=CHARACTERS))
    try:
        items = {writer: measure(rows) for writer, rows in table.groupby("writer")}
        row = compare(metric, items["base"], items["tuned"], seed)
    except DataError as error:
        return metric.row(n, reason=str(error))
    for control in ("few_shot", "human"):
        if len(items.get(control, ())) == n:  # a figure of fewer texts would be another one
            row[control] = float(metric.statistic(items[control], np.ones((1, n)))[0])
    return row


def _values(values: Any, counts: Any = 1.0) -> pd.DataFrame:
    """Make items for a mean: `value` and `count`, a row a text."""
    return pd.DataFrame({"value": np.asarray(values, np.float64), "count": counts})


def _cut(text: str) -> str:
    """Cut to 150 characters; a shorter passage gives nothing."""
    return next(iter(chunks(text, CHARACTERS)), "")


def _chunks(texts: Sequence[str]) -> list[str]:
    """Cut human texts into chunks as long as a passage."""
    return [chunk for text in texts for chunk in chunks(text, CHARACTERS)]
