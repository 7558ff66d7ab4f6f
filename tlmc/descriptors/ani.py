"""The atomic environment vector of ANI behind the interface of the other descriptors (thesis eq. 3.2).

The numbers and their derivatives come from :mod:`tlmc.descriptors.aev`, which the potentials and the training cache
call directly.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from ase.data import atomic_numbers, chemical_symbols
from torch import Tensor

from tlmc.descriptors.aev import BLOCK, AEVParameters, aev, aev_jacobian
from tlmc.descriptors.base import Environments, LocalDescriptor, SparseJacobian, atomic_number
from tlmc.descriptors.pairs import Neighbours

ANI_2X_SPECIES = ("H", "C", "N", "O", "S", "F", "Cl")
"""The elements of ANI-2x, in the order of its channels."""

ANI_2X = AEVParameters(
    r_cut_radial=5.1,
    eta_radial=19.7,
    shifts_radial=tuple(0.8 + k * (5.1 - 0.8) / 16 for k in range(16)),
    r_cut_angular=3.5,
    eta_angular=12.5,
    zeta=14.1,
    shifts_angular=tuple(0.8 + k * (3.5 - 0.8) / 8 for k in range(8)),
    sections=tuple((2 * k + 1) * math.pi / 8 for k in range(4)),
)
"""The constants of ANI-2x (Devereux et al., J. Chem. Theory Comput. 16, 4192, 2020)."""


class AtomicEnvironmentVector(LocalDescriptor):
    """ANI's modified symmetry functions of atoms, 1008 numbers for the seven elements of ANI-2x.

    Parameters
    ----------
    species
        Elements that have channels; unlike in other descriptors their order is kept, as potentials depend on it.
    parameters
        Constants; those of ANI-2x if not given.
    dtype
        Precision of the result.

    Notes
    -----
    The order of the features is torchani's: radial functions for each neighbour element, then for each pair of elements
    (first <= second) angular functions, angular shifts outside, sections inside.
    """

    def __init__(
        self,
        species: Sequence[str | int] = ANI_2X_SPECIES,
        parameters: AEVParameters = ANI_2X,
        dtype: torch.dtype = torch.float64,
    ) -> None:
        super().__init__(species, dtype)
        self.species = tuple(dict.fromkeys(chemical_symbols[atomic_number(element)] for element in species))
        self._channel[[atomic_numbers[symbol] for symbol in self.species]] = range(len(self.species))
        self.parameters = parameters

    @property
    def reach(self) -> float:
        """Distance in Angstrom beyond which atoms do not count: the radial cutoff."""
        return self.parameters.r_cut_radial

    @property
    def n_features(self) -> int:
        """Length of a row."""
        return self.parameters.length(len(self.species))

    @property
    def feature_names(self) -> list[str]:
        """``R[C,0.8]`` (element, shift) and ``A[H,C,0.8,0.393]`` (elements, shift, section)."""
        p = self.parameters
        names = [f"R[{symbol},{shift:.4g}]" for symbol in self.species for shift in p.shifts_radial]
        for k, first in enumerate(self.species):
            for second in self.species[k:]:
                names += [
                    f"A[{first},{second},{shift:.4g},{section:.3g}]"
                    for shift in p.shifts_angular
                    for section in p.sections
                ]
        return names

    def values(self, environments: Environments) -> Tensor:
        """Return the vectors, ``(n_centres, n_features)``, differentiable (twice) in ``environments.vectors``."""
        species, pairs = _as_atoms(environments)
        return aev(self.parameters, len(self.species), species, pairs)[: len(environments.species)]

    def jacobian(self, environments: Environments) -> SparseJacobian:
        """Return the exact derivatives of :meth:`values` with respect to the positions; see the base class."""
        n_rows, n_atoms = len(environments.species), sum(environments.sizes)
        species, pairs = _as_atoms(environments)
        rows, atoms, values = aev_jacobian(self.parameters, len(self.species), species, pairs)
        width = self.n_features // BLOCK
        # a centre and its own images are one atom
        atoms = torch.where(atoms < n_rows, environments.atoms[atoms.clamp(max=n_rows - 1)], atoms - n_rows)
        keys, entry = torch.unique(rows // width * n_atoms + atoms, return_inverse=True)
        total = values.new_zeros(len(keys) * width, BLOCK, 3).index_add_(0, entry * width + rows % width, values)
        return SparseJacobian(keys // n_atoms, keys % n_atoms, total.view(len(keys), self.n_features, 3))


def _as_atoms(environments: Environments) -> tuple[Tensor, Neighbours]:
    """Return species and pairs of a structure whose first atoms are the centres and the others their neighbours."""
    n_rows = len(environments.species)
    others = environments.species.new_zeros(sum(environments.sizes))
    others = others.index_copy(0, environments.neighbour, environments.neighbour_species)
    pairs = Neighbours(environments.centre, environments.neighbour + n_rows, environments.vectors)
    return torch.cat([environments.species, others]), pairs
