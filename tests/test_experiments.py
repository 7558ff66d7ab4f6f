from __future__ import annotations

import numpy as np
import pytest

from tlmc.datasets import load_dataset
from tlmc.errors import ConfigError
from tlmc.evaluation import read_records
from tlmc.experiments import convergence, run_recipes


@pytest.fixture
def few(monkeypatch, tmp_path):
    monkeypatch.setenv("TLMC_REPORTS_DIR", str(tmp_path))
    return load_dataset("naphthalene").subset(range(0, 130, 10))


def test_recipes_and_seeds_run_in_order_and_are_recorded(few, ani2xt):
    experiments = run_recipes(ani2xt, few, ["short", "thesis"], 2, first_seed=3, study="trial", epochs=1)
    found = [(e.result.config.recipe, e.result.config.seed, e.split.seed) for e in experiments]
    assert found == [("short", 3, 3), ("short", 4, 4), ("thesis", 3, 3), ("thesis", 4, 4)]
    records = read_records(study="trial", quantity="force_rmse_vector")
    assert set(records["recipe"]) == {"start", "start, offset refitted", "short", "thesis"}
    value = records.query("recipe == 'short' and seed == 4")["value"].item()
    assert value == experiments[1].stages["short"].metrics["force_rmse_vector"].value


def test_a_finished_run_is_read_and_not_repeated(few, ani2xt):
    first, again = (run_recipes(ani2xt, few, ["short"], 1, epochs=1)[0] for _ in range(2))
    assert (first.result.resumed_from, again.result.resumed_from) == (0, 1)
    np.testing.assert_array_equal(
        first.stages["short"].predictions.energies, again.stages["short"].predictions.energies
    )


def test_wrong_settings_are_refused_before_anything_runs(few, ani2xt, tmp_path):
    with pytest.raises(ConfigError, match="there is no recipe 'long'"):
        run_recipes(ani2xt, few, ["short", "long"], 1, epochs=1)
    assert not list(tmp_path.rglob("run.json"))


def test_convergence_counts_processor_time(few, ani2xt):
    settings = {"plain": {}, "ridge": {"warm_start": "ridge", "batch_size": 4}}
    table = convergence(ani2xt, few, {k: v | {"epochs": 2} for k, v in settings.items()}, 2)
    assert table.groupby(["setting", "seed"])["epoch"].apply(list).tolist() == [[1, 2]] * 4
    for _, run in table.groupby(["setting", "seed"]):
        assert 0 < run["cpu_seconds"].iloc[0] < run["cpu_seconds"].iloc[1] < 300
    first = table[table["epoch"] == 1].groupby("setting")["validation_force_rmse_vector"].mean()
    assert first["ridge"] < first["plain"]
    with pytest.raises(ConfigError, match="lr"):
        convergence(ani2xt, few, {"wrong": {"lr": -1.0}}, 1)
