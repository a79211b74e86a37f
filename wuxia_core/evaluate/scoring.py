"""Score fixed texts, left to right: bits per character, and multiple-choice questions.

Nothing is generated and no answer is parsed: a model's answer to a question is the option that it
finds likeliest for its length, so that base models can be asked too.
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


# A row for the model: the number of its item (a text, or an option of a question), its tokens (T,),
# and its labels (T,): the right token where one is to be scored, else `IGNORE_INDEX`.
Scored = tuple[int, Tokens, Tokens]
# For the N labels of a batch: the numbers of their items (N,), and as tensors the logits that
# predict them (N, V) and the labels themselves (N,).
Prediction = tuple[Ints, Any, Any]
QUESTIONS = Path(__file__).with_name("questions.jsonl")  # ours
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
    tokenizers compare. Each token is scored once; the model sees before it at least half a window
    of its text, or all of it that there is. An end-of-text token stands in front of each text.

    Parameters
    ----------
    model : PreTrainedModel
        In evaluation mode.
    texts : sequence of str
        At least one character in all. Special tokens in them are read as plain text.
    window : int
        Most tokens that the model sees at once, at least 2; windows overlap by half.
    tokens : int, optional
        Most tokens of a forward pass, which has one window at least; by default `window`.

    Returns
    -------
    Bits per character over all texts together.

    Raises
    ------
    DataError
        If there is no character.
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
    """Score each text as `bits_per_char` does, with the same parameters; `texts` are one or more.

    Returns a table, a row a text: the sum of its tokens' `bits`, and its length after NFC in
    `chars` (code points) and in `bytes` (of UTF-8). An empty text has 0 in each.
    """
    composed = [unicodedata.normalize("NFC", text) for text in texts]
    start_id = document_start_id(tokenizer)
    encoded = tokenizer(composed, add_special_tokens=False, split_special_tokens=True).input_ids
    documents = [np.array([start_id, *ids], np.int32) for ids in encoded]
    rows = [row for number, ids in enumerate(documents) for row in _sliding(number, ids, window)]
    nats = sequence_nll(model, rows, len(composed), tokens or window)
    columns = {"bits": nats / np.log(2), "chars": [len(text) for text in composed]}
    return pd.DataFrame(columns | {"bytes": [len(text.encode()) for text in composed]})


def _sliding(number: int, tokens: Tokens, window: int) -> Iterator[Scored]:
    """Cut the tokens of item `number` into windows that overlap by half; yield a row for each.

    Each token but the first, which nothing precedes, is a label in exactly one row: tokens 0 to 5
    with a window of 4 give the row 0 1 2 3 with the labels 1 2 3, then 2 3 4 5 with 4 5.
    """
    scored = 1  # the number of tokens, from the first on, that need no label any more
    for start in range(0, max(1, len(tokens) - window // 2), window // 2):
        ids = tokens[start : start + window]
        labels = ids.copy()
        labels[: scored - start] = IGNORE_INDEX
        scored = start + len(ids)
        yield number, ids, labels


def sequence_nll(
    model: "PreTrainedModel", rows: Sequence[Scored], count: int, tokens: int
) -> Floats:
    """Return for each item the sum of -log p of its labels, in nats: (count,).

    `count` is the number of items; `rows` name them by their numbers, from 0. An item may have
    several rows; one without a label gets 0. `tokens` is as in `predictions`.
    """
    import torch.nn.functional as F

    nats = np.zeros(count)
    for numbers, logits, targets in predictions(model, rows, tokens):
        losses = F.cross_entropy(logits, targets, reduction="none")
        nats += np.bincount(numbers, losses.double().cpu(), minlength=count)
        del logits  # or they would be held during the next forward pass
    return nats


def predictions(
    model: "PreTrainedModel", rows: Sequence[Scored], tokens: int
) -> Iterator[Prediction]:
    """Let `model` predict the labels of `rows`; yield one `Prediction` a batch of rows.

    A batch has at most `tokens` tokens with its padding, or a single row of more, and at most
    `LOGITS` logits, float32: a row with more labels is split. Rows without a label are left out.
    """
    import torch

    max_labels = LOGITS // model.config.vocab_size
    rows = list(_split(rows, max_labels))
    longest = max((len(ids) for _, ids, _ in rows), default=1)
    size = max(1, min(tokens, max_labels) // longest)  # rows of a batch
    for start in range(0, len(rows), size):
        numbers, ids, labels = zip(*rows[start : start + size], strict=True)
        batch = model_inputs(padded(ids, 0), padded(labels, IGNORE_INDEX))
        batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
        targets = batch.pop("labels")
        labelled = targets != IGNORE_INDEX  # (B, T)
        with torch.inference_mode():  # `logits_to_keep`, in the batch, keeps those of the N labels
            logits = model(**batch, use_cache=False).logits.float()  # (N, V)
        yield np.repeat(numbers, labelled.sum(1).cpu()), logits, targets[labelled]
        del logits  # or they would be held during the next forward pass


def _split(rows: Iterable[Scored], max_labels: int) -> Iterator[Scored]:
    """Yield several rows for a row with more than `max_labels` labels, none for one without any.

    A row that is yielded begins with the first token of the one it comes from, so that its labels
    keep their context, and ends with its own last label.
    """
    for number, ids, labels in rows:
        places = np.flatnonzero(labels != IGNORE_INDEX)
        for start in range(0, len(places), max_labels):
            own = places[start : start + max_labels]  # the places of this row's labels
            end = own[-1] + 1
            yield number, ids[:end], np.where(np.arange(end) < own[0], IGNORE_INDEX, labels[:end])


def score_bits(context: EvalContext) -> list[Row]:
    """Measure bits per character of 武侠 and of general text, and memorisation of 武侠: three rows.

    The first two are of held-out documents. If there are enough of these, they have `bits_per_byte`
    (of UTF-8) too, so that other projects can compare. The row of general text also has a `margin`,
    `evaluation.general_margin`, and a `verdict`: `kept` if the whole interval of the difference
    lies below the margin, `worse` if it lies above, `not shown` if the margin lies within it,
    `not measured` if there is none. Memorisation is, for either model, bits per character of
    training documents less those of held-out ones; `delta` is below 0 if tuning helped more on
    training text.
    """
    held_out = {source: _bits(context, source, VALIDATION) for source in ("wuxia", "general")}
    rows = []
    for source, (base, tuned) in held_out.items():
        metric = Metric("bits_per_char", "bits/character", source, ratio("bits", "chars"))
        row = compare(metric, base, tuned, context.seed)
        if row["delta"] is not None:
            sums = {"base": base.sum(), "tuned": tuned.sum()}
            row["bits_per_byte"] = {name: s["bits"] / s["bytes"] for name, s in sums.items()}
        rows.append(row)
    general, margin = rows[-1], context.config.evaluation.general_margin
    general |= {"verdict": "not measured", "margin": margin}
    if general["delta"] is not None:
        general["verdict"] = _verdict(kept=general["high"] < margin, worse=general["low"] > margin)
    # For the base, then for the tuned model: the tables of training and of held-out documents.
    pairs = zip(_bits(context, "wuxia", TRAIN), held_out["wuxia"], strict=True)
    base, tuned = map(pd.concat, pairs)
    statistic = group_difference("trained", "bits", "chars")
    metric = Metric("memorisation", "bits/character, train − held out", "wuxia", statistic)
    return [*rows, compare(metric, base, tuned, context.seed)]


def _verdict(kept: bool, worse: bool) -> str:
    """Return the verdict of a test: "kept" or "worse" if it shows that, else "not shown"."""
    if kept:
        return "kept"
    return "worse" if worse else "not shown"


def _bits(context: EvalContext, source: str, split: str) -> Tables:
    """Score documents of a source and a split by `document_bits`, with base and with tuned model.

    Both tables have a bool column `trained` too: whether the split is that of training.
    """
    window = context.config.data.max_length

    def score(numbers: Sequence[int]) -> pd.DataFrame:
        texts = context.mixture.texts(numbers)
        bits = document_bits(context.model, context.tokenizer, texts, window, context.pass_tokens)
        return bits.assign(trained=split == TRAIN)

    # 8 at a time, for at most 12 % of the evaluation's minutes
    chunks = context.within_budget("documents scored", context.documents(source, split), 8, 0.12)
    return context.measure_both(score, chunks)


def questions(path: Path = QUESTIONS) -> list[SimpleNamespace]:
    """Read a file of questions, by default our own, and compose its characters (NFC).

    The file has a JSON object on each line: an `id`, a `kind` (knowledge, reading, instruction or
    arithmetic), the `question` itself, four `options`, the `answer` (index of the right option,
    from 0) and the `reason` why it is right. These become attributes.
    """
    text = unicodedata.normalize("NFC", path.read_text(encoding="utf-8"))
    # `splitlines` would also cut at other signs, which may stand within a question.
    return [SimpleNamespace(**json.loads(line)) for line in text.rstrip("\n").split("\n")]


def score_questions(context: EvalContext) -> Row:
    """Put our questions to base and tuned; return the row that `questions_verdict` makes of it.

    They come in an order that the seed shuffles, so that those that time allows are a fair sample.
    """
    shuffled = sorted(questions(), key=lambda question: hash_key(context.seed, question.id))
    # 32 at a time, for at most 13 % of the evaluation's minutes
    chunks = context.within_budget("questions asked", shuffled, 32, 0.13)
    base, tuned = context.measure_both(functools.partial(answers, context), chunks)
    return questions_verdict(base, tuned, context.config.evaluation.wits_margin)


def answers(context: EvalContext, asked: Sequence[SimpleNamespace]) -> pd.DataFrame:
    r"""Ask the model which option of each question is the likeliest per character.

    `asked` are questions as `questions` gives them. An option's score is the sum of log p of its
    tokens behind `问题：…\n答案：`, over the number of its characters (code points after NFC), so
    that long options stand a chance: `acc_norm` of lm-evaluation-harness (Gao et al. 2021). An
    option is tokenized by itself, so that all four stand behind the same tokens of the prompt.

    Returns
    -------
    A row a question, in the order of `asked`: `margin`, the score of the right option less that of
    the best wrong one, in nats a character; and `right`, 1 if that is above 0, else 0.
    """
    start_id, tokenizer = document_start_id(context.tokenizer), context.tokenizer
    encode = functools.partial(tokenizer, add_special_tokens=False, split_special_tokens=True)
    prompts = encode([f"问题：{question.question}\n答案：" for question in asked]).input_ids
    options = [option for question in asked for option in question.options]
    rows = []
    for number, ids in enumerate(encode(options).input_ids):
        prompt = [start_id, *prompts[number // OPTIONS]]  # the one of the option's question
        labels = [IGNORE_INDEX] * len(prompt) + ids
        rows.append((number, np.array(prompt + ids), np.array(labels)))
    rows.sort(key=lambda row: len(row[1]))  # batches of rows of like length need little padding
    nats = sequence_nll(context.model, rows, len(options), context.pass_tokens)
    scores: Floats = -(nats / [len(option) for option in options]).reshape(-1, OPTIONS)
    is_right = np.arange(OPTIONS) == np.array([[question.answer] for question in asked])
    # The score of the right option less the best of the others, (questions,).
    margin = scores[is_right] - np.where(is_right, -np.inf, scores).max(axis=1)
    return pd.DataFrame({"right": (margin > 0).astype(int), "margin": margin})


def questions_verdict(base: pd.DataFrame, tuned: pd.DataFrame, margin: float) -> Row:
    """Test whether the tuned model answers as well as its base; return the row of the scorecard.

    Its `verdict` is `kept` if the 90 % interval of the difference in accuracy lies within ±margin,
    which tests either side at 5 % (TOST: Schuirmann 1987); `worse` if all of the interval lies
    below -margin; else `not shown`. It is `cannot tell`, with a `reason`, if the base is not above
    chance by two standard errors of guessing, sqrt(0.25 · 0.75 / n): a base that knows nothing can
    forget nothing. The upper bound is tested too: novels teach no school subjects, so an adapter
    that is far *better* points at a mistake. The interval is the score interval of paired shares
    (Tango 1998): with few changed answers a normal or bootstrap one is too short.

    Parameters
    ----------
    base, tuned : DataFrame
        The tables of `answers` for the same questions in the same order.
    margin : float
        The largest difference in accuracy that does not matter, set beforehand; 0.06 is 6 points.
    """
    base_share, tuned_share = (float(table["right"].mean()) for table in (base, tuned))
    low, high = _paired_interval(tuned["right"].to_numpy() - base["right"].to_numpy())
    n, chance = len(base), 1 / OPTIONS
    # "wits" is the share of questions that are answered right.
    row: Row = {"name": "wits", "unit": "share of questions, 90 % interval", "source": "questions"}
    row |= {"base": base_share, "tuned": tuned_share, "delta": tuned_share - base_share}
    row |= {"low": low, "high": high, "n": n, "margin": margin}
    guessing = chance + 2 * np.sqrt(chance * (1 - chance) / n)  # a share that guessing may reach
    if base_share <= guessing:
        text = reason("guessing", n, right=base_share, guessing=guessing)
        return row | {"verdict": "cannot tell", "reason": text}
    return row | {"verdict": _verdict(kept=-margin < low and high < margin, worse=high < -margin)}


def _paired_interval(changes: Floats) -> tuple[float, float]:
    """Return the 90 % interval of the mean of `changes`, a question each: low and high.

    A change is -1 (the right answer was lost), 0 or 1 (gained). The score interval (Tango 1998)
    goes from the lowest to the highest mean that a two-sided test at 10 % does not reject; those in
    a grid with steps of 0.0001 are tested.
    """
    gained, lost, n = int((changes > 0).sum()), int((changes < 0).sum()), len(changes)
    delta = np.linspace(-1, 1, 20_002)[1:-1]  # an even number, so without 0: z is 0 / 0 there
    # The likeliest share of lost answers for each delta: the larger root p of 2n p² + b p + c.
    b = (2 * n - gained + lost) * delta - gained - lost
    c = lost * delta * (delta - 1)
    lost_share = (np.sqrt(b**2 - 8 * n * c) - b) / (4 * n)
    z = (gained - lost - n * delta) / np.sqrt(n * (2 * lost_share + delta * (1 - delta)))
    accepted = delta[np.abs(z) <= Z90]
    return float(accepted[0]), float(accepted[-1])
