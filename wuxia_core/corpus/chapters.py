"""Cut a text into chapters, or into passages where it has none."""

import re
import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise

from wuxia_core.errors import DataError
from wuxia_core.text import Edit

TOO_LONG = 30_000  # characters: a longer chapter may be several
SECTION = 3000  # characters: length of a part where a book has no chapters
LONE = 20  # characters: a heading with less text behind it opens no chapter
TEASER = 5  # a part so many times shorter than another of its number is from a table of contents
FEWEST = 3  # chapters that count up from one
FRONT = 100  # characters: less than that without a chapter of its own goes to the next one

NUMERAL = "[0-9０-９一二三四五六七八九十百千零〇○两廿卅壹贰叁肆伍陆柒捌玖拾佰]{1,9}"
VOLUME = rf"(?:正文|[上中下]卷|第{NUMERAL}[卷部集](?:[ 　]+[^\s，。]{{1,12}})?)[ 　]+(?=第)"
# behind 第一回 these make a word of it: 第一回合, 第一节课, 第九卷轴
NO_TITLE = r"(?![合轴軸课課]|[^\s：:]*[。”，：；…—]$|[^\s：:]{15,}[？！]$)"
HEADING = re.compile(
    rf"^[ \t　]*+(?:#{{1,3}} ?|[【《〈])?(?:{VOLUME})*"
    rf"(?:第[ 　]?(?P<number>{NUMERAL})[ 　]?[回章節节卷话話]{NO_TITLE}.{{0,40}}$"
    r"|(?:楔子|引首|引子|序|序章|序言|自序|尾声|后记|後記|番外[^，。\n]{0,20})[】》〉]?$)",
    re.MULTILINE,
)
LISTED = re.compile(
    rf"^[ \t　]*+(?P<number>{NUMERAL})(?:[、.．:： 　][ 　]*[^，。！？\n]{{0,30}})?$", re.MULTILINE
)

INLINE = re.compile(  # the title ends where there are two blanks
    rf"(?<=[。！？”」])(?P<before>[ 　]+)第{NUMERAL}[回章節节][ 　][^\s。！？]{{1,20}}"
    r"(?:[ 　][^\s。！？]{1,20})?(?:[ 　]*$|(?P<after>[ 　]{2,}))",
    re.MULTILINE,
)
CONTENTS = 4  # more headings than that with nothing between them are a table of contents


@dataclass
class _Part:
    heading: str
    number: int | None
    text: str


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
    opens no chapter, nor does one that stands again before a longer text; neighbours with the same
    number are one. What stands before the first chapter is a part without heading, or goes to the
    first chapter if it is under 100 characters. Where fewer than three are called a chapter,
    headings such as 一、二、三、 that count up from one are; a book without any is cut between
    paragraphs into parts of about 3,000 characters. Joined by newlines the parts are the text.
    """
    headings = list(HEADING.finditer(text))
    if sum(match["number"] is not None for match in headings) < FEWEST:
        headings = _counted(LISTED.finditer(text)) or headings
    if not headings:
        return passages(text, SECTION)
    starts = [match.start() for match in headings] + [len(text) + 1]
    parts = [_Part("", None, text[: starts[0] - 1])] if starts[0] else []
    for match, (start, end) in zip(headings, pairwise(starts), strict=True):
        number = match["number"] and _number(match["number"])
        parts.append(_Part(match.group().strip(), number or None, text[start : end - 1]))
    return _join(parts)


def _counted(matches: Iterator[re.Match[str]]) -> list[re.Match[str]]:
    """Keep the headings that count up from one; none where there are fewer than three."""
    kept: list[re.Match[str]] = []
    for match in matches:
        if _number(match["number"]) == len(kept) + 1:
            kept.append(match)
    return kept if len(kept) >= FEWEST else []


def _join(parts: list[_Part]) -> list[tuple[str, str]]:
    """Join what belongs to one chapter; see `split_chapters`."""
    joined: list[_Part] = []
    pending: list[str] = []
    ascending = sorted(parts, key=lambda part: len(part.text))
    longest = {part.number: len(part.text) for part in ascending}
    for part in parts:
        listed = part.number is not None and len(part.text) * TEASER < longest[part.number]
        if len(part.text) - len(part.heading) < (LONE if part.heading else FRONT) or listed:
            pending.append(part.text)
            continue
        if joined and part.number is not None and joined[-1].number == part.number:
            joined[-1].text = "\n".join([joined[-1].text, *pending, part.text])
        elif sum(map(len, pending)) >= FRONT:
            joined += [_Part("", None, "\n".join(pending)), part]
        else:
            part.text = "\n".join([*pending, part.text])
            joined.append(part)
        pending = []
    joined += [_Part("", None, "\n".join(pending))] if pending else []
    return [(part.heading, part.text) for part in joined]


def _number(numeral: str) -> int:
    """Read a numeral: 一百二十 is 120, and so is 一二〇; 廿三 is 23, 十五 is 15, 001 is 1."""
    values = [2 if c == "两" else int(unicodedata.numeric(c, 0)) for c in numeral]
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


def chapter_notes(parts: list[tuple[str, str]]) -> list[str]:
    """Say what is odd about a book's chapters: no headings, or some that were not found."""
    if not any(text.startswith(heading) for heading, text in parts if heading):
        return [f"no headings found, cut into {len(parts)} parts"]
    long = [(name, len(text)) for name, text in parts if len(text) > TOO_LONG]
    return [f"{size:,} characters in {name or 'the part before the first'}" for name, size in long]
