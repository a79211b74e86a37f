import html
import math
import re

import numpy as np
import pandas as pd
import pytest
import torch

from wuxia_core import SpanMasker, show, show_masks, xray
from wuxia_core.config import ModelConfig
from wuxia_core.corpus import Segmenter
from wuxia_core.corpus.words import CONTENT, FUNCTION, IDIOM, PUNCTUATION, classes, dialogue
from wuxia_core.errors import DataError
from wuxia_core.model import add_adapter, load_base
from wuxia_core.text import visible

TEXT = "他使一招白鹤亮翅，剑光到处，落叶纷飞，众人齐声道：“好功夫！”无不大惊失色。\n" * 4
MASK = 1


@pytest.fixture(scope="module")
def base():
    return load_base("data/tiny_base", torch.float32).eval()


@pytest.fixture(scope="module")
def adapted():
    model = add_adapter(load_base("data/tiny_base", torch.float32), ModelConfig(), MASK).eval()
    generator = torch.Generator().manual_seed(0)
    for name, weights in model.named_parameters():
        if "lora_B" in name:
            weights.data = 0.02 * torch.randn(weights.shape, generator=generator)
    return model


def test_losses_and_guesses_are_those_of_all_logits(base, tokenizer):
    reading = xray(base, tokenizer, [TEXT], key=3)
    encoded = tokenizer(TEXT, add_special_tokens=False).input_ids
    ids = torch.tensor([tokenizer.eos_token_id, *encoded])
    masked = torch.tensor(np.append(0, show_masks(TEXT, tokenizer, key=3).kinds)) > 0
    with torch.no_grad():
        logits = base(torch.where(masked, MASK, ids)[None], use_cache=False).logits[0]
    log2 = torch.log_softmax(logits, -1)[masked.nonzero()[:, 0] - 1] / math.log(2)
    bits = -log2.gather(1, ids[masked][:, None])[:, 0]
    assert np.allclose(reading.tokens["base_bits"], bits, atol=1e-4)
    assert reading.tokens["base_right"].tolist() == (log2.argmax(-1) == ids[masked]).tolist()
    best = log2.topk(5).values.exp2()
    shares = [[share for _, share in row] for row in reading.tokens["base_guesses"]]
    assert np.allclose(shares, best, atol=1e-5)
    assert reading.tokens["base_guesses"][0][0][0] == tokenizer.decode([log2[0].argmax()])


def test_a_model_that_knows_nothing_loses_the_logarithm_of_the_vocabulary(tokenizer):
    blank = load_base("data/tiny_base", torch.float32).eval()
    blank.model.norm.weight.data.zero_()
    bits = xray(blank, tokenizer, [TEXT]).tokens["base_bits"]
    assert np.allclose(bits, math.log2(blank.config.vocab_size))


def test_base_is_the_model_without_its_adapter(base, adapted, tokenizer):
    alone, both = xray(base, tokenizer, [TEXT]), xray(adapted, tokenizer, [TEXT])
    assert alone.models == ("base",) and both.models == ("base", "tuned")
    assert np.allclose(alone.tokens["base_bits"], both.tokens["base_bits"], atol=1e-5)
    assert not np.allclose(both.tokens["base_bits"], both.tokens["tuned_bits"], atol=1e-3)


def test_batches_and_other_texts_change_nothing(base, tokenizer):
    texts = [TEXT[:90], TEXT, TEXT[40:]]
    together = xray(base, tokenizer, texts).tokens
    one_by_one = pd.concat(xray(base, tokenizer, [t], key=n).tokens for n, t in enumerate(texts))
    second = xray(base, tokenizer, texts[1:2], key=1).tokens
    assert np.allclose(together["base_bits"], one_by_one["base_bits"], atol=1e-4)
    assert np.allclose(together[together["text"] == 1]["base_bits"], second["base_bits"], atol=1e-4)


def test_a_long_text_is_cut_into_windows(base, tokenizer):
    tokens = len(tokenizer(TEXT * 9, add_special_tokens=False).input_ids)
    rows = xray(base, tokenizer, [TEXT * 9], window=64).tokens
    assert abs(len(rows) - 0.15 * tokens) < tokens / 64 + 2
    assert rows["end"].max() > len(TEXT) * 8


def test_each_character_has_its_class():
    found = classes("他大惊失色，剑法了得。", Segmenter()).tolist()
    idiom = [IDIOM] * 4
    assert found == [FUNCTION, *idiom, PUNCTUATION, CONTENT, CONTENT, FUNCTION, FUNCTION, 0]
    assert IDIOM in classes("白鹤亮翅", Segmenter(["白鹤亮翅"]))
    assert IDIOM not in classes("白鹤亮翅", Segmenter())


@pytest.mark.parametrize(
    ("text", "spoken"),
    [
        ("他道：“走！”\n「好」，“没说完\n天亮了。", "走！好没说完"),
        ("“他说「走」\n天亮了。", "他说「走」"),
        ('他说"走"然后走了。她笑"好"便去。', "走好"),
    ],
)
def test_dialogue_is_what_stands_in_quotation_marks(text, spoken):
    said = [c for c, inside in zip(text, dialogue(text), strict=True) if inside]
    assert "".join(said) == spoken


def test_the_summary_counts_every_token_once_by_class_and_once_by_speech(adapted, tokenizer):
    reading = xray(adapted, tokenizer, [TEXT], SpanMasker(0.4))
    table = reading.summary().set_index("")
    spoken = table.index.isin(["dialogue", "narration"])
    assert table[~spoken]["tokens"].sum() == table[spoken]["tokens"].sum() == len(reading.tokens)
    mean = (table["base bits"] * table["tokens"])[spoken].sum() / len(reading.tokens)
    assert mean == pytest.approx(reading.tokens["base_bits"].mean())
    assert {"dialogue", "narration", "punctuation", "content word"} <= set(table.index)


def test_spans_are_ordered_by_what_tuning_did_to_them(adapted, tokenizer):
    spans = xray(adapted, tokenizer, [TEXT, TEXT], SpanMasker(0.4)).spans()
    assert spans["change"].is_monotonic_increasing
    assert np.allclose(spans["change"], spans["tuned"] - spans["base"])
    view = show_masks(TEXT, tokenizer, SpanMasker(0.4))
    inside = {span.partition("【")[2].partition("】")[0] for span in spans["span"]}
    assert set(re.findall("【(.*?)】", str(view), re.DOTALL)) <= inside
    assert all(re.sub("[【】]", "", span) in TEXT for span in spans["span"])


def test_the_view_shows_text_and_guesses_and_escapes_them(adapted, tokenizer):
    text = "<script>alert(1)</script>\u202e剑光一闪，“好！”" * 8
    reading = xray(adapted, tokenizer, [text])
    page = show.XRayView(reading)._repr_html_()
    assert "<script" not in page and "\u202e" not in page
    assert re.search(r"title=\"(single|span), [\d.]+ bits · ", page)
    columns = page.split("</div></div>")[:2]
    for model, column in zip(("base", "tuned"), columns, strict=True):
        guesses = re.findall("<rt[^>]*>(.*?)</rt>", column)
        best = [row[0][0] for row in reading.tokens[f"{model}_guesses"]]
        assert [html.unescape(guess) for guess in guesses] == [
            visible(guess.replace("\n", "↵")) for guess in best
        ]
        assert (
            f"<b>{model}</b> {reading.tokens[f'{model}_right'].sum()} of {len(best)} right" in page
        )
        shown = html.unescape(re.sub("<rt.*?</rt>|<[^>]+>", "", column))
        assert shown.endswith(visible(text))


def test_what_is_right_is_filled_and_what_is_wrong_is_not(base, tokenizer):
    reading = xray(base, tokenizer, [TEXT], SpanMasker(0.4))
    page = show.XRayView(reading)._repr_html_()
    filled = page.partition("<p ")[0].count("background:rgba")
    assert filled == reading.tokens["base_right"].sum()
    assert page.count("<ruby") == len(reading.tokens)


def test_texts_too_short_for_a_mask_are_refused(base, tokenizer):
    with pytest.raises(DataError, match="no token is masked"):
        xray(base, tokenizer, ["剑"], SpanMasker(0.01))
    with pytest.raises(DataError, match="no token is masked"):
        xray(base, tokenizer, [])
