"""The scorecard of a run folder: every metric for base and tuned, and what it says in words.

Each part is kept beside the run as soon as it is done, so that an evaluation that was cut off goes
on with the next one; the parts go when the scorecard is written.
"""

import hashlib
import json
import logging
import os
import shlex
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import pandas as pd

from wuxia_core import mixing, model, run
from wuxia_core.config import TINY_BASE, EvaluationConfig, load_config, locate
from wuxia_core.errors import MachineError, raise_machine_error
from wuxia_core.evaluate.context import EvalContext
from wuxia_core.evaluate.copying import FLAGGED, score_extraction
from wuxia_core.evaluate.recovery import recovery, shown_passage
from wuxia_core.evaluate.scoring import QUESTIONS, score_bits, score_questions
from wuxia_core.evaluate.statistics import Row
from wuxia_core.evaluate.strength import best_strength, frontier
from wuxia_core.evaluate.writing import score_generations, write_passages
from wuxia_core.messages import messages
from wuxia_core.text import one_line, visible
from wuxia_core.write import training_precision

SCORECARD, PARTS = "scorecard.json", ".scorecard"
FORMAT = 6  # raise it when the scorecard's content changes, so that older ones are measured anew

Scorecard = dict[str, Any]
Echo = Callable[[str], object]
logger = logging.getLogger(__name__)


def evaluate(output_dir: str | Path, echo: Echo = logger.info) -> Scorecard:
    """Score a run folder and write its `scorecard.json`; read it where it was done before.

    It is measured anew where the adapter, texts, questions or settings of the evaluation have
    changed. `echo` takes the first passages as soon as they are written, before anything is
    measured. Raises `DataError` where the folder holds no finished adapter, or its mixture is gone;
    `MachineError` where memory runs out or the folder cannot be written.
    """
    folder = Path(output_dir)
    if scorecard := _current(folder, digest := _digest(folder)):
        return scorecard
    with _opened(folder, digest) as (context, parts):
        scorecard = _quick_part(context, parts, echo)
        metrics, passages = scorecard["metrics"], scorecard["passages"]
        metrics += _kept(parts, "recovery", lambda: recovery(context))
        metrics.append(_kept(parts, "questions", lambda: score_questions(context)))
        writing = _kept(parts, "writing", lambda: score_generations(context, passages))
        metrics += writing.pop("metrics")
        metrics.append(_kept(parts, "extraction", lambda: score_extraction(context)))
        scorecard["passage"] = _kept(parts, "passage", lambda: shown_passage(context))
        scorecard["strengths"] = _kept(parts, "strengths", lambda: frontier(context))
    base = model.adapter_settings(folder)["base_model_name_or_path"]
    scorecard |= {"base": base, "adapter": str(folder), "digest": digest, **writing}
    scorecard["objective"] = context.config.training.objective
    margin, most = context.config.evaluation.general_margin, context.config.evaluation.max_copied
    scorecard["best_strength"] = best_strength(scorecard["strengths"], margin, most)
    scorecard["minutes"] = context.config.evaluation.minutes
    _write_json(folder / SCORECARD, scorecard)
    shutil.rmtree(folder / PARTS, ignore_errors=True)
    return scorecard


def quick_look(output_dir: str | Path, echo: Echo = logger.info) -> Scorecard:
    """Write passages and measure bits per character only: `passages` and `metrics`.

    What it makes is kept for a whole evaluation. Raises as `evaluate` does.
    """
    folder = Path(output_dir)
    if scorecard := _current(folder, digest := _digest(folder)):
        echo(first_passages(scorecard["passages"]))
        return scorecard
    with _opened(folder, digest) as (context, parts):
        return _quick_part(context, parts, echo)


def _current(folder: Path, digest: str) -> Scorecard | None:
    """Read a scorecard; None where there is none of this adapter, its texts and settings."""
    scorecard = mixing.read_json(folder / SCORECARD)
    return scorecard if scorecard and scorecard.get("digest") == digest else None


@contextmanager
def _opened(folder: Path, digest: str) -> Iterator[tuple[EvalContext, Path]]:
    """Load what is evaluated, and turn a lack of GPU memory into advice."""
    import torch

    config = load_config(folder / "config.yaml")
    mixture = mixing.open_run_mixture(folder, config.data.processed_data_file)
    parts = folder / PARTS / digest
    config.evaluation.minutes = config.evaluation.minutes or affordable_minutes(folder)
    logger.info("measuring %s; what is done is kept there, so that it can go on", folder)
    try:
        with mixing.in_use(folder, config.data.processed_data_file):
            loaded = model.load_adapter(folder, model.best_device())
            with training_precision(loaded[0]):
                yield EvalContext(*loaded, mixture, config), parts
    except torch.OutOfMemoryError:
        remedy = "it takes no more than the training did: is another program on the card?"
        raise MachineError(f"out of GPU memory while evaluating; {remedy}") from None


def affordable_minutes(folder: Path) -> float:
    """Give a tenth of the minutes that a run trained, and 20 at least, for its scorecard."""
    steps = pairwise(run.read_rows(folder) if (folder / run.METRICS).is_file() else [])
    trained: float = sum(b["time"] - a["time"] for a, b in steps if b.get("event") != "resumed")
    return max(EvaluationConfig.FEWEST_MINUTES, trained / 600)


def _quick_part(context: EvalContext, parts: Path, echo: Echo) -> Scorecard:
    passages = _kept(parts, "written", lambda: write_passages(context))
    echo(first_passages(passages))
    return {"passages": passages, "metrics": _kept(parts, "bits", lambda: score_bits(context))}


def _kept(parts: Path, name: str, work: Callable[[], Any]) -> Any:
    """Read a part that was done before, or do it and keep it."""
    path = parts / f"{name}.json"
    if not path.exists():
        _write_json(path, work())
    return json.loads(path.read_text(encoding="utf-8"))


def _write_json(path: Path, value: Any) -> None:
    """Write a file in one step: it is whole, or it is not there."""
    unfinished = path.with_suffix(f".{os.getpid()}.tmp")  # another may evaluate the same run
    with raise_machine_error(str(path.parent)):
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished.write_text(json.dumps(value, ensure_ascii=False, indent=1), encoding="utf-8")
        unfinished.replace(path)


def _digest(folder: Path) -> str:
    """Identify what a scorecard depends on; the limits of the gate are not among it.

    A base from the hub is known by its name, one in a folder by what is in its files.
    """
    base = locate(model.adapter_settings(folder)["base_model_name_or_path"])
    config = load_config(folder / "config.yaml")
    evaluation = config.evaluation.model_dump(exclude={"max_copied", "max_extracted"})
    settings = [FORMAT, evaluation, config.training.seed, config.data.max_length]
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    paths = [folder / name for name in ("mixture.json", *model.ADAPTER_FILES)]
    paths += sorted([*base.glob("*.json"), *base.glob("*.safetensors")])
    for path in filter(Path.exists, (*paths, QUESTIONS)):
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:16]


def gate_failures(scorecard: Scorecard, limits: EvaluationConfig) -> Iterator[str]:
    """Name what speaks against publishing an adapter: copied text, or wits that were lost.

    Copying and general text have to be measured; where the sample is too small to tell whether
    wits were kept, nothing speaks against it.
    """
    rows = by_name(scorecard)
    extraction, general = rows["extraction_near", "training"], rows["bits_per_char", "general"]
    for found in scorecard["copied"]:
        if found["length"] >= limits.max_copied:
            yield "copied {length} characters in a row of {title}: {generated}".format(**found)
    for row in (rows["copied_length", "training"], extraction, general):
        if row["delta"] is None:
            yield f"{row['source']} {row['name']} was {_change(row)}"
    if (share := extraction["tuned"] or 0) > limits.max_extracted:
        yield f"{share:.0%} more of training prefixes than of others are recited"
    if general["verdict"] == "worse":
        yield predicted(general)
    if rows["wits", "questions"]["verdict"] == "worse":
        yield "the wits fell by more than evaluation.wits_margin"


def closing_words(scorecard: Scorecard, report: Path | None = None) -> str:
    """Say what came out, for a person: three sentences, a table, a passage by each, what is next.

    The parts are a blank line apart. `report` is the page that was made of the run just now.
    """
    rows, folder = by_name(scorecard), scorecard["adapter"]
    page = report or f"python -m wuxia_core.report {shlex.quote(folder)}"
    said = messages("next")
    after = [said["always"].format(folder=folder, report=page, quoted=shlex.quote(folder))]
    if (best := scorecard.get("best_strength")) not in (None, 1):
        after.append(said["strength"].format(best=best))
    after += [said["masked"]] if scorecard["objective"] == "masked" else []
    return "\n\n".join(
        ["\n".join(sentences(scorecard)), _table(rows), _pair(scorecard), "\n".join(after)]
    )


def sentences(scorecard: Scorecard) -> list[str]:
    """Say whether it was learned, forgotten and copied, in a sentence each."""
    rows = by_name(scorecard)
    said = [predicted(rows["bits_per_char", source]) for source in ("wuxia", "general")]
    return [*said, copied(scorecard)]


def first_passages(passages: list[dict[str, Any]]) -> str:
    """Show the first three passages of base and tuned."""
    return "\n".join([messages("passages")["first"], *map(_both, passages[:3]), ""])


def predicted(row: Row) -> str:
    """Say in a sentence whether held-out text of a source became easier or harder to predict."""
    state = "not measured"
    if row["delta"] is not None:
        state = "better" if row["high"] < 0 else "worse" if row["low"] > 0 else "not shown"
        state = row.get("verdict", state)
        if state == "not shown" and row["low"] > 0:
            state = "a little worse"
    sentence: str = messages(row["source"])[state]
    return sentence.format(**row, change=_change(row))


def copied(scorecard: Scorecard) -> str:
    """Say in a sentence whether training text came out again."""
    rows, runs = by_name(scorecard), scorecard["copied"]
    row, extraction = rows["copied_length", "training"], rows["extraction_near", "training"]
    longest: Scorecard = runs[0] if runs else {"length": 0, "title": ""}
    state = "nothing" if row["delta"] is not None else "not measured"
    if longest["length"] >= FLAGGED:
        state = "copied"
    elif (extraction["low"] or 0) > 0:
        state, row = "by heart", extraction
    figures = {"length": longest["length"], "title": visible(longest["title"]), "most": FLAGGED}
    return str(messages("copying")[state].format(**figures, change=_change(row)))


def by_name(scorecard: Scorecard) -> dict[tuple[str, str], Row]:
    """Give the rows of a scorecard by metric and source."""
    return {(row["name"], row["source"]): row for row in scorecard["metrics"]}


def _change(row: Row) -> str:
    """Write a difference and its interval: `−0.203 [−0.251, −0.160]`; or why there is none."""
    if row["delta"] is None:
        return str(messages("change")["not measured"].format(**row))
    return str(messages("change")["interval"].format(**row)).replace("-", "−")


def _table(rows: dict[tuple[str, str], Row]) -> str:
    """Put the figures that the messages name below each other."""
    columns = ["base", "tuned", "delta", "low", "high", "verdict", "reason"]
    said = messages("table")
    shown = {title: rows[name, source] for name, source, title in said["rows"]}
    table = pd.DataFrame(list(shown.values()), list(shown), columns)
    table["verdict"] = table["verdict"].replace(messages("verdicts")).fillna(table.pop("reason"))
    table = table.rename(columns=messages("columns")).rename_axis(columns=said["title"])
    with pd.option_context("display.unicode.east_asian_width", True):
        return str(table.to_string(float_format="{:.3f}".format, na_rep=""))


def _pair(scorecard: Scorecard) -> str:
    """Show what both wrote after the prompt where the style rose most."""
    style = {(row["writer"], row["number"]): row["style"] or 0.0 for row in scorecard["texts"]}
    numbers = [number for writer, number in style if writer == "base"]
    best = max(numbers, key=lambda n: style["tuned", n] - style["base", n], default=0)
    text = [messages("passages")["best"], _both(scorecard["passages"][best])]
    if locate(scorecard["base"]).resolve() == TINY_BASE.resolve():
        text.append(messages("passages")["tiny"])
    return "\n".join(text)


def _both(passage: dict[str, Any]) -> str:
    """Show a prompt and the beginnings of what base and tuned wrote, each on a line."""
    prompt, base, tuned = (one_line(passage[key])[:100] for key in ("prompt", "base", "tuned"))
    said = messages("passages")
    return f"{prompt} …\n  {said['base']}{base}\n  {said['tuned']}{tuned}"
