"""What a run that stopped leaves behind, and the exit status it ends with."""

from pathlib import Path
from typing import Any

from wuxia_core.errors import BUG, STOPPED, MachineError, RankLost, WuxiaError
from wuxia_core.run.checkpoints import MANIFEST, checkpoints
from wuxia_core.run.folder import ADAPTER

TOGETHER = 2  # seconds within which failures may come of each other


class Ended(WuxiaError):
    """How torchrun ended otherwise than well; `crashed` where a fresh start may help."""

    def __init__(self, message: str, status: int, *, crashed: bool) -> None:
        super().__init__(message)
        self.exit_status, self.crashed = status, crashed


def newest_checkpoint(folder: Path) -> Path | None:
    """Find the newest checkpoint that was written to its end."""
    whole = [path for path in checkpoints(folder) if (path / MANIFEST).exists()]
    return whole[-1] if whole else None


def saved(folder: Path, processes: int) -> str:
    """Say what a stopped run leaves behind, and the command that goes on."""
    if (folder / ADAPTER).exists():
        return f"the adapter is done: python -m wuxia_core.evaluate {folder} measures it"
    checkpoint = newest_checkpoint(folder)
    left = f"{checkpoint} is whole" if checkpoint else "no checkpoint yet"
    return (
        f"{left}; go on: python launch_ddp.py --config {folder / 'config.yaml'} "
        f"--nproc {processes} --resume"
    )


def closing(ended: Ended, folder: Path, processes: int) -> Ended:
    """Add what is left of the run, and that it can go on where it can."""
    if not ended.crashed and ended.exit_status != STOPPED:
        return ended
    resumable = ended.exit_status == MachineError.exit_status and newest_checkpoint(folder)
    status = STOPPED if resumable else ended.exit_status
    return Ended(f"{ended}; {saved(folder, processes)}", status, crashed=ended.crashed)


def outcome(error: Any) -> Ended:
    """Read torchrun's `ChildFailedError`: which process failed first, and of what."""
    first = min(rank.timestamp for rank in error.failures.values())  # s; torchrun kills the rest
    together = [r for r in error.failures.values() if r.timestamp <= first + TOGETHER]
    rank = min(together, key=_weight)
    kind, message = _message(rank)
    if rank.exitcode < 0:
        why = ", for want of memory?" if rank.exitcode == -9 else ""
        return Ended(f"{rank.message}{why}", MachineError.exit_status, crashed=True)
    if kind == RankLost.__name__:
        return Ended(message, MachineError.exit_status, crashed=True)
    if rank.exitcode > BUG and message:
        return Ended(message, rank.exitcode, crashed=False)
    said = "this is a bug; the traceback of the failed process is above"
    return Ended(said, BUG, crashed=True)


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
