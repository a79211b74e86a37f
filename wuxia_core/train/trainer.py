"""transformers' Trainer with what it cannot know: epochs that travel, a loss over asked tokens."""

from collections.abc import Iterator
from itertools import cycle, islice
from typing import Any

import torch
import torch.nn.functional as F
from transformers import Trainer

from wuxia_core.masking import IGNORE_INDEX
from wuxia_core.mixing import Windows


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
    """Trainer whose samples know their epoch, and whose held-out loss is the mean over tokens."""

    def _get_train_sampler(self, train_dataset: Windows | None = None) -> EpochSampler:
        args = self.args
        each = args.per_device_train_batch_size * args.gradient_accumulation_steps
        return EpochSampler(len(self.train_dataset), args.seed, each * args.world_size)

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
