import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
import yaml
from safetensors.torch import load_file

import launch_ddp
from wuxia_core import run, torchrun
from wuxia_core.config import PROJECT, load_config
from wuxia_core.errors import ConfigError


@pytest.fixture
def launch(tmp_path, monkeypatch, capsys):
    """Run the launcher in a folder of its own; its status and what it said."""
    monkeypatch.chdir(tmp_path)

    def launch(*arguments):
        try:
            status = launch_ddp.main([*map(str, arguments)])
        except SystemExit as error:
            status = error.code
        return status, capsys.readouterr().err

    return launch


def settings(*pairs):
    return [word for pair in pairs for word in ("--set", pair)]


def test_the_sample_run_leaves_the_whole_folder(short_run):
    folder, printed = short_run
    files = "adapter_model.safetensors adapter_config.json config.yaml metrics.jsonl "
    files += "environment.json scorecard.json index.html"
    for name in files.split():
        assert (folder / name).stat().st_size > 0, name
    assert list((folder / "logs").rglob("events.*"))
    assert list(folder.glob("checkpoint-*/adapter_model.safetensors"))
    assert yaml.safe_load((folder / "config.yaml").read_text())["training"]["seed"] == 42
    assert "effective batch 8 = 4 a process × 1 accumulated × 2 in parallel" in printed
    assert json.loads((folder / "environment.json").read_text())["effective_batch"] == 8


def test_the_sample_run_trained_every_layer(short_run):
    weights = load_file(short_run[0] / "adapter_model.safetensors")
    lora_b = {name: tensor for name, tensor in weights.items() if "lora_B" in name}
    assert len(lora_b) == 4 * 7
    assert all(tensor.any() for tensor in lora_b.values())
    assert all(name.endswith(("lora_A.weight", "lora_B.weight")) for name in weights)
    assert load_file(short_run[0] / "mask_row.safetensors")["mask_row"].shape == (1, 256)


def test_the_same_openings_are_continued_at_each_measurement(short_run):
    folder, printed = short_run
    rows = [row for row in run.read_rows(folder) if "passages" in row]
    assert [row["step"] for row in rows] == [0, 6, 12]
    asked = [[passage["prompt"] for passage in row["passages"]] for row in rows]
    assert asked[0] == asked[1] == asked[2] and len(set(asked[0])) == 3
    first, *_, last = ([passage["text"] for passage in row["passages"]] for row in rows)
    assert first != last and all(first + last)
    assert f" → {first[0][:4]}" in printed and f" → {last[0][:4]}" in printed


@pytest.mark.slow
def test_the_sample_run_learned(sample_run):
    folder, printed = sample_run
    metrics = pd.DataFrame(map(json.loads, (folder / "metrics.jsonl").open(encoding="utf-8")))
    held_out = metrics["eval_wuxia_loss"].dropna()
    assert held_out.iloc[-1] < held_out.iloc[0] - 0.3
    assert metrics["tokens_per_second"].dropna().gt(0).all()
    for words in ("bits a character", "masked tokens found", "剑光一闪 …", "base:  ", "tuned: "):
        assert words in printed


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (["--config", "absent.yaml"], 2, "absent.yaml: cannot be read"),
        (settings("training.sede=1"), 2, "did you mean training.seed"),
        (settings("data.general_ratio=1.5"), 2, "data.general_ratio"),
        (settings("data.data_dir=absent"), 3, "absent: no such folder"),
        (settings("data.data_dir=empty"), 3, "empty: no novel in it"),
        (settings("data.data_dir=notes"), 3, "notes: no novel in it"),
        (settings("data.data_dir=blank"), 3, "nothing to train on"),
        (settings("data.general_file=absent.txt"), 3, "absent.txt: no such file"),
        (settings("data.general_file=empty"), 3, "empty: no .txt or .jsonl"),
        (settings("training.output_dir=/proc/none"), 5, "/proc/none: cannot be written"),
        (settings("model.model_name_or_path=Qwen/Qwen3-8B"), 5, "model.model_name_or_path"),
        (settings("model.model_name_or_path=/no/such/folder"), 5, "/no/such/folder (missing)"),
        (["--nproc", "0"], 2, "--nproc 0"),
        (["--nproc", "500"], 2, "500 processes for"),
        (settings("training.fp16=true"), 2, "needs a GPU"),
        (["--resume"], 2, "--resume: no run in"),
        (["--allow-changed"], 2, "--allow-changed: goes with --resume"),
        (["--measure"], 2, "--measure: goes with --plan"),
        (["--plan", "--doctor"], 2, "one at a time"),
        (settings("masking.mask_token=没有的词"), 2, "masking.mask_token 没有的词"),
        (
            [
                "--set",
                "training.objective=mixed",
                "--set",
                "training.per_device_train_batch_size=3",
            ],
            2,
            "is odd: make it even",
        ),
        (["--max-restarts", "-1"], 2, "--max-restarts: must be at least 0"),
        (["--nnodes", "2"], 2, "--nnodes, 2 or more, and --rdzv-endpoint go together"),
        (["--nnodes", "2", "--rdzv-endpoint", "host"], 2, "must be HOST:PORT"),
        (["--nnodes", "2", "--rdzv-endpoint", "no.such.host.invalid:1"], 5, "no such host"),
        (["--rdzv-endpoint", "a:1"], 2, "--nnodes, 2 or more, and --rdzv-endpoint go together"),
    ],
)
def test_bad_input_gets_one_message_and_its_status(launch, tmp_path, arguments, status, said):
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "readme.md").write_text("# 不是小说")
    (tmp_path / "blank").mkdir()
    (tmp_path / "blank" / "a.txt").write_text("")
    got, error = launch(*arguments, *settings("data.processed_data_file=mixture"))
    assert got == status, error
    assert said in error
    assert "Traceback" not in error
    assert not list(tmp_path.rglob("adapter_model.safetensors"))


GOOD = '{"text": "先关上电源，再拧开螺丝。"}\n'


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("novels/a.txt", "更多精彩小说请到本站 www.example.com 下载\n" * 9, "rule ads; nothing"),
        ("novels/a.txt", "侠客行", "3 of 3 characters are left"),
        ("novels/a.txt", "", "0 of 0 characters are left"),
        ("novels/a.txt", "\0" * 4000, "not text"),
        ("novels/a.txt/readme", "", "no novel in it"),
        ("general.jsonl", GOOD + '{"text": 5}\n' + GOOD, "general.jsonl:2: must be an object"),
        ("general.jsonl", GOOD + '{"txt": "甲"}\n' + GOOD, "general.jsonl:2: must be an object"),
        ("general.jsonl", GOOD + "what?\n" + GOOD, "general.jsonl:2: must be an object"),
        ("general.jsonl", GOOD + GOOD + '{"text": "先关上', "general.jsonl:3: must be an object"),
        ("general.jsonl", GOOD * 2, "general_ratio 0.1 takes"),
    ],
)
def test_nothing_to_train_on_is_said_and_ends_with_3(launch, tmp_path, name, content, said):
    novels = Path("novels") if name.startswith("novels") else PROJECT / "data" / "sample"
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_text(content, encoding="utf-8")
    general = "null" if name.startswith("novels") else name
    places = [f"data.data_dir={novels}", f"data.general_file={general}"]
    if "object" in said:  # or the file's size is refused before it is read
        places += ["data.max_general_epochs=1000"]
    status, error = launch(*settings(*places, "data.processed_data_file=mixture"))
    assert status == 3, error
    assert said in error and "Traceback" not in error
    assert not (tmp_path / "mixture").exists()


def chosen(*arguments):
    options = launch_ddp.parse([*arguments])
    config = load_config(options.config or launch_ddp.SAMPLE, launch_ddp.settings(options))
    data, training = config.data, config.training
    return data.data_dir, data.general_file, data.processed_data_file, training.output_dir


def test_own_texts_and_a_name_take_one_command(tmp_path):
    mine = chosen("--novels", "我的 小说/", "--general", "wiki")
    assert mine == ("我的 小说/", "wiki", "data/mixed/我的-小说", "output/我的-小说")
    assert chosen("--novels", "a", "--name", "../b")[1:] == (None, "data/mixed/b", "output/b")
    own = str(tmp_path / "my.yaml")
    Path(own).write_text("data: {general_file: mine.jsonl}")
    assert chosen("--config", own, "--novels", "a")[:2] == ("a", "mine.jsonl")
    assert chosen("--novels", "a", *settings("data.data_dir=c", "training.output_dir=d"))[::3] == (
        "c", "d")  # fmt: skip


def test_own_novels_are_not_held_against_the_samples_general_text(launch, tmp_path, capsys):
    (tmp_path / "shelf").mkdir()
    for number in range(12):
        text = "".join(f"第{n}剑，{number}号客人拔剑而起，又坐下了。\n" for n in range(3000))
        (tmp_path / "shelf" / f"{number}.txt").write_text(text, encoding="utf-8")
    assert launch_ddp.main(["--novels", "shelf", "--plan"]) == 0
    printed = capsys.readouterr()
    assert f"the run: {launch_ddp.STEPS} steps" in printed.out
    assert "warning" not in printed.err and "general text" not in printed.err


def test_a_hub_that_cannot_be_reached_is_asked_once(tmp_path):
    (tmp_path / "my.yaml").write_text(f"data: {{data_dir: {PROJECT}/data/sample}}\n")
    hub = {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path)}
    finished = subprocess.run(
        [sys.executable, str(PROJECT / "launch_ddp.py"), "--config", "my.yaml"],
        cwd=tmp_path, env=os.environ | hub, capture_output=True, text=True,
    )  # fmt: skip
    assert finished.returncode == 5
    assert finished.stderr.count("refused") == 1 and "Retrying" not in finished.stderr


def test_a_finished_run_is_never_overwritten(launch, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "adapter_model.safetensors").write_bytes(b"mine")
    status, error = launch(*settings("training.output_dir=run"))
    assert (status, "never overwritten" in error) == (2, True)
    assert (tmp_path / "run" / "adapter_model.safetensors").read_bytes() == b"mine"


@pytest.mark.parametrize(
    "name", ["checkpoint-3/", "best-7/", "checkpoint-900/", "config.yaml", "x"]
)
@pytest.mark.parametrize("resume", [False, True])
def test_a_folder_of_somebody_else_is_left_alone(launch, tmp_path, name, resume):
    theirs = tmp_path / "run" / name / ("weights" if name.endswith("/") else "")
    theirs.parent.mkdir(parents=True)
    theirs.write_bytes(b"theirs")
    status, error = launch(*settings("training.output_dir=run"), *["--resume"][: int(resume)])
    assert (status, name.strip("/") in error) == (2, True)
    assert [path for path in (tmp_path / "run").rglob("*") if path.is_file()] == [theirs]
    assert theirs.read_bytes() == b"theirs"


def test_a_run_whose_manifest_is_damaged_is_not_called_somebody_elses(launch, tmp_path):
    (tmp_path / "run" / "checkpoint-2").mkdir(parents=True)
    (tmp_path / "run" / "mixture.json").touch()
    status, error = launch(*settings("training.output_dir=run"), "--resume")
    assert (status, "mixture.json there is damaged" in error) == (2, True)


@pytest.mark.parametrize("place", ["/", ".", "~", str(PROJECT), "file"])
def test_a_place_of_other_things_is_no_run_folder(launch, tmp_path, place):
    (tmp_path / "file").touch()
    status, error = launch(*settings(f"training.output_dir={place}"))
    assert (status, "training.output_dir" in error) == (2, True)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_an_empty_folder_of_the_users_stays(launch, tmp_path):
    (tmp_path / "run").mkdir()
    assert launch(*settings("training.output_dir=run", "data.data_dir=absent"))[0] == 3
    assert (tmp_path / "run").is_dir()


def test_what_was_stopped_before_its_first_step_goes_on(tmp_path):
    config = load_config(PROJECT / "configs" / "sample.yaml")
    config.training.output_dir = str(tmp_path / "my run")
    (tmp_path / "my run").mkdir()
    (tmp_path / "my run" / "mixture.json").write_text('{"inputs": []}')
    assert claim(config, resume=True, named=True) == tmp_path / "my run"
    said = torchrun.describe_saved(tmp_path / "my run", 1)
    assert f"--config '{tmp_path}/my run/config.yaml'" in said and "--resume" in said


def claim(config, **how):
    with run.acquire(config, **({"named": False, "resume": False} | how)) as folder:
        return folder


def test_a_bare_launch_takes_the_next_free_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = load_config(PROJECT / "configs" / "sample.yaml")
    assert claim(config) == Path("output/sample") and not Path("output/sample").exists()
    with pytest.raises(ConfigError, match="no run in output/sample"):
        claim(config, resume=True)
    for number in ("", "-2"):
        (tmp_path / f"output/sample{number}").mkdir(parents=True)
        (tmp_path / f"output/sample{number}" / "metrics.jsonl").touch()
        (tmp_path / f"output/sample{number}" / "mixture.json").write_text('{"inputs": []}')
    assert claim(config) == Path("output/sample-3")
    with pytest.raises(ConfigError, match=r"never overwritten; go on with it \(--resume\)"):
        claim(config, named=True)


def test_a_bare_resume_takes_the_newest_run_that_is_not_finished(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = load_config(PROJECT / "configs" / "sample.yaml")
    for number in ("", "-2", "-3"):
        (tmp_path / f"output/sample{number}").mkdir(parents=True)
        (tmp_path / f"output/sample{number}" / "metrics.jsonl").touch()
        (tmp_path / f"output/sample{number}" / "mixture.json").write_text('{"inputs": []}')
    (tmp_path / "output/sample-3/adapter_model.safetensors").touch()
    assert claim(config, resume=True) == Path("output/sample-2")
    assert claim(config, resume=True, named=True) == Path("output/sample")


def test_what_a_stopped_run_leaves_is_named(tmp_path):
    folder = tmp_path / "checkpoint-run"
    for name in ("checkpoint-8", "checkpoint-20", "checkpoint-100", "checkpoint-foo"):
        (folder / name).mkdir(parents=True)
    for step in (8, 20):
        run.write_manifest(folder / f"checkpoint-{step}", {"step": step})
    said = torchrun.describe_saved(folder, 2)
    assert f"{folder}/checkpoint-20 is whole" in said
    assert f"launch_ddp.py --config {folder}/config.yaml --nproc 2 --resume" in said
    for step in (8, 20):
        shutil.rmtree(folder / f"checkpoint-{step}")
    assert "no checkpoint yet" in torchrun.describe_saved(folder, 2)
    (folder / "adapter_model.safetensors").touch()
    assert "wuxia_core.report" in torchrun.describe_saved(folder, 2)


def test_a_run_is_not_resumed_as_another_one(short_run, tmp_path, launch, caplog):
    """Each thing that differs is named, and --allow-changed insists."""
    folder = tmp_path / "run"
    shutil.copytree(short_run[0], folder)
    status, error = launch("--config", folder / "config.yaml", "--resume")
    assert status == 2 and "is finished" in error
    (folder / "adapter_model.safetensors").unlink()
    mixture = f"data.processed_data_file={short_run[0].parent / 'mixture'}"
    here = ["--config", folder / "config.yaml", "--resume", *settings(
        f"training.output_dir={folder}", mixture)]  # fmt: skip
    changed = settings("training.learning_rate=1e-3", "data.general_ratio=0.2", "plan.cards=7")
    status, error = launch(*here, *changed, "--nproc", "1")
    assert status == 2 and "Set them back, or insist with --allow-changed" in error
    for words in ("training.learning_rate: 0.0005 then, 0.001 now", "data.general_ratio: 0.1 then",
                  "processes: 2 then, 1 now", "the texts, or how they are cut"):  # fmt: skip
        assert words in error
    assert "plan.cards" not in error
    config = load_config(folder / "config.yaml", ["training.learning_rate=1e-3"])
    run.check_unchanged(config, folder, None, 2, insist=True)
    assert "another run" in caplog.text and "0.0005 then, 0.001 now" in caplog.text
    newest = run.newest_checkpoint(folder)
    (newest / "MANIFEST.json").unlink()
    packages = ("torch", "transformers", "peft", "accelerate", "numpy")
    facts = {"world_size": 2, "base": "another", "versions": dict.fromkeys(packages, "0.1")}
    run.write_manifest(newest, facts)
    status, error = launch(*here)
    assert status == 2 and "trained on other weights" in error
    for checkpoint in folder.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)
    assert run.resume_point(folder) is None


def test_novels_lying_in_data_are_found_by_an_old_config(launch, tmp_path):
    """The user's file names a model of the hub: the novels are read, then the hub is tried."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "书.txt").write_text("他拔剑而起。\n" * 200, encoding="utf-8")
    (tmp_path / "train_config.yaml").write_text(
        'model: {model_name_or_path: "Qwen/Qwen3-8B", lora_r: 16}\n'
        'data: {data_dir: "./data", max_length: 1024}\n'
        "training: {num_train_epochs: 3, learning_rate: 5.0e-5, bf16: true}\n"
    )
    status, error = launch("--config", "train_config.yaml")
    assert status == 5 and "Qwen/Qwen3-8B" in error and "HF_ENDPOINT" in error


@pytest.mark.long
def test_an_old_config_with_a_local_model_trains_on_novels_in_data(tmp_path):
    (tmp_path / "data").mkdir()
    for name in ("甲", "乙"):
        text = (PROJECT / "data/sample/九两八钱.txt").read_text(encoding="utf-8")
        (tmp_path / "data" / f"{name}.txt").write_bytes(text.encode("gb18030"))
    (tmp_path / "train_config.yaml").write_text(
        f'model: {{model_name_or_path: "{PROJECT / "data/tiny_base"}", lora_r: 16}}\n'
        'data: {data_dir: "./data", max_length: 1024}\n'
        "training: {num_train_epochs: 1, per_device_train_batch_size: 2, "
        "gradient_accumulation_steps: 2, learning_rate: 5e-5, bf16: true}\n"
    )
    finished = subprocess.run(
        [sys.executable, str(PROJECT / "launch_ddp.py"), "--config", "train_config.yaml",
         "--nproc", "1", *settings("evaluation.minutes=0.01")],
        cwd=tmp_path, capture_output=True, text=True, timeout=900,
    )  # fmt: skip
    assert finished.returncode == 0, finished.stderr[-3000:]
    assert (tmp_path / "output/wuxia_lora/adapter_model.safetensors").is_file()
    assert "nothing protects" in finished.stderr


@pytest.mark.parametrize("command", [["launch_ddp.py"], ["-m", "wuxia_core.write", "output/x"]])
def test_windows_is_told_of_wsl2_in_one_line(command):
    """There is no fcntl there, nor is SIGHUP."""
    blocked = "import sys, runpy; sys.modules['fcntl'] = sys.modules['resource'] = None; "
    start = "run_path('launch_ddp.py'" if command[0] != "-m" else f"run_module({command[1]!r}"
    finished = subprocess.run(
        [sys.executable, "-c", f"{blocked}runpy.{start}, run_name='__main__')"],
        cwd=PROJECT, capture_output=True, text=True,
    )  # fmt: skip
    assert finished.returncode == 5
    assert finished.stderr.count("\n") == 1 and "WSL2" in finished.stderr


TELL = """
import os, sys
from pathlib import Path
Path(sys.argv[1], "said").write_text(str(os.environ.get("PYTORCH_ALLOC_CONF")))
"""


@pytest.mark.parametrize(
    ("set_before", "told"),
    [
        ({}, "expandable_segments:True"),
        ({"PYTORCH_ALLOC_CONF": "backend:native"}, "backend:native"),
        ({"PYTORCH_CUDA_ALLOC_CONF": "backend:native"}, "None"),
    ],
)
def test_the_allocator_of_cards_may_grow_its_segments(tmp_path, set_before, told):
    (tmp_path / "tell.py").write_text(TELL)
    start = "from wuxia_core.torchrun import Path, Processes, launch"
    start += "; launch(Path('.'), Processes(1), module='tell')"
    inherited = {key: value for key, value in os.environ.items() if "ALLOC_CONF" not in key}
    subprocess.run(
        [sys.executable, "-c", start], cwd=tmp_path, check=True, timeout=300,
        env={**inherited, "PYTHONPATH": f"{tmp_path}:{PROJECT}", **set_before},
    )  # fmt: skip
    assert (tmp_path / "said").read_text() == told


@pytest.mark.parametrize(
    ("status", "message", "crashed", "exit_status", "said"),
    [
        (5, "DeviceLost: a card failed (Xid 79)", True, 5, "a card failed (Xid 79)"),
        (5, "MachineError: the disk is full", False, 5, "the disk is full"),
        (-signal.SIGBUS, "Signal 7 (SIGBUS)", True, 5, "SIGBUS), for want of /dev/shm"),
    ],
)
def test_what_a_card_failed_of_may_start_again(status, message, crashed, exit_status, said):
    told = {"message": message} if status > 0 else message
    alone = {"message": "RankLost: another process is gone"}
    processes = [
        SimpleNamespace(exitcode=75, message=alone, timestamp=0),
        SimpleNamespace(exitcode=status, message=told, timestamp=1),
    ]
    ended = torchrun.read_failure(SimpleNamespace(failures=dict(enumerate(processes))))
    assert (ended.crashed, ended.exit_status) == (crashed, exit_status)
    assert said in str(ended)


@pytest.mark.parametrize("flags", [[], ["--doctor"], ["--plan", "--measure"]])
def test_nothing_starts_on_the_cpu_beside_cards_that_torch_cannot_use(
    launch, nvidia_smi, tmp_path, flags
):
    nvidia_smi("550.54.14")
    output = settings("training.output_dir=run", "data.processed_data_file=mixture")
    status, error = launch(*flags, *output)
    assert status == 5 and "driver 550.54.14" in error and error.count("error: ") == 1
    assert not (tmp_path / "run").exists() and not (tmp_path / "mixture").exists()
