import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from wuxia_core.config import PROJECT, Config, load_config
from wuxia_core.corpus import reading

CORPUS = Path(os.environ.get("WUXIA_CORPUS", PROJECT.parent / "shared" / "corpus"))

os.environ["HF_HUB_OFFLINE"] = "1"  # the hub is never asked by a test
os.environ["WUXIA_LANG"] = "en"  # what is said is compared in English


@pytest.fixture(autouse=True)
def unwarned():
    """Let each test be warned, as each process is."""
    reading._warn.cache_clear()


def has_chinese(note: str) -> bool:
    """Whether a note on a file is told to a Chinese reader in Chinese."""
    from wuxia_core.show import translated

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WUXIA_LANG", "zh")
        return translated(note) != note


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


@pytest.fixture
def small_disk(tmp_path):
    """Mount a disk of so many MiB by calling it; its folder."""
    disk, mounted = tmp_path / "disk", []
    disk.mkdir()

    def mount(mebibytes: int) -> Path:
        command = ["mount", "-t", "tmpfs", "-o", f"size={mebibytes}m", "tmpfs", str(disk)]
        if subprocess.run(command, capture_output=True).returncode:
            pytest.skip("no tmpfs can be mounted")
        mounted.append(disk)
        return disk

    yield mount
    for path in mounted:
        subprocess.run(["umount", "-l", str(path)], check=True)


NVIDIA_SMI = """#!/bin/sh
test "$1" = --query-gpu=driver_version,name || exit 2
echo "{driver}, NVIDIA GeForce RTX 4090"
exit {status}
"""


@pytest.fixture
def nvidia_smi(tmp_path, monkeypatch):
    """Put the program that knows the cards on the path, for a machine whose torch sees none."""
    import torch

    if torch.cuda.is_available():
        pytest.skip("torch sees the cards")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    def nvidia_smi(driver, status=0):
        path = tmp_path / "nvidia-smi"
        path.write_text(NVIDIA_SMI.format(driver=driver, status=status))
        path.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")

    return nvidia_smi


class Launched:
    """The sample, launched as a user does; `.wait()` gives its folder and what was printed."""

    def __init__(self, root: Path, *settings: str) -> None:
        pairs = (
            f"training.output_dir={root / 'run'}",
            f"data.processed_data_file={root / 'mixture'}",
            *settings,
        )
        command = [sys.executable, str(PROJECT / "launch_ddp.py")]
        command += [word for pair in pairs for word in ("--set", pair)]
        self._folder = root / "run"
        streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        self._process = subprocess.Popen(command, cwd=root, **streams)

    def wait(self) -> tuple[Path, str]:
        printed, errors = self._process.communicate(timeout=900)
        assert self._process.returncode == 0, errors[-3000:]
        return self._folder, printed


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: "short_run" in item.fixturenames)  # which takes a minute by then


@pytest.fixture(scope="session", autouse=True)
def launched_short(request, tmp_path_factory):
    """Launch at once what is asked for at the end, since these tests leave a core idle."""
    if any("short_run" in item.fixturenames for item in request.session.items):
        settings = ["training.max_steps=12", "training.eval_steps=6", "training.save_steps=6"]
        root = tmp_path_factory.mktemp("short")
        novels = shutil.copytree(PROJECT / "data" / "sample", root / "novels")
        (novels / "射雕.pdf").write_bytes(b"%PDF-1.4")
        (novels / "空.txt").touch()
        settings += [f"data.data_dir={novels}", f"data.general_file={novels / 'general'}"]
        return Launched(root, *settings, "evaluation.minutes=0.01")


@pytest.fixture(scope="session")
def short_run(launched_short):
    """The sample with few steps and small samples, for all that does not ask what was learned.

    Beside its novels lie a file that is not read and an empty one.
    """
    return launched_short.wait()


@pytest.fixture(scope="session")
def sample_run(tmp_path_factory):
    """The sample with all its steps; its tests are in the group `slow`."""
    return Launched(tmp_path_factory.mktemp("launch"), "evaluation.minutes=0.5").wait()
