"""The molecules of a crystal: bonds, molecules in one piece, molecules alone in a box."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from ase import Atoms
from ase.data import covalent_radii
from ase.formula import Formula
from ase.neighborlist import neighbor_list
from numpy.typing import NDArray
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import breadth_first_order, connected_components

from tlmc.equality import equal_by_content
from tlmc.errors import DataError
from tlmc.labelling.frames import template
from tlmc.labelling.states import state_of, without_state

IntArray = NDArray[np.int64]

_JUDGED = 25
"""Frames from which a formula unit is read."""


@equal_by_content
class Bonds(NamedTuple):
    """Covalent bonds, each once; atom ``second`` is meant in the periodic image ``shift``."""

    first: IntArray
    second: IntArray
    shift: IntArray
    """Shape ``(n_bonds, 3)``."""

    def pairs(self) -> list[tuple[int, int]]:
        """Return the bonded pairs, sorted, whatever image they are in."""
        ordered = np.sort(np.column_stack([self.first, self.second]), axis=1)
        return sorted(map(tuple, ordered.tolist()))


def find_bonds(frame: Atoms, factor: float = 1.25) -> Bonds:
    """Return the pairs closer than ``factor`` times the sum of their covalent radii."""
    first, second, shift = neighbor_list("ijS", frame, factor * covalent_radii[frame.numbers])
    half = (first < second) | ((first == second) & (shift @ (10**8, 10**4, 1) > 0))
    return Bonds(first[half], second[half], shift[half])


def find_molecules(frame: Atoms, bonds: Bonds | None = None) -> list[IntArray]:
    """Return the atom indices of every molecule, the connected parts of the bond graph."""
    bonds = find_bonds(frame) if bonds is None else bonds
    graph = coo_matrix((np.ones(len(bonds.first)), (bonds.first, bonds.second)), shape=(len(frame), len(frame)))
    count, labels = connected_components(graph, directed=False)
    return [np.flatnonzero(labels == molecule) for molecule in range(count)]


def formula_unit(frames: Sequence[Atoms]) -> int:
    """Return the number of atoms of the formula unit of a crystal: its molecule, or what neutral sum repeats.

    The molecules of each frame are counted by formula and divided by their greatest common divisor, and the most
    frequent answer is taken: in a strongly compressed cell a short contact may look like a bond.

    Parameters
    ----------
    frames
        Of one crystal, at least one. For a salt with two cations and two anions in the cell, the unit is one of each.

    Raises
    ------
    DataError
        If there is no frame, or the unit does not divide a frame into whole numbers.
    """
    found: Counter[tuple[tuple[str, int], ...]] = Counter()
    for frame in frames[:: math.ceil(len(frames) / _JUDGED) or 1]:
        molecules = Counter(frame.symbols[members].formula.format("hill") for members in find_molecules(frame))
        divisor = math.gcd(*molecules.values())
        found[tuple(sorted((formula, count // divisor) for formula, count in molecules.items()))] += 1
    if not found:
        raise DataError("a formula unit needs at least one frame, got none")
    [(unit, _)] = found.most_common(1)
    size = sum(count * len(Formula(formula)) for formula, count in unit)
    for k, frame in enumerate(frames):
        if len(frame) % size:
            raise DataError(
                f"frame {k} of {len(frames)} ({frame.get_chemical_formula()}) is no whole number of formula units "
                f"{' + '.join(f'{count} {formula}' for formula, count in unit)}"
            )
    return size


def make_whole(frame: Atoms, bonds: Bonds | None = None) -> Atoms:
    """Return a copy whose molecules are not cut by the cell's faces, their centres inside the cell.

    Raises
    ------
    DataError
        If a bonded network runs through the whole crystal, so that it has no molecules.
    """
    bonds = find_bonds(frame) if bonds is None else bonds
    whole: Atoms = frame.copy()
    steps = {}
    for i, j, shift in zip(bonds.first.tolist(), bonds.second.tolist(), bonds.shift, strict=True):
        steps[i, j], steps[j, i] = shift, -shift
    pairs = np.array(list(steps) or np.empty((0, 2)), dtype=int)
    graph = coo_matrix((np.ones(len(pairs)), (pairs[:, 0], pairs[:, 1])), shape=(len(frame), len(frame))).tocsr()
    images = np.zeros((len(frame), 3), dtype=int)
    for molecule in find_molecules(frame, bonds):
        order, parents = breadth_first_order(graph, molecule[0])
        for atom in order[1:]:
            images[atom] = images[parents[atom]] + steps[int(parents[atom]), int(atom)]
        centre = (frame.positions[molecule] + images[molecule] @ frame.cell.array).mean(axis=0)
        if frame.pbc.any():
            images[molecule] -= (np.floor(frame.cell.scaled_positions(centre) + 1e-9) * frame.pbc).astype(int)
    gaps = images[bonds.first] - images[bonds.second] + bonds.shift
    if gaps.any():
        k = int(np.flatnonzero(gaps.any(axis=1))[0])
        raise DataError(
            f"atoms {bonds.first[k]} and {bonds.second[k]} of {frame.get_chemical_formula()} close a bonded network "
            "through the periodic cell: a molecular crystal is expected"
        )
    whole.positions += images @ frame.cell.array
    return whole


def isolated_molecules(crystal: Atoms, vacuum: float = 8.0, together: bool = False) -> list[Atoms]:
    """Return the first molecule of each formula in a crystal, alone in a periodic cubic box.

    Charges and moments of atoms stay with them. A charge or spin that ``info`` states is that of the whole crystal.

    Parameters
    ----------
    vacuum
        Distance kept from the molecule to every face of the box, Angstrom.
    together
        Return one cluster of all formulas instead, each molecule in the place nearest to the first: the ions of a salt.

    Raises
    ------
    DataError
        If the crystal is no molecular one, or its ``info`` states a charge or unpaired electrons, and its atoms do not
        say which molecule has them.
    """
    whole = template(make_whole(crystal))
    whole.set_constraint()
    of_formula: dict[str, list[Atoms]] = {}
    for members in find_molecules(whole):
        molecule = part(whole, members)
        molecule.set_cell(None)
        molecule.pbc = False
        of_formula.setdefault(molecule.get_chemical_formula(), []).append(molecule)
    chosen = [molecules[0] for molecules in of_formula.values()]
    if together:
        cluster = chosen[0]
        for molecules in list(of_formula.values())[1:]:
            cluster = cluster + _nearest(molecules, chosen[0], whole)
        chosen = [cluster]
    for molecule in chosen:
        edge = float(np.ptp(molecule.positions, axis=0).max()) + 2 * vacuum
        molecule.set_cell([edge] * 3)
        molecule.center()
        molecule.pbc = True
    return chosen


def part(frame: Atoms, members: IntArray) -> Atoms:
    """Return some atoms of a frame as a frame, with what is said of them and not what is said of all.

    Raises
    ------
    DataError
        If ``info`` states a charge or unpaired electrons that the atoms do not say the place of.
    """
    atoms: Atoms = frame[members]
    if len(members) < len(frame):
        state = state_of(frame, frame.get_chemical_formula())
        lost = (state.charge and not frame.has("initial_charges")) or (
            state.unpaired and not frame.has("initial_magmoms")
        )
        if lost:
            raise DataError(
                f"{frame.get_chemical_formula()} has {state.words()}, but its atoms do not say which molecule: give "
                "them initial charges and initial magnetic moments"
            )
        atoms.info = without_state(atoms.info)
    return atoms


def _nearest(molecules: list[Atoms], target: Atoms, crystal: Atoms) -> Atoms:
    """Return the periodic image of one of the molecules whose atoms come nearest to those of the target."""
    shifts = np.stack(np.meshgrid(*[[-1, 0, 1] if periodic else [0] for periodic in crystal.pbc]), -1).reshape(-1, 3)
    best, found = np.inf, molecules[0]
    for molecule in molecules:
        for shift in shifts @ crystal.cell.array:
            gaps = molecule.positions[:, None] + shift - target.positions[None]
            distance = float((gaps**2).sum(axis=-1).min())
            if distance < best - 1e-9:
                best, found = distance, molecule.copy()
                found.positions += shift
    return found
