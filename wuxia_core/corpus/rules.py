"""Rules of cleaning for any text; a rule's docstring says what it does.

A rule looks at a text and proposes edits, in order and apart from each other.
"""

import html
import re
from collections.abc import Callable, Iterator

from wuxia_core.corpus.chapters import HEADING

Edit = tuple[int, int, str]  # text[start:end] becomes this

BLANK = " \t\xa0　"
HAN = "\u3400-\u4dbf\u4e00-\u9fff〇"
CJK = rf"{HAN}，。：；？！、“”‘’「」『』《》（）…—"
CJK_TEXT, PUNCTUATION = re.compile(f"[{CJK}]"), re.compile("[，。：；？！]")
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
# ，。的你在是我同不了这 and an opening quotation mark as they look when UTF-8 is read as GBK
AS_GBK = "[锛銆鐨浣鍦鏄鎴鍚涓浜杩鈥]"
MISREAD = re.compile(rf"[\xc0-\xff][\x80-\xff\u0152-\u2122]|{AS_GBK}")
MISREADINGS = (("gb18030", "utf-8"), ("cp1252", "utf-8"), ("cp1252", "gb18030"),
               ("latin-1", "utf-8"), ("latin-1", "gb18030"))  # fmt: skip
OFTEN = AS_GBK.replace("浣", "")  # a name may have it three times
GARBLED = re.compile(rf"锟斤拷|烫{{6}}|屯{{6}}|{OFTEN}(?:[^\n]{{0,20}}{OFTEN}){{2}}")
GARBLED_SENTENCE = re.compile(rf"[^。！？\n]{{0,200}}?(?:{GARBLED.pattern})[^。！？\n]{{0,200}}")
LONG_LINE = 500  # characters

# Where GB18030-2000, which Python has, put into private use what GB18030-2022 gives a place.
STANDARD = dict(zip(map(chr, range(0xE78D, 0xE797)), "︐︒︑︓︔︕︖︗︘︙", strict=True)) | dict(
    zip("\ue81e\ue826\ue82b\ue82c\ue832\ue843\ue854\ue864\ue816\ue817\ue818\ue831\ue83b\ue855",
        "龴龵龶龷龸龹龺龻𠂇𠂉𠃌𡗗𢦏𤇾", strict=True)
)  # fmt: skip


def replace(
    pattern: re.Pattern[str] | str, new: str | Callable[[re.Match[str]], str], text: str
) -> Iterator[Edit]:
    """Propose to replace every match."""
    for match in re.finditer(pattern, text):
        yield *match.span(), new if isinstance(new, str) else new(match)


def lines_with(pattern: re.Pattern[str], text: str) -> Iterator[tuple[int, int]]:
    """Find the lines in which a pattern occurs, each once."""
    end = -1
    for match in pattern.finditer(text):
        if match.start() > end:
            start = text.rfind("\n", 0, match.start()) + 1
            end = line_end(text, match.start())
            yield start, end


def line_end(text: str, place: int) -> int:
    """Find where the line that holds a place ends."""
    end = text.find("\n", place)
    return len(text) if end < 0 else end


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


def mojibake(text: str) -> Iterator[Edit]:
    """Lines that were decoded wrongly once and can be decoded back."""
    for start, end in lines_with(MISREAD, text):
        repaired = _repaired(text[start:end])
        if repaired is not None:
            yield start, end, repaired


def _repaired(line: str) -> str | None:
    """Undo a wrong decoding; None unless that gives nothing but ordinary text."""
    for wrong, right in MISREADINGS:
        try:
            repaired = line.encode(wrong).decode(right)
        except UnicodeError:
            continue
        if len(re.findall(f"[{CJK}]", repaired)) > 0.8 * len(repaired.strip()):
            return repaired
    return None


def garbled(text: str) -> Iterator[Edit]:
    """Lines of 锟斤拷 and the like, which nothing can recover; of a long line a sentence."""
    for start, end in lines_with(GARBLED, text):
        if end - start <= LONG_LINE:
            yield start, min(end + 1, len(text)), ""
        else:
            for match in GARBLED_SENTENCE.finditer(text, start, end):
                yield *match.span(), ""


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
