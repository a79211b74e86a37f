"""What is no story: notices and watermarks of sites, authors' notes, lines that repeat or recur.

Patterns stand in noise.toml; those of whole lines have examples of noise that they match and of
story that they do not. What is a notice is decided by a score (see `ENOUGH`), never by one word.
The rules of cleaning here are the functions that take a text and return edits.
"""

import functools
import re
import tomllib
from collections import Counter
from collections.abc import Iterator
from itertools import accumulate, chain
from pathlib import Path

import numpy as np

from wuxia_core.corpus.chapters import HEADING, heading_spans
from wuxia_core.text import HAN, Edit, codes, join_pattern, lines_with, replace

BLANK = " \t　"  # stands inside the brackets of a pattern
SITE = "㐀"  # a rare character that is put in place of each character of a site's name
HIDDEN = "\0"  # is put in place of each character of a watermark that was found
SENTENCE_END = tuple("。！？…”』」：；—.!?\"'．﹒")

DATA = tomllib.loads(Path(__file__).with_suffix(".toml").read_text("utf-8"))
# By name, the alternatives of each pattern; %other% in one stands for another pattern.
PATTERNS = {name: x.split() if isinstance(x, str) else x for name, x in DATA["patterns"].items()}
PATTERNS["lines"] = [form["pattern"] for form in DATA["lines"]]


@functools.cache
def pattern(name: str) -> re.Pattern[str]:
    """Compile the pattern `name` of noise.toml; in it ^ and $ match at each line."""
    return re.compile(join_pattern(PATTERNS, name), re.MULTILINE)


@functools.cache
def _quick_pattern(*names: str) -> re.Pattern[str]:
    """Compile a pattern that quickly finds most words of the lists `names` of noise.toml.

    The pattern misses words that begin with a class or with another pattern, and ignores conditions
    on what stands around a word. Most words begin with two Chinese characters: they are tried only
    at a place whose first character begins one of them and whose second is the second of one.
    """
    # (?<!…) and (?!…) are conditions; [ begins a class, and % another pattern.
    words = [re.sub(r"\(\?<?!.*?\)", "", word) for name in names for word in PATTERNS[name]]
    words = [word for word in dict.fromkeys(words) if word[0] not in "[%"]
    han_words = [word for word in words if re.match(f"[{HAN}]{{2}}", word)]
    first, second = ("".join({word[n] for word in han_words}) for n in (0, 1))
    han_word = rf"[{first}](?=[{second}])(?<=(?=(?:{'|'.join(han_words)}))[{first}])"
    return re.compile("|".join([*(word for word in words if word not in han_words), han_word]))


PLAIN = str.maketrans(*map("".join, DATA["letters"].values()))  # from Ｃ to C, from 書 to 书
BRACKETS = dict(zip("（(【[〖《『〈<＜〔“「┏", "）)】]〗》』〉>＞〕”」┛", strict=True))
# A letter is also a Chinese character, or a digit.
LETTER, SENTENCE_MARK = re.compile(f"[{HAN}A-Za-z0-9]"), re.compile("[，。？…]")
LINE = re.compile("[^\n]+$", re.MULTILINE)  # a line, or the rest of one
HIDDEN_RUN = re.compile(f"\0(?:[^{HAN}A-Za-z0-9\0]*\0+)*")  # hidden characters, signs between them
SENTENCES = re.compile("[^。！？!?…]+[。！？!?…”』」）)]*")

# A line with a score of ENOUGH or more is a notice. The score is its share of letters in words of
# notices, plus POINT × its points: for up to two proofs (words that only notices use), for calls to
# the reader, and for what is around. The share must reach LEAST; or LEAST_UNCALLED if stories have
# all its proofs too, or if it has no call, list, address or brackets. That of proofs must be DENSE.
ENOUGH, LEAST, LEAST_UNCALLED, DENSE, POINT = 1, 0.3, 0.8, 0.1, 0.1
ADDRESS_POINTS, EDGE_POINTS, BRACKET_POINTS = 5, 4, 4  # an address, a chapter's edge, brackets
CALL_POINTS = {"call": 2, "plea": 2, "voice": 1, "certain": 2}  # by pattern: calls to the reader
# Most letters beside an address in a mere address; most characters of a notice, of an ad.
FEW_LETTERS, LONGEST_NOTICE, LONGEST_AD = 8, 300, 600
BEFORE_EDGE, BEHIND_EDGE = 300, 100  # characters before and behind a heading where authors speak
AFFIX = 40  # characters on each side of a watermark where words that belong to it are looked for
LONGEST_WORD = 4  # characters on each side of a sign that are cut into words
LONGEST_PREFIX = 20  # letters at most by which a repeated heading is longer than the heading
# Times that a line, or a site's name, must recur; most characters: of the line; from an edge to it.
FEWEST_REPEATS, LONGEST_REPEAT, AROUND_EDGE = 3, 40, 150
KNOWN_SHARE, OTHER_SHARE = 1 / 8, 2 / 3  # of the headings: a line must recur near as many
MOST_USES = 6  # uses of a site's name for each advertisement with it; plain words have more


def _is_notice(line: str, points_around: int = 0, points_at_edge: int = 0) -> bool:
    """Whether a line, or a part of one, is a notice of a site or an author (see `ENOUGH`).

    `points_around` are points for an address, brackets or a note around it (-1 for brackets that
    prose has too), `points_at_edge` are points for standing at a chapter's edge.
    """
    line = pattern("title").sub("", line.translate(PLAIN))
    words = list(pattern("word").finditer(line))
    proofs = {match["proof"] for match in words if match["proof"]}
    if not proofs or len(line) > LONGEST_NOTICE or _is_story(line):
        return False
    # A line's only proof does not count as a call too.
    single = proofs if len(proofs) == 1 else set()
    calls = {x: {m.group() for m in pattern(x).finditer(line)} - single for x in CALL_POINTS}
    call_points = sum(points for name, points in CALL_POINTS.items() if calls[name])
    list_points = 2 if len(proofs) > 1 and not SENTENCE_MARK.search(line) else 0  # a mere list
    # Without points for calls, surroundings or a list it needs three proofs, two at an edge.
    fewest_proofs = 2 if points_at_edge else 3
    if not (call_points or points_around > 0 or list_points or len(proofs) >= fewest_proofs):
        return False
    points = points_around + points_at_edge + call_points + list_points + min(len(proofs), 2)
    letters = len(LETTER.findall(line))
    share = sum(len(match.group()) for match in words) / letters
    is_dense = sum(len(match["proof"] or "") for match in words) >= DENSE * letters
    is_sure = any(not pattern("story_too").fullmatch(proof) for proof in proofs)
    is_called = call_points or points_around > 1 or list_points
    least_share = LEAST if is_sure and is_called else LEAST_UNCALLED
    return is_dense and share >= least_share and share + POINT * points >= ENOUGH


def _is_story(line: str) -> bool:
    """Whether a line has speech, words of a story, or a message of a game in the story.

    Such a message begins with 【, as 【任务完成】 does, and has no word that sites put in brackets.
    """
    game_speaks = line.startswith("【") and not pattern("in_brackets").search(line)
    return game_speaks or bool(pattern("speech").search(line) or pattern("told").search(line))


def ads(text: str) -> Iterator[Edit]:
    """Delete the lines that are nothing but advertisements and notices, with their newlines."""
    site_names = _site_names(text)
    for start, end in _marked_lines(text):
        if _is_ad(site_names.sub(_mask_name, text[start:end])):
            yield start, min(end + 1, len(text)), ""


@functools.lru_cache(maxsize=1)
def _marked_lines(text: str) -> list[tuple[int, int]]:
    """List `(start, end)` of the lines with a word of sites; the last text's result is cached."""
    return list(lines_with(_quick_pattern("mark", "site"), text))


@functools.lru_cache(maxsize=1)
def _site_names(text: str) -> re.Pattern[str]:
    """Compile a pattern of the site names in a text, which matches nothing if there are none.

    A name is a row of two to five Chinese characters that is in three advertisements or more, has
    no word of notices, and is in the text at most six times for each of these advertisements.
    """
    counts = Counter[str]()  # for each possible name, the number of advertisements that have it
    lines = (text[start:end] for start, end in _marked_lines(text))
    for line in filter(_is_ad, lines):  # \0 keeps apart what stands around a word of notices
        counts.update(set(pattern("name").findall(pattern("word").sub("\0", line))))
    names = [x for x, n in counts.items() if n >= FEWEST_REPEATS and text.count(x) <= MOST_USES * n]
    return re.compile("|".join(names) or r"\Z.")  # no character stands behind the end


def _mask_name(match: re.Match[str]) -> str:
    """Return `SITE` as often as the matched name of a site has characters."""
    return SITE * len(match.group())


def _is_ad(line: str) -> bool:
    """Whether a line is nothing but advertisement; it is no heading and has 600 characters or less.

    It has a letter or a watermark, and each of its sentences with letters outside watermarks is a
    notice or a mere address. It does not open a list of thanks: `authors_notes` deletes those.
    """
    if len(line) > LONGEST_AD or HEADING.match(line) or pattern("thanks").match(line):
        return False
    hidden = _hide(line, _watermarks(line)) if _quick_pattern("mark").search(line) else line
    sentences = [x for x in SENTENCES.findall(hidden) if LETTER.search(x)]
    return (HIDDEN in hidden or bool(sentences)) and all(
        _is_mere_address(x)
        or _is_notice(x.replace(HIDDEN, ""), ADDRESS_POINTS if HIDDEN in x else 0)
        for x in sentences
    )


def _is_mere_address(sentence: str) -> bool:
    """Whether a sentence has a hidden address, few letters, no ，。？… and no words of a story."""
    has_few = len(LETTER.findall(sentence)) <= FEW_LETTERS and not SENTENCE_MARK.search(sentence)
    return HIDDEN in sentence and has_few and not _is_story(sentence)


def _hide(line: str, spans: list[tuple[int, int]]) -> str:
    """Return `line` with `HIDDEN` in place of each character in `spans`, a list of [start, end)."""
    for start, end in spans:
        line = line[:start] + HIDDEN * (end - start) + line[end:]
    return line


def watermarks(text: str) -> Iterator[Edit]:
    """Delete addresses, names of sites and calls to readers that stand inside a sentence.

    A line without any other letter is deleted with its newline. A line that `ads` deletes is left
    to that rule.
    """
    signs = map(re.escape, pattern("signs").findall(_distinct_characters(text)))
    site_names = _site_names(text)
    # Finds lines with rare signs, as in 一⊙秒⊙记⊙住⊙, and with names of sites.
    decorated = re.compile("|".join((pattern("signed").pattern, site_names.pattern, *signs)))
    for line_start, line_end in sorted({*_marked_lines(text), *lines_with(decorated, text)}):
        line = site_names.sub(_mask_name, text[line_start:line_end])
        if _is_ad(line):
            continue
        for match in HIDDEN_RUN.finditer(_hide(line, _watermarks(line))):
            start, end = _with_marks(line, *match.span())
            if not LETTER.search(line[:start] + line[end:]):
                start, end = 0, len(line) + 1  # with the newline
            yield line_start + start, min(line_start + end, len(text)), ""


@functools.lru_cache(maxsize=1024)
def _watermarks(line: str) -> list[tuple[int, int]]:
    """List `(start, end)` of the watermarks of a line, with the words around that belong to them.

    In 他拔剑，看书请到 www.abc.com 阅读，众人大惊。 it is all between the commas. Two may overlap.
    """
    plain = line.translate(PLAIN)
    cores = [match.span() for match in pattern("decorated").finditer(line)]
    cores += [x.span() for x in pattern("bracketed").finditer(line) if _names_site(x.group())]
    cores += [x.span() for x in pattern("watermark").finditer(plain) if not _is_told(x, line)]
    cores += [x.span() for x in pattern("run").finditer(plain) if _run_is_watermark(x, line)]
    spans = []
    hidden = _hide(plain, cores)
    for match in HIDDEN_RUN.finditer(hidden):
        start, end = match.span()
        lead = pattern("lead").search(hidden[max(0, start - AFFIX) : start])
        is_bracketed = line[end - 1] in BRACKETS.values()
        tail = None if is_bracketed else pattern("tail").match(plain, end, end + AFFIX)
        lead_length = len(lead[0]) if lead else 0
        spans.append((start - lead_length, tail.end() if tail else end))
    return spans


def _names_site(bracketed: str) -> bool:
    """Whether `bracketed`, with its brackets, is an address or a site's notice: 【某某小说网】."""
    rest = pattern("address").sub(HIDDEN, bracketed[1:-1].translate(PLAIN))
    if HIDDEN in rest:
        return _is_mere_address(rest) or _is_notice(rest, ADDRESS_POINTS)
    points = -1 if bracketed[0] in "（(<" else BRACKET_POINTS  # prose has （ too, but hardly 【
    return bool(pattern("in_brackets").search(rest)) and _is_notice(rest, points)


def _run_is_watermark(match: re.Match[str], line: str) -> bool:
    """Whether a match of the pattern `run`, words of sites in a row in a line, is a watermark.

    It is one if it has a site's name (for which `SITE` stands) and a word that only notices use,
    other than a name or kind of site (书屋). Outside speech it is also one if it has two different
    words that only notices use, and asks for a visit (请访问) or says what only sites say (无广告).
    """
    run = match.group()
    proofs = _proofs(run)
    names_site = SITE in run and not all(pattern("named_site").match(word) for word in proofs)
    invites = any(pattern(name).search(run) for name in ("asks", "certain", "boast"))
    return names_site or (invites and len(proofs) > 1 and not _in_speech(line[: match.start()]))


def _proofs(line: str) -> set[str]:
    """Return the set of the proofs in a line: its words that only notices use."""
    return {match["proof"] for match in pattern("word").finditer(line) if match["proof"]}


def _in_speech(before: str) -> bool:
    """Whether speech goes on behind the text `before`: more quotations open in it than close."""
    return any(before.count(a) > before.count(b) for a, b in ("“”", "「」", "『』"))


def _is_told(match: re.Match[str], line: str) -> bool:
    """Whether a matched watermark belongs to the story: somebody reads, types or says an address.

    A site's name belongs to it if other words than notices use stand before it in its clause. An
    address does not if it is disguised, also by spaces, or stands in a call to the reader.
    `match` is a match in the plain line (see `PLAIN`); `line` is the line as it was read.
    """
    start, end = match.span()
    before = line[max(0, start - LONGEST_NOTICE) : start]
    if match["name"]:
        return not pattern("only_notice_words").search(before)
    is_plain = line[start:end] == match.group() and " " not in match.group()
    is_told = _in_speech(before) or bool(pattern("typed_or_called").search(before))
    return is_told and is_plain and not match["call"]


def _with_marks(line: str, start: int, end: int) -> tuple[int, int]:
    """Widen a span of a line by the brackets or single dashes around it, and by a mark beside it.

    The mark is one that, with the span deleted, would meet another mark or begin a sentence. In
    他拔剑，【某某网】。 the span 某某网 becomes ，【某某网】, so that 他拔剑。 is left.
    """
    before, after = line[start - 1 : start], line[end : end + 1]  # "" at the line's ends
    is_dashed = before == after != line[start - 2 : start - 1] and before in tuple("…—～")
    if after and (BRACKETS.get(before) == after or is_dashed):
        return _with_marks(line, start - 1, end + 1)
    if before in tuple("，、；：") and after in tuple("。！？，；"):
        goes_on = LETTER.search(line, end) and line[end + 1 : end + 2] not in tuple("”」』")
        return (start, end + 1) if goes_on else (start - 1, end)
    begins_sentence = not before or before in SENTENCE_END
    return (start, end + 1) if begins_sentence and after in tuple("，。；！、") else (start, end)


def doubled(text: str) -> Iterator[Edit]:
    """Delete a line below a numbered heading that repeats it: 断刀行 第三章 旧债 below 第三章 旧债.

    A line of the title alone (旧债), or a heading with that title (第3章 旧债), is deleted too. If
    the line adds the title to a bare heading (第三章 旧债 below 第三章), the heading is deleted.
    Only letters and digits count. A line that ends a sentence, or has over 20 of them more, stays.
    """
    done = 0  # where the last edit ends
    for heading in HEADING.finditer(text):
        below = pattern("line").search(text, heading.end() + 1)
        if not below or heading["count"] is None or below[0].endswith(SENTENCE_END):
            continue
        title = text[heading.end("count") : heading.end()]
        # Letters and digits: of the heading, of the line below, of the title.
        first, second, title = (re.sub(r"[\W_]", "", x) for x in (heading[0], below[0], title))
        if len(second) > len(first) + LONGEST_PREFIX:
            continue
        is_heading = second == title or HEADING.match(below[0])
        if second.endswith(first) or (len(title) > 1 and is_heading and second.endswith(title)):
            yield heading.end(), (done := below.end()), ""
        elif heading.start() >= done and is_heading and not title and second.startswith(first):
            yield heading.start(), below.start(), ""


def authors_notes(text: str) -> Iterator[Edit]:
    """Delete lines to the reader near a chapter's beginning and end: of votes, thanks, leave.

    Only lines that end in a chapter's first 100 characters or begin in its last 300 are looked at.
    """
    spans = (x for x in heading_spans(text) if not pattern("note_opens").match(text, *x))
    edges = [0, *chain(*spans), len(text)]  # of chapters; a heading that opens a note is none
    for start, end in zip(edges[::2], edges[1::2], strict=True):  # of a chapter
        last_start = max(start, end - BEFORE_EDGE)
        first_end = text.rfind("\n", start, min(start + BEHIND_EDGE, last_start))
        yield from _notes(text, start, max(start, first_end), at_the_end=False)
        yield from _notes(text, last_start, end, at_the_end=True)


def _notes(text: str, start: int, end: int, *, at_the_end: bool) -> Iterator[Edit]:
    """Delete the lines between `start` and `end`, a chapter's edge, that are notes to the reader.

    A line is a note if it opens one (作者的话); if a note was opened above it and it is no story
    (only if `at_the_end`); or if `_is_notice` holds and it is in brackets, below a note or has
    words of authors. Any other line ends the note above, unless `boilerplate` deletes that line.
    """
    in_opened_note = note_above = False
    for match in pattern("line").finditer(text, start, end):
        line = match.group().strip()
        if match.start() == start and text[start - 1 : start] not in ("", "\n"):  # part of a line
            continue
        line = pattern("last_bracket").sub("", line) or line  # without （本章完） at its end
        opens = bool(pattern("note_opens").match(line))
        bracket_points = 2 if line[0] in "（(【[" and line[-1] in "）)】]" else 0
        points = bracket_points + (1 if note_above else 0)
        may_be_notice = points > 0 or pattern("jargon").search(line)
        is_note = opens or (in_opened_note and not _is_story(line))
        if is_note or (may_be_notice and _is_notice(line, points, EDGE_POINTS)):
            yield match.start(), min(match.end() + 1, len(text)), ""
            in_opened_note = at_the_end and (opens or in_opened_note)
            note_above = True
        elif note_above and not pattern("boilerplate").match(text, match.start()):
            in_opened_note = note_above = False


def inserts(text: str) -> Iterator[Edit]:
    """Delete signs and letters that were put into words: 排ω气筒, 长|剑; not in A计划, 救~命.

    A sign that cuts words in two (`_cuts_words`) is deleted between any two Chinese characters.
    """
    signs = "".join(map(re.escape, pattern("odd").findall(_distinct_characters(text))))
    # It may be doubled (剑||光), but not recur a character or two later, or be as in 第n次, X射线.
    lone = rf"(?<=[{HAN}])([{signs}])\1?(?![{HAN}]{{1,2}}\1)(?<!第.)(?=[{HAN}])(?![波粒射星型螺链])"
    spans: dict[str, list[tuple[int, int]]] = {}  # (start, end) of its places, for each sign
    for match in re.finditer(lone, text) if signs else ():
        spans.setdefault(match[1], []).append(match.span())
    # The first 200 places of a sign decide.
    inserted = chain(*(x for sign, x in spans.items() if _cuts_words(sign, x[:200], text)))
    return ((start, end, "") for start, end in sorted(inserted))


def _cuts_words(sign: str, spans: list[tuple[int, int]], text: str) -> bool:
    """Whether `sign` cuts words in two at its places in a text, `spans` of `(start, end)`.

    A sign that prose uses too (a letter, a dash) does so if it cuts a word at half of the places or
    more, and two different words at least. Any other sign does so if it cuts a word at half of the
    places or more. An ornament (☆) always counts as cutting words.
    """
    import rjieba

    cut_words = []  # a word for each place at which one is cut
    for start, end in spans:
        left, right = text[max(0, start - LONGEST_WORD) : start], text[end : end + LONGEST_WORD]
        words = rjieba.cut(left + right, hmm=False)
        word_ends = zip(words, accumulate(map(len, words)), strict=True)  # (word, its end)
        # The sign stood behind `left`.
        cut_words += [word for word, to in word_ends if to - len(word) < len(left) < to]
    if pattern("drawn").match(sign):
        return len(set(cut_words)) > 1 and len(cut_words) * 2 >= len(spans)
    return bool(pattern("ornament").match(sign)) or len(cut_words) * 2 >= len(spans)


def _distinct_characters(text: str) -> str:
    """Return the different characters of a text, each once, in the order of their code points."""
    return "".join(map(chr, np.flatnonzero(np.bincount(codes(text)))))


def repeats(text: str) -> Iterator[Edit]:
    """Delete the lines that recur where chapters begin or end: credits, the book's title.

    A line recurs if it is within 150 characters of as many headings as `_recurs` asks for; the
    text's end counts as one. It is deleted wherever it stands, except as the text's first line.
    """
    near: dict[str, set[tuple[int, int]]] = {}  # for each line: (edge that it is near, its start)
    headings = dict(heading_spans(text))
    for edge, end in (*headings.items(), (len(text), len(text))):
        newline = text.find("\n", max(0, edge - AROUND_EDGE), edge)
        first = edge if newline < 0 else newline + 1  # where the first line that is near begins
        for match in LINE.finditer(text, first, end + AROUND_EDGE):
            if match.start() not in headings:
                key = re.sub(r"\s+", "", match.group())
                near.setdefault(key, set()).add((edge, match.start()))
    counts = {key: min(len(set(n)) for n in zip(*x, strict=True)) for key, x in near.items()}
    keys = [key for key, count in counts.items() if _recurs(key, count, len(headings))]
    # Blanks may stand between any two characters.
    alternatives = "|".join(r"[^\S\n]*".join(map(re.escape, key)) for key in keys)
    recurring = rf"(?<=\n)[^\S\n]*(?:{alternatives})[^\S\n]*(?:\n|\Z)"
    return replace(recurring, "", text) if keys else iter(())


def _recurs(key: str, count: int, headings: int) -> bool:
    """Whether `key`, a line without its blanks near `count` of `headings` headings, is noise.

    Noise has 3 to 40 characters and no words of a story; if it ends as a sentence, it is a notice.
    It is near three headings or more, and near one in eight of all if it is a title in 《》 or has
    a word of sites or authors, else near two in three, as stories repeat names and times (三日后).
    """
    if pattern("told").search(key) or not 2 < len(key) <= LONGEST_REPEAT:
        return False
    is_known = key[0] == "《" or any(not pattern("story_too").fullmatch(x) for x in _proofs(key))
    if count < max(FEWEST_REPEATS, headings * (KNOWN_SHARE if is_known else OTHER_SHARE)):
        return False
    return not key.endswith(SENTENCE_END) or _is_notice(key, points_at_edge=EDGE_POINTS)


def boilerplate(text: str) -> Iterator[Edit]:
    """Delete lines that are only dashes or signs, ends of chapters (本章完) or labels of web pages.

    Ends of chapters and calls for votes in brackets at a line's end are deleted too, if a heading
    or a whole sentence stands before them; so is 正文 before a heading (正文 第三章).
    """
    edits = [(*match.span(), "") for match in pattern("boilerplate").finditer(text)]
    for match in pattern("last_bracket").finditer(text):
        before = text[max(0, match.start() - LONGEST_REPEAT) : match.start()]
        if HEADING.match(before.rpartition("\n")[2]) or before.rstrip(BLANK).endswith(SENTENCE_END):
            edits.append((*match.span(), ""))
    return iter(sorted(edits))
