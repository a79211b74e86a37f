import re
import shlex
import subprocess
import sys

import nbformat
import pytest

from wuxia_core import report
from wuxia_core.config import PROJECT
from wuxia_core.errors import ConfigError
from wuxia_core.report import NOTEBOOKS, run

ALL = sorted(path.stem for path in NOTEBOOKS.glob("*.ipynb"))


@pytest.mark.slow
@pytest.mark.parametrize("name", ALL)
def test_a_notebook_runs_headless_and_draws(name, sample_run, tmp_path):
    folder, _ = sample_run
    parameters = {
        "01_explore_corpus": {},
        "02_see_masks": {"output_dir": str(folder), "span_length": [2, 6]},
        "03_mix_corpora": {"output": str(tmp_path / "mixture")},
        "04_watch_training": {"output_dir": str(folder)},
        "05_evaluate_adapter": {"output_dir": str(folder)},
        "06_compare_objectives": {"output_dir": str(folder)},
        "07_write": {"output_dir": str(folder), "other_dir": str(folder), "tokens": 20},
    }[name]
    page = run(name, parameters, tmp_path / "out").read_text(encoding="utf-8")
    shown = {"02_see_masks": "tuned, right", "07_write": "1 (as trained)"}
    assert shown.get(name, "data:image/png;base64,") in page
    assert "<script" not in page and "http-equiv" in page
    assert "Traceback" not in page and "Error" not in page


@pytest.mark.parametrize("name", ALL)
def test_a_notebook_keeps_the_house_rules(name):
    cells = nbformat.read(NOTEBOOKS / f"{name}.ipynb", 4).cells
    assert cells[0].cell_type == "markdown" and cells[0].source.startswith("# ")
    assert cells[1].metadata.tags == ["parameters"]
    assert all(re.fullmatch(r"\w+: \w+ = .+  # .+", line) for line in cells[1].source.splitlines())
    for cell in cells:
        if cell.cell_type == "markdown" and name != "06_compare_objectives":
            for heading in re.findall("^#+ .*", cell.source, re.MULTILINE):
                assert re.fullmatch("#+ .*[\u4e00-\u9fff].* · [ -~’]+", heading)
        if cell.cell_type == "code":
            assert not cell.outputs and cell.execution_count is None
            assert len(cell.source.splitlines()) <= 10
            assert not re.search(r"^\s*(def|class) |^!|[\"']/[a-z]", cell.source, re.MULTILINE)


def test_a_misspelt_parameter_or_notebook_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="data_dri; there are: data_dir"):
        run("01_explore_corpus", {"data_dri": "x"}, tmp_path)
    with pytest.raises(ConfigError, match="there are: 01_explore_corpus, 02"):
        run("01_explore", {}, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_the_command_of_notebook_03_runs_as_printed(tmp_path):
    page = run("03_mix_corpora", {"output": str(tmp_path / "mine")}, tmp_path / "out")
    printed = nbformat.read(page.with_suffix(".ipynb"), 4).cells[-1].outputs[0].text
    assert "--name mine" in printed
    command = [sys.executable, *shlex.split(printed)[1:], "--plan"]
    said = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, check=True)
    assert "the run: 400 steps" in said.stdout


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in ALL if name > "04"])
def test_without_a_run_a_notebook_ends_in_one_line_with_the_command(name, tmp_path, capsys):
    out = tmp_path / "o"
    assert report.main([name, "-p", "output_dir", str(tmp_path), "--out", str(out)]) == 3
    assert "python launch_ddp.py" in capsys.readouterr().err
    cells = nbformat.read(out / f"{name}.ipynb", 4).cells
    (error,) = [o for cell in cells for o in cell.get("outputs", []) if o.output_type == "error"]
    (line,) = error.traceback
    assert line.startswith("error: ") and "\n" not in line
