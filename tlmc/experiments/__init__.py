"""Experiments: what a run is, how it is carried out, and the record of all results."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tlmc.lazy import loaded_at_use

if TYPE_CHECKING:
    from tlmc.experiments.experiment import (
        COLUMNS,
        CONVERGENCE,
        Experiment,
        convergence,
        convergence_table,
        run_experiment,
        run_recipes,
    )
    from tlmc.experiments.records import comparison_table, format_comparison, read_records
    from tlmc.experiments.run import Run, execute

__all__ = [
    "COLUMNS",
    "CONVERGENCE",
    "Experiment",
    "Run",
    "comparison_table",
    "convergence",
    "convergence_table",
    "execute",
    "format_comparison",
    "read_records",
    "run_experiment",
    "run_recipes",
]

_MODULES = {
    "experiment": (
        *("COLUMNS", "CONVERGENCE", "Experiment", "convergence", "convergence_table"),
        *("run_experiment", "run_recipes"),
    ),
    "records": ("comparison_table", "format_comparison", "read_records"),
    "run": ("Run", "execute"),
}
__getattr__ = loaded_at_use(__name__, _MODULES)
