"""Widgets for notebooks: masks that follow controls, a box to guess in, and a desk to write at."""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache, partial
from threading import Event, Thread
from typing import TYPE_CHECKING, Any

import ipywidgets as widgets
import pandas as pd

from wuxia_core.corpus import Segmenter
from wuxia_core.errors import ConfigError, DataError, Stopped, WuxiaError
from wuxia_core.evaluate import xray
from wuxia_core.masking import SpanMasker
from wuxia_core.messages import messages
from wuxia_core.show.masks import XRayView, in_columns, show_masks
from wuxia_core.show.tables import named, table
from wuxia_core.text import NO_MATH, escape
from wuxia_core.write import STRONGEST, Sampling, stream

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    Writer = tuple[PeftModel, PreTrainedTokenizerBase]  # as `open_writer` returns it

# The columns of `strengths_table`, each with its strength.
STRENGTHS = {"0 (base)": 0.0, "0.5": 0.5, "1 (as trained)": 1.0, "1.5": 1.5}
SETTINGS = ("strength", "seed", "tokens", "temperature")  # that the desk shows with its texts
# CSS of the cells and heads in the desk's table of kept texts.
ROW = {"vertical-align": "top", "line-height": "1.7", "padding": ".4em 1em .4em 0"}
ROW["border-top"] = "1px solid rgba(128,128,128,.4)"
HEAD = [{"selector": "th", "props": "padding-right: 1em"}]


class MaskExplorer(widgets.VBox):
    """Controls, and below them a passage with masks that change with the controls.

    A page without widgets, such as an export, shows the controls' values and the masks as HTML.

    Parameters
    ----------
    text : str
        A novel, say. It is cut into passages, and one of the controls chooses a passage.
    tokenizer
        The tokenizer of the base model.
    masker : SpanMasker, optional
        The controls start from its settings, by default those of the recipe; its seed is kept.
    segmenter : Segmenter, optional
        Cuts the passage into words if spans are drawn by words; by default without a lexicon.
    characters : int
        Length of each passage but the last, which may be shorter.
    """

    def __init__(
        self,
        text: str,
        tokenizer: "PreTrainedTokenizerBase",
        masker: SpanMasker | None = None,
        *,
        segmenter: Segmenter | None = None,
        characters: int = 400,
    ) -> None:
        starts = range(0, len(text), characters)
        self._passages = [text[start : start + characters] for start in starts] or [""]
        self._tokenizer, self._segmenter = tokenizer, segmenter or Segmenter()
        self._masker = masker or SpanMasker()
        self._controls = self._make_controls()
        for control in self._controls:
            control.layout, control.style.description_width = {"width": "22rem"}, "6rem"
            control.observe(self._update, "value")
        self.view = widgets.HTML()
        controls = widgets.HBox(self._controls, layout={"flex_flow": "row wrap"})
        super().__init__([controls, self.view])
        self._update()

    def _make_controls(self) -> list[Any]:
        """Make the controls, labelled in the reader's language; keep each as an attribute.

        Returns a list of all of them. The ratios and the span length start from those of the
        masker.
        """
        # `longest` is the right end of the slider of span lengths, in tokens.
        masker, longest = self._masker, max(12, *self._masker.span_length)
        share = {"min": 0, "max": 1, "step": 0.01, "readout_format": ".0%"}  # a slider of shares
        units = [(named(unit), unit) for unit in ("token", "word")]  # what is shown, and its value
        self.passage = widgets.IntSlider(value=1, min=1, max=len(self._passages))
        self.mask_ratio = widgets.FloatSlider(masker.mask_ratio, **share | {"min": 0.01})
        self.span_ratio = widgets.FloatSlider(masker.span_ratio, **share)
        self.span_length = widgets.IntRangeSlider(value=masker.span_length, min=1, max=longest)
        self.unit = widgets.Dropdown(options=units)
        self.epoch, self.draw = widgets.IntSlider(0, 0, 20), widgets.IntSlider(0, 0, 20)
        labels = messages("explorer")
        names = ("passage", "mask_ratio", "span_ratio", "span_length", "unit", "epoch", "draw")
        for name in names:
            getattr(self, name).description = labels[name]
        return [getattr(self, name) for name in names]

    def _update(self, _: dict[str, Any] | None = None) -> None:
        """Show the passage with the masks that the controls ask for, or say why there are none.

        A control calls this when its value changes, with a description of the change, which is not
        used.
        """
        passage = self._passages[self.passage.value - 1]
        segmenter = self._segmenter if self.unit.value == "word" else None
        draw = {"key": self.draw.value, "epoch": self.epoch.value}
        shares = (self.mask_ratio.value, self.span_ratio.value)
        try:
            masker = SpanMasker(*shares, self.span_length.value, self._masker.seed)
            view = show_masks(passage, self._tokenizer, masker, **draw, segmenter=segmenter)
            self.view.value = view._repr_html_()
        except (ConfigError, DataError) as error:  # there are no such masks, or no text
            problem = "impossible" if isinstance(error, ConfigError) else "too short"
            self.view.value = f"<p>{messages('explorer')[problem]}</p>"

    def _repr_html_(self) -> str:
        values = "; ".join(f"{c.description} {c.value}" for c in self._controls)
        return f'<p class="{NO_MATH}">{escape(values)}</p>{self.view.value}'


class GuessBox(widgets.VBox):
    """A box to type a text into, and below it its masks, then the model's guesses at them.

    The box starts with `text`. `masker` has by default the settings of the recipe; the slider
    `draw` is the key by which it draws masks. `model` must be in evaluation mode. If it has an
    adapter, the guesses without and with the adapter are shown side by side.
    """

    def __init__(
        self,
        model: "PreTrainedModel",
        tokenizer: "PreTrainedTokenizerBase",
        text: str,
        masker: SpanMasker | None = None,
    ) -> None:
        self._model, self._tokenizer, self._masker = model, tokenizer, masker or SpanMasker()
        labels, self.view = messages("explorer"), widgets.HTML()
        self.text = widgets.Textarea(text, description=labels["text"], layout={"width": "auto"})
        self.draw = widgets.IntSlider(0, 0, 20, description=labels["draw"])
        for control in (self.text, self.draw):
            control.observe(self._update, "value")
        super().__init__([self.text, self.draw, self.view])
        self._update()

    def _update(self, _: dict[str, Any] | None = None) -> None:
        """Show the masks and the guesses, or say why there are none; the controls call this."""
        text, key = self.text.value, self.draw.value
        try:
            masks = show_masks(text, self._tokenizer, self._masker, key)._repr_html_()
            # Tokens that the model can read at once. A text that fits is one window for `xray`, as
            # for `show_masks`, and both draw the same masks.
            whole = getattr(self._model.config, "max_position_embeddings", 256)
            guesses = xray(self._model, self._tokenizer, [text], self._masker, key, window=whole)
            self.view.value = masks + XRayView(guesses)._repr_html_()
        except DataError:  # no text, or too few tokens for one to be masked
            self.view.value = f"<p>{messages('explorer')['too short']}</p>"
        except ConfigError as error:  # the base has no token to mask with
            self.view.value = f'<p class="{NO_MATH}">{escape(str(error))}</p>'

    def _repr_html_(self) -> str:
        return str(self.view.value)


def strengths_table(writer: "Writer", prompts: Sequence[str], sampling: Sampling) -> pd.DataFrame:
    """Continue each prompt at the four strengths of `STRENGTHS`, always from the same seed.

    `writer` is what `open_writer` returns. The table has a row for each prompt: the column
    `prompt`, then a column with the continuation at each strength. Raises `DataError` if a prompt
    and its continuation do not fit into the model's context.
    """
    rows = []
    for prompt in prompts:
        texts = [stream(*writer, prompt, sampling, strength=s) for s in STRENGTHS.values()]
        rows.append([prompt, *texts])
    return pd.DataFrame(rows, columns=["prompt", *STRENGTHS])


class WritingDesk(widgets.VBox):
    """A prompt, its continuations as they are written, and below them those that the user kept.

    The desk writes in a thread of its own, so that it can be stopped. A text that it wrote before
    with the same settings is shown again. Models are opened when the button `write` is first
    pressed, and errors are shown below the buttons. `kept` is a table of the prompts, settings and
    texts that the user kept, the newest first.

    Parameters
    ----------
    writers : mapping
        For the name of each adapter, at least one, a function that opens the adapter and returns
        what `open_writer` does. The column "base" is written by the first of them, with strength 0.
    prompt : str
        The text in the box at first.
    sampling : Sampling
        The settings of all texts; a control changes the seed.
    """

    def __init__(
        self, writers: "Mapping[str, Callable[[], Writer]]", prompt: str, sampling: Sampling
    ) -> None:
        opened = {name: cache(writer) for name, writer in writers.items()}  # each opens once
        self._writers = {"base": next(iter(opened.values())), **opened}
        self._sampling, self._stopped = sampling, Event()
        self._row: dict[str, Any] = {}  # the prompt, settings and texts that are shown now
        # Texts written to their end, by (writer's name, prompt, strength, sampling).
        self._memory: dict[tuple[object, ...], str] = {}
        self.kept = pd.DataFrame(columns=["prompt", *SETTINGS, *self._writers])
        self._make_controls(prompt, sampling.seed)
        self.status, self.view, self.shelf = (widgets.HTML() for _ in range(3))
        controls = [self.strength, self.seed, self.write, self.new_seed, self.stop, self.keep]
        bar = widgets.HBox(controls, layout={"flex_flow": "row wrap"})
        super().__init__([self.prompt, bar, self.status, self.view, self.shelf])
        self._set_busy(False)

    def _make_controls(self, prompt: str, seed: int) -> None:
        """Make the controls, each as an attribute; the button `write` calls `_write`, and so on."""
        labels, step = messages("desk"), {"step": 0.1, "readout_format": ".1f"}
        # A control sends its value when the change is done: one sent during the change may reach
        # the kernel after a click on `write`.
        whole = {"continuous_update": False}
        self.prompt = widgets.Textarea(prompt, layout={"width": "auto"}, **whole)
        self.prompt.description = named("prompt")
        self.strength = widgets.FloatSlider(1, max=STRONGEST, **step, **whole)
        self.strength.description = named("strength")
        self.seed = widgets.BoundedIntText(seed, max=2**53 - 1, description=named("seed"))
        self.seed.layout = {"width": "12rem"}
        for name in ("write", "new_seed", "stop", "keep"):
            button = widgets.Button(description=labels[name], layout={"width": "6rem"})
            button.on_click(getattr(self, f"_{name}"))
            setattr(self, name, button)
        self.write.button_style = "primary"

    def _write(self, _: widgets.Button) -> None:
        """Start a thread that continues the prompt with the settings of the controls.

        Nothing happens while the desk is busy writing.
        """
        if self.write.disabled:  # clicked twice
            return
        self._stopped.clear()
        self._set_busy(True, messages("desk")["busy"])
        sampling = replace(self._sampling, seed=self.seed.value)
        settings = {name: getattr(sampling, name) for name in SETTINGS[1:]}  # all but the strength
        self._row = {"prompt": self.prompt.value, "strength": self.strength.value, **settings}
        Thread(target=self._write_row, args=(self._row, sampling), daemon=True).start()

    def _new_seed(self, button: widgets.Button) -> None:
        """Draw a seed from 0 to 999, put it into its control, and write."""
        self.seed.value = random.randrange(1000)
        self._write(button)

    def _stop(self, _: widgets.Button) -> None:
        """Ask the thread to stop: `_echo` raises `Stopped` at the next piece of text."""
        self._stopped.set()

    def _keep(self, _: widgets.Button) -> None:
        """Put the row that is shown on top of the table of kept rows, and show the table."""
        rows = [self._row, *self.kept.to_dict("records")]
        self.kept = pd.DataFrame(rows, columns=self.kept.columns).fillna("")  # no text yet
        styled = table(self.kept).set_properties(**ROW).set_table_styles(HEAD, overwrite=False)
        self.shelf.value = f"<h3>{messages('desk')['kept']}</h3>{styled._repr_html_()}"
        self.keep.disabled = True

    def _set_busy(self, busy: bool, status: str = "") -> None:
        """Enable `stop` while the desk is busy writing, else the other buttons; show `status`.

        The button `keep` also needs a row in which a writer has written something.
        """
        self.write.disabled = self.new_seed.disabled = busy
        self.stop.disabled = not busy
        self.keep.disabled = busy or not any(self._row.get(name) for name in self._writers)
        self.status.value = f'<span class="{NO_MATH}">{escape(status)}</span>'

    def _write_row(self, row: dict[str, Any], sampling: Sampling) -> None:
        """Write the text of each writer into `row`, under the writer's name; the thread runs this.

        If the user pressed stop, or a `WuxiaError` or `RuntimeError` is raised, the writers that
        come later write nothing, and the reason is shown as the status.
        """
        error_text = ""
        try:
            for name, open_writer in self._writers.items():
                model, tokenizer = open_writer()
                prompt, strength = row["prompt"], 0.0 if name == "base" else row["strength"]
                echo, key = partial(self._echo, row, name), (name, prompt, strength, sampling)
                row[name] = self._memory.get(key, "")
                if not row[name]:
                    text = stream(model, tokenizer, prompt, sampling, echo, strength=strength)
                    row[name] = self._memory[key] = text
                self._show(row)
        except Stopped:
            error_text = messages("desk")["stopped"]
        except (WuxiaError, RuntimeError) as error:  # torch's: such as no memory left on the card
            error_text = str(error)
        finally:
            self._set_busy(False, error_text)

    def _echo(self, row: dict[str, Any], name: str, piece: str) -> None:
        """Add a piece to the text of writer `name` in `row`, and show it; `stream` calls this.

        Raises `Stopped` if the button `stop` was pressed.
        """
        if self._stopped.is_set():
            raise Stopped("stopped")
        row[name] += piece
        self._show(row)

    def _show(self, row: dict[str, Any]) -> None:
        """Show a column for each writer, the prompt and the text so far, and the settings below."""
        prompt = f"<b>{escape(row['prompt'])}</b>"
        heads = [f"<b>{escape(named(name))}</b>" for name in self._writers]
        texts = [prompt + escape(row.get(name, "")) for name in self._writers]
        settings = " · ".join(f"{named(name)} {row[name]:.12g}" for name in SETTINGS)
        self.view.value = in_columns(zip(heads, texts, strict=True), settings)

    def _repr_html_(self) -> str:
        controls = (self.prompt, self.strength, self.seed)
        values = "; ".join(f"{control.description} {control.value}" for control in controls)
        return f'<p class="{NO_MATH}">{escape(values)}</p>{self.view.value}{self.shelf.value}'
