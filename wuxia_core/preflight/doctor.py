"""`launch_ddp.py --doctor`: asserts instead of hoping, in as many processes as a run would have.

torchrun --nproc-per-node 2 -m wuxia_core.preflight.doctor FOLDER   # config.yaml is in it

Prints a row a check, `ok`, `FAILED` or `–` for what cannot be looked at here; leaves with 5 where
one failed.
"""

import itertools
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from datetime import timedelta
from importlib.metadata import metadata, requires, version
from pathlib import Path

import psutil
import torch
import torch.distributed as dist
from packaging.requirements import Requirement
from torch.nn.parallel import DistributedDataParallel

from wuxia_core.config import Config, ModelConfig, load_config
from wuxia_core.errors import MachineError
from wuxia_core.masking import IGNORE_INDEX, model_inputs
from wuxia_core.model import add_adapter, masked_cross_entropy
from wuxia_core.preflight.plan import GIB, checkpoint_bytes, memory, read_shape
from wuxia_core.preflight.prepare import card_precautions

WAIT = timedelta(seconds=60)  # for the other ranks, within a check
FAILED, SKIPPED, OK = MARKS = ("FAILED", "–", "ok")  # worst first
MASK_ID = 255  # the last of the tiny model's tokens
Row = tuple[str, str, str]  # mark, what was found, what to do
PACKAGES = {"torch", "transformers", "peft", "accelerate"}
NUMBERS = 1_000_000  # summed over the ranks, copied between cards
PROBE_SECONDS = 30.0  # for cards to copy, before that counts as a hang
SPACE = 2 * GIB  # of disk, at least


def check_lora_updates(config: Config) -> str:
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
    return masked_cross_entropy(outputs, labels, torch.tensor(items, device=labels.device))


def gradients(model: torch.nn.Module) -> list[torch.Tensor]:
    """Collect the gradients there are."""
    return [weights.grad for weights in model.parameters() if weights.grad is not None]


LINK = "set NCCL_P2P_DISABLE=1 and try again; NCCL_DEBUG=INFO says more; --nproc 1 needs no other"


def examine(config: Config) -> Iterator[tuple[str, Row]]:
    """Run every check on every rank; yield its name and the row of the rank that fares worst."""
    size = dist.get_world_size()
    # its own group: that of the checks may be broken, and the others may wait there meanwhile
    talk = dist.new_group(backend="gloo", timeout=4 * WAIT)
    for name in CHECKS:
        rows: list[Row] = [("", "", "")] * size
        dist.all_gather_object(rows, run_check(name, config), group=talk)
        rank = min(range(size), key=lambda r: MARKS.index(rows[r][0]))
        mark, found, remedy = rows[rank]
        yield name, (mark, f"rank {rank}: {found}" if mark == FAILED else found, remedy)


def run_check(name: str, config: Config) -> Row:
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


class Failed(Exception):
    """What was found wrong, and what to do, where the check knows better than its table."""

    def __init__(self, found: str, remedy: str = "") -> None:
        super().__init__(found)
        self.remedy = remedy


class Skipped(Exception):
    """Why there is nothing to check."""


def versions(_: Config) -> str:
    """See that Python and the libraries are those the project asks for."""
    asked = [r for r in map(Requirement, requires("wuxia-core") or []) if r.name in PACKAGES]
    found = {r.name: version(r.name) for r in asked} | {"Python": platform.python_version()}
    asked.append(Requirement(f"Python{metadata('wuxia-core')['Requires-Python']}"))
    for wanted in asked:
        if not wanted.specifier.contains(found[wanted.name], prereleases=True):
            how = "install" if wanted.name == "Python" else "pip install"
            raise Failed(f"{wanted.name} {found[wanted.name]}", f"{how} '{wanted}'")
    return ", ".join(f"{name} {number}" for name, number in found.items())


def driver(_: Config) -> str:
    """See that torch sees the cards that the driver has."""
    tool = shutil.which("nvidia-smi")
    if tool is None or os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        raise Skipped("no nvidia-smi, or the cards are hidden")
    query = [tool, "--query-gpu=name,driver_version", "--format=csv,noheader"]
    done = subprocess.run(query, capture_output=True, text=True, timeout=30, check=True)
    cards = "; ".join(done.stdout.splitlines())
    if not torch.cuda.is_available():
        raise Failed(f"{cards}; torch {torch.__version__} sees no card")
    return f"{cards}; CUDA {torch.version.cuda}"


def check_ranks(_: Config) -> str:
    """See that every rank is there, each on a device of its own."""
    size, asked = dist.get_world_size(), int(os.environ["WORLD_SIZE"])
    places = [(0, "", "")] * size
    talk = dist.new_group(backend="gloo")  # the cards' own links are not tried yet
    dist.all_gather_object(places, (dist.get_rank(), platform.node(), str(device())), group=talk)
    ranks = [rank for rank, _, _ in places]
    if ranks != list(range(asked)):
        raise Failed(f"ranks {ranks} of {asked}")
    if torch.cuda.is_available() and len({place[1:] for place in places}) < size:
        raise Failed("ranks share a card", "lower --nproc to one a card")
    return f"{size} over {dist.get_backend()} on {', '.join(place for _, _, place in places)}"


def check_all_reduce(_: Config) -> str:
    """See that all_reduce sums."""
    values = torch.full((NUMBERS,), float(dist.get_rank() + 1), device=device())
    dist.all_reduce(values)
    size = dist.get_world_size()
    if not bool((values == size * (size + 1) / 2).all()):
        raise Failed("the sum is wrong")
    return f"{NUMBERS:,} sums over {size} ranks are exact"


def copies(_: Config) -> str:
    """See that what goes from card to card arrives, as a run would send it."""
    if torch.cuda.device_count() < 2:
        raise Skipped("needs two GPUs")
    if dist.get_rank() > 0:
        return "rank 0 looks"
    direct, peer, other = probe("copy"), probe("reduce", "0"), probe("reduce", "1")
    words = f"direct copies: {direct}; NCCL peer-to-peer: {peer}; NCCL without: {other}"
    off = os.environ.get("NCCL_P2P_DISABLE", "0") != "0"
    if (other if off else peer) != "right":
        raise Failed(words, "set NCCL_P2P_DISABLE=1" if other == "right" and not off else "")
    lifted = (
        "; NCCL_P2P_DISABLE=0 lifts the precaution" if off and direct == peer == "right" else ""
    )
    return words + lifted


def probe(what: str, p2p_disable: str = "0") -> str:
    """Run `copy` or `reduce` in a process of its own: right, wrong (where) or hangs."""
    code = f"from wuxia_core.preflight import doctor; doctor.{what}()"
    try:
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, timeout=PROBE_SECONDS,
            env={**os.environ, "NCCL_P2P_DISABLE": p2p_disable},
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return f"hangs ({PROBE_SECONDS:.0f} s)"
    where = done.stderr.strip().splitlines()[-1:]
    return f"wrong ({''.join(where)})" if done.returncode else "right"


def copy() -> None:
    """Copy random numbers from each card to each other."""
    for a, b in itertools.permutations(range(torch.cuda.device_count()), 2):
        sent = torch.rand(NUMBERS, device=f"cuda:{a}")
        if not torch.equal(sent.cpu(), sent.to(f"cuda:{b}").cpu()):
            sys.exit(f"from card {a} to card {b}")


def reduce() -> None:
    """Sum over the cards with NCCL, which heeds NCCL_P2P_DISABLE; `copy` does not."""
    from torch.cuda import nccl

    cards = range(torch.cuda.device_count())
    values = [torch.full((NUMBERS,), float(card + 1), device=f"cuda:{card}") for card in cards]
    nccl.all_reduce(values)
    for card, value in enumerate(values):
        if not bool((value == sum(cards) + len(cards)).all()):
            sys.exit(f"the sum on card {card}")


def check_bf16(config: Config) -> str:
    """See that the device multiplies in bfloat16, where the run asks for it."""
    if not config.training.bf16:
        raise Skipped("training.bf16 is false")
    if torch.cuda.is_available() and not torch.cuda.is_bf16_supported(False):
        name = torch.cuda.get_device_name()
        raise Failed(f"{name} has none", "set training.bf16=false, training.fp16=true")
    random = torch.Generator().manual_seed(0)
    a, b = (torch.rand(256, 256, generator=random).to(device()) for _ in range(2))
    error = float(((a.bfloat16() @ b.bfloat16()).float() - a @ b).norm() / (a @ b).norm())
    if not error < 1e-2:
        raise Failed(f"a product is off by {error:.1%}")
    return f"a product is right to {error:.2%}"


def check_memory(config: Config) -> str:
    """See that the free memory is what the plan says a run takes."""
    on_card, shape = torch.cuda.is_available(), read_shape(config.model.model_name_or_path)
    free = torch.cuda.mem_get_info()[0] if on_card else psutil.virtual_memory().available
    words = f"{free / GIB:.1f} GiB free"
    if shape is None:
        return f"{words}; what {config.model.model_name_or_path} takes is not known"
    size = dist.get_world_size()
    plan = memory(config, shape, size, on_card)
    needed = (plan.total - plan.reserve) * (1 if on_card else size)  # this process has the reserve
    of = "" if on_card or size == 1 else f" by {size} processes"
    said = f"{words}, {needed / GIB:.1f} needed{of}"
    if free < needed:
        raise Failed(said)
    return said


def disk(config: Config) -> str:
    """See that the run folder can be written, and holds what a run keeps."""
    folder = Path(config.training.output_dir).expanduser().absolute()
    there = next(path for path in (folder, *folder.parents) if path.exists())
    try:
        with tempfile.TemporaryFile(dir=there) as file:  # os.access would say that root may
            file.write(b"1")
    except OSError as error:
        words = f"{there} cannot be written into ({error.strerror})"
        raise Failed(words, "name another training.output_dir") from None
    shape = read_shape(config.model.model_name_or_path)
    needed = max(SPACE, checkpoint_bytes(config, shape) if shape else 0)
    free = shutil.disk_usage(there).free
    if free < needed:
        raise Failed(f"{free / GIB:.1f} GiB at {there}, {needed / GIB:.1f} needed")
    return f"{free / GIB:.0f} GiB at {there}, {needed / GIB:.1f} needed"


def device() -> torch.device:
    """Where this rank computes."""
    cuda = torch.cuda.is_available()
    return torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")


CHECKS: dict[str, tuple[Callable[[Config], str], str]] = {  # with what to do where one fails
    "versions": (versions, "pip install -e ."),
    "driver": (driver, "install the driver and a torch built for it"),
    "processes": (check_ranks, "look for a process that died"),
    "all_reduce": (check_all_reduce, LINK),
    "copies between cards": (copies, "look at dmesg for Xid; train with --nproc 1"),
    "bfloat16": (check_bf16, "set training.bf16=false"),
    "free memory": (check_memory, "stop what else runs, or see what --plan says to change"),
    "disk": (disk, "free some, or name another training.output_dir"),
    "lora_B": (
        check_lora_updates,
        "install torch and peft anew; is training.learning_rate too small?",
    ),
    "gradients": (parity, "do not train in several processes here: --nproc 1"),
}


if __name__ == "__main__":
    main()
