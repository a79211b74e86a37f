"""From files to the mixture folder: split by book, tokenize, cut windows, mix by tokens."""

import hashlib
import json
import logging
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from wuxia_core import corpus
from wuxia_core.config import Config, locate
from wuxia_core.errors import ConfigError, DataError, MachineError
from wuxia_core.mixing.split import choose_general, cut_windows, split_documents
from wuxia_core.mixing.store import Mixture, mixture_folder, open_mixture, read_manifest
from wuxia_core.mixing.tokens import tokenize
from wuxia_core.model import document_start_id, load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)

FILES = {"tokens.npy", "word_starts.npy", "windows.parquet", "documents.parquet", "manifest.json"}
FORMAT = 1  # raise it when the folder's content changes, so that older ones are built again


def mix(config: Config) -> Mixture:
    """Build the mixture folder, or open it where nothing has changed.

    Raises
    ------
    DataError
        Where there is nothing to train on.
    ConfigError
        Where `data.processed_data_file` is a folder that is not a mixture.
    """
    folder = mixture_folder(config.data.processed_data_file)
    inputs = _inputs(config)
    tokenizer = load_tokenizer(config.model.model_name_or_path)
    manifest = _manifest(config, inputs, tokenizer)
    if read_manifest(folder) != manifest:
        _refuse_strangers(folder)
        texts = _read(inputs, config.data.encoding)
        documents = split_documents(texts, config.data.val_ratio, config.training.seed)
        _build(folder, documents, tokenizer, config, manifest)
    mixture = open_mixture(folder)
    _warn_about_general(mixture, config.data.general_ratio)
    return mixture


@dataclass(frozen=True)
class _Inputs:
    data_dir: Path
    novels: list[Path]  # or the JSONL of an older recipe, which stands in for them
    general: list[Path]


def _inputs(config: Config) -> _Inputs:
    data_dir = locate(config.data.data_dir)
    general = None if config.data.general_file is None else locate(config.data.general_file)
    if general is not None and not general.exists():
        raise DataError(f"data.general_file {general}: no such file or folder")
    old = Path(config.data.processed_data_file)
    if old.suffix == ".jsonl" and old.is_file():
        log.info("%s is read as input in place of the novels in %s", old, data_dir)
        novels = [old]
    else:
        novels = corpus.find_novels(data_dir, general)
    return _Inputs(data_dir, novels, corpus.find_general(data_dir, general))


def _read(inputs: _Inputs, encodings: dict[str, str]) -> list[corpus.Document]:
    unused = set(encodings) - {path.name for path in inputs.novels + inputs.general}
    if unused:
        raise ConfigError(f"data.encoding: no file is called {', '.join(sorted(unused))}")
    if inputs.novels[0].suffix == ".jsonl":
        (old,) = inputs.novels
        documents = corpus.read_general(old, encodings.get(old.name), source="wuxia")
    else:
        documents = corpus.read_novels(inputs.novels, inputs.data_dir, encodings)
    for path in inputs.general:
        documents += corpus.read_general(path, encodings.get(path.name))
    return documents


def _manifest(
    config: Config, inputs: _Inputs, tokenizer: "PreTrainedTokenizerBase"
) -> dict[str, Any]:
    """Everything the content hangs on."""
    root = inputs.data_dir.resolve()
    files = [
        {
            "path": os.path.relpath(path.resolve(), root),
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        }
        for path in inputs.novels + inputs.general
    ]
    settings = config.data.model_dump(exclude={"data_dir", "general_file", "processed_data_file"})
    vocabulary = json.dumps(tokenizer.get_vocab(), sort_keys=True)
    return {
        "format": FORMAT,
        "seed": config.training.seed,
        "data": settings,
        "tokenizer": hashlib.sha256(vocabulary.encode()).hexdigest(),
        "document_start": document_start_id(tokenizer),
        "inputs": files,
    }


def _refuse_strangers(folder: Path) -> None:
    """Refuse to replace a folder that holds anything but a mixture."""
    strangers = folder.is_file() or {path.name for path in folder.glob("*")} - FILES
    if strangers:
        raise ConfigError(
            f"data.processed_data_file {folder}: not a mixture, so it is left alone; name another"
        )


def _build(
    folder: Path,
    documents: pd.DataFrame,
    tokenizer: "PreTrainedTokenizerBase",
    config: Config,
    manifest: dict[str, Any],
) -> None:
    """Write the folder beside its place and move it there when it is whole."""
    tokens, word_starts = tokenize(list(documents["text"]), tokenizer)
    windows = cut_windows(documents, [len(sequence) for sequence in tokens], config)
    windows, documents = choose_general(windows, documents, config)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".mixture-") as name:
            staging = Path(name) / folder.name
            staging.mkdir()
            np.save(staging / "tokens.npy", np.concatenate(tokens))
            np.save(staging / "word_starts.npy", np.concatenate(word_starts))
            windows.to_parquet(staging / "windows.parquet")
            documents.to_parquet(staging / "documents.parquet")
            text = json.dumps(manifest, ensure_ascii=False, indent=1)
            (staging / "manifest.json").write_text(text, encoding="utf-8")
            if folder.exists():
                log.info("%s: the texts or settings have changed, so it is built anew", folder)
                shutil.rmtree(folder)
            staging.replace(folder)
    except OSError as error:
        raise MachineError(
            f"data.processed_data_file {folder}: cannot be written ({error.strerror}); free some "
            "space or name another folder"
        ) from None


def _warn_about_general(mixture: Mixture, asked: float) -> None:
    shares = mixture.report.set_index("source")["share"]
    got = float(shares.get("general", 0.0))
    if got == 0:
        log.warning(
            "no general text in the mixture: nothing protects the model against 降智; "
            "name some with data.general_file"
        )
    elif got < asked * 0.9:
        log.warning("general text is %.1f %% of the tokens, not %.1f %%: there is no more of it",
                    100 * got, 100 * asked)  # fmt: skip
