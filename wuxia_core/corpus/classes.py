"""What each character of a text is: punctuation, function character, idiom, content; dialogue.

The same classes serve the mask X-ray and masked recovery. Words are the segmenter's, so that an
idiom here is what spans of words hide whole: a word of four Chinese characters, which jieba's
dictionary has (rjieba carries it) or the user's lexicon.
"""

import re

import numpy as np
import numpy.typing as npt

from wuxia_core.corpus.segment import Segmenter

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
HAN = re.compile(r"[\u3400-\u9fff\U00020000-\U0003ffff]")
FOUR = re.compile(rf"{HAN.pattern}{{4}}")
# One mark opens and its like closes; a straight one does both.
QUOTES = (("“", "”"), ("「", "」"), ("『", "』"), ("‘", "’"), ('"', '"'))
QUOTED = re.compile("|".join(rf"{a}(?:[^{b}\n]*){b}?" for a, b in QUOTES))

Classes = npt.NDArray[np.int8]


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
