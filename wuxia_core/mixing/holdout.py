"""Which documents are held out: whole books if some fit `data.val_ratio`, else last chapters.

The choice depends on the books and on the lengths of the documents, never on their texts.
"""

import re
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import pandas as pd

from wuxia_core.corpus import File
from wuxia_core.mixing.store import DUPLICATE, TRAIN, VALIDATION, hash_key

FEWEST = 6  # documents or prompts; of fewer, not even a sign test can tell anything at 5 %
MIN_BOOK = 1000  # characters; a shorter book is trained on, unless all books are shorter
MIN_PASSAGES = 4  # general files of fewer passages are split as if they were one file

# The name of a file that holds a chapter: group 1 is what stands before the chapter's number.
NUMBERED = re.compile("(\\D*?)(?:\\d|(?<=第)[〇零一二两三四五六七八九十百千])")
# A book is so many files at least, of so many bytes on average at most: a whole novel has more.
MIN_SERIES, MAX_CHAPTER = 5, 60_000


def join_series(files: list[File]) -> list[File]:
    """Give numbered novel files of one folder one book's name, if they are chapters by their size.

    `snow/1.txt`, `snow/2.txt` … `snow/10.txt` become chapters of the book `snow/`. All files are
    returned, general text last, in the order of their names, where 2 stands before 10.
    """
    files = sorted(files, key=lambda file: (file.source == "general", _by_number(file.name)))
    series: dict[tuple[Path, str], list[File]] = defaultdict(list)  # by folder and name
    for file in files:
        if file.source == "wuxia" and (match := NUMBERED.match(file.place.stem)):
            series[file.place.parent, match[1]].append(file)
    books: dict[File, str] = {}
    for (folder, _), chapters in series.items():
        size = sum(file.path.stat().st_size for file in chapters)
        if len(chapters) >= MIN_SERIES and size <= MAX_CHAPTER * len(chapters):
            inside = Path(chapters[0].book).parent  # the folder's path below the novels' folder
            name = f"{inside if inside.name else folder.resolve().name}/"
            books |= dict.fromkeys(chapters, name)
    return [replace(file, book=books.get(file, file.book)) for file in files]


def _by_number(name: str) -> list[str | int]:
    """Make a key to sort names by: `a10.txt` is `["a", 10, ".txt"]`, and stands behind `a2.txt`."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name)]


def split(documents: pd.DataFrame, left_out: pd.Series, val_ratio: float, seed: int) -> pd.Series:
    """Choose each document's split: TRAIN, VALIDATION or, for those in `left_out`, DUPLICATE.

    `documents` has the columns `source`, `book` and `characters`; `left_out` (bool) flags
    copies and empty documents. Novels are held out by whole books if some make up about
    `val_ratio`, else the last chapters are. Of general text the end of each file is held out, so
    that neighbouring passages stay together; files of fewer than four passages are taken as one.
    """
    splits = pd.Series(TRAIN, index=documents.index)
    splits[left_out] = DUPLICATE
    novels, general = (
        documents[(documents["source"] == source) & ~left_out] for source in ("wuxia", "general")
    )
    books = novels.groupby("book")["characters"].sum()
    held_out = novels[novels["book"].isin(whole_books(books.to_dict(), val_ratio, seed))].index
    if len(held_out) < FEWEST:
        chapters = novels[novels["book"].map(books) >= min(MIN_BOOK, books.max())]
        held_out = _tail(chapters["characters"], val_ratio, FEWEST)
    splits[held_out] = VALIDATION
    passages = general.groupby("book")["book"].transform("size")
    files = general["book"].where(passages >= MIN_PASSAGES, "")
    for _, rows in general.groupby(files):
        # FEWEST in all: of each file an equal part, rounded up
        splits[_tail(rows["characters"], val_ratio, -(-FEWEST // files.nunique()))] = VALIDATION
    return splits


def whole_books(lengths: dict[str, float], val_ratio: float, seed: int) -> list[str]:
    """Choose books to hold out, of about `val_ratio` of all characters: within a third of it.

    `lengths` are characters by book. The list is empty if no choice comes so near, or if less than
    two thirds of what `val_ratio` leaves would remain to train on. `{"a": 50_000, "b": 9000,
    "c": 41_000}` at 0.1 gives `["b"]`, and at 0.2 none.
    """
    total = sum(lengths.values())
    least = val_ratio * total * 2 / 3
    most = min(val_ratio * total * 4 / 3, total - (1 - val_ratio) * total * 2 / 3)
    books = [name for name in lengths if lengths[name] >= min(MIN_BOOK, max(lengths.values()))]
    chosen, held_out = [], 0.0
    # in an order drawn by the seed, but books that are long enough alone come first
    for name in sorted(books, key=lambda n: (lengths[n] < least, hash_key(seed, "split", n))):
        if held_out < least and held_out + lengths[name] <= most:
            chosen.append(name)
            held_out += lengths[name]
    return chosen if held_out >= least else []


def likely_share(lengths: dict[str, float], val_ratio: float, seed: int) -> float:
    """Predict the share of the characters that is held out, from the characters of each book.

    If no whole books are held out, chapters are, and these come near to `val_ratio`.
    """
    held_out = sum(lengths[name] for name in whole_books(lengths, val_ratio, seed))
    return held_out / sum(lengths.values()) if held_out else val_ratio


def _tail(lengths: pd.Series, val_ratio: float, fewest: int) -> list[int]:
    """Choose the last texts, of about `val_ratio` of the characters; return their indices.

    At least `fewest` are chosen if half as many are then left to train on, else at least one. None
    are chosen if `val_ratio` is 0 or there is a single text: all are never chosen.
    """
    from_end = lengths[::-1].cumsum()[: len(lengths) - 1]
    if not val_ratio or from_end.empty:
        return []
    count = int((from_end - val_ratio * lengths.sum()).abs().to_numpy().argmin()) + 1
    if 3 * fewest <= 2 * len(lengths):
        count = max(count, fewest)
    return list(from_end.index[:count])


def describe_split(outline: pd.DataFrame, val_ratio: float) -> str:
    """Say in words how much of the novels is held out, which, and why it is not `val_ratio`.

    `outline` is the table of documents without their texts. `9.1% of the novels (雪/)`, say.
    """
    novels = outline[(outline["source"] == "wuxia") & (outline["split"] != DUPLICATE)]
    held_out = novels["split"] == VALIDATION
    share = novels["characters"][held_out].sum() / max(1, novels["characters"].sum())
    counts = held_out.groupby(novels["book"], sort=False).agg(["sum", "size"])  # of chapters
    names = [
        book if last == size else f"the last {last} of the {size} chapters of {book}"
        for book, last, size in counts[counts["sum"] > 0].itertuples()
    ]
    text = f"{share:.1%} of the novels ({', '.join(names) or 'nothing'})"
    if (counts["sum"] % counts["size"]).any():  # a book is held out in part
        text += f", since no whole book is near data.val_ratio {val_ratio:g}"
    if abs(share - val_ratio) > val_ratio / 3:
        text += f"; not {val_ratio:.1%}: chapters stay whole, and the scorecard needs {FEWEST}"
    return text
