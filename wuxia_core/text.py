"""Text from outside: made fit to be shown, and turned into numbers to be compared.

`visible` makes text fit for terminals and plots, `escape` for HTML. Neither makes text fit for
Markdown or LaTeX, where text from outside is never put. `codes` gives a text's code points as an
array, `ngrams` the hashes of its runs of n characters. An `Edit` is a change that a rule of
cleaning proposes.
"""

import html
import re
import unicodedata
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import numpy.typing as npt

# Value of `class` for an HTML element that holds text from outside: `$$` in the element is not
# typeset as mathematics. The first name is for nbconvert's own pages, the second for JupyterLab.
NO_MATH = "tex2jax_ignore mathjax_ignore"

# Unicode categories whose characters are shown as numbers: controls, formats (directions, zero
# widths), surrogates, private use, unassigned, separators of lines and paragraphs. A private-use
# character would be drawn as a box, or as a different sign in each font.
NUMBERED = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}
# Characters that are letters and marks by category, but show nothing: fillers, variation selectors.
BLANK_LETTER = re.compile(
    "[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u3164\uffa0\ufe00-\ufe0f\U000e0100-\U000e01ef]"
)
# The characters whose category `visible` has to look up; a novel has few of them.
UNUSUAL = re.compile("[^\n\t -~\u3000-\u3029\u4e00-\u9fa5，。：；？！“”‘’…—]")

# Chinese characters; and Chinese characters with punctuation. Both strings belong inside the
# brackets of a pattern. `CJK_TEXT` matches one such character or mark.
HAN = "\u3400-\u4dbf\u4e00-\u9fff〇"
CJK = rf"{HAN}，。：；？！、“”‘’「」『』《》（）…—"
CJK_TEXT = re.compile(f"[{CJK}]")

Edit = tuple[int, int, str]  # (start, end, replacement): text[start:end] becomes the replacement

HASH_BASE = 0xF1DE83E19937733D  # odd: inverse modulo 2^64 of 2^64 over the golden ratio
MULTIPLIER = np.uint64(0xBF58476D1CE4E5B9)  # the first of the two multipliers of splitmix64

Codes = npt.NDArray[np.uint32]  # code points of characters
Hashes = npt.NDArray[np.uint64]  # of runs of characters


def visible(text: str) -> str:
    r"""Return `text` with numbers for the characters that act on the display or show nothing.

    `visible("剑\u202e光\x1b[2J")` is `"剑⟨U+202E⟩光⟨U+001B⟩[2J"`. Spaces, `\n` and `\t` stay.
    """
    return UNUSUAL.sub(_numbered, text)


def one_line(text: str) -> str:
    """Make text `visible` and put it in one line.

    Each stretch of white space becomes one space; white space at the two ends is deleted.
    """
    return visible(" ".join(text.split()))


def escape(text: str) -> str:
    r"""Make text `visible` and fit for HTML, between tags and in quoted attributes.

    `escape("<b>\u200b")` is `"&lt;b&gt;⟨U+200B⟩"`.
    """
    return html.escape(visible(text))


def name_some(names: Sequence[str], count: int = 3) -> str:
    """Name the first `count` of some names, and count the others: `甲, 乙, 丙 and 2 more`."""
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return f"{', '.join(names[:count])}{more}"


def _numbered(match: re.Match[str]) -> str:
    """Return the matched character; if it acts on the display or shows nothing, as `⟨U+202E⟩`."""
    character = match.group()
    hidden = unicodedata.category(character) in NUMBERED or BLANK_LETTER.match(character)
    return f"⟨U+{ord(character):04X}⟩" if hidden else character


def codes(text: str) -> Codes:
    """Return the code points of a text's C characters, (C,), read-only; surrogates may be alone."""
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)


def without_spaces(text: str) -> tuple[Codes, npt.NDArray[np.int64]]:
    """Return the N code points that are not white space, (N,), and their places in the text, (N,).

    White space means here U+3000 and all characters up to U+0020 (the space, newlines, controls).
    `without_spaces("剑 光")` gives the codes of 剑 and 光, and the places 0 and 2.
    """
    characters = codes(text)
    places = np.flatnonzero((characters > 0x20) & (characters != 0x3000))
    return characters[places], places


def ngrams(characters: Codes, n: int) -> Hashes:
    """Hash every run of n characters in a row of C code points: (C - n + 1,), or (0,) if C < n.

    `ngrams(codes("一剑光"), 2)` has the hashes of 一剑 and of 剑光. The hash of 一剑 is 一 + 剑 ·
    `HASH_BASE` modulo 2^64 (a polynomial in the base, Karp & Rabin 1987), with its bits mixed.
    """
    if len(characters) < n:
        return np.empty(0, np.uint64)
    powers = np.array([pow(HASH_BASE, exponent, 1 << 64) for exponent in range(n)], np.uint64)
    # at each place the sum of character · power over the run, modulo 2^64
    hashes = np.correlate(characters.astype(np.uint64), powers, "valid")
    hashes ^= hashes >> np.uint64(31)  # the bits are mixed, as the low bits of the sum are poor
    hashes *= MULTIPLIER
    return np.asarray(hashes ^ (hashes >> np.uint64(29)))


def distinct(hashes: Hashes) -> Hashes:
    """Return each distinct hash once, in ascending order; `hashes` itself is sorted in place.

    numpy's `unique` is slower and takes twice the memory.
    """
    hashes.sort()
    # If there are no hashes, there is no first one: the slice removes the True.
    is_first = np.append(True, hashes[1:] != hashes[:-1])[: len(hashes)]
    return np.asarray(hashes[is_first])


def replace(
    pattern: re.Pattern[str] | str, replacement: str | Callable[[re.Match[str]], str], text: str
) -> Iterator[Edit]:
    """Yield an edit for every match of `pattern` in `text`: the match becomes `replacement`.

    If `replacement` is a string, it is put in as it is (references to groups are not expanded). If
    it is a function, it is called with the match and returns the text to put in.
    """
    for match in re.finditer(pattern, text):
        new = replacement if isinstance(replacement, str) else replacement(match)
        yield *match.span(), new


def join_pattern(table: dict[str, str | list[str]], name: str) -> str:
    """Return the regular expression that `table` has under `name`, written out in full.

    `%other%` in an expression is replaced by the expression under `other`. A list becomes a group
    of alternatives. A string stays as it is, so it may be used in a class: in `{"letters": "ab",
    "word": ["[%letters%]+", "c"]}` the expression under `"word"` is `"(?:[ab]+|c)"`.
    """
    entry = table[name]
    pattern = entry if isinstance(entry, str) else f"(?:{'|'.join(entry)})"
    return re.sub("%([a-z_]+)%", lambda match: join_pattern(table, match[1]), pattern)


def lines_with(pattern: re.Pattern[str], text: str) -> Iterator[tuple[int, int]]:
    """Yield `(start, end)`, without the newline, of each line in which a match of `pattern` begins.

    A line with several matches is yielded once.
    """
    end = -1  # where the line yielded last ends
    for match in pattern.finditer(text):
        if match.start() > end:
            start = text.rfind("\n", 0, match.start()) + 1
            end = text.find("\n", match.start())
            end = len(text) if end < 0 else end
            yield start, end
