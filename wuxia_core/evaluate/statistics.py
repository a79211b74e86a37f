"""Whether a difference is more than chance: the paired bootstrap over documents or prompts."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
from scipy.stats import norm, t

from wuxia_core.errors import DataError

RESAMPLES = 10_000
FEWEST = 6  # documents or prompts; of fewer, not even a sign test can tell anything at 5 %

Floats = npt.NDArray[np.float64]
Row = dict[str, Any]
# What a model did with n items, a row each, and weights (B, n): a figure for each resample, (B,).
Statistic = Callable[[pd.DataFrame, Floats], Floats]


@dataclass(frozen=True)
class Metric:
    """A figure to report: what it is called, of which texts, and how items make it."""

    name: str
    unit: str
    source: str
    statistic: Statistic


def ratio(numerator: str, denominator: str) -> Statistic:
    """Take the sum of one column over the sum of another.

    Of `bits` 6 and 4 and `chars` 2 and 2, each counted once, it is 10 / 4 = 2.5.
    """

    def statistic(items: pd.DataFrame, weights: Floats) -> Floats:
        top, bottom = (items[name].to_numpy(np.float64) for name in (numerator, denominator))
        return np.asarray((weights @ top) / (weights @ bottom))

    return statistic


def group_difference(group: str, numerator: str, denominator: str) -> Statistic:
    """Take a ratio in the items that the bool column `group` flags, less that in the others.

    Raises `DataError` where either group has fewer than six items.
    """
    rate = ratio(numerator, denominator)

    def statistic(items: pd.DataFrame, weights: Floats) -> Floats:
        inside = items[group].to_numpy(bool)
        fewest = min(inside.sum(), (~inside).sum())
        if fewest < FEWEST:
            raise DataError(f"n = {fewest} of one kind, fewer than {FEWEST}")
        with np.errstate(invalid="ignore"):  # a resample without any of a group
            first, second = (rate(items[side], weights[:, side]) for side in (inside, ~inside))
        return np.asarray(first - second)

    return statistic


def compare(metric: Metric, base: pd.DataFrame, tuned: pd.DataFrame, seed: int) -> Row:
    """Report a metric for both models with the 95 % interval of the difference.

    A paired bootstrap (Efron & Tibshirani 1993): the same items are drawn for both, 10,000 times.

    Parameters
    ----------
    base, tuned : DataFrame
        The same items in the same order, a row each: what the metric is made of and no more. Where
        so few rows differ that a sign test shows nothing at 5 %, the interval holds 0.

    Returns
    -------
    A row of the scorecard; below the minimum sample its figures are None and `reason` says why.
    """
    n = len(base)
    if n < FEWEST:
        return missing(metric, n, f"n = {n}, fewer than {FEWEST}")
    weights = np.random.default_rng(seed).multinomial(n, [1 / n] * n, RESAMPLES).astype(np.float64)
    try:
        before, after = (float(metric.statistic(s, np.ones((1, n)))[0]) for s in (base, tuned))
        drawn = metric.statistic(tuned, weights) - metric.statistic(base, weights)
    except DataError as error:
        return missing(metric, n, str(error))
    low, high = interval(drawn[~np.isnan(drawn)], n)
    differing = (base.to_numpy() != tuned.to_numpy()).any(axis=1).sum()
    if 2 * 0.5**differing > 0.05:
        low, high = min(low, 0.0), max(high, 0.0)
    figures = {"base": before, "tuned": after, "delta": after - before, "low": low, "high": high}
    return {**_head(metric), **figures, "n": n}


def interval(drawn: Floats, n: int) -> tuple[float, float]:
    """Bound 95 % of resampled figures (B,), and some more where the n items are few.

    The expanded percentile interval (Hesterberg 2015): as much wider than the percentile interval
    as Student's is than the normal one; for n = 10 it spans 98.3 % of the resamples.
    """
    tail = norm.cdf(np.sqrt(n / (n - 1)) * t.ppf(0.025, n - 1))
    low, high = np.quantile(drawn, [tail, 1 - tail])
    return float(low), float(high)


def missing(metric: Metric, n: int, reason: str) -> Row:
    """Report that a metric was not measured, and why."""
    empty = dict.fromkeys(("base", "tuned", "delta", "low", "high"))
    return {**_head(metric), **empty, "n": n, "reason": reason}


def _head(metric: Metric) -> Row:
    return {"name": metric.name, "unit": metric.unit, "source": metric.source}
