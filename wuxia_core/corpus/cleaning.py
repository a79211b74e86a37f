"""Rules of cleaning: what is no story is cut out, and what was damaged is mended.

A rule is a function that takes a text and yields the edits it proposes, sorted by their places;
`_apply` makes the edits. Some rules stand in noise.py, chapters.py and encodings.py. `RULES`, at
the end, has all rules in the order in which they are applied.
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
from wuxia_core.corpus.chapters import HEADING, asides, heading_spans, headings, table_of_contents
from wuxia_core.corpus.encodings import GB18030_2022, garbled, mojibake
from wuxia_core.corpus.noise import BLANK, SENTENCE_END, pattern
from wuxia_core.text import CJK, CJK_TEXT, Edit, lines_with, replace

STRAIGHT_QUOTE = re.compile("[\"']")
# '快刀', but not it's: what begins and ends with a Chinese character or mark.
IN_SINGLE_QUOTES = re.compile(f"(?<![A-Za-z])'(?=[{CJK}])[^'\n]*(?<=[{CJK}])'(?![A-Za-z])")
PUNCTUATION = re.compile("[，。：；？！]")

OFF = frozenset({"quotes"})  # rules that are applied only if a config asks for them
LINE_END = re.compile("\r\n?|[\f\v\x85\u2028\u2029]")  # any but the newline
# Two newlines or more; or a single one with which the text begins or ends.
BLANK_LINES = re.compile(r"\n(?:\n+|(?<=\A\n)|\Z)")
SPACES = re.compile(f"[{BLANK}]+")
PRIVATE_USE = re.compile("[\ue000-\uf8ff□]")  # □ stands for a character that was lost
ESCAPES = {"\\n": "\n", "\\u3000": "　"}  # spelt out: to the character that is meant
# Tags that end a line; behind a comma, which ends none, only <br> does.
BREAKS = re.compile(r"[<＜]br\b|(?<!，)[<＜](?:/?p|/?div|/tr)\b", re.IGNORECASE)
LONG_LINE = 500  # characters of a line that are looked at on each side of a place

LINE = re.compile(r"^.*\S", re.MULTILINE)  # a line with text, without the blanks at its end
# Inside the brackets of a pattern: the marks that end a sentence, and white space.
ENDS = "".join(SENTENCE_END) + r"\s"
# A newline inside a sentence, behind at most one blank.
RUNS_ON = re.compile(rf"\n(?:(?<=[^{ENDS}]\n)|(?<=[^{ENDS}][{BLANK}]\n))")
# In hard-wrapped text more than FEWEST_CUT lines end inside a sentence. The other three count
# columns: the full width is sought from NARROWEST to WIDEST - 1; lines that were wrapped at one
# width differ by less than SLACK, as no word or mark is split.
FEWEST_CUT, NARROWEST, WIDEST, SLACK = 10, 20, 120, 8
FAR_SHORTER = 0.7  # share of the full width: a shorter line ends its paragraph
DEEP_INDENT = re.compile(
    f"^[{BLANK}]{{9,}}"
)  # of a line at the right margin: 　　……——调寄《临江仙》
# The end of a line and the beginning of the next one, if they need a space between them.
ENGLISH = re.compile("[A-Za-z,][A-Za-z]")
EXAMPLES, AROUND = 5, 12  # edits that a tally shows at most; characters shown on each side of one


def line_ends(text: str) -> Iterator[Edit]:
    """Replace each line end that is no newline (CRLF, CR, form feed, U+2028 …) by a newline."""
    return replace(LINE_END, "\n", text)


def entities(text: str) -> Iterator[Edit]:
    r"""Decode entities of HTML, also doubled ones (`&amp;nbsp;`), and escapes that are spelt out.

    The escape `\n` becomes a newline and `\u3000` a wide space; `\r`, `\t` and `\u00a0` are
    deleted. An entity that HTML does not know is replaced by itself, which counts as an edit.
    """
    for match in pattern("entity").finditer(text):
        entity, decoded = "", match.group()
        while decoded != entity:  # until nothing is left to decode
            entity, decoded = decoded, html.unescape(decoded)
        is_escape = match.group().startswith("\\")
        yield *match.span(), ESCAPES.get(decoded, "") if is_escape else decoded


def markup(text: str) -> Iterator[Edit]:
    """Delete HTML comments and tags, and forum tags such as `[url=x]`.

    The text of scripts and styles, text that is not displayed, and the reading above a character
    (`<rt>`) are deleted with their tags. A tag that ends a line becomes a newline.
    """
    # A text without these brackets has no tags: it is not searched.
    text = text if any(bracket in text for bracket in "<＜[") else ""
    return replace(pattern("markup"), lambda x: "\n" if BREAKS.match(text, x.start()) else "", text)


def invisible(text: str) -> Iterator[Edit]:
    """Delete byte-order marks, controls, zero widths, directions, fillers, variation selectors.

    Tabs and line ends stay, and so do characters that join or colour the parts of an emoji.
    """
    return replace(pattern("invisible"), "", text)


def lookalikes(text: str) -> Iterator[Edit]:
    """Replace rare blanks, radicals and compatibility forms by what they look like: ⼈ by 人.

    A character for which Unicode (NFKC) has no other is replaced by itself, which counts as an
    edit.
    """
    return replace(pattern("lookalike"), lambda x: unicodedata.normalize("NFKC", x[0]), text)


def spaces(text: str) -> Iterator[Edit]:
    """Delete blanks at both ends of a line, and a stray one inside; make several in a row into one.

    Blanks are spaces, tabs and wide spaces. A stray blank is a single one between two Chinese
    characters or marks, in a line that has punctuation and is no heading: headings, and verse
    without punctuation, keep single blanks. Several blanks in a row become a wide space behind a
    Chinese character, 。 or ，, else a space. But two wide spaces behind the end of a sentence
    become a newline: they are the indent of a paragraph whose line break was lost.
    """
    strays = {x.start() for x in SPACES.finditer(text) if _is_stray(text, *x.span())}
    if strays:  # `heading_spans` also has headings that only the series of numbers shows
        strays -= {place for span in heading_spans(text) for place in range(*span)}
    for match in SPACES.finditer(text):
        start, end = match.span()
        at_line_end = start == 0 or end == len(text) or text[start - 1] == "\n" or text[end] == "\n"
        if at_line_end or start in strays:
            yield start, end, ""
        elif end - start > 1:
            # Chinese characters, 。 and ， have larger code points than ⺀, but ” … — smaller ones.
            blank = "　" if text[start - 1] > "⺀" else " "
            is_indent = match.group() == "　　" and text.endswith(SENTENCE_END, 0, start)
            yield start, end, "\n" if is_indent else blank


def _is_stray(text: str, start: int, end: int) -> bool:
    """Whether the blanks from `start` to `end` are one stray blank inside a sentence.

    A stray blank is a single one between two Chinese characters or marks, in a line that has
    punctuation and is no heading. Only `LONG_LINE` characters of the line are looked at on each
    side of the blank.
    """
    if end - start > 1 or not (CJK_TEXT.match(text, start - 1) and CJK_TEXT.match(text, end)):
        return False
    before = text[max(0, start - LONG_LINE) : start].rpartition("\n")[2]
    line = before + text[start : start + LONG_LINE].partition("\n")[0]
    return bool(PUNCTUATION.search(line)) and not HEADING.match(line)


def private_use(text: str) -> Iterator[Edit]:
    """Replace private-use characters by those that GB18030-2022 has in their places.

    A character for which GB18030-2022 has none is replaced by itself, and so is □ (a lost
    character): this counts as an edit.
    """
    return replace(PRIVATE_USE, lambda match: match.group().translate(GB18030_2022), text)


def blank_lines(text: str) -> Iterator[Edit]:
    """Delete empty lines, also at the text's beginning and end, so that a paragraph is a line."""
    return replace(BLANK_LINES, lambda x: "\n" if x.start() and x.end() < len(text) else "", text)


def quotes(text: str) -> Iterator[Edit]:
    """In each line with Chinese, replace `"` by “ and ” in turn, and `'` around Chinese by ‘ and ’.

    `他说："'快刀'，it's。"` becomes `他说：“‘快刀’，it's。”`.
    """
    for start, end in lines_with(STRAIGHT_QUOTE, text):
        doubles = (match.start() for match in re.finditer('"', text[start:end]))
        quoted = (match.span() for match in IN_SINGLE_QUOTES.finditer(text[start:end]))
        if CJK_TEXT.search(text, start, end):
            marks = [*zip(doubles, cycle("“”"), strict=False)]  # (place in the line, its new mark)
            marks += [mark for a, b in quoted for mark in ((a, "‘"), (b - 1, "’"))]
            yield from ((start + at, start + at + 1, mark) for at, mark in sorted(marks))


def stamps(text: str) -> Iterator[Edit]:
    """Delete a line's first stamp (time of update, count of words) with the text before it.

    The text before the stamp stays if it is a heading or ends with the end of a sentence. If it is
    longer than 40 characters, or a sentence that the stamp continues, text and stamp both stay.
    """
    for start, end in lines_with(pattern("stamp_words"), text):
        # + 1: a line that is deleted whole takes its newline along
        match = pattern("stamp").search(text, start, end + 1)
        if match:
            keeps_text = HEADING.match(text, start) or match["before"].endswith(SENTENCE_END)
            yield *match.span("stamp" if keeps_text else 0), ""  # 0: the whole match


def page_marks(text: str) -> Iterator[Edit]:
    """Delete page marks, with the rules of dashes and the white space around them.

    A newline is put in a mark's place at the text's beginning, behind a sentence's end, beside a
    heading and before an indented line. Elsewhere the mark stands inside a sentence, and nothing is
    put in its place, so that the sentence is whole again.
    """
    last_end = 0  # where the edit before ends: it may reach into the next mark
    for match in pattern("page_mark").finditer(text):
        start, end = match.span()
        before = text[max(last_end, start - LONG_LINE) : start]
        start -= len(before) - len(pattern("before_mark").sub("", before))
        behind = pattern("behind_mark").match(text, end)
        end = behind.end() if behind else end
        is_indented = text[match.end() : end].endswith(("　", "  "))
        heading = HEADING.match(text, text.rfind("\n", 0, start) + 1) or HEADING.match(text, end)
        ends_paragraph = start == 0 or is_indented or text.endswith(SENTENCE_END, 0, start)
        yield max(start, last_end), end, "\n" if ends_paragraph or heading else ""
        last_end = end


def licence(text: str) -> Iterator[Edit]:
    """Delete Project Gutenberg's licence and all else before the book's start and behind its end.

    The start must be in the first 60,000 characters. Of a text with several books nothing stays
    between the end of one and the start of the next.
    """
    if "Project Gutenberg" in text or "PROJECT GUTENBERG" in text:
        yield from replace(pattern("licence"), "", text)


def footnotes(text: str) -> Iterator[Edit]:
    """Delete numbered notes: marks such as [12], and a later paragraph that begins with the mark.

    Such a paragraph is deleted with a heading right above it (注释). A mark without such a
    paragraph stays, and so does a paragraph whose mark does not occur before it.
    """
    # For a mark, "[12]", the edits that delete it; they are made only if its note is found.
    marks: dict[str, list[Edit]] = {}
    edits: list[Edit] = []
    note_end = 0  # where the last note found so far ends
    for match in pattern("footnote").finditer(text):
        start, end = match.span()
        before = text[max(0, start - 12) : start]  # 12: enough for a notes' heading and an indent
        indent = len(before) - len(before.rstrip(BLANK))
        before = before.rstrip(BLANK)
        if start < note_end:  # inside a note, as 〔2〕 in 〔1〕开封。〔2〕在西。
            edits += marks.pop(match.group(), [])
        elif before and before[-1] != "\n":
            marks.setdefault(match.group(), []).append((start, end, ""))
        elif match.group() in marks:
            edits += marks.pop(match.group())
            head = pattern("notes_head").search(before)
            note_end = text.find("\n", end) + 1 or len(text)  # 0: no newline was found
            note_start = start - indent - len(head.group()) if head else start
            edits.append((note_start, note_end, ""))
    return iter(sorted(edits))


def hard_wrap(text: str) -> Iterator[Edit]:
    """Join the lines of a text that was wrapped at a fixed width into paragraphs again.

    A line is joined to the next one (English words by a space) if the gap between the two (blanks
    and newlines) is not wide, neither is a heading, and the line is wide enough. The least width is
    - if wide gaps are common: 0.7 `full` if the line ends inside a sentence, `full` if not;
    - if wide gaps are rare: `full` if the line ends inside a sentence, else the commonest width of
      cut lines less 1. The line, or one beside it, must then be a cut line.

    A cut line has `full` (see `_full_width`) to `full` + 7 columns and ends inside a sentence. A
    wide gap is wider than the commonest one behind cut lines. A line of `full` + 16 columns or more
    was not wrapped. If cut lines are few and stand singly among such lines, nothing is joined.
    """
    if sum(1 for _ in RUNS_ON.finditer(text)) <= FEWEST_CUT:
        return  # before the lines are measured, which takes longer
    lines = list(LINE.finditer(text))
    widths = [_columns(DEEP_INDENT.sub("", line[0])) for line in lines]
    ends_sentence = [line[0].endswith((*SENTENCE_END, *"】）》〉〕])")) for line in lines]
    full = _full_width(lines, widths, ends_sentence)
    if not full:
        return
    cut = [full <= w < full + SLACK and not e for w, e in zip(widths, ends_sentence, strict=True)]
    cut_count, longer_count = sum(cut), sum(width >= full + 2 * SLACK for width in widths)
    cut_pairs = sum(is_cut and next_is_cut for is_cut, next_is_cut in pairwise(cut))
    if longer_count > 2 * cut_count and cut_pairs < cut_count / 4:
        return
    # Characters from the end of a line to the text of the next one, behind its indent.
    gaps = [b.end() - len(b[0].lstrip()) - a.end() for a, b in pairwise(lines)]
    usual_gap = mode(compress(gaps, cut))
    has_wide_gaps = sum(gap > usual_gap for gap in gaps) > len(lines) / 20  # else they are rare
    least_at_end = full if has_wide_gaps else mode(compress(widths, cut)) - 1  # columns
    least_inside = full * FAR_SHORTER if has_wide_gaps else full
    heading_starts = {start for start, _ in heading_spans(text)}
    for n, (line, next_line) in enumerate(pairwise(lines)):
        least = least_at_end if ends_sentence[n] else least_inside
        fits = least <= widths[n] < full + 2 * SLACK and gaps[n] <= usual_gap
        may_join = has_wide_gaps or any(cut[max(0, n - 1) : n + 2])  # it or a neighbour is cut
        if fits and may_join and heading_starts.isdisjoint((line.start(), next_line.start())):
            end = line.end() + gaps[n]
            yield line.end(), end, " " if ENGLISH.match(text[line.end() - 1] + text[end]) else ""


def _columns(line: str) -> int:
    """Measure a line in columns: a Chinese character is two wide, as it has two bytes in GBK.

    A line of more than `WIDEST` characters was not wrapped: its width need not be exact, and twice
    its length is returned.
    """
    return len(line.encode("gbk", "replace")) if len(line) <= WIDEST else 2 * len(line)


def _full_width(lines: list[re.Match[str]], widths: list[int], ends_sentence: list[bool]) -> int:
    """Find the width, in columns, from which a line is full; 0 for text that is not hard-wrapped.

    For each width `w` from 20 to 119, the lines of `w` to `w` + 7 columns that have punctuation and
    end inside a sentence are counted. The full width is the `w` with the most such lines, the least
    `w` in a tie. The text is not hard-wrapped if these lines are ten or fewer, or at most a third
    of all lines of `w` to `w` + 7 columns. The three lists have an item for each line.
    """
    measured = zip(lines, widths, ends_sentence, strict=True)
    cut_lines = Counter(w for line, w, e in measured if not e and PUNCTUATION.search(line[0]))
    all_lines = Counter(widths)  # like `cut_lines`: number of lines by their width
    sums = {w: sum(cut_lines[w + n] for n in range(SLACK)) for w in range(NARROWEST, WIDEST)}
    full = max(sums, key=sums.__getitem__)
    enough = max(FEWEST_CUT, sum(all_lines[full + n] for n in range(SLACK)) / 3)
    return full if sums[full] > enough else 0


@dataclass
class Tally:
    """What a rule did to one text or more, with some examples."""

    rule: str  # its name
    count: int = 0  # edits
    removed: int = 0  # characters
    inserted: int = 0  # characters
    # A place before and after its edit, with the text around it.
    examples: list[tuple[str, str]] = field(default_factory=list)

    def add(self, other: "Tally") -> None:
        """Add `other`, the same rule's tally of other texts; keep at most `EXAMPLES` examples."""
        self.count += other.count
        self.removed += other.removed
        self.inserted += other.inserted
        self.examples += other.examples[: EXAMPLES - len(self.examples)]


def clean(text: str, skip: Container[str] = OFF) -> tuple[str, list[Tally]]:
    r"""Apply every rule except those whose names are in `skip`; by default that is `quotes`.

    Returns the cleaned text, and the tallies of the rules that made an edit, in the order of
    `RULES`.
    `"　　甲。\r\n\r\n　　乙。"` becomes `"甲。\n乙。"` by the rules `line_ends` (two edits),
    `spaces` (two) and `blank_lines` (one).
    """
    tallies = []
    for name in RULES:
        if name not in skip:
            text, tally = _apply(name, text)
            tallies.append(tally)
    return text, [tally for tally in tallies if tally.count]


def _apply(name: str, text: str) -> tuple[str, Tally]:
    """Make the edits that the rule `name` proposes; return the new text, and the rule's tally."""
    edits = list(RULES[name](text))
    pieces: list[str] = []
    done = 0  # where the last edit ends
    for start, end, replacement in [*edits, (len(text), len(text), "")]:
        pieces += (text[done:start], replacement)
        done = end
    cleaned = "".join(pieces)
    inserted = sum(len(replacement) for _, _, replacement in edits)
    removed = len(text) - len(cleaned) + inserted
    tally = Tally(name, len(edits), removed, inserted)
    for start, end, replacement in edits[:EXAMPLES]:
        before, after = text[max(0, start - AROUND) : start], text[end : end + AROUND]
        tally.examples.append((before + text[start:end] + after, before + replacement + after))
    return cleaned, tally


# The rules in the order in which they are applied; True marks a rule that is for novels only.
_RULES: dict[Callable[[str], Iterator[Edit]], bool] = {
    mojibake: False,
    line_ends: False,
    page_marks: True,
    entities: False,
    markup: False,
    invisible: False,
    lookalikes: False,
    garbled: False,
    licence: False,
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
    footnotes: True,
    hard_wrap: True,
    spaces: False,
    private_use: False,
    quotes: False,
    blank_lines: False,
}
RULES = {rule.__name__: rule for rule in _RULES}  # by name
NOVELS_ONLY = frozenset(rule.__name__ for rule, novels_only in _RULES.items() if novels_only)
# Former names of rules, which configs may still have, with the rules' present names.
OLDER_NAMES = {"notices": "ads", "furniture": "boilerplate", "contents": "table_of_contents"}
