"""Measure how fast masks are drawn, against the usual loop in one run; and a million masks.

    python benchmarks/masking.py

The usual loop draws a random start for each span and asks for each position whether it is in a list
of masked ones, or in a set. Its spans run into each other, and nothing keys it.
"""

import platform
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator

import numpy as np
import pandas as pd
import torch

from wuxia_core import SpanMasker, load_config, mix
from wuxia_core.config import PROJECT
from wuxia_core.errors import exit_status, run_command
from wuxia_core.masking import SPAN, coverage
from wuxia_core.mixing import train_windows
from wuxia_core.model import add_adapter, load_base, load_tokenizer, make_collator, mask_token_id
from wuxia_core.trainer import masked_cross_entropy

BATCH = 32  # rows
SECONDS = 1.0  # a measurement
ROUNDS = 5  # of each, by turns; the best counts
MASKS, WIDTH, EPOCHS = 1_000_000, 256, 20


def usual_loop(tokens: int, *, as_set: bool) -> list[bool]:
    """Mask 15 % of a row, half of that in spans of 3 to 5, as scripts of this recipe do."""
    count = int(0.15 * tokens)
    masked: list[int] | set[int] = set() if as_set else []
    add = masked.add if isinstance(masked, set) else masked.append
    while len(masked) < count // 2:
        length = random.randint(3, 5)
        start = random.randint(0, tokens - length)
        for place in range(start, start + length):
            if place not in masked:
                add(place)
    while len(masked) < count:
        place = random.randint(0, tokens - 1)
        if place not in masked:
            add(place)
    return [place in masked for place in range(tokens)]


def rate(work: Callable[[], object], tokens: int) -> float:
    """Tokens a second, in millions."""
    start, times = time.perf_counter(), 0
    while time.perf_counter() - start < SECONDS:
        work()
        times += 1
    return times * tokens / (time.perf_counter() - start) / 1e6


def speeds(tokens: int) -> dict[str, float]:
    """Time every way by turns, millions of tokens a second."""
    maskable = np.ones((BATCH, tokens), np.bool_)
    words = np.cumsum(np.random.default_rng(0).random(maskable.shape) < 0.6, axis=1, dtype="i4")
    masker = SpanMasker()
    ways: dict[str, tuple[int, Callable[[], object]]] = {
        f"{BATCH} rows": (BATCH, lambda: masker.kinds(maskable, range(BATCH))),
        "4 rows": (4, lambda: masker.kinds(maskable[:4], range(4))),
        "words": (BATCH, lambda: masker.kinds(maskable, range(BATCH), 0, words)),
        "list": (1, lambda: usual_loop(tokens, as_set=False)),
        "set": (1, lambda: usual_loop(tokens, as_set=True)),
    }
    best = dict.fromkeys(ways, 0.0)
    for _ in range(ROUNDS):
        for name, (rows, work) in ways.items():
            best[name] = max(best[name], rate(work, rows * tokens))
    ratios = {
        f"{ours} / {usual}": best[ours] / best[usual]
        for ours in (f"{BATCH} rows", "4 rows")
        for usual in ("list", "set")
    }
    return best | ratios


def statistics() -> Iterator[str]:
    """Describe a million masks, a line each."""
    shares, gaps, lengths = [], [], Counter()
    for start in range(0, MASKS, 10_000):
        kinds = SpanMasker().kinds(np.ones((10_000, WIDTH), np.bool_), range(start, start + 10_000))
        masked, in_spans = (kinds > 0).sum(1), (kinds == SPAN).sum(1)
        shares.append(masked)
        gaps.append(in_spans - masked / 2)
        edges = np.flatnonzero(np.diff(np.pad(kinds == SPAN, ((0, 0), (1, 1))).ravel()))
        lengths.update((edges[1::2] - edges[::2]).tolist())
    masked, gap = np.concatenate(shares), np.concatenate(gaps)
    spans = lengths.total()
    yield f"{MASKS:,} masks of {WIDTH} tokens, {masked.mean() / WIDTH:.5f} of them masked"
    yield f"a row: {masked.min()} to {masked.max()} tokens (15 % is {0.15 * WIDTH:g})"
    yield f"in spans: half of them {gap.mean():+.4f} tokens, a row {gap.min():+g} to {gap.max():+g}"
    yield "span lengths: " + ", ".join(f"{n}: {lengths[n] / spans:.5f}" for n in sorted(lengths))


def covered() -> str:
    """Compare coverage with independent draws."""
    shares = coverage(SpanMasker(), np.ones((2_000, WIDTH), np.bool_), range(2_000), EPOCHS)
    expected = 1 - 0.85 ** np.arange(1, EPOCHS + 1)
    some = ", ".join(f"{e}: {shares[e - 1]:.4f} ({expected[e - 1]:.4f})" for e in (1, 3, 10, 20))
    apart = np.abs(shares - expected).max()
    return f"masked at least once after epochs (1 - 0.85^E): {some}; at most {apart:.4f} apart"


def batch_time() -> str:
    """Time masking, the collator and a training step of the sample run."""
    config = load_config(PROJECT / "configs" / "sample.yaml")
    name = config.model.model_name_or_path
    tokenizer, base = load_tokenizer(name), load_base(name, torch.float32)
    mask_id = mask_token_id(tokenizer, base.config.vocab_size)
    model = add_adapter(base, config.model, mask_id).train()
    windows = train_windows(mix(config))
    collate = make_collator(config, tokenizer, mask_id, "masked")
    batch = [windows[row] for row in range(config.training.per_device_train_batch_size)]

    def step() -> None:
        inputs = collate(batch)
        labels = inputs.pop("labels")
        targets = (labels >= 0).sum()
        masked_cross_entropy(model(**inputs, use_cache=False), labels, targets).backward()

    masks, collator, whole = (
        1 / rate(work, 1_000_000)
        for work in (lambda: collate.kinds(batch), lambda: collate(batch), step)
    )
    return (
        f"a batch of the sample run: of {1e3 * whole:.0f} ms, forward and backward, the masks take "
        f"{masks / whole:.2%}, all of the collator {collator / whole:.2%}"
    )


def main() -> None:
    """Print everything."""
    print("python benchmarks/masking.py, two x86-64 CPU cores,", end=" ")
    print(f"Python {platform.python_version()}, NumPy {np.__version__}\n")
    print("millions of tokens a second, and ratios")
    print(pd.DataFrame({f"T = {n}": speeds(n) for n in (1024, 4096)}).round(2).to_string(), "\n")
    print(*statistics(), covered(), batch_time(), sep="\n")


if __name__ == "__main__":
    run_command(lambda: exit_status(main))
