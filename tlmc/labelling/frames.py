"""Frames as files hold them: rounded, under a name made of their content, written whole or not at all."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ase.io
import numpy as np
from ase import Atoms

from tlmc.files import atomic_path

_DECIMALS = 8
"""Decimals of positions and cells. extxyz keeps as many, so a label belongs to exactly the geometry in the file."""

_OF_A_GEOMETRY = re.compile(
    r"energ|force|stress|virial|dipole|^(spacegroup|unit_cell|occupancy|momenta)", re.IGNORECASE
)
"""Entries of ``info`` and arrays that belong to one geometry: labels, and what ASE reads of a CIF's symmetry."""

_NO_CONTENT = frozenset({"numbers", "positions", "momenta", "level_of_theory"})


def rounded(frame: Atoms) -> Atoms:
    """Return a copy with the geometry rounded as the file will hold it."""
    return moved(frame, frame)


def moved(frame: Atoms, geometry: Atoms) -> Atoms:
    """Return a copy of a frame, charges, moments, ``info`` and constraints included, with another, rounded geometry."""
    copy: Atoms = frame.copy()
    copy.calc = None
    # in place: setters would heed constraints. No negative zeros
    copy.positions[:] = geometry.positions.round(_DECIMALS) + 0.0
    copy.cell[:] = geometry.cell.array.round(_DECIMALS) + 0.0
    return copy


def bare(frame: Atoms) -> Atoms:
    """Return the rounded geometry alone."""
    geometry = rounded(frame)
    return Atoms(geometry.numbers, geometry.positions, cell=geometry.cell, pbc=geometry.pbc)


def template(frame: Atoms) -> Atoms:
    """Return a copy less what is true of its geometry alone, for frames that are made of it."""
    copy: Atoms = frame.copy()
    copy.calc = None
    for place in (copy.info, copy.arrays):
        for key in [key for key in place if _OF_A_GEOMETRY.search(str(key))]:
            del place[key]
    return copy


def work_key(frame: Atoms, words: str) -> str:
    """Return the name under which work on a geometry is kept; ``words`` tell what work, and what else it depends on."""
    from tlmc.data.geometry import frame_hash

    return hashlib.sha256((frame_hash(frame) + words).encode()).hexdigest()[:24]


def content_words(frame: Atoms) -> str:
    """Return all that a frame tells a calculator besides its geometry, "" for nothing.

    Left out are momenta and the level of theory of earlier labels.
    """
    arrays = {key: plain(value) for key, value in frame.arrays.items() if key not in _NO_CONTENT}
    info = {str(key): plain(value) for key, value in frame.info.items() if key not in _NO_CONTENT}
    return json.dumps([arrays, info], sort_keys=True) if arrays or info else ""


def plain(value: Any) -> Any:
    """Return a value as JSON has it: arrays and tuples as lists, other objects as text without their address."""
    if isinstance(value, np.ndarray | np.generic):
        value = value.tolist()
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if value is None or isinstance(value, str | int | float):
        return value
    return re.sub(r" at 0x[0-9a-f]+", "", str(value))


def write_frames(target: Path, frames: Sequence[Atoms]) -> None:
    """Write an extxyz file, compressed if its name ends so."""
    with atomic_path(target) as temporary:
        ase.io.write(temporary, list(frames), format="extxyz")
