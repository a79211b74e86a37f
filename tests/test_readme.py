"""Every command of the READMEs: its flags exist, and a test runs it or it says what it needs."""

import re
import shlex

import pytest

import launch_ddp
from wuxia_core import export, write
from wuxia_core.config import PROJECT, load_config
from wuxia_core.evaluate import __main__ as evaluate
from wuxia_core.evaluate import blind

BLOCK = re.compile(r"```bash\n(.*?)```", re.DOTALL)
# A command, alone and with each of its flags: the test that runs it, or what it needs.
RUN_BY = {
    "pip install": ".ci/run",
    "pip install -e": ".ci/run",
    "pytest": ".ci/run",
    "launch_ddp.py": "test_launch.py::test_the_sample_run_leaves_the_whole_folder",
    "launch_ddp.py --config": "test_launch.py::test_an_old_config_with_a_local_model_trains",
    "launch_ddp.py --set": "test_launch.py::test_an_old_config_with_a_local_model_trains",
    "launch_ddp.py --novels": "test_launch.py::test_own_texts_and_a_name_take_one_command",
    "launch_ddp.py --general": "test_launch.py::test_own_texts_and_a_name_take_one_command",
    "launch_ddp.py --name": "test_launch.py::test_own_texts_and_a_name_take_one_command",
    "launch_ddp.py --plan": "test_preflight.py::test_the_plan_alone_starts_nothing",
    "launch_ddp.py --measure": "test_preflight.py::test_a_plan_that_is_measured_times_its_steps",
    "launch_ddp.py --doctor": "test_doctor.py::test_a_sound_machine_passes_every_check",
    "launch_ddp.py --max-restarts": "test_faults.py::test_a_killed_rank_is_started_again",
    "launch_ddp.py --resume": "test_faults.py::test_a_launcher_that_is_killed",
    "launch_ddp.py --nnodes": "test_faults.py::test_two_machines_train_what_one_does",
    "launch_ddp.py --rdzv-endpoint": "test_faults.py::test_two_machines_train_what_one_does",
    "wuxia_core.report": "test_notebooks.py::test_a_notebook_runs_headless_and_draws",
    "wuxia_core.report -p": "test_notebooks.py::test_a_misspelt_parameter_or_notebook_is_refused",
    "wuxia_core.report --out": "test_notebooks.py::test_a_notebook_runs_headless_and_draws",
    "wuxia_core.write": "test_write.py::test_prompts_are_asked_for_until_an_empty_line",
    "wuxia_core.write --base": "test_write.py::test_prompts_are_asked_for_until_an_empty_line",
    "wuxia_core.evaluate": "test_evaluate.py::test_the_gate_ends_with_3",
    "wuxia_core.evaluate --quick": "test_evaluate.py::test_a_quick_look_measures_bits",
    "wuxia_core.evaluate --gate": "test_evaluate.py::test_the_gate_ends_with_3",
    "wuxia_core.evaluate --harness": "needs the hub",
    "wuxia_core.evaluate.blind": "test_blind.py::test_faulty_sheets_are_named",
    "wuxia_core.export": "test_export.py::test_plain_transformers_takes_it",
    "wuxia_core.export --to": "test_export.py::test_llama_cpps_converters",
    "wuxia_core.export --llama-cpp": "test_export.py::test_llama_cpps_converters",
    "vllm serve": "needs vLLM and a GPU",
    "vllm serve --enable-lora": "needs vLLM and a GPU",
    "vllm serve --lora-modules": "needs vLLM and a GPU",
    "ollama create": "needs Ollama",
    "ollama create -f": "needs Ollama",
    "ollama run": "needs Ollama",
}
MAINS = {
    "wuxia_core.write": write.main, "wuxia_core.evaluate": evaluate.main,
    "wuxia_core.evaluate.blind": blind.main, "wuxia_core.export": export.main,
}  # fmt: skip


def commands():
    """All commands of both READMEs: `(what is run, its words)`."""
    for name in ("README.md", "README.zh-CN.md"):
        text = (PROJECT / name).read_text(encoding="utf-8")
        for line in "".join(BLOCK.findall(text)).replace("\\\n", "").splitlines():
            for command in " ".join(shlex.split(line, comments=True)).split(" && "):
                words = command.removeprefix("python ").removeprefix("-m ").split()
                if words:
                    both = words[0] in {"pip", "vllm", "ollama"}
                    yield " ".join(words[: 1 + both]), words[1 + both :]


@pytest.mark.parametrize("program", sorted({program for program, _ in commands()}))
def test_a_command_is_run_by_a_test_or_says_what_it_needs(program):
    flags = {x for name, words in commands() if name == program for x in words if x[0] == "-"}
    for command in [program, *(f"{program} {flag}" for flag in flags)]:
        where = RUN_BY.get(command, "no test")
        file, _, test = where.partition("::")
        if test:
            assert f"def {test}" in (PROJECT / "tests" / file).read_text(encoding="utf-8"), where
        else:
            assert where == ".ci/run" or where.startswith("needs "), f"{command}: {where}"


@pytest.mark.parametrize("words", [words for name, words in commands() if name == "launch_ddp.py"])
def test_a_launch_is_understood(words):
    options = launch_ddp.parse(words)
    config = options.config if options.config != "my.yaml" else None
    load_config(PROJECT / (config or "configs/sample.yaml"), options.set)


@pytest.mark.parametrize(("name", "words"), [x for x in commands() if x[0] in MAINS])
def test_what_a_run_is_used_for_is_understood(name, words, tmp_path, monkeypatch):
    """Without a run it ends with one message, but its flags are read first."""
    monkeypatch.chdir(tmp_path)
    words = ["absent" if re.match(r"output/|OUTPUT|输出", word) else word for word in words]
    assert MAINS[name](words) in {2, 3}  # argparse would leave by SystemExit
