r"""A fully connected feed-forward network with its back-propagation written out (thesis eq. 2.32-2.34, 2.40-2.44).

A network of ``L`` affine layers turns the input :math:`a^0 = x` into the output :math:`y = z^L` by

.. math:: z^l = W^l a^{l-1} + b^l, \qquad a^l = \sigma(z^l) \quad (l < L).

Back-propagation is the chain rule, sorted from the output to the input. With
:math:`\delta^l = \partial C/\partial z^l`,

.. math::

    \delta^L = \partial C/\partial y, \qquad
    \delta^l = (W^{l+1})^T \delta^{l+1} \odot \sigma'(z^l), \qquad
    \partial C/\partial b^l = \delta^l, \qquad
    \partial C/\partial W^l = \delta^l (a^{l-1})^T ,

and a sum over the samples of a batch. Rows of all arrays are samples, so ``W a`` is written ``a @ W.T`` below.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Final, Literal, NamedTuple, get_args

import pandas as pd
import torch
from torch import Tensor

from tlmc.equality import equal_by_content
from tlmc.errors import ConfigError

ActivationName = Literal["relu", "tanh", "softplus", "celu"]
Initialisation = Literal["lecun", "glorot", "he", "thesis"]

CELU_ALPHA: Final = 0.1
"""Where ANI's activation bends: ``celu(z) = z`` above zero and ``alpha (exp(z / alpha) - 1)`` below."""

_THESIS_STANDARD_DEVIATION: Final = 0.1


class Activation(NamedTuple):
    """A nonlinear function of each number and its derivative."""

    value: Callable[[Tensor], Tensor]
    slope: Callable[[Tensor], Tensor]


def _relu(z: Tensor) -> Tensor:
    return z.clamp(min=0.0)


def _relu_slope(z: Tensor) -> Tensor:
    # at zero any number in [0, 1] is a subgradient; 0 is the common choice
    return (z > 0).to(z.dtype)


def _tanh_slope(z: Tensor) -> Tensor:
    return 1.0 - torch.tanh(z) ** 2


def _softplus(z: Tensor) -> Tensor:
    # log(1 + exp(z)), arranged so that exp cannot overflow
    return z.clamp(min=0.0) + torch.log1p(torch.exp(-z.abs()))


def _celu(z: Tensor) -> Tensor:
    return z.clamp(min=0.0) + CELU_ALPHA * torch.expm1(z.clamp(max=0.0) / CELU_ALPHA)


def _celu_slope(z: Tensor) -> Tensor:
    return torch.exp(z.clamp(max=0.0) / CELU_ALPHA)


ACTIVATIONS: Final[dict[ActivationName, Activation]] = {
    "relu": Activation(_relu, _relu_slope),
    "tanh": Activation(torch.tanh, _tanh_slope),
    "softplus": Activation(_softplus, torch.sigmoid),
    "celu": Activation(_celu, _celu_slope),
}
"""Activations that the thesis names, and CELU(0.1), which the ANI networks use."""


@equal_by_content
class Trace(NamedTuple):
    """What a forward pass leaves for the way back."""

    inputs: tuple[Tensor, ...]
    """``a^{l-1}``, what each layer was given, shapes ``(n_samples, n_in)``."""
    sums: tuple[Tensor, ...]
    """``z^l`` of each layer, shapes ``(n_samples, n_out)``; the last is the output of the network."""


@equal_by_content
class Gradients(NamedTuple):
    """Derivatives of a scalar ``C`` that depends on the outputs."""

    weights: tuple[Tensor, ...]
    """``dC/dW^l``, shapes ``(n_out, n_in)``."""
    biases: tuple[Tensor, ...]
    """``dC/db^l``, shapes ``(n_out,)``."""
    deltas: tuple[Tensor, ...]
    """``dC/dz^l``, shapes ``(n_samples, n_out)``."""
    inputs: Tensor
    """``dC/dx``, shape ``(n_samples, n_in)``: for a network of descriptors, what forces are made of."""

    def flat(self) -> list[Tensor]:
        """Return the derivatives in the order of :meth:`MLP.flat`: weight and bias of each layer in turn."""
        return [tensor for pair in zip(self.weights, self.biases, strict=True) for tensor in pair]


def n_parameters(sizes: Sequence[int]) -> int:
    """Return the number of weights and biases of a network (thesis eq. 2.34), ``sum_l (n_{l-1} + 1) n_l``.

    Parameters
    ----------
    sizes
        Numbers of neurons from input to output, ``(n_0, ..., n_L)``.
    """
    return sum((n_in + 1) * n_out for n_in, n_out in zip(sizes[:-1], sizes[1:], strict=True))


class MLP(torch.nn.Module):
    """A fully connected network, ``network(x)`` of shape ``(n_samples, n_in)`` to ``(n_samples, n_out)``.

    Parameters
    ----------
    sizes
        Numbers of neurons from input to output, ``(n_0, ..., n_L)``; the output layer has no activation.
    activation
        One of :data:`ACTIVATIONS`.
    initialisation
        Standard deviation of the normal distribution of the weights: ``"lecun"`` ``1/sqrt(n_in)``, ``"glorot"``
        ``sqrt(2/(n_in + n_out))``, ``"he"`` ``sqrt(2/n_in)``, or ``"thesis"`` 0.1 whatever the size. Biases begin at
        zero, except for ``"thesis"``, which draws them like the weights.
    generator
        Source of the weights; a new one of seed 0 if not given.
    dtype
        Precision.

    Raises
    ------
    ConfigError
        If there are fewer than two sizes, one is not positive, or a name is unknown.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        activation: ActivationName = "tanh",
        initialisation: Initialisation = "glorot",
        generator: torch.Generator | None = None,
        dtype: torch.dtype = torch.float64,
    ) -> None:
        super().__init__()
        if len(sizes) < 2 or min(sizes) < 1:
            raise ConfigError(f"a network needs at least two sizes, all positive, got {tuple(sizes)}")
        if activation not in ACTIVATIONS:
            raise ConfigError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")
        if initialisation not in get_args(Initialisation):
            raise ConfigError(f"initialisation must be one of {get_args(Initialisation)}, got {initialisation!r}")
        self.sizes = tuple(sizes)
        self.activation: ActivationName = activation
        generator = generator or torch.Generator().manual_seed(0)
        self.weights, self.biases = torch.nn.ParameterList(), torch.nn.ParameterList()
        for n_in, n_out in zip(sizes[:-1], sizes[1:], strict=True):
            deviation = {
                "lecun": 1.0 / math.sqrt(n_in),
                "glorot": math.sqrt(2.0 / (n_in + n_out)),
                "he": math.sqrt(2.0 / n_in),
                "thesis": _THESIS_STANDARD_DEVIATION,
            }[initialisation]
            # drawn in float64 and rounded, so that both precisions start from the same network
            weight = deviation * torch.randn(n_out, n_in, generator=generator, dtype=torch.float64)
            bias = torch.zeros(n_out, dtype=torch.float64)
            if initialisation == "thesis":
                bias = deviation * torch.randn(n_out, generator=generator, dtype=torch.float64)
            self.weights.append(torch.nn.Parameter(weight.to(dtype)))
            self.biases.append(torch.nn.Parameter(bias.to(dtype)))

    @property
    def n_parameters(self) -> int:
        """Number of weights and biases, counted one by one."""
        return sum(parameter.numel() for parameter in self.parameters())

    def flat(self) -> list[Tensor]:
        """Return weight and bias of each layer in turn: the order of :meth:`Gradients.flat` and of optimisers."""
        return [tensor for pair in zip(self.weights, self.biases, strict=True) for tensor in pair]

    def forward(self, x: Tensor) -> Tensor:
        """Return the outputs, shape ``(n_samples, n_out)``; autograd can follow."""
        return self.trace(x).sums[-1]

    def trace(self, x: Tensor) -> Trace:
        """Return the outputs and everything on the way to them.

        Parameters
        ----------
        x
            Shape ``(n_samples, n_in)``.
        """
        value = ACTIVATIONS[self.activation].value
        inputs, sums = [x], []
        for weight, bias in zip(self.weights, self.biases, strict=True):
            sums.append(torch.addmm(bias, inputs[-1], weight.T))
            inputs.append(value(sums[-1]))
        return Trace(tuple(inputs[:-1]), tuple(sums))

    @torch.no_grad()
    def backward(self, trace: Trace, output_slope: Tensor) -> Gradients:
        """Return the derivatives of ``C`` by back-propagation (thesis eq. 2.40-2.44).

        Parameters
        ----------
        trace
            Of a forward pass with the present weights.
        output_slope
            ``dC/dy``, shape ``(n_samples, n_out)``.
        """
        slope = ACTIVATIONS[self.activation].slope
        deltas = [output_slope]
        for weight, z in zip(reversed(self.weights[1:]), reversed(trace.sums[:-1]), strict=True):
            deltas.append(deltas[-1] @ weight * slope(z))
        deltas.reverse()
        return Gradients(
            weights=tuple(delta.T @ a for delta, a in zip(deltas, trace.inputs, strict=True)),
            biases=tuple(delta.sum(0) for delta in deltas),
            deltas=tuple(deltas),
            inputs=deltas[0] @ self.weights[0],
        )


def gradient_norms(
    depth: int,
    width: int = 64,
    activation: ActivationName = "tanh",
    initialisation: Initialisation = "glorot",
    *,
    n_samples: int = 32,
    n_networks: int = 5,
    seed: int = 0,
) -> pd.DataFrame:
    r"""Measure how signals and gradients change over the layers of deep networks as they are drawn.

    Going down one layer multiplies :math:`\delta` by :math:`W^T` and by :math:`\sigma'(z)`. With weights of variance
    :math:`s^2` its mean square therefore changes by the factor :math:`n\,s^2\,\langle\sigma'^2\rangle` per layer:
    below one the gradient *vanishes* exponentially with depth, above one it *explodes*. ReLU has
    :math:`\langle\sigma'^2\rangle = 1/2`, which ``"he"`` balances exactly and ``"lecun"`` does not.

    Inputs and the derivatives of the loss with respect to the outputs are drawn from N(0, 1).

    Parameters
    ----------
    depth
        Hidden layers.
    width
        Neurons of the input and of every layer.
    activation, initialisation
        As of :class:`MLP`.
    n_samples
        Rows of the batch.
    n_networks
        Networks drawn; root mean squares are over all of them.
    seed
        Of the generator of weights, inputs and derivatives.

    Returns
    -------
    DataFrame
        A row per layer, ``depth + 1`` of them: ``layer`` (1 at the input), ``delta`` (root mean square of ``dC/dz``),
        ``weight_gradient`` (root mean square over networks of the norm of ``dC/dW``), ``signal`` (root mean square of
        ``z``).

    Raises
    ------
    ConfigError
        If a number is not positive, or a name is unknown.
    """
    if min(depth, width, n_samples, n_networks) < 1:
        raise ConfigError(
            f"depth, width, n_samples and n_networks must be positive, got {depth}, {width}, {n_samples}, {n_networks}"
        )
    generator = torch.Generator().manual_seed(seed)
    squares = torch.zeros(3, depth + 1, dtype=torch.float64)
    for _ in range(n_networks):
        network = MLP((width,) * (depth + 2), activation, initialisation, generator)
        x, output_slope = torch.randn(2, n_samples, width, generator=generator, dtype=torch.float64)
        with torch.no_grad():
            trace = network.trace(x)
        gradients = network.backward(trace, output_slope)
        squares[0] += torch.stack([delta.square().mean() for delta in gradients.deltas])
        squares[1] += torch.stack([weight.square().sum() for weight in gradients.weights])
        squares[2] += torch.stack([z.square().mean() for z in trace.sums])
    delta, weight_gradient, signal = (squares / n_networks).sqrt().numpy()
    layer = range(1, depth + 2)
    return pd.DataFrame({"layer": layer, "delta": delta, "weight_gradient": weight_gradient, "signal": signal})
