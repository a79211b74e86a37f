"""What a model makes of a text, left to right: bits per character."""

import unicodedata
from collections.abc import Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import pandas as pd
from tqdm import tqdm

from wuxia_core import mixing
from wuxia_core.errors import DataError
from wuxia_core.evaluate.statistics import EvalContext, Metric, Row, between, compare, ratio
from wuxia_core.masking import IGNORE_INDEX, model_inputs, padded
from wuxia_core.mixing import TRAIN, VALIDATION
from wuxia_core.model import document_start_id

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


Floats = npt.NDArray[np.float64]
Scored = tuple[int, mixing.Tokens, mixing.Tokens]  # number of an item, tokens, labels
SOURCES = ("wuxia", "general")
AT_ONCE = 8  # documents


def bits_per_char(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    texts: Sequence[str],
    window: int = 256,
    batch_size: int = 8,
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
        Context, tokens; windows overlap by half.
    batch_size : int
        Windows a forward pass.

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
    table = document_bits(model, tokenizer, texts, window, batch_size)
    return float(table["bits"].sum() / table["chars"].sum())


def document_bits(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    texts: Sequence[str],
    window: int,
    batch_size: int,
) -> pd.DataFrame:
    """Score each text: columns `bits` and `chars`, a row a text."""
    normal = [unicodedata.normalize("NFC", text) for text in texts]
    start_id = document_start_id(tokenizer)
    encoded = tokenizer(normal, add_special_tokens=False, split_special_tokens=True).input_ids
    tokens = [np.array([start_id, *ids], np.int32) for ids in encoded]
    rows = [row for n, ids in enumerate(tokens) for row in _sliding(n, ids, window)]
    nats = sequence_nll(model, rows, len(normal), start_id, batch_size, "bits per character")
    bits = nats / np.log(2)
    return pd.DataFrame({"bits": bits, "chars": [len(text) for text in normal]})


def _sliding(number: int, tokens: mixing.Tokens, window: int) -> Iterator[Scored]:
    """Cut windows that overlap by half; `labels` asks for each token but the first exactly once."""
    scored = 1
    for start in range(0, max(1, len(tokens) - window // 2), window // 2):
        ids = tokens[start : start + window]
        labels = ids.copy()
        labels[: scored - start] = IGNORE_INDEX
        scored = start + len(ids)
        yield number, ids, labels


def sequence_nll(
    model: "PreTrainedModel",
    rows: Sequence[Scored],
    count: int,
    pad: int,
    batch_size: int,
    what: str,
) -> Floats:
    """Sum -log p of the asked tokens of each item, (count,).

    A row is an item's number, tokens and labels; an item may have several. `what` is for the
    progress bar.
    """
    starts = tqdm(range(0, len(rows), batch_size), desc=what, leave=False)
    nats = np.concatenate([_nats(model, rows[start : start + batch_size], pad) for start in starts])
    asked = [int((labels != IGNORE_INDEX).sum()) for _, _, labels in rows]
    owner = np.repeat([number for number, _, _ in rows], asked)
    return np.bincount(owner, nats, minlength=count).astype(np.float64)


def _nats(model: "PreTrainedModel", rows: Sequence[Scored], pad: int) -> Floats:
    """Score every asked token of a batch, in order: -log p, (N,)."""
    import torch
    import torch.nn.functional as F

    _, ids, labelled = zip(*rows, strict=True)
    batch = model_inputs(padded(ids, pad), padded(labelled, IGNORE_INDEX))
    batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
    labels = batch.pop("labels")
    with torch.inference_mode():
        logits = model(**batch, use_cache=False).logits.float()  # (N, V)
        nats = F.cross_entropy(logits, labels[labels != IGNORE_INDEX], reduction="none")
    return np.asarray(nats.double().cpu().numpy())


def prediction(context: EvalContext) -> list[Row]:
    """Bits per character of held-out documents by source, and the memorisation of training ones.

    Whether general text was kept within `evaluation.general_margin` stands beside its row as
    `verdict`. Memorisation is the difference of differences: bits per character on training
    documents less those on held-out ones, tuned less base.
    """
    rows, scores = [], {}
    for source in SOURCES:
        base, tuned = scores[source] = _bits(context, context.documents(source, VALIDATION), 0.12)
        metric = Metric("bits_per_char", "bits/character", source, ratio("bits", "chars"))
        rows.append(compare(metric, base, tuned, len(base), context.seed))
    rows[-1] |= _kept(rows[-1], context.config.evaluation.general_margin)
    trained = _bits(context, context.documents("wuxia", TRAIN), 0.12)
    base, tuned = (
        pd.concat([of_train.assign(trained=True), held_out.assign(trained=False)])
        for of_train, held_out in zip(trained, scores["wuxia"], strict=True)
    )
    statistic = between("trained", "bits", "chars")
    metric = Metric("memorisation", "bits/character, train − held out", "wuxia", statistic)
    return [*rows, compare(metric, base, tuned, len(base), context.seed)]


def _kept(row: Row, margin: float) -> Row:
    """Say whether general text costs no more than the margin, in bits per character."""
    if row["delta"] is None:
        return {"verdict": "not measured", "margin": margin}
    verdict = "kept" if row["high"] < margin else "worse" if row["low"] > margin else "not shown"
    return {"verdict": verdict, "margin": margin}


def _bits(
    context: EvalContext, documents: list[int], share: float
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Score documents with base and tuned: `bits` and `chars`, a row a document."""
    none = pd.DataFrame(columns=["bits", "chars"], dtype=float)
    parts = []
    for chosen in context.within_budget("documents scored", documents, AT_ONCE, share):
        score = partial(
            document_bits, context.model, context.tokenizer, context.mixture.texts(chosen),
            context.config.data.max_length, context.batch_size,
        )  # fmt: skip
        parts.append(context.base_and_tuned(score))
    base, tuned = zip(*parts, strict=True) if parts else ([none], [none])
    return pd.concat(base), pd.concat(tuned)
