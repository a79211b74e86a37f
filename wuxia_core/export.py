"""Make an adapter ready for other programs, and check that what was written computes the same.

    python -m wuxia_core.export output/sample                      # base and adapter as one model
    python -m wuxia_core.export output/sample --to gguf --llama-cpp ../llama.cpp    # Ollama's file
    python -m wuxia_core.export output/sample --to gguf-adapter --llama-cpp ../llama.cpp

OUTPUT_DIR is a run folder, or that of any LoRA adapter. All is done in float32 on the CPU, with 4
bytes of memory a parameter, and stored in the precision of the training, or in float32 where no
config.yaml says which. The trained row of the mask token is left out: with a tied head it could be
sampled.
"""

import importlib.util
import math
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import yaml

from wuxia_core import model as models
from wuxia_core.config import PROJECT, Config, expand, load_config, locate
from wuxia_core.errors import (
    ConfigError,
    DataError,
    command_parser,
    exit_status,
    raise_machine_error,
    run_command,
)
from wuxia_core.mixing import TRAIN, VALIDATION, Mixture, open_run_mixture, staged
from wuxia_core.text import visible
from wuxia_core.write import Sampling, check_strength, encode_prompt

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

CONVERTERS = {"gguf": "convert_hf_to_gguf.py", "gguf-adapter": "convert_lora_to_gguf.py"}
# The folder that llama.cpp converts, and the names of the files that it makes.
SOURCE, MODEL, ADAPTER = "source", "model.gguf", "adapter.gguf"
TYPES = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}  # GGUF's names of precisions
# The text that log p is compared on: 20 passages of 150 characters, of each 128 tokens at most.
PASSAGES, CHARACTERS, TOKENS = 20, 150, 128
# Largest |Δ log p| of a token that is accepted, nats, by the precision that is stored, for a model
# of 4 layers. With the bundled base, which has 4, rounding the weights gave 0.000007 (float32: the
# order of the sums), 0.0032 and 0.028. Roundings add up as independent errors do, so a model with
# four times as many layers may be off by twice as much.
LIMITS = {"float32": 1e-3, "float16": 1e-2, "bfloat16": 1e-1}
# Templates of README.md ("card") and of Ollama's Modelfile ("modelfile").
TEXTS = tomllib.loads(Path(__file__).with_suffix(".toml").read_text("utf-8"))


def export(
    output_dir: str | Path,
    to: str = "merged",
    out: str | Path | None = None,
    llama_cpp: str | Path | None = None,
    base_model: str | None = None,
    strength: float = 1.0,
) -> str:
    """Write an adapter `to` "merged" or "gguf", one model with its base, or to "gguf-adapter".

    `out` is the folder to write (`OUTPUT_DIR/export/TO`), `llama_cpp` a copy of llama.cpp and
    `base_model` a base that has moved; `strength` scales the adapter. Returns how exact the export
    is once read again: a model's log p of text must be within `LIMITS`, an adapter's weights equal.
    Raises `ConfigError` if `out` exists, `strength` is not from 0 to 2, or llama.cpp or gguf is
    missing; `DataError` if there is no adapter of this base, it cannot be converted, or the export
    differs from it; `MachineError` if the base cannot be loaded, or `out` cannot be written.
    """
    folder = Path(output_dir)
    base = base_model or models.adapter_settings(folder)["base_model_name_or_path"]
    target = expand(out or folder / "export" / to)
    if target.exists():
        raise ConfigError(f"--out {target}: exists already; name another folder, or delete it")
    script = _find_converter(to, llama_cpp) if to in CONVERTERS else None
    with raise_machine_error(f"--out {target}"), staged(target) as new:
        model, tokenizer = _load_to_export(folder, base, strength), models.load_tokenizer(base)
        config, mixture = _read_run(folder)
        if script and to == "gguf-adapter":
            finding = _write_gguf_adapter(model, script, new)
        else:
            rows = [encode_prompt(tokenizer, text, False)[:TOKENS] for text in _passages(mixture)]
            expected, dtype = _log_probs(model, rows), models.weights_dtype(config or Config())
            _write_merged(model, tokenizer, dtype, new.with_name(SOURCE) if script else new)
            model = None  # there may be no room for two
            if script:
                _convert(script, new, MODEL, "--outtype", TYPES[dtype])
            written = _load_export(new)
            finding = _compare(expected, _log_probs(written, rows), dtype, written)
        start = tokenizer.convert_ids_to_tokens(models.document_start_id(tokenizer))
        _write_card(folder, strength, new, base, start, config, mixture)
    return f"{finding}\nwritten: {target}"


def _load_to_export(folder: Path, base: str, strength: float) -> "PeftModel":
    """Load the base named `base` in float32 with the folder's adapter, scaled by `strength`.

    The embedding row of the mask token, which no prompt needs, is left out. Raises `ConfigError` if
    `strength` is not from 0 to 2; `DataError` if rows of several tokens were trained, or the
    adapter is missing, damaged or of another base; `MachineError` if the base cannot be loaded.
    """
    check_strength(strength)
    if len(models.adapter_settings(folder).get("trainable_token_indices") or []) > 1:
        raise DataError(f"{folder}: rows of several tokens were trained, which no export holds")
    loaded = models.load_base(base, "float32")
    return models.attach_adapter(loaded, folder, base, mask_row=False, strength=strength)


def _read_run(folder: Path) -> tuple[Config | None, Mixture | None]:
    """Read the config of the run in `folder`, and open its mixture.

    Both are None if the folder holds just an adapter, not a run. The mixture is None if it is gone
    or damaged, or another is in its place.
    """
    if not (folder / "config.yaml").is_file():
        return None, None
    config = load_config(folder / "config.yaml")
    try:
        return config, open_run_mixture(folder, config.data.processed_data_file)
    except DataError:
        return config, None


def _passages(mixture: Mixture | None) -> list[str]:
    """Cut out `PASSAGES` passages of `CHARACTERS` characters, on which log p is compared.

    They are spread evenly over some of the held-out documents: at most `PASSAGES` documents, which
    are themselves spread evenly over all held-out ones. Without a mixture, or if these documents
    are too short for so many passages, the passages are taken from the bundled novels in
    data/sample.
    """
    text = ""
    if mixture:
        held_out = np.flatnonzero(mixture.outline["split"] == VALIDATION)  # documents' numbers
        step = len(held_out) // PASSAGES + 1
        text = "\n".join(mixture.texts(held_out[::step].tolist()))
    if len(text) < PASSAGES * CHARACTERS:
        paths = sorted((PROJECT / "data" / "sample").glob("*.txt"))
        text = "\n".join(path.read_text(encoding="utf-8") for path in paths)
    starts = np.linspace(0, len(text) - CHARACTERS, PASSAGES, dtype=int)
    return [text[start : start + CHARACTERS] for start in starts]


def _log_probs(model: "PreTrainedModel", rows: Sequence[list[int]]) -> "torch.Tensor":
    """Give the log p of every token but the first of each row, in nats: (N,).

    A row is a list of token ids. The values of all rows follow each other in one tensor.
    """
    import torch
    import torch.nn.functional as F

    log_probs = []  # for each row of T tokens a tensor (T - 1,)
    with torch.inference_mode():
        for ids in map(torch.tensor, rows):  # (T,)
            logits = model(input_ids=ids[None]).logits[0, :-1]  # (T - 1, V)
            log_probs.append(-F.cross_entropy(logits, ids[1:], reduction="none"))
    return torch.cat(log_probs)


def _write_merged(
    model: "PeftModel", tokenizer: "PreTrainedTokenizerBase", dtype: str, folder: Path
) -> None:
    """Write base and adapter as one model in the precision `dtype`, with the tokenizer's files.

    `model` itself is merged, and cannot be used as an adapter afterwards.
    """
    import torch

    merged = model.merge_and_unload().to(getattr(torch, dtype))
    merged.config.use_cache = True  # off for the training only
    merged.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    # the base's own files, in place of these and beside them: vocab.json, merges.txt and the like
    for path in models.tokenizer_files(tokenizer.name_or_path):
        shutil.copy(path, folder)


def _find_converter(to: str, llama_cpp: str | Path | None) -> Path:
    """Find llama.cpp's script that writes the form `to`, a key of `CONVERTERS`.

    Raises `ConfigError` if `llama_cpp` is None, if that folder lacks the script or its gguf-py, or
    if the package gguf is not installed.
    """
    script = expand(llama_cpp or "").resolve() / CONVERTERS[to]
    if not (llama_cpp and script.is_file() and (script.parent / "gguf-py").is_dir()):
        remedy = "name a copy of it (git clone https://github.com/ggml-org/llama.cpp)"
        where = f"--llama-cpp {llama_cpp or '(not given)'}"
        raise ConfigError(f"{where}: no {script.name} and gguf-py there; {remedy}")
    if importlib.util.find_spec("gguf") is None:
        raise ConfigError(f"--to {to}: gguf is not installed; pip install -e '.[gguf]'")
    return script


def _convert(script: Path, new: Path, name: str, *options: str) -> None:
    """Have llama.cpp convert the folder `SOURCE` into the GGUF file `name` in the folder `new`.

    The two folders are side by side; `options` are more arguments of the script. If the script
    fails, its last line of stderr is raised as `OSError` if it begins with "OSError", as on a full
    disk, and otherwise as `DataError`.
    """
    command = [sys.executable, str(script), SOURCE, "--outfile", f"{new.name}/{name}", *options]
    done = subprocess.run(command, cwd=new.parent, capture_output=True, text=True)
    if done.returncode:
        # The last line of stderr, or the status if stderr is empty.
        last = [f"status {done.returncode}", *done.stderr.strip().splitlines()][-1]
        if last.startswith("OSError"):
            raise OSError(last)
        raise DataError(f"llama.cpp's {script.name} cannot convert it: {last}")


def _write_gguf_adapter(model: "PeftModel", script: Path, new: Path) -> str:
    """Have llama.cpp write the adapter into the folder `new`, and say that its weights are exact.

    Raises `ConfigError` if the adapter's strength is 0; `DataError` if the script fails, if a
    weight differs in a bit, or if a layer's scale differs from the file's: GGUF has one alpha for
    all layers, each of which is scaled by alpha / rank. Raises `OSError` if the disk is full (see
    `_convert`).
    """
    from gguf import GGUFReader
    from peft.tuners.lora import LoraLayer

    if not model.peft_config["default"].lora_alpha:
        raise ConfigError("--strength 0: llama.cpp takes such an adapter for one of full strength")
    source = new.with_name(SOURCE)
    model.config.save_pretrained(source)
    model.save_pretrained(source, save_embedding_layers=False)
    _convert(script, new, ADAPTER, "--base", SOURCE)
    file = GGUFReader(new / ADAPTER)
    alpha = file.fields["adapter.lora.alpha"].contents()
    layers = [layer for layer in model.modules() if isinstance(layer, LoraLayer)]
    # a layer's scaling times its rank is the layer's alpha
    same_scale = np.allclose([x.scaling["default"] * x.r["default"] for x in layers], alpha)
    weights = [weight for name, weight in model.state_dict().items() if "lora_" in name]
    # compared as sorted lists of bytes, since llama.cpp renames the tensors
    stored = sorted(tensor.data.tobytes() for tensor in file.tensors)
    if not same_scale or stored != sorted(weight.numpy().tobytes() for weight in weights):
        raise DataError("not exported, for its weights or their scale are not the adapter's")
    return "the file has the weights of the adapter, bit for bit"


def _load_export(new: Path) -> "PreTrainedModel":
    """Load the model that was exported into the folder `new`, in float32.

    It is read from the GGUF file `MODEL` if there is one, else from safetensors. Raises `DataError`
    if transformers cannot read it.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    settings: dict[str, Any] = {}
    try:
        # With the config, as from GGUF alone transformers would take the head size to be 128.
        if (new / MODEL).exists():
            config = AutoConfig.from_pretrained(new.with_name(SOURCE))
            settings = {"gguf_file": MODEL, "config": config}
        return AutoModelForCausalLM.from_pretrained(new, dtype="float32", **settings).eval()
    except (KeyError, RuntimeError, ValueError) as error:
        first = str(error).partition("\n")[0]
        raise DataError(f"not exported, for it cannot be read again and checked: {first}") from None


def _compare(
    expected: "torch.Tensor", exported: "torch.Tensor", dtype: str, model: "PreTrainedModel"
) -> str:
    """Say how far the log p of the export is from what is expected; both are nats a token, (N,).

    `model` is the export, stored in the precision `dtype`. Raises `DataError` if the log p of a
    token differs by more than the limit for this precision and number of layers (see `LIMITS`), or
    is NaN.
    """
    delta = (exported - expected).abs()  # nats, (N,)
    depth = max(1, model.config.num_hidden_layers / 4)  # LIMITS are for 4 layers
    limit = LIMITS[dtype] * math.sqrt(depth)
    text = f"largest |Δ log p| of {len(delta):,} tokens {delta.max():.2g}, mean {delta.mean():.2g}"
    if not delta.max() <= limit:  # also if it is NaN
        raise DataError(f"not exported, for it computes something else: {text}, limit {limit:g}")
    return f"{text} (limit in {dtype} {limit:g})"


def _write_card(
    folder: Path,
    strength: float,
    new: Path,
    base: str,
    start: str,
    config: Config | None,
    mixture: Mixture | None,
) -> None:
    """Write the model card README.md into the export's folder `new`, and with GGUF a Modelfile.

    `folder` is that of the adapter, which `strength` scaled; `start` is the token that begins a
    text. The Modelfile, for Ollama, has the defaults of `Sampling`. For a GGUF adapter it names the
    base, by its path if the base is a folder; no other path of this machine is named. The weights
    get the file mode of README.md.
    """
    local_base = locate(base).resolve() if locate(base).is_dir() else None
    card = {"base": local_base.name if local_base else base, "start": start, "titles": "not known"}
    # the card's settings: those of the adapter, and those of masking and training if it has a run
    lora = models.adapter_settings(folder)
    keys = ("r", "lora_alpha", "target_modules")
    settings = {"lora": {key: lora[key] for key in keys} | {"strength": strength}}
    if config:
        settings |= config.model_dump(mode="json", include={"masking", "training"})
        del settings["training"]["output_dir"]
    if mixture:
        titles = mixture.outline["book"][mixture.outline["split"] == TRAIN].unique()
        card["titles"] = "、".join(f"《{visible(title)}》" for title in titles)
    card["settings"] = yaml.safe_dump(settings, allow_unicode=True, sort_keys=False)
    (new / "README.md").write_text(TEXTS["card"].format(**card), encoding="utf-8")
    for path in new.glob("*.gguf"):
        adapter = f"FROM {local_base or base}\nADAPTER ./{path.name}"
        origin = adapter if path.name == ADAPTER else f"FROM ./{path.name}"
        text = TEXTS["modelfile"].format(origin=origin, start=start, **vars(Sampling()))
        (new / "Modelfile").write_text(text, encoding="utf-8")
    models.copy_file_mode(new, new / "README.md")


def main(arguments: list[str] | None = None) -> int:
    """Run from the command line; return the exit status."""
    parser = command_parser("wuxia_core.export", __doc__)
    parser.add_argument("output_dir", help="run folder, or that of any LoRA adapter")
    parser.add_argument("--to", choices=["merged", *CONVERTERS], default="merged")
    parser.add_argument("--out", metavar="FOLDER", help="to write (OUTPUT_DIR/export/TO)")
    parser.add_argument("--llama-cpp", metavar="FOLDER", help="copy of llama.cpp, to make GGUF")
    parser.add_argument("--base-model", metavar="FOLDER", help="the base, where it has moved")
    parser.add_argument("--strength", type=float, default=1.0, help="of the adapter (1)")
    options = vars(parser.parse_args(arguments))
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    return exit_status(lambda: print(export(**options)))


if __name__ == "__main__":
    run_command(main)
