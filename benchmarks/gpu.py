"""Measure training steps of Qwen3-8B on one GPU of 80 GB, ours and the standard way, in one run.

    python benchmarks/gpu.py --part step|compile|quantized [--out rows.jsonl] [--tiny]

Needs torch, transformers and peft, and nothing from the hub: the weights are random. Both ways
train LoRA (r 16, all linear layers) in bfloat16 with the same batches and attention; the standard
way projects every token, ours those that are asked for. The loop is a plain one, without the copy
of all logits that accelerate adds to the standard way. `PARTS` lists the rows: activations kept or
recomputed (checkpointing), layers eager or compiled, linear layers of 16, 8 or 4 bits, and a cap
that stands for a card of 24 GB. `--tiny` tries it on a CPU, without the cap.
Utilisation: useful operations (4 a weight of the linear layers and token, 4 a weight of the head
and asked token; nothing that is computed twice) over what a large product of matrices reaches.
"""

import argparse
import gc
import json
import os
import sys
import timeit
from collections.abc import Callable, Iterator
from importlib.metadata import version
from importlib.util import find_spec
from itertools import cycle, groupby, pairwise, product
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, Qwen3Config

sys.path.insert(0, str(Path(__file__).parents[1]))  # the package need not be installed
from wuxia_core import SpanMasker
from wuxia_core.errors import exit_status, run_command
from wuxia_core.masking import IGNORE_INDEX, model_inputs
from wuxia_core.trainer import masked_cross_entropy

CARD = 23.5  # GiB usable of 24
BARS = {"bf16": 20.5, "8bit": 14.0}  # GiB reserved, ours on such a card
SHAPE = ("hidden_size", "num_hidden_layers", "intermediate_size", "num_attention_heads",
         "num_key_value_heads", "head_dim", "vocab_size")  # fmt: skip
FULL = SimpleNamespace(  # operations a token; side of the large product
    device="cuda", batch=(4, 1024), steps=12, flop=4 * 6.95e9 + 4 * 0.15 * 0.62e9, side=8192,
    model=(4096, 36, 12_288, 32, 8, 128, 151_936))  # fmt: skip
TINY = SimpleNamespace(device="cpu", batch=(2, 64), steps=3, flop=4 * 111e3 + 4 * 0.15 * 131e3,
                       side=256, model=(64, 3, 128, 4, 2, 16, 2048))  # fmt: skip


class Setting(NamedTuple):
    """What a row of the table was measured with."""

    way: str
    weights: str
    layers: str
    activations: str
    cap: float | None = None  # GiB


PARTS = {  # compiled ones last, since layers stay so
    "step": [*product(["bf16"], ["eager"], ["recomputed", "kept"]),
             ("bf16", "eager", "recomputed", CARD)],
    "compile": [*product(["bf16"], ["eager", "compiled"], ["recomputed", "kept"])],
    "quantized": [*product(["8bit", "4bit"], ["eager"], ["recomputed"], [CARD])],
}  # fmt: skip
WITHOUT = {"way": "standard", "activations": "recomputed", "layers": "eager"}
NUMBERS = {"tokens/s": ",.0f", "reserved GiB": ".2f", "utilisation": ".3f", "loss": ".4f"}


def build(size: SimpleNamespace, weights: str) -> Any:
    """Make the random model with its adapter."""
    torch.manual_seed(0)
    shape = dict(zip(SHAPE, size.model, strict=True))
    config = Qwen3Config(use_cache=False, tie_word_embeddings=False, **shape)
    with torch.device(size.device):
        base = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    if weights != "bf16":
        quantize(base, weights)
    lora = LoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=32, target_modules="all-linear")
    return get_peft_model(base, lora).train()


def quantize(base: Any, weights: str) -> None:
    """Put bitsandbytes' layers in place of the linear ones; embedding and head stay as they are."""
    from bitsandbytes import nn

    setattr(base, f"is_loaded_in_{weights}", True)  # PEFT asks
    layer, parameter, how = {
        "8bit": (nn.Linear8bitLt, nn.Int8Params, {"has_fp16_weights": False}),
        "4bit": (nn.Linear4bit, nn.Params4bit, {"quant_type": "nf4", "compress_statistics": False}),
    }[weights]
    for name, old in list(base.model.named_modules()):
        if isinstance(old, torch.nn.Linear):
            new = layer(old.in_features, old.out_features, bias=False, device="meta", **how)
            on_cpu = parameter(old.weight.data.cpu(), requires_grad=False, **how)
            new.weight = on_cpu.to(old.weight.device)  # is quantized on the way
            base.model.set_submodule(name, new)


def batches(size: SimpleNamespace) -> Iterator[dict[str, torch.Tensor]]:
    """Give masked windows, four batches by turns."""
    made, mask_id = [], size.model[-1] - 1
    maskable = np.broadcast_to(np.arange(size.batch[1]) > 0, size.batch)
    for seed in range(4):
        ids = np.random.default_rng(seed).integers(0, mask_id, size.batch)
        masked = SpanMasker(seed=seed).kinds(maskable, range(len(ids))) > 0
        inputs = model_inputs(np.where(masked, mask_id, ids), np.where(masked, ids, IGNORE_INDEX))
        made.append({name: values.to(size.device) for name, values in inputs.items()})
    return cycle(made)


def make_step(model: Any, size: SimpleNamespace, way: str) -> Callable[[], torch.Tensor]:
    """Make a function that takes an optimizer step and gives its loss; the adapter starts anew."""
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.zeros_(parameter)
    trained = [p for p in model.parameters() if p.requires_grad]
    data, optimizer = batches(size), torch.optim.AdamW(trained, lr=1e-4, fused=True)

    def step() -> torch.Tensor:
        ids, labels, keep = next(data).values()
        with torch.autocast(size.device, torch.bfloat16):
            if way == "ours":
                outputs = model(input_ids=ids, logits_to_keep=keep)
                loss = masked_cross_entropy(outputs, labels, keep.sum())
            else:
                loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return step


def seconds(work: Callable[[], object], device: str, count: int) -> float:
    """Median time of a call, after four that are not counted."""
    timeit.timeit(work, number=4)
    if device == "cpu":
        return median(timeit.repeat(work, number=1, repeat=count))
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
    marks[0].record()
    for mark in marks[1:]:
        work()
        mark.record()
    torch.cuda.synchronize()
    return median(start.elapsed_time(end) for start, end in pairwise(marks)) / 1e3


def largest_kernels(step: Callable[[], object], device: str) -> dict[str, float]:
    """Shares of the three kernels that take most of a step's time."""
    with torch.profiler.profile() as profiler:
        step()
    field = "self_device_time_total" if device == "cuda" else "self_cpu_time_total"
    here = [e for e in profiler.key_averages() if e.device_type.name == device.upper()]
    times = sorted((getattr(e, field), e.key) for e in here if not e.is_user_annotation)[::-1]
    return {name: time / sum(t for t, _ in times) for time, name in times[:3]}


def measure(model: Any, size: SimpleNamespace, setting: Setting, rate: float) -> dict[str, Any]:
    """Train a few steps: speed, memory, utilisation and the first loss."""
    if size.device == "cuda":
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        total = torch.cuda.get_device_properties(0).total_memory / 2**30
        torch.cuda.set_per_process_memory_fraction(min(1.0, (setting.cap or total) / total))
    model.gradient_checkpointing_disable()
    if setting.activations == "recomputed":
        model.gradient_checkpointing_enable({"use_reentrant": False})
    for layer in model.get_base_model().model.layers if setting.layers == "compiled" else []:
        layer.compile()
    step = make_step(model, size, setting.way)
    row = {"loss": float(step())}
    speed = size.batch[0] * size.batch[1] / seconds(step, size.device, size.steps)
    row |= {"tokens/s": speed, "utilisation": speed * size.flop / rate}
    if size.device == "cuda":
        row["reserved GiB"] = torch.cuda.max_memory_reserved() / 2**30
    if setting.activations == "kept" and row["utilisation"] < 0.55:
        row["kernels"] = largest_kernels(step, size.device)
    return row


def conclusions(rows: dict[Setting, dict[str, Any]]) -> Iterator[str]:
    """Say what each measure contributes, and whether the bars hold."""
    for (setting, row), (field, without) in product(rows.items(), WITHOUT.items()):
        other = rows.get(setting._replace(**{field: without}), row)
        if other is not row:
            keys = [k for k in ("tokens/s", "reserved GiB") if k in row and k in other]
            ratios = [f"{row[k] / other[k]:.2f} times the {k}" for k in keys] or ["out of memory"]
            among = ", ".join(str(v) for k, v in setting._asdict().items() if k != field and v)
            yield f"{getattr(setting, field)} / {without} ({among}): {', '.join(ratios)}"
    for weights, bar in BARS.items():
        row = rows.get(Setting("ours", weights, "eager", "recomputed", CARD), {})
        if reserved := row.get("reserved GiB", CARD if "out of memory" in row else 0):
            yield f"ours, {weights}, at most {bar} GiB: {'yes' if reserved <= bar else 'NO'}"


def run(part: str, size: SimpleNamespace) -> Iterator[dict[str, Any]]:
    """Measure a part's rows; print them and what follows from them."""
    a = torch.randn(size.side, size.side, device=size.device, dtype=torch.bfloat16)
    rate = 2 * size.side**3 / seconds(lambda: a @ a, size.device, 20)
    print(f"large product: {rate / 1e12:.3g} TFLOP/s; {size.batch[0]} × {size.batch[1]} tokens\n")
    print("".join(word.ljust(13) for word in [*Setting._fields, *NUMBERS]))
    settings = [Setting(way, *others) for others in PARTS[part] for way in ("ours", "standard")]
    rows: dict[Setting, dict[str, Any]] = {}
    for weights, group in groupby(settings, key=lambda setting: setting.weights):
        model = build(size, weights)
        for setting in group:
            model.zero_grad()
            try:
                row = rows[setting] = measure(model, size, setting, rate)
            except torch.cuda.OutOfMemoryError as error:  # is a result
                row = rows[setting] = {"out of memory": str(error).splitlines()[0]}
            numbers = [format(row[k], form) if k in row else "-" for k, form in NUMBERS.items()]
            words = [*setting[:4], str(setting.cap or "-"), *numbers, row.get("out of memory", "")]
            below = [f"\n  {share:.1%} {name}" for name, share in row.get("kernels", {}).items()]
            print("".join(word.ljust(13) for word in words).rstrip(), *below, sep="", flush=True)
            yield {"part": part, "product FLOP/s": rate} | setting._asdict() | row
        losses = [rows[s]["loss"] for s in rows if s.weights == weights and "loss" in rows[s]]
        assert not losses or max(losses) - min(losses) < 0.01, (
            f"different losses, {weights}: {losses}"
        )
        del model
    print("", *conclusions(rows), sep="\n")


def main() -> None:
    """Measure what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--part", choices=PARTS, required=True)
    parser.add_argument("--out", type=Path, help="file that a JSON line a row is appended to")
    parser.add_argument("--tiny", action="store_true", help="on a CPU, only to try it")
    options = parser.parse_args()
    if not (options.tiny or torch.cuda.is_available()):
        parser.exit(5, "this needs a GPU of 80 GB; --tiny tries the script without\n")
    if options.part == "quantized" and not find_spec("bitsandbytes"):
        parser.exit(5, "--part quantized needs bitsandbytes\n")
    about = {name: version(name) for name in ("torch", "transformers", "peft")}
    about["device"] = "CPU" if options.tiny else torch.cuda.get_device_name()
    print(about)
    with (options.out or Path(os.devnull)).open("a", encoding="utf-8") as file:
        for row in run(options.part, TINY if options.tiny else FULL):
            print(json.dumps(about | row), file=file, flush=True)


if __name__ == "__main__":
    run_command(lambda: exit_status(main))
