"""What stands in place of a masked token: the mask token, another one, or the token itself."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

import numpy as np

from wuxia_core.errors import ConfigError
from wuxia_core.masking import keyed
from wuxia_core.masking.arrange import Bools, Ints, Kinds

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

UNTOUCHED, HIDDEN, REPLACED, LEFT = 0, 1, 2, 3


@dataclass(frozen=True, eq=False)
class Corruption:
    """Corrupts masked tokens one by one, keyed like the masks.

    BERT's is `shares=(0.8, 0.1, 0.1)` (Devlin et al. 2019, section 3.1).

    Parameters
    ----------
    mask_token_id : int
        The row that the adapter trains.
    ordinary_ids : (N,) int
        What a random token is drawn from: no special token is among them.
    shares : (float, float, float)
        Of the masked tokens, how many become the mask token, become a random token, stay.
    seed : int
        With a window's key and the epoch it decides the draw.

    Raises
    ------
    ConfigError
        Where the shares are no shares.
    """

    mask_token_id: int
    ordinary_ids: Ints
    shares: tuple[float, float, float] = (1.0, 0.0, 0.0)
    seed: int = 0

    def __post_init__(self) -> None:
        check_shares(self.shares)

    @classmethod
    def of(
        cls,
        tokenizer: "PreTrainedTokenizerBase",
        mask_token_id: int,
        shares: tuple[float, float, float] = (1.0, 0.0, 0.0),
        seed: int = 0,
    ) -> Self:
        """Draw random tokens from all of a tokenizer's that are neither special nor added."""
        added = set(tokenizer.added_tokens_decoder) | set(tokenizer.all_special_ids)
        ordinary = set(tokenizer.get_vocab().values()) - added - {mask_token_id}
        known = np.array(sorted(ordinary), np.int64)
        return cls(mask_token_id, known, shares, seed)

    def actions(self, masked: Bools, keys: Sequence[int] | Ints, epoch: int = 0) -> Kinds:
        """Say what becomes of each token, (B, T): untouched, hidden, replaced or left."""
        hidden, replaced, _ = self.shares
        if hidden == 1:
            return masked.astype(np.int8)
        draws = keyed.uniforms(self._states(keys, epoch), masked.shape[1])
        chosen = np.where(
            draws < hidden, HIDDEN, np.where(draws < hidden + replaced, REPLACED, LEFT)
        )
        return np.where(masked, chosen, UNTOUCHED).astype(np.int8)

    def apply(
        self, input_ids: Ints, actions: Kinds, keys: Sequence[int] | Ints, epoch: int = 0
    ) -> Ints:
        """Return the corrupted tokens, (B, T)."""
        corrupted = np.where(actions == HIDDEN, self.mask_token_id, input_ids)
        if (actions == REPLACED).any():
            draws = keyed.bits(keyed.branch(self._states(keys, epoch), 1), input_ids.shape[1])
            others = self.ordinary_ids[draws % np.uint64(len(self.ordinary_ids))]
            corrupted = np.where(actions == REPLACED, others, corrupted)
        return corrupted

    def _states(self, keys: Sequence[int] | Ints, epoch: int) -> keyed.Bits:
        return keyed.branch(keyed.row_states(self.seed, epoch, keys), 4)


def check_shares(shares: tuple[float, float, float]) -> None:
    """Refuse shares that are negative or do not add up to 1."""
    if not (min(shares) >= 0 and abs(sum(shares) - 1) <= 1e-6):  # NaN too
        raise ConfigError(
            f"masking.corruption {list(shares)}: must be three shares (mask token, random token, "
            "unchanged) of at least 0 that add up to 1"
        )
