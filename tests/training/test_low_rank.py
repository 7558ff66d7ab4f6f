"""Low-rank updates: nothing changes before the first step, gradients are exact, and a killed run goes on."""

from __future__ import annotations

from functools import partial

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
from tlmc.potentials.model_files import load_tensors
from tlmc.training.config import recipe
from tlmc.training.fine_tuning import finetune
from tlmc.training.loss import batch_loss
from tlmc.training.low_rank import LowRank


@pytest.fixture(autouse=True, scope="module")
def _own_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TLMC_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        yield


def problem(trainable=(True,) * 4, rank=2):
    """An engine in double precision, its low-rank part, and a function that returns the loss and fills the gradient."""
    model = toy_potential(members=2, seed=0)
    cache = build_cache(model, [small_cell(), molecule("CH3OH")], torch.float64)
    engine = Engine(model, cache, trainable)
    batch = merge([cache[0], cache[1]])
    generator = torch.Generator().manual_seed(1)
    forces = torch.randn(sum(batch.sizes), 3, generator=generator, dtype=torch.float64)
    energies = torch.randn(2, generator=generator, dtype=torch.float64)
    loss = partial(batch_loss, lambda_=0.3)

    def evaluate() -> float:
        return engine.loss_gradient(batch, energies, forces, loss).loss.item()

    return engine, LowRank(engine, rank, seed=5), evaluate


@pytest.mark.parametrize("trainable", [(True,) * 4, (False, True, True, False)], ids=["all", "hidden"])
def test_nothing_changes_at_the_start(trainable):
    engine, low_rank, _ = problem(trainable)
    before = engine.flat.clone()
    low_rank.push()
    assert torch.equal(engine.flat, before)
    assert low_rank.flat.abs().max() > 0  # B is not zero, or nothing would ever be learned
    assert len(low_rank.flat) < 0.7 * len(before)


@pytest.mark.parametrize("trainable", [(True,) * 4, (False, True, True, False)], ids=["all", "hidden"])
def test_gradient_of_factors_is_that_of_finite_differences(trainable):
    engine, low_rank, loss = problem(trainable)
    generator = torch.Generator().manual_seed(2)
    low_rank.flat += 0.1 * torch.randn(low_rank.flat.shape, generator=generator, dtype=torch.float64)
    low_rank.push()
    loss()
    low_rank.pull_back()
    gradient, at, h = low_rank.gradient.clone(), low_rank.flat.clone(), 1e-5
    for _ in range(5):
        direction = torch.randn(at.shape, generator=generator, dtype=torch.float64)
        direction /= direction.norm()
        values = []
        for sign in (1, -1):
            low_rank.flat.copy_(at + sign * h * direction)
            low_rank.push()
            values.append(loss())
        slope = (values[0] - values[1]) / (2 * h)
        assert slope == pytest.approx(float(gradient @ direction), rel=1e-6, abs=1e-8 * float(gradient.norm()))


def test_gradient_of_factors_is_that_of_autograd():
    """The engine's gradient of the whole matrix, taken through A B by autograd."""
    engine, low_rank, loss = problem()
    low_rank.flat.normal_(generator=torch.Generator().manual_seed(3))
    low_rank.push()
    loss()
    low_rank.pull_back()
    checked = 0
    for where, shape, change, slope in low_rank._parts:
        full = engine.gradient[where].view(shape)
        free = [part.clone().requires_grad_() for part in change]
        product = free[0] if len(free) == 1 else free[0] @ free[1]
        for ours, theirs in zip(slope, torch.autograd.grad((product * full).sum(), free), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)
        checked += len(free) == 2
    assert checked == 3 * 3  # three hidden layers of three elements


def test_the_update_has_the_rank_and_leaves_inactive_columns():
    data = labelled()
    start, parts = student(), split_dataset(data, seed=0)
    tuned = finetune(start, data, parts, quick(rank=2, weight_decay=0.5)).potential
    whole = finetune(start, data, parts, quick(weight_decay=0.5)).potential
    for symbol in "HCO":
        for number in range(3):
            change = tuned.networks[symbol][number].weight - start.networks[symbol][number].weight
            singular = torch.linalg.svdvals(change.double())
            assert (singular[:, 2] < 1e-5 * singular[:, 0]).all()
            assert (singular[:, 1] > 1e-3 * singular[:, 0]).all()
    present = start.columns([start.symbols.index(symbol) for symbol in "HCO"])
    inactive = torch.ones(start.n_columns, dtype=torch.bool)
    inactive[present] = False
    first, other = (model.networks["C"][0].weight[:, inactive] for model in (start, tuned))
    assert inactive.any()
    assert torch.equal(first, other)
    assert not torch.equal(first, whole.networks["C"][0].weight[:, inactive])  # plain weight decay shrinks them


def test_it_learns_and_resumes_bit_for_bit(tmp_path):
    data = labelled()
    parts, config = split_dataset(data, seed=0), quick(rank=3, epochs=6, ema_decay=0.9, clip_norm=1.0)
    whole = finetune(student(), data, parts, config)
    assert whole.history["train_loss"].iloc[-1] < 0.5 * whole.history["train_loss"].iloc[0]
    with interrupted_after(3):
        finetune(student(), data, parts, config, tmp_path / "run", checkpoint_seconds=0.0)
    tensors, _ = load_tensors(tmp_path / "run" / "state.safetensors")
    assert tensors["factors"].shape == tensors["exp_avg"].shape != tensors["flat"].shape
    resumed = finetune(student(), data, parts, config, tmp_path / "run")
    assert resumed.resumed_from == 3
    assert same_weights(resumed.potential, whole.potential)


def test_runs_without_it_keep_their_name_and_ridge_is_refused():
    data = labelled(12)
    parts = split_dataset(data, seed=0)
    plain = finetune(student(), data, parts, quick(epochs=1))
    assert plain.run_key == finetune(student(), data, parts, quick(epochs=1, rank=None, replay=0.0)).run_key
    assert plain.run_key != finetune(student(), data, parts, quick(epochs=1, rank=2)).run_key
    with pytest.raises(ConfigError, match="choose one of them"):
        recipe("short", rank=4, warm_start="ridge")
