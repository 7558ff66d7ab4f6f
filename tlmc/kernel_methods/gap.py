r"""Gaussian approximation potential: energies of atoms learnt from energies and forces (thesis eqs. 2.28-2.29; K3).

The energy is a sum over atoms of a Gaussian process of their surroundings, with the SOAP kernel
``k(a, b) = delta^2 (a.b / |a||b|)^zeta`` between centres of the same element (Bartok et al., Phys. Rev. Lett. 104,
136403, 2010). Labels are sums of the process (energies) and of its derivatives (forces), so their covariances are sums
and derivatives of k. A few representative environments M carry the weights w: with the covariance ``K_NM`` of labels
and representatives and the labels' noise ``S``, they minimise

``|S^-1/2 (K_NM w - y)|^2 + w.K_MM w``,

solved by a QR factorisation of both parts under each other, which does not square the condition number (Foster et al.,
J. Mach. Learn. Res. 10, 857, 2009). Forces are exact derivatives of the energy; a smooth cutoff makes them continuous.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple, Self, get_args

import numpy as np
import torch
from ase import Atoms
from numpy.typing import NDArray
from torch import Tensor

from tlmc.data.dataset import Dataset
from tlmc.descriptors.base import LocalDescriptor
from tlmc.errors import ConfigError, DataError
from tlmc.potentials.model import Predictions
from tlmc.potentials.reference import ReferenceEnergies, fit_reference
from tlmc.sampling.diversity import cur, farthest_points

Selection = Literal["cur", "farthest"]

JITTER = 1e-8
"""Added to the diagonal of the representatives' covariance, relative to ``delta^2``."""
ATOMS_AT_ONCE = 160
"""Atoms whose derivatives are kept in memory together."""


class GAP:
    """Gaussian approximation potential for molecules and crystals.

    Parameters
    ----------
    descriptor
        Of single atoms, such as :class:`tlmc.descriptors.soap.SOAP` with a cosine cutoff.
    n_sparse
        Representative environments per element (fewer where there are not as many).
    zeta
        Exponent of the kernel: the higher, the sooner it forgets.
    delta
        Standard deviation of an atom's energy before anything is learnt, eV.
    energy_sigma
        Noise of the energies, eV per square root of the number of atoms.
    force_sigma
        Noise of the forces' components, eV/Angstrom.
    selection
        How representatives are chosen: ``"farthest"`` points or ``"cur"``.
    reference
        Energies of the elements, subtracted before the fit; fitted to the training energies if not given.

    Attributes
    ----------
    reference_
        Energies of the elements.
    representatives_
        Unit-length rows of the descriptor by element, each ``(n, n_features)``.
    weights_
        Of all representatives, by element, shape ``(n_representatives,)``.
    """

    def __init__(
        self,
        descriptor: LocalDescriptor,
        n_sparse: int = 100,
        zeta: int = 4,
        delta: float = 1.0,
        energy_sigma: float = 1e-3,
        force_sigma: float = 0.05,
        selection: Selection = "farthest",
        reference: ReferenceEnergies | None = None,
    ) -> None:
        self.descriptor = descriptor
        self.n_sparse = n_sparse
        self.zeta = zeta
        self.delta = delta
        self.energy_sigma = energy_sigma
        self.force_sigma = force_sigma
        self.selection = selection
        self.reference = reference

    def fit(self, dataset: Dataset, representatives: Mapping[str, Tensor] | None = None) -> Self:
        """Learn from energies and forces together.

        Parameters
        ----------
        dataset
            Molecules and crystals with labels.
        representatives
            Rows of the descriptor by element (of any length), chosen from the training frames if not given.

        Raises
        ------
        ConfigError
            If an argument is out of range.
        DataError
            If there are no frames, or an element has no representative.
        """
        self._check()
        if len(dataset) == 0:
            raise DataError("GAP needs at least one training frame, got none")
        zero = np.zeros(len(dataset))
        self.reference_ = self.reference or fit_reference(dataset.frames, dataset.energies, zero)
        rows = representatives if representatives is not None else self._choose(dataset.frames)
        self.representatives_ = {
            symbol: torch.nn.functional.normalize(rows[symbol]) for symbol in self.descriptor.species if symbol in rows
        }
        prior = torch.block_diag(*(self._kernel(u @ u.T) for u in self.representatives_.values()))
        prior.diagonal().add_(JITTER * self.delta**2)
        self.prior_factor_ = torch.linalg.cholesky(prior)
        energy_noise = self.energy_sigma * torch.from_numpy(dataset.n_atoms).double().sqrt()
        energies = torch.from_numpy(dataset.energies - self.reference_.energies(dataset.frames)) / energy_noise
        forces = torch.from_numpy(np.concatenate(dataset.forces)).flatten() / self.force_sigma
        parts = [self._covariances(frames) for frames in _batches(dataset.frames)]
        design = torch.cat(
            [
                torch.cat([part.energies for part in parts]) / energy_noise[:, None],
                torch.cat([part.forces for part in parts]) / self.force_sigma,
                self.prior_factor_.T,
            ]
        )
        orthogonal, self.factor_ = torch.linalg.qr(design)
        labels = torch.cat([energies, forces, energies.new_zeros(len(prior))])
        solution = (orthogonal.T @ labels)[:, None]
        self.weights_ = torch.linalg.solve_triangular(self.factor_, solution, upper=True)[:, 0]
        return self

    def predict(self, frames: Sequence[Atoms]) -> Predictions:
        """Return energies (eV) and forces (eV/Angstrom)."""
        energies, forces = [], []
        for batch in _batches(frames):
            environments = self.descriptor.environments(batch)
            local, slopes = self._local(self.descriptor.values(environments), environments.species)
            energies.append(local.new_zeros(len(batch)).index_add(0, environments.structures, local))
            jacobian = self.descriptor.jacobian(environments)
            moved = torch.einsum("ef,efc->ec", slopes[jacobian.rows], jacobian.values)
            force = -moved.new_zeros(sum(environments.sizes), 3).index_add(0, jacobian.atoms, moved)
            forces += [part.numpy() for part in force.split(environments.sizes)]
        values: NDArray[np.float64] = torch.cat(energies).numpy() + self.reference_.energies(frames)
        return Predictions(values, tuple(forces))

    def local_energies(self, frame: Atoms) -> NDArray[np.float64]:
        """Return the energy of every atom, eV, shape ``(n_atoms,)``: what the model made of total energies."""
        environments = self.descriptor.environments(frame)
        local = self._local(self.descriptor.values(environments), environments.species)[0]
        offsets = np.array([self.reference_.offsets[symbol] for symbol in frame.symbols])
        energies: NDArray[np.float64] = local.numpy() + offsets
        return energies

    def energy_std(self, frames: Sequence[Atoms]) -> NDArray[np.float64]:
        """Return the standard deviation of the energies, eV, shape ``(n_frames,)``.

        ``k(x, x) - k(x, M) K_MM^-1 k(M, x)`` is what the representatives cannot know,
        ``k(x, M) (K_MM + K_MN S^-1 K_NM)^-1 k(M, x)`` what the labels have left open.
        """
        stds = []
        for batch in _batches(frames):
            environments = self.descriptor.environments(batch)
            rows = torch.nn.functional.normalize(self.descriptor.values(environments))
            structure, species = environments.structures, environments.species
            same = (structure[:, None] == structure) & (species[:, None] == species)
            pairs = torch.where(same, self._kernel(rows @ rows.T), 0.0).sum(1)
            prior = pairs.new_zeros(len(batch)).index_add(0, structure, pairs)
            seen = self._sums(rows, species, structure, len(batch)).T
            known = torch.linalg.solve_triangular(self.prior_factor_, seen, upper=False).square().sum(0)
            left = torch.linalg.solve_triangular(self.factor_.T, seen, upper=False).square().sum(0)
            stds.append((prior - known + left).clamp(min=0.0).sqrt())
        result: NDArray[np.float64] = torch.cat(stds).numpy()
        return result

    def _choose(self, frames: Sequence[Atoms]) -> dict[str, Tensor]:
        """Choose representatives of every element among the environments of the frames."""
        environments = self.descriptor.environments(frames)
        rows = torch.nn.functional.normalize(self.descriptor.values(environments))
        choose = cur if self.selection == "cur" else farthest_points
        chosen = {}
        for channel, symbol in enumerate(self.descriptor.species):
            candidates = rows[environments.species == channel]
            if len(candidates):
                indices = choose(candidates.numpy(), min(self.n_sparse, len(candidates)))
                chosen[symbol] = candidates[torch.from_numpy(indices)]
        return chosen

    def _kernel(self, product: Tensor) -> Tensor:
        return self.delta**2 * product**self.zeta

    def _similarities(self, rows: Tensor, species: Tensor) -> list[tuple[Tensor, slice, Tensor, Tensor]]:
        """Return for every element: its rows' indices, its places among the weights, its representatives, products."""
        result, start = [], 0
        for channel, symbol in enumerate(self.descriptor.species):
            mine = torch.nonzero(species == channel).squeeze(1)
            if symbol not in self.representatives_:
                if len(mine):
                    raise DataError(f"no environment of {symbol} was learnt from; GAP cannot predict its energy")
                continue
            points = self.representatives_[symbol]
            result.append((mine, slice(start, start + len(points)), points, rows[mine] @ points.T))
            start += len(points)
        return result

    def _sums(self, rows: Tensor, species: Tensor, structures: Tensor, n_structures: int) -> Tensor:
        """Return the covariances of energies and representatives, ``(n_structures, n_representatives)``."""
        result = rows.new_zeros(n_structures, len(self.prior_factor_))
        for mine, place, _, product in self._similarities(rows, species):
            result[:, place].index_add_(0, structures[mine], self._kernel(product))
        return result

    def _covariances(self, frames: Sequence[Atoms]) -> _Covariances:
        """Return the covariances of the labels of some frames with the representatives."""
        environments = self.descriptor.environments(frames)
        values, jacobian = self.descriptor.values(environments), self.descriptor.jacobian(environments)
        lengths = values.norm(dim=1)
        rows = torch.nn.functional.normalize(values)
        energies = self._sums(rows, environments.species, environments.structures, len(frames))
        forces = rows.new_zeros(3 * sum(environments.sizes), energies.shape[1])
        for mine, place, points, product in self._similarities(rows, environments.species):
            number = torch.full((len(rows),), -1)
            number[mine] = torch.arange(len(mine))
            entries = torch.nonzero(number[jacobian.rows] >= 0).squeeze(1)
            row = jacobian.rows[entries]
            slopes = jacobian.values[entries].transpose(1, 2)
            # the derivative of a unit vector is that of the vector, without its own direction, over the length
            along = slopes @ rows[row][:, :, None]
            product_slope = (slopes @ points.T - along * product[number[row]][:, None]) / lengths[row][:, None, None]
            outer = self.delta**2 * self.zeta * product ** (self.zeta - 1)
            moved = -product_slope * outer[number[row]][:, None]
            axes = 3 * jacobian.atoms[entries][:, None] + torch.arange(3)
            forces[:, place].index_add_(0, axes.flatten(), moved.flatten(0, 1))
        return _Covariances(energies, forces)

    def _local(self, values: Tensor, species: Tensor) -> tuple[Tensor, Tensor]:
        """Return the atoms' energies, reference excluded, and their derivatives with respect to the descriptor."""
        lengths = values.norm(dim=1)
        rows = torch.nn.functional.normalize(values)
        energies, slopes = rows.new_zeros(len(rows)), torch.zeros_like(rows)
        for mine, place, points, product in self._similarities(rows, species):
            weights = self.weights_[place]
            energies[mine] = self._kernel(product) @ weights
            outer = self.delta**2 * self.zeta * product ** (self.zeta - 1) * weights
            inner = outer @ points - (outer * product).sum(1, keepdim=True) * rows[mine]
            slopes[mine] = inner / lengths[mine][:, None]
        return energies, slopes

    def _check(self) -> None:
        if self.selection not in get_args(Selection):
            raise ConfigError(f"selection must be one of {get_args(Selection)}, got {self.selection!r}")
        for name in ("n_sparse", "zeta", "delta", "energy_sigma", "force_sigma"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} must be positive, got {getattr(self, name)}")
        if self.descriptor.averaged:
            raise ConfigError("GAP sums over atoms: the descriptor must not be averaged")


class _Covariances(NamedTuple):
    energies: Tensor
    """Shape ``(n_frames, n_representatives)``."""
    forces: Tensor
    """Shape ``(3 n_atoms, n_representatives)``, atoms of all frames below each other."""


def _batches(frames: Sequence[Atoms]) -> list[list[Atoms]]:
    """Divide the frames so that each part has about ``ATOMS_AT_ONCE`` atoms."""
    parts: list[list[Atoms]] = []
    room = 0
    for frame in frames:
        if room < len(frame) or not parts:
            parts.append([])
            room = ATOMS_AT_ONCE
        parts[-1].append(frame)
        room -= len(frame)
    return parts
