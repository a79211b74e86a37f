"""What is no story: notices of sites, authors' notes, page marks, licences, footnotes.

Patterns stand in noise.toml; for whole lines each has an example of noise that it takes and of
story that it leaves. A notice is told by its score, never by one word: the score is the share of
its letters that are words of sites and authors, and points for proofs such as a call to the reader,
an address or a chapter's edge beside it. The rules of cleaning here are the functions that give
edits.
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
SITE = "㐀"  # a rare character that stands in for each character of a site's name
HIDDEN = "\0"  # stands in for each character of a watermark that was found
SENTENCE_END = tuple("。！？…”』」：；—.!?\"'．﹒")

DATA = tomllib.loads(Path(__file__).with_suffix(".toml").read_text("utf-8"))
PATTERNS = {name: x.split() if isinstance(x, str) else x for name, x in DATA["patterns"].items()}
PATTERNS["lines"] = [form["pattern"] for form in DATA["lines"]]


@functools.cache
def pattern(name: str) -> re.Pattern[str]:
    """Compile a pattern of noise.toml."""
    return re.compile(join_pattern(PATTERNS, name), re.MULTILINE)


@functools.cache
def _quick_pattern(*names: str) -> re.Pattern[str]:
    """Compile a pattern that quickly finds the words of some lists of noise.toml, and a few more.

    The conditions on what stands around a word are left out, and so are words that begin with a
    class or with another pattern. Most words begin with two Chinese characters; a place is compared
    with them only if its two characters can begin one, which is rare.
    """
    words = [re.sub(r"\(\?<?!.*?\)", "", word) for name in names for word in PATTERNS[name]]
    words = [word for word in dict.fromkeys(words) if word[0] not in "[%"]
    han_words = [word for word in words if re.match(f"[{HAN}]{{2}}", word)]
    first, second = ("".join({word[n] for word in han_words}) for n in (0, 1))
    han_word = rf"[{first}](?=[{second}])(?<=(?=(?:{'|'.join(han_words)}))[{first}])"
    return re.compile("|".join([*(word for word in words if word not in han_words), han_word]))


PLAIN = str.maketrans(DATA["letters"]["disguised"], DATA["letters"]["plain"])  # Ｃ to C
BRACKETS = dict(zip("（(【[〖《『〈<＜〔“「┏", "）)】]〗》』〉>＞〕”」┛", strict=True))
LETTER, SENTENCE = re.compile(f"[{HAN}A-Za-z0-9]"), re.compile("[，。？…]")
LINE = re.compile("[^\n]+$", re.MULTILINE)
HIDDEN_RUN = re.compile(f"\0(?:[^{HAN}A-Za-z0-9\0]*\0+)*")  # hidden characters, signs between them
SENTENCES = re.compile("[^。！？!?…]+[。！？!?…”』」）)]*")

# A line with a score of ENOUGH is a notice. Its score is the share of its letters that are words of
# notices, and POINT for each point: points are given for different words that only sites and
# authors use, for calls to the reader, and for what is around the line. The share must be LEAST, or
# LEAST_UNCALLED where nothing calls; DENSE is the least share of words that only they use.
ENOUGH, LEAST, LEAST_UNCALLED, DENSE, POINT = 1, 0.3, 0.8, 0.1, 0.1
ADDRESS_POINTS, EDGE_POINTS, BRACKET_POINTS = 5, 4, 4  # an address, a chapter's edge, brackets
CALL_POINTS = {"call": 2, "plea": 2, "voice": 1, "certain": 2}  # by pattern: calls to the reader
FEW_LETTERS, LONGEST_NOTICE, LONGEST_AD = 8, 300, 600  # letters beside an address; characters
BEFORE_EDGE, BEHIND_EDGE = 300, 100  # characters from a heading where authors speak
AFFIX = 40  # characters in which the words that belong to a watermark stand, on each side
LONGEST_WORD = 4  # characters: so many on each side of a sign are cut into words
LONGEST_PREFIX = 20  # characters that stand before a heading that is doubled
FEWEST_REPEATS, LONGEST_REPEAT, AROUND_EDGE = 3, 40, 150  # times; characters; characters
MOST_USES = 6  # of a site's name, for each advertisement that has it: a word is used more often


def _is_notice(line: str, points_around: int = 0, points_at_edge: int = 0) -> bool:
    """Whether a line is a notice of a site or an author, by its score.

    `points_around` are points for what stands around the line (an address, brackets),
    `points_at_edge` those for a place at a chapter's edge.
    """
    line = pattern("title").sub("", line)
    words = list(pattern("word").finditer(line))
    proofs = {match["proof"] for match in words} - {None}  # words that only notices use
    if not proofs or len(line) > LONGEST_NOTICE or _is_story(line):
        return False
    call_points = sum(n for name, n in CALL_POINTS.items() if pattern(name).search(line))
    list_points = 2 * (len(proofs) > 1 and not SENTENCE.search(line))  # words without a sentence
    # With no such points a line needs three different proofs, or two at a chapter's edge.
    if not (call_points or points_around or list_points or len(proofs) > 2 - bool(points_at_edge)):
        return False
    points = points_around + points_at_edge + call_points + list_points + min(len(proofs), 2)
    letters = len(LETTER.findall(line))
    share = sum(map(len, (match.group() for match in words))) / letters
    is_dense = sum(map(len, (match["proof"] or "" for match in words))) >= DENSE * letters
    least_share = LEAST if call_points or points_around > 1 or list_points else LEAST_UNCALLED
    return is_dense and share >= least_share and share + POINT * points >= ENOUGH


def _is_story(line: str) -> bool:
    """Whether a line has speech, words of a story, or the voice of a game's system.

    That voice is put between 【】; but a line so put that has words of sites is none.
    """
    game_speaks = line.startswith("【") and not pattern("in_brackets").search(line)
    return game_speaks or bool(pattern("speech").search(line) or pattern("told").search(line))


def ads(text: str) -> Iterator[Edit]:
    """Delete the lines that are nothing but advertisements and notices of sites."""
    site_names = _site_names(text)
    for start, end in _marked_lines(text):
        if _is_ad(site_names.sub(_mask_name, text[start:end])):
            yield start, min(end + 1, len(text)), ""


@functools.lru_cache(maxsize=1)
def _marked_lines(text: str) -> list[tuple[int, int]]:
    """List `(start, end)` of the lines that have a word of sites, and may be advertisements."""
    return list(lines_with(_quick_pattern("mark", "site"), text))


@functools.lru_cache(maxsize=1)
def _site_names(text: str) -> re.Pattern[str]:
    """Give a pattern for the names of sites in a text, which matches nothing where there are none.

    A name recurs in advertisements, is none of their known words, and is rare elsewhere.
    """
    counts = Counter[str]()  # of the advertisements that have a name
    for start, end in _marked_lines(text):
        if _is_ad(line := text[start:end]):
            counts.update(set(pattern("name").findall(pattern("word").sub("\0", line))))
    names = [x for x, n in counts.items() if n >= FEWEST_REPEATS and text.count(x) <= MOST_USES * n]
    return re.compile("|".join(names) or r"\Z.")


def _mask_name(match: re.Match[str]) -> str:
    """Put the sign that stands for sites in the place of each character of a site's name."""
    return SITE * len(match.group())


def _is_ad(line: str) -> bool:
    """Whether every sentence of a line is an advertisement: a notice, or little but an address."""
    if len(line) > LONGEST_AD or HEADING.match(line):
        return False
    hidden = _hide(line, _watermarks(line) if _quick_pattern("mark").search(line) else [])
    sentences = [x for x in SENTENCES.findall(hidden) if LETTER.search(x)]
    return (HIDDEN in hidden or bool(sentences)) and all(
        _is_mere_address(x) or _is_notice(x.replace(HIDDEN, ""), ADDRESS_POINTS * (HIDDEN in x))
        for x in sentences
    )


def _is_mere_address(sentence: str) -> bool:
    """Whether a sentence has a hidden address, few letters beside it, and nothing of a story."""
    has_few = len(LETTER.findall(sentence)) <= FEW_LETTERS and not SENTENCE.search(sentence)
    return HIDDEN in sentence and has_few and not _is_story(sentence)


def _hide(line: str, spans: list[tuple[int, int]]) -> str:
    """Put `HIDDEN` in the place of every character of the spans `(start, end)`."""
    for start, end in spans:
        line = line[:start] + HIDDEN * (end - start) + line[end:]
    return line


def watermarks(text: str) -> Iterator[Edit]:
    """Delete addresses, names of sites and calls to readers that stand inside a sentence.

    A line that is nothing else is deleted with its newline.
    """
    signs = map(re.escape, pattern("signs").findall(_distinct_characters(text)))
    site_names = _site_names(text)
    decorated = re.compile("|".join((pattern("signed").pattern, site_names.pattern, *signs)))
    for line_start, line_end in sorted({*_marked_lines(text), *lines_with(decorated, text)}):
        line = site_names.sub(_mask_name, text[line_start:line_end])
        if _is_ad(line):
            continue
        for match in HIDDEN_RUN.finditer(_hide(line, _watermarks(line))):
            start, end = _with_marks(line, *match.span())
            if not LETTER.search(line[:start] + line[end:]):
                start, end = 0, len(line) + 1
            yield line_start + start, min(line_start + end, len(text)), ""


@functools.lru_cache(maxsize=1024)
def _watermarks(line: str) -> list[tuple[int, int]]:
    """List `(start, end)` of the watermarks of a line, with the words around that belong to them.

    Of 他拔剑，看书请到 www.abc.com 阅读，众人大惊。 that is all between the two commas.
    """
    plain = line.translate(PLAIN)
    cores = [match.span() for match in pattern("decorated").finditer(line)]
    cores += [x.span() for x in pattern("bracketed").finditer(line) if _names_site(x.group())]
    cores += [x.span() for x in pattern("watermark").finditer(plain) if not _is_told(x, line)]
    cores += [x.span() for x in pattern("run").finditer(plain) if _calls_reader(x, line)]
    spans = []
    hidden = _hide(plain, cores)
    for match in HIDDEN_RUN.finditer(hidden):
        start, end = match.span()
        lead = pattern("lead").search(hidden[max(0, start - AFFIX) : start])
        is_bracketed = line[end - 1] in BRACKETS.values()
        tail = None if is_bracketed else pattern("tail").match(plain, end, end + AFFIX)
        spans.append((start - (len(lead[0]) if lead else 0), tail.end() if tail else end))
    return spans


def _names_site(bracketed: str) -> bool:
    """Whether a text in brackets, such as 【某某小说网】, names a site or calls to the reader."""
    inside = bracketed[1:-1].translate(PLAIN)
    rest = pattern("address").sub(HIDDEN, inside)
    if HIDDEN in rest:
        return _is_mere_address(rest) or _is_notice(rest, ADDRESS_POINTS)
    points = -1 if bracketed[0] in "（(<" else BRACKET_POINTS  # prose has （ too, 【 hardly
    return bool(pattern("in_brackets").search(rest)) and _is_notice(rest, points)


def _calls_reader(match: re.Match[str], line: str) -> bool:
    """Whether a run of words of sites, matched where a clause of a line begins, calls readers.

    It does with a site's name, of `SITE` signs, and another word that only notices have; or,
    outside speech, with a call and two such words.
    """
    run = match.group()
    notice_words = {x["proof"] for x in pattern("word").finditer(run)} - {None}
    calls = any(pattern(name).search(run) for name in ("asks", "certain", "boast"))
    others = [word for word in notice_words if not pattern("named_site").match(word)]
    if SITE in run and others:
        return True
    return calls and len(notice_words) > 1 and not _in_speech(line[: match.start()])


def _in_speech(before: str) -> bool:
    """Whether a place is in speech: the text before it opens more quotations than it closes."""
    return any(before.count(a) > before.count(b) for a, b in ("“”", "「」", "『』"))


def _is_told(match: re.Match[str], line: str) -> bool:
    """Whether a matched watermark belongs to the story: somebody reads, types or says an address.

    A site's name does if its clause has other words before it. An address that is disguised, or
    stands in a call to the reader, never does. `match` was made in the line with its disguised
    letters made plain, `line` is as it was read.
    """
    start, end = match.span()
    before = line[max(0, start - LONGEST_NOTICE) : start]
    if match["name"]:
        return not pattern("only_notice_words").search(before)
    is_plain = line[start:end] == match.group() and " " not in match.group()
    is_told = _in_speech(before) or bool(pattern("typed_or_called").search(before))
    return is_told and is_plain and not match["call"]


def _with_marks(line: str, start: int, end: int) -> tuple[int, int]:
    """Widen a span by the brackets around it, and by one of two marks that would then meet.

    In 他拔剑，【某某网】。 the span 某某网 becomes ，【某某网】, and 他拔剑。 is left.
    """
    before, after = line[start - 1 : start], line[end : end + 1]
    is_dashed = before == after != line[start - 2 : start - 1] and before in tuple("…—～")
    if after and (BRACKETS.get(before) == after or is_dashed):
        return _with_marks(line, start - 1, end + 1)
    if before in tuple("，、；：") and after in tuple("。！？，；"):
        goes_on = LETTER.search(line, end) and line[end + 1 : end + 2] not in tuple("”」』")
        return (start, end + 1) if goes_on else (start - 1, end)
    begins_sentence = not before or before in SENTENCE_END
    return start, end + (begins_sentence and after in tuple("，。；！、"))


@functools.lru_cache(maxsize=1)
def _heading_spans(text: str) -> list[tuple[int, int]]:
    """List `(start, end)` of the lines that look like headings."""
    return [match.span() for match in HEADING.finditer(text)]


def doubled(text: str) -> Iterator[Edit]:
    """Delete lines below a heading that repeat it: 断刀行 第三章 旧债 below 第三章 旧债.

    Where the line below says more than the heading, the heading is deleted.
    """
    for heading in HEADING.finditer(text):
        below = pattern("line").search(text, heading.end() + 1)
        if not below or heading["count"] is None or below[0].endswith(SENTENCE_END):
            continue
        title = text[heading.end("count") : heading.end()]
        first, second, title = (re.sub(r"[\W_]", "", x) for x in (heading[0], below[0], title))
        if len(second) > len(first) + LONGEST_PREFIX:
            continue
        is_heading = second == title or HEADING.match(below[0])
        if second.endswith(first) or (len(title) > 1 and is_heading and second.endswith(title)):
            yield heading.end(), below.end(), ""
        elif is_heading and not title and second.startswith(first):
            yield heading.start(), below.start(), ""


def authors_notes(text: str) -> Iterator[Edit]:
    """Delete words of authors to readers where chapters begin and end: votes, thanks, leave."""
    # Between two edges is a heading, in which `_notes` finds nothing, or a chapter.
    for start, end in pairwise(sorted({0, len(text), *chain(*_heading_spans(text))})):
        last_start = max(start, end - BEFORE_EDGE)
        first_end = text.rfind("\n", start, min(start + BEHIND_EDGE, last_start))
        yield from _notes(text, start, max(start, first_end), at_the_end=False)
        yield from _notes(text, last_start, end, at_the_end=True)


def _notes(text: str, start: int, end: int, *, at_the_end: bool) -> Iterator[Edit]:
    """Delete the lines from `start` to `end` that are notes to the reader, at a chapter's edge.

    A line is a note if it opens one (作者的话); if a line above it opened one at the chapter's end
    and it is no story; or if its words score as a notice, with points for brackets around the line
    and for a note right above.
    """
    in_opened_note = note_above = False
    for match in pattern("line").finditer(text, start, end):
        line = match.group().strip()
        starts_mid_line = match.start() == start and text[start - 1 : start] not in ("", "\n")
        if starts_mid_line or HEADING.match(line):
            continue
        if line[-1] in "）)】]":
            line = pattern("last_bracket").sub("", line) or line
        opens = bool(pattern("note_opens").match(line))
        points_around = 2 * (line[0] in "（(【[" and line[-1] in "）)】]") + note_above
        points_at_edge = EDGE_POINTS * bool(points_around or pattern("jargon").search(line))
        is_note = opens or (in_opened_note and not _is_story(line))
        if is_note or (points_at_edge and _is_notice(line, points_around, points_at_edge)):
            yield match.start(), min(match.end() + 1, len(text)), ""
            in_opened_note, note_above = at_the_end and (opens or in_opened_note), True
        elif note_above and not pattern("boilerplate").match(text, match.start()):
            in_opened_note = note_above = False


def inserts(text: str) -> Iterator[Edit]:
    """Delete signs and letters that stand inside words: 排ω气筒, 长|剑; not in A计划, 救~命."""
    signs = "".join(map(re.escape, pattern("odd").findall(_distinct_characters(text))))
    lone = rf"(?<=[{HAN}])([{signs}])\1?(?![{HAN}]{{1,2}}\1)(?<!第.)(?=[{HAN}])(?![波粒射星型螺链])"
    spans: dict[str, list[tuple[int, int]]] = {}  # of each sign
    for match in re.finditer(lone, text) if signs else ():
        spans.setdefault(match[1], []).append(match.span())
    inserted = chain(*(x for sign, x in spans.items() if _cuts_words(sign, x[:200], text)))
    return ((start, end, "") for start, end in sorted(inserted))


def _cuts_words(sign: str, spans: list[tuple[int, int]], text: str) -> bool:
    """Whether a sign that stands at some `(start, end)` of a text stands inside words.

    An ornament always does. Another sign does if it cuts a word in half of the places; one that
    prose has too (a letter, a dash) must also cut different words.
    """
    import rjieba

    cut_words = []
    for start, end in spans:
        left, right = text[max(0, start - LONGEST_WORD) : start], text[end : end + LONGEST_WORD]
        words = rjieba.cut(left + right, hmm=False)
        ends = zip(words, accumulate(map(len, words)), strict=True)
        cut_words += [word for word, at in ends if at - len(word) < len(left) < at]
    if pattern("drawn").match(sign):
        return len(set(cut_words)) > 1 and len(cut_words) * 2 >= len(spans)
    return bool(pattern("ornament").match(sign)) or len(cut_words) * 2 >= len(spans)


def _distinct_characters(text: str) -> str:
    """Give every character of a text once, in the order of their codes."""
    return "".join(map(chr, np.flatnonzero(np.bincount(codes(text)))))


def licence(text: str) -> Iterator[Edit]:
    """Delete Project Gutenberg's licence, before the text and behind it."""
    if "Project Gutenberg" in text or "PROJECT GUTENBERG" in text:
        yield from replace(pattern("licence"), "", text)


def footnotes(text: str) -> Iterator[Edit]:
    """Delete numbered notes: marks such as [12], and later paragraphs that begin with them.

    A mark without such a paragraph stays.
    """
    marks: dict[str, list[Edit]] = {}  # for each mark that no note has followed yet
    edits: list[Edit] = []
    note_end = 0  # of the last paragraph that is a note
    for match in pattern("footnote").finditer(text):
        start, end = match.span()
        before = text[max(0, start - 12) : start].rstrip(BLANK)  # 12: enough for a notes' heading
        if start < note_end:
            edits += marks.pop(match.group(), [])
        elif before and before[-1] != "\n":
            marks.setdefault(match.group(), []).append((start, end, ""))
        elif match.group() in marks:
            edits += marks.pop(match.group())
            head = pattern("notes_head").search(before)
            note_end = text.find("\n", end) + 1 or len(text)
            edits.append((start - len(head.group()) if head else start, note_end, ""))
    return iter(sorted(edits))


def repeats(text: str) -> Iterator[Edit]:
    """Delete lines that recur where chapters end or begin: credits, the book's title.

    A line recurs if it stands there three times, and once in eight headings; its blanks are not
    compared.
    """
    lines: dict[int, str] = {}  # near a chapter's edge, by where they start
    for edge in (*chain(*_heading_spans(text)), len(text)):
        first = text.find("\n", max(0, edge - AROUND_EDGE), edge) + 1
        for match in LINE.finditer(text, first, edge + AROUND_EDGE):
            if not HEADING.match(match.group()):
                lines[match.start()] = match.group()
    counts = Counter(re.sub(r"\s+", "", line) for line in lines.values())
    enough = max(FEWEST_REPEATS, len(_heading_spans(text)) / 8)
    keys = [key for key, count in counts.items() if count >= enough and _may_recur(key)]
    alternatives = "|".join(r"[^\S\n]*".join(map(re.escape, key)) for key in keys)
    recurring = rf"(?<=\n)[^\S\n]*(?:{alternatives})[^\S\n]*(?:\n|\Z)"
    return replace(recurring, "", text) if keys else iter(())


def _may_recur(key: str) -> bool:
    """Whether a line, given without blanks, may be noise: no storyteller's formula, no sentence."""
    if pattern("told").search(key) or not 2 < len(key) <= LONGEST_REPEAT:
        return False
    return not key.endswith(SENTENCE_END) or _is_notice(key, points_at_edge=EDGE_POINTS)


def boilerplate(text: str) -> Iterator[Edit]:
    """Delete rules of dashes, ends of chapters (本章完), labels of pages.

    They may be whole lines, or stand in brackets behind a heading or a sentence.
    """
    edits = [(*match.span(), "") for match in pattern("boilerplate").finditer(text)]
    for match in pattern("last_bracket").finditer(text):
        before = text[max(0, match.start() - LONGEST_REPEAT) : match.start()]
        if HEADING.match(before.rpartition("\n")[2]) or before.rstrip(BLANK).endswith(SENTENCE_END):
            edits.append((*match.span(), ""))
    return iter(sorted(edits))
