from __future__ import annotations

import numpy as np
import pytest
from numpy.random import default_rng
from scipy.spatial.distance import cdist

from tlmc.data.analysis import averaged_soap
from tlmc.data.loading import load_dataset
from tlmc.errors import ConfigError, DataError
from tlmc.sampling import cur, farthest_points, leverage_scores

SHAPES = [(40, 7), (7, 40), (12, 12), (1, 5), (5, 1)]


def clusters(rng, sizes=(30, 20, 4), apart=20.0):
    """Rows about corners of a simplex, 1 wide and `apart` times as far from each other, and the cluster of each."""
    label = np.repeat(np.arange(len(sizes)), sizes)
    return apart * np.eye(len(sizes), 6)[label] + 0.3 * rng.normal(size=(len(label), 6)), label


class TestFarthestPoints:
    @pytest.mark.parametrize("shape", SHAPES[:3])
    def test_every_choice_is_the_row_farthest_from_those_before(self, shape):
        rows = default_rng(1).normal(size=shape)
        order = farthest_points(rows, len(rows))
        assert sorted(order) == list(range(len(rows)))
        distances = cdist(rows, rows)
        assert order[0] == np.linalg.norm(rows - rows.mean(axis=0), axis=1).argmin()
        for k in range(1, len(rows)):
            to_chosen = distances[:, order[:k]].min(axis=1)
            assert to_chosen[order[k]] == pytest.approx(to_chosen.max(), rel=1e-12)

    def test_a_longer_selection_begins_with_the_shorter(self):
        rows = default_rng(2).normal(size=(30, 4))
        np.testing.assert_array_equal(farthest_points(rows, 20)[:5], farthest_points(rows, 5))

    def test_covers_within_twice_the_best_radius(self):
        # brute force over all triples of rows
        rows = default_rng(3).normal(size=(14, 2))
        distances = cdist(rows, rows)
        triples = [(i, j, k) for i in range(14) for j in range(i) for k in range(j)]
        best = min(distances[:, list(triple)].min(axis=1).max() for triple in triples)
        assert distances[:, farthest_points(rows, 3)].min(axis=1).max() <= 2 * best

    def test_finds_every_cluster_before_a_second_row_of_one(self):
        rows, label = clusters(default_rng(4))
        assert set(label[farthest_points(rows, 3)]) == {0, 1, 2}

    def test_goes_on_from_given_rows(self):
        rows = default_rng(5).normal(size=(25, 3))
        order = farthest_points(rows, 12)
        np.testing.assert_array_equal(farthest_points(rows, 7, start=order[:5]), order[5:])

    def test_copies_are_taken_once_each_and_last(self):
        rows = np.array([[0.0], [0.0], [1.0], [1.0], [5.0]])
        order = farthest_points(rows, 5)
        assert sorted(order) == [0, 1, 2, 3, 4]
        assert set(order[3:]) <= {0, 1, 2, 3}
        assert {float(rows[k, 0]) for k in order[:3]} == {0.0, 1.0, 5.0}


class TestLeverageScores:
    @pytest.mark.parametrize("shape", SHAPES)
    def test_equal_those_of_a_dense_singular_value_decomposition(self, shape):
        rows = default_rng(6).normal(size=shape)
        left = np.linalg.svd(rows, full_matrices=False)[0]
        for rank in range(1, min(shape) + 1):
            scores = leverage_scores(rows, rank)
            np.testing.assert_allclose(scores, (left[:, :rank] ** 2).sum(axis=1), atol=1e-10)
            assert scores.sum() == pytest.approx(rank)

    def test_directions_without_extent_do_not_count(self):
        rows = default_rng(7).normal(size=(9, 2)) @ default_rng(8).normal(size=(2, 5))
        left = np.linalg.svd(rows, full_matrices=False)[0][:, :2]
        np.testing.assert_allclose(leverage_scores(rows, 5), (left**2).sum(axis=1), atol=1e-10)


class TestCUR:
    @pytest.mark.parametrize("rank", [1, 3])
    @pytest.mark.parametrize("shape", SHAPES[:3])
    def test_every_choice_has_the_highest_score_of_what_is_left(self, shape, rank):
        rows = default_rng(9).normal(size=shape)
        n = min(shape)
        order = cur(rows, n, rank)
        for k in range(n - rank + 1):
            # what the rows chosen so far do not span, by an independent projection
            base = np.linalg.qr(rows[order[:k]].T)[0]
            left = rows - rows @ base @ base.T
            vectors = np.linalg.svd(left, full_matrices=False)[0][:, :rank]
            scores = (vectors**2).sum(axis=1)
            # where as many rows as dimensions are left, all score one
            assert scores[order[k]] == pytest.approx(scores.max(), rel=1e-9)
            assert order[k] not in order[:k]

    def test_spans_a_matrix_of_low_rank_with_as_many_rows(self):
        rng = default_rng(10)
        rows = rng.normal(size=(50, 4)) @ rng.normal(size=(4, 30))
        chosen = rows[cur(rows, 4)]
        np.testing.assert_allclose(rows, rows @ np.linalg.pinv(chosen) @ chosen, atol=1e-9)

    def test_beats_random_rows_at_spanning_the_rest(self):
        rng = default_rng(11)
        rows = rng.normal(size=(60, 20)) * 0.8 ** np.arange(20)

        def unexplained(chosen):
            base = np.linalg.qr(rows[chosen].T)[0]
            return np.linalg.norm(rows - rows @ base @ base.T)

        random = [unexplained(rng.choice(60, 6, replace=False)) for _ in range(200)]
        assert unexplained(cur(rows, 6)) < np.quantile(random, 0.05)

    def test_more_rows_than_dimensions(self):
        rows = default_rng(12).normal(size=(10, 3))
        order = cur(rows, 10)
        assert sorted(order) == list(range(10))
        # each round of three spans the space again
        assert np.linalg.matrix_rank(rows[order[:3]]) == np.linalg.matrix_rank(rows[order[3:6]]) == 3

    def test_zero_rows_come_last(self):
        rows = np.array([[0.0, 0.0], [1.0, 0.0], [0.0, 2.0], [0.0, 0.0]])
        np.testing.assert_array_equal(cur(rows, 2), [2, 1])
        assert sorted(cur(rows, 4)) == [0, 1, 2, 3]


class TestOnCrystals:
    def test_both_find_the_few_molecules_among_the_crystals(self):
        data = load_dataset("naphthalene").subset([*range(0, 120, 6), 121, 125])
        rows = averaged_soap(data.frames)
        np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1.0)
        for order in (farthest_points(rows, 4), cur(rows, 4)):
            assert set(order) & {20, 21}


class TestRefusals:
    @pytest.mark.parametrize("rows", [np.zeros(3), np.zeros((0, 3)), np.zeros((2, 2, 2))])
    def test_no_matrix(self, rows):
        for select in (lambda: farthest_points(rows, 1), lambda: cur(rows, 1), lambda: leverage_scores(rows, 1)):
            with pytest.raises(DataError, match=r"rows must have shape \(n_rows, n_features\), got"):
                select()

    def test_not_finite(self):
        with pytest.raises(DataError, match="row 1 holds values that are not finite"):
            cur([[0.0], [np.nan]], 1)

    def test_numbers(self):
        rows = np.eye(3)
        with pytest.raises(ConfigError, match="n_selected must lie in 1 to 3, got 4"):
            farthest_points(rows, 4)
        with pytest.raises(ConfigError, match="n_selected must lie in 1 to 1, got 2"):
            farthest_points(rows, 2, start=[0, 1])
        with pytest.raises(ConfigError, match=r"start must name rows 0 to 2, got \[3\]"):
            farthest_points(rows, 1, start=[3])
        with pytest.raises(ConfigError, match="n_selected must lie in 1 to 3, got 0"):
            cur(rows, 0)
        with pytest.raises(ConfigError, match="rank must lie in 1 to 3, got 4"):
            cur(rows, 1, rank=4)
        with pytest.raises(ConfigError, match="rank must lie in 1 to 3, got 0"):
            leverage_scores(rows, 0)
