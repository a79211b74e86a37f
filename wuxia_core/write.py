"""Write with an adapter: a prompt in, its continuation out, as it is made.

    python -m wuxia_core.write output/sample 剑光一闪         # one continuation
    python -m wuxia_core.write output/sample                 # asks for prompts until an empty line
    python -m wuxia_core.write output/sample --base 剑光一闪  # and what the base makes of it

OUTPUT_DIR is a run folder, or that of any LoRA adapter. The defaults are those of the scorecard's
passages.
"""

import argparse
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, fields
from functools import partial
from threading import Lock
from typing import TYPE_CHECKING, Any

from wuxia_core.errors import ConfigError, DataError, command_line, exit_status, run_command
from wuxia_core.messages import messages
from wuxia_core.model import best_device, document_start_id, leave_casts_to_autocast, load_adapter
from wuxia_core.text import visible

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


STRONGEST = 2.0
ONE_AT_A_TIME = Lock()  # a model has one strength at a time
HALF = "\ufffd"  # of a character whose last bytes were not made any more


@dataclass(frozen=True)
class Sampling:
    """How a continuation is drawn; the same settings give the same text on the same machine."""

    tokens: int = field(default=200, metadata={"range": (1, 1_000_000)})
    temperature: float = field(default=0.9, metadata={"range": (0, 10)})  # 0: the likeliest token
    top_p: float = field(default=0.95, metadata={"range": (0.001, 1)})
    repetition_penalty: float = field(default=1.0, metadata={"range": (0.1, 10)})
    seed: int = field(default=42, metadata={"range": (0, 2**63 - 1)})

    def __post_init__(self) -> None:
        """Raise `ConfigError` where a setting is out of range."""
        for setting in fields(self):
            value, (low, high) = getattr(self, setting.name), setting.metadata["range"]
            if not low <= value <= high:
                flag = setting.name.replace("_", "-")
                raise ConfigError(f"--{flag} {value}: must be from {low:,} to {high:,}")

    def settings(self) -> dict[str, Any]:
        """Give what `model.generate` takes; other settings of the model's own are overruled."""
        sampled = {"temperature": self.temperature, "top_p": self.top_p, "top_k": 0}
        drawn = {"do_sample": True, **sampled} if self.temperature else {"do_sample": False}
        penalty = {"repetition_penalty": self.repetition_penalty}
        return {"max_new_tokens": self.tokens, "use_cache": True, **drawn, **penalty}


@contextmanager
def seeded(model: "PreTrainedModel", seed: int) -> Iterator[None]:
    """Draw as `seed` says in here, on the model's device; what is drawn behind it is unchanged."""
    import torch

    with torch.random.fork_rng([model.device] if model.device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def training_precision(model: "PreTrainedModel") -> "torch.autocast":
    """Compute as in training in here: in half precision where the base is."""
    import torch

    leave_casts_to_autocast(model)
    return torch.autocast(model.device.type, model.dtype, model.dtype != torch.float32)


def continued(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    prompts: Sequence[list[int]],
    settings: dict[str, Any],
) -> list[str]:
    """Continue prompts, lists of tokens, in one batch; `settings` are those of `model.generate`."""
    import torch

    end, longest = tokenizer.eos_token_id, max(map(len, prompts))
    rows = [[end] * (longest - len(ids)) + ids for ids in prompts]  # (B, T), padded at the left
    seen = [[0] * (longest - len(ids)) + [1] * len(ids) for ids in prompts]
    ids, mask = (torch.tensor(each, device=model.device) for each in (rows, seen))
    with torch.inference_mode():
        output = model.generate(ids, attention_mask=mask, pad_token_id=end, **settings)
    texts: list[str] = tokenizer.batch_decode(output[:, longest:], skip_special_tokens=True)
    return texts


def encode_prompt(tokenizer: "PreTrainedTokenizerBase", prompt: str, chat: bool) -> list[int]:
    """Turn a prompt into tokens: behind what starts a document, or through the chat template.

    Raises `ConfigError` where `chat` is asked of a tokenizer without a template.
    """
    if not chat:
        ids = tokenizer(prompt, add_special_tokens=False, split_special_tokens=True).input_ids
        return [document_start_id(tokenizer), *ids]
    if not tokenizer.chat_template:
        raise ConfigError("--chat: the base is no chat model, it has no template; leave --chat out")
    how = {"add_generation_prompt": True, "enable_thinking": False, "return_dict": False}
    how["sanitize_control_tokens"] = True  # those of the prompt; the template's own stay
    turn = [{"role": "user", "content": prompt}]
    return list(tokenizer.apply_chat_template(turn, **how))


def stream(
    model: "PeftModel",
    tokenizer: "PreTrainedTokenizerBase",
    prompt: str,
    sampling: Sampling,
    echo: Callable[[str], object] = lambda _: None,
    *,
    strength: float = 1.0,
    chat: bool = False,
) -> str:
    """Continue a prompt until the text ends; `echo` takes each piece as soon as it is made.

    `strength` scales the adapter: 0 is the base, 1 as trained.

    Raises
    ------
    ConfigError
        Where `strength` is not from 0 to 2, or `chat` is asked of a base without a template.
    DataError
        Where prompt and continuation are longer than the model's context.
    """
    from peft.helpers import rescale_adapter_scale

    if not 0 <= strength <= STRONGEST:
        raise ConfigError(f"--strength {strength:g}: must be from 0 to {STRONGEST:g}")
    ids = encode_prompt(tokenizer, prompt, chat)
    context = getattr(model.config, "max_position_embeddings", math.inf)
    if len(ids) + sampling.tokens > context:
        what = f"a prompt of {len(ids):,} tokens and {sampling.tokens:,} more"
        remedy = "shorten it, or lower the number of tokens (--tokens)"
        raise DataError(f"{what} do not fit into the context of {context:,}; {remedy}")
    ends = [document_start_id(tokenizer), tokenizer.eos_token_id]
    how = sampling.settings() | {"eos_token_id": ends, "streamer": _streamer(tokenizer, echo)}
    scaled = rescale_adapter_scale(model, strength) if strength else model.disable_adapter()
    with ONE_AT_A_TIME, seeded(model, sampling.seed), scaled:
        (text,) = continued(model, tokenizer, [ids], how)
    return text.rstrip(HALF)


def _streamer(tokenizer: "PreTrainedTokenizerBase", echo: Callable[[str], object]) -> Any:
    from transformers import TextStreamer

    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    streamer.on_finalized_text = lambda text, stream_end=False: echo(visible(text.rstrip(HALF)))
    return streamer


def open_writer(
    output_dir: str, base_model: str | None = None
) -> "tuple[PeftModel, PreTrainedTokenizerBase]":
    """Load an adapter to write with: on a card where there is one, in half precision there.

    Raises as `load_adapter` does.
    """
    import torch
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    device = best_device()
    model, tokenizer = load_adapter(output_dir, device, base_model)
    if device == "cuda" and model.dtype == torch.float32:
        model = model.bfloat16()
    return model, tokenizer


def main(arguments: list[str] | None = None) -> int:
    """Run from the command line; return the exit status."""
    parser = command_line("wuxia_core.write", __doc__)
    parser.add_argument("output_dir", help="run folder, or that of any LoRA adapter")
    parser.add_argument("prompt", nargs="?", help="without one: asked for, until an empty line")
    parser.add_argument("--base", action="store_true", help="the base's answer too, same seed")
    parser.add_argument("--strength", type=float, default=1, help="of the adapter, 0 to 2 (1)")
    parser.add_argument("--chat", action="store_true", help="through the chat template")
    parser.add_argument("--base-model", metavar="FOLDER", help="the base, where it has moved")
    for name, value in vars(Sampling()).items():
        flag = f"--{name.replace('_', '-')}"
        parser.add_argument(flag, type=type(value), default=value, help=f"({value:g})")
    return exit_status(partial(_write, parser.parse_intermixed_args(arguments)))


def _write(options: argparse.Namespace) -> None:
    """Continue the prompt, or each that is asked for, as tuned and if asked for as base too."""
    sampling = Sampling(**{name: getattr(options, name) for name in vars(Sampling())})
    writer = open_writer(options.output_dir, options.base_model)
    echo, said = partial(print, end="", flush=True), messages("write")

    def answer(prompt: str) -> None:
        if not prompt.isprintable() and any("\ud800" <= c <= "\udfff" for c in prompt):
            raise ConfigError("PROMPT: not UTF-8; set PYTHONUTF8=1, or the terminal's encoding")
        for name, strength in [("tuned", options.strength), ("base", 0.0)][: 1 + options.base]:
            echo(said[name] if options.base else "")
            echo("" if options.chat else visible(prompt))
            stream(*writer, prompt, sampling, echo, strength=strength, chat=options.chat)
            print()

    if options.prompt is not None:
        return answer(options.prompt)
    import readline  # noqa: F401  (input() gets a history by the arrow keys)

    if sys.stdin is None:
        raise ConfigError("PROMPT: none is given, and there is no terminal to ask for one")
    with suppress(EOFError):
        while prompt := input(said["prompt"]).strip():
            answer(prompt)


if __name__ == "__main__":
    run_command(main)
