r"""ANI atomic environment vectors, their exact derivatives and their sparse Jacobian (thesis eq. 3.2).

For a centre with neighbours at vectors ``v_j`` (length ``d_j``, direction ``u_j``) and the cosine cutoff ``f``:

- radial, one block per neighbour element: ``0.25 exp(-eta_R (d_j - s)^2) f(d_j)``;
- angular, one block per unordered pair of neighbour elements, each pair of neighbours counted once:
  ``2 [(1 + cos(theta - t)) / 2]^zeta exp(-eta_A ((d_j + d_k)/2 - s)^2) f(d_j) f(d_k)`` with
  ``theta = acos(0.95 u_j . u_k)`` (the 0.95 keeps the derivative of acos finite, as in the original).

Derivatives are written out. An angular term is a product ``r(d_j, d_k) a(cos)``, so three outer products carry them:
``dG/dd_j = r_j a``, ``dG/dd_k = r_k a``, ``dG/dcos = r a'``, and ``dcos/dv_j = (u_k - cos u_j) / d_j``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from tlmc.descriptors.pairs import Neighbours
from tlmc.equality import equal_by_content

BLOCK = 16
"""Columns per block of a sparse Jacobian: every AEV sub-block is a multiple of this wide."""


@dataclass(frozen=True)
class AEVParameters:
    """Constants of one ANI descriptor; lengths in Angstrom, angles in rad."""

    r_cut_radial: float
    eta_radial: float
    shifts_radial: tuple[float, ...]
    r_cut_angular: float
    eta_angular: float
    zeta: float
    shifts_angular: tuple[float, ...]
    sections: tuple[float, ...]

    def __post_init__(self) -> None:
        if self.r_cut_angular > self.r_cut_radial:
            raise ValueError(
                f"the angular cutoff {self.r_cut_angular} A must not exceed the radial one, {self.r_cut_radial} A"
            )
        if self.n_radial % BLOCK or self.n_angular % BLOCK:
            raise ValueError(
                f"radial ({self.n_radial}) and angular ({self.n_angular}) functions must be multiples of {BLOCK}"
            )

    @property
    def n_radial(self) -> int:
        """Radial functions per neighbour element."""
        return len(self.shifts_radial)

    @property
    def n_angular(self) -> int:
        """Angular functions per pair of neighbour elements."""
        return len(self.shifts_angular) * len(self.sections)

    def length(self, n_species: int) -> int:
        """Return the number of columns for so many elements (1008 for ANI-2x's seven)."""
        return n_species * self.n_radial + n_species * (n_species + 1) // 2 * self.n_angular

    def columns(self, present: list[int], n_species: int) -> Tensor:
        """Return the columns that can differ from zero when only these species are present, ascending, int64."""
        species = torch.tensor(sorted(present))
        first, second = torch.triu_indices(len(species), len(species))
        pairs = _pair_index(species[first], species[second], n_species)
        radial = (species[:, None] * self.n_radial + torch.arange(self.n_radial)).reshape(-1)
        angular = (pairs[:, None] * self.n_angular + torch.arange(self.n_angular)).reshape(-1)
        return torch.cat([radial, n_species * self.n_radial + angular])


@equal_by_content
class BlockJacobian(NamedTuple):
    """A sparse Jacobian dG/dx made of dense blocks of ``BLOCK`` columns by 3 coordinates, sorted by row."""

    rows: Tensor
    """Block row ``atom * (n_columns // BLOCK) + column // BLOCK``, int64, shape ``(n_blocks,)``."""
    atoms: Tensor
    """Atom whose coordinates the block belongs to, int64, shape ``(n_blocks,)``."""
    values: Tensor
    """Shape ``(n_blocks, BLOCK, 3)``, in 1/Angstrom."""


class _Triples(NamedTuple):
    """Unordered pairs of angular neighbours of one centre, and the factors of their terms."""

    first: Tensor
    """Index of the pair i-j in the neighbour list, ``(n_triples,)``."""
    second: Tensor
    """Index of the pair i-k."""
    block: Tensor
    """``centre * n_species_pairs + pair of species``."""
    cosine: Tensor
    radial: Tensor
    """``r``, ``(n_triples, n_shifts)``."""
    radial_first: Tensor
    """``dr/dd_j``."""
    radial_second: Tensor
    """``dr/dd_k``."""
    angular: Tensor
    """``a``, ``(n_triples, n_sections)``."""
    angular_slope: Tensor
    """``da/dcos``."""


@equal_by_content
class AEVTerms(NamedTuple):
    """What values and derivatives of the AEVs of one frame share."""

    distances: Tensor
    """``(n_pairs,)``."""
    radial_block: Tensor
    """``centre * n_species + species of the neighbour``."""
    radial: Tensor
    """Radial terms, ``(n_pairs, n_radial)``."""
    radial_slope: Tensor
    """Their derivatives by the distance."""
    triples: _Triples


def aev_terms(parameters: AEVParameters, n_species: int, species: Tensor, pairs: Neighbours) -> AEVTerms:
    """Evaluate the terms once, for :func:`aev` and :func:`aev_backward` of the same frame (arguments as there)."""
    distances = torch.linalg.vector_norm(pairs.vectors, dim=1)
    radial, slope = _radial_terms(parameters, distances)
    block = pairs.centre * n_species + species[pairs.neighbour]
    return AEVTerms(distances, block, radial, slope, _triples(parameters, n_species, species, pairs, distances))


def aev(
    parameters: AEVParameters, n_species: int, species: Tensor, pairs: Neighbours, terms: AEVTerms | None = None
) -> Tensor:
    """Return the atomic environment vectors.

    Parameters
    ----------
    parameters
        Constants of the descriptor.
    n_species
        Number of elements with channels.
    species
        Channel of every atom, int64, shape ``(n_atoms,)``.
    pairs
        Neighbours within the radial cutoff.
    terms
        Of :func:`aev_terms`, where they are there already.

    Returns
    -------
    Tensor
        Shape ``(n_atoms, parameters.length(n_species))``, dimensionless.
    """
    n_atoms, n_pairs_of_species = len(species), n_species * (n_species + 1) // 2
    t = terms or aev_terms(parameters, n_species, species, pairs)
    radial = t.radial.new_zeros(n_atoms * n_species, parameters.n_radial)
    radial.index_add_(0, t.radial_block, t.radial)
    angular = t.radial.new_zeros(n_atoms * n_pairs_of_species, parameters.n_angular)
    angular.index_add_(0, t.triples.block, _outer(t.triples.radial, t.triples.angular))
    return torch.cat([radial.view(n_atoms, -1), angular.view(n_atoms, -1)], dim=1)


def aev_backward(
    parameters: AEVParameters,
    n_species: int,
    species: Tensor,
    pairs: Neighbours,
    cotangent: Tensor,
    terms: AEVTerms | None = None,
) -> Tensor:
    """Return the derivative of ``sum(cotangent * aev)`` with respect to every pair vector.

    Forces follow as ``F_i = sum over pairs from i - sum over pairs to i`` of an energy's derivative, the virial as
    ``sum v (x) derivative``.

    Parameters
    ----------
    parameters, n_species, species, pairs, terms
        As in :func:`aev`.
    cotangent
        Shape ``(n_atoms, parameters.length(n_species))``.

    Returns
    -------
    Tensor
        Shape ``(n_pairs, 3)``.
    """
    n_atoms, n_first_angular = len(species), n_species * parameters.n_radial
    terms = terms or aev_terms(parameters, n_species, species, pairs)
    distances, t = terms.distances, terms.triples
    directions = pairs.vectors / distances[:, None]
    radial_cotangent = cotangent[:, :n_first_angular].reshape(n_atoms * n_species, -1)[terms.radial_block]
    result: Tensor = (radial_cotangent * terms.radial_slope).sum(1, keepdim=True) * directions

    h = cotangent[:, n_first_angular:].reshape(-1, parameters.n_angular)[t.block]
    h = h.view(len(h), len(parameters.shifts_angular), len(parameters.sections))
    along_angular, along_slope = _contract(h, t.angular), _contract(h, t.angular_slope)
    first = (along_angular * t.radial_first).sum(1, keepdim=True)
    second = (along_angular * t.radial_second).sum(1, keepdim=True)
    turn = (along_slope * t.radial).sum(1, keepdim=True)
    u_j, u_k, cosine = directions[t.first], directions[t.second], t.cosine[:, None]
    result.index_add_(0, t.first, first * u_j + turn * (u_k - cosine * u_j) / distances[t.first, None])
    result.index_add_(0, t.second, second * u_k + turn * (u_j - cosine * u_k) / distances[t.second, None])
    return result


def aev_jacobian(parameters: AEVParameters, n_species: int, species: Tensor, pairs: Neighbours) -> BlockJacobian:
    """Return the Jacobian of the AEVs with respect to all positions, images of one atom summed.

    Parameters
    ----------
    parameters, n_species, species, pairs
        As in :func:`aev`.
    """
    n_atoms, n_radial, n_angular = len(species), parameters.n_radial, parameters.n_angular
    distances = torch.linalg.vector_norm(pairs.vectors, dim=1)
    directions = pairs.vectors / distances[:, None]
    _, slope = _radial_terms(parameters, distances)
    moved = slope[:, :, None] * directions[:, None, :]
    block = pairs.centre * n_species + species[pairs.neighbour]
    radial = _sum_blocks(
        torch.cat([block, block]), torch.cat([pairs.neighbour, pairs.centre]), torch.cat([moved, -moved]), n_atoms
    )

    t = _triples(parameters, n_species, species, pairs, distances)
    u_j, u_k, cosine = directions[t.first], directions[t.second], t.cosine[:, None]
    turn = _outer(t.radial, t.angular_slope)[:, :, None]
    first = _outer(t.radial_first, t.angular)[:, :, None] * u_j[:, None, :]
    first += turn * ((u_k - cosine * u_j) / distances[t.first, None])[:, None, :]
    second = _outer(t.radial_second, t.angular)[:, :, None] * u_k[:, None, :]
    second += turn * ((u_j - cosine * u_k) / distances[t.second, None])[:, None, :]
    angular = _sum_blocks(
        torch.cat([t.block, t.block, t.block]),
        torch.cat([pairs.neighbour[t.first], pairs.neighbour[t.second], pairs.centre[t.first]]),
        torch.cat([first, second, -(first + second)]),
        n_atoms,
    )

    # from blocks per species (or pair of species) to blocks of BLOCK columns of the whole AEV
    per_atom = parameters.length(n_species) // BLOCK
    n_pairs_of_species = n_species * (n_species + 1) // 2
    rows, atoms, values = [], [], []
    for (key, atom, value), kinds, width, offset in (
        (radial, n_species, n_radial, 0),
        (angular, n_pairs_of_species, n_angular, n_species * n_radial),
    ):
        parts = width // BLOCK
        start = key // kinds * per_atom + offset // BLOCK + key % kinds * parts
        rows.append((start[:, None] + torch.arange(parts)).reshape(-1))
        atoms.append(atom.repeat_interleave(parts))
        values.append(value.reshape(-1, BLOCK, 3))
    row = torch.cat(rows)
    order = torch.argsort(row, stable=True)
    return BlockJacobian(row[order], torch.cat(atoms)[order], torch.cat(values)[order])


def _sum_blocks(block: Tensor, atom: Tensor, values: Tensor, n_atoms: int) -> tuple[Tensor, Tensor, Tensor]:
    """Add up values (n, width, 3) that share block and atom; return unique blocks, atoms and sums."""
    keys, inverse = torch.unique(block * n_atoms + atom, return_inverse=True)
    total = values.new_zeros(len(keys), values.shape[1] * 3)
    total.index_add_(0, inverse, values.flatten(1))
    return keys // n_atoms, keys % n_atoms, total.view(-1, values.shape[1], 3)


def _outer(left: Tensor, right: Tensor) -> Tensor:
    """Return the outer products of two families of vectors, flattened to ``(n, n_left * n_right)``."""
    return (left[:, :, None] * right[:, None, :]).flatten(1)


def _contract(matrices: Tensor, vectors: Tensor) -> Tensor:
    """Return ``matrices @ vectors`` for many tiny ones, (n, s, a) by (n, a), a column at a time: faster than a bmm."""
    result = matrices[:, :, 0] * vectors[:, 0, None]
    for a in range(1, vectors.shape[1]):
        result.addcmul_(matrices[:, :, a], vectors[:, a, None])
    return result


def _pair_index(a: Tensor, b: Tensor, n_species: int) -> Tensor:
    """Return the place of an ordered pair ``a <= b`` in the row-wise upper triangle."""
    index: Tensor = a * n_species - a * (a - 1) // 2 + b - a
    return index


def _cutoff(distances: Tensor, r_cut: float) -> tuple[Tensor, Tensor]:
    """Return the cosine cutoff and its slope; both are zero from ``r_cut`` on."""
    inside = distances < r_cut
    phase = distances * (math.pi / r_cut)
    value = torch.where(inside, 0.5 * torch.cos(phase) + 0.5, 0.0)
    return value, torch.where(inside, -0.5 * math.pi / r_cut * torch.sin(phase), 0.0)


def _radial_terms(parameters: AEVParameters, distances: Tensor) -> tuple[Tensor, Tensor]:
    """Return radial terms and their slopes, both ``(n_pairs, n_radial)``."""
    cutoff, cutoff_slope = _cutoff(distances, parameters.r_cut_radial)
    offset = distances[:, None] - distances.new_tensor(parameters.shifts_radial)
    gaussian = 0.25 * torch.exp(-parameters.eta_radial * offset**2)
    slope = cutoff_slope[:, None] - 2.0 * parameters.eta_radial * offset * cutoff[:, None]
    return gaussian * cutoff[:, None], gaussian * slope


def _triples(
    parameters: AEVParameters, n_species: int, species: Tensor, pairs: Neighbours, distances: Tensor
) -> _Triples:
    """List the pairs of angular neighbours of every centre and evaluate the factors of their terms."""
    near = torch.nonzero(distances < parameters.r_cut_angular).squeeze(1)
    centre = pairs.centre[near]
    counts = torch.bincount(centre, minlength=len(species))
    # neighbour number q of a centre with c neighbours is paired with the c - 1 - q that follow it in the list
    last = torch.cumsum(counts, 0)[centre]
    places = torch.arange(len(near), device=near.device)
    followers = last - 1 - places
    first = torch.repeat_interleave(places, followers)
    start = torch.cumsum(followers, 0) - followers
    second = first + 1 + torch.arange(len(first), device=near.device) - start[first]

    side = species[pairs.neighbour[near]]
    low, high = torch.minimum(side[first], side[second]), torch.maximum(side[first], side[second])
    block = centre[first] * (n_species * (n_species + 1) // 2) + _pair_index(low, high, n_species)

    d_near = distances[near]
    cutoff, cutoff_slope = _cutoff(d_near, parameters.r_cut_angular)
    directions = pairs.vectors[near] / d_near[:, None]
    cosine = (directions[first] * directions[second]).sum(1)

    d_j, d_k = d_near[first], d_near[second]
    f_j, f_k = cutoff[first, None], cutoff[second, None]
    offset = 0.5 * (d_j + d_k)[:, None] - d_near.new_tensor(parameters.shifts_angular)
    gaussian = torch.exp(-parameters.eta_angular * offset**2)
    gaussian_slope = -parameters.eta_angular * offset * gaussian * f_j * f_k  # the half of (d_j + d_k)/2 is in it

    # theta = acos(0.95 cosine) by its cosine and sine, so that cos(theta - t) needs no trigonometry per triple
    cos_theta = (0.95 * cosine)[:, None]
    sin_theta = torch.sqrt(1.0 - cos_theta**2)
    sections = d_near.new_tensor(parameters.sections)
    base = 0.5 + 0.5 * (cos_theta * torch.cos(sections) + sin_theta * torch.sin(sections)).clamp_(min=-1.0)
    power = base ** (parameters.zeta - 1.0)
    sin_angle = sin_theta * torch.cos(sections) - cos_theta * torch.sin(sections)
    bend = -0.95 / sin_theta
    return _Triples(
        first=near[first],
        second=near[second],
        block=block,
        cosine=cosine,
        radial=gaussian * f_j * f_k,
        radial_first=gaussian_slope + gaussian * cutoff_slope[first, None] * f_k,
        radial_second=gaussian_slope + gaussian * f_j * cutoff_slope[second, None],
        angular=2.0 * power * base,
        angular_slope=-parameters.zeta * power * sin_angle * bend,
    )
