r"""Atom-centred symmetry functions (Behler, J. Chem. Phys. 134, 074106, 2011; thesis eqs. 2.15-2.17).

With the cosine cutoff ``f(d) = (1 + cos(pi d / r_cut)) / 2``, zero beyond ``r_cut``, a centre with neighbours at
vectors ``v_j`` (length ``d_j``) and ``d_jk = |v_j - v_k|`` has

- ``G2``, radial, for each neighbour element: ``sum_j exp(-eta (d_j - r_s)^2) f(d_j)``;
- ``G4``, angular, for each pair of neighbour elements (the thesis' G3):
  ``2^(1-zeta) sum_{j<k} (1 + lambda cos)^zeta exp(-eta (d_j^2 + d_k^2 + d_jk^2)) f(d_j) f(d_k) f(d_jk)``;
- ``G5``, the same without ``d_jk``, which also knows pairs of neighbours that are far from each other.

**Each pair of neighbours counts once**, as in DScribe. Behler's sum runs over all j and all k, and is twice as large.
``eta = 0, r_s = 0`` makes G2 the sum of the cutoffs, which Behler calls G1.

Values that are not to be differentiated come from compiled loops (:mod:`tlmc.descriptors.compiled_sums`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from tlmc.descriptors import compiled_sums
from tlmc.descriptors.base import Environments, LocalDescriptor, SparseJacobian, chunks, gather_slopes
from tlmc.errors import ConfigError

PAIRS_AT_ONCE = 500
"""Neighbours per chunk of the derivatives: their triples should stay in the processor's cache."""
PLACES_AT_ONCE = 30_000
"""Pairs of neighbours per thread whose angular terms are kept together, for the same reason."""


class _Triples(NamedTuple):
    """Pairs of neighbours of one centre, once each, and what their functions are made of."""

    first: Tensor
    """Index of the pair i-j in the chunk, ``(n_triples,)``."""
    second: Tensor
    """Index of the pair i-k."""
    apart: Tensor
    """Distance from j to k."""
    cosine: Tensor
    """Of the angle at i."""


class SymmetryFunctions(LocalDescriptor):
    """Behler-Parrinello symmetry functions of atoms.

    Parameters
    ----------
    species
        Elements that have channels. The element of the centre itself is not described.
    r_cut
        Cutoff in Angstrom.
    radial
        ``(eta, r_s)`` of every G2, in 1/Angstrom^2 and Angstrom.
    angular
        ``(eta, zeta, lambda_)`` of every G4; ``lambda_`` is 1 or -1.
    angular_wide
        The same for every G5.
    dtype
        Precision of the result.

    Notes
    -----
    The order of the features is DScribe's: G2 for each neighbour element, elements by ascending atomic number; then
    G4 and G5 for each pair of elements, pairs (0, 0), (1, 0), (1, 1), (2, 0) ... DScribe always puts G1 before G2.
    """

    def __init__(
        self,
        species: Sequence[str | int],
        r_cut: float,
        radial: Sequence[tuple[float, float]],
        angular: Sequence[tuple[float, float, float]] = (),
        angular_wide: Sequence[tuple[float, float, float]] = (),
        dtype: torch.dtype = torch.float64,
    ) -> None:
        super().__init__(species, dtype)
        if r_cut <= 0.0:
            raise ConfigError(f"r_cut must be positive, got {r_cut}")
        if not (radial or angular or angular_wide):
            raise ConfigError("there is no symmetry function: give radial, angular or angular_wide")
        for eta, *_ in (*radial, *angular, *angular_wide):
            if eta < 0.0:
                raise ConfigError(f"eta must not be negative, got {eta}")
        for _, zeta, lambda_ in (*angular, *angular_wide):
            if zeta < 1.0 or lambda_ not in (-1.0, 1.0):
                raise ConfigError(f"zeta must be 1 or more and lambda_ 1 or -1, got {zeta} and {lambda_}")
        self.r_cut, self.radial = r_cut, tuple(radial)
        self.angular, self.angular_wide = tuple(angular), tuple(angular_wide)
        # as the compiled functions take them
        self._radial_constants = torch.tensor(self.radial, dtype=torch.float64)
        self._angular_constants = torch.tensor((*self.angular, *self.angular_wide), dtype=torch.float64)

    @property
    def reach(self) -> float:
        """Distance in Angstrom beyond which atoms do not count: ``r_cut``."""
        return self.r_cut

    @property
    def n_features(self) -> int:
        """Length of a row, ``S n_radial + S (S + 1) / 2 n_angular`` for S elements."""
        n_species = len(self.species)
        n_angular = len(self.angular) + len(self.angular_wide)
        return n_species * len(self.radial) + n_species * (n_species + 1) // 2 * n_angular

    @property
    def feature_names(self) -> list[str]:
        """``G2[C,eta=1,r_s=2]`` and ``G4[H,C,eta=0.1,zeta=2,lambda=-1]``."""
        radial = [f"eta={eta:g},r_s={r_s:g}" for eta, r_s in self.radial]
        angular = [
            (kind, f"eta={eta:g},zeta={zeta:g},lambda={lambda_:g}")
            for kind, functions in (("G4", self.angular), ("G5", self.angular_wide))
            for eta, zeta, lambda_ in functions
        ]
        names = [f"G2[{symbol},{which}]" for symbol in self.species for which in radial]
        for high, second in enumerate(self.species):
            for first in self.species[: high + 1]:
                names += [f"{kind}[{first},{second},{which}]" for kind, which in angular]
        return names

    def values(self, environments: Environments) -> Tensor:
        """Return the functions, ``(n_centres, n_features)``, differentiable (twice) in ``environments.vectors``."""
        if compiled_sums.can_serve(environments):
            functions = self._radial_constants, self._angular_constants, len(self.angular)
            return compiled_sums.symmetry_values(
                environments, len(self.species), self.n_features, self.r_cut, *functions
            )
        distances = torch.linalg.vector_norm(environments.vectors, dim=1)
        cutoff, _ = _cosine_cutoff(distances, self.r_cut)
        n_centres, n_species = len(environments.species), len(self.species)
        terms = self._radial_terms(distances)[0] * cutoff[:, None]
        place = environments.centre * n_species + environments.neighbour_species
        result = [terms.new_zeros(n_centres * n_species, len(self.radial)).index_add(0, place, terms)]
        if self.angular or self.angular_wide:
            result.append(self._angular(environments, distances, cutoff))
        return torch.cat([part.view(n_centres, -1) for part in result], dim=1)

    def jacobian(self, environments: Environments) -> SparseJacobian:
        """Return the exact derivatives of :meth:`values` with respect to the positions; see the base class."""
        n_species = len(self.species)
        first_angular = n_species * len(self.radial)
        distances = torch.linalg.vector_norm(environments.vectors, dim=1)
        columns = torch.arange(len(self.radial))
        parts = []
        for first, last, begin, end in chunks(environments, PAIRS_AT_ONCE):
            d, species = distances[begin:end], environments.neighbour_species[begin:end]
            cutoff, cutoff_slope = _cosine_cutoff(d, self.r_cut)
            value, slope = self._radial_terms(d)
            slope = slope * cutoff[:, None] + value * cutoff_slope[:, None]
            # derivatives of the centre's row with respect to the vectors of its pairs
            moved = d.new_zeros(end - begin, self.n_features, 3)
            place = species[:, None] * len(self.radial) + columns
            outward = environments.vectors[begin:end] / d[:, None]
            moved[torch.arange(end - begin)[:, None], place] = slope[:, :, None] * outward[:, None]
            if self.angular or self.angular_wide:
                width = len(self.angular) + len(self.angular_wide)
                by_species = self._angular_slopes(environments, begin, end, d, cutoff, cutoff_slope)
                block = _pair_index(species[:, None], torch.arange(n_species))
                place = first_angular + block[:, :, None] * width + torch.arange(width)
                moved[torch.arange(end - begin)[:, None, None], place] = by_species
            parts.append(gather_slopes(environments, (first, last, begin, end), moved))
        return SparseJacobian(*(torch.cat(column) for column in zip(*parts, strict=True)))

    def _radial_terms(self, distances: Tensor) -> tuple[Tensor, Tensor]:
        """Return the Gaussians of G2 and their slopes, both ``(n_pairs, n_radial)``."""
        eta, shift = distances.new_tensor(self.radial).view(-1, 2).T
        offset = distances[:, None] - shift
        value = torch.exp(-eta * offset.square())
        return value, -2.0 * eta * offset * value

    def _angular(self, environments: Environments, distances: Tensor, cutoff: Tensor) -> Tensor:
        """Return the sums of G4 and G5, ``(n_centres, n_species_pairs * n_angular)``.

        Neighbours of a centre against each other, as square matrices: twice the number of pairs, but no lists of them,
        and sums over elements are matrix products.
        """
        n_species, n_centres = len(self.species), len(environments.species)
        counts = torch.bincount(environments.centre, minlength=n_centres)
        width = max(int(counts.max()), 1)
        slot = (torch.arange(n_centres) * width + counts - torch.cumsum(counts, 0))[environments.centre]
        slot = slot + torch.arange(len(slot))
        # the empty places have the weight zero and a distance that does no harm
        d = torch.ones(n_centres * width, dtype=distances.dtype).index_copy(0, slot, distances)
        directions = environments.vectors.new_zeros(len(d), 3)
        directions = directions.index_copy(0, slot, environments.vectors / distances[:, None])
        weights = torch.zeros(len(d), n_species, dtype=d.dtype)
        place = slot * n_species + environments.neighbour_species
        weights = weights.flatten().index_copy(0, place, cutoff).view(n_centres, width, n_species)
        d, directions = d.view(n_centres, width), directions.view(n_centres, width, 3)
        rows = max(1, PLACES_AT_ONCE * torch.get_num_threads() // width**2)
        parts = zip(directions.split(rows), d.split(rows), weights.split(rows), strict=True)
        sums = torch.cat([self._angular_sums(*part) for part in parts])
        # off the diagonal a pair stands once, on it in both orders
        sums = sums - 0.5 * torch.diag_embed(sums.diagonal(dim1=2, dim2=3), dim1=2, dim2=3)
        low, high = torch.tensor([(low, high) for high in range(n_species) for low in range(high + 1)]).T
        return sums[:, :, low, high].transpose(1, 2).flatten(1)

    def _angular_sums(self, directions: Tensor, d: Tensor, weights: Tensor) -> Tensor:
        """Return the sums of G4 and G5 over two neighbours by their elements.

        Parameters
        ----------
        directions, d
            Unit vectors ``(n_centres, n, 3)`` and distances ``(n_centres, n)`` of the neighbours.
        weights
            Their cutoffs by element, ``(n_centres, n, n_species)``.

        Returns
        -------
        Tensor
            Shape ``(n_centres, n_angular, n_species, n_species)``.
        """
        cosine = directions @ directions.transpose(1, 2)
        squared, itself = d * d, torch.eye(d.shape[1], dtype=d.dtype)
        wide = squared[:, :, None] + squared[:, None]
        cases = [(self.angular_wide, wide, 2.0 - 2.0 * itself)] if self.angular_wide else []
        if self.angular:
            apart_squared = torch.addcmul(wide, cosine, d[:, :, None] * d[:, None], value=-2.0)
            # a neighbour is put at the cutoff from itself, where nothing counts; a square root has no slope at zero
            apart = (apart_squared.clamp(min=1e-12) + self.r_cut**2 * itself).sqrt().clamp(max=self.r_cut)
            near = 1.0 + torch.cos(math.pi / self.r_cut * apart)
            cases.insert(0, (self.angular, wide + apart_squared, near))
        kinds = {(zeta, sign) for _, zeta, sign in (*self.angular, *self.angular_wide)}
        squares = {s: [torch.add(cosine.new_tensor(0.5), cosine, alpha=0.5 * s)] for s in {s for _, s in kinds}}
        powers = {(zeta, sign): _power(squares[sign], zeta) for zeta, sign in kinds}
        sums, across = [], weights.transpose(1, 2)
        for functions, square, weight in cases:
            gaussians = {eta: weight * torch.exp(-eta * square) for eta in {eta for eta, _, _ in functions}}
            sums += [across @ (gaussians[eta] * powers[zeta, sign]) @ weights for eta, zeta, sign in functions]
        return torch.stack(sums, dim=1)

    def _triples(self, environments: Environments, begin: int, end: int, distances: Tensor) -> _Triples:
        """List the pairs of neighbours of every centre of a chunk; without G5, only those nearer than the cutoff."""
        centre, vectors = environments.centre[begin:end], environments.vectors[begin:end]
        # a neighbour is paired with those of the same centre that follow it in the list
        followers = torch.searchsorted(centre, centre, right=True) - 1 - torch.arange(end - begin)
        first = torch.repeat_interleave(torch.arange(end - begin), followers)
        start = torch.cumsum(followers, 0) - followers
        second = first + 1 + torch.arange(len(first)) - start[first]
        if not self.angular_wide:
            with torch.no_grad():
                near = (vectors[first] - vectors[second]).square().sum(1) < self.r_cut**2
            first, second = first[near], second[near]
        x, y = vectors.T[:, first], vectors.T[:, second]
        gap = (x - y).square()
        product = x * y
        cosine = (product[0] + product[1] + product[2]) / (distances[first] * distances[second])
        return _Triples(first, second, (gap[0] + gap[1] + gap[2]).sqrt(), cosine)

    def _angular_slopes(
        self, environments: Environments, begin: int, end: int, d: Tensor, f: Tensor, f_slope: Tensor
    ) -> Tensor:
        """Return the derivatives with respect to the pair vectors, ``(n_pairs, n_species, n_angular, 3)``.

        Summed over the other neighbour k by its element. A term depends on ``d_j``, ``d_k``, ``d_jk`` and the cosine:
        ``d/dv_j = A v_j / d_j + B (v_k / d_j d_k - cos v_j / d_j^2) + C (v_j - v_k) / d_jk``.
        """
        n_species = len(self.species)
        t = self._triples(environments, begin, end, d)
        vectors, species = environments.vectors[begin:end], environments.neighbour_species[begin:end]
        f_j, f_k, slope_j, slope_k = f[t.first], f[t.second], f_slope[t.first], f_slope[t.second]
        d_j, d_k = d[t.first], d[t.second]
        f_jk, slope_jk = _cosine_cutoff(t.apart, self.r_cut)
        wide = d_j.square() + d_k.square()
        columns = []
        for functions, square, weight, weight_slope in (
            (self.angular, wide + t.apart.square(), f_jk, slope_jk),
            (self.angular_wide, wide, torch.ones_like(f_jk), None),
        ):
            for eta, zeta, sign in functions:
                gaussian, half = torch.exp(-eta * square), _half(t.cosine, sign)
                power = 2.0 * half**zeta * gaussian
                along_j = power * weight * f_k * (slope_j - 2.0 * eta * d_j * f_j)
                along_k = power * weight * f_j * (slope_k - 2.0 * eta * d_k * f_k)
                turn = zeta * sign * half ** (zeta - 1.0) * gaussian * weight * f_j * f_k
                across = torch.zeros_like(power)
                if weight_slope is not None:
                    across = power * f_j * f_k * (weight_slope - 2.0 * eta * t.apart * weight) / t.apart
                mixed = turn / (d_j * d_k) - across
                own_j = along_j / d_j - turn * t.cosine / d_j.square() + across
                own_k = along_k / d_k - turn * t.cosine / d_k.square() + across
                columns.append((own_j, own_k, mixed))
        own_j, own_k, mixed = (torch.stack(column, dim=1)[:, :, None] for column in zip(*columns, strict=True))
        v_j, v_k = vectors[t.first][:, None], vectors[t.second][:, None]
        result = vectors.new_zeros((end - begin) * n_species, mixed.shape[1], 3)
        result.index_add_(0, t.first * n_species + species[t.second], own_j * v_j + mixed * v_k)
        result.index_add_(0, t.second * n_species + species[t.first], own_k * v_k + mixed * v_j)
        return result.view(end - begin, n_species, mixed.shape[1], 3)


def _half(cosine: Tensor, sign: float) -> Tensor:
    """Return ``(1 + lambda cos) / 2``, not below zero by rounding."""
    return (0.5 + 0.5 * sign * cosine).clamp(min=0.0)


def _power(squares: list[Tensor], zeta: float) -> Tensor:
    """Return a power of numbers from zero to one; of a small whole exponent by squaring, far faster than logarithms.

    ``squares`` holds the numbers and, as far as they were needed, their squares, the squares of these, and so on.
    """
    if zeta != int(zeta) or zeta > 64.0:
        # rounding may have left the range, where the power is not defined
        return squares[0].clamp(min=0.0) ** zeta
    bits = [k for k in range(int(zeta).bit_length()) if int(zeta) >> k & 1]
    while len(squares) <= bits[-1]:
        squares.append(squares[-1] * squares[-1])
    result = squares[bits[0]]
    for k in bits[1:]:
        result = result * squares[k]
    return result


def _cosine_cutoff(distances: Tensor, r_cut: float) -> tuple[Tensor, Tensor]:
    """Return the cosine cutoff and its slope, zero from ``r_cut`` on."""
    inside = distances < r_cut
    phase = (math.pi / r_cut) * distances
    value = torch.where(inside, 0.5 + 0.5 * torch.cos(phase), 0.0)
    return value, torch.where(inside, -0.5 * math.pi / r_cut * torch.sin(phase), 0.0)


def _pair_index(a: Tensor, b: Tensor) -> Tensor:
    """Return the place of an unordered pair of channels, ``high (high + 1) / 2 + low``."""
    high, low = torch.maximum(a, b), torch.minimum(a, b)
    index: Tensor = high * (high + 1) // 2 + low
    return index
