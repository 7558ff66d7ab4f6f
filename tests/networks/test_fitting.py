"""Training: it learns, is decided by its seed, looks at no test frame, and names what is wrong."""

from __future__ import annotations

import dataclasses
import signal
from functools import partial

import numpy as np
import pytest
import torch
from ase.build import molecule

from tlmc.data.loading import load_dataset
from tlmc.data.splits import split_dataset
from tlmc.descriptors.soap import SOAP
from tlmc.descriptors.symmetry_functions import SymmetryFunctions
from tlmc.errors import ConfigError, DataError, Interrupted, ModelError
from tlmc.evaluation.metrics import evaluate
from tlmc.networks import BehlerParrinelloNetwork, DeepTensorNetwork, FitConfig, error_over_size, fit, shrunk
from tlmc.potentials.model import Predictions
from tlmc.training.trainer import Trainer


def deep_tensor(species, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return DeepTensorNetwork(species, 4.0, 2, 12, 16, 0.4, 8, generator)


def behler_parrinello(species, seed=0):
    descriptor = SOAP(species, r_cut=4.0, n_max=2, l_max=2, cutoff="cosine")
    return BehlerParrinelloNetwork(descriptor, (16,), generator=torch.Generator().manual_seed(seed))


MAKE = {"Behler-Parrinello": behler_parrinello, "deep tensor": deep_tensor}


@pytest.fixture(scope="module")
def ethanol():
    data = load_dataset("ethanol").subset(range(0, 1000, 20))
    return data, split_dataset(data)


@pytest.fixture(scope="module")
def naphthalene():
    data = load_dataset("naphthalene").crystals().subset(range(0, 120, 5))
    return data, split_dataset(data)


@pytest.mark.slow
@pytest.mark.parametrize("kind", MAKE)
@pytest.mark.parametrize(("name", "epochs"), [("ethanol", 30), ("naphthalene", 30)])
def test_learns_more_than_the_mean(kind, name, epochs, request):
    data, split = request.getfixturevalue(name)
    learns(MAKE[kind](data.elements), data, split, epochs)


@pytest.mark.slow
@pytest.mark.needs_mirror
@pytest.mark.parametrize("kind", MAKE)
def test_learns_a_public_crystal_labelled_with_dft(kind):
    data = load_dataset("molcrys-mace/21_urea").crystals().subset(range(0, 170, 3))
    network = deep_tensor(data.elements)
    if kind == "Behler-Parrinello":
        # forces up to 10 eV/A: a descriptor as coarse as that of the other tests is not enough
        radial = [(4.0, r_s) for r_s in np.linspace(0.7, 3.3, 8)]
        angular = [(0.02, zeta, sign) for zeta in (1.0, 4.0) for sign in (1.0, -1.0)]
        network = BehlerParrinelloNetwork(SymmetryFunctions(data.elements, 4.0, radial, angular))
    learns(network, data, split_dataset(data), 20)


def learns(network, data, split, epochs):
    """Train, and compare the test error with that of the mean energy and no forces."""
    prepared = network.prepare(data.frames)
    result = fit(network, data, split, FitConfig(epochs=epochs, batch_size=2, lr=5e-3), prepared)
    test, train = data.subset(split.test), data.subset(split.train)
    metrics = evaluate(test, result.network.predict([prepared[k] for k in split.test]))
    mean_energy = (train.energies / train.n_atoms).mean() * test.n_atoms
    mean = evaluate(test, Predictions(mean_energy, tuple(0 * force for force in test.forces)))
    assert metrics["force_rmse_vector"].value < 0.7 * mean["force_rmse_vector"].value
    assert metrics["energy_rmse_per_atom"].value < mean["energy_rmse_per_atom"].value
    assert len(result.history) == epochs
    assert result.history["train_loss"].iloc[-1] < 0.2 * result.history["train_loss"].iloc[0]


@pytest.mark.parametrize("kind", MAKE)
class TestRepeatable:
    config = FitConfig(epochs=2)

    def weights(self, kind, data, split, config, seed=0):
        result = fit(MAKE[kind](data.elements, seed), data, split, config)
        return torch.cat([w.detach().flatten() for w in result.network.parameters()])

    def test_the_seeds_decide(self, kind, ethanol):
        one, same = (self.weights(kind, *ethanol, self.config) for _ in range(2))
        assert torch.equal(one, same)
        assert not torch.equal(one, self.weights(kind, *ethanol, self.config.model_copy(update={"seed": 1})))
        assert not torch.equal(one, self.weights(kind, *ethanol, self.config, seed=1))

    def test_the_test_part_is_not_looked_at(self, kind, ethanol):
        data, split = ethanol
        energies = data.energies.copy()
        energies[split.test] += 100.0
        spoiled = dataclasses.replace(data, energies=energies)
        assert torch.equal(
            self.weights(kind, data, split, self.config), self.weights(kind, spoiled, split, self.config)
        )

    def test_the_given_network_stays_as_it_was(self, kind, ethanol):
        network = MAKE[kind](ethanol[0].elements)
        before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
        fit(network, *ethanol, FitConfig(epochs=1))
        assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())


def test_history_holds_what_the_plots_need(ethanol):
    data, split = ethanol
    network = deep_tensor(data.elements)
    result = fit(network, data, split, FitConfig(epochs=2))
    history = result.history
    parts, quantities = ("train", "validation"), ("loss", "energy_rmse_per_atom", "force_rmse_vector")
    assert {f"{part}_{quantity}" for part in parts for quantity in quantities} <= set(history.columns)
    # the last row of the validation part is what the trained network says about it
    validation = data.subset(split.validation)
    metrics = evaluate(validation, result.network.predict(network.prepare(validation.frames)))
    for quantity in quantities[1:]:
        assert history[f"validation_{quantity}"].iloc[-1] == pytest.approx(metrics[quantity].value, rel=1e-3)


def test_mixed_frames_train_together():
    data = load_dataset("naphthalene").subset([0, 1, 2, 3, *range(121, 130)])
    split = split_dataset(data)
    result = fit(deep_tensor(data.elements), data, split, FitConfig(epochs=2, batch_size=3))
    assert np.isfinite(result.history.to_numpy()).all()


def test_shrunk_parts_are_nested(ethanol):
    split = ethanol[1]
    parts = [set(shrunk(split, n, seed=3).train) for n in (5, 10, len(split.train))]
    assert parts[0] < parts[1] < parts[2] == set(split.train)
    assert parts[0] != set(shrunk(split, 5, seed=4).train)
    assert np.array_equal(shrunk(split, 5).test, split.test)
    with pytest.raises(ConfigError, match="n_train must lie between 1 and the"):
        shrunk(split, len(split.train) + 1)


def test_errors_over_size_are_those_of_single_trainings(ethanol):
    data, split = ethanol
    config = FitConfig(epochs=2, batch_size=4)
    table = error_over_size(partial(deep_tensor, data.elements), data, split, (8, len(split.train)), config, (0, 1))
    assert table["n_train"].tolist() == [8, 8, 35, 35]
    assert table["seed"].tolist() == [0, 1, 0, 1]
    # two epochs of 9 batches are 18 steps, which are 9 epochs of 2 batches
    settings = FitConfig(epochs=9, batch_size=4, seed=1)
    trained = fit(deep_tensor(data.elements, 1), data, shrunk(split, 8, 1), settings).network
    test = data.subset(split.test)
    metrics = evaluate(test, trained.predict(trained.prepare(test.frames)))
    for quantity in ("energy_rmse_per_atom", "force_rmse_vector"):
        assert table[quantity].iloc[1] == pytest.approx(metrics[quantity].value, rel=1e-9)


class TestBadInput:
    def test_frames_of_another_set(self, ethanol):
        data, split = ethanol
        network = deep_tensor(data.elements)
        with pytest.raises(DataError, match="the prepared frames are not those of ethanol"):
            fit(network, data, split, prepared=network.prepare([molecule("H2O")] * len(data)))

    def test_an_empty_part(self, ethanol):
        data, split = ethanol
        empty = dataclasses.replace(split, validation=np.empty(0, dtype=np.int64))
        with pytest.raises(DataError, match="the validation part of the split of ethanol is empty"):
            fit(deep_tensor(data.elements), data, empty)

    @pytest.mark.parametrize("lr", [1e30, 1e4, 1e1])
    def test_a_last_step_that_diverges(self, ethanol, lr):
        """One batch, one epoch: no loss is looked at after the only step."""
        data, split = ethanol
        config = FitConfig(lr=lr, epochs=1, batch_size=1000, clip_norm=None)
        with pytest.raises(ModelError, match=r"the training diverged: .* after epoch 1.*: lower lr .* or set"):
            fit(deep_tensor(data.elements), data, split, config)

    def test_an_interrupt_is_a_sentence(self, ethanol, monkeypatch):
        data, split = ethanol
        monkeypatch.setattr(Trainer, "_step", lambda *_: signal.raise_signal(signal.SIGINT))
        with pytest.raises(Interrupted, match="in epoch 1 of 100: of a training in memory nothing is kept"):
            fit(deep_tensor(data.elements), data, split)

    def test_a_loss_that_is_no_number(self, ethanol):
        data, split = ethanol
        network = deep_tensor(data.elements)
        network.embedding.data.fill_(float("nan"))
        with pytest.raises(ModelError, match=r"the loss became nan in epoch 1, step 1: lower lr \(0.003\)"):
            fit(network, data, split)
