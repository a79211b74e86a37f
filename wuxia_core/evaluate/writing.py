"""Passages that a model writes: the same prompts and seeds for base and tuned."""

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from wuxia_core.errors import DataError
from wuxia_core.evaluate import style
from wuxia_core.evaluate.copying import overlap, passages
from wuxia_core.evaluate.statistics import (
    FEWEST,
    EvalContext,
    Floats,
    Metric,
    Row,
    compare,
    missing,
    ratio,
)
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
PIECES = 1000  # of each kind, at most, that a classifier is fitted on
MAPPED = 40  # pools of each, at most
MEAN = ratio("value", "texts")

Measure = Callable[[str], Any]  # writer → what the metric's statistic takes


def generate(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    prompts: Sequence[str],
    seed: int,
    tokens: int = TOKENS,
) -> list[str]:
    """Sample what follows each prompt, all in one batch: temperature 0.9, nucleus 0.95.

    Parameters
    ----------
    prompts : sequence of str
        Each stands behind the end-of-text token that starts a document.
    seed : int
        Of this batch; the same one gives the same passages on the same kind of machine.
    tokens : int
        Length of each passage.
    """
    import torch

    start = document_start_id(tokenizer)
    encoded = tokenizer(
        list(prompts), add_special_tokens=False, split_special_tokens=True
    ).input_ids
    longest = 1 + max(map(len, encoded))
    rows = [[start] * (longest - len(ids)) + ids for ids in encoded]  # filled up at the left
    seen = [[0] * (longest - 1 - len(ids)) + [1] * (1 + len(ids)) for ids in encoded]
    with torch.random.fork_rng(), torch.inference_mode():
        torch.manual_seed(seed)
        output = model.generate(
            torch.tensor(rows, device=model.device),
            attention_mask=torch.tensor(seen, device=model.device),
            do_sample=True, temperature=0.9, top_p=0.95, top_k=0, repetition_penalty=1.0,
            max_new_tokens=tokens, min_new_tokens=tokens, use_cache=True,
            pad_token_id=tokenizer.eos_token_id,
        )  # fmt: skip
    written: list[str] = tokenizer.batch_decode(output[:, longest:], skip_special_tokens=True)
    return written


def prompts(context: EvalContext) -> list[dict[str, Any]]:
    """Give ten written prompts and openings of held-out chapters, whose own text is `human`."""
    chapters = context.mixture.texts(context.documents("wuxia", VALIDATION, limit=OPENINGS))
    rows = [{"prompt": prompt, "human": ""} for prompt in WRITTEN]
    return rows + [{"prompt": t[:OPENING], "human": t[OPENING:]} for t in chapters]


def write(context: EvalContext) -> list[dict[str, Any]]:
    """Let base and tuned go on from the same prompts, and the base after an example of 武侠 too.

    Returns rows with `prompt`, `human`, `base`, `tuned` and `few_shot`.
    """
    chapter = next(iter(context.mixture.texts(context.documents("wuxia", TRAIN, limit=1))), "")
    example = chapter[len(chapter) // 2 :][:EXAMPLE]
    rows: list[dict[str, Any]] = []
    for chunk in context.within_budget("prompts written to", prompts(context), AT_ONCE, 0.25):
        asked, seed = [row["prompt"] for row in chunk], context.seed + len(rows)
        base, tuned = context.base_and_tuned(
            functools.partial(generate, context.model, context.tokenizer, asked, seed)
        )
        with context.model.disable_adapter():
            after = [f"{example}\n{prompt}" for prompt in asked]
            few_shot = generate(context.model, context.tokenizer, after, seed)
        said = zip(chunk, base, tuned, few_shot, strict=True)
        rows += [{**row, "base": b, "tuned": t, "few_shot": f} for row, b, t, f in said]
    return rows


def score_generations(context: EvalContext, written: list[dict[str, Any]]) -> dict[str, Any]:
    """Measure the passages, each cut to 150 characters.

    Returns
    -------
    `metrics`; `copied`, the longest runs that tuned passages copied, uncut; and what the plots
    draw: `texts`, a row a passage with its longest `copied` run and its `style` logit; `map`,
    pools of 2,000 characters by the two principal components of their z-scores; `classifier`, the
    share of people's pieces that it tells right without having seen their book, or null.
    """
    whole = [row for row in written if all(len(_cut(row[w])) == CHARACTERS for w in WRITERS)]
    texts = {writer: [_cut(row[writer]) for row in whole] for writer in WRITERS}
    held_out = _pieces(context.human_texts("wuxia", VALIDATION))["text"]
    count = min(len(whole), len(held_out))
    texts["human"] = held_out.iloc[np.linspace(0, len(held_out) - 1, count).astype(int)].tolist()
    owner = np.repeat(list(texts), [len(each) for each in texts.values()])
    cut = [text for each in texts.values() for text in each]
    uncut = [row["tuned"] for row in written]
    every = overlap([*cut, *uncut], context.mixture.training_texts)  # reads all of it: once
    shared = every[: len(cut)]
    copied = {writer: shared[owner == writer].reset_index(drop=True) for writer in texts}
    human = _Human(context)
    measures = [
        *_style(human, texts), _human_or_model(whole, texts), *_variety(texts), *_copying(copied),
    ]  # fmt: skip
    table = pd.DataFrame({"writer": owner, "copied": shared["length"], "style": None})
    if len(table):
        with contextlib.suppress(DataError):  # said in the row of style_strength
            table["style"] = human.classifier.logit(cut)
    return {
        "metrics": [_row(metric, measure, texts, context.seed) for metric, measure in measures],
        "copied": passages(every[len(cut) :].reset_index(drop=True)).to_dict("records"),
        "texts": table.to_dict("records"),
        "classifier": human.held_out_accuracy(),
        "map": _map(human, texts),
    }


class _Human:
    """People's writing, and what judges other texts by it; fitted when first asked for."""

    def __init__(self, context: EvalContext) -> None:
        target = context.human_texts("wuxia", TRAIN)
        other = context.human_texts("general", TRAIN, UNUSED)
        self.texts = {"wuxia": list(target["text"]), "general": list(other["text"])}
        kinds = [_pieces(human)[:PIECES] for human in (target, other)]
        self._pieces = pd.concat(kinds)
        self._target = np.arange(len(self._pieces)) < len(kinds[0])

    @functools.cached_property
    def delta(self) -> style.BurrowsDelta:
        """Raises `DataError` where there is too little."""
        return style.BurrowsDelta.fit(self.texts["wuxia"], self.texts["general"])

    @functools.cached_property
    def classifier(self) -> style.StyleClassifier:
        """Raises `DataError` where there is too little."""
        texts = self._pieces["text"].tolist()
        return style.StyleClassifier.fit(texts, self._target, style.commonest(texts))

    def held_out_accuracy(self) -> float | None:
        """Judge the pieces of each book by a classifier fitted on the others; None of too few."""
        texts, books = self._pieces["text"].tolist(), self._pieces["book"].tolist()
        try:
            logits = style.held_out_logits(texts, self._target, books, style.commonest(texts))
        except DataError:
            return None
        return float(((logits > 0) == self._target).mean())


def _map(human: _Human, texts: dict[str, list[str]]) -> list[dict[str, Any]]:
    """Project pools of everybody's text on the two directions in which people's differ most."""
    pools = [(who, pool) for who, each in (human.texts | texts).items()
             for pool in style.pieces("".join(each), style.POOL)[:MAPPED]]  # fmt: skip
    try:
        scores = human.delta.scores(*human.delta.counts([pool for _, pool in pools]))
    except DataError:  # said in the row of burrows_delta
        return []
    people = scores[[who in human.texts for who, _ in pools]]
    directions = np.linalg.svd(people - people.mean(0), full_matrices=False)[2][:2]
    places = (scores - people.mean(0)) @ directions.T
    return [{"who": who, "x": float(x), "y": float(y)}
            for (who, _), (x, y) in zip(pools, places, strict=True)]  # fmt: skip


def _row(metric: Metric, measure: Measure, texts: dict[str, list[str]], seed: int) -> Row:
    """Compare base and tuned; the controls' figures stand beside them."""
    n = len(texts["base"])
    if n < FEWEST:
        return missing(metric, n, f"{n} passages of {CHARACTERS} characters, fewer than {FEWEST}")
    try:
        row = compare(metric, measure("base"), measure("tuned"), n, seed)
    except DataError as error:
        return missing(metric, n, str(error))
    controls = ("few_shot", "human") if row["delta"] is not None else ()
    for control in controls:
        equal = len(texts[control]) == n  # a figure of fewer texts would be another one
        if equal and (items := measure(control)) is not None:
            row[control] = float(metric.statistic(items, np.ones((1, n)))[0])
    return row


def _style(human: _Human, texts: dict[str, list[str]]) -> Iterator[tuple[Metric, Measure]]:
    """Burrows's Delta to 武侠, the classifier's logit, and clichés."""

    def cliche_rate(writer: str) -> pd.DataFrame:
        found, characters = style.cliches(texts[writer])
        return pd.DataFrame({"value": 1000 * found, "texts": characters})

    def pooled(items: Any, weights: Floats) -> Floats:
        return human.delta.delta(weights @ items[0], weights @ items[1])

    yield (Metric("burrows_delta", "mean |z|, lower is nearer", "wuxia", pooled),
           lambda writer: human.delta.counts(texts[writer]))  # fmt: skip
    yield (Metric("style_strength", "logit, function words and the like only", "wuxia", MEAN),
           lambda writer: _values(human.classifier.logit(texts[writer])))  # fmt: skip
    yield Metric("cliches", "per 1,000 characters", "wuxia", MEAN), cliche_rate


def _human_or_model(
    written: list[dict[str, Any]], texts: dict[str, list[str]]
) -> tuple[Metric, Measure]:
    """How well one classifier tells passages from what stands in the book behind the prompts."""
    prompts = [row["prompt"] for row in written]
    human = [(_cut(row["human"]), row["prompt"]) for row in written]
    human = [(text, prompt) for text, prompt in human if len(text) == CHARACTERS]

    @functools.cache
    def logits() -> tuple[Floats, Floats, Floats]:
        people = [text for text, _ in human], [prompt for _, prompt in human]
        return style.human_or_model(people, (texts["base"], prompts), (texts["tuned"], prompts))

    def measure(writer: str) -> pd.DataFrame | None:
        if writer not in ("base", "tuned"):
            return None
        people, *models = logits()
        return _values(style.wins(people, models[writer == "tuned"]).mean(0))

    return Metric("human_or_model", "AUC, 0.5: no telling", "wuxia", MEAN), measure


def _variety(texts: dict[str, list[str]]) -> Iterator[tuple[Metric, Measure]]:
    """How varied the passages are, together and each in itself."""

    def distinct(writer: str) -> pd.DataFrame:
        own, every = style.distinct_n(texts[writer], 2)
        return pd.DataFrame({"value": own, "texts": every})

    each: dict[tuple[str, str], Callable[[str], float]] = {
        ("repetition", "share of repeated 4-grams"): style.repetition,
        ("loops", "share of looping passages"): style.loops,
    }
    yield Metric("distinct_2", "distinct/all bigrams", "wuxia", MEAN), distinct
    yield (Metric("self_bleu", "0 to 100", "wuxia", MEAN),
           lambda writer: _values(style.self_bleu(texts[writer])))  # fmt: skip
    for (name, unit), judge in each.items():
        yield Metric(name, unit, "wuxia", MEAN), functools.partial(_each, judge, texts)


def _copying(copied: dict[str, pd.DataFrame]) -> Iterator[tuple[Metric, Measure]]:
    """Say how much was copied, from what `overlap` found."""
    lengths = {
        ("copied_length", "characters, longest run shared with training text"): "length",
        ("copied_passages", "share with a run of 30 characters or more"): "flagged",
    }
    for (name, unit), column in lengths.items():
        yield Metric(name, unit, "training", MEAN), functools.partial(_column, column, copied)
    columns = ["shared", "runs"]
    yield (Metric("containment", "share of 13-grams in training text", "training",
                  ratio(*columns)), lambda writer: copied[writer][columns])  # fmt: skip


def _each(judge: Callable[[str], float], texts: dict[str, list[str]], writer: str) -> pd.DataFrame:
    return _values([judge(text) for text in texts[writer]])


def _column(column: str, tables: dict[str, pd.DataFrame], writer: str) -> pd.DataFrame:
    return _values(tables[writer][column])


def _values(values: Any) -> pd.DataFrame:
    return pd.DataFrame({"value": np.asarray(values, np.float64), "texts": 1.0})


def _cut(text: str) -> str:
    return style.bare(text)[:CHARACTERS]


def _pieces(human: pd.DataFrame) -> pd.DataFrame:
    """Cut human documents into pieces as long as a passage: `book` and `text`."""
    rows = [
        (book, piece)
        for book, text in zip(human["book"], human["text"], strict=True)
        for piece in style.pieces(text, CHARACTERS)
    ]
    return pd.DataFrame(rows, columns=["book", "text"])
