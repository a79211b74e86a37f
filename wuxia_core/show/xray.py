"""The mask X-ray as HTML: losses as heat, right answers underlined, guesses where one points."""

from dataclasses import dataclass
from typing import Any

from wuxia_core.evaluate import XRay
from wuxia_core.show.masks import NAMES, TEXT_STYLE
from wuxia_core.show.text import NO_MATH, escape, visible

MOST_BITS = 16.0  # and more have the deepest colour
HEAT = "rgba(213,94,0,{:.2f})"
RIGHT, WRONG = "3px solid rgb(0,114,178)", "1px dotted currentcolor"
COLUMN = "display:inline-block;vertical-align:top;box-sizing:border-box;padding-right:1em"


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
    return f'<span title="{escape(tip)}" style="{_style(bits, right)}">{escape(text)}</span>'


def _style(bits: float, right: bool) -> str:
    heat = HEAT.format(0.55 * min(1.0, bits / MOST_BITS))
    return f"background:{heat};border-bottom:{RIGHT if right else WRONG};color:inherit"


def _legend() -> str:
    steps = "".join(
        f'<span style="{_style(bits, False)};padding:0 .4em">{bits:.0f}</span>'
        for bits in (0, 4, 8, 12, MOST_BITS)
    )
    right = f'<span style="{_style(0, True)}">right</span>'
    return f'<p style="font-size:13px">bits {steps} · {right} · the guesses are in the tooltips</p>'
