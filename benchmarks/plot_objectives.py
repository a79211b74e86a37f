"""The comparison of objectives: what each learned and what it cost, in tables and in curves.

    python benchmarks/plot_objectives.py [RESULTS.parquet]

prints where each objective ends, and what each costs in general text once it has learned as much as
`masked` does. Notebook 06 draws the curves.
"""

import sys
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from matplotlib.patches import Rectangle

from wuxia_core import show
from wuxia_core.config import Config
from wuxia_core.errors import DataError, exit_status, run_command
from wuxia_core.evaluate.statistics import Metric, compare, ratio
from wuxia_core.masking import IGNORE_INDEX, Window
from wuxia_core.model import document_start_id, load_tokenizer, make_collator, mask_token_id
from wuxia_core.show.plots import INK, LEGEND, LINE_COLOURS, LINE_DASHES, drawable

if TYPE_CHECKING:
    from matplotlib.axes import Axes


RESULTS = Path(__file__).parent / "results" / "objectives.parquet"
OBJECTIVES = ("masked", "mixed", "meap", "clm")
RUN = ["condition", "ratio", "seed"]
DOSES = {"": "step", ", equal supervised": "asked", ", equal time": "seconds"}
SOURCES = {"wuxia": "武侠", "general": "general"}


def read_runs(path: str | Path = RESULTS) -> pd.DataFrame:
    """Read what `benchmarks/objectives.py` wrote: a row a passage, step and run, with its bits.

    Raises `DataError` where the file is missing or holds something else.
    """
    try:
        return pd.read_parquet(path, columns=[*RUN, *DOSES.values(), "document", "source", "bits",
                                              "chars", "base_right", "tuned_right"])  # fmt: skip
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"{path}: cannot be read ({error}); run benchmarks/objectives.py") from None


def curves(runs: pd.DataFrame) -> pd.DataFrame:
    """Take the mean of all seeds: change of bits per character since step 0, a row a step.

    The index is (condition, ratio, step), the columns are `wuxia` and `general`.
    """
    sums = runs.groupby(["condition", "ratio", "step", "source"])[["bits", "chars"]].sum()
    wide = (sums["bits"] / sums["chars"]).unstack()[list(SOURCES)]
    return wide - wide.groupby(["condition", "ratio"]).transform("first")


def equal_learning(runs: pd.DataFrame) -> pd.DataFrame:
    """Read general text off the curves where each run has learned as much as `masked` at its end.

    A row a condition and share of general text: the step where the mean curve of the condition
    reaches the change of 武侠 at which `masked` ends, between two measurements, and the changes
    there with intervals; last by how much general text changed more than under `masked`. Conditions
    that never get there are left out.
    """
    rows = []
    for share, means in curves(runs).groupby("ratio"):
        goal, shared = means.loc["masked", "wuxia"].iloc[-1], runs[runs["ratio"] == share]
        masked = read_at(shared[shared["condition"] == "masked"], "step", shared["step"].max())
        for name, curve in means.groupby("condition"):
            learned = -curve["wuxia"].cummin()  # np.interp needs it to rise
            if learned.iloc[-1] >= -goal:
                step = np.interp(-goal, learned, curve.index.get_level_values("step"))
                read = read_at(shared[shared["condition"] == name], "step", step)
                changes = [change(read, read, source) for source in SOURCES]
                more = change(masked, read, "general", "tuned")
                rows.append((f"{share:.0%}", name, round(step), *changes, more))
    columns = ["share", "condition", "step", *SOURCES.values(), "general, less masked's"]
    return pd.DataFrame(rows, columns=columns)


def ends(runs: pd.DataFrame, share: float) -> pd.DataFrame:
    """Put the end of all conditions in a table, as trained and at equal doses.

    The doses are the supervised tokens and the time of `masked`. `sd` is that of the seeds' change
    of 武侠; `masked found` the share of masked tokens of 武侠 that are found, base to tuned.
    """
    chosen, rows = runs[runs["ratio"] == share], {}
    last = chosen[chosen["step"] == chosen["step"].max()]
    doses = last[last["condition"] == "masked"][list(DOSES.values())].mean()
    for name, of in chosen.groupby("condition"):
        row = {}
        for title, dose in DOSES.items():
            read = read_at(of, dose, doses[dose])
            row |= {shown + title: change(read, read, name) for name, shown in SOURCES.items()}
        end = last[(last["condition"] == name) & (last["source"] == "wuxia")]
        by_seed = end.groupby("seed")[["bits", "chars"]].sum()
        found = end[["base_right", "tuned_right"]].mean()
        row |= {"sd": (by_seed["bits"] / by_seed["chars"]).std(), "seeds": len(by_seed)}
        row["masked found"] = "{:.1%} → {:.1%}".format(*found)
        row["CPU s a step"] = (end["seconds"] / end["step"]).mean()
        rows[name] = row
    return pd.DataFrame.from_dict(rows, orient="index")


def change(one: pd.DataFrame, other: pd.DataFrame, source: str, side: str = "base") -> str:
    """Give the change of bits per character from a side of one to the tuned one of the other.

    Both are as `read_at` gives them, of the same passages; with the 95 % interval over passages.
    """
    one, other = (table[table["source"] == source] for table in (one, other))
    sides = [one[["chars"]].assign(bits=one[side]), other[["chars"]].assign(bits=other["tuned"])]
    metric = Metric("bits", "bits/character", source, ratio("bits", "chars"))
    return "{delta:+.3f} [{low:+.3f}, {high:+.3f}]".format(**compare(metric, *sides, 0))


def read_at(runs: pd.DataFrame, dose: str, value: float) -> pd.DataFrame:
    """Read a condition's bits off its curves where a dose has a value: a row a passage.

    `chars`, `base` and `tuned` are summed over the seeds.
    """
    read = pd.concat([at(curve, dose, value) for _, curve in runs.groupby("seed")])
    return read.groupby(["source", read.index])[["chars", "base", "tuned"]].sum().reset_index(0)


def at(curve: pd.DataFrame, dose: str, value: float) -> pd.DataFrame:
    """Read bits of each passage off one run's curve where a dose has a value, between two steps.

    A run that ends before it is read at its end.
    """
    steps = curve.drop_duplicates("step")
    bits = curve.pivot(index="document", columns="step", values="bits")  # (documents, steps)
    place = np.interp(value, steps[dose], np.arange(len(steps)))
    low = min(int(place), len(steps) - 2)
    mixed = bits.iloc[:, low] * (low + 1 - place) + bits.iloc[:, low + 1] * (place - low)
    first = curve[curve["step"] == 0].set_index("document")
    return first[["source", "chars"]].assign(base=first["bits"], tuned=mixed)


def plot_frontier(runs: pd.DataFrame, share: float, *, ax: "Axes | None" = None) -> "Axes":
    """Draw learning against forgetting by condition, the mean of all seeds, from the base on."""
    ax = show.axes(ax)
    by_condition = curves(runs).xs(share, level="ratio").groupby("condition", sort=False)
    styles = cycle(LINE_COLOURS), cycle(LINE_DASHES)
    for (name, curve), colour, dash in zip(by_condition, *styles, strict=False):
        ax.plot(
            curve["general"], curve["wuxia"], dash, color=colour, marker=".", label=show.named(name)
        )
    ax.plot(0, 0, "s", color=INK, markersize=9)
    ax.set(xlabel=show.named("forgetting"), ylabel=show.named("learning"))
    ax.legend(**LEGEND)
    return ax


def plot_targets(text: str, config: Config, key: int = 0, *, ax: "Axes | None" = None) -> "Axes":
    """Draw what each objective makes of one text: above what goes in, below what is asked.

    `key` is a draw of the masks, which are grey; `mixed` does by turns as `masked` and as `clm`.
    """
    tokenizer = load_tokenizer(config.model.model_name_or_path)
    ids = [document_start_id(tokenizer), *tokenizer(text, add_special_tokens=False).input_ids]
    window = Window(np.array(ids), np.zeros(len(ids), int), np.arange(len(ids)), key, epoch=0)
    mask_id = mask_token_id(tokenizer, len(tokenizer))
    ax = show.axes(ax, rows=2 * len(OBJECTIVES))
    for number, objective in enumerate(OBJECTIVES):
        batch = make_collator(config, tokenizer, mask_id, objective)([window])
        rows = batch["input_ids"][0].tolist(), batch["labels"][0].tolist()
        for below, row in enumerate(rows):
            for at, token in enumerate(row[1:]):
                sign = tokenizer.decode([token]) if token not in (mask_id, IGNORE_INDEX) else ""
                shade = {"facecolor": "#BBBBBB" if token == mask_id else "none", "linewidth": 0}
                place = (at, -3 * number - below)
                ax.add_patch(Rectangle((place[0] - 0.5, place[1] - 0.5), 1, 1, **shade))
                ax.text(*place, drawable(sign), ha="center", va="center")
    ax.set(xlim=(-0.5, len(ids) - 1.5), ylim=(-3 * len(OBJECTIVES) + 1.5, 0.6), xticks=[])
    ax.set_yticks([-3 * n - 0.5 for n in range(len(OBJECTIVES))], OBJECTIVES)
    ax.spines[["bottom", "left"]].set_visible(False)
    return ax


def plot_few_books(table: pd.DataFrame, figure: str, *, ax: "Axes | None" = None) -> "Axes":
    """Draw a figure of results/few_books.csv over passes of the tenth of a novel, by condition."""
    tenth = table[table["text"] == "tenth of a novel"]
    lines = tenth.pivot_table(figure, "passes", "condition", sort=False).sort_index()
    ax = show.plot_lines(lines, xlabel="passes", ylabel="bits_per_char", ax=ax)
    ax.set_xscale("log")
    ax.set_xticks(lines.index, [str(n) for n in lines.index], minor=False)
    return ax


def print_tables(path: str | Path = RESULTS) -> None:
    """Print where each objective ends, and the comparison at equal learning."""
    runs = read_runs(path)
    print("change of bits per character\n", ends(runs, 0.1).to_string(float_format="{:.3f}".format))
    print("\nat equal learning, by share of general text; a step below the last is on the way")
    print(equal_learning(runs).to_string(index=False))


if __name__ == "__main__":
    run_command(lambda: exit_status(lambda: print_tables(*sys.argv[1:2])))
