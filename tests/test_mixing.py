import errno
import hashlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from wuxia_core import mix
from wuxia_core.corpus import Segmenter
from wuxia_core.errors import ConfigError, DataError, MachineError
from wuxia_core.evaluate.statistics import FEWEST
from wuxia_core.mixing import (
    Encoder,
    find_texts,
    held_out_windows,
    in_use,
    open_run_mixture,
    train_windows,
)
from wuxia_core.preflight.plan import estimated_text
from wuxia_core.run import write_setup

COMMON = (
    "的一是不了人我在有他这中大来上个国到说们为子和你地出道也时年得就那要下以生会自着去之过家学对可里后小么心多"
    "天而能好都然没日于起还发成事只作当想看文无开手用主行方又如前所本见经头面公同已老从动两长知样现分将外但身些"
)


def sentence(name):
    """Thirty characters that no other name gives."""
    return "".join(random.Random(name).choices(COMMON, k=29)) + "。"


@pytest.fixture
def library(tmp_path, config):
    """Three books of ten chapters, the middle one shortest, and plenty of general text."""
    folder = tmp_path / "library"
    folder.mkdir()
    for title, lines in (("长", 30), ("中", 20), ("短", 12)):
        chapters = [
            f"第{n}章 {title}\n" + "\n".join(sentence(f"{title}{n}之{k}") for k in range(lines))
            for n in range(1, 11)
        ]
        (folder / f"{title}.txt").write_text("\n".join(chapters), encoding="utf-8")
    general = "\n".join("".join(sentence(f"general{k}之{j}") for j in range(8)) for k in range(60))
    (folder / "general.txt").write_text(general, encoding="utf-8")
    config.data.data_dir = str(folder)
    config.data.general_file, config.data.val_ratio = None, 0.2
    return folder


def digest(folder):
    names = sorted({path.name for path in folder.iterdir()})
    assert len(names) == 6
    return [hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in names]


def test_novels_are_split_by_whole_books(library, config):
    documents = mix(config).documents.query("source == 'wuxia'")
    splits = documents.groupby("book")["split"].unique().map(list).to_dict()
    assert splits == {"长": ["train"], "中": ["train"], "短": ["validation"]}


def write_novel(path, chapters, lines=12):
    """A novel of so many chapters of about 360 characters."""
    path.parent.mkdir(exist_ok=True)
    parts = [
        f"第{n}章 {path.stem}\n" + "\n".join(sentence(f"{path.stem}{n}之{k}") for k in range(lines))
        for n in range(1, chapters + 1)
    ]
    path.write_text("\n".join(parts), encoding="utf-8")
    return parts


def novels_of(mixture):
    return mixture.outline.query("source == 'wuxia'")


def held_out_share(mixture):
    novels = novels_of(mixture)
    held_out = novels["characters"].where(novels["split"] == "validation", 0)
    return held_out.sum() / novels["characters"].sum()


@pytest.mark.parametrize(
    ("chapters", "ratio", "books"),
    [
        (
            {"甲": 52, "乙": 48},
            0.1,
            {"甲"},
        ),  # no book is near: the end of the last in order of names
        ({"甲": 52, "乙": 48}, 0.4, {"乙"}),
        ({"甲": 40, "乙": 38, "丙": 9}, 0.1, {"丙"}),
        ({"甲": 60, "乙": 35, "丙": 5}, 0.1, None),
        ({"甲": 90}, 0.1, {"甲"}),
        ({"甲": 90}, 0.5, {"甲"}),
        ({f"书{n}": 7 for n in range(12)}, 0.1, None),
        ({f"书{n}": 7 for n in range(12)}, 0.93, None),
    ],
)
def test_the_held_out_share_is_near_what_is_asked(tmp_path, config, chapters, ratio, books):
    for title, count in chapters.items():
        write_novel(tmp_path / "novels" / f"{title}.txt", count)
    config.data.data_dir, config.data.general_file = str(tmp_path / "novels"), None
    config.data.val_ratio = ratio
    mixture = mix(config)
    assert ratio * 2 / 3 <= held_out_share(mixture) <= ratio * 4 / 3
    held_out = novels_of(mixture).query("split == 'validation'")
    assert len(held_out) >= FEWEST and (books is None or set(held_out["book"]) == books)
    whole = len(held_out) == novels_of(mixture)["book"].isin(set(held_out["book"])).sum()
    assert ("no whole book" in mixture.preparation["held_out"]) != whole
    assert all(book in mixture.preparation["held_out"] for book in set(held_out["book"]))


def test_a_note_beside_the_novels_is_no_book(tmp_path, config):
    for title in ("甲", "乙", "丙"):
        write_novel(tmp_path / "novels" / f"{title}.txt", 30)
    note = "本目录收录武侠小说三部，按年代先后排列，底本各不相同，书中错字一仍其旧，未作改动。"
    (tmp_path / "novels" / "说明.txt").write_text(note, encoding="utf-8")
    config.data.data_dir, config.data.general_file = str(tmp_path / "novels"), None
    config.data.val_ratio = 0.1
    mixture = mix(config)
    splits = novels_of(mixture).groupby("book")["split"].agg(set)
    assert splits["说明"] == {"train"} and "说明" not in mixture.preparation["held_out"]
    assert 0.066 < held_out_share(mixture) < 0.134


@pytest.mark.parametrize("chapters", [9, 12, 20])
def test_the_scorecard_gets_the_chapters_that_it_needs_and_the_log_says_why(
    tmp_path, config, chapters
):
    parts = write_novel(tmp_path / "novels" / "甲.txt", chapters)
    config.data.data_dir, config.data.general_file = str(tmp_path / "novels"), None
    mixture = mix(config)
    held_out = mixture.documents.query("split == 'validation'")
    assert held_out["text"].tolist() == parts[-FEWEST:]
    assert f"the last 6 of the {chapters} chapters of 甲" in mixture.preparation["held_out"]
    assert ("the scorecard needs 6" in mixture.preparation["held_out"]) == (chapters < 18)


@pytest.mark.parametrize(
    "name", ["{:04}", "{}", "第{}章", "{:03} 风起", "雪岭_{:02}", "第{}回 夜雨"]
)
def test_a_folder_of_numbered_chapters_is_one_book(tmp_path, config, name):
    for title in ("甲", "乙"):
        write_novel(tmp_path / "novels" / f"{title}.txt", 100)
    (tmp_path / "novels" / "雪").mkdir()
    for number, text in enumerate(write_novel(tmp_path / "丙.txt", 20), 1):
        path = tmp_path / "novels" / "雪" / f"{name.format(number)}.txt"
        path.write_text(text, encoding="utf-8")
    config.data.data_dir, config.data.general_file = str(tmp_path / "novels"), None
    config.data.val_ratio = 0.1
    mixture = mix(config)
    novels = novels_of(mixture)
    assert set(novels["book"]) == {"甲", "乙", "雪/"}
    assert novels.query("book == '雪/'")["chapter"].tolist() == [
        f"第{n}章 丙" for n in range(1, 21)
    ]
    assert mixture.preparation["held_out"] == "9.1% of the novels (雪/)"


def test_a_corpus_may_be_one_book_of_numbered_files_without_headings(tmp_path, config):
    (tmp_path / "novels").mkdir()
    for number in range(1, 31):
        text = "\n".join(sentence(f"{number}之{k}") for k in range(12))
        (tmp_path / "novels" / f"{number}.txt").write_text(text, encoding="utf-8")
    config.data.data_dir, config.data.general_file = str(tmp_path / "novels"), None
    config.data.val_ratio = 0.2
    mixture = mix(config)
    novels = novels_of(mixture)
    assert set(novels["book"]) == {"novels/"}
    assert [text[:30] for text in mixture.documents["text"]] == [
        sentence(f"{n}之0") for n in range(1, 31)
    ]
    assert "the last 6 of the 30 chapters of novels/" in mixture.preparation["held_out"]


def test_numbered_novels_are_books_of_their_own(tmp_path, config):
    for number in range(1, 7):
        write_novel(tmp_path / "novels" / f"{number:02} 书.txt", 80)
    config.data.data_dir, config.data.general_file = str(tmp_path / "novels"), None
    assert novels_of(mix(config))["book"].nunique() == 6


def test_windows_do_not_overlap_and_nothing_is_lost(library, config, tokenizer):
    mixture = mix(config)
    windows = mixture.windows.query("source == 'wuxia'").sort_values(["document", "start"])
    for number, rows in windows.groupby("document"):
        assert np.array_equal(rows["start"].to_numpy()[1:], rows["end"].to_numpy()[:-1])
        tokens = mixture.tokens[rows["start"].iloc[0] : rows["end"].iloc[-1]]
        assert tokens[0] == tokenizer.eos_token_id
        assert tokenizer.decode(tokens[1:]) == mixture.documents.at[number, "text"]
    assert (windows["end"] - windows["start"]).max() == config.data.max_length


def test_a_stride_makes_windows_overlap(library, config):
    config.data.stride = 200
    mixture = mix(config)
    windows = mixture.windows.query("source == 'wuxia'").sort_values(["document", "start"])
    for _, rows in windows.groupby("document"):
        assert set(np.diff(rows["start"])) <= {200}
        assert (rows["end"].to_numpy()[:-1] > rows["start"].to_numpy()[1:]).all()


@pytest.mark.parametrize("ratio", [0.05, 0.1, 0.2])
def test_the_general_ratio_is_met_within_one_window(library, config, ratio):
    config.data.general_ratio = ratio
    report = mix(config).report.set_index("source")
    wanted = ratio / (1 - ratio) * report.at["wuxia", "tokens"]
    assert abs(report.at["general", "tokens"] - wanted) <= config.data.max_length
    assert report["share"].sum() == pytest.approx(1)


def test_without_general_text_it_says_so_and_goes_on(library, config, caplog):
    (library / "general.txt").unlink()
    assert list(mix(config).report["source"]) == ["wuxia"]
    assert "nothing protects" in caplog.text


def test_general_text_is_not_repeated_unless_allowed(library, config, caplog):
    config.data.general_ratio = 0.6
    with pytest.raises(DataError, match=r"general_ratio 0.6 takes .* read .* times") as raised:
        mix(config)
    ratio, epochs = re.findall(r"=([\d.]+\d)", str(raised.value))
    config.data.general_ratio = float(ratio)  # either remedy helps, and a little more does not
    mix(config)
    config.data.general_ratio += 0.002
    with pytest.raises(DataError):
        mix(config)
    config.data.general_ratio, config.data.max_general_epochs = 0.6, float(epochs)
    mixture = mix(config)
    used = mixture.windows.query("source == 'general' and split == 'train'")
    wanted = 1.5 * mixture.report.set_index("source").at["wuxia", "tokens"]
    assert abs((used["end"] - used["start"]).sum() - wanted) <= config.data.max_length
    times = used.groupby("start").size()
    assert times.max() - times.min() <= 1
    assert mixture.preparation["general_epochs"] == pytest.approx(times.mean(), rel=0.1)
    assert "general text is repeated" in caplog.text


@pytest.mark.parametrize("encoding", ["utf-8", "gb18030"])
def test_a_ratio_that_sizes_rule_out_is_refused_at_once(tmp_path, config, encoding):
    write_novel(tmp_path / "novels" / "甲.txt", 900)
    text = (tmp_path / "novels" / "甲.txt").read_text(encoding="utf-8")
    (tmp_path / "novels" / "甲.txt").write_text(20 * text, encoding=encoding)
    general = "\n".join("".join(sentence(f"general{k}之{j}") for j in range(8)) for k in range(900))
    (tmp_path / "general.txt").write_text(general, encoding="utf-8")  # 0.65 MB beside 20 of novel
    config.data.data_dir = str(tmp_path / "novels")
    config.data.general_file, config.data.general_ratio = str(tmp_path / "general.txt"), 0.1
    start = time.monotonic()
    with pytest.raises(DataError) as raised:
        mix(config)
    assert time.monotonic() - start < 2
    assert raised.value.exit_status == 3 and not (tmp_path / "mixture").exists()
    said = str(raised.value)
    assert (
        re.search(r"come out as 0\.03\d", said) and "sizes" in said and "Add general text" in said
    )
    ratio, epochs = map(float, re.findall(r"=([\d.]+\d)", said))
    assert 0.02 < ratio < 0.035 and 3.5 < epochs < 6
    with pytest.raises(DataError):
        estimated_text(config)


def test_sizes_alone_refuse_only_what_is_sure(library, config):
    config.data.general_ratio = 0.6  # a half more than there is: read before it is refused
    find_texts(config)
    (library / "general.txt").rename(library / "general.epub")
    config.data.general_file, config.data.general_ratio = str(library / "general.epub"), 0.95
    find_texts(config)


def test_weights_repeat_training_text(library, config):
    config.data.weights = {"长.txt": 2.5, "中.txt": 0.0}
    mixture = mix(config)
    train = mixture.windows.query("source == 'wuxia' and split == 'train'")
    books = mixture.outline["book"].iloc[train["document"]].unique().tolist()
    copies = train.groupby("start").size()
    assert books == ["长"] and set(copies) == {2, 3}
    config.data.weights = {"absent.txt": 2.0}
    with pytest.raises(ConfigError, match=r"data.weights: no file is called absent\.txt"):
        mix(config)


def test_short_texts_share_windows_and_long_ones_do_not(library, config):
    mixture = mix(config)
    lengths = mixture.windows.eval("end - start")
    windows = mixture.windows.assign(length=lengths).groupby("window")
    assert (windows["length"].sum() <= config.data.max_length).all()
    assert (windows["source"].nunique() == 1).all()
    alone = mixture.windows["split"].eq("validation") | lengths.eq(config.data.max_length)
    assert windows.size()[mixture.windows["window"][alone]].eq(1).all()
    train = windows.filter(lambda rows: rows["split"].iat[0] == "train")
    assert train["length"].sum() > 0.9 * config.data.max_length * train["window"].nunique()


def test_a_packed_window_restarts_positions_and_words(library, config, tokenizer):
    windows = train_windows(mix(config))
    row = int(np.flatnonzero(windows.packed)[0])
    window = windows[row]
    starts = np.flatnonzero(window.position_ids == 0)
    assert len(starts) > 1 and np.array_equal(window.position_ids[: starts[1]], range(starts[1]))
    assert (np.diff(window.word_ids)[starts[1:] - 1] == 1).all()


def test_a_repeated_book_is_left_out_and_a_repeated_paragraph_too(library, config, caplog):
    original = (library / "长.txt").read_text(encoding="utf-8")
    (library / "长（精校版）.txt").write_text(original.replace("，", ","), encoding="gb18030")
    once = "他在山道上走了三天三夜，鞋底磨穿，水囊早已空了，" * 2 + "才望见那座传说中的白云观。"
    for title in ("短", "中"):
        with (library / f"{title}.txt").open("a", encoding="utf-8") as file:
            file.write(f"\n{once}\n{title}完。")
    mixture = mix(config)
    splits = mixture.outline.groupby("book")["split"].unique().map(list)
    assert splits["长（精校版）"] == ["duplicate"]
    assert mixture.preparation["same_books"][0]["kept"] == "长"
    assert "长（精校版） is left out: 100% of it is in 长" in caplog.text
    assert mixture.preparation["repeated_paragraphs"]["count"] >= 1
    used = mixture.documents.query("split != 'duplicate'")["text"]
    assert sum(text.count(once) for text in used) == 1
    config.data.deduplicate = False
    kept = mix(config).documents
    assert "duplicate" not in set(kept["split"])


def test_held_out_text_shares_nothing_with_training_text(library, config):
    shared = "且说这一路上风餐露宿，三人晓行夜宿，非止一日，早来到东京城外。"
    for title in ("短", "长"):
        path = library / f"{title}.txt"
        text = path.read_text(encoding="utf-8").replace("第3章", f"{shared}\n第3章")
        path.write_text(text, encoding="utf-8")
    mixture = mix(config)
    found, left = (mixture.preparation["shared_with_held_out"][key] for key in ("found", "left"))
    assert found["longest"] >= 25 and left["shared"] == left["longest"] == 0
    texts = mixture.documents.groupby("split")["text"].agg("\n".join)
    assert shared in texts["train"] and shared not in texts["validation"]


def test_an_unchanged_corpus_is_known_without_reading_it(library, config):
    mix(config)
    config.save(library / "config.yaml")
    code = (
        "import sys\nfrom wuxia_core import load_config, mix\n"
        f"mix(load_config({str(library / 'config.yaml')!r}))\n"
        "print('torch' in sys.modules, 'transformers' in sys.modules)"
    )
    (library / "长.txt").touch()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]
    assert "built anew" not in done.stderr


def test_an_unchanged_mixture_is_used_again_and_a_changed_one_built_anew(library, config):
    first = mix(config)
    written = (first.folder / "tokens.npy").stat().st_mtime_ns
    assert (mix(config).folder / "tokens.npy").stat().st_mtime_ns == written
    with (library / "长.txt").open("a", encoding="utf-8") as file:
        file.write("\n从此江湖上再没有人见过他。")
    assert mix(config).tokens.size > first.tokens.size
    config.data.max_length = 128
    lengths = mix(config).windows.eval("end - start")
    assert lengths.max() == 128


def test_what_was_read_is_kept_for_the_next_try(library, config, caplog, tmp_path):
    caplog.set_level("INFO")
    kept = tmp_path / ".mixture-texts"
    config.data.general_ratio, config.data.weights = 0.62, {"中.txt": 0.5}
    with pytest.raises(DataError, match="general_ratio"):
        mix(config)
    assert kept.is_dir() and not (tmp_path / "mixture").exists()
    assert "taken from" not in caplog.text
    config.data.general_ratio, config.data.max_length, config.data.min_length = 0.1, 96, 20
    one = digest(mix(config).folder)
    assert f"taken from {kept}" in caplog.text
    assert not kept.exists()
    config.data.processed_data_file = str(tmp_path / "anew")
    assert digest(mix(config).folder) == one


@pytest.mark.parametrize("change", ["text", "settings", "killed"])
def test_what_was_read_of_other_texts_is_not_used(library, config, tmp_path, change):
    config.data.general_ratio = 0.6
    with pytest.raises(DataError, match="general_ratio"):
        mix(config)
    (kept,) = tmp_path.glob(".*-texts")
    if change == "text":
        with (library / "长.txt").open("a", encoding="utf-8") as file:
            file.write("\n从此江湖上再没有人见过他。")
    if change == "settings":
        config.data.val_ratio = 0.4
    if change == "killed":  # before it was whole
        (kept / "manifest.json").unlink()
        (kept / "texts").write_bytes(b"")
    config.data.general_ratio = 0.1
    mixture = mix(config)
    config.data.processed_data_file = str(tmp_path / "anew")
    assert digest(mixture.folder) == digest(mix(config).folder)
    assert not list(tmp_path.glob(".*-texts*"))


@pytest.mark.slow
def test_a_build_that_was_killed_is_done_again_and_leaves_nothing(library, config):
    config.save(library / "config.yaml")
    code = (
        "import os, signal, sys\n"
        "from wuxia_core import mix\n"
        "from wuxia_core.config import load_config\n"
        "from wuxia_core.mixing import windows\n"
        "windows.write_headers = lambda *_: os.kill(os.getpid(), signal.SIGKILL)\n"
        "mix(load_config(sys.argv[1]))\n"
    )
    command = [sys.executable, "-c", code, str(library / "config.yaml")]
    assert subprocess.run(command, capture_output=True).returncode == -signal.SIGKILL
    folder = Path(config.data.processed_data_file)
    left = list(folder.parent.glob(f".{folder.name}-building*"))
    assert len(left) == 1 and not folder.exists()
    assert len(mix(config).tokens) and not left[0].exists()


@pytest.mark.slow
def test_a_build_keeps_the_old_mixture_until_the_new_one_is_in_its_place(
    library, config, monkeypatch
):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    folder = mix(config).folder
    before = digest(folder)
    config.training.seed = 7
    config.save(library / "config.yaml")
    code = (
        "import os, signal, sys\n"
        "from wuxia_core import load_config, mix\n"
        "def killed_at(event, args):\n"
        "    if event == 'os.rename' and os.fspath(args[1]) == sys.argv[2]:\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "sys.addaudithook(killed_at)\n"
        "mix(load_config(sys.argv[1]))\n"
    )
    command = [sys.executable, "-c", code, str(library / "config.yaml"), str(folder)]
    assert subprocess.run(command, capture_output=True).returncode == -signal.SIGKILL
    with monkeypatch.context() as patch, pytest.raises(MachineError):
        patch.setattr("numpy.lib.format.write_array_header_1_0", full)
        mix(config)
    assert digest(folder) == before
    assert mix(config).folder == folder and digest(folder) != before
    assert not list(folder.parent.glob(f".{folder.name}-building*"))


def test_a_full_disk_leaves_no_half_of_a_mixture(library, config, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("numpy.lib.format.write_array_header_1_0", full)
    with pytest.raises(MachineError, match=r"cannot be written .No space left.*free some space"):
        mix(config)
    folder = Path(config.data.processed_data_file)
    assert not folder.exists() and not list(folder.parent.glob(f".{folder.name}-building*"))


def test_the_same_inputs_give_the_same_bytes(library, config, tmp_path):
    one = digest(mix(config).folder)
    config.data.processed_data_file = str(tmp_path / "again")
    assert digest(mix(config).folder) == one


def test_the_end_of_each_general_file_is_held_out(library, config):
    general = mix(config).documents.query("source == 'general'")
    held_out = (general["split"] == "validation").tolist()
    assert held_out == sorted(held_out) and 0.1 < sum(held_out) / len(held_out) <= 0.25


def test_a_run_refuses_another_mixture_than_its_own(library, config, tmp_path):
    run = tmp_path / "run"
    write_setup(config, mix(config), run)
    place = config.data.processed_data_file
    assert open_run_mixture(run, place).tokens.size
    with pytest.raises(DataError, match="no run folder"):
        open_run_mixture(tmp_path, place)
    config.training.seed = 7
    mix(config)
    with pytest.raises(DataError, match="not the mixture"):
        open_run_mixture(run, place)


def test_a_mixture_that_a_run_uses_is_not_replaced(library, config, tmp_path):
    before = digest(mix(config).folder)
    config.training.seed += 1
    with in_use(tmp_path / "run A", config.data.processed_data_file):
        with pytest.raises(ConfigError, match=r"processed_data_file .* in use, by .*run A"):
            mix(config)
        assert digest(tmp_path / "mixture") == before
    assert digest(mix(config).folder) != before


def test_where_the_mixture_is_made_from_does_not_matter(library, config, monkeypatch):
    one = mix(config)
    written = (one.folder / "tokens.npy").stat().st_mtime_ns
    monkeypatch.chdir(library.parent)
    config.data.data_dir = library.name
    assert (mix(config).folder / "tokens.npy").stat().st_mtime_ns == written


def test_a_folder_that_is_no_mixture_is_left_alone(library, config, tmp_path):
    (tmp_path / "mixture").mkdir()
    (tmp_path / "mixture" / "manifest.json").write_text('{"name": "my web app"}')
    (tmp_path / "mixture" / "mine.txt").write_text("mine")
    with pytest.raises(ConfigError, match="not a mixture"):
        mix(config)
    assert (tmp_path / "mixture" / "mine.txt").read_text() == "mine"


def test_an_old_jsonl_is_read_as_input_and_its_folder_lies_beside_it(library, config, tmp_path):
    old = tmp_path / "processed_wuxia.jsonl"
    texts = ["".join(sentence(f"旧{n}之{k}") for k in range(9)) for n in range(12)]
    old.write_text(
        "\n".join(json.dumps({"text": text}, ensure_ascii=False) for text in texts),
        encoding="utf-8",
    )
    config.data.processed_data_file = str(old)
    mixture = mix(config)
    assert mixture.folder == tmp_path / "processed_wuxia"
    assert list(mixture.documents.query("source == 'wuxia'")["text"]) == texts


def test_an_encoding_can_be_named_by_file(library, config):
    (library / "生.txt").write_bytes(("殳漏殳漏殳" * 9).encode("big5hkscs"))
    config.data.encoding = {"生.txt": "big5hkscs"}
    texts = mix(config).documents.query("book == '生'")["text"]
    assert texts.tolist() == ["殳漏殳漏殳" * 9]
    config.data.encoding = {"absent.txt": "gbk"}
    with pytest.raises(ConfigError, match=r"no file is called absent\.txt"):
        mix(config)


def test_missing_general_file_is_named(library, config):
    config.data.general_file = str(library / "absent.txt")
    with pytest.raises(DataError, match=r"general_file .*absent.txt"):
        mix(config)


def test_windows_carry_their_epoch_key_and_words(library, config):
    mixture = mix(config)
    windows = train_windows(mixture)
    plain, later = windows[3], windows[2, 3]
    assert (plain.epoch, later.epoch) == (0, 2)
    assert plain.key == later.key == mixture.windows.query("split == 'train'")["window"].unique()[3]
    assert np.array_equal(plain.input_ids, later.input_ids)
    assert len(plain.word_ids) == len(plain.input_ids)
    assert set(np.diff(plain.word_ids)) == {0, 1}


@pytest.mark.parametrize("left", [0, 0.9])
@pytest.mark.parametrize("name", ["manifest.json", "preparation.json", "documents.parquet",
                                  "windows.parquet", "tokens.npy", "word_starts.npy"])  # fmt: skip
def test_a_damaged_mixture_is_built_anew(library, config, name, left):
    folder = mix(config).folder
    whole, path = digest(folder), folder / name
    path.write_bytes(path.read_bytes()[: int(left * path.stat().st_size)])
    assert digest(folder) != whole and digest(mix(config).folder) == whole


def test_held_out_windows_come_from_held_out_documents(library, config):
    mixture = mix(config)
    held_out = held_out_windows(mixture, limit=3, seed=0)
    for source, windows in held_out.items():
        keys = [windows[row].key for row in range(len(windows))]
        chunks = mixture.windows[mixture.windows["window"].isin(keys)]
        rows = mixture.outline.loc[sorted(set(chunks["document"]))]
        assert set(rows["split"]) == {"validation"}
        assert set(rows["source"]) == {source}
        assert len(rows) <= 3


@pytest.mark.parametrize("stride", [None, 8])
def test_held_out_windows_count_the_characters_that_are_scored(library, config, stride):
    config.data.max_length, config.data.stride, config.data.max_general_epochs = 32, stride, 9
    config.data.min_length = 8
    mixture = mix(config)
    everything = held_out_windows(mixture, limit=1000, seed=0)
    some = held_out_windows(mixture, limit=1000, seed=0, max_windows=4)
    outline = mixture.outline.query("split == 'validation'").groupby("source")["characters"].sum()
    for source, windows in everything.items():
        few = some[source]
        scored = [sum((w[n].position_ids > 0).sum() for n in range(len(w))) for w in (few, windows)]
        assert len(few) == min(4, len(windows))
        share = few.characters / windows.characters
        assert share == pytest.approx(scored[0] / scored[1], rel=0.1)
        numbers = mixture.outline.query("split == 'validation' and source == @source").index
        chunks = mixture.windows[mixture.windows["document"].isin(numbers)].groupby("document")
        tokens = (chunks["end"].max() - chunks["start"].min() - 1).sum()
        share = windows.characters / outline[source]
        assert share == pytest.approx(scored[1] / tokens, rel=0.01)
        assert share > 3 if stride else share < 0.98


def test_letters_of_a_special_token_in_a_novel_stay_letters(library, config, tokenizer):
    (library / "中.txt").write_text("他说<|endoftext|>便走了。\n" * 99, encoding="utf-8")
    mixture = mix(config)
    documents = mixture.documents["book"] == "中"
    rows = mixture.windows[mixture.windows["document"].isin(mixture.documents.index[documents])]
    tokens = np.concatenate(
        [mixture.tokens[a:b] for a, b in zip(rows["start"], rows["end"], strict=True)]
    )
    assert (tokens == tokenizer.eos_token_id).sum() == documents.sum()


@pytest.mark.parametrize("token", ["<|endoftext|>", "<|mask|>", "<|end of text|>"])
def test_letters_of_a_special_token_in_a_passage_stay_letters(tokenizer, token):
    text = f"他说{token}便走了，{token}"
    tokenizer(token)  # leaves the tokenizer set to find them
    window, offsets = Encoder(tokenizer, Segmenter()).passage(text)
    assert not set(window.input_ids[1:]) & set(tokenizer.all_special_ids)
    assert tokenizer.decode(window.input_ids[1:]) == text
    assert offsets[0][0] == 0 and offsets[-1][1] == len(text)


def test_words_are_found_where_they_begin_and_in_a_passage_alike(tokenizer):
    texts = ["他使一招白鹤亮翅，𠮷野家的Ｗindows 98说：「🗡️剑光一闪」。\n", "", "剑", "a b  c"]
    encoder = Encoder(tokenizer, Segmenter())
    encoded = list(encoder(texts))
    for text, (ids, flags) in zip(texts, encoded, strict=True):
        window, _ = encoder.passage(text)
        assert np.array_equal(ids, window.input_ids)
        assert np.array_equal(np.cumsum(flags), window.word_ids)
    ids, flags = encoded[0]
    words = np.split(ids, np.flatnonzero(flags))[2:]
    assert tokenizer.decode(np.concatenate(words)) == texts[0]
    assert tokenizer.decode(words[0]) in ("他", "他使")


def test_a_change_of_the_lexicon_builds_the_mixture_anew(library, config, tmp_path):
    text = "众人见他飞天遁地而来，都吃了一惊，谁也不敢出声。\n" * 30
    (library / "飞.txt").write_text(f"第一回 来了\n{text}", encoding="utf-8")
    config.data.deduplicate = False
    config.data.lexicon = str(tmp_path / "招式.txt")
    starts = []
    for words in ("江湖中人\n", "江湖中人\n飞天遁地而来\n"):
        (tmp_path / "招式.txt").write_text(words, encoding="utf-8")
        starts.append(int(mix(config).word_starts.sum()))
    assert starts[1] < starts[0]


def test_a_lexicon_is_no_novel(library, config):
    for name in ("lexicon.txt", "招式.txt"):
        (library / name).write_text("江湖中人\n", encoding="utf-8")
    config.data.lexicon = str(library / "招式.txt")
    assert set(mix(config).outline.query("source == 'wuxia'")["book"]) == {"长", "中", "短"}


@pytest.mark.parametrize("words", ["剑光\n\n刀影\n", "刀影\n剑光，刀影\n"])
def test_a_faulty_lexicon_is_refused_before_anything_is_read(library, config, tmp_path, words):
    config.data.lexicon = str(tmp_path / "招式.txt")
    (tmp_path / "招式.txt").write_text(words, encoding="utf-8")
    with pytest.raises(ConfigError, match=r"data\.lexicon .*招式.txt:[23]: "):
        mix(config)
    assert not (tmp_path / "mixture").exists()
