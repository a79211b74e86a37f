"""Measure our training step against the standard way, which projects every token, in one run.

    python benchmarks/train_step.py [--shape small|large|both] [--tiny]

Ours is `SpanTrainer` with `masked_cross_entropy` on batches of `MaskCollator`, the standard way
transformers' `Trainer` on their `input_ids` and `labels` alone: the losses are the same. Both train
LoRA (r 16, all seven linear layers, no row for the mask token) on the same random Qwen3: float32,
151,936 rows, head and embedding untied. TRL's SFTTrainer, whose loss projects asked tokens in
chunks, stands beside them where trl is installed.

Each way has a process of its own, by turns. Tokens/s: the median over a process's steps but the
first, and of its rounds the best. Memory: the kernel's high-water mark of the process (ru_maxrss)
less what was resident when model and trainer were ready, and of the rounds the least.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from peft import LoraConfig, get_peft_model
from transformers import Qwen3Config, Qwen3ForCausalLM, Trainer, TrainerCallback, TrainingArguments

from wuxia_core import SpanMasker
from wuxia_core.config import LINEAR_LAYERS, TINY_BASE
from wuxia_core.errors import exit_status, run_command
from wuxia_core.masking import Corruption, MaskCollator, Window
from wuxia_core.model import load_tokenizer
from wuxia_core.trainer import SpanTrainer, masked_cross_entropy

VOCABULARY, MASK_ID, ORDINARY = 151_936, 151_669, 151_643
SHAPES = {  # windows, tokens a window, timed steps, rounds, what is wanted
    "tiny": (2, 64, 2, 1, "only that it works"),
    "small": (4, 512, 5, 3, "at least 6 times the tokens/s, at most 0.333 of the memory"),
    "large": (1, 512, 3, 3, "at least 1.5 times the tokens/s"),
}
PARTS = ("hidden_size", "num_hidden_layers", "intermediate_size", "num_attention_heads",
         "num_key_value_heads", "head_dim")  # fmt: skip
MODELS = {
    "tiny": (32, 1, 64, 2, 1, 16),
    "small": (256, 4, 768, 4, 2, 64),
    "large": (1024, 28, 3072, 16, 8, 128),
}


class Batches:
    """A dataset that is only as long as it must be, and the collator that hands its batches out."""

    objective = "masked"

    def __init__(self, windows: int, length: int, steps: int) -> None:
        self.packed = np.zeros(windows * steps, np.bool_)
        masked = MaskCollator(SpanMasker(), Corruption(MASK_ID, np.arange(1)), 0, frozenset())
        ids = np.random.default_rng(0).integers(0, ORDINARY, (steps, windows, length), np.int32)
        place = np.arange(length, dtype=np.int32)
        keys = np.arange(steps * windows).reshape(steps, windows)
        self._next = (
            masked([Window(row, place, place, int(key), 0) for row, key in zip(*step, strict=True)])
            for step in zip(ids, keys, strict=True)
        )

    def __len__(self) -> int:
        return len(self.packed)

    def __getitem__(self, index: object) -> object:
        return index

    def __call__(self, rows: list[object]) -> dict[str, torch.Tensor]:
        """Give the next batch, whatever rows are asked for."""
        return next(self._next)

    def standard(self, rows: list[object]) -> dict[str, torch.Tensor]:
        """Give the next batch without word of which logits are needed."""
        batch = self(rows)
        return {name: batch[name] for name in ("input_ids", "labels")}

    def whole(self, rows: list[object]) -> dict[str, torch.Tensor]:
        """Give the next batch as TRL wants it, which insists on a mask; one of ones is dropped."""
        batch = self.standard(rows)
        return batch | {"attention_mask": torch.ones_like(batch["labels"])}


class Clock(TrainerCallback):
    """Notes when steps end."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Read the clock."""
        self.ends.append(time.perf_counter())


def make_trainer(way: str, model: Any, data: Batches, steps: int, folder: str) -> Trainer:
    """Set up the loop; the ways differ in how the loss is computed."""
    settings: dict[str, Any] = {
        "output_dir": folder, "max_steps": steps, "learning_rate": 1e-4, "logging_steps": 1,
        "per_device_train_batch_size": len(data) // steps, "gradient_checkpointing": False,
        "bf16": False, "use_cpu": True, "save_strategy": "no", "report_to": [],
        "disable_tqdm": True, "remove_unused_columns": False}  # fmt: skip
    shared = {"model": model, "train_dataset": data}
    if way == "ours":
        shared |= {"data_collator": data, "compute_loss_func": masked_cross_entropy}
        return SpanTrainer(args=TrainingArguments(**settings), **shared)
    if way == "standard":
        shared |= {"data_collator": data.standard}
        return Trainer(args=TrainingArguments(**settings), **shared)
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    columns = {name: [[0]] * len(data) for name in ("input_ids", "labels")}  # never looked at
    shared |= {"train_dataset": Dataset.from_dict(columns), "data_collator": data.whole}
    args = SFTConfig(**settings, max_length=None)
    return SFTTrainer(args=args, processing_class=load_tokenizer(TINY_BASE), **shared)


def peak() -> int:
    """Bytes that were resident at most, so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure(way: str, shape: str) -> dict[str, Any]:
    """Train a few steps in this process: tokens a second, bytes above the model, losses."""
    windows, length, steps, *_ = SHAPES[shape]
    torch.manual_seed(0)
    parts = dict(zip(PARTS, MODELS[shape], strict=True)) | {"tie_word_embeddings": False}
    config = Qwen3Config(vocab_size=VOCABULARY, use_cache=False, **parts)
    lora = LoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=32, target_modules=LINEAR_LAYERS)
    model = get_peft_model(Qwen3ForCausalLM(config), lora)
    data, clock = Batches(windows, length, steps + 1), Clock()
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(way, model, data, steps + 1, folder)
        trainer.add_callback(clock)
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        loading = peak()
        trainer.train()
    assert peak() > loading, "loading took more memory than training: its peak is not seen"
    return {
        "speed": windows * length / np.median(np.diff(clock.ends)),
        "memory": peak() - pages * os.sysconf("SC_PAGE_SIZE"),
        "losses": [row["loss"] for row in trainer.state.log_history if "loss" in row],
    }


def compare(shape: str, ways: list[str]) -> None:
    """Measure every way by turns in processes of their own, and print the table and the bars."""
    windows, length, steps, rounds, wanted = SHAPES[shape]
    quiet = os.environ | {"PYTHONWARNINGS": "ignore", "TRANSFORMERS_VERBOSITY": "error"}
    runs: dict[str, list[dict[str, Any]]] = {way: [] for way in ways}
    for way in ways * rounds:
        command = [sys.executable, __file__, "--worker", way, shape]
        out = subprocess.check_output(command, text=True, env=quiet)
        runs[way].append(json.loads(out.splitlines()[-1]))
    losses = np.array([run["losses"] for way in ways for run in runs[way]])
    assert losses.shape[1] == steps + 1 and np.ptp(losses, axis=0).max() < 1e-4, losses
    speeds = [max(run["speed"] for run in runs[way]) for way in ways]
    memory = [min(run["memory"] for run in runs[way]) / 2**30 for way in ways]
    table = pd.DataFrame({"tokens/s": speeds, "GiB": memory}, index=ways)
    table[["times the tokens/s", "of the memory"]] = table / table.loc["standard"]
    size = "hidden {} × {} layers".format(*MODELS[shape])
    print(f"\n{size}, {windows} × {length} tokens a step, loss {losses[0, 0]:.4f} each way")
    print(f"{table.round(3).to_string()}\nwanted: {wanted}", flush=True)


def main() -> None:
    """Measure what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=("small", "large", "both"), default="both")
    parser.add_argument("--tiny", action="store_true", help="only see whether it works")
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        print(json.dumps(measure(*options.worker)))
        return
    names = ["torch", "transformers", "peft", *(["trl"] if find_spec("trl") else [])]
    print(f"Python {sys.version.split()[0]}", *(f"{n} {version(n)}" for n in names), sep=", ")
    print("" if "trl" in names else "trl cannot be imported: no row for it\n", end="")
    shapes = ["small", "large"] if options.shape == "both" else [options.shape]
    for shape in ["tiny"] if options.tiny else shapes:
        compare(shape, ["ours", "standard", *names[3:]])


if __name__ == "__main__":
    run_command(lambda: exit_status(main))
