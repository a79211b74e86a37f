"""The shape of a base model, from its config.json alone: nothing is loaded."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wuxia_core.config import locate
from wuxia_core.config.schema import LINEAR_LAYERS
from wuxia_core.mixing import read_json


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
