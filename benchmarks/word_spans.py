"""Measure how often a span cuts a word: spans of tokens against spans of words, in one run.

    python benchmarks/word_spans.py TOKENIZER

Judged on the hundred idioms and moves of `phrases.tsv`, each in a sentence of its own, and not on
what a segmenter takes for words. A span that touches one of them is aligned if it hides it whole.
TOKENIZER is a folder or hub name.
"""

import csv
import platform
import random
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd

from wuxia_core import SpanMasker
from wuxia_core.config import PROJECT
from wuxia_core.corpus import Segmenter, read_lexicon
from wuxia_core.masking import SPAN
from wuxia_core.mixing import encode_passage
from wuxia_core.model import load_tokenizer

PHRASES = Path(__file__).with_name("phrases.tsv")
PASSAGES, EPOCHS = 20, 50


def passages(rows: list[dict[str, str]]) -> Iterator[tuple[str, np.ndarray]]:
    """Join all sentences in random order; (C,) says which phrase a character belongs to, 0 none."""
    for seed in range(PASSAGES):
        order = random.Random(seed).sample(range(len(rows)), len(rows))
        text, owner = "", []
        for number in order:
            phrase, sentence = rows[number]["phrase"], rows[number]["sentence"]
            start = len(text) + sentence.index(phrase)
            text += sentence
            owner += [0] * (len(text) - len(owner))
            owner[start : start + len(phrase)] = [number + 1] * len(phrase)
        yield text, np.array(owner)


def spans(kinds: np.ndarray) -> np.ndarray:
    """Find the spans of a row as [start, end)."""
    edges = np.flatnonzero(np.diff(kinds == SPAN, prepend=False, append=False))
    return edges.reshape(-1, 2)


def measure(rows: list[dict[str, str]], tokenizer: object, segmenter: Segmenter | None) -> dict:
    """Count spans, those of 3 to 5 tokens, those that touch a phrase and those that cut none."""
    masker = SpanMasker()
    lengths, aligned = [], {"idiom": [], "move": []}
    for key, (text, owner) in enumerate(passages(rows)):
        window, offsets = encode_passage(text, tokenizer, segmenter or Segmenter())
        words = None if segmenter is None else np.repeat(window.word_ids[None], EPOCHS, axis=0)
        maskable = np.repeat(window.position_ids[None] > 0, EPOCHS, axis=0)
        sizes = np.bincount(owner)
        for row in masker.kinds(maskable, range(key * EPOCHS, (key + 1) * EPOCHS), 0, words):
            for start, end in spans(row):
                lengths.append(end - start)
                inside = owner[offsets[start - 1][0] : offsets[end - 2][1]]
                for number in set(inside[inside > 0].tolist()):
                    whole = (inside == number).sum() == sizes[number]
                    aligned[rows[number - 1]["class"]].append(whole)
    every = aligned["idiom"] + aligned["move"]
    return {
        "aligned": np.mean(every),
        "idioms": np.mean(aligned["idiom"]),
        "moves": np.mean(aligned["move"]),
        "3 to 5 tokens": np.mean((np.array(lengths) >= 3) & (np.array(lengths) <= 5)),
        "spans": len(lengths),
        "that touch": len(every),
    }


def main() -> None:
    """Print the table."""
    with PHRASES.open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    tokenizer = load_tokenizer(sys.argv[1])
    shipped = read_lexicon(PROJECT / "data" / "lexicon.txt")
    moves = [row["phrase"] for row in rows if row["class"] == "move"]
    ways = {
        "tokens": None,
        "words, no lexicon": Segmenter(),
        "words, data/lexicon.txt": Segmenter(shipped),
        "words, and the moves in the lexicon": Segmenter({*shipped, *moves}),
    }
    table = pd.DataFrame({name: measure(rows, tokenizer, way) for name, way in ways.items()}).T
    counts = {name: "{:.0f}".format for name in ("spans", "that touch")}
    print(f"python benchmarks/word_spans.py TOKENIZER, one of {len(tokenizer):,} tokens;", end=" ")
    print(f"Python {platform.python_version()}")
    print(f"{len(set(moves) & set(shipped))} of the 50 moves stand in data/lexicon.txt\n")
    print(table.to_string(float_format="{:.3f}".format, formatters=counts))


if __name__ == "__main__":
    main()
