"""Teach a causal language model to write 武侠 prose by masked reconstruction.

The module of a public name, as `_MODULES` lists them, is loaded when the name is first used.
"""

import importlib
import logging
import os
import sys
import warnings
from importlib.util import find_spec
from typing import Any

if find_spec("fcntl") is None:  # as on Windows, where `wuxia_core.errors` cannot be imported
    print("error: Windows: run this in WSL2, which is a Linux (wsl --install)", file=sys.stderr)
    sys.exit(5)  # the status of a `MachineError`

# By default torch's threads wait for each other in a busy loop: if processes share the cores,
# that takes ten times as long. torch reads this when it is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# On an H100 or H200 torch prefers cuDNN's attention, which prepares itself anew for each shape: so
# for each token that is written. torch reads this at the first attention.
os.environ.setdefault("TORCH_CUDNN_SDPA_DEPRIORITIZED", "1")

# peft imports bitsandbytes in every run, and that warns if it was not built for this CUDA.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated")  # peft uses it
# In a notebook a finished bar stays as a red box, so bars are turned off. tqdm and huggingface_hub
# read this when they are imported.
if "ipykernel" in sys.modules:
    os.environ |= {"TQDM_DISABLE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}

# Each public name, and the module of this package that has it.
_MODULES = {
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

__all__ = list(_MODULES)


def __getattr__(name: str) -> Any:
    """Import the module of a public name, and return what has the name there."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
