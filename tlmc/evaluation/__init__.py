"""Errors against labels, and the record of all results."""

from __future__ import annotations

from tlmc.evaluation.metrics import Metric, by_force_range, errors, evaluate, per_frame
from tlmc.evaluation.records import append_records, comparison_table, format_comparison, read_records, rows_from_metrics

__all__ = [
    "Metric",
    "append_records",
    "by_force_range",
    "comparison_table",
    "errors",
    "evaluate",
    "format_comparison",
    "per_frame",
    "read_records",
    "rows_from_metrics",
]
