import io
import json
import shutil
import sys
import warnings

import pytest
import torch

from wuxia_core.config import ModelConfig
from wuxia_core.errors import ConfigError, DataError
from wuxia_core.evaluate.context import EvalContext
from wuxia_core.evaluate.writing import generate
from wuxia_core.model import add_adapter, document_start_id, load_base, load_tokenizer
from wuxia_core.write import Sampling, encode_prompt, main, open_writer, stream


@pytest.fixture(scope="module")
def writer(short_run):
    return open_writer(str(short_run[0]))


def test_what_is_streamed_is_what_is_returned(writer):
    pieces = []
    text = stream(*writer, "剑光一闪，", Sampling(tokens=40), pieces.append)
    assert "".join(pieces) == text and len(pieces) > 5


def test_the_same_seed_writes_the_same_and_another_something_else(writer):
    texts = [stream(*writer, "夜雨", Sampling(tokens=30, seed=seed)) for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_strength_scales_from_the_base_to_the_adapter(writer):
    model, tokenizer = writer
    drawn = Sampling(tokens=80, temperature=1.5)
    with model.disable_adapter():
        base = stream(model, tokenizer, "渡口", drawn)
    texts = {s: stream(model, tokenizer, "渡口", drawn, strength=s) for s in (0, 1, 2)}
    assert texts[0] == base
    assert len(set(texts.values())) == 3
    assert stream(model, tokenizer, "渡口", drawn) == texts[1]  # nothing of it stays


def test_a_prompt_stands_behind_what_starts_a_document(tokenizer):
    start = document_start_id(tokenizer)
    assert encode_prompt(tokenizer, "剑", chat=False)[0] == start
    assert start not in encode_prompt(tokenizer, "<|endoftext|>剑", chat=False)[1:]


def test_chat_goes_through_the_template_without_thinking():
    tokenizer = load_tokenizer("data/tiny_base")
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }}：{{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}答：{% endif %}{{ enable_thinking }}"
    )
    ids = encode_prompt(tokenizer, "写一段", chat=True)
    assert tokenizer.decode(ids) == "user：写一段\n答：False"


def test_chat_keeps_special_tokens_to_its_template():
    tokenizer = load_tokenizer("data/tiny_base")
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}<|endoftext|>{% endfor %}"
    ids = encode_prompt(tokenizer, "<|endoftext|>剑<|mask|>", chat=True)
    assert [n for n in ids if n in tokenizer.all_special_ids] == [document_start_id(tokenizer)]
    assert tokenizer.decode(ids) == "<|endoftext|>剑<|mask|><|endoftext|>"


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (["--strength", "2.5"], 2, ["--strength 2.5", "0 to 2"]),
        (["--top-p", "0"], 2, ["--top-p 0"]),
        (["--tokens", "0"], 2, ["--tokens 0"]),
        (["--tokens", "100000"], 3, ["100,000", "context"]),
        (["--chat"], 2, ["--chat", "no template"]),
        (["--base-model", "no/folder"], 5, ["no/folder", "missing"]),
    ],
)
def test_bad_input_is_one_message(short_run, capsys, arguments, status, words):
    assert main([str(short_run[0]), "剑", *arguments]) == status
    error = capsys.readouterr().err
    assert error.startswith("error: ") and all(word in error for word in words)


def test_an_error_behind_the_prompt_has_a_line_of_its_own(short_run, capsys):
    assert main([str(short_run[0]), "剑", "--tokens", "100000"]) == 3
    assert capsys.readouterr().out == "剑\n"


def test_a_folder_without_adapter_is_named(tmp_path, capsys):
    assert main([str(tmp_path), "剑"]) == 3
    assert str(tmp_path) in capsys.readouterr().err


def test_a_base_that_moved_is_named_with_the_flag(short_run, tmp_path, capsys):
    """Any plain LoRA adapter will do, without our config.yaml too."""
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        shutil.copy(short_run[0] / name, tmp_path)
    path = tmp_path / "adapter_config.json"
    settings = json.loads(path.read_text()) | {"base_model_name_or_path": "/gone/base"}
    path.write_text(json.dumps(settings))
    assert main([str(tmp_path), "剑"]) == 5
    error = capsys.readouterr().err
    assert "/gone/base" in error and "--base-model" in error
    assert main([str(tmp_path), "剑光", "--tokens", "5", "--base-model", "data/tiny_base"]) == 0
    assert capsys.readouterr().out.startswith("剑光")


def test_an_adapter_of_a_base_with_other_layers_is_named(short_run, tmp_path, capsys):
    from transformers import GPT2Config, GPT2LMHeadModel

    other = GPT2Config(vocab_size=400, n_embd=32, n_layer=1, n_head=2)
    GPT2LMHeadModel(other).save_pretrained(tmp_path)
    load_tokenizer("data/tiny_base").save_pretrained(tmp_path)
    assert main([str(short_run[0]), "剑", "--base-model", str(tmp_path)]) == 3
    assert "does not fit" in capsys.readouterr().err


def test_prompts_are_asked_for_until_an_empty_line(short_run, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("夜雨\n渡口\n\n剑\n"))
    assert main([str(short_run[0]), "--tokens", "8", "--base"]) == 0
    lines = capsys.readouterr().out.replace("prompt> ", "").split("tuned: ")
    assert [line[:2] for line in lines[1:]] == ["夜雨", "渡口"]
    assert all("base: " in line for line in lines[1:])


def test_prompts_that_are_not_utf8_are_named(short_run, capsys, monkeypatch):
    prompts = io.TextIOWrapper(io.BytesIO("剑光\n".encode("gbk")), "utf-8")
    monkeypatch.setattr(sys, "stdin", prompts)
    assert main([str(short_run[0])]) == 2
    assert "not UTF-8" in capsys.readouterr().err


def test_the_end_of_text_ends_it(writer):
    model, tokenizer = writer
    end = document_start_id(tokenizer)
    head = model.get_base_model().lm_head
    hook = head.register_forward_hook(
        lambda module, inputs, logits: torch.where(
            torch.arange(logits.shape[-1]) == end, 100.0, logits
        )
    )
    try:
        assert stream(model, tokenizer, "剑", Sampling(tokens=50)) == ""
    finally:
        hook.remove()


def test_settings_out_of_range_are_refused():
    for wrong in ({"temperature": -1}, {"repetition_penalty": 0}, {"seed": -1}, {"top_p": 1.5}):
        with pytest.raises(ConfigError):
            Sampling(**wrong)
    with pytest.raises((ConfigError, DataError)):
        Sampling(tokens=-3)
    assert not Sampling(temperature=1e-39).settings()["do_sample"]  # as 0


def test_on_two_cards_the_generators_are_kept_without_a_warning(monkeypatch):
    """Only those of the model's own card, and of the CPU, are used."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.random, "_fork_rng_warned_already", False)
    base, tokenizer = load_base("data/tiny_base", torch.float32), load_tokenizer("data/tiny_base")
    model = add_adapter(base, ModelConfig(), mask_id=1).eval()
    before = torch.get_rng_state()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "CUDA reports")
        stream(model, tokenizer, "夜雨", Sampling(tokens=2), str)
        generate(EvalContext(model, tokenizer, None, None), ["夜雨"], seed=1)
    assert torch.equal(torch.get_rng_state(), before)
