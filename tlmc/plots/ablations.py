"""Figures of ablations: errors of settings beside the thesis, along a number, and against what was forgotten."""

from __future__ import annotations

from typing import Any, Final, Literal

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import NullFormatter

from tlmc.errors import DataError
from tlmc.plots.style import (
    PALETTE,
    REFERENCE_LINE,
    axes_or_new,
    colours,
    finish,
    legend_above,
    log_axis,
    log_ticks,
    require_columns,
    styled,
)

Quantity = Literal["F", "E"]

_COLUMNS: Final[dict[str, tuple[str, str, str]]] = {
    "F": ("F vector (eV/A)", "thesis F (eV/A)", "test force RMSE, vector (eV/Å)"),
    "E": ("E (meV/atom)", "thesis E (meV/atom)", "test energy RMSE (meV/atom)"),
}
_THESIS: Final[dict[str, Any]] = {"color": "0.45", "marker": "D", "markersize": 3.5, "markerfacecolor": "white"}


@styled
def setting_ratios(table: pd.DataFrame, ax: Axes | None = None, *, quantity: Quantity = "F") -> Axes:
    """Draw by which factor every setting changes the test error of the recipe as it is, here and in the thesis.

    Parameters
    ----------
    table
        As :func:`tlmc.thesis.ablations.table` returns it. Ratios are taken seed by seed; bars are their standard
        deviation.
    ax
        Where to draw.
    quantity
        Force vectors or energies per atom.

    Raises
    ------
    DataError
        If the table is empty, lacks a column, or its baseline has not run.
    """
    ratio, (_, thesis, _) = f"{quantity} / baseline", _COLUMNS[quantity]
    require_columns(table, "ratios of settings need", ["dataset", "setting", ratio, f"{ratio} spread", thesis])
    known = table[table[ratio].notna()]
    if known.empty:
        raise DataError("ratios of settings need the results of the recipe as it is, which are missing")
    settings = list(dict.fromkeys(known["setting"]))
    ax = axes_or_new(ax, aspect=0.25 + 0.1 * len(settings))
    datasets = list(dict.fromkeys(known["dataset"]))
    place = {setting: len(settings) - k for k, setting in enumerate(settings)}
    for k, (colour, dataset) in enumerate(zip(colours(len(datasets)), datasets, strict=True)):
        rows = known[known["dataset"] == dataset]
        y = rows["setting"].map(place) + 0.12 * (len(datasets) - 1 - 2 * k)
        label = dataset.split("/")[-1]
        ax.errorbar(rows[ratio], y, xerr=rows[f"{ratio} spread"].fillna(0.0), fmt="o", color=colour, markersize=4,
                    linewidth=1, label=label)  # fmt: skip
    first = known[known["dataset"] == datasets[0]]
    ones = first.loc[(first[ratio] - 1).abs() < 1e-12, thesis].dropna()
    if not ones.empty:
        ours = first[first[thesis].notna()]
        ax.plot(ours[thesis] / ones.iloc[0], ours["setting"].map(place) - 0.25, linestyle="", label="thesis", **_THESIS)
    ax.axvline(1.0, **REFERENCE_LINE)
    ax.set_xscale("log")
    low, high = ax.get_xlim()
    low, high = min(low, 0.7), max(high, 1.4)  # a few per cent must not look like much
    ax.set_xlim(low, high)
    log_ticks(ax.xaxis, high / low)
    ax.set_yticks(list(place.values()), list(place))
    ax.set_ylim(0.4, len(settings) + 0.6)
    ax.set_xlabel(f"{'force' if quantity == 'F' else 'energy'} RMSE, ratio to the recipe")
    legend_above(ax, 3)
    return finish(ax)


@styled
def error_against_value(
    table: pd.DataFrame,
    ax: Axes | None = None,
    *,
    xlabel: str,
    quantity: Quantity = "F",
    log_x: bool = True,
) -> Axes:
    """Draw the test error against a setting that is a number, with its spread over seeds and the thesis' beside it.

    Parameters
    ----------
    table
        As :func:`tlmc.thesis.ablations.table` returns it. The recipe as it is becomes a dashed line if it has no place
        among the numbers.
    ax
        Where to draw.
    xlabel
        What the numbers are.
    quantity
        Force vectors or energies per atom.
    log_x
        Whether equal ratios of the setting are equal distances.

    Raises
    ------
    DataError
        If the table is empty or lacks a column, or no setting is a number.
    """
    ours, thesis, words = _COLUMNS[quantity]
    require_columns(
        table, "errors against a setting need", ["dataset", "setting", "value", ours, f"{ours} spread", thesis]
    )
    known = table[table["value"].notna()]
    if known.empty:
        raise DataError(f"no setting of {', '.join(table['setting'])} is a number")
    ax = axes_or_new(ax)
    datasets = list(dict.fromkeys(known["dataset"]))
    for colour, dataset in zip(colours(len(datasets)), datasets, strict=True):
        rows = known[known["dataset"] == dataset].sort_values("value")
        spread = rows[f"{ours} spread"].fillna(0.0)
        # on a log axis a bar that reaches zero has no end
        lower = np.minimum(spread, 0.9 * rows[ours])
        ax.errorbar(rows["value"], rows[ours], yerr=[lower, spread], color=colour, marker="o", markersize=4, capsize=2,
                    label=dataset.split("/")[-1])  # fmt: skip
        recipe = (table["dataset"] == dataset) & table["value"].isna() & (table[f"{quantity} / baseline"] == 1.0)
        for _, row in table[recipe].iterrows():
            ax.axhline(row[ours], color=colour, linestyle="--", linewidth=0.8, label=row["setting"])
    published = known[(known["dataset"] == datasets[0]) & known[thesis].notna()].sort_values("value")
    if not published.empty:
        ax.plot(published["value"], published[thesis], linewidth=0.8, label="thesis", **_THESIS)
    values = np.concatenate([known[ours], published[thesis]])
    log_axis(ax, float(values.min()), float(values.max()))
    places = sorted(set(known["value"]))
    if log_x:
        ax.set_xscale("log")
        ax.xaxis.set_minor_formatter(NullFormatter())
        ax.set_xticks([], minor=True)
    ax.set_xticks(places, [f"{place:g}" for place in places])
    ax.set(xlabel=xlabel, ylabel=words)
    legend_above(ax, 2)
    return finish(ax)


@styled
def drift_against_error(table: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Draw how far settings moved the forces on isolated molecules against what they reached on the crystal.

    The lower left is what one wants: a good model of the crystal that still is the start model elsewhere.

    Parameters
    ----------
    table
        As :func:`tlmc.thesis.ablations.table` returns it, or several tables of one data set one below the other.
    ax
        Where to draw.

    Raises
    ------
    DataError
        If the table is empty or lacks a column.
    """
    error, drift = "F vector (eV/A)", "drift F (eV/A)"
    columns = ["setting", error, f"{error} spread", drift, f"{drift} spread"]
    require_columns(table, "forgetting needs", columns)
    known = table[table[drift].notna()]
    ax = axes_or_new(ax, aspect=0.9)
    for k, (_, row) in enumerate(known.iterrows()):
        colour, marker = PALETTE[k % 7], "osD^vP*X"[k // 7 % 8]
        bars = {"xerr": row[f"{error} spread"], "yerr": row[f"{drift} spread"]}
        bars = {name: 0.0 if np.isnan(length) else length for name, length in bars.items()}
        ax.errorbar(row[error], row[drift], fmt=marker, color=colour, markersize=4, linewidth=0.7, label=row["setting"],
                    **bars)  # fmt: skip
    if len(known):
        log_axis(ax, float(known[drift].min()), float(known[drift].max()))
    ax.set(
        xlabel="test force RMSE on the crystal, vector (eV/Å)",
        ylabel="difference from the start model\non molecules (eV/Å)",
    )
    legend_above(ax, 2, columnspacing=1.0, handletextpad=0.3)
    return finish(ax)
