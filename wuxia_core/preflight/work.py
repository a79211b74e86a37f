"""How much work a run is: text, steps, operations, disk, and the rates that cards have."""

import time
from dataclasses import dataclass

import numpy as np

from wuxia_core import corpus
from wuxia_core.config import Config, locate
from wuxia_core.mixing import Mixture, train_windows
from wuxia_core.preflight.memory import asked_share
from wuxia_core.preflight.shape import Shape

# GiB of memory and TFLOP/s of dense bf16 products, as the makers' data sheets have them.
CARDS = {
    "RTX 3090": (24, 71), "RTX 4090": (24, 165), "RTX 5090": (32, 210), "RTX A6000": (48, 155),
    "L40S": (48, 362), "A100": (80, 312), "H100": (80, 989), "H200": (141, 989),
}  # fmt: skip
CARD_SHARES = (0.8, 0.4)  # of that rate: the best that is published for LoRA, and half of it
CPU_SHARES = (0.6, 0.1)  # of a large product's rate; the smaller the model, the less
BYTES_A_TOKEN = (3.65, 4.5)  # UTF-8, of novels under Qwen's tokenizer


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
    novels = sum(file.path.stat().st_size for file in files if file.source == "wuxia")
    size = novels * (1 - config.data.val_ratio) / (1 - config.data.general_ratio)
    few, many = (size / width for width in BYTES_A_TOKEN[::-1])
    length = config.data.max_length
    return Text((few, many), (few / length, many / length), measured=False)


def steps(config: Config, text: Text, effective_batch: int) -> tuple[int, int]:
    """Optimizer steps of the run, at least and at most."""
    if config.training.max_steps > 0:
        return config.training.max_steps, config.training.max_steps
    epochs = config.training.num_train_epochs
    few, many = (int(-(-n // effective_batch) * epochs) for n in text.windows)
    return few, many


def flop_per_token(config: Config, shape: Shape) -> float:
    """Floating-point operations that training spends on a token.

    2 a weight forward and 2 backward, since the base's weights get no gradient; 2 more where the
    forward pass is done again; the head only for the tokens that are asked for.
    """
    passes = 6.0 if config.training.gradient_checkpointing else 4.0
    return passes * shape.linear_parameters + 4 * asked_share(config) * shape.head_parameters


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


def known_card(name: str) -> tuple[float, float] | None:
    """Memory in GiB and bf16 rate in TFLOP/s of a card, by a part of its name."""
    return next((CARDS[card] for card in CARDS if card.lower() in name.lower()), None)
