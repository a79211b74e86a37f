"""Find text that occurs twice: editions, reposts, and what held-out and training text share.

To find duplicates, only Han characters are compared, in simplified form, so that punctuation and
script do not matter. A run is n of these characters in a row. Sketches are compared, not texts. A
book's sketch is the hashes of a 32nd of its runs of 13 characters; a paragraph's sketch is the 8
smallest hashes of its runs of 8 characters (bottom-k sketches, Broder 1997). Memory is a few bytes
for each character of text. To find leakage, all runs of 13 characters of any kind except white
space are compared.
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
SAMPLE = 2000  # characters at a text's beginning by which its script is decided
# Share of characters that OpenCC changes: a text in which it changes more is traditional. In
# simplified texts the share is below 0.003.
TRADITIONAL = 0.02
# Matches 著 where Taiwan and Hong Kong write it for 着. It does not match 著 in words of writing
# and of fame, nor behind the name of an author on a title page.
ZHE = re.compile(
    "著(?<![原土巨专编译遗拙卓昭较撰名所最素]著)(?<!(?<!明)显著)(?<!(?<!议)论著)(?<!微知著)"
    "(?![述录撰者闻]|有?《|称(?![是赞谢呼道])|作(?![揖别甚什势罢来起作案了成去弃])"
    "|名(?![姓单字将])|书(?![信简呈僮童房卷本箱包桌生页香]))"
    r"(?!(?:(?<=[ 　]著)|(?<=[ 　]..著)|(?<=[ 　]...著)|(?<=^..著)|(?<=^...著))[ 　\r]*$)",
    re.MULTILINE,
)

# Books.
BOOK_RUN, BOOK_SAMPLING = 13, np.uint64(32)  # characters in a run; one run in 32 is kept
# Characters that stand for lost ones, or that Chinese prose does not have: of addresses, marks.
NOISE = re.compile(f"[^{CJK}\U00020000-\U0003ffff\\s]")
# The end of a paragraph; a line that was broken at a fixed width ends like this only by chance.
PARAGRAPH_END = re.compile("[。！？!?…—”’』」]$", re.MULTILINE)
HEAD = 99  # characters at a chapter's beginning in which its heading stands
NOISE_WEIGHT = 50  # 2 % of noise then make an edition as bad as the loss of half its chapters
SAME_BOOK = 0.5  # least share of hashes that the better edition has; editions of 水浒传 share 0.65
MUCH_LONGER = 1.25  # times the better edition's length: a book longer than that is kept

# Paragraphs.
RUN = 8  # characters in a run
SKETCH, SAME_PARAGRAPH = 8, 6  # hashes in a sketch; how many two sketches of one text share
HASH_BITS = 40  # highest bits of a hash that are kept; with a line's number they fit into 64 bits
# The matrix product of the sketches and POWERS is one hash for each sketch.
POWERS = np.array([pow(HASH_BASE, n + 1, 1 << 64) for n in range(SKETCH)], np.uint64)
# If two sketches share 6 of 8 hashes, at most 2 of each are not shared, so the smallest shared hash
# is among the 3 smallest of both sketches.
PROBES = SKETCH - SAME_PARAGRAPH + 1
LEAST_RUNS = 40 - RUN + 1  # of 40 Han characters; a shorter paragraph may stand twice

# Pairs.
LAST = np.uint64(np.iinfo(np.uint64).max)  # stands at the end of a sorted list of hashes
MOST_PARTNERS = 1000  # owners of one hash, the first ones, with which its other owners are paired
AT_ONCE = 100_000  # pairs in a block, about; this bounds the memory

# Leakage.
GRAM = 13  # characters in a run
# A sentence with the closing quotation marks behind it, or the rest of a line with its newline.
SENTENCE = re.compile(r"[^。！？!?\n]*(?:[。！？!?]+[”’』」）]*|\n|\Z)")


@functools.cache
def _converter() -> Any:
    """Load OpenCC's converter from traditional to simplified characters, once a process."""
    from opencc import OpenCC

    return OpenCC("t2s")


def is_traditional(text: str) -> bool:
    """Whether more than 2 % of a text's first 2,000 characters are traditional ones."""
    head = text[:SAMPLE]
    # Not strict, in case OpenCC returns another number of characters.
    changed: int = sum(a != b for a, b in zip(head, _converter().convert(head), strict=False))
    return changed > TRADITIONAL * len(head)


def to_simplified(text: str) -> str:
    """Make a text simplified if it `is_traditional`; any other text comes back unchanged.

    `"他笑著說，那是一部名著。"` becomes `"他笑着说，那是一部名著。"`.
    """
    return ZHE.sub("着", _converter().convert(text)) if is_traditional(text) else text


@dataclass(frozen=True)
class SameBook:
    """A book that is left out because a better edition of it is kept."""

    book: str  # title of the book that is left out
    kept: str  # title of the better edition
    share: float  # of the distinct hashes in the sketch of `book`, the share that `kept` has too


@dataclass
class _BookSketch:
    """The sampled hashes of a book's runs, and numbers that show how good an edition it is."""

    hashes: "array[int]" = field(default_factory=lambda: array("Q"))  # of a 32nd of the runs
    characters: int = 0  # number of Han characters
    traditional: int = 0  # number of traditional chapters, less that of simplified ones
    chapters: int = 0  # number of chapters with a heading
    paragraphs: int = 0  # number of lines that end as a paragraph, less that of other lines
    noise: int = 0  # number of characters that `NOISE` matches

    def distinct_hashes(self) -> Hashes:
        """Return the distinct hashes in ascending order; this also sorts `hashes` itself."""
        return distinct(np.frombuffer(self.hashes, np.uint64))


class DuplicateIndex:
    """The sketches of documents, by which duplicates among them are found.

    Add each document with `add`; `same_books` and `same_paragraphs` then list the duplicates.
    """

    def __init__(self) -> None:
        self._books: dict[str, _BookSketch] = {}
        self._documents = 0  # number of documents added
        # (P, 11), flat: a paragraph's document, line, number of runs and 8 smallest hashes
        self._paragraphs = array("q")

    def add(self, original: str, title: str | None, heading: str | None = None) -> None:
        """Add a document: a chapter of the book `title`, or general text if `title` is None.

        Documents have numbers from 0 on, in the order in which they are added. `original` is the
        document's text. The document counts as a chapter with a heading if `heading` stands in the
        first 99 characters of the text, or is None (not known); it does not if `heading` is `""`.
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
            # "\0" stands in no text, so an empty heading is never found.
            book.chapters += heading is None or (heading or "\0") in original[:HEAD]
            # Lines that end as a paragraph less the others: twice the former less all lines.
            book.paragraphs += 2 * len(PARAGRAPH_END.findall(text)) - text.count("\n") - 1
            book.noise += len(NOISE.findall(text))
        line_of = np.cumsum(characters == ord("\n"))[is_han]
        self._add_paragraphs(ngrams(characters[is_han], RUN), line_of)
        self._documents += 1

    def _add_paragraphs(self, hashes: Hashes, line_of: Integers) -> None:
        """Add the sketch of each paragraph of the next document with 40 Han characters or more.

        A paragraph is a line. `line_of` is, for each of the document's C Han characters, the number
        of its line, (C,); `hashes` are those of the document's runs, (C - 7,), or (0,) if there are
        none. A run that reaches over the end of a line does not count.
        """
        first, last = line_of[: len(hashes)], line_of[RUN - 1 :]  # lines of a run's two ends
        inside = first == last
        high_bits = (hashes[inside] >> np.uint64(64 - HASH_BITS)).view(np.int64)
        keys = (first[inside] << HASH_BITS) | high_bits
        keys.sort()  # by line, then by hash
        # Three rows: the numbers of lines, the places of their first keys, their counts of keys.
        lines = np.stack(np.unique(keys >> HASH_BITS, return_index=True, return_counts=True))
        line, start, runs = lines[:, lines[2] >= LEAST_RUNS]
        # The 8 smallest hashes of each line, without its number: (lines, 8).
        smallest = keys[start[:, None] + np.arange(SKETCH)] % (1 << HASH_BITS)
        document = np.full(len(line), self._documents)
        self._paragraphs.frombytes(np.column_stack([document, line, runs, smallest]).tobytes())

    def same_books(self) -> list[SameBook]:
        """List the books of which a better edition has at least half of the hashes.

        A book is not listed if it is more than 1.25 times as long as the better edition, or if the
        better edition is itself listed. A book's length is the number of its distinct hashes. The
        better edition (see `_quality`) is the simplified one, else the one with less noise and more
        headings and paragraphs, else the one with more Han characters, else the first.
        """
        names = sorted(self._books, key=self._quality)
        sketches = [self._books[name].distinct_hashes() for name in names]
        sizes = np.array([len(sketch) for sketch in sketches], np.int64)
        hashes = np.concatenate([np.empty(0, np.uint64), *sketches])
        copies: dict[int, SameBook] = {}  # the books to be left out, by their place in `names`
        # Pairs, (2, E), have the better edition first, and come in the order of the better ones: so
        # it is decided already whether that one is itself left out.
        for pairs, shared in _pairs(hashes, np.repeat(np.arange(len(names)), sizes)):
            better_sizes, other_sizes = sizes[pairs]
            same = (shared >= SAME_BOOK * other_sizes) & (other_sizes <= MUCH_LONGER * better_sizes)
            for better, other, count in np.vstack([pairs, shared])[:, same].T.tolist():
                if better not in copies and other not in copies:
                    copies[other] = SameBook(names[other], names[better], count / int(sizes[other]))
        return list(copies.values())

    def _quality(self, name: str) -> tuple[bool, float, int, str]:
        """Return a key that sorts the better of two editions first; `name` is a book's title.

        The better one is in simplified characters; else it has less disorder (noise, less the
        headings and paragraphs found); else more Han characters; else it is the first by name.
        """
        book = self._books[name]
        size = len(book.distinct_hashes())
        recurring = len(book.hashes) - size  # advertisements, mostly
        # Noise as a share of the book. Both are counted in hashes: one stands for 32 characters.
        noise = (book.noise / int(BOOK_SAMPLING) + recurring) / max(1, size)
        structure = np.log2((1 + book.chapters) * max(1, book.paragraphs))
        # Rounded, so that of two nearly equal editions the longer one comes first.
        disorder = round(NOISE_WEIGHT * noise - structure, 1)
        return book.traditional > 0, disorder, -book.characters, name

    def same_paragraphs(self, leaving_out: Collection[int] = ()) -> "pd.DataFrame":
        """List the paragraphs that repeat another one, in a table with a row for each.

        The columns `document` and `line` give the place of a paragraph to be left out,
        `kept_document` and `kept_line` that of the paragraph kept for it. The kept one is longer,
        or as long and earlier, and they share 6 or more of 8 hashes. Paragraphs of less than 40 Han
        characters, and those of the documents `leaving_out`, are not compared. Lines are counted
        from 0; a paragraph's length is its number of runs.
        """
        import pandas as pd

        table = np.frombuffer(self._paragraphs, np.int64).reshape(-1, 3 + SKETCH)
        places, sketches = table[:, :3], table[:, 3:].view(np.uint64)
        compared = np.flatnonzero(~np.isin(places[:, 0], list(leaving_out)))
        ranked = compared[np.argsort(-places[compared, 2], kind="stable")]  # the longest first
        keys = (sketches @ POWERS)[ranked]
        # From here on a paragraph's number is its rank, its place in `ranked`. `keeper_of` has for
        # each paragraph the one that is kept for it: for now the first one with an equal sketch.
        _, first, group = np.unique(keys, return_index=True, return_inverse=True)
        keeper_of = first[group]
        first.sort()
        for pairs, _ in _pairs(sketches[ranked[first], :PROBES].ravel(), np.repeat(first, PROBES)):
            kept_pairs = pairs[:, (keeper_of[pairs] == pairs).all(0)]  # both are still kept
            longer, other = sketches[ranked[kept_pairs]]  # (E, 8) each
            # The sum counts the hashes of the other sketch that are in the longer one's sketch.
            alike = (longer[:, :, None] == other[:, None]).any(1).sum(1) >= SAME_PARAGRAPH
            for keeper, repeat in kept_pairs[:, alike].T.tolist():
                if keeper_of[keeper] == keeper and keeper_of[repeat] == repeat:
                    keeper_of[repeat] = keeper
        keeper_of = keeper_of[keeper_of]  # the keeper of a keeper that is itself left out
        repeats = np.flatnonzero(keeper_of != np.arange(len(ranked)))
        rows = np.hstack([places[ranked[repeats], :2], places[ranked[keeper_of[repeats]], :2]])
        return pd.DataFrame(rows, columns=["document", "line", "kept_document", "kept_line"])


def _look_up(table: Hashes, hashes: Hashes) -> tuple[Flags, Integers]:
    """Look N hashes up in a table: return whether it has each, (N,), and their places in it, (N,).

    The table is in ascending order and ends with `LAST`. For a hash that the table does not have,
    the place is that of the next greater hash.
    """
    places = np.searchsorted(table[:-1], hashes)  # without `LAST`: a place is always in the table
    return table[places] == hashes, places


def _pairs(hashes: Hashes, owners: Integers) -> Iterator[tuple[Integers, Integers]]:
    """Yield the pairs of owners that have a hash in common, in blocks.

    `owners[n]`, a number from 0 on, is the owner of `hashes[n]`; `owners` ascends. A block is an
    array of E pairs (earlier owner, later owner), sorted, (2, E), and the number of hashes that
    each pair shares, (E,). A block has all pairs of some consecutive earlier owners, so that memory
    does not grow with the number of pairs. If a hash has more than 1,000 owners, each owner is
    paired with the first 1,000 only, so that time does not grow with the square of their number.
    """
    import pandas as pd
    from scipy.sparse import csr_array, triu

    ordered = np.sort(hashes)
    recurring = np.append(distinct(ordered[1:][ordered[1:] == ordered[:-1]]), LAST)
    del ordered  # most hashes occur once: what is left is small
    is_recurring, hash_of = _look_up(recurring, hashes)  # hash_of: a hash's place in `recurring`
    hash_of, owners = hash_of[is_recurring], owners[is_recurring]
    owner_counts = np.bincount(hash_of, minlength=len(recurring))
    is_early = pd.Series(owners).groupby(hash_of).cumcount().to_numpy() < MOST_PARTNERS
    shape = owners.max(initial=-1) + 1, len(recurring)
    ones = np.ones(len(owners), np.int32)
    # The matrices have a 1 where an owner has a hash; their product counts the hashes that two
    # owners share. `early` has only the first 1,000 owners of each hash.
    early = csr_array((ones[is_early], (owners[is_early], hash_of[is_early])), shape)
    transposed = csr_array((ones, (hash_of, owners)), shape[::-1])
    # An owner's pairs are at most the sum of the numbers of owners that its hashes have. Owners for
    # which these sums come to about 100,000 make a block; `blocks` has each owner's block number.
    blocks = (early @ owner_counts).cumsum() // AT_ONCE
    starts = np.flatnonzero(np.diff(blocks, prepend=-1))  # the first owner of each block
    for start, end in pairwise([*starts, shape[0]]):
        # Above the diagonal, which begins at column `start`, the other owner is the later one.
        pairs = triu((early[start:end] @ transposed).sorted_indices(), start + 1)
        yield np.stack([pairs.row + start, pairs.col]), pairs.data


@dataclass
class Leakage:
    """Counts of runs of 13 characters in held-out text: all, and those that training text has."""

    runs: int = 0  # number of all runs
    shared: int = 0  # number of runs that training text has too
    longest: int = 0  # number of characters in the longest row of consecutive shared runs

    def add(self, shared: Flags) -> None:
        """Count the runs of a held-out text; `shared`, (runs,), flags those in training text."""
        self.runs += len(shared)
        self.shared += int(shared.sum())
        longest = max(map(len, shared.tobytes().split(b"\0")))  # in runs; a flag is a byte, 0 or 1
        self.longest = max(self.longest, longest + GRAM - 1 if longest else 0)


def _run_hashes(text: str) -> Hashes:
    """Hash every run of 13 characters of a text, white space left out: (runs,)."""
    return ngrams(without_spaces(text)[0], GRAM)


class HeldOutNgrams:
    """The runs of 13 characters of the held-out `texts`, each with a flag: training text has it.

    Call `update` with every training text first, then `shared`.
    """

    def __init__(self, texts: Iterable[str]) -> None:
        self._held_out = distinct(np.concatenate([[LAST], *map(_run_hashes, texts)]))
        self._in_training = np.zeros(len(self._held_out), np.bool_)

    def update(self, text: str) -> None:
        """Mark the held-out runs that a training text has."""
        runs = distinct(_run_hashes(text))  # sorted hashes are looked up three times faster
        is_held_out, places = _look_up(self._held_out, runs)
        self._in_training[places[is_held_out]] = True

    def shared(self, text: str) -> Flags:
        """Flag the runs of a text that both held-out and training text have: (runs,)."""
        is_held_out, places = _look_up(self._held_out, _run_hashes(text))
        return is_held_out & self._in_training[places]


def drop_sentences(text: str, shared: Flags) -> str:
    """Return a held-out text without the sentences that training text has too, and no blank lines.

    `shared` is what `HeldOutNgrams.shared` returns for the text: a flag for each run of 13
    characters. For a flagged run only the sentence that contains its middle character is dropped,
    even if the run reaches into another sentence.
    """
    _, places = without_spaces(text)  # the places of the characters that runs are made of
    middles = np.zeros(len(text), np.bool_)
    middles[places[np.flatnonzero(shared) + GRAM // 2]] = True
    rest = SENTENCE.sub(lambda m: "" if middles[m.start() : m.end()].any() else m[0], text)
    return re.sub(r"\n+", "\n", rest).strip("\n")
