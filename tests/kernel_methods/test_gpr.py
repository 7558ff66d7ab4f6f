"""Gaussian process regression, exact and for many points, against scikit-learn and itself."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chi2
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process import kernels as reference

from tlmc.errors import ConfigError, DataError, ModelError
from tlmc.kernel_methods import (
    Gaussian,
    GaussianProcess,
    IterativeProcess,
    Matern52,
    NystromProcess,
    conjugate_gradients,
)
from tlmc.kernel_methods.gpr import likely_start

PAIRS = {
    "gaussian": (Gaussian, lambda length: reference.RBF(length)),
    "matern": (Matern52, lambda length: reference.Matern(length, nu=2.5)),
}


def sample(n=40, n_features=2, seed=0, noise=0.05):
    """Return points and labels of a smooth function, and more points."""
    rng = np.random.default_rng(seed)
    x, more = rng.uniform(-2, 2, size=(n, n_features)), rng.uniform(-3, 3, size=(25, n_features))
    y = 3.0 + np.sin(2 * x[:, 0]) * np.cos(x[:, -1]) + noise * rng.normal(size=n)
    return torch.from_numpy(x), torch.from_numpy(y), torch.from_numpy(more)


@pytest.fixture(params=PAIRS)
def both(request):
    """Return ours and scikit-learn's process with the same hyperparameters, fitted to the same labels."""
    ours, theirs = PAIRS[request.param]
    x, y, more = sample()
    process = GaussianProcess(ours(1.7, 0.8), noise=0.01, optimize=False).fit(x, y)
    kernel = reference.ConstantKernel(1.7) * theirs(0.8) + reference.WhiteKernel(0.01)
    expected = GaussianProcessRegressor(kernel, optimizer=None, alpha=0.0).fit(x.numpy(), (y - y.mean()).numpy())
    return process, expected, more


class TestAgainstScikitLearn:
    def test_mean_and_standard_deviation(self, both):
        process, expected, more = both
        mean, std = expected.predict(more.numpy(), return_std=True)
        np.testing.assert_allclose(process.predict(more).numpy() - process.mean_, mean, rtol=1e-8, atol=1e-10)
        # theirs is that of a new label, whose noise is added
        np.testing.assert_allclose(np.sqrt(process.std(more).numpy() ** 2 + process.noise_), std, rtol=1e-8)

    def test_marginal_likelihood_and_its_gradient(self, both):
        process, expected, _ = both
        for shift in ([0.0, 0.0, 0.0], [0.4, -0.5, 1.0], [-1.0, 0.3, -0.7]):
            theta = np.log([1.7, 0.8, 0.01]) + shift
            value, gradient = process.log_marginal_likelihood(torch.from_numpy(theta))
            value_2, gradient_2 = expected.log_marginal_likelihood(theta, eval_gradient=True)
            assert value == pytest.approx(value_2, rel=1e-8)
            np.testing.assert_allclose(gradient.numpy(), gradient_2, rtol=1e-8)

    def test_optimised_hyperparameters(self):
        x, y, more = sample()
        process = GaussianProcess(Gaussian(1.0, 1.0), noise=0.1).fit(x, y)
        kernel = reference.ConstantKernel(1.0) * reference.RBF(1.0) + reference.WhiteKernel(0.1)
        expected = GaussianProcessRegressor(kernel, alpha=0.0).fit(x.numpy(), (y - y.mean()).numpy())
        assert process.log_likelihood_ == pytest.approx(expected.log_marginal_likelihood_value_, abs=1e-5)
        found = np.log([*process.kernel_.parameters().values(), process.noise_])
        np.testing.assert_allclose(found, expected.kernel_.theta, atol=5e-3)
        np.testing.assert_allclose(
            (process.predict(more) - process.mean_).numpy(), expected.predict(more.numpy()), atol=5e-3
        )


class TestExact:
    def test_interpolates_where_there_is_no_noise(self):
        x, y, _ = sample(noise=0.0)
        process = GaussianProcess(Matern52(1.0, 1.0), noise=1e-10, optimize=False).fit(x, y)
        torch.testing.assert_close(process.predict(x), y, rtol=0, atol=1e-6)
        assert float(process.std(x).max()) < 1e-4

    def test_far_away_it_knows_nothing(self):
        x, y, _ = sample()
        process = GaussianProcess(Gaussian(1.7, 0.8), noise=0.01, optimize=False).fit(x, y)
        far = torch.full((1, 2), 100.0, dtype=torch.float64)
        assert float(process.predict(far)) == pytest.approx(float(y.mean()))
        assert float(process.std(far)) == pytest.approx(1.7**0.5)

    def test_the_mean_has_a_gradient(self):
        x, y, more = sample()
        process = GaussianProcess(Gaussian(1.7, 0.8), noise=0.01, optimize=False).fit(x, y)
        assert torch.autograd.gradcheck(process.predict, more[:3].clone().requires_grad_())

    def test_more_labels_never_raise_the_uncertainty(self):
        x, y, more = sample()
        stds = [
            GaussianProcess(Gaussian(1.7, 0.8), 0.01, optimize=False).fit(x[:n], y[:n]).std(more) for n in (10, 20, 40)
        ]
        assert bool((stds[0] >= stds[1] - 1e-12).all())
        assert bool((stds[1] >= stds[2] - 1e-12).all())

    @settings(max_examples=10, deadline=None)
    @given(seed=st.integers(0, 10_000), length=st.floats(0.4, 2.0))
    def test_the_order_of_the_labels_does_not_matter(self, seed, length):
        x, y, more = sample()
        order = torch.from_numpy(np.random.default_rng(seed).permutation(len(x)))
        a, b = (
            GaussianProcess(Gaussian(1.0, length), 0.01, optimize=False).fit(x[i], y[i])
            for i in (order, torch.arange(len(x)))
        )
        torch.testing.assert_close(a.predict(more), b.predict(more), rtol=1e-9, atol=1e-9)

    def test_variances_are_calibrated_on_functions_drawn_from_the_prior(self):
        """The squared errors over the variances of many independent functions follow a chi-squared distribution."""
        rng = np.random.default_rng(0)
        kernel, noise = Gaussian(2.0, 0.6), 0.05
        x = torch.linspace(-3, 3, 41, dtype=torch.float64)[:, None]
        factor = torch.linalg.cholesky(kernel(x, x) + 1e-10 * torch.eye(len(x)))
        learnt, asked = torch.arange(0, 41, 4), 22
        score = []
        for _ in range(300):
            function = factor @ torch.from_numpy(rng.normal(size=len(x)))
            y = function[learnt] + noise**0.5 * torch.from_numpy(rng.normal(size=len(learnt)))
            process = GaussianProcess(kernel, noise, optimize=False, centre=False).fit(x[learnt], y)
            here = x[asked : asked + 1]
            score.append(float((process.predict(here) - function[asked]) / process.std(here)))
        low, high = chi2.ppf([0.001, 0.999], len(score))
        assert low < np.square(score).sum() < high
        inside = np.mean(np.abs(score) < 1.0)
        assert inside == pytest.approx(0.683, abs=4 * (0.683 * 0.317 / 300) ** 0.5)

    def test_samples_have_the_posterior_mean_and_deviation(self):
        x, y, more = sample()
        process = GaussianProcess(Gaussian(1.7, 0.8), noise=0.01, optimize=False).fit(x, y)
        drawn = process.sample(more, 4000, np.random.default_rng(0))
        std = process.std(more)
        assert bool(((drawn.mean(0) - process.predict(more)).abs() < 5 * std / 4000**0.5 + 1e-9).all())
        torch.testing.assert_close(drawn.std(0), std, rtol=0.08, atol=1e-6)

    def test_errors(self):
        x, y, _ = sample()
        with pytest.raises(ConfigError, match="noise must be a positive variance, got 0"):
            GaussianProcess(Gaussian(), noise=0).fit(x, y)
        with pytest.raises(DataError, match=r"got \(40, 2\) and \(39,\)"):
            GaussianProcess(Gaussian()).fit(x, y[1:])
        with pytest.raises(DataError, match="must be finite"):
            GaussianProcess(Gaussian()).fit(x, y * float("nan"))
        with pytest.raises(
            ModelError, match=r"40 points with Gaussian\(variance=1\.0, length=100\.0\).*raise the noise"
        ):
            GaussianProcess(Gaussian(1.0, 100.0), noise=1e-18, optimize=False).fit(x, y)


class TestLikelyStart:
    def test_finds_a_smooth_function_where_a_search_from_afar_does_not(self):
        rng = np.random.default_rng(0)
        x = torch.from_numpy(rng.normal(size=(60, 4)))
        y = (x**2) @ torch.from_numpy(rng.normal(size=4)) + 5.0
        start, noise = likely_start(Gaussian, x, y)
        found = GaussianProcess(start, noise).fit(x, y)
        lost = GaussianProcess(Gaussian(float(y.var()), 0.01), noise=float(y.var())).fit(x, y)
        assert found.log_likelihood_ > lost.log_likelihood_ + 20
        more = torch.from_numpy(rng.normal(size=(40, 4)))
        truth = (more**2) @ torch.linalg.lstsq(x**2, (y - 5.0)[:, None]).solution[:, 0] + 5.0
        assert float((found.predict(more) - truth).std()) < 0.5 * float(truth.std())

    def test_its_likelihood_is_that_of_the_process(self):
        x, y, _ = sample()
        kernel, noise = likely_start(Matern52, x, y)
        best = GaussianProcess(kernel, noise, optimize=False).fit(x, y).log_likelihood_
        for other in (Matern52(kernel.variance * 1.2, kernel.length), Matern52(kernel.variance / 1.2, kernel.length)):
            scaled = noise * other.variance / kernel.variance
            assert GaussianProcess(other, scaled, optimize=False).fit(x, y).log_likelihood_ < best

    def test_nothing_to_learn(self):
        x, y, _ = sample()
        with pytest.raises(DataError, match="40 points with a median distance of 0"):
            likely_start(Gaussian, torch.zeros_like(x), y)
        with pytest.raises(DataError, match="labels of norm 0"):
            likely_start(Gaussian, x, torch.ones_like(y))


class TestManyPoints:
    def test_nystrom_with_all_points_is_exact(self):
        x, y, more = sample()
        exact = GaussianProcess(Matern52(1.7, 0.8), 0.01, optimize=False).fit(x, y)
        low_rank = NystromProcess(Matern52(1.7, 0.8), 0.01, n_inducing=len(x)).fit(x, y)
        torch.testing.assert_close(low_rank.predict(more), exact.predict(more), rtol=0, atol=1e-6)
        torch.testing.assert_close(low_rank.std(more), exact.std(more), rtol=0, atol=1e-6)

    def test_nystrom_converges_from_the_side_of_doubt(self):
        x, y, more = sample(n=300)
        exact = GaussianProcess(Gaussian(1.7, 0.8), 0.01, optimize=False).fit(x, y)
        errors, stds = [], []
        for n in (10, 40, 120):
            low_rank = NystromProcess(Gaussian(1.7, 0.8), 0.01, n_inducing=n).fit(x, y)
            errors.append(float((low_rank.predict(more) - exact.predict(more)).abs().max()))
            stds.append(float(low_rank.std(more).mean()))
        assert errors[0] > errors[1] > errors[2]
        assert errors[2] < 1e-2
        assert stds[0] > stds[1] > stds[2] > float(exact.std(more).mean()) - 1e-6

    @pytest.mark.parametrize(("n", "n_inducing"), [(200, 0), (700, 60)])
    def test_conjugate_gradients_give_the_exact_mean(self, n, n_inducing):
        x, y, more = sample(n=n)
        exact = GaussianProcess(Gaussian(1.7, 0.8), 0.01, optimize=False).fit(x, y)
        iterative = IterativeProcess(Gaussian(1.7, 0.8), 0.01, n_inducing, tolerance=1e-12).fit(x, y)
        torch.testing.assert_close(iterative.predict(more), exact.predict(more), rtol=1e-8, atol=1e-8)
        assert len(iterative.residuals_) == iterative.n_steps_ + 1

    def test_the_preconditioner_saves_steps(self):
        x, y, _ = sample(n=200)
        steps = [IterativeProcess(Gaussian(1.7, 0.8), 1e-2, n).fit(x, y).n_steps_ for n in (0, 80)]
        assert steps[1] < steps[0] / 3

    def test_the_steps_are_no_more_than_the_unknowns(self):
        rng = np.random.default_rng(0)
        root = torch.from_numpy(rng.normal(size=(8, 8)))
        matrix, right = root @ root.T + torch.eye(8), torch.from_numpy(rng.normal(size=8))
        found = conjugate_gradients(matrix.matmul, right, tolerance=1e-9)
        torch.testing.assert_close(matrix @ found.vector, right)
        assert found.n_steps <= 8
        assert conjugate_gradients(matrix.matmul, torch.zeros(8, dtype=torch.float64)).n_steps == 0

    def test_errors(self):
        x, y, _ = sample()
        with pytest.raises(ModelError, match="not converged in 2 steps"):
            IterativeProcess(Gaussian(1.7, 0.8), 1e-6, max_steps=2).fit(x, y)
        with pytest.raises(ConfigError, match="n_selected must lie in 1 to 40, got 41"):
            NystromProcess(Gaussian(), 0.01, 41).fit(x, y)
        with pytest.raises(ConfigError, match=r"noise must be a positive variance, got -1\.0"):
            NystromProcess(Gaussian(), -1.0, 4).fit(x, y)
