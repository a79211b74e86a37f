"""Start the processes of a run with torchrun, find out how they ended, restart after a crash.

torchrun runs inside the launcher's process, so that it gets the signals that the launcher gets.
"""

import logging
import os
import platform
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

SHUTDOWN_WAIT = 120  # seconds that processes have to save after a signal; with torch 2.11 it is 30
JOIN_WAIT = 120  # seconds that machines wait for each other
CASCADE_TIME = 2  # seconds within which one process's failure may be the cause of another's
# In a checkout the launcher is a script, in an installed package a module.
LAUNCHER = "launch_ddp.py" if (PROJECT / "launch_ddp.py").is_file() else "-m launch_ddp"
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Processes:
    """How many processes train on how many machines, and where the machines meet."""

    local: int  # processes on this machine, and as many on each other one
    machines: int = 1
    rendezvous: str | None = None  # HOST:PORT where the machines meet; None: there is only this one

    def __post_init__(self) -> None:
        """Raise an error, before a run is prepared, if the processes could not start.

        Raises `ConfigError` if `rendezvous` is not HOST:PORT, `MachineError` if its host is not
        known, or if torch cannot use this machine's GPUs.
        """
        best_device()  # raises if GPUs cannot be used
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
        """Give the number of processes on all machines."""
        return self.local * self.machines

    def arguments(self) -> list[str]:
        """Give torchrun's arguments for these processes: all that stand before `-m MODULE`.

        The first are `--nproc-per-node=2`, say, and the signals that torchrun handles.
        """
        signals = ",".join(number.name for number in heeded_signals())
        flags = [f"--nproc-per-node={self.local}", f"--signals-to-handle={signals}"]
        if self.rendezvous is None:  # by 127.0.0.1 the machine need not look its own name up
            return [*flags, "--standalone", "--local-addr=127.0.0.1"]
        nodes = f"--nnodes={self.machines} --rdzv-endpoint={self.rendezvous} --rdzv-backend=c10d"
        return [*flags, *nodes.split(), "--rdzv-id=wuxia", f"--rdzv-conf=join_timeout={JOIN_WAIT}"]


class Failure(WuxiaError):
    """A process of the run failed; `crashed` is true if new processes may succeed.

    `status` is the exit status that the launcher ends with.
    """

    def __init__(self, message: str, status: int, *, crashed: bool) -> None:
        super().__init__(message)
        self.exit_status, self.crashed = status, crashed


def launch(
    folder: Path, processes: Processes, *flags: str, module: str = "wuxia_core.train"
) -> None:
    """Run `python -m MODULE FOLDER FLAGS` in this machine's processes, and wait for their end.

    Environment variables that they need are set, in this process too, unless they are set already.

    Raises `Failure` if a process failed, `Stopped` if a signal came, and `MachineError` if the
    machines do not meet.
    """
    # torchrun reads this on import; its own log records have tracebacks.
    os.environ.setdefault("LOGLEVEL", "CRITICAL")
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import RendezvousError
    from torch.distributed.run import parse_args, run

    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes.local)))
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(SHUTDOWN_WAIT))
    # The first is the older name of the variable. Under WSL2 some drivers refuse such segments.
    if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ and "WSL2" not in platform.release():
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    logging.getLogger("torch.distributed").setLevel(logging.CRITICAL)
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    if processes.rendezvous:
        print(f"waiting at {processes.rendezvous} for {processes.machines} machines, {JOIN_WAIT} s")
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
        print(file=sys.stderr)  # ends the line of the progress bar
        for number, handler in handlers.items():  # torchrun leaves its own, which raise its error
            signal.signal(number, handler)


def supervise(
    folder: Path, processes: Processes, start: Path | None, flags: list[str], restarts: int
) -> None:
    """Train the run in `folder` from the checkpoint `start`, or from step 0 if it is None.

    `flags` are more arguments of `wuxia_core.train`. After a crash new processes go on from the
    newest checkpoint, if there is one: `restarts` times at most, and not twice from the same one.

    Raises `Failure` if a process failed and no restart follows, `Stopped` if a signal came, and
    `MachineError` if the machines do not meet.
    """
    while True:
        try:
            resume = [f"--from={start}"] if start else []
            return launch(folder, processes, *flags, *resume)
        except Failure as failure:
            newest = newest_checkpoint(folder) if failure.crashed and restarts else None
            if newest is None or newest == start:  # none is due, or nothing new is saved
                raise
            logger.warning("%s\nstarting afresh from %s", failure, newest)
        start, restarts = newest, restarts - 1


def read_failure(error: Any) -> Failure:
    """Find in torchrun's `ChildFailedError` the process's failure that is nearest to the cause.

    Only failures within `CASCADE_TIME` of the first one count: torchrun itself kills the processes
    that are left. Of several that are equally near, the first in torchrun's list is taken.
    """
    processes = error.failures.values()
    first = min(process.timestamp for process in processes)  # in seconds
    ranked = [_rank_failure(p) for p in processes if p.timestamp <= first + CASCADE_TIME]
    return min(ranked, key=lambda pair: pair[0])[1]


def _rank_failure(process: Any) -> tuple[int, Failure]:
    """Return a number, which tells how far a process's failure is from the cause, and the failure.

    0: the process gave the reason, with a message; 1: it was killed, or its GPU failed;
    2: it reported that another process was gone; 3: it gave no reason, and so has a bug. New
    processes may succeed (`Failure.crashed`) except after a 0.
    """
    # A dict is what `train.exit_with` recorded: "DeviceLost: a card failed".
    record = process.message if isinstance(process.message, dict) else {"message": ""}
    kind, _, text = record["message"].partition(": ")
    if process.exitcode < 0:  # killed by the signal of that number
        lacks = {-signal.SIGKILL: "memory", -signal.SIGBUS: "/dev/shm (docker: --shm-size=1g)"}
        lack = lacks.get(process.exitcode)
        guess = f", for want of {lack}?" if lack else ""
        return 1, Failure(f"{process.message}{guess}", MachineError.exit_status, crashed=True)
    distances = {DeviceLost.__name__: 1, RankLost.__name__: 2}
    if kind in distances:
        return distances[kind], Failure(text, MachineError.exit_status, crashed=True)
    if process.exitcode > BUG and text:
        return 0, Failure(text, process.exitcode, crashed=False)
    return 3, Failure("this is a bug; the failed process's traceback is above", BUG, crashed=True)


def describe_saved(folder: Path, processes: int) -> str:
    """Say what a stopped run has saved, and with which command it goes on.

    `processes` is the number on this machine, for `--nproc`. If the adapter is written already,
    the command measures it instead.
    """
    if (folder / ADAPTER_WEIGHTS).exists():
        return f"the adapter is done: {how_to_measure(folder)}"
    checkpoint = newest_checkpoint(folder)
    saved = f"{checkpoint} is whole" if checkpoint else "no checkpoint yet"
    config = quote(str(folder / "config.yaml"))
    return f"{saved}; go on: python {LAUNCHER} --config {config} --nproc {processes} --resume"


def with_next_step(failure: Failure, folder: Path, processes: int) -> Failure:
    """Add to the message of a crash, or of a stop, what is saved and how to go on.

    After a crash that was the machine's fault (not a bug) the exit status becomes `STOPPED`, 75, if
    there is a checkpoint. A failure that is neither a crash nor a stop is returned as it is.
    `processes` is the number of processes on this machine.
    """
    if not failure.crashed and failure.exit_status != STOPPED:
        return failure
    resumable = failure.exit_status == MachineError.exit_status and newest_checkpoint(folder)
    status = STOPPED if resumable else failure.exit_status
    message = f"{failure}; {describe_saved(folder, processes)}"
    return Failure(message, status, crashed=failure.crashed)
