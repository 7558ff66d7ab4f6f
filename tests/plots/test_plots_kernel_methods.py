"""Figures of kernel methods: what they draw, and what they refuse."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from tlmc.errors import DataError
from tlmc.plots import kernel_methods as plots


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")


def curve():
    rows = [
        {"learner": name, "n_train": n, "seed": seed, "energy_rmse_per_atom": 0.01 / n, "force_rmse_vector": factor / n}
        for name, factor in (("GAP", 2.0), ("sGDML", 1.0))
        for n in (10, 20, 40)
        for seed in (0, 1)
    ]
    return pd.DataFrame(rows)


def test_all_draw_and_name_their_axes():
    x = np.linspace(0, 1, 5)
    drawn = [
        plots.two_classes([[0, 0], [1, 1]], [-1, 1], decision=(x, x, np.outer(x, x) - 0.5)),
        plots.uncertainty_band(x, x, x, points=([0.5], [0.4]), truth=x, samples=[x, x]),
        plots.error_against_size(curve()),
        plots.effort(pd.DataFrame({"estimator": "a", "n": [10, 20], "seconds": [0.1, 0.7]})),
        plots.calibration([0.1, -0.2], [0.2, 0.2]),
        plots.covariance_matrix(np.eye(4), blocks=[2]),
        plots.atom_energies(np.ones((3, 2)), ["C", "H"]),
    ]
    for ax in drawn:
        ax.figure.canvas.draw()
        assert ax.get_xlabel()
        assert ax.get_ylabel()


def test_the_band_is_two_standard_deviations_on_either_side():
    ax = plots.uncertainty_band([0.0, 1.0], [1.0, 2.0], [0.5, 0.25])
    corners = ax.collections[0].get_paths()[0].vertices
    assert corners[:, 1].min() == 0.0
    assert corners[:, 1].max() == 2.5


def test_seeds_are_averaged_and_shown():
    table = curve()
    table.loc[table["seed"] == 1, "force_rmse_vector"] *= 4
    ax = plots.error_against_size(table)
    # a line of geometric means and a set of points per learner
    assert len(ax.lines) == 4
    np.testing.assert_allclose(ax.lines[0].get_ydata(), [0.4, 0.2, 0.1])
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["GAP", "sGDML"]


def test_energies_in_mev():
    ax = plots.error_against_size(curve(), quantity="energy_rmse_per_atom")
    np.testing.assert_allclose(ax.lines[0].get_ydata(), [1.0, 0.5, 0.25])


def test_the_guide_of_the_effort_is_cubic():
    ax = plots.effort(pd.DataFrame({"estimator": "a", "n": [10, 20], "seconds": [0.1, 0.8]}))
    np.testing.assert_allclose(ax.lines[1].get_ydata(), [0.1, 0.8])


def test_calibration_of_normal_errors_is_the_diagonal():
    error = np.random.default_rng(0).normal(size=4000)
    expected, observed = plots.calibration(error, np.ones(4000)).lines[1].get_data()
    assert np.abs(expected - observed).max() < 0.03


def test_atoms_are_compared_with_their_element():
    ax = plots.atom_energies([[1.0, 5.0, 7.0], [3.0, 5.0, 7.0]], ["C", "H", "H"])
    means = [line.get_ydata()[0] for line in ax.lines[1::2]]
    np.testing.assert_allclose(means, [0.0, -1.0, 1.0])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: plots.two_classes([[0, 0]], [1, 1]), r"got \(1, 2\) and \(2,\)"),
        (lambda: plots.uncertainty_band([0], [0, 1], [1]), "of one length"),
        (lambda: plots.error_against_size(curve().iloc[:0]), "got 0 rows"),
        (lambda: plots.error_against_size(curve().assign(force_rmse_vector=0.0)), r"must be positive, got 0\.0"),
        (lambda: plots.effort(curve()), "an effort needs columns estimator, n and seconds"),
        (lambda: plots.calibration([0.1], [0.0]), "positive deviations"),
        (lambda: plots.covariance_matrix(np.ones((2, 3))), r"got shape \(2, 3\)"),
        (lambda: plots.atom_energies(np.ones((2, 3)), "CH"), r"\(n_frames, 2\), got \(2, 3\)"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(DataError, match=message):
        call()
