"""The Ewald sum matrix against DScribe, the thesis' numbers and Madelung constants; independence of the splitting."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from ase.build import bulk, molecule
from dscribe.descriptors import EwaldSumMatrix as Reference

from helpers import descriptor_structures as ds
from tlmc.descriptors.ewald import EwaldMatrix, EwaldParameters, ewald_matrix, ewald_parameters, printed_off_diagonal
from tlmc.errors import ConfigError, DataError


def tensors(frame):
    return torch.from_numpy(frame.numbers), torch.from_numpy(frame.positions), torch.from_numpy(frame.cell.array)


def matrix(frame, accuracy=1e-13, splitting=None):
    parameters = ewald_parameters(len(frame), frame.get_volume(), accuracy, splitting)
    return ewald_matrix(*tensors(frame), parameters)


NACL = bulk("NaCl", "rocksalt", 5.64)


@pytest.mark.parametrize("name", ds.CRYSTALS)
@pytest.mark.parametrize("ordering", ["none", "row_norm", "eigenspectrum"])
def test_equals_dscribe(name, ordering):
    frame = ds.structure(name)
    if ordering == "row_norm":
        frame.rattle(0.01, seed=0)  # equal rows of a symmetric crystal would be sorted by their rounding errors
    permutation = {"none": "none", "row_norm": "sorted_l2", "eigenspectrum": "eigenspectrum"}[ordering]
    theirs = Reference(n_atoms_max=len(frame), permutation=permutation).create(frame, accuracy=1e-11)
    ours = EwaldMatrix(len(frame), ordering, accuracy=1e-11)(frame)
    assert ds.relative_difference(ours, theirs) < 1e-10


@pytest.mark.parametrize("splitting", [0.3, 0.5, 0.8, None])
def test_the_thesis_example(splitting):
    """Thesis D2: sodium chloride, a = 5.64 A."""
    expected = torch.tensor([[-49.181588, -36.131214], [-36.131214, -117.466768]], dtype=torch.float64)
    torch.testing.assert_close(matrix(NACL, splitting=splitting), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("splitting", "expected"), [(0.3, -265.07), (0.5, -207.01), (0.8, -227.80)])
def test_the_printed_form_depends_on_the_splitting(splitting, expected):
    parameters = ewald_parameters(2, NACL.get_volume(), 1e-13, splitting)
    printed = printed_off_diagonal(*tensors(NACL), parameters)
    assert float(printed[0, 1]) == pytest.approx(expected, abs=0.005)
    assert not printed.diagonal().any()


@pytest.mark.parametrize("name", ["Cu", "NaCl", "GaAs", "naphthalene"])
def test_independent_of_the_splitting(name):
    frame = ds.structure(name)
    reference = matrix(frame)
    for splitting in (0.25, 0.6, 1.0):
        torch.testing.assert_close(matrix(frame, splitting=splitting), reference, rtol=1e-8, atol=0)


@pytest.mark.parametrize(
    ("frame", "distance", "madelung"),
    [
        (NACL, 5.64 / 2, 1.747564594633182),
        (bulk("CsCl", "cesiumchloride", 4.12), 4.12 * math.sqrt(3) / 2, 1.762674773070988),
        (bulk("ZnS", "zincblende", 5.42), 5.42 * math.sqrt(3) / 4, 1.638055053388789),
    ],
    ids=["NaCl", "CsCl", "zinc blende"],
)
def test_madelung_constants(frame, distance, madelung):
    """The charges +1 and -1 in place of the nuclei; Bailey et al., Phys. Rev. E 73 (2006) give more digits."""
    _, positions, cell = tensors(frame)
    result = ewald_matrix(torch.tensor([1.0, -1.0]), positions, cell)
    energy_per_pair = float(torch.triu(result).sum())
    assert -energy_per_pair * distance == pytest.approx(madelung, abs=1e-8)


@pytest.mark.parametrize("name", ["Cu", "NaCl", "27-like"])
@pytest.mark.parametrize("accuracy", [1e-4, 1e-7, 1e-10])
def test_reaches_the_requested_accuracy(name, accuracy):
    """In units of the product of the charges, and not by far more than asked for, which would be wasted time."""
    frame = ds.structure(name)
    charges = torch.from_numpy(frame.numbers).double()
    error = ((matrix(frame, accuracy) - matrix(frame, 1e-15)).abs() / torch.outer(charges, charges)).max()
    assert 1e-4 * accuracy < error < accuracy


def test_the_automatic_cutoffs():
    parameters = ewald_parameters(8, 100.0, 1e-6)
    assert parameters.splitting == pytest.approx(math.sqrt(math.pi) * (8 / 100.0**2) ** (1 / 6))
    assert math.exp(-((parameters.splitting * parameters.r_cut) ** 2)) == pytest.approx(1e-6)
    assert math.exp(-((parameters.g_cut / (2 * parameters.splitting)) ** 2)) == pytest.approx(1e-6)
    ratio = 0.4 / parameters.splitting
    expected = EwaldParameters(0.4, parameters.r_cut / ratio, parameters.g_cut * ratio)
    assert ewald_parameters(8, 100.0, 1e-6, splitting=0.4) == pytest.approx(expected)


@pytest.mark.parametrize("frame", [ds.structure("GaAs"), ds.small_cell()], ids=["GaAs", "small cell"])
def test_derivatives_equal_dscribe(frame):
    """DScribe takes differences of matrices of accuracy 1e-5: three digits. Those of accurate ones have seven."""
    frame.positions[0] += [0.1, 0.05, -0.07]  # off the special position, where all derivatives vanish
    descriptor = Reference(n_atoms_max=len(frame), permutation="none")
    theirs = descriptor.derivatives(frame, return_descriptor=False)
    ours = EwaldMatrix(len(frame), "none").derivatives(frame)
    assert ds.relative_difference(ours.permute(1, 2, 0), theirs) < 1e-3
    quotient = ds.difference_quotient(lambda f: torch.as_tensor(descriptor.create(f, accuracy=1e-13)), frame, 0, 2)
    assert ds.relative_difference(ours[:, 0, 2], quotient.numpy()) < 1e-7


@pytest.mark.parametrize("check", [torch.autograd.gradcheck, torch.autograd.gradgradcheck], ids=["first", "second"])
def test_autograd_derivatives_in_positions_and_cell(check):
    frame = ds.small_cell()
    numbers, positions, cell = tensors(frame)
    parameters = ewald_parameters(3, frame.get_volume(), 1e-9)
    inputs = positions.requires_grad_(), cell.requires_grad_()
    assert check(lambda x, c: ewald_matrix(numbers, x, c, parameters), inputs, atol=1e-4)


def test_ordering_makes_the_numbering_irrelevant():
    frame = ds.structure("naphthalene")
    order = np.random.default_rng(0).permutation(len(frame))
    for ordering, same in (("none", False), ("row_norm", True), ("eigenspectrum", True)):
        descriptor = EwaldMatrix(len(frame), ordering)
        assert torch.allclose(descriptor(frame[order]), descriptor(frame), rtol=1e-9, atol=1e-9) is same


def test_the_energy_of_a_supercell_is_extensive():
    """A larger cell has another splitting, other cutoffs and other G; its sum over i <= j is the energy."""
    frame = ds.small_cell()
    once, often = (float(torch.triu(matrix(cell)).sum()) for cell in (frame, frame.repeat((2, 1, 3))))
    assert often == pytest.approx(6 * once, rel=1e-11)


def test_bad_input_is_refused():
    with pytest.raises(DataError, match=r"CH4 is not periodic in all directions .* use the Coulomb matrix"):
        EwaldMatrix(5)(molecule("CH4"))
    with pytest.raises(ConfigError, match="accuracy must lie between 0 and 1, got 2.0"):
        EwaldMatrix(5, accuracy=2.0)
    with pytest.raises(ConfigError, match="splitting must be positive, got -0.3"):
        EwaldMatrix(5, splitting=-0.3)
    with pytest.raises(ValueError, match="the cell must have a volume, got"):
        ewald_matrix(torch.tensor([1]), torch.zeros(1, 3), torch.zeros(3, 3))
    with pytest.raises(ValueError, match=r"positions must have shape \(2, 3\), got \(1, 3\)"):
        ewald_matrix(torch.tensor([1, 1]), torch.zeros(1, 3), torch.eye(3))
