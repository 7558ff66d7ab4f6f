from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import ase.io
import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk
from numpy.random import default_rng
from typer.testing import CliRunner

from helpers.labelling_calculators import Make, MakeArgon, Wrong, atoms_in_a_box
from tlmc.cli import app
from tlmc.errors import ConfigError, DataError
from tlmc.files import sha256_file
from tlmc.labelling import Method, MolecularDynamics, Rattle, Recipe, build, label, method, relax


def parts_of(target: Path) -> Path:
    return target.with_name(target.name + ".parts")


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


def test_a_file_that_was_not_labelled_here_is_not_replaced(tmp_path: Path) -> None:
    target = tmp_path / "mine.extxyz"
    target.write_text("mine")
    for make in (lambda: label(atoms_in_a_box(1), Method("springs", Make()), target), lambda: build("ethanol", target)):
        with pytest.raises(ConfigError, match=r"mine\.extxyz exists, was not labelled here, and would be replaced"):
            make()
    assert [path.name for path in tmp_path.iterdir()] == ["mine.extxyz"]
    assert target.read_text() == "mine"


@pytest.mark.slow
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


@pytest.mark.slow
def test_failed_scf_is_counted_named_and_tried_again_only_on_request(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    target = tmp_path / "out.extxyz"
    frames = atoms_in_a_box(5)
    springs = Method("springs", Make("scf", mended=str(tmp_path / "mended")))
    report = label(frames, springs, target)
    assert [failure.frame for failure in report.failed] == [3, 4]
    assert report.failed[0].reason == "SCFError: SCF not converged in 250 cycles"
    assert report.labelled == 3
    assert [frame.info["place"] for frame in ase.io.read(target, ":")] == [0, 1, 2]
    assert "frame 3 has no label: SCFError: SCF not converged" in caplog.text

    (tmp_path / "mended").touch()
    again = label(frames, springs, target)
    assert (again.reused, again.failed) == (5, report.failed)
    retried = label(frames, springs, target, retry_failed=True)
    assert (retried.labelled, retried.reused, retried.failed) == (5, 3, ())


@pytest.mark.slow
def test_files_of_the_calculator_are_kept_apart_and_copies_computed_once(tmp_path: Path) -> None:
    target = tmp_path / "out.extxyz"
    frames = atoms_in_a_box(2)
    report = label([*frames, frames[0]], Method("springs", Make()), target)
    assert report.labelled == 3
    calls = sorted(parts_of(target).glob("*/calls"))
    assert [call.read_text() for call in calls] == 2 * ["called\n"]


@pytest.mark.slow
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


@pytest.mark.slow
def test_label_refuses_nothing_to_do(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no frames to label"):
        label([], Method("springs", Make()), tmp_path / "out.extxyz")
    with pytest.raises(ConfigError, match="processes must be at least 1, got 0"):
        label(atoms_in_a_box(1), Method("springs", Make()), tmp_path / "out.extxyz", processes=0)


@pytest.mark.slow
def test_a_killed_run_resumes_to_the_same_file(tmp_path: Path) -> None:
    target, undisturbed = tmp_path / "killed.extxyz", tmp_path / "undisturbed.extxyz"
    script = (
        "import sys\n"
        "from pathlib import Path\n"
        "from tlmc.labelling import Method, label\n"
        "from helpers.labelling_calculators import Make, atoms_in_a_box\n"
        f"label(atoms_in_a_box(12), Method('springs', Make(pause=0.4)), Path({str(target)!r}), processes=2)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", script], start_new_session=True)
    limit = time.monotonic() + 120
    while len(list(parts_of(target).glob("[0-9a-f]*-*.json"))) < 3:
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < limit
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    while (left := subprocess.run(["pgrep", "-s", str(process.pid)], capture_output=True, check=False).stdout) != b"":
        assert time.monotonic() < limit, f"worker processes {left!r} outlive the run"
        time.sleep(0.1)
    assert not target.exists()

    report = label(atoms_in_a_box(12), Method("springs", Make(pause=0.4)), target)
    assert 3 <= report.reused < 12
    label(atoms_in_a_box(12), Method("springs", Make()), undisturbed)
    assert target.read_bytes() == undisturbed.read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("group", [True, False])
def test_ctrl_c_keeps_what_is_done_and_calls_nothing_failed(tmp_path: Path, group: bool) -> None:
    (tmp_path / "code.py").write_text(
        "import subprocess\n"
        "from helpers.labelling_calculators import Springs\n\n\n"
        "class Code(Springs):\n"
        "    def calculate(self, *arguments):\n"
        "        # like the programs behind ASE, which Ctrl-C ends too\n"
        "        subprocess.run(['sleep', '0.4'], check=True)\n"
        "        super().calculate(*arguments)\n\n\n"
        "def calculator():\n"
        "    return Code()\n"
    )
    ase.io.write(tmp_path / "frames.extxyz", atoms_in_a_box(40))
    target = tmp_path / "out.extxyz"
    command = [sys.executable, "-m", "tlmc.cli", "label", "frames.extxyz", "-o", "out.extxyz"]
    command += ["--method", "code.py:calculator", "--processes", "2"]
    process = subprocess.Popen(command, cwd=tmp_path, start_new_session=True, stderr=subprocess.PIPE, text=True)
    limit = time.monotonic() + 120
    while len(list(parts_of(target).glob("[0-9a-f]*-*.json"))) < 3:
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < limit
        time.sleep(0.02)
    (os.killpg if group else os.kill)(process.pid, signal.SIGINT)
    errors = process.communicate(timeout=60)[1]
    assert process.returncode == 130, errors
    assert "Traceback" not in errors
    done = [json.loads(part.read_text()) for part in parts_of(target).glob("[0-9a-f]*-*.json")]
    assert 3 <= len(done) < 40
    assert not any(part["error"] for part in done)
    assert not target.exists()


# --- files ---


@pytest.mark.slow
def test_a_file_of_anothers_is_never_replaced(tmp_path: Path) -> None:
    springs, target = Method("springs", Make()), tmp_path / "mine.extxyz"
    target.write_text("years of work\n")
    with pytest.raises(ConfigError, match=r"mine\.extxyz exists, was not labelled here, and would be replaced"):
        label(atoms_in_a_box(1), springs, target)
    with pytest.raises(ConfigError, match=r"mine\.extxyz exists, was not labelled here"):
        build("naphthalene", target)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.extxyz"]
    assert target.read_text() == "years of work\n"
    target.unlink()
    label(atoms_in_a_box(2), springs, target)
    label(atoms_in_a_box(3), springs, target)  # its own, and more than before
    assert not list(parts_of(target).glob("*-mine.extxyz"))
    before = target.read_bytes()
    label(atoms_in_a_box(1), springs, target)
    [kept] = parts_of(target).glob("*-mine.extxyz")
    assert kept.read_bytes() == before
    with target.open("a") as stream:
        stream.write("my notes\n")
    with pytest.raises(ConfigError, match=r"mine\.extxyz exists, was not labelled here"):
        label(atoms_in_a_box(1), springs, target)
    assert target.read_text().endswith("my notes\n")


@pytest.mark.parametrize(
    ("name", "sentence"),
    [("out.traj", "out.traj: labels are written as extxyz"), ("", "is a folder: name a file to write")],
)
def test_a_name_that_is_none_of_extxyz_is_refused(tmp_path: Path, name: str, sentence: str) -> None:
    for work in (
        lambda target: label(atoms_in_a_box(1), Method("springs", Make()), target),
        lambda t: build("ethanol", t),
    ):
        with pytest.raises(ConfigError, match=sentence):
            work(tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_structures_are_not_replaced_by_their_labels(tmp_path: Path) -> None:
    source = tmp_path / "frames.extxyz"
    ase.io.write(source, atoms_in_a_box(1))
    before = source.read_bytes()
    (tmp_path / "link.extxyz").symlink_to(source)
    for output in (source, tmp_path / "link.extxyz"):
        result = CliRunner().invoke(app, ["label", str(source), "-o", str(output)])
        assert result.exit_code == 2
        assert source.read_bytes() == before


@pytest.mark.slow
def test_what_lies_in_the_work_folder_stays(tmp_path: Path) -> None:
    target = tmp_path / "out.extxyz"
    parts_of(target).mkdir()
    (parts_of(target) / "notes.txt").write_text("mine")
    (parts_of(target) / "folder").mkdir()
    label(atoms_in_a_box(1), Method("springs", Make()), target)
    [part] = parts_of(target).glob("[0-9a-f]*-*.json")
    part.write_text("{")  # as a full disk leaves it
    assert label(atoms_in_a_box(1), Method("springs", Make()), target).reused == 0
    assert (parts_of(target) / "notes.txt").read_text() == "mine"
    assert (parts_of(target) / "folder").is_dir()


@pytest.mark.slow
def test_two_processes_do_not_label_into_one_folder(tmp_path: Path) -> None:
    target = tmp_path / "out.extxyz"
    script = (
        "import sys, time\n"
        "from pathlib import Path\n"
        "from tlmc.files import held\n"
        "from tlmc.labelling.labels import work_folder\n"
        f"with held(work_folder(Path({str(target)!r}), None)):\n"
        "    print('held', flush=True)\n"
        "    time.sleep(600)\n"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        with pytest.raises(DataError, match=r"another process is at work in .*out.extxyz.parts"):
            label(atoms_in_a_box(1), Method("springs", Make()), target)
        other.kill()
    assert label(atoms_in_a_box(1), Method("springs", Make()), target).labelled == 1


@pytest.mark.parametrize(
    ("frame", "sentence"),
    [
        (Atoms(), "frame 1 has no atoms"),
        (Atoms("H", [[np.nan, 0, 0]]), "frame 1 has positions or a cell that are not finite"),
        (Atoms("H", pbc=True), "frame 1 is periodic along a cell vector of no length"),
        (Atoms("H", info={"path": {1, 2}}), r"frame 1 cannot be written as extxyz for its info or arrays"),
    ],
)
def test_frames_that_cannot_be_labelled_are_named_before_work_starts(
    tmp_path: Path, frame: Atoms, sentence: str
) -> None:
    with pytest.raises(DataError, match=sentence):
        label([*atoms_in_a_box(1), frame], Method("springs", Make()), tmp_path / "out.extxyz")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_earlier_labels_give_way_to_the_new_ones(tmp_path: Path) -> None:
    frame = Atoms("NO", [[0, 0, 0], [0, 0, 1.15]], info={"energy": -1.0, "REF_energy": -2.0})
    frame.arrays["forces"] = np.ones((2, 3))
    label([frame], Method("springs", Make()), tmp_path / "out.extxyz")
    found = ase.io.read(tmp_path / "out.extxyz")
    assert found.get_potential_energy() == pytest.approx(0.5 * 1.15**2)
    assert found.get_forces() == pytest.approx(-frame.positions)
    assert found.info["REF_energy"] == -2.0


@pytest.mark.slow
def test_results_of_the_wrong_kind_are_no_labels(tmp_path: Path) -> None:
    frames = atoms_in_a_box(1)
    report = label(frames, Method("springs", Wrong("matrix")), tmp_path / "out.extxyz")
    assert ase.io.read(report.target).get_stress() == pytest.approx([1, 2, 3, 0, 0, 0])
    with pytest.raises(ConfigError, match=r"frame 0: calculator Springs returned forces of shape \(9,\), not \(3, 3\)"):
        label(frames, Method("springs", Wrong("flat")), tmp_path / "flat.extxyz")
    with pytest.raises(ConfigError, match=r"frame 0: calculator Springs returned energy 'low', which are no numbers"):
        label(frames, Method("springs", Wrong("text")), tmp_path / "text.extxyz")
    with pytest.raises(DataError, match="none of 1 frames .* Springs says that it is not converged"):
        label(frames, Method("springs", Wrong("vasp")), tmp_path / "vasp.extxyz")


@pytest.mark.slow
def test_tblite_fails_on_a_frame_and_not_on_the_others(tmp_path: Path) -> None:
    frames = [Atoms("H2", [[0, 0, 0], [0, 0, 0.74]]), Atoms("H2", [[0, 0, 0], [0, 0, 0]])]
    report = label(frames, method("gfn2-xtb"), tmp_path / "out.extxyz")
    assert report.labelled == 1
    assert [failure.frame for failure in report.failed] == [1]
    assert "Too close interatomic distances" in report.failed[0].reason


# --- recipes ---


@pytest.mark.slow
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
    with pytest.raises(ConfigError, match="unknown recipe 'benzene'; known are 27-like, .*naphthalene"):
        build("benzene", tmp_path / "out.extxyz")
