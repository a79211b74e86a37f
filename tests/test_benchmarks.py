import os
import subprocess
import sys

import pytest
import torch

from wuxia_core.config import PROJECT

pytestmark = pytest.mark.slow


def run(tmp_path, script, *options):
    """Run a benchmark from outside the project; one thread, since the shapes are tiny."""
    return subprocess.run(
        [sys.executable, str(PROJECT / "benchmarks" / script), *options],
        cwd=tmp_path,
        env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=900,
    )


@pytest.mark.long
@pytest.mark.parametrize("script", ["calibration.py", "objectives.py", "prepare.py"])
def test_a_long_benchmark_starts(tmp_path, script):
    finished = run(tmp_path, script, "--help")
    assert finished.returncode == 0, finished.stderr[-3000:]


def test_much_text_is_prepared_and_recognised(tmp_path):
    sample = str(PROJECT / "data" / "sample")
    finished = run(tmp_path, "prepare.py", "data/tiny_base", sample, "--megabytes", "1")
    assert finished.returncode == 0, finished.stderr[-3000:]
    lines = finished.stdout.splitlines()
    names = [line.split(": ")[0] for line in lines]
    assert names == ["1 MB, prepare", "1 MB, unchanged", "1 MB, peak of memory"]


def test_objectives_are_compared_at_equal_learning(tmp_path):
    finished = run(tmp_path, "plot_objectives.py")
    assert finished.returncode == 0, finished.stderr[-3000:]
    rows = {tuple(line.split()[:2]): line.split() for line in finished.stdout.splitlines()[1:]}
    assert rows["+0.000", "masked"][2:] == ["-0.178", "300", "+0.015"]
    assert rows["+0.000", "clm"][2:] == ["-0.178", "44", "+0.015"]


def test_both_ways_are_measured_on_a_gpu(tmp_path):
    """On a CPU in its place, with a tiny model."""
    finished = run(tmp_path, "gpu.py", "--part", "step", "--tiny", "--out", "rows.jsonl")
    assert finished.returncode == 0, finished.stderr[-3000:]
    rows = [line.split() for line in finished.stdout.splitlines()]
    assert {row[0] for row in rows if "recomputed" in row} >= {"ours", "standard"}
    assert len((tmp_path / "rows.jsonl").read_text(encoding="utf-8").splitlines()) == 6


@pytest.mark.long
@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there")
def test_a_missing_gpu_is_said(tmp_path):
    finished = run(tmp_path, "gpu.py", "--part", "step")
    assert finished.returncode == 5
    assert "needs a GPU" in finished.stderr


@pytest.mark.long
def test_all_ways_of_a_training_step_have_the_same_losses(tmp_path):
    """The script itself compares them to 1e-4."""
    finished = run(tmp_path, "train_step.py", "--tiny")
    assert finished.returncode == 0, finished.stderr[-3000:]
    assert {"ours", "standard"} <= {line.split(" ")[0] for line in finished.stdout.splitlines()}
