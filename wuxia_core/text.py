"""Text from outside: made fit to be shown, and turned into numbers to be compared.

`visible` is for terminals and plots, `escape` for HTML. Neither makes text fit for Markdown or
LaTeX: text from outside is never given to those. `codes` are a text's code points as an array,
`ngrams` the hashes of its runs of n characters. `Edit` is what a rule of cleaning proposes.
"""

import html
import re
import unicodedata
from collections.abc import Callable, Iterator

import numpy as np
import numpy.typing as npt

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

HAN = "\u3400-\u4dbf\u4e00-\u9fff〇"
CJK = rf"{HAN}，。：；？！、“”‘’「」『』《》（）…—"
CJK_TEXT = re.compile(f"[{CJK}]")

Edit = tuple[int, int, str]  # text[start:end] becomes this

BASE = 0xF1DE83E19937733D  # of the hash, odd; the inverse of 2^64 over the golden ratio
MIX = np.uint64(0xBF58476D1CE4E5B9)  # splitmix64's

Codes = npt.NDArray[np.uint32]  # code points
Hashes = npt.NDArray[np.uint64]


def visible(text: str) -> str:
    r"""Write what would act on the display, or shows nothing, as its number; `\n`, `\t` stay.

    `visible("剑\u202e光\x1b[2J")` is `"剑⟨U+202E⟩光⟨U+001B⟩[2J"`.
    """
    return UNUSUAL.sub(_numbered, text)


def one_line(text: str) -> str:
    """Make text `visible` in one line, with a space for each stretch of white space."""
    return visible(" ".join(text.split()))


def escape(text: str) -> str:
    r"""Make text `visible` and fit for HTML, between tags and in quoted attributes.

    `escape("<b>\u200b")` is `"&lt;b&gt;⟨U+200B⟩"`.
    """
    return html.escape(visible(text))


def _numbered(match: re.Match[str]) -> str:
    character = match.group()
    acts = unicodedata.category(character) in ACTING or BLANK.match(character)
    return f"⟨U+{ord(character):04X}⟩" if acts else character


def codes(text: str) -> Codes:
    """Code points, (C,)."""
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)


def without_spaces(text: str) -> tuple[Codes, npt.NDArray[np.int64]]:
    """Code points that are not white space, and where in the text they stand: (N,) and (N,).

    `without_spaces("剑 光")` gives the codes of 剑 and 光, and the places 0 and 2.
    """
    characters = codes(text)
    places = np.flatnonzero((characters > 0x20) & (characters != 0x3000))
    return characters[places], places


def ngrams(characters: Codes, n: int) -> Hashes:
    """Hash every run of n characters: (C - n + 1,), empty where there are fewer.

    A polynomial in `BASE` modulo 2^64 (Karp & Rabin 1987), its bits mixed.
    """
    if len(characters) < n:
        return np.empty(0, np.uint64)
    powers = np.array([pow(BASE, place, 1 << 64) for place in range(n)], np.uint64)
    hashes = np.correlate(characters.astype(np.uint64), powers)
    hashes ^= hashes >> np.uint64(31)
    hashes *= MIX
    return np.asarray(hashes ^ (hashes >> np.uint64(29)))


def distinct(hashes: Hashes) -> Hashes:
    """Sort in place and keep each once; numpy's `unique` is slower and takes twice the memory."""
    hashes.sort()
    new = np.append(True, hashes[1:] != hashes[:-1])[: len(hashes)]
    return np.asarray(hashes[new])


def replace(
    pattern: re.Pattern[str] | str, new: str | Callable[[re.Match[str]], str], text: str
) -> Iterator[Edit]:
    """Propose to replace every match."""
    for match in re.finditer(pattern, text):
        yield *match.span(), new if isinstance(new, str) else new(match)


def join_pattern(table: dict[str, str | list[str]], name: str) -> str:
    """Write out a pattern that stands in a table, with `%other%` for another one of it.

    A list is a group of alternatives, a string stands as it is, also in a class: of
    `{"letters": "ab", "word": ["[%letters%]+", "c"]}` `"word"` is `"(?:[ab]+|c)"`.
    """
    found = table[name]
    pattern = found if isinstance(found, str) else f"(?:{'|'.join(found)})"
    return re.sub("%([a-z_]+)%", lambda match: join_pattern(table, match[1]), pattern)


def lines_with(pattern: re.Pattern[str], text: str) -> Iterator[tuple[int, int]]:
    """Find the lines in which a pattern occurs, each once."""
    end = -1
    for match in pattern.finditer(text):
        if match.start() > end:
            start = text.rfind("\n", 0, match.start()) + 1
            end = text.find("\n", match.start())
            end = len(text) if end < 0 else end
            yield start, end
