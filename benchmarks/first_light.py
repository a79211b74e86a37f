"""Run the real product on one card, in under five minutes, to see that all of it works there.

    python benchmarks/first_light.py [--seconds 300] [--out first_light.jsonl] [--tiny]

In turn: the doctor; a random model of Qwen3-8B's shape is written; the sample with its scorecard;
the same again, stopped by a signal, and resumed; what both came to; that model, trained for ten
steps of the recipe and measured within the 23.5 GiB of a card of 24, and in 8 bits within 14. A
step that fails stops no other. Each is printed and written as it ends, with its command. The report
is left out: it needs no card. `--tiny` tries it all on a CPU, with a tiny model.

On a CPU stopping and resuming changes no byte of the adapter; on a card, where the backward pass of
attention adds in no order, the losses say how far the two runs went apart.
"""

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from wuxia_core.config import PROJECT, TINY_BASE
from wuxia_core.errors import MachineError, exit_status, run_command
from wuxia_core.model import ADAPTER_WEIGHTS

LAUNCH = """
import sys, types
sys.modules["wuxia_core.page"] = types.SimpleNamespace(write_page=lambda *_: "no page")
import launch_ddp
from wuxia_core.errors import run_command
run_command(launch_ddp.main)
"""
SHAPE = ("hidden_size", "num_hidden_layers", "intermediate_size", "num_attention_heads",
         "num_key_value_heads", "head_dim", "vocab_size")  # fmt: skip
QWEN3_8B, TINY = (4096, 36, 12_288, 32, 8, 128, 151_936), (64, 2, 128, 4, 2, 16, 8192)
RECIPE = ["training.gradient_checkpointing=true", "model.lora_dropout=0.05",
          "training.logging_steps=1", "training.warmup_steps=1"]  # fmt: skip
SAID = re.compile(r"in all +[\d.]+ of [\d.]+: .*|measured over .*|(?:error|stopped): .*|.*FAILED.*")


def make_model(folder: Path, tiny: bool) -> None:
    """Write a random Qwen3 with the bundled tokenizer."""
    shape = dict(zip(SHAPE, TINY if tiny else QWEN3_8B, strict=True))
    config = Qwen3Config(tie_word_embeddings=False, max_position_embeddings=40_960, **shape)
    torch.manual_seed(0)
    with torch.device("cpu" if tiny else "cuda"):
        model = Qwen3ForCausalLM._from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    for path in TINY_BASE.glob("tokenizer*"):
        shutil.copy(path, folder)


class Steps:
    """Runs commands one after the other, and writes what came out."""

    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        self.tiny, self.out, self.folder = options.tiny, options.out, folder
        self.deadline = time.monotonic() + options.seconds

    def launch(self, name: str, run: str, settings: list[str], *flags: str, **how: Any) -> None:
        """Run `launch_ddp.py` in one process, into a run folder."""
        named = f"training.output_dir={self.folder / run}"
        words = [word for setting in [*settings, named] for word in ("--set", setting)]
        command = [sys.executable, "-c", LAUNCH, "--nproc", "1", *flags, *words]
        self.run(name, command, self.folder / run / "metrics.jsonl", **how)

    def run(
        self,
        name: str,
        command: list[str],
        metrics: Path,
        cap: float | None = None,
        stop_at: int | None = None,
    ) -> None:
        """Run a command, with at most `cap` GiB of the card; stop it once `metrics` has a step."""
        began, log = time.monotonic(), self.folder / f"{name}.log"
        if began > self.deadline:
            self.write({"step": name, "note": "no time left"})
            return
        with log.open("w", encoding="utf-8") as file:
            streams = {"stdout": file, "stderr": subprocess.STDOUT}
            process = subprocess.Popen(command, cwd=PROJECT, env=environment(cap), **streams)
            while process.poll() is None and time.monotonic() < self.deadline:
                time.sleep(0.1)
                if stop_at and len(losses(metrics)) >= stop_at:
                    process.send_signal(signal.SIGTERM)
                    stop_at = None
            process.terminate()  # where there is no time left
            status = process.wait()
        printed = log.read_text(encoding="utf-8", errors="replace").replace("\r", "\n")
        row = {"step": name, "exit status": status, "cap": cap}
        row |= {"seconds": round(time.monotonic() - began, 1), **figures(metrics)}
        row["said"] = SAID.findall(printed)
        if row["exit status"] not in (0, 75):
            row["end of the log"] = printed.splitlines()[-15:]
        self.write(row | {"command": ["launch" if w == LAUNCH else w for w in command]})

    def write(self, row: dict[str, Any]) -> None:
        """Print a row, and add it to the file."""
        lists = {name: value for name, value in row.items() if isinstance(value, list)}
        command = " ".join(lists.pop("command", []))
        plain = [f"{name} {v}" for name, v in row.items() if name not in {*lists, "command"}]
        below = [f"  {line.strip()}" for lines in lists.values() for line in lines]
        print(
            ", ".join(plain), *([f"  {command}"] if command else []), *below, sep="\n", flush=True
        )
        with self.out.open("a", encoding="utf-8") as file:
            print(json.dumps(row, ensure_ascii=False), file=file)

    def compare(self, one: str, other: str) -> None:
        """Say whether two runs came to the same adapter, and how far their losses are apart."""
        files = [self.folder / run / ADAPTER_WEIGHTS for run in (one, other)]
        if not all(file.is_file() for file in files):
            self.write({"step": "compare", "note": "not both runs are done"})
            return
        a, b = (losses(file.with_name("metrics.jsonl")) for file in files)
        apart = max(abs(a[step] - b[step]) for step in a.keys() & b.keys())
        same = files[0].read_bytes() == files[1].read_bytes()
        self.write({"step": "compare", "same bytes": same, "losses apart": apart, "of": len(a)})


def environment(cap: float | None) -> dict[str, str]:
    """Give the variables of a command; the cap, in GiB, holds for each of its processes."""
    known = os.environ | {"HF_HUB_OFFLINE": "1"}
    if cap and torch.cuda.is_available():
        share = min(1.0, cap * 2**30 / torch.cuda.get_device_properties(0).total_memory)
        settings = f"expandable_segments:True,per_process_memory_fraction:{share:.4f}"
        known["PYTORCH_ALLOC_CONF"] = settings
        known.pop("PYTORCH_CUDA_ALLOC_CONF", None)  # the older name, which would win
    return known


def metrics_rows(path: Path) -> list[dict[str, Any]]:
    """Read what a run has logged so far."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    return [json.loads(line) for line in lines if line.endswith("}")]


def losses(path: Path) -> dict[int, float]:
    """Give the training losses by step."""
    return {row["step"]: row["loss"] for row in metrics_rows(path) if "loss" in row}


def figures(path: Path) -> dict[str, float]:
    """Give a run's last loss, its rate and its peak of memory."""
    rows = [row for row in metrics_rows(path) if "loss" in row]
    last = rows[-1] if rows else {}
    names = ("loss", "tokens_per_second", "memory_gib")
    return {name: round(last[name], 4) for name in names if name in last}


def all_steps(steps: Steps) -> None:
    """Do everything; a CPU trains the tiny model alone, in float32, and shorter."""
    tiny, folder, last = steps.tiny, steps.folder, 8 if steps.tiny else 20
    half, precision = last // 2, f"training.bf16={str(not tiny).lower()}"
    common = [*RECIPE, precision, f"evaluation.minutes={0.01 if tiny else 0.2}",
              f"evaluation.max_documents={1 if tiny else 4}"]  # fmt: skip
    sample = [*common, f"data.processed_data_file={folder}/mixture", f"training.max_steps={last}",
              f"model.model_name_or_path={folder / 'model' if tiny else TINY_BASE}",
              f"data.max_length={64 if tiny else 256}", f"training.eval_steps={half}",
              f"training.save_steps={half}"]  # fmt: skip
    steps.launch("doctor", "doctor", [precision], "--doctor")
    make = [sys.executable, str(Path(__file__)), "--make", str(folder / "model")]
    steps.run("model", [*make, *(["--tiny"] if tiny else [])], folder / "none")
    steps.launch("sample", "whole", sample)
    steps.launch("stopped", "stopped", sample, stop_at=half)
    steps.launch("resumed", "stopped", sample, "--resume")
    steps.compare("whole", "stopped")
    shaped = [*common, f"model.model_name_or_path={folder}/model", "data.general_file=null",
              f"data.processed_data_file={folder}/mixture_8b", "training.eval_steps=1000",
              f"data.max_length={64 if tiny else 1024}",
              "training.per_device_eval_batch_size=4"]  # fmt: skip
    steps.launch("8b", "8b", [*shaped, f"training.max_steps={half}"], cap=23.5)
    bits = ["model.quantization=8bit", f"training.max_steps={half // 2}"]
    steps.launch("8bit", "8bit", [*shaped, *bits], cap=14.0)


def main() -> None:
    """Run it, or make the model for it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=540, help="in all (%(default)g)")
    parser.add_argument("--out", type=Path, default="first_light.jsonl", help="a JSON line a step")
    parser.add_argument("--tiny", action="store_true", help="on a CPU, only to try it")
    parser.add_argument("--make", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if not (options.tiny or torch.cuda.is_available()):
        raise MachineError("no GPU is here; --tiny tries the script without one")
    if options.make:
        make_model(options.make, options.tiny)
        return
    with tempfile.TemporaryDirectory() as folder:
        all_steps(Steps(options, Path(folder)))


if __name__ == "__main__":
    run_command(lambda: exit_status(main))
