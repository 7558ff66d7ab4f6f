from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import ase.io
import numpy as np
import pytest
import spglib
from ase import Atoms, units
from ase.build import bulk
from labelling_calculators import Make, MakeArgon, atoms_in_a_box
from numpy.random import default_rng
from scipy.spatial.transform import Rotation

from tlmc.datasets import load_dataset
from tlmc.errors import ConfigError, DataError
from tlmc.files import sha256_file
from tlmc.labelling import (
    RECIPES,
    Method,
    MolecularDynamics,
    Rattle,
    Recipe,
    RigidMotion,
    Strain,
    build,
    find_molecules,
    isolated_molecules,
    label,
    make_whole,
    method,
    perturb,
    read_structure,
    relax,
    screen,
)
from tlmc.paths import data_dir

STRUCTURE = RECIPES["naphthalene"].structure


def parts_of(target: Path) -> Path:
    return target.with_name(target.name + ".parts")


@pytest.fixture(scope="module")
def naphthalene() -> Atoms:
    return make_whole(read_structure(STRUCTURE))


@pytest.fixture(scope="module")
def embedded() -> list[Atoms]:
    frames: list[Atoms] = ase.io.read(data_dir() / "naphthalene.extxyz", ":")
    return frames


# --- structures ---


def test_read_structure_gives_the_experimental_crystal(naphthalene: Atoms, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spglib.error, "OLD_ERROR_HANDLING", False)  # its default warns
    assert naphthalene.get_chemical_formula() == "C20H16"
    assert naphthalene.cell.cellpar() == pytest.approx([8.098, 5.953, 8.652, 90, 124.4, 90])
    cell = (naphthalene.cell.array, naphthalene.get_scaled_positions(), naphthalene.numbers)
    assert spglib.get_symmetry_dataset(cell, symprec=1e-3).number == 14


def test_read_structure_names_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no CIF 'napthalene'; it has .*naphthalene"):
        read_structure("pyxtal:napthalene")
    with pytest.raises(DataError, match=r"missing\.cif: cannot be read"):
        read_structure(str(tmp_path / "missing.cif"))


def test_make_whole_undoes_wrapping(naphthalene: Atoms) -> None:
    wrapped = naphthalene.copy()
    wrapped.positions += [3.0, 2.0, 1.0]
    wrapped.wrap()
    whole = make_whole(wrapped)
    for molecule in find_molecules(whole):
        assert len(molecule) == 18
        expected = naphthalene[molecule].get_all_distances()
        assert whole[molecule].get_all_distances() == pytest.approx(expected, abs=1e-9)
        assert not np.allclose(wrapped[molecule].get_all_distances(), expected, atol=0.1)
        centre = whole.cell.scaled_positions(whole.positions[molecule].mean(axis=0))
        assert ((centre > -1e-6) & (centre < 1 + 1e-6)).all()


def test_make_whole_refuses_a_network() -> None:
    with pytest.raises(DataError, match="of C2 close a bonded network through the periodic cell"):
        make_whole(bulk("C"))


def test_isolated_molecule_has_room(naphthalene: Atoms) -> None:
    (molecule,) = isolated_molecules(naphthalene, vacuum=7.0)
    assert molecule.get_chemical_formula() == "C10H8"
    assert molecule.pbc.all()
    low, high = molecule.positions.min(axis=0), molecule.positions.max(axis=0)
    assert (low > 7.0 - 1e-9).all()
    assert (molecule.cell.lengths() - high > 7.0 - 1e-9).all()


# --- perturbations ---

PLAN = (
    Rattle(count=2, widths=(0.01, 0.05), correlation=1.5),
    RigidMotion(count=2, shifts=(0.1,), angles=(5.0,)),
    Strain(count=3, linear=(-0.03, 0.03), random=0.0),
)


def test_perturb_is_deterministic_and_counts(naphthalene: Atoms) -> None:
    frames, again, other = (perturb(naphthalene, PLAN, seed) for seed in (1, 1, 2))
    assert [frame.info["group"] for frame in frames] == ["start"] + 4 * ["rattle"] + 3 * ["strain"]
    for a, b, c in zip(frames[1:], again[1:], other[1:], strict=True):
        assert (a.positions == b.positions).all()
        assert (a.cell.array == b.cell.array).all()
        assert a.info == b.info
        if a.info["group"] == "rattle":
            assert np.abs(a.positions - c.positions).max() > 1e-3
    assert len({frame.info["seed"] for frame in frames}) == len(frames)


def test_parts_of_a_plan_are_independent(naphthalene: Atoms) -> None:
    longer = (replace(PLAN[0], count=5), *PLAN[1:])
    frames, more = perturb(naphthalene, PLAN, 1), perturb(naphthalene, longer, 1)
    for a, b in zip(frames[3:], more[6:], strict=True):
        assert (a.positions == b.positions).all()


def test_rigid_motion_and_strain_keep_molecules_rigid(naphthalene: Atoms) -> None:
    for frame in perturb(naphthalene, PLAN[1:], 7)[1:]:
        for molecule in find_molecules(naphthalene):
            expected = naphthalene[molecule].get_all_distances()
            assert frame[molecule].get_all_distances() == pytest.approx(expected, abs=1e-7)
        if frame.info["perturbation"] != "isotropic +0.0000, random 0":
            assert np.abs(frame.get_all_distances() - naphthalene.get_all_distances()).max() > 0.01


def test_strain_spans_its_range(naphthalene: Atoms) -> None:
    frames = perturb(naphthalene, [PLAN[2]], 7)[1:]
    volumes = [frame.get_volume() / naphthalene.get_volume() for frame in frames]
    assert volumes == pytest.approx([0.97**3, 1.0, 1.03**3], rel=1e-6)


def test_rattle_has_its_width_and_correlation(naphthalene: Atoms) -> None:
    plan = [Rattle(count=60, widths=(0.1,), correlation=c) for c in (0.0, 1.5)]
    moved = np.array([frame.positions - naphthalene.positions for frame in perturb(naphthalene, plan, 5)[1:]])
    free, smooth = moved[:60], moved[60:]
    assert free.std() == pytest.approx(0.1, rel=0.03)
    assert smooth.std() == pytest.approx(0.1, rel=0.1)
    distances = naphthalene.get_all_distances(mic=True)
    bonded, far = (distances > 0) & (distances < 1.2), distances > 5
    # noise averaged with weights exp(-(r / c)^2) is correlated as exp(-(r / c)^2 / 2)
    for field, near in ((free, 0.0), (smooth, np.exp(-((1.09 / 1.5) ** 2) / 2))):
        correlation = np.einsum("fik,fjk->ij", field, field) / (60 * 3 * 0.01)
        assert correlation[bonded].mean() == pytest.approx(near, abs=0.1)
        assert correlation[far].mean() == pytest.approx(0.0, abs=0.1)


def test_molecular_dynamics_reaches_its_temperature_and_resumes(tmp_path: Path) -> None:
    argon = bulk("Ar", "fcc", a=5.3, cubic=True) * (2, 2, 2)
    step = MolecularDynamics(temperatures=(20.0, 20.0), strains=(0.0, 0.01), frames=2, interval=60, timestep=5.0)
    sampler = Method("Lennard-Jones", MakeArgon())
    frames = perturb(argon, [step], 4, sampler, processes=2, work=tmp_path)
    assert [frame.info["group"] for frame in frames] == ["start"] + 4 * ["md"]
    assert frames[3].get_volume() == pytest.approx(1.01**3 * argon.get_volume(), rel=1e-6)
    # half of the kinetic energy has become potential energy
    energies = []
    for frame in frames[:3]:
        frame.calc = MakeArgon()()
        energies.append(frame.get_potential_energy())
    thermal = 1.5 * units.kB * 20 * len(argon)
    assert energies[1] - energies[0] == pytest.approx(thermal, rel=0.5)
    assert energies[2] - energies[0] == pytest.approx(thermal, rel=0.5)

    assert len(list(tmp_path.glob("md-*.extxyz"))) == 2
    # a run found in the work folder is not run again, so not even its calculator is needed
    again = perturb(argon, [step], 4, Method("Lennard-Jones", Make("bug")), work=tmp_path)
    for a, b in zip(frames, again, strict=True):
        assert (a.positions == b.positions).all()
        assert a.info == b.info


def test_molecular_dynamics_needs_a_sampler(naphthalene: Atoms) -> None:
    step = MolecularDynamics(temperatures=(300.0,), strains=(0.0,), frames=1, interval=1)
    with pytest.raises(ConfigError, match="needs a sampler"):
        perturb(naphthalene, [step], 0)


# --- screening ---


def test_screen_leaves_out_unphysical_frames_and_copies(naphthalene: Atoms) -> None:
    first, second = find_molecules(naphthalene)
    broken = naphthalene.copy()
    hydrogen = next(int(k) for k in first if broken.symbols[k] == "H")
    carbon = int(np.argmin(np.where(broken.symbols == "C", broken.get_distances(hydrogen, range(36)), np.inf)))
    broken.set_distance(carbon, hydrogen, 1.6, fix=0)
    squeezed = naphthalene.copy()
    squeezed.set_distance(carbon, hydrogen, 0.5, fix=0)
    # the nearest hydrogen atoms of two molecules are brought too close, though not so close that they count as bonded
    overlapping = naphthalene.copy()
    gaps = overlapping.get_all_distances(mic=True, vector=True)
    near = [(i, j) for i in first for j in second if str(overlapping.symbols[[i, j]]) == "H2"]
    i, j = min(near, key=lambda pair: np.linalg.norm(gaps[pair]))
    overlapping.positions[second] -= gaps[i, j] * (1 - 1.1 / np.linalg.norm(gaps[i, j]))
    fused = naphthalene.copy()
    fused.positions[second] += naphthalene.positions[first[0]] - naphthalene.positions[second[0]] + [0.0, 0.0, 0.9]
    copied = naphthalene.copy()
    turn = Rotation.from_euler("zyx", [30, 20, 10], degrees=True)
    copied.set_cell(turn.apply(copied.cell.array))
    copied.positions = turn.apply(copied.positions) + [1.0, 2.0, 3.0]
    shaken = naphthalene.copy()
    shaken.rattle(0.02, rng=default_rng(0))

    frames = [naphthalene, broken, squeezed, overlapping, fused, copied, shaken]
    kept, rejected = screen(frames, naphthalene)
    assert kept == [naphthalene, shaken]
    assert [k for k, _ in rejected] == [1, 2, 3, 4, 5]
    reasons = [reason for _, reason in rejected]
    assert reasons[0] == f"bond broken between {broken.symbols[min(carbon, hydrogen)]}" + (
        f"{min(carbon, hydrogen)} and {broken.symbols[max(carbon, hydrogen)]}{max(carbon, hydrogen)}"
    )
    assert re.fullmatch(r"[CH]\d+ and [CH]\d+ overlap at 0\.500 A, limit 0\.69\d A", reasons[1])
    assert re.fullmatch(r"[CH]\d+ and [CH]\d+ overlap at 1\.100 A, limit 1\.200 A", reasons[2])
    assert reasons[3].startswith("bond formed between ")
    assert reasons[4] == "duplicate of frame 0"


# --- methods ---


def test_method_finds_calculators_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert re.fullmatch(r"GFN2-xTB, tblite [\d.]+, Gamma point, accuracy 0.1", method("GFN2-xTB").name)
    (tmp_path / "mine.py").write_text(
        "from ase.calculators.emt import EMT\n\ndef small():\n    return EMT()\n\ndef wrong():\n    return 3\n"
    )
    monkeypatch.chdir(tmp_path)
    own = method("mine.py:small", "effective medium")
    assert own.name == "effective medium"
    monkeypatch.chdir("/")
    assert type(own.make()).__name__ == "EMT"
    assert type(method("ase.calculators.emt:EMT").make()).__name__ == "EMT"
    with pytest.raises(ConfigError, match="must return an ASE calculator, got int"):
        method(f"{tmp_path}/mine.py:wrong").make()
    with pytest.raises(ConfigError, match="no calculator at 'ase.calculators.emt:EMTT'"):
        method("ase.calculators.emt:EMTT").make()
    with pytest.raises(ConfigError, match="unknown method 'b3lyp': use gfn2-xtb"):
        method("b3lyp")


def test_relax_lowers_forces_and_warns_when_it_stops_early(caplog: pytest.LogCaptureFixture) -> None:
    argon = bulk("Ar", "fcc", a=5.5, cubic=True)
    argon.rattle(0.1, rng=default_rng(0))
    lennard_jones = Method("Lennard-Jones", MakeArgon())
    relaxed = relax(argon, lennard_jones, fmax=1e-4, cell=True)
    relaxed.calc = MakeArgon()()
    assert np.abs(relaxed.get_forces()).max() < 1e-4
    assert np.abs(relaxed.get_stress()).max() * relaxed.get_volume() < 1e-3
    assert not caplog.records
    relax(argon, lennard_jones, fmax=1e-4, steps=1)
    assert "Ar4 is not relaxed to 0.0001 eV/A after 1 steps" in caplog.text


# --- labels ---


def test_labels_come_back_as_computed(tmp_path: Path) -> None:
    frames = atoms_in_a_box(3)
    frames[2].pbc = False
    report = label(frames, Method("springs", Make()), tmp_path / "out.extxyz.xz", processes=2)
    assert (report.labelled, report.reused, report.failed) == (3, 0, ())
    assert report.sha256 == sha256_file(report.target)
    read = ase.io.read(report.target, ":")
    for given, found in zip(frames, read, strict=True):
        assert found.positions == pytest.approx(given.positions, abs=1e-8)
        assert found.get_forces() == pytest.approx(-given.positions, abs=1e-8)
        assert found.get_potential_energy() == pytest.approx(0.5 * (given.positions**2).sum(), abs=1e-6)
        assert found.info["level_of_theory"] == "springs"
        assert found.info["place"] == given.info["place"]
    assert read[0].get_stress() == pytest.approx(np.arange(6.0))
    assert "stress" not in read[2].calc.results
    assert all(frame.calc is None for frame in frames)


def test_failed_scf_is_counted_named_and_tried_again_only_on_request(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    target = tmp_path / "out.extxyz"
    frames = atoms_in_a_box(5)
    report = label(frames, Method("springs", Make("scf")), target)
    assert [failure.frame for failure in report.failed] == [3, 4]
    assert report.failed[0].reason == "SCFError: SCF not converged in 250 cycles"
    assert report.labelled == 3
    assert [frame.info["place"] for frame in ase.io.read(target, ":")] == [0, 1, 2]
    assert "frame 3 has no label: SCFError: SCF not converged" in caplog.text

    again = label(frames, Method("springs", Make()), target)
    assert (again.reused, again.failed) == (5, report.failed)
    retried = label(frames, Method("springs", Make()), target, retry_failed=True)
    assert (retried.labelled, retried.reused, retried.failed) == (5, 3, ())


def test_files_of_the_calculator_are_kept_apart_and_copies_computed_once(tmp_path: Path) -> None:
    target = tmp_path / "out.extxyz"
    frames = atoms_in_a_box(2)
    report = label([*frames, frames[0]], Method("springs", Make()), target)
    assert report.labelled == 3
    calls = sorted(parts_of(target).glob("*/calls"))
    assert [call.read_text() for call in calls] == 2 * ["called\n"]


@pytest.mark.parametrize(
    ("make", "error", "sentence"),
    [
        (Make("setup"), ConfigError, "calculator Springs cannot be set up: no such functional"),
        (Make(energy_only=True), ConfigError, "calculator EnergyOnly does not compute forces, stress"),
        (Make("bug"), TypeError, "a defect of the calculator"),
        (Make("die"), DataError, r"a process died, .* run again to go on from there"),
        (Make("nan"), DataError, r"none of 1 frames .* not finite"),
    ],
)
def test_what_is_no_failed_scf_stops_the_run(tmp_path: Path, make: Make, error: type[Exception], sentence: str) -> None:
    with pytest.raises(error, match=sentence):
        label(atoms_in_a_box(4)[3:], Method("springs", make), tmp_path / "out.extxyz")
    assert not (tmp_path / "out.extxyz").exists()


def test_label_refuses_nothing_to_do(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no frames to label"):
        label([], Method("springs", Make()), tmp_path / "out.extxyz")
    with pytest.raises(ConfigError, match="processes must be at least 1, got 0"):
        label(atoms_in_a_box(1), Method("springs", Make()), tmp_path / "out.extxyz", processes=0)


def test_a_killed_run_resumes_to_the_same_file(tmp_path: Path) -> None:
    target, undisturbed = tmp_path / "killed.extxyz", tmp_path / "undisturbed.extxyz"
    script = (
        "import sys\n"
        "from pathlib import Path\n"
        "from tlmc.labelling import Method, label\n"
        "from labelling_calculators import Make, atoms_in_a_box\n"
        f"label(atoms_in_a_box(12), Method('springs', Make(pause=0.4)), Path({str(target)!r}), processes=2)\n"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent)}
    process = subprocess.Popen([sys.executable, "-c", script], env=environment, start_new_session=True)
    limit = time.monotonic() + 120
    while len(list(parts_of(target).glob("*.json"))) < 3:
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < limit
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    while (left := subprocess.run(["pgrep", "-s", str(process.pid)], capture_output=True, check=False).stdout) != b"":
        assert time.monotonic() < limit, f"worker processes {left!r} outlive the run"
        time.sleep(0.1)
    assert not target.exists()

    report = label(atoms_in_a_box(12), Method("springs", Make()), target)
    assert 3 <= report.reused < 12
    label(atoms_in_a_box(12), Method("springs", Make()), undisturbed)
    assert target.read_bytes() == undisturbed.read_bytes()


def test_build_follows_a_recipe_and_resumes(tmp_path: Path) -> None:
    molecule = Atoms("N2", [[0, 0, -0.55], [0, 0, 0.55]])
    crystal = Atoms(cell=[3.6, 3.6, 4.6], pbc=True)
    crystal += molecule
    ase.io.write(tmp_path / "nitrogen.extxyz", crystal)
    recipe = Recipe(
        name="nitrogen",
        structure=str(tmp_path / "nitrogen.extxyz"),
        plan=(
            Rattle(count=2, widths=(0.02,)),
            Rattle(count=1, widths=(0.8,)),
            MolecularDynamics(temperatures=(100.0,), strains=(0.02,), frames=1, interval=5),
        ),
        molecule_plan=(Rattle(count=1, widths=(0.02,)),),
        seed=4,
        method="gfn1-xtb",
        vacuum=4.0,
    )
    report = build(recipe, tmp_path / "first.extxyz", processes=2)
    assert report.labelled == 6
    assert [rejection.frame for rejection in report.rejected] == [3]
    frames = ase.io.read(report.target, ":")
    assert Counter(f.info["group"] for f in frames) == {"start": 1, "rattle": 2, "md": 1, "molecule": 2}
    assert np.abs(frames[0].get_forces()).max() < 0.02
    assert np.abs(frames[4].get_forces()).max() < 0.02

    again = build(recipe, tmp_path / "first.extxyz")
    assert (again.reused, again.sha256) == (6, report.sha256)
    assert build(recipe, tmp_path / "second.extxyz").sha256 == report.sha256


def test_build_names_unknown_recipes(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="unknown recipe 'benzene'; known are naphthalene"):
        build("benzene", tmp_path / "out.extxyz")


# --- the embedded set ---


def test_embedded_file_is_the_documented_one() -> None:
    path = data_dir() / "naphthalene.extxyz"
    (documented,) = re.findall(r"`([0-9a-f]{64})`", (data_dir() / "README.md").read_text())
    assert sha256_file(path) == documented


def test_embedded_set_is_what_the_readme_says(embedded: list[Atoms]) -> None:
    assert Counter(frame.info["group"] for frame in embedded) == {
        "start": 1,
        "rattle": 36,
        "strain": 43,
        "md": 40,
        "molecule": 10,
    }
    dataset = load_dataset("naphthalene")
    assert len(dataset.crystals()) == 120
    assert dataset.level_of_theory.startswith("GFN2-xTB, tblite ")
    crystals = dataset.crystals()
    per_atom = crystals.energies / crystals.n_atoms
    assert 0.05 < np.ptp(per_atom) < 0.2
    lengths = np.linalg.norm(np.concatenate(crystals.forces), axis=1)
    assert (lengths < 2).mean() > 0.8
    assert 5 < lengths.max() < 17
    kept, _ = screen(dataset.crystals().frames, dataset.frames[0])
    assert len(kept) == 120


def test_embedded_labels_are_reproduced(embedded: list[Atoms], tmp_path: Path) -> None:
    chosen = [embedded[50], embedded[-1]]
    report = label(chosen, method("gfn2-xtb"), tmp_path / "again.extxyz")
    for stored, found in zip(chosen, ase.io.read(report.target, ":"), strict=True):
        assert found.get_potential_energy() == pytest.approx(stored.get_potential_energy(), abs=1e-5)
        assert found.get_forces() == pytest.approx(stored.get_forces(), abs=1e-4)
        assert found.get_stress() == pytest.approx(stored.get_stress(), abs=1e-5)


def test_embedded_geometries_are_reproduced_from_their_seed(embedded: list[Atoms]) -> None:
    recipe = RECIPES["naphthalene"]
    crystals, molecules = embedded[:120], embedded[120:]
    *plan, dynamics = recipe.plan
    for start, steps, seed, stored in (
        (crystals[0], plan, recipe.seed, crystals[:80]),
        (molecules[0], recipe.molecule_plan, recipe.seed + 1, molecules),
    ):
        for frame, expected in zip(perturb(start, steps, seed), stored, strict=True):
            assert frame.positions == pytest.approx(expected.positions, abs=1e-6)
            assert frame.cell.array == pytest.approx(expected.cell.array, abs=1e-6)
            assert frame.info["seed"] == expected.info["seed"]
    assert isinstance(dynamics, MolecularDynamics)


@pytest.mark.slow
def test_embedded_dynamics_is_reproduced_from_its_seed(embedded: list[Atoms]) -> None:
    recipe = RECIPES["naphthalene"]
    dynamics = recipe.plan[-1]
    assert isinstance(dynamics, MolecularDynamics)
    stored = embedded[80]
    assert stored.info["group"] == "md"
    short = replace(dynamics, frames=1)
    frame = short.run(embedded[0], 0, int(stored.info["seed"]), method(recipe.sampler).make)[0]
    assert frame.positions == pytest.approx(stored.positions, abs=1e-6)
