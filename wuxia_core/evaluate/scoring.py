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
QUESTIONS = Path(__file__).with_name("questions.jsonl")  # our own questions
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
    tokenizers compare. Each token is scored once; before it the model sees at least half a window
    of the same text, or as much of the text as there is. An end-of-text token stands in front of
    each text.

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
    """Score each of one or more `texts` as `bits_per_char` does, with the same parameters.

    Returns a table with a row for each text: `bits`, the sum over its tokens; `chars`, its code
    points after NFC; `bytes`, its bytes of UTF-8 after NFC. An empty text has 0 in each.
    """
    composed = [unicodedata.normalize("NFC", text) for text in texts]
    start_id = document_start_id(tokenizer)
    encoded = tokenizer(composed, add_special_tokens=False, split_special_tokens=True).input_ids
    documents = [np.array([start_id, *ids], np.int32) for ids in encoded]  # token ids
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

    `count` is the number of items; each of `rows` begins with the number of its item, from 0 on.
    The rows of one item are added up; an item without a label gets 0. `tokens` is the most tokens
    of a forward pass, as in `predictions`.
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

    A batch has at most `tokens` tokens, padding included, or a single longer row. It has at most
    `LOGITS` logits in float32: a row whose labels take more than that is split. Rows without a
    label are left out.
    """
    import torch

    max_labels = LOGITS // model.config.vocab_size  # of a batch: each label takes V logits
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
    """Split each row with more than `max_labels` labels; leave out rows without any label.

    A row that is yielded begins with the first token of the row that it comes from, so that its
    labels keep their context, and ends with the last of its own labels. With labels at 1, 2 and 3
    and a `max_labels` of 2 there are two rows: tokens 0 to 2 with the labels at 1 and 2, and tokens
    0 to 3 with the label at 3.
    """
    for number, ids, labels in rows:
        places = np.flatnonzero(labels != IGNORE_INDEX)
        for start in range(0, len(places), max_labels):
            own = places[start : start + max_labels]  # the places of this row's labels
            end = own[-1] + 1
            yield number, ids[:end], np.where(np.arange(end) < own[0], IGNORE_INDEX, labels[:end])


def score_bits(context: EvalContext) -> list[Row]:
    """Measure bits per character of 武侠 and of general text, and memorisation of 武侠: three rows.

    The first two rows are measured on held-out documents. If these are enough for figures, a row
    has `bits_per_byte` (of UTF-8) too, so that other projects can compare. The row of general text
    also has a `margin`, which is `evaluation.general_margin`, and a `verdict`: `kept` if the whole
    interval of the difference lies below the margin, `worse` if it lies above, `not shown` if the
    margin lies within it, `not measured` if there is no interval. Memorisation is, for either
    model, bits per character of training documents less those of held-out ones; its `delta` is
    below 0 if tuning helped more on training text.
    """
    held_out = {source: _bits(context, source, VALIDATION) for source in ("wuxia", "general")}
    rows = []
    for source, (base, tuned) in held_out.items():
        metric = Metric("bits_per_char", "bits/character", source, ratio("bits", "chars"))
        row = compare(metric, base, tuned, context.seed)
        if row["delta"] is not None:
            sums = {"base": base.sum(), "tuned": tuned.sum()}  # over the documents
            row["bits_per_byte"] = {name: s["bits"] / s["bytes"] for name, s in sums.items()}
        rows.append(row)
    general, margin = rows[-1], context.config.evaluation.general_margin  # bits a character
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
    """Return "kept" or "worse" if a test shows one of them, else "not shown"."""
    if kept:
        return "kept"
    return "worse" if worse else "not shown"


def _bits(context: EvalContext, source: str, split: str) -> Tables:
    """Score documents of a source and a split by `document_bits`, with base and with tuned model.

    Both tables also have the bool column `trained`: whether the split is that of training.
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

    Each line of the file is a JSON object: an `id`, a `kind` (knowledge, reading, instruction or
    arithmetic), the `question` itself, four `options`, the `answer` (index of the right option,
    from 0) and the `reason` why it is right. Each becomes a namespace with these keys as
    attributes.
    """
    text = unicodedata.normalize("NFC", path.read_text(encoding="utf-8"))
    # `splitlines` would also cut at other signs, which may stand within a question.
    return [SimpleNamespace(**json.loads(line)) for line in text.rstrip("\n").split("\n")]


def score_questions(context: EvalContext) -> Row:
    """Put our questions to base and tuned; return the row that `questions_verdict` makes of it.

    The questions come in an order that the seed shuffles: if time runs out, those that were asked
    are a fair sample.
    """
    shuffled = sorted(questions(), key=lambda question: hash_key(context.seed, question.id))
    # 32 at a time, for at most 13 % of the evaluation's minutes
    chunks = context.within_budget("questions asked", shuffled, 32, 0.13)
    base, tuned = context.measure_both(functools.partial(answers, context), chunks)
    return questions_verdict(base, tuned, context.config.evaluation.wits_margin)


def answers(context: EvalContext, asked: Sequence[SimpleNamespace]) -> pd.DataFrame:
    r"""Ask the model which option of each question is the likeliest per character.

    `asked` are questions as `questions` gives them. An option's score is the sum of log p of its
    tokens behind `问题：…\n答案：`, divided by the number of its characters (code points after
    NFC), so that long options stand a chance: `acc_norm` of lm-evaluation-harness (Gao et al.
    2021). Each option is tokenized by itself, so that all four stand behind the same tokens of the
    prompt.

    Returns
    -------
    A table with a row for each question, in the order of `asked`: `margin`, the score of the right
    option less that of the best wrong one, in nats a character; and `right`, 1 if `margin` is above
    0, else 0.
    """
    start_id, tokenizer = document_start_id(context.tokenizer), context.tokenizer
    encode = functools.partial(tokenizer, add_special_tokens=False, split_special_tokens=True)
    prompts = encode([f"问题：{question.question}\n答案：" for question in asked]).input_ids
    options = [option for question in asked for option in question.options]  # four a question
    rows = []
    for number, ids in enumerate(encode(options).input_ids):
        prompt = [start_id, *prompts[number // OPTIONS]]  # the one of the option's question
        labels = [IGNORE_INDEX] * len(prompt) + ids
        rows.append((number, np.array(prompt + ids), np.array(labels)))
    rows.sort(key=lambda row: len(row[1]))  # batches of rows of like length need little padding
    nats = sequence_nll(context.model, rows, len(options), context.pass_tokens)
    scores: Floats = -(nats / [len(option) for option in options]).reshape(-1, OPTIONS)
    is_right = np.arange(OPTIONS) == np.array([[question.answer] for question in asked])
    # The score of the right option less the best score of the others, (questions,).
    margin = scores[is_right] - np.where(is_right, -np.inf, scores).max(axis=1)
    return pd.DataFrame({"right": (margin > 0).astype(int), "margin": margin})


def questions_verdict(base: pd.DataFrame, tuned: pd.DataFrame, margin: float) -> Row:
    """Test whether the tuned model answers as well as its base; return the row of the scorecard.

    The `verdict` is `kept` if the 90 % interval of the difference in accuracy lies within ±margin,
    which tests either side at 5 % (TOST: Schuirmann 1987); `worse` if all of the interval lies
    below -margin; else `not shown`. But it is `cannot tell`, with a `reason`, if the base is not
    above chance by two standard errors of guessing, sqrt(0.25 · 0.75 / n): a base that knows
    nothing can forget nothing. The upper bound is tested too: novels teach no school subjects, so
    an adapter that is far *better* points at a mistake. The interval is the score interval of
    paired shares (Tango 1998): with few changed answers a normal or bootstrap interval is too
    short.

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
    """Return the 90 % interval of the mean of `changes`, one for each question: low and high.

    A change is -1 (the right answer was lost), 0 or 1 (gained). The score interval (Tango 1998)
    goes from the lowest to the highest mean that a two-sided test at 10 % does not reject. All
    means in a grid with steps of 0.0001 are tested.
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
