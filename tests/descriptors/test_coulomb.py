"""The Coulomb matrix against DScribe, and what it must do about orderings, batches and bad input."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk, molecule
from dscribe.descriptors import CoulombMatrix as Reference

from helpers import descriptor_structures as ds
from tlmc.descriptors.coulomb import CoulombMatrix, coulomb_matrix
from tlmc.errors import ConfigError, DataError

ORDERINGS = {"none": "none", "row_norm": "sorted_l2", "eigenspectrum": "eigenspectrum"}


@pytest.mark.parametrize("ordering", ORDERINGS)
@pytest.mark.parametrize("name", ds.MOLECULES)
def test_equals_dscribe(name, ordering):
    frame = ds.structure(name)
    n_max = len(frame) + 2
    theirs = Reference(n_atoms_max=n_max, permutation=ORDERINGS[ordering]).create(frame)
    ours = CoulombMatrix(n_max, ordering)(frame)
    assert ds.relative_difference(ours, theirs) < 1e-13


@pytest.mark.parametrize("name", ["methane", "27-like molecule"])
def test_derivatives_equal_dscribe(name):
    """DScribe differentiates by differences of step 1e-4 A: equal to its truncation error."""
    frame = ds.structure(name)
    theirs = Reference(n_atoms_max=len(frame), permutation="none").derivatives(frame, return_descriptor=False)
    ours = CoulombMatrix(len(frame), "none").derivatives(frame)
    assert ds.relative_difference(ours.permute(1, 2, 0), theirs) < 1e-6


def test_a_diagonal_and_an_off_diagonal_element_by_hand():
    matrix = coulomb_matrix(torch.tensor([8, 1]), torch.tensor([[0.0, 0.0, 0.0], [0.0, 0.0, 2.0]], dtype=torch.float64))
    expected = torch.tensor([[0.5 * 8**2.4, 4.0], [4.0, 0.5]], dtype=torch.float64)
    torch.testing.assert_close(matrix, expected)


@pytest.mark.parametrize("ordering", ["none", "row_norm", "eigenspectrum"])
@pytest.mark.parametrize("check", [torch.autograd.gradcheck, torch.autograd.gradgradcheck], ids=["first", "second"])
def test_autograd_derivatives(ordering, check):
    frame = molecule("HCN")
    frame.positions[0] += [0.1, 0.2, 0.0]  # a linear molecule has a derivative of zero in two directions
    numbers = torch.from_numpy(frame.numbers)
    positions = torch.from_numpy(frame.positions).requires_grad_()
    assert check(lambda x: coulomb_matrix(numbers, x, ordering), (positions,))


def test_raw_matrix_depends_on_the_numbering_the_others_do_not():
    frame = ds.structure("27-like molecule")
    order = np.random.default_rng(0).permutation(len(frame))
    for ordering, same in (("none", False), ("row_norm", True), ("eigenspectrum", True)):
        descriptor = CoulombMatrix(len(frame), ordering)
        assert torch.allclose(descriptor(frame[order]), descriptor(frame), rtol=1e-10) is same


def test_a_batch_of_unequal_molecules_equals_single_ones():
    frames = [ds.structure(name) for name in ("methane", "ethanol", "pyridine")]
    for ordering in ORDERINGS:
        descriptor = CoulombMatrix(12, ordering)
        together = descriptor(frames)
        assert together.shape == (3, descriptor.n_features)
        torch.testing.assert_close(together, torch.stack([descriptor(frame) for frame in frames]), rtol=1e-12, atol=0)


def test_bad_input_is_refused():
    with pytest.raises(DataError, match=r"Cu is periodic \(pbc \[True, True, True\]\).*use the Ewald sum matrix"):
        CoulombMatrix(4)(bulk("Cu"))
    with pytest.raises(DataError, match="a structure has 5 atoms, more than n_atoms_max = 4"):
        CoulombMatrix(4)(molecule("CH4"))
    with pytest.raises(DataError, match="a structure has 5 atoms, more than n_atoms_max = 4"):
        CoulombMatrix(4).derivatives(molecule("CH4"))
    with pytest.raises(ConfigError, match="n_atoms_max must be positive, got 0"):
        CoulombMatrix(0)
    with pytest.raises(ConfigError, match="ordering must be one of .*, got 'sorted'"):
        CoulombMatrix(4, "sorted")
    with pytest.raises(ConfigError, match=r"CoulombMatrix describes whole structures and takes no centers, got \[0\]"):
        CoulombMatrix(5)(molecule("CH4"), centers=[0])
    with pytest.raises(ValueError, match=r"atoms 0 and 1 coincide at \[0.0, 0.0, 0.0\]"):
        CoulombMatrix(2)(Atoms("H2", np.zeros((2, 3))))
    with pytest.raises(ValueError, match=r"positions must have shape \(2, 3\), got \(3, 3\)"):
        coulomb_matrix(torch.tensor([1, 1]), torch.zeros(3, 3))
