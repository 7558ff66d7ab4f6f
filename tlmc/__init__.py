"""Transfer learning of interatomic potentials, from molecules to crystals.

The table of contents: every public name can be imported from here, and is loaded with its module when first used.
"""

from __future__ import annotations

import os

from tlmc.lazy import loaded_at_use

# GNU OpenMP lets waiting threads spin for milliseconds, which makes a training ten times slower on a shared machine;
# with no spinning at all, small steps take twice as long. This many turns are about ten microseconds. The runtime reads
# the variable once, when torch is imported; what the user has set stays.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "5000")

_CONTENTS = {
    "data.dataset": ("Dataset",),
    "data.loading": ("available", "dataset_from_frames", "load_dataset", "read_frames"),
    "data.splits": ("Split", "split_dataset"),
    "data.analysis": (
        "density",
        "frame_table",
        "nearest_neighbours",
        "outliers",
        "relative_energies",
        "summary_table",
    ),
    "labelling": ("LabelReport", "Method", "build", "label", "method", "perturb", "relax", "screen"),
    "potentials.reference": ("ReferenceEnergies", "fit_reference"),
    "potentials": (
        "Potential",
        "TlmcCalculator",
        "load_model",
        "load_start_model",
        "predict",
        "save_model",
        "start_models",
    ),
    "training": ("FinetuneConfig", "FinetuneResult", "RECIPES", "finetune", "recipe"),
    "families.ani": ("build_cache", "export_state_dict", "relabel", "scratch", "to_torchani"),
    "evaluation": ("evaluate", "per_frame"),
    "experiments.records": ("append_records", "comparison_table", "read_records"),
    "experiments.experiment": ("Experiment", "run_experiment", "run_recipes"),
    "study.outcomes": ("write_metrics",),
    "study.runner": ("run_study",),
}
__all__ = sorted(name for names in _CONTENTS.values() for name in names)

__getattr__ = loaded_at_use(__name__, _CONTENTS)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
