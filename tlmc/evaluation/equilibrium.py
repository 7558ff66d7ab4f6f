"""Errors of frames against their distance from equilibrium: how far up, how compressed, how strongly pulled."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from tlmc.data.geometry import frame_hash
from tlmc.errors import DataError
from tlmc.evaluation.metrics import per_frame

if TYPE_CHECKING:
    from tlmc.data.dataset import Dataset
    from tlmc.potentials.model import Predictions


def error_against_equilibrium(
    dataset: Dataset, predictions: Predictions, among: Dataset, groups: Sequence[str] | None = None
) -> pd.DataFrame:
    """Return the errors of each frame with its distance from the nearest thing to an equilibrium that is labelled.

    Equilibrium is the frame of lowest energy per atom of the same packing, or of all if none are named. Its label only
    says where a frame lies; nothing is fitted to it.

    Parameters
    ----------
    dataset
        Labels of crystals of one composition, the test part as a rule.
    predictions
        For its frames.
    among
        All frames, of which equilibrium is one.
    groups
        Packing of each frame of ``among``.

    Returns
    -------
    DataFrame
        That of :func:`tlmc.evaluation.per_frame`, with ``energy_above_lowest`` (eV/atom) and ``volume_strain``
        (volume per atom over that of equilibrium, minus one).

    Raises
    ------
    DataError
        If a frame is no crystal, is not among the others (the same structure under the same number), or of another
        composition than they, or the groups are not as many.
    """
    if not (dataset.is_crystal.all() and among.is_crystal.all()):
        raise DataError(f"{dataset.name}: distances from equilibrium are defined for crystals only")
    names = [""] * len(among) if groups is None else list(groups)
    if len(names) != len(among):
        raise DataError(f"{among.name}: {len(among)} frames need as many groups, got {len(names)}")
    contents = [frame.symbols.formula.reduce()[0].format("hill") for frame in among.frames]
    other = next((k for k, content in enumerate(contents) if content != contents[0]), None)
    if other is not None:
        raise DataError(
            f"{among.name}: frame {among.frame_numbers[other]} is {contents[other]}, the first one {contents[0]}: "
            "energies per atom of different compositions cannot be compared"
        )
    energy = among.energies / among.n_atoms
    volume = np.array([frame.get_volume() for frame in among.frames]) / among.n_atoms
    lowest: dict[str, int] = {}
    for k, name in enumerate(names):
        if name not in lowest or energy[k] < energy[lowest[name]]:
            lowest[name] = k
    place = {number: k for k, number in enumerate(among.frame_numbers.tolist())}
    missing = [number for number in dataset.frame_numbers.tolist() if number not in place]
    if missing:
        raise DataError(f"{dataset.name}: frame {missing[0]} is not among the {len(among)} frames to compare with")
    chosen = np.array([place[number] for number in dataset.frame_numbers.tolist()])
    for frame, number, k in zip(dataset.frames, dataset.frame_numbers, chosen, strict=True):
        if frame_hash(frame) != frame_hash(among.frames[k]):
            raise DataError(f"{dataset.name}: frame {number} is not frame {number} of {among.name}")
    zero = np.array([lowest[names[k]] for k in chosen])
    return per_frame(dataset, predictions).assign(
        energy_above_lowest=energy[chosen] - energy[zero], volume_strain=volume[chosen] / volume[zero] - 1.0
    )
