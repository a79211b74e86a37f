"""Going on with a run that stopped: from its newest whole checkpoint, and as the same run."""

import json
import logging
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

from wuxia_core.config import Config, load_config
from wuxia_core.errors import ConfigError
from wuxia_core.mixing import manifest_of, read_manifest
from wuxia_core.run.checkpoints import MANIFEST, newest_whole
from wuxia_core.run.folder import ADAPTER

logger = logging.getLogger(__name__)

PACKAGES = ("torch", "transformers", "peft", "accelerate", "numpy")
FREE = (  # do not touch the adapter
    "plan.", "training.output_dir", "evaluation.minutes", "evaluation.wits_margin",
    "evaluation.general_margin", "evaluation.max_copied", "evaluation.max_extracted",
)  # fmt: skip


def resume_point(folder: Path) -> Path | None:
    """Find the checkpoint that a stopped run goes on from; None where it has to start again.

    Raises `ConfigError` where the run is finished.
    """
    if (folder / ADAPTER).exists():
        raise ConfigError(
            f"--resume: {folder} is finished; python -m wuxia_core.evaluate {folder} measures it"
        )
    checkpoint = newest_whole(folder)
    if checkpoint is None:
        logger.warning("--resume: no whole checkpoint in %s, so it starts again", folder)
    elif (then := manifest(checkpoint)["versions"]) != versions():
        changed = [f"{p} {then[p]} (now {now})" for p, now in versions().items() if then[p] != now]
        logger.warning("%s was saved with %s; numbers may differ", checkpoint, ", ".join(changed))
    return checkpoint


def versions() -> dict[str, str]:
    """Versions of what the numbers depend on."""
    return {package: version(package) for package in PACKAGES}


def check_unchanged(
    config: Config, folder: Path, checkpoint: Path | None, processes: int, insist: bool = False
) -> None:
    """Refuse to go on with other settings, texts or processes than the run began with.

    Raises `ConfigError` naming each that differs; who insists is only told.
    """
    before = load_config(folder / "config.yaml")
    differing = list(_settings(before, config))
    was = manifest(checkpoint)["world_size"] if checkpoint else processes
    if was != processes:
        differing.append(f"processes: {was} then, {processes} now (--nproc, --nnodes)")
    if manifest_of(config) != read_manifest(folder, "mixture.json"):
        differing.append(f"the texts, or how they are cut, are not those in {folder}/mixture.json")
    if differing:
        what = "\n  ".join(differing)
        if insist:
            logger.warning("--allow-changed: from here on it is another run:\n  %s", what)
            return
        raise ConfigError(
            f"--resume: this would be another run than the one in {folder}:\n  {what}\n"
            "Set them back, or insist with --allow-changed"
        )


def manifest(checkpoint: Path) -> dict[str, Any]:
    """Read what a whole checkpoint says of itself."""
    facts: dict[str, Any] = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))
    return facts


def _settings(before: Config, now: Config) -> Iterator[str]:
    """Name the settings that differ."""
    for (section, then), current in zip(before, dict(now).values(), strict=True):
        for (key, old), new in zip(then, dict(current).values(), strict=True):
            name = f"{section}.{key}"
            if old != new and not name.startswith(FREE):
                yield f"{name}: {old} then, {new} now"
