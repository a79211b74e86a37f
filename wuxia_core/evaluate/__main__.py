"""Measure a run folder, unless it was, and say what came out; stopped, it goes on later.

    python -m wuxia_core.evaluate OUTPUT_DIR

How it is measured stands under `evaluation:` in the folder's config.yaml.
"""

import argparse
import functools
import logging
import sys
import warnings
from pathlib import Path

from wuxia_core.config import load_config
from wuxia_core.errors import DataError, exit_status
from wuxia_core.evaluate import closing_table, read_scorecard
from wuxia_core.evaluate.closing import gate_failures
from wuxia_core.evaluate.wits import both_harness


def main(arguments: list[str] | None = None) -> int:
    """Run from the command line; return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m wuxia_core.evaluate", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("output_dir", help="run folder, as in training.output_dir")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--gate", action="store_true", help="end with 3 if it copied or forgot")
    what.add_argument("--harness", nargs="+", metavar="TASK", help="lm-eval's, such as cmmlu")
    return exit_status(functools.partial(_measure, parser.parse_args(arguments)))


def _measure(options: argparse.Namespace) -> None:
    if options.harness:
        print(both_harness(options.output_dir, options.harness).to_string(index=False))
        return
    card = read_scorecard(options.output_dir)
    print(closing_table(card))
    if options.gate:
        limits = load_config(Path(options.output_dir) / "config.yaml").evaluation
        if found := gate_failures(card, limits):
            raise DataError("\n  ".join(["not to be published:", *found]))
        print("\ngate: nothing that was measured speaks against publishing it")


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    sys.exit(main())
