"""Neural networks from first principles: layers and back-propagation, optimisers, and two kinds of atomistic network.

- :mod:`tlmc.networks.mlp`: a fully connected network, its back-propagation written out, gradients over depth;
- :mod:`tlmc.networks.optimizers`: gradient descent, subgradient, SGD, AdaGrad, RMSProp, Adam, AdamW;
- :mod:`tlmc.networks.atomistic`: what networks of atoms share: sums over atoms, forces, scales;
- :mod:`tlmc.networks.behler_parrinello`: one network per element on a descriptor;
- :mod:`tlmc.networks.deep_tensor`: representations learned end to end;
- :mod:`tlmc.networks.fitting`: their training in minibatches, and test errors against the number of frames;
- :mod:`tlmc.networks.energy_curve`: fits of real energy curves, descent paths, over- and underfitting;
- :mod:`tlmc.networks.inspection`: looking inside.
"""

from __future__ import annotations

from tlmc.data.splits import shrunk
from tlmc.networks.atomistic import AtomisticNetwork, Output
from tlmc.networks.behler_parrinello import BehlerParrinelloNetwork
from tlmc.networks.deep_tensor import DeepTensorNetwork
from tlmc.networks.energy_curve import MorseLoss, bond_scan, descend, fit_curve, torsion_scan
from tlmc.networks.fitting import FitConfig, FitResult, error_over_size, fit
from tlmc.networks.inspection import kinds_of_atoms, principal_components
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
    "AtomisticNetwork",
    "BehlerParrinelloNetwork",
    "DeepTensorNetwork",
    "FitConfig",
    "FitResult",
    "GradientDescent",
    "Gradients",
    "MorseLoss",
    "Optimizer",
    "Output",
    "RMSProp",
    "Subgradient",
    "bond_scan",
    "descend",
    "error_over_size",
    "fit",
    "fit_curve",
    "gradient_norms",
    "kinds_of_atoms",
    "n_parameters",
    "principal_components",
    "shrunk",
    "torsion_scan",
]
