"""Scans against geometry, the Morse surface against autograd and scipy, and the fits of curves."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from ase.build import molecule
from ase.calculators.lj import LennardJones
from scipy.optimize import minimize

from tlmc.errors import ConfigError, DataError
from tlmc.labelling import method
from tlmc.networks import OPTIMIZERS
from tlmc.networks.energy_curve import Curve, MorseLoss, bond_scan, descend, fit_curve, torsion_scan

BUTANE = (0, 1, 2, 3)


@pytest.fixture(scope="module")
def xtb():
    return method("gfn2-xtb").make()


@pytest.fixture(scope="module")
def stretched(xtb):
    return bond_scan(molecule("HCl"), (0, 1), np.linspace(1.0, 3.0, 21), xtb)


def noisy(n, seed):
    rng = np.random.default_rng(seed)
    x = np.linspace(-180, 180, n)
    return Curve(x, 0.2 * np.cos(np.radians(3 * x)) + 0.05 * rng.normal(size=n))


class TestScans:
    def test_bond(self, stretched, xtb):
        assert stretched.x[stretched.energies.argmin()] == pytest.approx(1.3, abs=0.05)
        frame = molecule("HCl")
        frame.set_distance(0, 1, 1.7)
        frame.calc = xtb
        assert stretched.energies[7] == pytest.approx(frame.get_potential_energy(), abs=1e-6)

    def test_torsion_of_butane(self, xtb):
        angles = [60.0, 180.0, -60.0, 0.0]
        gauche, anti, other_gauche, cis = torsion_scan(molecule("trans-butane"), BUTANE, angles, xtb).energies
        assert gauche == pytest.approx(other_gauche, abs=1e-3)
        assert 0 < gauche - anti < 0.2 < cis - anti

    def test_only_one_side_turns_and_bonds_keep_their_lengths(self):
        seen = []

        class Watch(LennardJones):
            def calculate(self, atoms=None, *args, **kwargs):
                seen.append(atoms.copy())
                super().calculate(atoms, *args, **kwargs)

        frame = molecule("trans-butane")
        torsion_scan(frame, BUTANE, [75.0], Watch())
        assert seen[0].get_dihedral(*BUTANE) == pytest.approx(75.0)
        moved = np.abs(seen[0].positions - frame.positions).max(1) > 1e-9
        assert set(np.flatnonzero(moved)) == {3, 5, 8, 9, 12, 13}
        for a, b in ((2, 12), (3, 5), (3, 8), (2, 3)):
            assert seen[0].get_distance(a, b) == pytest.approx(frame.get_distance(a, b))

    def test_displacements_are_noise_that_the_seed_decides(self):
        settings = (molecule("trans-butane"), BUTANE, [180.0] * 5, LennardJones(), 0.01)
        one, same, other = (torsion_scan(*settings, np.random.default_rng(seed)).energies for seed in (0, 0, 1))
        assert np.array_equal(one, same)
        assert not np.array_equal(one, other)
        assert one.std() > 0

    @pytest.mark.parametrize(("name", "dihedral"), [("C6H6", (0, 1, 2, 3)), ("trans-butane", (0, 1, 3, 2))])
    def test_rings_and_missing_bonds_do_not_turn(self, name, dihedral):
        with pytest.raises(ConfigError, match="not joined by a bond about which one side can turn"):
            torsion_scan(molecule(name), dihedral, [0.0], LennardJones())

    def test_displacements_need_a_generator(self):
        with pytest.raises(ConfigError, match=r"displacements of 0.1 A need"):
            torsion_scan(molecule("trans-butane"), BUTANE, [0.0], LennardJones(), 0.1)


class TestDescent:
    def test_gradient_equals_autograd(self, stretched):
        loss = MorseLoss(stretched)
        w = torch.tensor([3.0, 1.4], dtype=torch.float64, requires_grad=True)
        for points in (None, torch.tensor([0, 5, 20])):
            x, energies = (t if points is None else t[points] for t in (loss.stretch, loss.energies))
            value = (w[0] * (1 - torch.exp(-w[1] * x)) ** 2 - energies).square().mean()
            (expected,) = torch.autograd.grad(value, w)
            torch.testing.assert_close(loss.gradient(w.detach(), points), expected, rtol=0, atol=1e-12)
            if points is None:
                assert loss(*w.detach().numpy()) == pytest.approx(value.item(), abs=1e-12)

    def test_optimisers_find_the_minimum_that_scipy_finds(self, stretched):
        loss = MorseLoss(stretched)
        reference = minimize(lambda w: loss(*w), [4.0, 1.5], tol=1e-12).x
        # a well depth of HCl is a few electron volts
        assert 3 < reference[0] < 7
        for name, lr in (("gd", 0.05), ("rmsprop", 0.01), ("adam", 0.05), ("adagrad", 0.5)):
            path = descend(name, loss.gradient, (2.5, 2.2), lr, 2000)
            assert path.shape == (2001, 2)
            np.testing.assert_allclose(path[-1], reference, atol=0.03, err_msg=name)

    def test_points_drawn_by_seed(self, stretched):
        loss = MorseLoss(stretched)
        paths = [descend("sgd", loss.stochastic(4, seed), (2.5, 2.2), 0.02, 20) for seed in (0, 0, 1)]
        assert np.array_equal(paths[0], paths[1])
        assert not np.array_equal(paths[0], paths[2])

    def test_gradients_of_some_points_are_right_in_the_mean(self, stretched):
        loss, w = MorseLoss(stretched), torch.tensor([2.5, 2.2], dtype=torch.float64)
        some = loss.stochastic(5)
        mean = torch.stack([some(w) for _ in range(4000)]).mean(0)
        torch.testing.assert_close(mean, loss.gradient(w), rtol=0.05, atol=0.02)

    @pytest.mark.parametrize("name", OPTIMIZERS)
    def test_every_method_goes_down(self, name, stretched):
        loss = MorseLoss(stretched)
        path = descend(name, loss.gradient, (2.5, 2.2), 0.02, 50)
        assert loss(*path[-1]) < loss(*path[0])

    def test_unknown_optimisers_are_named(self, stretched):
        with pytest.raises(ConfigError, match="optimizer must be one of gd, .*, got 'lbfgs'"):
            descend("lbfgs", MorseLoss(stretched).gradient, (1, 1), 0.1, 1)


class TestFits:
    def test_small_networks_underfit_and_large_ones_overfit(self):
        train, validation, truth = noisy(14, 0), noisy(13, 1), noisy(200, 2)
        truth = Curve(truth.x, 0.2 * np.cos(np.radians(3 * truth.x)))
        rmse = {}
        for name, hidden in (("small", (1,)), ("large", (40, 40))):
            fit = fit_curve(train, validation, hidden, n_steps=1500)
            rmse[name] = {
                "train": fit.history["train_rmse"].iloc[-1],
                "last": np.sqrt(((fit(truth.x) - truth.energies) ** 2).mean()),
                "best": np.sqrt(((fit(truth.x, best=True) - truth.energies) ** 2).mean()),
            }
        assert rmse["small"]["train"] > 0.08
        assert rmse["large"]["train"] < 0.01
        # what it has learned of the noise costs more than early stopping would have
        assert rmse["large"]["best"] < rmse["large"]["last"]
        assert rmse["large"]["train"] < 0.2 * rmse["large"]["last"]

    def test_weight_decay_shrinks_weights(self):
        train, validation, norms = noisy(8, 0), noisy(7, 1), []
        for decay in (0.0, 1.0):
            fit = fit_curve(train, validation, (10,), 300, 0.01, decay)
            norms.append(sum(w.square().sum().item() for w in fit.network.weights))
        assert norms[1] < 0.5 * norms[0]

    def test_history_and_best_belong_together(self):
        train, validation = noisy(8, 0), noisy(7, 1)
        fit = fit_curve(train, validation, (20, 20), 400, record_every=50)
        assert fit.history["step"].tolist() == list(range(0, 401, 50))
        row = fit.history.set_index("step").loc[fit.best_step]
        assert row["validation_rmse"] == fit.history["validation_rmse"].min()
        rmse = np.sqrt(((fit(validation.x, best=True) - validation.energies) ** 2).mean())
        assert rmse == pytest.approx(row["validation_rmse"], rel=1e-9)
        rmse = np.sqrt(((fit(train.x) - train.energies) ** 2).mean())
        assert rmse == pytest.approx(fit.history["train_rmse"].iloc[-1], rel=1e-9)

    def test_a_flat_curve_is_refused(self):
        flat = Curve(np.arange(3.0), np.zeros(3))
        with pytest.raises(DataError, match="needs points that differ"):
            fit_curve(flat, flat, (3,))
