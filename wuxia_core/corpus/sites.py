"""Rules of cleaning for novels: what sites put between the lines, and how they broke them.

Words, not sites: no rule knows the name of a site, only what sites say.
"""

import re
from collections.abc import Iterator

from wuxia_core.corpus.chapters import HEADING, NUMERAL
from wuxia_core.corpus.rules import BLANK, SENTENCE_END, Edit, lines_with, replace

URL = re.compile(
    r"(?:https?://|www\s?[.．。])[\w./?=&%#:~-]*|[\w.]{2,30}@[\w-]+\.\w+"
    r"|[\w-]{2,30}[.．](?:com|net|org|cn|cc|info|tw)\b[\w./?=&%#:~-]*",
    re.ASCII | re.IGNORECASE,
)
SITES_SAY = re.compile(
    r"下载|下載|电子书|電子書|本站|该站|网站|網站|网址|域名|小说网|小說網|论坛|論壇|网友|網友|首发"
    r"|转载|轉載|版权|版權|正版|全文阅读|在线阅读|免费阅读|最新章节|手机阅读|公众号|推荐票|月票"
    r"|TXT|txt|VIP|OCR|QQ|E-?mail|e-?mail|校对|校對|扫描|掃描|录入|整理制作|商业用途|商業用途"
)
OTHERS_TOO = re.compile(
    "书友|读者|讀者|购买|購買|收藏|点击|访问|更新|侵犯|精彩|仅供|僅供|连载|手打|24小时"
)
NOTICE = re.compile(
    r"http|HTTP|www|WWW|\.(?:com|net|org|cn|cc|info|tw|COM|NET|CN)\b|．com|@"
    rf"|{SITES_SAY.pattern}|{OTHERS_TOO.pattern}"
)
LONGEST_NOTICE = 50  # characters a point of the score
LEAST_STORY = 8  # characters

STAMP = re.compile(
    r"^.{0,40}(?:更新时间|更新時間|更新日期|发布时间|本章字数|本章字數|字数|字數)[ 　]*[:：]"
    r"[ 　]*\d.{0,60}\n?",
    re.MULTILINE,
)
PAGE_MARK = re.compile(
    r"分[节節]阅读[_＿ ]*\d+|[（(]第\d+[/／]\d+[页頁][）)]"
    r"|\n[-—－ ]*(?:第 ?\d{1,4} ?[页頁]|[-—－] *\d{1,4} *[-—－])[-—－ ]*(?=\n|\Z)"
)
AROUND_MARK = "_＿" + "\n" + BLANK
FURNITURE = re.compile(
    rf"^[ \t　]*(?:[-=*_~#＝＿＊※☆★◆]{{5,}}|[-=*_ ]*章节内容(?:开始|结束)[-=*_ ]*|第{NUMERAL}部分"
    r"|[（(【]?(?:本章完|本章未完|未完待续|未完待續|待续|全书完|全書完)[）)】]?"
    r"|《[^，。\n]{1,20}》[ 　]*作者[ 　]*[:：;；].{1,12}"
    r"|[\[【][^，。\n]{1,20}[/／][^，。\n]{2,12}著[ 　]*[\]】])[ \t　]*(?:\n|\Z)"
    r"|^[ \t　]*正文[ 　]+(?=第)",
    re.MULTILINE,
)
FEWEST_BROKEN = 10  # lines
CONTENTS = 4  # more headings than that with nothing between them are a table of contents
WORDS = re.compile(r"[A-Za-z,]\s*[A-Za-z]")  # English words need a space between them


def stamps(text: str) -> Iterator[Edit]:
    """Lines with a time of update or a count of words."""
    return replace(STAMP, "", text)


def page_marks(text: str) -> Iterator[Edit]:
    """Page marks; a sentence that one cuts is joined again."""
    for match in PAGE_MARK.finditer(text):
        start, end = match.span()
        while start and text[start - 1] in AROUND_MARK:
            start -= 1
        while end < len(text) and text[end] in AROUND_MARK:
            end += 1
        indented = text[match.end() : end].endswith(("　", "  "))
        heading = HEADING.match(text, text.rfind("\n", 0, start) + 1)
        apart = indented or heading or text.endswith(SENTENCE_END, 0, start)
        yield start, end, "\n" if start == 0 or apart else ""


def notices(text: str) -> Iterator[Edit]:
    """Advertisements and notices of sites: whole lines, else the address alone."""
    last = 0
    for start, end in lines_with(NOTICE, text):
        line = text[start:end]
        if _is_notice(line, enough=1 if last and not text[last:start].strip() else 3):
            yield start, min(end + 1, len(text)), ""
            last = end
        else:
            for match in URL.finditer(line):
                yield start + match.start(), start + match.end(), ""


def _is_notice(line: str, enough: int) -> bool:
    """Score 2 for an address or a word that only sites say, 1 for a word that others say too.

    A long line is story with an address in it; one that is hardly more than the address is not.
    """
    addresses = URL.findall(line)
    rest = len(line.strip()) - sum(map(len, addresses))
    score = 2 * bool(addresses)
    score += 2 * len(set(SITES_SAY.findall(line))) + len(set(OTHERS_TOO.findall(line)))
    if addresses and rest <= LEAST_STORY:
        return True
    return score >= enough and rest <= LONGEST_NOTICE * score


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


def hard_wrap(text: str) -> Iterator[Edit]:
    """Lines that were broken at a fixed width become paragraphs again."""
    lines = [match.span() for match in re.finditer(r".*\S", text)]
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

    Hard-wrapped text has a quarter of its lines full without a sentence's end.
    """
    widest = sorted(widths)[len(widths) * 95 // 100] if widths else 0
    full = widest - 6
    broken = sum(
        width >= full and not text.endswith(SENTENCE_END, start, end)
        for (start, end), width in zip(lines, widths, strict=True)
    )
    enough = max(FEWEST_BROKEN, len(lines) / 4)
    return full if 20 < widest <= 120 and broken > enough else 0
