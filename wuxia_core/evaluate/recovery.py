"""Masked recovery: how many hidden tokens a model finds, by the kind of span and of word."""

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import pandas as pd

from wuxia_core.corpus.classes import CLASSES
from wuxia_core.errors import DataError
from wuxia_core.evaluate.statistics import Metric, Row, compare, ratio
from wuxia_core.evaluate.subject import Subject
from wuxia_core.evaluate.xray import xray
from wuxia_core.masking import SINGLE, SpanMasker
from wuxia_core.mixing import Mixture
from wuxia_core.mixing.store import TRAIN, VALIDATION

SPANS = (3, 4, 5)
AT_ONCE = 8  # documents
PIECES = 2000  # of training text at a time, and what stands between
Tokens = npt.NDArray[np.int64]


def recovery(subject: Subject) -> list[Row]:
    """Loss and accuracy at the masks of epoch 0 by source, and of 武侠 by stratum.

    A stratum is a single token, a span of 3, 4 or 5, a class of word, dialogue or narration. Spans
    also count whole. Beside the accuracies stand those of the commonest token (`unigram`) and of
    the commonest between the two true neighbours in the training text (`trigram`).
    """
    rows = []
    for source in ("wuxia", "general"):
        tokens = _tokens(subject, source)
        rows += [
            _row(subject, tokens, "masked_loss", "nats/masked token", source, "nats"),
            _row(subject, tokens, "masked_accuracy", "share of masked tokens", source, "right"),
        ]
        if source == "general" or tokens.empty:
            continue
        rows[-1] |= _baselines(subject.mixture, tokens)
        for name, chosen in _strata(tokens).items():
            rows.append(_row(subject, chosen, f"masked_accuracy, {name}", "share", source, "right"))
            rows[-1] |= {side: float(chosen[side].mean()) for side in ("unigram", "trigram")}
        for length in SPANS:
            spans = tokens[tokens["length"] == length].groupby(["document", "block"])
            whole = spans.agg(base_right=("base_right", "min"), tuned_right=("tuned_right", "min"))
            name = f"whole_spans, span of {length}"
            rows.append(_row(subject, whole.reset_index(), name, "share", source, "right"))
    return rows


def _tokens(subject: Subject, source: str) -> pd.DataFrame:
    """X-ray the held-out documents of a source: a row a masked token."""
    parts = []
    documents = subject.documents(source, VALIDATION)
    for chosen in subject.in_time("documents masked", documents, AT_ONCE, 0.08):
        try:
            seen = xray(
                subject.model, subject.tokenizer, subject.mixture.texts(chosen),
                SpanMasker(seed=subject.seed), key=chosen[0] << 20,
                window=subject.config.data.max_length, batch_size=subject.batch_size,
            ).tokens  # fmt: skip
        except DataError:  # so short that no token is masked
            continue
        seen["document"] = np.array(chosen)[seen["text"]]
        seen["length"] = seen.groupby(["text", "block"])["block"].transform("size")
        for side in ("base", "tuned"):
            seen[f"{side}_nats"] = seen[f"{side}_bits"] * np.log(2)
        parts.append(seen.drop(columns=["base_guesses", "tuned_guesses"]))
    return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame({"document": []})


def _strata(tokens: pd.DataFrame) -> dict[str, pd.DataFrame]:
    spans = {f"span of {n}": (tokens["kind"] != SINGLE) & (tokens["length"] == n) for n in SPANS}
    kinds = {name: tokens["class"] == name for name in CLASSES}
    flags = {"single": tokens["kind"] == SINGLE, **spans, **kinds}
    flags |= {"dialogue": tokens["dialogue"], "narration": ~tokens["dialogue"]}
    return {name: tokens[flag] for name, flag in flags.items() if flag.any()}


def _row(
    subject: Subject, tokens: pd.DataFrame, name: str, unit: str, source: str, value: str
) -> Row:
    """Compare base and tuned by document."""
    metric = Metric(name, unit, source, ratio("sum", "size"))
    base, tuned = (
        tokens.groupby("document")[f"{side}_{value}"].agg(["sum", "size"])
        if len(tokens)
        else tokens
        for side in ("base", "tuned")
    )
    return compare(metric, base, tuned, len(base), subject.seed)


def _baselines(mixture: Mixture, tokens: pd.DataFrame) -> dict[str, float]:
    """Add whether the two baselines are right at each masked token, and give their accuracy."""
    size = int(mixture.tokens.max()) + 2
    asked = _pair(tokens["before"].to_numpy(np.int64), tokens["after"].to_numpy(np.int64), size)
    wanted, counts, found = np.unique(asked), np.zeros(size, np.int64), []
    for ids in _training_tokens(mixture):
        counts += np.bincount(ids[ids >= 0], minlength=size)
        pairs = _pair(ids[:-2], ids[2:], size)
        known = np.isin(pairs, wanted) & (ids[1:-1] >= 0)
        found.append(np.stack([pairs[known], ids[1:-1][known]], axis=1))
    between, times = np.unique(np.concatenate(found), axis=0, return_counts=True)
    guesses = dict(between[np.argsort(times, kind="stable")].tolist())  # the commonest comes last
    tokens["unigram"] = tokens["token"] == counts.argmax()
    tokens["trigram"] = tokens["token"] == [guesses.get(pair, -1) for pair in asked.tolist()]
    return {side: float(tokens[side].mean()) for side in ("unigram", "trigram")}


def _pair(before: Tokens, after: Tokens, size: int) -> Tokens:
    """Give each pair of neighbours a number of its own; -1 stands for none."""
    return (before + 1) * size + after + 1


def _training_tokens(mixture: Mixture) -> Iterator[Tokens]:
    """Read the novels that were trained on, about a million tokens at a time, -1 between pieces."""
    windows = mixture.windows
    train = windows[(windows["split"] == TRAIN) & (windows["source"] == "wuxia")]
    pieces: list[Tokens] = []
    for start, end in zip(train["start"], train["end"], strict=True):
        pieces += [mixture.tokens[start:end].astype(np.int64), np.array([-1])]
        if len(pieces) >= PIECES:
            yield np.concatenate(pieces)
            pieces.clear()
    yield np.concatenate([*pieces, np.array([-1, -1, -1])])
