import html
import json
import re
import warnings
from collections import Counter

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from wuxia_core import SpanMasker, mix, show, show_masks
from wuxia_core.corpus import Segmenter
from wuxia_core.corpus.words import typical
from wuxia_core.errors import DataError
from wuxia_core.masking import RANDOM, SPAN, Corruption
from wuxia_core.run import append
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


def test_plots_write_chinese_and_return_their_axes():
    sizes = pd.DataFrame(
        {"train": [0, 90, 0], "validation": [30, 0, 50]}, ["百科", "九两八钱", "鏢局"]
    )
    card = {"metrics": [{"name": "bits_per_char", "source": "wuxia", "delta": -0.2, "low": -0.3,
                         "high": -0.1, "n": 9, "unit": "bits/character"}]}  # fmt: skip
    metrics = pd.DataFrame({"step": [1, 2], "loss": [3.0, 2.0], "event": None})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        axes = [
            show.plot_bars(sizes, xlabel="字"),
            show.plot_kinds(SpanMasker().kinds(np.ones((4, 64), bool), range(4))),
            show.plot_lines(pd.DataFrame({"甲": [0.15, None, 0.4]}), xlabel="轮", ylabel="比"),
            show.plot_metric(metrics, {"loss": "训练"}, ylabel="nats"),
            show.plot_scorecard(card, "bits_per_char"),
            show.plot_typical(typical(Counter(江湖=9, 的=50), Counter(的=40, 电脑=7))),
        ]
        for ax in axes:
            assert ax.figure.get_facecolor() == (1, 1, 1, 1)
            ax.figure.canvas.draw()
    bars, _, lines, metric, scorecard, words = axes
    assert [text.get_text() for text in bars.get_yticklabels()] == ["百科", "九两八钱", "鏢局"]
    assert [bar.get_width() for bar in bars.containers[0]] == [0, 90, 0]
    assert lines.lines[0].get_xydata().tolist() == [[0, 0.15], [2, 0.4]]
    assert metric.lines[0].get_ydata().tolist() == [3.0, 2.0]
    assert scorecard.collections[0].get_segments()[0].tolist() == [[-0.3, 0], [-0.1, 0]]
    assert scorecard.lines[0].get_xdata().tolist() == [-0.2]
    assert [text.get_text() for text in words.get_yticklabels()][-1] == "江湖"
    assert [line.get_label() for line in words.lines] == ["wuxia", "general"]
    plt.close("all")


def test_a_scorecards_pictures_say_what_it_holds(short_run):
    card = json.loads((short_run[0] / "scorecard.json").read_text(encoding="utf-8"))
    copied = show.plot_passages(card, "copied", xlabel="characters", threshold=30)
    style = show.plot_passages(card, "style", xlabel="logit", threshold=0)
    recovery = show.plot_scorecard(card, "masked_accuracy")
    assert copied.lines[-1].get_xdata() == [30, 30]
    assert {tick.get_text().split(" ")[0] for tick in style.get_yticklabels()} == {
        "base", "few_shot", "tuned", "human"}  # fmt: skip
    rows = [tick.get_text() for tick in recovery.get_yticklabels()]
    assert any(row.startswith("wuxia, single (n = ") for row in rows)
    assert any(row.startswith("general (n = ") for row in rows)
    assert "delta" in {line.get_label() for line in recovery.lines}
    course = show.plot_forgetting(show.read_metrics(short_run[0]))
    assert course.lines[0].get_marker() == "s"
    assert len(course.lines[1].get_xdata()) > 1
    table = show.scorecard_table(card).set_index(["source", "name"])
    row = next(row for row in card["metrics"] if row["name"] == "burrows_delta")
    assert table.loc[("wuxia", "burrows_delta"), "human"] == row["human"]
    shown = show.side_by_side(card)
    assert list(shown) == ["prompt", "base", "tuned", "human"] and len(shown) == 6
    assert show.copied_table(card)["source"].str.contains("【").all()
    plt.close("all")


def test_a_metric_without_figures_has_its_reason():
    row = {"name": "style_strength", "source": "wuxia", "unit": "logit", "n": 3}
    row |= dict.fromkeys(["base", "tuned", "delta", "low", "high"]) | {"reason": "too few"}
    card = {"metrics": [row, {**row, "source": "general", "reason": None}]}
    table = show.scorecard_table(card)
    assert table["reason"].tolist() == ["too few", ""]
    assert len(show.plot_scorecard(card, "style_strength").lines[0].get_xdata()) == 0
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
    assert show.plot_metric(metrics, {"loss": "x"}, ylabel="nats", ax=ax) is ax
    plt.close("all")


def test_a_text_all_of_whose_tokens_are_masked_is_shown(tokenizer):
    shown = {str(show_masks("剑", tokenizer, SpanMasker(0.3), key=key)) for key in range(40)}
    assert shown == {"剑", "〔剑〕"}


def test_the_course_of_a_run_shows_saves_restarts_and_the_best(tmp_path):
    """A killed attempt got to step 30; the second went on from 20 and did 30 again."""
    bits = show.plots.BEST
    for row in ({"event": "started", "step": 0}, {"step": 0, bits: 7.0}, {"step": 20, bits: 6.0},
                {"event": "checkpoint", "step": 20}, {"step": 30, bits: 1.0},
                {"event": "resumed", "step": 20}, {"step": 30, bits: 6.5},
                {"event": "checkpoint", "step": 30}):  # fmt: skip
        append(tmp_path, row)
        with (tmp_path / "metrics.jsonl").open("a") as file:
            file.write('{"step": 99, "lo')  # cut off; the next row stands on a line of its own
    metrics = show.read_metrics(tmp_path)
    ax = show.plot_metric(metrics, {bits: "留出"}, ylabel="bits")
    drawn = {line.get_label(): line.get_xydata().tolist() for line in ax.lines}
    assert drawn["留出"] == [[0, 7.0], [20, 6.0], [30, 6.5]]
    assert drawn["best"] == [[20, 6.0]]
    assert [x for x, _ in drawn["checkpoint"]] == [20, 30]
    assert [x for x, _ in drawn["restart"]] == [20]
    plt.close("all")
