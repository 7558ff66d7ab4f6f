"""The ANI family as a learner: the exact engine on cached descriptors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import ClassVar, cast

import numpy as np
import torch
from ase import Atoms
from numpy.typing import NDArray
from torch import Tensor

from tlmc.data.dataset import Dataset
from tlmc.data.splits import Split
from tlmc.descriptors.enrichment import fit_enrichment
from tlmc.families.ani.batch import Batch, merge
from tlmc.families.ani.cache import build_cache
from tlmc.families.ani.compiled_sweeps import library
from tlmc.families.ani.device_cache import DeviceCache
from tlmc.families.ani.engine import Engine
from tlmc.families.ani.model import AniPotential
from tlmc.families.ani.transfer import enrich, first_members, scratch, trainable_layers
from tlmc.families.ani.warm_start import ridge_start
from tlmc.training.config import FinetuneConfig
from tlmc.training.distributed import Group
from tlmc.training.learner import EnergiesForces, Learner, Loss
from tlmc.training.loss import LossAndSlopes
from tlmc.training.optimizer import Update


def first_model(model: AniPotential, dataset: Dataset, split: Split, config: FinetuneConfig) -> AniPotential:
    """Return what a training begins with: the members, first weights and columns that the settings ask for.

    Raises
    ------
    ModelError
        If the model has fewer members than asked for.
    """
    result = model if config.members is None else first_members(model, config.members)
    if config.init == "scratch":
        result = scratch(result, config.seed)
    if config.richer is not None:
        train = [dataset.frames[k] for k in split.train]
        result = enrich(result, fit_enrichment(train, species=dataset.elements, **config.richer.model_dump()))
    return result


class AniLearner(Learner):
    """An :class:`Engine` and the descriptors of its frames, see :class:`tlmc.training.learner.Learner`."""

    # between two steps, which leave nothing else in the processor's cache, merging one costs four times as much
    n_together: ClassVar[int] = 8

    def __init__(
        self,
        model: AniPotential,
        frames: Sequence[Atoms],
        config: FinetuneConfig,
        group: Group,
        report: Callable[[int], object],
    ) -> None:
        dtype = cast(torch.dtype, getattr(torch, config.precision))
        with group.first_alone():
            cache = build_cache(model, frames, dtype, report=report)
            if group.device.type == "cpu":
                library(dtype)  # compiled now, by one process
        self.digest = cache.folder.name
        self.threads = 1 if model.members == 1 else None
        self._cache = cache if group.device.type == "cpu" else DeviceCache(cache, group.device)
        n_layers = len(next(iter(model.networks.values())))
        self._engine = Engine(model, self._cache, trainable_layers(config.layers, n_layers))
        self.flat, self.gradient = self._engine.flat, self._engine.gradient
        self.shapes = self._engine.shapes

    def batch(self, indices: Sequence[int] | NDArray[np.int64]) -> Batch:
        """Merge the structures of some frames."""
        return merge([self._cache[int(i)] for i in indices])

    def arranged(self, index: int, forces: NDArray[np.float64]) -> Tensor:
        """Return labels of a frame, atoms sorted as in the cache."""
        return torch.from_numpy(forces)[self._cache[index].order].to(self.flat)

    def energies_forces(self, batch: Batch) -> EnergiesForces:
        """Return energies and forces of a batch."""
        return self._engine.energies_forces(batch)

    def loss_gradient(
        self, batch: Batch, energies: Tensor, forces: Tensor, loss: Loss, update: Update | None = None
    ) -> LossAndSlopes:
        """Fill the gradient, or take a step: :meth:`Engine.loss_gradient`."""
        return self._engine.loss_gradient(batch, energies, forces, loss, update)

    def warm_start(
        self, indices: Sequence[int], energies: Tensor, forces: Sequence[Tensor], lambda_: float, ridge: float
    ) -> None:
        """Fit the output layers in closed form: :func:`tlmc.families.ani.warm_start.ridge_start`."""
        ridge_start(self._engine, self._cache, indices, energies, forces, lambda_, ridge)

    def potential(self, flat: Tensor, unseen: float) -> AniPotential:
        """Return a model with some weights, elements and columns that do not occur put back."""
        return self._engine.potential(flat, unseen)
