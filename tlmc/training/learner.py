"""What the trainer needs of a model that learns: energies and forces of batches, the loss gradient, the model again."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tlmc.equality import equal_by_content
from tlmc.errors import ConfigError
from tlmc.potentials.model import Potential
from tlmc.training.loss import LossAndSlopes
from tlmc.training.optimizer import Update

Loss = Callable[[Tensor, Tensor, Tensor, Tensor], LossAndSlopes]
"""``loss(energy_error, force_error, n_atoms, structure)``, see :func:`tlmc.training.loss.batch_loss`."""


@equal_by_content
class EnergiesForces(NamedTuple):
    """What a learner says about a batch."""

    energies: Tensor
    """Of the network, without offsets, float64 eV, shape ``(n_structures,)``."""
    forces: Tensor
    """eV/A, in the learner's precision, shape ``(n_atoms, 3)``, structures following one another."""


class Batch(Protocol):
    """Some frames, made ready by a learner; what else it holds is the learner's own."""

    @property
    def n_atoms(self) -> Tensor:
        """Atoms per structure, with the type of the forces, shape ``(n_structures,)``."""

    @property
    def structure(self) -> Tensor:
        """Structure of every atom, int64, shape ``(n_atoms,)``."""


class Learner(ABC):
    """A model that learns from frames that never change; its trainable weights are one flat buffer.

    It knows frames by their place in the list that it was made for, and nothing of labels, epochs or schedules.
    """

    flat: Tensor
    """Trainable weights; an optimiser changes them in place."""
    gradient: Tensor
    """Loss gradient of the last :meth:`loss_gradient`, as flat as the weights."""
    shapes: Sequence[torch.Size]
    """Of the arrays that follow one another in `flat`."""
    threads: int | None = None
    """How many threads are best; None for all that torch may use."""
    digest: str = ""
    """What processes that train together must have in common."""
    n_together: ClassVar[int] = 1
    """Batches that are best made one after the other, between two steps."""

    @abstractmethod
    def batch(self, indices: Sequence[int] | NDArray[np.int64]) -> Any:
        """Make a :class:`Batch` of some frames."""

    @abstractmethod
    def arranged(self, index: int, forces: NDArray[np.float64]) -> Tensor:
        """Return labels ``(n_atoms, 3)`` of a frame as its forces come: order, precision and device."""

    @abstractmethod
    def energies_forces(self, batch: Any) -> EnergiesForces:
        """Return energies and forces of a batch, with the current weights."""

    @abstractmethod
    def loss_gradient(
        self, batch: Any, energies: Tensor, forces: Tensor, loss: Loss, update: Update | None = None
    ) -> LossAndSlopes:
        """Fill :attr:`gradient` with the gradient of the loss of a batch, or take a step with it.

        Parameters
        ----------
        batch
            As :meth:`batch` returned it.
        energies
            Labels for the network energies, float64 eV, shape ``(n_structures,)``.
        forces
            Labels, eV/A, shape ``(n_atoms, 3)``, ordered as :class:`EnergiesForces` says.
        loss
            An exception that it raises leaves the weights as they are.
        update
            A step of AdamW on :attr:`flat`, whose `slope` is :attr:`gradient`. The gradient need not be there
            afterwards.
        """

    def warm_start(
        self, indices: Sequence[int], energies: Tensor, forces: Sequence[Tensor], lambda_: float, ridge: float
    ) -> None:
        """Replace the output layers by those that minimise the squared loss plus a penalty on their change.

        Raises
        ------
        ConfigError
            If the family cannot do that.
        LinAlgError
            If there is no finite solution.
        """
        raise ConfigError("this family has no output layers that a warm start could fit")

    @abstractmethod
    def potential(self, flat: Tensor, unseen: float) -> Potential:
        """Return a model of its own with some weights.

        Parameters
        ----------
        flat
            Weights laid out as :attr:`flat` (an average, say).
        unseen
            Factor for weights that are not in the buffer since nothing in the frames depends on them: weight decay is
            all that happens to them, the product of ``1 - lr * weight_decay`` over the steps.
        """
