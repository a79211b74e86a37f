"""The page of a run, one HTML file that opens offline in any browser and may be sent around.

The page is made from the scorecard, the run folder and its mixture; no model is loaded. The
template page.html arranges what is made here. The page shows no secret, and of an absolute path
only the last name.
"""

import base64
import io
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from matplotlib import rc_context
from matplotlib.figure import Figure

from wuxia_core import show
from wuxia_core.config import Config, load_config
from wuxia_core.errors import SECRET, DataError, raise_machine_error
from wuxia_core.evaluate import XRay, by_name, sentences, tiny_warning
from wuxia_core.messages import language, messages
from wuxia_core.mixing import TRAIN, VALIDATION, Mixture, open_run_mixture
from wuxia_core.text import visible

PAGE = "index.html"
ABOVE = re.compile(r"(?<![\w./:+<-])/(?:[^\s/<>\"':]+/)+")  # the folders of an absolute path
# The settings whose values are paths.
PATHS = {"model_name_or_path", "data_dir", "general_file", "lexicon", "output_dir"}
PATHS |= {"processed_data_file"}
PAIR = ("base", "tuned")
MOST_FILES = 60  # that the page lists; it says how many more there are
SIZE = (4.2, 3.3)  # inches, width and height of a plot; a phone shows that without scaling
PREVIEW, PAPER, TEXT = (12, 6.3), "#fcfbf8", "#24211d"  # of a preview: size, inches, and colours
PREVIEW_LINE = re.compile("[^\n]{1,29}[，。！？；：、”」]?")  # no line begins with such a sign
# Parts of matplotlib's SVG that draw nothing.
NO_DRAWING = re.compile(r"<metadata>.*?</metadata>|<!--.*?-->| xlink:href=\"\"", re.DOTALL)

Scorecard = dict[str, Any]


def write_page(folder: Path, scorecard: Scorecard) -> Path:
    """Write `index.html` into a run folder, in the reader's language; return its path.

    `scorecard` is what `evaluate` returned for the folder. Raises `DataError` if the run's metrics
    or its mixture are gone, `MachineError` if the folder cannot be written.
    """
    config = load_config(folder / "config.yaml")
    mixture = open_run_mixture(folder, config.data.processed_data_file)
    metrics = show.read_metrics(folder)
    if metrics.empty:
        raise DataError(f"{folder}: metrics.jsonl has no whole row; copy it anew")
    texts, facts = messages("page"), _facts(scorecard, config, mixture, metrics)
    passages = show.side_by_side(scorecard, 3).to_dict("records")
    title, about = (texts[name].format(**facts) for name in ("title", "about"))
    html = render(
        "page.html",
        title=title,
        about=about,
        preview=_preview(shareable(title), shareable(passages[0]["prompt"] + passages[0]["tuned"])),
        texts=texts,
        facts=facts,
        columns=messages("columns"),
        xray=_xray(scorecard),
        sentences=sentences(scorecard),
        warning=tiny_warning(scorecard),
        passages=passages,
        pair=PAIR,
        plots=_plots(scorecard, metrics),
        view_box=" ".join(f"{72 * inches:g}" for inches in (0, 0, *SIZE)),  # matplotlib's, points
        files=_files(mixture),
        most_files=MOST_FILES,
        cleaned=_cleaned(mixture),
        settings=_settings(config),
        metrics=_scorecard_html(scorecard),
    )
    with raise_machine_error(str(folder)):
        (folder / PAGE).write_text(html, encoding="utf-8")
    return folder / PAGE


def render(name: str, **values: object) -> str:
    """Fill the template `name` of this folder with `values`; return the page's HTML.

    A value that is no `Markup` is made `shareable` and escaped; `Markup` is inserted as it is.
    Every template has a policy that refuses scripts, and gets the reader's language as `language`.
    """
    loader = FileSystemLoader(Path(__file__).parent)
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, finalize=shareable
    )
    code = "zh-Hans" if language() == "zh" else "en"
    return environment.get_template(name).render(language=code, **values)


def shareable(value: object) -> str:
    """Make a value fit to be escaped and sent around: `visible`, and without what `public` hides.

    `Markup` comes back as it is, and None as a dash.
    """
    if isinstance(value, Markup):
        return value
    return "–" if value is None else public(visible(str(value)))


def public(text: str) -> str:
    """Replace secrets by ***, and cut each absolute path to its last name.

    `/home/me/雪.txt` becomes `雪.txt`; an address such as `https://a.b/c` stays.
    """
    return ABOVE.sub("", SECRET.sub("***", text))


def _facts(
    scorecard: Scorecard, config: Config, mixture: Mixture, metrics: pd.DataFrame
) -> dict[str, Any]:
    """Gather the values for the places in the messages' sections `[page]` and `[page.leads]`.

    `books` is the number of novels that were trained on, `wuxia` and `general` are characters of
    the training texts, `steps` and `epochs` count the whole run, `base` and `tuned` are the shares
    of masked tokens that each model found ("–" if not measured), and `of` is the number of openings
    that the scorecard's passage was chosen from.
    """
    trained = mixture.outline[mixture.outline["split"] == TRAIN]
    sizes = trained.groupby("source")["characters"].sum()
    row = by_name(scorecard)["masked_accuracy", "wuxia"]
    shares = {name: "–" if row[name] is None else f"{row[name]:.1%}" for name in PAIR}
    return {
        "base_model": scorecard["base"],
        "books": trained.loc[trained["source"] == "wuxia", "book"].nunique(),
        "wuxia": int(sizes.get("wuxia", 0)),
        "general": int(sizes.get("general", 0)),
        "steps": int(metrics["step"].max()),
        "epochs": f"{metrics['epoch'].max():.2g}" if "epoch" in metrics else "–",
        "of": scorecard["passage"].get("of", 0),
        "prompts": len(scorecard["passages"]),
        "objective": config.training.objective,
        **shares,
    }


def _preview(title: str, passage: str) -> Markup:
    """Draw the picture that a link to the page is shown with, 1,200 × 630: a title and a passage.

    Returns a PNG as an address that holds its own data.
    """
    with rc_context(), io.BytesIO() as file:
        show.use_style()
        figure = Figure(PREVIEW, dpi=100, facecolor=PAPER)
        lines = "\n".join(PREVIEW_LINE.findall(show.drawable(passage))[:5])
        figure.text(0.06, 0.8, show.drawable(title), size=36, color=TEXT)
        figure.text(0.06, 0.7, f"{lines}……", size=24, color=TEXT, va="top", linespacing=1.8)
        figure.savefig(file, format="png")
        return Markup(f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}")


def _xray(scorecard: Scorecard) -> Markup:
    """Draw the X-ray of the scorecard's passage; "" if there is none."""
    if not scorecard["passage"]:
        return Markup()
    tokens = pd.DataFrame(scorecard["passage"]["tokens"])
    xray = XRay((scorecard["passage"]["text"],), tokens, PAIR)
    return Markup(show.XRayView(xray)._repr_html_())


def _plots(scorecard: Scorecard, metrics: pd.DataFrame) -> dict[str, Markup]:
    """Draw the four plots of the page; return the SVG of each by its name.

    `strengths` and `forgetting` show learning against forgetting, by the adapter's strength and in
    training; either is "" if too little was measured for it. `bits` and `losses` show the course of
    training.
    """
    bits = ["eval_wuxia_bits_per_char", "eval_general_bits_per_char"]
    losses = ["eval_wuxia_loss", "eval_general_loss", "loss"]
    is_measured = not metrics.reindex(columns=bits).dropna().empty
    has_strengths = len(scorecard["strengths"]) > 1
    plots: dict[str, Callable[..., object] | None] = {
        "strengths": partial(show.plot_strengths, scorecard) if has_strengths else None,
        "forgetting": partial(show.plot_forgetting, metrics) if is_measured else None,
        "bits": partial(show.plot_metric, metrics, bits, ylabel="bits_per_char"),
        "losses": partial(show.plot_metric, metrics, losses, ylabel="nats"),
    }
    return {name: _svg(name, plot) if plot else Markup() for name, plot in plots.items()}


def _svg(name: str, plot: Callable[..., object]) -> Markup:
    """Draw a plot as SVG, for the page's colours, font and width; return it without `<svg …>`.

    The closing tag stays: page.html has only an opening tag of its own. `plot` draws on the axes it
    is given as `ax`. `name`, another for each plot of a page, goes into the ids by which the parts
    of a plot refer to each other, so that no two plots share these.
    """
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": name}), io.StringIO() as file:
        show.use_style()  # before the figure is made, which takes it
        figure = Figure(SIZE, layout="constrained")
        ax = figure.subplots()
        plot(ax=ax)
        if legend := ax.get_legend():  # it stands beside the axes; the figure gets one below them
            legend.remove()
        if len(handles := ax.get_legend_handles_labels()[0]) > 1:
            figure.legend(handles=handles, loc="outside lower center", ncols=2, frameon=False)
        figure.savefig(file, format="svg", transparent=True)
        svg = NO_DRAWING.sub("", file.getvalue()).replace(show.INK.lower(), "currentColor")
    # Matplotlib's own <svg …> gives way to one without a fixed size.
    return Markup(svg.partition("<svg")[2].partition(">")[2].replace("xlink:href", "href"))


def _files(mixture: Mixture) -> list[tuple[Markup, str, str]]:
    """List the files: what became of each, its characters, and how many of these were removed.

    A row is (HTML of the file's title and fate, characters, characters removed). The longest files
    come first, general text after all others.
    """
    templates, fates = messages("page"), _fates(mixture)
    cell = Markup("{}<br><small>{}</small>")
    rows = []
    files = mixture.preparation["files"]
    for file in sorted(files, key=lambda x: (x["source"] == "general", -x["characters"])):
        fate = fates.get(file["book"], "")
        if file["refused"]:  # why it, or the rest of it, was left out; ""
            fate = templates["fates"]["refused"].format(why=show.translated(file["refused"]))
        title, fate = (
            file["book"] or file["path"],
            templates["sources"][file["source"]].format(fate=fate),
        )
        removed = sum(rule["removed"] for rule in file["cleaning"].values())
        name = cell.format(shareable(title), shareable(fate))
        rows.append((name, f"{file['characters']:,}", f"{removed:,}"))
    return rows


def _fates(mixture: Mixture) -> dict[str, str]:
    """Say of each book whether it was trained on, held out, not used, or left out as a copy.

    Returns a sentence for each book, by its name.
    """
    templates, outline = messages("page")["fates"], mixture.outline
    used = outline[outline["split"].isin([TRAIN, VALIDATION])]
    held_out = used["characters"].where(used["split"] == VALIDATION, 0)
    sizes = used.assign(held_out=held_out).groupby("book")[["characters", "held_out"]].sum()
    shares = sizes["held_out"] / sizes["characters"]  # of each book, held out: 0 to 1
    # A share of 0 or 1 has a sentence of its own; for any other share a part is held out.
    states = {book: {0: "train", 1: "validation"}.get(x, "part") for book, x in shares.items()}
    fates = dict.fromkeys(outline["book"], templates["unused"])
    fates |= {book: templates[state].format(share=shares[book]) for book, state in states.items()}
    return fates | {
        copy["book"]: templates["copy"].format(share=copy["share"], kept=copy["kept"])
        for copy in mixture.preparation["same_books"]
    }


def _cleaned(mixture: Mixture) -> str:
    """Say what the rules of cleaning removed in all files; "" if they changed nothing.

    The rule that removed most characters comes first.
    """
    texts = messages("page")
    return str(texts["between"]).join(
        texts["cleaned"].format(
            rule=texts["rules"][row.rule], places=row.places, removed=row.removed
        )
        for row in show.cleaning_table(mixture).itertuples()
    )


def _settings(config: Config) -> list[tuple[Markup, Any, Any]]:
    """List the settings that differ from their defaults: name (as HTML), value and default.

    The section `plan` and paths are left out: they tell others nothing.
    """
    defaults, name = dict(Config()), Markup("<code>{}.<wbr>{}</code>")
    return [
        (name.format(section, key), value, default)
        for section, keys in config
        for (key, value), (_, default) in zip(keys, defaults[section], strict=True)
        if section != "plan" and key not in PATHS and value != default
    ]


def _scorecard_html(scorecard: Scorecard) -> Markup:
    """Write the scorecard's metrics as an HTML table, a row each; `show.table` escapes texts."""
    rows = show.scorecard_table(scorecard)
    rows["unit"] = rows.pop("unit")  # moved to the end: a phone shows the first columns
    table = show.table(rows).format(precision=3, na_rep="").set_uuid("card")  # else a random id
    return Markup(public(table.to_html()))
