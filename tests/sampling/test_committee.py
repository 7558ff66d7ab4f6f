from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import molecule
from ase.calculators.singlepoint import SinglePointCalculator
from numpy.random import default_rng
from scipy.optimize import minimize
from scipy.stats import norm, spearmanr

from helpers.potential_references import toy_potential
from tlmc.data.loading import dataset_from_frames, load_dataset
from tlmc.data.splits import split_dataset
from tlmc.descriptors.enrichment import fit_enrichment
from tlmc.errors import ConfigError, DataError, ModelError
from tlmc.evaluation.metrics import evaluate
from tlmc.families.ani import Layer, average, energy_spread, enrich, extend, relabel, scratch
from tlmc.families.ani.transfer import first_members
from tlmc.potentials import predict
from tlmc.potentials.model_files import load_model, load_tensors, save_model, save_tensors
from tlmc.potentials.reference import ReferenceEnergies, fit_reference
from tlmc.sampling import (
    CommitteePredictions,
    LastLayerCommittee,
    bootstrap,
    calibrate,
    coverage,
    disputed,
    error_against_spread,
    members,
    normal_quantile,
    predict_committee,
    reliability,
)
from tlmc.training.config import recipe
from tlmc.training.fine_tuning import finetune


def labelled(n_frames: int):
    """Molecules with labels of another potential."""
    drawn = []
    teacher = toy_potential(members=1, seed=9)
    for k in range(n_frames):
        frame = molecule(("CH3OH", "H2O", "CO2")[k % 3])
        frame.rattle(0.05, seed=k)
        said = predict(teacher, [frame])
        frame.calc = SinglePointCalculator(frame, energy=said.energies[0], forces=said.forces[0])
        drawn.append(frame)
    return dataset_from_frames(drawn, name="toy", source="memory")


def frames() -> list[Atoms]:
    result = [molecule("CH3OH"), molecule("H2O"), molecule("CO2", vacuum=2.0, pbc=True)]
    for k, frame in enumerate(result):
        frame.rattle(0.05, seed=k)
    return result


@pytest.fixture(scope="module")
def toy():
    return toy_potential(members=4)


@pytest.fixture(scope="module")
def ethanol():
    """Twenty-five frames to train on and 175 others, of one trajectory."""
    data = load_dataset("ethanol")
    order = default_rng(0).permutation(len(data))[:200]
    return data.subset(order[:25]), data.subset(order[25:])


@pytest.fixture(scope="module")
def fitted(ani2xt, ethanol):
    train, rest = ethanol
    committee = LastLayerCommittee(ani2xt, train.elements).fit(train, seed=0)
    return committee, committee.predict(rest.frames)


class TestCommittee:
    def test_members_of_an_ensemble(self, toy):
        said = predict_committee(toy, frames())
        assert (said.n_members, toy.members) == (4, 4)
        whole = predict(toy, frames())
        np.testing.assert_allclose(said.mean().energies, whole.energies, rtol=1e-12)
        for ours, theirs in zip(said.mean().forces, whole.forces, strict=True):
            np.testing.assert_allclose(ours, theirs, atol=1e-10)
        assert all(one.members == 1 for one in members(toy))

    def test_rho_is_that_of_the_ensemble(self, toy):
        np.testing.assert_allclose(predict_committee(toy, frames()).rho(), energy_spread(toy, frames()), rtol=1e-9)

    def test_models_of_their_own(self, toy):
        other = toy_potential(members=1, seed=7)
        said = predict_committee([*members(toy)[:2], other], frames())
        np.testing.assert_allclose(said.energies[2], predict(other, frames()).energies)
        with pytest.raises(ModelError, match="a committee needs members, got none"):
            predict_committee([], frames())

    def test_one_model_twice_cannot_disagree(self, toy):
        copy = dataclasses.replace(toy, networks={s: tuple(layers) for s, layers in toy.networks.items()})
        other = toy_potential(members=4, seed=7)
        with pytest.raises(ModelError, match="models 0 and 2 of the committee are one and the same"):
            predict_committee([toy, other, copy], frames())

    def test_spreads(self):
        rng = default_rng(1)
        energies, forces = rng.normal(size=(5, 1)), rng.normal(size=(5, 4, 3))
        said = CommitteePredictions(energies, (forces,))
        sigma = np.sqrt(((energies - energies.mean()) ** 2).sum() / 4)
        assert said.rho()[0] == pytest.approx(sigma / 2)
        assert said.energy_spread_per_atom()[0] == pytest.approx(sigma / 4)
        per_atom = np.sqrt(((forces - forces.mean(axis=0)) ** 2).sum(axis=(0, 2)) / 4)
        np.testing.assert_allclose(said.force_spread()[0], per_atom)
        assert said.frame_force_spread()[0] == pytest.approx(np.sqrt((per_atom**2).mean()))

    def test_one_member_has_no_spread(self, toy):
        said = predict_committee(members(toy)[:1], frames())
        for spread in (said.rho, said.energy_spread_per_atom, said.force_spread, said.frame_force_spread):
            with pytest.raises(ModelError, match="a spread needs two members or more, got 1"):
                spread()

    def test_bootstrap(self):
        drawn = bootstrap(1000, 3, default_rng(2))
        assert drawn.shape == (3, 1000)
        assert not np.array_equal(drawn[0], drawn[1])
        missed = [1 - len(np.unique(row)) / 1000 for row in drawn]
        np.testing.assert_allclose(missed, np.exp(-1), atol=0.04)
        with pytest.raises(ConfigError, match="needs frames and members, got 0 and 3"):
            bootstrap(0, 3, default_rng(2))

    def test_disputed(self):
        np.testing.assert_array_equal(disputed(np.array([0.1, 0.5, 0.2, 0.5]), 0.1), [1, 3, 2])
        assert not disputed(np.array([0.1]), 1.0).size
        with pytest.raises(ConfigError, match="threshold must be zero or positive, got -1"):
            disputed(np.array([0.1]), -1)


class TestLastLayer:
    @pytest.mark.slow
    def test_members_are_the_models_that_they_say(self, fitted, ethanol):
        committee, said = fitted
        some = predict_committee(committee.potentials(), ethanol[1].frames[:3])
        np.testing.assert_allclose(said.energies[:, :3], some.energies, rtol=1e-12)
        for ours, theirs in zip(said.forces[:3], some.forces, strict=True):
            np.testing.assert_allclose(ours, theirs, atol=1e-9)

    def test_minimises_the_loss(self, ani2xt, ethanol):
        train = ethanol[0].subset(range(6))
        committee = LastLayerCommittee(ani2xt, train.elements, n_members=1, lambda_=0.3, penalty=1e-2).fit(train, 0)
        features = committee.features(train.frames)
        offset = committee.reference_.energies(train.frames)
        n = train.n_atoms[0]
        energies = np.stack([f.energy for f in features]) / n
        forces = np.concatenate([f.forces for f in features])
        energy = (train.energies - offset - [f.start_energy for f in features]) / n
        force = np.concatenate([label.ravel() for label in train.forces]) - np.concatenate(
            [f.start_forces for f in features]
        )
        matrix = 0.3 * forces.T @ forces / n / 6 + 0.7 * energies.T @ energies / 6
        gamma = 1e-2 * np.trace(matrix) / len(matrix)

        def loss_and_slope(w):
            e, f = energies @ w - energy, forces @ w - force
            loss = 0.3 * (f @ f) / n / 6 + 0.7 * (e @ e) / 6 + gamma * (w @ w)
            return loss, 2 * (0.3 * forces.T @ f / n / 6 + 0.7 * energies.T @ e / 6 + gamma * w)

        found = minimize(loss_and_slope, np.zeros(committee.n_weights), jac=True, method="L-BFGS-B")
        ours, slope = loss_and_slope(committee.weights_[0])
        assert np.abs(slope).max() < 1e-10 * np.abs(loss_and_slope(np.zeros(len(slope)))[1]).max()
        assert ours <= found.fun * (1 + 1e-9)

    @pytest.mark.slow
    def test_learns(self, ani2xt, ethanol, fitted):
        train, rest = ethanol
        start = predict(ani2xt, rest.frames)
        offset = fit_reference(train.frames, train.energies, predict(ani2xt, train.frames).energies)
        before = evaluate(rest, start._replace(energies=start.energies + offset.energies(rest.frames)))
        after = evaluate(rest, fitted[1].mean())
        for quantity in ("force_rmse_vector", "energy_rmse_per_atom"):
            assert after[quantity].value < 0.6 * before[quantity].value

    def test_same_seed_same_members(self, ani2xt, ethanol):
        train = ethanol[0]
        one, two, other = (
            LastLayerCommittee(ani2xt, train.elements, n_members=3).fit(train, seed).weights_ for seed in (1, 1, 2)
        )
        np.testing.assert_array_equal(one, two)
        assert not np.allclose(one, other)

    @pytest.mark.slow
    def test_disagrees_more_where_it_has_no_data(self, fitted, ethanol):
        committee, said = fitted
        stretched = [frame.copy() for frame in ethanol[1].frames[:20]]
        for frame in stretched:
            # the C-C bond, far beyond what the trajectory has seen
            first, second = np.flatnonzero(frame.numbers == 6)
            frame.positions[first] += 0.3 * (frame.positions[first] - frame.positions[second])
        assert committee.predict(stretched).frame_force_spread().min() > np.median(said.frame_force_spread())

    def test_refusals(self, ani2xt, toy, ethanol):
        with pytest.raises(ModelError, match="the last layer of one network is refitted; toy has 4 members"):
            LastLayerCommittee(toy, "H")
        with pytest.raises(ConfigError, match=r"lambda_ in \[0, 1\], got 8, 1e-05 and 2"):
            LastLayerCommittee(ani2xt, "H", lambda_=2)
        committee = LastLayerCommittee(ani2xt, "HC")
        with pytest.raises(ModelError, match="has not been fitted"):
            committee.predict(frames())
        with pytest.raises(ModelError, match="fits no weights for O: name it in elements"):
            committee.fit(ethanol[0].subset([0]), 0)
        with pytest.raises(DataError, match="ethanol: no frames to fit"):
            committee.fit(ethanol[0].subset([]), 0)


def average_coverage(errors, spreads, groups, n_partitions=20):
    """Coverage of 90 % intervals on the half of the frames that the calibration never saw, over random halves."""
    found = []
    names = np.unique(groups)
    for k in range(n_partitions):
        seen = np.isin(groups, default_rng(k).permutation(names)[: len(names) // 2])
        calibration = calibrate(errors[seen], spreads[seen])
        found.append(coverage(errors[~seen], calibration.intervals(spreads[~seen], 0.9)))
    return np.array(found)


def residuals(dataset, said):
    """Return errors, spreads and frame numbers of energies per atom and of force components."""
    mean = said.mean()
    energy = (mean.energies - dataset.energies) / dataset.n_atoms
    force = np.concatenate([(a - b).ravel() for a, b in zip(mean.forces, dataset.forces, strict=True)])
    # the vector's variance belongs to three components
    spread = np.concatenate([np.repeat(s / np.sqrt(3), 3) for s in said.force_spread()])
    frame = np.repeat(np.arange(len(dataset)), 3 * dataset.n_atoms)
    return (energy, said.energy_spread_per_atom(), np.arange(len(dataset))), (force, spread, frame)


@pytest.fixture(scope="module")
def tuned(toy, tmp_path_factory):
    data = labelled(12)
    folder = tmp_path_factory.mktemp("run")
    result = finetune(toy, data, split_dataset(data, seed=0), recipe("short", epochs=2, lr=3e-3), folder)
    return result.potential, folder / "model.safetensors"


class TestFineTunedEnsembles:
    """Their loss sees the mean, so that the members drift apart where nothing is wrong: no committee."""

    NO_COMMITTEE = "4 members of this model, which descends from toy.*, are no committee: .* only their mean"

    def refuse(self, model):
        assert not model.committee
        for ask in (
            lambda: energy_spread(model, frames()),
            lambda: predict_committee(model, frames()),
            lambda: members(model),
            lambda: first_members(model, 2),
        ):
            with pytest.raises(ModelError, match=self.NO_COMMITTEE):
                ask()
        # the mean is a model like any other
        assert np.isfinite(predict(model, frames()).energies).all()

    @pytest.mark.slow
    def test_result_checkpoint_and_what_is_made_of_them(self, tuned, tmp_path):
        model, path = tuned
        self.refuse(model)
        stored, _ = load_model(path)
        self.refuse(stored)
        save_model(relabel(stored, {"Si": "C"}), tmp_path / "again.safetensors")
        self.refuse(load_model(tmp_path / "again.safetensors")[0])
        soap = fit_enrichment(frames(), "soap", {"r_cut": 3.0, "n_max": 2, "l_max": 2})
        for changed in (extend(stored, {"Si": "C"}), enrich(stored, soap), stored.with_reference(None)):
            self.refuse(changed)
        self.refuse(stored.to(torch.float64))

    @pytest.mark.slow
    def test_fine_tuning_again_with_fewer_members(self, tuned):
        data = labelled(12)
        with pytest.raises(ModelError, match=self.NO_COMMITTEE):
            finetune(tuned[0], data, split_dataset(data, seed=0), recipe("short", epochs=1, members=2))

    @pytest.mark.slow
    def test_models_trained_one_by_one_are_one(self, tuned, toy):
        other = dataclasses.replace(
            tuned[0], networks={s: tuple(Layer(1.01 * w, b) for w, b in layers) for s, layers in toy.networks.items()}
        )
        said = predict_committee([tuned[0], other], frames())
        assert said.n_members == 2
        assert (said.rho() > 0).all()
        np.testing.assert_allclose(said.energies[0], predict(tuned[0], frames()).energies, rtol=1e-12)

    def test_a_mean_of_models(self, toy):
        with pytest.raises(ModelError, match="8 members of this model, which descends from toy, are no committee"):
            energy_spread(average([toy, toy_potential(members=4, seed=3)]), frames())

    def test_random_weights(self, toy):
        self.refuse(scratch(toy, seed=1))

    def test_a_file_without_the_mark(self, toy, tmp_path):
        save_model(toy, tmp_path / "model.safetensors")
        assert load_model(tmp_path / "model.safetensors")[0].committee
        tensors, description = load_tensors(tmp_path / "model.safetensors")
        for mark in ("yes", 1, False):
            description["model"]["committee"] = mark
            save_tensors(tmp_path / "old.safetensors", tensors, description)
            self.refuse(load_model(tmp_path / "old.safetensors")[0])

    def test_published_weights_stay_one(self, toy):
        soap = fit_enrichment(frames(), "soap", {"r_cut": 3.0, "n_max": 2, "l_max": 2})
        reference = ReferenceEnergies({"H": 0.1, "C": -0.2, "O": 0.3}, "per_element")
        for model in (
            relabel(toy, {"Si": "C"}),
            extend(toy, {"Si": "C"}),
            enrich(toy, soap),
            toy.with_reference(reference),
            first_members(toy, 3),
            toy.to(torch.float32),
        ):
            np.testing.assert_allclose(
                predict_committee(model, frames()).rho(), energy_spread(model, frames()), rtol=1e-3
            )

    @pytest.mark.needs_mirror
    def test_start_models(self, ani2x, ani2xt):
        assert ani2x.committee
        assert not ani2xt.committee


class TestCoverageOnRealData:
    @pytest.mark.slow
    def test_embedded_set(self, fitted, ethanol):
        for errors, spreads, groups in residuals(ethanol[1], fitted[1]):
            found = average_coverage(errors, spreads, groups)
            assert 0.85 < found.mean() < 0.95
            # every single partition, allowing for the chance of its 88 test frames
            assert (np.abs(found - 0.9) < 0.12).all()

    @pytest.mark.slow
    def test_spread_ranks_the_errors(self, fitted, ethanol):
        errors, spreads, _ = residuals(ethanol[1], fitted[1])[1]
        bins = error_against_spread(errors, spreads, n_bins=8)
        assert spearmanr(bins.spread, bins.error).statistic > 0.9
        assert bins.error[-1] > 1.5 * bins.error[0]

    @pytest.mark.slow
    @pytest.mark.needs_mirror
    def test_ani2x_on_a_public_crystal(self, ani2x):
        data = load_dataset("molcrys-mace/21_urea").crystals()
        data = data.subset(default_rng(3).permutation(len(data))[:50])
        said = predict_committee(ani2x, data.frames)
        # the offset between the two levels of theory is fitted on frames that are used for nothing else
        fitted_on = data.subset(range(10))
        offset = fit_reference(fitted_on.frames, fitted_on.energies, said.mean().energies[:10])
        said = CommitteePredictions(said.energies + offset.energies(data.frames), said.forces)
        rest = CommitteePredictions(said.energies[:, 10:], said.forces[10:])
        for errors, spreads, groups in residuals(data.subset(range(10, 50)), rest):
            assert 0.85 < average_coverage(errors, spreads, groups).mean() < 0.95


class TestCalibration:
    def test_scale_is_the_maximum_of_the_likelihood(self):
        rng = default_rng(4)
        spreads = rng.uniform(0.5, 2.0, 200)
        errors = 3.0 * spreads * rng.normal(size=200)
        scale = calibrate(errors, spreads).scale
        assert scale == pytest.approx(3.0, rel=0.15)
        best = norm.logpdf(errors, scale=scale * spreads).sum()
        for other in (0.98 * scale, 1.02 * scale):
            assert norm.logpdf(errors, scale=other * spreads).sum() < best

    @pytest.mark.parametrize("level", [0.5, 0.8, 0.9])
    def test_conformal_intervals_hold_for_any_distribution(self, level):
        # heavy tails, not centred, and a spread that means nothing
        rng = default_rng(5)
        found = []
        for _ in range(2000):
            errors, spreads = rng.standard_t(1.5, size=40) + 0.5, rng.uniform(0.1, 3.0, 40)
            calibration = calibrate(errors[:-1], spreads[:-1])
            found.append(coverage(errors[-1:], calibration.intervals(spreads[-1:], level)))
        assert np.mean(found) == pytest.approx(np.ceil(40 * level) / 40, abs=4 * np.sqrt(0.25 / 2000))

    def test_few_values_promise_little(self):
        calibration = calibrate(np.arange(1.0, 9.0), np.ones(8))
        assert calibration.quantile(8 / 9) == 8
        assert calibration.quantile(0.5) == 5
        with pytest.raises(DataError, match=r"8 validation values cannot promise a coverage of 0\.9; it needs 9"):
            calibration.quantile(0.9)
        assert calibrate(np.arange(1.0, 10.0), np.ones(9)).quantile(0.9) == 9
        with pytest.raises(ConfigError, match="coverage must lie between 0 and 1, got 1.5"):
            calibration.quantile(1.5)

    def test_reliability_of_right_and_wrong_error_bars(self):
        errors = default_rng(6).normal(size=(4000, 3))
        right, small = reliability(errors, np.ones_like(errors)), reliability(errors, np.full_like(errors, 0.3))
        np.testing.assert_allclose(right.observed, right.nominal, atol=0.02)
        assert right.miscalibration < 0.01 < 0.2 < small.miscalibration
        assert (small.observed < small.nominal).all()
        # by hand, at one level
        k = int(np.abs(small.nominal - 0.9).argmin())
        assert small.observed[k] == pytest.approx((np.abs(errors) < 0.3 * norm.ppf(0.95)).mean())
        assert normal_quantile(0.9) == pytest.approx(norm.ppf(0.95))

    def test_bins_hold_all_values(self):
        rng = default_rng(7)
        spreads = rng.uniform(0.1, 5.0, 1001)
        errors = 2 * spreads * rng.choice([-1, 1], 1001)
        bins = error_against_spread(errors, spreads, 7)
        assert bins.n_values.sum() == 1001
        assert np.ptp(bins.n_values) <= 1
        np.testing.assert_allclose(bins.error, 2 * bins.spread)

    def test_refusals(self):
        for function in (calibrate, coverage, reliability, error_against_spread):
            with pytest.raises(DataError, match=r"must have one shape and hold values, got \(2,\) and \(3,\)"):
                function(np.ones(2), np.ones(3))
            with pytest.raises(DataError, match="spreads positive, got errors to 1.0, spreads from 0.0"):
                function(np.ones(2), np.array([0.0, 1.0]))
        with pytest.raises(DataError, match="2 values cannot fill 3 bins"):
            error_against_spread(np.ones(2), np.ones(2), 3)
