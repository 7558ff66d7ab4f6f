"""Small labelled sets and predictions for tests of the evaluation and the plots."""

from __future__ import annotations

import numpy as np
from ase import Atoms

from tlmc.data.dataset import Dataset
from tlmc.potentials.model import Predictions


def dataset(formulas, energies, forces, frame_numbers=None):
    """Return a set of frames with these formulas and labels, atoms 1.5 A apart on a line in a cell."""
    frames = []
    for formula in formulas:
        atoms = Atoms(formula, pbc=True)
        atoms.positions[:, 0] = 1.5 * np.arange(len(atoms))
        atoms.cell = [1.5 * len(atoms), 6.0, 6.0]
        frames.append(atoms)
    return Dataset(
        frames=tuple(frames),
        energies=np.asarray(energies, dtype=np.float64),
        forces=tuple(np.asarray(force, dtype=np.float64).reshape(-1, 3) for force in forces),
        stresses=(None,) * len(frames),
        name="toy",
        source="memory",
        units="eV, eV/Angstrom",
        level_of_theory="",
        frame_numbers=np.arange(len(frames)) if frame_numbers is None else np.asarray(frame_numbers),
    )


def predictions(energies, forces):
    return Predictions(
        np.asarray(energies, dtype=np.float64),
        tuple(np.asarray(force, dtype=np.float64).reshape(-1, 3) for force in forces),
    )


def random_set(n_frames=12, seed=0, noise=0.1, formulas=("H2O", "CH4")):
    """Return a set whose forces grow with the frame number, and predictions that miss it by ``noise``."""
    rng = np.random.default_rng(seed)
    chosen = [formulas[i % len(formulas)] for i in range(n_frames)]
    sizes = [len(Atoms(formula)) for formula in chosen]
    forces = [(0.3 + 0.3 * i) * rng.normal(size=(size, 3)) for i, size in enumerate(sizes)]
    energies = [-5.0 * size + rng.normal(scale=0.05) * size for size in sizes]
    labels = dataset(chosen, energies, forces)
    predicted = predictions(
        [energy + noise * 0.1 * size * rng.normal() for energy, size in zip(energies, sizes, strict=True)],
        [force + noise * rng.normal(size=force.shape) for force in forces],
    )
    return labels, predicted
