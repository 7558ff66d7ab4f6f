"""Molecules and crystals on which descriptors are compared with independent codes, and what such comparisons share."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numpy as np
import torch
from ase import Atoms
from ase.build import bulk, molecule
from torch import Tensor

from tlmc.data.loading import load_dataset
from tlmc.labelling import read_structure

MOLECULES: dict[str, Callable[[], Atoms]] = {
    "methane": lambda: molecule("CH4"),
    "ethanol": lambda: molecule("CH3CH2OH"),
    "pyridine": lambda: molecule("C5H5N"),
    "thiophene": lambda: molecule("C4H4S"),
    "acetamide": lambda: molecule("CH3CONH2"),
    "27-like molecule": lambda: load_dataset("27-like").molecules().frames[0],
}
CRYSTALS: dict[str, Callable[[], Atoms]] = {
    "Cu": lambda: bulk("Cu"),
    "NaCl": lambda: bulk("NaCl", "rocksalt", 5.64),
    "GaAs": lambda: bulk("GaAs", "zincblende", 5.65),
    "naphthalene": lambda: load_dataset("naphthalene").crystals().frames[3],
    "27-like": lambda: load_dataset("27-like").crystals().frames[5],
    "benzene": lambda: read_structure("pyxtal:benzene"),
    "aspirin": lambda: read_structure("pyxtal:aspirin"),
}


def structure(name: str) -> Atoms:
    """Return a structure by name: molecules without a cell, crystals with their atoms inside it.

    DScribe repeats a cell as often as its size asks for, wherever its atoms are: those outside miss neighbours.
    """
    return _made(name).copy()


@cache
def _made(name: str) -> Atoms:
    frame = (MOLECULES | CRYSTALS)[name]()
    if name in MOLECULES:
        frame.set_cell(None)
        frame.pbc = False
    frame.wrap()
    return frame


def small_cell() -> Atoms:
    """Return a cell of 3 A, shorter than any cutoff, so that atoms meet many of their own images."""
    return Atoms(
        "CO2",
        [[0.1, 0.2, 0.3], [1.3, 0.3, 0.1], [2.4, 1.6, 1.9]],
        cell=[[3.0, 0, 0], [0.4, 3.2, 0], [0.1, 0.3, 2.9]],
        pbc=True,
    )


def relative_difference(ours: Tensor, theirs: np.ndarray) -> float:
    """Return the largest difference over the largest number of the same row (last dimension).

    Rows that should be zero (derivatives across a mirror plane) are compared with the largest number of all.
    """
    reference = torch.as_tensor(theirs).reshape(ours.shape)
    scale = reference.abs().amax(-1, keepdim=True)
    scale = torch.where(scale < 1e-9 * scale.max(), scale.max(), scale)
    return float(((ours - reference).abs() / scale).max())


def difference_quotient(function: Callable[[Atoms], Tensor], frame: Atoms, atom: int, axis: int) -> Tensor:
    """Return the derivative of a descriptor by central differences of fourth order, accurate to about 1e-9."""
    step, total = 1e-3, 0.0
    for multiple, weight in ((1, 8.0), (-1, -8.0), (2, -1.0), (-2, 1.0)):
        moved = frame.copy()
        moved.positions[atom, axis] += multiple * step
        total = total + weight * function(moved)
    return total / (12.0 * step)
