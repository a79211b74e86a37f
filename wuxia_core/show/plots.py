"""Plots in the reader's language, with a bundled Chinese font.

Each draws on the axes `ax`, or on new ones where there are none, and returns the axes.
"""

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
# is a shade of its source. Lines without a meaning take `LINE_COLOURS` and `LINE_DASHES` in turn.
BLUE, ORANGE, GREEN, PINK = "#0072B2", "#D55E00", "#009E73", "#CC79A7"
INK, SKY, YELLOW = "#777777", "#56B4E9", "#E69F00"  # INK can be read on white and on black
COLOURS = {"wuxia": GREEN, "general": PINK, "base": INK, "tuned": SKY, "delta": SKY, "loss": SKY}
COLOURS |= {f"eval_{name}_loss": COLOURS[name] for name in ("wuxia", "general")}
COLOURS |= {f"eval_{name}_bits_per_char": COLOURS[name] for name in ("wuxia", "general")}
COLOURS |= {"human": GREEN, "few_shot": INK}
LINE_COLOURS = (SKY, YELLOW, INK, ORANGE, BLUE, GREEN, PINK)
LINE_DASHES = ("-", "--", ":", "-.")
SHADES = {"train": 1.0, "validation": 0.55, "unused": 0.3, "duplicate": 0.15}  # opacity by split
LEGEND: dict[str, Any] = {"loc": "upper left", "bbox_to_anchor": (1.01, 1), "frameon": False}
# Marker, colour and height in the axes (0 to 1) of events of a run.
EVENTS = {"checkpoint": ("^", INK, 0.02), "resumed": ("v", ORANGE, 0.98)}
# Columns of metrics.jsonl. The adapter that a run keeps is the one with the least `BEST`.
BEST, GENERAL = "eval_wuxia_bits_per_char", "eval_general_bits_per_char"
STYLE: dict[Any, Any] = {"axes.unicode_minus": False, "text.parse_math": False}
STYLE |= {f"{part}.color": INK for part in ("text", "xtick", "ytick")}
STYLE |= {"axes.edgecolor": INK, "axes.labelcolor": INK, "axes.facecolor": "none"}


@functools.cache
def _fonts() -> tuple[list[str], frozenset[int]]:
    """Load the bundled font; return the font families, and the code points that they can write."""
    font_manager.fontManager.addfont(FONT)
    names = [font_manager.FontProperties(fname=FONT).get_name(), "DejaVu Sans"]
    maps = [font_manager.get_font(font_manager.findfont(name)).get_charmap() for name in names]
    return names, frozenset().union(*maps)


def drawable(text: str) -> str:
    """Make a text fit for a plot: `visible`, and characters that the fonts lack as ⟨U+20BB7⟩."""
    return "".join(
        c if ord(c) in _fonts()[1] or c.isspace() else f"⟨U+{ord(c):04X}⟩" for c in visible(text)
    )


def axes(ax: Axes | None = None, *, rows: int | None = None) -> Axes:
    """Return `ax`, or new axes; from this call on plots write Chinese, and `$` as a dollar sign.

    New axes are 9 cm high, or as high as `rows` bars need. They have no background, and their words
    can be read on white and on black.
    """
    plt.rcParams.update(STYLE | {"font.family": _fonts()[0]})
    if ax is None:
        size = (7.5, 3.6 if rows is None else 1.2 + 0.3 * rows)
        _, ax = plt.subplots(figsize=size, frameon=False, layout="constrained")
    ax.spines[["top", "right"]].set_visible(False)
    return ax


def _finish_axes(ax: Axes, xlabel: str, ylabel: str = "") -> Axes:
    """Name the axes in the reader's language and draw the legend, if anything has a label.

    Where nothing is drawn, a sentence that says so takes the place of the axes.
    """
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
    """Draw a line for each column, its values over the index; missing values are left out."""
    ax, styles = axes(ax), zip(cycle(LINE_COLOURS), cycle(LINE_DASHES), strict=False)
    for name, values in lines.items():
        points, label = values.dropna(), drawable(named(str(name)))
        own_colour = COLOURS.get(str(name))
        colour, dash = (own_colour, "-") if own_colour else next(styles)
        ax.plot(points.index, points, dash, color=colour, marker=".", label=label)
    return _finish_axes(ax, xlabel, ylabel)


def plot_metric(
    metrics: pd.DataFrame, columns: Sequence[str], *, ylabel: str, ax: Axes | None = None
) -> Axes:
    """Draw columns of `metrics`, the table of `read_metrics`, over the steps of a run.

    Checkpoints are marked at the bottom, restarts at the top. The least bits per character of
    held-out 武侠 have a star: that adapter is kept.
    """
    lines = metrics.set_index("step").reindex(columns=columns)
    ax = plot_lines(lines, xlabel="step", ylabel=ylabel, ax=ax)
    for event, (mark, colour, height) in EVENTS.items():
        steps = metrics.loc[metrics["event"] == event, "step"]
        if len(steps):
            # x in steps, y from 0 at the bottom of the axes to 1 at the top.
            transform, heights = ax.get_xaxis_transform(), [height] * len(steps)
            ax.plot(steps, heights, mark, color=colour, label=named(event), transform=transform)
    trained = metrics[metrics["step"] > 0].reindex(columns=["step", BEST]).dropna()
    if BEST in columns and len(trained):
        best = trained.loc[trained[BEST].idxmin()]
        ax.plot(best["step"], best[BEST], "*", color=GREEN, markersize=14, label=named("best"))
    return _finish_axes(ax, "step", ylabel)


def plot_forgetting(metrics: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """Draw learning against forgetting: held-out bits per character of 武侠 over general text.

    `metrics` is the table of `read_metrics`. Each measurement is a point, the base's a square.
    """
    course = metrics.reindex(columns=[GENERAL, BEST]).dropna().set_index(GENERAL)
    ax = axes(ax)
    ax.plot(course[:1], "s", color=INK, markersize=9, label=named("base"))
    lines = course.rename(columns={BEST: "in training"})
    return plot_lines(lines, xlabel="forgetting", ylabel="learning", ax=ax)


def plot_strengths(scorecard: dict[str, Any], *, ax: Axes | None = None) -> Axes:
    """Draw learning against forgetting by strength: each strength is a point with its number."""
    rows = pd.DataFrame(scorecard["strengths"], columns=["strength", "general", "wuxia"])
    line = rows.set_index("general")["wuxia"].rename("by strength").to_frame()
    ax = plot_lines(line, xlabel="forgetting", ylabel="learning", ax=ax)
    ax.ticklabel_format(useOffset=False)
    for strength, general, wuxia in rows.itertuples(index=False):
        ax.annotate(f"{strength:g}", (general, wuxia), (5, 3), textcoords="offset points")
    return ax


def plot_bars(table: pd.DataFrame, *, xlabel: str, ax: Axes | None = None) -> Axes:
    """Draw a stacked bar for each row, the first row at the bottom.

    The index of `table` is (source, name), which give the bar's colour and label. The columns are
    splits of `SHADES`, each a part of the bar in a shade of its colour.
    """
    ax = axes(ax, rows=len(table))
    colours = [COLOURS[source] for source, _ in table.index]
    names, left = [drawable(name) for _, name in table.index], 0
    parts = [part for part in SHADES if part in table]
    for part in parts:
        shades = [(colour, SHADES[part]) for colour in colours]
        ax.barh(names, table[part], left=left, color=shades)
        left = left + table[part].to_numpy()
    handles = [Patch(color=(INK, SHADES[part]), label=named(part)) for part in parts]
    _finish_axes(ax, xlabel).legend(handles=handles, **LEGEND)
    return ax


def plot_intervals(table: pd.DataFrame, *, xlabel: str, ax: Axes | None = None) -> Axes:
    """Draw each row as a line from its least to its greatest value, the first row on top.

    Each column is a dot on the lines; only the ends of an interval, `low` and `high`, have no dots.
    """
    rows = table[::-1].rename(index=drawable)
    ax = axes(ax, rows=len(rows))
    ax.hlines(rows.index, rows.min(axis=1), rows.max(axis=1), color=INK)
    for name in [column for column in rows if column not in ("low", "high")]:
        colour = COLOURS.get(name, INK)
        ax.plot(rows[name], rows.index, "o", color=colour, label=named(name))
    ax.set_ylim(-0.6, max(0, len(rows) - 0.4))
    return _finish_axes(ax, xlabel)


def plot_typical(table: pd.DataFrame, top: int = 20, *, ax: Axes | None = None) -> Axes:
    """Draw the uses of the first `top` words of `corpus.words.typical` in 武侠 and elsewhere."""
    rows = table[["here", "there"]].head(top).set_axis(["wuxia", "general"], axis=1)
    ax = plot_intervals(rows, xlabel="uses", ax=ax)
    if len(rows):
        ax.set_xscale("symlog", linthresh=1)
        ax.set_xlim(left=-0.1)
        ax.xaxis.set_major_formatter("{x:g}")  # the default one writes mathematics
    return ax


def plot_scorecard(scorecard: dict[str, Any], name: str, *, ax: Axes | None = None) -> Axes:
    """Draw the change of a metric and of its strata by source, with 95 % intervals.

    `name` is that of the metric, such as "masked_accuracy". A change left of the line at 0 is a
    fall. Rows of the scorecard without figures are left out.
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
    """Draw a figure of all passages by writer: quartiles as a box, outliers as dots.

    `column` is one of `scorecard["texts"]`, `copied` or `style`; a dashed line marks the threshold.
    """
    texts = pd.DataFrame(scorecard["texts"], columns=["writer", column]).dropna()
    ax = axes(ax)
    for place, (writer, values) in enumerate(texts.groupby("writer", sort=False)[column], 1):
        label = f"{named(writer)} (n = {len(values)})"
        lines = ax.boxplot(
            values, positions=[place], orientation="horizontal", widths=0.5, tick_labels=[label]
        )
        for line in chain(*lines.values()):
            line.set(color=COLOURS[writer], markeredgecolor=COLOURS[writer])
    _finish_axes(ax, xlabel)
    if len(texts):
        ax.axvline(threshold, color=INK, linestyle="--")
        ax.yaxis.set_inverted(True)
    return ax


def plot_kinds(kinds: Kinds, *, ax: Axes | None = None) -> Axes:
    """Draw a window's masks, a row an epoch: (epochs, T) of 0 (kept), 1 (single) and 2 (span)."""
    ax = axes(ax)
    colours = ListedColormap(["#80808026", BLUE, ORANGE])
    ax.imshow(kinds, cmap=colours, vmin=0, vmax=2, aspect="auto", interpolation="nearest")
    ax.set(xlabel=messages("plots")["kinds"], ylabel=named("epoch"))
    ax.locator_params(axis="y", integer=True)
    return ax
