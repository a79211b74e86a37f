"""Left-to-right prediction of held-out text, and what of the training text was memorised."""

from functools import partial

import pandas as pd

from wuxia_core.evaluate.scoring import document_bits
from wuxia_core.evaluate.statistics import Metric, Row, between, compare, ratio
from wuxia_core.evaluate.subject import Subject
from wuxia_core.mixing.store import TRAIN, VALIDATION

SOURCES = ("wuxia", "general")
AT_ONCE = 8  # documents


def prediction(subject: Subject) -> list[Row]:
    """Bits per character of held-out documents by source, and the memorisation of training ones.

    Whether general text was kept within `evaluation.general_margin` stands beside its row as
    `verdict`. Memorisation is the difference of differences: bits per character on training
    documents less those on held-out ones, tuned less base.
    """
    rows, scores = [], {}
    for source in SOURCES:
        base, tuned = scores[source] = _bits(subject, subject.documents(source, VALIDATION), 0.12)
        metric = Metric("bits_per_char", "bits/character", source, ratio("bits", "chars"))
        rows.append(compare(metric, base, tuned, len(base), subject.seed))
    rows[-1] |= _kept(rows[-1], subject.config.evaluation.general_margin)
    trained = _bits(subject, subject.documents("wuxia", TRAIN), 0.12)
    base, tuned = (
        pd.concat([of_train.assign(trained=True), held_out.assign(trained=False)])
        for of_train, held_out in zip(trained, scores["wuxia"], strict=True)
    )
    statistic = between("trained", "bits", "chars")
    metric = Metric("memorisation", "bits/character, train − held out", "wuxia", statistic)
    return [*rows, compare(metric, base, tuned, len(base), subject.seed)]


def _kept(row: Row, margin: float) -> Row:
    """Say whether general text costs no more than the margin, in bits per character."""
    if row["delta"] is None:
        return {"verdict": "not measured", "margin": margin}
    verdict = "kept" if row["high"] < margin else "worse" if row["low"] > margin else "not shown"
    return {"verdict": verdict, "margin": margin}


def _bits(
    subject: Subject, documents: list[int], share: float
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Score documents with base and tuned: `bits` and `chars`, a row a document."""
    none = pd.DataFrame(columns=["bits", "chars"], dtype=float)
    parts = []
    for chosen in subject.in_time("documents scored", documents, AT_ONCE, share):
        score = partial(
            document_bits, subject.model, subject.tokenizer, subject.mixture.texts(chosen),
            subject.config.data.max_length, subject.batch_size,
        )  # fmt: skip
        parts.append(subject.both(score))
    base, tuned = zip(*parts, strict=True) if parts else ([none], [none])
    return pd.concat(base), pd.concat(tuned)
