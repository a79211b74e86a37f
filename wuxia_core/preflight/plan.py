"""The forecast of a run in words: memory by part, steps, hours, cost, disk; and what to change."""

import os
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from wuxia_core.config import Config
from wuxia_core.errors import ConfigError
from wuxia_core.preflight import work
from wuxia_core.preflight.checks import effective_batch
from wuxia_core.preflight.memory import GIB, memory, remedies
from wuxia_core.preflight.shape import Shape, read_shape

USABLE = 23.5 / 24  # of a card's memory; the rest is the driver's


@dataclass(frozen=True)
class Device:
    """What each process runs on."""

    name: str
    processes: int
    bytes: float  # of memory that a process can have
    rate: float | None  # FLOP/s of all together; None where it is not known
    shares: tuple[float, float]  # of that rate that training reaches, best and worst
    on_card: bool


def this_device(processes: int) -> Device:
    """Describe the machine's cards, or its CPU, shared by the processes."""
    import torch

    if torch.cuda.is_available():
        name = torch.cuda.get_device_name(0)
        size = torch.cuda.get_device_properties(0).total_memory
        known = work.known_rate(name)
        rate = known * 1e12 * processes if known else None
        return Device(name, processes, USABLE * size, rate, work.CARD_SHARES, True)
    share = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / processes
    rate = work.product_rate()
    return Device("process on the CPU", processes, share, rate, work.CPU_SHARES, False)


def planned_device(config: Config, asked: int | None) -> Device | None:
    """Describe the cards that `plan.card` names, None where it names none.

    Raises `ConfigError` where the card is not known.
    """
    name = config.plan.card
    if name is None:
        return None
    if name not in work.CARDS:
        names = ", ".join(work.CARDS)
        raise ConfigError(f"plan.card {name}: not known; known are {names}")
    gib, rate = work.CARDS[name]
    cards = asked or config.plan.cards
    return Device(name, cards, USABLE * gib * GIB, rate * 1e12 * cards, work.CARD_SHARES, True)


def plan(config: Config, device: Device, text: work.Text) -> str:
    """Write the forecast of a run, a line each thing."""
    name = config.model.model_name_or_path
    shape = read_shape(name)
    if shape is None:
        return f"plan: the shape of {name} is not known, so its memory and time are not forecast"
    head = (
        f"plan, arithmetic: {name}, {shape.parameters / 1e9:.3g} B parameters, on "
        f"{device.processes} × {device.name}"
    )
    lines = [*_memory(config, shape, device), *_work(config, shape, device, text)]
    return "\n".join([head, *(f"  {line}" for line in lines)])


def _memory(config: Config, shape: Shape, device: Device) -> Iterator[str]:
    needs = memory(config, shape, device.processes, device.on_card)
    kept = "checkpointed" if config.training.gradient_checkpointing else "all kept"
    parts = {
        f"weights{_quantized(config)}": needs.weights,
        "adapter, gradients, optimizer": needs.adapter,
        f"activations ({kept})": needs.activations,
        f"largest moment ({needs.moment_name})": needs.moment,
        "reserve": needs.reserve,
    }
    yield "GiB a process"
    for part, size in parts.items():
        yield f"  {part:44}{size / GIB:7.2f}"
    fits = needs.total <= device.bytes
    verdict = "fits" if fits else "DOES NOT FIT"
    yield f"  {'in all':44}{needs.total / GIB:7.2f} of {device.bytes / GIB:.1f}: {verdict}"
    if not fits:
        yield "what to change, the least harmful first, each with those above it:"
        yield from advice(config, shape, device)


def _quantized(config: Config) -> str:
    bits = config.model.quantization
    return "" if bits == "none" else f" ({bits} linear layers)"


def advice(config: Config, shape: Shape | None, device: Device) -> Iterator[str]:
    """Say what saves memory, with what it comes to, up to what fits."""
    for change, changed in remedies(config):
        if shape is None:
            yield f"  --set {change.replace(' ', ' --set ')}"
            continue
        needs = memory(changed, shape, device.processes, device.on_card)
        fits = needs.total <= device.bytes
        words = f"{needs.total / GIB:.2f} GiB{', fits' if fits else ''}"
        yield f"  --set {change.replace(' ', ' --set ')}: {words}"
        if fits:
            return
    yield "  a smaller model, such as Qwen/Qwen3-4B"


def _work(config: Config, shape: Shape, device: Device, text: work.Text) -> Iterator[str]:
    batch = effective_batch(config, device.processes)
    few, many = work.steps(config, text, batch)
    source = "" if text.measured else ", estimated from the files' sizes"
    yield f"an epoch: {_range(*text.tokens)} tokens, {_range(*text.windows)} windows{source}"
    yield f"the run: {_range(few, many)} steps of {batch} windows"
    warmup = config.training.warmup_steps
    if warmup >= many:
        yield (
            f"TOO SHORT: the warm-up takes {warmup} steps, so the rate never reaches its peak; "
            f"--set training.warmup_steps={many // 10}"
        )
    yield _hours(config, shape, device, text)
    yield f"disk for checkpoints: {work.checkpoint_bytes(config, shape) / GIB:.2f} GiB"


def _hours(config: Config, shape: Shape, device: Device, text: work.Text) -> str:
    if device.rate is None:
        return f"hours an epoch: the rate of {device.name} is not known; --plan --measure times it"
    flop = work.flop_per_token(config, shape)
    best, worst = device.shares
    hours = np.array(text.tokens) * flop / (np.array([best, worst]) * device.rate) / 3600
    batch = effective_batch(config, device.processes)
    run = hours * work.steps(config, text, batch) / work.steps_per_epoch(text, batch)
    words = (
        f"hours an epoch: {_short(hours[0])} to {_short(hours[1])}, {best:.0%} to {worst:.0%} of "
        f"{device.rate / 1e12:.3g} TFLOP/s; the run: {_short(run[0])} to {_short(run[1])}"
    )
    price = config.plan.price_per_hour
    if price is not None:
        cost = price * device.processes * run
        words += f", which costs {cost[0]:.1f} to {cost[1]:.1f}"
    return words


def _range(few: float, many: float) -> str:
    return f"{few:,.0f}" if few == many else f"{few:,.0f} to {many:,.0f}"


def _short(hours: float) -> str:
    return f"{hours:.1f}" if hours >= 1 else f"{hours:.3f}"
