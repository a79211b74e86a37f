"""The base model, its tokenizer and mask token, and the adapter: made, loaded, written to files.

torch, transformers and peft are imported by the functions that use them.
"""

import copy
import json
import os
from collections.abc import Callable
from functools import cache, partial
from importlib.util import find_spec
from pathlib import Path
from subprocess import getstatusoutput
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
MASK_ROW = "mask_row.safetensors"  # the mask token's embedding, which no other program reads
ADAPTER_FILES = (MASK_ROW, ADAPTER_CONFIG, ADAPTER_WEIGHTS)  # moved in this order, weights last
LESS_MEMORY = (
    "what saves memory, the least harmful first: training.gradient_checkpointing=true, half of "
    "training.per_device_train_batch_size with twice training.gradient_accumulation_steps, "
    "model.quantization=8bit or 4bit, a smaller data.max_length or model"
)
DRIVER_QUERY = "nvidia-smi --query-gpu=driver_version,name --format=csv,noheader"
CUDA_13_DRIVER = 580  # the first driver for CUDA 13, which torch from PyPI is built for
LOSS_LOGITS = 2**25  # logits of a training batch in float32 at a time, at most; 128 MiB
LOGITS = 2**28  # logits of a batch of held-out text, at most; 1 GiB in float32
NO_REMOTE_CODE = {"trust_remote_code": False}  # without it transformers asks the user
TOKENIZER_PATTERNS = ["*token*.json", "vocab.*", "merges.txt", "*.model"]  # patterns of names


def best_device() -> str:
    """Choose where to compute: "cuda" if torch can use a GPU, else "cpu".

    Raises `MachineError` if the driver lists a GPU that torch cannot use, unless
    `CUDA_VISIBLE_DEVICES` hides all GPUs. The message names the torch, or the driver, to install.
    """
    import torch

    if torch.cuda.is_available():
        return "cuda"
    status, output = getstatusoutput(DRIVER_QUERY)  # a line a GPU: "580.65.06, NVIDIA RTX 4090"
    if status or not output[:1].isdigit() or os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return "cpu"
    driver, _, gpu = output.splitlines()[0].partition(", ")
    wheels = "cu130" if int(driver.partition(".")[0]) >= CUDA_13_DRIVER else "cu126"
    release = torch.__version__.partition("+")[0]
    raise MachineError(
        f"{gpu}: driver {driver} cannot run torch {release} for CUDA {torch.version.cuda}; pip "
        f"install --force-reinstall torch=={release} --index-url https://download.pytorch.org/whl/"
        f"{wheels}, or driver {CUDA_13_DRIVER}; CUDA_VISIBLE_DEVICES=-1 does without the card"
    )


def weights_dtype(config: Config) -> str:
    """Give the precision the base is loaded in: bfloat16 or float16 if configured, else float32."""
    if config.training.bf16:
        return "bfloat16"
    return "float16" if config.training.fp16 else "float32"


def base_path(config: ModelConfig) -> str:
    """Give the base's folder or its name on the Hugging Face hub; download a ModelScope model.

    The result is then the folder of the download. Raises `ConfigError` if ModelScope's package is
    missing, `MachineError` if ModelScope cannot be reached or has no such model.
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
        reason = str(error).splitlines()[0]
        remedy = "download it elsewhere, and name its folder as model.model_name_or_path"
        raise MachineError(f"cannot get {name} from ModelScope ({reason}); {remedy}") from None


def load_base(
    name: str, dtype: "torch.dtype | str", quantization: str = "none"
) -> "PreTrainedModel":
    """Load the causal language model `name`, a folder or a name on the hub, in precision `dtype`.

    `dtype` "auto" is the precision of the model's file. With `quantization` "8bit" or "4bit" the
    linear layers are quantized while they load, on this process's own device; embedding and head
    keep `dtype`. Raises `MachineError` if loading fails, or a tensor is missing or misshapen.
    """
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    settings: dict[str, Any] = {"dtype": dtype, "use_safetensors": True, **NO_REMOTE_CODE}
    if quantization != "none":
        drop_inputs_of_8bit_layers()
        device = int(os.environ.get("LOCAL_RANK", 0)) if torch.cuda.is_available() else "cpu"
        options = {f"load_in_{quantization}": True, "bnb_4bit_quant_type": "nf4"}
        quantizer = BitsAndBytesConfig(**options, bnb_4bit_compute_dtype=dtype)
        settings |= {"quantization_config": quantizer, "device_map": {"": device}}
    settings |= {"output_loading_info": True, "ignore_mismatched_sizes": True}  # see `broken`
    base: PreTrainedModel
    base, info = fetch(name, partial(AutoModelForCausalLM.from_pretrained, **settings))
    if broken := sorted(map(str, {*info["missing_keys"], *info["mismatched_keys"]})):
        problem = f"{len(broken)} of its tensors are missing or of another shape: {broken[0]}"
        raise MachineError(f"the model {name} is not whole: {problem}; get it anew")
    # A cache would ignore the restarts of positions in packed windows. `generate` sets its own.
    base.config.use_cache = False
    return base


@cache  # else each call would wrap `forward` once more
def drop_inputs_of_8bit_layers() -> None:
    """Make all 8-bit layers of bitsandbytes forget their inputs, which frozen weights never need.

    Gradient checkpointing does not free them: bitsandbytes keeps them without `save_for_backward`.
    """
    from bitsandbytes.autograd._functions import MatMul8bitLt

    forward = MatMul8bitLt.forward

    def forward_and_drop(ctx: Any, *arguments: Any) -> Any:
        output = forward(ctx, *arguments)
        ctx.tensors = (None, None, None)  # only the gradient of the weight is computed from them
        return output

    MatMul8bitLt.forward = staticmethod(forward_and_drop)  # type: ignore[assignment,method-assign]


def load_tokenizer(name: str) -> "PreTrainedTokenizerBase":
    """Load the tokenizer `name`, a folder or a name on the hub.

    Raises `MachineError` if that fails, `ConfigError` if it is not a fast tokenizer (one of the
    library tokenizers) with an end-of-text token.
    """
    from transformers import AutoTokenizer

    tokenizer: PreTrainedTokenizerBase
    tokenizer = fetch(name, partial(AutoTokenizer.from_pretrained, **NO_REMOTE_CODE))
    if not tokenizer.is_fast or tokenizer.eos_token_id is None:
        raise ConfigError(f"model.model_name_or_path {name}: no fast tokenizer with an end of text")
    return tokenizer


def tokenizer_files(name: str) -> list[Path]:
    """List the tokenizer's files in the folder `name` or, if there is none, download them first.

    Of the hub's model `name` only these files come; those in the hub's local cache are not
    downloaded again. Raises `MachineError` if the download fails.
    """
    folder = locate(name)
    if not folder.is_dir():
        from huggingface_hub import snapshot_download

        folder = Path(fetch(name, partial(snapshot_download, allow_patterns=TOKENIZER_PATTERNS)))
    return [path for pattern in TOKENIZER_PATTERNS for path in sorted(folder.glob(pattern))]


def fetch(name: str, load: Callable[[str], Any]) -> Any:
    """Call `load` with the folder `name` or, if there is none, with the name on the hub.

    Returns what it returns. Raises `MachineError` if it fails; lack of memory is raised as it is.
    """
    path = locate(name)  # a name on the hub stays as it is
    # "", or why the hub does not answer: `load` then looks only into its cache
    fault = "" if path.is_dir() else hub_fault()
    try:
        return load(str(path))
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:
        if lacks_memory(error):
            raise
        hub = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
        tried = f"the folder {path}" if path.is_dir() else f"the folder {path} (missing) and {hub}"
        cause = fault or (str(error).strip() or type(error).__name__).splitlines()[0]
        raise MachineError(
            f"cannot load the model {name}: tried {tried} ({cause}).\nDownload it where there is a "
            "network and name its folder: in a config as model.model_name_or_path, for an adapter "
            "--base-model or in its adapter_config.json; or set HF_ENDPOINT to a mirror."
        ) from None


def check_length(config: Config, base_config: Any) -> None:
    """Raise `ConfigError` if `data.max_length` exceeds the base's `max_position_embeddings`.

    `base_config` is transformers', a `plan.Shape` or None. Without the number, any length passes.
    """
    length, limit = config.data.max_length, getattr(base_config, "max_position_embeddings", None)
    if limit and length > limit:
        name = config.model.model_name_or_path
        raise ConfigError(f"data.max_length {length}: {name} reads {limit} tokens at most")


def document_start_id(tokenizer: "PreTrainedTokenizerBase") -> int:
    """Choose the id of the token that stands before each text: `<|endoftext|>`, else the EOS token.

    The EOS token of a chat model ends a turn of the talk, not a text.
    """
    endoftext_id = tokenizer.backend_tokenizer.token_to_id("<|endoftext|>")
    return int(tokenizer.eos_token_id if endoftext_id is None else endoftext_id)


def mask_token_id(
    tokenizer: "PreTrainedTokenizerBase", vocab_size: int, name: str | None = None
) -> int:
    """Choose the mask token's id: that of `name`; for None that of `<|mask|>`, else a spare row.

    The embedding table has `vocab_size` rows. Its last rows are spare if no token uses them, in
    Qwen3 rows 151,669 to 151,935; the first of them is chosen. Raises `ConfigError` if `name` is
    not one token, or begins, ends or pads texts; if no row is spare; if some token has no row.
    """
    vocabulary = tokenizer.get_vocab()
    if (first_spare_id := max(vocabulary.values()) + 1) > vocab_size:
        problem = f"its table has {vocab_size:,} rows for {first_spare_id:,} tokens"
        raise ConfigError(f"model.model_name_or_path: {problem}; get the model anew")
    if name is None:
        mask_id = int(vocabulary.get("<|mask|>", first_spare_id))
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
    """Make the collator that masks and batches a run's windows; `MaskCollator` lists objectives."""
    masking, seed = config.masking, config.training.seed
    masker = SpanMasker(masking.mask_ratio, masking.span_ratio, masking.span_length, seed)
    corruption = Corruption.of(tokenizer, mask_id, masking.corruption, seed)
    pad_id, special_ids = int(tokenizer.pad_token_id or 0), frozenset(tokenizer.all_special_ids)
    return MaskCollator(masker, corruption, pad_id, special_ids, objective, masking.span_unit)


def add_adapter(base: "PreTrainedModel", config: ModelConfig, mask_id: int) -> "PeftModel":
    """Put a new adapter on the base, in place: LoRA, and the embedding row of the mask token.

    LoRA layers leave casts to autocast, and `save_pretrained` does not ask the hub for the size of
    the vocabulary. Raises `ConfigError` if `lora_target_modules` names a layer that the base lacks.
    """
    from peft import LoraConfig, get_peft_model

    size = {"r": config.lora_r, "lora_alpha": config.lora_alpha}
    places = {"target_modules": config.lora_target_modules, "trainable_token_indices": [mask_id]}
    lora = LoraConfig(task_type="CAUSAL_LM", lora_dropout=config.lora_dropout, **size, **places)
    paths = [f".{path}" for path, _ in base.named_modules()]  # .model.layers.0.self_attn.q_proj
    targets = [] if config.lora_target_modules == "all-linear" else config.lora_target_modules
    if missing := [name for name in targets if not any(p.endswith(f".{name}") for p in paths)]:
        raise ConfigError(f"model.lora_target_modules: the model has no layer {', '.join(missing)}")
    model = get_peft_model(base, lora)
    patch_trainable_tokens(model)
    leave_casts_to_autocast(model)
    model.save_pretrained = partial(model.save_pretrained, save_embedding_layers=False)
    return model


def leave_casts_to_autocast(model: "torch.nn.Module") -> None:
    """Make LoRA layers take inputs as they come; PEFT casts them to float32, and autocast back."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            module.cast_input_dtype_enabled = False


def compile_layers(model: "torch.nn.Module") -> None:
    """Make torch compile each decoder layer on its first call, gradient checkpointing included."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    for layer in model.modules():
        if isinstance(layer, GradientCheckpointingLayer):
            layer.compile()


def patch_trainable_tokens(model: "PeftModel") -> None:
    """Make PEFT compute with the trained rows of the embedding, without a copy of the table.

    In each pass PEFT itself writes the trained rows into a copy of the table, and the gradient of
    the copy is as large: in Qwen3-0.6B 156 million numbers each. Results differ only by rounding.
    """
    from peft.tuners.trainable_tokens import TrainableTokensLayer

    for module in model.modules():
        if isinstance(module, TrainableTokensLayer):
            module.forward_adapters = partial(_forward_rows, module)


def _forward_rows(layer: Any, inputs: "torch.Tensor", adapters: list[str]) -> "torch.Tensor":
    """Run an embedding, or the head tied to it, with trained rows in place of some of the table's.

    The embedding takes ids (B, T) to (B, T, hidden), the head (..., hidden) to logits (..., V).
    """
    import torch

    outputs: torch.Tensor = layer.base_layer(inputs)
    if layer.disable_adapters or layer.merged:  # a merged table has the trained rows already
        return outputs
    scale = getattr(layer.base_layer, "embed_scale", 1)  # an embedding of Gemma multiplies by it
    for name in adapters:  # the names of the active adapters
        rows = layer.trainable_tokens_delta[name].to(outputs.dtype)  # (trained rows, hidden)
        for row, token_id in zip(rows, layer.token_indices[name], strict=True):
            if isinstance(layer.base_layer, torch.nn.Embedding):
                outputs = torch.where((inputs == token_id)[..., None], scale * row, outputs)
            else:  # the head: this token's logit is the product with its trained row
                logit = (inputs @ row.to(inputs.dtype)).to(outputs.dtype)[..., None]
                column = torch.tensor([token_id], device=outputs.device)
                outputs = outputs.index_copy(-1, column, logit)
    return outputs


def write_adapter(model: "PeftModel", folder: Path) -> None:
    """Write `ADAPTER_FILES` into `folder`: plain LoRA, which other programs load, and the mask row.

    A base that is a folder is named by its absolute path: PEFT looks a relative one up on the hub.
    """
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    config = copy.copy(model.peft_config["default"])
    base_folder = locate(config.base_model_name_or_path)
    if base_folder.is_dir():
        config.base_model_name_or_path = str(base_folder.resolve())
    weights = get_peft_model_state_dict(model, save_embedding_layers=False)
    (row_name,) = (name for name in weights if "lora_" not in name)  # the mask token's is the only
    mask_row = {"mask_row": weights.pop(row_name)}
    (mask_id,) = config.trainable_token_indices
    save_file(mask_row, folder / MASK_ROW, {"mask_id": str(mask_id)})
    config.trainable_token_indices, config.inference_mode = None, True
    config.target_modules = sorted(config.target_modules)  # a set has no fixed order
    config.save_pretrained(str(folder))
    save_file(weights, folder / ADAPTER_WEIGHTS, {"format": "pt"})
    copy_file_mode(folder, folder / ADAPTER_CONFIG)


def copy_file_mode(folder: Path, example: Path) -> None:
    """Give a folder's weights the file mode of `example`: safetensors makes them private."""
    for path in folder.glob("*.safetensors"):
        path.chmod(example.stat().st_mode)


def load_adapter(
    output_dir: str | Path, device: str = "cpu", base_model: str | None = None
) -> "tuple[PeftModel, PreTrainedTokenizerBase]":
    """Load a base model with its adapter, ready for evaluation, and the tokenizer.

    `output_dir` is a run folder, or that of any other LoRA adapter; `base_model` names a base that
    has moved. Within `with model.disable_adapter():` the model is the base. On the CPU weights are
    float32; on a GPU they have the precision of the training, or, without a `config.yaml`, that of
    the base's file. A base that was quantized for the training is quantized here too. Raises
    `DataError` if the adapter is missing, damaged or of another base, `MachineError` if base or
    tokenizer cannot be loaded, `ConfigError` if `config.yaml` or the tokenizer is unfit.
    """
    folder = locate(str(output_dir))
    name = base_model or adapter_settings(folder)["base_model_name_or_path"]
    config_file = folder / "config.yaml"
    config = load_config(config_file) if config_file.is_file() else None
    gpu_dtype = weights_dtype(config) if config else "auto"
    dtype = "float32" if device == "cpu" else gpu_dtype
    base = load_base(name, dtype, config.model.quantization if config else "none")
    if not getattr(base, "is_quantized", False):  # else it is on its device
        base = base.to(device)
    return attach_adapter(base, folder, name), load_tokenizer(name)


def attach_adapter(
    base: "PreTrainedModel", folder: Path, name: str, mask_row: bool = True, strength: float = 1.0
) -> "PeftModel":
    """Put a folder's adapter, scaled by `strength`, on its base, in place, ready for evaluation.

    `name` is the base's, for messages. Without `mask_row` the trained embedding of the mask token
    is left out. Raises `DataError` if the adapter is missing, damaged or does not fit the base.
    """
    import peft

    adapter_settings(folder)  # raises if there is none
    weights, _ = _read_tensors(folder / ADAPTER_WEIGHTS)
    try:
        config, row = peft.PeftConfig.from_pretrained(str(folder)), None
        config.lora_alpha *= strength
        config.alpha_pattern = {key: strength * x for key, x in config.alpha_pattern.items()}
        if not mask_row:
            config.trainable_token_indices = None
        elif (folder / MASK_ROW).is_file():  # else `weights` hold the row, or none was trained
            tensors, metadata = _read_tensors(folder / MASK_ROW)
            row, config.trainable_token_indices = tensors["mask_row"], [int(metadata["mask_id"])]
        model = peft.get_peft_model(base, config)
        expected = peft.get_peft_model_state_dict(model, save_embedding_layers=False)
        mask_rows = {key: row for key in expected if "lora_" not in key and row is not None}
        peft.set_peft_model_state_dict(model, weights | mask_rows)
    except (RuntimeError, ValueError, TypeError, AttributeError) as error:
        # torch's message has a line with the model's name, then one for each layer, with its shapes
        lines = [*str(error).split("\n"), ""]
        remedy = f"Name its own base in {folder / ADAPTER_CONFIG}, base_model_name_or_path"
        problem = f"the adapter does not fit {name}: {lines[1].strip() or error}"
        raise DataError(f"{folder}: {problem} {remedy}") from None
    if missing := expected.keys() - weights.keys() - mask_rows.keys():
        problem = f"{len(missing)} of {len(expected)} tensors are missing, such as {min(missing)}"
        raise DataError(f"{folder / ADAPTER_WEIGHTS}: {problem}; copy it anew, or train again")
    patch_trainable_tokens(model)
    return model.eval()


def _read_tensors(path: Path) -> "tuple[dict[str, torch.Tensor], dict[str, str]]":
    """Read a safetensors file's tensors and metadata; `DataError` if damaged or not finite."""
    from safetensors import safe_open

    try:
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            metadata = file.metadata()
    except (OSError, SafetensorError) as error:
        raise DataError(f"{path}: damaged ({error}); copy it anew, or train again") from None
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise DataError(f"{path}: {name} is not finite; train again at a lower rate")
    return tensors, metadata


def adapter_settings(folder: Path) -> dict[str, Any]:
    """Read a folder's `adapter_config.json`; `DataError` if it has no complete LoRA adapter."""
    path = folder / ADAPTER_CONFIG
    if not path.is_file() or not (folder / ADAPTER_WEIGHTS).is_file():
        remedy = "name a finished output_dir, or make one: python launch_ddp.py"
        raise DataError(f"{folder}: no finished adapter there ({ADAPTER_WEIGHTS}); {remedy}")
    try:
        settings = dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise DataError(f"{path}: damaged ({error}); copy it anew") from None
    base = settings.get("base_model_name_or_path") or None
    if settings.get("peft_type") != "LORA" or not isinstance(base, str):
        raise DataError(f"{path}: not that of a LoRA adapter on a named base; name another folder")
    return settings
