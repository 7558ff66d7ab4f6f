r"""Deep tensor network: representations of atoms learned end to end (Schuett et al. 2017; thesis 2.3.5).

There is no descriptor. An atom begins as a learned vector of its element and is changed ``T`` times by all atoms around
it, each time by the same rule:

.. math::

    c_i^{(0)} = c_{Z_i}, \qquad
    c_i^{(t+1)} = c_i^{(t)} + \sum_{j \ne i} f(d_{ij})\, v_{ij}^{(t)}, \qquad
    v_{ij}^{(t)} = \tanh\left[ W^{fc} \left( (W^{cf} c_j^{(t)} + b^{f_1}) \circ (W^{df} \hat d_{ij} + b^{f_2}) \right)
    \right]

with distances spread over Gaussians, :math:`\hat d_k = \exp(-(d - \mu_k)^2 / 2\sigma^2)`. The elementwise product is a
tensor contraction in factored form: each of the factors couples one feature of the neighbour with one of the distance.
A single pass sees pairs; in the second an atom is changed by neighbours that have been changed by *their* neighbours,
so that angles (by way of the distance between two neighbours), and in further passes larger bodies, come in, as far as
``T`` cutoffs. A small network at the end makes
the energy, :math:`\varepsilon_i = w^T \tanh(W c_i^{(T)} + b) + b'`.

The original is for molecules and lets all pairs interact. Here the cosine cutoff :math:`f` ends the interaction
smoothly and neighbours are counted with their periodic images, so that crystals of any cell can be treated.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from ase import Atoms
from torch import Tensor

from tlmc.descriptors.pairs import neighbours
from tlmc.equality import equal_by_content
from tlmc.errors import ConfigError
from tlmc.networks.atomistic import AtomisticNetwork, Output, sum_by_structure
from tlmc.networks.mlp import MLP


@equal_by_content
class Surroundings(NamedTuple):
    """The neighbours of the atoms of one frame."""

    species: Tensor
    """Channel of every atom's element, int64, shape ``(n_atoms,)``."""
    centre: Tensor
    """Index of the centre of every pair, int64, shape ``(n_pairs,)``."""
    neighbour: Tensor
    """Index of the atom that a pair leads to, int64, shape ``(n_pairs,)``."""
    vectors: Tensor
    """``x_j + shift - x_i`` in Angstrom, shape ``(n_pairs, 3)``."""


class DeepTensorNetwork(AtomisticNetwork[Surroundings]):
    """Learned embeddings, ``n_passes`` interaction passes, and a network for the energy of an atom.

    Parameters
    ----------
    species
        Elements with an embedding.
    r_cut
        Cutoff in Angstrom.
    n_passes
        ``T``; none leaves each atom the energy of its element.
    n_features
        Length of an atom's vector (30 in the paper).
    n_factors
        Length of the product in an interaction (60 in the paper).
    spacing
        Distance between the Gaussians, and their width, in Angstrom (0.2 in the paper).
    n_hidden
        Neurons of the network for the energy.
    generator
        Source of the weights; a new one of seed 0 if not given.
    dtype
        Precision.

    Raises
    ------
    ConfigError
        If a size is out of range or an element unknown.
    """

    centres: Tensor
    """Of the Gaussians, in Angstrom, shape ``(n_gaussians,)``."""

    def __init__(
        self,
        species: Sequence[str],
        r_cut: float = 5.0,
        n_passes: int = 3,
        n_features: int = 30,
        n_factors: int = 60,
        spacing: float = 0.2,
        n_hidden: int = 15,
        generator: torch.Generator | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(species, dtype)
        sizes = {"n_features": n_features, "n_factors": n_factors, "n_hidden": n_hidden, "n_passes + 1": n_passes + 1}
        for name, value in sizes.items():
            if value < 1:
                raise ConfigError(f"{name} of a deep tensor network must be at least 1, got {value}")
        if not 0 < spacing <= r_cut:
            raise ConfigError(f"spacing must be positive and at most r_cut = {r_cut} A, got {spacing} A")
        self.r_cut, self.n_passes, self.spacing = r_cut, n_passes, spacing
        generator = generator or torch.Generator().manual_seed(0)
        self.register_buffer("centres", torch.arange(0.0, r_cut + spacing, spacing, dtype=dtype))

        def drawn(n_out: int, n_in: int, deviation: float) -> torch.nn.Parameter:
            normal = torch.randn(n_out, n_in, generator=generator, dtype=torch.float64)
            return torch.nn.Parameter((deviation * normal).to(dtype))

        n_gaussians = len(self.centres)
        self.embedding = drawn(len(self.species), n_features, 1.0)
        self.from_atom = drawn(n_factors, n_features, math.sqrt(2.0 / (n_factors + n_features)))
        self.from_atom_bias = torch.nn.Parameter(torch.zeros(n_factors, dtype=dtype))
        self.from_distance = drawn(n_factors, n_gaussians, math.sqrt(2.0 / (n_factors + n_gaussians)))
        self.from_distance_bias = torch.nn.Parameter(torch.zeros(n_factors, dtype=dtype))
        self.to_atom = drawn(n_features, n_factors, math.sqrt(2.0 / (n_features + n_factors)))
        self.energy = MLP((n_features, n_hidden, 1), "tanh", "glorot", generator, dtype)

    def prepare(self, frames: Sequence[Atoms]) -> list[Surroundings]:
        """List the neighbours within the cutoff, periodic images included; see the base class."""
        return [Surroundings(self.channels(frame), *neighbours(frame, self.r_cut, self.dtype)) for frame in frames]

    def forward(self, prepared: Sequence[Surroundings], *, create_graph: bool = False) -> Output:
        """Return energies and forces; see the base class."""
        batch, sizes = _merge(prepared), [len(frame.species) for frame in prepared]
        vectors = batch.vectors.requires_grad_()
        with torch.enable_grad():
            final = self.representations(batch._replace(vectors=vectors))[-1]
            atomic = self.scale * self.energy(final).squeeze(1)
            # without a pass, or without neighbours, the energy does not depend on the vectors
            (slope,) = torch.autograd.grad(
                atomic.sum(), vectors, create_graph=create_graph, allow_unused=True, materialize_grads=True
            )
        # an atom's coordinates enter as a centre (minus) and as a neighbour (plus)
        forces = slope.new_zeros(len(batch.species), 3)
        forces = forces.index_add(0, batch.centre, slope).index_add(0, batch.neighbour, -slope)
        return Output(atomic, sum_by_structure(atomic, sizes), forces)

    def representations(self, surroundings: Surroundings) -> list[Tensor]:
        """Return the vectors of the atoms before the first pass and after each.

        Parameters
        ----------
        surroundings
            Neighbours of one frame (or of several, numbered through).

        Returns
        -------
        list of Tensor
            ``n_passes + 1`` of shape ``(n_atoms, n_features)``.
        """
        distances = torch.linalg.vector_norm(surroundings.vectors, dim=1)
        filters = torch.addmm(self.from_distance_bias, self.expand(distances), self.from_distance.T)
        cutoff = 0.5 + 0.5 * torch.cos(math.pi / self.r_cut * distances)
        c = self.embedding[surroundings.species]
        result = [c]
        for _ in range(self.n_passes):
            factors = torch.addmm(self.from_atom_bias, c, self.from_atom.T)
            v = torch.tanh((factors[surroundings.neighbour] * filters) @ self.to_atom.T)
            c = c.index_add(0, surroundings.centre, cutoff[:, None] * v)
            result.append(c)
        return result

    def expand(self, distances: Tensor) -> Tensor:
        """Spread distances, shape ``(n,)``, over the Gaussians, shape ``(n, n_gaussians)``."""
        return torch.exp(-0.5 * ((distances[:, None] - self.centres) / self.spacing) ** 2)


def _merge(prepared: Sequence[Surroundings]) -> Surroundings:
    """Put frames below each other and number their atoms through."""
    first, parts = 0, []
    for frame in prepared:
        parts.append(frame._replace(centre=frame.centre + first, neighbour=frame.neighbour + first))
        first += len(frame.species)
    return Surroundings(*(torch.cat(column) for column in zip(*parts, strict=True)))
