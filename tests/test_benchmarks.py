import json
import os
import re
import subprocess
import sys

import pandas as pd
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
    ends = re.findall(r"^ *(\d+%) +masked +(\d+) ([-+.\d]+)", finished.stdout, re.MULTILINE)
    assert [end[:2] for end in ends] == [("0%", "300"), ("10%", "300")]
    (clm,) = re.findall(r"^ *0% +clm +(\d+) ([-+.\d]+)", finished.stdout, re.MULTILINE)
    assert int(clm[0]) < 100 and clm[1] == ends[0][2]  # as much is learned in fewer steps


def test_few_books_are_drawn_from_the_fewest_passes_to_the_most(monkeypatch):
    monkeypatch.syspath_prepend(str(PROJECT / "benchmarks"))
    import plot_objectives

    rows = {"text": "tenth of a novel", "condition": "clm", "passes": [3, 10, 1]}
    table = pd.DataFrame(rows | {"memorisation": [-0.2, -0.9, 0.0]})
    line = plot_objectives.plot_few_books(table, "memorisation").lines[0]
    assert line.get_xydata().tolist() == [[1, 0.0], [3, -0.2], [10, -0.9]]


def rows(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_what_a_step_costs_is_measured(tmp_path):
    """On a CPU in a card's place, with a tiny model."""
    finished = run(tmp_path, "gpu.py", "--tiny")
    assert finished.returncode == 0, finished.stderr[-3000:]
    ours, standard, kept, casts, compiled, *quantized = rows(tmp_path / "gpu.jsonl")
    assert [ours["way"], standard["way"]] == ["ours", "standard"]
    assert kept["activations"] == "kept" and compiled["layers"] == "compiled"
    assert [ours["casts"], casts["casts"]] == ["off", "on"]
    assert [row["weights"] for row in quantized] == ["8bit", "4bit"]
    for row in (standard, kept, casts, compiled):
        assert row["loss"] == pytest.approx(ours["loss"], abs=1e-3)
        assert row["tokens/s"] > 0 and row["planned GiB"] > 0


def test_no_step_is_begun_without_time(tmp_path):
    finished = run(tmp_path, "gpu.py", "--tiny", "--seconds", "0")
    assert finished.returncode == 0, finished.stderr[-3000:]
    assert {row["note"] for row in rows(tmp_path / "gpu.jsonl")[1:]} == {"no time left"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there")
@pytest.mark.parametrize("script", ["gpu.py", "first_light.py"])
def test_a_missing_gpu_is_said(tmp_path, script):
    finished = run(tmp_path, script)
    assert finished.returncode == 5
    assert "no GPU" in finished.stderr and not list(tmp_path.iterdir())


def test_transformers_without_masks_of_logits_is_said(tmp_path, monkeypatch):
    (tmp_path / "transformers-5.17.0.dist-info").mkdir()
    about = tmp_path / "transformers-5.17.0.dist-info" / "METADATA"
    about.write_text("Metadata-Version: 2.1\nName: transformers\nVersion: 5.17.0\n")
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    monkeypatch.setenv("PYTHONPATH", path)
    finished = run(tmp_path, "gpu.py", "--tiny")
    assert finished.returncode == 5 and "5.17.0" in finished.stderr, finished.stderr[-3000:]


def test_the_product_is_tried_on_a_card(tmp_path):
    """On a CPU in its place, with a tiny model."""
    finished = run(tmp_path, "first_light.py", "--tiny", "--seconds", "600")
    assert finished.returncode == 0, finished.stderr[-3000:]
    steps = {row["step"]: row for row in rows(tmp_path / "first_light.jsonl")}
    assert steps["compare"]["same bytes"] and steps["compare"]["losses apart"] == 0
    statuses = {name: row["exit status"] for name, row in steps.items() if name != "compare"}
    assert statuses == {"doctor": 0, "sample": 0, "stopped": 75, "resumed": 0, "model": 0,
                        "8b": 0, "8bit": 0}  # fmt: skip
    assert all(steps[name]["loss"] > 0 for name in ("sample", "resumed", "8b", "8bit"))


def test_a_step_that_is_cut_off_is_written_with_its_end(tmp_path):
    finished = run(tmp_path, "first_light.py", "--tiny", "--seconds", "1")
    assert finished.returncode == 0, finished.stderr[-3000:]
    doctor, *others = rows(tmp_path / "first_light.jsonl")
    assert doctor["exit status"] != 0 and "--doctor" in doctor["command"]
    assert len(others) == 7 and all("note" in row for row in others)


@pytest.mark.long
def test_all_ways_of_a_training_step_have_the_same_losses(tmp_path):
    """The script itself compares them to 1e-4."""
    finished = run(tmp_path, "train_step.py", "--tiny")
    assert finished.returncode == 0, finished.stderr[-3000:]
    assert {"ours", "standard"} <= {line.split(" ")[0] for line in finished.stdout.splitlines()}
