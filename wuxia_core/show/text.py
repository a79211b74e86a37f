"""One rule for text from outside: it is shown, and never acts on what shows it.

`visible` is for terminals and plots, `escape` for HTML. Neither makes text fit for Markdown or
LaTeX: text from outside is never given to those.
"""

import html
import re
import unicodedata

# For the `class` of what holds such text: there `$$` is no mathematics. The first name is for
# nbconvert's own pages, the second for JupyterLab.
NO_MATH = "tex2jax_ignore mathjax_ignore"

# Controls, formats (directions, zero widths), surrogates, private use, unassigned, separators.
# A private character is a box, or another sign in every font: its number says more.
ACTING = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}
# By category these are letters and marks, but they show nothing: fillers, variation selectors.
BLANK = re.compile(
    "[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u3164\uffa0\ufe00-\ufe0f\U000e0100-\U000e01ef]"
)
UNUSUAL = re.compile("[^\n\t -~\u3000-\u3029\u4e00-\u9fa5，。：；？！“”‘’…—]")  # few in a novel


def visible(text: str) -> str:
    r"""Write what would act on the display, or shows nothing, as its number; `\n`, `\t` stay.

    `visible("剑\u202e光\x1b[2J")` is `"剑⟨U+202E⟩光⟨U+001B⟩[2J"`.
    """
    return UNUSUAL.sub(_numbered, text)


def escape(text: str) -> str:
    r"""Make text `visible` and fit for HTML, between tags and in quoted attributes.

    `escape("<b>\u200b")` is `"&lt;b&gt;⟨U+200B⟩"`.
    """
    return html.escape(visible(text))


def _numbered(match: re.Match[str]) -> str:
    character = match.group()
    acts = unicodedata.category(character) in ACTING or BLANK.match(character)
    return f"⟨U+{ord(character):04X}⟩" if acts else character
