"""Did it copy? What generated texts share with the training text.

Characters are compared after NFC, white space aside, on both sides; nothing shared runs across two
documents. The training text is read a document at a time, so it may be far larger than memory.
"""

import unicodedata
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd
from tqdm import tqdm

from wuxia_core.evaluate.statistics import FEWEST, EvalContext, Metric, Row, between, compare
from wuxia_core.mixing import TRAIN, VALIDATION
from wuxia_core.model import document_start_id
from wuxia_core.text import Codes, codes, ngrams

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


Documents = Callable[[], Iterable[tuple[str, str]]]
Places = npt.NDArray[np.int64]

# Characters. 14,853 pieces of 200 characters of six old novels share 6 or 7 with the other five
# (median), 99 % at most 11, and none over 19 but a poem that two of them quote.
FLAGGED = 30
RUN = 13  # characters, as mixing/leakage.py keeps held-out text apart
SEEDS = (8, 4, 2, 1)  # characters
BLOCK = 1 << 14  # characters hashed at a time
TABLE_BITS = np.uint64(20)
TEXT_END, BLOCK_END = 0x110000, 0x110001  # beyond Unicode, and not equal to each other
AROUND = 20  # characters shown on either side of a passage
COLUMNS = ["length", "passage", "generated", "start", "source", "offset", "title"]
NOTHING = (0, "", "", -1, "", -1, "")
PREFIX, NEAR = 50, 0.9  # tokens, and as many to be said; normalised Levenshtein similarity
ASKED, AT_ONCE = 50, 10  # prefixes of each kind; documents between looks at the clock


def overlap(texts: Sequence[str], documents: Documents) -> pd.DataFrame:
    """Find each text's longest common substring with the training text, and its known 13-grams.

    Runs of 8 characters that both have are found by a rolling hash (Karp & Rabin 1987) and compared
    as far as they go, so that colliding hashes change nothing; a text that shares none is looked
    for by runs of 4, 2 and 1. Give all texts at once: the training text is read each time.
    `["一剑光寒"]` against `[("书", "剑光")]` gives length 2, start 1, offset 0.

    Parameters
    ----------
    texts : sequence of str
        Empty ones share nothing.
    documents : callable
        Gives (title, text) of every training document anew each time it is called.

    Returns
    -------
    A row a text. `length` in characters, `passage`; the same in 【】 with 20 characters on either
    side as `generated` and in the `source`, the first document that has it (`title`); `start` in
    the text and `offset` in the document, in characters after NFC, white space too; 0, -1 and ""
    where nothing is shared. `flagged`: 30 characters or more. Of the text's `runs` of 13 characters
    `shared` stand in the training text (containment: Broder 1997).
    """
    sought = _Sought(texts)
    for n in SEEDS:
        index = _Index(sought, n, [row[0] < n for row in sought.rows])
        if index.size:
            for title, text in tqdm(documents(), "copying", unit="document", leave=False):
                sought.compare(index, title, _Written.of(text))
    table = pd.DataFrame(sought.rows, columns=COLUMNS)
    return table.assign(
        flagged=table["length"] >= FLAGGED,
        runs=np.bincount(sought.owner[sought.room >= RUN], minlength=len(texts)),
        shared=np.bincount(sought.owner[sought.known], minlength=len(texts)),
    )


class _Written(NamedTuple):
    """Characters of a text after NFC that are not white space, and where in it they stand."""

    characters: Codes
    places: Places

    @classmethod
    def of(cls, text: str) -> "_Written":
        characters = codes(unicodedata.normalize("NFC", text))
        places = np.flatnonzero((characters > 0x20) & (characters != 0x3000))
        return cls(characters[places], places)

    def show(self, start: int, length: int) -> tuple[str, str, int]:
        """Return a passage, the same in 【】 with what stands around it, and where it begins."""
        edges = [max(0, start - AROUND), start, start + length, start + length + AROUND]
        parts = [part.tobytes() for part in np.split(self.characters, edges)[1:4]]
        before, passage, after = (part.decode("utf-32-le", "surrogatepass") for part in parts)
        return passage, f"{before}【{passage}】{after}", int(self.places[start])


class _Sought:
    """The texts, one behind the other (Q,), and what of them was found so far."""

    def __init__(self, texts: Sequence[str]) -> None:
        self.texts = [_Written.of(text) for text in texts]
        lengths = np.array([len(text.characters) for text in self.texts], np.int64)
        parts = [np.append(text.characters, np.uint32(TEXT_END)) for text in self.texts]
        self.characters = np.concatenate([np.empty(0, np.uint32), *parts])
        self.owner = np.repeat(np.arange(len(texts)), lengths + 1)
        self.starts = np.cumsum(lengths + 1) - lengths - 1
        self.room = (self.starts + lengths)[self.owner] - np.arange(len(self.owner))  # to the end
        self.longest = int(lengths.max(initial=0))
        self.known = np.zeros(len(self.owner), np.bool_)  # a run of 13 begins here
        self.rows = [NOTHING] * len(texts)

    def compare(self, index: "_Index", title: str, source: _Written) -> None:
        """Look for the indexed texts in a document, a block at a time."""
        for first in range(0, len(source.characters), BLOCK):
            block = source.characters[first : first + BLOCK + self.longest]
            p, q = index.find(block)
            begins = (p == 0) | (block[p - 1] != self.characters[q - 1])  # else one to its left
            p, q = p[begins], q[begins]
            length = _extend(block, p, self.characters, q)
            for at in np.flatnonzero(length >= RUN):
                self.known[q[at] : q[at] + length[at] - RUN + 1] = True
            order = np.argsort(-length, kind="stable")
            owners, best = np.unique(self.owner[q[order]], return_index=True)
            for number, at in zip(owners.tolist(), order[best].tolist(), strict=True):
                if length[at] > self.rows[number][0]:
                    start, size = q[at] - self.starts[number], int(length[at])
                    there = source.show(first + p[at], size)[1:]
                    self.rows[number] = (size, *self.texts[number].show(start, size), *there, title)


class _Index:
    """Hashes of the runs of n characters of some of the texts, sorted, and where they stand."""

    def __init__(self, sought: _Sought, n: int, wanted: Sequence[bool]) -> None:
        places = np.flatnonzero((sought.room >= n) & np.array(wanted, np.bool_)[sought.owner])
        hashes = ngrams(sought.characters, n)[places]
        order = np.argsort(hashes, kind="stable")
        self.n, self.size = n, len(places)
        self._hashes, self._places = hashes[order], places[order]
        self._table = np.zeros(1 << int(TABLE_BITS), np.bool_)  # keeps most out of the search
        self._table[hashes >> (np.uint64(64) - TABLE_BITS)] = True

    def find(self, block: Codes) -> tuple[Places, Places]:
        """Pair places of a block and of the texts whose runs have one hash, (M,) each."""
        hashes = ngrams(block, self.n)
        p = np.flatnonzero(self._table[hashes >> (np.uint64(64) - TABLE_BITS)])
        left = np.searchsorted(self._hashes, hashes[p])
        count = np.searchsorted(self._hashes, hashes[p], "right") - left
        first = np.repeat(left - np.cumsum(count) + count, count)
        return np.repeat(p, count), self._places[first + np.arange(len(first))]


def _extend(block: Codes, p: Places, texts: Codes, q: Places) -> Places:
    """Count the characters that are equal from each pair of places on, (M,)."""
    block = np.append(block, np.uint32(BLOCK_END))
    length = np.zeros(len(p), np.int64)
    alive = np.arange(len(p))
    while len(alive):
        at = length[alive]
        alive = alive[block[p[alive] + at] == texts[q[alive] + at]]
        length[alive] += 1
    return length


def passages(overlaps: pd.DataFrame, count: int = 10) -> pd.DataFrame:
    """Show the longest passages of `overlap`'s table beside their source, longest first.

    At most `count` rows: number of the `text`, `length`, `flagged`, `generated`, `source`, `title`
    and `offset`. Texts that share nothing are left out.
    """
    shared = overlaps[overlaps["length"] > 0].sort_values("length", ascending=False, kind="stable")
    columns = ["length", "flagged", "generated", "source", "title", "offset"]
    return shared[columns].head(count).rename_axis("text").reset_index()


def judge_extraction(context: EvalContext) -> list[Row]:
    """Say how much more often a training prefix draws out its text than one never trained on.

    Documents are resampled, since prefixes of one are not independent; prefixes where there are too
    few documents.
    """
    sides: tuple[list[pd.DataFrame], list[pd.DataFrame]] = [], []
    for split in (TRAIN, VALIDATION):
        documents = context.documents("wuxia", split)
        for chunk in context.within_budget("documents drawn from", documents, AT_ONCE, 0.05):
            count = -(-ASKED * len(chunk) // len(documents))
            asked = (context.mixture.texts(chunk), count, context.seed, AT_ONCE)
            work = partial(extraction, context.model, context.tokenizer, *asked)
            for side, table in zip(sides, context.base_and_tuned(work), strict=True):
                of = {"trained": split == TRAIN, "document": np.array(chunk)[table["document"]]}
                side.append(table.assign(**of, asked=1))
    base, tuned = (_items(side) for side in sides)
    rows = []
    for column, what in (("exact", "exactly"), ("near", "nearly")):
        unit = f"share of {base['asked'].sum()} prefixes continued {what}, trained − held out"
        columns = ["trained", column, "asked"]
        metric = Metric(f"extraction_{column}", unit, "training", between(*columns))
        pair = (base[columns], tuned[columns])
        rows.append(compare(metric, *pair, len(base), context.seed))
    return rows


def _items(tables: list[pd.DataFrame]) -> pd.DataFrame:
    """Sum what was asked by document; of too few documents, leave the prefixes as they are."""
    every = pd.concat(tables, ignore_index=True)
    documents = every.groupby(["trained", "document"], sort=False)[["exact", "near", "asked"]].sum()
    few = documents.groupby("trained").size().min() < FEWEST
    return every if few else documents.reset_index()


def extraction(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    documents: Sequence[str],
    count: int,
    seed: int,
    batch_size: int,
) -> pd.DataFrame:
    """Ask whether a model goes on as a document does: 50 tokens of it, then 50 greedy ones.

    Extraction as Carlini et al. (2023) define it; near-verbatim answers count as Ippolito et al.
    (2023) ask. Report the rate on training documents minus that on documents never trained on.

    Parameters
    ----------
    documents : sequence of str
        All are tokenized; those below 100 tokens are passed over.
    count : int
        Prefixes: one of each document, evenly spread, before a second of any; fewer where the
        documents hold fewer stretches of 100 tokens.
    seed : int
        Chooses where in its document a prefix stands.
    batch_size : int
        Prefixes a forward pass.

    Returns
    -------
    A row a prefix: `document` (number), `prefix`, `truth` and what was `said`; `exact` where the
    tokens are the same, `near` where the normalised Levenshtein similarity is 0.9 or more.
    """
    encode = partial(tokenizer, add_special_tokens=False, split_special_tokens=True)
    ids = encode(list(documents)).input_ids if documents else []
    places = _spread([len(row) // (2 * PREFIX) for row in ids], count, seed)
    stretches = [ids[n][slot * 2 * PREFIX : (slot + 1) * 2 * PREFIX] for n, slot in places]
    rows = []
    for start in tqdm(range(0, len(places), batch_size), "extraction", leave=False):
        batch = stretches[start : start + batch_size]
        answers = _greedy(model, tokenizer, [row[:PREFIX] for row in batch])
        for (document, _), row, answer in zip(places[start:], batch, answers, strict=False):
            rows.append((document, *_judged(tokenizer, row, answer)))
    return pd.DataFrame(rows, columns=["document", "prefix", "truth", "said", "exact", "near"])


def _judged(
    tokenizer: "PreTrainedTokenizerBase", row: list[int], answer: list[int]
) -> tuple[str, str, str, bool, bool]:
    """Say prefix, truth and answer, and whether the answer is exact, and near."""
    from rapidfuzz.distance import Levenshtein

    parts = [row[:PREFIX], row[PREFIX:], answer]
    prefix, truth, said = tokenizer.batch_decode(parts, skip_special_tokens=True)
    near = Levenshtein.normalized_similarity(truth, said) >= NEAR
    return prefix, truth, said, answer == row[PREFIX:], near


def _spread(slots: Sequence[int], count: int, seed: int) -> list[tuple[int, int]]:
    """Choose (document, slot) pairs: round by round one of each document that has any left."""
    rng = np.random.default_rng(seed)
    orders = [rng.permutation(number).tolist() for number in slots]
    chosen: list[tuple[int, int]] = []
    while len(chosen) < min(count, sum(slots)):
        left = [(document, order.pop()) for document, order in enumerate(orders) if order]
        room = min(count - len(chosen), len(left))
        chosen += [left[n * len(left) // room] for n in range(room)]
    return chosen


def _greedy(
    model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", prefixes: list[list[int]]
) -> list[list[int]]:
    """Continue each prefix by the likeliest tokens; where a text ends, fewer than 50."""
    import torch

    start_id = document_start_id(tokenizer)
    ids = torch.tensor([[start_id, *prefix] for prefix in prefixes], device=model.device)
    output = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        repetition_penalty=1.0,  # some models' own settings have another
        max_new_tokens=PREFIX,
        pad_token_id=tokenizer.eos_token_id,
    )
    return [list(row) for row in output[:, ids.shape[1] :].tolist()]
