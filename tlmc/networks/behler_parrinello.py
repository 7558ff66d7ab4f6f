r"""Behler-Parrinello network: one network per element on a descriptor of the atom's surroundings (thesis 2.3.4).

.. math:: E = \sum_i \varepsilon_{Z_i}(G_i), \qquad F = -J^T g, \qquad
    g = \partial E/\partial G, \quad J = \partial G/\partial x

The descriptor decides what an atom can see: beyond its cutoff nothing, so that long-range interactions are missing. Its
values and derivatives depend on the geometry alone; they are computed once per frame and kept in memory, and what an
epoch needs are small networks and products with ``J``. (:mod:`tlmc.training` does the same on disk for the ANI networks
and writes the derivative of the forces out by hand; here autograd takes it, which is shorter and slower.)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, NamedTuple

import torch
from ase import Atoms
from torch import Tensor

from tlmc.data.dataset import Dataset
from tlmc.descriptors.base import LocalDescriptor
from tlmc.equality import equal_by_content
from tlmc.errors import ConfigError
from tlmc.networks.atomistic import AtomisticNetwork, Output, sum_by_structure
from tlmc.networks.mlp import MLP, ActivationName

_SMALLEST_SPREAD: Final = 1e-3
"""Columns that vary less than this part of the column that varies most are not blown up to unit variance."""


@equal_by_content
class Described(NamedTuple):
    """Descriptors of the atoms of one frame, and their derivatives."""

    species: Tensor
    """Channel of every atom's element, int64, shape ``(n_atoms,)``."""
    G: Tensor
    """Shape ``(n_atoms, n_features)``."""
    rows: Tensor
    """Atom whose descriptor an entry of the Jacobian belongs to, int64, shape ``(n_entries,)``."""
    atoms: Tensor
    """Atom that is moved, int64, shape ``(n_entries,)``."""
    jacobian: Tensor
    """Feature per Angstrom, shape ``(n_entries, n_features, 3)``."""


class BehlerParrinelloNetwork(AtomisticNetwork[Described]):
    """One fully connected network per element, their outputs summed.

    Inputs are standardised per element and column with mean and spread of the training part.

    Parameters
    ----------
    descriptor
        Any local descriptor, one row per atom: symmetry functions, SOAP, AEVs; its elements are those of the network.
    hidden
        Neurons of the hidden layers.
    activation
        One of :data:`tlmc.networks.ACTIVATIONS`. With ReLU the forces, which are derivatives, jump.
    generator
        Source of the weights; a new one of seed 0 if not given.
    dtype
        Precision of weights and of the descriptors kept.

    Raises
    ------
    ConfigError
        If the descriptor is averaged over the atoms, or a size is out of range.
    """

    mean: Tensor
    """Of every element's columns, shape ``(n_species, n_features)``."""
    spread: Tensor
    """Standard deviation of every element's columns, shape ``(n_species, n_features)``."""

    def __init__(
        self,
        descriptor: LocalDescriptor,
        hidden: Sequence[int] = (32, 32),
        activation: ActivationName = "tanh",
        generator: torch.Generator | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(descriptor.species, dtype)
        if descriptor.averaged:
            raise ConfigError(f"a Behler-Parrinello network needs a row per atom; {descriptor} is averaged over atoms")
        self.descriptor = descriptor
        generator = generator or torch.Generator().manual_seed(0)
        sizes = (descriptor.n_features, *hidden, 1)
        self.networks = torch.nn.ModuleDict(
            {symbol: MLP(sizes, activation, "glorot", generator, dtype) for symbol in self.species}
        )
        shape = (len(self.species), descriptor.n_features)
        self.register_buffer("mean", torch.zeros(shape, dtype=dtype))
        self.register_buffer("spread", torch.ones(shape, dtype=dtype))

    def prepare(self, frames: Sequence[Atoms]) -> list[Described]:
        """Compute descriptors and Jacobians; see the base class."""
        result = []
        for frame in frames:
            species = self.channels(frame)
            environments = self.descriptor.environments(frame)
            G, J = self.descriptor.values(environments).detach(), self.descriptor.jacobian(environments)
            result.append(Described(species, G.to(self.dtype), J.rows, J.atoms, J.values.detach().to(self.dtype)))
        return result

    def fit_scales(self, dataset: Dataset, prepared: Sequence[Described]) -> None:
        """Fit offsets and scale, and standardise the columns; see the base class."""
        super().fit_scales(dataset, prepared)
        G, species = torch.cat([frame.G for frame in prepared]), torch.cat([frame.species for frame in prepared])
        for k in range(len(self.species)):
            columns = G[species == k]
            spread = columns.std(0, correction=0)
            self.mean[k] = columns.mean(0)
            smallest = _SMALLEST_SPREAD * spread.max()
            # columns that never change (an element that is never near) stay what they are
            self.spread[k] = torch.where(spread > smallest, spread, smallest if smallest > 0 else 1.0)

    def forward(self, prepared: Sequence[Described], *, create_graph: bool = False) -> Output:
        """Return energies and forces; see the base class."""
        sizes = [len(frame.species) for frame in prepared]
        species, G = (torch.cat([frame[k] for frame in prepared]) for k in (0, 1))
        G.requires_grad_()
        with torch.enable_grad():
            inputs = (G - self.mean[species]) / self.spread[species]
            atomic = G.new_zeros(len(G))
            for k, symbol in enumerate(self.species):
                mine = torch.nonzero(species == k).squeeze(1)
                atomic = atomic.index_add(0, mine, self.scale * self.networks[symbol](inputs[mine]).squeeze(1))
            (g,) = torch.autograd.grad(atomic.sum(), G, create_graph=create_graph)
        forces = [_minus_transposed(frame, part) for frame, part in zip(prepared, g.split(sizes), strict=True)]
        return Output(atomic, sum_by_structure(atomic, sizes), torch.cat(forces))


def _minus_transposed(frame: Described, g: Tensor) -> Tensor:
    """Return the forces ``-J^T g`` of one frame, shape ``(n_atoms, 3)``."""
    per_entry = torch.bmm(g[frame.rows, None, :], frame.jacobian).squeeze(1)
    return per_entry.new_zeros(len(frame.species), 3).index_add(0, frame.atoms, -per_entry)
