"""The processes of a run: torchrun, in here, so that signals reach it; and again after a crash."""

import contextlib
import logging
import os
import signal
import socket
import sys
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wuxia_core.errors import BUG, STOPPED, ConfigError, MachineError, RankLost, Stopped, WuxiaError
from wuxia_core.run import ADAPTER, MANIFEST, checkpoints, newest_whole

SHUTDOWN = 120  # seconds that processes have to save when a signal has come
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)  # that torchrun takes
JOIN = 600  # seconds that machines wait for each other
ANSWER = 20  # seconds in which a rendezvous answers

logger = logging.getLogger(__name__)
TOGETHER = 2  # seconds within which failures may come of each other


@dataclass(frozen=True)
class Processes:
    """How many, and where the machines meet."""

    here: int  # on this machine
    machines: int = 1
    rendezvous: str | None = None  # HOST:PORT

    def __post_init__(self) -> None:
        if self.rendezvous is not None:
            check_endpoint(self.rendezvous)

    @property
    def total(self) -> int:
        """On all machines."""
        return self.here * self.machines

    def arguments(self) -> list[str]:
        """Say so to torchrun."""
        here = f"--nproc-per-node={self.here}"
        if self.rendezvous is None:
            return ["--standalone", here]
        return [
            here, f"--nnodes={self.machines}", "--rdzv-backend=c10d", "--rdzv-id=wuxia",
            f"--rdzv-endpoint={self.rendezvous}", f"--rdzv-conf=join_timeout={JOIN}",
        ]  # fmt: skip


def check_endpoint(endpoint: str) -> None:
    """Refuse an address that is none, before anything is prepared.

    Raises `ConfigError` where it is not HOST:PORT, `MachineError` where no such host is known.
    """
    host, _, port = endpoint.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise ConfigError(f"--rdzv-endpoint {endpoint}: must be HOST:PORT, such as 10.0.0.1:29400")
    try:
        socket.getaddrinfo(host, int(port))
    except OSError as error:
        raise MachineError(f"--rdzv-endpoint {endpoint}: no such host ({error.strerror})") from None


def check_free(endpoint: str) -> None:
    """Refuse a port where something other than a rendezvous answers: torchrun would wait for ever.

    Raises `MachineError`.
    """
    from torch.distributed import TCPStore

    host, _, port = endpoint.rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=ANSWER).close()
    except OSError:
        return  # nobody is there yet
    met = threading.Event()

    def ask() -> None:
        with contextlib.suppress(Exception):
            TCPStore(host, int(port))
            met.set()

    threading.Thread(target=ask, daemon=True).start()
    if not met.wait(ANSWER):
        raise MachineError(
            f"--rdzv-endpoint {endpoint}: something else answers there; choose another port"
        )


def launch(
    folder: Path, processes: Processes, *flags: str, module: str = "wuxia_core.train"
) -> None:
    """Start a module in these processes and wait for them.

    Raises `Ended` where a process failed, `Stopped` where a signal came, and `MachineError` where
    the machines do not meet.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import RendezvousError
    from torch.distributed.run import parse_args, run

    if processes.rendezvous:
        check_free(processes.rendezvous)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes.here)))
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(SHUTDOWN))
    logging.getLogger("torch.distributed").setLevel(logging.CRITICAL)
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    try:
        run(parse_args([*processes.arguments(), "-m", module, str(folder), *flags]))
    except ChildFailedError as error:
        raise outcome(error) from None
    except SignalException as error:
        raise Stopped(f"by {error.sigval.name}") from None
    except RendezvousError as error:
        raise MachineError(
            f"--rdzv-endpoint {processes.rendezvous}: the machines did not meet there ({error}); "
            "is the port free on that machine and open to the others, and do all of them run?"
        ) from None
    finally:
        print(file=sys.stderr)  # behind the progress bar
        for number, handler in handlers.items():  # torchrun's would go on raising its own error
            signal.signal(number, handler)


def supervise(
    folder: Path, processes: Processes, start: Path | None, flags: list[str], restarts: int
) -> None:
    """Train; after a crash start afresh from the newest checkpoint, while there is a newer one.

    Raises as `launch`.
    """
    while True:
        try:
            launch(folder, processes, *flags, *([f"--from={start}"] if start else []))
            return
        except Ended as ended:
            message = str(ended)
            newest = newest_whole(folder) if ended.crashed and restarts else None
            if newest is None or newest == start:
                raise
        start, restarts = newest, restarts - 1
        logger.warning("%s\nstarting afresh from %s", message, newest)


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
