"""What ends a run before its last step: a bad number, a signal, no more improvement."""

import math
import os
import signal
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import TrainerCallback

from wuxia_core.errors import NonFiniteError
from wuxia_core.run import step_of
from wuxia_core.run.metrics import read_rows
from wuxia_core.train.saving import best_adapter, save_best

JUDGED_BY = "eval_wuxia_bits_per_char"


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


class StopOnSignal(TrainerCallback):
    """Save and stop at the end of a step in which any rank got SIGTERM or SIGINT.

    All ranks ask each other, so that all of them save. A launcher that is gone counts as a signal.
    """

    def __init__(self) -> None:
        self._asked, self._launcher = False, os.getppid()
        self.stopped_at: int | None = None
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._ask)

    def _ask(self, *_: Any) -> None:
        self._asked = True

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Ask all ranks; the last step ends the run anyway."""
        asked = torch.tensor(int(self._asked or os.getppid() != self._launcher), device=args.device)
        if dist.is_initialized():
            dist.all_reduce(asked, dist.ReduceOp.MAX)
        if asked and state.global_step < state.max_steps:
            control.should_save = control.should_training_stop = True
            self.stopped_at = state.global_step


class KeepBest(TrainerCallback):
    """Keep the adapter with the fewest held-out bits per character; stop when none gets better.

    The last step is measured too. `patience` is a number of measurements, None for no early stop.
    A run that resumes before the step of the kept adapter judges anew from there on.
    """

    def __init__(self, folder: Path, patience: int | None, resumed_at: int) -> None:
        self._folder, self._patience = folder, patience
        rows = read_rows(folder) if resumed_at else []
        self._measured: dict[int, float] = {
            row["step"]: row[JUDGED_BY]
            for row in rows
            if JUDGED_BY in row and 0 < row["step"] <= resumed_at
        }
        kept = best_adapter(folder)
        if kept is None or step_of(kept) != self.best:
            self._measured = {}

    @property
    def best(self) -> int | None:
        """The step whose adapter is kept, the first of equals; None before any was measured."""
        return min(self._measured, key=lambda step: (self._measured[step], step), default=None)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Have the last step measured."""
        control.should_evaluate |= state.global_step == state.max_steps

    def on_evaluate(
        self, args: Any, state: Any, control: Any, model: Any, metrics: dict[str, float], **_: Any
    ) -> None:
        """Save the adapter where it is the best so far; stop after `patience` that were not."""
        step = state.global_step
        if not step or JUDGED_BY not in metrics:
            return
        self._measured[step] = metrics[JUDGED_BY]
        if self.best == step and state.is_world_process_zero:
            save_best(model, self._folder, step)
        since = sum(later > (self.best or 0) for later in self._measured)
        control.should_training_stop |= self._patience is not None and since >= self._patience
