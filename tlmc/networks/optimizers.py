r"""Optimisers written out: from gradient descent to AdamW (thesis 2.3.2, eq. 2.36-2.39).

All of them move parameters :math:`w` against a gradient :math:`g_t`; they differ in what they remember of the gradients
before. An optimiser is given the gradients, from wherever they come (back-propagation by hand, autograd, a formula),
and changes the parameters in place. Where torch has the same method, constants, their names and defaults are torch's,
and trajectories agree with it to rounding.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import Final

import torch
from torch import Tensor

from tlmc.errors import ConfigError


class Optimizer(ABC):
    """Moves parameters against their gradients.

    Parameters
    ----------
    parameters
        Tensors that :meth:`step` changes in place.
    lr
        Learning rate; may be changed between steps.

    Raises
    ------
    ConfigError
        If there are no parameters, or the rate is not positive.
    """

    def __init__(self, parameters: Iterable[Tensor], lr: float) -> None:
        self.parameters = list(parameters)
        self.lr = lr
        self.steps = 0
        """Steps made so far."""
        if not self.parameters:
            raise ConfigError(f"{type(self).__name__} has no parameters to move")
        if not lr > 0:
            raise ConfigError(f"the learning rate of {type(self).__name__} must be positive, got {lr}")

    @torch.no_grad()
    def step(self, gradients: Sequence[Tensor]) -> None:
        """Make one step.

        Parameters
        ----------
        gradients
            Derivatives of the loss, one per parameter and of its shape.

        Raises
        ------
        ConfigError
            If a shape differs.
        """
        shapes = [tuple(g.shape) for g in gradients]
        if shapes != [tuple(w.shape) for w in self.parameters]:
            raise ConfigError(f"gradients have shapes {shapes}, parameters {[tuple(w.shape) for w in self.parameters]}")
        self.steps += 1
        for k, (w, g) in enumerate(zip(self.parameters, gradients, strict=True)):
            self._update(k, w, g)

    @abstractmethod
    def _update(self, k: int, w: Tensor, g: Tensor) -> None:
        """Move parameter number k in place."""

    def _zeros(self) -> list[Tensor]:
        """Return a memory: a zero for every number of every parameter."""
        return [torch.zeros_like(w, requires_grad=False) for w in self.parameters]


class GradientDescent(Optimizer):
    r"""Gradient descent, :math:`w_{t+1} = w_t - \eta g_t`, with the averaged iterate (thesis eq. 2.36).

    The average :math:`\bar w = \frac1T \sum_{t=1}^T w_t` over the points at which gradients were taken is what the
    theory makes promises about. If a convex, :math:`\rho`-Lipschitz function has a minimum within the distance
    :math:`B` of the start, then :math:`\eta = B/(\rho\sqrt T)` gives :math:`f(\bar w) - \min f \le B\rho/\sqrt T`
    (Shalev-Shwartz and Ben-David 2014, corollary 14.2).
    """

    def __init__(self, parameters: Iterable[Tensor], lr: float) -> None:
        super().__init__(parameters, lr)
        self.average = self._zeros()
        """Averaged iterate, one tensor per parameter; zero before the first step."""

    def _update(self, k: int, w: Tensor, g: Tensor) -> None:
        self.average[k] += (w - self.average[k]) / self.steps
        w -= self._rate() * g

    def _rate(self) -> float:
        return self.lr


class Subgradient(GradientDescent):
    r"""Gradient descent for functions with kinks: any subgradient, and steps that shrink as :math:`\eta/\sqrt t`.

    At a kink, where there is no gradient, every slope of a line that touches the function and stays below it will do
    (for :math:`|x|` at zero: any number from -1 to 1). It does not have to point downhill, and near a kink its length
    does not shrink, so that constant steps end in jumping over the minimum. Shrinking ones do not.
    """

    def _rate(self) -> float:
        return self.lr / math.sqrt(self.steps)


class SGD(Optimizer):
    r"""Stochastic gradient descent: the gradient of a few samples stands for that of all, in the mean correctly.

    With momentum :math:`\mu` the steps are along :math:`v_t = \mu v_{t-1} + g_t` (torch's convention, no dampening).

    Raises
    ------
    ConfigError
        If the momentum is not in [0, 1).
    """

    def __init__(self, parameters: Iterable[Tensor], lr: float, momentum: float = 0.0) -> None:
        super().__init__(parameters, lr)
        self.momentum = _fraction("momentum", momentum)
        self._velocity = self._zeros()

    def _update(self, k: int, w: Tensor, g: Tensor) -> None:
        self._velocity[k].mul_(self.momentum).add_(g)
        w -= self.lr * self._velocity[k]


class AdaGrad(Optimizer):
    r"""AdaGrad (thesis eq. 2.38): every parameter has a rate of its own, which only falls.

    .. math:: s_t = s_{t-1} + g_t^2, \qquad w_{t+1} = w_t - \eta\, g_t / (\sqrt{s_t} + \epsilon)
    """

    def __init__(self, parameters: Iterable[Tensor], lr: float, eps: float = 1e-10) -> None:
        super().__init__(parameters, lr)
        self.eps = eps
        self._sum = self._zeros()

    def _update(self, k: int, w: Tensor, g: Tensor) -> None:
        self._sum[k] += g * g
        w -= self.lr * g / (self._sum[k].sqrt() + self.eps)


class RMSProp(Optimizer):
    r"""RMSProp (thesis eq. 2.39): as AdaGrad, but old gradients are forgotten.

    .. math:: s_t = \alpha s_{t-1} + (1 - \alpha) g_t^2, \qquad w_{t+1} = w_t - \eta\, g_t / (\sqrt{s_t} + \epsilon)

    Raises
    ------
    ConfigError
        If alpha is not in [0, 1).
    """

    def __init__(self, parameters: Iterable[Tensor], lr: float, alpha: float = 0.99, eps: float = 1e-8) -> None:
        super().__init__(parameters, lr)
        self.alpha, self.eps = _fraction("alpha", alpha), eps
        self._mean = self._zeros()

    def _update(self, k: int, w: Tensor, g: Tensor) -> None:
        self._mean[k].mul_(self.alpha).add_((1.0 - self.alpha) * g * g)
        w -= self.lr * g / (self._mean[k].sqrt() + self.eps)


class Adam(Optimizer):
    r"""Adam (Kingma and Ba 2015): running averages of the gradient *and* of its square.

    .. math::

        m_t = \beta_1 m_{t-1} + (1 - \beta_1) g_t, \qquad v_t = \beta_2 v_{t-1} + (1 - \beta_2) g_t^2, \qquad
        w_{t+1} = w_t - \eta\, \frac{m_t/(1 - \beta_1^t)}{\sqrt{v_t/(1 - \beta_2^t)} + \epsilon}

    The divisions by :math:`1 - \beta^t` undo the start of both averages at zero.

    Notes
    -----
    Erratum of the thesis: Adam averages the first and second *moments of the gradient*, not the gradient and the
    Hessian. No second derivative is ever computed; :math:`v` says how large and how noisy a component of the gradient
    has been, and nothing about curvature.

    Raises
    ------
    ConfigError
        If a beta is not in [0, 1).
    """

    def __init__(
        self,
        parameters: Iterable[Tensor],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
    ) -> None:
        super().__init__(parameters, lr)
        self.betas, self.eps = (_fraction("beta", betas[0]), _fraction("beta", betas[1])), eps
        self._first, self._second = self._zeros(), self._zeros()

    def _update(self, k: int, w: Tensor, g: Tensor) -> None:
        beta1, beta2 = self.betas
        m = self._first[k].mul_(beta1).add_((1.0 - beta1) * g)
        v = self._second[k].mul_(beta2).add_((1.0 - beta2) * g * g)
        unbiased = m / (1.0 - beta1**self.steps)
        w -= self.lr * unbiased / ((v / (1.0 - beta2**self.steps)).sqrt() + self.eps)


class AdamW(Adam):
    r"""AdamW (Loshchilov and Hutter 2019): Adam, and every weight shrinks by :math:`1 - \eta\lambda` before each step.

    Adding :math:`\lambda w` to the gradient instead (a penalty :math:`\frac\lambda2 w^2` in the loss) would send the
    decay through the division by :math:`\sqrt v`, so that weights with large gradients would hardly decay at all.

    Raises
    ------
    ConfigError
        If the decay is negative or a beta is not in [0, 1).
    """

    def __init__(
        self,
        parameters: Iterable[Tensor],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
    ) -> None:
        super().__init__(parameters, lr, betas, eps)
        if not weight_decay >= 0:
            raise ConfigError(f"weight_decay must not be negative, got {weight_decay}")
        self.weight_decay = weight_decay

    def _update(self, k: int, w: Tensor, g: Tensor) -> None:
        w *= 1.0 - self.lr * self.weight_decay
        super()._update(k, w, g)


OPTIMIZERS: Final[dict[str, type[Optimizer]]] = {
    "gd": GradientDescent,
    "subgradient": Subgradient,
    "sgd": SGD,
    "adagrad": AdaGrad,
    "rmsprop": RMSProp,
    "adam": Adam,
    "adamw": AdamW,
}
"""All methods by name; each is made by ``OPTIMIZERS[name](parameters, lr)``."""


def _fraction(name: str, value: float) -> float:
    if not 0.0 <= value < 1.0:
        raise ConfigError(f"{name} must be in [0, 1), got {value}")
    return value
