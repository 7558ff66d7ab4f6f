"""Figures of several crystals: what is drawn where, and what is refused."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from helpers.labelled import random_set
from tlmc import plots
from tlmc.errors import DataError


@pytest.fixture(autouse=True)
def _close():
    yield
    plt.close("all")


def energies(n=3):
    labels = 0.1 * np.arange(n)
    table = pd.DataFrame({"n_frames": 1, "labels": labels, "start": labels[::-1], "fine-tuned": 2 * labels})
    return table.set_index(pd.Index([f"P{k}" for k in range(n)], name="packing"))


class TestRanking:
    def test_levels_are_energies_without_the_mean_in_meV(self):
        ax = plots.ranking(energies())
        assert [text.get_text() for text in ax.get_xticklabels()] == ["start", "labels", "fine-tuned"]
        levels = [line for line in ax.lines if line.get_linewidth() > 1]
        middle = [line.get_ydata()[0] for line in levels if line.get_xdata()[0] == 0.75]
        assert middle == pytest.approx([-100, 0, 100])
        right = [line.get_ydata()[0] for line in levels if line.get_xdata()[0] == 1.75]
        assert right == pytest.approx([-200, 0, 200])
        assert [text.get_text() for text in ax.get_legend().get_texts()] == ["P0", "P1", "P2"]

    def test_panels_agree_on_colours(self):
        whole, part = plots.ranking(energies()), plots.ranking(energies().iloc[1:], among=["P0", "P1", "P2"])
        colour = {line.get_label(): line.get_color() for line in whole.lines}
        assert [line.get_color() for line in part.lines if line.get_label()[0] == "P"] == [colour["P1"], colour["P2"]]

    def test_many_candidates_get_no_legend(self):
        assert plots.ranking(energies(30)).get_legend() is None

    def test_a_table_without_labels_is_refused(self):
        with pytest.raises(DataError, match="a ranking needs columns"):
            plots.ranking(energies().drop(columns="labels"))


def shared_table():
    rows = [
        {"crystal": crystal, "seed": seed, "model": model, "force_rmse_vector": force, "energy_rmse_per_atom": 0.001}
        for crystal in ("27", "33")
        for seed in (0, 1)
        for model, force in (("one per crystal", 0.1 + 0.02 * seed), ("one for all", 0.2))
    ]
    return pd.DataFrame([*rows, rows[0] | {"crystal": "33", "model": "the others only", "force_rmse_vector": 0.4}])


class TestSharedModels:
    def test_bars_are_means_over_seeds_and_lines_their_range(self):
        figure = plots.shared_models(shared_table())
        force, energy = figure.axes
        heights = {bars.get_label(): [bar.get_height() for bar in bars] for bars in force.containers}
        assert heights["one per crystal"] == pytest.approx([0.11, 0.11])
        assert heights["the others only"] == pytest.approx([0.4])
        segments = force.collections[0].get_segments()
        assert segments[0][:, 1] == pytest.approx([0.1, 0.12])
        assert energy.containers[0][0].get_height() == pytest.approx(1.0)

    def test_an_empty_table_is_refused(self):
        with pytest.raises(DataError, match="a comparison of models needs columns"):
            plots.shared_models(shared_table().iloc[:0])


def equilibrium_table(n, factor=1.0):
    x = np.linspace(0.1, 1.0, n)
    columns = {"energy_above_lowest": 0.1 * x, "volume_strain": x - 0.5, "force_rms": x}
    return pd.DataFrame(columns | {"force_rmse_vector": factor * x, "energy_error_per_atom": -0.001 * factor * x})


class TestErrorAgainstEquilibrium:
    def test_points_are_frames_and_lines_root_mean_squares_of_groups(self):
        table = equilibrium_table(24)
        figure = plots.error_against_equilibrium({"before": table, "after": equilibrium_table(24, 0.1)})
        ax = figure.axes[2]
        assert len(ax.collections[0].get_offsets()) == 24
        line = ax.lines[0].get_ydata()
        assert len(line) == 6
        assert line[0] == pytest.approx(np.sqrt((table["force_rmse_vector"][:4] ** 2).mean()))
        # meV, and errors of either sign
        energy = figure.axes[3].lines[1].get_ydata()
        assert energy[-1] == pytest.approx(1000 * 0.1 * 0.001 * np.sqrt((table["force_rms"][-4:] ** 2).mean()))

    def test_few_frames_are_one_group(self):
        figure = plots.error_against_equilibrium({"a": equilibrium_table(2)})
        assert len(figure.axes[0].lines[0].get_ydata()) == 1

    def test_wrong_tables_are_refused(self):
        with pytest.raises(DataError, match="at least one table"):
            plots.error_against_equilibrium({})
        with pytest.raises(DataError, match="a: errors against equilibrium need columns"):
            plots.error_against_equilibrium({"a": equilibrium_table(3).drop(columns="force_rms")})


class TestGallery:
    def test_a_row_per_crystal_and_pairs_share_axes(self):
        labels, predicted = random_set(6)
        _, worse = random_set(6, noise=0.5)
        figure = plots.parity_gallery({"27": (labels, worse, predicted), "33": (labels, worse, predicted)})
        axes = np.array(figure.axes).reshape(2, 4)
        assert axes[0, 0].get_ylabel() == "27"
        assert axes[1, 0].get_xlim() == axes[1, 1].get_xlim() == axes[1, 1].get_ylim()
        assert axes[1, 2].get_xlim() == axes[1, 3].get_xlim()
        x, y = axes[0, 0].lines[0].get_data()
        assert list(x) == list(y) == list(axes[0, 0].get_xlim())

    def test_nothing_to_show(self):
        with pytest.raises(DataError, match="at least one crystal"):
            plots.parity_gallery({})


def test_bars_of_energy_errors_keep_the_order_and_tell_sources_apart():
    table = pd.DataFrame(
        {"E (meV/atom)": [3.4, 2.3, 1.6], "source": ["quoted", "quoted", "this run"]}, index=list("abc")
    )
    ax = plots.energy_errors(table)
    assert [text.get_text() for text in ax.get_yticklabels()] == ["a", "b", "c"]
    assert [[bar.get_width() for bar in bars] for bars in ax.containers] == [[3.4, 2.3], [1.6]]
    assert ax.yaxis_inverted()
    with pytest.raises(DataError, match="energy errors need columns"):
        plots.energy_errors(table.drop(columns="source"))
