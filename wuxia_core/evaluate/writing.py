"""Let base and tuned write passages from the same prompts and seeds, and measure their style.

White space is layout: `chunks` leaves it out before anything is measured. It also cuts texts to one
length, so that length tells a classifier nothing. No automatic metric is known to follow
*perceived* style.
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
from wuxia_core.evaluate.statistics import FEWEST, Metric, Row, compare, ratio, reason
from wuxia_core.masking import Floats
from wuxia_core.mixing import TRAIN, UNUSED, VALIDATION
from wuxia_core.write import Sampling, encode_prompt, seeded

if TYPE_CHECKING:
    from sklearn.pipeline import Pipeline


# Prompts that were written for this and stand in no book; openings of held-out chapters join them.
OWN_PROMPTS = Path(__file__).with_name("prompts.txt")
WRITERS = ("base", "tuned", "few_shot")
PASSAGE_BATCH = 16  # passages that are generated at a time
OPENING = 40  # characters of a chapter that serve as a prompt
CHARACTERS = 150  # of each passage that are compared, without white space: all of one length
MEAN = ratio("value", "count")  # these are the columns of the items that `_items` makes

POOL = 2000  # characters of a pool: text over which the share of each character is measured
FEWEST_POOLS = 5  # of the target's text, so that a standard deviation means something
FEWEST_TEXTS = 20  # of each kind, to fit a classifier
HIDDEN = "■"  # stands for every character that a classifier shall not see

# Takes a writer's rows, with the columns `text` and `copied`; gives the items that a metric's
# statistic takes.
Measure = Callable[[pd.DataFrame], pd.DataFrame]


def chunks(text: str, chars: int) -> list[str]:
    """Take the white space out of a text, and cut it into chunks of exactly `chars` characters.

    A shorter rest is dropped: `一 二三四五` by 2 gives `["一二", "三四"]`.
    """
    text = strip_whitespace(text)
    return [text[start : start + chars] for start in range(0, len(text) - chars + 1, chars)]


def top_characters(texts: Sequence[str], n: int = 300) -> str:
    """Return the `n` commonest characters of `texts` as a string, the commonest first.

    White space does not count. If two characters are equally common, the one that occurs first in
    the texts comes first. `style_classifier` takes such a string as the characters that a
    classifier may see.
    """
    return "".join(c for c, _ in Counter(strip_whitespace("".join(texts))).most_common(n))


class BurrowsDelta:
    """Distance of pooled texts from a human style by its commonest characters (Burrows 2002).

    `target` is text in the style to measure the distance from, `other` is more human text; each
    should be of one genre. Both are cut into pools of 2,000 characters. V is the number of
    characters that are compared: the commonest of all pools, at most `characters` of them. `mean`
    and `sd` (V,) are taken over all pools, of each character's share of a pool. `centroid` (V,) is
    each character's mean share in the target's pools, as a z-score. To find the nearer of two
    styles, fit twice, the second time with the two exchanged. Delta grows as a pool gets smaller:
    compare pools of one size. Raises `DataError` if `target` has fewer than 5 pools.
    """

    def __init__(self, target: Sequence[str], other: Sequence[str], characters: int = 500) -> None:
        from sklearn.feature_extraction.text import CountVectorizer

        target_pools, other_pools = (chunks("".join(texts), POOL) for texts in (target, other))
        if len(target_pools) < FEWEST_POOLS:
            fewest = FEWEST_POOLS * POOL
            raise DataError(f"Burrows's Delta: human text of fewer than {fewest:,} characters")
        self._counter = CountVectorizer(analyzer="char", lowercase=False, max_features=characters)
        # Shares of the V characters in each of M pools, (M, V).
        shares = self._counter.fit_transform([*target_pools, *other_pools]).toarray() / POOL
        self.mean, self.sd = shares.mean(0), shares.std(0, ddof=1)
        self.sd[self.sd == 0] = np.inf  # a share that never changes tells nothing: its z-score is 0
        self.centroid = (shares[: len(target_pools)].mean(0) - self.mean) / self.sd

    def counts(self, texts: Sequence[str]) -> npt.NDArray[np.int64]:
        """Count how often each of N texts has each of the V commonest characters: (N, V + 1).

        The last column has the number of all characters of each text. White space does not count.
        """
        texts = [strip_whitespace(text) for text in texts]
        return np.column_stack([self._counter.transform(texts).toarray(), [*map(len, texts)]])

    def delta(self, counts: npt.ArrayLike) -> Floats:
        """Return the mean absolute difference of z-scores between a pool and the target: 0 or more.

        `counts` are rows of `self.counts`, summed over the texts of a pool; the last column is then
        the number of all characters of the pool. One pool, (V + 1,), gives one number; a pool from
        each of B resamples, (B, V + 1), gives (B,). Raises `DataError` if the pools have on average
        fewer than 2,000 characters.
        """
        common, totals = np.split(np.asarray(counts), [-1], axis=-1)  # (…, V) and (…, 1)
        if (size := totals.mean()) < POOL:
            raise DataError(f"Burrows's Delta: {size:,.0f} characters in all, fewer than {POOL:,}")
        z_scores = (common / totals - self.mean) / self.sd
        return np.asarray(np.abs(z_scores - self.centroid).mean(-1))


def style_classifier(target: Sequence[str], other: Sequence[str], common: str) -> "Pipeline":
    """Fit a classifier of texts: TF-IDF of runs of 1 to 3 characters, then logistic regression.

    The classifier's `decision_function` gives the log-odds that a text is like `target` rather than
    like `other`. `common` are the characters that it sees (from `top_characters`); each other
    character is replaced by ■, so that names and props (剑, 掌门) tell nothing. A run counts only
    if two texts have it. Raises `DataError` if `target` or `other` has fewer than 20 texts.
    """
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    fewest = min(len(target), len(other))
    if fewest < FEWEST_TEXTS:
        raise DataError(f"classifier: {fewest} texts of a kind, fewer than {FEWEST_TEXTS}")
    hide = functools.partial(re.compile(f"[^{re.escape(common)}]").sub, HIDDEN)
    runs = {"analyzer": "char", "ngram_range": (1, 3), "min_df": 2, "sublinear_tf": True}
    logistic = LogisticRegression(C=10, class_weight="balanced", max_iter=1000)
    classifier = make_pipeline(TfidfVectorizer(preprocessor=hide, **runs), logistic)
    return classifier.fit([*target, *other], [True] * len(target) + [False] * len(other))


def distinct_n(texts: Sequence[str], n: int) -> tuple[Floats, Floats]:
    """Return each text's part of all distinct n-grams, and its number of n-grams: (N,) each.

    N is the number of `texts`; an n-gram is a run of n characters. Distinct-n (Li et al. 2016, who
    count n-grams of words) is the sum of the first array over the sum of the second. The first
    array has jackknife values: a text's part is the number of distinct n-grams that no other text
    has, plus one Nth of the number that several texts have. `["剑光", "剑影"]` with n 1 gives (1.5,
    1.5) and (2, 2): distinct-1 is 3/4.
    """
    grams = [[text[start : start + n] for start in range(len(text) - n + 1)] for text in texts]
    text_counts = Counter(gram for row in grams for gram in set(row))  # in how many texts each is
    unshared = np.array([sum(text_counts[gram] == 1 for gram in set(row)) for row in grams])
    shared = len(text_counts) - unshared.sum()  # distinct n-grams that several texts have
    return unshared + shared / len(texts), np.array([len(row) for row in grams])


def repetition(text: str, n: int = 4) -> float:
    """Return the share of a text's n-grams of characters that repeat one before: 1 - distinct/all.

    This is rep-n of Welleck et al. (2020), who count n-grams of tokens. `哈哈哈哈哈` with n 4 gives
    1/2: it has 哈哈哈哈 twice. A text must have at least n characters.
    """
    grams = [text[start : start + n] for start in range(len(text) - n + 1)]
    return 1 - len(set(grams)) / len(grams)


def generate(
    context: EvalContext, prompts: Sequence[str], seed: int, tokens: int = Sampling.tokens
) -> list[str]:
    """Sample exactly `tokens` tokens behind each prompt, otherwise with the defaults of `Sampling`.

    Returns the passages without their prompts. The same prompts and `seed` give the same passages
    on the same kind of machine.
    """
    rows = [encode_prompt(context.tokenizer, prompt, chat=False) for prompt in prompts]
    settings = Sampling(tokens).settings() | {"min_new_tokens": tokens}
    with seeded(context.model, seed):
        return context.continue_rows(rows, settings)


def prompts(context: EvalContext) -> list[dict[str, Any]]:
    """List the prompts: our ten, then the openings of at most 30 held-out chapters of 武侠.

    Returns a list of dicts. `prompt` is the text to continue: one of ours, or the first 40
    characters of a chapter. `human` is what follows these in the chapter, and "" for one of ours.
    """
    chapters = context.mixture.texts(context.documents("wuxia", VALIDATION, limit=30))
    own_prompts = OWN_PROMPTS.read_text(encoding="utf-8").splitlines()
    rows = [{"prompt": prompt, "human": ""} for prompt in own_prompts]
    return rows + [{"prompt": text[:OPENING], "human": text[OPENING:]} for text in chapters]


def write_passages(context: EvalContext) -> list[dict[str, Any]]:
    """Let base and tuned continue the same prompts, and the base after an example of 武侠 too.

    The prompts are those of `prompts`, as many as time allows. The example, 60 characters from the
    middle of a training chapter, shows whether a prompt could do what tuning does. Returns a list
    of dicts with `prompt` and `human` as in `prompts`, and with what was written behind the prompt:
    `base`, `tuned`, and `few_shot`, which the base wrote after example and prompt.
    """
    chapter = next(iter(context.mixture.texts(context.documents("wuxia", TRAIN, limit=1))), "")
    middle = len(chapter) // 2
    example = chapter[middle : middle + 60]
    rows: list[dict[str, Any]] = []
    # For at most a quarter of the evaluation's minutes.
    for chunk in context.within_budget("prompts written to", prompts(context), PASSAGE_BATCH, 0.25):
        # One seed for all writers, another for each chunk.
        texts, seed = [row["prompt"] for row in chunk], context.seed + len(rows)
        base, tuned = context.base_and_tuned(functools.partial(generate, context, texts, seed))
        with context.model.disable_adapter():
            few_shot = generate(context, [f"{example}\n{prompt}" for prompt in texts], seed)
        table = pd.DataFrame(chunk).assign(base=base, tuned=tuned, few_shot=few_shot)
        rows += table.to_dict("records")
    return rows


def score_generations(context: EvalContext, passages: list[dict[str, Any]]) -> dict[str, Any]:
    """Measure the rows of `write_passages`, each passage cut to 150 characters.

    Prompts after which any writer wrote less are left out. As many chunks of held-out 武侠, spread
    over it, are measured as the writer "human"; there are fewer if held-out 武侠 is too short.

    Returns
    -------
    A dict: `metrics`, rows of the scorecard; `copied`, at most ten rows of `overlap` with the
    longest runs in the tuned passages, which are not cut for that; `texts`, a dict for each
    measured text: its `writer`, its `number` (the index in `passages`, or among the human chunks),
    the length of its longest `copied` run, and its `style`, a logit, or None if no classifier could
    be fitted.
    """
    # Indices in `passages` of the prompts after which every writer wrote enough.
    numbers = [n for n, row in enumerate(passages) if all(_cut(row[writer]) for writer in WRITERS)]
    rows = [(writer, n, _cut(passages[n][writer])) for writer in WRITERS for n in numbers]
    held_out = _human_chunks(context.human_texts("wuxia", VALIDATION))
    places = np.linspace(0, len(held_out) - 1, min(len(numbers), len(held_out))).astype(int)
    rows += [("human", n, held_out[place]) for n, place in enumerate(places)]
    table = pd.DataFrame(rows, columns=["writer", "number", "text"])
    # One call of `overlap` for cut and uncut passages, since each call reads all training text.
    uncut = [row["tuned"] for row in passages]
    overlaps = overlap([*table["text"], *uncut], context.mixture.training_texts)
    human_style = _HumanStyle(context)
    table["copied"], table["style"] = overlaps["length"][: len(table)], None
    with suppress(DataError):  # the row of the metric style_strength has the reason
        if numbers:
            table["style"] = human_style.classifier.decision_function(table["text"])
    return {
        # A pair is a metric and its measure.
        "metrics": [_row(*pair, table, context.seed) for pair in _measures(human_style)],
        "copied": longest_runs(overlaps[len(table) :].reset_index(drop=True)).to_dict("records"),
        "texts": table.drop(columns="text").to_dict("records"),
    }


class _HumanStyle:
    """Burrows's Delta and a style classifier, each fitted on human text when first used.

    That text is never held out: its 武侠 is training text, its general text is training text or
    unused. Both properties raise `DataError` if there is too little of it: `delta` needs 5 pools of
    武侠, `classifier` 20 chunks of each source.
    """

    def __init__(self, context: EvalContext) -> None:
        wuxia = context.human_texts("wuxia", TRAIN)
        self.texts = wuxia, context.human_texts("general", TRAIN, UNUSED)  # 武侠, general text

    @functools.cached_property
    def delta(self) -> BurrowsDelta:
        """The distance of texts from 武侠, as a fitted `BurrowsDelta`."""
        return BurrowsDelta(*self.texts)

    @functools.cached_property
    def classifier(self) -> "Pipeline":
        """The classifier of 武侠 against general text, fitted on at most 1,000 chunks of each."""
        wuxia, general = (_human_chunks(texts)[:1000] for texts in self.texts)
        return style_classifier(wuxia, general, top_characters(wuxia + general))


def _measures(human_style: _HumanStyle) -> list[tuple[Metric, Measure]]:
    """List the metrics of passages, each with the function that makes items of a writer's rows.

    The functions of the first two raise `DataError` if there is too little human text to fit
    `human_style`, the statistic of `burrows_delta` if a writer has under 2,000 characters in all.
    """

    def pooled_delta(items: pd.DataFrame, weights: Floats) -> Floats:
        return human_style.delta.delta(weights @ items.to_numpy())

    delta = Metric("burrows_delta", "mean |z|, lower is nearer", "wuxia", pooled_delta)
    strength = Metric("style_strength", "logit, function words only", "wuxia", MEAN)
    distinct = Metric("distinct_2", "distinct/all bigrams", "wuxia", MEAN)
    repeated = Metric("repetition", "share of repeated 4-grams", "wuxia", MEAN)
    copied = Metric("copied_length", "characters shared with training text", "training", MEAN)
    return [
        (delta, lambda rows: pd.DataFrame(human_style.delta.counts(rows["text"]))),
        (strength, lambda rows: _items(human_style.classifier.decision_function(rows["text"]))),
        (distinct, lambda rows: _items(*distinct_n(rows["text"], 2))),
        (repeated, lambda rows: _items(rows["text"].map(repetition))),
        (copied, lambda rows: _items(rows["copied"])),
    ]


def _row(metric: Metric, measure: Measure, table: pd.DataFrame, seed: int) -> Row:
    """Compare base and tuned by a metric; add the figures of the controls, `few_shot` and `human`.

    `table` has the texts of all writers; `measure` makes items of the rows of one writer. Returns
    the row of the scorecard. If the metric cannot be measured, the row has a `reason` and no
    control. A control with fewer texts than the base is left out.
    """
    n = int((table["writer"] == "base").sum())
    if n < FEWEST:
        return metric.row(n, reason=reason("passages", n, characters=CHARACTERS))
    try:
        items = {writer: measure(rows) for writer, rows in table.groupby("writer")}
        row = compare(metric, items["base"], items["tuned"], seed)
    except DataError as error:
        return metric.row(n, reason=str(error))
    for control in ("few_shot", "human"):
        if len(items.get(control, ())) == n:  # figures of fewer texts cannot be compared
            weights = np.ones((1, n))  # one row of weights: each text counts once
            row[control] = float(metric.statistic(items[control], weights)[0])
    return row


def _items(values: Any, counts: Any = 1.0) -> pd.DataFrame:
    """Make items for `MEAN`, a row a text, from each text's value and count, by default 1."""
    return pd.DataFrame({"value": np.asarray(values, np.float64), "count": counts})


def _cut(text: str) -> str:
    """Return the first 150 characters of a passage without white space, "" if it has fewer."""
    return next(iter(chunks(text, CHARACTERS)), "")


def _human_chunks(texts: Sequence[str]) -> list[str]:
    """Cut human texts into chunks of 150 characters, as long as a passage that is compared."""
    return [chunk for text in texts for chunk in chunks(text, CHARACTERS)]
