"""A learner for any differentiable torch module: gradients by autograd, float32, what never changes computed once."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from tlmc.equality import equal_by_content
from tlmc.training.learner import EnergiesForces, Learner, Loss
from tlmc.training.loss import LossAndSlopes
from tlmc.training.optimizer import Update, apply


@equal_by_content
class ModuleBatch(NamedTuple):
    """Some frames as a module takes them."""

    inputs: Any
    n_atoms: Tensor
    """Atoms per structure, float32, shape ``(n_structures,)``."""
    structure: Tensor
    """Structure of every atom, int64, shape ``(n_atoms,)``."""


class ModuleLearner(Learner):
    """Trains the parameters of a module; a family says how frames become its inputs and its outputs a potential.

    Parameters
    ----------
    module
        Its parameters that require a gradient become views of one flat buffer; a copy of the start model's own.
    sizes
        Atoms of every frame.
    device
        Where it trains.
    """

    def __init__(self, module: nn.Module, sizes: Sequence[int], device: torch.device) -> None:
        self.module, self._sizes, self._device = module.to(device), list(sizes), device
        self._weights = [weight for weight in self.module.parameters() if weight.requires_grad]
        self.shapes = [weight.shape for weight in self._weights]
        self.flat = torch.nn.utils.parameters_to_vector(self._weights).detach().clone()
        self.gradient = torch.zeros_like(self.flat)
        torch.nn.utils.vector_to_parameters(self.flat, self._weights)

    @abstractmethod
    def inputs(self, indices: Sequence[int]) -> Any:
        """Return some frames as the module takes them, on the device."""

    @abstractmethod
    def outputs(self, inputs: Any) -> EnergiesForces:
        """Return energies and forces, parts of torch's graph while the module is in training mode."""

    def batch(self, indices: Sequence[int] | NDArray[np.int64]) -> ModuleBatch:
        """Make some frames ready."""
        picked = [int(i) for i in indices]
        sizes = torch.tensor([self._sizes[i] for i in picked], device=self._device)
        structure = torch.repeat_interleave(torch.arange(len(picked), device=self._device), sizes)
        return ModuleBatch(self.inputs(picked), sizes.to(self.flat.dtype), structure)

    def arranged(self, index: int, forces: NDArray[np.float64]) -> Tensor:
        """Return labels of a frame in the module's precision."""
        return torch.from_numpy(forces).to(self.flat)

    def energies_forces(self, batch: ModuleBatch) -> EnergiesForces:
        """Return energies and forces, without a graph."""
        self.module.eval()
        found = self.outputs(batch.inputs)
        return EnergiesForces(found.energies.detach(), found.forces.detach())

    def loss_gradient(
        self, batch: ModuleBatch, energies: Tensor, forces: Tensor, loss: Loss, update: Update | None = None
    ) -> LossAndSlopes:
        """Fill the gradient: the slopes of the loss go back through the module."""
        self.module.train()
        found = self.outputs(batch.inputs)
        energy_error = (found.energies.detach() - energies).to(forces.dtype)
        result = loss(energy_error, found.forces.detach() - forces, batch.n_atoms, batch.structure)
        slopes = torch.autograd.grad(
            [found.energies, found.forces],
            self._weights,
            [result.energy_slope.to(found.energies.dtype), result.force_slope],
        )
        torch.cat([slope.reshape(-1) for slope in slopes], out=self.gradient)
        if update is not None:
            apply(update)
        return result
