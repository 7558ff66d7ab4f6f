from __future__ import annotations

import signal

import numpy as np
import pandas as pd
import pytest

from helpers.places import ROOT
from tlmc.data.loading import load_dataset
from tlmc.errors import ConfigError, Interrupted
from tlmc.experiments import experiment as module
from tlmc.experiments.experiment import CONVERGENCE, convergence, convergence_table, run_recipes
from tlmc.experiments.records import read_records
from tlmc.training import recipe


@pytest.fixture
def few(monkeypatch, tmp_path):
    monkeypatch.setenv("TLMC_REPORTS_DIR", str(tmp_path))
    return load_dataset("naphthalene").subset(range(0, 130, 10))


@pytest.mark.slow
def test_recipes_and_seeds_run_in_order_and_are_recorded(few, ani2xt):
    experiments = run_recipes(ani2xt, few, ["short", "thesis"], 2, first_seed=3, study="trial", epochs=1)
    found = [(e.result.config.recipe, e.result.config.seed, e.split.seed) for e in experiments]
    assert found == [("short", 3, 3), ("short", 4, 4), ("thesis", 3, 3), ("thesis", 4, 4)]
    records = read_records(study="trial", quantity="force_rmse_vector", split="test")
    assert set(records["recipe"]) == {"start", "start, offset refitted", "short", "thesis"}
    value = records.query("recipe == 'short' and seed == 4")["value"].item()
    assert value == experiments[1].stages["short"].metrics["force_rmse_vector"].value


def test_a_finished_run_is_read_and_not_repeated(few, ani2xt):
    first, again = (run_recipes(ani2xt, few, ["short"], 1, epochs=1)[0] for _ in range(2))
    assert (first.result.resumed_from, again.result.resumed_from) == (0, 1)
    np.testing.assert_array_equal(
        first.stages["short"].predictions.energies, again.stages["short"].predictions.energies
    )


def test_an_interrupt_after_the_training_loses_nothing(few, ani2xt, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("tlmc.experiments.experiment.before_and_after", lambda *_: signal.raise_signal(signal.SIGINT))
        with pytest.raises(Interrupted, match="while the result was evaluated: it is kept in .*naphthalene-"):
            run_recipes(ani2xt, few, ["short"], 1, epochs=1)
    assert run_recipes(ani2xt, few, ["short"], 1, epochs=1)[0].result.resumed_from == 1


def test_an_interrupted_comparison_keeps_the_runs_before(few, ani2xt, monkeypatch, tmp_path):
    settings = {"one": {"epochs": 1}, "two": {"epochs": 2}}
    with monkeypatch.context() as patch:
        train = module.finetune

        def stop_the_second(model, dataset, split, config, **rest):
            if config.epochs == 2:
                signal.raise_signal(signal.SIGINT)
            return train(model, dataset, split, config, **rest)

        patch.setattr("tlmc.experiments.experiment.finetune", stop_the_second)
        with pytest.raises(Interrupted, match="in two on naphthalene, seed 0, which the same call begins anew"):
            convergence(ani2xt, [few], 1, settings)
    assert len(list(tmp_path.rglob("convergence/*.csv"))) == 1


def test_wrong_settings_are_refused_before_anything_runs(few, ani2xt, tmp_path):
    with pytest.raises(ConfigError, match="there is no recipe 'long'"):
        run_recipes(ani2xt, few, ["short", "long"], 1, epochs=1)
    assert not list(tmp_path.rglob("run.json"))


def test_convergence_counts_processor_time(few, ani2xt):
    settings = {
        "plain": {"epochs": 4},
        "ridge": {"warm_start": "ridge", "batch_size": 4, "epochs": 5},
        "thesis": {"recipe": "thesis", "epochs": 3},
    }
    table = convergence(ani2xt, [few], 2, settings, share=0.5)
    assert table.groupby(["dataset", "setting", "seed"])["epoch"].apply(list).tolist() == [[1, 2]] * 6
    for _, run in table.groupby(["setting", "seed"]):
        assert 0 < run["cpu_seconds"].iloc[0] < run["cpu_seconds"].iloc[1] < 300
    first = table[table["epoch"] == 1].groupby("setting")["validation_force_rmse_vector"].mean()
    assert first["ridge"] < first["plain"]
    # measured times and all: what is there is read, not run again
    pd.testing.assert_frame_equal(convergence(ani2xt, [few], 2, settings, share=0.5), table)
    with pytest.raises(ConfigError, match="lr"):
        convergence(ani2xt, [few], 1, {"wrong": {"lr": -1.0}})


def test_settings_to_compare_are_valid_and_differ():
    configs = [
        recipe(setting.get("recipe", "short"), **{key: value for key, value in setting.items() if key != "recipe"})
        for setting in CONVERGENCE.values()
    ]
    assert len({config.model_dump_json() for config in configs}) == len(configs)
    assert "short" in CONVERGENCE
    # the recipe that came out of the comparison is one of those compared
    assert recipe("quick", recipe="short") in configs


def test_convergence_table_compares_run_by_run():
    ends = {"short": [(10.0, 0.1, 0.001), (40.0, 0.4, 0.004)], "half": [(5.0, 0.2, 0.001), (20.0, 0.8, 0.016)]}
    rows = [
        {"dataset": dataset, "setting": setting, "seed": 0, "epoch": epoch, "cpu_seconds": time * epoch / 2}
        | {"validation_force_rmse_vector": force * 3 / (epoch + 1), "validation_energy_rmse_per_atom": energy}
        for setting, runs in ends.items()
        for dataset, (time, force, energy) in zip(("a", "b"), runs, strict=True)
        for epoch in (1, 2)
    ]
    table = convergence_table(pd.DataFrame(rows))
    assert list(table.index) == ["short", "half"]
    assert table["epochs"].tolist() == [2, 2]
    assert table.loc["short", "processor time (s)":"E (meV/atom)"].tolist() == pytest.approx([20.0, 0.2, 2.0])
    assert table.loc["half", "processor time (s)":"E (meV/atom)"].tolist() == pytest.approx([10.0, 0.4, 4.0])
    assert table.loc["half", "time / short"] == pytest.approx(0.5)
    assert table.loc["half", ["F / short", "F / short, sd"]].tolist() == pytest.approx([2.0, 0.0])
    assert table.loc["half", ["E / short", "E / short, sd"]].tolist() == pytest.approx([2.0, np.log(4.0) / np.sqrt(2)])
    with pytest.raises(ConfigError, match="no setting 'thesis' to compare with among short, half"):
        convergence_table(pd.DataFrame(rows), baseline="thesis")


def test_the_stored_comparison_says_what_the_notebook_says():
    """Notebook 07, section 8: `quick` costs a third and comes near; ridge and EMA do not pay with an ensemble."""
    table = pd.read_csv(ROOT / "reports" / "tables" / "convergence_reference.csv")
    assert table.groupby("setting")[["dataset", "seed"]].nunique().eq(3).all(axis=None)
    ends = convergence_table(table)
    assert list(ends.index) == list(CONVERGENCE)
    quick, half = ends.loc["batch 4"], ends.loc["short, half as long"]
    assert quick["time / short"] < 0.4 < half["time / short"]
    assert max(quick["F / short"], half["F / short"]) < 1.07
    assert max(quick["E / short"], half["E / short"]) < 1.13
    assert ends.loc["short + ridge", "time / short"] > 1.5 * quick["time / short"]
    assert ends.loc["short + ridge", "F / short"] > 0.95 * quick["F / short"]
    assert ends.loc["batch 4 + EMA", "E / short"] > 4
    assert ends.loc["batch 4 + EMA", "F / short"] > 1.2
    assert ends.loc["thesis", "E / short"] > 3
    assert ends.loc["thesis", "F / short"] < 1.05
    first = table[table["epoch"] == 1].groupby("setting")["validation_force_rmse_vector"].mean()
    assert first.idxmin() == "short + ridge"
