"""What a kernel hides: the features whose scalar product it is (thesis section 2.2, figure 2.3, eqs. 2.20-2.22)."""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tlmc.errors import ConfigError


def quadratic_features(points: Tensor) -> Tensor:
    """Map points of the plane to ``(x^2, sqrt(2) x y, y^2)``, whose scalar product is ``(p . q)^2``.

    Parameters
    ----------
    points
        Shape ``(n, 2)``.

    Returns
    -------
    Tensor
        Shape ``(n, 3)``.
    """
    x, y = points.unbind(-1)
    return torch.stack([x * x, math.sqrt(2.0) * x * y, y * y], dim=-1)


def rings(n: int, radii: tuple[float, float], width: float, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Draw two classes that no straight line separates: a disc of points and a ring around it.

    Parameters
    ----------
    n
        Points per class.
    radii
        Mean distance from the origin of either class.
    width
        Standard deviation of the distances.
    rng
        Where the numbers come from.

    Returns
    -------
    tuple of Tensor
        Points, shape ``(2 n, 2)``, and labels -1 (inner) and +1 (outer), shape ``(2 n,)``.
    """
    labels: NDArray[np.float64] = np.repeat([-1.0, 1.0], n)
    distance = np.repeat(radii, n) + width * rng.normal(size=2 * n)
    angle = rng.uniform(0.0, 2.0 * np.pi, size=2 * n)
    points = distance[:, None] * np.stack([np.cos(angle), np.sin(angle)], axis=1)
    return torch.from_numpy(points), torch.from_numpy(labels)


def gaussian_series(a: Tensor, b: Tensor, gamma: float, n_terms: int) -> Tensor:
    """Return the Gaussian kernel from its Taylor series in the scalar product.

    ``exp(-gamma |a - b|^2) = exp(-gamma |a|^2) exp(-gamma |b|^2) sum_d (2 gamma)^d (a . b)^d / d!``: a sum of all
    polynomial kernels. (The thesis prints the cross factor without its plus sign and the series without the power of
    ``2 gamma``, eqs. 2.21-2.22.)

    Parameters
    ----------
    a, b
        Points, shapes ``(n, n_features)`` and ``(m, n_features)``.
    gamma
        Inverse squared width, in the inverse squared unit of the points.
    n_terms
        Number of terms, from degree zero.

    Returns
    -------
    Tensor
        Shape ``(n, m)``.

    Raises
    ------
    ConfigError
        If there is no term, or gamma is not positive.
    """
    if n_terms < 1 or gamma <= 0.0:
        raise ConfigError(f"the series needs a positive gamma and at least one term, got {gamma} and {n_terms}")
    product = 2.0 * gamma * a @ b.T
    term, total = torch.ones_like(product), torch.ones_like(product)
    for degree in range(1, n_terms):
        term = term * product / degree
        total = total + term
    norms = [torch.exp(-gamma * points.square().sum(-1)) for points in (a, b)]
    return norms[0][:, None] * norms[1] * total
