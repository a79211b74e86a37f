"""Rules of cleaning: what is no story is cut out, and what was damaged is mended.

A rule looks at a text and proposes edits, in order and apart from each other; its docstring says
what it does. `RULES`, at the end, has all of them in the order in which they are applied.
"""

import html
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Container, Iterator
from dataclasses import dataclass, field
from itertools import compress, cycle, pairwise
from statistics import mode

from wuxia_core.corpus import noise
from wuxia_core.corpus.chapters import HEADING, asides, headings, table_of_contents
from wuxia_core.corpus.encodings import STANDARD, garbled, mojibake
from wuxia_core.corpus.noise import BLANK, SENTENCE_END, pattern
from wuxia_core.text import CJK, CJK_TEXT, Edit, lines_with, replace

STRAIGHT = re.compile("[\"']")
SINGLE = re.compile(f"(?<![A-Za-z])'(?=[{CJK}])[^'\n]*(?<=[{CJK}])'(?![A-Za-z])")
PUNCTUATION = re.compile("[，。：；？！]")

OFF = frozenset({"quotes"})  # rules that are applied only where they are asked for
LINE_ENDS = "\r\f\v\x85\u2028\u2029"
LINE_END = re.compile(f"\r\n?|[{LINE_ENDS}]")
BLANK_LINES = re.compile(r"\n(?:\n+|(?<=\A\n)|\Z)")
SPACES = re.compile(f"[{BLANK}]+")
PRIVATE_USE = re.compile("[\ue000-\uf8ff□]")
ESCAPES = {"\\n": "\n", "\\u3000": "　"}
BREAKS = re.compile(r"<br\b|(?<!，)<(?:/?p|/?div|/tr)\b", re.IGNORECASE)
LONG_LINE = 500  # characters: of a longer one a sentence is looked at

LINE = re.compile(r"^.*\S", re.MULTILINE)
ENDED = "".join(SENTENCE_END) + r"\s"
RUNS_ON = re.compile(rf"\n(?:(?<=[^{ENDED}]\n)|(?<=[^{ENDED}][{BLANK}]\n))")
FEWEST_CUT, NARROWEST, WIDEST, SLACK = 10, 20, 120, 8  # lines; columns
FAR_SHORTER = 0.7  # of the width: such a line ends its paragraph
WORDS = re.compile(r"[A-Za-z,]\s*[A-Za-z]")  # English words need a space between them
EXAMPLES, AROUND = 5, 12  # examples kept for a rule and text; characters shown around each


def line_ends(text: str) -> Iterator[Edit]:
    """CRLF and other line ends become a newline."""
    return replace(LINE_END, "\n", text) if any(end in text for end in LINE_ENDS) else iter(())


def entities(text: str) -> Iterator[Edit]:
    r"""Entities of HTML, also doubled (`&amp;nbsp;`), and `\n` or `\u3000` spelt out."""
    for match in pattern("entity").finditer(text if "&" in text or "\\" in text else ""):
        old, new = "", match.group()
        while new != old:
            old, new = new, html.unescape(new)
        yield *match.span(), ESCAPES.get(new, "") if new[0] == "\\" else new


def markup(text: str) -> Iterator[Edit]:
    """HTML comments and tags, with readings of characters and text of no size, and forum tags."""
    text = text if "<" in text or "[" in text else ""
    return replace(pattern("markup"), lambda x: "\n" * bool(BREAKS.match(text, x.start())), text)


def invisible(text: str) -> Iterator[Edit]:
    """Byte-order marks, controls, zero widths, directions, fillers, variation selectors."""
    return replace(pattern("invisible"), "", text)


def lookalikes(text: str) -> Iterator[Edit]:
    """Rare blanks and radicals become the ordinary characters that they look like: ⼈ is 人."""
    return replace(pattern("lookalike"), lambda x: unicodedata.normalize("NFKC", x[0]), text)


def spaces(text: str) -> Iterator[Edit]:
    """Spaces at the ends of a line and stray ones in a sentence; of several together one is left.

    Wide ones after a sentence's end are the indent of a paragraph whose line break was lost.
    Headings, and verse without punctuation, keep their spaces.
    """
    for match in SPACES.finditer(text):
        start, end = match.span()
        at_an_end = start == 0 or end == len(text) or text[start - 1] == "\n" or text[end] == "\n"
        if at_an_end or _is_stray(text, start, end):
            yield start, end, ""
        elif end - start > 1:
            indent = match.group() == "　　" and text.endswith(SENTENCE_END, 0, start)
            yield start, end, "\n" if indent else "　" if text[start - 1] > "⺀" else " "


def _is_stray(text: str, start: int, end: int) -> bool:
    """Whether a lone space stands between characters of a line that has punctuation."""
    if end - start > 1 or not (CJK_TEXT.match(text, start - 1) and CJK_TEXT.match(text, end)):
        return False
    before = text[max(0, start - LONG_LINE) : start].rpartition("\n")[2]
    line = before + text[start : start + LONG_LINE].partition("\n")[0]
    return bool(PUNCTUATION.search(line)) and not HEADING.match(line)


def private_use(text: str) -> Iterator[Edit]:
    """Private-use characters that GB18030-2022 gives a place; others, and □, are kept, counted."""
    return replace(PRIVATE_USE, lambda match: match.group().translate(STANDARD), text)


def blank_lines(text: str) -> Iterator[Edit]:
    """Empty lines: a paragraph is a line."""
    return replace(BLANK_LINES, lambda x: "\n" * (x.start() > 0 and x.end() < len(text)), text)


def quotes(text: str) -> Iterator[Edit]:
    """Straight quotes become “ ” in turn in each paragraph, and ' around Chinese becomes ‘ ’."""
    for start, end in lines_with(STRAIGHT, text):
        doubles = (match.start() for match in re.finditer('"', text[start:end]))
        singles = (match.span() for match in SINGLE.finditer(text[start:end]))
        if CJK_TEXT.search(text, start, end):
            marks = [*zip(doubles, cycle("“”"), strict=False)]
            marks += [mark for a, b in singles for mark in ((a, "‘"), (b - 1, "’"))]
            yield from ((start + at, start + at + 1, new) for at, new in sorted(marks))


def stamps(text: str) -> Iterator[Edit]:
    """Stamps: times of update, counts of words, and what stands before them unless it is story."""
    for start, end in lines_with(pattern("stamped"), text):
        match = pattern("stamp").search(text, start, end + 1)
        if not match:
            continue
        heading = HEADING.match(text, match.start())
        is_story = heading or match["before"].endswith(SENTENCE_END)
        yield *match.span("stamp" if is_story else 0), ""


def page_marks(text: str) -> Iterator[Edit]:
    """Page marks; a sentence that one cuts is joined again."""
    last = 0
    for match in pattern("page_mark").finditer(text):
        start, end = match.span()
        before = text[max(last, start - LONG_LINE) : start]
        start -= len(before) - len(pattern("before_mark").sub("", before))
        behind = pattern("behind_mark").match(text, end)
        end = behind.end() if behind else end
        indented = text[match.end() : end].endswith(("　", "  "))
        heading = HEADING.match(text, text.rfind("\n", 0, start) + 1) or HEADING.match(text, end)
        apart = indented or heading or text.endswith(SENTENCE_END, 0, start)
        yield max(start, last), end, "\n" if start == 0 or apart else ""
        last = end


def hard_wrap(text: str) -> Iterator[Edit]:
    """Lines that were broken at a fixed width become paragraphs again, also where only some were.

    What is usual behind a broken line, an empty line or an indent, sets no paragraph apart; more
    does, and so does a line far shorter than the width.
    """
    if sum(1 for _ in RUNS_ON.finditer(text)) <= FEWEST_CUT:
        return
    lines = list(LINE.finditer(text))
    widths = [_columns(line.group()) for line in lines]
    ended = [line.group().endswith(SENTENCE_END) for line in lines]
    full = _full_width(lines, widths, ended)
    if not full:
        return
    cut = [full <= w < full + SLACK and not e for w, e in zip(widths, ended, strict=True)]
    wider = sum(width >= full + 2 * SLACK for width in widths)
    if wider > 2 * sum(cut) and sum(a and b for a, b in pairwise(cut)) < sum(cut) / 4:
        return  # lone lines among longer ones: of a notice, say
    starts = [line.end() - len(line[0].lstrip()) for line in lines]
    gaps = [start - line.end() for line, start in zip(lines, starts[1:], strict=False)]
    usual = mode(compress(gaps, cut))
    indented = sum(gap > usual for gap in gaps) > len(lines) / 20
    shortest = full if indented else mode(compress(widths, cut)) - 1
    for n, (line, then) in enumerate(pairwise(lines)):
        least = shortest if ended[n] else full * FAR_SHORTER if indented else full
        wrapped = indented or any(cut[max(0, n - 1) : n + 2])
        fits = least <= widths[n] < full + 2 * SLACK and gaps[n] <= usual
        if fits and wrapped and not (HEADING.match(line[0]) or HEADING.match(then[0])):
            end = line.end() + gaps[n]
            yield line.end(), end, " " if WORDS.match(text[line.end() - 1] + text[end]) else ""


def _columns(line: str) -> int:
    return len(line.encode("gbk", "replace")) if len(line) <= WIDEST else 2 * len(line)


def _full_width(lines: list[re.Match[str]], widths: list[int], ended: list[bool]) -> int:
    """Find the width, in columns, from which a line is full; 0 for text that is not hard-wrapped.

    A third of the lines of about that width end inside a sentence.
    """
    inside, alike = Counter[int](), Counter(widths)
    for line, width, is_ended in zip(lines, widths, ended, strict=True):
        inside[width] += not is_ended and bool(PUNCTUATION.search(line[0]))
    sums = {w: sum(inside[w + n] for n in range(SLACK)) for w in range(NARROWEST, WIDEST)}
    full = max(sums, key=sums.__getitem__)
    enough = max(FEWEST_CUT, sum(alike[full + n] for n in range(SLACK)) / 3)
    return full if sums[full] > enough else 0


@dataclass
class Tally:
    """What a rule did to a text, in characters."""

    rule: str
    count: int = 0
    removed: int = 0
    inserted: int = 0
    examples: list[tuple[str, str]] = field(default_factory=list)  # before and after

    def add(self, other: "Tally") -> None:
        """Count what the rule did to another text too."""
        self.count += other.count
        self.removed += other.removed
        self.inserted += other.inserted
        self.examples += other.examples[: EXAMPLES - len(self.examples)]


def clean(text: str, skip: Container[str] = OFF) -> tuple[str, list[Tally]]:
    r"""Apply every rule but those in `skip`, by default `quotes`; list what did something.

    `"　　甲。\r\n\r\n　　乙。"` becomes `"甲。\n乙。"`: two line ends, two indents, an empty line.
    """
    tallies = []
    for name in RULES:
        if name not in skip:
            text, tally = _apply(name, text)
            tallies += [tally] if tally.count else []
    return text, tallies


def _apply(name: str, text: str) -> tuple[str, Tally]:
    edits = list(RULES[name](text))
    if not edits:
        return text, Tally(name)
    pieces: list[str] = []
    done = 0
    for start, end, new in [*edits, (len(text), len(text), "")]:
        pieces += (text[done:start], new)
        done = end
    cleaned = "".join(pieces)
    inserted = sum(len(new) for _, _, new in edits)
    tally = Tally(name, len(edits), len(text) - len(cleaned) + inserted, inserted)
    for start, end, new in edits[:EXAMPLES]:
        before, after = text[max(0, start - AROUND) : start], text[end : end + AROUND]
        tally.examples.append((before + text[start:end] + after, before + new + after))
    return cleaned, tally


# In the order in which they are applied; with each whether it is for novels only.
_RULES: dict[Callable[[str], Iterator[Edit]], bool] = {
    mojibake: False,
    line_ends: False,
    page_marks: True,
    entities: False,
    markup: False,
    invisible: False,
    lookalikes: False,
    garbled: False,
    noise.licence: False,
    headings: True,
    asides: True,
    stamps: False,
    noise.watermarks: True,
    noise.ads: False,
    noise.doubled: True,
    noise.repeats: True,
    noise.authors_notes: True,
    noise.inserts: True,
    noise.boilerplate: True,
    table_of_contents: True,
    noise.footnotes: True,
    hard_wrap: True,
    spaces: False,
    private_use: False,
    quotes: False,
    blank_lines: False,
}
RULES = {rule.__name__: rule for rule in _RULES}
NOVELS_ONLY = frozenset(rule.__name__ for rule, novels_only in _RULES.items() if novels_only)
OLDER_NAMES = {"notices": "ads", "furniture": "boilerplate", "contents": "table_of_contents"}
