"""What happens before torchrun: checks, the mixture, the forecast, the run folder."""

from pathlib import Path

from wuxia_core.config import Config
from wuxia_core.mixing import current_mixture, mix, train_windows
from wuxia_core.preflight import checks
from wuxia_core.preflight.plan import plan, planned_device, this_device
from wuxia_core.preflight.work import estimated_text, measured_text


def prepare(config: Config, folder: Path, asked: int | None) -> int:
    """Check all that can be checked without a model, mix, say what the run needs, open its folder.

    Returns how many processes to start: `asked`, or what the machine has. Raises as what it calls.
    """
    config.training.output_dir = str(folder)
    processes = checks.process_count(asked)
    checks.check_device(config)
    mixture = mix(config)
    checks.check_windows(config, len(train_windows(mixture)), processes)
    print(checks.summary(config, processes, mixture))
    print(plan(config, this_device(processes), measured_text(mixture)))
    for precaution in checks.card_precautions():
        print(precaution)
    checks.open_run_folder(config, mixture, folder)
    print(f"training into {folder}")
    return processes


def forecast(config: Config, asked: int | None) -> str:
    """Say what a run needs; nothing is mixed, loaded or started."""
    device = planned_device(config, asked)
    if device is None:
        checks.check_device(config)
        device = this_device(checks.process_count(asked))
    mixture = current_mixture(config)
    return plan(config, device, measured_text(mixture) if mixture else estimated_text(config))
