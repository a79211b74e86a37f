"""Measure training steps of Qwen3-8B on one GPU of 80 GB, as much as nine minutes have room for.

    python benchmarks/gpu.py [--seconds 540] [--out gpu.jsonl] [--tiny]

The weights are random, and nothing comes from the hub. Each row is the product's own step: the
adapter of `add_adapter` with the recipe's dropout and mask row, `SpanTrainer` in bfloat16, windows
of 4 × 1,024 tokens with real masks. Against it stands the standard way, which projects every token
(`labels` alone, and PEFT's casts to float32). A cap stands for a smaller card, and running out of
memory under it is a result. Rows are begun while there is time, and written at once.
`--tiny` tries it on a CPU, without caps.

planned GiB: what `launch_ddp.py --plan` says. share: operations, by the plan's count, which has
those that checkpointing repeats, over what a large product of matrices in bfloat16 reaches.
"""

import argparse
import gc
import json
import os
import tempfile
import time
import timeit
import warnings
from collections.abc import Iterator
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np
import torch
from first_light import QWEN3_8B, SHAPE
from transformers import PrinterCallback, Qwen3Config, Qwen3ForCausalLM, TrainerCallback

from wuxia_core import SpanMasker
from wuxia_core.config import Config
from wuxia_core.errors import MachineError, exit_status, lacks_memory, run_command
from wuxia_core.masking import Corruption, MaskCollator, Window
from wuxia_core.model import add_adapter, compile_layers
from wuxia_core.preflight import plan
from wuxia_core.train import arguments
from wuxia_core.trainer import SpanTrainer, masked_cross_entropy, peak_memory

# As `torchrun.launch` sets it; torch reads it when it first takes memory of a card.
os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
LEAST = (5, 23)  # transformers that takes a mask as logits_to_keep
WARM_UP = 2  # steps that are not timed
ONE_PROCESS = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1",
               "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}  # fmt: skip  # as torchrun says it


class Size(NamedTuple):
    """What is measured: a model by `SHAPE`, windows × tokens, steps, side of the large product."""

    device: str
    model: tuple[int, ...]
    windows: int
    length: int
    steps: int
    side: int


FULL = Size("cuda", QWEN3_8B, 4, 1024, 12, 8192)
TINY = Size("cpu", (64, 2, 128, 4, 2, 16, 2048), 2, 64, 4, 256)


class Row(NamedTuple):
    """What a row is measured with: the product's step, and how it differs."""

    way: str = "ours"  # or standard: logits of all tokens
    weights: str = "none"  # or 8bit, 4bit: of the linear layers
    activations: str = "recomputed"  # or kept
    casts: str = "off"  # or on: PEFT copies each layer's input to float32
    layers: str = "eager"  # or compiled
    cap: float | None = 23.5  # GiB


ROWS = [
    Row(), Row("standard", casts="on"), Row(activations="kept", cap=None), Row(casts="on"),
    Row(layers="compiled"), Row(weights="8bit", cap=14.0), Row(weights="4bit", cap=14.0),
]  # fmt: skip
FIGURES = {"tokens/s": ",.0f", "reserved GiB": ".2f", "planned GiB": ".2f", "share": ".3f",
           "loss": ".4f"}  # fmt: skip


class RandomText(list[Window]):
    """A dataset of random windows, which the sampler asks for by (epoch, row)."""

    def __init__(self, size: Size) -> None:
        shape = (size.windows * size.steps, size.length)
        ids = np.random.default_rng(0).integers(0, size.model[-1] - 1, shape, np.int32)
        place = np.arange(size.length, dtype=np.int32)
        super().__init__(Window(row, place, place, key, 0) for key, row in enumerate(ids))
        self.packed = np.zeros(len(ids), np.bool_)

    def __getitem__(self, index: Any) -> Any:
        return super().__getitem__(index[1])


class AllLogits(MaskCollator):
    """The standard way's batches: no word of which logits are needed."""

    def __call__(self, windows: list[Window]) -> dict[str, torch.Tensor]:
        """Make a batch."""
        return {k: v for k, v in super().__call__(windows).items() if k != "logits_to_keep"}


class Clock(TrainerCallback):
    """Times steps, and ends the row when there is no time left."""

    def __init__(self, deadline: float) -> None:
        self.deadline, self.ends = deadline, [time.monotonic()]

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Wait for the device and read the clock."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.ends.append(time.monotonic())
        control.should_training_stop |= self.ends[-1] > self.deadline


def configure(row: Row, size: Size) -> Config:
    """Write the row as a run's config."""
    training = {"bf16": True, "gradient_checkpointing": row.activations == "recomputed",
                "per_device_train_batch_size": size.windows, "gradient_accumulation_steps": 1,
                "max_steps": size.steps, "logging_steps": 1, "report_to": []}  # fmt: skip
    model, data = {"quantization": row.weights}, {"max_length": size.length}
    return Config.model_validate({"model": model, "data": data, "training": training})


def build(row: Row, size: Size, config: Config) -> tuple[Any, plan.Shape]:
    """Make the random model with its adapter; and its shape, for the plan."""
    torch.manual_seed(0)
    shape = dict(zip(SHAPE, size.model, strict=True))
    with torch.device(size.device):
        base = Qwen3ForCausalLM._from_config(
            Qwen3Config(use_cache=False, tie_word_embeddings=False, **shape), dtype=torch.bfloat16
        )
    counted = plan.shape_of(base)
    if row.weights != "none":
        quantize(base, row.weights)
    model = add_adapter(base, config.model, shape["vocab_size"] - 1)
    for module in model.modules():
        if hasattr(module, "cast_input_dtype_enabled"):
            module.cast_input_dtype_enabled = row.casts == "on"
    if row.layers == "compiled":
        compile_layers(model)
    return model, counted


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


def make_trainer(row: Row, size: Size, config: Config, model: Any, folder: Path) -> SpanTrainer:
    """Set up the product's loop, or what is left of it the standard way."""
    mask_id, ours = size.model[-1] - 1, row.way == "ours"
    masks = (SpanMasker(), Corruption(mask_id, np.arange(1)), 0, frozenset[int]())
    trainer = SpanTrainer(
        model=model,
        args=arguments(config, argparse.Namespace(folder=folder, measure=True, start=None)),
        data_collator=MaskCollator(*masks) if ours else AllLogits(*masks),
        train_dataset=RandomText(size),
        compute_loss_func=masked_cross_entropy if ours else None,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def train(row: Row, size: Size, deadline: float, rate: float) -> dict[str, Any]:
    """Train a few steps: speed, memory beside the plan's, share and the first loss."""
    config, clock, on_card = configure(row, size), Clock(deadline), size.device == "cuda"
    gc.collect()  # the model of the row before, which is part of circles
    if on_card:
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(1.0)  # the cap of the row before
    model, shape = build(row, size, config)
    device = plan.Device("card", 1, (row.cap or 80) * plan.GIB, np.ones(2), True, True)
    figures = {"planned GiB": sum(plan.memory(config, shape, device).values()) / plan.GIB}
    if on_card:
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        total = torch.cuda.get_device_properties(0).total_memory / plan.GIB
        torch.cuda.set_per_process_memory_fraction(min(1.0, (row.cap or total) / total))
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(row, size, config, model, Path(folder))
        trainer.add_callback(clock)
        try:
            trainer.train()
        except RuntimeError as error:  # torch's, of memory, is a result
            if not lacks_memory(error):
                raise
            return figures | {"note": f"out of memory: {str(error).splitlines()[0]}"}
    times = np.diff(clock.ends)[WARM_UP:]
    speed = size.windows * size.length / median(times) if len(times) else 0.0
    figures |= {"tokens/s": speed, "loss": trainer.state.log_history[0]["loss"]}
    figures["share"] = speed * float(plan.token_costs(config, shape)[0, 0]) / rate
    return figures | ({"reserved GiB": peak_memory() / plan.GIB} if on_card else {})


def product_rate(size: Size) -> float:
    """Operations a second of a large product of matrices in bfloat16, the best of 20."""
    a = torch.randn(size.side, size.side, device=size.device).bfloat16()
    times = timeit.repeat(lambda: (a @ a)[0, 0].item(), number=1, repeat=20)  # which waits for it
    return float(2 * size.side**3 / min(times))


def measure(size: Size, deadline: float) -> Iterator[dict[str, Any]]:
    """Measure the rows that there is time for, and print them."""
    rate, longest = product_rate(size), 0.0
    print(f"large product: {rate / 1e12:.3g} TFLOP/s; {size.windows} × {size.length} tokens a step")
    print("".join(word.ljust(13) for word in [*Row._fields, *FIGURES]))
    for row in ROWS:
        began = time.monotonic()
        if row.weights != "none" and not find_spec("bitsandbytes"):
            figures: dict[str, Any] = {"note": "bitsandbytes is not installed"}
        elif began + longest > deadline:
            figures = {"note": "no time left"}
        else:
            figures = train(row, size, deadline, rate)
        longest = max(longest, time.monotonic() - began)
        numbers = [format(figures[k], form) if k in figures else "-" for k, form in FIGURES.items()]
        words = [*map(str, row), *numbers, figures.get("note", "")]
        print("".join(word.ljust(13) for word in words).rstrip(), flush=True)
        yield {"product FLOP/s": rate} | row._asdict() | figures


def main() -> None:
    """Measure, and write each row as it comes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=540, help="in all (%(default)g)")
    parser.add_argument("--out", type=Path, default="gpu.jsonl", help="a JSON line a row is added")
    parser.add_argument("--tiny", action="store_true", help="on a CPU, only to try it")
    options = parser.parse_args()
    deadline = time.monotonic() + options.seconds
    about = {name: version(name) for name in ("torch", "transformers", "peft")}
    if tuple(map(int, about["transformers"].split(".")[:2])) < LEAST:
        least = ".".join(map(str, LEAST))
        raise MachineError(f"transformers {about['transformers']}: needs {least} or later")
    if not (options.tiny or torch.cuda.is_available()):
        raise MachineError("no GPU is here; --tiny tries the script without one")
    about["device"] = "CPU" if options.tiny else torch.cuda.get_device_name()
    print(about)
    os.environ |= ONE_PROCESS
    warnings.filterwarnings("ignore", "`gradient_checkpointing", FutureWarning)
    with options.out.open("a", encoding="utf-8") as file:
        for row in measure(TINY if options.tiny else FULL, deadline):
            print(json.dumps(about | row), file=file, flush=True)


if __name__ == "__main__":
    run_command(lambda: exit_status(main))
