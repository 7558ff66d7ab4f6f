"""Which exchanges of equal atoms a set of geometries shows (Chmiela et al., Nat. Commun. 9, 3887, 2018).

A methyl group that turns exchanges its hydrogen atoms. If both orders occur in the data, the geometry that one order
gives to one frame looks like that of another frame in the other order, so matching the atoms of all pairs of frames
finds the exchange. Its products with itself and with the others complete the group.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations, product

import numpy as np
from ase import Atoms
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment
from scipy.sparse import csr_matrix
from scipy.sparse.csgraph import minimum_spanning_tree

from tlmc.errors import DataError, ModelError

Permutations = NDArray[np.int64]

LARGEST_GROUP = 100
"""Above this many permutations the matching has gone wrong; no molecule worth a symmetric kernel needs as many."""


def find_permutations(frames: Sequence[Atoms]) -> Permutations:
    """Find the group of atom exchanges that the frames show.

    1. Atoms of two frames are matched by the eigenvectors of their distance matrices, whose entries say how an atom is
       placed in the whole; among equal elements (Hungarian algorithm; Umeyama, 1988). A matching counts if it brings
       the distance matrices closer together.
    2. Matchings contradict each other. Those along the minimum spanning tree of the frames, the closest pairs, are
       kept.
    3. Products are added until there are no new ones.

    Parameters
    ----------
    frames
        Geometries of one molecule, atoms in one order. A few hundred are enough; the effort grows with their square.

    Returns
    -------
    NDArray
        Shape ``(n_permutations, n_atoms)``, identity first; in permutation p, place a is taken by atom ``p[a]``.

    Raises
    ------
    DataError
        If the frames are not of one molecule.
    ModelError
        If the closure has more than 100 elements.
    """
    if not frames:
        raise DataError("permutations are found from at least one frame, got none")
    numbers = frames[0].numbers
    for k, frame in enumerate(frames):
        if not np.array_equal(frame.numbers, numbers):
            raise DataError(f"frame {k} holds {frame.symbols}, frame 0 {frames[0].symbols}: atoms must be in one order")
    distances = np.array([frame.get_all_distances() for frame in frames])
    # eigh sorts ascending; an eigenvector's sign means nothing
    vectors = np.abs(np.linalg.eigh(distances)[1][:, :, ::-1])
    cost = np.zeros((len(frames), len(frames)))
    matches: dict[tuple[int, int], NDArray[np.int64]] = {}
    for i, j in combinations(range(len(frames)), 2):
        cost[i, j], match = _match(distances[i], distances[j], vectors[i], vectors[j], numbers)
        if match is not None:
            matches[i, j] = match
    # zero would mean no edge; equal geometries are as close as can be
    tree = minimum_spanning_tree(csr_matrix(np.where(cost > 0.0, cost, np.triu(np.full_like(cost, 1e-12), 1))))
    edges = zip(*(index.tolist() for index in tree.nonzero()), strict=True)
    found = [matches[edge] for edge in edges if edge in matches]
    return complete_group(np.array([np.arange(len(numbers)), *found]))


def complete_group(permutations: Permutations) -> Permutations:
    """Add products of permutations until there are no new ones.

    Parameters
    ----------
    permutations
        Shape ``(n, n_atoms)``.

    Returns
    -------
    NDArray
        The group they generate, identity first, the others in lexical order.

    Raises
    ------
    ModelError
        If it has more than 100 elements.
    """
    generators = {tuple(p) for p in permutations.tolist()}
    group = {tuple(range(permutations.shape[1]))}
    new = set(group)
    # every element is a product of generators, so it is enough to multiply what is new by those
    while new:
        new = {tuple(a[k] for k in b) for a, b in product(new, generators)} - group
        group |= new
        if len(group) > LARGEST_GROUP:
            raise ModelError(
                f"{len(generators)} matchings of atoms generate more than {LARGEST_GROUP} permutations: the frames "
                "differ too much to tell exchanges from deformations; give the permutations"
            )
    return np.array(sorted(group), dtype=np.int64)


def _match(
    a: NDArray[np.float64],
    b: NDArray[np.float64],
    vectors_a: NDArray[np.float64],
    vectors_b: NDArray[np.float64],
    numbers: NDArray[np.int64],
) -> tuple[float, NDArray[np.int64] | None]:
    """Return how far two distance matrices are from each other after the best matching, and it if it is not trivial."""
    gain = vectors_a @ vectors_b.T
    different = numbers[:, None] != numbers
    before = float(np.linalg.norm(a - b))
    rows, columns = linear_sum_assignment(different * gain.max() - gain)
    # the assignment sends atom r of a to c of b; ordered by b it takes a's atoms to b's places
    match = columns.astype(np.int64)
    after = float(np.linalg.norm(a[np.ix_(match, match)] - b))
    if after >= before or np.isclose(after, before):
        return min(after, before), None
    return after, match
