"""Pictures of descriptors: matrices, functions, densities, how invariant and how fast they are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import Normalize, SymLogNorm
from numpy.typing import ArrayLike

from tlmc.errors import DataError
from tlmc.plots.style import (
    PALETTE,
    REFERENCE_LINE,
    axes_or_new,
    colorbar_beside,
    colours,
    finish,
    legend_above,
    styled,
)


@styled
def heat_map(
    matrix: ArrayLike,
    ax: Axes | None = None,
    *,
    labels: Sequence[str],
    label: str = "element of the matrix",
    log: bool = False,
) -> Axes:
    """Draw a square matrix of pairs of atoms as colours.

    Parameters
    ----------
    matrix
        Shape ``(n_atoms, n_atoms)``.
    ax
        Where to draw.
    labels
        Name of every atom; the axes name each run of equal names once.
    label
        What the colours mean.
    log
        Whether the colours are logarithmic in the size, the sign kept.

    Raises
    ------
    DataError
        If the matrix is not square, or the number of labels differs.
    """
    values = np.asarray(matrix, dtype=np.float64)
    if values.shape != (len(labels), len(labels)):
        raise DataError(f"{len(labels)} labels need a square matrix of that size, got shape {values.shape}")
    ax = axes_or_new(ax, aspect=0.85)
    signed = values.min() < 0.0
    limit = float(np.abs(values).max()) or 1.0
    lowest = -limit if signed else float(values.min())
    norm = SymLogNorm(1e-2 * limit, vmin=lowest, vmax=limit) if log else Normalize(lowest, limit)
    image = ax.imshow(values, cmap="RdBu_r" if signed else "viridis", norm=norm)
    starts = [k for k in range(len(labels)) if k == 0 or labels[k] != labels[k - 1]]
    middles = [(a + b - 1) / 2 for a, b in zip(starts, [*starts[1:], len(labels)], strict=True)]
    for start in starts[1:]:
        ax.axhline(start - 0.5, color="white", linewidth=0.4)
        ax.axvline(start - 0.5, color="white", linewidth=0.4)
    names = [labels[k] for k in starts]
    ax.set_xticks(middles, names)
    ax.set_yticks(middles, names)
    ax.spines[:].set_visible(False)
    ax.tick_params(length=0)
    ax.set(xlabel="atom j", ylabel="atom i")
    colorbar_beside([ax], image, label)
    return finish(ax)


@styled
def function_family(
    x: ArrayLike,
    curves: Mapping[str, ArrayLike],
    ax: Axes | None = None,
    *,
    xlabel: str,
    ylabel: str,
    limit: float | None = None,
) -> Axes:
    """Draw functions of one variable.

    Parameters
    ----------
    x
        Shape ``(n,)``.
    curves
        Names to values, ``(n,)``.
    ax
        Where to draw.
    xlabel, ylabel
        What the axes mean, with units.
    limit
        A place to mark, such as the cutoff.
    """
    ax = axes_or_new(ax)
    for colour, (name, values) in zip(colours(len(curves)), curves.items(), strict=True):
        ax.plot(np.asarray(x), np.asarray(values), color=colour, label=name)
    if limit is not None:
        ax.axvline(limit, **REFERENCE_LINE)
    ax.set(xlabel=xlabel, ylabel=ylabel)
    if len(curves) > 1:
        ax.legend(fontsize=6)
    return finish(ax)


@styled
def density_map(
    density: ArrayLike,
    half_width: float,
    ax: Axes | None = None,
    *,
    atoms: ArrayLike,
    label: str | None = "density (arbitrary unit)",
    highest: float | None = None,
) -> Axes:
    """Draw a density in a plane through the centre.

    Parameters
    ----------
    density
        On a square grid, shape ``(n, n)``, rows along y.
    half_width
        The grid runs from minus to plus this, Angstrom.
    ax
        Where to draw.
    atoms
        Places of the neighbours in the plane, ``(n_atoms, 2)``, Angstrom.
    label
        What the colours mean; None leaves the scale away, where the next map shows it.
    highest
        End of the colours, to compare several maps; the largest value if not given.
    """
    values, places = np.asarray(density, dtype=np.float64), np.asarray(atoms, dtype=np.float64)
    ax = axes_or_new(ax, aspect=0.85)
    top = float(np.abs(values).max()) if highest is None else highest
    box = (-half_width, half_width, -half_width, half_width)
    image = ax.imshow(values, origin="lower", extent=box, cmap="RdBu_r", vmin=-top, vmax=top, interpolation="bilinear")
    ax.plot(0.0, 0.0, "+", color="black", markersize=6)
    ax.plot(places[:, 0], places[:, 1], "o", color="black", markersize=3, markerfacecolor="none")
    ax.set(xlabel="x (Å)", ylabel="y (Å)")
    if label is not None:
        colorbar_beside([ax], image, label)
    return finish(ax)


@styled
def invariance(changes: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Draw by how much descriptors change under operations that should not change them.

    Parameters
    ----------
    changes
        Relative change, a row per descriptor and a column per operation; what does not apply is NaN. Changes below
        1e-17 are drawn there.
    ax
        Where to draw.
    """
    ax = axes_or_new(ax, aspect=0.3 + 0.09 * len(changes))
    place = np.arange(len(changes))
    offsets = np.linspace(-0.25, 0.25, changes.shape[1])
    markers = "osD^vP*X"
    for k, (operation, values) in enumerate(changes.items()):
        height = place + offsets[k]
        drawn = np.maximum(values.to_numpy(dtype=np.float64), 1e-17)
        ax.plot(drawn, height, markers[k % len(markers)], markersize=4, color=PALETTE[k % 7], label=str(operation))
    ax.axvline(np.finfo(np.float64).eps, **REFERENCE_LINE, label="precision")
    ax.set_xscale("log")
    ax.set_yticks(place, [str(name) for name in changes.index])
    ax.set_ylim(len(changes) - 0.5, -0.5)
    ax.set_xlim(left=5e-18)
    ax.set(xlabel="relative change", ylabel="descriptor")
    ax.legend(loc="lower left", bbox_to_anchor=(-0.45, 1.0), ncols=3, columnspacing=1.0, handletextpad=0.1)
    return finish(ax)


@styled
def speed_ratios(table: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Draw how many times faster than a reference descriptors are computed.

    Parameters
    ----------
    table
        Columns ``descriptor``, ``quantity`` (values or derivatives), ``atoms`` and ``ratio``.
    ax
        Where to draw.
    """
    ax = axes_or_new(ax)
    names = list(dict.fromkeys(table["descriptor"]))
    for colour, name in zip(colours(len(names)), names, strict=True):
        for quantity, style, filled in (("values", "o-", True), ("derivatives", "s--", False)):
            rows = table[(table["descriptor"] == name) & (table["quantity"] == quantity)].sort_values("atoms")
            if len(rows):
                face = colour if filled else "white"
                ax.plot(
                    rows["atoms"],
                    rows["ratio"],
                    style,
                    color=colour,
                    markersize=4,
                    markerfacecolor=face,
                    label=f"{name}, {quantity}",
                )
    ax.axhline(1.0, **REFERENCE_LINE)
    ax.set_xscale("log")
    ax.set_yscale("log")
    sizes = sorted(set(table["atoms"]))
    ax.set_xticks(sizes, [str(n) for n in sizes])
    ax.set_xticks([], minor=True)
    ax.set(xlabel="number of atoms", ylabel="times faster than DScribe")
    legend_above(ax, 2, columnspacing=1)
    return finish(ax)
