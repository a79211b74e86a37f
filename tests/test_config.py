import json
import re

import pytest

from wuxia_core.config import PROJECT, Config, load_config
from wuxia_core.errors import ConfigError

README = PROJECT / "README.md"
KEYS = re.compile(r"(?<=<!-- keys -->\n).*?(?=<!-- /keys -->)", re.DOTALL)

OLD_FILE = """\
model: {model_name_or_path: "Qwen/Qwen3-8B", lora_r: 16}
data: {data_dir: "./data", max_length: 1024}
training: {num_train_epochs: 3, per_device_train_batch_size: 4, gradient_accumulation_steps: 8,
           learning_rate: 5.0e-5, bf16: true}
"""


@pytest.fixture
def read(tmp_path):
    def read(text, overrides=()):
        path = tmp_path / "my.yaml"
        path.write_text(text, encoding="utf-8")
        return load_config(path, list(overrides))

    return read


def test_a_file_of_the_published_recipe_loads_unchanged(read):
    config = read(OLD_FILE)
    assert config.training.learning_rate == 5e-5
    assert config.training.output_dir == "./output/wuxia_lora"
    assert config.masking.mask_ratio == 0.15
    assert config.data.general_ratio == 0.1


def test_every_key_of_older_files_is_known(read):
    config = read(
        """
model: {model_name_or_path: m, use_lora: true, lora_r: 8, lora_alpha: 16, lora_dropout: 0.05,
        lora_target_modules: [q_proj]}
data: {data_dir: d, processed_data_file: p.jsonl, max_length: 512, min_length: 64, stride: 400,
       val_ratio: 0.05}
training: {output_dir: o, num_train_epochs: 1, per_device_train_batch_size: 1,
  per_device_eval_batch_size: 1, gradient_accumulation_steps: 1, learning_rate: 1e-4,
  weight_decay: 0.01, warmup_steps: 1, logging_steps: 1, save_steps: 1, eval_steps: 1,
  save_total_limit: 1, fp16: false, bf16: true, gradient_checkpointing: true, seed: 1}
"""
    )
    assert config.training.learning_rate == 1e-4
    assert config.data.stride == 400


@pytest.mark.parametrize("written", ["5e-5", "5E-5", "0.00005", "5.0e-05"])
def test_a_number_that_yaml_takes_for_a_string_is_read(read, written):
    assert read(f"training: {{learning_rate: {written}}}").training.learning_rate == 5e-5


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("training:\n  learning_rte: 1", ["my.yaml:2", "training.learning_rte", "learning_rate"]),
        ("training:\n  max_length: 1", ["my.yaml:2", "did you mean data.max_length"]),
        ("trainning:\n  seed: 1", ["my.yaml:1", "did you mean training?"]),
        ("training:\n  bf16: yes please", ["my.yaml:2", "training.bf16", "'yes please'"]),
        ("training:\n  seed: '7'", ["my.yaml:2", "training.seed", "'7'"]),
        ("training:\n  learning_rate: fast", ["my.yaml:2", "training.learning_rate", "'fast'"]),
        ("data:\n  general_ratio: 1.5", ["my.yaml:2", "data.general_ratio", "1.5"]),
        ("data:\n  max_length: 64\n  stride: 65", ["stride 65", "max_length 64"]),
        ("masking:\n  mask_ratio: 0.7", ["mask_ratio 0.7", "0.615"]),
        ("masking:\n  mask_ratio: 0", ["my.yaml:2", "masking.mask_ratio", "0"]),
        ("masking:\n  span_length: [5, 3]", ["span_length [5, 3]"]),
        ("masking:\n  span_length: [0, 3]", ["my.yaml:2", "masking.span_length", "(got 0)"]),
        ("masking:\n  span_ratio: 1.5", ["my.yaml:2", "masking.span_ratio", "1.5"]),
        ("masking:\n  corruption: [.8, .1, .2]", ["masking.corruption [0.8, 0.1, 0.2]", "1"]),
        ("training:\n  fp16: true\n  bf16: true", ["fp16", "bf16"]),
        ("model:\n  use_lora: false", ["my.yaml:2", "model.use_lora"]),
        ("training:\n  seed: 1\n  seed: 2", ["my.yaml, line 3", "seed is set twice"]),
        ("data:\n  weights: {a.txt: 1, a.txt: 2}", ["my.yaml, line 2", "a.txt is set twice"]),
        ("data:\n  weights: " + "[" * 3000, ["my.yaml: not valid YAML"]),
        ('data:\n  data_dir: "a\\0b"', ["my.yaml:2", "data.data_dir", "NUL"]),
        ("training:\n\tseed: 1", ["not valid YAML"]),
        ("- a\n- b", ["sections"]),
        ("training:\n  max_steps: 0", ["my.yaml:1", "max_steps is 0"]),
        ("training:\n  learning_rate: .inf", ["my.yaml:2", "finite"]),
        ("data:\n  data_dir: 2024-13-01", ["my.yaml", "month"]),
        ("? [a]\n: 1", ["my.yaml"]),
        ("a: &a [x]\ndata:\n  skip_cleaning: *a", ["my.yaml:3", "*a is an alias"]),
        ("model: !!python/object/apply:os.system ['true']", ["not valid YAML", "python/object"]),
        ("model:\n  hf_token: hf_abc", ["my.yaml:2", "unknown key model.hf_token"]),
        ("training: 5", ["my.yaml:1", "training must hold keys"]),
    ],
)
def test_a_mistake_is_named_with_its_place(read, text, said):
    with pytest.raises(ConfigError) as error:
        read(text)
    assert all(words in str(error.value) for words in said), str(error.value)


def test_keys_that_do_not_go_together_are_shown_once(read):
    with pytest.raises(ConfigError, match=r"fp16 and bf16 are both true: [^{]*$"):
        read("training:\n  fp16: true\n  bf16: true")


def test_a_mark_of_utf_8_and_no_as_a_truth_value_are_read(read):
    assert read("\ufefftraining:\n  bf16: no\n").training.bf16 is False


def test_overrides_win_and_are_checked(read):
    assert read(OLD_FILE, ["training.seed=7", "data.data_dir=小说"]).training.seed == 7
    with pytest.raises(
        ConfigError, match=r"--set training.sed=7: unknown key training.sed; .*seed"
    ):
        read(OLD_FILE, ["training.sed=7"])
    with pytest.raises(ConfigError, match=r"section\.key=value"):
        read(OLD_FILE, ["seed 7"])


def test_retired_keys_are_accepted_with_one_warning_each(read, caplog):
    read("training:\n  eval_strategy: steps\n  metric_for_best_model: loss")
    assert [record.message.split(": ")[1].split()[0] for record in caplog.records] == [
        "training.eval_strategy",
        "training.metric_for_best_model",
    ]


def test_missing_and_non_utf8_files_are_named(tmp_path):
    with pytest.raises(ConfigError, match=r"absent\.yaml: cannot be read"):
        load_config(tmp_path / "absent.yaml")
    (tmp_path / "gbk.yaml").write_bytes("data: {data_dir: 武侠}".encode("gbk"))
    with pytest.raises(ConfigError, match="not UTF-8 at byte 17"):
        load_config(tmp_path / "gbk.yaml")


@pytest.mark.parametrize("name", [path.stem for path in (PROJECT / "configs").glob("*.yaml")])
def test_shipped_configs_load_and_survive_being_saved(tmp_path, name):
    config = load_config(PROJECT / "configs" / f"{name}.yaml")
    config.save(tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml") == config


def test_the_real_recipe_is_the_published_one():
    config = load_config(PROJECT / "configs" / "qwen3_8b_2x4090.yaml")
    training = config.training
    assert (config.model.lora_r, config.model.lora_alpha, config.model.lora_dropout) == (
        16,
        32,
        0.05,
    )
    assert len(config.model.lora_target_modules) == 7
    assert (config.data.max_length, training.num_train_epochs, training.seed) == (1024, 3, 42)
    assert training.per_device_train_batch_size * training.gradient_accumulation_steps * 2 == 64
    assert (training.learning_rate, training.weight_decay, training.warmup_steps) == (
        5e-5,
        0.01,
        None,  # 100 of the run's 10,000
    )
    assert training.bf16 and training.gradient_checkpointing


def table_of_keys():
    """The README's table: a row a key, from the docstrings of the config's fields."""
    rows = ["| key | default | meaning |", "|---|---|---|"]
    for section, keys in Config():
        for key, field in type(keys).model_fields.items():
            default = json.dumps(field.get_default(call_default_factory=True), ensure_ascii=False)
            rows.append(f"| `{section}.{key}` | `{default}` | {field.description} |")
    return "\n".join(rows) + "\n"


def test_the_readme_lists_every_key():
    written = KEYS.search(README.read_text(encoding="utf-8"))
    assert written and written.group() == table_of_keys(), "run: python tests/test_config.py"


@pytest.mark.parametrize(
    ("written", "steps"), [("0100", 100), ("1_000", 1000), ("-1", -1), ("+7", 7), ("012", 12)]
)
def test_whole_numbers_are_decimal(read, written, steps):
    assert read(f"training: {{max_steps: {written}}}").training.max_steps == steps
    assert read("", [f"training.max_steps={written}"]).training.max_steps == steps


@pytest.mark.parametrize("written", ["0x10", "0b11", "1:30", "0o17"])
def test_other_numbers_are_refused_with_their_place(read, written):
    with pytest.raises(ConfigError, match=r"my\.yaml:2: training\.max_steps: .*" + written):
        read(f"training:\n  max_steps: {written}")
    assert read(f"data: {{lexicon: {written}}}").data.lexicon == written


def test_older_names_of_cleaning_rules_are_known(read):
    config = read("data:\n  skip_cleaning: [notices, furniture, contents, spaces]")
    assert config.data.skip_cleaning == ["ads", "boilerplate", "table_of_contents", "spaces"]


def test_a_typed_text_stands_as_it_is(read):
    data = read("", ["data.data_dir=novels #2", "data.general_file=null", "data.lexicon=2024"]).data
    assert (data.data_dir, data.general_file, data.lexicon) == ("novels #2", None, "2024")


if __name__ == "__main__":
    text = README.read_text(encoding="utf-8")
    README.write_text(KEYS.sub(lambda _: table_of_keys(), text), encoding="utf-8")
