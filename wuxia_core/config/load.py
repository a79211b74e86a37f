"""Read a configuration from YAML: every complaint names the key, its file and its line."""

import difflib
import logging
import os
from pathlib import Path
from typing import Any, cast

import yaml
from pydantic import BaseModel, ValidationError

from wuxia_core.config.schema import Config
from wuxia_core.errors import ConfigError

log = logging.getLogger(__name__)

PROJECT = Path(__file__).resolve().parents[2]
TINY_BASE = PROJECT / "data" / "tiny_base"

# Keys of older files that are accepted and replaced: what happens instead.
RETIRED = {
    "training.eval_strategy": "held-out loss is measured every training.eval_steps steps",
    "training.metric_for_best_model": "that of the fewest held-out bits per character is kept",
}


def locate(path: str) -> Path:
    """Find a path from the working directory, else from the project's folder.

    `locate("data/sample")` is found from `notebooks/` too. A path in neither place is returned
    as it is.
    """
    given = Path(path).expanduser()
    return PROJECT / given if not given.exists() and (PROJECT / given).exists() else given


def load_config(path: str | os.PathLike[str], overrides: list[str] | None = None) -> Config:
    """Read a YAML file, apply `section.key=value` overrides and check everything.

    Raises
    ------
    ConfigError
        Naming the key, its file and line, and the nearest valid key.
    """
    tree, places = _read_yaml(Path(path))
    for override in overrides or []:
        _apply(override, tree, places)
    _drop_retired(tree, places)
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        first = error.errors()[0]
        raise ConfigError(_explain(first, places, str(path))) from None


def _read_yaml(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """Parse the file; the second value maps `section.key` to `file:line`."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
        _refuse_aliases(text, path)
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        places = _places(root, path) if root is not None else {}
        tree = yaml.safe_load(text) or {}
    except OSError as error:
        raise ConfigError(f"--config {path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 at byte {error.start}; save it as UTF-8") from None
    except (yaml.YAMLError, ValueError, TypeError) as error:
        raise ConfigError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    for section, values in tree.items():
        if values is None:
            tree[section] = {}
    return tree, places


def _refuse_aliases(text: str, path: Path) -> None:
    """Refuse aliases: a few lines of them can stand for more values than there is memory for."""
    for token in yaml.scan(text, Loader=yaml.SafeLoader):
        if isinstance(token, yaml.AliasToken):
            line = token.start_mark.line + 1
            raise ConfigError(f"{path}:{line}: *{token.value} is an alias; write out its value")


def _places(root: yaml.Node, path: Path) -> dict[str, str]:
    places: dict[str, str] = {}
    if not isinstance(root, yaml.MappingNode):
        raise ConfigError(f"{path}: must hold sections such as `training:`")
    for section, values in root.value:
        _note(places, section.value, section, path)
        if isinstance(values, yaml.MappingNode):
            for key, _ in values.value:
                _note(places, f"{section.value}.{key.value}", key, path)
    return places


def _note(places: dict[str, str], name: str, key: yaml.Node, path: Path) -> None:
    place = f"{path}:{key.start_mark.line + 1}"
    if name in places:
        raise ConfigError(f"{place}: {name} is set twice (first at {places[name]})")
    places[name] = place


def _apply(override: str, tree: dict[str, Any], places: dict[str, str]) -> None:
    name, equals, value = override.partition("=")
    section, dot, key = name.partition(".")
    if not (equals and dot and key):
        raise ConfigError(f"--set {override}: must read section.key=value")
    try:
        parsed = yaml.safe_load(value)
    except (yaml.YAMLError, ValueError):
        parsed = value  # a path, say, that YAML would read as something else
    values = tree.setdefault(section, {})
    if not isinstance(values, dict):
        raise ConfigError(f"{places[section]}: {section} must hold keys, not {values!r}")
    values[key] = parsed
    places[name] = f"--set {override}"


def _drop_retired(tree: dict[str, Any], places: dict[str, str]) -> None:
    for name, instead in RETIRED.items():
        section, key = name.split(".")
        values = tree.get(section)
        if isinstance(values, dict) and key in values:
            del values[key]
            log.warning("%s: %s has no effect: %s", places.get(name, "--config"), name, instead)


def _explain(error: Any, places: dict[str, str], path: str) -> str:
    parts = [str(part) for part in error["loc"][:2]]
    name = ".".join(parts)
    place = places.get(name, path)
    if error["type"] == "extra_forbidden":
        return f"{place}: unknown key {name}{_nearest(name)}"
    if error["type"] == "model_type":
        return f"{place}: {name} must be a section with keys (got {_short(error['input'])})"
    message = error["msg"].removeprefix("Value error, ")
    return f"{place}: {name}: {message} (got {_short(error['input'])})"


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _nearest(name: str) -> str:
    """Suggest a valid key of nearly that name, in whichever section it belongs to."""
    section, _, key = name.partition(".")
    sections = {name: name for name in Config.model_fields}
    keys = {
        key: f"{section}.{key}"
        for section, field in Config.model_fields.items()
        for key in cast(type[BaseModel], field.annotation).model_fields
    }
    names = keys if key else sections
    close = difflib.get_close_matches(key or section, names, n=1)
    return f"; did you mean {names[close[0]]}?" if close else ""
