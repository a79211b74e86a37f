"""Whether other programs take the adapter: by their own rules, written out from their source."""

import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file

from wuxia_core.model import load_adapter, load_base

# vLLM, vllm/config/lora.py and the modules of a Qwen3, packed ones spelt out.
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
VLLM_MODULES = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def refused_by_vllm(folder) -> str | None:
    """vllm/lora/peft_helper.py, utils.py parse_fine_tuned_lora_name, lora_model.py."""
    config = json.loads((folder / "adapter_config.json").read_text())
    if missing := {"r", "lora_alpha", "target_modules"} - set(config):
        return f"missing required configuration fields: {missing}"
    if config.get("modules_to_save") or config.get("use_dora") or config.get("bias") != "none":
        return "modules_to_save, DoRA and bias are not supported"
    if config["r"] > max(VLLM_RANKS):
        return "rank too large"
    for name in load_file(folder / "adapter_model.safetensors"):
        parts = name.removeprefix("base_model.model.").split(".")
        if parts[-1] != "weight" or parts[-2] not in ("lora_A", "lora_B"):
            return f"{name} is unsupported LoRA weight"
        if parts[-3] not in VLLM_MODULES:
            return f"{name}: expected target modules in {VLLM_MODULES}"
    return None


def refused_by_llama_cpp(folder) -> str | None:
    """convert_lora_to_gguf.py: get_base_tensor_name, LoraModel.get_tensors, PartialLoraTensor."""
    config = json.loads((folder / "adapter_config.json").read_text())
    if "lora_alpha" not in config or config.get("alora_invocation_tokens"):
        return "lora_alpha is missing, or the adapter is an aLoRA"
    pairs: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in load_file(folder / "adapter_model.safetensors").items():
        base = name.removeprefix("base_model.model.")
        found = re.fullmatch(r"(.*)\.lora_([AB])\.weight", base)
        if not found:
            return f"{name}: Not a lora_A or lora_B tensor"
        pairs.setdefault(found[1], {})[found[2]] = tensor
    for name, pair in pairs.items():
        if set(pair) != {"A", "B"} or pair["A"].shape[0] != pair["B"].shape[1] != config["r"]:
            return f"{name}: A and B do not make a pair"
        if name.startswith(("lm_head", "model.embed_tokens")):
            return f"{name}: ignored in a base with tied embeddings"
    return None


@pytest.mark.parametrize("refused", [refused_by_vllm, refused_by_llama_cpp])
def test_other_programs_take_the_adapter_and_not_one_with_the_mask_row(
    refused, short_run, tmp_path
):
    folder, _ = short_run
    assert refused(folder) is None
    (tmp_path / "adapter_config.json").write_text((folder / "adapter_config.json").read_text())
    row = {"base_model.model.model.embed_tokens.trainable_tokens_delta": torch.zeros(1, 256)}
    weights = load_file(folder / "adapter_model.safetensors")
    save_file(weights | row, tmp_path / "adapter_model.safetensors")
    assert "trainable_tokens_delta" in refused(tmp_path)


def test_the_config_is_that_of_plain_lora(short_run):
    config = json.loads((short_run[0] / "adapter_config.json").read_text())
    assert config["trainable_token_indices"] is None
    assert config["base_model_name_or_path"].startswith("/")
    assert config["target_modules"] == sorted(config["target_modules"])
    assert config["peft_type"] == "LORA" and config["inference_mode"]


def test_transformers_loads_the_adapter_by_itself(short_run):
    folder, _ = short_run
    base = load_base("data/tiny_base", torch.float32).eval()
    ids = torch.arange(20, 60)[None]
    with torch.no_grad():
        plain = base(ids).logits
        base.load_adapter(str(folder))
        theirs = base(ids).logits
        ours = load_adapter(folder)[0](ids).logits
    # The base's head is tied: the mask token's own logit is all that the row beside it changes.
    rest = torch.arange(ours.shape[-1]) != 1
    assert torch.allclose(theirs[..., rest], ours[..., rest], atol=1e-5)
    assert not torch.allclose(theirs, plain, atol=1e-3)
