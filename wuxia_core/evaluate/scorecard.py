"""The scorecard of a run folder: every metric for base and tuned, and what both write.

Each part is kept beside the run as soon as it is done, so that an evaluation that was cut off goes
on with the next one; they go when the scorecard is written.
"""

import hashlib
import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from wuxia_core import mixing, model
from wuxia_core.config import Config, load_config
from wuxia_core.errors import MachineError, raise_machine_error
from wuxia_core.evaluate.copying import judge_extraction
from wuxia_core.evaluate.recovery import recovery
from wuxia_core.evaluate.scoring import prediction
from wuxia_core.evaluate.statistics import EvalContext, Row, holm
from wuxia_core.evaluate.wits import QUESTIONS, judge_wits
from wuxia_core.evaluate.writing import score_generations, write
from wuxia_core.mixing import read_json

CARD, PARTS = "scorecard.json", ".scorecard"
DEPENDS: Any = {
    "evaluation": {"max_documents", "minutes", "wits_margin", "general_margin"},
    "training": {"seed"}, "data": {"max_length"},
}  # fmt: skip

logger = logging.getLogger(__name__)


def evaluate(output_dir: str | Path) -> dict[str, Any]:
    """Score a run folder and write `scorecard.json` into it.

    Raises `DataError` where the folder holds no finished adapter, or its mixture is gone;
    `MachineError` where memory runs out or the folder cannot be written.
    """
    import torch

    folder = Path(output_dir)
    adapter = model.adapter_settings(folder)
    config = load_config(folder / "config.yaml")
    mixture = mixing.open_run_mixture(folder, config.data.processed_data_file)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    logger.info("measuring %s; what is done is kept there, so that it can go on", folder)
    digest = _digest(folder, config)
    try:
        context = EvalContext(*model.load_adapter(folder, device), mixture, config)
        card = {
            "base": adapter["base_model_name_or_path"],
            "adapter": str(folder),
            "objective": config.training.objective,
            "of": digest,
            **_measure(context, _Parts(folder / PARTS / digest)),
        }
    except torch.OutOfMemoryError as error:
        raise MachineError(
            f"out of GPU memory while evaluating ({str(error).splitlines()[0]}); lower training."
            f"per_device_eval_batch_size in {folder / 'config.yaml'} and evaluate again"
        ) from None
    with raise_machine_error(str(folder)):
        _replace(folder / CARD, json.dumps(card, ensure_ascii=False, indent=1))
        shutil.rmtree(folder / PARTS)
    return card


def read_scorecard(output_dir: str | Path) -> dict[str, Any]:
    """Read a run folder's `scorecard.json`; measure it where there is none of this adapter.

    It is measured anew where texts, questions or settings of the evaluation have changed, too.
    Raises as `evaluate` does.
    """
    folder = Path(output_dir)
    model.adapter_settings(folder)
    card = read_json(folder / CARD)
    if card and card.get("of") == _digest(folder, load_config(folder / "config.yaml")):
        return card
    if (folder / CARD).exists():
        logger.warning("%s is damaged, or of another adapter or settings", folder / CARD)
    return evaluate(folder)


def _digest(folder: Path, config: Config) -> str:
    """Identify what a scorecard depends on."""
    settings = config.model_dump(include=DEPENDS)
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for path in (folder / "mixture.json", folder / model.ADAPTER_WEIGHTS, QUESTIONS):
        digest.update(path.read_bytes() if path.exists() else b"")
    return digest.hexdigest()[:16]


def _replace(path: Path, text: str) -> None:
    """Write a file in one step."""
    unfinished = path.with_suffix(".tmp")
    unfinished.write_text(text, encoding="utf-8")
    unfinished.replace(path)


class _Parts:
    """Results that are kept until all of them are there."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def get(self, work: Callable[[], Any], name: str) -> Any:
        """Read what was done before, or do it."""
        path = self._folder / f"{name}.json"
        if not path.exists():
            text = json.dumps(work(), ensure_ascii=False)
            with raise_machine_error(str(path.parent)):
                path.parent.mkdir(parents=True, exist_ok=True)
                _replace(path, text)
        return json.loads(path.read_text(encoding="utf-8"))


def _measure(context: EvalContext, parts: _Parts) -> dict[str, Any]:
    passages = parts.get(lambda: write(context), "written")
    judged = parts.get(lambda: score_generations(context, passages), "writing")
    metrics: list[Row] = [
        *parts.get(lambda: prediction(context), "prediction"),
        *parts.get(lambda: recovery(context), "recovery"),
        *parts.get(lambda: judge_wits(context), "wits"),
        *judged.pop("metrics"),
        *parts.get(lambda: judge_extraction(context), "extraction"),
    ]
    holm(metrics)
    return {"metrics": metrics, "passages": passages, **judged}
