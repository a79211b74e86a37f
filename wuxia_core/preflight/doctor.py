"""`launch_ddp.py --doctor`: checks the machine in as many processes as a run would have.

torchrun --nproc-per-node 2 -m wuxia_core.preflight.doctor FOLDER   # config.yaml is in it

Prints a row a check: `ok`, `FAILED`, or `–` where a check cannot be made on this machine. Exits
with 5 where a check failed. Memory and disk are checked by `plan` and `prepare_run`.
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
NUMBERS = 1_000_000  # that are summed over the ranks, or copied from one GPU to another
SHARED_MEMORY = 2**28  # bytes of /dev/shm that NCCL may want; a container has 64 MiB by default
PROBE_SECONDS = 90.0  # that the GPUs may take to copy; after these the copies hang


class Skipped(Exception):
    """A check cannot be made on this machine; the message says why."""


def check_all_reduce(_: Config) -> str:
    """Check that `all_reduce` gives the exact sum over the ranks.

    Like all checks it returns what it found, and raises `RuntimeError` with the fault, or
    `Skipped`.
    """
    values = torch.full((NUMBERS,), float(dist.get_rank() + 1), device=device())
    dist.all_reduce(values)
    size = dist.get_world_size()
    if not bool((values == size * (size + 1) / 2).all()):
        raise RuntimeError("the sum is wrong")
    return f"{NUMBERS:,} sums over {size} ranks are exact, by {dist.get_backend()}"


def check_copies(_: Config) -> str:
    """Check that copies from GPU to GPU arrive whole, unless NCCL is told to make none.

    Another process tries them, on rank 0 alone, since some drivers hang in them.
    """
    if torch.cuda.device_count() < 2:
        raise Skipped("needs two GPUs")
    if dist.get_rank() > 0:
        return "rank 0 looks"
    off = os.environ.get("NCCL_P2P_DISABLE", "0") != "0"
    code = "from wuxia_core.preflight import doctor; doctor.copy_between_cards()"
    try:
        subprocess.run([sys.executable, "-c", code], check=True, timeout=PROBE_SECONDS)
    except subprocess.SubprocessError as error:
        fault = "hang" if isinstance(error, subprocess.TimeoutExpired) else "wrong"
        if not off:
            raise RuntimeError(fault) from None
        return f"{fault}, and NCCL makes none"
    return "right; NCCL_P2P_DISABLE=0 lifts the precaution" if off else "right"


def copy_between_cards() -> None:
    """Copy random numbers from each GPU to each other; end the process where they differ."""
    for a, b in itertools.permutations(range(torch.cuda.device_count()), 2):
        numbers = torch.rand(NUMBERS, device=f"cuda:{a}")
        if not torch.equal(numbers.cpu(), numbers.to(f"cuda:{b}").cpu()):
            sys.exit(f"wrong from card {a} to card {b}")


def check_shared_memory(_: Config) -> str:
    """Check that /dev/shm has room, through which NCCL passes what goes from GPU to GPU."""
    if torch.cuda.device_count() < 2:
        raise Skipped("needs two GPUs")
    free = shutil.disk_usage("/dev/shm").free
    if free < SHARED_MEMORY:
        raise RuntimeError(f"/dev/shm has {free / 2**20:,.0f} MiB free")
    return f"/dev/shm has {free / 2**20:,.0f} MiB free"


def check_bf16(config: Config) -> str:
    """Check that the device multiplies in bfloat16, where the run trains in it."""
    if not config.training.bf16:
        raise Skipped("training.bf16 is false")
    random = torch.Generator().manual_seed(0)
    a, b = (torch.rand(256, 256, generator=random).to(device()) for _ in range(2))
    error = float(((a.bfloat16() @ b.bfloat16()).float() - a @ b).norm() / (a @ b).norm())
    if not error < 1e-2:
        raise RuntimeError(f"a product is wrong by {error:.2%}")
    return f"a product is right to {error:.2%}"


def check_lora_updates(config: Config) -> str:
    """Check that all of LoRA's B, which start at 0, are changed by a step and stay finite."""
    model = tiny_model()
    with torch.autocast(device().type, torch.bfloat16, enabled=config.training.bf16):
        loss = compute_loss(model, random_batch(0), targets=1)
    loss.backward()
    torch.optim.AdamW(model.parameters(), lr=config.training.learning_rate).step()
    weights = [w for name, w in model.named_parameters() if "lora_B" in name]
    if failed := sum(not (w.any() and w.isfinite().all()) for w in weights):
        raise RuntimeError(f"{failed} of {len(weights)} are still 0, or not finite, after a step")
    return f"all {len(weights)} are ≠ 0 and finite after a step"


def check_gradients(_: Config) -> str:
    """Check that all ranks together, each with a batch, get the gradient of one process with all.

    The batches have unequal numbers of tokens.
    """
    size = dist.get_world_size()
    batches = [random_batch(rank) for rank in range(size)]
    targets = sum(batch[:, 1:].numel() for batch in batches)  # nothing predicts a first token
    single, parallel = tiny_model(b_std=0.1), DistributedDataParallel(tiny_model(b_std=0.1))
    for batch in batches:
        compute_loss(single, batch, targets).backward()
    loss = compute_loss(parallel, batches[dist.get_rank()], targets)
    (loss * size).backward()  # DDP averages over the ranks; a step is a sum
    pairs = zip(parallel.parameters(), single.parameters(), strict=True)
    gradients = [(a.grad, b.grad) for a, b in pairs if a.requires_grad]
    error = float(torch.stack([(a - b).norm() / b.norm() for a, b in gradients]).max())  # or NaN
    if not error < 1e-5:
        raise RuntimeError(f"those of {size} processes and of one differ by {error:.1e}")
    return f"of {size} processes and of one agree to {error:.0e}"


def tiny_model(b_std: float = 0.0) -> Any:
    """Load the bundled base with a random adapter, which is the same on every rank.

    LoRA's B are normal with the standard deviation `b_std`; where they are 0, as by default, the
    gradients of LoRA's A are 0 too.
    """
    base = load_base(str(TINY_BASE), "float32")
    torch.manual_seed(0)
    model = add_adapter(base, ModelConfig(lora_dropout=0), mask_id=1)
    for name, weights in model.named_parameters():
        if "lora_B" in name:
            weights.data.normal_(std=b_std)
    return model.to(device())


def random_batch(rank: int) -> torch.Tensor:
    """Draw a rank's random token ids, (2, T): T is 32 for rank 0, 36 for rank 1 … 60 for rank 7."""
    random = torch.Generator().manual_seed(rank)
    ids = torch.randint(2, 1000, (2, 32 + 4 * (rank % 8)), generator=random)
    ids[:, 0] = 1  # the mask token, whose row is trained
    return ids.to(device())


def compute_loss(model: Any, input_ids: torch.Tensor, targets: int) -> Any:
    """Compute a batch's part of the loss of a step that has so many target tokens in all batches.

    All tokens of a window but its first are targets; the parts of all batches add up to the loss.
    """
    inputs = {"input_ids": input_ids, "labels": input_ids, "num_items_in_batch": targets}
    return model(**inputs, use_cache=False).loss


def device() -> torch.device:
    """Give the device that this rank computes on."""
    return torch.device(best_device())


LINK = "set NCCL_P2P_DISABLE=1 and try again; NCCL_DEBUG=INFO says more; --nproc 1 needs no other"
CHECKS: dict[str, tuple[Callable[[Config], str], str]] = {  # name: check, remedy where it fails
    "all_reduce": (check_all_reduce, LINK),
    "copies between cards": (check_copies, "set NCCL_P2P_DISABLE=1; dmesg may name an Xid"),
    "shared memory": (check_shared_memory, "docker run --shm-size=1g"),
    "bfloat16": (check_bf16, "set training.bf16=false"),
    "lora_B": (check_lora_updates, "install torch and peft anew; is learning_rate too small?"),
    "gradients": (check_gradients, "do not train in several processes here: --nproc 1"),
}


def run_check(name: str, config: Config) -> tuple[str, str]:
    """Run a check on this rank; return one of `MARKS` and a text: what was found, or why not."""
    check, remedy = CHECKS[name]
    try:
        return OK, check(config)
    except Skipped as reason:
        return SKIPPED, str(reason)
    except (RuntimeError, OSError, ValueError, MachineError) as error:
        fault = (str(error) or type(error).__name__).splitlines()[0]
        return FAILED, f"rank {dist.get_rank()}: {fault} → {remedy}"


def init_process_group() -> None:
    """Join the other ranks as a run does; raises `MachineError` where they do not answer."""
    set_nccl_for_rtx40()
    os.environ.setdefault("TORCH_NCCL_BLOCKING_WAIT", "1")  # a hang raises; else it aborts
    try:
        if device().type == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("nccl" if device().type == "cuda" else "gloo", timeout=WAIT)
    except RuntimeError as error:
        raise MachineError(f"{str(error).splitlines()[0]} → {LINK}") from None


def main() -> None:
    """Run all checks; print the row of each from the rank with the worst mark; exit."""
    disable_progress_bar()  # of the bundled base, which is loaded for several checks
    config = load_config(Path(sys.argv[1]) / "config.yaml")
    init_process_group()
    # Results are gathered in a group of their own: that of the checks may be broken, and other
    # ranks may still wait in it.
    group = dist.new_group(backend="gloo", timeout=4 * WAIT)
    rows, marks = [("", "")] * dist.get_world_size(), set()
    for name in CHECKS:
        dist.all_gather_object(rows, run_check(name, config), group)
        mark, text = min(rows, key=lambda row: MARKS.index(row[0]))
        marks.add(mark)
        if dist.get_rank() == 0:
            print(f"{mark:7}{name:22}{text}", flush=True)
    dist.destroy_process_group()
    sys.exit(MachineError.exit_status if FAILED in marks else 0)


if __name__ == "__main__":
    sys.exit(exit_status(main))
