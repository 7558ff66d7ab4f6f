from __future__ import annotations

import pytest
import torch

from helpers.potential_references import ExactCelu, toy_potential
from tlmc.families.ani.network import backward, forward


@pytest.mark.parametrize("members", [1, 3])
def test_forward_and_backward_equal_autograd_through_modules(members):
    layers = toy_potential(members=members).networks["C"]
    features = torch.rand(7, layers[0].weight.shape[1], dtype=torch.float64).requires_grad_()
    expected = []
    for m in range(members):
        a = features
        for layer in layers[:-1]:
            a = ExactCelu()(a @ layer.weight[m] + layer.bias[m])
        expected.append((a @ layers[-1].weight[m] + layers[-1].bias[m]).squeeze(1))
    mean = torch.stack(expected).mean(0)
    (gradient,) = torch.autograd.grad(mean.sum(), features)

    output, slopes = forward(layers, features.detach())
    torch.testing.assert_close(output, torch.stack(expected).detach(), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(backward(layers, slopes), gradient, rtol=1e-12, atol=1e-14)


def test_saturated_units_pass_no_gradient_and_no_nan():
    layers = toy_potential(members=1, dtype=torch.float32).networks["H"]
    layers = (layers[0]._replace(bias=torch.full_like(layers[0].bias, -1e4)), *layers[1:])
    _, slopes = forward(layers, torch.zeros(2, layers[0].weight.shape[1]))
    assert torch.equal(backward(layers, slopes), torch.zeros(2, layers[0].weight.shape[1]))
