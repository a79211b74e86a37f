"""What is typical of some texts against others: characters, words, idioms, named moves."""

import re
from collections import Counter
from collections.abc import Iterable
from typing import Literal

import numpy as np
import pandas as pd

from wuxia_core.corpus.rules import HAN

ONLY_HAN = re.compile(f"[{HAN}]+")
USE = "(?:使|用|施展|打|走|来|卖|摆)[了出开的动]?一?[个招路着]"
KIND = "(?:的|之)?(?:架势|架子|身法|招数|招式|招|势|式|解数|家数)"
MOVE = re.compile(f"{USE}(?:[“「『]([{HAN}]{{4}})[”」』]|[“「『]?([{HAN}]{{3,5}}?)[”」』]?{KIND})")
PRIOR = 1000.0  # strength of the prior, in words


def count(texts: Iterable[str], unit: Literal["word", "character"] = "word") -> "Counter[str]":
    """Count the words or the characters, Chinese ones only; rjieba finds the words."""
    import rjieba

    return _chinese(rjieba.cut(text) if unit == "word" else text for text in texts)


def _chinese(parts: Iterable[Iterable[str]]) -> "Counter[str]":
    counts: Counter[str] = Counter()
    for words in parts:
        counts.update(words)
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
    table = {
        "here": here / max(1.0, here.sum()) * 10_000,
        "there": there / max(1.0, there.sum()) * 10_000,
        "z": (np.log(odds[0]) - np.log(odds[1])) / deviation,
    }
    return pd.DataFrame(table, index=words).sort_values("z", ascending=False, kind="stable")


def idioms(texts: Iterable[str]) -> "Counter[str]":
    """Count the words of four characters that jieba's dictionary has, most of them idioms."""
    import rjieba

    known = _chinese(rjieba.cut(text, hmm=False) for text in texts)
    return Counter({word: n for word, n in known.items() if len(word) == 4})


def moves(texts: Iterable[str]) -> "Counter[str]":
    """Count what the text calls a move: 使一招白鹤亮翅式, 使了个“毒蛇出洞”."""
    return Counter(match[1] or match[2] for text in texts for match in MOVE.finditer(text))
