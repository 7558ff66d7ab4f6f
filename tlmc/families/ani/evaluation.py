"""Energies, forces and virial of frames, and energies according to each member of an ensemble."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from ase import Atoms
from numpy.typing import NDArray
from torch import Tensor

from tlmc.arguments import checked
from tlmc.descriptors.aev import aev, aev_backward, aev_terms
from tlmc.descriptors.pairs import Neighbours
from tlmc.errors import ModelError
from tlmc.families.ani.model import AniPotential, Layer
from tlmc.families.ani.network import backward, forward
from tlmc.potentials.calculator import checked_pairs
from tlmc.potentials.model import Evaluation


@checked
def member_energies(model: AniPotential, frame: Atoms) -> NDArray[np.float64]:
    """Return the energy of a frame according to each member of the ensemble, eV, shape ``(members,)``.

    Only the mean of these numbers is a prediction, unless the members were trained each by itself
    (:attr:`AniPotential.committee`); for a spread, use `energy_spread`, which makes sure of that.

    Raises
    ------
    ModelError, DataError
        As in `predict`.
    """
    pairs, _ = checked_pairs(model, frame, "frame")
    species = model.species(frame)
    features = aev(model.aev, len(model.symbols), species, pairs)
    if model.enrichment is not None:
        features = torch.cat([features, model.enrichment.columns(frame).to(features.dtype)], dim=1)
    total = torch.zeros(model.members, dtype=torch.float64)
    for s, rows in _by_species(species):
        total += forward(model.networks[model.symbols[s]], features[rows])[0].to(torch.float64).sum(1)
    energies: NDArray[np.float64] = (model.scale * total + model.offsets(frame).sum()).numpy()
    return energies


@checked
def energy_spread(model: AniPotential, frames: Sequence[Atoms]) -> NDArray[np.float64]:
    r"""Return the disagreement of the members, :math:`\sigma / \sqrt{N}` (query by committee; thesis 2.4).

    :math:`\sigma` is the sample standard deviation (``members - 1``) of the energies of a frame of N atoms; dividing by
    the root of N follows ANI, since independent errors of atoms grow like that.

    Returns
    -------
    NDArray
        eV per root of an atom, shape ``(n_frames,)``.

    Raises
    ------
    ModelError
        If the model has one member, or members that are no committee, as those of a fine-tuned ensemble
        (:attr:`AniPotential.committee`), or as in `predict`.
    """
    if model.members < 2:
        raise ModelError(f"{model.name} has {model.members} member: a spread needs an ensemble, e.g. ani2x")
    model.check_committee()
    return np.array([member_energies(model, frame).std(ddof=1) / np.sqrt(len(frame)) for frame in frames])


class AniEvaluator:
    """Evaluates frames one by one; keeps the networks of the elements it has met, without columns that are zero."""

    def __init__(self, model: AniPotential, device: torch.device) -> None:
        self._model, self._device = model, device
        self._networks: dict[tuple[int, ...], _ActiveNetworks] = {}

    def __call__(self, frame: Atoms, pairs: Neighbours) -> Evaluation:
        """Return energies of the atoms, forces and virial of one frame."""
        model, device = self._model, self._device
        channels = model.species(frame)
        # elements that are absent give columns of zeros: number those present, as if the model knew no others
        present, species = torch.unique(channels, return_inverse=True)
        n_species, key = len(present), tuple(present.tolist())
        if key not in self._networks:
            self._networks[key] = _ActiveNetworks(model, key, device)
        species, pairs = species.to(device), Neighbours(*(part.to(device) for part in pairs))
        terms = aev_terms(model.aev, n_species, species, pairs)
        features, pull_back = aev(model.aev, n_species, species, pairs, terms), None
        if model.enrichment is not None:
            columns, pull_back = model.enrichment.columns_and_slopes(frame)
            features = torch.cat([features, columns.to(features)], dim=1)
        output = torch.zeros(len(frame), dtype=torch.float64, device=device)
        gradient = torch.zeros_like(features)
        for s, rows in _by_species(species):
            layers = self._networks[key].layers[s]
            energies, slopes = forward(layers, features[rows])
            output[rows] = energies.to(torch.float64).mean(0)
            gradient[rows] = backward(layers, slopes)
        # dE/dv of every pair; a pair vector is x_j + shift - x_i
        n_own = model.aev.length(n_species)
        own, extra = gradient.split([n_own, features.shape[1] - n_own], dim=1)
        slope = aev_backward(model.aev, n_species, species, pairs, own.contiguous(), terms).to(torch.float64)
        slope *= model.scale
        forces = torch.zeros(len(frame), 3, dtype=torch.float64, device=device)
        forces.index_add_(0, pairs.centre, slope)
        forces.index_add_(0, pairs.neighbour, -slope)
        # a strain e turns every v into (1 + e) v; each pair is listed from both ends, so nothing is counted twice
        virial = slope.T @ pairs.vectors.to(torch.float64)
        forces, virial, output = forces.cpu(), virial.cpu(), output.cpu()
        if pull_back is not None:
            richer = pull_back(extra.cpu())
            forces += richer.forces * model.scale
            virial += richer.virial * model.scale
        return Evaluation(model.scale * output, forces, virial)


class _ActiveNetworks:
    """Networks of the elements of one frame, first layers without the columns that are zero in it."""

    def __init__(self, model: AniPotential, present: Sequence[int], device: torch.device) -> None:
        columns = model.columns(present)
        self.layers = []
        for s in present:
            first, *others = model.networks[model.symbols[s]]
            layers = (Layer(first.weight[:, columns].contiguous(), first.bias), *others)
            self.layers.append(tuple(Layer(layer.weight.to(device), layer.bias.to(device)) for layer in layers))


def _by_species(species: Tensor) -> list[tuple[int, Tensor]]:
    """Return every species present with the atoms it has."""
    return [(int(s), torch.nonzero(species == s).squeeze(1)) for s in species.unique()]
