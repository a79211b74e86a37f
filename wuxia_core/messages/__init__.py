"""The sentences for a reader, in Chinese (`zh.toml`) or English (`en.toml`).

Errors and logs are in English only, and not here.
"""

import functools
import os
import tomllib
from pathlib import Path
from typing import Any

from wuxia_core.errors import ConfigError

LANGUAGES = ("zh", "en")
LOCALE = ("LC_ALL", "LC_MESSAGES", "LANG")  # environment variables; the first not empty counts


def language() -> str:
    """Give the reader's language: `WUXIA_LANG`, else `zh` for a Chinese locale and `en` for others.

    Raises `ConfigError` if the environment variable `WUXIA_LANG` is not `zh`, `en`, empty or unset.
    """
    if choice := os.environ.get("WUXIA_LANG"):
        if choice not in LANGUAGES:
            raise ConfigError(f"WUXIA_LANG={choice}: must be {' or '.join(LANGUAGES)}")
        return choice
    locale = next(filter(None, map(os.environ.get, LOCALE)), "")
    return "zh" if locale.lower().startswith("zh") else "en"


def messages(section: str) -> dict[str, Any]:
    """Read the messages of a section in the reader's language: templates with places for figures.

    In English `messages("page")["more"]` is `"{more} more files."`. Raises `ConfigError` if the
    environment variable `WUXIA_LANG` is neither `zh` nor `en`, nor empty or unset.
    """
    templates: dict[str, Any] = _read(language())[section]
    return templates


@functools.cache
def _read(name: str) -> dict[str, Any]:
    """Read all sections of the language `name` from its file; each file is read only once."""
    return tomllib.loads(Path(__file__).with_name(f"{name}.toml").read_text(encoding="utf-8"))
