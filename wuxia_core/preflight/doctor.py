"""`launch_ddp.py --doctor`: asserts instead of hoping, in as many processes as a run would have.

torchrun --nproc-per-node 2 -m wuxia_core.preflight.doctor FOLDER   # config.yaml is in it

Prints a row a check, `ok`, `FAILED` or `–` for what cannot be looked at here; leaves with 5 where
one failed. `machine.py` holds the checks that need no model.
"""

import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from wuxia_core.config import Config, ModelConfig, load_config
from wuxia_core.errors import MachineError
from wuxia_core.masking import IGNORE_INDEX, model_inputs
from wuxia_core.model import add_adapter
from wuxia_core.objective import asked_cross_entropy
from wuxia_core.preflight import machine
from wuxia_core.preflight.checks import card_precautions
from wuxia_core.preflight.machine import Failed, Skipped, device

WAIT = timedelta(seconds=60)  # for the other ranks, within a check
FAILED, SKIPPED, OK = MARKS = ("FAILED", "–", "ok")  # worst first
MASK_ID = 255  # the last of the tiny model's tokens
Row = tuple[str, str, str]  # mark, what was found, what to do


def learns(config: Config) -> str:
    """See that lora_B, which starts at 0, moves in a step and that all weights stay finite."""
    model = tiny_model()
    half = torch.autocast(device().type, torch.bfloat16, enabled=config.training.bf16)
    with half:
        loss = step(model, batch(0), items=1)
    loss.backward()
    trained = [weights for weights in model.parameters() if weights.requires_grad]
    torch.optim.AdamW(trained, lr=config.training.learning_rate).step()
    if not all(bool(weights.isfinite().all()) for weights in model.parameters()):
        raise Failed("a weight is not finite after a step")
    moved = [bool(weights.any()) for name, weights in model.named_parameters() if "lora_B" in name]
    if not moved or not all(moved):
        raise Failed(f"{moved.count(False)} of {len(moved)} lora_B are still 0 after a step")
    return f"all {len(moved)} are ≠ 0 after a step, all weights finite"


def parity(_: Config) -> str:
    """See that all ranks together have one process's gradient, for unequal numbers of tokens."""
    size, rank = dist.get_world_size(), dist.get_rank()
    items = sum(int((batch(r)["labels"] != IGNORE_INDEX).sum()) for r in range(size))
    alone, shared = tiny_model(spread=0.1), tiny_model(spread=0.1)
    for r in range(size):
        step(alone, batch(r), items).backward()
    parallel = DistributedDataParallel(shared)
    (step(parallel, batch(rank), items) * size).backward()  # DDP averages; a step is a sum
    pairs = zip(gradients(shared), gradients(alone), strict=True)
    error = float(torch.stack([(a - b).norm() / b.norm() for a, b in pairs]).max())  # or NaN
    if not error < 1e-5:
        raise Failed(f"gradients of {size} processes and of one differ by {error:.1e}")
    return f"of {size} processes and of one agree to {error:.0e}"


def tiny_model(spread: float = 0.0) -> torch.nn.Module:
    """Make a random Qwen3 with an adapter, the same on every rank; `spread` is lora_B's."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    shape = {"hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 128, "head_dim": 16}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    settings = Qwen3Config(vocab_size=MASK_ID + 1, use_cache=False, **shape, **heads)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        base = Qwen3ForCausalLM(settings)
        model: torch.nn.Module = add_adapter(base, ModelConfig(lora_dropout=0), MASK_ID)
        for name, weights in model.named_parameters():
            if "lora_B" in name:  # where it is 0, so are lora_A's gradients
                weights.data.normal_(std=spread)
    return model.to(device())


def batch(rank: int) -> dict[str, torch.Tensor]:
    """Make masked windows (2, 32) for a rank: the higher, the more tokens are asked for."""
    generator = torch.Generator().manual_seed(rank)
    ids = torch.randint(0, MASK_ID, (2, 32), generator=generator)
    asked = torch.zeros(ids.shape, dtype=torch.bool)
    asked[:, 1 : 3 + 4 * (rank % 8)] = True
    labels = torch.where(asked, ids, IGNORE_INDEX)
    return model_inputs(torch.where(asked, MASK_ID, ids).numpy(), labels.numpy())


def step(model: torch.nn.Module, inputs: dict[str, torch.Tensor], items: int) -> torch.Tensor:
    """Compute the loss of a batch among `items` asked tokens."""
    inputs = {name: tensor.to(device()) for name, tensor in inputs.items()}
    labels = inputs.pop("labels")
    outputs = model(**inputs, use_cache=False)
    return asked_cross_entropy(outputs, labels, torch.tensor(items, device=labels.device))


def gradients(model: torch.nn.Module) -> list[torch.Tensor]:
    """Collect the gradients there are."""
    return [weights.grad for weights in model.parameters() if weights.grad is not None]


LINK = "set NCCL_P2P_DISABLE=1 and try again; NCCL_DEBUG=INFO says more; --nproc 1 needs no other"
CHECKS: dict[str, tuple[Callable[[Config], str], str]] = {  # with what to do where one fails
    "versions": (machine.versions, "pip install -e ."),
    "driver": (machine.driver, "install the driver and a torch built for it"),
    "processes": (machine.world, "look for a process that died"),
    "all_reduce": (machine.sums, LINK),
    "copies between cards": (machine.copies, "look at dmesg for Xid; train with --nproc 1"),
    "bfloat16": (machine.half, "set training.bf16=false"),
    "free memory": (machine.room, "stop what else runs, or see what --plan says to change"),
    "disk": (machine.disk, "free some, or name another training.output_dir"),
    "lora_B": (learns, "install torch and peft anew; is training.learning_rate too small?"),
    "gradients": (parity, "do not train in several processes here: --nproc 1"),
}


def examine(config: Config) -> Iterator[tuple[str, Row]]:
    """Run every check on every rank; yield its name and the row of the rank that fares worst."""
    size = dist.get_world_size()
    # its own group: that of the checks may be broken, and the others may wait there meanwhile
    talk = dist.new_group(backend="gloo", timeout=4 * WAIT)
    for name in CHECKS:
        rows: list[Row] = [("", "", "")] * size
        dist.all_gather_object(rows, look(name, config), group=talk)
        rank = min(range(size), key=lambda r: MARKS.index(rows[r][0]))
        mark, found, remedy = rows[rank]
        yield name, (mark, f"rank {rank}: {found}" if mark == FAILED else found, remedy)


def look(name: str, config: Config) -> Row:
    """Run one check on this rank."""
    check, remedy = CHECKS[name]
    try:
        return OK, check(config), ""
    except Skipped as why:
        return SKIPPED, str(why), ""
    except Failed as error:
        return FAILED, str(error), error.remedy or remedy
    except (RuntimeError, OSError, ValueError, ImportError, subprocess.SubprocessError) as error:
        return FAILED, (str(error) or type(error).__name__).splitlines()[0], remedy


def join() -> None:
    """Meet the other ranks, as a run does."""
    on_card = torch.cuda.is_available()
    card_precautions()
    os.environ.setdefault("TORCH_NCCL_BLOCKING_WAIT", "1")  # a hang raises; else it aborts
    if on_card:
        torch.cuda.set_device(device())
    dist.init_process_group("nccl" if on_card else "gloo", timeout=WAIT)


def show(name: str, row: Row) -> None:
    """Print a row."""
    mark, found, remedy = row
    print(f"{mark:7}{name:22}{found}{' → ' if remedy else ''}{remedy}", flush=True)


def main() -> None:
    """Print a row a check; leave with 5 where one failed."""
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    config = load_config(Path(sys.argv[1]) / "config.yaml")
    try:
        join()
    except RuntimeError as error:
        show("processes", (FAILED, str(error).splitlines()[0], LINK))
        sys.exit(MachineError.exit_status)
    rank, failed = dist.get_rank(), False
    if rank == 0:
        show("check", ("", "what was found", "what to do"))
    for name, row in examine(config):
        failed |= row[0] == FAILED
        if rank == 0:
            show(name, row)
    dist.destroy_process_group()
    sys.exit(MachineError.exit_status if failed else 0)


if __name__ == "__main__":
    main()
