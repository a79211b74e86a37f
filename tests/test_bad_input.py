"""Every command with what users mistype: one message, the promised status, never a traceback."""

import importlib.util
import subprocess
import sys

import pytest

import launch_ddp
from wuxia_core import export, report, write
from wuxia_core.config import PROJECT
from wuxia_core.evaluate import __main__ as evaluate
from wuxia_core.evaluate import blind


def load(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


ENTRIES = {
    "launch_ddp": launch_ddp, "evaluate": evaluate, "blind": blind, "report": report,
    "write": write, "export": export, "pretrain": load(PROJECT / "data/tiny_base/pretrain.py"),
}  # fmt: skip
DEEP = "[" * 3000
NO_RUN = ["absent", "file", "empty", "~absent/x", "乙\x1b[2K", "truncated", "no_config",
          "brace", "list", "binary", "unknown", "no_weights", "/", "", "a" * 300, "."]  # fmt: skip
SETS = [
    "data.data_dir=~absent/x", 'data.data_dir="a\\0b"', "data.data_dir=novels #2", "data.data_dir=",
    f"data.data_dir={'a' * 300}", "data.data_dir=file", f"data.encoding={DEEP}", "data.encoding=x",
    "data.weights={a.txt: 1, a.txt: 2}", "data.weights={absent.txt: 1}", "data.lexicon=file",
    "data.lexicon=empty", "data.general_file=~absent", "training.output_dir=~absent/x",
    "training.output_dir=file/x", "data.processed_data_file=file/x", "data.max_length=1e9",
    "data.processed_data_file=.", "data.processed_data_file=/", "training.seed=-1", "training=3",
    "model.model_name_or_path=file", "model.model_name_or_path=empty", "model=", "x", ".=", "a.b=1",
    "model.model_name_or_path=https://me:secret@host/x", "data.max_length=5000",
]  # fmt: skip
ADAPTERS = {
    "null": "null", "list": "[1, 2]", "base": '{"peft_type": "LORA", "base_model_name_or_path": 5}',
}  # fmt: skip
CASES = [
    *(("launch_ddp", ["--nproc", "1", "--set", pair]) for pair in SETS),
    *(("launch_ddp", ["--config", name]) for name in NO_RUN),
    *(("launch_ddp", words.split()) for words in
      ["--nproc 0", "--nproc x", "--nnodes 2", "--rdzv-endpoint x --nnodes 2", "--plan --doctor",
       "--resume --config absent", "--max-restarts -1", "--measure", "--unknown"]),
    *(("launch_ddp", ["--plan", flag, ""]) for flag in ("--novels", "--general", "--name")),
    *(("launch_ddp", ["--config", f"{name}.yml"]) for name in ("true", "number")),
    *(("write", [f"adapter_{name}", "夜"]) for name in ADAPTERS),
    *(("evaluate", [name]) for name in NO_RUN),
    *(("evaluate", [name, "--quick"]) for name in NO_RUN),
    *(("evaluate", words.split()) for words in
      ["", "x --gate --quick", "x --harness", "absent --gate"]),
    *(("blind", [name]) for name in NO_RUN),
    *(("blind", ["empty", name]) for name in NO_RUN),
    *(("write", [name, "夜"]) for name in NO_RUN),
    *(("write", ["absent", "夜", *words.split()]) for words in
      ["--strength 3", "--strength x", "--tokens 0", "--seed -1", "--temperature -1", "--top-p 2"]),
    *(("export", [name]) for name in NO_RUN),
    *(("export", ["absent", "--to", "x"]), ("export", ["absent", "--to", "gguf"])),
    *(("report", [name]) for name in NO_RUN),
    ("report", ["01_explore_corpus", "-p", "data_dir", "a: b: c"]),
    *(("report", ["01_explore_corpus", *words.split()]) for words in
      ["-p absent 1", "--out file", "-p", "--out"]),
    *(("pretrain", [name, "out"]) for name in NO_RUN if name not in {"/", "."}),
    *(("pretrain", words.split()) for words in
      ["empty out --tokens 0", "", "x", "empty out --lr x"]),
]  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bad")
    (folder / "file").write_text("只是一个文件。\n", encoding="utf-8")
    for name in ("empty", "truncated", "no_config", "brace", "list", "binary", "unknown"):
        (folder / name).mkdir()
    (folder / "true.yml").write_text("on: [push]\n")
    (folder / "number.yml").write_text("2024: 3\n")
    for name, settings in ADAPTERS.items():
        (folder / f"adapter_{name}").mkdir()
        (folder / f"adapter_{name}" / "adapter_config.json").write_text(settings)
        (folder / f"adapter_{name}" / "adapter_model.safetensors").touch()
    return folder


@pytest.mark.parametrize(("entry", "arguments"), CASES, ids=lambda value: str(value)[:50])
def test_a_mistake_gets_one_message(entry, arguments, place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    try:
        status = ENTRIES[entry].main(arguments)
    except SystemExit as error:
        status = error.code
    said = capsys.readouterr().err
    assert status in (2, 3, 5) and said.strip(), said
    assert "\x1b" not in said and "secret" not in said and "bug" not in said


CHILD = "import sys; sys.exit(sys.stdout is None or sys.stderr is None)"
CLOSED = f"""
import subprocess, sys
from wuxia_core.errors import make_output_expendable

make_output_expendable()
sys.exit(subprocess.run([sys.executable, "-c", {CHILD!r}]).returncode)
"""


@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-"])
def test_what_is_started_without_a_terminal_has_one_to_write_to(closed):
    command = ["sh", "-c", f'exec "$0" "$@" {closed}', sys.executable, "-c", CLOSED]
    assert subprocess.run(command, cwd=PROJECT).returncode == 0
