"""Figures of trainings: loss, errors and learning rate against the epoch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final, Literal, cast

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, StrMethodFormatter

from tlmc.errors import DataError
from tlmc.plots.style import (
    COLUMN,
    PALETTE,
    REFERENCE_LINE,
    axes_or_new,
    colours,
    finish,
    log_axis,
    require_columns,
    styled,
    subplots,
)

_CURVES: Final = {
    "loss": "loss",
    "force_rmse_vector": "force RMSE, vector (eV/Å)",
    "energy_rmse_per_atom": "energy RMSE (meV/atom)",
    "lr": "learning rate",
}


@styled
def learning_curve(
    history: pd.DataFrame,
    ax: Axes | None = None,
    *,
    quantity: Literal["loss", "force_rmse_vector", "energy_rmse_per_atom", "lr"] = "loss",
    best_epoch: int | None = None,
) -> Axes:
    """Draw one quantity against the epoch, training and validation, on a log scale.

    Parameters
    ----------
    history
        A row per epoch: ``epoch`` and ``train_<quantity>``, ``validation_<quantity>`` (one may be absent), or ``lr``.
    ax
        Where to draw.
    quantity
        Energies are drawn in meV/atom.
    best_epoch
        Marked by a vertical line.

    Raises
    ------
    DataError
        If the history is empty or lacks the columns.
    """
    columns = {"lr": ""} if quantity == "lr" else {f"{part}_{quantity}": part for part in ("train", "validation")}
    present = {column: part for column, part in columns.items() if column in history}
    if "epoch" not in history or not present or history.empty:
        raise DataError(
            f"a learning curve of {quantity} needs columns epoch and {' or '.join(columns)}, "
            f"got {len(history)} rows of {', '.join(map(str, history.columns))}"
        )
    ax = axes_or_new(ax)
    factor = 1000.0 if quantity == "energy_rmse_per_atom" else 1.0
    few = "o" if len(history) < 15 else ""
    for column, part in present.items():
        ax.plot(
            history["epoch"],
            factor * history[column],
            color=PALETTE[0] if part != "validation" else PALETTE[1],
            label=part or None,
            marker=few,
            markersize=2.5,
        )
    if best_epoch is not None:
        ax.axvline(best_epoch, **REFERENCE_LINE, label=f"best, epoch {best_epoch}")
    drawn = factor * history[list(present)].to_numpy(dtype=np.float64)
    # a schedule may end at zero, which a log axis leaves out; a training that diverged holds NaN
    positive = drawn[np.isfinite(drawn) & (drawn > 0)]
    if positive.size:
        log_axis(ax, float(positive.min()), float(positive.max()))
    ax.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    ax.set(xlabel="epoch", ylabel=_CURVES[quantity])
    if ax.get_legend_handles_labels()[0]:
        ax.legend()
    return finish(ax)


@styled
def learning_curves(history: pd.DataFrame, *, best_epoch: int | None = None) -> Figure:
    """Draw loss, force and energy error and the learning rate of a training, one panel each.

    Parameters
    ----------
    history
        As ``FinetuneResult.history``.
    best_epoch
        Marked in the panels of errors.
    """
    figure, axes = subplots(2, 2, width=2 * COLUMN, aspect=0.68)
    for ax, quantity in zip(axes.flat, _CURVES, strict=True):
        learning_curve(
            history,
            ax,
            quantity=cast(Any, quantity),
            best_epoch=None if quantity == "lr" else best_epoch,
        )
        if ax is not axes[0, 0] and ax.get_legend() is not None:
            ax.get_legend().remove()
    return figure


@styled
def validation_curves(
    histories: Mapping[str, Sequence[pd.DataFrame]],
    ax: Axes | None = None,
    *,
    quantity: Literal["force_rmse_vector", "energy_rmse_per_atom"] = "force_rmse_vector",
) -> Axes:
    """Draw how the validation error of several trainings falls, on log axes, a line per run, a colour per name.

    Parameters
    ----------
    histories
        Under each name (of a recipe, say) the histories of its runs (``FinetuneResult.history``), seeds as a rule.
    ax
        Where to draw.
    quantity
        Energies are drawn in meV/atom.

    Raises
    ------
    DataError
        If there is no run, or a history is empty or lacks the columns.
    """
    column = f"validation_{quantity}"
    factor = 1000.0 if quantity == "energy_rmse_per_atom" else 1.0
    ax = axes_or_new(ax)
    drawn = []
    for colour, (name, runs) in zip(colours(len(histories)), histories.items(), strict=True):
        for i, history in enumerate(runs):
            require_columns(history, f"validation curves of {name} need", ["epoch", column])
            values = factor * history[column].to_numpy(dtype=np.float64)
            drawn.append(values[np.isfinite(values) & (values > 0)])
            marker = "o" if len(history) < 15 else ""
            label = name if i == 0 else None
            ax.plot(history["epoch"], values, color=colour, alpha=0.8, marker=marker, markersize=2.5, label=label)
    if not drawn:
        raise DataError("validation curves need at least one run, got none")
    if any(values.size for values in drawn):
        log_axis(ax, *(float(extreme(np.concatenate(drawn))) for extreme in (np.min, np.max)))
    ax.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    ax.set(xlabel="epoch, validation part", ylabel=_CURVES[quantity])
    ax.legend()
    return finish(ax)


@styled
def error_against_time(
    table: pd.DataFrame,
    ax: Axes | None = None,
    *,
    quantity: Literal["force_rmse_vector", "energy_rmse_per_atom"] = "force_rmse_vector",
) -> Axes:
    """Draw how the validation error falls with processor time, on log axes, a colour per setting.

    A line joins the geometric means over the seeds, epoch by epoch; a point is the end of one run, which is its result:
    a schedule that ends at rate zero has nothing more to come.

    Parameters
    ----------
    table
        As :func:`tlmc.experiments.experiment.convergence` returns it.
    ax
        Where to draw.
    quantity
        Energies are drawn in meV/atom.

    Raises
    ------
    DataError
        If the table is empty or lacks columns.
    """
    column = f"validation_{quantity}"
    require_columns(table, "error against time needs", ["setting", "seed", "epoch", "cpu_seconds", column])
    factor = 1000.0 if quantity == "energy_rmse_per_atom" else 1.0
    ax = axes_or_new(ax)
    names = list(dict.fromkeys(table["setting"]))
    for colour, name in zip(colours(len(names)), names, strict=True):
        runs = table[table["setting"] == name]
        means = np.exp(np.log(runs[["epoch", "cpu_seconds", column]].set_index("epoch")).groupby("epoch").mean())
        ax.plot(means["cpu_seconds"], factor * means[column], color=colour, alpha=0.6, lw=0.8)
        ends = runs.groupby("seed").last()
        ax.plot(ends["cpu_seconds"], factor * ends[column], "o", color=colour, markersize=3.5, label=name)
    ax.set_xscale("log")
    times = table["cpu_seconds"]
    # over three decades there is no room for more
    ax.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if times.max() < 300 * times.min() else (1.0,)))
    ax.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    ax.xaxis.set_minor_formatter(NullFormatter())
    values = factor * table[column].to_numpy(dtype=np.float64)
    values = values[np.isfinite(values) & (values > 0)]
    if values.size:
        log_axis(ax, float(values.min()), float(values.max()))
    ax.set(xlabel="processor time (s)", ylabel=f"validation {_CURVES[quantity]}")
    ax.legend()
    return finish(ax)


@styled
def error_against_time_panels(table: pd.DataFrame) -> Figure:
    """Draw :func:`error_against_time` of several data sets: a column each, forces above, energies below.

    Parameters
    ----------
    table
        As :func:`tlmc.experiments.experiment.convergence` returns it, every ``dataset`` with the same settings.

    Raises
    ------
    DataError
        As in :func:`error_against_time`.
    """
    require_columns(table, "error against time needs", ["dataset", "setting"])
    names = list(dict.fromkeys(table["dataset"]))
    figure, axes = subplots(2, len(names), width=0.8 * COLUMN * len(names), aspect=0.9)
    for column, name in zip(axes.T, names, strict=True):
        of_set = table[table["dataset"] == name]
        for ax, quantity in zip(column, ("force_rmse_vector", "energy_rmse_per_atom"), strict=True):
            error_against_time(of_set, ax, quantity=cast(Any, quantity)).get_legend().remove()  # type: ignore[union-attr]
            if ax not in axes[:, 0]:
                ax.set(ylabel="")
        column[0].set(title=name.rpartition("/")[2], xlabel="")
    # one legend, where it hides no curve
    axes[0, -1].legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure
