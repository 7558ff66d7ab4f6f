"""Neural networks from first principles: layers and back-propagation, optimisers, and two kinds of atomistic network.

- :mod:`tlmc.networks.mlp`: a fully connected network, its back-propagation written out, gradients over depth;
- :mod:`tlmc.networks.optimizers`: gradient descent, subgradient, SGD, AdaGrad, RMSProp, Adam, AdamW.
"""

from __future__ import annotations

from tlmc.networks.mlp import ACTIVATIONS, MLP, Gradients, gradient_norms, n_parameters
from tlmc.networks.optimizers import (
    OPTIMIZERS,
    SGD,
    AdaGrad,
    Adam,
    AdamW,
    GradientDescent,
    Optimizer,
    RMSProp,
    Subgradient,
)

__all__ = [
    "ACTIVATIONS",
    "MLP",
    "OPTIMIZERS",
    "SGD",
    "AdaGrad",
    "Adam",
    "AdamW",
    "GradientDescent",
    "Gradients",
    "Optimizer",
    "RMSProp",
    "Subgradient",
    "gradient_norms",
    "n_parameters",
]
