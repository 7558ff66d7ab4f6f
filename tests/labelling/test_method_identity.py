from __future__ import annotations

import functools
import json
import sys
from pathlib import Path

import ase.io
import pytest
from ase import Atoms

from helpers.labelling_calculators import Make, MakeArgon, Springs, Witness, atoms_in_a_box
from tlmc.errors import ConfigError
from tlmc.labelling import Method, identified, label, method
from tlmc.labelling.identity import facts, settings_of
from tlmc.labelling.labels import LabelReport

ARGON = """\
import os
from pathlib import Path

from ase.calculators.lj import LennardJones
from my_settings import SIGMA

DEPTH = 0.01


def calculator():
    rc = float(Path(__file__).with_name("cutoff.txt").read_text())
    return LennardJones(sigma=SIGMA, epsilon=DEPTH * float(os.environ.get("MY_SCALE", "1")), rc=rc)


def for_frame(atoms):
    return calculator()
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A method of one's own: a file, a module beside it, a file of data."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delenv("MY_SCALE", raising=False)
    folder = tmp_path / "own"
    folder.mkdir()
    (folder / "my_argon.py").write_text(ARGON)
    (folder / "my_settings.py").write_text("SIGMA = 3.4\n")
    (folder / "cutoff.txt").write_text("8.0\n")
    return folder / "my_argon.py"


def dimer() -> list[Atoms]:
    return [Atoms("Ar2", [[0, 0, 0], [0, 0, 3.7]])]


def run(own: Path, target: Path, function: str = "calculator") -> tuple[LabelReport, float]:
    report = label(dimer(), method(f"{own}:{function}", "Lennard-Jones"), target)
    return report, float(ase.io.read(target).get_potential_energy())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("function", "changed", "reason"),
    [
        ("calculator", "file", "file my_argon.py"),
        ("calculator", "module", "file my_settings.py"),
        ("calculator", "data", "file cutoff.txt"),
        ("for_frame", "variable", "variable MY_SCALE"),
    ],
)
def test_a_changed_method_labels_anew_and_says_why(
    own: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    function: str,
    changed: str,
    reason: str,
) -> None:
    target = tmp_path / "out.extxyz"
    _, before = run(own, target, function)
    first = target.read_bytes()
    match changed:
        case "file":
            own.write_text(ARGON.replace("0.01", "0.02"))
        case "module":
            (own.parent / "my_settings.py").write_text("SIGMA = 3.5\n")
        case "data":
            (own.parent / "cutoff.txt").write_text("4.0\n")
        case "variable":
            monkeypatch.setenv("MY_SCALE", "2")
    report, after = run(own, target, function)
    assert (report.labelled, report.reused, report.outdated) == (1, 0, 1)
    assert after != pytest.approx(before, rel=1e-3)
    assert "1 frames have labels of another method or of an earlier form of Lennard-Jones" in caplog.text
    assert reason in caplog.text.partition("changed: ")[2].partition(")")[0].split(", ")
    # nothing of what was there is gone
    parts = tmp_path / "out.extxyz.parts"
    [kept] = parts.glob("*-out.extxyz")
    assert kept.read_bytes() == first
    assert len(list(parts.glob("[0-9a-f]*-*.json"))) == 2
    match changed:
        case "file":
            own.write_text(ARGON)
        case "module":
            (own.parent / "my_settings.py").write_text("SIGMA = 3.4\n")
        case "data":
            (own.parent / "cutoff.txt").write_text("8.0\n")
        case "variable":
            monkeypatch.delenv("MY_SCALE")
    report, again = run(own, target, function)
    assert (report.reused, again) == (1, before)


@pytest.mark.slow
def test_what_is_no_part_of_the_method_does_not_change_it(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    known = facts(method(f"{own}:calculator"))
    (own.parent / "unused.py").write_text("SIGMA = 1\n")
    (own.parent / "notes.txt").write_text("nothing\n")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("ASE_VASP_COMMAND", "mpirun -np 8 vasp")
    monkeypatch.chdir(own.parent)
    assert facts(method("my_argon.py:calculator")) == known
    moved = own.parent.rename(own.parent.with_name("elsewhere"))
    assert facts(method(f"{moved}/my_argon.py:calculator")) == known


@pytest.mark.slow
def test_identity_is_that_of_settings_and_versions(tmp_path: Path) -> None:
    gfn2 = identified(method("gfn2-xtb"), tmp_path)
    assert identified(gfn2, tmp_path) is gfn2
    known = json.loads((tmp_path / f"method-{gfn2.identity}.json").read_text())
    assert set(known) == {"level of theory", "factory", "tblite"}
    assert identified(method("gfn1-xtb"), tmp_path).identity != gfn2.identity
    emt = facts(method("ase.calculators.emt:EMT"))
    assert {"version of ase", "calculator"} <= set(emt)
    springs = facts(Method("springs", Make(pause=0.1)))
    assert springs["setting pause"] == "0.1"
    assert "file labelling_calculators.py" in springs
    assert facts(Method("springs", Make(pause=0.2))) != springs
    assert facts(Method("springs", functools.partial(Springs, "", 0.1)))["setting pause"] == "0.1"
    assert facts(Method("argon", MakeArgon()))["setting sigma"] == "3.4"


def test_weights_of_a_network_are_settings() -> None:
    import torch

    digests = set()
    for bias in (0.0, 0.0, 0.1):
        network = torch.nn.Linear(2, 1)
        torch.nn.init.zeros_(network.weight)
        torch.nn.init.constant_(network.bias, bias)
        calculator = Witness()
        calculator.models = [network]
        digests.add(settings_of(calculator)["setting models"])
    assert len(digests) == 2


@pytest.mark.slow
def test_a_method_that_is_not_there_gets_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text("def calculator(:\n")
    for name, sentence in {
        f"{tmp_path}/mine.py:calculator": "no calculator at '.*mine.py:calculator'",
        f"{tmp_path}/broken.py:calculator": "no calculator at '.*broken.py:calculator' .*invalid syntax",
        "no_such_module:calculator": "no calculator at 'no_such_module:calculator'",
        "ase.calculators.emt:EMTT": "no calculator at 'ase.calculators.emt:EMTT'",
    }.items():
        with pytest.raises(ConfigError, match=sentence):
            label(atoms_in_a_box(1), method(name), tmp_path / "out.extxyz")
    with pytest.raises(ConfigError, match="the level of theory of gfn2-xtb has its own name, got 'better'"):
        method("gfn2-xtb", "better")
