"""The training loss by hand, and its slopes by finite differences."""

from __future__ import annotations

import pytest
import torch

from tlmc.training.loss import batch_loss


def batch(seed=0):
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.tensor([2, 3])
    forces = torch.randn(5, 3, generator=generator, dtype=torch.float64)
    energies = torch.randn(2, generator=generator, dtype=torch.float64)
    return energies, forces, sizes.double(), torch.repeat_interleave(torch.arange(2), sizes)


def test_equation_3_46_by_hand():
    energies, forces, n_atoms, structure = batch()
    expected = 0.0
    for k, n in enumerate((2, 3)):
        of_structure = forces[structure == k]
        expected += (0.9 * of_structure.square().sum() / n + 0.1 * (energies[k] / n) ** 2) / 2
    assert batch_loss(energies, forces, n_atoms, structure, 0.9).loss.item() == pytest.approx(expected.item())


@pytest.mark.parametrize("kind", ["mse", "huber"])
def test_slopes_equal_autograd(kind):
    energies, forces, n_atoms, structure = batch()
    energies.requires_grad_()
    forces.requires_grad_()
    result = batch_loss(energies, forces, n_atoms, structure, 0.7, kind, 0.5)
    by_energy, by_force = torch.autograd.grad(result.loss, (energies, forces))
    torch.testing.assert_close(result.energy_slope, by_energy)
    torch.testing.assert_close(result.force_slope, by_force)


@pytest.mark.parametrize("kind", ["mse", "huber"])
def test_shares_of_a_batch_add_up(kind):
    energies, forces, n_atoms, structure = batch()
    whole = batch_loss(energies, forces, n_atoms, structure, 0.7, kind, 0.5)
    shares = [
        batch_loss(
            energies[[k]], forces[structure == k], n_atoms[[k]], structure[structure == k] - k, 0.7, kind, 0.5, 2
        )
        for k in range(2)
    ]
    assert sum(share.loss for share in shares).item() == pytest.approx(whole.loss.item())
    torch.testing.assert_close(torch.cat([share.force_slope for share in shares]), whole.force_slope)
    torch.testing.assert_close(torch.cat([share.energy_slope for share in shares]), whole.energy_slope)


def test_huber_is_the_square_for_small_errors_and_linear_for_large_ones():
    energies, forces, n_atoms, structure = batch()
    small = batch_loss(0.01 * energies, 0.01 * forces, n_atoms, structure, 0.5, "huber", 1.0)
    assert small.loss.item() == pytest.approx(
        batch_loss(0.01 * energies, 0.01 * forces, n_atoms, structure, 0.5).loss.item()
    )
    large = [
        batch_loss(0 * energies, s * torch.ones_like(forces), n_atoms, structure, 1.0, "huber", 0.1).loss
        for s in (1, 2, 3)
    ]
    assert (large[2] - large[1]).item() == pytest.approx((large[1] - large[0]).item())
