"""One HTML file that opens offline: of a run, or of a notebook executed with parameters.

    python -m wuxia_core.report output/sample                             output/sample/index.html
    python -m wuxia_core.report 05_evaluate_adapter -p output_dir output/sample

A run that has no scorecard yet is evaluated first. papermill accepts a misspelt parameter in
silence, and pastes its name in as code, so names are first checked against the notebook's.
"""

import argparse
import logging
import re
from pathlib import Path
from tempfile import TemporaryDirectory

import mistune
import nbformat
import papermill
from markupsafe import Markup
from nbclient.exceptions import DeadKernelError

from wuxia_core.config import PROJECT, read_value
from wuxia_core.errors import (
    ConfigError,
    DataError,
    MachineError,
    command_parser,
    exit_status,
    raise_machine_error,
    run_command,
)
from wuxia_core.evaluate import evaluate
from wuxia_core.messages import messages
from wuxia_core.page import public, render, shareable, write_page

NOTEBOOKS = PROJECT / "notebooks"
FOLDED = Markup("<details><summary>{}</summary><pre>{}</pre></details>")
PICTURE = Markup('<img alt="plot" src="data:image/png;base64,{}">')
PREFORMATTED = Markup("<pre>{}</pre>")
HEADING = re.compile(r"^#+ (.+)", re.MULTILINE)  # of Markdown, its text as group 1


def run(name: str, parameters: dict[str, object], folder: Path) -> Path:
    """Execute `notebooks/NAME.ipynb`, write it and its HTML into `folder`; return the HTML's path.

    A parameter that is given as text, as on the command line, stays text if the notebook's default
    is text or None; otherwise it is read as YAML: "3" becomes 3. If a cell fails, only the notebook
    is written, with what was executed.

    Raises `ConfigError` if the notebook or one of its parameters does not exist, or the folder
    holds another notebook of that name; `DataError` if a cell fails, with the cell's error;
    `MachineError` if the kernel dies, or the folder cannot be written.
    """
    source = NOTEBOOKS / f"{name}.ipynb"
    values = _read_parameters(parameters, source)
    executed = folder / source.name
    # A notebook that papermill executed names papermill in its metadata. No other is overwritten.
    if executed.exists() and '"papermill"' not in executed.read_text("utf-8", "replace"):
        raise ConfigError(f"--out {folder}: its {executed.name} is no report; name another")
    logging.getLogger("papermill").setLevel(logging.WARNING)
    quiet = {"kernel_name": "python3", "extra_arguments": ["--IPKernelApp.log_level=ERROR"]}
    with raise_machine_error(str(folder)):
        folder.mkdir(parents=True, exist_ok=True)
        # A report that is there already stays until the new one is complete.
        with TemporaryDirectory(dir=folder, prefix=".") as staging:
            staged = Path(staging) / source.name
            try:
                papermill.execute_notebook(source, staged, values, progress_bar=False, **quiet)
            except papermill.PapermillExecutionError as error:
                staged.replace(executed)
                raise DataError(f"{executed}: {error.ename}: {error.evalue}") from None
            except DeadKernelError:
                raise MachineError(f"{executed}: its kernel died, for want of memory?") from None
            for path in (write_html(staged), staged):
                path.replace(folder / path.name)
    return executed.with_suffix(".html")


def _read_parameters(parameters: dict[str, object], source: Path) -> dict[str, object]:
    """Turn the parameters that are given as text into values, as `run` describes; return all.

    Raises `ConfigError` if there is no notebook `source`, or it has no parameter of a given name;
    the message lists the notebooks, or the parameters, that there are.
    """
    if not source.is_file():
        stems = ", ".join(sorted(path.stem for path in NOTEBOOKS.glob("*.ipynb")))
        raise ConfigError(f"no run folder and no notebook {source.stem}; there are: {stems}")
    known = papermill.inspect_notebook(source)  # by name: its default, as Python code, and more
    for name in parameters.keys() - known.keys():
        raise ConfigError(f"{source.name}: no parameter {name}; there are: {', '.join(known)}")
    given = {name: value for name, value in parameters.items() if isinstance(value, str)}
    # The default is Python code: if it is a string or None, the value stays text.
    is_text = {name: known[name]["default"].startswith(('"', "'", "None")) for name in given}
    values = {name: read_value(value, text=is_text[name]) for name, value in given.items()}
    return parameters | values


def write_html(executed: Path) -> Path:
    """Write an executed notebook as one HTML file beside it; return the file's path.

    The page may be sent around: its policy refuses scripts, and all texts and outputs are
    `public`. Code is folded away; stderr, which has the log and warnings, is left out. HTML tags in
    Markdown are shown as text, and links that run scripts are dropped. The page's title is the
    notebook's first heading, or its file's name if it has none.
    """
    markdown = mistune.create_markdown(plugins=["table", "url"])
    cells, label = nbformat.read(executed, 4).cells, messages("report")["code"]
    body = Markup()
    for cell in cells:
        if cell.cell_type == "markdown":
            html = str(markdown(shareable(cell.source)))
            body += Markup(html.replace('.ipynb">', '.html">'))  # links lead to reports
        elif cell.cell_type == "code":
            body += FOLDED.format(label, shareable(cell.source))
            body += Markup().join(map(_output_html, cell.outputs))
    heading = HEADING.search("\n".join(c.source for c in cells if c.cell_type == "markdown"))
    page = executed.with_suffix(".html")
    title = heading[1] if heading else executed.stem
    page.write_text(render("report.html", title=title, about="", body=body), encoding="utf-8")
    return page


def _output_html(output: nbformat.NotebookNode) -> Markup:
    """Write an output of a cell as HTML: its own HTML, else its picture, else its text.

    The output's own HTML is not escaped, only made `public`. For stderr the result is "".
    """
    if output.get("name") == "stderr":
        return Markup()
    data = output.get("data", {"text/plain": output.get("text", "")})
    if "text/html" in data:
        return Markup(f"<div>{public(data['text/html'])}</div>")
    if "image/png" in data:
        return PICTURE.format(data["image/png"])
    # A progress bar writes its line again after each \r: only the last state of the line is kept.
    text = re.sub(r".*\r(?!\n)|\r(?=\n)", "", data.get("text/plain", ""))
    return PREFORMATTED.format(shareable(text))


def main(arguments: list[str] | None = None) -> int:
    """Run from the command line; return the exit status."""
    parser = command_parser("wuxia_core.report", __doc__)
    parser.add_argument("what", help="run folder, or stem of a notebook, such as 02_see_masks")
    parser.add_argument("-p", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"))
    parser.add_argument("--out", type=Path, default="output/reports", help="folder (%(default)s)")
    return exit_status(lambda: print(_make(parser.parse_args(arguments))))


def _make(options: argparse.Namespace) -> Path:
    """Make the page of the run folder or notebook that `what` names; return the page's path.

    A run is evaluated first, unless it has a current scorecard. With parameters (`-p`) `what` is
    taken for the name of a notebook. Raises `ConfigError` if there is no such folder or notebook, a
    parameter or the config is wrong, or `--out` has another file; `DataError` if a cell fails, or
    the run lacks adapter, mixture or metrics; `MachineError` if base, kernel or disk fails.
    """
    folder = Path(options.what)
    if (folder / "config.yaml").is_file() and not options.p:
        return write_page(folder, evaluate(folder))
    return run(options.what, dict(options.p), options.out)


if __name__ == "__main__":
    run_command(main)
