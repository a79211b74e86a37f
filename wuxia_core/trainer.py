"""transformers' `Trainer` with what it lacks, and the callbacks of a run.

`SpanTrainer` writes checkpoints that are complete or absent, and measures held-out text exactly.
The callbacks draw the bar, keep the best adapter, and stop the run at a NaN or a signal.
`EpochSampler` orders the windows, and `masked_cross_entropy` is the loss.
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

BAR_FORMAT = "{desc}{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"
BEST_METRIC = "eval_wuxia_bits_per_char"  # of the best adapter it is the lowest
Flags = npt.NDArray[np.bool_]


class Progress(TrainerCallback):
    """Draw one bar for the whole training, on the first rank; `metrics.jsonl` has the figures."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Draw the bar; in a resumed run it begins at the step that the run goes on from."""
        style = {"initial": state.global_step, "dynamic_ncols": True, "bar_format": BAR_FORMAT}
        self._bar = tqdm(total=state.max_steps, disable=not state.is_world_process_zero, **style)
        self._labels = messages("training")

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Advance the bar by a step."""
        self._bar.set_description(self._labels["steps"], refresh=False)
        self._bar.update()

    def on_prediction_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Label the bar as measuring held-out text; drawing it again updates its clock."""
        self._bar.set_description(self._labels["measuring"])

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **_: Any) -> None:
        """Show the loss beside the bar, if there is one in `logs`."""
        if "loss" in logs:
            self._bar.set_postfix_str(f"loss {logs['loss']:.3f}")

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Close the bar, which stays on the screen as it is after the last step."""
        self._bar.set_description(self._labels["steps"])
        self._bar.close()


def peak_memory() -> int:
    """Give the most bytes this process held so far: reserved by torch on a GPU, else resident."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_reserved()
    unit = 1 if sys.platform == "darwin" else 1024  # bytes of a unit of `ru_maxrss`
    return getrusage(RUSAGE_SELF).ru_maxrss * unit


def save_best(model: Any, folder: Path, step: int) -> Path:
    """Save an adapter as `folder/best-STEP`, delete older ones; only the first rank calls this."""
    staged = folder / f"{run.STAGING}best" / f"best-{step}"
    staged.mkdir(parents=True)
    write_adapter(model, staged)
    run.write_manifest(staged, {"step": step})
    # A run that crashes here resumes from a checkpoint before this step, and measures it again.
    for older in folder.glob("best-[0-9]*"):
        shutil.rmtree(older)
    run.publish(staged, folder)
    return folder / staged.name


def finish(model: Any, folder: Path) -> None:
    """Move the best adapter's files into the run folder; if none was saved, those of `model`."""
    best = next(folder.glob("best-[1-9]*"), None) or save_best(model, folder, step=0)
    for path in (best / name for name in ADAPTER_FILES):
        if path.exists():  # one may have been moved before a crash
            path.replace(folder / path.name)
    shutil.rmtree(best)


class StopOnNonFinite(TrainerCallback):
    """Raise `NonFiniteError` before an update that would break the adapter, on every rank alike."""

    def on_pre_optimizer_step(
        self, args: Any, state: Any, control: Any, model: Any, **_: Any
    ) -> None:
        """Check the norm of the gradients, after clipping and after DDP has averaged them."""
        if not args.fp16:  # whose loss scaler makes infinities on purpose, and skips those steps
            gradients = [p.grad for p in model.parameters() if p.grad is not None]
            norm = torch.nn.utils.get_total_norm(gradients)
            self._check(norm, "gradient", state.global_step + 1)  # which counts finished steps

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **_: Any) -> None:
        """Check the loss, if there is one in `logs`; with fp16 no other check is made."""
        self._check(logs.get("loss", 0), "loss", state.global_step)

    def _check(self, number: float | torch.Tensor, name: str, step: int) -> None:
        """Raise `NonFiniteError` if `number`, called `name` in the message, is infinite or NaN."""
        if not math.isfinite(number):
            remedy = "lower training.learning_rate, or look at the text of that step"
            raise NonFiniteError(f"the {name} at step {step} is not a finite number; {remedy}")


class StopOnSignal(TrainerCallback):
    """Save and stop at the end of a step in which any rank got one of `heeded_signals`.

    The ranks tell each other, so that all save. The launcher's death counts as a signal.
    """

    def __init__(self) -> None:
        self._signalled, self._launcher_pid = False, os.getppid()
        self.stopped_at: int | None = None  # the step after which a signal stopped the run
        for number in heeded_signals():
            signal.signal(number, self._on_signal)

    def _on_signal(self, *_: Any) -> None:
        self._signalled = True

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Make a resumed run first measure at its step if a signal had cut that measurement off."""
        # a measurement that was finished was logged last, before the checkpoint
        step, last_row = state.global_step, (state.log_history or [{}])[-1]
        due = step % state.eval_steps == 0 or step == state.max_steps
        if step and due and args.eval_strategy != "no":  # step 0: `train.arguments` decides
            args.eval_on_start = not any(name.startswith("eval") for name in last_row)

    def on_step_end(self, args: Any, state: Any, control: Any, **named: Any) -> None:
        """Save and stop as `on_prediction_step` does; not at the last step, which ends the run."""
        if state.global_step < state.max_steps:
            self.on_prediction_step(args, state, control, **named)

    def on_prediction_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Make the run save and stop if any rank got a signal; all ranks must call this.

        This cuts a measurement off (`_score`). After one at the start `Trainer` still does a step.
        """
        signalled = self._signalled or os.getppid() != self._launcher_pid
        stop = torch.tensor(int(signalled), device=args.device)
        if dist.is_initialized():
            dist.all_reduce(stop, dist.ReduceOp.MAX)  # 1 if any rank has 1
        if stop:
            control.should_save = control.should_training_stop = control.should_epoch_stop = True
            self.stopped_at = state.global_step


class KeepBest(TrainerCallback):
    """Save the adapter with the fewest held-out bits per character; stop when none gets better.

    The best step and its bits are in `Trainer`'s state, and so in each checkpoint. At step 0 the
    adapter is untrained, and does not count. The run stops after `patience` measurements in a row
    without a better one; with a `patience` of None it does not.
    """

    def __init__(self, folder: Path, patience: int | None) -> None:
        self._folder, self._patience = folder, patience

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Forget the best adapter if its folder is gone: a later one had replaced it."""
        if not (self._folder / f"best-{state.best_global_step}").exists():
            state.best_metric = None

    def on_evaluate(
        self, args: Any, state: Any, control: Any, model: Any, metrics: dict[str, float], **_: Any
    ) -> None:
        """Save the adapter if it is better than all before; stop after `patience` that are not."""
        step = state.global_step
        if not step:
            return
        if state.best_metric is None or metrics[BEST_METRIC] < state.best_metric:
            state.best_metric, state.best_global_step = metrics[BEST_METRIC], step
            if state.is_world_process_zero:
                save_best(model, self._folder, step)
        elif self._patience:
            worse_count = (step - state.best_global_step) / state.eval_steps  # measurements since
            control.should_training_stop |= worse_count >= self._patience


class EpochSampler(torch.utils.data.Sampler[tuple[int, int]], TrainerCallback):
    """Yield `(epoch, row)` of each window of an epoch, in an order that (seed, epoch) decide.

    `batch` and `effective_batch` are the windows of a forward pass and of a step. The last step is
    filled up with the first rows of the order. Windows that are `packed`, of several chunks, need
    an attention mask: they share batches with each other, so that most batches do without. With
    `by_turns` even and odd rows alternate: the objective `mixed` masks the even ones in one epoch
    and the odd ones in the next, and so half of each batch. The sampler is a callback too, since
    accelerate does not tell it the epoch of a resumed run.
    """

    def __init__(
        self, packed: Flags, seed: int, batch: int, effective_batch: int, by_turns: bool = False
    ) -> None:
        self._packed, self._seed, self._batch = torch.from_numpy(packed), seed, batch
        self._by_turns, self.epoch = by_turns, 0
        self.steps = math.ceil(len(packed) / effective_batch)  # optimizer steps of an epoch
        self._length = self.steps * effective_batch  # windows of an epoch, filled up

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Compute the epoch of the next `__iter__` from the steps that are done."""
        self.epoch = state.global_step // self.steps

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[tuple[int, int]]:
        """Shuffle the rows, packed ones last, fill up the last step, then shuffle the batches."""
        # The factor, a prime larger than any epoch, gives each (seed, epoch) its own number.
        generator = torch.Generator().manual_seed(self._seed * 1_000_003 + self.epoch)
        size = len(self._packed)
        order = torch.randperm(size, generator=generator)
        order = order[torch.argsort(self._packed[order].int(), stable=True)]
        if self._by_turns:
            odd = order % 2  # (size,); `place` counts the rows of the same parity up to each row
            place = torch.where(odd == 1, odd.cumsum(0), (1 - odd).cumsum(0))
            order = order[(2 * place + odd).argsort()]
        filled = order.repeat(math.ceil(self._length / size))[: self._length]
        batches = filled.view(-1, self._batch)
        for row in batches[torch.randperm(len(batches), generator=generator)].flatten().tolist():
            yield self.epoch, row


class SpanTrainer(Trainer):
    """Trainer whose samples carry their epoch, and which measures held-out text exactly.

    A checkpoint appears complete or not at all: all ranks write into a staging folder, then the
    first rank adds the manifest and moves it into the run folder. A rank that cannot write tells
    the others; then old checkpoints are deleted to make room, and all ranks try once more.
    """

    facts: dict[str, Any]  # `train.dependencies`, which go into each checkpoint's manifest
    _rate_start: tuple[float, int] | None = None  # seconds, tokens seen: at a loss or measurement

    def write_row(self, row: dict[str, Any]) -> None:
        """Add figures or an `event`, with step and time, to `metrics.jsonl`, on the first rank."""
        if self.is_world_process_zero():
            now = {"step": self.state.global_step, "time": time.time()}
            run.append(Path(self.args.output_dir), now | row)

    def _get_output_dir(self, trial: Any) -> str:
        """Give the staging folder, into which `Trainer` writes `checkpoint-STEP`."""
        return f"{self.args.output_dir}/{run.STAGING}{self.state.global_step}"

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Write a checkpoint, all ranks together; `MachineError` if that fails twice."""
        for _ in range(2):  # `problem` is the same on all ranks
            problem = self._attempt(self._stage, model, trial) or self._attempt(self._publish)
            self._attempt(self._prune, run.FEWEST if problem else self.args.save_total_limit)
            if not problem:
                return self.write_row({"event": "checkpoint"})
        raise MachineError(
            f"{self.args.output_dir}: the checkpoint of step {self.state.global_step} cannot be "
            f"written ({problem}); free some space and go on with --resume from the one before"
        )

    def _stage(self, model: Any, trial: Any) -> None:
        """Write this rank's files of a checkpoint into the staging folder.

        The best step is hidden meanwhile: with one, `Trainer` would wait for ranks that failed.
        """
        best, self.state.best_global_step = self.state.best_global_step, None
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self.state.best_global_step = best

    def _attempt(self, work: Callable[..., None], *arguments: Any) -> str | None:
        """Call `work` on this rank, as every rank must, and wait for the others.

        Returns the first line of the error of the lowest rank that failed; None if none did.
        """
        problem = None
        try:
            work(*arguments)
        except (OSError, RuntimeError, SafetensorError) as error:  # what a full disk can raise
            problem = (str(error) or type(error).__name__).splitlines()[0]
        return next(filter(None, gather_object([problem])), None)  # waits for all ranks

    def _prune(self, limit: int) -> None:
        """Delete staging folders and, by `run.prune`, old checkpoints, on the first rank."""
        if self.is_world_process_zero():
            run.clear_staging(Path(self.args.output_dir))
            run.prune(Path(self.args.output_dir), limit)

    def _publish(self) -> None:
        """Complete the staged checkpoint and move it into the run folder, on the first rank."""
        if self.is_world_process_zero():
            step, ranks = self.state.global_step, self.args.world_size
            staged = Path(self._get_output_dir(None)) / f"checkpoint-{step}"
            if len(list(staged.glob("rng_state*"))) < ranks:
                raise OSError("not all ranks' files can be seen: do all machines share the folder?")
            self.state.save_to_json(str(staged / "trainer_state.json"))  # now with the best step
            run.write_manifest(staged, {"step": step, "world_size": ranks, **self.facts})
            run.publish(staged, Path(self.args.output_dir))

    def _get_train_sampler(self, train_dataset: Windows | None = None) -> EpochSampler:
        """Make the sampler of the training windows, and have it told when an epoch begins."""
        args = self.args
        batch = args.per_device_train_batch_size
        effective = batch * args.gradient_accumulation_steps * args.world_size
        by_turns = self.data_collator.objective == "mixed"
        sampler = EpochSampler(self.train_dataset.packed, args.seed, batch, effective, by_turns)
        self.add_callback(sampler)
        return sampler

    def get_batch_samples(self, *arguments: Any) -> Any:
        """Give this rank's batches of a step, and how many targets all have; count all tokens."""
        batches, target_count = super().get_batch_samples(*arguments)
        tokens = sum(batch["input_ids"].numel() for batch in batches)
        total = self.accelerator.reduce(torch.tensor(tokens, device=self.args.device))
        self.state.num_input_tokens_seen += int(total)
        return batches, target_count

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log figures, in metrics.jsonl too; to a loss add this process's peak memory, and speed.

        Speed is all ranks' tokens a second since the last loss or measurement, if there was one.
        """
        now, tokens = time.monotonic(), self.state.num_input_tokens_seen
        if "loss" in logs:
            if self._rate_start:
                time_before, tokens_before = self._rate_start
                logs["tokens_per_second"] = (tokens - tokens_before) / (now - time_before)
            logs["memory_gib"] = peak_memory() / 2**30
            self._rate_start = now, tokens
        super().log(logs, start_time)
        self.write_row(logs)  # to which `super` has added the epoch

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Measure and log each source's held-out windows; return the metrics, {} at a signal.

        `eval_SOURCE_loss` is in nats per masked token, with the masks of epoch 0;
        `eval_SOURCE_bits_per_char` is for all tokens, left to right within a window.
        """
        self.model.eval()
        batch = self.args.per_device_eval_batch_size
        masked = replace(self.data_collator, objective="masked")
        clm = replace(self.data_collator, objective="clm")
        metrics = {}
        for source, windows in self.eval_dataset.items():
            nats, target_count = self._score(windows, masked, batch)
            metrics[f"eval_{source}_loss"] = nats / max(target_count, 1)
            longest = max(len(windows[row].input_ids) for row in range(len(windows)))  # tokens
            batch_limit = LOGITS // (longest * self.model.config.vocab_size)  # windows
            nats, _ = self._score(windows, clm, max(1, min(batch, batch_limit)))  # of all tokens
            bits_per_char = nats / math.log(2) / max(windows.characters, 1)
            metrics[f"eval_{source}_bits_per_char"] = bits_per_char
        if self.control.should_epoch_stop:  # a signal cut it off: `StopOnSignal`
            self.control.should_evaluate = False  # as `on_evaluate` does
            return {}
        self.log(metrics)
        self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        # So that the next throughput is that of steps alone.
        self._rate_start = time.monotonic(), self.state.num_input_tokens_seen
        return metrics

    @torch.no_grad()
    # Else each shape of a batch compiles the layers.
    @torch.compiler.set_stance("force_eager")  # type: ignore[untyped-decorator]
    def _score(self, windows: Windows, collator: MaskCollator, batch: int) -> tuple[float, float]:
        """Sum nats and targets over all ranks; windows repeated to fill up a batch do not count."""
        sums = []
        loader: Any = DataLoader(windows, batch, collate_fn=collator)  # type: ignore[arg-type]
        for inputs in self.accelerator.prepare_data_loader(loader):
            labels = inputs.pop("labels")
            targets = labels != IGNORE_INDEX  # (B, T)
            logits = self.model(**inputs).logits.float()
            nats = torch.zeros(labels.shape, device=labels.device)
            nats[targets] = F.cross_entropy(logits, labels[targets], reduction="none")
            del logits  # else they would be held during the next forward pass
            row_sums = torch.stack([nats.sum(1), targets.sum(1)], dim=1)  # (B, 2)
            sums.append(self.accelerator.gather_for_metrics(row_sums))  # drops repeated windows
            self.callback_handler.on_prediction_step(self.args, self.state, self.control)
            if self.control.should_epoch_stop:
                break
        nats_sum, target_count = torch.cat(sums).double().sum(0).tolist()
        return nats_sum, target_count


def masked_cross_entropy(
    outputs: Any, labels: torch.Tensor, num_items_in_batch: torch.Tensor
) -> torch.Tensor:
    """Sum the cross-entropy at the target positions and divide by their number in the step.

    Parameters
    ----------
    outputs : CausalLMOutput
        `.logits` is (N, V), a row for each target: for a target i, by `logits_to_keep`, only the
        hidden state at i - 1 is projected to the vocabulary. The logits are overwritten by their
        gradient, so that no second (N, V) table is held.
    labels : (B, T) int64
        Token ids at the N target positions, -100 elsewhere and in column 0.
    num_items_in_batch : scalar
        Targets over all accumulation steps and all ranks, as `Trainer` counts them. Afterwards
        `Trainer` multiplies the loss by the number of ranks, which DDP's average undoes.

    Returns
    -------
    Scalar whose sum over accumulation steps and ranks is the step's mean, in nats per target.
    """
    targets = labels[labels != IGNORE_INDEX]  # (N,) in the row-major order of the logits
    cross_entropy: Any = SummedCrossEntropy.apply
    nats: torch.Tensor = cross_entropy(outputs.logits, targets)
    return nats / num_items_in_batch.clamp(min=1)  # a step may have no targets


class SummedCrossEntropy(torch.autograd.Function):
    """Summed cross-entropy that overwrites the logits by their gradient, some rows at a time.

    PyTorch's own holds four tables of the logits' size, (N, V), two of them in float32.
    """

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Sum the nats of `targets` (N,); overwrite `logits` (N, V) by softmax minus one-hot."""
        rows = max(1, LOSS_LOGITS // logits.shape[1])
        nats = []
        for part, part_targets in zip(logits.split(rows), targets.split(rows), strict=True):
            log_p = F.log_softmax(part, -1, dtype=torch.float32)
            columns = part_targets[:, None]
            nats.append(-log_p.gather(1, columns).sum())
            gradient = log_p.exp_()  # the softmax, in the memory of `log_p`
            gradient.scatter_add_(1, columns, gradient.new_full(columns.shape, -1))  # minus one-hot
            part.copy_(gradient)
        ctx.save_for_backward(logits)
        return torch.stack(nats).sum()

    @staticmethod
    def backward(ctx: Any, grad_sum: torch.Tensor) -> tuple[torch.Tensor, None]:
        """Multiply the stored gradient (N, V) by `grad_sum`, a scalar; `targets` have none."""
        return ctx.saved_tensors[0].mul_(grad_sum), None
