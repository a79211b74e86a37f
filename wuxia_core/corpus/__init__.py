"""From files to clean documents: find, decode, clean, cut into chapters, find what is there twice.

It does not split, mix or tokenize. A document is a chapter of a novel, or one general text.
"""

from wuxia_core.corpus.chapters import NO_HEADINGS, chapter, group_texts, split_chapters
from wuxia_core.corpus.cleaning import OFF, OLDER_NAMES, RULES, Tally, clean
from wuxia_core.corpus.encodings import Book, codec, read_book
from wuxia_core.corpus.overlap import (
    DuplicateIndex,
    HeldOutNgrams,
    Leakage,
    drop_sentences,
    is_traditional,
)
from wuxia_core.corpus.reading import Document, File, FileReport, find_files, read_documents
from wuxia_core.corpus.words import CLASSES, Segmenter, classes, dialogue, read_lexicon
