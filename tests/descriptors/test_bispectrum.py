"""The hypersphere bispectrum against GAP's, Wigner matrices against exponentials, Clebsch-Gordan against sympy."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from ase.build import molecule
from quippy.descriptors import Descriptor as Quippy
from scipy.linalg import expm
from sympy import Rational
from sympy.physics.quantum.cg import CG

from helpers import descriptor_structures as ds
from tlmc.descriptors.bispectrum import Bispectrum, clebsch_gordan, wigner_matrices
from tlmc.errors import ConfigError


@pytest.mark.parametrize(("J1", "J2", "J"), [(1, 1, 0), (1, 1, 2), (2, 1, 3), (2, 2, 2), (4, 3, 5)])
def test_clebsch_gordan_coefficients_equal_sympy(J1, J2, J):
    ours = clebsch_gordan(J1, J2, J)
    for k1 in range(J1 + 1):
        for k2 in range(J2 + 1):
            for k in range(J + 1):
                m1, m2, m = J1 - 2 * k1, J2 - 2 * k2, J - 2 * k
                exact = CG(*(Rational(n, 2) for n in (J1, m1, J2, m2, J, m))).doit() if m1 + m2 == m else 0
                assert float(ours[k1, k2, k]) == pytest.approx(float(exact), abs=1e-14)


def test_clebsch_gordan_coefficients_are_orthonormal():
    J1, J2 = 5, 4
    table = torch.cat([clebsch_gordan(J1, J2, J) for J in range(J1 - J2, J1 + J2 + 1, 2)], dim=2).flatten(0, 1)
    torch.testing.assert_close(table @ table.T, torch.eye(30, dtype=torch.float64))


@pytest.mark.parametrize("J", [1, 2, 3, 6])
def test_wigner_matrices_are_exponentials_of_the_generators(J):
    """exp(-2 i t n . j) with the angular momentum matrices of textbooks is the rotation that we build."""
    j = Fraction(J, 2)
    m = np.array([float(j - k) for k in range(J + 1)])
    raising = np.diag(np.sqrt(float(j * (j + 1)) - m[1:] * (m[1:] + 1)), 1)
    generators = np.stack([(raising + raising.T) / 2, (raising - raising.T) / 2j, np.diag(m)])
    direction, angle = np.array([0.48, -0.6, 0.64]), 1.3
    expected = expm(-2j * angle * np.tensordot(direction, generators, 1))
    x, y, z = math.sin(angle) * direction
    a, b = torch.tensor([[complex(math.cos(angle), -z)], [complex(-y, -x)]], dtype=torch.complex128)
    np.testing.assert_allclose(wigner_matrices(a, b, J)[J][0].numpy(), expected, atol=1e-13)


@pytest.mark.parametrize("name", ["methane", "ethanol", "pyridine", "NaCl", "naphthalene", "small cell"])
def test_equals_gap(name):
    """GAP's bispectrum_SO4, the code of the descriptor's inventor: one density, couplings of two equal momenta."""
    frame = ds.small_cell() if name == "small cell" else ds.structure(name)
    r_cut, J_max = 3.7, 5
    species = sorted(set(frame.numbers))
    if not frame.pbc.any():
        frame.center(vacuum=6.0)
    ours = Bispectrum(species, r_cut, J_max)
    rows = dict(zip(ours.couplings, ours(frame).T[: len(ours.couplings)], strict=True))
    pairs = [(J1, J) for J1 in range(J_max + 1) for J in range(0, min(J_max, 2 * J1) + 1, 2)]
    expected = []
    for J1, J in pairs:
        low, middle, high = sorted((J1, J1, J))
        # the order of the three only changes the factor 2 j + 1
        expected.append(rows[middle, low, high] * (J + 1) / (high + 1))
    expected = torch.stack(expected, dim=1)
    for number in species:
        text = f"bispectrum_SO4 cutoff={r_cut} j_max={J_max} z0_ratio=1.0 Z={number} n_species={len(species)} "
        text += f"species_Z={{{' '.join(map(str, species))}}} w={{{' '.join(['1.0'] * len(species))}}}"
        theirs = Quippy(text).calc(frame)["data"]
        assert ds.relative_difference(expected[frame.numbers == number], theirs) < 1e-10


def test_derivatives_equal_differences():
    frame = ds.small_cell()
    descriptor = Bispectrum(["C", "O"], 3.3, 3)
    slopes = descriptor.derivatives(frame)
    for atom, axis in ((0, 2), (1, 0)):
        quotient = ds.difference_quotient(descriptor, frame, atom, axis)
        assert ds.relative_difference(slopes[:, :, atom, axis], quotient.numpy()) < 1e-7


def test_second_derivatives():
    frame = molecule("HCN")
    frame.rattle(0.1, seed=1)
    descriptor = Bispectrum(["H", "C", "N"], 3.0, 2)
    environments = descriptor.environments(frame)

    def values(vectors):
        return descriptor.values(environments._replace(vectors=vectors))

    vectors = environments.vectors.clone().requires_grad_()
    assert torch.autograd.gradcheck(values, (vectors,), fast_mode=True)
    assert torch.autograd.gradgradcheck(values, (vectors,), fast_mode=True)


def test_names_and_densities():
    one, two = Bispectrum(["C"], 3.0, 2), Bispectrum(["O", "C"], 3.0, 2)
    assert one.feature_names == ["B[C,0,0,0]", "B[C,1/2,0,1/2]", "B[C,1/2,1/2,1]", "B[C,1,0,1]", "B[C,1,1,1]"]
    assert two.n_features == 15
    assert [name.split(",")[0] for name in two.feature_names[::5]] == ["B[all", "B[C", "B[O"]


def test_bad_input_is_refused():
    with pytest.raises(ConfigError, match="r_cut must be positive, got -1.0"):
        Bispectrum(["H"], -1.0)
    with pytest.raises(ConfigError, match="J_max must not be negative, got -1"):
        Bispectrum(["H"], 3.0, -1)
    with pytest.raises(ConfigError, match="theta_max must lie between 0 and pi, got 3.2"):
        Bispectrum(["H"], 3.0, theta_max=3.2)
