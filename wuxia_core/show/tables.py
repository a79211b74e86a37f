"""Tables of what became of the files, and windows with the borders of their texts."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import pandas as pd

from wuxia_core.corpus import RULES
from wuxia_core.mixing import Mixture
from wuxia_core.text import NO_MATH, escape, visible

if TYPE_CHECKING:
    from pandas.io.formats.style import Styler
    from transformers import PreTrainedTokenizerBase


BLANKS = str.maketrans(
    {"\r": "\\r", "\n": "↵", "\t": "\\t", " ": "␣", "　": "␣␣", "\xa0": "⟨U+00A0⟩"}
)
LONG = 60  # characters of an example
BORDER = "border-left:3px solid rgb(213,94,0);padding-left:.3em;margin-left:.2em"
LABEL = "background:rgba(213,94,0,.25);font-size:12px;padding:0 .3em;margin-right:.3em"


def table(rows: pd.DataFrame) -> "Styler":
    """Show a table: text to the left and escaped, figures with separators, no index."""
    left = {"text-align": "left"}
    rows = rows.rename(columns=escape)
    words = list(rows.select_dtypes(exclude="number").columns)
    rows = rows.assign(**{name: rows[name].map(str).map(escape) for name in words})
    styler = rows.style.hide().format(thousands=",", precision=2)
    styler.set_table_attributes(f'class="{NO_MATH}"')
    heads = {name: [{"selector": "th", "props": list(left.items())}] for name in words}
    long = [name for name in words if rows[name].str.len().max() > LONG / 2]
    styler = styler.set_properties(subset=long, **{"min-width": "12em"})
    return styler.set_properties(subset=words, **left).set_table_styles(heads, overwrite=False)


def files_table(mixture: Mixture) -> pd.DataFrame:
    """List the files: a row each, in characters; `note` says what was left out and why."""
    prepared = mixture.preparation
    same = {found["book"]: found for found in prepared["same_books"]}
    repeats = prepared["repeated_paragraphs"]["books"]
    rows = []
    for file in prepared["files"]:
        copy = same.get(file["book"]) if file["source"] == "wuxia" else None
        note = f"{copy['share']:.0%} of it is in {copy['kept']}: left out" if copy else ""
        rows.append(
            {
                **{key: file[key] for key in ("path", "source", "encoding", "characters")},
                "chapters": file["documents"],
                "removed": sum(rule["removed"] for rule in file["cleaning"].values()),
                "repeated paragraphs": repeats.get(file["book"], 0),
                "note": file["refused"] or note,
            }
        )
    return pd.DataFrame(rows)


def cleaning_table(mixture: Mixture) -> pd.DataFrame:
    """Say what each rule does and did, in all files: places, characters removed and inserted."""
    rows = [
        {"rule": name, "does": (RULES[name].__doc__ or "").strip(), "file": file["path"], **tally}
        for file in mixture.preparation["files"]
        for name, tally in file["cleaning"].items()
    ]
    columns = ["rule", "does", "file", "count", "removed", "inserted"]
    groups = pd.DataFrame(rows, columns=columns).groupby(["rule", "does"], sort=False)
    sums = groups.agg(
        files=("file", "nunique"),
        places=("count", "sum"),
        removed=("removed", "sum"),
        inserted=("inserted", "sum"),
    )
    return sums.reset_index().sort_values("removed", ascending=False, ignore_index=True)


def cleaning_examples(mixture: Mixture, each: int = 2) -> pd.DataFrame:
    """Show places before and after cleaning, some of each rule; blanks are made visible."""
    shown: dict[str, list[tuple[str, str, str, str]]] = {}
    for file in mixture.preparation["files"]:
        for name, tally in file["cleaning"].items():
            examples = [[_with_blanks(text) for text in e] for e in tally["examples"][:each]]
            shown.setdefault(name, []).extend((name, file["path"], *e) for e in examples)
    rows = [row for name in RULES for row in shown.get(name, [])[:each]]
    return pd.DataFrame(rows, columns=["rule", "file", "before", "after"])


def _with_blanks(text: str) -> str:
    shown = text if len(text) <= LONG else text[:LONG] + "…"
    return visible(shown.translate(BLANKS))


@dataclass(frozen=True)
class WindowView:
    """A window with the borders of the texts in it: shows itself in notebooks and terminals."""

    pieces: tuple[tuple[str, str], ...]  # what it is from, and the text

    def __str__(self) -> str:
        """Put in front of each text what it is from."""
        return "\n".join(visible(f"【{label}】{text}") for label, text in self.pieces)

    def _repr_html_(self) -> str:
        body = "".join(
            f'<div style="{BORDER}"><span style="{LABEL}">{escape(label)}</span>'
            f"{escape(text)}</div>"
            for label, text in self.pieces
        )
        return (
            f'<div class="{NO_MATH}" lang="zh-Hans"'
            ' style="white-space:pre-wrap;line-height:1.8;font-size:15px">'
            f"{body}</div>"
        )


def show_window(mixture: Mixture, tokenizer: "PreTrainedTokenizerBase", window: int) -> WindowView:
    """Show a window by its number in `mixture.windows`, text by text."""
    pieces = mixture.windows[mixture.windows["window"] == window]
    shown = []
    for row in pieces.itertuples():
        about = mixture.outline.loc[row.document]
        label = f"{about['book']} · {about['chapter']}, {row.end - row.start} tokens"
        tokens = mixture.tokens[row.start : row.end]
        shown.append((label, tokenizer.decode(tokens, skip_special_tokens=True)))
    return WindowView(tuple(shown))
