"""SOAP against DScribe with both radial bases, its harmonics and radial functions, derivatives, averages, kernel."""

from __future__ import annotations

import math

import dscribe.descriptors
import numpy as np
import pytest
import sphericart
import torch
from ase import Atoms
from ase.build import molecule
from scipy import integrate, special

from helpers import descriptor_structures as ds
from tlmc.descriptors import compiled_sums
from tlmc.descriptors.harmonics import (
    degrees,
    harmonic_factors,
    joined_harmonics,
    padded_harmonics_and_gradients,
)
from tlmc.descriptors.polynomials import chebyshev_polynomials
from tlmc.descriptors.radial import GaussianBasis, PolynomialBasis
from tlmc.descriptors.soap import SOAP, expanded_density
from tlmc.errors import ConfigError, DataError

BASES = ("gto", "polynomial")
SIZE = {"r_cut": 4.5, "n_max": 5, "l_max": 4, "sigma": 0.5}


def both(frame, basis, species=None, average="off", **size):
    """Return our descriptor and DScribe's of the same definition."""
    species = species or sorted(set(frame.symbols))
    size = SIZE | size
    reference = dscribe.descriptors.SOAP(
        species=species, rbf=basis, average=average, periodic=bool(frame.pbc.any()), **size
    )
    return SOAP(species, basis=basis, average=average, **size), reference


@pytest.mark.parametrize("basis", BASES)
@pytest.mark.parametrize("name", [*ds.MOLECULES, *ds.CRYSTALS])
def test_equals_dscribe(name, basis):
    """The polynomial basis of DScribe is a quadrature of 100 points: eight digits."""
    frame = ds.structure(name)
    ours, theirs = both(frame, basis)
    assert ds.relative_difference(ours(frame), theirs.create(frame)) < {"gto": 1e-10, "polynomial": 1e-7}[basis]


@pytest.mark.parametrize(
    "size",
    [{"n_max": 1, "l_max": 0}, {"n_max": 8, "l_max": 6}, {"sigma": 0.3, "l_max": 9}, {"r_cut": 6.0, "sigma": 1.0}],
    ids=["least", "usual", "fine", "wide"],
)
def test_equals_dscribe_for_other_sizes(size):
    frame = ds.structure("acetamide")
    ours, theirs = both(frame, "gto", **size)
    assert ds.relative_difference(ours(frame), theirs.create(frame)) < 1e-9


def test_eight_polynomials_differ_by_dscribes_loss_of_digits():
    """The overlap matrix of eight powers is nearly singular: DScribe inverts it and is orthonormal to five digits."""
    frame, size = ds.structure("acetamide"), {"n_max": 8, "l_max": 6}
    ours, theirs = both(frame, "polynomial", **size)
    reference = theirs.create(frame)
    assert 1e-6 < ds.relative_difference(ours(frame), reference) < 1e-4
    radii, functions = theirs.get_basis_poly(SIZE["r_cut"], 8)
    weights = 0.5 * SIZE["r_cut"] * np.polynomial.legendre.leggauss(100)[1] * radii**2
    exact = ours.radial.functions(radii)[0]
    assert np.abs((functions * weights) @ functions.T - np.eye(8)).max() > 1e-6
    np.testing.assert_allclose((exact * weights) @ exact.T, np.eye(8), atol=1e-13)
    # both span the same space: with DScribe's functions made of ours, ten digits agree
    made_of_ours = torch.from_numpy((functions * weights) @ exact.T)
    theirs_made_of_ours, _ = both(frame, "polynomial", **size)
    theirs_made_of_ours.radial.mixing = made_of_ours.expand(7, -1, -1)
    assert ds.relative_difference(theirs_made_of_ours(frame), reference) < 1e-10


@pytest.mark.parametrize("average", ["inner", "outer"])
def test_averages_equal_dscribe(average):
    frame = ds.structure("naphthalene")
    ours, theirs = both(frame, "gto", average=average)
    assert ours(frame).shape == (ours.n_features,)
    assert ds.relative_difference(ours(frame), theirs.create(frame)) < 1e-10


def test_features_stand_where_dscribe_says():
    frame = ds.structure("acetamide")
    ours, theirs = both(frame, "gto", species=["O", "H", "N", "C"])
    assert ours.species == ("H", "C", "N", "O")
    assert ours.n_features == theirs.get_number_of_features() == len(ours.feature_names)
    for first, second in (("H", "H"), ("H", "O"), ("C", "N"), ("O", "O")):
        places = [
            k for k, name in enumerate(ours.feature_names) if name.startswith(f"p[{first}") and f",{second}" in name
        ]
        where = theirs.get_location((first, second))
        assert places == list(range(where.start, where.stop))
    assert ours.feature_names[0] == "p[H1,H1,l=0]"
    assert ours.feature_names[-1] == "p[O5,O5,l=4]"


@pytest.mark.parametrize("name", ["ethanol", "thiophene"])
def test_derivatives_equal_dscribes_analytical_ones(name):
    frame = ds.structure(name)
    ours, theirs = both(frame, "gto")
    reference = theirs.derivatives(frame, attach=True, method="analytical", return_descriptor=False)
    assert ds.relative_difference(ours.derivatives(frame).permute(0, 2, 3, 1), reference) < 1e-9


def test_derivatives_equal_dscribes_differences():
    """The only ones DScribe has for polynomials and for crystals."""
    frame = ds.small_cell()
    frame.wrap()
    size = {"r_cut": 3.0, "n_max": 3, "l_max": 2}
    for basis in BASES:
        ours, theirs = both(frame, basis, **size)
        reference = theirs.derivatives(frame, attach=True, method="numerical", return_descriptor=False)
        # atoms within 1e-4 A of the edge, where the density ends with a jump, would spoil the differences
        assert ds.relative_difference(ours.derivatives(frame).permute(0, 2, 3, 1), reference) < 1e-6


@pytest.mark.parametrize("basis", BASES)
@pytest.mark.parametrize("cutoff", ["none", "cosine"])
def test_second_derivatives(basis, cutoff):
    frame = molecule("HCN")
    frame.rattle(0.1, seed=1)
    descriptor = SOAP(["H", "C", "N"], r_cut=3.5, n_max=2, l_max=2, sigma=0.6, basis=basis, cutoff=cutoff)
    environments = descriptor.environments(frame)

    def values(vectors):
        return descriptor.values(environments._replace(vectors=vectors))

    vectors = environments.vectors.clone().requires_grad_()
    assert torch.autograd.gradcheck(values, (vectors,), fast_mode=True)
    assert torch.autograd.gradgradcheck(values, (vectors,), fast_mode=True)


@pytest.mark.parametrize("l_max", [0, 1, 7])
def test_harmonics_equal_sphericart(l_max):
    xyz = np.random.default_rng(0).normal(size=(20, 3))
    xyz /= np.linalg.norm(xyz, axis=1)[:, None]
    theirs, their_slopes = sphericart.SphericalHarmonics(l_max).compute_with_gradients(xyz)
    directions = torch.from_numpy(xyz).T
    both = padded_harmonics_and_gradients(directions, l_max)
    values, slopes = torch.cat(degrees(both[:, :, 0], 0, 1)), torch.cat(degrees(both[:, :, 1:], 0, 1))
    np.testing.assert_allclose(values.T, theirs, atol=1e-13)
    np.testing.assert_allclose(
        torch.cat(degrees(joined_harmonics(*harmonic_factors(directions, l_max)), 0, 1)).T, theirs, atol=1e-13
    )
    # sphericart differentiates on the sphere, we the polynomials: equal across the direction
    across = slopes - directions * (directions * slopes).sum(1, keepdim=True)
    np.testing.assert_allclose(across.permute(2, 1, 0), their_slopes, atol=1e-12)


def test_harmonics_of_a_high_degree():
    """The Chebyshev series lose three digits at degree 20; powers of z would lose eight."""
    xyz = np.random.default_rng(1).normal(size=(50, 3))
    xyz /= np.linalg.norm(xyz, axis=1)[:, None]
    theirs = sphericart.SphericalHarmonics(20).compute(xyz)
    ours = torch.cat(degrees(joined_harmonics(*harmonic_factors(torch.from_numpy(xyz).T, 20)), 0, 1))
    np.testing.assert_allclose(ours.T, theirs, atol=1e-11)


@pytest.mark.parametrize("degree", [0, 1, 2, 5, 16])
def test_chebyshev_polynomials(degree):
    x = torch.linspace(-1.0, 1.0, 30, dtype=torch.float64)
    expected = np.polynomial.chebyshev.chebvander(x.numpy(), degree).T
    np.testing.assert_allclose(chebyshev_polynomials(x, degree), expected, atol=1e-13)


@pytest.mark.parametrize("kind", [GaussianBasis, PolynomialBasis])
def test_radial_functions_are_orthonormal(kind):
    basis = kind(r_cut=5.0, n_max=6, l_max=3, sigma=0.5, reach=6.0)
    nodes, weights = np.polynomial.legendre.leggauss(400)
    end = 5.0 if kind is PolynomialBasis else 20.0
    radii = 0.5 * end * (nodes + 1.0)
    values = basis.functions(radii)
    overlap = np.einsum("lar,lbr,r->lab", values, values, 0.5 * end * weights * radii**2)
    np.testing.assert_allclose(overlap, np.broadcast_to(np.eye(6), overlap.shape), atol=1e-8)


@pytest.mark.parametrize("sigma", [0.3, 1.0])
@pytest.mark.parametrize("kind", [GaussianBasis, PolynomialBasis])
def test_radial_overlaps_equal_their_integrals(kind, sigma):
    """The definition, thesis (2.12): an integral of a Gaussian, a Bessel function and a radial function."""
    basis = kind(r_cut=4.0, n_max=3, l_max=3, sigma=sigma, reach=5.5)
    end = 4.0 if kind is PolynomialBasis else 12.0
    for distance in (0.3, 2.0, 5.0):
        ours = (basis.mixing @ basis.overlaps(torch.tensor([distance], dtype=torch.float64)))[..., 0]

        def integrand(r, degree, n, distance=distance):
            x = r * distance / sigma**2
            bessel = math.sqrt(math.pi / (2 * x)) * special.ive(degree + 0.5, x)
            gaussian = math.exp(-((r - distance) ** 2) / (2 * sigma**2))
            return 4 * math.pi * r**2 * basis.functions(np.array([r]))[degree, n, 0] * gaussian * bessel

        for degree in range(4):
            for n in range(3):
                expected, _ = integrate.quad(integrand, 1e-12, end, args=(degree, n), epsabs=1e-11)
                assert float(ours[degree, n]) == pytest.approx(expected, abs=1e-9)


def test_power_spectrum_of_one_neighbour_by_hand():
    """One neighbour: |c_nl|^2 = f_nl^2 (2 l + 1) / 4 pi for l > 0, since Y_l . Y_l = (2 l + 1) / 4 pi."""
    frame = Atoms("CH", [[0, 0, 0], [0.6, -0.8, 1.1]])
    descriptor = SOAP(["H", "C"], **SIZE)
    distance = torch.tensor([frame.get_distance(0, 1)], dtype=torch.float64)
    radial = (descriptor.radial.mixing @ descriptor.radial.overlaps(distance))[..., 0]
    row = dict(zip(descriptor.feature_names, descriptor(frame, [0])[0].tolist(), strict=True))
    for degree in (1, 2, 4):
        expected = math.pi * math.sqrt(8 / (2 * degree + 1)) * float(radial[degree, 1] * radial[degree, 3])
        expected *= (2 * degree + 1) / (4 * math.pi)
        assert row[f"p[H2,H4,l={degree}]"] == pytest.approx(expected, rel=1e-12)


def test_zeta_one_n_one_loses_the_angles():
    """Thesis after (2.10): the overlap of two densities to the power one, averaged over rotations, knows only shells.

    For the exponent n = 1 the average over all rotations keeps the degree zero alone, which is the radial distribution.
    """
    bent = Atoms("OH2", [[0, 0, 0], [0, 0, 1], [0, 1, 0]])
    straight = Atoms("OH2", [[0, 0, 0], [0, 0, 1], [0, 0, -1]])
    descriptor = SOAP(["H", "O"], **SIZE)
    names = np.array(descriptor.feature_names)
    isotropic = torch.from_numpy(np.char.find(names, "l=0") >= 0)
    difference = (descriptor(bent, [0]) - descriptor(straight, [0]))[0].abs()
    assert difference[isotropic].max() < 1e-12
    assert difference[~isotropic].max() > 1e-3


def test_the_expansion_converges_to_the_density():
    frame = Atoms("OH2", [[0, 0, 0], [0.8, 0.6, 0.0], [-0.7, 0.7, 0.3]])
    points = torch.from_numpy(np.random.default_rng(0).uniform(-1.5, 1.5, (200, 3)))
    hydrogen = torch.from_numpy(frame.positions[1:])
    exact = torch.exp(-(points[:, None] - hydrogen).square().sum(-1) / (2 * 0.4**2)).sum(1)
    errors = []
    for size in (3, 6, 10):
        descriptor = SOAP(["H", "O"], 4.0, size, size, sigma=0.4)
        coefficients = [c[0, :size] for c in descriptor.coefficients(descriptor.environments(frame, [0]))]
        errors.append(float((expanded_density(descriptor, coefficients, points) - exact).abs().max()))
    assert errors[0] > 2 * errors[1] > 4 * errors[2]
    assert errors[2] < 0.05


def test_kernel_is_positive_semidefinite():
    frames = [ds.structure(name) for name in ("ethanol", "acetamide", "methane")]
    rows = SOAP(["H", "C", "N", "O"], **SIZE)(frames)
    rows = rows / torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    for zeta in (1, 2, 4):
        kernel = (rows @ rows.T) ** zeta
        torch.testing.assert_close(kernel.diagonal(), torch.ones(len(rows), dtype=torch.float64))
        assert torch.linalg.eigvalsh(kernel).min() > -1e-12


@pytest.mark.parametrize("average", ["off", "inner", "outer"])
def test_batches_and_chosen_centres(average):
    frames = [ds.structure("ethanol"), ds.small_cell(), ds.structure("methane")]
    descriptor = SOAP(["H", "C", "O"], 3.0, 3, 2, average=average)
    single = [descriptor(frame, centers) for frame, centers in zip(frames, ([3, 0], [1, 1], [4]), strict=True)]
    together = descriptor(frames, [[3, 0], [1, 1], [4]])
    torch.testing.assert_close(together, torch.stack(single) if average != "off" else torch.cat(single))
    if average == "off":
        torch.testing.assert_close(single[0], descriptor(frames[0])[[3, 0]])
        slopes = descriptor.derivatives(frames[0], [3, 0])
        torch.testing.assert_close(slopes, descriptor.derivatives(frames[0])[[3, 0]])


def test_chunks_do_not_change_the_result(monkeypatch):
    """Of the torch operations; compiled sums know none."""
    monkeypatch.setattr(compiled_sums, "can_serve", lambda environments: False)
    frame = ds.structure("naphthalene")
    descriptor = SOAP(["H", "C"], 3.0, 3, 2)
    value, slopes = descriptor(frame), descriptor.derivatives(frame)
    monkeypatch.setattr("tlmc.descriptors.soap.PAIRS_AT_ONCE", 200)
    monkeypatch.setattr("tlmc.descriptors.soap.PLACES_AT_ONCE", 50)
    torch.testing.assert_close(descriptor(frame), value)
    torch.testing.assert_close(descriptor.derivatives(frame), slopes)


def test_single_precision():
    frame = ds.structure("ethanol")
    for basis in BASES:
        exact = SOAP(["H", "C", "O"], basis=basis, **SIZE)(frame)
        short = SOAP(["H", "C", "O"], basis=basis, dtype=torch.float32, **SIZE)(frame)
        assert short.dtype == torch.float32
        assert ds.relative_difference(short.double(), exact.numpy()) < 1e-5


def test_bad_input_is_refused():
    with pytest.raises(ConfigError, match="SOAP needs n_max >= 1 and l_max >= 0, got 0 and 2"):
        SOAP(["H"], 3.0, 0, 2)
    with pytest.raises(ConfigError, match=r"r_cut and sigma must be positive, got 3.0 and 0.0"):
        SOAP(["H"], 3.0, 2, 2, sigma=0.0)
    with pytest.raises(ConfigError, match="basis must be one of .*, got 'gaussian'"):
        SOAP(["H"], 3.0, 2, 2, basis="gaussian")
    with pytest.raises(ConfigError, match="Gaussian-type orbitals need r_cut above 1 A, got 0.9"):
        SOAP(["H"], 0.9, 2, 2)
    with pytest.raises(ConfigError, match="Gaussians of sigma = 0.001 A are too narrow for polynomials up to 5.0 A"):
        SOAP(["H"], 5.0, 2, 2, sigma=0.001, basis="polynomial")
    with pytest.raises(ConfigError, match="'Xx' is no chemical element"):
        SOAP(["Xx"], 3.0, 2, 2)
    with pytest.raises(DataError, match=r"structure 1 holds \['N'\]; SOAP has channels for \('H', 'C', 'O'\)"):
        SOAP(["C", "H", "O"], 3.0, 2, 2)([ds.structure("methane"), ds.structure("pyridine")])
