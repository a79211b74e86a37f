"""Saving what is whole or not at all: checkpoints, and the adapter at the end."""

import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from accelerate.utils import gather_object
from safetensors import SafetensorError
from transformers import Trainer

from wuxia_core.errors import MachineError
from wuxia_core.run import checkpoints

ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")  # the last one says: done


class AtomicTrainer(Trainer):
    """Trainer whose checkpoints appear whole, under their name, or not at all.

    All ranks write into a folder aside; the first seals and renames it. A rank that cannot write
    tells the others; then older checkpoints make room, and all try once more.
    """

    facts: dict[str, Any]  # what a checkpoint's manifest says besides
    checkpoints_kept: int
    _staging: Path | None = None

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._staging) if self._staging else super()._get_output_dir(trial)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        folder = Path(self.args.output_dir)
        problem = self._tried(self._stage, model, trial) or self._tried(self._publish)
        if problem:
            self._tried(self._make_room, checkpoints.KEPT)
            problem = self._tried(self._stage, model, trial) or self._tried(self._publish)
        self._tried(self._make_room, self.checkpoints_kept)
        if problem:
            free = shutil.disk_usage(folder).free / 2**20
            raise MachineError(
                f"{folder}: the checkpoint of step {self.state.global_step} cannot be written "
                f"({free:,.1f} MiB free; {problem}); free some space and go on with --resume from "
                "the one before"
            )

    def _tried(self, work: Any, *arguments: Any) -> str | None:
        """Do something on all ranks; tell every rank the first thing that went wrong on any."""
        problem = None
        try:
            work(*arguments)
        except (OSError, RuntimeError, SafetensorError) as error:
            problem = (str(error).splitlines() or [type(error).__name__])[0]
        problems = gather_object([problem])  # waits for all
        return next((said for said in problems if said), None)

    def _make_room(self, kept: int) -> None:
        if self.is_world_process_zero():
            folder = Path(self.args.output_dir)
            checkpoints.clear_staging(folder)
            checkpoints.prune(folder, kept)

    def _stage(self, model: Any, trial: Any) -> None:
        step = self.state.global_step
        self._staging = Path(self.args.output_dir) / f"{checkpoints.STAGING}{step}"
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self._staging = None

    def _publish(self) -> None:
        if not self.is_world_process_zero():
            return
        folder, step = Path(self.args.output_dir), self.state.global_step
        staged = folder / f"{checkpoints.STAGING}{step}" / f"checkpoint-{step}"
        wanted = {f"rng_state_{rank}.pth" for rank in range(self.args.world_size)}
        if self.args.world_size > 1 and (missing := wanted - {p.name for p in staged.iterdir()}):
            names = ", ".join(sorted(missing))
            raise OSError(f"{names} cannot be seen here: do all machines share the folder?")
        checkpoints.seal(staged, {"step": step, "world_size": self.args.world_size, **self.facts})
        checkpoints.publish(staged, folder)


def save_adapter(model: Any, folder: Path) -> None:
    """Put the two files of the adapter into a folder, without PEFT's empty model card."""
    folder.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as staging:
        model.save_pretrained(staging)
        for name in ADAPTER_FILES:
            with (Path(staging) / name).open("rb") as file:
                os.fsync(file.fileno())
            (Path(staging) / name).replace(folder / name)


def best_adapter(folder: Path) -> Path | None:
    """Find the best adapter so far, in a folder named after its step; None where there is none."""
    whole = [path for path in folder.glob("best-[0-9]*") if (path / ADAPTER_FILES[-1]).exists()]
    return max(whole, key=checkpoints.step_of, default=None)


def save_best(model: Any, folder: Path, step: int) -> None:
    """Keep this adapter as the best, instead of the one before."""
    before = [path for path in folder.glob("best-[0-9]*") if checkpoints.step_of(path) != step]
    save_adapter(model, folder / f"best-{step}")
    for path in before:
        shutil.rmtree(path)


def finish(model: Any, folder: Path) -> None:
    """Put the best adapter, or where none was measured this one, at the top of the run folder."""
    best = best_adapter(folder)
    if best is None:
        save_adapter(model, folder)
    else:
        for name in ADAPTER_FILES:
            if (best / name).exists():  # or it was moved before the run was killed
                (best / name).replace(folder / name)
    for path in folder.glob("best-[0-9]*"):
        shutil.rmtree(path)
