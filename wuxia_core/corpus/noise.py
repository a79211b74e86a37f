"""What is no story: notices of sites, authors' notes, page marks, licences, footnotes.

Forms are data, each with a line that it takes and a line of story that it leaves. A notice is known
by its score: the share of its letters that are words of sites and authors, and proofs such as a
call to the reader, an address beside it, a chapter's edge; never by one word.
"""

import functools
import re
import tomllib
from collections import Counter
from collections.abc import Iterator
from itertools import accumulate, chain, pairwise
from pathlib import Path

import numpy as np

from wuxia_core.corpus.chapters import HEADING
from wuxia_core.text import HAN, Edit, codes, join_pattern, lines_with, replace

BLANK = " \t　"
SITE = "㐀"  # stands for each character of a site's name
SENTENCE_END = tuple("。！？…”』」：；—.!?\"'．﹒")

DATA = tomllib.loads(Path(__file__).with_suffix(".toml").read_text("utf-8"))
PATTERNS = {name: x.split() if isinstance(x, str) else x for name, x in DATA["patterns"].items()}
PATTERNS["lines"] = [form["pattern"] for form in DATA["lines"]]


@functools.cache
def pattern(name: str) -> re.Pattern[str]:
    """Compile a pattern of noise.toml."""
    return re.compile(join_pattern(PATTERNS, name), re.MULTILINE)


@functools.cache
def _anywhere(*names: str) -> re.Pattern[str]:
    """Find words fast: those that begin with a character, without what may not stand before.

    Most begin with two Chinese characters, and few places have two such.
    """
    words = [re.sub(r"\(\?<?!.*?\)", "", word) for name in names for word in PATTERNS[name]]
    words = [word for word in dict.fromkeys(words) if word[0] not in "[%"]
    pairs = [word for word in words if re.match(f"[{HAN}]{{2}}", word)]
    first, second = ("".join({word[n] for word in pairs}) for n in (0, 1))
    others = [word for word in words if word not in pairs]
    pair = rf"[{first}](?=[{second}])(?<=(?=(?:{'|'.join(pairs)}))[{first}])"
    return re.compile("|".join([*others, pair]))


PLAIN = str.maketrans(DATA["letters"]["disguised"], DATA["letters"]["plain"])
PAIRS = dict(zip("（(【[〖《『〈<＜〔“「┏", "）)】]〗》』〉>＞〕”」┛", strict=True))
LETTER, SENTENCE = re.compile(f"[{HAN}A-Za-z0-9]"), re.compile("[，。？…]")
LINE = re.compile("[^\n]+$", re.MULTILINE)
TAKEN = re.compile(f"\0(?:[^{HAN}A-Za-z0-9\0]*\0+)*")  # what has been found, with marks between
SENTENCES = re.compile("[^。！？!?…]+[。！？!?…”』」）)]*")

# A notice has a score of ENOUGH: the share, LEAST or more, of its letters that are words of
# notices, and PROOFs: different words that only sites and authors use, calls, what is around it.
ENOUGH, LEAST, UNCALLED, DENSE, PROOF = 1, 0.3, 0.8, 0.1, 0.1
ADDRESS, EDGE, BRACKET = 5, 4, 4  # proofs: an address beside it, a chapter's edge, brackets
CALLS = {"call": 2, "plea": 2, "voice": 1, "certain": 2}  # words that speak to the reader
FEW_LETTERS, LONGEST_NOTICE, LONGEST_AD = 8, 300, 600  # beside an address; characters
BEFORE_EDGE, BEHIND_EDGE = 300, 100  # characters from a heading where authors speak
NEAR = 40  # characters: what leads to a watermark or hangs on it
WORD = 4  # characters on each side of a sign
LONGEST_PREFIX = 20  # characters that stand before a heading that is doubled
FEWEST_REPEATS, LONGEST_REPEAT, AROUND_EDGE = 3, 40, 150
RARE = 6  # times as often as in advertisements


def _is_notice(line: str, around: int = 0, edge: int = 0) -> bool:
    """Whether a line is a notice, with the proofs that are around it or at a chapter's edge."""
    line = pattern("title").sub("", line)
    words = list(pattern("word").finditer(line))
    different = {match["proof"] for match in words} - {None}
    if not different or len(line) > LONGEST_NOTICE or _is_story(line):
        return False
    calls = sum(n for name, n in CALLS.items() if pattern(name).search(line))
    listed = 2 * (len(different) > 1 and not SENTENCE.search(line))
    if not (calls or around or listed or len(different) > (1 if edge else 2)):
        return False
    proofs = around + edge + calls + listed + min(len(different), 2)
    letters = len(LETTER.findall(line))
    share = sum(map(len, (match.group() for match in words))) / letters
    dense = sum(map(len, (match["proof"] or "" for match in words))) >= DENSE * letters
    least = LEAST if calls or around > 1 or listed else UNCALLED
    return dense and share >= least and share + PROOF * proofs >= ENOUGH


def _is_story(line: str) -> bool:
    """Whether somebody speaks or is spoken of; in brackets a game may speak."""
    game = line.startswith("【") and not pattern("in_brackets").search(line)
    return game or bool(pattern("speech").search(line) or pattern("told").search(line))


def ads(text: str) -> Iterator[Edit]:
    """Advertisements and notices of sites: whole lines."""
    sites = _sites(text)
    for start, end in _marked(text):
        if _is_ad(sites.sub(_site, text[start:end])):
            yield start, min(end + 1, len(text)), ""


@functools.lru_cache(maxsize=1)
def _marked(text: str) -> list[tuple[int, int]]:
    """Find the lines in which a word of sites stands."""
    return list(lines_with(_anywhere("mark", "site"), text))


@functools.lru_cache(maxsize=1)
def _sites(text: str) -> re.Pattern[str]:
    """Find the names of sites: what recurs in advertisements, is no word and rare elsewhere."""
    names = Counter[str]()
    for start, end in _marked(text):
        if _is_ad(line := text[start:end]):
            names.update(set(pattern("name").findall(pattern("word").sub("\0", line))))
    often = [x for x, n in names.items() if n >= FEWEST_REPEATS and text.count(x) <= RARE * n]
    return re.compile("|".join(often) or r"\Z.")


def _site(match: re.Match[str]) -> str:
    return SITE * len(match.group())


def _is_ad(line: str) -> bool:
    """Whether every sentence of a line is an advertisement."""
    if len(line) > LONGEST_AD or HEADING.match(line):
        return False
    hidden = _hide(line, _watermarks(line) if _anywhere("mark").search(line) else [])
    sentences = [x for x in SENTENCES.findall(hidden) if LETTER.search(x)]
    return ("\0" in hidden or bool(sentences)) and all(
        _is_notice(sentence.replace("\0", ""), ADDRESS * ("\0" in sentence)) or _is_short(sentence)
        for sentence in sentences
    )


def _is_short(sentence: str) -> bool:
    """Whether little but an address is in a sentence."""
    few = len(LETTER.findall(sentence)) <= FEW_LETTERS and not SENTENCE.search(sentence)
    return "\0" in sentence and few and not _is_story(sentence)


def _hide(line: str, spans: list[tuple[int, int]]) -> str:
    """Put no words in the place of what has been found."""
    for start, end in spans:
        line = line[:start] + "\0" * (end - start) + line[end:]
    return line


def watermarks(text: str) -> Iterator[Edit]:
    """Addresses, names of sites and calls to readers inside a sentence, which is left whole."""
    signs = map(re.escape, pattern("signs").findall(_characters(text)))
    sites = _sites(text)
    signed = re.compile("|".join((pattern("signed").pattern, sites.pattern, *signs)))
    for line_start, line_end in sorted({*_marked(text), *lines_with(signed, text)}):
        line = sites.sub(_site, text[line_start:line_end])
        if _is_ad(line):
            continue
        for match in TAKEN.finditer(_hide(line, _watermarks(line))):
            start, end = _with_marks(line, *match.span())
            if not LETTER.search(line[:start] + line[end:]):
                start, end = 0, len(line) + 1
            yield line_start + start, min(line_start + end, len(text)), ""


@functools.lru_cache(maxsize=1024)
def _watermarks(line: str) -> list[tuple[int, int]]:
    """Find the watermarks of a line, with what leads to them and what hangs on them."""
    plain = line.translate(PLAIN)
    found = [match.span() for match in pattern("decorated").finditer(line)]
    found += [x.span() for x in pattern("bracketed").finditer(line) if _names_site(x.group())]
    found += [x.span() for x in pattern("watermark").finditer(plain) if not _is_told(x, line)]
    found += [x.span() for x in pattern("run").finditer(plain) if _calls(x, line)]
    spans = []
    hidden = _hide(plain, found)
    for match in TAKEN.finditer(hidden):
        lead = pattern("lead").search(hidden[max(0, match.start() - NEAR) : match.start()])
        bracket = line[match.end() - 1] in PAIRS.values()
        tail = None if bracket else pattern("tail").match(plain, match.end(), match.end() + NEAR)
        start = match.start() - (len(lead.group()) if lead else 0)
        spans.append((start, tail.end() if tail else match.end()))
    return spans


def _names_site(bracket: str) -> bool:
    """Whether what stands between brackets names a site or calls to the reader."""
    inside = bracket[1:-1].translate(PLAIN)
    rest = pattern("address").sub("\0", inside)
    if "\0" in rest:
        return _is_short(rest) or _is_notice(rest, ADDRESS)
    proofs = -1 if bracket[0] in "（(<" else BRACKET
    return bool(pattern("in_brackets").search(rest)) and _is_notice(rest, proofs)


def _calls(match: re.Match[str], line: str) -> bool:
    """Whether words of sites in a row, where a clause begins, call to the reader."""
    run = match.group()
    proofs = {x["proof"] for x in pattern("word").finditer(run) if x["proof"]}
    calls = any(pattern(name).search(run) for name in ("asks", "certain", "boast"))
    named = SITE in run and any(not pattern("named_site").match(x) for x in proofs)
    return bool(named or (calls and len(proofs) > 1 and not _speaks(line[: match.start()])))


def _speaks(before: str) -> bool:
    """Whether somebody speaks behind this."""
    return any(before.count(a) > before.count(b) for a, b in ("“”", "「」", "『』"))


def _is_told(match: re.Match[str], line: str) -> bool:
    """Whether an address belongs to the story: somebody reads, types or says it."""
    start, end = match.span()
    before = line[max(0, start - LONGEST_NOTICE) : start]
    if match["name"]:
        return not pattern("led").search(before)
    as_it_is = line[start:end] == match.group() and " " not in match.group()
    told = _speaks(before) or bool(pattern("named").search(before))
    return told and as_it_is and not match["call"]


def _with_marks(line: str, start: int, end: int) -> tuple[int, int]:
    """Take the brackets around a span too, and one of two punctuation marks that would meet."""
    before, after = line[start - 1 : start], line[end : end + 1]
    drawn = before == after != line[start - 2 : start - 1] and before in tuple("…—～")
    if after and (PAIRS.get(before) == after or drawn):
        return _with_marks(line, start - 1, end + 1)
    if before in tuple("，、；：") and after in tuple("。！？，；"):
        goes_on = LETTER.search(line, end) and line[end + 1 : end + 2] not in tuple("”」』")
        return (start, end + 1) if goes_on else (start - 1, end)
    stops = not before or before in SENTENCE_END
    return start, end + (stops and after in tuple("，。；！、"))


@functools.lru_cache(maxsize=1)
def _headings(text: str) -> list[tuple[int, int]]:
    return [match.span() for match in HEADING.finditer(text)]


def doubled(text: str) -> Iterator[Edit]:
    """Lines that say a heading again, below it: 断刀行 第三章 旧债 below 第三章 旧债."""
    for heading in HEADING.finditer(text):
        below = pattern("line").search(text, heading.end() + 1)
        if not below or heading["count"] is None or below[0].endswith(SENTENCE_END):
            continue
        title = text[heading.end("count") : heading.end()]
        first, second, title = (re.sub(r"[\W_]", "", x) for x in (heading[0], below[0], title))
        if len(second) > len(first) + LONGEST_PREFIX:
            continue
        again = second == title or HEADING.match(below[0])
        if second.endswith(first) or (len(title) > 1 and again and second.endswith(title)):
            yield heading.end(), below.end(), ""
        elif again and not title and second.startswith(first):
            yield heading.start(), below.start(), ""


def authors_notes(text: str) -> Iterator[Edit]:
    """Words of authors to readers, where chapters begin and end: votes, thanks, leave."""
    edges = sorted({0, len(text), *chain(*_headings(text))})
    for start, end in pairwise(edges):
        last = max(start, end - BEFORE_EDGE)
        behind = text.rfind("\n", start, min(start + BEHIND_EDGE, last))
        yield from _notes(text, start, max(start, behind), at_the_end=False)
        yield from _notes(text, last, end, at_the_end=True)


def _notes(text: str, start: int, end: int, *, at_the_end: bool) -> Iterator[Edit]:
    """Find the notes between two places: by their words, and at the end what 作者的话 opens."""
    opened = near = False
    for match in pattern("line").finditer(text, start, end):
        line = match.group().strip()
        cut = match.start() == start and text[start - 1 : start] not in ("", "\n")
        if cut or HEADING.match(line):
            continue
        if line[-1] in "）)】]":
            line = pattern("last_bracket").sub("", line) or line
        opens = bool(pattern("note_opens").match(line))
        around = 2 * (line[0] in "（(【[" and line[-1] in "）)】]") + near
        edge = EDGE * bool(around or pattern("jargon").search(line))
        if opens or (opened and not _is_story(line)) or (edge and _is_notice(line, around, edge)):
            yield match.start(), min(match.end() + 1, len(text)), ""
            opened, near = at_the_end and (opens or opened), True
        elif near and not pattern("boilerplate").match(text, match.start()):
            opened = near = False


def inserts(text: str) -> Iterator[Edit]:
    """Signs and letters that stand inside words: 排ω气筒, 长|剑; not in A计划, 救~命."""
    signs = "".join(map(re.escape, pattern("odd").findall(_characters(text))))
    lone = rf"(?<=[{HAN}])([{signs}])\1?(?![{HAN}]{{1,2}}\1)(?<!第.)(?=[{HAN}])(?![波粒射星型螺链])"
    found: dict[str, list[tuple[int, int]]] = {}
    for match in re.finditer(lone, text) if signs else ():
        found.setdefault(match[1], []).append(match.span())
    spans = chain(*(x for sign, x in found.items() if _cuts_words(sign, x[:200], text)))
    return ((start, end, "") for start, end in sorted(spans))


def _cuts_words(sign: str, spans: list[tuple[int, int]], text: str) -> bool:
    """Whether a sign cuts words in half of the places, different words if it may be a letter."""
    import rjieba

    cut = []
    for start, end in spans:
        left, right = text[max(0, start - WORD) : start], text[end : end + WORD]
        words = rjieba.cut(left + right, hmm=False)
        ends = zip(words, accumulate(map(len, words)), strict=True)
        cut += [word for word, at in ends if at - len(word) < len(left) < at]
    if pattern("drawn").match(sign):
        return len(set(cut)) > 1 and len(cut) * 2 >= len(spans)
    return bool(pattern("ornament").match(sign)) or len(cut) * 2 >= len(spans)


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
    found: dict[int, str] = {}
    for edge in (*chain(*_headings(text)), len(text)):
        first = text.find("\n", max(0, edge - AROUND_EDGE), edge) + 1
        for match in LINE.finditer(text, first, edge + AROUND_EDGE):
            if not HEADING.match(match.group()):
                found[match.start()] = match.group()
    often = Counter(re.sub(r"\s+", "", line) for line in found.values())
    enough = max(FEWEST_REPEATS, len(_headings(text)) / 8)
    keys = [key for key, count in often.items() if count >= enough and _may_recur(key)]
    lines = "|".join(r"[^\S\n]*".join(map(re.escape, key)) for key in keys)
    again = rf"(?<=\n)[^\S\n]*(?:{lines})[^\S\n]*(?:\n|\Z)"
    return replace(again, "", text) if keys else iter(())


def _may_recur(key: str) -> bool:
    """Whether a line is no storyteller's formula and no sentence."""
    if pattern("told").search(key) or not 2 < len(key) <= LONGEST_REPEAT:
        return False
    return not key.endswith(SENTENCE_END) or _is_notice(key, 0, EDGE)


def boilerplate(text: str) -> Iterator[Edit]:
    """Rules of dashes, ends of chapters, labels; brackets at a line's end that say such things."""
    edits = [(*match.span(), "") for match in pattern("boilerplate").finditer(text)]
    for match in pattern("last_bracket").finditer(text):
        before = text[max(0, match.start() - LONGEST_REPEAT) : match.start()]
        heading = HEADING.match(before.rpartition("\n")[2])
        if heading or before.rstrip(BLANK).endswith(SENTENCE_END):
            edits.append((*match.span(), ""))
    return iter(sorted(edits))
