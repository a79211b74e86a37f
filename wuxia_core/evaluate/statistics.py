"""Tell whether a difference is more than chance: paired bootstrap over documents or passages."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from scipy.stats import norm, t

from wuxia_core.masking import Floats
from wuxia_core.messages import messages
from wuxia_core.mixing import FEWEST

Row = dict[str, Any]  # a row of the scorecard
FIGURES = ("base", "tuned", "delta", "low", "high")  # keys of a row; `delta` is tuned less base
# Takes a table of n items and weights (B, n), which say how often each of B resamples has each
# item; gives the figure of each resample, (B,).
Statistic = Callable[[pd.DataFrame, Floats], Floats]


class Metric(NamedTuple):
    """A figure of the scorecard: its name and unit, the source of its items, and how it is made.

    `source` is "wuxia", "general" or "training"; `statistic` makes the figure out of the items.
    """

    name: str
    unit: str
    source: str
    statistic: Statistic

    def row(self, n: int, **figures: Any) -> Row:
        """Make the metric's row of the scorecard: a dict with its labels, its figures and `n`.

        `n` is the number of items. `figures` are all of the keys `FIGURES`, or only a `reason` why
        nothing could be measured: the figures that are not given are None.
        """
        labels = {"name": self.name, "unit": self.unit, "source": self.source}
        return {**labels, **dict.fromkeys(FIGURES), "n": n, **figures}


def ratio(numerator: str, denominator: str) -> Statistic:
    """Make a statistic: the sum of the column `numerator` over the sum of the column `denominator`.

    Take two items with 6 and 4 bits and 2 characters each: `ratio("bits", "chars")` is 10 / 4 = 2.5
    in a resample that has each item once.
    """

    def statistic(items: pd.DataFrame, weights: Floats) -> Floats:
        sums = weights @ items[[numerator, denominator]].to_numpy(np.float64)
        return np.asarray(sums[:, 0] / sums[:, 1])

    return statistic


def group_difference(group: str, numerator: str, denominator: str) -> Statistic:
    """Make a statistic: the `ratio` over the flagged items, less the `ratio` over the others.

    `group` is the bool column that flags items. The statistic is NaN if fewer than six items are
    flagged or fewer than six are not, and also in any resample that has no flagged item, or has no
    other item.
    """
    group_ratio = ratio(numerator, denominator)

    def statistic(items: pd.DataFrame, weights: Floats) -> Floats:
        flagged = items[group].to_numpy(bool)
        if min(flagged.sum(), (~flagged).sum()) < FEWEST:
            return np.full(len(weights), np.nan)
        # A weight of 0 leaves an item out; without any flagged (or other) item the ratio is 0 / 0.
        with np.errstate(invalid="ignore"):
            return group_ratio(items, weights * flagged) - group_ratio(items, weights * ~flagged)

    return statistic


def compare(metric: Metric, base: pd.DataFrame, tuned: pd.DataFrame, seed: int) -> Row:
    """Compare base and tuned by a metric: its two figures and a 95 % interval of their difference.

    The interval comes from a paired bootstrap (Efron & Tibshirani 1993): 10,000 resamples are drawn
    by `seed`, and each has the same items for both models. If fewer than six rows differ between
    `base` and `tuned`, the interval is widened to include 0: a sign test could show nothing at 5 %.

    Parameters
    ----------
    base, tuned : DataFrame
        The same items in the same order, a row for each. Columns that `metric.statistic` does not
        take must be the same in both, since a row that differs in any column counts as different.

    Returns
    -------
    The metric's row of the scorecard; `delta` is tuned less base. The figures are None, and
    `reason` says why, if there are fewer than six items, or fewer than six of one kind (see
    `group_difference`).
    """
    n = len(base)
    if n < FEWEST:
        return metric.row(n, reason=reason("few", n))
    draws = np.random.default_rng(seed).multinomial(n, [1 / n] * n, 10_000)
    weights = np.vstack([np.ones(n), draws])  # the sample itself, then its resamples: (10,001, n)
    of_base, of_tuned = (metric.statistic(items, weights) for items in (base, tuned))
    deltas = of_tuned - of_base  # (10,001,); the first is that of the sample itself
    if np.isnan(deltas[0]):
        return metric.row(n, reason=reason("few of a kind", n))
    low, high = interval(deltas[1:], n)
    differing = (base.to_numpy() != tuned.to_numpy()).any(axis=1).sum()
    if 2 * 0.5**differing > 0.05:  # p of a sign test if all of these rows differ in one direction
        low, high = min(low, 0.0), max(high, 0.0)
    values = map(float, (of_base[0], of_tuned[0], deltas[0], low, high))
    return metric.row(n, **dict(zip(FIGURES, values, strict=True)))


def reason(name: str, n: int, **values: object) -> str:
    """Return a sentence in the reader's language: why `n` items give no figure, or no verdict.

    `name` is the sentence's key in the messages' section `[reasons]`. Its places are filled with
    `n`, with the minimum of six as `least`, and with `values`.
    """
    return str(messages("reasons")[name].format(n=n, least=FEWEST, **values))


def interval(resampled: Floats, n: int) -> Floats:
    """Return the 95 % interval of a figure, low and high, (2,), from resamples of its `n` items.

    `resampled` (B,) has the figure of each resample; NaNs are left out. This is the expanded
    percentile interval (Hesterberg 2015). A percentile interval of few items is too short. So it is
    made wider by sqrt(n / (n - 1)), and by as much as Student's interval is wider than the normal
    one. For n = 10 it spans 98.3 % of the resamples, for very many items 95 %.
    """
    tail = norm.cdf(np.sqrt(n / (n - 1)) * t.ppf(0.025, n - 1))  # share cut off on either side
    return np.asarray(np.nanquantile(resampled, [tail, 1 - tail]))
