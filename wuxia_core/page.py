"""The page of a run, one HTML file that opens offline in any browser and may be sent around.

The page is made from the scorecard, the run folder and its mixture; no model is loaded. It shows no
secret, and of an absolute path only the last name.
"""

import io
import re
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from string import Template
from typing import Any

import pandas as pd
from matplotlib import rc_context
from matplotlib.figure import Figure

from wuxia_core import show
from wuxia_core.config import TINY_BASE, Config, load_config, locate
from wuxia_core.errors import SECRET, DataError, raise_machine_error
from wuxia_core.evaluate import XRay, by_name, sentences
from wuxia_core.messages import language, messages
from wuxia_core.mixing import TRAIN, VALIDATION, Mixture, open_run_mixture
from wuxia_core.text import escape

PAGE = "index.html"
TEMPLATE = Path(__file__).with_name("report.html")
ABOVE = re.compile(r"(?<![\w./:+<-])/(?:[^\s/<>\"':]+/)+")  # the folders of an absolute path
# The settings whose values are paths.
PATHS = {"model_name_or_path", "data_dir", "general_file", "lexicon", "output_dir"}
PATHS |= {"processed_data_file"}
PAIR = ("base", "tuned")
MOST_FILES = 60  # that are listed
SIZE = (4.2, 3.3)  # inches, width and height of a plot; a phone shows that without scaling
# Parts of matplotlib's SVG that draw nothing.
NO_DRAWING = re.compile(r"<metadata>.*?</metadata>|<!--.*?-->| xlink:href=\"\"", re.DOTALL)

Scorecard = dict[str, Any]


def write_page(folder: Path, scorecard: Scorecard) -> Path:
    """Write `index.html` into a run folder, in the reader's language; return its path.

    `scorecard` is that of `evaluate`. Raises `DataError` if the run's metrics or its mixture are
    gone, `MachineError` if the folder cannot be written.
    """
    config = load_config(folder / "config.yaml")
    mixture = open_run_mixture(folder, config.data.processed_data_file)
    metrics = show.read_metrics(folder)
    if metrics.empty:
        raise DataError(f"{folder}: metrics.jsonl has no whole row; copy it anew")
    templates, facts = messages("page"), _facts(scorecard, config, mixture, metrics)
    sections = {
        "passage": _passage(scorecard),
        "verdict": _verdict(scorecard),
        "written": _written(scorecard),
        "course": _course(scorecard, metrics),
        "texts": _texts(mixture),
        "settings": _settings(config),
        "table": _table(scorecard),
    }
    blocks = [
        f'<section id="{name}"><h2>{templates["heads"][name]}</h2>'
        f"<p>{templates['leads'][name].format(**facts)}</p>{html}</section>"
        for name, html in sections.items()
    ]
    title, about = (say(templates[name].format(**facts)) for name in ("title", "about"))
    body = f"<header><h1>{title}</h1><p>{about}</p></header>{''.join(blocks)}"
    page = folder / PAGE
    with raise_machine_error(str(folder)):
        page.write_text(render(title, body, about), encoding="utf-8")
    return page


def say(text: object) -> str:
    """Make text fit for a page: escape it, and leave out what `public` leaves out."""
    return escape(public(str(text)))


def public(text: str) -> str:
    """Replace secrets by ***, and cut each absolute path to its last name.

    `/home/me/雪.txt` becomes `雪.txt`; an address such as `https://a.b/c` stays.
    """
    return ABOVE.sub("", SECRET.sub("***", text))


def render(title: str, body: str, about: str = "") -> str:
    """Put `title`, `body` and `about` into the template of all reports; return the page's HTML.

    All three are HTML; `about` is the page's description, which a browser does not show. The
    template has a policy that refuses scripts.
    """
    code = "zh-Hans" if language() == "zh" else "en"
    template = Template(TEMPLATE.read_text(encoding="utf-8"))
    return template.substitute(title=title, body=body, about=about, language=code)


def _facts(
    scorecard: Scorecard, config: Config, mixture: Mixture, metrics: pd.DataFrame
) -> dict[str, Any]:
    """Gather the values for the places in the messages' sections `[page]` and `[page.leads]`.

    `wuxia` and `general` are characters of the training texts, `base` and `tuned` the shares of
    masked tokens that each model found ("–" if not measured), and `of` the number of openings that
    the scorecard's passage was chosen from.
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


def _passage(scorecard: Scorecard) -> str:
    """Draw the X-ray of the scorecard's passage, or say that there is none."""
    if not scorecard["passage"]:
        return _none("passage")
    tokens = pd.DataFrame(scorecard["passage"]["tokens"])
    return str(show.XRayView(XRay((scorecard["passage"]["text"],), tokens, PAIR))._repr_html_())


def _none(name: str) -> str:
    """Say why a section is empty, or a plot missing; `name` is a key of `[page.none]`."""
    return f"<p>{messages('page')['none'][name]}</p>"


def _verdict(scorecard: Scorecard) -> str:
    """Ask whether the model learned, forgot and copied, and answer in a sentence each."""
    questions = messages("page")["asked"].values()
    pairs = zip(questions, map(say, sentences(scorecard)), strict=True)
    return f"<dl>{''.join(f'<div><dt>{dt}</dt><dd>{dd}</dd></div>' for dt, dd in pairs)}</dl>"


def _written(scorecard: Scorecard) -> str:
    """Put passages of base and tuned beside each other, below three of the prompts at most.

    Of the bundled base, which is tiny, a warning stands above them.
    """
    heads, tiny = messages("columns"), locate(scorecard["base"]).resolve() == TINY_BASE.resolve()
    warning = f"<p>{messages('passages')['tiny']}</p>" if tiny else ""
    return warning + "".join(
        f'<h3 lang="zh-Hans">{say(row.prompt)}……</h3><div class="pair" lang="zh-Hans">'
        + "".join(f"<p><b>{heads[name]}</b>{say(getattr(row, name))}……</p>" for name in PAIR)
        + "</div>"
        for row in show.side_by_side(scorecard, 3).itertuples()
    )


def _course(scorecard: Scorecard, metrics: pd.DataFrame) -> str:
    """Draw the strengths, learning against forgetting, and the course of training.

    In place of one of the first two plots stands a sentence if too little was measured for it.
    """
    bits = ["eval_wuxia_bits_per_char", "eval_general_bits_per_char"]
    losses = ["eval_wuxia_loss", "eval_general_loss", "loss"]
    enough_strengths = len(scorecard["strengths"]) > 1
    measured = not metrics.reindex(columns=bits).dropna().empty
    plots: dict[str, Callable[..., object] | None] = {
        "strengths": partial(show.plot_strengths, scorecard) if enough_strengths else None,
        "forgetting": partial(show.plot_forgetting, metrics) if measured else None,
        "bits": partial(show.plot_metric, metrics, bits, ylabel="bits_per_char"),
        "losses": partial(show.plot_metric, metrics, losses, ylabel="nats"),
    }
    figures = "".join(_figure(name, plot) for name, plot in plots.items())
    return f'<div class="plots">{figures}</div>'


def _figure(name: str, plot: Callable[..., object] | None) -> str:
    """Draw a plot as SVG in the colours and the font of the page, below its title.

    `name` is that of the plot in the messages; `plot` draws on the axes that it is given as `ax`.
    If `plot` is None, a sentence says that too little was measured.
    """
    texts = messages("page")["plots"][name]
    if plot is None:
        return f"<figure><h3>{texts['title']}</h3>{_none('plot')}</figure>"
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": name}), io.StringIO() as file:
        show.axes(Figure().subplots())  # only to set the plots' style, which the next figure takes
        figure = Figure(SIZE, layout="constrained")
        ax = figure.subplots()
        plot(ax=ax)
        if legend := ax.get_legend():  # beside the axes; the figure's stands below them
            legend.remove()
        if len(handles := ax.get_legend_handles_labels()[0]) > 1:
            figure.legend(handles=handles, loc="outside lower center", ncols=2, frameon=False)
        figure.savefig(file, format="svg", transparent=True)
        svg = NO_DRAWING.sub("", file.getvalue()).replace(show.INK.lower(), "currentColor")
    # What stands behind matplotlib's own <svg …>, which gives way to one without a fixed size.
    body = svg.partition("<svg")[2].partition(">")[2].replace("xlink:href", "href")
    box = " ".join(f"{72 * inches:g}" for inches in SIZE)  # in points, as matplotlib draws
    title, about = texts["title"], texts["about"]
    svg = f'<svg viewBox="0 0 {box}" role="img" aria-label="{title}">{body}'
    return f"<figure><h3>{title}</h3>{svg}<figcaption>{about}</figcaption></figure>"


def _texts(mixture: Mixture) -> str:
    """List the files: what became of each, its characters, and how many of these were removed.

    The longest files come first, general text after all others. Of more than 60 files the rest is
    only counted. Below stands what the rules of cleaning removed.
    """
    templates, files = messages("page"), mixture.preparation["files"]
    files = sorted(files, key=lambda file: (file["source"] == "general", -file["characters"]))
    fates = _fates(mixture)
    rows = []
    for file in files[:MOST_FILES]:
        fate = fates.get(file["book"], "")
        if file["refused"]:  # the reason, or empty
            fate = templates["fates"]["refused"].format(why=say(file["refused"]))
        kind_and_fate = templates["sources"][file["source"]].format(fate=fate)
        title = f"{say(file['book'] or file['path'])}<br><small>{kind_and_fate}</small>"
        removed = sum(rule["removed"] for rule in file["cleaning"].values())
        rows.append([title, f"{file['characters']:,}", f"{removed:,}"])
    omitted = len(files) - len(rows)
    rest = f"<p>{templates['more'].format(more=omitted)}</p>" if omitted else ""
    heads = templates["files"].values()
    return _rows(heads, rows) + rest + _cleaned(mixture)


def _fates(mixture: Mixture) -> dict[str, str]:
    """Say of each book whether it was trained on, held out, not used, or left out as a copy.

    Returns a sentence for each book, by its name.
    """
    templates, outline = messages("page")["fates"], mixture.outline
    used = outline[outline["split"].isin([TRAIN, VALIDATION])]
    held_out = used["characters"].where(used["split"] == VALIDATION, 0)
    sizes = used.assign(held_out=held_out).groupby("book")[["characters", "held_out"]].sum()
    shares = sizes["held_out"] / sizes["characters"]
    # A share of 0 or 1 has a sentence of its own, any other is a part.
    states = {book: {0: "train", 1: "validation"}.get(x, "part") for book, x in shares.items()}
    fates = dict.fromkeys(outline["book"], templates["unused"])
    fates |= {book: templates[state].format(share=shares[book]) for book, state in states.items()}
    return fates | {
        copy["book"]: templates["copy"].format(share=copy["share"], kept=say(copy["kept"]))
        for copy in mixture.preparation["same_books"]
    }


def _cleaned(mixture: Mixture) -> str:
    """Say in a paragraph what the rules of cleaning removed in all files, the most first.

    Returns "" if they changed nothing.
    """
    texts, template = messages("page"), messages("page")["cleaned"]
    clauses = [
        template.format(rule=texts["rules"][row.rule], places=row.places, removed=row.removed)
        for row in show.cleaning_table(mixture).itertuples()
    ]
    done = texts["between"].join(clauses)
    return f"<p>{texts['cleaning'].format(done=done)}</p>" if clauses else ""


def _rows(heads: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """Make an HTML table of `rows` below a row of `heads`; heads and cells are HTML."""
    head_cells = "".join(f"<th>{head}</th>" for head in heads)
    body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    return f'<table class="rows"><tr>{head_cells}</tr>{body}</table>'


def _settings(config: Config) -> str:
    """List the settings that differ from their defaults, with both values.

    The section `plan` and paths are left out: they tell others nothing.
    """
    defaults = dict(Config())
    rows = [
        [f"<code>{section}.<wbr>{key}</code>", _value(value), _value(default)]
        for section, keys in config
        for (key, value), (_, default) in zip(keys, defaults[section], strict=True)
        if section != "plan" and key not in PATHS and value != default
    ]
    return _rows(messages("page")["keys"].values(), rows) if rows else _none("settings")


def _value(value: object) -> str:
    """Write the value of a setting as HTML, `None` as a dash."""
    return "–" if value is None else say(value)


def _table(scorecard: Scorecard) -> str:
    """Write all metrics of the scorecard as a table that is folded away until it is clicked."""
    rows = show.scorecard_table(scorecard)
    rows["unit"] = rows.pop("unit")  # moved to the end: a phone shows the first columns
    table = show.table(rows).format(precision=3, na_rep="").set_uuid("card")  # not a random id
    html = public(table.to_html())
    return f"<details><summary>{messages('page')['fold']}</summary>{html}</details>"
