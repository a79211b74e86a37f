"""From windows to model inputs: hide what the masker drew, and say which tokens are asked for."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import numpy.typing as npt

from wuxia_core.masking.arrange import KEPT, Bools, Ints, Kinds
from wuxia_core.masking.corruption import Corruption
from wuxia_core.masking.spans import SpanMasker

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

    from wuxia_core.config import Config
    from wuxia_core.mixing import Window

IGNORE_INDEX = -100


def padded(rows: Sequence[npt.NDArray[Any]], fill: int) -> Ints:
    """Stack rows of unequal lengths to (B, T) int64, filled up at the end."""
    stacked = np.full((len(rows), max(map(len, rows))), fill, np.int64)
    for place, row in zip(stacked, rows, strict=True):
        place[: len(row)] = row
    return stacked


def model_inputs(
    input_ids: Ints, labels: Ints, position_ids: Ints | None = None
) -> "dict[str, torch.Tensor]":
    """Add the positions whose logits are needed: (B, T) `input_ids`, `labels`, `logits_to_keep`.

    `labels` is -100 where nothing is asked. The logit that scores token i stands at i - 1, so
    `logits_to_keep` (bool) is the asked positions moved left by one:
    labels `[-100, -100, 7, 8]` keep `[0, 1, 1, 0]`. Position 0 cannot be asked. No attention mask
    is needed: padding stands behind the text, where causal attention never looks. `position_ids`
    that restart within a row keep its pieces apart, at the price of a (B, 1, T, T) mask; without
    them attention takes the fast path.
    """
    import torch

    keep = np.zeros(labels.shape, np.bool_)
    keep[:, :-1] = labels[:, 1:] != IGNORE_INDEX
    inputs = {"input_ids": input_ids, "labels": labels, "logits_to_keep": keep}
    if position_ids is not None:
        inputs["position_ids"] = position_ids
    return {name: torch.from_numpy(values) for name, values in inputs.items()}


def masked_this_epoch(row: int, epoch: int) -> bool:
    """Say whether `mixed` hides tokens of a window in this epoch; in the next one it does not."""
    return (row + epoch) % 2 == 0


@dataclass(frozen=True)
class MaskCollator:
    """Make a batch of windows into model inputs, for any objective.

    `masked` hides tokens and asks for them; `clm` hides nothing and asks for every token; `mixed`
    does the one or the other by turns, window by window and epoch by epoch, after MEAP-SFT (arXiv
    2502.07490); the sampler sees to it that a batch has as many of both. Tokens in `special_ids`
    are never hidden or asked for. With `span_unit` "word" spans cover whole words.
    """

    masker: SpanMasker
    corruption: Corruption
    pad_token_id: int
    special_ids: frozenset[int]
    objective: str = "masked"
    span_unit: str = "token"

    @classmethod
    def from_config(
        cls,
        config: "Config",
        tokenizer: "PreTrainedTokenizerBase",
        mask_token_id: int,
        objective: str,
    ) -> Self:
        """Build the collator of a run; `mask_token_id` is the row that its adapter trains."""
        masking, seed = config.masking, config.training.seed
        return cls(
            SpanMasker(masking.mask_ratio, masking.span_ratio, masking.span_length, seed),
            Corruption.of(tokenizer, mask_token_id, masking.corruption, seed),
            pad_token_id=int(tokenizer.pad_token_id or 0),
            special_ids=frozenset(tokenizer.all_special_ids),
            objective=objective,
            span_unit=masking.span_unit,
        )

    def for_objective(self, objective: str) -> Self:
        """Give the same collator for another objective."""
        return replace(self, objective=objective)

    def __call__(self, windows: Sequence["Window"]) -> "dict[str, torch.Tensor]":
        """Make the model's inputs, as `model_inputs` describes them, from windows of one epoch."""
        input_ids = padded([window.input_ids for window in windows], self.pad_token_id)
        hides = np.array([self._hides(window) for window in windows])[:, None]
        masked = (self.kinds(windows) > KEPT) & hides
        keys, epoch = [window.key for window in windows], windows[0].epoch
        actions = self.corruption.actions(masked, keys, epoch)
        labels = np.where(masked | (self._maskable(windows) & ~hides), input_ids, IGNORE_INDEX)
        corrupted = self.corruption.apply(input_ids, actions, keys, epoch)
        positions = [window.position_ids for window in windows]
        packed = any((row[1:] == 0).any() for row in positions)
        return model_inputs(corrupted, labels, padded(positions, 0) if packed else None)

    def kinds(self, windows: Sequence["Window"]) -> Kinds:
        """Draw the masks of windows of one epoch, (B, T), as `SpanMasker.kinds` gives them."""
        words = None
        if self.span_unit == "word":
            words = padded([window.word_ids for window in windows], 0).astype(np.int32)
        keys = [window.key for window in windows]
        return self.masker.kinds(self._maskable(windows), keys, windows[0].epoch, words)

    def _maskable(self, windows: Sequence["Window"]) -> Bools:
        """Mark what may be masked, (B, T): nothing predicts the first token of a piece."""
        special = list(self.special_ids)
        rows = [
            ~np.isin(window.input_ids, special) & (window.position_ids > 0) for window in windows
        ]
        return padded(rows, 0).astype(np.bool_)

    def _hides(self, window: "Window") -> bool:
        if self.objective == "mixed":
            return masked_this_epoch(window.row, window.epoch)
        return self.objective == "masked"
