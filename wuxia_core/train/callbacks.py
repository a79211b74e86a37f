"""What happens beside the steps: the progress bar, the metrics file, the stop at a bad number."""

import json
import math
import resource
import time
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import ProgressCallback, TrainerCallback

from wuxia_core.errors import NonFiniteError

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
            self._shown.update(losses)
            self.training_bar.set_postfix(self._shown)


class MetricsFile(TrainerCallback):
    """Append each logged row to `metrics.jsonl`, flushed, with the throughput since the last."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / "metrics.jsonl"
        self._last: tuple[float, int] | None = None

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Start the clock with the first step."""
        self._last = self._last or (time.monotonic(), state.num_input_tokens_seen)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **_: Any) -> None:
        """Write the row on the first rank."""
        if not state.is_world_process_zero:
            return
        row = {"step": state.global_step, "time": time.time(), **logs}
        if "loss" in logs and self._last:
            now, seen = time.monotonic(), state.num_input_tokens_seen
            row["tokens_per_second"] = (seen - self._last[1]) / (now - self._last[0])
            self._last = now, seen
            row["memory_gib"] = peak_memory() / 2**30
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


class FirstSteps(TrainerCallback):
    """Time the first steps and say how long the run takes at that rate, and the peak of memory.

    The first two are not counted: they warm the device up.
    """

    def __init__(self, *, stop: bool) -> None:
        self._stop, self._done, self._start, self._tokens = stop, 0, 0.0, 0

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Start the clock after the second step, read it after the twentieth."""
        self._done += 1
        if self._done == WARM_UP:
            self._start, self._tokens = time.monotonic(), state.num_input_tokens_seen
        last = min(TIMED_STEPS, state.max_steps)
        if self._done != last or last <= WARM_UP:
            return
        control.should_training_stop |= self._stop
        if state.is_world_process_zero:
            seconds = time.monotonic() - self._start
            a_step = seconds / (last - WARM_UP)
            tokens = (state.num_input_tokens_seen - self._tokens) / seconds
            tqdm.write(
                f"measured over {last - WARM_UP} steps: {a_step:.2f} s a step, {tokens:,.0f} "
                f"tokens/s, peak {peak_memory() / 2**30:.2f} GiB a process; at that rate "
                f"{state.max_steps * a_step / 3600:.2f} hours for all {state.max_steps} steps, "
                "held-out measurements not counted"
            )


def peak_memory() -> int:
    """Bytes this process had at most: on a card what the allocator reserved, else resident."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_reserved()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class StopOnNonFinite(TrainerCallback):
    """Stop before an update that would break the adapter; every rank sees the same numbers."""

    def on_pre_optimizer_step(
        self, args: Any, state: Any, control: Any, model: Any, **_: Any
    ) -> None:
        """Look at the gradients, after clipping and after DDP has averaged them."""
        if args.fp16:
            return  # the loss scaler meets infinities on purpose and skips those steps
        norms = [p.grad.norm() for p in model.parameters() if p.grad is not None]
        self._check(torch.stack(norms).isfinite().all(), "gradient", state.global_step + 1)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **_: Any) -> None:
        """Look at the logged loss, which with fp16 is all there is to look at."""
        self._check(math.isfinite(logs.get("loss", 0)), "loss", state.global_step)

    def _check(self, finite: object, what: str, step: int) -> None:
        if not finite:
            raise NonFiniteError(
                f"the {what} at step {step} is not a finite number; nothing was saved from it. "
                "Lower training.learning_rate, or look at the text of that step."
            )
