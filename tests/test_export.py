import json
import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
import yaml
from peft.helpers import rescale_adapter_scale
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from wuxia_core.config import PROJECT, ModelConfig
from wuxia_core.export import export, main
from wuxia_core.model import add_adapter, load_adapter, load_base, load_tokenizer, write_adapter

BASE = str(PROJECT / "data" / "tiny_base")
LLAMA_CPP = os.environ.get("LLAMA_CPP")  # a copy of it, to try its own converters
PLAIN = """
import sys
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
inputs = tokenizer("剑光一闪", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=5, do_sample=False)[0]))
assert not any(name.startswith(("wuxia_core", "peft")) for name in sys.modules)
"""


def adapted(size=0.02):
    """The bundled base with a random adapter; the mask token's row is far from the base's."""
    torch.manual_seed(0)
    model = add_adapter(load_base(BASE, torch.float32), ModelConfig(), 1)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=size)
            if "trainable_tokens" in name:
                weight += 1
    return model.eval()


@pytest.fixture
def run(tmp_path):
    """A folder with an adapter, and nothing else."""
    folder = tmp_path / "run"
    folder.mkdir()
    write_adapter(adapted(), folder)
    return folder


def stored_in(folder: Path, quantization: str = "none", **training: bool) -> None:
    """Make it a run's folder whose mixture is gone."""
    model = {"model_name_or_path": BASE, "quantization": quantization}
    settings = {"model": model, "training": training}
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))


def leftovers(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()] if folder.exists() else []


@pytest.mark.parametrize("form", ["plain", "older"])
def test_the_merged_model_computes_what_the_adapter_does(run, form):
    model = adapted()
    stored_in(run)
    if form == "older":  # the mask token's row inside the adapter
        (run / "mask_row.safetensors").unlink()
        model.save_pretrained(run)
        assert any(
            "trainable_tokens" in name for name in load_file(run / "adapter_model.safetensors")
        )
    assert "limit in float32 0.001" in export(run)
    folder = run / "export" / "merged"
    merged = AutoModelForCausalLM.from_pretrained(folder)
    base = load_base(BASE, torch.float32)
    assert merged.dtype == torch.float32 and merged.config.use_cache
    rows = merged.get_input_embeddings().weight
    assert torch.equal(rows, base.get_input_embeddings().weight)  # the mask token's among them
    ids = torch.randint(2, 8000, (2, 30))
    trained, _ = load_adapter(run)
    with torch.no_grad():
        expected, got = trained(ids).logits, merged(ids).logits
        assert (base(ids).logits - got).abs().max() > 0.5
    others = torch.arange(8192) != 1  # its logit is the mask token's own
    assert torch.allclose(expected[..., others], got[..., others], atol=1e-4)
    texts = ["剑光一闪，<|mask|>他", "第12回\n  abc"]
    before = AutoTokenizer.from_pretrained(BASE)(texts).input_ids
    assert AutoTokenizer.from_pretrained(folder)(texts).input_ids == before


def test_plain_transformers_takes_it_and_the_card_names_titles_and_no_path(
    short_run, tmp_path, capsys
):
    folder, _ = short_run
    assert main([str(folder), "--out", str(tmp_path / "merged")]) == 0
    command = [sys.executable, "-c", PLAIN, str(tmp_path / "merged")]
    finished = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert finished.returncode == 0, finished.stderr[-2000:]
    assert finished.stdout.startswith("剑光一闪")
    assert "|Δ log p|" in capsys.readouterr().out
    card = (tmp_path / "merged" / "README.md").read_text(encoding="utf-8")
    header = next(yaml.safe_load_all(card))
    assert header["base_model"] == "tiny_base"
    outline = pd.read_parquet(folder.parent / "mixture" / "documents.parquet")
    for book, rows in outline.groupby("book"):
        assert (f"《{book}》" in card) == ("train" in set(rows["split"]))
    for words in ("learning_rate", "span_ratio", "lora_alpha", "Licence"):
        assert words in card
    assert str(folder.parent) not in card and str(PROJECT) not in card
    for text in outline["text"]:
        assert text[:40] not in card


def test_what_a_quantized_base_learned_in_bfloat16_is_stored_so_unquantized(run):
    stored_in(run, "4bit", bf16=True)
    assert "bfloat16" in export(run)
    weights = load_file(run / "export" / "merged" / "model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.bfloat16}


def test_what_computes_something_else_is_refused_and_nothing_is_left(run, capsys):
    """A huge adapter does not survive being rounded to bfloat16."""
    stored_in(run, bf16=True)
    path = run / "adapter_model.safetensors"
    save_file({name: weight * 100 for name, weight in load_file(path).items()}, path)
    there = leftovers(run)
    assert main([str(run)]) == 3
    assert "computes something else" in capsys.readouterr().err
    assert leftovers(run) == there


def test_a_folder_that_exists_is_left_alone(run, tmp_path, capsys):
    assert main([str(run), "--out", str(tmp_path)]) == 2
    assert f"--out {tmp_path}: exists" in capsys.readouterr().err


def test_what_is_no_adapter_of_this_base_is_named_by_its_folder(run, tmp_path, capsys):
    assert main([str(tmp_path)]) == 3
    assert main([str(run), "--base-model", "no/base"]) == 5
    path = run / "adapter_model.safetensors"
    save_file({name: weight[:-1] for name, weight in load_file(path).items()}, path)
    assert main([str(run)]) == 3
    said = capsys.readouterr().err
    assert f"{tmp_path}: no finished adapter" in said and f"{run}: the adapter does not fit" in said
    assert "no/base (missing)" in said and "--base-model" in said and ".merged-" not in said
    settings = json.loads((run / "adapter_config.json").read_text())
    settings["trainable_token_indices"] = [1, 2]
    (run / "adapter_config.json").write_text(json.dumps(settings))
    assert main([str(run)]) == 3


def test_a_full_disk_leaves_nothing(run, small_disk, capsys):
    disk = small_disk(8)
    assert main([str(run), "--out", str(disk / "merged")]) == 5
    assert "cannot be written" in capsys.readouterr().err
    assert not list(disk.iterdir())


@pytest.mark.parametrize("to", ["gguf", "gguf-adapter"])
def test_without_llama_cpp_it_says_where_to_get_it(run, tmp_path, capsys, to):
    for options in ([], ["--llama-cpp", str(tmp_path)]):
        assert main([str(run), "--to", to, *options]) == 2
        assert "git clone" in capsys.readouterr().err
    assert not (run / "export").exists()


@pytest.mark.parametrize(
    ("failure", "status", "said"),
    [
        (
            "NotImplementedError('no such tokenizer')",
            3,
            "cannot convert it: NotImplementedError: no s",
        ),
        ("OSError(28, 'No space left on device')", 5, "No space left on device"),
    ],
)
def test_a_converter_that_fails_leaves_nothing(run, tmp_path, capsys, failure, status, said):
    pytest.importorskip("gguf")
    (tmp_path / "llama" / "gguf-py").mkdir(parents=True)
    (tmp_path / "llama" / "convert_lora_to_gguf.py").write_text(f"raise {failure}")
    there = leftovers(run)
    options = ["--to", "gguf-adapter", "--llama-cpp", str(tmp_path / "llama")]
    assert main([str(run), *options]) == status
    assert said in capsys.readouterr().err
    assert leftovers(run) == there


@pytest.mark.skipif(not LLAMA_CPP, reason="set LLAMA_CPP to a copy of llama.cpp")
def test_llama_cpps_converters(run, capsys):
    """They do not know the bundled tokenizer, and an adapter needs none."""
    options = [str(run), "--llama-cpp", LLAMA_CPP]
    assert main([*options, "--to", "gguf"]) == 3
    assert "pre-tokenizer was not recognized" in capsys.readouterr().err
    assert main([*options, "--to", "gguf-adapter", "--strength", "0"]) == 2
    assert main([*options, "--to", "gguf-adapter"]) == 0
    folder = run / "export" / "gguf-adapter"
    lines = (folder / "Modelfile").read_text().splitlines()
    assert lines[:2] == [f"FROM {BASE}", "ADAPTER ./adapter.gguf"]
    assert "PARAMETER temperature 0.9" in lines and "PARAMETER top_p 0.95" in lines
    assert (folder / "adapter.gguf").stat().st_size > 1_000_000
    settings = json.loads((run / "adapter_config.json").read_text()) | {"use_rslora": True}
    (run / "adapter_config.json").write_text(json.dumps(settings))
    assert main([*options, "--to", "gguf-adapter", "--out", str(run / "other")]) == 3
    assert "not the adapter's" in capsys.readouterr().err


def test_a_merged_model_has_the_strength_that_was_asked_for(run, tmp_path):
    assert main([str(run), "--out", str(tmp_path / "half"), "--strength", "0.5"]) == 0
    assert "strength: 0.5" in (tmp_path / "half" / "README.md").read_text("utf-8")
    assert main([str(run), "--out", str(tmp_path / "nan"), "--strength", "nan"]) == 2
    models = load_base(str(tmp_path / "half"), torch.float32).eval(), load_adapter(run)[0]
    ids = load_tokenizer(BASE)("剑光一闪，那人已到了门外。", return_tensors="pt").input_ids
    with torch.inference_mode(), rescale_adapter_scale(models[1], 0.5):
        half, scaled = (model(ids).logits[..., 2:] for model in models)  # no mask token
    torch.testing.assert_close(half, scaled, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(half, load_base(BASE, "float32")(ids).logits[..., 2:], atol=0.1)
