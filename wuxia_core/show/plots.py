"""Plots with a font that has the characters: `ax=None` in, Axes out."""

import functools
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from wuxia_core.masking import Floats, Kinds
from wuxia_core.show.text import visible

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FONT = Path(__file__).parents[1] / "fonts" / "NotoSansSC-Regular-GBK.otf"
BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#888888"  # Okabe & Ito 2008
SOURCE_COLOURS = {"wuxia": ORANGE, "general": BLUE}


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
