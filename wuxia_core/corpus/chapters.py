"""Cut a text into chapters, or into parts if it has none.

A heading is not told by its wording alone. Lines that begin with a number are grouped by their
form, and the form whose numbers go on through the book is that of its chapters: the numbers of a
list inside the story do not reach through the book, and a sentence that begins like a heading
repeats the number of one.
"""

import functools
import math
import re
import tomllib
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise, zip_longest
from operator import attrgetter
from pathlib import Path

from wuxia_core.errors import DataError
from wuxia_core.text import Edit, join_pattern

PART_LENGTH = 3000  # characters: of a part if a book has no chapters; of the longest aside
LONGEST_CHAPTER = 30_000  # characters: in a longer one some heading was probably missed
LEAST_TEXT = 20  # characters: a heading with less text behind it opens no chapter
FEWEST_CHAPTERS = 3  # fewer numbers that go on are no proof of chapters
SHORT_PART = 100  # characters: a longer front is a part; a longer aside needs words of authors
LOOK_BACK = 40  # candidates: among so many above a line its neighbour in a series is sought
NO_HEADINGS = "no headings found"  # begins a note on a book
LONGEST_TITLE = 40  # characters: of a title behind a mere number, and of an aside's heading
PER_WORD = 200  # characters of an aside for each of its words of authors

FORMS = tomllib.loads(Path(__file__).with_suffix(".toml").read_text("utf-8"))


def _pattern(name: str) -> re.Pattern[str]:
    """Compile the pattern `name` of chapters.toml; in it ^ and $ match at each line."""
    return re.compile(join_pattern(FORMS, name), re.MULTILINE)


# Units that stand behind a number: of chapters (章回); of chapters and of sections (节话); of
# volumes (卷部); and those that make a line a trusted heading.
CHAPTERS, PARTS, VOLUMES, TRUSTED = (
    frozenset(join_pattern(FORMS, name)) for name in ("chapters", "parts", "volumes", "trusted")
)
# Any heading; one without a number (楔子); a line that begins with a number; and what may stand
# before 第 in a heading (正文, 第一卷).
HEADING, UNNUMBERED, NUMBERED, PREFIX = map(_pattern, ("heading", "named", "line", "known"))
# Beside a title: a story's opening words (话说), calls for votes, a rule of dashes with the title
# below it. And a heading inside a line.
OPENING, CALLS, DASHES, INLINE = map(_pattern, ("opening", "tail", "ruled", "inline"))
ASIDE, AUTHORS = _pattern("aside"), _pattern("authors")  # 完本感言; what only authors write of
TO = _pattern("to")  # between the numbers of two chapters: 第10-11章
# Numerals that `unicodedata.numeric` does not know: 两, and dashes that were typed for 一.
NUMERALS = str.maketrans("两—－", "二一一")


@dataclass(eq=False)  # compared by identity, so that it can be a key
class _Candidate:
    """A line that may be a heading. The numbers of lines of one family count the same things."""

    start: int  # of the line, in the text
    end: int  # of the title; prose may stand behind it on the line
    number: float = math.nan  # nan: it has none
    last: float = math.nan  # the last number of several, 11 in 第10-11章; else the number
    title: str = ""  # its letters, without signs and digits
    # First a rank (0 第…章; 1 章 without 第, another unit of chapters or sections, or an English
    # word; 2 all else), then a unit, or else the word before the number, and the number's form.
    # Empty for a heading without a number.
    family: tuple[int | str | bool, ...] = ()
    style: tuple[str | bool, ...] = ()  # how the line is written: signs, digits, a comma
    trusted: bool = True  # its form makes it a heading, even where its number is wrong


def chapter(text: str, number: int) -> str:
    """Give the text of chapter `number` of a cleaned book, with its heading.

    The parts that `split_chapters` gives are counted, from 1: a front is one. Raises `DataError`
    if there is no such chapter.
    """
    parts = split_chapters(text)
    if not 1 <= number <= len(parts):
        raise DataError(f"chapter {number}: there are {len(parts)}, counted from 1")
    return parts[number - 1][1]


def split_chapters(text: str) -> list[tuple[str, str]]:
    """Cut cleaned text into parts, `(heading, text)`; the text has the heading too.

    A heading with less than 20 characters behind it (an entry in a table of contents, the name of a
    volume, a doubled heading) opens no chapter but stands above the next one's heading, if there is
    a next one. Neighbours with the same number are one chapter if the second's title is empty or is
    contained in the first's: 第九回 (2) behind 第九回. Text before the first chapter is a part with
    the heading `""`, or belongs to that chapter if it is of 100 characters or less. A book without
    chapters, or with one or two and a part of over 30,000 characters, is cut between paragraphs
    into `part 1`, `part 2` and so on, of 3,000 characters or more but for the last. The parts'
    texts, joined by newlines, are the text.
    """
    chapters = _find_chapters(text)
    has_front = not chapters or chapters[0][0] > SHORT_PART
    front = (0, _Candidate(0, 0))  # its heading is empty
    opened = [front, *chapters] if has_front else chapters
    # From 0, since a short front belongs to the first chapter. Each part is cut before the newline
    # that ends it (end - 1); the last has none, hence + 1.
    starts = [0, *(start for start, _ in opened[1:]), len(text) + 1]
    parts = [
        (text[line.start : line.end].strip(), text[start : end - 1])
        for (_, line), (start, end) in zip(opened, pairwise(starts), strict=True)
    ]
    longest = max(len(part) for _, part in parts)
    if not chapters or (len(chapters) < FEWEST_CHAPTERS and longest > LONGEST_CHAPTER):
        return [(f"part {n}", part) for n, part in passages(text, PART_LENGTH)]
    return parts


def _find_chapters(text: str) -> list[tuple[int, _Candidate]]:
    """List the chapters of a text, in order, as `(start, heading)`.

    A chapter starts above its heading if headings without text (the name of a volume) stand right
    above it.
    """
    lines = list(_find_candidates(text))
    series = _choose_series(lines, text, 0, len(text))
    chosen = set(series or [line for line in lines if line.trusted])
    # Behind the line above, which makes the lines of a table of contents untrusted.
    numbered = [line for line in lines if line.trusted or line in chosen]
    others = [_Candidate(*x.span(), trusted=not x["volume"]) for x in UNNUMBERED.finditer(text)]
    chapters: list[tuple[int, _Candidate]] = []  # from the last to the first
    for start, line in sorted({x.start: x for x in others + numbered}.items(), reverse=True):
        next_start, next_line = chapters[-1] if chapters else (len(text), _Candidate(0, 0))
        if line.family:  # it has a number; a volume may have text of its own
            opens = line in chosen or line.family[-1] in VOLUMES
        else:  # 楔子, but not in a table of contents
            opens = line.trusted and not HEADING.match(text, line.end + 1)
        # More than SHORT_PART characters need not be looked at.
        is_empty = len(text[line.end : min(next_start, line.end + SHORT_PART)].strip()) < LEAST_TEXT
        if is_empty and chapters:
            chapters[-1] = (start, next_line)  # the line stands above the next heading
        elif opens and not is_empty:
            if next_line.number == line.number and next_line.title in line.title:
                chapters.pop()  # it only goes on, as 第九回 (2) does behind 第九回
            chapters.append((start, line))
    return chapters[::-1]


@functools.lru_cache(maxsize=1)
def heading_spans(text: str) -> list[tuple[int, int]]:
    """List `(start, end)` of the headings that open chapters, and of all lines that look like one.

    Those of the last text are kept.
    """
    ends = {line.start: line.end for _, line in _find_chapters(text)}
    return sorted((ends | dict(match.span() for match in HEADING.finditer(text))).items())


def _find_candidates(text: str) -> Iterator[_Candidate]:
    """Yield a candidate for each line that begins with a number, unless it goes on as a sentence.

    Words may stand before 第 (正文). `第三章 归尘` has the unit 章, a space as the gap, and the
    title 归尘. `第三章归尘` has no gap: its title is glued. `3 归尘` and `Chapter 3` have no unit.
    """
    for match in NUMBERED.finditer(text):
        # `short` is a unit without 第 (3章), `word` what stands before the number (Chapter).
        unit, word = match["unit"] or match["short"] or "", (match["word"] or "").casefold()
        end = match.start("title") + _title_length(match["title"])
        title = text[match.start("title") : end].strip()
        is_glued = bool(title) and match["gap"] is None
        # Behind 章 or 卷, or behind a closing sign: (3)归尘; but not in 第三天他走了.
        may_be_glued = unit in PARTS | VOLUMES if unit else match["close"]
        is_prose = bool(re.search("[。；]|[，：．﹒]$", title))
        # A comma may only part the two halves of a couplet.
        is_sentence = is_prose or ("，" in title and title.index("，") * 2 + 1 != len(title))
        is_number_in_prose = not match["unit"] and (is_prose or len(title) > LONGEST_TITLE)
        if is_number_in_prose or (is_glued and (is_sentence or not may_be_glued)):
            continue
        numeral = re.sub(r"[第笫苐\s]", "", match["ordinal"] or match["number"])
        numeral, *rest = TO.split(numeral)  # 第10-11章 is 10, and 11 its last
        gap = (match["gap"] or "").strip()  # 、 in 三、断刀
        form = (match["sign"][:1], numeral.isdecimal(), is_glued or gap[:1])
        other_rank = 1 if unit in PARTS or (word and word.isascii()) else 2
        rank = 0 if match["unit"] in CHAPTERS else other_rank  # see `_Candidate`
        family = (rank, unit) if unit else (rank, word, *form)
        is_bare = not match["before"] or bool(PREFIX.search(match["before"]))  # but for 正文
        trusted = match["unit"] in TRUSTED and is_bare and not (is_glued or is_prose)
        title, style = re.sub(r"[\W\d]", "", title), (*form, is_sentence)
        first, last = _number(numeral), _number(rest[-1] if rest else numeral)
        yield _Candidate(match.start(), end, first, last, title, family, style, trusted)


def _title_length(rest: str) -> int:
    """Give the length, in characters, of the title with which the rest of a heading's line begins.

    Prose may follow the title: a story's opening words (话说), or a sentence, behind a couplet with
    halves of one length or behind blanks. If there is none, `rest` is all title.
    雪夜孤灯访旧友　松林一剑退群雄那人道，走。 has a title of 15 characters.
    """
    if opening := OPENING.search(rest):
        return opening.start()
    if couplet := re.match(r"(\w{3,12})\s+(\w{3,})", rest):
        end = couplet.start(2) + len(couplet[1])
        if len(couplet[1]) > 4 or rest[end : end + 1].isspace():
            return end if re.search("[，。：；“]", rest[end:]) else len(rest)
    single = re.match(r"\S{1,20}(?=\s+\S.*。|\s{2,}\S.*[，：；])", rest)
    return single.end() if single else len(rest)


def _choose_series(lines: list[_Candidate], text: str, start: int, end: int) -> list[_Candidate]:
    """Choose the headings of chapters between two places of the text; `[]` if there are none.

    They are the best series, and where that leaves a chapter of over 30,000 characters also the
    series inside it: there the headings change their form (第41回 behind 第40章), or a new book
    begins.
    """
    series = _best_series([line for line in lines if start <= line.start < end], text, end - start)
    edges = [start - 1, *(line.start for line in series), end] if series else []
    for above, below in pairwise(edges):
        if below - above > LONGEST_CHAPTER:
            series = series + _choose_series(lines, text, above + 1, below)
    return series


def _best_series(lines: list[_Candidate], text: str, length: int) -> list[_Candidate]:
    """Choose the series of one family whose numbers go on best, in `length` characters.

    A series has three lines or more. At least half of its numbers differ from the one before by 1
    or less, and it reaches through half of the length or begins with a trusted line. The first
    choice is one that reaches, with chapters of 30,000 characters or less in the mean; then one of
    a lower rank, which counts chapters, not their sections; then the longest; then the first. `[]`
    if there is none. The lines of tables of contents lose `trusted`, see `_drop_empty`.
    """
    # (whether it is poor, its rank, its length with a minus, a series); the least is chosen.
    best: tuple[bool, int | str, int, list[_Candidate]] = (True, 3, 0, [])
    families: dict[tuple[int | str | bool, ...], list[_Candidate]] = {}
    for line in lines:
        families.setdefault(line.family, []).append(line)
    trusted = [line for line in lines if line.trusted]  # also 第五回 behind 第四章
    for family in [family for family, x in families.items() if len(x) >= FEWEST_CHAPTERS]:
        members = sorted({*families[family], *trusted}, key=attrgetter("start"))
        series = _best_chain(_drop_empty(members, text), family)
        steps = [abs(second.number - first.number) for first, second in pairwise(series)]
        if len(series) < FEWEST_CHAPTERS or sum(step <= 1 for step in steps) * 2 < len(steps):
            continue
        mean_length = (series[-1].start - series[0].start) / len(steps)  # of a chapter
        reaches = mean_length * len(series) * 2 >= length
        if reaches or series[0].trusted:
            is_poor = not reaches or mean_length > LONGEST_CHAPTER
            best = min(best, (is_poor, family[0], -len(series), series), key=lambda x: x[:3])
    return best[3]


def _drop_empty(lines: list[_Candidate], text: str) -> list[_Candidate]:
    """Leave out the candidates with less than 20 characters between them and the next one.

    Three or more in a row with so little between them, and with rising numbers, are taken for a
    table of contents: they lose `trusted`, the last one too.
    """
    filled, run = [], []  # candidates with text behind them; those in a row without
    for line, next_line in zip_longest(lines, lines[1:]):  # None is next to the last
        run.append(line)
        is_empty = next_line and len(text[line.end : next_line.start].strip()) < LEAST_TEXT
        if is_empty and line.number < next_line.number:
            continue
        if len(run) >= FEWEST_CHAPTERS:
            for listed in run:
                listed.trusted = False
        if not is_empty:
            filled.append(line)
        run = []
    return filled


def _best_chain(lines: list[_Candidate], family: tuple[int | str | bool, ...]) -> list[_Candidate]:
    """Choose the lines whose numbers go on best, by dynamic programming over pairs of lines.

    A chain's score is the sum of the points of its lines (2 for a trusted one of the family, 0.3
    for another of the family in a style that three lines have, -1.2 for any other) and
    of `_pair_points`. Of chains with equal scores the one that ends first is chosen. A line is
    paired with the `LOOK_BACK` lines before it.
    """
    styles = Counter(line.style for line in lines if line.family == family)
    mean_distance = max(1, lines[-1].start - lines[0].start) / len(lines)  # characters
    scores: dict[_Candidate, float] = {}  # of the best chain that ends with a line
    previous: dict[_Candidate, _Candidate] = {}  # the line before it in that chain
    for n, line in enumerate(lines):
        fits = line.family == family and (line.trusted or styles[line.style] >= FEWEST_CHAPTERS)
        points_if_fit = 2 if line.trusted else 0.3
        scores[line] = points_if_fit if fits else -1.2
        earlier = reversed(lines[max(0, n - LOOK_BACK) : n])  # the nearest first: it wins a tie
        sums = {x: scores[x] + _pair_points(x, line, mean_distance) for x in earlier}
        best = max(sums, key=sums.__getitem__, default=None)
        if best and sums[best] > 0:  # else a chain begins here
            scores[line] += sums[best]
            previous[line] = best
    chain = [max(lines, key=scores.__getitem__)]
    while chain[-1] in previous:
        chain.append(previous[chain[-1]])
    return chain[::-1]


def _pair_points(first: _Candidate, second: _Candidate, mean_distance: float) -> float:
    """Give points for two lines as headings of neighbouring chapters: at most 1.1.

    A number that rises by 1, or by less (from 3 to 3.5), gives 1; one that rises by `n` gives
    0.5 / `n`. One that stays costs 0.5, as sentences repeat a heading's number; one that falls by 1
    (two chapters in the wrong order) costs 0.1, by another number (a new volume begins) 0.4. The
    lines' distance over the mean one, and over the rise (as 1 to 3: chapters may be missing), is a
    ratio: below 1 it costs up to 1.5, above 1 it gives up to 0.1.
    """
    rise = second.number - first.number
    if rise > 0:
        points = 1 if rise <= 1 else 0.5 / rise
    elif rise == 0:
        points = -0.5
    else:
        points = -0.1 if rise == -1 else -0.4
    ratio = max(1, second.start - first.start) / mean_distance / min(max(rise, 1), 3)
    return points + min(0.1, max(-1.5, 0.3 * math.log(ratio)))


def _number(numeral: str) -> float:
    """Read a numeral: 一百二十 and 一二〇 are 120, 廿三 is 23, 001 is 1, ⑪ is 11, 3.5 is 3.5."""
    if "." in numeral:
        return float(numeral)
    # A character without a value, such as O, stands for 〇.
    values = [int(unicodedata.numeric(c, 0)) for c in numeral.translate(NUMERALS)]
    if max(values) < 10:
        return int("".join(map(str, values)))
    total = digit = 0
    for value in values:
        if value >= 10:  # a digit multiplies the 十, 百 or 千 behind it: 三百
            total, digit = total + (digit or 1) * value, 0
        else:
            digit = value
    return total + digit


def passages(text: str, length: int) -> list[tuple[str, str]]:
    """Cut a text between lines into passages, `(number, text)`, of `length` characters or more.

    The numbers are "1", "2" and so on; newlines do not count, and the last passage may be shorter.
    """
    return [(str(n), "\n".join(x)) for n, x in enumerate(group_texts(text.split("\n"), length), 1)]


def group_texts(texts: Iterable[str], characters: int) -> Iterator[list[str]]:
    """Yield groups of consecutive texts; each but the last has `characters` or more in all."""
    group: list[str] = []
    size = 0  # characters in the group
    for text in texts:
        group.append(text)
        size += len(text)
        if size >= characters:
            yield group
            group, size = [], 0
    if group:
        yield group


def table_of_contents(text: str) -> Iterator[Edit]:
    """Delete tables of contents: five headings or more with nothing between, that occur again.

    A heading occurs again if its line does, or if a line is its number alone (第三章). Of a table
    that begins with the text's first heading one must occur again, elsewhere half of the headings.
    The last one stays unless its line stands again below: it is no entry but opens a chapter.
    """
    matches = list(HEADING.finditer(text))
    lines = Counter(match.group().strip() for match in matches)
    run: list[re.Match[str]] = []  # headings with nothing between them
    for match, next_match in zip_longest(matches, matches[1:]):
        run.append(match)
        if next_match is None or text[match.end() : next_match.start()].strip():
            # A heading's line and its number, which may be the same.
            forms = ({x.group().strip(), x["count"]} for x in run)
            recurring = [pair for pair in forms if sum(lines[form] for form in pair) > 1]
            least = 1 if run[0] is matches[0] else len(run) / 2
            if len(run) >= 5 and len(recurring) >= least:
                stays = text.find(match.group().strip(), match.end()) < 0
                yield run[0].start(), match.start() if stays else match.end(), ""
            run = []


def headings(text: str) -> Iterator[Edit]:
    """Put each heading on a line of its own, with its title and without a call for votes.

    A heading inside a line is parted from it, and so is prose behind a title. A title that stands
    below its heading, with a rule of dashes between, is joined to it by a space.
    """
    edits: list[Edit] = []
    for match in INLINE.finditer(text):
        edits += [(*match.span(blanks), "\n") for blanks in ("before", "after") if match[blanks]]
    for _, line in _find_chapters(text):
        if blanks_before_prose := re.compile(r"[^\S\n]*(?=\S)").match(text, line.end):
            edits.append((*blanks_before_prose.span(), "\n"))
        elif calls := CALLS.search(text, line.start, line.end):
            edits.append((*calls.span(), ""))
        elif not line.title and (dashes := DASHES.match(text, line.end)):
            edits.append((*dashes.span(), " "))
    yield from sorted(edits)


def asides(text: str) -> Iterator[Edit]:
    """Delete chapters that are no story: 完本感言, 上架感言, 请假条, 人物介绍, with their text.

    One of more than 100 characters is deleted only if it has a word of authors for every 200, and
    at most 3,000; one with “ or another mark of speech stays.
    """
    if ASIDE.search(text):
        for (start, title_end), (end, _) in pairwise([*heading_spans(text), (len(text), 0)]):
            heading = text[start:title_end].strip()
            is_short = len(heading) < LONGEST_TITLE
            is_aside = is_short and re.search(rf"(?<!\w){ASIDE.pattern}(?!\w)", heading)
            words = len(AUTHORS.findall(text, title_end, end))
            longest = max(SHORT_PART, min(PART_LENGTH, words * PER_WORD))
            if is_aside and end - start <= longest and not re.search('[“「『"]', text[start:end]):
                yield start, end, ""


def chapter_notes(parts: list[tuple[str, str]]) -> list[str]:
    """Write notes for the user on the parts that `split_chapters` gives: `[]` if all is well.

    They are `"no headings found, cut into 12 parts"` alone; or one for each long part,
    `"31,000 characters in 第五章 归尘"`, and one for the first jump,
    `"numbers jump from 第5章 断刀 to 第8章 归尘, one of 2 jumps"`. A number that stays, rises by 1
    or less, or begins again with 1 is no jump.
    """
    # A heading may read "part 1" too: then the text has it.
    if parts and all(name.startswith("part ") and name not in text[:99] for name, text in parts):
        return [f"{NO_HEADINGS}, cut into {len(parts)} parts"]
    long_parts = [(name, len(text)) for name, text in parts if len(text) > LONGEST_CHAPTER]
    notes = [f"{length:,} characters in {name or 'the front'}" for name, length in long_parts]
    numbered = [(line, name) for name, _ in parts for line in _find_candidates(name)]
    jumps = [
        f"{name} to {next_name}"
        for (line, name), (next_line, next_name) in pairwise(numbered)
        # 第5章 goes on behind 第3-4章; but 第1-2章 behind 第1-1章, a volume and a chapter of it
        if next_line.number > 1
        and not any(0 <= next_line.number - n <= 1 for n in (line.number, line.last))
    ]
    more = f", one of {len(jumps)} jumps" if len(jumps) > 1 else ""
    return notes + [f"numbers jump from {jump}{more}" for jump in jumps[:1]]
