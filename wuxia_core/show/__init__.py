"""What a person looks at: masked text, and plots. Text is escaped before it becomes HTML."""

from wuxia_core.show.masks import MaskView, show_masks
from wuxia_core.show.plots import (
    axes,
    plot_books,
    plot_kinds,
    plot_lengths,
    plot_metric,
    plot_mixture,
    plot_scorecard,
    read_metrics,
    scorecard_table,
)
