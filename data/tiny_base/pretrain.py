r"""Pretrain a tiny Qwen3-architecture model from nothing, on a folder of .txt files.

    python data/tiny_base/pretrain.py texts tiny --exclude zhwiki_cmrc2018_trial 三侠五义 \
        七剑十三侠 续小五义 绿牡丹                             # the recipe
    python data/tiny_base/pretrain.py few_texts trial --steps 6 --save-every 3   # seconds, to look

With the texts that README.md lists in `texts`, the first command is the recipe of the bundled
model: 7,677 steps of 16 x 256 tokens, 75 minutes on two CPU cores. The bundled weights were made by
an earlier version of this script, which also drew modern prose less often (60 %): the same recipe
gives a model like them, not the same numbers.

The same command again goes on from the newest checkpoint in OUT_FOLDER/checkpoints; delete that
folder to start over. One process, one device. It does not evaluate, and it knows nothing of masks.
"""

import argparse
import logging
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
    set_seed,
)

from wuxia_core.corpus import clean, read_book
from wuxia_core.errors import ConfigError, DataError, exit_status, run_command

log = logging.getLogger("pretrain")

ARCHITECTURE = Path(__file__).parent  # its config.json: every size of the model
END, MASK = "<|endoftext|>", "<|mask|>"  # ids 0 and 1
TOKENS = 8190  # two fewer than vocab_size, so that two rows of the embedding stay spare
PIECES = (  # Qwen2's pre-tokenization: a merge stays within a run of letters or of signs
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def read_texts(folder: Path, exclude: list[str]) -> list[str]:
    """Read and clean every .txt below a folder but those whose stem is excluded.

    Raises
    ------
    DataError
        Where the folder is missing, holds no text, or has no file of an excluded name: a name
        misspelt would train on what was to be held out.
    """
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; put .txt files there")
    files = sorted(path for path in folder.rglob("*.txt") if path.is_file())
    unknown = set(exclude) - {path.stem for path in files}
    if unknown:
        raise DataError(f"--exclude {' '.join(sorted(unknown))}: no such .txt file in {folder}")
    kept = [path for path in files if path.stem not in exclude]
    texts = [clean(read_book(path).text) for path in tqdm(kept, desc="reading", unit="file")]
    log.info("%d files, %s characters", len(kept), f"{sum(map(len, texts)):,}")
    if not any(texts):
        raise DataError(f"{folder}: no text in its {len(kept)} .txt files; put some there")
    return texts


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


def encode(texts: list[str], tokenizer: PreTrainedTokenizerFast) -> npt.NDArray[np.int32]:
    """Join all texts to one stream, (N,) int32, each behind one end-of-text token."""
    parts = []
    for text in tqdm(texts, desc="encoding", unit="text"):
        ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids
        parts.append(np.array([tokenizer.eos_token_id, *ids], np.int32))
    return np.concatenate(parts)


def cut_windows(stream: npt.NDArray[np.int32], window: int) -> list[dict[str, torch.Tensor]]:
    """Cut (N,) tokens into N // window rows of (window,) int64; the model shifts the labels.

    Raises
    ------
    DataError
        Where the stream does not fill one window.
    """
    count = len(stream) // window
    if not count:
        raise DataError(f"the texts are {len(stream)} tokens, under one window of {window}")
    rows = torch.from_numpy(stream[: count * window].astype(np.int64)).view(count, window)
    return [{"input_ids": row, "labels": row} for row in rows]


def newest_checkpoint(folder: Path) -> str | None:
    """Name the newest whole checkpoint; `trainer_state.json` is the last file of each."""
    whole = [path.parent for path in folder.glob("checkpoint-*/trainer_state.json")]
    return str(max(whole, key=lambda path: int(path.name.split("-")[1]))) if whole else None


def arguments(options: argparse.Namespace) -> TrainingArguments:
    """Translate the command line for `Trainer`."""
    return TrainingArguments(
        output_dir=str(options.out_folder / "checkpoints"),
        max_steps=options.steps,
        per_device_train_batch_size=options.batch,
        learning_rate=options.lr,
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr_rate": 0.03},
        warmup_steps=0.02,  # share of all steps
        weight_decay=0.1,
        adam_beta2=0.95,
        seed=options.seed,  # orders the windows too, anew each pass; a resumed run goes on in it
        save_steps=options.save_every,
        save_total_limit=2,
        logging_steps=min(50, options.save_every),
        report_to="none",
        use_cpu=not torch.cuda.is_available(),
    )


def pretrain(options: argparse.Namespace) -> None:
    """Train, from the newest checkpoint if there is one, and save weights in bfloat16."""
    out, checkpoints = options.out_folder, options.out_folder / "checkpoints"
    if out.is_file() or (any(out.glob("*.safetensors")) and not checkpoints.is_dir()):
        raise ConfigError(f"{out}: a file, or holds another model; choose another OUT_FOLDER")
    texts = read_texts(options.text_folder, options.exclude)
    known = (out / "tokenizer.json").is_file()
    tokenizer = AutoTokenizer.from_pretrained(out) if known else train_tokenizer(texts)
    windows = cut_windows(encode(texts, tokenizer), options.window)
    passes = options.steps * options.batch / len(windows)
    log.info("%s windows, each seen about %.1f times", f"{len(windows):,}", passes)
    tokenizer.save_pretrained(out)
    set_seed(options.seed)
    config = AutoConfig.from_pretrained(ARCHITECTURE)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    resume = newest_checkpoint(checkpoints)
    log.info("starting from %s", resume or "nothing")
    Trainer(model=model, args=arguments(options), train_dataset=windows).train(resume)
    model.to(torch.bfloat16).save_pretrained(out)
    print(f"model and tokenizer  {out}")


def parse(given: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("text_folder", type=Path, help="its .txt files, subfolders too")
    parser.add_argument("out_folder", type=Path, help="model, tokenizer and checkpoints")
    parser.add_argument("--steps", type=int, default=7677)
    parser.add_argument("--batch", type=int, default=16, help="windows a step")
    parser.add_argument("--window", type=int, default=256, help="tokens")
    parser.add_argument("--lr", type=float, default=2e-3, help="peak; it decays to 3 %% of that")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save-every", type=int, default=500, help="steps")
    parser.add_argument("--exclude", nargs="+", default=[], metavar="NAME", help="stems")
    options = parser.parse_args(given)
    for name in ("steps", "batch", "window", "lr", "save_every"):
        if getattr(options, name) <= 0:
            parser.error(f"--{name.replace('_', '-')} {getattr(options, name)}: must be above 0")
    return options


def main(given: list[str] | None = None) -> int:
    """Pretrain; a user's mistake gets one line, never a traceback."""
    options = parse(given)
    return exit_status(lambda: pretrain(options))


if __name__ == "__main__":
    run_command(main)
