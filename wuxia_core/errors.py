"""Failures that a user can mend, each with the exit status that a command ends with.

The message of each names the failure, the place and the remedy, and is shown without a traceback.
`exit_status` and `run_command` make a function a command; its output harms neither the terminal nor
the work.
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

STOPPED, BUG = 75, 1  # exit statuses: stopped, and to be resumed (EX_TEMPFAIL); a bug
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)  # each asks a run to stop
HUB_TIMEOUT = 6  # seconds
# `user:password` before an @, and a token of the Hugging Face hub
SECRET = re.compile(r"[^/\s:@]+:[^/\s@]+(?=@)|\bhf_\w+")


class WuxiaError(Exception):
    """A failure that is the user's or the machine's to mend, not a bug."""

    exit_status = BUG

    def _render_traceback_(self) -> list[str]:
        """Give the line that IPython shows in a notebook in place of a traceback."""
        return [f"error: {presentable(str(self))}"]


class ConfigError(WuxiaError):
    """Usage or configuration: an unknown key, a value out of range, a finished output_dir."""

    exit_status = 2


class DataError(WuxiaError):
    """The texts, or a run folder, do not hold what is needed."""

    exit_status = 3


class CorpusError(DataError):
    """A file that is not text from byte `offset` on, in any of the `tried` encodings."""

    def __init__(
        self, message: str, path: str, offset: int | None = None, tried: tuple[str, ...] = ()
    ) -> None:
        super().__init__(message)
        self.path, self.offset, self.tried = path, offset, tried


class NonFiniteError(WuxiaError):
    """The loss or a gradient is not a finite number."""

    exit_status = 4


class Stopped(WuxiaError):
    """A signal asked the run to stop; `--resume` goes on from its newest checkpoint."""

    exit_status = STOPPED


class RankLost(WuxiaError):
    """Another process of the run is gone, or does not answer."""

    exit_status = STOPPED


class MachineError(WuxiaError):
    """The machine or the network: hub, memory, disk, port."""

    exit_status = 5


class DeviceLost(MachineError):
    """A GPU, or the link between GPUs, failed; new processes may succeed."""


def command_line(module: str, description: str | None) -> argparse.ArgumentParser:
    """Make the parser of `python -m MODULE`; its help keeps the line breaks of `description`."""
    formatter = argparse.RawDescriptionHelpFormatter
    program = f"python -m {module}"
    return argparse.ArgumentParser(program, description=description, formatter_class=formatter)


def exit_status(work: Callable[[], object]) -> int:
    """Run the work of a command, and return the exit status.

    A failure that the user can mend, or Ctrl-C, is printed to stderr in a line; a bug is raised.
    """
    try:
        work()
    except WuxiaError as error:
        kind = "stopped" if error.exit_status == STOPPED else "error"
        print(f"{kind}: {presentable(str(error))}", file=sys.stderr)
        return error.exit_status
    except OSError as error:
        print(f"error: {presentable(str(error))}", file=sys.stderr)
        in_the_way = isinstance(error, (FileExistsError, NotADirectoryError))
        mistyped_path = in_the_way or error.errno == errno.ENAMETOOLONG
        return ConfigError.exit_status if mistyped_path else MachineError.exit_status
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
    """Tell whether an error is that of Python, torch, CUDA or cuBLAS at the end of the memory."""
    phrases = ("out of memory", "ALLOC_FAILED", "can't allocate memory")
    return isinstance(error, MemoryError) or any(phrase in str(error) for phrase in phrases)


@functools.cache
def hub_fault() -> str:
    """Say why the Hugging Face hub does not answer, or give "" where it does.

    Where it does not, huggingface_hub is set to look only into its cache: it would otherwise try
    again for a minute, for each file and in each process. `model.fetch` calls this first.
    """
    from huggingface_hub import constants, get_session
    from huggingface_hub.errors import HTTPError

    if constants.is_offline_mode():
        return ""
    faults = [f"no answer within {HUB_TIMEOUT} s"]

    def request() -> None:
        try:
            get_session().head(constants.ENDPOINT)
            faults[0] = ""
        except HTTPError as error:
            faults[0] = str(error)

    thread = Thread(target=request, daemon=True)  # a name server may take longer than any time-out
    thread.start()
    thread.join(HUB_TIMEOUT)
    if faults[0]:
        constants.HF_HUB_OFFLINE, os.environ["HF_HUB_OFFLINE"] = True, "1"
    return faults[0]


def run_command(main: Callable[[], int]) -> None:
    """Run `main` as a command, and exit with the status that it returns.

    Log records are plain lines on stderr, output to a closed terminal is dropped, and a signal that
    asks for a stop raises `KeyboardInterrupt`.
    """
    make_output_expendable()
    handler = logging.StreamHandler()
    handler.setFormatter(_PresentableFormatter())
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    for client in ("httpx", "httpx2"):  # of huggingface_hub; they log each request
        logging.getLogger(client).setLevel(logging.WARNING)
    for number in heeded_signals():
        signal.signal(number, signal.default_int_handler)
    sys.exit(main())


def make_output_expendable() -> None:
    """Let the process go on where stdout or stderr is closed, full, or lacks a character."""
    sys.stdout = _ExpendableFile.wrap(sys.stdout, 1)  # 1 and 2 are their file descriptors
    sys.stderr = _ExpendableFile.wrap(sys.stderr, 2)


def heeded_signals() -> list[signal.Signals]:
    """List the signals that stop a run: all `SIGNALS`, without SIGHUP where `nohup` ignores it.

    SIGINT and SIGQUIT count even where the shell that started the process in the background made it
    ignore them.
    """
    nohup = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    return [number for number in SIGNALS if not (nohup and number == signal.SIGHUP)]


def presentable(text: str) -> str:
    """Make a message safe to show: control characters become `⟨U+001B⟩`, secrets `***`."""
    return visible(SECRET.sub("***", text))


class _PresentableFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return presentable(super().format(record))


class _ExpendableFile(io.FileIO):
    """A terminal, pipe or file whose output is dropped, without an error, once it fails."""

    @classmethod
    def wrap(cls, stream: TextIO | None, descriptor: int) -> TextIO:
        """Make a text stream in place of `stream`; `?` stands for what its encoding lacks.

        Each line is flushed, so that stdout and stderr are in order where both go to one place.
        """
        if stream is None:  # the shell closed it, but child processes need the descriptor too
            _discard_output(descriptor)
        else:
            stream.flush()
        buffer = io.BufferedWriter(cls(descriptor, "w", closefd=False))
        encoding = stream.encoding if stream else "utf-8"
        return io.TextIOWrapper(buffer, encoding, "replace", line_buffering=True)

    def write(self, data: Any) -> int:
        """Write `data`; where that fails, drop it and all later output."""
        try:
            return super().write(data)
        except OSError:
            _discard_output(self.fileno())
            return len(data)


def _discard_output(descriptor: int) -> None:
    """Point a file descriptor at the null device, for child processes too."""
    null = os.open(os.devnull, os.O_WRONLY)
    if null != descriptor:  # `open` takes the lowest free descriptor, which may be this closed one
        os.dup2(null, descriptor)
        os.close(null)
    os.set_inheritable(descriptor, True)


@contextmanager
def raise_machine_error(place: str) -> Iterator[None]:
    """Make a failure to write inside the `with` block a `MachineError` that names `place`."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        refused = getattr(error, "errno", None) in (errno.EACCES, errno.EEXIST, errno.EROFS)
        remedy = "name another folder" if refused else "free some space or name another folder"
        raise MachineError(f"{place}: cannot be written ({reason}); {remedy}") from None
