from __future__ import annotations

import hashlib
import struct
import time

import numpy as np
from ase import Atoms
from ase.build import bulk, molecule
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.argon import argon
from tlmc.data.geometry import duplicate_groups, element_counts, frame_hash, is_crystal


def test_elements_are_counted() -> None:
    assert element_counts([molecule("CH4"), molecule("CH3OH")]) == {"H": 8, "C": 2, "O": 1}


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 2**32 - 1), st.sampled_from(["CH4", "C6H6", "trans-butane"]))
def test_a_molecule_in_a_box_is_none_wherever_the_border_cuts_it(seed: int, name: str) -> None:
    rng = np.random.default_rng(seed)
    frame = molecule(name, cell=[25, 24, 26], pbc=True)
    frame.euler_rotate(*rng.uniform(0, 180, 3))
    frame.positions += rng.uniform(-30, 30, 3)
    frame.wrap()
    assert not is_crystal(frame)


def test_what_is_a_crystal() -> None:
    assert is_crystal(bulk("Ar"))
    assert is_crystal(bulk("Ar", cubic=True) * (3, 3, 3))
    left_handed = bulk("Ar", cubic=True)
    left_handed.set_cell(left_handed.cell[[1, 0, 2]])
    assert is_crystal(left_handed)
    # molecules 5 A apart along one axis of a long cell: a chain
    assert is_crystal(molecule("CH4", cell=[7, 30, 30], pbc=True))
    assert not is_crystal(molecule("CH4", cell=[9, 30, 30], pbc=True))
    # a pair is as isolated as one molecule
    pair = molecule("CH4", cell=[25, 25, 25], pbc=True)
    other = pair.copy()
    other.positions += [4, 1, 0]
    assert not is_crystal(pair + other)
    # neighbouring molecules link in steps across several cells of a supercell
    assert is_crystal(molecule("CH4", cell=[6, 6, 6], pbc=True) * (2, 2, 2))
    assert not is_crystal(Atoms(bulk("Ar", cubic=True), pbc=(True, True, False)))
    assert not is_crystal(molecule("CH4"))


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 2**32 - 1))
def test_moved_turned_mirrored_and_reordered_frames_are_the_same(seed: int) -> None:
    rng = np.random.default_rng(seed)
    crystal = molecule("CH3OH", cell=[[6.1, 0, 0], [0.7, 5.3, 0], [-0.4, 0.6, 5.8]], pbc=True)
    crystal.positions += rng.normal(scale=0.05, size=(6, 3))
    other = crystal[rng.permutation(6)]
    other.positions += rng.uniform(-9, 9, 3)
    other.wrap()
    turn, _ = np.linalg.qr(rng.normal(size=(3, 3)))
    other.set_cell(other.cell.array @ turn, scale_atoms=False)
    other.positions = other.positions @ turn + rng.uniform(-2e-5, 2e-5, (6, 3))
    moved = crystal.copy()
    moved.positions[rng.integers(6)] += 0.01
    strained = crystal.copy()
    strained.set_cell(crystal.cell * 1.002, scale_atoms=True)
    assert duplicate_groups([crystal, moved, other, strained]).tolist() == [0, 1, 0, 3]


def test_sameness_is_passed_on_and_copies_in_bulk_are_quick() -> None:
    frame = molecule("CH3OH")
    steps = []
    for k in range(4):
        step = frame.copy()
        step.positions[0, 0] += 0.9e-4 * k
        steps.append(step)
    assert duplicate_groups([molecule("H2O"), *steps]).tolist() == [0, 1, 1, 1, 1]
    start = time.perf_counter()
    assert set(duplicate_groups([frame] * 3000).tolist()) == {0}
    assert time.perf_counter() - start < 5
    assert duplicate_groups([]).tolist() == []


def test_periodicity_and_elements_tell_frames_apart() -> None:
    crystal = molecule("CO", cell=[4, 4, 4], pbc=True)
    swapped = crystal.copy()
    swapped.numbers = [7, 7]
    assert duplicate_groups([crystal, Atoms(crystal, pbc=False), swapped, Atoms("H"), Atoms("H")]).tolist() == [
        0,
        1,
        2,
        3,
        3,
    ]


def test_the_hash_of_a_frame_sees_geometry_only() -> None:
    frame = argon(1)[0]
    copy = Atoms(frame)
    copy.info["note"] = 1
    assert frame_hash(copy) == frame_hash(frame)
    for change in ("numbers", "positions", "cell", "pbc"):
        other = copy.copy()
        if change == "numbers":
            other.numbers[0] = 10
        elif change == "positions":
            other.positions[0, 0] += 1e-12
        elif change == "cell":
            other.cell[0, 0] += 1e-12
        else:
            other.pbc = (True, True, False)
        assert frame_hash(other) != frame_hash(copy), change


def test_the_hash_of_a_frame_is_the_same_on_every_machine() -> None:
    """Caches are keyed by it: little-endian numbers, periodicity, cell, positions, whatever the platform."""
    frame = Atoms("HO", positions=[[0, -0.0, 0], [0, 0, 1.5]], cell=[4, 5, 6], pbc=(True, False, True))
    content = struct.pack("<2q3B9d6d", 1, 8, 1, 0, 1, 4, 0, 0, 0, 5, 0, 0, 0, 6, 0, 0, 0, 0, 0, 1.5)
    assert frame_hash(frame) == hashlib.sha256(content).hexdigest()
