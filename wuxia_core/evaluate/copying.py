"""Measure copying: what generated texts share with the training text, and what is recited.

Characters are compared after NFC and without white space; a shared run lies in one document. The
training text is read a document at a time, so it may be far larger than memory.
"""

import unicodedata
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import zip_longest

import numpy as np
import pandas as pd
from tqdm import tqdm

from wuxia_core.evaluate.context import EvalContext
from wuxia_core.evaluate.statistics import FEWEST, Metric, Row, compare, group_difference
from wuxia_core.messages import messages
from wuxia_core.mixing import TRAIN, VALIDATION
from wuxia_core.model import document_start_id

# Characters. 14,853 chunks of 200 characters of six old novels share 6 or 7 with the other five
# (median), 99 % at most 11, and none over 19 but a poem that two of them quote.
FLAGGED = 30
SEEDS = (8, 4, 1)  # characters of the runs that are looked up, one pass each
AROUND = 20  # characters shown on either side of a run
PREFIX, STRETCH = 50, 100  # tokens; the model is to continue the prefix of a stretch to its end
NEAR = 0.9  # normalised Levenshtein similarity from which a continuation counts as recited
STRETCHES = 50  # of training text, and as many of held-out text
Stretch = tuple[bool, int, list[int]]  # whether trained on, number of the document, tokens
GREEDY = {"do_sample": False, "repetition_penalty": 1.0, "max_new_tokens": PREFIX}


def overlap(
    texts: Sequence[str], documents: Callable[[], Iterable[tuple[str, str]]]
) -> pd.DataFrame:
    """Find each text's longest common substring with the training text.

    `documents()` iterates over (title, text) of all training documents. A first pass over them
    looks up each run of 8 characters, and follows one that a text shares to its end. Texts that
    share no such run have a second pass by runs of 4, and a third by single characters. Give all
    texts at once, since each pass reads all training text. `["一剑光寒"]` against
    `[("书", "他说：剑光！")]` gives length 2, `一【剑光】寒` and `他说：【剑光】！`.

    Returns
    -------
    A row a text: `length` in characters; `flagged`, whether that is 30 or more; `generated`, the
    run in 【】 with 20 characters of the text on either side; `source`, the same of the first
    document that has the run; `title`, that document's. 0 and "" where nothing is shared.
    """
    squeezed = [_squeeze(text) for text in texts]
    best = [("", "", "", 0)] * len(texts)  # generated, source, title, length
    for n in SEEDS:
        unmatched = [t if row[-1] < n else "" for t, row in zip(squeezed, best, strict=True)]
        index = _index(unmatched, n)
        training = documents() if index else ()
        for title, text in tqdm(training, messages("bars")["copying"], leave=False):
            document = _squeeze(text)
            for place in range(len(document) - n + 1):
                for number, start in index.get(document[place : place + n], ()):
                    length = _longer_run(squeezed[number], start, document, place, best[number][-1])
                    if length > best[number][-1]:
                        generated = in_brackets(squeezed[number], start, length)
                        source = in_brackets(document, place, length)
                        best[number] = (generated, source, title, length)
    table = pd.DataFrame(best, columns=["generated", "source", "title", "length"])
    return table.assign(flagged=table["length"] >= FLAGGED)


def strip_whitespace(text: str) -> str:
    """Drop all white space of a text: `" 一 二"` becomes `"一二"`."""
    return "".join(text.split())


def _squeeze(text: str) -> str:
    """Compose characters (NFC), then drop all white space."""
    return strip_whitespace(unicodedata.normalize("NFC", text))


def _index(texts: Sequence[str], n: int) -> dict[str, list[tuple[int, int]]]:
    """Map every run of n characters to its places: pairs of a text's number and the start in it."""
    index = defaultdict(list)
    for number, text in enumerate(texts):
        for start in range(len(text) - n + 1):
            index[text[start : start + n]].append((number, start))
    return index


def _longer_run(text: str, start: int, document: str, place: int, longest: int) -> int:
    """Measure the run that `text` from `start` on and `document` from `place` on share.

    Where the run is no longer than `longest`, the result is `longest`.
    """
    end = start + longest
    while end < len(text) and document.startswith(text[start : end + 1], place):
        end += 1
    return end - start


def in_brackets(text: str, start: int, length: int) -> str:
    """Show a run of a text's characters in 【】, with 20 characters on either side."""
    end = start + length
    return f"{text[max(0, start - AROUND) : start]}【{text[start:end]}】{text[end : end + AROUND]}"


def longest_runs(overlaps: pd.DataFrame, count: int = 10) -> pd.DataFrame:
    """Choose the rows of `overlap` with the longest runs, longest first, at most `count`.

    Rows without a shared run are left out. The new column `text` has the number of each text.
    """
    shared = overlaps[overlaps["length"] > 0].sort_values("length", ascending=False, kind="stable")
    return shared.head(count).rename_axis("text").reset_index()


def score_extraction(context: EvalContext) -> Row:
    """Compare the share of prefixes that base and tuned recite, training less held-out text.

    Documents are resampled, since prefixes of one document are not independent. Where there are
    fewer than six documents of a kind, prefixes are resampled.
    """
    pairs = zip_longest(*(stretches(context, split) for split in (TRAIN, VALIDATION)))
    # Of both kinds in turn, so that where time runs out both are left with as many.
    alternating = [stretch for pair in pairs for stretch in pair if stretch]
    chunks = context.within_budget("prefixes continued", alternating, 20, 0.1)
    tables = context.measure_both(partial(extraction, context), chunks)
    base, tuned = map(_by_document, tables)
    total = base["prefixes"].sum()
    unit = f"share of {total} prefixes continued nearly word for word, trained − held out"
    columns = ["trained", "near", "prefixes"]
    metric = Metric("extraction_near", unit, "training", group_difference(*columns))
    return compare(metric, base[columns], tuned[columns], context.seed)


def stretches(context: EvalContext, split: str) -> list[Stretch]:
    """Draw 50 stretches of 100 tokens from 武侠 of a split; fewer where there are not so many.

    The seed chooses where in its document each stretch stands. Every document gives one stretch
    before any document gives a second.
    """
    documents, rng = context.documents("wuxia", split), np.random.default_rng(context.seed)
    texts, tokenizer = context.mixture.texts(documents), context.tokenizer
    encode = partial(tokenizer, add_special_tokens=False, split_special_tokens=True)
    encoded = encode(texts).input_ids if texts else []
    drawn = [
        (turn, rng.random(), number, ids[slot * STRETCH :][:STRETCH])
        for number, ids in zip(documents, encoded, strict=True)
        for turn, slot in enumerate(rng.permutation(len(ids) // STRETCH).tolist())
    ]
    return [(split == TRAIN, number, ids) for *_, number, ids in sorted(drawn)[:STRETCHES]]


def extraction(context: EvalContext, stretches: Sequence[Stretch]) -> pd.DataFrame:
    """Let the model continue the first 50 tokens of each stretch by 50 greedy ones.

    This is extraction as Carlini et al. (2023) define it. Continuations that are nearly verbatim
    count too, as Ippolito et al. (2023) ask.

    Returns
    -------
    A row a stretch: `trained` (bool); `document`, its number; `near`, whether the continuation has
    a normalised Levenshtein similarity of 0.9 or more to the document's own; `prefixes`, always 1.
    """
    from rapidfuzz.distance import Levenshtein

    tokenizer = context.tokenizer
    start_id = document_start_id(tokenizer)
    texts = context.continue_rows([[start_id, *ids[:PREFIX]] for *_, ids in stretches], GREEDY)
    truths = [tokenizer.decode(ids[PREFIX:], skip_special_tokens=True) for *_, ids in stretches]
    similarities = map(Levenshtein.normalized_similarity, truths, texts)
    table = pd.DataFrame(stretches, columns=["trained", "document", "ids"]).drop(columns="ids")
    return table.assign(near=[value >= NEAR for value in similarities], prefixes=1)


def _by_document(prefixes: pd.DataFrame) -> pd.DataFrame:
    """Sum the rows of `extraction` by document; unchanged where a kind has under six documents."""
    documents = prefixes.groupby(["trained", "document"], sort=False)[["near", "prefixes"]].sum()
    few = documents.groupby("trained").size().min() < FEWEST
    return prefixes if few else documents.reset_index()
