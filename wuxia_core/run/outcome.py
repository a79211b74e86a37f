"""What a run that stopped leaves behind, and the exit status it ends with."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wuxia_core.errors import BUG, STOPPED, MachineError, RankLost
from wuxia_core.run.checkpoints import MANIFEST, checkpoints
from wuxia_core.run.folder import ADAPTER

TOGETHER = 2  # seconds within which failures may come of each other


@dataclass(frozen=True)
class Outcome:
    """How torchrun ended: the status to exit with, what to say, whether a restart may help."""

    status: int
    message: str
    crashed: bool


def newest_checkpoint(folder: Path) -> Path | None:
    """Find the newest checkpoint that was written to its end."""
    whole = [path for path in checkpoints(folder) if (path / MANIFEST).exists()]
    return whole[-1] if whole else None


def saved(folder: Path, processes: int) -> str:
    """Say what a stopped run leaves behind, and the command that goes on."""
    if (folder / ADAPTER).exists():
        return f"the adapter is done: python -m wuxia_core.evaluate {folder} measures it"
    checkpoint = newest_checkpoint(folder)
    if checkpoint is None:
        return f"no checkpoint in {folder} yet, so start again in another training.output_dir"
    return (
        f"{checkpoint} is whole; go on: python launch_ddp.py --config {folder / 'config.yaml'} "
        f"--nproc {processes} --resume"
    )


def outcome(error: Any, folder: Path, processes: int) -> Outcome:
    """Read torchrun's `ChildFailedError`: which process failed first, and of what."""
    first = min(rank.timestamp for rank in error.failures.values())  # s; torchrun kills the rest
    together = [r for r in error.failures.values() if r.timestamp <= first + TOGETHER]
    rank = min(together, key=_weight)
    kind, message = _message(rank)
    left = saved(folder, processes)
    resumable = STOPPED if newest_checkpoint(folder) else MachineError.exit_status
    if rank.exitcode < 0:
        why = ", for want of memory?" if rank.exitcode == -9 else ""
        return Outcome(resumable, f"error: {rank.message}{why}; {left}", crashed=True)
    if kind == RankLost.__name__:
        return Outcome(resumable, f"error: {message}; {left}", crashed=True)
    if rank.exitcode == STOPPED:
        return Outcome(STOPPED, f"stopped: {message}; {left}", crashed=False)
    if rank.exitcode > BUG and message:
        return Outcome(rank.exitcode, f"error: {message}", crashed=False)
    said = f"error: this is a bug; the traceback of the failed process is above; {left}"
    return Outcome(BUG, said, crashed=True)


def _weight(rank: Any) -> int:
    """Order failures: what a process says of itself, one that was killed, those who missed it."""
    kind, message = _message(rank)
    if rank.exitcode < 0:
        return 1
    return 3 if not message or rank.exitcode == BUG else 2 if kind == RankLost.__name__ else 0


def _message(rank: Any) -> tuple[str, str]:
    """Split what a process left into the error's name and its words."""
    if not isinstance(rank.message, dict):
        return "", ""
    name, _, words = rank.message["message"].partition(": ")
    return name, words
