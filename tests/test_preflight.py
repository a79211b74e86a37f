import json
import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
import transformers.integrations
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import Qwen3Config, Qwen3ForCausalLM

from wuxia_core import preflight
from wuxia_core.config import PROJECT, ModelConfig, load_config
from wuxia_core.errors import ConfigError, MachineError
from wuxia_core.mixing import mix
from wuxia_core.model import add_adapter
from wuxia_core.preflight import plan
from wuxia_core.preflight.plan import GIB, layer_bytes, memory, shape_of
from wuxia_core.run import check_unchanged
from wuxia_core.torchrun import Processes

REAL = PROJECT / "configs" / "qwen3_8b_2x4090.yaml"
SMALL = {"hidden_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 80,
         "intermediate_size": 768, "vocab_size": 100, "use_cache": False}  # fmt: skip


@pytest.fixture(scope="module")
def eight():
    """The shape of Qwen3-8B, with the recipe's adapter."""
    return plan.read_shape(load_config(REAL).model)


@pytest.fixture(scope="module")
def cards():
    """Two RTX 4090."""
    return plan.planned_device(load_config(REAL), 2)


def text(tokens, windows, held_out=100):
    return plan.Text(np.array(tokens), np.array(windows), held_out)


def hours(said, what):
    """The hours of a line of a plan, at least and at most."""
    low, high = re.search(rf"{what}.*  ([\d.,]+)(?: to ([\d.,]+))?$", said, re.MULTILINE).groups()
    return float(low.replace(",", "")), float((high or low).replace(",", ""))


def test_the_real_recipe_is_what_the_arithmetic_of_its_makers_says(eight, cards):
    """Qwen3-8B has 8.2 B parameters, 6.95 B of them in the linear layers; LoRA r 16 adds 43.6 M."""
    assert eight.linear_parameters() == pytest.approx(6.95e9, rel=2e-3)
    assert eight.parameters == 8_190_735_360
    needs = memory(load_config(REAL), eight, cards)
    assert needs["weights"] / GIB == pytest.approx(15.3, abs=0.1)
    assert needs["activations (checkpointed)"] / GIB == pytest.approx(1.1, abs=0.05)
    assert sum(needs.values()) / GIB == pytest.approx(19.58, rel=0.01)


@pytest.mark.parametrize(
    "targets", [["q_proj", "v_proj"], load_config(REAL).model.lora_target_modules]
)
def test_the_adapter_has_the_weights_that_peft_gives_it(targets):
    config = load_config(REAL, ["model.model_name_or_path=Qwen/Qwen3-4B", "model.lora_r=8"]).model
    config.lora_target_modules = targets
    with torch.device("meta"):
        base = Qwen3ForCausalLM(Qwen3Config(**SMALL, num_hidden_layers=3, tie_word_embeddings=True))
        shape = shape_of(base)
        trained, _ = add_adapter(base, config, mask_id=0).get_nb_trainable_parameters()
    assert shape.adapter_parameters(config) == trained


@pytest.mark.parametrize(
    ("name", "hidden_size", "intermediate_size", "tied"),
    [("Qwen/Qwen3-8B", 4096, 12288, False), ("Qwen/Qwen3-4B", 2560, 9728, True)],
)
def test_the_shapes_of_the_shipped_models_are_those_of_transformers(
    name, hidden_size, intermediate_size, tied
):
    sizes = {"hidden_size": hidden_size, "intermediate_size": intermediate_size,
             "num_hidden_layers": 36, "num_key_value_heads": 8, "max_position_embeddings": 40960,
             "tie_word_embeddings": tied}  # fmt: skip
    with torch.device("meta"):
        base = Qwen3ForCausalLM(Qwen3Config(**sizes))
    assert plan.read_shape(ModelConfig(model_name_or_path=name)) == shape_of(base)


def uncast(model):
    """Switch off PEFT's copies of inputs to float32, as training in half precision does."""
    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            module.cast_input_dtype_enabled = False
    return model


def saved_bytes(layers, **settings):
    """What autograd keeps of a forward pass, in bytes a token."""
    from peft import LoraConfig, get_peft_model

    bf16, dropout = settings["bf16"], settings["dropout"]
    base = Qwen3ForCausalLM(Qwen3Config(**SMALL, num_hidden_layers=layers))
    base = base.to(torch.bfloat16 if bf16 else torch.float32)
    targets = load_config(REAL).model.lora_target_modules
    lora = LoraConfig(r=16, lora_dropout=dropout, target_modules=targets)
    model = uncast(get_peft_model(base, lora))
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    seen = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            seen[storage.data_ptr()] = storage.nbytes(), tensor
        return tensor

    with (
        torch.autocast("cpu", torch.bfloat16, enabled=bf16),
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
    ):
        model.train()(input_ids=torch.zeros(2, 256, dtype=torch.int64))
    return sum(size for size, _ in seen.values()) / 512


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.05])
def test_activations_are_what_autograd_keeps(bf16, dropout):
    config = load_config(REAL, [f"training.bf16={bf16}", f"model.lora_dropout={dropout}"])
    shape = shape_of(Qwen3ForCausalLM(Qwen3Config(**SMALL, num_hidden_layers=1)))
    settings = {"bf16": bf16, "dropout": dropout}
    measured = saved_bytes(3, **settings) - saved_bytes(2, **settings)
    assert layer_bytes(config, shape, on_card=False) == pytest.approx(measured, rel=0.05)


def test_a_tiny_run_needs_what_is_forecast(short_run):
    _, said = short_run
    forecast = float(re.search(r"in all +([\d.]+) of", said)[1])
    measured = float(re.search(r"peak ([\d.]+) GiB a process", said)[1])
    assert forecast == pytest.approx(measured, rel=0.2)


def test_a_run_that_does_not_fit_is_told_what_to_change(eight, cards):
    config = load_config(REAL, ["training.gradient_checkpointing=false"])
    counted = text([1e8, 1e8], [1e5, 1e5])
    said = plan.describe_plan(config, eight, cards, counted)
    assert "DOES NOT FIT" in said
    assert "training.gradient_checkpointing=true" in said
    assert ": fits" in plan.describe_plan(load_config(REAL), eight, cards, counted)


def test_hours_are_a_range_from_the_cards_rates_to_a_share_of_them(eight, cards):
    """A GB of novels on two RTX 4090: half of a step is products, half is moving tensors."""
    config = load_config(REAL, ["plan.price_per_hour=2"])
    said = plan.describe_plan(config, eight, cards, text([223e6, 274e6], [217_774, 267_579]))
    assert hours(said, "an epoch") == pytest.approx((14.4, 29.5), rel=0.02)
    assert "costs" in said and "estimated from the files' sizes" in said
    assert hours(said, "27 measurements")[1] < hours(said, "the run")[1] / 10
    assert hours(said, "the scorecard")[0] > 0.02
    limited = load_config(REAL, ["evaluation.minutes=0.6"])
    told = plan.describe_plan(limited, eight, cards, text([1e6, 1e6], [1000, 1000], 10_000))
    assert hours(told, "the scorecard") == (0.01, 0.01)
    counted = (text([1000 * windows] * 2, [windows] * 2, 1e6) for windows in (1000, 1e6))
    short, long = (plan.describe_plan(load_config(REAL), eight, cards, each) for each in counted)
    assert hours(short, "the scorecard") == (0.33, 0.33)  # 20 minutes, else a tenth of the training
    trained = np.add(hours(long, "the run"), hours(long, "measurements"))
    assert hours(long, "the scorecard") == pytest.approx(trained / 10, rel=1e-3)


def test_operations_are_counted_by_hand():
    config = load_config(REAL, ["training.gradient_checkpointing=false", "masking.mask_ratio=0.5"])
    sizes = {"hidden_size": 2, "num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 2,
             "intermediate_size": 4, "vocab_size": 10, "num_hidden_layers": 1}  # fmt: skip
    shape = shape_of(Qwen3ForCausalLM(Qwen3Config(**sizes)))
    config.data.max_length = 8
    # 16 + 24 linear, 20 of the head; 8 keys, half of them seen, for queries and values 2 wide
    for again, passes in ((False, 4), (True, 6)):
        config.training.gradient_checkpointing = again
        (trained, _), (measured, _) = plan.token_costs(config, shape)
        assert trained == passes * (40 + 16) + 4 * 0.5 * 20
        assert measured == 4 * (40 + 16) + 2 * 1.5 * 20


def test_measurements_of_long_books_take_a_tenth_of_the_run(eight, cards):
    config = load_config(REAL)
    times, most = plan.held_out_limits(config, 1000, 2)
    assert times == 2 and 2 * most * times <= 0.1 * 48 * 64  # two sources
    said = plan.describe_plan(config, eight, cards, text([1e9, 1e9], [1e6, 1e6], 1e6))
    assert hours(said, "95 measurements")[1] <= hours(said, "the run")[1] / 10
    config.training.eval_steps = 1
    said = plan.describe_plan(config, eight, cards, text([1e6, 1e6], [1000, 1000], 1e6))
    assert "raise training.eval_steps" in said


def test_held_out_text_needs_memory_too(eight, cards):
    """All logits of one window of 8,192 tokens are more than a training step."""
    named = ["data.max_length=8192", "training.per_device_train_batch_size=1"]
    config = load_config(REAL, named)
    needs = memory(config, eight, cards)
    logits = 8 * 8192 * eight.vocab_size
    assert "transient peak (held-out measurement)" in needs
    known = ("weights", "adapter, gradients, optimizer", "reserve")
    assert sum(needs.values()) - sum(needs[part] for part in known) == pytest.approx(logits)
    assert not plan.fits(config, eight, cards)
    config.data.max_length = 1024
    assert plan.fits(config, eight, cards)


def test_what_the_machine_has_no_memory_for_is_not_begun(config, tmp_path, capsys):
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    config.training.per_device_train_batch_size = 1_000_000
    with pytest.raises(MachineError, match=r"memory.*per_device_train_batch_size"):
        preflight.prepare_run(config, tmp_path / "run", Processes(1))
    assert "DOES NOT FIT" in capsys.readouterr().out
    assert not (tmp_path / "run").exists()
    assert "DOES NOT FIT" in preflight.forecast(config, 1)


@pytest.mark.parametrize(("steps", "warm"), [(40, 2), (3000, 100)])
def test_a_warm_up_that_nobody_set_follows_the_run_and_is_written_down(
    config, tmp_path, steps, warm, capsys
):
    config.training.warmup_steps, config.training.max_steps = None, steps
    (tmp_path / "run").mkdir()
    preflight.prepare_run(config, tmp_path / "run", Processes(2))
    assert load_config(tmp_path / "run/config.yaml").training.warmup_steps == warm
    assert "TOO LONG" not in capsys.readouterr().out
    config.training.warmup_steps = None
    check_unchanged(config, tmp_path / "run", None, 2)
    assert config.training.warmup_steps == warm
    config.training.warmup_steps, config.training.bf16 = steps // 4, True
    assert "TOO LONG: the warm-up" in preflight.forecast(config, 2)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("data.max_length=5000", "data.max_length 5000: data/tiny_base reads .* tokens at most"),
        ("training.fp16=true", "training.fp16: needs a GPU"),
        ("model.lora_target_modules=[q_proj,lm_head]", "model.lora_target_modules: lm_head"),
        ("training.report_to=[tensorbord]", "training.report_to tensorbord: .* tensorboard"),
        ("training.report_to=[tensorboard,clearml]", "report_to clearml: not installed"),
        ("training.report_to=[kubeflow]", "report_to kubeflow: not installed"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_loaded(override, said, tmp_path):
    if torch.cuda.is_available() and "fp16" in override:
        pytest.skip("this machine has a GPU")
    refused = load_config(PROJECT / "configs" / "sample.yaml", [override])
    with pytest.raises(ConfigError, match=said):
        preflight.prepare_run(refused, tmp_path, Processes(1))


def test_a_tracker_is_known_by_what_transformers_needs_of_it(config, monkeypatch):
    """kubeflow is no Python package; azure_ml is in the package azureml."""
    monkeypatch.setenv("KUBEFLOW_TRAINER_SERVER_URL", "http://localhost")
    monkeypatch.setattr(transformers.integrations, "is_azureml_available", lambda: True)
    config.training.report_to = ["tensorboard", "kubeflow", "azure_ml"]
    preflight.prepare.check_packages(config)


def test_a_plan_alone_asks_for_no_card_and_no_package(config):
    config.training.fp16, config.model.quantization = True, "8bit"
    config.training.report_to = ["clearml"]
    assert "weights (8bit linear layers)" in preflight.forecast(config, 1)
    config.plan.card = "RTX 3090"
    assert "RTX 3090" in preflight.forecast(config, 1)


def test_an_unknown_card_is_named_with_the_known_ones():
    with pytest.raises(ConfigError, match=r"plan.card RTX 9999: not known; .*RTX 4090"):
        preflight.forecast(load_config(REAL, ["plan.card=RTX 9999"]), None)


def test_the_real_recipe_is_planned_without_a_hub_a_card_or_a_mixture(tmp_path):
    mixture = f"data.processed_data_file={tmp_path / 'none'}"
    config = load_config(REAL, [f"data.data_dir={PROJECT / 'data' / 'sample'}", mixture])
    said = preflight.forecast(config, None)
    assert said.startswith("plan, arithmetic: Qwen/Qwen3-8B, 8.19 B parameters, on 2 × RTX 4090")
    assert "fits" in said and not (tmp_path / "none").exists()


@pytest.mark.parametrize("name", ["qwen3_0.6b_laptop", "qwen3_8b_base_2x4090", "qwen3_4b_2x4090"])
def test_the_other_recipes_are_planned_without_a_hub_and_fit(name, tmp_path):
    sample = [f"data.data_dir={PROJECT / 'data/sample'}", f"data.processed_data_file={tmp_path}/no"]
    said = preflight.forecast(load_config(PROJECT / f"configs/{name}.yaml", sample), None)
    assert "fits" in said and "Qwen/Qwen3" in said


@pytest.mark.parametrize(
    ("name", "facts"),
    [
        ("NVIDIA GeForce RTX 4090", [24, 165.2, 1008, True]),
        ("NVIDIA GeForce RTX 4090 D", [24, 147, 1008, True]),
        ("NVIDIA GeForce RTX 4070 Ti", [12, 80.2, 504, True]),
        ("NVIDIA A100-SXM4-40GB", [40, 312, 1555, True]),
        ("NVIDIA H100 80GB HBM3", [80, 989, 3350, True]),
        ("NVIDIA H100 PCIe", [80, 756, 2000, True]),
        ("NVIDIA RTX 6000 Ada Generation", [48, 364.2, 960, True]),
        ("NVIDIA RTX PRO 6000 Blackwell Workstation Edition", [96, 503.8, 1792, True]),
        ("Tesla V100-SXM2-32GB", [32, 125, 900, False]),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", [np.nan] * 4),
        ("NVIDIA GH200 480GB", [np.nan] * 4),
    ],
)
def test_cards_are_known_by_torchs_names_for_them(name, facts):
    found = np.array(plan.card_facts(load_config(REAL), name), float)
    assert np.array_equal(found, np.array(facts, float), equal_nan=True)


def test_any_card_is_planned_by_its_figures(eight):
    figures = ["plan.card_gib=64", "plan.card_tflops=320", "plan.card_gbs=1600"]
    config = load_config(REAL, ["plan.card=Ascend", *figures])
    device = plan.planned_device(config, 2)
    assert device.memory == pytest.approx(64 * GIB, rel=0.03)
    told = plan.describe_plan(config, eight, device, text([1e9, 1e9], [1e6, 1e6]))
    assert hours(told, "an epoch")[0] > 1 and "320 TFLOP/s and 1600 GB/s" in told
    config.plan.card_gbs = None
    told = plan.describe_plan(config, eight, plan.planned_device(config, 2), text([1, 1], [1, 1]))
    assert "hours: Ascend" in told


def test_a_plan_for_a_card_without_bfloat16_says_so():
    with pytest.raises(ConfigError, match=r"training.bf16: T4"):
        preflight.forecast(load_config(REAL, ["plan.card=T4"]), None)


@pytest.fixture
def two_cards(tmp_path, monkeypatch):
    """Pretend that this machine has two unequal cards; only another process may look at them."""
    (tmp_path / "sitecustomize.py").write_text(
        "import torch.cuda, types\n"
        "cards = [('NVIDIA GeForce RTX 4090', int(25e9), 8), ('NVIDIA L4', int(23e9), 8)]\n"
        "names = ('name', 'total_memory', 'major')\n"
        "card = lambda n: types.SimpleNamespace(**dict(zip(names, cards[n])))\n"
        "torch.cuda.device_count, torch.cuda.get_device_properties = lambda: 2, card\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", None)
    monkeypatch.delenv("NCCL_P2P_DISABLE", raising=False)
    monkeypatch.setenv("NCCL_IB_DISABLE", "0")
    plan.machine_cards.cache_clear()
    yield
    plan.machine_cards.cache_clear()


def test_another_process_looks_at_the_cards_and_the_least_counts(two_cards):
    both, one = (plan.this_device(load_config(REAL), count) for count in (2, 1))
    assert not torch.cuda.is_initialized()
    assert "UNEQUAL" in both.name and "RTX 4090" in both.name and "L4" in both.name
    assert (both.memory, *both.rates) == (23e9, 121, 300)  # torch's memory is not cut again
    assert (one.name, one.memory) == ("NVIDIA GeForce RTX 4090", 25e9)
    assert preflight.prepare.set_nccl_for_rtx40() == ["NCCL_P2P_DISABLE=1 (GeForce RTX 40)"]
    del os.environ["NCCL_P2P_DISABLE"]


def test_cards_that_do_not_answer_are_named(two_cards, tmp_path):
    (tmp_path / "sitecustomize.py").write_text("import os; os._exit(3)")
    with pytest.raises(MachineError, match="nvidia-smi"):
        plan.this_device(load_config(REAL), 2)


def test_steps_and_cost_are_of_the_run_not_of_its_epochs(eight, cards):
    counted = text([1e9, 1e9], [1000, 1000])  # 16 steps an epoch, of long windows
    costs = []
    for override in ("training.max_steps=16", "training.max_steps=32", "training.max_steps=-1"):
        config = load_config(REAL, [override])
        said = plan.describe_plan(config, eight, cards, counted)
        costs.append(hours(said, "the run")[0])
    assert costs[1] == pytest.approx(2 * costs[0], rel=1e-3) and costs[2] == pytest.approx(
        3 * costs[0], rel=1e-3
    )
    few = load_config(REAL, ["training.num_train_epochs=0.1"])
    assert "the run: 2 steps of 64" in plan.describe_plan(few, eight, cards, counted)  # of 1.6


@pytest.mark.parametrize("encoding", ["utf-8", "gb18030"])
def test_the_estimate_of_tokens_holds_what_is_measured(tmp_path, encoding):
    (tmp_path / "novels").mkdir()
    for path in (PROJECT / "data/sample").glob("*.txt"):
        text = path.read_text(encoding="utf-8")
        (tmp_path / "novels" / path.name).write_bytes(text.encode(encoding))
    names = [f"data.data_dir={tmp_path / 'novels'}", "data.general_file=null", "data.val_ratio=0"]
    config = load_config(
        PROJECT / "configs/sample.yaml",
        [*names, f"data.processed_data_file={tmp_path / 'mixture'}"],
    )
    few, many = plan.estimated_text(config).tokens
    tokens = plan.measured_text(config, mix(config)).tokens[0]
    assert few < tokens < many


@pytest.mark.parametrize(("ratio", "share"), [(0.1, 0.1), (0.4, 0.32)])
def test_the_estimate_reckons_with_what_is_really_held_out(tmp_path, novels, ratio, share):
    """Of two novels the last chapters at 0.1, one at 0.4."""
    (tmp_path / "novels").mkdir()
    for book in ("绿牡丹", "续小五义"):
        shutil.copy(novels / "wuxia" / f"{book}.txt", tmp_path / "novels")
    names = [f"data.data_dir={tmp_path / 'novels'}", "data.general_file=null"]
    place = f"data.processed_data_file={tmp_path / 'mixture'}"
    overrides = [*names, place, f"data.val_ratio={ratio}"]
    config = load_config(PROJECT / "configs/sample.yaml", overrides)
    sizes = sum(path.stat().st_size for path in (tmp_path / "novels").iterdir())
    few = plan.estimated_text(config).tokens[0]
    assert few == pytest.approx(sizes / 4.5 * (1 - share), rel=0.05)
    mixture = mix(config)
    held_out = mixture.outline.query("split == 'validation'")["characters"].sum()
    assert held_out / mixture.outline["characters"].sum() == pytest.approx(share, abs=0.02)


def test_general_text_below_the_novels_is_not_planned_as_novels(tmp_path):
    config = load_config(
        PROJECT / "configs/sample.yaml", [f"data.processed_data_file={tmp_path}/m"]
    )
    with_general = plan.estimated_text(config).tokens
    config.data.general_ratio = 0.0
    assert plan.estimated_text(config).tokens == pytest.approx(0.9 * with_general)
    sizes = sum(path.stat().st_size for path in (PROJECT / "data/sample").glob("*.txt"))
    assert plan.estimated_text(config).tokens[1] < sizes / 3.65


@pytest.mark.parametrize(
    ("settings", "known"),
    [
        ({}, True), ({"num_key_value_heads": None}, True), ({"model_type": "qwen3_moe"}, False),
        ({"model_type": "gpt2"}, False), ({"model_type": None}, False),
        ({"hidden_size": "2"}, False),
    ],
)  # fmt: skip
def test_only_shapes_that_are_known_are_planned(tmp_path, settings, known):
    told = json.loads((PROJECT / "data/tiny_base/config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(told | settings))
    model = ModelConfig(model_name_or_path=str(tmp_path))
    assert (plan.read_shape(model) is not None) == known
    (tmp_path / "config.json").write_text("{")
    assert plan.read_shape(model) is None


def ask(tmp_path, *flags):
    return subprocess.run([sys.executable, str(PROJECT / "launch_ddp.py"), *flags], cwd=tmp_path,
                          capture_output=True, text=True, timeout=600)  # fmt: skip


@pytest.mark.slow
def test_the_plan_alone_starts_nothing(tmp_path):
    novels = f"data.data_dir={PROJECT / 'data/sample'}"
    finished = ask(tmp_path, "--plan", "--config", str(REAL), "--set", novels, "--set",
                   "data.processed_data_file=m")  # fmt: skip
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.startswith("plan, arithmetic: Qwen/Qwen3-8B")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_plan_that_is_measured_times_its_steps_without_what_lies_between(tmp_path):
    finished = ask(tmp_path, "--plan", "--measure", "--set", "data.processed_data_file=m", "--set",
                   "training.eval_steps=1", "--set", "training.save_steps=1")  # fmt: skip
    assert finished.returncode == 0, finished.stderr[-3000:]
    assert "measured over 18 steps" in finished.stderr + finished.stdout
    assert [path.name for path in tmp_path.iterdir() if not path.name.startswith(".")] == ["m"]


@pytest.mark.long
def test_what_fails_in_a_process_of_a_measured_plan_keeps_its_words_and_status(tmp_path):
    finished = ask(tmp_path, "--plan", "--measure", "--set", "training.learning_rate=1e30", "--set",
                   "data.processed_data_file=m")  # fmt: skip
    assert finished.returncode == 4 and "is not a finite number" in finished.stderr
    assert "Traceback" not in finished.stderr
