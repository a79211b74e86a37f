"""Score fixed texts, left to right: bits per character, and multiple-choice questions.

Nothing is generated and no answer is parsed: a model's answer to a question is the option that it
finds likeliest, so that base models can be asked too.
"""

import functools
import json
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from wuxia_core.errors import DataError
from wuxia_core.evaluate.context import EvalContext, Tables
from wuxia_core.evaluate.statistics import Metric, Row, compare, group_difference, ratio, reason
from wuxia_core.masking import IGNORE_INDEX, Floats, Ints, Tokens, model_inputs, padded
from wuxia_core.mixing import TRAIN, VALIDATION, hash_key
from wuxia_core.model import LOGITS, document_start_id

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


# A row for the model: number of the item (a text, or an option of a question) that the row is of,
# tokens (T,), and labels (T,), which are `IGNORE_INDEX` where nothing is scored.
Scored = tuple[int, Tokens, Tokens]
# Of the N labelled tokens of a batch: item numbers (N,); as tensors, logits (N, V), tokens (N,).
Prediction = tuple[Ints, Any, Any]
QUESTIONS = Path(__file__).with_name("questions.jsonl")
OPTIONS = 4  # of each question
Z90 = 1.6449  # normal quantile of a two-sided 90 % interval: either side is a test at 5 %


def bits_per_char(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    texts: Sequence[str],
    window: int = 256,
    tokens: int | None = None,
) -> float:
    r"""Measure how well a model predicts texts, left to right: lower is better.

    :math:`-\sum_t \log_2 p(x_t \mid x_{<t}) / C` over Unicode code points C after NFC, so that
    tokenizers compare. Each token is scored once, with at least half a window before it where the
    text is that long; an end-of-text token stands in front of each text.

    Parameters
    ----------
    texts : sequence of str
        At least one character in all.
    window : int
        Length of the context in tokens; windows overlap by half.
    tokens : int, optional
        Most tokens of a forward pass; by default those of one window.

    Returns
    -------
    Bits per character over all texts together.

    Raises
    ------
    DataError
        Where there is no character.
    """
    if not any(texts):
        raise DataError("bits_per_char: the texts are empty")
    table = document_bits(model, tokenizer, texts, window, tokens)
    return float(table["bits"].sum() / table["chars"].sum())


def document_bits(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    texts: Sequence[str],
    window: int,
    tokens: int | None = None,
) -> pd.DataFrame:
    """Score each text as `bits_per_char` does, after NFC.

    Returns a row a text: `bits` of all its tokens, and its length in `chars` and (UTF-8) `bytes`.
    """
    composed = [unicodedata.normalize("NFC", text) for text in texts]
    start_id = document_start_id(tokenizer)
    encoded = tokenizer(composed, add_special_tokens=False, split_special_tokens=True).input_ids
    documents = [np.array([start_id, *ids], np.int32) for ids in encoded]
    rows = [row for n, ids in enumerate(documents) for row in _sliding(n, ids, window)]
    nats = sequence_nll(model, rows, len(composed), tokens or window)
    table = {"bits": nats / np.log(2), "chars": [len(text) for text in composed]}
    return pd.DataFrame(table | {"bytes": [len(text.encode()) for text in composed]})


def _sliding(number: int, tokens: Tokens, window: int) -> Iterator[Scored]:
    """Cut an item's tokens into windows that overlap by half, rows for `predictions`.

    Each token but the first, which nothing precedes, is a label in exactly one window.
    """
    scored = 1  # tokens that need no label any more
    for start in range(0, max(1, len(tokens) - window // 2), window // 2):
        ids = tokens[start : start + window]
        labels = ids.copy()
        labels[: scored - start] = IGNORE_INDEX
        scored = start + len(ids)
        yield number, ids, labels


def sequence_nll(
    model: "PreTrainedModel", rows: Sequence[Scored], count: int, tokens: int
) -> Floats:
    """Sum -log p (nats) of the labelled tokens of each of `count` items: (count,).

    An item may have several rows or none. `tokens` is the most of a forward pass.
    """
    import torch.nn.functional as F

    nats = np.zeros(count)
    for numbers, logits, targets in predictions(model, rows, tokens):
        losses = F.cross_entropy(logits, targets, reduction="none")
        nats += np.bincount(numbers, losses.double().cpu(), minlength=count)
    return nats


def predictions(
    model: "PreTrainedModel", rows: Sequence[Scored], tokens: int
) -> Iterator[Prediction]:
    """Let a model predict the labelled tokens of rows, a batch at a time; logits are float32.

    A batch has at most `tokens` tokens and `LOGITS` logits, but one row at least.
    """
    import torch

    max_labels = LOGITS // model.config.vocab_size
    rows = list(_split(rows, max_labels))
    size = max(1, min(tokens, max_labels) // max((len(ids) for _, ids, _ in rows), default=1))
    for start in range(0, len(rows), size):
        numbers, ids, labels = zip(*rows[start : start + size], strict=True)
        batch = model_inputs(padded(ids, 0), padded(labels, IGNORE_INDEX))
        batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
        targets = batch.pop("labels")
        labelled = targets != IGNORE_INDEX  # (B, T)
        with torch.inference_mode():
            logits = model(**batch, use_cache=False).logits.float()
        yield np.repeat(numbers, labelled.sum(1).cpu()), logits, targets[labelled]


def _split(rows: Iterable[Scored], max_labels: int) -> Iterator[Scored]:
    """Make several rows of each row that has more than `max_labels` labels.

    All begin with the first token, as the context, and end with their last label.
    """
    for number, ids, labels in rows:
        places = np.flatnonzero(labels != IGNORE_INDEX)
        for start in range(0, len(places), max_labels):
            first, last = places[start], places[start : start + max_labels][-1]
            part = np.where(np.arange(last + 1) < first, IGNORE_INDEX, labels[: last + 1])
            yield number, ids[: last + 1], part


def score_bits(context: EvalContext) -> list[Row]:
    """Measure bits per character of 武侠 and of general text, and memorisation, in three rows.

    The first two are of held-out documents. They have `bits_per_byte` (UTF-8) too, so that other
    projects can compare. The row of general text has a `verdict`, by its interval: `kept` where all
    of it lies below `evaluation.general_margin`, `worse` where all lies above, else `not shown`.
    Memorisation is a difference of differences: bits per character on training documents less those
    on held-out documents, tuned less base.
    """
    held_out = {source: _bits(context, source, VALIDATION) for source in ("wuxia", "general")}
    rows = []
    for source, (base, tuned) in held_out.items():
        metric = Metric("bits_per_char", "bits/character", source, ratio("bits", "chars"))
        rows.append(compare(metric, base, tuned, context.seed))
        if rows[-1]["delta"] is not None:
            sums = {"base": base.sum(), "tuned": tuned.sum()}
            rows[-1]["bits_per_byte"] = {name: s["bits"] / s["bytes"] for name, s in sums.items()}
    general, margin = rows[-1], context.config.evaluation.general_margin
    general |= {"verdict": "not measured", "margin": margin}
    if general["delta"] is not None:
        kept, worse = general["high"] < margin, general["low"] > margin
        general["verdict"] = "kept" if kept else "worse" if worse else "not shown"
    pairs = zip(_bits(context, "wuxia", TRAIN), held_out["wuxia"], strict=True)  # of base, of tuned
    base, tuned = map(pd.concat, pairs)
    statistic = group_difference("trained", "bits", "chars")
    metric = Metric("memorisation", "bits/character, train − held out", "wuxia", statistic)
    return [*rows, compare(metric, base, tuned, context.seed)]


def _bits(context: EvalContext, source: str, split: str) -> Tables:
    """Score documents by `document_bits` with base and tuned; add a bool column `trained`."""
    window = context.config.data.max_length

    def score(numbers: Sequence[int]) -> pd.DataFrame:
        texts = context.mixture.texts(numbers)
        bits = document_bits(context.model, context.tokenizer, texts, window, context.pass_tokens)
        return bits.assign(trained=split == TRAIN)

    chunks = context.within_budget("documents scored", context.documents(source, split), 8, 0.12)
    return context.measure_both(score, chunks)


def questions(path: Path = QUESTIONS) -> list[SimpleNamespace]:
    """Read a file of questions, by default our own, and compose its characters (NFC).

    Each question has an `id`, a `kind` (knowledge, reading, instruction or arithmetic), the
    `question` itself, four `options`, the `answer` (index of the right option, from 0) and the
    `reason` why it is right.
    """
    text = unicodedata.normalize("NFC", path.read_text(encoding="utf-8"))
    return [SimpleNamespace(**json.loads(line)) for line in text.rstrip("\n").split("\n")]


def score_questions(context: EvalContext) -> Row:
    """Put our questions to base and tuned; return the scorecard's row, by `questions_verdict`."""
    shuffled = sorted(questions(), key=lambda question: hash_key(context.seed, question.id))
    chunks = context.within_budget("questions asked", shuffled, 32, 0.13)
    base, tuned = context.measure_both(functools.partial(answers, context), chunks)
    return questions_verdict(base, tuned, context.config.evaluation.wits_margin)


def answers(context: EvalContext, questions: Sequence[SimpleNamespace]) -> pd.DataFrame:
    r"""Ask the model which option of each question is the likeliest, character for character.

    An option's score is the sum of log p of its tokens behind `问题：…\n答案：`, over the number of
    its characters (code points after NFC) so that long options stand a chance: `acc_norm` of
    lm-evaluation-harness (Gao et al. 2021). An option is tokenized by itself, so that all four
    stand behind the same tokens of the prompt.

    Returns
    -------
    A row a question, in their order: `right` (0 or 1), and `margin`, nats a character by which the
    right option beats the best wrong option: above 0 where `right` is 1.
    """
    start_id, tokenizer = document_start_id(context.tokenizer), context.tokenizer
    encode = functools.partial(tokenizer, add_special_tokens=False, split_special_tokens=True)
    prompts = encode([f"问题：{question.question}\n答案：" for question in questions]).input_ids
    options = [option for question in questions for option in question.options]
    rows = []
    for number, option in enumerate(encode(options).input_ids):
        prompt = [start_id, *prompts[number // OPTIONS]]
        labels = [IGNORE_INDEX] * len(prompt) + option
        rows.append((number, np.array(prompt + option), np.array(labels)))
    rows.sort(key=lambda row: len(row[1]))  # little padding
    nats = sequence_nll(context.model, rows, len(options), context.pass_tokens)
    scores: Floats = -(nats / [len(option) for option in options]).reshape(-1, OPTIONS)
    right = np.arange(OPTIONS) == np.array([[question.answer] for question in questions])
    margin = scores[right] - np.where(right, -np.inf, scores).max(axis=1)
    return pd.DataFrame({"right": (margin > 0).astype(int), "margin": margin})


def questions_verdict(base: pd.DataFrame, tuned: pd.DataFrame, margin: float) -> Row:
    """Test whether the tuned model answers as well as its base; return the row of the scorecard.

    Its `verdict` is `kept` where the 90 % interval of the difference in accuracy lies inside
    ±margin, which tests either side at 5 % (TOST: Schuirmann 1987); `worse` where all of the
    interval lies below -margin; else `not shown`. It is `cannot tell` where the base is not above
    chance by two standard errors of guessing, sqrt(0.25 · 0.75 / n), since a base that knows
    nothing can forget nothing. The upper bound is tested too: novels teach no school subjects, so
    an adapter that is far *better* points at a mistake. The interval is the score interval of
    paired shares (Tango 1998): with few changed answers a normal or bootstrap one is too short.

    Parameters
    ----------
    base, tuned : DataFrame
        The tables of `answers` for the same questions in the same order.
    margin : float
        The difference in accuracy that does not matter, set beforehand; 0.06 is 6 points.
    """
    n, before, after = len(base), float(base["right"].mean()), float(tuned["right"].mean())
    low, high = _paired_interval(tuned["right"].to_numpy() - base["right"].to_numpy())
    # "wits" is the share of questions that are answered right.
    row: Row = {"name": "wits", "unit": "share of questions, 90 % interval", "source": "questions"}
    row |= {"base": before, "tuned": after, "delta": after - before, "low": low, "high": high}
    row |= {"n": n, "margin": margin}
    chance = 1 / OPTIONS
    guessing = chance + 2 * np.sqrt(chance * (1 - chance) / n)
    if before <= guessing:
        text = reason("guessing", n, right=before, guessing=guessing)
        return row | {"verdict": "cannot tell", "reason": text}
    kept, worse = -margin < low and high < margin, high < -margin
    return row | {"verdict": "kept" if kept else "worse" if worse else "not shown"}


def _paired_interval(change: Floats) -> tuple[float, float]:
    """Bound the mean change of answers, each -1 (lost), 0 or 1 (gained): low and high at 90 %.

    The score interval (Tango 1998): of a grid of differences in steps of 0.0001, all that a
    two-sided test at 10 % does not reject.
    """
    gained, lost, n = int((change > 0).sum()), int((change < 0).sum()), len(change)
    delta = np.linspace(-1, 1, 20_002)[1:-1]  # an even number, so without 0: z is 0 / 0 there
    # The likeliest share of lost answers under each delta: the root of 2n p² + b p + c.
    b = (2 * n - gained + lost) * delta - gained - lost
    c = lost * delta * (delta - 1)
    lost_share = (np.sqrt(b**2 - 8 * n * c) - b) / (4 * n)
    z = (gained - lost - n * delta) / np.sqrt(n * (2 * lost_share + delta * (1 - delta)))
    accepted = delta[np.abs(z) <= Z90]
    return float(accepted[0]), float(accepted[-1])
