import nbformat
import pytest
import torch
from IPython.core.formatters import DisplayFormatter

from wuxia_core import SpanMasker, report, xray
from wuxia_core.corpus import Segmenter
from wuxia_core.model import load_base
from wuxia_core.show import GuessBox, MaskExplorer, XRayView, show_masks

TEXT = "他使一招白鹤亮翅，剑光到处，落叶纷飞，众人齐声喝彩。那老者大惊失色，抱头鼠窜。" * 4


@pytest.fixture
def explorer(tokenizer):
    return MaskExplorer(TEXT, tokenizer, SpanMasker(seed=7), characters=60)


@pytest.mark.parametrize(
    ("control", "value", "masker", "other"),
    [
        ("passage", 2, SpanMasker(seed=7), {"text": TEXT[60:120]}),
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
    assert "No such masks" in explorer.view.value
    explorer.mask_ratio.value = 0.15
    assert explorer.view.value == before


def test_the_last_passage_is_what_is_left(tokenizer):
    explorer = MaskExplorer(TEXT[:130], tokenizer, characters=60)
    explorer.passage.value = explorer.passage.max
    assert explorer.view.value == show_masks(TEXT[120:130], tokenizer)._repr_html_()
    assert "Too short" in MaskExplorer("", tokenizer).view.value


def test_without_widgets_the_view_is_shown(explorer, tmp_path):
    bundle, _ = DisplayFormatter().format(explorer)
    assert "application/vnd.jupyter.widget-view+json" in bundle
    assert explorer.view.value in bundle["text/html"]
    assert "passage 1; masked 0.15; in spans 0.5" in bundle["text/html"]
    output = nbformat.v4.new_output("execute_result", bundle)
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("x", outputs=[output])])
    nbformat.write(notebook, tmp_path / "x.ipynb")
    page = report.write_html(tmp_path / "x.ipynb").read_text(encoding="utf-8")
    assert "passage 1; masked" in page and "MaskExplorer" not in page and "<script" not in page


def test_a_typed_sentence_shows_its_masks_and_the_answers(tokenizer):
    model = load_base("data/tiny_base", torch.float32).eval()
    box = GuessBox(model, tokenizer, TEXT[:60], SpanMasker(seed=7))
    for box.text.value, box.draw.value in ((TEXT[:40], 0), (TEXT[20:60], 2)):
        text, masker, draw = box.text.value, SpanMasker(seed=7), box.draw.value
        answers = XRayView(xray(model, tokenizer, [text], masker, draw))._repr_html_()
        masks = show_masks(text, tokenizer, masker, draw)._repr_html_()
        assert box.view.value == masks + answers == box._repr_html_()
    box.text.value = ""
    assert "Too short" in box.view.value


def test_a_long_text_is_guessed_at_where_its_masks_are(tokenizer):
    box = GuessBox(load_base("data/tiny_base", "float32").eval(), tokenizer, TEXT * 4)
    masked = show_masks(TEXT * 4, tokenizer).kinds > 0
    assert len(masked) > 256 and f"of {masked.sum()} right" in box.view.value
