"""Fine-tuning of the peer: it learns, resumes to the same weights, and leaves records beside ours."""

from __future__ import annotations

import json
import signal

import numpy as np
import pandas as pd
import pytest
import torch
from ase.build import molecule

from tlmc.errors import ConfigError, Interrupted, ModelError
from tlmc.evaluation import read_records
from tlmc.labelled import Dataset
from tlmc.peer import PeerConfig, finetune, is_installed, load_sevennet, peer_config, predict, run_peer
from tlmc.peer.finetune import UNMODIFIED, _Trainer, cost_table
from tlmc.splits import split_dataset
from tlmc.training.checkpoint import load_tensors
from tlmc.training.loss import batch_loss

needs_sevenn = pytest.mark.skipif(not is_installed(), reason="needs sevenn: pip install 'tlmc[peer]'")
CONFIG = PeerConfig(epochs=2, batch_size=4, lr=2e-3)


@pytest.fixture(scope="module")
def water():
    """Return rattled water molecules whose labels are SevenNet-0's with forces and energies stretched by a tenth."""
    rng = np.random.default_rng(0)
    frames = []
    for _ in range(20):
        frame = molecule("H2O")
        frame.positions += rng.normal(scale=0.05, size=(3, 3))
        frames.append(frame)
    energies, forces, _ = predict(load_sevennet(), frames)
    return Dataset(
        frames=tuple(frames),
        energies=1.1 * energies + 2.0,
        forces=tuple(1.1 * force for force in forces),
        stresses=(None,) * 20,
        name="water",
        source="memory",
        units="eV, eV/Angstrom",
        level_of_theory="",
        frame_numbers=np.arange(20),
    )


@pytest.fixture(scope="module")
def run(water, tmp_path_factory):
    return run_peer(water, CONFIG, run_dir=tmp_path_factory.mktemp("run"))


def test_settings():
    assert (PeerConfig(epochs=0).recipe, CONFIG.recipe) == ("sevennet, unmodified", "sevennet, 2 epochs")
    with pytest.raises(ConfigError, match=r"peer: epochs = -1: .*; rate = 1: Extra inputs .*; the settings are .*seed"):
        peer_config(epochs=-1, rate=1)


@needs_sevenn
class TestRun:
    def test_it_learns(self, run):
        before, after = (stage.metrics["force_rmse_vector"].value for stage in run.stages.values())
        assert list(run.stages) == [UNMODIFIED, "sevennet, 2 epochs"]
        assert after < 0.7 * before
        history = run.history
        assert history["epoch"].tolist() == [0, 1, 2]
        assert (history["cpu_seconds"].diff()[1:] > 0).all()
        assert history["validation_force_rmse_vector"].iloc[-1] < 0.7 * history["validation_force_rmse_vector"].iloc[0]
        # the cosine's last step but one of eight: 14 frames in batches of 4, twice
        assert history["lr"].iloc[-1] == pytest.approx(2e-3 * 0.5 * (1 + np.cos(np.pi * 7 / 8)))

    def test_the_run_folder(self, run):
        content = json.loads((run.run_dir / "metrics.json").read_text())
        assert content["test"]["sevennet, 2 epochs"]["force_rmse_vector"]["value"] == pytest.approx(
            run.stages["sevennet, 2 epochs"].metrics["force_rmse_vector"].value
        )
        assert (content["n_train"], content["start_model"]["name"]) == (14, "sevennet-0")
        written = pd.read_csv(run.run_dir / "history.csv")
        pd.testing.assert_frame_equal(written, run.history)

    def test_the_offset_comes_from_the_training_part(self, water, run):
        model = load_sevennet()
        train = water.subset(run.split.train)
        offset = (train.energies - predict(model, train.frames).energies).mean()
        test = water.subset(run.split.test)
        expected = predict(model, test.frames).energies + offset
        np.testing.assert_allclose(run.stages[UNMODIFIED].predictions.energies, expected, atol=1e-5)

    def test_a_killed_run_goes_on_to_the_same_weights(self, water, run, tmp_path, monkeypatch):
        save = finetune._save

        def die(folder, state, run_id):
            save(folder, state, run_id)
            if state.epoch == 1:
                raise KeyboardInterrupt

        monkeypatch.setattr(finetune, "_save", die)
        with pytest.raises(KeyboardInterrupt):
            run_peer(water, CONFIG, run_dir=tmp_path)
        monkeypatch.setattr(finetune, "_save", save)
        resumed = run_peer(water, CONFIG, run_dir=tmp_path)
        ours, theirs = (load_tensors(folder / "state.safetensors")[0] for folder in (tmp_path, run.run_dir))
        # threads may add in another order
        assert torch.allclose(ours["flat"], theirs["flat"], atol=1e-6)
        assert resumed.history["epoch"].tolist() == [0, 1, 2]

    @pytest.mark.parametrize("lr", [1e10, 1.0])
    def test_a_last_step_that_diverges_is_refused(self, water, tmp_path, lr):
        config = PeerConfig(epochs=1, batch_size=100, lr=lr)
        for _ in range(2):
            with pytest.raises(ModelError, match=r"the training diverged.*: lower lr \("):
                run_peer(water, config, run_dir=tmp_path)
            assert not (tmp_path / "metrics.json").exists()

    def test_an_interrupt_says_how_to_go_on(self, water, tmp_path, monkeypatch):
        monkeypatch.setattr(finetune, "apply", lambda *_: signal.raise_signal(signal.SIGTERM))
        with pytest.raises(Interrupted, match="in epoch 1 of 2: whole epochs are kept in .* goes on") as caught:
            run_peer(water, CONFIG, run_dir=tmp_path)
        assert caught.value.number == signal.SIGTERM

    def test_a_finished_run_is_read(self, water, run, monkeypatch):
        monkeypatch.setattr(_Trainer, "epoch", lambda *_: pytest.fail("trained again"))
        again = run_peer(water, CONFIG, run_dir=run.run_dir)
        np.testing.assert_allclose(
            again.stages[CONFIG.recipe].predictions.energies, run.stages[CONFIG.recipe].predictions.energies, atol=1e-5
        )

    def test_a_folder_of_another_run(self, water, run):
        with pytest.raises(ConfigError, match="holds another run, see run.json there"):
            run_peer(water, PeerConfig(epochs=3), run_dir=run.run_dir)

    def test_records(self, water, tmp_path, monkeypatch):
        monkeypatch.setenv("TLMC_REPORTS_DIR", str(tmp_path))
        found = run_peer(water, PeerConfig(epochs=0), study="peer")
        assert found.run_dir.parent == tmp_path / "runs"
        records = read_records(tmp_path / "metrics")
        assert set(records["recipe"]) == {UNMODIFIED}
        assert set(records["start_model"]) == {"sevennet-0"}
        row = records[records["quantity"] == "force_rmse_vector"].iloc[0]
        assert (row["value"], row["n_train"]) == (found.stages[UNMODIFIED].metrics["force_rmse_vector"].value, 14)

    def test_costs_have_the_columns_of_ours(self, run):
        table = cost_table({"SevenNet-0": run, "again": run})
        assert table["setting"].tolist() == ["SevenNet-0"] * 3 + ["again"] * 3
        assert set(table.columns) == {
            "epoch", "cpu_seconds", "validation_force_rmse_vector", "validation_energy_rmse_per_atom", "setting", "seed"
        }  # fmt: skip


@needs_sevenn
def test_the_loss_is_that_of_the_predictions(water):
    """Thesis eq. 3.46, on two frames, and its gradient by a finite difference along the weights."""
    split = split_dataset(water)
    trainer = _Trainer(load_sevennet(), water, split, CONFIG)
    state = trainer.start()
    trainer.restore(state)
    frames = split.train[:2].tolist()
    chosen = water.subset(frames)
    energies, forces, _ = predict(trainer.model, chosen.frames)
    expected = batch_loss(
        torch.from_numpy(energies - chosen.energies),
        torch.from_numpy(np.concatenate(forces) - np.concatenate(chosen.forces)),
        torch.tensor([3.0, 3.0], dtype=torch.float64),
        torch.tensor([0, 0, 0, 1, 1, 1]),
        CONFIG.lambda_,
    ).loss.item()
    trainer.model.network.train()
    loss = trainer._loss(frames)
    assert loss.item() == pytest.approx(expected, rel=1e-3)
    slope = torch.cat([part.reshape(-1) for part in torch.autograd.grad(loss, trainer.weights)])
    direction = slope / slope.norm()
    step = 0.02 * loss.item() / slope.norm().item()
    changed = []
    for sign in (1.0, -1.0):
        state.tensors["flat"].add_(direction, alpha=sign * step)
        changed.append(trainer._loss(frames).item())
        state.tensors["flat"].add_(direction, alpha=-sign * step)
    assert (changed[0] - changed[1]) / (2 * step) == pytest.approx(slope.norm().item(), rel=0.02)
