"""transformers' Trainer with what it cannot know: epochs that travel, a loss over asked tokens."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from transformers import Trainer

from wuxia_core.masking import IGNORE_INDEX
from wuxia_core.mixing import Windows


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
        self._length = -(-len(packed) // effective_batch) * effective_batch

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


class SpanTrainer(Trainer):
    """Trainer whose samples know their epoch, and whose held-out loss is the mean over tokens."""

    def _get_train_sampler(self, train_dataset: Windows | None = None) -> EpochSampler:
        args = self.args
        batch = args.per_device_train_batch_size
        step = batch * args.gradient_accumulation_steps * args.world_size
        by_turns = self.data_collator.objective == "mixed"
        return EpochSampler(self.train_dataset.packed, args.seed, batch, step, by_turns)

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Measure and log the loss on each source's held-out windows, in nats per asked token."""
        self.model.eval()
        losses = {f"eval_{name}_loss": self._held_out(w) for name, w in self.eval_dataset.items()}
        self.log(losses)
        self.callback_handler.on_evaluate(self.args, self.state, self.control, losses)
        return losses

    @torch.no_grad()
    def _held_out(self, windows: Windows) -> float:
        """Average over all tokens of all ranks; rows that fill up the last batch do not count."""
        rows = []
        for batch in self.get_eval_dataloader(windows):
            labels = batch.pop("labels")
            owner, _ = (asked := labels != IGNORE_INDEX).nonzero(as_tuple=True)
            logits = self.model(**batch).logits.float()
            nats = F.cross_entropy(logits, labels[asked], reduction="none")
            sums = nats.new_zeros(len(labels)).index_add(0, owner, nats)  # (B,)
            rows.append(
                self.accelerator.gather_for_metrics(torch.stack([sums, asked.sum(1)], dim=1))
            )
        nats_and_tokens = torch.cat(rows).sum(0)
        return float(nats_and_tokens[0] / nats_and_tokens[1].clamp(min=1))
