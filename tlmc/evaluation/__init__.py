"""Errors against labels, and the record of all results."""

from __future__ import annotations

from tlmc.evaluation.equilibrium import error_against_equilibrium
from tlmc.evaluation.metrics import Metric, by_force_range, by_kind, errors, evaluate, per_frame
from tlmc.evaluation.ranking import packing_energies, ranking_table
from tlmc.evaluation.records import append_records, comparison_table, format_comparison, read_records, rows_from_metrics

__all__ = [
    "Metric",
    "append_records",
    "by_force_range",
    "by_kind",
    "comparison_table",
    "error_against_equilibrium",
    "errors",
    "evaluate",
    "format_comparison",
    "packing_energies",
    "per_frame",
    "ranking_table",
    "read_records",
    "rows_from_metrics",
]
