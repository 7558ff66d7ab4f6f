"""Figures of ablations show the numbers of the table, ours and the thesis'."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from helpers.ablation_records import record
from tlmc import plots
from tlmc.errors import DataError
from tlmc.thesis.ablations import table


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")


def results(name, labels, n_seeds=3):
    rows = []
    for seed in range(n_seeds):
        for k, label in enumerate(labels):
            rows += record(label, seed, F=0.05 * (1 + k) * (1 + 0.1 * seed), E=1.0 + k)
            rows += record(label, seed, F=0.3 / (1 + k), split="molecules")
    return table(name, pd.DataFrame(rows))


LORA = ("short", "short, rank 1", "short, rank 16", "short, output layer only")


def points(ax, label):
    """Return where the markers of a series of error bars lie; matplotlib keeps them as objects."""
    [series] = [container for container in ax.containers if container.get_label() == label]
    return series[0].get_xydata().astype(float).T


def legend(ax):
    return [text.get_text() for text in ax.get_legend().get_texts()]


def test_ratios_stand_beside_those_of_the_thesis():
    shown = results("lambda", ("thesis", "thesis, lambda 0", "thesis, lambda 0.1"))
    ax = plots.setting_ratios(shown)
    assert [text.get_text() for text in ax.get_yticklabels()] == ["lambda 0", "lambda 0.1", "lambda 0.9"]
    assert legend(ax) == ["thesis", "d"]
    [thesis] = [line for line in ax.lines if line.get_label() == "thesis"]
    np.testing.assert_allclose(thesis.get_xdata(), np.array([0.90252, 0.06967, 0.06730]) / 0.06730)
    np.testing.assert_allclose(points(ax, "d")[0], [2.0, 3.0, 1.0])
    energy = plots.setting_ratios(shown, quantity="E")
    np.testing.assert_allclose(points(energy, "d")[0], [2.0, 3.0, 1.0])
    # the thesis has no such table
    assert legend(plots.setting_ratios(results("lora", LORA))) == ["d"]


def test_errors_against_a_number():
    shown = results("lambda", ("thesis", "thesis, lambda 0", "thesis, lambda 0.1"), n_seeds=1)
    ax = plots.error_against_value(shown, xlabel="lambda", log_x=False)
    np.testing.assert_allclose(points(ax, "d"), [[0.0, 0.1, 0.9], [0.10, 0.15, 0.05]])
    assert ax.get_xscale() == "linear"
    ax = plots.error_against_value(results("lora", LORA), xlabel="rank")
    assert legend(ax) == ["whole matrices", "d"]
    assert [text.get_text() for text in ax.get_xticklabels()] == ["1", "16"]
    with pytest.raises(DataError, match="is a number"):
        plots.error_against_value(results("ema", ("short",)), xlabel="x")


def test_drift_against_error():
    shown = results("lora", LORA)
    ax = plots.drift_against_error(shown)
    drawn = {c.get_label(): (c[0].get_xdata()[0], c[0].get_ydata()[0]) for c in ax.containers}
    assert drawn["whole matrices"] == pytest.approx((0.055, 0.3))
    assert drawn["rank 16"] == pytest.approx((0.165, 0.1))


@pytest.mark.parametrize("plot", [plots.setting_ratios, plots.drift_against_error])
def test_an_empty_table_is_refused(plot):
    with pytest.raises(DataError, match="columns"):
        plot(pd.DataFrame())


def test_ratios_need_the_recipe_itself():
    with pytest.raises(DataError, match="recipe as it is"):
        plots.setting_ratios(results("lora", LORA[1:]))
