"""Cut text into words with a user's lexicon, class its characters, count and compare its words.

A word of the lexicon is kept whole, unless it overlaps an earlier one: if 白鹤亮翅 is in it,
使一招白鹤亮翅 becomes 使, 一招 and 白鹤亮翅.
"""

import re
from collections import Counter
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import numpy.typing as npt

from wuxia_core.errors import ConfigError
from wuxia_core.text import HAN, codes

if TYPE_CHECKING:
    import pandas as pd

# From weak to strong: a token that covers several characters has the strongest of their classes.
PUNCTUATION, FUNCTION, CONTENT, IDIOM = range(4)
CLASSES = ("punctuation", "function character", "content word", "four-character idiom")

# Particles, pronouns, prepositions, conjunctions, adverbs, measure words and the like of old and
# new prose: characters whose use is grammar, after the 虚词 of 吕叔湘 (1980), 现代汉语八百词.
FUNCTION_CHARACTERS = frozenset(
    "的了着过得地之乎者也矣焉哉耳兮吗呢吧啊呀么哩罢嘛哪啦我你他她它咱俺尔汝吾余彼此这那其某谁何哪怎甚"
    "在于从自由向往朝对为给替把将被让叫使比同与和跟及以因用按据且而则虽但却若如便就才又再也都只还更最很太"
    "甚颇极皆俱均各每已曾正方即既遂乃莫勿毋未非无不没别是有等些个们所者第几来去上下里中内外前后间"
)
FOUR_HAN = re.compile(r"[\u3400-\u9fff\U00020000-\U0003ffff]{4}")  # four Chinese characters
# A quotation; of the five groups the one that matched is the text between the marks. A quotation
# that no mark closes ends with its line.
QUOTATION = re.compile(r"“([^”\n]*)”?|「([^」\n]*)」?|『([^』\n]*)』?|‘([^’\n]*)’?|\"([^\"\n]*)\"?")

DIGIT = "[一二三四五六七八九两几]"
# A numeral. A word of four characters with a numeral in it is no idiom: 一百二十, 十几年来. The
# pattern does not match the idiom 一五一十.
NUMERAL = re.compile(f"{DIGIT}[十百千万亿](?!$)|十{DIGIT}")
ONLY_HAN = re.compile(f"[{HAN}]+")  # a word or character that `count` counts
LEXICON_WORD = re.compile("[\\w·・•‧'’-]{2,}")
# A verb of using, then a move's name. The name is in quotation marks, 使了个“毒蛇出洞” (group 1),
# or stands before a word for "move", 使一招白鹤亮翅式 (group 2).
VERB = "(?:使|用|施展|打|走|来|卖|摆)[了出开的动]?一?[个招路着]"
NOUN = "(?:的|之)?(?:架势|架子|身法|招数|招式|招|势|式|解数|家数)"
MOVE = re.compile(f"{VERB}(?:[“「『]([{HAN}]{{4}})[”」』]|[“「『]?([{HAN}]{{3,5}}?)[”」』]?{NOUN})")
PRIOR_WORDS = 1000.0  # the prior in `typical` weighs as much as a text of this many words


def read_lexicon(path: Path) -> tuple[str, ...]:
    """Read a lexicon: UTF-8, one word a line; lines that start with `#` are comments.

    White space around a word is taken off. The words are in the order of the file.

    Raises
    ------
    ConfigError
        The file cannot be read or holds no word; a line is blank, or is not one word of two
        characters or more: letters, digits, hyphens, apostrophes and dots in the middle (·).
    """
    try:
        lines = path.read_text(encoding="utf-8-sig", errors="replace").splitlines()
    except OSError as error:
        problem = f"cannot be read ({error.strerror}); correct it or set it to null"
        raise ConfigError(f"data.lexicon {path}: {problem}") from None
    words: list[str] = []
    for number, line in enumerate(lines, 1):
        word = line.strip()
        if word.startswith("#"):
            continue
        if not LEXICON_WORD.fullmatch(word):
            form = "one word a line, two characters or more, letters and ·, - or ’ alone, in UTF-8"
            problem = f"{word!r} is no word; write {form}, or delete the line"
            raise ConfigError(f"data.lexicon {path}:{number}: {problem}")
        words.append(word)
    if not words:
        raise ConfigError(f"data.lexicon {path}: holds no word; write one a line or set it to null")
    return tuple(words)


class Segmenter:
    """Cuts text into words: those of the lexicon wherever they stand, rjieba's between them.

    The lexicon is not added to rjieba's dictionary, where it would only be a hint: rjieba weighs
    words by frequency, and still joins some to a neighbour (it takes 宋江便 for one word). The
    words would also stay there for the next Segmenter. If lexicon words overlap in a text, the
    first one is taken; if they begin at the same place, the longest. So the order of the lexicon
    does not matter. A drawback: a short word is also found where it is no word, such as 解穴 in
    了解穴道.

    Parameters
    ----------
    lexicon
        Words of two characters or more, as `read_lexicon` gives them.
    """

    def __init__(self, lexicon: Collection[str] = ()) -> None:
        self._words = frozenset(lexicon)
        self._lengths = sorted({len(word) for word in self._words}, reverse=True)
        # Row 0 flags the code points that are the first character of some word, row 1 those that
        # are the second: (2, 0x110000).
        self._begins = np.zeros((2, 0x110000), np.bool_)
        for word in self._words:
            self._begins[[0, 1], codes(word[:2])] = True

    def cut(self, text: str) -> list[str]:
        """Cut a text of C characters into words; joined, the words are the text."""
        import rjieba

        characters = codes(text)
        # Whether a word of the lexicon may begin at a character: (C - 1,).
        may_begin = self._begins[0, characters[:-1]] & self._begins[1, characters[1:]]
        words: list[str] = []
        done = 0  # the place where the last word of the lexicon ends
        for start in np.flatnonzero(may_begin).tolist():
            ends = (start + n for n in self._lengths if text[start : start + n] in self._words)
            end = next(ends, None)  # of the longest word that begins here
            if start >= done and end:
                words += [*rjieba.cut(text[done:start]), text[start:end]]
                done = end
        return words + rjieba.cut(text[done:])


def classes(text: str, segmenter: Segmenter) -> npt.NDArray[np.int8]:
    """Return the class of each of a text's C characters as an index of `CLASSES`: (C,).

    `他大惊失色。` gives 1 3 3 3 3 0. Digits and letters of other scripts count as content; white
    space and signs count as punctuation; every word of four Chinese characters counts as an idiom.
    """
    indices: list[int] = []
    for word in segmenter.cut(text):
        indices += [IDIOM] * 4 if FOUR_HAN.fullmatch(word) else map(_character_class, word)
    return np.array(indices, np.int8)


def _character_class(character: str) -> int:
    """Return the class, as an index of `CLASSES`, of a character that is not part of an idiom."""
    if not character.isalnum():
        return PUNCTUATION
    return FUNCTION if character in FUNCTION_CHARACTERS else CONTENT


def dialogue(text: str) -> npt.NDArray[np.bool_]:
    """Flag those of a text's C characters that stand between quotation marks: (C,).

    A quotation's own marks are not flagged, but the marks of a quotation inside it are. A quotation
    that is not closed ends with its line.
    """
    inside = np.zeros(len(text), np.bool_)
    for match in QUOTATION.finditer(text):
        start, end = match.span(match.lastindex or 0)  # one group always matched, so never 0
        inside[start:end] = True
    return inside


def count(texts: Iterable[str], unit: Literal["word", "character"] = "word") -> "Counter[str]":
    """Count the words of texts, as rjieba cuts them, or with `unit` "character" their characters.

    Only words and characters that consist of Chinese characters alone are counted.
    """
    import rjieba

    cut = rjieba.cut if unit == "word" else list
    counts = Counter(part for text in texts for part in cut(text))
    return Counter({part: n for part, n in counts.items() if ONLY_HAN.fullmatch(part)})


def typical(counts: "Counter[str]", reference: "Counter[str]") -> "pd.DataFrame":
    """Rank words by how much more often a text has them than a reference text.

    `counts` and `reference` are the numbers of uses of the words in the text and in the reference,
    as `count` returns them. The returned table has a row for each word of either; the word is the
    row's index. The columns `here` and `there` are the uses per 10,000 words in the text and in the
    reference. The column `z`, by which the rows are sorted from the highest on, is the log-odds
    ratio divided by its standard deviation, under a Dirichlet prior made from both texts (Monroe,
    Colaresi & Quinn 2008, "Fightin' Words", equations 15 to 22). A `z` above 2 is more than chance.
    """
    import pandas as pd

    # For now `here` and `there` are numbers of uses; below they become uses per 10,000 words.
    table = pd.DataFrame({"here": counts, "there": reference}, dtype=float).fillna(0).sort_index()
    totals = table.sum()
    # A word's share in the prior is its share in both texts together.
    with_prior = table.add(PRIOR_WORDS * table.sum(axis=1) / max(1, totals.sum()), axis=0)
    odds = with_prior / (totals + PRIOR_WORDS - with_prior)
    deviations = np.sqrt((1 / with_prior).sum(axis=1))
    table *= 10_000 / totals.clip(lower=1)  # a text may have no word
    table["z"] = np.log(odds["here"] / odds["there"]) / deviations
    return table.sort_values("z", ascending=False, kind="stable")


def idioms(texts: Iterable[str]) -> "Counter[str]":
    """Count the words of four Chinese characters in jieba's dictionary, most of them idioms.

    Words with a numeral in them, such as 一百二十, are not counted.
    """
    import rjieba

    # Without its hidden Markov model rjieba makes no words that its dictionary does not have.
    words = (word for text in texts for word in rjieba.cut(text, hmm=False))
    return Counter(word for word in words if FOUR_HAN.fullmatch(word) and not NUMERAL.search(word))


def moves(texts: Iterable[str]) -> "Counter[str]":
    """Count the names of moves: 白鹤亮翅 in 使一招白鹤亮翅式, 毒蛇出洞 in 使了个“毒蛇出洞”.

    A name is four characters in quotation marks, or three to five before a word for "move".
    """
    return Counter(match[1] or match[2] for text in texts for match in MOVE.finditer(text))
