"""What a run needs, by arithmetic: memory, steps, hours, cost and disk. No weights are loaded."""

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from functools import cache, partial
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
from wuxia_core.run import FEWEST

Floats = npt.NDArray[np.float64]
GIB = 2**30  # bytes
# Bytes of a weight in a quantized linear layer; with 4 bits, 64 weights share a scale of 4 bytes.
WEIGHT_BYTES = {"8bit": 1.0, "4bit": 0.5 + 4 / 64}
# A row for each kind of GPU: GiB of memory, TFLOP/s of dense half-precision products with sums in
# float32, and GB/s of memory, by the makers' data sheets; whether it computes in bfloat16.
CARDS = pd.read_csv(Path(__file__).with_name("cards.csv"), index_col=0)
USABLE = 23.5 / 24  # share of a card's nominal memory; the rest is the driver's
REACHED = 0.6  # share of a card's rates that all operations together reach at least; assumed
LAYERS = set(LINEAR_LAYERS)  # names of the linear layers of a decoder layer
# Assumed work of the scorecard, done by one process: to measure all its held-out text 5 times, and
# to write 2,400 tokens one by one, each of which takes reading all weights once.
SCORECARD_MEASUREMENTS, SCORECARD_TOKENS = 5, 2400


class Shape(NamedTuple):
    """Sizes of a model whose decoder layers, all alike, have the linear layers `LAYERS`."""

    hidden_size: int  # this field and the next three have the names of transformers' configs
    vocab_size: int
    num_hidden_layers: int
    max_position_embeddings: int  # tokens that the model can read
    layers: dict[str, tuple[int, int]]  # name in LAYERS → number of outputs, and of inputs
    parameters: int  # all weights of the model, embedding and head among them

    def widths(self) -> tuple[int, int, int, int]:
        """Give four widths, numbers a token: of hidden state, all queries, all keys and MLP."""
        q, k, m = (self.layers[name][0] for name in ("q_proj", "k_proj", "up_proj"))
        return self.hidden_size, q, k, m

    def linear_parameters(self) -> int:
        """Count the weights of all linear layers but the head."""
        return self.num_hidden_layers * sum(out * into for out, into in self.layers.values())

    def adapter_parameters(self, config: ModelConfig) -> int:
        """Count the trained weights: LoRA's (r, in) and (out, r) a layer, the mask token's row."""
        out_and_in = sum(sum(self.layers[name]) for name in adapted_layers(config))
        return config.lora_r * self.num_hidden_layers * out_and_in + self.hidden_size


def qwen3(hidden: int, mlp: int, parameters: int, query: int = 4096, depth: int = 36) -> Shape:
    """Give the shape of a Qwen3 of 0.6 to 8 billion parameters.

    `query` is the width of all heads together; `parameters` counts weights, `depth` layers.
    """
    key, up = (1024, hidden), (mlp, hidden)  # 8 heads of keys, 128 wide each
    attention = {"q_proj": (query, hidden), "k_proj": key, "v_proj": key, "o_proj": (hidden, query)}
    inner = {"gate_proj": up, "up_proj": up, "down_proj": (hidden, mlp)}
    # 151,936 rows of the embedding, 40,960 tokens of context
    return Shape(hidden, 151_936, depth, 40_960, attention | inner, parameters)


SHIPPED = {  # the recipes' models, so that their plan needs no network and is quick
    "Qwen/Qwen3-8B": qwen3(4096, 12_288, 8_190_735_360),
    "Qwen/Qwen3-4B": qwen3(2560, 9728, 4_022_468_096),
    "Qwen/Qwen3-0.6B": qwen3(1024, 3072, 596_049_920, query=2048, depth=28),
}


def adapted_layers(config: ModelConfig) -> set[str]:
    """Give the names of the layers that get an adapter; not all need be in `LAYERS`."""
    names = config.lora_target_modules  # a list, or "all-linear"
    return LAYERS if names == "all-linear" else set(names)


def read_shape(config: ModelConfig) -> Shape | None:
    """Give the base's shape: from `SHIPPED`, unless a folder has its name, else from config.json.

    config.json is read in that folder, or from the Hugging Face hub or its cache. Returns None if
    it cannot be read, or the model's linear layers are not `LAYERS`. Qwen3-8B: 8.19 B parameters,
    6.95 B of them in linear layers; an adapter of rank 16 has 43.65 M.
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
        return None  # what is wrong is said later, when tokenizer and model are loaded


def shape_of(base: Any) -> Shape | None:
    """Give a transformers model's shape; None if its layers' matrices are not those of `LAYERS`."""
    # The matrices, by layer: "model.layers.0.mlp.up_proj.weight" is of up_proj.
    weights = [(name.split(".")[-2], w.shape) for name, w in base.named_parameters() if w.dim() > 1]
    layers = {name: (size[0], size[1]) for name, size in weights if name in LAYERS}
    others = len(weights) - len(LAYERS) * base.config.num_hidden_layers
    if layers.keys() != LAYERS or others > 2:  # 2: embedding, head; a mixture of experts has more
        return None
    sizes = {name: getattr(base.config, name) for name in Shape._fields[:4]}
    return Shape(**sizes, layers=layers, parameters=base.num_parameters())


class Device(NamedTuple):
    """What each process of a run computes on: a GPU, or the CPU that the processes share."""

    name: str
    processes: int  # of the whole run; on GPUs each has one
    memory: float  # bytes that a process can have
    rates: Floats  # (2,): TFLOP/s of products and GB/s of memory; NaN for one that is not known
    bf16: bool  # whether it computes in bfloat16
    on_card: bool  # whether it is a GPU


@cache
def machine_cards() -> list[tuple[str, int, bool]]:
    """List this machine's GPUs: of each the name, bytes of memory, whether it has bfloat16.

    Another process asks the driver, since asking takes memory of each GPU until the process ends.
    Raises `MachineError` if the GPUs do not answer.
    """
    if not torch.cuda.is_available():
        return []
    gpus = "map(c.get_device_properties, range(c.device_count()))"
    # bfloat16 came with compute capability 8.0
    code = f"import torch.cuda as c; print([(x.name, x.total_memory, x.major > 7) for x in {gpus}])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    if done.returncode:
        raise MachineError(f"the GPU does not answer; try nvidia-smi: {done.stderr[-200:].strip()}")
    return list(ast.literal_eval(done.stdout))


def this_device(config: Config, processes: int, machines: int = 1) -> Device:
    """Describe what each of a run's `processes` computes on: a GPU, or without any the CPU.

    The first `processes` GPUs are used. Of unequal ones the least memory and the lowest rates
    count, as each step waits for the slowest. On the CPU processes share memory equally.
    """
    cards = machine_cards()[:processes]
    if not cards:
        size = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        share = size * machines / processes  # `processes` on all machines
        return Device("process on the CPU", processes, share, np.full(2, np.nan), True, False)
    names, sizes, bf16 = zip(*cards, strict=True)
    rates = np.min([card_facts(config, name)[1:3] for name in names], axis=0)
    kinds = sorted({f"{name}, {size / GIB:.0f} GiB" for name, size, _ in cards})
    name = names[0] if len(kinds) == 1 else f"UNEQUAL ({'; '.join(kinds)}): the least counts"
    return Device(name, processes, min(sizes), rates, all(bf16), True)


def planned_device(config: Config, processes: int) -> Device:
    """Describe the GPU that `plan.card` names; raises `ConfigError` if its memory is unknown.

    A GPU that is not in `CARDS` counts as one with bfloat16, since `bool` of its NaN is true.
    """
    name = config.plan.card or "card"
    gib, *rates, bf16 = card_facts(config, name)
    if np.isnan(gib):
        known = f"known are {', '.join(CARDS.index)}"
        remedy = "give plan.card_gib, plan.card_tflops and plan.card_gbs"
        raise ConfigError(f"plan.card {name}: not known; {known}; of any other {remedy}")
    return Device(name, processes, USABLE * gib * GIB, np.array(rates), bool(bf16), True)


def card_facts(config: Config, name: str) -> list[float]:
    """Give GiB, TFLOP/s, GB/s and bf16 of the GPU `name`, as in `CARDS`; NaN for what is unknown.

    The first three come from the config's section plan if they are set there. Of the rows of
    `CARDS` whose words are all in `name`, the one with the longest name counts: "NVIDIA
    A100-SXM4-40GB", as torch calls it, is "A100 40GB" → 40, 312, 1555, True.
    """
    # torch's "RTX 4090 D" is "RTX 4090D" in CARDS
    words, plan = set(name.replace("-", " ").replace(" D", "D").split()), config.plan
    rows = [card for card in CARDS.index if words.issuperset(card.split())]
    unknown = not rows or "Laptop" in words  # slower than the card of the same name
    listed = [np.nan] * 4 if unknown else CARDS.loc[max(rows, key=len)]
    configured = (plan.card_gib, plan.card_tflops, plan.card_gbs, None)  # no key for bfloat16
    return [chosen or fact for chosen, fact in zip(configured, listed, strict=True)]


def memory(config: Config, shape: Shape, device: Device) -> dict[str, float]:
    """Forecast one process's peak memory in bytes: by name, the parts that add up to the peak."""
    training, bits = config.training, config.model.quantization
    precision = 2 if training.bf16 or training.fp16 else 4  # bytes a number
    linear, hidden = shape.linear_parameters(), shape.hidden_size
    # embedding, head and norms are never quantized
    weights = WEIGHT_BYTES.get(bits, precision) * linear + precision * (shape.parameters - linear)
    # in float32: a weight, its gradient, Adam's two moments, and DDP's copy of the gradient
    adapter = shape.adapter_parameters(config.model) * (20 if device.processes > 1 else 16)
    tokens = training.per_device_train_batch_size * config.data.max_length
    # The loss takes logits in float32, in whose place it puts the gradient. Those of half precision
    # or of a tied head are there twice; LOSS_LOGITS at a time have two more copies in float32.
    logits = target_fraction(config) * tokens * shape.vocab_size  # their number
    tied = shape.parameters - linear < 2 * shape.vocab_size * hidden  # too few weights for both
    logit_size = 6 if precision == 2 else 4 * (2 if tied else 1)  # bytes
    logit_bytes = logit_size * logits + 8 * min(logits, LOSS_LOGITS)
    # gradients: three of the MLP's width, and two of the hidden state in float32
    backward: float = tokens * (3 * precision * shape.layers["up_proj"][0] + 8 * hidden)
    kept, label = tokens * layer_bytes(config, shape, device.on_card), "all kept"  # in a layer
    if training.gradient_checkpointing:  # a layer's input is kept, the rest computed again
        backward, kept, label = kept + backward, tokens * hidden * precision, "checkpointed"
    activations = shape.num_hidden_layers * kept
    peaks = {"one layer's backward pass": backward, "logits and loss": logit_bytes}
    # a measurement keeps no activations: taken off here, since the sum of the parts has them
    peaks["held-out measurement"] = held_out_bytes(config, shape) - activations
    largest = max(peaks, key=lambda name: peaks[name])
    # On a GPU CUDA's own memory and fragmentation. On the CPU interpreter and libraries, and 0.65
    # of the weights once more, as measured.
    reserve = GIB if device.on_card else 0.7 * GIB + 0.65 * weights
    return {
        "weights" if bits == "none" else f"weights ({bits} linear layers)": weights,
        "adapter, gradients, optimizer": adapter,
        f"activations ({label})": activations,
        f"transient peak ({largest})": peaks[largest],
        "reserve": reserve,
    }


def fits(config: Config, shape: Shape, device: Device) -> bool:
    """Whether the memory that is forecast for a process is at most what it can have."""
    return sum(memory(config, shape, device).values()) <= device.memory


def held_out_bytes(config: Config, shape: Shape) -> float:
    """Forecast the bytes of a held-out batch's logits and their log-softmax, both in float32.

    A measurement scores the masked tokens of `training.per_device_eval_batch_size` windows at a
    time, then all tokens of as many windows or, if that is less, as many as `LOGITS` allows (one at
    least). The batch with more logits counts. The scorecard's batches respect `LOGITS` too.
    """
    length, batch = config.data.max_length, config.training.per_device_eval_batch_size
    full_windows = max(1, min(batch, LOGITS // (length * shape.vocab_size)))
    return max(full_windows, batch * config.masking.mask_ratio) * 8.0 * length * shape.vocab_size


def layer_bytes(config: Config, shape: Shape, on_card: bool) -> float:
    """Forecast the bytes that autograd keeps for each token in a decoder layer with LoRA.

    Counted with scaled dot-product attention in what `torch.autograd.graph.saved_tensors_hooks`
    sees; a test compares. h, q, k and m are the widths that `Shape.widths` gives.
    """
    (h, q, k, m), adapted = shape.widths(), adapted_layers(config.model)
    precision = 2 if config.training.bf16 or config.training.fp16 else 4  # bytes a number
    wide = len(adapted - {"o_proj", "down_proj"}) * h  # the hidden state, for each adapter
    dropped = wide + (q if "o_proj" in adapted else 0) + (m if "down_proj" in adapted else 0)
    # Dropout keeps a byte a number on a GPU; on a CPU the mask has the precision of its input.
    inputs, masks = wide + q, dropped * (1 if on_card else precision)
    if config.model.lora_dropout == 0:  # LoRA shares its layer's input
        inputs, masks = 2 * h, 0
    if precision == 2:  # norms in float32
        return 4 * (2 * h + q + k) + 2 * (inputs + 4 * q + k + 4 * m) + masks
    return 4 * (2 * h + 3 * q + 3 * k + 4 * m + inputs) + masks


def target_fraction(config: Config) -> float:
    """Give the share of the training tokens that are targets; only targets have logits."""
    masked = config.masking.mask_ratio
    return {"masked": masked, "mixed": (1 + masked) / 2}.get(config.training.objective, 1.0)


class Text(NamedTuple):
    """An epoch's training text, as ranges; their two ends are equal if it was counted."""

    tokens: Floats  # (2,): at least, at most
    windows: Floats  # (2,): at least, at most
    held_out: float  # windows of all sources that one measurement could take


def measured_text(config: Config, mixture: mixing.Mixture) -> Text:
    """Count a mixture's training tokens and windows, and the held-out windows to be measured."""
    tokens, windows = mixture.report["tokens"].sum(), len(mixing.train_windows(mixture))
    drawn = mixing.held_out_windows(mixture, config.evaluation.max_documents, config.training.seed)
    return Text(np.full(2, tokens), np.full(2, windows), sum(map(len, drawn.values())))


def estimated_text(config: Config) -> Text:
    """Estimate the text of a mixture from the sizes of the novels' files, before they are read.

    Raises `DataError` or `ConfigError`, as `mixing.find_texts` says, if texts are missing or short.
    """
    data, files = config.data, mixing.find_texts(config)
    # An archive is there for each of its members; it is counted once, under the last one's book.
    novels = {file.path: file for file in files if file.source == "wuxia"}
    characters: dict[str, float] = {}  # by book; Chinese takes three bytes a character in UTF-8
    repeated = 0.0  # characters of all books, each as often as it is trained on
    for path, file in novels.items():
        size = mixing.utf8_size(path) / 3  # characters
        characters[file.book] = characters.get(file.book, 0) + size
        repeated += size * data.weights.get(file.place.name, 1)
    held_out = mixing.likely_share(characters, data.val_ratio, config.training.seed)  # a share
    general = data.general_ratio if any(file.source == "general" for file in files) else 0  # share
    if not general:
        mixing.warn_without_general(config)
    overlap = data.max_length / (data.stride or data.max_length)  # windows that a token is in
    train_bytes = 3 * repeated * overlap * (1 - held_out) / (1 - general)
    tokens = train_bytes / np.array((4.5, 3.65))  # bytes of a token under Qwen's tokenizer
    held_out_tokens = 2 * config.evaluation.max_documents * 4000  # assumed, of both sources
    return Text(tokens, tokens / data.max_length, held_out_tokens / data.max_length)


def save_steps(config: Config, windows: int, processes: int) -> int:
    """Give the steps between checkpoints: the config's, else a tenth of the run, 500 at most."""
    tenth = np.ceil(mixing.run_steps(config, windows, processes) / 10)  # of the run, in steps
    return config.training.save_steps or min(500, int(tenth))


def held_out_limits(config: Config, windows: float, processes: int) -> tuple[int, int]:
    """Count a run's measurements of held-out text, and the windows of a source that each may take.

    All measurements together may take of each source 5 % as many windows as the run trains on.
    Measuring a window goes forward twice, which costs no more than training on it, so two sources
    cost a tenth of the run at most. But a measurement may always take 64 windows of a source, since
    fewer say little. `windows` is the number of training windows in an epoch.
    """
    steps = mixing.run_steps(config, windows, processes)  # of the whole run
    count = 1 + int(np.ceil(steps / config.training.eval_steps))  # one is made before the run
    return count, max(64, int(0.05 * steps * effective_batch(config, processes) / count))


def token_costs(config: Config, shape: Shape) -> Floats:
    """Count a token's operations, and the bytes it moves beside the large products: (2, 2).

    The rows are training and measuring held-out text, the columns operations and bytes. A pass
    takes 2 operations a weight, and in attention 2 for each number in the keys and the values that
    a token sees, on average those of half a window. Backward counts as one pass, since the base's
    weights get no gradient; the head counts for targets. Measuring goes forward twice: with masks,
    and for all tokens. Bytes are those of elementwise operations, attention and the
    adapters' thin products in half precision, as counted on fake tensors; a test compares.
    """
    layers, h = shape.num_hidden_layers, shape.hidden_size
    adapted = [shape.layers[name] for name in adapted_layers(config.model)]
    widths = np.array((*shape.widths(), *np.sum(adapted, axis=0)))  # h, q, k, m, outputs, inputs
    # bytes for each unit of these widths; a row forward, a row backward
    width_bytes = np.array(((68, 73, 53, 12, 12, 2), (210, 142, 112, 17, 9, 11)))
    dropout_bytes = 5 if config.model.lora_dropout > 0 else 0  # for each unit of inputs
    moved = layers * (width_bytes @ widths + dropout_bytes * widths[5])
    products = 2 * (shape.linear_parameters() + layers * config.data.max_length * widths[1])
    # The first row is for training, the second for measuring. Passes forward and backward, for
    # training one more forward if activations are computed again:
    passes = np.array(((2 if config.training.gradient_checkpointing else 1, 1), (2, 0)))
    # target tokens for each token:
    targets = np.array(((target_fraction(config),), (1 + config.masking.mask_ratio,)))
    head = shape.vocab_size * np.array(((4 * h, 24), (2 * h, 18)))  # of a target, in all passes
    return np.asarray(passes @ ((products, moved[0]), (products, moved[1])) + targets * head)


def checkpoint_bytes(config: Config, shape: Shape) -> float:
    """Forecast the bytes on disk of the checkpoints kept, one being written, and the adapter."""
    # A checkpoint has of each trained weight 12 bytes, itself and Adam's two moments in float32.
    weight_bytes = 12 * (max(config.training.save_total_limit, FEWEST) + 1) + 4
    return weight_bytes * shape.adapter_parameters(config.model)


def describe_plan(config: Config, shape: Shape | None, device: Device, text: Text) -> str:
    """Say in lines what a run takes in memory, time and disk; or that `shape` is not known."""
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
    """Yield lines on a process's memory: parts, sum and, if that is too much, what saves some."""
    parts, limit = memory(config, shape, device), f"of {device.memory / GIB:.1f}"
    verdict = "fits" if fits(config, shape, device) else f"DOES NOT FIT; {LESS_MEMORY}"
    yield "GiB a process"
    yield from (f"  {part:44}{size / GIB:7.2f}" for part, size in parts.items())
    yield f"  {'in all':44}{sum(parts.values()) / GIB:7.2f} {limit}: {verdict}"


def work_lines(config: Config, shape: Shape, device: Device, text: Text) -> Iterator[str]:
    """Yield lines: an epoch's text, the run's steps, its hours, and what these cost.

    Hours and cost are left out if the device's rates are not known, or the run is in float32.
    """
    training, batch = config.training, effective_batch(config, device.processes)
    steps = mixing.run_steps(config, text.windows, device.processes)  # of the run, (2,)
    origin = "" if text.tokens[0] == text.tokens[1] else ", estimated from the files' sizes"
    yield f"an epoch: {as_text(text.tokens)} tokens, {as_text(text.windows)} windows{origin}"
    yield f"the run: {as_text(steps)} steps of {batch} windows"
    if (training.warmup_steps or 0) > steps[1] / 5:
        warm = f"the warm-up takes {training.warmup_steps} steps"
        yield f"TOO LONG: {warm}, a fifth is enough; leave training.warmup_steps out"
    if np.isnan(device.rates).any() or not (training.bf16 or training.fp16):
        yield f"hours: {device.name} in this precision is not known; --plan --measure times it"
        return
    yield "hours, at 100% to {:.0%} of {:g} TFLOP/s and {:g} GB/s".format(REACHED, *device.rates)
    parts = run_hours(config, shape, device, text)
    yield from (f"  {part:44}{as_text(hours, 2)}" for part, hours in parts.items())
    _, run, scorecard, measurements = parts.values()  # hours, least and most
    if measurements[1] > run[1] / 10:
        yield "MUCH of it for held-out text; raise training.eval_steps"
    if price := (config.plan.price_per_hour or 0) * device.processes:
        yield f"all of it costs {as_text((run + measurements + scorecard) * price, 1)}"


def run_hours(config: Config, shape: Shape, device: Device, text: Text) -> dict[str, Floats]:
    """Forecast hours: of an epoch, the run, the scorecard, and the run's held-out measurements.

    Returns ranges by name, (2,): the first end is for the fewest tokens at the device's full rates,
    which must be known, the second for the most tokens at `REACHED` of these rates.
    """
    rates, processes = device.rates * (1e12, 1e9), device.processes  # operations, bytes a second
    hours_a_second = np.array((1, 1 / REACHED)) / 3600  # at the full rates, at `REACHED` of them
    # Seconds a token: products and traffic of memory come one after the other.
    training, measuring = (token_costs(config, shape) / rates).sum(axis=1)
    epoch = text.tokens * training * hours_a_second / processes  # hours, (2,)
    read = mixing.run_steps(config, text.windows, processes) * effective_batch(config, processes)
    run = read * epoch / text.windows  # windows read, over those of an epoch
    count, source_limit = held_out_limits(config, text.windows[1], processes)  # limit: windows
    window_hours = config.data.max_length * measuring * hours_a_second  # one held out, one process
    windows = min(2 * source_limit, text.held_out)  # of both sources, of a measurement
    measurements = count * windows * window_hours / processes
    reading = 2 * shape.parameters / rates[1] * hours_a_second  # of all weights, once
    scorecard = SCORECARD_MEASUREMENTS * text.held_out * window_hours + SCORECARD_TOKENS * reading
    # `evaluate` stops after a tenth of the training, with its measurements: 6 minutes an hour.
    default = np.maximum(config.evaluation.FEWEST_MINUTES, 6 * (run + measurements))  # minutes
    limit = (config.evaluation.minutes or default) / 60
    parts = {"an epoch": epoch, "the run": run, "the scorecard": np.minimum(scorecard, limit)}
    return parts | {f"{count} measurements of held-out text": measurements}


def as_text(bounds: Floats, digits: int = 0) -> str:
    """Give a range, (2,), as text with `digits` decimals: "30 to 37", or "30" if both read so."""
    low, high = (f"{bound:,.{digits}f}" for bound in bounds)
    return low if low == high else f"{low} to {high}"
