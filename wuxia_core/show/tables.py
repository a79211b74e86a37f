"""Tables of the files, the cleaning, the windows, a run's metrics and its scorecard; advice."""

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


BLANKS = str.maketrans({"\r": "\\r", "\n": "↵", "\t": "\\t", " ": "␣", "　": "␣␣", "\xa0": "⍽"})
LONG = 60  # characters of an example
NAMES = ["", "source", "split", "name", "unit"]  # whose values are in the reader's language too
FEW_STEPS = 100
GARBLED = re.compile("[^\n]{0,8}(?:\ufffd|锟斤拷|烫烫烫|屯屯屯)[^\n]{0,8}")


def named(name: str) -> str:
    """Name a column, a source, a split or a figure in the reader's language; all else stays."""
    return str(messages("columns").get(name, name))


def table(rows: pd.DataFrame) -> "Styler":
    """Show a table: text to the left and escaped, figures with separators, no index.

    Heads are in the reader's language. One without rows is a sentence that says so.
    """
    if rows.empty:
        caption = [{"selector": "caption", "props": "white-space: nowrap"}]
        empty = pd.DataFrame().style.hide().set_table_styles(caption)
        return empty.set_caption(messages("columns")["no rows"])
    rows = rows.assign(**{name: rows[name].map(named) for name in NAMES if name in rows})
    rows = rows.rename(columns=lambda name: escape(named(name)))
    words = list(rows.select_dtypes(exclude="number").columns)
    rows = rows.assign(**{name: rows[name].map(str).map(escape) for name in words})
    long = [name for name in words if rows[name].str.len().max() > LONG / 2]
    heads = {name: [{"selector": "th", "props": "text-align: left"}] for name in words}
    return (
        rows.style.hide()
        .format(thousands=",", precision=2, na_rep="")
        .set_table_attributes(f'class="{NO_MATH}"')
        .set_properties(subset=long, **{"min-width": "12em", "white-space": "pre-wrap"})
        .set_properties(subset=words, **{"text-align": "left"})
        .set_table_styles(heads, overwrite=False)
    )


def advice(mixture: Mixture, config: Config) -> list[str]:
    """Say in sentences what to mend before a run of these texts; one says that all looks well."""
    found = [
        *_traditional(mixture),
        *_garbled(mixture),
        *_general(mixture),
        *_steps(mixture, config),
    ]
    return found or [messages("advice")["well"]]


def _traditional(mixture: Mixture) -> Iterator[str]:
    """Find the books that are in traditional characters where others are not."""
    used = mixture.documents.query("source == 'wuxia' and split in ('train', 'validation')")
    novels = used.groupby("book")["text"].first()
    books = novels.index[novels.map(lambda text: to_simplified(text[:2000]) != text[:2000])]
    if 0 < len(books) < len(novels):
        yield messages("advice")["traditional"].format(books=_some(books))


def _garbled(mixture: Mixture) -> Iterator[str]:
    """Find paragraphs that cannot have been written so."""
    rows = mixture.documents[["book", "text"]].itertuples(index=False)
    found = [(book, match[0]) for book, text in rows for match in GARBLED.finditer(text)]
    if found:
        places = _some(f"{book}：{excerpt}" for book, excerpt in found)
        yield messages("advice")["garbled"].format(count=len(found), places=places)


def _general(mixture: Mixture) -> Iterator[str]:
    epochs, outline = mixture.preparation["general_epochs"], mixture.outline
    if not epochs:
        yield messages("advice")["no general"]
    elif epochs > 1:
        there = outline.loc[outline["source"] == "general", "characters"].sum()
        more = math.ceil(there * (epochs - 1) / 1000) * 1000
        yield messages("advice")["general"].format(epochs=epochs, more=more)


def _steps(mixture: Mixture, config: Config) -> Iterator[str]:
    cost = costs(mixture, config)
    if cost["steps"] < FEW_STEPS:
        few = {"steps": cost["steps"], "epoch": cost["steps an epoch"]}
        yield messages("advice")["steps"].format(**few)


def _some(texts: Iterable[str], most: int = 3) -> str:
    """Name some of the texts, in brackets, and say how many more there are."""
    texts = [f"「{visible(text)}」" for text in texts]
    more = f" … (+{len(texts) - most})" if len(texts) > most else ""
    return "".join(texts[:most]) + more


def costs(mixture: Mixture, config: Config, processes: int = 2) -> dict[str, float]:
    """Count the windows, steps and tokens of a run; `filled` is the share of places with a token.

    `masked tokens` are those of an epoch, which are predicted.
    """
    windows, tokens = len(train_windows(mixture)), int(mixture.report["tokens"].sum())
    steps = -(-windows // effective_batch(config, processes))
    return {
        "windows": windows,
        "filled": tokens / windows / config.data.max_length,
        "steps an epoch": steps,
        "steps": int(run_steps(config, windows, processes)),
        "tokens": round(tokens * config.training.num_train_epochs),
        "masked tokens": round(tokens * config.masking.mask_ratio),
    }


def progress(folder: Path, metrics: pd.DataFrame) -> str:
    """Say how many steps a run has done, of how many, and how long the others will take."""
    said, done = messages("advice"), metrics[metrics.reindex(columns=["epoch"])["epoch"] > 0]
    if done.empty:
        return str(said["not begun"])
    last = done.iloc[-1]
    config = load_config(folder / "config.yaml")
    windows = round(last["step"] / last["epoch"]) * effective_batch(config, 1)
    steps = int(run_steps(config, windows, 1))
    start = metrics[metrics["event"].isin(["started", "resumed"])].iloc[-1]
    seconds = (last["time"] - start["time"]) / max(1, last["step"] - start["step"])
    ended = (folder / ADAPTER_WEIGHTS).exists()
    facts = {"done": int(last["step"]), "steps": steps, "seconds": seconds}
    facts |= {"minutes": seconds * (steps - last["step"]) / 60}
    return str(said["finished" if ended else "under way"].format(**facts))


def listing(counts: "Counter[str]", what: str, most: int = 40) -> str:
    """Say how many different words were counted and which are the commonest; `what` names them."""
    said, shown = messages("advice"), (f"{word} {n}" for word, n in counts.most_common(most))
    if not counts:
        return str(said[f"no {what}"])
    figures = {"words": len(counts), "times": counts.total(), "most": visible("、".join(shown))}
    return str(said[what].format(**figures))


def files_table(mixture: Mixture) -> pd.DataFrame:
    """List the files: a row each, in characters; `note` says what is odd, and what was left out.

    Only what has headings has `chapters`; of other files there is none.
    """
    prepared = mixture.preparation
    files = pd.DataFrame(prepared["files"])
    copies = {
        copy["book"]: messages("notes")["copy"].format(**copy) for copy in prepared["same_books"]
    }
    copied = files["book"].where(files["source"] == "wuxia").map(lambda book: copies.get(book, ""))
    repeats = files["book"].map(prepared["repeated_paragraphs"]["books"]).fillna(0).astype(int)
    removed = [sum(rule["removed"] for rule in rules.values()) for rules in files["cleaning"]]
    said = messages("notes")["broken"]
    broken = files["broken"].map(lambda n: said.format(count=n) if n else "")
    rows = zip(files["refused"], files["notes"], broken, copied, strict=True)
    notes = pd.Series(["; ".join(filter(None, [why, *odd, *more])) for why, odd, *more in rows])
    table = files[["path", "source", "encoding", "characters"]]
    found = ~notes.str.contains("no headings found") & (files["documents"] > 0)
    chapters = files["documents"].astype("Int64").where(found & (files["source"] == "wuxia"))
    table = table.assign(chapters=chapters, removed=removed)
    return table.assign(**{"repeated paragraphs": repeats, "note": notes})


def cleaning_table(mixture: Mixture) -> pd.DataFrame:
    """Say what each rule does and did, in all files: places, characters removed and inserted."""
    rows = [
        {"rule": name, "does": messages("rules")[name], **tally}
        for file in mixture.preparation["files"]
        for name, tally in file["cleaning"].items()
    ]
    columns = ["rule", "does", "files", "count", "removed", "inserted"]
    table = pd.DataFrame(rows, columns=columns).assign(files=1)
    table = table.groupby(["rule", "does"], as_index=False).sum()
    table = table.rename(columns={"count": "places"})
    return table.sort_values("removed", ascending=False, ignore_index=True)


def cleaning_examples(mixture: Mixture, each: int = 2) -> pd.DataFrame:
    """Show places before and after cleaning, some of each rule; blanks are made visible."""
    rows = [
        (name, file["path"], *map(_with_blanks, example))
        for name in RULES
        for file in mixture.preparation["files"]
        for example in file["cleaning"].get(name, {"examples": []})["examples"]
    ]
    table = pd.DataFrame(rows, columns=["rule", "file", "before", "after"])
    return table.groupby("rule").head(each).reset_index(drop=True)


def _with_blanks(text: str) -> str:
    shown = text if len(text) <= LONG else text[:LONG] + "…"
    return visible(shown.translate(BLANKS))


def window_table(mixture: Mixture, tokenizer: "PreTrainedTokenizerBase", key: int) -> pd.DataFrame:
    """Show a window by its number in `mixture.windows`: a row a text in it."""
    chunks = mixture.windows[mixture.windows["window"] == key]
    parts = [mixture.tokens[chunk.start : chunk.end] for chunk in chunks.itertuples()]
    texts = [tokenizer.decode(tokens, skip_special_tokens=True) for tokens in parts]
    documents = mixture.outline.loc[chunks["document"], ["book", "chapter"]]
    return documents.assign(tokens=list(map(len, parts)), text=texts).reset_index(drop=True)


def read_metrics(output_dir: str | Path) -> pd.DataFrame:
    """Read a run's `metrics.jsonl`, a row a logged step, without steps that were done again.

    Raises `DataError` where there is none.
    """
    if not (Path(output_dir) / METRICS).is_file():
        remedy = "name a run's folder as output_dir, or make one: python launch_ddp.py"
        raise DataError(f"{output_dir}: no {METRICS} in it; {remedy}")
    return pd.DataFrame([{"event": None, **row} for row in read_rows(Path(output_dir))])


def passages_table(metrics: pd.DataFrame) -> pd.DataFrame:
    """Show the passages that were written at each measurement: a row each, a column a prompt."""
    written = metrics.reindex(columns=["step", "passages"]).dropna()
    rows = [
        {"step": step} | {passage["prompt"]: passage["text"] for passage in passages}
        for step, passages in written.itertuples(index=False)
    ]
    return pd.DataFrame(rows)


def scorecard_table(scorecard: dict[str, Any]) -> pd.DataFrame:
    """Put a scorecard's metrics in a table; `reason` says why figures or a verdict are missing."""
    columns = ["source", "name", "unit", "base", "tuned", "delta", "low", "high", "n"]
    columns += ["few_shot", "human", "reason"]
    return pd.DataFrame(scorecard["metrics"]).reindex(columns=columns).fillna({"reason": ""})


def side_by_side(scorecard: dict[str, Any], count: int = 6) -> pd.DataFrame:
    """Put some passages of base and tuned beside each other, and the book's own text."""
    rows = pd.DataFrame(scorecard["passages"], columns=["prompt", "base", "tuned", "human"])
    chosen = rows.iloc[np.unique(np.linspace(0, len(rows) - 1, count).astype(int))]
    return chosen.map(lambda text: visible(" ".join(text.split())[:200]))


def copied_table(scorecard: dict[str, Any]) -> pd.DataFrame:
    """Put the longest runs that the tuned model shares with training text beside their source."""
    columns = ["length", "flagged", "generated", "source", "title"]
    rows = pd.DataFrame(scorecard["copied"], columns=columns)
    return rows.assign(flagged=rows["flagged"].map({True: "✓", False: ""}))
