"""Looking inside a trained network: kinds of atoms, and projections of learned vectors."""

from __future__ import annotations

from collections import Counter

import numpy as np
from ase import Atoms
from ase.neighborlist import natural_cutoffs, neighbor_list
from numpy.typing import ArrayLike, NDArray

from tlmc.errors import DataError


def kinds_of_atoms(frame: Atoms) -> list[str]:
    """Name every atom by its element and what it is bonded to: ``"C (C H3)"``, ``"H (O)"``.

    Two atoms are bonded if their distance is below 1.25 times the sum of their covalent radii.
    """
    symbols = frame.get_chemical_symbols()
    i, j = neighbor_list("ij", frame, natural_cutoffs(frame, mult=1.25))
    names = []
    for k, symbol in enumerate(symbols):
        bonded = Counter(symbols[other] for other in j[i == k])
        listed = " ".join(f"{element}{count if count > 1 else ''}" for element, count in sorted(bonded.items()))
        names.append(f"{symbol} ({listed})" if listed else symbol)
    return names


def principal_components(vectors: ArrayLike, n_components: int = 2) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Project vectors on the directions in which they vary most.

    Parameters
    ----------
    vectors
        Shape ``(n, n_features)``.
    n_components
        Directions kept.

    Returns
    -------
    tuple
        The projections, shape ``(n, n_components)``, and the share of the variance along each direction.

    Raises
    ------
    DataError
        If there are fewer vectors or features than directions.
    """
    x = np.asarray(vectors, dtype=np.float64)
    if x.ndim != 2 or min(x.shape) < n_components:
        raise DataError(f"{n_components} components need as many vectors and features, got shape {x.shape}")
    left, singular, _ = np.linalg.svd(x - x.mean(0), full_matrices=False)
    share = singular**2 / (singular**2).sum()
    return left[:, :n_components] * singular[:n_components], share[:n_components]
