"""The scorecard of a run folder: every metric for base and tuned, and what it says in words.

Each part is kept beside the run as soon as it is done, so that an evaluation that was cut off goes
on with the next one; the parts go when the scorecard is written.
"""

import hashlib
import json
import logging
import shlex
import shutil
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pandas as pd

from wuxia_core import mixing, model
from wuxia_core.config import TINY_BASE, Config, EvaluationConfig, load_config, locate
from wuxia_core.errors import MachineError, raise_machine_error
from wuxia_core.evaluate.context import EvalContext
from wuxia_core.evaluate.copying import FLAGGED, score_extraction
from wuxia_core.evaluate.recovery import recovery
from wuxia_core.evaluate.scoring import QUESTIONS, score_bits, score_questions
from wuxia_core.evaluate.statistics import Row
from wuxia_core.evaluate.writing import score_generations, write_passages
from wuxia_core.text import visible

CARD, PARTS = "scorecard.json", ".scorecard"
FORMAT = 2  # raise it when the scorecard's content changes, so that older ones are measured anew
SETTINGS: Any = {
    "evaluation": {"max_documents", "minutes", "wits_margin", "general_margin"},
    "training": {"seed"},
    "data": {"max_length"},
}
# What a run prints: metric, source, how it is called, decimals.
TABLE = (
    ("bits_per_char", "wuxia", "武侠, bits a character ↓", 3),
    ("bits_per_char", "general", "general text, bits a character ↓", 3),
    ("masked_accuracy", "wuxia", "武侠, masked tokens found ↑", 3),
    ("style_strength", "wuxia", "style strength of passages ↑", 2),
    ("burrows_delta", "wuxia", "Burrows's Delta to 武侠 ↓", 3),
    ("copied_length", "training", "longest copied run, mean ↓", 2),
    ("wits", "questions", "questions answered right ↑", 3),
)
LEARNED = {
    "missing": ": not measured ({reason}); raise data.val_ratio or add novels, and train again",
    "better": " became easier to predict: {change}",
    "worse": " became HARDER to predict: {change}; lower training.learning_rate, train less",
    "unsure": ": no sure change: {change}; train longer, or hold more text out (data.val_ratio)",
}
GENERAL = {
    "not measured": ": not measured ({reason}); name some as data.general_file, and train again",
    "kept": ": no worse: {change}, margin {margin}",
    "worse": " got WORSE: {change}, margin {margin}; raise data.general_ratio, or lower "
    "training.learning_rate",
    "not shown": ": cannot tell whether it got worse by more than the margin of {margin}: "
    "{change}; hold more of it out, or raise data.general_ratio",
}
REMEDY = "train fewer epochs, and look for books that are there twice (notebook 01)"
NEXT = """\
adapter    {folder}
scorecard  {card}{report}
next       what it learned, token by token:
             python -m wuxia_core.report 02_see_masks -p output_dir {quoted}
           may it be published?
             python -m wuxia_core.evaluate {quoted} --gate"""
HINT = "in our comparison training.objective=clm learned more of the style: see notebook 06"
SHOWN = 100  # characters of a passage

Card = dict[str, Any]
Echo = Callable[[str], object]
logger = logging.getLogger(__name__)


def evaluate(output_dir: str | Path, echo: Echo = logger.info) -> Card:
    """Score a run folder and write `scorecard.json` into it.

    `echo` takes the first passages as soon as they are written, before anything is measured. Raises
    `DataError` where the folder holds no finished adapter, or its mixture is gone; `MachineError`
    where memory runs out or the folder cannot be written.
    """
    folder = Path(output_dir)
    adapter = model.adapter_settings(folder)
    with _opened(folder) as (context, parts):
        passages = _passages(context, parts, echo)
        metrics: list[Row] = [
            *_kept(parts, "bits", lambda: score_bits(context)),
            *_kept(parts, "recovery", lambda: recovery(context)),
            _kept(parts, "questions", lambda: score_questions(context)),
        ]
        writing = _kept(parts, "writing", lambda: score_generations(context, passages))
        metrics += writing.pop("metrics")
        metrics.append(_kept(parts, "extraction", lambda: score_extraction(context)))
    card = {
        "base": adapter["base_model_name_or_path"],
        "adapter": str(folder),
        "objective": context.config.training.objective,
        "of": parts.name,
        "metrics": metrics,
        "passages": passages,
        **writing,
    }
    with raise_machine_error(str(folder)):
        _replace(folder / CARD, json.dumps(card, ensure_ascii=False, indent=1))
        shutil.rmtree(folder / PARTS)
    return card


def read_scorecard(output_dir: str | Path, echo: Echo = logger.info) -> Card:
    """Read a run folder's `scorecard.json`; measure it where there is none of this adapter.

    It is measured anew where texts, questions or settings of the evaluation have changed, too.
    Raises as `evaluate` does.
    """
    folder = Path(output_dir)
    if card := _current(folder):
        return card
    if (folder / CARD).exists():
        logger.warning("%s is damaged, or of another adapter or settings", folder / CARD)
    return evaluate(folder, echo)


def quick_look(output_dir: str | Path, echo: Echo = logger.info) -> Card:
    """Write passages and measure bits per character only: `passages` and `metrics`.

    What it makes is kept for a whole evaluation. Raises as `evaluate` does.
    """
    folder = Path(output_dir)
    if card := _current(folder):
        echo(first_passages(card["passages"]))
        return card
    with _opened(folder) as (context, parts):
        passages = _passages(context, parts, echo)
        return {"passages": passages, "metrics": _kept(parts, "bits", lambda: score_bits(context))}


def _current(folder: Path) -> Card | None:
    """Read a scorecard; None where there is none of this adapter, its texts and settings."""
    model.adapter_settings(folder)
    card = mixing.read_json(folder / CARD)
    digest = _digest(folder, load_config(folder / "config.yaml"))
    return card if card and card.get("of") == digest else None


def _kept(parts: Path, name: str, work: Callable[[], Any]) -> Any:
    """Read a part that was done before, or do it and keep it."""
    path = parts / f"{name}.json"
    if not path.exists():
        text = json.dumps(work(), ensure_ascii=False)
        with raise_machine_error(str(parts)):
            parts.mkdir(parents=True, exist_ok=True)
            _replace(path, text)
    return json.loads(path.read_text(encoding="utf-8"))


@contextmanager
def _opened(folder: Path) -> Iterator[tuple[EvalContext, Path]]:
    """Load what is evaluated, and turn a lack of GPU memory into advice."""
    import torch

    model.adapter_settings(folder)
    config = load_config(folder / "config.yaml")
    mixture = mixing.open_run_mixture(folder, config.data.processed_data_file)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parts = folder / PARTS / _digest(folder, config)
    logger.info("measuring %s; what is done is kept there, so that it can go on", folder)
    try:
        yield EvalContext(*model.load_adapter(folder, device), mixture, config), parts
    except torch.OutOfMemoryError as error:
        raise MachineError(
            f"out of GPU memory while evaluating ({str(error).splitlines()[0]}); lower training."
            f"per_device_eval_batch_size in {folder / 'config.yaml'} and evaluate again"
        ) from None


def _passages(context: EvalContext, parts: Path, echo: Echo) -> list[dict[str, Any]]:
    passages: list[dict[str, Any]] = _kept(parts, "written", lambda: write_passages(context))
    echo(first_passages(passages))
    return passages


def _digest(folder: Path, config: Config) -> str:
    """Identify what a scorecard depends on."""
    settings = {"format": FORMAT, **config.model_dump(include=SETTINGS)}
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for path in (folder / "mixture.json", folder / model.ADAPTER_WEIGHTS, QUESTIONS):
        digest.update(path.read_bytes() if path.exists() else b"")
    return digest.hexdigest()[:16]


def _replace(path: Path, text: str) -> None:
    """Write a file in one step."""
    unfinished = path.with_suffix(".tmp")
    unfinished.write_text(text, encoding="utf-8")
    unfinished.replace(path)


def gate_failures(card: Card, limits: EvaluationConfig) -> list[str]:
    """Name what speaks against publishing an adapter: copied text, or wits that were lost.

    Copying and general text have to be measured; where the sample is too small to tell whether
    wits were kept, nothing speaks against it.
    """
    rows = _by_name(card)
    extraction, general = rows["extraction_near", "training"], rows["bits_per_char", "general"]
    wits = rows["wits", "questions"]
    found = [
        f"a passage shares {copied['length']} characters in a row with {copied['title']}, "
        f"evaluation.max_copied is {limits.max_copied}: {copied['generated']}"
        for copied in card["copied"]
        if copied["length"] >= limits.max_copied
    ]
    measured = {"copying": rows["copied_length", "training"], "extraction": extraction}
    for what, row in (measured | {"general text": general}).items():
        if row["delta"] is None:
            found.append(f"{what} was not measured: {row['reason']}")
    if (extraction["tuned"] or 0) > limits.max_extracted:
        found.append(
            f"of training prefixes {extraction['tuned']:.0%} more than of others are continued as "
            f"in the book, evaluation.max_extracted is {limits.max_extracted:.0%}"
        )
    if general["verdict"] == "worse":
        found.append(
            f"general text costs {general['delta']:.3f} bits a character more, certainly over "
            f"evaluation.general_margin, {general['margin']}"
        )
    if wits["verdict"] == "worse":
        found.append(f"the wits fell by more than evaluation.wits_margin, {wits['margin']}")
    return found


def closing_words(card: Card, report: Path | None = None) -> str:
    """Say what came out, for a person: three sentences, a table, a passage by each, what is next.

    The parts are a blank line apart. `report` is the page that was made of the run, if one was.
    """
    rows = _by_name(card)
    bits = [rows["bits_per_char", source] for source in ("wuxia", "general")]
    sentences = "\n".join([learned(bits[0]), forgotten(bits[1]), copied(card)])
    return "\n\n".join([sentences, _table(rows), _pair(card), _next(card, report)])


def first_passages(passages: list[dict[str, Any]], count: int = 3) -> str:
    """Show the first passages of base and tuned."""
    shown = "\n".join(_both(passage) for passage in passages[:count])
    return f"what base and tuned write after the first {count} prompts:\n{shown}\n"


def learned(row: Row) -> str:
    """Say in a sentence whether held-out 武侠 became easier to predict."""
    if row["delta"] is None:
        return "held-out 武侠" + LEARNED["missing"].format(reason=row["reason"])
    state = "better" if row["high"] < 0 else "worse" if row["low"] > 0 else "unsure"
    return "held-out 武侠" + LEARNED[state].format(change=_bits(row))


def forgotten(row: Row) -> str:
    """Say in a sentence whether general text became harder to predict."""
    if row["delta"] is None:
        return "general text" + GENERAL["not measured"].format(reason=row["reason"])
    return "general text" + GENERAL[row["verdict"]].format(
        change=_bits(row), margin=f"{row['margin']:g}"
    )


def copied(card: Card) -> str:
    """Say in a sentence whether training text came out again."""
    rows = _by_name(card)
    row, extraction = rows["copied_length", "training"], rows["extraction_near", "training"]
    longest = max((run["length"] for run in card["copied"]), default=0)
    if longest >= FLAGGED:
        title = visible(card["copied"][0]["title"])
        return f"COPIED: {longest} characters in a row of {title} ({FLAGGED} are flagged); {REMEDY}"
    if extraction["delta"] is not None and extraction["low"] > 0:
        share = f"{_signed(extraction['delta'], 2)} {_interval(extraction, 2)}"
        return f"LEARNED BY HEART: training text is continued as in the book: {share}; {REMEDY}"
    if row["delta"] is None:
        return f"copying: not measured ({row['reason']}); raise evaluation.minutes, or leave it out"
    flag = f"({FLAGGED} would be flagged)"
    return f"nothing copied: longest run {longest} characters of training text {flag}"


def _by_name(card: Card) -> dict[tuple[str, str], Row]:
    return {(row["name"], row["source"]): row for row in card["metrics"]}


def _signed(value: float, decimals: int) -> str:
    """Write a number with its sign: -0.2034 is `−0.203`."""
    return f"{value:+.{decimals}f}".replace("-", "−")


def _bits(row: Row) -> str:
    return f"{_signed(row['delta'], 3)} bits a character {_interval(row, 3)}"


def _interval(row: Row, decimals: int) -> str:
    return f"[{_signed(row['low'], decimals)}, {_signed(row['high'], decimals)}]"


def _table(rows: dict[tuple[str, str], Row]) -> str:
    """Put the seven figures of `TABLE` below each other."""
    lines = [f"{'↓ less is better, ↑ more is':36}   base → tuned     change  95 % interval"]
    for name, source, label, decimals in TABLE:
        row = rows[name, source]
        wide = sum(unicodedata.east_asian_width(c) in "WF" for c in label)  # two columns each
        line = label.ljust(36 - wide)
        if row["delta"] is None:
            line += f"not measured: {row['reason']}"
        else:
            line += f"{row['base']:7.{decimals}f} → {row['tuned']:<7.{decimals}f}"
            line += f"{_signed(row['delta'], decimals):>9}  {_interval(row, decimals)}"
        if name == "wits":  # its interval is another one
            line += f" (90 %): {row['verdict']}"
            line += ", as the base only guesses" * (row["verdict"] == "cannot tell")
        lines.append(line)
    return "\n".join(lines)


def _pair(card: Card) -> str:
    """Show what both wrote after the prompt where the style rose most."""
    texts = pd.DataFrame(card["texts"], columns=["writer", "number", "style"]).dropna()
    logits = texts[texts["writer"] != "human"].pivot(
        index="number", columns="writer", values="style"
    )
    number, rule = 0, "the first prompt"
    if len(logits):
        rise = logits["tuned"] - logits["base"]
        number = int(rise.idxmax())
        rule = f"of {len(rise)} prompts the one where style strength rose most"
    text = f"What they write ({rule}):\n{_both(card['passages'][number])}"
    if locate(card["base"]).resolve() == TINY_BASE.resolve():
        text += "\nThe bundled base (5 M parameters) is too small to write: "
        text += "this shows the pipeline, not quality."
    return text


def _both(passage: dict[str, Any]) -> str:
    prompt, base, tuned = (
        visible(" ".join(passage[key].split())) for key in ("prompt", "base", "tuned")
    )
    return f"{prompt} …\n  base:  {base[:SHOWN]}\n  tuned: {tuned[:SHOWN]}"


def _next(card: Card, report: Path | None) -> str:
    """Say where things are, and what to do now."""
    folder = card["adapter"]
    text = NEXT.format(
        folder=folder,
        card=Path(folder) / CARD,
        report=f"\nreport     {report}" if report else "",
        quoted=shlex.quote(folder),
    )
    return f"{text}\n           {HINT}" if card["objective"] == "masked" else text
