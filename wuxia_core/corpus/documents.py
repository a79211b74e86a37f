"""Read a file into documents: a chapter of a novel, or one general text; say what became of it."""

import json
import logging
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from wuxia_core.corpus.chapters import chapters, passages
from wuxia_core.corpus.cleaning import NOVELS_ONLY, Tally, clean
from wuxia_core.corpus.encodings import read_blocks
from wuxia_core.corpus.files import File
from wuxia_core.corpus.script import to_simplified
from wuxia_core.errors import CorpusError, DataError

log = logging.getLogger(__name__)

PASSAGE = 200  # characters: shorter lines of general text are gathered up to this length
SHORTEST = 20  # characters: less than that is no book
LONGEST_LINE = 6000  # characters: a longer one is cut at sentence ends
LONG = re.compile(
    rf"(.{{{LONGEST_LINE // 2},{LONGEST_LINE - 1}}}?[。！？!?]|.{{{LONGEST_LINE}}})(?=.)"
)


@dataclass(frozen=True)
class Document:
    """A chapter, or one general text: the unit of the split and of every statistic."""

    source: str  # "wuxia" or "general"
    book: str
    chapter: str
    text: str


@dataclass
class Account:
    """What became of a file. `characters` and `kept` count before and after cleaning."""

    file: File
    encoding: str = ""
    characters: int = 0
    kept: int = 0
    documents: int = 0
    cleaning: dict[str, Tally] = field(default_factory=dict)  # by rule
    refused: str = ""  # why the file, or what is left of it, was left out


def read_documents(
    account: Account,
    encoding: str | None = None,
    skip: frozenset[str] = frozenset(),
    simplify: bool = False,
) -> Iterator[Document]:
    """Read, clean and cut a file; one that is no text, or has none left, is refused in its account.

    The account is filled in. `encoding` is Python's name, detected by default; `skip` names
    cleaning rules to leave out; `simplify` turns traditional characters into simplified ones.

    Raises `DataError` naming file and line, where a line of JSONL is not an object with a `text`.
    """
    file, lines = account.file, 0
    jsonl = file.path.suffix.lower() == ".jsonl"
    if jsonl or file.source == "general":
        skip |= NOVELS_ONLY | ({"spaces", "blank_lines"} if jsonl else set())
    try:
        for block in read_blocks(file.path, encoding):
            used = [*account.encoding.split("+"), *block.encoding.split("+")]
            account.encoding = "+".join(dict.fromkeys(filter(None, used)))
            texts = (
                _jsonl_texts(block.text, account, skip, lines)
                if jsonl
                else _parts(block.text, account, skip)
            )
            for name, text in texts:
                account.documents += 1
                text = to_simplified(text) if simplify else text
                yield Document(file.source, file.book, name, text)
            lines += block.text.count("\n")
    except CorpusError as error:
        account.refused = str(error)
    if not account.documents and not account.refused:
        account.refused = _nothing_left(account)


def _cleaned(text: str, account: Account, skip: frozenset[str]) -> str:
    """Clean a text and put that into the account."""
    cleaned, tallies = clean(text, skip)
    account.characters += len(text)
    account.kept += len(cleaned)
    for tally in tallies:
        account.cleaning.setdefault(tally.rule, Tally(tally.rule)).add(tally)
    return cleaned


def _parts(text: str, account: Account, skip: frozenset[str]) -> list[tuple[str, str]]:
    """Clean a text and cut it into chapters, or into passages where it is general text."""
    text = _with_breaks(_cleaned(text, account, skip), account.file.path)
    if len(text) < SHORTEST:
        return []
    return chapters(text) if account.file.source == "wuxia" else passages(text, PASSAGE)


def _with_breaks(text: str, path: Path) -> str:
    """Break lines that no window or tokenizer could hold, after a sentence's end."""
    lines = text.split("\n")
    long = [line for line in lines if len(line) > LONGEST_LINE]
    if not long:
        return text
    log.warning(
        "%s: %d lines are over %d characters; cut after sentences", path, len(long), LONGEST_LINE
    )
    return "\n".join(
        LONG.sub(r"\1\n", line) if len(line) > LONGEST_LINE else line for line in lines
    )


def _nothing_left(account: Account) -> str:
    removed = sorted(account.cleaning.values(), key=lambda tally: tally.inserted - tally.removed)
    most = f", most of it by the rule {removed[0].rule}" if removed else ""
    return (
        f"{account.file.path}: {account.kept} of {account.characters} characters are left after "
        f"cleaning{most}; nothing to train on"
    )


def _jsonl_texts(
    text: str, account: Account, skip: frozenset[str], lines: int
) -> Iterator[tuple[str, str]]:
    """Read the `text` of each line; `lines` stand before them in the file."""
    for number, line in enumerate(text.split("\n"), lines + 1):
        if not line.strip():
            continue
        place = f"{account.file.path}:{number}"
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            why = getattr(error, "msg", error)
            raise DataError(f"{place}: not JSON ({why}); one object a line") from None
        value = record.get("text") if isinstance(record, dict) else None
        if not isinstance(value, str):
            raise DataError(f'{place}: must be an object like {{"text": "…"}}')
        if any("\ud800" <= character <= "\udfff" for character in value):
            raise DataError(f"{place}: half a character (a lone surrogate) in the text")
        if cleaned := _cleaned(value, account, skip):
            yield str(number), cleaned
