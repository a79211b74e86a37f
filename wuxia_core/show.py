"""What a person looks at: masked text as HTML, and plots with a font that has the characters.

Plots take `ax=None` and return the Axes. Text is always escaped before it becomes HTML.
"""

import functools
import html
import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from wuxia_core.config import TINY_BASE
from wuxia_core.errors import DataError
from wuxia_core.masking import KEPT, SINGLE, SPAN, Kinds, SpanMasker

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from transformers import PreTrainedTokenizerBase

FONT = Path(__file__).parent / "fonts" / "NotoSansSC-Regular-GBK.otf"
BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#888888"  # Okabe & Ito 2008
FILL = {SINGLE: "rgba(0,114,178,.45)", SPAN: "rgba(213,94,0,.45)"}
LINE = {SINGLE: "2px dotted rgb(0,114,178)", SPAN: "2px solid rgb(213,94,0)"}
NAMES = {SINGLE: "single", SPAN: "span"}
TERMINAL = {SINGLE: "〔{}〕", SPAN: "【{}】"}
PLACE_COLOURS = {"wuxia": ORANGE, "general": BLUE}


@dataclass(frozen=True)
class Piece:
    """A stretch of text that is shown in one way: `[start, end)` in characters."""

    start: int
    end: int
    kind: int
    tokens: tuple[str, ...]


@dataclass(frozen=True)
class MaskView:
    """A text with its masked tokens marked: shows itself in notebooks, and as text in terminals."""

    text: str
    pieces: tuple[Piece, ...]
    kinds: Kinds

    def __str__(self) -> str:
        """Mark singles 〔so〕 and spans 【so】."""
        return "".join(
            TERMINAL.get(piece.kind, "{}").format(self.text[piece.start : piece.end])
            for piece in self.pieces
        )

    def _repr_html_(self) -> str:
        body = "".join(self._piece_html(piece) for piece in self.pieces)
        return (
            '<div lang="zh-Hans" style="white-space:pre-wrap;line-height:2;font-size:16px">'
            f"{body}</div>{self._legend()}"
        )

    def _piece_html(self, piece: Piece) -> str:
        shown = html.escape(self.text[piece.start : piece.end])
        if piece.kind == KEPT:
            return shown
        tip = html.escape(
            f"{NAMES[piece.kind]}: {len(piece.tokens)} tokens {' '.join(piece.tokens)}"
        )
        style = f"background:{FILL[piece.kind]};border-bottom:{LINE[piece.kind]};color:inherit"
        return f'<span title="{tip}" style="{style}">{shown}</span>'

    def _legend(self) -> str:
        total = len(self.kinds)
        parts = []
        for kind, name in NAMES.items():
            count = int((self.kinds == kind).sum())
            style = f"background:{FILL[kind]};border-bottom:{LINE[kind]};color:inherit"
            parts.append(f'<span style="{style}">{name}</span> {count} ({count / total:.1%})')
        return f'<p style="font-size:13px">{" · ".join(parts)} of {total} tokens</p>'


def show_masks(
    text: str,
    tokenizer: "PreTrainedTokenizerBase | None" = None,
    masker: SpanMasker | None = None,
    key: int = 0,
    epoch: int = 0,
) -> MaskView:
    """Show which tokens of a text would be masked.

    Parameters
    ----------
    text : str
        Any text; it is escaped wherever it becomes HTML.
    tokenizer : optional
        By default the bundled one.
    masker : SpanMasker, optional
        By default the recipe's: 15 %, half of it in spans of 3 to 5.
    key, epoch : int
        Another key or epoch, another draw.

    Raises
    ------
    DataError
        Where the text has no token.
    """
    if tokenizer is None:
        from wuxia_core.model import load_tokenizer

        tokenizer = load_tokenizer(str(TINY_BASE))
    encoded = tokenizer(
        text, add_special_tokens=False, split_special_tokens=True, return_offsets_mapping=True
    )
    if not encoded.input_ids:
        raise DataError("show_masks: the text is empty")
    maskable = np.ones((1, len(encoded.input_ids)), np.bool_)
    maskable[0, 0] = False
    kinds = (masker or SpanMasker()).kinds(maskable, [key], epoch)[0]
    names = [f"#{number}" for number in encoded.input_ids]
    return MaskView(text, tuple(_pieces(text, encoded.offset_mapping, kinds, names)), kinds)


def _pieces(
    text: str, offsets: Sequence[tuple[int, int]], kinds: Kinds, names: Sequence[str]
) -> list[Piece]:
    """Join tokens to stretches of one kind, by characters.

    Tokens of a byte-level vocabulary may share a character; it takes the strongest kind of its
    tokens. Characters that no token covers are shown as kept.
    """
    by_character = np.zeros(len(text), np.int8)
    for (start, end), kind in zip(offsets, kinds, strict=True):
        by_character[start:end] = np.maximum(by_character[start:end], kind)
    edges = np.flatnonzero(np.diff(by_character, prepend=-1, append=-1))
    return [
        Piece(
            int(start),
            int(end),
            int(by_character[start]),
            tuple(n for n, (a, b) in zip(names, offsets, strict=True) if a < end and b > start),
        )
        for start, end in pairwise(edges)
    ]


@functools.cache
def _font_family() -> list[str]:
    from matplotlib import font_manager

    font_manager.fontManager.addfont(FONT)
    return [font_manager.FontProperties(fname=FONT).get_name(), "DejaVu Sans"]


def axes(ax: "Axes | None" = None, *, size: tuple[float, float] = (7.5, 3.6)) -> "Axes":
    """Return `ax`, or new white axes that can write Chinese."""
    import matplotlib.pyplot as plt

    plt.rcParams["font.family"] = _font_family()
    plt.rcParams["axes.unicode_minus"] = False
    if ax is None:
        _, ax = plt.subplots(figsize=size, facecolor="white", layout="constrained")
    ax.spines[["top", "right"]].set_visible(False)
    return ax


def plot_books(documents: pd.DataFrame, ax: "Axes | None" = None) -> "Axes":
    """Draw the characters of each book, held-out books hatched.

    `documents` has the columns `book`, `split` and `text`, as in a mixture.
    """
    lengths = documents["text"].str.len().groupby([documents["book"], documents["split"]]).sum()
    table = lengths.unstack(fill_value=0).sort_index(ascending=False)
    ax = axes(ax, size=(7.5, 1.2 + 0.3 * len(table)))
    left = np.zeros(len(table))
    colours = {"train": ORANGE, "validation": BLUE, "unused": GREY}
    for split in table.columns:
        ax.barh(table.index, table[split], left=left, color=colours[split], label=split)
        left += table[split].to_numpy()
    ax.set_xlabel("characters")
    ax.legend(frameon=False)
    return ax


def plot_lengths(documents: pd.DataFrame, ax: "Axes | None" = None) -> "Axes":
    """Draw how long the documents (chapters, general texts) are, in characters, by source."""
    ax = axes(ax)
    for source, rows in documents.groupby("source"):
        lengths = rows["text"].str.len()
        label = f"{source}, n = {len(rows)}"
        ax.hist(lengths, bins=30, alpha=0.6, color=PLACE_COLOURS[str(source)], label=label)
    ax.set_xlabel("characters a document")
    ax.set_ylabel("documents")
    ax.legend(frameon=False)
    return ax


def plot_mixture(report: pd.DataFrame, asked: float, ax: "Axes | None" = None) -> "Axes":
    """Draw the tokens by source of `Mixture.report`, with the share that was asked for."""
    ax = axes(ax, size=(7.5, 1.8))
    left = 0
    for row in report.itertuples():
        label = f"{row.source} {row.share:.1%}"
        ax.barh(0, row.tokens, left=left, color=PLACE_COLOURS[row.source], label=label)
        left += row.tokens
    ax.axvline(
        left * (1 - asked), color="black", linestyle="--", label=f"asked: {asked:.1%} general"
    )
    ax.set_yticks([])
    ax.set_xlabel("training tokens")
    ax.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.5, 1.35), ncols=3)
    return ax


def plot_kinds(kinds: Kinds, ax: "Axes | None" = None) -> "Axes":
    """Draw masks as a grid, a row a draw: (B, T) of 0 kept, 1 single, 2 span."""
    from matplotlib.colors import ListedColormap

    ax = axes(ax)
    colours = ListedColormap(["#F2F2F2", BLUE, ORANGE])
    ax.imshow(kinds, cmap=colours, vmin=0, vmax=2, aspect="auto", interpolation="nearest")
    ax.set_xlabel("token (blue: single, orange: span)")
    ax.set_ylabel("epoch")
    return ax


def read_metrics(output_dir: str | Path) -> pd.DataFrame:
    """Read a run's `metrics.jsonl`, a row a logged step.

    Raises
    ------
    DataError
        Where there is none.
    """
    path = Path(output_dir) / "metrics.jsonl"
    if not path.is_file():
        raise DataError(f"{path}: not there; is {output_dir} a run folder (training.output_dir)?")
    lines = path.read_text(encoding="utf-8").splitlines()
    return pd.DataFrame([json.loads(line) for line in lines])


def plot_metric(
    metrics: pd.DataFrame, columns: dict[str, str], ylabel: str, ax: "Axes | None" = None
) -> "Axes":
    """Draw columns of `metrics.jsonl` over steps; `columns` maps each to its label."""
    ax = axes(ax)
    styles = zip(columns, (GREY, ORANGE, BLUE, GREEN), ("-", "-", "--", ":"), strict=False)
    for column, colour, line in styles:
        if column in metrics:
            rows = metrics[metrics[column].notna()]
            ax.plot(
                rows["step"], rows[column], line, color=colour, label=columns[column], marker="."
            )
    ax.set_xlabel("optimizer step")
    ax.set_ylabel(ylabel)
    ax.legend(frameon=False)
    return ax


def plot_scorecard(card: dict[str, Any], name: str, ax: "Axes | None" = None) -> "Axes":
    """Draw a metric's change by source with its 95 % interval; left of the line is a fall."""
    rows = [row for row in card["metrics"] if row["name"] == name and row["delta"] is not None]
    ax = axes(ax, size=(7.5, 1.4 + 0.4 * len(rows)))
    for place, row in enumerate(rows):
        error = [[row["delta"] - row["low"]], [row["high"] - row["delta"]]]
        colour = PLACE_COLOURS[row["source"]]
        ax.errorbar(row["delta"], place, xerr=error, fmt="o", color=colour, capsize=4)
    ax.axvline(0, color="black", linewidth=1)
    labels = [f"{row['source']} (n = {row['n']})" for row in rows]
    ax.set_yticks(range(len(rows)), labels)
    ax.set_ylim(-0.6, len(rows) - 0.4)
    unit = rows[0]["unit"] if rows else ""
    ax.set_xlabel(f"change of {name}, tuned − base, {unit} (95 % interval over documents)")
    return ax


def scorecard_table(card: dict[str, Any]) -> pd.DataFrame:
    """Put a scorecard's metrics in a table for people."""
    columns = ["source", "name", "unit", "base", "tuned", "delta", "low", "high", "n"]
    return pd.DataFrame(card["metrics"])[columns].round(3)
