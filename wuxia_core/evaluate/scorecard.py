"""The scorecard of a run folder: every metric for base and tuned, and what both write.

Each part is kept beside the run as soon as it is done, so that an evaluation that was cut off goes
on with the next one; they go when the scorecard is written.
"""

import hashlib
import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd

from wuxia_core import mixing, model
from wuxia_core.config import load_config
from wuxia_core.errors import MachineError
from wuxia_core.evaluate.copying import extraction
from wuxia_core.evaluate.generation import write
from wuxia_core.evaluate.prediction import prediction
from wuxia_core.evaluate.recovery import recovery
from wuxia_core.evaluate.statistics import Metric, Row, between, compare, holm, ratio
from wuxia_core.evaluate.subject import Subject
from wuxia_core.evaluate.wits import answers, questions, verdict
from wuxia_core.evaluate.writing import judge_writing
from wuxia_core.mixing.staging import written
from wuxia_core.mixing.store import TRAIN, VALIDATION, draw

CARD, PARTS = "scorecard.json", ".scorecard"
PREFIXES = 50  # of each kind, for extraction
AT_ONCE = 10  # of them
QUESTIONS_AT_ONCE = 32


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
        *parts.get(lambda: _wits(subject), "wits"),
        *judged.pop("metrics"),
        *parts.get(lambda: _extracted(subject), "extraction"),
    ]
    holm(metrics)
    return {"metrics": metrics, "passages": passages, **judged}


def _wits(subject: Subject) -> list[Row]:
    """Ask the questions: whether all in all the wits were kept, and the accuracy by kind."""
    mixed = sorted(questions(), key=lambda question: draw(subject.seed, question.id))
    chunks = subject.in_time(mixed, QUESTIONS_AT_ONCE, 0.13)
    asked = [
        subject.both(partial(answers, subject.model, subject.tokenizer, chunk, subject.batch_size))
        for chunk in chunks
    ]
    base, tuned = (pd.concat(side, ignore_index=True) for side in zip(*asked, strict=True))
    head = {"name": "wits", "unit": "share of questions", "source": "questions", "level": 0.9}
    rows = [head | verdict(base, tuned, subject.config.evaluation.wits_margin)]
    for kind in base["kind"].unique():
        of = base["kind"] == kind
        sides = [side[of].assign(asked=1) for side in (base, tuned)]
        metric = Metric(f"wits, {kind}", "share of questions", "questions", ratio("right", "asked"))
        rows.append(compare(metric, sides[0], sides[1], int(of.sum()), subject.seed))
    return rows


def _extracted(subject: Subject) -> list[Row]:
    """How much more often a training prefix draws out its text than one never trained on."""
    sides: tuple[list[pd.DataFrame], list[pd.DataFrame]] = [], []
    for split in (TRAIN, VALIDATION):
        documents = subject.documents("wuxia", split)
        for chunk in subject.in_time(documents, AT_ONCE, 0.05):
            count = -(-PREFIXES * len(chunk) // len(documents))
            asked = (subject.mixture.texts(chunk), count, subject.seed, AT_ONCE)
            work = partial(extraction, subject.model, subject.tokenizer, *asked)
            for side, table in zip(sides, subject.both(work), strict=True):
                side.append(table.assign(trained=split == TRAIN, asked=1))
    base, tuned = (pd.concat(side, ignore_index=True) for side in sides)
    rows = []
    for column, what in (("exact", "exactly"), ("near", "nearly")):
        unit = f"share continued {what}, trained − held out"
        metric = Metric(
            f"extraction_{column}", unit, "training", between("trained", column, "asked")
        )
        rows.append(compare(metric, base, tuned, len(base), subject.seed))
    return rows
