"""Start the processes of a run with torchrun, read how they ended, restart after a crash.

torchrun runs inside the launcher, so that it gets the signals that the launcher gets.
"""

import logging
import os
import signal
import socket
import sys
from dataclasses import dataclass
from pathlib import Path
from shlex import quote
from typing import Any

from wuxia_core.config import PROJECT
from wuxia_core.errors import (
    BUG,
    SIGNALS,
    STOPPED,
    ConfigError,
    DeviceLost,
    MachineError,
    RankLost,
    Stopped,
    WuxiaError,
    heeded_signals,
)
from wuxia_core.model import ADAPTER_WEIGHTS, best_device
from wuxia_core.run import how_to_measure, newest_checkpoint

SHUTDOWN = 120  # seconds that processes have to save when a signal has come
JOIN = 120  # seconds that machines wait for each other
TOGETHER = 2  # seconds within which failures may come of each other
# A wheel has no script, but a module.
LAUNCHER = "launch_ddp.py" if (PROJECT / "launch_ddp.py").is_file() else "-m launch_ddp"
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Processes:
    """How many, and where the machines meet."""

    here: int  # on this machine
    machines: int = 1
    rendezvous: str | None = None  # HOST:PORT

    def __post_init__(self) -> None:
        """Refuse what cannot be started, before anything is prepared.

        Raises `ConfigError` where the address is not HOST:PORT, `MachineError` where no such host
        is known, or the machine's cards cannot be used.
        """
        best_device()
        if self.rendezvous is None:
            return
        flag = f"--rdzv-endpoint {self.rendezvous}"
        host, _, port = self.rendezvous.rpartition(":")
        if not host or not port.isdigit() or not 0 < int(port) < 65536:
            raise ConfigError(f"{flag}: must be HOST:PORT, such as 10.0.0.1:29400")
        try:
            socket.getaddrinfo(host, int(port))
        except OSError as error:
            raise MachineError(f"{flag}: no such host ({error.strerror})") from None

    @property
    def total(self) -> int:
        """On all machines."""
        return self.here * self.machines

    def arguments(self) -> list[str]:
        """Give the command line that asks torchrun for these processes."""
        heard = ",".join(number.name for number in heeded_signals())
        here = [f"--nproc-per-node={self.here}", f"--signals-to-handle={heard}"]
        if self.rendezvous is None:  # the machine need not know its own name
            return [*here, "--standalone", "--local-addr=127.0.0.1"]
        meet = f"--nnodes={self.machines} --rdzv-endpoint={self.rendezvous} --rdzv-backend=c10d"
        return [*here, *meet.split(), "--rdzv-id=wuxia", f"--rdzv-conf=join_timeout={JOIN}"]


class Ended(WuxiaError):
    """How torchrun ended otherwise than well; `crashed` where a fresh start may help."""

    def __init__(self, message: str, status: int, *, crashed: bool) -> None:
        super().__init__(message)
        self.exit_status, self.crashed = status, crashed


def launch(
    folder: Path, processes: Processes, *flags: str, module: str = "wuxia_core.train"
) -> None:
    """Start a module in these processes and wait for them.

    Raises `Ended` where a process failed, `Stopped` where a signal came, and `MachineError` where
    the machines do not meet.
    """
    os.environ.setdefault("LOGLEVEL", "CRITICAL")  # torchrun's own, with tracebacks; read on import
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import RendezvousError
    from torch.distributed.run import parse_args, run

    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes.here)))
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(SHUTDOWN))
    if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:  # its older name
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    logging.getLogger("torch.distributed").setLevel(logging.CRITICAL)
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    if processes.rendezvous:
        print(f"waiting at {processes.rendezvous} for {processes.machines} machines, {JOIN} s")
    try:
        run(parse_args([*processes.arguments(), "-m", module, str(folder), *flags]))
    except ChildFailedError as error:
        raise read_failure(error) from None
    except SignalException as error:
        raise Stopped(f"by {error.sigval.name}") from None
    except RendezvousError as error:
        where = f"--rdzv-endpoint {processes.rendezvous}"
        raise MachineError(f"{where}: the machines did not meet there ({error})") from None
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
            newest = newest_checkpoint(folder) if ended.crashed and restarts else None
            if newest is None or newest == start:
                raise
            logger.warning("%s\nstarting afresh from %s", ended, newest)
        start, restarts = newest, restarts - 1


def read_failure(error: Any) -> Ended:
    """Read torchrun's `ChildFailedError`: which process failed first, and of what."""
    failures = error.failures.values()
    first = min(process.timestamp for process in failures)  # s; torchrun kills the others
    together = [_explain(p) for p in failures if p.timestamp <= first + TOGETHER]
    return min(together, key=lambda explained: explained[0])[1]


def _explain(process: Any) -> tuple[int, Ended]:
    """Say how a process ended; the lower the number before it, the nearer that is to the cause.

    0: it said why; 1: it was killed, or its card failed; 2: it missed another process; 3: a bug.
    """
    told = process.message if isinstance(process.message, dict) else {"message": ""}
    kind, _, words = told["message"].partition(": ")
    if process.exitcode < 0:
        wants = {-signal.SIGKILL: "memory", -signal.SIGBUS: "/dev/shm (docker: --shm-size=1g)"}
        why = f", for want of {what}?" if (what := wants.get(process.exitcode)) else ""
        return 1, Ended(f"{process.message}{why}", MachineError.exit_status, crashed=True)
    if kind in (marks := {DeviceLost.__name__: 1, RankLost.__name__: 2}):
        return marks[kind], Ended(words, MachineError.exit_status, crashed=True)
    if process.exitcode > BUG and words:
        return 0, Ended(words, process.exitcode, crashed=False)
    return 3, Ended("this is a bug; the failed process's traceback is above", BUG, crashed=True)


def describe_saved(folder: Path, processes: int) -> str:
    """Say what a stopped run leaves behind, and the command that goes on."""
    if (folder / ADAPTER_WEIGHTS).exists():
        return f"the adapter is done: {how_to_measure(folder)}"
    checkpoint = newest_checkpoint(folder)
    left = f"{checkpoint} is whole" if checkpoint else "no checkpoint yet"
    config = quote(str(folder / "config.yaml"))
    return f"{left}; go on: python {LAUNCHER} --config {config} --nproc {processes} --resume"


def with_next_step(ended: Ended, folder: Path, processes: int) -> Ended:
    """Add what is left of the run, and that it can go on where it can."""
    if not ended.crashed and ended.exit_status != STOPPED:
        return ended
    resumable = ended.exit_status == MachineError.exit_status and newest_checkpoint(folder)
    status = STOPPED if resumable else ended.exit_status
    return Ended(f"{ended}; {describe_saved(folder, processes)}", status, crashed=ended.crashed)
