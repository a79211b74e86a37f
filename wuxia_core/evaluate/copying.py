"""Did it copy? What generated texts share with the training text.

Characters are compared after NFC, white space aside; nothing shared runs across two documents. The
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
SEEDS = (8, 4, 1)  # characters
AROUND = 20  # characters shown on either side of a run
PREFIX, STRETCH = 50, 100  # tokens; of a stretch all but the prefix are to be said
NEAR = 0.9  # normalised Levenshtein similarity
PREFIXES = 50  # of each kind
Stretch = tuple[bool, int, list[int]]  # trained on, number of its document, tokens
GREEDY = {"do_sample": False, "repetition_penalty": 1.0, "max_new_tokens": PREFIX}


def overlap(
    texts: Sequence[str], documents: Callable[[], Iterable[tuple[str, str]]]
) -> pd.DataFrame:
    """Find each text's longest common substring with the training text.

    `documents` gives (title, text) of each training document, anew at each call. Runs of 8
    characters that both have are looked up and followed as far as they go; a text that shares none
    is looked for by runs of 4, then by single characters. Give all texts at once: the training text
    is read each time. `["一剑光寒"]` against `[("书", "他说：剑光！")]` gives length 2,
    `一【剑光】寒` and `他说：【剑光】！`.

    Returns
    -------
    A row a text: `length` in characters; `flagged`, 30 or more; the run in 【】 with 20 characters
    on either side as `generated`, and in the `source`, the first document that has it (`title`). 0
    and "" where nothing is shared.
    """
    squeezed = [_squeeze(text) for text in texts]
    found = [("", "", "", 0)] * len(texts)
    for n in SEEDS:
        rest = [t if row[-1] < n else "" for t, row in zip(squeezed, found, strict=True)]
        index = _index(rest, n)
        training = documents() if index else ()
        for title, text in tqdm(training, messages("bars")["copying"], leave=False):
            document = _squeeze(text)
            for at in range(len(document) - n + 1):
                for number, start in index.get(document[at : at + n], ()):
                    size = _longer_run(squeezed[number], start, document, at, found[number][-1])
                    if size > found[number][-1]:
                        shown = in_brackets(squeezed[number], start, size)
                        found[number] = (shown, in_brackets(document, at, size), title, size)
    table = pd.DataFrame(found, columns=["generated", "source", "title", "length"])
    return table.assign(flagged=table["length"] >= FLAGGED)


def strip_whitespace(text: str) -> str:
    """Drop all white space, inside the text too."""
    return "".join(text.split())


def _squeeze(text: str) -> str:
    """Compose characters (NFC) and drop the white space."""
    return strip_whitespace(unicodedata.normalize("NFC", text))


def _index(texts: Sequence[str], n: int) -> dict[str, list[tuple[int, int]]]:
    """Map every run of n characters to where it stands: number of a text, start in it."""
    index = defaultdict(list)
    for number, text in enumerate(texts):
        for start in range(len(text) - n + 1):
            index[text[start : start + n]].append((number, start))
    return index


def _longer_run(text: str, start: int, document: str, at: int, longest: int) -> int:
    """Measure the run that both have from two places on, `longest` where it is no longer."""
    end = start + longest
    while end < len(text) and document.startswith(text[start : end + 1], at):
        end += 1
    return end - start


def in_brackets(text: str, start: int, length: int) -> str:
    """Show a run of characters in 【】, with 20 on either side."""
    end = start + length
    return f"{text[max(0, start - AROUND) : start]}【{text[start:end]}】{text[end : end + AROUND]}"


def longest_runs(overlaps: pd.DataFrame, count: int = 10) -> pd.DataFrame:
    """Choose the longest runs of `overlap`'s table, longest first, at most `count` rows.

    `text` numbers the texts; those that share nothing are left out.
    """
    shared = overlaps[overlaps["length"] > 0].sort_values("length", ascending=False, kind="stable")
    return shared.head(count).rename_axis("text").reset_index()


def score_extraction(context: EvalContext) -> Row:
    """Say how much more often a training prefix draws out its text than one never trained on.

    Documents are resampled, since prefixes of one are not independent; prefixes where there are too
    few documents.
    """
    both = zip_longest(*(stretches(context, split) for split in (TRAIN, VALIDATION)))
    by_turns = [stretch for pair in both for stretch in pair if stretch]
    chunks = context.within_budget("prefixes continued", by_turns, 20, 0.1)
    sides = context.measure_both(partial(extraction, context), chunks)
    base, tuned = (_by_document(side) for side in sides)
    total = base["prefixes"].sum()
    unit = f"share of {total} prefixes continued nearly word for word, trained − held out"
    columns = ["trained", "near", "prefixes"]
    metric = Metric("extraction_near", unit, "training", group_difference(*columns))
    return compare(metric, base[columns], tuned[columns], context.seed)


def stretches(context: EvalContext, split: str) -> list[Stretch]:
    """Draw 50 stretches of 100 tokens of a split's documents, fewer where there are not so many.

    The seed chooses where in its document each stands; one of each comes before a second of any.
    """
    documents, rng = context.documents("wuxia", split), np.random.default_rng(context.seed)
    texts, how = context.mixture.texts(documents), {"add_special_tokens": False}
    encoded = context.tokenizer(texts, split_special_tokens=True, **how).input_ids if texts else []
    drawn = [
        (turn, rng.random(), number, ids[slot * STRETCH :][:STRETCH])
        for number, ids in zip(documents, encoded, strict=True)
        for turn, slot in enumerate(rng.permutation(len(ids) // STRETCH).tolist())
    ]
    return [(split == TRAIN, number, ids) for *_, number, ids in sorted(drawn)[:PREFIXES]]


def extraction(context: EvalContext, stretches: Sequence[Stretch]) -> pd.DataFrame:
    """Ask whether a model goes on as a document does: 50 tokens of it, then 50 greedy ones.

    Extraction as Carlini et al. (2023) define it; near-verbatim answers count as Ippolito et al.
    (2023) ask.

    Returns
    -------
    A row a stretch: `trained`, `document`, and `near`: whether the normalised Levenshtein
    similarity of what is said to what stands there is 0.9 or more; `prefixes` is 1.
    """
    from rapidfuzz.distance import Levenshtein

    tokenizer = context.tokenizer
    start_id = document_start_id(tokenizer)
    said = context.continue_rows([[start_id, *ids[:PREFIX]] for *_, ids in stretches], GREEDY)
    truths = [tokenizer.decode(ids[PREFIX:], skip_special_tokens=True) for *_, ids in stretches]
    near = [likeness >= NEAR for likeness in map(Levenshtein.normalized_similarity, truths, said)]
    table = pd.DataFrame(stretches, columns=["trained", "document", "ids"]).drop(columns="ids")
    return table.assign(near=near, prefixes=1)


def _by_document(every: pd.DataFrame) -> pd.DataFrame:
    """Sum prefixes by document; of fewer than six documents, leave the prefixes as they are."""
    documents = every.groupby(["trained", "document"], sort=False)[["near", "prefixes"]].sum()
    few = documents.groupby("trained").size().min() < FEWEST
    return every if few else documents.reset_index()
