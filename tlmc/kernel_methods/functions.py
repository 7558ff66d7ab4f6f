"""Covariance functions: positive semi-definite functions of two points (thesis section 2.2)."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, fields
from typing import Self

import torch
from torch import Tensor

from tlmc.errors import ConfigError


@dataclass(frozen=True)
class Kernel(ABC):
    """A covariance function whose hyperparameters, its fields, are all positive.

    Optimisers see their logarithms: positivity needs no bounds, and steps are relative.
    """

    variance: float = 1.0
    """``k(x, x)``, in the squared unit of the labels."""
    length: float = 1.0
    """Distance over which the function forgets, in the unit of the points."""

    def __post_init__(self) -> None:
        for name, value in self.parameters().items():
            if not 0.0 < value < math.inf:
                raise ConfigError(f"{type(self).__name__} needs a positive {name}, got {value}")

    def parameters(self) -> dict[str, float]:
        """Return the hyperparameters by name."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @property
    def theta(self) -> Tensor:
        """Logarithms of the hyperparameters in the order of the fields, shape ``(n_hyperparameters,)``."""
        return torch.tensor(list(self.parameters().values()), dtype=torch.float64).log()

    def with_theta(self, theta: Tensor) -> Self:
        """Return the same function with other hyperparameters, given as logarithms."""
        return type(self)(*theta.detach().exp().tolist())

    def __call__(self, a: Tensor, b: Tensor) -> Tensor:
        """Return the covariances of all pairs.

        Parameters
        ----------
        a, b
            Points, shapes ``(n, n_features)`` and ``(m, n_features)``.

        Returns
        -------
        Tensor
            Shape ``(n, m)``.
        """
        return self.of_distances(distances(a, b), self.theta)

    def of_distances(self, distances: Tensor, theta: Tensor) -> Tensor:
        """Return the covariances at some distances, for logarithms ``theta`` of the hyperparameters."""
        variance, length = theta.exp()
        covariances: Tensor = variance * self.shape(distances / length)
        return covariances

    @staticmethod
    @abstractmethod
    def shape(distances: Tensor) -> Tensor:
        """Return the covariance for variance and length one."""


@dataclass(frozen=True)
class Gaussian(Kernel):
    """``variance exp(-d^2 / 2 length^2)``; the thesis writes ``gamma`` for ``1 / 2 length^2`` (eq. 2.20)."""

    @staticmethod
    def shape(distances: Tensor) -> Tensor:
        """Return ``exp(-d^2 / 2)``."""
        return torch.exp(-0.5 * distances.square())


@dataclass(frozen=True)
class Matern52(Kernel):
    """``variance (1 + s + s^2 / 3) exp(-s)`` with ``s = sqrt(5) d / length``: its functions have two derivatives."""

    @staticmethod
    def shape(distances: Tensor) -> Tensor:
        """Return the Matern function of smoothness 5/2."""
        s = math.sqrt(5.0) * distances
        return (1.0 + s + s.square() / 3.0) * torch.exp(-s)


def distances(a: Tensor, b: Tensor) -> Tensor:
    """Return the Euclidean distances of all pairs of points, shape ``(n, m)``, with all digits of the small ones."""
    # not by |a|^2 + |b|^2 - 2 a.b, which loses half of them
    return torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")
