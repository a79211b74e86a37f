"""transformers' Trainer with what it cannot know: epochs that travel, a loss over asked tokens."""

import math
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader
from transformers import TrainerCallback

from wuxia_core.masking import IGNORE_INDEX, MaskCollator
from wuxia_core.mixing import Windows
from wuxia_core.train.callbacks import peak_memory
from wuxia_core.train.saving import AtomicTrainer

LOGITS = 2**28  # of a batch of held-out text of which every token is asked; 1 GiB in float32


class EpochSampler(torch.utils.data.Sampler[tuple[int, int]]):
    """Yield `(epoch, row)` in an order that hangs on (seed, epoch) alone.

    The last step of an epoch is filled up from the epoch's first rows, so that every step has the
    effective batch, however many processes share it. `packed` windows, which need an attention
    mask, share a device's batch with each other, so that the others do without. With `by_turns`
    rows of even and odd number take turns, so that half of a batch is of each kind that `mixed`
    makes of them.
    """

    def __init__(
        self,
        packed: npt.NDArray[np.bool_],
        seed: int,
        batch: int,
        effective_batch: int,
        by_turns: bool = False,
    ) -> None:
        self._packed, self._seed, self._batch, self._epoch = torch.tensor(packed), seed, batch, 0
        self._by_turns = by_turns
        self.steps = -(-len(packed) // effective_batch)  # an epoch
        self._length = self.steps * effective_batch

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the next iteration; accelerate calls this."""
        self._epoch = epoch

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[tuple[int, int]]:
        generator = torch.Generator().manual_seed(self._seed * 1_000_003 + self._epoch)
        size = len(self._packed)
        order = torch.randperm(size, generator=generator)
        order = order[torch.argsort(self._packed[order].int(), stable=True)]
        if self._by_turns:
            places = torch.empty(size, dtype=torch.int64)
            places[order % 2 == 0] = torch.arange(0, size, 2)
            places[order % 2 == 1] = torch.arange(1, size, 2)
            order = order[places.argsort()]
        batches = order.repeat(-(-self._length // size))[: self._length].view(-1, self._batch)
        for row in batches[torch.randperm(len(batches), generator=generator)].flatten().tolist():
            yield self._epoch, row


class SetEpoch(TrainerCallback):
    """Tell the sampler its epoch; accelerate does not reach it in an epoch that is resumed."""

    def __init__(self, sampler: EpochSampler) -> None:
        self._sampler = sampler

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Reckon it from the steps that are done."""
        self._sampler.set_epoch(state.global_step // self._sampler.steps)


class SpanTrainer(AtomicTrainer):
    """Trainer whose samples know their epoch, and which measures held-out text exactly."""

    _logged: tuple[float, int] | None = None

    def _get_train_sampler(self, train_dataset: Windows | None = None) -> EpochSampler:
        args = self.args
        batch = args.per_device_train_batch_size
        step = batch * args.gradient_accumulation_steps * args.world_size
        by_turns = self.data_collator.objective == "mixed"
        sampler = EpochSampler(self.train_dataset.packed, args.seed, batch, step, by_turns)
        self.add_callback(SetEpoch(sampler))
        return sampler

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log with the throughput since the last row, and the peak of memory."""
        now, seen = time.monotonic(), self.state.num_input_tokens_seen
        if "loss" in logs:
            if self._logged:
                logs["tokens_per_second"] = (seen - self._logged[1]) / (now - self._logged[0])
            logs["memory_gib"] = peak_memory() / 2**30
            self._logged = now, seen
        super().log(logs, start_time)

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Measure and log each source's held-out windows.

        In nats per masked token, the masks being those of epoch 0, and in bits per character, left
        to right within a window.
        """
        self.model.eval()
        batch = self.args.per_device_eval_batch_size
        masked = self.data_collator.for_objective("masked")
        plain = self.data_collator.for_objective("clm")
        metrics = {}
        for source, windows in self.eval_dataset.items():
            nats, tokens = self._nats(windows, masked, batch)
            metrics[f"eval_{source}_loss"] = nats / max(tokens, 1)
            longest = max(len(windows[row].input_ids) for row in range(len(windows)))
            fits = LOGITS // (longest * self.model.config.vocab_size)
            bits = self._nats(windows, plain, max(1, min(batch, fits)))[0] / math.log(2)
            metrics[f"eval_{source}_bits_per_char"] = bits / max(windows.characters, 1)
        self.log(metrics)
        self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        self._logged = time.monotonic(), self.state.num_input_tokens_seen
        return metrics

    @torch.no_grad()
    def _nats(self, windows: Windows, collator: MaskCollator, batch: int) -> tuple[float, float]:
        """Sum over the tokens asked of all ranks; rows that fill up the last batch do not count."""
        rows = []
        loader: Any = DataLoader(windows, batch_size=batch, collate_fn=collator)  # type: ignore[arg-type]
        for inputs in self.accelerator.prepare_data_loader(loader):
            labels = inputs.pop("labels")
            owner, _ = (asked := labels != IGNORE_INDEX).nonzero(as_tuple=True)
            logits = self.model(**inputs).logits.float()
            nats = F.cross_entropy(logits, labels[asked], reduction="none")
            sums = nats.new_zeros(len(labels)).index_add(0, owner, nats)  # (B,)
            rows.append(
                self.accelerator.gather_for_metrics(torch.stack([sums, asked.sum(1)], dim=1))
            )
        nats_and_tokens = torch.cat(rows).double().sum(0)
        return float(nats_and_tokens[0]), float(nats_and_tokens[1])
