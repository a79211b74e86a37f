"""The comparison of objectives in curves: how each condition's prediction changes in training."""

from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd

from wuxia_core import show
from wuxia_core.errors import DataError

if TYPE_CHECKING:
    from matplotlib.axes import Axes


AXES = {
    "step": "step: equal training tokens",
    "asked": "scored tokens: equal supervision",
    "seconds": "CPU seconds of training: equal time",
    "wuxia": "武侠, bits per character since step 0",
    "general": "general text, bits per character",
}


def read_objectives(path: str | Path) -> pd.DataFrame:
    """Read what `benchmarks/objectives.py` wrote: a row a condition, ratio, seed and step.

    `wuxia` and `general` are in bits per character, changes since step 0. Raises `DataError` where
    the file is missing or holds something else.
    """
    keys, doses = ["condition", "ratio", "seed"], ["step", "asked", "seconds"]
    try:
        table = pd.read_csv(path)
        table["bits"] /= table["chars"]
        wide = table.pivot(index=[*keys, *doses], columns="source", values="bits")
        curves = wide[["wuxia", "general"]].reset_index(doses)
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"{path}: cannot be read ({error}); run benchmarks/objectives.py") from None
    curves[["wuxia", "general"]] -= curves.groupby(keys)[["wuxia", "general"]].transform("first")
    return curves.reset_index()


def objectives_table(curves: pd.DataFrame) -> pd.DataFrame:
    """Put the end of all runs in a table: mean change of bits per character, and sd over seeds."""
    ends = curves[curves["step"] == curves["step"].max()].groupby(["condition", "ratio"])
    table = ends[["wuxia", "general"]].mean()
    table = table.join(ends[["wuxia", "general"]].std().add_prefix("sd, "))
    return table.assign(seeds=ends.size()).sort_values("wuxia").reset_index()


def plot_objectives(
    curves: pd.DataFrame, x: str, y: str = "wuxia", *, ratio: float = 0.1, ax: "Axes | None" = None
) -> "Axes":
    """Draw one of `AXES` over another by condition, the mean of all seeds.

    `ratio` is the share of general text in training.
    """
    chosen = curves[curves["ratio"] == ratio]
    means = chosen.groupby(["condition", "step"], as_index=False).mean(numeric_only=True)
    lines = {name: rows.set_index(x)[y] for name, rows in means.groupby("condition")}
    return show.plot_lines(pd.DataFrame(lines), xlabel=AXES[x], ylabel=AXES[y], ax=ax)
