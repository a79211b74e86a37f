"""The scorecard in pictures, each readable alone."""

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from wuxia_core.evaluate.copying import FLAGGED
from wuxia_core.show.plots import BLUE, GREEN, GREY, ORANGE, SOURCE_COLOURS, axes
from wuxia_core.show.text import visible

if TYPE_CHECKING:
    from matplotlib.axes import Axes

STRATUM = "masked_accuracy, "
WRITERS = {
    "base": ("base", BLUE),
    "few_shot": ("base after an example", "#56B4E9"),
    "tuned": ("tuned", ORANGE),
    "human": ("held-out human text", GREEN),
}


def scorecard_table(card: dict[str, Any]) -> pd.DataFrame:
    """Put a scorecard's metrics in a table for people; tokens by stratum are in `plot_recovery`.

    `unit` also says why there are no figures, or no verdict.
    """
    columns = ["source", "name", "base", "tuned", "delta", "low", "high", "p_holm", "n"]
    columns += ["few_shot", "human", "unit"]
    rows = [row for row in card["metrics"] if not row["name"].startswith(STRATUM)]
    units = ["; ".join([row["unit"], *filter(None, [row.get("reason")])]) for row in rows]
    return pd.DataFrame(rows).assign(unit=units).reindex(columns=columns)


def plot_scorecard(card: dict[str, Any], name: str, ax: "Axes | None" = None) -> "Axes":
    """Draw a metric's change by source with its 95 % interval; left of the line is a fall."""
    rows = [row for row in card["metrics"] if row["name"] == name and row["delta"] is not None]
    ax = axes(ax, size=(7.5, 1.4 + 0.4 * len(rows)))
    for place, row in enumerate(rows):
        error = [[row["delta"] - row["low"]], [row["high"] - row["delta"]]]
        colour = SOURCE_COLOURS.get(row["source"], GREY)
        ax.errorbar(row["delta"], place, xerr=error, fmt="o", color=colour, capsize=4)
    ax.axvline(0, color="black", linewidth=1)
    labels = [f"{row['source']} (n = {row['n']})" for row in rows]
    ax.set_yticks(range(len(rows)), labels)
    ax.set_ylim(-0.6, len(rows) - 0.4)
    unit = rows[0]["unit"] if rows else ""
    ax.set_xlabel(f"change of {name}, tuned − base, {unit} (95 % interval)")
    return ax


def plot_forgetting(metrics: pd.DataFrame, ax: "Axes | None" = None) -> "Axes":
    """Draw learning against forgetting: held-out bits per character of 武侠 over general text.

    `metrics` is what `read_metrics` gives; a point a measurement, from the base (square) on.
    """
    columns = [f"eval_{source}_bits_per_char" for source in ("general", "wuxia")]
    course = metrics.reindex(columns=["step", *columns]).dropna()
    ax = axes(ax, size=(6, 4.5))
    x, y = (course[column].to_numpy() for column in columns)
    ax.plot(x, y, "-", color=GREY, linewidth=1)
    points = ax.scatter(x, y, c=course["step"], cmap="viridis", zorder=3)
    if len(course):
        ax.plot(x[0], y[0], "s", color="black", markersize=9)
        ax.axvline(x[0], color="black", linewidth=0.5)
        ax.axhline(y[0], color="black", linewidth=0.5)
        ax.figure.colorbar(points, ax=ax, label="step")
    ax.set_xlabel("general text, bits per character: to the right is forgetting")
    ax.set_ylabel("武侠, bits per character: down is learning")
    return ax


def plot_recovery(card: dict[str, Any], ax: "Axes | None" = None) -> "Axes":
    """Draw the share of masked tokens that are found, by stratum, with the two baselines."""
    rows = [row for row in card["metrics"] if row["name"].startswith(STRATUM)]
    rows = [row for row in rows if row["delta"] is not None]
    ax = axes(ax, size=(7.5, 1.2 + 0.42 * len(rows)))
    places = np.arange(len(rows))[::-1]
    for shift, side in ((0.19, "base"), (-0.19, "tuned")):
        label, colour = WRITERS[side]
        ax.barh(places + shift, [row[side] for row in rows], 0.36, color=colour, label=label)
    for side, dashes in (("unigram", (1, 1)), ("trigram", (4, 2))):
        found = [row[side] for row in rows]
        ax.vlines(found, places - 0.42, places + 0.42, "black", (0, dashes), label=side)
    names = [f"{row['name'].removeprefix(STRATUM)} (n = {row['n']})" for row in rows]
    ax.set_yticks(places, names)
    ax.set_xlabel("share of masked tokens found; n documents")
    ax.legend(frameon=False, loc="lower right")
    return ax


def plot_map(card: dict[str, Any], ax: "Axes | None" = None) -> "Axes":
    """Draw where pools of 2,000 characters lie by their commonest characters."""
    people = {"wuxia": ("武侠, trained on", GREY), "general": ("general text", "#CC79A7")}
    places = pd.DataFrame(card["map"], columns=["who", "x", "y"])
    ax = axes(ax, size=(6, 4.5))
    for who, (label, colour) in (people | WRITERS).items():
        rows = places[places["who"] == who]
        if len(rows):
            mark, size = ("o", 4) if who in people else ("D", 9)
            name = f"{label} (n = {len(rows)})"
            ax.plot(rows["x"], rows["y"], mark, color=colour, label=name, markersize=size)
    ax.set_xlabel("first principal component of the z-scores")
    ax.set_ylabel("second")
    ax.legend(frameon=False, fontsize="small")
    return ax


def plot_copied(card: dict[str, Any], ax: "Axes | None" = None) -> "Axes":
    """Draw the share of passages whose longest run shared with training text is at most so long."""
    ax = axes(ax)
    for writer, rows in _by_writer(card, "copied"):
        label, colour = WRITERS[writer]
        ax.ecdf(rows, color=colour, label=f"{label} (n = {len(rows)})")
    ax.axvline(FLAGGED, color="black", linestyle="--", label=f"{FLAGGED} characters: flagged")
    ax.set_xlabel("longest run of characters shared with the training text")
    ax.set_ylabel("share of passages")
    ax.legend(frameon=False, loc="center", bbox_to_anchor=(0.6, 0.4))
    return ax


def plot_style(card: dict[str, Any], ax: "Axes | None" = None) -> "Axes":
    """Draw how strongly a classifier takes each passage for 武侠, names and props hidden."""
    ax = axes(ax)
    groups = list(_by_writer(card, "style"))
    for place, (writer, rows) in enumerate(groups):
        parts = ax.violinplot(rows, [place], showmedians=True, widths=0.8)
        bodies: Any = parts.pop("bodies")
        for part in (*bodies, *parts.values()):
            part.set_color(WRITERS[writer][1])
    names = [f"{WRITERS[writer][0]}\n(n = {len(rows)})" for writer, rows in groups]
    ax.set_xticks(range(len(groups)), names)
    ax.axhline(0, color="black", linewidth=1)
    ax.set_ylabel("logit: above 0 is 武侠")
    if card["classifier"] is not None:
        ax.set_xlabel(
            f"of people's pieces in books it never saw, {card['classifier']:.0%} are right"
        )
    return ax


def _by_writer(card: dict[str, Any], column: str) -> "list[tuple[str, pd.Series]]":
    texts = pd.DataFrame(card["texts"], columns=["writer", "copied", "style"])
    groups = {who: texts.loc[texts["writer"] == who, column].dropna() for who in WRITERS}
    return [(who, rows.astype(float)) for who, rows in groups.items() if len(rows)]


def side_by_side(card: dict[str, Any], count: int = 6) -> pd.DataFrame:
    """Put the first passages of base and tuned beside each other, and the book's own text."""
    rows = pd.DataFrame(card["passages"], columns=["prompt", "base", "tuned", "human"])
    chosen = rows.iloc[np.unique(np.linspace(0, len(rows) - 1, count).astype(int))]
    return chosen.map(lambda text: visible(" ".join(text.split())[:200]))


def copied_table(card: dict[str, Any]) -> pd.DataFrame:
    """Put the longest runs that the tuned model shares with training text beside their source."""
    columns = ["length", "flagged", "generated", "source", "title"]
    rows = pd.DataFrame(card["copied"], columns=columns)
    return rows.assign(**{name: rows[name].map(visible) for name in columns[2:]})
