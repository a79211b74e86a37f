"""Words: cut with a user's lexicon, told apart by class, counted and compared.

The lexicon has the say in where words end: 使一招白鹤亮翅 -> 使, 一招, 白鹤亮翅.
"""

import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from io import StringIO
from itertools import chain
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import pandas as pd

from wuxia_core.errors import ConfigError
from wuxia_core.text import HAN, codes

# From weak to strong: a token that covers several characters is of the strongest class among them.
PUNCTUATION, FUNCTION, CONTENT, IDIOM = range(4)
CLASSES = ("punctuation", "function character", "content word", "four-character idiom")

# Particles, pronouns, prepositions, conjunctions, adverbs, measure words and the like of old and
# new prose: characters whose use is grammar, after the 虚词 of 吕叔湘 (1980), 现代汉语八百词.
FUNCTION_CHARACTERS = frozenset(
    "的了着过得地之乎者也矣焉哉耳兮吗呢吧啊呀么哩罢嘛哪啦我你他她它咱俺尔汝吾余彼此这那其某谁何哪怎甚"
    "在于从自由向往朝对为给替把将被让叫使比同与和跟及以因用按据且而则虽但却若如便就才又再也都只还更最很太"
    "甚颇极皆俱均各每已曾正方即既遂乃莫勿毋未非无不没别是有等些个们所者第几来去上下里中内外前后间"
)
FOUR = re.compile(r"[\u3400-\u9fff\U00020000-\U0003ffff]{4}")
# One mark opens and its like closes; a straight one does both.
QUOTES = ("“”", "「」", "『』", "‘’", '""')
QUOTED = re.compile("|".join(rf"{x[0]}(?:[^{x[1]}\n]*){x[1]}?" for x in QUOTES))

ONLY_HAN = re.compile(f"[{HAN}]+")
NO_WORD = re.compile("[^\\w·・•‧'’-]")  # in a line of a lexicon
USE = "(?:使|用|施展|打|走|来|卖|摆)[了出开的动]?一?[个招路着]"
KIND = "(?:的|之)?(?:架势|架子|身法|招数|招式|招|势|式|解数|家数)"
MOVE = re.compile(f"{USE}(?:[“「『]([{HAN}]{{4}})[”」』]|[“「『]?([{HAN}]{{3,5}}?)[”」』]?{KIND})")
PRIOR = 1000.0  # strength of the prior, in words

Classes = npt.NDArray[np.int8]


def read_lexicon(path: Path) -> tuple[str, ...]:
    """Read a lexicon: UTF-8, one word a line; lines that start with `#` are comments.

    White space around a word is not part of it.

    Raises
    ------
    ConfigError
        The file cannot be read or holds no word; a line is blank, is not one word of two
        characters or more, or is there twice.
    """
    lines: dict[str, int] = {}  # word → its line
    for number, line in enumerate(StringIO(_read(path)), 1):
        word = line.strip()
        if word.startswith("#"):
            continue
        if fault := _fault(word, lines.get(word)):
            raise ConfigError(f"data.lexicon {path}:{number}: {word or repr(word)} {fault}")
        lines[word] = number
    if not lines:
        raise ConfigError(f"data.lexicon {path}: holds no word; write one a line or set it to null")
    return tuple(lines)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        why = f"cannot be read ({error.strerror}); correct it or set it to null"
        raise ConfigError(f"data.lexicon {path}: {why}") from None
    except UnicodeDecodeError as error:
        line, byte = error.object.count(b"\n", 0, error.start) + 1, error.object[error.start]
        why = f"byte 0x{byte:02x} is not UTF-8; save the file as UTF-8"
        raise ConfigError(f"data.lexicon {path}:{line}: {why}") from None


def _fault(word: str, earlier: int | None) -> str | None:
    """Say what is wrong with a word, or with a line that should be one; None where nothing is."""
    if not word:
        return "is no word; delete the blank line"
    if len(word.split()) > 1:
        return "holds a space; write one word a line and nothing behind it"
    if mark := NO_WORD.search(word):
        return f"holds {mark.group()!r}; write one word a line, with letters and ·, - or ’ alone"
    if len(word) == 1:
        return "is one character, which cannot be cut; write the whole word or delete the line"
    if earlier:
        return f"stands already on line {earlier}; delete one of them"
    return None


class Segmenter:
    """Cuts text into words: those of the lexicon wherever they stand, rjieba's between them.

    The lexicon is not added to rjieba's dictionary, where it would only be a hint: rjieba weighs
    its words against all others by frequency, and still joins some to a neighbour (宋江便 is one
    word to it). It also stays out of the next Segmenter. Of matches that overlap the first counts,
    and of those that begin together the longest, so the order of the lexicon does not matter.
    The price: a short word is also found where it is none, 解穴 in 了解穴道.

    Parameters
    ----------
    lexicon
        Words of two characters or more, as `read_lexicon` gives them.
    """

    def __init__(self, lexicon: Collection[str] = ()) -> None:
        self._words = frozenset(lexicon)
        self._sizes = sorted({len(word) for word in self._words}, reverse=True)
        # whether a code point is some word's first or second: (2, 0x110000)
        self._opens = np.zeros((2, 0x110000), np.bool_)
        for word in self._words:
            self._opens[[0, 1], codes(word[:2])] = True

    def cut(self, text: str) -> list[str]:
        """Cut a text into words; joined, they are the text."""
        import rjieba

        words: list[str] = []
        behind = 0
        for start, end in self._matches(text):
            words += rjieba.cut(text[behind:start])
            words.append(text[start:end])
            behind = end
        words += rjieba.cut(text[behind:])
        return words

    def _matches(self, text: str) -> Iterator[tuple[int, int]]:
        """Find the words of the lexicon as spans [start, end), from left to right."""
        characters = codes(text)
        likely = self._opens[0, characters[:-1]] & self._opens[1, characters[1:]]
        behind = 0
        for start in np.flatnonzero(likely).tolist():
            ends = (start + n for n in self._sizes if text[start : start + n] in self._words)
            if start >= behind and (end := next(ends, 0)):
                yield start, end
                behind = end


def classes(text: str, segmenter: Segmenter) -> Classes:
    """Class of each character, (C,): an index of `CLASSES`.

    `他大惊失色。` gives 1 3 3 3 3 0. What is neither a word nor punctuation (digits, letters of
    other scripts) counts as content, white space as punctuation.
    """
    found = np.empty(len(text), np.int8)
    start = 0
    for word in segmenter.cut(text):
        end = start + len(word)
        found[start:end] = IDIOM if FOUR.fullmatch(word) else [_class(c) for c in word]
        start = end
    return found


def _class(character: str) -> int:
    if not character.isalnum():
        return PUNCTUATION
    return FUNCTION if character in FUNCTION_CHARACTERS else CONTENT


def dialogue(text: str) -> npt.NDArray[np.bool_]:
    """Whether each character stands inside quotation marks, (C,); a paragraph ends a quotation."""
    inside = np.zeros(len(text), np.bool_)
    for match in QUOTED.finditer(text):
        closed = match.group()[1:].endswith(("”", "」", "』", "’", '"'))
        inside[match.start() + 1 : match.end() - closed] = True
    return inside


def count(texts: Iterable[str], unit: Literal["word", "character"] = "word") -> "Counter[str]":
    """Count the words or the characters, Chinese ones only; rjieba finds the words."""
    import rjieba

    parts = (rjieba.cut(text) if unit == "word" else text for text in texts)
    counts = Counter(chain.from_iterable(parts))
    return Counter({word: n for word, n in counts.items() if ONLY_HAN.fullmatch(word)})


def typical(counts: "Counter[str]", reference: "Counter[str]") -> pd.DataFrame:
    """Rank words by how much more often they stand here than in the reference.

    Columns: `here` and `there` in uses per 10,000, and `z`, the log-odds ratio over its standard
    deviation under a Dirichlet prior from both texts (Monroe, Colaresi & Quinn 2008, "Fightin'
    Words", equations 15 to 22). Above 2 is more than chance.
    """
    words = sorted(set(counts) | set(reference))
    here, there = (np.array([c[word] for word in words], float) for c in (counts, reference))
    prior = PRIOR * (here + there) / max(1.0, here.sum() + there.sum())
    odds = [(n + prior) / (n.sum() + PRIOR - n - prior) for n in (here, there)]
    deviation = np.sqrt(1 / (here + prior) + 1 / (there + prior))
    table = pd.DataFrame({"here": here, "there": there}, words)
    table *= 10_000 / table.sum().clip(lower=1.0)
    table["z"] = (np.log(odds[0]) - np.log(odds[1])) / deviation
    return table.sort_values("z", ascending=False, kind="stable")


def idioms(texts: Iterable[str]) -> "Counter[str]":
    """Count the words of four characters that jieba's dictionary has, most of them idioms."""
    import rjieba

    words = chain.from_iterable(rjieba.cut(text, hmm=False) for text in texts)
    return Counter(word for word in words if len(word) == 4 and ONLY_HAN.fullmatch(word))


def moves(texts: Iterable[str]) -> "Counter[str]":
    """Count what the text calls a move: 使一招白鹤亮翅式, 使了个“毒蛇出洞”."""
    return Counter(match[1] or match[2] for text in texts for match in MOVE.finditer(text))
