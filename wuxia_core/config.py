"""One typed configuration: read from YAML, checked strictly, written into the run folder.

`load_config("configs/sample.yaml", ["training.seed=7"]).training.seed` is 7. An unknown key or a
wrong type is a `ConfigError` that names the key, its file and line, and a valid key with a name
like an unknown one. The docstring below a field is its row in the README's table of keys.
"""

import difflib
import logging
import os
import re
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from wuxia_core.errors import ConfigError

logger = logging.getLogger(__name__)

# Where configs/, data/ and notebooks/ are: inside an installed package, or in the checkout.
_PACKAGE = Path(__file__).resolve().parent
PROJECT = _PACKAGE / "project" if (_PACKAGE / "project").is_dir() else _PACKAGE.parent
TINY_BASE = PROJECT / "data" / "tiny_base"  # a small Qwen3, the base model of the sample
LINEAR_LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
# Keys of older config files that have no effect, each with what its warning says happens instead.
RETIRED = {
    "training.eval_strategy": "held-out loss is measured every training.eval_steps steps",
    "training.metric_for_best_model": "that of the fewest held-out bits per character is kept",
}

PositiveInt = Annotated[int, Field(ge=1)]
NonNegativeInt = Annotated[int, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
PositiveFloat = Annotated[float, Field(gt=0)]
FROM_LIST = Field(strict=False)  # a YAML list is accepted for a tuple: YAML has no tuples


class _Section(BaseModel):
    """Base of all sections: refuses unknown keys, other types, inf and nan, strings with a NUL."""

    model_config = ConfigDict(
        extra="forbid",
        strict=True,
        validate_assignment=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
    )

    @field_validator("*")
    @classmethod
    def _refuse_nul(cls, value: Any) -> Any:
        if isinstance(value, str) and "\0" in value:
            raise ValueError("holds a NUL, which no name or path can")
        return value


class ModelConfig(_Section):
    """The base model and the adapter."""

    model_name_or_path: str = "Qwen/Qwen3-8B"
    """Base model: a folder, or a name on the hub."""
    hub: Literal["huggingface", "modelscope"] = "huggingface"
    """Where a name that is no folder is downloaded from."""
    use_lora: Literal[True] = True
    """Only adapters are trained."""
    quantization: Literal["none", "8bit", "4bit"] = "none"
    """Of the base's linear layers, by bitsandbytes."""
    lora_r: PositiveInt = 16
    """Rank of the adapter."""
    lora_alpha: PositiveInt = 32
    """The adapter's update is multiplied by lora_alpha / lora_r."""
    lora_dropout: Fraction = 0.05
    """Share of the adapter's inputs that is dropped in training; 0 makes steps shorter."""
    lora_target_modules: Annotated[list[str], Field(min_length=1)] | Literal["all-linear"] = (
        LINEAR_LAYERS
    )
    """Names of the layers that get an adapter, or all-linear."""


class DataConfig(_Section):
    """The texts, and how they are cut into windows."""

    data_dir: str = "./data"
    """Folder of novels, read recursively."""
    general_file: str | None = None
    """General text: a folder, a text file with a paragraph a line, or JSONL with `text`."""
    encoding: dict[str, str] = {}
    """File name → the name of its encoding, where detection errs."""
    skip_cleaning: list[str] = []
    """Rules of wuxia_core/corpus/cleaning.py to leave out."""
    curly_quotes: bool = False
    """Turn straight quotes into “ ” and ‘ ’, the rule `quotes`: a mixture of both is learnt."""
    to_simplified: bool = False
    """Turn traditional characters into simplified ones."""
    deduplicate: bool = True
    """Leave out books and paragraphs that are there twice."""
    weights: dict[str, Annotated[float, Field(ge=0)]] = {}
    """File name → how often its text is trained on in an epoch."""
    lexicon: str | None = "./data/lexicon.txt"
    """Words kept whole, one a line, for masking.span_unit word."""
    general_ratio: Fraction = 0.1
    """Share of general text among the training tokens."""
    max_general_epochs: PositiveFloat = 1.0
    """Passes over the general text in one over the novels, at most."""
    processed_data_file: str = "./data/mixed/wuxia"
    """The mixture folder: what is trained on, made from the texts."""
    max_length: Annotated[int, Field(ge=8)] = 1024
    """Length of a window, tokens."""
    min_length: NonNegativeInt = 0
    """Shorter documents are left out, tokens."""
    stride: PositiveInt | None = None
    """From window to window, tokens; null: max_length, so that nothing overlaps."""
    val_ratio: Fraction = 0.1
    """Share of the characters held out, by whole books where one is near."""

    @field_validator("encoding")
    @classmethod
    def _check_encodings(cls, encodings: dict[str, str]) -> dict[str, str]:
        from wuxia_core.corpus import codec

        for file, encoding in encodings.items():
            try:
                "".encode(codec(encoding))
            except LookupError:
                raise ValueError(f"no encoding is called {encoding} ({file})") from None
        return encodings

    @field_validator("skip_cleaning")
    @classmethod
    def _check_rules(cls, names: list[str]) -> list[str]:
        """Replace older names of rules by today's, and refuse names of no rule."""
        from wuxia_core.corpus import OLDER_NAMES, RULES

        names = [OLDER_NAMES.get(name, name) for name in names]
        if unknown := sorted(set(names) - set(RULES)):
            raise ValueError(f"no rule is called {', '.join(unknown)}; rules: {', '.join(RULES)}")
        return names

    @model_validator(mode="after")
    def _check_stride(self) -> Self:
        if self.stride and self.stride > self.max_length:
            raise ValueError(f"stride {self.stride} skips text: max_length {self.max_length}")
        return self


class MaskingConfig(_Section):
    """Which tokens are masked, and what stands in their place."""

    mask_ratio: Annotated[float, Field(gt=0, lt=1)] = 0.15
    """Share of the maskable tokens that is masked."""
    span_ratio: Annotated[float, Field(ge=0, le=1)] = 0.5
    """Share of the masked tokens that lies in spans; the others are single."""
    span_length: Annotated[tuple[PositiveInt, PositiveInt], FROM_LIST] = (3, 5)
    """Shortest and longest span, tokens."""
    span_unit: Literal["token", "word"] = "token"
    """Where spans start and end: at any token, or at the edges of words."""
    corruption: Annotated[tuple[float, float, float], FROM_LIST] = (1.0, 0.0, 0.0)
    """Shares of the masked tokens that become the mask token, a random token, or stay."""
    mask_token: str | None = None
    """A token of the vocabulary to use as the mask token; null: a spare row of its table."""

    @model_validator(mode="after")
    def _check_masks(self) -> Self:
        from wuxia_core.masking import SpanMasker, check_shares

        SpanMasker(self.mask_ratio, self.span_ratio, self.span_length)  # raises `ConfigError`
        check_shares(self.corruption)
        return self


class TrainingConfig(_Section):
    """How the adapter is trained. Steps are optimizer steps; batch sizes are numbers of windows."""

    output_dir: str = "./output/wuxia_lora"
    """The run folder."""
    objective: Literal["masked", "mixed", "meap", "clm"] = "masked"
    """masked: masked tokens; clm: all tokens; mixed: half of each; meap: all tokens, with masks."""
    num_train_epochs: PositiveFloat = 3.0
    """Passes over the training text."""
    max_steps: Annotated[int, Field(ge=-1)] = -1
    """Steps of the run; -1: num_train_epochs decides."""
    per_device_train_batch_size: PositiveInt = 4
    """Windows a forward pass."""
    per_device_eval_batch_size: PositiveInt = 4
    """Windows a forward pass of a measurement."""
    gradient_accumulation_steps: PositiveInt = 8
    """Forward passes a step."""
    learning_rate: PositiveFloat = 5e-5
    """Peak rate, after the warmup; then a cosine to 0."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    """AdamW's."""
    warmup_steps: NonNegativeInt | None = None
    """Steps until the rate reaches its peak; null: 5 % of the run's, 100 at most."""
    logging_steps: PositiveInt = 10
    """Steps between rows of metrics.jsonl."""
    save_steps: PositiveInt | None = None
    """Steps between checkpoints; null: a tenth of the run, 500 at most."""
    eval_steps: PositiveInt = 500
    """Steps between measurements of held-out text."""
    save_total_limit: PositiveInt = 3
    """Checkpoints that are kept, two at least."""
    fp16: bool = False
    """Train in float16; needs a GPU."""
    bf16: bool = False
    """Train in bfloat16: RTX 30 and later."""
    gradient_checkpointing: bool = False
    """Less memory for a third more time."""
    compile: bool = False
    """Compile the decoder layers: minutes at the start, shorter steps; not measured on a GPU."""
    early_stopping_patience: PositiveInt | None = None
    """Measurements without an improvement that end the run; null: none do."""
    report_to: list[str] = ["tensorboard"]
    """Trackers, as transformers knows them: tensorboard, swanlab, wandb …"""
    ddp_timeout: Annotated[int, Field(gt=0, le=10**6)] = 1800
    """Seconds that a process may be silent before the others give up."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 42
    """Of everything random: split, order, masks, dropout, samples."""

    @model_validator(mode="after")
    def _check_together(self) -> Self:
        if self.max_steps == 0:
            raise ValueError("max_steps is 0: give a number of steps, or -1 for num_train_epochs")
        batch = self.per_device_train_batch_size
        if self.objective == "mixed" and batch % 2:
            raise ValueError(f"per_device_train_batch_size {batch} is odd: make it even for mixed")
        if self.fp16 and self.bf16:
            raise ValueError("fp16 and bf16 are both true: choose one (bf16 on RTX 30 and later)")
        return self


class EvaluationConfig(_Section):
    """How the base and the tuned model are compared for the scorecard."""

    max_documents: PositiveInt = 40
    """Held-out documents of a source that are measured, at most."""
    minutes: PositiveFloat | None = None
    """Time for the scorecard, about; null: a tenth of the training's, 20 at least."""
    FEWEST_MINUTES: ClassVar[float] = 20.0  # time at least if minutes is null; the sample takes 1
    wits_margin: Annotated[float, Field(gt=0, lt=1)] = 0.06
    """Accuracy on the questions that may go, as a share."""
    general_margin: Annotated[float, Field(ge=0)] = 0.02
    """Bits a character that general text may cost more."""
    max_copied: PositiveInt = 30
    """Characters of training text in a row that --gate refuses."""
    max_extracted: Annotated[float, Field(ge=0, le=1)] = 0.05
    """Share of training prefixes, less that of held-out ones, that --gate refuses."""


class PlanConfig(_Section):
    """The GPUs that `--plan` forecasts a run for; GPUs of this machine take their place."""

    card: str | None = None
    """Name of a card, such as RTX 4090."""
    cards: PositiveInt = 1
    """How many of them."""
    card_gib: PositiveFloat | None = None
    """Its memory, GiB; null: that of the known card."""
    card_tflops: PositiveFloat | None = None
    """Its dense products in half precision, TFLOP/s; null: as card_gib."""
    card_gbs: PositiveFloat | None = None
    """Its memory's bandwidth, GB/s; null: as card_gib."""
    price_per_hour: PositiveFloat | None = None
    """Of a card, in any currency."""


class Config(_Section):
    """Everything a run depends on."""

    model: ModelConfig = Field(default_factory=ModelConfig)
    data: DataConfig = Field(default_factory=DataConfig)
    masking: MaskingConfig = Field(default_factory=MaskingConfig)
    training: TrainingConfig = Field(default_factory=TrainingConfig)
    evaluation: EvaluationConfig = Field(default_factory=EvaluationConfig)
    plan: PlanConfig = Field(default_factory=PlanConfig)

    def save(self, path: Path) -> None:
        """Write every key with its value, defaults included, into the file `path` as YAML."""
        text = yaml.safe_dump(self.model_dump(mode="json"), allow_unicode=True, sort_keys=False)
        path.write_text(text, encoding="utf-8")


class _Loader(yaml.SafeLoader):
    """Loader of YAML that reads `5e-5` as a number, and refuses a key that is set twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        names = [key.value for key, _ in node.value]
        for index, (key, _) in enumerate(node.value):
            if key.value in names[:index]:
                problem = f"{key.value} is set twice"
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=key.start_mark)
        return super().construct_mapping(node, deep)


def _read_integer(loader: _Loader, node: yaml.ScalarNode) -> int | str:
    """Read `0100` as 100, not as octal; leave `0x10` and `1:30` text, which number keys refuse."""
    digits = node.value.replace("_", "")
    return int(digits) if digits.lstrip("+-").isdecimal() else str(node.value)


_Loader.add_constructor("tag:yaml.org,2002:int", _read_integer)
# YAML 1.1 takes `5e-5` for text. The last argument lists the characters it can begin with.
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9.]+[eE][-+]?[0-9]+$"), list("-+.0123456789")
)


def effective_batch(config: Config, processes: int) -> int:
    """Count the windows of an optimizer step of `processes` processes, those on all machines."""
    training = config.training
    return training.per_device_train_batch_size * training.gradient_accumulation_steps * processes


def expand(path: str | Path) -> Path:
    """Replace a leading `~` or `~user` by the home folder; raise `ConfigError` if it is unknown."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise ConfigError(f"{path}: no such user; write the folder out") from None


def locate(path: str) -> Path:
    """Find a file or folder: at the path itself or, if only `PROJECT` has it, there.

    So `data/sample` is found from any working directory. A path that neither place has is returned
    as it is, with `~` expanded. Raises `ConfigError` if the home folder of a `~` is unknown.
    """
    local, shipped = expand(path), PROJECT / expand(path)
    return shipped if shipped.exists() and not local.exists() else local


def load_config(path: str | os.PathLike[str], overrides: list[str] | None = None) -> Config:
    """Read a YAML file, apply `section.key=value` overrides and check everything.

    A later override wins. Raises `ConfigError` if the file cannot be read, or a key or value is
    wrong; the message names the key and where it is set: its file and line, or the override.
    """
    tree, places = _read_yaml(Path(path))  # values by section and key; where each is set
    for override in overrides or []:
        _apply_override(override, tree, places)
    _drop_retired(tree, places)
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(_explain(error.errors()[0], places, str(path))) from None
    except ConfigError as error:  # from `_check_masks`; the message names the key
        raise ConfigError(f"{places.get('masking', path)}: {error}") from None


def _read_yaml(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """Read `{section: {key: value}}` and the places (`_find_places`); else raise `ConfigError`."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
        _refuse_aliases(text, path)
        root = yaml.compose(text, Loader=_Loader)
        places = _find_places(root, path) if root is not None else {}
        tree = yaml.load(text, Loader=_Loader) or {}
    except OSError as error:
        raise ConfigError(f"--config {path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 at byte {error.start}; save it as UTF-8") from None
    except RecursionError:
        raise ConfigError(f"{path}: not valid YAML: brackets in brackets without end") from None
    except (yaml.YAMLError, ValueError, TypeError) as error:
        problem = " ".join(str(error).replace('"<unicode string>"', path.name).split())
        raise ConfigError(f"{path}: not valid YAML: {problem}") from None
    for section, keys in tree.items():
        if not isinstance(keys, dict | None):
            raise ConfigError(f"{places.get(str(section), path)}: {section} must hold keys")
    return {section: keys or {} for section, keys in tree.items()}, places


def _refuse_aliases(text: str, path: Path) -> None:
    """Raise `ConfigError` at an alias, `*name`: a few lines of nested ones can fill the memory."""
    for token in yaml.scan(text):
        if isinstance(token, yaml.AliasToken):
            place = f"{path}:{token.start_mark.line + 1}"
            raise ConfigError(f"{place}: *{token.value} is an alias; write out its value")


def _find_places(root: yaml.Node, path: Path) -> dict[str, str]:
    """Map each `section` and `section.key` to its place in the file `path`: `my.yaml:3`, say."""
    if not isinstance(root, yaml.MappingNode):
        raise ConfigError(f"{path}: must hold sections such as `training:`")
    places: dict[str, str] = {}
    for section, keys in root.value:
        pairs = keys.value if isinstance(keys, yaml.MappingNode) else []
        key_nodes = [(f"{section.value}.{key.value}", key) for key, _ in pairs]
        for name, node in [(str(section.value), section), *key_nodes]:
            places[name] = f"{path}:{node.start_mark.line + 1}"
    return places


def _apply_override(override: str, tree: dict[str, Any], places: dict[str, str]) -> None:
    """Put an override's value into `tree`, and `--set section.key=value` into `places`."""
    name, equals, value = override.partition("=")
    section, dot, key = name.partition(".")
    if not (equals and dot and key):
        raise ConfigError(f"--set {override}: must read section.key=value")
    fields = {title: type(keys).model_fields for title, keys in Config()}  # by section and key
    field = fields.get(section, {}).get(key)
    is_text = field is not None and field.annotation in (str, str | None)
    tree.setdefault(section, {})[key] = read_value(value, text=is_text)
    places[name] = f"--set {override}"
    places.setdefault(section, places[name])


def read_value(value: str, *, text: bool) -> Any:
    """Read a value from the command line as YAML or, with `text`, as it is, but `null` as None.

    YAML reads `7` as a number and `[1, 2]` as a list. What is not valid YAML stays a string.
    """
    if text:
        return None if value == "null" else value
    try:
        return yaml.load(value, Loader=_Loader)
    except (yaml.YAMLError, ValueError, RecursionError):
        return value


def _drop_retired(tree: dict[str, Any], places: dict[str, str]) -> None:
    """Delete the keys that are in `RETIRED` from `tree`, and log a warning for each."""
    for name, explanation in RETIRED.items():
        if name in places:
            section, key = name.split(".")
            del tree[section][key]
            logger.warning("%s: %s has no effect: %s", places[name], name, explanation)


def _explain(error: Any, places: dict[str, str], path: str) -> str:
    """Put a pydantic error into one line: where the key is set, the key, the problem, the value."""
    name = ".".join(str(part) for part in error["loc"][:2])
    place = places.get(name, path)
    if error["type"] == "extra_forbidden":
        return f"{place}: unknown key {name}{_suggestion(name)}"
    value = repr(error["input"])
    value = value if len(value) <= 60 else value[:57] + "..."  # a long list would fill the screen
    # the error of a whole section (keys that do not go together) names the values in its message
    got = f" (got {value})" if error["loc"][1:] else ""
    return f"{place}: {name}: {error['msg'].removeprefix('Value error, ')}{got}"


def _suggestion(name: str) -> str:
    """Say what an unknown `data.max_lenght` may mean: `; did you mean data.max_length?`, or ""."""
    # by name without the section, so that a key in the wrong section is found too
    full_names = {key: f"{section}.{key}" for section, keys in Config() for key, _ in keys}
    full_names |= {section: section for section, _ in Config()}
    matches = difflib.get_close_matches(name.rpartition(".")[2], full_names, n=1)
    return f"; did you mean {full_names[matches[0]]}?" if matches else ""
