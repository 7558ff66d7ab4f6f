"""Several labelled sets side by side: energies, forces, the landscape of density and energy, coverage of the split."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from tlmc.data.analysis import packings
from tlmc.errors import DataError
from tlmc.plots.data import density_landscape, descriptor_map, energy_histogram, force_histogram
from tlmc.plots.style import COLUMN, styled, subplots

if TYPE_CHECKING:
    from tlmc.data.analysis import DescriptorMap
    from tlmc.data.dataset import Dataset
    from tlmc.data.splits import Split


@styled
def sets_overview(datasets: Sequence[Dataset]) -> Figure:
    """Draw, for each set, its energies by packing, its forces by element, and its landscape by packing.

    Parameters
    ----------
    datasets
        Sets of crystals; isolated molecules are left out. Where a file names no packings
        (`tlmc.data.analysis.packings`), the origin it gives (``info["group"]``) takes their place.

    Raises
    ------
    DataError
        If there is no set, or one holds no crystal.
    """
    if not datasets:
        raise DataError("an overview needs at least one set")
    figure, axes = subplots(len(datasets), 3, width=2.2 * COLUMN, aspect=0.8)
    for row, dataset in zip(axes, datasets, strict=True):
        crystals = dataset.crystals()
        if not len(crystals):
            raise DataError(f"{dataset.name}: none of {len(dataset)} frames is a crystal")
        groups = _groups(crystals)
        energy_histogram(crystals, row[0], groups=groups)
        # the legend of the landscape serves both
        row[0].get_legend().remove()
        row[0].xaxis.set_major_locator(MaxNLocator(nbins=3))
        row[0].set_title(dataset.name.split("/")[-1], loc="left", fontweight="bold")
        force_histogram(crystals, row[1], log=True)
        density_landscape(crystals, row[2], groups=groups)
        row[2].legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=5, handletextpad=0.1)
        row[2].set_ylabel("E/N above lowest (meV/atom)")
    return figure


@styled
def sets_coverage(datasets: Sequence[Dataset], maps: Sequence[DescriptorMap], splits: Sequence[Split]) -> Figure:
    """Draw the map of each set, to see whether its training and test parts cover the same ground.

    Parameters
    ----------
    datasets
        Sets of crystals, without isolated molecules.
    maps, splits
        Of each set: as `tlmc.data.analysis.descriptor_map` returns, fitted on the training part, and the parts. Colours
        are those of the packings in :func:`sets_overview`; the panels' axes have units of their own.

    Raises
    ------
    DataError
        If there is no set, or maps or splits are not as many.
    """
    if not datasets or len({len(datasets), len(maps), len(splits)}) > 1:
        raise DataError(
            f"coverage needs a map and a split for each set: got {len(datasets)} sets, {len(maps)} maps, "
            f"{len(splits)} splits"
        )
    n_columns = min(3, len(datasets))
    figure, axes = subplots(math.ceil(len(datasets) / n_columns), n_columns, width=0.72 * n_columns * COLUMN)
    for ax in axes.flat[len(datasets) :]:
        ax.set_axis_off()
    for ax, dataset, mapped, split in zip(axes.flat, datasets, maps, splits, strict=False):
        descriptor_map(mapped, ax, groups=_groups(dataset), split=split)
        handles, labels = ax.get_legend_handles_labels()
        ax.get_legend().remove()
        first, second = (f"{100 * share:.0f} %" for share in mapped.explained[:2])
        ax.set(xlabel=f"component 1 ({first})", ylabel=f"component 2 ({second})")
        ax.set_title(dataset.name.split("/")[-1], loc="left", fontweight="bold")
    parts = dict(zip(labels, handles, strict=True))
    chosen = [name for name in ("train", "validation", "test") if name in parts]
    axes[0, -1].legend([parts[name] for name in chosen], chosen, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


def _groups(crystals: Dataset) -> list[str]:
    """Return the packing of each frame, or the origin that its file gives."""
    return [
        packing or str(frame.info.get("group", "all"))
        for packing, frame in zip(packings(crystals), crystals.frames, strict=True)
    ]
