"""Clean a text and cut it into chapters, or into passages where it has none."""

import re
from collections.abc import Iterator
from itertools import pairwise

SECTION = 3000  # characters: length of a part where a book has no chapters
NUMERAL = "[0-9０-９一二三四五六七八九十百千零〇○两廿卅]+"
HEADING = re.compile(
    rf"^(?:第{NUMERAL}[回章节卷](?![^\s　]*[。！？”]$).{{0,40}}"
    r"|楔子|引首|引子|序|序章|序言|自序|尾声|后记)$",
    re.MULTILINE,
)


def clean(text: str) -> str:
    r"""Strip lines and drop empty ones: `"　　甲。\r\n\r\n　　乙。"` becomes `"甲。\n乙。"`."""
    lines = (line.strip(" \t　\ufeff\xa0") for line in text.splitlines())
    return "\n".join(line for line in lines if line)


def chapters(text: str) -> list[tuple[str, str]]:
    """Cut cleaned text into `(heading, text)`; the heading is the first line of its text.

    What stands before the first heading is a part of its own, or goes to the first chapter if it
    is under 50 characters. A book without headings is cut between paragraphs into parts of about
    3,000 characters. Joined by newlines the parts are the text.
    """
    starts = [match.start() for match in HEADING.finditer(text)]
    if not starts:
        return [(str(n), part) for n, part in enumerate(gather(text.split("\n"), SECTION), 1)]
    edges = [*sorted({0, *starts}), len(text) + 1]
    parts = [text[a : b - 1] for a, b in pairwise(edges)]
    return [(_heading(part), part) for part in _join_short(parts)]


def _join_short(parts: list[str]) -> list[str]:
    """Join a part under 50 characters, a title or a lone heading, to the part behind it."""
    joined: list[str] = []
    pending = ""
    for part in parts:
        pending = f"{pending}\n{part}" if pending else part
        if len(pending) >= 50:
            joined.append(pending)
            pending = ""
    if pending:
        joined.append(pending)
    return joined


def _heading(part: str) -> str:
    match = HEADING.search(part[:200])
    return match.group() if match else ""


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
