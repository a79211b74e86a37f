"""What a person looks at: masked text, what became of files, plots; text is escaped in HTML."""

from wuxia_core.show.explore import MaskExplorer, explore_masks, read_beginnings
from wuxia_core.show.masks import MaskView, XRayView, show_masks
from wuxia_core.show.plots import (
    axes,
    copied_table,
    plot_books,
    plot_copied,
    plot_coverage,
    plot_forgetting,
    plot_kinds,
    plot_lengths,
    plot_map,
    plot_metric,
    plot_mixture,
    plot_recovery,
    plot_runs,
    plot_scorecard,
    plot_style,
    plot_typical,
    read_metrics,
    scorecard_table,
    side_by_side,
)
from wuxia_core.show.tables import (
    WindowView,
    cleaning_examples,
    cleaning_table,
    files_table,
    show_window,
    table,
)
from wuxia_core.text import escape, visible
