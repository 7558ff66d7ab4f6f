"""Errors against labels, and whether labels are what they say."""

from __future__ import annotations

from tlmc.evaluation.comparison import before_and_after, refit_offset
from tlmc.evaluation.equilibrium import error_against_equilibrium
from tlmc.evaluation.metrics import Metric, by_force_range, by_kind, errors, evaluate, per_frame
from tlmc.evaluation.ranking import packing_energies, ranking_table

__all__ = [
    "Metric",
    "before_and_after",
    "by_force_range",
    "by_kind",
    "error_against_equilibrium",
    "errors",
    "evaluate",
    "packing_energies",
    "per_frame",
    "ranking_table",
    "refit_offset",
]
