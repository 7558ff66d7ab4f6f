"""Ablations: the planned runs, their tables, and one ablation from a file to its table."""

from __future__ import annotations

import ase.io
import numpy as np
import pandas as pd
import pytest
import yaml
from ase.calculators.singlepoint import SinglePointCalculator

from helpers.ablation_records import record
from helpers.places import ROOT
from helpers.potential_references import toy_potential
from helpers.training import labelled
from tlmc.errors import ConfigError, DataError
from tlmc.experiments.records import append_records, read_records
from tlmc.experiments.run import Run
from tlmc.families.ani.transfer import first_members
from tlmc.thesis import ablations
from tlmc.thesis.ablations import ABLATIONS, E, F, carry_out, formatted, runs, table
from tlmc.training.config import recipe


@pytest.fixture(scope="module")
def crystal(tmp_path_factory):
    """A file of twenty small labelled cells."""
    data = labelled(20)
    frames = []
    for frame, energy, forces in zip(data.frames, data.energies, data.forces, strict=True):
        frame = frame.copy()
        frame.calc = SinglePointCalculator(frame, energy=energy, forces=forces)
        frames.append(frame)
    path = tmp_path_factory.mktemp("data") / "methanol.extxyz"
    ase.io.write(path, frames)
    return str(path)


def test_every_table_has_one_baseline_and_valid_settings():
    for ablation in ABLATIONS.values():
        assert sum(setting.is_baseline for setting in ablation.settings) == 1
        assert len({ablation.label(setting) for setting in ablation.settings}) == len(ablation.settings)
        for setting in ablation.settings:
            recipe(ablation.recipe, **setting.changes)


def test_tables_share_the_baseline_of_their_recipe(crystal):
    planned = runs(["batch", "lambda", "size"], [crystal], "ani2xt", 2, epochs=3, crystals_only=True)
    assert len(planned) == 2 * (5 + 4 + 3)
    assert {run.config.epochs for run in planned} == {3}
    assert {run.crystals_only for run in planned} == {True}
    assert sorted(run.n_train for run in planned if run.n_train and run.seed == 0) == [4, 7, 10]  # of 14
    lambdas = {run.name: run.config.lambda_ for run in planned}
    assert lambdas["thesis, lambda 0"] == 0.0
    assert lambdas["thesis"] == 0.9
    assert lambdas["thesis, batch 16"] == 0.9


def test_a_plan_becomes_the_description_of_a_sweep(crystal):
    """Taken apart and put together again, the description gives the same runs."""
    planned = runs(["batch", "size", "replay"], [crystal], "ani2xt", 2, epochs=3)
    said = ablations.description(planned, "trial")
    assert said["base"] == {"dataset": crystal, "start_model": "ani2xt"}
    again = [Run(**said["base"], **entry, seed=seed) for entry in said["runs"] for seed in said["grid"]["seed"]]
    assert {run.slug for run in again} == {run.slug for run in planned}
    with pytest.raises(ConfigError, match="23 runs are not 12 settings with 2 seeds each"):
        ablations.description(planned[:-1], "trial")


def test_new_elements_borrow():
    planned = runs(["borrow"], ["27-like"], "ani2xt", 1)
    assert [run.borrow for run in planned] == ["relabel", "extend"]
    assert all(run.element_map == {"Si": "C", "I": "Cl"} for run in planned)
    # wherever a set needs them, not only in that table
    assert runs(["decay"], ["27-like"], "ani2xt", 1)[0].element_map == {"Si": "C", "I": "Cl"}


@pytest.mark.parametrize(
    ("tables", "sentence"),
    [
        (["lambda", "beta"], "there is no ablation beta: choose of transfer, batch"),
        ([], "empty list"),
        (["borrow"], "needs new elements, and ani2xt knows all"),
        (["members"], "one member: take ani2x"),
    ],
)
def test_what_cannot_run_is_said_at_once(crystal, tables, sentence):
    with pytest.raises(ConfigError, match=sentence):
        runs(tables, [crystal], "ani2xt", 1)


def test_a_table_averages_over_seeds_and_compares_seed_by_seed():
    rows = []
    for seed, hardness in enumerate((1.0, 2.0, 3.0)):
        for name, factor in (("thesis", 1.0), ("thesis, lambda 0.1", 1.1), ("another", 9.0)):
            rows += record(name, seed, F=0.05 * hardness * factor, E=hardness / factor)
            # on validation the second is better, on the test part the first: validation decides
            rows += record(name, seed, F=0.05 / factor, E=1.0, split="validation")
            rows += record(name, seed, F=0.2 * factor, E=3.0, split="molecules")
    result = table("lambda", pd.DataFrame(rows))
    assert result["setting"].tolist() == ["lambda 0.1", "lambda 0.9"]
    assert result["n_seeds"].tolist() == [3, 3]
    assert result["best on validation"].tolist() == [True, False]
    np.testing.assert_allclose(result[F], [0.11, 0.1])
    np.testing.assert_allclose(result[f"{F} spread"], [0.055, 0.05])
    np.testing.assert_allclose(result["F component (eV/A)"], result[F] / 3**0.5)
    np.testing.assert_allclose(result["F / baseline"], [1.1, 1.0])
    np.testing.assert_allclose(result["F / baseline spread"], 0.0, atol=1e-12)
    np.testing.assert_allclose(result[E], [2 / 1.1, 2.0])
    np.testing.assert_allclose(result["drift F (eV/A)"], [0.22, 0.2])
    assert result["thesis F (eV/A)"].tolist() == [0.06967, 0.06730]
    assert result["thesis E (meV/atom)"].tolist() == [1.48, 1.59]
    text = formatted(result)
    assert text.iloc[0].to_dict() | {"setting": "lambda 0.1 *", F: "0.1100 ± 0.0550"} == text.iloc[0].to_dict()
    assert "dataset" not in text


def test_rows_of_the_start_model_are_those_of_the_baseline():
    rows = record("thesis", 0) + record("thesis, scratch", 0, F=0.3, E=3.0)
    rows += record("start", 0, F=0.4, E=250.0, n_train=0)
    rows += record("start", 0, F=0.7, E=270.0, n_train=0, start_model="ani2x-first1")
    rows += record("start, offset refitted", 0, F=0.4, E=8.0) + record("start, offset refitted", 0, E=9.0, n_train=4)
    result = table("transfer", pd.DataFrame(rows)).set_index("setting")
    assert result.index.tolist() == ["scratch", "start", "start, offset refitted", "all layers"]
    assert result.loc["start", F] == pytest.approx(0.4)
    assert result.loc["start, offset refitted", E] == pytest.approx(8.0)
    assert not result["best on validation"].any()  # nothing is known of the validation part
    assert np.isnan(result.loc["all layers", f"{F} spread"])
    assert result.loc["start", "thesis E (meV/atom)"] == 259.3


def test_mixed_or_missing_records_are_refused():
    rows = record("thesis", 0) + record("thesis", 0, study="other")
    with pytest.raises(DataError, match="thesis of d, seed 0, is recorded more than once: studies other, s"):
        table("batch", pd.DataFrame(rows))
    with pytest.raises(DataError, match="no results of the ablation 'lora' yet"):
        table("lora", pd.DataFrame(rows))
    with pytest.raises(ConfigError, match="no ablation 'beta'"):
        table("beta", pd.DataFrame(rows))


def test_first_members_are_a_smaller_ensemble_with_a_name_of_its_own(ani2xt):
    assert first_members(ani2xt, 1) is ani2xt
    model = toy_potential(members=3, seed=0)
    two = first_members(model, 2)
    assert two.members == 2
    assert two.name == f"{model.name}-first2"
    assert all((two.networks["C"][k].weight == model.networks["C"][k].weight[:2]).all() for k in range(4))


@pytest.mark.slow
def test_from_a_file_to_a_table_and_only_once(crystal, tmp_path, monkeypatch):
    monkeypatch.setenv("TLMC_REPORTS_DIR", str(tmp_path))
    planned = runs(["lora"], [crystal], "ani2xt", 1, epochs=1)
    planned = [run for run in planned if run.name in ("short", "short, rank 4")]
    carry_out(planned[:1], "trial")
    done = []
    execute = ablations.execute
    monkeypatch.setattr(ablations, "execute", lambda run, *rest: (done.append(run), execute(run, *rest)))
    carry_out(planned, "trial")
    assert done == planned[1:]
    result = table("lora", read_records(study="trial"))
    assert result["setting"].tolist() == ["rank 4", "whole matrices"]
    assert result["best on validation"].sum() == 1
    assert (result["drift F (eV/A)"] > 0).all()
    # a run with other settings under the same name is another run
    longer = runs(["lora"], [crystal], "ani2xt", 1, epochs=2)
    assert ablations._is_recorded(planned[0], "trial")
    assert not ablations._is_recorded(next(run for run in longer if run.name == planned[0].name), "trial")
    assert not ablations._is_recorded(planned[0], "another")
    append_records(record("short", 0, study="other", run="b"))
    assert ablations._is_recorded(planned[0], "trial")


@pytest.mark.needs_mirror
def test_the_sweep_of_the_full_profile_is_what_the_notebook_plans():
    path = ROOT / "notebooks" / "sweeps" / "ablations.yml"
    profile = yaml.safe_load((ROOT / "notebooks" / "profiles" / "full" / "08_ablations.yml").read_text())
    names = profile["tables"].split(",")
    fields = {name: profile[name] for name in ("epochs", "crystals_only")}
    planned = runs(names, [profile["dataset"]], profile["start_model"], profile["n_seeds"], **fields)
    said = yaml.safe_load(path.read_text())
    listed = [Run(**said["base"], **entry, seed=seed) for entry in said["runs"] for seed in said["grid"]["seed"]]
    assert {run.slug for run in listed} == {run.slug for run in planned}
    assert said["study"] == "full-ablations"
