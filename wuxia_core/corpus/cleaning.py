"""Rules of cleaning: what is no story is cut out, and what was damaged is mended.

A rule is a function that looks at a text and proposes edits, in order and without overlap; `_apply`
makes them. Some rules stand in noise.py, chapters.py and encodings.py. `RULES`, at the end, has
all of them in the order in which they are applied.
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
from wuxia_core.corpus.encodings import GB18030_2022, garbled, mojibake
from wuxia_core.corpus.noise import BLANK, SENTENCE_END, pattern
from wuxia_core.text import CJK, CJK_TEXT, Edit, lines_with, replace

STRAIGHT_QUOTE = re.compile("[\"']")
IN_SINGLE_QUOTES = re.compile(f"(?<![A-Za-z])'(?=[{CJK}])[^'\n]*(?<=[{CJK}])'(?![A-Za-z])")
PUNCTUATION = re.compile("[，。：；？！]")

OFF = frozenset({"quotes"})  # rules that are applied only where a config asks for them
LINE_ENDS = "\r\f\v\x85\u2028\u2029"
LINE_END = re.compile(f"\r\n?|[{LINE_ENDS}]")
BLANK_LINES = re.compile(r"\n(?:\n+|(?<=\A\n)|\Z)")
SPACES = re.compile(f"[{BLANK}]+")
PRIVATE_USE = re.compile("[\ue000-\uf8ff□]")
ESCAPES = {"\\n": "\n", "\\u3000": "　"}
BREAKS = re.compile(r"<br\b|(?<!，)<(?:/?p|/?div|/tr)\b", re.IGNORECASE)  # tags that end a line
LONG_LINE = 500  # characters: of a line so many are looked at on each side, which is enough

LINE = re.compile(r"^.*\S", re.MULTILINE)  # without the blanks at its end
ENDS = "".join(SENTENCE_END) + r"\s"
RUNS_ON = re.compile(rf"\n(?:(?<=[^{ENDS}]\n)|(?<=[^{ENDS}][{BLANK}]\n))")  # inside a sentence
# Lines cut inside a sentence; columns; columns; and the columns by which lines wrapped at one width
# differ, since a word or a mark is not split.
FEWEST_CUT, NARROWEST, WIDEST, SLACK = 10, 20, 120, 8
FAR_SHORTER = 0.7  # of the width: so short a line ends its paragraph
ENGLISH = re.compile(r"[A-Za-z,]\s*[A-Za-z]")  # they need a space between them
EXAMPLES, AROUND = 5, 12  # examples kept for a rule and text; characters shown around each


def line_ends(text: str) -> Iterator[Edit]:
    """Replace CRLF and other line ends by a newline."""
    return replace(LINE_END, "\n", text) if any(end in text for end in LINE_ENDS) else iter(())


def entities(text: str) -> Iterator[Edit]:
    r"""Decode entities of HTML, also doubled (`&amp;nbsp;`), and `\n` or `\u3000` spelt out."""
    for match in pattern("entity").finditer(text if "&" in text or "\\" in text else ""):
        entity, decoded = "", match.group()
        while decoded != entity:
            entity, decoded = decoded, html.unescape(decoded)
        yield *match.span(), ESCAPES.get(decoded, "") if decoded[0] == "\\" else decoded


def markup(text: str) -> Iterator[Edit]:
    """Delete HTML comments and tags, text that they hide or put above characters, and forum tags.

    A tag that ends a line becomes a newline.
    """
    text = text if "<" in text or "[" in text else ""
    return replace(pattern("markup"), lambda x: "\n" * bool(BREAKS.match(text, x.start())), text)


def invisible(text: str) -> Iterator[Edit]:
    """Delete byte-order marks, controls, zero widths, directions, fillers, variation selectors."""
    return replace(pattern("invisible"), "", text)


def lookalikes(text: str) -> Iterator[Edit]:
    """Replace rare blanks and radicals by the usual characters that they look like: ⼈ by 人."""
    return replace(pattern("lookalike"), lambda x: unicodedata.normalize("NFKC", x[0]), text)


def spaces(text: str) -> Iterator[Edit]:
    """Delete spaces at the ends of a line and stray ones in a sentence; make one of several.

    Two wide ones after a sentence's end are the indent of a paragraph whose line break was lost:
    they become a newline. Headings, and verse without punctuation, keep single spaces.
    """
    for match in SPACES.finditer(text):
        start, end = match.span()
        at_line_end = start == 0 or end == len(text) or text[start - 1] == "\n" or text[end] == "\n"
        if at_line_end or _is_stray(text, start, end):
            yield start, end, ""
        elif end - start > 1:
            is_indent = match.group() == "　　" and text.endswith(SENTENCE_END, 0, start)
            # From ⺀ on characters are Chinese, and wide.
            yield start, end, "\n" if is_indent else "　" if text[start - 1] > "⺀" else " "


def _is_stray(text: str, start: int, end: int) -> bool:
    """Whether the blanks from `start` to `end` are one space in a sentence of Chinese.

    The sentence's line must have punctuation, and be no heading.
    """
    if end - start > 1 or not (CJK_TEXT.match(text, start - 1) and CJK_TEXT.match(text, end)):
        return False
    before = text[max(0, start - LONG_LINE) : start].rpartition("\n")[2]
    line = before + text[start : start + LONG_LINE].partition("\n")[0]
    return bool(PUNCTUATION.search(line)) and not HEADING.match(line)


def private_use(text: str) -> Iterator[Edit]:
    """Replace the private-use characters that GB18030-2022 gives a place.

    Others, and □, are replaced by themselves, so that they are counted.
    """
    return replace(PRIVATE_USE, lambda match: match.group().translate(GB18030_2022), text)


def blank_lines(text: str) -> Iterator[Edit]:
    """Delete empty lines, so that a paragraph is a line."""
    return replace(BLANK_LINES, lambda x: "\n" * (x.start() > 0 and x.end() < len(text)), text)


def quotes(text: str) -> Iterator[Edit]:
    """Replace straight quotes by “ and ” in turn in each paragraph, and ' around Chinese by ‘ ’."""
    for start, end in lines_with(STRAIGHT_QUOTE, text):
        doubles = (match.start() for match in re.finditer('"', text[start:end]))
        singles = (match.span() for match in IN_SINGLE_QUOTES.finditer(text[start:end]))
        if CJK_TEXT.search(text, start, end):
            marks = [*zip(doubles, cycle("“”"), strict=False)]  # (place in the line, its new mark)
            marks += [mark for a, b in singles for mark in ((a, "‘"), (b - 1, "’"))]
            yield from ((start + at, start + at + 1, mark) for at, mark in sorted(marks))


def stamps(text: str) -> Iterator[Edit]:
    """Delete stamps (times of update, counts of words), with the text before them on their line.

    That text stays if it is a heading or a sentence of the story.
    """
    for start, end in lines_with(pattern("stamp_words"), text):
        # + 1: a line that is deleted whole takes its newline along
        match = pattern("stamp").search(text, start, end + 1)
        if not match:
            continue
        keeps_text = HEADING.match(text, match.start()) or match["before"].endswith(SENTENCE_END)
        yield *match.span("stamp" if keeps_text else 0), ""


def page_marks(text: str) -> Iterator[Edit]:
    """Delete page marks; a sentence that one cuts is joined again."""
    last_end = 0
    for match in pattern("page_mark").finditer(text):
        start, end = match.span()
        before = text[max(last_end, start - LONG_LINE) : start]
        start -= len(before) - len(pattern("before_mark").sub("", before))
        behind = pattern("behind_mark").match(text, end)
        end = behind.end() if behind else end
        is_indented = text[match.end() : end].endswith(("　", "  "))
        heading = HEADING.match(text, text.rfind("\n", 0, start) + 1) or HEADING.match(text, end)
        parts_paragraphs = is_indented or heading or text.endswith(SENTENCE_END, 0, start)
        yield max(start, last_end), end, "\n" if start == 0 or parts_paragraphs else ""
        last_end = end


def hard_wrap(text: str) -> Iterator[Edit]:
    """Join the lines that were broken at a fixed width, the full width, into paragraphs again.

    The gap (blanks and newlines) that is usual behind a line cut inside a sentence parts no
    paragraphs; a wider one does, and so does a line far shorter than the full width. If wider gaps
    are rare, paragraphs are not set apart by them: then only lines beside a cut one are joined, and
    a line that ends a sentence only if it is as wide as most cut ones.
    """
    if sum(1 for _ in RUNS_ON.finditer(text)) <= FEWEST_CUT:
        return
    lines = list(LINE.finditer(text))
    widths = [_columns(line.group()) for line in lines]
    ends_sentence = [line.group().endswith(SENTENCE_END) for line in lines]
    full = _full_width(lines, widths, ends_sentence)
    if not full:
        return
    cut = [full <= w < full + SLACK and not e for w, e in zip(widths, ends_sentence, strict=True)]
    wider_lines = sum(width >= full + 2 * SLACK for width in widths)
    if wider_lines > 2 * sum(cut) and sum(a and b for a, b in pairwise(cut)) < sum(cut) / 4:
        return  # lone lines among longer ones: of a notice, say
    starts = [line.end() - len(line[0].lstrip()) for line in lines]
    gaps = [start - line.end() for line, start in zip(lines, starts[1:], strict=False)]
    usual_gap = mode(compress(gaps, cut))
    has_wide_gaps = sum(gap > usual_gap for gap in gaps) > len(lines) / 20
    least_at_end = full if has_wide_gaps else mode(compress(widths, cut)) - 1  # of a sentence
    least_inside = full * FAR_SHORTER if has_wide_gaps else full
    for n, (line, next_line) in enumerate(pairwise(lines)):
        least = least_at_end if ends_sentence[n] else least_inside
        fits = least <= widths[n] < full + 2 * SLACK and gaps[n] <= usual_gap
        is_wrapped = fits and (has_wide_gaps or any(cut[max(0, n - 1) : n + 2]))
        if is_wrapped and not (HEADING.match(line[0]) or HEADING.match(next_line[0])):
            end = line.end() + gaps[n]
            yield line.end(), end, " " if ENGLISH.match(text[line.end() - 1] + text[end]) else ""


def _columns(line: str) -> int:
    """Measure a line in columns: a Chinese character is two wide, as it has two bytes in GBK."""
    return len(line.encode("gbk", "replace")) if len(line) <= WIDEST else 2 * len(line)


def _full_width(lines: list[re.Match[str]], widths: list[int], ends_sentence: list[bool]) -> int:
    """Find the width, in columns, from which a line is full; 0 for text that is not hard-wrapped.

    More than a third of the lines of less than 8 columns more, and more than ten of them, end
    inside a sentence.
    """
    cut_lines, all_lines = Counter[int](), Counter(widths)  # by their width
    for line, width, ends in zip(lines, widths, ends_sentence, strict=True):
        cut_lines[width] += not ends and bool(PUNCTUATION.search(line[0]))
    sums = {w: sum(cut_lines[w + n] for n in range(SLACK)) for w in range(NARROWEST, WIDEST)}
    full = max(sums, key=sums.__getitem__)
    enough = max(FEWEST_CUT, sum(all_lines[full + n] for n in range(SLACK)) / 3)
    return full if sums[full] > enough else 0


@dataclass
class Tally:
    """How often a rule edited a text, the characters it removed and inserted, and some examples."""

    rule: str
    count: int = 0
    removed: int = 0
    inserted: int = 0
    examples: list[tuple[str, str]] = field(default_factory=list)  # before and after

    def add(self, other: "Tally") -> None:
        """Add what the rule did to another text."""
        self.count += other.count
        self.removed += other.removed
        self.inserted += other.inserted
        self.examples += other.examples[: EXAMPLES - len(self.examples)]


def clean(text: str, skip: Container[str] = OFF) -> tuple[str, list[Tally]]:
    r"""Apply every rule but those in `skip`, by default `quotes`.

    Returns the cleaned text, and the tallies of the rules that edited it.
    `"　　甲。\r\n\r\n　　乙。"` becomes `"甲。\n乙。"` by the rules `line_ends` (two edits),
    `spaces` (two) and `blank_lines` (one).
    """
    tallies = []
    for name in RULES:
        if name not in skip:
            text, tally = _apply(name, text)
            tallies += [tally] if tally.count else []
    return text, tallies


def _apply(name: str, text: str) -> tuple[str, Tally]:
    """Make the edits that the rule of that name proposes; return the new text, and the tally."""
    edits = list(RULES[name](text))
    if not edits:
        return text, Tally(name)
    pieces: list[str] = []
    done = 0  # where the last edit ends
    for start, end, replacement in [*edits, (len(text), len(text), "")]:
        pieces += (text[done:start], replacement)
        done = end
    cleaned = "".join(pieces)
    inserted = sum(len(replacement) for _, _, replacement in edits)
    tally = Tally(name, len(edits), len(text) - len(cleaned) + inserted, inserted)
    for start, end, replacement in edits[:EXAMPLES]:
        before, after = text[max(0, start - AROUND) : start], text[end : end + AROUND]
        tally.examples.append((before + text[start:end] + after, before + replacement + after))
    return cleaned, tally


# The rules in the order in which they are applied, each with whether it is for novels only.
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
# Names that rules once had: they are still accepted in configs.
OLDER_NAMES = {"notices": "ads", "furniture": "boilerplate", "contents": "table_of_contents"}
