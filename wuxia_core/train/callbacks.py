"""What is seen of the steps: the progress bar, the metrics file, the time that is left."""

import resource
import time
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import ProgressCallback, TrainerCallback

from wuxia_core.errors import ConfigError
from wuxia_core.run.metrics import append

WARM_UP, TIMED_STEPS = 2, 20


class Progress(ProgressCallback):
    """The bar alone, with the newest losses behind it; all figures are in `metrics.jsonl`."""

    def __init__(self) -> None:
        super().__init__()
        self._shown: dict[str, str] = {}

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **_: Any) -> None:
        """Show the losses."""
        losses = {name: f"{value:.3f}" for name, value in logs.items() if name.endswith("loss")}
        if self.training_bar is not None and "train_loss" not in losses:
            if "tokens_per_second" in logs:
                losses["tokens/s"] = f"{logs['tokens_per_second']:,.0f}"
            self._shown.update(losses)
            self.training_bar.set_postfix(self._shown)


class MetricsFile(TrainerCallback):
    """Append what is logged to `metrics.jsonl`, and when the run starts, resumes and saves."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Note where this attempt starts."""
        self._write(state, {"event": "resumed" if state.global_step else "started"})

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **_: Any) -> None:
        """Note the figures."""
        self._write(state, logs)

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Note the checkpoint, which has its place by now."""
        self._write(state, {"event": "checkpoint"})

    def _write(self, state: Any, row: dict[str, Any]) -> None:
        if state.is_world_process_zero:
            append(self._folder, {"step": state.global_step, "time": time.time(), **row})


class FirstSteps(TrainerCallback):
    """Time the first steps and say how long the run takes at that rate, and the peak of memory.

    The first two are not counted: they warm the device up.
    """

    def __init__(self, *, stop: bool) -> None:
        self._stop, self._done, self._seconds, self._tokens = stop, 0, 0.0, 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Refuse to measure a run that is over before it is warm."""
        if self._stop and state.max_steps <= WARM_UP:
            raise ConfigError(f"--measure: needs a run of more than {WARM_UP} steps")

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Start the clock; between steps held-out text is measured and checkpoints are saved."""
        if self._done == WARM_UP:
            self._seconds, self._tokens = 0.0, state.num_input_tokens_seen
        self._seconds -= time.monotonic()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Stop the clock; say what it shows after the twentieth step."""
        self._seconds += time.monotonic()
        self._done += 1
        if self._done != min(TIMED_STEPS, state.max_steps) or self._done <= WARM_UP:
            return
        control.should_training_stop |= self._stop
        if state.is_world_process_zero:
            timed = self._done - WARM_UP
            a_step = self._seconds / timed
            tokens = (state.num_input_tokens_seen - self._tokens) / self._seconds
            tqdm.write(
                f"measured over {timed} steps: {a_step:.2f} s a step, {tokens:,.0f} "
                f"tokens/s, peak {peak_memory() / 2**30:.2f} GiB a process; at that rate "
                f"{state.max_steps * a_step / 3600:.2f} hours for all {state.max_steps} steps, "
                "held-out measurements not counted"
            )


def peak_memory() -> int:
    """Bytes this process had at most: on a card what the allocator reserved, else resident."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_reserved()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
