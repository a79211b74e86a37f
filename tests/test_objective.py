from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from wuxia_core import trainer
from wuxia_core.config import ModelConfig
from wuxia_core.masking import IGNORE_INDEX, model_inputs
from wuxia_core.model import add_adapter, load_base
from wuxia_core.trainer import masked_cross_entropy


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return add_adapter(load_base("data/tiny_base", torch.float32), ModelConfig(), 1).eval()


def batch(rng, rows, length, share):
    ids = rng.integers(10, 8000, (rows, length))
    targets = rng.random((rows, length)) < share
    targets[:, 0] = False
    return model_inputs(np.where(targets, 1, ids), np.where(targets, ids, IGNORE_INDEX))


def loss_of(model, inputs, items):
    labels = inputs["labels"]
    outputs = model(input_ids=inputs["input_ids"], logits_to_keep=inputs["logits_to_keep"])
    return masked_cross_entropy(outputs, labels, items)


@pytest.mark.parametrize("share", [0.02, 0.15, 0.6])
def test_equals_the_loss_over_all_logits(model, share):
    inputs = batch(np.random.default_rng(1), 3, 48, share)
    labels = inputs["labels"]
    with torch.no_grad():
        logits = model(input_ids=inputs["input_ids"]).logits
        full = F.cross_entropy(
            logits[:, :-1].reshape(-1, logits.shape[-1]),
            labels[:, 1:].reshape(-1),
            ignore_index=IGNORE_INDEX,
        )
        ours = loss_of(model, inputs, (labels != IGNORE_INDEX).sum())
    assert ours.item() == pytest.approx(full.item(), abs=1e-5)


def test_only_target_positions_reach_the_vocabulary(model):
    inputs = batch(np.random.default_rng(2), 2, 64, 0.15)
    outputs = model(input_ids=inputs["input_ids"], logits_to_keep=inputs["logits_to_keep"])
    assert outputs.logits.shape == ((inputs["labels"] != IGNORE_INDEX).sum(), 8192)


def test_the_logit_before_a_token_scores_it():
    """Logits that are sure of token t + 1 at position t: loss 0 there, and only there."""
    ids = torch.tensor([[5, 6, 7, 8]])
    sure = F.one_hot(torch.tensor([6, 7, 8, 5]), 10).float() * 100  # (T, V)
    for target in range(1, 4):
        labels = torch.full((1, 4), IGNORE_INDEX)
        labels[0, target] = ids[0, target]
        keep = model_inputs(ids.numpy(), labels.numpy())["logits_to_keep"]
        assert keep.nonzero().tolist() == [[0, target - 1]]
        outputs = SimpleNamespace(logits=sure[None][keep])
        assert masked_cross_entropy(outputs, labels, torch.tensor(1)).item() == pytest.approx(0)
        wrong = SimpleNamespace(logits=sure[None][keep.roll(1, 1)])
        assert masked_cross_entropy(wrong, labels, torch.tensor(1)).item() > 50


def test_accumulated_parts_sum_to_the_whole_with_unequal_counts(model):
    rng = np.random.default_rng(3)
    parts = [batch(rng, 1, 40, share) for share in (0.05, 0.5, 0.0)]
    items = sum((part["labels"] != IGNORE_INDEX).sum() for part in parts)
    whole = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    with torch.no_grad():
        accumulated = sum(loss_of(model, part, items).item() for part in parts)
        assert accumulated == pytest.approx(loss_of(model, whole, items).item(), abs=1e-5)


@pytest.mark.parametrize("items", [0, 7])
def test_a_batch_without_targets_has_a_zero_gradient(model, items):
    inputs = batch(np.random.default_rng(4), 1, 16, 0.0)
    loss = loss_of(model, inputs, torch.tensor(items))
    loss.backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert loss.item() == 0
    assert gradients and all(not gradient.any() for gradient in gradients)
    model.zero_grad()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradient_written_over_the_logits_is_the_usual_one(dtype, monkeypatch):
    monkeypatch.setattr(trainer, "LOSS_LOGITS", 3 * 50)  # three rows at a time
    torch.manual_seed(0)
    logits, labels = 4 * torch.randn(8, 50), torch.tensor([[IGNORE_INDEX, *range(8)]])
    usual = logits.clone().to(dtype).requires_grad_()
    loss = F.cross_entropy(usual.float(), labels[0, 1:], reduction="sum") / 20
    (3 * loss).backward()
    leaf = logits.clone().to(dtype).requires_grad_()
    outputs = SimpleNamespace(logits=leaf * 1)
    ours = masked_cross_entropy(outputs, labels, torch.tensor(20))
    (3 * ours).backward()
    torch.testing.assert_close(ours, loss)
    torch.testing.assert_close(leaf.grad, usual.grad)
    assert outputs.logits.data_ptr() != leaf.data_ptr()
    assert not outputs.logits.isclose(usual).all()  # no second table
