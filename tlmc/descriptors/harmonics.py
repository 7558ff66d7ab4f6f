r"""Real spherical harmonics by recurrence, as polynomials of the unit vector, and their derivatives.

With ``(x + i y)^m = A_m + i B_m`` and ``Q_lm(z) = N_lm d^m P_l / dz^m``,

``Y_lm = sqrt(2) A_m Q_lm``, ``Y_l-m = sqrt(2) B_m Q_lm``, ``Y_l0 = Q_l0``

are orthonormal on the sphere. Nothing is singular at the poles. The derivative of ``Q_lm`` is a multiple of
``Q_l,m+1``, so that gradients cost no new functions.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def spherical_harmonics(directions: Tensor, l_max: int, weights: Tensor | None = None) -> list[Tensor]:
    """Return the real orthonormal spherical harmonics, one tensor per degree.

    Parameters
    ----------
    directions
        Unit vectors, shape ``(3, n)``.
    l_max
        Highest degree.
    weights
        Factors of every vector's harmonics, shape ``(n,)``; one if not given.

    Returns
    -------
    list of Tensor
        For each degree ``l`` shape ``(2 l + 1, n)``, orders ``m = -l ... l`` (no Condon-Shortley phase, the order of
        sphericart).
    """
    legendre, even, odd = _factors(directions, l_max, weights)
    return [_join(legendre[degree], even, odd) for degree in range(l_max + 1)]


def harmonics_and_gradients(directions: Tensor, l_max: int) -> tuple[list[Tensor], list[Tensor]]:
    """Return the harmonics and the gradients of these polynomials in ``x, y, z``.

    For ``u = v / |v|`` the derivative with respect to ``v`` is the part of the gradient across ``u``, over ``|v|``.

    Parameters
    ----------
    directions
        Unit vectors, shape ``(3, n)``.
    l_max
        Highest degree.

    Returns
    -------
    tuple of lists of Tensor
        For each degree shapes ``(2 l + 1, n)`` and ``(3, 2 l + 1, n)``.
    """
    legendre, even, odd = _factors(directions, l_max, None)
    values, gradients = [], []
    # dA_m/dx = m A_{m-1} = dB_m/dy and dB_m/dx = m B_{m-1} = -dA_m/dy
    m = torch.arange(l_max + 1, dtype=directions.dtype)[:, None]
    zero = torch.zeros_like(even[:1])
    even_x, odd_x = m * torch.cat([zero, even[:-1]]), m * torch.cat([zero, odd[:-1]])
    for degree in range(l_max + 1):
        q = legendre[degree]
        values.append(_join(q, even, odd))
        orders = torch.arange(degree, dtype=directions.dtype)
        factors = ((degree + orders + 1.0) * (degree - orders)).sqrt()[:, None]
        slope = torch.cat([factors * q[1:], zero])
        gradients.append(torch.stack([_join(q, even_x, odd_x), _join(q, -odd_x, even_x), _join(slope, even, odd)]))
    return values, gradients


def _factors(directions: Tensor, l_max: int, weights: Tensor | None) -> tuple[list[Tensor], Tensor, Tensor]:
    """Return ``Q_lm`` for m >= 0, ``(l + 1, n)`` per degree, and ``A_m, B_m``, ``(l_max + 1, n)``."""
    x, y, z = directions
    one = torch.ones_like(z) if weights is None else weights
    even, odd = [torch.ones_like(z)], [torch.zeros_like(z)]
    for _ in range(l_max):
        a, b = even[-1], odd[-1]
        even.append(x * a - y * b)
        odd.append(x * b + y * a)
    sectoral = math.sqrt(1.0 / (4.0 * math.pi))
    legendre = [sectoral * one[None]]
    for degree in range(1, l_max + 1):
        below = math.sqrt(2.0 * degree + 1.0) * z * legendre[-1][-1]
        sectoral *= math.sqrt((2.0 * degree + 1.0) / (2.0 * degree))
        parts = [below[None], sectoral * one[None]]
        if degree > 1:
            m = torch.arange(degree - 1, dtype=z.dtype)[:, None]
            rise = ((4.0 * degree**2 - 1.0) / (degree**2 - m**2)).sqrt()
            fall = (((degree - 1.0) ** 2 - m**2) / (4.0 * (degree - 1.0) ** 2 - 1.0)).sqrt()
            upper = rise * (z * legendre[-1][:-1])
            parts.insert(0, torch.addcmul(upper, -rise * fall, legendre[-2]))
        legendre.append(torch.cat(parts))
    return legendre, torch.stack(even), torch.stack(odd)


def _join(legendre: Tensor, even: Tensor, odd: Tensor) -> Tensor:
    """Return the orders -l ... l of one degree."""
    degree = len(legendre) - 1
    if degree == 0:
        return legendre * even[:1]
    tail = math.sqrt(2.0) * legendre[1:]
    return torch.cat([(tail * odd[1 : degree + 1]).flip(0), legendre[:1] * even[:1], tail * even[1 : degree + 1]])
