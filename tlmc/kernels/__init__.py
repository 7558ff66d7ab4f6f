"""Kernel methods (thesis section 2.2), from the kernel trick to force fields, in double precision.

Estimators keep their arguments, ``fit`` returns the estimator, and what is learnt ends in an underscore.
"""

from __future__ import annotations

from tlmc.kernels.functions import Gaussian, Kernel, Matern52
from tlmc.kernels.gap import GAP
from tlmc.kernels.gdml import GDML
from tlmc.kernels.gpr import GaussianProcess
from tlmc.kernels.large import IterativeProcess, NystromProcess, conjugate_gradients
from tlmc.kernels.permutations import complete_group, find_permutations

__all__ = [
    "GAP",
    "GDML",
    "Gaussian",
    "GaussianProcess",
    "IterativeProcess",
    "Kernel",
    "Matern52",
    "NystromProcess",
    "complete_group",
    "conjugate_gradients",
    "find_permutations",
]
