"""The shape of a base model, from its config.json alone: nothing is loaded."""

import codecs
import math
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from wuxia_core import corpus
from wuxia_core.config import LINEAR_LAYERS, Config, effective_batch, locate
from wuxia_core.errors import ConfigError
from wuxia_core.mixing import Mixture, read_json, train_windows

GIB = 2**30
WEIGHT_BYTES = {"8bit": 1.0, "4bit": 0.5625}  # of a linear layer; 4 bits and a scale for each 64
TRAINED_BYTES = 16  # of an adapter's weight, in float32: itself, its gradient, Adam's two moments
BUCKET_BYTES = 4  # of an adapter's weight, where DDP has a copy of the gradients
LOGIT_BYTES = 12  # of a logit: itself, in float32 after the softmax, its gradient
CARD_RESERVE = 1.0 * GIB  # CUDA's own, and what the allocator holds in pieces
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
BYTES_A_TOKEN = (3.65, 4.5)  # UTF-8, of novels under Qwen's tokenizer
USABLE = 23.5 / 24  # of a card's memory; the rest is the driver's


@dataclass(frozen=True)
class Shape:
    """A dense decoder of the Llama family, as Qwen3 is."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    tied: bool  # embedding and head share their weights
    positions: int  # longest text, tokens

    @property
    def query(self) -> int:
        """Width of all heads' queries."""
        return self.heads * self.head_dim

    @property
    def keys(self) -> int:
        """Width of all heads' keys, and of their values."""
        return self.kv_heads * self.head_dim

    def linear(self, name: str) -> tuple[int, int]:
        """Width that a linear layer takes and gives."""
        return {
            "q_proj": (self.hidden, self.query),
            "k_proj": (self.hidden, self.keys),
            "v_proj": (self.hidden, self.keys),
            "o_proj": (self.query, self.hidden),
            "gate_proj": (self.hidden, self.intermediate),
            "up_proj": (self.hidden, self.intermediate),
            "down_proj": (self.intermediate, self.hidden),
        }[name]

    @property
    def linear_parameters(self) -> int:
        """Weights of all linear layers but the head."""
        sizes = [self.linear(name) for name in LINEAR_LAYERS]
        return self.layers * sum(taken * given for taken, given in sizes)

    @property
    def head_parameters(self) -> int:
        """Weights of the projection to the vocabulary."""
        return self.vocab * self.hidden

    @property
    def parameters(self) -> int:
        """All weights; the norms' are too few to matter."""
        return self.linear_parameters + self.head_parameters * (1 if self.tied else 2)

    def adapter_parameters(self, targets: Sequence[str], rank: int) -> int:
        """Weights that LoRA adds, and the row of the mask token."""
        known = [self.linear(name) for name in targets if name in LINEAR_LAYERS]
        return self.layers * rank * sum(map(sum, known)) + self.hidden


FAMILIES = ("qwen3", "qwen2", "llama", "mistral")  # model_type; others have other layers

# The shipped recipes' models, so that a plan needs no network.
KNOWN = {
    "Qwen/Qwen3-8B": Shape(4096, 36, 32, 8, 128, 12288, 151936, False, 40960),
    "Qwen/Qwen3-4B": Shape(2560, 36, 32, 8, 128, 9728, 151936, True, 40960),
}


def read_shape(name: str) -> Shape | None:
    """Read a model's shape from its folder, the hub's cache or the hub; None where that fails.

    It is also None for a model of another family, whose memory is not planned.
    """
    settings = _settings(name)
    if settings is None:
        return KNOWN.get(name)
    if settings.get("model_type") not in FAMILIES:
        return None
    try:
        heads, hidden = settings["num_attention_heads"], settings["hidden_size"]
        return Shape(
            hidden=hidden,
            layers=settings["num_hidden_layers"],
            heads=heads,
            kv_heads=settings.get("num_key_value_heads") or heads,
            head_dim=settings.get("head_dim") or hidden // heads,
            intermediate=settings["intermediate_size"],
            vocab=settings["vocab_size"],
            tied=bool(settings.get("tie_word_embeddings", False)),
            positions=settings["max_position_embeddings"],
        )
    except KeyError:
        return None


def _settings(name: str) -> dict[str, Any] | None:
    path = locate(name) / "config.json"
    if not path.is_file():
        found = None if locate(name).is_dir() or name in KNOWN else _from_hub(name)
        if found is None:
            return None
        path = Path(found)
    return read_json(path) or {}


def _from_hub(name: str) -> str | None:
    from huggingface_hub import hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        cached = try_to_load_from_cache(name, "config.json")
        if isinstance(cached, str) or os.environ.get("HF_HUB_OFFLINE"):
            return cached if isinstance(cached, str) else None
        return str(hf_hub_download(name, "config.json"))
    except (HFValidationError, OSError):  # the tokenizer's loading says what is wrong
        return None


@dataclass(frozen=True)
class Memory:
    """Bytes a process needs; `moment` is the largest that is needed for a moment only."""

    weights: float
    adapter: float
    activations: float
    moment: float
    moment_name: str
    reserve: float

    @property
    def total(self) -> float:
        """All of it."""
        return self.weights + self.adapter + self.activations + self.moment + self.reserve


def memory(config: Config, shape: Shape, processes: int, on_card: bool) -> Memory:
    """Add up what a process of this run needs at its peak."""
    model, training = config.model, config.training
    width = 2 if training.bf16 or training.fp16 else 4  # bytes
    linear = WEIGHT_BYTES.get(model.quantization, width) * shape.linear_parameters
    others = width * (shape.parameters - shape.linear_parameters)
    trained = shape.adapter_parameters(model.lora_target_modules, model.lora_r)
    tokens = training.per_device_train_batch_size * config.data.max_length
    layer = tokens * _layer_bytes(config, shape, on_card)
    backward = tokens * (3 * width * shape.intermediate + 8 * shape.hidden)
    logits = target_fraction(config) * tokens * shape.vocab * LOGIT_BYTES
    kept, passing = layer, float(backward)
    if training.gradient_checkpointing:
        kept, passing = tokens * shape.hidden * width, layer + backward
    return Memory(
        weights=linear + others,
        adapter=trained * (TRAINED_BYTES + (BUCKET_BYTES if processes > 1 else 0)),
        activations=shape.layers * kept,
        moment=max(passing, logits),
        moment_name="logits and loss" if logits > passing else "one layer's backward pass",
        reserve=CARD_RESERVE if on_card else PROCESS_RESERVE + CPU_SURPLUS * (linear + others),
    )


def _layer_bytes(config: Config, shape: Shape, on_card: bool) -> float:
    """Bytes a token and layer that autograd keeps for LoRA under scaled dot-product attention.

    Counted in what `torch.autograd.graph.saved_tensors_hooks` sees; a test compares.
    """
    h, q, k, m = shape.hidden, shape.query, shape.keys, shape.intermediate
    targets = config.model.lora_target_modules
    wide = sum(
        shape.linear(name)[0] == h for name in targets if name not in ("o_proj", "down_proj")
    )
    dropped = wide * h + q * ("o_proj" in targets) + m * ("down_proj" in targets)
    dropout = config.model.lora_dropout > 0
    masks = dropped * (1 if on_card else 4) if dropout else 0
    if config.training.bf16 or config.training.fp16:  # norms in float32, the rest in half of it
        return 4 * (2 * h + q + k) + 2 * (wide * h + 3 * q + 2 * k + 4 * m) + masks
    copies = (wide - 2) * h + q if dropout else 0  # without dropout LoRA shares the layer's input
    return 4 * (4 * h + 3 * q + 3 * k + 4 * m + max(0, copies)) + masks


def target_fraction(config: Config) -> float:
    """Share of the tokens whose logits are needed."""
    masked = config.masking.mask_ratio
    return {"masked": masked, "clm": 1.0, "mixed": (1 + masked) / 2}[config.training.objective]


def remedies(config: Config) -> Iterator[tuple[str, Config]]:
    """Give changes that save memory, the least harmful first, each on top of those before it."""
    changed = config.model_copy(deep=True)
    training = changed.training
    if not training.gradient_checkpointing:
        training.gradient_checkpointing = True
        yield "training.gradient_checkpointing=true", changed
    while training.per_device_train_batch_size > 1:
        batch = training.per_device_train_batch_size
        if training.objective == "mixed" and batch % 4:
            break  # its batches are even
        training.gradient_accumulation_steps *= 2 if batch % 2 == 0 else batch
        training.per_device_train_batch_size = batch // 2 if batch % 2 == 0 else 1
        yield (
            f"training.per_device_train_batch_size={training.per_device_train_batch_size} "
            f"training.gradient_accumulation_steps={training.gradient_accumulation_steps}",
            changed,
        )
    for bits in ("8bit", "4bit"):
        if WEIGHT_BYTES[bits] < WEIGHT_BYTES.get(changed.model.quantization, 2):
            changed.model.quantization = bits
            yield f"model.quantization={bits}", changed
    if changed.data.max_length >= 512 and changed.data.stride is None:
        changed.data.max_length //= 2
        yield f"data.max_length={changed.data.max_length}", changed


@dataclass(frozen=True)
class Text:
    """Training text of an epoch, a range where it is estimated: tokens and windows."""

    tokens: tuple[float, float]
    windows: tuple[float, float]
    measured: bool


def measured_text(mixture: Mixture) -> Text:
    """Count the text of a mixture."""
    tokens, windows = int(mixture.report["tokens"].sum()), len(train_windows(mixture))
    return Text((tokens, tokens), (windows, windows), measured=True)


def estimated_text(config: Config) -> Text:
    """Estimate it from the sizes of the novels' files, before they are read.

    Raises `DataError` where there is no novel.
    """
    files = corpus.find_files(locate(config.data.data_dir), None)
    novels = sum(_utf8_size(file.path) for file in files if file.source == "wuxia")
    general = config.data.general_ratio if config.data.general_file else 0
    size = novels * (1 - config.data.val_ratio) / (1 - general)
    few, many = (size / width for width in BYTES_A_TOKEN[::-1])
    length = config.data.max_length
    return Text((few, many), (few / length, many / length), measured=False)


def _utf8_size(path: Path) -> float:
    """Bytes of a file's text in UTF-8, which writes three where GBK, Big5 and UTF-16 write two."""
    with path.open("rb") as file:
        beginning = file.read(4096)
    decoder = codecs.getincrementaldecoder("utf-8")()
    try:
        decoder.decode(beginning)
    except UnicodeDecodeError:
        return path.stat().st_size * 1.5
    return path.stat().st_size


def steps(config: Config, text: Text, effective_batch: int) -> tuple[int, int]:
    """Optimizer steps of the run, at least and at most."""
    if config.training.max_steps > 0:
        return config.training.max_steps, config.training.max_steps
    few, many = (math.ceil(n * config.training.num_train_epochs) for n in
                 steps_per_epoch(text, effective_batch))  # fmt: skip
    return few, many


def steps_per_epoch(text: Text, effective_batch: int) -> tuple[int, int]:
    """Optimizer steps of an epoch, at least and at most."""
    few, many = (math.ceil(n / effective_batch) for n in text.windows)
    return few, many


def flop_per_token(config: Config, shape: Shape) -> float:
    """Floating-point operations that training spends on a token.

    2 a weight forward and 2 backward, since the base's weights get no gradient; 2 more where the
    forward pass is done again; the head only for the tokens that are asked for.
    """
    passes = 6.0 if config.training.gradient_checkpointing else 4.0
    return passes * shape.linear_parameters + 4 * target_fraction(config) * shape.head_parameters


def product_rate() -> float:
    """Time a matrix product on this machine's CPU: FLOP/s."""
    size, rounds = 1024, 5
    a, b = (np.random.default_rng(n).random((size, size), np.float32) for n in (0, 1))
    a @ b
    start = time.perf_counter()
    for _ in range(rounds):
        a @ b
    return rounds * 2 * size**3 / (time.perf_counter() - start)


def checkpoint_bytes(config: Config, shape: Shape) -> float:
    """Disk that the kept checkpoints take, with one more while it is written."""
    trained = shape.adapter_parameters(config.model.lora_target_modules, config.model.lora_r)
    return (config.training.save_total_limit + 1) * trained * 12 + trained * 4


def known_rate(name: str) -> float | None:
    """Look up a card's bf16 rate, in TFLOP/s, by torch's name for it; None where not known."""
    words = name.replace("-", " ").split()
    if "Laptop" in words:
        return None
    for card, (_, rate) in CARDS.items():
        model = card.removesuffix(" 40GB").removesuffix(" 80GB").split()
        if any(words[n : n + len(model)] == model for n in range(len(words))):
            return rate
    return None


@dataclass(frozen=True)
class Device:
    """What each process runs on."""

    name: str
    processes: int
    bytes: float  # of memory that a process can have
    rate: float | None  # FLOP/s of all together; None where it is not known
    shares: tuple[float, float]  # of that rate that training reaches, best and worst
    on_card: bool


def this_device(processes: int) -> Device:
    """Describe the machine's cards, or its CPU, shared by the processes."""
    import torch

    if torch.cuda.is_available():
        name = torch.cuda.get_device_name(0)
        size = torch.cuda.get_device_properties(0).total_memory
        known = known_rate(name)
        rate = known * 1e12 * processes if known else None
        return Device(name, processes, USABLE * size, rate, CARD_SHARES, True)
    share = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / processes
    rate = product_rate()
    return Device("process on the CPU", processes, share, rate, CPU_SHARES, False)


def planned_device(config: Config, asked: int | None) -> Device | None:
    """Describe the cards that `plan.card` names, None where it names none.

    Raises `ConfigError` where the card is not known.
    """
    name = config.plan.card
    if name is None:
        return None
    if name not in CARDS:
        names = ", ".join(CARDS)
        raise ConfigError(f"plan.card {name}: not known; known are {names}")
    gib, rate = CARDS[name]
    cards = asked or config.plan.cards
    return Device(name, cards, USABLE * gib * GIB, rate * 1e12 * cards, CARD_SHARES, True)


def describe_plan(config: Config, device: Device, text: Text) -> str:
    """Write the forecast of a run, a line each thing."""
    name = config.model.model_name_or_path
    shape = read_shape(name)
    if shape is None:
        return f"plan: the shape of {name} is not known, so its memory and time are not forecast"
    head = (
        f"plan, arithmetic: {name}, {shape.parameters / 1e9:.3g} B parameters, on "
        f"{device.processes} × {device.name}"
    )
    lines = [*_memory(config, shape, device), *_work(config, shape, device, text)]
    return "\n".join([head, *(f"  {line}" for line in lines)])


def _memory(config: Config, shape: Shape, device: Device) -> Iterator[str]:
    needs = memory(config, shape, device.processes, device.on_card)
    kept = "checkpointed" if config.training.gradient_checkpointing else "all kept"
    parts = {
        f"weights{_quantized(config)}": needs.weights,
        "adapter, gradients, optimizer": needs.adapter,
        f"activations ({kept})": needs.activations,
        f"transient peak ({needs.moment_name})": needs.moment,
        "reserve": needs.reserve,
    }
    yield "GiB a process"
    for part, size in parts.items():
        yield f"  {part:44}{size / GIB:7.2f}"
    fits = needs.total <= device.bytes
    verdict = "fits" if fits else "DOES NOT FIT"
    yield f"  {'in all':44}{needs.total / GIB:7.2f} of {device.bytes / GIB:.1f}: {verdict}"
    if not fits:
        yield "what to change, the least harmful first, each with those above it:"
        yield from advice(config, shape, device)


def _quantized(config: Config) -> str:
    bits = config.model.quantization
    return "" if bits == "none" else f" ({bits} linear layers)"


def advice(config: Config, shape: Shape | None, device: Device) -> Iterator[str]:
    """Say what saves memory, with what it comes to, up to what fits."""
    for change, changed in remedies(config):
        if shape is None:
            yield f"  --set {change.replace(' ', ' --set ')}"
            continue
        needs = memory(changed, shape, device.processes, device.on_card)
        fits = needs.total <= device.bytes
        words = f"{needs.total / GIB:.2f} GiB{', fits' if fits else ''}"
        yield f"  --set {change.replace(' ', ' --set ')}: {words}"
        if fits:
            return
    yield "  a smaller model, such as Qwen/Qwen3-4B"


def _work(config: Config, shape: Shape, device: Device, text: Text) -> Iterator[str]:
    batch = effective_batch(config, device.processes)
    few, many = steps(config, text, batch)
    source = "" if text.measured else ", estimated from the files' sizes"
    yield f"an epoch: {_range(*text.tokens)} tokens, {_range(*text.windows)} windows{source}"
    yield f"the run: {_range(few, many)} steps of {batch} windows"
    warmup = config.training.warmup_steps
    if warmup >= many:
        yield (
            f"TOO SHORT: the warm-up takes {warmup} steps, so the rate never reaches its peak; "
            f"--set training.warmup_steps={many // 10}"
        )
    yield _hours(config, shape, device, text)
    yield f"disk for checkpoints: {checkpoint_bytes(config, shape) / GIB:.2f} GiB"


def _hours(config: Config, shape: Shape, device: Device, text: Text) -> str:
    if device.rate is None:
        return f"hours an epoch: the rate of {device.name} is not known; --plan --measure times it"
    flop = flop_per_token(config, shape)
    best, worst = device.shares
    hours = np.array(text.tokens) * flop / (np.array([best, worst]) * device.rate) / 3600
    batch = effective_batch(config, device.processes)
    run = hours * steps(config, text, batch) / steps_per_epoch(text, batch)
    words = (
        f"hours an epoch: {_short(hours[0])} to {_short(hours[1])}, {best:.0%} to {worst:.0%} of "
        f"{device.rate / 1e12:.3g} TFLOP/s; the run: {_short(run[0])} to {_short(run[1])}"
    )
    price = config.plan.price_per_hour
    if price is not None:
        cost = price * device.processes * run
        words += f", which costs {cost[0]:.1f} to {cost[1]:.1f}"
    return words


def _range(few: float, many: float) -> str:
    return f"{few:,.0f}" if few == many else f"{few:,.0f} to {many:,.0f}"


def _short(hours: float) -> str:
    return f"{hours:.1f}" if hours >= 1 else f"{hours:.3f}"
