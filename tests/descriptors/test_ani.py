"""The AEV as a descriptor: equal to torchani, its derivatives, its names."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from helpers import descriptor_structures as ds
from helpers.potential_references import torchani
from tlmc.descriptors.ani import ANI_2X, ANI_2X_SPECIES, AtomicEnvironmentVector

NAMES = ["methane", "ethanol", "pyridine", "thiophene", "naphthalene", "aspirin"]


@pytest.fixture(scope="module")
def computer():
    return torchani.aev.AEVComputer.like_2x(num_species=7).double()


def test_the_constants_are_torchanis(computer):
    theirs = [
        computer.radial.eta,
        computer.radial.shifts,
        computer.angular.eta,
        computer.angular.zeta,
        computer.angular.shifts,
        computer.angular.sections,
    ]
    ours = [
        ANI_2X.eta_radial,
        ANI_2X.shifts_radial,
        ANI_2X.eta_angular,
        ANI_2X.zeta,
        ANI_2X.shifts_angular,
        ANI_2X.sections,
    ]
    for value, reference in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(np.ravel(value), reference.detach().numpy().ravel(), rtol=1e-6)
    assert (computer.radial.cutoff, computer.angular.cutoff) == (ANI_2X.r_cut_radial, ANI_2X.r_cut_angular)


@pytest.mark.parametrize("name", NAMES)
def test_equals_torchani(computer, name):
    frame = ds.structure(name)
    species = torch.tensor([[ANI_2X_SPECIES.index(symbol) for symbol in frame.symbols]])
    box = (torch.tensor(frame.cell.array), torch.tensor(frame.pbc)) if frame.pbc.any() else (None, None)
    theirs = computer(species, torch.tensor(frame.positions)[None], *box)[0]
    ours = AtomicEnvironmentVector()(frame)
    assert ours.shape == (len(frame), 1008)
    # torchani keeps its constants in single precision
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


def test_derivatives_of_chosen_centres():
    """Against differences; a centre asked for twice, and one whose own images are its neighbours."""
    frame = ds.small_cell()
    short = dataclasses.replace(ANI_2X, r_cut_radial=3.6, r_cut_angular=3.1)
    descriptor = AtomicEnvironmentVector(["O", "C"], short)
    slopes = descriptor.derivatives(frame, [2, 0, 2])
    assert slopes.shape == (3, descriptor.n_features, 3, 3)
    for atom, axis in ((0, 1), (2, 2)):
        quotient = ds.difference_quotient(lambda f: descriptor(f, [2, 0, 2]), frame, atom, axis)
        torch.testing.assert_close(slopes[:, :, atom, axis], quotient, rtol=0, atol=1e-7)


def test_the_order_of_the_elements_is_kept():
    frame = ds.structure("ethanol")
    first, second = AtomicEnvironmentVector(["O", "H", "C"]), AtomicEnvironmentVector(["C", 1, "O", "O"])
    assert first.species == ("O", "H", "C")
    assert second.species == ("C", "H", "O")
    assert first.feature_names[0] == "R[O,0.8]"
    assert first.feature_names[-1] == "A[C,C,3.163,2.75]"
    radial = {name: column for name, column in zip(second.feature_names, second(frame).T, strict=True)}
    for name, column in zip(first.feature_names, first(frame).T, strict=True):
        if name.startswith("R"):
            torch.testing.assert_close(column, radial[name])
