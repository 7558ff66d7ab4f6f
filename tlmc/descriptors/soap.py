r"""Smooth overlap of atomic positions (Bartok et al., Phys. Rev. B 87, 184115, 2013; thesis eqs. 2.9-2.14).

Every atom is a Gaussian. The density of each element around a centre is expanded in orthonormal radial functions
(:mod:`tlmc.descriptors.radial`) and spherical harmonics, ``c_nlm = sum_j f_nl(d_j) Y_lm(u_j)``, and the sums over m

``p_{n1 n2 l} = pi sqrt(8 / (2 l + 1)) sum_m c_{n1 l m} c_{n2 l m}``

do not change under rotation, because a rotation mixes the ``2 l + 1`` coefficients of one degree by an orthogonal
matrix. For two elements n1 and n2 run over the functions of both (cross-species spectra).

Coefficients are sums over neighbours of products of a radial and an angular factor, so they are matrix products: one
per centre, element and degree. Derivatives are written out: ``dc`` of every neighbour, then ``dp = dc c + c dc``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from tlmc.descriptors.base import Environments, LocalDescriptor, SparseJacobian, chunks
from tlmc.descriptors.harmonics import harmonics_and_gradients, spherical_harmonics
from tlmc.descriptors.radial import GaussianBasis, PolynomialBasis, RadialBasis
from tlmc.errors import ConfigError

Basis = Literal["gto", "polynomial"]
Average = Literal["off", "inner", "outer"]
Cutoff = Literal["none", "cosine"]

PAIRS_AT_ONCE = 6000
"""Neighbours per chunk: large enough to amortise calls, small enough for the processor's cache."""


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
        parts = [self._coefficients(environments, *bounds) for bounds in chunks(environments, PAIRS_AT_ONCE)]
        return [torch.cat(degree) for degree in zip(*parts, strict=True)]

    def values(self, environments: Environments) -> Tensor:
        """Return the power spectra, differentiable (twice) in ``environments.vectors``; see :class:`LocalDescriptor`.

        Shape ``(n_centres, n_features)``, or ``(n_structures, n_features)`` if averaged.
        """
        if self.average == "inner":
            averaged = [_mean(c, environments) for c in self.coefficients(environments)]
            return self._spectrum(averaged)
        parts = [self._coefficients(environments, *bounds) for bounds in chunks(environments, PAIRS_AT_ONCE)]
        spectra = torch.cat([self._spectrum(part) for part in parts])
        return _mean(spectra, environments) if self.average == "outer" else spectra

    def jacobian(self, environments: Environments) -> SparseJacobian:
        """Return the exact derivatives of :meth:`values` with respect to the positions; see the base class."""
        if self.average == "inner":
            return self._inner_jacobian(environments)
        parts = self._jacobian_chunks(environments)
        if self.average == "off":
            return SparseJacobian(*(torch.cat(column) for column in zip(*parts, strict=True)))
        n_atoms = sum(environments.sizes)
        counts = torch.bincount(environments.structures, minlength=len(environments.sizes))
        total = environments.vectors.new_zeros(n_atoms, self.n_features, 3)
        for rows, atoms, values in parts:
            total.index_add_(0, atoms, values / counts[environments.structures[rows], None, None])
        return SparseJacobian(_structure_of_atoms(environments), torch.arange(n_atoms), total)

    def _coefficients(self, environments: Environments, first: int, last: int, begin: int, end: int) -> list[Tensor]:
        """Return the coefficients of the centres ``first ... last``, whose pairs are ``begin ... end``."""
        n_species, n_centres = len(self.species), last - first
        centre, species = environments.centre[begin:end] - first, environments.neighbour_species[begin:end]
        # one row per element and centre, filled up to the element's longest, so that sums are batched matrix products
        counts = torch.bincount(species * n_centres + centre, minlength=n_species * n_centres)
        widths = counts.view(n_species, n_centres).amax(1).tolist()
        start = torch.cumsum(counts, 0) - counts
        fill = torch.repeat_interleave(torch.tensor(widths), n_centres)
        row_begin = torch.cumsum(fill, 0) - fill
        row, order = torch.sort(species * n_centres + centre, stable=True)
        slot = row_begin[row] + torch.arange(len(row)) - start[row]
        # the empty places hold a vector of length one with weight zero
        vectors = environments.vectors.new_zeros(3, n_centres * sum(widths))
        vectors[2] = 1.0
        vectors = vectors.index_copy(1, slot, environments.vectors[begin:end][order].T)
        weights = torch.zeros_like(vectors[0]).index_fill_(0, slot, 1.0)
        distances = _lengths(vectors)
        if self.cutoff == "cosine":
            weights = weights * _cosine(distances, self.r_cut)
        harmonics = spherical_harmonics(vectors / distances, self.l_max, weights)
        overlaps = self.radial.overlaps(distances)
        mixing = self.radial.mixing.to(overlaps)
        result = []
        for degree in range(self.l_max + 1):
            sums, used = [], 0
            for width in widths:
                radial = overlaps[degree, :, used : used + n_centres * width].view(self.n_max, n_centres, width)
                angular = harmonics[degree][:, used : used + n_centres * width].view(2 * degree + 1, n_centres, width)
                sums.append(torch.bmm(radial.transpose(0, 1), angular.permute(1, 2, 0)))
                used += n_centres * width
            c = torch.matmul(mixing[degree], torch.stack(sums, dim=1))
            if degree == 0:
                c = c + self._own_density(environments.species[first:last], overlaps)
            result.append(c.flatten(1, 2))
        return result

    def _own_density(self, species: Tensor, like: Tensor) -> Tensor:
        """Return what the centre's own Gaussian adds to degree zero, ``(n_centres, n_species, n_max, 1)``."""
        overlap = self.radial.mixing[0] @ self.radial.own / math.sqrt(4.0 * math.pi)
        one_hot = torch.nn.functional.one_hot(species, len(self.species))
        return one_hot[:, :, None, None] * overlap[:, None].to(like)

    def _spectrum(self, coefficients: list[Tensor]) -> Tensor:
        """Return the independent elements of ``c c^T`` of every degree, in the order of the features."""
        products = [
            _prefactor(degree) * torch.bmm(c, c.transpose(1, 2)).flatten(1) for degree, c in enumerate(coefficients)
        ]
        return torch.cat(products, dim=1)[:, self._layout.product]

    def _pair_slopes(self, environments: Environments, begin: int, end: int) -> list[Tensor]:
        """Return ``dc/dv`` of single pairs, for each degree ``(n_max, 3, 2 l + 1, n_pairs)``."""
        vectors = environments.vectors[begin:end].T
        distances = _lengths(vectors)
        directions = vectors / distances
        overlaps, slopes = self.radial.overlaps(distances), self.radial.slopes(distances)
        if self.cutoff == "cosine":
            weight = _cosine(distances, self.r_cut)
            weight_slope = -0.5 * math.pi / self.r_cut * torch.sin(math.pi / self.r_cut * distances)
            overlaps, slopes = overlaps * weight, slopes * weight + overlaps * weight_slope
        mixing = self.radial.mixing.to(vectors)
        across, along = mixing @ (overlaps / distances), mixing @ slopes
        harmonics, gradients = harmonics_and_gradients(directions, self.l_max)
        result = []
        for degree in range(self.l_max + 1):
            gradient = gradients[degree]
            gradient = gradient - directions[:, None] * (directions[:, None] * gradient).sum(0)
            outward = directions[:, None] * harmonics[degree]
            slope = along[degree][:, None, None] * outward
            result.append(torch.addcmul(slope, across[degree][:, None, None], gradient))
        return result

    def _jacobian_chunks(self, environments: Environments) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yield rows, atoms and derivatives of the spectra, chunk by chunk."""
        n_atoms, n_features = sum(environments.sizes), self.n_features
        for first, last, begin, end in chunks(environments, PAIRS_AT_ONCE // 4):
            centre, neighbour = environments.centre[begin:end], environments.neighbour[begin:end]
            rows = torch.arange(first, last)
            keys = torch.cat([centre * n_atoms + neighbour, rows * n_atoms + environments.atoms[first:last]])
            keys, place = torch.unique(keys, return_inverse=True)
            place, own = place[: end - begin], place[end - begin :]
            values = environments.vectors.new_zeros(len(keys), n_features, 3)
            coefficients = self._coefficients(environments, first, last, begin, end)
            # images of one atom add up before the spectrum, which is linear in their slopes
            entry_row = keys // n_atoms - first
            species = torch.full((len(keys),), -1)
            species[place] = environments.neighbour_species[begin:end]
            products = []
            for degree, slope in enumerate(self._pair_slopes(environments, begin, end)):
                moved = slope.new_zeros(*slope.shape[:3], len(keys)).index_add_(3, place, slope)
                moved = moved.permute(3, 2, 0, 1).reshape(len(keys), 2 * degree + 1, -1)
                product = _prefactor(degree) * torch.bmm(coefficients[degree][entry_row], moved)
                products.append(product.view(len(keys), -1, 3))
            table = torch.cat([*products, products[0].new_zeros(len(keys), 1, 3)], dim=1)
            for channel in range(len(self.species)):
                mine = torch.nonzero(species == channel).squeeze(1)
                left, right = self._layout.slopes[channel]
                part = table[mine]
                values[mine] = part[:, left] + part[:, right]
            total = values.new_zeros(last - first, n_features, 3).index_add_(0, entry_row, values)
            values[own] -= total
            yield keys // n_atoms, keys % n_atoms, values

    def _inner_jacobian(self, environments: Environments) -> SparseJacobian:
        n_atoms, n_species = sum(environments.sizes), len(self.species)
        structure = _structure_of_atoms(environments)
        counts = torch.bincount(environments.structures, minlength=len(environments.sizes))
        averaged = [_mean(c, environments) for c in self.coefficients(environments)]
        moved = [
            environments.vectors.new_zeros(self.n_max, 3, 2 * degree + 1, n_atoms * n_species)
            for degree in range(self.l_max + 1)
        ]
        for _, _, begin, end in chunks(environments, PAIRS_AT_ONCE // 4):
            species = environments.neighbour_species[begin:end]
            to = environments.neighbour[begin:end] * n_species + species
            out_of = environments.atoms[environments.centre[begin:end]] * n_species + species
            for total, slope in zip(moved, self._pair_slopes(environments, begin, end), strict=True):
                total.index_add_(3, to, slope)
                total.index_add_(3, out_of, -slope)
        products = []
        for degree, slope in enumerate(moved):
            slope = slope.view(self.n_max, 3, 2 * degree + 1, n_atoms, n_species).permute(3, 2, 4, 0, 1)
            slope = slope.reshape(n_atoms, 2 * degree + 1, -1) / counts[structure, None, None]
            product = _prefactor(degree) * torch.bmm(averaged[degree][structure], slope)
            products.append(product.view(n_atoms, n_species * self.n_max, -1, 3))
        table = torch.stack([p + p.transpose(1, 2) for p in products], dim=1).flatten(1, 3)
        return SparseJacobian(structure, torch.arange(n_atoms), table[:, self._layout.product])


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
    harmonics = spherical_harmonics((points / distances[:, None]).T, descriptor.l_max)
    radial = torch.from_numpy(descriptor.radial.functions(distances.numpy()))
    terms = [torch.einsum("nm,np,mp->p", c, g, y) for c, g, y in zip(coefficients, radial, harmonics, strict=True)]
    return torch.stack(terms).sum(0)


class _Layout(NamedTuple):
    """Where the features stand."""

    first: Tensor
    """``s1 * n_max + n1`` of every feature."""
    second: Tensor
    degree: Tensor
    product: Tensor
    """Place of every feature among the products ``(l, q1, q2)``."""
    slopes: list[tuple[Tensor, Tensor]]
    """For every element the places of ``c_q2 dc_n1`` and ``c_q1 dc_n2`` among ``(l, q, n)``; the end if absent."""


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
    slopes = []
    for s in range(n_species):
        end = (l_max + 1) * size * n_max
        left = torch.where(first // n_max == s, (degree * size + second) * n_max + first % n_max, end)
        right = torch.where(second // n_max == s, (degree * size + first) * n_max + second % n_max, end)
        slopes.append((left, right))
    return _Layout(first, second, degree, (degree * size + first) * size + second, slopes)


def _prefactor(degree: int) -> float:
    return math.pi * math.sqrt(8.0 / (2.0 * degree + 1.0))


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
