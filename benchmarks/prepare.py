"""Measure how fast novels become a mixture, against the usual script's way, in one run.

    python benchmarks/prepare.py TOKENIZER [CORPUS]
    python benchmarks/prepare.py TOKENIZER [CORPUS] --megabytes 1000 [--keep-duplicates]

The usual way: read with errors ignored, encode, cut windows with 20 % overlap, decode them to
JSONL, encode that again. Ours also tells encodings apart, cleans, deduplicates, splits, compares
with held-out text and finds words. TOKENIZER is a folder or hub name; CORPUS has `wuxia/` and
`general/`, and defaults to `WUXIA_CORPUS`, else `../shared/corpus`.

With `--megabytes` only our way is measured, its peak of memory too, on that much text made by
shuffling the paragraphs of CORPUS. Each stands there many times, so deduplication leaves little of
it to tokenize; with `--keep-duplicates` all of it is tokenized.
"""

import argparse
import json
import os
import platform
import random
import resource
import tempfile
import time
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from wuxia_core import load_config, mix, read_book
from wuxia_core.config import PROJECT, Config
from wuxia_core.errors import exit_status, run_command
from wuxia_core.model import load_tokenizer

WINDOW = 1024  # tokens
FILE = 10_000_000  # bytes of a file of shuffled paragraphs


def usual(files: list[Path], tokenizer: PreTrainedTokenizerBase, jsonl: Path) -> None:
    """Prepare as the published script does, then encode as its dataset does."""
    step = WINDOW * 4 // 5
    with jsonl.open("w", encoding="utf-8") as out:
        for file in files:
            ids = tokenizer.encode(file.read_text(encoding="utf-8", errors="ignore"))
            for start in range(0, max(1, len(ids) - WINDOW + step), step):
                text = tokenizer.decode(ids[start : start + WINDOW])
                out.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
    with jsonl.open(encoding="utf-8") as lines:
        for line in lines:
            tokenizer(json.loads(line)["text"], truncation=True, max_length=WINDOW)


def settings(corpus: Path, tokenizer: str, folder: Path) -> Config:
    """Point the sample's settings at the corpus; all of the general text is used."""
    config = load_config(PROJECT / "configs" / "sample.yaml")
    config.model.model_name_or_path = tokenizer
    novels = corpus / "wuxia" if (corpus / "wuxia").is_dir() else corpus
    config.data.data_dir, config.data.general_file = str(novels), str(corpus / "general")
    config.data.max_length, config.data.processed_data_file = WINDOW, str(folder)
    config.data.general_ratio = 0.2
    return config


def compare(tokenizer_name: str, corpus: Path) -> None:
    """Time both ways on the same files and print the ratio."""
    files = sorted([*(corpus / "wuxia").glob("*.txt"), *(corpus / "general").glob("*.txt")])
    size = sum(file.stat().st_size for file in files) / 1e6
    with tempfile.TemporaryDirectory() as name:  # imports and dictionaries, once for both
        mix(settings(PROJECT / "data" / "sample", "data/tiny_base", Path(name) / "mixture"))
    start = time.perf_counter()
    tokenizer = load_tokenizer(tokenizer_name)
    loading = time.perf_counter() - start
    with tempfile.TemporaryDirectory() as name:
        start = time.perf_counter()
        usual(files, tokenizer, Path(name) / "usual.jsonl")
        middle = time.perf_counter()
        mixture = mix(settings(corpus, tokenizer_name, Path(name) / "mixture"))
        end = time.perf_counter()
        unused = mixture.outline.query("split == 'unused'")["characters"].sum()
        share = unused / mixture.outline["characters"].sum()
    theirs, ours = middle - start, end - middle - loading
    print(f"\n{size:.1f} MB, {len(files)} files, {os.cpu_count()} cores, {platform.machine()}")
    print(f"usual way  {theirs:5.1f} s  {size / theirs:5.2f} MB/s")
    print(f"ours       {ours:5.1f} s  {size / ours:5.2f} MB/s")
    print(f"ratio      {theirs / ours:5.2f}")
    print(f"with {loading:.1f} s for loading the tokenizer in both: "
          f"ratio {(theirs + loading) / (ours + loading):.2f}")  # fmt: skip
    print(f"({share:.1%} of the characters are general text that the ratio leaves untokenized)")


def write_shuffled(corpus: Path, folder: Path, size: int) -> None:
    """Write files of paragraphs drawn at random from the corpus until they have `size` bytes."""
    texts = [read_book(path).text for path in sorted(corpus.rglob("*.txt"))]
    paragraphs = [line + "\n" for text in texts for line in text.split("\n") if line.strip()]
    rng = random.Random(0)
    for number, start in enumerate(range(0, size, FILE)):
        left = min(FILE, size - start)
        with (folder / f"{number:03}.txt").open("wb") as file:
            while left > 0:
                left -= file.write(rng.choice(paragraphs).encode())


def measure_scale(tokenizer_name: str, corpus: Path, megabytes: int, deduplicate: bool) -> None:
    """Prepare much text, then once more with nothing changed; print seconds and memory."""
    with tempfile.TemporaryDirectory() as name:
        novels = Path(name) / "novels"
        novels.mkdir()
        write_shuffled(corpus, novels, megabytes * 1_000_000)
        config = settings(corpus, tokenizer_name, Path(name) / "mixture")
        config.data.data_dir, config.data.deduplicate = str(novels), deduplicate
        config.data.general_file = str(PROJECT / "data" / "sample" / "general")
        config.data.general_ratio, config.data.max_general_epochs = 0.0001, 1e9
        for what in ("prepare", "unchanged"):
            start = time.perf_counter()
            mixture = mix(config)
            seconds = time.perf_counter() - start
            print(f"{megabytes} MB, {what}: {seconds:.2f} s, {len(mixture.tokens):,} tokens")
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
        print(f"{megabytes} MB, peak of memory: {peak:.2f} GB")


def main() -> None:
    """Measure what is asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    here = Path(os.environ.get("WUXIA_CORPUS", PROJECT.parent / "shared" / "corpus"))
    parser.add_argument("tokenizer", help="folder or hub name")
    parser.add_argument("corpus", nargs="?", type=Path, default=here)
    parser.add_argument("--megabytes", type=int, help="prepare that much, and compare nothing")
    parser.add_argument("--keep-duplicates", action="store_true")
    options = parser.parse_args()
    if options.megabytes:
        deduplicate = not options.keep_duplicates
        measure_scale(options.tokenizer, options.corpus, options.megabytes, deduplicate)
    else:
        compare(options.tokenizer, options.corpus)


if __name__ == "__main__":
    run_command(lambda: exit_status(main))
