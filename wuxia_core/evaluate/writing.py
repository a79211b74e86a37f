"""Passages that a model writes, and what they are like: the same prompts and seeds for both."""

import functools
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from wuxia_core.errors import DataError
from wuxia_core.evaluate import style
from wuxia_core.evaluate.context import EvalContext
from wuxia_core.evaluate.copying import longest_runs, overlap
from wuxia_core.evaluate.statistics import FEWEST, Floats, Metric, Row, compare, missing, ratio
from wuxia_core.mixing import TRAIN, UNUSED, VALIDATION
from wuxia_core.write import Sampling, continued, encode_prompt

if TYPE_CHECKING:
    from sklearn.pipeline import Pipeline
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


# Beside the openings of held-out chapters; written for this, in no book.
WRITTEN = (
    "剑光一闪",
    "夜雨打在客栈的瓦上，门忽然开了。",
    "那老僧合十道：",
    "渡口只剩下最后一条船，船家却不肯开。",
    "她把那封信凑到灯前，看了又看，",
    "镖车行到黑松林外，前头的趟子手忽然勒住了马。",
    "“你师父没有教过你么？”",
    "擂台下鸦雀无声，",
    "山路尽头是一座破庙，庙里有火光。",
    "三更鼓响，墙头上翻进来一个人。",
)
WRITERS = ("base", "tuned", "few_shot")
AT_ONCE = 16  # passages
OPENING = 40  # characters of a chapter that serve as its prompt
CHARACTERS = 150  # of each passage that are compared, without white space: all of one length
MEAN = ratio("value", "count")

# Makes of a writer's rows what the metric's statistic takes.
Measure = Callable[[pd.DataFrame], pd.DataFrame]


def generate(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    prompts: Sequence[str],
    seed: int,
    tokens: int = 200,
) -> list[str]:
    """Sample what follows each prompt, all in one batch: temperature 0.9, nucleus 0.95.

    Each passage has `tokens` tokens: the end of text does not come before. The same `seed` gives
    the same passages on the same kind of machine.
    """
    import torch

    rows = [encode_prompt(tokenizer, prompt, chat=False) for prompt in prompts]
    sampling = Sampling(tokens).settings() | {"min_new_tokens": tokens}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return continued(model, tokenizer, rows, sampling)


def prompts(context: EvalContext) -> list[dict[str, Any]]:
    """Give ten prompts of ours and openings of held-out chapters, whose own text is `human`."""
    chapters = context.mixture.texts(context.documents("wuxia", VALIDATION, limit=30))
    rows = [{"prompt": prompt, "human": ""} for prompt in WRITTEN]
    return rows + [{"prompt": t[:OPENING], "human": t[OPENING:]} for t in chapters]


def write_passages(context: EvalContext) -> list[dict[str, Any]]:
    """Let base and tuned go on from the same prompts, and the base after an example of 武侠 too.

    Returns rows with `prompt`, `human`, `base`, `tuned` and `few_shot`.
    """
    chapter = next(iter(context.mixture.texts(context.documents("wuxia", TRAIN, limit=1))), "")
    example = chapter[len(chapter) // 2 :][:60]
    write = functools.partial(generate, context.model, context.tokenizer)
    rows: list[dict[str, Any]] = []
    for chunk in context.within_budget("prompts written to", prompts(context), AT_ONCE, 0.25):
        texts, seed = [row["prompt"] for row in chunk], context.seed + len(rows)
        base, tuned = context.base_and_tuned(functools.partial(write, texts, seed))
        with context.model.disable_adapter():
            few_shot = write([f"{example}\n{prompt}" for prompt in texts], seed)
        table = pd.DataFrame(chunk).assign(base=base, tuned=tuned, few_shot=few_shot)
        rows += table.to_dict("records")
    return rows


def score_generations(context: EvalContext, written: list[dict[str, Any]]) -> dict[str, Any]:
    """Measure the passages, each cut to 150 characters.

    Returns
    -------
    `metrics`; `copied`, the longest runs that tuned passages copied, uncut; `texts`, a row a
    passage: its `writer`, `number` (of the passage in `written`; of people's, their own), longest
    `copied` run and `style` logit; `classifier`, the share of people's chunks that it tells right
    without having seen their book, or None.
    """
    whole = [n for n, row in enumerate(written) if all(_cut(row[w]) for w in WRITERS)]
    rows = [(writer, n, _cut(written[n][writer])) for writer in WRITERS for n in whole]
    held_out = _chunks(context.human_texts("wuxia", VALIDATION))["text"]
    places = np.linspace(0, len(held_out) - 1, min(len(whole), len(held_out))).astype(int)
    rows += [("human", n, text) for n, text in enumerate(held_out.iloc[places])]
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
        "classifier": people.held_out_accuracy(),
    }


class _People:
    """People's writing, and what judges other texts by it; fitted when first needed.

    `delta` and `classifier` raise `DataError` where there is too little to fit them on.
    """

    def __init__(self, context: EvalContext) -> None:
        wuxia = context.human_texts("wuxia", TRAIN)
        self.human = wuxia, context.human_texts("general", TRAIN, UNUSED)
        kinds = [_chunks(texts)[:1000] for texts in self.human]
        self.chunks = pd.concat(kinds)
        self.seen = self.chunks["text"].tolist(), np.arange(len(self.chunks)) < len(kinds[0])
        self.kept = style.top_characters(self.seen[0])

    @functools.cached_property
    def delta(self) -> style.BurrowsDelta:
        return style.BurrowsDelta.fit(*(texts["text"] for texts in self.human))

    @functools.cached_property
    def classifier(self) -> "Pipeline":
        return style.style_classifier(*self.seen, self.kept)

    def held_out_accuracy(self) -> float | None:
        """Judge the chunks of each book by a classifier fitted on the others; None of too few."""
        with suppress(DataError):
            logits = style.held_out_logits(*self.seen, self.chunks["book"].tolist(), self.kept)
            return float(((logits > 0) == self.seen[1]).mean())
        return None


def _measures(people: _People) -> list[tuple[Metric, Measure]]:
    """List the metrics of passages, each with what makes a writer's items of its rows."""

    def pooled(items: pd.DataFrame, weights: Floats) -> Floats:
        sums = weights @ items.to_numpy()  # (B, V + 1), the last column counts all characters
        return people.delta.delta(sums[:, :-1], sums[:, -1])

    delta = Metric("burrows_delta", "mean |z|, lower is nearer", "wuxia", pooled)
    strength = Metric("style_strength", "logit, function words only", "wuxia", MEAN)
    distinct = Metric("distinct_2", "distinct/all bigrams", "wuxia", MEAN)
    repeated = Metric("repetition", "share of repeated 4-grams", "wuxia", MEAN)
    copied = Metric("copied_length", "characters shared with training text", "training", MEAN)
    return [
        (delta, lambda rows: pd.DataFrame(np.column_stack(people.delta.counts(rows["text"])))),
        (strength, lambda rows: _values(people.classifier.decision_function(rows["text"]))),
        (distinct, lambda rows: _values(*style.distinct_n(rows["text"], 2))),
        (repeated, lambda rows: _values(rows["text"].map(style.repetition))),
        (copied, lambda rows: _values(rows["copied"])),
    ]


def _row(metric: Metric, measure: Measure, table: pd.DataFrame, seed: int) -> Row:
    """Compare base and tuned; the controls' figures stand beside them."""
    texts = dict(list(table.groupby("writer")))
    n = len(texts.get("base", ()))
    if n < FEWEST:
        return missing(metric, n, f"{n} passages of {CHARACTERS} characters, fewer than {FEWEST}")
    try:
        row = compare(metric, measure(texts["base"]), measure(texts["tuned"]), seed)
    except DataError as error:
        return missing(metric, n, str(error))
    for control in ("few_shot", "human") if row["delta"] is not None else ():
        if len(texts.get(control, ())) == n:  # a figure of fewer texts would be another one
            row[control] = float(metric.statistic(measure(texts[control]), np.ones((1, n)))[0])
    return row


def _values(values: Any, counts: Any = 1.0) -> pd.DataFrame:
    """Make items for a mean: `value` and `count`, a row a text."""
    return pd.DataFrame({"value": np.asarray(values, np.float64), "count": counts})


def _cut(text: str) -> str:
    """Cut to 150 characters; a shorter passage gives nothing."""
    return next(iter(style.chunks(text, CHARACTERS)), "")


def _chunks(human: pd.DataFrame) -> pd.DataFrame:
    """Cut human documents into chunks as long as a passage: `book` and `text`."""
    cut = human.assign(text=[style.chunks(text, CHARACTERS) for text in human["text"]])
    return cut.explode("text").dropna(subset="text")
