"""Figures of networks: activations, descent paths, gradients over depth, fits of curves, and what networks learned."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, Literal

import numpy as np
import pandas as pd
import torch
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator
from numpy.typing import ArrayLike, NDArray

from tlmc.errors import DataError
from tlmc.networks.mlp import ACTIVATIONS
from tlmc.plots.style import (
    PALETTE,
    axes_or_new,
    colours,
    finish,
    legend_above,
    log_axis,
    log_ticks,
    require_columns,
    styled,
)

Array = NDArray[np.float64]

_ERRORS: Final = {
    "force_rmse_vector": "force RMSE, vector (eV/Å)",
    "energy_rmse_per_atom": "energy RMSE (meV/atom)",
}
_MARKERS: Final = "osD^vP*X"


@styled
def activations(ax: Axes | None = None, *, slope: bool = False, reach: float = 3.0) -> Axes:
    """Draw the activation functions, or their slopes.

    Parameters
    ----------
    ax
        Where to draw.
    slope
        Draw the derivatives.
    reach
        Largest argument, and smallest with the sign turned.
    """
    ax = axes_or_new(ax)
    z = torch.linspace(-reach, reach, 601, dtype=torch.float64)
    for style, (name, activation) in zip(("-", "--", "-.", ":"), ACTIVATIONS.items(), strict=True):
        function = activation.slope if slope else activation.value
        ax.plot(z.numpy(), function(z).numpy(), style, label=name)
    ax.set(xlabel="sum $z$", ylabel=r"slope $\sigma'(z)$" if slope else r"activation $\sigma(z)$")
    ax.legend()
    return finish(ax)


@styled
def descent_paths(
    surface: Callable[[Array, Array], Array],
    paths: Mapping[str, Array],
    ax: Axes | None = None,
    *,
    names: tuple[str, str] = ("first parameter", "second parameter"),
) -> Axes:
    """Draw the paths of optimisers over the contours of a surface of two parameters.

    Parameters
    ----------
    surface
        Height over two arrays of one shape; positive.
    paths
        By name, shape ``(n_steps + 1, 2)``; all begin at one point, and the end of each is marked.
    ax
        Where to draw.
    names
        Of the parameters, with units.

    Raises
    ------
    DataError
        If there is no path, or one is not of that shape.
    """
    for name, path in paths.items():
        if np.ndim(path) != 2 or np.shape(path)[1] != 2:
            raise DataError(f"the path of {name} must have shape (n_steps + 1, 2), got {np.shape(path)}")
    if not paths:
        raise DataError("there is no path to draw")
    ax = axes_or_new(ax)
    points = np.concatenate(list(paths.values()))
    low, high = points.min(0), points.max(0)
    margin = 0.12 * (high - low)
    grid = [np.linspace(low[k] - margin[k], high[k] + margin[k], 161) for k in (0, 1)]
    height = surface(*np.meshgrid(*grid))
    # levels a constant factor apart show the valley as well as the walls
    levels = np.geomspace(max(height.min(), 1e-4 * height.max()), height.max(), 14)
    ax.contour(*grid, height, levels=levels, cmap="Greys_r", linewidths=0.5, alpha=0.8)
    for colour, (name, path) in zip(colours(len(paths)), paths.items(), strict=True):
        ax.plot(*path.T, color=colour, linewidth=1.0, alpha=0.85, label=name)
        ax.plot(*path[-1], "o", color=colour, markersize=4, markeredgecolor="white", markeredgewidth=0.5, zorder=4)
    ax.plot(*next(iter(paths.values()))[0], "k*", markersize=7, zorder=5)
    ax.set(xlabel=names[0], ylabel=names[1], xlim=grid[0][[0, -1]], ylim=grid[1][[0, -1]])
    legend_above(ax, ncols=3, columnspacing=1.0, handlelength=1.2)
    return finish(ax)


@styled
def descent_losses(losses: Mapping[str, ArrayLike], ax: Axes | None = None, *, unit: str = "eV²") -> Axes:
    """Draw how the loss of several optimisers falls with the steps, on log axes.

    Parameters
    ----------
    losses
        By name, the loss at every step, the start included.
    ax
        Where to draw.
    unit
        Of the loss.

    Raises
    ------
    DataError
        If there is nothing to draw.
    """
    if not losses:
        raise DataError("there is no loss to draw")
    ax = axes_or_new(ax)
    for colour, (name, values) in zip(colours(len(losses)), losses.items(), strict=True):
        ax.plot(np.asarray(values), color=colour, linewidth=1.0, label=name)
    drawn = np.concatenate([np.asarray(values) for values in losses.values()])
    log_axis(ax, float(drawn.min()), float(drawn.max()))
    ax.set(xlabel="step", ylabel=f"loss ({unit})")
    legend_above(ax, ncols=3, columnspacing=1.0, handlelength=1.2)
    return finish(ax)


@styled
def gradients_over_depth(tables: Mapping[str, pd.DataFrame], ax: Axes | None = None) -> Axes:
    """Draw the size of the back-propagated gradient in every layer, on a log axis.

    Parameters
    ----------
    tables
        By name what :func:`tlmc.networks.gradient_norms` returned.
    ax
        Where to draw.

    Raises
    ------
    DataError
        If there is no table, or one is empty or lacks a column.
    """
    if not tables:
        raise DataError("there are no gradients to draw")
    ax = axes_or_new(ax)
    smallest, largest = np.inf, 0.0
    for k, (colour, (name, table)) in enumerate(zip(colours(len(tables)), tables.items(), strict=True)):
        require_columns(table, f"gradients of {name} need", ["layer", "delta"])
        ax.plot(table["layer"], table["delta"], color=colour, marker=_MARKERS[k % 8], markersize=2.5, label=name)
        smallest, largest = min(smallest, table["delta"].min()), max(largest, table["delta"].max())
    log_axis(ax, smallest, largest)
    ax.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    ax.set(xlabel="layer (1 at the input)", ylabel=r"root mean square of $\partial C/\partial z$")
    ax.legend()
    return finish(ax)


@styled
def curve_fits(
    points: tuple[ArrayLike, ArrayLike],
    x: ArrayLike,
    curves: Mapping[str, ArrayLike],
    ax: Axes | None = None,
    *,
    truth: ArrayLike | None = None,
    xlabel: str = "torsion angle (°)",
) -> Axes:
    """Draw fits of an energy curve between the points they were given.

    Parameters
    ----------
    points
        Coordinates and energies (eV) of the training points.
    x
        Where the curves are evaluated.
    curves
        By name, energies in eV at ``x``.
    ax
        Where to draw.
    truth
        The curve without noise, at ``x``.
    xlabel
        Name and unit of the coordinate.
    """
    ax = axes_or_new(ax)
    if truth is not None:
        ax.plot(x, truth, color="0.75", linewidth=3.5, label="calculator", zorder=1)
    for colour, (name, energies) in zip(colours(len(curves)), curves.items(), strict=True):
        ax.plot(x, energies, color=colour, label=name, zorder=2)
    ax.plot(*points, "o", color="black", markersize=3, label="training points", zorder=3)
    ax.set(xlabel=xlabel, ylabel="energy (eV)")
    legend_above(ax, ncols=2, columnspacing=1.0, handlelength=1.5)
    return finish(ax)


@styled
def fit_histories(histories: Mapping[str, pd.DataFrame], ax: Axes | None = None) -> Axes:
    """Draw training (dotted) and validation error (solid) of fits of a curve against the step, on log axes.

    Parameters
    ----------
    histories
        By name a row per recorded step: ``step``, ``train_rmse`` and ``validation_rmse`` in eV. The lowest validation
        error is marked.
    ax
        Where to draw.

    Raises
    ------
    DataError
        If there is no history, or one is empty or lacks a column.
    """
    if not histories:
        raise DataError("there are no fits to draw")
    ax = axes_or_new(ax)
    drawn = []
    for colour, (name, history) in zip(colours(len(histories)), histories.items(), strict=True):
        require_columns(history, f"fits of {name} need", ["step", "train_rmse", "validation_rmse"])
        values = 1000 * history[["train_rmse", "validation_rmse"]].to_numpy(dtype=np.float64)
        drawn.append(values)
        ax.plot(history["step"], values[:, 0], ":", color=colour)
        ax.plot(history["step"], values[:, 1], "-", color=colour, label=name)
        lowest = values[:, 1].argmin()
        ax.plot(history["step"].iloc[lowest], values[lowest, 1], "o", color=colour, markersize=3.5)
    log_axis(ax, float(np.min([v.min() for v in drawn])), float(np.max([v.max() for v in drawn])))
    ax.plot([], [], ":", color="0.3", label="training")
    ax.set(xlabel="step", ylabel="error (meV)")
    legend_above(ax, ncols=2, columnspacing=1.0, handlelength=1.5)
    return finish(ax)


@styled
def error_over_size(
    table: pd.DataFrame,
    ax: Axes | None = None,
    *,
    quantity: Literal["force_rmse_vector", "energy_rmse_per_atom"] = "force_rmse_vector",
) -> Axes:
    """Draw the test error of learners against the number of training frames, on log axes.

    Parameters
    ----------
    table
        A row per learner, size and seed: ``learner``, ``n_train`` and the quantity (eV/A or eV/atom). The line goes
        through the geometric mean over the seeds, the band from the lowest to the highest.
    ax
        Where to draw.
    quantity
        Energies are drawn in meV/atom.

    Raises
    ------
    DataError
        If the table is empty or lacks a column.
    """
    require_columns(table, "errors over size need", ["learner", "n_train", quantity])
    ax = axes_or_new(ax)
    factor = 1000.0 if quantity == "energy_rmse_per_atom" else 1.0
    learners = list(dict.fromkeys(table["learner"]))
    for k, (colour, learner) in enumerate(zip(colours(len(learners)), learners, strict=True)):
        groups = factor * table[table["learner"] == learner].groupby("n_train")[quantity].agg(["min", "max"])
        logs = np.log(factor * table.loc[table["learner"] == learner, quantity])
        mean = np.exp(logs.groupby(table["n_train"]).mean())
        ax.fill_between(groups.index, groups["min"], groups["max"], color=colour, alpha=0.15, linewidth=0)
        ax.plot(mean.index, mean, color=colour, marker=_MARKERS[k % 8], markersize=3.5, label=learner)
    values, sizes = factor * table[quantity], table["n_train"]
    log_axis(ax, float(values.min()), float(values.max()))
    ax.set_xscale("log")
    log_ticks(ax.xaxis, float(sizes.max() / sizes.min()))
    ax.set_xticks(sorted(sizes.unique()))
    ax.set(xlabel="training frames", ylabel=f"test {_ERRORS[quantity]}")
    legend_above(ax, ncols=2, columnspacing=1.0, handlelength=1.5)
    return finish(ax)


@styled
def representation_map(points: ArrayLike, kinds: Sequence[str], ax: Axes | None = None, **names: Any) -> Axes:
    """Draw vectors of atoms, projected on two directions, coloured by kind.

    Parameters
    ----------
    points
        Shape ``(n_atoms, 2)``.
    kinds
        Of each atom.
    ax
        Where to draw.
    **names
        ``xlabel`` and ``ylabel``; principal components by default.

    Raises
    ------
    DataError
        If points and kinds do not match.
    """
    positions = np.asarray(points, dtype=np.float64)
    if positions.shape != (len(kinds), 2):
        raise DataError(f"a map of {len(kinds)} atoms needs points of shape ({len(kinds)}, 2), got {positions.shape}")
    ax = axes_or_new(ax)
    present = list(dict.fromkeys(kinds))
    for k, (colour, kind) in enumerate(zip(colours(len(present)), present, strict=True)):
        mine = np.array([other == kind for other in kinds])
        x, y = positions[mine].T
        ax.scatter(x, y, s=9, color=colour, marker=_MARKERS[k % 8], linewidth=0, alpha=0.7, label=kind)
    ax.set(**({"xlabel": "first principal component", "ylabel": "second principal component"} | names))
    legend_above(ax, ncols=3, columnspacing=0.8, handletextpad=0.2)
    return finish(ax)


@styled
def spread_by_kind(values: Mapping[str, ArrayLike], ax: Axes | None = None, *, xlabel: str = "energy (eV)") -> Axes:
    """Draw the values of each kind in a row of its own: all as dots, the mean as a line.

    Parameters
    ----------
    values
        By kind, numbers.
    ax
        Where to draw.
    xlabel
        Name and unit of the numbers.

    Raises
    ------
    DataError
        If there is no kind, or one has no value.
    """
    if not values or any(np.size(part) == 0 for part in values.values()):
        raise DataError(f"each kind needs a value, got { ({kind: np.size(part) for kind, part in values.items()}) }")
    ax = axes_or_new(ax)
    # a fixed little shift keeps equal values apart
    for row, part in enumerate(values.values()):
        numbers = np.asarray(part, dtype=np.float64).ravel()
        shift = 0.5 * (np.arange(len(numbers)) * 0.618 % 1 - 0.5)
        ax.scatter(numbers, row + shift, s=5, color=PALETTE[row % 7], alpha=0.5, linewidth=0)
        ax.plot([numbers.mean()] * 2, [row - 0.36, row + 0.36], color="black", linewidth=1.2)
    ax.set_yticks(range(len(values)), list(values))
    ax.invert_yaxis()
    ax.set(xlabel=xlabel, ylabel="kind of atom")
    return finish(ax)
