from __future__ import annotations

import numpy as np
import pytest
import torch
from ase import Atoms, units
from ase.build import bulk, molecule
from ase.calculators.calculator import Calculator, all_changes
from ase.calculators.emt import EMT
from ase.calculators.lj import LennardJones
from ase.constraints import FixAtoms
from ase.optimize import BFGS
from ase.phonons import Phonons
from ase.spacegroup import crystal
from ase.vibrations import Vibrations, VibrationsData
from numpy.random import default_rng
from scipy.stats import kstest, norm

from helpers.potential_references import toy_potential
from tlmc.errors import ConfigError, DataError, ModelError
from tlmc.labelling import method
from tlmc.potentials import TlmcCalculator
from tlmc.sampling import draw_fractions, exact_hessian, hessian, normal_modes, rigid_motions, sample
from tlmc.sampling.modes import WAVENUMBER


class Springs(Calculator):
    """Harmonic springs between all atoms at their distances in a reference structure."""

    implemented_properties = ["energy", "forces"]

    def __init__(self, rest: Atoms, stiffness: float = 10.0) -> None:
        Calculator.__init__(self)
        self.lengths, self.stiffness = rest.get_all_distances(), stiffness

    def calculate(self, atoms=None, properties=("energy",), system_changes=all_changes):
        Calculator.calculate(self, atoms, properties, system_changes)
        vectors = atoms.positions[:, None] - atoms.positions[None]
        lengths = np.linalg.norm(vectors, axis=2) + np.eye(len(atoms))
        stretch = np.where(np.eye(len(atoms), dtype=bool), 0.0, lengths - self.lengths)
        self.results["energy"] = 0.25 * self.stiffness * (stretch**2).sum()
        self.results["forces"] = -self.stiffness * ((stretch / lengths)[:, :, None] * vectors).sum(axis=1)


def relaxed(frame: Atoms, calculator, fmax=1e-6) -> Atoms:
    frame.calc = calculator
    assert BFGS(frame, logfile=None).run(fmax=fmax, steps=500)
    return frame


@pytest.fixture(scope="module")
def water():
    frame = relaxed(molecule("H2O"), EMT())
    return frame, hessian(frame, EMT())


@pytest.fixture(scope="module")
def carbon_dioxide():
    """A real linear molecule: GFN2-xTB."""
    make = method("gfn2-xtb").make
    frame = relaxed(molecule("CO2"), make(), fmax=1e-4)
    return frame, hessian(frame, make())


@pytest.fixture(scope="module")
def argon():
    calculator = LennardJones(sigma=3.4, epsilon=0.0104, rc=8.5, smooth=True)
    frame = bulk("Ar", a=5.25, cubic=True)
    return frame, hessian(frame, calculator, step=0.005), calculator


class TestAgainstASE:
    @pytest.mark.parametrize(("name", "n_rigid"), [("H2O", 6), ("CO2", 5), ("NH3", 6), ("C2H2", 5)])
    def test_frequencies_of_its_vibrations_module(self, name, n_rigid, tmp_path):
        frame = relaxed(molecule(name), EMT())
        reference = Vibrations(frame, name=str(tmp_path / "vibrations"), delta=0.01)
        reference.run()
        modes = normal_modes(frame, hessian(frame, EMT(), step=0.01))
        assert len(modes) == 3 * len(frame) - n_rigid
        # ASE keeps the rigid motions, near zero or imaginary; bends of EMT's molecules may be imaginary too
        squared = reference.get_frequencies() ** 2
        rigid = np.argsort(np.abs(squared))[:n_rigid]
        expected = np.sort(np.delete(squared.real, rigid))
        np.testing.assert_allclose(np.sign(modes.frequencies) * modes.frequencies**2, expected, rtol=2e-3, atol=2e3)

    def test_same_hessian_same_frequencies(self, carbon_dioxide):
        frame, matrix = carbon_dioxide
        modes = normal_modes(frame, matrix)
        reference = VibrationsData.from_2d(frame, matrix).get_frequencies()
        assert len(modes) == 4
        np.testing.assert_allclose(modes.frequencies, np.sort(reference.real)[-4:], rtol=1e-4)
        # two equal bends, then the symmetric and the antisymmetric stretch: measured 667, 1333 and 2349 1/cm
        bend, twin, symmetric, antisymmetric = modes.frequencies
        assert bend == pytest.approx(twin, rel=1e-3)
        assert 500 < bend < 800 < 1200 < symmetric < 1600 < 2100 < antisymmetric < 2700
        # in the symmetric stretch carbon is at rest and the oxygens move oppositely
        carbon, first, second = modes.displacements[2]
        np.testing.assert_allclose(carbon, 0, atol=1e-4)
        np.testing.assert_allclose(first, -second, atol=1e-4)
        assert modes.reduced_masses[2] == pytest.approx(15.999, rel=1e-3)

    def test_phonons_at_gamma(self, argon, tmp_path):
        frame, matrix, calculator = argon
        modes = normal_modes(frame, matrix)
        assert len(modes) == 3 * len(frame) - 3
        # Gamma of the cube of four atoms is Gamma and the three X points of the primitive cell of one
        phonons = Phonons(bulk("Ar", a=5.25), calculator, supercell=(4, 4, 4), delta=0.005, name=str(tmp_path / "ph"))
        phonons.run()
        phonons.read(acoustic=True)
        points = [[0.5, 0.5, 0.0], [0.5, 0.0, 0.5], [0.0, 0.5, 0.5]]
        expected = np.sort(phonons.band_structure(points).reshape(-1)) / units.invcm
        np.testing.assert_allclose(modes.frequencies, expected, rtol=1e-3)

    def test_acoustic_modes_are_zero_and_projected_out(self, argon):
        frame, matrix, _ = argon
        root = np.repeat(np.sqrt(frame.get_masses()), 3)
        eigenvalues = np.linalg.eigvalsh(matrix / np.outer(root, root))
        assert np.abs(eigenvalues[:3]).max() < 1e-8 * eigenvalues[-1]
        modes = normal_modes(frame, matrix)
        np.testing.assert_allclose(modes.frequencies, np.sqrt(eigenvalues[3:]) * WAVENUMBER, rtol=1e-6)
        momentum = np.einsum("mic,i->mc", modes.displacements, frame.get_masses())
        np.testing.assert_allclose(momentum, 0, atol=1e-10)


class TestModes:
    def test_two_atoms_on_a_spring(self):
        frame = Atoms("HCl", [[0, 0, 0], [0, 0, 1.3]])
        modes = normal_modes(frame, hessian(frame, Springs(frame, 7.0), step=1e-3))
        mass = np.prod(frame.get_masses()) / frame.get_masses().sum()
        assert len(modes) == 1
        assert modes.frequencies[0] == pytest.approx(np.sqrt(7.0 / mass) * WAVENUMBER, rel=1e-6)
        # per unit of Cartesian length the stiffness is not the spring's, but frequency and energy do not care
        assert modes.force_constants[0] / modes.reduced_masses[0] == pytest.approx(7.0 / mass, rel=1e-6)

    def test_isotopes(self):
        frame = Atoms("H2", [[0, 0, 0], [0, 0, 0.74]])
        matrix = hessian(frame, Springs(frame), step=1e-3)
        light = normal_modes(frame, matrix)
        frame.set_masses([2 * frame.get_masses()[0]] * 2)
        heavy = normal_modes(frame, matrix)
        assert heavy.frequencies[0] == pytest.approx(light.frequencies[0] / np.sqrt(2))
        assert heavy.force_constants == pytest.approx(light.force_constants)

    def test_are_normalised_and_exchange_no_energy(self, water):
        frame, matrix = water
        modes = normal_modes(frame, matrix)
        d = modes.displacements.reshape(len(modes), -1)
        np.testing.assert_allclose(np.linalg.norm(d, axis=1), 1)
        np.testing.assert_allclose(d @ matrix @ d.T, np.diag(modes.force_constants), atol=1e-3)

    def test_have_no_linear_or_angular_momentum(self, water):
        frame, matrix = water
        modes = normal_modes(frame, matrix)
        momenta = modes.displacements * frame.get_masses()[:, None]
        np.testing.assert_allclose(momenta.sum(axis=1), 0, atol=1e-12)
        arms = frame.positions - frame.get_center_of_mass()
        np.testing.assert_allclose(np.cross(arms, momenta).sum(axis=1), 0, atol=1e-12)

    def test_do_not_depend_on_how_the_molecule_is_turned(self, water):
        frame = water[0]
        turned = frame.copy()
        turned.rotate(37, (1, 2, 3), center="COM")
        turned.translate([1.0, -2.0, 0.3])
        found = normal_modes(turned, hessian(turned, EMT(), 1e-4)).frequencies
        expected = normal_modes(frame, hessian(frame, EMT(), 1e-4)).frequencies
        np.testing.assert_allclose(found, expected, rtol=1e-4)

    def test_an_oscillation_is_one_period_about_the_rest(self, water):
        modes = normal_modes(*water)
        frames = modes.oscillation(1, amplitude=0.2, n_frames=8)
        np.testing.assert_allclose(frames[0].positions, modes.frame.positions)
        np.testing.assert_allclose(
            frames[2].positions - modes.frame.positions, 0.2 * modes.displacements[1], atol=1e-12
        )
        np.testing.assert_allclose(np.mean([f.positions for f in frames], axis=0), modes.frame.positions, atol=1e-12)


class TestRigidMotions:
    @pytest.mark.parametrize(("name", "number"), [("H2O", 6), ("CO2", 5), ("H2", 5), ("H", 3), ("C6H6", 6)])
    def test_number_and_orthonormality(self, name, number):
        frame = Atoms("H") if name == "H" else molecule(name)
        rigid = rigid_motions(frame)
        assert rigid.shape == (number, 3 * len(frame))
        np.testing.assert_allclose(rigid @ rigid.T, np.eye(number), atol=1e-12)

    def test_a_molecule_bent_by_rounding_is_linear(self):
        frame = molecule("CO2")
        frame.positions[0, 0] += 1e-4
        assert len(rigid_motions(frame)) == 5
        frame.positions[0, 0] += 0.2
        assert len(rigid_motions(frame)) == 6

    def test_boxes_and_crystals(self):
        frame = molecule("H2O", vacuum=8.0, pbc=True)
        assert len(rigid_motions(frame)) == 6
        assert len(rigid_motions(bulk("NaCl", "rocksalt", a=5.6))) == 3
        frame.pbc = [True, True, False]
        assert len(rigid_motions(frame)) == 3

    def test_a_molecule_cut_by_its_box(self):
        frame = molecule("H2O", vacuum=8.0, pbc=True)
        frame.positions -= frame.positions[0]
        frame.wrap()
        with pytest.raises(DataError, match="H2O: the molecule is cut by the border of its box"):
            rigid_motions(frame)


@pytest.fixture(scope="module")
def toy():
    return toy_potential()


def dry_ice() -> Atoms:
    return crystal(["C", "O"], [(0, 0, 0), (0.12, 0.12, 0.12)], spacegroup=205, cellpar=[5.6] * 3 + [90] * 3)


class Foreign(Calculator):
    """A calculator of which nothing is known but energy and forces."""

    implemented_properties = ("energy", "forces")

    def __init__(self, model):
        super().__init__()
        self.model = model

    def calculate(self, atoms=None, properties=("energy",), system_changes=all_changes):
        super().calculate(atoms, properties, system_changes)
        inner = TlmcCalculator(self.model)
        self.results = {"energy": inner.get_potential_energy(atoms), "forces": inner.get_forces(atoms)}


class TestExactHessian:
    def small_cell(self):
        """Two atoms in a cell smaller than the cutoff: every atom meets its own images."""
        return Atoms(
            "HO", [[0.1, 0.2, 0.0], [1.4, 1.3, 1.6]], cell=[[2.9, 0, 0], [0.4, 3.1, 0], [0, 0.3, 3.3]], pbc=True
        )

    @pytest.mark.parametrize("which", ["molecule", "crystal"])
    def test_equals_differences_of_forces(self, toy, which):
        frame = self.small_cell() if which == "crystal" else molecule("H2O")
        matrix = exact_hessian(toy, frame)
        assert np.abs(matrix).max() > 0.1
        # celu has a jump in its second derivative, which a difference meets rarely if it is short
        np.testing.assert_allclose(matrix, hessian(frame, TlmcCalculator(toy), 1e-5), atol=1e-5 * np.abs(matrix).max())

    def test_moving_everything_costs_no_force(self, toy):
        matrix = exact_hessian(toy, self.small_cell())
        np.testing.assert_allclose(matrix.reshape(2, 3, 2, 3).sum(axis=2), 0, atol=1e-10)

    def test_a_model_is_differentiated_and_a_foreign_calculator_is_not(self, toy):
        frame = self.small_cell()
        exact = exact_hessian(toy, frame)
        for ours in (toy, TlmcCalculator(toy)):
            np.testing.assert_allclose(hessian(frame, ours), exact, rtol=0, atol=1e-12)
        # float32 has no say: the energy is differentiated in float64
        single = toy.to(torch.float32)
        np.testing.assert_allclose(
            hessian(frame, TlmcCalculator(single)), exact_hessian(single, frame), rtol=0, atol=1e-12
        )
        differences = hessian(frame, TlmcCalculator(toy), 1e-2)
        assert np.abs(differences - exact).max() > 1e-6
        np.testing.assert_allclose(hessian(frame, Foreign(toy)), differences, rtol=0, atol=1e-9)
        with pytest.raises(ConfigError, match="are exact and take no step"):
            hessian(frame, toy, 1e-3)

    @pytest.mark.parametrize("which", ["molecule", "crystal"])
    def test_sum_rule_and_modes(self, ani2xt, which):
        """Kinks of CELU and of the cutoff break the sum rule of differences, in float64, and shift modes."""
        frame = molecule("CH3CH2OH") if which == "molecule" else dry_ice()
        frame.rattle(0.02, seed=1)
        model, n = ani2xt.to(torch.float64), len(frame)

        def broken(matrix):
            return np.abs(matrix.reshape(n, 3, n, 3).sum(axis=2)).max()

        exact = hessian(frame, model)
        coarse, fine = (hessian(frame, TlmcCalculator(model), step) for step in (1e-2, 1e-5))
        assert broken(exact) < 1e-10
        assert broken(fine) < 1e-6 < 1e-3 < broken(coarse)
        np.testing.assert_allclose(fine, exact, atol=2e-5)
        of_exact, of_coarse, of_fine = (normal_modes(frame, matrix).force_constants for matrix in (exact, coarse, fine))
        np.testing.assert_allclose(of_fine, of_exact, rtol=0, atol=1e-4)
        assert np.abs(of_coarse - of_exact).max() > 1e-3

    def test_constraints_do_not_count(self, toy):
        frame = self.small_cell()
        free = hessian(frame, TlmcCalculator(toy), 1e-3)
        frame.set_constraint(FixAtoms([0]))
        np.testing.assert_allclose(hessian(frame, TlmcCalculator(toy), 1e-3), free, rtol=0, atol=1e-9)
        assert len(frame.constraints) == 1

    def test_a_calculator_that_adds_to_a_model_is_not_taken_for_it(self, toy):
        class Stiffer(TlmcCalculator):
            def calculate(self, atoms=None, properties=("energy",), system_changes=all_changes):
                super().calculate(atoms, properties, system_changes)
                self.results = {"energy": 2 * self.results["energy"], "forces": 2 * self.results["forces"]}

        frame = self.small_cell()
        np.testing.assert_allclose(hessian(frame, Stiffer(toy), 1e-5), 2 * exact_hessian(toy, frame), rtol=0, atol=1e-4)
        assert np.abs(hessian(frame, Stiffer(toy)) - exact_hessian(toy, frame)).max() > 0.1

    def test_bad_frames_are_named(self, toy):
        with pytest.raises(DataError, match=r"frame \(H2\): position 1 is \[0.0, nan, 1.0\]"):
            exact_hessian(toy, Atoms("H2", [(0, 0, 0), (0, np.nan, 1)]))

    def test_start_model(self, ani2xt):
        frame = molecule("CH3OH")
        frame.rattle(0.03, seed=1)
        matrix = exact_hessian(ani2xt, frame)
        expected = hessian(frame, TlmcCalculator(ani2xt.to(torch.float64)), 1e-5)
        np.testing.assert_allclose(matrix, expected, atol=2e-5)

    def test_gamma_phonons_of_dry_ice(self, ani2xt):
        model = ani2xt.to(torch.float64)
        frame = dry_ice()
        relaxed(frame, TlmcCalculator(model), fmax=1e-4)
        modes = normal_modes(frame, exact_hessian(model, frame))
        assert len(modes) == 33
        # two stretches of each of four molecules stand apart; by symmetry three of each four are equal
        assert (np.abs(modes.frequencies[:25]) < 800).all()
        for four, low, high in ((modes.frequencies[25:29], 1200, 1600), (modes.frequencies[29:], 2300, 2700)):
            assert low < four[0] < four[1] - 0.1 < high
            np.testing.assert_allclose(four[1:], four[1], rtol=1e-6)

    def test_unknown_elements(self, toy):
        with pytest.raises(ModelError, match="has no network for Ar"):
            exact_hessian(toy, Atoms("Ar"))


class TestDraw:
    N = 10_000

    def test_fractions(self):
        fractions = draw_fractions(self.N, 12, default_rng(0))
        assert (fractions >= 0).all()
        totals = fractions.sum(axis=1)
        assert kstest(totals, "uniform").pvalue > 0.01
        # no mode is preferred
        np.testing.assert_allclose(fractions.mean(axis=0), 0.5 / 12, rtol=0.06)

    def test_harmonic_energies_follow_the_drawn_fractions(self, water):
        frame, matrix = water
        modes = normal_modes(frame, matrix)
        samples = sample(modes, 300.0, 50, default_rng(1))
        quantum = 1.5 * len(frame) * units.kB * 300.0
        x = np.array([moved.positions - frame.positions for moved in samples.frames]).reshape(50, -1)
        # the Hessian itself, rigid motions included, not the sum over the modes
        energies = 0.5 * np.einsum("sa,ab,sb->s", x, matrix, x)
        np.testing.assert_allclose(energies, quantum * samples.fractions.sum(axis=1), rtol=1e-4)
        np.testing.assert_allclose(samples.energies, energies, rtol=1e-4)
        assert [moved.info["harmonic_energy"] for moved in samples.frames] == samples.energies.tolist()
        # mode by mode, from the displacement alone
        d = modes.displacements.reshape(len(modes), -1)
        mass = np.repeat(frame.get_masses(), 3)
        projected = (x * mass) @ d.T / modes.reduced_masses
        np.testing.assert_allclose(projected, samples.amplitudes, atol=1e-10)
        np.testing.assert_allclose(
            0.5 * modes.force_constants * projected**2, quantum * samples.fractions, rtol=1e-8, atol=1e-12
        )

    def test_mean_energy_over_ten_thousand_draws(self, carbon_dioxide):
        frame, matrix = carbon_dioxide
        modes = normal_modes(frame, matrix)
        samples = sample(modes, 500.0, self.N, default_rng(2))
        largest = 1.5 * 3 * units.kB * 500.0
        error = largest / np.sqrt(12 * self.N)
        assert samples.energies.mean() == pytest.approx(largest / 2, abs=4 * error)
        assert kstest(samples.energies / largest, "uniform").pvalue > 0.01
        # both signs equally often
        up = (samples.amplitudes > 0).mean(axis=0)
        np.testing.assert_allclose(up, 0.5, atol=4 * 0.5 / np.sqrt(self.N))

    def test_boltzmann(self, water):
        modes = normal_modes(*water)
        samples = sample(modes, 300.0, 3000, default_rng(3), draw="boltzmann")
        thermal = units.kB * 300.0
        width = np.sqrt(thermal / modes.force_constants)
        for k in range(len(modes)):
            assert kstest(samples.amplitudes[:, k] / width[k], norm.cdf).pvalue > 0.001
        error = thermal * np.sqrt(len(modes) / 2 / 3000)
        assert samples.energies.mean() == pytest.approx(len(modes) * thermal / 2, abs=4 * error)
        np.testing.assert_allclose(samples.energies, 1.5 * 3 * thermal * samples.fractions.sum(axis=1))

    def test_chosen_modes_alone_move(self, water):
        modes = normal_modes(*water)
        samples = sample(modes, 300.0, 5, default_rng(4), chosen=[2])
        assert (samples.amplitudes[:, :2] == 0).all()
        assert (samples.amplitudes[:, 2] != 0).all()

    def test_seed_and_what_is_kept_of_the_frame(self, argon):
        modes = normal_modes(argon[0], argon[1])
        first, second = (sample(modes, 50.0, 3, default_rng(5)) for _ in range(2))
        for one, two in zip(first.frames, second.frames, strict=True):
            np.testing.assert_array_equal(one.positions, two.positions)
            assert one.pbc.all()
            np.testing.assert_array_equal(one.cell, argon[0].cell)
        assert not np.array_equal(first.frames[0].positions, first.frames[1].positions)

    def test_refusals(self, water):
        modes = normal_modes(*water)
        rng = default_rng(6)
        with pytest.raises(ConfigError, match="temperature and n_samples must be positive, got -1.0 K and 2"):
            sample(modes, -1.0, 2, rng)
        with pytest.raises(ConfigError, match="draw must be one of thesis, boltzmann, got 'x'"):
            sample(modes, 300.0, 2, rng, draw="x")
        with pytest.raises(ConfigError, match=r"chosen must name modes 0 to 2, got \[3\]"):
            sample(modes, 300.0, 2, rng, chosen=[3])
        with pytest.raises(DataError, match="mode 0 has the force constant -"):
            sample(normal_modes(water[0], -water[1]), 300.0, 2, rng)
        with pytest.raises(DataError, match=r"the Hessian of 3 atoms must be finite, of shape \(9, 9\); got \(3, 3\)"):
            normal_modes(water[0], np.eye(3))
        lower = np.tril(water[1])  # half of a matrix, as some programs print it
        with pytest.raises(DataError, match="H2O: second derivatives must not depend on their order, but the Hessian"):
            normal_modes(water[0], lower)
        tilted = water[1] + 1e-3 * np.triu(water[1], 1)
        np.testing.assert_allclose(
            normal_modes(water[0], tilted).frequencies, normal_modes(water[0], tilted.T).frequencies, rtol=1e-12
        )
        with pytest.raises(ConfigError, match="step of a finite difference must be positive, got 0.0"):
            hessian(water[0], EMT(), step=0.0)
