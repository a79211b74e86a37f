"""What is installed: a wheel that needs no checkout, what it depends on, what importing loads."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import venv
from pathlib import Path
from zipfile import ZipFile

import pytest
import yaml

from wuxia_core.config import PROJECT

PACKED = ["wuxia_core", "configs", "data/lexicon.txt", "data/sample", "data/tiny_base", "notebooks"]
SHORT = ["max_steps=4", "eval_steps=4", "save_steps=4"]
SETTINGS = tomllib.loads((PROJECT / "pyproject.toml").read_text(encoding="utf-8"))


def shell(*command, cwd):
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    finished = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr[-3000:]
    return finished.stdout


def packed_files():
    """Files of the checkout that an installed package needs too."""
    for name in PACKED:
        paths = [PROJECT / name, *(PROJECT / name).rglob("*")]
        kept = [p for p in paths if p.is_file() and not {"__pycache__"} & {*p.parts}]
        yield from (path.relative_to(PROJECT) for path in kept)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    copy = tmp_path_factory.mktemp("source")
    for path in [*packed_files(), "pyproject.toml", "launch_ddp.py", "LICENSE"]:
        (copy / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(PROJECT / path, copy / path)
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    shell(*pip, "--wheel-dir", "dist", ".", cwd=copy)
    (path,) = (copy / "dist").glob("*.whl")
    return path


@pytest.mark.slow
def test_a_wheel_holds_what_a_checkout_does(wheel):
    packed = ZipFile(wheel).namelist()
    inside = [p if p.parts[0] == "wuxia_core" else "wuxia_core/project" / p for p in packed_files()]
    assert sorted(map(str, inside)) == sorted(name for name in packed if name[:11] == "wuxia_core/")
    assert "launch_ddp.py" in packed


@pytest.mark.slow
def test_an_installed_wheel_runs_the_sample_in_an_empty_folder(wheel, tmp_path):
    """In an environment of its own, which takes from this one all but the project."""
    venv.create(tmp_path / "venv", symlinks=True)
    (tmp_path / "empty").mkdir()
    python = str(tmp_path / "venv/bin/python")
    base = {"base": str(tmp_path / "venv"), "platbase": str(tmp_path / "venv")}
    installed = Path(sysconfig.get_path("purelib", vars=base))
    (installed / "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps"]
    shell(*pip, str(wheel), cwd=tmp_path)
    found = shell(python, "-c", "import wuxia_core; print(wuxia_core.__file__)", cwd=tmp_path)
    assert Path(found).is_relative_to(installed)

    launch = [python, "-m", "launch_ddp", *(x for s in SHORT for x in ("--set", f"training.{s}"))]
    assert "plan, arithmetic" in shell(*launch, "--plan", cwd=tmp_path / "empty")
    assert not list((tmp_path / "empty").iterdir())
    shell(*launch, "--set", "evaluation.minutes=0.01", cwd=tmp_path / "empty")
    assert (tmp_path / "empty/output/sample/scorecard.json").is_file()
    assert sorted(path.name for path in (tmp_path / "empty").iterdir()) == ["data", "output"]


def test_importing_the_package_loads_nothing_large():
    large = "'torch', 'transformers', 'peft', 'pandas', 'scipy', 'sklearn', 'matplotlib', 'numpy'"
    code = f"import sys, wuxia_core; sys.exit(' '.join({{{large}}} & {{*sys.modules}}) or 0)"
    shell(sys.executable, "-c", code, cwd=PROJECT)


def test_conda_installs_what_pip_does():
    conda = yaml.safe_load((PROJECT / "environment.yml").read_text(encoding="utf-8"))
    python, pip, packages = conda["dependencies"]
    assert (python, pip) == (f"python{SETTINGS['project']['requires-python']}", "pip")
    (package,) = packages["pip"]
    extra = re.fullmatch(r"-e \.\[(\w+)\]", package)
    assert extra and extra[1] in SETTINGS["project"]["optional-dependencies"]
