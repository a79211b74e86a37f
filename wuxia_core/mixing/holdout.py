"""Choose the documents to hold out: whole books if some fit `data.val_ratio`, else last chapters.

The choice depends on the books and on the lengths of the documents, never on their texts.
"""

import re
from collections import defaultdict
from dataclasses import replace
from math import ceil
from pathlib import Path

import pandas as pd

from wuxia_core.corpus import File
from wuxia_core.mixing.store import DUPLICATE, TRAIN, VALIDATION, hash_key

FEWEST = 6  # least number of documents or prompts: with fewer no sign test is significant at 5 %
MIN_BOOK = 1000  # characters: a shorter book is trained on, unless all books are shorter
MIN_PASSAGES = 4  # all general files with fewer passages are split together, as if they were one

# The name of a file that holds a chapter. Group 1 is what stands before the chapter's number, with
# the 第 of a number in Chinese numerals.
NUMBERED = re.compile("(\\D*?)(?:\\d|(?<=第)[〇零一二两三四五六七八九十百千])")
# Numbered files are chapters of one book if there are MIN_SERIES files or more and their mean size
# is MAX_CHAPTER bytes or less. Numbered files that hold whole novels are larger.
MIN_SERIES, MAX_CHAPTER = 5, 60_000


def join_series(files: list[File]) -> list[File]:
    """Give the numbered novel files of a folder one `book` if their sizes are those of chapters.

    `snow/1.txt`, `snow/2.txt` … `snow/10.txt` become chapters of the book `snow/`. Files whose
    names differ before the number are not joined. Returns all files, sorted by their names, in
    which 2 comes before 10; those of general text come last.
    """
    files = sorted(files, key=lambda file: (file.source == "general", _by_number(file.name)))
    # the numbered novel files, by their folder and what stands before the number in their names
    series: dict[tuple[Path, str], list[File]] = defaultdict(list)
    for file in files:
        if file.source == "wuxia" and (match := NUMBERED.match(file.place.stem)):
            series[file.place.parent, match[1]].append(file)
    books: dict[File, str] = {}
    for (folder, _), chapters in series.items():
        size = sum(file.path.stat().st_size for file in chapters)  # bytes
        if len(chapters) >= MIN_SERIES and size <= MAX_CHAPTER * len(chapters):
            # `inside` is the folder's path below data.data_dir; "." is data.data_dir itself
            inside = Path(chapters[0].book).parent
            name = f"{inside if inside.name else folder.resolve().name}/"
            books |= dict.fromkeys(chapters, name)
    return [replace(file, book=books.get(file, file.book)) for file in files]


def _by_number(name: str) -> list[str | int]:
    """Make a key that sorts `a10.txt` behind `a2.txt`: `["a", 10, ".txt"]` for `a10.txt`."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name)]


def split(documents: pd.DataFrame, left_out: pd.Series, val_ratio: float, seed: int) -> pd.Series:
    """Choose each document's split: TRAIN, VALIDATION or, for those in `left_out`, DUPLICATE.

    `documents` has the columns `source`, `book` and `characters`; `left_out` (bool) flags copies
    and empty documents. Of the novels, the books that `whole_books` chooses are held out. If these
    have fewer than `FEWEST` chapters in all, the last chapters are held out instead: all novels,
    except those shorter than `MIN_BOOK`, are joined in their order, and the end is held out. Of
    general text the end of each file is held out, so that neighbouring passages stay together; all
    files of fewer than `MIN_PASSAGES` passages are treated as one file.
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
    passages = general.groupby("book")["book"].transform("size")  # number of them in its file
    files = general["book"].where(passages >= MIN_PASSAGES, "")  # "" joins the short files
    for _, rows in general.groupby(files):
        fewest = ceil(FEWEST / files.nunique())  # in each file, so that it is FEWEST in all
        splits[_tail(rows["characters"], val_ratio, fewest)] = VALIDATION
    return splits


def whole_books(lengths: dict[str, float], val_ratio: float, seed: int) -> list[str]:
    """Choose books to hold out that have about `val_ratio` of all characters; `[]` if none fit.

    `lengths` are the numbers of characters by book. Books are added in an order drawn by `seed`
    until they have two thirds of `val_ratio`. A book is passed over if with it they would have more
    than four thirds of `val_ratio`, or leave less than two thirds of what is to be trained on. The
    list is empty if the books that remain have too few characters. With `{"a": 50_000, "b": 9000,
    "c": 41_000}` a `val_ratio` of 0.1 gives `["b"]`, and 0.2 gives `[]`.
    """
    total = sum(lengths.values())  # characters, as are `least` and `most`
    least = val_ratio * total * 2 / 3
    # a third above the ratio; or all but two thirds of what is to be trained on
    most = min(val_ratio * total * 4 / 3, total - (1 - val_ratio) * total * 2 / 3)
    books = [name for name in lengths if lengths[name] >= min(MIN_BOOK, max(lengths.values()))]
    chosen, held_out = [], 0.0  # names; their characters so far
    # books that are long enough on their own come first
    for name in sorted(books, key=lambda n: (lengths[n] < least, hash_key(seed, "split", n))):
        if held_out < least and held_out + lengths[name] <= most:
            chosen.append(name)
            held_out += lengths[name]
    return chosen if held_out >= least else []


def likely_share(lengths: dict[str, float], val_ratio: float, seed: int) -> float:
    """Predict which share of the novels' characters `split` holds out.

    `lengths` are the numbers of characters by book. The share is that of the books that
    `whole_books` chooses. If it chooses none, the share is `val_ratio`: `split` then holds out
    chapters, and their share is near it.
    """
    held_out = sum(lengths[name] for name in whole_books(lengths, val_ratio, seed))
    return held_out / sum(lengths.values()) if held_out else val_ratio


def _tail(lengths: pd.Series, val_ratio: float, fewest: int) -> list[int]:
    """Choose the last texts, with about `val_ratio` of the characters; return their index labels.

    `lengths` are the texts' numbers of characters. At least `fewest` texts are chosen if then
    `fewest` / 2 or more are left to train on, else at least one: with a `fewest` of 6 at least 6 of
    9 texts, but 1 of 8. No text is chosen if `val_ratio`
    is 0 or if there is only one text, since one text is always left to train on. The label of the
    last text comes first.
    """
    # number of characters in the last 1, 2, 3, … texts, at most in all texts but the first
    from_end = lengths[::-1].cumsum()[: len(lengths) - 1]
    if not val_ratio or from_end.empty:
        return []
    # the number of texts whose characters are nearest to `val_ratio`
    count = int((from_end - val_ratio * lengths.sum()).abs().to_numpy().argmin()) + 1
    if len(lengths) - fewest >= fewest / 2:
        count = max(count, fewest)
    return list(from_end.index[:count])


def describe_split(outline: pd.DataFrame, val_ratio: float) -> str:
    """Say in words which share of the novels is held out, which books, and why not `val_ratio`.

    `outline` is the table of documents without their texts. Returns `9.1% of the novels (雪/)`,
    or `8.0% of the novels (the last 6 of the 80 chapters of 雪), since no whole book is near …`.
    """
    novels = outline[(outline["source"] == "wuxia") & (outline["split"] != DUPLICATE)]
    held_out = novels["split"] == VALIDATION
    share = novels["characters"][held_out].sum() / max(1, novels["characters"].sum())
    # for each book the numbers of its held-out chapters ("sum") and of all its chapters ("size")
    counts = held_out.groupby(novels["book"], sort=False).agg(["sum", "size"])
    names = [
        book if last == size else f"the last {last} of the {size} chapters of {book}"
        for book, last, size in counts[counts["sum"] > 0].itertuples()
    ]
    text = f"{share:.1%} of the novels ({', '.join(names) or 'nothing'})"
    if counts["sum"].between(1, counts["size"] - 1).any():  # a book is held out in part
        text += f", since no whole book is near data.val_ratio {val_ratio:g}"
    if abs(share - val_ratio) > val_ratio / 3:
        text += f"; not {val_ratio:.1%}: chapters stay whole, and the scorecard needs {FEWEST}"
    return text
