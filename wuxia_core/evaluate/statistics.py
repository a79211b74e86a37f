"""Whether a difference is more than chance: the paired bootstrap over documents or prompts."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from wuxia_core.errors import DataError

RESAMPLES = 10_000
FEWEST = 5  # documents or prompts; below that an interval over them means nothing

Floats = npt.NDArray[np.float64]
Row = dict[str, Any]
# Of what a model did, n items, and weights (B, n): a figure for each row of weights, (B,).
Statistic = Callable[[Any, Floats], Floats]


@dataclass(frozen=True)
class Metric:
    """A figure to report: what it is called, of which texts, and how items make it."""

    name: str
    unit: str
    source: str
    statistic: Statistic


def ratio(numerator: str, denominator: str) -> Statistic:
    """Take the sum of one column of a table over the sum of another."""

    def statistic(items: pd.DataFrame, weights: Floats) -> Floats:
        top, bottom = (items[name].to_numpy(np.float64) for name in (numerator, denominator))
        return np.asarray((weights @ top) / (weights @ bottom))

    return statistic


def between(group: str, numerator: str, denominator: str) -> Statistic:
    """Take a ratio in the items that `group` flags, less the same in the others.

    Raises `DataError` where either has fewer than five.
    """

    def statistic(items: pd.DataFrame, weights: Floats) -> Floats:
        top, bottom = (items[name].to_numpy(np.float64) for name in (numerator, denominator))
        inside = items[group].to_numpy(bool)
        fewest = min(inside.sum(), (~inside).sum())
        if fewest < FEWEST:
            raise DataError(f"n = {fewest} of one kind, fewer than {FEWEST}")
        with np.errstate(invalid="ignore"):  # a resample without any of a group
            rates = [
                (weights[:, s] @ top[s]) / (weights[:, s] @ bottom[s]) for s in (inside, ~inside)
            ]
        return np.asarray(rates[0] - rates[1])

    return statistic


def compare(metric: Metric, base: Any, tuned: Any, n: int, seed: int) -> Row:
    """Report a metric for both models with the 95 % interval of the difference.

    A paired bootstrap (Efron & Tibshirani 1993, percentile interval): the same items are drawn for
    both, 10,000 times. `p` is the two-sided achieved significance level of no difference. Below the
    minimum sample there is a reason instead of figures.
    """
    if n < FEWEST:
        return missing(metric, n, f"n = {n}, fewer than {FEWEST}")
    try:
        return _compared(metric, base, tuned, n, seed)
    except DataError as error:
        return missing(metric, n, str(error))


def _compared(metric: Metric, base: Any, tuned: Any, n: int, seed: int) -> Row:
    weights = np.random.default_rng(seed).multinomial(n, [1 / n] * n, RESAMPLES).astype(np.float64)
    all_once = np.ones((1, n))
    points = {
        side: float(metric.statistic(items, all_once)[0])
        for side, items in (("base", base), ("tuned", tuned))
    }
    drawn = metric.statistic(tuned, weights) - metric.statistic(base, weights)
    low, high = np.nanpercentile(drawn, [2.5, 97.5])
    tail = min((drawn <= 0).mean(), (drawn >= 0).mean())
    return {
        **_head(metric), **points, "delta": points["tuned"] - points["base"],
        "low": float(low), "high": float(high), "n": n,
        "p": float(np.clip(2 * tail, 1 / RESAMPLES, 1)),
    }  # fmt: skip


def missing(metric: Metric, n: int, reason: str) -> Row:
    """Report that a metric was not measured, and why."""
    empty = dict.fromkeys(("base", "tuned", "delta", "low", "high"))
    return {**_head(metric), **empty, "n": n, "reason": reason}


def _head(metric: Metric) -> Row:
    return {"name": metric.name, "unit": metric.unit, "source": metric.source}


def holm(rows: list[Row]) -> None:
    """Correct `p` for the number of sources that a metric is reported for (Holm 1979), in place."""
    for name in {row["name"] for row in rows}:
        family = sorted((row for row in rows if row["name"] == name and "p" in row),
                        key=lambda row: row["p"])  # fmt: skip
        worst = 0.0
        for place, row in enumerate(family):
            worst = max(worst, min(1.0, row["p"] * (len(family) - place)))
            row["p_holm"] = worst
