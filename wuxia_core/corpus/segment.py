"""Word boundaries that a user's lexicon has the say in: 使一招白鹤亮翅 -> 使, 一招, 白鹤亮翅."""

from collections.abc import Collection, Iterator
from io import StringIO
from pathlib import Path

import numpy as np

from wuxia_core.corpus.ngrams import codes
from wuxia_core.errors import ConfigError


def read_lexicon(path: Path) -> tuple[str, ...]:
    """Read a lexicon: UTF-8, one word a line; lines that start with `#` are comments.

    White space around a word is not part of it.

    Raises
    ------
    ConfigError
        The file cannot be read or holds no word; a line is blank, is not one word of two
        characters or more, or is there twice.
    """
    lines: dict[str, int] = {}  # word → its line
    for number, line in enumerate(StringIO(_read(path)), 1):
        word = line.strip()
        if word.startswith("#"):
            continue
        if fault := _fault(word, lines.get(word)):
            raise ConfigError(f"data.lexicon {path}:{number}: {word or repr(word)} {fault}")
        lines[word] = number
    if not lines:
        raise ConfigError(f"data.lexicon {path}: holds no word; write one a line or set it to null")
    return tuple(lines)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ConfigError(
            f"data.lexicon {path}: cannot be read ({error.strerror}); correct it or set it to null"
        ) from None
    except UnicodeDecodeError as error:
        line, byte = error.object.count(b"\n", 0, error.start) + 1, error.object[error.start]
        raise ConfigError(
            f"data.lexicon {path}:{line}: byte 0x{byte:02x} is not UTF-8; save the file as UTF-8"
        ) from None


def _fault(word: str, earlier: int | None) -> str | None:
    """Say what is wrong with a word, or with a line that should be one; None where nothing is."""
    if not word:
        return "is no word; delete the blank line"
    if len(word.split()) > 1:
        return "holds a space; write one word a line and nothing behind it"
    if len(word) == 1:
        return "is one character, which cannot be cut; write the whole word or delete the line"
    if earlier:
        return f"stands already on line {earlier}; delete one of them"
    return None


class Segmenter:
    """Cuts text into words: those of the lexicon wherever they stand, rjieba's between them.

    The lexicon is not added to rjieba's dictionary, where it would only be a hint: rjieba weighs
    its words against all others by frequency, and still joins some to a neighbour (宋江便 is one
    word to it). It also stays out of the next Segmenter. Of matches that overlap the first counts,
    and of those that begin together the longest, so the order of the lexicon does not matter.
    The price: a short word is also found where it is none, 解穴 in 了解穴道.

    Parameters
    ----------
    lexicon
        Words of two characters or more, as `read_lexicon` gives them.
    """

    def __init__(self, lexicon: Collection[str] = ()) -> None:
        self._words = frozenset(lexicon)
        self._sizes = sorted({len(word) for word in self._words}, reverse=True)
        # whether a code point is some word's first or second: (2, 0x110000)
        self._opens = np.zeros((2, 0x110000), np.bool_)
        for word in self._words:
            self._opens[[0, 1], codes(word[:2])] = True

    def cut(self, text: str) -> list[str]:
        """Cut a text into words; joined, they are the text."""
        import rjieba

        words: list[str] = []
        behind = 0
        for start, end in self._matches(text):
            words += rjieba.cut(text[behind:start])
            words.append(text[start:end])
            behind = end
        words += rjieba.cut(text[behind:])
        return words

    def _matches(self, text: str) -> Iterator[tuple[int, int]]:
        """Find the words of the lexicon as spans [start, end), from left to right."""
        characters = codes(text)
        likely = self._opens[0, characters[:-1]] & self._opens[1, characters[1:]]
        behind = 0
        for start in np.flatnonzero(likely).tolist():
            ends = (start + n for n in self._sizes if text[start : start + n] in self._words)
            if start >= behind and (end := next(ends, 0)):
                yield start, end
                behind = end
