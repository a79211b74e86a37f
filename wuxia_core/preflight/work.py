"""How much work a run is: text, steps, operations, disk, and the rates that cards have."""

import codecs
import math
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from wuxia_core import corpus
from wuxia_core.config import Config, locate
from wuxia_core.mixing import Mixture, train_windows
from wuxia_core.preflight.memory import asked_share
from wuxia_core.preflight.shape import Shape

# GiB of memory and TFLOP/s of dense bf16 products, as the makers' data sheets have them.
CARDS = {
    "RTX 3090": (24, 71), "RTX 4090": (24, 165), "RTX 5090": (32, 210), "RTX A6000": (48, 155),
    "L40S": (48, 362), "A100 40GB": (40, 312), "A100 80GB": (80, 312), "H100": (80, 989),
    "H200": (141, 989),
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
