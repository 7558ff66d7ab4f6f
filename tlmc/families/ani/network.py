"""The networks of an ensemble for one element, forward and backward to their input, written out (thesis 2.32, 2.40)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor

from tlmc.families.ani.model import Layer

CELU_ALPHA: Final = 0.1
"""Every hidden unit of the ANI networks is ``max(z, 0) + alpha * min(0, exp(z / alpha) - 1)``."""


def forward(layers: Sequence[Layer], features: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Evaluate all members for all atoms of one element.

    Parameters
    ----------
    layers
        The affine layers, first to last.
    features
        Descriptors, shape ``(n_atoms, n_features)``, shared by the members.

    Returns
    -------
    tuple
        Network output per member, shape ``(members, n_atoms)``, and the slope of the activation in every hidden layer,
        each ``(members, n_atoms, width)``, which `backward` needs.
    """
    activation, slopes = features.expand(len(layers[0].weight), -1, -1), []
    for layer in layers[:-1]:
        activation = torch.celu_(torch.baddbmm(layer.bias, activation, layer.weight), CELU_ALPHA)
        # exp(z / alpha) below zero is a / alpha + 1; one above
        slopes.append(activation.clamp(max=0.0).div_(CELU_ALPHA).add_(1.0))
    return (torch.matmul(activation, layers[-1].weight) + layers[-1].bias).squeeze(-1), tuple(slopes)


def backward(layers: Sequence[Layer], slopes: Sequence[Tensor]) -> Tensor:
    """Return the derivative of the mean over the members with respect to the descriptors.

    Parameters
    ----------
    layers
        As in `forward`.
    slopes
        What `forward` returned beside the output.

    Returns
    -------
    Tensor
        Shape ``(n_atoms, n_features)``: each atom's own output by its own descriptor.
    """
    last = layers[-1].weight
    adjoint = last.transpose(1, 2) / len(last)
    for layer, slope in zip(reversed(layers[:-1]), reversed(slopes), strict=True):
        adjoint = torch.matmul(adjoint * slope, layer.weight.transpose(1, 2))
    return adjoint.sum(0)
