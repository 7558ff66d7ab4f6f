r"""Gradient-domain machine learning: a potential learnt from forces (thesis eqs. 2.30-2.31; K4 and K5).

The energy is a Gaussian process with covariance ``k(D, D')`` of the inverse distances D of all pairs of atoms. Forces
are its negative gradient, so their covariance is the Hessian ``d^2 k / dx dx'`` (Chmiela et al., Sci. Adv. 3, e1603015,
2017), and the weights of the training forces solve ``(K + lambda 1) w = F`` of size 3 N M. The same weights give forces
*and* the energy they are the gradient of, ``E(x) = c - sum_j (dk(x, x_j)/dx_j) . w_j``: energy is conserved whatever
was learnt. *Symmetric* GDML (Chmiela et al., Nat. Commun. 9, 3887, 2018) sums the covariance over the permutations of
equal atoms. Of the Matern function, with ``d = D - D'`` and ``s = sqrt(5) |d| / sigma``, come

``dk/dD' = g d`` and ``d^2k / dD dD' = g 1 - h d d^T`` with
``g = 5 (1 + s) e^-s / 3 sigma^2`` and ``h = 25 e^-s / 3 sigma^4``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Self

import numpy as np
import torch
from ase import Atoms
from numpy.typing import NDArray
from torch import Tensor

from tlmc.data.dataset import Dataset
from tlmc.errors import ConfigError, DataError, ModelError
from tlmc.kernel_methods.permutations import Permutations, find_permutations
from tlmc.potentials.model import Predictions

FRAMES_AT_ONCE = 64
"""Frames whose forces are predicted together."""


class GDML:
    """Force field of one molecule from forces.

    Parameters
    ----------
    sigma
        Length of the Matern covariance in the space of inverse distances, 1/Angstrom.
    lambda_
        Regularisation, added to the diagonal of the covariance of forces scaled to unit variance.
    permutations
        ``"none"`` (GDML), ``"find"`` (sGDML: :func:`tlmc.kernel_methods.permutations.find_permutations` of the training
        frames), or a group, shape ``(n_permutations, n_atoms)``.

    Attributes
    ----------
    permutations_
        The group in use, shape ``(n_permutations, n_atoms)``.
    weights_
        Of the training forces, shape ``(n_frames, 3 n_atoms)``.
    scale_
        Standard deviation of the training forces' components, eV/Angstrom.
    constant_
        Of integration, eV: the mean deviation of the training energies.
    """

    def __init__(
        self,
        sigma: float = 10.0,
        lambda_: float = 1e-10,
        permutations: Literal["none", "find"] | Permutations = "find",
    ) -> None:
        self.sigma = sigma
        self.lambda_ = lambda_
        self.permutations = permutations

    def fit(self, dataset: Dataset) -> Self:
        """Learn from the forces; energies only fix the constant of integration.

        Parameters
        ----------
        dataset
            Frames of one molecule, atoms in one order, not periodic.

        Raises
        ------
        ConfigError
            If sigma or lambda_ is not positive, or the permutations do not fit the molecule.
        DataError
            If the frames are not of one molecule, or periodic.
        ModelError
            If the covariance has no Cholesky factor: two frames nearly coincide.
        """
        if self.sigma <= 0.0 or self.lambda_ <= 0.0:
            raise ConfigError(f"sigma and lambda_ must be positive, got {self.sigma} and {self.lambda_}")
        if len(dataset) == 0:
            raise DataError("GDML needs at least one training frame, got none")
        self.numbers_ = dataset.frames[0].numbers
        self._check(dataset.frames)
        self.permutations_ = self._group(dataset.frames)
        self.descriptors_, self.jacobians_ = inverse_distances(dataset.frames)
        forces = torch.from_numpy(np.array(dataset.forces)).flatten(1)
        self.scale_ = float(forces.std(correction=0))
        covariance = self.force_covariance()
        covariance.diagonal().add_(self.lambda_)
        factor, info = torch.linalg.cholesky_ex(covariance)
        if int(info):
            raise ModelError(
                f"the covariance of {len(covariance)} force components with sigma {self.sigma} and lambda_ "
                f"{self.lambda_} is singular to rounding: raise lambda_ or lower sigma"
            )
        weights = torch.cholesky_solve(forces.reshape(-1, 1) / self.scale_, factor)
        self.weights_ = weights.view(len(dataset), -1)
        # J w of every training frame and permutation: all that a prediction needs
        pushed = torch.einsum("mdc,mc->md", self.jacobians_, self.weights_)
        order = pair_permutations(self.permutations_)
        self.centres_ = self.descriptors_[:, order].flatten(0, 1)
        self.pushes_ = pushed[:, order].flatten(0, 1)
        self.constant_ = 0.0
        self.constant_ = float((dataset.energies - self.predict(dataset.frames).energies).mean())
        return self

    def predict(self, frames: Sequence[Atoms]) -> Predictions:
        """Return energies (eV) and forces (eV/Angstrom).

        Raises
        ------
        DataError
            If a frame is not of the molecule that was learnt, atoms in that order, or is periodic.
        """
        self._check(frames)
        energies, forces = [], []
        for start in range(0, len(frames), FRAMES_AT_ONCE):
            descriptors, jacobians = inverse_distances(frames[start : start + FRAMES_AT_ONCE])
            energy, slope = self._potential(descriptors)
            energies.append(energy)
            forces.append(-torch.einsum("nd,ndc->nc", slope, jacobians).view(len(descriptors), -1, 3))
        energy_values: NDArray[np.float64] = torch.cat(energies).numpy()
        return Predictions(energy_values, tuple(torch.cat(forces).numpy()))

    def force_covariance(self) -> Tensor:
        """Return the covariance of the training forces, shape ``(3 n_atoms n_frames,) * 2``, without lambda_."""
        descriptors, jacobians = self.descriptors_, self.jacobians_
        order = pair_permutations(self.permutations_)
        m, n_pairs, n_coordinates = jacobians.shape
        covariance = descriptors.new_empty(m, n_coordinates, m, n_coordinates)
        for j in range(m):
            # row i, permutation p: the covariance of frame i with the exchanged frame j
            difference = descriptors[:, None] - descriptors[j][order]
            g, h = self._slopes(difference)
            moved = jacobians[j][order]
            across = (g @ moved.flatten(1)).view(m, n_pairs, n_coordinates)
            along = torch.einsum("mpd,pdc->mpc", difference, moved) * h[:, :, None]
            inner = across - torch.bmm(difference.transpose(1, 2), along)
            covariance[:, :, j] = torch.bmm(jacobians.transpose(1, 2), inner)
        return covariance.view(m * n_coordinates, -1)

    def _slopes(self, difference: Tensor) -> tuple[Tensor, Tensor]:
        """Return ``g`` and ``h`` of the module's formulae for differences of descriptors ``(..., n_pairs)``."""
        s = difference.norm(dim=-1) * (5.0**0.5 / self.sigma)
        decay = 5.0 / (3.0 * self.sigma**2) * torch.exp(-s)
        return decay * (1.0 + s), decay * (5.0 / self.sigma**2)

    def _potential(self, descriptors: Tensor) -> tuple[Tensor, Tensor]:
        """Return the energies of descriptors ``(n, n_pairs)`` and their derivatives with respect to them."""
        difference = descriptors[:, None] - self.centres_
        g, h = self._slopes(difference)
        projection = torch.einsum("nmd,md->nm", difference, self.pushes_)
        energy = self.constant_ - self.scale_ * (g * projection).sum(1)
        slope = torch.einsum("nm,nmd->nd", h * projection, difference) - g @ self.pushes_
        return energy, self.scale_ * slope

    def _group(self, frames: Sequence[Atoms]) -> Permutations:
        n_atoms = len(self.numbers_)
        if isinstance(self.permutations, str):
            if self.permutations not in ("none", "find"):
                raise ConfigError(f"permutations must be 'none', 'find' or an array, got {self.permutations!r}")
            return find_permutations(frames) if self.permutations == "find" else np.arange(n_atoms)[None]
        group = np.asarray(self.permutations, dtype=np.int64)
        if group.ndim != 2 or group.shape[1] != n_atoms or (np.sort(group, axis=1) != np.arange(n_atoms)).any():
            raise ConfigError(f"permutations must be rows of the numbers 0 to {n_atoms - 1}, got shape {group.shape}")
        if (self.numbers_[group] != self.numbers_).any():
            raise ConfigError("permutations must exchange atoms of one element only")
        return group

    def _check(self, frames: Sequence[Atoms]) -> None:
        for k, frame in enumerate(frames):
            if frame.pbc.any():
                raise DataError(
                    f"frame {k} is periodic (pbc {frame.pbc.tolist()}): the distances between all atoms describe one "
                    "molecule; use GAP for crystals, or set pbc to False for an isolated molecule"
                )
            if not np.array_equal(frame.numbers, self.numbers_):
                known = Atoms(self.numbers_).symbols
                raise DataError(f"frame {k} holds {frame.symbols}, not {known} in this order, for which GDML was made")


def inverse_distances(frames: Sequence[Atoms]) -> tuple[Tensor, Tensor]:
    """Return the inverse distances of all pairs of atoms and their derivatives.

    Parameters
    ----------
    frames
        ``n`` geometries of one molecule.

    Returns
    -------
    tuple of Tensor
        Shapes ``(n, n_pairs)``, 1/Angstrom, pairs in the order of :func:`numpy.tril_indices`, and
        ``(n, n_pairs, 3 n_atoms)``, 1/Angstrom^2.
    """
    positions = torch.from_numpy(np.array([frame.positions for frame in frames]))
    n, n_atoms = positions.shape[:2]
    i, j = np.tril_indices(n_atoms, -1)
    vectors = positions[:, i] - positions[:, j]
    inverse = 1.0 / vectors.norm(dim=-1)
    slopes = -vectors * inverse[..., None] ** 3
    jacobian = positions.new_zeros(n, len(i), n_atoms, 3)
    pairs = np.arange(len(i))
    jacobian[:, pairs, i] = slopes
    jacobian[:, pairs, j] = -slopes
    return inverse, jacobian.flatten(2)


def pair_permutations(permutations: Permutations) -> Tensor:
    """Return how exchanges of atoms exchange pairs, shape ``(n_permutations, n_pairs)``."""
    n_atoms = permutations.shape[1]
    i, j = np.tril_indices(n_atoms, -1)
    number = np.zeros((n_atoms, n_atoms), dtype=np.int64)
    number[i, j] = number[j, i] = np.arange(len(i))
    return torch.from_numpy(number[permutations[:, i], permutations[:, j]])
