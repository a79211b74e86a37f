"""What a reader is told: both languages say the same, and the right one is chosen."""

import string
import tomllib
from pathlib import Path

import pytest

from wuxia_core import messages as package
from wuxia_core.errors import ConfigError
from wuxia_core.messages import LANGUAGES, language, messages

FOLDER = Path(package.__file__).parent


def shape(value: object) -> object:
    """Replace each message by the places for values in it; keys and order stay."""
    if isinstance(value, dict):
        # Patterns are of English notes, and stand in zh.toml alone.
        return {name: shape(part) for name, part in value.items() if name != "patterns"}
    if isinstance(value, list):
        return [part[:2] for part in value]  # metric, source, and what is said
    return sorted(name for _, name, _, _ in string.Formatter().parse(value) if name)


def test_both_languages_have_the_same_keys_and_places():
    zh, en = (shape(tomllib.loads((FOLDER / f"{n}.toml").read_text("utf-8"))) for n in LANGUAGES)
    assert zh == en
    assert list(zh) == list(en)


@pytest.mark.parametrize(
    ("asked", "locale", "chosen"),
    [("zh", "en_GB.UTF-8", "zh"), ("", "zh_CN.UTF-8", "zh"), ("", "de_DE", "en"), ("", "", "en")],
)
def test_language_is_asked_for_or_the_locales(monkeypatch, asked, locale, chosen):
    for name in ("LC_ALL", "LC_MESSAGES"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WUXIA_LANG", asked)
    monkeypatch.setenv("LANG", locale)
    assert language() == chosen


def test_unknown_language_is_refused(monkeypatch):
    monkeypatch.setenv("WUXIA_LANG", "fr")
    with pytest.raises(ConfigError, match=r"WUXIA_LANG=fr"):
        messages("wuxia")
