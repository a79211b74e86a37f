"""The adapter: LoRA and the trained row of the mask token, built and loaded in PEFT's own form."""

import json
from pathlib import Path
from types import MethodType
from typing import TYPE_CHECKING, Any

from wuxia_core.config import Config, ModelConfig, load_config
from wuxia_core.errors import ConfigError, DataError, MachineError
from wuxia_core.model.base import load_base, load_tokenizer, weights_dtype

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SETTINGS = "adapter_config.json"


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
    model = get_peft_model(base, lora)
    train_rows_alone(model)
    return model


def train_rows_alone(model: "PeftModel") -> None:
    """Compute with the trained rows of the embedding, not with a copy of the whole table.

    PEFT writes them into a copy at each pass, whose gradient is as large again: with 151,936 rows
    that is more than the rest of a small model, and with a tied head both are kept until the
    backward pass. The results are the same.
    """
    from peft.tuners.trainable_tokens import TrainableTokensLayer

    for module in model.modules():
        if isinstance(module, TrainableTokensLayer):
            module.forward_adapters = MethodType(_forward_rows, module)


def _forward_rows(layer: Any, inputs: "torch.Tensor", adapters: list[str]) -> "torch.Tensor":
    """Look up or project with the base's table, then set right what the trained rows change."""
    import torch

    outputs: torch.Tensor = layer.base_layer(inputs)
    for name in [] if layer.disable_adapters or layer.merged else adapters:
        rows = layer.trainable_tokens_delta[name].to(outputs.dtype)  # (rows, hidden)
        for row, index in zip(rows, layer.token_indices[name], strict=True):
            if isinstance(layer.base_layer, torch.nn.Embedding):
                outputs = torch.where((inputs == index)[..., None], row, outputs)
            else:  # a tied head: the token's own logit
                column = (inputs @ row.to(inputs.dtype)).to(outputs.dtype)[..., None]
                place = torch.tensor([index], device=outputs.device)
                outputs = outputs.index_copy(-1, place, column)
    return outputs


def _has_layer(model: "PreTrainedModel", name: str) -> bool:
    return any(n == name or n.endswith(f".{name}") for n, _ in model.named_modules())


def load_adapter(
    output_dir: str | Path, device: str = "cpu"
) -> "tuple[PeftModel, PreTrainedTokenizerBase]":
    """Load a run's base model with its adapter, ready for evaluation, and the tokenizer.

    `with model.disable_adapter():` gives the base. On the CPU weights are float32; elsewhere they
    have the precision of the training, without `config.yaml` the base's. A base that was quantized
    in training is so here.

    Raises
    ------
    DataError
        Where the folder holds no adapter, or one of another base.
    MachineError
        Where the base model cannot be loaded.
    """
    import torch

    folder = Path(output_dir)
    name = adapter_settings(folder)["base_model_name_or_path"]
    config = run_config(folder)
    trained = weights_dtype(config) if config else "auto"
    dtype = torch.float32 if device == "cpu" else trained
    try:
        base = load_base(name, dtype, config.model.quantization if config else "none")
    except MachineError as error:
        raise MachineError(f"{error}\n{folder / SETTINGS} names its base") from None
    if not getattr(base, "is_quantized", False):
        base = base.to(device)
    return _put_on(base, folder, name), load_tokenizer(name)


def _put_on(base: "PreTrainedModel", folder: Path, name: str) -> "PeftModel":
    from peft import PeftModel

    try:
        model = PeftModel.from_pretrained(base, str(folder))
    except RuntimeError as error:  # torch lists the shapes behind the first line
        shapes = (str(error).splitlines()[1:] or [str(error)])[0].strip()
        raise DataError(
            f"{folder}: the adapter does not fit {name}: {shapes} Name its own base in "
            f"{folder / SETTINGS}, base_model_name_or_path"
        ) from None
    train_rows_alone(model)
    return model.eval()


def run_config(folder: Path) -> Config | None:
    """Read a run's settings; None where only the adapter is there."""
    path = folder / "config.yaml"
    return load_config(path) if path.is_file() else None


def adapter_settings(folder: Path) -> dict[str, Any]:
    """Read a run folder's `adapter_config.json`; `DataError` where it holds no whole adapter."""
    path = folder / SETTINGS
    if not path.is_file() or not (folder / "adapter_model.safetensors").is_file():
        raise DataError(
            f"{folder}: no finished adapter there (adapter_model.safetensors); name the "
            "training.output_dir of a run that came to its end"
        )
    settings: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return settings
