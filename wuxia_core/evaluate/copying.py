"""Measure copying: what generated texts share with the training text, and what is recited.

Characters are compared after NFC and without white space; a shared run lies in one document. The
training text is never in memory as a whole, so it may be far larger than the memory.
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

# A shared run of so many characters or more is flagged. For comparison, 14,853 chunks of 200
# characters were cut from six old novels. The longest run that such a chunk shares with the other
# five novels has 6 or 7 characters in the median, and at most 11 for 99 % of the chunks. No run is
# longer than 19, except in a poem that two of the novels quote.
FLAGGED = 30
LOOKED_UP = (8, 4, 1)  # characters of the runs that are looked up, each length in its own pass
AROUND = 20  # characters shown on either side of a run
PREFIX, STRETCH = 50, 100  # tokens; the model is to continue the prefix of a stretch to its end
# Least normalised Levenshtein similarity at which a continuation counts as recited.
MIN_SIMILARITY = 0.9
STRETCHES = 50  # that are drawn at most from training text, and at most from held-out text
Stretch = tuple[bool, int, list[int]]  # whether trained on, number of the document, token ids
# Settings of `model.generate`.
GREEDY = {"do_sample": False, "repetition_penalty": 1.0, "max_new_tokens": PREFIX}


def overlap(
    texts: Sequence[str], documents: Callable[[], Iterable[tuple[str, str]]]
) -> pd.DataFrame:
    """Find the longest run of characters that each of `texts` shares with the training text.

    `documents()` gives (title, text) of each training document. A first pass over the documents
    looks up each run of 8 characters, and follows a run that a text shares to its end. For texts
    that share no such run a second pass looks up runs of 4, and a third single characters. Give all
    texts in one call, since each pass reads all training text. `["一剑光寒"]` against `[("书",
    "他说：剑光！")]` gives length 2, `一【剑光】寒` and `他说：【剑光】！`.

    Returns
    -------
    A table with a row for each text: `generated`, the run in 【】 with at most 20 characters of the
    text on either side; `source`, the same in the document where a run of that length was found
    first; `title` of that document; `length` of the run; `flagged`, whether that is 30 characters
    or more. If nothing is shared, the strings are "" and `length` is 0.
    """
    squeezed = [_squeeze(text) for text in texts]
    longest = [0] * len(texts)  # characters of each text's longest run so far
    shown = [("", "", "")] * len(texts)  # generated, source, title
    for n in LOOKED_UP:
        unmatched = [text if longest[number] < n else "" for number, text in enumerate(squeezed)]
        index = _index(unmatched, n)
        training = documents() if index else ()  # no pass if no text is left to look up
        for title, text in tqdm(training, messages("bars")["copying"], leave=False):
            document = _squeeze(text)
            for place in range(len(document) - n + 1):
                for number, start in index.get(document[place : place + n], ()):
                    own = squeezed[number]
                    length = _length_if_longer(own, start, document, place, longest[number])
                    if length > longest[number]:
                        longest[number] = length
                        source = in_brackets(document, place, length)
                        shown[number] = (in_brackets(own, start, length), source, title)
    table = pd.DataFrame(shown, columns=["generated", "source", "title"])
    return table.assign(length=longest, flagged=[length >= FLAGGED for length in longest])


def strip_whitespace(text: str) -> str:
    """Return a text without any white space: `"一二"` for `" 一 二"`."""
    return "".join(text.split())


def _squeeze(text: str) -> str:
    """Return a text with its characters composed (NFC), without white space."""
    return strip_whitespace(unicodedata.normalize("NFC", text))


def _index(texts: Sequence[str], n: int) -> dict[str, list[tuple[int, int]]]:
    """Map every run of `n` characters in `texts` to its places: (number of a text, start in it)."""
    index = defaultdict(list)
    for number, text in enumerate(texts):
        for start in range(len(text) - n + 1):
            index[text[start : start + n]].append((number, start))
    return index


def _length_if_longer(text: str, start: int, document: str, place: int, longest: int) -> int:
    """Return how many characters `text` from `start` and `document` from `place` have in common.

    `longest` is the most that was found so far. If they have no more in common than that, `longest`
    itself is returned: the caller only looks for a longer run.
    """
    end = start + longest  # so the first comparison is of `longest` + 1 characters at once
    while end < len(text) and document.startswith(text[start : end + 1], place):
        end += 1
    return end - start


def in_brackets(text: str, start: int, length: int) -> str:
    """Return a run of a text's characters in 【】, with at most 20 characters on either side.

    The run has `length` characters from `start` on: in `他说：剑光！` with 3 and 2 it is
    `他说：【剑光】！`.
    """
    end = start + length
    return f"{text[max(0, start - AROUND) : start]}【{text[start:end]}】{text[end : end + AROUND]}"


def longest_runs(overlaps: pd.DataFrame, count: int = 10) -> pd.DataFrame:
    """Choose the rows of `overlaps` with the longest runs, longest first, at most `count`.

    `overlaps` is a table that `overlap` returned. Rows without a shared run are left out. If two
    runs are equally long, that of the earlier text comes first. The new column `text` has the
    number of each row's text: its index in `overlaps`.
    """
    shared = overlaps[overlaps["length"] > 0].sort_values("length", ascending=False, kind="stable")
    return shared.head(count).rename_axis("text").reset_index()


def score_extraction(context: EvalContext) -> Row:
    """Compare base and tuned by the share of prefixes that they recite: the row of the scorecard.

    The figure of each model is the share of training prefixes that it recites, less the share of
    held-out prefixes; the column `near` of `extraction` says which are recited. Documents are
    resampled, since prefixes of one document are not independent. If training or held-out text has
    fewer than six documents, prefixes are resampled instead. If neither model recites a prefix, the
    interval is that of zero cases.
    """
    pairs = zip_longest(*(stretches(context, split) for split in (TRAIN, VALIDATION)))
    # Training and held-out stretches take turns, so that as many of each are measured if time runs
    # out. `zip_longest` has filled up the shorter list with None.
    alternating = [stretch for pair in pairs for stretch in pair if stretch]
    # 20 at a time, for at most 10 % of the evaluation's minutes
    chunks = context.within_budget("prefixes continued", alternating, 20, 0.1)
    base, tuned = map(_by_document, context.measure_both(partial(extraction, context), chunks))
    unit = "share of prefixes continued nearly word for word, trained − held out"
    columns = ["trained", "near", "prefixes"]
    metric = Metric("extraction_near", unit, "training", group_difference(*columns))
    row = compare(metric, base[columns], tuned[columns], context.seed)
    if row["delta"] is not None and not (base["near"].any() or tuned["near"].any()):
        # Rule of three: if none of n cases has a property, the 95 % bound of its share is 3 / n
        # (Hanley & Lippman-Hand 1983).
        row["high"] = 3 / base.loc[base["trained"], "prefixes"].sum()
        row["low"] = -row["high"]
    return row


def stretches(context: EvalContext, split: str) -> list[Stretch]:
    """Draw 50 stretches of 100 tokens from the novels of a split, or as many as there are.

    They come from at most `evaluation.max_documents` documents. Each document is divided into
    stretches from its start; a shorter rest is left out. The seed chooses among the stretches at
    random, but a document gives a second one only if every document that has a stretch has given
    one.
    """
    documents, rng = context.documents("wuxia", split), np.random.default_rng(context.seed)
    texts, tokenizer = context.mixture.texts(documents), context.tokenizer
    encode = partial(tokenizer, add_special_tokens=False, split_special_tokens=True)
    encoded = encode(texts).input_ids if texts else []
    # A slot is the number of a stretch in its document, in random order; a turn is 0 for the first
    # slot of a document, 1 for the second. The `return` sorts by turn, then by the random number.
    drawn = [
        (turn, rng.random(), number, ids[slot * STRETCH : (slot + 1) * STRETCH])
        for number, ids in zip(documents, encoded, strict=True)
        for turn, slot in enumerate(rng.permutation(len(ids) // STRETCH).tolist())
    ]
    return [(split == TRAIN, number, ids) for *_, number, ids in sorted(drawn)[:STRETCHES]]


def extraction(context: EvalContext, drawn: Sequence[Stretch]) -> pd.DataFrame:
    """Let the model continue the first 50 tokens of each stretch by 50 more, greedily.

    Greedily means that each new token is the likeliest one. `drawn` are stretches from `stretches`.
    This is extraction as Carlini et al. (2023) define it, but continuations that are nearly
    verbatim count too, as Ippolito et al. (2023) ask.

    Returns
    -------
    A table with a row for each stretch: `trained`, whether it is training text; `document`, the
    number of its document; `near`, whether the prefix is recited, that is, whether the continuation
    has a normalised Levenshtein similarity of 0.9 or more to the document's own; `prefixes`, always
    1.
    """
    from rapidfuzz.distance import Levenshtein

    tokenizer = context.tokenizer
    start_id = document_start_id(tokenizer)
    texts = context.continue_rows([[start_id, *ids[:PREFIX]] for *_, ids in drawn], GREEDY)
    # The document's own continuations.
    truths = [tokenizer.decode(ids[PREFIX:], skip_special_tokens=True) for *_, ids in drawn]
    similarities = map(Levenshtein.normalized_similarity, truths, texts)
    table = pd.DataFrame(drawn, columns=["trained", "document", "ids"]).drop(columns="ids")
    return table.assign(near=[value >= MIN_SIMILARITY for value in similarities], prefixes=1)


def _by_document(prefixes: pd.DataFrame) -> pd.DataFrame:
    """Sum the rows of `extraction` by document, or return them unchanged.

    They are returned unchanged if training text, or held-out text, has some documents but fewer
    than six: then there are too few sums to resample.
    """
    # Without a prefix the table has no columns; `reindex` gives it empty ones.
    prefixes = prefixes.reindex(columns=["trained", "document", "near", "prefixes"])
    documents = prefixes.groupby(["trained", "document"], sort=False)[["near", "prefixes"]].sum()
    few = documents.groupby("trained").size().min() < FEWEST
    return prefixes if few else documents.reset_index()
