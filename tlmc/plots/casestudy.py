"""Figures of several crystals: parity side by side, rankings of packings, one model for all, errors off equilibrium."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Final

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from tlmc.errors import DataError
from tlmc.evaluation.ranking import LABELS
from tlmc.plots.errors import parity
from tlmc.plots.style import (
    COLUMN,
    PALETTE,
    axes_or_new,
    colours,
    finish,
    legend_above,
    log_ticks,
    require_columns,
    styled,
    subplots,
)

if TYPE_CHECKING:
    from tlmc.data.dataset import Dataset
    from tlmc.potentials.model import Predictions

_DISTANCES: Final = {
    "energy_above_lowest": ("energy above lowest (meV/atom)", 1000.0),
    "volume_strain": ("volume against lowest (%)", 100.0),
    "force_rms": ("RMS of labelled |F| (eV/Å)", 1.0),
}
_SHARED: Final = {
    "force_rmse_vector": ("force RMSE, vector (eV/Å)", 1.0),
    "energy_rmse_per_atom": ("energy RMSE (meV/atom)", 1000.0),
}


@styled
def parity_gallery(crystals: Mapping[str, tuple[Dataset, Predictions, Predictions]]) -> Figure:
    """Draw parity of |F| and of E/N before and after fine-tuning, a row per crystal (thesis, figures 4.6 to 4.10).

    Parameters
    ----------
    crystals
        By name: labels (the test part), predictions before, predictions after. The mean error per atom is taken from
        the energies before.

    Raises
    ------
    DataError
        If there is no crystal.
    """
    if not crystals:
        raise DataError("a gallery of parity plots needs at least one crystal")
    figure, axes = subplots(len(crystals), 4, width=2.6 * COLUMN, aspect=1.0)
    for row, (name, (dataset, before, after)) in zip(axes, crystals.items(), strict=True):
        force, n_atoms = np.concatenate(dataset.forces), np.asarray(dataset.n_atoms)
        energy = dataset.energies / n_atoms
        for k, side in enumerate((before, after)):
            predicted = np.asarray(side.energies) / n_atoms
            if k == 0:
                predicted = predicted - (predicted - energy).mean()
            parity(force, np.concatenate(side.forces), row[k], colorbar=False)
            parity(energy, predicted, row[k + 2], quantity="energy", colorbar=False)
        # a pair of panels shares its axes, so that the eye compares
        for pair in (row[:2], row[2:]):
            lower = min(ax.get_xlim()[0] for ax in pair)
            upper = max(ax.get_xlim()[1] for ax in pair)
            for ax in pair:
                ax.lines[0].set_data([lower, upper], [lower, upper])
                ax.set(xlim=(lower, upper), ylim=(lower, upper), xlabel="", ylabel="")
                for axis in (ax.xaxis, ax.yaxis):
                    axis.set_major_locator(MaxNLocator(nbins=3, steps=[1, 2, 5, 10]))
        row[0].set_ylabel(name, fontweight="bold")
    for ax, title in zip(axes[0], ("|F| before", "|F| after", "E/N before", "E/N after"), strict=True):
        ax.set_title(title)
    units = ("eV/Å", "eV/Å", "eV/atom, offset removed", "eV/atom")
    for ax, unit in zip(axes[-1], units, strict=True):
        ax.set_xlabel(f"label ({unit})")
    return figure


@styled
def ranking(energies: pd.DataFrame, ax: Axes | None = None, *, among: Sequence[str] | None = None) -> Axes:
    """Draw packings as levels, a column per model; lines join a packing's levels, and cross where the order changes.

    Parameters
    ----------
    energies
        As :func:`tlmc.evaluation.packing_energies` returns; each column's mean is taken away.
    ax
        Where to draw.
    among
        All packings that have a colour, of which the table may lack some, so that two panels agree.

    Raises
    ------
    DataError
        If the table is empty or lacks a column.
    """
    models = [column for column in energies.columns if column not in ("n_frames", LABELS)]
    columns = [*models[:1], LABELS, *models[1:]]
    require_columns(energies, "a ranking needs", [*columns, LABELS])
    ax = axes_or_new(ax, aspect=0.85)
    named = list(energies.index) if among is None else list(among)
    shades = dict(zip(named, colours(len(named)), strict=True))
    for packing, row in (energies[columns] - energies[columns].mean()).iterrows():
        shade = shades.get(packing, "0.6")
        levels = 1000 * row.to_numpy(dtype=np.float64)
        for k, level in enumerate(levels):
            ax.plot([k - 0.25, k + 0.25], [level, level], color=shade, linewidth=1.6, label=packing if k == 0 else None)
        for k in range(len(levels) - 1):
            ax.plot([k + 0.25, k + 0.75], levels[k : k + 2], color=shade, linewidth=0.6)
    ax.set_xticks(range(len(columns)), columns)
    ax.set(ylabel="energy less the mean (meV/molecule)")
    if len(named) <= len(PALETTE):
        ax.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    return finish(ax)


@styled
def error_against_equilibrium(tables: Mapping[str, pd.DataFrame]) -> Figure:
    """Draw the errors of frames against three distances from equilibrium: energy, volume, forces.

    Points are frames; the lines join the root mean squares of a few groups with equally many frames.

    Parameters
    ----------
    tables
        By name (before, after), tables of :func:`tlmc.evaluation.error_against_equilibrium`.

    Raises
    ------
    DataError
        If there is no table, or one is empty or lacks a column.
    """
    if not tables:
        raise DataError("errors against equilibrium need at least one table, got none")
    figure, axes = subplots(2, 3, width=2.2 * COLUMN, aspect=0.85)
    errors = {"force_rmse_vector": "force error (eV/Å)", "energy_error_per_atom": "energy error (meV/atom)"}
    for row, (error, label) in zip(axes, errors.items(), strict=True):
        drawn = []
        for colour, (name, table) in zip(colours(len(tables)), tables.items(), strict=True):
            require_columns(table, f"{name}: errors against equilibrium need", [*_DISTANCES, *errors])
            size = table[error].abs().to_numpy() * (1000.0 if error == "energy_error_per_atom" else 1.0)
            drawn.append(size)
            for ax, (distance, (_, factor)) in zip(row, _DISTANCES.items(), strict=True):
                x = factor * table[distance].to_numpy()
                ax.scatter(x, size, s=6, color=colour, alpha=0.4, linewidth=0)
                groups = np.array_split(np.argsort(x), max(1, min(6, len(x) // 4)))
                centres = [x[group].mean() for group in groups]
                ax.plot(centres, [np.sqrt((size[group] ** 2).mean()) for group in groups], color=colour, label=name)
        positive = np.concatenate(drawn)
        positive = positive[positive > 0]
        for ax in row:
            ax.set_yscale("log")
            # a frame that happens to be right would stretch the axis
            lower = max(float(positive.min(initial=1.0)), float(positive.max(initial=1.0)) / 1000)
            ax.set_ylim(lower / 1.3, 1.3 * float(positive.max(initial=1.0)))
            log_ticks(ax.yaxis, float(positive.max(initial=1.0)) / lower)
            finish(ax)
        row[0].set_ylabel(label)
    for ax, (label, _) in zip(axes[-1], _DISTANCES.values(), strict=True):
        ax.set_xlabel(label)
    legend_above(axes[0, 0], 2)
    return figure


@styled
def shared_models(table: pd.DataFrame) -> Figure:
    """Draw the errors of models of one crystal, of all, and of the others, a group of bars per crystal.

    Parameters
    ----------
    table
        As :meth:`tlmc.thesis.casestudy.CaseStudy.shared` returns; seeds are averaged, their range is drawn as a line.

    Raises
    ------
    DataError
        If the table is empty or lacks a column.
    """
    require_columns(table, "a comparison of models needs", ["crystal", "model", *_SHARED])
    crystals, models = list(dict.fromkeys(table["crystal"])), list(dict.fromkeys(table["model"]))
    figure, axes = subplots(2, 1, width=1.6 * COLUMN, aspect=0.45)
    width = 0.8 / len(models)
    for ax, (quantity, (label, factor)) in zip(axes[:, 0], _SHARED.items(), strict=True):
        for k, (colour, model) in enumerate(zip(colours(len(models)), models, strict=True)):
            values = factor * table[table["model"] == model].set_index("crystal")[quantity]
            present = [crystal for crystal in crystals if crystal in values.index]
            places = [crystals.index(crystal) + (k - (len(models) - 1) / 2) * width for crystal in present]
            groups = [np.atleast_1d(values.loc[crystal]) for crystal in present]
            ax.bar(places, [group.mean() for group in groups], width, color=colour, label=model)
            ax.vlines(places, [g.min() for g in groups], [g.max() for g in groups], color="0.2", linewidth=0.8)
        ax.set_yscale("log")
        values = factor * table[quantity]
        log_ticks(ax.yaxis, float(values.max() / values.min()))
        ax.set_ylim(0.7 * float(values.min()), 1.4 * float(values.max()))
        ax.set_xticks(range(len(crystals)), crystals)
        ax.set_ylabel(label)
        finish(ax)
    legend_above(axes[0, 0], 2)
    return figure


@styled
def energy_errors(table: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Draw energy errors per atom of several potentials as bars, coloured by where the number comes from.

    Parameters
    ----------
    table
        As :func:`tlmc.thesis.casestudy.against_literature` returns.
    ax
        Where to draw.

    Raises
    ------
    DataError
        If the table is empty or lacks a column.
    """
    require_columns(table, "energy errors need", ["E (meV/atom)", "source"])
    ax = axes_or_new(ax, aspect=max(0.5, 0.07 * len(table)))
    for colour, (source, rows) in zip(PALETTE, table.groupby("source", sort=False), strict=False):
        places = np.flatnonzero(table.index.isin(rows.index))
        bars = ax.barh(places, rows["E (meV/atom)"], color=colour, label=source)
        ax.bar_label(bars, fmt="%.2f", fontsize=6, padding=2)
    ax.set_yticks(range(len(table)), list(table.index))
    ax.invert_yaxis()
    ax.margins(x=0.12)
    ax.set_xlabel("energy RMSE (meV/atom)")
    ax.legend(loc="lower right")
    return finish(ax)
