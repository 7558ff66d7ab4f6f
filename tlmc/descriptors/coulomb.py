"""Coulomb matrix of a molecule (Rupp et al., Phys. Rev. Lett. 108, 058301, 2012; thesis eq. 2.3).

``M_ii = 0.5 Z_i^2.4`` and ``M_ij = Z_i Z_j / R_ij``: the diagonal is a fit to the energies of free atoms, the rest the
repulsion of the nuclei. Distances know neither rotation nor translation; the numbering of the atoms is removed by
sorting or by taking eigenvalues. Two structures with the same eigenvalues need not be the same.
"""

from __future__ import annotations

import torch
from ase import Atoms
from torch import Tensor

from tlmc.descriptors.matrices import MatrixDescriptor, Ordering, ordered
from tlmc.errors import DataError


def coulomb_matrix(numbers: Tensor, positions: Tensor, ordering: Ordering = "none") -> Tensor:
    """Nuclear Coulomb repulsion as a matrix, differentiable twice.

    Parameters
    ----------
    numbers
        Atomic numbers, shape ``(..., n_atoms)``; zeros are places without an atom, for batches of unequal molecules.
    positions
        Cartesian positions in Angstrom, shape ``(..., n_atoms, 3)``.
    ordering
        How invariance to the numbering is obtained; see :func:`tlmc.descriptors.matrices.ordered`.

    Returns
    -------
    Tensor
        Shape ``(..., n_atoms, n_atoms)`` in e^2/Angstrom, or ``(..., n_atoms)`` for ``"eigenspectrum"``.

    Raises
    ------
    ValueError
        If the shapes do not match or two nuclei coincide.
    """
    if positions.shape != (*numbers.shape, 3):
        raise ValueError(f"positions must have shape {(*numbers.shape, 3)}, got {tuple(positions.shape)}")
    charges = numbers.to(positions.dtype)
    present = charges > 0
    pairs = present[..., :, None] & present[..., None, :]
    pairs = pairs & ~torch.eye(numbers.shape[-1], dtype=torch.bool, device=positions.device)
    # sqrt has no gradient at zero: what is no pair gets a distance of one, and charges of zero or the diagonal below
    squared = (positions[..., :, None, :] - positions[..., None, :, :]).square().sum(-1)
    distances = torch.where(pairs, squared, 1.0).sqrt()
    if bool((distances < 1e-6).any()):
        where = torch.nonzero(distances < 1e-6)[0].tolist()
        raise ValueError(f"atoms {where[-2]} and {where[-1]} coincide at {positions[tuple(where[:-1])].tolist()}")
    repulsion = charges[..., :, None] * charges[..., None, :] / distances
    return ordered(torch.where(pairs, repulsion, torch.diag_embed(0.5 * charges**2.4)), ordering)


class CoulombMatrix(MatrixDescriptor):
    """Coulomb matrices of molecules, one flattened matrix (or eigenspectrum) per row.

    Parameters
    ----------
    n_atoms_max
        Number of atoms of the largest molecule; smaller ones are filled up with zeros.
    ordering
        ``"row_norm"`` (default), ``"eigenspectrum"`` or ``"none"``.
    """

    def _batch(self, frames: list[Atoms]) -> Tensor:
        size = max(len(frame) for frame in frames)
        if size > self.n_atoms_max:
            raise DataError(f"a structure has {size} atoms, more than n_atoms_max = {self.n_atoms_max}")
        numbers = torch.zeros(len(frames), size, dtype=torch.int64)
        positions = torch.zeros(len(frames), size, 3, dtype=torch.float64)
        for k, frame in enumerate(frames):
            _refuse_periodic(frame)
            numbers[k, : len(frame)] = torch.from_numpy(frame.numbers)
            positions[k, : len(frame)] = torch.from_numpy(frame.positions)
        content = coulomb_matrix(numbers, positions, self.ordering)
        missing = self.n_atoms_max - size
        return torch.nn.functional.pad(content, (0, missing) * (content.ndim - 1)).flatten(1)

    def _matrix(self, frame: Atoms) -> Tensor:
        _refuse_periodic(frame)
        return coulomb_matrix(torch.from_numpy(frame.numbers), torch.from_numpy(frame.positions))

    def _slopes(self, frame: Atoms) -> Tensor:
        matrix = self._matrix(frame)
        positions = torch.from_numpy(frame.positions)
        vectors = positions[None] - positions[:, None]
        squared = vectors.square().sum(-1).fill_diagonal_(1.0)
        return -(matrix / squared)[:, :, None] * vectors


def _refuse_periodic(frame: Atoms) -> None:
    if frame.pbc.any():
        raise DataError(
            f"{frame.get_chemical_formula()} is periodic (pbc {frame.pbc.tolist()}): the Coulomb matrix is defined for "
            "molecules only; use the Ewald sum matrix, or set pbc to False for an isolated molecule"
        )
