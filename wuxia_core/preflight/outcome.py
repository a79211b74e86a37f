"""What a run that stopped leaves behind, and the exit status it ends with."""

import sys
from pathlib import Path
from typing import Any

from wuxia_core.errors import BUG, STOPPED, MachineError


def newest_checkpoint(folder: Path) -> Path | None:
    """Find the newest whole checkpoint; its `trainer_state.json` is written last."""
    whole = [path.parent for path in folder.glob("checkpoint-*/trainer_state.json")]
    steps = {path.name.partition("-")[2]: path for path in whole}
    numbers = [int(step) for step in steps if step.isdigit()]
    return steps[str(max(numbers))] if numbers else None


def saved(folder: Path) -> str:
    """Say what a stopped run leaves behind."""
    if (folder / "adapter_model.safetensors").exists():
        return f"the adapter is done: python -m wuxia_core.evaluate {folder} measures it"
    checkpoint = newest_checkpoint(folder)
    return f"saved: {checkpoint}" if checkpoint else f"no checkpoint in {folder} yet"


def failure(error: Any, folder: Path) -> int:
    """Say what stopped torchrun and choose the exit status."""
    rank = min(error.failures.values(), key=lambda f: (f.exitcode == BUG, f.exitcode < 0))
    if rank.exitcode > BUG and isinstance(rank.message, dict):
        print(f"error: {rank.message['message'].partition(': ')[2]}", file=sys.stderr)
        return int(rank.exitcode)
    if rank.exitcode < 0:
        print(f"error: {rank.message}, for want of memory? {saved(folder)}", file=sys.stderr)
        return STOPPED if newest_checkpoint(folder) else MachineError.exit_status
    print("error: this is a bug; the traceback of the failed process is above", file=sys.stderr)
    return BUG
