"""Tables of files, cleaning, windows, metrics and scorecards; advice and progress in sentences."""

import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from wuxia_core.config import Config, effective_batch, load_config
from wuxia_core.corpus import RULES, to_simplified
from wuxia_core.errors import DataError
from wuxia_core.messages import messages
from wuxia_core.mixing import Mixture, run_steps, train_windows
from wuxia_core.model import ADAPTER_WEIGHTS
from wuxia_core.run import METRICS, read_rows
from wuxia_core.text import NO_MATH, escape, visible

if TYPE_CHECKING:
    from pandas.io.formats.style import Styler
    from transformers import PreTrainedTokenizerBase


# How white space is shown in an example of cleaning.
BLANKS = str.maketrans({"\r": "\\r", "\n": "↵", "\t": "\\t", " ": "␣", "　": "␣␣", "\xa0": "⍽"})
LONG = 60  # characters of an example
NAMES = ["", "source", "split", "name", "unit"]  # columns whose values `named` translates too
FEW_STEPS = 100  # with fewer, `advice` warns
# Replacement characters, and what they become when bytes are read as GBK; with their neighbours.
GARBLED = re.compile("[^\n]{0,8}(?:\ufffd|锟斤拷|烫烫烫|屯屯屯)[^\n]{0,8}")


def named(name: str) -> str:
    """Translate the name of a column, source, split or figure; a name without translation stays."""
    return str(messages("columns").get(name, name))


def table(rows: pd.DataFrame) -> "Styler":
    """Style a table for a notebook: no index, text escaped and left-aligned, thousands separated.

    Heads are in the reader's language. For a table without rows a sentence says so.
    """
    if rows.empty:
        caption = [{"selector": "caption", "props": "white-space: nowrap"}]
        empty = pd.DataFrame().style.hide().set_table_styles(caption)
        return empty.set_caption(messages("columns")["no rows"])
    rows = rows.assign(**{name: rows[name].map(named) for name in NAMES if name in rows})
    rows = rows.rename(columns=lambda name: escape(named(name)))
    text_columns = list(rows.select_dtypes(exclude="number").columns)
    rows = rows.assign(**{name: rows[name].map(str).map(escape) for name in text_columns})
    long_columns = [name for name in text_columns if rows[name].str.len().max() > LONG / 2]
    heads = {name: [{"selector": "th", "props": "text-align: left"}] for name in text_columns}
    return (
        rows.style.hide()
        .format(thousands=",", precision=2, na_rep="")
        .set_table_attributes(f'class="{NO_MATH}"')
        .set_properties(subset=long_columns, **{"min-width": "12em", "white-space": "pre-wrap"})
        .set_properties(subset=text_columns, **{"text-align": "left"})
        .set_table_styles(heads, overwrite=False)
    )


def advice(mixture: Mixture, config: Config) -> list[str]:
    """Say in sentences what to mend before a run of these texts, or in one that all looks well."""
    sentences = [
        *_advise_simplified(mixture),
        *_advise_garbled(mixture),
        *_advise_general(mixture),
        *_advise_steps(mixture, config),
    ]
    return sentences or [messages("advice")["well"]]


def _advise_simplified(mixture: Mixture) -> Iterator[str]:
    """Name the books that are in traditional characters, where only some are."""
    used = mixture.documents.query("source == 'wuxia' and split in ('train', 'validation')")
    novels = used.groupby("book")["text"].first()
    books = novels.index[novels.map(lambda text: to_simplified(text[:2000]) != text[:2000])]
    if 0 < len(books) < len(novels):
        yield messages("advice")["traditional"].format(books=_quote_three(books))


def _advise_garbled(mixture: Mixture) -> Iterator[str]:
    """Quote the first garbled places, such as 锟斤拷, each with its book."""
    rows = mixture.documents[["book", "text"]].itertuples(index=False)
    places = [f"{book}：{match[0]}" for book, text in rows for match in GARBLED.finditer(text)]
    if places:
        yield messages("advice")["garbled"].format(count=len(places), places=_quote_three(places))


def _advise_general(mixture: Mixture) -> Iterator[str]:
    """Ask for general text where there is none, or where an epoch of novels reads it repeatedly."""
    epochs, outline = mixture.preparation["general_epochs"], mixture.outline
    if not epochs:
        yield messages("advice")["no general"]
    elif epochs > 1:
        characters = outline.loc[outline["source"] == "general", "characters"].sum()
        missing = math.ceil(characters * (epochs - 1) / 1000) * 1000  # rounded up to thousands
        yield messages("advice")["general"].format(epochs=epochs, more=missing)


def _advise_steps(mixture: Mixture, config: Config) -> Iterator[str]:
    """Warn of a run with too few steps to learn from."""
    cost = costs(mixture, config)
    if cost["steps"] < FEW_STEPS:
        yield messages("advice")["steps"].format(steps=cost["steps"], epoch=cost["steps an epoch"])


def _quote_three(texts: Iterable[str]) -> str:
    """Quote three of the texts and count the others: five give `「甲」「乙」「丙」 … (+2)`."""
    quoted = [f"「{visible(text)}」" for text in texts]
    more = f" … (+{len(quoted) - 3})" if len(quoted) > 3 else ""
    return "".join(quoted[:3]) + more


def costs(mixture: Mixture, config: Config, processes: int = 2) -> dict[str, float]:
    """Count the windows, steps and tokens of a run with so many processes.

    `filled` is the share of the windows' places that have a token, `tokens` counts all epochs,
    `masked tokens` those of one epoch, which are predicted.
    """
    windows, tokens = len(train_windows(mixture)), int(mixture.report["tokens"].sum())
    steps = math.ceil(windows / effective_batch(config, processes))
    return {
        "windows": windows,
        "filled": tokens / windows / config.data.max_length,
        "steps an epoch": steps,
        "steps": int(run_steps(config, windows, processes)),
        "tokens": round(tokens * config.training.num_train_epochs),
        "masked tokens": round(tokens * config.masking.mask_ratio),
    }


def progress(folder: Path, metrics: pd.DataFrame) -> str:
    """Say how many of its steps a run has done, and how many minutes the rest will take.

    `metrics` is the table of `read_metrics` for the run folder.
    """
    templates = messages("advice")
    trained = metrics[metrics.reindex(columns=["epoch"])["epoch"] > 0]
    if trained.empty:
        return str(templates["not begun"])
    last = trained.iloc[-1]
    config = load_config(folder / "config.yaml")
    # Steps of an epoch times the windows of a step, as if by one process: the total is the same.
    windows = round(last["step"] / last["epoch"]) * effective_batch(config, 1)
    steps = int(run_steps(config, windows, 1))
    start = metrics[metrics["event"].isin(["started", "resumed"])].iloc[-1]
    seconds = (last["time"] - start["time"]) / max(1, last["step"] - start["step"])
    ended = (folder / ADAPTER_WEIGHTS).exists()
    figures = {"done": int(last["step"]), "steps": steps, "seconds": seconds}
    figures |= {"minutes": seconds * (steps - last["step"]) / 60}
    return str(templates["finished" if ended else "under way"].format(**figures))


def listing(counts: "Counter[str]", kind: str, limit: int = 40) -> str:
    """Say how many different words were counted, and list the `limit` commonest with their counts.

    `kind` is "idioms" or "moves", a key of the messages.
    """
    templates = messages("advice")
    if not counts:
        return str(templates[f"no {kind}"])
    commonest = visible("、".join(f"{word} {n}" for word, n in counts.most_common(limit)))
    figures = {"words": len(counts), "times": counts.total(), "most": commonest}
    return str(templates[kind].format(**figures))


def files_table(mixture: Mixture) -> pd.DataFrame:
    """List the files, a row each; `note` says what is odd, and why a file was left out.

    `removed` counts the characters that cleaning took out, `repeated paragraphs` the paragraphs
    left out as duplicates. `chapters` is empty for general text and for novels without headings.
    """
    prepared = mixture.preparation
    files = pd.DataFrame(prepared["files"])
    copies = {
        copy["book"]: messages("notes")["copy"].format(**copy) for copy in prepared["same_books"]
    }
    copied = files["book"].where(files["source"] == "wuxia").map(lambda book: copies.get(book, ""))
    repeats = files["book"].map(prepared["repeated_paragraphs"]["books"]).fillna(0).astype(int)
    removed = [sum(rule["removed"] for rule in rules.values()) for rules in files["cleaning"]]
    template = messages("notes")["broken"]
    broken = files["broken"].map(lambda n: template.format(count=n) if n else "")
    rows = zip(files["refused"], files["notes"], broken, copied, strict=True)
    notes = pd.Series(["; ".join(filter(None, [first, *own, *rest])) for first, own, *rest in rows])
    table = files[["path", "source", "encoding", "characters"]]
    has_headings = ~notes.str.contains("no headings found") & (files["documents"] > 0)
    chapters = files["documents"].astype("Int64").where(has_headings & (files["source"] == "wuxia"))
    table = table.assign(chapters=chapters, removed=removed)
    return table.assign(**{"repeated paragraphs": repeats, "note": notes})


def cleaning_table(mixture: Mixture) -> pd.DataFrame:
    """List the rules of cleaning, the rule that removed most first: what each does, and did.

    `files` and `places` count where a rule changed the text, `removed` and `inserted` characters.
    """
    rows = [
        {"rule": name, "does": messages("rules")[name], **tally}
        for file in mixture.preparation["files"]
        for name, tally in file["cleaning"].items()
    ]
    columns = ["rule", "does", "files", "count", "removed", "inserted"]
    table = pd.DataFrame(rows, columns=columns).assign(files=1)
    sums = table.groupby(["rule", "does"], as_index=False).sum().rename(columns={"count": "places"})
    return sums.sort_values("removed", ascending=False, ignore_index=True)


def cleaning_examples(mixture: Mixture, count: int = 2) -> pd.DataFrame:
    """Show `count` places of each rule before and after cleaning; white space is made visible."""
    rows = [
        (name, file["path"], *map(_with_blanks, example))
        for name in RULES
        for file in mixture.preparation["files"]
        for example in file["cleaning"].get(name, {"examples": []})["examples"]
    ]
    table = pd.DataFrame(rows, columns=["rule", "file", "before", "after"])
    return table.groupby("rule").head(count).reset_index(drop=True)


def _with_blanks(text: str) -> str:
    """Cut a text to 60 characters, and write its white space as signs: `剑 光` becomes `剑␣光`."""
    start = text if len(text) <= LONG else text[:LONG] + "…"
    return visible(start.translate(BLANKS))


def window_table(mixture: Mixture, tokenizer: "PreTrainedTokenizerBase", key: int) -> pd.DataFrame:
    """Show the texts in one window, a row each; `key` is its number in `mixture.windows`."""
    chunks = mixture.windows[mixture.windows["window"] == key]
    parts = [mixture.tokens[chunk.start : chunk.end] for chunk in chunks.itertuples()]
    texts = [tokenizer.decode(tokens, skip_special_tokens=True) for tokens in parts]
    documents = mixture.outline.loc[chunks["document"], ["book", "chapter"]]
    return documents.assign(tokens=list(map(len, parts)), text=texts).reset_index(drop=True)


def read_metrics(output_dir: str | Path) -> pd.DataFrame:
    """Read a run's `metrics.jsonl`, a row a logged step or event.

    Of steps that were done again after a restart, only the last time counts. Raises `DataError`
    where the folder has no such file.
    """
    if not (Path(output_dir) / METRICS).is_file():
        remedy = "name a run's folder as output_dir, or make one: python launch_ddp.py"
        raise DataError(f"{output_dir}: no {METRICS} in it; {remedy}")
    return pd.DataFrame([{"event": None, **row} for row in read_rows(Path(output_dir))])


def passages_table(metrics: pd.DataFrame) -> pd.DataFrame:
    """Show the passages written in training: a row a measurement, a column a prompt."""
    measurements = metrics.reindex(columns=["step", "passages"]).dropna()
    rows = [
        {"step": step} | {passage["prompt"]: passage["text"] for passage in passages}
        for step, passages in measurements.itertuples(index=False)
    ]
    return pd.DataFrame(rows)


def scorecard_table(scorecard: dict[str, Any]) -> pd.DataFrame:
    """Put a scorecard's metrics in a table; `reason` says why figures or a verdict are missing."""
    columns = ["source", "name", "unit", "base", "tuned", "delta", "low", "high", "n"]
    columns += ["few_shot", "human", "reason"]
    return pd.DataFrame(scorecard["metrics"]).reindex(columns=columns).fillna({"reason": ""})


def side_by_side(scorecard: dict[str, Any], count: int = 6) -> pd.DataFrame:
    """Put passages of base, tuned and the book side by side, of `count` evenly spread prompts."""
    rows = pd.DataFrame(scorecard["passages"], columns=["prompt", "base", "tuned", "human"])
    places = np.unique(np.linspace(0, len(rows) - 1, count).astype(int))
    return rows.iloc[places].map(lambda text: visible(" ".join(text.split())[:200]))


def copied_table(scorecard: dict[str, Any]) -> pd.DataFrame:
    """List the longest runs that tuned passages share with training text, beside their source."""
    columns = ["length", "flagged", "generated", "source", "title"]
    rows = pd.DataFrame(scorecard["copied"], columns=columns)
    return rows.assign(flagged=rows["flagged"].map({True: "✓", False: ""}))
