r"""Push molecules together into a crystal of physical density, cheaply, before any electronic structure is computed.

Random packings are three times too loose, and every step that brings them together costs seconds with a real method.
Two terms do that part of the way in milliseconds: atoms of different molecules attract and repel each other with
:math:`\epsilon [(r_0/r)^{12} - 2 (r_0/r)^6]`, ``r_0`` the sum of their van der Waals radii, and each molecule is held
in shape by springs between all of its atoms. There is no chemistry in it: a relaxation with a real method must follow.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import vesin
from ase import Atoms
from ase.calculators.calculator import Calculator, all_changes
from ase.data import covalent_radii
from ase.data.vdw_alvarez import vdw_radii
from ase.filters import FrechetCellFilter
from ase.optimize import LBFGS
from ase.stress import full_3x3_to_voigt_6_stress
from numpy.typing import NDArray

from tlmc.labelling.relaxation import quiet_logarithms

_DEPTH, _SPRING, _CUTOFF = 0.01, 5.0, 9.0
"""eV, eV/Angstrom^2 and Angstrom."""


class SoftMolecules(Calculator):
    """Van der Waals contacts between molecules that keep their shape (see the module)."""

    implemented_properties = ["energy", "forces", "stress"]

    def __init__(self, crystal: Atoms, molecules: list[NDArray[np.int64]]) -> None:
        """Take the molecules' shapes from a crystal that holds them in one piece, and their atoms' indices."""
        Calculator.__init__(self)
        self.molecule_of = np.empty(len(crystal), dtype=np.int64)
        first, second = [np.empty(0, dtype=np.int64)], [np.empty(0, dtype=np.int64)]
        for k, members in enumerate(molecules):
            self.molecule_of[members] = k
            low, high = np.triu_indices(len(members), 1)
            first.append(members[low])
            second.append(members[high])
        self.first, self.second = np.concatenate(first), np.concatenate(second)
        self.lengths = np.linalg.norm(crystal.positions[self.second] - crystal.positions[self.first], axis=1)
        # 0.8 A beyond the covalent radius where none is tabulated
        self.radii = np.where(
            np.isnan(vdw_radii[crystal.numbers]), covalent_radii[crystal.numbers] + 0.8, vdw_radii[crystal.numbers]
        )
        self.search = vesin.NeighborList(cutoff=_CUTOFF, full_list=False)

    def calculate(
        self,
        atoms: Atoms | None = None,
        properties: Sequence[str] = ("energy",),
        system_changes: Sequence[str] = all_changes,
    ) -> None:
        """Compute energy, forces and stress, all in one pass (ASE calls this)."""
        Calculator.calculate(self, atoms, properties, system_changes)
        frame = cast(Atoms, self.atoms)
        i, j, shift, vectors, distances = self.search.compute(
            frame.positions, frame.cell.array, frame.pbc, "ijSDd", copy=True
        )
        # a molecule whole in the cell meets itself only through an image
        apart = (self.molecule_of[i] != self.molecule_of[j]) | shift.any(axis=1)
        i, j, vectors, distances = (values[apart] for values in (i.astype(int), j.astype(int), vectors, distances))
        ratio = ((self.radii[i] + self.radii[j]) / distances) ** 6
        springs = frame.positions[self.second] - frame.positions[self.first]
        lengths = np.linalg.norm(springs, axis=1)
        stretch = lengths - self.lengths
        first, second = np.concatenate([i, self.first]), np.concatenate([j, self.second])
        # dE/d(vector from first to second)
        slopes = np.concatenate(
            [
                vectors * (-12.0 * _DEPTH * (ratio**2 - ratio) / distances**2)[:, None],
                springs * (_SPRING * stretch / lengths)[:, None],
            ]
        )
        forces = np.zeros((len(frame), 3))
        np.add.at(forces, first, slopes)
        np.add.at(forces, second, -slopes)
        stress = np.concatenate([vectors, springs]).T @ slopes / frame.get_volume()
        self.results: dict[str, Any] = {
            "energy": float(_DEPTH * (ratio**2 - 2.0 * ratio).sum() + 0.5 * _SPRING * (stretch**2).sum()),
            "forces": forces,
            "stress": full_3x3_to_voigt_6_stress(stress),
        }


def compress(crystal: Atoms, molecules: list[NDArray[np.int64]], steps: int = 300, pressure: float = 0.0) -> Atoms:
    """Return the crystal with cell and molecules relaxed under `SoftMolecules`.

    Parameters
    ----------
    crystal
        Molecules in one piece.
    molecules
        Atom indices of each.
    steps
        At most, of LBFGS; the result need not be a minimum.
    pressure
        eV/Angstrom^3.
    """
    frame: Atoms = crystal.copy()
    frame.calc = SoftMolecules(crystal, molecules)
    with quiet_logarithms():
        LBFGS(FrechetCellFilter(frame, scalar_pressure=pressure), logfile=None).run(fmax=0.05, steps=steps)  # type: ignore[arg-type]
    frame.calc = None
    return frame
