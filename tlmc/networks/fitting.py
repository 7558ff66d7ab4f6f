"""Training of networks of atoms on energies and forces, in minibatches, with our own AdamW."""

from __future__ import annotations

import copy
import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from tlmc.data.dataset import Dataset
from tlmc.data.splits import Split, shrunk
from tlmc.equality import equal_by_content
from tlmc.errors import DataError, ModelError
from tlmc.evaluation.metrics import evaluate
from tlmc.networks.atomistic import AtomisticNetwork, P
from tlmc.networks.optimizers import AdamW
from tlmc.progress import watched
from tlmc.training.divergence import Guard, force_rms
from tlmc.training.interrupts import heeded, interrupted
from tlmc.training.loss import batch_loss

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
    (eV/atom) and ``<part>_force_rmse_vector`` (eV/A), the training ones running while the weights change; seconds."""


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
    targets = torch.from_numpy(dataset.energies) - network.reference(prepared)
    forces = [torch.from_numpy(force).to(network.dtype) for force in dataset.forces]
    optimizer = AdamW(list(network.parameters()), lr=config.lr, weight_decay=config.weight_decay)
    history: list[dict[str, float]] = []
    with heeded():
        try:
            _train(network, prepared, targets, forces, split, config, optimizer, history)
        except KeyboardInterrupt as error:
            raise interrupted(
                error,
                f"interrupted in epoch {len(history) + 1} of {config.epochs}: of a training in memory nothing is kept",
            ) from None
    return FitResult(network, pd.DataFrame(history))


def _train(
    network: AtomisticNetwork[P],
    prepared: Sequence[P],
    targets: Tensor,
    forces: Sequence[Tensor],
    split: Split,
    config: FitConfig,
    optimizer: AdamW,
    history: list[dict[str, float]],
) -> None:
    """Change the network epoch by epoch and append a row for each."""
    weights = list(network.parameters())
    n_batches = math.ceil(len(split.train) / config.batch_size)

    def validate() -> dict[str, float]:
        sums = _Sums()
        for chosen in np.array_split(split.validation, math.ceil(len(split.validation) / 16)):
            sums.add(network, prepared, targets, forces, chosen, config.lambda_, create_graph=False)
        return sums.means("validation")

    remedy = f"lower lr ({config.lr})" + (" or set clip_norm" if config.clip_norm is None else "")
    guard = Guard(validate(), force_rms(forces[k].numpy() for k in split.validation), remedy)
    for epoch in watched(range(config.epochs), "epochs", config.epochs):
        began = time.perf_counter()
        order = np.random.default_rng([config.seed, epoch]).permutation(split.train)
        train = _Sums()
        for k in range(n_batches):
            chosen = order[k * config.batch_size : (k + 1) * config.batch_size]
            optimizer.lr = config.lr * 0.5 * (1.0 + math.cos(math.pi * optimizer.steps / (config.epochs * n_batches)))
            loss = train.add(network, prepared, targets, forces, chosen, config.lambda_, create_graph=True)
            if not math.isfinite(loss.item()):
                raise ModelError(f"the loss became {loss.item()} in epoch {epoch + 1}: {remedy}")
            optimizer.step(_clipped(torch.autograd.grad(loss, weights), config.clip_norm))
        row = {"epoch": float(epoch + 1), "lr": optimizer.lr} | train.means("train") | validate()
        guard.check_epoch(row, {"weights": torch.nn.utils.parameters_to_vector(weights).detach()})
        history.append(row | {"seconds": time.perf_counter() - began})
        _LOG.info(
            "%s epoch %d/%d: validation F %.3f eV/A, E %.2f meV/atom",
            type(network).__name__, epoch + 1, config.epochs, history[-1]["validation_force_rmse_vector"],
            1e3 * history[-1]["validation_energy_rmse_per_atom"],
        )  # fmt: skip
    guard.check_end(history[-1])


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


class _Sums:
    """Sums over batches from which the loss and the errors of an epoch follow."""

    def __init__(self) -> None:
        self.frames, self.atoms = 0, 0
        self.loss, self.energy, self.force = 0.0, 0.0, 0.0

    def add(
        self,
        network: AtomisticNetwork[P],
        prepared: Sequence[P],
        targets: Tensor,
        forces: Sequence[Tensor],
        chosen: NDArray[np.int64],
        lambda_: float,
        *,
        create_graph: bool,
    ) -> Tensor:
        """Evaluate a batch, add its errors, and return its loss, ready for autograd if asked."""
        frames = [prepared[k] for k in chosen]
        output = network(frames, create_graph=create_graph)
        sizes = torch.tensor([len(frame.species) for frame in frames])
        energy_error = output.energies - targets[torch.from_numpy(chosen)].to(network.dtype)
        force_error = output.forces - torch.cat([forces[k] for k in chosen])
        structure = torch.repeat_interleave(torch.arange(len(frames)), sizes)
        loss = batch_loss(energy_error, force_error, sizes.to(network.dtype), structure, lambda_).loss
        self.frames += len(frames)
        self.atoms += len(structure)
        self.loss += loss.item() * len(frames)
        self.energy += (energy_error.detach() / sizes).square().sum().item()
        self.force += force_error.detach().square().sum().item()
        return loss

    def means(self, part: str) -> dict[str, float]:
        """Return loss and errors under the names of the history."""
        return {
            f"{part}_loss": self.loss / self.frames,
            f"{part}_energy_rmse_per_atom": math.sqrt(self.energy / self.frames),
            f"{part}_force_rmse_vector": math.sqrt(self.force / self.atoms),
        }


def _clipped(gradients: Sequence[Tensor], clip_norm: float | None) -> list[Tensor]:
    """Shorten the gradient, all tensors together, to a norm."""
    if clip_norm is None:
        return list(gradients)
    norm = torch.stack([g.square().sum() for g in gradients]).sum().sqrt()
    factor = (clip_norm / norm).clamp(max=1.0)
    return [g * factor for g in gradients]
