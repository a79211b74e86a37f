"""From documents to the mixture folder: split by book, tokenize once, cut windows, mix by tokens.

The folder appears complete or not at all. It is used again as long as its inputs and settings do
not change. It holds `documents.parquet` (a row for each document: source, book, chapter, split,
characters, text), `windows.parquet` (a row for each chunk: document, start, end, source, split,
window; `document` is a row of documents.parquet, [start, end) are offsets into the tokens),
`tokens.npy` (int32, of all documents), `word_starts.npy` (bool, a flag for each token),
`preparation.json` (what became of each file, which texts were found twice, what held-out text
shared with training text)
and `manifest.json` (what the folder was built from).
"""

from wuxia_core.mixing.build import (
    current_mixture,
    find_texts,
    manifest_of,
    mix,
    warn_without_general,
)
from wuxia_core.mixing.holdout import FEWEST, likely_share
from wuxia_core.mixing.store import (
    RUN_MIXTURE,
    TRAIN,
    UNUSED,
    VALIDATION,
    Mixture,
    Windows,
    hash_key,
    held_out_windows,
    in_use,
    open_run_mixture,
    read_json,
    read_manifest,
    run_steps,
    staged,
    train_windows,
)
from wuxia_core.mixing.windows import Encoder, utf8_size
