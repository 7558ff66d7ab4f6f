r"""Smooth overlap of atomic positions (Bartok et al., Phys. Rev. B 87, 184115, 2013; thesis eqs. 2.9-2.14).

Every atom is a Gaussian. The density of each element around a centre is expanded in orthonormal radial functions
(:mod:`tlmc.descriptors.radial`) and spherical harmonics, ``c_nlm = sum_j f_nl(d_j) Y_lm(u_j)``, and the sums over m

``p_{n1 n2 l} = pi sqrt(8 / (2 l + 1)) sum_m c_{n1 l m} c_{n2 l m}``

do not change under rotation, because a rotation mixes the ``2 l + 1`` coefficients of one degree by an orthogonal
matrix. For two elements n1 and n2 run over the functions of both (cross-species spectra).

Coefficients are sums over neighbours of products of a radial and an angular factor, so they are matrix products: one
per centre, element and degree. Derivatives are written out: ``dc`` of every neighbour, then ``dp = dc c + c dc``. Where
nothing is to be differentiated, compiled loops do the same several times faster
(:mod:`tlmc.descriptors.compiled_sums`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import accumulate, pairwise
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from tlmc.descriptors import compiled_sums
from tlmc.descriptors.base import Environments, LocalDescriptor, SparseJacobian, chunks
from tlmc.descriptors.harmonics import (
    degrees,
    harmonic_factors,
    joined_harmonics,
    padded_harmonics_and_gradients,
)
from tlmc.descriptors.radial import GaussianBasis, PolynomialBasis, RadialBasis
from tlmc.errors import ConfigError

Basis = Literal["gto", "polynomial"]
Average = Literal["off", "inner", "outer"]
Cutoff = Literal["none", "cosine"]

PAIRS_AT_ONCE = 12_000
"""Neighbours whose factors are kept together: large enough to amortise calls."""
PLACES_AT_ONCE = 1000
"""Neighbours per thread whose radial functions and harmonics are: few enough for the processor's cache."""


class SOAP(LocalDescriptor):
    """SOAP power spectra of atoms, or their average over a structure.

    Parameters
    ----------
    species
        Elements that have channels.
    r_cut
        Cutoff in Angstrom: where the radial functions end, and with a cosine cutoff the neighbours too.
    n_max, l_max
        Number of radial functions and highest degree.
    sigma
        Width of the Gaussians in Angstrom.
    basis
        ``"gto"`` or ``"polynomial"``; see :mod:`tlmc.descriptors.radial`.
    average
        ``"off"``: a row per centre. ``"inner"``: the coefficients are averaged over the centres of a structure before
        the spectrum is taken. ``"outer"``: the spectra are averaged.
    cutoff
        ``"none"`` counts all atoms within ``r_cut + 3.7 sigma`` in full, where their density has decayed to 1e-3 at
        ``r_cut`` (DScribe's convention, a small jump at the edge). ``"cosine"`` weights a neighbour by
        ``(1 + cos(pi d / r_cut)) / 2``: value and slope vanish at ``r_cut``, as a potential needs.
    dtype
        Precision of the result.

    Notes
    -----
    The order of the features is DScribe's: pairs of elements by ascending atomic number, within a pair l, then
    n1, then n2 (``n2 >= n1`` for a pair of the same element).
    """

    def __init__(
        self,
        species: Sequence[str | int],
        r_cut: float,
        n_max: int,
        l_max: int,
        sigma: float = 1.0,
        basis: Basis = "gto",
        average: Average = "off",
        cutoff: Cutoff = "none",
        dtype: torch.dtype = torch.float64,
    ) -> None:
        super().__init__(species, dtype)
        if n_max < 1 or l_max < 0:
            raise ConfigError(f"SOAP needs n_max >= 1 and l_max >= 0, got {n_max} and {l_max}")
        if sigma <= 0.0 or r_cut <= 0.0:
            raise ConfigError(f"r_cut and sigma must be positive, got {r_cut} and {sigma}")
        for name, value, choice in (("basis", basis, Basis), ("average", average, Average), ("cutoff", cutoff, Cutoff)):
            if value not in get_args(choice):
                raise ConfigError(f"{name} must be one of {get_args(choice)}, got {value!r}")
        self.r_cut, self.n_max, self.l_max, self.sigma = r_cut, n_max, l_max, sigma
        self.basis, self.average, self.cutoff = basis, average, cutoff
        kind = GaussianBasis if basis == "gto" else PolynomialBasis
        self.radial: RadialBasis = kind(r_cut, n_max, l_max, sigma, self.reach)
        self._layout = _layout(len(self.species), n_max, l_max)

    @property
    def reach(self) -> float:
        """Distance in Angstrom beyond which atoms do not count."""
        return self.r_cut if self.cutoff == "cosine" else self.r_cut + self.sigma * math.sqrt(-2.0 * math.log(1e-3))

    @property
    def averaged(self) -> bool:
        """Whether a row describes a whole structure."""
        return self.average != "off"

    @property
    def n_features(self) -> int:
        """Length of a row, ``S n (S n + 1) / 2 (l_max + 1)`` for S elements."""
        return len(self._layout.degree)

    @property
    def feature_names(self) -> list[str]:
        """``p[C1,H2,l=3]``: first element and n1, second element and n2, degree."""
        name = [f"{symbol}{n}" for symbol in self.species for n in range(1, self.n_max + 1)]
        columns = zip(*(c.tolist() for c in self._layout[:3]), strict=True)
        return [f"p[{name[a]},{name[b]},l={degree}]" for a, b, degree in columns]

    def summed_over_species(self) -> Tensor:
        """Return the map from the spectrum to ``sum_s2 p[s1 n1, s2 n2, l]``, with n1 and n2 of all pairs.

        Shape ``(n_features, n_species * n_max * n_max * (l_max + 1))``.
        """
        n, degrees = self.n_max, self.l_max + 1
        first, second, degree = self._layout[:3]
        result = torch.zeros(self.n_features, len(self.species) * n * n * degrees, dtype=torch.float64)
        feature = torch.arange(self.n_features)
        result[feature, (first * n + second % n) * degrees + degree] = 1.0
        other = feature[first != second]  # p of q2 and q1 is that of q1 and q2, which is listed once
        result[other, ((second * n + first % n) * degrees + degree)[other]] += 1.0
        return result

    def coefficients(self, environments: Environments) -> list[Tensor]:
        """Return the expansion coefficients of the densities, one tensor per degree.

        Parameters
        ----------
        environments
            What :meth:`environments` gives.

        Returns
        -------
        list of Tensor
            For each degree shape ``(n_centres, n_species * n_max, 2 l + 1)``.
        """
        return degrees(self._all_coefficients(environments), 1, 3)

    def values(self, environments: Environments) -> Tensor:
        """Return the power spectra, differentiable (twice) in ``environments.vectors``; see :class:`LocalDescriptor`.

        Shape ``(n_centres, n_features)``, or ``(n_structures, n_features)`` if averaged.
        """
        if compiled_sums.can_serve(environments):
            return self._compiled_values(environments)
        if self.average == "inner":
            return self._spectrum(_mean(self._all_coefficients(environments), environments))
        parts = [self._coefficients(environments, *bounds) for bounds in chunks(environments, PAIRS_AT_ONCE)]
        spectra = torch.cat([self._spectrum(part) for part in parts])
        return _mean(spectra, environments) if self.average == "outer" else spectra

    def jacobian(self, environments: Environments) -> SparseJacobian:
        """Return the exact derivatives of :meth:`values` with respect to the positions; see the base class."""
        if self.average == "inner":
            return self._inner_jacobian(environments)
        parts = self._jacobian_chunks(environments)
        if self.average == "off":
            first, *others = parts
            if not others:  # one piece needs no copy
                return SparseJacobian(*first)
            return SparseJacobian(*(torch.cat(column) for column in zip(first, *others, strict=True)))
        n_atoms = sum(environments.sizes)
        counts = torch.bincount(environments.structures, minlength=len(environments.sizes))
        total = environments.vectors.new_zeros(n_atoms, self.n_features, 3)
        for rows, atoms, values in parts:
            total.index_add_(0, atoms, values / counts[environments.structures[rows], None, None])
        return SparseJacobian(_structure_of_atoms(environments), torch.arange(n_atoms), total)

    def dense_jacobian(self, environments: Environments) -> Tensor:
        """Return the derivatives with respect to all atoms; see the base class."""
        if self.averaged or not compiled_sums.can_serve(environments):
            return super().dense_jacobian(environments)
        # an entry for every atom, also for those that are too far away
        n_rows, n_pairs, n_atoms = len(environments.species), len(environments.centre), sum(environments.sizes)
        place = environments.centre * n_atoms + environments.neighbour
        rows = torch.arange(n_rows)
        entries = rows.repeat_interleave(n_atoms), place, rows * n_atoms + environments.atoms
        values = self._sums(environments).slopes((0, n_rows, 0, n_pairs), *entries)
        return values.view(n_rows, n_atoms, -1, 3).transpose(1, 2)

    def _sums(self, environments: Environments) -> compiled_sums.SoapSums:
        r_cut = self.r_cut if self.cutoff == "cosine" else 0.0
        return compiled_sums.SoapSums(environments, len(self.species), self.n_features, self.radial, r_cut)

    def _compiled_values(self, environments: Environments) -> Tensor:
        rows = None
        if self.average == "inner":
            rows = torch.searchsorted(environments.structures, torch.arange(len(environments.sizes) + 1))
        spectra = self._sums(environments).values(rows)
        return _mean(spectra, environments) if self.average == "outer" else spectra

    def _all_coefficients(self, environments: Environments) -> Tensor:
        """Return the coefficients of all centres in the form that :meth:`_coefficients` gives."""
        parts = [self._coefficients(environments, *bounds) for bounds in chunks(environments, PAIRS_AT_ONCE)]
        return torch.cat(parts)

    def _coefficients(self, environments: Environments, first: int, last: int, begin: int, end: int) -> Tensor:
        """Return the coefficients of the centres ``first ... last``, whose pairs are ``begin ... end``.

        Shape ``(n_centres, l_max + 1, n_species * n_max, 2 l_max + 2)``, orders as in
        :func:`tlmc.descriptors.harmonics.joined_harmonics`.
        """
        n_species, n_centres = len(self.species), last - first
        # a row of places per centre, for each element as many as its longest list, so that sums are matrix products
        key = (environments.centre[begin:end] - first) * n_species + environments.neighbour_species[begin:end]
        counts = torch.bincount(key, minlength=n_centres * n_species)
        widths = counts.view(n_centres, n_species).amax(0).tolist()
        cuts = [0, *accumulate(widths)]
        shape = (n_centres, cuts[-1])
        place = torch.arange(n_centres)[:, None] * cuts[-1] + torch.tensor(cuts[:-1])
        key, order = torch.sort(key, stable=True)
        slot = (place.flatten() + counts - torch.cumsum(counts, 0))[key] + torch.arange(end - begin)
        # the empty places hold a vector of length one with weight zero
        vectors = environments.vectors.new_zeros(3, n_centres * cuts[-1])
        vectors[2] = 1.0
        vectors = vectors.index_copy(1, slot, environments.vectors[begin:end][order].T)
        weights = torch.zeros_like(vectors[0]).index_fill_(0, slot, 1.0)
        distances = _lengths(vectors)
        if self.cutoff == "cosine":
            weights = weights * _cosine(distances, self.r_cut)
        heights, azimuths = harmonic_factors((vectors / distances).view(3, *shape), self.l_max)
        heights = heights * weights.view(shape)[:, None]
        terms = self.radial.terms(distances.view(shape))
        # what follows is ten times larger: a few centres at a time, whose numbers stay in the processor's cache
        parts = []
        rows = max(1, PLACES_AT_ONCE * torch.get_num_threads() // max(shape[1], 1))
        for row in range(0, n_centres, rows):
            some = slice(row, row + rows)
            harmonics = joined_harmonics(heights[some], azimuths[some]).flatten(0, 1)
            overlaps = self.radial.of_terms(terms[some]).flatten(0, 1)
            sums = [
                torch.bmm(overlaps[..., start:stop], harmonics[..., start:stop].transpose(1, 2))
                for start, stop in pairwise(cuts)
            ]
            parts.append(torch.stack(sums, dim=1))
        c = torch.cat(parts).view(n_centres, self.l_max + 1, n_species, self.n_max, -1)
        c = torch.matmul(self.radial.mixing.to(c)[:, None], c)
        # the centre's own Gaussian adds to degree zero
        own = self.radial.mixing[0] @ self.radial.own / math.sqrt(4.0 * math.pi)
        one_hot = torch.nn.functional.one_hot(environments.species[first:last], n_species)
        c[:, 0, :, :, 0] += one_hot[:, :, None] * own.to(c)
        return c.flatten(2, 3)

    def _spectrum(self, coefficients: Tensor) -> Tensor:
        """Return the independent elements of ``c c^T`` of every degree, in the order of the features."""
        c = coefficients.flatten(0, 1)
        products = torch.bmm(c, c.transpose(1, 2)).view(len(coefficients), -1)
        return products[:, self._layout.product] * self._layout.prefactor.to(c)

    def _radial_slopes(self, distances: Tensor) -> tuple[Tensor, Tensor]:
        """Return the derivatives of the radial functions and the functions over the distance.

        Both ``(..., l_max + 1, n_max, n)`` for distances ``(..., n)``: what a move along and one across the bond does.
        """
        overlaps, slopes = self.radial.overlaps(distances), self.radial.slopes(distances)
        if self.cutoff == "cosine":
            weight = _cosine(distances, self.r_cut)
            weight_slope = -0.5 * math.pi / self.r_cut * torch.sin(math.pi / self.r_cut * distances)
            weight, weight_slope = weight[..., None, None, :], weight_slope[..., None, None, :]
            overlaps, slopes = overlaps * weight, slopes * weight + overlaps * weight_slope
        mixing = self.radial.mixing.to(distances)
        return mixing @ slopes, mixing @ (overlaps / distances[..., None, None, :])

    def _pair_factors(
        self, environments: Environments, bounds: tuple[int, int, int, int], coefficients: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the two factors of what moving a neighbour changes in ``c dc``, and where each pair stands in them.

        A move of the neighbour along the bond changes the radial factor of its harmonics, one across it the angular
        factor: ``c dc`` is a sum of two products of a function of the distance, ``(n_places, l_max + 1, n_max, 2)``,
        and the coefficients times a function of the direction, ``(n_places, l_max + 1, 2, n_species * n_max * 3)``.
        """
        first, last, begin, end = bounds
        centre, n_centres = environments.centre[begin:end] - first, last - first
        counts = torch.bincount(centre, minlength=n_centres)
        width = max(int(counts.max()), 1)
        slot = centre * width + torch.arange(end - begin) - (torch.cumsum(counts, 0) - counts)[centre]
        vectors = environments.vectors.new_zeros(3, n_centres * width)
        vectors[2] = 1.0
        vectors = vectors.index_copy_(1, slot, environments.vectors[begin:end].T).view(3, n_centres, width)
        distances = _lengths(vectors)
        directions = vectors / distances
        functions = torch.stack(self._radial_slopes(distances), dim=4)
        functions = functions * self._layout.of_degree[:, None, None, None].to(vectors)
        harmonics = padded_harmonics_and_gradients(directions, self.l_max)
        sums = torch.bmm(coefficients.flatten(0, 1), harmonics.flatten(3, 4).flatten(0, 1))
        sums = sums.view(n_centres, self.l_max + 1, -1, 4, width)
        outward, around = directions.movedim(0, 1)[:, None, None], sums[:, :, :, 1:]
        around = around - outward * (outward * around).sum(3, keepdim=True)
        sides = torch.stack([outward * sums[:, :, :, :1], around], dim=2).flatten(3, 4)
        return functions.permute(0, 3, 1, 2, 4).flatten(0, 1), sides.permute(0, 4, 1, 2, 3).flatten(0, 1), slot

    def _jacobian_chunks(self, environments: Environments) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yield rows, atoms and derivatives of the spectra, chunk by chunk."""
        n_atoms = sum(environments.sizes)
        sums = self._sums(environments) if compiled_sums.can_serve(environments) else None
        # compiled, rows that are kept are computed at once; those that are averaged need not all be held
        size = PLACES_AT_ONCE // 2 if sums is None or self.averaged else max(len(environments.centre), 1)
        for bounds in chunks(environments, size):
            first, last, begin, end = bounds
            centre, neighbour = environments.centre[begin:end] - first, environments.neighbour[begin:end]
            rows, own_atoms = torch.arange(last - first), environments.atoms[first:last]
            keys = torch.cat([centre * n_atoms + neighbour, rows * n_atoms + own_atoms])
            keys, place = torch.unique(keys, return_inverse=True)
            place, own = place[: end - begin], place[end - begin :]
            if sums is None:
                values = self._slopes(environments, bounds, keys, place, own)
            else:
                values = sums.slopes(bounds, keys // n_atoms, place, own)
            yield keys // n_atoms + first, keys % n_atoms, values

    def _slopes(
        self, environments: Environments, bounds: tuple[int, int, int, int], keys: Tensor, place: Tensor, own: Tensor
    ) -> Tensor:
        """Return the derivatives of a chunk's spectra, ``(n_entries, n_features, 3)``.

        Parameters
        ----------
        environments, bounds
            The pairs, and which of them; see :func:`tlmc.descriptors.base.chunks`.
        keys
            Number of the centre in the chunk times that of atoms, plus atom, of every entry.
        place, own
            The entry of every pair, and that of every centre as an atom.
        """
        first, last, begin, end = bounds
        n_atoms = sum(environments.sizes)
        centre, neighbour = environments.centre[begin:end] - first, environments.neighbour[begin:end]
        functions, sides, slot = self._pair_factors(environments, bounds, self._coefficients(environments, *bounds))
        # a centre and its own images move together; other atoms' images add up before the product
        pairs = torch.nonzero(neighbour != environments.atoms[first:last][centre]).squeeze(1)
        counts = torch.bincount(place[pairs], minlength=len(keys))
        key, order = torch.sort(place[pairs], stable=True)
        image = torch.arange(len(pairs)) - (torch.cumsum(counts, 0) - counts)[key]
        images = torch.full((len(keys), max(int(counts.max()), 1)), -1)
        images[key, image] = slot[pairs[order]]
        species = torch.full((len(keys),), -1)
        species[key] = environments.neighbour_species[begin:end][pairs[order]]
        values = environments.vectors.new_zeros(len(keys), self.n_features, 3)
        for channel in range(len(self.species)):
            mine = torch.nonzero(species == channel).squeeze(1)
            which = images[mine]
            left = functions[which] * (which >= 0)[:, :, None, None, None]
            left, right = left.permute(0, 2, 3, 1, 4).flatten(3), sides[which].transpose(1, 2).flatten(2, 3)
            moved = (left @ right).unflatten(3, (-1, 3))
            values.index_copy_(0, mine, self._feature_slopes(moved, channel))
        total = values.new_zeros(last - first, self.n_features, 3).index_add_(0, keys // n_atoms, values)
        values.index_copy_(0, own, -total)
        return values

    def _feature_slopes(self, moved: Tensor, channel: int) -> Tensor:
        """Return ``c dc + dc c`` in the order of the features, where ``dc`` has functions of one element only.

        ``moved`` has the shape ``(n, l_max + 1, n_max, n_species * n_max, 3)``: ``dc``, then ``c``.
        """
        n_species, n = len(self.species), self.n_max
        upper = torch.triu_indices(n, n)
        upper = upper[0] * n + upper[1]
        result, stop = moved.new_zeros(len(moved), self.n_features, 3), 0
        for s1 in range(n_species):
            for s2 in range(s1, n_species):
                shape = (self.l_max + 1, n, n) if s1 != s2 else (self.l_max + 1, len(upper))
                start, stop = stop, stop + math.prod(shape)
                if channel not in (s1, s2):
                    continue
                other = s2 if channel == s1 else s1
                block = moved[:, :, :, other * n : (other + 1) * n]
                if s1 == s2:
                    block = (block + block.transpose(2, 3)).flatten(2, 3).index_select(2, upper)
                elif channel == s2:
                    block = block.transpose(2, 3)
                result[:, start:stop].unflatten(1, shape).copy_(block)
        return result

    def _inner_jacobian(self, environments: Environments) -> SparseJacobian:
        n_atoms, n_species, l_max = sum(environments.sizes), len(self.species), self.l_max
        structure = _structure_of_atoms(environments)
        counts = torch.bincount(environments.structures, minlength=len(environments.sizes))
        averaged = _mean(self._all_coefficients(environments), environments)
        total = environments.vectors.new_zeros(n_atoms * n_species, l_max + 1, self.n_max, 2 * l_max + 2, 3)
        for _, _, begin, end in chunks(environments, PLACES_AT_ONCE):
            vectors, species = environments.vectors[begin:end].T, environments.neighbour_species[begin:end]
            distances = _lengths(vectors)
            directions = vectors / distances
            along, across = self._radial_slopes(distances)
            harmonics = padded_harmonics_and_gradients(directions, l_max)
            around = harmonics[:, :, 1:] - directions * (directions * harmonics[:, :, 1:]).sum(2, keepdim=True)
            slope = along[:, :, None, None] * (directions * harmonics[:, :, :1])[:, None]
            slope = (slope + across[:, :, None, None] * around[:, None]).movedim(-1, 0)
            centre = environments.atoms[environments.centre[begin:end]]
            total.index_add_(0, environments.neighbour[begin:end] * n_species + species, slope)
            total.index_add_(0, centre * n_species + species, -slope)
        # in the order atom, degree, order, element, function, axis
        moved = total.unflatten(0, (n_atoms, n_species)).permute(0, 2, 4, 1, 3, 5).flatten(3)
        product = averaged[structure] @ moved / counts[structure, None, None, None]
        product = product.unflatten(3, (-1, 3))
        table = (product + product.transpose(2, 3)).flatten(1, 3)[:, self._layout.product]
        return SparseJacobian(structure, torch.arange(n_atoms), table * self._layout.prefactor[:, None].to(table))


def expanded_density(descriptor: SOAP, coefficients: list[Tensor], points: Tensor) -> Tensor:
    """Return the density that expansion coefficients stand for (thesis eq. 2.11), to be looked at.

    Parameters
    ----------
    descriptor
        Whose basis is meant.
    coefficients
        Of one centre and one element, for each degree shape ``(n_max, 2 l + 1)``: a slice of what
        :meth:`SOAP.coefficients` gives.
    points
        Relative to the centre, Angstrom, shape ``(n_points, 3)``, none at the centre.

    Returns
    -------
    Tensor
        Shape ``(n_points,)``; one atom alone has the density one at its place.
    """
    distances = torch.linalg.vector_norm(points, dim=1)
    harmonics = degrees(joined_harmonics(*harmonic_factors((points / distances[:, None]).T, descriptor.l_max)), 0, 1)
    radial = torch.from_numpy(descriptor.radial.functions(distances.numpy()))
    terms = [torch.einsum("nm,np,mp->p", c, g, y) for c, g, y in zip(coefficients, radial, harmonics, strict=True)]
    return torch.stack(terms).sum(0)


class _Layout(NamedTuple):
    """Where the features stand, and the factors of their degrees."""

    first: Tensor
    """``s1 * n_max + n1`` of every feature."""
    second: Tensor
    degree: Tensor
    product: Tensor
    """Place of every feature among the products ``(l, q1, q2)``."""
    prefactor: Tensor
    """``pi sqrt(8 / (2 l + 1))`` of every feature."""
    of_degree: Tensor
    """The same of every degree."""


def _layout(n_species: int, n_max: int, l_max: int) -> _Layout:
    features = [
        (s1 * n_max + n1, s2 * n_max + n2, degree)
        for s1 in range(n_species)
        for s2 in range(s1, n_species)
        for degree in range(l_max + 1)
        for n1 in range(n_max)
        for n2 in range(n1 if s1 == s2 else 0, n_max)
    ]
    first, second, degree = torch.tensor(features).T
    size = n_species * n_max
    of_degree = math.pi * torch.sqrt(8.0 / (2.0 * torch.arange(l_max + 1, dtype=torch.float64) + 1.0))
    return _Layout(first, second, degree, (degree * size + first) * size + second, of_degree[degree], of_degree)


def _lengths(vectors: Tensor) -> Tensor:
    """Return the lengths of vectors ``(3, n)``; much faster than a norm over the first dimension."""
    x, y, z = vectors
    squared: Tensor = x * x + y * y + z * z
    return squared.sqrt()


def _cosine(distances: Tensor, r_cut: float) -> Tensor:
    inside = distances < r_cut
    return torch.where(inside, 0.5 + 0.5 * torch.cos(math.pi / r_cut * distances), 0.0)


def _mean(rows: Tensor, environments: Environments) -> Tensor:
    """Return the mean over the centres of every structure."""
    n_structures = len(environments.sizes)
    counts = torch.bincount(environments.structures, minlength=n_structures).to(rows)
    total = rows.new_zeros(n_structures, *rows.shape[1:]).index_add(0, environments.structures, rows)
    return total / counts.view(-1, *(1,) * (rows.ndim - 1))


def _structure_of_atoms(environments: Environments) -> Tensor:
    return torch.repeat_interleave(torch.arange(len(environments.sizes)), torch.tensor(environments.sizes))
