"""The base model, its tokenizer and its mask token."""

import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from safetensors import SafetensorError

from wuxia_core.config import Config, locate
from wuxia_core.errors import ConfigError, MachineError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

log = logging.getLogger(__name__)

MASK_TOKEN = "<|mask|>"
DOCUMENT_START = "<|endoftext|>"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt",
                   "special_tokens_map.json", "added_tokens.json", "tokenizer.model",
                   "vocab.txt", "spiece.model")  # fmt: skip
Loaded = TypeVar("Loaded")


def load_tokenizer(name: str) -> "PreTrainedTokenizerBase":
    """Load a fast tokenizer from a folder or the hub.

    Raises `MachineError` where the folder is missing and the hub cannot be reached; `ConfigError`
    where it is not a fast tokenizer with an end-of-text token.
    """
    from transformers import AutoTokenizer

    tokenizer = _fetch(name, lambda path: AutoTokenizer.from_pretrained(path))
    if not tokenizer.is_fast or tokenizer.eos_token_id is None:
        raise ConfigError(
            f"model.model_name_or_path {name}: needs a fast tokenizer with an end-of-text token"
        )
    return tokenizer


def tokenizer_files(name: str) -> list[Path]:
    """List the files that make a tokenizer: in a folder, or in the hub's cache.

    Raises `MachineError` as `load_tokenizer` does, which fills the cache.
    """
    files = _tokenizer_files(name)
    if not files:
        load_tokenizer(name)
        files = _tokenizer_files(name)
    return files


def _tokenizer_files(name: str) -> list[Path]:
    folder = locate(name)
    if folder.is_dir():
        return [folder / file for file in TOKENIZER_FILES if (folder / file).is_file()]
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        cached = [try_to_load_from_cache(name, file) for file in TOKENIZER_FILES]
    except HFValidationError:  # a folder that is missing, say
        return []
    return [Path(path) for path in cached if isinstance(path, str)]


def load_base(
    name: str, dtype: "torch.dtype | str", quantization: str = "none"
) -> "PreTrainedModel":
    """Load a causal language model from a folder or the hub.

    With `quantization` "8bit" or "4bit" (bitsandbytes) its linear layers are quantized as they
    come, on this process's own device; embedding and head keep `dtype`.

    Raises `MachineError` where the folder is missing and the hub cannot be reached.
    """
    from transformers import AutoModelForCausalLM

    settings = {"dtype": dtype, "use_safetensors": True, **_quantized(quantization, dtype)}
    base = _fetch(name, lambda path: AutoModelForCausalLM.from_pretrained(path, **settings))
    # With a cache, positions that restart are ignored. Generation has a setting of its own.
    base.config.use_cache = False
    return base


def _quantized(quantization: str, dtype: "torch.dtype | str") -> dict[str, Any]:
    if quantization == "none":
        return {}
    import torch
    from transformers import BitsAndBytesConfig

    own = int(os.environ.get("LOCAL_RANK", 0)) if torch.cuda.is_available() else "cpu"
    eight = quantization == "8bit"
    how = BitsAndBytesConfig(
        load_in_8bit=eight,
        load_in_4bit=not eight,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=dtype if isinstance(dtype, torch.dtype) else None,
    )
    return {"quantization_config": how, "device_map": {"": own}}


def _fetch(name: str, load: Callable[[str], Loaded]) -> Loaded:
    path = str(locate(name))
    try:
        return load(path)
    except (OSError, ValueError, SafetensorError) as error:
        where = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
        first = str(error).strip().splitlines()[0]
        raise MachineError(
            f"cannot load the model {name}: tried the folder {path} "
            f"({'present' if Path(path).is_dir() else 'missing'}) and {where} ({first}).\n"
            "Download it where there is a network and point model.model_name_or_path at its "
            "folder, or set HF_ENDPOINT to a mirror you can reach."
        ) from None


def document_start_id(tokenizer: "PreTrainedTokenizerBase") -> int:
    """Choose what stands before a text: `<|endoftext|>`, else the end-of-text token.

    Chat models end a turn, not a text, with their end-of-text token.
    """
    known = tokenizer.backend_tokenizer.token_to_id(DOCUMENT_START)
    return int(tokenizer.eos_token_id if known is None else known)


def mask_token_id(
    tokenizer: "PreTrainedTokenizerBase", vocab_size: int, name: str | None = None
) -> int:
    """Choose the row that stands for a hidden token: the named one, `<|mask|>`, or a spare row.

    Qwen3's table has rows that no token uses (151,669 to 151,935): nothing has to grow.

    Raises `ConfigError` where no token is called so, or the table has no spare row.
    """
    if name is not None:
        return _named_token(tokenizer, name)
    known = tokenizer.get_vocab()
    if MASK_TOKEN in known:
        return int(known[MASK_TOKEN])
    spare = int(max(known.values())) + 1
    if spare >= vocab_size:
        raise ConfigError(
            f"model.model_name_or_path: its table of {vocab_size:,} rows has no spare one for the "
            "mask token; name a token it can do without as masking.mask_token"
        )
    return spare


def _named_token(tokenizer: "PreTrainedTokenizerBase", name: str) -> int:
    """Find the token that a text is; what begins, ends or fills up texts cannot be spared."""
    ids = tokenizer(name, add_special_tokens=False).input_ids
    if len(ids) != 1:
        raise ConfigError(
            f"masking.mask_token {name}: the model's vocabulary has no such token; leave it out to "
            "take a spare row"
        )
    if ids[0] in (document_start_id(tokenizer), tokenizer.eos_token_id, tokenizer.pad_token_id):
        raise ConfigError(f"masking.mask_token {name}: begins or ends texts; name another")
    return int(ids[0])


def weights_dtype(config: Config) -> "torch.dtype":
    """Precision the base is loaded in: bfloat16 or float16 if asked for, else float32."""
    import torch

    if config.training.bf16:
        return torch.bfloat16
    return torch.float16 if config.training.fp16 else torch.float32
