"""Measure how fast novels become a mixture, against the usual script's way, in one run.

    python benchmarks/prepare.py TOKENIZER [CORPUS]

The usual way: read with errors ignored, encode, cut windows with 20 % overlap, decode them to
JSONL, encode that again. Ours also tells encodings apart, cleans, deduplicates, splits, compares
with held-out text and finds words. TOKENIZER is a folder or hub name; CORPUS has `wuxia/` and
`general/`, and defaults to `WUXIA_CORPUS`, else `../shared/corpus`.
"""

import json
import os
import platform
import sys
import tempfile
import time
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from wuxia_core import load_config, mix
from wuxia_core.config import PROJECT, Config
from wuxia_core.model import load_tokenizer

WINDOW = 1024  # tokens


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


def main(tokenizer_name: str, corpus: Path) -> None:
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


if __name__ == "__main__":
    here = Path(os.environ.get("WUXIA_CORPUS", PROJECT.parent / "shared" / "corpus"))
    main(sys.argv[1], Path(sys.argv[2]) if len(sys.argv) > 2 else here)
