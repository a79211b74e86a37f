"""Pretrain a small Qwen3 from nothing, on a folder of novels and other text, on a card or a CPU.

    python data/tiny_base/pretrain.py texts base                 # the recipe, on a card in bfloat16
    OMP_WAIT_POLICY=PASSIVE nice -n 19 python data/tiny_base/pretrain.py texts base   # on a CPU
    python data/tiny_base/pretrain.py few_texts trial --tokens 4000 --every 2 --batch 2    # to look

OUT_FOLDER holds the weights, in bfloat16, that predicted held-out chapters best so far, and
pretrain.jsonl what was measured. A signal that asks for a stop is heeded at the end of a step. The
same command again goes on from OUT_FOLDER/checkpoints (delete them to start over); on a CPU it ends
with the same weights as without the interruption. One process, one device; no masks.

The model has 11.0 M parameters, 22 MB. Qwen3 has dropout in attention alone: here what attention
and MLP add to a layer is dropped in part too, by hooks that leave nothing in the weights.
"""

import argparse
import copy
import functools
import json
import logging
import math
import signal
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from wuxia_core.corpus import Document, FileReport, find_files, read_documents
from wuxia_core.errors import (
    ConfigError,
    DataError,
    Stopped,
    exit_status,
    heeded_signals,
    run_command,
)
from wuxia_core.mixing import hash_key

log = logging.getLogger("pretrain")

SHAPE = Qwen3Config(
    hidden_size=384, num_hidden_layers=5, intermediate_size=1024, num_attention_heads=6,
    num_key_value_heads=2, head_dim=64, vocab_size=8192, max_position_embeddings=2048,
    tie_word_embeddings=True, bos_token_id=0, eos_token_id=0, pad_token_id=0,
)  # fmt: skip
END, MASK = "<|endoftext|>", "<|mask|>"  # ids 0 and 1
TOKENS = SHAPE.vocab_size - 2  # so that two rows of the embedding stay spare
PIECES = (  # Qwen2's pre-tokenization: a merge stays within a run of letters or of signs
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
HELD_OUT = 0.01  # of the characters, by whole chapters
MEASURED = 512  # windows of them, spread evenly
WARM_UP, LAST_RATE = 0.02, 0.03  # shares of all steps, of the peak
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@dataclass
class Progress:
    """How far a training is."""

    step: int = 0
    best: float = math.inf  # bits a character of the held-out chapters
    unimproved: int = 0  # measurements since then


def read_texts(folder: Path, exclude: list[str]) -> list[Document]:
    """Read and clean every book below a folder but those of an excluded name, by chapters.

    Raises
    ------
    DataError
        Where the folder is missing, holds no two chapters, or no book of an excluded name: a
        name misspelt would train on what was to be left out.
    """
    files = find_files(folder, None)
    if unknown := set(exclude) - {file.book for file in files}:
        raise DataError(f"--exclude {' '.join(sorted(unknown))}: no such book in {folder}")
    reports = [FileReport(file) for file in files if file.book not in exclude]
    documents = [d for report in tqdm(reports, "reading") for d in read_documents(report)]
    log.info("%d books, %s characters", len(reports), f"{sum(len(d.text) for d in documents):,}")
    if len(documents) < 2:
        raise DataError(f"{folder}: needs two chapters, since one is held out; add some text")
    return documents


def hold_out(documents: list[Document], seed: int) -> tuple[list[str], list[str]]:
    """Split off whole chapters of about `HELD_OUT` of the characters; give all others first."""
    shuffled = sorted(documents, key=lambda d: hash_key(seed, d.book, d.chapter))
    ends = np.cumsum([len(document.text) for document in shuffled])
    first = int(np.searchsorted(ends, HELD_OUT * ends[-1])) + 1
    texts = [document.text for document in shuffled]
    return texts[first:], texts[:first]


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE of 8,190 tokens, fewer where the texts are too short for them."""
    bpe = Tokenizer(models.BPE())
    bpe.normalizer = normalizers.NFC()
    letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    split = pre_tokenizers.Split(Regex(PIECES), "isolated")
    bpe.pre_tokenizer = pre_tokenizers.Sequence([split, letters])
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=TOKENS,
        special_tokens=[END, MASK],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),  # every byte: nothing is unknown
    )
    bpe.train_from_iterator(texts, trainer, length=len(texts))
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token=END, pad_token=END, mask_token=MASK
    )


def encode(texts: list[str], tokenizer: PreTrainedTokenizerFast) -> torch.Tensor:
    """Join all texts to one stream, (N,) int32, each behind one end-of-text token."""
    parts = []
    for text in tqdm(texts, "encoding"):
        ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids
        parts.append(np.array([tokenizer.eos_token_id, *ids], np.int32))
    return torch.from_numpy(np.concatenate(parts))


def prepare(options: argparse.Namespace, kept: Path) -> dict[str, Any]:
    """Read what is trained on and what is held out, train the tokenizer, and keep all that.

    Gives the streams `train` (N,) and `held_out` (M,), int32, and `per_char`, tokens a character.

    Raises
    ------
    DataError
        Where there is no text, or less than a batch of it.
    """
    if not kept.is_file():
        documents = read_texts(options.text_folder, options.exclude)
        texts, others = hold_out(documents, options.seed)
        tokenizer = train_tokenizer(texts)
        tokenizer.save_pretrained(options.out_folder)
        streams = {"train": encode(texts, tokenizer), "held_out": encode(others, tokenizer)}
        per_char = len(streams["held_out"]) / sum(map(len, others))
        kept.parent.mkdir(exist_ok=True)
        write(streams | {"per_char": per_char}, kept)
    data: dict[str, Any] = torch.load(kept, weights_only=True)
    length, needed = len(data["train"]), (options.batch + 2) * options.window
    if length < needed:
        raise DataError(f"the texts are {length} tokens, under {needed}: lower --batch or --window")
    return data


def write(what: dict[str, Any], path: Path) -> None:
    """Write a file whole or not at all."""
    torch.save(what, path.with_suffix(".part"))
    path.with_suffix(".part").replace(path)


@functools.lru_cache(maxsize=1)
def order(windows: int, seed: int, turn: int) -> torch.Tensor:
    """Shuffle the windows of a pass, (windows,) int64."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + turn)
    return torch.randperm(windows, generator=generator).to(DEVICE)


def batch(tokens: torch.Tensor, step: int, options: argparse.Namespace) -> torch.Tensor:
    """Give a step's rows, (B, T + 1) int64; windows begin elsewhere in each pass."""
    size, length = options.batch, options.window
    windows = len(tokens) // length - 2
    turn, place = divmod(step, windows // size)
    shift = turn * 97 % length
    begin = order(windows, options.seed, turn)[place * size :][:size, None] * length + shift
    return tokens[begin + torch.arange(length + 1, device=DEVICE)].long()


def build(options: argparse.Namespace) -> Any:
    """Make the untrained model, float32, with the dropout that Qwen3 has not."""
    torch.manual_seed(options.seed)
    model = Qwen3ForCausalLM(SHAPE).to(DEVICE)
    for layer in model.model.layers:
        for part in (layer.self_attn, layer.mlp):
            part.register_forward_hook(functools.partial(drop, options.dropout))
    return model


def drop(share: float, module: Any, _: Any, output: Any) -> Any:
    """Drop a share of what a part of a layer adds; attention gives its weights beside it."""
    if isinstance(output, tuple):
        return (F.dropout(output[0], share, module.training), *output[1:])
    return F.dropout(output, share, module.training)


def cross_entropy(model: Any, rows: torch.Tensor) -> torch.Tensor:
    """Mean nats a token of rows, (B, T + 1); in bfloat16 on a card."""
    with torch.autocast(DEVICE, torch.bfloat16, enabled=DEVICE == "cuda"):
        # No mask: attention is causal without one. By default a compiled model makes one.
        causal = {"full_attention": None}
        logits = model(input_ids=rows[:, :-1], attention_mask=causal, use_cache=False).logits
    return F.cross_entropy(logits.flatten(0, 1).float(), rows[:, 1:].flatten())


def rate(done: float) -> float:
    """Share of the peak rate, by the share of the steps done: a ramp, then a cosine to 3 %."""
    cosine = LAST_RATE + (1 - LAST_RATE) * (1 + math.cos(math.pi * done)) / 2
    return min(cosine, max(done, 1e-6) / WARM_UP)


class Pretraining:
    """Model, optimizer and how far they are, from the checkpoint where there is one."""

    def __init__(self, options: argparse.Namespace, data: dict[str, Any]) -> None:
        self.options, self.progress = options, Progress()
        self.data = {name: torch.as_tensor(part, device=DEVICE) for name, part in data.items()}
        self.steps = math.ceil(options.tokens / (options.batch * options.window))
        self.newest = options.out_folder / "checkpoints" / "newest.pt"
        self.model = build(options)
        self.loss = torch.compile(cross_entropy) if options.compile else cross_entropy
        weights = list(self.model.parameters())
        matrices = {"params": [w for w in weights if w.dim() > 1], "weight_decay": 0.1}
        norms = {"params": [w for w in weights if w.dim() == 1], "weight_decay": 0.0}
        self.optimizer = torch.optim.AdamW([matrices, norms], betas=(0.9, 0.95), fused=True)
        if self.newest.is_file():
            saved = torch.load(self.newest, map_location=DEVICE, weights_only=True)
            self.model.load_state_dict(saved["model"])
            self.optimizer.load_state_dict(saved["optimizer"])
            self.progress = Progress(**saved["progress"])

    def done(self) -> bool:
        """Whether the tokens are spent, or nothing has got better for long."""
        return self.progress.step >= self.steps or self.progress.unimproved >= self.options.patience

    def step(self) -> torch.Tensor:
        """Train on a batch, which depends on (seed, step) alone, as dropout does."""
        step, options = self.progress.step, self.options
        torch.manual_seed(options.seed * 1_000_003 + step)
        for group in self.optimizer.param_groups:
            group["lr"] = options.lr * rate(step / self.steps)
        loss = self.loss(self.model, batch(self.data["train"], step, options))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.progress.step += 1
        return loss.detach()

    @torch.no_grad()
    def measure(self) -> float:
        """Bits a character of the held-out chapters, by windows that do not overlap."""
        tokens = self.data["held_out"]
        size = min(self.options.window, len(tokens) - 1)
        rows = tokens.unfold(0, size + 1, size)
        parts = rows[:: -(-len(rows) // MEASURED)].long().split(self.options.batch)
        self.model.eval()
        nats = [float(self.loss(self.model, part)) * len(part) for part in parts]
        self.model.train()
        return sum(nats) / sum(map(len, parts)) / math.log(2) * float(self.data["per_char"])

    def run(self) -> None:
        """Train until it is done; `Stopped` where a signal asks for it, with all steps kept."""
        asked: list[int] = []
        for number in heeded_signals():
            signal.signal(number, lambda number, _: asked.append(number))
        progress, losses, began = self.progress, [], time.monotonic()
        bar = tqdm(total=self.steps, initial=progress.step)
        while not self.done():
            losses.append(self.step())
            bar.update()
            if due := progress.step % self.options.every == 0 or progress.step == self.steps:
                self.note(float(torch.stack(losses).mean()), len(losses), began)
                losses, began = [], time.monotonic()
            if due or asked:
                self.save()
            if asked:
                raise Stopped(f"by a signal at step {progress.step}; the same command goes on")

    def note(self, loss: float, steps: int, began: float) -> None:
        """Measure and log; write the weights where they are the best so far."""
        progress, options = self.progress, self.options
        speed = steps * options.batch * options.window / (time.monotonic() - began)
        bits = self.measure()
        progress.unimproved += 1
        if bits < progress.best:
            progress.best, progress.unimproved = bits, 0
            copy.deepcopy(self.model).to(torch.bfloat16).save_pretrained(options.out_folder)
        tokens = progress.step * options.batch * options.window
        row = {
            "step": progress.step,
            "tokens": tokens,
            "passes": tokens / len(self.data["train"]),
            "loss": loss,
            "held_out_bits_per_char": bits,
            "tokens_per_second": speed,
        }
        log.info(", ".join(f"{name} {value:,.4g}" for name, value in row.items()))
        with (options.out_folder / "pretrain.jsonl").open("a", encoding="utf-8") as file:
            print(json.dumps(row), file=file)

    def save(self) -> None:
        """Write what the training goes on from, whole or not at all."""
        parts = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        write(parts | {"progress": asdict(self.progress)}, self.newest)


def pretrain(options: argparse.Namespace) -> None:
    """Train, from the checkpoint if there is one, until it is done or a signal comes."""
    out, checkpoints = options.out_folder, options.out_folder / "checkpoints"
    if out.is_file() or (any(out.glob("*.safetensors")) and not checkpoints.is_dir()):
        raise ConfigError(f"{out}: a file, or holds another model; choose another OUT_FOLDER")
    Pretraining(options, prepare(options, checkpoints / "tokens.pt")).run()
    print(f"model and tokenizer  {out}")


def parse(given: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("text_folder", type=Path, help="its novels and texts, subfolders too")
    parser.add_argument("out_folder", type=Path, help="model, tokenizer and checkpoints")
    parser.add_argument("--tokens", type=float, default=150e6, help="to train on, %(default)g")
    parser.add_argument("--batch", type=int, default=64, help="windows a step")
    parser.add_argument("--window", type=int, default=256, help="tokens")
    parser.add_argument("--lr", type=float, default=3e-3, help="peak; it decays to 3 %% of that")
    parser.add_argument("--dropout", type=float, default=0.1, help="share")
    parser.add_argument("--seed", type=int, default=0)
    every = 500 if DEVICE == "cuda" else 100
    parser.add_argument("--every", type=int, default=every, help="steps between measurements")
    parser.add_argument("--patience", type=int, default=10, help="measurements without a gain")
    parser.add_argument("--exclude", nargs="+", default=[], metavar="BOOK", help="left out")
    parser.add_argument(
        "--compile", action=argparse.BooleanOptionalAction, default=DEVICE == "cuda"
    )
    options = parser.parse_args(given)
    for name in ("tokens", "batch", "window", "lr", "every", "patience"):
        if not 0 < getattr(options, name) < math.inf:
            parser.error(f"--{name} {getattr(options, name)}: must be above 0, and a number")
    if not 0 <= options.dropout < 1:
        parser.error(f"--dropout {options.dropout}: must be a share below 1")
    return options


def main(given: list[str] | None = None) -> int:
    """Pretrain; a user's mistake gets one line, never a traceback."""
    options = parse(given)
    return exit_status(lambda: pretrain(options))


if __name__ == "__main__":
    run_command(main)
