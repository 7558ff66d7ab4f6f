"""What every descriptor must hold: one interface, invariances on random structures, exact derivatives, smoothness."""

from __future__ import annotations

import dataclasses
import subprocess
import sys

import numpy as np
import pytest
import torch
from ase import Atoms
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation

from helpers import descriptor_structures as ds
from tlmc import descriptors
from tlmc.descriptors.ani import ANI_2X, AtomicEnvironmentVector
from tlmc.descriptors.base import position_gradient, strain_gradient
from tlmc.descriptors.bispectrum import Bispectrum
from tlmc.descriptors.coulomb import CoulombMatrix
from tlmc.descriptors.ewald import EwaldMatrix
from tlmc.descriptors.soap import SOAP
from tlmc.descriptors.symmetry_functions import SymmetryFunctions
from tlmc.errors import ConfigError, DataError

ELEMENTS = ("H", "C", "O")
R_CUT = 3.2
SHORT_ANI = dataclasses.replace(ANI_2X, r_cut_radial=R_CUT, r_cut_angular=3.0)
LOCAL = {
    "SOAP gto": SOAP(ELEMENTS, R_CUT, 3, 3, sigma=0.5, cutoff="cosine"),
    "SOAP polynomial": SOAP(ELEMENTS, R_CUT, 2, 2, sigma=0.5, basis="polynomial", cutoff="cosine"),
    "symmetry functions": SymmetryFunctions(
        ELEMENTS, R_CUT, [(0.5, 0.0), (4.0, 1.5)], [(0.05, 2.0, 1.0), (0.1, 4.0, -1.0)], [(0.1, 1.0, 1.0)]
    ),
    "AEV": AtomicEnvironmentVector(ELEMENTS, SHORT_ANI),
    "bispectrum": Bispectrum(ELEMENTS, R_CUT, 3),
}
MATRICES = {
    f"{kind.__name__} {ordering}": kind(8, ordering)
    for kind in (CoulombMatrix, EwaldMatrix)
    for ordering in ("none", "row_norm", "eigenspectrum")
}
AVERAGED = {
    f"SOAP {average}": SOAP(ELEMENTS, R_CUT, 3, 2, sigma=0.5, average=average, cutoff="cosine")
    for average in ("inner", "outer")
}
ALL = LOCAL | AVERAGED | MATRICES

few = settings(max_examples=6, deadline=None, derandomize=True, database=None)
seeds = st.integers(0, 2**32 - 1)


def random_structure(seed: int, periodic: bool = True) -> Atoms:
    """Return three to six atoms in a skewed cell that is shorter than the cutoff, none nearer than 0.9 A."""
    rng = np.random.default_rng(seed)
    n_atoms = int(rng.integers(3, 7))
    frame = Atoms(rng.choice(ELEMENTS, n_atoms), pbc=periodic, cell=np.diag(rng.uniform(2.8, 4.5, 3)))
    frame.set_cell(frame.cell.array + rng.uniform(-0.4, 0.4, (3, 3)))
    while True:
        frame.set_scaled_positions(rng.random((n_atoms, 3)))
        distances = frame.get_all_distances(mic=periodic) + 9.0 * np.eye(n_atoms)
        if distances.min() > 0.9:
            return frame


def fitting(name: str, seed: int) -> Atoms:
    return random_structure(seed, periodic=not name.startswith("CoulombMatrix"))


def turned(frame: Atoms, seed: int) -> Atoms:
    """Return the structure turned, or turned and mirrored."""
    matrix = Rotation.random(rng=np.random.default_rng(seed)).as_matrix() * (-1) ** (seed % 2)
    result = frame.copy()
    result.set_cell(frame.cell.array @ matrix.T)
    result.positions = frame.positions @ matrix.T
    return result


def assert_equal(ours, other):
    scale = max(1.0, float(other.abs().max()))
    assert float((ours - other).abs().max()) < 1e-9 * scale


@pytest.mark.parametrize("name", ALL)
class TestEveryDescriptor:
    @few
    @given(seed=seeds)
    def test_rotation_and_reflection(self, name, seed):
        frame = fitting(name, seed)
        assert_equal(ALL[name](turned(frame, seed)), ALL[name](frame))

    @few
    @given(seed=seeds)
    def test_translation_and_periodic_images(self, name, seed):
        frame = fitting(name, seed)
        moved = frame.copy()
        rng = np.random.default_rng(seed)
        moved.positions += rng.normal(scale=5.0, size=3)
        if frame.pbc.all():
            moved.positions += rng.integers(-2, 3, (len(frame), 3)) @ frame.cell.array
        assert_equal(ALL[name](moved), ALL[name](frame))

    @few
    @given(seed=seeds)
    def test_permutation(self, name, seed):
        frame = fitting(name, seed)
        order = np.random.default_rng(seed).permutation(len(frame))
        value, permuted = ALL[name](frame), ALL[name](frame[order])
        if name in LOCAL:
            assert_equal(permuted, value[order])
        elif name.endswith("none"):
            n, n_max = len(frame), 8
            matrix = value.view(n_max, n_max)[:n, :n][order][:, order]
            assert_equal(permuted.view(n_max, n_max)[:n, :n], matrix)
        else:
            assert_equal(permuted, value)

    @settings(few, max_examples=2)
    @given(seed=seeds)
    def test_derivatives_equal_differences(self, name, seed):
        frame = fitting(name, seed)
        slopes = ALL[name].derivatives(frame)
        atom, axis = seed % len(frame), seed % 3
        quotient = ds.difference_quotient(ALL[name], frame, atom, axis)
        assert slopes.shape == (*quotient.shape, len(frame), 3)
        scale = max(1.0, float(quotient.abs().max()))
        assert float((slopes[..., atom, axis] - quotient).abs().max()) < 2e-6 * scale

    def test_derivatives_add_up_to_zero(self, name):
        """Moving all atoms alike changes nothing."""
        slopes = ALL[name].derivatives(fitting(name, 3))
        assert float(slopes.sum(-2).abs().max()) < 1e-10 * float(slopes.abs().max())

    def test_one_and_several_structures(self, name):
        frames = [fitting(name, seed) for seed in (1, 2, 3)]
        single = [ALL[name](frame) for frame in frames]
        together = ALL[name](frames)
        assert_equal(together, torch.cat(single) if name in LOCAL else torch.stack(single))
        assert together.shape[1] == ALL[name].n_features
        slopes = ALL[name].derivatives(frames)
        assert len(slopes) == 3
        assert_equal(slopes[1], ALL[name].derivatives(frames[1]))

    def test_names(self, name):
        names = ALL[name].feature_names
        assert len(names) == len(set(names)) == ALL[name].n_features

    def test_refuses_nothing_to_describe(self, name):
        with pytest.raises(DataError, match="there is no structure to describe"):
            ALL[name]([])
        with pytest.raises(DataError, match="structure 0 has no atoms"):
            ALL[name](Atoms())


@pytest.mark.parametrize("name", [*LOCAL, *AVERAGED])
@settings(few, max_examples=2)
@given(seed=seeds)
def test_supercell(name, seed):
    frame = random_structure(seed)
    value, larger = ALL[name](frame), ALL[name](frame.repeat((2, 1, 2)))
    assert_equal(larger, value.repeat(4, 1) if name in LOCAL else value)


@pytest.mark.parametrize("name", LOCAL)
def test_smooth_at_the_cutoff(name):
    """What an atom adds vanishes at the cutoff with its slope: it is of second order in the distance to it."""

    def row(distance):
        return LOCAL[name](Atoms("CHO", [[0, 0, 0], [0, 1.1, 0], [distance, 0, 0]]), [0])[0]

    beyond = row(R_CUT + 1.0)
    assert_equal(row(R_CUT), beyond)
    near, nearer = ((row(R_CUT - step) - beyond).abs().max() for step in (2e-3, 1e-3))
    assert 0.0 < nearer < 1e-4
    assert float(near / nearer) == pytest.approx(4.0, rel=0.05)


@pytest.mark.parametrize("name", LOCAL)
def test_differentiable_twice(name):
    """What a potential that learns from forces needs; in a cell whose atoms meet images of themselves."""
    environments = LOCAL[name].environments(random_structure(13), [0])
    weights = torch.randn(LOCAL[name].n_features, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def value(vectors):
        return LOCAL[name].values(environments._replace(vectors=vectors)) @ weights

    vectors = environments.vectors.clone().requires_grad_()
    assert torch.autograd.gradcheck(value, (vectors,), fast_mode=True)
    assert torch.autograd.gradgradcheck(value, (vectors,), fast_mode=True)


@pytest.mark.parametrize("name", LOCAL)
def test_chosen_centres(name):
    frame = random_structure(5)
    descriptor = LOCAL[name]
    assert_equal(descriptor(frame, [2, 0, 2]), descriptor(frame)[[2, 0, 2]])
    assert_equal(descriptor.derivatives(frame, [2, 0, 2]), descriptor.derivatives(frame)[[2, 0, 2]])
    assert_equal(descriptor([frame, frame], [[0], [1]]), descriptor(frame)[:2])
    with pytest.raises(ConfigError, match=r"centers of structure 0 must lie in 0 to \d, got \[9\]"):
        descriptor(frame, [9])
    with pytest.raises(ConfigError, match="2 structures need as many lists of centers, got 1"):
        descriptor([frame, frame], [[0]])


@pytest.mark.parametrize("name", LOCAL)
def test_an_atom_alone(name):
    """No neighbours: nothing fails, and nothing depends on the position."""
    frame = Atoms("H")
    assert bool(torch.isfinite(LOCAL[name](frame)).all())
    assert float(LOCAL[name].derivatives(frame).abs().max()) == 0.0


@pytest.mark.parametrize("name", LOCAL)
def test_blocks_hold_the_same_derivatives(name):
    """The form in which a training cache keeps a Jacobian."""
    frame, descriptor = random_structure(7), LOCAL[name]
    jacobian = descriptor.jacobian(descriptor.environments(frame))
    blocks = jacobian.blocks()
    width = -(-descriptor.n_features // 16)
    dense = torch.zeros(len(frame) * width, 16, len(frame), 3, dtype=torch.float64)
    dense[blocks.rows, :, blocks.atoms] += blocks.values
    dense = dense.view(len(frame), -1, len(frame), 3)[:, : descriptor.n_features]
    assert_equal(dense, jacobian.dense(len(frame), len(frame)))
    assert bool((blocks.rows.diff() >= 0).all())


def test_gradients_of_an_energy_in_positions_and_strain():
    """An energy that is a function of the descriptor: force and virial against differences."""
    frame, descriptor = random_structure(11), LOCAL["SOAP gto"]
    weights = torch.randn(descriptor.n_features, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def energy(structure):
        return (descriptor(structure) @ weights).sum()

    environments = descriptor.environments(frame)
    vectors = environments.vectors.requires_grad_()
    (slope,) = torch.autograd.grad((descriptor.values(environments) @ weights).sum(), vectors)
    with torch.no_grad():
        forces, virial = position_gradient(environments, slope), strain_gradient(environments, slope)[0]
    quotient = ds.difference_quotient(energy, frame, 1, 2)
    assert float(forces[1, 2]) == pytest.approx(float(quotient), rel=1e-7)
    strained = []
    for sign in (1, -1):
        deformation = np.eye(3)
        deformation[0, 1] += sign * 1e-5
        other = frame.copy()
        other.set_cell(frame.cell.array @ deformation.T, scale_atoms=True)
        strained.append(energy(other))
    assert float(virial[1, 0]) == pytest.approx(float(strained[0] - strained[1]) / 2e-5, rel=1e-5)


@pytest.mark.slow
def test_the_table_of_contents():
    for name in descriptors.__all__:
        assert getattr(descriptors, name).__name__ == name
    with pytest.raises(AttributeError, match=r"module 'tlmc.descriptors' has no attribute 'Sine'"):
        _ = descriptors.Sine
    # training imports the AEV alone
    code = "import sys, tlmc.descriptors.aev; assert 'tlmc.descriptors.soap' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
