"""`python -m wuxia_core.evaluate OUTPUT_DIR`: measure a run and say what came out."""

import argparse
import logging
import sys
from pathlib import Path

import pandas as pd
from torch import cuda

from wuxia_core.config import load_config
from wuxia_core.errors import DataError, WuxiaError
from wuxia_core.evaluate import closing_table, evaluate
from wuxia_core.evaluate.closing import refusals
from wuxia_core.evaluate.wits import harness
from wuxia_core.model import load_adapter


def main(arguments: list[str] | None = None) -> int:
    """Run from the command line; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m wuxia_core.evaluate", description=__doc__)
    parser.add_argument("output_dir", help="run folder, as in training.output_dir")
    parser.add_argument(
        "--gate", action="store_true", help="end with 3 if it copied or lost its wits"
    )
    parser.add_argument("--harness", nargs="+", metavar="TASK", help="lm-eval's, such as cmmlu")
    options = parser.parse_args(arguments)
    try:
        if options.harness:
            print(_harness(options.output_dir, options.harness).to_string(index=False))
            return 0
        card = evaluate(options.output_dir)
        print(closing_table(card))
        limits = load_config(Path(options.output_dir) / "config.yaml").evaluation
        if options.gate and (found := refusals(card, limits)):
            raise DataError("\n  ".join(["not to be published:", *found]))
    except WuxiaError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_status
    return 0


def _harness(output_dir: str, tasks: list[str]) -> pd.DataFrame:
    """Run tasks of lm-evaluation-harness with base and tuned."""
    model, tokenizer = load_adapter(output_dir, "cuda" if cuda.is_available() else "cpu")
    with model.disable_adapter():
        base = harness(model, tokenizer, tasks)
    tuned = harness(model, tokenizer, tasks)
    return pd.concat([base.assign(model="base"), tuned.assign(model="tuned")])


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    sys.exit(main())
