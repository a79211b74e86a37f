"""What happens before torchrun: checks, the mixture, the forecast, the run folder."""

import os
import shutil
from importlib.util import find_spec
from pathlib import Path

import torch

from wuxia_core import model
from wuxia_core.config import Config, effective_batch
from wuxia_core.errors import ConfigError, MachineError
from wuxia_core.messages import messages
from wuxia_core.mixing import Mixture, current_mixture, mix, run_steps, train_windows
from wuxia_core.preflight import plan
from wuxia_core.run import open_folder, step_of
from wuxia_core.torchrun import Processes


def prepare_run(
    config: Config, folder: Path, processes: Processes, start: Path | None = None
) -> None:
    """Check all that can be checked without a model, mix, say what the run needs, open its folder.

    `start` is the checkpoint that a run goes on from. Raises as what it calls.
    """
    config.training.output_dir = str(folder)
    device = plan.this_device(config, processes.total)
    check_device(config, device)
    check_packages(config)
    shape = check_model(config)
    if shape:
        tokenizer = model.load_tokenizer(model.base_path(config.model))
        model.mask_token_id(tokenizer, shape.vocab_size, config.masking.mask_token)
    mixture = mix(config)
    if (windows := len(train_windows(mixture))) < processes.total:
        what = f"{processes.total} processes for {windows} training windows"
        raise ConfigError(f"{what}: lower --nproc or data.max_length, or add text to data.data_dir")
    if config.training.warmup_steps is None:
        steps = int(run_steps(config, windows, processes.total))
        config.training.warmup_steps = min(100, -(-steps // 20))
    needs = plan.describe_plan(config, shape, device, plan.measured_text(config, mixture))
    print(summary(config, processes.total, mixture), needs, *set_nccl_for_rtx40(), sep="\n")
    if shape:
        if not device.on_card and not plan.fits(config, shape, device):
            raise MachineError(f"this machine has not the memory for it; {model.LESS_MEMORY}")
        check_disk(folder, plan.checkpoint_bytes(config, shape))
    open_folder(config, mixture, folder)
    step = step_of(start) if start else 0
    print(messages("training")["into"].format(folder=folder, step=step))


def forecast(config: Config, processes: int | None) -> str:
    """Say what a run needs; nothing is mixed, loaded or started."""
    shape, planned = check_model(config), config.plan.card or config.plan.card_gib
    if planned and not torch.cuda.is_available():
        device = plan.planned_device(config, processes or config.plan.cards)
    else:
        device = plan.this_device(config, process_count(processes))
    if device.on_card:
        check_device(config, device)
    mixture = current_mixture(config)
    text = plan.measured_text(config, mixture) if mixture else plan.estimated_text(config)
    return plan.describe_plan(config, shape, device, text)


def process_count(wanted: int | None) -> int:
    """Choose how many processes to start: one a GPU, two on a machine without any.

    Raises `ConfigError` where more are wanted than there are GPUs.
    """
    cards = torch.cuda.device_count()
    if wanted and 0 < cards < wanted:
        raise ConfigError(f"--nproc {wanted}: one a GPU, and this machine has {cards}")
    return wanted or cards or 2


def check_device(config: Config, device: plan.Device) -> None:
    """Refuse a precision that a device has not got; raises `ConfigError` naming the key."""
    if config.training.fp16 and not device.on_card:
        raise ConfigError("training.fp16: needs a GPU; set training.fp16=false")
    if config.training.bf16 and not device.bf16:
        raise ConfigError(f"training.bf16: {device.name} has none; set training.fp16=true instead")


def check_model(config: Config) -> plan.Shape | None:
    """Refuse what no machine could do with this model, before it is loaded; give its shape.

    Raises `ConfigError` naming the key.
    """
    shape = plan.read_shape(config.model)
    model.check_length(config, shape)
    if shape and (others := plan.adapted_layers(config.model) - plan.LAYERS):
        layers = f"{', '.join(others)} is none of the layers {', '.join(shape.layers)}"
        raise ConfigError(f"model.lora_target_modules: {layers}")
    return shape


def check_packages(config: Config) -> None:
    """Refuse what needs a package that is not installed, or a tracker that nobody knows.

    Raises `ConfigError` naming the key.
    """
    bits = config.model.quantization
    if bits != "none" and find_spec("bitsandbytes") is None:
        remedy = "pip install 'wuxia-core[quantized]', or set model.quantization=none"
        raise ConfigError(f"model.quantization {bits}: needs bitsandbytes; {remedy}")
    for name in set(config.training.report_to) - {"tensorboard"}:  # to ask takes seconds
        from transformers.integrations import INTEGRATION_TO_CALLBACK as KNOWN

        if name not in KNOWN or find_spec(name) is None:
            remedy = f"pip install {name}, or name another of {', '.join(KNOWN)}"
            raise ConfigError(f"training.report_to {name}: not installed, or not known; {remedy}")


def check_disk(folder: Path, needed: float) -> None:
    """Refuse to start where the run's checkpoints would not find room.

    Raises `MachineError` naming both sizes.
    """
    free = shutil.disk_usage(folder).free
    needed -= sum(path.stat().st_size for path in folder.glob("checkpoint-*/*"))  # pruned in time
    if free < needed:
        raise MachineError(
            f"training.output_dir {folder}: checkpoints need {needed / 2**20:,.1f} MiB, free are "
            f"{free / 2**20:,.1f}: free some, name another, or lower training.save_total_limit"
        )


def set_nccl_for_rtx40() -> list[str]:
    """Switch off NCCL's peer-to-peer and InfiniBand for RTX 40, unless the user set them.

    The cards have no peer-to-peer copy, and some drivers offer it all the same. Returns lines that
    say what was set.
    """
    if not any("GeForce RTX 40" in name for name, *_ in plan.machine_cards()):
        return []
    wanted = [key for key in ("NCCL_P2P_DISABLE", "NCCL_IB_DISABLE") if key not in os.environ]
    os.environ.update(dict.fromkeys(wanted, "1"))
    return [f"{key}=1 (GeForce RTX 40)" for key in wanted]


def summary(config: Config, processes: int, mixture: Mixture) -> str:
    """Describe the run in a few lines, the effective batch first."""
    training, rows = config.training, mixture.report.itertuples()
    size, accumulated = training.per_device_train_batch_size, training.gradient_accumulation_steps
    batch = f"{size} a process × {accumulated} accumulated × {processes} in parallel"
    wanted, there = effective_batch(config, processes), len(train_windows(mixture))
    if wanted > there:
        batch += f": each of {there} windows {wanted / there:.0f} times a step; lower it"
    shares = ", ".join(f"{row.source} {row.tokens:,} tokens ({row.share:.1%})" for row in rows)
    novels = mixture.outline.query("source == 'wuxia' and split in ('train', 'validation')")
    books = novels.groupby("book")["characters"].sum().sort_values(ascending=False).index
    return (
        f"effective batch {wanted:,} = {batch}\n"
        f"read as novels: {len(books)}, the largest {', '.join(books[:5])}\n"
        f"training text: {shares}\n"
        f"held out: {mixture.preparation['held_out']}"
    )
