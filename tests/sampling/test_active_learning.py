from __future__ import annotations

import dataclasses
import json

import numpy as np
import pandas as pd
import pytest
from ase.calculators.lj import LennardJones
from ase.constraints import FixAtoms
from numpy.random import default_rng
from scipy import stats

from tlmc.data.loading import load_dataset
from tlmc.errors import ConfigError, DataError, ModelError
from tlmc.evaluation.metrics import evaluate, per_frame
from tlmc.labelling import method
from tlmc.sampling import (
    CalculatorPool,
    CommitteePredictions,
    LabelledPool,
    LastLayerCommittee,
    LoopConfig,
    compare_strategies,
    final_errors,
    labels_saved,
    learn_in_order,
    mean_interval,
    run_loop,
    structures_needed,
)


@pytest.fixture(scope="module")
def data():
    frames = load_dataset("ethanol")
    order = default_rng(5).permutation(len(frames))[:80]
    return frames.subset(order[:60]), frames.subset(order[60:])


@pytest.fixture(scope="module")
def learner(ani2xt):
    """One committee for all tests: it keeps the features, and every fit begins anew."""
    return LastLayerCommittee(ani2xt, "HCO", n_members=4)


class Stopping:
    """A learner that is killed before its k-th training."""

    def __init__(self, inner, k):
        self.inner, self.left = inner, k

    def fit(self, dataset, seed):
        if not self.left:
            raise KeyboardInterrupt
        self.left -= 1
        self.inner.fit(dataset, seed)
        return self

    def predict(self, frames):
        return self.inner.predict(frames)


class TestLoop:
    @pytest.mark.slow
    def test_every_round_adds_the_worst_and_drops_the_best(self, learner, data):
        pool, test = data
        config = LoopConfig(
            "error", bound=0.1, start_share=0.05, add_share=0.1, drop_below=0.9, stop_share=0.0, max_labels=21
        )
        result = run_loop(learner, LabelledPool(pool), config, test)
        assert [len(done["train"]) for done in result.rounds][:3] == [3, 9, 15]
        for k, done in enumerate(result.rounds):
            learner.fit(pool.subset(sorted(done["train"])), 0)
            errors = per_frame(pool, learner.predict(pool.frames).mean())["force_rmse_vector"].to_numpy()
            rest = np.setdiff1d(np.arange(60), done["train"] + done["gone"])
            assert done["bad_share"] == (errors[rest] > 0.1).sum() / 60
            assert done["test"]["force_rmse_vector"] == pytest.approx(
                evaluate(test, learner.predict(test.frames).mean())["force_rmse_vector"].value
            )
            if done["stopped"]:
                break
            others = np.setdiff1d(rest, done["added"])
            assert errors[done["added"]].min() >= errors[others].max()
            assert set(done["dropped"]) == {j for j in others if errors[j] < 0.9 * 0.1}
            assert result.rounds[k + 1]["train"] == done["train"] + done["added"]
            assert result.rounds[k + 1]["gone"] == done["gone"] + done["dropped"]
        assert len(set(result.train)) == len(result.train)

    def test_stops_when_few_are_predicted_badly(self, learner, data):
        result = run_loop(learner, LabelledPool(data[0]), LoopConfig("error", bound=0.12, add_share=0.1))
        assert result.stopped == "well predicted"
        assert result.rounds[-1]["bad_share"] < 0.05 <= result.rounds[-2]["bad_share"]
        assert len(result.train) < 60
        assert result.rounds[-1]["added"] == []

    def test_stops_at_the_limit_and_at_the_end_of_the_pool(self, learner, data):
        small = LabelledPool(data[0].subset(range(9)))
        config = LoopConfig("random", start_share=0.3, add_share=0.3, stop_share=0.0)
        assert run_loop(learner, small, config).stopped == "pool exhausted"
        config = LoopConfig("random", start_share=0.3, add_share=0.3, stop_share=0.0, max_labels=8)
        result = run_loop(learner, small, config)
        assert (result.stopped, [len(done["train"]) for done in result.rounds]) == ("limit", [3, 6, 8])

    def test_committee_picks_what_it_is_worst_at(self, learner, data):
        pool = data[0]
        result = run_loop(learner, LabelledPool(pool), LoopConfig(stop_share=0.0, drop_below=0.0, max_labels=32))
        ranks = []
        for done in result.rounds[:-1]:
            learner.fit(pool.subset(sorted(done["train"])), 0)
            errors = per_frame(pool, learner.predict(pool.frames).mean())["force_rmse_vector"].to_numpy()
            rest = np.setdiff1d(np.arange(60), done["train"])
            ranks += [(errors[rest] < errors[j]).mean() for j in done["added"]]
        # chance gives 1/2 with a standard error of 0.29 over the root of their number
        assert np.mean(ranks) > 0.5 + 3 * 0.29 / np.sqrt(len(ranks))

    def test_the_scale_is_what_was_found_on_structures_not_yet_trained_on(self, learner, data):
        pool = data[0]
        result = run_loop(learner, LabelledPool(pool), LoopConfig(stop_share=0.0, max_labels=9))
        first, second = result.rounds[:2]
        assert first["scale"] == 1.0
        assert not first["dropped"]
        learner.fit(pool.subset(sorted(first["train"])), 0)
        added = pool.subset(first["added"])
        said = learner.predict(added.frames)
        errors = per_frame(added, said.mean())["force_rmse_vector"]
        expected = np.sqrt((errors**2).mean() / (said.frame_force_spread() ** 2).mean())
        assert second["scale"] == pytest.approx(expected)

    def test_one_member_cannot_say_where_it_is_unsure(self, ani2xt, data):
        single = LastLayerCommittee(ani2xt, "HCO", n_members=1)
        with pytest.raises(ModelError, match="a spread needs two members or more, got 1"):
            run_loop(single, LabelledPool(data[0].subset(range(4))), LoopConfig())


class TestResume:
    CONFIG = LoopConfig("committee", bound=0.03, add_share=0.1, stop_share=0.0, max_labels=26, seed=1)

    @pytest.mark.slow
    def test_a_killed_loop_goes_on_to_the_same_result(self, learner, data, tmp_path):
        pool, test = LabelledPool(data[0]), data[1]
        whole = run_loop(learner, pool, self.CONFIG, test, tmp_path / "whole.json")
        path = tmp_path / "killed.json"
        for _ in range(2):
            with pytest.raises(KeyboardInterrupt):
                run_loop(Stopping(learner, 2), pool, self.CONFIG, test, path)
        assert len(json.loads(path.read_text())["rounds"]) == 4
        assert run_loop(learner, pool, self.CONFIG, test, path) == whole
        assert path.read_bytes() == (tmp_path / "whole.json").read_bytes()
        # a finished one trains nothing
        assert run_loop(Stopping(learner, 0), pool, self.CONFIG, test, path) == whole
        assert whole.table()["n_labels"].tolist() == [2, 8, 14, 20, 26]

    def test_a_file_of_something_else(self, learner, data, tmp_path):
        path = tmp_path / "loop.json"
        pool = LabelledPool(data[0].subset(range(5)))
        run_loop(learner, pool, LoopConfig("error", seed=1), path=path)
        with pytest.raises(ConfigError, match="holds another loop, with another config: choose another file"):
            run_loop(learner, pool, LoopConfig("error", seed=2), path=path)
        with pytest.raises(ConfigError, match="with another pool and test"):
            run_loop(learner, LabelledPool(data[0].subset(range(4))), LoopConfig("error", seed=1), data[1], path)
        path.write_text("[1")
        with pytest.raises(ConfigError, match="holds no active-learning loop"):
            run_loop(learner, pool, LoopConfig("error", seed=1), path=path)


class TestLiveCalculator:
    def test_another_learner_or_other_labels_do_not_go_on(self, learner, data, ani2xt, tmp_path):
        pool, path = LabelledPool(data[0].subset(range(12))), tmp_path / "loop.json"
        config = LoopConfig("error", max_labels=3)
        run_loop(learner, pool, config, path=path)
        other = LastLayerCommittee(ani2xt, "HCO", n_members=4, penalty=1e-3)
        with pytest.raises(ConfigError, match="holds another loop, with another learner: choose another file"):
            run_loop(other, pool, config, path=path)
        relabelled = LabelledPool(dataclasses.replace(pool.dataset, energies=pool.dataset.energies + 1.0))
        with pytest.raises(ConfigError, match="holds another loop, with another labelling: choose another file"):
            run_loop(learner, relabelled, config, path=path)
        # a learner that does not describe itself is taken at its word, and does not make the file forget
        run_loop(Stopping(learner, 0), pool, config, path=path)
        with pytest.raises(ConfigError, match="another learner"):
            run_loop(other, pool, config, path=path)
        content = json.loads(path.read_text())
        del content["rounds"][0]["next_scale"]
        path.write_text(json.dumps(content))
        with pytest.raises(ConfigError, match="holds no active-learning loop .*a round lacks next_scale"):
            run_loop(learner, pool, config, path=path)

    def test_constraints_do_not_hide_forces(self, data):
        free, held = data[0].frames[0].copy(), data[0].frames[0].copy()
        held.set_constraint(FixAtoms(range(len(held))))
        labels = [CalculatorPool([frame], LennardJones()).label([0]).forces[0] for frame in (free, held)]
        assert np.abs(labels[0]).max() > 0
        np.testing.assert_allclose(labels[1], labels[0], rtol=0, atol=1e-12)

    def test_labels_of_another_method_are_not_taken(self, data, tmp_path):
        frames = data[0].frames[:1]
        first = CalculatorPool(frames, LennardJones(), tmp_path, "one")
        label = first.label([0])
        assert CalculatorPool(frames, LennardJones(), tmp_path, "one").label([0]).energies == label.energies
        (path,) = tmp_path.iterdir()
        for calculator, name in ((LennardJones(epsilon=0.9), "one"), (LennardJones(), "two")):
            other = CalculatorPool(frames, calculator, tmp_path, name)
            other.label([0])
            assert other.calls == 1
        for content in ("{", "[]", '{"energy": 1}', '{"energy": 1, "forces": [[0, 0, 0]]}'):
            path.write_text(content)
            with pytest.raises(DataError, match=r"\.json holds no label of C2H6O"):
                CalculatorPool(frames, LennardJones(), tmp_path, "one").label([0])
            assert path.read_text() == content
        zeros = [[0.0] * 3] * 9
        path.write_text(json.dumps({"energy": float("nan"), "forces": zeros}))
        with pytest.raises(DataError, match="holds a label that is not finite"):
            CalculatorPool(frames, LennardJones(), tmp_path, "one").label([0])
        path.write_text(json.dumps({"energy": 1.0, "forces": zeros}))
        assert CalculatorPool(frames, LennardJones(), tmp_path, "one").label([0]).energies == [1.0]

    def test_members_that_say_the_same_are_no_committee(self, learner, data):
        class Agreeing(Stopping):
            def predict(self, frames):
                said = super().predict(frames)
                return CommitteePredictions(said.energies[[0, 0]], tuple(forces[[0, 0]] for forces in said.forces))

        with pytest.raises(ModelError, match="all members of the committee say the same about the"):
            run_loop(Agreeing(learner, 9), LabelledPool(data[0].subset(range(12))), LoopConfig())

    def test_labels_only_what_is_chosen_and_each_once(self, learner, data, tmp_path):
        gfn2 = method("gfn2-xtb")
        pool = CalculatorPool(data[0].frames, gfn2.make(), tmp_path / "labels", gfn2.name)
        config = LoopConfig(stop_share=0.0, max_labels=8)
        live = run_loop(learner, pool, config, data[1], tmp_path / "live.json")
        assert pool.calls == len(live.train) == 8
        # the same as with the labels of the file, which are of the same method
        known = run_loop(learner, LabelledPool(data[0]), config, data[1])
        assert live.train == known.train
        errors = [run.table()["force_rmse_vector"].to_numpy() for run in (live, known)]
        np.testing.assert_allclose(*errors, rtol=1e-3)
        # another process goes on with the labels that are there
        again = CalculatorPool(data[0].frames, gfn2.make(), tmp_path / "labels", gfn2.name)
        assert run_loop(learner, again, config, data[1]) == live
        assert again.calls == 0


class TestComparison:
    def table(self):
        """Errors of two strategies over two seeds, four rounds each."""
        rows = []
        for name, curves in {"a": ([8, 4, 2, 1], [8, 6, 2, 1]), "b": ([8, 7, 6, 2], [8, 7, 5, 2])}.items():
            for seed, curve in enumerate(curves):
                rows += [(name, seed, 10 * (k + 1), error) for k, error in enumerate(curve)]
        return pd.DataFrame(rows, columns=["name", "seed", "n_labels", "force_rmse_vector"])

    def test_structures_needed(self):
        needed = structures_needed(self.table(), 3.0).set_index("name")
        # 4 -> 2 and 6 -> 2 between 20 and 30; 6 -> 2 and 5 -> 2 between 30 and 40
        assert needed.loc["a", "mean"] == pytest.approx((25 + 27.5) / 2)
        expected = stats.t.interval(0.95, 1, loc=26.25, scale=stats.sem([25, 27.5]))
        assert (needed.loc["a", "lower"], needed.loc["a", "upper"]) == pytest.approx(expected)
        assert needed.loc["b", "mean"] == pytest.approx((37.5 + 30 + 20 / 3) / 2)
        assert structures_needed(self.table(), 9.0)["mean"].tolist() == [10, 10]

    def test_a_target_that_is_missed(self):
        needed = structures_needed(self.table(), 1.5).set_index("name")
        assert (needed.loc["b", "missed"], needed.loc["b", "n_seeds"]) == (2, 0)
        assert np.isnan(needed.loc["b", "mean"])
        assert needed.loc["a", "missed"] == 0

    def test_an_error_that_rises_again_has_not_arrived(self):
        table = pd.DataFrame({"name": "a", "seed": 0, "n_labels": [1, 2, 3, 4], "force_rmse_vector": [4, 1, 3, 1]})
        assert structures_needed(table, 2.0)["mean"][0] == pytest.approx(3.5)

    def test_a_target_of_its_own_for_every_seed(self):
        needed = structures_needed(self.table(), {0: 4.0, 1: 6.0}).set_index("name")
        assert needed.loc["a", "mean"] == pytest.approx((20 + 20) / 2)
        # 6 -> 2 between 30 and 40; 7 -> 5 between 20 and 30
        assert needed.loc["b", "mean"] == pytest.approx((35 + 25) / 2)
        assert labels_saved(self.table(), pd.Series({0: 4.0, 1: 6.0}), "a", than="b")[0] == pytest.approx(10)

    def test_final_errors_are_those_with_the_most_labels(self):
        table = self.table()
        table.loc[(table["seed"] == 1) & (table["n_labels"] == 40) & (table["name"] == "b"), "force_rmse_vector"] = 3
        assert final_errors(table).to_dict() == {0: 1.5, 1: 2.0}

    def test_savings_are_paired(self):
        mean, lower, upper = labels_saved(self.table(), 3.0, "a", than="b")
        differences = [37.5 - 25, 30 + 20 / 3 - 27.5]
        assert mean == pytest.approx(np.mean(differences))
        assert (lower, upper) == pytest.approx(stats.t.interval(0.95, 1, loc=mean, scale=stats.sem(differences)))

    def test_mean_interval(self):
        values = default_rng(0).normal(size=7)
        expected = stats.t.interval(0.9, 6, loc=values.mean(), scale=stats.sem(values))
        assert mean_interval(values, 0.9)[1:] == pytest.approx(expected)
        assert mean_interval([3.0])[0] == 3.0
        assert np.isnan(mean_interval([3.0])[1])

    def test_strategies_start_alike_and_are_recorded(self, learner, data, tmp_path):
        pool, test = data
        splits = [(LabelledPool(pool.subset(range(20 * k, 20 * k + 20))), test) for k in range(2)]
        configs = {
            name: LoopConfig(name, start_share=0.1, add_share=0.15, stop_share=0.0, max_labels=8)
            for name in ("error", "random")
        }
        table = compare_strategies(lambda: learner, splits, configs, tmp_path)
        assert len(table) == 12
        assert {path.name for path in tmp_path.iterdir()} == {
            f"{name}-{seed}.json" for name in configs for seed in (0, 1)
        }
        first = table[table["round"] == 0].pivot(index="seed", columns="name", values="force_rmse_vector")
        np.testing.assert_array_equal(first["error"], first["random"])
        assert first["error"].nunique() == 2

    def test_all_ways_through_a_pool_end_with_one_model(self, learner, data, tmp_path):
        pool, test = LabelledPool(data[0].subset(range(12))), data[1]
        configs = {
            name: LoopConfig(name, start_share=0.2, add_share=0.4, drop_below=0.0, stop_share=0.0)
            for name in ("committee", "random")
        }
        table = compare_strategies(lambda: learner, [(pool, test), (pool, test)], configs)
        counts = table["n_labels"].unique().tolist()
        assert counts == [2, 7, 12]
        order = default_rng(0).permutation(12)
        for seed, whole in final_errors(table).items():
            runs = table[(table["seed"] == seed) & (table["n_labels"] == 12)]
            assert (runs["force_rmse_vector"] == whole).all()
            along = learn_in_order(learner, pool, order, counts, test, seed)
            assert along["force_rmse_vector"].iloc[-1] == whole
            learner.fit(data[0].subset(np.sort(order[:7])), seed)
            errors = evaluate(test, learner.predict(test.frames).mean())
            for quantity in ("force_rmse_vector", "energy_rmse_per_atom"):
                assert along[quantity].iloc[1] == pytest.approx(errors[quantity].value, rel=1e-12)
        assert not structures_needed(table, 1.1 * final_errors(table))["missed"].any()


class TestRefusals:
    def test_orders(self, learner, data):
        pool = LabelledPool(data[0].subset(range(4)))
        with pytest.raises(ConfigError, match="an order must name each structure once"):
            learn_in_order(learner, pool, [1, 2, 1], [2], data[1], 0)
        with pytest.raises(ConfigError, match=r"sizes must lie in 1 to 3, got \[2, 4\]"):
            learn_in_order(learner, pool, [1, 2, 0], [2, 4], data[1], 0)

    @pytest.mark.parametrize(
        ("wrong", "sentence"),
        [
            ({"strategy": "best"}, "strategy must be one of committee, error, random, got 'best'"),
            ({"bound": 0.0}, "bound must be positive, got 0.0"),
            ({"start_share": 1.5}, r"start_share must lie between 0 and 1, got 1\.5"),
            ({"stop_share": -0.1}, r"stop_share must lie between 0 and 1, got -0\.1"),
            ({"seed": -1}, "max_labels and seed must not be negative, got 0 and -1"),
        ],
    )
    def test_settings(self, wrong, sentence):
        with pytest.raises(ConfigError, match=sentence):
            LoopConfig(**wrong)

    def test_small_pools(self, learner, data):
        with pytest.raises(DataError, match="a pool needs at least three structures, got 2"):
            run_loop(learner, LabelledPool(data[0].subset([0, 1])), LoopConfig())
