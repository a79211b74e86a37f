"""The doctor's checks of the machine: versions, ranks, cards, memory, disk.

A check returns what it found; it raises where something is wrong, or there is nothing to look at.
"""

import itertools
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from importlib.metadata import metadata, requires, version
from pathlib import Path

import psutil
import torch
import torch.distributed as dist
from packaging.requirements import Requirement

from wuxia_core.config import Config
from wuxia_core.preflight.memory import GIB, memory
from wuxia_core.preflight.shape import read_shape
from wuxia_core.preflight.work import checkpoint_bytes

PACKAGES = {"torch", "transformers", "peft", "accelerate"}
NUMBERS = 1_000_000  # summed over the ranks, copied between cards
PROBE_SECONDS = 30.0  # for cards to copy, before that counts as a hang
SPACE = 2 * GIB  # of disk, at least


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


def world(_: Config) -> str:
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


def sums(_: Config) -> str:
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
    code = f"from wuxia_core.preflight import machine; machine.{what}()"
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


def half(config: Config) -> str:
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


def room(config: Config) -> str:
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
