"""The typed configuration: every key with its default, its unit and its bounds."""

import re
from pathlib import Path
from typing import Annotated, Literal, Self

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator

from wuxia_core.errors import ConfigError

LINEAR_LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
NUMBER = re.compile(r"[+-]?[0-9.]+[eE][+-]?[0-9]+")


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
        from wuxia_core.corpus.cleaning import RULES

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
        from wuxia_core.masking.corruption import check_shares
        from wuxia_core.masking.spans import SpanMasker

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
