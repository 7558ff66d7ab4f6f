"""Transfer learning of interatomic potentials, from molecules to crystals.

The table of contents: every public name can be imported from here, and is loaded with its module when first used.
"""

from __future__ import annotations

import importlib
import os
from typing import Any

# GNU OpenMP lets waiting threads spin for milliseconds, which makes a training ten times slower on a shared machine;
# with no spinning at all, small steps take twice as long. This many turns are about ten microseconds. The runtime reads
# the variable once, when torch is imported; what the user has set stays.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "5000")

_CONTENTS = {
    "tlmc.data.dataset": ("Dataset",),
    "tlmc.data.loading": ("available", "dataset_from_frames", "load_dataset", "read_frames"),
    "tlmc.data.splits": ("Split", "split_dataset"),
    "tlmc.data.analysis": (
        "density",
        "frame_table",
        "nearest_neighbours",
        "outliers",
        "relative_energies",
        "summary_table",
    ),
    "tlmc.labelling": ("LabelReport", "Method", "build", "label", "method", "perturb", "relax", "screen"),
    "tlmc.potentials.reference": ("ReferenceEnergies", "fit_reference"),
    "tlmc.potentials": (
        "Potential",
        "TlmcCalculator",
        "load_model",
        "load_start_model",
        "predict",
        "save_model",
        "start_models",
    ),
    "tlmc.training": ("FinetuneConfig", "FinetuneResult", "RECIPES", "finetune", "recipe"),
    "tlmc.families.ani": ("build_cache", "export_state_dict", "relabel", "scratch", "to_torchani"),
    "tlmc.evaluation": ("evaluate", "per_frame"),
    "tlmc.experiments.records": ("append_records", "comparison_table", "read_records"),
    "tlmc.experiments.experiment": ("Experiment", "run_experiment", "run_recipes"),
    "tlmc.study.outcomes": ("write_metrics",),
    "tlmc.study.runner": ("run_study",),
}
_MODULE_OF = {name: module for module, names in _CONTENTS.items() for name in names}
__all__ = sorted(_MODULE_OF)


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'tlmc' has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULE_OF[name]), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
