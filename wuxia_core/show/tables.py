"""Tables of files, cleaning, windows, metrics and scorecards; advice and progress in sentences."""

import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from wuxia_core.config import Config, effective_batch, load_config
from wuxia_core.corpus import NO_HEADINGS, RULES
from wuxia_core.errors import DataError
from wuxia_core.messages import messages
from wuxia_core.mixing import Mixture, read_json, run_steps, train_windows
from wuxia_core.model import ADAPTER_WEIGHTS
from wuxia_core.run import METRICS, is_at_work, read_rows
from wuxia_core.text import NO_MATH, escape, visible

if TYPE_CHECKING:
    from pandas.io.formats.style import Styler
    from transformers import PreTrainedTokenizerBase


# The signs that stand for white space in an example of cleaning.
BLANKS = str.maketrans({"\r": "\\r", "\n": "↵", "\t": "\\t", " ": "␣", "　": "␣␣", "\xa0": "⍽"})
EXAMPLE_LENGTH = 60  # characters, at most
WIDE = 30  # characters; a longer text has `table` keep its column wide
# Columns whose values `table` translates too.
TRANSLATED = ["", "source", "split", "name", "unit", "condition", "read"]
FEWEST_STEPS = 100  # of a run; `advice` warns of fewer
# Reasons to leave a file out that is hardly a novel.
NO_NOVELS = re.compile("^describes a folder|^called like|if it is a book")
# A replacement character, the same read as GBK (锟斤拷), or unset memory read as GBK (烫, 屯); with
# up to 8 characters of the line on either side.
GARBLED = re.compile("[^\n]{0,8}(?:\ufffd|锟斤拷|烫烫烫|屯屯屯)[^\n]{0,8}")


def named(name: str) -> str:
    """Translate the name of a column, source, split or figure into the reader's language.

    A name that is not in the messages' section `[columns]` is returned as it is.
    """
    return str(messages("columns").get(name, name))


def translated(note: str) -> str:
    """Put a note on a file, or why it was left out, into the reader's language.

    Such notes are made in English, for the log. One that no pattern in the messages matches is
    returned as it is.
    """
    for pattern, template in messages("notes")["patterns"]:
        if match := re.fullmatch(pattern, note, re.DOTALL):
            return match.expand(template)
    return note


def table(rows: pd.DataFrame) -> "Styler":
    """Style a table for a notebook: text escaped and left-aligned, numbers as 1,234 and 0.50.

    The index is hidden. Heads, and the values of the columns `TRANSLATED`, are in the reader's
    language. A missing number is left blank. For a table without rows a sentence that says so is
    shown instead.
    """
    if rows.empty:
        caption = [{"selector": "caption", "props": "white-space: nowrap"}]
        empty = pd.DataFrame().style.hide().set_table_styles(caption)
        return empty.set_caption(messages("columns")["no rows"])
    rows = rows.assign(**{name: rows[name].map(named) for name in TRANSLATED if name in rows})
    rows = rows.rename(columns=lambda name: escape(named(name)))
    text_columns = list(rows.select_dtypes(exclude="number").columns)
    number_columns = [name for name in rows.columns if name not in text_columns]
    rows = rows.assign(**{name: rows[name].map(str).map(escape) for name in text_columns})
    wide_columns = [name for name in text_columns if rows[name].str.len().max() > WIDE]
    heads = {name: [{"selector": "th", "props": "text-align: left"}] for name in text_columns}
    return (
        rows.style.hide()
        .format(_number, subset=number_columns, na_rep="")
        .set_table_attributes(f'class="{NO_MATH}"')
        .set_properties(subset=wide_columns, **{"min-width": "12em", "white-space": "pre-wrap"})
        .set_properties(subset=text_columns, **{"text-align": "left"})
        .set_table_styles(heads, overwrite=False)
    )


def _number(value: float) -> str:
    """Write a number for a table: 1,234 if it is whole, else 0.50."""
    return f"{value:,.0f}" if float(value).is_integer() else f"{value:,.2f}"


def advice(mixture: Mixture, config: Config) -> list[str]:
    """List what to mend before a run, a sentence each; without any, say that all is well."""
    sentences = [
        *_advise_files(mixture),
        *_advise_simplified(mixture),
        *_advise_garbled(mixture),
        *_advise_general(mixture),
        *_advise_steps(mixture, config),
    ]
    return sentences or [messages("advice")["well"]]


def _advise_files(mixture: Mixture) -> Iterator[str]:
    """Say how many of the novels' files are not used at all: not read, empty, or copies.

    Yields a sentence if there are such files.
    """
    files = mixture.preparation["files"]
    copies = {copy["book"] for copy in mixture.preparation["same_books"]}  # titles left out
    sources = ("wuxia", "")  # "": a file that was not read, so its source is not known
    novels = [x for x in files if x["source"] in sources and not NO_NOVELS.search(x["refused"])]
    unused = [file for file in novels if not file["documents"] or file["book"] in copies]
    if unused:
        yield messages("advice")["files"].format(unused=len(unused), files=len(novels))


def _advise_simplified(mixture: Mixture) -> Iterator[str]:
    """Name the novels in traditional characters, if there are others beside them.

    `preparation["traditional"]` is empty if all novels are traditional, and if none is.
    """
    if books := mixture.preparation["traditional"]:
        yield messages("advice")["traditional"].format(books=_quote_three(books))


def _advise_garbled(mixture: Mixture) -> Iterator[str]:
    """Count the garbled places, such as 锟斤拷, and quote the first three, each with its book.

    Yields a sentence if there is such a place.
    """
    rows = mixture.documents[["book", "text"]].itertuples(index=False)
    places = [f"{book}：{match[0]}" for book, text in rows for match in GARBLED.finditer(text)]
    if places:
        yield messages("advice")["garbled"].format(count=len(places), places=_quote_three(places))


def _advise_general(mixture: Mixture) -> Iterator[str]:
    """Ask for general text if there is none, or for more if an epoch of novels repeats it.

    The characters to add are rounded up to thousands.
    """
    # `epochs`: how often general text is read while the novels are read once; 0 if never.
    epochs, outline = mixture.preparation["general_epochs"], mixture.outline
    if not epochs:
        yield messages("advice")["no general"]
    elif epochs > 1:
        characters = outline.loc[outline["source"] == "general", "characters"].sum()
        missing = math.ceil(characters * (epochs - 1) / 1000) * 1000
        yield messages("advice")["general"].format(epochs=epochs, more=missing)


def _advise_steps(mixture: Mixture, config: Config) -> Iterator[str]:
    """Warn if a run in two processes has fewer than 100 steps, which are too few to learn from."""
    size = run_size(mixture, config)
    if size["steps"] < FEWEST_STEPS:
        yield messages("advice")["steps"].format(steps=size["steps"], epoch=size["steps an epoch"])


def _quote_three(texts: Iterable[str]) -> str:
    """Quote the first three texts and count the others: of five, `「甲」「乙」「丙」 … (+2)`."""
    quoted = [f"「{visible(text)}」" for text in texts]
    more = f" … (+{len(quoted) - 3})" if len(quoted) > 3 else ""
    return "".join(quoted[:3]) + more


def run_size(mixture: Mixture, config: Config, processes: int = 2) -> dict[str, float]:
    """Count what a run in `processes` processes takes; return the counts by name.

    For one epoch these are `windows`, `steps an epoch`, `masked tokens`, and `filled`, the share of
    the windows' places that hold a token (0 to 1). For the whole run they are `steps` (of the
    optimizer) and `tokens of the run`, which is an estimate.
    """
    windows, tokens = len(train_windows(mixture)), int(mixture.report["tokens"].sum())  # an epoch's
    # `batch` is the number of windows of a step, `steps` the number of steps of the whole run.
    batch, steps = effective_batch(config, processes), int(run_steps(config, windows, processes))
    return {
        "windows": windows,
        "filled": tokens / windows / config.data.max_length,
        "steps an epoch": math.ceil(windows / batch),
        "masked tokens": round(tokens * config.masking.mask_ratio),
        "steps": steps,
        "tokens of the run": round(tokens * steps * batch / windows),
    }


def progress(folder: Path, metrics: pd.DataFrame) -> str:
    """Say in a sentence how many of its steps a run has done, and how many minutes the rest takes.

    `metrics` is the table of `read_metrics` for the run folder. The time of a step is measured
    since the run was last started or resumed; if no further step has been logged since then, it is
    the time of a step before that. A run that is finished, that was stopped, or that has not logged
    a step gets another sentence.
    """
    templates = messages("advice")
    # Until figures are logged, the table lacks columns; `reindex` adds them, empty.
    metrics = metrics.reindex(columns=["event", "step", "time", "epoch"])
    is_start = metrics["event"].isin(["started", "resumed"])
    # For each row the step and time (seconds) of the last start or resumption before it.
    starts = metrics[["step", "time"]].where(is_start).ffill()
    trained = metrics[metrics["epoch"].notna() & (metrics["step"] > starts["step"])]
    if trained.empty:
        return str(templates["not begun"])
    last, start = trained.iloc[-1], starts.loc[trained.index[-1]]
    config = load_config(folder / "config.yaml")
    epoch_steps = round(last["step"] / last["epoch"])  # steps of one epoch
    # Steps of the whole run. `run_steps` wants the number of windows of an epoch: those that one
    # process reads in `epoch_steps` steps.
    steps = int(run_steps(config, epoch_steps * effective_batch(config, 1), 1))
    step_seconds = (last["time"] - start["time"]) / (last["step"] - start["step"])
    figures = {"done": int(last["step"]), "steps": steps, "seconds": step_seconds}
    figures |= {"minutes": step_seconds * (steps - last["step"]) / 60}
    state = "under way" if is_at_work(folder) else "stopped"
    state = "finished" if (folder / ADAPTER_WEIGHTS).exists() else state
    environment = read_json(folder / "environment.json") or {}
    command = {"config": quote(str(folder / "config.yaml"))}
    command["processes"] = str(environment.get("processes", 2))
    return str(templates[state].format(**figures, **command))


def listing(counts: "Counter[str]", kind: str, limit: int = 40) -> str:
    """Say how many words were counted, how often in all, and which are the commonest.

    At most `limit` words are named, each with its count. `kind` is "idioms" or "moves"; it chooses
    the sentence, and if no word was counted the sentence that says so.
    """
    templates = messages("advice")
    if not counts:
        return str(templates[f"no {kind}"])
    commonest = visible("、".join(f"{word} {n}" for word, n in counts.most_common(limit)))
    figures = {"words": len(counts), "times": counts.total(), "most": commonest}
    return str(templates[kind].format(**figures))


def files_table(mixture: Mixture) -> pd.DataFrame:
    """List the files, a row each; `note` says what is odd, and why a file was left out.

    `characters` are counted before cleaning; `removed` are those that cleaning took out. `chapters`
    is empty for general text, for novels without headings and for files that gave no text.
    `repeated paragraphs` is the number of paragraphs of the file's book that were left out, because
    they stand elsewhere too.
    """
    prepared, templates = mixture.preparation, messages("notes")
    files = pd.DataFrame(prepared["files"])
    is_novel = files["source"] == "wuxia"
    copies = {copy["book"]: templates["copy"].format(**copy) for copy in prepared["same_books"]}
    # A general file may have the name of a novel, but is never left out as its copy.
    copy_notes = files["book"].where(is_novel).map(lambda book: copies.get(book, ""))
    broken_notes = files["broken"].map(lambda n: templates["broken"].format(count=n) if n else "")
    # For each file: why it is left out, a list of notes on its chapters, and the two notes made
    # above. Each of these may be empty.
    parts = zip(files["refused"], files["notes"], broken_notes, copy_notes, strict=True)
    notes = [map(translated, filter(None, [why, *odd, *rest])) for why, odd, *rest in parts]
    has_headings = ~files["notes"].str.join("\n").str.contains(NO_HEADINGS)
    has_chapters = is_novel & (files["documents"] > 0) & has_headings
    chapters = files["documents"].astype("Int64").where(has_chapters)
    removed = [sum(rule["removed"] for rule in rules.values()) for rules in files["cleaning"]]
    repeats = files["book"].map(prepared["repeated_paragraphs"]["books"]).fillna(0).astype(int)
    listed = files[["path", "source", "encoding", "characters"]]
    listed = listed.assign(chapters=chapters, removed=removed)
    return listed.assign(**{"repeated paragraphs": repeats, "note": list(map("; ".join, notes))})


def cleaning_table(mixture: Mixture) -> pd.DataFrame:
    """List the rules of cleaning that changed any file, the one that removed most characters first.

    A row has the name of the `rule`, what it `does`, in how many `files` and `places` it changed
    the text, and how many characters it `removed` and `inserted`.
    """
    rows = [
        {"rule": name, "does": messages("rules")[name], "files": 1, **tally}
        for file in mixture.preparation["files"]
        for name, tally in file["cleaning"].items()
    ]
    edits = pd.DataFrame(rows, columns=["rule", "does", "files", "count", "removed", "inserted"])
    sums = edits.groupby(["rule", "does"], as_index=False).sum().rename(columns={"count": "places"})
    return sums.sort_values("removed", ascending=False, ignore_index=True)


def cleaning_examples(mixture: Mixture, count: int = 2) -> pd.DataFrame:
    """List places that the rules of cleaning changed, a row each: at most `count` of each rule.

    A row has the `rule`, the path of the `file`, and the place with its surroundings `before` and
    `after` this rule was applied, as `_example_text` writes them. The rules come in the order in
    which they are applied; the places of a rule come in the order of the files.
    """
    rows = [
        (rule, file["path"], _example_text(before), _example_text(after))
        for rule in RULES
        for file in mixture.preparation["files"]
        if rule in file["cleaning"]
        for before, after in file["cleaning"][rule]["examples"]
    ]
    examples = pd.DataFrame(rows, columns=["rule", "file", "before", "after"])
    return examples.groupby("rule").head(count).reset_index(drop=True)


def _example_text(text: str) -> str:
    """Cut a text off after 60 characters, and show its white space by signs: `剑 光` as `剑␣光`."""
    beginning = text if len(text) <= EXAMPLE_LENGTH else text[:EXAMPLE_LENGTH] + "…"
    return visible(beginning.translate(BLANKS))


def window_table(mixture: Mixture, tokenizer: "PreTrainedTokenizerBase", key: int) -> pd.DataFrame:
    """List the texts of which the window with the number `key` has a part, a row each.

    A row has the text's `book` and `chapter`, the number of its `tokens` in the window, and these
    tokens decoded as `text`.
    """
    chunks = mixture.windows[mixture.windows["window"] == key]
    parts = [mixture.tokens[chunk.start : chunk.end] for chunk in chunks.itertuples()]
    texts = [tokenizer.decode(tokens, skip_special_tokens=True) for tokens in parts]
    documents = mixture.outline.loc[chunks["document"], ["book", "chapter"]]
    return documents.assign(tokens=list(map(len, parts)), text=texts).reset_index(drop=True)


def read_metrics(output_dir: str | Path) -> pd.DataFrame:
    """Read a run's `metrics.jsonl` into a table: a row has logged figures, passages or an event.

    `event` is None in a row that has none. If a run was resumed and did some steps again, the table
    has of these steps only the rows of the last time. Raises `DataError` if there is no such file.
    """
    if not (Path(output_dir) / METRICS).is_file():
        remedy = "name a run's folder as output_dir, or make one: python launch_ddp.py"
        raise DataError(f"{output_dir}: no {METRICS} in it; {remedy}")
    return pd.DataFrame([{"event": None, **row} for row in read_rows(Path(output_dir))])


def passages_table(metrics: pd.DataFrame) -> pd.DataFrame:
    """Show the passages written in training: a row for each measurement, a column for each prompt.

    The first column is the `step` of the measurement. The table is empty if `metrics`, the table of
    `read_metrics`, has no passages.
    """
    measurements = metrics.reindex(columns=["step", "passages"]).dropna()
    rows = [
        {"step": step} | {passage["prompt"]: passage["text"] for passage in passages}
        for step, passages in measurements.itertuples(index=False)
    ]
    return pd.DataFrame(rows)


def scorecard_table(scorecard: dict[str, Any]) -> pd.DataFrame:
    """Put a scorecard's metrics in a table, a row each.

    `reason` says why figures or a verdict are missing; it is "" if none are.
    """
    columns = ["source", "name", "unit", "base", "tuned", "delta", "low", "high", "n"]
    columns += ["few_shot", "human", "reason"]
    return pd.DataFrame(scorecard["metrics"]).reindex(columns=columns).fillna({"reason": ""})


def side_by_side(scorecard: dict[str, Any], count: int = 6) -> pd.DataFrame:
    """Put what base, tuned model and book have behind a prompt side by side, a row a prompt.

    At most `count` prompts are taken, evenly spread from the first to the last. Each text is put
    into one line and cut to 200 characters.
    """
    rows = pd.DataFrame(scorecard["passages"], columns=["prompt", "base", "tuned", "human"])
    places = np.unique(np.linspace(0, len(rows) - 1, count).astype(int))
    return rows.iloc[places].map(lambda text: visible(" ".join(text.split())[:200]))


def copied_table(scorecard: dict[str, Any]) -> pd.DataFrame:
    """List the longest runs of characters that tuned passages share with training text, a row each.

    `generated` shows the run, in 【】, in the passage, and `source` shows it in the training text.
    In the column `flagged`, ✓ marks a run that is so long that it counts as copied.
    """
    columns = ["length", "flagged", "generated", "source", "title"]
    rows = pd.DataFrame(scorecard["copied"], columns=columns)
    return rows.assign(flagged=rows["flagged"].map({True: "✓", False: ""}))
