r"""Radial bases of SOAP: overlaps of a displaced Gaussian with orthonormal functions (thesis eq. 2.11-2.12).

A neighbour at distance ``R`` has the density ``exp(-|r - R|^2 / 2 sigma^2)``. Its coefficient for the function
``g_n(r) Y_lm`` is ``f_nl(R) Y_lm(u)``, and with ``eta = 1 / 2 sigma^2`` and the modified spherical Bessel function

``f_nl(R) = 4 pi int r^2 g_n(r) exp(-eta (r^2 + R^2)) i_l(2 eta r R) dr``.

Two bases, both orthonormalised symmetrically (Loewdin), which is DScribe's choice (Himanen et al. 2020):

- ``gto``: ``r^l exp(-alpha_nl r^2)``, where ``alpha_nl`` makes function n decay to 1e-3 at radii spread evenly from
  1 Angstrom to ``r_cut``; the overlap is in closed form,
  ``(pi / (alpha + eta))^1.5 (eta R / (alpha + eta))^l exp(-alpha eta R^2 / (alpha + eta))``.
- ``polynomial``: ``(r_cut - r)^(n + 2)`` for n = 1 ... n_max, which vanish smoothly at the cutoff; the integral is done
  by Gauss-Legendre quadrature on Chebyshev nodes in ``R`` once, and the Chebyshev series, exact to rounding, is
  evaluated.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from functools import cached_property

import numpy as np
import torch
from numpy.polynomial import chebyshev
from numpy.typing import NDArray
from scipy import fft, linalg, special
from torch import Tensor
from torch.nn import functional

from tlmc.descriptors.polynomials import chebyshev_polynomials
from tlmc.errors import ConfigError

Array = NDArray[np.float64]


class RadialBasis(ABC):
    """``n_max`` orthonormal radial functions for each degree up to ``l_max``.

    Parameters
    ----------
    r_cut
        Length in Angstrom over which the functions extend.
    n_max
        Number of functions.
    l_max
        Highest degree.
    sigma
        Width of the Gaussians in Angstrom.
    reach
        Largest distance in Angstrom of an atom.
    """

    mixing: Tensor
    """Matrix from the overlaps that :meth:`overlaps` gives to those of orthonormal functions, ``(l_max + 1, n, n)``."""
    own: Tensor
    """Overlap of a Gaussian at the origin with the functions of degree zero, before mixing, ``(n_max,)``."""
    table: Tensor
    """What the compiled sums make the overlaps of: the exponents ``c_nl`` of Gaussian-type orbitals, ``(l_max + 1,
    n_max)``, or the coefficients of a Chebyshev series, ``(n_terms, l_max + 1, n_max)``."""
    slope_table: Tensor
    """The coefficients of the derivatives, ``(n_terms - 1, l_max + 1, n_max)``; empty for orbitals."""

    def __init__(self, r_cut: float, n_max: int, l_max: int, sigma: float, reach: float) -> None:
        self.r_cut, self.n_max, self.l_max, self.sigma, self.reach = r_cut, n_max, l_max, sigma, reach
        self.eta = 1.0 / (2.0 * sigma**2)

    @cached_property
    def filled(self) -> tuple[Tensor, Tensor, Tensor]:
        """``table``, ``slope_table`` and ``mixing``, transposed, rows filled up with zeros to a multiple of four.

        As the compiled sums read them.
        """
        tables = self.table, self.slope_table, self.mixing.transpose(1, 2)
        first, second, third = (functional.pad(table, (0, -self.n_max % 4)).contiguous() for table in tables)
        return first, second, third

    @abstractmethod
    def terms(self, distances: Tensor) -> Tensor:
        """Return the few functions of distances ``(..., n)`` that the overlaps are made of, ``(..., n_terms, n)``."""

    @abstractmethod
    def of_terms(self, terms: Tensor) -> Tensor:
        """Return the overlaps from what :meth:`terms` gives, ``(..., l_max + 1, n_max, n)``, before mixing."""

    def overlaps(self, distances: Tensor) -> Tensor:
        """Return the overlaps of atoms at distances ``(..., n)``, ``(..., l_max + 1, n_max, n)``, before mixing."""
        return self.of_terms(self.terms(distances))

    @abstractmethod
    def slopes(self, distances: Tensor) -> Tensor:
        """Return their derivatives with respect to the distance, per Angstrom."""

    @abstractmethod
    def functions(self, radii: Array) -> Array:
        """Return the orthonormal functions ``g_nl(r)``, shape ``(l_max + 1, n_max, n_radii)``."""


class GaussianBasis(RadialBasis):
    """Gaussian-type orbitals; see the module."""

    def __init__(self, r_cut: float, n_max: int, l_max: int, sigma: float, reach: float) -> None:
        super().__init__(r_cut, n_max, l_max, sigma, reach)
        if r_cut <= 1.0:
            raise ConfigError(f"Gaussian-type orbitals need r_cut above 1 A, got {r_cut}")
        decay = np.linspace(1.0, r_cut, n_max)
        degree = np.arange(l_max + 1)[:, None]
        self.alpha = (-math.log(1e-3) + degree * np.log(decay)) / decay**2
        sums = self.alpha[:, :, None] + self.alpha[:, None, :]
        half = degree[:, :, None] + 1.5
        overlap = 0.5 * special.gamma(half) * sums**-half
        self.weights = np.stack([_inverse_root(matrix) for matrix in overlap])
        both = self.alpha + self.eta
        factor = (math.pi / both) ** 1.5 * (self.eta / both) ** degree
        self.mixing = torch.from_numpy(self.weights * factor[:, None, :])
        self.table = torch.from_numpy(self.alpha * self.eta / both)
        self.slope_table = torch.zeros(0, l_max + 1, n_max, dtype=torch.float64)
        degrees = torch.from_numpy(degree).double().expand(-1, n_max)
        self._exponent = torch.stack([degrees, -self.table], dim=2).flatten(0, 1)
        self.own = torch.ones(n_max, dtype=torch.float64)

    def terms(self, distances: Tensor) -> Tensor:
        """Return ``log R`` and ``R^2``; see :class:`RadialBasis`."""
        return torch.stack([distances.log(), distances * distances], dim=-2)

    def of_terms(self, terms: Tensor) -> Tensor:
        """Return ``R^l exp(-c_nl R^2) = exp(l log R - c_nl R^2)``; see :class:`RadialBasis`."""
        return self._combined(terms).exp_()

    def slopes(self, distances: Tensor) -> Tensor:
        """Return ``(l / R - 2 c_nl R) R^l exp(-c_nl R^2)``; see :class:`RadialBasis`."""
        return self._combined(torch.stack([1.0 / distances, 2.0 * distances], dim=-2)) * self.overlaps(distances)

    def _combined(self, terms: Tensor) -> Tensor:
        """Return ``l first - c_nl second`` of two terms."""
        return (self._exponent.to(terms) @ terms).view(*terms.shape[:-2], self.l_max + 1, self.n_max, -1)

    def functions(self, radii: Array) -> Array:
        """Return the orthonormal functions; see :class:`RadialBasis`."""
        degree = np.arange(self.l_max + 1)[:, None, None]
        primitive: Array = radii**degree * np.exp(-self.alpha[:, :, None] * radii**2)
        result: Array = self.weights @ primitive
        return result


class PolynomialBasis(RadialBasis):
    """Polynomials that vanish at the cutoff; see the module."""

    def __init__(self, r_cut: float, n_max: int, l_max: int, sigma: float, reach: float) -> None:
        super().__init__(r_cut, n_max, l_max, sigma, reach)
        if sigma < 0.02 * r_cut:
            raise ConfigError(f"Gaussians of sigma = {sigma} A are too narrow for polynomials up to {r_cut} A")
        self._rotation = self._to_symmetric()
        self.mixing = torch.eye(n_max, dtype=torch.float64).expand(l_max + 1, -1, -1)
        series = self._chebyshev_series()
        self._series = torch.from_numpy(series)
        self.own = self.overlaps(torch.zeros(1, dtype=torch.float64))[0, :, 0].contiguous()
        slope = np.moveaxis(chebyshev.chebder(np.moveaxis(series, -1, 0)), 0, -1) * (2.0 / reach)
        self._slope_series = torch.from_numpy(slope)
        self.table, self.slope_table = self._series.permute(2, 0, 1), self._slope_series.permute(2, 0, 1)

    def terms(self, distances: Tensor) -> Tensor:
        """Return the Chebyshev polynomials of the distance; see :class:`RadialBasis`."""
        return chebyshev_polynomials(distances * (2.0 / self.reach) - 1.0, self._series.shape[-1] - 1)

    def of_terms(self, terms: Tensor) -> Tensor:
        """Return the overlaps from their series; see :class:`RadialBasis`."""
        return self._combined(self._series, terms)

    def slopes(self, distances: Tensor) -> Tensor:
        """Return the derivatives from the derived series; see :class:`RadialBasis`."""
        return self._combined(self._slope_series, self.terms(distances)[..., : self._slope_series.shape[-1], :])

    def functions(self, radii: Array) -> Array:
        """Return the orthonormal functions, the same for all degrees; see :class:`RadialBasis`."""
        t = np.clip(1.0 - radii / self.r_cut, 0.0, None)
        degree = np.arange(self.n_max)[:, None]
        legendre_like = t**3 * special.eval_jacobi(degree, 2, 6, 2.0 * t - 1.0) / self._norms()[:, None]
        return np.broadcast_to(self._rotation @ legendre_like, (self.l_max + 1, self.n_max, len(radii))).copy()

    def _norms(self) -> Array:
        """Return the norms of ``t^3 P_k^(2,6)(2 t - 1)`` with the weight ``r^2 dr``, where ``t = 1 - r / r_cut``."""
        squared = [self.r_cut**3 * (k + 1) * (k + 2) / ((2 * k + 9) * (k + 7) * (k + 8)) for k in range(self.n_max)]
        norms: Array = np.sqrt(np.array(squared))
        return norms

    def _to_symmetric(self) -> Array:
        """Return the rotation from orthonormal Jacobi polynomials to the symmetrically orthonormalised functions.

        The overlap matrix ``S`` of the powers is nearly singular, but its inverse is ``C^T C`` with the coefficients
        ``C`` of the Jacobi polynomials, known exactly. With ``C = U s V^T``, ``S^-1/2 = V s V^T`` and the rotation
        ``S^-1/2 C^-1`` is ``V U^T``, which rounding hardly touches.
        """
        coefficients = np.zeros((self.n_max, self.n_max))
        for k in range(self.n_max):
            front = math.factorial(k + 6) / (math.factorial(k) * math.factorial(k + 8))
            for j in range(k + 1):
                ratio = math.comb(k, j) * math.factorial(k + j + 8) / math.factorial(j + 6)
                coefficients[k, j] = (-1) ** (k - j) * front * ratio / self.r_cut ** (j + 3)
        left, _, right = linalg.svd(coefficients / self._norms()[:, None])
        result: Array = (left @ right).T
        return result

    @staticmethod
    def _combined(series: Tensor, terms: Tensor) -> Tensor:
        return (series.to(terms).flatten(0, 1) @ terms).view(*terms.shape[:-2], *series.shape[:2], -1)

    def _chebyshev_series(self) -> Array:
        """Return Chebyshev coefficients of the overlaps on 0 ... reach, ``(l_max + 1, n_max, n_terms)``."""
        n_terms = 32
        while True:
            nodes = np.cos(math.pi * (np.arange(n_terms) + 0.5) / n_terms)
            series: Array = fft.dct(self._quadrature(0.5 * self.reach * (nodes + 1.0)), axis=-1) / n_terms
            series[..., 0] *= 0.5
            largest = np.abs(series).max(axis=(0, 1))
            needed = int(np.nonzero(largest > 1e-14 * largest.max())[0][-1]) + 1
            if needed <= 0.9 * n_terms:
                return series[..., : max(needed, 2)]
            n_terms *= 2

    def _quadrature(self, distances: Array) -> Array:
        """Return the overlaps by quadrature over r, ``(l_max + 1, n_max, n_distances)``."""
        nodes, weights = np.polynomial.legendre.leggauss(100 + int(4.0 * self.r_cut / self.sigma))
        radii = 0.5 * self.r_cut * (nodes + 1.0)
        functions = self.functions(radii)[0] * radii**2 * weights * (0.5 * self.r_cut)
        result = np.empty((self.l_max + 1, self.n_max, len(distances)))
        argument = 2.0 * self.eta * radii[:, None] * distances
        gaussian = np.exp(-self.eta * (radii[:, None] - distances) ** 2)
        for degree in range(self.l_max + 1):
            # i_l(x) exp(-x), the growing exponential being in the Gaussian of r - R
            bessel = np.sqrt(math.pi / (2.0 * argument)) * special.ive(degree + 0.5, argument)
            result[degree] = 4.0 * math.pi * functions @ (bessel * gaussian)
        return result


def _inverse_root(matrix: Array) -> Array:
    """Return the inverse square root of a symmetric positive definite matrix.

    Raises
    ------
    ConfigError
        If the functions are linearly dependent in double precision.
    """
    values, vectors = linalg.eigh(matrix)
    if values[0] <= 0.0:
        raise ConfigError(f"{len(matrix)} radial functions are linearly dependent: lower n_max or raise r_cut")
    result: Array = (vectors / np.sqrt(values)) @ vectors.T
    return result
