import os
import re
import shutil
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist

from wuxia_core.config import PROJECT, load_config
from wuxia_core.preflight import doctor

NO_NAME = ["unshare", "-u", "sh", "-c", 'hostname no-such-host-xyz; exec "$@"', "sh"]


def ask(tmp_path, processes, *settings, before=()):
    command = [
        *before,
        sys.executable,
        str(PROJECT / "launch_ddp.py"),
        "--doctor",
        "--nproc",
        processes,
    ]
    command += [word for setting in settings for word in ("--set", setting)]
    return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=600)


def rows(finished):
    """Name to mark."""
    lines = [line for line in finished.stdout.splitlines() if line.startswith(doctor.MARKS)]
    return {line[7:29].strip(): line.split()[0] for line in lines}


@pytest.mark.slow
def test_a_sound_machine_passes_every_check_without_a_name(tmp_path):
    unnamed = subprocess.run([*NO_NAME, "true"]).returncode == 0  # as root
    finished = ask(tmp_path, "2", "training.bf16=true", before=NO_NAME if unnamed else ())
    assert finished.returncode == 0, finished.stdout + finished.stderr[-2000:]
    found = rows(finished)
    assert list(found) == list(doctor.CHECKS)
    idle = set() if torch.cuda.device_count() > 1 else {"copies between cards", "shared memory"}
    assert all(mark == "ok" for name, mark in found.items() if name not in idle)


@pytest.mark.long
def test_a_failing_check_is_named_with_the_remedy_and_status_5(tmp_path):
    finished = ask(tmp_path, "1", "training.learning_rate=1e-50")
    assert finished.returncode == 5
    assert re.search(r"FAILED lora_B +.* → .*learning_rate", finished.stdout)
    assert list(rows(finished).values()).count("FAILED") == 1


ABSENT = """
import os
from datetime import timedelta
from wuxia_core.preflight import doctor

doctor.WAIT = timedelta(seconds=3)
def absent(_):
    raise RuntimeError("took no part")
if os.environ["RANK"] == "1":
    doctor.CHECKS["all_reduce"] = absent, "start it"
doctor.main()
"""


@pytest.mark.slow
def test_a_rank_that_takes_no_part_ends_with_words(tmp_path):
    (tmp_path / "absent.py").write_text(ABSENT)
    load_config(PROJECT / "configs" / "sample.yaml").save(tmp_path / "config.yaml")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    finished = subprocess.run(
        [*command, str(tmp_path / "absent.py"), str(tmp_path)],
        cwd=PROJECT, env={**os.environ, "PYTHONPATH": str(PROJECT)},
        capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert "exitcode  : 5" in finished.stderr
    found = rows(finished)
    assert found["all_reduce"] == "FAILED" and list(found) == list(doctor.CHECKS)
    assert found["lora_B"] == "ok"


@pytest.fixture
def alone(monkeypatch, tmp_path):
    """One process that is a group of its own."""
    settings = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    for name, value in settings.items():
        monkeypatch.setitem(os.environ, name, value)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    yield load_config(PROJECT / "configs" / "sample.yaml")
    dist.destroy_process_group()


def failed(name, config):
    mark, found = doctor.run_check(name, config)
    assert mark == "FAILED", found
    return found


def test_a_wrong_sum_is_found(alone, monkeypatch):
    monkeypatch.setattr(dist, "all_reduce", lambda values: values[-1:].add_(1))
    assert "wrong → set NCCL_P2P_DISABLE=1" in failed("all_reduce", alone)


def test_a_step_that_does_nothing_is_found(alone):
    vars(alone.training)["learning_rate"] = 0.0  # the config itself refuses it
    assert "28 of 28 are still 0" in failed("lora_B", alone)


def test_a_step_that_breaks_a_weight_is_found(alone):
    vars(alone.training)["learning_rate"] = float("inf")
    assert "not finite" in failed("lora_B", alone)


@pytest.mark.parametrize("factor", [0.5, 1.0001, float("nan")])
def test_a_gradient_of_another_size_is_found(alone, monkeypatch, factor):
    loss, factors = doctor.compute_loss, iter((1.0, factor))
    monkeypatch.setattr(doctor, "compute_loss", lambda *inputs: loss(*inputs) * next(factors))
    assert "differ by" in failed("gradients", alone)


def test_every_gradient_takes_part_in_the_comparison():
    model = doctor.tiny_model(b_std=0.1)
    doctor.compute_loss(model, doctor.random_batch(0), step_targets=1).backward()
    trained = [weights for weights in model.parameters() if weights.requires_grad]
    assert len(trained) == 2 * 28 + 1 and all(bool(weights.grad.any()) for weights in trained)


@pytest.mark.parametrize(
    ("off", "direct", "mark", "said"),
    [
        ("0", "right", "ok", "right"),
        ("1", "right", "ok", "NCCL_P2P_DISABLE=0 lifts the precaution"),
        ("0", "hang", "FAILED", "set NCCL_P2P_DISABLE=1"),
        ("1", "hang", "ok", "hang"),
        ("0", "wrong", "FAILED", "set NCCL_P2P_DISABLE=1"),
        ("1", "wrong", "ok", "wrong"),
    ],
)
def test_what_the_cards_send_is_judged_as_a_run_sends_it(
    alone, monkeypatch, off, direct, mark, said
):
    if torch.cuda.device_count() > 1:
        pytest.skip("there is something to copy")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)  # here; the probe has none to copy
    monkeypatch.setitem(os.environ, "NCCL_P2P_DISABLE", off)
    if direct == "hang":
        monkeypatch.setattr(doctor, "PROBE_SECONDS", 0.1)
    if direct == "wrong":
        monkeypatch.setattr(sys, "executable", shutil.which("false"))
    judged, found = doctor.run_check("copies between cards", alone)
    assert judged == mark and said in found
    assert ("lifts" in found) == said.endswith("precaution")


def test_too_little_shared_memory_is_found(alone, monkeypatch):
    if torch.cuda.device_count() < 2:
        assert doctor.run_check("shared memory", alone) == ("–", "needs two GPUs")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(doctor, "LEAST_SHARED_MEMORY", 1)
    assert doctor.run_check("shared memory", alone)[0] == "ok"
    monkeypatch.setattr(doctor, "LEAST_SHARED_MEMORY", 2**60)
    assert "MiB free → docker run --shm-size=1g" in failed("shared memory", alone)
