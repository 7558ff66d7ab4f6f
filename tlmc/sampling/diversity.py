r"""Choosing rows of a matrix that differ most: farthest points and CUR, the baselines without labels or models.

A row is whatever describes a structure or an atom: SOAP averaged over a structure (`tlmc.data.analysis.averaged_soap`),
or one environment. Both methods are greedy, deterministic and return the rows in the order in which they were chosen,
so that the first k of a longer selection are the selection of k.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.linalg import eigh

from tlmc.errors import ConfigError, DataError

FloatArray = NDArray[np.float64]

_EXHAUSTED: Final = 1e-12
"""Squared length of a row, relative to the longest at the beginning, below which it holds rounding only."""


def farthest_points(rows: ArrayLike, n_selected: int, start: Sequence[int] = ()) -> NDArray[np.int64]:
    """Choose rows so that each is as far as possible from those chosen before it.

    The distance of a row from a set is the Euclidean one to its nearest member. Balls about the chosen rows that cover
    all others have at most twice the smallest radius possible for as many balls (Gonzalez, Theor. Comput. Sci. 38, 293,
    1985).

    Parameters
    ----------
    rows
        Shape ``(n_rows, n_features)``.
    n_selected
        Rows to choose, those of `start` not counted.
    start
        Rows chosen already, such as a training part. Without any, the first choice is the row nearest the mean of all.

    Returns
    -------
    NDArray
        Indices in order of choice, shape ``(n_selected,)``; of equally far rows the first.

    Raises
    ------
    DataError
        If the rows are not a finite matrix.
    ConfigError
        If fewer than `n_selected` rows are left, or `start` names a row that is not there.

    Notes
    -----
    ``n_selected`` passes over the matrix: time O(n_selected n_rows n_features), memory O(n_rows) beside the matrix.
    """
    matrix = _matrix(rows)
    given = np.asarray(start, dtype=np.int64)
    if given.size and not (given.min() >= 0 and given.max() < len(matrix)):
        raise ConfigError(f"start must name rows 0 to {len(matrix) - 1}, got {given.tolist()}")
    _check_number(n_selected, len(matrix) - len(np.unique(given)))
    distance = np.full(len(matrix), np.inf)
    for k in given:
        distance = np.minimum(distance, _squared_distances(matrix, int(k)))
    distance[given] = -1.0
    chosen: list[int] = []
    for _ in range(n_selected):
        if given.size or chosen:
            k = int(distance.argmax())
        else:
            k = int(((matrix - matrix.mean(axis=0)) ** 2).sum(axis=1).argmin())
        chosen.append(k)
        distance = np.minimum(distance, _squared_distances(matrix, k))
        # a copy of a chosen row has distance zero, and is still to be preferred to the row itself
        distance[k] = -1.0
    return np.array(chosen, dtype=np.int64)


def leverage_scores(rows: ArrayLike, rank: int) -> FloatArray:
    r"""Return how much each row weighs in the best approximation of the matrix of a given rank.

    With the singular value decomposition :math:`X = U S V^T` the score of row i is
    :math:`\pi_i = \sum_{c \le k} U_{ic}^2` (Mahoney and Drineas, PNAS 106, 697, 2009). U comes from the eigenvectors of
    the smaller of :math:`X X^T` and :math:`X^T X`, so that many rows with few features, or few with many, are cheap.

    Parameters
    ----------
    rows
        Shape ``(n_rows, n_features)``.
    rank
        k, from 1 to the smaller side of the matrix. Directions whose singular value is zero to rounding do not count.

    Returns
    -------
    NDArray
        Shape ``(n_rows,)``, each in [0, 1]; their sum is the rank.

    Raises
    ------
    DataError
        If the rows are not a finite matrix.
    ConfigError
        If the rank is out of range.
    """
    matrix = _matrix(rows)
    if not 1 <= rank <= min(matrix.shape):
        raise ConfigError(f"rank must lie in 1 to {min(matrix.shape)}, got {rank}")
    return _leverage(matrix, rank)


def cur(rows: ArrayLike, n_selected: int, rank: int = 1) -> NDArray[np.int64]:
    r"""Choose the rows that span the matrix best, by CUR decomposition with orthogonalisation.

    The row with the highest leverage score is taken, its direction is projected out of all rows,
    :math:`x_i \leftarrow x_i - (x_i \cdot \hat x_k) \hat x_k`, and the scores are computed anew, so that what a chosen
    row explains already is not chosen again (Imbalzano et al., J. Chem. Phys. 148, 241730, 2018). Rows are not centred:
    CUR looks at directions from the origin, the farthest points at distances.

    Parameters
    ----------
    rows
        Shape ``(n_rows, n_features)``.
    n_selected
        Rows to choose. When the chosen ones span all others, the projection starts again with the rows left.
    rank
        Of the leverage scores, from 1 to the smaller side of the matrix.

    Returns
    -------
    NDArray
        Indices in order of choice, shape ``(n_selected,)``.

    Raises
    ------
    DataError
        If the rows are not a finite matrix.
    ConfigError
        If there are fewer rows than `n_selected`, or the rank is out of range.

    Notes
    -----
    One eigenvalue problem of the smaller side n of the matrix per choice, O(n^3): for hundreds of structures, or for
    many environments of a few hundred features.
    """
    matrix = _matrix(rows)
    _check_number(n_selected, len(matrix))
    if not 1 <= rank <= min(matrix.shape):
        raise ConfigError(f"rank must lie in 1 to {min(matrix.shape)}, got {rank}")
    floor = _EXHAUSTED * float((matrix**2).sum(axis=1).max())
    residual, chosen = matrix.copy(), np.zeros(len(matrix), dtype=np.bool_)
    order: list[int] = []
    for _ in range(n_selected):
        if float((residual**2).sum(axis=1).max()) <= floor:
            residual = np.where(chosen[:, None], 0.0, matrix)
        scores = np.where(chosen, -1.0, _leverage(residual, rank))
        k = int(scores.argmax())
        order.append(k)
        chosen[k] = True
        length = float(np.linalg.norm(residual[k]))
        if length > 0.0:
            direction = residual[k] / length
            residual -= np.outer(residual @ direction, direction)
        residual[chosen] = 0.0
    return np.array(order, dtype=np.int64)


def _leverage(matrix: FloatArray, rank: int) -> FloatArray:
    n_rows, n_features = matrix.shape
    tall = n_rows > n_features
    gram = matrix.T @ matrix if tall else matrix @ matrix.T
    n = len(gram)
    values, vectors = eigh(gram, subset_by_index=[n - rank, n - 1])
    spanned = values > n * np.finfo(np.float64).eps * max(values[-1], 0.0)
    left = vectors[:, spanned]
    if tall:
        # X V = U S
        left = matrix @ left / np.sqrt(values[spanned])
    scores: FloatArray = (left**2).sum(axis=1)
    return scores


def _squared_distances(matrix: FloatArray, k: int) -> FloatArray:
    squared: FloatArray = ((matrix - matrix[k]) ** 2).sum(axis=1)
    return squared


def _matrix(rows: ArrayLike) -> FloatArray:
    matrix = np.asarray(rows, dtype=np.float64)
    if matrix.ndim != 2 or not matrix.size:
        raise DataError(f"rows must have shape (n_rows, n_features), got {matrix.shape}")
    if not np.isfinite(matrix).all():
        raise DataError(f"row {int((~np.isfinite(matrix)).any(axis=1).argmax())} holds values that are not finite")
    return matrix


def _check_number(n_selected: int, left: int) -> None:
    if not 1 <= n_selected <= left:
        raise ConfigError(f"n_selected must lie in 1 to {left}, got {n_selected}")
