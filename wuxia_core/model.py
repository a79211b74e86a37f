"""The base model, its mask token and the adapter: loading, building, saving in PEFT's own form."""

import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from safetensors import SafetensorError

from wuxia_core.config import Config, ModelConfig, locate
from wuxia_core.errors import ConfigError, DataError, MachineError

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
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


def load_base(name: str, dtype: "torch.dtype | str") -> "PreTrainedModel":
    """Load a causal language model from a folder or the hub.

    Raises `MachineError` where the folder is missing and the hub cannot be reached.
    """
    from transformers import AutoModelForCausalLM

    base = _fetch(
        name,
        lambda path: AutoModelForCausalLM.from_pretrained(path, dtype=dtype, use_safetensors=True),
    )
    # With a cache, positions that restart are ignored. Generation has a setting of its own.
    base.config.use_cache = False
    return base


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
    known = tokenizer.get_vocab()
    if name is not None and name not in known:
        raise ConfigError(
            f"masking.mask_token {name}: the model's vocabulary has no such token; leave it out to "
            "take a spare row"
        )
    if (name or MASK_TOKEN) in known:
        return int(known[name or MASK_TOKEN])
    spare = int(max(known.values())) + 1
    if spare >= vocab_size:
        raise ConfigError(
            f"model.model_name_or_path: its table of {vocab_size:,} rows has no spare one for the "
            "mask token; name a token it can do without as masking.mask_token"
        )
    return spare


def add_adapter(base: "PreTrainedModel", config: ModelConfig, mask_id: int) -> "PeftModel":
    """Put LoRA on the base, and train the embedding row of the mask token with it.

    Raises `ConfigError` where `lora_target_modules` names no layer of the model.
    """
    from peft import LoraConfig, get_peft_model

    lora = LoraConfig(
        task_type="CAUSAL_LM",
        r=config.lora_r,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=config.lora_target_modules,
        trainable_token_indices=[mask_id],
    )
    missing = [n for n in config.lora_target_modules if not _has_layer(base, n)]
    if missing:
        raise ConfigError(f"model.lora_target_modules: the model has no layer {', '.join(missing)}")
    return get_peft_model(base, lora)


def _has_layer(model: "PreTrainedModel", name: str) -> bool:
    return any(n == name or n.endswith(f".{name}") for n, _ in model.named_modules())


def load_adapter(
    output_dir: str | Path, device: str = "cpu"
) -> "tuple[PeftModel, PreTrainedTokenizerBase]":
    """Load a run's base model with its adapter, ready for evaluation, and the tokenizer.

    `with model.disable_adapter():` gives the base. On the CPU weights are float32; elsewhere they
    keep the precision that the base is stored in.

    Raises
    ------
    DataError
        Where the folder holds no adapter.
    MachineError
        Where the base model cannot be loaded.
    """
    import torch
    from peft import PeftModel

    folder = Path(output_dir)
    name = adapter_settings(folder)["base_model_name_or_path"]
    dtype = torch.float32 if device == "cpu" else "auto"
    model = PeftModel.from_pretrained(load_base(name, dtype).to(device), str(folder))
    model.eval()
    return model, load_tokenizer(name)


def adapter_settings(folder: Path) -> dict[str, Any]:
    """Read a run folder's `adapter_config.json`; `DataError` where it holds no whole adapter."""
    path = folder / "adapter_config.json"
    if not path.is_file() or not (folder / "adapter_model.safetensors").is_file():
        raise DataError(f"{folder}: no finished adapter there (adapter_model.safetensors)")
    settings: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return settings


def weights_dtype(config: Config) -> "torch.dtype":
    """Precision the base is loaded in: bfloat16 or float16 if asked for, else float32."""
    import torch

    if config.training.bf16:
        return torch.bfloat16
    return torch.float16 if config.training.fp16 else torch.float32
