"""`launch_ddp.py --doctor`: checks the machine in as many processes as a run would have.

torchrun --nproc-per-node 2 -m wuxia_core.preflight.doctor FOLDER   # config.yaml is in it

Prints a row a check, `ok`, `FAILED` or `–` for what cannot be checked here; exits with 5 where one
failed. Memory and disk are the plan's and `prepare_run`'s to check.
"""

import itertools
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from transformers.utils.logging import disable_progress_bar

from wuxia_core.config import TINY_BASE, Config, ModelConfig, load_config
from wuxia_core.errors import MachineError, exit_status
from wuxia_core.model import add_adapter, best_device, load_base
from wuxia_core.preflight.prepare import set_nccl_for_rtx40

WAIT = timedelta(seconds=60)  # for the other ranks, within a check
FAILED, SKIPPED, OK = MARKS = ("FAILED", "–", "ok")  # worst first
NUMBERS = 1_000_000  # summed over the ranks, copied between cards
SHARED = 2**28  # bytes of /dev/shm that NCCL may want; a container has 64 MiB unless told
PROBE_SECONDS = 90.0  # for cards to copy, before that counts as a hang


class Skipped(Exception):
    """Says why a check cannot be made here."""


def check_all_reduce(_: Config) -> str:
    """See that all_reduce sums."""
    values = torch.full((NUMBERS,), float(dist.get_rank() + 1), device=device())
    dist.all_reduce(values)
    size = dist.get_world_size()
    if not bool((values == size * (size + 1) / 2).all()):
        raise RuntimeError("the sum is wrong")
    return f"{NUMBERS:,} sums over {size} ranks are exact, by {dist.get_backend()}"


def check_copies(_: Config) -> str:
    """See that what goes from card to card arrives, or that a run does without direct copies.

    They are tried in a process of its own, since some drivers hang in them.
    """
    if torch.cuda.device_count() < 2:
        raise Skipped("needs two GPUs")
    if dist.get_rank() > 0:
        return "rank 0 looks"
    off = os.environ.get("NCCL_P2P_DISABLE", "0") != "0"
    command = [sys.executable, "-c", "from wuxia_core.preflight import doctor; doctor.copy()"]
    try:
        subprocess.run(command, check=True, timeout=PROBE_SECONDS)
    except subprocess.SubprocessError as error:
        found = "hang" if isinstance(error, subprocess.TimeoutExpired) else "wrong"
        if not off:
            raise RuntimeError(found) from None
        return f"{found}, and NCCL makes none"
    return "right; NCCL_P2P_DISABLE=0 lifts the precaution" if off else "right"


def copy() -> None:
    """Copy random numbers from each card to each other."""
    for a, b in itertools.permutations(range(torch.cuda.device_count()), 2):
        sent = torch.rand(NUMBERS, device=f"cuda:{a}")
        if not torch.equal(sent.cpu(), sent.to(f"cuda:{b}").cpu()):
            sys.exit(f"wrong from card {a} to card {b}")


def check_shared_memory(_: Config) -> str:
    """See that there is room in /dev/shm, through which NCCL passes what goes from card to card."""
    if torch.cuda.device_count() < 2:
        raise Skipped("needs two GPUs")
    free = shutil.disk_usage("/dev/shm").free
    if free < SHARED:
        raise RuntimeError(f"/dev/shm has {free / 2**20:,.0f} MiB free")
    return f"/dev/shm has {free / 2**20:,.0f} MiB free"


def check_bf16(config: Config) -> str:
    """See that the device multiplies in bfloat16, where the run asks for it."""
    if not config.training.bf16:
        raise Skipped("training.bf16 is false")
    random = torch.Generator().manual_seed(0)
    a, b = (torch.rand(256, 256, generator=random).to(device()) for _ in range(2))
    error = float(((a.bfloat16() @ b.bfloat16()).float() - a @ b).norm() / (a @ b).norm())
    if not error < 1e-2:
        raise RuntimeError(f"a product is wrong by {error:.2%}")
    return f"a product is right to {error:.2%}"


def check_lora_updates(config: Config) -> str:
    """See that lora_B, which starts at 0, moves in a step and stays finite."""
    model = tiny_model()
    with torch.autocast(device().type, torch.bfloat16, enabled=config.training.bf16):
        loss = compute_loss(model, windows(0), items=1)
    loss.backward()
    torch.optim.AdamW(model.parameters(), lr=config.training.learning_rate).step()
    updated = [w for name, w in model.named_parameters() if "lora_B" in name]
    failed = sum(not (w.any() and w.isfinite().all()) for w in updated)
    if failed:
        raise RuntimeError(f"{failed} of {len(updated)} are still 0, or not finite, after a step")
    return f"all {len(updated)} are ≠ 0 and finite after a step"


def check_gradients(_: Config) -> str:
    """See that all ranks together have one process's gradient, for unequal numbers of tokens."""
    size = dist.get_world_size()
    batches = [windows(rank) for rank in range(size)]
    items = sum(batch[:, 1:].numel() for batch in batches)  # nothing predicts a first token
    alone, shared = tiny_model(spread=0.1), tiny_model(spread=0.1)
    for batch in batches:
        compute_loss(alone, batch, items).backward()
    parallel = DistributedDataParallel(shared)
    loss = compute_loss(parallel, batches[dist.get_rank()], items)
    (loss * size).backward()  # DDP averages; a step is a sum
    pairs = zip(shared.parameters(), alone.parameters(), strict=True)
    trained = [(a.grad, b.grad) for a, b in pairs if a.requires_grad]
    error = float(torch.stack([(a - b).norm() / b.norm() for a, b in trained]).max())  # or NaN
    if not error < 1e-5:
        raise RuntimeError(f"those of {size} processes and of one differ by {error:.1e}")
    return f"of {size} processes and of one agree to {error:.0e}"


def tiny_model(spread: float = 0.0) -> Any:
    """Load the bundled base with an adapter, the same on every rank; `spread` is lora_B's."""
    base = load_base(str(TINY_BASE), "float32")
    torch.manual_seed(0)
    model = add_adapter(base, ModelConfig(lora_dropout=0), mask_id=1)
    for name, weights in model.named_parameters():
        if "lora_B" in name:  # where it is 0, so are lora_A's gradients
            weights.data.normal_(std=spread)
    return model.to(device())


def windows(rank: int) -> torch.Tensor:
    """Make token ids for a rank, (2, tokens): the higher, the more tokens."""
    random = torch.Generator().manual_seed(rank)
    ids = torch.randint(2, 1000, (2, 32 + 4 * (rank % 8)), generator=random)
    ids[:, 0] = 1  # the mask token, whose row is trained
    return ids.to(device())


def compute_loss(model: Any, input_ids: torch.Tensor, items: int) -> Any:
    """Compute the loss of a batch, as a share of a step with `items` target tokens."""
    inputs = {"input_ids": input_ids, "labels": input_ids, "num_items_in_batch": items}
    return model(**inputs, use_cache=False).loss


def device() -> torch.device:
    """Where this rank computes."""
    return torch.device(best_device())


LINK = "set NCCL_P2P_DISABLE=1 and try again; NCCL_DEBUG=INFO says more; --nproc 1 needs no other"
CHECKS: dict[str, tuple[Callable[[Config], str], str]] = {  # with what to do where one fails
    "all_reduce": (check_all_reduce, LINK),
    "copies between cards": (check_copies, "set NCCL_P2P_DISABLE=1; dmesg may name an Xid"),
    "shared memory": (check_shared_memory, "docker run --shm-size=1g"),
    "bfloat16": (check_bf16, "set training.bf16=false"),
    "lora_B": (check_lora_updates, "install torch and peft anew; is learning_rate too small?"),
    "gradients": (check_gradients, "do not train in several processes here: --nproc 1"),
}


def run_check(name: str, config: Config) -> tuple[str, str]:
    """Run one check on this rank; give its mark and what it found."""
    check, remedy = CHECKS[name]
    try:
        return OK, check(config)
    except Skipped as reason:
        return SKIPPED, str(reason)
    except (RuntimeError, OSError, ValueError, MachineError) as error:
        found = (str(error) or type(error).__name__).splitlines()[0]
        return FAILED, f"rank {dist.get_rank()}: {found} → {remedy}"


def init_process_group() -> None:
    """Meet the other ranks, as a run does; raises `MachineError`."""
    set_nccl_for_rtx40()
    os.environ.setdefault("TORCH_NCCL_BLOCKING_WAIT", "1")  # a hang raises; else it aborts
    try:
        if device().type == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("nccl" if device().type == "cuda" else "gloo", timeout=WAIT)
    except RuntimeError as error:
        raise MachineError(f"{str(error).splitlines()[0]} → {LINK}") from None


def main() -> None:
    """Print a row a check, that of the rank that fares worst; exit with 5 where one failed."""
    disable_progress_bar()  # of the bundled base, which is loaded for several checks
    config = load_config(Path(sys.argv[1]) / "config.yaml")
    init_process_group()
    # its own group: that of the checks may be broken, and the others may wait there meanwhile
    group = dist.new_group(backend="gloo", timeout=4 * WAIT)
    rows, marks = [("", "")] * dist.get_world_size(), set()
    for name in CHECKS:
        dist.all_gather_object(rows, run_check(name, config), group)
        mark, found = min(rows, key=lambda row: MARKS.index(row[0]))
        marks.add(mark)
        if dist.get_rank() == 0:
            print(f"{mark:7}{name:22}{found}", flush=True)
    dist.destroy_process_group()
    sys.exit(MachineError.exit_status if FAILED in marks else 0)


if __name__ == "__main__":
    sys.exit(exit_status(main))
