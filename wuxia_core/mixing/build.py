"""From files to the mixture folder, stage by stage; texts are read a block at a time.

The stages stand below in the order in which `_build` calls them. They share `texts`, which holds
the documents' texts on disk, and the outline, a table with a row a document: reading fills in
`source`, `book`, `chapter`, `characters` and `weight`; splitting fills in `split`.
"""

import hashlib
import json
import logging
import shutil
from collections import Counter
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from tqdm import tqdm

from wuxia_core import corpus
from wuxia_core.config import Config, DataConfig, locate
from wuxia_core.errors import ConfigError, DataError
from wuxia_core.messages import messages
from wuxia_core.mixing import store, windows
from wuxia_core.mixing.holdout import describe_split, split, with_whole_folders
from wuxia_core.mixing.store import TRAIN, UNUSED, VALIDATION, Mixture, Texts
from wuxia_core.model import base_path, load_tokenizer, tokenizer_files

logger = logging.getLogger(__name__)

ROW_GROUP = 16_000_000  # characters of documents.parquet written at a time
# Settings that say nothing of the texts, but of how they are cut and mixed.
LATER = {"general_ratio", "max_general_epochs", "max_length", "min_length", "stride"}
REPEATS_SHOWN = 10  # repeated paragraphs kept as examples


def mix(config: Config) -> Mixture:
    """Build the mixture folder, or open it where nothing has changed.

    Raises
    ------
    DataError
        Where there is nothing to train on, or too little general text for the ratio.
    ConfigError
        Where `data.processed_data_file` is a folder that is not a mixture, or one that a run uses,
        or a file that `data.encoding` or `data.weights` names does not exist.
    """
    files = find_texts(config)
    manifest = _manifest(config, files)
    folder = store.mixture_folder(config.data.processed_data_file)
    if not store.is_built(folder, manifest):
        _refuse_strangers(folder)
        with store.locked(folder):
            if not store.is_built(folder, manifest):  # another launcher may have built it
                with store.replaceable(folder):
                    kept = _read_once(config, files, manifest, folder)
                    with store.staged(folder) as new:
                        _build(config, manifest, kept, new)
                    shutil.rmtree(kept)
    mixture = store.open_mixture(folder)
    if "general" not in set(mixture.report["source"]):
        warn_without_general(config)
    return mixture


def warn_without_general(config: Config) -> None:
    """Say what it means that there is no general text, and where to name some."""
    what = "no general text: nothing protects the model from forgetting what it knows (降智)"
    remedy = "name some as --general or data.general_file"
    remedy = remedy if config.data.general_ratio else "raise data.general_ratio"
    logger.warning("%s; %s", what, remedy)


def current_mixture(config: Config) -> Mixture | None:
    """Open the mixture where it is there and nothing has changed, else None."""
    folder = store.mixture_folder(config.data.processed_data_file)
    if not folder.exists():
        return None  # and no tokenizer is asked for
    return store.open_mixture(folder) if store.is_built(folder, manifest_of(config)) else None


def manifest_of(config: Config) -> dict[str, Any]:
    """Say what a mixture of the texts as they are now would be built from."""
    return _manifest(config, find_texts(config))


def find_texts(config: Config) -> list[corpus.File]:
    """Find the novels and the general text.

    Raises `DataError` where one of them is not there, or the general text is far too short;
    `ConfigError` where a file that `data.encoding` or `data.weights` names is not there.
    """
    settings = config.data
    named = (settings.general_file, settings.lexicon)
    general, lexicon = (None if path is None else locate(path) for path in named)
    if general is not None and not general.exists():
        raise DataError(f"data.general_file {general}: no such file or folder")
    data_dir, old = locate(settings.data_dir), Path(settings.processed_data_file)
    novels = old if old.suffix == ".jsonl" and old.is_file() else None
    if novels:
        logger.info("%s is read as input in place of the novels in %s", old, data_dir)
    files = with_whole_folders(corpus.find_files(data_dir, general, novels, lexicon))
    for key, names in (("encoding", settings.encoding), ("weights", settings.weights)):
        if unknown := sorted(set(names) - {file.place.name for file in files}):
            raise ConfigError(f"data.{key}: no file is called {', '.join(unknown)}")
    windows.check_sizes(files, settings)
    return files


def _lexicon(config: Config) -> tuple[str, ...]:
    path = config.data.lexicon
    return () if path is None else corpus.read_lexicon(locate(path))


def _manifest(config: Config, files: list[corpus.File]) -> dict[str, Any]:
    """Name everything that the content of a mixture depends on."""
    paths = {"data_dir", "general_file", "processed_data_file", "lexicon"}
    lexicon = "\n".join(sorted(_lexicon(config)))
    tokenizer = tokenizer_files(base_path(config.model))
    hashes = {path: _sha256(path) for path in {f.path for f in files if not f.left_out}}
    content = {f: f.left_out or hashes[f.path] for f in files}
    return {
        "format": store.FORMAT,
        "seed": config.training.seed,
        "data": config.data.model_dump(exclude=paths),
        "lexicon": hashlib.sha256(lexicon.encode()).hexdigest(),
        "tokenizer": {path.name: _sha256(path) for path in tokenizer},
        "inputs": [
            {"name": f.name, "source": f.source, "book": f.book, "sha256": content[f]}
            for f in files
        ],
    }


def _sha256(path: Path) -> str:
    """Hash a file; one that cannot be read is left to the reader to complain of."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        return "unreadable"


def _refuse_strangers(folder: Path) -> None:
    """Refuse to replace a folder that holds anything but a mixture."""
    there = {path.name for path in folder.glob("*")} if not folder.is_file() else {""}
    if there - store.FILES - {"inputs.json"} or (there and store.read_manifest(folder) is None):
        key = "data.processed_data_file"
        raise ConfigError(f"{key} {folder}: not a mixture, so it is left alone; name another")
    if folder.exists():
        logger.info("%s: the texts or settings have changed, so it is built anew", folder)


def _read_once(
    config: Config, files: list[corpus.File], manifest: dict[str, Any], folder: Path
) -> Path:
    """Write what is read of the texts into a folder beside the mixture's, and return it.

    It is kept until there is a mixture: what comes later may fail, and is then tried again.
    """
    kept = folder.with_name(f".{folder.name}-texts")
    data = {key: value for key, value in manifest["data"].items() if key not in LATER}
    wanted = {**manifest, "data": data, "tokenizer": None, "lexicon": None}
    if store.read_manifest(kept) == wanted:
        logger.info("the texts are taken from %s, as they were read last time", kept)
        return kept
    reports = [corpus.FileReport(file) for file in files]
    with store.staged(kept) as new, (new / store.TEXTS).open("w+b") as file:
        texts = Texts(file)
        outline = _read(reports, texts, config.data)
        found = _deduplicate(outline, texts, config) | _remove_leakage(outline, texts)
        outline.assign(span=texts.spans).to_parquet(new / store.DOCUMENTS)
        rows = [_file_row(report) for report in reports]
        _write_json(new / store.PREPARATION, {"files": rows, **found})
        _write_json(new / store.MANIFEST, wanted)
    return kept


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False, indent=1), encoding="utf-8")


def _build(config: Config, manifest: dict[str, Any], kept: Path, new: Path) -> None:
    """Write a mixture of texts that were read into the folder `new`."""
    outline = pd.read_parquet(kept / store.DOCUMENTS)
    with (kept / store.TEXTS).open("rb") as file:
        texts = Texts(file, outline["span"])
        tokenizer = load_tokenizer(base_path(config.model))
        encode = windows.Encoder(tokenizer, corpus.Segmenter(_lexicon(config)))
        packed, epochs = _make_windows(outline, texts, encode, config, new)
        packed.to_parquet(new / store.WINDOWS)
        unused = (outline["split"] == TRAIN) & ~outline.index.isin(packed["document"])
        outline.loc[unused, "split"] = UNUSED
        _write_documents(outline, texts, new / store.DOCUMENTS)
    found = store.read_json(kept / store.PREPARATION) or {}
    _write_json(new / store.PREPARATION, found | {"general_epochs": epochs})
    _write_json(new / store.MANIFEST, manifest)


def _read(reports: list[corpus.FileReport], texts: Texts, settings: DataConfig) -> pd.DataFrame:
    """Read and clean all files; what became of each goes into its report."""
    skip = frozenset(settings.skip_cleaning) | (set() if settings.curly_quotes else corpus.OFF)
    rows: list[tuple[Any, ...]] = []
    for report in tqdm(reports, messages("bars")["reading"], leave=False):
        name = report.file.place.name
        encoding, weight = settings.encoding.get(name), settings.weights.get(name, 1.0)
        for document in corpus.read_documents(report, encoding, skip, settings.to_simplified):
            texts[len(rows)] = document.text
            rows.append((*document[:-1], len(document.text), weight))
        if report.skip_reason:
            logger.warning("left out: %s", report.skip_reason)
    for source, what in (("wuxia", "train on"), ("general", "mix in from data.general_file")):
        there = [report for report in reports if report.file.source == source]
        if there and not any(report.documents for report in there):
            reasons = "\n".join(report.skip_reason for report in there)
            raise DataError(f"nothing is left to {what}:\n{reasons}")
    return pd.DataFrame(rows, columns=["source", "book", "chapter", "characters", "weight"])


def _file_row(report: corpus.FileReport) -> dict[str, Any]:
    values, file = asdict(report), report.file
    del values["file"]
    refused = values.pop("skip_reason").removeprefix(f"{file.place}: ")
    values["refused"] = refused or file.left_out
    return {"path": file.name, "source": file.source, "book": file.book, **values}


def _deduplicate(outline: pd.DataFrame, texts: Texts, config: Config) -> dict[str, Any]:
    """Leave out what is there twice, then split; tell what was found."""
    index = corpus.DuplicateIndex()
    novels = outline["source"] == "wuxia"
    if config.data.deduplicate:
        said = messages("bars")["duplicates"]
        for row in tqdm(outline.itertuples(), said, len(outline), leave=False):
            book = row.book if row.source == "wuxia" else None
            index.add(texts[row.Index], book, row.chapter)
    same_books = index.same_books()
    for same in same_books:
        logger.warning(f"{same.book} is left out: {same.share:.0%} of it is in {same.kept}")
    left_out = novels & outline["book"].isin([same.book for same in same_books])
    repeats = _drop_repeats(index.same_paragraphs(outline.index[left_out]), outline, texts)
    left_out |= outline["characters"] == 0
    outline["split"] = split(outline, left_out, config.data.val_ratio, config.training.seed)
    for book, rows in outline[outline["weight"] != 1].groupby("book"):
        if not (rows["split"] == TRAIN).any():
            logger.warning("data.weights: %s is not trained on, so its weight does nothing", book)
    held_out = describe_split(outline, config.data.val_ratio)
    copies = [asdict(same) for same in same_books]
    return {"same_books": copies, "repeated_paragraphs": repeats, "held_out": held_out}


def _drop_repeats(repeats: pd.DataFrame, outline: pd.DataFrame, texts: Texts) -> dict[str, Any]:
    """Take repeated paragraphs out of their documents; say how many and show some."""
    names = outline["book"] + " · " + outline["chapter"]
    examples = [
        [names[row.document], names[row.kept_document], texts[row.document].split("\n")[row.line]]
        for row in repeats.iloc[:: len(repeats) // REPEATS_SHOWN + 1].itertuples()
    ]
    removed = 0
    for number, rows in repeats.groupby("document"):
        lines = texts[number].split("\n")
        gone = set(rows["line"])
        removed += sum(len(lines[line]) for line in gone)
        texts[number] = "\n".join(line for n, line in enumerate(lines) if n not in gone)
        outline.at[number, "characters"] = len(texts[number])
    books = Counter(outline["book"].iloc[repeats["document"]])
    return {"count": len(repeats), "characters": removed, "books": books, "examples": examples}


def _remove_leakage(outline: pd.DataFrame, texts: Texts) -> dict[str, Any]:
    """Take out of held-out text what stands in training text too; say what was found and left."""
    train, held_out = (outline.index[outline["split"] == name] for name in (TRAIN, VALIDATION))
    ngrams = corpus.HeldOutNgrams(texts[number] for number in held_out)
    for number in tqdm(train, messages("bars")["leakage"], leave=False):
        ngrams.update(texts[number])
    found, left = corpus.Leakage(), corpus.Leakage()
    for number in held_out:
        shared = ngrams.shared(texts[number])
        found.add(shared)
        while shared.any():  # neighbours of what is dropped may make a shared run again
            texts[number] = corpus.drop_sentences(texts[number], shared)
            outline.at[number, "characters"] = len(texts[number])
            shared = ngrams.shared(texts[number])
        left.add(shared)
    if found.shared:
        share = found.shared / found.runs
        logger.info(f"{share:.2%} of held-out text stands in training text: left out")
    return {"shared_with_held_out": {"found": asdict(found), "left": asdict(left)}}


def _make_windows(
    outline: pd.DataFrame, texts: Texts, encode: windows.Encoder, config: Config, staging: Path
) -> tuple[pd.DataFrame, float]:
    """Tokenize what the windows need, write the tokens, and pack their chunks into windows.

    General training text comes last and only as far as it is needed. Returns the windows, and how
    many epochs of the general text the ratio takes.
    """
    settings, seed = config.data, config.training.seed
    train = outline["split"] == TRAIN
    counts = windows.repeat_counts(outline["weight"].to_numpy(), seed)
    documents = outline.assign(copies=np.where(train, counts, 1))
    is_general = train & (outline["source"] == "general")
    others = documents[(train | (outline["split"] == VALIDATION)) & ~is_general]
    with (
        (staging / store.TOKENS).open("wb") as tokens,
        (staging / store.WORD_STARTS).open("wb") as word_starts,
    ):
        windows.write_headers(tokens, word_starts)
        write = partial(windows.write_chunks, texts, encode, (tokens, word_starts), settings)
        chunks, _ = write(others)
        if not (chunks["split"] == TRAIN).any():
            raise DataError("data.min_length, data.weights: they leave no training text")
        budget = windows.general_budget(chunks, settings.general_ratio)
        drawn = store.shuffled(outline.index[is_general], seed) if budget else []
        general, share = write(documents.loc[drawn], budget + settings.max_length)
        windows.write_headers(tokens, word_starts)
    epochs = 0.0
    if len(general):
        epochs = windows.general_epochs(general, budget, share, settings)
        chunks = pd.concat([chunks, windows.choose_general(general, budget)])
    return windows.pack(chunks, settings.max_length), epochs


def _write_documents(outline: pd.DataFrame, texts: Texts, path: Path) -> None:
    """Write the outline with the texts, some of them at a time."""
    import pyarrow as pa
    from pyarrow import parquet

    columns = outline[store.OUTLINE]
    schema = pa.Schema.from_pandas(columns.assign(text="").head(1), preserve_index=False)
    with parquet.ParquetWriter(path, schema) as writer:
        for _, rows in columns.groupby(outline["characters"].cumsum() // ROW_GROUP):
            table = rows.assign(text=[texts[number] for number in rows.index])
            writer.write_table(pa.Table.from_pandas(table, schema, preserve_index=False))
