"""Figures of the choice of data: normal modes, drawn energies, committees and their calibration, active learning."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, Literal

import numpy as np
import pandas as pd
from ase.data import covalent_radii
from ase.neighborlist import natural_cutoffs, neighbor_list
from matplotlib.axes import Axes
from matplotlib.patches import Circle
from matplotlib.ticker import MaxNLocator
from numpy.typing import ArrayLike, NDArray

from tlmc.errors import DataError
from tlmc.plots.style import (
    ELEMENT_COLOURS,
    PALETTE,
    REFERENCE_LINE,
    axes_or_new,
    colours,
    finish,
    log_axis,
    log_ticks,
    require_columns,
    styled,
)
from tlmc.sampling.active_learning import mean_interval
from tlmc.sampling.calibration import Reliability, SpreadBins
from tlmc.sampling.modes import NormalModes

_QUANTITIES: Final = {
    "force_rmse_vector": ("test force RMSE, vector (eV/Å)", 1.0),
    "energy_rmse_per_atom": ("test energy RMSE (meV/atom)", 1000.0),
}
_DRAWN_RADIUS: Final = 0.45
"""Of an atom over its covalent radius, so that bonds and arrows show."""


@styled
def normal_mode(modes: NormalModes, mode: int, ax: Axes | None = None, *, arrow: float = 1.6) -> Axes:
    """Draw a structure with an arrow per atom along one of its modes.

    Molecules are seen face on: the longest extent of the atoms and their arrows is horizontal, the shortest away from
    the reader. What moves towards the reader or away has a dot or a cross instead of an arrow.

    Parameters
    ----------
    modes
        From `tlmc.sampling.modes`.
    mode
        Which one.
    ax
        Where to draw.
    arrow
        Length of the longest arrow, Angstrom.

    Raises
    ------
    DataError
        If there is no such mode.
    """
    if not 0 <= mode < len(modes):
        raise DataError(f"there is no mode {mode}: the structure has {len(modes)}")
    ax = axes_or_new(ax, aspect=0.9)
    frame, motion = modes.frame, modes.displacements[mode]
    motion = motion * arrow / np.linalg.norm(motion, axis=1).max()
    centred = frame.positions - frame.positions.mean(axis=0)
    axes = np.linalg.svd(np.concatenate([centred, 0.2 * motion]))[2]
    axes[2] *= np.linalg.det(axes)
    points, arrows = centred @ axes.T, motion @ axes.T
    first, second, shift = neighbor_list("ijS", frame, natural_cutoffs(frame, mult=1.15))
    for i, j in zip(first[~shift.any(axis=1)], second[~shift.any(axis=1)], strict=True):
        if i < j:
            ax.plot(*points[[i, j], :2].T, color="0.6", linewidth=2.0, solid_capstyle="round", zorder=1)
    for k in np.argsort(points[:, 2]):
        colour = ELEMENT_COLOURS.get(frame.symbols[k], PALETTE[3])
        radius = _DRAWN_RADIUS * covalent_radii[frame.numbers[k]]
        ax.add_patch(Circle(tuple(points[k, :2]), radius, facecolor=colour, edgecolor="0.2", linewidth=0.4))
        flat = float(np.linalg.norm(arrows[k, :2]))
        if flat > 0.12 * arrow:
            ax.annotate(
                "",
                points[k, :2] + arrows[k, :2],
                points[k, :2],
                arrowprops={"arrowstyle": "-|>", "color": PALETTE[0], "linewidth": 1.0, "shrinkA": 0, "shrinkB": 0},
            )
        if abs(arrows[k, 2]) > 0.3 * arrow and flat < abs(arrows[k, 2]):
            marker = "o" if arrows[k, 2] > 0 else "x"
            ax.plot(*points[k, :2], marker, color=PALETTE[0], markersize=3, zorder=5)
    ends = np.concatenate([points[:, :2], points[:, :2] + arrows[:, :2]])
    ax.set(xlim=(ends[:, 0].min() - 0.6, ends[:, 0].max() + 0.6), ylim=(ends[:, 1].min() - 0.6, ends[:, 1].max() + 0.6))
    ax.set_aspect("equal")
    ax.set_xticks([])
    ax.set_yticks([])
    ax.spines[:].set_visible(False)
    ax.set_title(f"mode {mode + 1}: {modes.frequencies[mode]:.0f} cm$^{{-1}}$")
    return ax


@styled
def drawn_energies(
    energies: Mapping[str, ArrayLike],
    ax: Axes | None = None,
    *,
    theory: Mapping[str, tuple[ArrayLike, ArrayLike]] | None = None,
    bins: int = 40,
) -> Axes:
    """Draw histograms of energies, as densities, and the densities that theory expects.

    Parameters
    ----------
    energies
        Name to energies above the minimum, eV.
    ax
        Where to draw.
    theory
        Name to energies, eV, and density there, 1/eV, drawn as a line in the colour of the name.
    bins
        Over the range of all energies.

    Raises
    ------
    DataError
        If there are no energies.
    """
    values = {name: np.asarray(given, dtype=np.float64) for name, given in energies.items()}
    if not values or not all(given.size for given in values.values()):
        raise DataError("a distribution needs energies, got none")
    ax = axes_or_new(ax)
    edges = np.linspace(0.0, max(float(given.max()) for given in values.values()), bins + 1)
    for colour, (name, given) in zip(colours(len(values)), values.items(), strict=True):
        label = f"{name}, mean {given.mean():.3f} eV"
        ax.hist(given, bins=edges.tolist(), density=True, color=colour, alpha=0.35, label=label)
        if theory and name in theory:
            x, density = theory[name]
            ax.plot(x, density, color=colour)
    ax.set(xlabel="energy above the minimum (eV)", ylabel="probability per energy (1/eV)", xlim=(0, edges[-1]))
    ax.legend()
    return finish(ax)


@styled
def committee_scan(
    coordinate: ArrayLike,
    energies: ArrayLike,
    seen: ArrayLike,
    ax: Axes | None = None,
    *,
    reference: ArrayLike | None = None,
    label: str = "coordinate (Å)",
) -> Axes:
    """Draw what the members of a committee say along a coordinate, above where the training data lie.

    Parameters
    ----------
    coordinate
        Shape ``(n_points,)``.
    energies
        Per member, eV, shape ``(n_members, n_points)``; drawn above the lowest mean.
    seen
        The coordinate in the training frames, any number, drawn as a histogram along the bottom.
    ax
        Where to draw.
    reference
        Labels along the coordinate, eV, ``(n_points,)``, drawn above their lowest.
    label
        Of the coordinate.

    Raises
    ------
    DataError
        If the shapes do not match.
    """
    x, e = np.asarray(coordinate, dtype=np.float64), np.asarray(energies, dtype=np.float64)
    if e.ndim != 2 or e.shape[1:] != x.shape:
        raise DataError(f"a scan of {x.shape} points needs energies (n_members, n_points), got {e.shape}")
    ax = axes_or_new(ax)
    e = e - e.mean(axis=0).min()
    for k, member in enumerate(e):
        ax.plot(x, member, color=PALETTE[0], alpha=0.4, linewidth=0.7, label="members" if k == 0 else None)
    ax.plot(x, e.mean(axis=0), color=PALETTE[0], label="mean")
    if reference is not None:
        labels = np.asarray(reference, dtype=np.float64)
        ax.plot(x, labels - labels.min(), "--", color="black", label="reference")
    top = float(np.nanmax(e.mean(axis=0))) * 1.25
    counts, edges = np.histogram(np.asarray(seen), bins=25, range=(float(x.min()), float(x.max())))
    if counts.any():
        heights = 0.25 * top * counts / counts.max()
        ax.bar(edges[:-1], heights, np.diff(edges), align="edge", color="0.85", label="training data", zorder=0)
    ax.set(xlabel=label, ylabel="energy (eV)", ylim=(-0.05 * top, top), xlim=(x.min(), x.max()))
    ax.legend()
    return finish(ax)


@styled
def reliability_diagram(curves: Mapping[str, Reliability], ax: Axes | None = None) -> Axes:
    """Draw how often errors lie inside intervals against how often they should; the diagonal is right.

    Parameters
    ----------
    curves
        Name to `tlmc.sampling.reliability`.
    ax
        Where to draw.

    Raises
    ------
    DataError
        If there is none.
    """
    if not curves:
        raise DataError("a reliability diagram needs at least one curve, got none")
    ax = axes_or_new(ax, aspect=0.95)
    ax.plot([0, 1], [0, 1], **REFERENCE_LINE)
    for colour, (name, curve) in zip(colours(len(curves)), curves.items(), strict=True):
        x, y = (np.concatenate([[0.0], part, [1.0]]) for part in curve)
        ax.plot(x, y, "o-", color=colour, markersize=2.2, label=f"{name}, area {curve.miscalibration:.3f}")
    ax.set(xlabel="expected share inside the interval", ylabel="observed share", xlim=(0, 1), ylim=(0, 1.01))
    ax.set_aspect("equal")
    ax.legend()
    return finish(ax)


@styled
def spread_and_error(
    bins: Mapping[str, SpreadBins], ax: Axes | None = None, *, quantity: Literal["force", "energy"] = "force"
) -> Axes:
    """Draw the error made in bins of equal spread, on log axes; calibrated spreads lie on the diagonal.

    Parameters
    ----------
    bins
        Name to `tlmc.sampling.error_against_spread`.
    ax
        Where to draw.
    quantity
        Forces in eV/Angstrom, energies per atom drawn in meV.

    Raises
    ------
    DataError
        If there is none.
    """
    if not bins:
        raise DataError("errors against spreads need at least one set of bins, got none")
    ax = axes_or_new(ax, aspect=0.95)
    factor, unit = (1.0, "eV/Å") if quantity == "force" else (1000.0, "meV/atom")
    drawn = factor * np.concatenate([np.concatenate([given.spread, given.error]) for given in bins.values()])
    low, high = float(drawn[drawn > 0].min()) / 1.3, float(drawn.max()) * 1.3
    ax.plot([low, high], [low, high], **REFERENCE_LINE)
    for colour, (name, given) in zip(colours(len(bins)), bins.items(), strict=True):
        ax.plot(factor * given.spread, factor * given.error, "o-", color=colour, markersize=3, label=name)
    ax.set(xscale="log", yscale="log", xlim=(low, high), ylim=(low, high))
    for axis in (ax.xaxis, ax.yaxis):
        log_ticks(axis, high / low)
    what = "force component" if quantity == "force" else "energy"
    ax.set(xlabel=f"RMS spread, {what} ({unit})", ylabel=f"RMS of errors ({unit})")
    ax.set_aspect("equal")
    ax.legend()
    return finish(ax)


@styled
def active_learning(
    table: pd.DataFrame,
    ax: Axes | None = None,
    *,
    quantity: Literal["force_rmse_vector", "energy_rmse_per_atom"] = "force_rmse_vector",
    target: float | None = None,
) -> Axes:
    """Draw the mean test error against the number of labels, with a 95 % band from three seeds on, else every seed.

    The band of two seeds would be 13 times as wide as they are apart, and hide everything else.

    Parameters
    ----------
    table
        `tlmc.sampling.compare_strategies`: columns ``name``, ``seed``, ``n_labels`` and the quantity. Numbers of labels
        that not all seeds of a name reached are left out.
    ax
        Where to draw.
    quantity
        Energies are drawn in meV/atom.
    target
        Marked by a horizontal line, eV/Angstrom or eV/atom.

    Raises
    ------
    DataError
        If the table is empty or lacks a column.
    """
    require_columns(table, "active learning needs", ["name", "seed", "n_labels", quantity])
    words, factor = _QUANTITIES[quantity]
    ax = axes_or_new(ax)
    names = list(dict.fromkeys(table["name"]))
    drawn: list[NDArray[np.float64]] = []
    for colour, name in zip(colours(len(names)), names, strict=True):
        errors = table[table["name"] == name].pivot(index="n_labels", columns="seed", values=quantity).dropna()
        intervals = factor * np.array([mean_interval(row) for row in errors.to_numpy(dtype=np.float64)])
        seeds = errors.shape[1]
        ax.plot(errors.index, intervals[:, 0], "o-", color=colour, markersize=2.5, label=f"{name} ({seeds} seeds)")
        if seeds > 2:
            _band(ax, errors.index, intervals[:, 1], intervals[:, 2], colour)
        elif seeds == 2:
            ax.plot(errors.index, factor * errors.to_numpy(), color=colour, alpha=0.35, linewidth=0.6)
        drawn.append(factor * errors.to_numpy(dtype=np.float64).ravel())
    if target is not None:
        ax.axhline(factor * target, **REFERENCE_LINE)
    values = np.concatenate(drawn)
    log_axis(ax, float(values.min()), float(values.max()))
    ax.set_ylim(0.9 * float(values.min()), 1.1 * float(values.max()))
    ax.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    ax.set(xlabel="labelled structures", ylabel=words)
    ax.legend()
    return finish(ax)


@styled
def labels_needed(table: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Draw how many labels each strategy needs for an error, from three seeds on with the band of its interval.

    Parameters
    ----------
    table
        Rows of `tlmc.sampling.structures_needed`, with a column ``level``: the error as a multiple of the one that the
        whole pool gives. Levels that a seed missed (NaN) are left out.
    ax
        Where to draw.

    Raises
    ------
    DataError
        If the table is empty or lacks a column.
    """
    require_columns(table, "labels needed need", ["level", "name", "mean", "lower", "upper", "n_seeds"])
    ax = axes_or_new(ax)
    names = list(dict.fromkeys(table["name"]))
    for colour, name in zip(colours(len(names)), names, strict=True):
        rows = table[table["name"] == name].dropna(subset="mean").sort_values("level")
        ax.plot(rows["level"], rows["mean"], color=colour, label=name)
        if (rows["n_seeds"] > 2).all():
            _band(ax, rows["level"], rows["lower"], rows["upper"], colour)
    ax.set(xlabel="test error / error with the whole pool", ylabel="labels needed")
    ax.set_xlim(float(table["level"].max()), float(table["level"].min()))
    ax.set_ylim(bottom=0)
    ax.legend()
    return finish(ax)


def _band(ax: Axes, x: ArrayLike, lower: ArrayLike, upper: ArrayLike, colour: str) -> None:
    """Shade between two curves and draw them thin, so that bands on top of each other can be told apart."""
    ax.fill_between(x, lower, upper, color=colour, alpha=0.1, linewidth=0)
    for edge in (lower, upper):
        ax.plot(x, edge, color=colour, linewidth=0.5, alpha=0.6)
