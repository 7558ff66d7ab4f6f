"""SevenNet-0: the published weights, read without running anything, and answers as sevenn itself gives them."""

from __future__ import annotations

import os
import pickle

import ase.build
import numpy as np
import pytest
import torch
from ase import Atoms

from helpers.labelled import dataset
from tlmc.errors import ConfigError, ModelError
from tlmc.families.sevennet import model as sevennet
from tlmc.families.sevennet.model import SHA256, read_checkpoint
from tlmc.files import sha256_file
from tlmc.potentials import load_start_model, predict


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
        monkeypatch.setattr(sevennet, "is_installed", lambda: False)
        with pytest.raises(ConfigError, match=r"needs the package sevenn: pip install 'tlmc\[peer\]'"):
            load_sevennet()


class TestModel:
    @pytest.mark.slow
    def test_published_model(self, model):
        assert (model.r_cut, model.fingerprint, len(model.numbers)) == (5.0, SHA256, 89)
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
        with pytest.raises(ModelError, match=r"frame \(AtPo\): SevenNet-0 does not know Po, At"):
            predict(model, [Atoms("AtPo", positions=[[0, 0, 0], [2, 0, 0]])])

    def test_the_offset_is_the_mean_residual_per_atom(self, model):
        frames = dataset(["CO2"] * 3, [0.0, 0.0, 0.0], [np.zeros((3, 3))] * 3)
        bare = predict(model, frames.frames).energies
        fitted = refit_offset(model, frames)
        assert fitted.reference.offsets["C"] == pytest.approx(-bare.mean() / 3)
        assert predict(fitted, frames.frames).energies == pytest.approx(bare - bare.mean(), abs=1e-6)
