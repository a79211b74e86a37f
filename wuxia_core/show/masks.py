"""Masked text as HTML and as plain text, drawn from the tokenizer's character offsets."""

from collections.abc import Iterable, Sequence
from itertools import groupby
from operator import itemgetter
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from wuxia_core.config import TINY_BASE
from wuxia_core.corpus import Segmenter
from wuxia_core.errors import DataError
from wuxia_core.evaluate import XRay
from wuxia_core.masking import KEPT, MASKED, RANDOM, SINGLE, SPAN, UNCHANGED, Kinds, SpanMasker
from wuxia_core.messages import messages
from wuxia_core.mixing import Encoder
from wuxia_core.model import load_tokenizer
from wuxia_core.show.tables import named
from wuxia_core.text import NO_MATH, escape, visible

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from wuxia_core.masking import Corruption

FILL = {SINGLE: "rgba(0,114,178,.45)", SPAN: "rgba(213,94,0,.45)"}
LINE = {SINGLE: "2px dotted rgb(0,114,178)", SPAN: "2px solid rgb(213,94,0)"}
NAMES = {SINGLE: "single", SPAN: "span"}
ACTIONS = {MASKED: "mask token", RANDOM: "random token", UNCHANGED: "unchanged"}
BRACKETS = {SINGLE: "〔{}〕", SPAN: "【{}】"}
SIGNS = {MASKED: "", RANDOM: "≠", UNCHANGED: "="}
TEXT_STYLE = "white-space:pre-wrap;overflow-wrap:anywhere;line-height:2;font-size:16px"
COLUMN = "display:inline-block;vertical-align:top;box-sizing:border-box;padding-right:1em"


class Segment(NamedTuple):
    """Characters that are shown in one way: `str()` for a terminal, `_html` for a notebook."""

    text: str
    plain: str = "{}"  # what a terminal shows, with {} for the text
    style: str = ""  # CSS
    tip: str = ""  # tooltip

    def __str__(self) -> str:
        return self.plain.format(visible(self.text))


def _segments(text: str, marks: Iterable[tuple[int, int, Segment]]) -> tuple[Segment, ...]:
    """Cut a text where its look changes; of marks `(start, end, look)` the last one counts."""
    looks = [Segment("")] * len(text)  # one a character
    for start, end, look in marks:
        looks[start:end] = [look] * (end - start)
    runs = groupby(zip(text, looks, strict=True), key=itemgetter(1))
    return tuple(look._replace(text="".join(c for c, _ in run)) for look, run in runs)


class MaskView(NamedTuple):
    """A text with its masked tokens marked: shows itself in notebooks, and as text in terminals.

    In a terminal 〔甲〕 is a single, 【甲乙】 a span; ≠ follows a random token, = an unchanged.
    `kinds` and `actions` are (T,), a token each, as `SpanMasker` and `Corruption` draw them.
    """

    segments: tuple[Segment, ...]
    kinds: Kinds
    actions: Kinds

    def __str__(self) -> str:
        return "".join(map(str, self.segments))

    def _repr_html_(self) -> str:
        """Draw the text, with counts of the kinds, and of the actions where there are several."""
        said = messages("masks")
        entries = [(_mask_style(kind, MASKED), NAMES[kind], self.kinds == kind) for kind in NAMES]
        if (self.actions > MASKED).any():
            entries += [(_mask_style(SPAN, n), ACTIONS[n], self.actions == n) for n in ACTIONS]
        counts = " · ".join(
            f"{_html([Segment(said[name], style=style)])} {chosen.sum()} ({chosen.mean():.1%})"
            for style, name, chosen in entries
        )
        below = said["counts"].format(counts=counts, tokens=len(self.kinds))
        return in_columns([("", _html(self.segments))], below)


def in_columns(columns: Iterable[tuple[str, str]], legend: str) -> str:
    """Put texts beside each other, as far as there is room, below their heads; all are HTML."""
    drawn = [f'{head}<div style="{TEXT_STYLE}">{text}</div>' for head, text in columns]
    style = f"{COLUMN};width:{100 // len(drawn)}%;min-width:min(100%,17em)"
    body = "".join(f'<div style="{style}">{column}</div>' for column in drawn)
    below = f'<p style="font-size:13px">{legend}</p>'
    return f'<div lang="zh-Hans" class="{NO_MATH}">{body}{below}</div>'


def _html(segments: Iterable[Segment]) -> str:
    return "".join(
        f'<span title="{escape(tip)}" style="{style};color:inherit">{escape(text)}</span>'
        for text, _, style, tip in segments
    )


def _mask_style(kind: int, action: int) -> str:
    """Underline every masked token, fill it unless it is unchanged, strike out random ones."""
    fill = "transparent" if action == UNCHANGED else FILL[kind]
    struck = ";text-decoration:line-through" if action == RANDOM else ""
    return f"background:{fill};border-bottom:{LINE[kind]}{struck}"


def show_masks(
    text: str,
    tokenizer: "PreTrainedTokenizerBase | None" = None,
    masker: SpanMasker | None = None,
    key: int = 0,
    *,
    epoch: int = 0,
    segmenter: Segmenter | None = None,
    corruption: "Corruption | None" = None,
) -> MaskView:
    """Show which tokens of a text would be masked, and what would stand in their place.

    By default with the bundled tokenizer and the default masker: 15 %, half of it in spans of 3
    to 5. Another `key` or `epoch` gives another draw. With a `segmenter` spans cover its words,
    as with `masking.span_unit: word`. Without a `corruption` every masked token is hidden.

    Raises
    ------
    DataError
        Where the text has no token.
    """
    tokenizer = tokenizer or load_tokenizer(str(TINY_BASE))
    window, offsets = Encoder(tokenizer, segmenter or Segmenter()).passage(text)
    if not offsets:
        raise DataError("show_masks: the text is empty")
    words = None if segmenter is None else window.word_ids[None]
    kinds = (masker or SpanMasker()).kinds(window.position_ids[None] > 0, [key], epoch, words)
    actions = (kinds > KEPT).astype(np.int8)
    ids = window.input_ids[None].astype(np.int64)  # (1, T + 1)
    names = [f"{text[a:b]} #{n}" for (a, b), n in zip(offsets, ids[0, 1:], strict=True)]
    if corruption is not None:
        actions = corruption.actions(kinds > KEPT, [key], epoch)
        seen = corruption.apply(ids, actions, [key], epoch)[0, 1:]
        for place in np.flatnonzero(actions[0, 1:] == RANDOM):
            names[place] += f" → {tokenizer.decode([seen[place]])} #{seen[place]}"
    return mark_tokens(text, offsets, kinds[0, 1:], actions[0, 1:], names)


def mark_tokens(
    text: str, offsets: Sequence[tuple[int, int]], kinds: Kinds, actions: Kinds, names: list[str]
) -> MaskView:
    """Mark the characters of masked tokens; `names` (T,) describe the tokens in tooltips.

    Tokens of a byte-level vocabulary may share a character; one that is masked marks it. Characters
    that no token covers are shown as kept.
    """
    marks, said = [], messages("masks")
    for kind, run in groupby(range(len(kinds)), key=lambda token: int(kinds[token])):
        if kind == KEPT:
            continue
        tokens = list(run)
        what = said["span of" if kind == SPAN else "single"].format(size=len(tokens))
        tip = f"{what}: {', '.join(names[token] for token in tokens)}"
        for token in tokens:
            plain = BRACKETS[kind].format("{}" + SIGNS[actions[token]])
            look = Segment("", plain, _mask_style(kind, actions[token]), tip)
            marks.append((*offsets[token], look))
    return MaskView(_segments(text, marks), kinds, actions)


class XRayView(NamedTuple):
    """One text under the X-ray, by each model, as it shows itself in notebooks.

    Above each masked token stands the model's first guess; the token is filled where it is right.
    """

    xray: XRay
    text: int = 0  # its place in `xray.texts`

    def _repr_html_(self) -> str:
        said = messages("xray")
        marks = [Segment(said[NAMES[kind]], style=_mask_style(kind, MASKED)) for kind in NAMES]
        legend = " · ".join([*(_html([mark]) for mark in marks), said["wrong"]])
        return in_columns(map(self._column, self.xray.models), legend)

    def _column(self, model: str) -> tuple[str, str]:
        """Draw a model's guesses; of tokens that share a character the first counts."""
        said = messages("xray")
        tokens = self.xray.tokens[self.xray.tokens["text"] == self.text]
        tokens = tokens.rename(columns=lambda column: column.removeprefix(f"{model}_"))
        text, body, done = self.xray.texts[self.text], "", 0
        for row in tokens.itertuples():
            if row.start < done:
                continue
            best = ", ".join(f"{guess} {share:.1%}" for guess, share in row.guesses)
            tip = f"{messages('masks')[NAMES[row.kind]]}, {row.bits:.2f} {said['unit']} · {best}"
            style = _mask_style(row.kind, MASKED if row.right else UNCHANGED)
            mark = _ruby(text[row.start : row.end], row.guesses[0][0], style, tip)
            body += escape(text[done : row.start]) + mark
            done = row.end
        right, bits = tokens["right"].sum(), tokens["bits"].mean()
        found = said["found"].format(right=right, all=len(tokens), bits=bits)
        whole = f'<span style="line-height:2.6">{body}{escape(text[done:])}</span>'
        return f"<b>{named(model)}</b> {found}", whole


def _ruby(token: str, guess: str, style: str, tip: str) -> str:
    """Write a guess above a token; a line break shows as an arrow."""
    shown, above = (escape(part.replace("\n", "↵")) for part in (token, guess))
    small = f'<rt style="font-size:12px;line-height:1.2;color:inherit">{above}</rt>'
    mark = f'<ruby title="{escape(tip)}" style="{style};color:inherit">{shown}{small}</ruby>'
    return mark + "\n" * token.count("\n")
