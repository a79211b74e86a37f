"""The scorecard of a run folder: every metric for base and tuned, and what both write.

Each part is kept beside the run as soon as it is done, so that an evaluation that was cut off goes
on with the next one; they go when the scorecard is written.
"""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from wuxia_core import mixing, model
from wuxia_core.config import load_config
from wuxia_core.errors import MachineError
from wuxia_core.evaluate.extraction import judge_extraction
from wuxia_core.evaluate.generation import write
from wuxia_core.evaluate.prediction import prediction
from wuxia_core.evaluate.recovery import recovery
from wuxia_core.evaluate.statistics import Row, holm
from wuxia_core.evaluate.subject import Subject
from wuxia_core.evaluate.wits import judge_wits
from wuxia_core.evaluate.writing import judge_writing
from wuxia_core.mixing.staging import written

CARD, PARTS = "scorecard.json", ".scorecard"


def evaluate(output_dir: str | Path) -> dict[str, Any]:
    """Score a run folder and write `scorecard.json` into it.

    Raises `DataError` where the folder holds no finished adapter, or its mixture is gone;
    `MachineError` where memory runs out.
    """
    import torch

    folder = Path(output_dir)
    adapter = model.adapter_settings(folder)
    config = load_config(folder / "config.yaml")
    mixture = mixing.open_run_mixture(folder, config.data.processed_data_file)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        subject = Subject(*model.load_adapter(folder, device), mixture, config)
        card = {
            "base": adapter["base_model_name_or_path"],
            "adapter": str(folder),
            "objective": config.training.objective,
            **_measure(subject, _Parts(folder)),
        }
    except torch.OutOfMemoryError as error:
        raise MachineError(
            f"out of GPU memory while evaluating ({str(error).splitlines()[0]}); lower training."
            f"per_device_eval_batch_size in {folder / 'config.yaml'} and evaluate again"
        ) from None
    with written(str(folder)):
        unfinished = folder / PARTS / CARD
        text = json.dumps(card, ensure_ascii=False, indent=1)
        unfinished.write_text(text, encoding="utf-8")
        unfinished.replace(folder / CARD)
        shutil.rmtree(folder / PARTS)
    return card


def scorecard(output_dir: str | Path) -> dict[str, Any]:
    """Read a run folder's `scorecard.json`; measure it first where there is none.

    Raises `DataError` where the folder holds no finished adapter.
    """
    path = Path(output_dir) / CARD
    if path.is_file():
        card: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return card
    return evaluate(output_dir)


class _Parts:
    """Results that are kept until all of them are there; of this adapter and these settings."""

    def __init__(self, folder: Path) -> None:
        digest = hashlib.sha256((folder / "config.yaml").read_bytes())
        digest.update((folder / "adapter_model.safetensors").read_bytes())
        self._folder = folder / PARTS / digest.hexdigest()[:16]
        self._folder.mkdir(parents=True, exist_ok=True)

    def get(self, work: Callable[[], Any], name: str) -> Any:
        """Read what was done before, or do it."""
        path = self._folder / f"{name}.json"
        if not path.exists():
            text = json.dumps(work(), ensure_ascii=False)
            unfinished = path.with_suffix(".tmp")
            unfinished.write_text(text, encoding="utf-8")
            unfinished.replace(path)
        return json.loads(path.read_text(encoding="utf-8"))


def _measure(subject: Subject, parts: _Parts) -> dict[str, Any]:
    passages = parts.get(lambda: write(subject), "written")
    judged = parts.get(lambda: judge_writing(subject, passages), "writing")
    metrics: list[Row] = [
        *parts.get(lambda: prediction(subject), "prediction"),
        *parts.get(lambda: recovery(subject), "recovery"),
        *parts.get(lambda: judge_wits(subject), "wits"),
        *judged.pop("metrics"),
        *parts.get(lambda: judge_extraction(subject), "extraction"),
    ]
    holm(metrics)
    return {"metrics": metrics, "passages": passages, **judged}
