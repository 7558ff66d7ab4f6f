from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import ase.io
import numpy as np
import pytest
from ase import Atoms
from ase.build import molecule
from ase.calculators.singlepoint import SinglePointCalculator
from ase.stress import full_3x3_to_voigt_6_stress, voigt_6_to_full_3x3_stress
from ase.units import Bohr, Hartree
from scipy.spatial.transform import Rotation

from helpers.argon import argon, labelled
from tlmc.data.checks import check_dataset, require_crystals
from tlmc.data.dataset import Dataset
from tlmc.data.loading import dataset_from_frames, load_dataset
from tlmc.errors import DataError


@pytest.fixture
def frames() -> list[Atoms]:
    return argon(3)


def set_energy(value: float) -> Callable[[list[Atoms]], None]:
    def change(frames: list[Atoms]) -> None:
        frames[1].calc.results["energy"] = value

    return change


def set_force(value: float) -> Callable[[list[Atoms]], None]:
    def change(frames: list[Atoms]) -> None:
        for frame in frames[1:]:
            frame.calc.results["forces"][2, 1] = value

    return change


def all_forces(factor: float) -> Callable[[list[Atoms]], None]:
    def change(frames: list[Atoms]) -> None:
        for frame in frames:
            frame.calc.results["forces"] = frame.calc.results["forces"] * factor

    return change


def overlap(frames: list[Atoms]) -> None:
    frames[1].positions[3] = frames[1].positions[1] + [0.1, 0, 0]


def overlap_with_an_image(frames: list[Atoms]) -> None:
    frames[1].positions[0] = [0.05, 0.0, 0.0]
    frames[1].positions[3] = [5.25, 0.0, 0.0]


def set_position(frames: list[Atoms]) -> None:
    frames[2].positions[1, 0] = np.inf


def no_vector(frames: list[Atoms]) -> None:
    for frame in frames[1:]:
        frame.cell[2] = 0


def flat_cell(frames: list[Atoms]) -> None:
    frames[1].cell[2] = frames[1].cell[0] + frames[1].cell[1]


def flat_slab(frames: list[Atoms]) -> None:
    frames[1].pbc = (True, True, False)
    frames[1].cell[1] = 2 * frames[1].cell[0]


def no_atoms(frames: list[Atoms]) -> None:
    frames[2] = labelled(Atoms(), 0.0, np.zeros((0, 3)))


def in_picometres(frames: list[Atoms]) -> None:
    for frame in frames:
        frame.positions *= 100
        frame.set_cell(100 * frame.cell.array)


def other_label(frames: list[Atoms]) -> None:
    frames[2] = labelled(Atoms(frames[0]), frames[0].calc.results["energy"] + 0.2, frames[0].calc.results["forces"])


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (no_atoms, "frame 2 has no atoms$"),
        (set_energy(np.nan), "frame 1 has a value that is not finite: energy is nan$"),
        (
            set_force(np.inf),
            r"frame 1 has a value that is not finite: forces of atom 2 \(Ar\) is .*inf.* \(and 1 more frame\)$",
        ),
        (set_position, r"frame 2 has a value that is not finite: position of atom 1 \(Ar\) is \[ *inf "),
        (no_vector, r"frame 1 is periodic along c but has no cell vector there \(and 1 more frame\)$"),
        (flat_cell, r"frame 1 has a cell of zero volume, or nearly: .* A\^3 for 4 atoms$"),
        (flat_slab, r"frame 1 has a cell of zero volume, or nearly: .* A\^3 for 4 atoms$"),
        (overlap, r"frame 1 has overlapping atoms: 1 \(Ar\) and 3 \(Ar\) are 0.100 A apart$"),
        (
            overlap_with_an_image,
            r"frame 1 has overlapping atoms: 0 \(Ar\) and 3 \(Ar\), an image in a neighbouring cell are 0.100 A apart$",
        ),
        (
            set_energy(-1e6),
            "frame 1 has -250000 eV/atom, but the energy must lie within -17761 and 100; units must be given",
        ),
        (set_energy(1e4), "frame 1 has 2500 eV/atom, but the energy must lie within"),
        (set_energy(-100.0), "frame 1 has -25 eV/atom, but other frames of Ar have about -0.0"),
        (
            set_force(321.0),
            r"frame 1 has a force of 321 eV/A on atom 2 \(Ar\); forces must be in eV/A.* \(and 1 more frame\)$",
        ),
        (
            all_forces(500.0),
            r"frame 0 has a force of .* eV/A on atom \d, the median of all frames is \d\d.*; forces must be in",
        ),
        (
            all_forces(0.0),
            r"frame 0 has forces that are all exactly 0 eV/A, as have all frames: .* \(and 2 more frames\)$",
        ),
        (in_picometres, r"frame 0 \(Ar4\): no atom of any frame has a neighbour within 6 A: .* \(and 2 more frames\)$"),
        (other_label, "frame 2 has the geometry of frame 0 but another energy, by 0.05 eV/atom$"),
    ],
)
def test_frames_that_cannot_be_used(
    tmp_path: Path, frames: list[Atoms], change: Callable[[list[Atoms]], None], sentence: str
) -> None:
    change(frames)
    for frame in frames:
        # a calculator whose atoms have moved is not written
        frame.calc.atoms = frame.copy()
    ase.io.write(tmp_path / "a.traj", frames)
    with pytest.raises(DataError, match=rf"{tmp_path}/a.traj: {sentence}"):
        load_dataset(tmp_path / "a.traj")


def test_energies_that_are_all_zero_are_no_labels(frames: list[Atoms]) -> None:
    for frame in frames:
        frame.calc.results["energy"] = 0.0
    with pytest.raises(DataError, match="frame 0 has an energy of exactly 0 eV, as have all: are they labels"):
        dataset_from_frames(frames, name="a")


@pytest.mark.parametrize(("factor", "ratio"), [(-1.0, "-0.8"), (Bohr / Hartree, "4[0-9]"), (23.06, "0.03")])
def test_forces_that_do_other_work_than_the_energies_say(factor: float, ratio: str) -> None:
    frames = argon(30)
    dataset_from_frames(frames, name="right")
    all_forces(factor)(frames)
    with pytest.raises(
        DataError, match=rf"differ by .* eV, but moving the atoms .*ratio {ratio}.* pairs, must be near 1"
    ):
        dataset_from_frames(frames, name="wrong")


def test_all_electron_energies_are_possible() -> None:
    # total energies of free atoms, Hartree: the deepest there are for these elements
    for symbol, energy in {"H": -0.5, "C": -37.85, "Cl": -460.15, "Cu": -1640.4, "I": -7110.0}.items():
        apart = labelled(Atoms(f"{symbol}2", [[0, 0, 0], [0, 0, 9]]), 2 * energy, np.zeros((2, 3)))
        dataset = dataset_from_frames([apart], name=symbol, units="Hartree/Bohr")
        assert dataset.energies[0] == pytest.approx(2 * energy * Hartree)


def test_a_data_set_made_by_hand_is_checked_too(frames: list[Atoms]) -> None:
    good = dataset_from_frames(frames, name="a")
    short = Dataset(good.frames, good.energies[:2], good.forces, good.stresses, "a", "a", "", "", good.frame_numbers)
    with pytest.raises(DataError, match="a: 3 frames need as many energies, got 2"):
        check_dataset(short)
    with pytest.raises(DataError, match="memory: holds no frames"):
        check_dataset(good.subset([]))
    with pytest.raises(DataError, match="memory: holds no frames"):
        dataset_from_frames([], name="a")


def turned(frame: Atoms, mirrored: bool = False) -> Atoms:
    """Return the same crystal turned, moved, wrapped and with its atoms in another order, labels and all."""
    results = frame.calc.results
    rotation = Rotation.from_euler("zyx", [20, 50, 110], degrees=True).as_matrix()
    rotation = -rotation if mirrored else rotation
    order = [2, 0, 3, 1]
    copy = Atoms(
        frame.symbols[order],
        (frame.positions[order] + [0.3, 0.1, 2.0]) @ rotation.T,
        cell=frame.cell.array @ rotation.T,
        pbc=True,
    )
    copy.wrap()
    stress = rotation @ voigt_6_to_full_3x3_stress(results["stress"]) @ rotation.T
    forces = results["forces"][order] @ rotation.T
    return labelled(copy, results["energy"], forces, stress=full_3x3_to_voigt_6_stress(stress))


def strong(n_frames: int) -> list[Atoms]:
    """Argon crystals with forces as large as those of molecules, so that a conflict is one."""
    frames = argon(n_frames)
    for frame in frames:
        results = frame.calc.results
        labelled(frame, results["energy"] * 100, results["forces"] * 100, stress=results["stress"] * 100)
    return frames


@pytest.mark.parametrize("mirrored", [False, True])
def test_a_copy_that_is_turned_is_no_conflict(mirrored: bool) -> None:
    frames = strong(3)
    dataset = dataset_from_frames([*frames, turned(frames[1], mirrored)], name="a")
    assert dataset.duplicates.tolist() == [0, 1, 2, 1]


@pytest.mark.parametrize("copy", [lambda frame: frame.copy(), turned])
@pytest.mark.parametrize(
    ("key", "change", "sentence"),
    [
        ("forces", lambda forces: forces * 1.1, "other forces, by "),
        ("forces", lambda forces: -forces, "other forces, by "),
        ("forces", lambda forces: forces[::-1], "other forces, by "),
        ("forces", lambda forces: forces + np.eye(4, 3) * 0.02, "other forces, by "),
        ("stress", lambda stress: stress * 1.1, "another stress, by "),
        ("stress", lambda stress: -stress, "another stress, by "),
        ("energy", lambda energy: energy + 0.2, "another energy, by 0.05 eV/atom"),
    ],
)
def test_equal_geometries_with_other_labels_are_named(
    copy: Callable[[Atoms], Atoms], key: str, change: Callable[[object], object], sentence: str
) -> None:
    frames = strong(3)
    again = copy(frames[1])
    results = {name: np.copy(value) for name, value in (again.calc or frames[1].calc).results.items()}
    again.calc = SinglePointCalculator(again, **results | {key: change(results[key])})
    with pytest.raises(DataError, match=f"a.traj: frame 3 has the geometry of frame 1 but {sentence}"):
        dataset_from_frames([*frames, again], name="a", source="a.traj")


def test_noise_of_a_repeated_calculation_is_no_conflict() -> None:
    frames = strong(3)
    results = frames[1].calc.results
    noise = np.random.default_rng(0).normal(scale=1e-4, size=(4, 3))
    again = labelled(frames[1].copy(), results["energy"] + 1e-4, results["forces"] + noise)
    assert len(dataset_from_frames([*frames, again], name="a")) == 4


# --- charge and spin -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("neutral", "ion"),
    [
        ({"charge": 0, "spin": 1}, {"charge": 1, "spin": 2}),
        ({}, {"charge": -1}),
        ({"total_charge": 0.0}, {"total_charge": 1.0}),
        ({"Charge": 0}, {"charge": 2}),
        ({"system charge": 0}, {"systemCharge": 2}),
        ({"spin": 1}, {"spin": 1, "charge": 1}),
        ({"multiplicity": 1}, {"multiplicity": 3}),
        ({"charge": 0, "spin_multiplicity": 1}, {"charge": 0, "spin_multiplicity": 3}),
        ({}, {"initial_charges": 1.0}),
        ({"initial_magmoms": 0.0}, {"initial_magmoms": 1.0}),
    ],
)
def test_charge_states_that_differ_are_named(
    frames: list[Atoms], caplog: pytest.LogCaptureFixture, neutral: dict[str, float], ion: dict[str, float]
) -> None:
    def say(frame: Atoms, state: dict[str, float]) -> None:
        for key, value in state.items():
            if key.startswith("initial"):
                frame.set_array(key, np.array([value, 0, 0, 0]))
            else:
                frame.info[key] = value

    for frame, state in zip(frames, (neutral, ion, ion), strict=True):
        say(frame, state)
    dataset = dataset_from_frames(frames, name="a", source="a.traj")
    assert "a.traj: CHARGE STATES DIFFER between frames: " in caplog.text
    assert "in frame 1, 2 of 3 frames are in another than the first, among them frames of Ar4" in caplog.text
    assert len({*map(str, dataset.charge_states)}) == 2
    again = labelled(Atoms(frames[0]), frames[0].calc.results["energy"] + 1, frames[0].calc.results["forces"])
    again.info = {}
    say(again, ion)
    with pytest.raises(
        DataError,
        match=r"a.traj: frame 3 has the geometry of frame 0 in another charge state \(.*; there .*\): a mod",
    ):
        dataset_from_frames([*frames, again], name="a", source="a.traj")


def test_guesses_per_atom_are_no_charge_states(frames: list[Atoms], caplog: pytest.LogCaptureFixture) -> None:
    for k, frame in enumerate(frames):
        frame.set_initial_charges([0.3, -0.3, 0.2, -0.2 + 0.001 * k])
        frame.set_initial_magnetic_moments([1, -1, 0, 0.1 * k])
    results = frames[0].calc.results
    again = labelled(frames[0].copy(), results["energy"], results["forces"])
    dataset_from_frames(frames, name="a")
    assert not caplog.text
    again.set_initial_magnetic_moments([1, 1, 1, 1])
    dataset_from_frames([*frames, again], name="a")
    assert "CHARGE STATES DIFFER" in caplog.text
    assert "1 of 4 frames repeat the geometry" in caplog.text


@pytest.mark.parametrize("info", [{"charge": 0}, {"charge": 1, "spin": 2}, {"charge": "none"}, {"charge": np.zeros(4)}])
def test_one_charge_state_is_nothing_to_say(
    frames: list[Atoms], caplog: pytest.LogCaptureFixture, info: dict[str, object]
) -> None:
    for frame in frames:
        frame.info |= info
    dataset_from_frames(frames, name="a")
    assert not caplog.text


def test_copies_are_logged_and_kept(frames: list[Atoms], caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "tlmc.data.checks"):
        dataset = dataset_from_frames([*frames, frames[1], frames[1]], name="a", source="a.traj")
    assert len(dataset) == 5
    assert "a.traj: 2 of 5 frames repeat the geometry of another, the first is frame 3" in caplog.text


def test_a_task_for_crystals_names_the_frame_that_is_none(frames: list[Atoms]) -> None:
    gas = labelled(molecule("H2O"), -14.0, np.zeros((3, 3)))
    boxed = labelled(molecule("H2O", vacuum=10, pbc=True), -14.0, np.zeros((3, 3)))
    dataset = dataset_from_frames([frames[0], boxed, gas, frames[1]], name="a", source="a.traj")
    require_crystals(dataset.crystals())
    with pytest.raises(
        DataError,
        match=r"a.traj: frame 1 is no crystal \(periodic along abc, \d+ A\^3 per atom\); .* \(and 1 more frame\)$",
    ):
        require_crystals(dataset)
    with pytest.raises(DataError, match=r"a.traj: frame 2 is no crystal \(periodic along nothing, no cell\)"):
        require_crystals(dataset.subset([0, 2]))
