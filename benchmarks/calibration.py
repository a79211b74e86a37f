"""Measure how often the scorecard sees a change in what is written where there is none.

    python benchmarks/calibration.py [RUN_FOLDER] [--repeats 40]

The base against itself with other seeds of generation, and against adapters whose `lora_B` is a
little noise (standard deviation 1e-4), on the prompts of a run folder (default output/sample). Of
the 95 % intervals at most one in twenty may exclude 0; of 40 repeats a metric's share is known to
0.034. Bits per character are not here: the base's are always the same, and noise does change them.
"""

import argparse
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from tqdm import trange

from wuxia_core.config import PROJECT, load_config
from wuxia_core.errors import exit_status, run_command
from wuxia_core.evaluate.context import EvalContext
from wuxia_core.evaluate.writing import PASSAGE_BATCH, generate, prompts, score_generations
from wuxia_core.mixing import open_run_mixture
from wuxia_core.model import load_adapter

NOISE = 1e-4
OTHER = 1_000_000  # added to a seed


def written(context: EvalContext, asked: list[str], seed: int) -> list[str]:
    """Let the model go on from all prompts."""
    parts = [
        generate(context, asked[start : start + PASSAGE_BATCH], seed + start)
        for start in range(0, len(asked), PASSAGE_BATCH)
    ]
    return [passage for part in parts for passage in part]


def compared(context: EvalContext, base: list[str], other: list[str]) -> pd.Series:
    """Judge two sets of passages: whether each metric's interval excludes 0."""
    rows = [
        {**row, "base": b, "tuned": o, "few_shot": b}
        for row, b, o in zip(prompts(context), base, other, strict=True)
    ]
    found: dict[str, Any] = {
        row["name"]: not row["low"] <= 0 <= row["high"]
        for row in score_generations(context, rows)["metrics"]
        if row["delta"] is not None
    }
    return pd.Series(found)


def main() -> None:
    """Repeat both comparisons, and print the shares."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", nargs="?", default=PROJECT / "output" / "sample", type=Path)
    parser.add_argument("--repeats", type=int, default=40)
    options = parser.parse_args()
    config = load_config(options.folder / "config.yaml")
    mixture = open_run_mixture(options.folder, config.data.processed_data_file)
    context = EvalContext(*load_adapter(options.folder), mixture, config)
    asked = [row["prompt"] for row in prompts(context)]
    seeds, noise = [], []
    for repeat in trange(options.repeats):
        torch.manual_seed(repeat)
        for name, weights in context.model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(weights, std=NOISE)
        with context.model.disable_adapter():
            base = written(context, asked, repeat * len(asked))
            again = written(context, asked, repeat * len(asked) + OTHER)
        tuned = written(context, asked, repeat * len(asked) + 2 * OTHER)
        seeds.append(compared(context, base, again))
        noise.append(compared(context, base, tuned))
    table = pd.DataFrame({"other seeds": pd.DataFrame(seeds).mean(),
                          "small random lora_B": pd.DataFrame(noise).mean()})  # fmt: skip
    print(f"share of intervals that exclude 0, {options.repeats} repeats, {len(asked)} prompts")
    print(table.round(3).to_string())
    print(f"all: {table.mean().round(3).to_dict()}; wanted: at most 0.05")


if __name__ == "__main__":
    run_command(lambda: exit_status(main))
