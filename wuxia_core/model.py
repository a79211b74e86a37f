"""The base model, its tokenizer and mask token, the adapter that is trained, and its loss.

torch, transformers and peft are loaded when first used.
"""

import copy
import json
import os
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from subprocess import getstatusoutput
from types import MethodType
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from wuxia_core.config import Config, ModelConfig, load_config, locate
from wuxia_core.errors import ConfigError, DataError, MachineError, hub_fault, lacks_memory
from wuxia_core.masking import Corruption, MaskCollator, SpanMasker

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
MASK_ROW = "mask_row.safetensors"  # no other program takes it, and no prompt needs it
# Weights last: once they are there, all is.
ADAPTER_FILES = (MASK_ROW, ADAPTER_CONFIG, ADAPTER_WEIGHTS)
LESS_MEMORY = (
    "what saves memory, the least harmful first: training.gradient_checkpointing=true, half of "
    "training.per_device_train_batch_size with twice training.gradient_accumulation_steps, "
    "model.quantization=8bit or 4bit, a smaller data.max_length or model"
)
ASK_DRIVER = "nvidia-smi --query-gpu=driver_version,name --format=csv,noheader"
MODERN_DRIVER = 580  # the first for CUDA 13, which torch from PyPI is built for
LOSS_LOGITS = 2**25  # of a training batch that are in float32 at a time
LOGITS = 2**28  # of a batch of held-out text at most; 1 GiB in float32
TRUST = {"trust_remote_code": False}  # said wherever transformers could ask
TOKENIZER_FILES = ["*token*.json", "vocab.*", "merges.txt", "*.model"]


def best_device() -> str:
    """Choose where to compute: "cuda" where torch sees a card, else "cpu".

    Raises `MachineError` where cards are there that torch cannot use, and nobody hid them.
    """
    import torch

    if torch.cuda.is_available():
        return "cuda"
    failed, told = getstatusoutput(ASK_DRIVER)
    if failed or not told or os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return "cpu"
    driver, _, name = told.splitlines()[0].partition(", ")
    wheels = "cu130" if int(driver.partition(".")[0]) >= MODERN_DRIVER else "cu126"
    number = torch.__version__.partition("+")[0]
    raise MachineError(
        f"{name}: driver {driver} cannot run torch {number} for CUDA {torch.version.cuda}; pip "
        f"install --force-reinstall torch=={number} --index-url https://download.pytorch.org/whl/"
        f"{wheels}, or driver {MODERN_DRIVER}; CUDA_VISIBLE_DEVICES=-1 does without the card"
    )


def weights_dtype(config: Config) -> str:
    """Give the precision the base is loaded in: bfloat16 or float16 if configured, else float32."""
    training = config.training
    return "bfloat16" if training.bf16 else "float16" if training.fp16 else "float32"


def base_path(config: ModelConfig) -> str:
    """Give the base's folder, or its name on the Hugging Face hub; ModelScope's is downloaded.

    Raises `ConfigError` where the package modelscope is missing, `MachineError` where it cannot be
    reached or has no such model.
    """
    name = config.model_name_or_path
    if config.hub == "huggingface" or locate(name).is_dir():
        return name
    if find_spec("modelscope") is None:
        raise ConfigError("model.hub modelscope: not installed; pip install -e '.[modelscope]'")
    from modelscope import snapshot_download
    from modelscope.hub.errors import HubError

    try:
        return str(snapshot_download(name))
    except (OSError, ValueError, HubError) as error:
        first = str(error).splitlines()[0]
        remedy = "download it elsewhere, and name its folder as model.model_name_or_path"
        raise MachineError(f"cannot get {name} from ModelScope ({first}); {remedy}") from None


def load_base(
    name: str, dtype: "torch.dtype | str", quantization: str = "none"
) -> "PreTrainedModel":
    """Load a causal language model from a folder or the hub.

    With `quantization` "8bit" or "4bit" (bitsandbytes) its linear layers are quantized as they
    come, on this process's own device; embedding and head keep `dtype`.

    Raises `MachineError` where the folder is missing and the hub cannot be reached, or a tensor is.
    """
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    settings: dict[str, Any] = {"dtype": dtype, "use_safetensors": True, **TRUST}
    if quantization != "none":
        device = int(os.environ.get("LOCAL_RANK", 0)) if torch.cuda.is_available() else "cpu"
        how = {f"load_in_{quantization}": True, "bnb_4bit_quant_type": "nf4"}
        bits = BitsAndBytesConfig(**how, bnb_4bit_compute_dtype=dtype)
        settings |= {"quantization_config": bits, "device_map": {"": device}}
    settings |= {"output_loading_info": True, "ignore_mismatched_sizes": True}  # they are named
    load = partial(AutoModelForCausalLM.from_pretrained, **settings)
    base: PreTrainedModel
    base, found = fetch(name, load)
    if wrong := sorted(map(str, {*found["missing_keys"], *found["mismatched_keys"]})):
        what = f"{len(wrong)} of its tensors are missing or of another shape: {wrong[0]}"
        raise MachineError(f"the model {name} is not whole: {what}; get it anew")
    # With a cache, positions that restart are ignored. Generation has a setting of its own.
    base.config.use_cache = False
    return base


def load_tokenizer(name: str) -> "PreTrainedTokenizerBase":
    """Load a fast tokenizer from a folder or the hub.

    Raises `MachineError` where the folder is missing and the hub cannot be reached; `ConfigError`
    where it is not a fast tokenizer with an end-of-text token.
    """
    from transformers import AutoTokenizer

    tokenizer: PreTrainedTokenizerBase
    tokenizer = fetch(name, partial(AutoTokenizer.from_pretrained, **TRUST))
    if not tokenizer.is_fast or tokenizer.eos_token_id is None:
        raise ConfigError(f"model.model_name_or_path {name}: no fast tokenizer with an end of text")
    return tokenizer


def tokenizer_files(name: str) -> list[Path]:
    """List the files that make a tokenizer: in a folder, or in the hub's cache, which it fills.

    Raises `MachineError` as `load_tokenizer` does.
    """
    folder = locate(name)
    if not folder.is_dir():
        from huggingface_hub import snapshot_download

        folder = Path(fetch(name, partial(snapshot_download, allow_patterns=TOKENIZER_FILES)))
    return [path for pattern in TOKENIZER_FILES for path in sorted(folder.glob(pattern))]


def fetch(name: str, load: Callable[[str], Any]) -> Any:
    """Load from a folder, or from the hub; `MachineError` where neither has it."""
    path = locate(name)
    silent = "" if path.is_dir() else hub_fault()
    try:
        return load(str(path))
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:
        if lacks_memory(error):
            raise
        there = "present" if path.is_dir() else "missing"
        hub = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
        first = silent or str(error).strip().splitlines()[0]
        raise MachineError(
            f"cannot load the model {name}: tried the folder {path} ({there}) and {hub} "
            f"({first}).\nDownload it where there is a network and name its folder: in a config as "
            "model.model_name_or_path, for an adapter --base-model or in its adapter_config.json; "
            "or set HF_ENDPOINT to a mirror you can reach."
        ) from None


def check_length(config: Config, base: Any) -> None:
    """Refuse windows that are longer than a base reads; `ConfigError`.

    `base` has `max_position_embeddings`, as most models' configs do.
    """
    length, most = config.data.max_length, getattr(base, "max_position_embeddings", None)
    if most and length > most:
        name = config.model.model_name_or_path
        raise ConfigError(f"data.max_length {length}: {name} reads {most} tokens at most")


def document_start_id(tokenizer: "PreTrainedTokenizerBase") -> int:
    """Choose what stands before a text: `<|endoftext|>`, else the end-of-text token.

    Chat models end a turn, not a text, with their end-of-text token.
    """
    known = tokenizer.backend_tokenizer.token_to_id("<|endoftext|>")
    return int(tokenizer.eos_token_id if known is None else known)


def mask_token_id(
    tokenizer: "PreTrainedTokenizerBase", vocab_size: int, name: str | None = None
) -> int:
    """Choose the row that stands for a masked token: the named one, `<|mask|>`, or a spare row.

    Qwen3's table has rows that no token uses (151,669 to 151,935): nothing has to grow.

    Raises `ConfigError` where no token is called so, or it begins, ends or fills up texts, or the
    table has no spare row, or fewer rows than there are tokens.
    """
    known = tokenizer.get_vocab()
    if (tokens := max(known.values()) + 1) > vocab_size:
        what = f"its table has {vocab_size:,} rows for {tokens:,} tokens"
        raise ConfigError(f"model.model_name_or_path: {what}; get the model anew")
    if name is None:
        mask_id = int(known.get("<|mask|>", tokens))
        if mask_id >= vocab_size:
            remedy = "name a token that the model can do without"
            raise ConfigError(f"masking.mask_token: the table has no spare row; {remedy}")
        return mask_id
    ids: list[int] = tokenizer(name, add_special_tokens=False).input_ids
    if len(ids) != 1:
        raise ConfigError(f"masking.mask_token {name}: the model has no such token; leave it out")
    if ids[0] in (document_start_id(tokenizer), tokenizer.eos_token_id, tokenizer.pad_token_id):
        raise ConfigError(f"masking.mask_token {name}: begins or ends texts; name another")
    return ids[0]


def make_collator(
    config: Config, tokenizer: "PreTrainedTokenizerBase", mask_id: int, objective: str
) -> MaskCollator:
    """Build the collator of a run; `mask_id` is the row that its adapter trains."""
    masking, seed = config.masking, config.training.seed
    return MaskCollator(
        SpanMasker(masking.mask_ratio, masking.span_ratio, masking.span_length, seed),
        Corruption.of(tokenizer, mask_id, masking.corruption, seed),
        pad_token_id=int(tokenizer.pad_token_id or 0),
        special_ids=frozenset(tokenizer.all_special_ids),
        objective=objective,
        span_unit=masking.span_unit,
    )


def add_adapter(base: "PreTrainedModel", config: ModelConfig, mask_id: int) -> "PeftModel":
    """Put LoRA on the base, and train the embedding row of the mask token with it.

    Casts are left to autocast. Saving asks no hub for the base's vocabulary.

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
    layers = "".join(f".{name} " for name, _ in base.named_modules())
    named = config.lora_target_modules
    missing = [] if named == "all-linear" else [name for name in named if f".{name} " not in layers]
    if missing:
        raise ConfigError(f"model.lora_target_modules: the model has no layer {', '.join(missing)}")
    model = get_peft_model(base, lora)
    patch_trainable_tokens(model)
    leave_casts_to_autocast(model)
    model.save_pretrained = partial(model.save_pretrained, save_embedding_layers=False)
    return model


def leave_casts_to_autocast(model: "torch.nn.Module") -> None:
    """Have LoRA's inputs keep their precision, from now on.

    PEFT makes them float32, for autocast to make them half of that again.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            module.cast_input_dtype_enabled = False


def compile_layers(model: "torch.nn.Module") -> None:
    """Compile each decoder layer; what is recomputed in the backward pass is compiled too."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    for layer in model.modules():
        if isinstance(layer, GradientCheckpointingLayer):
            layer.compile()


def patch_trainable_tokens(model: "PeftModel") -> None:
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


def write_adapter(model: "PeftModel", folder: Path) -> None:
    """Write the adapter as plain LoRA, as other programs take it, and the mask token's row beside.

    A base that is a folder is named by its absolute path: a relative one is looked up at the hub.
    """
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    config = copy.copy(model.peft_config["default"])
    base = locate(config.base_model_name_or_path)
    if base.is_dir():
        config.base_model_name_or_path = str(base.resolve())
    weights = get_peft_model_state_dict(model, save_embedding_layers=False)
    (row,) = (weights.pop(name) for name in list(weights) if "lora_" not in name)
    (mask_id,) = config.trainable_token_indices
    save_file({"mask_row": row}, folder / MASK_ROW, {"mask_id": str(mask_id)})
    config.trainable_token_indices, config.inference_mode = None, True
    config.target_modules = sorted(config.target_modules)  # not as a set happens to have them
    config.save_pretrained(str(folder))
    save_file(weights, folder / ADAPTER_WEIGHTS, {"format": "pt"})
    share(folder, folder / ADAPTER_CONFIG)


def share(folder: Path, like: Path) -> None:
    """Let who may read one file read the weights too, which safetensors writes for us alone."""
    for path in folder.glob("*.safetensors"):
        path.chmod(like.stat().st_mode)


def load_adapter(
    output_dir: str | Path, device: str = "cpu", base_model: str | None = None
) -> "tuple[PeftModel, PreTrainedTokenizerBase]":
    """Load a run's base model with its adapter, ready for evaluation, and the tokenizer.

    The folder is a run's or that of any other LoRA adapter; `base_model` is for a base that has
    moved. `with model.disable_adapter():` gives the base. On the CPU weights are float32; elsewhere
    they have the precision of the training, without `config.yaml` the base's. A base that was
    quantized in training is so here.

    Raises
    ------
    DataError
        Where the folder holds no adapter, or one of another base.
    MachineError
        Where the base model cannot be loaded.
    """
    folder = Path(output_dir)
    name = base_model or adapter_settings(folder)["base_model_name_or_path"]
    written = folder / "config.yaml"
    config = load_config(written) if written.is_file() else None
    dtype = "float32" if device == "cpu" else weights_dtype(config) if config else "auto"
    base = load_base(name, dtype, config.model.quantization if config else "none")
    if not getattr(base, "is_quantized", False):
        base = base.to(device)
    return attach_adapter(base, folder, name), load_tokenizer(name)


def attach_adapter(
    base: "PreTrainedModel", folder: Path, name: str, mask_row: bool = True, strength: float = 1.0
) -> "PeftModel":
    """Put a folder's adapter on its base, called `name`, with the mask token's row or without.

    `strength` scales it.

    Raises `DataError` where it does not fit.
    """
    import peft

    adapter_settings(folder)
    weights, _ = _read_tensors(folder / ADAPTER_WEIGHTS)
    config, row = peft.PeftConfig.from_pretrained(str(folder)), None
    config.lora_alpha *= strength
    config.alpha_pattern = {key: strength * alpha for key, alpha in config.alpha_pattern.items()}
    if not mask_row:
        config.trainable_token_indices = None
    elif (folder / MASK_ROW).is_file():
        tensors, facts = _read_tensors(folder / MASK_ROW)
        row, config.trainable_token_indices = tensors["mask_row"], [int(facts["mask_id"])]
    try:
        model = peft.get_peft_model(base, config)
        names = peft.get_peft_model_state_dict(model, save_embedding_layers=False)
        rows = {name: row for name in names if "lora_" not in name and row is not None}
        peft.set_peft_model_state_dict(model, weights | rows)
    except (RuntimeError, ValueError) as error:
        shapes = str(error).partition("\n")[2].partition("\n")[0].strip()  # of the first layer
        raise DataError(
            f"{folder}: the adapter does not fit {name}: {shapes or error} Name its own base in "
            f"{folder / ADAPTER_CONFIG}, base_model_name_or_path"
        ) from None
    if missing := names.keys() - weights.keys() - rows.keys():
        what = f"{len(missing)} of {len(names)} tensors are missing, such as {min(missing)}"
        raise DataError(f"{folder / ADAPTER_WEIGHTS}: {what}; copy it anew, or train again")
    patch_trainable_tokens(model)
    return model.eval()


def _read_tensors(path: Path) -> "tuple[dict[str, torch.Tensor], dict[str, str]]":
    """Read tensors and the notes beside them; `DataError` where they are damaged or not finite."""
    from safetensors import safe_open

    try:
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            facts = file.metadata()
    except (OSError, SafetensorError) as error:
        raise DataError(f"{path}: damaged ({error}); copy it anew, or train again") from None
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise DataError(f"{path}: {name} is not finite; train again at a lower rate")
    return tensors, facts


def adapter_settings(folder: Path) -> dict[str, Any]:
    """Read a folder's `adapter_config.json`; `DataError` where it holds no whole LoRA adapter."""
    path = folder / ADAPTER_CONFIG
    if not path.is_file() or not (folder / ADAPTER_WEIGHTS).is_file():
        raise DataError(
            f"{folder}: no finished adapter there ({ADAPTER_WEIGHTS}); name a finished output_dir, "
            "or make one: python launch_ddp.py"
        )
    try:
        settings = dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: damaged ({error}); copy it anew") from None
    if settings.get("peft_type") != "LORA" or not settings.get("base_model_name_or_path"):
        raise DataError(f"{path}: not that of a LoRA adapter on a named base; name another folder")
    return settings
