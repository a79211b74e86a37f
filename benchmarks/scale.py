"""Prepare a gigabyte of text and measure the peak of memory, and the check that nothing changed.

    python benchmarks/scale.py TOKENIZER [--megabytes 1000] [--keep-duplicates] [CORPUS]

The text is made by shuffling the paragraphs of all novels and general texts of CORPUS (default:
`WUXIA_CORPUS`, else `../shared/corpus`) again and again, into files of 10 MB. So all of it is there
many times: with deduplication next to nothing is left to tokenize, without it all is.
"""

import argparse
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path

from wuxia_core import read_book
from wuxia_core.config import PROJECT

FILE = 10_000_000  # bytes
PREPARE = """
import resource, sys, time
from wuxia_core import load_config, mix

start = time.perf_counter()
mixture = mix(load_config("configs/sample.yaml", sys.argv[1:]))
seconds = time.perf_counter() - start
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
print(f"{seconds:.2f} s, peak {peak:.2f} GB, torch {'' if 'torch' in sys.modules else 'not '}"
      f"imported, {len(mixture.tokens):,} tokens, {len(mixture.windows):,} chunks")
"""


def shuffled(corpus: Path, folder: Path, size: int) -> None:
    """Write files of shuffled paragraphs until they have `size` bytes."""
    texts = [read_book(path).text for path in sorted(corpus.rglob("*.txt"))]
    paragraphs = [line + "\n" for text in texts for line in text.split("\n") if line.strip()]
    rng = random.Random(0)
    written, number = 0, 0
    while written < size:
        part = 0
        with (folder / f"{number:03}.txt").open("wb") as file:
            while part < min(FILE, size - written):
                part += file.write(rng.choice(paragraphs).encode())
        written, number = written + part, number + 1


def main() -> None:
    """Prepare twice, each time in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("tokenizer", help="folder or hub name")
    parser.add_argument("corpus", nargs="?", type=Path)
    parser.add_argument("--megabytes", type=int, default=1000)
    parser.add_argument("--keep-duplicates", action="store_true")
    options = parser.parse_args()
    here = Path(os.environ.get("WUXIA_CORPUS", PROJECT.parent / "shared" / "corpus"))
    with tempfile.TemporaryDirectory() as name:
        novels = Path(name) / "novels"
        novels.mkdir()
        shuffled(options.corpus or here, novels, options.megabytes * 1_000_000)
        settings = {
            "data.data_dir": novels,
            "data.general_file": PROJECT / "data" / "sample" / "general",
            "data.max_general_epochs": 1e9,
            "data.general_ratio": 0.0001,
            "data.max_length": 1024,
            "data.processed_data_file": Path(name) / "mixture",
            "data.deduplicate": not options.keep_duplicates,
            "model.model_name_or_path": Path(options.tokenizer).resolve(),
        }
        overrides = [f"{key}={value}" for key, value in settings.items()]
        for what in ("prepare", "unchanged"):
            done = subprocess.run(
                [sys.executable, "-c", PREPARE, *overrides],
                cwd=PROJECT, stdout=subprocess.PIPE, text=True, check=True,
            )  # fmt: skip
            print(f"{options.megabytes} MB, {what}: {done.stdout.strip()}", flush=True)


if __name__ == "__main__":
    main()
