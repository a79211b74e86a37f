"""Tables of the files, the cleaning, the windows, a run's metrics and its scorecard."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from wuxia_core.corpus import RULES
from wuxia_core.errors import DataError
from wuxia_core.mixing import Mixture
from wuxia_core.run import METRICS, read_rows
from wuxia_core.text import NO_MATH, escape, visible

if TYPE_CHECKING:
    from pandas.io.formats.style import Styler
    from transformers import PreTrainedTokenizerBase


BLANKS = str.maketrans({"\r": "\\r", "\n": "↵", "\t": "\\t", " ": "␣", "　": "␣␣", "\xa0": "⍽"})
LONG = 60  # characters of an example


def table(rows: pd.DataFrame) -> "Styler":
    """Show a table: text to the left and escaped, figures with separators, no index."""
    rows = rows.rename(columns=escape)
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


def files_table(mixture: Mixture) -> pd.DataFrame:
    """List the files: a row each, in characters; `note` says what is odd, and what was left out.

    Only what has headings has `chapters`; of other files there is none.
    """
    prepared = mixture.preparation
    files = pd.DataFrame(prepared["files"])
    copies = {
        copy["book"]: f"{copy['share']:.0%} of it is in {copy['kept']}: left out"
        for copy in prepared["same_books"]
    }
    copied = files["book"].where(files["source"] == "wuxia").map(lambda book: copies.get(book, ""))
    repeats = files["book"].map(prepared["repeated_paragraphs"]["books"]).fillna(0).astype(int)
    removed = [sum(rule["removed"] for rule in rules.values()) for rules in files["cleaning"]]
    broken = files["broken"].map(lambda n: f"undecodable characters (�): {n:,}" if n else "")
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
        {"rule": name, "does": " ".join((RULES[name].__doc__ or "").split()), **tally}
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
        raise DataError(f"{output_dir}: no {METRICS} in it; is it a run's training.output_dir?")
    return pd.DataFrame([{"event": None, **row} for row in read_rows(Path(output_dir))])


def scorecard_table(card: dict[str, Any]) -> pd.DataFrame:
    """Put a scorecard's metrics in a table; `reason` says why figures or a verdict are missing."""
    columns = ["source", "name", "unit", "base", "tuned", "delta", "low", "high", "n"]
    columns += ["few_shot", "human", "reason"]
    return pd.DataFrame(card["metrics"]).reindex(columns=columns).fillna({"reason": ""})


def side_by_side(card: dict[str, Any], count: int = 6) -> pd.DataFrame:
    """Put some passages of base and tuned beside each other, and the book's own text."""
    rows = pd.DataFrame(card["passages"], columns=["prompt", "base", "tuned", "human"])
    chosen = rows.iloc[np.unique(np.linspace(0, len(rows) - 1, count).astype(int))]
    return chosen.map(lambda text: visible(" ".join(text.split())[:200]))


def copied_table(card: dict[str, Any]) -> pd.DataFrame:
    """Put the longest runs that the tuned model shares with training text beside their source."""
    columns = ["length", "flagged", "generated", "source", "title"]
    return pd.DataFrame(card["copied"], columns=columns)
