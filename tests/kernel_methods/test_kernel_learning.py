"""Gaussian processes of whole structures, learning curves and costs."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from ase.build import molecule

from helpers import labelled
from tlmc.data.loading import load_dataset
from tlmc.descriptors.coulomb import CoulombMatrix
from tlmc.descriptors.ewald import EwaldMatrix
from tlmc.descriptors.soap import SOAP
from tlmc.errors import ConfigError, DataError
from tlmc.evaluation.metrics import evaluate
from tlmc.kernel_methods import GDML, DescriptorGPR, Gaussian, GaussianProcess, NystromProcess
from tlmc.kernel_methods.learning_curves import fit_seconds, learning_curve, power_law


@pytest.fixture(scope="module")
def ethanol():
    return load_dataset("ethanol").subset(np.arange(0, 1001, 10))


def springs(n, seed):
    """Return n distorted water molecules whose bonds are springs."""
    rng = np.random.default_rng(seed)
    frames, energies, forces = [], [], []
    for _ in range(n):
        frame = molecule("H2O")
        frame.rattle(0.1, rng=rng)
        vectors = frame.positions[[0, 0, 1]] - frame.positions[[1, 2, 2]]
        lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
        pulls = 10.0 * (lengths - [[0.97], [0.97], [1.5]]) * vectors / lengths
        frames.append(frame)
        energies.append(5.0 * ((lengths - [[0.97], [0.97], [1.5]]) ** 2).sum())
        forces.append(np.array([-pulls[0] - pulls[1], pulls[0] - pulls[2], pulls[1] + pulls[2]]))
    return labelled.dataset(["OH2"] * n, energies, forces), frames


@pytest.fixture(scope="module")
def water():
    dataset, frames = springs(80, seed=0)
    return replace(dataset, frames=tuple(frames))


def test_learns_springs_from_energies_alone(water):
    soap = SOAP(["H", "O"], r_cut=3.0, n_max=3, l_max=2, sigma=0.5, average="outer", cutoff="cosine")
    asked = water.subset(np.arange(60, 80))
    process = DescriptorGPR(soap, Gaussian).fit(water.subset(np.arange(60)))
    predicted = process.predict(asked.frames)
    error = predicted.energies - asked.energies
    assert error.std() < 0.05 * asked.energies.std()
    # forces were never shown
    assert np.std(np.array(predicted.forces) - np.array(asked.forces)) < 0.1 * np.std(asked.forces)
    # three standard deviations, noise included
    std = np.sqrt(process.energy_std(asked.frames) ** 2 + 9 * process.process_.noise_)
    assert (np.abs(error) < 3 * std).mean() > 0.8


@pytest.mark.parametrize(
    "descriptor",
    [CoulombMatrix(3), SOAP(["H", "O"], r_cut=3.0, n_max=2, l_max=2, average="inner", cutoff="cosine")],
    ids=["coulomb", "soap"],
)
def test_forces_are_the_negative_gradient(water, descriptor):
    process = DescriptorGPR(descriptor, Gaussian).fit(water.subset(np.arange(20)))
    # hyperparameters of the highest likelihood leave few digits for differences of energies
    rows = descriptor(water.frames[:20])
    labels = torch.from_numpy(water.energies[:20] / 3)
    process.process_ = GaussianProcess(Gaussian(1.0, 2.0), noise=1e-3, optimize=False).fit(rows, labels)
    frame, step = water.frames[30], 1e-4
    moved = [frame.copy(), frame.copy()]
    for sign, copy in zip((1, -1), moved, strict=True):
        copy.positions[1, 2] += sign * step
    energies = process.predict(moved).energies
    expected = -(energies[0] - energies[1]) / (2 * step)
    assert process.predict([frame]).forces[0][1, 2] == pytest.approx(expected, abs=1e-6)


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
