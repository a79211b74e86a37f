"""One typed configuration: read from YAML, checked strictly, written into the run folder.

`load_config("configs/sample.yaml", ["training.seed=7"]).training.seed` is 7. An unknown key or a
wrong type is a `ConfigError` that names the key, its file and line, and the nearest valid key.
"""

import difflib
import logging
import os
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from wuxia_core.errors import ConfigError

log = logging.getLogger(__name__)

PROJECT = Path(__file__).resolve().parents[1]
TINY_BASE = PROJECT / "data" / "tiny_base"

# Keys of older files that are accepted and replaced: what happens instead.
RETIRED = {
    "training.eval_strategy": "held-out loss is measured every training.eval_steps steps",
    "training.metric_for_best_model": "the adapter of the last step is kept",
}


def _number(value: object) -> object:
    """Read `5e-5`, which is a string to YAML, as the number it means."""
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value


Float = Annotated[float, BeforeValidator(_number)]
Count = Annotated[int, Field(ge=1)]


class _Section(BaseModel):
    model_config = ConfigDict(
        extra="forbid", strict=True, use_attribute_docstrings=True, validate_assignment=True
    )


class ModelConfig(_Section):
    """The base model and the adapter."""

    model_name_or_path: str = "Qwen/Qwen3-8B"
    """Folder or hub name of the base model."""
    use_lora: Literal[True] = True
    """Only adapters are trained."""
    lora_r: Count = 16
    """Rank."""
    lora_alpha: Count = 32
    """Scale; the update is multiplied by lora_alpha / lora_r."""
    lora_dropout: Float = Field(0.05, ge=0, lt=1)
    """Share of adapter inputs dropped in training."""
    lora_target_modules: Annotated[list[str], Field(min_length=1)] = [
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
    ]  # fmt: skip
    """Names of the linear layers that get an adapter."""


class DataConfig(_Section):
    """The texts, and how they are cut."""

    data_dir: str = "./data"
    """Folder of novels, read recursively."""
    general_file: str | None = None
    """General text: a folder, a text file with a paragraph a line, or JSONL with a `text` field."""
    general_ratio: Float = Field(0.1, ge=0, lt=1)
    """Share of general text in the training tokens."""
    processed_data_file: str = "./data/mixed/wuxia"
    """The mixture folder; a path in .jsonl means the folder of the same stem beside it."""
    max_length: Annotated[int, Field(ge=8)] = 1024
    """Window, tokens."""
    min_length: Annotated[int, Field(ge=0)] = 0
    """Documents (chapters, general texts) shorter than this are left out, tokens."""
    stride: Count | None = None
    """Step from one window to the next, tokens; null: max_length, so that none overlap."""
    val_ratio: Float = Field(0.1, ge=0, lt=1)
    """Share of text held out, by whole books; at least one book unless it is 0."""

    @model_validator(mode="after")
    def _no_gaps(self) -> Self:
        if self.stride is not None and self.stride > self.max_length:
            raise ValueError(
                f"stride {self.stride} is longer than max_length {self.max_length}: "
                "text between windows would be lost; leave stride out for windows without overlap"
            )
        return self


class MaskingConfig(_Section):
    """What is hidden from the model."""

    mask_ratio: Float = Field(0.15, gt=0, lt=1)
    """Share of maskable tokens that is masked."""
    span_ratio: Float = Field(0.5, ge=0, le=1)
    """Share of the masked tokens that lies in spans; the others are single."""
    span_length: tuple[Count, Count] = (3, 5)
    """Shortest and longest span, tokens."""
    span_unit: Literal["token", "word"] = "token"
    """Whether spans start and end anywhere, or on word boundaries."""

    @field_validator("span_length", mode="before")
    @classmethod
    def _pair(cls, value: object) -> object:
        return tuple(value) if isinstance(value, list) else value

    @model_validator(mode="after")
    def _arrangeable(self) -> Self:
        from wuxia_core.masking import SpanMasker

        SpanMasker(self.mask_ratio, self.span_ratio, self.span_length)
        return self


class TrainingConfig(_Section):
    """The run. Counts without a unit are optimizer steps."""

    output_dir: str = "./output/wuxia_lora"
    """The run folder."""
    objective: Literal["masked", "mixed", "clm"] = "masked"
    """Masked reconstruction; every second window plain next-token; or only that."""
    num_train_epochs: Float = Field(3.0, gt=0)
    """Passes over the mixture."""
    max_steps: Annotated[int, Field(ge=-1)] = -1
    """Stop after so many steps; -1: num_train_epochs decides."""
    per_device_train_batch_size: Count = 4
    """Windows a device and forward pass."""
    per_device_eval_batch_size: Count = 4
    """Windows a device and forward pass when nothing is trained."""
    gradient_accumulation_steps: Count = 8
    """Forward passes a step."""
    learning_rate: Float = Field(5e-5, gt=0)
    """Peak, reached after the warmup; then a cosine to 0."""
    weight_decay: Float = Field(0.01, ge=0)
    """AdamW's decoupled decay."""
    warmup_steps: Annotated[int, Field(ge=0)] = 100
    """Steps over which the learning rate rises."""
    logging_steps: Count = 10
    """Steps between two rows of metrics.jsonl."""
    save_steps: Count = 500
    """Steps between two checkpoints."""
    eval_steps: Count = 500
    """Steps between two measurements of the held-out loss."""
    save_total_limit: Count = 3
    """Checkpoints kept."""
    fp16: bool = False
    """16-bit floats with loss scaling (GPU)."""
    bf16: bool = False
    """16-bit brain floats."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, a third more time."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 42
    """Everything random hangs on it."""

    @model_validator(mode="after")
    def _one_precision(self) -> Self:
        if self.fp16 and self.bf16:
            raise ValueError("fp16 and bf16 are both true: choose one (bf16 on RTX 30 and later)")
        return self


class EvaluationConfig(_Section):
    """The scorecard."""

    max_documents: Count = 40
    """Held-out documents a source that are scored, drawn by key."""


class Config(_Section):
    """Everything a run depends on."""

    model: ModelConfig = Field(default_factory=ModelConfig)
    data: DataConfig = Field(default_factory=DataConfig)
    masking: MaskingConfig = Field(default_factory=MaskingConfig)
    training: TrainingConfig = Field(default_factory=TrainingConfig)
    evaluation: EvaluationConfig = Field(default_factory=EvaluationConfig)

    def save(self, path: Path) -> None:
        """Write the resolved configuration as YAML."""
        text = yaml.safe_dump(self.model_dump(mode="json"), allow_unicode=True, sort_keys=False)
        path.write_text(text, encoding="utf-8")


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
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        places = _places(root, path) if root is not None else {}
        tree = yaml.safe_load(text) or {}
    except OSError as error:
        raise ConfigError(
            f"{path}: cannot be read ({error.strerror}); give --config a YAML file"
        ) from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 at byte {error.start}; save it as UTF-8") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    for section, values in tree.items():
        if values is None:
            tree[section] = {}
    return tree, places


def _places(root: yaml.Node, path: Path) -> dict[str, str]:
    places: dict[str, str] = {}

    def walk(node: yaml.Node, prefix: str) -> None:
        if not isinstance(node, yaml.MappingNode):
            if prefix == "":
                raise ConfigError(
                    f"{path}: must hold sections such as `training:`, not {node.value!r:.40}"
                )
            return
        for key, value in node.value:
            name = f"{prefix}{key.value}"
            place = f"{path}:{key.start_mark.line + 1}"
            if name in places:
                raise ConfigError(f"{place}: {name} is set twice (first at {places[name]})")
            places[name] = place
            if prefix == "":
                walk(value, f"{name}.")

    walk(root, "")
    return places


def _apply(override: str, tree: dict[str, Any], places: dict[str, str]) -> None:
    name, equals, value = override.partition("=")
    section, dot, key = name.partition(".")
    if not (equals and dot and key):
        raise ConfigError(f"--set {override}: must read section.key=value")
    try:
        parsed = yaml.safe_load(value)
    except yaml.YAMLError:
        parsed = value
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
            log.warning("%s: %s has no effect: %s", places[name], name, instead)


def _explain(error: Any, places: dict[str, str], path: str) -> str:
    parts = [str(part) for part in error["loc"][:2]]
    name = ".".join(parts)
    place = places.get(name, path)
    if error["type"] == "extra_forbidden":
        return f"{place}: unknown key {name}{_nearest(name)}"
    message = error["msg"].removeprefix("Value error, ")
    return f"{place}: {name}: {message} (got {_short(error['input'])})"


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _nearest(name: str) -> str:
    """Suggest the valid key whose own name, or whole name, is nearest."""
    valid = {f"{s}.{key}" for s, f in Config.model_fields.items() for key in _keys(f.annotation)}
    valid |= set(Config.model_fields)
    by_key = {full.rpartition(".")[2]: full for full in sorted(valid)}
    close = difflib.get_close_matches(name, valid, n=1, cutoff=0.7)
    close = close or [
        by_key[key]
        for key in difflib.get_close_matches(name.rpartition(".")[2], by_key, n=1, cutoff=0.6)
    ]
    return (
        f"; did you mean {close[0]}?" if close else f"; sections: {', '.join(Config.model_fields)}"
    )


def _keys(section: Any) -> list[str]:
    return list(section.model_fields)
