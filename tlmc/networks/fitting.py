"""Training of networks of atoms on energies and forces, by the trainer of the potentials."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic

import pandas as pd
import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from tlmc.data.dataset import Dataset
from tlmc.data.splits import Split, shrunk
from tlmc.equality import equal_by_content
from tlmc.errors import DataError
from tlmc.evaluation.metrics import evaluate
from tlmc.networks.atomistic import AtomisticNetwork, P
from tlmc.potentials.model import Potential
from tlmc.progress import watched
from tlmc.training.config import FinetuneConfig
from tlmc.training.distributed import Group
from tlmc.training.interrupts import heeded, interrupted
from tlmc.training.learner import EnergiesForces
from tlmc.training.torch_learner import ModuleLearner
from tlmc.training.trainer import Trainer

_LOG = logging.getLogger(__name__)


class FitConfig(BaseModel):
    """How to train a network from scratch."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    epochs: int = Field(100, ge=1)
    batch_size: int = Field(8, ge=1)
    lambda_: float = Field(0.1, ge=0.0, le=1.0)
    """Weight of the forces in the loss (thesis eq. 3.46)."""
    lr: float = Field(3e-3, gt=0.0)
    """First learning rate; it falls along half a cosine to zero."""
    weight_decay: float = Field(1e-4, ge=0.0)
    clip_norm: float | None = Field(1.0, gt=0.0)
    """Largest norm of the gradient of the loss; longer ones, of rare frames with huge forces, are shortened to it."""
    seed: int = Field(0, ge=0)
    """Order of the minibatches."""


@equal_by_content
@dataclass(frozen=True)
class FitResult(Generic[P]):
    """A trained network and how it came about."""

    network: AtomisticNetwork[P]
    history: pd.DataFrame
    """A row per epoch: epoch, lr, train_loss, validation_loss, and of both parts ``<part>_energy_rmse_per_atom``
    (eV/atom) and ``<part>_force_rmse_vector`` (eV/A), the training ones running while the weights change; seconds and
    cpu_seconds."""


def fit(
    network: AtomisticNetwork[P],
    dataset: Dataset,
    split: Split,
    config: FitConfig | None = None,
    prepared: Sequence[P] | None = None,
) -> FitResult[P]:
    """Train a copy of a network on the training part of a data set.

    Parameters
    ----------
    network
        Untrained or trained before; it is not changed. Scales are fitted on the training part.
    dataset, split
        Labelled frames and their parts. The test part is not looked at; the validation part is only watched.
    config
        Settings.
    prepared
        ``network.prepare(dataset.frames)``, to share it between trainings; computed if not given.

    Raises
    ------
    DataError
        If a part is empty, the preparation is not of these frames, or the scales cannot be fitted.
    ModelError
        If the training diverges (:class:`tlmc.training.divergence.Guard`).
    Interrupted
        On Ctrl-C or SIGTERM: nothing is kept.
    """
    config = config or FitConfig()
    for part in ("train", "validation"):
        if not len(getattr(split, part)):
            raise DataError(f"the {part} part of the split of {dataset.name} is empty")
    prepared = network.prepare(dataset.frames) if prepared is None else prepared
    if [len(frame.species) for frame in prepared] != dataset.n_atoms.tolist():
        raise DataError(f"the prepared frames are not those of {dataset.name}")
    network = copy.deepcopy(network)
    network.fit_scales(dataset.subset(split.train), [prepared[k] for k in split.train])
    targets = dataset.energies - network.reference(prepared).numpy()
    settings = FinetuneConfig(recipe="fit", schedule="cosine", **config.model_dump())
    with heeded():
        history: list[dict[str, float]] = []
        try:
            learner = _NetworkLearner(network, prepared)
            trainer = Trainer(learner, targets, dataset.forces, split, settings, (), Group())
            state = trainer.blank()
            history = state.history
            for epoch in watched(range(config.epochs), "epochs", config.epochs):
                row = trainer.epoch(state)
                _LOG.info(
                    "%s epoch %d/%d: validation F %.3f eV/A, E %.2f meV/atom", type(network).__name__, epoch + 1,
                    config.epochs, row["validation_force_rmse_vector"], 1e3 * row["validation_energy_rmse_per_atom"],
                )  # fmt: skip
            trainer.guard.check_end(history[-1])
        except KeyboardInterrupt as error:
            raise interrupted(
                error,
                f"interrupted in epoch {len(history) + 1} of {config.epochs}: of a training in memory nothing is kept",
            ) from None
    return FitResult(network, pd.DataFrame(history))


class _NetworkLearner(ModuleLearner):
    """A network of atoms and its prepared frames; it trains the network in place."""

    def __init__(self, network: AtomisticNetwork[Any], prepared: Sequence[Any]) -> None:
        super().__init__(network, [len(frame.species) for frame in prepared], torch.device("cpu"))
        self._network, self._prepared = network, prepared

    def inputs(self, indices: Sequence[int]) -> list[Any]:
        """Return some prepared frames."""
        return [self._prepared[i] for i in indices]

    def outputs(self, inputs: list[Any]) -> EnergiesForces:
        """Evaluate the network."""
        output = self._network(inputs, create_graph=self._network.training)
        return EnergiesForces(output.energies.double(), output.forces)

    def potential(self, flat: Tensor, unseen: float) -> Potential:
        """Refuse: a teaching network is no potential."""
        raise TypeError("a network of atoms is returned as it is")


def error_over_size(
    make: Callable[[int], AtomisticNetwork[P]],
    dataset: Dataset,
    split: Split,
    sizes: Sequence[int],
    config: FitConfig | None = None,
    seeds: Sequence[int] = (0,),
) -> pd.DataFrame:
    """Measure the test error against the number of training frames.

    Parameters
    ----------
    make
        Untrained network of a seed.
    dataset, split
        Labelled frames and their parts; the sizes choose among the training part.
    sizes
        Numbers of training frames.
    config
        Settings. The number of epochs is that for the whole training part; smaller parts get more, so that all
        trainings make as many steps.
    seeds
        Of the weights, the choice of frames and the order of batches.

    Returns
    -------
    DataFrame
        A row per size and seed: ``n_train``, ``seed``, ``energy_rmse_per_atom`` (eV/atom) and ``force_rmse_vector``
        (eV/A).
    """
    config = config or FitConfig()
    test, prepared, rows = dataset.subset(split.test), None, []
    steps = config.epochs * math.ceil(len(split.train) / config.batch_size)
    for size in sizes:
        for seed in seeds:
            network = make(seed)
            prepared = network.prepare(dataset.frames) if prepared is None else prepared
            epochs = math.ceil(steps / math.ceil(size / config.batch_size))
            settings = config.model_copy(update={"epochs": epochs, "seed": seed})
            trained = fit(network, dataset, shrunk(split, size, seed, dataset), settings, prepared).network
            metrics = evaluate(test, trained.predict([prepared[k] for k in split.test]))
            wanted = ("energy_rmse_per_atom", "force_rmse_vector")
            rows.append({"n_train": size, "seed": seed, **{name: metrics[name].value for name in wanted}})
    return pd.DataFrame(rows)
