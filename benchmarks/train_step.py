"""Measure our training step against the standard way, which projects every token, in one run.

    python benchmarks/train_step.py [--shape small] [--shape large]

Both train LoRA (r 16, all linear layers) on the same random Qwen3 with 151,936 rows, in float32,
through transformers' Trainer, on the same windows with 15 % masked tokens: only the objective
differs, and the loss of the first step is the same. Each way has a process of its own, by turns.
Memory is the most that is resident while training, above what is resident before. TRL's
SFTTrainer, which projects asked tokens in chunks, stands beside them where `trl` can be imported.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import threading
import time
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

import numpy as np
import pandas as pd
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    PrinterCallback,
    Qwen3Config,
    Qwen3ForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from wuxia_core import SpanMasker
from wuxia_core.config.schema import LINEAR_LAYERS
from wuxia_core.masking import IGNORE_INDEX, model_inputs
from wuxia_core.objective import asked_cross_entropy

VOCABULARY, LENGTH, ROUNDS = 151_936, 512, 3
SHAPES = {  # windows a step, timed steps, the model
    "tiny": (2, 2, {"hidden_size": 32, "num_hidden_layers": 1, "intermediate_size": 64,
                    "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}),
    "small": (4, 5, {"hidden_size": 256, "num_hidden_layers": 4, "intermediate_size": 768,
                     "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64}),
    "large": (1, 3, {"hidden_size": 1024, "num_hidden_layers": 28, "intermediate_size": 3072,
                     "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128}),
}  # fmt: skip


class Clock(TrainerCallback):
    """Note when steps end, and how much memory is resident meanwhile."""

    def __init__(self) -> None:
        self.ends: list[float] = []
        self.before = self.peak = resident()
        self._running = True
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        while self._running:
            self.peak = max(self.peak, resident())
            time.sleep(0.002)

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Read the clock."""
        self.ends.append(time.perf_counter())

    def on_train_end(self, *_: Any, **__: Any) -> None:
        """Stop watching."""
        self._running = False


def resident() -> int:
    """Bytes of this process in memory."""
    with open("/proc/self/statm") as file:  # noqa: PTH123 - read every two milliseconds
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def rows(count: int) -> list[dict[str, list[int]]]:
    """Make masked windows: `input_ids` and `labels`."""
    ids = np.random.default_rng(0).integers(0, 150_000, (count, LENGTH))
    maskable = np.ones(ids.shape, np.bool_)
    maskable[:, 0] = False
    masked = SpanMasker().kinds(maskable, range(count)) > 0
    labels = np.where(masked, ids, IGNORE_INDEX).tolist()
    hidden = np.where(masked, 151_669, ids).tolist()
    return [{"input_ids": i, "labels": x} for i, x in zip(hidden, labels, strict=True)]


def collate(batch: list[dict[str, list[int]]], *, ours: bool) -> dict[str, torch.Tensor]:
    """Stack windows; ours say which logits are needed."""
    ids, labels = (np.array([row[key] for row in batch]) for key in ("input_ids", "labels"))
    inputs = model_inputs(ids, labels)
    return inputs if ours else {name: inputs[name] for name in ("input_ids", "labels")}


def measure(way: str, shape: str) -> dict[str, float]:
    """Train a few steps in this process: tokens a second, bytes above the model, first loss."""
    windows, steps, settings = SHAPES[shape]
    torch.manual_seed(0)
    config = Qwen3Config(vocab_size=VOCABULARY, use_cache=False, **settings)
    lora = LoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=32, target_modules=LINEAR_LAYERS)
    model = get_peft_model(Qwen3ForCausalLM(config), lora)
    data = rows(windows * (steps + 1))
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(way, model, data, windows, steps + 1, folder)
        trainer.remove_callback(PrinterCallback)
        clock = Clock()
        trainer.add_callback(clock)
        trainer.train()
    seconds = np.median(np.diff(clock.ends))
    return {
        "tokens/s": windows * LENGTH / seconds,
        "memory": clock.peak - clock.before,
        "loss": trainer.state.log_history[0]["loss"],
    }


def make_trainer(
    way: str, model: Any, data: list[Any], windows: int, steps: int, folder: str
) -> Trainer:
    """Set up the loop; the ways differ in how the loss is computed."""
    settings: dict[str, Any] = {
        "output_dir": folder, "max_steps": steps, "per_device_train_batch_size": windows,
        "logging_steps": 1, "save_strategy": "no", "report_to": [], "use_cpu": True,
        "disable_tqdm": True, "learning_rate": 1e-4, "gradient_checkpointing": False,
    }  # fmt: skip
    if way == "trl":
        from datasets import Dataset
        from trl import SFTConfig, SFTTrainer

        arguments = SFTConfig(**settings, max_length=None, bf16=False)
        return SFTTrainer(model=model, args=arguments, train_dataset=Dataset.from_list(data))
    return Trainer(
        model=model,
        args=TrainingArguments(**settings, remove_unused_columns=False),
        train_dataset=data,
        data_collator=lambda batch: collate(batch, ours=way == "ours"),
        compute_loss_func=asked_cross_entropy if way == "ours" else None,
    )


def compare(shape: str, ways: list[str]) -> pd.DataFrame:
    """Measure every way by turns in processes of their own; the best of the rounds counts."""
    results: dict[str, list[dict[str, float]]] = {way: [] for way in ways}
    for _ in range(1 if shape == "tiny" else ROUNDS):
        for way in ways:
            command = [sys.executable, __file__, "--way", way, "--shape", shape]
            out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            results[way].append(json.loads(out.splitlines()[-1]))
    best = {
        way: {
            "tokens/s": max(r["tokens/s"] for r in runs),
            "memory, GB": min(r["memory"] for r in runs) / 1e9,
            "first loss": runs[0]["loss"],
        }
        for way, runs in results.items()
    }
    table = pd.DataFrame(best).T
    losses = table["first loss"]
    if losses.max() - losses.min() > 1e-3:
        sys.exit(f"the losses of the first step differ: {losses.to_dict()}")
    standard = table.loc["standard"]
    table["times the tokens/s"] = table["tokens/s"] / standard["tokens/s"]
    table["of the memory"] = table["memory, GB"] / standard["memory, GB"]
    return table


def main() -> None:
    """Measure what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", action="append", choices=SHAPES)
    parser.add_argument("--way", help="in this process, as JSON")
    options = parser.parse_args()
    shapes = options.shape or ["small", "large"]
    if options.way:
        print(json.dumps(measure(options.way, shapes[0])))
        return
    ways = ["ours", "standard", *(["trl"] if find_spec("trl") else [])]
    names = ("torch", "transformers", "peft", *(["trl"] if "trl" in ways else []))
    print(
        "python benchmarks/train_step.py, two x86-64 CPU cores, Python", platform.python_version()
    )
    print(", ".join(f"{name} {version(name)}" for name in names))
    for shape in shapes:
        windows, _, settings = SHAPES[shape]
        size = f"hidden {settings['hidden_size']} × {settings['num_hidden_layers']} layers"
        print(f"\n{size}, {windows} × {LENGTH} tokens a step")
        print(compare(shape, ways).round(4).to_string())


if __name__ == "__main__":
    main()
