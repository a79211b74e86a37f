"""Masks to play with: a passage whose masks follow the controls above it."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ipywidgets as widgets

from wuxia_core.corpus import Segmenter, clean, read_book
from wuxia_core.errors import ConfigError, CorpusError, DataError
from wuxia_core.masking import SpanMasker
from wuxia_core.show.masks import show_masks
from wuxia_core.text import NO_MATH, escape, visible

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)


def read_beginnings(book: Path, characters: int = 20_000) -> dict[str, str]:
    """Read how a novel and its neighbours in the folder begin, cleaned, by title; it comes first.

    At most 20; what is no text is left out, with a warning.
    """
    neighbours = sorted(path for path in book.parent.glob("*.txt") if path != book)
    found = {}
    for path in [book, *neighbours[:19]]:
        try:
            found[path.stem] = clean(read_book(path).text[:characters])[0]
        except CorpusError as error:
            logger.warning("%s: left out", error)
    return found


class MaskExplorer(widgets.VBox):
    """Controls and the masks that they change; where there are no widgets, the masks as they are.

    Parameters
    ----------
    books : mapping
        Titles and texts; those without text are left out.
    tokenizer
        The base model's.
    masker : SpanMasker, optional
        What the controls start from; by default the recipe.
    segmenter : Segmenter, optional
        Whose words the spans cover when they are to; by default one without a lexicon.
    characters : int
        Length of a passage.

    Raises
    ------
    DataError
        Where no book has text.
    """

    def __init__(
        self,
        books: Mapping[str, str],
        tokenizer: "PreTrainedTokenizerBase",
        masker: SpanMasker | None = None,
        *,
        segmenter: Segmenter | None = None,
        characters: int = 400,
    ) -> None:
        self._books = {title: text for title, text in books.items() if text}
        if not self._books:
            raise DataError("MaskExplorer: no book with text in it; give titles and texts")
        masker = masker or SpanMasker()
        self._tokenizer, self._seed, self._characters = tokenizer, masker.seed, characters
        self._segmenter = segmenter or Segmenter()
        self._make_controls(masker)
        self._controls = [self.book, self.passage, self.mask_ratio, self.span_ratio]
        self._controls += [self.span_length, self.unit, self.epoch, self.draw]
        for control in self._controls:
            control.layout, control.style.description_width = {"width": "22rem"}, "6rem"
            control.observe(self._update, "value")
        self.view = widgets.HTML()
        controls = widgets.HBox(self._controls, layout={"flex_flow": "row wrap"})
        super().__init__([controls, self.view])
        self._update()

    def _make_controls(self, masker: SpanMasker) -> None:
        titles = [(visible(title), title) for title in self._books]
        share = {"min": 0, "max": 1, "step": 0.01, "readout_format": ".0%"}
        longest = max(12, *masker.span_length)
        self.book = widgets.Dropdown(options=titles, description="book")
        self.passage = widgets.IntSlider(1, 1, 1, description="passage")
        self.mask_ratio = widgets.FloatSlider(masker.mask_ratio, description="masked", **share)
        self.span_ratio = widgets.FloatSlider(masker.span_ratio, description="in spans", **share)
        self.span_length = widgets.IntRangeSlider(
            value=masker.span_length, min=1, max=longest, description="span, tokens"
        )
        self.unit = widgets.Dropdown(options=["token", "word"], description="spans by")
        self.epoch = widgets.IntSlider(0, 0, 20, description="epoch")
        self.draw = widgets.IntSlider(0, 0, 20, description="draw")

    def _update(self, _: dict[str, Any] | None = None) -> None:
        text, size = self._books[self.book.value], self._characters
        self.passage.max = -(-len(text) // size)  # moves the slider where this book has fewer
        passage = text[(self.passage.value - 1) * size : self.passage.value * size]
        words = self._segmenter if self.unit.value == "word" else None
        draw = {"key": self.draw.value, "epoch": self.epoch.value, "segmenter": words}
        spans = (self.span_ratio.value, self.span_length.value)
        try:
            masker = SpanMasker(self.mask_ratio.value, *spans, self._seed)
            self.view.value = show_masks(passage, self._tokenizer, masker, **draw)._repr_html_()
        except (ConfigError, DataError) as error:
            self.view.value = f'<p class="{NO_MATH}">{escape(str(error))}</p>'

    def _repr_html_(self) -> str:
        settings = "; ".join(f"{c.description} {c.value}" for c in self._controls)
        return f'<p class="{NO_MATH}">{escape(settings)}</p>{self.view.value}'
