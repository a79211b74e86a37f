"""Find text that is there twice: editions, reposts, and what held-out and training text share.

For duplicates only Han characters are compared, in simplified form, so that punctuation and script
do not matter. A book is known by a 32nd of its runs of 13 characters, a paragraph by the 8 smallest
hashes of its runs of 8 (bottom-k sketches, Broder 1997): memory is a few bytes a character of text.
For leakage runs of 13 characters of any kind count, white space aside.
"""

import functools
import re
from array import array
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from wuxia_core.text import BASE, CJK, Hashes, codes, distinct, ngrams, without_spaces

if TYPE_CHECKING:
    import pandas as pd

Integers = npt.NDArray[np.int64]
Flags = npt.NDArray[np.bool_]

# Script.
SAMPLE = 2000  # characters looked at
TRADITIONAL = 0.02  # share of characters that OpenCC changes; simplified texts stay under 0.003
# Taiwan and Hong Kong write 著 for 着 too. In words of writing and of fame, and behind the name of
# an author on a title page, 著 is meant.
ZHE = re.compile(
    "著(?<![原土巨专编译遗拙卓昭较撰名所最素]著)(?<!(?<!明)显著)(?<!(?<!议)论著)(?<!微知著)"
    "(?![述录撰者闻]|有?《|称(?![是赞谢呼道])|作(?![揖别甚什势罢来起作案了成去弃])"
    "|名(?![姓单字将])|书(?![信简呈僮童房卷本箱包桌生页香]))"
    r"(?!(?:(?<=[ 　]著)|(?<=[ 　]..著)|(?<=[ 　]...著)|(?<=^..著)|(?<=^...著))[ 　\r]*$)",
    re.MULTILINE,
)

# Books.
BOOK_RUN, BOOK_SHARE = 13, np.uint64(32)  # characters; of the runs a 32nd is kept
# Characters that were lost on the way, or that prose in Chinese has not: addresses, marks.
NOISE = re.compile(f"[^{CJK}\U00020000-\U0003ffff\\s]")
PARAGRAPH = re.compile("[。！？!?…—”’』」]$", re.MULTILINE)  # its end, which no hard wrap has
HEAD = 99  # characters in which a heading stands
WORTH = 50  # so 2 % of noise weigh as much as half of the chapters or of the paragraphs
SAME_BOOK = 0.5  # share of a book's sketch that another has too; editions of 水浒传 share 0.65
LONGER = 1.25  # a book so many times longer than the other holds more than it, so it is kept

# Paragraphs.
RUN = 8  # characters
SKETCH, SAME_PARAGRAPH = 8, 6  # of the 8 smallest hashes 6 are shared
KEPT_BITS = 40  # of a hash, so that a line's number and a hash are one key
LOW = (1 << KEPT_BITS) - 1
TO_ONE = np.array([pow(BASE, n + 1, 1 << 64) for n in range(SKETCH)], np.uint64)  # of a sketch
FIRST = SKETCH - SAME_PARAGRAPH + 1  # so one of each paragraph's 3 smallest is
LEAST_RUNS = 40 - RUN + 1  # paragraphs of less than 40 Han characters may stand twice

# Pairs.
LAST = np.uint64(np.iinfo(np.uint64).max)
FIRST_OWNERS = 1000  # of a hash that more have, each is compared with the first so many
AT_ONCE = 100_000  # pairs of a hash looked at together

# Leakage.
GRAM = 13  # characters
SENTENCE = re.compile(r"[^。！？!?\n]*(?:[。！？!?]+[”’』」）]*|\n|\Z)")


@functools.cache
def _converter() -> Any:
    from opencc import OpenCC

    return OpenCC("t2s")


def to_simplified(text: str) -> str:
    """Turn a traditional text, by its first 2,000 characters, into simplified characters.

    `"他笑著說，那是一部名著。"` becomes `"他笑着说，那是一部名著。"`.
    """
    head = text[:SAMPLE]
    changed = sum(a != b for a, b in zip(head, _converter().convert(head), strict=False))
    if changed <= TRADITIONAL * len(head):
        return text
    return ZHE.sub("着", _converter().convert(text))


@dataclass(frozen=True)
class SameBook:
    """A book that is left out, the one that is kept, and the share of its text found there."""

    book: str
    kept: str
    share: float


@dataclass
class _BookSketch:
    hashes: "array[int]" = field(default_factory=lambda: array("Q"))
    characters: int = 0  # of Chinese
    traditional: int = 0  # chapters, less the simplified ones
    chapters: int = 0
    paragraphs: int = 0  # lines that end as one, less those that do not
    noise: int = 0  # characters

    def distinct(self) -> Hashes:
        return distinct(np.frombuffer(self.hashes, np.uint64))


class DuplicateIndex:
    """What is remembered of the documents seen, to find duplicates among them."""

    def __init__(self) -> None:
        self._books: dict[str, _BookSketch] = {}
        self._documents = 0
        self._paragraphs = array("q")  # (P, 11): document, line, runs, the 8 smallest hashes

    def add(self, original: str, title: str | None, heading: str | None = None) -> None:
        """Remember a document, of a book or of none; they count from 0 as they are added.

        A `heading` that does not stand in the text is none: no chapter was found there.
        """
        text = to_simplified(original)
        characters = codes(text)
        han = (characters >= 0x3400) & (characters < 0xA000)
        if title is not None:
            book = self._books.setdefault(title, _BookSketch())
            hashes = ngrams(characters[han], BOOK_RUN)
            book.hashes.frombytes(hashes[hashes % BOOK_SHARE == 0].tobytes())
            book.characters += int(han.sum())
            book.traditional += 1 if text != original else -1
            book.chapters += heading is None or (heading or "\0") in original[:HEAD]
            book.paragraphs += 2 * len(PARAGRAPH.findall(text)) - text.count("\n") - 1
            book.noise += len(NOISE.findall(text))
        line_of = np.cumsum(characters == ord("\n"))[han]
        self._remember(ngrams(characters[han], RUN), line_of)
        self._documents += 1

    def _remember(self, hashes: Hashes, line_of: np.ndarray) -> None:
        """Keep the smallest hashes of each long paragraph; runs across a border do not count."""
        first, last = line_of[: len(hashes)], line_of[RUN - 1 :]
        inside = first == last
        keys = (first[inside] << KEPT_BITS) | (hashes[inside] >> np.uint64(24)).view(np.int64)
        keys.sort()
        lines = np.stack(np.unique(keys >> KEPT_BITS, return_index=True, return_counts=True))
        number, start, runs = lines[:, lines[2] >= LEAST_RUNS]
        smallest = keys[start[:, None] + np.arange(SKETCH)] & LOW
        document = np.full(len(number), self._documents)
        self._paragraphs.frombytes(np.column_stack([document, number, runs, smallest]).tobytes())

    def same_books(self) -> list[SameBook]:
        """List the books of which another holds at least half, and is not much shorter.

        The better edition is kept: simplified, with more of its chapters and paragraphs found and
        less noise, longer.
        """
        names = sorted(self._books, key=self._quality)
        sketches = [self._books[name].distinct() for name in names]
        sizes = np.array([len(sketch) for sketch in sketches], np.int64)
        hashes = np.concatenate([np.empty(0, np.uint64), *sketches])
        found: dict[int, SameBook] = {}
        for pairs, shared in _pairs(hashes, np.repeat(np.arange(len(names)), sizes)):
            kept, other = sizes[pairs]
            same = (shared >= SAME_BOOK * other) & (other <= LONGER * kept)
            for kept, other, count in np.vstack([pairs, shared])[:, same].T.tolist():
                if kept not in found and other not in found:
                    found[other] = SameBook(names[other], names[kept], count / int(sizes[other]))
        return list(found.values())

    def _quality(self, name: str) -> tuple[bool, float, int, str]:
        """Give what sorts the better edition before the other."""
        book = self._books[name]
        size = len(book.distinct())
        recurring = len(book.hashes) - size  # advertisements, mostly
        noise = (book.noise / int(BOOK_SHARE) + recurring) / max(1, size)
        found = np.log2((1 + book.chapters) * max(1, book.paragraphs))
        return book.traditional > 0, round(WORTH * noise - found, 1), -book.characters, name

    def same_paragraphs(self, leaving_out: Collection[int] = ()) -> "pd.DataFrame":
        """List the paragraphs that repeat another one, exactly or nearly: a row each.

        `document` and `line` are to be left out: `kept_document` and `kept_line` hold the same text
        and are longer, or as long and earlier. Documents in `leaving_out` are not looked at.
        """
        import pandas as pd

        table = np.frombuffer(self._paragraphs, np.int64).reshape(-1, 3 + SKETCH)
        places, rows = table[:, :3], table[:, 3:].view(np.uint64)
        looked_at = np.flatnonzero(~np.isin(places[:, 0], list(leaving_out)))
        ranked = looked_at[np.argsort(-places[looked_at, 2], kind="stable")]  # the longest first
        keys = (rows @ TO_ONE)[ranked]
        _, first, group = np.unique(keys, return_index=True, return_inverse=True)
        better = first[group]  # rank of the first one with the very same sketch
        first.sort()
        for pairs, _ in _pairs(rows[ranked[first], :FIRST].ravel(), np.repeat(first, FIRST)):
            near = pairs[:, (better[pairs] == pairs).all(0)]
            one, other = rows[ranked[near]]  # (E, 8)
            alike = (one[:, :, None] == other[:, None]).any(1).sum(1) >= SAME_PARAGRAPH
            for keeper, other in near[:, alike].T.tolist():
                if better[keeper] == keeper and better[other] == other:
                    better[other] = keeper
        better = better[better]  # what has the sketch of one that is left out
        repeats = np.flatnonzero(better != np.arange(len(ranked)))
        found = np.hstack([places[ranked[repeats], :2], places[ranked[better[repeats]], :2]])
        return pd.DataFrame(found, columns=["document", "line", "kept_document", "kept_line"])


def _find(known: Hashes, hashes: Hashes) -> tuple[Flags, Integers]:
    """Say which hashes are known, and where; the last entry, `LAST`, stands in for none."""
    places = np.searchsorted(known[:-1], hashes)
    return known[places] == hashes, places


def _pairs(hashes: Hashes, owners: Integers) -> Iterator[tuple[Integers, Integers]]:
    """Pair the owners of a hash: (earlier, later) (2, E), sorted, and how many they share (E,).

    Some earlier ones at a time, so that memory does not grow with the pairs. Of more than 1,000
    owners of one hash each is paired with the first 1,000, so that time does not either.
    """
    import pandas as pd
    from scipy.sparse import csr_array, triu

    ordered = np.sort(hashes)
    twice = np.append(distinct(ordered[1:][ordered[1:] == ordered[:-1]]), LAST)
    del ordered  # most stand there once: what is left is small
    shared, hash_of = _find(twice, hashes)
    hash_of, owners = hash_of[shared], owners[shared]
    sizes = np.bincount(hash_of, minlength=len(twice))
    early = pd.Series(owners).groupby(hash_of).cumcount().to_numpy() < FIRST_OWNERS
    shape = owners.max(initial=-1) + 1, len(sizes)
    ones = np.ones(len(owners), np.int32)
    firsts = csr_array((ones[early], (owners[early], hash_of[early])), shape)
    every = csr_array((ones, (hash_of, owners)), shape[::-1])
    work = (firsts @ sizes).cumsum() // AT_ONCE
    starts = np.flatnonzero(np.diff(work, prepend=-1))
    for start, end in pairwise([*starts, shape[0]]):
        pairs = triu((firsts[start:end] @ every).sorted_indices(), start + 1)
        yield np.stack([pairs.row + start, pairs.col]), pairs.data


@dataclass
class Leakage:
    """Runs of 13 characters of held-out text that training text has too.

    `longest` is the longest stretch of such runs in a row, in characters.
    """

    runs: int = 0
    shared: int = 0
    longest: int = 0

    def add(self, shared: Flags) -> None:
        """Count a text's runs, flagged where they are shared."""
        self.runs += len(shared)
        self.shared += int(shared.sum())
        longest = len(max(shared.tobytes().split(b"\0")))  # a flag is a byte, 0 or 1
        self.longest = max(self.longest, longest + GRAM - 1 if longest else 0)


def _grams(text: str) -> Hashes:
    return ngrams(without_spaces(text)[0], GRAM)


class HeldOutNgrams:
    """The runs of held-out texts, and which of them training text has."""

    def __init__(self, texts: Iterable[str]) -> None:
        self._known = distinct(np.concatenate([[LAST], *map(_grams, texts)]))
        self._seen = np.zeros(len(self._known), np.bool_)

    def update(self, text: str) -> None:
        """Note the runs of a training text."""
        runs = distinct(_grams(text))  # sorted: found three times faster
        known, places = _find(self._known, runs)
        self._seen[places[known]] = True

    def shared(self, text: str) -> Flags:
        """Flag the runs of a text that stand in held-out and in training text."""
        known, places = _find(self._known, _grams(text))
        return known & self._seen[places]


def drop_sentences(text: str, shared: Flags) -> str:
    """Drop the sentences in which a flagged run has its middle."""
    places = without_spaces(text)[1]
    middles = np.zeros(len(text), np.bool_)
    middles[places[np.flatnonzero(shared) + GRAM // 2]] = True
    kept = SENTENCE.sub(lambda x: "" if middles[x.start() : x.end()].any() else x[0], text)
    return re.sub(r"\n+", "\n", kept).strip("\n")
