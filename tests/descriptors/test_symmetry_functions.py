"""Symmetry functions against DScribe, by hand, at the cutoff; their derivatives."""

from __future__ import annotations

import math

import pytest
import torch
from ase import Atoms
from ase.build import molecule
from dscribe.descriptors import ACSF

from helpers import descriptor_structures as ds
from tlmc.descriptors.symmetry_functions import SymmetryFunctions
from tlmc.errors import ConfigError

RADIAL = [(0.0, 0.0), (1.0, 0.0), (4.0, 1.5), (4.0, 3.0)]
ANGULAR = [(0.01, 1.0, 1.0), (0.01, 4.0, -1.0), (0.05, 16.0, 1.0)]
WIDE = [(0.02, 2.0, 1.0), (0.1, 1.0, -1.0)]


def both(frame, r_cut=4.5, wide=WIDE):
    species = sorted(set(frame.symbols))
    reference = ACSF(
        species=species,
        r_cut=r_cut,
        g2_params=RADIAL[1:],
        g4_params=ANGULAR,
        g5_params=wide or None,
        periodic=bool(frame.pbc.any()),
    )
    return SymmetryFunctions(species, r_cut, RADIAL, ANGULAR, wide), reference


@pytest.mark.parametrize("name", [*ds.MOLECULES, *ds.CRYSTALS])
def test_equals_dscribe(name):
    frame = ds.structure(name)
    for wide in (WIDE, []):
        ours, theirs = both(frame, wide=wide)
        assert ours.n_features == theirs.get_number_of_features() == len(ours.feature_names)
        assert ds.relative_difference(ours(frame), theirs.create(frame)) < 1e-10


@pytest.mark.parametrize("name", ["ethanol", "GaAs"])
def test_derivatives_equal_dscribe(name):
    """DScribe differentiates by differences of step 1e-4 A."""
    frame = ds.structure(name)
    frame.rattle(0.05, seed=0)
    ours, theirs = both(frame, r_cut=4.2)
    reference = theirs.derivatives(frame, attach=True, method="numerical", return_descriptor=False)
    assert ds.relative_difference(ours.derivatives(frame).permute(0, 2, 3, 1), reference) < 1e-5


def test_each_pair_of_neighbours_counts_once():
    """Water: one pair of hydrogens at the oxygen."""
    frame = molecule("H2O")
    eta, zeta, lambda_, r_cut = 0.1, 2.0, 1.0, 5.0
    row = SymmetryFunctions(["H", "O"], r_cut, RADIAL, [(eta, zeta, lambda_)], [(eta, zeta, lambda_)])(frame, [0])[0]
    d, d_jk = frame.get_distance(0, 1), frame.get_distance(1, 2)
    cosine = math.cos(math.radians(frame.get_angle(1, 0, 2)))
    cut, cut_jk = (0.5 * (1 + math.cos(math.pi * x / r_cut)) for x in (d, d_jk))
    g5 = 2 ** (1 - zeta) * (1 + lambda_ * cosine) ** zeta * math.exp(-eta * 2 * d**2) * cut**2
    g4 = g5 * math.exp(-eta * d_jk**2) * cut_jk
    assert row[0].item() == pytest.approx(2 * cut)
    assert row[2].item() == pytest.approx(2 * math.exp(-4.0 * (d - 1.5) ** 2) * cut)
    assert row[8:10].tolist() == pytest.approx([g4, g5])


@pytest.mark.parametrize("frame", [molecule("HCN"), Atoms("NOF", [[0, 0, 0], [0.8, 0.9, 0], [1.0, -0.9, 0.5]])])
def test_second_derivatives(frame):
    """Hydrogen cyanide too, whose cosine is -1: nothing may be singular for atoms in a line."""
    descriptor = SymmetryFunctions(sorted(set(frame.symbols)), 3.0, RADIAL, ANGULAR, WIDE)
    environments = descriptor.environments(frame)

    def values(vectors):
        return descriptor.values(environments._replace(vectors=vectors))

    vectors = environments.vectors.clone().requires_grad_()
    assert bool(torch.isfinite(descriptor.derivatives(frame)).all())
    if frame.symbols[0] == "N":
        assert torch.autograd.gradcheck(values, (vectors,), fast_mode=True)
        assert torch.autograd.gradgradcheck(values, (vectors,), fast_mode=True)


def test_value_and_slope_vanish_at_the_cutoff():
    descriptor = SymmetryFunctions(["H"], 4.0, RADIAL, ANGULAR, WIDE)

    def row(distance):
        return descriptor(Atoms("H3", [[0, 0, 0], [0, 1.0, 0], [distance, 0, 0]]), [0])[0]

    beyond = row(4.5)
    assert (row(4.0) - beyond).abs().max() == 0
    for step in (1e-2, 1e-3):
        # (pi step / r_cut)^2 / 4: of second order, so that the slope is zero too
        assert (row(4.0 - step) - beyond).abs().max() < 0.2 * step**2


def test_names():
    names = SymmetryFunctions(["O", "H"], 4.0, [(1.0, 2.0)], [(0.1, 2.0, -1.0)], [(0.5, 1.0, 1.0)]).feature_names
    assert names[:2] == ["G2[H,eta=1,r_s=2]", "G2[O,eta=1,r_s=2]"]
    assert names[2:4] == ["G4[H,H,eta=0.1,zeta=2,lambda=-1]", "G5[H,H,eta=0.5,zeta=1,lambda=1]"]
    assert [name[3:6] for name in names[2::2]] == ["H,H", "H,O", "O,O"]


def test_radial_functions_alone():
    frame = ds.structure("ethanol")
    whole, alone = SymmetryFunctions(["H", "C", "O"], 4.0, RADIAL, ANGULAR), SymmetryFunctions("HCO", 4.0, RADIAL)
    torch.testing.assert_close(alone(frame), whole(frame)[:, : alone.n_features])
    torch.testing.assert_close(alone.derivatives(frame), whole.derivatives(frame)[:, : alone.n_features])


def test_bad_input_is_refused():
    with pytest.raises(ConfigError, match="r_cut must be positive, got 0.0"):
        SymmetryFunctions(["H"], 0.0, RADIAL)
    with pytest.raises(ConfigError, match="there is no symmetry function"):
        SymmetryFunctions(["H"], 3.0, [])
    with pytest.raises(ConfigError, match="eta must not be negative, got -1.0"):
        SymmetryFunctions(["H"], 3.0, [(-1.0, 0.0)])
    with pytest.raises(ConfigError, match="zeta must be 1 or more and lambda_ 1 or -1, got 0.5 and 1.0"):
        SymmetryFunctions(["H"], 3.0, [], [(0.1, 0.5, 1.0)])
