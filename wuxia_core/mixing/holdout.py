"""What is held out: whole books where these come near to `data.val_ratio`, else the last chapters.

It knows books and the lengths of documents, never what they say.
"""

import re
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import pandas as pd

from wuxia_core.corpus import File
from wuxia_core.mixing.store import DUPLICATE, TRAIN, VALIDATION, hash_key

FEWEST = 6  # documents or prompts; of fewer, not even a sign test can tell anything at 5 %
NO_BOOK = 1000  # characters; what has fewer is trained on and counts as no book
FEW = 4  # passages of general text

# Chapters in files of their own.
NUMBERED = re.compile("(\\D*?)(?:\\d|(?<=第)[〇零一二两三四五六七八九十百千])")  # what is before
SERIES, CHAPTER = 5, 60_000  # files of a folder; bytes of each, on average: a novel has more


def with_whole_folders(files: list[File]) -> list[File]:
    """Make one book of a folder's numbered files, if each is no longer than a chapter, in order.

    `snow/1.txt`, `snow/2.txt` … `snow/10.txt` become the book `snow/`.
    """
    files = sorted(files, key=lambda file: (file.source == "general", _by_number(file.name)))
    series: dict[tuple[Path, str], list[File]] = defaultdict(list)
    for file in files:
        if file.source == "wuxia" and (match := NUMBERED.match(file.place.stem)):
            series[file.place.parent, match[1]].append(file)
    books: dict[File, str] = {}
    for (folder, _), chapters in series.items():
        size = sum(file.path.stat().st_size for file in chapters)
        if len(chapters) >= SERIES and size <= CHAPTER * len(chapters):
            inside = Path(chapters[0].book).parent
            name = f"{inside if inside.name else folder.resolve().name}/"
            books |= dict.fromkeys(chapters, name)
    return [replace(file, book=books.get(file, file.book)) for file in files]


def _by_number(name: str) -> list[str | int]:
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name)]


def split(documents: pd.DataFrame, left_out: pd.Series, val_ratio: float, seed: int) -> pd.Series:
    """Choose each document's split: `source`, `book` and `characters` are its columns.

    Novels by whole books where these come near to `val_ratio`, else the last chapters. Of general
    text the end of each file is held out, so that neighbouring passages stay together; files of
    less than four passages count as one. Documents in `left_out` are duplicates.
    """
    chosen = pd.Series(TRAIN, index=documents.index)
    chosen[left_out] = DUPLICATE
    novels, general = (
        documents[(documents["source"] == source) & ~left_out] for source in ("wuxia", "general")
    )
    books = novels.groupby("book")["characters"].sum()
    whole = novels[novels["book"].isin(whole_books(books.to_dict(), val_ratio, seed))].index
    if len(whole) < FEWEST:
        known = novels[novels["book"].map(books) >= min(NO_BOOK, books.max())]
        whole = _tail(known["characters"], val_ratio, FEWEST)
    chosen[whole] = VALIDATION
    passages = general.groupby("book")["book"].transform("size")
    files = general["book"].where(passages >= FEW, "")
    for _, rows in general.groupby(files):
        chosen[_tail(rows["characters"], val_ratio, -(-FEWEST // files.nunique()))] = VALIDATION
    return chosen


def whole_books(lengths: dict[str, float], val_ratio: float, seed: int) -> list[str]:
    """Choose books that hold `val_ratio` of all characters, or within a third of it; else none.

    `{"a": 50_000, "b": 9000, "c": 41_000}` at 0.1 gives `["b"]`, and at 0.2 none.
    """
    total = sum(lengths.values())
    least = val_ratio * total * 2 / 3
    most = min(val_ratio * total * 4 / 3, total - (1 - val_ratio) * total * 2 / 3)
    books = [name for name in lengths if lengths[name] >= min(NO_BOOK, max(lengths.values()))]
    chosen, held_out = [], 0.0
    for name in sorted(books, key=lambda n: (lengths[n] < least, hash_key(seed, "split", n))):
        if held_out < least and held_out + lengths[name] <= most:
            chosen.append(name)
            held_out += lengths[name]
    return chosen if held_out >= least else []


def likely_share(lengths: dict[str, float], val_ratio: float, seed: int) -> float:
    """Say what share of books of so many characters is held out; chapters come near `val_ratio`."""
    whole = sum(lengths[name] for name in whole_books(lengths, val_ratio, seed))
    return whole / sum(lengths.values()) if whole else val_ratio


def _tail(lengths: pd.Series, val_ratio: float, fewest: int) -> list[int]:
    """Choose the last texts, about `val_ratio` of the characters.

    `fewest` at least where that leaves half as many to train on; one at least, never all.
    """
    from_end = lengths[::-1].cumsum()[: len(lengths) - 1]
    if not val_ratio or from_end.empty:
        return []
    count = int((from_end - val_ratio * lengths.sum()).abs().to_numpy().argmin()) + 1
    if 3 * fewest <= 2 * len(lengths):
        count = max(count, fewest)
    return list(from_end.index[:count])


def describe_split(outline: pd.DataFrame, val_ratio: float) -> str:
    """Say in a sentence how much of the novels is held out, what, and why it is not `val_ratio`."""
    novels = outline[(outline["source"] == "wuxia") & (outline["split"] != DUPLICATE)]
    held_out = novels["split"] == VALIDATION
    share = novels["characters"][held_out].sum() / max(1, novels["characters"].sum())
    counts = held_out.groupby(novels["book"], sort=False).agg(["sum", "size"])
    names = [
        book if some == all_ else f"the last {some} of the {all_} chapters of {book}"
        for book, some, all_ in counts[counts["sum"] > 0].itertuples()
    ]
    said = f"{share:.1%} of the novels ({', '.join(names) or 'nothing'})"
    if (counts["sum"] % counts["size"]).any():
        said += f", since no whole book is near data.val_ratio {val_ratio:g}"
    if abs(share - val_ratio) > val_ratio / 3:
        said += f"; not {val_ratio:.1%}: chapters stay whole, and the scorecard needs {FEWEST}"
    return said
