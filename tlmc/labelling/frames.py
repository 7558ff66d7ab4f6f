"""Frames as files hold them: rounded, under a name made of their content, written whole or not at all."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import ase.io
from ase import Atoms

from tlmc.files import atomic_path

_DECIMALS = 8
"""Decimals of positions and cells. extxyz keeps as many, so a label belongs to exactly the geometry in the file."""


def rounded(frame: Atoms) -> Atoms:
    """Return the geometry alone, rounded as the file will hold it."""
    return Atoms(
        frame.numbers,
        frame.positions.round(_DECIMALS) + 0.0,  # no negative zeros
        cell=frame.cell.array.round(_DECIMALS) + 0.0,
        pbc=frame.pbc,
    )


def work_key(frame: Atoms, words: str) -> str:
    """Return the name under which work on a geometry is kept; ``words`` tell what work."""
    from tlmc.geometry import frame_hash

    return hashlib.sha256((frame_hash(frame) + words).encode()).hexdigest()[:24]


def write_frames(target: Path, frames: Sequence[Atoms]) -> None:
    """Write an extxyz file, compressed if its name ends so."""
    with atomic_path(target) as temporary:
        ase.io.write(temporary, list(frames), format="extxyz")
