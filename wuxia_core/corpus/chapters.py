"""Cut a text into chapters, or into passages where it has none."""

import re
from collections.abc import Iterator
from itertools import pairwise

SECTION = 3000  # characters: length of a part where a book has no chapters
LONE = 20  # characters: a heading with less text behind it opens no chapter
TEASER = 5  # a part so many times shorter than another of its number is from a table of contents
FRONT = 100  # characters: less than that without a chapter of its own goes to the next one

NUMERAL = "[0-9０-９一二三四五六七八九十百千零〇○两廿卅]+"
HEADING = re.compile(
    rf"^[ \t　]*(?:(?:正文|[上中下]卷|第{NUMERAL}[卷部集])[ 　]+)*"
    rf"(?:第(?P<number>{NUMERAL})[回章节節卷](?![^\s　]*[。！？”]$).{{0,40}}"
    r"|楔子|引首|引子|序|序章|序言|自序|尾声|后记|後記)$",
    re.MULTILINE,
)
DIGITS = dict(zip("〇一二三四五六七八九", range(10), strict=True)) | {"零": 0, "○": 0, "两": 2}
UNITS = {"十": 10, "百": 100, "千": 1000}


def chapters(text: str) -> list[tuple[str, str]]:
    """Cut cleaned text into `(heading, text)`; the heading is the first line of its text.

    A heading without text behind it (a table of contents, the name of a volume, a doubled one)
    opens no chapter, nor does one that stands again before a longer text; neighbours with the same
    number are one. What stands before the first chapter is a part without heading, or goes to the
    first chapter if it is under 100 characters. A book without headings is cut between paragraphs
    into parts of about 3,000 characters. Joined by newlines the parts are the text.
    """
    starts = [match.start() for match in HEADING.finditer(text)]
    if not starts:
        return [(str(n), part) for n, part in enumerate(gather(text.split("\n"), SECTION), 1)]
    edges = [*sorted({0, *starts}), len(text) + 1]
    parts = [text[a : b - 1] for a, b in pairwise(edges)]
    return _join([(_heading(part), part) for part in parts if part])


def _join(parts: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """Join what belongs to one chapter; see `chapters`."""
    joined: list[tuple[str, str]] = []
    pending: list[str] = []
    longest: dict[int | None, int] = {}
    for heading, part in parts:
        number = _number_of(heading)
        longest[number] = max(len(part), longest.get(number, 0))
    for heading, part in parts:
        number = _number_of(heading)
        listed = number is not None and len(part) * TEASER < longest[number]
        if len(part) - len(heading) < (LONE if heading else FRONT) or listed:
            pending.append(part)
            continue
        if joined and number is not None and _number_of(joined[-1][0]) == number:
            joined[-1] = (joined[-1][0], "\n".join([joined[-1][1], *pending, part]))
        elif sum(map(len, pending)) >= FRONT:
            joined += [("", "\n".join(pending)), (heading, part)]
        else:
            joined.append((heading, "\n".join([*pending, part])))
        pending = []
    return joined + ([("", "\n".join(pending))] if pending else [])


def _heading(part: str) -> str:
    match = HEADING.match(part)
    return match.group().strip() if match else ""


def _number_of(heading: str) -> int | None:
    match = HEADING.match(heading)
    return _number(match["number"]) if match and match["number"] else None


def _number(numeral: str) -> int:
    """Read a numeral: 一百二十 is 120, and so is 一二〇; 廿三 is 23, 十五 is 15, 001 is 1."""
    if numeral.isdecimal():
        return int(numeral)
    numeral = numeral.replace("廿", "二十").replace("卅", "三十")
    if not set(numeral) & set(UNITS):
        return int("".join(str(DIGITS.get(character, character)) for character in numeral))
    total = digit = 0
    for character in numeral:
        if character in UNITS:
            total += (digit or 1) * UNITS[character]
            digit = 0
        else:
            digit = DIGITS.get(character, 0)
    return total + digit


def gather(lines: list[str], length: int) -> Iterator[str]:
    """Join consecutive lines to passages of at least `length` characters."""
    passage: list[str] = []
    for line in lines:
        passage.append(line)
        if sum(map(len, passage)) >= length:
            yield "\n".join(passage)
            passage = []
    if passage:
        yield "\n".join(passage)
