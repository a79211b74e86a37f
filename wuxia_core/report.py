"""Run a notebook with parameters and export it as one HTML file that opens offline.

    python -m wuxia_core.report 05_evaluate_adapter -p output_dir output/sample

papermill accepts a misspelt parameter in silence, and pastes its name in as code: names are
checked against the notebook first.
"""

import argparse
import logging
import os
import re
import sys
from pathlib import Path

import mistune
import nbformat
import papermill
import yaml
from nbclient.exceptions import DeadKernelError

from wuxia_core.config import PROJECT
from wuxia_core.errors import ConfigError, DataError, MachineError, exit_status
from wuxia_core.text import escape, visible

NOTEBOOKS = PROJECT / "notebooks"
PAGE = """<!DOCTYPE html>
<html lang="zh-Hans"><head><meta charset="utf-8"><title>{title}</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<style>
:root {{ color-scheme: light dark }}
body {{ max-width: 62rem; margin: 2rem auto; padding: 0 1rem; overflow-wrap: break-word;
 font: 16px/1.6 "Noto Sans SC", "Noto Sans CJK SC", "PingFang SC", "Microsoft YaHei", sans-serif }}
pre {{ font-size: 13px; padding: .5rem; background: rgba(128,128,128,.12); white-space: pre-wrap }}
img {{ max-width: 100%; background: white }}
table {{ border-collapse: collapse; font-size: 14px; display: block; overflow-x: auto }}
td, th {{ padding: .2rem .6rem; text-align: right; border-bottom: 1px solid rgba(128,128,128,.4) }}
</style></head><body>{body}</body></html>
"""


def run(name: str, parameters: dict[str, object], folder: Path) -> Path:
    """Execute `notebooks/NAME.ipynb` and write it and its HTML into a folder; return the HTML.

    Raises `ConfigError` where the notebook or one of its parameters does not exist; `DataError`
    where a cell fails, with its error; `MachineError` where its kernel dies.
    """
    source = NOTEBOOKS / f"{name}.ipynb"
    _check_names(source, parameters)
    folder.mkdir(parents=True, exist_ok=True)
    executed = folder / source.name
    logging.getLogger("papermill").setLevel(logging.WARNING)
    # For the kernel: a page has no use for progress bars.
    os.environ |= {"TQDM_DISABLE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    quiet = {"kernel_name": "python3", "extra_arguments": ["--IPKernelApp.log_level=ERROR"]}
    try:
        papermill.execute_notebook(source, executed, parameters, **quiet)
    except papermill.PapermillExecutionError as error:
        raise DataError(f"{executed}: {error.ename}: {error.evalue}") from None
    except DeadKernelError:
        raise MachineError(f"{executed}: its kernel died, for want of memory?") from None
    return export(executed)


def _check_names(source: Path, parameters: dict[str, object]) -> None:
    """Refuse a notebook or a parameter that does not exist, naming those that do."""
    if not source.is_file():
        there = ", ".join(sorted(path.stem for path in NOTEBOOKS.glob("*.ipynb")))
        raise ConfigError(f"no notebook {source.stem}; there are: {there}")
    known = papermill.inspect_notebook(source)
    for name in parameters.keys() - known.keys():
        raise ConfigError(f"{source.name}: no parameter {name}; there are: {', '.join(known)}")


def export(executed: Path) -> Path:
    """Write HTML without scripts, under a policy that would refuse them; return its path.

    Markdown keeps its tags as text, and loses links that run; one to a notebook becomes one to its
    report.
    """
    markdown = mistune.create_markdown(plugins=["table", "url"])
    body = ""
    for cell in nbformat.read(executed, 4).cells:
        if cell.cell_type == "markdown":
            body += str(markdown(visible(cell.source))).replace('.ipynb">', '.html">')
        elif cell.cell_type == "code":
            body += f"<pre>{escape(cell.source)}</pre>{''.join(map(_output_html, cell.outputs))}"
    page = executed.with_suffix(".html")
    page.write_text(PAGE.format(title=escape(executed.stem), body=body), encoding="utf-8")
    return page


def _output_html(output: nbformat.NotebookNode) -> str:
    """Draw an output as HTML, picture or text, the first of them that it has; nothing that runs."""
    data = output.get("data", {"text/plain": output.get("text", "")})
    if "text/html" in data:
        return f"<div>{data['text/html']}</div>"
    if "image/png" in data:
        return f'<img alt="plot" src="data:image/png;base64,{escape(data["image/png"])}">'
    # Of a progress bar only its last state.
    text = re.sub(r".*\r(?!\n)|\r(?=\n)", "", data.get("text/plain", ""))
    return f"<pre>{escape(text)}</pre>"


def main(arguments: list[str] | None = None) -> int:
    """Run from the command line; return the exit status."""
    parser = argparse.ArgumentParser("python -m wuxia_core.report", description=__doc__)
    parser.add_argument("notebook", help="stem of a file in notebooks/, such as 02_see_masks")
    parser.add_argument("-p", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"))
    parser.add_argument("--out", type=Path, default="output/reports", help="folder (%(default)s)")
    options = parser.parse_args(arguments)
    parameters = {name: yaml.safe_load(value) for name, value in options.p}
    return exit_status(lambda: print(run(options.notebook, parameters, options.out)))


if __name__ == "__main__":
    sys.exit(main())
