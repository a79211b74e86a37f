"""`python -m wuxia_core.evaluate OUTPUT_DIR`: measure a run and say what came out."""

import argparse
import logging
import sys

from wuxia_core.errors import ConfigError, WuxiaError
from wuxia_core.evaluate import closing_table, evaluate


def main(arguments: list[str] | None = None) -> int:
    """Run from the command line; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m wuxia_core.evaluate", description=__doc__)
    parser.add_argument("output_dir", help="run folder, as in training.output_dir")
    parser.add_argument("--gate", action="store_true", help="fail over a threshold (not yet)")
    options = parser.parse_args(arguments)
    try:
        if options.gate:
            raise ConfigError("--gate: not yet; leave it out")
        print(closing_table(evaluate(options.output_dir)))
    except WuxiaError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_status
    return 0


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    sys.exit(main())
