"""Cut a text into chapters, or into parts if it has none.

The wording of a line is not enough to recognize a heading. Lines that begin with a number are
grouped by their form, and the form whose numbers go on throughout the book is that of its chapters:
the numbers of a list inside the story end soon, and a sentence that begins like a heading repeats
the number of a heading.
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

PART_LENGTH = 3000  # characters: least of a part of a book without chapters; most of an aside
LONGEST_CHAPTER = 30_000  # characters: in a longer one some heading was probably missed
LEAST_TEXT = 20  # characters: a heading with less text behind it opens no chapter
FEWEST_CHAPTERS = 3  # numbered lines: a series of fewer does not prove that there are chapters
SHORT_PART = 100  # characters: longer text before the first chapter is a part; see also `asides`
LOOK_BACK = 40  # candidates above a line that may be the line before it in a series
NO_HEADINGS = "no headings found"  # the beginning of a note that `chapter_notes` writes
LONGEST_TITLE = 40  # characters: of a title behind a number without 第; of an aside's heading
PER_WORD = 200  # characters that an aside may have for each of its words of authors

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
    number: float = math.nan  # of the chapter; nan: the line has no number
    last: float = math.nan  # the last number of several, 11 in 第10-11章; else the number
    title: str = ""  # its letters, without signs and digits
    # (rank, unit); or, without a unit, (rank, word before the number, and the number's form). The
    # rank is 0 for 第…章 or 第…回; 1 for 章 without 第, for another unit of chapters or sections,
    # and for an English word; 2 for all else. () is for a heading without a number.
    family: tuple[int | str | bool, ...] = ()
    style: tuple[str | bool, ...] = ()  # how the line is written: signs, digits, a comma
    trusted: bool = True  # its form alone makes it a heading; see also `_drop_empty`


def chapter(text: str, number: int) -> str:
    """Return the text of chapter `number` of a cleaned book, with its heading.

    Chapters are the parts that `split_chapters` returns, counted from 1; a part of text before the
    first heading counts too. Raises `DataError` if there is no such chapter.
    """
    parts = split_chapters(text)
    if not 1 <= number <= len(parts):
        raise DataError(f"chapter {number}: there are {len(parts)}, counted from 1")
    return parts[number - 1][1]


def split_chapters(text: str) -> list[tuple[str, str]]:
    """Cut cleaned text into parts, `(heading, text)`; a part's text includes its heading.

    A heading with less than 20 characters behind it (an entry in a table of contents, the name of a
    volume, a doubled heading) opens no chapter; if a chapter follows, it is put at the top of that.
    Two neighbours with the same number are one chapter if the second title is empty or is contained
    in the first: 第九回 (2) after 第九回. Text of more than 100 characters before the
    first chapter is a part with the heading `""`; shorter text belongs to the first chapter.

    If no chapter is found, or only one or two and some part has over 30,000 characters, the text is
    cut between paragraphs into `part 1`, `part 2` and so on. Each of these has 3,000 characters or
    more, except the last. In any case the parts' texts, joined by newlines, give the text again.
    """
    chapters = _find_chapters(text)
    has_front = not chapters or chapters[0][0] > SHORT_PART
    front = (0, _Candidate(0, 0))  # the text before the first chapter; its heading is empty
    opened = [front, *chapters] if has_front else chapters
    # The first part starts at 0, as a short front belongs to it. Each part is cut before the
    # newline that ends it (`end - 1`); the last part has no such newline, hence the + 1.
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
    # `_choose_series` has set `trusted` to False for the lines of tables of contents.
    numbered = [line for line in lines if line.trusted or line in chosen]
    others = [_Candidate(*x.span(), trusted=not x["volume"]) for x in UNNUMBERED.finditer(text)]
    chapters: list[tuple[int, _Candidate]] = []  # from the last to the first
    for start, line in sorted({x.start: x for x in others + numbered}.items(), reverse=True):
        next_start, next_line = chapters[-1] if chapters else (len(text), _Candidate(0, 0))
        if line.family:  # the line has a number; a volume may have text of its own
            opens = line in chosen or line.family[-1] in VOLUMES
        else:  # 楔子, but not in a table of contents
            opens = line.trusted and not HEADING.match(text, line.end + 1)
        # More than SHORT_PART characters need not be looked at.
        is_empty = len(text[line.end : min(next_start, line.end + SHORT_PART)].strip()) < LEAST_TEXT
        if is_empty and chapters:
            chapters[-1] = (start, next_line)  # the line stands above the next heading
        elif opens and not is_empty:
            if next_line.number == line.number and next_line.title in line.title:
                chapters.pop()  # the next only goes on: 第九回 (2) after 第九回
            chapters.append((start, line))
    return chapters[::-1]


@functools.lru_cache(maxsize=1)
def heading_spans(text: str) -> list[tuple[int, int]]:
    """List `(start, end)` of the headings that open chapters, and of all that `HEADING` matches.

    They are sorted. The result for the last text is cached.
    """
    ends = {line.start: line.end for _, line in _find_chapters(text)}
    return sorted((ends | dict(match.span() for match in HEADING.finditer(text))).items())


def _find_candidates(text: str) -> Iterator[_Candidate]:
    """Yield a candidate for each line that begins with a number and does not read as a sentence.

    Words may stand before 第 (正文). `第三章 归尘` has the unit 章, a space as the gap, and the
    title 归尘. `第三章归尘` has no gap: its title is glued. `3 归尘` and `Chapter 3` have no unit.
    """
    for match in NUMBERED.finditer(text):
        # `short` is a unit without 第 (3章), `word` what stands before the number (Chapter).
        unit, word = match["unit"] or match["short"] or "", (match["word"] or "").casefold()
        end = match.start("title") + _title_length(match["title"])
        title = text[match.start("title") : end].strip()
        is_glued = bool(title) and match["gap"] is None
        # It may be glued to 章 or 卷, or to a closing sign, (3)归尘; not to 天: 第三天他走了.
        may_be_glued = unit in PARTS | VOLUMES if unit else match["close"]
        is_prose = bool(re.search("[。；]|[，：．﹒]$", title))
        # A comma makes a sentence, unless it is in the middle, between the halves of a couplet.
        is_sentence = is_prose or ("，" in title and title.index("，") * 2 + 1 != len(title))
        is_number_in_prose = not match["unit"] and (is_prose or len(title) > LONGEST_TITLE)
        if is_number_in_prose or (is_glued and (is_sentence or not may_be_glued)):
            continue
        numeral = re.sub(r"[第笫苐\s]", "", match["ordinal"] or match["number"])
        numeral, *rest = TO.split(numeral)  # of 第10-11章, 10 and ["11"]
        gap = (match["gap"] or "").strip()  # 、 in 三、断刀
        form = (match["sign"][:1], numeral.isdecimal(), is_glued or gap[:1])
        other_rank = 1 if unit in PARTS or (word and word.isascii()) else 2
        rank = 0 if match["unit"] in CHAPTERS else other_rank  # see `_Candidate`
        family = (rank, unit) if unit else (rank, word, *form)
        # Nothing stands before 第, or a word that may: 正文.
        is_bare = not match["before"] or bool(PREFIX.search(match["before"]))
        trusted = match["unit"] in TRUSTED and is_bare and not (is_glued or is_prose)
        title, style = re.sub(r"[\W\d]", "", title), (*form, is_sentence)
        first, last = _number(numeral), _number(rest[-1] if rest else numeral)
        yield _Candidate(match.start(), end, first, last, title, family, style, trusted)


def _title_length(rest: str) -> int:
    """Return how many characters of `rest`, what a line has behind its number, are the title.

    Prose may follow the title: a story's opening words (话说), or a sentence. The sentence stands
    behind a couplet, whose halves have the same length, or behind blanks. Without such prose all of
    `rest` is the title. 雪夜孤灯访旧友　松林一剑退群雄那人道，走。 has a title of 15 characters.
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
    """Choose the headings of chapters from `start` to `end`, in any order; `[]` if there are none.

    They are the best series of all lines there and, for each chapter of over 30,000 characters that
    it leaves, the series found inside it: the headings may change their form there
    (第41回 after 第40章), or a new book may begin. Changes `trusted` of lines, see `_drop_empty`.
    """
    series = _best_series([line for line in lines if start <= line.start < end], text, end - start)
    edges = [start - 1, *(line.start for line in series), end] if series else []
    for above, below in pairwise(edges):
        if below - above > LONGEST_CHAPTER:
            series = series + _choose_series(lines, text, above + 1, below)
    return series


def _best_series(lines: list[_Candidate], text: str, length: int) -> list[_Candidate]:
    """Choose the series whose numbers go on best in a stretch of `length` characters, else `[]`.

    A series is what `_best_chain` makes of a family's lines and the trusted lines of others. It has
    three lines or more, at least half of its numbers differ from the number before by 1 or less,
    and it spans half of the stretch or begins with a trusted line. Preferred are, in this order: a
    series that spans half of the stretch and whose chapters have a mean length of 30,000 characters
    or less; one of a lower rank (chapters before sections); one with more lines; the first one. The
    lines of tables of contents lose `trusted`, see `_drop_empty`.
    """
    # (is poor, rank, minus the number of lines, series) of the best series: the least so far.
    best: tuple[bool, int | str, int, list[_Candidate]] = (True, 3, 0, [])
    families: dict[tuple[int | str | bool, ...], list[_Candidate]] = {}
    for line in lines:
        families.setdefault(line.family, []).append(line)
    trusted = [line for line in lines if line.trusted]  # of any family: 第五回 after 第四章
    for family in [family for family, x in families.items() if len(x) >= FEWEST_CHAPTERS]:
        members = sorted({*families[family], *trusted}, key=attrgetter("start"))
        series = _best_chain(_drop_empty(members, text), family)
        steps = [abs(second.number - first.number) for first, second in pairwise(series)]
        if len(series) < FEWEST_CHAPTERS or sum(step <= 1 for step in steps) * 2 < len(steps):
            continue
        mean_length = (series[-1].start - series[0].start) / len(steps)  # of a chapter
        reaches = mean_length * len(series) * 2 >= length  # the series spans half of it
        if reaches or series[0].trusted:
            is_poor = not reaches or mean_length > LONGEST_CHAPTER
            best = min(best, (is_poor, family[0], -len(series), series), key=lambda x: x[:3])
    return best[3]


def _drop_empty(lines: list[_Candidate], text: str) -> list[_Candidate]:
    """Return the candidates with 20 characters or more before the next one; the last is kept too.

    Three or more in a row with less text between them, and with rising numbers, are taken for a
    table of contents: `trusted` of each of them, the last in the row included, is set to False.
    """
    filled, run = [], []  # candidates with text behind them; the row of candidates so far
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
    """Choose the chain of lines with the highest score, by dynamic programming over pairs of lines.

    A chain's score is the sum of the points of its lines and of the `_pair_points` of neighbours in
    it. A trusted line of the family has 2 points; another line of the family, if three or more
    have its style, 0.3; any other line -1.2. The neighbour above a line is one of the
    `LOOK_BACK` lines above it. Of chains with equal scores the one that ends first is chosen.
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
    """Return points, at most 1.1, for two lines as headings of neighbouring chapters.

    If the number rises by 1 or less (from 3 to 3.5), the points are 1; if it rises by n > 1, they
    are 0.5 / n. If it stays, they are -0.5, as sentences repeat a heading's number. If it falls by
    1 (two chapters in the wrong order), they are -0.1; if by another amount (a new volume begins),
    -0.4. Added is a term for the distance: the lines' distance is divided by `mean_distance` and by
    the rise, put between 1 and 3 (chapters may be missing). The term is -1.5 to 0 if this ratio is
    below 1, and 0 to 0.1 if it is above 1.
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
    """Delete tables of contents: five headings or more with only blanks between, which recur.

    A heading recurs if its line is there twice, or if its number alone (第三章) is another line.
    One heading must recur if the table begins with the text's first heading, else half of them. The
    last heading stays, as it opens a chapter and is no entry, unless its text occurs again below.
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

    Newlines are put around a heading that stands inside a line, and before prose behind a title. A
    title that stands below its heading and a rule of dashes is joined to the heading by a space.
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

    Such a chapter of more than 100 characters is deleted only if it has a word of authors for each
    200 of them, and 3,000 at most. A chapter with “ or another mark of speech stays.
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

    Without headings there is one note: `"no headings found, cut into 12 parts"`. Else there is a
    note for each part of over 30,000 characters, `"31,000 characters in 第五章 归尘"`, and one for
    the first jump, `"numbers jump from 第5章 断刀 to 第8章 归尘, one of 2 jumps"`. A number that
    stays, rises by 1 or less, or begins again with 1 is no jump.
    """
    # A real heading may read "part 1" as well: then the part's text contains it.
    if parts and all(name.startswith("part ") and name not in text[:99] for name, text in parts):
        return [f"{NO_HEADINGS}, cut into {len(parts)} parts"]
    long_parts = [(name, len(text)) for name, text in parts if len(text) > LONGEST_CHAPTER]
    notes = [f"{length:,} characters in {name or 'the front'}" for name, length in long_parts]
    numbered = [(line, name) for name, _ in parts for line in _find_candidates(name)]
    jumps = [
        f"{name} to {next_name}"
        for (line, name), (next_line, next_name) in pairwise(numbered)
        # No jumps: from 第3-4章 to 第5章; and 第1-1章 to 第1-2章, where 1 is the volume's number.
        if next_line.number > 1
        and not any(0 <= next_line.number - n <= 1 for n in (line.number, line.last))
    ]
    more = f", one of {len(jumps)} jumps" if len(jumps) > 1 else ""
    return notes + [f"numbers jump from {jump}{more}" for jump in jumps[:1]]
