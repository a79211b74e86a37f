"""The loss: cross-entropy at the asked positions only, averaged over a whole optimizer step."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

from wuxia_core.masking import IGNORE_INDEX


def asked_cross_entropy(
    outputs: Any, labels: "torch.Tensor", num_items_in_batch: "torch.Tensor"
) -> "torch.Tensor":
    """Sum the cross-entropy at the asked positions and divide by their number in the step.

    Parameters
    ----------
    outputs : CausalLMOutput
        `.logits` is (N, V): one row for each asked token, because the collator's `logits_to_keep`
        keeps position i - 1 for token i before the vocabulary projection.
    labels : (B, T) int64
        Token ids at the asked positions, -100 elsewhere; N of them are asked, none in column 0.
    num_items_in_batch : scalar
        Asked tokens over all accumulation steps and all ranks. `Trainer` counts them, and
        multiplies the loss by the number of ranks, since DDP averages gradients.

    Returns
    -------
    Scalar, nats per asked token once summed over accumulation steps and ranks.
    """
    import torch.nn.functional as F

    targets = labels[labels != IGNORE_INDEX]  # (N,) in the row-major order of the logits
    total = F.cross_entropy(outputs.logits.float(), targets, reduction="sum")
    return total / num_items_in_batch.clamp(min=1)  # a step may ask for nothing
