"""What can be drawn out? Whether prefixes of the training text make a model say what follows."""

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from tqdm import tqdm

from wuxia_core.evaluate.statistics import FEWEST, Metric, Row, between, compare
from wuxia_core.evaluate.subject import Subject
from wuxia_core.mixing.store import TRAIN, VALIDATION
from wuxia_core.model import document_start_id

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

PREFIX, NEAR = 50, 0.9  # tokens, and as many to be said; normalised Levenshtein similarity
ASKED, AT_ONCE = 50, 10  # prefixes of each kind; documents between looks at the clock


def judge_extraction(subject: Subject) -> list[Row]:
    """Say how much more often a training prefix draws out its text than one never trained on.

    Documents are resampled, since prefixes of one are not independent; prefixes where there are too
    few documents.
    """
    sides: tuple[list[pd.DataFrame], list[pd.DataFrame]] = [], []
    for split in (TRAIN, VALIDATION):
        documents = subject.documents("wuxia", split)
        for chunk in subject.in_time("documents drawn from", documents, AT_ONCE, 0.05):
            count = -(-ASKED * len(chunk) // len(documents))
            asked = (subject.mixture.texts(chunk), count, subject.seed, AT_ONCE)
            work = partial(extraction, subject.model, subject.tokenizer, *asked)
            for side, table in zip(sides, subject.both(work), strict=True):
                of = {"trained": split == TRAIN, "document": np.array(chunk)[table["document"]]}
                side.append(table.assign(**of, asked=1))
    base, tuned = (_items(side) for side in sides)
    rows = []
    for column, what in (("exact", "exactly"), ("near", "nearly")):
        unit = f"share of {base['asked'].sum()} prefixes continued {what}, trained − held out"
        columns = ["trained", column, "asked"]
        metric = Metric(f"extraction_{column}", unit, "training", between(*columns))
        pair = (base[columns], tuned[columns])
        rows.append(compare(metric, *pair, len(base), subject.seed))
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
