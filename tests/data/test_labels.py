from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import ase.db
import ase.io
import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk, molecule
from ase.stress import voigt_6_to_full_3x3_stress
from ase.units import Bohr, GPa, Hartree, kcal, kJ, mol
from numpy.typing import NDArray

from helpers.argon import argon, labelled
from tlmc.data.loading import dataset_from_frames, load_dataset
from tlmc.errors import DataError
from tlmc.units import parse_unit


@pytest.fixture
def frames() -> list[Atoms]:
    return argon(4)


def bare(frames: list[Atoms], **stress: Callable[[Atoms], object]) -> list[Atoms]:
    """Return the frames with energy and forces of a calculator, and in info what is asked for."""
    changed = []
    for frame in frames:
        results = frame.calc.results
        copy = labelled(Atoms(frame), results["energy"], results["forces"])
        copy.info = {key: value(frame) for key, value in stress.items()}
        changed.append(copy)
    return changed


def matrix(frame: Atoms) -> NDArray[np.float64]:
    return voigt_6_to_full_3x3_stress(frame.calc.results["stress"])


# --- stress ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "value", "unit"),
    [
        ("stress", lambda frame: frame.calc.results["stress"], None),
        ("stress", matrix, None),
        ("stress", lambda frame: matrix(frame).ravel(), None),
        ("Stress", lambda frame: " ".join(map(str, matrix(frame).ravel())), None),
        ("REF_stress", matrix, None),
        ("dft_stress", lambda frame: matrix(frame).tolist(), None),
        ("virial", lambda frame: -matrix(frame) * frame.get_volume(), None),
        ("virials", lambda frame: -frame.calc.results["stress"] * frame.get_volume(), None),
        ("REF_virial", lambda frame: (-matrix(frame) * frame.get_volume()).ravel(), None),
        ("stress", lambda frame: matrix(frame) / GPa, {"stress-unit": "GPa"}),
        ("stress", lambda frame: matrix(frame) / GPa * 10, {"stress_unit": "kbar"}),
        ("stress", lambda frame: matrix(frame) / GPa * 10, {"stress_units": "kB"}),
        ("REF_stress", lambda frame: matrix(frame) / GPa * 1000, {"REF_stress_unit": "MPa"}),
        ("stress", matrix, {"stress-unit": "eV/A^3"}),
        ("stress", matrix, {"stressUnit": "eV/Angstrom**3"}),
        ("stress", lambda frame: matrix(frame) / Hartree * Bohr**3, {"unit_of_stress": "Ha/Bohr^3"}),
        ("virial", lambda frame: -matrix(frame) * frame.get_volume(), {"virial-unit": "eV"}),
        ("virial", lambda frame: -matrix(frame) * frame.get_volume() / Hartree, {"virial_unit": "Hartree"}),
    ],
)
def test_stress_of_any_form_is_found(
    frames: list[Atoms], key: str, value: Callable[[Atoms], object], unit: dict[str, str] | None
) -> None:
    changed = bare(frames, **{key: value})
    for frame in changed:
        frame.info |= unit or {}
    dataset = dataset_from_frames(changed, name="a")
    for k, frame in enumerate(frames):
        np.testing.assert_allclose(dataset.stresses[k], frame.calc.results["stress"], rtol=1e-9)
        assert dataset.energies[k] == frame.calc.results["energy"]
        assert not dataset.frames[k].info


@pytest.mark.parametrize(
    ("key", "form"),
    [
        ("stress", lambda frame: f'stress="{words(frame.calc.results["stress"])}"'),
        ("stress", lambda frame: f'stress="{words(matrix(frame).ravel())}"'),
        ("virial", lambda frame: f'virial="{words(-matrix(frame).ravel() * frame.get_volume())}"'),
        ("virial", lambda frame: f'virial="{words(-frame.calc.results["stress"] * frame.get_volume())}"'),
        ("REF_virial", lambda frame: f'REF_virial="{words(-matrix(frame).ravel() * frame.get_volume())}"'),
        ("Stress", lambda frame: f'Stress="{words(matrix(frame).ravel() / GPa)}" Stress-unit=gpa'),
    ],
)
def test_stress_in_the_header_of_a_file(
    tmp_path: Path, frames: list[Atoms], key: str, form: Callable[[Atoms], str]
) -> None:
    ase.io.write(tmp_path / "a.extxyz", bare(frames))
    lines = (tmp_path / "a.extxyz").read_text().splitlines()
    for k, frame in enumerate(frames):
        lines[6 * k + 1] += " " + form(frame)
    (tmp_path / "a.extxyz").write_text("\n".join(lines))
    for dataset in (load_dataset(tmp_path / "a.extxyz"), load_dataset(tmp_path / "a.extxyz", stress_key=key)):
        for k, frame in enumerate(frames):
            np.testing.assert_allclose(dataset.stresses[k], frame.calc.results["stress"], rtol=1e-6)


def words(values: NDArray[np.float64]) -> str:
    return " ".join(f"{value:.12g}" for value in values)


@pytest.mark.parametrize("key", ["stress", "virial"])
@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ("a b c", "is not numeric: 'a b c'"),
        (True, "is not numeric: True"),
        (np.arange(5.0), r"must have shape \(6,\) or \(3, 3\), got \(5,\)"),
        (np.ones((2, 3)), r"must have shape \(6,\) or \(3, 3\), got \(2, 3\)"),
        (np.array([1, 2, np.nan, 0, 0, 0]), "has a value that is not finite: nan"),
        (np.array([[1, 2, 3], [2, 4, 5], [3, 9, 6.0]]), "is not symmetric: yz is 5, zy is 9"),
    ],
)
def test_a_bad_stress_blocks_nothing_unless_it_is_asked_for(
    tmp_path: Path, frames: list[Atoms], caplog: pytest.LogCaptureFixture, key: str, value: object, reason: str
) -> None:
    for change in ("info", "file"):
        changed = bare(frames, **{key: matrix})
        if change == "info":
            changed[1].info[key] = changed[2].info[key] = value
            source = "memory"
        else:
            ase.io.write(tmp_path / "a.extxyz", bare(frames))
            lines = (tmp_path / "a.extxyz").read_text().splitlines()
            shown = value if isinstance(value, (str, bool)) else words(np.asarray(value).ravel())
            for k, frame in enumerate(frames):
                good = words(matrix(frame).ravel())
                lines[6 * k + 1] += f' {key}="{shown if k in (1, 2) else good}"'
            if value is True or np.shape(value) == (2, 3):
                continue
            (tmp_path / "a.extxyz").write_text("\n".join(lines))
            source = str(tmp_path / "a.extxyz")

        def read(change: str = change, changed: list[Atoms] = changed, **keys: str) -> object:
            return (
                dataset_from_frames(changed, name="a", **keys)
                if change == "info"
                else load_dataset(tmp_path / "a.extxyz", **keys)
            )

        caplog.clear()
        dataset = read()
        assert [stress is None for stress in dataset.stresses] == [False, True, True, False]
        (message,) = [record.message for record in caplog.records if record.levelno > logging.INFO]
        assert message.startswith(f"{source}: frame 1: stress '{key}' ")
        assert message.endswith("(and 1 more frame): left out, energies and forces are kept")
        named = read(energy_key="energy", forces_key="forces")
        assert named.energies.tolist() == dataset.energies.tolist()
        for keys in ({}, {"energy_key": "energy", "forces_key": "forces"}):
            with pytest.raises(DataError, match=rf"frame 1 \(Ar4\): stress '{key}' {reason}"):
                read(stress_key=key, **keys)


def test_stress_key_alone_goes_with_labels_found(frames: list[Atoms]) -> None:
    for frame in frames:
        frame.info["mine"] = frame.calc.results["stress"] * 2
    dataset = dataset_from_frames(frames, name="a", stress_key="mine")
    for k, frame in enumerate(frames):
        np.testing.assert_array_equal(dataset.stresses[k], frame.calc.results["stress"] * 2)


def test_stress_and_virial_must_agree(frames: list[Atoms], caplog: pytest.LogCaptureFixture) -> None:
    right = {"stress": lambda frame: np.eye(3), "virial": lambda frame: -np.eye(3) * frame.get_volume()}
    dataset = dataset_from_frames(bare(frames, **right), name="a")
    assert not caplog.text
    assert dataset.stresses[0].tolist() == [1, 1, 1, 0, 0, 0]
    wrong = bare(frames, **right | {"virial": lambda frame: np.eye(3) * frame.get_volume()})
    assert dataset_from_frames(wrong, name="a").stresses == (None,) * 4
    assert "frame 0: stress 'stress' and 'virial' contradict each other, by 2 eV/A^3 (and 3 more frames)" in caplog.text
    assert dataset_from_frames(wrong, name="a", stress_key="virial").stresses[0].tolist() == [-1, -1, -1, 0, 0, 0]


def test_a_stress_of_another_method_is_not_taken(frames: list[Atoms], caplog: pytest.LogCaptureFixture) -> None:
    changed = bare(frames, REF_stress=matrix, REF_energy=lambda frame: -1.0)
    dataset = dataset_from_frames(changed, name="a")
    assert dataset.stresses == (None,) * 4
    named = bare(frames, REF_stress=matrix)
    with caplog.at_level(logging.INFO):
        assert dataset_from_frames(named, name="a", energy_key="energy", forces_key="forces").stresses == (None,) * 4
    assert "memory: REF_stress not read: name stress_key (--stress-key)" in caplog.text


def test_a_virial_in_a_flat_cell_is_no_division_by_zero(frames: list[Atoms]) -> None:
    changed = bare(frames, virial=lambda frame: np.eye(3))
    changed[1].cell[2] = changed[1].cell[0] + changed[1].cell[1]
    with pytest.raises(DataError, match="memory: frame 1 has a cell of zero volume"):
        dataset_from_frames(changed, name="a")


def test_the_stress_of_a_molecule_is_dropped_with_a_note(caplog: pytest.LogCaptureFixture) -> None:
    water = [labelled(molecule("H2O"), -14.0 - k, np.full((3, 3), 0.1 * k), stress=np.ones(6)) for k in range(1, 3)]
    water[1].positions[0, 2] += 0.1
    assert dataset_from_frames(water, name="a", source="a.traj").stresses == (None, None)
    assert "a.traj: frame 0: stress 'stress' of a frame that is not periodic means nothing (and 1 more" in caplog.text


# --- units -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "powers", "value"),
    [
        ("eV", (1, 0), 1.0),
        ("Ha", (1, 0), Hartree),
        ("kcal/mol", (1, 0), kcal / mol),
        ("kcal mol^-1", (1, 0), kcal / mol),
        ("kJ/mol", (1, 0), kJ / mol),
        ("Ry", (1, 0), Hartree / 2),
        ("a.u.", (1, -1), Hartree / Bohr),
        ("eV/Å", (1, -1), 1.0),
        ("Hartree/bohr", (1, -1), Hartree / Bohr),
        ("kcal/mol/A", (1, -1), kcal / mol),
        ("eV*Angstrom**-1", (1, -1), 1.0),
        ("GPa", (1, -3), GPa),
        ("eV/(Ang^3)", (1, -3), 1.0),
        ("Bohr", (0, 1), Bohr),
        ("nm", (0, 1), 10.0),
        ("eV/atom", (1, 0), None),
        ("eV", (1, -1), None),
        ("GPa", (1, 0), None),
        ("furlong", (0, 1), None),
        ("", (1, 0), None),
        ("eV-", (1, 0), None),
    ],
)
def test_units_in_words(text: str, powers: tuple[int, int], value: float | None) -> None:
    assert parse_unit(text, *powers) == (None if value is None else pytest.approx(value, rel=1e-6))


@pytest.mark.parametrize(
    ("said", "energy", "length"),
    [
        ({"energy-unit": "eV", "force-unit": "eV/A"}, 1.0, 1.0),
        ({"energy_unit": "Hartree", "forces_unit": "Ha/Bohr"}, Hartree, Bohr),
        ({"energy_unit": "Hartree", "force_unit": "Hartree/Angstrom"}, Hartree, 1.0),
        ({"units": "Hartree/Bohr"}, Hartree, Bohr),
        ({"units": "kcal/mol"}, kcal / mol, 1.0),
        ({"units": "kJ/mol, kJ/mol/A"}, kJ / mol, 1.0),
        ({"energy-units": "kcal/mol"}, kcal / mol, 1.0),
        ({"units": "metal", "time_unit": "fs"}, 1.0, 1.0),
        ({"unit": "angstrom"}, 1.0, 1.0),
    ],
)
def test_units_that_a_file_says_are_converted(
    frames: list[Atoms], said: dict[str, str], energy: float, length: float
) -> None:
    foreign = [
        labelled(Atoms(frame), frame.calc.results["energy"] / energy, frame.calc.results["forces"] / energy * length)
        for frame in frames
    ]
    for frame in foreign:
        frame.info |= said
    dataset = dataset_from_frames(foreign, name="a")
    for k, frame in enumerate(frames):
        assert dataset.energies[k] == pytest.approx(frame.calc.results["energy"], rel=1e-9)
        np.testing.assert_allclose(dataset.forces[k], frame.calc.results["forces"], rtol=1e-9)
        # what is in eV now does not say otherwise
        assert not {*dataset.frames[k].info} - {"time_unit"}


def test_positions_in_bohr_are_converted_if_the_file_says_so(frames: list[Atoms]) -> None:
    foreign = []
    for frame in frames:
        results = frame.calc.results
        atoms = Atoms(
            frame.symbols, frame.positions / Bohr, cell=frame.cell / Bohr, pbc=True, info={"length_unit": "bohr"}
        )
        foreign.append(labelled(atoms, results["energy"], results["forces"], stress=results["stress"]))
    dataset = dataset_from_frames(foreign, name="a")
    assert dataset.units == "eV, eV/Angstrom; positions in bohr"
    for k, frame in enumerate(frames):
        np.testing.assert_allclose(dataset.frames[k].positions, frame.positions, rtol=1e-9)
        np.testing.assert_allclose(dataset.frames[k].cell.array, frame.cell.array, rtol=1e-9)


@pytest.mark.parametrize(
    ("said", "units", "sentence"),
    [
        ({"energy-unit": "erg"}, None, "energy-unit = 'erg' is no unit of energy that is known"),
        ({"units": "lj"}, None, "units = 'lj' is no unit of labels that is known"),
        ({"force_unit": "eV"}, None, "force_unit = 'eV' is no unit of forces that is known"),
        ({"stress-unit": "eV"}, None, "stress-unit = 'eV' is no unit of stress that is known"),
        ({"energy_unit": "Hartree"}, None, "energy_unit = 'Hartree', but nothing says the unit of the forces"),
        ({"force_unit": "Ha/Bohr"}, None, "force_unit = 'Ha/Bohr', but nothing says the unit of the energies"),
        ({"units": "atomic"}, None, "units = 'atomic' does not say whether positions are in Bohr"),
        ({"energy-unit": "eV"}, "kcal/mol", r"energy-unit = 'eV' contradicts units = 'kcal/mol' \(--units\)"),
        ({"energy-unit": "Hartree"}, "eV", r"energy-unit = 'Hartree' contradicts units = 'eV' \(--units\)"),
        ({"units": "eV", "energy_unit": "Ha"}, None, "units = 'eV' and energy_unit = 'Ha' contradict"),
    ],
)
def test_units_unknown_or_contradicting(
    frames: list[Atoms], said: dict[str, str], units: str | None, sentence: str
) -> None:
    frames[2].info = said
    with pytest.raises(DataError, match=f"a.xyz: frame 2: {sentence}"):
        dataset_from_frames(frames, name="a", source="a.xyz", units=units)


# --- rows of databases -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.db", "a.json"])
@pytest.mark.parametrize(
    ("energy", "forces", "warned"),
    [("dft_energy", "dft_forces", False), ("energy_dft", "forces", True), ("Energy_REF", "Force_ref", False)],
)
def test_labels_in_key_value_pairs_and_data_are_found(
    tmp_path: Path,
    frames: list[Atoms],
    caplog: pytest.LogCaptureFixture,
    name: str,
    energy: str,
    forces: str,
    warned: bool,
) -> None:
    with ase.db.connect(tmp_path / name) as database:
        for k, frame in enumerate(frames):
            results = frame.calc.results
            data = {forces: results["forces"], "virial": -matrix(frame) * frame.get_volume()}
            database.write(frame.copy(), key_value_pairs={energy: results["energy"], "group": f"g{k}"}, data=data)
    keys = {"energy_key": energy, "forces_key": forces, "stress_key": "virial"}
    for dataset in (load_dataset(tmp_path / name), load_dataset(tmp_path / name, **keys)):
        for k, frame in enumerate(frames):
            assert dataset.energies[k] == pytest.approx(frame.calc.results["energy"], rel=1e-12)
            np.testing.assert_allclose(dataset.forces[k], frame.calc.results["forces"], rtol=1e-9)
            np.testing.assert_allclose(dataset.stresses[k], frame.calc.results["stress"], rtol=1e-9)
            assert dataset.frames[k].info == {"group": f"g{k}"}
    assert ("if they are not of one method" in caplog.text) == warned
    # the same rows as ASE hands them out when asked for everything
    rows = [row.toatoms(add_additional_information=True) for row in ase.db.connect(tmp_path / name).select()]
    assert dataset_from_frames(rows, name="a", **keys) == dataset


# --- frames that are no structures to learn from --------------------------------------------------------------------


def with_atoms(frames: list[Atoms], **info: object) -> list[Atoms]:
    """Put two isolated atoms, with an energy only, before the frames and one between them."""
    atoms = [Atoms(symbol, info={"REF_energy": energy} | info) for symbol, energy in (("Ne", -2.0), ("Ar", -1.0))]
    rest = []
    for frame in frames:
        copy = frame.copy()
        copy.info["REF_energy"] = frame.calc.results["energy"]
        copy.arrays["REF_forces"] = frame.calc.results["forces"]
        rest.append(copy)
    again = atoms[1].copy()
    again.info["REF_energy"] = -1.5
    return [*atoms, *rest[:2], again, *rest[2:]]


@pytest.mark.parametrize(
    ("info", "change"),
    [
        ({"config_type": "IsolatedAtom"}, lambda frame: None),
        ({"config_type": "isolated_atom"}, lambda frame: frame.set_cell(np.eye(3) * 5) or frame.set_pbc(True)),
        ({}, lambda frame: None),
        ({"config_type": "single"}, lambda frame: frame.set_cell(np.eye(3) * 20) or frame.set_pbc(True)),
        ({}, lambda frame: frame.set_cell(np.eye(3) * 3)),
    ],
)
def test_isolated_atoms_are_energies_of_free_atoms(
    frames: list[Atoms], caplog: pytest.LogCaptureFixture, info: dict[str, str], change: Callable[[Atoms], object]
) -> None:
    mixed = with_atoms(frames, **info)
    for frame in mixed:
        if len(frame) == 1:
            change(frame)
    dataset = dataset_from_frames(mixed, name="a", source="a.xyz")
    assert dataset.frame_numbers.tolist() == [2, 3, 5, 6]
    assert [len(frame) for frame in dataset.frames] == [4] * 4
    assert dict(dataset.free_atoms) == {"Ne": -2.0, "Ar": -1.5}
    assert dict(dataset.subset([1]).free_atoms) == {"Ne": -2.0, "Ar": -1.5}
    assert "a.xyz: frames 1 and 4 are both isolated Ar atoms, with -1 and -1.5 eV: the lower energy" in caplog.text
    assert "a.xyz: frame 0 (and 2 more frames): isolated atoms, taken as energies of free atoms (Ne -2" in caplog.text
    plain = dataset_from_frames([frame for frame in mixed if len(frame) > 1], name="a")
    assert dict(plain.free_atoms) == {}
    assert plain.energies.tolist() == dataset.energies.tolist()
    assert plain.hash != dataset.hash
    assert dataset.subset([0]) != dataset.subset([1])


def test_isolated_atoms_in_other_units(frames: list[Atoms]) -> None:
    mixed = with_atoms(frames)
    for frame in mixed:
        frame.info |= {"energy_unit": "kcal/mol"}
    assert dataset_from_frames(mixed, name="a").free_atoms["Ne"] == pytest.approx(-2.0 * kcal / mol)


def test_atoms_without_energy_are_said_and_bad_ones_refused(
    frames: list[Atoms], caplog: pytest.LogCaptureFixture
) -> None:
    mixed = with_atoms(frames)
    del mixed[0].info["REF_energy"]
    assert dict(dataset_from_frames(mixed, name="a").free_atoms) == {"Ar": -1.5}
    assert "frame 0, an isolated Ne atom, has no energy 'REF_energy'" in caplog.text
    mixed[0].info["REF_energy"] = np.nan
    with pytest.raises(DataError, match="frame 0, an isolated Ne atom, has an energy of nan"):
        dataset_from_frames(mixed, name="a")


def test_charged_atoms_are_no_free_atoms(frames: list[Atoms], caplog: pytest.LogCaptureFixture) -> None:
    mixed = with_atoms(frames)
    mixed[4].info["charge"] = -1
    assert dict(dataset_from_frames(mixed, name="a").free_atoms) == {"Ne": -2.0, "Ar": -1.0}
    assert "frame 4, an isolated Ar atom, is charged (-1): left out" in caplog.text


def test_isolated_atoms_alone_are_refused(frames: list[Atoms]) -> None:
    with pytest.raises(
        DataError, match=r"a.xyz: holds nothing but isolated atoms \(frame 0 is the first of 2; Ne, Ar\)"
    ):
        dataset_from_frames(with_atoms(frames)[:2], name="a", source="a.xyz")


def test_crystals_of_one_atom_are_no_isolated_atoms() -> None:
    metals = [labelled(bulk("Cu", a=a), -3.5 + a / 10, np.zeros((1, 3))) for a in (3.5, 3.6, 3.7)]
    dataset = dataset_from_frames(metals, name="a")
    assert len(dataset) == 3
    assert dict(dataset.free_atoms) == {}


def test_atoms_in_small_boxes_are_isolated_where_bonds_would_be_far_shorter(frames: list[Atoms]) -> None:
    boxed = [
        labelled(Atoms(symbol, cell=[5.5] * 3, pbc=True), energy, np.zeros((1, 3)))
        for symbol, energy in (("H", -13.0), ("C", -1029.0), ("Cs", -3.0), ("Ar", -4.0))
    ]
    dataset = dataset_from_frames([*boxed, *frames], name="a")
    assert dict(dataset.free_atoms) == {"H": -13.0, "C": -1029.0}
    assert len(dataset) == len(frames) + 2


@pytest.mark.parametrize(
    ("key", "bad", "good"),
    [
        ("scf_converged", False, True),
        ("SCF-converged", "F", "T"),
        ("converged_scf", 0, 1),
        ("electronic_converged", "no", "yes"),
        ("scf_unconverged", True, False),
        ("dft_not_converged", "T", "F"),
        ("SCF", "not converged", "converged"),
        ("dft_scf_status", "UNCONVERGED", "ok"),
    ],
)
def test_frames_that_say_they_did_not_converge_are_left_out(
    frames: list[Atoms], caplog: pytest.LogCaptureFixture, key: str, bad: object, good: object
) -> None:
    for k, frame in enumerate(frames):
        frame.info[key] = bad if k in (1, 2) else good
    dataset = dataset_from_frames(frames, name="a", source="a.xyz")
    assert dataset.frame_numbers.tolist() == [0, 3]
    assert f"a.xyz: frame 1 is left out, its electronic steps did not converge ({key} = {bad}) (and 1 m" in caplog.text
    for frame in frames:
        frame.info[key] = bad
    with pytest.raises(DataError, match=r"frame 0 is left out, .* \(and 3 more frames\): nothing is left"):
        dataset_from_frames(frames, name="a")


@pytest.mark.parametrize(
    "info", [{"converged": False}, {"unconverged": "T"}, {"config_type": "not_converged"}, {"run": "unconverged"}]
)
def test_what_may_be_a_relaxation_is_kept_and_said(
    frames: list[Atoms], caplog: pytest.LogCaptureFixture, info: dict[str, object]
) -> None:
    frames[2].info |= info
    frames[1].info["converged"] = True
    assert len(dataset_from_frames(frames, name="a", source="a.xyz")) == 4
    assert "a.xyz: frame 2 says" in caplog.text
    assert "are its energy and forces converged?" in caplog.text
    assert "frame 1" not in caplog.text
