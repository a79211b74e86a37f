"""Teach a causal language model to write 武侠 prose by masked reconstruction.

The public names load what they need when they are first used.
"""

import importlib
import logging
import os
import sys
import warnings
from importlib.util import find_spec
from typing import Any

if find_spec("fcntl") is None:
    print("error: Windows: run this in WSL2, which is a Linux (wsl --install)", file=sys.stderr)
    sys.exit(5)

# Torch's threads else wait for each other at full speed: where two processes share the cores, or
# anything else is at work, that takes ten times as long. To be set before torch is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # peft imports it, wanted or not
warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated")  # peft reads it
# In a notebook bars stay behind in red boxes. To be set before tqdm is imported.
if "ipykernel" in sys.modules:
    os.environ |= {"TQDM_DISABLE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}

_HOME = {
    "Book": "corpus",
    "CorpusError": "errors",
    "Mixture": "mixing",
    "SpanMasker": "masking",
    "bits_per_char": "evaluate",
    "load_adapter": "model",
    "load_config": "config",
    "mix": "mixing",
    "read_book": "corpus",
    "show_masks": "show",
    "xray": "evaluate",
}

__all__ = list(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
