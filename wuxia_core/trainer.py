"""transformers' `Trainer` with what it lacks, and the callbacks of a run.

`SpanTrainer` has an epoch that travels with each window, checkpoints that are whole or not there,
and an exact measurement of held-out text. The callbacks time the first steps, keep the best
adapter, and stop at a number that is not finite or at a signal.
"""

import math
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from resource import RUSAGE_SELF, getrusage
from statistics import mean
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
import torch.nn.functional as F
from accelerate.utils import gather_object
from safetensors import SafetensorError
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import Trainer, TrainerCallback

from wuxia_core import run
from wuxia_core.errors import MachineError, NonFiniteError, heeded_signals
from wuxia_core.masking import IGNORE_INDEX, MaskCollator
from wuxia_core.messages import messages
from wuxia_core.mixing import Windows
from wuxia_core.model import ADAPTER_FILES, LOGITS, LOSS_LOGITS, write_adapter

BAR = "{desc}{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"
WARM_UP, TIMED_STEPS = 2, 20
JUDGED_BY = "eval_wuxia_bits_per_char"
Flags = npt.NDArray[np.bool_]


class Progress(TrainerCallback):
    """One bar for the whole training, on the first rank; all figures are in `metrics.jsonl`."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Draw it, from the step on that a run goes on from."""
        elsewhere = not state.is_world_process_zero
        how = {"initial": state.global_step, "dynamic_ncols": True, "bar_format": BAR}
        self._bar = tqdm(total=state.max_steps, disable=elsewhere, **how)
        self._said = messages("training")

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Move on."""
        self._bar.set_description(self._said["steps"], refresh=False)
        self._bar.update()

    def on_prediction_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Say that held-out text is measured, and count the seconds meanwhile."""
        self._bar.set_description(self._said["measuring"])

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **_: Any) -> None:
        """Show the newest loss."""
        if "loss" in logs:
            self._bar.set_postfix_str(f"loss {logs['loss']:.3f}")

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Leave it as it is after the last step."""
        self._bar.set_description(self._said["steps"])
        self._bar.close()


class FirstSteps(TrainerCallback):
    """Time the first steps and say how long the run takes at that rate, and the peak of memory.

    The first two are not counted: they warm the device up.
    """

    def __init__(self, *, stop: bool) -> None:
        self._stop, self._began = stop, 0.0
        self._seconds: list[float] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Start the clock; between steps held-out text is measured and checkpoints are saved."""
        self._began = time.monotonic()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Stop the clock; say what it shows after the twentieth step."""
        self._seconds.append(time.monotonic() - self._began)
        if len(self._seconds) != min(TIMED_STEPS, state.max_steps):
            return
        control.should_training_stop |= self._stop
        if state.is_world_process_zero:
            timed = self._seconds[WARM_UP:] or self._seconds[-1:]
            a_step = mean(timed)
            tokens = state.num_input_tokens_seen / state.global_step / a_step
            tqdm.write(
                f"measured over {len(timed)} steps: {a_step:.2f} s a step, {tokens:,.0f} "
                f"tokens/s, peak {peak_memory() / 2**30:.2f} GiB a process; at that rate "
                f"{state.max_steps * a_step / 3600:.2f} hours for all {state.max_steps} steps"
            )


def peak_memory() -> int:
    """Bytes this process had at most: on a card what the allocator reserved, else resident."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_reserved()
    return getrusage(RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def save_best(model: Any, folder: Path, step: int) -> Path:
    """Keep this adapter as the best, `best-STEP`, in place of the one before; return its folder."""
    staged = folder / f"{run.STAGING}best" / f"best-{step}"
    staged.mkdir(parents=True)
    write_adapter(model, staged)
    run.write_manifest(staged, {"step": step})
    # Whoever crashes here goes on from a step before this one, and measures it again.
    for older in folder.glob("best-[0-9]*"):
        shutil.rmtree(older)
    run.publish(staged, folder)
    return folder / staged.name


def finish(model: Any, folder: Path) -> None:
    """Put the best adapter, or where none was measured this one, at the top of the run folder."""
    best = next(folder.glob("best-[1-9]*"), None) or save_best(model, folder, step=0)
    for path in (best / name for name in ADAPTER_FILES):
        if path.exists():  # one may have been moved before a crash
            path.replace(folder / path.name)
    shutil.rmtree(best)


class StopOnNonFinite(TrainerCallback):
    """Stop before an update that would break the adapter; every rank sees the same numbers."""

    def on_pre_optimizer_step(
        self, args: Any, state: Any, control: Any, model: Any, **_: Any
    ) -> None:
        """Look at the gradients, after clipping and after DDP has averaged them."""
        if not args.fp16:  # its loss scaler meets infinities on purpose and skips those steps
            gradients = [p.grad for p in model.parameters() if p.grad is not None]
            norm = torch.nn.utils.get_total_norm(gradients)
            self._check(math.isfinite(norm), "gradient", state.global_step + 1)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **_: Any) -> None:
        """Look at the logged loss, which with fp16 is all there is to look at."""
        self._check(math.isfinite(logs.get("loss", 0)), "loss", state.global_step)

    def _check(self, finite: bool, what: str, step: int) -> None:
        if not finite:
            remedy = "lower training.learning_rate, or look at the text of that step"
            raise NonFiniteError(f"the {what} at step {step} is not a finite number; {remedy}")


class StopOnSignal(TrainerCallback):
    """Save and stop at the end of a step in which any rank got a signal that asks for it.

    All ranks agree on it, so that all of them save. A launcher that is gone counts as a signal.
    """

    def __init__(self) -> None:
        self._signalled, self._launcher = False, os.getppid()
        self.stopped_at: int | None = None
        for number in heeded_signals():
            signal.signal(number, self._note)

    def _note(self, *_: Any) -> None:
        self._signalled = True

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Make up for a measurement that was cut off, so that the same adapter is found best."""
        step, last = state.global_step, (state.log_history or [{}])[-1]
        due = step % state.eval_steps == 0 or step == state.max_steps
        if step and due and args.eval_strategy != "no":
            args.eval_on_start = not any(name.startswith("eval") for name in last)

    def on_step_end(self, args: Any, state: Any, control: Any, **named: Any) -> None:
        """Stop where any rank has to; the last step ends the run anyway."""
        if state.global_step < state.max_steps:
            self.on_prediction_step(args, state, control, **named)

    def on_prediction_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Stop where any rank has to; a measurement is cut off, the first one for a step's sake."""
        here = self._signalled or os.getppid() != self._launcher
        anywhere = torch.tensor(int(here), device=args.device)
        if dist.is_initialized():
            dist.all_reduce(anywhere, dist.ReduceOp.MAX)
        if anywhere:
            control.should_save = control.should_training_stop = control.should_epoch_stop = True
            self.stopped_at = state.global_step


class KeepBest(TrainerCallback):
    """Keep the adapter with the fewest held-out bits per character; stop when none gets better.

    Which one that is stands in `Trainer`'s state, and so in each checkpoint; the untrained one is
    none. `patience` is a number of measurements, None for no early stop. A run that resumes before
    the step of the kept adapter judges anew from there on.
    """

    def __init__(self, folder: Path, patience: int | None) -> None:
        self._folder, self._patience = folder, patience

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Forget a best adapter that is not there any more."""
        if not (self._folder / f"best-{state.best_global_step}").exists():
            state.best_metric = None

    def on_evaluate(
        self, args: Any, state: Any, control: Any, model: Any, metrics: dict[str, float], **_: Any
    ) -> None:
        """Save the adapter where it is the best so far; stop after `patience` that were not."""
        step = state.global_step
        if not step:
            return
        if state.best_metric is None or metrics[JUDGED_BY] < state.best_metric:
            state.best_metric, state.best_global_step = metrics[JUDGED_BY], step
            if state.is_world_process_zero:
                save_best(model, self._folder, step)
        elif self._patience:
            since = (step - state.best_global_step) / state.eval_steps
            control.should_training_stop |= since >= self._patience


class EpochSampler(torch.utils.data.Sampler[tuple[int, int]], TrainerCallback):
    """Yield `(epoch, row)` in an order that depends only on (seed, epoch).

    The last step of an epoch is filled up from the epoch's first rows, so that every step has the
    effective batch, however many processes share it. `packed` windows, which need an attention
    mask, share a device's batch with each other, so that the others do without. With `by_turns`
    rows of even and odd number take turns, so that half of a batch is of each kind that `mixed`
    makes of them.

    It is a callback too, since accelerate does not tell it the epoch where one is resumed.
    """

    def __init__(
        self, packed: Flags, seed: int, batch: int, effective_batch: int, by_turns: bool = False
    ) -> None:
        self._packed, self._seed, self._batch = torch.from_numpy(packed), seed, batch
        self._by_turns, self.epoch = by_turns, 0
        self.steps = -(-len(packed) // effective_batch)  # an epoch
        self._length = self.steps * effective_batch

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Compute the epoch of the next iteration from the steps that are done."""
        self.epoch = state.global_step // self.steps

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[tuple[int, int]]:
        """Shuffle the rows, packed ones last, fill up the last step, then shuffle the batches."""
        generator = torch.Generator().manual_seed(self._seed * 1_000_003 + self.epoch)
        size = len(self._packed)
        order = torch.randperm(size, generator=generator)
        order = order[torch.argsort(self._packed[order].int(), stable=True)]
        if self._by_turns:
            parity = order % 2
            rank = torch.where(parity == 1, parity.cumsum(0), (1 - parity).cumsum(0))  # among those
            order = order[(2 * rank + parity).argsort()]
        batches = order.repeat(-(-self._length // size))[: self._length].view(-1, self._batch)
        for row in batches[torch.randperm(len(batches), generator=generator)].flatten().tolist():
            yield self.epoch, row


class SpanTrainer(Trainer):
    """Trainer whose samples know their epoch, and which measures held-out text exactly.

    Its checkpoints appear whole, under their name, or not at all. All ranks write
    into a folder aside; the first adds the manifest and renames it. A rank that cannot write tells
    the others; then older checkpoints make room, and all try once more.
    """

    facts: dict[str, Any]  # what a checkpoint's manifest says besides
    _logged: tuple[float, int] | None = None

    def note(self, row: dict[str, Any]) -> None:
        """Add a row to `metrics.jsonl`: what was logged, or when the run starts and saves."""
        if self.is_world_process_zero():
            now = {"step": self.state.global_step, "time": time.time()}
            run.append(Path(self.args.output_dir), now | row)

    def _get_output_dir(self, trial: Any) -> str:
        return f"{self.args.output_dir}/{run.STAGING}{self.state.global_step}"

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        save = super()._save_checkpoint
        for _ in range(2):
            problem = self._tried(save, model, trial) or self._tried(self._publish)
            self._tried(self._make_room, run.FEWEST if problem else self.args.save_total_limit)
            if not problem:
                return self.note({"event": "checkpoint"})
        raise MachineError(
            f"{self.args.output_dir}: the checkpoint of step {self.state.global_step} cannot be "
            f"written ({problem}); free some space and go on with --resume from the one before"
        )

    def _tried(self, work: Callable[..., None], *arguments: Any) -> str | None:
        """Do something on all ranks; tell every rank the first thing that went wrong on any."""
        problem = None
        try:
            work(*arguments)
        except (OSError, RuntimeError, SafetensorError) as error:
            problem = (str(error).splitlines() or [type(error).__name__])[0]
        return next(filter(None, gather_object([problem])), None)  # waits for all

    def _make_room(self, kept: int) -> None:
        if self.is_world_process_zero():
            run.clear_staging(Path(self.args.output_dir))
            run.prune(Path(self.args.output_dir), kept)

    def _publish(self) -> None:
        if self.is_world_process_zero():
            step, ranks = self.state.global_step, self.args.world_size
            staged = Path(self._get_output_dir(None)) / f"checkpoint-{step}"
            if len(list(staged.glob("rng_state*"))) < ranks:
                raise OSError("not all ranks' files can be seen: do all machines share the folder?")
            run.write_manifest(staged, {"step": step, "world_size": ranks, **self.facts})
            run.publish(staged, staged.parents[1])

    def _get_train_sampler(self, train_dataset: Windows | None = None) -> EpochSampler:
        args = self.args
        batch = args.per_device_train_batch_size
        step = batch * args.gradient_accumulation_steps * args.world_size
        by_turns = self.data_collator.objective == "mixed"
        sampler = EpochSampler(self.train_dataset.packed, args.seed, batch, step, by_turns)
        self.add_callback(sampler)
        return sampler

    def get_batch_samples(self, *arguments: Any) -> Any:
        """Take a step's batches, and count their tokens on all ranks."""
        batches, items = super().get_batch_samples(*arguments)
        tokens = sum(batch["input_ids"].numel() for batch in batches)
        everywhere = self.accelerator.reduce(torch.tensor(tokens, device=self.args.device))
        self.state.num_input_tokens_seen += int(everywhere)
        return batches, items

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log with the throughput since the last row, and the peak of memory."""
        now, seen = time.monotonic(), self.state.num_input_tokens_seen
        if "loss" in logs:
            if self._logged:
                logs["tokens_per_second"] = (seen - self._logged[1]) / (now - self._logged[0])
            logs["memory_gib"] = peak_memory() / 2**30
            self._logged = now, seen
        super().log(logs, start_time)
        self.note(logs)

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Measure and log each source's held-out windows.

        In nats per masked token, the masks being those of epoch 0, and in bits per character, left
        to right within a window.
        """
        self.model.eval()
        batch = self.args.per_device_eval_batch_size
        masked = replace(self.data_collator, objective="masked")
        plain = replace(self.data_collator, objective="clm")
        metrics = {}
        for source, windows in self.eval_dataset.items():
            nats, tokens = self._nats(windows, masked, batch)
            metrics[f"eval_{source}_loss"] = nats / max(tokens, 1)
            longest = max(len(windows[row].input_ids) for row in range(len(windows)))
            fits = LOGITS // (longest * self.model.config.vocab_size)
            bits = self._nats(windows, plain, max(1, min(batch, fits)))[0] / math.log(2)
            metrics[f"eval_{source}_bits_per_char"] = bits / max(windows.characters, 1)
        if self.control.should_epoch_stop:  # a signal cut it off
            self.control.should_evaluate = False
            return {}
        self.log(metrics)
        self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        self._logged = time.monotonic(), self.state.num_input_tokens_seen
        return metrics

    @torch.no_grad()
    def _nats(self, windows: Windows, collator: MaskCollator, batch: int) -> tuple[float, float]:
        """Sum nats and targets over all ranks; rows that fill up the last batch do not count."""
        rows = []
        loader: Any = DataLoader(windows, batch_size=batch, collate_fn=collator)  # type: ignore[arg-type]
        for inputs in self.accelerator.prepare_data_loader(loader):
            labels = inputs.pop("labels")
            targets = labels != IGNORE_INDEX  # (B, T)
            logits = self.model(**inputs).logits.float()
            nats = torch.zeros(labels.shape, device=labels.device)
            nats[targets] = F.cross_entropy(logits, labels[targets], reduction="none")
            sums = torch.stack([nats.sum(1), targets.sum(1)], dim=1)  # (B, 2)
            rows.append(self.accelerator.gather_for_metrics(sums))
            self.callback_handler.on_prediction_step(self.args, self.state, self.control)
            if self.control.should_epoch_stop:
                break
        nats_sum, targets_sum = torch.cat(rows).double().sum(0).tolist()
        return nats_sum, targets_sum


def masked_cross_entropy(
    outputs: Any, labels: torch.Tensor, num_items_in_batch: torch.Tensor
) -> torch.Tensor:
    """Sum the cross-entropy at the target positions and divide by their number in the step.

    Parameters
    ----------
    outputs : CausalLMOutput
        `.logits` is (N, V): one row for each target, because the collator's `logits_to_keep`
        keeps position i - 1 for token i before the vocabulary projection. Overwritten.
    labels : (B, T) int64
        Token ids at the N target positions, -100 elsewhere and in column 0.
    num_items_in_batch : scalar
        Targets over all accumulation steps and all ranks. `Trainer` counts them, and multiplies
        the loss by the number of ranks, since DDP averages gradients.

    Returns
    -------
    Scalar, nats per target once summed over accumulation steps and ranks.
    """
    targets = labels[labels != IGNORE_INDEX]  # (N,) in the row-major order of the logits
    summed: Any = SummedCrossEntropy.apply
    total: torch.Tensor = summed(outputs.logits, targets)
    return total / num_items_in_batch.clamp(min=1)  # a step may have no targets


class SummedCrossEntropy(torch.autograd.Function):
    """Cross-entropy that writes its gradient over the logits, some rows at a time.

    Where every token of 4 x 1,024 is a target, the usual one holds four tables of the logits' size,
    two of them in float32.
    """

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Sum the nats of `targets` (N,), and make `logits` (N, V) softmax less one-hot."""
        rows = max(1, LOSS_LOGITS // logits.shape[1])
        nats = []
        for part, ids in zip(logits.split(rows), targets.split(rows), strict=True):
            log_p = F.log_softmax(part, -1, dtype=torch.float32)
            chosen = ids[:, None]
            nats.append(-log_p.gather(1, chosen).sum())
            part.copy_(log_p.exp_().scatter_add_(1, chosen, log_p.new_full(chosen.shape, -1)))
        ctx.save_for_backward(logits)
        return torch.stack(nats).sum()

    @staticmethod
    def backward(ctx: Any, scale: torch.Tensor) -> tuple[torch.Tensor, None]:
        """Scale the gradient, (N, V)."""
        return ctx.saved_tensors[0].mul_(scale), None
