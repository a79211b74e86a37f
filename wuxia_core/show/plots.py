"""Plots in the reader's language, with a font that has its characters: `ax=None` in, Axes out."""

import functools
from collections.abc import Sequence
from itertools import chain, cycle
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.patches import Patch

from wuxia_core.masking import Kinds
from wuxia_core.messages import messages
from wuxia_core.show.tables import named
from wuxia_core.text import visible

FONT = Path(__file__).parents[1] / "fonts" / "NotoSansSC-Regular-GBK.otf"
# A colour means one thing everywhere. These are told apart by the colour-blind (Okabe & Ito 2008):
# blue and orange are masks, green and pink sources, grey is the base, sky tuned or a run; a split
# is a shade of its source. Lines without a meaning of their own take `LINES` in turn.
BLUE, ORANGE, GREEN, PINK = "#0072B2", "#D55E00", "#009E73", "#CC79A7"
INK, SKY, YELLOW = "#777777", "#56B4E9", "#E69F00"  # INK can be read on white and on black
COLOURS = {"wuxia": GREEN, "general": PINK, "base": INK, "tuned": SKY, "delta": SKY, "loss": SKY}
COLOURS |= {f"eval_{name}_loss": COLOURS[name] for name in ("wuxia", "general")}
COLOURS |= {f"eval_{name}_bits_per_char": COLOURS[name] for name in ("wuxia", "general")}
COLOURS |= {"human": GREEN, "few_shot": INK}
LINES = ((SKY, YELLOW, INK, ORANGE, BLUE, GREEN, PINK), ("-", "--", ":", "-."))
SHADES = {"train": 1.0, "validation": 0.55, "unused": 0.3, "duplicate": 0.15}
LEGEND: dict[str, Any] = {"loc": "upper left", "bbox_to_anchor": (1.01, 1), "frameon": False}
EVENTS = {"checkpoint": ("^", INK, 0.02), "resumed": ("v", ORANGE, 0.98)}
BEST = "eval_wuxia_bits_per_char"  # what the adapter that is kept has the fewest of
GENERAL = "eval_general_bits_per_char"
STYLE: dict[Any, Any] = {"axes.unicode_minus": False, "text.parse_math": False}
STYLE |= {f"{part}.color": INK for part in ("text", "xtick", "ytick")}
STYLE |= {"axes.edgecolor": INK, "axes.labelcolor": INK, "axes.facecolor": "none"}


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
    """Return `ax`, or new ones; from here on plots write Chinese and take `$` for a dollar.

    New ones are 9 cm high, or as high as so many `rows` of bars need. They have no background, and
    their words can be read on white and on black.
    """
    plt.rcParams.update(STYLE | {"font.family": _fonts()[0]})
    if ax is None:
        size = (7.5, 3.6 if rows is None else 1.2 + 0.3 * rows)
        _, ax = plt.subplots(figsize=size, frameon=False, layout="constrained")
    ax.spines[["top", "right"]].set_visible(False)
    return ax


def _label(ax: Axes, xlabel: str, ylabel: str = "") -> Axes:
    """Name the axes and what is drawn in the reader's language; say so where that is nothing."""
    ax.set(xlabel=named(xlabel), ylabel=named(ylabel))
    if not np.isfinite(ax.dataLim.get_points()).all():
        ax.clear()
        ax.set_axis_off()
        ax.figure.set(figheight=0.5)
        ax.text(0, 0.5, messages("plots")["nothing"], va="center")
    elif ax.get_legend_handles_labels()[0]:
        ax.legend(**LEGEND)
    return ax


def plot_lines(lines: pd.DataFrame, *, xlabel: str, ylabel: str, ax: Axes | None = None) -> Axes:
    """Draw a line a column, its values over the index; what is missing is left out."""
    ax, others = axes(ax), zip(*map(cycle, LINES), strict=False)
    for name, values in lines.items():
        there, known = values.dropna(), COLOURS.get(str(name))
        colour, dash = (known, "-") if known else next(others)
        label = drawable(named(str(name)))
        ax.plot(there.index, there, dash, color=colour, marker=".", label=label)
    return _label(ax, xlabel, ylabel)


def plot_metric(
    metrics: pd.DataFrame, columns: Sequence[str], *, ylabel: str, ax: Axes | None = None
) -> Axes:
    """Draw columns of `metrics.jsonl` over steps.

    Checkpoints are marked below, restarts above, and of held-out bits per character the best.
    """
    lines = metrics.set_index("step").reindex(columns=columns)
    ax = plot_lines(lines, xlabel="step", ylabel=ylabel, ax=ax)
    for event, (mark, colour, height) in EVENTS.items():
        steps = metrics.loc[metrics["event"] == event, "step"]
        if len(steps):
            across, heights = ax.get_xaxis_transform(), [height] * len(steps)  # of the axes
            ax.plot(steps, heights, mark, color=colour, label=named(event), transform=across)
    trained = metrics[metrics["step"] > 0].reindex(columns=["step", BEST]).dropna()
    if BEST in columns and len(trained):
        best = trained.loc[trained[BEST].idxmin()]
        x, y = best["step"], best[BEST]
        ax.plot(x, y, "*", color=GREEN, markersize=14, label=named("best"))
    return _label(ax, "step", ylabel)


def plot_forgetting(metrics: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """Draw learning against forgetting: held-out bits per character of 武侠 over general text.

    `metrics` is what `read_metrics` gives; a point a measurement, from the base (square) on.
    """
    course = metrics.reindex(columns=[GENERAL, BEST]).dropna().set_index(GENERAL)
    ax = axes(ax)
    ax.plot(course[:1], "s", color=INK, markersize=9, label=named("base"))
    lines = course.rename(columns={BEST: "in training"})
    return plot_lines(lines, xlabel="forgetting", ylabel="learning", ax=ax)


def plot_strengths(scorecard: dict[str, Any], *, ax: Axes | None = None) -> Axes:
    """Draw a scorecard's strengths the same way: a point a strength, the base is 0."""
    columns = ["strength", "general", "wuxia"]
    rows = pd.DataFrame(scorecard["strengths"], columns=columns)
    line = rows.set_index("general")["wuxia"].rename("by strength").to_frame()
    ax = plot_lines(line, xlabel="forgetting", ylabel="learning", ax=ax)
    ax.ticklabel_format(useOffset=False)
    for strength, general, wuxia in rows.itertuples(index=False):
        ax.annotate(f"{strength:g}", (general, wuxia), (5, 3), textcoords="offset points")
    return ax


def plot_bars(table: pd.DataFrame, *, xlabel: str, ax: Axes | None = None) -> Axes:
    """Draw a stacked bar a row (source, name), the first row below; a part a column, a shade."""
    ax = axes(ax, rows=len(table))
    colours = [COLOURS[source] for source, _ in table.index]
    names, left = [drawable(name) for _, name in table.index], 0
    parts = [part for part in SHADES if part in table]
    for part in parts:
        shades = [(colour, SHADES[part]) for colour in colours]
        ax.barh(names, table[part], left=left, color=shades)
        left = left + table[part].to_numpy()
    handles = [Patch(color=(INK, SHADES[part]), label=named(part)) for part in parts]
    _label(ax, xlabel).legend(handles=handles, **LEGEND)
    return ax


def plot_intervals(table: pd.DataFrame, *, xlabel: str, ax: Axes | None = None) -> Axes:
    """Draw a line a row from its least to its greatest value, the first row on top.

    A column is a dot on each line; the ends of an interval, `low` and `high`, have none.
    """
    rows = table[::-1].rename(index=drawable)
    ax = axes(ax, rows=len(rows))
    ax.hlines(rows.index, rows.min(axis=1), rows.max(axis=1), color=INK)
    for name in [column for column in rows if column not in ("low", "high")]:
        colour = COLOURS.get(name, INK)
        ax.plot(rows[name], rows.index, "o", color=colour, label=named(name))
    ax.set_ylim(-0.6, max(0, len(rows) - 0.4))
    return _label(ax, xlabel)


def plot_typical(table: pd.DataFrame, top: int = 20, *, ax: Axes | None = None) -> Axes:
    """Draw how often the most typical words of `corpus.words.typical` stand here and there."""
    rows = table[["here", "there"]].head(top).set_axis(["wuxia", "general"], axis=1)
    ax = plot_intervals(rows, xlabel="uses", ax=ax)
    if len(rows):
        ax.set_xscale("symlog", linthresh=1)
        ax.set_xlim(left=-0.1)
        ax.xaxis.set_major_formatter("{x:g}")  # the usual one writes mathematics
    return ax


def plot_scorecard(scorecard: dict[str, Any], name: str, *, ax: Axes | None = None) -> Axes:
    """Draw the change of a metric and its strata by source; left of the line is a fall.

    A line is a 95 % interval. Those without figures are left out.
    """
    rows = pd.DataFrame(scorecard["metrics"])
    rows = rows[rows["name"].str.startswith(name)].dropna(subset="delta")
    strata = rows["name"].str.removeprefix(name + ", ").str.removeprefix(name).map(named)
    sources = rows["source"].map(named) + strata.map(lambda stratum: stratum and f", {stratum}")
    names = sources + " (n = " + rows["n"].astype(str) + ")"
    changes = rows[["delta", "low", "high"]].set_index(names)
    ax = plot_intervals(changes, xlabel=messages("plots")["change"].format(named(name)), ax=ax)
    if len(changes):
        ax.axvline(0, color=INK, linewidth=1)
    return ax


def plot_passages(
    scorecard: dict[str, Any], column: str, *, xlabel: str, threshold: float, ax: Axes | None = None
) -> Axes:
    """Draw a figure of each passage by writer: quartiles as a box, what lies far off as dots.

    `column` is one of `scorecard["texts"]`, `copied` or `style`; a dashed line marks the threshold.
    """
    texts = pd.DataFrame(scorecard["texts"], columns=["writer", column]).dropna()
    ax, names = axes(ax), []
    for place, (who, values) in enumerate(texts.groupby("writer", sort=False)[column], 1):
        names.append(f"{named(who)} (n = {len(values)})")
        drawn = ax.boxplot(
            values, positions=[place], orientation="horizontal", widths=0.5, tick_labels=names[-1:]
        )
        for line in chain(*drawn.values()):
            line.set(color=COLOURS[who], markeredgecolor=COLOURS[who])
    _label(ax, xlabel)
    if names:
        ax.axvline(threshold, color=INK, linestyle="--")
        ax.yaxis.set_inverted(True)
    return ax


def plot_kinds(kinds: Kinds, *, ax: Axes | None = None) -> Axes:
    """Draw masks as a grid, a row a draw: (B, T) of 0 kept, 1 single, 2 span."""
    ax = axes(ax)
    colours = ListedColormap(["#80808026", BLUE, ORANGE])
    ax.imshow(kinds, cmap=colours, vmin=0, vmax=2, aspect="auto", interpolation="nearest")
    ax.set(xlabel=messages("plots")["kinds"], ylabel=named("epoch"))
    ax.locator_params(axis="y", integer=True)
    return ax
