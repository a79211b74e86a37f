"""`python -m wuxia_core.evaluate OUTPUT_DIR`: measure a run and say what came out."""

import argparse
import functools
import logging
import sys
from pathlib import Path

from wuxia_core.config import load_config
from wuxia_core.errors import DataError, exit_status
from wuxia_core.evaluate import closing_table, evaluate
from wuxia_core.evaluate.closing import refusals
from wuxia_core.evaluate.harness import both_harness


def main(arguments: list[str] | None = None) -> int:
    """Run from the command line; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m wuxia_core.evaluate", description=__doc__)
    parser.add_argument("output_dir", help="run folder, as in training.output_dir")
    parser.add_argument(
        "--gate", action="store_true", help="end with 3 if it copied or lost its wits"
    )
    parser.add_argument("--harness", nargs="+", metavar="TASK", help="lm-eval's, such as cmmlu")
    return exit_status(functools.partial(_measure, parser.parse_args(arguments)))


def _measure(options: argparse.Namespace) -> None:
    if options.harness:
        print(both_harness(options.output_dir, options.harness).to_string(index=False))
        return
    card = evaluate(options.output_dir)
    print(closing_table(card))
    limits = load_config(Path(options.output_dir) / "config.yaml").evaluation
    if options.gate and (found := refusals(card, limits)):
        raise DataError("\n  ".join(["not to be published:", *found]))


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    sys.exit(main())
