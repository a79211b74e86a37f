"""From files to the mixture folder, stage by stage; texts are read a block at a time.

The stages stand below in the order in which `_prepare_texts` and `_build` call them. They share
`texts`, which holds the documents' texts on disk, and `outline`, a table with a row for each
document but without its text. Reading fills in the columns `source`, `book`, `chapter`,
`characters` and `weight`; splitting fills in `split`. A document's number, from 0 on, is its index
in both.
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
from wuxia_core.text import name_some

logger = logging.getLogger(__name__)

ROW_GROUP = 16_000_000  # characters of documents.parquet that are written at a time, about
# Keys of the config's section `data` on which the texts that `_prepare_texts` writes do not depend.
WINDOW_SETTINGS = {"general_ratio", "max_general_epochs", "max_length", "min_length", "stride"}
REPEATS_SHOWN = 10  # repeated paragraphs kept as examples, at most


def mix(config: Config) -> Mixture:
    """Open the mixture folder; build it first if it is missing, or its inputs or settings changed.

    Raises
    ------
    DataError
        Texts are missing, no text is left to train on, or there is too little general text for
        `data.general_ratio`.
    ConfigError
        The folder is to be built, but is not a mixture or is used by a run; a file that
        `data.encoding` or `data.weights` names does not exist; the lexicon is bad.
    MachineError
        The folder cannot be written, or the tokenizer cannot be loaded.
    """
    files = find_texts(config)
    manifest = _manifest(config, files)
    folder = store.mixture_folder(config.data.processed_data_file)
    mixture = store.open_built(folder, manifest)
    if mixture is None:
        _refuse_other_folder(folder)
        with store.locked(folder):
            # another launcher may have built it while this one waited for the lock
            if store.open_built(folder, manifest) is None:
                _replace(folder, config, files, manifest)
        mixture = store.open_mixture(folder)
    if "general" not in set(mixture.report["source"]):
        warn_without_general(config)
    return mixture


def _replace(
    folder: Path, config: Config, files: list[corpus.File], manifest: dict[str, Any]
) -> None:
    """Build the mixture that `manifest` describes, and put it in the place of `folder`.

    Raises `ConfigError` if a run uses the mixture in `folder`, and other errors as `mix` does.
    """
    with store.kept_unused(folder):
        texts_folder = _prepare_texts(config, files, manifest, folder)
        with store.staged(folder) as staging:
            _build(config, manifest, texts_folder, staging)
        shutil.rmtree(texts_folder)  # it stays if the build fails: the next build uses it


def warn_without_general(config: Config) -> None:
    """Log the warning that without general text the model forgets what it knows.

    The advice is to name general text or, if `data.general_ratio` is 0, to raise that.
    """
    warning = "no general text: nothing protects the model from forgetting what it knows (降智)"
    name_some = "name some as --general or data.general_file"
    remedy = name_some if config.data.general_ratio else "raise data.general_ratio"
    logger.warning("%s; %s", warning, remedy)


def current_mixture(config: Config) -> Mixture | None:
    """Open the mixture of `config`; None if it is missing, incomplete, or its inputs have changed.

    If the folder exists, raises `DataError`, `ConfigError` or `MachineError` for the reasons that
    `manifest_of` gives.
    """
    folder = store.mixture_folder(config.data.processed_data_file)
    # `manifest_of` may have to download the tokenizer: it is not called if there is no folder.
    return store.open_built(folder, manifest_of(config)) if folder.exists() else None


def manifest_of(config: Config) -> dict[str, Any]:
    """Describe the mixture that `mix` would make of `config` and of the files as they are now.

    Raises `DataError` if there is no novel, none of the general text that `config` names, or far
    too little of it; `ConfigError` if `data.encoding` or `data.weights` names a file that does not
    exist, or the lexicon is bad; `MachineError` if the tokenizer cannot be had.
    """
    return _manifest(config, find_texts(config))


def find_texts(config: Config) -> list[corpus.File]:
    """List the files of the novels and of the general text, and the files that are left out.

    They are in the order of `join_series`. Raises `DataError` if there is no novel, if
    `data.general_file` is set but has no text, or if the general text is far too short (see
    `windows.check_sizes`); `ConfigError` if any name in `data.encoding` or
    `data.weights` is no file's.
    """
    settings = config.data
    paths = (settings.general_file, settings.lexicon)
    general, lexicon = (None if path is None else locate(path) for path in paths)
    if general is not None and not general.exists():
        raise DataError(f"data.general_file {general}: no such file or folder")
    data_dir, processed = locate(settings.data_dir), Path(settings.processed_data_file)
    # in older configs this key names the input, a JSONL
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
    """Read the words of `data.lexicon`, which the segmenter keeps whole; () if it is None."""
    path = config.data.lexicon
    return () if path is None else corpus.read_lexicon(locate(path))


def _manifest(config: Config, files: list[corpus.File]) -> dict[str, Any]:
    """Describe all that the content of a mixture depends on: settings, and hashes of files.

    Two equal manifests describe the same mixture. A file that is left out has the reason in place
    of the hash.
    """
    # These paths are not in the manifest: what is read from them is hashed, wherever it is.
    paths = {"data_dir", "general_file", "processed_data_file", "lexicon"}
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
    """Hash a file; "unreadable" if it cannot be read: the reading of its text later warns why."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        return "unreadable"


def _refuse_other_folder(folder: Path) -> None:
    """Raise `ConfigError` if `folder`, which is to be replaced, holds anything but a mixture.

    Raises it too if `folder` is a file. If the folder exists and is not refused, logs that it is
    built anew.
    """
    # Names of files in the folder; if `folder` is a file, {""}: no mixture has that name.
    names = {path.name for path in folder.glob("*")} if not folder.is_file() else {""}
    # A mixture of an older version has inputs.json too.
    is_ours = names >= store.FILES or store.read_manifest(folder) is not None
    if names - store.FILES - {"inputs.json"} or (names and not is_ours):
        key = "data.processed_data_file"
        raise ConfigError(f"{key} {folder}: not a mixture, so it is left alone; name another")
    if folder.exists():
        logger.info("%s: damaged, or texts or settings have changed: it is built anew", folder)


def _prepare_texts(
    config: Config, files: list[corpus.File], manifest: dict[str, Any], folder: Path
) -> Path:
    """Write the texts, cleaned, without repeats, and split, into a folder; return that folder.

    It is beside `folder`: `data/.mixed-texts` for `data/mixed`. `_replace` deletes it once the
    mixture is built. If the build fails, the next build takes the texts from it, unless a file or a
    setting on which they depend has changed.
    """
    texts_folder = folder.with_name(f".{folder.name}-texts")
    # the manifest, without the settings and files on which only the windows depend
    data = {key: value for key, value in manifest["data"].items() if key not in WINDOW_SETTINGS}
    texts_manifest = {**manifest, "data": data, "tokenizer": None, "lexicon": None}
    if store.read_manifest(texts_folder) == texts_manifest:
        logger.info("the texts are taken from %s, as they were read last time", texts_folder)
        return texts_folder
    reports = [corpus.FileReport(file) for file in files]
    with store.staged(texts_folder) as staging, (staging / store.TEXTS).open("w+b") as file:
        texts = Texts(file)
        outline = _read_files(reports, texts, config.data)
        findings = _deduplicate_and_split(outline, texts, config)
        findings |= _remove_leakage(outline, texts)
        outline.assign(span=texts.spans).to_parquet(staging / store.DOCUMENTS)
        rows = [_file_row(report) for report in reports]
        _write_json(staging / store.PREPARATION, {"files": rows, **findings})
        _write_json(staging / store.MANIFEST, texts_manifest)
    return texts_folder


def _write_json(path: Path, value: dict[str, Any]) -> None:
    """Write a JSON file in UTF-8; Chinese characters are not escaped."""
    path.write_text(json.dumps(value, ensure_ascii=False, indent=1), encoding="utf-8")


def _build(config: Config, manifest: dict[str, Any], texts_folder: Path, staging: Path) -> None:
    """Write the mixture that `manifest` describes into the folder `staging`.

    `texts_folder` is the folder that `_prepare_texts` returns.
    """
    outline = pd.read_parquet(texts_folder / store.DOCUMENTS)
    with (texts_folder / store.TEXTS).open("rb") as file:
        texts = Texts(file, outline["span"])
        tokenizer = load_tokenizer(base_path(config.model))
        encode = windows.Encoder(tokenizer, corpus.Segmenter(_lexicon(config)))
        # This also writes the documents' tokens and word starts into `staging`. `general_epochs`
        # is how often the general text is read while the novels are read once.
        packed, general_epochs = _make_windows(outline, texts, encode, config, staging)
        packed.to_parquet(staging / store.WINDOWS)
        # training documents that have no chunk in any window
        unused = (outline["split"] == TRAIN) & ~outline.index.isin(packed["document"])
        outline.loc[unused, "split"] = UNUSED
        _write_documents(outline, texts, staging / store.DOCUMENTS)
    findings = store.read_json(texts_folder / store.PREPARATION) or {}
    _write_json(staging / store.PREPARATION, findings | {"general_epochs": general_epochs})
    _write_json(staging / store.MANIFEST, manifest)


def _read_files(reports: list[corpus.FileReport], texts: Texts, data: DataConfig) -> pd.DataFrame:
    """Read and clean the files of `reports` into `texts`; fill in the reports; return the outline.

    Raises `DataError` if cleaning leaves no novel, if it leaves nothing of general text that was
    there, or if a line of JSONL is not an object with a `text`.
    """
    # corpus.OFF has the rule `quotes`, which is applied only if data.curly_quotes is true
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
    """Turn a file's report into the file's row of preparation.json.

    `refused` in the row says why the file, or the rest of it, is left out; "" if all of it is read.
    """
    values, file = asdict(report), report.file
    del values["file"]
    refused = values.pop("skip_reason").removeprefix(f"{file.place}: ")
    values["refused"] = refused or file.left_out
    return {"path": file.name, "source": file.source, "book": file.book, **values}


def _deduplicate_and_split(outline: pd.DataFrame, texts: Texts, config: Config) -> dict[str, Any]:
    """Leave out copies of books and of paragraphs in `outline` and `texts`, then fill in `split`.

    A book of which a better edition has half or more is left out as a whole; a paragraph that
    repeats another one is deleted from its document. Empty documents are left out. If
    `data.deduplicate` is false, only empty documents are left out.

    Returns what was found, for preparation.json: `same_books`, `repeated_paragraphs`, `held_out`,
    `traditional`.
    """
    index = corpus.DuplicateIndex()  # numbers documents as `outline` does; if empty, finds nothing
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
    findings = {"repeated_paragraphs": repeats, "held_out": held_out}
    findings["traditional"] = _list_traditional(outline[novels & ~left_out], texts)
    return findings | {"same_books": [asdict(copy) for copy in same_books]}


def _list_traditional(novels: pd.DataFrame, texts: Texts) -> list[str]:
    """List the books that begin in traditional characters; `[]` if all books do, or none does.

    `novels` are rows of the outline. Logs a warning if the list is not empty.
    """
    first = novels.reset_index().groupby("book")["index"].first()  # each book's first document
    books = [book for book, number in first.items() if corpus.is_traditional(texts[number])]
    if len(books) == len(first):
        return []
    if books:
        remedy = "the other novels are not; set data.to_simplified=true"
        logger.warning("in traditional characters: %s; %s", name_some(books), remedy)
    return books


def _drop_repeats(repeats: pd.DataFrame, outline: pd.DataFrame, texts: Texts) -> dict[str, Any]:
    """Delete repeated paragraphs from `texts`, and adjust `characters` in `outline`.

    `repeats` has a row for each paragraph to delete: its `document` and `line`, and the
    `kept_document`, in which one like it stays. Returns the `count` of the deleted paragraphs, the
    number of their `characters`, their number by book (`books`), and `examples`. An example is the
    names of the two documents, `book · chapter`, and the deleted paragraph.
    """
    names = outline["book"] + " · " + outline["chapter"]
    step = len(repeats) // REPEATS_SHOWN + 1  # every step-th one is an example
    examples = [
        [names[row.document], names[row.kept_document], texts[row.document].split("\n")[row.line]]
        for row in repeats.iloc[::step].itertuples()
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
    """Drop from held-out texts the sentences that share a run of 13 characters with training texts.

    Changes `texts`, and adjusts `characters` in `outline`. Returns, for preparation.json, the
    counts of `corpus.Leakage` before (`found`) and after (`left`).
    """
    train, held_out = (outline.index[outline["split"] == name] for name in (TRAIN, VALIDATION))
    ngrams = corpus.HeldOutNgrams(texts[number] for number in held_out)
    for number in tqdm(train, messages("bars")["leakage"], leave=False):
        ngrams.update(texts[number])
    before, after = corpus.Leakage(), corpus.Leakage()
    for number in held_out:
        shared = ngrams.shared(texts[number])
        before.add(shared)
        while shared.any():  # the sentences around a dropped one may together make a shared run
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
    """Tokenize documents, write tokens and word starts into `staging`, and make the windows.

    General training text comes last, and only as much as `data.general_ratio` takes. Returns the
    table of chunks with their windows that `windows.pack` returns, and how often the general text
    is read while the novels are read once (0 without general text).

    Raises `DataError` if no training text is left, or if there is general text but too little.
    """
    settings, seed = config.data, config.training.seed
    train = outline["split"] == TRAIN
    counts = windows.repeat_counts(outline["weight"].to_numpy(), seed)  # copies in an epoch
    documents = outline.assign(copies=np.where(train, counts, 1))
    as_needed = train & (outline["source"] == "general")  # tokenized only as far as it is needed
    in_full = documents[(train | (outline["split"] == VALIDATION)) & ~as_needed]
    with (
        (staging / store.TOKENS).open("wb") as tokens,
        (staging / store.WORD_STARTS).open("wb") as word_starts,
    ):
        windows.write_headers(tokens, word_starts)  # the number of tokens is not known yet
        write = partial(windows.write_chunks, texts, encode, (tokens, word_starts), settings)
        chunks, _ = write(in_full)
        if not (chunks["split"] == TRAIN).any():
            raise DataError("data.min_length, data.weights: they leave no training text")
        # tokens of general text in an epoch
        budget = windows.general_budget(chunks, settings.general_ratio)
        drawn = store.shuffled(outline.index[as_needed], seed) if budget else []
        # One window more: `choose_general` takes the total nearest to `budget`, which may be above.
        general, share = write(documents.loc[drawn], budget + settings.max_length)
        windows.write_headers(tokens, word_starts)  # now it is known
    epochs = 0.0
    if len(general):
        epochs = windows.general_epochs(general, budget, share, settings)
        chunks = pd.concat([chunks, windows.choose_general(general, budget)])
    return windows.pack(chunks, settings.max_length), epochs


def _write_documents(outline: pd.DataFrame, texts: Texts, path: Path) -> None:
    """Write documents.parquet at `path`: the columns `store.OUTLINE` and each document's `text`.

    Documents are written in groups of about `ROW_GROUP` characters, so that only the texts of one
    group are in memory at a time.
    """
    import pyarrow as pa
    from pyarrow import parquet

    table = outline[store.OUTLINE]
    # The names and types of the columns, taken from one row so that no text need be read.
    schema = pa.Schema.from_pandas(table.head(1).assign(text=""), preserve_index=False)
    group_numbers = outline["characters"].cumsum() // ROW_GROUP
    with parquet.ParquetWriter(path, schema) as writer:
        for _, rows in table.groupby(group_numbers):
            group = rows.assign(text=[texts[number] for number in rows.index])
            writer.write_table(pa.Table.from_pandas(group, schema, preserve_index=False))
