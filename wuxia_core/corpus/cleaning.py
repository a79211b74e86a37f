"""Rules of cleaning: what is no story is cut out, and what was damaged is mended.

A rule looks at a text and proposes edits, in order and apart from each other; its docstring says
what it does. `RULES`, at the end, has all of them in the order in which they are applied.
"""

import html
import re
from collections.abc import Callable, Container, Iterator
from dataclasses import dataclass, field

from wuxia_core.corpus.chapters import HEADING, NUMERAL, headings, table_of_contents
from wuxia_core.corpus.encodings import garbled, mojibake
from wuxia_core.text import CJK_TEXT, Edit, lines_with, replace

BLANK = " \t\xa0　"
PUNCTUATION = re.compile("[，。：；？！]")
SENTENCE_END = tuple("。！？…”』」：；—.!?\"'")

LINE_END = re.compile("\r\n?|[\f\v\x85\u2028\u2029]")
BLANK_LINES = re.compile(r"\n\n+|\A\n|\n\Z")
SPACES = re.compile(f"[{BLANK}]+")
PRIVATE_USE = re.compile("[\ue000-\uf8ff□]")
TAGS = (
    "a|abbr|b|big|blockquote|body|br|center|code|d[dlt]|del|div|em|font|form|h[1-6]|head|hr|html|i"
    "|iframe|img|input|ins|li|link|meta|noscript|ol|option|p|pre|s|small|span|strike|strong|sub|sup"
    "|t[dhr]|table|tbody|tfoot|thead|title|tt|u|ul"
)
MARKUP = re.compile(
    r"<!--.{0,2000}?-->|<(script|style)\b.{0,2000}?</\1>"
    rf"|</?(?:{TAGS})(?:\s+[a-z][a-z:-]*=[^<>]{{0,300}})?\s*/?>"
    r"|\[/?(?:url|img|size|color|font|align)(?:=[^\]\n]{0,80})?\]"
    r"|&(?:[a-z]{2,8}|#x[0-9a-f]{1,6}|#\d{1,7});",
    re.DOTALL | re.IGNORECASE,
)
BREAKS = re.compile(r"<(?:br|/?p|/?div|/tr)\b", re.IGNORECASE)
INVISIBLE = re.compile("[\x00-\x08\x0e-\x1f\x7f-\x84\x86-\x9f\xad\u200b-\u200f\u2060\ufeff]")
LONG_LINE = 500  # characters: of a longer one a sentence is looked at

# Where GB18030-2000, which Python has, put into private use what GB18030-2022 gives a place.
STANDARD = dict(zip(map(chr, range(0xE78D, 0xE797)), "︐︒︑︓︔︕︖︗︘︙", strict=True)) | dict(
    zip("\ue81e\ue826\ue82b\ue82c\ue832\ue843\ue854\ue864\ue816\ue817\ue818\ue831\ue83b\ue855",
        "龴龵龶龷龸龹龺龻𠂇𠂉𠃌𡗗𢦏𤇾", strict=True)
)  # fmt: skip
URL = re.compile(
    r"(?:https?://|www\s?[.．。])[\w./?=&%#:~-]*|[\w.]{2,30}@[\w-]+\.\w+"
    r"|(?:[\w-]{1,30}[.．]){1,3}(?:com|net|org|cn|cc|info|tw)\b[\w./?=&%#:~-]*",
    re.ASCII | re.IGNORECASE,
)
PROOF = re.compile(
    "一秒记住|请记住本[书站]|手机用户请|加入书签|正在手打|无弹窗|最快更新|百度搜索|点击下一页|请翻页"
    "|上一[章页].{0,9}下一[章页]|ＷＷＷ|ｗｗｗ|．ＣＯＭ|．ｃｏｍ|．ＮＥＴ|．ｎｅｔ"
)
SITES_SAY = re.compile(
    r"电子书|電子書|本站|该站|网站|網站|网址|域名|小说网|小說網|首发|转载|轉載|版权|版權|正版|全文阅读"
    r"|在线阅读|免费阅读|最新章节|手机阅读|公众号|推荐票|月票|TXT|txt|VIP|OCR|QQ|E-?mail|e-?mail"
    r"|整理制作|商业用途|商業用途"
)
OTHERS_TOO = re.compile(
    "书友|网友|網友|读者|讀者|论坛|論壇|下载|下載|购买|購買|收藏|点击|访问|更新|侵犯|精彩|仅供|僅供|连载"
    "|手打|校对|校對|扫描|掃描|录入|24小时"
)
DOMAIN = "(?:com|net|org|cn|cc|info|tw|COM|NET|CN)(?![A-Za-z])"
AD = re.compile(  # each branch begins with a literal, or the search is three times slower
    rf"http|HTTP|www|WWW|\.{DOMAIN}|．{DOMAIN}|@"
    rf"|{PROOF.pattern}|{SITES_SAY.pattern}|{OTHERS_TOO.pattern}"
)
LONGEST_AD = 30  # characters a point of the score
LEAST_STORY = 8  # characters
ENOUGH, ENOUGH_NEARBY = 3, 2  # points; the second where the line before is a notice

STAMPED = "更新时间|更新時間|更新日期|发布时间|本章字数|本章字數|字数|字數"
STAMP = re.compile(
    rf"^(?P<before>.{{0,40}}?)(?P<stamp>(?:{STAMPED})[ 　]*[:：][ 　]*\d"
    rf"(?:[\d:：/. 　年月日时分秒字-]|{STAMPED})*)\n?",
    re.MULTILINE,
)
PAGE_MARK = re.compile(
    r"分[节節]阅读[_＿ ]*\d+|[（(]第\d+[/／]\d+[页頁][）)]"
    r"|\n[-—－ ]*(?:第 ?\d{1,4} ?[页頁]|[-—－] *\d{1,4} *[-—－])[-—－ ]*(?=\n|\Z)"
)
SPEECH = ("“", "「", "『", '"')
AROUND_MARK = "_＿" + "\n" + BLANK
BOILERPLATE = re.compile(
    rf"^[ \t　]*+(?:[-=*_~#＝＿＊※☆★◆]{{5,}}|[-=*_ ]*章节内容(?:开始|结束)[-=*_ ]*|第{NUMERAL}部分"
    r"|[（(【]?(?:本章完|本章未完|未完待续|未完待續|待续|全书完|全書完)[）)】]?"
    r"|《[^，。\n]{1,20}》[ 　]*作者[ 　]*[:：;；].{1,12}"
    r"|[\[【][^，。\n]{1,20}[/／][^，。\n]{2,12}著[ 　]*[\]】])[ \t　]*(?:\n|\Z)"
    r"|^[ \t　]*+正文[ 　]+(?=第)",
    re.MULTILINE,
)
FEWEST_BROKEN = 10  # lines
WORDS = re.compile(r"[A-Za-z,]\s*[A-Za-z]")  # English words need a space between them
EXAMPLES, AROUND = 5, 12  # examples kept for a rule and text; characters shown around each


def line_ends(text: str) -> Iterator[Edit]:
    """CRLF and other line ends become a newline."""
    return replace(LINE_END, "\n", text)


def markup(text: str) -> Iterator[Edit]:
    """HTML comments, tags and entities, and forum tags."""
    for match in MARKUP.finditer(text):
        tag = match.group()
        yield *match.span(), html.unescape(tag) if tag[0] == "&" else "\n" * bool(BREAKS.match(tag))


def invisible(text: str) -> Iterator[Edit]:
    """Byte-order marks, control characters, zero-width characters."""
    return replace(INVISIBLE, "", text)


def spaces(text: str) -> Iterator[Edit]:
    """Spaces at the ends of a line and stray ones in a sentence; of several together one is left.

    Wide ones after a sentence's end are the indent of a paragraph whose line break was lost.
    Headings, and verse without punctuation, keep their spaces.
    """
    for match in SPACES.finditer(text):
        start, end = match.span()
        at_an_end = start == 0 or end == len(text) or "\n" in (text[start - 1], text[end])
        if at_an_end or _is_stray(text, start, end):
            yield start, end, ""
        elif end - start > 1:
            indent = match.group() == "　　" and text.endswith(SENTENCE_END, 0, start)
            yield start, end, "\n" if indent else "　" if text[start - 1] > "⺀" else " "


def _is_stray(text: str, start: int, end: int) -> bool:
    """Whether a lone space stands between characters of a line that has punctuation."""
    if end - start > 1 or not (CJK_TEXT.match(text, start - 1) and CJK_TEXT.match(text, end)):
        return False
    before = text[max(0, start - LONG_LINE) : start].rpartition("\n")[2]
    line = before + text[start : start + LONG_LINE].partition("\n")[0]
    return bool(PUNCTUATION.search(line)) and not HEADING.match(line)


def private_use(text: str) -> Iterator[Edit]:
    """Private-use characters that GB18030-2022 gives a place; others, and □, are kept, counted."""
    return replace(PRIVATE_USE, lambda match: STANDARD.get(match.group(), match.group()), text)


def blank_lines(text: str) -> Iterator[Edit]:
    """Empty lines: a paragraph is a line."""
    for match in BLANK_LINES.finditer(text):
        start, end = match.span()
        yield start, end, "" if start == 0 or end == len(text) else "\n"


def stamps(text: str) -> Iterator[Edit]:
    """Stamps: times of update, counts of words, and what stands before them unless it is story."""
    for match in STAMP.finditer(text):
        before = match["before"]
        if HEADING.match(text, match.start()) or before.endswith(SENTENCE_END):
            yield *match.span("stamp"), ""
        else:
            yield match.start(), match.end(), ""


def page_marks(text: str) -> Iterator[Edit]:
    """Page marks; a sentence that one cuts is joined again."""
    last = 0
    for match in PAGE_MARK.finditer(text):
        start, end = match.span()
        while start > last and text[start - 1] in AROUND_MARK:
            start -= 1
        while end < len(text) and text[end] in AROUND_MARK:
            end += 1
        indented = text[match.end() : end].endswith(("　", "  "))
        heading = HEADING.match(text, text.rfind("\n", 0, start) + 1) or HEADING.match(text, end)
        apart = indented or heading or text.endswith(SENTENCE_END, 0, start)
        yield max(start, last), end, "\n" if start == 0 or apart else ""
        last = end


def ads(text: str) -> Iterator[Edit]:
    """Advertisements and notices of sites: whole lines, else the address alone."""
    last = 0
    for start, end in lines_with(AD, text):
        nearby = last and not text[last:start].strip()
        if _is_ad(text[start:end], ENOUGH_NEARBY if nearby else ENOUGH):
            yield start, min(end + 1, len(text)), ""
            last = end
        else:
            for match in URL.finditer(text, start, end):
                yield *match.span(), ""


def _is_ad(line: str, enough: int) -> bool:
    """Score 3 for a phrase that only sites say, 2 for a word or an address, 1 for a common word.

    A heading is none, nor is what somebody says. Words that others say too are no proof alone. A
    long line is story with an address in it; one that is hardly more than the address is not.
    """
    line = line.strip()
    addresses, sites_say = URL.findall(line), len(set(SITES_SAY.findall(line)))
    rest = len(line) - sum(map(len, addresses))
    if HEADING.match(line) or (line.startswith(SPEECH) and not addresses):
        return False
    if addresses and rest <= LEAST_STORY:
        return True
    certain = bool(PROOF.search(line))
    score = 2 * bool(addresses) + 2 * sites_say + len(set(OTHERS_TOO.findall(line))) + 3 * certain
    proof = certain or addresses or sites_say or enough == ENOUGH_NEARBY
    return bool(proof) and score >= enough and rest <= LONGEST_AD * score


def boilerplate(text: str) -> Iterator[Edit]:
    """Rules of dashes, 章节内容开始, （本章完）, 第一部分, title lines, 正文 before a heading."""
    return replace(BOILERPLATE, "", text)


def hard_wrap(text: str) -> Iterator[Edit]:
    """Lines that were broken at a fixed width become paragraphs again."""
    lines = [match.span() for match in re.finditer(r"^.*\S", text, re.MULTILINE)]
    widths = [len(text[start:end].encode("gbk", "replace")) for start, end in lines]
    full = _full_width(text, lines, widths)
    if not full:
        return
    indented = sum(text[start] in BLANK for start, _ in lines) > len(lines) / 20
    for (start, end), width, (then, _) in zip(lines, widths, lines[1:], strict=False):
        runs_on = width >= full or (indented and not text.endswith(SENTENCE_END, start, end))
        apart = text[then] in BLANK or text.count("\n", end, then) > 1
        if runs_on and not (apart or HEADING.match(text, start) or HEADING.match(text, then)):
            yield end, then, " " if WORDS.match(text, end - 1) else ""


def _full_width(text: str, lines: list[tuple[int, int]], widths: list[int]) -> int:
    """Find the width, in columns, from which a line is full; 0 for text that is not hard-wrapped.

    Hard-wrapped text has a quarter of its lines full without a sentence's end; verse has lines of
    one width too, but no punctuation in them.
    """
    widest = sorted(widths)[len(widths) * 95 // 100] if widths else 0
    full = widest - 6
    broken = sum(
        not text.endswith(SENTENCE_END, start, end) and bool(PUNCTUATION.search(text, start, end))
        for (start, end), width in zip(lines, widths, strict=True)
        if width >= full
    )
    enough = max(FEWEST_BROKEN, len(lines) / 4)
    return full if 20 < widest <= 120 and broken > enough else 0


@dataclass
class Tally:
    """What a rule did to a text, in characters."""

    rule: str
    count: int = 0
    removed: int = 0
    inserted: int = 0
    examples: list[tuple[str, str]] = field(default_factory=list)  # before and after

    def add(self, other: "Tally") -> None:
        """Count what the rule did to another text too."""
        self.count += other.count
        self.removed += other.removed
        self.inserted += other.inserted
        self.examples += other.examples[: EXAMPLES - len(self.examples)]


def clean(text: str, skip: Container[str] = ()) -> tuple[str, list[Tally]]:
    r"""Apply every rule but those in `skip`; list the ones that did something.

    `"　　甲。\r\n\r\n　　乙。"` becomes `"甲。\n乙。"`: two line ends, two indents, an empty line.
    """
    tallies = []
    for name in RULES:
        if name not in skip:
            text, tally = _apply(name, text)
            tallies += [tally] if tally.count else []
    return text, tallies


def _apply(name: str, text: str) -> tuple[str, Tally]:
    tally = Tally(name)
    pieces, done = [], 0
    for start, end, new in RULES[name](text):
        pieces += [text[done:start], new]
        tally.count += 1
        tally.removed += end - start
        tally.inserted += len(new)
        if len(tally.examples) < EXAMPLES:
            before, after = text[max(0, start - AROUND) : start], text[end : end + AROUND]
            tally.examples.append((before + text[start:end] + after, before + new + after))
        done = end
    pieces.append(text[done:])
    return "".join(pieces), tally


# In the order in which they are applied; with each whether it is for novels only.
_RULES: dict[Callable[[str], Iterator[Edit]], bool] = {
    mojibake: False,
    line_ends: False,
    page_marks: True,
    markup: False,
    invisible: False,
    garbled: False,
    stamps: True,
    ads: True,
    boilerplate: True,
    headings: True,
    table_of_contents: True,
    hard_wrap: True,
    spaces: False,
    private_use: False,
    blank_lines: False,
}
RULES = {rule.__name__: rule for rule in _RULES}
NOVELS_ONLY = frozenset(rule.__name__ for rule, novels_only in _RULES.items() if novels_only)
OLDER_NAMES = {"notices": "ads", "furniture": "boilerplate", "contents": "table_of_contents"}
