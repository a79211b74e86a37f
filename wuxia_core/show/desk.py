"""A desk to write at: a prompt, and what the base and the adapters make of it, side by side."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from threading import Event, Thread
from typing import TYPE_CHECKING, Any

import ipywidgets as widgets
import pandas as pd
from tqdm import tqdm

from wuxia_core.errors import Stopped, WuxiaError
from wuxia_core.show.masks import COLUMN, TEXT_STYLE
from wuxia_core.show.tables import table
from wuxia_core.text import NO_MATH, escape
from wuxia_core.write import STRONGEST, Sampling, stream

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedTokenizerBase

    Writer = tuple[PeftModel, PreTrainedTokenizerBase]  # as `open_writer` gives it

SETTINGS = ("strength", "seed", "tokens", "temperature")
KNOWN = {0.0: " (base)", 1.0: " (as trained)"}  # strengths


def strengths_table(
    writer: "Writer",
    prompts: Sequence[str],
    sampling: Sampling | None = None,
    strengths: Sequence[float] = (0, 0.5, 1, 1.5),
) -> pd.DataFrame:
    """Continue prompts at several strengths of the adapter: a row a prompt, the same seed in all.

    Raises as `stream` does.
    """
    rows = []
    for prompt in tqdm(prompts, "writing", leave=False):
        row = {"prompt": prompt}
        for strength in strengths:
            name = f"{strength:g}{KNOWN.get(strength, '')}"
            row[name] = stream(*writer, prompt, sampling or Sampling(), strength=strength)
        rows.append(row)
    return pd.DataFrame(rows)


class WritingDesk(widgets.VBox):
    """A prompt, controls, and the passages as they are written; below them those that were kept.

    It writes in a thread of its own, so that it can be stopped; what it wrote before with the same
    settings it does not write again. Errors are said below the buttons.

    Parameters
    ----------
    writers : mapping
        Names and what `open_writer` gives; the base is that of the first.
    prompt : str
        What stands in the box at first.
    sampling : Sampling, optional
        What the controls start from, and what they do not change.
    """

    def __init__(
        self, writers: "Mapping[str, Writer]", prompt: str = "", sampling: Sampling | None = None
    ) -> None:
        self._writers = {"base": next(iter(writers.values())), **writers}
        self._sampling = sampling or Sampling()
        self._row: dict[str, Any] = {}  # what is shown, with its settings
        self._rows: list[dict[str, Any]] = []  # what was kept
        self._memory: dict[tuple[object, ...], str] = {}
        self._stopped = Event()
        self._make_controls(prompt, self._sampling)
        self.said, self.view, self.shelf = (widgets.HTML() for _ in range(3))
        sliders = [self.strength, self.tokens, self.temperature, self.seed]
        for control in [self.prompt, *sliders]:
            control.layout, control.style.description_width = {"width": "22rem"}, "6rem"
        self.prompt.layout = {"width": "auto"}
        rows = [sliders, [self.write, self.stop, self.new_seed, self.keep, self.said]]
        boxes = [widgets.HBox(row, layout={"flex_flow": "row wrap"}) for row in rows]
        super().__init__([self.prompt, *boxes, self.view, self.shelf])
        self._set_busy(False)

    def _make_controls(self, prompt: str, start: Sampling) -> None:
        hint = "how the passage begins"
        longest, hottest = max(1000, start.tokens), max(2.0, start.temperature)
        self.prompt = widgets.Textarea(prompt, description="prompt", placeholder=hint, rows=3)
        self.strength = widgets.FloatSlider(1, max=STRONGEST, step=0.1, description="strength")
        self.tokens = widgets.IntSlider(start.tokens, 1, longest, description="tokens")
        self.temperature = widgets.FloatSlider(
            start.temperature, max=hottest, step=0.1, description="temperature"
        )
        self.seed = widgets.BoundedIntText(start.seed, max=2**53 - 1, description="seed")
        self.write = widgets.Button(description="write", button_style="primary")
        self.stop = widgets.Button(description="stop")
        self.new_seed = widgets.Button(description="new seed", tooltip="and write with it")
        self.keep = widgets.Button(description="keep", tooltip="put it in the table below")
        for name in ("write", "stop", "new_seed", "keep"):
            getattr(self, name).on_click(getattr(self, f"_{name}"))

    def _write(self, _: widgets.Button) -> None:
        if self.write.disabled:  # clicked twice
            return
        self._stopped.clear()
        self._set_busy(True)
        settings = {name: getattr(self, name).value for name in SETTINGS}
        self._row = {"prompt": self.prompt.value, **settings}
        Thread(target=self._write_columns, daemon=True).start()

    def _stop(self, _: widgets.Button) -> None:
        self._stopped.set()

    def _new_seed(self, button: widgets.Button) -> None:
        self.seed.value = random.randrange(1000)
        self._write(button)

    def _keep(self, _: widgets.Button) -> None:
        self._rows.insert(0, self._row)
        self.keep.disabled = True
        self.shelf.value = table(self.kept)._repr_html_()

    @property
    def kept(self) -> pd.DataFrame:
        """What was kept, the newest first: prompt, settings and a column a writer."""
        return pd.DataFrame(self._rows, columns=["prompt", *SETTINGS, *self._writers])

    def _set_busy(self, busy: bool, said: str = "") -> None:
        self.write.disabled = self.new_seed.disabled = busy
        self.stop.disabled = not busy
        self.keep.disabled = busy or self._writers.keys() > self._row.keys()
        self.said.value = f'<span class="{NO_MATH}">{escape(said)}</span>'

    def _write_columns(self) -> None:
        said = ""
        try:
            for name in self._writers:
                self._write_column(name)
        except (WuxiaError, RuntimeError) as error:  # torch's: such as no memory left on the card
            said = str(error)
        finally:
            self._set_busy(False, said)

    def _write_column(self, name: str) -> None:
        row, strength = self._row, self._row["strength"] if name != "base" else 0.0
        changed = {setting: row[setting] for setting in SETTINGS[1:]}
        sampling = replace(self._sampling, **changed)
        key, pieces = (name, strength, row["prompt"], sampling), []

        def echo(piece: str) -> None:
            if self._stopped.is_set():
                raise Stopped("stopped")
            pieces.append(piece)
            self._show({**row, name: "".join(pieces)})

        if key not in self._memory:
            writer = self._writers[name]
            self._memory[key] = stream(*writer, row["prompt"], sampling, echo, strength=strength)
        row[name] = self._memory[key]
        self._show(row)

    def _show(self, row: dict[str, Any]) -> None:
        """Draw a row's prompt and continuations, as far as they are written."""
        width = f"width:{100 // len(self._writers)}%;min-width:min(100%,17em)"
        prompt = escape(row["prompt"])
        columns = "".join(
            f'<div style="{COLUMN};{width}"><b>{escape(name)}</b>'
            f'<div style="{TEXT_STYLE}"><b>{prompt}</b>{escape(row[name])}</div></div>'
            for name in self._writers
            if name in row
        )
        settings = " · ".join(f"{name} {row[name]:g}" for name in SETTINGS)
        below = f'<p style="font-size:13px">{settings}</p>'
        self.view.value = f'<div lang="zh-Hans" class="{NO_MATH}">{columns}{below}</div>'

    def _repr_html_(self) -> str:
        controls = [self.prompt, self.strength, self.tokens, self.temperature, self.seed]
        settings = "; ".join(f"{control.description} {control.value}" for control in controls)
        return f'<p class="{NO_MATH}">{escape(settings)}</p>{self.view.value}{self.shelf.value}'
