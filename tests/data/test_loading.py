from __future__ import annotations

import errno
import hashlib
import json
import logging
import lzma
import pickle
import shutil
import socket
import sqlite3
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
from ase.calculators.singlepoint import SinglePointCalculator
from ase.constraints import FixAtoms
from ase.units import Bohr, Hartree, kcal, mol

from helpers.argon import argon, labelled
from tlmc.data import loading as datasets
from tlmc.data.loading import available, dataset_from_frames, load_dataset, read_frames
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
    with caplog.at_level(logging.WARNING, "tlmc.data.loading"):
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
            r"a.traj: has no energy and no forces: name energy_key \(--energy-key\) and forces_key \(--forces-key\); "
            "frame 0 has calculator results: no",
        ),
        (
            lambda frames: [frame.calc.results.pop("forces") for frame in frames],
            {},
            r"a.traj: has no forces: name energy_key .*forces_key \(--forces-key\); frame 0 has calculator results: "
            "energy, stress; info: nothing; arrays: nothing",
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
            "a.traj: name energy_key .* and forces_key .*, or no key at all, .*got 'energy', None and stress None",
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
            {"stress_key": "stress"},
            r"a.traj: frame 0 \(Ar4\): stress 'stress' must have shape \(6,\) or \(3, 3\), got \(5,\)",
        ),
        (
            lambda frames: frames[1].calc.results["stress"].put(4, np.nan),
            {"stress_key": "stress"},
            r"a.traj: frame 1 \(Ar4\): stress 'stress' has a value that is not finite: nan",
        ),
        (
            lambda frames: frames[2].info.update(S="low"),
            {"stress_key": "S"},
            r"a.traj: frame 2 \(Ar4\): stress 'S' is not numeric: 'low'",
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
        (
            "a.extxyz",
            b"garbage\nfoo\n",
            "a.extxyz: Expected xyz header: line 1 must be the number of atoms of frame 0, got",
        ),
        ("a.extxyz", b"3\n\nH 0 0 0\n", "a.extxyz: frame 0: Frame has 1 atoms, expected 3: the file"),
        ("a.extxyz", b"1\n\nXx 0 0 0\n", "a.extxyz: frame 0: line 3: atom 0 is of an unknown element: 'Xx'"),
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
    with pytest.raises(DataError, match=r"cut.traj: ASE cannot read it( beyond frame \d)? \(ValueError"):
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


@pytest.mark.parametrize("name", ["a.pckl", "a.pkl", "a.traj", "a.npy", "a.xyz.xz"])
def test_pickles_are_never_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    if name == "a.npy":
        np.save(tmp_path / name, np.array([Bomb()], dtype=object))
    elif name.endswith(".xz"):
        (tmp_path / name).write_bytes(lzma.compress(pickle.dumps(Bomb())))
    else:
        (tmp_path / name).write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(DataError, match=rf"^[^(]*{name}: may hold Python objects \(pickle\), which run code when read"):
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
    with pytest.raises(DataError, match="q.traj: neither a file nor a known data set; tlmc fetch --list shows"):
        load_dataset("q.traj")


# --- public sets ------------------------------------------------------------------------------------------------------


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


# --- identity and subsets --------------------------------------------------------------------------------------------


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


def test_data_sets_are_equal_if_their_content_is(tmp_path: Path, frames: list[Atoms]) -> None:
    ase.io.write(tmp_path / "a.traj", frames)
    one, other = load_dataset(tmp_path / "a.traj"), dataset_from_frames(frames, name="other")
    assert one == other
    assert len({one, other, one.subset([0, 1])}) == 2
    assert one != one.subset([1, 0, 2])
    assert one != "a.traj"
    assert one in [other]


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
    assert (dataset.name, dataset.source, len(dataset)) == ("argon", "data/argon.extxyz.gz", 3)
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


def test_a_name_lookup_that_hangs_is_given_up(private: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets, "_CONNECT_SECONDS", 0.2)
    answered = threading.Event()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **kwargs: answered.wait(5) and [])
    start = time.perf_counter()
    with pytest.raises(DataError, match=r"cannot download https://.* \(no answer within 0.2 s\): .*TLMC_DATA_DIR"):
        load_dataset("molcrys-mace/21_urea")
    assert time.perf_counter() - start < 3
    assert files(private / "cache") == []
    answered.set()


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
