"""Replay of the start model's predictions, and the measure of what a fine-tuned model has forgotten."""

from __future__ import annotations

import dataclasses
from functools import partial

import numpy as np
import pytest
import torch
from ase.build import molecule

from helpers.potential_references import toy_potential
from helpers.training import interrupted_after, labelled, quick, same_weights, student
from tlmc.data.splits import split_dataset
from tlmc.errors import ConfigError
from tlmc.evaluation.forgetting import forgetting
from tlmc.families.ani import Layer
from tlmc.families.ani.learner import AniLearner
from tlmc.potentials import predict
from tlmc.potentials.reference import ReferenceEnergies
from tlmc.training.config import recipe
from tlmc.training.distributed import Group
from tlmc.training.fine_tuning import finetune
from tlmc.training.loss import batch_loss
from tlmc.training.replay import Replay, isolated_molecules


@pytest.fixture(autouse=True, scope="module")
def _own_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TLMC_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        yield


def test_molecules_are_parted_by_kind_and_always_the_same():
    replayed, held_out = (isolated_molecules(("H", "C", "O", "I"), part) for part in ("replayed", "held out"))
    assert {symbol for frame in replayed + held_out for symbol in frame.get_chemical_symbols()} == {"H", "C", "O"}
    assert abs(len(replayed) - len(held_out)) <= 4
    again = isolated_molecules(("C", "H", "O"), "replayed")
    assert all(np.array_equal(a.positions, b.positions) for a, b in zip(again, replayed, strict=True))
    names = [{frame.info["molecule"] for frame in part} for part in (replayed, held_out)]
    assert not names[0] & names[1]
    assert "CH2_s1A1d" not in names[0] | names[1]
    assert {"CH4", "H2O", "CH3CH2OH", "C6H6"} <= names[0] | names[1]
    moved = np.concatenate([f.positions - molecule(f.info["molecule"]).positions for f in replayed + held_out])
    assert moved.std() == pytest.approx(0.05, rel=0.03)
    assert not any(frame.pbc.any() for frame in replayed)
    with pytest.raises(ConfigError, match="too few"):
        isolated_molecules(("Si", "I"), "replayed")


def test_replay_adds_its_gradient():
    """Against one loss over both batches, by finite differences."""
    model = toy_potential(members=2, seed=0)
    frames = isolated_molecules(("H", "C", "O"), "replayed")[:12:4]
    engine = AniLearner(model, frames, recipe("short", precision="float64"), Group(), lambda count: None)
    loss = partial(batch_loss, lambda_=0.4)
    replay = Replay(engine, [1, 2], 0.7, 5, loss, seed=0)
    kept = [engine.energies_forces(engine.batch([i])) for i in (1, 2)]
    energies, forces = torch.ones(1, dtype=torch.float64), torch.ones(len(frames[0]), 3, dtype=torch.float64)
    replay.add_gradient(1)
    assert engine.gradient.norm() < 1e-9  # nothing has been forgotten yet
    generator = torch.Generator().manual_seed(0)
    engine.flat += 0.05 * torch.randn(engine.flat.shape, generator=generator, dtype=torch.float64)
    labelled_batch, both = engine.batch([0]), engine.batch([1, 2])

    def total() -> float:
        own = engine.loss_gradient(labelled_batch, energies, forces, loss).loss
        right = torch.cat([k.energies for k in kept]), torch.cat([k.forces for k in kept])
        return float(own + 0.7 * engine.loss_gradient(both, *right, loss).loss)

    engine.loss_gradient(labelled_batch, energies, forces, loss)
    replay.add_gradient(1)
    gradient, at, h = engine.gradient.clone(), engine.flat.clone(), 1e-5
    direction = torch.randn(at.shape, generator=generator, dtype=torch.float64)
    direction /= direction.norm()
    values = []
    for sign in (1, -1):
        engine.flat.copy_(at + sign * h * direction)
        values.append(total())
    assert (values[0] - values[1]) / (2 * h) == pytest.approx(float(gradient @ direction), rel=1e-6)


@pytest.mark.slow
def test_replay_lessens_forgetting_and_resumes(tmp_path):
    data, start = labelled(), student()
    parts = split_dataset(data, seed=0)
    frames = isolated_molecules(data.elements, "held out")[::4]
    settings = {"epochs": 12, "lr": 1e-3}
    plain, config = finetune(start, data, parts, quick(**settings)), quick(**settings, replay=1.0)
    whole = finetune(start, data, parts, config)
    without, with_replay = (forgetting(start, r.potential, frames) for r in (plain, whole))
    assert with_replay["force_rmse_vector"].value < 0.6 * without["force_rmse_vector"].value
    assert with_replay["energy_rmse_per_atom"].value < 0.6 * without["energy_rmse_per_atom"].value
    # offsets belong to the labels: molecules play no part in their fit
    assert whole.potential.reference == plain.potential.reference
    assert plain.run_key != whole.run_key
    with interrupted_after(2):
        finetune(start, data, parts, config, tmp_path / "run", checkpoint_seconds=0.0)
    resumed = finetune(start, data, parts, config, tmp_path / "run")
    assert resumed.resumed_from == 2
    assert same_weights(resumed.potential, whole.potential)


def test_forgetting_is_zero_for_equal_models_and_blind_to_offsets():
    start = student().to(torch.float64)
    frames = isolated_molecules(("H", "C", "O"), "held out")[::4]
    shifted = start.with_reference(ReferenceEnergies({"H": 1.0, "C": -3.0, "O": 0.5}, "per_element"))
    biased = {}
    for k, (symbol, (*hidden, (w, b))) in enumerate(start.networks.items()):
        biased[symbol] = (*hidden, Layer(w, b + 0.1 * k))
    for same in (start, shifted, dataclasses.replace(start, networks=biased)):
        metrics = forgetting(start, same, frames)
        assert metrics["force_rmse_vector"].value < 1e-9
        assert metrics["energy_rmse_per_atom"].value < 1e-9
    scaled = {symbol: (*hidden, Layer(1.1 * w, b)) for symbol, (*hidden, (w, b)) in start.networks.items()}
    metrics = forgetting(start, dataclasses.replace(start, networks=scaled), frames)
    size = np.sqrt(np.mean(np.concatenate(predict(start, frames).forces) ** 2))
    assert metrics["force_rmse_component"].value == pytest.approx(0.1 * size, rel=1e-6)
    assert metrics["force_rmse_vector"].unit == "eV/A"


def test_scratch_has_nothing_to_replay():
    with pytest.raises(ConfigError, match="throws away"):
        recipe("scratch", replay=1.0)
