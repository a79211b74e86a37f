"""How varied generated texts are: distinct-n, repetition, loops, self-BLEU.

Every figure moves with the length of a text, and distinct-n and self-BLEU with their number too:
compare only lists of as many texts, all cut to the same number of characters.

Distinct-n and self-BLEU belong to all texts together. So that a bootstrap over texts may draw them
like any other figure, each text is given its jackknife value (Efron & Tibshirani 1993, ch. 11):
what its absence changes. The texts' own shares would make intervals much too narrow.
"""

import heapq
from collections import Counter, defaultdict
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from wuxia_core.corpus.ngrams import Codes, codes, ngrams
from wuxia_core.errors import DataError

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Gram = tuple[str, ...]
Most = dict[Gram, list[tuple[int, int]]]

TIMES = 3  # a loop is a period written so often at the end of a text
LOOP = 30  # characters it covers at least, or a third of a shorter text
ORDER = 4  # of BLEU


def distinct_n(texts: Sequence[str], n: int) -> tuple[Floats, Ints]:
    """Count the different n-grams of characters of all texts together, and all of them.

    Distinct-n (Li et al. 2016, there of words) is the sum of the first over the sum of the second.
    The first is a text's jackknife value: the n-grams only it has, and an equal part of the shared.
    `["剑光", "剑影"]` with n 1 gives (1.5, 1.5) and (2, 2): 3 of 4.

    Returns
    -------
    (N,) and (N,), a value a text.

    Raises
    ------
    DataError
        Where no text has n characters.
    """
    grams = [ngrams(codes(text), n) for text in texts]
    total = np.array([len(row) for row in grams], np.int64)
    if not total.any():
        raise DataError(f"distinct-{n}: {len(texts)} texts, none of {n} characters or more")
    own = [np.unique(row) for row in grams]
    _, place, having = np.unique(np.concatenate(own), return_inverse=True, return_counts=True)
    owner = np.repeat(np.arange(len(own)), [len(row) for row in own])
    alone = np.bincount(owner[having[place] == 1], minlength=len(own))
    return alone + (len(having) - alone.sum()) / len(own), total


def repetition(text: str, n: int = 4) -> float:
    """Measure how much of a text repeats itself: 1 - unique/all n-grams of characters.

    It is rep-n of Welleck et al. (2020), of characters. `哈哈哈哈哈` with n 4 gives 1/2.

    Raises `DataError` where the text has fewer than n characters.
    """
    grams = ngrams(codes(text), n)
    if not len(grams):
        raise DataError(f"repetition: a text of {len(text)} characters, fewer than {n}")
    return 1 - len(np.unique(grams)) / len(grams)


def loops(text: str) -> bool:
    """Tell whether a text ends in a loop, by our own definition.

    At its end a period of any length stands at least 3 times in a row, cut off anywhere, and the
    repetitions cover at least 30 characters, or a third of a text shorter than 90.
    """
    characters = codes(text.rstrip())
    least = min(LOOP, len(characters) / 3)
    periods = range(1, len(characters) // TIMES + 1)
    return any(_run(characters, p) >= max(least, TIMES * p) for p in periods)


def _run(characters: Codes, period: int) -> int:
    """Count the characters at the end that repeat with a period."""
    differ = np.flatnonzero(characters[period:] != characters[:-period])
    return len(characters) - (int(differ[-1]) + 1 if len(differ) else 0)


def self_bleu(texts: Sequence[str]) -> Floats:
    """Score texts against all others as references; the mean, 0 to 100, is high where they agree.

    Self-BLEU (Zhu et al. 2018) of order 4, sacrebleu's sentence score over its `zh` tokens, which
    are single characters in Chinese. In linear time of n-grams, where pairs would take quadratic.

    Returns
    -------
    (N,), jackknife values: their mean is that of the texts' scores, a single one is no score.

    Raises
    ------
    DataError
        Where there are fewer than three texts.
    """
    from sacrebleu.metrics.bleu import BLEU
    from sacrebleu.metrics.helpers import extract_all_word_ngrams

    if len(texts) < 3:
        raise DataError(f"self-BLEU: {len(texts)} texts, fewer than 3")
    bleu = BLEU(tokenize="zh")
    found = [extract_all_word_ngrams(bleu.tokenizer(text.rstrip()), 1, ORDER) for text in texts]
    most = _most([grams for grams, _ in found])
    lengths = [length for _, length in found]
    scores = np.zeros((len(texts), len(texts)))  # of the row's text, without the column's
    for text, (grams, length) in enumerate(found):
        total, right = _matches(text, grams, most, len(texts))
        closest = _closest(text, lengths)
        for out, matches in enumerate(right.tolist()):
            near = closest[1] if out == closest[0] else closest[0]
            score = bleu.compute_bleu(matches, total, length, lengths[near], "exp", None, True)
            scores[text, out] = score.score
    own = scores.diagonal()  # nothing is left out: a text is no reference of its own
    without = (scores.sum(0) - own) / (len(texts) - 1)
    return np.asarray(own.mean() - (len(texts) - 1) * (without - without.mean()))


def _most(texts: Sequence[Counter[Gram]]) -> Most:
    """List for each n-gram the three texts with most of it, as (count, text)."""
    having: Most = defaultdict(list)
    for text, grams in enumerate(texts):
        for gram, count in grams.items():
            having[gram].append((count, text))
    return {gram: heapq.nlargest(3, pairs) for gram, pairs in having.items()}


def _matches(text: int, grams: Counter[Gram], most: Most, n: int) -> tuple[list[int], Ints]:
    """Count a text's n-grams, (ORDER,), and those another has, without each in turn, (n, ORDER)."""
    total, right = [0] * ORDER, [0] * ORDER
    lost = np.zeros((n, ORDER), np.int64)
    for gram, count in grams.items():
        total[len(gram) - 1] += count
        others = [pair for pair in most[gram] if pair[1] != text]
        (first, owner), (second, _) = (*others, (0, text), (0, text))[:2]
        right[len(gram) - 1] += min(count, first)
        lost[owner, len(gram) - 1] += min(count, first) - min(count, second)
    return total, np.array(right) - lost


def _closest(text: int, lengths: Sequence[int]) -> list[int]:
    """Find the two other texts nearest in length, the shorter first: BLEU's reference length."""
    others = [other for other in range(len(lengths)) if other != text]
    return heapq.nsmallest(
        2, others, key=lambda other: (abs(lengths[other] - lengths[text]), lengths[other])
    )
