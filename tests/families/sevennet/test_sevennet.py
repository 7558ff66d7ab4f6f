"""SevenNet-0: the published weights, read without running anything, and answers as sevenn itself gives them."""

from __future__ import annotations

import os
import pickle
from dataclasses import replace
from functools import partial

import ase.build
import numpy as np
import pytest
import torch
from ase import Atoms

from helpers.labelled import dataset
from helpers.training import interrupted_after
from tlmc.data import Dataset, split_dataset
from tlmc.errors import ConfigError, ModelError
from tlmc.evaluation import evaluate
from tlmc.families.sevennet import model as sevennet
from tlmc.families.sevennet.family import SevenNetFamily
from tlmc.families.sevennet.learner import SevenNetLearner
from tlmc.families.sevennet.model import SHA256, read_checkpoint
from tlmc.files import sha256_file
from tlmc.potentials import ReferenceEnergies, load_model, load_start_model, predict, save_model
from tlmc.training import finetune, recipe
from tlmc.training.loss import batch_loss


@pytest.fixture(scope="module")
def model():
    return load_start_model("sevennet")


def crystal(seed: int = 0) -> Atoms:
    """Return a distorted cell of four CO2 molecules that is smaller than the cutoff."""
    frame = Atoms("C4O8", pbc=True, cell=[[5.6, 0.0, 0.3], [0.0, 5.4, 0.0], [0.2, 0.0, 5.9]])
    places = np.array([[0.0, 0.0, 0.0], [0.5, 0.5, 0.0], [0.5, 0.0, 0.5], [0.0, 0.5, 0.5]])
    axes = np.array([[1, 1, 1], [1, -1, 1], [-1, 1, 1], [1, 1, -1]]) / np.sqrt(3)
    centres = places @ frame.cell.array
    frame.positions = np.concatenate([centres, centres + 1.17 * axes, centres - 1.17 * axes])
    frame.positions += np.random.default_rng(seed).normal(scale=0.05, size=(12, 3))
    return frame


class Harmful:
    def __reduce__(self):
        return os.mkdir, ("harm",)


class TestReading:
    def test_another_file_is_not_opened(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        (tmp_path / "x.pth").write_bytes(pickle.dumps(Harmful()))
        with pytest.raises(ModelError, match=r"not hold the weights of SevenNet-0: SHA-256 \w+, not 7052cb"):
            read_checkpoint(tmp_path / "x.pth")

    def test_a_file_of_the_right_hash_still_runs_nothing(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        torch.save({"config": Harmful()}, tmp_path / "x.pth")
        monkeypatch.setattr(sevennet, "SHA256", sha256_file(tmp_path / "x.pth"))
        with pytest.raises(pickle.UnpicklingError):
            read_checkpoint(tmp_path / "x.pth")
        assert not (tmp_path / "harm").exists()

    def test_no_file(self, tmp_path):
        with pytest.raises(ModelError, match=r"x\.pth does not exist: tlmc knows the layout of sevenn 0\.13\.0"):
            read_checkpoint(tmp_path / "x.pth")

    def test_without_the_package(self, monkeypatch):
        monkeypatch.setattr(SevenNetFamily, "is_installed", staticmethod(lambda: False))
        with pytest.raises(ConfigError, match=r"needs the package sevenn: pip install 'tlmc\[sevennet\]'"):
            load_start_model("sevennet")


class TestModel:
    @pytest.mark.slow
    def test_published_model(self, model):
        assert (model.name, model.r_cut, model.fingerprint, len(model.elements)) == ("sevennet", 5.0, SHA256, 89)
        trainable = sum(weight.numel() for weight in model.network.parameters() if weight.requires_grad)
        assert trainable == 842440

    @pytest.mark.slow
    @pytest.mark.filterwarnings("ignore:No tensor product accelerator")
    @pytest.mark.parametrize("frame", [crystal(), ase.build.molecule("CH3OH")], ids=["crystal", "molecule"])
    def test_answers_are_those_of_its_own_calculator(self, model, frame):
        with sevennet._quiet_torchscript():
            from sevenn.calculator import SevenNetCalculator

            frame.calc = SevenNetCalculator("7net-0", device="cpu")
        found = predict(model, [frame])
        assert found.energies[0] == pytest.approx(frame.get_potential_energy(), abs=1e-5 * len(frame))
        np.testing.assert_allclose(found.forces[0], frame.get_forces(), atol=2e-5)

    def test_forces_are_minus_the_gradient(self, model):
        frame, direction = crystal(), np.random.default_rng(1).normal(size=(12, 3))
        direction /= np.linalg.norm(direction)
        moved = []
        for step in (-2e-3, 2e-3):
            moved.append(frame.copy())
            moved[-1].positions += step * direction
        low, high = predict(model, moved).energies
        expected = -np.sum(predict(model, [frame]).forces[0] * direction)
        assert (high - low) / 4e-3 == pytest.approx(expected, abs=2e-3)

    def test_frames_are_evaluated_by_themselves(self, model):
        frames = [crystal(seed) for seed in range(4)] + [ase.build.molecule("CH3OH")]
        together = predict(model, frames)
        for k, frame in enumerate(frames):
            alone = predict(model, [frame])
            assert together.energies[k] == pytest.approx(alone.energies[0], abs=2e-5)
            np.testing.assert_allclose(together.forces[k], alone.forces[0], atol=2e-5)

    def test_an_unknown_element(self, model):
        with pytest.raises(ModelError, match=r"sevennet has no network for At \(1 atoms\), Po \(1 atoms\) in AtPo"):
            predict(model, [Atoms("AtPo", positions=[[0, 0, 0], [2, 0, 0]])])

    def test_stress_is_the_strain_derivative(self, model):
        frame, h = crystal(), 2e-3
        stress = predict(model, [frame]).stresses[0]
        for voigt, (a, b) in enumerate([(0, 0), (1, 1), (2, 2), (1, 2), (0, 2), (0, 1)]):
            energies = []
            for sign in (1, -1):
                strain = np.eye(3)
                strain[a, b] += 0.5 * sign * h
                strain[b, a] += 0.5 * sign * h
                strained = frame.copy()
                strained.set_cell(frame.cell.array @ strain, scale_atoms=True)
                energies.append(predict(model, [strained]).energies[0])
            slope = (energies[0] - energies[1]) / (2 * h) / frame.get_volume()
            assert slope == pytest.approx(stress[voigt], abs=2e-4)

    def test_another_precision_is_refused(self, model):
        assert model.to(torch.float32) is model
        with pytest.raises(ModelError, match="sevennet computes in float32 only, not in torch.float64"):
            model.to(torch.float64)

    def test_energy_is_extensive_and_symmetric(self, model):
        frame = crystal()
        one, two = predict(model, [frame]), predict(model, [frame.repeat((2, 1, 1))])
        assert two.energies[0] == pytest.approx(2 * one.energies[0], abs=1e-3)
        turned = frame.copy()
        turned.rotate(40, (1, 2, 3), rotate_cell=True)
        assert predict(model, [turned]).energies[0] == pytest.approx(one.energies[0], abs=1e-3)

    def test_a_file_holds_the_model(self, model, tmp_path):
        fitted = model.with_reference(ReferenceEnergies({"C": 1.0, "O": -2.0}, "per_element"))
        save_model(fitted, tmp_path / "model.safetensors", {"about": "it"})
        read, metadata = load_model(tmp_path / "model.safetensors")
        assert (metadata["about"], read.reference, read.name) == ("it", fitted.reference, "sevennet")
        assert read.weights_hash() == model.weights_hash()
        assert predict(read, [crystal()]).energies[0] == predict(fitted, [crystal()]).energies[0]

    def test_elements_do_not_borrow(self, model):
        assert model.with_elements({}) is model
        with pytest.raises(ModelError, match="sevennet cannot let elements borrow from others, as asked for Po"):
            model.with_elements({"Po": "Te"})


def labelled() -> Dataset:
    """Crystals of CO2 whose labels are those of the model on slightly smaller cells."""
    frames = [crystal(seed) for seed in range(10)]
    labels = predict(load_start_model("sevennet"), [scaled(frame, 0.99) for frame in frames])
    return replace(
        dataset(["C4O8"] * 10, labels.energies + 24.0, labels.forces), frames=tuple(frames), stresses=(None,) * 10
    )


def scaled(frame: Atoms, factor: float) -> Atoms:
    """Return a crystal with another cell."""
    result = frame.copy()
    result.set_cell(frame.cell.array * factor, scale_atoms=True)
    return result


class TestLearner:
    def test_gradient_is_that_of_finite_differences(self, model):
        learner = SevenNetLearner(model, [crystal(0), crystal(1)], torch.device("cpu"), lambda count: None)
        batch = learner.batch([0, 1])
        start = learner.energies_forces(batch)
        energies, forces = start.energies + 3.0, start.forces + 0.5
        loss = partial(batch_loss, lambda_=0.3)
        learner.loss_gradient(batch, energies, forces, loss)
        gradient, at, h = learner.gradient.clone(), learner.flat.clone(), 2e-3
        values = []
        for sign in (1, -1):
            learner.flat.copy_(at + sign * h * gradient / gradient.norm())
            values.append(learner.loss_gradient(batch, energies, forces, loss).loss.item())
        assert (values[0] - values[1]) / (2 * h) == pytest.approx(gradient.norm().item(), rel=2e-2)

    def test_it_learns_resumes_and_leaves_the_start_model_alone(self, model, tmp_path):
        before = model.weights_hash()
        data = labelled()
        parts, config = split_dataset(data, seed=0), recipe("sevennet", epochs=3)
        whole = finetune(model, data, parts, config)
        assert model.weights_hash() == before != whole.potential.weights_hash()
        force, loss = (whole.history[name] for name in ("validation_force_rmse_vector", "train_loss"))
        assert loss.iloc[-1] < 0.8 * loss.iloc[0]
        # the last row is what the result says about the validation part
        validation = data.subset(parts.validation)
        metrics = evaluate(validation, predict(whole.potential, validation.frames))
        assert metrics["force_rmse_vector"].value == pytest.approx(force.iloc[-1], rel=1e-3)
        with interrupted_after(2):
            finetune(model, data, parts, config, tmp_path / "run", checkpoint_seconds=0.0)
        resumed = finetune(model, data, parts, config, tmp_path / "run")
        assert resumed.resumed_from == 2
        assert resumed.potential.weights_hash() == whole.potential.weights_hash()
        assert finetune(model, data, parts, config, tmp_path / "run").resumed_from == 3

    def test_settings_it_has_no_use_for(self, model):
        data = labelled()
        with pytest.raises(ConfigError, match="family sevennet train with layers = 'all' only, got 'last'"):
            finetune(model, data, split_dataset(data), recipe("sevennet", layers="last"))
