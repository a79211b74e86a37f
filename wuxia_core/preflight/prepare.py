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
    """Check what can be checked without the model, mix, print the forecast, open the run folder.

    `start` is the checkpoint that a resumed run goes on from. `config` gets `folder` as its
    output_dir, and a number of warm-up steps where it has none. Raises `ConfigError`, `DataError`
    or `MachineError` where the run cannot work.
    """
    config.training.output_dir = str(folder)
    device = plan.this_device(config, processes.total)
    check_device(config, device)
    check_packages(config)
    shape = check_model(config)
    if shape:
        tokenizer = model.load_tokenizer(model.base_path(config.model))
        # refuses a masking.mask_token that the tokenizer has not got
        model.mask_token_id(tokenizer, shape.vocab_size, config.masking.mask_token)
    mixture = mix(config)
    if (windows := len(train_windows(mixture))) < processes.total:
        fact = f"{processes.total} processes for {windows} training windows"
        raise ConfigError(f"{fact}: lower --nproc or data.max_length, or add text to data.data_dir")
    if config.training.warmup_steps is None:
        steps = int(run_steps(config, windows, processes.total))
        config.training.warmup_steps = min(100, -(-steps // 20))  # 5 %, rounded up
    text = plan.describe_plan(config, shape, device, plan.measured_text(config, mixture))
    print(summary(config, processes.total, mixture), text, *set_nccl_for_rtx40(), sep="\n")
    if shape:
        if not device.on_card and not plan.fits(config, shape, device):
            raise MachineError(f"this machine has not the memory for it; {model.LESS_MEMORY}")
        check_disk(folder, plan.checkpoint_bytes(config, shape))
    open_folder(config, mixture, folder)
    print(messages("training")["into"].format(folder=folder, step=step_of(start) if start else 0))


def forecast(config: Config, processes: int | None) -> str:
    """Write what a run needs, for `--plan`; nothing is mixed, loaded or started.

    The run is on this machine's GPUs; where there are none, on those of the config's section
    `plan`, or on this machine's CPU where `plan` names no GPU.
    """
    shape, card_named = check_model(config), config.plan.card or config.plan.card_gib
    if card_named and not torch.cuda.is_available():
        device = plan.planned_device(config, processes or config.plan.cards)
    else:
        device = plan.this_device(config, process_count(processes))
    if device.on_card:  # of a config for GPUs a forecast on a CPU is still of use
        check_device(config, device)
    mixture = current_mixture(config)
    text = plan.measured_text(config, mixture) if mixture else plan.estimated_text(config)
    return plan.describe_plan(config, shape, device, text)


def process_count(nproc: int | None) -> int:
    """Choose how many processes to start: `nproc`, else one a GPU, or two on a machine without any.

    Raises `ConfigError` where `nproc` is more than there are GPUs.
    """
    cards = torch.cuda.device_count()
    if nproc and 0 < cards < nproc:
        raise ConfigError(f"--nproc {nproc}: one a GPU, and this machine has {cards}")
    return nproc or cards or 2


def check_device(config: Config, device: plan.Device) -> None:
    """Raise `ConfigError`, naming the key, where the device cannot train in the set precision."""
    if config.training.fp16 and not device.on_card:
        raise ConfigError("training.fp16: needs a GPU; set training.fp16=false")
    if config.training.bf16 and not device.bf16:
        raise ConfigError(f"training.bf16: {device.name} has none; set training.fp16=true instead")


def check_model(config: Config) -> plan.Shape | None:
    """Check windows and adapted layers against the model, before it is loaded; return its shape.

    Returns None where the shape is not known. Raises `ConfigError`, naming the key, where windows
    are longer than the model reads, or `model.lora_target_modules` names no layer of it.
    """
    shape = plan.read_shape(config.model)
    model.check_length(config, shape)
    if shape and (unknown := plan.adapted_layers(config.model) - plan.LAYERS):
        fault = f"{', '.join(unknown)} is none of the layers {', '.join(shape.layers)}"
        raise ConfigError(f"model.lora_target_modules: {fault}")
    return shape


def check_packages(config: Config) -> None:
    """Raise `ConfigError`, naming the key, where a package is missing or a tracker not known."""
    bits = config.model.quantization
    if bits != "none" and find_spec("bitsandbytes") is None:
        remedy = "pip install 'wuxia-core[quantized]', or set model.quantization=none"
        raise ConfigError(f"model.quantization {bits}: needs bitsandbytes; {remedy}")
    for name in set(config.training.report_to) - {"tensorboard"}:  # which is always installed
        from transformers import integrations  # takes seconds

        known = integrations.INTEGRATION_TO_CALLBACK  # by a tracker's name in report_to
        # `is_…_available` has other names for some, and knows what each needs
        alias = {"azure_ml": "azureml", "comet_ml": "comet", "flyte": "flytekit"}.get(name, name)
        if name not in known or not getattr(integrations, f"is_{alias}_available")():
            remedy = f"install its package, or name another of {', '.join(known)}"
            raise ConfigError(f"training.report_to {name}: not installed, or not known; {remedy}")


def check_disk(folder: Path, needed: float) -> None:
    """Raise `MachineError` where the disk has not the `needed` bytes for a run's checkpoints.

    The bytes of checkpoints that lie in `folder` already are not needed again.
    """
    free = shutil.disk_usage(folder).free
    needed -= sum(path.stat().st_size for path in folder.glob("checkpoint-*/*"))
    if free < needed:
        raise MachineError(
            f"training.output_dir {folder}: checkpoints need {needed / 2**20:,.1f} MiB, free are "
            f"{free / 2**20:,.1f}: free some, name another, or lower training.save_total_limit"
        )


def set_nccl_for_rtx40() -> list[str]:
    """Switch off NCCL's peer-to-peer and InfiniBand for RTX 40, unless the user set them.

    The cards have no peer-to-peer copy, and some drivers offer it all the same. Returns a line for
    each variable that was set, such as "NCCL_P2P_DISABLE=1 (GeForce RTX 40)".
    """
    if not any("GeForce RTX 40" in name for name, *_ in plan.machine_cards()):
        return []
    unset = [key for key in ("NCCL_P2P_DISABLE", "NCCL_IB_DISABLE") if key not in os.environ]
    os.environ.update(dict.fromkeys(unset, "1"))
    return [f"{key}=1 (GeForce RTX 40)" for key in unset]


def summary(config: Config, processes: int, mixture: Mixture) -> str:
    """Describe a run's effective batch, novels, training and held-out text, one line for each."""
    training, rows = config.training, mixture.report.itertuples()  # a row a source
    size, accumulated = training.per_device_train_batch_size, training.gradient_accumulation_steps
    product = f"{size} a process × {accumulated} accumulated × {processes} in parallel"
    batch, windows = effective_batch(config, processes), len(train_windows(mixture))
    if batch > windows:
        product += f": each of {windows} windows {batch / windows:.0f} times a step; lower it"
    shares = ", ".join(f"{row.source} {row.tokens:,} tokens ({row.share:.1%})" for row in rows)
    novels = mixture.outline.query("source == 'wuxia' and split in ('train', 'validation')")
    books = novels.groupby("book")["characters"].sum().sort_values(ascending=False).index
    return (
        f"effective batch {batch:,} = {product}\n"
        f"read as novels: {len(books)}, the largest {', '.join(books[:5])}\n"
        f"training text: {shares}\n"
        f"held out: {mixture.preparation['held_out']}"
    )
