r"""A committee that is fitted in milliseconds: the last layers of a start model, by ridge regression.

The energy of an ANI network is linear in the weights of its output layers. With the activations h of the last hidden
layer as features, :math:`E = E_0 + \sum_i h_i \cdot \Delta w_{Z_i}` and
:math:`F = F_0 - \sum_i (\partial h_i / \partial x)\, \Delta w_{Z_i}`, where :math:`E_0, F_0` are the start model's and
:math:`\Delta w` is what the labels change. Minimising the training loss (thesis 3.46) plus a penalty,

.. math:: L = \lambda \langle |\Delta F|^2 \rangle + (1 - \lambda) \langle (\Delta E / N_a)^2 \rangle
          + \gamma |\Delta w|^2,

is one linear solve, exact, without a learning rate or an epoch. That is what a loop of many small trainings needs; it
is less accurate than training all layers, of which it is the special case ``layers="last"``.

Members differ in two ways. Each sees a bootstrap resample of the frames, and each is pulled towards weights of its own,
drawn from a normal distribution as wide as the fitted :math:`\Delta w` are (randomised priors: Osband et al., NeurIPS
2018). Resamples alone would agree exactly where there are no data, since the penalty pulls all of them to one point.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from ase import Atoms
from numpy.random import default_rng
from numpy.typing import NDArray
from scipy.linalg import cho_factor, cho_solve
from scipy.sparse import bsr_array
from torch import Tensor

from tlmc.data.dataset import Dataset
from tlmc.data.geometry import frame_hash
from tlmc.equality import equal_by_content
from tlmc.errors import ConfigError, DataError, ModelError
from tlmc.families.ani.cache import Structure, build_cache
from tlmc.families.ani.model import AniPotential, Layer
from tlmc.families.ani.network import CELU_ALPHA
from tlmc.potentials.calculator import predict
from tlmc.potentials.reference import ReferenceEnergies, fit_reference
from tlmc.sampling.committee import CommitteePredictions, bootstrap

FloatArray = NDArray[np.float64]


@equal_by_content
class Features(NamedTuple):
    """What the output layers act on, for one frame."""

    energy: FloatArray
    """Derivative of the energy by the weights, eV, shape ``(n_weights,)``."""
    forces: FloatArray
    """Derivative of the forces, eV/Angstrom, shape ``(3 n_atoms, n_weights)``."""
    start_energy: float
    """Of the start model without a reference, eV."""
    start_forces: FloatArray
    """Shape ``(3 n_atoms,)``, eV/Angstrom."""


class LastLayerCommittee:
    """Several ridge fits of a start model's output layers; a `tlmc.sampling.Learner`.

    Parameters
    ----------
    model
        Single network such as ``ani2xt``, borrowed elements mapped.
    elements
        Those that frames may hold; the weights of their networks are fitted.
    n_members
        Members of the committee.
    lambda_
        Weight of the forces in the loss.
    penalty
        gamma over the mean squared feature: 1 makes the pull of the prior as strong as that of the data.
    """

    def __init__(
        self,
        model: AniPotential,
        elements: Sequence[str],
        n_members: int = 8,
        lambda_: float = 0.1,
        penalty: float = 1e-5,
    ) -> None:
        if model.members != 1:
            raise ModelError(f"the last layer of one network is refitted; {model.name} has {model.members} members")
        if n_members < 1 or not 0 <= lambda_ <= 1 or not penalty > 0:
            raise ConfigError(
                "n_members and penalty must be positive and lambda_ in [0, 1], got "
                f"{n_members}, {penalty} and {lambda_}"
            )
        self.model = model.to(torch.float64).with_reference(None)
        self.n_members, self.lambda_, self.penalty = n_members, lambda_, penalty
        self._elements = tuple(elements)
        self._features: dict[str, Features] = {}
        # columns of each network: the weights of its output layer, then its bias
        self._places: dict[int, slice] = {}
        self.n_weights = 0
        for k in sorted(set(model.species(Atoms(list(elements))).tolist())):
            width = model.networks[model.symbols[k]][-1].weight.shape[1] + 1
            self._places[k] = slice(self.n_weights, self.n_weights + width)
            self.n_weights += width

    @property
    def description(self) -> dict[str, Any]:
        """What decides a fit beside data and seed."""
        digest = hashlib.sha256()
        for symbol in self.model.symbols:
            for layer in self.model.networks[symbol]:
                for part in layer:
                    digest.update(part.contiguous().numpy().tobytes())
        return {
            "model": {"weights": digest.hexdigest(), "element_map": dict(self.model.element_map)},
            "elements": sorted(self._elements),
            "n_members": self.n_members,
            "lambda": self.lambda_,
            "penalty": self.penalty,
        }

    def fit(self, dataset: Dataset, seed: int) -> Self:
        """Fit all members to the labels of a data set.

        Parameters
        ----------
        dataset
            Training frames.
        seed
            Of the resamples and priors; the same arguments give the same members.

        Raises
        ------
        DataError
            If there are no frames.
        ModelError
            If a frame holds an element without a network.
        """
        if not len(dataset):
            raise DataError(f"{dataset.name}: no frames to fit")
        features = self.features(dataset.frames)
        n_atoms = dataset.n_atoms.astype(np.float64)
        start = np.array([f.start_energy for f in features])
        self.reference_: ReferenceEnergies = fit_reference(dataset.frames, dataset.energies, start)
        energy_target = (dataset.energies - start - self.reference_.energies(dataset.frames)) / n_atoms
        energy_rows = np.stack([f.energy for f in features]) / n_atoms[:, None]
        # per frame, the matrix and right-hand side of the normal equations; a resample only counts frames differently
        energy_rows *= np.sqrt(1.0 - self.lambda_)
        energy_target *= np.sqrt(1.0 - self.lambda_)
        matrices, sides = [], []
        for f, forces, n, row, target in zip(
            features, dataset.forces, n_atoms, energy_rows, energy_target, strict=True
        ):
            force_weight = self.lambda_ / n
            matrices.append(force_weight * f.forces.T @ f.forces + np.outer(row, row))
            sides.append(force_weight * f.forces.T @ (forces.ravel() - f.start_forces) + target * row)
        normal = np.stack(matrices).reshape(len(dataset), -1), np.stack(sides)

        best = self._solve(np.ones((1, len(dataset))), normal, np.zeros((1, self.n_weights)))
        self.weights_: FloatArray = best
        if self.n_members > 1:
            rng = default_rng(seed)
            resamples = bootstrap(len(dataset), self.n_members, rng)
            counts = np.stack([np.bincount(resample, minlength=len(dataset)) for resample in resamples])
            width = np.sqrt((best**2).mean())
            self.weights_ = self._solve(counts, normal, width * rng.normal(size=(self.n_members, self.n_weights)))
        return self

    def _solve(self, counts: NDArray[Any], normal: tuple[FloatArray, FloatArray], priors: FloatArray) -> FloatArray:
        """Return the weights of members that count the frames so often and are pulled to these priors."""
        shares = counts / counts.sum(axis=1, keepdims=True)
        matrices = (shares @ normal[0]).reshape(len(counts), self.n_weights, self.n_weights)
        solutions = []
        for matrix, side, prior in zip(matrices, shares @ normal[1], priors, strict=True):
            gamma = self.penalty * np.trace(matrix) / self.n_weights
            matrix[np.diag_indices_from(matrix)] += gamma
            solutions.append(cho_solve(cho_factor(matrix), side + gamma * prior))
        return np.stack(solutions)

    def predict(self, frames: Sequence[Atoms]) -> CommitteePredictions:
        """Return energies and forces according to each member.

        Raises
        ------
        ModelError
            If nothing has been fitted, or an element has no network or reference.
        """
        if not hasattr(self, "weights_"):
            raise ModelError("the committee has not been fitted")
        features = self.features(frames)
        constant = self.reference_.energies(frames) + np.array([f.start_energy for f in features])
        energies = constant + self.weights_ @ np.stack([f.energy for f in features]).T
        forces = tuple((f.start_forces + self.weights_ @ f.forces.T).reshape(self.n_members, -1, 3) for f in features)
        return CommitteePredictions(energies, forces)

    def potentials(self) -> tuple[AniPotential, ...]:
        """Return the members as models, e.g. for `tlmc.potentials.TlmcCalculator`."""
        result = []
        for weights in torch.from_numpy(self.weights_):
            networks = dict(self.model.networks)
            for k, place in self._places.items():
                *hidden, last = networks[self.model.symbols[k]]
                change = weights[place]
                moved = Layer(last.weight + change[:-1].view(1, -1, 1), last.bias + change[-1:].view(1, 1, 1))
                networks[self.model.symbols[k]] = (*hidden, moved)
            result.append(replace(self.model, networks=networks, reference=self.reference_))
        return tuple(result)

    def features(self, frames: Sequence[Atoms]) -> list[Features]:
        """Return the features of frames; each geometry is computed once."""
        keys = [frame_hash(frame) for frame in frames]
        new = {key: frame for key, frame in zip(keys, frames, strict=True) if key not in self._features}
        if new:
            cache = build_cache(self.model, list(new.values()), torch.float64)
            start = predict(self.model, list(new.values()))
            for k, key in enumerate(new):
                energy, forces = self._derivatives(cache[k], cache.columns)
                self._features[key] = Features(energy, forces, float(start.energies[k]), start.forces[k].ravel())
        return [self._features[key] for key in keys]

    def _derivatives(self, structure: Structure, columns: Tensor) -> tuple[FloatArray, FloatArray]:
        """Return derivatives of energy and forces by the weights of all output layers."""
        n_atoms, n_columns = structure.G.shape
        energy, forces = np.zeros(self.n_weights), np.zeros((n_atoms, 3, self.n_weights))
        for k in structure.species.unique().tolist():
            if k not in self._places:
                raise ModelError(f"this committee fits no weights for {self.model.symbols[k]}: name it in elements")
            place = self._places[k]
            weights = slice(place.start, place.stop - 1)
            rows = torch.nonzero(structure.species == k).squeeze(1)
            hidden, slopes = _last_hidden(self.model.networks[self.model.symbols[k]], structure.G[rows], columns)
            energy[weights], energy[place.stop - 1] = hidden.sum(0).numpy(), len(rows)
            # F = - J^T dh/dG, for all weights at once; atoms of one species stand together
            jacobian = _rows_of(structure.jacobian, int(rows[0]) * n_columns, len(rows) * n_columns)
            along = jacobian.T @ slopes.transpose(1, 2).reshape(len(rows) * n_columns, -1).numpy()
            # atoms back from the cache's order
            forces[structure.order.numpy(), :, weights] = -along.reshape(n_atoms, 3, -1)
        return self.model.scale * energy, self.model.scale * forces.reshape(3 * n_atoms, -1)


def _rows_of(matrix: bsr_array, start: int, count: int) -> bsr_array:
    """Return consecutive rows of a matrix of blocks."""
    height = matrix.blocksize[0]
    starts = matrix.indptr[start // height : (start + count) // height + 1]
    blocks = slice(starts[0], starts[-1])
    parts = matrix.data[blocks], matrix.indices[blocks], starts - starts[0]
    return bsr_array(parts, shape=(count, matrix.shape[1]))


def _last_hidden(layers: Sequence[Layer], features: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
    """Return activations of the last hidden layer, ``(n, width)``, and by the features, ``(n, width, n_columns)``."""
    weights = [layer.weight[0] for layer in layers[:-1]]
    weights[0] = weights[0][columns]
    activation, slopes = features, []
    for weight, layer in zip(weights, layers[:-1], strict=True):
        activation = torch.celu(activation @ weight + layer.bias[0], CELU_ALPHA)
        slopes.append(activation.clamp(max=0.0) / CELU_ALPHA + 1.0)
    gradient = torch.diag_embed(slopes[-1]) @ weights[-1].t()
    for weight, slope in zip(reversed(weights[:-1]), reversed(slopes[:-1]), strict=True):
        gradient = (gradient * slope[:, None]) @ weight.t()
    return activation, gradient
