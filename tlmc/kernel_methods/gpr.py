r"""Gaussian process regression (thesis eqs. 2.25-2.27; Rasmussen and Williams, algorithm 2.1 and eq. 5.9).

Labels ``y = f(x) + noise`` with a Gaussian process ``f`` of covariance ``k`` and noise of variance ``lambda`` give

``mean(x) = k(x, X) w``,  ``w = (K + lambda 1)^-1 y``,  ``var(x) = k(x, x) - k(x, X) (K + lambda 1)^-1 k(X, x)``.

The Cholesky factor of ``K + lambda 1`` costs ``M^3 / 3`` multiplications for M labels; all else is cheaper.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import minimize
from torch import Tensor

from tlmc.errors import ConfigError, DataError, ModelError
from tlmc.kernel_methods.functions import Kernel, distances

SEARCH_RANGE = 1e5
"""Hyperparameters are searched between their start divided and multiplied by this."""


class GaussianProcess:
    """Exact Gaussian process regression.

    Parameters
    ----------
    kernel
        Covariance function; where the search for hyperparameters starts.
    noise
        Variance ``lambda`` of the noise of the labels, in their squared unit; where its search starts.
    optimize
        Maximise the marginal likelihood over the hyperparameters and the noise (L-BFGS-B, exact gradient), or keep
        them.
    centre
        Subtract the labels' mean before the fit and add it to predictions.

    Attributes
    ----------
    kernel_, noise_
        Kernel and noise variance after the fit.
    x_, distances_
        Training points, shape ``(n, n_features)``, and their distances from each other, shape ``(n, n)``.
    weights_
        ``(K + lambda 1)^-1 (y - mean)``, shape ``(n,)``.
    factor_
        Lower Cholesky factor of ``K + lambda 1``, shape ``(n, n)``.
    mean_
        What was subtracted from the labels.
    log_likelihood_
        Logarithm of the marginal likelihood.
    """

    def __init__(self, kernel: Kernel, noise: float = 1e-6, optimize: bool = True, centre: bool = True) -> None:
        self.kernel = kernel
        self.noise = noise
        self.optimize = optimize
        self.centre = centre

    def fit(self, x: Tensor, y: Tensor) -> Self:
        """Learn from labelled points.

        Parameters
        ----------
        x
            Points, shape ``(n, n_features)``.
        y
            Labels, shape ``(n,)``.

        Raises
        ------
        ConfigError
            If the noise is not positive.
        DataError
            If the shapes do not fit or a value is not finite.
        ModelError
            If the covariance matrix has no Cholesky factor: the noise is too small for points so close together.
        """
        if not 0.0 < self.noise < math.inf:
            raise ConfigError(f"noise must be a positive variance, got {self.noise}")
        self.x_, y = check_points(x, y)
        self.mean_ = float(y.mean()) if self.centre else 0.0
        self.y_ = y - self.mean_
        self.distances_ = distances(self.x_, self.x_)
        self.kernel_, self.noise_ = self.kernel, float(self.noise)
        if self.optimize:
            start = torch.cat([self.kernel.theta, torch.tensor([math.log(self.noise)], dtype=torch.float64)])
            theta = self._search(start)
            self.kernel_, self.noise_ = self.kernel.with_theta(theta[:-1]), float(theta[-1].exp())
        covariance = self.kernel_.of_distances(self.distances_, self.kernel_.theta)
        covariance.diagonal().add_(self.noise_)
        factor, info = torch.linalg.cholesky_ex(covariance)
        if int(info):
            raise ModelError(
                f"the covariance of {len(y)} points with {self.kernel_} and noise {self.noise_:.3g} is singular to "
                "rounding: some points nearly coincide; raise the noise"
            )
        self.factor_ = factor
        self.weights_ = torch.cholesky_solve(self.y_[:, None], factor)[:, 0]
        self.log_likelihood_ = _log_likelihood(factor, self.y_, self.weights_)
        return self

    def predict(self, x: Tensor) -> Tensor:
        """Return the mean at points ``(m, n_features)``, shape ``(m,)``; differentiable in the points."""
        mean: Tensor = self.kernel_(x, self.x_) @ self.weights_ + self.mean_
        return mean

    def std(self, x: Tensor) -> Tensor:
        """Return the standard deviation of ``f`` (without the noise) at points ``(m, n_features)``, shape ``(m,)``."""
        half = torch.linalg.solve_triangular(self.factor_, self.kernel_(self.x_, x), upper=False)
        variance: Tensor = self.kernel_.variance - half.square().sum(0)
        return variance.clamp(min=0.0).sqrt()

    def sample(self, x: Tensor, n_samples: int, rng: np.random.Generator) -> Tensor:
        """Draw functions from the posterior.

        Parameters
        ----------
        x
            Points, shape ``(m, n_features)``.
        n_samples
            Number of functions.
        rng
            Where the numbers come from.

        Returns
        -------
        Tensor
            Shape ``(n_samples, m)``.
        """
        half = torch.linalg.solve_triangular(self.factor_, self.kernel_(self.x_, x), upper=False)
        covariance = self.kernel_(x, x) - half.T @ half
        # eigenvalues of a smooth posterior fall below rounding, where a Cholesky factor does not exist
        values, vectors = torch.linalg.eigh(covariance)
        normal = torch.from_numpy(rng.standard_normal((n_samples, len(x))))
        deviations: Tensor = (normal * values.clamp(min=0.0).sqrt()) @ vectors.T
        return self.predict(x) + deviations

    def log_marginal_likelihood(self, theta: Tensor) -> tuple[float, Tensor]:
        r"""Return the logarithm of the probability of the labels, and its gradient.

        ``log p(y) = -1/2 y.w - sum_i log L_ii - n/2 log(2 pi)``, and since ``w`` and the factor depend on the
        covariance matrix C only, ``d log p = 1/2 sum_ij (w w^T - C^-1)_ij dC_ij``.

        Parameters
        ----------
        theta
            Logarithms of the kernel's hyperparameters and, last, of the noise variance.

        Returns
        -------
        tuple
            The value, minus infinity where the covariance is singular, and its derivatives with respect to ``theta``.
        """
        theta = theta.detach().clone().requires_grad_()
        covariance = self.kernel.of_distances(self.distances_, theta[:-1])
        covariance = covariance + theta[-1].exp() * torch.eye(len(self.x_), dtype=torch.float64)
        factor, info = torch.linalg.cholesky_ex(covariance.detach())
        if int(info):
            return -math.inf, torch.zeros_like(theta)
        weights = torch.cholesky_solve(self.y_[:, None], factor)[:, 0]
        slope = 0.5 * (torch.outer(weights, weights) - torch.cholesky_inverse(factor))
        (gradient,) = torch.autograd.grad(covariance, theta, slope)
        return _log_likelihood(factor, self.y_, weights), gradient

    def _search(self, start: Tensor) -> Tensor:
        def objective(theta: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
            value, gradient = self.log_marginal_likelihood(torch.from_numpy(theta))
            return -value, -gradient.numpy()

        reach = math.log(SEARCH_RANGE)
        bounds = [(t - reach, t + reach) for t in start.tolist()]
        found = minimize(objective, start.numpy(), jac=True, method="L-BFGS-B", bounds=bounds)
        return torch.from_numpy(found.x)


def likely_start(
    kind: type[Kernel],
    x: Tensor,
    y: Tensor,
    lengths: Sequence[float] = (0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0),
    ratios: Sequence[float] = (1e-1, 1e-3, 1e-5, 1e-7, 1e-9),
) -> tuple[Kernel, float]:
    """Find where a search for hyperparameters should begin, among lengths and ratios of noise to variance.

    The likelihood has plateaus, where all is noise or all points are strangers, and a search that begins on one stays
    there. For a given length and ratio the best variance is known: with ``C = K / variance + ratio 1`` it is
    ``y.C^-1 y / n``, so that a coarse grid of two numbers is enough.

    Parameters
    ----------
    kind
        Class of the covariance function.
    x, y
        Points ``(n, n_features)`` and labels ``(n,)``, whose mean is subtracted.
    lengths
        In units of the median distance of the points.
    ratios
        Of noise to variance.

    Returns
    -------
    tuple
        Kernel and noise variance of the highest likelihood.

    Raises
    ------
    DataError
        If all labels or most points are equal.
    """
    x, y = check_points(x, y)
    y = y - y.mean()
    distance = float(torch.pdist(x).median()) if len(x) > 1 else 0.0
    apart = distances(x, x)
    if distance == 0.0 or not bool(y.any()):
        raise DataError(
            f"{len(y)} points with a median distance of {distance:g} and labels of norm {float(y.norm()):g}"
        )
    best: tuple[float, float, float, float] | None = None
    for length in lengths:
        unit = kind.shape(apart / (length * distance))
        for ratio in ratios:
            factor, info = torch.linalg.cholesky_ex(unit + ratio * torch.eye(len(x), dtype=torch.float64))
            if int(info):
                continue
            variance = float(y @ torch.cholesky_solve(y[:, None], factor)[:, 0]) / len(y)
            likelihood = -0.5 * len(y) * math.log(variance) - float(factor.diagonal().log().sum())
            if best is None or likelihood > best[0]:
                best = likelihood, variance, length * distance, ratio
    if best is None:
        raise ModelError(f"the covariance of {len(y)} points is singular at every length and noise that were tried")
    return kind(best[1], best[2]), best[1] * best[3]


def check_points(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Return points and labels in double precision.

    Raises
    ------
    DataError
        If the shapes are not ``(n, n_features)`` and ``(n,)`` with n > 0, or a value is not finite.
    """
    x, y = torch.as_tensor(x, dtype=torch.float64).detach(), torch.as_tensor(y, dtype=torch.float64).detach()
    if x.ndim != 2 or y.shape != x.shape[:1] or len(y) == 0:
        raise DataError(
            f"points must have shape (n, n_features), labels (n,), got {tuple(x.shape)} and {tuple(y.shape)}"
        )
    if not bool(x.isfinite().all() and y.isfinite().all()):
        raise DataError("points and labels must be finite numbers, got NaN or infinity")
    return x, y


def _log_likelihood(factor: Tensor, y: Tensor, weights: Tensor) -> float:
    constant = 0.5 * len(y) * math.log(2.0 * math.pi)
    return float(-0.5 * y @ weights - factor.diagonal().log().sum()) - constant
