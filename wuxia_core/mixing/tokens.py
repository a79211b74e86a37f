"""From text to token ids, with the tokens that begin a word."""

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from wuxia_core.mixing.store import Flags, Tokens
from wuxia_core.model import document_start_id

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BATCH = 64  # texts a call of the tokenizer


def tokenize(
    texts: list[str], tokenizer: "PreTrainedTokenizerBase"
) -> tuple[list[Tokens], list[Flags]]:
    """Encode texts, each behind `<|endoftext|>`, and flag the tokens that begin a word.

    A novel that happens to contain the letters of a special token does not make one.
    """
    start_id = document_start_id(tokenizer)
    tokens: list[Tokens] = []
    word_starts: list[Flags] = []
    for start in tqdm(
        range(0, len(texts), BATCH), desc="tokenizing", unit="batch", disable=len(texts) <= BATCH
    ):
        batch = texts[start : start + BATCH]
        encoded = tokenizer(
            batch, add_special_tokens=False, split_special_tokens=True, return_offsets_mapping=True
        )
        for text, ids, offsets in zip(
            batch, encoded.input_ids, encoded.offset_mapping, strict=True
        ):
            tokens.append(np.array([start_id, *ids], np.int32))
            word_starts.append(_word_starts(text, np.array(offsets, np.int64).reshape(-1, 2)))
    return tokens, word_starts


def _word_starts(text: str, offsets: npt.NDArray[np.int64]) -> Flags:
    """Flag tokens that begin a word, from their (T, 2) character offsets; (T + 1,) with the first.

    A token that holds the end of one word and the start of the next counts as a start.
    """
    import rjieba

    edges = np.cumsum([0, *map(len, rjieba.cut(text))])
    is_edge = np.zeros(len(text) + 1, np.int64)
    is_edge[edges] = 1
    before = np.concatenate([[0], np.cumsum(is_edge)])  # edges before each character
    inside = before[offsets[:, 1]] - before[offsets[:, 0]] > 0
    new_character = np.diff(offsets[:, 0], prepend=-1) > 0  # not a later byte of the same one
    return np.concatenate([[True], inside & new_character])
