r"""Ewald sum matrix of a crystal (Faber et al., Int. J. Quantum Chem. 115, 1094, 2015; thesis eqs. 2.4-2.8).

``M_ij`` is the Coulomb energy of the nuclei i and j with all images, in a background that makes each charge neutral;
the energy per cell is the sum over ``i <= j``. With the splitting parameter ``a``

- real space: ``Z_i Z_j sum_L erfc(a |r_ij + L|) / |r_ij + L|``,
- reciprocal space: ``(4 pi / V) Z_i Z_j sum_{G != 0} exp(-G^2 / 4 a^2) / G^2 cos(G . r_ij)``, ``G`` including 2 pi,
- background: ``-Z_i Z_j pi / (V a^2)``,

and the diagonal is half of that (``L = 0`` left out) less the self-energy ``Z_i^2 a / sqrt(pi)``. These are DScribe's
conventions too. The sum does not depend on ``a``: the thesis prints ``erf`` for ``erfc``, ``1 / (pi V)`` with vectors
that include 2 pi, and an off-diagonal constant that contains the self-energy, and that form does depend on it.
:func:`printed_off_diagonal` keeps that form for comparison.

``cos(G . (x_j - x_i)) = cos cos + sin sin`` turns the double sum over pairs into two matrix products.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from ase import Atoms
from torch import Tensor

from tlmc.descriptors.matrices import MatrixDescriptor, Ordering, ordered
from tlmc.descriptors.pairs import neighbours
from tlmc.errors import ConfigError, DataError


class EwaldParameters(NamedTuple):
    """Splitting parameter and cutoffs of the two sums."""

    splitting: float
    """``a`` in 1/Angstrom."""
    r_cut: float
    """Real-space cutoff in Angstrom."""
    g_cut: float
    """Reciprocal-space cutoff in 1/Angstrom, 2 pi included."""


def ewald_parameters(
    n_atoms: int, volume: float, accuracy: float = 1e-10, splitting: float | None = None
) -> EwaldParameters:
    """Choose the splitting parameter and the cutoffs.

    Both sums are cut where their Gaussian factors, ``exp(-a^2 r^2)`` and ``exp(-G^2 / 4 a^2)``, fall to ``accuracy``
    (Jackson and Catlow, Mol. Simul. 1, 207, 1988), which bounds the error of an element over ``Z_i Z_j`` in 1/Angstrom.
    The default ``a = sqrt(pi) (n / V^2)^(1/6)`` gives both the same number of terms per atom.

    Parameters
    ----------
    n_atoms
        Number of atoms in the cell.
    volume
        Volume of the cell in Angstrom^3.
    accuracy
        Where the Gaussian factors are cut.
    splitting
        ``a`` in 1/Angstrom; chosen if not given.
    """
    if not 0.0 < accuracy < 1.0:
        raise ConfigError(f"accuracy must lie between 0 and 1, got {accuracy}")
    if splitting is not None and splitting <= 0.0:
        raise ConfigError(f"splitting must be positive, got {splitting}")
    a = splitting if splitting is not None else math.sqrt(math.pi) * (n_atoms / volume**2) ** (1.0 / 6.0)
    reach = math.sqrt(-math.log(accuracy))
    return EwaldParameters(a, reach / a, 2.0 * a * reach)


def ewald_matrix(
    charges: Tensor,
    positions: Tensor,
    cell: Tensor,
    parameters: EwaldParameters | None = None,
    ordering: Ordering = "none",
) -> Tensor:
    """Coulomb energy of all pairs of point charges of a crystal, differentiable twice in positions and cell.

    Parameters
    ----------
    charges
        Nuclear (or ionic) charges in units of e, shape ``(n_atoms,)``.
    positions
        Cartesian positions in Angstrom, shape ``(n_atoms, 3)``.
    cell
        Cell vectors as rows, Angstrom, shape ``(3, 3)``.
    parameters
        Splitting and cutoffs; :func:`ewald_parameters` of the cell if not given.
    ordering
        How invariance to the numbering is obtained; see :func:`tlmc.descriptors.matrices.ordered`.

    Returns
    -------
    Tensor
        Shape ``(n_atoms, n_atoms)`` in e^2/Angstrom, or ``(n_atoms,)`` for ``"eigenspectrum"``.

    Raises
    ------
    ValueError
        If the shapes do not match or the cell has no volume.
    """
    n_atoms = len(charges)
    if positions.shape != (n_atoms, 3):
        raise ValueError(f"positions must have shape ({n_atoms}, 3), got {tuple(positions.shape)}")
    volume = torch.linalg.det(cell).abs()
    if float(volume.detach()) < 1e-9:
        raise ValueError(f"the cell must have a volume, got {cell.tolist()}")
    if parameters is None:
        parameters = ewald_parameters(n_atoms, float(volume.detach()))
    charges = charges.to(positions.dtype)
    a = parameters.splitting
    total = _real_space(positions, cell, parameters) + _reciprocal_space(positions, cell, volume, parameters)
    total = total - math.pi / (volume * a**2)
    # every pair of different atoms stands twice in the matrix, an atom and its images only once
    diagonal = 0.5 * total.diagonal() - a / math.sqrt(math.pi)
    total = torch.outer(charges, charges) * torch.diagonal_scatter(total, diagonal)
    return ordered(total, ordering)


def printed_off_diagonal(charges: Tensor, positions: Tensor, cell: Tensor, parameters: EwaldParameters) -> Tensor:
    """Return the elements off the diagonal as the thesis prints them (2.4-2.7), which is wrong; for comparison only.

    The reciprocal part has the prefactor ``1 / (pi V)``, the constant is
    ``-(Z_i^2 + Z_j^2) a / sqrt(pi) - (Z_i + Z_j)^2 pi / (2 V a^2)``. The printed ``erf`` is read as ``erfc``: its sum
    over the lattice would not converge.

    Parameters
    ----------
    charges, positions, cell
        As in :func:`ewald_matrix`.
    parameters
        Splitting, on which the result depends, and cutoffs.

    Returns
    -------
    Tensor
        Shape ``(n_atoms, n_atoms)`` in e^2/Angstrom, zero on the diagonal.
    """
    z, a, volume = charges.to(positions.dtype), parameters.splitting, torch.linalg.det(cell).abs()
    reciprocal = _reciprocal_space(positions, cell, volume, parameters) / (4.0 * math.pi**2)
    total: Tensor = torch.outer(z, z) * (_real_space(positions, cell, parameters) + reciprocal)
    total = total - (z[:, None] ** 2 + z**2) * a / math.sqrt(math.pi)
    total = total - (z[:, None] + z) ** 2 * math.pi / (2.0 * volume * a**2)
    return total.fill_diagonal_(0.0)


class EwaldMatrix(MatrixDescriptor):
    """Ewald sum matrices of crystals, one flattened matrix (or eigenspectrum) per row.

    Parameters
    ----------
    n_atoms_max
        Number of atoms of the largest cell; smaller ones are filled up with zeros.
    ordering
        ``"row_norm"`` (default), ``"eigenspectrum"`` or ``"none"``.
    accuracy
        Where the sums are cut; see :func:`ewald_parameters`.
    splitting
        Splitting parameter in 1/Angstrom, for every structure; chosen for each if not given.
    """

    def __init__(
        self,
        n_atoms_max: int,
        ordering: Ordering = "row_norm",
        accuracy: float = 1e-10,
        splitting: float | None = None,
    ) -> None:
        super().__init__(n_atoms_max, ordering)
        ewald_parameters(1, 1.0, accuracy, splitting)
        self.accuracy = accuracy
        self.splitting = splitting

    def parameters(self, frame: Atoms) -> EwaldParameters:
        """Return splitting and cutoffs for one crystal."""
        return ewald_parameters(len(frame), frame.get_volume(), self.accuracy, self.splitting)

    def _matrix(self, frame: Atoms) -> Tensor:
        numbers, positions, cell = _tensors(frame)
        return ewald_matrix(numbers, positions, cell, self.parameters(frame))

    def _slopes(self, frame: Atoms) -> Tensor:
        numbers, positions, cell = _tensors(frame)
        charges, parameters = numbers.double(), self.parameters(frame)
        slopes = _real_slopes(positions, cell, parameters) + _reciprocal_slopes(positions, cell, parameters)
        return (charges[:, None] * charges)[:, :, None] * slopes


def _tensors(frame: Atoms) -> tuple[Tensor, Tensor, Tensor]:
    if not frame.pbc.all():
        raise DataError(
            f"{frame.get_chemical_formula()} is not periodic in all directions (pbc {frame.pbc.tolist()}): the Ewald "
            "sum needs a crystal; use the Coulomb matrix for a molecule"
        )
    return torch.from_numpy(frame.numbers), torch.from_numpy(frame.positions), torch.from_numpy(frame.cell.array)


def _pairs(positions: Tensor, cell: Tensor, r_cut: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return centre, neighbour and vector of all pairs; the vectors depend on positions and cell."""
    box, points = cell.detach().numpy(), positions.detach().numpy()
    frame = Atoms(numbers=[1] * len(points), positions=points, cell=box, pbc=True)
    pairs = neighbours(frame, r_cut, positions.dtype)
    apart = positions[pairs.neighbour] - positions[pairs.centre]
    shifts = torch.round((pairs.vectors - apart.detach()) @ torch.linalg.inv(cell.detach()))
    return pairs.centre, pairs.neighbour, apart + shifts @ cell


def _real_space(positions: Tensor, cell: Tensor, parameters: EwaldParameters) -> Tensor:
    n_atoms = len(positions)
    centre, neighbour, vectors = _pairs(positions, cell, parameters.r_cut)
    distances: Tensor = torch.linalg.vector_norm(vectors, dim=1)
    terms = torch.erfc(parameters.splitting * distances) / distances
    return terms.new_zeros(n_atoms * n_atoms).index_add(0, centre * n_atoms + neighbour, terms).view(n_atoms, n_atoms)


def _real_slopes(positions: Tensor, cell: Tensor, parameters: EwaldParameters) -> Tensor:
    n_atoms, a = len(positions), parameters.splitting
    centre, neighbour, vectors = _pairs(positions, cell, parameters.r_cut)
    squared = vectors.square().sum(1)
    distances = squared.sqrt()
    slope = -torch.erfc(a * distances) / distances - 2.0 * a / math.sqrt(math.pi) * torch.exp(-(a**2) * squared)
    terms = (slope / squared)[:, None] * vectors
    total = terms.new_zeros(n_atoms * n_atoms, 3).index_add(0, centre * n_atoms + neighbour, terms)
    total[:: n_atoms + 1] = 0.0  # an atom and its own image move together
    return total.view(n_atoms, n_atoms, 3)


def _reciprocal_vectors(cell: Tensor, g_cut: float) -> Tensor:
    """Return one of each pair ``G, -G`` within the cutoff, shape ``(n_vectors, 3)``, dependent on the cell."""
    reciprocal: Tensor = 2.0 * math.pi * torch.linalg.inv(cell).T
    # |G| < g_cut lies within n_k <= g_cut |a_k| / 2 pi, because G . a_k = 2 pi n_k
    limits = (g_cut * torch.linalg.vector_norm(cell.detach(), dim=1) / (2.0 * math.pi)).floor().int().tolist()
    first = torch.arange(0, limits[0] + 1)
    others = [torch.arange(-limit, limit + 1) for limit in limits[1:]]
    n = torch.cartesian_prod(first, *others).to(cell.dtype)
    half = (n[:, 0] > 0) | ((n[:, 0] == 0) & ((n[:, 1] > 0) | ((n[:, 1] == 0) & (n[:, 2] > 0))))
    n = n[half & ((n @ reciprocal.detach()).square().sum(1) < g_cut**2)]
    return n @ reciprocal


def _phases(positions: Tensor, cell: Tensor, parameters: EwaldParameters) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return ``G``, the factors ``exp(-G^2 / 4 a^2) / G^2`` and the cosines and sines, ``(n_atoms, n_vectors)``."""
    vectors = _reciprocal_vectors(cell, parameters.g_cut)
    squared = vectors.square().sum(1)
    factors = torch.exp(-squared / (4.0 * parameters.splitting**2)) / squared
    phase = positions @ vectors.T
    return vectors, factors, torch.cos(phase), torch.sin(phase)


def _reciprocal_space(positions: Tensor, cell: Tensor, volume: Tensor, parameters: EwaldParameters) -> Tensor:
    _, factors, cosine, sine = _phases(positions, cell, parameters)
    waves = torch.cat([cosine, sine], dim=1)
    # G and -G give the same: 8 pi instead of 4 pi
    return (8.0 * math.pi / volume) * ((waves * factors.repeat(2)) @ waves.T)


def _reciprocal_slopes(positions: Tensor, cell: Tensor, parameters: EwaldParameters) -> Tensor:
    """Return the derivative of ``cos(G . (x_j - x_i))``, ``-G sin(G . (x_j - x_i))``, summed over G."""
    vectors, factors, cosine, sine = _phases(positions, cell, parameters)
    scale = -8.0 * math.pi / torch.linalg.det(cell).abs()
    left = torch.cat([cosine, -sine], dim=1)
    right = torch.cat([sine, cosine], dim=1)
    weights = scale * factors[:, None] * vectors
    return torch.stack([(left * weights[:, k].repeat(2)) @ right.T for k in range(3)], dim=2)
