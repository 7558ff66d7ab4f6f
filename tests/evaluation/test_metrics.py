from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from helpers import labelled
from tlmc.data.loading import load_dataset
from tlmc.errors import ConfigError, DataError
from tlmc.evaluation.metrics import by_force_range, by_kind, correlation, evaluate, frame_force_rms, per_frame

numbers = st.floats(-50, 50).map(lambda x: round(x, 6))


@st.composite
def sets(draw):
    """Labels and predictions of a few small frames."""
    formulas = draw(st.lists(st.sampled_from(["H", "OH", "H2O", "CH4"]), min_size=1, max_size=5))
    sizes = {"H": 1, "OH": 2, "H2O": 3, "CH4": 5}
    shapes = [(sizes[formula], 3) for formula in formulas]
    energies, forces = (
        [draw(arrays(np.float64, len(formulas), elements=numbers)) for _ in range(2)],
        [[draw(arrays(np.float64, shape, elements=numbers)) for shape in shapes] for _ in range(2)],
    )
    return labelled.dataset(formulas, energies[0], forces[0]), labelled.predictions(energies[1], forces[1])


@pytest.fixture
def by_hand():
    """Errors: energies +0.2 eV on 2 atoms and -0.9 eV on 3; forces as in the comments."""
    labels = labelled.dataset(
        ["OH", "HOH"],
        [-10.0, -12.0],
        [[[1, 0, 0], [-1, 0, 0]], [[0, 3, 0], [0, -3, 0], [0, 0, 0]]],
        frame_numbers=[4, 17],
    )
    predicted = labelled.predictions(
        [-9.8, -12.9],
        [
            [[1, 0, 0], [-1, 0.3, 0.4]],  # O exact, H off by 0.5
            [[0, 3, 0], [0, -4, 0], [2, 0, 0]],  # H exact, O off by 1, H off by 2
        ],
    )
    return labels, predicted


class TestByHand:
    def test_energy(self, by_hand):
        metrics = evaluate(*by_hand)
        # per atom: +0.1 and -0.3; about their mean of -0.1: +0.2 and -0.2
        assert metrics["energy_rmse_per_atom"].value == pytest.approx(math.sqrt(0.05))
        assert metrics["energy_mae_per_atom"].value == pytest.approx(0.2)
        assert metrics["energy_max_error_per_atom"].value == pytest.approx(0.3)
        assert metrics["energy_rmse_per_atom_centred"].value == pytest.approx(0.2)

    def test_force(self, by_hand):
        metrics = evaluate(*by_hand)
        assert metrics["force_rmse_vector"].value == pytest.approx(math.sqrt((0.25 + 1 + 4) / 5))
        assert metrics["force_rmse_component"].value == pytest.approx(math.sqrt((0.25 + 1 + 4) / 15))
        assert metrics["force_mae_component"].value == pytest.approx((0.3 + 0.4 + 1 + 2) / 15)
        assert metrics["force_max_error"].value == pytest.approx(2.0)

    def test_elements(self, by_hand):
        metrics = evaluate(*by_hand)
        assert metrics["force_rmse_vector_O"].value == pytest.approx(math.sqrt(1 / 2))
        assert metrics["force_rmse_vector_H"].value == pytest.approx(math.sqrt(4.25 / 3))
        assert {name for name in metrics if name.startswith("force_rmse_vector_") and name[-1] in "HO"} == {
            "force_rmse_vector_O",
            "force_rmse_vector_H",
        }

    def test_force_range_in_metrics(self, by_hand):
        # RMS force of the frames: 1 and sqrt(6)
        metrics = evaluate(*by_hand)
        assert metrics["force_rmse_vector_below_2"].value == pytest.approx(math.sqrt(0.25 / 2))
        assert metrics["force_rmse_vector_above_2"].value == pytest.approx(math.sqrt(5 / 3))
        assert "force_rmse_vector_above_2.5" not in evaluate(*by_hand, force_bound=2.5)
        assert "force_rmse_vector_below_0.5" not in evaluate(*by_hand, force_bound=0.5)

    def test_correlations(self, by_hand):
        metrics = evaluate(*by_hand)
        # two energies lie on a line: -5 -> -4.9, -4 -> -4.3, rising
        assert metrics["energy_correlation"].value == pytest.approx(1.0)
        expected = np.corrcoef([1, 1, 3, 3, 0], [1, math.sqrt(1.25), 3, 4, 2])[0, 1]
        assert metrics["force_correlation"].value == pytest.approx(expected)
        components = [np.concatenate([f.ravel() for f in side.forces]) for side in by_hand]
        assert metrics["force_component_correlation"].value == pytest.approx(np.corrcoef(*components)[0, 1])

    def test_units(self, by_hand):
        units = {name: metric.unit for name, metric in evaluate(*by_hand).items()}
        assert {unit for name, unit in units.items() if "correlation" in name} == {"1"}
        assert {unit for name, unit in units.items() if name.startswith("energy") and "corr" not in name} == {"eV/atom"}
        assert {unit for name, unit in units.items() if name.startswith("force") and "corr" not in name} == {"eV/A"}

    def test_per_frame(self, by_hand):
        table = per_frame(*by_hand)
        assert table["frame"].tolist() == [4, 17]
        assert table["n_atoms"].tolist() == [2, 3]
        np.testing.assert_allclose(table["energy_error_per_atom"], [0.1, -0.3])
        np.testing.assert_allclose(table["force_rmse_vector"], [math.sqrt(0.25 / 2), math.sqrt(5 / 3)])
        np.testing.assert_allclose(table["force_rms"], [1, math.sqrt(6)])
        np.testing.assert_allclose(table["force_max_error"], [0.5, 2.0])

    def test_by_force_range(self, by_hand):
        table = by_force_range(*by_hand)
        assert table[["lower", "upper", "n_frames", "n_atoms"]].to_numpy().tolist() == [[1, 2, 1, 2], [2, 3, 1, 3]]
        np.testing.assert_allclose(table["energy_rmse_per_atom"], [0.1, 0.3])
        np.testing.assert_allclose(table["force_rmse_vector"], [math.sqrt(0.25 / 2), math.sqrt(5 / 3)])
        np.testing.assert_allclose(table["force_rmse_component"] * math.sqrt(3), table["force_rmse_vector"])


class TestProperties:
    @given(sets())
    def test_vector_rmse_is_component_rmse_times_root_3(self, pair):
        metrics = evaluate(*pair)
        assert metrics["force_rmse_vector"].value == pytest.approx(
            math.sqrt(3) * metrics["force_rmse_component"].value, rel=1e-12
        )

    @given(sets())
    def test_exact_predictions_have_no_error(self, pair):
        labels, _ = pair
        metrics = evaluate(labels, labelled.predictions(labels.energies, labels.forces))
        for name, metric in metrics.items():
            assert metric.value == pytest.approx(1.0 if metric.unit == "1" else 0.0, abs=1e-12), name

    @given(sets(), numbers)
    def test_offset_per_atom_leaves_the_centred_error(self, pair, offset):
        labels, predicted = pair
        shifted = predicted._replace(energies=predicted.energies + offset * labels.n_atoms)
        before, after = evaluate(labels, predicted), evaluate(labels, shifted)
        name = "energy_rmse_per_atom_centred"
        assert after[name].value == pytest.approx(before[name].value, abs=1e-9)
        assert before[name].value <= before["energy_rmse_per_atom"].value + 1e-9

    @given(sets(), st.randoms())
    def test_order_of_frames_does_not_matter(self, pair, random):
        labels, predicted = pair
        order = list(range(len(labels)))
        random.shuffle(order)
        shuffled = labelled.dataset(
            [labels.frames[i].get_chemical_formula(mode="reduce") for i in order],
            labels.energies[order],
            [labels.forces[i] for i in order],
        )
        moved = labelled.predictions(predicted.energies[order], [predicted.forces[i] for i in order])
        before, after = evaluate(labels, predicted), evaluate(shuffled, moved)
        assert before.keys() == after.keys()
        for name in before:
            assert after[name].value == pytest.approx(before[name].value, rel=1e-9, abs=1e-9)

    @given(sets())
    def test_parts_add_up_to_the_whole(self, pair):
        labels, predicted = pair
        total = evaluate(labels, predicted)["force_rmse_vector"].value ** 2 * labels.n_atoms.sum()
        frames = per_frame(labels, predicted)
        ranges = by_force_range(labels, predicted)
        assert (frames["force_rmse_vector"] ** 2 * frames["n_atoms"]).sum() == pytest.approx(total, abs=1e-9)
        assert (ranges["force_rmse_vector"] ** 2 * ranges["n_atoms"]).sum() == pytest.approx(total, abs=1e-9)
        assert ranges["n_frames"].sum() == len(labels)

    @given(sets())
    def test_every_value_is_finite_and_errors_are_ordered(self, pair):
        metrics = evaluate(*pair)
        assert all(math.isfinite(metric.value) for metric in metrics.values())
        assert metrics["force_rmse_vector"].value <= metrics["force_max_error"].value + 1e-9
        assert metrics["force_mae_component"].value <= metrics["force_rmse_component"].value + 1e-9
        assert metrics["energy_mae_per_atom"].value <= metrics["energy_rmse_per_atom"].value + 1e-9
        assert all(-1 <= metric.value <= 1 for metric in metrics.values() if metric.unit == "1")


class TestCorrelation:
    def test_undefined_for_constant_values(self):
        rising = np.array([1.0, 2.0, 3.0])
        assert correlation(np.full(3, -5.1), rising) is None
        assert correlation(rising, np.zeros(3)) is None
        assert correlation(np.array([1.0]), np.array([2.0])) is None

    def test_rounding_noise_counts_as_constant(self):
        # E/N of supercells with the same energy per atom differs in the last bits only
        sizes = np.arange(1, 50)
        energies = -5.1 * sizes / sizes * (1 + np.finfo(float).eps * (-1.0) ** sizes)
        assert np.ptp(energies) > 0
        assert correlation(energies, sizes.astype(float)) is None

    def test_left_out_of_the_metrics(self):
        labels = labelled.dataset(["H2", "H2"], [-2.0, -2.0], [np.zeros((2, 3))] * 2)
        rng = np.random.default_rng(0)
        metrics = evaluate(labels, labelled.predictions([-2.1, -1.9], rng.normal(size=(2, 2, 3))))
        assert not [name for name in metrics if name.endswith("correlation")]

    @pytest.mark.parametrize("scale", [1e-200, 1.0, 1e200])
    def test_scale_does_not_matter(self, scale):
        rng = np.random.default_rng(1)
        x, y = rng.normal(size=(2, 20))
        assert correlation(x * scale, y) == pytest.approx(np.corrcoef(x, y)[0, 1])


class TestBadInput:
    def test_no_frames(self):
        with pytest.raises(DataError, match="toy: no frames to evaluate"):
            evaluate(labelled.dataset([], [], []), labelled.predictions([], []))

    def test_number_of_frames(self, by_hand):
        labels, predicted = by_hand
        with pytest.raises(DataError, match=r"toy: 2 labelled frames.*shape \(1,\) and forces for 2 frames"):
            evaluate(labels, predicted._replace(energies=predicted.energies[:1]))

    def test_shape_names_the_frame(self, by_hand):
        labels, predicted = by_hand
        wrong = predicted._replace(forces=(predicted.forces[0], predicted.forces[1][:2]))
        with pytest.raises(DataError, match=r"toy, frame 17: predicted forces have shape \(2, 3\), not \(3, 3\)"):
            per_frame(labels, wrong)

    def test_not_finite_names_the_frame(self, by_hand):
        labels, predicted = by_hand
        predicted.forces[1][0, 2] = np.nan
        with pytest.raises(DataError, match="frame 17: .* 1 force components not finite"):
            evaluate(labels, predicted)
        with pytest.raises(DataError, match="frame 4: predicted energy inf eV"):
            evaluate(labels, predicted._replace(energies=np.array([np.inf, 0.0])))

    @pytest.mark.parametrize("bound", [0.0, -1.0, np.nan, np.inf])
    def test_bound(self, by_hand, bound):
        with pytest.raises(ConfigError, match="force_bound must be a positive number"):
            evaluate(*by_hand, force_bound=bound)

    def test_edges(self, by_hand):
        with pytest.raises(ConfigError, match="increasing"):
            by_force_range(*by_hand, edges=(1.0, 0.5))
        with pytest.raises(ConfigError, match=r"leave out frame 17 of toy, whose RMS force is 2\.449"):
            by_force_range(*by_hand, edges=(0.0, 2.0))


def test_crystals_and_molecules_apart(by_hand):
    labels, predicted = by_hand
    assert by_kind(labels, predicted) == {}
    assert by_kind(labels.subset([0]), labelled.predictions([-9.8], predicted.forces[:1])) == {}
    frames = [frame.copy() for frame in labels.frames]
    frames[1].set_cell([30.0, 30.0, 30.0])
    mixed = dataclasses.replace(labels, frames=tuple(frames))
    assert mixed.is_crystal.tolist() == [True, False]
    found = by_kind(mixed, predicted)
    assert list(found) == ["crystals", "molecules"]
    assert found["crystals"]["energy_rmse_per_atom"].value == pytest.approx(0.1)
    assert found["molecules"]["energy_rmse_per_atom"].value == pytest.approx(0.3)
    assert found["crystals"]["force_rmse_vector"].value == pytest.approx(math.sqrt(0.25 / 2))
    assert found["molecules"]["force_rmse_vector"].value == pytest.approx(math.sqrt(5 / 3))


def test_frame_force_rms(by_hand):
    np.testing.assert_allclose(frame_force_rms(by_hand[0]), [1.0, math.sqrt(6)])


@pytest.mark.needs_mirror
def test_known_errors_on_public_data():
    """Urea, crystals and molecules together: errors that were put in come out."""
    urea = load_dataset("molcrys-mace/21_urea")
    signs = np.where(np.arange(len(urea)) % 2, 1.0, -1.0)
    predicted = labelled.predictions(
        urea.energies + urea.n_atoms * (0.3 + 0.002 * signs), [force + 0.03 for force in urea.forces]
    )
    metrics = evaluate(urea, predicted)
    assert metrics["force_rmse_component"].value == pytest.approx(0.03)
    assert metrics["force_rmse_vector"].value == pytest.approx(0.03 * math.sqrt(3))
    assert metrics["force_max_error"].value == pytest.approx(0.03 * math.sqrt(3))
    assert metrics["energy_rmse_per_atom_centred"].value == pytest.approx(0.002)
    assert metrics["energy_mae_per_atom"].value == pytest.approx(0.3)
    assert metrics["energy_correlation"].value > 0.99
    table = by_force_range(urea, predicted)
    assert table["n_frames"].sum() == 180
    # on both sides of the bound there are enough frames to speak of: 52 of 180 lie above it
    assert (frame_force_rms(urea) > 2.0).sum() == 52
    assert table.loc[table["lower"] >= 2.0, "n_frames"].sum() == 52
    assert metrics["force_rmse_vector_above_2"].value == pytest.approx(0.03 * math.sqrt(3))
