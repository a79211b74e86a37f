import html
import json
import re
import warnings
from collections import Counter

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from wuxia_core import SpanMasker, show, show_masks
from wuxia_core.corpus import Segmenter
from wuxia_core.corpus.words import typical
from wuxia_core.errors import DataError
from wuxia_core.masking import REPLACED, SPAN, Corruption
from wuxia_core.run import append
from wuxia_core.show.masks import ACTIONS, masked_text
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
    view = masked_text("甲龘乙", offsets, kinds, kinds, list("abcde"))
    assert [(p.start, p.end, p.kind) for p in view.pieces] == [(0, 1, 0), (1, 2, 1), (2, 3, 0)]
    assert view.pieces[1].tip == "single: c"


def test_a_rare_character_of_many_tokens_is_shown_whole(tokenizer):
    text = "𠮷龘🗡️" * 30
    assert len(tokenizer(text, add_special_tokens=False).input_ids) > len(text)
    view = show_masks(text, tokenizer, SpanMasker(0.3))
    assert visible(text) == re.sub("[〔〕【】]", "", str(view))
    assert "\ufffd" not in view._repr_html_()


def test_a_tip_names_kind_length_tokens_and_what_stands_in_their_place(tokenizer):
    text = "他使一招白鹤亮翅，剑光到处，落叶纷飞，众人齐声喝彩。" * 6
    every = show_masks(text, tokenizer)
    tip = next(piece.tip for piece in every.pieces if piece.kind == SPAN)
    assert re.match(r"span of [345] tokens: \S+ #\d+(, \S+ #\d+)+$", tip)
    assert len(re.findall(r"#\d+", tip)) == int(tip.split()[2])
    random = Corruption.of(tokenizer, 1, (0.0, 1.0, 0.0))
    replaced = show_masks(text, tokenizer, corruption=random)
    assert np.array_equal(replaced.kinds, every.kinds)
    assert all(" → " in piece.tip for piece in replaced.pieces if piece.kind)


def test_hidden_replaced_and_left_are_told_apart(tokenizer):
    text = "他使一招白鹤亮翅，剑光到处，落叶纷飞，众人齐声喝彩。" * 9
    view = show_masks(text, tokenizer, corruption=Corruption.of(tokenizer, 1, (0.4, 0.3, 0.3)))
    page = view._repr_html_()
    for action, name in ACTIONS.items():
        assert f">{name}</span> {int((view.actions == action).sum())} (" in page
    assert page.count("line-through") > 1 and page.count("background:transparent") > 1
    assert str(view).count("≠") >= len(blocks(view.actions, REPLACED)) > 0
    plain = show_masks(text, tokenizer)._repr_html_()
    assert "line-through" not in plain and "left as it is" not in plain


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
    documents = pd.DataFrame(
        {"source": ["wuxia"] * 2 + ["general"], "book": ["九两八钱", "鏢局", "百科"],
         "split": ["train", "validation", "unused"], "characters": [90, 50, 30]}
    )  # fmt: skip
    report = pd.DataFrame({"source": ["wuxia", "general"], "tokens": [90, 10], "share": [0.9, 0.1]})
    card = {"metrics": [{"name": "bits_per_char", "source": "wuxia", "delta": -0.2, "low": -0.3,
                         "high": -0.1, "n": 9, "unit": "bits/character"}]}  # fmt: skip
    metrics = pd.DataFrame({"step": [1, 2], "loss": [3.0, 2.0], "event": None})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        axes = [
            show.plot_books(documents),
            show.plot_lengths(documents),
            show.plot_mixture(report, 0.1),
            show.plot_kinds(SpanMasker().kinds(np.ones((4, 64), bool), range(4))),
            show.plot_metric(metrics, {"loss": "训练"}, "nats"),
            show.plot_scorecard(card, "bits_per_char"),
            show.plot_coverage(np.array([0.15, 0.28]), 0.15),
            show.plot_typical(typical(Counter(江湖=9, 的=50), Counter(的=40, 电脑=7))),
        ]
        for ax in axes:
            assert ax.figure.get_facecolor() == (1, 1, 1, 1)
            ax.figure.canvas.draw()
    assert [text.get_text() for text in axes[0].get_yticklabels()] == ["百科", "九两八钱", "鏢局"]
    assert axes[4].lines[0].get_ydata().tolist() == [3.0, 2.0]
    plt.close("all")


def test_a_scorecards_pictures_say_what_it_holds(sample_run):
    card = json.loads((sample_run[0] / "scorecard.json").read_text(encoding="utf-8"))
    copied, style, recovery = (
        f(card) for f in (show.plot_copied, show.plot_style, show.plot_recovery)
    )
    assert copied.lines[-1].get_xdata() == [30, 30]
    assert [tick.get_text().split("\n")[0] for tick in style.get_xticklabels()] == [
        "base", "base after an example", "tuned", "held-out human text"]  # fmt: skip
    assert any("span of 3" in tick.get_text() for tick in recovery.get_yticklabels())
    places = show.plot_map(card)
    assert len(places.lines) == 6
    course = show.plot_forgetting(show.read_metrics(sample_run[0]))
    assert course.lines[1].get_marker() == "s"
    table = show.scorecard_table(card)
    assert table["unit"].str.contains("classifier: ").any()
    assert not table["name"].str.startswith("masked_accuracy, ").any()
    assert {"wits, reading", "whole_spans, span of 3"} <= set(table["name"])
    shown = show.side_by_side(card)
    assert list(shown) == ["prompt", "base", "tuned", "human"] and len(shown) == 6
    assert show.copied_table(card)["source"].str.contains("【").all()
    plt.close("all")


def test_a_plot_can_be_drawn_on_given_axes():
    _, ax = plt.subplots()
    metrics = pd.DataFrame({"step": [1], "loss": [3.0], "event": None})
    assert show.plot_metric(metrics, {"loss": "x"}, "nats", ax=ax) is ax
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
    ax = show.plot_metric(metrics, {bits: "留出"}, "bits")
    drawn = {line.get_label(): line.get_xydata().tolist() for line in ax.lines}
    assert drawn["留出"] == [[0, 7.0], [20, 6.0], [30, 6.5]]
    assert drawn["best"] == [[20, 6.0]]
    assert [x for x, _ in drawn["checkpoint"]] == [20, 30]
    assert [x for x, _ in drawn["restart"]] == [20, 20]
    both = show.plot_runs({"甲": metrics, "empty": metrics.iloc[:0]}, bits, "bits")
    assert [len(line.get_xydata()) for line in both.lines] == [3, 0]
    plt.close("all")
