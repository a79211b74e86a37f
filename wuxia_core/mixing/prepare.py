"""From files to documents on disk: read, without what is there twice, held-out text apart.

What is known of the documents stands in the outline, a row each: source, book, chapter, characters,
weight, split.
"""

import logging
from collections import Counter
from typing import Any

import pandas as pd
from tqdm import tqdm

from wuxia_core import corpus
from wuxia_core.config import Config, DataConfig
from wuxia_core.errors import DataError
from wuxia_core.mixing.leakage import HeldOutRuns, Leakage, without
from wuxia_core.mixing.split import split
from wuxia_core.mixing.staging import Texts
from wuxia_core.mixing.store import TRAIN, VALIDATION

log = logging.getLogger(__name__)

REPEATS_SHOWN = 10  # repeated paragraphs kept as examples


def read(
    files: list[corpus.File], texts: Texts, settings: DataConfig
) -> tuple[pd.DataFrame, list[corpus.Account]]:
    """Read all files into `texts`; return the outline and what became of each file."""
    rows = []
    accounts = [corpus.Account(file) for file in files]
    skip = frozenset(settings.skip_cleaning)
    for file, account in zip(tqdm(files, "reading", unit="file"), accounts, strict=True):
        encoding = settings.encoding.get(file.path.name)
        weight = settings.weights.get(file.path.name, 1.0)
        for document in corpus.read_documents(account, encoding, skip, settings.to_simplified):
            texts.append(document.text)
            about = (document.source, document.book, document.chapter)
            rows.append((*about, len(document.text), weight))
        if account.refused:
            log.warning("left out: %s", account.refused)
    columns = ["source", "book", "chapter", "characters", "weight"]
    _refuse_nothing(accounts)
    return pd.DataFrame(rows, columns=columns), accounts


def _refuse_nothing(accounts: list[corpus.Account]) -> None:
    """Refuse to go on where all novels, or all general texts, are refused."""
    for source, what in (("wuxia", "train on"), ("general", "mix in from data.general_file")):
        there = [account for account in accounts if account.file.source == source]
        if there and not any(account.documents for account in there):
            reasons = "\n".join(account.refused for account in there)
            raise DataError(f"nothing is left to {what}:\n{reasons}")


def deduplicate(
    outline: pd.DataFrame, texts: Texts, config: Config
) -> tuple[list[corpus.SameBook], dict[str, Any]]:
    """Leave out what is there twice, then split; tell what was found."""
    sketches = corpus.Sketches()
    documents = zip(outline["source"], outline["book"], strict=True)
    if config.data.deduplicate:
        bar = tqdm(documents, "looking for duplicates", len(outline), unit="document", leave=False)
        for number, (source, book) in enumerate(bar):
            sketches.add(texts[number], book if source == "wuxia" else None)
    same_books = sketches.same_books()
    for same in same_books:
        log.warning(
            "%s is left out: %.0f %% of it is in %s", same.book, 100 * same.share, same.kept
        )
    left_out = outline["book"].isin([same.book for same in same_books])
    left_out &= outline["source"] == "wuxia"
    repeats = sketches.same_paragraphs(outline.index[left_out])
    report = _drop_repeats(repeats, outline, texts)
    left_out |= outline["characters"] == 0
    outline["split"] = split(outline, left_out, config.data.val_ratio, config.training.seed)
    _tell_of_weights(outline)
    return same_books, report


def _tell_of_weights(outline: pd.DataFrame) -> None:
    """Say of held-out books that their weight does nothing."""
    for book, rows in outline[outline["weight"] != 1].groupby("book"):
        if not (rows["split"] == TRAIN).any():
            log.warning("data.weights: %s is not trained on, so its weight does nothing", book)


def _drop_repeats(repeats: pd.DataFrame, outline: pd.DataFrame, texts: Texts) -> dict[str, Any]:
    """Take repeated paragraphs out of their documents; say how many and show some."""
    names = outline["book"] + " · " + outline["chapter"]
    examples = [
        [names[row.document], names[row.kept_document], texts[row.document].split("\n")[row.line]]
        for row in repeats.iloc[:: len(repeats) // REPEATS_SHOWN + 1].itertuples()
    ]
    removed = 0
    for number, rows in repeats.groupby("document"):
        lines = texts[number].split("\n")
        gone = set(rows["line"])
        removed += sum(len(lines[line]) for line in gone)
        texts[number] = "\n".join(line for n, line in enumerate(lines) if n not in gone)
        outline.at[number, "characters"] = len(texts[number])
    books = Counter(outline["book"].iloc[repeats["document"]])
    return {"count": len(repeats), "characters": removed, "books": books, "examples": examples}


def keep_apart(outline: pd.DataFrame, texts: Texts) -> tuple[Leakage, Leakage]:
    """Take out of held-out text what stands in training text too; say what was found and left."""
    train, held_out = (outline.index[outline["split"] == name] for name in (TRAIN, VALIDATION))
    runs = HeldOutRuns(texts[number] for number in held_out)
    for number in tqdm(train, "comparing with held-out text", unit="document", leave=False):
        runs.see(texts[number])
    found, left = Leakage(), Leakage()
    for number in held_out:
        text = before = texts[number]
        shared = runs.shared(text)
        found.add(shared)
        while shared.any():  # neighbours of what is dropped may make a shared run again
            text = without(text, shared)
            shared = runs.shared(text)
        left.add(shared)
        if text != before:
            texts[number] = text
            outline.at[number, "characters"] = len(text)
    if found.shared:
        log.info(
            "held-out text shared %.2f %% of its runs of 13 characters with training text; "
            "the sentences are left out of it", 100 * found.share,
        )  # fmt: skip
    return found, left
