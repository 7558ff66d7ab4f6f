"""The ridge fit of the output layers: its design matrix, its solution, and what fine-tuning makes of it."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from ase.build import molecule

from helpers.descriptor_structures import small_cell
from helpers.potential_references import toy_potential
from helpers.training import interrupted_after, labelled, quick, same_weights, student
from tlmc.data.splits import split_dataset
from tlmc.errors import ConfigError
from tlmc.families.ani.batch import merge
from tlmc.families.ani.cache import build_cache
from tlmc.families.ani.engine import Engine
from tlmc.families.ani.warm_start import design_matrix, ridge_start
from tlmc.training.config import recipe
from tlmc.training.fine_tuning import finetune
from tlmc.training.loss import batch_loss


def engine_of(frames, folder, seed=0):
    model = toy_potential(members=2, seed=seed)
    cache = build_cache(model, frames, torch.float64, folder)
    return Engine(model, cache, (True,) * 4), cache


def outputs(engine, structure):
    """Energy and forces of one structure as one vector."""
    result = engine.energies_forces(merge([structure]))
    return torch.cat([result.energies, result.forces.reshape(-1)])


@pytest.mark.parametrize("frame", [small_cell(), molecule("CH3OH")], ids=["cell", "molecule"])
def test_design_matrix_is_the_derivative(frame, tmp_path):
    """Outputs are linear in the output layers, so a change of any size must be predicted to rounding."""
    engine, cache = engine_of([frame, molecule("H2O")], tmp_path)
    A, before = design_matrix(engine, cache[0]), outputs(engine, cache[0])
    change = torch.randn(A.shape[1], generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    offset = 0
    for layers in engine.layers.values():
        for part in layers[-1]:
            part += change[offset : offset + part.numel()].view(part.shape)
            offset += part.numel()
    assert offset == A.shape[1]
    torch.testing.assert_close(outputs(engine, cache[0]) - before, A @ change, rtol=1e-9, atol=1e-9)


def test_solution_equals_dense_least_squares(tmp_path):
    """numpy's solver on the stacked, weighted system with the penalty as rows of its own."""
    frames = [small_cell(), molecule("CH3OH"), molecule("CO2")]
    engine, cache = engine_of(frames, tmp_path)
    rng, lambda_, ridge = np.random.default_rng(0), 0.3, 1e-3
    energies = torch.from_numpy(rng.normal(size=3))
    forces = [torch.from_numpy(rng.normal(size=(len(f), 3))) for f in frames]
    rows, right = [], []
    for i in (0, 2):
        n = len(frames[i])
        weight = np.sqrt(np.r_[(1 - lambda_) / n**2, np.full(3 * n, lambda_ / n)] / 2)
        label = torch.cat([energies[i : i + 1], forces[i].reshape(-1)])
        rows.append(weight[:, None] * design_matrix(engine, cache[i]).numpy())
        right.append(weight * (label - outputs(engine, cache[i])).numpy())
    n_unknowns = rows[0].shape[1]
    system = np.vstack([*rows, np.sqrt(ridge) * np.eye(n_unknowns)])
    expected = np.linalg.lstsq(system, np.r_[np.concatenate(right), np.zeros(n_unknowns)], rcond=None)[0]
    before = engine.flat.clone()
    first = [[part.clone() for part in layers[-1]] for layers in engine.layers.values()]
    hidden = [layer.weight.clone() for layers in engine.layers.values() for layer in layers[:-1]]

    def loss():
        batch = merge([cache[0], cache[2]])
        result = engine.loss_gradient(
            batch, energies[[0, 2]], torch.cat([forces[0], forces[2]]), partial(batch_loss, lambda_=lambda_)
        )
        return result.loss.item()

    start = loss()
    ridge_start(engine, cache, [0, 2], energies, forces, lambda_, ridge)
    parts = [
        (part - old).reshape(-1)
        for layers, olds in zip(engine.layers.values(), first, strict=True)
        for part, old in zip(layers[-1], olds, strict=True)
    ]
    np.testing.assert_allclose(torch.cat(parts), expected, atol=1e-8 * np.abs(expected).max())
    assert loss() + ridge * float(np.square(expected).sum()) < start
    after = [layer.weight for layers in engine.layers.values() for layer in layers[:-1]]
    assert all(torch.equal(a, b) for a, b in zip(hidden, after, strict=True))
    assert not torch.equal(before, engine.flat)


def test_finetuning_starts_lower_and_resumes(tmp_path, monkeypatch):
    monkeypatch.setenv("TLMC_CACHE_DIR", str(tmp_path / "cache"))
    data = labelled()
    parts = split_dataset(data, seed=0)
    cold, warm = quick(epochs=3, lr=1e-6), quick(epochs=3, lr=1e-6, warm_start="ridge")
    plain, whole = finetune(student(), data, parts, cold), finetune(student(), data, parts, warm)
    assert whole.history["train_loss"][0] < 0.7 * plain.history["train_loss"][0]
    assert whole.run_key != plain.run_key
    with interrupted_after(1):
        finetune(student(), data, parts, warm, tmp_path / "run", checkpoint_seconds=0.0)
    resumed = finetune(student(), data, parts, warm, tmp_path / "run")
    assert resumed.resumed_from == 1
    assert same_weights(resumed.potential, whole.potential)


def test_frozen_output_layers_are_refused():
    with pytest.raises(ConfigError, match="keeps frozen"):
        recipe("frozen", warm_start="ridge")
