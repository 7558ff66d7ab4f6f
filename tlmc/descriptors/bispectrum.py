r"""Bispectrum on the hypersphere (Bartok et al., Phys. Rev. Lett. 104, 136403, 2010; the other descriptor of GAP).

A neighbour at distance ``d`` in direction ``n`` is put on the unit sphere of four dimensions, at the angle
``t = theta_max d / r_cut`` from the pole, where the centre is: the point ``(cos t, n sin t)``. Distance has become an
angle, so no radial functions are needed. Such a point is a rotation (of spin 1/2 the unitary matrix
``U = cos t - i sin t n . sigma``), and the functions on the sphere are the elements of the Wigner matrices ``U^j``,
``j = 0, 1/2, 1 ...``. The density, with the cosine cutoff ``f``, has the coefficients

``u^j = 1 + sum_k f(d_k) U^j(v_k)``, matrices of 2 j + 1 rows.

A rotation ``R`` of space turns them into ``R^j u^j R^j+``, and so does not change the bispectrum, in which
Clebsch-Gordan coefficients couple two of them to a third,

``B_{j1 j2 j} = sum conj(u^j_{m m'}) C^{j m}_{j1 m1 j2 m2} C^{j m'}_{j1 m1' j2 m2'} u^{j1}_{m1 m1'} u^{j2}_{m2 m2'}``.

``B_{j1 j2 j} / (2 j + 1)`` does not depend on the order of the three, so ``j2 <= j1 <= j`` are all there are. GAP keeps
those with two equal. Half-integer j are kept as their doubles J in the code.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from tlmc.descriptors.base import Environments, LocalDescriptor, SparseJacobian, chunks, gather_slopes
from tlmc.errors import ConfigError

PAIRS_AT_ONCE = 2000
"""Neighbours per chunk of the derivatives, which are wide."""


@cache
def clebsch_gordan(J1: int, J2: int, J: int) -> Tensor:
    """Return the coefficients ``<j1 m1 j2 m2 | j m>`` by Racah's formula.

    Parameters
    ----------
    J1, J2, J
        Doubled angular momenta; their sum is even and they fulfil the triangle inequality.

    Returns
    -------
    Tensor
        Shape ``(J1 + 1, J2 + 1, J + 1)``, float64, every m descending from j to -j.
    """
    f = math.factorial
    a, b, c = (J1 + J2 - J) // 2, (J1 - J2 + J) // 2, (-J1 + J2 + J) // 2
    triangle = (J + 1) * f(a) * f(b) * f(c) / f((J1 + J2 + J) // 2 + 1)
    result = torch.zeros(J1 + 1, J2 + 1, J + 1, dtype=torch.float64)
    for k1 in range(J1 + 1):  # k = j - m
        for k2 in range(J2 + 1):
            k = k1 + k2 - a
            if not 0 <= k <= J:
                continue
            norm = triangle * f(k) * f(J - k) * f(k1) * f(J1 - k1) * f(k2) * f(J2 - k2)
            lowest, highest = max(0, k1 - b, J2 - k2 - c), min(a, k1, J2 - k2)
            total = sum(
                (-1) ** s / (f(s) * f(a - s) * f(k1 - s) * f(J2 - k2 - s) * f(b - k1 + s) * f(c - J2 + k2 + s))
                for s in range(lowest, highest + 1)
            )
            result[k1, k2, k] = math.sqrt(norm) * total
    return result


def wigner_matrices(a: Tensor, b: Tensor, J_max: int) -> list[Tensor]:
    """Return the matrices that represent unitary matrices ``[[a, b], [-b*, a*]]`` for every spin.

    The states of spin j are the polynomials ``sqrt(binomial(J, k)) x^(J - k) y^k``; the matrix replaces x by
    ``a x + b y`` and y by ``-b* x + a* y``, one factor after the other.

    Parameters
    ----------
    a, b
        Complex, shape ``(n,)``, with ``|a|^2 + |b|^2 = 1``.
    J_max
        Twice the highest spin.

    Returns
    -------
    list of Tensor
        For ``J = 0 ... J_max`` shape ``(n, J + 1, J + 1)``, complex; row k is the image of state k.
    """
    images = torch.ones_like(a)[:, None, None]
    result = [images]
    for J in range(1, J_max + 1):
        last = images[:, -1:]
        x, y = torch.nn.functional.pad(images, (0, 1)), torch.nn.functional.pad(images, (1, 0))
        new = a[:, None, None] * x + b[:, None, None] * y
        x, y = torch.nn.functional.pad(last, (0, 1)), torch.nn.functional.pad(last, (1, 0))
        images = torch.cat([new, a.conj()[:, None, None] * y - b.conj()[:, None, None] * x], dim=1)
        norm = torch.tensor([math.comb(J, k) for k in range(J + 1)], dtype=a.real.dtype).sqrt()
        result.append(images * (norm[:, None] / norm))
    return result


class Bispectrum(LocalDescriptor):
    """Bispectrum of the neighbour densities on the hypersphere.

    Parameters
    ----------
    species
        Elements that have a density of their own. If there are several, the density of all atoms together is described
        too (first), which knows the angles between neighbours of different elements.
    r_cut
        Cutoff in Angstrom.
    J_max
        Twice the highest spin.
    theta_max
        Angle from the pole at the cutoff; less than pi, where all directions meet.
    dtype
        Precision of the result.
    """

    def __init__(
        self,
        species: Sequence[str | int],
        r_cut: float,
        J_max: int = 6,
        theta_max: float = math.pi - 0.02,
        dtype: torch.dtype = torch.float64,
    ) -> None:
        super().__init__(species, dtype)
        if r_cut <= 0.0:
            raise ConfigError(f"r_cut must be positive, got {r_cut}")
        if J_max < 0:
            raise ConfigError(f"J_max must not be negative, got {J_max}")
        if not 0.0 < theta_max < math.pi:
            raise ConfigError(f"theta_max must lie between 0 and pi, got {theta_max}")
        self.r_cut, self.J_max, self.theta_max = r_cut, J_max, theta_max
        self.couplings = [
            (J1, J2, J)
            for J1 in range(J_max + 1)
            for J2 in range(J1 + 1)
            for J in range(J1, min(J_max, J1 + J2) + 1)
            if (J1 + J2 + J) % 2 == 0
        ]
        one = torch.eye(len(self.species), dtype=torch.int64)
        # which elements make up which density
        self._densities = torch.cat([torch.ones_like(one[:1]), one]) if len(one) > 1 else one

    @property
    def reach(self) -> float:
        """Distance in Angstrom beyond which atoms do not count: ``r_cut``."""
        return self.r_cut

    @property
    def n_features(self) -> int:
        """Length of a row: couplings times densities."""
        return len(self._densities) * len(self.couplings)

    @property
    def feature_names(self) -> list[str]:
        """``B[C,1/2,1/2,1]``: density (``all`` for all atoms), j1, j2, j."""
        names = ["all", *self.species] if len(self.species) > 1 else list(self.species)
        spin = [f"{J}/2" if J % 2 else str(J // 2) for J in range(self.J_max + 1)]
        return [f"B[{name},{spin[J1]},{spin[J2]},{spin[J]}]" for name in names for J1, J2, J in self.couplings]

    def coefficients(self, environments: Environments) -> list[Tensor]:
        """Return the expansion coefficients ``u^j`` of the densities.

        Returns
        -------
        list of Tensor
            For ``J = 0 ... J_max`` shape ``(n_centres, n_densities, J + 1, J + 1)``, complex.
        """
        n_species, n_centres = len(self.species), len(environments.species)
        place = environments.centre * n_species + environments.neighbour_species
        result = []
        for J, terms in enumerate(self._terms(environments.vectors)):
            sums = terms.new_zeros(n_centres * n_species, *terms.shape[1:]).index_add(0, place, terms)
            sums = torch.einsum("cs,nsab->ncab", self._densities.to(terms), sums.view(n_centres, n_species, J + 1, -1))
            result.append(sums + torch.eye(J + 1, dtype=terms.dtype))
        return result

    def values(self, environments: Environments) -> Tensor:
        """Return the bispectra, ``(n_centres, n_features)``, differentiable (twice) in ``environments.vectors``."""
        return self._couple(self.coefficients(environments)).flatten(1)

    def jacobian(self, environments: Environments) -> SparseJacobian:
        """Return the exact derivatives of :meth:`values` with respect to the positions; see the base class.

        By autograd, one backward pass per feature: a pair has one centre, so that the sum of a feature over all centres
        has the derivatives of each of them.
        """
        parts = []
        for bounds in chunks(environments, PAIRS_AT_ONCE):
            first, last, begin, end = bounds
            vectors = environments.vectors[begin:end].detach().requires_grad_()
            piece = environments._replace(
                species=environments.species[first:last],
                centre=environments.centre[begin:end] - first,
                neighbour_species=environments.neighbour_species[begin:end],
                vectors=vectors,
            )
            with torch.enable_grad():
                sums = self.values(piece).sum(0)
                slopes = [torch.autograd.grad(total, vectors, retain_graph=True)[0] for total in sums]
            parts.append(gather_slopes(environments, bounds, torch.stack(slopes, dim=1)))
        return SparseJacobian(*(torch.cat(column) for column in zip(*parts, strict=True)))

    def _terms(self, vectors: Tensor) -> list[Tensor]:
        """Return ``f U^j`` of every neighbour, ``(n_pairs, J + 1, J + 1)`` for each J."""
        x, y, z = vectors.T
        distances = (x * x + y * y + z * z).sqrt()
        angle = (self.theta_max / self.r_cut) * distances
        ratio = torch.sin(angle) / distances
        a, b = torch.complex(torch.cos(angle), -ratio * z), torch.complex(-ratio * y, -ratio * x)
        inside = distances < self.r_cut
        cutoff = torch.where(inside, 0.5 + 0.5 * torch.cos(math.pi / self.r_cut * distances), 0.0)
        return [cutoff[:, None, None] * matrix for matrix in wigner_matrices(a, b, self.J_max)]

    def _couple(self, u: list[Tensor]) -> Tensor:
        """Return the bispectrum of coefficients, ``(n_centres, n_densities, n_couplings)``."""
        spectra = []
        for J1, J2, J in self.couplings:
            c = clebsch_gordan(J1, J2, J).to(u[0])
            product = torch.einsum("abm,xyabk->xymk", c, torch.einsum("xyac,xybd,cdk->xyabk", u[J1], u[J2], c))
            spectra.append((u[J].conj() * product).sum((-1, -2)).real)
        return torch.stack(spectra, dim=2)
