from __future__ import annotations

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from ase.build import molecule
from ase.calculators.emt import EMT

from tlmc import plots, sampling
from tlmc.errors import DataError


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")


def legend(ax):
    return [text.get_text() for text in ax.get_legend().get_texts()]


@pytest.fixture(scope="module")
def modes():
    frame = molecule("H2O")
    return sampling.normal_modes(frame, sampling.hessian(frame, EMT()))


class TestNormalMode:
    def test_arrows_lie_along_the_mode(self, modes):
        ax = plots.normal_mode(modes, 2)
        ax.figure.canvas.draw()
        assert "cm" in ax.get_title()
        circles = [patch for patch in ax.patches if isinstance(patch, mpl.patches.Circle)]
        assert len(circles) == 3
        bonds = [line for line in ax.lines if len(line.get_xdata()) == 2]
        assert len(bonds) == 2
        # lengths in the plane are those of the molecule, which is flat, as are its vibrations
        lengths = [np.hypot(np.diff(line.get_xdata()), np.diff(line.get_ydata()))[0] for line in bonds]
        assert lengths == pytest.approx([modes.frame.get_distance(0, k) for k in (1, 2)], rel=1e-6)
        arrows = [np.subtract(text.xy, text.xyann) for text in ax.texts]
        expected = np.linalg.norm(modes.displacements[2], axis=1)
        drawn = np.sort([np.linalg.norm(arrow) for arrow in arrows])
        shown = np.sort(expected / expected.max() * 1.6)
        assert drawn == pytest.approx(shown[shown > 0.12 * 1.6])

    def test_a_mode_that_is_not_there(self, modes):
        with pytest.raises(DataError, match="there is no mode 3: the structure has 3"):
            plots.normal_mode(modes, 3)


def test_histograms_are_densities_and_theory_a_line():
    energies = np.random.default_rng(0).uniform(0, 2, 2000)
    ax = plots.drawn_energies({"thesis": energies}, theory={"thesis": ([0, 2], [0.5, 0.5])})
    assert sum(patch.get_width() * patch.get_height() for patch in ax.patches) == pytest.approx(1)
    assert ax.lines[0].get_ydata() == pytest.approx([0.5, 0.5])
    assert legend(ax) == [f"thesis, mean {energies.mean():.3f} eV"]
    with pytest.raises(DataError, match="a distribution needs energies, got none"):
        plots.drawn_energies({})


def test_a_scan_is_drawn_above_its_lowest_mean():
    ax = plots.committee_scan([1, 2, 3], [[-5, -4, 0], [-5, -4, 4]], [1.0, 1.1], reference=[7, 8, 9])
    lines = {line.get_label(): line.get_ydata().tolist() for line in ax.lines}
    assert lines["mean"] == [0, 1, 7]
    assert lines["reference"] == [0, 1, 2]
    assert "training data" in legend(ax)
    with pytest.raises(DataError, match=r"a scan of \(3,\) points needs energies \(n_members, n_points\), got \(3,\)"):
        plots.committee_scan([1, 2, 3], [1, 2, 3], [1.0])


def test_reliability_begins_and_ends_on_the_diagonal():
    curve = sampling.Reliability(np.array([0.5]), np.array([0.8]))
    ax = plots.reliability_diagram({"raw": curve})
    assert ax.lines[1].get_xydata().tolist() == [[0, 0], [0.5, 0.8], [1, 1]]
    assert legend(ax) == ["raw, area 0.150"]
    with pytest.raises(DataError, match="needs at least one curve, got none"):
        plots.reliability_diagram({})


def test_energies_are_binned_in_mev():
    bins = sampling.SpreadBins(np.array([0.001, 0.002]), np.array([0.002, 0.003]), np.array([5, 5]))
    ax = plots.spread_and_error({"raw": bins}, quantity="energy")
    assert ax.lines[1].get_xydata() == pytest.approx(np.array([[1, 2], [2, 3]]))
    assert ax.get_xlabel() == "RMS spread, energy (meV/atom)"
    with pytest.raises(DataError, match="need at least one set of bins, got none"):
        plots.spread_and_error({})


class TestActiveLearning:
    def table(self):
        rows = [
            (name, seed, n, scale * (seed + 1) / n)
            for name, scale in (("committee", 1.0), ("random", 2.0))
            for seed in range(3)
            for n in (2, 4, 8)
        ]
        return pd.DataFrame(rows, columns=["name", "seed", "n_labels", "force_rmse_vector"])

    def test_means_and_bands_over_seeds(self):
        ax = plots.active_learning(self.table(), target=0.5)
        assert legend(ax) == ["committee (3 seeds)", "random (3 seeds)"]
        np.testing.assert_allclose(ax.lines[0].get_ydata(), 2.0 / np.array([2, 4, 8]))
        _, lower, upper = sampling.mean_interval(np.array([1.0, 2.0, 3.0]) / 2)
        assert len(ax.lines) == 2 * 3 + 1
        vertices = ax.collections[0].get_paths()[0].vertices
        at_two = vertices[vertices[:, 0] == 2, 1]
        assert (at_two.min(), at_two.max()) == pytest.approx((lower, upper))
        assert ax.lines[-1].get_ydata()[0] == 0.5

    def test_numbers_that_a_seed_did_not_reach_are_left_out(self):
        table = self.table().drop(index=2)
        assert plots.active_learning(table).lines[0].get_xdata().tolist() == [2, 4]

    def test_two_seeds_are_drawn_without_a_band(self):
        table = self.table()
        ax = plots.active_learning(table[table["seed"] < 2])
        assert not ax.collections
        np.testing.assert_allclose(ax.lines[2].get_ydata(), 2.0 / np.array([2, 4, 8]))

    def test_labels_needed_for_each_error(self):
        rows = [sampling.structures_needed(self.table(), level).assign(level=level) for level in (0.8, 0.01, 1.0)]
        ax = plots.labels_needed(pd.concat(rows))
        assert legend(ax) == ["committee", "random"]
        # sorted by the error, and the smallest is reached by nobody
        assert ax.lines[0].get_xdata().tolist() == [0.8, 1.0]
        assert ax.lines[0].get_ydata().tolist() == [rows[0]["mean"][0], rows[2]["mean"][0]]
        vertices = ax.collections[1].get_paths()[0].vertices
        assert vertices[:, 1].min() == rows[2]["lower"][1] < rows[2]["mean"][1]
        assert ax.get_xlim() == (1.0, 0.01)
        assert not plots.labels_needed(pd.concat(rows).assign(n_seeds=2)).collections

    def test_missing_columns(self):
        with pytest.raises(DataError, match="labels needed need columns level"):
            plots.labels_needed(self.table())
        with pytest.raises(DataError, match="active learning needs columns name, seed, n_labels and force_rmse"):
            plots.active_learning(pd.DataFrame())
