"""Did it keep its wits? Multiple-choice questions, base against tuned.

Nothing is generated and no answer is parsed: the option that a model finds likeliest is its answer,
so that base models can be asked too.
"""

import functools
import importlib.util
import math
import os
import unicodedata
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
import pandas as pd
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, field_validator
from torch import cuda

from wuxia_core import mixing
from wuxia_core.errors import ConfigError, DataError, MachineError
from wuxia_core.evaluate.scoring import Floats, sequence_nll
from wuxia_core.evaluate.statistics import EvalContext, Metric, Row, compare, ratio
from wuxia_core.masking import IGNORE_INDEX
from wuxia_core.mixing import hash_key
from wuxia_core.model import document_start_id, load_adapter

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


QUESTIONS = Path(__file__).with_name("questions.jsonl")
OPTIONS = 4
CHANCE = 1 / OPTIONS
AT_ONCE = 32  # questions between looks at the clock
Z90 = 1.6449  # normal quantile of a two-sided 90 % interval: either side is a test at 5 %

Composed = AfterValidator(functools.partial(unicodedata.normalize, "NFC"))
Text = Annotated[str, Field(min_length=1), Composed]
BATCH = 8  # questions


class Question(BaseModel):
    """A line of the question file, after NFC; `answer` counts from 0, `reason` says why it is."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    id: Text
    kind: Literal["knowledge", "reading", "instruction", "arithmetic"]
    question: Text
    options: tuple[Text, Text, Text, Text]
    answer: Annotated[int, Field(ge=0, lt=OPTIONS)]
    reason: Text

    @field_validator("options")
    @classmethod
    def _differ(cls, options: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(options)) < OPTIONS:
            raise ValueError("two options are the same")
        return options


def questions(path: str | os.PathLike[str] = QUESTIONS) -> tuple[Question, ...]:
    """Read a JSONL file of questions, by default our own.

    Raises `DataError`, naming file, line and field, where a field is missing, unknown or of another
    type, a line is empty, two options are the same or an id comes twice.
    """
    try:
        lines = Path(path).read_bytes().decode("utf-8-sig").removesuffix("\n").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read as UTF-8 text ({error})") from None
    found: dict[str, Question] = {}
    for number, line in enumerate(lines, 1):
        try:
            question = Question.model_validate_json(line)
        except ValidationError as error:
            first = error.errors()[0]
            field = ".".join(map(str, first["loc"])) or "line"
            message = f"{path}:{number}: {field}: {first['msg']}; mend or delete the line"
            raise DataError(message) from None
        if question.id in found:
            raise DataError(f"{path}:{number}: id: {question.id} comes twice; give it another")
        found[question.id] = question
    return tuple(found.values())


def judge_wits(context: EvalContext) -> list[Row]:
    """Ask the questions: whether all in all the wits were kept, and the accuracy by kind."""
    mixed = sorted(questions(), key=lambda question: hash_key(context.seed, question.id))
    chunks = context.within_budget("questions asked", mixed, AT_ONCE, 0.13)
    asked = [
        context.base_and_tuned(
            functools.partial(answers, context.model, context.tokenizer, chunk, context.batch_size)
        )
        for chunk in chunks
    ]
    base, tuned = (pd.concat(side, ignore_index=True) for side in zip(*asked, strict=True))
    rows = [verdict(base, tuned, context.config.evaluation.wits_margin)]
    for kind in base["kind"].unique():
        of = base["kind"] == kind
        sides = [side.loc[of, ["right"]].assign(asked=1) for side in (base, tuned)]
        metric = Metric(f"wits, {kind}", "share of questions", "questions", ratio("right", "asked"))
        rows.append(compare(metric, sides[0], sides[1], int(of.sum()), context.seed))
    return rows


def answers(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    questions: Sequence[Question],
    batch_size: int,
) -> pd.DataFrame:
    r"""Ask a model which of a question's options is the likeliest, character for character.

    An option scores the sum of log p of its tokens behind `问题：…\n答案：`, divided by its
    characters (code points after NFC) so that long ones stand a chance: `acc_norm` of
    lm-evaluation-harness (Gao et al. 2021). Its tokens are those of the option by itself, so that
    all four stand behind the very same prompt.

    Parameters
    ----------
    model : PreTrainedModel or PeftModel
        In evaluation mode. Ask the base within `with model.disable_adapter():`.
    questions : sequence of Question
        One at least.
    batch_size : int
        Options a forward pass; only their tokens go through the vocabulary projection.

    Returns
    -------
    A row a question, in their order: `id`, `kind`, `right` (0 or 1), and `margin`, nats a character
    by which the right option beats the best wrong one: above 0 where `right` is 1.
    """
    pad = document_start_id(tokenizer)
    rows = sorted(_rows(tokenizer, questions), key=lambda row: len(row[1]))  # little padding
    count = OPTIONS * len(questions)
    nats = sequence_nll(model, rows, count, pad, batch_size, "questions")
    chars = [len(option) for question in questions for option in question.options]
    scores: Floats = -(nats / chars).reshape(-1, OPTIONS)
    right = np.arange(OPTIONS) == np.array([[question.answer] for question in questions])
    margin = scores[right] - np.where(right, -np.inf, scores).max(axis=1)
    head = [(question.id, question.kind) for question in questions]
    table = pd.DataFrame(head, columns=["id", "kind"])
    return table.assign(right=(margin > 0).astype(int), margin=margin)


def _rows(
    tokenizer: "PreTrainedTokenizerBase", questions: Sequence[Question]
) -> Iterator[tuple[int, mixing.Tokens, mixing.Tokens]]:
    """Tokens and labels of each option behind its question; only the option is asked for."""
    start_id = document_start_id(tokenizer)
    encode = functools.partial(tokenizer, add_special_tokens=False, split_special_tokens=True)
    prompts = encode([f"问题：{question.question}\n答案：" for question in questions]).input_ids
    options = encode([option for each in questions for option in each.options]).input_ids
    for number, option in enumerate(options):
        ids = np.array([start_id, *prompts[number // OPTIONS], *option], np.int32)
        labels = ids.copy()
        labels[: -len(option)] = IGNORE_INDEX
        yield number, ids, labels


def verdict(base: pd.DataFrame, tuned: pd.DataFrame, margin: float) -> dict[str, Any]:
    """Say whether the tuned model answers as well as its base: two one-sided tests.

    `kept` where the 90 % interval of the difference in accuracy lies inside ±margin, which tests
    either side at 5 % (TOST: Schuirmann 1987); `worse` where all of it lies below -margin; else
    `not shown`. `cannot tell` where the base is not above chance by two standard errors of
    guessing, sqrt(0.25 · 0.75 / n): who knows nothing forgets nothing. To a user only the lower
    bound matters; the upper one is asked all the same, as novels teach no school subjects and an
    adapter that is far *better* at them points at a mistake. The interval is the score interval of
    paired shares (Tango 1998): with few changed answers a normal or bootstrap one is too short.

    Parameters
    ----------
    base, tuned : DataFrame
        What `answers` gave for the same questions; `DataError` where they are not the same.
    margin : float
        The difference in accuracy that does not matter, set beforehand; 0.06 is 6 points.

    Returns
    -------
    A scorecard row with `verdict` and `margin`, and `reason` where it `cannot tell`.
    """
    if base["id"].tolist() != tuned["id"].tolist():
        raise DataError("wits: base and tuned answered other questions; ask both anew")
    n, before, after = len(base), float(base["right"].mean()), float(tuned["right"].mean())
    low, high = _interval(tuned["right"].to_numpy() - base["right"].to_numpy())
    row = {
        **{"name": "wits", "unit": "share of questions, 90 % interval", "source": "questions"},
        **{"base": before, "tuned": after, "delta": after - before, "low": low, "high": high},
        **{"n": n, "margin": margin},
    }
    threshold = CHANCE + 2 * math.sqrt(CHANCE * (1 - CHANCE) / n)
    if before <= threshold:
        reason = f"the base is right on {before:.3f} of {n}, and guessing reaches {threshold:.3f}"
        return {**row, "verdict": "cannot tell", "reason": reason}
    if -margin < low and high < margin:
        return {**row, "verdict": "kept"}
    return {**row, "verdict": "worse" if high < -margin else "not shown"}


def _interval(change: Floats) -> tuple[float, float]:
    """Bound the mean of changes by -1, 0 or 1, to 0.0001: what a test at 10 % does not refuse."""
    gained, lost, n = int((change > 0).sum()), int((change < 0).sum()), len(change)
    delta = np.linspace(-1, 1, 20_002)[1:-1]  # without 0, where nothing need vary
    b = (2 * n - gained + lost) * delta - gained - lost
    c = lost * delta * (delta - 1)
    share = (np.sqrt(b**2 - 8 * n * c) - b) / (4 * n)  # of lost ones, likeliest under delta
    z = (gained - lost - n * delta) / np.sqrt(n * (2 * share + delta * (1 - delta)))
    inside = delta[np.abs(z) <= Z90]
    return float(inside[0]), float(inside[-1])


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
