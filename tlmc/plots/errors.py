"""Figures of errors: predictions against labels, residuals, errors by element and by the size of forces."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final, Literal, cast

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullFormatter, StrMethodFormatter
from numpy.typing import ArrayLike, NDArray
from scipy.spatial import cKDTree

from tlmc.errors import DataError
from tlmc.evaluation.metrics import Metric
from tlmc.plots.style import (
    COLUMN,
    PALETTE,
    REFERENCE_LINE,
    axes_or_new,
    colorbar_beside,
    colours,
    finish,
    legend_above,
    log_axis,
    log_ticks,
    require_columns,
    styled,
)

if TYPE_CHECKING:
    from tlmc.data.dataset import Dataset
    from tlmc.potentials.model import Predictions

Array = NDArray[np.float64]
Quantity = Literal["force", "force_component", "energy"]

_PAPER: Final[dict[str, Any]] = {"facecolor": "white", "edgecolor": "none", "alpha": 0.75, "pad": 1}
_HEXBIN_FROM: Final = 3000
"""Points from which single markers cover one another."""


@styled
def parity(
    labels: ArrayLike,
    predictions: ArrayLike,
    ax: Axes | None = None,
    *,
    quantity: Quantity = "force",
    limits: tuple[float, float] | None = None,
    colorbar: bool = True,
    note: str = "",
) -> Axes:
    """Draw predictions against labels with the line y = x, coloured by the density of points on a log scale.

    Parameters
    ----------
    labels, predictions
        For ``force`` vectors in eV/Angstrom, shape ``(n, 3)``: their lengths are drawn, and the RMSE in the panel is
        that of the error vector. For ``force_component`` any shape, eV/Angstrom. For ``energy`` energies per atom,
        shape ``(n,)``, eV/atom, with the RMSE in meV/atom.
    ax
        Where to draw.
    quantity
        What the numbers are.
    limits
        Of both axes; by default they hold all points.
    colorbar
        Whether to explain the colours: points in a hexagon, or within 2 % of the axis where single points are drawn.
    note
        A line below the RMSE.

    Raises
    ------
    DataError
        If the shapes differ or do not fit the quantity, or there are no points.
    """
    x, y = np.asarray(labels, dtype=np.float64), np.asarray(predictions, dtype=np.float64)
    if x.shape != y.shape or x.size == 0 or (quantity == "force" and (x.ndim != 2 or x.shape[1] != 3)):
        wanted = "(n, 3)" if quantity == "force" else "one shape"
        raise DataError(f"parity of {quantity} needs labels and predictions of {wanted}, got {x.shape} and {y.shape}")
    if quantity == "force":
        text = f"RMSE {np.sqrt(((x - y) ** 2).sum(axis=1).mean()):.3f} eV/Å (vector)"
        x, y = np.linalg.norm(x, axis=1), np.linalg.norm(y, axis=1)
    elif quantity == "force_component":
        text = f"RMSE {np.sqrt(((x - y) ** 2).mean()):.3f} eV/Å (component)"
    else:
        text = f"RMSE {_significant(1000 * np.sqrt(((x - y) ** 2).mean()))} meV/atom"
    x, y = x.ravel(), y.ravel()
    ax = axes_or_new(ax, aspect=0.88)
    lower, upper = limits if limits is not None else _limits(np.concatenate([x, y]), quantity)
    points = _density(ax, x, y, (lower, upper))
    ax.plot([lower, upper], [lower, upper], zorder=3, **REFERENCE_LINE)
    symbol = {"force": "|F| (eV/Å)", "force_component": "force component (eV/Å)", "energy": "E/N (eV/atom)"}[quantity]
    ax.set(xlim=(lower, upper), ylim=(lower, upper), xlabel=f"label {symbol}", ylabel=f"predicted {symbol}")
    ax.set_aspect("equal")
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_locator(MaxNLocator(nbins=4, steps=[1, 2, 2.5, 5, 10]))
    span = upper - lower
    x, y = (x - lower) / span, (y - lower) / span
    left, right = ((x < 0.6) & (y > 0.84)).sum(), ((x > 0.4) & (y < 0.16)).sum()
    corner: dict[str, Any] = {"xy": (0.04, 0.96), "ha": "left", "va": "top"}
    if right < left:
        corner = {"xy": (0.97, 0.04), "ha": "right", "va": "bottom"}
    ax.annotate("\n".join(filter(None, (text, note))), xycoords="axes fraction", fontsize=7, bbox=_PAPER, **corner)
    if colorbar:
        _colorbar([ax], points)
    return finish(ax)


@styled
def parity_grid(
    dataset: Dataset,
    before: Predictions,
    after: Predictions,
    *,
    titles: tuple[str, str] = ("before fine-tuning", "after fine-tuning"),
    remove_offset: bool = True,
) -> Figure:
    """Draw parity before | after fine-tuning, lengths of forces above energies per atom (thesis figures 4.6 to 4.10).

    Parameters
    ----------
    dataset
        Labels, the test set as a rule.
    before, after
        Predictions for its frames.
    titles
        Of the two columns.
    remove_offset
        Take the mean error per atom from the energies ``before``, and say so in the panel: a start model's zero of
        energy is arbitrary, and hundreds of eV away from that of many codes.

    Returns
    -------
    Figure
        Two columns wide; the panels of a row share their axes and colours.
    """
    figure, axes = plt.subplots(2, 2, figsize=(1.75 * COLUMN, 1.6 * COLUMN), sharex="row", sharey="row")
    n_atoms = np.asarray(dataset.n_atoms)
    labels = dataset.energies / n_atoms
    energies = [np.asarray(side.energies) / n_atoms for side in (before, after)]
    offset = float((energies[0] - labels).mean())
    if remove_offset:
        energies[0] = energies[0] - offset
    offset_note = f"offset {offset:+.4g} eV/atom removed".replace("-", "−") if remove_offset else ""
    force = np.concatenate(dataset.forces)
    forces = [np.concatenate(side.forces) for side in (before, after)]
    rows: tuple[tuple[Quantity, Array, list[Array]], ...] = (("force", force, forces), ("energy", labels, energies))
    for row, (quantity, label, sides) in zip(axes, rows, strict=True):
        drawn = [label, *sides] if quantity == "energy" else [np.linalg.norm(part, axis=1) for part in (label, *sides)]
        limits = _limits(np.concatenate(drawn), quantity)
        for ax, side in zip(row, sides, strict=True):
            note = offset_note if quantity == "energy" and side is energies[0] else ""
            parity(label, side, ax, quantity=quantity, limits=limits, colorbar=False, note=note)
        points = [ax.collections[0] for ax in row]
        highest = max(collection.get_clim()[1] for collection in points)
        for collection in points:
            collection.set_clim(1, highest)
        _colorbar(list(row), points[0])
        row[1].set_ylabel("")
    for ax, title in zip(axes[0], titles, strict=True):
        ax.set_title(title)
        ax.set_xlabel("label |F| (eV/Å)")
    return figure


@styled
def residual_histogram(
    residuals: ArrayLike | Mapping[str, ArrayLike],
    ax: Axes | None = None,
    *,
    quantity: Literal["energy", "force_component"] = "force_component",
    bins: int | None = None,
) -> Axes:
    """Draw the distribution of errors, counts on a log scale, so that the tails show.

    Parameters
    ----------
    residuals
        Predicted minus label, any shape, in eV/Angstrom or eV/atom; or several such by name, drawn over one another.
    ax
        Where to draw.
    quantity
        What the errors are of; energies are drawn in meV/atom.
    bins
        Over the range of all errors, symmetric about zero; by default 21 to 101, the more the more errors there are.

    Raises
    ------
    DataError
        If a set is empty or holds NaN or infinity.
    """
    named = residuals if isinstance(residuals, Mapping) else {"": residuals}
    factor, unit = (1000.0, "meV/atom") if quantity == "energy" else (1.0, "eV/Å")
    values = {name: factor * np.asarray(part, dtype=np.float64).ravel() for name, part in named.items()}
    for name, part in values.items():
        if part.size == 0 or not np.isfinite(part).all():
            raise DataError(f"residuals {name!r} must be finite numbers, at least one, got {part.size} values")
    ax = axes_or_new(ax)
    span = max(float(np.abs(part).max()) for part in values.values()) or 1.0
    if bins is None:
        bins = int(np.clip(2 * np.sqrt(max(part.size for part in values.values())), 20, 100)) // 2 * 2 + 1
    edges = np.linspace(-span, span, bins + 1).tolist()
    for colour, (name, part) in zip(PALETTE, values.items(), strict=False):
        label = f"{name}: RMSE {_significant(np.sqrt((part**2).mean()))} {unit}".removeprefix(": ")
        ax.hist(part, edges, histtype="stepfilled", color=colour, alpha=0.25)
        ax.hist(part, edges, histtype="step", color=colour, label=label)
    ax.axvline(0, **REFERENCE_LINE)
    ax.set_yscale("log")
    # room above the highest bin for the legend
    ax.set_ylim(0.7, ax.get_ylim()[1] * 4 ** len(values))
    what = "energy" if quantity == "energy" else "force component"
    ax.set(xlabel=f"error of {what} ({unit})", ylabel="frames" if quantity == "energy" else "force components")
    ax.legend(loc="upper left", frameon=True, edgecolor="none", framealpha=0.9)
    return finish(ax)


@styled
def error_by_element(results: Mapping[str, Mapping[str, Metric]], ax: Axes | None = None) -> Axes:
    """Draw the vector RMSE of forces of each element as bars.

    Parameters
    ----------
    results
        Metrics of :func:`tlmc.evaluation.evaluate` by name, such as ``{"before": ..., "after": ...}``.
    ax
        Where to draw.

    Raises
    ------
    DataError
        If no element is there.
    """
    prefix = "force_rmse_vector_"
    # an element is one capital and perhaps one small letter; "below_2" and "above_2" are ranges
    elements = sorted(
        {
            name.removeprefix(prefix)
            for metrics in results.values()
            for name in metrics
            if re.fullmatch(f"{prefix}[A-Z][a-z]?", name)
        }
    )
    if not elements:
        raise DataError(f"no {prefix}<element> in the metrics of {', '.join(results) or 'nothing'}")
    ax = axes_or_new(ax)
    width = 0.8 / len(results)
    for i, (colour, (name, metrics)) in enumerate(zip(colours(len(results)), results.items(), strict=True)):
        present = [
            (k, metrics[prefix + element].value) for k, element in enumerate(elements) if prefix + element in metrics
        ]
        bars = ax.bar(
            [k + (i - (len(results) - 1) / 2) * width for k, _ in present],
            [value for _, value in present],
            width,
            color=colour,
            label=name,
        )
        ax.bar_label(bars, fmt="%.2g", fontsize=6, padding=1)
    ax.set_xticks(range(len(elements)), elements)
    ax.set(ylabel="force RMSE, vector (eV/Å)")
    ax.margins(y=0.15)
    ax.legend()
    return finish(ax)


@styled
def error_against_force(tables: Mapping[str, pd.DataFrame], ax: Axes | None = None) -> Axes:
    """Draw the force error of each frame against the size of its labelled forces, on log axes.

    The line is where the error is as large as the force, as of a model that predicts zero.

    Parameters
    ----------
    tables
        By name, tables as :func:`tlmc.evaluation.per_frame` returns them.
    ax
        Where to draw.

    Raises
    ------
    DataError
        If there is no table, or one is empty or lacks a column.
    """
    if not tables:
        raise DataError("errors against forces need at least one table, got none")
    ax = axes_or_new(ax, aspect=0.88)
    both = []
    for colour, (name, table) in zip(colours(len(tables)), tables.items(), strict=True):
        require_columns(table, f"{name}: errors against forces need", ["force_rms", "force_rmse_vector"])
        both.append(table["force_rms"].to_numpy(dtype=np.float64))
        ax.scatter(
            table["force_rms"], table["force_rmse_vector"], s=9, color=colour, alpha=0.7, linewidth=0, label=name
        )
    force = np.concatenate(both)
    ends = [float(force[force > 0].min(initial=1.0)), float(force.max(initial=1.0))]
    ax.plot(ends, ends, zorder=0, **REFERENCE_LINE)
    ax.set_xscale("log")
    log_ticks(ax.xaxis, ends[1] / ends[0])
    log_axis(ax, *ax.get_ylim())
    ax.set(xlabel="RMS of the labelled |F| of a frame (eV/Å)", ylabel="force RMSE of the frame, vector (eV/Å)")
    legend_above(ax, 2)
    return finish(ax)


def _limits(values: Array, quantity: Quantity) -> tuple[float, float]:
    lower, upper = float(values.min()), float(values.max())
    margin = 0.04 * (upper - lower) or 0.5
    return (0.0 if quantity == "force" else lower - margin, upper + margin)


def _density(ax: Axes, x: Array, y: Array, limits: tuple[float, float]) -> ScalarMappable:
    """Draw points coloured by how many lie near: hexagons where they are many, else markers."""
    lower, upper = limits
    if len(x) >= _HEXBIN_FROM:
        points: Any = ax.hexbin(
            x, y, gridsize=70, extent=(lower, upper, lower, upper), mincnt=1, linewidths=0.1, rasterized=True
        )
        highest = float(points.get_array().max())
    else:
        near = cKDTree(np.column_stack([x, y]))
        count = near.query_ball_point(near.data, 0.02 * (upper - lower), return_length=True)
        order = np.argsort(count, kind="stable")
        points = ax.scatter(x[order], y[order], c=count[order], s=7, linewidth=0)
        highest = float(count.max())
    points.set_norm(LogNorm(1, max(highest, 2.0)))
    points.set_cmap("viridis")
    return cast(ScalarMappable, points)


def _colorbar(axes: list[Axes], points: ScalarMappable) -> None:
    scale = colorbar_beside(axes, points, "points nearby").ax.yaxis
    scale.set_major_formatter(StrMethodFormatter("{x:g}"))
    scale.set_minor_formatter(NullFormatter())


def _significant(value: float) -> str:
    """Format a number with two to three significant digits and without an exponent."""
    digits = 2 if value == 0 else int(np.clip(2 - np.floor(np.log10(abs(value))), 0, 6))
    return f"{value:.{digits}f}"
