"""Compare Chinese segmenters: speed, and whether idioms and moves keep their edges.

    python benchmarks/segmenters.py [NOVELS]

Cuts 1 MB of 三侠五义 (best of 3, alternately) and the 100 sentences of `phrases.tsv`, each with one
idiom or one move: `aligned` is the share whose start and end are word boundaries, `whole` the share
that is one word. Then counts how often the heroes' names in six novels are one word. jieba,
jieba_fast, cutword and thulac are no dependencies; those that are not installed are skipped. NOVELS
defaults to `WUXIA_CORPUS`, else `../shared/corpus`.
"""

import os
import sys
from collections.abc import Callable, Collection
from importlib import import_module
from importlib.metadata import version
from itertools import accumulate
from pathlib import Path
from time import perf_counter
from typing import Any

import pandas as pd
import rjieba

from wuxia_core import read_book
from wuxia_core.corpus import Segmenter, read_lexicon

Cut = Callable[[str], list[str]]

HERE = Path(__file__).parent
LEXICON = HERE.parent / "data" / "lexicon.txt"
MB = 1_000_000  # bytes of UTF-8
OTHERS: dict[str, Callable[[Any], Cut]] = {
    "jieba": lambda module: module.lcut,
    "jieba_fast": lambda module: module.lcut,
    "cutword": lambda module: module.Cutter().cutword,
    "thulac": lambda module: _first(module.thulac(seg_only=True)),
}
HEROES = {
    "三侠五义": ("展昭", "白玉堂"),
    "七剑十三侠": ("徐鸣皋", "罗季芳"),
    "儿女英雄传": ("何玉凤", "安骥"),
    "水浒传": ("宋江", "林冲"),
    "续小五义": ("徐良", "白芸生"),
    "绿牡丹": ("骆宏勋", "鲍自安"),
}


def _first(thulac: Any) -> Cut:
    return lambda text: [word for word, _ in thulac.cut(text)]


def added(words: Collection[str]) -> Cut:
    """Make an rjieba with the words added to its own dictionary, the way not taken."""
    jieba = rjieba.Jieba()
    for word, frequency in [(word, jieba.suggest_freq(word)) for word in words]:
        jieba.add_word(word, frequency, None)
    return jieba.cut


def segmenters(moves: Collection[str]) -> dict[str, Cut]:
    """Give every segmenter by its name and version."""
    cuts: dict[str, Cut] = {f"rjieba {version('rjieba')}": rjieba.cut}
    for name, make in OTHERS.items():
        try:
            cuts[f"{name} {version(name)}"] = make(import_module(name))
        except ImportError:
            print(f"{name} is not installed: skipped")
    cuts["rjieba, 50 moves added to it"] = added(moves)
    cuts["ours, data/lexicon.txt"] = Segmenter(read_lexicon(LEXICON)).cut
    cuts["ours, lexicon of the 50 moves"] = Segmenter(moves).cut
    return cuts


def speeds(cuts: dict[str, Cut], text: str) -> dict[str, float]:
    """Best of three in MB/s, the segmenters taking turns."""
    best = dict.fromkeys(cuts, 0.0)
    for _ in range(3):
        for name, cut in cuts.items():
            start = perf_counter()
            cut(text)
            best[name] = max(best[name], len(text.encode()) / MB / (perf_counter() - start))
    return best


def kept(cut: Cut, phrase: str, sentence: str) -> tuple[bool, bool]:
    """Whether a phrase is aligned, and whether it is whole."""
    words, start = cut(sentence), sentence.index(phrase)
    assert "".join(words) == sentence
    edges = [0, *accumulate(map(len, words))]
    aligned = {start, start + len(phrase)} <= set(edges)
    return aligned, phrase in words


def heroes(novels: Path) -> pd.Series:
    """Share of the heroes' names, wherever their letters stand, that are one word."""
    names = [name for pair in HEROES.values() for name in pair]
    cuts = {"rjieba": rjieba.cut, "names added to it": added(names), "ours": Segmenter(names).cut}
    texts = {book: read_book(novels / "wuxia" / f"{book}.txt").text for book in HEROES}
    there = sum(texts[book].count(name) for book, pair in HEROES.items() for name in pair)
    found = {
        way: sum(cut(texts[book]).count(name) for book, pair in HEROES.items() for name in pair)
        for way, cut in cuts.items()
    }
    return pd.Series(found) / there


if __name__ == "__main__":
    default = os.environ.get("WUXIA_CORPUS", "../shared/corpus")
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else default)
    phrases = pd.read_csv(HERE / "phrases.tsv", sep="\t")
    moves = list(phrases.phrase[phrases["class"] == "move"])
    cuts = segmenters(moves)
    text = read_book(folder / "wuxia" / "三侠五义.txt").text.encode()[:MB].decode(errors="ignore")
    table = pd.DataFrame({"MB/s": speeds(cuts, text)})
    for kind, rows in phrases.groupby("class"):
        pairs = list(zip(rows.phrase, rows.sentence, strict=True))
        for i, what in enumerate(("aligned", "whole")):
            shares = [
                sum(kept(cut, *pair)[i] for pair in pairs) / len(pairs) for cut in cuts.values()
            ]
            table[f"{kind}s {what}"] = shares
    print(table.to_string(float_format="{:.2f}".format), "\n")
    lexicon = read_lexicon(LEXICON)
    print(f"{len(set(moves) & set(lexicon))} of the {len(moves)} moves stand in data/lexicon.txt\n")
    print("names of twelve heroes that are one word")
    print(heroes(folder).to_string(float_format="{:.3f}".format))
