import csv
import json
import shutil

import pandas as pd
import pytest

from wuxia_core.errors import DataError
from wuxia_core.evaluate.blind import main, win_rates, write_sheets


@pytest.fixture
def folder(tmp_path):
    """A run folder whose scorecard has twelve passages, one of which a spreadsheet would run."""
    passages = [
        {"prompt": f"开头{n}", "base": f"=base {n}<b>", "tuned": f"tuned {n}", "human": ""}
        for n in range(12)
    ]
    (tmp_path / "scorecard.json").write_text(json.dumps({"passages": passages}))
    return tmp_path


def rows(path):
    return list(csv.DictReader(path.open(encoding="utf-8-sig")))


def fill(folder, style, quality, name="filled.csv"):
    """Vote as a function of the row and of which side is tuned."""
    key = {row["id"]: row["tuned"] for row in rows(folder / "blind_key.csv")}
    sheet = [
        {**row, "style": style(key[row["id"]]), "quality": quality(key[row["id"]])}
        for row in rows(folder / "blind" / "sheet.csv")
    ]
    pd.DataFrame(sheet).to_csv(folder / name, index=False)
    return folder / name


def test_the_sheet_is_blind_and_the_key_is_apart(folder):
    sheet = write_sheets(folder)
    key = rows(folder / "blind_key.csv")
    assert [row["tuned"] for row in key].count("A") == 6
    for row, answer in zip(rows(sheet), key, strict=True):
        assert row["style"] == row["quality"] == ""
        other = "B" if answer["tuned"] == "A" else "A"
        assert row[answer["tuned"]].startswith("tuned") and row[other].startswith("'=base")
    page = sheet.with_suffix(".html").read_text(encoding="utf-8")
    assert page.count("<h2>") == 12 and "&lt;b&gt;" in page and "<script" not in page
    assert not list((folder / "blind").glob("*key*"))


def test_win_rates_count_ties_as_halves_and_raters_together(folder):
    write_sheets(folder)
    other = {"A": "B", "B": "A"}
    one = fill(folder, style=str, quality=lambda _: "=")
    two = fill(folder, style=other.get, quality=lambda _: "＝", name="second.csv")
    alone, both = win_rates(folder, [one]), win_rates(folder, [one, two])
    assert alone["tuned"].tolist() == [1.0, 0.5] and both["tuned"].tolist() == [0.5, 0.5]
    assert (alone["n"] == 12).all() and (both["raters"] == 2).all()
    assert alone["low"].tolist() == [1.0, 0.5]


def test_chance_votes_have_an_interval_around_a_half(folder):
    write_sheets(folder)
    table = win_rates(folder, [fill(folder, style=lambda _: "A", quality=lambda _: "b")])
    assert table["tuned"].tolist() == [0.5, 0.5]
    assert (table["low"] < 0.3).all() and (table["high"] > 0.7).all()


def test_a_filled_sheet_is_not_overwritten_nor_taken_for_another_runs(folder):
    sheet = write_sheets(folder)
    filled = fill(folder, style=str, quality=str)
    shutil.copy(filled, sheet)
    with pytest.raises(DataError, match="is filled in; move it away"):
        write_sheets(folder)
    sheet.unlink()
    card = json.loads((folder / "scorecard.json").read_text())
    card["passages"][0]["tuned"] += "。"
    (folder / "scorecard.json").write_text(json.dumps(card))
    write_sheets(folder)
    with pytest.raises(DataError, match="no row of this run's sheet"):
        win_rates(folder, [filled])


def test_faulty_sheets_are_named(folder, capsys):
    with pytest.raises(DataError, match=r"blind_key.csv: not there"):
        win_rates(folder, [])
    write_sheets(folder)
    sheet = fill(folder, style=lambda _: "C", quality=lambda _: "A")
    assert main([str(folder), str(sheet)]) == 3
    assert "filled.csv: row 2: style is C; write A, B or =" in capsys.readouterr().err
    sheet.write_text("id,style\n99,A\n")
    with pytest.raises(DataError, match="row 2 is no row of this run's sheet"):
        win_rates(folder, [sheet])
    empty = fill(folder, style=lambda _: "", quality=lambda _: "A")
    with pytest.raises(DataError, match="style: 0 prompts are filled in, fewer than 5"):
        win_rates(folder, [empty])
