"""Every mistake is made in a right set: the same test shows that right labels pass and that wrong ones are named."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pytest
from ase import Atoms, units
from ase.build import molecule
from ase.collections import g2
from ase.optimize import FIRE
from scipy.spatial.transform import Rotation
from typer.testing import CliRunner

from tlmc.cli import app
from tlmc.data.checks import check_dataset
from tlmc.data.dataset import Dataset
from tlmc.data.loading import load_dataset
from tlmc.errors import DataError, Interrupted
from tlmc.evaluation.label_check import check_labels, with_checked_stresses
from tlmc.experiments.experiment import convergence, run_experiment
from tlmc.families.ani import relabel, scratch
from tlmc.potentials import Potential, TlmcCalculator, predict
from tlmc.potentials.borrowing import THESIS_DONORS
from tlmc.thesis.casestudy import CaseStudy
from tlmc.training.config import recipe
from tlmc.units import BOHR, HARTREE, KCAL_PER_MOL

Change = Callable[[Dataset], Dataset]


@pytest.fixture(scope="module")
def crystals() -> Dataset:
    """Forty frames of one crystal, labelled by GFN2-xTB."""
    return thinned(load_dataset("naphthalene").crystals(), 3)


@pytest.fixture(scope="module")
def ethanol() -> Dataset:
    return thinned(load_dataset("ethanol"), 25)


def thinned(data: Dataset, step: int) -> Dataset:
    """Return a set as if a file held these frames only."""
    few = data.subset(np.arange(0, len(data) - step + 1, step))
    return replace(few, frame_numbers=np.arange(len(few)))


def scaled(energy: float, force: float) -> Change:
    return lambda data: replace(
        data, energies=data.energies * energy, forces=tuple(forces * force for forces in data.forces)
    )


def ordered(order: Callable[[int], Sequence[int]]) -> Change:
    def change(data: Dataset) -> Dataset:
        new = order(len(data))
        return replace(data, energies=data.energies[new], forces=tuple(data.forces[k] for k in new))

    return change


def shifted(step: int) -> Change:
    return ordered(lambda n: np.roll(np.arange(n), step))


def moved(factor: float, with_cell: bool = True) -> Change:
    def change(data: Dataset) -> Dataset:
        frames = [frame.copy() for frame in data.frames]
        for frame in frames:
            frame.positions *= factor
            frame.cell *= factor if with_cell else 1.0
        return replace(data, frames=tuple(frames))

    return change


def turned(data: Dataset) -> Dataset:
    """Turn the positions of every frame otherwise, as a standard orientation does."""
    frames = []
    for frame, turn in zip(data.frames, Rotation.random(len(data), rng=1).as_matrix(), strict=True):
        frames.append(Atoms(frame.numbers, frame.positions @ turn, cell=frame.cell.array @ turn, pbc=frame.pbc))
    return replace(data, frames=tuple(frames))


def with_columns(columns: list[int]) -> Change:
    return lambda data: replace(data, forces=tuple(forces[:, columns] for forces in data.forces))


def other_atoms(data: Dataset) -> Dataset:
    order = np.random.default_rng(3).permutation(data.n_atoms[0])
    return replace(data, forces=tuple(forces[order] for forces in data.forces))


def both(first: Change, second: Change) -> Change:
    return lambda data: second(first(data))


def one_in_four(n: int) -> Sequence[int]:
    order = np.arange(n)
    order[::4] = np.roll(order[::4], 1)
    return order


KCAL = 1 / KCAL_PER_MOL
WRONG: dict[str, tuple[Change, str]] = {
    "labels of the frame before": (shifted(1), "labels are shifted by 1 frame, those of frame .* stand at"),
    "labels of three frames on": (shifted(-3), "labels are shifted by 3 frames"),
    "any order": (ordered(lambda n: np.random.default_rng(5).permutation(n)), "labels are in another order than"),
    "backwards": (ordered(lambda n: np.arange(n)[::-1]), "labels are in another order than frames"),
    "a quarter": (
        ordered(one_in_four),
        "those of others: the labels of frame|in another order",
    ),
    "gradients": (scaled(1, -1), "their sign is reversed, as that of gradients is; multiply the forces by -1"),
    "kcal/mol": (scaled(KCAL, KCAL), "as if in kcal/mol/Angstrom; give their units, e.g. --units kcal/mol/Angstrom"),
    "kJ/mol": (scaled(4.184 * KCAL, 4.184 * KCAL), "as if in kJ/mol/Angstrom"),
    "Hartree/Bohr": (scaled(1 / HARTREE, BOHR / HARTREE), "as if in Hartree/Bohr; .* --units Hartree/Bohr"),
    "Hartree/Angstrom": (scaled(1 / HARTREE, 1 / HARTREE), "as if in Hartree/Angstrom or .* --units Hartree/Angstrom"),
    "Rydberg/Bohr": (scaled(1 / units.Rydberg, BOHR / units.Rydberg), "as if in Rydberg/Bohr"),
    "energies in eV": (scaled(1, BOHR / HARTREE), "as if in Hartree/Bohr"),
    "gradients, Hartree": (scaled(1 / HARTREE, -BOHR / HARTREE), "sign is reversed.*, and they are .* in Hartree/Bohr"),
    "turned": (turned, "positions and forces are turned against each other"),
    "columns z x y": (with_columns([2, 0, 1]), "positions and forces are turned against each other"),
    "columns y x z": (with_columns([1, 0, 2]), "positions and forces are turned against each other"),
    "order of atoms": (other_atoms, "forces are in another order of the atoms, that of atom .* stands at atom"),
    "Bohr": (moved(1 / BOHR), "positions.* are in Bohr; multiply them by 0.529177"),
    "Bohr, Hartree": (
        both(moved(1 / BOHR), scaled(1 / HARTREE, BOHR / HARTREE)),
        "in Bohr, and they are .* Hartree/Bohr",
    ),
    "Bohr, shifted": (both(moved(1 / BOHR), shifted(1)), "are in Bohr, and labels are shifted by 1 frame"),
    "converted twice": (moved(BOHR), "are in Angstrom divided by 1.88973; multiply them by 1.88973"),
}


@pytest.mark.slow
@pytest.mark.parametrize("mistake", WRONG)
@pytest.mark.parametrize("name", ["crystals", "ethanol"])
def test_mistakes_are_named(name: str, mistake: str, ani2xt: Potential, request: pytest.FixtureRequest) -> None:
    right: Dataset = request.getfixturevalue(name)
    change, sentence = WRONG[mistake]
    with pytest.raises(DataError, match=rf"{right.source}: the forces .*{sentence}.*; --trust-labels"):
        check_labels(change(right), ani2xt)
    report = check_labels(change(right), ani2xt, trust=True)
    assert report.certain
    # the same labels on their own frames
    report = check_labels(right, ani2xt)
    assert not report.finding
    assert report.correlation > 0.95
    assert 0.85 < report.slope < 1.05


def test_energies_of_other_frames_are_found_beside_right_forces(crystals: Dataset, ani2xt: Potential) -> None:
    wrong = replace(crystals, energies=np.roll(crystals.energies, 1))
    with pytest.raises(DataError, match="the energies are shifted by 1 frame against the forces"):
        check_labels(wrong, ani2xt)
    upside_down = replace(crystals, energies=2 * crystals.energies.mean() - crystals.energies)
    with pytest.raises(DataError, match="the energies rise where those of ani2xt fall"):
        check_labels(upside_down, ani2xt)


def test_one_molecule_among_several_is_found(ethanol: Dataset, ani2xt: Potential) -> None:
    def several(wrong: str) -> Dataset:
        rng, frames, forces, energies = np.random.default_rng(0), [], [], []
        for name in ("CH3OH", "C2H6", "CH3CHO", "HCOOH"):
            own = [molecule(name) for _ in range(8)]
            for frame in own:
                frame.rattle(0.06, rng=rng)
            predicted = predict(ani2xt, own).forces
            energies += predict(ani2xt, own).energies.tolist()
            frames += own
            forces += [-force for force in predicted] if name == wrong else list(predicted)
        n = len(frames)
        none = (None,) * n
        return Dataset(tuple(frames), np.array(energies), tuple(forces), none, "m", "m.xyz", "", "", np.arange(n))

    assert not check_labels(several(""), ani2xt).finding
    with pytest.raises(DataError, match="the first is frame 1[6-9]|the first is frame 2[0-3]"):
        check_labels(several("CH3CHO"), ani2xt)


def some_frames(wrong: Callable[[int], bool], factor: float) -> Change:
    return lambda data: replace(
        data, forces=tuple(force * (factor if wrong(k) else 1) for k, force in enumerate(data.forces))
    )


def some_energies(change: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> Change:
    return lambda data: replace(data, energies=change(data.energies, np.arange(len(data))))


def resting_carbon(data: Dataset) -> Dataset:
    """Let hydrogen alone have forces, which add up to zero, as if a code had taken its drift away."""
    forces = []
    for frame, force in zip(data.frames, data.forces, strict=True):
        free = (frame.numbers == 1)[:, None]
        forces.append(np.where(free, force - force[free[:, 0]].mean(axis=0), 0.0))
    return replace(data, forces=tuple(forces))


MIXED: dict[str, tuple[Change, str]] = {
    "some gradients": (some_frames(lambda k: k % 3 == 0, -1), "are of reversed sign, as gradients are: of frame"),
    "half in Hartree": (some_frames(lambda k: k < 20, BOHR / HARTREE), "are in another unit: of frame"),
    "half not computed": (some_frames(lambda k: k % 2 == 0, 0.0), "exactly zero on . of . atoms|on .. of .. atoms"),
    "one not computed": (some_frames(lambda k: k == 7, 0.0), "the forces of frame 7 are exactly zero on"),
    "fixed atoms": (resting_carbon, r"e.g. .* eV/A on atom \d+ \([CO]\), and so in .*: constraints have changed them"),
    "one energy": (some_energies(lambda e, k: np.full_like(e, e[0])), "energies of .* are all .* they are no labels"),
    "energies in kcal/mol": (some_energies(lambda e, k: (e - e[0]) * KCAL), "2[0-9].* times .* as if in kcal/mol"),
    "energies in Hartree": (some_energies(lambda e, k: e / HARTREE), "0.03.* times .* as if in Hartree"),
    "two codes": (
        some_energies(lambda e, k: e - 0.04 * e * (k > 25)),
        "have two zeros, .*take labels of one code, method and charge",
    ),
}


@pytest.mark.parametrize("mistake", MIXED)
@pytest.mark.parametrize("name", ["crystals", "ethanol"])
def test_mistakes_in_some_frames_or_in_energies_alone_are_named(
    name: str, mistake: str, ani2xt: Potential, request: pytest.FixtureRequest
) -> None:
    change, sentence = MIXED[mistake]
    with pytest.raises(DataError, match=rf"({sentence}).*; --trust-labels"):
        check_labels(change(request.getfixturevalue(name)), ani2xt)


def test_cells_written_as_columns_and_elements_exchanged_are_said(crystals: Dataset, ani2xt: Potential) -> None:
    columns = [Atoms(f.numbers, f.positions, cell=f.cell.array.T, pbc=True) for f in crystals.frames]
    with pytest.raises(DataError, match="rows and columns of the cells are exchanged; write cell vectors as rows"):
        check_labels(replace(crystals, frames=tuple(columns)), ani2xt)
    frames = load_dataset("32-like").crystals().subset(np.arange(40))
    exchanged = [frame.copy() for frame in frames.frames]
    for frame in exchanged:
        frame.numbers[:] = np.select([frame.numbers == 6, frame.numbers == 8], [8, 6], frame.numbers)
    report = check_labels(replace(frames, frames=tuple(exchanged)), ani2xt)
    assert "none of the usual mistakes explains it" in report.finding


def test_energies_that_scatter_and_few_frames_in_other_units_are_said(crystals: Dataset, ani2xt: Potential) -> None:
    noise = np.random.default_rng(0).normal(scale=20.0, size=len(crystals))
    report = check_labels(replace(crystals, energies=crystals.energies + noise), ani2xt)
    assert not report.certain
    assert "the energies of C5H4 scatter by" in report.finding
    two = scaled(1 / HARTREE, BOHR / HARTREE)(crystals.subset(np.arange(2)))
    assert "as if in Hartree/Bohr" in check_labels(two, ani2xt, trust=True).finding


def test_energies_of_many_substances_in_another_unit_are_found(ani2x: Potential, ani2xt: Potential) -> None:
    rng, frames = np.random.default_rng(0), []
    for name in g2.names:
        frame = molecule(name)
        if len(frame) > 2 and {*frame.symbols} <= {"H", "C", "N", "O"}:
            frame.rattle(0.06, rng=rng)
            frames.append(frame)
    labels, n = predict(ani2x, frames), len(frames)
    right = Dataset(tuple(frames), labels.energies, labels.forces, (None,) * n, "g2", "g2", "", "", np.arange(n))
    assert not check_labels(right, ani2xt).finding
    with pytest.raises(DataError, match="energies change from frame to frame 0.0[34].* as if in Hartree"):
        check_labels(scaled(1 / HARTREE, 1)(right), ani2xt)


def test_units_of_the_file_are_those_that_labels_are_compared_in(ethanol: Dataset, ani2xt: Potential) -> None:
    # eV in a file that says it were Hartree, or kcal/mol
    for units_said, factors in (
        ("Ha, Ha/Bohr; stress in GPa", (1.0, HARTREE / BOHR)),
        ("kcal/mol, kcal/mol/Angstrom", (1.0, KCAL_PER_MOL)),
        ("kcal/mol", (1.0, KCAL_PER_MOL)),
    ):
        with pytest.raises(DataError, match="as if in eV/Angstrom; give their units, e.g. --units eV/Angstrom"):
            check_labels(replace(scaled(*factors)(ethanol), units=units_said), ani2xt)


def test_relaxations_pass(ani2x: Potential, ani2xt: Potential) -> None:
    """Steps of a relaxation are alike, so that the energies of one fit the next by chance."""
    frame, steps = load_dataset("naphthalene").crystals().frames[5].copy(), []
    frame.calc = TlmcCalculator(ani2x)
    search = FIRE(frame, logfile=None)
    search.attach(lambda: steps.append(Atoms(frame.numbers, frame.positions, cell=frame.cell, pbc=True)))
    search.run(0.01, 60)
    few = steps[-14:]
    labels = predict(ani2x, few)
    tail = Dataset(
        tuple(few), labels.energies, labels.forces, labels.stresses, "r", "r.traj", "", "", np.arange(len(few))
    )
    report = check_labels(tail, ani2xt)
    assert not report.finding
    assert not report.stress.is_wrong


@pytest.mark.slow
@pytest.mark.needs_mirror
def test_parts_of_public_sets_pass(ani2x: Potential, ani2xt: Potential, caplog: pytest.LogCaptureFixture) -> None:
    """Frames that are alike, sorted or few, which chance made look wrong."""
    for name, model, few in (
        ("02_acetic_acid", ani2xt, lambda data: np.argsort(data.energies / data.n_atoms)[:40]),
        ("14_oxalic_acid_alpha", ani2x, lambda data: np.sort(np.argsort([np.std(f) for f in data.forces])[:40])),
        ("04_ammonia", ani2xt, lambda data: [13, 30, 110, 127]),
        ("04_ammonia", ani2xt, lambda data: np.argsort(data.energies / data.n_atoms)[:12]),
        ("21_urea", ani2x, lambda data: [10, 128, 153, 162]),
    ):
        data = load_dataset(f"molcrys-mace/{name}")
        part = data.subset(np.asarray(few(data)))
        check_dataset(part)
        report = check_labels(part, model)
        assert not report.certain
        assert not report.stress.is_wrong
    # said of geometries that are only tried, as positions in Bohr
    assert "too close" not in caplog.text


def test_a_trajectory_in_small_steps_shifted_by_one_is_found(ani2xt: Potential) -> None:
    frame, frames = molecule("CH3OH"), []
    velocity = np.random.default_rng(2).normal(scale=0.02, size=(6, 3))
    for k in range(60):
        frame = frame.copy()
        frame.positions += velocity * np.cos(0.3 * k + np.arange(6)[:, None])
        frames.append(frame)
    labels = predict(ani2xt, frames)
    right = Dataset(tuple(frames), labels.energies, labels.forces, (None,) * 60, "md", "md.traj", "", "", np.arange(60))
    assert check_labels(right, ani2xt).correlation == pytest.approx(1.0)
    late = replace(right.subset(np.arange(59)), forces=right.forces[1:], energies=right.energies[1:])
    with pytest.raises(DataError, match="shifted by 1 frame"):
        check_labels(late, ani2xt)


def test_what_a_model_does_not_know_is_doubted_not_refused(
    crystals: Dataset, ani2xt: Potential, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "tlmc"):
        report = check_labels(crystals, scratch(ani2xt, 1))
    assert not report.certain
    # predictions of a random network are a hundred times too large, or nothing; both are no reason to refuse
    assert abs(report.correlation) < 0.5
    assert "none of the usual mistakes explains it" in caplog.text


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_small_sets_are_not_refused(crystals: Dataset, ethanol: Dataset, ani2xt: Potential, size: int) -> None:
    for right in (crystals, ethanol):
        for seed in range(4):
            few = right.subset(np.random.default_rng(seed).permutation(len(right))[:size])
            assert not check_labels(few, ani2xt).certain


def test_frames_at_rest_decide_nothing(ani2xt: Potential) -> None:
    whole = load_dataset("32-like")
    rest = whole.subset(np.argsort([np.abs(forces).max() for forces in whole.forces])[:8])
    assert not check_labels(rest, ani2xt).certain
    still = replace(rest, forces=tuple(0.01 * forces for forces in rest.forces))
    assert not check_labels(still, ani2xt).certain


def test_without_lively_frames_there_is_no_verdict(ani2xt: Potential) -> None:
    atom = Dataset((Atoms("H"),), np.zeros(1), (np.zeros((1, 3)),), (None,), "H", "H", "", "", np.arange(1))
    report = check_labels(atom, ani2xt)
    assert report.n_frames == 0
    assert report.line == "no frame that decides anything"
    assert not report.finding


@pytest.mark.parametrize("name", ["27-like", "28-like", "31-like", "32-like", "33-like", "ethanol", "naphthalene"])
@pytest.mark.parametrize("way", ["relabel", "extend"])
def test_embedded_sets_pass_borrowed_elements_included(name: str, way: str, ani2xt: Potential) -> None:
    data = load_dataset(name)
    mapping = {new: donor for new, donor in THESIS_DONORS.items() if new in data.elements}
    report = check_labels(data, ani2xt.with_elements(mapping, way))
    assert not report.finding
    assert report.correlation > 0.75
    if mapping:
        # the atoms that count tell what is wrong as well as if all elements were known
        with pytest.raises(DataError, match="labels are (shifted|in another order)"):
            check_labels(shifted(1)(data.crystals()), ani2xt.with_elements(mapping, way))


@pytest.mark.slow
@pytest.mark.needs_mirror
@pytest.mark.parametrize("start", ["ani2x", "ani2xt"])
def test_public_sets_pass(start: str, request: pytest.FixtureRequest) -> None:
    model = request.getfixturevalue(start)
    for name in ("04_ammonia", "15_oxalic_acid_beta", "21_urea"):
        report = check_labels(load_dataset(f"molcrys-mace/{name}"), model)
        assert not report.finding
        assert not report.stress.is_wrong
        assert report.correlation > 0.8


STRESSES: dict[str, tuple[Callable[[np.ndarray, float], np.ndarray], str]] = {
    "other sign": (lambda s, v: -s, r"are eV/A\^3, pressure positive, not"),
    "GPa": (lambda s, v: s / units.GPa, "are GPa, tension positive, not"),
    "GPa, other sign": (lambda s, v: -s / units.GPa, "are GPa, pressure positive, not"),
    "kbar of VASP": (
        lambda s, v: -(10 * s / units.GPa)[[0, 1, 2, 5, 3, 4]],
        "are kbar, pressure positive, in the order xx yy zz xy yz zx, not",
    ),
    "order of VASP": (lambda s, v: s[[0, 1, 2, 5, 3, 4]], "in the order xx yy zz xy yz zx, not"),
    "upper triangle": (lambda s, v: s[[0, 5, 4, 1, 3, 2]], "in the order xx xy xz yy yz zz, not"),
    "virials": (lambda s, v: -s * v, r"are eV \(virials\), pressure positive, not"),
}


@pytest.mark.parametrize("form", STRESSES)
def test_stresses_in_another_form_are_recognized(
    form: str, crystals: Dataset, ani2xt: Potential, caplog: pytest.LogCaptureFixture
) -> None:
    write, sentence = STRESSES[form]
    stresses = tuple(
        None if stress is None else write(stress, frame.cell.volume)
        for stress, frame in zip(crystals.stresses, crystals.frames, strict=True)
    )
    other = replace(crystals, stresses=stresses)
    with caplog.at_level(logging.WARNING, "tlmc"):
        report = check_labels(other, ani2xt)
    assert not report.finding
    assert report.stress.is_wrong
    assert sentence.replace("\\", "") in caplog.text
    found = with_checked_stresses(other, ani2xt)
    for stress, right in zip(found.stresses, crystals.stresses, strict=True):
        assert stress == pytest.approx(right)
    assert found.hash != other.hash
    # energies and forces are as they were, and what is right stays the same set
    assert found.forces == other.forces
    assert with_checked_stresses(crystals, ani2xt).hash == crystals.hash


def test_stresses_of_no_known_form_stay_as_read(crystals: Dataset, ani2xt: Potential) -> None:
    odd = replace(crystals, stresses=tuple(17.0 * stress for stress in crystals.stresses))
    report = check_labels(odd, ani2xt)
    assert "their unit is unknown; they stay as read" in report.stress.finding
    assert report.stress.stresses == odd.stresses
    none = replace(crystals, stresses=tuple(0.0 * stress for stress in crystals.stresses))
    assert "unit and sign are unchecked" in check_labels(none, ani2xt).stress.finding


def test_trainings_refuse_before_they_start(crystals: Dataset, ani2xt: Potential, tmp_path) -> None:
    wrong, config = shifted(1)(crystals), recipe("quick", epochs=1)
    with pytest.raises(DataError, match="labels are shifted"):
        run_experiment(ani2xt, wrong, config, run_dir=tmp_path / "run")
    assert not (tmp_path / "run").exists()
    with pytest.raises(DataError, match="labels are shifted"):
        convergence(ani2xt, [wrong], 1, {"one": {"epochs": 1}})
    with pytest.raises(DataError, match="labels are shifted"):
        CaseStudy(ani2xt, (wrong,))
    assert run_experiment(ani2xt, wrong, config, run_dir=tmp_path / "run", trust_labels=True).stages


def test_a_variable_goes_for_all_commands_and_notebooks(
    crystals: Dataset, ani2xt: Potential, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = shifted(2)(crystals)
    monkeypatch.setenv("TLMC_TRUST_LABELS", "1")
    assert check_labels(wrong, ani2xt).certain
    monkeypatch.setenv("TLMC_TRUST_LABELS", "0")
    with pytest.raises(DataError, match="labels are shifted by 2 frames"):
        check_labels(wrong, ani2xt)


def test_an_answer_is_kept_for_a_model_and_not_for_another(crystals: Dataset, ani2xt: Potential) -> None:
    assert check_labels(crystals, ani2xt) is check_labels(crystals.subset(np.arange(len(crystals))), ani2xt)
    assert check_labels(crystals, scratch(ani2xt, 0)) is not check_labels(crystals, ani2xt)
    assert check_labels(crystals, relabel(ani2xt, {"Si": "C"})) is not check_labels(crystals, ani2xt)


def test_the_command_line_says_it(tmp_path, ethanol: Dataset) -> None:
    path, lines = tmp_path / "hartree.extxyz", []
    for frame, energy, forces in zip(ethanol.frames, ethanol.energies, ethanol.forces, strict=True):
        lines += [str(len(frame)), f"Properties=species:S:1:pos:R:3:forces:R:3 energy={energy / HARTREE}"]
        rows = zip(frame.symbols, frame.positions, forces / HARTREE, strict=True)
        lines += [f"{symbol} {' '.join(map(repr, map(float, (*x, *f))))}" for symbol, x, f in rows]
    path.write_text("\n".join(lines) + "\n")
    run = CliRunner()
    shown = run.invoke(app, ["info", str(path)], env={"COLUMNS": "200"})
    assert "forces against ani2xt  correlation 0.98, slope 0.03" in shown.output
    for command in (["evaluate", "ani2xt", str(path)], ["finetune", str(path), "--epochs", "1"]):
        refused = run.invoke(app, command)
        assert refused.exit_code == 2
        assert "--units Hartree/Angstrom (units='Hartree/Angstrom'); --trust-labels" in refused.output
    assert run.invoke(app, ["evaluate", "ani2xt", str(path), "--trust-labels"]).exit_code == 0
    right = run.invoke(app, ["evaluate", "ani2xt", str(path), "--units", "Hartree/Angstrom"])
    assert right.exit_code == 0


@pytest.mark.parametrize("begin", [check_labels, lambda data, model: run_experiment(model, data, recipe("short"))])
def test_an_interrupt_is_one_sentence(crystals, ani2xt, monkeypatch, begin):
    def stop(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("tlmc.evaluation.label_check.predict", stop)
    untold = replace(crystals, energies=crystals.energies + 1.0)
    with pytest.raises(Interrupted, match="^interrupted while the labels of .* were compared with ani2xt: ") as caught:
        begin(untold, ani2xt)
    assert caught.value.__suppress_context__
