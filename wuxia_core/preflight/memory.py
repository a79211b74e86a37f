"""Memory a process needs, by part: arithmetic, before anything is loaded."""

from collections.abc import Iterator
from dataclasses import dataclass

from wuxia_core.config import Config
from wuxia_core.preflight.shape import Shape

GIB = 2**30
WEIGHT_BYTES = {"8bit": 1.0, "4bit": 0.5625}  # of a linear layer; 4 bits and a scale for each 64
TRAINED_BYTES = 16  # of an adapter's weight, in float32: itself, its gradient, Adam's two moments
BUCKET_BYTES = 4  # of an adapter's weight, where DDP has a copy of the gradients
LOGIT_BYTES = 12  # of a logit: itself, in float32 after the softmax, its gradient
CARD_RESERVE = 1.0 * GIB  # CUDA's own, and what the allocator holds in pieces
PROCESS_RESERVE = 0.7 * GIB  # interpreter, libraries and vocabulary of a process on a CPU
CPU_SURPLUS = 0.65  # of the weights, which a process on a CPU was measured to take besides


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
    logits = asked_share(config) * tokens * shape.vocab * LOGIT_BYTES
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


def asked_share(config: Config) -> float:
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
