"""Which text is held out: novels by whole books, general text by the end of each file."""

import pandas as pd

from wuxia_core.mixing.store import DUPLICATE, TRAIN, VALIDATION, draw

FEW = 4  # passages


def split(documents: pd.DataFrame, left_out: pd.Series, val_ratio: float, seed: int) -> pd.Series:
    """Choose each document's split: `source`, `book`, `chapter` and `characters` are its columns.

    Novels by whole books, or by chapters where there is one book; documents in `left_out` are
    duplicates. Of general text the end of each file is held out, so that neighbouring passages stay
    together; files of less than four passages are held out as a whole, or not.
    """
    chosen = pd.Series(TRAIN, index=documents.index)
    chosen[left_out] = DUPLICATE
    novels = documents[(documents["source"] == "wuxia") & ~left_out]
    unit = novels["book"] + ("\n" + novels["chapter"] if novels["book"].nunique() == 1 else "")
    general = documents[(documents["source"] == "general") & ~left_out]
    passages = general.groupby("book")["book"].transform("size")
    small = general[(passages < FEW) & (general["book"].nunique() > 1)]
    for rows, units in ((novels, unit), (small, small["book"])):
        lengths = rows["characters"].groupby(units).sum()
        chosen[units.index[units.isin(_held_out(lengths.to_dict(), val_ratio, seed))]] = VALIDATION
    for _, rows in general.drop(index=small.index).groupby("book"):
        chosen[_tail(rows["characters"], val_ratio)] = VALIDATION
    return chosen


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
