"""What can go wrong for a user, each with the exit status that `launch_ddp.py` ends with.

The message of every one of these says what, where and what to do; no traceback is shown for them.
"""

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from safetensors import SafetensorError

from wuxia_core.text import visible

STOPPED, BUG = 75, 1  # exit statuses: stopped but resumable; none of the user's making


class WuxiaError(Exception):
    """A failure that is the user's or the machine's to mend, not a bug."""

    exit_status = BUG


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
        print(f"error: {visible(str(error))}", file=sys.stderr)
        return error.exit_status
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return STOPPED
    return 0


@contextmanager
def raise_machine_error(what: str) -> Iterator[None]:
    """Raise `MachineError` where something cannot be written in here."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        why = getattr(error, "strerror", None) or error
        raise MachineError(
            f"{what}: cannot be written ({why}); free some space or name another folder"
        ) from None
