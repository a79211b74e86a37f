import csv
import shutil

import pandas as pd
import pytest

from wuxia_core.errors import DataError
from wuxia_core.evaluate.blind import main, win_rates, write_sheets


@pytest.fixture
def passages():
    """Twelve, which a spreadsheet would run."""
    return [
        {"prompt": f"开头{n}", "base": f"=base {n}<b>", "tuned": f"tuned {n}", "human": ""}
        for n in range(12)
    ]


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


def test_the_sheet_is_blind_and_the_key_is_apart(tmp_path, passages):
    passages[0]["prompt"] = "暗\u202e号"
    sheet = write_sheets(tmp_path, passages)
    key = rows(tmp_path / "blind_key.csv")
    assert [row["tuned"] for row in key].count("A") == 6
    for row, answer in zip(rows(sheet), key, strict=True):
        assert row["style"] == row["quality"] == ""
        other = "B" if answer["tuned"] == "A" else "A"
        assert row[answer["tuned"]].startswith("tuned") and row[other].startswith("'=base")
    prompts = [row["prompt"] for row in rows(sheet)]
    assert prompts == ["暗⟨U+202E⟩号", *(row["prompt"] for row in passages[1:])]
    assert not list((tmp_path / "blind").glob("*key*"))


def test_win_rates_count_ties_as_halves_and_raters_together(tmp_path, passages):
    write_sheets(tmp_path, passages)
    other = {"A": "B", "B": "A"}
    one = fill(tmp_path, style=str, quality=lambda _: "=")
    two = fill(tmp_path, style=other.get, quality=lambda _: "＝", name="second.csv")
    alone, both = win_rates(tmp_path, [one]), win_rates(tmp_path, [one, two])
    assert alone["tuned"].tolist() == [1.0, 0.5] and both["tuned"].tolist() == [0.5, 0.5]
    assert (alone["n"] == 12).all() and (both["raters"] == 2).all()
    assert alone["low"].tolist() == pytest.approx([12 / (12 + 1.96**2), 0.254], abs=0.001)


def test_chance_votes_have_an_interval_around_a_half(tmp_path, passages):
    write_sheets(tmp_path, passages)
    table = win_rates(tmp_path, [fill(tmp_path, style=lambda _: "A", quality=lambda _: "b")])
    assert table["tuned"].tolist() == [0.5, 0.5]
    assert (table["low"] < 0.3).all() and (table["high"] > 0.7).all()


def test_a_filled_sheet_is_not_overwritten_nor_taken_for_another_runs(tmp_path, passages):
    sheet = write_sheets(tmp_path, passages)
    filled = fill(tmp_path, style=str, quality=str)
    shutil.copy(filled, sheet)
    with pytest.raises(DataError, match="is filled in"):
        write_sheets(tmp_path, passages)
    sheet.write_text("another,table\n1,2\n")
    with pytest.raises(DataError, match="is filled in"):
        write_sheets(tmp_path, passages)
    sheet.unlink()
    passages[0]["tuned"] += "。"
    write_sheets(tmp_path, passages)
    with pytest.raises(DataError, match="not this run's sheet"):
        win_rates(tmp_path, [filled])


def test_faulty_sheets_are_named(tmp_path, passages, capsys):
    with pytest.raises(DataError, match=r"blind_key.csv: .*No such file"):
        win_rates(tmp_path, [])
    write_sheets(tmp_path, passages)
    sheet = fill(tmp_path, style=lambda _: "C", quality=lambda _: "A")
    assert main([str(tmp_path), str(sheet)]) == 3
    assert "filled.csv: style of " in capsys.readouterr().err
    sheet.write_text("id,style\n99,A\n")
    with pytest.raises(DataError, match="not this run's sheet"):
        win_rates(tmp_path, [sheet])
    empty = fill(tmp_path, style=lambda _: "", quality=lambda _: "A")
    with pytest.raises(DataError, match="no style is filled in"):
        win_rates(tmp_path, [empty])
    key = (tmp_path / "blind_key.csv").read_text()
    (tmp_path / "blind_key.csv").write_text("a,b\n1,2\n")
    with pytest.raises(DataError, match=r"blind_key.csv: not the key"):
        win_rates(tmp_path, [sheet])
    (tmp_path / "blind_key.csv").write_text(key)
    with pytest.raises(DataError, match="named twice"):
        win_rates(tmp_path, [sheet, sheet])
    sheet.write_bytes("编号".encode("gb18030"))
    with pytest.raises(DataError, match=r"filled.csv: .*CSV in UTF-8"):
        win_rates(tmp_path, [sheet])
