import nbformat
import pytest
from IPython.core.formatters import DisplayFormatter

from wuxia_core import SpanMasker, report
from wuxia_core.corpus import Segmenter
from wuxia_core.errors import DataError
from wuxia_core.show import MaskExplorer, read_beginnings, show_masks

TEXT = "他使一招白鹤亮翅，剑光到处，落叶纷飞，众人齐声喝彩。那老者大惊失色，抱头鼠窜。" * 4
BOOKS = {"甲": TEXT, "乙": "话说大明年间，苇渡镇上有一家镖局，掌柜的姓陆，使一口单刀。" * 8}


@pytest.fixture
def explorer(tokenizer):
    return MaskExplorer(BOOKS, tokenizer, SpanMasker(seed=7), characters=60)


@pytest.mark.parametrize(
    ("control", "value", "masker", "other"),
    [
        ("passage", 2, SpanMasker(seed=7), {"text": TEXT[60:120]}),
        ("book", "乙", SpanMasker(seed=7), {"text": BOOKS["乙"][:60]}),
        ("mask_ratio", 0.3, SpanMasker(0.3, seed=7), {}),
        ("span_ratio", 1.0, SpanMasker(span_ratio=1, seed=7), {}),
        ("span_length", (2, 2), SpanMasker(span_length=(2, 2), seed=7), {}),
        ("epoch", 3, SpanMasker(seed=7), {"epoch": 3}),
        ("draw", 1, SpanMasker(seed=7), {"key": 1}),
        ("unit", "word", SpanMasker(seed=7), {"segmenter": Segmenter()}),
    ],
)
def test_a_control_changes_the_view(explorer, tokenizer, control, value, masker, other):
    before = explorer.view.value
    getattr(explorer, control).value = value
    text = other.pop("text", TEXT[:60])
    assert explorer.view.value == show_masks(text, tokenizer, masker, **other)._repr_html_()
    assert explorer.view.value != before


def test_what_cannot_be_arranged_is_said_and_can_be_undone(explorer):
    before = explorer.view.value
    explorer.mask_ratio.value = 0.95
    assert "masking.mask_ratio 0.95: must lie in" in explorer.view.value
    explorer.mask_ratio.value = 0.15
    assert explorer.view.value == before


def test_a_shorter_book_has_fewer_passages(tokenizer):
    explorer = MaskExplorer(BOOKS | {"丙": "一段短文。" * 4}, tokenizer, characters=60)
    explorer.passage.value = 3
    explorer.book.value = "丙"
    assert (explorer.passage.value, explorer.passage.max) == (1, 1)
    assert explorer.view.value == show_masks("一段短文。" * 4, tokenizer)._repr_html_()


def test_without_widgets_the_view_is_shown(explorer, tmp_path):
    bundle, _ = DisplayFormatter().format(explorer)
    assert "application/vnd.jupyter.widget-view+json" in bundle
    assert explorer.view.value in bundle["text/html"]
    assert "book 甲; passage 1; masked 0.15; in spans 0.5" in bundle["text/html"]
    output = nbformat.v4.new_output("execute_result", bundle)
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("x", outputs=[output])])
    nbformat.write(notebook, tmp_path / "x.ipynb")
    page = report.export(tmp_path / "x.ipynb").read_text(encoding="utf-8")
    assert "book 甲; passage 1" in page and "MaskExplorer" not in page and "<script" not in page


def test_books_without_text_are_left_out(tokenizer):
    explorer = MaskExplorer({"空": "", "甲": TEXT}, tokenizer)
    assert explorer.book.label == "甲"
    with pytest.raises(DataError, match="no book with text"):
        MaskExplorer({"空": ""}, tokenizer)


def test_beginnings_are_of_the_novel_and_its_neighbours(tmp_path, caplog):
    for name in ("乙", "甲"):
        (tmp_path / f"{name}.txt").write_text(f"<p>{name}" + TEXT, encoding="utf-8")
    (tmp_path / "丙.txt").write_bytes(bytes(range(256)) * 40)
    found = read_beginnings(tmp_path / "甲.txt", characters=50)
    assert list(found) == ["甲", "乙"] and found["甲"].strip() == "甲" + TEXT[:46]
    assert "丙.txt" in caplog.text and "left out" in caplog.text
