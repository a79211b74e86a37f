"""The comparison of objectives: curves of several conditions, seeds together.

    python benchmarks/plot_objectives.py [RESULTS.csv]

prints what each objective costs in general text once it has learned as much as `masked` does.
"""

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from wuxia_core.errors import DataError
from wuxia_core.show.plots import BLUE, GREEN, GREY, ORANGE, axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

RESULTS = Path(__file__).parent / "results" / "objectives.csv"
AXES = {
    "step": "step: equal training tokens",
    "asked": "tokens asked for: equal supervised tokens",
    "seconds": "CPU seconds of training: equal time",
}
COLOURS = {"masked": ORANGE, "masked, words": "#E69F00", "masked, single": "#CC79A7",
           "mixed": GREEN, "clm": BLUE}  # fmt: skip
COLUMNS = ["condition", "ratio", "seed", "step", "source", "bits", "chars", "asked", "seconds"]


def read_objectives(path: str | Path) -> pd.DataFrame:
    """Read what `benchmarks/objectives.py` wrote: a row a run, step and source.

    `change` is in bits per character, since step 0. Raises `DataError` where the file is missing
    or holds something else.
    """
    try:
        table = pd.read_csv(path)
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read ({error}); run benchmarks/objectives.py") from None
    if missing := sorted(set(COLUMNS) - set(table.columns)):
        raise DataError(f"{path}: no column {missing[0]}; is it from benchmarks/objectives.py?")
    table = table.sort_values("step", kind="stable")
    bits = table["bits"] / table["chars"]
    first = bits.groupby([table[name] for name in ("condition", "ratio", "seed", "source")])
    return table.assign(change=bits - first.transform("first"))


def objectives_table(curves: pd.DataFrame) -> pd.DataFrame:
    """Put the end of all runs in a table: mean change of bits per character, and sd over seeds."""
    last = curves[curves["step"] == curves["step"].max()]
    groups = last.groupby(["condition", "ratio", "source"], sort=False)["change"]
    wide = groups.agg(["mean", "std", "size"]).unstack("source")
    table = pd.DataFrame({
        "wuxia": wide["mean", "wuxia"], "sd, wuxia": wide["std", "wuxia"],
        "general": wide["mean", "general"], "sd, general": wide["std", "general"],
        "seeds": wide["size", "wuxia"],
    })  # fmt: skip
    return table.sort_values("wuxia").reset_index()


def equal_learning(curves: pd.DataFrame) -> pd.DataFrame:
    """Read general text off the curves where each run has learned as much as `masked` at its end.

    A row a condition and share of general text: the change of 武侠 at which `masked` ends, the
    step where the mean curve of the condition reaches it, between two measurements, and the change
    of general text there. Conditions that never get there are left out.
    """
    rows = []
    for ratio, runs in curves.groupby("ratio"):
        means = runs.pivot_table(index=["condition", "step"], columns="source", values="change")
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
    curves: pd.DataFrame, source: str = "wuxia", x: str = "step", ax: "Axes | None" = None
) -> "Axes":
    """Draw the change of bits per character by condition, the mean of all seeds; down is better."""
    ax = axes(ax)
    chosen = curves[(curves["source"] == source) & (curves["ratio"] == 0.1)]
    for name, rows in chosen.groupby("condition", sort=False):
        way, bert, _ = str(name).partition(", 80/10/10")
        mean = rows.assign(x=rows[x]).groupby("step")[["x", "change"]].mean()
        ax.plot(
            mean["x"],
            mean["change"],
            "--" if bert else "-",
            color=COLOURS.get(way, GREY),
            label=name,
        )
    ax.axhline(0, color="black", linewidth=0.5)
    ax.set_xlabel(AXES[x])
    ax.set_ylabel(f"{source}, change of bits per character")
    ax.legend(frameon=False, fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
    return ax


def plot_tradeoff(curves: pd.DataFrame, ax: "Axes | None" = None) -> "Axes":
    """Draw where each run ends, 武侠 over general text; crosses: not 10 % of it, but as written."""
    last = curves[curves["step"] == curves["step"].max()]
    keys = ["condition", "ratio", "seed"]
    ends = last.pivot(index=keys, columns="source", values="change").reset_index()
    ax = axes(ax, size=(7.5, 4.5))
    for name, rows in ends.groupby("condition", sort=False):
        way, bert, _ = str(name).partition(", 80/10/10")
        mark = "s" if bert else "o"
        ten, other = rows[rows["ratio"] == 0.1], rows[rows["ratio"] != 0.1]
        ax.plot(ten["general"], ten["wuxia"], mark, color=COLOURS.get(way, GREY), label=name)
        ax.plot(other["general"], other["wuxia"], "x", color=COLOURS.get(way, GREY))
        for row in other.itertuples():
            ax.annotate(f" {row.ratio:.0%}", (row.general, row.wuxia), fontsize="small")
    ax.axvline(0, color="black", linewidth=0.5)
    ax.set_xlabel("general text, change of bits per character: to the right is forgetting")
    ax.set_ylabel("武侠: down is learning")
    ax.legend(frameon=False, fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
    return ax


if __name__ == "__main__":
    table = equal_learning(read_objectives(sys.argv[1] if len(sys.argv) > 1 else RESULTS))
    print(table.to_string(index=False, float_format="{:+.3f}".format))
