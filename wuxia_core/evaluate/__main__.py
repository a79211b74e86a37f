"""Measure a run folder, unless it was measured before, and say what came out.

An evaluation that was stopped goes on where it was when it is started again. Its settings stand
under `evaluation:` in the folder's config.yaml.
"""

import argparse
import functools
import importlib.util
from pathlib import Path

from wuxia_core.config import load_config
from wuxia_core.errors import (
    ConfigError,
    DataError,
    MachineError,
    command_parser,
    exit_status,
    run_command,
)
from wuxia_core.evaluate import closing_words, evaluate
from wuxia_core.evaluate.scorecard import bits_sentence, gate_failures, quick_look
from wuxia_core.model import best_device, load_adapter


def main(arguments: list[str] | None = None) -> int:
    """Run the command with `arguments`, by default the command line's; return the exit status."""
    parser = command_parser("wuxia_core.evaluate", __doc__)
    parser.add_argument("output_dir", type=Path, help="run folder, as in training.output_dir")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--quick", action="store_true", help="passages and bits per character only")
    mode.add_argument("--gate", action="store_true", help="end with 3 if it copied or forgot")
    mode.add_argument("--harness", nargs="+", metavar="TASK", help="lm-eval's, such as cmmlu")
    return exit_status(functools.partial(_measure, parser.parse_args(arguments)))


def _measure(options: argparse.Namespace) -> None:
    """Measure what the parsed command line asks for, and print it.

    With `--harness` the tables of lm-evaluation-harness are printed. With `--quick` the first
    passages are printed, then one sentence on the bits per character of 武侠 and one on those of
    general text. Otherwise the closing words of the scorecard are printed; if the scorecard had to
    be measured, the first passages come before them. With `--gate` one more sentence says that
    nothing speaks against publishing the adapter.

    Raises `DataError` if something does speak against it (with `--gate`), or the folder lacks a
    finished adapter of this base or its mixture; `ConfigError` if the run's config or a task's name
    is wrong, or lm-eval is missing; `MachineError` if base, GPU, network or disk fails.
    """
    if options.harness:
        run_harness(options.output_dir, options.harness)
    elif options.quick:
        # The first two rows are those of bits per character: of 武侠, then of general text.
        wuxia, general = quick_look(options.output_dir, echo=print)["metrics"][:2]
        print(f"\n{bits_sentence(wuxia)}\n{bits_sentence(general)}")
    else:
        scorecard = evaluate(options.output_dir, echo=print)
        print(closing_words(scorecard))
        if options.gate:
            limits = load_config(options.output_dir / "config.yaml").evaluation
            if failures := list(gate_failures(scorecard, limits)):
                raise DataError("\n  ".join(["not to be published:", *failures]))
            print("\ngate: nothing that was measured speaks against publishing it")


def run_harness(output_dir: Path, tasks: list[str]) -> None:
    """Run tasks of lm-evaluation-harness (Gao et al. 2024) on base and tuned; print both tables.

    `tasks` are names of tasks or groups, such as "ceval-valid" and "cmmlu", or paths of task files
    (YAML) of your own. The data of named tasks are downloaded from the hub and stay in its cache.

    Raises
    ------
    ConfigError
        If lm-eval is not installed, or does not know one of `tasks`.
    DataError
        If `output_dir` holds no adapter, or one of another base.
    MachineError
        If the data of a task can be neither downloaded nor found in the cache; if the base cannot
        be loaded; if the machine has a GPU that torch cannot use.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise ConfigError("harness: lm-eval is not installed; pip install -e '.[harness]'")
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.utils import make_table

    model, tokenizer = load_adapter(output_dir, best_device())
    # lm-eval calls `tie_weights`. It would fail, since PEFT has wrapped the embedding to train the
    # mask token's row; and it is not needed, since the weights are tied already.
    model.tie_weights = lambda: None
    # One row in a batch, since several long rows might not fit into memory.
    wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1, softmax_dtype="float32")
    try:
        with model.disable_adapter():
            base = simple_evaluate(wrapped, tasks=tasks)
        tuned = simple_evaluate(wrapped, tasks=tasks)
    except KeyError as error:  # lm-eval does not know the task
        raise ConfigError(f"harness: {error}; lm-eval ls tasks lists all") from None
    except OSError as error:
        remedy = "run it once where there is a network, or set HF_ENDPOINT to a mirror"
        raise MachineError(f"harness: the data cannot be had ({error}); {remedy}") from None
    print(f"base\n{make_table(base)}\ntuned\n{make_table(tuned)}")


if __name__ == "__main__":
    run_command(main)
