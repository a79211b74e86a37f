"""What a run depends on, written into its folder and its checkpoints."""

import hashlib
import json
import os
import platform
import socket
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from wuxia_core.config import Config
from wuxia_core.errors import ConfigError, MachineError
from wuxia_core.preflight import effective_batch
from wuxia_core.run import manifest, versions

SAMPLED = 1024  # values of each weight that the base is known by


def dependencies(folder: Path, base: PreTrainedModel) -> dict[str, Any]:
    """Hash the config, the mixture's manifest and the base, and name the versions."""
    return {
        "config": hashlib.sha256((folder / "config.yaml").read_bytes()).hexdigest(),
        "data": hashlib.sha256((folder / "mixture.json").read_bytes()).hexdigest(),
        "base": fingerprint(base),
        "versions": versions(),
    }


def fingerprint(base: PreTrainedModel) -> str:
    """Hash names, shapes and the first values of all weights: enough to tell models apart."""
    digest = hashlib.sha256()
    for name, weight in base.named_parameters():
        first = weight.detach().flatten()[:SAMPLED].float().cpu().numpy()
        digest.update(f"{name} {tuple(weight.shape)}".encode() + first.tobytes())
    return digest.hexdigest()


def check_base(start: Path, base: str, name: str) -> None:
    """Raise `ConfigError` where a checkpoint is of another base model."""
    if manifest(start)["base"] != base:
        raise ConfigError(
            f"--resume: {start} was trained on other weights than those of {name} now; put them "
            "back, or insist with --allow-changed"
        )


def check_world_size(found: int) -> None:
    """Raise `MachineError` where the processes that torchrun started did not all meet."""
    wanted = int(os.environ.get("WORLD_SIZE", 1))
    if found != wanted:
        raise MachineError(
            f"{found} of {wanted} processes have met; python launch_ddp.py --doctor says more"
        )


def write_environment(config: Config, folder: Path, world_size: int) -> None:
    """Write what the run runs on to `environment.json`."""
    on_gpu = torch.cuda.is_available()
    facts = {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name() if on_gpu else platform.machine(),
        "cpu_count": os.cpu_count(),
        "processes": world_size,
        "effective_batch": effective_batch(config, world_size),
        "launcher": [socket.gethostname(), os.getppid()],
        **versions(),
    }
    (folder / "environment.json").write_text(json.dumps(facts, indent=1), encoding="utf-8")
