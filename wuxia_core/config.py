"""The typed configuration: every key with its default, its unit and its bounds."""

import difflib
import logging
import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal, Self, cast

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

LINEAR_LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
NUMBER = re.compile(r"[+-]?[0-9.]+[eE][+-]?[0-9]+")
logger = logging.getLogger(__name__)

PROJECT = Path(__file__).resolve().parents[1]
TINY_BASE = PROJECT / "data" / "tiny_base"

# Keys of older files that are accepted and replaced: what happens instead.
RETIRED = {
    "training.eval_strategy": "held-out loss is measured every training.eval_steps steps",
    "training.metric_for_best_model": "that of the fewest held-out bits per character is kept",
}


def _number(value: object) -> object:
    """Read `5e-5`, which is a string to YAML, as the number it means."""
    if isinstance(value, str) and NUMBER.fullmatch(value):
        return float(value)
    return value


Float = Annotated[float, BeforeValidator(_number)]
Count = Annotated[int, Field(ge=1)]


class _Section(BaseModel):
    model_config = ConfigDict(
        extra="forbid", strict=True, validate_assignment=True, allow_inf_nan=False
    )


class ModelConfig(_Section):
    """The base model and the adapter."""

    model_name_or_path: str = "Qwen/Qwen3-8B"  # folder or hub name
    use_lora: Literal[True] = True  # only adapters are trained
    quantization: Literal["none", "8bit", "4bit"] = "none"  # of the base's linear layers
    lora_r: Count = 16  # rank
    lora_alpha: Count = 32  # the update is multiplied by lora_alpha / lora_r
    lora_dropout: Float = Field(0.05, ge=0, lt=1)  # share of the adapter's inputs
    lora_target_modules: Annotated[list[str], Field(min_length=1)] = LINEAR_LAYERS


class DataConfig(_Section):
    """The texts, and how they are cut."""

    data_dir: str = "./data"  # folder of novels, read recursively
    general_file: str | None = None  # folder, text with a paragraph a line, or JSONL
    encoding: dict[str, str] = {}  # file name → Python's name of its encoding, where detection errs
    skip_cleaning: list[str] = []  # rules of wuxia_core/corpus/cleaning.py to leave out
    to_simplified: bool = False  # turn traditional characters into simplified ones
    deduplicate: bool = True  # leave out books and paragraphs that are there twice
    weights: dict[
        str, Annotated[Float, Field(ge=0)]
    ] = {}  # file name → copies of its training text
    lexicon: str | None = "./data/lexicon.txt"  # words kept whole, one a line (span_unit: word)
    general_ratio: Float = Field(0.1, ge=0, lt=1)  # share of the training tokens
    max_general_epochs: Float = Field(1.0, gt=0)  # passes over the general text in one of novels
    processed_data_file: str = "./data/mixed/wuxia"  # the mixture folder
    max_length: Annotated[int, Field(ge=8)] = 1024  # window, tokens
    min_length: Annotated[int, Field(ge=0)] = 0  # shorter documents are left out, tokens
    stride: Count | None = None  # from window to window, tokens; null: max_length, no overlap
    val_ratio: Float = Field(0.1, ge=0, lt=1)  # share of the characters held out, by whole books

    @field_validator("encoding")
    @classmethod
    def _encodings(cls, names: dict[str, str]) -> dict[str, str]:
        for file, name in names.items():
            try:
                "".encode(name)
            except LookupError:
                raise ValueError(f"no encoding is called {name} ({file})") from None
        return names

    @field_validator("skip_cleaning")
    @classmethod
    def _rules(cls, names: list[str]) -> list[str]:
        from wuxia_core.corpus import RULES

        if unknown := sorted(set(names) - set(RULES)):
            raise ValueError(f"no rule is called {', '.join(unknown)}; rules: {', '.join(RULES)}")
        return names

    @model_validator(mode="after")
    def _no_gaps(self) -> Self:
        if self.stride is not None and self.stride > self.max_length:
            raise ValueError(
                f"stride {self.stride} is longer than max_length {self.max_length}: text between "
                "windows would be lost; leave stride out for windows without overlap"
            )
        return self


class MaskingConfig(_Section):
    """What is hidden from the model."""

    mask_ratio: Float = Field(0.15, gt=0, lt=1)  # share of the maskable tokens
    span_ratio: Float = Field(0.5, ge=0, le=1)  # share of the masked tokens; the others are single
    span_length: tuple[Count, Count] = (3, 5)  # shortest and longest, tokens
    span_unit: Literal["token", "word"] = "token"  # where spans start and end
    corruption: tuple[Float, Float, Float] = (1.0, 0.0, 0.0)  # of the masked: hidden, random, left
    mask_token: str | None = None  # a token of the vocabulary; null: a spare row of the table

    @field_validator("span_length", "corruption", mode="before")
    @classmethod
    def _tuple(cls, value: object) -> object:
        return tuple(value) if isinstance(value, list) else value

    @model_validator(mode="after")
    def _arrangeable(self) -> Self:
        from wuxia_core.masking import SpanMasker, check_shares

        try:
            SpanMasker(self.mask_ratio, self.span_ratio, self.span_length)
            check_shares(self.corruption)
        except ConfigError as error:
            raise ValueError(str(error)) from None
        return self


class TrainingConfig(_Section):
    """The run. Steps are optimizer steps, sizes are windows."""

    output_dir: str = "./output/wuxia_lora"  # the run folder
    objective: Literal["masked", "mixed", "clm"] = "masked"  # see MaskCollator
    num_train_epochs: Float = Field(3.0, gt=0)
    max_steps: Annotated[int, Field(ge=-1)] = -1  # steps; -1: num_train_epochs decides
    per_device_train_batch_size: Count = 4  # windows a forward pass
    per_device_eval_batch_size: Count = 4  # windows a forward pass
    gradient_accumulation_steps: Count = 8  # forward passes a step
    learning_rate: Float = Field(5e-5, gt=0)  # peak, after the warmup; then a cosine to 0
    weight_decay: Float = Field(0.01, ge=0)  # AdamW's
    warmup_steps: Annotated[int, Field(ge=0)] = 100  # steps
    logging_steps: Count = 10  # steps between rows of metrics.jsonl
    save_steps: Count = 500  # steps between checkpoints
    eval_steps: Count = 500  # steps between measurements of the held-out loss
    save_total_limit: Count = 3  # checkpoints
    fp16: bool = False  # needs a GPU
    bf16: bool = False
    gradient_checkpointing: bool = False  # less memory, a third more time
    early_stopping_patience: Count | None = None  # measurements without an improvement; null: never
    ddp_timeout: Count = 1800  # seconds that a process may be silent before the others give up
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 42  # everything random hangs on it

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.max_steps == 0:
            raise ValueError("max_steps is 0: give a number of steps, or -1 for num_train_epochs")
        if self.objective == "mixed" and self.per_device_train_batch_size % 2:
            raise ValueError(
                f"objective mixed masks half of a batch, and per_device_train_batch_size "
                f"{self.per_device_train_batch_size} is odd: make it even"
            )
        if self.fp16 and self.bf16:
            raise ValueError("fp16 and bf16 are both true: choose one (bf16 on RTX 30 and later)")
        return self


class EvaluationConfig(_Section):
    """The scorecard."""

    max_documents: Count = 40  # held-out documents a source, drawn by key
    minutes: Annotated[Float, Field(gt=0)] | None = None  # in all, about; null: all is measured
    wits_margin: Float = Field(0.06, gt=0, lt=1)  # points of accuracy that may go, at most
    general_margin: Float = Field(0.02, ge=0)  # bits a character of general text, likewise
    max_copied: Count = 30  # characters of training text in a row that --gate refuses
    max_extracted: Float = Field(0.05, ge=0, le=1)  # share of prefixes, train less held out, --gate


class PlanConfig(_Section):
    """What a forecast is made for; the machine's own cards, where it has some, come first."""

    card: str | None = None  # name of a card, such as RTX 4090
    cards: Count = 1
    price_per_hour: Annotated[Float, Field(gt=0)] | None = None  # of a card, any currency


class Config(_Section):
    """Everything a run depends on."""

    model: ModelConfig = Field(default_factory=ModelConfig)
    data: DataConfig = Field(default_factory=DataConfig)
    masking: MaskingConfig = Field(default_factory=MaskingConfig)
    training: TrainingConfig = Field(default_factory=TrainingConfig)
    evaluation: EvaluationConfig = Field(default_factory=EvaluationConfig)
    plan: PlanConfig = Field(default_factory=PlanConfig)

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


def effective_batch(config: Config, processes: int) -> int:
    """Windows an optimizer step: a device's batch times accumulation times processes."""
    training = config.training
    return training.per_device_train_batch_size * training.gradient_accumulation_steps * processes


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
            logger.warning("%s: %s has no effect: %s", places.get(name, "--config"), name, instead)


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
