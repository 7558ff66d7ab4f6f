"""Small sets of argon crystals with true labels, for tests of data sets and of what they are checked for."""

from __future__ import annotations

import numpy as np
from ase import Atoms
from ase.build import bulk
from ase.calculators.lj import LennardJones
from ase.calculators.singlepoint import SinglePointCalculator
from numpy.typing import NDArray


def labelled(frame: Atoms, energy: float, forces: NDArray[np.float64], **others: object) -> Atoms:
    frame.calc = SinglePointCalculator(frame, energy=energy, forces=forces, **others)
    return frame


def argon(n_frames: int, seed: int = 0) -> list[Atoms]:
    """Rattled argon crystals with the labels of a potential, so that energies and forces belong together."""
    rng = np.random.default_rng(seed)
    frames = []
    for _ in range(n_frames):
        frame = bulk("Ar", a=5.3, cubic=True)
        frame.positions += rng.normal(scale=0.1, size=(4, 3))
        frame.calc = LennardJones(sigma=3.4, epsilon=0.0104, rc=10.0, smooth=True)
        energy, forces, stress = frame.get_potential_energy(), frame.get_forces(), frame.get_stress()
        frames.append(labelled(frame, energy, forces, stress=stress))
    return frames
