from __future__ import annotations

import errno
import hashlib
import json
import logging
import pickle
import shutil
import sqlite3
import struct
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import ase
import ase.io
import numpy as np
import pooch
import pytest
from ase import Atoms
from ase.build import bulk, molecule
from ase.calculators.lj import LennardJones
from ase.calculators.singlepoint import SinglePointCalculator
from ase.constraints import FixAtoms
from ase.units import Bohr, Hartree, kcal, mol
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from tlmc import datasets
from tlmc.datasets import (
    Dataset,
    available,
    check_dataset,
    dataset_from_frames,
    duplicate_groups,
    element_counts,
    frame_hash,
    load_dataset,
    read_frames,
    require_crystals,
)
from tlmc.errors import DataError

MIRRORED = (
    "02_acetic_acid",
    "04_ammonia",
    "06_benzene",
    "11_formamide",
    "12_imidazole",
    "14_oxalic_acid_alpha",
    "21_urea",
    "23_succinic_acid",
)


def labelled(frame: Atoms, energy: float, forces: NDArray[np.float64], **others: object) -> Atoms:
    frame.calc = SinglePointCalculator(frame, energy=energy, forces=forces, **others)
    return frame


def argon(n_frames: int, seed: int = 0) -> list[Atoms]:
    """Rattled argon crystals with the labels of a potential, so that energies and forces belong together."""
    rng = np.random.default_rng(seed)
    frames = []
    for _ in range(n_frames):
        frame = bulk("Ar", a=5.3, cubic=True)
        frame.positions += rng.normal(scale=0.1, size=(4, 3))
        frame.calc = LennardJones(sigma=3.4, epsilon=0.0104, rc=10.0, smooth=True)
        energy, forces, stress = frame.get_potential_energy(), frame.get_forces(), frame.get_stress()
        frames.append(labelled(frame, energy, forces, stress=stress))
    return frames


@pytest.fixture
def frames() -> list[Atoms]:
    return argon(3)


@pytest.fixture
def private(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty checkout, cache and no mirror."""
    (tmp_path / "root" / "notebooks").mkdir(parents=True)
    (tmp_path / "root" / "data").mkdir()
    monkeypatch.setenv("TLMC_ROOT", str(tmp_path / "root"))
    monkeypatch.setenv("TLMC_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("TLMC_DATA_DIR", raising=False)
    return tmp_path


# --- reading -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["set.traj", "set.extxyz", "set.xyz", "set.db", "set.json", "set.extxyz.gz", "set.extxyz.xz", "set.xyz.bz2"]
)
def test_labels_survive_every_format(tmp_path: Path, frames: list[Atoms], name: str) -> None:
    path = tmp_path / name
    ase.io.write(path, frames)
    dataset = load_dataset(path)
    assert (dataset.name, dataset.source, dataset.units) == ("set", str(path), "eV, eV/Angstrom")
    assert dataset.frame_numbers.tolist() == [0, 1, 2]
    for k, frame in enumerate(frames):
        read = dataset.frames[k]
        assert read.calc is None
        assert read.pbc.all()
        # text formats keep 8 decimals
        np.testing.assert_allclose(read.positions, frame.positions, atol=1e-8)
        np.testing.assert_allclose(dataset.energies[k], frame.calc.results["energy"], atol=1e-8)
        np.testing.assert_allclose(dataset.forces[k], frame.calc.results["forces"], atol=1e-8)
        np.testing.assert_allclose(dataset.stresses[k], frame.calc.results["stress"], atol=1e-8)


@pytest.mark.parametrize(
    ("name", "elements", "n_atoms", "energy"),
    [("OUTCAR_example_1", ("Ni",), 18, -68.23102426), ("vasprun_pstress.xml", ("C",), 2, -20.24720095)],
)
def test_vasp_output_is_read(name: str, elements: tuple[str, ...], n_atoms: int, energy: float) -> None:
    dataset = load_dataset(Path(ase.__file__).parent / "test" / "testdata" / "vasp" / name)
    assert dataset.elements == elements
    assert dataset.n_atoms.tolist() == [n_atoms]
    assert dataset.energies == pytest.approx([energy], abs=1e-6)
    assert dataset.forces[0].shape == (n_atoms, 3)
    assert np.shape(dataset.stresses[0]) == (6,)


def test_constraints_do_not_zero_the_labels(tmp_path: Path, frames: list[Atoms]) -> None:
    expected = frames[0].calc.results["forces"].copy()
    frames[0].set_constraint(FixAtoms([0, 1]))
    ase.io.write(tmp_path / "a.traj", frames)
    dataset = load_dataset(tmp_path / "a.traj")
    np.testing.assert_array_equal(dataset.forces[0], expected)
    assert not dataset.frames[0].constraints


def test_frames_keep_what_is_no_label(frames: list[Atoms]) -> None:
    for k, frame in enumerate(frames):
        frame.info = {"energy": frame.calc.results["energy"], "candidate": k, "level_of_theory": "Lennard-Jones"}
    dataset = dataset_from_frames(frames, name="argon")
    assert [frame.info for frame in dataset.frames] == [
        {"candidate": k, "level_of_theory": "Lennard-Jones"} for k in range(3)
    ]
    assert dataset.level_of_theory == "Lennard-Jones"


# --- labels by name and units ----------------------------------------------------------------------------------------


def named(frames: list[Atoms], energy: str, forces: str, stress: str | None = None) -> list[Atoms]:
    renamed = []
    for frame in frames:
        copy = Atoms(frame)
        copy.calc = None
        copy.info[energy] = frame.calc.results["energy"]
        copy.arrays[forces] = frame.calc.results["forces"]
        if stress:
            copy.info[stress] = frame.calc.results["stress"][[0, 5, 4, 5, 1, 3, 4, 3, 2]].reshape(3, 3)
        renamed.append(copy)
    return renamed


@pytest.mark.parametrize("keys", [{}, {"energy_key": "REF_energy", "forces_key": "REF_forces"}])
def test_reference_names_are_found(tmp_path: Path, frames: list[Atoms], keys: dict[str, str]) -> None:
    ase.io.write(tmp_path / "a.extxyz", named(frames, "REF_energy", "REF_forces", "REF_stress"))
    dataset = load_dataset(tmp_path / "a.extxyz", **keys)
    for k, frame in enumerate(frames):
        np.testing.assert_allclose(dataset.forces[k], frame.calc.results["forces"], atol=1e-8)
        if keys:
            assert dataset.stresses[k] is None
        else:
            np.testing.assert_allclose(dataset.stresses[k], frame.calc.results["stress"], atol=1e-8)
        assert "REF_energy" not in dataset.frames[k].info


def test_names_of_ones_own_and_a_stress_of_nine_numbers(frames: list[Atoms]) -> None:
    own = named(frames, "E", "F", "S")
    own[1].info["S"] = own[1].info["S"].ravel()
    del own[2].info["S"]
    dataset = dataset_from_frames(own, name="own", energy_key="E", forces_key="F", stress_key="S")
    for k in (0, 1):
        np.testing.assert_array_equal(dataset.stresses[k], frames[k].calc.results["stress"])
    assert dataset.stresses[2] is None


def test_calculator_results_can_be_named(frames: list[Atoms]) -> None:
    for frame in frames:
        frame.calc.results["free_energy"] = frame.calc.results["energy"] - 0.5
    dataset = dataset_from_frames(frames, name="a", energy_key="free_energy", forces_key="forces")
    assert dataset.energies.tolist() == [frame.calc.results["energy"] - 0.5 for frame in frames]


def test_calculator_results_win_over_reference_names_and_say_so(
    frames: list[Atoms], caplog: pytest.LogCaptureFixture
) -> None:
    for frame in frames:
        frame.info["REF_energy"] = frame.calc.results["energy"] - 1
        frame.arrays["REF_forces"] = frame.calc.results["forces"] * 2
    with caplog.at_level(logging.WARNING, "tlmc.datasets"):
        dataset = dataset_from_frames(frames, name="a", source="a.traj")
    assert dataset.energies.tolist() == [frame.calc.results["energy"] for frame in frames]
    assert "a.traj: labels are the calculator results, not REF_energy and REF_forces" in caplog.text


@pytest.mark.parametrize(
    ("units", "words", "energy_unit", "length_unit"),
    [
        ("Hartree/Bohr", "Hartree, Hartree/Bohr", Hartree, Bohr),
        ("Hartree/Angstrom", "Hartree, Hartree/Angstrom", Hartree, 1.0),
        ("kcal/mol", "kcal/mol, kcal/mol/Angstrom", kcal / mol, 1.0),
    ],
)
def test_units_are_converted(
    frames: list[Atoms], units: str, words: str, energy_unit: float, length_unit: float
) -> None:
    foreign = [
        labelled(
            Atoms(frame),
            frame.calc.results["energy"] / energy_unit,
            frame.calc.results["forces"] / (energy_unit / length_unit),
            stress=frame.calc.results["stress"] / (energy_unit / length_unit**3),
        )
        for frame in frames
    ]
    dataset = dataset_from_frames(foreign, name="a", units=units)
    assert dataset.units == words
    for k, frame in enumerate(frames):
        assert dataset.energies[k] == pytest.approx(frame.calc.results["energy"], rel=1e-12)
        np.testing.assert_allclose(dataset.forces[k], frame.calc.results["forces"], rtol=1e-12)
        np.testing.assert_allclose(dataset.stresses[k], frame.calc.results["stress"], rtol=1e-12)


def test_unknown_units_are_refused(frames: list[Atoms]) -> None:
    with pytest.raises(DataError, match=r"a.traj: units must be one of eV, .*Hartree/Bohr.*, got 'Hartree'"):
        dataset_from_frames(frames, name="a", source="a.traj", units="Hartree")


def strip(frame: Atoms) -> None:
    frame.calc = None


@pytest.mark.parametrize(
    ("change", "keys", "sentence"),
    [
        (
            lambda frames: [strip(frame) for frame in frames],
            {},
            "a.traj: has no energy and no forces: name energy_key and forces_key; frame 0 has calculator results: no",
        ),
        (
            lambda frames: [frame.calc.results.pop("forces") for frame in frames],
            {},
            "a.traj: has no forces: name energy_key and forces_key; frame 0 has calculator results: energy, stress; "
            "info: nothing; arrays: nothing",
        ),
        (
            lambda frames: strip(frames[1]),
            {},
            "a.traj: frame 1 has no energy 'energy'; it has calculator results: nothing",
        ),
        (
            lambda frames: [frame.calc.results.pop("forces") for frame in frames[1:]],
            {},
            r"a.traj: frame 1 has no forces 'forces' \(and 1 more frame\); it has calculator results: energy, stress",
        ),
        (
            lambda frames: None,
            {"energy_key": "E", "forces_key": "forces"},
            r"a.traj: frame 0 has no energy 'E' \(and 2 more frames\); it has calculator results: energy, forces, st",
        ),
        (
            lambda frames: None,
            {"energy_key": "energy", "forces_key": "forces", "stress_key": "virial"},
            "a.traj: no frame has the stress 'virial'; frame 0 has calculator results: energy, forces, stress",
        ),
        (
            lambda frames: None,
            {"energy_key": "energy"},
            "a.traj: name energy_key and forces_key, or no key at all, .*got 'energy', None and stress None",
        ),
        (
            lambda frames: frames[2].info.update(energy=3.0),
            {"energy_key": "energy", "forces_key": "forces"},
            "a.traj: frame 2: energy 'energy' is ambiguous",
        ),
        (
            lambda frames: frames[1].info.update(energy="low"),
            {"energy_key": "energy", "forces_key": "forces"},
            "a.traj: frame 1: energy 'energy' is not numeric: 'low'",
        ),
        (
            lambda frames: frames[1].calc.results.update(energy=np.ones(4)),
            {},
            r"a.traj: frame 1: energy 'energy' must be one number, got shape \(4,\)",
        ),
        (
            lambda frames: frames[0].calc.results.update(forces=np.ones((3, 4))),
            {},
            r"a.traj: frame 0 \(Ar4\): forces must have shape \(4, 3\), got \(3, 4\)",
        ),
        (
            lambda frames: frames[0].calc.results.update(stress=np.ones(5)),
            {},
            r"a.traj: frame 0 \(Ar4\): stress must have shape \(6,\), got \(5,\)",
        ),
    ],
)
def test_labels_that_cannot_be_used(
    frames: list[Atoms], change: Callable[[list[Atoms]], object], keys: dict[str, str], sentence: str
) -> None:
    change(frames)
    with pytest.raises(DataError, match=sentence):
        dataset_from_frames(frames, name="a", source="a.traj", **keys)


def test_two_pairs_of_reference_names_are_ambiguous(frames: list[Atoms]) -> None:
    both = named(frames, "REF_energy", "REF_forces")
    for frame, other in zip(both, frames, strict=True):
        frame.info["dft_energy"] = other.calc.results["energy"]
        frame.arrays["dft_forces"] = other.calc.results["forces"]
    sentence = r"ambiguous \(REF_energy with REF_forces, dft_energy with dft_forces\).*info: REF_energy, dft_energy"
    with pytest.raises(DataError, match=sentence):
        dataset_from_frames(both, name="a")


def test_a_reference_pair_beside_half_a_calculator_is_ambiguous(frames: list[Atoms]) -> None:
    mixed = named(frames, "REF_energy", "REF_forces")
    for frame in mixed:
        frame.calc = SinglePointCalculator(frame, energy=-1.0)
    with pytest.raises(DataError, match=r"ambiguous \(REF_energy with REF_forces, energy of a calculator\)"):
        dataset_from_frames(mixed, name="a")


# --- files that cannot be used ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("a.traj", b"", "a.traj: is empty"),
        ("a.extxyz", b"", "a.extxyz: is empty"),
        ("a.traj", b"not a trajectory", r"a.traj: ASE cannot read it \(InvalidULMFileError: This is not an ULM"),
        ("a.extxyz", b"garbage\nfoo\n", r"a.extxyz: ASE cannot read it \(XYZError: .*Expected xyz header"),
        ("a.extxyz", b"3\n\nH 0 0 0\n", r"a.extxyz: ASE cannot read it \(XYZError: .*Frame has 1 atoms, expected 3"),
        ("a.extxyz", b"1\n\nXx 0 0 0\n", r"a.extxyz: ASE cannot read it \(KeyError: 'Xx'\)"),
        ("a.db", b"garbage", r"a.db: ASE cannot read it \(DatabaseError: file is not a database\)"),
        ("vasprun.xml", b"<modeling><x", r"vasprun.xml: ASE cannot read it \(ParseError"),
        ("OUTCAR", b"hello", r"OUTCAR: ASE cannot read it \(ParseError: Incomplete OUTCAR"),
        ("a.json", b'{"1":', r"a.json: ASE cannot read it \(JSONDecodeError"),
        ("a.unheard", b"what is this", r"a.unheard: ASE cannot read it \(UnknownFileTypeError"),
        ("a.extxyz.gz", b"not compressed", r"a.extxyz.gz: ASE cannot read it \(BadGzipFile"),
        ("a.extxyz.xz", b"not compressed", r"a.extxyz.xz: ASE cannot read it \(LZMAError"),
    ],
)
def test_unreadable_files(tmp_path: Path, name: str, content: bytes, sentence: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=sentence):
        load_dataset(tmp_path / name)


def test_a_cut_trajectory_and_an_empty_database(tmp_path: Path, frames: list[Atoms]) -> None:
    ase.io.write(tmp_path / "a.traj", frames)
    (tmp_path / "cut.traj").write_bytes((tmp_path / "a.traj").read_bytes()[:500])
    with pytest.raises(DataError, match=r"cut.traj: ASE cannot read it \(ValueError"):
        load_dataset(tmp_path / "cut.traj")
    ase.io.write(tmp_path / "a.db", frames)
    connection = sqlite3.connect(tmp_path / "a.db")
    connection.execute("DELETE FROM systems")
    connection.commit()
    connection.close()
    with pytest.raises(DataError, match=r"a.db: (holds no frames|ASE cannot read it)"):
        load_dataset(tmp_path / "a.db")


class Bomb:
    def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
        return Path.touch, (Path("exploded"),)  # type: ignore[return-value]


@pytest.mark.parametrize("name", ["a.pckl", "a.pkl", "a.traj", "a.npy"])
def test_pickles_are_never_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    if name == "a.npy":
        np.save(tmp_path / name, np.array([Bomb()], dtype=object))
    else:
        (tmp_path / name).write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(DataError, match=rf"{name}: may hold Python objects \(pickle\), which run code when read"):
        load_dataset(tmp_path / name)
    assert not (tmp_path / "exploded").exists()


def test_a_folder_a_missing_file_and_a_misspelt_name(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is a folder, not a file with structures"):
        load_dataset(tmp_path)
    with pytest.raises(DataError, match=r"nowhere.traj: cannot be read \(No such file or directory\)"):
        read_frames(tmp_path / "nowhere.traj")
    with pytest.raises(
        DataError, match="molcrys-mace/21_uria: neither a file nor a known data set; did you mean molcrys"
    ):
        load_dataset("molcrys-mace/21_uria")
    with pytest.raises(DataError, match="q.traj: neither a file nor a known data set; known names: molcrys-mace/01_"):
        load_dataset("q.traj")


# --- checks of frames ------------------------------------------------------------------------------------------------


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


def set_stress(frames: list[Atoms]) -> None:
    frames[2].calc.results["stress"][4] = np.nan


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
        (set_stress, "frame 2 has a value that is not finite: stress is nan$"),
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
        dataset = dataset_from_frames(
            [labelled(Atoms(symbol), energy, np.zeros((1, 3)))], name=symbol, units="Hartree/Bohr"
        )
        assert dataset.energies[0] == pytest.approx(energy * Hartree)


def test_a_data_set_made_by_hand_is_checked_too(frames: list[Atoms]) -> None:
    good = dataset_from_frames(frames, name="a")
    short = Dataset(good.frames, good.energies[:2], good.forces, good.stresses, "a", "a", "", "", good.frame_numbers)
    with pytest.raises(DataError, match="a: 3 frames need as many energies, got 2"):
        check_dataset(short)
    with pytest.raises(DataError, match="memory: holds no frames"):
        check_dataset(good.subset([]))
    with pytest.raises(DataError, match="memory: holds no frames"):
        dataset_from_frames([], name="a")


def test_copies_are_logged_and_kept(frames: list[Atoms], caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "tlmc.datasets"):
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


# --- crystals and molecules ------------------------------------------------------------------------------------------


def is_crystal(frame: Atoms) -> bool:
    labels = labelled(frame, -1.0 * len(frame), np.ones((len(frame), 3)))
    return bool(dataset_from_frames([labels], name="a").is_crystal[0])


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 2**32 - 1), st.sampled_from(["CH4", "C6H6", "trans-butane"]))
def test_a_molecule_in_a_box_is_none_wherever_the_border_cuts_it(seed: int, name: str) -> None:
    rng = np.random.default_rng(seed)
    frame = molecule(name, cell=[25, 24, 26], pbc=True)
    frame.euler_rotate(*rng.uniform(0, 180, 3))
    frame.positions += rng.uniform(-30, 30, 3)
    frame.wrap()
    assert not is_crystal(frame)


def test_what_is_a_crystal() -> None:
    assert is_crystal(bulk("Ar"))
    assert is_crystal(bulk("Ar", cubic=True) * (3, 3, 3))
    left_handed = bulk("Ar", cubic=True)
    left_handed.set_cell(left_handed.cell[[1, 0, 2]])
    assert is_crystal(left_handed)
    # molecules 5 A apart along one axis of a long cell: a chain
    assert is_crystal(molecule("CH4", cell=[7, 30, 30], pbc=True))
    assert not is_crystal(molecule("CH4", cell=[9, 30, 30], pbc=True))
    # a pair is as isolated as one molecule
    pair = molecule("CH4", cell=[25, 25, 25], pbc=True)
    other = pair.copy()
    other.positions += [4, 1, 0]
    assert not is_crystal(pair + other)
    # neighbouring molecules link in steps across several cells of a supercell
    assert is_crystal(molecule("CH4", cell=[6, 6, 6], pbc=True) * (2, 2, 2))
    assert not is_crystal(Atoms(bulk("Ar", cubic=True), pbc=(True, True, False)))
    assert not is_crystal(molecule("CH4"))


@pytest.mark.needs_mirror
@pytest.mark.parametrize("name", MIRRORED)
def test_registered_sets_have_the_registered_frames(name: str) -> None:
    facts = available()[f"molcrys-mace/{name}"]
    dataset = load_dataset(f"molcrys-mace/{name}")
    assert len(dataset) == facts["frames"]
    assert dataset.is_crystal.sum() == facts["crystal_frames"]
    assert {frame.get_chemical_formula() for frame in dataset.crystals().frames} == {facts["formula"]}
    assert len(dataset.molecules()) == facts["frames"] - facts["crystal_frames"]
    assert dataset.level_of_theory == "periodic DFT, vdW-DF2"
    assert all(stress is not None for stress in dataset.crystals().stresses)


@pytest.mark.needs_mirror
def test_stress_has_the_sign_of_a_strain_derivative() -> None:
    """Strained pairs of the urea set: E_2 - E_1 = V sigma : eps at fixed fractional coordinates, on average."""
    dataset = load_dataset("molcrys-mace/21_urea").crystals()
    work, change = [], []
    for a in range(len(dataset)):
        for b in range(a + 1, len(dataset)):
            one, two = dataset.frames[a], dataset.frames[b]
            strain = np.linalg.solve(one.cell.array, two.cell.array) - np.eye(3)
            if 0.01 < np.abs(strain).max() < 0.06:
                eps = 0.5 * (strain + strain.T)
                moved = two.get_scaled_positions(wrap=False) - one.get_scaled_positions(wrap=False)
                moved -= np.rint(moved)
                u = (moved - moved.mean(axis=0)) @ (0.5 * (one.cell.array + two.cell.array))
                if np.abs(u).max() > 0.4:
                    continue
                voigt = np.array([eps[0, 0], eps[1, 1], eps[2, 2], 2 * eps[1, 2], 2 * eps[0, 2], 2 * eps[0, 1]])
                pressure = sum(
                    0.5 * frame.cell.volume * (stress @ voigt)
                    for frame, stress in ((one, dataset.stresses[a]), (two, dataset.stresses[b]))
                )
                work.append(pressure - 0.5 * ((dataset.forces[a] + dataset.forces[b]) * u).sum())
                change.append(dataset.energies[b] - dataset.energies[a])
    x, y = np.array(work), np.array(change)
    assert len(x) > 50
    assert x @ y / (x @ x) == pytest.approx(1, abs=0.1)


# --- geometry and identity -------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 2**32 - 1))
def test_moved_turned_mirrored_and_reordered_frames_are_the_same(seed: int) -> None:
    rng = np.random.default_rng(seed)
    crystal = molecule("CH3OH", cell=[[6.1, 0, 0], [0.7, 5.3, 0], [-0.4, 0.6, 5.8]], pbc=True)
    crystal.positions += rng.normal(scale=0.05, size=(6, 3))
    other = crystal[rng.permutation(6)]
    other.positions += rng.uniform(-9, 9, 3)
    other.wrap()
    turn, _ = np.linalg.qr(rng.normal(size=(3, 3)))
    other.set_cell(other.cell.array @ turn, scale_atoms=False)
    other.positions = other.positions @ turn + rng.uniform(-2e-5, 2e-5, (6, 3))
    moved = crystal.copy()
    moved.positions[rng.integers(6)] += 0.01
    strained = crystal.copy()
    strained.set_cell(crystal.cell * 1.002, scale_atoms=True)
    assert duplicate_groups([crystal, moved, other, strained]).tolist() == [0, 1, 0, 3]


def test_sameness_is_passed_on_and_copies_in_bulk_are_quick() -> None:
    frame = molecule("CH3OH")
    steps = []
    for k in range(4):
        step = frame.copy()
        step.positions[0, 0] += 0.9e-4 * k
        steps.append(step)
    assert duplicate_groups([molecule("H2O"), *steps]).tolist() == [0, 1, 1, 1, 1]
    start = time.perf_counter()
    assert set(duplicate_groups([frame] * 3000).tolist()) == {0}
    assert time.perf_counter() - start < 5
    assert duplicate_groups([]).tolist() == []


def test_periodicity_and_elements_tell_frames_apart() -> None:
    crystal = molecule("CO", cell=[4, 4, 4], pbc=True)
    swapped = crystal.copy()
    swapped.numbers = [7, 7]
    assert duplicate_groups([crystal, Atoms(crystal, pbc=False), swapped, Atoms("H"), Atoms("H")]).tolist() == [
        0,
        1,
        2,
        3,
        3,
    ]


def test_the_hash_of_a_frame_sees_geometry_only(frames: list[Atoms]) -> None:
    copy = Atoms(frames[0])
    copy.info["note"] = 1
    assert frame_hash(copy) == frame_hash(frames[0])
    for change in ("numbers", "positions", "cell", "pbc"):
        other = copy.copy()
        if change == "numbers":
            other.numbers[0] = 10
        elif change == "positions":
            other.positions[0, 0] += 1e-12
        elif change == "cell":
            other.cell[0, 0] += 1e-12
        else:
            other.pbc = (True, True, False)
        assert frame_hash(other) != frame_hash(copy), change


def test_the_hash_of_a_frame_is_the_same_on_every_machine() -> None:
    """Caches are keyed by it: little-endian numbers, periodicity, cell, positions, whatever the platform."""
    frame = Atoms("HO", positions=[[0, -0.0, 0], [0, 0, 1.5]], cell=[4, 5, 6], pbc=(True, False, True))
    content = struct.pack("<2q3B9d6d", 1, 8, 1, 0, 1, 4, 0, 0, 0, 5, 0, 0, 0, 6, 0, 0, 0, 0, 0, 1.5)
    assert frame_hash(frame) == hashlib.sha256(content).hexdigest()


def test_the_hash_of_a_data_set_sees_labels_and_order_but_not_the_file(tmp_path: Path, frames: list[Atoms]) -> None:
    for name in ("a.traj", "b.db"):
        ase.io.write(tmp_path / name, frames)
    dataset = load_dataset(tmp_path / "a.traj")
    assert load_dataset(tmp_path / "b.db").hash == dataset.hash
    assert dataset.subset([0, 2, 1]).hash != dataset.hash
    assert dataset.subset([0, 1, 2]).hash == dataset.hash
    hashes = {dataset.hash}
    for key in ("energy", "forces", "stress"):
        changed = [Atoms(frame) for frame in frames]
        for new, old in zip(changed, frames, strict=True):
            new.calc = SinglePointCalculator(new, **{k: np.copy(v) for k, v in old.calc.results.items()})
        changed[1].calc.results[key] = changed[1].calc.results[key] + 1e-9
        hashes.add(dataset_from_frames(changed, name="a").hash)
    assert len(hashes) == 4


def test_subsets_keep_frames_and_labels_together(frames: list[Atoms]) -> None:
    dataset = dataset_from_frames(frames, name="a")
    chosen = dataset.subset([2, 0])
    assert chosen.frame_numbers.tolist() == [2, 0]
    assert chosen.energies.tolist() == dataset.energies[[2, 0]].tolist()
    assert chosen.frames[0] is dataset.frames[2]
    assert chosen.forces[1] is dataset.forces[0]
    assert chosen.stresses[0] is dataset.stresses[2]
    assert dataset.subset(np.array([False, True, False])).frame_numbers.tolist() == [1]
    # numbers of the file, not of the subset, are in sentences
    assert chosen.subset([0]).frame_numbers.tolist() == [2]
    with pytest.raises(IndexError):
        dataset.subset([3])
    with pytest.raises(IndexError):
        dataset.subset(np.array([True, False]))


def test_elements_are_counted() -> None:
    assert element_counts([molecule("CH4"), molecule("CH3OH")]) == {"H": 8, "C": 2, "O": 1}


# --- registry, mirror, download --------------------------------------------------------------------------------------


def test_the_registry_lists_25_public_sets() -> None:
    public = {name: facts for name, facts in available().items() if "sha256" in facts}
    assert len(public) == 25
    for name, facts in public.items():
        assert name.startswith("molcrys-mace/")
        assert facts["url"].startswith("https://raw.githubusercontent.com/water-ice-group/MolCrys-MACE/36a5da65")
        assert facts["url"].endswith(("/TRAIN.traj", "/training_set.xyz"))
        assert len(facts["sha256"]) == 64
        assert 0 < facts["crystal_frames"] <= facts["frames"]


def test_embedded_sets_are_found_by_name(private: Path, frames: list[Atoms]) -> None:
    folder = private / "root" / "data"
    ase.io.write(folder / "argon.extxyz.gz", frames)
    assert available()["argon"] == {"path": str(folder / "argon.extxyz.gz")}
    dataset = load_dataset("argon")
    assert (dataset.name, dataset.source, len(dataset)) == ("argon", str(folder / "argon.extxyz.gz"), 3)
    ase.io.write(folder / "argon.extxyz", frames)
    with pytest.raises(DataError, match="argon.extxyz and argon.extxyz.gz are both called argon: keep one"):
        load_dataset("argon")


def test_a_package_without_a_checkout_has_public_sets_and_files(
    private: Path, frames: list[Atoms], monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.rmtree(private / "root" / "notebooks")
    assert len(available()) == 25
    ase.io.write(private / "a.traj", frames)
    assert len(load_dataset(private / "a.traj")) == 3


class Server(ThreadingHTTPServer):
    requests = 0


class Handler(SimpleHTTPRequestHandler):
    def do_GET(self) -> None:
        assert isinstance(self.server, Server)
        self.server.requests += 1
        super().do_GET()

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def origin(private: Path, frames: list[Atoms], monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """A registry of one set, ``toy/argon``, whose origin is a server on this machine."""
    folder = private / "origin"
    (folder / "argon").mkdir(parents=True)
    ase.io.write(folder / "argon" / "TRAIN.traj", frames)
    with Server(("127.0.0.1", 0), partial(Handler, directory=str(folder))) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        register(
            monkeypatch, server.server_port, hashlib.sha256((folder / "argon" / "TRAIN.traj").read_bytes()).hexdigest()
        )
        yield server
        server.shutdown()
        thread.join()


def register(monkeypatch: pytest.MonkeyPatch, port: int, sha256: str) -> None:
    facts = {"level_of_theory": "Lennard-Jones", "citation": "", "doi": "", "licence": ""}
    facts["base_url"] = f"http://127.0.0.1:{port}/"
    entry = {"path": "argon/TRAIN.traj", "sha256": sha256, "frames": 3, "crystal_frames": 3, "formula": "Ar4"}
    registry = json.dumps({"datasets": {"toy": facts | {"files": {"argon": entry}}}})
    monkeypatch.setattr(datasets, "_registry_text", lambda: registry)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*") if path.is_file()) if folder.exists() else []


def test_a_public_set_is_downloaded_once(private: Path, origin: Server) -> None:
    dataset = load_dataset("toy/argon")
    assert dataset.name == "toy/argon"
    assert dataset.source == f"http://127.0.0.1:{origin.server_port}/argon/TRAIN.traj"
    assert dataset.level_of_theory == "Lennard-Jones"
    assert files(private / "cache") == ["argon.traj"]
    assert load_dataset("toy/argon").hash == dataset.hash
    assert origin.requests == 1


def test_a_damaged_cache_is_fetched_again(private: Path, origin: Server) -> None:
    load_dataset("toy/argon")
    (private / "cache" / "datasets" / "toy" / "argon.traj").write_bytes(b"damaged")
    assert len(load_dataset("toy/argon")) == 3
    assert origin.requests == 2


def test_the_mirror_is_looked_at_first(private: Path, origin: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    mirror = private / "mirror"
    (mirror / "toy").mkdir(parents=True)
    monkeypatch.setenv("TLMC_DATA_DIR", str(mirror))
    load_dataset("toy/argon")
    assert origin.requests == 1
    shutil.copy(private / "origin" / "argon" / "TRAIN.traj", mirror / "toy" / "argon.traj")
    assert load_dataset("toy/argon").source == str(mirror / "toy" / "argon.traj")
    assert origin.requests == 1
    (mirror / "toy" / "argon.traj").write_bytes(b"other")
    found = hashlib.sha256(b"other").hexdigest()
    with pytest.raises(DataError, match=rf"{mirror}/toy/argon.traj: SHA-256 is {found}, expected [0-9a-f]{{64}}: "):
        load_dataset("toy/argon")


def test_a_download_of_another_hash_is_refused_and_leaves_nothing(
    private: Path, origin: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = available()["toy/argon"]["sha256"]
    register(monkeypatch, origin.server_port, "0" * 64)
    with pytest.raises(
        DataError, match=rf"TRAIN.traj: the download has not the registered SHA-256 {'0' * 64} \(.*{found}"
    ):
        load_dataset("toy/argon")
    assert files(private / "cache") == []


@pytest.mark.parametrize("problem", ["closed port", "gone"])
def test_no_network_says_within_seconds_what_to_place_where(
    private: Path, origin: Server, monkeypatch: pytest.MonkeyPatch, problem: str
) -> None:
    if problem == "gone":
        (private / "origin" / "argon" / "TRAIN.traj").unlink()
        reason = "HTTPError 404"
    else:
        with Server(("127.0.0.1", 0), Handler) as closed:
            port = closed.server_port
        register(monkeypatch, port, "0" * 64)
        reason = "ConnectionError"
    start = time.perf_counter()
    with pytest.raises(
        DataError,
        match=rf"cannot download http://127.0.0.1:\d+/argon/TRAIN.traj \({reason}\): check the network, or place the "
        r"file as <folder>/toy/argon.traj and set TLMC_DATA_DIR=<folder>",
    ):
        load_dataset("toy/argon")
    assert time.perf_counter() - start < 6
    assert files(private / "cache") == []


def test_a_silent_server_is_given_up(private: Path, origin: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets, "_READ_SECONDS", 0.3)
    monkeypatch.setattr(Handler, "do_GET", lambda self: time.sleep(1.5))
    with pytest.raises(DataError, match=r"cannot download .* \(ReadTimeout\)"):
        load_dataset("toy/argon")


def test_a_full_disk_is_named(private: Path, origin: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: object, url: str, output: str, *args: object, **kwargs: object) -> None:
        Path(output).write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(pooch.HTTPDownloader, "__call__", full)
    with pytest.raises(
        DataError, match=r"cannot write .*argon.traj \(no space left\): free space, or set TLMC_CACHE_DIR"
    ):
        load_dataset("toy/argon")
    assert files(private / "cache") == []
