"""Replay against forgetting: beside every labelled batch, molecules on which the start model is to stay as it was.

A model that is trained on one crystal drifts everywhere else, as nothing holds it there. What it was trained on need
not be at hand: the start model itself labels any structure (Li and Hoiem 2016, "learning without forgetting"). The
loss becomes ``L(labelled batch) + weight * L(replayed batch)``, both of the same kind and size, with energies without
reference offsets, which belong to the labels alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Final, Literal

import numpy as np
import torch
from ase import Atoms
from ase.build import molecule
from ase.collections import g2

from tlmc.errors import ConfigError
from tlmc.training.distributed import Group
from tlmc.training.learner import Learner
from tlmc.training.loss import LossAndSlopes

MoleculePart = Literal["replayed", "held out"]

NATIVE: Final = ("H", "C", "N", "O", "F", "S", "Cl")
"""Elements that the start models were trained on; there is nothing to remember about a borrowed one."""

_DISPLACEMENT: Final = 0.05
"""Standard deviation of every coordinate, Angstrom: about a thermal amplitude."""
_COPIES: Final = 4


def isolated_molecules(elements: Sequence[str], part: MoleculePart) -> list[Atoms]:
    """Return small closed-shell molecules of the G2 set (Curtiss et al. 1991, in ASE), displaced at random.

    In the order of their size every other molecule is for replay, the rest for measuring; none is in both parts.

    Parameters
    ----------
    elements
        Molecules of these elements only, and of those the ones in :data:`NATIVE`.
    part
        Which half.

    Returns
    -------
    list of Atoms
        Four different displacements of every molecule, its name in G2 under ``info["molecule"]``; always the same.

    Raises
    ------
    ConfigError
        If a half would be empty.
    """
    allowed = set(elements) & set(NATIVE)
    found = sorted((len(atoms), name) for name in g2.names if _is_stable(name, atoms := molecule(name), allowed))
    names = [name for _, name in found[0 if part == "replayed" else 1 :: 2]]
    if not names:
        raise ConfigError(
            f"there are {len(found)} small molecules of {', '.join(sorted(allowed)) or 'these elements'}: too few for "
            "replay and for measuring what is forgotten"
        )
    frames = []
    for name in names:
        rng = np.random.default_rng(list(name.encode()))
        for _ in range(_COPIES):
            frame = molecule(name)
            frame.positions += rng.normal(scale=_DISPLACEMENT, size=(len(frame), 3))
            frames.append(Atoms(frame.symbols, frame.positions, info={"molecule": name}))
    return frames


def _is_stable(name: str, atoms: Atoms, allowed: set[str]) -> bool:
    return (
        len(atoms) >= 3
        and not name.endswith("_s1A1d")  # singlet carbenes: closed-shell, but no molecules that the models know
        and not atoms.get_initial_magnetic_moments().any()
        and set(atoms.get_chemical_symbols()) <= allowed
    )


class Replay:
    """Molecules labelled by the model that a learner holds now, and their part of every step's gradient.

    Parameters
    ----------
    learner
        With the start model's weights.
    molecules
        Their places among the learner's frames.
    weight
        Of their loss.
    batch_size
        Molecules per step, at most all.
    loss
        :func:`tlmc.training.loss.batch_loss` with its settings.
    seed
        Of the choice of molecules.
    """

    def __init__(
        self,
        learner: Learner,
        molecules: Sequence[int],
        weight: float,
        batch_size: int,
        loss: Callable[..., LossAndSlopes],
        seed: int,
    ) -> None:
        self._learner, self._molecules, self._weight, self._loss, self._seed = learner, molecules, weight, loss, seed
        self._batch_size = min(batch_size, len(molecules))
        self._labels = [learner.energies_forces(learner.batch([index])) for index in molecules]

    def add_gradient(self, step: int, group: Group | None = None) -> None:
        """Add the gradient of the replayed batch of a step, or of this process' share, to the one the learner holds."""
        rng = np.random.default_rng([self._seed, step])
        picked = rng.choice(len(self._molecules), self._batch_size, replace=False)
        if group is not None:
            picked = group.share(picked)
        if len(picked) == 0:
            return
        batch = self._learner.batch([self._molecules[i] for i in picked])
        energies = torch.cat([self._labels[i].energies for i in picked])
        forces = torch.cat([self._labels[i].forces for i in picked])
        own = self._learner.gradient.clone()
        self._learner.loss_gradient(batch, energies, forces, partial(self._loss, n_structures=self._batch_size))
        self._learner.gradient.mul_(self._weight).add_(own)
