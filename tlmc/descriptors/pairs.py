"""Pairs of atoms within a cutoff, periodic images included."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
import vesin
from ase import Atoms
from numpy.typing import NDArray
from torch import Tensor

from tlmc.equality import equal_by_content


@equal_by_content
class Neighbours(NamedTuple):
    """A full neighbour list sorted by centre: every pair within the cutoff appears from both sides."""

    centre: Tensor
    """Index i of the centre, int64, shape ``(n_pairs,)``."""
    neighbour: Tensor
    """Index j of the neighbour in the cell, int64, shape ``(n_pairs,)``."""
    vectors: Tensor
    """``x_j + shift - x_i`` in Angstrom, shape ``(n_pairs, 3)``."""


def neighbours(frame: Atoms, r_cut: float, dtype: torch.dtype = torch.float64) -> Neighbours:
    """Return all pairs of atoms within a cutoff, periodic images included, for cells of any size.

    Parameters
    ----------
    frame
        A molecule or crystal; partly periodic frames are allowed.
    r_cut
        Cutoff in Angstrom.
    dtype
        Precision of the vectors; they are computed in float64 first.
    """
    i, j, vectors = pair_list(frame, r_cut)
    return Neighbours(torch.from_numpy(i), torch.from_numpy(j), torch.from_numpy(vectors).to(dtype))


def pair_list(frame: Atoms, r_cut: float) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]]:
    """Return what :class:`Neighbours` holds as arrays, for callers to whom the start of every operation matters.

    Parameters
    ----------
    frame, r_cut
        As in :func:`neighbours`.
    """
    # a second thread takes longer to wake than a small cell needs
    threads = 1 if len(frame) < 100 else torch.get_num_threads()
    finder = vesin.NeighborList(cutoff=r_cut, full_list=True, sorted=True, n_threads=threads)
    periodic = np.asarray(frame.pbc)
    cell = np.asarray(frame.cell.array, dtype=np.float64)
    if not periodic.all():
        # a direction that is not periodic needs no cell vector; completing the cell keeps it invertible for the library
        cell = np.asarray(frame.cell.complete().array if periodic.any() else np.zeros((3, 3)), dtype=np.float64)
    i, j, vectors = finder.compute(points=frame.positions, box=cell, periodic=periodic, quantities="ijD", copy=False)
    # the library's own arrays end with the finder
    return i.astype(np.int64), j.astype(np.int64), vectors.copy()
