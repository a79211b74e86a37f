"""The course of a run, or of several over each other, while it goes on or afterwards."""

from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd

from wuxia_core.errors import DataError
from wuxia_core.run.metrics import METRICS, read_rows
from wuxia_core.show.plots import BLUE, GREEN, GREY, ORANGE, axes, drawable

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SOURCES = {"wuxia": (ORANGE, "-"), "general": (BLUE, "--")}  # colour, style
RUNS = (*SOURCES.values(), (GREEN, ":"), (GREY, "-"), ("#CC79A7", "-."), ("#E69F00", "--"))
BEST = "eval_wuxia_bits_per_char"  # what the adapter that is kept has the fewest of


def read_metrics(output_dir: str | Path) -> pd.DataFrame:
    """Read a run's `metrics.jsonl`, a row a logged step, without steps that were done again.

    Raises `DataError` where there is none.
    """
    path = Path(output_dir) / METRICS
    if not path.is_file():
        raise DataError(f"{path}: not there; is {output_dir} a run folder (training.output_dir)?")
    metrics = pd.DataFrame(read_rows(Path(output_dir)))
    return metrics if "event" in metrics else metrics.assign(event=None)


def plot_metric(
    metrics: pd.DataFrame, columns: dict[str, str], ylabel: str, ax: "Axes | None" = None
) -> "Axes":
    """Draw columns of `metrics.jsonl` over steps; `columns` maps each to its label.

    Checkpoints are marked below, restarts by a line, and of held-out bits per character the best.
    """
    ax = axes(ax)
    for column in columns:
        source = next((name for name in SOURCES if name in column), "")
        colour, line = SOURCES.get(source, (GREY, "-"))
        rows = _rows(metrics, column)
        if len(rows):
            ax.plot(rows["step"], rows[column], line, color=colour, marker=".",
                    label=columns[column])  # fmt: skip
        trained = rows[rows["step"] > 0]
        if column == BEST and len(trained):
            best = trained.loc[trained[BEST].idxmin()]
            ax.plot(best["step"], best[BEST], "*", color=colour, markersize=14, label="best")
    _mark_events(metrics, ax)
    return _finish(ax, ylabel)


def plot_runs(
    runs: dict[str, pd.DataFrame], column: str, ylabel: str, ax: "Axes | None" = None
) -> "Axes":
    """Draw one column of several runs over each other; `runs` maps labels to their metrics."""
    ax = axes(ax)
    for (name, metrics), (colour, line) in zip(runs.items(), RUNS, strict=False):
        rows = _rows(metrics, column)
        ax.plot(rows.get("step", []), rows.get(column, []), line, color=colour, marker=".",
                label=drawable(name))  # fmt: skip
    return _finish(ax, ylabel)


def _rows(metrics: pd.DataFrame, column: str) -> pd.DataFrame:
    return metrics[metrics[column].notna()] if column in metrics else metrics.iloc[:0]


def _mark_events(metrics: pd.DataFrame, ax: "Axes") -> None:
    saved = metrics.loc[metrics["event"] == "checkpoint", "step"]
    if len(saved):
        ax.plot(saved, [0.015] * len(saved), "^", color="black", markersize=5, label="checkpoint",
                transform=ax.get_xaxis_transform())  # fmt: skip
    for number, step in enumerate(metrics.loc[metrics["event"] == "resumed", "step"]):
        ax.axvline(step, color="#B00020", linestyle=":", label="_" * bool(number) + "restart")


def _finish(ax: "Axes", ylabel: str) -> "Axes":
    ax.set_xlabel("optimizer step")
    ax.set_ylabel(ylabel)
    if ax.get_legend_handles_labels()[0]:
        ax.legend(loc="upper left", bbox_to_anchor=(1.01, 1), frameon=False)
    return ax
