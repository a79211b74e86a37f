"""What torchrun starts, one process a device: train the adapter on a mixture that is already there.

    python launch_ddp.py                                        # does all of it, from novels on
    torchrun --nproc-per-node 2 -m wuxia_core.train RUN_FOLDER  # only this stage

The loop is transformers' `Trainer`. This file adds what it cannot know: an epoch that travels with
each window, the loss over asked tokens only, and a stop when a gradient is not a number.
"""

import json
import os
import platform
import signal
import sys
import time
import warnings
from collections.abc import Iterator
from importlib.metadata import version
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.errors import get_error_handler
from transformers import (
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from wuxia_core.config import Config, load_config
from wuxia_core.errors import MachineError, NonFiniteError, WuxiaError
from wuxia_core.masking import MaskCollator
from wuxia_core.mixing import Windows, held_out_windows, mixture_folder, open_mixture, train_windows
from wuxia_core.model import add_adapter, load_base, load_tokenizer, mask_token_id, weights_dtype
from wuxia_core.objective import asked_cross_entropy
from wuxia_core.preflight import effective_batch

PACKAGES = ("torch", "transformers", "peft", "accelerate", "numpy")


class EpochSampler(torch.utils.data.Sampler[tuple[int, int]]):
    """Yield `(epoch, row)` in an order that hangs on (seed, epoch) alone.

    The last step of an epoch is filled up from the epoch's first rows, so that every step has the
    effective batch, however many processes share it.
    """

    def __init__(self, size: int, seed: int, effective_batch: int) -> None:
        self._size, self._seed, self._epoch = size, seed, 0
        self._length = -(-size // effective_batch) * effective_batch

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the next iteration; accelerate calls this."""
        self._epoch = epoch

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[tuple[int, int]]:
        generator = torch.Generator().manual_seed(self._seed * 1_000_003 + self._epoch)
        order = torch.randperm(self._size, generator=generator).tolist()
        for row in islice(cycle(order), self._length):
            yield self._epoch, row


class SpanTrainer(Trainer):
    """Trainer whose samples know their epoch."""

    def _get_train_sampler(self, train_dataset: Windows | None = None) -> EpochSampler:
        args = self.args
        each = args.per_device_train_batch_size * args.gradient_accumulation_steps
        return EpochSampler(len(self.train_dataset), args.seed, each * args.world_size)


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
        self._last = time.monotonic(), 0

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **_: Any) -> None:
        """Write the row on the first rank."""
        if not state.is_world_process_zero:
            return
        row = {"step": state.global_step, "time": time.time(), **logs}
        if "loss" in logs:
            now, seen = time.monotonic(), state.num_input_tokens_seen
            row["tokens_per_second"] = (seen - self._last[1]) / (now - self._last[0])
            self._last = now, seen
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


class StopOnNonFinite(TrainerCallback):
    """Stop before an update that would break the adapter; every rank sees the same gradient."""

    def on_pre_optimizer_step(
        self, args: Any, state: Any, control: Any, model: Any, **_: Any
    ) -> None:
        """Look at the gradients, after clipping and after DDP has averaged them."""
        if args.fp16:
            return  # the loss scaler meets infinities on purpose and skips those steps
        norms = [p.grad.norm() for p in model.parameters() if p.grad is not None]
        if not torch.stack(norms).isfinite().all():
            raise NonFiniteError(
                f"the gradient at step {state.global_step + 1} is not a finite number; nothing was "
                "saved from it. Lower training.learning_rate, or look at the text of that step."
            )


def arguments(config: Config, folder: Path) -> TrainingArguments:
    """Translate the config for `Trainer`."""
    ours = config.training.model_dump(exclude={"output_dir", "objective"})
    return TrainingArguments(
        output_dir=str(folder),
        **ours,
        eval_strategy="steps",
        eval_on_start=True,
        lr_scheduler_type="cosine",
        gradient_checkpointing_kwargs={"use_reentrant": False},
        average_tokens_across_devices=True,
        include_num_input_tokens_seen="all",
        logging_nan_inf_filter=False,
        prediction_loss_only=True,
        remove_unused_columns=False,
        report_to=["tensorboard"],
        use_cpu=not torch.cuda.is_available(),
        ddp_backend="nccl" if torch.cuda.is_available() else "gloo",
        ddp_find_unused_parameters=False,
    )


def train(folder: Path) -> None:
    """Train the adapter of a run folder, whose `config.yaml` says everything, and save it there."""
    config = load_config(folder / "config.yaml")
    os.environ["TENSORBOARD_LOGGING_DIR"] = str(folder / "logs")
    args = arguments(config, folder)
    set_seed(config.training.seed)
    name = config.model.model_name_or_path
    tokenizer = load_tokenizer(name)
    base = load_base(name, weights_dtype(config))
    mask_id = mask_token_id(tokenizer, base.config.vocab_size)
    mixture = open_mixture(mixture_folder(config.data.processed_data_file))
    held_out = held_out_windows(mixture, config.evaluation.max_documents, config.training.seed)
    if not held_out:
        args.eval_strategy, args.eval_on_start = "no", False
    trainer = SpanTrainer(
        model=add_adapter(base, config.model, mask_id),
        args=args,
        data_collator=MaskCollator.from_config(
            config, tokenizer, mask_id, config.training.objective
        ),
        train_dataset=train_windows(mixture),
        eval_dataset=held_out or None,
        compute_loss_func=asked_cross_entropy,
        callbacks=[MetricsFile(folder), StopOnNonFinite(), Progress()],
    )
    trainer.remove_callback(ProgressCallback)
    if trainer.is_world_process_zero():
        write_environment(config, folder, args.world_size)
    trainer.train()
    if trainer.is_world_process_zero():
        trainer.accelerator.unwrap_model(trainer.model).save_pretrained(str(folder))
        (folder / "README.md").unlink(missing_ok=True)  # PEFT's empty model card


def write_environment(config: Config, folder: Path, world_size: int) -> None:
    """Write what the run ran on to `environment.json`."""
    on_gpu = torch.cuda.is_available()
    facts = {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name() if on_gpu else platform.machine(),
        "cpu_count": os.cpu_count(),
        "processes": world_size,
        "effective_batch": effective_batch(config, world_size),
        **{package: version(package) for package in PACKAGES},
    }
    (folder / "environment.json").write_text(json.dumps(facts, indent=1), encoding="utf-8")


def main() -> None:
    """Train; a failure that is not a bug ends with its message and exit status."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # the launcher says what stopped the run
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    try:
        train(Path(sys.argv[1]))
    except torch.cuda.OutOfMemoryError as error:
        _fail(
            MachineError(
                f"out of GPU memory ({str(error).splitlines()[0]}). Halve "
                "training.per_device_train_batch_size and double gradient_accumulation_steps, set "
                "gradient_checkpointing: true, or take a smaller model."
            )
        )
    except WuxiaError as error:
        _fail(error)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _fail(error: WuxiaError) -> None:
    """Hand the message to the launcher and leave with the error's status."""
    get_error_handler().record_exception(error)
    sys.exit(error.exit_status)


if __name__ == "__main__":
    main()
