"""Whether a difference is more than chance: the paired bootstrap over documents or prompts."""

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import numpy.typing as npt
import pandas as pd
from scipy.stats import norm, t

from wuxia_core.config import Config
from wuxia_core.errors import DataError
from wuxia_core.mixing import Mixture, hash_key

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedTokenizerBase


RESAMPLES = 10_000
FEWEST = 6  # documents or prompts; of fewer, not even a sign test can tell anything at 5 %

Floats = npt.NDArray[np.float64]
Row = dict[str, Any]
# Of what a model did, n items, and weights (B, n): a figure for each row of weights, (B,).
Statistic = Callable[[Any, Floats], Floats]
T = TypeVar("T")
HUMAN = 300_000  # characters that stand for how people write

logger = logging.getLogger(__name__)


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

    Raises `DataError` where either has fewer than six.
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

    A paired bootstrap (Efron & Tibshirani 1993): the same items are drawn for both, 10,000 times.
    `p` is the level at which the interval would end at 0. `base` and `tuned` hold what the metric
    is made of and no more, a DataFrame or a tuple of arrays: where k items differ, p is at least
    2 / 2^k, as in a sign test, and the interval holds 0 where that is over 5 %. (Jackknife values
    differ as soon as any text does.) Below the minimum sample there is a reason instead of figures.
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
    drawn = drawn[~np.isnan(drawn)]
    low, high = interval(drawn, n)
    p = _level(min((drawn <= 0).mean(), (drawn >= 0).mean()), n)
    by_signs = 2 * 0.5 ** _differing(base, tuned)
    if by_signs > 0.05:
        low, high = min(low, 0.0), max(high, 0.0)
    return {
        **_head(metric), **points, "delta": points["tuned"] - points["base"],
        "low": low, "high": high, "n": n, "p": min(max(p, by_signs), 1.0),
    }  # fmt: skip


def interval(drawn: Floats, n: int) -> tuple[float, float]:
    """Bound 95 % of resampled figures (B,), and some more where the n items are few.

    The expanded percentile interval (Hesterberg 2015): as much wider than the percentile interval
    as Student's is than the normal one; for n = 10 it spans 98.3 % of the resamples.
    """
    tail = norm.cdf(np.sqrt(n / (n - 1)) * t.ppf(0.025, n - 1))
    low, high = np.quantile(drawn, [tail, 1 - tail])
    return float(low), float(high)


def _level(tail: float, n: int) -> float:
    """Turn the share of resamples beyond 0 into the level at which `interval` ends there."""
    tail = max(tail, 1 / RESAMPLES)  # so many can show no less
    return float(2 * t.cdf(norm.ppf(tail) / np.sqrt(n / (n - 1)), n - 1))


def _differing(base: Any, tuned: Any) -> int:
    """Count the items that are not the same for both."""
    sides = [[np.asarray(part) for _, part in side.items()] if isinstance(side, pd.DataFrame)
             else side for side in (base, tuned)]  # fmt: skip
    differ = [
        (one != other).reshape(len(one), -1).any(1) for one, other in zip(*sides, strict=True)
    ]
    return int(np.any(differ, axis=0).sum())


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


@dataclass(frozen=True)
class EvalContext:
    """An adapter on its base, and the mixture it was trained on."""

    model: "PeftModel"
    tokenizer: "PreTrainedTokenizerBase"
    mixture: Mixture
    config: Config

    @property
    def seed(self) -> int:
        """Of the run; everything random hangs on it."""
        return self.config.training.seed

    @property
    def batch_size(self) -> int:
        """Windows a forward pass."""
        return self.config.training.per_device_eval_batch_size

    def base_and_tuned(self, work: Callable[[], T]) -> tuple[T, T]:
        """Do something with the base, then with the tuned model."""
        with self.model.disable_adapter():
            base = work()
        return base, work()

    def documents(self, source: str, *splits: str, limit: int | None = None) -> list[int]:
        """Draw documents of some splits by key, `evaluation.max_documents` or another limit."""
        outline = self.mixture.outline
        there = outline.index[(outline["source"] == source) & outline["split"].isin(splits)]
        drawn = sorted(there, key=lambda number: hash_key(self.seed, "held out", number))
        return drawn[: limit or self.config.evaluation.max_documents]

    def human_texts(self, source: str, *splits: str) -> pd.DataFrame:
        """Draw whole documents of about 300,000 characters: `book` and `text`, a row each."""
        outline = self.mixture.outline
        drawn = pd.Index(self.documents(source, *splits, limit=len(outline)), dtype=int)
        before = outline.loc[drawn, "characters"].cumsum().shift(fill_value=0)
        chosen = drawn[(before < HUMAN).to_numpy()]
        texts = self.mixture.texts(list(chosen))
        return pd.DataFrame({"book": outline.loc[chosen, "book"].to_numpy(), "text": texts})

    def within_budget(
        self, what: str, items: Sequence[T], size: int, share: float
    ) -> Iterator[Sequence[T]]:
        """Hand out `size` items at a time, once and while a share of `evaluation.minutes` lasts."""
        minutes = self.config.evaluation.minutes
        end = time.monotonic() + 60 * share * minutes if minutes else float("inf")
        for start in range(0, len(items), size):
            if start and time.monotonic() > end:
                logger.warning(
                    "%s: %d of %d within evaluation.minutes %g", what, start, len(items), minutes
                )
                return
            yield items[start : start + size]
