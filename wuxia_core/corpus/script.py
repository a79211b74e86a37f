"""Traditional and simplified characters, by OpenCC."""

import functools
from typing import Any

from wuxia_core.corpus.ngrams import codes

SAMPLE = 2000  # characters looked at
TRADITIONAL = 0.02  # share of characters that OpenCC changes; simplified texts stay under 0.003


@functools.cache
def _converter() -> Any:
    from opencc import OpenCC

    return OpenCC("t2s")


def is_traditional(text: str) -> bool:
    """Whether a text is written in traditional characters, by its first 2,000."""
    sample = text[:SAMPLE]
    before, after = codes(sample), codes(_converter().convert(sample))
    length = min(len(before), len(after))
    return bool((before[:length] != after[:length]).sum() > TRADITIONAL * length)


def to_simplified(text: str) -> str:
    """Turn a traditional text into simplified characters; another is returned as it is."""
    return str(_converter().convert(text)) if is_traditional(text) else text
