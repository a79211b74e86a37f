"""Masked text as HTML and as plain text, drawn from the tokenizer's character offsets."""

import html
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from wuxia_core.config import TINY_BASE
from wuxia_core.errors import DataError
from wuxia_core.masking import KEPT, SINGLE, SPAN, Kinds, SpanMasker

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FILL = {SINGLE: "rgba(0,114,178,.45)", SPAN: "rgba(213,94,0,.45)"}
LINE = {SINGLE: "2px dotted rgb(0,114,178)", SPAN: "2px solid rgb(213,94,0)"}
NAMES = {SINGLE: "single", SPAN: "span"}
TERMINAL = {SINGLE: "〔{}〕", SPAN: "【{}】"}


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
