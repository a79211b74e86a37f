"""A blind comparison for people: sheets to fill in, and what filled ones say.

    python -m wuxia_core.evaluate.blind OUTPUT_DIR              # writes blind/ and blind_key.csv
    python -m wuxia_core.evaluate.blind OUTPUT_DIR a.csv b.csv  # reads filled sheets, one a rater

A rater reads `blind/sheet.html` and writes A, B or = into `style` and `quality` of `sheet.csv`.
Which is base and which tuned stands in `blind_key.csv` alone: do not hand it out.
"""

import argparse
import csv
import functools
import hashlib
import io
import logging
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from wuxia_core.errors import DataError, exit_status, raise_machine_error
from wuxia_core.evaluate.scorecard import read_scorecard

ASKED = {"style": "which is more like 武侠?", "quality": "which is better written?"}
Z95 = 1.96  # normal quantile of a two-sided 95 % interval
KEY = "blind_key.csv"
POINTS = {"A": 1.0, "B": 0.0, "=": 0.5}  # for A
FORMULAS = ("=", "+", "-", "@", "\t", "\r")  # what a spreadsheet would run
PAGE = """<!DOCTYPE html><html lang="zh-Hans"><head><meta charset="utf-8"><title>Blind sheet</title>
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<style>:root {{ color-scheme: light dark }}
body {{ max-width: 60rem; margin: 2rem auto; padding: 0 1rem;
 font: 16px/1.7 "Noto Sans SC", "Noto Sans CJK SC", "PingFang SC", "Microsoft YaHei", sans-serif }}
td {{ vertical-align: top; width: 50%; padding: .5rem; border-top: 1px solid #8888;
 white-space: pre-wrap }}</style></head><body><h1>A or B?</h1>
<p>Both go on from the same beginning. For each pair write A, B or = (no telling) into sheet.csv:
style: which is more like 武侠? quality: which is better written?</p>{pairs}</body></html>
"""
PAIR = (
    "<h2>{id} · {prompt} …</h2><table><tr><td><b>A</b> {A}</td><td><b>B</b> {B}</td></tr></table>"
)


def write_sheets(output_dir: Path, passages: list[dict[str, Any]]) -> Path:
    """Write a sheet, the same for reading, and apart from them the key; return the sheet.

    `passages` are those of a scorecard. Raises `DataError` where there is a sheet that is filled
    in, `MachineError` where the folder cannot be written.
    """
    from wuxia_core.text import escape, visible

    digest = hashlib.sha256(repr(passages).encode()).hexdigest()  # of these passages, no others
    chance = np.random.default_rng(int(digest, 16))
    swapped = chance.permutation(np.arange(len(passages)) % 2 == 0)
    path = output_dir / "blind" / "sheet.csv"
    if path.exists() and any(row.get(asked) for row in _read(path) for asked in ASKED):
        raise DataError(f"{path}: is filled in; name it to read it, or move it away")
    rows, key = [], []
    for number, (passage, swap) in enumerate(zip(passages, swapped, strict=True), 1):
        first, second = ("tuned", "base") if swap else ("base", "tuned")
        text = {"prompt": passage["prompt"], "A": passage[first], "B": passage[second]}
        name = f"{number}-{digest[:6]}"
        rows.append({"id": name, **{name: visible(value) for name, value in text.items()}})
        key.append({"id": name, "tuned": "A" if swap else "B"})
    sheet = pd.DataFrame([{name: _cell(value) for name, value in row.items()} for row in rows])
    pairs = "".join(PAIR.format(**{n: escape(str(v)) for n, v in row.items()}) for row in rows)
    with raise_machine_error(str(output_dir)):
        path.parent.mkdir(exist_ok=True)
        sheet.assign(**dict.fromkeys(ASKED, "")).to_csv(path, index=False, encoding="utf-8-sig")
        path.with_suffix(".html").write_text(PAGE.format(pairs=pairs), encoding="utf-8")
        pd.DataFrame(key).to_csv(output_dir / KEY, index=False)
    return path


def _cell(value: object) -> object:
    """Keep a spreadsheet from taking a text for a formula."""
    return f"'{value}" if isinstance(value, str) and value.startswith(FORMULAS) else value


def win_rates(output_dir: Path, sheets: list[Path]) -> pd.DataFrame:
    """Count how often raters prefer the tuned model; a tie is half a win.

    Returns
    -------
    A row a question: `asked`, `tuned` (win rate; 0.5 is no preference), `low` and `high` (95 %
    interval: Wilson 1927, over prompts, each with the mean of its raters), `n` prompts, `raters`.

    Raises
    ------
    DataError
        Where the key is missing, no prompt is filled in, a sheet comes twice or does not fit; it
        names file, line and value.
    """
    if len({sheet.resolve() for sheet in sheets}) < len(sheets):
        raise DataError("a sheet is named twice; each rater fills in one")
    key = {row.get("id", ""): row.get("tuned", "") for row in _read(output_dir / KEY)}
    every = [_votes(sheet, key) for sheet in sheets]
    votes = pd.DataFrame([vote for each in every for vote in each], columns=["asked", "id", "won"])
    table, raters = [], sum(map(bool, every))
    for asked, question in ASKED.items():
        won = votes[votes["asked"] == asked].groupby("id")["won"].mean()
        if won.empty:
            raise DataError(f"{', '.join(map(str, sheets))}: no {asked} is filled in")
        table.append((question, won.mean(), *_wilson(won.mean(), len(won)), len(won), raters))
    return pd.DataFrame(table, columns=["asked", "tuned", "low", "high", "n", "raters"])


def _wilson(rate: float, n: int) -> tuple[float, float]:
    """Bound a share; for means of votes, which vary less than single ones, a little too widely."""
    z2 = Z95**2 / n
    middle, half = rate + z2 / 2, Z95 * math.sqrt(rate * (1 - rate) / n + z2 / 4 / n)
    return (middle - half) / (1 + z2), (middle + half) / (1 + z2)


def _votes(sheet: Path, key: dict[str, str]) -> list[tuple[str, str, float]]:
    """Read a filled sheet: question, prompt, points for the tuned model."""
    votes = []
    for line, row in enumerate(_read(sheet), 2):
        for asked in ASKED:
            if row.get("id") not in key or row.get(asked) is None:
                raise DataError(
                    f"{sheet}: row {line} is no row of this run's sheet (id, {asked}): another's?"
                )
            vote = row[asked].strip().upper().replace("＝", "=")
            if vote and vote not in POINTS:
                raise DataError(f"{sheet}: row {line}: {asked} is {row[asked]}; write A, B or =")
            if vote:
                points = POINTS[vote]
                votes.append((asked, row["id"], points if key[row["id"]] == "A" else 1 - points))
    return votes


def _read(path: Path) -> list[dict[str, Any]]:
    try:
        return list(csv.DictReader(io.StringIO(path.read_text(encoding="utf-8-sig"))))
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path}: {error}; save it as CSV in UTF-8") from None


def main(arguments: list[str] | None = None) -> int:
    """Run from the command line; return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m wuxia_core.evaluate.blind", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
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
