"""Gaussian processes of whole structures, learning curves and costs."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tlmc.datasets import load_dataset
from tlmc.descriptors.coulomb import CoulombMatrix
from tlmc.descriptors.ewald import EwaldMatrix
from tlmc.errors import ConfigError, DataError
from tlmc.evaluation.metrics import evaluate
from tlmc.kernels import GDML, DescriptorGPR, Gaussian, GaussianProcess, NystromProcess
from tlmc.kernels.learning_curve import fit_seconds, learning_curve, power_law


@pytest.fixture(scope="module")
def ethanol():
    return load_dataset("ethanol").subset(np.arange(0, 1001, 10))


def test_a_crystal_with_its_molecule():
    naphthalene = load_dataset("naphthalene").subset(np.arange(0, 120, 8))
    process = DescriptorGPR(EwaldMatrix(36, "eigenspectrum"), Gaussian).fit(naphthalene)
    predictions = process.predict(naphthalene.frames[:2])
    assert evaluate(naphthalene.subset([0, 1]), predictions)["energy_rmse_per_atom"].value < 0.03
    # the sum of the forces on a crystal vanishes
    assert np.abs(predictions.forces[1].sum(axis=0)).max() < 1e-8


def test_too_little_to_learn_from(ethanol):
    with pytest.raises(DataError, match="at least two training frames, got 1"):
        DescriptorGPR(CoulombMatrix(9), Gaussian).fit(ethanol.subset([0]))
    with pytest.raises(DataError, match="2 points with a median distance of 0"):
        DescriptorGPR(CoulombMatrix(9), Gaussian).fit(ethanol.subset([0, 0]))


class TestLearningCurve:
    def test_errors_fall_and_are_those_of_the_metrics(self, ethanol):
        train, judged = np.arange(0, 90), np.arange(90, 100)
        learners = {"sGDML": lambda: GDML(sigma=8.0, permutations="none")}
        table = learning_curve(learners, ethanol, train, judged, (4, 16), seeds=(0, 1))
        assert table.columns[:3].tolist() == ["learner", "n_train", "seed"]
        assert len(table) == 4
        means = table.groupby("n_train")["force_rmse_vector"].mean()
        assert means[16] < 0.7 * means[4]
        part = np.sort(np.random.default_rng(1).permutation(train)[:4])
        again = GDML(sigma=8.0, permutations="none").fit(ethanol.subset(part))
        expected = evaluate(ethanol.subset(judged), again.predict(ethanol.subset(judged).frames))
        row = table[(table["n_train"] == 4) & (table["seed"] == 1)].iloc[0]
        assert row["force_rmse_vector"] == pytest.approx(expected["force_rmse_vector"].value)
        assert row["energy_rmse_per_atom"] == pytest.approx(expected["energy_rmse_per_atom"].value)
        assert (table[["fit_seconds", "predict_seconds"]] > 0).all(axis=None)

    def test_what_is_trained_on_is_not_judged(self, ethanol):
        with pytest.raises(ConfigError, match="frame 3 is trained on and judged"):
            learning_curve({}, ethanol, np.arange(5), np.array([3]), (2,))
        with pytest.raises(ConfigError, match=r"sizes must lie in 1 to 5, got \[6\]"):
            learning_curve({}, ethanol, np.arange(5), np.array([7]), (6,))


class TestCost:
    def test_inducing_points_save_time(self):
        rng = np.random.default_rng(0)
        x, y = torch.from_numpy(rng.normal(size=(1500, 3))), torch.from_numpy(rng.normal(size=1500))
        estimators = {
            "exact": lambda: GaussianProcess(Gaussian(), 0.1, optimize=False),
            "Nystrom": lambda: NystromProcess(Gaussian(), 0.1, 20),
        }
        table = fit_seconds(estimators, x, y, (300, 1500), repeats=2).set_index(["estimator", "n"])["seconds"]
        assert table["exact", 1500] > 2 * table["exact", 300]
        assert table["Nystrom", 1500] < table["exact", 1500]
        with pytest.raises(ConfigError, match=r"got \[1501\] and 1"):
            fit_seconds(estimators, x, y, (1501,))

    def test_power_law(self):
        assert power_law([1, 10, 100], [2, 2000, 2e6]) == pytest.approx(3.0)
        with pytest.raises(DataError, match="two sizes or more"):
            power_law([1, 1], [2, 3])
        with pytest.raises(DataError, match="positive values"):
            power_law([1, 2], [2, 0])
