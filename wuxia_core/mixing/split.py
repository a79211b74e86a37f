"""Which text goes where: the split by book, the windows, and the share of general text."""

import numpy as np
import pandas as pd

from wuxia_core import corpus
from wuxia_core.config import Config
from wuxia_core.mixing.store import TRAIN, UNUSED, VALIDATION, draw


def split_documents(documents: list[corpus.Document], val_ratio: float, seed: int) -> pd.DataFrame:
    """Add the split: novels by whole books, or by chapters where there is one.

    Of general text the end of each file is held out, so that neighbouring passages stay together.
    """
    table = pd.DataFrame(documents)
    novels = table[table["source"] == "wuxia"]
    unit = novels["book"] + ("\n" + novels["chapter"] if novels["book"].nunique() == 1 else "")
    lengths = novels["text"].str.len().groupby(unit).sum()
    held_out = unit.index[unit.isin(_held_out(lengths.to_dict(), val_ratio, seed))].tolist()
    for _, rows in table[table["source"] == "general"].groupby("book"):
        held_out += _tail(rows["text"].str.len(), val_ratio)
    table["split"] = TRAIN
    table.loc[held_out, "split"] = VALIDATION
    return table[["source", "book", "chapter", "split", "text"]]


def _tail(lengths: pd.Series, val_ratio: float) -> list[int]:
    """Choose the last texts, about `val_ratio` of the characters; one at least, never all."""
    from_end = lengths[::-1].cumsum()[: len(lengths) - 1]
    if not val_ratio or from_end.empty:
        return []
    last = int((from_end - val_ratio * lengths.sum()).abs().to_numpy().argmin())
    return [int(number) for number in from_end.index[: last + 1]]


def _held_out(lengths: dict[str, int], val_ratio: float, seed: int) -> set[str]:
    """Choose units of up to `val_ratio` of all characters; the shortest one if none is so short.

    `{"a": 50, "b": 9, "c": 41}` at 0.1 gives `{"b"}`. A single unit is never held out.
    """
    budget = val_ratio * sum(lengths.values())
    chosen: set[str] = set()
    for unit in sorted(lengths, key=lambda unit: draw(seed, "split", unit)):
        if lengths[unit] <= budget:
            chosen.add(unit)
            budget -= lengths[unit]
    if not chosen and val_ratio and len(lengths) > 1:
        chosen = {min(lengths, key=lambda unit: (lengths[unit], unit))}
    return chosen


def cut_windows(documents: pd.DataFrame, lengths: list[int], config: Config) -> pd.DataFrame:
    """Cut each document into windows; the tail is kept, and nothing overlaps without a stride."""
    step = config.data.stride or config.data.max_length
    rows = []
    offset = 0
    for document, length in enumerate(lengths):
        short = length - 1 < config.data.min_length
        starts = [] if short else range(0, max(1, length - config.data.max_length + step), step)
        for start in starts:
            end = min(start + config.data.max_length, length)
            rows.append((document, offset + start, offset + end))
        offset += length
    windows = pd.DataFrame(rows, columns=["document", "start", "end"])
    about = documents[["source", "split"]].to_numpy()[windows["document"]]
    return windows.assign(source=about[:, 0], split=about[:, 1])


def choose_general(
    windows: pd.DataFrame, documents: pd.DataFrame, config: Config
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Keep general training windows up to `general_ratio` of the tokens; the rest is unused.

    Whole documents in keyed order, cut at the window whose end is nearest the ratio.
    """
    train = windows[windows["split"] == TRAIN]
    lengths = train["end"] - train["start"]
    ratio = config.data.general_ratio
    wanted = ratio / (1 - ratio) * lengths[train["source"] == "wuxia"].sum()
    general = train[train["source"] == "general"]
    order = sorted(
        general.index,
        key=lambda row: (draw(config.training.seed, general.at[row, "document"]), row),
    )
    reached = np.concatenate([[0], np.cumsum(lengths[order])])
    unused = order[int(np.abs(reached - wanted).argmin()) :]
    windows = windows.drop(index=unused).reset_index(drop=True)
    left_out = set(general["document"]) - set(windows["document"])
    documents = documents.copy()
    documents.loc[sorted(left_out), "split"] = UNUSED
    return windows, documents
