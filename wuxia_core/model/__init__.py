"""The base model with its mask token, and the adapter that is trained on it."""

from wuxia_core.model.adapter import adapter_settings, add_adapter, load_adapter
from wuxia_core.model.base import (
    document_start_id,
    load_base,
    load_tokenizer,
    mask_token_id,
    tokenizer_files,
    weights_dtype,
)
