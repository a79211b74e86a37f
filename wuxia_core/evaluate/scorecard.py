"""The scorecard of a run folder: every metric for base and tuned, strengths, and what they say.

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
from contextlib import contextmanager, suppress
from itertools import pairwise
from operator import itemgetter
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
from wuxia_core.evaluate.statistics import FIGURES, Row
from wuxia_core.evaluate.writing import (
    OWN_PROMPTS,
    generate,
    prompts,
    score_generations,
    write_passages,
)
from wuxia_core.messages import messages
from wuxia_core.text import one_line, visible
from wuxia_core.write import training_precision

SCORECARD, PARTS = "scorecard.json", ".scorecard"  # a file and a folder of the run folder
FORMAT = 8  # raise it when the scorecard's content changes, so that older ones are measured anew
# Factors of LoRA's output, in the order in which they are measured; 1 is as trained.
STRENGTHS = (0, 1, 0.5, 1.5, 0.75, 1.25, 0.25)
# What `frontier` measures each strength on. It is a small sample, since each strength is a model to
# measure: the first 150 characters of at most 8 documents of a source, and passages of 50 tokens
# after 4 prompts.
DOCUMENTS, CHARACTERS, TOKENS, PROMPTS = 8, 150, 50, 4

Scorecard = dict[str, Any]
Echo = Callable[[str], object]  # shows a text to the user
logger = logging.getLogger(__name__)


def evaluate(output_dir: str | Path, echo: Echo = logger.info) -> Scorecard:
    """Return a run folder's scorecard: read `scorecard.json`, or measure it and write that file.

    It is measured if the file is missing, or if the adapter, a base in a folder, the texts, our
    prompts or questions, the seed, `data.max_length` or a setting of the evaluation has changed
    since, except `max_copied` and `max_extracted`. When it is measured, `echo` is called with the
    first passages as soon as they are written, before any figure is measured. Raises `DataError` if
    the folder holds no finished adapter, or one of another base, or its mixture is gone;
    `MachineError` if the base cannot be loaded, a GPU cannot be used or lacks memory, or the folder
    cannot be written; `ConfigError` if the run's config is wrong.
    """
    folder = Path(output_dir)
    digest = _digest(folder)
    if scorecard := _read_current(folder, digest):
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
    # `writing` still has `copied` and `texts`, see `score_generations`.
    scorecard |= {"base": base, "adapter": str(folder), "digest": digest, **writing}
    scorecard["objective"] = context.config.training.objective
    scorecard["minutes"] = context.config.evaluation.minutes
    _choose_strength(scorecard, context.config.evaluation)  # sets `best_strength`
    _write_json(folder / SCORECARD, scorecard)
    shutil.rmtree(folder / PARTS, ignore_errors=True)
    return scorecard


def quick_look(output_dir: str | Path, echo: Echo = logger.info) -> Scorecard:
    """Write passages and measure bits per character only; return `passages` and `metrics`.

    The first two rows of `metrics` are the bits per character of 武侠 and of general text. What is
    measured is kept, so that a later evaluation does not measure it again. If the folder has a
    current scorecard, that is returned whole. `echo` is called with the first passages. Raises
    `DataError` if the folder has no finished adapter or no mixture; `MachineError` if the base, a
    GPU or the disk fails; `ConfigError` if the run's config is wrong.
    """
    folder = Path(output_dir)
    digest = _digest(folder)
    if scorecard := _read_current(folder, digest):
        echo(first_passages(scorecard["passages"]))
        return scorecard
    with _open_context(folder, digest) as (context, parts):
        return _quick_part(context, parts, echo)


def _read_current(folder: Path, digest: str) -> Scorecard | None:
    """Read a folder's scorecard; choose its best strength by the limits in the folder's config.

    Returns None if there is no scorecard, or if its digest is not `digest` (see `_digest`): then
    something that it depends on has changed. Raises `ConfigError` if the config is wrong.
    """
    scorecard = mixing.read_json(folder / SCORECARD)
    if not scorecard or scorecard.get("digest") != digest:
        return None
    _choose_strength(scorecard, load_config(folder / "config.yaml").evaluation)
    return scorecard


def _choose_strength(scorecard: Scorecard, limits: EvaluationConfig) -> None:
    """Set the scorecard's `best_strength`, None if there is none, by the limits in the config.

    It is chosen anew whenever a scorecard is read, since another `max_copied` may change it
    although nothing is measured again.
    """
    best = best_strength(scorecard["strengths"], limits.general_margin, limits.max_copied)
    scorecard["best_strength"] = best


@contextmanager
def _open_context(folder: Path, digest: str) -> Iterator[tuple[EvalContext, Path]]:
    """Load model and mixture for an evaluation; yield the context and the folder of its parts.

    While the context is open, no build can replace the mixture. An `evaluation.minutes` of None is
    replaced by `affordable_minutes`. Raises `MachineError` if GPU memory runs out, in the `with`
    block too, or the base cannot be loaded; `DataError` if the adapter or the mixture is gone or
    another one; `ConfigError` if the run's config is wrong.
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
    """Return the minutes for a scorecard: a tenth of the minutes that the run trained, at least 20.

    They are 20 if the folder has no metrics of the training.
    """
    pairs = pairwise(run.read_rows(folder) if (folder / run.METRICS).is_file() else [])
    # The time from each row to the next, but not the pause before a run was resumed.
    seconds: float = sum(b["time"] - a["time"] for a, b in pairs if b.get("event") != "resumed")
    return max(EvaluationConfig.FEWEST_MINUTES, seconds / 600)  # a tenth, in minutes


def _quick_part(context: EvalContext, parts: Path, echo: Echo) -> Scorecard:
    """Write the passages, echo the first, then measure bits; return `passages` and `metrics`.

    Both are read from the folder `parts` if they are there already. `metrics` are the rows of
    `score_bits`.
    """
    passages = _read_or_make(parts, "written", lambda: write_passages(context))
    echo(first_passages(passages))
    bits = _read_or_make(parts, "bits", lambda: score_bits(context))
    return {"passages": passages, "metrics": bits}


def _read_or_make(parts: Path, name: str, make: Callable[[], Any]) -> Any:
    """Read the part `name` from the folder `parts`; if it is missing or damaged, `make` it first.

    A part that was just made is written there and read back, since JSON turns tuples into lists.
    Raises `MachineError` if the part cannot be written, and whatever `make` raises.
    """
    path = parts / f"{name}.json"
    with suppress(OSError, ValueError):
        return json.loads(path.read_text(encoding="utf-8"))
    _write_json(path, make())
    return json.loads(path.read_text(encoding="utf-8"))


def _write_json(path: Path, value: Any) -> None:
    """Write `value` as JSON into the file `path`; make the folder if it is missing.

    The file gets its name only when it is complete, so nobody reads half of it. Raises
    `MachineError` if it cannot be written.
    """
    # With the process id in its name, since another process may evaluate the same run.
    unfinished = path.with_suffix(f".{os.getpid()}.tmp")
    with raise_machine_error(str(path.parent)):
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished.write_text(json.dumps(value, ensure_ascii=False, indent=1), encoding="utf-8")
        unfinished.replace(path)


def _digest(folder: Path) -> str:
    """Hash what the measurements of a scorecard depend on: 16 hex digits.

    If the base is a folder, its JSON files and weights are hashed; of a base from the hub only the
    name is, as a part of the adapter's settings. `evaluation.max_copied` and `max_extracted` are
    left out: no measurement depends on them. Raises `DataError` if the folder has no finished
    adapter, `ConfigError` if its config is wrong.
    """
    base = locate(model.adapter_settings(folder)["base_model_name_or_path"])
    config = load_config(folder / "config.yaml")
    evaluation = config.evaluation.model_dump(exclude={"max_copied", "max_extracted"})
    settings = [FORMAT, evaluation, config.training.seed, config.data.max_length]
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    paths = [folder / name for name in ("mixture.json", *model.ADAPTER_FILES)]
    paths += sorted([*base.glob("*.json"), *base.glob("*.safetensors")])
    for path in filter(Path.exists, (*paths, QUESTIONS, OWN_PROMPTS)):
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:16]


def frontier(context: EvalContext) -> list[dict[str, float]]:
    """Measure a small sample at each strength of the adapter.

    Returns
    -------
    A list of dicts, one for each strength, from 0 on: `strength`; `wuxia` and `general`, bits per
    character of held-out openings; `copied`, the length in characters of the longest run that one
    of the passages at this strength shares with the training text. The list is empty if 武侠 or
    general text has no held-out document, and shorter if the time runs out.
    """
    from peft.helpers import rescale_adapter_scale

    texts = {source: openings(context, source) for source in ("wuxia", "general")}
    if not all(texts.values()):
        return []
    # Tokens of a window and of a forward pass, at most.
    bounds = context.config.data.max_length, context.pass_tokens
    chosen_prompts = [row["prompt"] for row in prompts(context)[:PROMPTS]]
    rows: list[dict[str, float]] = []
    passages: list[str] = []  # one for each strength and prompt, in this order
    # One at a time, for at most 15 % of the evaluation's minutes.
    for (strength,) in context.within_budget("strengths measured", STRENGTHS, 1, 0.15):
        with rescale_adapter_scale(context.model, strength):
            passages += generate(context, chosen_prompts, context.seed, TOKENS)
            row = {"strength": strength}
            for source, opening_texts in texts.items():
                bits = bits_per_char(context.model, context.tokenizer, opening_texts, *bounds)
                row[source] = bits
            rows.append(row)
    # One call for all passages, since each call of `overlap` reads all training text.
    lengths = overlap(passages, context.mixture.training_texts)["length"]
    longest = lengths.groupby(lengths.index // len(chosen_prompts)).max()  # of each strength
    rows = [row | {"copied": int(length)} for row, length in zip(rows, longest, strict=True)]
    return sorted(rows, key=itemgetter("strength"))


def openings(context: EvalContext, source: str) -> list[str]:
    """Return the first 150 characters of each held-out document of a source, of at most eight."""
    numbers = context.documents(source, mixing.VALIDATION, limit=DOCUMENTS)
    return [text[:CHARACTERS] for text in context.mixture.texts(numbers)]


def best_strength(rows: list[dict[str, float]], margin: float, most_copied: int) -> float | None:
    """Return the strength with the fewest bits per character of 武侠 among those that do no harm.

    `rows` are those of `frontier`, strength 0 first. A strength does harm if general text takes
    over `margin` bits per character more than at strength 0, or if a copied run has `most_copied`
    characters or more. If two strengths tie, the lower one is returned. None is returned if all do
    harm, or if time ran out before strength 1 was measured.
    """
    if not any(row["strength"] == 1 for row in rows):
        return None
    most_bits = rows[0]["general"] + margin  # of general text
    harmless = [r for r in rows if r["general"] <= most_bits and r["copied"] < most_copied]
    return min(harmless, key=lambda row: row["wuxia"])["strength"] if harmless else None


def gate_failures(scorecard: Scorecard, limits: EvaluationConfig) -> Iterator[str]:
    """Yield what speaks against publishing an adapter, a sentence each: it copied, or it forgot.

    There is a sentence for each copied run of `max_copied` characters or more; for each figure of
    copying and of general text that was not measured; for a share of recited prefixes, training
    less held out, above `max_extracted`; for general text that got worse; and for questions that
    are answered worse (`wits`). It is no failure if the questions cannot tell whether it forgot.
    """
    rows = by_name(scorecard)
    extraction, general = rows["extraction_near", "training"], rows["bits_per_char", "general"]
    for copy in scorecard["copied"]:
        if copy["length"] >= limits.max_copied:
            yield "copied {length} characters in a row of {title}: {generated}".format(**copy)
    for row in (rows["copied_length", "training"], extraction, general):
        if row["delta"] is None:
            yield f"{row['source']} {row['name']} was {_change(row)}"
    share = extraction["tuned"] or 0  # None if it was not measured
    if share > limits.max_extracted:
        yield f"{share:.0%} more of training prefixes than of others are recited"
    if general["verdict"] == "worse":
        yield bits_sentence(general)
    if rows["wits", "questions"]["verdict"] == "worse":
        yield "the wits fell by more than evaluation.wits_margin"


def closing_words(scorecard: Scorecard, report: Path | None = None) -> str:
    """Return the last words of an evaluation, four parts with a blank line between them.

    The parts are the three `sentences`, a table of figures, a passage by base and one by tuned, and
    what to do next. `report` is the path of the run's page; if it is None, no page has been made,
    and the command that makes it stands in its place.
    """
    folder, quoted = scorecard["adapter"], shlex.quote(scorecard["adapter"])
    page = report or f"python -m wuxia_core.report {quoted}"
    templates, best = messages("next"), scorecard.get("best_strength")
    next_steps = [templates["always"].format(folder=folder, report=page, quoted=quoted)]
    if best not in (None, 1):  # 1: the strength as trained
        next_steps.append(templates["strength"].format(best=best))
    if scorecard["objective"] == "masked":
        next_steps.append(templates["masked"])  # advises training.objective=clm
    parts = ["\n".join(sentences(scorecard)), _figures_table(scorecard), _best_passages(scorecard)]
    return "\n\n".join([*parts, "\n".join(next_steps)])


def sentences(scorecard: Scorecard) -> list[str]:
    """Return three sentences: whether the model learned, whether it forgot, whether it copied."""
    rows = by_name(scorecard)
    changes = [bits_sentence(rows["bits_per_char", source]) for source in ("wuxia", "general")]
    return [*changes, copying_sentence(scorecard)]


def first_passages(passages: list[dict[str, Any]]) -> str:
    """Return the first three of `passages`, or as many as there are, as text to show."""
    return "\n".join([messages("passages")["first"], *map(_passage_lines, passages[:3]), ""])


def bits_sentence(row: Row) -> str:
    """Return a sentence: whether held-out text of a source became easier or harder to predict.

    `row` is one of the scorecard's two rows `bits_per_char`. The row of general text has a verdict
    (see `score_bits`), which decides the sentence; if the verdict is "not shown" although all of
    the interval lies above 0, the sentence says that the text got a little worse. The row of 武侠
    has no verdict, so its interval decides: below 0 the text became easier, above 0 harder.
    """
    state = "not measured"  # the key of the sentence in the source's messages
    if row["delta"] is not None:
        is_better, is_worse = row["high"] < 0, row["low"] > 0
        change = "better" if is_better else "not shown"
        state = row.get("verdict", "worse" if is_worse else change)
        if state == "not shown" and is_worse:
            state = "a little worse"
    sentence: str = messages(row["source"])[state]
    return sentence.format(**row, change=_change(row))


def copying_sentence(scorecard: Scorecard) -> str:
    """Return a sentence: whether the tuned model copied training text, or learned it by heart.

    The model copied if a passage shares a run of 30 characters or more with training text.
    Otherwise it learned by heart if tuning surely raised the share of training prefixes that it
    recites, less the share of held-out ones: all of the interval lies above 0. Otherwise the
    sentence says that nothing was copied, or that this was not measured.
    """
    rows, overlaps = by_name(scorecard), scorecard["copied"]
    row, extraction = rows["copied_length", "training"], rows["extraction_near", "training"]
    longest: Row = overlaps[0] if overlaps else {"length": 0, "title": ""}  # longest run first
    state = "nothing" if row["delta"] is not None else "not measured"
    if longest["length"] >= FLAGGED:
        state = "copied"
    elif (extraction["low"] or 0) > 0:
        state, row = "by heart", extraction
    figures = {"length": longest["length"], "title": visible(longest["title"]), "most": FLAGGED}
    return str(messages("copying")[state].format(**figures, change=_change(row)))


def by_name(scorecard: Scorecard) -> dict[tuple[str, str], Row]:
    """Map (name of a metric, its source) to the metric's row of the scorecard.

    `by_name(scorecard)["bits_per_char", "wuxia"]` is the row of bits per character of 武侠.
    """
    return {(row["name"], row["source"]): row for row in scorecard["metrics"]}


def _change(row: Row) -> str:
    """Return a row's difference and its interval, `−0.203 [−0.251, −0.160]`, or why it has none."""
    if row["delta"] is None:
        return str(messages("change")["not measured"].format(**row))
    return str(messages("change")["interval"].format(**row)).replace("-", "−")


def _figures_table(scorecard: Scorecard) -> str:
    """Return a table, as text, of the metrics in the messages' section `[table]`, a row for each.

    The last column has the metric's verdict. If it has none, the column has the reason why figures
    are missing, and is blank if there is no reason either.
    """
    columns = [*FIGURES, "verdict"]
    texts, metrics = messages("table"), by_name(scorecard)
    rows = {title: metrics[name, source] for name, source, title in texts["rows"]}
    table = pd.DataFrame(list(rows.values()), index=list(rows), columns=[*columns, "reason"])
    table["verdict"] = table["verdict"].replace(messages("verdicts")).fillna(table["reason"])
    table = table[columns].rename(columns=messages("columns")).rename_axis(columns=texts["title"])
    with pd.option_context("display.unicode.east_asian_width", True):
        return str(table.to_string(float_format="{:.3f}".format, na_rep=""))


def _best_passages(scorecard: Scorecard) -> str:
    """Return, as text, base's and tuned's passages after the prompt where tuning raised style most.

    If no style was measured, the first prompt whose passages were long enough is chosen; if no
    passage was, the first prompt. A warning follows if the base is the bundled one.
    """
    # (writer, number of the prompt) → logit of style; one that was not measured (None) counts as 0.
    style = {(row["writer"], row["number"]): row["style"] or 0.0 for row in scorecard["texts"]}
    numbers = [number for writer, number in style if writer == "base"]  # the same for "tuned"
    best = max(numbers, key=lambda n: style["tuned", n] - style["base", n], default=0)
    lines = [messages("passages")["best"], _passage_lines(scorecard["passages"][best])]
    return "\n".join(filter(None, [*lines, tiny_warning(scorecard)]))


def tiny_warning(scorecard: Scorecard) -> str:
    """Warn that the bundled base is too small to write; "" for any other base."""
    is_tiny = locate(scorecard["base"]).resolve() == TINY_BASE.resolve()
    return str(messages("passages")["tiny"]) if is_tiny else ""


def _passage_lines(passage: dict[str, Any]) -> str:
    """Return three lines: a prompt and what base and tuned wrote, each cut to 100 characters."""
    prompt, base, tuned = (one_line(passage[key])[:100] for key in ("prompt", "base", "tuned"))
    labels = messages("passages")
    return f"{prompt} …\n  {labels['base']}{base}\n  {labels['tuned']}{tuned}"
