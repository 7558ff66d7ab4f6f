"""Figures of labels, errors and trainings, each ``f(data, ax=None) -> ax`` in one house style.

Without ``ax`` a function opens a figure one column wide (85 mm). The style is applied around each call and leaves
``matplotlib.rcParams`` as they were. Colours are those of Okabe and Ito, and viridis, which colour-blind readers tell
apart.
"""

from __future__ import annotations

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
from tlmc.plots.errors import error_against_force, error_by_element, parity, parity_grid, residual_histogram
from tlmc.plots.learning import error_against_time, learning_curve, learning_curves, validation_curves
from tlmc.plots.models import energy_volume, environment_vector
from tlmc.plots.style import COLUMN, ELEMENT_COLOURS, PALETTE, STYLE, save_figure, styled, subplots

__all__ = [
    "COLUMN",
    "ELEMENT_COLOURS",
    "PALETTE",
    "STYLE",
    "density_landscape",
    "descriptor_map",
    "energy_histogram",
    "energy_volume",
    "environment_vector",
    "error_against_force",
    "error_against_time",
    "error_by_element",
    "force_histogram",
    "force_outliers",
    "learning_curve",
    "learning_curves",
    "neighbour_distances",
    "outliers",
    "parity",
    "parity_grid",
    "residual_histogram",
    "save_figure",
    "split_coverage",
    "styled",
    "subplots",
    "validation_curves",
]
