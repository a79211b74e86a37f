"""From documents to the mixture folder: split by book, tokenize once, cut windows, mix by tokens.

The folder is written atomically and used again while its inputs and settings are unchanged:
`documents.parquet` (source, book, chapter, split, text), `windows.parquet` (document, start, end,
source, split; offsets into the tokens), `tokens.npy` (int32), `word_starts.npy` (bool)
and `manifest.json`.
"""

import hashlib
import json
import logging
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd
from tqdm import tqdm

from wuxia_core import corpus
from wuxia_core.config import Config, locate
from wuxia_core.errors import ConfigError, DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)

FORMAT = 1  # raise it when the folder's content changes, so that older ones are built again
BATCH = 64  # documents a call of the tokenizer
TRAIN, VALIDATION, UNUSED = "train", "validation", "unused"

Tokens = npt.NDArray[np.int32]
Flags = npt.NDArray[np.bool_]


class Window(NamedTuple):
    """A stretch of one document, as the collator takes it."""

    input_ids: Tokens  # (T,)
    word_ids: Tokens  # (T,)
    key: int
    epoch: int


@dataclass(frozen=True)
class Mixture:
    """What a run trains and is judged on.

    Attributes
    ----------
    tokens : (N,) int32
        All documents, each behind an end-of-text token, memory-mapped.
    word_starts : (N,) bool
        Where a token begins a word, memory-mapped.
    windows, documents : DataFrame
        As in the module's docstring.
    report : DataFrame
        `source`, `documents`, `tokens`, `share` of the training windows.
    folder : Path
        Where it lies.
    """

    tokens: Tokens
    word_starts: Flags
    windows: pd.DataFrame
    documents: pd.DataFrame
    folder: Path

    @property
    def report(self) -> pd.DataFrame:
        """Training windows by source."""
        train = self.windows[self.windows["split"] == TRAIN]
        lengths = train["end"] - train["start"]
        table = pd.DataFrame(
            {
                "documents": train.groupby("source")["document"].nunique(),
                "tokens": lengths.groupby(train["source"]).sum(),
            }
        )
        table["share"] = table["tokens"] / table["tokens"].sum()
        return table.sort_index(ascending=False).reset_index()

    def held_out(self, source: str, limit: int, seed: int) -> pd.DataFrame:
        """At most `limit` held-out documents of a source, drawn by key, in their own order."""
        rows = self.documents.query("split == @VALIDATION and source == @source")
        drawn = sorted(rows.index, key=lambda number: draw(seed, "held out", number))[:limit]
        return rows.loc[sorted(drawn)]


class Windows:
    """Windows as a dataset: `windows[3]` at epoch 0, `windows[2, 3]` at epoch 2.

    The epoch travels with the index, so that a worker or a resumed run needs to be told nothing.
    """

    def __init__(self, mixture: Mixture, rows: pd.DataFrame) -> None:
        self._tokens, self._word_starts = mixture.tokens, mixture.word_starts
        self.documents = rows["document"].to_numpy()  # (windows,) which document each is from
        self._keys = rows.index.to_numpy()
        self._starts, self._ends = rows["start"].to_numpy(), rows["end"].to_numpy()

    def __len__(self) -> int:
        return len(self._keys)

    def __getitem__(self, index: int | tuple[int, int]) -> Window:
        epoch, row = index if isinstance(index, tuple) else (0, index)
        place = slice(self._starts[row], self._ends[row])
        word_ids = np.cumsum(self._word_starts[place], dtype=np.int32)
        return Window(self._tokens[place], word_ids, int(self._keys[row]), epoch)


def draw(seed: int, *names: object) -> str:
    """Turn a seed and names into a key to sort by: the same order on any machine."""
    return hashlib.sha256(repr((seed, *names)).encode()).hexdigest()


def mix(config: Config) -> Mixture:
    """Build the mixture folder, or open it where nothing has changed.

    Raises
    ------
    DataError
        Where there is nothing to train on.
    ConfigError
        Where `data.processed_data_file` is a folder that is not a mixture.
    """
    from wuxia_core.model import load_tokenizer

    folder = mixture_folder(config.data.processed_data_file)
    inputs = _inputs(config)
    tokenizer = load_tokenizer(config.model.model_name_or_path)
    manifest = _manifest(config, inputs, tokenizer)
    if _written(folder) != manifest:
        documents = _split(_read(inputs), config.data.val_ratio, config.training.seed)
        _build(folder, documents, tokenizer, config, manifest)
    mixture = open_mixture(folder)
    _warn_about_general(mixture, config.data.general_ratio)
    return mixture


def open_mixture(folder: Path) -> Mixture:
    """Map a mixture folder into memory.

    Raises
    ------
    DataError
        Where the folder holds none.
    """
    if _written(folder) is None:
        raise DataError(f"{folder}: no mixture there (manifest.json is missing); mix again")
    return Mixture(
        tokens=np.load(folder / "tokens.npy", mmap_mode="r"),
        word_starts=np.load(folder / "word_starts.npy", mmap_mode="r"),
        windows=pd.read_parquet(folder / "windows.parquet"),
        documents=pd.read_parquet(folder / "documents.parquet"),
        folder=folder,
    )


def mixture_folder(processed_data_file: str) -> Path:
    """Turn `data/processed.jsonl`, as older files have it, into the folder `data/processed`."""
    path = Path(processed_data_file)
    return path.with_suffix("") if path.suffix == ".jsonl" else path


@dataclass(frozen=True)
class _Inputs:
    data_dir: Path
    novels: list[Path]
    general: list[Path]


def _inputs(config: Config) -> _Inputs:
    """Find the input files; an existing JSONL of an older recipe stands in for `data_dir`."""
    data_dir = locate(config.data.data_dir)
    general = None if config.data.general_file is None else locate(config.data.general_file)
    if general is not None and not general.exists():
        raise DataError(f"data.general_file {general}: no such file or folder")
    old = Path(config.data.processed_data_file)
    if old.suffix == ".jsonl" and old.is_file():
        log.info("%s is read as input in place of the novels in %s", old, data_dir)
        return _Inputs(old.parent, [old], [])
    novels = corpus.find_novels(data_dir, general)
    return _Inputs(data_dir, novels, corpus.find_general(data_dir, general))


def _read(inputs: _Inputs) -> list[corpus.Document]:
    texts = [path for path in inputs.novels if path.suffix.lower() == ".txt"]
    documents = corpus.read_novels(texts, inputs.data_dir) if texts else []
    for path in inputs.novels:
        if path not in texts:
            documents += corpus.read_general(path, source="wuxia")
    for path in inputs.general:
        documents += corpus.read_general(path)
    return documents


def _manifest(
    config: Config, inputs: _Inputs, tokenizer: "PreTrainedTokenizerBase"
) -> dict[str, Any]:
    """Everything the content hangs on."""
    files = [
        {"path": str(path), "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
        for path in inputs.novels + inputs.general
    ]
    settings = config.data.model_dump(exclude={"data_dir", "general_file", "processed_data_file"})
    vocabulary = json.dumps(tokenizer.get_vocab(), sort_keys=True)
    return {
        "format": FORMAT,
        "seed": config.training.seed,
        "data": settings,
        "tokenizer": hashlib.sha256(vocabulary.encode()).hexdigest(),
        "inputs": files,
    }


def _written(folder: Path) -> dict[str, Any] | None:
    path = folder / "manifest.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def _split(documents: list[corpus.Document], val_ratio: float, seed: int) -> pd.DataFrame:
    """Add the split: novels by whole books, or by chapters where there is one; general by text."""
    table = pd.DataFrame(documents)
    table["split"] = TRAIN
    if val_ratio > 0:
        for source, rows in table.groupby("source"):
            one_book = source == "general" or rows["book"].nunique() == 1
            unit = rows["book"] + ("\n" + rows["chapter"] if one_book else "")
            lengths = rows["text"].str.len().groupby(unit).sum()
            held_out = _held_out(lengths.to_dict(), val_ratio, seed)
            table.loc[unit.index[unit.isin(held_out)], "split"] = VALIDATION
    return table[["source", "book", "chapter", "split", "text"]]


def _held_out(lengths: dict[str, int], val_ratio: float, seed: int) -> set[str]:
    """Choose units of up to `val_ratio` of all characters; the shortest one if none is so short.

    `{"a": 50, "b": 9, "c": 41}` at 0.1 gives `{"b"}`. A single unit is never held out.
    """
    budget = val_ratio * sum(lengths.values())
    chosen: set[str] = set()
    for unit in sorted(lengths, key=lambda unit: draw(seed, "split", unit)):
        if lengths[unit] <= budget:
            chosen.add(unit)
            budget -= lengths[unit]
    if not chosen and len(lengths) > 1:
        chosen = {min(lengths, key=lambda unit: (lengths[unit], unit))}
    return chosen


def _build(
    folder: Path,
    documents: pd.DataFrame,
    tokenizer: "PreTrainedTokenizerBase",
    config: Config,
    manifest: dict[str, Any],
) -> None:
    """Write the folder beside its place and move it there when it is whole."""
    if folder.exists() and _written(folder) is None and any(folder.iterdir()):
        raise ConfigError(
            f"data.processed_data_file {folder}: a folder that is not a mixture; name another one"
        )
    tokens, word_starts = tokenize(list(documents["text"]), tokenizer)
    windows = _cut(documents, [len(sequence) for sequence in tokens], config)
    windows, documents = _choose_general(windows, documents, config)
    staging = folder.with_name(folder.name + ".staging")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    np.save(staging / "tokens.npy", np.concatenate(tokens))
    np.save(staging / "word_starts.npy", np.concatenate(word_starts))
    windows.to_parquet(staging / "windows.parquet")
    documents.to_parquet(staging / "documents.parquet")
    text = json.dumps(manifest, ensure_ascii=False, indent=1)
    (staging / "manifest.json").write_text(text, encoding="utf-8")
    if folder.exists():
        shutil.rmtree(folder)
    staging.replace(folder)


def tokenize(
    texts: list[str], tokenizer: "PreTrainedTokenizerBase"
) -> tuple[list[Tokens], list[Flags]]:
    """Encode texts, each behind one end-of-text token, and flag the tokens that begin a word.

    A novel that happens to contain the letters of a special token does not make one.
    """
    tokens: list[Tokens] = []
    word_starts: list[Flags] = []
    for start in tqdm(
        range(0, len(texts), BATCH), desc="tokenizing", unit="batch", disable=len(texts) <= BATCH
    ):
        batch = texts[start : start + BATCH]
        encoded = tokenizer(
            batch,
            add_special_tokens=False,
            split_special_tokens=True,
            return_offsets_mapping=True,
        )
        for text, ids, offsets in zip(
            batch, encoded.input_ids, encoded.offset_mapping, strict=True
        ):
            tokens.append(np.array([tokenizer.eos_token_id, *ids], np.int32))
            word_starts.append(_word_starts(text, np.array(offsets, np.int64).reshape(-1, 2)))
    return tokens, word_starts


def _word_starts(text: str, offsets: npt.NDArray[np.int64]) -> Flags:
    """Flag tokens that begin a word, from their (T, 2) character offsets; (T + 1,) with the first.

    A token that holds the end of one word and the start of the next counts as a start.
    """
    import rjieba

    edges = np.cumsum([0, *map(len, rjieba.cut(text))])
    is_edge = np.zeros(len(text) + 1, np.int64)
    is_edge[edges] = 1
    before = np.concatenate([[0], np.cumsum(is_edge)])  # edges before each character
    inside = before[offsets[:, 1]] - before[offsets[:, 0]] > 0
    new_character = np.diff(offsets[:, 0], prepend=-1) > 0  # not a later byte of the same one
    return np.concatenate([[True], inside & new_character])


def _cut(documents: pd.DataFrame, lengths: list[int], config: Config) -> pd.DataFrame:
    """Cut each document into windows; the tail is kept, and nothing overlaps without a stride."""
    step = config.data.stride or config.data.max_length
    rows = []
    offset = 0
    for document, length in enumerate(lengths):
        short = length - 1 < config.data.min_length
        starts = [] if short else range(0, max(1, length - config.data.max_length + step), step)
        for start in starts:
            end = min(start + config.data.max_length, length)
            rows.append((document, offset + start, offset + end))
        offset += length
    windows = pd.DataFrame(rows, columns=["document", "start", "end"])
    about = documents[["source", "split"]].to_numpy()[windows["document"]]
    return windows.assign(source=about[:, 0], split=about[:, 1])


def _choose_general(
    windows: pd.DataFrame, documents: pd.DataFrame, config: Config
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Keep general training windows up to `general_ratio` of the tokens; the rest is unused.

    Whole documents in keyed order, cut at the window whose end is nearest the ratio.
    """
    train = windows[windows["split"] == TRAIN]
    lengths = train["end"] - train["start"]
    ratio = config.data.general_ratio
    wanted = ratio / (1 - ratio) * lengths[train["source"] == "wuxia"].sum()
    general = train[train["source"] == "general"]
    order = sorted(
        general.index,
        key=lambda row: (draw(config.training.seed, general.at[row, "document"]), row),
    )
    reached = np.concatenate([[0], np.cumsum(lengths[order])])
    unused = order[int(np.abs(reached - wanted).argmin()) :]
    windows = windows.drop(index=unused).reset_index(drop=True)
    left_out = set(general["document"]) - set(windows["document"])
    documents = documents.copy()
    documents.loc[sorted(left_out), "split"] = UNUSED
    return windows, documents


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


def train_windows(mixture: Mixture) -> Windows:
    """All training windows."""
    return Windows(mixture, mixture.windows[mixture.windows["split"] == TRAIN])


def held_out_windows(mixture: Mixture, limit: int, seed: int) -> dict[str, Windows]:
    """Windows of the held-out documents by source, for the loss during training."""
    chosen = {}
    for source in sorted(set(mixture.windows["source"])):
        documents = mixture.held_out(source, limit, seed).index
        rows = mixture.windows[mixture.windows["document"].isin(documents)]
        if len(rows):
            chosen[source] = Windows(mixture, rows)
    return chosen
