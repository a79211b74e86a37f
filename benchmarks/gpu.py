"""Measure training steps of Qwen3-8B on one GPU of 80 GB, ours and the standard way, in one run.

    python benchmarks/gpu.py --part step|compile|quantized [--out rows.jsonl] [--tiny]

Needs torch, transformers and peft, and nothing from the hub: the weights are random. Both ways
train LoRA (r 16, all linear layers) in bfloat16 with the same batches and attention; the standard
way projects every token, ours those that are asked for. The loop is a plain one, without the copy
of all logits that accelerate adds to the standard way. `--tiny` tries the script on a CPU.

- step: activations recomputed (checkpointing) or kept; recomputed under the cap of a 24 GB card.
- compile: recomputed or kept, each layer eager or compiled.
- quantized: linear layers of 8 and 4 bits under that cap, where bitsandbytes is installed.

Utilisation: useful operations (4 a weight of the linear layers and token, 4 a weight of the head
and asked token; nothing that is computed twice) over what a large product of matrices reaches.
"""

import argparse
import gc
import json
import sys
import timeit
import warnings
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
from wuxia_core.masking import IGNORE_INDEX, model_inputs
from wuxia_core.objective import asked_cross_entropy

ROW = "{:9} {:11} {:9} {:8} {:5} {:>10} {:>13} {:>12} {:>9}  {}".format
FULL = SimpleNamespace(
    device="cuda", batch=(4, 1024), steps=12, flop=4 * 6.95e9 + 4 * 0.15 * 0.62e9,  # a token
    side=8192,  # of the large product
    card=23.5,  # GiB usable of 24
    model={"hidden_size": 4096, "num_hidden_layers": 36, "intermediate_size": 12_288, "head_dim":
           128, "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 151_936},
)  # fmt: skip
TINY = SimpleNamespace(
    device="cpu", batch=(2, 64), steps=3, flop=4 * 111e3 + 4 * 0.15 * 131e3, side=256, card=None,
    model={"hidden_size": 64, "num_hidden_layers": 3, "intermediate_size": 128, "head_dim": 16,
           "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 2048},
)  # fmt: skip
BARS = {"bf16": 20.5, "8bit": 14.0}  # GiB reserved, ours under the cap


class Setting(NamedTuple):
    """What a row of the table was measured with."""

    way: str
    activations: str
    layers: str = "eager"
    weights: str = "bf16"
    cap: float | None = None  # GiB


Row = dict[str, Any]
WITHOUT = {"way": "standard", "activations": "recomputed", "layers": "eager"}
NUMBERS = {"tokens/s": ",.0f", "reserved GiB": ".2f", "utilisation": ".3f", "loss": ".4f"}


def settings(part: str, card: float | None) -> list[Setting]:
    """List a part's rows, those of the same weights together, compiled ones last: they stay so."""
    ways, activations = ("ours", "standard"), ("recomputed", "kept")
    if part == "quantized":
        bits = product(("8bit", "4bit"), ways)
        return [Setting(w, "recomputed", "eager", b, card) for b, w in bits]
    layers = ("eager", "compiled") if part == "compile" else ("eager",)
    rows = [Setting(w, a, n) for n, a, w in product(layers, activations, ways)]
    return rows + [Setting(w, "recomputed", cap=card) for w in ways if card and part == "step"]


def build(size: SimpleNamespace, weights: str) -> Any:
    """Make the random model with its adapter."""
    torch.manual_seed(0)
    config = Qwen3Config(use_cache=False, tie_word_embeddings=False, **size.model)
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
    made, mask_id = [], size.model["vocab_size"] - 1
    for seed in range(4):
        ids = np.random.default_rng(seed).integers(0, mask_id, size.batch)
        maskable = np.broadcast_to(np.arange(size.batch[1]) > 0, size.batch)
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
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)
    data = batches(size)

    def step() -> torch.Tensor:
        ids, labels, keep = next(data).values()
        with torch.autocast(size.device, torch.bfloat16):
            if way == "ours":
                outputs = model(input_ids=ids, logits_to_keep=keep)
                loss = asked_cross_entropy(outputs, labels, keep.sum())
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
    kind = {"cuda": ("CUDA", "self_device_time_total"), "cpu": ("CPU", "self_cpu_time_total")}
    activity, field = kind[device]
    with torch.profiler.profile([getattr(torch.profiler.ProfilerActivity, activity)]) as profiler:
        step()
    events = [e for e in profiler.key_averages() if not e.is_user_annotation]
    total = sum(getattr(e, field) for e in events)
    largest = sorted(events, key=lambda e: -getattr(e, field))[:3]
    return {e.key: getattr(e, field) / total for e in largest}


def measure(model: Any, size: SimpleNamespace, setting: Setting, rate: float) -> Row:
    """Train a few steps: speed, memory, utilisation and the first loss."""
    if size.device == "cuda":
        allow(setting.cap)
    if setting.activations == "recomputed":
        model.gradient_checkpointing_enable({"use_reentrant": False})
    else:
        model.gradient_checkpointing_disable()
    for layer in model.get_base_model().model.layers if setting.layers == "compiled" else []:
        layer.compile()
    step = make_step(model, size, setting.way)
    loss = float(step())
    speed = size.batch[0] * size.batch[1] / seconds(step, size.device, size.steps)
    row = {"tokens/s": speed, "utilisation": speed * size.flop / rate, "loss": loss}
    if size.device == "cuda":
        row["reserved GiB"] = torch.cuda.max_memory_reserved() / 2**30
    if setting.activations == "kept" and row["utilisation"] < 0.55:
        row["kernels"] = largest_kernels(step, size.device)
    return row


def allow(cap: float | None) -> None:
    """Free what the row before left, and allow the allocator so many GiB from now on."""
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    total = torch.cuda.get_device_properties(0).total_memory / 2**30
    torch.cuda.set_per_process_memory_fraction(min(1.0, (cap or total) / total))


def conclusions(rows: dict[Setting, Row]) -> Iterator[str]:
    """Say what each measure contributes, and whether the bars hold."""
    for (setting, row), (field, without) in product(rows.items(), WITHOUT.items()):
        other = setting._replace(**{field: without})
        if other != setting and other in rows:
            keys = [key for key in list(NUMBERS)[:2] if key in row and key in rows[other]]
            ratios = [f"{row[key] / rows[other][key]:.2f} times the {key}" for key in keys]
            among = ", ".join(str(v) for k, v in setting._asdict().items() if k != field and v)
            what = f"{getattr(setting, field)} / {without} ({among})"
            yield f"{what}: {', '.join(ratios) or 'out of memory'}"
    for setting, row in rows.items():
        if setting.way == "ours" and setting.cap and setting.weights in BARS:
            bar, reserved = BARS[setting.weights], row.get("reserved GiB", setting.cap)
            yield f"{setting.weights}, at most {bar} GiB: {'yes' if reserved <= bar else 'NO'}"


def run(part: str, size: SimpleNamespace) -> Iterator[Row]:
    """Measure a part's rows; print them and what follows from them."""
    a = torch.randn(size.side, size.side, device=size.device, dtype=torch.bfloat16)
    rate = 2 * size.side**3 / seconds(lambda: a @ a, size.device, 20)
    print(f"large product: {rate / 1e12:.3g} TFLOP/s; {size.batch[0]} × {size.batch[1]} tokens\n")
    print("".join(word.ljust(13) for word in [*Setting._fields, *NUMBERS]))
    rows: dict[Setting, Row] = {}
    for weights, group in groupby(settings(part, size.card), key=lambda setting: setting.weights):
        model = build(size, weights)
        for setting in group:
            model.zero_grad()
            try:
                row = measure(model, size, setting, rate)
            except torch.cuda.OutOfMemoryError as error:  # is a result
                row = {"out of memory": str(error).splitlines()[0]}
            rows[setting] = row
            numbers = [format(row[k], form) if k in row else "-" for k, form in NUMBERS.items()]
            words = [*setting[:4], str(setting.cap or "-"), *numbers, row.get("out of memory", "")]
            print("".join(word.ljust(13) for word in words), flush=True)
            print(*(f"  {n:.1%} {k}\n" for k, n in row.get("kernels", {}).items()), sep="", end="")
            yield {"part": part, "product FLOP/s": rate} | setting._asdict() | row
        losses = [rows[s]["loss"] for s in rows if s.weights == weights and "loss" in rows[s]]
        assert max(losses) - min(losses) < 0.01, f"different losses, {weights}: {losses}"
        del model
    print("", *conclusions(rows), sep="\n")


def main() -> None:
    """Measure what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--part", choices=("step", "compile", "quantized"), required=True)
    parser.add_argument("--out", type=Path, help="file that a JSON line a row is appended to")
    parser.add_argument("--tiny", action="store_true", help="on a CPU, only to try it")
    options = parser.parse_args()
    warnings.filterwarnings("ignore", category=FutureWarning)
    lacks = "" if options.tiny or torch.cuda.is_available() else "a GPU of 80 GB, or --tiny"
    if options.part == "quantized" and not find_spec("bitsandbytes"):
        lacks = lacks or "bitsandbytes"
    if lacks:
        print(f"--part {options.part} needs {lacks}", file=sys.stderr)
        sys.exit(5)
    device = "CPU" if options.tiny else torch.cuda.get_device_name()
    print(
        device, *(f"{name} {version(name)}" for name in ("torch", "transformers", "peft")), sep=", "
    )
    for row in run(options.part, TINY if options.tiny else FULL):
        if options.out:
            with options.out.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"device": device} | row) + "\n")


if __name__ == "__main__":
    main()
