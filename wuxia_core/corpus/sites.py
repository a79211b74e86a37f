"""Rules of cleaning for novels: what sites put between the lines, and how they broke them.

Words, not sites: no rule knows the name of a site, only what sites say.
"""

import re
from collections.abc import Iterator

from wuxia_core.corpus.chapters import HEADING, NUMERAL
from wuxia_core.corpus.rules import BLANK, PUNCTUATION, SENTENCE_END, Edit, lines_with, replace

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
NOTICE = re.compile(  # each branch begins with a literal, or the search is three times slower
    rf"http|HTTP|www|WWW|\.{DOMAIN}|．{DOMAIN}|@"
    rf"|{PROOF.pattern}|{SITES_SAY.pattern}|{OTHERS_TOO.pattern}"
)
LONGEST_NOTICE = 30  # characters a point of the score
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
INLINE = re.compile(  # the title ends where there are two blanks
    rf"(?<=[。！？”」])(?P<before>[ 　]+)第{NUMERAL}[回章節节][ 　][^\s。！？]{{1,20}}"
    r"(?:[ 　][^\s。！？]{1,20})?(?:[ 　]*$|(?P<after>[ 　]{2,}))",
    re.MULTILINE,
)
SPEECH = ("“", "「", "『", '"')
AROUND_MARK = "_＿" + "\n" + BLANK
FURNITURE = re.compile(
    rf"^[ \t　]*+(?:[-=*_~#＝＿＊※☆★◆]{{5,}}|[-=*_ ]*章节内容(?:开始|结束)[-=*_ ]*|第{NUMERAL}部分"
    r"|[（(【]?(?:本章完|本章未完|未完待续|未完待續|待续|全书完|全書完)[）)】]?"
    r"|《[^，。\n]{1,20}》[ 　]*作者[ 　]*[:：;；].{1,12}"
    r"|[\[【][^，。\n]{1,20}[/／][^，。\n]{2,12}著[ 　]*[\]】])[ \t　]*(?:\n|\Z)"
    r"|^[ \t　]*+正文[ 　]+(?=第)",
    re.MULTILINE,
)
FEWEST_BROKEN = 10  # lines
CONTENTS = 4  # more headings than that with nothing between them are a table of contents
WORDS = re.compile(r"[A-Za-z,]\s*[A-Za-z]")  # English words need a space between them


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


def notices(text: str) -> Iterator[Edit]:
    """Advertisements and notices of sites: whole lines, else the address alone."""
    last = 0
    for start, end in lines_with(NOTICE, text):
        nearby = last and not text[last:start].strip()
        if _is_notice(text[start:end], ENOUGH_NEARBY if nearby else ENOUGH):
            yield start, min(end + 1, len(text)), ""
            last = end
        else:
            for match in URL.finditer(text, start, end):
                yield *match.span(), ""


def _is_notice(line: str, enough: int) -> bool:
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
    return bool(proof) and score >= enough and rest <= LONGEST_NOTICE * score


def furniture(text: str) -> Iterator[Edit]:
    """Rules of dashes, 章节内容开始, （本章完）, 第一部分, title lines, 正文 before a heading."""
    return replace(FURNITURE, "", text)


def contents(text: str) -> Iterator[Edit]:
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


def hard_wrap(text: str) -> Iterator[Edit]:
    """Lines that were broken at a fixed width become paragraphs again."""
    lines = [
        (match.start(), match.start() + len(match.group().rstrip()))
        for match in re.finditer(r"[^\n]+", text)
        if not match.group().isspace()
    ]
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
