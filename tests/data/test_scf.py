from __future__ import annotations

import gzip
import re
from pathlib import Path

import ase
import pytest

from tlmc.data.loading import load_dataset, read_frames
from tlmc.errors import DataError

VASP = Path(ase.__file__).parent / "test" / "testdata" / "vasp"
UNCONVERGED = "aborting loop EDIFF was not reached (unconverged)"


def outcar(states: list[str], cut: bool = False, version: str = "6.4.2", most: int = 120) -> str:
    """Repeat the one ionic step of an OUTCAR, an atom moved, each ended as one of states says."""
    lines = (VASP / "OUTCAR_example_1").read_text().splitlines(keepends=True)
    begin = next(k for k, line in enumerate(lines) if "Iteration" in line)
    end = next(k for k, line in enumerate(lines) if "FREE ENERGIE OF THE" in line) + 6
    atom = next(k for k, line in enumerate(lines) if "POSITION          " in line) + 2
    head = "".join([lines[0].replace("5.3.3", version), *lines[1:begin]])
    steps = []
    for k, state in enumerate(states):
        x, *rest = lines[atom].split()
        moved = "   ".join([f"{float(x) + 0.02 * k:.5f}", *rest]) + "\n"
        step = "".join([*lines[begin:atom], moved, *lines[atom + 1 : end]])
        steps.append(step.replace("aborting loop because EDIFF is reached", state))
    if cut:
        steps[-1] = steps[-1][: len(steps[-1]) // 2]
    return re.sub(r"NELM   =    120", f"NELM   =    {most:3d}", head) + "".join(steps)


REACHED = "aborting loop because EDIFF is reached"


@pytest.mark.parametrize("name", ["OUTCAR", "OUTCAR.gz"])
@pytest.mark.parametrize("state", [UNCONVERGED, "aborting loop because hard stop was set"])
def test_unconverged_steps_of_outcar_are_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str, state: str
) -> None:
    content = outcar([REACHED, state, REACHED, state]).encode()
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    dataset = load_dataset(tmp_path / name)
    assert dataset.frame_numbers.tolist() == [0, 2]
    sentence = f"{name}: frame 1 is left out, its electronic steps did not converge ({state}) (and 1 more frame)"
    assert sentence in caplog.text
    # structures alone are read as before
    assert len(read_frames(tmp_path / name)) == 4


def test_converged_steps_are_not_suspected(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "OUTCAR").write_text(outcar([REACHED, REACHED], version="5.4.4"))
    assert len(load_dataset(tmp_path / "OUTCAR")) == 2
    # version 6 says so where all its steps were not enough
    (tmp_path / "OUTCAR").write_text(outcar([REACHED, REACHED], version="6.4.2", most=63))
    assert len(load_dataset(tmp_path / "OUTCAR")) == 2
    assert "converge" not in caplog.text


def test_version_5_says_that_ediff_is_reached_where_it_is_not(tmp_path: Path) -> None:
    (tmp_path / "OUTCAR").write_text(outcar([REACHED], version="5.4.4", most=63))
    with pytest.raises(DataError, match=r"frame 0 is left out, .* \(all NELM = 63 electronic steps were used up"):
        load_dataset(tmp_path / "OUTCAR")


def test_a_step_that_is_not_finished_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "OUTCAR").write_text(outcar([REACHED, REACHED, REACHED], cut=True))
    assert len(load_dataset(tmp_path / "OUTCAR")) == 2
    assert "OUTCAR: ends within ionic step 3, which is not read" in caplog.text


def test_vasprun_that_used_up_its_steps_or_is_cut_off(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    content = (VASP / "vasprun_pstress.xml").read_text()
    steps = content.count("<scstep>")
    (tmp_path / "vasprun.xml").write_text(re.sub(r'("NELM">\s*)60', rf"\g<1>{steps}", content))
    with pytest.raises(DataError, match=rf"frame 0 is left out, .* \(all NELM = {steps} electronic steps"):
        load_dataset(tmp_path / "vasprun.xml")
    (tmp_path / "vasprun.xml").write_text(content[: content.rindex("</calculation>")])
    assert len(load_dataset(tmp_path / "vasprun.xml")) == 1
    assert "vasprun.xml: is cut off in or after ionic step 1" in caplog.text


def test_what_ase_warns_of_is_passed_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    content = outcar([REACHED, REACHED])
    start = content.index("in kB")
    content = content[: start + 8] + "**********" + content[start + 18 :]
    (tmp_path / "OUTCAR").write_text(content)
    dataset = load_dataset(tmp_path / "OUTCAR")
    assert [stress is None for stress in dataset.stresses] == [True, False]
    assert "OUTCAR: ASE says: Found badly formatted stress line. Setting stress to None." in caplog.text


def test_complaints_of_other_programs_are_passed_on(tmp_path: Path) -> None:
    from tlmc.data.scf import read_convergence

    (tmp_path / "a.out").write_text("Program PWSCF\n     convergence NOT achieved after 100 iterations: stopping\n")
    found = read_convergence(tmp_path / "a.out", "espresso-out")
    assert found.remarks == ["line 2 says: convergence NOT achieved after 100 iterations: stopping"]
    assert read_convergence(tmp_path / "a.out", "extxyz") == ({}, [])
