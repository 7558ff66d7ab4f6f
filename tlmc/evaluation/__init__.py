"""Errors against labels, and the record of all results."""

from __future__ import annotations

from tlmc.evaluation.equilibrium import error_against_equilibrium
from tlmc.evaluation.metrics import Metric, by_force_range, by_kind, errors, evaluate, per_frame
from tlmc.evaluation.ranking import packing_energies, ranking_table
from tlmc.evaluation.records import (
    append_records,
    check_comparable,
    comparison_table,
    format_comparison,
    identity,
    read_records,
    rows_from_metrics,
    told_apart,
)

__all__ = [
    "Metric",
    "append_records",
    "by_force_range",
    "by_kind",
    "check_comparable",
    "comparison_table",
    "error_against_equilibrium",
    "errors",
    "evaluate",
    "format_comparison",
    "identity",
    "packing_energies",
    "per_frame",
    "ranking_table",
    "read_records",
    "rows_from_metrics",
    "told_apart",
]
