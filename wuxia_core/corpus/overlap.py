"""Find text that occurs twice: editions, reposts, and what held-out and training text share.

For duplicates only Han characters are compared, in simplified form, so that punctuation and script
do not matter. Instead of a text its sketch is compared: of a book a 32nd of its runs of 13
characters, of a paragraph the 8 smallest hashes of its runs of 8 (bottom-k sketches, Broder 1997).
Memory is a few bytes for each character of text. For leakage all runs of 13 characters of any kind
are compared, white space aside.
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

from wuxia_core.text import CJK, HASH_BASE, Hashes, codes, distinct, ngrams, without_spaces

if TYPE_CHECKING:
    import pandas as pd

Integers = npt.NDArray[np.int64]
Flags = npt.NDArray[np.bool_]

# Script.
SAMPLE = 2000  # characters at a text's beginning that tell its script
TRADITIONAL = 0.02  # share of characters that OpenCC changes; simplified texts stay under 0.003
# The 著 that stands for 着, as Taiwan and Hong Kong write it. In words of writing and of fame, and
# behind the name of an author on a title page, 著 stays.
ZHE = re.compile(
    "著(?<![原土巨专编译遗拙卓昭较撰名所最素]著)(?<!(?<!明)显著)(?<!(?<!议)论著)(?<!微知著)"
    "(?![述录撰者闻]|有?《|称(?![是赞谢呼道])|作(?![揖别甚什势罢来起作案了成去弃])"
    "|名(?![姓单字将])|书(?![信简呈僮童房卷本箱包桌生页香]))"
    r"(?!(?:(?<=[ 　]著)|(?<=[ 　]..著)|(?<=[ 　]...著)|(?<=^..著)|(?<=^...著))[ 　\r]*$)",
    re.MULTILINE,
)

# Books.
BOOK_RUN, BOOK_SAMPLING = 13, np.uint64(32)  # characters; one run in so many is kept
# Characters that were lost on the way, or that prose in Chinese has not: addresses, marks.
NOISE = re.compile(f"[^{CJK}\U00020000-\U0003ffff\\s]")
# The end of a paragraph; a line that was broken at a fixed width has it only by chance.
PARAGRAPH_END = re.compile("[。！？!?…—”’』」]$", re.MULTILINE)
HEAD = 99  # characters at a chapter's beginning in which its heading stands
NOISE_WEIGHT = 50  # so 2 % of noise weigh as much as half of the chapters or of the paragraphs
SAME_BOOK = 0.5  # share of a book's sketch that another has too; editions of 水浒传 share 0.65
MUCH_LONGER = 1.25  # times the other's length: so long a book holds more, and is not left out

# Paragraphs.
RUN = 8  # characters
SKETCH, SAME_PARAGRAPH = 8, 6  # hashes in a sketch; hashes that sketches of one text share
HASH_BITS = 40  # kept of a hash, so that the number of a line and a hash are one key
HASH_MASK = (1 << HASH_BITS) - 1
# A sketch times these is one hash of the sketch.
POWERS = np.array([pow(HASH_BASE, n + 1, 1 << 64) for n in range(SKETCH)], np.uint64)
PROBES = SKETCH - SAME_PARAGRAPH + 1  # of sketches that share 6 of 8, the 3 smallest share one
LEAST_RUNS = 40 - RUN + 1  # paragraphs of less than 40 Han characters may stand twice

# Pairs.
LAST = np.uint64(np.iinfo(np.uint64).max)  # stands at the end of a list of hashes
MOST_PARTNERS = 1000  # of the owners of one hash each is compared with the first so many
AT_ONCE = 100_000  # pairs looked at together; this bounds the memory

# Leakage.
GRAM = 13  # characters in a run
SENTENCE = re.compile(r"[^。！？!?\n]*(?:[。！？!?]+[”’』」）]*|\n|\Z)")


@functools.cache
def _converter() -> Any:
    """Load OpenCC's converter from traditional to simplified characters."""
    from opencc import OpenCC

    return OpenCC("t2s")


def to_simplified(text: str) -> str:
    """Convert a text to simplified characters if its first 2,000 are traditional ones.

    `"他笑著說，那是一部名著。"` becomes `"他笑着说，那是一部名著。"`. A simplified text comes back
    unchanged.
    """
    head = text[:SAMPLE]
    changed = sum(a != b for a, b in zip(head, _converter().convert(head), strict=False))
    if changed <= TRADITIONAL * len(head):
        return text
    return ZHE.sub("着", _converter().convert(text))


@dataclass(frozen=True)
class SameBook:
    """A book that is left out, the one that is kept, and the share of the first in the second."""

    book: str
    kept: str
    share: float  # of the runs of `book` that `kept` has


@dataclass
class _BookSketch:
    """The sampled hashes of a book's runs, and what tells how good an edition it is."""

    hashes: "array[int]" = field(default_factory=lambda: array("Q"))
    characters: int = 0  # Han characters
    traditional: int = 0  # number of traditional chapters, less that of simplified ones
    chapters: int = 0  # number of chapters with a heading
    paragraphs: int = 0  # number of lines that end as a paragraph, less that of the others
    noise: int = 0  # number of characters of noise

    def distinct(self) -> Hashes:
        """Give the distinct hashes, sorted."""
        return distinct(np.frombuffer(self.hashes, np.uint64))


class DuplicateIndex:
    """Sketches of the documents that were added, by which duplicates among them are found."""

    def __init__(self) -> None:
        self._books: dict[str, _BookSketch] = {}
        self._documents = 0  # number of documents added
        # (P, 11), a row for each paragraph: document, line, number of runs, the 8 smallest hashes
        self._paragraphs = array("q")

    def add(self, original: str, title: str | None, heading: str | None = None) -> None:
        """Add a document, a chapter of the book `title` or (None) general text.

        Documents have numbers from 0 on, in the order in which they are added. A `heading` that is
        not in the text's first 99 characters tells that no chapter was found there.
        """
        text = to_simplified(original)
        characters = codes(text)
        is_han = (characters >= 0x3400) & (characters < 0xA000)
        if title is not None:
            book = self._books.setdefault(title, _BookSketch())
            hashes = ngrams(characters[is_han], BOOK_RUN)
            book.hashes.frombytes(hashes[hashes % BOOK_SAMPLING == 0].tobytes())
            book.characters += int(is_han.sum())
            book.traditional += 1 if text != original else -1
            book.chapters += heading is None or (heading or "\0") in original[:HEAD]
            book.paragraphs += 2 * len(PARAGRAPH_END.findall(text)) - text.count("\n") - 1
            book.noise += len(NOISE.findall(text))
        line_of = np.cumsum(characters == ord("\n"))[is_han]
        self._add_paragraphs(ngrams(characters[is_han], RUN), line_of)
        self._documents += 1

    def _add_paragraphs(self, hashes: Hashes, line_of: Integers) -> None:
        """Add the sketch of each long paragraph of a document with C Han characters.

        `hashes` are those of the runs, (C - 7,), `line_of` the number of each character's line,
        (C,). A run that reaches over the end of a line does not count.
        """
        first, last = line_of[: len(hashes)], line_of[RUN - 1 :]  # lines of a run's two ends
        inside = first == last
        keys = (first[inside] << HASH_BITS) | (hashes[inside] >> np.uint64(24)).view(np.int64)
        keys.sort()  # by line, then by hash
        lines = np.stack(np.unique(keys >> HASH_BITS, return_index=True, return_counts=True))
        line, start, runs = lines[:, lines[2] >= LEAST_RUNS]
        smallest = keys[start[:, None] + np.arange(SKETCH)] & HASH_MASK  # (lines, 8)
        document = np.full(len(line), self._documents)
        self._paragraphs.frombytes(np.column_stack([document, line, runs, smallest]).tobytes())

    def same_books(self) -> list[SameBook]:
        """List the books of which a better edition holds at least half, and is not much shorter.

        The better of two editions is the simplified one, else the one with less noise and more
        headings and paragraphs found, else the longer one.
        """
        names = sorted(self._books, key=self._quality)
        sketches = [self._books[name].distinct() for name in names]
        sizes = np.array([len(sketch) for sketch in sketches], np.int64)
        hashes = np.concatenate([np.empty(0, np.uint64), *sketches])
        copies: dict[int, SameBook] = {}  # the books to be left out, by their place in names
        for pairs, shared in _pairs(hashes, np.repeat(np.arange(len(names)), sizes)):
            better_sizes, other_sizes = sizes[pairs]
            same = (shared >= SAME_BOOK * other_sizes) & (other_sizes <= MUCH_LONGER * better_sizes)
            for better, other, count in np.vstack([pairs, shared])[:, same].T.tolist():
                if better not in copies and other not in copies:
                    copies[other] = SameBook(names[other], names[better], count / int(sizes[other]))
        return list(copies.values())

    def _quality(self, name: str) -> tuple[bool, float, int, str]:
        """Give a key by which the better edition is sorted before the other."""
        book = self._books[name]
        size = len(book.distinct())
        recurring = len(book.hashes) - size  # advertisements, mostly
        noise = (book.noise / int(BOOK_SAMPLING) + recurring) / max(1, size)
        parts = np.log2((1 + book.chapters) * max(1, book.paragraphs))
        return book.traditional > 0, round(NOISE_WEIGHT * noise - parts, 1), -book.characters, name

    def same_paragraphs(self, leaving_out: Collection[int] = ()) -> "pd.DataFrame":
        """List the paragraphs that repeat another one, exactly or nearly: a row for each.

        Columns: `document` and `line` of the one to be left out; `kept_document` and `kept_line` of
        one with the same text that is longer, or as long and earlier. The documents `leaving_out`
        are not compared.
        """
        import pandas as pd

        table = np.frombuffer(self._paragraphs, np.int64).reshape(-1, 3 + SKETCH)
        places, sketches = table[:, :3], table[:, 3:].view(np.uint64)
        compared = np.flatnonzero(~np.isin(places[:, 0], list(leaving_out)))
        ranked = compared[np.argsort(-places[compared, 2], kind="stable")]  # the longest first
        keys = (sketches @ POWERS)[ranked]
        # A paragraph is its rank from here on, and keeper_of gives the one that is kept for it: at
        # first the first one with the very same sketch.
        _, first, group = np.unique(keys, return_index=True, return_inverse=True)
        keeper_of = first[group]
        first.sort()
        for pairs, _ in _pairs(sketches[ranked[first], :PROBES].ravel(), np.repeat(first, PROBES)):
            kept_pairs = pairs[:, (keeper_of[pairs] == pairs).all(0)]
            longer, other = sketches[ranked[kept_pairs]]  # (E, 8) each
            alike = (longer[:, :, None] == other[:, None]).any(1).sum(1) >= SAME_PARAGRAPH
            for keeper, repeat in kept_pairs[:, alike].T.tolist():
                if keeper_of[keeper] == keeper and keeper_of[repeat] == repeat:
                    keeper_of[repeat] = keeper
        keeper_of = keeper_of[keeper_of]  # for those whose first keeper is itself left out
        repeats = np.flatnonzero(keeper_of != np.arange(len(ranked)))
        rows = np.hstack([places[ranked[repeats], :2], places[ranked[keeper_of[repeats]], :2]])
        return pd.DataFrame(rows, columns=["document", "line", "kept_document", "kept_line"])


def _look_up(table: Hashes, hashes: Hashes) -> tuple[Flags, Integers]:
    """Flag the hashes that stand in a table, and give their places in it: (N,) and (N,).

    The table is sorted and ends with `LAST`, whose place is given for hashes above all others.
    """
    places = np.searchsorted(table[:-1], hashes)
    return table[places] == hashes, places


def _pairs(hashes: Hashes, owners: Integers) -> Iterator[tuple[Integers, Integers]]:
    """Pair the owners that have a hash in common: `owners[n]`, a number from 0 on, has `hashes[n]`.

    Yields blocks of E pairs (earlier, later), sorted, (2, E), with the number of hashes that each
    pair shares, (E,). A block has the pairs of some earlier owners, so that memory does not grow
    with the pairs. If one hash has more than 1,000 owners, each is paired with the first 1,000, so
    that time does not grow with their square.
    """
    import pandas as pd
    from scipy.sparse import csr_array, triu

    ordered = np.sort(hashes)
    recurring = np.append(distinct(ordered[1:][ordered[1:] == ordered[:-1]]), LAST)
    del ordered  # most hashes stand there once: what is left is small
    is_recurring, hash_of = _look_up(recurring, hashes)
    hash_of, owners = hash_of[is_recurring], owners[is_recurring]  # hash_of: place in recurring
    owner_counts = np.bincount(hash_of, minlength=len(recurring))
    is_early = pd.Series(owners).groupby(hash_of).cumcount().to_numpy() < MOST_PARTNERS
    shape = owners.max(initial=-1) + 1, len(recurring)
    ones = np.ones(len(owners), np.int32)
    # Matrices with a 1 where an owner has a hash; their product counts the hashes that two share.
    early = csr_array((ones[is_early], (owners[is_early], hash_of[is_early])), shape)
    transposed = csr_array((ones, (hash_of, owners)), shape[::-1])
    blocks = (early @ owner_counts).cumsum() // AT_ONCE  # number of the block of each owner
    starts = np.flatnonzero(np.diff(blocks, prepend=-1))
    for start, end in pairwise([*starts, shape[0]]):
        pairs = triu((early[start:end] @ transposed).sorted_indices(), start + 1)
        yield np.stack([pairs.row + start, pairs.col]), pairs.data


@dataclass
class Leakage:
    """Counts of the runs of 13 characters of held-out text, and of those that training text has."""

    runs: int = 0  # number of all runs
    shared: int = 0  # number of runs that training text has too
    longest: int = 0  # characters: the longest stretch of shared runs in a row

    def add(self, shared: Flags) -> None:
        """Add the runs of a text, given as a flag for each: whether it is shared."""
        self.runs += len(shared)
        self.shared += int(shared.sum())
        longest = len(max(shared.tobytes().split(b"\0")))  # a flag is a byte, 0 or 1
        self.longest = max(self.longest, longest + GRAM - 1 if longest else 0)


def _run_hashes(text: str) -> Hashes:
    """Hash every run of 13 characters of a text, white space aside."""
    return ngrams(without_spaces(text)[0], GRAM)


class HeldOutNgrams:
    """The runs of held-out texts, and for each whether training text has it."""

    def __init__(self, texts: Iterable[str]) -> None:
        self._held_out = distinct(np.concatenate([[LAST], *map(_run_hashes, texts)]))
        self._in_training = np.zeros(len(self._held_out), np.bool_)

    def update(self, text: str) -> None:
        """Mark the runs that a training text has."""
        runs = distinct(_run_hashes(text))  # sorted ones are looked up three times faster
        is_held_out, places = _look_up(self._held_out, runs)
        self._in_training[places[is_held_out]] = True

    def shared(self, text: str) -> Flags:
        """Flag the runs of a text that both held-out and training text have: (runs,)."""
        is_held_out, places = _look_up(self._held_out, _run_hashes(text))
        return is_held_out & self._in_training[places]


def drop_sentences(text: str, shared: Flags) -> str:
    """Drop the sentences of a held-out text that training text has too.

    `shared`, from `HeldOutNgrams.shared`, has a flag for each run of `GRAM` characters. A flagged
    run drops the sentence in which its middle stands: one, even if it reaches into the next.
    """
    _, places = without_spaces(text)  # of the characters that runs are made of
    middles = np.zeros(len(text), np.bool_)
    middles[places[np.flatnonzero(shared) + GRAM // 2]] = True
    rest = SENTENCE.sub(lambda x: "" if middles[x.start() : x.end()].any() else x[0], text)
    return re.sub(r"\n+", "\n", rest).strip("\n")
