"""Plots with a font that has the characters: `ax=None` in, Axes out."""

import functools
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from wuxia_core.errors import DataError
from wuxia_core.evaluate import FLAGGED
from wuxia_core.masking import Floats, Kinds
from wuxia_core.run import METRICS, read_rows
from wuxia_core.text import visible

if TYPE_CHECKING:
    from matplotlib.axes import Axes


FONT = Path(__file__).parents[1] / "fonts" / "NotoSansSC-Regular-GBK.otf"
BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#888888"  # Okabe & Ito 2008
SOURCE_COLOURS = {"wuxia": ORANGE, "general": BLUE}
SOURCES = {"wuxia": (ORANGE, "-"), "general": (BLUE, "--")}  # colour, style
RUNS = (*SOURCES.values(), (GREEN, ":"), (GREY, "-"), ("#CC79A7", "-."), ("#E69F00", "--"))
BEST = "eval_wuxia_bits_per_char"  # what the adapter that is kept has the fewest of
STRATUM = "masked_accuracy, "
WRITERS = {
    "base": ("base", BLUE),
    "few_shot": ("base after an example", "#56B4E9"),
    "tuned": ("tuned", ORANGE),
    "human": ("held-out human text", GREEN),
}


@functools.cache
def _font_family() -> list[str]:
    from matplotlib import font_manager

    font_manager.fontManager.addfont(FONT)
    return [font_manager.FontProperties(fname=FONT).get_name(), "DejaVu Sans"]


@functools.cache
def _characters() -> frozenset[int]:
    """Collect what the fonts can write."""
    from matplotlib import font_manager

    paths = [font_manager.findfont(name) for name in _font_family()]
    return frozenset().union(*(font_manager.get_font(path).get_charmap() for path in paths))


def drawable(text: str) -> str:
    """Make a text fit for a plot: `visible`, and numbers for characters that the fonts lack."""
    return "".join(
        c if ord(c) in _characters() or c.isspace() else f"⟨U+{ord(c):04X}⟩" for c in visible(text)
    )


def axes(ax: "Axes | None" = None, *, size: tuple[float, float] = (7.5, 3.6)) -> "Axes":
    """Return `ax`, or new white axes that can write Chinese and take `$` for a dollar."""
    import matplotlib.pyplot as plt
    from matplotlib.text import Text

    plt.rcParams["font.family"] = _font_family()
    plt.rcParams["axes.unicode_minus"] = False
    plt.rcParams["text.parse_math"] = False
    if ax is None:
        _, ax = plt.subplots(figsize=size, facecolor="white", layout="constrained")
    for text in ax.findobj(Text):
        text.set_parse_math(False)
    ax.spines[["top", "right"]].set_visible(False)
    return ax


def plot_books(documents: pd.DataFrame, ax: "Axes | None" = None) -> "Axes":
    """Draw the characters of each book by split, general text below.

    `documents` has the columns `source`, `book`, `split` and `characters`, as in a mixture.
    """
    keys = [documents["source"], documents["book"], documents["split"]]
    table = documents["characters"].groupby(keys).sum().unstack(fill_value=0)
    ax = axes(ax, size=(7.5, 1.2 + 0.3 * len(table)))
    left = np.zeros(len(table))
    colours = {"train": ORANGE, "validation": BLUE, "unused": GREY, "duplicate": "#CCCCCC"}
    for split in table.columns:
        ax.barh(
            table.index.get_level_values("book").map(drawable),
            table[split],
            left=left,
            color=colours[split],
            label=split,
        )
        left += table[split].to_numpy()
    ax.set_xlabel("characters")
    ax.legend(frameon=False)
    return ax


def plot_lengths(documents: pd.DataFrame, ax: "Axes | None" = None) -> "Axes":
    """Draw how long the documents (chapters, general texts) are, in characters, by source."""
    ax = axes(ax)
    for source, rows in documents.groupby("source"):
        lengths = rows["characters"]
        label = f"{source}, n = {len(rows)}"
        ax.hist(lengths, bins=30, alpha=0.6, color=SOURCE_COLOURS[str(source)], label=label)
    ax.set_xlabel("characters a document")
    ax.set_ylabel("documents")
    ax.legend(frameon=False)
    return ax


def plot_mixture(report: pd.DataFrame, asked: float, ax: "Axes | None" = None) -> "Axes":
    """Draw the tokens by source of `Mixture.report`, with the share that was asked for."""
    ax = axes(ax, size=(7.5, 2))
    left = 0
    for row in report.itertuples():
        label = f"{row.source} {row.share:.1%}"
        ax.barh(0, row.tokens, left=left, color=SOURCE_COLOURS[row.source], label=label)
        left += row.tokens
    ax.axvline(
        left * (1 - asked), color="black", linestyle="--", label=f"asked: {asked:.1%} general"
    )
    ax.set_yticks([])
    ax.set_xlabel("training tokens")
    ax.legend(frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1), ncols=3)
    return ax


def plot_typical(table: pd.DataFrame, top: int = 20, ax: "Axes | None" = None) -> "Axes":
    """Draw how often the most typical words of `corpus.words.typical` stand here and there."""
    rows = table.head(top)[::-1].rename(index=drawable)
    ax = axes(ax, size=(7.5, 1.2 + 0.22 * len(rows)))
    rarest = max(0.01, float(rows[["here", "there"]].replace(0, np.nan).min(axis=None)) / 2)
    ax.hlines(rows.index, rows["there"].clip(lower=rarest), rows["here"], color=GREY, linewidth=1)
    for column, colour, label in (("here", ORANGE, "wuxia"), ("there", BLUE, "general")):
        ax.plot(rows[column].clip(lower=rarest), rows.index, "o", color=colour, label=label)
    ax.set_xscale("log")
    ax.xaxis.set_major_formatter("{x:g}")  # the usual one writes mathematics
    ax.xaxis.set_minor_formatter("")
    none = f"; {rarest:.2g} stands for none" if (rows["there"] == 0).any() else ""
    ax.set_xlabel(f"uses per 10,000{none}")
    ax.legend(frameon=False, ncols=2, loc="upper right", bbox_to_anchor=(1, -0.06))
    return ax


def plot_kinds(kinds: Kinds, ax: "Axes | None" = None) -> "Axes":
    """Draw masks as a grid, a row a draw: (B, T) of 0 kept, 1 single, 2 span."""
    from matplotlib.colors import ListedColormap

    ax = axes(ax)
    colours = ListedColormap(["#F2F2F2", BLUE, ORANGE])
    ax.imshow(kinds, cmap=colours, vmin=0, vmax=2, aspect="auto", interpolation="nearest")
    ax.set_xlabel("token (blue: single, orange: span)")
    ax.set_ylabel("epoch")
    ax.locator_params(axis="y", integer=True)
    return ax


def plot_coverage(shares: Floats, mask_ratio: float, ax: "Axes | None" = None) -> "Axes":
    """Draw what `masking.coverage` measures, (epochs,), against independent draws."""
    epochs = np.arange(1, len(shares) + 1)
    ax = axes(ax)
    ax.plot(epochs, shares, "o", color=ORANGE, label="measured")
    expected = 1 - (1 - mask_ratio) ** epochs
    ax.plot(epochs, expected, "--", color=GREY, label=f"1 − {1 - mask_ratio:.2f}^E")
    ax.set_xlabel("epochs E")
    ax.locator_params(axis="x", integer=True)
    ax.set_ylabel("masked at least once")
    ax.set_ylim(0, 1)
    ax.legend(frameon=False)
    return ax


def read_metrics(output_dir: str | Path) -> pd.DataFrame:
    """Read a run's `metrics.jsonl`, a row a logged step, without steps that were done again.

    Raises `DataError` where there is none.
    """
    path = Path(output_dir) / METRICS
    if not path.is_file():
        raise DataError(f"{path}: not there; is {output_dir} a run folder (training.output_dir)?")
    metrics = pd.DataFrame(read_rows(Path(output_dir)))
    return metrics if "event" in metrics else metrics.assign(event=None)


def plot_metric(
    metrics: pd.DataFrame, columns: dict[str, str], ylabel: str, ax: "Axes | None" = None
) -> "Axes":
    """Draw columns of `metrics.jsonl` over steps; `columns` maps each to its label.

    Checkpoints are marked below, restarts by a line, and of held-out bits per character the best.
    """
    ax = axes(ax)
    for column in columns:
        source = next((name for name in SOURCES if name in column), "")
        colour, line = SOURCES.get(source, (GREY, "-"))
        rows = _rows(metrics, column)
        if len(rows):
            ax.plot(rows["step"], rows[column], line, color=colour, marker=".",
                    label=columns[column])  # fmt: skip
        trained = rows[rows["step"] > 0]
        if column == BEST and len(trained):
            best = trained.loc[trained[BEST].idxmin()]
            ax.plot(best["step"], best[BEST], "*", color=colour, markersize=14, label="best")
    _mark_events(metrics, ax)
    return _finish(ax, ylabel)


def plot_runs(
    runs: dict[str, pd.DataFrame], column: str, ylabel: str, ax: "Axes | None" = None
) -> "Axes":
    """Draw one column of several runs over each other; `runs` maps labels to their metrics."""
    ax = axes(ax)
    for (name, metrics), (colour, line) in zip(runs.items(), RUNS, strict=False):
        rows = _rows(metrics, column)
        ax.plot(rows.get("step", []), rows.get(column, []), line, color=colour, marker=".",
                label=drawable(name))  # fmt: skip
    return _finish(ax, ylabel)


def _rows(metrics: pd.DataFrame, column: str) -> pd.DataFrame:
    return metrics[metrics[column].notna()] if column in metrics else metrics.iloc[:0]


def _mark_events(metrics: pd.DataFrame, ax: "Axes") -> None:
    saved = metrics.loc[metrics["event"] == "checkpoint", "step"]
    if len(saved):
        ax.plot(saved, [0.015] * len(saved), "^", color="black", markersize=5, label="checkpoint",
                transform=ax.get_xaxis_transform())  # fmt: skip
    for number, step in enumerate(metrics.loc[metrics["event"] == "resumed", "step"]):
        ax.axvline(step, color="#B00020", linestyle=":", label="_" * bool(number) + "restart")


def _finish(ax: "Axes", ylabel: str) -> "Axes":
    ax.set_xlabel("optimizer step")
    ax.set_ylabel(ylabel)
    if ax.get_legend_handles_labels()[0]:
        ax.legend(loc="upper left", bbox_to_anchor=(1.01, 1), frameon=False)
    return ax


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
