"""What can go wrong for a user, each with the exit status that `launch_ddp.py` ends with.

The message of every one of these says what, where and what to do; no traceback is shown for them.
"""

import argparse
import errno
import functools
import io
import logging
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Thread
from typing import Any, TextIO

from safetensors import SafetensorError

from wuxia_core.text import visible

STOPPED, BUG = 75, 1  # exit statuses: stopped but resumable; none of the user's making
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)  # each asks a run to stop
HUB_SECONDS = 6  # that the hub may take to answer
SECRET = re.compile(r"[^/\s:@]+:[^/\s@]+(?=@)|\bhf_\w+")


class WuxiaError(Exception):
    """A failure that is the user's or the machine's to mend, not a bug."""

    exit_status = BUG

    def _render_traceback_(self) -> list[str]:
        """Be one message in a notebook too: IPython shows this in place of a traceback."""
        return [f"error: {presentable(str(self))}"]


class ConfigError(WuxiaError):
    """Usage or configuration: an unknown key, a value out of range, a finished output_dir."""

    exit_status = 2


class DataError(WuxiaError):
    """The texts, or a run folder, do not hold what is needed."""

    exit_status = 3


class CorpusError(DataError):
    """A file that is not text: `path`, `offset` (byte) and `tried` (encodings) tell of it."""

    def __init__(
        self, message: str, path: str, offset: int | None = None, tried: tuple[str, ...] = ()
    ) -> None:
        super().__init__(message)
        self.path, self.offset, self.tried = path, offset, tried


class NonFiniteError(WuxiaError):
    """The loss or a gradient is not a finite number."""

    exit_status = 4


class Stopped(WuxiaError):
    """A signal asked the run to stop; its newest checkpoint is where it goes on."""

    exit_status = STOPPED


class RankLost(WuxiaError):
    """Another process of the run is gone, or does not answer."""

    exit_status = STOPPED


class MachineError(WuxiaError):
    """The machine or the network: hub, memory, disk, port."""

    exit_status = 5


class DeviceLost(MachineError):
    """A card, or the link between cards, failed; a fresh start may help."""


def command_line(module: str, description: str | None) -> argparse.ArgumentParser:
    """Make the parser of `python -m MODULE`, which shows its docstring as it is written."""
    as_written = argparse.RawDescriptionHelpFormatter
    name = f"python -m {module}"
    return argparse.ArgumentParser(name, description=description, formatter_class=as_written)


def exit_status(work: Callable[[], object]) -> int:
    """Do what a command asks for and return its status; errors and Ctrl-C are said in a line."""
    try:
        work()
    except WuxiaError as error:
        kind = "stopped" if error.exit_status == STOPPED else "error"
        print(f"{kind}: {presentable(str(error))}", file=sys.stderr)
        return error.exit_status
    except OSError as error:
        print(f"error: {presentable(str(error))}", file=sys.stderr)
        usual = isinstance(error, (FileExistsError, NotADirectoryError))
        mistyped = usual or error.errno == errno.ENAMETOOLONG
        return ConfigError.exit_status if mistyped else MachineError.exit_status
    except (MemoryError, RuntimeError) as error:
        if not lacks_memory(error):
            raise
        print("error: out of memory; close other programs, or use a smaller model", file=sys.stderr)
        return MachineError.exit_status
    except KeyboardInterrupt:
        print("stopped; what was finished is kept", file=sys.stderr)
        return STOPPED
    return 0


def lacks_memory(error: BaseException) -> bool:
    """Whether Python, the allocator, CUDA or cuBLAS says that there is no more memory."""
    said = ("out of memory", "ALLOC_FAILED", "can't allocate memory")
    return isinstance(error, MemoryError) or any(words in str(error) for words in said)


@functools.cache
def hub_fault() -> str:
    """Say why the hub does not answer, if so; from then on only its cache is looked at.

    Its own library would try again for a minute, at each file and in each process.
    """
    from huggingface_hub import constants, get_session
    from huggingface_hub.errors import HTTPError

    if constants.is_offline_mode():
        return ""
    faults = [f"no answer within {HUB_SECONDS} s"]

    def ask() -> None:
        try:
            get_session().head(constants.ENDPOINT)
            faults[0] = ""
        except HTTPError as error:
            faults[0] = str(error)

    asking = Thread(target=ask, daemon=True)  # a name server may take longer than any time-out
    asking.start()
    asking.join(HUB_SECONDS)
    if faults[0]:
        constants.HF_HUB_OFFLINE, os.environ["HF_HUB_OFFLINE"] = True, "1"
    return faults[0]


def run_command(main: Callable[[], int]) -> None:
    """Be a command: log in plain lines, survive without a terminal, end with a status.

    A signal that asks for a stop raises `KeyboardInterrupt`.
    """
    make_output_expendable()
    handler = logging.StreamHandler()
    handler.setFormatter(_Presentable())
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    for client in ("httpx", "httpx2"):  # the hub's, older and newer
        logging.getLogger(client).setLevel(logging.WARNING)
    for number in heeded_signals():
        signal.signal(number, signal.default_int_handler)
    sys.exit(main())


def make_output_expendable() -> None:
    """Let this process go on where its terminal or pipe is gone, full, or has not a character."""
    sys.stdout = _Expendable.over(sys.stdout, 1)
    sys.stderr = _Expendable.over(sys.stderr, 2)


def heeded_signals() -> list[signal.Signals]:
    """List the signals that stop a run; under `nohup` SIGHUP is ignored and stays so.

    Others are heeded also where a shell that started us in the background ignores them.
    """
    ignored = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    return [number for number in SIGNALS if not (ignored and number == signal.SIGHUP)]


def presentable(text: str) -> str:
    """Make a message fit to be shown: nothing in it acts on the terminal, nothing is secret."""
    return visible(SECRET.sub("***", text))


class _Presentable(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return presentable(super().format(record))


class _Expendable(io.FileIO):
    """A terminal, pipe or file that may go or be full: then output is dropped, and no work lost."""

    @classmethod
    def over(cls, stream: TextIO | None, number: int) -> TextIO:
        """Take the place of a stream; what its encoding has not is replaced.

        By line, so that messages and errors that go to one place are in order there.
        """
        if stream is None:  # closed by the shell; what is started from here needs one too
            _to_nowhere(number)
        else:
            stream.flush()
        buffer = io.BufferedWriter(cls(number, "w", closefd=False))
        encoding = stream.encoding if stream else "utf-8"
        return io.TextIOWrapper(buffer, encoding, "replace", line_buffering=True)

    def write(self, data: Any) -> int:
        """Write, or from now on to nowhere."""
        try:
            return super().write(data)
        except OSError:
            _to_nowhere(self.fileno())
            return len(data)


def _to_nowhere(number: int) -> None:
    """Point a file descriptor at the null device, for what is started from here too."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    if nowhere != number:  # a closed one is the first that is free
        os.dup2(nowhere, number)
        os.close(nowhere)
    os.set_inheritable(number, True)


@contextmanager
def raise_machine_error(what: str) -> Iterator[None]:
    """Raise `MachineError` where something cannot be written in here."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        why = getattr(error, "strerror", None) or error
        no_space = getattr(error, "errno", None) not in (errno.EACCES, errno.EEXIST, errno.EROFS)
        remedy = "free some space or name another folder" if no_space else "name another folder"
        raise MachineError(f"{what}: cannot be written ({why}); {remedy}") from None
