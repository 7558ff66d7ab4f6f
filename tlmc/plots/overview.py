"""Several labelled sets side by side, a row each: energies, forces, and the landscape of density and energy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from tlmc.analysis import packings
from tlmc.errors import DataError
from tlmc.plots.data import density_landscape, energy_histogram, force_histogram
from tlmc.plots.style import COLUMN, styled, subplots

if TYPE_CHECKING:
    from tlmc.labelled import Dataset


@styled
def sets_overview(datasets: Sequence[Dataset]) -> Figure:
    """Draw, for each set, its energies by packing, its forces by element, and its landscape by packing.

    Parameters
    ----------
    datasets
        Sets of crystals; isolated molecules are left out. Where a file names no packings (`tlmc.analysis.packings`),
        the origin it gives (``info["group"]``) takes their place.

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
        groups = [
            packing or str(frame.info.get("group", "all"))
            for packing, frame in zip(packings(crystals), crystals.frames, strict=True)
        ]
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
