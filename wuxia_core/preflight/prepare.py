"""What happens before torchrun: checks, the mixture, the forecast, the run folder."""

import os
import shutil
from importlib.util import find_spec
from pathlib import Path

import torch

from wuxia_core.config import Config, effective_batch
from wuxia_core.errors import ConfigError, MachineError
from wuxia_core.mixing import Mixture, current_mixture, mix, train_windows
from wuxia_core.model import base_path, check_length, load_tokenizer, mask_token_id
from wuxia_core.preflight import plan
from wuxia_core.run import open_folder
from wuxia_core.torchrun import Processes


def prepare_run(
    config: Config, folder: Path, processes: Processes, start: Path | None = None
) -> None:
    """Check all that can be checked without a model, mix, say what the run needs, open its folder.

    `start` is the checkpoint that a run goes on from. Raises as what it calls.
    """
    config.training.output_dir = str(folder)
    check_device(config)
    shape = check_model(config)
    if shape:
        tokenizer = load_tokenizer(base_path(config.model))
        mask_token_id(tokenizer, shape.vocab_size, config.masking.mask_token)
    mixture = mix(config)
    if (windows := len(train_windows(mixture))) < processes.total:
        what = f"{processes.total} processes for {windows} training windows"
        raise ConfigError(f"{what}: lower --nproc or data.max_length, or add text to data.data_dir")
    device, text = plan.this_device(processes.total), plan.measured_text(mixture)
    needs = plan.describe_plan(config, shape, device, text)
    print(summary(config, processes.total, mixture), needs, *card_precautions(), sep="\n")
    if shape:
        check_disk(folder, plan.checkpoint_bytes(config, shape))
    open_folder(config, mixture, folder)
    print(f"training into {folder}" + (f", from {start.name} on" if start else ""))


def forecast(config: Config, processes: int | None) -> str:
    """Say what a run needs; nothing is mixed, loaded or started."""
    shape, card = check_model(config), config.plan.card
    if card is None or torch.cuda.is_available():
        check_device(config)
        device = plan.this_device(process_count(processes))
    else:
        device = plan.planned_device(card, processes or config.plan.cards)
    mixture = current_mixture(config)
    text = plan.measured_text(mixture) if mixture else plan.estimated_text(config)
    return plan.describe_plan(config, shape, device, text)


def process_count(wanted: int | None) -> int:
    """Choose how many processes to start: one a GPU, two on a machine without any.

    Raises `ConfigError` where more are wanted than there are GPUs.
    """
    cards = torch.cuda.device_count()
    if wanted and 0 < cards < wanted:
        raise ConfigError(f"--nproc {wanted}: one a GPU, and this machine has {cards}")
    return wanted or cards or 2


def check_device(config: Config) -> None:
    """Refuse a precision that this machine has not got; raises `ConfigError` naming the key."""
    on_card = torch.cuda.is_available()
    if config.training.fp16 and not on_card:
        raise ConfigError("training.fp16: needs a GPU; set training.fp16=false")
    if config.training.bf16 and on_card and not torch.cuda.is_bf16_supported(False):
        name = torch.cuda.get_device_name()
        raise ConfigError(f"training.bf16: {name} has none; set training.fp16=true in its place")


def check_model(config: Config) -> plan.Shape | None:
    """Refuse what no machine could do with this model, before it is loaded; give its shape.

    Raises `ConfigError` naming the key.
    """
    bits = config.model.quantization
    if bits != "none" and find_spec("bitsandbytes") is None:
        remedy = "pip install 'wuxia-core[quantized]', or set model.quantization=none"
        raise ConfigError(f"model.quantization {bits}: needs bitsandbytes; {remedy}")
    check_trackers(config.training.report_to)
    shape = plan.read_shape(config.model)
    check_length(config, shape)
    if shape and (others := plan.targets(config.model) - plan.LAYERS):
        layers = f"{', '.join(others)} is none of the layers {', '.join(shape.layers)}"
        raise ConfigError(f"model.lora_target_modules: {layers}")
    return shape


def check_trackers(names: list[str]) -> None:
    """Refuse a tracker that transformers does not know, or whose package is not installed."""
    for name in set(names) - {"tensorboard"}:  # which is; to ask transformers takes seconds
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


def card_precautions() -> list[str]:
    """Switch off what RTX 40 cards get wrong over NCCL, unless the user decided; say what was set.

    They have no peer-to-peer copy, and some drivers offer it all the same.
    """
    names = [torch.cuda.get_device_name(card) for card in range(torch.cuda.device_count())]
    if not any("GeForce RTX 40" in name for name in names):
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
    return (
        f"effective batch {wanted:,} = {batch}\n"
        f"training text: {shares}\n"
        f"held out: {mixture.preparation['held_out']}"
    )
