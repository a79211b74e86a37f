"""Run a notebook with parameters and export it as one HTML file that opens offline.

    python -m wuxia_core.report 05_evaluate_adapter -p output_dir output/sample

papermill accepts a misspelt parameter in silence, and pastes its name in as code: names are
checked against the notebook first.
"""

import argparse
import difflib
import logging
import os
import sys
from pathlib import Path
from typing import Any

import yaml

from wuxia_core.config import PROJECT
from wuxia_core.errors import ConfigError, DataError, MachineError, exit_status

NOTEBOOKS = PROJECT / "notebooks"
KINDS = ["text/html", "image/png", "image/jpeg", "text/plain"]  # the best of them is exported
TEMPLATE = """
{%- extends 'display_priority.j2' -%}
{%- block input -%}{{ cell.source | visible | highlight_code }}{%- endblock -%}
{%- block markdowncell -%}{{ cell.source | visible | markdown2html }}{%- endblock -%}
{%- block rawcell -%}{%- endblock -%}
{%- block stream -%}<pre>{{ output.text | escape_text }}</pre>{%- endblock -%}
{%- block traceback_line -%}<pre>{{ line | strip_ansi | escape_text }}</pre>{%- endblock -%}
{%- block execute_result -%}
{%- block data_priority scoped -%}{{ super() }}{%- endblock -%}
{%- endblock -%}
{%- block data_html -%}<div>{{ output.data['text/html'] }}</div>{%- endblock -%}
{%- block data_png -%}
<img alt="plot" src="data:image/png;base64,{{ output.data['image/png'] | escape_text }}">
{%- endblock -%}
{%- block data_jpg -%}
<img alt="picture" src="data:image/jpeg;base64,{{ output.data['image/jpeg'] | escape_text }}">
{%- endblock -%}
{%- block data_text -%}<pre>{{ output.data['text/plain'] | escape_text }}</pre>{%- endblock -%}
"""
PAGE = """<!DOCTYPE html>
<html lang="zh-Hans"><head><meta charset="utf-8"><title>{title}</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<style>
:root {{ color-scheme: light dark }}
body {{ max-width: 62rem; margin: 2rem auto; padding: 0 1rem; font: 16px/1.6 "Noto Sans SC",
 "Noto Sans CJK SC", "PingFang SC", "Microsoft YaHei", system-ui, sans-serif;
 overflow-wrap: break-word }}
pre {{ font-size: 13px; padding: .5rem; background: rgba(128,128,128,.12); white-space: pre-wrap }}
img {{ max-width: 100%; background: white }}
table {{ border-collapse: collapse; border: 0; font-size: 14px; display: block; overflow-x: auto }}
td, th {{ padding: .2rem .6rem; text-align: right; border: 0;
 border-bottom: 1px solid rgba(128,128,128,.4) }}
.highlight .c1 {{ color: light-dark(#57606a, #9aa4ae) }}
.highlight :is(.k, .kn, .kc, .ow) {{ color: light-dark(#6f42c1, #d2a8ff) }}
.highlight [class^=s] {{ color: light-dark(#0a5a1e, #a5d6a7) }}
.highlight [class^=m] {{ color: light-dark(#0550ae, #79c0ff) }}
</style></head><body>{body}</body></html>
"""


def run(name: str, parameters: dict[str, Any], folder: Path) -> Path:
    """Execute `notebooks/NAME.ipynb` and write it and its HTML into a folder; return the HTML.

    Raises `ConfigError` where the notebook or one of its parameters does not exist; `DataError`
    where a cell fails, with its error; `MachineError` where its kernel dies.
    """
    import papermill
    from nbclient.exceptions import DeadKernelError

    source = NOTEBOOKS / f"{name}.ipynb"
    if not source.is_file():
        there = ", ".join(sorted(path.stem for path in NOTEBOOKS.glob("*.ipynb")))
        raise ConfigError(f"no notebook {name}; there are: {there}")
    _check_names(source, parameters)
    folder.mkdir(parents=True, exist_ok=True)
    executed = folder / f"{name}.ipynb"
    logging.getLogger("papermill").setLevel(logging.WARNING)
    for bars in ("TQDM_DISABLE", "HF_HUB_DISABLE_PROGRESS_BARS"):
        os.environ.setdefault(bars, "1")  # for the kernel: a page has no use for them
    quiet = {"kernel_name": "python3", "extra_arguments": ["--IPKernelApp.log_level=ERROR"]}
    try:
        papermill.execute_notebook(str(source), str(executed), parameters, **quiet)
    except papermill.PapermillExecutionError as error:
        raise DataError(f"{executed}: {error.ename}: {error.evalue}") from None
    except DeadKernelError:
        raise MachineError(f"{executed}: its kernel died, for want of memory?") from None
    return _export(executed)


def _check_names(source: Path, parameters: dict[str, Any]) -> None:
    import papermill

    known = papermill.inspect_notebook(str(source))
    for name in parameters:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {close[0]}?" if close else f"; it has {', '.join(known)}"
            raise ConfigError(f"{source.name} has no parameter {name}{hint}")


def _export(executed: Path) -> Path:
    """Write HTML without scripts, under a policy that would refuse them.

    Only `KINDS` of output are written. Markdown keeps its tags as text, and loses links that run.
    """
    import mistune
    from nbconvert import HTMLExporter
    from nbconvert.preprocessors import CoalesceStreamsPreprocessor

    from wuxia_core.text import escape, visible

    logging.getLogger("traitlets").setLevel(logging.ERROR)
    exporter = HTMLExporter(raw_template=TEMPLATE, exclude_input_prompt=True)
    exporter.config.NbConvertBase.display_data_priority = KINDS
    exporter.register_preprocessor(CoalesceStreamsPreprocessor, enabled=True)
    markdown = mistune.create_markdown(plugins=["table", "url"])
    exporter.register_filter(  # a link to a notebook becomes one to its report
        "markdown2html", lambda text: str(markdown(text)).replace('.ipynb">', '.html">')
    )
    exporter.register_filter("visible", visible)
    exporter.register_filter("escape_text", escape)
    body, _ = exporter.from_filename(str(executed))
    page = executed.with_suffix(".html")
    page.write_text(PAGE.format(title=escape(executed.stem), body=body), encoding="utf-8")
    return page


def main(arguments: list[str] | None = None) -> int:
    """Run from the command line; return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m wuxia_core.report", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("notebook", help="stem of a file in notebooks/, such as 02_see_masks")
    parser.add_argument("-p", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"))
    parser.add_argument("--out", default="output/reports", help="folder (%(default)s)")
    options = parser.parse_args(arguments)
    parameters = {name: yaml.safe_load(value) for name, value in options.p}
    return exit_status(lambda: print(run(options.notebook, parameters, Path(options.out))))


if __name__ == "__main__":
    sys.exit(main())
