"""`launch_ddp.py --doctor`: asserts instead of hoping, in as many processes as a run would have.

Each check says what it found; one that fails says what to do. torchrun starts it.
"""

import itertools
import os
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator
from datetime import timedelta
from importlib.metadata import requires, version
from pathlib import Path

import torch
import torch.distributed as dist
from packaging.requirements import Requirement
from torch.nn.parallel import DistributedDataParallel

from wuxia_core.config import Config, ModelConfig, load_config
from wuxia_core.errors import MachineError
from wuxia_core.masking import IGNORE_INDEX, model_inputs
from wuxia_core.model import add_adapter
from wuxia_core.objective import asked_cross_entropy
from wuxia_core.preflight.memory import GIB

PACKAGES = {"torch", "transformers", "peft", "accelerate"}
NUMBERS = 1_000_000  # summed over the ranks
SPACE = 2 * GIB  # of disk


class Failed(Exception):
    """A check that failed: what was found, and what to do."""


def versions(_: Config) -> str:
    """See that library versions are those the project asks for."""
    asked = [Requirement(line) for line in requires("wuxia-core") or []]
    found = {r.name: version(r.name) for r in asked if r.name in PACKAGES}
    for requirement in asked:
        name = requirement.name
        if name in found and not requirement.specifier.contains(found[name]):
            raise Failed(f"{name} {found[name]}: pip install '{requirement}'")
    return ", ".join(f"{name} {number}" for name, number in found.items())


def world(_: Config) -> str:
    """See that every rank is there."""
    size, asked = dist.get_world_size(), int(os.environ["WORLD_SIZE"])
    ranks: list[int] = [0] * size
    dist.all_gather_object(ranks, dist.get_rank())
    if size != asked or ranks != list(range(asked)):
        raise Failed(f"ranks {ranks} of {asked}: look for a process that died")
    return f"{size} processes, {dist.get_backend()}, rank 0 on {device()}"


def sums(_: Config) -> str:
    """See that all_reduce sums."""
    values = torch.full((NUMBERS,), float(dist.get_rank() + 1), device=device())
    dist.all_reduce(values)
    size = dist.get_world_size()
    if not bool((values == size * (size + 1) / 2).all()):
        raise Failed("all_reduce gives a wrong sum: set NCCL_P2P_DISABLE=1 and try again")
    return f"{NUMBERS:,} numbers over {size} ranks are right"


def copies(_: Config) -> str:
    """See that what is copied from card to card arrives."""
    cards = torch.cuda.device_count()
    if cards < 2:
        return "needs two GPUs; not checked"
    for a, b in itertools.permutations(range(cards), 2):
        sent = torch.rand(NUMBERS, device=f"cuda:{a}")
        if not torch.equal(sent.cpu(), sent.to(f"cuda:{b}").cpu()):
            raise Failed(f"what card {a} sends to card {b} arrives wrong: set NCCL_P2P_DISABLE=1")
    return f"right between {cards} cards"


def half(config: Config) -> str:
    """See that the device multiplies in bfloat16, where the run asks for it."""
    if not config.training.bf16:
        return "not asked for"
    a, b = (torch.rand(256, 256, device=device()) for _ in range(2))
    error = ((a.bfloat16() @ b.bfloat16()).float() - a @ b).norm() / (a @ b).norm()
    if error > 0.02:
        raise Failed(f"a product is off by {float(error):.1%}: set training.bf16=false")
    return f"a product is right to {float(error):.2%}"


def room(config: Config) -> str:
    """See that there is memory, and disk where the run folder will be."""
    folder = Path(config.training.output_dir).absolute()
    there = next(path for path in (folder, *folder.parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise Failed(f"{there} cannot be written into: name another training.output_dir")
    disk = shutil.disk_usage(there).free
    if disk < SPACE:
        raise Failed(f"{disk / GIB:.1f} GiB of disk at {there}: free some, 2 GiB at least")
    if torch.cuda.is_available():
        memory = torch.cuda.mem_get_info()[0]
    else:
        memory = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return f"{memory / GIB:.1f} GiB of memory free, {disk / GIB:.0f} GiB of disk at {there}"


def learns(_: Config) -> str:
    """See that lora_B, which starts at 0, moves in a step and stays finite."""
    model = tiny_model()
    step(model, batch(0), items=1).backward()
    torch.optim.SGD([w for w in model.parameters() if w.requires_grad], lr=1.0).step()
    moved = [w for name, w in model.named_parameters() if "lora_B" in name]
    if not all(bool(w.isfinite().all()) and bool(w.any()) for w in moved):
        raise Failed("lora_B is still 0 or not finite after a step: install torch anew")
    return f"all {len(moved)} are ≠ 0 after a step"


def parity(_: Config) -> str:
    """See that all ranks together have one process's gradient, for unequal numbers of tokens."""
    size, rank = dist.get_world_size(), dist.get_rank()
    items = sum(int((batch(r)["labels"] != IGNORE_INDEX).sum()) for r in range(size))
    alone, shared = tiny_model(), tiny_model()
    for number in range(size):
        step(alone, batch(number), items).backward()
    parallel = DistributedDataParallel(shared)
    (step(parallel, batch(rank), items) * size).backward()
    pairs = [
        (mine.grad, theirs.grad)
        for mine, theirs in zip(alone.parameters(), shared.parameters(), strict=True)
        if mine.grad is not None and theirs.grad is not None
    ]
    error = max(float((a - b).norm() / b.norm().clamp(min=1e-12)) for a, b in pairs)
    if error > 1e-4:
        raise Failed(f"gradients differ by {error:.1e}: do not train on several devices here")
    return f"gradients of {size} processes and of one agree to {error:.0e}"


def device() -> torch.device:
    """Where this rank computes."""
    cuda = torch.cuda.is_available()
    return torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")


def tiny_model() -> torch.nn.Module:
    """Make a random Qwen3 of 2 layers with an adapter, the same on every rank."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    shape = {"hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 128, "head_dim": 16}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    config = Qwen3Config(vocab_size=256, use_cache=False, **shape, **heads)
    model: torch.nn.Module = add_adapter(Qwen3ForCausalLM(config), ModelConfig(lora_dropout=0), 255)
    for name, weights in model.named_parameters():
        if "lora_A" in name:
            weights.data.normal_(std=0.1)
    return model.to(device())


def batch(rank: int) -> dict[str, torch.Tensor]:
    """Make masked windows for a rank: the higher, the more tokens are asked for."""
    generator = torch.Generator().manual_seed(rank)
    ids = torch.randint(0, 250, (2, 32), generator=generator)
    asked = torch.rand(ids.shape, generator=generator) < 0.1 * (rank % 5 + 1)
    asked[:, 0], asked[:, 1] = False, True
    labels = torch.where(asked, ids, IGNORE_INDEX)
    return model_inputs(torch.where(asked, 255, ids).numpy(), labels.numpy())


def step(model: torch.nn.Module, inputs: dict[str, torch.Tensor], items: int) -> torch.Tensor:
    """Compute the loss of a batch among `items` asked tokens."""
    inputs = {name: tensor.to(device()) for name, tensor in inputs.items()}
    labels = inputs.pop("labels")
    outputs = model(**inputs, use_cache=False)
    return asked_cross_entropy(outputs, labels, torch.tensor(items, device=labels.device))


CHECKS: dict[str, Callable[[Config], str]] = {
    "versions": versions, "processes": world, "all_reduce": sums, "copies between cards": copies,
    "bfloat16": half, "memory and disk": room, "lora_B": learns, "gradients": parity,
}  # fmt: skip


def examine(config: Config) -> Iterator[tuple[str, str, bool]]:
    """Run every check on every rank: name, what was found (by a rank that fails, if any), ok."""
    for name, check in CHECKS.items():
        try:
            mine = (check(config), True)
        except (Failed, RuntimeError) as error:
            mine = (str(error), False)
        every: list[tuple[str, bool]] = [mine] * dist.get_world_size()
        dist.all_gather_object(every, mine)
        words, ok = min(every, key=lambda found: found[1])
        yield name, words, ok


def main() -> None:
    """Print a line a check; leave with 5 where one failed."""
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    config = load_config(Path(sys.argv[1]) / "config.yaml")
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    if backend == "nccl":
        torch.cuda.set_device(device())
    dist.init_process_group(backend, timeout=timedelta(seconds=60))
    failed = 0
    for name, words, ok in examine(config):
        failed += not ok
        if dist.get_rank() == 0:
            print(f"{'ok' if ok else 'FAILED':7}{name:22}{words}", flush=True)
    dist.destroy_process_group()
    sys.exit(MachineError.exit_status if failed else 0)


if __name__ == "__main__":
    main()
