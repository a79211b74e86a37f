"""Traditional and simplified characters, by OpenCC."""

import functools
from typing import Any

SAMPLE = 2000  # characters looked at
TRADITIONAL = 0.02  # share of characters that OpenCC changes; simplified texts stay under 0.003


@functools.cache
def _converter() -> Any:
    from opencc import OpenCC

    return OpenCC("t2s")


def is_traditional(text: str) -> bool:
    """Whether a text is written in traditional characters, by its first 2,000."""
    sample = text[:SAMPLE]
    simplified: str = _converter().convert(sample)
    changed = sum(a != b for a, b in zip(sample, simplified, strict=False))
    return changed > TRADITIONAL * len(sample)


def to_simplified(text: str) -> str:
    """Turn a traditional text into simplified characters; another is returned as it is."""
    return str(_converter().convert(text)) if is_traditional(text) else text
