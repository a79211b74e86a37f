"""Masked text as HTML and as plain text, drawn from the tokenizer's character offsets."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import compress, groupby, pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from wuxia_core.config import TINY_BASE
from wuxia_core.corpus import Segmenter
from wuxia_core.errors import DataError
from wuxia_core.evaluate import XRay
from wuxia_core.masking import HIDDEN, KEPT, LEFT, REPLACED, SINGLE, SPAN, Kinds, SpanMasker
from wuxia_core.mixing import encode_passage
from wuxia_core.text import NO_MATH, escape, visible

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from wuxia_core.masking import Corruption


FILL = {SINGLE: "rgba(0,114,178,.45)", SPAN: "rgba(213,94,0,.45)"}
LINE = {SINGLE: "2px dotted rgb(0,114,178)", SPAN: "2px solid rgb(213,94,0)"}
NAMES = {SINGLE: "single", SPAN: "span"}
ACTIONS = {HIDDEN: "hidden", REPLACED: "replaced by a random token", LEFT: "left as it is"}
BRACKETS = {SINGLE: "〔{}〕", SPAN: "【{}】"}
SIGNS = {HIDDEN: "", REPLACED: "≠", LEFT: "="}
TEXT_STYLE = "white-space:pre-wrap;overflow-wrap:anywhere;line-height:2;font-size:16px"
MOST_BITS = 16.0  # and more have the deepest colour
HEAT = "rgba(213,94,0,{:.2f})"
RIGHT, WRONG = "3px solid rgb(0,114,178)", "1px dotted currentcolor"
COLUMN = "display:inline-block;vertical-align:top;box-sizing:border-box;padding-right:1em"


class Piece(NamedTuple):
    """A stretch of text that is shown in one way: `[start, end)` in characters."""

    start: int
    end: int
    kind: int
    action: int
    block: int  # from 1; 0 for what is kept
    tip: str  # what is said where a pointer rests on it


@dataclass(frozen=True)
class MaskView:
    """A text with its masked tokens marked: shows itself in notebooks, and as text in terminals.

    `kinds` and `actions` are (T,), a token each, as `SpanMasker` and `Corruption` draw them.
    """

    text: str
    pieces: tuple[Piece, ...]
    kinds: Kinds
    actions: Kinds

    def __str__(self) -> str:
        """Mark singles 〔so〕 and spans 【so】, ≠ behind what is replaced, = what is left."""
        blocks = groupby(self.pieces, key=lambda piece: (piece.block, piece.kind))
        return "".join(
            BRACKETS.get(kind, "{}").format("".join(map(self._plain, pieces)))
            for (_, kind), pieces in blocks
        )

    def _plain(self, piece: Piece) -> str:
        return visible(self.text[piece.start : piece.end]) + SIGNS.get(piece.action, "")

    def _repr_html_(self) -> str:
        body = "".join(self._piece_html(piece) for piece in self.pieces)
        return (
            f'<div lang="zh-Hans" class="{NO_MATH}"><div style="{TEXT_STYLE}">{body}</div>'
            f"{self._legend()}</div>"
        )

    def _piece_html(self, piece: Piece) -> str:
        shown = escape(self.text[piece.start : piece.end])
        if piece.kind == KEPT:
            return shown
        return f'<span title="{escape(piece.tip)}" style="{_style(piece)}">{shown}</span>'

    def _legend(self) -> str:
        total = len(self.kinds)
        marked = [Piece(0, 0, kind, HIDDEN, 0, NAMES[kind]) for kind in NAMES]
        counts = [int((self.kinds == kind).sum()) for kind in NAMES]
        if (self.actions > HIDDEN).any():
            marked += [Piece(0, 0, SPAN, action, 0, ACTIONS[action]) for action in ACTIONS]
            counts += [int((self.actions == action).sum()) for action in ACTIONS]
        entries = (
            f'<span style="{_style(piece)}">{piece.tip}</span> {count} ({count / total:.1%})'
            for piece, count in zip(marked, counts, strict=True)
        )
        return f'<p style="font-size:13px">{" · ".join(entries)} of {total} tokens</p>'


def _style(piece: Piece) -> str:
    """Fill what is hidden, strike out what is replaced, underline it all."""
    fill = "transparent" if piece.action == LEFT else FILL[piece.kind]
    struck = ";text-decoration:line-through" if piece.action == REPLACED else ""
    return f"background:{fill};border-bottom:{LINE[piece.kind]};color:inherit{struck}"


def show_masks(
    text: str,
    tokenizer: "PreTrainedTokenizerBase | None" = None,
    masker: SpanMasker | None = None,
    key: int = 0,
    *,
    epoch: int = 0,
    segmenter: "Segmenter | None" = None,
    corruption: "Corruption | None" = None,
) -> MaskView:
    """Show which tokens of a text would be masked, and what would stand in their place.

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
    segmenter : Segmenter, optional
        With one, spans cover its words, as with `masking.span_unit: word`.
    corruption : Corruption, optional
        By default every masked token is hidden.

    Raises
    ------
    DataError
        Where the text has no token.
    """
    if tokenizer is None:
        from wuxia_core.model import load_tokenizer

        tokenizer = load_tokenizer(str(TINY_BASE))
    window, offsets = encode_passage(text, tokenizer, segmenter or Segmenter())
    if not offsets:
        raise DataError("show_masks: the text is empty")
    words = None if segmenter is None else window.word_ids[None]
    kinds = (masker or SpanMasker()).kinds(window.position_ids[None] > 0, [key], epoch, words)
    seen = window.input_ids[None].astype(np.int64)
    actions = (kinds > KEPT).astype(np.int8)
    if corruption is not None:
        actions = corruption.actions(kinds > KEPT, [key], epoch)
        seen = corruption.apply(seen, actions, [key], epoch)
    names = [
        _name(text[start:end], before, after if action == REPLACED else None, tokenizer)
        for (start, end), before, after, action in zip(
            offsets, window.input_ids[1:], seen[0, 1:], actions[0, 1:], strict=True
        )
    ]
    return masked_text(text, offsets, kinds[0, 1:], actions[0, 1:], names)


def _name(
    characters: str, token: int, instead: int | None, tokenizer: "PreTrainedTokenizerBase"
) -> str:
    """Name a token by its characters and number, and what stands in its place."""
    if instead is None:
        return f"{characters} #{token}"
    return f"{characters} #{token} → {tokenizer.decode([instead])} #{instead}"


def masked_text(
    text: str,
    offsets: Sequence[tuple[int, int]],
    kinds: Kinds,
    actions: Kinds,
    names: Sequence[str],
) -> MaskView:
    """Join tokens to stretches of one block and one action, by characters.

    Tokens of a byte-level vocabulary may share a character; one that is masked marks it. Characters
    that no token covers are shown as kept.
    """
    masked = kinds > KEPT
    blocks = np.cumsum(np.diff(masked, prepend=False) & masked) * masked  # (T,) from 1; 0 is kept
    owners = np.full(len(text), -1)  # (C,) the masked token that marks the character
    for token in np.flatnonzero(masked).tolist():
        start, end = offsets[token]
        owners[start:end] = token
    marks = np.where(owners < 0, 0, blocks[owners] * 4 + actions[owners])
    edges = np.flatnonzero(np.diff(marks, prepend=-1, append=-1)).tolist()
    tips = [_tip(kinds[blocks == n], compress(names, blocks == n)) for n in range(blocks.max() + 1)]
    pieces = []
    for start, end in pairwise(edges):
        token, kept = owners[start], owners[start] < 0
        kind, action, block = (0 if kept else int(r[token]) for r in (kinds, actions, blocks))
        pieces.append(Piece(start, end, kind, action, block, tips[block]))
    return MaskView(text, tuple(pieces), kinds, actions)


def _tip(kinds: Kinds, names: Iterable[str]) -> str:
    """Describe a block: `span of 3 tokens: 剑 #7, 光 #8, 一 #9`; nothing for what is kept."""
    if not kinds.any():
        return ""
    size = f" of {len(kinds)} tokens" if kinds[0] == SPAN else ""
    return f"{NAMES[int(kinds[0])]}{size}: {', '.join(names)}"


@dataclass(frozen=True)
class XRayView:
    """One text under the X-ray, by each model: shows itself in notebooks, as text in terminals."""

    xray: XRay
    text: int = 0  # its place in `xray.texts`

    def __str__(self) -> str:
        """Put behind each masked token its loss in bits, and ✓ where the best guess was right."""
        return "\n\n".join(f"{name}: {self._parts(name, _plain)}" for name in self.xray.models)

    def _repr_html_(self) -> str:
        width = 100 // len(self.xray.models)
        columns = "".join(
            f'<div style="{COLUMN};width:{width}%;min-width:min(100%,17em)"><b>{name}</b>, '
            f"{self._mean(name)}<div style='{TEXT_STYLE}'>{self._parts(name, _html)}</div></div>"
            for name in self.xray.models
        )
        return f'<div lang="zh-Hans" class="{NO_MATH}">{columns}{_legend()}</div>'

    def _rows(self) -> list[Any]:
        tokens = self.xray.tokens
        return list(tokens[tokens["text"] == self.text].itertuples())

    def _mean(self, name: str) -> str:
        rows = self._rows()
        bits = sum(getattr(row, f"{name}_bits") for row in rows) / max(1, len(rows))
        right = sum(getattr(row, f"{name}_right") for row in rows)
        return f"{bits:.2f} bits a token, {right} of {len(rows)} right"

    def _parts(self, name: str, draw: Any) -> str:
        """Draw the text and its masked tokens; of those that share a character the first counts."""
        text, place, parts = self.xray.texts[self.text], 0, []
        for row in self._rows():
            if row.start >= place:
                parts.append(draw(text[place : row.start], None, 0.0, False, ()))
                answer = (getattr(row, f"{name}_{key}") for key in ("bits", "right", "guesses"))
                parts.append(draw(text[row.start : row.end], row, *answer))
                place = row.end
        return "".join([*parts, draw(text[place:], None, 0.0, False, ())])


def _plain(text: str, row: Any, bits: float, right: bool, _: Any) -> str:
    return visible(text) if row is None else f"【{visible(text)}:{bits:.1f}{'✓' * right}】"


def _html(text: str, row: Any, bits: float, right: bool, guesses: Any) -> str:
    if row is None:
        return escape(text)
    best = ", ".join(f"{guess} {share:.1%}" for guess, share in guesses)
    tip = f"{text}: {NAMES[row.kind]}, {bits:.2f} bits, {'right' if right else 'wrong'} · {best}"
    return f'<span title="{escape(tip)}" style="{_heat_style(bits, right)}">{escape(text)}</span>'


def _heat_style(bits: float, right: bool) -> str:
    heat = HEAT.format(0.55 * min(1.0, bits / MOST_BITS))
    return f"background:{heat};border-bottom:{RIGHT if right else WRONG};color:inherit"


def _legend() -> str:
    steps = "".join(
        f'<span style="{_heat_style(bits, False)};padding:0 .4em">{bits:.0f}</span>'
        for bits in (0, 4, 8, 12, MOST_BITS)
    )
    right = f'<span style="{_heat_style(0, True)}">right</span>'
    return f'<p style="font-size:13px">bits {steps} · {right} · the guesses are in the tooltips</p>'
