"""The network against torch's layers, its back-propagation against autograd, gradients over depth against theory."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from tlmc.errors import ConfigError
from tlmc.networks import ACTIVATIONS, MLP, gradient_norms, n_parameters
from tlmc.networks.mlp import CELU_ALPHA

THEIRS = {"relu": nn.ReLU(), "tanh": nn.Tanh(), "softplus": nn.Softplus(), "celu": nn.CELU(CELU_ALPHA)}
INITIALISATIONS = ("lecun", "glorot", "he", "thesis")


def drawn(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("name", ACTIVATIONS)
class TestActivations:
    def test_value_and_slope_equal_torch(self, name):
        z = torch.linspace(-40, 40, 1601, dtype=torch.float64, requires_grad=True)
        expected = THEIRS[name](z)
        (slope,) = torch.autograd.grad(expected.sum(), z)
        torch.testing.assert_close(ACTIVATIONS[name].value(z.detach()), expected.detach(), rtol=1e-8, atol=1e-8)
        torch.testing.assert_close(ACTIVATIONS[name].slope(z.detach()), slope, rtol=1e-8, atol=1e-8)

    def test_autograd_of_the_value_gives_the_slope(self, name):
        z = drawn(200).requires_grad_()
        (slope,) = torch.autograd.grad(ACTIVATIONS[name].value(z).sum(), z)
        torch.testing.assert_close(ACTIVATIONS[name].slope(z.detach()), slope, rtol=0, atol=1e-14)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("sizes", [(3, 2), (4, 7, 1), (5, 8, 6, 4, 3)])
class TestNetwork:
    def test_equals_torch_layers(self, activation, sizes):
        network = MLP(sizes, activation)
        layers = []
        for weight, bias in zip(network.weights, network.biases, strict=True):
            linear = nn.Linear(weight.shape[1], weight.shape[0], dtype=torch.float64)
            linear.load_state_dict({"weight": weight.data, "bias": bias.data})
            layers += [linear, THEIRS[activation]]
        x = drawn(9, sizes[0])
        torch.testing.assert_close(network(x), nn.Sequential(*layers[:-1])(x), rtol=0, atol=1e-12)

    def test_back_propagation_equals_autograd(self, activation, sizes):
        network = MLP(sizes, activation, "he", torch.Generator().manual_seed(3))
        for bias in network.biases:
            bias.data.copy_(0.3 * drawn(len(bias)))
        x, target = drawn(11, sizes[0]).requires_grad_(), drawn(11, sizes[-1], seed=2)
        trace = network.trace(x)
        error = trace.sums[-1] - target
        ours = network.backward(trace, 2.0 * error.detach())
        expected = torch.autograd.grad(error.square().sum(), [*network.flat(), x])
        assert len(expected) == 2 * len(network.weights) + 1
        for mine, theirs in zip([*ours.flat(), ours.inputs], expected, strict=True):
            assert mine.shape == theirs.shape
            torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-12)

    def test_counts_its_parameters(self, activation, sizes):
        assert MLP(sizes, activation).n_parameters == n_parameters(sizes)


def test_back_propagation_equals_finite_differences():
    network, x = MLP((3, 6, 5, 1), "softplus"), drawn(4, 3)
    gradients = network.backward(network.trace(x), torch.ones(4, 1, dtype=torch.float64)).flat()
    h = 1e-6
    for parameter, gradient in zip(network.flat(), gradients, strict=True):
        values = []
        for sign in (1, -1):
            parameter.data.view(-1)[0] += sign * h
            values.append(network(x).sum().item())
            parameter.data.view(-1)[0] -= sign * h
        assert gradient.reshape(-1)[0].item() == pytest.approx((values[0] - values[1]) / (2 * h), abs=1e-8)


def test_parameter_count_of_a_published_network(ani2xt):
    layers = ani2xt.networks["H"]
    sizes = [layers[0].weight.shape[1], *(layer.weight.shape[2] for layer in layers)]
    assert len(sizes) == 5
    assert n_parameters(sizes) == sum(part.numel() for layer in layers for part in layer)


@pytest.mark.parametrize("initialisation", INITIALISATIONS)
def test_weights_have_the_promised_spread(initialisation):
    network = MLP((300, 500, 100), "relu", initialisation)
    expected = {"lecun": 300**-0.5, "glorot": (2 / 800) ** 0.5, "he": (2 / 300) ** 0.5, "thesis": 0.1}[initialisation]
    assert network.weights[0].std().item() == pytest.approx(expected, rel=0.02)
    assert bool(network.biases[0].any()) == (initialisation == "thesis")


def test_the_seed_decides_and_precision_only_rounds():
    one, same = (MLP((4, 5, 1), generator=torch.Generator().manual_seed(7)) for _ in range(2))
    other = MLP((4, 5, 1), generator=torch.Generator().manual_seed(8))
    single = MLP((4, 5, 1), generator=torch.Generator().manual_seed(7), dtype=torch.float32)
    assert torch.equal(one.weights[0], same.weights[0])
    assert not torch.equal(one.weights[0], other.weights[0])
    assert torch.equal(one.weights[1].float(), single.weights[1])


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (((3,),), r"at least two sizes, all positive, got \(3,\)"),
        (((3, 0, 1),), r"got \(3, 0, 1\)"),
        (((3, 1), "sine"), "activation must be one of relu, tanh, softplus, celu, got 'sine'"),
        (((3, 1), "tanh", "ones"), "got 'ones'"),
    ],
)
def test_wrong_arguments_are_named(arguments, sentence):
    with pytest.raises(ConfigError, match=sentence):
        MLP(*arguments)


class TestGradientsOverDepth:
    def per_layer(self, activation, initialisation, depth=20, width=200):
        """Factor by which the gradient grows from one layer to the one below it."""
        table = gradient_norms(depth, width, activation, initialisation, n_networks=3)
        assert len(table) == depth + 1
        return (table["delta"].iloc[0] / table["delta"].iloc[-1]) ** (1 / depth)

    @pytest.mark.parametrize(
        ("initialisation", "factor"), [("he", 1.0), ("lecun", 0.5**0.5), ("thesis", (200 * 0.01 / 2) ** 0.5)]
    )
    def test_relu_follows_theory(self, initialisation, factor):
        # mean squares change by width * variance * <slope^2>, and <slope^2> = 1/2
        assert self.per_layer("relu", initialisation) == pytest.approx(factor, rel=0.03)

    def test_wide_layers_with_fixed_weights_explode(self):
        assert self.per_layer("relu", "thesis", depth=10, width=800) == pytest.approx(2.0, rel=0.05)

    def test_tanh_vanishes_slowly_and_softplus_fast(self):
        # tanh saturates a little at unit signals; softplus has a slope of about one half
        assert 0.9 < self.per_layer("tanh", "glorot") < 1.0
        assert self.per_layer("softplus", "glorot") < 0.8

    def test_columns_are_what_they_say(self):
        table = gradient_norms(2, 5, "tanh", "he", n_samples=4, n_networks=1, seed=9)
        generator = torch.Generator().manual_seed(9)
        network = MLP((5, 5, 5, 5), "tanh", "he", generator)
        x, slope = torch.randn(2, 4, 5, generator=generator, dtype=torch.float64)
        expected = torch.autograd.grad((network(x) * slope).sum(), list(network.weights))
        np.testing.assert_allclose(table["weight_gradient"], [g.norm().item() for g in expected], rtol=1e-12)
        assert table["signal"].iloc[-1] == pytest.approx(network(x).square().mean().sqrt().item(), rel=1e-12)
        assert table["layer"].tolist() == [1, 2, 3]

    def test_no_layers_are_refused(self):
        with pytest.raises(ConfigError, match="must be positive, got 0"):
            gradient_norms(0)
