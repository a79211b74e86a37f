import numpy as np
import pandas as pd
import pytest
import torch

from wuxia_core.evaluate.context import EvalContext
from wuxia_core.evaluate.copying import _by_document, _spread, extraction
from wuxia_core.model import load_base


@pytest.fixture(scope="module")
def base():
    return load_base("data/tiny_base", torch.float32).eval()


@pytest.fixture
def context(base, tokenizer, config):
    return EvalContext(base, tokenizer, None, config)


SENTENCES = (
    "剑光一闪，那人已到了门外。雨下得很大，檐下的灯笼在风里摇晃，照见他腰间一截断剑。",
    "众人听了，一齐大笑。展昭道：“兄长不必多虑，小弟自有道理。”说罢，将身一纵，上房去了。",
)


def test_extraction_has_a_row_a_prefix(context):
    documents = [SENTENCES[0] * 12, "太短。", SENTENCES[1] * 9]
    table = extraction(context, documents, count=3)
    assert table.columns.tolist() == ["document", "near"] and len(table) == 3
    assert set(table["document"]) == {0, 2}  # one of each before a second of any
    pd.testing.assert_frame_equal(extraction(context, documents, count=3), table)


def test_a_model_is_caught_saying_what_it_says(context, base, tokenizer):
    """A prefix and the model's own greedy 50 tokens are extracted, a human text is not."""
    ids = tokenizer(SENTENCES[0] * 3, add_special_tokens=False).input_ids
    ids = [tokenizer.eos_token_id, *ids[:50]]
    with torch.inference_mode():
        for _ in range(50):
            ids.append(int(base(torch.tensor([ids])).logits[0, -1].argmax()))
    own = tokenizer.decode(ids[1:])
    assert tokenizer(own, add_special_tokens=False).input_ids == ids[1:]
    documents = [own, own[:-1] + "龘", SENTENCES[1] * 9]
    table = extraction(context, documents, count=3)
    assert table["document"].tolist() == [0, 1, 2]
    assert table["near"].tolist() == [True, True, False]


def test_prefixes_are_spread_over_documents():
    slots = [3, 0, *[1] * 9]
    assert len({document for document, _ in _spread(slots, 5, 0)}) == 5
    assert len({document for document, _ in _spread(slots, 11, 0)}) == 10
    assert len(set(_spread(slots, 99, 0))) == 12
    assert _spread(slots, 12, 0) == _spread(slots, 12, 0)
    assert _spread([], 4, 0) == []


def test_nothing_long_enough_gives_no_rows(context):
    assert extraction(context, ["太短。"], count=4).empty


def test_prefixes_count_by_document_where_there_are_enough():
    """Five prefixes of each of six documents of a kind are six items, of one document five."""
    prefixes = pd.DataFrame({"document": np.repeat(range(6), 5), "near": True})
    tables = [prefixes.assign(trained=trained, prefixes=1) for trained in (True, False)]
    items = _by_document(pd.concat(tables))
    assert len(items) == 12 and (items["near"] == 5).all() and (items["prefixes"] == 5).all()
    assert len(_by_document(pd.concat([tables[0], tables[1].head(5)]))) == 35
