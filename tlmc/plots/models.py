"""Figures of models: what they see of an atom, and their energies over the volume of a crystal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations_with_replacement
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import ArrayLike

from tlmc.errors import DataError
from tlmc.plots.style import (
    COLUMN,
    ELEMENT_COLOURS,
    REFERENCE_LINE,
    axes_or_new,
    colorbar_beside,
    colours,
    finish,
    legend_above,
    styled,
    subplots,
)

if TYPE_CHECKING:
    from tlmc.descriptors.aev import AEVParameters


@styled
def energy_volume(
    volumes: ArrayLike,
    curves: Mapping[str, ArrayLike],
    ax: Axes | None = None,
    *,
    points: tuple[ArrayLike, ArrayLike] | None = None,
) -> Axes:
    """Draw energy against volume according to several models.

    Parameters
    ----------
    volumes
        Angstrom^3 per molecule (or per anything else, the same for all), shape ``(n,)``.
    curves
        Energies by name, eV per molecule on a common zero, each of shape ``(n,)``.
    ax
        Where to draw.
    points
        Volumes and energies of labelled frames, drawn as grey points as far as they lie near the curves.

    Raises
    ------
    DataError
        If there is no curve, or a curve is not as long as the volumes.
    """
    x = np.asarray(volumes, dtype=np.float64)
    lines = {name: np.asarray(energies, dtype=np.float64) for name, energies in curves.items()}
    wrong = {name: energies.shape for name, energies in lines.items() if energies.shape != x.shape}
    if not lines or wrong or x.ndim != 1 or x.size == 0:
        raise DataError(f"energy curves need {x.shape} energies each, got {wrong or 'none'}")
    ax = axes_or_new(ax)
    if points is not None:
        places, energies = (np.asarray(part, dtype=np.float64) for part in points)
        inside = (places >= x.min()) & (places <= x.max())
        ax.scatter(places[inside], energies[inside], s=7, color="0.6", linewidth=0, label="labelled frames")
    for colour, (name, energies) in zip(colours(len(lines)), lines.items(), strict=True):
        ax.plot(x, energies, color=colour, marker="o", markersize=2.5, label=name)
        lowest = int(np.argmin(energies))
        ax.plot(x[lowest], energies[lowest], "D", color=colour, markersize=5, markerfacecolor="none")
    ax.axhline(0, **REFERENCE_LINE | {"linestyle": ":"})
    lower, upper = min(e.min() for e in lines.values()), max(e.max() for e in lines.values())
    # hot frames lie far above and would flatten the curves
    ax.set_ylim(lower - 0.2 * (upper - lower or 1.0), upper + (upper - lower or 1.0))
    ax.set(xlabel="volume (Å³ per molecule)", ylabel="energy (eV per molecule)")
    legend_above(ax, 3, columnspacing=1)
    return finish(ax)


@styled
def environment_vector(vector: ArrayLike, parameters: AEVParameters, symbols: Sequence[str]) -> Figure:
    """Draw the atomic environment vector of one atom: radial terms left, angular terms right; zero blocks left out.

    Parameters
    ----------
    vector
        Shape ``(parameters.length(len(symbols)),)``, a row of :func:`tlmc.descriptors.aev.aev`.
    parameters
        Constants of the descriptor.
    symbols
        Elements in the order of their channels.

    Returns
    -------
    Figure
        Two columns wide. Left, a line per neighbour element over the distances that the terms are centred on. Right, a
        band per pair of neighbour elements; in it a row per mean distance, a column per angle.

    Raises
    ------
    DataError
        If the vector has another length, or is zero throughout (an atom without neighbours).
    """
    values = np.asarray(vector, dtype=np.float64)
    if values.shape != (parameters.length(len(symbols)),) or not values.any():
        raise DataError(
            f"an environment vector of {len(symbols)} elements has {parameters.length(len(symbols))} numbers, not all "
            f"zero; got shape {values.shape}, {np.count_nonzero(values)} of them not zero"
        )
    n_first_angular = len(symbols) * parameters.n_radial
    radial = dict(zip(symbols, values[:n_first_angular].reshape(len(symbols), -1), strict=True))
    pairs = [f"{a}, {b}" for a, b in combinations_with_replacement(symbols, 2)]
    shape = (len(pairs), len(parameters.shifts_angular), len(parameters.sections))
    angular = dict(zip(pairs, values[n_first_angular:].reshape(shape), strict=True))
    figure, axes = subplots(1, 2, width=2 * COLUMN)
    left, right = axes[0]
    for symbol, part in radial.items():
        if part.any():
            colour = ELEMENT_COLOURS.get(symbol, "#8C6D31")
            left.plot(parameters.shifts_radial, part, "o-", markersize=2.5, color=colour, label=symbol)
    left.axvline(parameters.r_cut_radial, **REFERENCE_LINE, label="cutoff")
    left.set(xlabel="distance $R_s$ (Å)", ylabel="radial term", ylim=(0, None))
    legend_above(left, 5)
    present = {pair: part for pair, part in angular.items() if part.any()}
    if present:
        n_rows = len(parameters.shifts_angular)
        image = np.concatenate(list(present.values()))
        drawn = right.imshow(image, cmap="viridis", aspect="auto", interpolation="nearest")
        right.hlines(np.arange(1, len(present)) * n_rows - 0.5, -0.5, image.shape[1] - 0.5, color="white", linewidth=1)
        right.set_yticks(np.arange(len(present)) * n_rows + (n_rows - 1) / 2, list(present))
        columns = np.unique(np.linspace(0, image.shape[1] - 1, 4).astype(int))
        right.set_xticks(columns, [f"{np.degrees(parameters.sections[k]):.0f}°" for k in columns])
        colorbar_beside([right], drawn, "angular term")
    right.set(xlabel="angle $\\theta_s$", ylabel="pair of neighbours")
    for ax in (left, right):
        finish(ax)
    return figure
