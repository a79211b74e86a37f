import html
import json
import re
import shutil
import warnings
from collections import Counter

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from opencc import OpenCC

from wuxia_core import SpanMasker, mix, show, show_masks
from wuxia_core.config import PROJECT
from wuxia_core.corpus import RULES, Segmenter
from wuxia_core.corpus.words import idioms, typical
from wuxia_core.errors import DataError
from wuxia_core.masking import RANDOM, SPAN, Corruption
from wuxia_core.messages import messages
from wuxia_core.run import append, locked
from wuxia_core.show.masks import ACTIONS, mark_tokens
from wuxia_core.text import visible

PAYLOAD = (
    "<script>alert(1)</script><img src=x onerror=alert(1)></pre>\"'&剑光一闪，他使出白鹤亮翅。" * 4
)


def shown(page):
    """The text of a mask view's HTML, legend aside."""
    return html.unescape(re.sub(r"<[^>]+>", "", page.split("</div>")[0]))


def test_text_is_escaped_and_whole():
    page = show_masks(PAYLOAD, masker=SpanMasker(0.4))._repr_html_()
    assert "<script" not in page and "<img" not in page and "</pre" not in page
    assert shown(page) == PAYLOAD


def test_marks_and_counts_agree_with_the_masks():
    text = "他使一招白鹤亮翅，剑光到处，落叶纷飞，众人齐声喝彩。" * 6
    view = show_masks(text, key=3)
    assert re.sub("[〔〕【】]", "", str(view)) == text
    assert str(view).count("【") == len(blocks(view.kinds, SPAN))
    assert f"{int((view.kinds == SPAN).sum())} (" in view._repr_html_()
    assert str(show_masks(text, key=3)) == str(view)
    assert str(show_masks(text, key=3, epoch=1)) != str(view)


def blocks(kinds, kind):
    return np.flatnonzero(np.diff((kinds == kind).astype(int), prepend=0) == 1)


def test_tokens_that_share_a_character_mark_it_once():
    """龘 in three byte-level tokens, only the middle one masked: the character is marked."""
    kinds = np.array([0, 0, 1, 0, 0], np.int8)
    offsets = [(0, 1), (1, 2), (1, 2), (1, 2), (2, 3)]
    view = mark_tokens("甲龘乙", offsets, kinds, kinds, list("abcde"))
    assert str(view) == "甲〔龘〕乙"
    assert [segment.tip for segment in view.segments] == ["", "single: c", ""]


def test_a_rare_character_of_many_tokens_is_shown_whole(tokenizer):
    text = "𠮷龘🗡️" * 30
    assert len(tokenizer(text, add_special_tokens=False).input_ids) > len(text)
    view = show_masks(text, tokenizer, SpanMasker(0.3))
    assert visible(text) == re.sub("[〔〕【】]", "", str(view))
    assert "\ufffd" not in view._repr_html_()


def test_a_tip_names_kind_length_tokens_and_what_stands_in_their_place(tokenizer):
    text = "他使一招白鹤亮翅，剑光到处，落叶纷飞，众人齐声喝彩。" * 6
    every = show_masks(text, tokenizer)
    tip = next(segment.tip for segment in every.segments if segment.tip.startswith("span"))
    assert re.match(r"span of [345] tokens: \S+ #\d+(, \S+ #\d+)+$", tip)
    assert len(re.findall(r"#\d+", tip)) == int(tip.split()[2])
    random = Corruption.of(tokenizer, 1, (0.0, 1.0, 0.0))
    replaced = show_masks(text, tokenizer, corruption=random)
    assert np.array_equal(replaced.kinds, every.kinds)
    assert all(" → " in segment.tip for segment in replaced.segments if segment.tip)


def test_hidden_replaced_and_left_are_told_apart(tokenizer):
    text = "他使一招白鹤亮翅，剑光到处，落叶纷飞，众人齐声喝彩。" * 9
    view = show_masks(text, tokenizer, corruption=Corruption.of(tokenizer, 1, (0.4, 0.3, 0.3)))
    page = view._repr_html_()
    for action, name in ACTIONS.items():
        assert f">{name}</span> {int((view.actions == action).sum())} (" in page
    assert page.count("line-through") > 1 and page.count("background:transparent") > 1
    assert str(view).count("≠") >= len(blocks(view.actions, RANDOM)) > 0
    plain = show_masks(text, tokenizer)._repr_html_()
    assert "line-through" not in plain and "unchanged" not in plain


def test_spans_of_words_hide_a_move_whole(tokenizer):
    text = "他使一招白鹤亮翅，众人齐声喝彩。" * 8
    hidden = Counter()
    for key in range(40):
        view = show_masks(text, tokenizer, key=key, segmenter=Segmenter(["白鹤亮翅"]))
        for span in re.findall("【(.*?)】", str(view)):
            hidden.update(re.findall("[白鹤亮翅]+", span))
    assert set(hidden) == {"白鹤亮翅"}


def test_an_empty_text_is_refused():
    with pytest.raises(DataError, match="empty"):
        show_masks("")


def test_books_of_one_name_have_a_bar_each():
    index = pd.MultiIndex.from_tuples([("general", "雪"), ("wuxia", "雪")])
    ax = show.plot_bars(pd.DataFrame({"train": [30, 50]}, index), xlabel="字")
    assert len({bar.get_y() for bar in ax.patches}) == 2
    assert [label.get_text() for label in ax.get_yticklabels()] == ["雪", "雪"]


def test_plots_write_chinese_and_return_their_axes():
    books = [("general", "百科"), ("wuxia", "九两八钱"), ("wuxia", "鏢局")]
    index = pd.MultiIndex.from_tuples(books)
    sizes = pd.DataFrame({"validation": [30, 0, 50], "train": [0, 90, 0]}, index)
    row = {"name": "bits_per_char", "source": "wuxia", "unit": "bits/character"}
    scorecard = {"metrics": [row | {"delta": -0.2, "low": -0.3, "high": -0.1, "n": 9}]}
    metrics = pd.DataFrame({"step": [1, 2], "loss": [3.0, 2.0], "event": None})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        axes = [
            show.plot_bars(sizes, xlabel="字"),
            show.plot_kinds(SpanMasker().kinds(np.ones((4, 64), bool), range(4))),
            show.plot_lines(pd.DataFrame({"甲": [0.15, None, 0.4]}), xlabel="轮", ylabel="比"),
            show.plot_metric(metrics, ["loss"], ylabel="nats"),
            show.plot_scorecard(scorecard, "bits_per_char"),
            show.plot_typical(typical(Counter(江湖=9, 的=50), Counter(的=40, 电脑=7))),
        ]
        for ax in axes:
            assert not ax.figure.patch.get_visible() and ax.get_facecolor()[3] == 0
            ax.figure.canvas.draw()
    bars, _, lines, metric, scorecard, words = axes
    assert [text.get_text() for text in bars.get_yticklabels()] == ["百科", "九两八钱", "鏢局"]
    assert [bar.get_width() for bar in bars.containers[0]] == [0, 90, 0]
    assert lines.lines[0].get_xydata().tolist() == [[0, 0.15], [2, 0.4]]
    assert metric.lines[0].get_ydata().tolist() == [3.0, 2.0]
    assert scorecard.collections[0].get_segments()[0].tolist() == [[-0.3, 0], [-0.1, 0]]
    assert scorecard.lines[0].get_xdata().tolist() == [-0.2]
    assert [text.get_text() for text in words.get_yticklabels()][-1] == "江湖"
    assert [line.get_label() for line in words.lines] == ["武侠", "general text"]
    assert [text.get_text() for text in bars.get_legend().get_texts()] == ["train", "held out"]
    plt.close("all")


def test_a_scorecards_pictures_say_what_it_holds(short_run):
    scorecard = json.loads((short_run[0] / "scorecard.json").read_text(encoding="utf-8"))
    copied = show.plot_passages(scorecard, "copied", xlabel="characters", threshold=30)
    style = show.plot_passages(scorecard, "style", xlabel="logit", threshold=0)
    recovery = show.plot_scorecard(scorecard, "masked_accuracy")
    assert copied.lines[-1].get_xdata() == [30, 30]
    assert {tick.get_text().split(" (")[0] for tick in style.get_yticklabels()} == {
        "base", "base, after an example", "tuned", "people's text"}  # fmt: skip
    rows = [tick.get_text() for tick in recovery.get_yticklabels()]
    assert any(row.startswith("武侠, single (n = ") for row in rows)
    assert any(row.startswith("general text (n = ") for row in rows)
    assert "change" in {line.get_label() for line in recovery.lines}
    course = show.plot_forgetting(show.read_metrics(short_run[0]))
    assert course.lines[0].get_marker() == "s"
    assert len(course.lines[1].get_xdata()) > 1
    table = show.scorecard_table(scorecard).set_index(["source", "name"])
    row = next(row for row in scorecard["metrics"] if row["name"] == "burrows_delta")
    assert table.loc[("wuxia", "burrows_delta"), "human"] == row["human"]
    shown = show.side_by_side(scorecard)
    assert list(shown) == ["prompt", "base", "tuned", "human"] and len(shown) == 6
    assert show.copied_table(scorecard)["source"].str.contains("【").all()
    plt.close("all")


def test_a_metric_without_figures_has_its_reason():
    row = {"name": "style_strength", "source": "wuxia", "unit": "logit", "n": 3}
    row |= dict.fromkeys(["base", "tuned", "delta", "low", "high"]) | {"reason": "too few"}
    scorecard = {"metrics": [row, {**row, "source": "general", "reason": None}]}
    table = show.scorecard_table(scorecard)
    assert table["reason"].tolist() == ["too few", ""]
    (said,) = show.plot_scorecard(scorecard, "style_strength").texts
    assert said.get_text().startswith("Nothing to draw")
    plt.close("all")


def test_a_window_is_shown_text_by_text(config, tokenizer):
    mixture = mix(config)
    number = mixture.windows.loc[mixture.windows["window"].duplicated(), "window"].iloc[0]
    table = show.window_table(mixture, tokenizer, number)
    assert len(table) == (mixture.windows["window"] == number).sum() > 1
    book = mixture.outline["book"] == table["book"][0]
    assert mixture.documents[book]["text"].str.contains(table["text"][0][:20], regex=False).any()


def test_a_plot_can_be_drawn_on_given_axes():
    _, ax = plt.subplots()
    metrics = pd.DataFrame({"step": [1], "loss": [3.0], "event": None})
    assert show.plot_metric(metrics, ["loss"], ylabel="nats", ax=ax) is ax
    plt.close("all")


def test_a_text_all_of_whose_tokens_are_masked_is_shown(tokenizer):
    shown = {str(show_masks("剑", tokenizer, SpanMasker(0.3), key=key)) for key in range(40)}
    assert shown == {"剑", "〔剑〕"}


def test_the_course_of_a_run_shows_saves_restarts_and_the_best(tmp_path):
    """Killed at once, started again, killed at step 30, resumed at 20: 30 was done again."""
    bits = show.plots.WUXIA_BITS
    for row in ({"event": "started", "step": 0}, {"step": 0, bits: 8.0},
                {"event": "started", "step": 0}, {"step": 0, bits: 7.0}, {"step": 20, bits: 6.0},
                {"event": "checkpoint", "step": 20}, {"step": 30, bits: 1.0},
                {"event": "resumed", "step": 20}, {"step": 30, bits: 6.5},
                {"event": "checkpoint", "step": 30}):  # fmt: skip
        append(tmp_path, row)
        with (tmp_path / "metrics.jsonl").open("a") as file:
            file.write('5\n{"a": 1}\n{"step": 99, "lo')  # cut off; the next row has its own line
        with (tmp_path / "metrics.jsonl").open("ab") as file:
            file.write(b"\xff")
    metrics = show.read_metrics(tmp_path)
    ax = show.plot_metric(metrics, [bits], ylabel="bits")
    drawn = {line.get_label(): line.get_xydata().tolist() for line in ax.lines}
    assert drawn["held-out 武侠"] == [[0, 7.0], [20, 6.0], [30, 6.5]]
    assert drawn["kept"] == [[20, 6.0]]
    assert [x for x, _ in drawn["checkpoint"]] == [20, 30]
    assert [x for x, _ in drawn["restart"]] == [20]
    plt.close("all")


def test_tables_speak_the_readers_language_and_an_empty_one_says_so(monkeypatch):
    rows = pd.DataFrame({"source": ["wuxia"], "book": ["train"], "characters": [9]})
    monkeypatch.setenv("WUXIA_LANG", "zh")
    page = show.table(rows).to_html()
    assert re.findall(">([^<>]+)</t[hd]>", page) == ["来源", "书", "字数", "武侠", "train", "9"]
    assert "没有可以列出的内容" in show.table(rows[:0]).format({"x": "{:,}"}).to_html()


def test_each_rule_of_cleaning_is_told():
    assert list(messages("rules")) == list(RULES)


def test_sound_texts_get_one_word_of_advice(config):
    assert show.advice(mix(config), config) == ["All looks well; go on."]


def test_advice_names_what_to_mend(config, tmp_path, caplog):
    """A traditional book, a garbled paragraph, too little general text, and ten steps."""
    sample = PROJECT / "data" / "sample"
    for path in sample.glob("*.txt"):
        shutil.copy(path, tmp_path)
    text = (tmp_path / "三勺盐.txt").read_text(encoding="utf-8")
    (tmp_path / "三勺盐.txt").write_text(OpenCC("s2t").convert(text), encoding="utf-8")
    with (tmp_path / "九两八钱.txt").open("a", encoding="utf-8") as file:
        file.write("\n他拔剑\ufffd\ufffd而起，众人皆惊。")
    general = (sample / "general" / "百科.txt").read_text(encoding="utf-8")
    (tmp_path / "general.txt").write_text(general[:900], encoding="utf-8")
    (tmp_path / "射雕.mobi").write_bytes(b"x")
    config.data.data_dir, config.data.general_file = str(tmp_path), str(tmp_path / "general.txt")
    config.data.max_general_epochs, config.training.max_steps = 1e6, 10
    files, traditional, garbled, little, steps = show.advice(mix(config), config)
    assert files.startswith("1 of 4 files of novels")
    assert "「三勺盐」" in traditional and "data.to_simplified" in traditional
    assert "in traditional characters: 三勺盐; " in caplog.text
    assert "1 places" in garbled and "「九两八钱：" in garbled and "拔剑\ufffd" in garbled
    assert "general text" in little and "data.general_ratio" in little
    assert steps.startswith("Only 10 steps in all (")


def test_numbers_are_no_idioms():
    text = "一百二十人，二百一十人，十几年来，一五一十地说，万众一心，九牛二虎之力。"
    assert {"一五一十", "万众一心"} <= set(idioms([text])) <= {"一五一十", "万众一心", "九牛二虎"}
    said = show.listing(Counter(白鹤亮翅=2, 落帆听雨=1), "moves")
    assert said == "Moves: 2 different ones, 3 times; the commonest: 白鹤亮翅 2、落帆听雨 1"
    assert show.listing(Counter(), "moves") == "No moves (使一招…) were found."


def test_progress_counts_the_steps_and_the_time_left(config, tmp_path):
    """60 of 120 steps, two seconds each since the restart at step 40."""
    config.training.num_train_epochs = 10
    config.save(tmp_path / "config.yaml")
    rows = [{"event": "started", "step": 0, "time": 0}]
    rows.append({"event": "resumed", "step": 40, "time": 1000})
    assert "No step is logged" in show.progress(tmp_path, pd.DataFrame(rows))
    rows.append({"step": 60, "time": 1040, "epoch": 5.0})
    with locked(tmp_path):
        said = show.progress(tmp_path, pd.DataFrame(rows))
    assert said == "Step 60 of 120; 2.0 seconds a step, about 2 minutes to go."
    said = show.progress(tmp_path, pd.DataFrame(rows))
    assert said.startswith("Stopped at step 60 of 120") and "--resume" in said


@pytest.mark.parametrize("content", ["", '{"step": 0, "ti'])
def test_a_run_without_a_row_has_not_begun(tmp_path, content):
    (tmp_path / "metrics.jsonl").write_text(content)
    assert "No step is logged" in show.progress(tmp_path, show.read_metrics(tmp_path))


def test_a_run_that_was_just_resumed_has_the_rate_from_before(config, tmp_path):
    """Two seconds a step; resumed at step 20, where a measurement was still to be made."""
    config.training.num_train_epochs = 10
    config.save(tmp_path / "config.yaml")
    for row in ({"event": "started", "step": 0, "time": 0},
                {"step": 20, "time": 40, "epoch": 5 / 3, "loss": 3.0},
                {"event": "checkpoint", "step": 20, "time": 41},
                {"step": 30, "time": 60, "epoch": 2.5, "loss": 3.0},
                {"event": "resumed", "step": 20, "time": 1000},
                {"step": 20, "time": 1100, "epoch": 5 / 3, "eval_wuxia_loss": 3.0}):  # fmt: skip
        append(tmp_path, row)
        if row["time"] >= 1000:
            with locked(tmp_path):
                said = show.progress(tmp_path, show.read_metrics(tmp_path))
            assert said == "Step 20 of 120; 2.0 seconds a step, about 3 minutes to go."


def test_passages_of_each_measurement_are_shown():
    passages = [{"prompt": "剑光", "text": "一闪"}, {"prompt": "夜雨", "text": "敲窗"}]
    metrics = pd.DataFrame([{"step": 0, "passages": passages}, {"step": 5, "loss": 1.0}])
    shown = show.passages_table(metrics).to_dict("records")
    assert shown == [{"step": 0, "剑光": "一闪", "夜雨": "敲窗"}]
    assert show.passages_table(metrics[["step"]]).empty
