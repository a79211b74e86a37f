"""A blind comparison for people: write sheets to fill in, and count the answers in filled ones.

A rater writes A, B or = (no telling) into the columns `style` (which is more like 武侠?) and
`quality` (which is better written?) of `blind/sheet.csv`. Only `blind_key.csv` says which of A
and B is tuned: do not hand that file out.
"""

import argparse
import functools
import hashlib
from pathlib import Path

import numpy as np
import pandas as pd

from wuxia_core.errors import (
    DataError,
    command_parser,
    exit_status,
    raise_machine_error,
    run_command,
)
from wuxia_core.evaluate.scorecard import evaluate
from wuxia_core.text import visible

QUESTIONS = ["style", "quality"]  # columns of the sheet
KEY = "blind_key.csv"  # a file in the run folder


def write_sheets(output_dir: Path, passages: list[dict[str, str]]) -> Path:
    """Write `blind/sheet.csv` and `blind_key.csv` into the run folder; return the sheet's path.

    `passages` are those of a scorecard: dicts with `prompt`, `base`, `tuned` and more. Each of them
    becomes a row of the sheet, and the same passages always give the same sheet. In half of the
    rows, drawn at random, the tuned model's passage is in column B, in the others in column A; the
    key says which. A sheet that nobody has filled in is overwritten.

    Raises `DataError` if a rater has begun to fill in the sheet that is there, or if that sheet
    cannot be read; `MachineError` if the folder cannot be written.
    """
    path = output_dir / "blind" / "sheet.csv"
    # A missing column becomes NaN, which is not "" either: rows of any other table are kept, too.
    if path.exists() and _read_csv(path).reindex(columns=QUESTIONS).ne("").any(axis=None):
        raise DataError(f"{path}: is filled in; name it to read it, or move it away")
    digest = hashlib.sha256(repr(passages).encode()).hexdigest()  # ties the ids to these passages
    sheet = pd.DataFrame(passages)[["prompt", "tuned", "base"]].map(visible)
    # Put an apostrophe before a text that a spreadsheet would run as a formula.
    sheet = sheet.replace(r"^(?=[=+\-@\t\r])", "'", regex=True)
    ids = pd.Index([f"{n}-{digest[:6]}" for n in range(1, len(sheet) + 1)], name="id")
    sheet = sheet.set_axis(["prompt", "A", "B"], axis=1).set_axis(ids)
    # (rows,) bool: shuffle 0, 1, 2, … over the rows; half of the rows get an odd number.
    swapped = np.random.default_rng(int(digest, 16)).permutation(len(sheet)) % 2 == 1
    # So far A is tuned, B is base: exchange them in the swapped rows. `to_numpy` is needed, since
    # pandas would match the columns of a table by their names, and exchange nothing.
    sheet.loc[swapped, ["A", "B"]] = sheet.loc[swapped, ["B", "A"]].to_numpy()
    with raise_machine_error(str(output_dir)):
        path.parent.mkdir(exist_ok=True)
        sheet.assign(**dict.fromkeys(QUESTIONS, "")).to_csv(path, encoding="utf-8-sig")
        pd.DataFrame({"tuned": np.where(swapped, "B", "A")}, ids).to_csv(output_dir / KEY)
    return path


def win_rates(output_dir: Path, sheets: list[Path]) -> pd.DataFrame:
    """Tabulate how often raters prefer the tuned model; a tie counts as half a win.

    `sheets` are one or more filled sheets of a run folder, each by another rater.

    Returns
    -------
    A table with a row for each question and these columns: `question`, "style" or "quality";
    `tuned`, the share of raters who prefer the tuned model (0.5: no preference), averaged over
    prompts; `n`, the number of prompts with an answer; `low` and `high`, the 95 % interval (Wilson
    1927) of `tuned`, in which each prompt counts as one trial; `raters`, the number of sheets.

    Raises
    ------
    DataError
        If the key or a sheet cannot be read, or is not this run's; if a sheet is named twice, or
        has an answer that is not A, B or =; or if one of the questions is answered in no sheet.
    """
    if len({sheet.resolve() for sheet in sheets}) < len(sheets):
        raise DataError("a sheet is named twice; each rater fills in one")
    answers = _read_csv(output_dir / KEY)
    if not {"id", "tuned"} <= set(answers):
        raise DataError(f"{output_dir / KEY}: not the key that was written; copy it back")
    key = answers.set_index("id")["tuned"].to_dict()  # id: "A" or "B"
    votes = pd.concat([_read_votes(sheet, key) for sheet in sheets])
    # For each question and prompt the share of raters who prefer the tuned model; a tie is half.
    prompt_rates = votes.groupby(["question", "id"], sort=False)["won"].mean()
    table = prompt_rates.groupby("question").agg(tuned="mean", n="count").reindex(QUESTIONS)
    if unanswered := table.index[table["n"].isna()].tolist():
        raise DataError(f"{', '.join(map(str, sheets))}: no {unanswered[0]} is filled in")
    rate, z2 = table["tuned"], 1.96**2 / table["n"]  # z2 is z²/n of Wilson's formula
    middle, half_width = rate + z2 / 2, np.sqrt(z2 * (rate * (1 - rate) + z2 / 4))
    bounds = {"low": (middle - half_width) / (1 + z2), "high": (middle + half_width) / (1 + z2)}
    return table.assign(**bounds, raters=len(sheets)).reset_index()


def _read_votes(sheet: Path, key: dict[str, str]) -> pd.DataFrame:
    """Read the answers in a filled sheet; `key` maps the id of a prompt to the tuned side, A or B.

    Returns a table with a row for each answer: `id` of the prompt, `question`, `vote` ("A", "B" or
    "=") and `won`, which is 1 if the vote is for the tuned model, 0.5 if it is a tie, else 0. Empty
    cells have no row. Raises `DataError` if the sheet cannot be read, is not this run's, or has an
    answer that is not A, B or =.
    """
    filled = _read_csv(sheet)
    if not {"id", *QUESTIONS} <= set(filled) or not filled["id"].isin(key).all():
        raise DataError(f"{sheet}: not this run's sheet, by its columns or ids: another's?")
    votes = filled.melt("id", QUESTIONS, "question", "vote")
    votes["vote"] = votes["vote"].str.strip().str.upper().str.replace("＝", "=")
    votes = votes[votes["vote"] != ""]
    # Raise at the first wrong answer; if no answer is wrong, the loop has no rows.
    for row in votes[~votes["vote"].isin(["A", "B", "="])].itertuples():
        raise DataError(f"{sheet}: {row.question} of {row.id} is {row.vote}; write A, B or =")
    is_tuned, is_tie = votes["vote"] == votes["id"].map(key), votes["vote"] == "="
    return votes.assign(won=is_tuned.astype(float).mask(is_tie, 0.5))


def _read_csv(path: Path) -> pd.DataFrame:
    """Read a CSV file as a table of strings, in which an empty cell is "".

    Raises `DataError` if the file cannot be read as CSV in UTF-8.
    """
    try:
        return pd.read_csv(path, dtype=str, keep_default_na=False, encoding="utf-8-sig").fillna("")
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read as CSV in UTF-8 ({error})") from None


def main(arguments: list[str] | None = None) -> int:
    """Run the command with `arguments`, by default the command line's; return the exit status."""
    parser = command_parser("wuxia_core.evaluate.blind", __doc__)
    parser.add_argument("output_dir", type=Path, help="run folder, as in training.output_dir")
    parser.add_argument("filled", type=Path, nargs="*", help="filled sheets, one a rater, to count")
    return exit_status(functools.partial(_write_or_count, parser.parse_args(arguments)))


def _write_or_count(options: argparse.Namespace) -> None:
    """Print the win rates in the filled sheets; if none is named, write a sheet to fill in.

    Before a sheet is written, the run is evaluated, unless it has a current scorecard. Raises
    `DataError` if a sheet or the key is wrong (see `win_rates`), if a filled sheet would be
    overwritten, or if the run has no finished adapter or no mixture; `MachineError` if the base
    cannot be loaded or the folder cannot be written; `ConfigError` if the run's config is wrong.
    """
    if options.filled:
        print(win_rates(options.output_dir, options.filled).round(3).to_string(index=False))
        print("0.5 is no preference; = counts as half a win")
        return
    sheet = write_sheets(options.output_dir, evaluate(options.output_dir)["passages"])
    print(f"write A, B or = into {' and '.join(QUESTIONS)} of {sheet}, and keep {KEY} to yourself")


if __name__ == "__main__":
    run_command(main)
