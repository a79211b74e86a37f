"""Tell whether a difference is more than chance: paired bootstrap over documents or prompts."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from scipy.stats import norm, t

from wuxia_core.masking import Floats
from wuxia_core.messages import messages
from wuxia_core.mixing import FEWEST

Row = dict[str, Any]  # of the scorecard
# Takes a table of n items and weights (B, n), how often each resample has each item; gives (B,), a
# figure for each resample.
Statistic = Callable[[pd.DataFrame, Floats], Floats]


class Metric(NamedTuple):
    """A figure of the scorecard: its name, unit, source of texts, and how items make the figure."""

    name: str
    unit: str
    source: str
    statistic: Statistic

    def row(self, n: int, **figures: Any) -> Row:
        """Make the metric's row of the scorecard, of n items.

        `figures` are `base`, `tuned`, `delta`, `low` and `high`; or a `reason` why these are None.
        """
        missing = dict.fromkeys(("base", "tuned", "delta", "low", "high"))
        labels = {"name": self.name, "unit": self.unit, "source": self.source}
        return {**labels, **missing, "n": n, **figures}


def ratio(numerator: str, denominator: str) -> Statistic:
    """Make a statistic: the sum of one column over the sum of another.

    With `bits` of 6 and 4 and `chars` of 2 and 2, each counted once, it is 10 / 4 = 2.5.
    """

    def statistic(items: pd.DataFrame, weights: Floats) -> Floats:
        sums = weights @ items[[numerator, denominator]].to_numpy(np.float64)
        return np.asarray(sums[:, 0] / sums[:, 1])

    return statistic


def group_difference(group: str, numerator: str, denominator: str) -> Statistic:
    """Make a statistic: a ratio over items that the bool column `group` flags, less the others'.

    It is NaN where fewer than six items are flagged, or fewer than six are not.
    """
    group_ratio = ratio(numerator, denominator)

    def statistic(items: pd.DataFrame, weights: Floats) -> Floats:
        flagged = items[group].to_numpy(bool)
        if min(flagged.sum(), (~flagged).sum()) < FEWEST:
            return np.full(len(weights), np.nan)
        with np.errstate(invalid="ignore"):  # 0 / 0 in a resample without any item of a group
            return group_ratio(items, weights * flagged) - group_ratio(items, weights * ~flagged)

    return statistic


def compare(metric: Metric, base: pd.DataFrame, tuned: pd.DataFrame, seed: int) -> Row:
    """Report a metric for both models with the 95 % interval of the difference.

    A paired bootstrap (Efron & Tibshirani 1993): the same items are drawn for both, 10,000 times.

    Parameters
    ----------
    base, tuned : DataFrame
        The same items in the same order, a row each, with only the columns that the metric's
        statistic takes: rows that differ in any column are counted. Where so few differ that a
        sign test shows nothing at 5 %, the interval holds 0.

    Returns
    -------
    A row of the scorecard. Of fewer than six items its figures are None, and `reason` says why.
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
    if 2 * 0.5**differing > 0.05:  # p of a sign test where all of them differ in one direction
        low, high = min(low, 0.0), max(high, 0.0)
    figures = {"base": before[0], "tuned": after[0], "delta": delta[0], "low": low, "high": high}
    return metric.row(n, **{name: float(figure) for name, figure in figures.items()})


def reason(name: str, n: int, **values: object) -> str:
    """Say in the reader's language why there is no figure of n items.

    `name` is a message's key in the section `[reasons]`, `values` are what it has places for.
    """
    return str(messages("reasons")[name].format(n=n, least=FEWEST, **values))


def interval(resampled: Floats, n: int) -> Floats:
    """Bound a figure at 95 % by its values (B,) in resamples of n items: low and high, (2,).

    The expanded percentile interval (Hesterberg 2015): as much wider than the percentile interval
    as Student's is than the normal one; for n = 10 it spans 98.3 % of the resamples. NaN, from a
    resample without any item of a group, is left out.
    """
    tail = norm.cdf(np.sqrt(n / (n - 1)) * t.ppf(0.025, n - 1))
    return np.asarray(np.nanquantile(resampled, [tail, 1 - tail]))
