from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from helpers.labelled import dataset, predictions
from tlmc.errors import DataError
from tlmc.evaluation import error_against_equilibrium, per_frame


@pytest.fixture
def frames():
    found = dataset(["H2O"] * 4, [-9.0, -9.6, -9.3, -8.7], [np.full((3, 3), k) for k in range(1, 5)], [3, 5, 8, 9])
    for frame, scale in zip(found.frames, (1.0, 1.1, 1.0, 0.9), strict=True):
        frame.set_cell(frame.cell * [scale, 1, 1], scale_atoms=False)
    return dataclasses.replace(found)


def test_distances_are_from_the_lowest_frame_of_all(frames):
    test = frames.subset([3, 0])
    answers = predictions(test.energies + 0.3, test.forces)
    table = error_against_equilibrium(test, answers, frames)
    np.testing.assert_allclose(table["energy_above_lowest"], [0.3, 0.2])
    np.testing.assert_allclose(table["volume_strain"], [0.9 / 1.1 - 1, 1 / 1.1 - 1])
    columns = per_frame(test, answers).columns
    np.testing.assert_array_equal(table[columns], per_frame(test, answers))


def test_distances_are_from_the_lowest_frame_of_the_same_packing(frames):
    test = frames.subset([3, 0])
    answers = predictions(test.energies, test.forces)
    table = error_against_equilibrium(test, answers, frames, ["a", "b", "a", "b"])
    np.testing.assert_allclose(table["energy_above_lowest"], [0.3, 0.1])
    np.testing.assert_allclose(table["volume_strain"], [0.9 / 1.1 - 1, 0.0], atol=1e-12)


def test_wrong_sets_are_refused(frames):
    test = frames.subset([3])
    answers = predictions(test.energies, test.forces)
    with pytest.raises(DataError, match="frame 9 is not among the 2 frames"):
        error_against_equilibrium(test, answers, frames.subset([0, 1]))
    with pytest.raises(DataError, match="4 frames need as many groups, got 1"):
        error_against_equilibrium(test, answers, frames, ["a"])
    frames.frames[3].pbc = False
    with pytest.raises(DataError, match="defined for crystals only"):
        error_against_equilibrium(frames.subset([3]), answers, frames)


def test_frames_of_another_set_or_compound_are_refused(frames):
    answers = predictions(frames.energies[3:], frames.forces[3:])
    moved = dataclasses.replace(frames, frames=tuple(frame.copy() for frame in frames.frames))
    moved.frames[3].positions[0, 1] += 0.1
    with pytest.raises(DataError, match="toy: frame 9 is not frame 9 of toy"):
        error_against_equilibrium(frames.subset([3]), answers, moved)
    mixed = dataset(["H2O", "H2O", "H2O2"], [-9.0, -9.6, -99.0], [np.zeros((n, 3)) for n in (3, 3, 4)])
    answers = predictions(mixed.energies[:1], mixed.forces[:1])
    with pytest.raises(DataError, match="frame 2 is HO, the first one H2O: energies per atom of different"):
        error_against_equilibrium(mixed.subset([0]), answers, mixed)
