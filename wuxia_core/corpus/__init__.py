"""From files to clean documents: find novels, decode them, cut them into chapters.

It does not split, mix or tokenize. A document is a chapter of a novel, or one general text.
"""

from wuxia_core.corpus.chapters import chapters
from wuxia_core.corpus.cleaning import clean
from wuxia_core.corpus.documents import (
    Document,
    find_general,
    find_novels,
    read_general,
    read_novels,
)
from wuxia_core.corpus.encodings import Book, read_book
