"""A few rows that stand for many: inducing points of a low-rank regression, representative environments of a GAP."""

from __future__ import annotations

import numpy as np
import torch
from scipy.sparse.linalg import svds
from torch import Tensor

from tlmc.errors import ConfigError


def farthest_points(rows: Tensor, n: int, first: int = 0) -> Tensor:
    """Choose rows one by one, each the farthest from all chosen before (Gonzalez, 1985).

    Parameters
    ----------
    rows
        Shape ``(n_rows, n_features)``.
    n
        How many; fewer are returned if the rows that are left equal chosen ones.
    first
        Index of the first choice.

    Returns
    -------
    Tensor
        Indices in the order of choice, int64, at most ``n``.

    Raises
    ------
    ConfigError
        If ``n`` is not between one and the number of rows.
    """
    _check(rows, n)
    chosen = [first]
    distances = (rows - rows[first]).square().sum(1)
    while len(chosen) < n:
        candidate = int(distances.argmax())
        if float(distances[candidate]) == 0.0:
            break
        chosen.append(candidate)
        distances = torch.minimum(distances, (rows - rows[candidate]).square().sum(1))
    return torch.tensor(chosen)


def cur(rows: Tensor, n: int) -> Tensor:
    """Choose the rows that weigh most in the leading singular vectors (Mahoney and Drineas, PNAS 106, 697, 2009).

    The leverage of a row is the sum of its squared entries in the ``n`` leading left singular vectors; the largest are
    taken (the original draws at random with these probabilities).

    Parameters
    ----------
    rows
        Shape ``(n_rows, n_features)``.
    n
        How many.

    Returns
    -------
    Tensor
        ``n`` indices by descending leverage, int64.

    Raises
    ------
    ConfigError
        If ``n`` is not between one and the number of rows.
    """
    _check(rows, n)
    rank = min(n, *rows.shape)
    if rank < min(rows.shape):
        # the start vector is fixed, so that the choice is the same in every run
        left = svds(rows.numpy(), k=rank, v0=np.ones(min(rows.shape)), return_singular_vectors="u")[0]
        vectors = torch.from_numpy(left.copy())
    else:
        vectors = torch.linalg.svd(rows, full_matrices=False)[0][:, :rank]
    return vectors.square().sum(1).argsort(descending=True, stable=True)[:n]


def _check(rows: Tensor, n: int) -> None:
    if not 0 < n <= len(rows):
        raise ConfigError(f"between 1 and {len(rows)} representatives can be chosen of {len(rows)} rows, got {n}")
