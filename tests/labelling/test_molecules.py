"""The molecules of a crystal, where `test_packings` and `test_perturbations` do not look: formula units."""

from __future__ import annotations

import numpy as np
import pytest
from ase import Atoms
from ase.build import molecule

from tlmc.data.loading import load_dataset
from tlmc.errors import DataError
from tlmc.labelling import formula_unit


def cell_of(*molecules, spacing=6.0):
    cell = Atoms(pbc=True, cell=[spacing * len(molecules), spacing, spacing])
    for k, part in enumerate(molecules):
        part = part.copy()
        part.translate([spacing * k + 2.0, 2.0, 2.0])
        cell += part
    return cell


def test_molecules_of_one_kind():
    water = molecule("H2O")
    assert formula_unit([cell_of(water), cell_of(water, water)]) == 3
    # C6H6 is not CH
    assert formula_unit([cell_of(molecule("C6H6"), spacing=12.0)]) == 12


def test_a_salt_or_hydrate_is_the_sum_that_repeats():
    water, methane = molecule("H2O"), molecule("CH4")
    assert formula_unit([cell_of(water, methane, water, methane)]) == 8
    assert formula_unit([cell_of(water, water, methane)]) == 11


def test_a_short_contact_in_one_frame_is_outvoted():
    water = molecule("H2O")
    good, bad = cell_of(water, water), cell_of(water, water)
    bad.positions[3:] += bad.positions[1] - bad.positions[3] + np.array([0.0, 0.3, 0.8])
    assert formula_unit([good, bad, good]) == 3


def test_no_unit():
    water = molecule("H2O")
    with pytest.raises(DataError, match="at least one frame"):
        formula_unit([])
    with pytest.raises(DataError, match=r"frame 1 of 3 \(CH4\) is no whole number of formula units 1 H2O"):
        formula_unit([cell_of(water), cell_of(molecule("CH4")), cell_of(water)])


@pytest.mark.parametrize(("name", "size"), [("27-like", 16), ("28-like", 26), ("33-like", 17)])
def test_embedded_sets(name, size):
    assert formula_unit(load_dataset(name).crystals().frames[::30]) == size
