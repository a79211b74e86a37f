"""What a reader is told, in Chinese (`zh.toml`) or English (`en.toml`); errors and logs are not."""

import functools
import os
import tomllib
from pathlib import Path
from typing import Any

from wuxia_core.errors import ConfigError

LANGUAGES = ("zh", "en")
LOCALE = ("LC_ALL", "LC_MESSAGES", "LANG")  # the first that is set counts


def language() -> str:
    """Give `zh` or `en`: what `WUXIA_LANG` says, else the locale's; English where it is another's.

    Raises `ConfigError` where `WUXIA_LANG` is something else.
    """
    if asked := os.environ.get("WUXIA_LANG"):
        if asked not in LANGUAGES:
            raise ConfigError(f"WUXIA_LANG={asked}: must be {' or '.join(LANGUAGES)}")
        return asked
    locale = next(filter(None, map(os.environ.get, LOCALE)), "")
    return "zh" if locale.lower().startswith("zh") else "en"


def messages(section: str) -> dict[str, Any]:
    """Read the messages of a section in the reader's language; figures stand in braces."""
    found: dict[str, Any] = _read(language())[section]
    return found


@functools.cache
def _read(name: str) -> dict[str, Any]:
    return tomllib.loads(Path(__file__).with_name(f"{name}.toml").read_text(encoding="utf-8"))
