"""Kernel methods (thesis section 2.2), from the kernel trick to force fields, in double precision.

Estimators keep their arguments, ``fit`` returns the estimator, and what is learnt ends in an underscore.
"""

from __future__ import annotations

from tlmc.kernels.descriptor_gpr import DescriptorGPR
from tlmc.kernels.feature_maps import gaussian_series, quadratic_features, rings
from tlmc.kernels.functions import Gaussian, Kernel, Matern52
from tlmc.kernels.gap import GAP
from tlmc.kernels.gdml import GDML
from tlmc.kernels.gpr import GaussianProcess
from tlmc.kernels.large import IterativeProcess, NystromProcess, conjugate_gradients
from tlmc.kernels.learning_curve import fit_seconds, learning_curve, power_law
from tlmc.kernels.permutations import complete_group, find_permutations

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
