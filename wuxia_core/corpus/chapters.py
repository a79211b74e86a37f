"""Cut a text into chapters, or into parts where it has none.

A heading is not known by its wording alone. Lines that begin with a number are gathered by their
form, and the form whose numbers go on through the book is that of its chapters: a list inside the
story does not reach through it, and a sentence that begins like a heading repeats a number.
"""

import math
import re
import unicodedata
from bisect import bisect
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise, zip_longest

from wuxia_core.errors import DataError
from wuxia_core.text import Edit

SECTION = 3000  # characters: length of a part where a book has no chapters
LONGEST = 30_000  # characters: in a longer chapter some heading was hardly found
LONE = 20  # characters: a heading with less text behind it opens no chapter
FEWEST = 3  # chapters whose numbers go on
FRONT = 100  # characters: less than that without a chapter of its own goes to the next one
WINDOW = 40  # lines that look like headings may stand between two headings
CONTENTS = 4  # more headings than that with nothing between them are a table of contents
TITLE = 40  # characters of a title behind a mere number

BLANK = r"[^\S\n]"
DIGITS = (
    "0-9０-９一二三四五六七八九十百千万萬零〇○两兩廿卅卌壹贰貳叁參肆伍陆陸柒捌玖拾佰仟Ⅰ-ⅿ①-⒛㈠-㈩"
)
NUMERAL = f"[{DIGITS}]{{1,9}}"
MISREAD = str.maketrans("oO—-", "00一一")  # digits of a page that was scanned
ROMAN = dict(zip("IVXLC", (1, 5, 10, 50, 100), strict=True))
CHAPTERS = "章回囘囬"
SECTIONS = "节節话話幕折出夜段则則场場"
VOLUMES = "卷部集篇"
UNITS = CHAPTERS + SECTIONS + VOLUMES
SAME = str.maketrans("囘囬節話則場", "回回节话则场")
ORDINAL = rf"[第笫苐]{BLANK}*[{DIGITS}OoＯ—－IVXLC.]{{1,9}}+{BLANK}*"
SIGN = r"[^\w\s，。！？；：…“”‘’\"']"
START = rf"^{BLANK}*+{SIGN}{{0,8}}{BLANK}*"
EDGE = r"(?<![^\W_卷部集篇文A-Za-z0-9])"  # of what stands before 第: 正文, VIP, 第一卷, 《…》
BEFORE = rf"[^\n，。！？；“”]{{0,40}}?{EDGE}"
CLOSE = r"[^\w\s，。！？；：、…—“”‘’\"'.．·•|/(（【\[《「『〈〔-]{0,4}"
GAP = rf"(?:(?:{BLANK}|[：:、.．·•—－–_|｜/-])+|(?=[(（【\[《「『〈“])|$)"
RUNS_ON = "合轴軸课課程法的了中里裡上是"  # 第一回合, 第四回中: these make it part of a sentence
TITLED = (
    rf"{CLOSE}(?:{GAP}[^\n。]{{0,100}}(?<![。．﹒，；]){BLANK}*$"
    rf"|(?![{RUNS_ON}])[^\n，。．；：]{{1,30}}$)"
)
SPECIAL = (
    rf"(?:正文{BLANK}+)?(?:番外[^，。\n]{{0,30}}$|(?:楔子|引首|引[子言]|[自代]?序|序[章言幕曲]"
    r"|前[言传傳]|尾[声聲]|最?[终終]章|大?[结結]局|[后後][记記]|跋|附[录錄]|外[传傳]|[间間]章"
    rf"|特[别別]篇|[上中下]卷|卷之?{NUMERAL}){CLOSE}{GAP}[^\n，。；]{{0,30}}$)"
)
HEADING = re.compile(rf"{START}(?:{BEFORE}{ORDINAL}[{UNITS}]{TITLED}|{SPECIAL})", re.MULTILINE)
NAMED = re.compile(START + SPECIAL, re.MULTILINE)
LINE = re.compile(  # that may be a heading
    rf"^{BLANK}*+(?P<sign>{SIGN}{{0,8}}){BLANK}*(?:(?P<before>[^\n，。！？；“”]{{1,40}}?{EDGE})??(?P<ordinal>{ORDINAL})"
    rf"(?P<unit>[{CHAPTERS}{SECTIONS}]|(?!.{{0,40}}{EDGE}{ORDINAL}[{CHAPTERS}{SECTIONS}])"
    rf"(?:[{VOLUMES}]|(?(before)(?!)|[^\W\d_])))"
    rf"|(?P<word>[^\W_第{DIGITS}]{{0,8}}?[^\w\n，。！？；：、“”…]{{0,3}})(?:\d{{1,3}}[-－—–])?"
    rf"(?P<number>{NUMERAL}+|(?<=[A-Za-z] )[IVXLC]{{1,7}}+)(?P<short>[{CHAPTERS}{SECTIONS}])?)"
    rf"(?P<close>{CLOSE})(?P<gap>{GAP})?(?P<title>.*)$",
    re.MULTILINE,
)
AFTER = re.compile(rf"正文|VIP|[{VOLUMES}]{NUMERAL}|{NUMERAL}[{VOLUMES}]|[》】\])]", re.IGNORECASE)
COUPLET = re.compile(r"\w{3,12}[，；：]\w{3,12}$")
INLINE = re.compile(  # the title ends where there are two blanks
    rf"(?<=[。！？”」])(?P<before>[ 　]+)第{NUMERAL}[回章節节][ 　][^\s。！？]{{1,20}}"
    r"(?:[ 　][^\s。！？]{1,20})?(?:[ 　]*$|(?P<after>[ 　]{2,}))",
    re.MULTILINE,
)


@dataclass(eq=False)
class _Line:
    """A line that may be a heading; the lines of one family count the same things."""

    start: int
    end: int
    number: float = math.nan
    title: str = ""
    family: tuple[int | str, ...] = ()  # first its rank: chapters, sections, …
    style: tuple[str | bool, ...] = ()
    trusted: bool = True  # its form makes it a heading, even where its number is wrong
    chosen: bool = False


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
    opens no chapter; neighbours of one number and title are one. What stands before the first
    chapter is a part without heading, or goes to the first chapter if it is under 100 characters.
    A book without headings, or with one or two that leave a part of over 30,000 characters, is
    cut between paragraphs into parts of about 3,000, called `part 1`, `part 2` and so on.
    Joined by newlines the parts are the text.
    """
    cuts = _cuts(text)
    starts = [cut.start for cut in cuts] + [len(text) + 1]
    lengths = [end - start for start, end in pairwise([0, *starts])]
    if not cuts or (len(cuts) < FEWEST and max(lengths) > LONGEST):
        return [(f"part {n}", part) for n, part in passages(text, SECTION)]
    parts = [text[start : end - 1] for start, end in pairwise(starts)]
    front = text[: starts[0] - 1] if starts[0] else ""
    return _join(front, list(zip(cuts, parts, strict=True)))


def _join(front: str, parts: list[tuple[_Line, str]]) -> list[tuple[str, str]]:
    """Join what belongs to one chapter; see `split_chapters`."""
    joined: list[tuple[str, str]] = [("", front)] if len(front) >= FRONT else []
    pending = [front] if 0 < len(front) < FRONT else []
    last = _Line(0, 0)
    for line, text in parts:
        pending.append(text)
        if len(text) - (line.end - line.start) < LONE:
            continue
        together = "\n".join(pending)
        if joined and _same(last, line):
            joined[-1] = (joined[-1][0], f"{joined[-1][1]}\n{together}")
        else:
            joined.append((text[: line.end - line.start].strip(), together))
        last, pending = line, []
    return joined + ([("", "\n".join(pending))] if pending else [])


def _same(one: _Line, other: _Line) -> bool:
    """Whether two headings are of one chapter: 第九回 剑起, 第九回 (2)."""
    titles = [re.sub(r"[\W\d]", "", line.title) for line in (one, other)]
    return one.number == other.number and titles[1] in (titles[0], "")


def _cuts(text: str) -> list[_Line]:
    """Find the headings that open chapters, and those right before one that belong to it."""
    lines = list(_lines(text))
    for line in _choose(lines, text):
        line.chosen = True
    marks = {match.start(): _Line(*match.span()) for match in NAMED.finditer(text)}
    marks |= {line.start: line for line in lines if line.chosen or line.trusted}
    cuts: list[_Line] = []
    after = _Line(len(text), len(text))
    for _, line in sorted(marks.items(), key=lambda mark: -mark[0]):
        lone = len(text[line.end : after.start].strip()) < LONE
        above = not line.family or line.family[-1] in VOLUMES
        if line.chosen or (after in cuts[-1:] if lone else above):
            cuts.append(line)
        after = line
    return cuts[::-1]


def _lines(text: str) -> Iterator[_Line]:
    """Find the lines that begin with a number, less sentences."""
    for match in LINE.finditer(text):
        ordinal, unit = match["unit"], (match["unit"] or match["short"] or "").translate(SAME)
        title, glued = match["title"].strip(), match["gap"] is None
        prose = bool(re.search("[。；]|[，：．﹒]$", title))
        sentence = prose or ("，" in title and not COUPLET.match(title))
        nameless = not (match["close"] if not unit else unit in UNITS)
        number = _number((match["ordinal"] or match["number"]).strip("第笫苐 　\xa0"))
        if number is None or (glued and title and (sentence or nameless)):
            continue
        if ordinal or not (prose or (glued and nameless and title) or len(title) > TITLE):
            yield _described(match, number, unit, prose)


def _described(match: re.Match[str], number: float, unit: str, prose: bool) -> _Line:
    """Say what the heading counts, in what form."""
    digits, title = (match["number"] or match["ordinal"][1:]).strip(), match["title"].strip()
    kind = "0" if digits[0] in "0０" else "1" if digits.isdecimal() else "一"
    gap = "glued" if match["gap"] is None and title else (match["gap"] or "").strip()[:1]
    before, word = match["before"], (match["word"] or "").casefold()
    form = (match["sign"][:1], kind.replace("0", "1"), gap)
    rank = 2
    if unit:
        rank = (
            0
            if unit in CHAPTERS and not match["short"]
            else 1
            if unit in SECTIONS + CHAPTERS
            else 2
        )
    elif word and word.isascii():
        rank = 1
    family = (rank, unit) if unit else (rank, word, *form)
    style = (*form, kind, bool(before), prose, title[:1] in tuple(RUNS_ON) and gap == "glued")
    known = match["unit"] and unit in CHAPTERS + SECTIONS + VOLUMES
    trusted = known and gap != "glued" and not prose and (not before or AFTER.search(before))
    return _Line(*match.span(), number, title, family, style, bool(trusted))


def _choose(lines: list[_Line], text: str) -> list[_Line]:
    """Choose the headings: a form whose numbers go on through the text.

    Of several the one that counts chapters, not parts of them, and the longer one; one whose
    chapters are over 30,000 characters comes last. Headings of another form may fill its gaps.
    Where there is none, the lines that are headings by their form are taken.
    """
    families = defaultdict(list)
    for line in lines:
        families[line.family].append(line)
    found = []
    for (rank, *_), members in families.items():
        chain = _chain(_with_text(members, text))
        if len(chain) >= FEWEST and _goes_on(chain):
            each = (chain[-1].start - chain[0].start) / (len(chain) - 1)
            through = each * len(chain) * 2 >= len(text)
            if through or chain[0].trusted:
                found.append((not through or each > LONGEST, rank, -len(chain), chain))
    if not found:
        return [line for line in lines if line.trusted]
    chosen = min(found, key=lambda entry: entry[:3])[-1]
    return _filled(chosen, lines)


def _with_text(lines: list[_Line], text: str) -> list[_Line]:
    """Leave out headings without text behind; those of a list are not trusted any more."""
    kept, run = [], []
    for line, after in zip_longest(lines, lines[1:]):
        run.append(line)
        empty = after and len(text[line.end : after.start].strip()) < LONE
        if empty and line.number < after.number:
            continue
        if len(run) >= FEWEST:
            for listed in run:
                listed.trusted, listed.style = False, ()
        kept += [] if empty else [line]
        run = []
    return kept


def _chain(lines: list[_Line]) -> list[_Line]:
    """Choose the lines whose numbers go on best, by dynamic programming over pairs of lines."""
    usual = (lines[-1].start - lines[0].start) / len(lines) or 1 if lines else 1
    styles = defaultdict(list)
    for line in lines:
        styles[line.style].append(line)
    common = {
        style
        for style, group in styles.items()
        if len(group) * 3 >= len(lines) or (len(group) >= FEWEST and _goes_on(group))
    } - {()}
    best: list[tuple[float, int]] = []  # score of the chain that ends here, the line before
    for n, line in enumerate(lines):
        before = (0.0, -1)
        for k in range(max(0, n - WINDOW), n):
            before = max(before, (best[k][0] + _gain(lines[k], line, usual), k))
        best.append(
            (before[0] + (2 if line.trusted else 0.3 if line.style in common else -1.2), before[1])
        )
    chain = []
    n = max(range(len(lines)), key=lambda n: best[n][0], default=-1)
    while n >= 0:
        chain.append(lines[n])
        n = best[n][1]
    return chain[::-1]


def _gain(one: _Line, other: _Line, usual: float) -> float:
    """Score two headings as neighbours: most if the second number is the next and not too near."""
    step = other.number - one.number
    distance = max(1, other.start - one.start) / usual / min(max(step, 1), 3)
    nearness = min(0.1, max(-1.5, 0.3 * math.log(distance)))
    if step > 0:
        return nearness + (1 if step <= 1 else 0.5 / step)
    return nearness - (0.5 if step == 0 else 0.1 if step == -1 else 0.4)


def _goes_on(chain: list[_Line]) -> bool:
    """Whether most numbers are the next ones; they may be doubled or run backwards."""
    steps = [abs(other.number - one.number) for one, other in pairwise(chain)]
    return 2 * sum(step <= 1 for step in steps) >= len(steps) and max(steps) > 0


def _filled(chosen: list[_Line], lines: list[_Line]) -> list[_Line]:
    """Add what a misprint, or another form, hides: a heading where a number is missing."""
    for line in lines:
        at = bisect(chosen, line.start, key=lambda other: other.start)
        before, after = chosen[at - 1 : at], chosen[at : at + 1]
        if before and after and line not in (*before, *after):
            one, other = before[0], after[0]
            fits = line.trusted and one.number < line.number < other.number
            alike = line.style == one.style == other.style and line.family == one.family
            if fits or (alike and other.number - one.number == 2):
                chosen.insert(at, line)
    return chosen


def _number(numeral: str) -> float | None:
    """Read a numeral: 一百二十 is 120, and so is 一二〇; 廿三 is 23, 001 is 1, Ⅻ is 12, 1.5 is 1.5.

    None if it is none.
    """
    numeral = unicodedata.normalize("NFKC", numeral).translate(MISREAD).strip("(). ")
    if re.fullmatch(r"\d+\.\d+", numeral):
        return float(numeral)
    values = [
        ROMAN.get(c) or 2 * (c == "两") or int(unicodedata.numeric(c, -(c != "○"))) for c in numeral
    ]
    if not values or min(values) < 0:
        return None
    if numeral[0] in ROMAN:
        return sum(one if one >= other else -one for one, other in pairwise([*values, 0]))
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
    """Tables of contents: headings that follow each other with nothing between."""
    run: list[re.Match[str]] = []
    for match in HEADING.finditer(text):
        if run and text[run[-1].end() : match.start()].strip():
            yield from _list_of(run, text)
            run = []
        run.append(match)
    yield from _list_of(run, text)


def _list_of(run: list[re.Match[str]], text: str) -> Iterator[Edit]:
    """Remove headings; the last one stays if it opens the first chapter and comes no more."""
    if len(run) > CONTENTS:
        comes_again = text.find(run[-1].group().strip(), run[-1].end()) >= 0
        yield run[0].start(), run[-1].end() if comes_again else run[-1].start(), ""


def headings(text: str) -> Iterator[Edit]:
    """Headings behind a sentence get a line of their own."""
    for match in INLINE.finditer(text):
        yield *match.span("before"), "\n"
        if match["after"]:
            yield *match.span("after"), "\n"
