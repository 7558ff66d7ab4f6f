"""Structures merged into one batch for the networks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from tlmc.equality import equal_if_identical
from tlmc.families.ani.cache import Structure


@equal_if_identical  # half of X is room for results
class Batch(NamedTuple):
    """Several structures merged for the networks: atoms sorted by element over the whole batch."""

    structures: tuple[Structure, ...]
    sizes: list[int]
    """Atoms per structure."""
    n_atoms: Tensor
    """The same with the type of `X`, shape ``(n_structures,)``."""
    X: Tensor
    """Per element, G of its atoms and below it room for v; shape ``(2 n_atoms, n_columns)``."""
    slices: tuple[tuple[int, slice], ...]
    """Network index and the merged atoms it serves; their rows of `X` begin at twice the first one."""
    separate: Tensor
    """Merged place of every atom, structures following one another, int64."""
    v_rows: Tensor
    """Row of `X` for v of every atom, structures following one another, int64."""
    structure: Tensor
    """Structure of every atom, structures following one another, int64."""


def merge(structures: Sequence[Structure]) -> Batch:
    """Merge structures into one batch, on the device where they are.

    All that goes to a GPU for a batch is one copy of index arrays, and nothing comes back.
    """
    sizes = [s.species.shape[0] for s in structures]
    species = np.concatenate([s.species.numpy() for s in structures])
    n = len(species)
    separate = np.empty(n, dtype=np.int64)
    separate[np.argsort(species, kind="stable")] = np.arange(n)
    counts = np.bincount(species)
    firsts = np.cumsum(counts) - counts
    G_rows = separate + firsts[species]
    indices = np.concatenate(
        [separate, G_rows, G_rows + counts[species], np.repeat(np.arange(len(sizes)), sizes), sizes]
    )
    G, host = torch.cat([s.G for s in structures]), torch.from_numpy(indices)
    if G.is_cuda:
        host = host.pin_memory()  # the copy is not waited for
    device = host.to(G.device, non_blocking=True)
    per_atom = device[: 4 * n].view(4, n)
    X = G.new_empty(2 * n, G.shape[1]).index_copy_(0, per_atom[1], G)
    return Batch(
        structures=tuple(structures),
        sizes=sizes,
        n_atoms=device[4 * n :].to(G.dtype),
        X=X,
        slices=tuple((int(k), slice(int(firsts[k]), int(firsts[k] + counts[k]))) for k in np.flatnonzero(counts)),
        separate=per_atom[0],
        v_rows=per_atom[2],
        structure=per_atom[3],
    )
