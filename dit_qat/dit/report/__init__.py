"""Pictures of a run and the one-page report that holds them."""

from dit_qat.dit.report.html import Report, write_report
from dit_qat.dit.report.plots import (
    Comparison,
    ComparisonRow,
    bit_map_plot,
    comparison_plot,
    loss_plot,
    sensitivity_plot,
    side_by_side,
)

__all__ = [
    "Comparison",
    "ComparisonRow",
    "Report",
    "bit_map_plot",
    "comparison_plot",
    "loss_plot",
    "sensitivity_plot",
    "side_by_side",
    "write_report",
]
