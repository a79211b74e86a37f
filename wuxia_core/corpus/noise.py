"""What is no story: notices of sites, authors' notes, page marks, licences, footnotes.

Forms are data, each with a line that it takes and a line of story that it leaves. A notice is known
by the share of its characters that are words of sites and authors, not by one such word: a line
shaped like a sentence needs an address, a site's name or a call to the reader beside them.
"""

import functools
import re
import tomllib
from bisect import bisect
from collections import Counter
from collections.abc import Iterator
from importlib import resources
from itertools import chain

from wuxia_core.corpus.chapters import HEADING
from wuxia_core.text import HAN, Edit, lines_with, replace

BLANK = " \t　"
SENTENCE_END = tuple("。！？…”』」：；—.!?\"'．﹒")


DATA = tomllib.loads(resources.files(__package__).joinpath("noise.toml").read_text("utf-8"))


@functools.cache
def part(name: str) -> str:
    """Join the alternatives of a pattern, with the patterns that it names."""
    if name == "lines":
        return "|".join(form["pattern"] for form in DATA["lines"])
    joined = "|".join(DATA["patterns"][name].split())
    return re.sub("%([a-z_]+)%", lambda match: f"(?:{part(match[1])})", joined)


@functools.cache
def pattern(name: str) -> re.Pattern[str]:
    """Compile a pattern of noise.toml."""
    return re.compile(part(name), re.MULTILINE)


@functools.cache
def _anywhere(*names: str) -> re.Pattern[str]:
    """Find words fast: those that begin with a character, without what may not stand before."""
    words = re.sub(r"\(\?<?!.*?\)", "", " ".join(DATA["patterns"][x] for x in names)).split()
    return re.compile("|".join(word for word in words if word[0] not in "[%"))


PLAIN = str.maketrans(DATA["letters"]["disguised"], DATA["letters"]["plain"])
LETTER, SENTENCE = re.compile(f"[{HAN}A-Za-z0-9]"), re.compile("[，。？…]")
SENTENCES = re.compile("[^。！？!?…]+[。！？!?…”』」）)]*")
SURE, LIKELY, NEARLY_ALL = 0.75, 0.55, 0.85  # shares of letters that are words of notices
WITH_ADDRESS, AFTERTHOUGHT = 0.45, 0.35  # the same beside an address, and behind PS
LEAST_STORY, LONGEST_NOTICE, LONGEST_AD = 8, 300, 600  # characters
BEFORE_EDGE, BEHIND_EDGE = 300, 100  # characters from a heading where authors speak
FEWEST_REPEATS, LONGEST_REPEAT = 3, 40


def _share(line: str) -> tuple[float, int]:
    """Give the share of letters that are words of notices, and how many such words are proof."""
    line = pattern("title").sub("", line)
    words = list(pattern("word").finditer(line))
    letters = len(LETTER.findall(line))
    covered = sum(match.end() - match.start() for match in words)
    return covered / max(letters, 1), len({match["proof"] for match in words} - {None})


def _is_notice(line: str, at_edge: bool = False) -> bool:
    """Whether a line without an address is a notice: nobody's words, and a call to the reader.

    Less is enough at a chapter's edge, where authors speak, and in a list of words of sites.
    """
    if len(line) > LONGEST_NOTICE or pattern("speech").search(line) or pattern("told").search(line):
        return False
    if line.startswith("【") and not pattern("in_brackets").search(line):
        return False  # a game speaks
    share, proofs = _share(line)
    if pattern("postscript").match(line):
        return share >= AFTERTHOUGHT and (at_edge or proofs > 0)
    shaped = SENTENCE.search(line)
    listed = proofs > 2 and not shaped
    full = proofs > 1 and shaped and share >= NEARLY_ALL
    calls = listed or full or pattern("call").search(line)
    certain = pattern("certain").search(line)
    enough = WITH_ADDRESS if certain else LIKELY if listed or (at_edge and proofs > 1) else SURE
    return bool(proofs and calls) and share >= enough


def ads(text: str) -> Iterator[Edit]:
    """Advertisements and notices of sites: whole lines."""
    for start, end in lines_with(_anywhere("mark", "site"), text):
        line = text[start:end].translate(PLAIN).strip() if end - start <= LONGEST_AD else ""
        if (
            line
            and not HEADING.match(line)
            and all(is_ad or not LETTER.search(line, *span) for *span, is_ad in _sentences(line))
        ):
            yield start, min(end + 1, len(text)), ""


def _sentences(line: str) -> Iterator[tuple[int, int, bool]]:
    """Cut a line into sentences, each with whether it is an advertisement."""
    hidden = pattern("watermark").sub(_hide, line) if pattern("sign").search(line) else line
    for match in SENTENCES.finditer(hidden):
        rest = match.group().replace("\0", "")
        with_address = len(rest) < len(match.group())
        is_ad = _is_rest_of_ad(rest) if with_address else _is_notice(rest)
        yield *match.span(), is_ad


def _hide(match: re.Match[str]) -> str:
    """Put no words in the place of a watermark; a bracket without an address may be story."""
    story = match["bracket"] and not pattern("address").search(match["bracket"])
    return match.group() if story else "\0" * len(match.group())


def _is_rest_of_ad(rest: str) -> bool:
    """Whether what stands beside an address in a sentence is more of the advertisement."""
    if len(rest) > LONGEST_NOTICE or pattern("speech").search(rest) or pattern("told").search(rest):
        return False
    letters = len(LETTER.findall(rest))
    share, proofs = _share(rest)
    few = letters <= LEAST_STORY and not SENTENCE.search(rest)
    return not letters or few or (proofs > 0 and share >= WITH_ADDRESS)


@functools.lru_cache(maxsize=1)
def _headings(text: str) -> list[tuple[int, int]]:
    return [match.span() for match in HEADING.finditer(text)]


def authors_notes(text: str) -> Iterator[Edit]:
    """Words of authors to readers: votes, thanks, leave; at a chapter's edge less is proof."""
    for start, end in lines_with(_anywhere("author", "note"), text):
        line = text[start:end].strip()
        if HEADING.match(line) or not _is_notice(line, at_edge=True):
            continue
        edges = [0, *(start for start, _ in _headings(text)), len(text)]
        after = bisect(edges, start, hi=len(edges) - 1)
        at_edge = edges[after] - start < BEFORE_EDGE or start - edges[after - 1] < BEHIND_EDGE
        if at_edge or _is_notice(line):
            yield start, min(end + 1, len(text)), ""


def watermarks(text: str) -> Iterator[Edit]:
    """Addresses, names of sites and calls to readers inside a sentence, which is left whole."""
    last = 0
    for line_start, line_end in lines_with(_anywhere("mark"), text):
        line = text[line_start:line_end].translate(PLAIN)
        spans = [
            _with_marks(line, *match.span())
            for match in pattern("watermark").finditer(line)
            if not _is_told(match, text[line_start + match.start() : line_start + match.end()])
        ]
        if not HEADING.match(line):
            spans += [
                (start, end)
                for start, end, is_ad in _sentences(line)
                if is_ad and pattern("address").search(line, start, end)
            ]
        for start, end in sorted(spans):
            if line_start + end > last:
                yield max(line_start + start, last), line_start + end, ""
                last = line_start + end


def _is_told(match: re.Match[str], written: str) -> bool:
    """Whether a bracket or an address belongs to the story: somebody reads, types or says it."""
    if match["call"]:
        return False
    line, found = match.string, match.group()
    if match["bracket"]:
        rest = pattern("address").sub("", found)
        share, proofs = _share(rest)
        enough, fewest = (SURE, 2) if found[0] in "（(<" else (LIKELY, 1)
        of_a_site = share >= enough and proofs >= fewest and pattern("in_brackets").search(rest)
        has_address = len(rest) < len(found) and len(LETTER.findall(rest)) <= LEAST_STORY
        return bool(pattern("told").search(rest)) or not (of_a_site or has_address)
    before = line[max(0, match.start() - LONGEST_NOTICE) : match.start()]
    speaks = any(before.count(a) > before.count(b) for a, b in ("“”", "「」", "『』"))
    return (
        written == found and " " not in found and (speaks or bool(pattern("named").search(before)))
    )


def _with_marks(line: str, start: int, end: int) -> tuple[int, int]:
    """Take the brackets around a span too, and one of two punctuation marks that would meet."""
    before, after = line[start - 1 : start], line[end : end + 1]
    if before and before + after in ("（）", "()", "【】", "[]", "〖〗", "《》"):
        return _with_marks(line, start - 1, end + 1)
    if before in tuple("，、；：") and after in tuple("。！？，；"):
        return start - 1, end
    stops = not before or before in SENTENCE_END
    return start, end + (stops and after in tuple("，。；！、"))


def licence(text: str) -> Iterator[Edit]:
    """Project Gutenberg's licence, before the text and behind it."""
    if "Project Gutenberg" in text or "PROJECT GUTENBERG" in text:
        yield from replace(pattern("licence"), "", text)


def footnotes(text: str) -> Iterator[Edit]:
    """Numbered notes: marks such as [12], and the paragraphs further on that begin with them."""
    marks: dict[str, list[Edit]] = {}
    edits: list[Edit] = []
    paragraph = 0  # where the last one ends
    for match in pattern("footnote").finditer(text):
        start, end = match.span()
        before = text[max(0, start - 12) : start].rstrip(BLANK)
        if start < paragraph:
            edits += marks.pop(match.group(), [])
        elif before and before[-1] != "\n":
            marks.setdefault(match.group(), []).append((start, end, ""))
        elif match.group() in marks:
            edits += marks.pop(match.group())
            head = pattern("notes_head").search(before)
            paragraph = text.find("\n", end) + 1 or len(text)
            edits.append((start - len(head.group()) if head else start, paragraph, ""))
    return iter(sorted(edits))


def repeats(text: str) -> Iterator[Edit]:
    """Lines that come again and again where chapters end or begin: credits, the book's title."""
    found: dict[tuple[int, int], str] = {}
    for edge in (*chain(*_headings(text)), len(text)):
        first = max(0, edge - 2 * LONGEST_REPEAT)
        lines = re.finditer("(?<=\n)[^\n]+(?=\n|\\Z)", text[first : edge + 2 * LONGEST_REPEAT])
        around = [(first + line.start(), first + line.end()) for line in lines]
        place = bisect(around, (edge, 0))
        for start, end in around[max(0, place - 2) : place + 2]:
            line = text[start:end]
            found[start, end] = "" if HEADING.match(line) else re.sub(r"[\s\d]+", "", line)
    often = Counter(found.values())
    enough = max(FEWEST_REPEATS, len(_headings(text)) / 8)
    for (start, end), key in sorted(found.items()):
        if often[key] >= enough and _may_recur(key):
            yield start, min(end + 1, len(text)), ""


def _may_recur(key: str) -> bool:
    """Whether a line is no storyteller's formula and no sentence."""
    if pattern("told").search(key) or not 2 < len(key) <= LONGEST_REPEAT:
        return False
    return not key.endswith(SENTENCE_END) or _share(key)[1] > 0


def boilerplate(text: str) -> Iterator[Edit]:
    """Rules of dashes, ends of chapters, labels; brackets at a line's end that say such things."""
    edits = [(*match.span(), "") for match in pattern("boilerplate").finditer(text)]
    for match in pattern("last_bracket").finditer(text):
        before = text[max(0, match.start() - LONGEST_REPEAT) : match.start()]
        heading = HEADING.match(before.rpartition("\n")[2])
        if heading or before.rstrip(BLANK).endswith(SENTENCE_END):
            edits.append((*match.span(), ""))
    return iter(sorted(edits))
