"""A training of a second: a small set labelled by a model, another model that learns it, and what is compared."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from ase.build import molecule

from helpers.potential_references import toy_potential
from tlmc.data.dataset import Dataset
from tlmc.potentials import predict
from tlmc.potentials.registry import family_of
from tlmc.training.config import FinetuneConfig, recipe
from tlmc.training.distributed import Group
from tlmc.training.trainer import Trainer


def teacher():
    return toy_potential(seed=7, dtype=torch.float32)


def labelled(n_frames=20, seed=0) -> Dataset:
    """Rattled methanol in a small periodic cell, labelled by a model the student does not know."""
    rng = np.random.default_rng(seed)
    frames = []
    for _ in range(n_frames):
        frame = molecule("CH3OH", cell=[4.6, 4.8, 5.0], pbc=True)
        frame.positions += rng.normal(scale=0.08, size=(len(frame), 3))
        frames.append(frame)
    labels = predict(teacher(), frames)
    return Dataset(
        frames=tuple(frames),
        energies=labels.energies + 3.0 * 6,
        forces=labels.forces,
        stresses=(None,) * n_frames,
        name="methanol",
        source="memory",
        units="eV, eV/Angstrom",
        level_of_theory="toy",
        frame_numbers=np.arange(n_frames),
    )


def student():
    return toy_potential(seed=1, dtype=torch.float32)


def quick(**changes) -> FinetuneConfig:
    return recipe("short", **({"epochs": 4, "lr": 3e-3} | changes))


def same_weights(a, b) -> bool:
    return all(
        torch.equal(x, y)
        for symbol in a.symbols
        for layer, other in zip(a.networks[symbol], b.networks[symbol], strict=True)
        for x, y in zip(layer, other, strict=True)
    )


def trainer_of(model, dataset, split, config, group=None) -> Trainer:
    """Return what trains a model, before the first step, its labels taken as they are."""
    group = group or Group()
    learner = family_of(model).learner(model, dataset.frames, config, group, lambda count: None)
    return Trainer(learner, dataset.energies, dataset.forces, split, config, (), group)


@contextmanager
def interrupted_after(n_epochs: int) -> Iterator[None]:
    """Interrupt the training in the block, as Ctrl-C does, when it has made so many epochs."""
    train_epoch = Trainer.epoch

    def stop(self, state):
        if state.epoch == n_epochs:
            raise KeyboardInterrupt
        return train_epoch(self, state)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "epoch", stop)
        with pytest.raises(KeyboardInterrupt):
            yield
