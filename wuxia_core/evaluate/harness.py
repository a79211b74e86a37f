"""Tasks of lm-evaluation-harness, such as C-Eval and CMMLU, where their data can be had."""

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
from torch import cuda

from wuxia_core.errors import ConfigError, MachineError
from wuxia_core.model import load_adapter

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

BATCH = 8  # questions


def both_harness(output_dir: str | Path, tasks: Sequence[str]) -> pd.DataFrame:
    """Run tasks with a run folder's base and tuned model, named in the column `model`."""
    model, tokenizer = load_adapter(output_dir, "cuda" if cuda.is_available() else "cpu")
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
    """Run tasks of lm-evaluation-harness (Gao et al. 2024), with the shots that they ask for.

    Parameters
    ----------
    tasks : sequence of str
        Names of tasks or groups, such as "ceval-valid" and "cmmlu". Their data come from the hub
        and stay in its cache.
    folder : path, optional
        Task files (YAML) of your own instead of the harness's; they may read local data.

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

    path = None if folder is None else str(folder)
    manager = TaskManager(include_path=path, include_defaults=folder is None)
    unknown = sorted(set(tasks) - set(manager.all_tasks))
    if unknown:
        raise ConfigError(f"harness: no task {unknown[0]}; lm-eval ls tasks lists all")
    asked = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=BATCH)
    try:
        found = simple_evaluate(asked, tasks=list(tasks), task_manager=manager)
    except OSError as error:
        raise MachineError(
            f"harness: the data of {', '.join(tasks)} cannot be had ({error}). Run it once where "
            "there is a network, or set HF_ENDPOINT to a mirror you can reach."
        ) from None
    return _table(found["results"])


def _table(results: dict[str, Any]) -> pd.DataFrame:
    rows = [
        (task, key.split(",")[0], value, scores[key.replace(",", "_stderr,")], scores["sample_len"])
        for task, scores in results.items()
        for key, value in scores.items()
        if "," in key and "_stderr," not in key
    ]
    return pd.DataFrame(rows, columns=["task", "metric", "value", "stderr", "n"])
