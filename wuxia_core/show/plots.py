"""Plots with a font that has the characters: `ax=None` in, Axes out."""

import functools
from itertools import cycle
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap

from wuxia_core.masking import Kinds
from wuxia_core.text import visible

FONT = Path(__file__).parents[1] / "fonts" / "NotoSansSC-Regular-GBK.otf"
BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#888888"  # Okabe & Ito 2008
SKY, PINK, YELLOW = "#56B4E9", "#CC79A7", "#E69F00"
LINES = ((ORANGE, BLUE, GREEN, GREY, PINK, YELLOW, SKY), ("-", "--", ":", "-."))
COLOURS = {"wuxia": ORANGE, "general": BLUE, "train": ORANGE, "validation": BLUE}
COLOURS |= {"duplicate": "#CCCCCC", "delta": "black"}  # all else is grey
LEGEND = {"loc": "upper left", "bbox_to_anchor": (1.01, 1), "frameon": False}
EVENTS = {"checkpoint": ("checkpoint", "k^", 0.02), "resumed": ("restart", "rv", 0.98)}
BEST = "eval_wuxia_bits_per_char"  # what the adapter that is kept has the fewest of
GENERAL = "eval_general_bits_per_char"
FORGETTING = "general text, bits per character: to the right is forgetting"
LEARNING = "武侠: down is learning"


@functools.cache
def _fonts() -> tuple[list[str], frozenset[int]]:
    """Load the bundled font; return the font families, and the characters that they can write."""
    font_manager.fontManager.addfont(FONT)
    names = [font_manager.FontProperties(fname=FONT).get_name(), "DejaVu Sans"]
    maps = [font_manager.get_font(font_manager.findfont(name)).get_charmap() for name in names]
    return names, frozenset().union(*maps)


def drawable(text: str) -> str:
    """Make a text fit for a plot: `visible`, and numbers for characters that the fonts lack."""
    return "".join(
        c if ord(c) in _fonts()[1] or c.isspace() else f"⟨U+{ord(c):04X}⟩" for c in visible(text)
    )


def axes(ax: Axes | None = None, *, rows: int | None = None) -> Axes:
    """Return `ax`, or new white axes; from here on plots write Chinese and take `$` for a dollar.

    New ones are 9 cm high, or as high as so many `rows` of bars need.
    """
    plt.rcParams["font.family"] = _fonts()[0]
    plt.rcParams.update({"axes.unicode_minus": False, "text.parse_math": False})
    if ax is None:
        size = (7.5, 3.6 if rows is None else 1.2 + 0.3 * rows)
        _, ax = plt.subplots(figsize=size, facecolor="white", layout="constrained")
    ax.spines[["top", "right"]].set_visible(False)
    return ax


def plot_lines(lines: pd.DataFrame, *, xlabel: str, ylabel: str, ax: Axes | None = None) -> Axes:
    """Draw a line a column, its values over the index; what is missing is left out."""
    ax = axes(ax)
    for (label, values), colour, dash in zip(lines.items(), *map(cycle, LINES), strict=False):
        there, name = values.dropna(), drawable(str(label))
        ax.plot(there.index, there, dash, color=colour, marker=".", label=name)
    ax.set(xlabel=xlabel, ylabel=ylabel)
    ax.legend(**LEGEND)
    return ax


def plot_metric(
    metrics: pd.DataFrame, columns: dict[str, str], *, ylabel: str, ax: Axes | None = None
) -> Axes:
    """Draw columns of `metrics.jsonl` over steps; `columns` maps each to its label.

    Checkpoints are marked below, restarts above, and of held-out bits per character the best.
    """
    lines = metrics.set_index("step").reindex(columns=columns).rename(columns=columns)
    ax = plot_lines(lines, xlabel="optimizer step", ylabel=ylabel, ax=ax)
    for event, (label, mark, height) in EVENTS.items():
        steps = metrics.loc[metrics["event"] == event, "step"]
        if len(steps):
            across = ax.get_xaxis_transform()  # heights are fractions of the axes
            ax.plot(steps, [height] * len(steps), mark, label=label, transform=across)
    trained = metrics[metrics["step"] > 0].reindex(columns=["step", BEST]).dropna()
    if BEST in columns and len(trained):
        best = trained.loc[trained[BEST].idxmin()]
        ax.plot(best["step"], best[BEST], "*", color=ORANGE, markersize=14, label="best")
    ax.legend(**LEGEND)
    return ax


def plot_forgetting(metrics: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """Draw learning against forgetting: held-out bits per character of 武侠 over general text.

    `metrics` is what `read_metrics` gives; a point a measurement, from the base (square) on.
    """
    course = metrics.reindex(columns=[GENERAL, BEST]).dropna().set_index(GENERAL)
    ax = axes(ax)
    ax.plot(course[:1], "ks", markersize=9, label="base")
    lines = course.rename(columns={BEST: "in training"})
    return plot_lines(lines, xlabel=FORGETTING, ylabel=LEARNING, ax=ax)


def plot_strengths(card: dict[str, Any], *, ax: Axes | None = None) -> Axes:
    """Draw a scorecard's strengths the same way: a point a strength, the base is 0."""
    columns = ["strength", "general", "wuxia"]
    rows = pd.DataFrame(card["strengths"], columns=columns)
    line = rows.set_index("general")["wuxia"].rename("small sample, by strength").to_frame()
    ax = plot_lines(line, xlabel=FORGETTING, ylabel=LEARNING, ax=ax)
    for strength, general, wuxia in rows.itertuples(index=False):
        ax.annotate(f"{strength:g}", (general, wuxia), (5, 3), textcoords="offset points")
    return ax


def plot_bars(table: pd.DataFrame, *, xlabel: str, ax: Axes | None = None) -> Axes:
    """Draw a stacked bar a row, the first row below; a part a column, coloured by its name."""
    ax = axes(ax, rows=len(table))
    colours = [COLOURS.get(name, GREY) for name in table]
    table.rename(index=drawable).plot.barh(ax=ax, stacked=True, color=colours)
    ax.set(xlabel=xlabel, ylabel="")
    ax.legend(**LEGEND)
    return ax


def plot_intervals(table: pd.DataFrame, *, xlabel: str, ax: Axes | None = None) -> Axes:
    """Draw a line a row from its least to its greatest value, the first row on top.

    A column is a dot on each line; the ends of an interval, `low` and `high`, have none.
    """
    rows = table[::-1].rename(index=drawable)
    ax = axes(ax, rows=len(rows))
    ax.hlines(rows.index, rows.min(axis=1), rows.max(axis=1), color=GREY)
    for name in [column for column in rows if column not in ("low", "high")]:
        ax.plot(rows[name], rows.index, "o", color=COLOURS.get(name, GREY), label=name)
    ax.set(xlabel=xlabel, ylim=(-0.6, len(rows) - 0.4))
    ax.legend(**LEGEND)
    return ax


def plot_typical(table: pd.DataFrame, top: int = 20, *, ax: Axes | None = None) -> Axes:
    """Draw how often the most typical words of `corpus.words.typical` stand here and there."""
    rows = table[["here", "there"]].head(top).set_axis(["wuxia", "general"], axis=1)
    ax = plot_intervals(rows, xlabel="uses per 10,000, logarithmic above 1", ax=ax)
    ax.set_xscale("symlog", linthresh=1)
    ax.set_xlim(left=-0.1)
    ax.xaxis.set_major_formatter("{x:g}")  # the usual one writes mathematics
    return ax


def plot_scorecard(card: dict[str, Any], name: str, *, ax: Axes | None = None) -> Axes:
    """Draw the change of a metric and its strata by source; left of the line is a fall.

    A line is a 95 % interval. Those without figures are left out.
    """
    rows = pd.DataFrame(card["metrics"])
    rows = rows[rows["name"].str.startswith(name)].dropna(subset="delta")
    strata = rows["source"] + rows["name"].str.removeprefix(name)
    xlabel = f"change of {name}, tuned − base, {', '.join(rows['unit'].unique())}; 95 % interval"
    names = strata + " (n = " + rows["n"].astype(str) + ")"
    changes = rows[["delta", "low", "high"]].set_index(names)
    ax = plot_intervals(changes, xlabel=xlabel, ax=ax)
    ax.axvline(0, color="black", linewidth=1)
    return ax


def plot_passages(
    card: dict[str, Any], column: str, *, xlabel: str, threshold: float, ax: Axes | None = None
) -> Axes:
    """Draw a figure of each passage by writer: quartiles as a box, what lies far off as dots.

    `column` is one of `card["texts"]`, `copied` or `style`; a dashed line marks the threshold.
    """
    texts = pd.DataFrame(card["texts"], columns=["writer", column]).dropna()
    ax = axes(ax)
    groups = dict(list(texts.groupby("writer", sort=False)[column]))
    names = [f"{who} (n = {len(values)})" for who, values in groups.items()]
    if groups:  # else nothing was measured, for want of text
        ax.boxplot(list(groups.values()), widths=0.5, orientation="horizontal", tick_labels=names)
    ax.axvline(threshold, color="black", linestyle="--")
    ax.yaxis.set_inverted(True)
    ax.set_xlabel(xlabel)
    return ax


def plot_kinds(kinds: Kinds, *, ax: Axes | None = None) -> Axes:
    """Draw masks as a grid, a row a draw: (B, T) of 0 kept, 1 single, 2 span."""
    ax = axes(ax)
    colours = ListedColormap(["#F2F2F2", BLUE, ORANGE])
    ax.imshow(kinds, cmap=colours, vmin=0, vmax=2, aspect="auto", interpolation="nearest")
    ax.set(xlabel="token (blue: single, orange: span)", ylabel="epoch")
    ax.locator_params(axis="y", integer=True)
    return ax
