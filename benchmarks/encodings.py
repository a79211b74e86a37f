"""Measure how often a text is recovered exactly from its bytes alone.

    python benchmarks/encodings.py [NOVELS]

Encodes random excerpts of real novels and reads them back with `read_book`: 100 a cell, whole and
cut inside the last character. Big5 excerpts come from traditional novels. NOVELS defaults to
`WUXIA_CORPUS`, else `../shared/corpus`.
"""

import os
import random
import sys
import tempfile
from pathlib import Path

import pandas as pd

from wuxia_core import read_book
from wuxia_core.errors import CorpusError

SIZES = (6, 12, 25, 60, 200, 1000, 8000)  # characters
SIMPLIFIED = ("utf-8", "utf-8-sig", "gb2312", "gbk", "gb18030", "utf-16", "utf-16-le", "utf-16-be")
TRADITIONAL = ("cp950", "big5hkscs")
EACH = 100


def excerpt(text: str, size: int, encoding: str, rng: random.Random) -> str:
    """Draw an excerpt with at least 6 Han characters that the encoding can represent.

    Python's gb2312 writes ― and ・ with the bytes that GBK, and everybody, reads as — and ·: those
    are left out.
    """
    also = "gbk" if encoding == "gb2312" else encoding
    while True:
        start = rng.randrange(len(text) - size)
        piece = text[start : start + size]
        han = sum("\u4e00" <= character <= "\u9fff" for character in piece)
        if han >= 6 and piece.encode(encoding, errors="ignore").decode(also) == piece:
            return piece


def recovered(piece: str, encoding: str, cut: bool, path: Path) -> bool:
    """Whether `read_book` gives the text back; without its last character where that was cut."""
    data = piece.encode(encoding)
    whole = piece[:-1] if cut else piece
    path.write_bytes(data[:-1] if cut else data)
    try:
        return read_book(path).text.removesuffix("\ufffd") == whole
    except CorpusError:
        return False


def table(novels: Path, cut: bool) -> pd.DataFrame:
    """Exact recovery by encoding and size."""
    texts = {
        SIMPLIFIED: "".join(read_book(path).text for path in sorted((novels / "wuxia").iterdir())),
        TRADITIONAL: "".join(
            read_book(path, "cp950").text.replace("\ufffd", "")
            for path in sorted((novels / "messy").glob("*big5.txt"))
        ),
    }
    rng = random.Random(0)
    rows = {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.txt"
        for encodings, text in texts.items():
            for encoding in encodings:
                rows[encoding] = [
                    sum(
                        recovered(excerpt(text, size, encoding, rng), encoding, cut, path)
                        for _ in range(EACH)
                    )
                    / EACH
                    for size in SIZES
                ]
    frame = pd.DataFrame(rows, index=SIZES).T
    return frame.assign(pooled_12_up=frame.drop(columns=6).mean(axis=1))


def mixed_lines(novels: Path) -> pd.DataFrame:
    """Share of lines recovered in files whose lines alternate at random between two encodings."""
    source = read_book(novels / "wuxia" / "三侠五义.txt").text
    lines = [line for line in source.splitlines() if line.strip()][:2000]
    rng = random.Random(1)
    rows = {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.txt"
        for share in (0.5, 0.1, 0.01):
            data = [x.encode("utf-8" if rng.random() < share else "gb18030") for x in lines]
            path.write_bytes(b"\n".join(data))
            got = read_book(path).text.split("\n")
            right = sum(a == b for a, b in zip(got, lines, strict=True))
            rows[f"{share:.0%} UTF-8, rest GB18030"] = right / len(lines)
    return pd.DataFrame({"lines recovered": rows})


if __name__ == "__main__":
    default = os.environ.get("WUXIA_CORPUS", "../shared/corpus")
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else default)
    for cut in (False, True):
        print("cut inside the last character" if cut else "whole")
        print(table(folder, cut).to_string(float_format="{:.3f}".format), "\n")
    print(mixed_lines(folder).to_string(float_format="{:.4f}".format))
