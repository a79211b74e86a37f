"""From files to the mixture folder, stage by stage; texts are read a block at a time.

The stages stand below in the order in which `_read_texts` and `_build` call them. They share
`texts`, which holds the documents' texts on disk, and `outline`, a table with a row for each
document but without its text: reading fills in `source`, `book`, `chapter`, `characters` and
`weight`; splitting fills in `split`.
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
from wuxia_core.mixing.holdout import describe_split, join_series, split
from wuxia_core.mixing.store import TRAIN, UNUSED, VALIDATION, Mixture, Texts
from wuxia_core.model import base_path, load_tokenizer, tokenizer_files

logger = logging.getLogger(__name__)

ROW_GROUP = 16_000_000  # characters of documents.parquet written at a time
# Settings of how texts are cut and mixed; the texts as they are read do not depend on them.
WINDOW_SETTINGS = {"general_ratio", "max_general_epochs", "max_length", "min_length", "stride"}
REPEATS_SHOWN = 10  # repeated paragraphs kept as examples


def mix(config: Config) -> Mixture:
    """Build the mixture folder, or open it if its inputs and settings have not changed.

    Raises
    ------
    DataError
        Where there is nothing to train on, or too little general text for the ratio.
    ConfigError
        Where `data.processed_data_file` is a folder that is not a mixture, or a mixture that a run
        uses, or where a file that `data.encoding` or `data.weights` names does not exist.
    """
    files = find_texts(config)
    manifest = _manifest(config, files)
    folder = store.mixture_folder(config.data.processed_data_file)
    if not store.is_built(folder, manifest):
        _refuse_other_folder(folder)
        with store.locked(folder):
            if not store.is_built(folder, manifest):  # another launcher may have built it
                with store.replaceable(folder):
                    texts_folder = _read_texts(config, files, manifest, folder)
                    with store.staged(folder) as staging:
                        _build(config, manifest, texts_folder, staging)
                    shutil.rmtree(texts_folder)
    mixture = store.open_mixture(folder)
    if "general" not in set(mixture.report["source"]):
        warn_without_general(config)
    return mixture


def warn_without_general(config: Config) -> None:
    """Log a warning: without general text the model forgets; name some, or raise its ratio."""
    warning = "no general text: nothing protects the model from forgetting what it knows (降智)"
    remedy = "name some as --general or data.general_file"
    remedy = remedy if config.data.general_ratio else "raise data.general_ratio"
    logger.warning("%s; %s", warning, remedy)


def current_mixture(config: Config) -> Mixture | None:
    """Open the mixture if it exists and its inputs and settings have not changed, else None."""
    folder = store.mixture_folder(config.data.processed_data_file)
    if not folder.exists():
        return None  # without the manifest, which would need the tokenizer
    return store.open_mixture(folder) if store.is_built(folder, manifest_of(config)) else None


def manifest_of(config: Config) -> dict[str, Any]:
    """Describe the mixture that `mix` would make of the settings and the files as they are now."""
    return _manifest(config, find_texts(config))


def find_texts(config: Config) -> list[corpus.File]:
    """Find the files of the novels and of the general text.

    Raises `DataError` where one of these is missing, or the general text is far too short;
    `ConfigError` where a file that `data.encoding` or `data.weights` names does not exist.
    """
    settings = config.data
    paths = (settings.general_file, settings.lexicon)
    general, lexicon = (None if path is None else locate(path) for path in paths)
    if general is not None and not general.exists():
        raise DataError(f"data.general_file {general}: no such file or folder")
    data_dir, processed = locate(settings.data_dir), Path(settings.processed_data_file)
    # in older configs this file is the input
    novels = processed if processed.suffix == ".jsonl" and processed.is_file() else None
    if novels:
        logger.info("%s is read as input in place of the novels in %s", novels, data_dir)
    files = join_series(corpus.find_files(data_dir, general, novels, lexicon))
    for key, names in (("encoding", settings.encoding), ("weights", settings.weights)):
        if unknown := sorted(set(names) - {file.place.name for file in files}):
            raise ConfigError(f"data.{key}: no file is called {', '.join(unknown)}")
    windows.check_sizes(files, settings)
    return files


def _lexicon(config: Config) -> tuple[str, ...]:
    """Read the words that the segmenter must not split; none if no lexicon is set."""
    path = config.data.lexicon
    return () if path is None else corpus.read_lexicon(locate(path))


def _manifest(config: Config, files: list[corpus.File]) -> dict[str, Any]:
    """Describe everything that the content of a mixture depends on: settings, and hashes of files.

    Two equal manifests describe the same mixture.
    """
    paths = {"data_dir", "general_file", "processed_data_file", "lexicon"}  # hashed instead
    lexicon = "\n".join(sorted(_lexicon(config)))
    tokenizer = tokenizer_files(base_path(config.model))
    hashes = {path: _sha256(path) for path in {file.path for file in files if not file.left_out}}
    content = {file: file.left_out or hashes[file.path] for file in files}
    return {
        "format": store.FORMAT,
        "seed": config.training.seed,
        "data": config.data.model_dump(exclude=paths),
        "lexicon": hashlib.sha256(lexicon.encode()).hexdigest(),
        "tokenizer": {path.name: _sha256(path) for path in tokenizer},
        "inputs": [
            {"name": file.name, "source": file.source, "book": file.book, "sha256": content[file]}
            for file in files
        ],
    }


def _sha256(path: Path) -> str:
    """Hash a file, or return "unreadable"; reading its text later reports the error."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        return "unreadable"


def _refuse_other_folder(folder: Path) -> None:
    """Raise `ConfigError` if a folder that would be replaced holds anything but a mixture."""
    names = {path.name for path in folder.glob("*")} if not folder.is_file() else {""}
    # an older mixture has inputs.json too
    if names - store.FILES - {"inputs.json"} or (names and store.read_manifest(folder) is None):
        key = "data.processed_data_file"
        raise ConfigError(f"{key} {folder}: not a mixture, so it is left alone; name another")
    if folder.exists():
        logger.info("%s: the texts or settings have changed, so it is built anew", folder)


def _read_texts(
    config: Config, files: list[corpus.File], manifest: dict[str, Any], folder: Path
) -> Path:
    """Read, clean and split all texts; write them into a folder beside `folder` and return it.

    `mix` deletes the returned folder once the mixture is built. If the build fails, the next one
    takes the texts from there instead of reading them again.
    """
    texts_folder = folder.with_name(f".{folder.name}-texts")
    data = {key: value for key, value in manifest["data"].items() if key not in WINDOW_SETTINGS}
    texts_manifest = {**manifest, "data": data, "tokenizer": None, "lexicon": None}
    if store.read_manifest(texts_folder) == texts_manifest:
        logger.info("the texts are taken from %s, as they were read last time", texts_folder)
        return texts_folder
    reports = [corpus.FileReport(file) for file in files]
    with store.staged(texts_folder) as staging, (staging / store.TEXTS).open("w+b") as file:
        texts = Texts(file)
        outline = _read_files(reports, texts, config.data)
        findings = _deduplicate(outline, texts, config) | _remove_leakage(outline, texts)
        outline.assign(span=texts.spans).to_parquet(staging / store.DOCUMENTS)
        rows = [_file_row(report) for report in reports]
        _write_json(staging / store.PREPARATION, {"files": rows, **findings})
        _write_json(staging / store.MANIFEST, texts_manifest)
    return texts_folder


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False, indent=1), encoding="utf-8")


def _build(config: Config, manifest: dict[str, Any], texts_folder: Path, staging: Path) -> None:
    """Write a mixture of the texts in `texts_folder` into the folder `staging`."""
    outline = pd.read_parquet(texts_folder / store.DOCUMENTS)
    with (texts_folder / store.TEXTS).open("rb") as file:
        texts = Texts(file, outline["span"])
        tokenizer = load_tokenizer(base_path(config.model))
        encode = windows.Encoder(tokenizer, corpus.Segmenter(_lexicon(config)))
        # this also writes the documents' tokens into `staging`
        packed, general_epochs = _make_windows(outline, texts, encode, config, staging)
        packed.to_parquet(staging / store.WINDOWS)
        unused = (outline["split"] == TRAIN) & ~outline.index.isin(packed["document"])
        outline.loc[unused, "split"] = UNUSED
        _write_documents(outline, texts, staging / store.DOCUMENTS)
    findings = store.read_json(texts_folder / store.PREPARATION) or {}
    _write_json(staging / store.PREPARATION, findings | {"general_epochs": general_epochs})
    _write_json(staging / store.MANIFEST, manifest)


def _read_files(reports: list[corpus.FileReport], texts: Texts, data: DataConfig) -> pd.DataFrame:
    """Read and clean all files into `texts`; fill in their reports; return the outline.

    Raises `DataError` where no novel, or none of the general text, is left.
    """
    skip = frozenset(data.skip_cleaning) | (set() if data.curly_quotes else corpus.OFF)
    rows: list[tuple[Any, ...]] = []
    for report in tqdm(reports, messages("bars")["reading"], leave=False):
        name = report.file.place.name
        encoding, weight = data.encoding.get(name), data.weights.get(name, 1.0)
        for document in corpus.read_documents(report, encoding, skip, data.to_simplified):
            texts[len(rows)] = document.text
            rows.append((*document[:-1], len(document.text), weight))  # all fields but the text
        if report.skip_reason:
            logger.warning("left out: %s", report.skip_reason)
    for source, use in (("wuxia", "train on"), ("general", "mix in from data.general_file")):
        of_source = [report for report in reports if report.file.source == source]
        if of_source and not any(report.documents for report in of_source):
            reasons = "\n".join(report.skip_reason for report in of_source)
            raise DataError(f"nothing is left to {use}:\n{reasons}")
    return pd.DataFrame(rows, columns=["source", "book", "chapter", "characters", "weight"])


def _file_row(report: corpus.FileReport) -> dict[str, Any]:
    """Turn a file's report into its row of preparation.json; `refused` says why it is left out."""
    values, file = asdict(report), report.file
    del values["file"]
    refused = values.pop("skip_reason").removeprefix(f"{file.place}: ")
    values["refused"] = refused or file.left_out
    return {"path": file.name, "source": file.source, "book": file.book, **values}


def _deduplicate(outline: pd.DataFrame, texts: Texts, config: Config) -> dict[str, Any]:
    """Leave out copies of books and paragraphs, then fill in `split`.

    Returns what was found, for preparation.json. A book that is another one's copy is left out as a
    whole; a paragraph that stands twice is taken out of one of its documents.
    """
    index = corpus.DuplicateIndex()
    novels = outline["source"] == "wuxia"
    if config.data.deduplicate:
        bar = tqdm(outline.itertuples(), messages("bars")["duplicates"], len(outline), leave=False)
        for row in bar:
            book = row.book if row.source == "wuxia" else None
            index.add(texts[row.Index], book, row.chapter)
    same_books = index.same_books()
    for copy in same_books:
        logger.warning(f"{copy.book} is left out: {copy.share:.0%} of it is in {copy.kept}")
    left_out = novels & outline["book"].isin([copy.book for copy in same_books])
    repeats = _drop_repeats(index.same_paragraphs(outline.index[left_out]), outline, texts)
    left_out |= outline["characters"] == 0
    outline["split"] = split(outline, left_out, config.data.val_ratio, config.training.seed)
    for book, rows in outline[outline["weight"] != 1].groupby("book"):
        if not (rows["split"] == TRAIN).any():
            logger.warning("data.weights: %s is not trained on, so its weight does nothing", book)
    held_out = describe_split(outline, config.data.val_ratio)
    copies = [asdict(copy) for copy in same_books]
    return {"same_books": copies, "repeated_paragraphs": repeats, "held_out": held_out}


def _drop_repeats(repeats: pd.DataFrame, outline: pd.DataFrame, texts: Texts) -> dict[str, Any]:
    """Take repeated paragraphs out of their documents; count them and show some.

    `repeats` has a row for each paragraph that goes: its `document` and `line`, and the
    `kept_document` in which it stays.
    """
    names = outline["book"] + " · " + outline["chapter"]
    examples = [
        [names[row.document], names[row.kept_document], texts[row.document].split("\n")[row.line]]
        for row in repeats.iloc[:: len(repeats) // REPEATS_SHOWN + 1].itertuples()
    ]
    removed = 0  # characters
    for number, rows in repeats.groupby("document"):
        lines = texts[number].split("\n")
        dropped = set(rows["line"])
        removed += sum(len(lines[line]) for line in dropped)
        texts[number] = "\n".join(line for n, line in enumerate(lines) if n not in dropped)
        outline.at[number, "characters"] = len(texts[number])
    books = Counter(outline["book"].iloc[repeats["document"]])
    return {"count": len(repeats), "characters": removed, "books": books, "examples": examples}


def _remove_leakage(outline: pd.DataFrame, texts: Texts) -> dict[str, Any]:
    """Drop the sentences of held-out texts that training texts have too.

    Returns the counts of shared runs of characters before (`found`) and after (`left`).
    """
    train, held_out = (outline.index[outline["split"] == name] for name in (TRAIN, VALIDATION))
    ngrams = corpus.HeldOutNgrams(texts[number] for number in held_out)
    for number in tqdm(train, messages("bars")["leakage"], leave=False):
        ngrams.update(texts[number])
    before, after = corpus.Leakage(), corpus.Leakage()
    for number in held_out:
        shared = ngrams.shared(texts[number])
        before.add(shared)
        while shared.any():  # the text around a dropped sentence may make a shared run
            texts[number] = corpus.drop_sentences(texts[number], shared)
            outline.at[number, "characters"] = len(texts[number])
            shared = ngrams.shared(texts[number])
        after.add(shared)
    if before.shared:
        share = before.shared / before.runs
        logger.info(f"{share:.2%} of held-out text stands in training text: left out")
    return {"shared_with_held_out": {"found": asdict(before), "left": asdict(after)}}


def _make_windows(
    outline: pd.DataFrame, texts: Texts, encode: windows.Encoder, config: Config, staging: Path
) -> tuple[pd.DataFrame, float]:
    """Tokenize the documents, write tokens and word starts into `staging`, and make the windows.

    General training text comes last and only as far as it is needed. Returns the chunks packed into
    windows, as `windows.pack` does, and how often the general text is read in one epoch.
    """
    settings, seed = config.data, config.training.seed
    train = outline["split"] == TRAIN
    counts = windows.repeat_counts(outline["weight"].to_numpy(), seed)
    documents = outline.assign(copies=np.where(train, counts, 1))
    is_general = train & (outline["source"] == "general")
    not_general = documents[(train | (outline["split"] == VALIDATION)) & ~is_general]
    with (
        (staging / store.TOKENS).open("wb") as tokens,
        (staging / store.WORD_STARTS).open("wb") as word_starts,
    ):
        windows.write_headers(tokens, word_starts)
        write = partial(windows.write_chunks, texts, encode, (tokens, word_starts), settings)
        chunks, _ = write(not_general)
        if not (chunks["split"] == TRAIN).any():
            raise DataError("data.min_length, data.weights: they leave no training text")
        budget = windows.general_budget(chunks, settings.general_ratio)
        drawn = store.shuffled(outline.index[is_general], seed) if budget else []
        # one window more, so that `choose_general` can end on either side of the budget
        general, share = write(documents.loc[drawn], budget + settings.max_length)
        windows.write_headers(tokens, word_starts)
    epochs = 0.0
    if len(general):
        epochs = windows.general_epochs(general, budget, share, settings)
        chunks = pd.concat([chunks, windows.choose_general(general, budget)])
    return windows.pack(chunks, settings.max_length), epochs


def _write_documents(outline: pd.DataFrame, texts: Texts, path: Path) -> None:
    """Write documents.parquet: the outline's columns and the texts, which are read in groups."""
    import pyarrow as pa
    from pyarrow import parquet

    columns = outline[store.OUTLINE]
    schema = pa.Schema.from_pandas(columns.assign(text="").head(1), preserve_index=False)
    with parquet.ParquetWriter(path, schema) as writer:
        for _, rows in columns.groupby(outline["characters"].cumsum() // ROW_GROUP):
            table = rows.assign(text=[texts[number] for number in rows.index])
            writer.write_table(pa.Table.from_pandas(table, schema, preserve_index=False))
