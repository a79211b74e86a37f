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
    command_line,
    exit_status,
    raise_machine_error,
    run_command,
)
from wuxia_core.mixing import TRAIN, VALIDATION, Mixture, open_run_mixture, staged
from wuxia_core.text import visible
from wuxia_core.write import Sampling, encode_prompt

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

CONVERTERS = {"gguf": "convert_hf_to_gguf.py", "gguf-adapter": "convert_lora_to_gguf.py"}
SOURCE, MODEL, ADAPTER = "source", "model.gguf", "adapter.gguf"  # what is converted, into what
TYPES = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}  # GGUF's names of precisions
# The text that log p is compared on: so many passages, characters of each, and tokens of these.
PASSAGES, CHARACTERS, TOKENS = 20, 150, 128
# Largest |Δ log p| of a token that is accepted, nats, by the precision that is stored. With the
# bundled base, rounding the weights gave 0.000007 (float32: the order of the sums), 0.0032 and
# 0.028.
LIMITS = {"float32": 1e-3, "float16": 1e-2, "bfloat16": 1e-1}
TEXTS = tomllib.loads(Path(__file__).with_suffix(".toml").read_text("utf-8"))


def export(
    output_dir: str | Path,
    to: str = "merged",
    out: str | Path | None = None,
    llama_cpp: str | Path | None = None,
    base_model: str | None = None,
    strength: float = 1.0,
) -> str:
    """Write an adapter as "merged", "gguf" or "gguf-adapter"; say how exact the export is.

    `out` is the folder to write, by default `OUTPUT_DIR/export/TO`; `llama_cpp` is a copy of
    llama.cpp, `base_model` a base that has moved, and `strength` scales the adapter. The export is
    read again: a model must give text the adapter's log p, a GGUF adapter must have its weights.

    Raises `ConfigError` where `out` exists, or `llama_cpp` or the package gguf is missing;
    `DataError` where there is no adapter of this base, it cannot be converted, or the export is
    not equal to it; `MachineError` where the base cannot be loaded, or `out` cannot be written.
    """
    folder = Path(output_dir)
    base = base_model or models.adapter_settings(folder)["base_model_name_or_path"]
    target = expand(out or folder / "export" / to)
    if target.exists():
        raise ConfigError(f"--out {target}: exists already; name another folder, or delete it")
    script = _converter(to, llama_cpp) if to in CONVERTERS else None
    with raise_machine_error(f"--out {target}"), staged(target) as new:
        model, tokenizer = _load_adapter(folder, base, strength), models.load_tokenizer(base)
        config, mixture = _read_run(folder)
        if script and to == "gguf-adapter":
            finding = _write_adapter(model, script, new)
        else:
            rows = [encode_prompt(tokenizer, text, False)[:TOKENS] for text in _passages(mixture)]
            before, dtype = _log_probs(model, rows), models.weights_dtype(config or Config())
            _write_merged(model, tokenizer, dtype, new.with_name(SOURCE) if script else new)
            model = None  # there may be no room for two
            if script:
                _convert(script, new, MODEL, "--outtype", TYPES[dtype])
            finding = _compare(before, _log_probs(_read_again(new), rows), dtype)
        start = tokenizer.convert_ids_to_tokens(models.document_start_id(tokenizer))
        _describe(folder, new, base, start, config, mixture)
    return f"{finding}\nwritten: {target}"


def _load_adapter(folder: Path, base: str, strength: float) -> "PeftModel":
    """Load a base in float32 with the folder's adapter, but not the trained row of the mask token.

    Raises `DataError` where the adapter has trained rows of other tokens too.
    """
    if len(models.adapter_settings(folder).get("trainable_token_indices") or []) > 1:
        raise DataError(f"{folder}: its adapter has rows of tokens, which no export holds")
    loaded = models.load_base(base, "float32")
    return models.attach_adapter(loaded, folder, base, mask_row=False, strength=strength)


def _read_run(folder: Path) -> tuple[Config | None, Mixture | None]:
    """Read a run's config and mixture.

    Both are None where `folder` is just an adapter, not a run; the mixture is None where it is gone
    or was rebuilt.
    """
    if not (folder / "config.yaml").is_file():
        return None, None
    config = load_config(folder / "config.yaml")
    try:
        return config, open_run_mixture(folder, config.data.processed_data_file)
    except DataError:
        return config, None


def _passages(mixture: Mixture | None) -> list[str]:
    """Cut `PASSAGES` passages of `CHARACTERS` characters out of held-out text, spread evenly.

    The sample's text serves where there is no mixture or too little held-out text.
    """
    text = ""
    if mixture:
        held_out = np.flatnonzero(mixture.outline["split"] == VALIDATION)
        text = "\n".join(mixture.texts(held_out.tolist()[:: len(held_out) // PASSAGES + 1]))
    if len(text) < PASSAGES * CHARACTERS:
        paths = sorted((PROJECT / "data" / "sample").glob("*.txt"))
        text = "\n".join(path.read_text(encoding="utf-8") for path in paths)
    starts = np.linspace(0, len(text) - CHARACTERS, PASSAGES, dtype=int)
    return [text[start : start + CHARACTERS] for start in starts]


def _log_probs(model: "PreTrainedModel", rows: Sequence[list[int]]) -> "torch.Tensor":
    """Log p of every token but the first of each row of token ids, nats: (N,) of all rows."""
    import torch
    import torch.nn.functional as F

    log_probs = []  # of each row, (T - 1,)
    with torch.inference_mode():
        for ids in map(torch.tensor, rows):  # (T,)
            logits = model(input_ids=ids[None]).logits[0, :-1]  # (T - 1, V)
            log_probs.append(-F.cross_entropy(logits, ids[1:], reduction="none"))
    return torch.cat(log_probs)


def _write_merged(
    model: "PeftModel", tokenizer: "PreTrainedTokenizerBase", dtype: str, folder: Path
) -> None:
    """Write base and adapter as one model in a precision, with all files of the tokenizer."""
    import torch

    merged = model.merge_and_unload().to(getattr(torch, dtype))
    merged.config.use_cache = True  # off for the training only
    merged.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    for path in models.tokenizer_files(tokenizer.name_or_path):
        shutil.copy(path, folder)


def _converter(to: str, llama_cpp: str | Path | None) -> Path:
    """Find the script of llama.cpp that converts `to` a form, a key of `CONVERTERS`.

    Raises `ConfigError` where the script or the package gguf is missing.
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
    """Have llama.cpp convert the folder `SOURCE`, which is beside `new`, into a GGUF file in `new`.

    Raises `DataError` where llama.cpp cannot convert it, `OSError` where its script ends with one,
    such as of a full disk.
    """
    command = [sys.executable, str(script), SOURCE, "--outfile", f"{new.name}/{name}", *options]
    done = subprocess.run(command, cwd=new.parent, capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"status {done.returncode}"])[-1]
        if last.startswith("OSError"):
            raise OSError(last)
        raise DataError(f"llama.cpp's {script.name} cannot convert it: {last}")


def _write_adapter(model: "PeftModel", script: Path, new: Path) -> str:
    """Have llama.cpp write the adapter into a folder, and say that all of it is there, bit for bit.

    Raises `DataError` where weights differ, or where a layer's scale differs from the file's: GGUF
    has one alpha for all layers, each of which is scaled by alpha / rank.
    """
    from gguf import GGUFReader
    from peft.tuners.lora import LoraLayer

    source = new.with_name(SOURCE)
    model.config.save_pretrained(source)
    model.save_pretrained(source, save_embedding_layers=False)
    _convert(script, new, ADAPTER, "--base", SOURCE)
    file = GGUFReader(new / ADAPTER)
    alpha = file.fields["adapter.lora.alpha"].contents()
    layers = [layer for layer in model.modules() if isinstance(layer, LoraLayer)]
    same_scale = np.allclose([x.scaling["default"] * x.r["default"] for x in layers], alpha)
    weights = [weight for name, weight in model.state_dict().items() if "lora_" in name]
    stored = sorted(tensor.data.tobytes() for tensor in file.tensors)  # llama.cpp renames tensors
    if not same_scale or stored != sorted(weight.numpy().tobytes() for weight in weights):
        raise DataError("not exported, for its weights or their scale are not the adapter's")
    return "the file has the weights of the adapter, bit for bit"


def _read_again(new: Path) -> "PreTrainedModel":
    """Load the model that was exported into a folder, merged or GGUF, in float32.

    Raises `DataError` where transformers cannot read it.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    settings: dict[str, Any] = {}
    try:
        if (new / MODEL).exists():  # from GGUF alone, transformers takes any head size for 128
            config = AutoConfig.from_pretrained(new.with_name(SOURCE))
            settings = {"gguf_file": MODEL, "config": config}
        return AutoModelForCausalLM.from_pretrained(new, dtype="float32", **settings).eval()
    except (KeyError, RuntimeError, ValueError) as error:
        first = str(error).partition("\n")[0]
        raise DataError(f"not exported, for it cannot be read again and checked: {first}") from None


def _compare(before: "torch.Tensor", after: "torch.Tensor", dtype: str) -> str:
    """Say how far the export's log p is from the adapter's; both are nats a token, (N,).

    Raises `DataError` where a token's is further than the limit of the precision it is stored in.
    """
    delta, limit = (after - before).abs(), LIMITS[dtype]
    text = f"largest |Δ log p| of {len(delta):,} tokens {delta.max():.2g}, mean {delta.mean():.2g}"
    if not delta.max() <= limit:  # also where it is NaN
        raise DataError(f"not exported, for it computes something else: {text}, limit {limit:g}")
    return f"{text} (limit in {dtype} {limit:g})"


def _describe(
    folder: Path, new: Path, base: str, start: str, config: Config | None, mixture: Mixture | None
) -> None:
    """Write a model card, README.md, beside an export, and for GGUF Ollama's file, Modelfile.

    `start` is the token that begins a text. The Modelfile has the defaults of `Sampling`. Neither
    names a path of this machine, but for the base of a GGUF adapter.
    """
    local_base = locate(base).resolve() if locate(base).is_dir() else None
    card = {"base": local_base.name if local_base else base, "start": start, "titles": "not known"}
    lora = models.adapter_settings(folder)
    settings = {"lora": {key: lora[key] for key in ("r", "lora_alpha", "target_modules")}}
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
    models.share(new, new / "README.md")


def main(arguments: list[str] | None = None) -> int:
    """Run from the command line; return the exit status."""
    parser = command_line("wuxia_core.export", __doc__)
    parser.add_argument("output_dir", help="run folder, or that of any LoRA adapter")
    parser.add_argument("--to", choices=["merged", *CONVERTERS], default="merged")
    parser.add_argument("--out", metavar="FOLDER", help="to write (OUTPUT_DIR/export/ and --to)")
    parser.add_argument("--llama-cpp", metavar="FOLDER", help="copy of llama.cpp, to make GGUF")
    parser.add_argument("--base-model", metavar="FOLDER", help="the base, where it has moved")
    parser.add_argument("--strength", type=float, default=1.0, help="of the adapter (1)")
    options = vars(parser.parse_args(arguments))
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    return exit_status(lambda: print(export(**options)))


if __name__ == "__main__":
    run_command(main)
