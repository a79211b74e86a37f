"""What a run needs, by arithmetic: memory, steps, hours, cost and disk. Nothing is loaded."""

import os
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from wuxia_core.config import LINEAR_LAYERS, Config, ModelConfig, effective_batch, locate
from wuxia_core.errors import ConfigError
from wuxia_core.mixing import Mixture, find_texts, likely_share, train_windows, utf8_size
from wuxia_core.model import LESS_MEMORY

Range = npt.NDArray[np.float64]  # (2,), at least and at most
GIB = 2**30
WEIGHT_BYTES = {"8bit": 1.0, "4bit": 0.5625}  # of a linear layer; 4 bits and a scale for each 64
# GiB of memory and TFLOP/s of dense bf16 products, as the makers' data sheets have them.
CARDS = {
    "RTX 3090": (24, 71), "RTX 4090": (24, 165), "RTX 5090": (32, 210), "RTX A6000": (48, 155),
    "L40S": (48, 362), "A100 40GB": (40, 312), "A100 80GB": (80, 312), "H100": (80, 989),
    "H200": (141, 989), "RTX 4060": (8, 30), "T4": (16, 65),
}  # fmt: skip
USABLE = 23.5 / 24  # of a card's memory; the rest is the driver's
LAYERS = set(LINEAR_LAYERS)


class Shape(NamedTuple):
    """Numbers and sizes of the weights of a model whose linear layers are `LAYERS`."""

    hidden_size: int
    vocab_size: int
    num_hidden_layers: int
    max_position_embeddings: int  # tokens that it can read
    layers: dict[str, tuple[int, int]]  # of LAYERS: outputs and inputs
    parameters: int  # of all layers, embedding and head

    def linear_parameters(self) -> int:
        """Count the weights in linear layers without the head."""
        return self.num_hidden_layers * sum(out * into for out, into in self.layers.values())

    def adapter_parameters(self, config: ModelConfig) -> int:
        """Count what is trained: LoRA's (r, in) and (out, r) a layer, and the mask token's row."""
        ends = sum(sum(self.layers[name]) for name in targets(config))
        return config.lora_r * self.num_hidden_layers * ends + self.hidden_size


def qwen3(hidden: int, mlp: int, parameters: int, heads: int = 4096, layers: int = 36) -> Shape:
    """Give the shape of a Qwen3 of 0.6 to 8 billion parameters; `heads` is the width of all."""
    key, up = (1024, hidden), (mlp, hidden)
    attention = {"q_proj": (heads, hidden), "k_proj": key, "v_proj": key, "o_proj": (hidden, heads)}
    inner = {"gate_proj": up, "up_proj": up, "down_proj": (hidden, mlp)}
    return Shape(hidden, 151_936, layers, 40_960, attention | inner, parameters)


SHIPPED = {  # the recipes' models, so that their plan needs no network and is quick
    "Qwen/Qwen3-8B": qwen3(4096, 12_288, 8_190_735_360),
    "Qwen/Qwen3-4B": qwen3(2560, 9728, 4_022_468_096),
    "Qwen/Qwen3-0.6B": qwen3(1024, 3072, 596_049_920, heads=2048, layers=28),
}


def targets(config: ModelConfig) -> set[str]:
    """Name the layers that get an adapter."""
    named = config.lora_target_modules
    return LAYERS if named == "all-linear" else set(named)


def read_shape(config: ModelConfig) -> Shape | None:
    """Count a model's weights from its config.json: in its folder, the hub's cache or the hub.

    None where that cannot be read, or its layers are not those that `layer_bytes` knows. Qwen3-8B:
    8.19 B parameters, 6.95 B of them in linear layers; an adapter of rank 16 has 43.65 M.
    """
    name = config.model_name_or_path
    if (shape := SHIPPED.get(name.removesuffix("-Base"))) and not locate(name).is_dir():
        return shape
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        settings = AutoConfig.from_pretrained(str(locate(name)), trust_remote_code=False)
        with torch.device("meta"):  # shapes without values
            return shape_of(AutoModelForCausalLM.from_config(settings))
    except (OSError, ValueError, AttributeError, ImportError, StrictDataclassError):
        return None  # the tokenizer's loading says what is wrong


def shape_of(base: Any) -> Shape | None:
    """Count the weights of a transformers model; None as in `read_shape`."""
    weights = [(name.split(".")[-2], w.shape) for name, w in base.named_parameters() if w.dim() > 1]
    layers = {name: (size[0], size[1]) for name, size in weights if name in LAYERS}
    others = len(weights) - len(LAYERS) * base.config.num_hidden_layers
    if layers.keys() != LAYERS or others > 2:  # more than embedding and head: experts
        return None
    sizes = {name: getattr(base.config, name) for name in Shape._fields[:4]}
    return Shape(**sizes, layers=layers, parameters=base.num_parameters())


class Device(NamedTuple):
    """What each process runs on."""

    name: str
    processes: int
    memory: float  # bytes that a process can have
    rate: float | None  # TFLOP/s of a process; None where it is not known
    on_card: bool


def this_device(processes: int) -> Device:
    """Describe the machine's cards, or its CPU, shared by the processes."""
    if torch.cuda.is_available():
        card = torch.cuda.get_device_properties(0)
        rate = known_rate(card.name)
        return Device(card.name, processes, USABLE * card.total_memory, rate, on_card=True)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / processes
    return Device("process on the CPU", processes, memory, None, on_card=False)


def planned_device(name: str, cards: int) -> Device:
    """Describe cards of `CARDS`; raises `ConfigError` where the name is not known."""
    if name not in CARDS:
        raise ConfigError(f"plan.card {name}: not known; known are {', '.join(CARDS)}")
    gib, rate = CARDS[name]
    return Device(name, cards, USABLE * gib * GIB, rate, on_card=True)


def known_rate(name: str) -> float | None:
    """Look up a card's bf16 rate, in TFLOP/s, by torch's name for it; None where not known.

    "NVIDIA A100-SXM4-40GB" → 312.
    """
    words = set(name.replace("-", " ").split())
    rates = (rate for card, (_, rate) in CARDS.items() if words.issuperset(card.split()))
    return None if "Laptop" in words else next(rates, None)


def memory(config: Config, shape: Shape, device: Device) -> dict[str, float]:
    """Add up what a process of this run needs at its peak: bytes, by part."""
    training, bits = config.training, config.model.quantization
    width = 2 if training.bf16 or training.fp16 else 4  # bytes
    linear, hidden = shape.linear_parameters(), shape.hidden_size
    weights = WEIGHT_BYTES.get(bits, width) * linear + width * (shape.parameters - linear)
    # in float32: a weight, its gradient, Adam's two moments, and DDP's copy of the gradient
    adapter = shape.adapter_parameters(config.model) * (20 if device.processes > 1 else 16)
    tokens = training.per_device_train_batch_size * config.data.max_length
    # a logit, in float32 after the softmax, its gradient
    logits = target_fraction(config) * tokens * shape.vocab_size * 12
    backward: float = tokens * (3 * width * shape.layers["up_proj"][0] + 8 * hidden)
    kept, how = tokens * layer_bytes(config, shape, device.on_card), "all kept"
    if training.gradient_checkpointing:  # a layer's input is kept, the rest computed again
        backward, kept, how = kept + backward, tokens * hidden * width, "checkpointed"
    largest = "logits and loss" if logits > backward else "one layer's backward pass"
    # CUDA's own and fragmentation; on a CPU interpreter and libraries, and, as measured, weights
    reserve = GIB if device.on_card else 0.7 * GIB + 0.65 * weights
    return {
        "weights" if bits == "none" else f"weights ({bits} linear layers)": weights,
        "adapter, gradients, optimizer": adapter,
        f"activations ({how})": shape.num_hidden_layers * kept,
        f"transient peak ({largest})": max(backward, logits),
        "reserve": reserve,
    }


def layer_bytes(config: Config, shape: Shape, on_card: bool) -> float:
    """Bytes a token and layer that autograd keeps for LoRA under scaled dot-product attention.

    Counted in what `torch.autograd.graph.saved_tensors_hooks` sees; a test compares.
    """
    h, adapted = shape.hidden_size, targets(config.model)
    q, k, m = (shape.layers[name][0] for name in ("q_proj", "k_proj", "up_proj"))
    wide = len(adapted - {"o_proj", "down_proj"}) * h  # the hidden state, for each adapter
    dropout = config.model.lora_dropout > 0
    dropped = wide + q * ("o_proj" in adapted) + m * ("down_proj" in adapted)
    masks = dropped * (1 if on_card else 4) if dropout else 0
    if config.training.bf16 or config.training.fp16:  # norms in float32, the rest in half of it
        return 4 * (2 * h + q + k) + 2 * (wide + 3 * q + 2 * k + 4 * m) + masks
    copies = max(0, wide - 2 * h + q) if dropout else 0  # without it LoRA shares its layer's input
    return 4 * (4 * h + 3 * q + 3 * k + 4 * m + copies) + masks


def target_fraction(config: Config) -> float:
    """Share of the tokens whose logits are needed."""
    masked = config.masking.mask_ratio
    return {"masked": masked, "mixed": (1 + masked) / 2}.get(config.training.objective, 1.0)


class Text(NamedTuple):
    """Training text of an epoch, at least and at most: the two are equal where it was counted."""

    tokens: Range
    windows: Range


def measured_text(mixture: Mixture) -> Text:
    """Count the text of a mixture."""
    return Text(np.full(2, mixture.report["tokens"].sum()), np.full(2, len(train_windows(mixture))))


def estimated_text(config: Config) -> Text:
    """Estimate it from the sizes of the novels' files, before they are read.

    Raises `DataError` where there is no novel.
    """
    data, files = config.data, find_texts(config)
    characters: dict[str, float] = {}  # by book; of three bytes each
    for file in {file.path: file for file in files if file.source == "wuxia"}.values():
        characters[file.book] = characters.get(file.book, 0) + utf8_size(file.path) / 3
    held_out = likely_share(characters, data.val_ratio, config.training.seed)
    general = data.general_ratio if any(file.source == "general" for file in files) else 0
    size = 3 * sum(characters.values()) * (1 - held_out) / (1 - general)
    tokens = size / np.array((4.5, 3.65))  # bytes a token of novels under Qwen's tokenizer
    return Text(tokens, tokens / data.max_length)


def flop_per_token(config: Config, shape: Shape) -> float:
    """Floating-point operations that training spends on a token.

    2 a weight forward and 2 backward, since the base's weights get no gradient; 2 more where the
    forward pass is done again; the head only for the target tokens.
    """
    passes = 6.0 if config.training.gradient_checkpointing else 4.0
    head = target_fraction(config) * shape.vocab_size * shape.hidden_size
    return passes * shape.linear_parameters() + 4 * head


def checkpoint_bytes(config: Config, shape: Shape) -> float:
    """Disk that the kept checkpoints take, with one more while it is written."""
    checkpoints = 12 * (config.training.save_total_limit + 1)
    return (checkpoints + 4) * shape.adapter_parameters(config.model)


def describe_plan(config: Config, shape: Shape | None, device: Device, text: Text) -> str:
    """Write the forecast of a run, a line each thing."""
    name = config.model.model_name_or_path
    if shape is None:
        return f"plan: the shape of {name} is not known, so its memory and time are not forecast"
    where = f"{device.processes} × {device.name}"
    lines = [
        f"plan, arithmetic: {name}, {shape.parameters / 1e9:.3g} B parameters, on {where}",
        *memory_lines(config, shape, device),
        *work_lines(config, shape, device, text),
        f"disk for checkpoints: {checkpoint_bytes(config, shape) / GIB:.2f} GiB",
    ]
    return "\n  ".join(lines)


def memory_lines(config: Config, shape: Shape, device: Device) -> Iterator[str]:
    """Write the memory of a process, and what saves some where it does not fit."""
    parts = memory(config, shape, device)
    total = sum(parts.values())
    fits = "fits" if total <= device.memory else f"DOES NOT FIT; {LESS_MEMORY}"
    yield "GiB a process"
    yield from (f"  {part:44}{size / GIB:7.2f}" for part, size in parts.items())
    yield f"  {'in all':44}{total / GIB:7.2f} of {device.memory / GIB:.1f}: {fits}"


def work_lines(config: Config, shape: Shape, device: Device, text: Text) -> Iterator[str]:
    """Write the text, the steps and the hours of a run, and what these cost."""
    training, batch = config.training, effective_batch(config, device.processes)
    epoch_steps = np.ceil(text.windows / batch)
    steps = np.ceil(epoch_steps * training.num_train_epochs)
    if training.max_steps > 0:
        steps = np.full(2, float(training.max_steps))
    source = "" if text.tokens[0] == text.tokens[1] else ", estimated from the files' sizes"
    yield f"an epoch: {span(text.tokens)} tokens, {span(text.windows)} windows{source}"
    yield f"the run: {span(steps)} steps of {batch} windows"
    if training.warmup_steps >= steps[1]:
        fewer = f"--set training.warmup_steps={steps[1] // 10:.0f}"
        yield f"TOO SHORT: the warm-up takes {training.warmup_steps} steps, or all; {fewer}"
    if device.rate is None:
        yield f"hours an epoch: the rate of {device.name} is not known; --plan --measure times it"
        return
    shares = (0.8, 0.4)  # of that rate: the best that is published for LoRA, and half of it
    rate, flop = device.rate * device.processes, text.tokens * flop_per_token(config, shape)
    epoch = flop / (np.array(shares) * rate * 1e12) / 3600
    run = epoch * steps / epoch_steps
    digits = 1 if epoch[0] >= 1 else 3
    part = f"{shares[0]:.0%} to {shares[1]:.0%} of {rate:.3g} TFLOP/s"
    price = (config.plan.price_per_hour or 0) * device.processes
    cost = f", which costs {span(run * price, 1)}" if price else ""
    yield f"hours an epoch: {span(epoch, digits)}, {part}; the run: {span(run, digits)}{cost}"


def span(ends: Range, digits: int = 0) -> str:
    """Write a range: "30 to 37", "1,000", "10.2 to 25.4"."""
    low, high = (f"{end:,.{digits}f}" for end in ends)
    return low if low == high else f"{low} to {high}"
