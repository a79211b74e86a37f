from collections import Counter

import numpy as np
import pandas as pd
import pytest
import torch

from wuxia_core import mix
from wuxia_core.evaluate.context import EvalContext
from wuxia_core.evaluate.copying import _by_document, extraction, score_extraction, stretches
from wuxia_core.mixing import TRAIN, VALIDATION
from wuxia_core.model import load_base


@pytest.fixture(scope="module")
def base():
    return load_base("data/tiny_base", torch.float32).eval()


SENTENCES = (
    "剑光一闪，那人已到了门外。雨下得很大，檐下的灯笼在风里摇晃，照见他腰间一截断剑。",
    "众人听了，一齐大笑。展昭道：“兄长不必多虑，小弟自有道理。”说罢，将身一纵，上房去了。",
)


def test_a_model_is_caught_saying_what_it_says(base, tokenizer, config):
    """A prefix and the model's own greedy 50 tokens are extracted, a human text is not."""
    ids = tokenizer(SENTENCES[0] * 3, add_special_tokens=False).input_ids
    ids = [tokenizer.eos_token_id, *ids[:50]]
    with torch.inference_mode():
        for _ in range(50):
            ids.append(int(base(torch.tensor([ids])).logits[0, -1].argmax()))
    own, human = ids[1:], tokenizer(SENTENCES[1] * 9, add_special_tokens=False).input_ids[:100]
    rows = [(True, 3, own), (True, 5, [*own[:-1], human[0]]), (False, 8, human)]
    table = extraction(EvalContext(base, tokenizer, None, config), rows)
    assert table["document"].tolist() == [3, 5, 8]
    assert table["trained"].tolist() == table["near"].tolist() == [True, True, False]


def test_stretches_are_spread_over_documents(tokenizer, config):
    config.evaluation.max_documents = 12
    context = EvalContext(None, tokenizer, mix(config), config)
    trained, held_out = (stretches(context, split) for split in (TRAIN, VALIDATION))
    assert trained == stretches(context, TRAIN) and len(trained) == 50
    assert all(flag for flag, *_ in trained) and not any(flag for flag, *_ in held_out)
    counts = Counter(document for _, document, _ in trained)
    assert len(counts) == 12 and max(counts.values()) - min(counts.values()) <= 1
    places = {(document, tuple(ids)) for _, document, ids in trained}
    assert len(places) == 50 and all(len(ids) == 100 for *_, ids in trained)
    text = dict(zip(counts, context.mixture.texts(list(counts)), strict=True))
    assert all(tokenizer.decode(ids)[5:-5] in text[number] for _, number, ids in trained)
    config.training.seed += 1
    assert {(document, tuple(ids)) for _, document, ids in stretches(context, TRAIN)} != places


def test_without_documents_there_are_no_stretches(tokenizer, config):
    config.data.val_ratio = 0
    assert stretches(EvalContext(None, tokenizer, mix(config), config), VALIDATION) == []


def test_without_stretches_the_row_has_a_reason(tokenizer, config, tmp_path):
    (tmp_path / "short").mkdir()
    (tmp_path / "short" / "a.txt").write_text(SENTENCES[0], encoding="utf-8")
    config.data.data_dir = str(tmp_path / "short")
    row = score_extraction(EvalContext(None, tokenizer, mix(config), config))
    assert (row["n"], row["delta"]) == (0, None) and row["reason"]


def test_prefixes_count_by_document_where_there_are_enough():
    """Five prefixes of each of six documents of a kind are six items, of one document five."""
    prefixes = pd.DataFrame({"document": np.repeat(range(6), 5), "near": True})
    tables = [prefixes.assign(trained=trained, prefixes=1) for trained in (True, False)]
    items = _by_document(pd.concat(tables))
    assert len(items) == 12 and (items["near"] == 5).all() and (items["prefixes"] == 5).all()
    assert len(_by_document(pd.concat([tables[0], tables[1].head(5)]))) == 35
