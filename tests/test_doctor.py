import os
import re
import subprocess
import sys

import pytest
import torch.distributed as dist

from wuxia_core.config import PROJECT, load_config
from wuxia_core.preflight import doctor


def ask(tmp_path, processes, *settings):
    command = [sys.executable, str(PROJECT / "launch_ddp.py"), "--doctor", "--nproc", processes]
    command += [word for setting in settings for word in ("--set", setting)]
    return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("processes", ["1", "2"])
def test_a_sound_machine_passes_every_check(tmp_path, processes):
    finished = ask(tmp_path, processes)
    assert finished.returncode == 0, finished.stderr[-2000:]
    rows = [line for line in finished.stdout.splitlines() if line.startswith(("ok", "FAILED"))]
    assert len(rows) == len(doctor.CHECKS) and all(row.startswith("ok") for row in rows)
    assert re.search(rf"processes +{processes} processes", finished.stdout)


def test_a_failing_check_is_named_with_the_remedy_and_status_5(tmp_path):
    (tmp_path / "file").write_text("")
    finished = ask(tmp_path, "1", f"training.output_dir={tmp_path / 'file' / 'run'}")
    assert finished.returncode == 5
    assert re.search(r"FAILED memory and disk +.*name another training.output_dir", finished.stdout)
    assert finished.stdout.count("FAILED") == 1


@pytest.fixture
def alone(monkeypatch, tmp_path):
    """One process that is a group of its own."""
    settings = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    for name, value in settings.items():
        monkeypatch.setitem(os.environ, name, value)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    yield load_config(PROJECT / "configs" / "sample.yaml")
    dist.destroy_process_group()


def test_checks_can_fail(alone, monkeypatch):
    monkeypatch.setattr(doctor, "version", lambda name: "0.1")
    with pytest.raises(doctor.Failed, match=r"torch 0.1: pip install 'torch<2.14,>=2.11'"):
        doctor.versions(alone)
    monkeypatch.setitem(os.environ, "WORLD_SIZE", "3")
    with pytest.raises(doctor.Failed, match=r"ranks \[0\] of 3"):
        doctor.world(alone)
    monkeypatch.setattr(dist, "all_reduce", lambda values: values.add_(1))
    with pytest.raises(doctor.Failed, match="NCCL_P2P_DISABLE=1"):
        doctor.sums(alone)


def test_a_wrong_loss_or_a_step_that_does_nothing_is_found(alone, monkeypatch):
    step = doctor.step
    monkeypatch.setattr(doctor, "step", lambda model, inputs, items: step(model, inputs, items) * 0)
    with pytest.raises(doctor.Failed, match="lora_B is still 0"):
        doctor.learns(alone)
    calls = iter((1.0, 1.1))
    monkeypatch.setattr(
        doctor, "step", lambda model, inputs, items: step(model, inputs, items) * next(calls)
    )
    with pytest.raises(doctor.Failed, match="gradients differ"):
        doctor.parity(alone)
