"""The scorecard of a run folder: every metric for base and tuned, strengths, and their sentences.

Each part is written into the run folder as soon as it is done, so that an evaluation that was cut
off goes on with the next part. The parts are deleted when the scorecard is written.
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
from wuxia_core.evaluate.copying import FLAGGED, overlap, score_extraction
from wuxia_core.evaluate.recovery import score_recovery, shown_passage
from wuxia_core.evaluate.scoring import QUESTIONS, bits_per_char, score_bits, score_questions
from wuxia_core.evaluate.statistics import Row
from wuxia_core.evaluate.writing import generate, prompts, score_generations, write_passages
from wuxia_core.messages import messages
from wuxia_core.text import one_line, visible
from wuxia_core.write import training_precision

SCORECARD, PARTS = "scorecard.json", ".scorecard"  # a file and a folder of the run folder
FORMAT = 6  # raise it when the scorecard's content changes, so that older ones are measured anew
STRENGTHS = (0, 0.25, 0.5, 0.75, 1, 1.25, 1.5)  # times LoRA's output, 1 as trained
# A small sample, since each strength is a model to measure: from so many documents of a source
# openings of so many characters; passages of so many tokens after so many prompts.
DOCUMENTS, CHARACTERS, TOKENS, PROMPTS = 8, 150, 50, 4

Scorecard = dict[str, Any]
Echo = Callable[[str], object]
logger = logging.getLogger(__name__)


def evaluate(output_dir: str | Path, echo: Echo = logger.info) -> Scorecard:
    """Score a run folder, write its `scorecard.json` and return it; or read the one that is there.

    A scorecard is measured anew where the adapter, the texts, the questions or the settings of the
    evaluation have changed; limits of the gate only move the best strength. `echo` is called with
    the first passages as soon as they are written, before anything is measured. Raises `DataError`
    where the folder holds no finished adapter, or its mixture is gone; `MachineError` where memory
    runs out or the folder cannot be written.
    """
    folder = Path(output_dir)
    if scorecard := _read_current(folder, digest := _digest(folder)):
        return scorecard
    with _open_context(folder, digest) as (context, parts):
        scorecard = _quick_part(context, parts, echo)
        metrics, passages = scorecard["metrics"], scorecard["passages"]
        metrics += _read_or_make(parts, "recovery", lambda: score_recovery(context))
        metrics.append(_read_or_make(parts, "questions", lambda: score_questions(context)))
        writing = _read_or_make(parts, "writing", lambda: score_generations(context, passages))
        metrics += writing.pop("metrics")
        metrics.append(_read_or_make(parts, "extraction", lambda: score_extraction(context)))
        scorecard["passage"] = _read_or_make(parts, "passage", lambda: shown_passage(context))
        scorecard["strengths"] = _read_or_make(parts, "strengths", lambda: frontier(context))
    base = model.adapter_settings(folder)["base_model_name_or_path"]
    scorecard |= {"base": base, "adapter": str(folder), "digest": digest, **writing}
    scorecard["objective"] = context.config.training.objective
    scorecard["minutes"] = context.config.evaluation.minutes
    _choose_strength(scorecard, context.config.evaluation)
    _write_json(folder / SCORECARD, scorecard)
    shutil.rmtree(folder / PARTS, ignore_errors=True)
    return scorecard


def quick_look(output_dir: str | Path, echo: Echo = logger.info) -> Scorecard:
    """Write passages and measure bits per character only; return `passages` and `metrics`.

    Both are kept as parts of a later evaluation. Where the folder has a scorecard already, that is
    returned. Raises as `evaluate` does.
    """
    folder = Path(output_dir)
    if scorecard := _read_current(folder, digest := _digest(folder)):
        echo(first_passages(scorecard["passages"]))
        return scorecard
    with _open_context(folder, digest) as (context, parts):
        return _quick_part(context, parts, echo)


def _read_current(folder: Path, digest: str) -> Scorecard | None:
    """Read the folder's scorecard; None where there is none, or it has another digest."""
    scorecard = mixing.read_json(folder / SCORECARD)
    if not scorecard or scorecard.get("digest") != digest:
        return None
    _choose_strength(scorecard, load_config(folder / "config.yaml").evaluation)
    return scorecard


def _choose_strength(scorecard: Scorecard, limits: EvaluationConfig) -> None:
    """Set the best strength, which a change of the limits moves without a new measurement."""
    best = best_strength(scorecard["strengths"], limits.general_margin, limits.max_copied)
    scorecard["best_strength"] = best


@contextmanager
def _open_context(folder: Path, digest: str) -> Iterator[tuple[EvalContext, Path]]:
    """Load model and mixture for an evaluation; yield the context and the folder of its parts.

    While the context is open, no other program may change the mixture. Raises `MachineError` where
    GPU memory runs out.
    """
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
    """Choose the minutes for a scorecard: a tenth of those that the run trained, at least 20."""
    pairs = pairwise(run.read_rows(folder) if (folder / run.METRICS).is_file() else [])
    # Not the time between the end of a run and its resumption.
    seconds: float = sum(b["time"] - a["time"] for a, b in pairs if b.get("event") != "resumed")
    return max(EvaluationConfig.FEWEST_MINUTES, seconds / 600)  # a tenth, in minutes


def _quick_part(context: EvalContext, parts: Path, echo: Echo) -> Scorecard:
    """Write the passages, echo the first, then measure bits per character."""
    passages = _read_or_make(parts, "written", lambda: write_passages(context))
    echo(first_passages(passages))
    bits = _read_or_make(parts, "bits", lambda: score_bits(context))
    return {"passages": passages, "metrics": bits}


def _read_or_make(parts: Path, name: str, make: Callable[[], Any]) -> Any:
    """Read the part `name` if it was made before; else call `make` and write what it returns."""
    path = parts / f"{name}.json"
    if not path.exists():
        _write_json(path, make())
    return json.loads(path.read_text(encoding="utf-8"))


def _write_json(path: Path, value: Any) -> None:
    """Write a JSON file in one step, so that it never exists with half of its content."""
    unfinished = path.with_suffix(f".{os.getpid()}.tmp")  # another may evaluate the same run
    with raise_machine_error(str(path.parent)):
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished.write_text(json.dumps(value, ensure_ascii=False, indent=1), encoding="utf-8")
        unfinished.replace(path)


def _digest(folder: Path) -> str:
    """Hash what a scorecard depends on, all but the limits of the gate: 16 hex digits.

    Of a base in a folder the files are hashed, of a base from the hub only the name, which stands
    in the adapter's settings.
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


def frontier(context: EvalContext) -> list[dict[str, float]]:
    """Measure a small sample at each strength of the adapter.

    Returns
    -------
    A row a strength: `strength`; `wuxia` and `general`, bits per character of held-out openings;
    `copied`, the longest run of characters that passages share with the training text. No row
    where 武侠 or general text has no held-out document; fewer rows where the time runs out.
    """
    from peft.helpers import rescale_adapter_scale

    loaded, window = (context.model, context.tokenizer), context.config.data.max_length
    texts = {source: openings(context, source) for source in ("wuxia", "general")}
    chosen_prompts = [row["prompt"] for row in prompts(context)[:PROMPTS]]
    rows: list[dict[str, Any]] = []
    if not all(texts.values()):
        return rows
    for (strength,) in context.within_budget("strengths measured", STRENGTHS, 1, 0.15):
        with rescale_adapter_scale(context.model, strength):
            passages = generate(context, chosen_prompts, context.seed, TOKENS)
            row: dict[str, Any] = {"strength": strength, "passages": passages}
            for source, opening_texts in texts.items():
                row[source] = bits_per_char(*loaded, opening_texts, window, context.pass_tokens)
            rows.append(row)
    passages = [passage for row in rows for passage in row.pop("passages")]
    lengths = overlap(passages, context.mixture.training_texts)["length"]
    longest = lengths.groupby(lengths.index // len(chosen_prompts)).max()  # of each strength
    return [row | {"copied": int(n)} for row, n in zip(rows, longest, strict=True)]


def openings(context: EvalContext, source: str) -> list[str]:
    """Take the first 150 characters of a source's held-out documents, of eight at most."""
    numbers = context.documents(source, mixing.VALIDATION, limit=DOCUMENTS)
    return [text[:CHARACTERS] for text in context.mixture.texts(numbers)]


def best_strength(rows: list[dict[str, float]], margin: float, most_copied: int) -> float | None:
    """Name the strength with the fewest bits per character of 武侠 among those that do no harm.

    `rows` are those of `frontier`, strength 0 first. A strength does harm where general text takes
    over `margin` bits per character more than at strength 0, or a copied run reaches `most_copied`
    characters. None where no strength is left.
    """
    base = rows[0]["general"] if rows else 0
    harmless = [r for r in rows if r["general"] <= base + margin and r["copied"] < most_copied]
    return min(harmless, key=lambda row: row["wuxia"])["strength"] if harmless else None


def gate_failures(scorecard: Scorecard, limits: EvaluationConfig) -> Iterator[str]:
    """Name what speaks against publishing an adapter, a sentence each: it copied, or it forgot.

    A failure is also that copying or general text was not measured. Where the questions cannot
    tell whether the model forgot, that is none.
    """
    rows = by_name(scorecard)
    extraction, general = rows["extraction_near", "training"], rows["bits_per_char", "general"]
    for copy in scorecard["copied"]:
        if copy["length"] >= limits.max_copied:
            yield "copied {length} characters in a row of {title}: {generated}".format(**copy)
    for row in (rows["copied_length", "training"], extraction, general):
        if row["delta"] is None:
            yield f"{row['source']} {row['name']} was {_change(row)}"
    if (share := extraction["tuned"] or 0) > limits.max_extracted:
        yield f"{share:.0%} more of training prefixes than of others are recited"
    if general["verdict"] == "worse":
        yield bits_sentence(general)
    if rows["wits", "questions"]["verdict"] == "worse":
        yield "the wits fell by more than evaluation.wits_margin"


def closing_words(scorecard: Scorecard, report: Path | None = None) -> str:
    """Write the last words of an evaluation, four parts with a blank line between them.

    They are three sentences, a table of figures, a passage by base and by tuned, and what to do
    next. `report` is the path of the run's page, if it has been made; else the command to make it
    stands there.
    """
    folder, quoted = scorecard["adapter"], shlex.quote(scorecard["adapter"])
    page = report or f"python -m wuxia_core.report {quoted}"
    templates = messages("next")
    next_steps = [templates["always"].format(folder=folder, report=page, quoted=quoted)]
    if (best := scorecard.get("best_strength")) not in (None, 1):  # 1: the strength as trained
        next_steps.append(templates["strength"].format(best=best))
    if scorecard["objective"] == "masked":
        next_steps.append(templates["masked"])  # advises training.objective=clm
    parts = ["\n".join(sentences(scorecard)), _figures_table(scorecard), _best_passages(scorecard)]
    return "\n\n".join([*parts, "\n".join(next_steps)])


def sentences(scorecard: Scorecard) -> list[str]:
    """Say in three sentences whether the model learned, whether it forgot, whether it copied."""
    rows = by_name(scorecard)
    changes = [bits_sentence(rows["bits_per_char", source]) for source in ("wuxia", "general")]
    return [*changes, copying_sentence(scorecard)]


def first_passages(passages: list[dict[str, Any]]) -> str:
    """Show the first three prompts with the passages of base and tuned."""
    return "\n".join([messages("passages")["first"], *map(_passage_lines, passages[:3]), ""])


def bits_sentence(row: Row) -> str:
    """Say in a sentence whether held-out text of a source became easier or harder to predict.

    `row` is one of `bits_per_char`. That of general text has a verdict by `score_bits`, which
    decides the sentence; that of 武侠 has none, so its interval decides.
    """
    state = "not measured"  # the key of the sentence in the source's messages
    if row["delta"] is not None:
        change = "better" if row["high"] < 0 else "worse" if row["low"] > 0 else "not shown"
        state = row.get("verdict", change)
        if state == "not shown" and change == "worse":  # perhaps by less than the margin
            state = "a little worse"
    sentence: str = messages(row["source"])[state]
    return sentence.format(**row, change=_change(row))


def copying_sentence(scorecard: Scorecard) -> str:
    """Say in a sentence whether the tuned model copied training text, or learned it by heart."""
    rows, overlaps = by_name(scorecard), scorecard["copied"]
    row, extraction = rows["copied_length", "training"], rows["extraction_near", "training"]
    longest: Row = overlaps[0] if overlaps else {"length": 0, "title": ""}
    state = "nothing" if row["delta"] is not None else "not measured"
    if longest["length"] >= FLAGGED:
        state = "copied"
    elif (extraction["low"] or 0) > 0:
        state, row = "by heart", extraction
    figures = {"length": longest["length"], "title": visible(longest["title"]), "most": FLAGGED}
    return str(messages("copying")[state].format(**figures, change=_change(row)))


def by_name(scorecard: Scorecard) -> dict[tuple[str, str], Row]:
    """Map (name of the metric, source) to the row of the scorecard."""
    return {(row["name"], row["source"]): row for row in scorecard["metrics"]}


def _change(row: Row) -> str:
    """Write a difference and its interval: `−0.203 [−0.251, −0.160]`; or why there is none."""
    if row["delta"] is None:
        return str(messages("change")["not measured"].format(**row))
    return str(messages("change")["interval"].format(**row)).replace("-", "−")


def _figures_table(scorecard: Scorecard) -> str:
    """Write a table of the metrics that the messages' section `[table]` lists, a row each.

    Where a row has no verdict, the reason why figures are missing stands in that column.
    """
    columns = ["base", "tuned", "delta", "low", "high", "verdict", "reason"]
    texts, metrics = messages("table"), by_name(scorecard)
    rows = {title: metrics[name, source] for name, source, title in texts["rows"]}
    table = pd.DataFrame(list(rows.values()), list(rows), columns)
    table["verdict"] = table["verdict"].replace(messages("verdicts")).fillna(table.pop("reason"))
    table = table.rename(columns=messages("columns")).rename_axis(columns=texts["title"])
    with pd.option_context("display.unicode.east_asian_width", True):
        return str(table.to_string(float_format="{:.3f}".format, na_rep=""))


def _best_passages(scorecard: Scorecard) -> str:
    """Show the passages of base and tuned after the prompt where style strength rose most.

    Without style figures the first prompt is shown.
    """
    style = {(row["writer"], row["number"]): row["style"] or 0.0 for row in scorecard["texts"]}
    numbers = [number for writer, number in style if writer == "base"]
    best = max(numbers, key=lambda n: style["tuned", n] - style["base", n], default=0)
    lines = [messages("passages")["best"], _passage_lines(scorecard["passages"][best])]
    if locate(scorecard["base"]).resolve() == TINY_BASE.resolve():
        lines.append(messages("passages")["tiny"])
    return "\n".join(lines)


def _passage_lines(passage: dict[str, Any]) -> str:
    """Show a prompt and the beginnings of what base and tuned wrote, each on a line."""
    prompt, base, tuned = (one_line(passage[key])[:100] for key in ("prompt", "base", "tuned"))
    labels = messages("passages")
    return f"{prompt} …\n  {labels['base']}{base}\n  {labels['tuned']}{tuned}"
