"""Failures that a user can mend, each with the exit status that a command ends with.

The message of each names the failure, the place and the remedy, and is shown without a traceback.
`exit_status` and `run_command` make a function a command: no message makes the terminal act, and a
command goes on when nobody can read its output any more.
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

STOPPED, BUG = 75, 1  # exit statuses: of a run that can be resumed (EX_TEMPFAIL), of a bug
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)  # each asks a run to stop
HUB_TIMEOUT = 6  # seconds that `hub_fault` waits for an answer
# What `presentable` hides: `user:password` before an @, and a token of the Hugging Face hub.
SECRET = re.compile(r"[^/\s:@]+:[^/\s@]+(?=@)|\bhf_\w+")


class WuxiaError(Exception):
    """A failure that is the user's or the machine's to mend, not a bug."""

    exit_status = BUG  # of a kind of failure that sets none of its own

    def _render_traceback_(self) -> list[str]:
        """Give what IPython shows in a notebook in place of a traceback: a list of one text."""
        return [f"error: {presentable(str(self))}"]


class ConfigError(WuxiaError):
    """A fault of the command or config: an unknown key, a value out of range, a finished run."""

    exit_status = 2


class DataError(WuxiaError):
    """The texts, or a run folder, do not hold what is needed."""

    exit_status = 3


class CorpusError(DataError):
    """A file that cannot be read, or is not text.

    `path` is the file. If it was decoded in vain, `offset` is the first bad character's, in bytes
    and about right, and `tried` names the encodings; of another format `offset` is 0.
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
    """A signal asked the run to stop; `--resume` goes on from its newest checkpoint."""

    exit_status = STOPPED


class RankLost(WuxiaError):
    """Another process of the run is gone, or does not answer."""

    exit_status = STOPPED


class MachineError(WuxiaError):
    """A fault of the machine or the network: the hub, memory, the disk, a port."""

    exit_status = 5


class DeviceLost(MachineError):
    """A GPU, or the link between GPUs, failed; new processes may succeed."""


def command_parser(module: str, description: str | None) -> argparse.ArgumentParser:
    """Make a parser, without options yet, for the command `python -m MODULE`.

    Its help shows `description`, if there is one, with its line breaks.
    """
    formatter = argparse.RawDescriptionHelpFormatter
    program = f"python -m {module}"
    return argparse.ArgumentParser(program, description=description, formatter_class=formatter)


def exit_status(work: Callable[[], object]) -> int:
    """Call `work`, and return the exit status of its command: 0 if it raised nothing.

    A failure that the user can mend, or Ctrl-C, is printed to stderr without a traceback, and gives
    its own status. An `OSError` and a lack of memory count as a `MachineError`, but a path that is
    taken, too long, or leads through a file as a `ConfigError`. Any other error is raised.
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
    """Whether `error` means that memory ran out, of the machine or of a GPU."""
    # as CUDA, cuBLAS and torch on a CPU say it
    phrases = ("out of memory", "ALLOC_FAILED", "can't allocate memory")
    return isinstance(error, MemoryError) or any(phrase in str(error) for phrase in phrases)


@functools.cache
def hub_fault() -> str:
    """Return why the Hugging Face hub does not answer; "" if it does, or is set not to be asked.

    If it does not, huggingface_hub is set to look only into its cache, here and in the processes
    that this one starts: it would otherwise try again for a minute for each file. `model.fetch`
    calls this before it looks a name up on the hub. A process asks the hub once.
    """
    from huggingface_hub import constants, get_session
    from huggingface_hub.errors import HTTPError

    if constants.is_offline_mode():
        return ""
    faults = [f"no answer within {HUB_TIMEOUT} s"]  # one, which `request` replaces

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

    Log records are plain lines on stderr, output to a closed terminal is dropped, and each of
    `heeded_signals` raises `KeyboardInterrupt`.
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
    """Replace stdout and stderr by streams that raise no error.

    What is written to a closed terminal, a broken pipe or a full disk is dropped; a character that
    the encoding lacks becomes `?`.
    """
    sys.stdout = _ExpendableFile.wrap(sys.stdout, 1)  # 1 and 2 are their file descriptors
    sys.stderr = _ExpendableFile.wrap(sys.stderr, 2)


def heeded_signals() -> list[signal.Signals]:
    """List the signals that stop a run: all `SIGNALS`, but SIGHUP only if it is not ignored.

    `nohup` makes a process ignore it. SIGINT and SIGQUIT count even if they are ignored, as in a
    process that a shell started in the background.
    """
    nohup = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    return [number for number in SIGNALS if not (nohup and number == signal.SIGHUP)]


def presentable(text: str) -> str:
    """Make a message safe to show: `SECRET` becomes `***`, and all is `visible` (`⟨U+001B⟩`)."""
    return visible(SECRET.sub("***", text))


class _PresentableFormatter(logging.Formatter):
    """Formats log records as `presentable` text, tracebacks too."""

    def format(self, record: logging.LogRecord) -> str:
        return presentable(super().format(record))


class _ExpendableFile(io.FileIO):
    """A terminal, pipe or file whose output is dropped without an error once a write fails."""

    @classmethod
    def wrap(cls, stream: TextIO | None, descriptor: int) -> TextIO:
        """Make a text stream on the file `descriptor` in place of `stream`, of the same encoding.

        `?` stands for what the encoding lacks. Each line is flushed, so that stdout and stderr are
        in order if both go to one place. `stream` is None if the descriptor was closed from the
        beginning: output is then dropped.
        """
        if stream is None:  # child processes need an open descriptor
            _discard_output(descriptor)
        else:
            stream.flush()
        buffer = io.BufferedWriter(cls(descriptor, "w", closefd=False))
        encoding = stream.encoding if stream else "utf-8"
        return io.TextIOWrapper(buffer, encoding, "replace", line_buffering=True)

    def write(self, data: Any) -> int:
        """Write `data`, or if that fails drop it and all later output; return the bytes' number."""
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
    """Turn `OSError` and `SafetensorError` inside the `with` block into `MachineError`.

    Its message says that `place` cannot be written: the name that the user knows a folder by, such
    as `training.output_dir output/sample`.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        # no right to write, a file in the folder's place, a read-only disk: space would not help
        refused = getattr(error, "errno", None) in (errno.EACCES, errno.EEXIST, errno.EROFS)
        remedy = "name another folder" if refused else "free some space or name another folder"
        raise MachineError(f"{place}: cannot be written ({reason}); {remedy}") from None
