"""Write with an adapter: a prompt in, its continuation out, as it is made.

    python -m wuxia_core.write output/sample 剑光一闪         # one continuation
    python -m wuxia_core.write output/sample                 # asks for prompts until an empty line
    python -m wuxia_core.write output/sample --base 剑光一闪  # and what the base makes of it

OUTPUT_DIR is a run folder, or that of any LoRA adapter. The defaults are those of the scorecard's
passages.
"""

import argparse
import io
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, fields
from functools import partial
from threading import Lock
from typing import TYPE_CHECKING, Any

from wuxia_core.errors import ConfigError, DataError, command_parser, exit_status, run_command
from wuxia_core.messages import messages
from wuxia_core.model import best_device, document_start_id, leave_casts_to_autocast, load_adapter
from wuxia_core.text import visible

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


COLDEST = 0.001  # a lower temperature counts as 0: logits divided by it may be infinite
STRONGEST = 2.0  # the largest `strength`, by which the adapter is multiplied
ONE_AT_A_TIME = Lock()  # held while a text is written: a model has one strength for all threads
HALF = "\ufffd"  # what a decoder writes for a character whose last bytes were not generated


@dataclass(frozen=True)
class Sampling:
    """How a continuation is drawn; the same settings give the same text on the same machine.

    `tokens` is the largest number of new tokens, and `seed` is for torch's random numbers. The
    others are arguments of transformers' `generate`. A `range` includes its two ends.
    """

    tokens: int = field(default=200, metadata={"range": (1, 1_000_000)})
    temperature: float = field(default=0.9, metadata={"range": (0, 10)})  # 0: the likeliest token
    top_p: float = field(default=0.95, metadata={"range": (0.001, 1)})
    repetition_penalty: float = field(default=1.0, metadata={"range": (0.1, 10)})
    seed: int = field(default=42, metadata={"range": (0, 2**63 - 1)})

    def __post_init__(self) -> None:
        """Raise `ConfigError`, naming flag and range, if a setting is out of its range or NaN."""
        for setting in fields(self):
            value, (low, high) = getattr(self, setting.name), setting.metadata["range"]
            if not low <= value <= high:
                flag = setting.name.replace("_", "-")
                raise ConfigError(f"--{flag} {value}: must be from {low:,} to {high:,}")

    def settings(self) -> dict[str, Any]:
        """Give the arguments of `model.generate`, without the seed.

        They overrule the model's own defaults. These may include a `top_k`; 0 switches it off.
        """
        sampling = {"temperature": self.temperature, "top_p": self.top_p, "top_k": 0}
        draws = self.temperature >= COLDEST
        how = {"do_sample": True, **sampling} if draws else {"do_sample": False}
        penalty = {"repetition_penalty": self.repetition_penalty}
        return {"max_new_tokens": self.tokens, "use_cache": True, **how, **penalty}


@contextmanager
def seeded(model: "PreTrainedModel", seed: int) -> Iterator[None]:
    """Seed torch's random numbers inside the `with` block, on the CPU and the model's GPU.

    After the block the generators go on as if nothing had been drawn in it.
    """
    import torch

    with torch.random.fork_rng([model.device] if model.device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def training_precision(model: "PreTrainedModel") -> "torch.autocast":
    """Give a context for `with` in which the model computes as in training, by autocast.

    Autocast computes in the precision of the base's weights; if they are float32, it is off. The
    call also changes the model for good: its LoRA layers no longer cast their inputs to float32,
    even outside the context (see `leave_casts_to_autocast`).
    """
    import torch

    leave_casts_to_autocast(model)
    return torch.autocast(model.device.type, model.dtype, model.dtype != torch.float32)


def continue_prompts(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    prompts: Sequence[list[int]],
    settings: dict[str, Any],
) -> list[str]:
    """Continue prompts, each a list of token ids, in one batch; return the new text of each.

    Special tokens are left out of the texts. `settings` are arguments of `model.generate`.
    """
    import torch

    pad, length = tokenizer.eos_token_id, max(map(len, prompts))
    rows = [[pad] * (length - len(ids)) + ids for ids in prompts]  # (B, T), padded at the left
    masks = [[0] * (length - len(ids)) + [1] * len(ids) for ids in prompts]  # 1: no padding
    input_ids, mask = (torch.tensor(lists, device=model.device) for lists in (rows, masks))
    with torch.inference_mode():
        output = model.generate(input_ids, attention_mask=mask, pad_token_id=pad, **settings)
    texts: list[str] = tokenizer.batch_decode(output[:, length:], skip_special_tokens=True)
    return texts


def encode_prompt(tokenizer: "PreTrainedTokenizerBase", prompt: str, chat: bool) -> list[int]:
    """Turn a prompt into token ids, for the model to continue.

    Without `chat` they are the token that starts a document and those of the prompt. With `chat`
    they are those of the tokenizer's chat template, with the prompt as the user's turn and the
    template's thinking off. Special tokens in the prompt are read as plain text. Raises
    `ConfigError` if `chat` is set and the tokenizer has no template.
    """
    if not chat:
        ids = tokenizer(prompt, add_special_tokens=False, split_special_tokens=True).input_ids
        return [document_start_id(tokenizer), *ids]
    if not tokenizer.chat_template:
        raise ConfigError("--chat: the base is no chat model, it has no template; leave --chat out")
    options = {
        "add_generation_prompt": True,
        "enable_thinking": False,
        "return_dict": False,
        "sanitize_control_tokens": True,  # only special tokens in the prompt become plain text
    }
    return list(tokenizer.apply_chat_template([{"role": "user", "content": prompt}], **options))


def check_strength(strength: float) -> None:
    """Raise `ConfigError` if the adapter's `strength` is not from 0 to `STRONGEST`."""
    if not 0 <= strength <= STRONGEST:
        raise ConfigError(f"--strength {strength:g}: must be from 0 to {STRONGEST:g}")


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
    """Continue a prompt until the model ends the text, or has written `sampling.tokens` tokens.

    Returns the new text; a character at its end that is incomplete is dropped. `echo` is called
    with each piece of the text, made `visible`, as soon as it is generated. `strength` scales the
    adapter: 0 is the base, 1 as trained. `chat` is as in `encode_prompt`. If another thread is
    writing a text, this one waits until it is done.

    Raises `ConfigError` if `strength` is not from 0 to `STRONGEST`, or `chat` is set and the base
    has no chat template; `DataError` if the prompt's tokens and `sampling.tokens` together are more
    than the model's context.
    """
    from peft.helpers import rescale_adapter_scale
    from transformers import TextStreamer

    check_strength(strength)
    ids = encode_prompt(tokenizer, prompt, chat)
    context = getattr(model.config, "max_position_embeddings", math.inf)  # tokens
    if len(ids) + sampling.tokens > context:
        length = f"a prompt of {len(ids):,} tokens and {sampling.tokens:,} more"
        remedy = "shorten it, or lower the number of tokens (--tokens)"
        raise DataError(f"{length} do not fit into the context of {context:,}; {remedy}")
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    # called with whole characters, and at the end with HALF if one is left over
    streamer.on_finalized_text = lambda text, stream_end=False: echo(visible(text.rstrip(HALF)))
    end_ids = [document_start_id(tokenizer), tokenizer.eos_token_id]  # a next document, an end
    settings = sampling.settings() | {"eos_token_id": end_ids, "streamer": streamer}
    scaled = rescale_adapter_scale(model, strength) if strength else model.disable_adapter()
    with ONE_AT_A_TIME, seeded(model, sampling.seed), scaled:
        (text,) = continue_prompts(model, tokenizer, [ids], settings)
    return text.rstrip(HALF)


def open_writer(
    output_dir: str, base_model: str | None = None
) -> "tuple[PeftModel, PreTrainedTokenizerBase]":
    """Load a base with its adapter, and the tokenizer, to write with: on a GPU if there is one.

    On a GPU a model in float32 becomes bfloat16. transformers' progress bars are switched off for
    good. `output_dir` and `base_model` are as in `load_adapter`. Raises `DataError` if the adapter
    is missing, damaged or of another base; `MachineError` if the base cannot be loaded or a GPU
    cannot be used; `ConfigError` if the run's config or the base's tokenizer is not usable.
    """
    import torch
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    model, tokenizer = load_adapter(output_dir, best_device(), base_model)
    if model.device.type == "cuda" and model.dtype == torch.float32:
        model = model.bfloat16()
    return model, tokenizer


def main(arguments: list[str] | None = None) -> int:
    """Write as the command line asks; return the exit status."""
    parser = command_parser("wuxia_core.write", __doc__)
    parser.add_argument("output_dir", help="run folder, or that of any LoRA adapter")
    parser.add_argument("prompt", nargs="?", help="without one: asked for, until an empty line")
    parser.add_argument("--base", action="store_true", help="the base's answer too, same seed")
    parser.add_argument("--strength", type=float, default=1, help="of the adapter, 0 to 2 (1)")
    parser.add_argument("--chat", action="store_true", help="through the chat template")
    parser.add_argument("--base-model", metavar="FOLDER", help="the base, where it has moved")
    for name, value in vars(Sampling()).items():  # a flag for each setting
        flag = f"--{name.replace('_', '-')}"
        parser.add_argument(flag, type=type(value), default=value, help=f"({value:g})")
    # Intermixed: PROMPT may stand behind a flag.
    return exit_status(partial(_write, parser.parse_intermixed_args(arguments)))


def _write(options: argparse.Namespace) -> None:
    """Print the prompt and what the adapter writes behind it; with --base, then the base's text.

    Without a prompt, prompts are asked for until an empty line or the end of the input. A chat
    prompt is not printed. Raises `ConfigError` if there is neither prompt nor input, or an option,
    the prompt's encoding or the run's config is wrong; `DataError` if the adapter is missing or
    unfit, or a prompt is too long; `MachineError` if the base or a GPU fails.
    """
    sampling = Sampling(**{name: getattr(options, name) for name in vars(Sampling())})
    check_strength(options.strength)
    writer = open_writer(options.output_dir, options.base_model)
    echo, labels = partial(print, end="", flush=True), messages("write")
    strengths = {"tuned": options.strength} | ({"base": 0.0} if options.base else {})

    def answer(prompt: str) -> None:
        """Print the text at each strength; raise `ConfigError` if the prompt is not UTF-8."""
        # Python reads bytes that are not UTF-8 as surrogates, U+D800 to U+DFFF.
        if any("\ud800" <= character <= "\udfff" for character in prompt):
            raise ConfigError("PROMPT: not UTF-8; set PYTHONUTF8=1, or the terminal's encoding")
        for name, strength in strengths.items():
            echo(labels[name] if options.base else "")
            echo("" if options.chat else visible(prompt))
            try:
                stream(*writer, prompt, sampling, echo, strength=strength, chat=options.chat)
            finally:
                print()  # so that an error has a line of its own

    if options.prompt is not None:
        return answer(options.prompt)
    import readline  # noqa: F401  (input() gets a history by the arrow keys)

    if sys.stdin is None:
        raise ConfigError("PROMPT: none is given, and there is no terminal to ask for one")
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # for `answer` to say what is wrong
    with suppress(EOFError):
        while prompt := input(labels["prompt"]).strip():
            answer(prompt)


if __name__ == "__main__":
    run_command(main)
