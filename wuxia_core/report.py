"""Run a notebook with parameters and export it as one HTML file that opens offline.

    python -m wuxia_core.report 05_evaluate_adapter -p output_dir output/sample

papermill accepts a misspelt parameter in silence, and pastes its name in as code: names are
checked against the notebook first.
"""

import logging
import os
import re
from pathlib import Path
from string import Template
from tempfile import TemporaryDirectory

import mistune
import nbformat
import papermill
from nbclient.exceptions import DeadKernelError

from wuxia_core.config import PROJECT, read_value
from wuxia_core.errors import (
    SECRET,
    ConfigError,
    DataError,
    MachineError,
    command_line,
    exit_status,
    raise_machine_error,
    run_command,
)
from wuxia_core.text import escape, visible

NOTEBOOKS = PROJECT / "notebooks"
PAGE = Path(__file__).with_suffix(".html")
ABOVE = re.compile(r"(?<![\w./:+<-])/(?:[^\s/<>\"':]+/)+")  # the folders of an absolute path


def run(name: str, parameters: dict[str, object], folder: Path) -> Path:
    """Execute `notebooks/NAME.ipynb` and write it and its HTML into a folder; return the HTML.

    What is typed is taken as text where the notebook has text, else read as YAML.

    Raises `ConfigError` where the notebook or one of its parameters does not exist, or the folder
    holds another notebook of that name; `DataError` where a cell fails, with its error;
    `MachineError` where its kernel dies.
    """
    source = NOTEBOOKS / f"{name}.ipynb"
    values = _read(parameters, source)
    executed = folder / source.name
    if executed.exists() and '"papermill"' not in executed.read_text("utf-8", "replace"):
        raise ConfigError(f"--out {folder}: its {executed.name} is no report; name another")
    logging.getLogger("papermill").setLevel(logging.WARNING)
    # For the kernel: a page has no use for progress bars.
    os.environ |= {"TQDM_DISABLE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    quiet = {"kernel_name": "python3", "extra_arguments": ["--IPKernelApp.log_level=ERROR"]}
    with raise_machine_error(str(folder)):
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=folder, prefix=".") as name:
            staged = Path(name) / source.name
            try:
                papermill.execute_notebook(source, staged, values, progress_bar=False, **quiet)
            except papermill.PapermillExecutionError as error:
                staged.replace(executed)
                raise DataError(f"{executed}: {error.ename}: {error.evalue}") from None
            except DeadKernelError:
                raise MachineError(f"{executed}: its kernel died, for want of memory?") from None
            for path in (export(staged), staged):
                path.replace(folder / path.name)
    return executed.with_suffix(".html")


def _read(parameters: dict[str, object], source: Path) -> dict[str, object]:
    """Read a notebook's parameters; refuse what does not exist, naming what does."""
    if not source.is_file():
        there = ", ".join(sorted(path.stem for path in NOTEBOOKS.glob("*.ipynb")))
        there = there or "none in an installed package; use a checkout (pip install -e .)"
        raise ConfigError(f"no notebook {source.stem}; there are: {there}")
    known = papermill.inspect_notebook(source)
    for name in parameters.keys() - known.keys():
        raise ConfigError(f"{source.name}: no parameter {name}; there are: {', '.join(known)}")
    typed = {name: value for name, value in parameters.items() if isinstance(value, str)}
    text = {name: known[name]["default"].startswith(('"', "'", "None")) for name in typed}
    return parameters | {name: read_value(value, text=text[name]) for name, value in typed.items()}


def export(executed: Path) -> Path:
    """Write HTML without scripts, under a policy that would refuse them; return its path.

    A page may be sent around: nothing secret is in it, and of an absolute path the last name alone.
    Markdown keeps its tags as text, and loses links that run; one to a notebook becomes one to its
    report.
    """
    markdown = mistune.create_markdown(plugins=["table", "url"])
    body = ""
    for cell in nbformat.read(executed, 4).cells:
        if cell.cell_type == "markdown":
            body += str(markdown(visible(cell.source))).replace('.ipynb">', '.html">')
        elif cell.cell_type == "code":
            outputs = "".join(map(_output_html, cell.outputs))
            body += f"<pre>{escape(_public(cell.source))}</pre>{outputs}"
    page, template = executed.with_suffix(".html"), Template(PAGE.read_text(encoding="utf-8"))
    page.write_text(template.substitute(title=escape(executed.stem), body=body), encoding="utf-8")
    return page


def _output_html(output: nbformat.NotebookNode) -> str:
    """Draw an output as HTML, picture or text, the first of them that it has; nothing that runs."""
    data = output.get("data", {"text/plain": output.get("text", "")})
    if "text/html" in data:
        return f"<div>{_public(data['text/html'])}</div>"
    if "image/png" in data:
        return f'<img alt="plot" src="data:image/png;base64,{escape(data["image/png"])}">'
    # Of a progress bar only its last state.
    text = re.sub(r".*\r(?!\n)|\r(?=\n)", "", data.get("text/plain", ""))
    return f"<pre>{escape(_public(text))}</pre>"


def _public(text: str) -> str:
    """Leave out secrets, and the folders of absolute paths."""
    return ABOVE.sub("", SECRET.sub("***", text))


def main(arguments: list[str] | None = None) -> int:
    """Run from the command line; return the exit status."""
    parser = command_line("wuxia_core.report", __doc__)
    parser.add_argument("notebook", help="stem of a file in notebooks/, such as 02_see_masks")
    parser.add_argument("-p", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"))
    parser.add_argument("--out", type=Path, default="output/reports", help="folder (%(default)s)")
    options = parser.parse_args(arguments)
    return exit_status(lambda: print(run(options.notebook, dict(options.p), options.out)))


if __name__ == "__main__":
    run_command(main)
