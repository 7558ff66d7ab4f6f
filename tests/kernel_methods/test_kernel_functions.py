"""Covariance functions, and what they hide."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from sklearn.gaussian_process import kernels as reference

from tlmc.errors import ConfigError
from tlmc.kernel_methods import Gaussian, Matern52
from tlmc.kernel_methods.feature_maps import gaussian_series, quadratic_features, rings

KERNELS = [Gaussian, Matern52]
points = arrays(np.float64, st.tuples(st.integers(2, 12), st.integers(1, 4)), elements=st.floats(-5, 5))


@settings(max_examples=25, deadline=None)
@given(points=points, length=st.floats(0.1, 10.0), variance=st.floats(0.01, 100.0))
@pytest.mark.parametrize("kind", KERNELS)
def test_matrices_are_symmetric_and_positive_semidefinite(kind, points, length, variance):
    x = torch.from_numpy(points)
    matrix = kind(variance, length)(x, x)
    torch.testing.assert_close(matrix, matrix.T, rtol=0, atol=0)
    assert float(torch.linalg.eigvalsh(matrix).min()) > -1e-12 * variance * len(x)
    torch.testing.assert_close(matrix.diagonal(), torch.full((len(x),), variance, dtype=torch.float64))


@pytest.mark.parametrize(
    ("kernel", "expected"),
    [
        (Gaussian(2.5, 0.7), 2.5 * reference.RBF(0.7)),
        (Matern52(0.3, 1.9), 0.3 * reference.Matern(1.9, nu=2.5)),
    ],
)
def test_values_are_those_of_scikit_learn(kernel, expected):
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(7, 3)), rng.normal(size=(5, 3))
    ours = kernel(torch.from_numpy(a), torch.from_numpy(b)).numpy()
    np.testing.assert_allclose(ours, expected(a, b), rtol=1e-13)


@pytest.mark.parametrize("kind", KERNELS)
def test_hyperparameters_survive_their_logarithms(kind):
    kernel = kind(2.0, 0.3)
    assert kernel.with_theta(kernel.theta).parameters() == pytest.approx({"variance": 2.0, "length": 0.3}, rel=1e-14)


def test_bad_hyperparameters():
    with pytest.raises(ConfigError, match=r"Gaussian needs a positive length, got -1\.0"):
        Gaussian(1.0, -1.0)
    with pytest.raises(ConfigError, match="Matern52 needs a positive variance, got inf"):
        Matern52(float("inf"))


class TestFeatureMaps:
    def test_the_scalar_product_of_the_features_is_the_kernel(self):
        x = torch.from_numpy(np.random.default_rng(1).normal(size=(6, 2)))
        torch.testing.assert_close(quadratic_features(x) @ quadratic_features(x).T, (x @ x.T) ** 2)

    def test_rings_are_separated_by_a_plane_in_feature_space_only(self):
        x, label = rings(60, (0.8, 2.0), 0.1, np.random.default_rng(0))
        best = {}
        for name, features in (("plane", x), ("space", quadratic_features(x))):
            design = torch.cat([features, torch.ones(len(x), 1, dtype=x.dtype)], dim=1)
            answer = design @ torch.linalg.lstsq(design, label[:, None]).solution[:, 0]
            best[name] = float((answer.sign() == label).double().mean())
        assert best["space"] == 1.0
        assert best["plane"] < 0.75

    @pytest.mark.parametrize("gamma", [0.2, 1.3])
    def test_the_series_of_the_gaussian_converges_to_it(self, gamma):
        rng = np.random.default_rng(2)
        a, b = torch.from_numpy(rng.normal(size=(4, 2))), torch.from_numpy(rng.normal(size=(5, 2)))
        exact = Gaussian(1.0, (2 * gamma) ** -0.5)(a, b)
        errors = [float((gaussian_series(a, b, gamma, n) - exact).abs().max()) for n in (5, 10, 60)]
        assert errors[0] > errors[1] > errors[2]
        assert errors[2] < 1e-12

    def test_a_series_needs_a_term(self):
        x = torch.ones(1, 2)
        with pytest.raises(ConfigError, match=r"at least one term, got 1\.0 and 0"):
            gaussian_series(x, x, 1.0, 0)
