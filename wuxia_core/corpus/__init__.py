"""From files to clean documents: find, decode, clean, cut into chapters, find what is there twice.

It does not split, mix or tokenize. A document is a chapter of a novel, or one general text.
"""

from wuxia_core.corpus.chapters import chapter, chapters
from wuxia_core.corpus.cleaning import RULES, Tally, clean
from wuxia_core.corpus.documents import Account, Document, read_documents
from wuxia_core.corpus.duplicates import SameBook, Sketches
from wuxia_core.corpus.encodings import Book, read_book
from wuxia_core.corpus.files import File, find_files
from wuxia_core.corpus.segment import Segmenter, read_lexicon
