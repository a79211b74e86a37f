"""`launch_ddp.py --doctor`: checks the machine in as many processes as a run would have.

torchrun --nproc-per-node 2 -m wuxia_core.preflight.doctor FOLDER   # config.yaml is in it

Prints a row for each check: `ok`, `FAILED`, or `–` if it does not apply to this machine or config.
Exits with 5 if a check failed on any rank, else with 0. Memory and disk space are not among the
checks: `prepare_run` looks at these before a run.
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

WAIT = timedelta(seconds=60)  # how long a rank waits for the others, within a check
FAILED, SKIPPED, OK = MARKS = ("FAILED", "–", "ok")  # worst first
NUMBERS = 1_000_000  # how many numbers are summed over the ranks, or copied from a GPU to another
# Bytes of /dev/shm that must be free, for NCCL; a container's has 64 MiB in all by default.
LEAST_SHARED_MEMORY = 2**28
PROBE_SECONDS = 90.0  # for all copies between GPUs together; if they take longer, they hang


class Skipped(Exception):
    """Raised by a check that does not apply to this machine or config; the message says why."""


def check_all_reduce(_: Config) -> str:
    """Check that `all_reduce` gives every rank the exact sum over the ranks.

    Returns what was found, in words; raises `RuntimeError` with the fault.
    """
    values = torch.full((NUMBERS,), float(dist.get_rank() + 1), device=device())
    dist.all_reduce(values)
    size = dist.get_world_size()
    if (values != size * (size + 1) / 2).any():  # 1 + 2 + … + size
        raise RuntimeError("the sum is wrong")
    return f"{NUMBERS:,} sums over {size} ranks are exact, by {dist.get_backend()}"


def check_copies(_: Config) -> str:
    """Check that numbers that one GPU copies straight to another arrive unchanged.

    Wrong or hanging copies are no fault if `NCCL_P2P_DISABLE` is set, since NCCL then makes none.
    Only rank 0 tries copies, by `try_copies` in another process, which can be killed: some drivers
    hang in a copy. Returns what was found, in words. Raises `Skipped` if there are fewer than two
    GPUs, and `RuntimeError` with the fault.
    """
    if torch.cuda.device_count() < 2:
        raise Skipped("needs two GPUs")
    if dist.get_rank() > 0:
        return "rank 0 looks"
    disabled = os.environ.get("NCCL_P2P_DISABLE", "0") != "0"
    code = "from wuxia_core.preflight import doctor; doctor.try_copies()"
    try:
        subprocess.run([sys.executable, "-c", code], check=True, timeout=PROBE_SECONDS)
    except subprocess.SubprocessError as error:
        fault = "hang" if isinstance(error, subprocess.TimeoutExpired) else "wrong"
        if not disabled:
            raise RuntimeError(fault) from None
        return f"{fault}, and NCCL makes none"
    return "right; NCCL_P2P_DISABLE=0 lifts the precaution" if disabled else "right"


def try_copies() -> None:
    """Copy random numbers from each GPU to each other one, and compare them through the CPU.

    For a process of its own (see `check_copies`): at the first wrong copy it exits with status 1
    and a message that names the two GPUs.
    """
    for source, target in itertools.permutations(range(torch.cuda.device_count()), 2):
        numbers = torch.rand(NUMBERS, device=f"cuda:{source}")
        if not torch.equal(numbers.cpu(), numbers.to(f"cuda:{target}").cpu()):
            sys.exit(f"wrong from GPU {source} to GPU {target}")


def check_shared_memory(_: Config) -> str:
    """Check that `LEAST_SHARED_MEMORY` bytes of /dev/shm are free.

    NCCL may pass data from GPU to GPU through /dev/shm. Returns what was found, in words. Raises
    `Skipped` if there are fewer than two GPUs, and `RuntimeError` with the fault.
    """
    if torch.cuda.device_count() < 2:
        raise Skipped("needs two GPUs")
    free = shutil.disk_usage("/dev/shm").free
    if free < LEAST_SHARED_MEMORY:
        raise RuntimeError(f"/dev/shm has {free / 2**20:,.0f} MiB free")
    return f"/dev/shm has {free / 2**20:,.0f} MiB free"


def check_bf16(config: Config) -> str:
    """Check that a product of random matrices in bfloat16 is within 1 % of that in float32.

    Returns what was found, in words. Raises `Skipped` unless `training.bf16` is set, and
    `RuntimeError` with the fault.
    """
    if not config.training.bf16:
        raise Skipped("training.bf16 is false")
    random = torch.Generator().manual_seed(0)  # the same matrices on every rank
    a, b = (torch.rand(256, 256, generator=random).to(device()) for _ in range(2))
    product, exact = (a.bfloat16() @ b.bfloat16()).float(), a @ b
    error = float((product - exact).norm() / exact.norm())
    if not error < 1e-2:  # also if it is NaN
        raise RuntimeError(f"a product is wrong by {error:.2%}")
    return f"a product is right to {error:.2%}"


def check_lora_updates(config: Config) -> str:
    """Check that after one optimizer step every LoRA matrix B is finite, and no longer all 0.

    Each rank takes the step for itself, at the peak learning rate, in bfloat16 if that is
    configured, else in float32. Returns what was found, in words; raises `RuntimeError` with the
    fault.
    """
    model = tiny_model()
    with torch.autocast(device().type, torch.bfloat16, enabled=config.training.bf16):
        # Divided by 1, the loss is the targets' sum, not their mean: only its scale differs.
        loss = compute_loss(model, random_batch(0), step_targets=1)
    loss.backward()
    torch.optim.AdamW(model.parameters(), lr=config.training.learning_rate).step()
    weights = [w for name, w in model.named_parameters() if "lora_B" in name]
    if failed := sum(not (w.any() and w.isfinite().all()) for w in weights):
        raise RuntimeError(f"{failed} of {len(weights)} are still 0, or not finite, after a step")
    return f"all {len(weights)} are ≠ 0 and finite after a step"


def check_gradients(_: Config) -> str:
    """Check that the ranks together, each with its own batch, get the gradients of one process.

    Each rank is also that one process: it goes through all batches, one by one, and compares. For
    every trained tensor the norm of the difference must be below 1e-5 of the gradient's norm.
    Returns what was found, in words; raises `RuntimeError` with the fault.
    """
    size = dist.get_world_size()
    batches = [random_batch(rank) for rank in range(size)]  # of different numbers of tokens
    step_targets = sum(batch[:, 1:].numel() for batch in batches)  # first tokens are not predicted
    single, parallel = tiny_model(b_std=0.1), DistributedDataParallel(tiny_model(b_std=0.1))
    for batch in batches:
        compute_loss(single, batch, step_targets).backward()
    loss = compute_loss(parallel, batches[dist.get_rank()], step_targets)
    (loss * size).backward()  # DDP averages over the ranks, but a step's gradient is their sum
    pairs = zip(parallel.parameters(), single.parameters(), strict=True)
    gradients = [(p.grad, s.grad) for p, s in pairs if p.requires_grad]
    error = float(torch.stack([(p - s).norm() / s.norm() for p, s in gradients]).max())  # or NaN
    if not error < 1e-5:
        raise RuntimeError(f"those of {size} processes and of one differ by {error:.1e}")
    return f"of {size} processes and of one agree to {error:.0e}"


def tiny_model(b_std: float = 0.0) -> Any:
    """Load the bundled base, on this rank's device, with the same random adapter on every rank.

    LoRA's matrices B are drawn from a normal distribution of standard deviation `b_std`. With 0,
    the default, they are 0, and so are the gradients of LoRA's A.
    """
    base = load_base(str(TINY_BASE), "float32")
    torch.manual_seed(0)
    model = add_adapter(base, ModelConfig(lora_dropout=0), mask_id=1)
    for name, weights in model.named_parameters():
        if "lora_B" in name:
            weights.data.normal_(std=b_std)
    return model.to(device())


def random_batch(number: int) -> torch.Tensor:
    """Draw the token ids of batch `number` for the tiny model, (2, T): the same on every rank.

    T differs, as in a run: 32 for batch 0, 36 for 1, … 60 for 7, and 32 again for 8.
    """
    random = torch.Generator().manual_seed(number)
    ids = torch.randint(2, 1000, (2, 32 + 4 * (number % 8)), generator=random)
    ids[:, 0] = 1  # the mask token of `tiny_model`, whose trained row so gets a gradient
    return ids.to(device())


def compute_loss(model: Any, input_ids: torch.Tensor, step_targets: int) -> Any:
    """Compute the summed loss of a batch's targets, divided by `step_targets`: a scalar, nats.

    `input_ids` is (B, T), a window a row, of which all tokens but the first are targets. If
    `step_targets` is the number of targets in all batches of a step, the batches' results add up to
    the step's mean loss.
    """
    inputs = {"input_ids": input_ids, "labels": input_ids, "num_items_in_batch": step_targets}
    return model(**inputs, use_cache=False).loss


def device() -> torch.device:
    """Give the device that this rank computes on: its current GPU, or the CPU if there is none."""
    return torch.device(best_device())


# The remedy if ranks or GPUs do not reach each other.
LINK = "set NCCL_P2P_DISABLE=1 and try again; NCCL_DEBUG=INFO says more; --nproc 1 needs no other"
# A check is called on every rank with the config, even if it ignores it. It returns in words what
# it found, or raises `Skipped`, or an error with the fault.
CHECKS: dict[str, tuple[Callable[[Config], str], str]] = {  # name: check, remedy if it fails
    "all_reduce": (check_all_reduce, LINK),
    "copies between cards": (check_copies, "set NCCL_P2P_DISABLE=1; dmesg may name an Xid"),
    "shared memory": (check_shared_memory, "docker run --shm-size=1g"),
    "bfloat16": (check_bf16, "set training.bf16=false"),
    "lora_B": (check_lora_updates, "install torch and peft anew; is learning_rate too small?"),
    "gradients": (check_gradients, "do not train in several processes here: --nproc 1"),
}


def run_check(name: str, config: Config) -> tuple[str, str]:
    """Run the check called `name` on this rank; return its mark, one of `MARKS`, and a text.

    With "ok" the text is what was found, with "–" why the check does not apply, and with "FAILED"
    the rank, the fault and the remedy.
    """
    check, remedy = CHECKS[name]
    try:
        return OK, check(config)
    except Skipped as reason:
        return SKIPPED, str(reason)
    except (RuntimeError, OSError, ValueError, MachineError) as error:  # torch's and files', too
        fault = (str(error) or type(error).__name__).splitlines()[0]
        return FAILED, f"rank {dist.get_rank()}: {fault} → {remedy}"


def init_process_group() -> None:
    """Join the other ranks, over NCCL if there is a GPU, else over gloo.

    Raises `MachineError`, with the remedy, if that fails or takes longer than `WAIT`.
    """
    set_nccl_for_rtx40()  # as a run's launcher does
    # A rank that waits for longer than `WAIT` raises an error; else its process would be aborted.
    os.environ.setdefault("TORCH_NCCL_BLOCKING_WAIT", "1")
    try:
        if device().type == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("nccl" if device().type == "cuda" else "gloo", timeout=WAIT)
    except RuntimeError as error:
        raise MachineError(f"{str(error).splitlines()[0]} → {LINK}") from None


def main() -> None:
    """Run all checks on this rank, and end its process: status 5 if one failed on any rank, else 0.

    All ranks gather the results of a check. Rank 0 prints one row for it: the worst mark, with the
    text of the lowest rank that has this mark.
    """
    disable_progress_bar()  # of the bundled base, which is loaded for several checks
    config = load_config(Path(sys.argv[1]) / "config.yaml")
    init_process_group()
    # Results are gathered in a group of their own: that of the checks may be broken, and other
    # ranks may still wait in it. A check may take longer than `WAIT`, as for `PROBE_SECONDS`.
    group = dist.new_group(backend="gloo", timeout=4 * WAIT)
    rows, marks = [("", "")] * dist.get_world_size(), set()  # a row a rank, anew for each check
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
