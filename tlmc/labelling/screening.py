"""Leave out frames that are not worth a label: broken or overlapping molecules, and copies."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from ase import Atoms
from ase.data import covalent_radii
from ase.data.vdw_alvarez import vdw_radii
from ase.neighborlist import neighbor_list

from tlmc.errors import DataError
from tlmc.labelling.molecules import find_bonds, find_molecules, make_whole

logger = logging.getLogger(__name__)


class Rejection(NamedTuple):
    """A frame left out: its place in the list and why."""

    frame: int
    reason: str


class Screened(NamedTuple):
    """Frames worth a label, and the others."""

    frames: list[Atoms]
    rejected: list[Rejection]


def screen(
    frames: Sequence[Atoms],
    reference: Atoms,
    bond_factor: float = 1.25,
    contact_factor: float = 0.5,
    duplicate_tolerance: float = 1e-3,
) -> Screened:
    """Leave out frames with broken or fused molecules, overlapping atoms, and duplicates.

    Parameters
    ----------
    frames
        Same atoms in the same order as the reference.
    reference
        Structure whose bonds every frame must have, no more and no fewer.
    bond_factor
        Atoms closer than this times the sum of covalent radii are bonded.
    contact_factor
        Atoms of different molecules closer than this times the sum of van der Waals radii overlap; so do any two
        closer than 0.65 times the sum of covalent radii.
    duplicate_tolerance
        See `tlmc.data.geometry.duplicate_groups`, Angstrom.
    """
    from tlmc.data.geometry import duplicate_groups

    bonded = Counter(find_bonds(reference, bond_factor).pairs())
    copy_of = duplicate_groups(frames, duplicate_tolerance)
    kept, rejected = [], []
    for index, frame in enumerate(frames):
        reason = _broken(frame, bonded, bond_factor) or _overlap(frame, bond_factor, contact_factor)
        if not reason and copy_of[index] != index:
            reason = f"duplicate of frame {copy_of[index]}"
        if reason:
            rejected.append(Rejection(index, reason))
            logger.info("frame %d left out: %s", index, reason)
        else:
            kept.append(frame)
    return Screened(kept, rejected)


def _broken(frame: Atoms, bonded: Counter[tuple[int, int]], factor: float) -> str:
    bonds = Counter(find_bonds(frame, factor).pairs())
    changed = {"formed": bonds - bonded, "broken": bonded - bonds}
    for what, pairs in changed.items():
        for i, j in pairs:
            return f"bond {what} between {frame.symbols[i]}{i} and {frame.symbols[j]}{j}"
    return ""


def _overlap(frame: Atoms, bond_factor: float, contact_factor: float) -> str:
    bonds = find_bonds(frame, bond_factor)
    try:
        whole = make_whole(frame, bonds)
    except DataError as error:
        return str(error)
    molecule_of = np.empty(len(frame), dtype=int)
    for k, members in enumerate(find_molecules(whole, bonds)):
        molecule_of[members] = k
    # elements without a tabulated van der Waals radius are held to the covalent limit alone
    vdw = np.nan_to_num(vdw_radii[whole.numbers])
    first, second, distances, shift = neighbor_list("ijdS", whole, 2 * contact_factor * max(vdw.max(), 1.0))
    apart = (molecule_of[first] != molecule_of[second]) | shift.any(axis=1)
    limits = 0.65 * (covalent_radii[whole.numbers][first] + covalent_radii[whole.numbers][second])
    limits = np.where(apart, np.maximum(limits, contact_factor * (vdw[first] + vdw[second])), limits)
    short = distances < limits
    if not short.any():
        return ""
    k = int(np.argmin(np.where(short, distances / limits, np.inf)))
    names = [f"{whole.symbols[atom]}{atom}" for atom in (int(first[k]), int(second[k]))]
    return f"{names[0]} and {names[1]} overlap at {distances[k]:.3f} A, limit {limits[k]:.3f} A"
