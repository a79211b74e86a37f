"""Passages that a model writes, and what they are like: the same prompts and seeds for both."""

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from wuxia_core.errors import DataError
from wuxia_core.evaluate import style
from wuxia_core.evaluate.context import EvalContext
from wuxia_core.evaluate.copying import longest_runs, overlap
from wuxia_core.evaluate.statistics import FEWEST, Floats, Metric, Row, compare, missing, ratio
from wuxia_core.mixing import TRAIN, UNUSED, VALIDATION
from wuxia_core.model import document_start_id

if TYPE_CHECKING:
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
OPENINGS = 30  # of held-out chapters
OPENING = 40  # characters of a chapter that serve as its prompt
EXAMPLE = 60  # characters of 武侠 that the base sees first, as a control
TOKENS = 200  # of each passage; the end of text may not come before
CHARACTERS = 150  # of each passage that are compared, without white space: all of one length
CHUNKS = 1000  # of each kind, at most, that a classifier is fitted on
MEAN = ratio("value", "count")
SAMPLING: dict[str, Any] = {"do_sample": True, "temperature": 0.9, "top_p": 0.95, "top_k": 0}
SAMPLING |= {"repetition_penalty": 1.0, "use_cache": True}  # some models set other ones

Measure = Callable[[str], pd.DataFrame]  # writer → what the metric's statistic takes


def generate(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    prompts: Sequence[str],
    seed: int,
    tokens: int = TOKENS,
) -> list[str]:
    """Sample what follows each prompt, all in one batch: temperature 0.9, nucleus 0.95.

    Each prompt stands behind the end-of-text token that starts a document, and each passage has
    `tokens` tokens. The same `seed` gives the same passages on the same kind of machine.
    """
    import torch

    start = document_start_id(tokenizer)
    encoded = tokenizer(list(prompts), add_special_tokens=False, split_special_tokens=True)
    rows = [[start, *ids] for ids in encoded.input_ids]
    longest = max(map(len, rows))
    padded = [[start] * (longest - len(ids)) + ids for ids in rows]  # (B, T), at the left
    seen = [[0] * (longest - len(ids)) + [1] * len(ids) for ids in rows]
    ids, mask = (torch.tensor(each, device=model.device) for each in (padded, seen))
    length = {"max_new_tokens": tokens, "min_new_tokens": tokens}
    end = tokenizer.eos_token_id
    with torch.random.fork_rng(), torch.inference_mode():
        torch.manual_seed(seed)
        output = model.generate(ids, attention_mask=mask, pad_token_id=end, **SAMPLING, **length)
    passages: list[str] = tokenizer.batch_decode(output[:, longest:], skip_special_tokens=True)
    return passages


def prompts(context: EvalContext) -> list[dict[str, Any]]:
    """Give ten prompts of ours and openings of held-out chapters, whose own text is `human`."""
    chapters = context.mixture.texts(context.documents("wuxia", VALIDATION, limit=OPENINGS))
    rows = [{"prompt": prompt, "human": ""} for prompt in WRITTEN]
    return rows + [{"prompt": t[:OPENING], "human": t[OPENING:]} for t in chapters]


def write_passages(context: EvalContext) -> list[dict[str, Any]]:
    """Let base and tuned go on from the same prompts, and the base after an example of 武侠 too.

    Returns rows with `prompt`, `human`, `base`, `tuned` and `few_shot`.
    """
    chapter = next(iter(context.mixture.texts(context.documents("wuxia", TRAIN, limit=1))), "")
    example = chapter[len(chapter) // 2 :][:EXAMPLE]
    write = functools.partial(generate, context.model, context.tokenizer)
    rows: list[dict[str, Any]] = []
    for chunk in context.within_budget("prompts written to", prompts(context), AT_ONCE, 0.25):
        texts, seed = [row["prompt"] for row in chunk], context.seed + len(rows)
        base, tuned = context.base_and_tuned(functools.partial(write, texts, seed))
        with context.model.disable_adapter():
            few_shot = write([f"{example}\n{prompt}" for prompt in texts], seed)
        passages = zip(chunk, base, tuned, few_shot, strict=True)
        rows += [{**row, "base": b, "tuned": t, "few_shot": f} for row, b, t, f in passages]
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
    texts = {writer: [_cut(written[n][writer]) for n in whole] for writer in WRITERS}
    held_out = _chunks(context.human_texts("wuxia", VALIDATION))["text"]
    count = min(len(whole), len(held_out))
    texts["human"] = held_out.iloc[np.linspace(0, len(held_out) - 1, count).astype(int)].tolist()
    cut = [text for each in texts.values() for text in each]
    uncut = [row["tuned"] for row in written]
    shared = overlap([*cut, *uncut], context.mixture.training_texts)  # reads all of it: once
    people = _People(context)
    numbers = {writer: whole for writer in WRITERS} | {"human": list(range(count))}
    places = [(writer, number) for writer in texts for number in numbers[writer]]
    table = pd.DataFrame(places, columns=["writer", "number"])
    table = table.assign(copied=shared["length"][: len(cut)], style=people.logits(cut))
    measures = _measures(people, texts, table)
    return {
        "metrics": [_row(metric, measure, texts, context.seed) for metric, measure in measures],
        "copied": longest_runs(shared[len(cut) :].reset_index(drop=True)).to_dict("records"),
        "texts": table.to_dict("records"),
        "classifier": people.held_out_accuracy(),
    }


class _People:
    """People's writing, and what judges other texts by it; fitted when first needed."""

    def __init__(self, context: EvalContext) -> None:
        self._wuxia = context.human_texts("wuxia", TRAIN)
        self._general = context.human_texts("general", TRAIN, UNUSED)
        kinds = [_chunks(texts)[:CHUNKS] for texts in (self._wuxia, self._general)]
        self._chunks = pd.concat(kinds)
        self._target = np.arange(len(self._chunks)) < len(kinds[0])

    @functools.cached_property
    def delta(self) -> style.BurrowsDelta:
        """Raises `DataError` where there is too little."""
        return style.BurrowsDelta.fit(list(self._wuxia["text"]), list(self._general["text"]))

    @functools.cached_property
    def classifier(self) -> style.StyleClassifier:
        """Raises `DataError` where there is too little."""
        texts = self._chunks["text"].tolist()
        return style.StyleClassifier.fit(texts, self._target, style.top_characters(texts))

    def logits(self, texts: list[str]) -> list[float] | None:
        """Style logit of each text; None where there is too little to fit a classifier on."""
        try:
            return self.classifier.logit(texts).tolist() if texts else None
        except DataError:  # said in the row of style_strength
            return None

    def held_out_accuracy(self) -> float | None:
        """Judge the chunks of each book by a classifier fitted on the others; None of too few."""
        texts, books = self._chunks["text"].tolist(), self._chunks["book"].tolist()
        try:
            kept = style.top_characters(texts)
            logits = style.held_out_logits(texts, self._target, books, kept)
        except DataError:
            return None
        return float(((logits > 0) == self._target).mean())


def _measures(
    people: _People, texts: dict[str, list[str]], table: pd.DataFrame
) -> list[tuple[Metric, Measure]]:
    """List the metrics of passages, each with what makes a writer's items for it."""

    def pooled(items: pd.DataFrame, weights: Floats) -> Floats:
        sums = weights @ items.to_numpy()  # (B, V + 1), the last column counts all characters
        return people.delta.delta(sums[:, :-1], sums[:, -1])

    delta = Metric("burrows_delta", "mean |z|, lower is nearer", "wuxia", pooled)
    strength = Metric("style_strength", "logit, function words only", "wuxia", MEAN)
    distinct = Metric("distinct_2", "distinct/all bigrams", "wuxia", MEAN)
    repeated = Metric("repetition", "share of repeated 4-grams", "wuxia", MEAN)
    copied = Metric("copied_length", "characters shared with training text", "training", MEAN)
    return [
        (delta, lambda who: pd.DataFrame(np.column_stack(people.delta.counts(texts[who])))),
        (strength, lambda who: _values(people.classifier.logit(texts[who]))),
        (distinct, lambda who: _values(*style.distinct_n(texts[who], 2))),
        (repeated, lambda who: _values([style.repetition(text) for text in texts[who]])),
        (copied, lambda who: _values(table.loc[table["writer"] == who, "copied"])),
    ]


def _row(metric: Metric, measure: Measure, texts: dict[str, list[str]], seed: int) -> Row:
    """Compare base and tuned; the controls' figures stand beside them."""
    n = len(texts["base"])
    if n < FEWEST:
        return missing(metric, n, f"{n} passages of {CHARACTERS} characters, fewer than {FEWEST}")
    try:
        row = compare(metric, measure("base"), measure("tuned"), seed)
    except DataError as error:
        return missing(metric, n, str(error))
    for control in ("few_shot", "human") if row["delta"] is not None else ():
        if len(texts[control]) == n:  # a figure of fewer texts would be another one
            row[control] = float(metric.statistic(measure(control), np.ones((1, n)))[0])
    return row


def _values(values: Any, counts: Any = 1.0) -> pd.DataFrame:
    """Make items for a mean: `value` and `count`, a row a text."""
    return pd.DataFrame({"value": np.asarray(values, np.float64), "count": counts})


def _cut(text: str) -> str:
    """Cut to 150 characters; a shorter passage gives nothing."""
    return next(iter(style.chunks(text, CHARACTERS)), "")


def _chunks(human: pd.DataFrame) -> pd.DataFrame:
    """Cut human documents into chunks as long as a passage: `book` and `text`."""
    rows = [
        (book, chunk)
        for book, text in zip(human["book"], human["text"], strict=True)
        for chunk in style.chunks(text, CHARACTERS)
    ]
    return pd.DataFrame(rows, columns=["book", "text"])
