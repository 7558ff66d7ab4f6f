"""Figures of kernel methods: feature space, uncertainty, errors against size, effort."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, Literal

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import SymLogNorm
from numpy.typing import ArrayLike, NDArray
from scipy.special import erf

from tlmc.errors import DataError
from tlmc.plots.style import (
    ELEMENT_COLOURS,
    PALETTE,
    REFERENCE_LINE,
    axes_or_new,
    colorbar_beside,
    colours,
    finish,
    legend_above,
    log_ticks,
    require_columns,
    styled,
)

_ERRORS: Final = {
    "energy_rmse_per_atom": ("energy RMSE (meV/atom)", 1000.0),
    "force_rmse_vector": ("force RMSE, vector (eV/Å)", 1.0),
}


@styled
def two_classes(
    points: ArrayLike,
    labels: ArrayLike,
    ax: Axes | None = None,
    *,
    names: tuple[str, str] = ("$x$", "$y$"),
    decision: tuple[ArrayLike, ArrayLike, ArrayLike] | None = None,
) -> Axes:
    """Draw points of two classes, and where a classifier changes its mind.

    Parameters
    ----------
    points
        Shape ``(n, 2)``.
    labels
        Shape ``(n,)``, negative or positive.
    ax
        Where to draw.
    names
        Of the axes.
    decision
        Coordinates along both axes, shapes ``(a,)`` and ``(b,)``, and the classifier's answers there, ``(b, a)``.

    Raises
    ------
    DataError
        If the shapes do not fit.
    """
    places, kind = np.asarray(points, dtype=np.float64), np.asarray(labels, dtype=np.float64)
    if places.shape != (len(kind), 2) or not kind.size:
        raise DataError(f"two classes need points (n, 2) and labels (n,), got {places.shape} and {kind.shape}")
    ax = axes_or_new(ax, aspect=0.9)
    if decision is not None:
        ax.contour(*(np.asarray(part) for part in decision), levels=[0.0], colors="0.4", linewidths=1, linestyles="--")
    for colour, marker, chosen, name in ((PALETTE[0], "o", kind < 0, "inner"), (PALETTE[1], "^", kind > 0, "outer")):
        ax.scatter(places[chosen, 0], places[chosen, 1], s=10, color=colour, marker=marker, linewidth=0, label=name)
    ax.set(xlabel=names[0], ylabel=names[1])
    legend_above(ax, 2)
    return finish(ax)


@styled
def uncertainty_band(
    x: ArrayLike,
    mean: ArrayLike,
    std: ArrayLike,
    ax: Axes | None = None,
    *,
    points: tuple[ArrayLike, ArrayLike] | None = None,
    truth: ArrayLike | None = None,
    samples: ArrayLike | None = None,
    names: tuple[str, str] = ("$x$", "$f(x)$"),
) -> Axes:
    """Draw a prediction with a band of two standard deviations on either side.

    Parameters
    ----------
    x, mean, std
        Shape ``(n,)``.
    ax
        Where to draw.
    points
        Abscissae and labels that were learnt from.
    truth
        The function behind the labels, shape ``(n,)``.
    samples
        Functions drawn from the posterior, shape ``(n_samples, n)``.
    names
        Of the axes, with units.

    Raises
    ------
    DataError
        If the shapes differ.
    """
    place, middle, width = (np.asarray(part, dtype=np.float64) for part in (x, mean, std))
    if not (place.shape == middle.shape == width.shape == (place.size,)) or not place.size:
        raise DataError(f"a band needs x, mean and std of one length, got {place.shape}, {middle.shape}, {width.shape}")
    ax = axes_or_new(ax)
    ax.fill_between(place, middle - 2 * width, middle + 2 * width, color=PALETTE[5], alpha=0.35, linewidth=0)
    if samples is not None:
        ax.plot(place, np.asarray(samples, dtype=np.float64).T, color=PALETTE[5], linewidth=0.6)
    if truth is not None:
        ax.plot(place, np.asarray(truth, dtype=np.float64), **REFERENCE_LINE, label="truth")
    ax.plot(place, middle, color=PALETTE[0], label="mean ± 2 sd")
    if points is not None:
        ax.plot(*(np.asarray(part) for part in points), "o", color="black", markersize=3, label="labels")
    ax.set(xlabel=names[0], ylabel=names[1])
    legend_above(ax, 3, columnspacing=1)
    return finish(ax)


@styled
def error_against_size(
    table: pd.DataFrame,
    ax: Axes | None = None,
    *,
    quantity: Literal["energy_rmse_per_atom", "force_rmse_vector"] = "force_rmse_vector",
) -> Axes:
    """Draw how errors fall with the number of training frames, on log axes, a line per learner.

    Parameters
    ----------
    table
        As :func:`tlmc.kernel_methods.learning_curve` returns: columns ``learner``, ``n_train`` and the quantity; the
        seeds of one size are averaged (geometric mean) and drawn as points too.
    ax
        Where to draw.
    quantity
        Energies are drawn in meV/atom.

    Raises
    ------
    DataError
        If the table is empty, lacks a column, or an error is not positive.
    """
    require_columns(table, "errors against size need", ["learner", "n_train", quantity])
    label, factor = _ERRORS[quantity]
    if not (table[quantity] > 0).all():
        raise DataError(f"errors on a log axis must be positive, got {table[quantity].min()}")
    ax = axes_or_new(ax, aspect=0.85)
    names = list(dict.fromkeys(table["learner"]))
    for colour, marker, name in zip(colours(len(names)), _markers(len(names)), names, strict=True):
        rows = table[table["learner"] == name]
        means = (factor * rows[quantity]).apply(np.log).groupby(rows["n_train"]).mean().apply(np.exp)
        ax.plot(means.index, means, color=colour, marker=marker, markersize=4, label=name)
        if rows["n_train"].duplicated().any():
            ax.plot(
                rows["n_train"], factor * rows[quantity], marker, color=colour, markersize=2, alpha=0.6, linestyle=""
            )
    ax.set_xscale("log")
    ax.set_yscale("log")
    sizes = sorted(set(table["n_train"]))
    log_ticks(ax.yaxis, float(table[quantity].max() / table[quantity].min()))
    ax.set_xticks(sizes, [str(n) for n in sizes])
    ax.set_xticks([], minor=True)
    ax.set(xlabel="training frames", ylabel=label)
    legend_above(ax, 2, columnspacing=1)
    return finish(ax)


@styled
def effort(
    table: pd.DataFrame, ax: Axes | None = None, *, columns: tuple[str, str, str] = ("estimator", "n", "seconds")
) -> Axes:
    """Draw seconds against size on log axes, with a cubic law through the first estimator's largest as a guide.

    Parameters
    ----------
    table
        As :func:`tlmc.kernel_methods.fit_seconds` returns.
    ax
        Where to draw.
    columns
        Names of the columns of estimator, size and time.

    Raises
    ------
    DataError
        If the table is empty or lacks a column.
    """
    kind, size, time = columns
    require_columns(table, "an effort needs", list(columns))
    ax = axes_or_new(ax)
    names = list(dict.fromkeys(table[kind]))
    for colour, marker, name in zip(colours(len(names)), _markers(len(names)), names, strict=True):
        rows = table[table[kind] == name].sort_values(size)
        ax.plot(rows[size], rows[time], color=colour, marker=marker, markersize=4, label=name)
    largest = table[table[kind] == names[0]].sort_values(size).iloc[-1]
    guide = np.array([table[size].min(), table[size].max()], dtype=np.float64)
    cubic = float(largest[time]) * (guide / float(largest[size])) ** 3
    ax.plot(guide, cubic, **REFERENCE_LINE, label="$\\propto M^3$")
    ax.set_xscale("log")
    ax.set_yscale("log")
    ax.set_ylim(bottom=0.5 * float(table[time].min()))
    sizes = sorted(set(table[size]))
    ax.set_xticks(sizes, [str(n) for n in sizes])
    ax.set_xticks([], minor=True)
    ax.set(xlabel="training labels $M$", ylabel="time of the fit (s)")
    legend_above(ax, 2, columnspacing=1)
    return finish(ax)


@styled
def calibration(errors: ArrayLike, stds: ArrayLike, ax: Axes | None = None) -> Axes:
    """Draw how often the error is within so many standard deviations, against how often it should be.

    Parameters
    ----------
    errors, stds
        Shape ``(n,)``, in one unit.
    ax
        Where to draw.

    Raises
    ------
    DataError
        If the shapes differ or a standard deviation is not positive.
    """
    error, std = np.abs(np.asarray(errors, dtype=np.float64)), np.asarray(stds, dtype=np.float64)
    if error.shape != std.shape or error.ndim != 1 or not error.size or not (std > 0).all():
        raise DataError(
            f"a calibration needs errors and positive deviations of one length, got {error.shape}, {std.shape}"
        )
    ax = axes_or_new(ax, aspect=0.9)
    observed = np.arange(1, len(error) + 1) / len(error)
    expected = erf(np.sort(error / std) / np.sqrt(2.0))
    ax.plot([0, 1], [0, 1], **REFERENCE_LINE)
    ax.step(np.concatenate([[0], expected, [1]]), np.concatenate([[0], observed, [1]]), where="post", color=PALETTE[0])
    ax.set(xlabel="expected share of frames", ylabel="observed share of frames", xlim=(0, 1), ylim=(0, 1))
    return finish(ax)


@styled
def covariance_matrix(matrix: ArrayLike, ax: Axes | None = None, *, blocks: Sequence[int] = ()) -> Axes:
    """Draw a covariance matrix in logarithmic colours, with lines between blocks.

    Parameters
    ----------
    matrix
        Shape ``(n, n)``.
    ax
        Where to draw.
    blocks
        Rows and columns that begin a block.

    Raises
    ------
    DataError
        If the matrix is not square.
    """
    values: NDArray[np.float64] = np.asarray(matrix, dtype=np.float64)
    if values.ndim != 2 or values.shape[0] != values.shape[1] or not values.size:
        raise DataError(f"a covariance matrix is square, got shape {values.shape}")
    ax = axes_or_new(ax, aspect=0.9)
    bound = float(np.abs(values).max())
    norm = SymLogNorm(1e-2, vmin=-1.0, vmax=1.0)
    drawn = ax.imshow(values / (bound or 1.0), cmap="RdBu_r", norm=norm, interpolation="nearest")
    for edge in blocks:
        ax.axhline(edge - 0.5, color="0.3", linewidth=0.4)
        ax.axvline(edge - 0.5, color="0.3", linewidth=0.4)
    colorbar_beside([ax], drawn, "covariance / largest")
    ax.set(xlabel="label", ylabel="label")
    return finish(ax)


@styled
def atom_energies(energies: ArrayLike, symbols: Sequence[str], ax: Axes | None = None) -> Axes:
    """Draw the energies that a model gives to atoms, about the mean of their element.

    Parameters
    ----------
    energies
        One row per frame, shape ``(n_frames, n_atoms)``, eV.
    symbols
        Elements of the atoms.
    ax
        Where to draw.

    Raises
    ------
    DataError
        If the shapes do not fit.
    """
    values = np.asarray(energies, dtype=np.float64)
    if values.ndim != 2 or values.shape[1] != len(symbols) or not values.size:
        raise DataError(f"energies must have shape (n_frames, {len(symbols)}), got {values.shape}")
    ax = axes_or_new(ax)
    kinds = np.asarray(symbols)
    centred = values.copy()
    for symbol in set(symbols):
        centred[:, kinds == symbol] -= values[:, kinds == symbol].mean()
    for place, symbol in enumerate(symbols):
        colour = ELEMENT_COLOURS.get(symbol, "#8C6D31")
        spread = np.linspace(-0.25, 0.25, len(values))
        ax.plot(place + spread, centred[:, place], ".", markersize=2, color=colour)
        ax.plot([place - 0.35, place + 0.35], 2 * [centred[:, place].mean()], color="black", linewidth=1)
    ax.set_xticks(range(len(symbols)), [f"{symbol}$_{{{k}}}$" for k, symbol in enumerate(symbols)])
    ax.set(xlabel="atom", ylabel="energy of the atom, about\nthe element's mean (eV)")
    return finish(ax)


def _markers(n: int) -> list[str]:
    return [("o", "s", "^", "D", "v", "P", "X", "*")[k % 8] for k in range(n)]
