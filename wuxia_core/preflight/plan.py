"""What a run needs, by arithmetic: memory, steps, hours, cost and disk. Nothing is loaded."""

import ast
import functools
import os
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch

from wuxia_core import mixing
from wuxia_core.config import LINEAR_LAYERS, Config, ModelConfig, effective_batch, locate
from wuxia_core.errors import ConfigError, MachineError
from wuxia_core.model import LESS_MEMORY, LOGITS, LOSS_LOGITS, fetch

Range = npt.NDArray[np.float64]  # (2,), at least and at most
GIB = 2**30
WEIGHT_BYTES = {"8bit": 1.0, "4bit": 0.5625}  # of a linear layer; 4 bits and a scale for each 64
# GiB of memory, TFLOP/s of dense half-precision products with sums in float32, and GB/s of memory,
# as the makers' data sheets have them.
CARDS = pd.read_csv(Path(__file__).with_name("cards.csv"), index_col=0)
USABLE = 23.5 / 24  # of a card's nominal memory; the rest is the driver's
REACHED = 0.6  # of a card's rates at least, all operations together; assumed
LAYERS = set(LINEAR_LAYERS)


class Shape(NamedTuple):
    """Numbers and sizes of the weights of a model whose linear layers are `LAYERS`."""

    hidden_size: int
    vocab_size: int
    num_hidden_layers: int
    max_position_embeddings: int  # tokens that it can read
    layers: dict[str, tuple[int, int]]  # of LAYERS: outputs and inputs
    parameters: int  # of all layers, embedding and head

    def widths(self) -> tuple[int, int, int, int]:
        """Give those of the hidden state, of queries, of keys and of the MLP."""
        q, k, m = (self.layers[name][0] for name in ("q_proj", "k_proj", "up_proj"))
        return self.hidden_size, q, k, m

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
        settings = fetch(name, partial(AutoConfig.from_pretrained, trust_remote_code=False))
        with torch.device("meta"):  # shapes without values
            return shape_of(AutoModelForCausalLM.from_config(settings))
    except (MachineError, ValueError, AttributeError, ImportError, StrictDataclassError):
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
    rates: Range  # TFLOP/s of products, GB/s of memory; NaN where one is not known
    bf16: bool
    on_card: bool


@functools.cache
def machine_cards() -> list[tuple[str, int, bool]]:
    """Give name, bytes and whether it has bfloat16 of each card.

    A process of its own asks, so that this one takes none of their memory. Raises `MachineError`
    where they do not answer.
    """
    if not torch.cuda.is_available():
        return []
    cards = "map(c.get_device_properties, range(c.device_count()))"
    ask = f"import torch.cuda as c; print([(x.name, x.total_memory, x.major > 7) for x in {cards}])"
    told = subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True)
    if told.returncode:
        raise MachineError(f"the GPU does not answer; try nvidia-smi: {told.stderr[-200:].strip()}")
    return list(ast.literal_eval(told.stdout))


def this_device(config: Config, processes: int) -> Device:
    """Describe the machine's cards, or its CPU, shared by the processes."""
    cards = machine_cards()[:processes]
    if not cards:
        size = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / processes
        return Device("process on the CPU", processes, size, np.full(2, np.nan), True, False)
    names, sizes, bf16 = zip(*cards, strict=True)
    rates = np.min([card_facts(config, name)[1:3] for name in names], axis=0)
    kinds = sorted({f"{name}, {size / GIB:.0f} GiB" for name, size, _ in cards})
    name = names[0] if len(kinds) == 1 else f"UNEQUAL ({'; '.join(kinds)}): the least counts"
    return Device(name, processes, min(sizes), rates, all(bf16), True)


def planned_device(config: Config, cards: int) -> Device:
    """Describe the cards of a plan; raises `ConfigError` where their memory is not known."""
    name = config.plan.card or "card"
    gib, *rates, bf16 = card_facts(config, name)
    if np.isnan(gib):
        known = f"known are {', '.join(CARDS.index)}"
        remedy = "give plan.card_gib, plan.card_tflops and plan.card_gbs"
        raise ConfigError(f"plan.card {name}: not known; {known}; of any other {remedy}")
    return Device(name, cards, USABLE * gib * GIB, np.array(rates), bool(bf16), True)


def card_facts(config: Config, name: str) -> list[float]:
    """Give GiB, TFLOP/s, GB/s and bf16 of a card: the config's, else what `CARDS` has, else NaN.

    "NVIDIA A100-SXM4-40GB", as torch calls it, → 40, 312, 1555, True.
    """
    words, plan = set(name.replace("-", " ").replace(" D", "D").split()), config.plan
    found = [card for card in CARDS.index if words.issuperset(card.split())]
    unknown = not found or "Laptop" in words
    known = [np.nan] * 4 if unknown else CARDS.loc[max(found, key=len)]
    given = (plan.card_gib, plan.card_tflops, plan.card_gbs, None)
    return [mine or its for mine, its in zip(given, known, strict=True)]


def memory(config: Config, shape: Shape, device: Device) -> dict[str, float]:
    """Add up what a process of this run needs at its peak: bytes, by part."""
    training, bits = config.training, config.model.quantization
    width = 2 if training.bf16 or training.fp16 else 4  # bytes
    linear, hidden = shape.linear_parameters(), shape.hidden_size
    weights = WEIGHT_BYTES.get(bits, width) * linear + width * (shape.parameters - linear)
    # in float32: a weight, its gradient, Adam's two moments, and DDP's copy of the gradient
    adapter = shape.adapter_parameters(config.model) * (20 if device.processes > 1 else 16)
    tokens = training.per_device_train_batch_size * config.data.max_length
    # a logit and, in its place, its gradient; a tied head's are copied; some in float32 at a time
    logits = target_fraction(config) * tokens * shape.vocab_size
    tied = shape.parameters - linear < 2 * shape.vocab_size * hidden
    logits = width * (1 + tied) * logits + 8 * min(logits, LOSS_LOGITS)
    backward: float = tokens * (3 * width * shape.layers["up_proj"][0] + 8 * hidden)
    kept, how = tokens * layer_bytes(config, shape, device.on_card), "all kept"
    if training.gradient_checkpointing:  # a layer's input is kept, the rest computed again
        backward, kept, how = kept + backward, tokens * hidden * width, "checkpointed"
    activations = shape.num_hidden_layers * kept
    peaks = {"one layer's backward pass": backward, "logits and loss": logits}
    peaks["held-out measurement"] = held_out_bytes(config, shape) - activations
    largest = max(peaks, key=lambda name: peaks[name])
    # CUDA's own and fragmentation; on a CPU interpreter and libraries, and, as measured, weights
    reserve = GIB if device.on_card else 0.7 * GIB + 0.65 * weights
    return {
        "weights" if bits == "none" else f"weights ({bits} linear layers)": weights,
        "adapter, gradients, optimizer": adapter,
        f"activations ({how})": activations,
        f"transient peak ({largest})": peaks[largest],
        "reserve": reserve,
    }


def fits(config: Config, shape: Shape, device: Device) -> bool:
    """Whether a process of this run has the memory that it needs."""
    return sum(memory(config, shape, device).values()) <= device.memory


def held_out_bytes(config: Config, shape: Shape) -> float:
    """Bytes of a held-out batch's logits and their log-softmax, both in float32.

    All tokens of few windows, or the masked ones of many. The scorecard has no more.
    """
    length, many = config.data.max_length, config.training.per_device_eval_batch_size
    few = max(1, min(many, LOGITS // (length * shape.vocab_size)))
    return max(few, many * config.masking.mask_ratio) * 8.0 * length * shape.vocab_size


def layer_bytes(config: Config, shape: Shape, on_card: bool) -> float:
    """Bytes a token and layer that autograd keeps for LoRA under scaled dot-product attention.

    Counted in what `torch.autograd.graph.saved_tensors_hooks` sees; a test compares.
    """
    (h, q, k, m), adapted = shape.widths(), targets(config.model)
    half = config.training.bf16 or config.training.fp16
    wide = len(adapted - {"o_proj", "down_proj"}) * h  # the hidden state, for each adapter
    dropped = wide + q * ("o_proj" in adapted) + m * ("down_proj" in adapted)
    inputs, masks = wide + q, dropped * (1 if on_card else 2 if half else 4)
    if config.model.lora_dropout == 0:  # LoRA shares its layer's input
        inputs, masks = 2 * h, 0
    if half:  # norms in float32
        return 4 * (2 * h + q + k) + 2 * (inputs + 4 * q + k + 4 * m) + masks
    return 4 * (2 * h + 3 * q + 3 * k + 4 * m + inputs) + masks


def target_fraction(config: Config) -> float:
    """Share of the tokens whose logits are needed."""
    masked = config.masking.mask_ratio
    return {"masked": masked, "mixed": (1 + masked) / 2}.get(config.training.objective, 1.0)


class Text(NamedTuple):
    """Training text of an epoch, at least and at most: the two are equal where it was counted."""

    tokens: Range
    windows: Range
    held_out: float  # windows that a measurement could take


def measured_text(config: Config, mixture: mixing.Mixture) -> Text:
    """Count the text of a mixture."""
    tokens, windows = mixture.report["tokens"].sum(), len(mixing.train_windows(mixture))
    drawn = mixing.held_out_windows(mixture, config.evaluation.max_documents, config.training.seed)
    return Text(np.full(2, tokens), np.full(2, windows), sum(map(len, drawn.values())))


def estimated_text(config: Config) -> Text:
    """Estimate it from the sizes of the novels' files, before they are read.

    Raises `DataError` where there is no novel.
    """
    data, files = config.data, mixing.find_texts(config)
    characters: dict[str, float] = {}  # by book; of three bytes each
    for file in {file.path: file for file in files if file.source == "wuxia"}.values():
        characters[file.book] = characters.get(file.book, 0) + mixing.utf8_size(file.path) / 3
    held_out = mixing.likely_share(characters, data.val_ratio, config.training.seed)
    general = data.general_ratio if any(file.source == "general" for file in files) else 0
    if not general:
        mixing.warn_without_general(config)
    size = 3 * sum(characters.values()) * (1 - held_out) / (1 - general)
    tokens = size / np.array((4.5, 3.65))  # bytes a token of novels under Qwen's tokenizer
    chapters = 2 * config.evaluation.max_documents * 4000  # tokens of 武侠 and general text
    return Text(tokens, tokens / data.max_length, chapters / data.max_length)


def save_steps(config: Config, windows: int, processes: int) -> int:
    """Give the steps between checkpoints: where none are set a tenth of the run, 500 at most."""
    tenth = np.ceil(mixing.run_steps(config, windows, processes) / 10)
    return config.training.save_steps or min(500, int(tenth))


def held_out_limits(config: Config, windows: float, processes: int) -> tuple[int, int]:
    """Count a run's measurements of held-out text, and the windows of a source that each may take.

    With these all of them take a tenth of the run at most, since a window, forward twice, costs no
    more than one that is trained on. Fewer than 64 would say little.
    """
    steps = mixing.run_steps(config, windows, processes)
    times = 1 + int(np.ceil(steps / config.training.eval_steps))  # the first before the run
    return times, max(64, int(0.05 * steps * effective_batch(config, processes) / times))


def token_costs(config: Config, shape: Shape) -> Range:
    """Operations of a token, and bytes moved beside the large products: of training, of measuring.

    (2, 2). Operations are 2 a weight and pass, in attention too, where a token sees half a window;
    backward is one pass, since the base's weights get no gradient; the head counts for target
    tokens. To measure, held-out text goes forward twice: with masks, and for all tokens. Bytes are
    those of elementwise operations, attention and the adapters' thin products in half precision, as
    counted on fake tensors; a test compares.
    """
    layers, h, dropped = shape.num_hidden_layers, shape.hidden_size, config.model.lora_dropout > 0
    ends = np.sum([shape.layers[name] for name in targets(config.model)], axis=0)
    widths = np.array((*shape.widths(), *ends))  # and the outputs and inputs of the adapted layers
    each = np.array(((68, 73, 53, 12, 12, 2), (210, 142, 112, 17, 9, 11)))  # forward, backward
    moved = layers * (each @ widths + 5 * dropped * ends[1])
    products = 2 * (shape.linear_parameters() + layers * config.data.max_length * widths[1])
    passes = np.array(((1 + config.training.gradient_checkpointing, 1), (2, 0)))
    asked = np.array(((target_fraction(config),), (1 + config.masking.mask_ratio,)))
    head = shape.vocab_size * np.array(((4 * h, 24), (2 * h, 18)))
    costs: Range = passes @ ((products, moved[0]), (products, moved[1])) + asked * head
    return costs


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
    parts, there = memory(config, shape, device), f"of {device.memory / GIB:.1f}"
    said = "fits" if fits(config, shape, device) else f"DOES NOT FIT; {LESS_MEMORY}"
    yield "GiB a process"
    yield from (f"  {part:44}{size / GIB:7.2f}" for part, size in parts.items())
    yield f"  {'in all':44}{sum(parts.values()) / GIB:7.2f} {there}: {said}"


def work_lines(config: Config, shape: Shape, device: Device, text: Text) -> Iterator[str]:
    """Write the text, the steps and the hours of a run, and what these cost."""
    training, batch = config.training, effective_batch(config, device.processes)
    steps = mixing.run_steps(config, text.windows, device.processes)
    source = "" if text.tokens[0] == text.tokens[1] else ", estimated from the files' sizes"
    yield f"an epoch: {span(text.tokens)} tokens, {span(text.windows)} windows{source}"
    yield f"the run: {span(steps)} steps of {batch} windows"
    if (training.warmup_steps or 0) > steps[1] / 5:
        warm = f"the warm-up takes {training.warmup_steps} steps"
        yield f"TOO LONG: {warm}, a fifth is enough; leave training.warmup_steps out"
    if np.isnan(device.rates).any() or not (training.bf16 or training.fp16):
        yield f"hours: {device.name} in this precision is not known; --plan --measure times it"
        return
    rates = device.rates * (1e12, 1e9)
    seconds = (token_costs(config, shape) / rates).sum(axis=1)  # of one process
    slowly = np.array((1, 1 / REACHED)) / 3600
    epoch = text.tokens * seconds[0] * slowly / device.processes
    run = steps * batch * epoch / text.windows
    times, most = held_out_limits(config, text.windows[1], device.processes)
    window = config.data.max_length * seconds[1] * slowly
    held_out = times * min(2 * most, text.held_out) * window / device.processes
    # By one process five such measurements of all that was drawn, and 2,400 tokens one by one, each
    # of which reads the weights.
    reading = 2400 * 2 * shape.parameters / rates[1] * slowly
    allowed = (config.evaluation.minutes or np.inf) / 60
    card = np.minimum(5 * text.held_out * window + reading, allowed)
    yield "hours, at all to {:.0%} of {:g} TFLOP/s and {:g} GB/s".format(REACHED, *device.rates)
    parts = {"an epoch": epoch, "the run": run, "the scorecard": card}
    parts[f"{times} measurements of held-out text"] = held_out
    yield from (f"  {part:44}{span(hours, 2)}" for part, hours in parts.items())
    if held_out[1] > run[1] / 10:
        yield "MUCH of it for held-out text; raise training.eval_steps"
    if price := (config.plan.price_per_hour or 0) * device.processes:
        yield f"all of it costs {span((run + held_out + card) * price, 1)}"


def span(ends: Range, digits: int = 0) -> str:
    """Write a range: "30 to 37", "1,000", "10.2 to 25.4"."""
    low, high = (f"{end:,.{digits}f}" for end in ends)
    return low if low == high else f"{low} to {high}"
