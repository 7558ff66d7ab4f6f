"""Optimisers against torch.optim, their promises on convex functions, and the subgradient method on |x|."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tlmc.errors import ConfigError
from tlmc.networks import MLP, OPTIMIZERS, SGD, AdaGrad, Adam, AdamW, GradientDescent, RMSProp, Subgradient

STEPS = 100
PAIRS = {
    "gd": (GradientDescent, torch.optim.SGD, {"lr": 0.02}, {"lr": 0.02}),
    "sgd": (SGD, torch.optim.SGD, {"lr": 0.02}, {"lr": 0.02}),
    "sgd with momentum": (SGD, torch.optim.SGD, *({"lr": 0.01, "momentum": 0.8},) * 2),
    "adagrad": (AdaGrad, torch.optim.Adagrad, *({"lr": 0.05},) * 2),
    "rmsprop": (RMSProp, torch.optim.RMSprop, *({"lr": 0.01},) * 2),
    "rmsprop, short memory": (RMSProp, torch.optim.RMSprop, *({"lr": 0.01, "alpha": 0.5, "eps": 1e-3},) * 2),
    "adam": (Adam, torch.optim.Adam, *({"lr": 0.01},) * 2),
    "adam, other betas": (Adam, torch.optim.Adam, *({"lr": 0.01, "betas": (0.5, 0.9), "eps": 1e-4},) * 2),
    "adamw": (AdamW, torch.optim.AdamW, *({"lr": 0.01, "weight_decay": 0.1},) * 2),
    "adamw, defaults": (AdamW, torch.optim.AdamW, {}, {}),
}


def minibatches(seed=0):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(STEPS):
        x = torch.randn(8, 3, generator=generator, dtype=torch.float64)
        yield x, torch.sin(x.sum(1, keepdim=True))


@pytest.mark.parametrize("name", PAIRS)
def test_trajectories_equal_torch(name):
    ours_kind, theirs_kind, ours_settings, theirs_settings = PAIRS[name]
    ours, theirs = (MLP((3, 6, 1), "tanh") for _ in range(2))
    optimizer = ours_kind(ours.flat(), **ours_settings)
    reference = theirs_kind(theirs.parameters(), **theirs_settings)
    moved = torch.cat([w.detach().flatten().clone() for w in ours.flat()])
    for x, y in minibatches():
        trace = ours.trace(x)
        optimizer.step(ours.backward(trace, 2 * (trace.sums[-1] - y).detach() / len(x)).flat())
        reference.zero_grad()
        (theirs(x) - y).square().mean().backward()
        reference.step()
        for mine, other in zip(ours.flat(), theirs.flat(), strict=True):
            torch.testing.assert_close(mine.detach(), other.detach(), rtol=0, atol=1e-12)
    assert optimizer.steps == STEPS
    assert (torch.cat([w.detach().flatten() for w in ours.flat()]) - moved).abs().max() > 0.01


def descend(optimizer, w, gradient, n_steps):
    path = [w.item()]
    for _ in range(n_steps):
        optimizer.step([gradient(w)])
        path.append(w.item())
    return np.array(path)


class TestAverage:
    def test_is_the_mean_of_the_points_visited(self):
        w = torch.tensor(3.0, dtype=torch.float64)
        optimizer = GradientDescent([w], lr=0.1)
        path = descend(optimizer, w, lambda w: 2 * w, 50)
        assert optimizer.average[0].item() == pytest.approx(path[:-1].mean(), abs=1e-14)

    @pytest.mark.parametrize("n_steps", [10, 100, 1000])
    @pytest.mark.parametrize("start", [1.0, -0.3, 0.77])
    def test_keeps_the_promise_of_convex_optimisation(self, n_steps, start):
        # f = |x| has rho = 1; the minimum lies within B = 1 of the start
        w = torch.tensor(start, dtype=torch.float64)
        optimizer = GradientDescent([w], lr=1.0 / n_steps**0.5)
        descend(optimizer, w, torch.sign, n_steps)
        assert optimizer.average[0].abs().item() <= 1.0 / n_steps**0.5


class TestSubgradient:
    def test_shrinking_steps_reach_the_kink_and_constant_ones_do_not(self):
        shrinking, constant = (torch.tensor(1.05, dtype=torch.float64) for _ in range(2))
        path = descend(Subgradient([shrinking], lr=0.1), shrinking, torch.sign, 2000)
        jumping = descend(GradientDescent([constant], lr=0.1), constant, torch.sign, 2000)
        assert np.abs(path[-100:]).max() <= 0.1 / 1900**0.5
        np.testing.assert_allclose(np.abs(jumping[-100:]), 0.05, atol=1e-12)

    def test_steps_shrink_with_the_root_of_their_number(self):
        w = torch.tensor(50.0, dtype=torch.float64)
        path = descend(Subgradient([w], lr=0.3), w, torch.sign, 20)
        np.testing.assert_allclose(-np.diff(path), 0.3 / np.sqrt(np.arange(1, 21)), rtol=1e-12)

    def test_any_slope_at_the_kink_keeps_the_bound(self):
        # 0.7 is a subgradient of |x| at zero although it leads away from the minimum
        w = torch.tensor(0.0, dtype=torch.float64)
        optimizer = Subgradient([w], lr=0.1)
        path = descend(optimizer, w, lambda w: torch.where(w == 0, torch.full_like(w, 0.7), torch.sign(w)), 3000)
        assert path[1] == pytest.approx(-0.07)
        assert np.abs(path[-100:]).max() <= 0.1 / 2900**0.5


def test_adaptive_methods_do_not_notice_the_units_of_the_loss():
    for kind in (AdaGrad, RMSProp, Adam, AdamW):
        one, scaled = (torch.tensor([1.0, -2.0], dtype=torch.float64) for _ in range(2))
        first, second = kind([one], lr=0.01, eps=0.0), kind([scaled], lr=0.01, eps=0.0)
        for _ in range(20):
            first.step([2 * one])
            second.step([2000 * scaled])
        torch.testing.assert_close(one, scaled, rtol=1e-10, atol=0)


def test_decay_of_adamw_is_no_gradient_and_that_of_a_penalty_is():
    # without any loss AdamW shrinks by (1 - lr * decay) per step, Adam with a penalty by about lr whatever the size
    decayed, penalised = (torch.tensor([4.0, 0.5], dtype=torch.float64) for _ in range(2))
    optimizer, adam = AdamW([decayed], lr=0.01, weight_decay=0.1), Adam([penalised], lr=0.01)
    for _ in range(10):
        optimizer.step([torch.zeros(2, dtype=torch.float64)])
        adam.step([0.1 * penalised])
    torch.testing.assert_close(decayed, torch.tensor([4.0, 0.5], dtype=torch.float64) * 0.999**10, rtol=1e-12, atol=0)
    torch.testing.assert_close(penalised, torch.tensor([3.9, 0.4], dtype=torch.float64), rtol=0, atol=0.002)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_method_descends_and_moves_leaf_tensors(name):
    network = MLP((2, 4, 1), "tanh")
    optimizer = OPTIMIZERS[name](network.flat(), 0.01)
    x = torch.linspace(-1, 1, 10, dtype=torch.float64).view(5, 2)
    losses = []
    for _ in range(50):
        loss = (network(x) - x.sum(1, keepdim=True)).square().mean()
        optimizer.step(torch.autograd.grad(loss, network.flat()))
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert all(w.requires_grad for w in network.flat())


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda w: SGD([], 0.1), "SGD has no parameters to move"),
        (lambda w: Adam([w], lr=0.0), "learning rate of Adam must be positive, got 0.0"),
        (lambda w: Adam([w], betas=(0.9, 1.0)), r"beta must be in \[0, 1\), got 1.0"),
        (lambda w: RMSProp([w], 0.1, alpha=-0.1), r"alpha must be in \[0, 1\), got -0.1"),
        (lambda w: AdamW([w], weight_decay=-1.0), "weight_decay must not be negative, got -1.0"),
        (lambda w: SGD([w], 0.1).step([w, w]), r"gradients have shapes \[\(2,\), \(2,\)\], parameters \[\(2,\)\]"),
    ],
)
def test_wrong_settings_are_named(make, sentence):
    with pytest.raises(ConfigError, match=sentence):
        make(torch.zeros(2))
