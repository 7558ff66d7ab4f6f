r"""Gaussian process regression for more points than a Cholesky factor allows.

- *Nystrom*: ``k(a, b)`` is replaced by ``k(a, Z) k(Z, Z)^-1 k(Z, b)`` with m inducing points Z. The mean then is a sum
  of m kernels whose weights solve an m x m system: ``n m^2`` operations (subset of regressors; Quinonero-Candela and
  Rasmussen, J. Mach. Learn. Res. 6, 1939, 2005).
- *Conjugate gradients* solve the exact system by products with ``K + lambda 1``, whose blocks are made when they are
  needed: ``n^2`` operations per step and memory for one block. With the Nystrom matrix as a preconditioner few steps
  do (Hestenes and Stiefel, 1952; Rudi et al., NeurIPS 2017).

Hyperparameters are kept: learn them on a part of the points with :class:`tlmc.kernel_methods.gpr.GaussianProcess`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Self

import torch
from torch import Tensor

from tlmc.equality import equal_by_content
from tlmc.errors import ConfigError, ModelError
from tlmc.kernel_methods.functions import Kernel
from tlmc.kernel_methods.gpr import check_points
from tlmc.sampling.diversity import farthest_points

JITTER = 1e-10
"""Added to the diagonal of the inducing points' covariance, relative to the variance, so that it has a factor."""
BLOCK_ROWS = 512
"""Rows of the covariance matrix that are made at a time."""


class NystromProcess:
    """Gaussian process regression through a few inducing points.

    Parameters
    ----------
    kernel
        Covariance function.
    noise
        Variance of the noise of the labels.
    n_inducing
        Number of inducing points, chosen far from each other among the training points.
    centre
        Subtract the labels' mean before the fit and add it to predictions.

    Attributes
    ----------
    inducing_
        Shape ``(n_inducing, n_features)``.
    weights_
        Shape ``(n_inducing,)``.
    """

    def __init__(self, kernel: Kernel, noise: float, n_inducing: int, centre: bool = True) -> None:
        self.kernel = kernel
        self.noise = noise
        self.n_inducing = n_inducing
        self.centre = centre

    def fit(self, x: Tensor, y: Tensor) -> Self:
        """Learn from points ``(n, n_features)`` and labels ``(n,)``; errors as those of the exact process."""
        _check_noise(self.noise)
        x, y = check_points(x, y)
        self.mean_ = float(y.mean()) if self.centre else 0.0
        self.inducing_ = x[torch.from_numpy(farthest_points(x, self.n_inducing))]
        self.prior_factor_ = inducing_factor(self.kernel, self.inducing_)
        half = torch.linalg.solve_triangular(self.prior_factor_, self.kernel(self.inducing_, x), upper=False)
        # B = 1 + V V^T / lambda with V = L^-1 K_mn is well conditioned, K_mm + K_mn K_nm / lambda is not
        system = half @ half.T / self.noise
        system.diagonal().add_(1.0)
        self.posterior_factor_ = torch.linalg.cholesky(system)
        solution = torch.cholesky_solve((half @ (y - self.mean_))[:, None] / self.noise, self.posterior_factor_)
        self.weights_ = torch.linalg.solve_triangular(self.prior_factor_.T, solution, upper=True)[:, 0]
        return self

    def predict(self, x: Tensor) -> Tensor:
        """Return the mean at points ``(m, n_features)``, shape ``(m,)``."""
        mean: Tensor = self.kernel(x, self.inducing_) @ self.weights_ + self.mean_
        return mean

    def std(self, x: Tensor) -> Tensor:
        """Return the standard deviation at points ``(m, n_features)``: prior beyond the inducing points included."""
        half = torch.linalg.solve_triangular(self.prior_factor_, self.kernel(self.inducing_, x), upper=False)
        seen = torch.linalg.solve_triangular(self.posterior_factor_, half, upper=False)
        variance: Tensor = self.kernel.variance - half.square().sum(0) + seen.square().sum(0)
        return variance.clamp(min=0.0).sqrt()


class IterativeProcess:
    """Exact mean of a Gaussian process by preconditioned conjugate gradients, without the covariance matrix.

    Parameters
    ----------
    kernel
        Covariance function.
    noise
        Variance of the noise of the labels.
    n_inducing
        Inducing points of the preconditioner; none if zero.
    tolerance
        Norm of the residual over that of the labels at which the iteration stops.
    max_steps
        After which it gives up.
    centre
        Subtract the labels' mean before the fit and add it to predictions.

    Attributes
    ----------
    weights_
        Shape ``(n,)``.
    n_steps_
        Iterations that were needed.
    """

    def __init__(
        self,
        kernel: Kernel,
        noise: float,
        n_inducing: int = 0,
        tolerance: float = 1e-10,
        max_steps: int = 1000,
        centre: bool = True,
    ) -> None:
        self.kernel = kernel
        self.noise = noise
        self.n_inducing = n_inducing
        self.tolerance = tolerance
        self.max_steps = max_steps
        self.centre = centre

    def fit(self, x: Tensor, y: Tensor) -> Self:
        """Learn from points ``(n, n_features)`` and labels ``(n,)``.

        Raises
        ------
        ModelError
            If the iteration does not converge.
        """
        _check_noise(self.noise)
        self.x_, y = check_points(x, y)
        self.mean_ = float(y.mean()) if self.centre else 0.0
        found = conjugate_gradients(
            self._product,
            y - self.mean_,
            self._preconditioner() if self.n_inducing else None,
            self.tolerance,
            self.max_steps,
        )
        self.weights_, self.n_steps_, self.residuals_ = found
        return self

    def predict(self, x: Tensor) -> Tensor:
        """Return the mean at points ``(m, n_features)``, shape ``(m,)``."""
        return torch.cat([self.kernel(part, self.x_) @ self.weights_ for part in x.split(BLOCK_ROWS)]) + self.mean_

    def _product(self, vector: Tensor) -> Tensor:
        """Return ``(K + lambda 1) v``, a block of rows at a time."""
        return torch.cat([self.kernel(part, self.x_) @ vector for part in self.x_.split(BLOCK_ROWS)]) + (
            self.noise * vector
        )

    def _preconditioner(self) -> Callable[[Tensor], Tensor]:
        """Return ``(V^T V + lambda 1)^-1`` as a function, by the Woodbury identity."""
        inducing = self.x_[torch.from_numpy(farthest_points(self.x_, self.n_inducing))]
        factor = inducing_factor(self.kernel, inducing)
        half = torch.linalg.solve_triangular(factor, self.kernel(inducing, self.x_), upper=False)
        system = half @ half.T
        system.diagonal().add_(self.noise)
        inner = torch.linalg.cholesky(system)

        def apply(vector: Tensor) -> Tensor:
            correction: Tensor = half.T @ torch.cholesky_solve((half @ vector)[:, None], inner)[:, 0]
            result: Tensor = (vector - correction) / self.noise
            return result

        return apply


@equal_by_content
class Solution(NamedTuple):
    """What the iteration found."""

    vector: Tensor
    """Shape ``(n,)``."""
    n_steps: int
    residuals: list[float]
    """Norm of the residual over that of the right-hand side, before the first and after every step."""


def conjugate_gradients(
    product: Callable[[Tensor], Tensor],
    right: Tensor,
    precondition: Callable[[Tensor], Tensor] | None = None,
    tolerance: float = 1e-10,
    max_steps: int = 1000,
) -> Solution:
    """Solve ``A v = b`` for a symmetric positive definite ``A`` that is known by its products only.

    Parameters
    ----------
    product
        Returns ``A v``.
    right
        ``b``, shape ``(n,)``.
    precondition
        Returns an approximation of ``A^-1 v``.
    tolerance
        Relative norm of the residual at which the iteration stops.
    max_steps
        After which it gives up.

    Raises
    ------
    ModelError
        If it has not converged by then.
    """
    solution = torch.zeros_like(right)
    residual, size = right.clone(), float(right.norm())
    if size == 0.0:
        return Solution(solution, 0, [0.0])
    history = [1.0]
    direction = z = precondition(residual) if precondition else residual
    old = residual @ z
    while history[-1] > tolerance:
        if len(history) > max_steps:
            raise ModelError(
                f"conjugate gradients have not converged in {max_steps} steps: residual {history[-1]:.1e}, wanted "
                f"{tolerance:.1e}; raise the noise or the number of inducing points"
            )
        image = product(direction)
        step = old / (direction @ image)
        solution = solution + step * direction
        residual = residual - step * image
        history.append(float(residual.norm()) / size)
        z = precondition(residual) if precondition else residual
        new = residual @ z
        direction = z + (new / old) * direction
        old = new
    return Solution(solution, len(history) - 1, history)


def inducing_factor(kernel: Kernel, points: Tensor) -> Tensor:
    """Return the lower Cholesky factor of the points' covariance."""
    covariance = kernel(points, points)
    covariance.diagonal().add_(JITTER * kernel.variance)
    factor: Tensor = torch.linalg.cholesky(covariance)
    return factor


def _check_noise(noise: float) -> None:
    if not noise > 0.0:
        raise ConfigError(f"noise must be a positive variance, got {noise}")
