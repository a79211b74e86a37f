"""Whether a difference is more than chance: the paired bootstrap over documents."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

RESAMPLES = 10_000
FEWEST_DOCUMENTS = 5  # below that an interval over documents means nothing


@dataclass(frozen=True)
class Metric:
    """A figure to report: a ratio of sums over documents."""

    name: str
    unit: str
    numerator: str
    denominator: str


METRICS = (
    Metric("bits_per_char", "bits/character", "bits", "chars"),
    Metric("masked_loss", "nats/masked token", "nats", "asked"),
    Metric("masked_accuracy", "share of masked tokens", "right", "asked"),
)


def compare(base: pd.DataFrame, tuned: pd.DataFrame, metric: Metric, seed: int) -> dict[str, Any]:
    """Report a metric for both models with the 95 % interval of the difference.

    A paired bootstrap (Efron & Tibshirani 1993, percentile interval): the same documents are drawn
    for both, 10,000 times.
    """
    n = len(base)
    head = {"name": metric.name, "unit": metric.unit}
    if n < FEWEST_DOCUMENTS:
        empty = dict.fromkeys(("base", "tuned", "delta", "low", "high"))
        reason = f"{n} held-out documents, fewer than {FEWEST_DOCUMENTS}"
        return {**head, **empty, "n": n, "reason": reason}
    drawn = np.random.default_rng(seed).integers(0, n, (RESAMPLES, n))
    values = {}
    for side, table in (("base", base), ("tuned", tuned)):
        top = table[metric.numerator].to_numpy(np.float64)
        bottom = table[metric.denominator].to_numpy(np.float64)
        resampled = top[drawn].sum(1) / bottom[drawn].sum(1)
        values[side] = top.sum() / bottom.sum(), resampled
    low, high = np.percentile(values["tuned"][1] - values["base"][1], [2.5, 97.5])
    point = {side: float(value[0]) for side, value in values.items()}
    delta = point["tuned"] - point["base"]
    return {**head, **point, "delta": delta, "low": float(low), "high": float(high), "n": n}
