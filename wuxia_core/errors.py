"""Failures that a user can mend, each with the exit status that a command ends with.

The message of each error names the failure, the place and the remedy; it is shown without a
traceback. `exit_status` and `run_command` turn a function into a command: its messages have no
characters that act on the terminal, and it goes on after its output is closed.
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

STOPPED, BUG = 75, 1  # exit statuses: of a run that can be resumed (EX_TEMPFAIL), and of a bug
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)  # each asks a run to stop
HUB_TIMEOUT = 6  # seconds that `hub_fault` waits for an answer
# What `presentable` hides: `user:password` before an @, and a token of the Hugging Face hub.
SECRET = re.compile(r"[^/\s:@]+:[^/\s@]+(?=@)|\bhf_\w+")


class WuxiaError(Exception):
    """A failure that is the user's or the machine's to mend, not a bug."""

    exit_status = BUG  # the status for subclasses that set none of their own

    def _render_traceback_(self) -> list[str]:
        """Return a list of one text, which IPython shows in a notebook instead of a traceback."""
        return [f"error: {presentable(str(self))}"]


class ConfigError(WuxiaError):
    """A fault of the command or config: an unknown key, a value out of range, a finished run."""

    exit_status = 2


class DataError(WuxiaError):
    """A fault of the content: the texts, a mixture or a run folder lack what is needed."""

    exit_status = 3


class CorpusError(DataError):
    """A file that cannot be read, or is not text.

    `path` is the file's path. If the file could not be decoded, `offset` is the place of the first
    bad character, in bytes and about right, and `tried` names the encodings, the likeliest first.
    If the file is of another format, such as PDF, `offset` is 0. Else `offset` is None.
    """

    def __init__(
        self, message: str, path: str, offset: int | None = None, tried: tuple[str, ...] = ()
    ) -> None:
        super().__init__(message)
        self.path, self.offset, self.tried = path, offset, tried


class NonFiniteError(WuxiaError):
    """The loss or a gradient is not a finite number."""

    exit_status = 4


class Stopped(WuxiaError):
    """A signal asked the run to stop; `--resume` goes on from the run's newest checkpoint."""

    exit_status = STOPPED


class RankLost(WuxiaError):
    """Another process of the run has ended, or does not answer."""

    exit_status = STOPPED


class MachineError(WuxiaError):
    """A fault of the machine or the network: the hub, memory, the disk, a port."""

    exit_status = 5


class DeviceLost(MachineError):
    """A GPU, or the link between GPUs, failed; new processes may succeed."""


def command_parser(module: str, description: str | None) -> argparse.ArgumentParser:
    """Make a parser, without options yet, for the command `python -m MODULE`.

    The help shows `description`, unless it is None, with its line breaks.
    """
    formatter = argparse.RawDescriptionHelpFormatter
    program = f"python -m {module}"
    return argparse.ArgumentParser(program, description=description, formatter_class=formatter)


def exit_status(work: Callable[[], object]) -> int:
    """Call `work`, and return the exit status of its command: 0 if it raised nothing.

    For a failure that the user can mend a message is printed to stderr, without a traceback. The
    status is the error's `exit_status`; `STOPPED` for Ctrl-C; that of `MachineError` for a lack of
    memory or an `OSError`; but that of `ConfigError` for an `OSError` of a path that is taken, is
    too long, or leads through a file. Any other error is raised.
    """
    try:
        work()
    except WuxiaError as error:
        kind = "stopped" if error.exit_status == STOPPED else "error"
        print(f"{kind}: {presentable(str(error))}", file=sys.stderr)
        return error.exit_status
    except OSError as error:
        print(f"error: {presentable(str(error))}", file=sys.stderr)
        file_in_the_way = isinstance(error, (FileExistsError, NotADirectoryError))
        mistyped_path = file_in_the_way or error.errno == errno.ENAMETOOLONG
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
    """Whether `error` means that the machine or a GPU ran out of memory."""
    # the words of CUDA, of cuBLAS, and of torch on a CPU
    phrases = ("out of memory", "ALLOC_FAILED", "can't allocate memory")
    return isinstance(error, MemoryError) or any(phrase in str(error) for phrase in phrases)


@functools.cache
def hub_fault() -> str:
    """Return why the Hugging Face hub does not answer; "" if it answers, or in offline mode.

    If the hub does not answer, huggingface_hub is put into offline mode, here and in the processes
    that this one starts. It then looks only into its cache; otherwise it would retry for a minute
    for each file. `model.fetch` calls this function before it looks a name up on the hub. The
    result is cached: a process asks the hub only once.
    """
    from huggingface_hub import constants, get_session
    from huggingface_hub.errors import HTTPError

    if constants.is_offline_mode():
        return ""
    faults = [f"no answer within {HUB_TIMEOUT} s"]  # one fault, which `request` replaces

    def request() -> None:
        try:
            get_session().head(constants.ENDPOINT)
            faults[0] = ""
        except HTTPError as error:
            faults[0] = str(error)

    thread = Thread(target=request, daemon=True)  # no time-out of httpx ends a slow name look-up
    thread.start()
    thread.join(HUB_TIMEOUT)
    if faults[0]:
        constants.HF_HUB_OFFLINE, os.environ["HF_HUB_OFFLINE"] = True, "1"
    return faults[0]


def run_command(main: Callable[[], int]) -> None:
    """Run `main` as a command, and exit with the status that it returns.

    Sets the process up first: log records are plain lines on stderr, output to a closed terminal is
    dropped, and each of `heeded_signals` raises `KeyboardInterrupt`.
    """
    make_output_expendable()
    handler = logging.StreamHandler()
    handler.setFormatter(_PresentableFormatter())
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    for client in ("httpx", "httpx2"):  # clients of huggingface_hub, which log each request
        logging.getLogger(client).setLevel(logging.WARNING)
    for number in heeded_signals():
        signal.signal(number, signal.default_int_handler)
    sys.exit(main())


def make_output_expendable() -> None:
    """Replace stdout and stderr by streams that raise no error.

    Output to a closed terminal, a broken pipe or a full disk is dropped, and a character that the
    encoding lacks becomes `?`.
    """
    sys.stdout = _ExpendableFile.wrap(sys.stdout, 1)  # 1 and 2 are their file descriptors
    sys.stderr = _ExpendableFile.wrap(sys.stderr, 2)


def heeded_signals() -> list[signal.Signals]:
    """List the signals that stop a run: all `SIGNALS`, but SIGHUP only if it is not ignored.

    `nohup` makes a process ignore SIGHUP. SIGINT and SIGQUIT are listed even if they are ignored,
    as they are in a process that a shell started in the background.
    """
    nohup = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    return [number for number in SIGNALS if not (nohup and number == signal.SIGHUP)]


def presentable(text: str) -> str:
    """Make a message safe to show: what `SECRET` matches becomes `***`, the rest is `visible`."""
    return visible(SECRET.sub("***", text))


class _PresentableFormatter(logging.Formatter):
    """Formats log records as `presentable` text, tracebacks too."""

    def format(self, record: logging.LogRecord) -> str:
        return presentable(super().format(record))


class _ExpendableFile(io.FileIO):
    """A terminal, pipe or file; once a write fails, all output is dropped without an error."""

    @classmethod
    def wrap(cls, stream: TextIO | None, descriptor: int) -> TextIO:
        """Make a text stream that replaces `stream`, on the same file `descriptor` and encoding.

        A character that the encoding lacks becomes `?`. Each line is flushed, so that stdout and
        stderr are in order if both go to the same place. `stream` is None if the descriptor was
        closed when the process started: output is then dropped, and the encoding is UTF-8.
        """
        if stream is None:  # child processes need an open descriptor
            _discard_output(descriptor)
        else:
            stream.flush()
        buffer = io.BufferedWriter(cls(descriptor, "w", closefd=False))
        encoding = stream.encoding if stream else "utf-8"
        return io.TextIOWrapper(buffer, encoding, "replace", line_buffering=True)

    def write(self, data: Any) -> int:
        """Write `data`; if that fails, drop it and all later output. Return the bytes' number."""
        try:
            return super().write(data)
        except OSError:
            _discard_output(self.fileno())
            return len(data)


def _discard_output(descriptor: int) -> None:
    """Make a file descriptor lead to the null device, in child processes too."""
    null = os.open(os.devnull, os.O_WRONLY)
    if null != descriptor:  # `open` takes the lowest free one, maybe `descriptor` itself
        os.dup2(null, descriptor)
        os.close(null)
    os.set_inheritable(descriptor, True)


@contextmanager
def raise_machine_error(place: str) -> Iterator[None]:
    """Turn `OSError` and `SafetensorError` inside the `with` block into `MachineError`.

    The message says that `place` cannot be written. `place` is what the user calls the folder or
    file, such as `training.output_dir output/sample`.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        # No right to write, a file where the folder should be, a read-only disk: more space would
        # not help.
        refused = getattr(error, "errno", None) in (errno.EACCES, errno.EEXIST, errno.EROFS)
        remedy = "name another folder" if refused else "free some space or name another folder"
        raise MachineError(f"{place}: cannot be written ({reason}); {remedy}") from None
