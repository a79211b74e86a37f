"""Did it copy? What generated texts share with the training text.

Characters are compared after NFC, white space aside; nothing shared runs across two documents. The
training text is read a document at a time, so it may be far larger than memory.
"""

import unicodedata
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import pandas as pd
from tqdm import tqdm

from wuxia_core.evaluate.context import EvalContext, Tables
from wuxia_core.evaluate.statistics import FEWEST, Metric, Row, compare, group_difference
from wuxia_core.mixing import TRAIN, VALIDATION
from wuxia_core.model import document_start_id
from wuxia_core.write import continued

# Characters. 14,853 chunks of 200 characters of six old novels share 6 or 7 with the other five
# (median), 99 % at most 11, and none over 19 but a poem that two of them quote.
FLAGGED = 30
SEEDS = (8, 4, 1)  # characters
AROUND = 20  # characters shown on either side of a passage
PREFIX, STRETCH = 50, 100  # tokens; of a stretch all but the prefix are to be said
NEAR = 0.9  # normalised Levenshtein similarity
PREFIXES = 50  # of each kind
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
        for title, text in tqdm(documents() if index else (), "copying", leave=False):
            document = _squeeze(text)
            for at in range(len(document) - n + 1):
                for number, start in index.get(document[at : at + n], ()):
                    size = _longer_run(squeezed[number], start, document, at, found[number][-1])
                    if size > found[number][-1]:
                        shown = _in_brackets(squeezed[number], start, size)
                        found[number] = (shown, _in_brackets(document, at, size), title, size)
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


def _in_brackets(text: str, start: int, length: int) -> str:
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
    both = zip(_drawn(context, TRAIN), _drawn(context, VALIDATION), strict=True)
    base, tuned = (_by_document(pd.concat(tables, ignore_index=True)) for tables in both)
    total = base["prefixes"].sum()
    unit = f"share of {total} prefixes continued nearly word for word, trained − held out"
    columns = ["trained", "near", "prefixes"]
    metric = Metric("extraction_near", unit, "training", group_difference(*columns))
    return compare(metric, base[columns], tuned[columns], context.seed)


def _drawn(context: EvalContext, split: str) -> Tables:
    """Let base and tuned continue prefixes of a split's documents, a row a prefix."""
    documents = context.documents("wuxia", split)

    def draw(chosen: Sequence[int]) -> pd.DataFrame:
        count = -(-PREFIXES * len(chosen) // len(documents))  # rounded up
        found = extraction(context, context.mixture.texts(chosen), count)
        numbers = found["document"].map(chosen.__getitem__)
        return found.assign(trained=split == TRAIN, document=numbers, prefixes=1)

    chunks = context.within_budget("documents drawn from", documents, 10, 0.05)
    return context.measure_both(draw, chunks)


def _by_document(every: pd.DataFrame) -> pd.DataFrame:
    """Sum prefixes by document; of fewer than six documents, leave the prefixes as they are."""
    documents = every.groupby(["trained", "document"], sort=False)[["near", "prefixes"]].sum()
    few = documents.groupby("trained").size().min() < FEWEST
    return every if few else documents.reset_index()


def extraction(context: EvalContext, documents: Sequence[str], count: int) -> pd.DataFrame:
    """Ask whether a model goes on as a document does: 50 tokens of it, then 50 greedy ones.

    Extraction as Carlini et al. (2023) define it; near-verbatim answers count as Ippolito et al.
    (2023) ask. `count` prefixes, fewer where the documents hold fewer stretches of 100 tokens, are
    spread over the documents; the seed chooses where in its document each stands.

    Returns
    -------
    A row a prefix: `document` (number), and `near`: whether the normalised Levenshtein similarity
    of what is said to what stands there is 0.9 or more.
    """
    from rapidfuzz.distance import Levenshtein

    tokenizer = context.tokenizer
    encoded = tokenizer(list(documents), add_special_tokens=False, split_special_tokens=True)
    ids, start_id = encoded.input_ids, document_start_id(tokenizer)
    places = _spread([len(row) // STRETCH for row in ids], count, context.seed)
    stretches = [ids[number][slot * STRETCH :][:STRETCH] for number, slot in places]
    prefixes = [[start_id, *stretch[:PREFIX]] for stretch in stretches]
    said = continued(context.model, tokenizer, prefixes, GREEDY) if places else []
    truths = [tokenizer.decode(stretch[PREFIX:], skip_special_tokens=True) for stretch in stretches]
    near = [likeness >= NEAR for likeness in map(Levenshtein.normalized_similarity, truths, said)]
    return pd.DataFrame({"document": [number for number, _ in places], "near": near})


def _spread(slots: Sequence[int], count: int, seed: int) -> list[tuple[int, int]]:
    """Draw (document, slot) pairs: one of each document before a second of any."""
    rng = np.random.default_rng(seed)
    drawn = [
        (turn, rng.random(), document, slot)
        for document, number in enumerate(slots)
        for turn, slot in enumerate(rng.permutation(number).tolist())
    ]
    return sorted((document, slot) for *_, document, slot in sorted(drawn)[:count])
