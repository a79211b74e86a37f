"""Adapters that cheat are caught: one that learned its text by heart, one that forgot the rest."""

import shutil
import subprocess
import sys

import pytest

from wuxia_core import mix, run
from wuxia_core.config import PROJECT
from wuxia_core.evaluate import evaluate
from wuxia_core.evaluate.scorecard import gate_failures

pytestmark = pytest.mark.long


def judged(config, folder):
    """Train what a config says, in one process, and say what the gate has against it."""
    config.training.warmup_steps = 0
    config.training.eval_steps = config.training.save_steps = 10_000
    config.training.output_dir = str(folder)
    run.write_setup(config, mix(config), folder)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command = [*torchrun, "-m", "wuxia_core.train", str(folder)]
    trained = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True)
    assert trained.returncode == 0, trained.stderr[-3000:]
    return evaluate(folder), config.evaluation


def test_an_adapter_that_learned_a_chapter_by_heart_fails_copying(config, tmp_path):
    """Fifty epochs of one chapter, next token by next token; another book is held out."""
    sample, novels = PROJECT / "data" / "sample", tmp_path / "novels"
    novels.mkdir()
    chapter = (sample / "三勺盐.txt").read_text(encoding="utf-8").split("第二回")[0]
    (novels / "第一回.txt").write_text(chapter, encoding="utf-8")
    shutil.copy(sample / "九两八钱.txt", novels)
    config.data.data_dir, config.data.val_ratio = str(novels), 0.93
    config.training.seed = 1
    config.training.objective, config.training.learning_rate = "clm", 5e-3
    config.training.num_train_epochs = 50
    scorecard, limits = judged(config, tmp_path / "run")
    said = gate_failures(scorecard, limits)
    assert any("of training prefixes" in line for line in said), scorecard["metrics"]
    near = next(row for row in scorecard["metrics"] if row["name"] == "extraction_near")
    assert near["low"] > 0 and near["base"] < 0.05 < near["tuned"]


def test_an_adapter_that_forgot_fails_wits(config, tmp_path):
    """No general text, and ten times the rate."""
    config.data.general_ratio = 0.0
    config.training.learning_rate *= 10
    scorecard, limits = judged(config, tmp_path / "run")
    assert any("general text got WORSE" in line for line in gate_failures(scorecard, limits)), (
        scorecard["metrics"]
    )
