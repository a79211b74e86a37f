"""Masks to play with: a passage whose masks follow the controls above it."""

import logging
from collections.abc import Mapping, Sequence
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


def read_beginnings(book: Path, books: int = 20, characters: int = 20_000) -> dict[str, str]:
    """Read how a novel and its neighbours in the folder begin, cleaned, by title; it comes first.

    A neighbour that is no text is left out, with a warning.
    """
    beside = sorted(path for path in book.parent.glob("*.txt") if path != book)
    found = {book.stem: clean(read_book(book).text[:characters])[0]}
    for path in beside[: books - 1]:
        try:
            found[path.stem] = clean(read_book(path).text[:characters])[0]
        except CorpusError as error:
            logger.warning("%s: left out", error)
    return found


class MaskExplorer(widgets.VBox):
    """Controls and the view they change; where there are no widgets, the view as it is."""

    def __init__(
        self,
        books: Sequence[tuple[str, str]],
        tokenizer: "PreTrainedTokenizerBase",
        masker: SpanMasker,
        segmenter: Segmenter,
        characters: int,
    ) -> None:
        self._passages = [
            [text[start : start + characters] for start in range(0, len(text), characters)]
            for _, text in books
        ]
        self._tokenizer, self._seed, self._segmenter = tokenizer, masker.seed, segmenter
        self._key = 0
        titles = [(visible(title), number) for number, (title, _) in enumerate(books)]
        self.book = widgets.Dropdown(options=titles, description="book")
        self.passage = widgets.IntSlider(1, 1, len(self._passages[0]), description="passage")
        self.mask_ratio = _share(masker.mask_ratio, "masked")
        self.span_ratio = _share(masker.span_ratio, "in spans")
        self.span_length = widgets.IntRangeSlider(
            value=masker.span_length, min=1, max=max(12, *masker.span_length)
        )
        self.span_length.description = "span, tokens"
        self.unit = widgets.Dropdown(options=["token", "word"], description="spans by")
        self.epoch = widgets.IntSlider(0, 0, 20, description="epoch")
        self.draw = widgets.Button(description="another draw")
        self.view = widgets.HTML()
        super().__init__([self._connected(), self.view])
        self._show()

    def _connected(self) -> widgets.HBox:
        """Tie the controls to the view, and put them in a row that wraps."""
        self.book.observe(self._open, "value")
        controls = [self.book, self.passage, self.mask_ratio, self.span_ratio, self.span_length]
        controls += [self.unit, self.epoch]
        for control in controls:
            control.layout, control.style.description_width = {"width": "22rem"}, "6rem"
            control.observe(self._show, "value")
        self.draw.on_click(self._draw_again)
        return widgets.HBox([*controls, self.draw], layout={"flex_flow": "row wrap"})

    def _open(self, change: dict[str, Any]) -> None:
        self.passage.max = len(self._passages[change["new"]])

    def _draw_again(self, _: widgets.Button) -> None:
        self._key += 1
        self._show()

    def _show(self, _: dict[str, Any] | None = None) -> None:
        text = self._passages[self.book.value][self.passage.value - 1]
        words = self._segmenter if self.unit.value == "word" else None
        spans = (self.span_ratio.value, self.span_length.value)
        try:
            masker = SpanMasker(self.mask_ratio.value, *spans, self._seed)
            masks = show_masks(
                text, self._tokenizer, masker, self._key, epoch=self.epoch.value, segmenter=words
            )
            self.view.value = masks._repr_html_()
        except (ConfigError, DataError) as error:
            self.view.value = f'<p class="{NO_MATH}">{escape(str(error))}</p>'

    def _repr_html_(self) -> str:
        settings = (
            f"{self.book.label}, passage {self.passage.value} of {self.passage.max}: "
            f"{self.mask_ratio.value:.0%} masked, {self.span_ratio.value:.0%} of that in spans of "
            f"{self.span_length.value[0]} to {self.span_length.value[1]} tokens "
            f"(by {self.unit.value}), epoch {self.epoch.value}, draw {self._key}"
        )
        return f'<p class="{NO_MATH}">{escape(settings)}</p>{self.view.value}'


def _share(value: float, description: str) -> widgets.FloatSlider:
    return widgets.FloatSlider(
        value, min=0, max=1, step=0.01, description=description, readout_format=".0%"
    )


def explore_masks(
    books: Mapping[str, str] | Sequence[tuple[str, str]],
    tokenizer: "PreTrainedTokenizerBase",
    masker: SpanMasker | None = None,
    *,
    segmenter: Segmenter | None = None,
    characters: int = 400,
) -> MaskExplorer:
    """Show the masks of any passage under any settings.

    Parameters
    ----------
    books : mapping or sequence of pairs
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
    pairs = books.items() if isinstance(books, Mapping) else books
    read = [(title, text) for title, text in pairs if text]
    if not read:
        raise DataError("explore_masks: no book with text in it; give titles and texts")
    return MaskExplorer(
        read, tokenizer, masker or SpanMasker(), segmenter or Segmenter(), characters
    )
