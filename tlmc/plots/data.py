"""Figures of labels: energies, forces, densities, outliers, neighbour distances, and the reach of a split."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from ase.data import atomic_numbers, covalent_radii
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from tlmc.data.analysis import DescriptorMap, density, relative_energies
from tlmc.data.analysis import outliers as find_outliers
from tlmc.errors import DataError
from tlmc.evaluation.metrics import frame_force_rms
from tlmc.plots.style import (
    COLUMN,
    ELEMENT_COLOURS,
    PALETTE,
    REFERENCE_LINE,
    axes_or_new,
    colours,
    finish,
    legend_above,
    require_columns,
    styled,
    subplots,
)

if TYPE_CHECKING:
    from tlmc.data.dataset import Dataset
    from tlmc.data.splits import Split


@styled
def energy_histogram(
    dataset: Dataset, ax: Axes | None = None, *, groups: Sequence[object] | NDArray[Any] | None = None, bins: int = 40
) -> Axes:
    """Draw the distribution of energies per atom, stacked by group.

    Parameters
    ----------
    dataset
        Labels.
    ax
        Where to draw.
    groups
        What each frame belongs to, shape ``(n_frames,)``; by default crystals and molecules.
    bins
        Over the range of energies.
    """
    named = _by_group(dataset, groups)
    energies = dataset.energies / np.asarray(dataset.n_atoms)
    ax = axes_or_new(ax)
    ax.hist(
        [energies[chosen] for chosen in named.values()],
        bins,
        stacked=True,
        color=colours(len(named)),
        label=[f"{name} ({chosen.sum()})" for name, chosen in named.items()],
        edgecolor="white",
        linewidth=0.3,
    )
    ax.set(xlabel="E/N (eV/atom)", ylabel="frames")
    ax.xaxis.set_major_locator(MaxNLocator(nbins=5))
    ax.yaxis.set_major_locator(MaxNLocator(nbins=6, integer=True, steps=[1, 2, 5, 10]))
    ax.legend()
    return finish(ax)


@styled
def force_histogram(dataset: Dataset, ax: Axes | None = None, *, bins: int = 60, log: bool = False) -> Axes:
    """Draw the distribution of the lengths of forces, stacked by element.

    Parameters
    ----------
    dataset
        Labels.
    ax
        Where to draw.
    bins
        From zero to the largest force.
    log
        Counts on a log scale, which shows the tail; the heights of stacked parts then cannot be compared.
    """
    symbols = np.concatenate([frame.get_chemical_symbols() for frame in dataset.frames])
    lengths = np.linalg.norm(np.concatenate(dataset.forces), axis=1)
    elements = sorted(set(symbols.tolist()))
    ax = axes_or_new(ax)
    ax.hist(
        [lengths[symbols == element] for element in elements],
        np.linspace(0, lengths.max() or 1.0, bins + 1).tolist(),
        stacked=True,
        log=log,
        color=[ELEMENT_COLOURS.get(element, "#8C6D31") for element in elements],
        label=elements,
    )
    ax.set(xlabel="|F| (eV/Å)", ylabel="atoms", xlim=(0, None))
    ax.legend(reverse=True)
    return finish(ax)


@styled
def density_landscape(
    dataset: Dataset, ax: Axes | None = None, *, groups: Sequence[object] | NDArray[Any] | None = None
) -> Axes:
    """Draw the energy per atom above the lowest one against the density of the crystals; molecules are left out.

    Parameters
    ----------
    dataset
        Labels.
    ax
        Where to draw.
    groups
        What each frame belongs to, shape ``(n_frames,)``, told apart by colour; by default all are alike.

    Raises
    ------
    DataError
        If there is no crystal.
    """
    crystal = np.asarray(dataset.is_crystal)
    if not crystal.any():
        raise DataError(f"{dataset.name}: none of {len(dataset)} frames is a crystal, so there is no density")
    densities = np.array(
        [density(frame) if chosen else np.nan for frame, chosen in zip(dataset.frames, crystal, strict=True)]
    )
    energies = 1000 * dataset.energies / np.asarray(dataset.n_atoms)
    energies = energies - energies[crystal].min()
    named = {"": crystal} if groups is None else _by_group(dataset, groups)
    ax = axes_or_new(ax)
    for colour, (name, chosen) in zip(colours(len(named)), named.items(), strict=True):
        part = chosen & crystal
        if not part.any():
            continue
        ax.scatter(densities[part], energies[part], s=9, color=colour, alpha=0.7, linewidth=0, label=name)
    ax.set(xlabel="density (g/cm³)", ylabel="E/N above the lowest (meV/atom)")
    ax.xaxis.set_major_locator(MaxNLocator(nbins=5))
    if len(named) > 4:
        _legend_beside(ax)
    elif groups is not None:
        ax.legend()
    return finish(ax)


@styled
def outliers(
    data: Dataset | pd.DataFrame, ax: Axes | None = None, *, column: str = "force_rms", n_sd: float = 5.0
) -> Axes:
    """Draw a force of each frame against its number and name those beyond the mean plus some standard deviations.

    Parameters
    ----------
    data
        Labels, of which the RMS force of each frame is drawn, or a table with the columns ``frame`` and ``column``,
        such as :func:`tlmc.evaluation.per_frame` returns.
    ax
        Where to draw.
    column
        Of the table: ``force_rms``, ``force_rmse_vector`` or ``force_max_error``, eV/Angstrom.
    n_sd
        Standard deviations above the mean (the thesis: 5).

    Raises
    ------
    DataError
        If the table is empty or lacks a column.
    """
    if not isinstance(data, pd.DataFrame):
        data = pd.DataFrame({"frame": data.frame_numbers, "force_rms": frame_force_rms(data)})
    require_columns(data, "outliers need", ["frame", column])
    frames, values = data["frame"].to_numpy(), data[column].to_numpy(dtype=np.float64)
    ax = axes_or_new(ax)
    beyond = _mark_beyond(ax, frames, values, n_sd, s=6)
    _name_frames(ax, frames[beyond], values[beyond])
    titles = {
        "force_rms": "RMS force",
        "force_rmse_vector": "force RMSE, vector",
        "force_max_error": "largest force error",
    }
    ax.set(ylabel=f"{titles.get(column, column)} (eV/Å)")
    return finish(ax)


@styled
def force_outliers(dataset: Dataset, ax: Axes | None = None, *, n_sd: float = 5.0, n_named: int = 8) -> Axes:
    """Draw the length of every force against the number of its frame, those of `tlmc.data.analysis.outliers` marked.

    Parameters
    ----------
    dataset
        Labels.
    ax
        Where to draw.
    n_sd
        Standard deviations above the mean of all forces (the thesis: 5).
    n_named
        Frames that are named at most, the largest forces first.
    """
    lengths = np.linalg.norm(np.concatenate(dataset.forces), axis=1)
    frames = np.repeat(dataset.frame_numbers, dataset.n_atoms)
    ax = axes_or_new(ax)
    _mark_beyond(ax, frames, lengths, n_sd, s=1.5, alpha=0.5, rasterized=True)
    table = find_outliers(dataset, n_sd)
    largest = table[table["quantity"] == "force"].drop_duplicates("frame").head(n_named)
    _name_frames(ax, largest["frame"], largest["value"])
    ax.set(ylabel="|F| (eV/Å)")
    return finish(ax)


@styled
def neighbour_distances(table: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Draw how near the atoms of each pair of elements come, beside the length of a single bond between them.

    Parameters
    ----------
    table
        As :func:`tlmc.data.analysis.nearest_neighbours` returns.
    ax
        Where to draw; by default a figure whose height grows with the number of pairs.

    Raises
    ------
    DataError
        If there is no pair, or a column is missing.
    """
    columns = ["element", "neighbour", "shortest", "frame", "mean", "sd"]
    require_columns(table, "neighbour distances need", columns)
    place = np.arange(len(table))
    mean, shortest = table["mean"].to_numpy(dtype=np.float64), table["shortest"].to_numpy(dtype=np.float64)
    radius = {symbol: covalent_radii[atomic_numbers[symbol]] for symbol in {*table["element"], *table["neighbour"]}}
    bond = [radius[first] + radius[second] for first, second in zip(table["element"], table["neighbour"], strict=True)]
    ax = axes_or_new(ax, aspect=0.3 + 0.055 * len(table))
    ax.plot(bond, place, "|", color="0.5", markersize=9, label="sum of covalent radii")
    ax.hlines(place, shortest, mean, color="0.8", linewidth=0.8, zorder=0)
    ax.errorbar(mean, place, xerr=table["sd"], fmt="o", markersize=3, color=PALETTE[0], label="mean ± sd")
    ax.plot(shortest, place, "D", markersize=3, color=PALETTE[1], label="shortest")
    ax.set_yticks(place, [f"{a} to {b}" for a, b in zip(table["element"], table["neighbour"], strict=True)])
    ax.set(xlabel="distance to the nearest such neighbour (Å)", ylabel="atom to neighbour", xlim=(0, None))
    ax.set_ylim(len(table) - 0.5, -0.5)
    legend_above(ax, 3, left=-0.1, columnspacing=1, handletextpad=0.3)
    return finish(ax)


@styled
def split_coverage(dataset: Dataset, split: Split) -> Figure:
    """Draw whether the parts of a split cover the same energies (left) and forces (right).

    The right panel shows the share of atoms with a larger force, on a log scale: where the curve of the test part ends
    further right than that of the training part, the model is asked about forces it has not seen.

    Parameters
    ----------
    dataset
        All frames.
    split
        Their parts.
    """
    parts = {name: getattr(split, name) for name in ("train", "validation", "test")}
    energies = 1000 * relative_energies(dataset)
    # a fixed seed: points are spread so that they do not cover one another, and stay where they are
    spread = np.random.default_rng(0).uniform(-0.3, 0.3, len(dataset))
    figure, axes = subplots(1, 2, width=2 * COLUMN)
    left, right = axes[0]
    for place, (colour, (name, chosen)) in enumerate(zip(PALETTE, parts.items(), strict=False)):
        left.scatter(energies[chosen], place + spread[chosen], s=7, color=colour, alpha=0.7, linewidth=0)
        lengths = np.sort(np.linalg.norm(np.concatenate([dataset.forces[k] for k in chosen]), axis=1))
        right.step(lengths, 1 - np.arange(len(lengths)) / len(lengths), where="pre", color=colour, label=name)
        right.plot(lengths[-1], 1 / len(lengths), "o", markersize=3, color=colour)
    left.set_yticks(range(len(parts)), [f"{name}\n({len(chosen)})" for name, chosen in parts.items()])
    left.set_ylim(len(parts) - 0.5, -0.5)
    left.set(xlabel="E/N above the lowest (meV/atom)")
    right.set_yscale("log")
    right.set(xlabel="|F| (eV/Å)", ylabel="share of atoms with a larger |F|", xlim=(0, None))
    right.legend()
    for ax in (left, right):
        finish(ax)
    return figure


_MARKERS = {"train": "o", "validation": "s", "test": "X"}


@styled
def descriptor_map(
    mapped: DescriptorMap,
    ax: Axes | None = None,
    *,
    groups: Sequence[object] | NDArray[Any] | None = None,
    split: Split | None = None,
) -> Axes:
    """Draw the first two principal components of the frames' descriptors.

    Parameters
    ----------
    mapped
        As :func:`tlmc.data.analysis.descriptor_map` returns, of at least two components.
    ax
        Where to draw.
    groups
        What each frame belongs to, shape ``(n_frames,)``, told apart by colour.
    split
        Its parts are told apart by marker, the test part on top.
    """
    n_frames = len(mapped.scores)
    labels = np.array([""] * n_frames if groups is None else [str(group) for group in groups])
    names = sorted(set(labels.tolist()), key=lambda name: (len(name), name))
    parts = {"": np.arange(n_frames)} if split is None else {name: getattr(split, name) for name in _MARKERS}
    ax = axes_or_new(ax, aspect=0.9)
    for colour, name in zip(colours(len(names)), names, strict=True):
        for part, chosen in parts.items():
            points = mapped.scores[chosen[labels[chosen] == name]]
            test = part == "test"
            ax.scatter(
                points[:, 0],
                points[:, 1],
                s=26 if test else 11,
                marker=_MARKERS.get(part, "o"),
                color=colour,
                alpha=0.9 if test else 0.55,
                linewidth=0.5 if test else 0,
                edgecolor="black" if test else None,
                zorder=3 if test else 2,
            )
    # the legend's own points: one per group and one per part
    entries = [(name, colour, "o") for name, colour in zip(names, colours(len(names)), strict=True) if name]
    entries += [(part, "0.4", _MARKERS[part]) for part in parts if part]
    handles = [ax.scatter([], [], s=16, color=colour, marker=mark, label=name) for name, colour, mark in entries]
    first, second = (100 * share for share in mapped.explained[:2])
    ax.set(xlabel=f"component 1 ({first:.0f} % of the variance)", ylabel=f"component 2 ({second:.0f} %)")
    ax.xaxis.set_major_locator(MaxNLocator(nbins=5))
    if handles:
        _legend_beside(ax, handles=handles)
    return finish(ax)


def _legend_beside(ax: Axes, **entries: Any) -> None:
    """Put a legend of many entries to the right of the axes, where it hides no point."""
    ax.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=6, **entries)


def _by_group(dataset: Dataset, groups: Sequence[object] | NDArray[Any] | None) -> dict[str, NDArray[np.bool_]]:
    """Return what frames belong to each group, by name."""
    if groups is None:
        crystal = np.asarray(dataset.is_crystal)
        named = {"crystals": crystal, "molecules": ~crystal}
        return {name: chosen for name, chosen in named.items() if chosen.any()}
    labels = np.array([str(group) for group in groups])
    if labels.shape != (len(dataset),):
        raise DataError(f"{dataset.name}: {len(dataset)} frames, but groups for {len(labels)}")
    # in the order of appearance of numbers as numbers: "10" after "9"
    return {name: labels == name for name in sorted(set(labels.tolist()), key=lambda name: (len(name), name))}


def _mark_beyond(
    ax: Axes, frames: NDArray[np.int64], values: NDArray[np.float64], n_sd: float, **points: Any
) -> NDArray[np.bool_]:
    """Draw values against frames, those beyond the mean plus ``n_sd`` standard deviations as diamonds; return which."""
    bound = values.mean() + n_sd * values.std()
    beyond: NDArray[np.bool_] = values > bound
    ax.scatter(frames[~beyond], values[~beyond], color=PALETTE[0], linewidth=0, **points)
    ax.scatter(frames[beyond], values[beyond], s=12, color=PALETTE[1], marker="D", linewidth=0)
    ax.axhline(values.mean(), **REFERENCE_LINE | {"linestyle": ":"}, label="mean")
    ax.axhline(bound, **REFERENCE_LINE, label=f"mean + {n_sd:g} sd")
    ax.set(xlabel="frame", ylim=(0, 1.1 * max(bound, values.max()) or 1.0))
    legend_above(ax, 2)
    return beyond


def _name_frames(ax: Axes, frames: Iterable[int], values: Iterable[float]) -> None:
    for frame, value in zip(frames, values, strict=True):
        ax.annotate(str(frame), (frame, value), xytext=(3, 2), textcoords="offset points", fontsize=6)
