"""Masked text, tables, plots and widgets for notebooks and terminals; text in HTML is escaped."""

from wuxia_core.show.interactive import GuessBox, MaskExplorer, WritingDesk, strengths_table
from wuxia_core.show.masks import FILL, MaskView, XRayView, show_masks
from wuxia_core.show.plots import (
    COLOURS,
    INK,
    axes,
    drawable,
    plot_bars,
    plot_forgetting,
    plot_kinds,
    plot_lines,
    plot_metric,
    plot_passages,
    plot_scorecard,
    plot_strengths,
    plot_typical,
    use_style,
)
from wuxia_core.show.tables import (
    advice,
    cleaning_examples,
    cleaning_table,
    copied_table,
    files_table,
    listing,
    named,
    passages_table,
    progress,
    read_metrics,
    run_size,
    scorecard_table,
    side_by_side,
    table,
    translated,
    window_table,
)
from wuxia_core.text import escape, visible
