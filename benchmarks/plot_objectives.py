"""The comparison of objectives in curves: how each condition's prediction changes in training.

    python benchmarks/plot_objectives.py [RESULTS.csv]

prints what each objective costs in general text once it has learned as much as `masked` does.
"""

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from wuxia_core import show
from wuxia_core.errors import DataError, exit_status, run_command

if TYPE_CHECKING:
    from matplotlib.axes import Axes


RESULTS = Path(__file__).parent / "results" / "objectives.csv"
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
    try:
        return since_start(pd.read_csv(path))
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"{path}: cannot be read ({error}); run benchmarks/objectives.py") from None


def since_start(sums: pd.DataFrame) -> pd.DataFrame:
    """Turn sums of bits and characters into changes of bits per character since step 0."""
    keys, doses = ["condition", "ratio", "seed"], ["step", "asked", "seconds"]
    table = sums.assign(bits=sums["bits"] / sums["chars"])
    wide = table.pivot(index=[*keys, *doses], columns="source", values="bits")
    curves = wide[["wuxia", "general"]].reset_index(doses)
    curves[["wuxia", "general"]] -= curves.groupby(keys)[["wuxia", "general"]].transform("first")
    return curves.reset_index()


def objectives_table(curves: pd.DataFrame) -> pd.DataFrame:
    """Put the end of all runs in a table: mean change of bits per character, and sd over seeds."""
    ends = curves[curves["step"] == curves["step"].max()].groupby(["condition", "ratio"])
    table = ends[["wuxia", "general"]].mean()
    table = table.join(ends[["wuxia", "general"]].std().add_prefix("sd, "))
    return table.assign(seeds=ends.size()).sort_values("wuxia").reset_index()


def equal_learning(curves: pd.DataFrame) -> pd.DataFrame:
    """Read general text off the curves where each run has learned as much as `masked` at its end.

    A row a condition and share of general text: the change of 武侠 at which `masked` ends, the
    step where the mean curve of the condition reaches it, between two measurements, and the change
    of general text there. Conditions that never get there are left out.
    """
    rows = []
    for ratio, runs in curves.groupby("ratio"):
        means = runs.groupby(["condition", "step"])[["wuxia", "general"]].mean()
        goal = means.loc["masked", "wuxia"].iloc[-1]
        for name, curve in means.groupby("condition"):
            curve = curve.droplevel("condition")
            learned = -curve["wuxia"].cummin()  # np.interp needs it to rise
            if learned.iloc[-1] >= -goal:
                step = np.interp(-goal, learned, curve.index)
                general = np.interp(step, curve.index, curve["general"])
                rows.append((ratio, name, goal, round(step), general))
    return pd.DataFrame(rows, columns=["ratio", "condition", "wuxia", "step", "general"])


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


def main() -> None:
    """Print what general text costs at equal learning."""
    table = equal_learning(read_objectives(sys.argv[1] if len(sys.argv) > 1 else RESULTS))
    print(table.to_string(index=False, float_format="{:+.3f}".format))


if __name__ == "__main__":
    run_command(lambda: exit_status(main))
