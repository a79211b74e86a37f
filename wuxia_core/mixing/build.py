"""From files to the mixture folder, stage by stage; nothing but one file is in memory at a time."""

import json
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas as pd
from tqdm import tqdm

from wuxia_core import corpus
from wuxia_core.config import Config, locate
from wuxia_core.errors import ConfigError, DataError
from wuxia_core.mixing import prepare, windows
from wuxia_core.mixing.manifest import MANIFEST, SEEN, Fingerprints, make_manifest, read_manifest
from wuxia_core.mixing.staging import Texts, alone, staged
from wuxia_core.mixing.store import (
    OUTLINE,
    TRAIN,
    UNUSED,
    VALIDATION,
    Mixture,
    mixture_folder,
    open_mixture,
)
from wuxia_core.mixing.tokens import Encoder, TokenWriter
from wuxia_core.model import load_tokenizer

log = logging.getLogger(__name__)

FILES = {
    *("tokens.npy", "word_starts.npy", "windows.parquet", "documents.parquet"),
    *("preparation.json", MANIFEST, SEEN),
}
ROW_GROUP = 16_000_000  # characters of documents.parquet written at a time


def mix(config: Config) -> Mixture:
    """Build the mixture folder, or open it where nothing has changed.

    Raises
    ------
    DataError
        Where there is nothing to train on, or too little general text for the ratio.
    ConfigError
        Where `data.processed_data_file` is a folder that is not a mixture, or a file that
        `data.encoding` or `data.weights` names does not exist.
    """
    folder, files, manifest, fingerprints = _state(config)
    if _is_current(folder, manifest):
        fingerprints.remember(folder)
    else:
        _refuse_strangers(folder)
        with alone(folder.with_name(f".{folder.name}.lock")):
            if not _is_current(folder, manifest):  # another launcher may have built it
                with staged(folder) as staging:
                    _build(staging, config, files)
                    _write_json(staging / MANIFEST, manifest)
                    fingerprints.remember(staging)
    mixture = open_mixture(folder)
    if "general" not in set(mixture.report["source"]):
        why = "data.general_ratio is 0" if not config.data.general_ratio else "data.general_file"
        log.warning(
            "no general text in the mixture: nothing protects the model against 降智 (see %s)", why
        )
    return mixture


def current_mixture(config: Config) -> Mixture | None:
    """Open the mixture where it is there and nothing has changed, else None."""
    if read_manifest(mixture_folder(config.data.processed_data_file)) is None:
        return None  # and no tokenizer is asked for
    folder, _, manifest, _ = _state(config)
    return open_mixture(folder) if _is_current(folder, manifest) else None


def manifest_of(config: Config) -> dict[str, Any]:
    """Say what a mixture of the texts as they are now would be built from."""
    return _state(config)[2]


def _state(config: Config) -> tuple[Path, list[corpus.File], dict[str, Any], Fingerprints]:
    """Say where the mixture lies, what it is made of, and what its manifest should be."""
    folder = mixture_folder(config.data.processed_data_file)
    files = _files(config)
    fingerprints = Fingerprints(folder)
    manifest = make_manifest(config, files, _lexicon(config), fingerprints)
    return folder, files, manifest, fingerprints


def _is_current(folder: Path, manifest: dict[str, Any]) -> bool:
    whole = all((folder / name).is_file() for name in FILES - {SEEN})
    return whole and read_manifest(folder) == manifest


def _files(config: Config) -> list[corpus.File]:
    data_dir = locate(config.data.data_dir)
    general = None if config.data.general_file is None else locate(config.data.general_file)
    if general is not None and not general.exists():
        raise DataError(f"data.general_file {general}: no such file or folder")
    old = Path(config.data.processed_data_file)
    novels = old if old.suffix == ".jsonl" and old.is_file() else None
    if novels:
        log.info("%s is read as input in place of the novels in %s", old, data_dir)
    lexicon = None if config.data.lexicon is None else locate(config.data.lexicon)
    files = corpus.find_files(data_dir, general, novels, lexicon)
    names = {file.path.name for file in files}
    for key, named in (("encoding", config.data.encoding), ("weights", config.data.weights)):
        if unknown := sorted(set(named) - names):
            raise ConfigError(f"data.{key}: no file is called {', '.join(unknown)}")
    return files


def _lexicon(config: Config) -> tuple[str, ...]:
    name = config.data.lexicon
    return () if name is None else corpus.read_lexicon(locate(name))


def _refuse_strangers(folder: Path) -> None:
    """Refuse to replace a folder that holds anything but a mixture."""
    strangers = folder.is_file() or {path.name for path in folder.glob("*")} - FILES
    if strangers:
        raise ConfigError(
            f"data.processed_data_file {folder}: not a mixture, so it is left alone; name another"
        )
    if folder.exists():
        log.info("%s: the texts or settings have changed, so it is built anew", folder)


def _build(staging: Path, config: Config, files: list[corpus.File]) -> None:
    """Write everything but the manifest."""
    with Texts(staging / "texts") as texts:
        with _stage("reading and cleaning"):
            outline, accounts = prepare.read(files, texts, config.data)
        with _stage("deduplicating"):
            same_books, repeats = prepare.deduplicate(outline, texts, config)
        with _stage("comparing with held-out text"):
            found, left = prepare.keep_apart(outline, texts)
        with _stage("loading the tokenizer"):
            tokenizer = load_tokenizer(config.model.model_name_or_path)
            encode = Encoder(tokenizer, corpus.Segmenter(_lexicon(config)))
        with _stage("tokenizing"):
            pieces, epochs = _tokenize(staging, outline, texts, encode, config)
        with _stage("writing"):
            pieces.to_parquet(staging / "windows.parquet")
            _mark_unused(outline, pieces)
            _write_documents(staging / "documents.parquet", outline, texts)
    (staging / "texts").unlink()
    report = {
        "files": [_account(account) for account in accounts],
        "same_books": [asdict(same) for same in same_books],
        "repeated_paragraphs": repeats,
        "shared_with_held_out": {"found": asdict(found), "left": asdict(left)},
        "general_epochs": epochs,
    }
    _write_json(staging / "preparation.json", report)


@contextmanager
def _stage(name: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    log.debug("%s: %.2f s", name, time.perf_counter() - start)


def _tokenize(
    staging: Path, outline: pd.DataFrame, texts: Texts, encode: Encoder, config: Config
) -> tuple[pd.DataFrame, float]:
    """Tokenize what the windows need, general training text last and only as far as it is needed.

    Returns the pieces, in windows, and how many epochs of the general text the ratio takes.
    """
    settings, seed = config.data, config.training.seed
    lengths = outline["characters"].to_numpy()
    times = windows.copies(outline["weight"].to_numpy(), seed)
    general = (outline["source"] == "general") & (outline["split"] == TRAIN)
    first = outline.index[outline["split"].isin([TRAIN, VALIDATION]) & ~general]
    order = windows.keyed(outline.index[general], seed)
    with (
        TokenWriter(staging, texts, len(outline), encode) as writer,
        tqdm(desc="tokenizing", unit="character", unit_scale=True) as bar,
    ):
        for number in writer.write(first):
            bar.update(int(lengths[number]))
        novels = windows.cut(outline, writer.start, writer.length, settings)
        wanted = windows.wanted_general(windows.repeat(novels, times), settings.general_ratio)
        enough = wanted + settings.max_length
        for number in writer.write(order) if wanted else ():
            bar.update(int(lengths[number]))
            if writer.length[number] >= windows.shortest(settings):
                enough -= times[number] * writer.length[number]
            if enough < 0:
                break
    pieces = windows.repeat(windows.cut(outline, writer.start, writer.length, settings), times)
    if not ((pieces["source"] == "wuxia") & (pieces["split"] == TRAIN)).any():
        raise DataError(
            "no training text is left: data.min_length or data.weights leave all of it out"
        )
    read_share = lengths[order][writer.length[order] > 0].sum() / max(1, lengths[order].sum())
    epochs = windows.general_epochs(pieces, wanted, read_share, settings)
    return windows.pack(windows.choose_general(pieces, wanted, seed), settings.max_length), epochs


def _mark_unused(outline: pd.DataFrame, pieces: pd.DataFrame) -> None:
    """Say of training documents that no window holds that they are not used."""
    idle = (outline["split"] == TRAIN) & ~outline.index.isin(pieces["document"])
    outline.loc[idle, "split"] = UNUSED


def _write_documents(path: Path, outline: pd.DataFrame, texts: Texts) -> None:
    """Write the outline with the texts, some of them at a time."""
    import pyarrow as pa
    from pyarrow import parquet

    group = outline["characters"].cumsum() // ROW_GROUP
    columns = outline[OUTLINE]
    schema = pa.Schema.from_pandas(columns.assign(text="").head(1), preserve_index=False)
    with parquet.ParquetWriter(path, schema) as writer:
        for _, rows in columns.groupby(group):
            table = rows.assign(text=[texts[number] for number in rows.index])
            writer.write_table(pa.Table.from_pandas(table, schema, preserve_index=False))


def _account(account: corpus.Account) -> dict[str, Any]:
    values, file = asdict(account), account.file
    del values["file"]
    values["refused"] = account.refused.removeprefix(f"{file.path}: ")
    return {"path": file.name, "source": file.source, "book": file.book, **values}


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False, indent=1), encoding="utf-8")
