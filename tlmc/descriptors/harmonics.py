r"""Real spherical harmonics as polynomials of the unit vector, and their derivatives.

With ``(x + i y)^m = A_m + i B_m`` and ``Q_lm(z) = N_lm d^m P_l / dz^m``,

``Y_lm = sqrt(2) A_m Q_lm``, ``Y_l-m = sqrt(2) B_m Q_lm``, ``Y_l0 = Q_l0``

are orthonormal on the sphere. Nothing is singular at the poles. ``Q_lm`` is kept as a series of Chebyshev polynomials
of z, whose coefficients do not grow with the degree as those of powers do, so that all harmonics are one matrix product
and one product with ``A_m`` and ``B_m``.

All degrees stand in one array with ``2 l_max + 2`` places for the orders: first ``m = 0 ... l_max``, then
``m = -0, -1 ... -l_max``, where ``-0`` and what is beyond a degree hold zeros. Both halves share the polynomials.
"""

from __future__ import annotations

import math
from functools import cache

import numpy as np
import torch
from numpy.polynomial import chebyshev, legendre
from torch import Tensor

from tlmc.descriptors.polynomials import chebyshev_polynomials


def harmonic_factors(directions: Tensor, l_max: int) -> tuple[Tensor, Tensor]:
    """Return what harmonics are made of, which is much smaller: see :func:`joined_harmonics`.

    Parameters
    ----------
    directions
        Unit vectors, shape ``(3, ..., n)``.
    l_max
        Highest degree.

    Returns
    -------
    tuple of Tensor
        Polynomials of the height z, ``(..., l_max + 1, n)``, and ``A_m`` and ``B_m``, ``(..., 2, l_max + 1, n)``.
    """
    x, y, z = directions
    return chebyshev_polynomials(z, l_max), _azimuths(x, y, l_max)


def joined_harmonics(heights: Tensor, azimuths: Tensor) -> Tensor:
    """Return the real orthonormal spherical harmonics of all degrees.

    Parameters
    ----------
    heights, azimuths
        What :func:`harmonic_factors` returns. Harmonics are linear in either, so that weights can be put on one.

    Returns
    -------
    Tensor
        Shape ``(..., l_max + 1, 2 l_max + 2, n)``, no Condon-Shortley phase.
    """
    return _product(_series(_table(heights.shape[-2] - 1)[0], heights), azimuths)


def padded_harmonics_and_gradients(directions: Tensor, l_max: int) -> Tensor:
    """Return the harmonics and the gradients of these polynomials in ``x, y, z``.

    For ``u = v / |v|`` the derivative with respect to ``v`` is the part of the gradient across ``u``, over ``|v|``.

    Parameters
    ----------
    directions
        Unit vectors, shape ``(3, ..., n)``.
    l_max
        Highest degree.

    Returns
    -------
    Tensor
        Shape ``(..., l_max + 1, 2 l_max + 2, 4, n)``: value and three derivatives.
    """
    heights, around = harmonic_factors(directions, l_max)
    values, slopes = (_series(table, heights) for table in _table(l_max))
    # dA_m/dx = m A_{m-1} = dB_m/dy and dB_m/dx = m B_{m-1} = -dA_m/dy; B_0 = 0
    order = torch.arange(1, l_max + 1, dtype=heights.dtype)[:, None]
    below = torch.cat([torch.zeros_like(around[..., :1, :]), order * around[..., :l_max, :]], dim=-2)
    around_y = torch.stack([-below[..., 1, :, :], below[..., 0, :, :]], dim=-3)
    parts = [_product(values, part) for part in (around, below, around_y)]
    return torch.stack([*parts, _product(slopes, around)], dim=-2)


def degrees(padded: Tensor, dim: int, orders: int) -> list[Tensor]:
    """Cut an array of all degrees into one tensor per degree without the empty places.

    Parameters
    ----------
    padded
        Harmonics, or what was made of them.
    dim, orders
        Dimensions of the degrees and, after it, of the orders; not negative.

    Returns
    -------
    list of Tensor
        For each degree the array without the dimension ``dim``, orders ``m = -l ... l``.
    """
    l_max = padded.shape[dim] - 1
    result, along = [], orders - 1
    for degree in range(l_max + 1):
        one = padded.select(dim, degree)
        negative = one.narrow(along, l_max + 2, degree).flip(along)
        result.append(torch.cat([negative, one.narrow(along, 0, degree + 1)], dim=along))
    return result


def _series(table: Tensor, heights: Tensor) -> Tensor:
    return (table.to(heights).flatten(0, 1) @ heights).view(*heights.shape[:-2], *table.shape[:2], -1)


def _product(series: Tensor, azimuths: Tensor) -> Tensor:
    return (series[..., None, :, :] * azimuths[..., None, :, :, :]).flatten(-3, -2)


def _azimuths(x: Tensor, y: Tensor, l_max: int) -> Tensor:
    """Return ``A_0 ... A_l_max`` and ``B_0 ... B_l_max``, shape ``(..., 2, l_max + 1, n)``; powers by doubling."""
    ends = torch.stack([torch.ones_like(x), torch.zeros_like(x)], dim=-2)[..., None, :]
    if l_max == 0:
        return ends
    powers = torch.complex(x, y)[..., None, :]
    while (n := powers.shape[-2]) < l_max:
        powers = torch.cat([powers, powers[..., : l_max - n, :] * powers[..., -1:, :]], dim=-2)
    return torch.cat([ends, torch.stack([powers.real, powers.imag], dim=-3)], dim=-2)


@cache
def _table(l_max: int) -> tuple[Tensor, Tensor]:
    """Return Chebyshev coefficients of ``Q_lm`` and of its derivative, ``(l_max + 1, l_max + 1, l_max + 1)``."""
    tables = np.zeros((2, l_max + 1, l_max + 1, l_max + 1))
    nodes = chebyshev.chebpts1(l_max + 1)
    for degree in range(l_max + 1):
        for m in range(degree + 1):
            norm = (2 * degree + 1) / (4.0 * math.pi) * math.factorial(degree - m) / math.factorial(degree + m)
            norm = math.sqrt(norm * (2.0 if m else 1.0))
            for which in range(2):
                series = legendre.legder(np.eye(degree + 1)[degree], m + which)
                exact = chebyshev.chebfit(nodes, legendre.legval(nodes, series), degree)
                tables[which, degree, m, : degree + 1] = norm * exact
    return torch.from_numpy(tables[0]), torch.from_numpy(tables[1])
