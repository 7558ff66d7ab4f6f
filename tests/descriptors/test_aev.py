"""AEVs against torchani, their derivatives against autograd and finite differences, and the block Jacobian."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk, molecule

from helpers.descriptor_structures import small_cell
from helpers.potential_references import Auto3DAni2xt, torchani_ani2x, toy_potential
from tlmc.data.loading import load_dataset
from tlmc.descriptors.aev import BLOCK, AEVParameters, aev, aev_backward, aev_jacobian
from tlmc.descriptors.pairs import neighbours


def evaluate(potential, frame):
    species = potential.species(frame)
    pairs = neighbours(frame, potential.aev.r_cut_radial)
    return species, pairs, aev(potential.aev, len(potential.symbols), species, pairs)


def torchani_aev(computer, symbols, frame):
    order = {symbol: k for k, symbol in enumerate(symbols)}
    species = torch.tensor([[order[s] for s in frame.get_chemical_symbols()]])
    periodic = frame.pbc.any()
    cell, pbc = (torch.tensor(frame.cell.array), torch.tensor(frame.pbc)) if periodic else (None, None)
    return computer(species, torch.tensor(frame.positions)[None], cell, pbc)[0]


FRAMES = [molecule("CH3CH2OH"), small_cell(), molecule("C6H6", cell=[9.0, 9.0, 7.0], pbc=True)]


@pytest.mark.parametrize("frame", FRAMES, ids=["ethanol", "small cell", "benzene in a box"])
def test_ani2xt_columns_equal_torchani(ani2xt, frame):
    _, _, ours = evaluate(ani2xt, frame)
    theirs = torchani_aev(Auto3DAni2xt().computer, ani2xt.symbols, frame)
    assert ours.shape == (len(frame), 1008)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


@pytest.mark.needs_mirror
@pytest.mark.parametrize("name", ["21_urea", "06_benzene", "23_succinic_acid"])
def test_ani2x_columns_equal_torchani_on_crystals(ani2x, name):
    frame = load_dataset(f"molcrys-mace/{name}").crystals().frames[30]
    _, _, ours = evaluate(ani2x, frame)
    theirs = torchani_aev(torchani_ani2x().double().aev_computer, ani2x.symbols, frame)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


@pytest.mark.parametrize("frame", FRAMES, ids=["ethanol", "small cell", "benzene in a box"])
def test_backward_equals_autograd(ani2xt, frame):
    species, pairs, value = evaluate(ani2xt, frame)
    cotangent = torch.randn(value.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    vectors = pairs.vectors.clone().requires_grad_()
    again = aev(ani2xt.aev, len(ani2xt.symbols), species, pairs._replace(vectors=vectors))
    (expected,) = torch.autograd.grad((again * cotangent).sum(), vectors)
    torch.testing.assert_close(
        aev_backward(ani2xt.aev, len(ani2xt.symbols), species, pairs, cotangent), expected, rtol=1e-10, atol=1e-12
    )


@pytest.mark.parametrize("frame", FRAMES, ids=["ethanol", "small cell", "benzene in a box"])
def test_jacobian_equals_finite_differences(frame):
    potential = toy_potential()
    n_species = len(potential.symbols)
    species, pairs, value = evaluate(potential, frame)
    blocks = aev_jacobian(potential.aev, n_species, species, pairs)
    dense = torch.zeros(value.numel() // BLOCK, BLOCK, len(frame), 3, dtype=torch.float64)
    dense[blocks.rows, :, blocks.atoms] += blocks.values
    dense = dense.view(*value.shape, len(frame), 3)
    assert bool((blocks.rows.diff() >= 0).all())
    step = 1e-5
    for atom in (0, len(frame) - 1):
        for axis in range(3):
            shifted = []
            for sign in (1, -1):
                moved = frame.copy()
                moved.positions[atom, axis] += sign * step
                shifted.append(evaluate(potential, moved)[2])
            torch.testing.assert_close(
                (shifted[0] - shifted[1]) / (2 * step), dense[:, :, atom, axis], rtol=0, atol=1e-7
            )


def test_invariances():
    potential, frame = toy_potential(), small_cell()
    reference = evaluate(potential, frame)[2]
    rotated = frame.copy()
    rotated.rotate(41.0, (1.0, 2.0, -0.5), rotate_cell=True)
    torch.testing.assert_close(evaluate(potential, rotated)[2], reference)
    moved = frame.copy()
    moved.positions += [0.3, -1.1, 7.0]
    moved.wrap()
    torch.testing.assert_close(evaluate(potential, moved)[2], reference)
    order = [2, 0, 1]
    torch.testing.assert_close(evaluate(potential, frame[order])[2], reference[order])
    torch.testing.assert_close(evaluate(potential, frame.repeat((2, 1, 3)))[2], reference.repeat(6, 1))


@pytest.mark.parametrize("cutoff", [3.5, 5.0])
def test_smooth_at_the_cutoffs(cutoff):
    """Value and slope of what an atom contributes vanish at the angular (3.5 A) and at the radial cutoff (5 A)."""
    potential = toy_potential()

    def triple(distance):
        return evaluate(potential, Atoms("COH", [[0.0, 0.0, 0.0], [0.0, 1.2, 0.0], [distance, 0.0, 0.0]]))[2][0]

    below, at, above = triple(cutoff - 1e-4), triple(cutoff), triple(cutoff + 1e-4)
    assert (below - above).abs().max() < 1e-4
    if cutoff == 5.0:
        assert (at - triple(6.0)).abs().max() < 1e-12
        assert (below - at).abs().max() < 1e-7  # second order in the distance to the cutoff


def test_active_columns_are_those_that_differ_from_zero():
    potential = toy_potential()
    value = evaluate(potential, molecule("CH3CH2OH"))[2]
    present = sorted(set(potential.species(molecule("CH3CH2OH")).tolist()))
    columns = potential.aev.columns(present, len(potential.symbols))
    touched = torch.nonzero((value != 0).any(0)).squeeze(1)
    assert set(touched.tolist()) <= set(columns.tolist())
    assert len(columns) == 3 * 16 + 6 * 16
    assert bool((columns.diff() > 0).all())


def test_neighbours_of_partly_periodic_and_small_cells():
    slab = bulk("Cu", cubic=True)
    slab.pbc = (True, True, False)
    pairs = neighbours(slab, 5.0)
    brute = 0
    for i in slab.positions:
        for j in slab.positions:
            shifts = np.array([[a, b, 0] for a in range(-3, 4) for b in range(-3, 4)]) @ slab.cell.array
            distance = np.linalg.norm(j + shifts - i, axis=1)
            brute += int(((distance < 5.0) & (distance > 1e-9)).sum())
    assert len(pairs.centre) == brute
    assert len(neighbours(Atoms("H"), 5.0).centre) == 0


def test_constants_that_do_not_fit_are_refused():
    good = toy_potential().aev
    with pytest.raises(ValueError, match="angular cutoff 6.0 A must not exceed the radial one, 5.0 A"):
        dataclasses.replace(good, r_cut_angular=6.0)
    with pytest.raises(ValueError, match=r"radial \(15\) and angular \(16\) functions must be multiples of 16"):
        AEVParameters(**(dataclasses.asdict(good) | {"shifts_radial": good.shifts_radial[:-1]}))
