"""The plan against a count of every operation of a step, on tensors that have no values."""

import weakref

import numpy as np
import pytest
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry
from transformers import Qwen3Config, Qwen3ForCausalLM
from transformers.models.qwen3 import modeling_qwen3

from wuxia_core.config import PROJECT, load_config
from wuxia_core.model import add_adapter
from wuxia_core.preflight import plan
from wuxia_core.trainer import SummedCrossEntropy

pytestmark = pytest.mark.slow
RANK, TARGETS = 16, 614  # of 4 × 1,024 tokens 15 %
SIZES = {  # hidden, MLP, heads, whether the head is tied
    "Qwen/Qwen3-8B": (4096, 12_288, 32, False),
    "Qwen/Qwen3-4B": (2560, 9728, 32, True),
    "Qwen/Qwen3-0.6B": (1024, 3072, 16, True),
}
FREE = set(  # move nothing: views, and memory that is not filled
    "_unsafe_view alias as_strided detach device empty empty_like expand permute reshape select "  # noqa: SIM905
    "slice split squeeze t transpose unbind unsqueeze view".split()
)


class Count(TorchDispatchMode):
    """Bytes alive, and bytes and operations of the kernels, thin products as if elementwise."""

    def __init__(self, tensors):
        super().__init__()
        self.alive = self.peak = self.moved = self.operations = 0
        self._known = {}
        self._hold(tensors)

    def _hold(self, tensors):
        for storage in (tensor.untyped_storage() for tensor in tensors):
            key, size = storage._cdata, storage.nbytes()
            if key not in self._known:
                self._known[key] = weakref.ref(storage, lambda _, k=key, n=size: self._free(k, n))
                self.alive += size
        self.peak = max(self.peak, self.alive)

    def _free(self, key, size):
        del self._known[key]
        self.alive -= size

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        made = [leaf for leaf in tree_leaves(out) if torch.is_tensor(leaf)]
        self._hold(made)
        if (name := function._overloadpacket.__name__) in FREE:
            return out
        read = [leaf for leaf in tree_leaves((args, kwargs)) if torch.is_tensor(leaf)]
        thin = any(RANK in tensor.shape for tensor in [*read, *made])
        if function._overloadpacket in flop_registry and not (thin or "attention" in name):
            count = flop_registry[function._overloadpacket]
            self.operations += count(*args, **(kwargs or {}), out_val=out)
        else:
            self.moved += sum(map(stored, made if name == "embedding" else [*read, *made]))
        return out


def stored(tensor):
    """Bytes of a tensor, what is expanded once."""
    sizes = zip(tensor.shape, tensor.stride(), strict=True)
    return tensor.element_size() * torch.Size(n for n, step in sizes if step).numel()


def unreal(model):
    """Give a model on no device weights without values on the CPU, tied ones still tied."""
    known = {}
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, old in tensors.items():
                if old is not None and id(old) not in known:
                    new = torch.empty(old.shape, dtype=old.dtype)
                    trained = torch.nn.Parameter(new, requires_grad=old.requires_grad)
                    known[id(old)] = trained if tensors is module._parameters else new, old
                if old is not None:
                    tensors[name] = known[id(old)][0]
        if isinstance(module, BaseTunerLayer):
            module.cast_input_dtype_enabled = False
    return model


def as_on_a_card(monkeypatch):
    """Keep of dropout a mask of bytes, and of the hidden states a row a target."""

    def dropout(x, p, training=True, inplace=False):
        return torch.native_dropout(x, p, True)[0] if training and p else x

    def rows(states, _):
        return states.flatten(0, 1)[torch.zeros(TARGETS, dtype=torch.int64)]

    monkeypatch.setattr(torch.nn.functional, "dropout", dropout)
    monkeypatch.setattr(modeling_qwen3, "slice_logits_to_keep", rows)


def count_step(config, layers):
    """Count peak, traffic and operations of a step of two micro-batches.

    After one that made the optimizer's moments.
    """
    hidden, mlp, heads, tied = SIZES[config.model.model_name_or_path]
    sizes = Qwen3Config(hidden_size=hidden, intermediate_size=mlp, num_attention_heads=heads,
                        num_key_value_heads=8, head_dim=128, num_hidden_layers=layers,
                        tie_word_embeddings=tied, use_cache=False)  # fmt: skip
    with torch.device("meta"):
        base = Qwen3ForCausalLM(sizes).to(torch.bfloat16)
        model = add_adapter(base, config.model, 151_669)
    with FakeTensorMode():
        unreal(model).train()
        if config.training.gradient_checkpointing:
            how = {"use_reentrant": False}
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=how)
        optimizer = torch.optim.AdamW(filter(lambda w: w.requires_grad, model.parameters()))
        ids, targets = torch.zeros(4, 1024).long(), torch.zeros(TARGETS).long()
        with Count([*model.parameters(), *model.buffers()]) as count:
            for _ in range(2):
                count.peak = count.moved = count.operations = 0
                for _ in range(2):
                    with torch.autocast("cpu", torch.bfloat16):
                        logits = model(input_ids=ids).logits.float()  # as accelerate does
                        loss = SummedCrossEntropy.apply(logits, targets)
                    del logits
                    loss.backward()
                    del loss
                count.moved, moved = 0, count.moved  # a step's optimizer is not a token's
                optimizer.step()
                optimizer.zero_grad()
                count.moved = moved
    return np.array((count.peak, count.moved, count.operations))


@pytest.mark.parametrize("checkpointing", [True, False])
@pytest.mark.parametrize("name", SIZES)
def test_memory_and_traffic_of_a_step_are_those_that_are_counted(name, checkpointing, monkeypatch):
    as_on_a_card(monkeypatch)
    named = [f"model.model_name_or_path={name}", f"training.gradient_checkpointing={checkpointing}"]
    config = load_config(PROJECT / "configs" / "qwen3_8b_2x4090.yaml", named)
    shape, (few, more) = plan.read_shape(config.model), (count_step(config, n) for n in (2, 4))
    peak, moved, operations = few + (more - few) / 2 * (shape.num_hidden_layers - 2)
    needs = plan.memory(config, shape, plan.planned_device(config, 1))
    measuring = sum([*needs.values()][:2]) + plan.held_out_bytes(config, shape)
    largest = max(peak, measuring)  # which it is of the smallest, recomputed
    assert sum(needs.values()) - needs["reserve"] == pytest.approx(largest, rel=0.03)
    tokens = 2 * 4 * 1024
    config.data.max_length = 8  # nearly no attention, which is not among the large products
    (planned, traffic), _ = plan.token_costs(config, shape)
    assert planned == pytest.approx(operations / tokens, rel=0.03)
    assert traffic == pytest.approx(moved / tokens, rel=0.05)
