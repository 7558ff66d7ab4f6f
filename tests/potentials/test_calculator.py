from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from ase import Atoms, units
from ase.build import make_supercell, molecule
from ase.calculators.calculator import PropertyNotImplementedError
from ase.io import read
from ase.md.verlet import VelocityVerlet
from ase.stress import full_3x3_to_voigt_6_stress, voigt_6_to_full_3x3_stress

from helpers.potential_references import (
    METHANE,
    Auto3DAni2xt,
    torchani_ani2x,
    torchani_energy_and_forces,
    toy_potential,
    with_exact_celu,
)
from tlmc.descriptors.enrichment import fit_enrichment
from tlmc.descriptors.pairs import neighbours
from tlmc.errors import ConfigError, DataError, ModelError
from tlmc.families.ani import energy_spread, enrich, member_energies
from tlmc.potentials import Predictions, TlmcCalculator, predict
from tlmc.potentials.calculator import SkinNeighbours
from tlmc.potentials.reference import ReferenceEnergies

TRICLINIC = [[3.9, 0.3, 0.0], [-0.4, 4.2, 0.5], [0.2, 0.1, 4.6]]


def short_cell() -> Atoms:
    """Two molecules in a triclinic cell with all heights below every cutoff's double, two below the cutoff itself."""
    frame = Atoms(cell=TRICLINIC, pbc=True)
    for name, place in (("H2CO", (0.1, 0.2, 0.15)), ("H2O", (0.6, 0.7, 0.7))):
        part = molecule(name)
        part.rotate(40.0, (1.0, 2.0, 3.0))
        part.translate(place @ np.array(TRICLINIC) - part.get_center_of_mass())
        frame += part
    frame.rattle(0.05, seed=1)
    return frame


def ethanol() -> Atoms:
    frame = molecule("CH3CH2OH")
    frame.rattle(0.05, seed=2)
    return frame


def mirror(name: str, index: int) -> Atoms:
    return read(Path(os.environ["TLMC_DATA_DIR"]) / "molcrys-mace" / f"{name}.traj", index=index)


@pytest.fixture(scope="module")
def toy():
    return toy_potential()


@pytest.fixture(scope="module")
def published():
    return with_exact_celu(torchani_ani2x().to(torch.float64))


@pytest.fixture(scope="module")
def double(ani2xt):
    return ani2xt.to(torch.float64)


@pytest.mark.needs_mirror
@pytest.mark.parametrize(
    "make",
    [
        lambda: mirror("21_urea", -1),
        lambda: mirror("06_benzene", -1),
        lambda: mirror("21_urea", 0),
        ethanol,
        short_cell,
        lambda: Atoms("H"),
    ],
    ids=["urea crystal", "benzene crystal", "urea molecule in a box", "ethanol", "short cell", "one atom"],
)
def test_equals_torchani(ani2x, published, make):
    frame = make()
    energy, forces = torchani_energy_and_forces(published, frame)
    exact = predict(ani2x.to(torch.float64), [frame])
    assert exact.energies[0] == pytest.approx(energy, abs=1e-8)
    np.testing.assert_allclose(exact.forces[0], forces, rtol=0.0, atol=1e-8)
    single = predict(ani2x, [frame])
    assert single.energies[0] == pytest.approx(energy, abs=1e-6 * len(frame))
    np.testing.assert_allclose(single.forces[0], forces, rtol=0.0, atol=5e-5)


@pytest.mark.needs_mirror
def test_spread_equals_torchani(ani2x, published):
    frames = [METHANE, ethanol()]
    for frame, spread in zip(frames, energy_spread(ani2x.to(torch.float64), frames), strict=True):
        inputs = torch.tensor(frame.numbers)[None], torch.tensor(frame.positions)[None]
        assert spread == pytest.approx(published.energies_qbcs(inputs).qbcs.item() * units.Hartree, rel=1e-8)


def test_ani2xt_equals_auto3d(double):
    reference = Auto3DAni2xt()
    others = [molecule(name) for name in ("CH3Cl", "CH3SH", "HF", "CH3CN")]
    for frame in (METHANE, ethanol(), short_cell(), *others):
        energy, forces = torchani_energy_and_forces(reference, frame)
        ours = predict(double, [frame])
        assert ours.energies[0] == pytest.approx(energy, abs=1e-8)
        np.testing.assert_allclose(ours.forces[0], forces, rtol=0.0, atol=1e-8)


@pytest.mark.parametrize("make", [ethanol, short_cell], ids=["molecule", "short cell"])
def test_forces_are_minus_the_slope_of_the_energy(double, make):
    frame = make()
    step = 1e-4
    numerical = np.zeros((len(frame), 3))
    for i in range(len(frame)):
        for axis in range(3):
            energies = []
            for sign in (1, -1):
                moved = frame.copy()
                moved.positions[i, axis] += sign * step
                energies.append(predict(double, [moved]).energies[0])
            numerical[i, axis] = (energies[1] - energies[0]) / (2 * step)
    forces = predict(double, [frame]).forces[0]
    np.testing.assert_allclose(forces, numerical, rtol=0.0, atol=2e-6)
    np.testing.assert_allclose(forces.sum(0), 0.0, atol=1e-10)


def test_stress_is_the_slope_of_the_energy_by_strain(double):
    frame = short_cell()
    step = 1e-5
    numerical = np.zeros((3, 3))
    for a in range(3):
        for b in range(3):
            energies = []
            for sign in (1, -1):
                strain = np.eye(3)
                # the symmetric strain of one component
                strain[a, b] += sign * step / 2
                strain[b, a] += sign * step / 2
                strained = frame.copy()
                strained.set_cell(frame.cell.array @ strain, scale_atoms=True)
                energies.append(predict(double, [strained]).energies[0])
            numerical[a, b] = (energies[0] - energies[1]) / (2 * step * frame.get_volume())
    stress = predict(double, [frame]).stresses[0]
    np.testing.assert_allclose(stress, full_3x3_to_voigt_6_stress(numerical), rtol=0.0, atol=1e-7)
    assert np.abs(stress).min() > 1e-4  # a component that vanishes would test nothing


def test_calculator_agrees_with_predict(toy):
    # not to the bit: neighbours kept from step to step come in another order, and sums round with the order
    frame = short_cell()
    expected = predict(toy, [frame])
    frame.calc = TlmcCalculator(toy)
    assert frame.get_potential_energy() == pytest.approx(expected.energies[0], abs=1e-10)
    assert frame.get_potential_energy(force_consistent=True) == frame.get_potential_energy()
    assert frame.get_potential_energies().sum() == pytest.approx(expected.energies[0], abs=1e-9)
    np.testing.assert_allclose(frame.get_forces(), expected.forces[0], rtol=0.0, atol=1e-10)
    np.testing.assert_allclose(frame.get_stress(), expected.stresses[0], rtol=0.0, atol=1e-10)
    frame.positions[0, 0] += 0.1
    moved = predict(toy, [frame])
    assert abs(moved.energies[0] - expected.energies[0]) > 1e-4
    assert frame.get_potential_energy() == pytest.approx(moved.energies[0], abs=1e-10)
    np.testing.assert_allclose(frame.get_forces(), moved.forces[0], rtol=0.0, atol=1e-10)


@pytest.mark.parametrize("pbc", [False, (True, True, False)], ids=["molecule", "slab"])
def test_no_stress_without_three_periods(toy, pbc):
    frame = short_cell()
    frame.pbc = pbc
    assert predict(toy, [frame]).stresses == (None,)
    frame.calc = TlmcCalculator(toy)
    assert np.isfinite(frame.get_forces()).all()
    with pytest.raises(PropertyNotImplementedError):
        frame.get_stress()


def test_slab_equals_a_crystal_with_a_wide_gap(toy):
    slab = short_cell()
    slab.pbc = (True, True, False)
    crystal = short_cell()
    crystal.cell[2] *= 5
    ours, wide = predict(toy, [slab]), predict(toy, [crystal])
    assert ours.energies[0] == pytest.approx(wide.energies[0], abs=1e-10)
    np.testing.assert_allclose(ours.forces[0], wide.forces[0], rtol=0.0, atol=1e-10)


def test_rotation_turns_forces_and_stress(toy):
    frame = short_cell()
    rotated = frame.copy()
    rotated.rotate(77.0, (1.0, -2.0, 0.5), rotate_cell=True)
    turn = np.linalg.solve(frame.cell.array, rotated.cell.array)
    before, after = predict(toy, [frame]), predict(toy, [rotated])
    assert after.energies[0] == pytest.approx(before.energies[0], abs=1e-10)
    np.testing.assert_allclose(after.forces[0], before.forces[0] @ turn, rtol=0.0, atol=1e-10)
    stress = turn.T @ voigt_6_to_full_3x3_stress(before.stresses[0]) @ turn
    np.testing.assert_allclose(voigt_6_to_full_3x3_stress(after.stresses[0]), stress, rtol=0.0, atol=1e-12)


def test_translation_and_wrapping_change_nothing(toy):
    frame = short_cell()
    moved = frame.copy()
    moved.translate((1.3, -2.7, 31.0))
    moved.wrap()
    before, after = predict(toy, [frame]), predict(toy, [moved])
    assert after.energies[0] == pytest.approx(before.energies[0], abs=1e-10)
    np.testing.assert_allclose(after.forces[0], before.forces[0], rtol=0.0, atol=1e-10)
    np.testing.assert_allclose(after.stresses[0], before.stresses[0], rtol=0.0, atol=1e-12)


def test_permutation_permutes_forces(toy):
    frame = short_cell()
    order = np.random.default_rng(0).permutation(len(frame))
    before, after = predict(toy, [frame]), predict(toy, [frame[order]])
    assert after.energies[0] == pytest.approx(before.energies[0], abs=1e-10)
    np.testing.assert_allclose(after.forces[0], before.forces[0][order], rtol=0.0, atol=1e-10)


@pytest.mark.parametrize("transform", [np.diag([2, 1, 1]), np.diag([2, 2, 3]), [[1, 1, 0], [0, 1, 0], [0, 0, 2]]])
def test_supercell_is_extensive(toy, transform):
    frame = short_cell()
    larger = make_supercell(frame, transform)
    copies = len(larger) // len(frame)
    small, large = predict(toy, [frame]), predict(toy, [larger])
    assert large.energies[0] == pytest.approx(copies * small.energies[0], abs=1e-9)
    np.testing.assert_allclose(large.forces[0], np.tile(small.forces[0], (copies, 1)), rtol=0.0, atol=1e-10)
    np.testing.assert_allclose(large.stresses[0], small.stresses[0], rtol=0.0, atol=1e-12)


@pytest.mark.parametrize("which", ["radial", "angular"])
def test_smooth_at_the_cutoffs(double, which):
    cutoff = double.aev.r_cut_radial if which == "radial" else double.aev.r_cut_angular

    def energy_and_force(distance: float) -> tuple[float, float]:
        # the third atom makes the pair part of an angle
        result = predict(double, [Atoms("OCH", [(0, 0, 0), (distance, 0, 0), (0, 1.0, 0)])])
        return result.energies[0], result.forces[0][1, 0]

    step = 1e-4
    energies, forces = np.array([energy_and_force(cutoff + k * step) for k in range(-3, 4)]).T
    # the cosine cutoff is continuous with its slope and jumps in curvature: force changes are of order `step`
    assert np.abs(np.diff(energies)).max() < 2 * step * np.abs(forces).max() + 1e-9
    assert np.abs(np.diff(forces)).max() < 10 * step
    if which == "radial":
        np.testing.assert_array_equal(forces[4:], 0.0)
        assert forces[0] != 0.0


def test_newtonian_dynamics_conserve_the_energy(double):
    def largest_deviation(time_step: float) -> float:
        frame = molecule("CH3CH2OH")
        thermal = np.sqrt(units.kB * 300 * frame.get_masses())[:, None]
        frame.set_momenta(thermal * np.random.default_rng(5).normal(size=(len(frame), 3)))
        frame.calc = TlmcCalculator(double)
        dynamics = VelocityVerlet(frame, timestep=time_step * units.fs)
        totals = []
        dynamics.attach(lambda: totals.append(frame.get_total_energy()))
        dynamics.run(round(40 / time_step))
        return float(np.ptp(totals))

    coarse, fine = largest_deviation(0.5), largest_deviation(0.25)
    # velocity Verlet has an error of second order if, and only if, forces are the slope of one smooth energy
    assert coarse < 0.05
    assert 3.0 < coarse / fine < 5.0


def test_reference_shifts_energies_only(toy):
    frames = [ethanol(), METHANE]
    shifted = toy.with_reference(ReferenceEnergies({"H": 0.5, "C": -2.0, "O": 3.0}, "per_element"))
    plain, after = predict(toy, frames), predict(shifted, frames)
    np.testing.assert_allclose(after.energies - plain.energies, [3.0 - 4.0 + 3.0, 2.0 - 2.0], rtol=0.0, atol=1e-9)
    np.testing.assert_array_equal(after.forces[0], plain.forces[0])
    np.testing.assert_allclose(shifted.atomic_reference(frames) - toy.atomic_reference(frames), [2.0, 0.0], atol=1e-9)
    ours = TlmcCalculator(shifted).get_property("energies", METHANE)
    np.testing.assert_allclose(
        ours - TlmcCalculator(toy).get_property("energies", METHANE), [-2.0] + [0.5] * 4, rtol=0.0, atol=1e-9
    )


def test_an_element_without_a_fitted_offset_is_named(toy):
    fitted = toy.with_reference(ReferenceEnergies({"H": 0.5, "C": -2.0}, "per_element"))
    sentence = "were fitted for C, H only, not for O in C2H6O: fit them on frames of this composition"
    for ask in (
        lambda: fitted.offsets(ethanol()),
        lambda: fitted.atomic_reference([METHANE, ethanol()]),
        lambda: predict(fitted, [ethanol()]),
        lambda: TlmcCalculator(fitted).get_property("energy", ethanol()),
    ):
        with pytest.raises(ModelError, match=sentence):
            ask()
    assert fitted.atomic_reference([METHANE]).shape == (1,)


def test_members_average_to_the_energy(toy):
    frame = short_cell()
    energies = member_energies(toy, frame)
    assert energies.shape == (3,)
    assert np.ptp(energies) > 1e-3
    assert energies.mean() == pytest.approx(predict(toy, [frame]).energies[0], abs=1e-9)
    assert energy_spread(toy, [frame]) == pytest.approx(energies.std(ddof=1) / len(frame) ** 0.5)


def test_no_frames_no_predictions(toy):
    result = predict(toy, [])
    assert result.energies.shape == (0,)
    assert result.forces == result.stresses == ()
    assert Predictions(result.energies, result.forces).stresses == ()


def periodic_without_cell() -> Atoms:
    return Atoms("H2", [(0, 0, 0), (0, 0, 1)], pbc=True)


def flat_cell() -> Atoms:
    return Atoms("H2", [(0, 0, 0), (0, 0, 1)], cell=[(5, 0, 0), (0, 5, 0), (5, 5, 0)], pbc=True)


def not_a_number() -> Atoms:
    return Atoms("H2", [(0, 0, 0), (0, np.nan, 1)])


def infinite_cell() -> Atoms:
    return Atoms("H2", [(0, 0, 0), (0, 0, 1)], cell=[(5, 0, 0), (0, 5, 0), (0, 0, np.inf)])


def overlapping() -> Atoms:
    return Atoms("H2O", [(0, 0, 0), (0, 0, 5.02), (0, 2, 0)], cell=(5, 5, 5), pbc=True)


def flattened() -> Atoms:
    return Atoms("H2", [(0, 0, 0), (0, 0, 1)], cell=[(5, 0, 0), (0, 5, 0), (4, 3, 1e-4)], pbc=True)


def thin_slab() -> Atoms:
    return Atoms("H2", [(0, 0, 0), (0, 0, 1)], cell=[(5, 0, 0), (1, 1e-3, 0), (0, 0, 5)], pbc=(True, True, False))


def nothing() -> Atoms:
    return Atoms(cell=(5, 5, 5), pbc=True)


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (flattened, r"frame 1 \(H2\): the cell .* is only 0.0001 A high"),
        (thin_slab, r"frame 1 \(H2\): the cell .* is only 0.001 A high"),
        (nothing, "frame 1 has no atoms"),
        (periodic_without_cell, r"frame 1 \(H2\): periodic in 3 directions, but the cell .* spans 0"),
        (flat_cell, r"frame 1 \(H2\): periodic in 3 directions, but the cell .* spans 2"),
        (not_a_number, r"frame 1 \(H2\): position 1 is \[0.0, nan, 1.0\]"),
        (infinite_cell, r"frame 1 \(H2\): cell vector 2 is \[0.0, 0.0, inf\]"),
        (overlapping, r"frame 1 \(H2O\): atoms 0 and 1 are 0.02 A apart"),
    ],
)
def test_bad_frames_are_named(toy, make, sentence):
    with pytest.raises(DataError, match=sentence):
        predict(toy, [METHANE, make()])


def test_uncovered_elements_are_named(toy):
    with pytest.raises(ModelError, match=r"toy has no network for F \(1 atoms\), N \(2 atoms\)"):
        predict(toy, [Atoms("N2F", np.eye(3) * 2)])
    fitted = toy.with_reference(ReferenceEnergies({"H": 0.5, "C": -2.0}, "per_element"))
    with pytest.raises(ModelError, match="fitted for C, H only, not for O in C2H6O"):
        predict(fitted, [ethanol()])


def test_one_member_has_no_spread():
    with pytest.raises(ModelError, match="toy has 1 member: a spread needs an ensemble"):
        energy_spread(toy_potential(members=1), [METHANE])


def test_neighbours_are_reused_within_the_skin_and_exact():
    """A walk far longer than the skin: every step equals a list made anew, and few lists are made."""
    model, rng = toy_potential(), np.random.default_rng(0)
    frame, find = short_cell(), SkinNeighbours(5.0, skin=0.4)
    for _ in range(30):
        frame.positions += rng.normal(scale=0.02, size=frame.positions.shape)
        pairs, fresh = find(frame, torch.float64), neighbours(frame, 5.0)
        assert len(pairs.centre) == len(fresh.centre)
        for i in range(len(frame)):
            mine, expected = (
                np.array(sorted(p.vectors[p.centre == i].round(decimals=9).tolist())) for p in (pairs, fresh)
            )
            np.testing.assert_allclose(mine, expected, atol=2e-9)
    assert 1 < find.builds < 15
    frame.set_cell(frame.cell.array * 1.001, scale_atoms=True)
    assert torch.equal(find(frame, torch.float64).vectors, neighbours(frame, 5.0).vectors)
    frame.calc = TlmcCalculator(model)
    frame.get_potential_energy()
    for _ in range(3):
        frame.positions[0] += 0.05
        np.testing.assert_allclose(frame.get_forces(), predict(model, [frame]).forces[0], atol=1e-10)
    assert frame.calc._find.builds == 1


def charged(**changes) -> Atoms:
    frame = Atoms("H2O", [(0, 0, 0), (0.96, 0, 0), (0.96, 0.96, 0)][::-1])
    frame.info.update(changes.pop("info", {}))
    for name, values in changes.items():
        getattr(frame, f"set_{name}")(values)
    return frame


UNUSUAL = [
    (charged(info={"charge": -1}), "charge -1"),
    (charged(info={"charge": "1"}), "charge 1"),
    (charged(info={"total_charge": np.float64(2.0)}), "total_charge 2"),
    (charged(info={"spin_multiplicity": 3}), "spin_multiplicity 3"),
    (charged(initial_charges=[0.6, 0.6, -0.2]), "initial charges add up to 1"),
    (charged(initial_magnetic_moments=[0, 0, 1.0]), "initial magnetic moments add up to 1"),
]
USUAL = [
    charged(),
    charged(info={"charge": 0, "multiplicity": 1, "charge0": 1}),
    charged(info={"charge": "unknown"}),
    charged(info={"charge": [0.4, 0.4, -0.8]}),
    charged(info={"charge": float("nan")}),
    charged(initial_charges=[0.42, 0.42, -0.83]),
]


@pytest.mark.parametrize(("frame", "said"), UNUSUAL, ids=[said for _, said in UNUSUAL])
def test_charge_and_unpaired_electrons_are_warned_of_once(toy, caplog, frame, said):
    predict(toy, [*USUAL, frame, frame])
    assert [record.getMessage() for record in caplog.records] == [
        f"2 of 8 frames are not neutral (frame 6: {said}): the model knows neutral structures without unpaired "
        "electrons only, and answers as for such a one"
    ]
    caplog.clear()
    calculator = TlmcCalculator(toy)
    for k in range(3):
        moved = frame.copy()
        moved.positions[0, 0] += 0.1 * k
        calculator.get_potential_energy(moved)
    assert len(caplog.records) == 1
    assert f"H2O is not neutral ({said})" in caplog.text


def test_atoms_in_the_hole_below_the_repulsion_are_warned_of_once(ani2xt, caplog):
    pairs = {distance: Atoms("N2", [(0, 0, 0), (0, 0, distance)]) for distance in (0.75, 0.55, 0.3)}
    energies = predict(ani2xt, list(pairs.values())).energies
    assert energies[0] > energies[1] > energies[2]  # what the warning is about
    assert [record.getMessage() for record in caplog.records] == [
        "2 of 3 frames hold atoms too close to each other (frame 1: 0.55 A): closer than 0.6 A the descriptor hardly "
        "sees a neighbour, and energies fall instead of rising"
    ]
    caplog.clear()
    calculator = TlmcCalculator(ani2xt)
    for frame in pairs.values():
        calculator.get_potential_energy(frame)
    assert [record.getMessage()[:28] for record in caplog.records] == ["N2 holds atoms 0.55 A apart:"]


def test_neutral_frames_are_silent(toy, caplog):
    predict(toy, USUAL)
    assert not caplog.records


@pytest.mark.parametrize("name", ["gpu", "mps", "cuda:77", ""])
def test_a_device_that_is_not_there_is_named(toy, name):
    for ask in (lambda: TlmcCalculator(toy, name), lambda: predict(toy, [METHANE], device=name)):
        with pytest.raises(ConfigError, match="must be cpu, cuda or cuda:N, got|device 'cuda:77' is not there"):
            ask()


def test_the_processor_is_the_default(toy):
    assert TlmcCalculator(toy).device == TlmcCalculator(toy, "cpu").device == torch.device("cpu")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device here")
@pytest.mark.parametrize("richer", [False, True])
def test_a_gpu_gives_the_same_to_rounding(toy, richer):
    frames = [ethanol(), short_cell(), METHANE]
    model = toy
    if richer:
        model = enrich(toy, fit_enrichment(frames, "soap", {"r_cut": 4.0, "n_max": 3, "l_max": 2}))
        generator = torch.Generator().manual_seed(1)
        for first, *_ in model.networks.values():
            own = first.weight[:, toy.n_columns :]
            own.copy_(0.1 * torch.randn(own.shape, generator=generator, dtype=own.dtype))
    host, gpu = predict(model, frames), predict(model, frames, device="cuda")
    np.testing.assert_allclose(gpu.energies, host.energies, rtol=0, atol=1e-9)
    for ours, theirs in zip(gpu.forces, host.forces, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-9)
    np.testing.assert_allclose(gpu.stresses[1], host.stresses[1], rtol=0, atol=1e-11)
    calculator = TlmcCalculator(model, device="cuda")
    moved = short_cell()
    for k in range(3):  # the kept neighbours, too
        moved.rattle(0.01, seed=k)
        np.testing.assert_allclose(calculator.get_forces(moved), predict(model, [moved]).forces[0], rtol=0, atol=1e-9)
    single = predict(model.to(torch.float32), frames, device="cuda")
    np.testing.assert_allclose(single.forces[1], host.forces[1], rtol=0, atol=1e-4)
