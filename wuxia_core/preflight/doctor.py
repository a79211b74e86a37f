"""`launch_ddp.py --doctor`: checks the machine in as many processes as a run would have.

torchrun --nproc-per-node 2 -m wuxia_core.preflight.doctor FOLDER   # config.yaml is in it

Prints a row a check, `ok`, `FAILED` or `–` for what cannot be checked here; exits with 5 where one
failed. Memory and disk are the plan's and `prepare_run`'s to check.
"""

import itertools
import os
import platform
import subprocess
import sys
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from transformers import Qwen3Config, Qwen3ForCausalLM

from wuxia_core.config import Config, ModelConfig, load_config
from wuxia_core.errors import MachineError, exit_status
from wuxia_core.masking import IGNORE_INDEX, model_inputs
from wuxia_core.model import add_adapter, masked_cross_entropy
from wuxia_core.preflight.prepare import card_precautions

WAIT = timedelta(seconds=60)  # for the other ranks, within a check
FAILED, SKIPPED, OK = MARKS = ("FAILED", "–", "ok")  # worst first
MASK_ID = 255  # the last of the tiny model's tokens
NUMBERS = 1_000_000  # summed over the ranks, copied between cards
PROBE_SECONDS = 30.0  # for cards to copy, before that counts as a hang


class Row(NamedTuple):
    """What a check found."""

    mark: str
    found: str
    remedy: str = ""  # where it failed; "": that of `CHECKS`


def check_ranks(_: Config) -> Row:
    """See that every rank is there, each on a device of its own."""
    size, wanted = dist.get_world_size(), int(os.environ["WORLD_SIZE"])
    places = [""] * size
    group = dist.new_group(backend="gloo")  # the cards' own links are not tried yet
    dist.all_gather_object(places, f"{platform.node()} {device()}", group)
    if size != wanted:
        return Row(FAILED, f"{size} of {wanted} are there")
    if torch.cuda.is_available() and len(set(places)) < size:
        return Row(FAILED, "ranks share a card", "lower --nproc to one a card")
    return Row(OK, f"{size} over {dist.get_backend()} on {', '.join(places)}")


def check_all_reduce(_: Config) -> Row:
    """See that all_reduce sums."""
    values = torch.full((NUMBERS,), float(dist.get_rank() + 1), device=device())
    dist.all_reduce(values)
    size = dist.get_world_size()
    if not bool((values == size * (size + 1) / 2).all()):
        return Row(FAILED, "the sum is wrong")
    return Row(OK, f"{NUMBERS:,} sums over {size} ranks are exact")


def check_copies(_: Config) -> Row:
    """See that what goes from card to card arrives, or that a run does without direct copies."""
    if torch.cuda.device_count() < 2:
        return Row(SKIPPED, "needs two GPUs")
    if dist.get_rank() > 0:
        return Row(OK, "rank 0 looks")
    found, off = probe(), os.environ.get("NCCL_P2P_DISABLE", "0") != "0"
    if found == "right":
        return Row(OK, f"right{'; NCCL_P2P_DISABLE=0 lifts the precaution' if off else ''}")
    return Row(OK if off else FAILED, f"{found}{', and NCCL makes none' if off else ''}")


def probe() -> str:
    """Run `copy` in a process of its own: right, wrong (where) or hangs."""
    command = [sys.executable, "-c", "from wuxia_core.preflight import doctor; doctor.copy()"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=PROBE_SECONDS)
    except subprocess.TimeoutExpired:
        return f"hangs ({PROBE_SECONDS:.0f} s)"
    where = done.stderr.strip().rpartition("\n")[2]
    return f"wrong ({where})" if done.returncode else "right"


def copy() -> None:
    """Copy random numbers from each card to each other."""
    for a, b in itertools.permutations(range(torch.cuda.device_count()), 2):
        sent = torch.rand(NUMBERS, device=f"cuda:{a}")
        if not torch.equal(sent.cpu(), sent.to(f"cuda:{b}").cpu()):
            sys.exit(f"from card {a} to card {b}")


def check_bf16(config: Config) -> Row:
    """See that the device multiplies in bfloat16, where the run asks for it."""
    if not config.training.bf16:
        return Row(SKIPPED, "training.bf16 is false")
    random = torch.Generator().manual_seed(0)
    a, b = (torch.rand(256, 256, generator=random).to(device()) for _ in range(2))
    error = float(((a.bfloat16() @ b.bfloat16()).float() - a @ b).norm() / (a @ b).norm())
    return Row(OK if error < 1e-2 else FAILED, f"a product is right to {error:.2%}")


def check_lora_updates(config: Config) -> Row:
    """See that lora_B, which starts at 0, moves in a step and that all weights stay finite."""
    model = tiny_model()
    with torch.autocast(device().type, torch.bfloat16, enabled=config.training.bf16):
        loss = step(model, batch(0), items=1)
    loss.backward()
    torch.optim.AdamW(model.parameters(), lr=config.training.learning_rate).step()
    if not all(bool(weights.isfinite().all()) for weights in model.parameters()):
        return Row(FAILED, "a weight is not finite after a step")
    moved = [bool(weights.any()) for name, weights in model.named_parameters() if "lora_B" in name]
    if not moved or not all(moved):
        return Row(FAILED, f"{moved.count(False)} of {len(moved)} lora_B are still 0 after a step")
    return Row(OK, f"all {len(moved)} are ≠ 0 after a step, all weights finite")


def check_gradients(_: Config) -> Row:
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
        return Row(FAILED, f"those of {size} processes and of one differ by {error:.1e}")
    return Row(OK, f"of {size} processes and of one agree to {error:.0e}")


def tiny_model(spread: float = 0.0) -> torch.nn.Module:
    """Make a random Qwen3 with an adapter, the same on every rank; `spread` is lora_B's."""
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 128, "head_dim": 16}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        base = Qwen3ForCausalLM(Qwen3Config(vocab_size=MASK_ID + 1, **sizes, **heads))
        model: torch.nn.Module = add_adapter(base, ModelConfig(lora_dropout=0), MASK_ID)
        for name, weights in model.named_parameters():
            if "lora_B" in name:  # where it is 0, so are lora_A's gradients
                weights.data.normal_(std=spread)
    return model.to(device())


def batch(rank: int) -> dict[str, torch.Tensor]:
    """Make masked windows (2, 32) for a rank: the higher, the more tokens are masked."""
    ids = torch.randint(0, MASK_ID, (2, 32), generator=torch.Generator().manual_seed(rank))
    masked = torch.zeros(ids.shape, dtype=torch.bool)
    masked[:, 1 : 3 + 4 * (rank % 8)] = True
    labels = torch.where(masked, ids, IGNORE_INDEX)
    return model_inputs(torch.where(masked, MASK_ID, ids).numpy(), labels.numpy())


def step(model: torch.nn.Module, inputs: dict[str, torch.Tensor], items: int) -> torch.Tensor:
    """Compute the loss of a batch, as a share of a step with `items` target tokens."""
    inputs = {name: tensor.to(device()) for name, tensor in inputs.items()}
    labels = inputs.pop("labels")
    outputs = model(**inputs, use_cache=False)
    return masked_cross_entropy(outputs, labels, torch.tensor(items, device=labels.device))


def gradients(model: torch.nn.Module) -> list[torch.Tensor]:
    """Collect the gradients there are."""
    return [weights.grad for weights in model.parameters() if weights.grad is not None]


def device() -> torch.device:
    """Where this rank computes."""
    cuda = torch.cuda.is_available()
    return torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")


LINK = "set NCCL_P2P_DISABLE=1 and try again; NCCL_DEBUG=INFO says more; --nproc 1 needs no other"
CHECKS: dict[str, tuple[Callable[[Config], Row], str]] = {  # with what to do where one fails
    "processes": (check_ranks, "look for a process that died"),
    "all_reduce": (check_all_reduce, LINK),
    "copies between cards": (check_copies, "set NCCL_P2P_DISABLE=1; dmesg may name an Xid"),
    "bfloat16": (check_bf16, "set training.bf16=false"),
    "lora_B": (check_lora_updates, "install torch and peft anew; is learning_rate too small?"),
    "gradients": (check_gradients, "do not train in several processes here: --nproc 1"),
}


def run_check(name: str, config: Config) -> Row:
    """Run one check on this rank."""
    check, remedy = CHECKS[name]
    try:
        row = check(config)
    except (RuntimeError, OSError, ValueError) as error:
        row = Row(FAILED, (str(error) or type(error).__name__).splitlines()[0])
    if row.mark != FAILED:
        return row
    return Row(FAILED, f"rank {dist.get_rank()}: {row.found}", f" → {row.remedy or remedy}")


def init_process_group() -> None:
    """Meet the other ranks, as a run does; raises `MachineError`."""
    card_precautions()
    os.environ.setdefault("TORCH_NCCL_BLOCKING_WAIT", "1")  # a hang raises; else it aborts
    try:
        if torch.cuda.is_available():
            torch.cuda.set_device(device())
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo", timeout=WAIT)
    except RuntimeError as error:
        raise MachineError(f"{str(error).splitlines()[0]} → {LINK}") from None


def main() -> None:
    """Print a row a check, that of the rank that fares worst; exit with 5 where one failed."""
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    config = load_config(Path(sys.argv[1]) / "config.yaml")
    init_process_group()
    # its own group: that of the checks may be broken, and the others may wait there meanwhile
    group = dist.new_group(backend="gloo", timeout=4 * WAIT)
    rows, marks = [Row("", "")] * dist.get_world_size(), set()
    for name in CHECKS:
        dist.all_gather_object(rows, run_check(name, config), group)
        mark, found, remedy = min(rows, key=lambda row: MARKS.index(row.mark))
        marks.add(mark)
        if dist.get_rank() == 0:
            print(f"{mark:7}{name:22}{found}{remedy}", flush=True)
    dist.destroy_process_group()
    sys.exit(MachineError.exit_status if FAILED in marks else 0)


if __name__ == "__main__":
    sys.exit(exit_status(main))
