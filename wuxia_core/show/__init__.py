"""What a person looks at: masked text, what became of files, plots; text is escaped in HTML."""

from wuxia_core.show.explore import MaskExplorer, explore_masks, read_beginnings
from wuxia_core.show.masks import MaskView, show_masks
from wuxia_core.show.mixture import (
    WindowView,
    cleaning_examples,
    cleaning_table,
    files_table,
    show_window,
    table,
)
from wuxia_core.show.objectives import (
    objectives_table,
    plot_objectives,
    plot_tradeoff,
    read_objectives,
)
from wuxia_core.show.plots import (
    axes,
    plot_books,
    plot_coverage,
    plot_kinds,
    plot_lengths,
    plot_mixture,
    plot_typical,
)
from wuxia_core.show.scorecard import (
    copied_table,
    plot_copied,
    plot_forgetting,
    plot_map,
    plot_recovery,
    plot_scorecard,
    plot_style,
    scorecard_table,
    side_by_side,
)
from wuxia_core.show.text import escape, visible
from wuxia_core.show.training import plot_metric, plot_runs, read_metrics
from wuxia_core.show.xray import XRayView
