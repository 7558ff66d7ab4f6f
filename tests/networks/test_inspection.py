"""Kinds of atoms against chemistry, principal components against numpy's covariance."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from ase.build import molecule

from tlmc.errors import DataError
from tlmc.networks.inspection import kinds_of_atoms, principal_components


def test_kinds_of_ethanol():
    kinds = Counter(kinds_of_atoms(molecule("CH3CH2OH")))
    assert kinds == {"C (C H3)": 1, "C (C H2 O)": 1, "O (C H)": 1, "H (C)": 5, "H (O)": 1}


def test_a_bond_through_the_face_of_the_cell_counts():
    frame = molecule("H2O", cell=[6, 6, 6], pbc=True)
    frame.positions += [0, 0, 3.0 - frame.positions[0, 2]]
    frame.wrap()
    assert Counter(kinds_of_atoms(frame)) == {"O (H2)": 1, "H (O)": 2}
    assert kinds_of_atoms(molecule("CH4")[[0]]) == ["C"]


def test_components_carry_the_variance():
    x = np.random.default_rng(0).normal(size=(40, 5)) * [5, 3, 1, 0.5, 0.1]
    projected, share = principal_components(x, 3)
    values = np.linalg.eigvalsh(np.cov(x.T, ddof=0))[::-1]
    np.testing.assert_allclose(projected.var(0), values[:3], rtol=1e-10)
    np.testing.assert_allclose(share, values[:3] / values.sum(), rtol=1e-10)
    assert abs(np.corrcoef(projected.T)[0, 1]) < 1e-10


def test_too_few_vectors_are_refused():
    with pytest.raises(DataError, match=r"2 components need as many vectors and features, got shape \(1, 5\)"):
        principal_components(np.ones((1, 5)))
