import os
import subprocess
import sys
from pathlib import Path

import pytest

from wuxia_core.config import PROJECT, Config, load_config

CORPUS = Path(os.environ.get("WUXIA_CORPUS", PROJECT.parent / "shared" / "corpus"))

os.environ["HF_HUB_OFFLINE"] = "1"  # the hub is never asked by a test


@pytest.fixture
def novels() -> Path:
    """Folder of real novels."""
    if not CORPUS.is_dir():
        pytest.skip(f"no novels at {CORPUS} (set WUXIA_CORPUS)")
    return CORPUS


@pytest.fixture(scope="session")
def tokenizer():
    from wuxia_core.model import load_tokenizer

    return load_tokenizer("data/tiny_base")


@pytest.fixture
def config(tmp_path) -> Config:
    """The sample's settings, writing below tmp_path."""
    config = load_config(PROJECT / "configs" / "sample.yaml")
    config.data.processed_data_file = str(tmp_path / "mixture")
    config.training.output_dir = str(tmp_path / "run")
    return config


@pytest.fixture(scope="session")
def sample_run(tmp_path_factory):
    """Launch the sample as a user does; its folder and what was printed."""
    root = tmp_path_factory.mktemp("launch")
    finished = subprocess.run(
        [
            *(sys.executable, str(PROJECT / "launch_ddp.py")),
            *("--set", f"training.output_dir={root / 'run'}"),
            *("--set", f"data.processed_data_file={root / 'mixture'}"),
        ],
        cwd=root,
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert finished.returncode == 0, finished.stderr[-3000:]
    return root / "run", finished.stdout
