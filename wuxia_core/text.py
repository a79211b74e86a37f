"""Text from outside: made fit to be shown, and turned into numbers to be compared.

`visible` is for terminals and plots, `escape` for HTML. Neither makes text fit for Markdown or
LaTeX: text from outside is never given to those. `codes` are a text's code points as an array,
`ngrams` the hashes of its runs of n characters. `Edit` is what a rule of cleaning proposes.
"""

import functools
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

FACTOR = 0x9E3779B97F4A7C15  # of the rolling hash, odd, so that it has an inverse
INVERSE = pow(FACTOR, -1, 1 << 64)
MIX = np.uint64(0xBF58476D1CE4E5B9)  # splitmix64's

Codes = npt.NDArray[np.uint32]  # code points
Hashes = npt.NDArray[np.uint64]


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


def is_han(characters: Codes) -> npt.NDArray[np.bool_]:
    """Flag CJK ideographs, (C,)."""
    return (characters >= 0x3400) & (characters < 0xA000)


def ngrams(characters: Codes, n: int) -> Hashes:
    """Hash every run of n characters: (C - n + 1,), empty where there are fewer.

    A rolling hash (Karp & Rabin 1987) modulo 2^64, by differences of running sums.
    """
    length = len(characters)
    count = max(0, length - n + 1)
    sums = np.zeros(length + 1, np.uint64)
    np.cumsum(characters * _powers(INVERSE, length), out=sums[1:])
    hashes = (sums[len(sums) - count :] - sums[:count]) * _powers(FACTOR, count)
    hashes ^= hashes >> np.uint64(31)
    hashes *= MIX
    return np.asarray(hashes ^ (hashes >> np.uint64(29)))


def distinct(hashes: Hashes) -> Hashes:
    """Sort in place and keep each once; numpy's `unique` is slower and takes twice the memory."""
    hashes.sort()
    new = np.append(True, hashes[1:] != hashes[:-1])[: len(hashes)]
    return np.asarray(hashes[new])


def _powers(factor: int, length: int) -> Hashes:
    """Powers of a factor from the 0th on, (length,)."""
    return _power_table(factor, 1 << max(length, 4096).bit_length())[:length]


@functools.cache
def _power_table(factor: int, length: int) -> Hashes:
    steps = np.full(length, factor, np.uint64)
    steps[0] = 1
    return np.cumprod(steps)


def replace(
    pattern: re.Pattern[str] | str, new: str | Callable[[re.Match[str]], str], text: str
) -> Iterator[Edit]:
    """Propose to replace every match."""
    for match in re.finditer(pattern, text):
        yield *match.span(), new if isinstance(new, str) else new(match)


def lines_with(pattern: re.Pattern[str], text: str) -> Iterator[tuple[int, int]]:
    """Find the lines in which a pattern occurs, each once."""
    end = -1
    for match in pattern.finditer(text):
        if match.start() > end:
            start = text.rfind("\n", 0, match.start()) + 1
            end = text.find("\n", match.start())
            end = len(text) if end < 0 else end
            yield start, end
