"""What happens before torchrun: checks, the mixture, the forecast, the run folder."""

import os
import shutil
from importlib.util import find_spec
from pathlib import Path

from wuxia_core.config import LINEAR_LAYERS, Config, effective_batch
from wuxia_core.errors import ConfigError, MachineError
from wuxia_core.mixing import Mixture, current_mixture, mix, train_windows
from wuxia_core.model import load_tokenizer, mask_token_id
from wuxia_core.preflight.plan import (
    checkpoint_bytes,
    describe_plan,
    estimated_text,
    measured_text,
    planned_device,
    read_shape,
    this_device,
)
from wuxia_core.run import open_folder
from wuxia_core.torchrun import Processes


def prepare_run(
    config: Config, folder: Path, processes: Processes, start: Path | None = None
) -> None:
    """Check all that can be checked without a model, mix, say what the run needs, open its folder.

    `start` is the checkpoint that a run goes on from. Raises as what it calls.
    """
    config.training.output_dir = str(folder)
    check_settings(config)
    check_mask_token(config)
    mixture = mix(config)
    check_windows(config, len(train_windows(mixture)), processes.total)
    print(summary(config, processes.total, mixture))
    print(describe_plan(config, this_device(processes.total), measured_text(mixture)))
    for precaution in card_precautions():
        print(precaution)
    shape = read_shape(config.model.model_name_or_path)
    if shape:
        check_disk(folder, checkpoint_bytes(config, shape))
    open_folder(config, mixture, folder)
    print(f"training into {folder}" + (f", from {start.name} on" if start else ""))


def forecast(config: Config, asked: int | None) -> str:
    """Say what a run needs; nothing is mixed, loaded or started."""
    import torch

    check_model(config)
    device = None if torch.cuda.is_available() else planned_device(config, asked)
    if device is None:
        check_device(config)
        device = this_device(process_count(asked))
    mixture = current_mixture(config)
    return describe_plan(
        config, device, measured_text(mixture) if mixture else estimated_text(config)
    )


def process_count(asked: int | None) -> int:
    """Choose how many processes to start: one a GPU, two on a machine without any.

    Raises `ConfigError` where more are asked for than there are GPUs.
    """
    import torch

    cards = torch.cuda.device_count()
    if asked is not None and (asked < 1 or 0 < cards < asked):
        has = f"; this machine has {cards} GPUs" if cards else ""
        raise ConfigError(f"--nproc {asked}: must be at least 1, and one a GPU{has}")
    return asked or cards or 2


def check_windows(config: Config, windows: int, processes: int) -> None:
    """Refuse a mixture that cannot give each process a window.

    Raises `ConfigError` naming both numbers.
    """
    if windows < processes:
        raise ConfigError(
            f"{processes} processes for {windows} training windows of {config.data.max_length} "
            f"tokens: lower --nproc or data.max_length, or add text to {config.data.data_dir}"
        )


def check_settings(config: Config) -> None:
    """Refuse what the device or the model cannot do, before anything is loaded.

    Raises `ConfigError` naming the key.
    """
    check_device(config)
    check_model(config)


def check_device(config: Config) -> None:
    """Refuse a precision that this machine has not got."""
    import torch

    on_card = torch.cuda.is_available()
    if config.training.fp16 and not on_card:
        raise ConfigError("training.fp16: needs a GPU; set training.fp16=false")
    if config.training.bf16 and on_card and not torch.cuda.is_bf16_supported(False):
        name = torch.cuda.get_device_name()
        raise ConfigError(f"training.bf16: {name} has none; set training.fp16=true in its place")


def check_model(config: Config) -> None:
    """Refuse what no machine could do with this model."""
    if config.model.quantization != "none" and find_spec("bitsandbytes") is None:
        raise ConfigError(
            f"model.quantization {config.model.quantization}: needs bitsandbytes; "
            "pip install 'wuxia-core[quantized]', or set model.quantization=none"
        )
    shape = read_shape(config.model.model_name_or_path)
    if shape is None:
        return
    if config.data.max_length > shape.positions:
        raise ConfigError(
            f"data.max_length {config.data.max_length}: {config.model.model_name_or_path} reads "
            f"{shape.positions} tokens at most"
        )
    if unknown := set(config.model.lora_target_modules) - set(LINEAR_LAYERS):
        raise ConfigError(
            f"model.lora_target_modules: {', '.join(sorted(unknown))} is none of its linear "
            f"layers, which are {', '.join(LINEAR_LAYERS)}"
        )


def check_mask_token(config: Config) -> None:
    """Refuse a mask token that the vocabulary has not got; raises `ConfigError`."""
    name = config.model.model_name_or_path
    if shape := read_shape(name):
        mask_token_id(load_tokenizer(name), shape.vocab, config.masking.mask_token)


def check_disk(folder: Path, needed: float) -> None:
    """Refuse to start where the run's checkpoints would not find room.

    Raises `MachineError` naming both sizes.
    """
    free = shutil.disk_usage(folder).free
    needed -= sum(path.stat().st_size for path in folder.glob("checkpoint-*/*"))  # pruned in time
    if free < needed:
        raise MachineError(
            f"training.output_dir {folder}: {free / 2**20:,.1f} MiB free, and checkpoints need "
            f"{needed / 2**20:,.1f}: free some, name another folder, or lower "
            "training.save_total_limit"
        )


def card_precautions() -> list[str]:
    """Switch off what RTX 40 cards get wrong over NCCL, unless the user decided; say what was set.

    They have no peer-to-peer copy, and some drivers offer it all the same.
    """
    import torch

    names = [torch.cuda.get_device_name(card) for card in range(torch.cuda.device_count())]
    if not any("GeForce RTX 40" in name for name in names):
        return []
    wanted = [key for key in ("NCCL_P2P_DISABLE", "NCCL_IB_DISABLE") if key not in os.environ]
    os.environ.update(dict.fromkeys(wanted, "1"))
    return [f"{key}=1 (GeForce RTX 40)" for key in wanted]


def summary(config: Config, processes: int, mixture: Mixture) -> str:
    """Describe the run in a few lines, the effective batch first."""
    training = config.training
    shares = ", ".join(
        f"{row.source} {row.tokens:,} tokens ({row.share:.1%})"
        for row in mixture.report.itertuples()
    )
    files = [file for file in mixture.preparation["files"] if file["source"] == "general"]
    general = ", ".join(file["path"] for file in files[:3]) + " …" * (len(files) > 3)
    return (
        f"effective batch {effective_batch(config, processes)} = "
        f"{training.per_device_train_batch_size} a process "
        f"× {training.gradient_accumulation_steps} accumulated × {processes} in parallel\n"
        f"training text: {shares}; general text from {general or 'nowhere'}\n"
        f"held out: {_held_out(mixture) or 'nothing'}"
    )


def _held_out(mixture: Mixture) -> str:
    """Name the novels that are held out, and how much of one that is so in part."""
    novels = mixture.outline.query("source == 'wuxia' and split != 'duplicate'")
    chapters = novels["split"].eq("validation").groupby(novels["book"]).agg(["sum", "size"])
    return ", ".join(
        book if some == all_ else f"{some} of the {all_} chapters of {book}"
        for book, some, all_ in chapters[chapters["sum"] > 0].itertuples()
    )
