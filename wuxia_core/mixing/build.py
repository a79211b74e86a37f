"""From files to the mixture folder, stage by stage; nothing but one file is in memory at a time."""

import json
import logging
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas as pd
from tqdm import tqdm

from wuxia_core import corpus
from wuxia_core.config import Config, DataConfig, locate
from wuxia_core.corpus import HeldOutNgrams, Leakage, drop_sentences
from wuxia_core.errors import ConfigError, DataError
from wuxia_core.mixing import windows
from wuxia_core.mixing.store import (
    DUPLICATE,
    MANIFEST,
    OUTLINE,
    SEEN,
    TRAIN,
    UNUSED,
    VALIDATION,
    Fingerprints,
    Mixture,
    Texts,
    exclusive_lock,
    hash_key,
    make_manifest,
    mixture_folder,
    open_mixture,
    read_manifest,
    staged,
)
from wuxia_core.mixing.windows import Encoder, TokenWriter
from wuxia_core.model import load_tokenizer

logger = logging.getLogger(__name__)

FILES = {
    *("tokens.npy", "word_starts.npy", "windows.parquet", "documents.parquet"),
    *("preparation.json", MANIFEST, SEEN),
}
ROW_GROUP = 16_000_000  # characters of documents.parquet written at a time
REPEATS_SHOWN = 10  # repeated paragraphs kept as examples
FEW = 4  # passages


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
        with exclusive_lock(folder.with_name(f".{folder.name}.lock")):
            if not _is_current(folder, manifest):  # another launcher may have built it
                with staged(folder) as staging:
                    _build(staging, config, files)
                    _write_json(staging / MANIFEST, manifest)
                    fingerprints.remember(staging)
    mixture = open_mixture(folder)
    if "general" not in set(mixture.report["source"]):
        why = "data.general_ratio is 0" if not config.data.general_ratio else "data.general_file"
        logger.warning(
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
        logger.info("%s is read as input in place of the novels in %s", old, data_dir)
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
        logger.info("%s: the texts or settings have changed, so it is built anew", folder)


def _build(staging: Path, config: Config, files: list[corpus.File]) -> None:
    """Write everything but the manifest."""
    with Texts(staging / "texts") as texts:
        with _stage("reading and cleaning"):
            outline, accounts = read(files, texts, config.data)
        with _stage("deduplicating"):
            same_books, repeats = deduplicate(outline, texts, config)
        with _stage("comparing with held-out text"):
            found, left = remove_leakage(outline, texts)
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
    logger.debug("%s: %.2f s", name, time.perf_counter() - start)


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
        wanted = windows.general_budget(windows.repeat(novels, times), settings.general_ratio)
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


def _account(account: corpus.FileReport) -> dict[str, Any]:
    values, file = asdict(account), account.file
    del values["file"]
    values["refused"] = account.skip_reason.removeprefix(f"{file.path}: ")
    return {"path": file.name, "source": file.source, "book": file.book, **values}


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False, indent=1), encoding="utf-8")


def read(
    files: list[corpus.File], texts: Texts, settings: DataConfig
) -> tuple[pd.DataFrame, list[corpus.FileReport]]:
    """Read all files into `texts`; return the outline and what became of each file."""
    rows = []
    accounts = [corpus.FileReport(file) for file in files]
    skip = frozenset(settings.skip_cleaning)
    for file, account in zip(tqdm(files, "reading", unit="file"), accounts, strict=True):
        encoding = settings.encoding.get(file.path.name)
        weight = settings.weights.get(file.path.name, 1.0)
        for document in corpus.read_documents(account, encoding, skip, settings.to_simplified):
            texts.append(document.text)
            about = (document.source, document.book, document.chapter)
            rows.append((*about, len(document.text), weight))
        if account.skip_reason:
            logger.warning("left out: %s", account.skip_reason)
    columns = ["source", "book", "chapter", "characters", "weight"]
    _refuse_nothing(accounts)
    return pd.DataFrame(rows, columns=columns), accounts


def _refuse_nothing(accounts: list[corpus.FileReport]) -> None:
    """Refuse to go on where all novels, or all general texts, are refused."""
    for source, what in (("wuxia", "train on"), ("general", "mix in from data.general_file")):
        there = [account for account in accounts if account.file.source == source]
        if there and not any(account.documents for account in there):
            reasons = "\n".join(account.skip_reason for account in there)
            raise DataError(f"nothing is left to {what}:\n{reasons}")


def deduplicate(
    outline: pd.DataFrame, texts: Texts, config: Config
) -> tuple[list[corpus.SameBook], dict[str, Any]]:
    """Leave out what is there twice, then split; tell what was found."""
    sketches = corpus.DuplicateIndex()
    documents = zip(outline["source"], outline["book"], strict=True)
    if config.data.deduplicate:
        bar = tqdm(documents, "looking for duplicates", len(outline), unit="document", leave=False)
        for number, (source, book) in enumerate(bar):
            sketches.add(texts[number], book if source == "wuxia" else None)
    same_books = sketches.same_books()
    for same in same_books:
        logger.warning(
            "%s is left out: %.0f %% of it is in %s", same.book, 100 * same.share, same.kept
        )
    left_out = outline["book"].isin([same.book for same in same_books])
    left_out &= outline["source"] == "wuxia"
    repeats = sketches.same_paragraphs(outline.index[left_out])
    report = _drop_repeats(repeats, outline, texts)
    left_out |= outline["characters"] == 0
    outline["split"] = split(outline, left_out, config.data.val_ratio, config.training.seed)
    _tell_of_weights(outline)
    return same_books, report


def _tell_of_weights(outline: pd.DataFrame) -> None:
    """Say of held-out books that their weight does nothing."""
    for book, rows in outline[outline["weight"] != 1].groupby("book"):
        if not (rows["split"] == TRAIN).any():
            logger.warning("data.weights: %s is not trained on, so its weight does nothing", book)


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


def remove_leakage(outline: pd.DataFrame, texts: Texts) -> tuple[Leakage, Leakage]:
    """Take out of held-out text what stands in training text too; say what was found and left."""
    train, held_out = (outline.index[outline["split"] == name] for name in (TRAIN, VALIDATION))
    runs = HeldOutNgrams(texts[number] for number in held_out)
    for number in tqdm(train, "comparing with held-out text", unit="document", leave=False):
        runs.update(texts[number])
    found, left = Leakage(), Leakage()
    for number in held_out:
        text = before = texts[number]
        shared = runs.shared(text)
        found.add(shared)
        while shared.any():  # neighbours of what is dropped may make a shared run again
            text = drop_sentences(text, shared)
            shared = runs.shared(text)
        left.add(shared)
        if text != before:
            texts[number] = text
            outline.at[number, "characters"] = len(text)
    if found.shared:
        logger.info(
            "held-out text shared %.2f %% of its runs of 13 characters with training text; "
            "the sentences are left out of it", 100 * found.share,
        )  # fmt: skip
    return found, left


def split(documents: pd.DataFrame, left_out: pd.Series, val_ratio: float, seed: int) -> pd.Series:
    """Choose each document's split: `source`, `book`, `chapter` and `characters` are its columns.

    Novels by whole books, or by chapters where there is one book; documents in `left_out` are
    duplicates. Of general text the end of each file is held out, so that neighbouring passages stay
    together; files of less than four passages are held out as a whole, or not.
    """
    chosen = pd.Series(TRAIN, index=documents.index)
    chosen[left_out] = DUPLICATE
    novels = documents[(documents["source"] == "wuxia") & ~left_out]
    unit = novels["book"] + ("\n" + novels["chapter"] if novels["book"].nunique() == 1 else "")
    general = documents[(documents["source"] == "general") & ~left_out]
    passages = general.groupby("book")["book"].transform("size")
    small = general[(passages < FEW) & (general["book"].nunique() > 1)]
    for rows, units in ((novels, unit), (small, small["book"])):
        lengths = rows["characters"].groupby(units).sum()
        chosen[units.index[units.isin(_held_out(lengths.to_dict(), val_ratio, seed))]] = VALIDATION
    for _, rows in general.drop(index=small.index).groupby("book"):
        chosen[_tail(rows["characters"], val_ratio)] = VALIDATION
    return chosen


def _tail(lengths: pd.Series, val_ratio: float) -> list[int]:
    """Choose the last texts, about `val_ratio` of the characters; one at least, never all."""
    from_end = lengths[::-1].cumsum()[: len(lengths) - 1]
    if not val_ratio or from_end.empty:
        return []
    last = int((from_end - val_ratio * lengths.sum()).abs().to_numpy().argmin())
    return [int(number) for number in from_end.index[: last + 1]]


def _held_out(lengths: dict[str, int], val_ratio: float, seed: int) -> set[str]:
    """Choose units of up to `val_ratio` of all characters; the shortest one if none is so short.

    `{"a": 50, "b": 9, "c": 41}` at 0.1 gives `{"b"}`. A single unit is never held out.
    """
    budget = val_ratio * sum(lengths.values())
    chosen: set[str] = set()
    for unit in sorted(lengths, key=lambda unit: hash_key(seed, "split", unit)):
        if lengths[unit] <= budget:
            chosen.add(unit)
            budget -= lengths[unit]
    if not chosen and val_ratio and len(lengths) > 1:
        chosen = {min(lengths, key=lambda unit: (lengths[unit], unit))}
    return chosen
