"""A blind comparison for people: sheets to fill in, and what filled ones say.

    python -m wuxia_core.evaluate.blind OUTPUT_DIR              # writes blind/ and blind_key.csv
    python -m wuxia_core.evaluate.blind OUTPUT_DIR a.csv b.csv  # reads filled sheets, one a rater

A rater reads `blind/sheet.html` and writes A, B or = into `style` and `quality` of `sheet.csv`.
Which is base and which tuned stands in `blind_key.csv` alone: do not hand it out.
"""

import argparse
import functools
import hashlib
import logging
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from wuxia_core.errors import DataError, exit_status, raise_machine_error
from wuxia_core.evaluate.scorecard import read_scorecard
from wuxia_core.text import visible

QUESTIONS = {"style": "which is more like 武侠?", "quality": "which is better written?"}
Z95 = 1.96  # normal quantile of a two-sided 95 % interval
KEY = "blind_key.csv"
POINTS = {"A": 1.0, "B": 0.0, "=": 0.5}  # for A
FORMULAS = ("=", "+", "-", "@", "\t", "\r")  # what a spreadsheet would run
PAGE = """<!DOCTYPE html><html lang="zh-Hans"><head><meta charset="utf-8"><title>Blind sheet</title>
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<style>td {{ vertical-align: top; padding: .5rem; white-space: pre-wrap }}</style></head><body>
<p>Both go on from the same beginning. For each pair write A, B or = (no telling) into sheet.csv:
style: which is more like 武侠? quality: which is better written?</p>{table}</body></html>
"""


def write_sheets(output_dir: Path, passages: list[dict[str, Any]]) -> Path:
    """Write a sheet, the same for reading, and apart from them the key; return the sheet.

    `passages` are those of a scorecard. Raises `DataError` where there is a sheet that is filled
    in, `MachineError` where the folder cannot be written.
    """
    path = output_dir / "blind" / "sheet.csv"
    if path.exists() and _read(path)[list(QUESTIONS)].ne("").any(axis=None):
        raise DataError(f"{path}: is filled in; name it to read it, or move it away")
    digest = hashlib.sha256(repr(passages).encode()).hexdigest()  # of these passages, no others
    rng = np.random.default_rng(int(digest, 16))
    tuned = np.where(rng.permutation(len(passages)) % 2 == 0, "A", "B")
    ids = [f"{number}-{digest[:6]}" for number in range(1, len(passages) + 1)]
    sides = {"A": ("tuned", "base"), "B": ("base", "tuned")}
    pairs = zip(passages, tuned, strict=True)
    rows = [(p["prompt"], *(p[side] for side in sides[place])) for p, place in pairs]
    sheet = pd.DataFrame(rows, columns=["prompt", "A", "B"], index=pd.Index(ids, name="id"))
    sheet = sheet.map(visible)
    safe = sheet.map(lambda text: f"'{text}" if text.startswith(FORMULAS) else text)
    with raise_machine_error(str(output_dir)):
        path.parent.mkdir(exist_ok=True)
        safe.assign(**dict.fromkeys(QUESTIONS, "")).to_csv(path, encoding="utf-8-sig")
        with pd.option_context("display.max_colwidth", None):
            page = PAGE.format(table=sheet.to_html())
        path.with_suffix(".html").write_text(page, encoding="utf-8")
        pd.DataFrame({"id": ids, "tuned": tuned}).to_csv(output_dir / KEY, index=False)
    return path


def win_rates(output_dir: Path, sheets: list[Path]) -> pd.DataFrame:
    """Count how often raters prefer the tuned model; a tie is half a win.

    Returns
    -------
    A row a question: `question`, `tuned` (win rate; 0.5 is no preference), `low` and `high` (95 %
    interval: Wilson 1927, over prompts, each with the mean of its raters), `n` prompts, `raters`.

    Raises
    ------
    DataError
        Where the key is missing, no prompt is filled in, a sheet comes twice or does not fit; it
        names file and value.
    """
    if len({sheet.resolve() for sheet in sheets}) < len(sheets):
        raise DataError("a sheet is named twice; each rater fills in one")
    key = _read(output_dir / KEY).set_index("id")["tuned"].to_dict()
    votes = pd.concat([_votes(sheet, key) for sheet in sheets] or [pd.DataFrame()])
    rows = []
    for name, question in QUESTIONS.items():
        given = votes[votes["question"] == name]
        if given.empty:
            raise DataError(f"{', '.join(map(str, sheets))}: no {name} is filled in")
        won = given.groupby("id")["won"].mean()
        bounds = _wilson(won.mean(), len(won))
        rows.append((question, won.mean(), *bounds, len(won), votes["sheet"].nunique()))
    return pd.DataFrame(rows, columns=["question", "tuned", "low", "high", "n", "raters"])


def _wilson(rate: float, n: int) -> tuple[float, float]:
    """Bound a share; for means of votes, which vary less than single ones, a little too widely."""
    z2 = Z95**2 / n
    middle, half = rate + z2 / 2, Z95 * math.sqrt(rate * (1 - rate) / n + z2 / 4 / n)
    return (middle - half) / (1 + z2), (middle + half) / (1 + z2)


def _votes(sheet: Path, key: dict[str, str]) -> pd.DataFrame:
    """Read a filled sheet: `id`, `question`, `vote`, `won` (by the tuned model), `sheet`."""
    filled = _read(sheet)
    if not {"id", *QUESTIONS} <= set(filled) or not filled["id"].isin(key).all():
        raise DataError(f"{sheet}: not this run's sheet, by its columns or ids: another's?")
    votes = filled.melt("id", list(QUESTIONS), "question", "vote")
    votes["vote"] = votes["vote"].str.strip().str.upper().str.replace("＝", "=")
    votes = votes[votes["vote"] != ""]
    for row in votes[~votes["vote"].isin(POINTS)].itertuples():
        raise DataError(f"{sheet}: {row.question} of {row.id} is {row.vote}; write A, B or =")
    points = votes["vote"].map(POINTS)
    won = points.where(votes["id"].map(key) == "A", 1 - points)
    return votes.assign(won=won, sheet=str(sheet))


def _read(path: Path) -> pd.DataFrame:
    try:
        return pd.read_csv(path, dtype=str, keep_default_na=False, encoding="utf-8-sig").fillna("")
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise DataError(f"{path}: {error}; save it as CSV in UTF-8") from None


def main(arguments: list[str] | None = None) -> int:
    """Run from the command line; return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m wuxia_core.evaluate.blind",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("output_dir", type=Path, help="run folder, as in training.output_dir")
    parser.add_argument("filled", type=Path, nargs="*", help="filled sheets")
    return exit_status(functools.partial(_sheets, parser.parse_args(arguments)))


def _sheets(options: argparse.Namespace) -> None:
    if options.filled:
        print(win_rates(options.output_dir, options.filled).round(3).to_string(index=False))
        print("0.5 is no preference; = counts as half a win")
        return
    sheet = write_sheets(options.output_dir, read_scorecard(options.output_dir)["passages"])
    print(f"read {sheet.with_suffix('.html')}, fill in {sheet}, and keep {KEY} to yourself")


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    sys.exit(main())
