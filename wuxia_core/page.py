"""One page of a run, which opens offline in any browser and may be sent around.

It is made of what lies in the run folder and its mixture; no model is loaded where there is a
scorecard. Nothing secret is on it, and of an absolute path the last name alone.
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
from wuxia_core.errors import SECRET, raise_machine_error
from wuxia_core.evaluate import XRay, by_name, sentences
from wuxia_core.messages import language, messages
from wuxia_core.mixing import TRAIN, VALIDATION, Mixture, open_run_mixture
from wuxia_core.text import escape

PAGE = "index.html"
TEMPLATE = Path(__file__).with_name("report.html")
ABOVE = re.compile(r"(?<![\w./:+<-])/(?:[^\s/<>\"':]+/)+")  # the folders of an absolute path
PATHS = {"model_name_or_path", "data_dir", "general_file", "lexicon", "output_dir"}
PATHS |= {"processed_data_file"}
PAIR = ("base", "tuned")
MOST_FILES = 60
SIZE = (4.2, 3.3)  # inches; a phone shows them as wide as they are
# What matplotlib writes that is no drawing.
NO_DRAWING = re.compile(r"<metadata>.*?</metadata>|<!--.*?-->| xlink:href=\"\"", re.DOTALL)

Scorecard = dict[str, Any]


def write_page(folder: Path, scorecard: Scorecard) -> Path:
    """Write `index.html` into a run folder, in the reader's language; return its path.

    Raises `DataError` where the run's metrics or its mixture are gone, `MachineError` where the
    folder cannot be written.
    """
    config = load_config(folder / "config.yaml")
    mixture = open_run_mixture(folder, config.data.processed_data_file)
    metrics = show.read_metrics(folder)
    said, facts = messages("page"), _facts(scorecard, config, mixture, metrics)
    sections = {
        "passage": _passage(scorecard),
        "verdict": _verdict(scorecard),
        "written": _written(scorecard),
        "course": _course(scorecard, metrics),
        "texts": _texts(mixture),
        "settings": _settings(config),
        "table": _table(scorecard),
    }
    drawn = [
        f'<section id="{name}"><h2>{said["heads"][name]}</h2>'
        f"<p>{said['leads'][name].format(**facts)}</p>{html}</section>"
        for name, html in sections.items()
    ]
    title, about = (say(said[name].format(**facts)) for name in ("title", "about"))
    body = f"<header><h1>{title}</h1><p>{about}</p></header>{''.join(drawn)}"
    page = folder / PAGE
    with raise_machine_error(str(folder)):
        page.write_text(render(title, body, about), encoding="utf-8")
    return page


def say(text: object) -> str:
    """Make text fit for a page: escaped, without secrets and the folders of absolute paths."""
    return escape(public(str(text)))


def public(text: str) -> str:
    """Leave out secrets, and the folders of absolute paths."""
    return ABOVE.sub("", SECRET.sub("***", text))


def render(title: str, body: str, about: str = "") -> str:
    """Put HTML into the page that all reports share, under a policy that refuses scripts."""
    code = "zh-Hans" if language() == "zh" else "en"
    template = Template(TEMPLATE.read_text(encoding="utf-8"))
    return template.substitute(title=title, body=body, about=about, language=code)


def _facts(
    scorecard: Scorecard, config: Config, mixture: Mixture, metrics: pd.DataFrame
) -> dict[str, Any]:
    """Gather the figures that the messages of the page have places for."""
    trained = mixture.outline[mixture.outline["split"] == TRAIN]
    sizes = trained.groupby("source")["characters"].sum()
    books = trained.loc[trained["source"] == "wuxia", "book"].nunique()
    found = by_name(scorecard)["masked_accuracy", "wuxia"]
    shares = {name: "–" if found[name] is None else f"{found[name]:.0%}" for name in PAIR}
    return {
        "base_model": scorecard["base"],
        "books": books,
        "wuxia": int(sizes.get("wuxia", 0)),
        "general": int(sizes.get("general", 0)),
        "steps": int(metrics["step"].max()),
        "of": scorecard["passage"].get("of", 0),
        "prompts": len(scorecard["passages"]),
        "objective": config.training.objective,
        **shares,
    }


def _passage(scorecard: Scorecard) -> str:
    """Draw the X-ray of the chosen passage."""
    if not scorecard["passage"]:
        return _none("passage")
    tokens = pd.DataFrame(scorecard["passage"]["tokens"])
    return str(show.XRayView(XRay((scorecard["passage"]["text"],), tokens, PAIR))._repr_html_())


def _none(name: str) -> str:
    return f"<p>{messages('page')['none'][name]}</p>"


def _verdict(scorecard: Scorecard) -> str:
    """Say in three sentences what was learned, forgotten and copied."""
    asked = messages("page")["asked"].values()
    pairs = zip(asked, map(say, sentences(scorecard)), strict=True)
    return f"<dl>{''.join(f'<div><dt>{dt}</dt><dd>{dd}</dd></div>' for dt, dd in pairs)}</dl>"


def _written(scorecard: Scorecard) -> str:
    """Put three passages of base and tuned beside each other, below their prompts."""
    heads, tiny = messages("columns"), locate(scorecard["base"]).resolve() == TINY_BASE.resolve()
    warning = f"<p>{messages('passages')['tiny']}</p>" if tiny else ""
    return warning + "".join(
        f'<h3 lang="zh-Hans">{say(row.prompt)}……</h3><div class="pair" lang="zh-Hans">'
        + "".join(f"<p><b>{heads[name]}</b>{say(getattr(row, name))}……</p>" for name in PAIR)
        + "</div>"
        for row in show.side_by_side(scorecard, 3).itertuples()
    )


def _course(scorecard: Scorecard, metrics: pd.DataFrame) -> str:
    """Draw strengths, learning against forgetting, and the course of training."""
    bits, losses = ([f"eval_{name}_{what}" for name in ("wuxia", "general")]
                    for what in ("bits_per_char", "loss"))  # fmt: skip
    measured = len(metrics.reindex(columns=bits).dropna())
    plots: dict[str, Callable[..., object] | None] = {
        "strengths": partial(show.plot_strengths, scorecard)
        if len(scorecard["strengths"]) > 1
        else None,
        "forgetting": partial(show.plot_forgetting, metrics) if measured else None,
        "bits": partial(show.plot_metric, metrics, bits, ylabel="bits_per_char"),
        "losses": partial(show.plot_metric, metrics, [*losses, "loss"], ylabel="nats"),
    }
    return f'<div class="plots">{"".join(_figure(*each) for each in plots.items())}</div>'


def _figure(name: str, plot: Callable[..., object] | None) -> str:
    """Draw a plot as SVG in the colours and the font of the page, below its title."""
    said = messages("page")["plots"][name]
    if plot is None:
        return f"<figure><h3>{said['title']}</h3>{_none('plot')}</figure>"
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": name}), io.StringIO() as file:
        show.axes(Figure().subplots())  # what is made from here on has the plots' style
        figure = Figure(SIZE, layout="constrained")
        ax = figure.subplots()
        plot(ax=ax)
        if legend := ax.get_legend():
            legend.remove()
        if len(handles := ax.get_legend_handles_labels()[0]) > 1:
            figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False)
        figure.savefig(file, format="svg", transparent=True)
        drawn = NO_DRAWING.sub("", file.getvalue())
    drawn = drawn.replace(show.INK.lower(), "currentColor")
    body = drawn.partition("<svg")[2].partition(">")[2].replace("xlink:href", "href")
    box = " ".join(f"{72 * inches:g}" for inches in SIZE)
    svg = f'<svg viewBox="0 0 {box}" role="img" aria-label="{said["title"]}">{body}'
    return f"<figure><h3>{said['title']}</h3>{svg}<figcaption>{said['about']}</figcaption></figure>"


def _texts(mixture: Mixture) -> str:
    """List the files, novels first: size, what cleaning took out, and what became of each."""
    said, files = messages("page"), mixture.preparation["files"]
    files = sorted(files, key=lambda file: (file["source"] == "general", -file["characters"]))
    fates = _fates(mixture)
    rows = []
    for file in files[:MOST_FILES]:
        why = file["refused"] and said["fates"]["refused"].format(why=say(file["refused"]))
        what = said["sources"][file["source"]].format(fate=why or fates.get(file["book"], ""))
        title = f"{say(file['book'] or file['path'])}<br><small>{what}</small>"
        removed = sum(rule["removed"] for rule in file["cleaning"].values())
        rows.append([title, f"{file['characters']:,}", f"{removed:,}"])
    more = len(files) - len(rows)
    rest = f"<p>{said['more'].format(more=more)}</p>" if more else ""
    return _rows(said["files"].values(), rows) + rest + _cleaned(mixture)


def _fates(mixture: Mixture) -> dict[str, str]:
    """Say of each book whether it was trained on, held out, or left out as a copy of another."""
    said, outline = messages("page")["fates"], mixture.outline
    held_out = outline["characters"].where(outline["split"] == VALIDATION, 0)
    sizes = outline.assign(held_out=held_out).groupby("book")[["characters", "held_out"]].sum()
    shares = sizes["held_out"] / sizes["characters"]
    states = {book: {0: "train", 1: "validation"}.get(x, "part") for book, x in shares.items()}
    fates = {book: said[state].format(share=shares[book]) for book, state in states.items()}
    return fates | {
        same["book"]: said["copy"].format(share=same["share"], kept=say(same["kept"]))
        for same in mixture.preparation["same_books"]
    }


def _cleaned(mixture: Mixture) -> str:
    """Name what the rules of cleaning did in all files, the most first."""
    said = messages("page")
    done = [
        said["cleaned"].format(rule=said["rules"][row.rule], places=row.places, removed=row.removed)
        for row in show.cleaning_table(mixture).itertuples()
    ]
    return f"<p>{said['cleaning'].format(done=said['between'].join(done))}</p>" if done else ""


def _rows(heads: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """Make a table of HTML."""
    first = "".join(f"<th>{head}</th>" for head in heads)
    rest = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    return f'<table class="rows"><tr>{first}</tr>{rest}</table>'


def _settings(config: Config) -> str:
    """List the settings that differ from their defaults; paths say nothing to others."""
    usual = dict(Config())
    rows = [
        [f"<code>{section}.<wbr>{key}</code>", _value(value), _value(getattr(usual[section], key))]
        for section, keys in config
        for key, value in keys
        if section != "plan" and key not in PATHS and value != getattr(usual[section], key)
    ]
    return _rows(messages("page")["keys"].values(), rows) if rows else _none("settings")


def _value(value: object) -> str:
    return "–" if value is None else say(value)


def _table(scorecard: Scorecard) -> str:
    """Fold the whole scorecard away."""
    rows = show.scorecard_table(scorecard)
    rows["unit"] = rows.pop("unit")  # last: a phone shows the first columns
    table = show.table(rows).format(precision=3, na_rep="").set_uuid("card")
    shown = public(table.to_html())
    return f"<details><summary>{messages('page')['fold']}</summary>{shown}</details>"
