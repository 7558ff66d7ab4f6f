"""The case study on a folder laid out as the thesis' data: what is read, refused, trained, and written."""

from __future__ import annotations

import json
import logging
import shutil
from dataclasses import replace
from pathlib import Path

import ase.io
import numpy as np
import pandas as pd
import pytest
import yaml
from ase.calculators.singlepoint import SinglePointCalculator

from helpers.places import ROOT
from tlmc.data.analysis import packings
from tlmc.data.loading import load_dataset
from tlmc.errors import ConfigError, DataError, ModelError
from tlmc.evaluation import evaluate, ranking_table
from tlmc.experiments.records import read_records
from tlmc.paths import mirror_dir, reports_dir
from tlmc.potentials import predict
from tlmc.thesis import casestudy
from tlmc.thesis.casestudy import REFITTED, START, TUNED, CaseStudy, load_crystals


def write_trajectory(path, dataset):
    """Write a set as ASE trajectories keep DFT labels: calculator results."""
    frames = []
    for k, frame in enumerate(dataset.frames):
        frames.append(frame.copy())
        frames[-1].calc = SinglePointCalculator(frame, energy=dataset.energies[k], forces=dataset.forces[k])
    ase.io.write(path, frames)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return 27.traj (Si and I, isolated molecules among them) and 33.traj, a dozen frames each."""
    folder = tmp_path_factory.mktemp("own")
    write_trajectory(folder / "27.traj", load_dataset("27-like").subset([*range(0, 136, 11), 140]))
    write_trajectory(folder / "33.traj", load_dataset("33-like").crystals().subset(range(0, 141, 12)))
    (folder / "notes.txt").write_text("r2SCAN, 440 eV")
    (folder / ".hidden.traj").write_bytes(b"")
    return folder


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    """Send the trainings of this module to one folder, where later tests find them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TLMC_REPORTS_DIR", str(tmp_path_factory.mktemp("reports")))
        yield reports_dir()


@pytest.fixture(scope="module")
def case(folder, ani2xt, reports):
    crystals = load_crystals(casestudy.sources(folder))
    return CaseStudy(ani2xt, crystals, changes={"epochs": 1}, study="own")


class TestFiles:
    def test_trajectories_of_a_folder_in_the_order_of_their_numbers(self, folder, caplog):
        with caplog.at_level(logging.INFO, logger="tlmc"):
            files = casestudy.crystal_files(folder)
        assert [path.name for path in files] == ["27.traj", "33.traj"]
        assert "notes.txt: not read, only files ending in .traj" in caplog.text
        assert casestudy.sources(folder) == [str(path) for path in files]
        assert casestudy.sources(" 27-like, molcrys-mace/21_urea ,") == ["27-like", "molcrys-mace/21_urea"]

    def test_order_is_that_of_numbers(self, tmp_path):
        for name in ("27.traj", "9.extxyz.xz", "b.traj", "100.traj"):
            (tmp_path / name).write_bytes(b"x")
        found = [path.name for path in casestudy.crystal_files(tmp_path)]
        assert found == ["9.extxyz.xz", "27.traj", "100.traj", "b.traj"]

    def test_folders_that_say_nothing_or_two_things(self, tmp_path):
        with pytest.raises(DataError, match="is no folder"):
            casestudy.crystal_files(tmp_path / "none")
        (tmp_path / "readme.md").write_text("x")
        with pytest.raises(DataError, match=r"holds no trajectory \(.traj, .*\), but readme.md"):
            casestudy.crystal_files(tmp_path)
        for name in ("27.traj", "27.xyz.gz"):
            (tmp_path / name).write_bytes(b"x")
        with pytest.raises(DataError, match=r"27.traj and 27.xyz.gz name the same crystal"):
            casestudy.crystal_files(tmp_path)

    def test_isolated_molecules_are_left_out_and_frames_can_be_fewer(self, folder, caplog):
        crystals = load_crystals(casestudy.sources(folder))
        [warning] = [record.message for record in caplog.records if "left out" in record.message]
        assert "isolated molecules are left out (1 of 27): lattice energies" in warning
        assert [len(dataset) for dataset in crystals] == [13, 12]
        few = load_crystals(casestudy.sources(folder), max_frames=5)
        assert few[0].frame_numbers.tolist() == [0, 3, 6, 9, 12]

    def test_sets_that_cannot_be_used(self, folder, tmp_path):
        with pytest.raises(DataError, match="27.traj and .*27.traj have the same name"):
            load_crystals([folder / "27.traj", folder / "27.traj"])
        with pytest.raises(DataError, match="none of 1001 frames is a crystal"):
            load_crystals(["ethanol"])

    def test_the_leading_crystal(self):
        assert casestudy.leading(["/x/27.traj", "/x/32.traj"]) == "/x/32.traj"
        assert casestudy.leading(["molcrys-mace/21_urea", "32-like"]) == "32-like"
        assert casestudy.leading(["b", "a"]) == "b"


class TestChecks:
    def test_a_bad_file_is_named_before_anything_is_trained(self, folder, tmp_path):
        shutil.copy(folder / "27.traj", tmp_path / "27.traj")
        frames = ase.io.read(folder / "33.traj", ":")
        frames[3].calc.results["forces"][2, 1] = np.nan
        ase.io.write(tmp_path / "28.traj", frames)
        with pytest.raises(DataError, match=r"28\.traj: frame 3 .*nan") as error:
            load_crystals(casestudy.sources(tmp_path))
        assert "\n" not in str(error.value)

    def test_elements_that_nobody_lends(self, ani2xt, folder):
        crystals = load_crystals([str(folder / "27.traj")])
        with pytest.raises(ModelError, match="Si"):
            CaseStudy(ani2xt, crystals, donors={"I": "Cl"})

    def test_wrong_settings_and_too_few_frames(self, ani2xt, folder):
        crystals = load_crystals([str(folder / "33.traj")])
        with pytest.raises(ConfigError, match="there is no recipe 'long'"):
            CaseStudy(ani2xt, crystals, "long")
        with pytest.raises(DataError, match="fewer than the split needs"):
            CaseStudy(ani2xt, load_crystals([str(folder / "33.traj")], max_frames=3))
        with pytest.raises(ConfigError, match="at least one crystal"):
            CaseStudy(ani2xt, ())
        with pytest.raises(ConfigError, match="two at least"):
            CaseStudy(ani2xt, crystals).shared()


class TestTables:
    @pytest.mark.slow
    def test_each_crystal_is_trained_and_elements_are_borrowed_as_in_the_thesis(self, case, caplog):
        with caplog.at_level(logging.INFO, logger="tlmc.thesis.casestudy"):
            experiments = case.each()
        assert list(experiments) == [("27", "relabel", 0), ("33", "", 0)]
        assert "lacks elements, borrowed are Si from C, I from Cl" in caplog.text
        table = casestudy.error_table(experiments)
        assert table.index.tolist()[:3] == [("27", "relabel", name) for name in (START, REFITTED, TUNED)]
        # 16 atoms in the molecule, 17 in the pair of ions
        ratio = table["E (meV/molecule)"] / table["E (meV/atom)"]
        np.testing.assert_allclose(ratio, [16, 16, 16, 17, 17, 17])
        np.testing.assert_allclose(table["F vector (eV/Å)"] / table["F component (eV/Å)"], np.sqrt(3))
        metrics = experiments["33", "", 0].stages["short"].metrics
        assert table.loc[("33", "", TUNED), "E (meV/atom)"] == 1000 * metrics["energy_rmse_per_atom"].value
        # the thesis' numbers of 27, and none for what it has no row
        assert table.loc[("27", "relabel", START), "thesis F vector (eV/Å)"] == 1.16029
        assert table.loc[("27", "relabel", TUNED), "thesis E (meV/atom)"] == pytest.approx(3.16)
        assert np.isnan(table.loc[("27", "relabel", REFITTED), "thesis E (meV/atom)"])
        text = casestudy.format_errors(table)
        assert text.loc[("33", "", TUNED), "thesis F vector (eV/Å)"] == "0.0924"
        assert "±" not in "".join(text.to_numpy().ravel())

    def test_seeds_are_averaged(self, case):
        one = replace(case, crystals=case.crystals[1:])
        table = casestudy.error_table(replace(one, seeds=(0, 1)).each())
        single = [
            casestudy.error_table(replace(one, seeds=(seed,)).each()).loc[("33", "", TUNED), "F vector (eV/Å)"]
            for seed in (0, 1)
        ]
        row = table.loc[("33", "", TUNED)]
        assert row["seeds"] == 2
        assert row["F vector (eV/Å)"] == pytest.approx(np.mean(single))
        assert row["F vector (eV/Å) spread"] == pytest.approx(np.std(single, ddof=1))
        assert "±" in casestudy.format_errors(table).loc[("33", "", TUNED), "E (meV/atom)"]

    def test_elements_and_literature(self, case):
        experiments = case.each()
        elements = casestudy.element_table(experiments)
        assert set(elements.loc[("33", "", TUNED)].dropna().index) == {"H", "C", "N", "O", "Cl"}
        ours = casestudy.against_literature(casestudy.error_table(experiments))
        assert ours.loc["ANI-1", "E (meV/atom)"] == pytest.approx(3.4)
        assert ours["E (meV/atom)"].is_monotonic_decreasing
        assert {"TensorMol-0.1", "thesis, 32", "27, relabel", "33"} <= set(ours.index)

    def test_test_frames_are_ranked(self, case):
        experiments = case.each()
        energies = casestudy.ranking_of_test(experiments["33", "", 0])
        assert energies["n_frames"].sum() == len(experiments["33", "", 0].test)
        assert set(ranking_table(energies).index) == {START, TUNED}


class TestMoreTrainings:
    @pytest.mark.slow
    def test_growing_training_parts(self, case):
        table = replace(case, crystals=case.crystals[1:]).sizes([4, 6, 100])
        assert table["n_train"].tolist() == [4, 6, 8]
        assert table["learner"].tolist() == ["33"] * 3
        assert (table["force_rmse_vector"] > 0).all()

    @pytest.mark.slow
    def test_one_model_for_all_and_without_a_crystal(self, case):
        table = case.shared(["33"])
        rows = table.set_index(["crystal", "model"])
        own = case.each()["33", "", 0]
        expected = own.stages["short"].metrics["force_rmse_vector"].value
        assert rows.loc[("33", "one per crystal"), "force_rmse_vector"] == expected
        assert rows.loc[("33", "one for all"), "n_train"] == 9 + 8
        assert rows.loc[("33", "the others only"), "n_train"] == 9
        assert ("27", "the others only") not in rows.index
        # learned from both, the energies of both need no constant afterwards
        joint = rows.loc[pd.IndexSlice[:, "one for all"], "energy_rmse_per_atom"]
        assert (joint < 0.1).all()
        found = read_records(study="own", quantity="force_rmse_vector")
        assert {"short, one for all", "short, without 33"} <= set(found["recipe"])

    @pytest.mark.slow
    def test_the_left_out_crystal_lends_nothing_but_a_constant(self, case):
        """The shared model's forces of the crystal left out are those of the trained weights, whatever its labels."""
        tuned, _ = case._trained_on(case.crystals[:1], "without 33", 0)
        dataset = case.crystals[1]
        test = dataset.subset(case.split(dataset, 0).test)
        bare = evaluate(test, predict(tuned.potential.with_reference(None), test.frames))
        row = case.shared(["33"]).set_index(["crystal", "model"]).loc[("33", "the others only")]
        assert row["force_rmse_vector"] == pytest.approx(bare["force_rmse_vector"].value, rel=1e-5)
        assert row["energy_rmse_per_atom"] < 0.1

    @pytest.mark.slow
    def test_packings_left_out_are_in_no_training(self, case, reports):
        energies = case.packings_left_out("33", 2)
        assert energies["n_frames"].sum() == len(case.crystals[1])
        assert energies[[START, TUNED]].notna().all(axis=None)
        groups = packings(case.crystals[1])
        tested = []
        for path in reports.glob("runs/33-ani2xt-short, packings left out*/split.json"):
            split = json.loads(path.read_text())
            inside = {groups[k] for k in split["train"] + split["validation"]}
            outside = {groups[k] for k in split["test"]}
            assert not inside & outside
            tested += split["test"]
        assert sorted(tested) == list(range(len(groups)))

    @pytest.mark.slow
    def test_packings_without_names_are_refused(self, case, folder):
        with pytest.raises(DataError, match="in 99 folds needs their names, got 8 packings|got . packings"):
            case.packings_left_out("33", 99)

    @pytest.mark.slow
    def test_labels_of_two_kinds_train_no_model(self, case):
        other = replace(case.crystals[1], level_of_theory="r2SCAN")
        with pytest.raises(DataError, match="several levels of theory"):
            replace(case, crystals=(case.crystals[0], other)).shared()

    @pytest.mark.slow
    def test_joined_parts_are_those_of_the_sets(self, case):
        splits = [case.split(dataset, 0) for dataset in case.crystals]
        union, parts = casestudy.join(case.crystals, splits)
        kept = [*splits[0].train, *splits[0].validation]
        np.testing.assert_array_equal(union.energies[: len(kept)], case.crystals[0].energies[kept])
        assert len(parts.train) == sum(len(split.train) for split in splits)
        assert sorted([*parts.train, *parts.validation]) == list(range(len(union)))
        assert len(parts.test) == 0
        formulas = {union.frames[k].get_chemical_formula() for k in parts.validation}
        assert len(formulas) > 1


@pytest.mark.slow
def test_everything_is_written(case, reports):
    casestudy.write_results(case, "own", sizes=[4], shared=True, left_out=["27"], n_folds=2)
    tables = {path.stem for path in (reports / "tables").glob("own_*.csv")}
    kinds = ("errors", "elements", "literature", "ranking", "packings", "sizes", "shared")
    assert tables == {f"own_{kind}" for kind in kinds}
    figures = {path.stem for path in (reports / "figures").glob("own_*.png")}
    assert {"own_parity_27_relabel", "own_parity_33", "own_parity_gallery", "own_shared", "own_sizes"} <= figures
    assert {"own_ranking_33", "own_ranking_33_packings_left_out", "own_literature"} <= figures
    content = json.loads((reports / "metrics" / "own.json").read_text())
    assert [facts["hash"] for facts in content["crystals"]] == [dataset.hash for dataset in case.crystals]
    assert content["start_model"]["fingerprint"] == case.start.fingerprint
    assert set(content["runs"]) == {"27 relabel 0", "33 0"}


@pytest.mark.parametrize("prefix", ["summary", "07", "study_laptop", "../elsewhere", "a/b", "theirs", ""])
def test_names_that_would_replace_other_files_are_refused(case, tmp_path, monkeypatch, prefix):
    monkeypatch.setenv("TLMC_REPORTS_DIR", str(tmp_path))
    (tmp_path / "metrics").mkdir()
    for name in ("summary", "theirs"):
        (tmp_path / "metrics" / f"{name}.json").write_text("[]")
    with pytest.raises(ConfigError, match="is not of a case study, which would replace it|begins its files"):
        casestudy.write_results(case, prefix)
    assert {path.read_text() for path in (tmp_path / "metrics").iterdir()} == {"[]"}
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
@pytest.mark.needs_mirror
def test_public_crystals_renamed_as_the_thesis_names_its_own(tmp_path, monkeypatch, ani2x):
    monkeypatch.setenv("TLMC_REPORTS_DIR", str(tmp_path / "reports"))
    own = tmp_path / "own"
    own.mkdir()
    public = {"27": "21_urea", "28": "04_ammonia"}
    for number, name in public.items():
        shutil.copy(Path(str(mirror_dir())) / "molcrys-mace" / f"{name}.traj", own / f"{number}.traj")
    renamed = load_crystals(casestudy.sources(own), max_frames=14)
    registered = load_crystals([f"molcrys-mace/{name}" for name in public.values()], max_frames=14)
    assert [a.hash for a in renamed] == [b.hash for b in registered]
    case = CaseStudy(ani2x, renamed, changes={"epochs": 1})
    table = casestudy.write_results(case, "own", shared=True)
    assert table.index.unique("crystal").tolist() == ["27", "28"]
    force = table["F vector (eV/Å)"]
    assert force["27", "", TUNED] < 0.5 * force["27", "", START]
    same = casestudy.error_table(CaseStudy(ani2x, registered, changes={"epochs": 1}).each())
    np.testing.assert_allclose(same.iloc[:, :4], table.iloc[:, :4], rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", [f"{number}-like" for number in (27, 28, 31, 32, 33)])
def test_profile_laptop_gains_on_every_crystal_what_the_study_promises(name, ani2xt, reports):
    """At least 8 times smaller energy errors, 3 times with the offset refitted, and 5 times smaller force errors."""
    settings = yaml.safe_load((ROOT / "notebooks" / "profiles" / "laptop" / "09_evaluation.yml").read_text())
    changes = {"epochs": settings["crystal_epochs"]} if settings["crystal_epochs"] else {}
    assert (settings["start_model"], settings["max_frames"], settings["seed"]) == ("ani2xt", 0, 0)
    assert name in settings["crystals"].split(",")
    case = CaseStudy(ani2xt, load_crystals([name]), settings["recipe_name"], changes, borrowings=("extend",))
    [experiment] = case.each().values()
    start, refitted, tuned = (stage.metrics for stage in experiment.stages.values())
    energy, force = "energy_rmse_per_atom", "force_rmse_vector"
    assert start[energy].value > 8 * tuned[energy].value
    assert refitted[energy].value > 3 * tuned[energy].value
    assert start[force].value > 5 * tuned[force].value
