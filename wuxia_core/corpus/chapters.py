"""Cut a text into chapters, or into parts where it has none.

A heading is not known by its wording alone. Lines that begin with a number are gathered by their
form, and the form whose numbers go on through the book is that of its chapters: a list inside the
story does not reach through it, and a sentence that begins like a heading repeats a number.
"""

import math
import re
import tomllib
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise, zip_longest
from pathlib import Path

from wuxia_core.errors import DataError
from wuxia_core.text import Edit, join_pattern

SECTION = 3000  # characters: length of a part where a book has no chapters
LONGEST = 30_000  # characters: in a longer chapter some heading was hardly found
LONE = 20  # characters: a heading with less text behind it opens no chapter
FEWEST = 3  # chapters whose numbers go on
SHORT = 100  # characters: a longer front is a part; a longer note says what only authors do
WINDOW = 40  # lines that look like headings may stand between two headings
TITLE = 40  # characters of a title behind a mere number

FORMS = tomllib.loads(Path(__file__).with_suffix(".toml").read_text("utf-8"))


def _pattern(name: str) -> re.Pattern[str]:
    """Compile a pattern of chapters.toml."""
    return re.compile(join_pattern(FORMS, name), re.MULTILINE)


CHAPTERS, PARTS, VOLUMES, TRUSTED = (
    frozenset(join_pattern(FORMS, name)) for name in ("chapters", "parts", "volumes", "trusted")
)
HEADING, NAMED, LINE, KNOWN = map(_pattern, ("heading", "named", "line", "known"))
OPENING, TAIL, RULED, INLINE = map(_pattern, ("opening", "tail", "ruled", "inline"))
ASIDE, AUTHORS = _pattern("aside"), _pattern("authors")
MISREAD = str.maketrans("两—－", "二一一")


@dataclass(eq=False)
class _Line:
    """A line that may be a heading; the lines of one family count the same things."""

    start: int
    end: int  # of the title
    number: float = math.nan
    title: str = ""  # its letters
    family: tuple[int | str | bool, ...] = ()  # first its rank: chapters, sections, other numbers
    style: tuple[str | bool, ...] = ()
    trusted: bool = True  # its form makes it a heading, even where its number is wrong


def chapter(text: str, number: int) -> str:
    """Give one chapter of a cleaned text, by its place from 1 on.

    Raises `DataError` where there is none.
    """
    parts = split_chapters(text)
    if not 1 <= number <= len(parts):
        raise DataError(f"chapter {number}: there are {len(parts)}, counted from 1")
    return parts[number - 1][1]


def split_chapters(text: str) -> list[tuple[str, str]]:
    """Cut cleaned text into `(heading, text)`; the heading is the first line of its text.

    A heading without text behind it (a table of contents, the name of a volume, a doubled one)
    opens no chapter but stands above the next; neighbours of one number and title are one. What
    stands before the first chapter is a part without heading, or goes to the first chapter if it
    is under 100 characters. A book without headings, or with one or two that leave a part of over
    30,000 characters, is cut between paragraphs into parts of about 3,000, called `part 1`,
    `part 2` and so on. Joined by newlines the parts are the text.
    """
    found = _cuts(text)
    cuts = [] if found and found[0][0] <= SHORT else [(0, _Line(0, 0))]
    cuts += found
    starts = [0, *(start for start, _ in cuts[1:]), len(text) + 1]
    parts = [
        (text[line.start : line.end].strip(), text[start : end - 1])
        for (_, line), (start, end) in zip(cuts, pairwise(starts), strict=True)
    ]
    if not found or (len(found) < FEWEST and max(len(part) for _, part in parts) > LONGEST):
        return [(f"part {n}", part) for n, part in passages(text, SECTION)]
    return parts


def _cuts(text: str) -> list[tuple[int, _Line]]:
    """Find the headings, each behind the place where its chapter starts: lines may be above it."""
    lines = list(_lines(text))
    chosen = set(_series(lines, text) or [line for line in lines if line.trusted])
    named = [_Line(*match.span(), trusted=not match["volume"]) for match in NAMED.finditer(text)]
    marks = {line.start: line for line in lines if line.trusted or line in chosen}
    cuts: list[tuple[int, _Line]] = []
    for start, line in sorted(({line.start: line for line in named} | marks).items(), reverse=True):
        below, after = cuts[-1] if cuts else (len(text), _Line(0, 0))
        if line.family:
            opens = line in chosen or line.family[-1] in VOLUMES
        else:  # 楔子, but not in a table of contents
            opens = line.trusted and not HEADING.match(text, line.end + 1)
        if len(text[line.end : min(below, line.end + SHORT)].strip()) < LONE:
            cuts[-1:] = [(start, after)] if cuts else []
        elif opens:
            same = line.number == after.number and after.title in line.title  # 第九回, 第九回 (2)
            cuts[len(cuts) - same :] = [(start, line)]
    return cuts[::-1]


def _lines(text: str) -> Iterator[_Line]:
    """Find the lines that begin with a number, less those that go on as a sentence."""
    for match in LINE.finditer(text):
        unit, word = match["unit"] or match["short"] or "", (match["word"] or "").casefold()
        end = match.start("title") + _title_length(match["title"])
        title = text[match.start("title") : end].strip()
        known, glued = unit in PARTS | VOLUMES, bool(title) and match["gap"] is None
        prose = bool(re.search("[。；]|[，：．﹒]$", title))
        sentence = prose or ("，" in title and title.index("，") * 2 + 1 != len(title))
        nameless = not match["unit"] and (prose or len(title) > TITLE)
        if nameless or (glued and (sentence or not (known if unit else match["close"]))):
            continue
        digits = re.sub(r"[第笫苐\s]", "", match["ordinal"] or match["number"])
        form = (match["sign"][:1], digits.isdecimal(), glued or (match["gap"] or "").strip()[:1])
        parts = unit in PARTS or (word and word.isascii())
        rank = 0 if match["unit"] in CHAPTERS else 1 if parts else 2
        family = (rank, unit) if unit else (rank, word, *form)
        bare = not match["before"] or bool(KNOWN.search(match["before"]))
        trusted = match["unit"] in TRUSTED and bare and not (glued or prose)
        title = re.sub(r"[\W\d]", "", title)
        yield _Line(match.start(), end, _number(digits), title, family, (*form, sentence), trusted)


def _title_length(title: str) -> int:
    """Tell where the prose begins that follows a title on its line.

    雪夜孤灯访旧友　松林一剑退群雄话说那人… has a title of 15 characters: 话说 opens a story, and
    the halves of a couplet are of one length.
    """
    if opening := OPENING.search(title):
        return opening.start()
    if couplet := re.match(r"(\w{3,12})\s+(\w{3,})", title):
        end = couplet.start(2) + len(couplet[1])
        if len(couplet[1]) > 4 or title[end : end + 1].isspace():
            return end if re.search("[，。：；“]", title[end:]) else len(title)
    single = re.match(r"\S{1,20}(?=\s+\S.*。|\s{2,}\S.*[，：；])", title)
    return single.end() if single else len(title)


def _series(lines: list[_Line], text: str) -> list[_Line]:
    """Choose the headings: a form whose numbers go on through the text; none where none does.

    Of several the one that counts chapters, not parts of them, and the longer one; one whose
    chapters are over 30,000 characters comes last.
    """
    best: tuple[bool, int | str, int, list[_Line]] = (True, 3, 0, [])
    families = Counter(line.family for line in lines)
    for family in (family for family, count in families.items() if count >= FEWEST):
        members = [x for x in lines if x.family == family or x.trusted]  # 第五回 behind 第四章
        chain = _chain(_with_text(members, text), family)
        steps = [abs(other.number - one.number) for one, other in pairwise(chain)]
        if len(chain) < FEWEST or sum(step <= 1 for step in steps) * 2 < len(steps):
            continue
        each = (chain[-1].start - chain[0].start) / len(steps)
        through = each * len(chain) * 2 >= len(text)
        if through or chain[0].trusted:
            found = (not through or each > LONGEST, family[0], -len(chain), chain)
            best = min(best, found, key=lambda entry: entry[:3])
    return best[3]


def _with_text(lines: list[_Line], text: str) -> list[_Line]:
    """Leave out headings without text behind; those of a list are not trusted any more."""
    kept, run = [], []
    for line, after in zip_longest(lines, lines[1:]):
        run.append(line)
        empty = after and len(text[line.end : after.start].strip()) < LONE
        if empty and line.number < after.number:
            continue
        for listed in run if len(run) >= FEWEST else ():
            listed.trusted = False
        kept += [] if empty else [line]
        run = []
    return kept


def _chain(lines: list[_Line], family: tuple[int | str | bool, ...]) -> list[_Line]:
    """Choose the lines whose numbers go on best, by dynamic programming over pairs of lines."""
    styles = Counter(line.style for line in lines if line.family == family)
    usual = max(1, lines[-1].start - lines[0].start) / len(lines)
    score: dict[_Line, float] = {}  # of the best chain that ends there
    before: dict[_Line, _Line] = {}  # in that chain
    for n, line in enumerate(lines):
        likely = line.family == family and (line.trusted or styles[line.style] >= FEWEST)
        score[line] = -1.2 if not likely else 2 if line.trusted else 0.3
        near = reversed(lines[max(0, n - WINDOW) : n])
        gains = {other: score[other] + _gain(other, line, usual) for other in near}
        best = max(gains, key=gains.__getitem__, default=line)
        if gains.get(best, 0) > 0:
            score[line] += gains[best]
            before[line] = best
    chain = [max(lines, key=score.__getitem__)]
    while chain[-1] in before:
        chain.append(before[chain[-1]])
    return chain[::-1]


def _gain(one: _Line, other: _Line, usual: float) -> float:
    """Score two headings as neighbours: most if the second number is the next and not too near."""
    step = other.number - one.number
    distance = max(1, other.start - one.start) / usual / min(max(step, 1), 3)
    wrong = 0.5 if step == 0 else 0.1 if step == -1 else 0.4
    gain = -wrong if step <= 0 else 1 if step <= 1 else 0.5 / step
    return gain + min(0.1, max(-1.5, 0.3 * math.log(distance)))


def _number(numeral: str) -> float:
    """Read a numeral: 一百二十 is 120, and so is 一二〇; 廿三 is 23, 001 is 1, ⑪ is 11."""
    if "." in numeral:
        return float(numeral)
    values = [int(unicodedata.numeric(c, 0)) for c in numeral.translate(MISREAD)]
    if max(values) < 10:
        return int("".join(map(str, values)))
    total = digit = 0
    for value in values:  # a digit counts what stands behind it: 三百
        total += (digit or 1) * value if value >= 10 else 0
        digit = value if value < 10 else 0
    return total + digit


def passages(text: str, length: int) -> list[tuple[str, str]]:
    """Cut a text between lines into numbered passages of at least `length` characters."""
    groups = gather(text.split("\n"), length)
    return [(str(n), "\n".join(lines)) for n, lines in enumerate(groups, 1)]


def gather(texts: Iterable[str], length: int) -> Iterator[list[str]]:
    """Group consecutive texts so that each group, but the last, has `length` characters or more."""
    group: list[str] = []
    gathered = 0
    for text in texts:
        group.append(text)
        gathered += len(text)
        if gathered >= length:
            yield group
            group, gathered = [], 0
    if group:
        yield group


def table_of_contents(text: str) -> Iterator[Edit]:
    """Tables of contents: five headings or more with nothing between them, which come again."""
    matches = list(HEADING.finditer(text))
    texts = Counter(match.group().strip() for match in matches)
    run: list[re.Match[str]] = []
    for match, after in zip_longest(matches, matches[1:]):
        run.append(match)
        if after is None or text[match.end() : after.start()].strip():
            again = [x for x in run if texts[x.group().strip()] > 1 or texts[x["count"]]]
            front = again and run[0] is matches[0]
            if len(run) >= 5 and (front or len(again) * 2 >= len(run)):
                stays = text.find(match.group().strip(), match.end()) < 0  # opens the first one
                yield run[0].start(), match.start() if stays else match.end(), ""
            run = []


def headings(text: str) -> Iterator[Edit]:
    """Headings get a line of their own, with their title and without a call for votes."""
    edits: list[Edit] = []
    for match in INLINE.finditer(text):
        edits += [(*match.span(blanks), "\n") for blanks in ("before", "after") if match[blanks]]
    for _, line in _cuts(text):
        rest = re.compile(r"[^\S\n]*(?=\S)").match(text, line.end)
        if rest and text[line.end] != "\n":
            edits.append((*rest.span(), "\n"))
        elif tail := TAIL.search(text, line.start, line.end):
            edits.append((*tail.span(), ""))
        elif not line.title and (ruled := RULED.match(text, line.end)):
            edits.append((*ruled.span(), " "))
    yield from sorted(edits)


def asides(text: str) -> Iterator[Edit]:
    """Chapters that are no story: 完本感言, 上架感言, 请假条, 人物介绍 with their text."""
    if ASIDE.search(text):
        known = (match.start() for match in HEADING.finditer(text))
        starts = {*known, *(line.start for _, line in _cuts(text)), len(text)}
        for start, end in pairwise(sorted(starts)):
            heading = text[start:end].strip().partition("\n")[0]
            aside = re.search(rf"(?<!\w){ASIDE.pattern}(?!\w)", heading) and len(heading) < TITLE
            longest = SECTION if AUTHORS.search(text, start, end) else SHORT
            if aside and end - start <= longest and not re.search("[“「]", text[start:end]):
                yield start, end, ""


def chapter_notes(parts: list[tuple[str, str]]) -> list[str]:
    """Say what is odd in the parts that `split_chapters` gives; nothing where nothing is.

    `["no headings found, cut into 12 parts"]`, or such as `"31,000 characters in 第五章 归尘"` and
    `"numbers jump from 第5章 断刀 to 第8章 归尘, one of 2 jumps"`.
    """
    if parts and all(name.startswith("part ") and name not in text[:99] for name, text in parts):
        return [f"no headings found, cut into {len(parts)} parts"]
    notes = [
        f"{len(x):,} characters in {name or 'the front'}" for name, x in parts if len(x) > LONGEST
    ]
    numbered = [(line.number, name) for name, _ in parts for line in _lines(name)]
    jumps = [
        f"{name} to {next_name}"
        for (number, name), (next_number, next_name) in pairwise(numbered)
        if next_number > 1 and not 0 <= next_number - number <= 1
    ]
    more = f", one of {len(jumps)} jumps" if len(jumps) > 1 else ""
    return notes + ([f"numbers jump from {jumps[0]}{more}"] if jumps else [])
