r"""Query by committee: where models that fit the same labels disagree, data are missing (thesis 2.4).

A committee is several models: the members of an ensemble such as ANI-2x, trainings from several seeds, or refits on
bootstrap resamples of the training part. Its mean is the prediction; its spread says how far the labels leave the
prediction open. The spread is no error bar before it is calibrated (:mod:`tlmc.sampling.calibration`): members share
descriptor, start weights and data, so they err together.

The members of a *fine-tuned* ensemble are no committee. Its loss sees their mean only, and each member drifts where the
others make up for it: alone it is many times worse than the mean, and how far members lie apart has nothing to do with
the error. Such ensembles are refused here (:attr:`tlmc.potentials.Potential.committee`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations
from typing import NamedTuple

import numpy as np
from ase import Atoms
from numpy.random import Generator
from numpy.typing import NDArray

from tlmc.arguments import checked
from tlmc.equality import equal_by_content
from tlmc.errors import ConfigError, ModelError
from tlmc.families.ani.model import AniPotential, Layer
from tlmc.potentials.calculator import predict
from tlmc.potentials.model import Potential, Predictions

FloatArray = NDArray[np.float64]


@equal_by_content
class CommitteePredictions(NamedTuple):
    """What each member of a committee says about some frames."""

    energies: FloatArray
    """eV, shape ``(n_members, n_frames)``."""
    forces: tuple[FloatArray, ...]
    """Per frame eV/Angstrom, shape ``(n_members, n_atoms, 3)``."""

    @property
    def n_members(self) -> int:
        """Number of members."""
        return len(self.energies)

    def mean(self) -> Predictions:
        """Return the committee's prediction, the mean of its members."""
        return Predictions(self.energies.mean(axis=0), tuple(forces.mean(axis=0) for forces in self.forces))

    def energy_spread_per_atom(self) -> FloatArray:
        """Return the sample standard deviation of the energies over the number of atoms, eV/atom, ``(n_frames,)``."""
        return self._deviations() / self._n_atoms()

    def rho(self) -> FloatArray:
        r"""Return :math:`\sigma / \sqrt{N_a}`, eV, shape ``(n_frames,)``: ANI's measure and the thesis' (see S2).

        Independent errors of atoms add up to :math:`\sigma \propto \sqrt{N_a}`, so this compares frames of any size.
        """
        return self._deviations() / np.sqrt(self._n_atoms())

    def force_spread(self) -> tuple[FloatArray, ...]:
        """Return, per frame and atom, the root of the variance of the force vector, eV/Angstrom, ``(n_atoms,)`` each.

        The variance is summed over x, y and z, with ``n_members - 1`` in the denominator.
        """
        self._several()
        return tuple(np.sqrt(forces.var(axis=0, ddof=1).sum(axis=1)) for forces in self.forces)

    def frame_force_spread(self) -> FloatArray:
        """Return the root mean square of `force_spread` over the atoms of each frame, eV/Angstrom, ``(n_frames,)``."""
        return np.array([np.sqrt((spread**2).mean()) for spread in self.force_spread()])

    def _deviations(self) -> FloatArray:
        self._several()
        return np.asarray(self.energies.std(axis=0, ddof=1), dtype=np.float64)

    def _n_atoms(self) -> FloatArray:
        return np.array([forces.shape[1] for forces in self.forces], dtype=np.float64)

    def _several(self) -> None:
        if self.n_members < 2:
            raise ModelError(f"a spread needs two members or more, got {self.n_members}")


def members(model: AniPotential) -> tuple[AniPotential, ...]:
    """Return the members of an ensemble as models of their own, whose mean the ensemble is.

    Parameters
    ----------
    model
        An ensemble such as ``ani2x``; a single network is returned as it is.

    Raises
    ------
    ModelError
        If the members are no models of their own, as after a fine-tuning (:attr:`tlmc.potentials.Potential.committee`).
    """
    model.check_committee()
    return tuple(
        replace(
            model,
            networks={
                symbol: tuple(Layer(layer.weight[m : m + 1], layer.bias[m : m + 1]) for layer in layers)
                for symbol, layers in model.networks.items()
            },
            committee=False,
        )
        for m in range(model.members)
    )


@checked
def predict_committee(models: Potential | Sequence[Potential], frames: Sequence[Atoms]) -> CommitteePredictions:
    """Return energies and forces of frames according to each member.

    Parameters
    ----------
    models
        An ensemble, which is taken apart into `members`, or one model per member: trained one by one, each of them a
        single network or an ensemble that is taken by its mean.
    frames
        ``n_frames`` molecules and crystals.

    Raises
    ------
    ModelError
        If there is no member, two are the same model, or an ensemble cannot be taken apart (`members`).
    ModelError, DataError
        As `tlmc.potentials.predict`.
    """
    each: list[Potential] = list(
        members(models) if isinstance(models, AniPotential) else [models] if isinstance(models, Potential) else models
    )
    if not each:
        raise ModelError("a committee needs members, got none")
    for a, b in combinations(range(len(each)), 2):
        if each[a] == each[b]:
            raise ModelError(f"models {a} and {b} of the committee are one and the same, so that they cannot disagree")
    said = [predict(model, frames) for model in each]
    forces = tuple(np.stack(of_frame) for of_frame in zip(*(one.forces for one in said), strict=True))
    return CommitteePredictions(np.stack([one.energies for one in said]), forces)


def bootstrap(n_frames: int, n_members: int, rng: Generator) -> NDArray[np.int64]:
    """Draw, for each member, as many frames as there are, with replacement.

    Members then differ as fits to new samples of the same kind would (Efron, Ann. Stat. 7, 1, 1979); on average each
    misses a share of 1/e of the frames.

    Returns
    -------
    NDArray
        Indices of frames, shape ``(n_members, n_frames)``.

    Raises
    ------
    ConfigError
        If a number is not positive.
    """
    if n_frames < 1 or n_members < 1:
        raise ConfigError(f"a bootstrap needs frames and members, got {n_frames} and {n_members}")
    return rng.integers(n_frames, size=(n_members, n_frames))


def disputed(spread: FloatArray, threshold: float) -> NDArray[np.int64]:
    """Return the frames above a threshold, the most disputed first (ANI's training took 0.01 eV for `rho`).

    Parameters
    ----------
    spread
        Any measure, shape ``(n_frames,)``.
    threshold
        In its unit.

    Raises
    ------
    ConfigError
        If the threshold is negative or not a number.
    """
    if not threshold >= 0:
        raise ConfigError(f"a threshold must be zero or positive, got {threshold}")
    order = np.argsort(-spread, kind="stable")
    return order[spread[order] > threshold].astype(np.int64)
