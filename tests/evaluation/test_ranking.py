from __future__ import annotations

import numpy as np
import pytest

from helpers.labelled import dataset, predictions
from tlmc.errors import ConfigError, DataError
from tlmc.evaluation import packing_energies, ranking_table

PER_MOLECULE = [-10.0, -9.8, -9.7, -9.9, -10.3, -9.6]
GROUPS = ["a", "a", "b", "b", "", "c"]
MOLECULES = np.array([1, 2, 1, 2, 1, 1])


@pytest.fixture
def labels():
    return dataset(["H2O", "H4O2", "H2O", "H4O2", "H2O", "H2O"], PER_MOLECULE * MOLECULES, [np.zeros((n, 3)) for n in
                   (3, 6, 3, 6, 3, 3)], frame_numbers=[0, 1, 2, 3, 7, 9])  # fmt: skip


def answers(labels, per_molecule):
    return predictions(np.asarray(per_molecule) * MOLECULES, labels.forces)


def test_packings_stand_with_their_means_or_their_lowest_frame(labels):
    same = {"start": answers(labels, np.array(PER_MOLECULE) + 100)}
    table = packing_energies(labels, same, MOLECULES, GROUPS)
    assert table.index.tolist() == ["frame 7", "a", "b", "c"]
    assert table["n_frames"].tolist() == [1, 2, 2, 1]
    np.testing.assert_allclose(table["labels"], [0, 0.4, 0.5, 0.7])
    # an offset common to all does not count
    np.testing.assert_allclose(table["start"], table["labels"])
    lowest = packing_energies(labels, same, MOLECULES, GROUPS, "lowest")
    np.testing.assert_allclose(lowest["labels"], [0, 0.3, 0.4, 0.7])


def test_a_model_that_finds_another_packing_lower(labels):
    # the last packing, highest by the labels, is lowest by the model; the others keep their order
    wrong = [*PER_MOLECULE[:5], -11.0]
    table = packing_energies(labels, {"m": answers(labels, wrong)}, MOLECULES, GROUPS)
    assert table.loc["c", "m"] == pytest.approx(-0.7)
    row = ranking_table(table).loc["m"]
    # three pairs of six turned
    assert row["pairs_in_wrong_order"] == 0.5
    assert row["kendall"] == pytest.approx(0.0, abs=1e-12)
    assert row["rank_of_lowest"] == 2
    assert row["regret"] == pytest.approx(0.7)
    difference = np.array([0, 0, 0, -1.4])
    assert row["rmse"] == pytest.approx(difference.std())


def test_the_right_and_the_reverse_order(labels):
    table = packing_energies(
        labels,
        {"right": answers(labels, 0.1 * np.array(PER_MOLECULE)), "reverse": answers(labels, -np.array(PER_MOLECULE))},
        MOLECULES,
        GROUPS,
    )
    ranks = ranking_table(table)
    assert ranks["kendall"].tolist() == pytest.approx([1, -1])
    assert ranks["spearman"].tolist() == pytest.approx([1, -1])
    assert ranks["rank_of_lowest"].tolist() == [1, 4]
    assert ranks.loc["right", "regret"] == 0.0


def test_what_cannot_be_ranked_is_refused(labels):
    same = {"m": answers(labels, PER_MOLECULE)}
    with pytest.raises(DataError, match="6 frames got 5 groups"):
        packing_energies(labels, same, MOLECULES, GROUPS[:5])
    with pytest.raises(DataError, match="at least two packings, got x"):
        packing_energies(labels, same, MOLECULES, ["x"] * 6)
    flat = packing_energies(labels, {"m": answers(labels, np.ones(6))}, MOLECULES, GROUPS)
    with pytest.raises(DataError, match="energies of 4 packings by m or their labels are all equal"):
        ranking_table(flat)


def test_what_cannot_be_ranked_is_named(labels):
    same = {"m": answers(labels, np.array(PER_MOLECULE))}
    with pytest.raises(DataError, match="toy: frame 1 is made of H4 O2, the first one of H2 O1: energies per molecule"):
        packing_energies(labels, same, np.ones(6), GROUPS)
    for wrong in (0.0, -1.0, np.nan):
        with pytest.raises(DataError, match="toy: frame 7 cannot consist of"):
            packing_energies(labels, same, [*MOLECULES[:4], wrong, 1], GROUPS)
    gone = np.array(PER_MOLECULE)
    gone[5] = np.nan
    with pytest.raises(DataError, match="toy: frame 9 has the energy nan by m"):
        packing_energies(labels, {"m": answers(labels, gone)}, MOLECULES, GROUPS)
    with pytest.raises(ConfigError, match="represent must be mean or lowest, got 'median'"):
        packing_energies(labels, same, MOLECULES, GROUPS, "median")
    table = packing_energies(labels, same, MOLECULES, GROUPS)
    table.loc["c", "m"] = np.nan
    with pytest.raises(DataError, match="energies of 4 packings by m or their labels are not all finite"):
        ranking_table(table)


def test_crystals_of_two_compounds_have_no_order():
    two = dataset(["H2O", "CH4"], [-10.0, -11.0], [np.zeros((3, 3)), np.zeros((5, 3))])
    with pytest.raises(DataError, match="frame 1 is made of C1 H4, the first one of H2 O1"):
        packing_energies(two, {"m": predictions(two.energies, two.forces)}, [1, 1], ["", ""])
