"""What happens before torchrun: checks, the mixture, the forecast, the run folder."""

from pathlib import Path

from wuxia_core.config import Config
from wuxia_core.mixing import current_mixture, mix, train_windows
from wuxia_core.preflight import checks
from wuxia_core.preflight.plan import plan, planned_device, this_device
from wuxia_core.preflight.shape import read_shape
from wuxia_core.preflight.work import checkpoint_bytes, estimated_text, measured_text
from wuxia_core.run import Processes, open_folder


def prepare(config: Config, folder: Path, processes: Processes, start: Path | None = None) -> None:
    """Check all that can be checked without a model, mix, say what the run needs, open its folder.

    `start` is the checkpoint that a run goes on from. Raises as what it calls.
    """
    config.training.output_dir = str(folder)
    checks.check_settings(config)
    checks.check_mask_token(config)
    mixture = mix(config)
    checks.check_windows(config, len(train_windows(mixture)), processes.total)
    print(checks.summary(config, processes.total, mixture))
    print(plan(config, this_device(processes.total), measured_text(mixture)))
    for precaution in checks.card_precautions():
        print(precaution)
    shape = read_shape(config.model.model_name_or_path)
    if shape:
        checks.check_disk(folder, checkpoint_bytes(config, shape))
    open_folder(config, mixture, folder)
    print(f"training into {folder}" + (f", from {start.name} on" if start else ""))


def forecast(config: Config, asked: int | None) -> str:
    """Say what a run needs; nothing is mixed, loaded or started."""
    import torch

    checks.check_model(config)
    device = None if torch.cuda.is_available() else planned_device(config, asked)
    if device is None:
        checks.check_device(config)
        device = this_device(checks.process_count(asked))
    mixture = current_mixture(config)
    return plan(config, device, measured_text(mixture) if mixture else estimated_text(config))
