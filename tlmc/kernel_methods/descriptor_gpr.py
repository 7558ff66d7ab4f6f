"""Gaussian process regression on a descriptor of whole structures: the simplest potential with a kernel."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self, cast

import numpy as np
import torch
from ase import Atoms
from numpy.typing import NDArray
from torch import Tensor

from tlmc.data.dataset import Dataset
from tlmc.descriptors.base import Descriptor
from tlmc.errors import DataError
from tlmc.kernel_methods.functions import Kernel
from tlmc.kernel_methods.gpr import GaussianProcess, likely_start
from tlmc.potentials.model import Predictions


class DescriptorGPR:
    """Energy per atom as a Gaussian process of a global descriptor; forces by the chain rule.

    Parameters
    ----------
    descriptor
        With one row per structure: Coulomb or Ewald matrix, averaged SOAP.
    kernel
        Class of the covariance function. Hyperparameters and noise maximise the marginal likelihood, from
        :func:`tlmc.kernel_methods.gpr.likely_start`.

    Attributes
    ----------
    process_
        The fitted process; labels in eV/atom.
    """

    def __init__(self, descriptor: Descriptor, kernel: type[Kernel]) -> None:
        self.descriptor = descriptor
        self.kernel = kernel

    def fit(self, dataset: Dataset) -> Self:
        """Learn from the energies; forces are not used.

        Raises
        ------
        DataError
            If there are fewer than two frames, or all have one energy or one descriptor.
        """
        if len(dataset) < 2:
            raise DataError(f"a process needs at least two training frames, got {len(dataset)}")
        rows = self.descriptor(dataset.frames)
        energies = torch.from_numpy(dataset.energies / dataset.n_atoms)
        start, noise = likely_start(self.kernel, rows, energies)
        self.process_ = GaussianProcess(start, noise).fit(rows, energies)
        return self

    def predict(self, frames: Sequence[Atoms]) -> Predictions:
        """Return energies (eV) and forces (eV/Angstrom)."""
        rows = self.descriptor(frames).detach().requires_grad_()
        n_atoms = np.array([len(frame) for frame in frames])
        means = self.process_.predict(rows)
        (slopes,) = torch.autograd.grad(means.sum(), rows)
        forces = []
        for frame, slope in zip(frames, slopes, strict=True):
            derivative = cast(Tensor, self.descriptor.derivatives(frame))
            forces.append((-len(frame) * torch.einsum("f,fac->ac", slope, derivative)).numpy())
        return Predictions(means.detach().numpy() * n_atoms, tuple(forces))

    def energy_std(self, frames: Sequence[Atoms]) -> NDArray[np.float64]:
        """Return the standard deviation of the energies, eV, shape ``(n_frames,)``."""
        n_atoms = np.array([len(frame) for frame in frames])
        stds: NDArray[np.float64] = self.process_.std(self.descriptor(frames)).numpy() * n_atoms
        return stds
