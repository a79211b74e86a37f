"""Whether a difference is more than chance: the paired bootstrap over documents or prompts."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd
from scipy.stats import norm, t

from wuxia_core.messages import messages
from wuxia_core.mixing import FEWEST

Floats = npt.NDArray[np.float64]
Row = dict[str, Any]
# What a model did with n items, a row each, and weights (B, n): a figure for each resample, (B,).
Statistic = Callable[[pd.DataFrame, Floats], Floats]


class Metric(NamedTuple):
    """A figure to report: what it is called, of which texts, and how items make it."""

    name: str
    unit: str
    source: str
    statistic: Statistic

    def row(self, n: int, **figures: Any) -> Row:
        """Make its row of the scorecard; without figures there is a `reason`."""
        none = dict.fromkeys(("base", "tuned", "delta", "low", "high"))
        about = {"name": self.name, "unit": self.unit, "source": self.source}
        return {**about, **none, "n": n, **figures}


def ratio(numerator: str, denominator: str) -> Statistic:
    """Take the sum of one column over the sum of another.

    Of `bits` 6 and 4 and `chars` 2 and 2, each counted once, it is 10 / 4 = 2.5.
    """

    def statistic(items: pd.DataFrame, weights: Floats) -> Floats:
        sums = weights @ items[[numerator, denominator]].to_numpy(np.float64)
        return np.asarray(sums[:, 0] / sums[:, 1])

    return statistic


def group_difference(group: str, numerator: str, denominator: str) -> Statistic:
    """Take a ratio in the items that the bool column `group` flags, less that in the others.

    It is NaN where either group has fewer than six items.
    """
    rate = ratio(numerator, denominator)

    def statistic(items: pd.DataFrame, weights: Floats) -> Floats:
        inside = items[group].to_numpy(bool)
        if min(inside.sum(), (~inside).sum()) < FEWEST:
            return np.full(len(weights), np.nan)
        with np.errstate(invalid="ignore"):  # a resample without any of a group
            return rate(items, weights * inside) - rate(items, weights * ~inside)

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
        return metric.row(n, reason=reason("few", n))
    draws = np.random.default_rng(seed).multinomial(n, [1 / n] * n, 10_000)
    weights = np.vstack([np.ones(n), draws])  # the sample itself, then its resamples
    before, after = metric.statistic(base, weights), metric.statistic(tuned, weights)
    delta = after - before
    if np.isnan(delta[0]):
        return metric.row(n, reason=reason("few of a kind", n))
    low, high = interval(delta[1:], n)
    differing = (base.to_numpy() != tuned.to_numpy()).any(axis=1).sum()
    if 2 * 0.5**differing > 0.05:
        low, high = min(low, 0.0), max(high, 0.0)
    figures = {"base": before[0], "tuned": after[0], "delta": delta[0], "low": low, "high": high}
    return metric.row(n, **{name: float(figure) for name, figure in figures.items()})


def reason(name: str, n: int, **values: object) -> str:
    """Say in the reader's language why there is no figure of n items."""
    return str(messages("reasons")[name].format(n=n, least=FEWEST, **values))


def interval(drawn: Floats, n: int) -> Floats:
    """Bound 95 % of resampled figures (B,), and some more where the n items are few: (2,).

    The expanded percentile interval (Hesterberg 2015): as much wider than the percentile interval
    as Student's is than the normal one; for n = 10 it spans 98.3 % of the resamples. NaN, of a
    resample without any of a group, is left out.
    """
    tail = norm.cdf(np.sqrt(n / (n - 1)) * t.ppf(0.025, n - 1))
    return np.asarray(np.nanquantile(drawn, [tail, 1 - tail]))
