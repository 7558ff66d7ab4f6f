from __future__ import annotations

import logging
import os
import re
import subprocess
import sys
from dataclasses import replace

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from ase.build import molecule
from matplotlib.axes import Axes

from helpers import labelled
from tlmc import networks, plots, sampling
from tlmc.data import analysis
from tlmc.data.loading import load_dataset
from tlmc.data.splits import Split, split_dataset
from tlmc.descriptors.aev import AEVParameters, aev
from tlmc.descriptors.pairs import neighbours
from tlmc.errors import ConfigError, DataError
from tlmc.evaluation.metrics import evaluate, per_frame


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")


@pytest.fixture
def pair():
    return labelled.random_set(n_frames=20)


def texts(ax):
    return " | ".join(text.get_text() for text in ax.texts)


def legend(ax):
    return [text.get_text() for text in ax.get_legend().get_texts()]


def history(n=30):
    epochs = np.arange(1, n + 1)
    return pd.DataFrame(
        {"epoch": epochs, "lr": 1e-4 / epochs}
        | {
            f"{part}_{quantity}": scale / epochs
            for part in ("train", "validation")
            for quantity, scale in (("loss", 1.0), ("force_rmse_vector", 0.5), ("energy_rmse_per_atom", 0.02))
        }
    )


CALLS = {
    "parity_force": lambda labels, predicted, ax: plots.parity(
        np.concatenate(labels.forces), np.concatenate(predicted.forces), ax
    ),
    "parity_energy": lambda labels, predicted, ax: plots.parity(
        labels.energies / labels.n_atoms, predicted.energies / labels.n_atoms, ax, quantity="energy"
    ),
    "residual_histogram": lambda labels, predicted, ax: plots.residual_histogram(
        np.concatenate(predicted.forces) - np.concatenate(labels.forces), ax
    ),
    "learning_curve": lambda labels, predicted, ax: plots.learning_curve(history(), ax),
    "energy_histogram": lambda labels, predicted, ax: plots.energy_histogram(labels, ax),
    "force_histogram": lambda labels, predicted, ax: plots.force_histogram(labels, ax),
    "density_landscape": lambda labels, predicted, ax: plots.density_landscape(labels, ax),
    "descriptor_map": lambda labels, predicted, ax: plots.descriptor_map(analysis.descriptor_map(labels), ax),
    "outliers": lambda labels, predicted, ax: plots.outliers(labels, ax),
    "force_outliers": lambda labels, predicted, ax: plots.force_outliers(labels, ax),
    "neighbour_distances": lambda labels, predicted, ax: plots.neighbour_distances(
        analysis.nearest_neighbours(labels), ax
    ),
    "two_classes": lambda labels, predicted, ax: plots.two_classes([[0, 0], [1, 1]], [-1, 1], ax),
    "uncertainty_band": lambda labels, predicted, ax: plots.uncertainty_band([0, 1], [1, 2], [0.1, 0.2], ax),
    "error_against_size": lambda labels, predicted, ax: plots.error_against_size(
        pd.DataFrame({"learner": "a", "n_train": [10, 20], "force_rmse_vector": [0.4, 0.1]}), ax
    ),
    "effort": lambda labels, predicted, ax: plots.effort(
        pd.DataFrame({"estimator": "a", "n": [10, 20], "seconds": [0.1, 0.7]}), ax
    ),
    "calibration": lambda labels, predicted, ax: plots.calibration([0.1, -0.2], [0.2, 0.2], ax),
    "covariance_matrix": lambda labels, predicted, ax: plots.covariance_matrix(np.eye(4), ax, blocks=[2]),
    "atom_energies": lambda labels, predicted, ax: plots.atom_energies(np.ones((3, 2)), ["C", "H"], ax),
    "error_by_element": lambda labels, predicted, ax: plots.error_by_element(
        {"before": evaluate(labels, predicted)}, ax
    ),
    "drawn_energies": lambda labels, predicted, ax: plots.drawn_energies({"thesis": [0.1, 0.2, 0.4]}, ax),
    "committee_scan": lambda labels, predicted, ax: plots.committee_scan([1.0, 1.5], [[0, 1], [0, 2]], [1.1], ax),
    "reliability_diagram": lambda labels, predicted, ax: plots.reliability_diagram(
        {"as it is": sampling.reliability(labels.energies, np.ones(len(labels)))}, ax
    ),
    "spread_and_error": lambda labels, predicted, ax: plots.spread_and_error(
        {"as it is": sampling.error_against_spread(labels.energies, np.arange(1, len(labels) + 1))}, ax
    ),
    "active_learning": lambda labels, predicted, ax: plots.active_learning(
        pd.DataFrame({"name": "a", "seed": 0, "n_labels": [2, 4], "force_rmse_vector": [1.0, 0.5]}), ax
    ),
    "activations": lambda labels, predicted, ax: plots.activations(ax, slope=True),
    "descent_paths": lambda labels, predicted, ax: plots.descent_paths(
        lambda x, y: x**2 + 3 * y**2 + 0.1, {"gd": np.array([[1.0, 1.0], [0.5, 0.2], [0.1, 0.0]])}, ax
    ),
    "descent_losses": lambda labels, predicted, ax: plots.descent_losses({"gd": [1.0, 0.3, 0.01]}, ax),
    "gradients_over_depth": lambda labels, predicted, ax: plots.gradients_over_depth(
        {"tanh": networks.gradient_norms(4, 5, n_networks=1)}, ax
    ),
    "curve_fits": lambda labels, predicted, ax: plots.curve_fits(
        ([0, 90], [0.1, 0.2]), [0, 45, 90], {"small": [0.1, 0.2, 0.2]}, ax, truth=[0.1, 0.1, 0.2]
    ),
    "fit_histories": lambda labels, predicted, ax: plots.fit_histories(
        {"large": pd.DataFrame({"step": [0, 10, 20], "train_rmse": [1, 0.1, 0.01], "validation_rmse": [1, 0.2, 0.3]})},
        ax,
    ),
    "error_over_size": lambda labels, predicted, ax: plots.error_over_size(
        pd.DataFrame({"learner": ["a", "a", "b"], "n_train": [10, 40, 40], "force_rmse_vector": [0.3, 0.1, 0.2]}), ax
    ),
    "representation_map": lambda labels, predicted, ax: plots.representation_map(np.eye(2), ["H", "C"], ax),
    "spread_by_kind": lambda labels, predicted, ax: plots.spread_by_kind({"H": [0.1, 0.2], "C": [1.0]}, ax),
    "heat_map": lambda labels, predicted, ax: plots.heat_map(np.eye(3) - 0.1, ax, labels="HHC", log=True),
    "function_family": lambda labels, predicted, ax: plots.function_family(
        [0, 1], {"a": [0, 1], "b": [1, 0]}, ax, xlabel="distance (Å)", ylabel="value", limit=0.5
    ),
    "density_map": lambda labels, predicted, ax: plots.density_map(np.eye(4), 2.0, ax, atoms=[[1.0, 0.0]]),
    "invariance": lambda labels, predicted, ax: plots.invariance(
        pd.DataFrame({"rotation": [1e-16, 0.0], "permutation": [np.nan, 0.3]}, index=["SOAP", "raw"]), ax
    ),
    "speed_ratios": lambda labels, predicted, ax: plots.speed_ratios(
        pd.DataFrame({"descriptor": "SOAP", "quantity": ["values", "derivatives"], "atoms": 16, "ratio": [1, 9]}), ax
    ),
}


@pytest.mark.parametrize("name", CALLS)
class TestEveryFunction:
    def test_opens_a_figure_or_draws_into_the_given_axes(self, pair, name):
        opened = CALLS[name](*pair, None)
        assert isinstance(opened, Axes)
        assert opened.figure.get_figwidth() == pytest.approx(plots.COLUMN)
        given = plt.figure().subplots()
        assert CALLS[name](*pair, given) is given

    def test_axes_are_named_and_it_draws(self, pair, name):
        ax = CALLS[name](*pair, None)
        ax.figure.canvas.draw()
        assert ax.get_ylabel()
        assert ax.get_xlabel() or name == "error_by_element"
        physical = [
            label
            for label in (ax.get_xlabel(), ax.get_ylabel())
            if re.search(r"force RMSE|force err|\|F\||E/N|density|RMS", label)
        ]
        assert all(re.search(r"\((eV/Å|m?eV/atom|g/cm³)\)", label) for label in physical)

    def test_leaves_the_settings_alone(self, pair, name):
        before = dict(mpl.rcParams)
        ax = CALLS[name](*pair, None)
        assert dict(mpl.rcParams) == before
        # and the style holds when the figure is drawn later, outside it
        ax.figure.canvas.draw()
        assert {tick.label1.get_fontsize() for tick in ax.yaxis.get_major_ticks()} == {7.0}


@pytest.mark.slow
def test_figures_after_the_first_are_shown_too(tmp_path):
    # a notebook's backend turns interactive mode on when it is loaded, which is when the first figure opens
    (tmp_path / "eager.py").write_text(
        "import matplotlib\nfrom matplotlib.backends.backend_agg import *\nmatplotlib.interactive(True)\n"
    )
    code = "import matplotlib; from tlmc import plots; plots.subplots(); print(matplotlib.is_interactive())"
    environment = os.environ | {"MPLBACKEND": "module://eager", "PYTHONPATH": str(tmp_path)}
    answer = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert answer.stdout == "True\n"


class TestParity:
    def test_rmse_is_that_of_vectors(self):
        labels = np.array([[1.0, 0, 0], [0, 2.0, 0]])
        # same lengths, turned by 90 degrees: |F| agrees, the vectors do not
        ax = plots.parity(labels, np.roll(labels, 1, axis=1))
        assert f"RMSE {np.sqrt((2 + 8) / 2):.3f} eV/Å (vector)" in texts(ax)
        np.testing.assert_allclose(sorted(ax.collections[0].get_offsets().tolist()), [[1, 1], [2, 2]])

    def test_energy_rmse_in_mev(self):
        ax = plots.parity([-5.0, -5.1], [-5.003, -5.103], quantity="energy", note="as it is")
        assert texts(ax) == "RMSE 3.00 meV/atom\nas it is"

    def test_component_rmse(self):
        ax = plots.parity(np.zeros((2, 3)), np.full((2, 3), 0.5), quantity="force_component")
        assert "RMSE 0.500 eV/Å (component)" in texts(ax)

    def test_diagonal_spans_equal_axes(self, pair):
        ax = CALLS["parity_energy"](*pair, None)
        assert ax.get_xlim() == ax.get_ylim()
        line = ax.lines[0]
        np.testing.assert_array_equal(line.get_xdata(), line.get_ydata())
        np.testing.assert_array_equal(line.get_xdata(), ax.get_xlim())

    def test_all_points_lie_inside(self, pair):
        ax = CALLS["parity_force"](*pair, None)
        points = ax.collections[0].get_offsets()
        assert len(points) == pair[0].n_atoms.sum()
        assert points.min() >= ax.get_xlim()[0]
        assert points.max() <= ax.get_xlim()[1]

    def test_colour_counts_neighbours(self):
        x = np.array([0.0, 0.001, 0.002, 1.0])
        ax = plots.parity(x, x, quantity="energy")
        assert sorted(ax.collections[0].get_array().tolist()) == [1, 3, 3, 3]

    def test_many_points_become_hexagons_that_hold_all_of_them(self):
        rng = np.random.default_rng(0)
        labels = rng.normal(size=(5000, 3))
        ax = plots.parity(labels, labels + 0.1 * rng.normal(size=(5000, 3)))
        counts = ax.collections[0].get_array()
        assert counts.sum() == 5000
        assert len(counts) < 5000
        assert ax.collections[0].norm.vmin == 1

    def test_text_goes_where_points_are_not(self):
        labels = np.linspace(0, 1, 50)
        low = plots.parity(labels, labels - 3, quantity="energy")
        high = plots.parity(labels, labels + 3, quantity="energy")
        assert low.texts[0].get_verticalalignment() == "top"
        assert high.texts[0].get_verticalalignment() == "bottom"

    @pytest.mark.parametrize("n", [1, 2, 4000])
    def test_points_that_coincide(self, n):
        ax = plots.parity(np.full(n, -5.0), np.full(n, -5.0), quantity="energy")
        ax.figure.canvas.draw()
        assert "RMSE 0.00 meV/atom" in texts(ax)

    @pytest.mark.parametrize(
        ("labels", "predictions", "quantity"),
        [
            (np.zeros((2, 3)), np.zeros((3, 3)), "force"),
            (np.zeros(6), np.zeros(6), "force"),
            (np.zeros(0), np.zeros(0), "energy"),
            (np.zeros((0, 3)), np.zeros((0, 3)), "force"),
            (np.zeros(2), np.zeros(3), "energy"),
        ],
    )
    def test_shapes(self, labels, predictions, quantity):
        with pytest.raises(DataError, match=f"parity of {quantity} needs labels and predictions of"):
            plots.parity(labels, predictions, quantity=quantity)


class TestParityGrid:
    def test_panels(self, pair):
        labels, after = pair
        before = after._replace(energies=after.energies - 1000 * labels.n_atoms)
        figure = plots.parity_grid(labels, before, after)
        panels = figure.axes[:4]
        metrics = evaluate(labels, after)
        assert [ax.get_title() for ax in panels[:2]] == ["before fine-tuning", "after fine-tuning"]
        assert f"RMSE {metrics['force_rmse_vector'].value:.3f} eV/Å" in texts(panels[1])
        assert "eV/atom removed" in texts(panels[2])
        assert "offset −1000 eV/atom" in texts(panels[2])
        assert f"RMSE {1000 * metrics['energy_rmse_per_atom_centred'].value:.1f} meV/atom" in texts(panels[2])
        assert "offset" not in texts(panels[3])
        assert panels[0].get_xlim() == panels[1].get_xlim() == panels[1].get_ylim()
        assert panels[2].get_xlim() == panels[3].get_ylim()
        assert panels[0].collections[0].get_clim() == panels[1].collections[0].get_clim()
        figure.canvas.draw()

    def test_offset_may_stay(self, pair):
        labels, after = pair
        before = after._replace(energies=after.energies + 0.3 * labels.n_atoms)
        panels = plots.parity_grid(labels, before, after, remove_offset=False, titles=("ANI-2x", "short")).axes
        assert "removed" not in texts(panels[2])
        expected = 1000 * evaluate(labels, before)["energy_rmse_per_atom"].value
        assert f"RMSE {expected:.0f} meV/atom" in texts(panels[2])
        assert panels[0].get_title() == "ANI-2x"

    @pytest.mark.needs_mirror
    def test_public_data(self):
        crystal = load_dataset("molcrys-mace/23_succinic_acid")
        rng = np.random.default_rng(0)
        noisy = labelled.predictions(
            crystal.energies + 0.002 * crystal.n_atoms * rng.normal(size=len(crystal)),
            [force + 0.03 * rng.normal(size=force.shape) for force in crystal.forces],
        )
        panels = plots.parity_grid(crystal, noisy, noisy).axes
        # more atoms than markers could show, fewer frames than that
        assert panels[0].collections[0].get_array().sum() == crystal.n_atoms.sum() > 10_000
        assert len(panels[2].collections[0].get_offsets()) == len(crystal)
        assert "RMSE 0.052 eV/Å (vector)" in texts(panels[1])


class TestResiduals:
    def test_counts_and_legend(self):
        rng = np.random.default_rng(0)
        sets = {"before": rng.normal(size=400), "after": 0.1 * rng.normal(size=400)}
        ax = plots.residual_histogram(sets, bins=11)
        assert ax.get_yscale() == "log"
        assert legend(ax) == [f"{name}: RMSE {np.sqrt((part**2).mean()):.3g} eV/Å" for name, part in sets.items()]
        span = max(np.abs(part).max() for part in sets.values())
        outline = ax.patches[0].get_xy()
        assert outline[:, 0].min() == pytest.approx(-span)
        assert outline[:, 1].max() == np.histogram(sets["before"], 11, (-span, span))[0].max()

    def test_energies_in_mev(self):
        ax = plots.residual_histogram([0.001, -0.001], quantity="energy")
        assert legend(ax) == ["RMSE 1.00 meV/atom"]
        assert ax.get_ylabel() == "frames"

    def test_no_error_at_all(self):
        plots.residual_histogram(np.zeros(5)).figure.canvas.draw()

    @pytest.mark.parametrize("values", [[], [0.1, np.nan]])
    def test_bad_values(self, values):
        with pytest.raises(DataError, match="residuals 'after' must be finite numbers"):
            plots.residual_histogram({"after": values})


class TestLearningCurves:
    def test_values_and_units(self):
        table = history()
        ax = plots.learning_curve(table, quantity="energy_rmse_per_atom", best_epoch=7)
        np.testing.assert_allclose(ax.lines[1].get_ydata(), 1000 * table["validation_energy_rmse_per_atom"])
        assert legend(ax) == ["train", "validation", "best, epoch 7"]
        assert ax.get_yscale() == "log"

    def test_four_panels(self):
        figure = plots.learning_curves(history(), best_epoch=3)
        assert [ax.get_ylabel() for ax in figure.axes] == [
            "loss",
            "force RMSE, vector (eV/Å)",
            "energy RMSE (meV/atom)",
            "learning rate",
        ]
        assert [len(ax.lines) for ax in figure.axes] == [3, 3, 3, 1]
        figure.canvas.draw()

    @pytest.mark.parametrize("n", [1, 2, 6, 30, 5000])
    def test_ticks_are_plain_numbers(self, n):
        ax = plots.learning_curve(history(n))
        ax.figure.canvas.draw()
        lower, upper = ax.get_ylim()
        drawn = [
            tick.label1.get_text()
            for tick in ax.yaxis.get_major_ticks()
            if lower <= tick.get_loc() <= upper and tick.label1.get_text()
        ]
        assert 1 <= len(drawn) <= 10
        for text in drawn:
            assert lower * 0.999 <= float(text.replace("−", "-")) <= upper * 1.001

    def test_a_rate_that_ends_at_zero_and_a_loss_that_diverged(self):
        table = history(10)
        table.loc[9, "lr"] = 0.0
        table.loc[5:, ["train_loss", "validation_loss"]] = np.nan
        plots.learning_curves(table).canvas.draw()
        table[["train_loss", "validation_loss"]] = np.nan
        plots.learning_curve(table).figure.canvas.draw()

    def test_missing_columns(self):
        with pytest.raises(
            DataError, match="curve of loss needs columns epoch and train_loss or validation_loss, got 3"
        ):
            plots.learning_curve(history(3)[["epoch", "lr"]])
        with pytest.raises(DataError, match="got 0 rows"):
            plots.learning_curve(history().iloc[:0], quantity="lr")


class TestDistributions:
    def test_energy_groups_stack_to_all_frames(self, pair):
        ax = plots.energy_histogram(pair[0], groups=[i % 3 for i in range(20)])
        assert legend(ax) == ["0 (7)", "1 (7)", "2 (6)"]
        tops = {}
        for patch in ax.patches:
            tops[round(patch.get_x(), 9)] = tops.get(round(patch.get_x(), 9), 0) + patch.get_height()
        assert sum(tops.values()) == 20

    def test_groups_in_the_order_of_numbers(self, pair):
        groups = [[2, 10, 9][i % 3] for i in range(20)]
        assert [name.split()[0] for name in legend(plots.energy_histogram(pair[0], groups=groups))] == ["2", "9", "10"]

    def test_more_groups_than_colours(self, pair):
        ax = plots.energy_histogram(pair[0], groups=range(20))
        faces = [handle[0].get_facecolor() for handle in ax.containers]
        assert len(set(faces)) == 20

    def test_groups_of_wrong_length(self, pair):
        with pytest.raises(DataError, match="toy: 20 frames, but groups for 3"):
            plots.density_landscape(pair[0], groups=[1, 2, 3])

    def test_force_elements(self, pair):
        ax = plots.force_histogram(pair[0])
        assert sorted(legend(ax)) == ["C", "H", "O"]
        assert sum(patch.get_height() for patch in ax.patches) == pair[0].n_atoms.sum()
        assert plots.force_histogram(pair[0], log=True).get_yscale() == "log"

    def test_density(self):
        labels = labelled.dataset(["H2O"], [-12.0], [np.zeros((3, 3))])
        ax = plots.density_landscape(labels)
        # 18.015 u in 4.5 x 6 x 6 A^3
        np.testing.assert_allclose(ax.collections[0].get_offsets().tolist(), [[18.015 * 1.66054 / 162, 0]], rtol=1e-4)

    def test_groups_without_a_crystal_are_not_named(self, pair):
        labels = pair[0]
        boxed = labels.frames[0].copy()
        boxed.set_cell([40, 40, 40])
        mixed = replace(labels, frames=(boxed, *labels.frames[1:]))
        groups = ["box", *["cell"] * (len(labels) - 1)]
        assert legend(plots.density_landscape(mixed, groups=groups)) == ["cell"]

    def test_density_of_molecules(self):
        labels = labelled.dataset(["H2O"], [-12.0], [np.zeros((3, 3))])
        labels.frames[0].pbc = False
        with pytest.raises(DataError, match="toy: none of 1 frames is a crystal"):
            plots.density_landscape(labels)


class TestDescriptorMap:
    mapped = analysis.DescriptorMap(np.arange(12.0).reshape(6, 2), np.array([0.7, 0.2]), np.zeros(6))

    def test_names_groups_and_parts(self):
        split = Split(
            train=np.array([0, 1, 2]), validation=np.array([3]), test=np.array([4, 5]), method="random", seed=0
        )
        ax = plots.descriptor_map(self.mapped, groups=list("abbaab"), split=split)
        assert legend(ax) == ["a", "b", "train", "validation", "test"]
        assert ax.get_xlabel() == "component 1 (70 % of the variance)"
        drawn = np.concatenate([np.asarray(points.get_offsets()) for points in ax.collections])
        drawn = drawn[~np.isnan(drawn).any(axis=1)]
        np.testing.assert_array_equal(np.sort(drawn, axis=0), self.mapped.scores)

    def test_without_groups_there_is_no_legend(self):
        assert plots.descriptor_map(self.mapped).get_legend() is None


class TestSetsOverview:
    def test_a_row_for_each_set_without_its_molecules(self, pair):
        labels, _ = pair
        figure = plots.sets_overview([labels, labels])
        assert len(figure.axes) == 6
        assert [ax.get_title(loc="left") for ax in figure.axes[::3]] == [labels.name] * 2
        landscape = figure.axes[2]
        assert sum(len(points.get_offsets()) for points in landscape.collections) == labels.is_crystal.sum()

    def test_a_set_of_molecules_is_refused(self):
        with pytest.raises(DataError, match="none of 9 frames is a crystal"):
            plots.sets_overview([load_dataset("ethanol").subset(range(9))])
        with pytest.raises(DataError, match="needs at least one set"):
            plots.sets_overview([])

    def test_coverage_has_a_panel_for_each_set_with_all_its_frames(self):
        crystals = load_dataset("33-like").subset(range(0, 140, 10))
        split = split_dataset(crystals, seed=0)
        mapped = analysis.descriptor_map(crystals, fitted_on=split.train)
        figure = plots.sets_coverage([crystals] * 4, [mapped] * 4, [split] * 4)
        assert [ax.get_title(loc="left") for ax in figure.axes[:4]] == [crystals.name] * 4
        drawn = np.concatenate([points.get_offsets() for points in figure.axes[3].collections])
        np.testing.assert_array_equal(np.sort(drawn, axis=0), np.sort(mapped.scores, axis=0))
        assert legend(figure.axes[2]) == ["train", "validation", "test"]
        with pytest.raises(DataError, match="got 2 sets, 1 maps, 2 splits"):
            plots.sets_coverage([crystals] * 2, [mapped], [split] * 2)


class TestOutliers:
    def test_names_frames_beyond_the_bound(self):
        forces = [np.full((3, 3), 0.1 + 0.001 * i) for i in range(40)]
        forces[11] = np.full((3, 3), 9.0)
        labels = labelled.dataset(["H2O"] * 40, [-12.0] * 40, forces, frame_numbers=np.arange(100, 140))
        ax = plots.outliers(labels)
        assert texts(ax) == "111"
        rms = np.sqrt(3) * np.array([force[0, 0] for force in forces])
        assert ax.lines[1].get_ydata()[0] == pytest.approx(rms.mean() + 5 * rms.std())
        assert legend(ax) == ["mean", "mean + 5 sd"]
        assert texts(plots.outliers(labels, n_sd=50.0)) == ""

    def test_table(self, pair):
        ax = plots.outliers(per_frame(*pair), column="force_max_error", n_sd=1)
        assert ax.get_ylabel() == "largest force error (eV/Å)"
        assert ax.texts

    def test_missing_column(self, pair):
        with pytest.raises(DataError, match="outliers need columns frame and force, got 20 rows of frame, n_atoms"):
            plots.outliers(per_frame(*pair), column="force")


class TestForceOutliers:
    def test_marks_what_the_analysis_finds(self, pair):
        labels = pair[0]
        found = analysis.outliers(labels, n_sd=2).query("quantity == 'force'")
        assert len(found) > found["frame"].nunique() > 1
        ax = plots.force_outliers(labels, n_sd=2)
        points, marked = (collection.get_offsets() for collection in ax.collections)
        assert len(points) + len(marked) == labels.n_atoms.sum()
        np.testing.assert_allclose(np.sort(marked[:, 1]), np.sort(found["value"]))
        assert {text.get_text() for text in ax.texts} == set(found["frame"].astype(str))
        assert ax.lines[1].get_ydata()[0] == pytest.approx(found["threshold"].iloc[0])

    def test_names_the_worst_only(self, pair):
        worst = analysis.outliers(pair[0], n_sd=2).query("quantity == 'force'")["frame"].iloc[0]
        assert texts(plots.force_outliers(pair[0], n_sd=2, n_named=1)) == str(worst)

    def test_frames_are_those_of_the_file(self, pair):
        ax = plots.force_outliers(pair[0].subset([3, 19]), n_sd=50)
        assert set(ax.collections[0].get_offsets()[:, 0]) == {3, 19}
        assert texts(ax) == ""


class TestNeighbourDistances:
    def test_water(self):
        table = analysis.nearest_neighbours(labelled.random_set(n_frames=2, formulas=("H2O",))[0])
        ax = plots.neighbour_distances(table)
        assert [label.get_text() for label in ax.get_yticklabels()] == ["H to H", "H to O", "O to H", "O to O"]
        drawn = {line.get_label(): line.get_xdata() for line in ax.lines}
        np.testing.assert_allclose(drawn["shortest"], table["shortest"])
        np.testing.assert_allclose(drawn["sum of covalent radii"], [0.62, 0.97, 0.97, 1.32])

    def test_grows_with_the_pairs(self, pair):
        table = analysis.nearest_neighbours(pair[0])
        few, many = (plots.neighbour_distances(part).figure.get_figheight() for part in (table[:2], table))
        assert few < many

    def test_bad_tables(self, pair):
        table = analysis.nearest_neighbours(pair[0])
        with pytest.raises(DataError, match="got 0 rows of element"):
            plots.neighbour_distances(table[:0])
        with pytest.raises(DataError, match="neighbour distances need columns element, neighbour, shortest"):
            plots.neighbour_distances(table.drop(columns="sd"))


class TestSplitCoverage:
    def test_every_frame_and_force_is_in_its_part(self, pair):
        labels = pair[0]
        split = Split(np.arange(14), np.arange(14, 16), np.arange(16, 20), "blocks", 0)
        left, right = plots.split_coverage(labels, split).axes
        parts = (split.train, split.validation, split.test)
        energies = 1000 * analysis.relative_energies(labels)
        for place, (part, points, curve) in enumerate(zip(parts, left.collections, right.lines[::2], strict=True)):
            offsets = points.get_offsets()
            np.testing.assert_allclose(offsets[:, 0], energies[part])
            assert set(offsets[:, 1].round()) == {place}
            x, y = curve.get_data()
            assert x[-1] == pytest.approx(max(np.linalg.norm(labels.forces[k], axis=1).max() for k in part))
            assert (y[0], y[-1]) == pytest.approx((1, 1 / labels.n_atoms[part].sum()))
        assert [label.get_text() for label in left.get_yticklabels()] == ["train\n(14)", "validation\n(2)", "test\n(4)"]
        assert legend(right) == ["train", "validation", "test"]


class TestElements:
    def test_bars(self, pair):
        metrics = evaluate(*pair)
        ax = plots.error_by_element({"before": metrics, "after": metrics})
        assert [label.get_text() for label in ax.get_xticklabels()] == ["C", "H", "O"]
        heights = [bar.get_height() for bar in ax.containers[0]]
        assert heights == [metrics[f"force_rmse_vector_{element}"].value for element in "CHO"]
        assert legend(ax) == ["before", "after"]

    def test_no_elements(self):
        with pytest.raises(DataError, match="no force_rmse_vector_<element> in the metrics of before"):
            plots.error_by_element({"before": {}})


class TestValidationCurves:
    def test_a_line_per_run_and_a_colour_per_name(self):
        runs = {"short": [history(), history(10)], "thesis": [history(20)]}
        ax = plots.validation_curves(runs)
        assert legend(ax) == ["short", "thesis"]
        assert [len(line.get_xdata()) for line in ax.lines] == [30, 10, 20]
        colours = [line.get_color() for line in ax.lines]
        assert colours[0] == colours[1] != colours[2]
        assert (ax.get_yscale(), ax.get_ylabel()) == ("log", "force RMSE, vector (eV/Å)")

    def test_energies_are_in_mev(self):
        ax = plots.validation_curves({"short": [history()]}, quantity="energy_rmse_per_atom")
        np.testing.assert_allclose(ax.lines[0].get_ydata(), 20 / np.arange(1, 31))

    def test_a_training_that_diverged(self):
        table = history(20)
        table["validation_force_rmse_vector"] = np.nan
        plots.validation_curves({"short": [table]}).figure.canvas.draw()

    def test_missing_columns(self):
        with pytest.raises(DataError, match="curves of short need columns epoch and validation_force_rmse_vector, got"):
            plots.validation_curves({"short": [history()[["epoch", "lr"]]]})
        with pytest.raises(DataError, match="at least one run, got none"):
            plots.validation_curves({})


class TestErrorAgainstTime:
    def table(self):
        rows = [
            {"setting": name, "seed": seed, "epoch": epoch, "cpu_seconds": 2.0 * epoch + seed,
             "validation_force_rmse_vector": 0.3 / epoch, "validation_energy_rmse_per_atom": 0.01 / epoch}
            for name in ("plain", "ridge") for seed in (0, 1) for epoch in (1, 2, 3)
        ]  # fmt: skip
        return pd.DataFrame(rows)

    def test_a_line_per_setting_and_a_point_per_seed(self):
        ax = plots.error_against_time(self.table(), quantity="energy_rmse_per_atom")
        assert legend(ax) == ["plain", "ridge"]
        assert [len(line.get_xdata()) for line in ax.lines] == [3, 2] * 2
        np.testing.assert_allclose(ax.lines[2].get_xdata(), np.sqrt([2.0 * 3.0, 4.0 * 5.0, 6.0 * 7.0]))
        np.testing.assert_allclose(ax.lines[3].get_xdata(), [6.0, 7.0])
        np.testing.assert_allclose(ax.lines[3].get_ydata(), [10.0 / 3] * 2)
        assert (ax.get_xscale(), ax.get_ylabel()) == ("log", "validation energy RMSE (meV/atom)")

    def test_missing_columns(self):
        with pytest.raises(DataError, match="error against time needs columns"):
            plots.error_against_time(self.table().drop(columns="cpu_seconds"))

    def test_a_column_of_panels_per_data_set(self):
        tables = [self.table().assign(dataset=name) for name in ("molcrys-mace/urea", "ammonia")]
        figure = plots.error_against_time_panels(pd.concat(tables))
        assert [ax.get_title() for ax in figure.axes] == ["urea", "ammonia", "", ""]
        assert [ax.get_ylabel() for ax in figure.axes[::2]] == [
            "validation force RMSE, vector (eV/Å)",
            "validation energy RMSE (meV/atom)",
        ]
        assert [ax.get_legend() is not None for ax in figure.axes] == [False, True, False, False]
        assert legend(figure.axes[1]) == ["plain", "ridge"]
        with pytest.raises(DataError, match="needs columns dataset and setting, got 0 rows"):
            plots.error_against_time_panels(tables[0].iloc[:0])


class TestErrorAgainstForce:
    def test_points_are_the_frames(self, pair):
        table = per_frame(*pair)
        ax = plots.error_against_force({"start": table, "short": table[:5]})
        assert legend(ax) == ["start", "short"]
        drawn, few = (collection.get_offsets() for collection in ax.collections)
        np.testing.assert_allclose(drawn, table[["force_rms", "force_rmse_vector"]])
        assert len(few) == 5
        np.testing.assert_array_equal(ax.lines[0].get_xdata(), ax.lines[0].get_ydata())
        assert (ax.get_xscale(), ax.get_yscale()) == ("log", "log")

    def test_bad_tables(self, pair):
        with pytest.raises(DataError, match="short: errors against forces need columns force_rms"):
            plots.error_against_force({"short": per_frame(*pair).drop(columns="force_rms")})
        with pytest.raises(DataError, match="at least one table, got none"):
            plots.error_against_force({})


class TestEnergyVolume:
    def test_curves_minima_and_points_in_range(self):
        ax = plots.energy_volume(
            [9.0, 10.0, 11.0], {"start": [1, 0, 2], "short": [3, 1, 0]}, points=([8.0, 10.5], [0.1, 0.2])
        )
        assert legend(ax) == ["labelled frames", "start", "short"]
        assert ax.collections[0].get_offsets().tolist() == [[10.5, 0.2]]
        assert [line.get_xdata()[0] for line in ax.lines if line.get_marker() == "D"] == [10.0, 11.0]
        assert ax.get_ylim() == pytest.approx((-0.6, 6.0))

    def test_shapes(self):
        with pytest.raises(DataError, match=r"need \(3,\) energies each, got {'start': \(2,\)}"):
            plots.energy_volume([9.0, 10.0, 11.0], {"start": [1.0, 2.0]})
        with pytest.raises(DataError, match="got none"):
            plots.energy_volume([9.0], {})


class TestEnvironmentVector:
    PARAMETERS = AEVParameters(5.2, 16.0, tuple(np.linspace(0.9, 4.9, 16)), 3.5, 8.0, 32.0, (0.9, 2.2), tuple(range(8)))

    def vector(self, centre):
        frame = molecule("CH3OH")
        kinds = torch.tensor(["HCO".index(symbol) for symbol in frame.get_chemical_symbols()])
        pairs = neighbours(frame, self.PARAMETERS.r_cut_radial)
        return aev(self.PARAMETERS, 3, kinds, pairs)[centre].numpy()

    def test_shows_every_number_of_the_elements_that_are_near(self):
        vector = self.vector(0)
        left, right, _ = plots.environment_vector(vector, self.PARAMETERS, "HCO").axes
        # the carbon atom has neighbours H and O, no C
        assert legend(left) == ["H", "O", "cutoff"]
        np.testing.assert_allclose(left.lines[0].get_ydata(), vector[:16])
        assert [label.get_text() for label in right.get_yticklabels()] == ["H, H", "H, O"]
        image = np.asarray(right.images[0].get_array())
        assert image.shape == (4, 8)
        assert image.sum() == pytest.approx(vector[48:].sum())

    def test_an_atom_with_one_neighbour_has_no_angles(self):
        vector = np.zeros(self.PARAMETERS.length(3))
        vector[3] = 0.2
        _, right = plots.environment_vector(vector, self.PARAMETERS, "HCO").axes
        assert not right.images

    def test_wrong_vectors(self):
        with pytest.raises(DataError, match=r"3 elements has 144 numbers, not all zero; got shape \(5,\), 5 of them"):
            plots.environment_vector(np.ones(5), self.PARAMETERS, "HCO")
        with pytest.raises(DataError, match=r"got shape \(144,\), 0 of them not zero"):
            plots.environment_vector(np.zeros(144), self.PARAMETERS, "HCO")


class TestSave:
    @pytest.mark.slow
    def test_files_are_under_the_reports_and_reproducible(self, pair, tmp_path, monkeypatch, caplog):
        caplog.set_level(logging.WARNING)
        written = []
        for folder in ("one", "two"):
            monkeypatch.setenv("TLMC_REPORTS_DIR", str(tmp_path / folder))
            figure = plots.parity_grid(pair[0], pair[1], pair[1])
            paths = plots.save_figure(figure, "parity", ["png", "pdf", "svg"])
            assert paths == [tmp_path / folder / "figures" / f"parity.{ending}" for ending in ("png", "pdf", "svg")]
            written.append([path.read_bytes() for path in paths])
        assert written[0] == written[1]
        assert written[0][0].startswith(b"\x89PNG")
        assert written[0][1].startswith(b"%PDF")
        assert not caplog.records

    def test_resolution(self, pair, tmp_path, monkeypatch):
        monkeypatch.setenv("TLMC_REPORTS_DIR", str(tmp_path))
        path = plots.save_figure(plots.force_histogram(pair[0]).figure, "forces", ["png"])[0]
        assert plt.imread(path).shape[1] == round(plots.COLUMN * 300)

    @pytest.mark.parametrize("name", ["", "a/b", "../x", ".hidden"])
    def test_name(self, name):
        with pytest.raises(ConfigError, match="figure name"):
            plots.save_figure(plt.figure(), name)

    def test_format(self, tmp_path, monkeypatch):
        monkeypatch.setenv("TLMC_REPORTS_DIR", str(tmp_path))
        with pytest.raises(ConfigError, match="unknown figure format docx: choose from .*png"):
            plots.save_figure(plt.figure(), "x", ["png", "docx"])
        assert not list(tmp_path.rglob("*.png"))


def test_palette_is_apart_for_colour_blind_readers():
    """Every two of the first four colours differ in lightness or in blue-yellow, which all dichromats see."""
    colours = np.array([mpl.colors.to_rgb(colour) for colour in plots.PALETTE[:4]])
    lightness = colours @ [0.2126, 0.7152, 0.0722]
    blue_yellow = colours[:, 2] - colours[:, :2].mean(axis=1)
    for i in range(4):
        for j in range(i):
            assert abs(lightness[i] - lightness[j]) + abs(blue_yellow[i] - blue_yellow[j]) > 0.15


class TestNetworks:
    def test_slopes_are_drawn_with_the_activations(self):
        ax = plots.activations(slope=True)
        lines = {line.get_label(): line for line in ax.lines}
        assert set(lines) == {"relu", "tanh", "softplus", "celu"}
        z, slope = lines["tanh"].get_data()
        np.testing.assert_allclose(slope, 1 - np.tanh(z) ** 2, atol=1e-12)

    def test_paths_begin_together_and_end_marked(self):
        paths = {name: np.array([[1.0, 1.0], [0.5, k]]) for k, name in enumerate(("gd", "adam"))}
        ax = plots.descent_paths(lambda x, y: x**2 + y**2 + 1, paths)
        assert legend(ax) == ["gd", "adam"]
        points = [tuple(np.ravel(line.get_data())) for line in ax.lines if len(line.get_xdata()) == 1]
        assert points == [(0.5, 0.0), (0.5, 1.0), (1.0, 1.0)]

    def test_paths_of_another_shape_are_named(self):
        with pytest.raises(DataError, match=r"path of gd must have shape \(n_steps \+ 1, 2\), got \(3,\)"):
            plots.descent_paths(lambda x, y: x, {"gd": np.zeros(3)})

    def test_errors_over_size_have_geometric_means_and_bands(self):
        table = pd.DataFrame(
            {
                "learner": "net",
                "n_train": [10, 10, 40],
                "seed": [0, 1, 0],
                "energy_rmse_per_atom": [0.001, 0.004, 0.001],
            }
        )
        ax = plots.error_over_size(table, quantity="energy_rmse_per_atom")
        np.testing.assert_allclose(ax.lines[0].get_ydata(), [2.0, 1.0])
        assert ax.get_ylabel() == "test energy RMSE (meV/atom)"
        assert [text.get_text() for text in ax.get_xticklabels()] == ["10", "40"]

    def test_lowest_validation_error_is_marked(self):
        history = pd.DataFrame({"step": [0, 10, 20], "train_rmse": [1, 0.1, 0.01], "validation_rmse": [1, 0.2, 0.3]})
        ax = plots.fit_histories({"large": history})
        [marked] = [line for line in ax.lines if line.get_marker() == "o"]
        assert (marked.get_xdata()[0], marked.get_ydata()[0]) == (10, 200)

    def test_means_are_drawn_for_each_kind(self):
        ax = plots.spread_by_kind({"H": [0.1, 0.3], "C": [1.0]})
        assert [line.get_xdata()[0] for line in ax.lines] == [pytest.approx(0.2), 1.0]
        assert [text.get_text() for text in ax.get_yticklabels()] == ["H", "C"]

    @pytest.mark.parametrize(
        ("draw", "sentence"),
        [
            (lambda: plots.descent_paths(lambda x, y: x, {}), "no path to draw"),
            (lambda: plots.descent_losses({}), "no loss to draw"),
            (lambda: plots.gradients_over_depth({}), "no gradients to draw"),
            (lambda: plots.fit_histories({}), "no fits to draw"),
            (lambda: plots.error_over_size(pd.DataFrame()), "errors over size need columns"),
            (lambda: plots.representation_map(np.eye(2), ["H"]), r"needs points of shape \(1, 2\), got \(2, 2\)"),
            (lambda: plots.spread_by_kind({"H": []}), "each kind needs a value, got {'H': 0}"),
        ],
    )
    def test_nothing_to_draw_is_said(self, draw, sentence):
        with pytest.raises(DataError, match=sentence):
            draw()


def test_a_heat_map_names_runs_of_equal_atoms_once_and_wants_a_name_for_each():
    ax = plots.heat_map(np.eye(5), labels=["H", "H", "C", "H", "H"])
    assert [tick.get_text() for tick in ax.get_xticklabels()] == ["H", "C", "H"]
    assert list(ax.get_xticks()) == [0.5, 2.0, 3.5]
    with pytest.raises(DataError, match=r"2 labels need a square matrix of that size, got shape \(3, 3\)"):
        plots.heat_map(np.eye(3), labels=["H", "H"])


def test_invariance_draws_no_change_at_the_left_edge():
    ax = plots.invariance(pd.DataFrame({"rotation": [0.0, 1e-3]}, index=["a", "b"]))
    assert list(ax.lines[0].get_xdata()) == [1e-17, 1e-3]
    assert [tick.get_text() for tick in ax.get_yticklabels()] == ["a", "b"]
