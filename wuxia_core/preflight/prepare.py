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
from wuxia_core.run import step_of, write_setup
from wuxia_core.torchrun import Processes


def prepare_run(
    config: Config, folder: Path, processes: Processes, start: Path | None = None
) -> None:
    """Check what can be checked without the model, mix, print the forecast, open the run folder.

    `folder` exists already. `start` is the checkpoint that a resumed run goes on from; its step is
    printed. `config` gets `folder` as its output_dir, and a number of warm-up steps if it has none.
    On GeForce RTX 40 environment variables for NCCL are set (`set_nccl_for_rtx40`).

    Raises `ConfigError` if config, machine, model and number of processes do not go together or the
    mixture's folder is not free, `DataError` if texts are missing or too short, `MachineError` if
    the tokenizer cannot be loaded, GPUs do not answer, a folder cannot be written, or the disk or
    the CPU's memory is too small. Too little memory of GPUs is no error: the forecast says so.
    """
    config.training.output_dir = str(folder)
    device = plan.this_device(config, processes.total, processes.machines)
    check_device(config, device)
    check_packages(config)
    shape = check_model(config)  # None if not known
    if shape:
        tokenizer = model.load_tokenizer(model.base_path(config.model))
        # raises `ConfigError` if `masking.mask_token` is no token of it
        model.mask_token_id(tokenizer, shape.vocab_size, config.masking.mask_token)
    mixture = mix(config)
    if (windows := len(train_windows(mixture))) < processes.total:
        fact = f"{processes.total} processes for {windows} training windows"
        raise ConfigError(f"{fact}: lower --nproc or data.max_length, or add text to data.data_dir")
    if config.training.warmup_steps is None:
        steps = int(run_steps(config, windows, processes.total))  # of the whole run
        config.training.warmup_steps = min(100, -(-steps // 20))  # 5 %, rounded up
    text = plan.describe_plan(config, shape, device, plan.measured_text(config, mixture))
    print(summary(config, processes.total, mixture), text, *set_nccl_for_rtx40(), sep="\n")
    if shape:
        if not device.on_card and not plan.fits(config, shape, device):
            raise MachineError(f"this machine has not the memory for it; {model.LESS_MEMORY}")
        check_disk(folder, plan.checkpoint_bytes(config, shape))
    write_setup(config, mixture, folder)
    print(messages("training")["into"].format(folder=folder, step=step_of(start) if start else 0))


def forecast(config: Config, processes: int | None) -> str:
    """Give the forecast of a run as text, for `--plan`: no text is mixed, no model is loaded.

    The forecast is for this machine's GPUs. If the machine has none, it is for the card that the
    config's section plan names, and if none is named for this machine's CPU. `processes` is the
    number of processes; None means one a GPU (`plan.cards` of a named card), or two on the CPU.

    Raises `ConfigError` if a config key, the card or the number of processes is unfit, `DataError`
    if texts are missing or too short, `MachineError` if GPUs or the tokenizer cannot be reached.
    """
    shape, card_named = check_model(config), config.plan.card or config.plan.card_gib
    if card_named and not torch.cuda.is_available():
        device = plan.planned_device(config, processes or config.plan.cards)
    else:
        device = plan.this_device(config, process_count(processes))
    if device.on_card:  # on a CPU the forecast of a config for GPUs is still of use
        check_device(config, device)
    mixture = current_mixture(config)
    text = plan.measured_text(config, mixture) if mixture else plan.estimated_text(config)
    return plan.describe_plan(config, shape, device, text)


def process_count(nproc: int | None) -> int:
    """Choose how many processes to start: `nproc`, else one a GPU, or two on a machine without any.

    Raises `ConfigError` if there are GPUs, but fewer than `nproc`.
    """
    cards = torch.cuda.device_count()
    if nproc and 0 < cards < nproc:
        raise ConfigError(f"--nproc {nproc}: one a GPU, and this machine has {cards}")
    return nproc or cards or 2


def check_device(config: Config, device: plan.Device) -> None:
    """Raise `ConfigError`, naming the key, if the device cannot train in the precision that is set.

    float16 needs a GPU; bfloat16 works on the CPU, and on GPUs that have it.
    """
    if config.training.fp16 and not device.on_card:
        raise ConfigError("training.fp16: needs a GPU; set training.fp16=false")
    if config.training.bf16 and not device.bf16:
        raise ConfigError(f"training.bf16: {device.name} has none; set training.fp16=true instead")


def check_model(config: Config) -> plan.Shape | None:
    """Check windows and adapted layers against the model, before it is loaded; return its shape.

    If the shape is not known (see `plan.read_shape`), nothing is checked and None is returned.
    Raises `ConfigError`, naming the key, if `data.max_length` is more than the model reads, or
    `model.lora_target_modules` has a name that is not in `plan.LAYERS`.
    """
    shape = plan.read_shape(config.model)
    model.check_length(config, shape)
    if shape and (unknown := plan.adapted_layers(config.model) - plan.LAYERS):
        fault = f"{', '.join(sorted(unknown))} is none of the layers {', '.join(shape.layers)}"
        raise ConfigError(f"model.lora_target_modules: {fault}")
    return shape


def check_packages(config: Config) -> None:
    """Raise `ConfigError`, naming the key, if bitsandbytes or a tracker is needed but missing.

    The trackers are listed in `training.report_to`. A name that transformers does not know counts
    as missing.
    """
    bits = config.model.quantization
    if bits != "none" and find_spec("bitsandbytes") is None:
        remedy = "pip install 'wuxia-core[quantized]', or set model.quantization=none"
        raise ConfigError(f"model.quantization {bits}: needs bitsandbytes; {remedy}")
    for name in set(config.training.report_to) - {"tensorboard"}:  # which is always installed
        from transformers import integrations  # takes seconds

        known = integrations.INTEGRATION_TO_CALLBACK  # by a tracker's name in report_to
        # `is_…_available` knows what a tracker needs, but calls some otherwise
        alias = {"azure_ml": "azureml", "comet_ml": "comet", "flyte": "flytekit"}.get(name, name)
        if name not in known or not getattr(integrations, f"is_{alias}_available")():
            remedy = f"install its package, or name another of {', '.join(known)}"
            raise ConfigError(f"training.report_to {name}: not installed, or not known; {remedy}")


def check_disk(folder: Path, needed: float) -> None:
    """Raise `MachineError` if the disk of `folder` lacks the `needed` bytes for checkpoints.

    `needed` is for those that are kept at a time; the bytes of those in `folder` are subtracted.
    """
    free = shutil.disk_usage(folder).free
    needed -= sum(path.stat().st_size for path in folder.glob("checkpoint-*/*"))
    if free < needed:
        fact = f"checkpoints need {needed / 2**20:,.1f} MiB more, free are {free / 2**20:,.1f}"
        remedy = "free some, name another folder, or lower training.save_total_limit"
        raise MachineError(f"training.output_dir {folder}: {fact}: {remedy}")


def set_nccl_for_rtx40() -> list[str]:
    """Switch off NCCL's peer-to-peer copies and InfiniBand if this machine has a GeForce RTX 40.

    These cards have no peer-to-peer copy, and some drivers offer it all the same. NCCL reads both
    settings from environment variables; one that the user has set stays. Returns a line for each
    variable that was set here, "NCCL_P2P_DISABLE=1 (GeForce RTX 40)"; no lines without such a card.
    """
    if not any("GeForce RTX 40" in name for name, *_ in plan.machine_cards()):
        return []
    unset = [key for key in ("NCCL_P2P_DISABLE", "NCCL_IB_DISABLE") if key not in os.environ]
    os.environ.update(dict.fromkeys(unset, "1"))
    return [f"{key}=1 (GeForce RTX 40)" for key in unset]


def summary(config: Config, processes: int, mixture: Mixture) -> str:
    """Give four lines of text: a run's effective batch, its novels, training and held-out text.

    `processes` is the number of processes on all machines.
    """
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
