"""Measure a run folder, unless it was, and say what came out; stopped, it goes on later.

    python -m wuxia_core.evaluate OUTPUT_DIR
    python -m wuxia_core.evaluate OUTPUT_DIR --quick    passages and bits per character only
    python -m wuxia_core.evaluate OUTPUT_DIR --gate     ends with 3 if it copied or forgot

How it is measured stands under `evaluation:` in the folder's config.yaml.
"""

import argparse
import functools
import importlib.util
import logging
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from wuxia_core.config import load_config
from wuxia_core.errors import ConfigError, DataError, MachineError, exit_status
from wuxia_core.evaluate import closing_words, read_scorecard
from wuxia_core.evaluate.scorecard import forgotten, gate_failures, learned, quick_look
from wuxia_core.model import load_adapter

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

BATCH = 8  # questions


def main(arguments: list[str] | None = None) -> int:
    """Run from the command line; return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m wuxia_core.evaluate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("output_dir", help="run folder, as in training.output_dir")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--quick", action="store_true", help="passages and bits per character only")
    what.add_argument("--gate", action="store_true", help="end with 3 if it copied or forgot")
    what.add_argument("--harness", nargs="+", metavar="TASK", help="lm-eval's, such as cmmlu")
    return exit_status(functools.partial(_measure, parser.parse_args(arguments)))


def _measure(options: argparse.Namespace) -> None:
    if options.harness:
        print(harness_both(options.output_dir, options.harness).to_string(index=False))
        return
    if options.quick:
        wuxia, general = quick_look(options.output_dir, echo=print)["metrics"][:2]
        print(f"\n{learned(wuxia)}\n{forgotten(general)}")
        return
    card = read_scorecard(options.output_dir, echo=print)
    print(closing_words(card))
    if options.gate:
        limits = load_config(Path(options.output_dir) / "config.yaml").evaluation
        if found := gate_failures(card, limits):
            raise DataError("\n  ".join(["not to be published:", *found]))
        print("\ngate: nothing that was measured speaks against publishing it")


def harness_both(output_dir: str | Path, tasks: Sequence[str]) -> pd.DataFrame:
    """Run tasks with a run folder's base and tuned model, named in the column `model`."""
    import torch

    model, tokenizer = load_adapter(output_dir, "cuda" if torch.cuda.is_available() else "cpu")
    with model.disable_adapter():
        base = harness(model, tokenizer, tasks)
    tuned = harness(model, tokenizer, tasks)
    return pd.concat([base.assign(model="base"), tuned.assign(model="tuned")])


def harness(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    tasks: Sequence[str],
    folder: str | Path | None = None,
) -> pd.DataFrame:
    """Run tasks of lm-evaluation-harness (Gao et al. 2024), such as "ceval-valid" and "cmmlu".

    Their data come from the hub; `folder` has task files (YAML) of your own instead.

    Returns
    -------
    A row a task, or group, and metric: `task`, `metric`, `value`, `stderr`, `n`.

    Raises
    ------
    ConfigError
        Where lm-eval is not installed, or knows no task of a name.
    MachineError
        Where the data cannot be had.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise ConfigError("harness: lm-eval is not installed; pip install -e '.[harness]'")
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    own = str(folder) if folder else None
    manager = TaskManager(include_path=own, include_defaults=own is None)
    if unknown := sorted(set(tasks) - set(manager.all_tasks)):
        raise ConfigError(f"harness: no task {unknown[0]}; lm-eval ls tasks lists all")
    wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=BATCH)
    try:
        found = simple_evaluate(wrapped, tasks=list(tasks), task_manager=manager)
    except OSError as error:
        raise MachineError(
            f"harness: the data of {', '.join(tasks)} cannot be had ({error}). Run it once where "
            "there is a network, or set HF_ENDPOINT to a mirror you can reach."
        ) from None
    return _harness_table(found["results"])


def _harness_table(results: dict[str, Any]) -> pd.DataFrame:
    rows = [
        (task, key.split(",")[0], value, scores[key.replace(",", "_stderr,")], scores["sample_len"])
        for task, scores in results.items()
        for key, value in scores.items()
        if "," in key and "_stderr," not in key
    ]
    return pd.DataFrame(rows, columns=["task", "metric", "value", "stderr", "n"])


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    sys.exit(main())
