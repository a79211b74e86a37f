"""What is no story: notices of sites, authors' notes, page marks, licences, footnotes.

Forms are data, each with a line that it takes and a line of story that it leaves. A notice is known
by the share of its characters that are words of sites and authors, not by one such word: a line
shaped like a sentence needs an address, a site's name or a call to the reader beside them.
"""

import functools
import re
import tomllib
import unicodedata
from bisect import bisect
from collections import Counter
from collections.abc import Iterator
from importlib import resources
from itertools import chain, pairwise

import numpy as np

from wuxia_core.corpus.chapters import HEADING
from wuxia_core.text import HAN, Edit, codes, lines_with, replace

BLANK = " \t　"
SENTENCE_END = tuple("。！？…”』」：；—.!?\"'．﹒")


DATA = tomllib.loads(resources.files(__package__).joinpath("noise.toml").read_text("utf-8"))


@functools.cache
def part(name: str) -> str:
    """Join the alternatives of a pattern, with the patterns that it names."""
    joined = "|".join(_alternatives(name))
    return re.sub("%([a-z_]+)%", lambda match: f"(?:{part(match[1])})", joined)


def _alternatives(name: str) -> list[str]:
    if name == "lines":
        return [form["pattern"] for form in DATA["lines"]]
    found: str | list[str] = DATA["patterns"][name]
    return found.split() if isinstance(found, str) else found


@functools.cache
def pattern(name: str) -> re.Pattern[str]:
    """Compile a pattern of noise.toml."""
    return re.compile(part(name), re.MULTILINE)


@functools.cache
def _anywhere(*names: str) -> re.Pattern[str]:
    """Find words fast: those that begin with a character, without what may not stand before."""
    words = [re.sub(r"\(\?<?!.*?\)", "", word) for name in names for word in _alternatives(name)]
    return re.compile("|".join(word for word in words if word[0] not in "[%"))


PLAIN: dict[int, int | str] = {
    n: unicodedata.normalize("NFKC", chr(n))
    for n in (*range(0x2460, 0x2469), *range(0x24B6, 0x24EA))
}
PLAIN |= str.maketrans(DATA["letters"]["disguised"], DATA["letters"]["plain"])
PAIRS = dict(zip("（(【[〖《『〈<＜〔“「┏", "）)】]〗》』〉>＞〕”」┛", strict=True))
LETTER, SENTENCE = re.compile(f"[{HAN}A-Za-z0-9]"), re.compile("[，。？…]")
TAKEN = re.compile(f"\0(?:[^{HAN}A-Za-z0-9\0]*\0+)*")  # what has been found, with marks between
SENTENCES = re.compile("[^。！？!?…]+[。！？!?…”』」）)]*")
SURE, LIKELY, NEARLY_ALL = 0.75, 0.55, 0.85  # shares of letters that are words of notices
WITH_ADDRESS, AFTERTHOUGHT, LEAST = 0.45, 0.35, 0.2  # beside an address, behind PS, at an edge
LEAST_STORY, LONGEST_NOTICE, LONGEST_AD = 8, 300, 600  # characters
BEFORE_EDGE, BEHIND_EDGE = 300, 100  # characters from a heading where authors speak
FEW, FEW_WORDS = 1, 4  # letters that go with the rest of a clause
ENOUGH = 3  # proofs that a line at a chapter's edge is a note
FEWEST_REPEATS, LONGEST_REPEAT = 3, 40


def _share(line: str) -> tuple[float, int]:
    """Give the share of letters that are words of notices, and how many such words are proof."""
    line = pattern("title").sub("", line)
    words = list(pattern("word").finditer(line))
    letters = len(LETTER.findall(line))
    covered = sum(match.end() - match.start() for match in words)
    return covered / max(letters, 1), len({match["proof"] for match in words} - {None})


def _is_notice(line: str) -> bool:
    """Whether a line without an address is a notice: nobody's words, and a call to the reader."""
    if len(line) > LONGEST_NOTICE or _is_story(line):
        return False
    share, proofs = _share(line)
    if pattern("postscript").match(line):
        return share >= AFTERTHOUGHT and proofs > 0
    shaped = SENTENCE.search(line)
    listed = proofs > 2 and not shaped
    full = proofs > 2 and shaped and share >= NEARLY_ALL
    calls = listed or full or pattern("call").search(line)
    certain = pattern("certain").search(line)
    enough = WITH_ADDRESS if certain else LIKELY if listed else SURE
    return bool(proofs and calls) and share >= enough


def ads(text: str) -> Iterator[Edit]:
    """Advertisements and notices of sites: whole lines."""
    for start, end in lines_with(_anywhere("mark", "site"), text):
        line = text[start:end].translate(PLAIN).strip() if end - start <= LONGEST_AD else ""
        if line and not HEADING.match(line) and _is_ad(line):
            yield start, min(end + 1, len(text)), ""


def _is_ad(line: str) -> bool:
    """Whether every sentence of a line is an advertisement."""
    hidden = pattern("watermark").sub(_hide, line) if pattern("sign").search(line) else line
    return all(
        _is_rest_of_ad(sentence.replace("\0", "")) if "\0" in sentence else _is_notice(sentence)
        for sentence in SENTENCES.findall(hidden)
        if LETTER.search(sentence) or "\0" in sentence
    )


def _hide(match: re.Match[str]) -> str:
    """Put no words in the place of a watermark; a bracket without an address may be story."""
    story = match["bracket"] and not pattern("address").search(match["bracket"])
    return match.group() if story else "\0" * len(match.group())


def _is_rest_of_ad(rest: str) -> bool:
    """Whether what stands beside an address in a sentence is more of the advertisement."""
    if len(rest) > LONGEST_NOTICE or _is_story(rest):
        return False
    if any(len(LETTER.findall(x)) >= FEW_WORDS and not _share(x)[0] for x in SENTENCE.split(rest)):
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
    notes = {
        (start, end)
        for start, end in lines_with(_anywhere("author", "note"), text)
        if not HEADING.match(line := text[start:end].strip()) and _is_notice(line)
    }
    for start, end in pairwise(sorted({0, len(text), *chain(*_headings(text))})):
        notes |= set(_notes_of_chapter(text, start, end))
    for start, end in sorted(notes):
        yield start, min(end + 1, len(text)), ""


def _notes_of_chapter(text: str, start: int, end: int) -> Iterator[tuple[int, int]]:
    """Find the notes at the edges of a chapter: the lines that say so, and those behind them."""
    opened = near = False
    last = max(start, end - BEFORE_EDGE)
    behind = text.rfind("\n", start, min(start + BEHIND_EDGE, last))
    for first, stop in ((start, max(start, behind)), (last, end)):
        for match in pattern("line").finditer(text, first, stop):
            line = match.group().strip()
            opens = pattern("note_opens").match(line)
            is_note = not opens and (opened or _is_note(line, near))
            if HEADING.match(line) or match.start() == first > start:
                continue  # a line that is cut
            if (is_note and not _is_story(line)) or (opens and not opens["end"]):
                yield match.span()
            elif not opens:
                if not pattern("boilerplate").match(text, match.start()):
                    opened = near = False
                continue
            opened, near = bool(opened or opens), True


def _is_story(line: str) -> bool:
    """Whether somebody speaks or is spoken of; in brackets a game may speak."""
    game = line.startswith("【") and not pattern("in_brackets").search(line)
    return game or bool(pattern("speech").search(line) or pattern("told").search(line))


def _is_note(line: str, near: bool) -> bool:
    """Whether a line at a chapter's edge is a note, by its words, voice, brackets, neighbours."""
    bracketed = line[0] in "（(【[" and line[-1] in "）)】]"
    if len(line) > LONGEST_NOTICE or not (bracketed or near or pattern("jargon").search(line)):
        return False
    share, proofs = _share(line)
    voices = bool(pattern("call").search(line)) + bool(pattern("voice").search(line))
    beside = voices + near + 2 * bracketed
    enough = ENOUGH - (share >= LIKELY and voices + bracketed > 0)
    likely = share >= LEAST and beside and (voices or near or pattern("jargon").search(line))
    return bool(proofs and likely) and min(proofs, 3) + beside >= enough


def _site_names(text: str) -> tuple[str, ...]:
    """Names that stand again and again where a site is named: 尽在某某小说, 某某书屋 www.…."""
    framed: Counter[str] = Counter()
    for match in pattern("sites").finditer(text):
        before = text[max(0, match.start() - 12) : match.start()].rpartition("\n")[2]
        after = text[match.end() : match.end() + 24].partition("\n")[0].translate(PLAIN)
        if name := pattern("before_name").search(before):
            site = name["name"] + match.group().rstrip("网吧站") * (match.group() != "中文网")
            framed[site] += bool(name["frame"]) + bool(pattern("named_site").match(after))
    return tuple(name for name, count in framed.items() if count > 1)


def watermarks(text: str) -> Iterator[Edit]:
    """Addresses, names of sites and calls to readers inside a sentence, which is left whole."""
    names = _site_names(text)
    signs = map(re.escape, pattern("signs").findall(_characters(text)))
    marks = re.compile("|".join((_anywhere("mark").pattern, part("signed"), *signs, *names)))
    for line_start, line_end in lines_with(marks, text):
        written = text[line_start:line_end]
        spans = [match.span() for match in pattern("decorated").finditer(written)]
        spans += [x.span() for x in pattern("wrapped").finditer(written) if _is_rest(x["inside"])]
        for match in TAKEN.finditer(_taken(written, [*spans, *_watermarks(written, names)])):
            start, end = _with_marks(written, *match.span())
            if not LETTER.search(written[:start] + written[end:]):
                start, end = 0, len(written) + 1
            yield line_start + start, min(line_start + end, len(text)), ""


def _taken(line: str, spans: list[tuple[int, int]]) -> str:
    """Put no words in the place of what has been found."""
    for start, end in spans:
        line = line[:start] + "\0" * (end - start) + line[end:]
    return line


def _watermarks(written: str, names: tuple[str, ...]) -> Iterator[tuple[int, int]]:
    """Find the watermarks of a line, read in plain letters and without the signs in its words."""
    signs = [n for match in pattern("decoration").finditer(written) for n in range(*match.span())]
    places = [n for n in range(len(written)) if n not in signs]
    line = "".join(written[n] for n in places).translate(PLAIN)
    found = [
        match.span()
        for match in pattern("watermark").finditer(line)
        if not _is_told(match, written[places[match.start()] : places[match.end() - 1] + 1])
    ]
    found += [
        match.span() for name in names for match in re.finditer(name + "(?:网(?!友)站?)?", line)
    ]
    for start, end in chain(found, _clauses(line, found)):
        yield places[start], places[end - 1] + 1


def _clauses(line: str, found: list[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """Find the clauses of an advertisement: around what was found, and beside such a clause."""
    clauses = list(pattern("clause").finditer(_taken(line, found)))
    spans = [_grown(clause) for clause in clauses]
    for order in (range(1, len(clauses)), range(len(clauses) - 2, -1, -1)):
        for n in order:
            beside = n - 1 if order.step > 0 else n + 1
            if not spans[n] and spans[beside] == clauses[beside].span() and _is_rest(clauses[n][0]):
                spans[n] = clauses[n].span()
    return (span for span in spans if span)


def _grown(clause: re.Match[str]) -> tuple[int, int] | None:
    """Take what leads to an advertisement in a clause and what hangs on it."""
    if "\0" not in clause.group():
        return None
    start, end = clause.span()
    before, after = clause.group().partition("\0")[0], clause.group().rpartition("\0")[2]
    lead = pattern("lead").search(before)
    if LETTER.search(before) and (not lead or len(LETTER.findall(before[: lead.start()])) > FEW):
        start += lead.start() if lead else len(before)
    tail = pattern("tail").match(after)
    if tail and LETTER.search(after, tail.end()):
        end -= len(after) - tail.end()
    return start, end


def _is_rest(clause: str) -> bool:
    """Whether a clause beside one that is all advertisement goes with it."""
    sure = _share(clause)[0] >= SURE and pattern("lead").search(clause)
    return bool(sure) and not _is_story(clause)


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
    opened = {PAIRS[c] for c in line[start:end] if c in PAIRS} - {*line[start:end]}
    sign = before == after != line[start - 2 : start - 1] and pattern("wrap").match(before)
    if after and (after in opened or PAIRS.get(before) == after or sign):
        return _with_marks(line, start - (after not in opened), end + 1)
    if PAIRS.get(before, "") in {*line[start:end]} - {*PAIRS, ""}:
        return _with_marks(line, start - 1, end)
    if before in tuple("，、；：") and after in tuple("。！？，；"):
        goes_on = LETTER.search(line, end) and line[end + 1 : end + 2] not in tuple("”」』")
        return (start, end + 1) if goes_on else (start - 1, end)
    stops = not before or before in SENTENCE_END
    return start, end + (stops and after in tuple("，。；！、"))


def inserts(text: str) -> Iterator[Edit]:
    """Lone signs and foreign letters that stand between Chinese characters: 排ω气筒."""
    return replace(pattern("insert"), "", text if pattern("lone").search(_characters(text)) else "")


def _characters(text: str) -> str:
    """Give every character of a text once."""
    return "".join(map(chr, np.flatnonzero(np.bincount(codes(text)))))


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
        for start, end in around[max(0, place - 3) : place + 2]:
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
