"""Plots in the reader's language, with a bundled Chinese font.

Each function `plot_…` draws on the axes `ax`, or on new ones if that is None, and returns the axes.
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
# Where a legend stands: beside the axes, at the right.
LEGEND: dict[str, Any] = {"loc": "upper left", "bbox_to_anchor": (1.01, 1), "frameon": False}
# Events of a run that are drawn: marker, colour and height, from 0 (bottom of the axes) to 1 (top).
EVENTS = {"checkpoint": ("^", INK, 0.02), "resumed": ("v", ORANGE, 0.98)}
# Columns of metrics.jsonl: held-out bits per character. A run keeps the adapter of the step with
# the least in the first one.
WUXIA_BITS, GENERAL_BITS = "eval_wuxia_bits_per_char", "eval_general_bits_per_char"
# Settings of matplotlib.
STYLE: dict[Any, Any] = {"axes.unicode_minus": False, "text.parse_math": False}
STYLE |= {f"{part}.color": INK for part in ("text", "xtick", "ytick")}
STYLE |= {"axes.edgecolor": INK, "axes.labelcolor": INK, "axes.facecolor": "none"}


@functools.cache
def _fonts() -> tuple[list[str], frozenset[int]]:
    """Load the bundled font; return the families of fonts, and the code points that they cover.

    A code point is covered if at least one of the fonts has it.
    """
    font_manager.fontManager.addfont(FONT)
    names = [font_manager.FontProperties(fname=FONT).get_name(), "DejaVu Sans"]
    maps = [font_manager.get_font(font_manager.findfont(name)).get_charmap() for name in names]
    return names, frozenset().union(*maps)


def drawable(text: str) -> str:
    """Apply `visible`, and write characters that the fonts lack as numbers: ⟨U+20BB7⟩."""
    _, code_points = _fonts()
    return "".join(
        c if ord(c) in code_points or c.isspace() else f"⟨U+{ord(c):04X}⟩" for c in visible(text)
    )


def use_style() -> None:
    """Set matplotlib: from now on all plots write Chinese, and `$` as a dollar sign."""
    plt.rcParams.update(STYLE | {"font.family": _fonts()[0]})


def axes(ax: Axes | None = None, *, rows: int | None = None) -> Axes:
    """Return `ax`, or new axes if it is None, without a line at the top and at the right.

    New axes are 9 cm high, or as high as `rows` bars need. They have no background, and their words
    can be read on white and on black. The call also changes matplotlib's settings, by `use_style`.
    """
    use_style()
    if ax is None:
        height = 3.6 if rows is None else 1.2 + 0.3 * rows  # inches
        _, ax = plt.subplots(figsize=(7.5, height), frameon=False, layout="constrained")
    ax.spines[["top", "right"]].set_visible(False)
    return ax


def _finish_axes(ax: Axes, xlabel: str, ylabel: str = "") -> Axes:
    """Name the axes in the reader's language, and draw a legend if anything has a label.

    `xlabel` and `ylabel` are translated by `named`. If nothing is drawn, a sentence that says so
    takes the place of the axes.
    """
    ax.set(xlabel=named(xlabel), ylabel=named(ylabel))
    if not np.isfinite(ax.dataLim.get_points()).all():  # nothing is drawn: it has infinite bounds
        ax.clear()
        ax.set_axis_off()
        ax.figure.set(figheight=0.5)
        ax.text(0, 0.5, messages("plots")["nothing"], va="center")
    elif ax.get_legend_handles_labels()[0]:
        ax.legend(**LEGEND)
    return ax


def plot_lines(lines: pd.DataFrame, *, xlabel: str, ylabel: str, ax: Axes | None = None) -> Axes:
    """Draw a line for each column of `lines`: its values upwards, the index to the right.

    Missing values are left out: the line joins the points beside them. The labels of the axes, and
    the names of columns in the legend, are translated by `named`. A column that has no colour in
    `COLOURS` takes the next colour of `LINE_COLOURS` and the next dashes of `LINE_DASHES`.
    """
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
    """Draw `columns` of `metrics`, the table of `read_metrics`, over the steps of a run.

    Checkpoints are marked at the bottom, and the steps that the run was resumed from at the top. If
    `columns` has the bits per character of held-out 武侠, a star marks their least value: the run
    keeps the adapter of that step. Step 0 does not count, since its adapter is untrained: it is the
    base.
    """
    lines = metrics.set_index("step").reindex(columns=columns)
    ax = plot_lines(lines, xlabel="step", ylabel=ylabel, ax=ax)
    for event, (mark, colour, height) in EVENTS.items():
        steps = metrics.loc[metrics["event"] == event, "step"]
        if len(steps):
            # x in steps, y from 0 at the bottom of the axes to 1 at the top.
            transform, heights = ax.get_xaxis_transform(), [height] * len(steps)
            ax.plot(steps, heights, mark, color=colour, label=named(event), transform=transform)
    trained = metrics[metrics["step"] > 0].reindex(columns=["step", WUXIA_BITS]).dropna()
    if WUXIA_BITS in columns and len(trained):
        step, bits = trained.loc[trained[WUXIA_BITS].idxmin()]
        ax.plot(step, bits, "*", color=GREEN, markersize=14, label=named("best"))
    return _finish_axes(ax, "step", ylabel)  # once more, for a legend with the marks


def plot_forgetting(metrics: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """Draw learning against forgetting: held-out bits per character of 武侠 over general text.

    Those of 武侠 go upwards, those of general text to the right. `metrics` is the table of
    `read_metrics`. Each measurement is a point, and a line joins the points in the order in which
    they were measured. The first point, that of the base, is a square.
    """
    course = metrics.reindex(columns=[GENERAL_BITS, WUXIA_BITS]).dropna().set_index(GENERAL_BITS)
    base, ax = course[:1], axes(ax)
    ax.plot(base.index, base[WUXIA_BITS], "s", color=INK, markersize=9, label=named("base"))
    lines = course.rename(columns={WUXIA_BITS: "in training"})
    return plot_lines(lines, xlabel="forgetting", ylabel="learning", ax=ax)


def plot_strengths(scorecard: dict[str, Any], *, ax: Axes | None = None) -> Axes:
    """Draw learning against forgetting by strength: bits per character of 武侠 over general text.

    Those of 武侠 go upwards, those of general text to the right. Each strength in
    `scorecard["strengths"]` is a point on a line, with the strength written beside it.
    """
    rows = pd.DataFrame(scorecard["strengths"], columns=["strength", "general", "wuxia"])
    line = rows.set_index("general")["wuxia"].rename("by strength").to_frame()
    ax = plot_lines(line, xlabel="forgetting", ylabel="learning", ax=ax)
    ax.ticklabel_format(useOffset=False)  # ticks show full figures, not differences from one
    for strength, general, wuxia in rows.itertuples(index=False):
        ax.annotate(f"{strength:g}", (general, wuxia), (5, 3), textcoords="offset points")
    return ax


def plot_bars(table: pd.DataFrame, *, xlabel: str, ax: Axes | None = None) -> Axes:
    """Draw a stacked bar for each row, the first row at the bottom.

    The index of `table` is (source, name): the source gives the bar its colour, the name its label.
    The columns are splits: each one in `SHADES` is a part of the bar in a shade of its colour.
    """
    ax = axes(ax, rows=len(table))
    colours = [COLOURS[source] for source, _ in table.index]
    names, left = [drawable(name) for _, name in table.index], 0
    splits = [split for split in SHADES if split in table]
    for split in splits:
        shades = [(colour, SHADES[split]) for colour in colours]
        # At 0, 1, 2, …, since two rows may have one name.
        ax.barh(range(len(names)), table[split], left=left, color=shades, tick_label=names)
        left = left + table[split].to_numpy()  # (bars,): where the next part of each bar begins
    handles = [Patch(color=(INK, SHADES[split]), label=named(split)) for split in splits]
    _finish_axes(ax, xlabel).legend(handles=handles, **LEGEND)
    ax.locator_params(axis="x", nbins=5)
    ax.xaxis.set_major_formatter("{x:,.0f}")
    return ax


def plot_intervals(table: pd.DataFrame, *, xlabel: str, ax: Axes | None = None) -> Axes:
    """Draw each row of `table` as a line from its least to its greatest value, the first on top.

    The index labels the lines. Each value is a dot on its line, in the colour of its column; only
    the columns `low` and `high`, the ends of an interval, have no dots.
    """
    rows = table[::-1].rename(index=drawable)
    ax = axes(ax, rows=len(rows))
    ax.hlines(rows.index, rows.min(axis=1), rows.max(axis=1), color=INK)
    for name in [column for column in rows if column not in ("low", "high")]:
        colour = COLOURS.get(name, INK)
        ax.plot(rows[name], rows.index, "o", color=colour, label=named(name))
    ax.set_ylim(-0.6, max(0, len(rows) - 0.4))  # the lines are at 0, 1, 2, …
    return _finish_axes(ax, xlabel)


def plot_typical(table: pd.DataFrame, top: int = 20, *, ax: Axes | None = None) -> Axes:
    """Draw how often the first `top` words of `table` are used, in 武侠 and in general text.

    `table` is that of `corpus.words.typical`, of 武侠 against general text. The figures are uses in
    10,000 words; their scale is logarithmic above 1.
    """
    rows = table[["here", "there"]].head(top).set_axis(["wuxia", "general"], axis=1)
    ax = plot_intervals(rows, xlabel="uses", ax=ax)
    if len(rows):
        ax.set_xscale("symlog", linthresh=1)
        ax.set_xlim(left=-0.1)
        ax.xaxis.set_major_formatter("{x:g}")  # the default formatter writes mathematics
    return ax


def plot_scorecard(scorecard: dict[str, Any], name: str, *, ax: Axes | None = None) -> Axes:
    """Draw the change of the metric `name` for each source and stratum, with 95 % intervals.

    For "masked_accuracy" the rows are that metric and its strata, "masked_accuracy, single" and so
    on. They are labelled `武侠 (n = 40)`, `武侠, single (n = 40)` and so on. A change left of the
    line at 0 is a fall. Rows of the scorecard without figures are left out.
    """
    rows = pd.DataFrame(scorecard["metrics"])
    rows = rows[rows["name"].str.startswith(name)].dropna(subset="delta")
    strata = rows["name"].str.removeprefix(name).str.removeprefix(", ").map(named)
    labels = (rows["source"].map(named) + ", " + strata).str.removesuffix(", ")
    labels += " (n = " + rows["n"].astype(str) + ")"
    changes = rows[["delta", "low", "high"]].set_index(labels)
    ax = plot_intervals(changes, xlabel=messages("plots")["change"].format(named(name)), ax=ax)
    if len(changes):
        ax.axvline(0, color=INK, linewidth=1)
    return ax


def plot_passages(
    scorecard: dict[str, Any], column: str, *, xlabel: str, threshold: float, ax: Axes | None = None
) -> Axes:
    """Draw how a figure of the passages varies, by writer: quartiles as a box, outliers as dots.

    `column` names the figure in `scorecard["texts"]`: "copied" or "style". A dashed line marks the
    `threshold`. Passages without the figure are left out.
    """
    texts = pd.DataFrame(scorecard["texts"], columns=["writer", column]).dropna()
    ax = axes(ax)
    for place, (writer, values) in enumerate(texts.groupby("writer", sort=False)[column], 1):
        label = f"{named(writer)} (n = {len(values)})"
        parts = ax.boxplot(
            values, positions=[place], orientation="horizontal", widths=0.5, tick_labels=[label]
        )
        for line in chain(*parts.values()):  # of the box, the whiskers, the outliers and so on
            line.set(color=COLOURS[writer], markeredgecolor=COLOURS[writer])
    _finish_axes(ax, xlabel)
    if len(texts):
        ax.axvline(threshold, color=INK, linestyle="--")
        ax.yaxis.set_inverted(True)  # the first writer on top
    return ax


def plot_kinds(kinds: Kinds, *, ax: Axes | None = None) -> Axes:
    """Draw a window's masks, a row an epoch; `kinds` (epochs, T) are as in `SpanMasker.kinds`."""
    ax = axes(ax)
    colours = ListedColormap(["#80808026", BLUE, ORANGE])  # of 0 (kept), 1 (single), 2 (span)
    ax.imshow(kinds, cmap=colours, vmin=0, vmax=2, aspect="auto", interpolation="nearest")
    ax.set(xlabel=messages("plots")["kinds"], ylabel=named("epoch"))
    ax.locator_params(axis="y", integer=True)
    return ax
