"""Figures of labels, errors and trainings, each ``f(data, ax=None) -> ax`` in one house style.

Without ``ax`` a function opens a figure one column wide (85 mm). The style is applied around each call and leaves
``matplotlib.rcParams`` as they were. Colours are those of Okabe and Ito, and viridis, which colour-blind readers tell
apart.
"""

from __future__ import annotations

from tlmc.plots.ablations import drift_against_error, error_against_value, setting_ratios
from tlmc.plots.casestudy import energy_errors, error_against_equilibrium, parity_gallery, ranking, shared_models
from tlmc.plots.data import (
    density_landscape,
    descriptor_map,
    energy_histogram,
    force_histogram,
    force_outliers,
    neighbour_distances,
    outliers,
    split_coverage,
)
from tlmc.plots.descriptors import density_map, function_family, heat_map, invariance, speed_ratios
from tlmc.plots.errors import error_against_force, error_by_element, parity, parity_grid, residual_histogram
from tlmc.plots.kernel_methods import (
    atom_energies,
    calibration,
    covariance_matrix,
    effort,
    error_against_size,
    two_classes,
    uncertainty_band,
)
from tlmc.plots.learning import (
    error_against_time,
    error_against_time_panels,
    learning_curve,
    learning_curves,
    validation_curves,
)
from tlmc.plots.models import energy_volume, environment_vector
from tlmc.plots.networks import (
    activations,
    curve_fits,
    descent_losses,
    descent_paths,
    error_over_size,
    fit_histories,
    gradients_over_depth,
    representation_map,
    spread_by_kind,
)
from tlmc.plots.overview import sets_coverage, sets_overview
from tlmc.plots.sampling import (
    active_learning,
    committee_scan,
    drawn_energies,
    labels_needed,
    normal_mode,
    reliability_diagram,
    spread_and_error,
)
from tlmc.plots.style import COLUMN, ELEMENT_COLOURS, PALETTE, STYLE, save_figure, styled, subplots

__all__ = [
    "COLUMN",
    "ELEMENT_COLOURS",
    "PALETTE",
    "STYLE",
    "activations",
    "active_learning",
    "atom_energies",
    "calibration",
    "committee_scan",
    "covariance_matrix",
    "curve_fits",
    "density_landscape",
    "density_map",
    "descent_losses",
    "descent_paths",
    "descriptor_map",
    "drawn_energies",
    "drift_against_error",
    "effort",
    "energy_errors",
    "energy_histogram",
    "energy_volume",
    "environment_vector",
    "error_against_equilibrium",
    "error_against_force",
    "error_against_size",
    "error_against_time",
    "error_against_time_panels",
    "error_against_value",
    "error_by_element",
    "error_over_size",
    "fit_histories",
    "force_histogram",
    "force_outliers",
    "function_family",
    "gradients_over_depth",
    "heat_map",
    "invariance",
    "labels_needed",
    "learning_curve",
    "learning_curves",
    "neighbour_distances",
    "normal_mode",
    "outliers",
    "parity",
    "parity_gallery",
    "parity_grid",
    "ranking",
    "reliability_diagram",
    "representation_map",
    "residual_histogram",
    "save_figure",
    "sets_coverage",
    "sets_overview",
    "shared_models",
    "setting_ratios",
    "speed_ratios",
    "split_coverage",
    "spread_and_error",
    "spread_by_kind",
    "styled",
    "subplots",
    "two_classes",
    "uncertainty_band",
    "validation_curves",
]
