"""Did it copy? What generated texts share with the training text.

Characters are compared after NFC, white space aside; nothing shared runs across two documents. The
training text is read a document at a time, so it may be far larger than memory.
"""

import unicodedata
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from tqdm import tqdm

from wuxia_core.evaluate.context import EvalContext
from wuxia_core.evaluate.statistics import FEWEST, Metric, Row, compare, group_difference
from wuxia_core.evaluate.style import strip_whitespace
from wuxia_core.mixing import TRAIN, VALIDATION
from wuxia_core.model import document_start_id

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


Documents = Callable[[], Iterable[tuple[str, str]]]  # (title, text) of each, anew at each call
Runs = dict[str, list[tuple[int, int]]]  # run of characters → (number of a text, start in it)

# Characters. 14,853 chunks of 200 characters of six old novels share 6 or 7 with the other five
# (median), 99 % at most 11, and none over 19 but a poem that two of them quote.
FLAGGED = 30
SEEDS = (8, 4, 1)  # characters
AROUND = 20  # characters shown on either side of a passage
PREFIX, NEAR = 50, 0.9  # tokens, and as many to be said; normalised Levenshtein similarity
PREFIXES, AT_ONCE = 50, 10  # prefixes of each kind; documents between looks at the clock


def overlap(texts: Sequence[str], documents: Documents) -> pd.DataFrame:
    """Find each text's longest common substring with the training text.

    Runs of 8 characters that both have are looked up and followed as far as they go; a text that
    shares none is looked for by runs of 4, then by single characters. Give all texts at once: the
    training text is read each time. `["一剑光寒"]` against `[("书", "他说：剑光！")]` gives length
    2, `一【剑光】寒` and `他说：【剑光】！`.

    Returns
    -------
    A row a text: `length` in characters; `flagged`, 30 or more; the run in 【】 with 20 characters
    on either side as `generated`, and in the `source`, the first document that has it (`title`). 0
    and "" where nothing is shared.
    """
    squeezed = [_squeeze(text) for text in texts]
    lengths, shown = [0] * len(texts), [("", "", "")] * len(texts)
    for n in SEEDS:
        runs = _runs(
            ["" if found >= n else t for t, found in zip(squeezed, lengths, strict=True)], n
        )
        for title, text in tqdm(documents() if runs else (), "copying", leave=False):
            document = _squeeze(text)
            for number, start, at in _longer_runs(squeezed, lengths, runs, n, document):
                size = lengths[number]
                generated = _in_brackets(squeezed[number], start, size)
                shown[number] = (generated, _in_brackets(document, at, size), title)
    table = pd.DataFrame(shown, columns=["generated", "source", "title"])
    return table.assign(length=lengths, flagged=np.array(lengths) >= FLAGGED)


def _squeeze(text: str) -> str:
    """Compose characters (NFC) and drop the white space."""
    return strip_whitespace(unicodedata.normalize("NFC", text))


def _runs(texts: Sequence[str], n: int) -> Runs:
    """Map every run of n characters to where it stands in the texts."""
    runs = defaultdict(list)
    for number, text in enumerate(texts):
        for start in range(len(text) - n + 1):
            runs[text[start : start + n]].append((number, start))
    return dict(runs)


def _longer_runs(
    texts: Sequence[str], lengths: list[int], runs: Runs, n: int, document: str
) -> Iterator[tuple[int, int, int]]:
    """Find runs longer than the longest so far, which `lengths` holds and is updated with.

    Yields (number of a text, start in it, place in the document). Only what is longer is followed,
    so that each text is walked through once, however often its runs stand in the document.
    """
    for at in range(len(document) - n + 1):
        for number, start in runs.get(document[at : at + n], ()):
            text, end = texts[number], start + lengths[number] + 1
            if end > len(text) or not document.startswith(text[start:end], at):
                continue
            while end < len(text) and document.startswith(text[end], at + end - start):
                end += 1
            lengths[number] = end - start
            yield number, start, at


def _in_brackets(text: str, start: int, length: int) -> str:
    end = start + length
    before, behind = text[max(0, start - AROUND) : start], text[end : end + AROUND]
    return f"{before}【{text[start:end]}】{behind}"


def longest_runs(overlaps: pd.DataFrame, count: int = 10) -> pd.DataFrame:
    """Choose the longest runs of `overlap`'s table, longest first, at most `count` rows.

    `text` numbers the texts; those that share nothing are left out.
    """
    shared = overlaps[overlaps["length"] > 0].sort_values("length", ascending=False, kind="stable")
    columns = ["length", "flagged", "generated", "source", "title"]
    return shared[columns].head(count).rename_axis("text").reset_index()


def score_extraction(context: EvalContext) -> Row:
    """Say how much more often a training prefix draws out its text than one never trained on.

    Documents are resampled, since prefixes of one are not independent; prefixes where there are too
    few documents.
    """
    sides: tuple[list[pd.DataFrame], list[pd.DataFrame]] = [], []
    for split in (TRAIN, VALIDATION):
        documents = context.documents("wuxia", split)
        for chunk in context.within_budget("documents drawn from", documents, AT_ONCE, 0.05):
            count = -(-PREFIXES * len(chunk) // len(documents))  # rounded up
            texts = context.mixture.texts(chunk)
            work = partial(
                extraction, context.model, context.tokenizer, texts, count, context.seed, AT_ONCE
            )
            for side, table in zip(sides, context.base_and_tuned(work), strict=True):
                numbers = np.array(chunk)[table["document"]]
                side.append(table.assign(trained=split == TRAIN, document=numbers, prefixes=1))
    base, tuned = (_by_document(side) for side in sides)
    total = base["prefixes"].sum()
    unit = f"share of {total} prefixes continued nearly word for word, trained − held out"
    columns = ["trained", "near", "prefixes"]
    metric = Metric("extraction_near", unit, "training", group_difference(*columns))
    return compare(metric, base[columns], tuned[columns], context.seed)


def _by_document(tables: list[pd.DataFrame]) -> pd.DataFrame:
    """Sum prefixes by document; of fewer than six documents, leave the prefixes as they are."""
    every = pd.concat(tables, ignore_index=True)
    documents = every.groupby(["trained", "document"], sort=False)[["near", "prefixes"]].sum()
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
    (2023) ask. `count` prefixes, fewer where the documents hold fewer stretches of 100 tokens, are
    spread over the documents; `seed` chooses where in its document each stands.

    Returns
    -------
    A row a prefix: `document` (number), `prefix`, `truth`, what was `said`, and `near`: whether
    their normalised Levenshtein similarity is 0.9 or more.
    """
    from rapidfuzz.distance import Levenshtein

    encode = partial(tokenizer, add_special_tokens=False, split_special_tokens=True)
    ids = encode(list(documents)).input_ids if documents else []
    places = _spread([len(row) // (2 * PREFIX) for row in ids], count, seed)
    stretches = [ids[n][slot * 2 * PREFIX : (slot + 1) * 2 * PREFIX] for n, slot in places]
    answers: list[list[int]] = []
    for start in tqdm(range(0, len(places), batch_size), "extraction", leave=False):
        batch = stretches[start : start + batch_size]
        answers += _greedy(model, tokenizer, [row[:PREFIX] for row in batch])
    rows = []
    for (document, _), row, answer in zip(places, stretches, answers, strict=True):
        parts = [row[:PREFIX], row[PREFIX:], answer]
        prefix, truth, said = tokenizer.batch_decode(parts, skip_special_tokens=True)
        near = Levenshtein.normalized_similarity(truth, said) >= NEAR
        rows.append((document, prefix, truth, said, near))
    return pd.DataFrame(rows, columns=["document", "prefix", "truth", "said", "near"])


def _spread(slots: Sequence[int], count: int, seed: int) -> list[tuple[int, int]]:
    """Draw (document, slot) pairs: one of each document before a second of any."""
    rng = np.random.default_rng(seed)
    drawn = [
        (turn, rng.random(), document, slot)
        for document, number in enumerate(slots)
        for turn, slot in enumerate(rng.permutation(number).tolist())
    ]
    return sorted((document, slot) for *_, document, slot in sorted(drawn)[:count])


def _greedy(
    model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", prefixes: list[list[int]]
) -> list[list[int]]:
    """Continue each prefix by the likeliest tokens; where a text ends, fewer than 50."""
    import torch

    start, end = document_start_id(tokenizer), tokenizer.eos_token_id
    ids = torch.tensor([[start, *prefix] for prefix in prefixes], device=model.device)
    # Some models' own settings have another penalty.
    greedy = {"do_sample": False, "repetition_penalty": 1.0, "max_new_tokens": PREFIX}
    seen = torch.ones_like(ids)
    output = model.generate(ids, attention_mask=seen, pad_token_id=end, **greedy)
    return [list(row) for row in output[:, ids.shape[1] :].tolist()]
