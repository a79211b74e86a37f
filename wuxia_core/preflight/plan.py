"""What a run needs, by arithmetic: memory, steps, hours, cost and disk. Nothing is loaded."""

import math
import os
import timeit
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, Qwen3Config

from wuxia_core import corpus
from wuxia_core.config import Config, ModelConfig, effective_batch, locate
from wuxia_core.errors import ConfigError
from wuxia_core.mixing import Mixture, train_windows

Range = npt.NDArray[np.float64]  # (2,), at least and at most
GIB = 2**30
WEIGHT_BYTES = {"8bit": 1.0, "4bit": 0.5625}  # of a linear layer; 4 bits and a scale for each 64
TRAINED_BYTES = 16  # of an adapter's weight, in float32: itself, its gradient, Adam's two moments
BUCKET_BYTES = 4  # of an adapter's weight, where DDP has a copy of the gradients
LOGIT_BYTES = 12  # of a logit: itself, in float32 after the softmax, its gradient
CARD_RESERVE = 1.0 * GIB  # CUDA's own, and what fragmentation wastes
PROCESS_RESERVE = 0.7 * GIB  # interpreter, libraries and vocabulary of a process on a CPU
CPU_SURPLUS = 0.65  # of the weights, which a process on a CPU was measured to take besides
# GiB of memory and TFLOP/s of dense bf16 products, as the makers' data sheets have them.
CARDS = {
    "RTX 3090": (24, 71), "RTX 4090": (24, 165), "RTX 5090": (32, 210), "RTX A6000": (48, 155),
    "L40S": (48, 362), "A100 40GB": (40, 312), "A100 80GB": (80, 312), "H100": (80, 989),
    "H200": (141, 989),
}  # fmt: skip
CARD_SHARES = (0.8, 0.4)  # of that rate: the best that is published for LoRA, and half of it
CPU_SHARES = (0.6, 0.1)  # of a large product's rate; the smaller the model, the less
BYTES_PER_TOKEN = (4.5, 3.65)  # UTF-8, of novels under Qwen's tokenizer
USABLE = 23.5 / 24  # of a card's memory; the rest is the driver's

LAYERS = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
UNREADABLE = (OSError, ValueError, AttributeError, ImportError, StrictDataclassError)
# The shipped recipes' models, so that a plan needs no network.
QWEN3 = {"num_hidden_layers": 36, "num_key_value_heads": 8, "max_position_embeddings": 40960}
SHIPPED: dict[str, dict[str, Any]] = {
    "Qwen/Qwen3-8B": QWEN3 | {"hidden_size": 4096, "intermediate_size": 12288},
    "Qwen/Qwen3-4B": QWEN3
    | {"hidden_size": 2560, "intermediate_size": 9728, "tie_word_embeddings": True},
}


@dataclass(frozen=True)
class Shape:
    """Widths and numbers of weights of a model whose linear layers are `LAYERS`."""

    config: Any  # the model's own, of transformers
    widths: dict[str, int]  # of what each of LAYERS gives
    parameters: int  # of the base
    linear_parameters: int  # of the base's linear layers without the head
    adapter_parameters: int  # that are trained: LoRA's and the mask token's row


def read_shape(config: ModelConfig) -> Shape | None:
    """Count a model's weights from its config.json: in its folder, the hub's cache or the hub.

    None where that cannot be read, or its layers are not those that `layer_bytes` knows. Qwen3-8B:
    8.19 B parameters, 6.95 B of them in linear layers; an adapter of rank 16 has 43.65 M.
    """
    name = config.model_name_or_path
    try:
        if name in SHIPPED and not locate(name).is_dir():
            settings = Qwen3Config(**SHIPPED[name])
        else:
            settings = AutoConfig.from_pretrained(str(locate(name)), trust_remote_code=False)
        with torch.device("meta"):  # shapes without values
            return shape_of(AutoModelForCausalLM.from_config(settings), config)
    except UNREADABLE:  # the tokenizer's loading says what is wrong
        return None


def shape_of(base: PreTrainedModel, config: ModelConfig) -> Shape | None:
    """Count the weights of a model and of the adapter that it gets; None as in `read_shape`.

    LoRA adds (r, in) and (out, r) to a layer (out, in). Raises `ConfigError` where
    `lora_target_modules` names another layer.
    """
    targets, expected = set(config.lora_target_modules), len(LAYERS) * base.config.num_hidden_layers
    modules = [(name.rpartition(".")[2], m) for name, m in base.base_model.named_modules()]
    linear = [(name, module) for name, module in modules if isinstance(module, torch.nn.Linear)]
    widths = {name: module.out_features for name, module in linear}
    matrices = sum(weight.dim() > 1 for weight in base.parameters())
    if widths.keys() != LAYERS or matrices > expected + 2:  # more than embedding and head: experts
        return None
    if targets - LAYERS:
        wrong, names = ", ".join(sorted(targets - LAYERS)), ", ".join(widths)
        raise ConfigError(f"model.lora_target_modules: {wrong} is none of the layers {names}")
    weights = sum(module.weight.numel() for _, module in linear)
    ends = sum(m.in_features + m.out_features for name, m in linear if name in targets)
    trained = config.lora_r * ends + base.config.hidden_size
    return Shape(base.config, widths, base.num_parameters(), weights, trained)


@dataclass(frozen=True)
class Device:
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
    return Device("process on the CPU", processes, memory, product_rate() / processes, False)


def planned_device(config: Config, processes: int | None) -> Device | None:
    """Describe the cards that `plan.card` names, None where it names none.

    Raises `ConfigError` where the card is not known.
    """
    name = config.plan.card
    if name is None:
        return None
    if name not in CARDS:
        raise ConfigError(f"plan.card {name}: not known; known are {', '.join(CARDS)}")
    gib, rate = CARDS[name]
    return Device(name, processes or config.plan.cards, USABLE * gib * GIB, rate, on_card=True)


def known_rate(name: str) -> float | None:
    """Look up a card's bf16 rate, in TFLOP/s, by torch's name for it; None where not known.

    "NVIDIA A100-SXM4-40GB" → 312.
    """
    words = f" {name.replace('-', ' ')} "
    models = {card.removesuffix(" 40GB").removesuffix(" 80GB"): CARDS[card][1] for card in CARDS}
    rates = [rate for model, rate in models.items() if f" {model} " in words]
    return rates[0] if rates and "Laptop" not in words else None


def product_rate() -> float:
    """Time a matrix product on this machine's CPU: TFLOP/s."""
    a = np.random.default_rng(0).random((1024, 1024), np.float32)
    return float(2 * 1024**3 / min(timeit.repeat(lambda: a @ a, number=1, repeat=6)) / 1e12)


def memory(config: Config, shape: Shape, device: Device) -> dict[str, float]:
    """Add up what a process of this run needs at its peak: bytes, by part."""
    training, bits = config.training, config.model.quantization
    width = 2 if training.bf16 or training.fp16 else 4  # bytes
    weights = WEIGHT_BYTES.get(bits, width) * shape.linear_parameters
    weights += width * (shape.parameters - shape.linear_parameters)
    trained = TRAINED_BYTES + (BUCKET_BYTES if device.processes > 1 else 0)
    tokens = training.per_device_train_batch_size * config.data.max_length
    hidden = shape.config.hidden_size
    logits = target_fraction(config) * tokens * shape.config.vocab_size * LOGIT_BYTES
    backward = tokens * (3 * width * shape.widths["up_proj"] + 8 * hidden)
    kept, how = tokens * layer_bytes(config, shape, device.on_card), "all kept"
    if training.gradient_checkpointing:  # a layer's input is kept, the rest computed again
        backward, kept, how = kept + backward, tokens * hidden * width, "checkpointed"
    largest = "logits and loss" if logits > backward else "one layer's backward pass"
    return {
        "weights" if bits == "none" else f"weights ({bits} linear layers)": weights,
        "adapter, gradients, optimizer": shape.adapter_parameters * trained,
        f"activations ({how})": shape.config.num_hidden_layers * kept,
        f"transient peak ({largest})": max(backward, logits),
        "reserve": CARD_RESERVE if device.on_card else PROCESS_RESERVE + CPU_SURPLUS * weights,
    }


def layer_bytes(config: Config, shape: Shape, on_card: bool) -> float:
    """Bytes a token and layer that autograd keeps for LoRA under scaled dot-product attention.

    Counted in what `torch.autograd.graph.saved_tensors_hooks` sees; a test compares.
    """
    h: int = shape.config.hidden_size
    targets = set(config.model.lora_target_modules)
    q, k, m = (shape.widths[name] for name in ("q_proj", "k_proj", "up_proj"))
    wide = len(targets - {"o_proj", "down_proj"}) * h  # the hidden state, for each adapter
    dropout = config.model.lora_dropout > 0
    dropped = wide + q * ("o_proj" in targets) + m * ("down_proj" in targets)
    masks = dropped * (1 if on_card else 4) if dropout else 0
    if config.training.bf16 or config.training.fp16:  # norms in float32, the rest in half of it
        return 4 * (2 * h + q + k) + 2 * (wide + 3 * q + 2 * k + 4 * m) + masks
    copies = max(0, wide - 2 * h + q) if dropout else 0  # without it LoRA shares its layer's input
    return 4 * (4 * h + 3 * q + 3 * k + 4 * m + copies) + masks


def target_fraction(config: Config) -> float:
    """Share of the tokens whose logits are needed."""
    masked = config.masking.mask_ratio
    return {"masked": masked, "clm": 1.0, "mixed": (1 + masked) / 2}[config.training.objective]


def remedies(config: Config) -> Iterator[tuple[str, Config]]:
    """Give changes that save memory, the least harmful first, each on top of those before it."""
    changed = config.model_copy(deep=True)
    model, data, training = changed.model, changed.data, changed.training
    if not training.gradient_checkpointing:
        training.gradient_checkpointing = True
        yield "training.gradient_checkpointing=true", changed
    even = 4 if training.objective == "mixed" else 2  # half of a mixed batch is masked
    while training.per_device_train_batch_size % even == 0:
        training.per_device_train_batch_size //= 2
        training.gradient_accumulation_steps *= 2
        words = f"training.per_device_train_batch_size={training.per_device_train_batch_size} "
        words += f"training.gradient_accumulation_steps={training.gradient_accumulation_steps}"
        yield words, changed
    for bits in ("8bit", "4bit"):
        if WEIGHT_BYTES[bits] < WEIGHT_BYTES.get(model.quantization, 2):
            model.quantization = bits
            yield f"model.quantization={bits}", changed
    if data.max_length >= 512 and data.stride is None:
        data.max_length //= 2
        yield f"data.max_length={data.max_length}", changed


def advice(config: Config, shape: Shape | None, device: Device) -> Iterator[str]:
    """Say what saves memory, with what it comes to, up to what fits."""
    for change, changed in remedies(config):
        total = sum(memory(changed, shape, device).values()) if shape else math.inf
        fits = total <= device.memory
        words = f": {total / GIB:.2f} GiB{', fits' if fits else ''}" if shape else ""
        yield f"  --set {change.replace(' ', ' --set ')}{words}"
        if fits:
            return
    yield "  a smaller model, such as Qwen/Qwen3-4B"


@dataclass(frozen=True)
class Text:
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
    files = corpus.find_files(locate(config.data.data_dir), None)
    novels = sum(utf8_size(file.path) for file in files if file.source == "wuxia")
    general = config.data.general_ratio if config.data.general_file else 0
    size = novels * (1 - config.data.val_ratio) / (1 - general)
    tokens = size / np.array(BYTES_PER_TOKEN)
    return Text(tokens, tokens / config.data.max_length)


def utf8_size(path: Path) -> float:
    """Bytes of a file's text in UTF-8, which writes three where GBK, Big5 and UTF-16 write two."""
    with path.open("rb") as file:
        beginning = file.read(4096).decode("utf-8", errors="replace")
    utf8 = beginning.count("\N{REPLACEMENT CHARACTER}") <= 1  # the last one may be cut
    return path.stat().st_size * (1 if utf8 else 1.5)


def steps(config: Config, text: Text, batch: int) -> tuple[Range, Range]:
    """Count the optimizer steps of an epoch and of the run, at least and at most."""
    of_epoch, limit = np.ceil(text.windows / batch), config.training.max_steps
    of_run = np.ceil(of_epoch * config.training.num_train_epochs)
    return of_epoch, np.full(2, float(limit)) if limit > 0 else of_run


def flop_per_token(config: Config, shape: Shape) -> float:
    """Floating-point operations that training spends on a token.

    2 a weight forward and 2 backward, since the base's weights get no gradient; 2 more where the
    forward pass is done again; the head only for the target tokens.
    """
    passes = 6.0 if config.training.gradient_checkpointing else 4.0
    head: int = shape.config.vocab_size * shape.config.hidden_size
    return passes * shape.linear_parameters + 4 * target_fraction(config) * head


def checkpoint_bytes(config: Config, shape: Shape) -> float:
    """Disk that the kept checkpoints take, with one more while it is written."""
    return (12 * (config.training.save_total_limit + 1) + 4) * shape.adapter_parameters


def describe_plan(config: Config, shape: Shape | None, device: Device, text: Text) -> str:
    """Write the forecast of a run, a line each thing."""
    name = config.model.model_name_or_path
    if shape is None:
        return f"plan: the shape of {name} is not known, so its memory and time are not forecast"
    lines = [
        f"plan, arithmetic: {name}, {shape.parameters / 1e9:.3g} B parameters, on "
        f"{device.processes} × {device.name}",
        *memory_lines(config, shape, device),
        *work_lines(config, shape, device, text),
        f"disk for checkpoints: {checkpoint_bytes(config, shape) / GIB:.2f} GiB",
    ]
    return "\n  ".join(lines)


def memory_lines(config: Config, shape: Shape, device: Device) -> Iterator[str]:
    """Write the memory of a process, and what to change where it does not fit."""
    parts = memory(config, shape, device)
    yield "GiB a process"
    for part, size in parts.items():
        yield f"  {part:44}{size / GIB:7.2f}"
    fits = (total := sum(parts.values())) <= device.memory
    there = f"of {device.memory / GIB:.1f}: {'fits' if fits else 'DOES NOT FIT'}"
    yield f"  {'in all':44}{total / GIB:7.2f} {there}"
    if not fits:
        yield "what to change, the least harmful first, each with those above it:"
        yield from advice(config, shape, device)


def work_lines(config: Config, shape: Shape, device: Device, text: Text) -> Iterator[str]:
    """Write the text, the steps and the hours of a run, and what these cost."""
    batch, warmup = effective_batch(config, device.processes), config.training.warmup_steps
    of_epoch, of_run = steps(config, text, batch)
    source = "" if text.tokens[0] == text.tokens[1] else ", estimated from the files' sizes"
    yield f"an epoch: {span(text.tokens)} tokens, {span(text.windows)} windows{source}"
    yield f"the run: {span(of_run)} steps of {batch} windows"
    if warmup >= of_run[1]:
        yield (
            f"TOO SHORT: the warm-up takes {warmup} steps, so the rate never reaches its peak; "
            f"--set training.warmup_steps={of_run[1] // 10:.0f}"
        )
    if device.rate is None:
        yield f"hours an epoch: the rate of {device.name} is not known; --plan --measure times it"
        return
    rate, shares = device.rate * device.processes, CARD_SHARES if device.on_card else CPU_SHARES
    flop = text.tokens * flop_per_token(config, shape)
    epoch = flop / (np.array(shares) * rate * 1e12) / 3600
    run = epoch * of_run / of_epoch
    cost = run * device.processes * (config.plan.price_per_hour or 0)
    yield (
        f"hours an epoch: {hours(epoch)}, {shares[0]:.0%} to {shares[1]:.0%} of {rate:.3g} "
        f"TFLOP/s; the run: {hours(run)}"
        + (f", which costs {cost[0]:.1f} to {cost[1]:.1f}" if cost.any() else "")
    )


def span(ends: Range) -> str:
    """Write a range of counts: "30 to 37", "1,000"."""
    low, high = (f"{end:,.0f}" for end in ends)
    return low if low == high else f"{low} to {high}"


def hours(ends: Range) -> str:
    """Write a range of hours: "10.2 to 25.4", "0.004 to 0.010"."""
    digits = 1 if ends[0] >= 1 else 3
    return f"{ends[0]:.{digits}f} to {ends[1]:.{digits}f}"
