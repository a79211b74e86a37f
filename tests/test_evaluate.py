import json
import math

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F

from wuxia_core import bits_per_char
from wuxia_core.errors import DataError
from wuxia_core.evaluate.__main__ import main
from wuxia_core.evaluate.scoring import document_bits
from wuxia_core.evaluate.statistics import METRICS, compare
from wuxia_core.model import load_base

TEXT = "剑光一闪，那人已到了门外。雨下得很大，檐下的灯笼在风里摇晃，照见他腰间一截断剑。"


@pytest.fixture(scope="module")
def base():
    return load_base("data/tiny_base", torch.float32).eval()


def test_a_uniform_model_needs_log2_of_its_vocabulary_a_token(base, tokenizer):
    uniform = load_base("data/tiny_base", torch.float32).eval()
    with torch.no_grad():
        uniform.get_input_embeddings().weight.zero_()  # tied: every logit is 0
    texts = [TEXT * 20, TEXT]
    tokens = sum(len(ids) for ids in tokenizer(texts, add_special_tokens=False).input_ids)
    expected = tokens * math.log2(8192) / sum(map(len, texts))
    assert bits_per_char(uniform, tokenizer, texts, window=64) == pytest.approx(expected, rel=1e-6)


def test_a_short_text_equals_a_plain_forward_pass(base, tokenizer):
    ids = [tokenizer.eos_token_id, *tokenizer(TEXT, add_special_tokens=False).input_ids]
    with torch.no_grad():
        logits = base(torch.tensor([ids])).logits[0, :-1]
    nats = F.cross_entropy(logits, torch.tensor(ids[1:]), reduction="sum").item()
    expected = nats / math.log(2) / len(TEXT)
    assert bits_per_char(base, tokenizer, [TEXT]) == pytest.approx(expected, rel=1e-5)


def test_batches_and_neighbours_change_nothing(base, tokenizer):
    texts = [TEXT * 7, TEXT, TEXT[:20] * 11]
    together = document_bits(base, tokenizer, texts, 64, batch_size=5)
    alone = [document_bits(base, tokenizer, [text], 64, batch_size=1) for text in texts]
    assert np.allclose(together["bits"], [table["bits"].iloc[0] for table in alone], rtol=1e-5)
    assert together["chars"].tolist() == [len(text) for text in texts]


def test_characters_are_counted_after_composition(base, tokenizer):
    assert document_bits(base, tokenizer, ["e\u0301"], 64, 1)["chars"].tolist() == [1]


def test_empty_texts_are_refused(base, tokenizer):
    with pytest.raises(DataError, match="empty"):
        bits_per_char(base, tokenizer, [""])
    with pytest.raises(DataError, match="empty"):
        bits_per_char(base, tokenizer, [])


def scores(bits):
    return pd.DataFrame({"bits": bits, "chars": [100] * len(bits)})


def test_the_difference_and_its_interval():
    rng = np.random.default_rng(0)
    base = rng.normal(600, 100, 40)
    row = compare(scores(base), scores(base - rng.normal(20, 5, 40)), METRICS[0], seed=0)
    assert row["delta"] == pytest.approx(-0.2, abs=0.03)
    assert row["low"] < row["delta"] < row["high"] < 0
    assert row["high"] - row["low"] < 0.06  # paired: the spread between documents falls out
    same = compare(scores(base), scores(base), METRICS[0], seed=0)
    assert (same["delta"], same["low"], same["high"], same["n"]) == (0, 0, 0, 40)


def test_too_few_documents_give_null_and_a_reason():
    row = compare(scores([1.0] * 4), scores([1.0] * 4), METRICS[0], seed=0)
    assert row["delta"] is None and row["base"] is None
    assert row["reason"] == "4 held-out documents, fewer than 5"


def test_the_scorecard_of_the_sample(sample_run):
    folder, _ = sample_run
    card = json.loads((folder / "scorecard.json").read_text(encoding="utf-8"))
    assert set(card) >= {"base", "adapter", "metrics"}
    rows = {(row["source"], row["name"]): row for row in card["metrics"]}
    assert len(rows) == 6
    for row in rows.values():
        assert row["low"] <= row["delta"] <= row["high"]
        assert row["delta"] == pytest.approx(row["tuned"] - row["base"])
        assert row["n"] >= 5 and row["unit"]
    assert rows["wuxia", "masked_loss"]["high"] < 0  # it learned what it was trained on
    assert 5 < rows["wuxia", "bits_per_char"]["base"] < 9


def test_gate_is_not_there_yet(capsys, tmp_path):
    assert main([str(tmp_path), "--gate"]) == 2
    assert main([str(tmp_path)]) == 3
    assert "no finished adapter" in capsys.readouterr().err
