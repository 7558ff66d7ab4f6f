"""What descriptors made of an atom-by-atom matrix share: order of the atoms, filling up with zeros, derivatives.

A matrix ``M_ij`` that depends on the vectors ``x_j - x_i`` is known with its slopes ``g_ij = dM_ij/d(x_j - x_i)``:
moving ``x_j`` adds ``g_ij``, moving ``x_i`` subtracts it. Sorting exchanges rows and columns, so the derivatives are
exchanged alike; the eigenvalues move by first-order perturbation theory, ``d lambda_k = w_k^T dM w_k``.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Literal, get_args

import torch
from ase import Atoms
from torch import Tensor

from tlmc.descriptors.base import GlobalDescriptor
from tlmc.errors import ConfigError, DataError

Ordering = Literal["none", "row_norm", "eigenspectrum"]
"""The atoms as given, rows and columns by descending norm, or eigenvalues by descending magnitude."""


def ordered(matrix: Tensor, ordering: Ordering) -> Tensor:
    """Make symmetric matrices invariant to the numbering of the atoms.

    Parameters
    ----------
    matrix
        Shape ``(..., n, n)``, symmetric.
    ordering
        ``"row_norm"`` sorts rows and columns by descending L2 norm (ties keep their order), ``"eigenspectrum"`` gives
        the eigenvalues by descending magnitude, ``"none"`` returns the matrix.

    Returns
    -------
    Tensor
        Shape ``(..., n, n)``, or ``(..., n)`` for the eigenspectrum.
    """
    if ordering == "row_norm":
        order = row_order(matrix)
        rows = torch.take_along_dim(matrix, order[..., :, None], dim=-2)
        return torch.take_along_dim(rows, order[..., None, :], dim=-1)
    if ordering == "eigenspectrum":
        values: Tensor = torch.linalg.eigvalsh(matrix)
        return values.take_along_dim(values.abs().argsort(dim=-1, descending=True, stable=True), dim=-1)
    return matrix


def row_order(matrix: Tensor) -> Tensor:
    """Return the rows' indices by descending L2 norm, shape ``(..., n)``; ties keep their order."""
    norms: Tensor = torch.linalg.vector_norm(matrix, dim=-1)
    return norms.argsort(dim=-1, descending=True, stable=True)


class MatrixDescriptor(GlobalDescriptor):
    """A global descriptor made of a matrix of pairs of atoms, filled up with zeros to ``n_atoms_max`` atoms.

    Parameters
    ----------
    n_atoms_max
        Number of atoms of the largest structure.
    ordering
        How the numbering of the atoms is made irrelevant; see :func:`ordered`.
    """

    def __init__(self, n_atoms_max: int, ordering: Ordering = "row_norm") -> None:
        if n_atoms_max < 1:
            raise ConfigError(f"n_atoms_max must be positive, got {n_atoms_max}")
        if ordering not in get_args(Ordering):
            raise ConfigError(f"ordering must be one of {get_args(Ordering)}, got {ordering!r}")
        self.n_atoms_max = n_atoms_max
        self.ordering: Ordering = ordering

    @abstractmethod
    def _matrix(self, frame: Atoms) -> Tensor:
        """Return the matrix of one structure, ``(n_atoms, n_atoms)``."""

    @abstractmethod
    def _slopes(self, frame: Atoms) -> Tensor:
        """Return ``dM_ij/d(x_j - x_i)``, shape ``(n_atoms, n_atoms, 3)``, antisymmetric, zero on the diagonal."""

    @property
    def n_features(self) -> int:
        """Length of a row: ``n_atoms_max`` squared, or ``n_atoms_max`` eigenvalues."""
        return self.n_atoms_max if self.ordering == "eigenspectrum" else self.n_atoms_max**2

    @property
    def feature_names(self) -> list[str]:
        """``M[i,j]`` row by row, or ``lambda[k]``."""
        count = range(self.n_atoms_max)
        if self.ordering == "eigenspectrum":
            return [f"lambda[{k}]" for k in count]
        return [f"M[{i},{j}]" for i in count for j in count]

    def matrix(self, frame: Atoms) -> Tensor:
        """Return the matrix of one structure, atoms as given, shape ``(n_atoms, n_atoms)``."""
        return self._matrix(frame)

    def _batch(self, frames: list[Atoms]) -> Tensor:
        return torch.stack([self._flat(ordered(self._matrix(frame), self.ordering)) for frame in frames])

    def _flat(self, content: Tensor) -> Tensor:
        """Fill up with zeros to ``n_atoms_max`` in every direction and flatten."""
        missing = self.n_atoms_max - len(content)
        if missing < 0:
            raise DataError(f"a structure has {len(content)} atoms, more than n_atoms_max = {self.n_atoms_max}")
        return torch.nn.functional.pad(content, (0, missing) * content.ndim).reshape(-1)

    def _derivative(self, frame: Atoms) -> Tensor:
        slopes, n = self._slopes(frame), len(frame)
        if n > self.n_atoms_max:
            raise DataError(f"a structure has {n} atoms, more than n_atoms_max = {self.n_atoms_max}")
        if self.ordering == "eigenspectrum":
            values, vectors = torch.linalg.eigh(self._matrix(frame))
            vectors = vectors[:, values.abs().argsort(descending=True, stable=True)]
            # d lambda_k / dx_a = 2 w_ka sum_i w_ki g_ia, because M_ia = M_ai move together
            moved = torch.einsum("iac,ik->kac", slopes, vectors)
            result = slopes.new_zeros(self.n_atoms_max, n, 3)
            result[:n] = 2.0 * vectors.T[:, :, None] * moved
            return result
        order = row_order(self._matrix(frame)) if self.ordering == "row_norm" else torch.arange(n)
        result = slopes.new_zeros(self.n_atoms_max, self.n_atoms_max, n, 3)
        place = torch.arange(n)
        slopes = slopes[order][:, order]
        result[place[:, None], place, order] += slopes
        result[place[:, None], place, order[:, None]] -= slopes
        return result.reshape(-1, n, 3)
