"""Kernel methods (thesis section 2.2), from the kernel trick to force fields, in double precision.

Estimators keep their arguments, ``fit`` returns the estimator, and what is learnt ends in an underscore.
"""

from __future__ import annotations

from tlmc.kernel_methods.descriptor_gpr import DescriptorGPR
from tlmc.kernel_methods.feature_maps import gaussian_series, quadratic_features, rings
from tlmc.kernel_methods.functions import Gaussian, Kernel, Matern52
from tlmc.kernel_methods.gap import GAP
from tlmc.kernel_methods.gdml import GDML
from tlmc.kernel_methods.gpr import GaussianProcess
from tlmc.kernel_methods.large import IterativeProcess, NystromProcess, conjugate_gradients
from tlmc.kernel_methods.learning_curves import fit_seconds, learning_curve, power_law
from tlmc.kernel_methods.permutations import complete_group, find_permutations

__all__ = [
    "GAP",
    "GDML",
    "DescriptorGPR",
    "Gaussian",
    "GaussianProcess",
    "IterativeProcess",
    "Kernel",
    "Matern52",
    "NystromProcess",
    "complete_group",
    "conjugate_gradients",
    "find_permutations",
    "fit_seconds",
    "gaussian_series",
    "learning_curve",
    "power_law",
    "quadratic_features",
    "rings",
]
