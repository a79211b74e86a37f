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

# By kind of a masked token: the CSS of its background and of its underline; the kind's name, a key
# of the messages; what a terminal shows, with {} for the token.
FILL = {SINGLE: "rgba(0,114,178,.45)", SPAN: "rgba(213,94,0,.45)"}
LINE = {SINGLE: "2px dotted rgb(0,114,178)", SPAN: "2px solid rgb(213,94,0)"}
NAMES = {SINGLE: "single", SPAN: "span"}
BRACKETS = {SINGLE: "〔{}〕", SPAN: "【{}】"}
# By action: its name, a key of the messages, and what a terminal shows behind the token.
ACTIONS = {MASKED: "mask token", RANDOM: "random token", UNCHANGED: "unchanged"}
SIGNS = {MASKED: "", RANDOM: "≠", UNCHANGED: "="}
# CSS of a text, and of the column that it stands in.
TEXT_STYLE = "white-space:pre-wrap;overflow-wrap:anywhere;line-height:2;font-size:16px"
COLUMN = "display:inline-block;vertical-align:top;box-sizing:border-box;padding-right:1em"


class Segment(NamedTuple):
    """A stretch of text with one look: `str()` writes it for a terminal, `_html` for a notebook."""

    text: str
    plain: str = "{}"  # what a terminal shows, with {} for the text
    style: str = ""  # CSS for a notebook
    tip: str = ""  # tooltip in a notebook

    def __str__(self) -> str:
        """Write the text for a terminal."""
        return self.plain.format(visible(self.text))


def _cut_by_look(text: str, marks: Iterable[tuple[int, int, Segment]]) -> tuple[Segment, ...]:
    """Cut a text into segments, wherever its look changes.

    `marks` are (start, end, look), in characters of the text. A look is a `Segment` whose text is
    empty; the segments that are returned have theirs filled in. If marks overlap, the last one
    counts; a character without a mark is shown as it is.
    """
    looks = [Segment("")] * len(text)  # the look of each character
    for start, end, look in marks:
        looks[start:end] = [look] * (end - start)
    runs = groupby(zip(text, looks, strict=True), key=itemgetter(1))
    return tuple(look._replace(text="".join(c for c, _ in run)) for look, run in runs)


class MaskView(NamedTuple):
    """A text with its masked tokens marked: a notebook shows it as HTML, `str()` is for terminals.

    In a terminal 〔甲〕 is a single masked token, 【甲乙】 a span. ≠ stands behind a token that was
    replaced by a random one, = behind an unchanged one: 【甲】【乙≠】 is a span of two tokens, the
    second of which was replaced by a random one. `kinds` and `actions`, (T,), have a number for
    each of the T tokens, from `SpanMasker.kinds` and `Corruption.actions`.
    """

    segments: tuple[Segment, ...]
    kinds: Kinds
    actions: Kinds

    def __str__(self) -> str:
        """Write the text with its marks for a terminal."""
        return "".join(map(str, self.segments))

    def _repr_html_(self) -> str:
        """Draw the text, and below it how many tokens are of each kind.

        If some masked tokens are not replaced by the mask token, the number of tokens with each
        action follows.
        """
        labels = messages("masks")
        # Each entry has its CSS, its key in the messages, and flags of its tokens, (T,).
        entries = [(_mask_style(kind), NAMES[kind], self.kinds == kind) for kind in NAMES]
        if np.isin(self.actions, [RANDOM, UNCHANGED]).any():
            entries += [(_action_style(SPAN, n), ACTIONS[n], self.actions == n) for n in ACTIONS]
        counts = " · ".join(
            f"{_html([Segment(labels[name], style=style)])} {tokens.sum()} ({tokens.mean():.1%})"
            for style, name, tokens in entries
        )
        legend = labels["counts"].format(counts=counts, tokens=len(self.kinds))
        return in_columns([("", _html(self.segments))], legend)


def in_columns(columns: Iterable[tuple[str, str]], legend: str) -> str:
    """Put texts beside each other and the legend below; return the HTML.

    `columns` are pairs of a head and its text, at least one; all these strings are HTML. On a
    narrow page the texts stand below each other.
    """
    cells = [f'{head}<div style="{TEXT_STYLE}">{text}</div>' for head, text in columns]
    style = f"{COLUMN};width:{100 // len(cells)}%;min-width:min(100%,17em)"
    body = "".join(f'<div style="{style}">{cell}</div>' for cell in cells)
    below = f'<p style="font-size:13px">{legend}</p>'
    return f'<div lang="zh-Hans" class="{NO_MATH}">{body}{below}</div>'


def _html(segments: Iterable[Segment]) -> str:
    """Write segments as HTML: each is a `span` with its text, style and tooltip."""
    return "".join(
        f'<span title="{escape(tip)}" style="{style};color:inherit">{escape(text)}</span>'
        for text, _, style, tip in segments
    )


def _mask_style(kind: int, *, filled: bool = True) -> str:
    """Write the CSS of a masked token in its kind's colour: underlined, and perhaps `filled`."""
    return f"background:{FILL[kind] if filled else 'transparent'};border-bottom:{LINE[kind]}"


def _action_style(kind: int, action: int) -> str:
    """Write the CSS of a masked token of a `kind`, by the `action` on it.

    Every token is underlined in the colour of its kind. An unchanged token is not filled with that
    colour, all others are. A token that was replaced by a random one is struck out, too.
    """
    struck = ";text-decoration:line-through" if action == RANDOM else ""
    return _mask_style(kind, filled=action != UNCHANGED) + struck


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

    The tokenizer is by default the bundled one, the masker by default one that masks 15 % of the
    tokens, half of these in spans of 3 to 5. Another `key` or `epoch` gives another draw. With a
    `segmenter` spans cover its words, as with `masking.span_unit: word`. Without a `corruption`
    the mask token stands in every masked place.

    Raises
    ------
    DataError
        If the text has no token.
    """
    tokenizer = tokenizer or load_tokenizer(str(TINY_BASE))
    window, offsets = Encoder(tokenizer, segmenter or Segmenter()).passage(text)
    if not offsets:
        raise DataError("show_masks: the text is empty")
    words = None if segmenter is None else window.word_ids[None]
    kinds = (masker or SpanMasker()).kinds(window.position_ids[None] > 0, [key], epoch, words)
    actions = (kinds > KEPT).astype(np.int8)  # 1 is MASKED, 0 a token that is kept
    ids = window.input_ids[None].astype(np.int64)  # (1, T + 1): the first token starts a document
    # For the tooltips: the characters and the id of each token, such as `剑光 #4711`.
    names = [f"{text[a:b]} #{n}" for (a, b), n in zip(offsets, ids[0, 1:], strict=True)]
    if corruption is not None:
        actions = corruption.actions(kinds > KEPT, [key], epoch)
        inputs = corruption.apply(ids, actions, [key], epoch)[0, 1:]  # (T,), what the model sees
        for place in np.flatnonzero(actions[0, 1:] == RANDOM):
            names[place] += f" → {tokenizer.decode([inputs[place]])} #{inputs[place]}"
    return mark_tokens(text, offsets, kinds[0, 1:], actions[0, 1:], names)


def mark_tokens(
    text: str, offsets: Sequence[tuple[int, int]], kinds: Kinds, actions: Kinds, names: list[str]
) -> MaskView:
    """Mark the characters of masked tokens, and return the text with its marks.

    `offsets` are the half-open spans of characters of T tokens, `kinds` and `actions` are (T,) as
    in `MaskView`, and `names` describe the T tokens in tooltips. Tokens of a byte-level vocabulary
    may share a character: it is marked if any of them is masked. Characters of no token are shown
    as kept.
    """
    marks, labels = [], messages("masks")
    # `block` has the indices of neighbouring tokens of one kind: a span, or one single token, since
    # two masked blocks are never neighbours.
    for kind, block in groupby(range(len(kinds)), key=lambda token: int(kinds[token])):
        if kind == KEPT:
            continue
        tokens = list(block)
        label = labels["span of" if kind == SPAN else "single"].format(size=len(tokens))
        tip = f"{label}: {', '.join(names[token] for token in tokens)}"
        for token in tokens:
            plain = BRACKETS[kind].format("{}" + SIGNS[actions[token]])  # such as 【{}≠】
            look = Segment("", plain, _action_style(kind, actions[token]), tip)
            marks.append((*offsets[token], look))
    return MaskView(_cut_by_look(text, marks), kinds, actions)


class XRayView(NamedTuple):
    """One text of an X-ray, with a column for each model, as a notebook shows it.

    Above each masked token stands the model's first guess; the token is filled if the guess is
    right.
    """

    xray: XRay
    number: int = 0  # index of the text in `xray.texts`

    def _repr_html_(self) -> str:
        """Draw a column for each model, and below them what the marks mean."""
        labels = messages("xray")
        marks = [Segment(labels[NAMES[kind]], style=_mask_style(kind)) for kind in NAMES]
        legend = " · ".join([*(_html([mark]) for mark in marks), labels["wrong"]])
        return in_columns(map(self._column, self.xray.models), legend)

    def _column(self, model: str) -> tuple[str, str]:
        """Draw the text with the guesses of `model`; return the pair (head, text), both HTML.

        If several masked tokens share a character, only the first of them is marked.
        """
        labels, kind_labels = messages("xray"), messages("masks")
        tokens = self.xray.tokens[self.xray.tokens["text"] == self.number]
        # The model's columns, such as base_right, become right, bits and guesses.
        tokens = tokens.rename(columns=lambda column: column.removeprefix(f"{model}_"))
        text, body, done = self.xray.texts[self.number], "", 0  # `done` characters are in `body`
        for row in tokens.itertuples():
            if row.start < done:
                continue
            guesses = ", ".join(f"{guess} {share:.1%}" for guess, share in row.guesses)
            tip = f"{kind_labels[NAMES[row.kind]]}, {row.bits:.2f} {labels['unit']} · {guesses}"
            style = _mask_style(row.kind, filled=row.right)
            mark = _ruby(text[row.start : row.end], row.guesses[0][0], style, tip)
            body += escape(text[done : row.start]) + mark
            done = row.end
        right_count, mean_bits = tokens["right"].sum(), tokens["bits"].mean()
        accuracy = labels["found"].format(right=right_count, all=len(tokens), bits=mean_bits)
        marked_text = f'<span style="line-height:2.6">{body}{escape(text[done:])}</span>'
        return f"<b>{named(model)}</b> {accuracy}", marked_text


def _ruby(token: str, guess: str, style: str, tip: str) -> str:
    """Write the HTML of a token with the guess above it, a line break in either as ↵.

    As many line breaks as the token has follow it, so that the lines of the text stay.
    """
    below, above = (escape(part.replace("\n", "↵")) for part in (token, guess))
    small = f'<rt style="font-size:12px;line-height:1.2;color:inherit">{above}</rt>'
    mark = f'<ruby title="{escape(tip)}" style="{style};color:inherit">{below}{small}</ruby>'
    return mark + "\n" * token.count("\n")
