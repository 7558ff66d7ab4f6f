"""Bare structures: which atoms touch, which frames are crystals, and which are the same."""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from ase import Atoms
from ase.data import chemical_symbols
from numpy.typing import ArrayLike, NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from vesin import NeighborList

from tlmc.equality import equal_by_content

# All of a condensed phase is linked by contacts shorter than this; a molecule in a vacuum box is not (Angstrom).
_CONTACT = 6.0
# Angstrom by which interatomic distances of one geometry may differ: what text formats round.
_DUPLICATE = 1e-4
# Shortest distances per atom and pair of elements that identify a geometry: the neighbours within about 4 Angstrom.
_DISTANCES_PER_ATOM = 16


def element_counts(frames: Iterable[Atoms]) -> dict[str, int]:
    """Count the atoms of each element over all frames, by atomic number: ``{"H": 512, "C": 128}``."""
    counts: Counter[int] = Counter()
    for frame in frames:
        counts.update(frame.numbers.tolist())
    return {chemical_symbols[number]: counts[number] for number in sorted(counts)}


def by_composition(frames: Iterable[Atoms]) -> list[NDArray[np.int64]]:
    """Return the places of frames that have the same atoms in the same order, for each such list, first come first."""
    groups: defaultdict[bytes, list[int]] = defaultdict(list)
    for k, frame in enumerate(frames):
        groups[frame.numbers.tobytes()].append(k)
    return [np.array(members, dtype=np.int64) for members in groups.values()]


def frame_hash(frame: Atoms) -> str:
    """Return the SHA-256 of a geometry: elements, periodicity, cell and positions, to the last bit; no labels."""
    parts = (frame.numbers.astype("<i8"), frame.pbc.astype("u1"))
    return hashlib.sha256(
        b"".join(part.tobytes() for part in parts)
        + canonical_bytes(frame.cell.array)
        + canonical_bytes(frame.positions)
    ).hexdigest()


def canonical_bytes(values: ArrayLike) -> bytes:
    """Return float64 bytes that are the same on every machine; -0.0 counts as 0.0."""
    return (np.asarray(values, dtype="<f8") + 0.0).tobytes()


def duplicate_groups(frames: Sequence[Atoms], tolerance: float = _DUPLICATE) -> NDArray[np.int64]:
    """Find frames with the same geometry.

    Two frames are the same if they have the same composition and periodicity and their sorted interatomic distances
    (per pair of elements, the shortest 16 per atom, below 6 Angstrom) agree within `tolerance`. Rotating, translating,
    reflecting, wrapping and reordering therefore make no difference. Sameness is passed on: frames that agree
    with a third are in one group.

    Parameters
    ----------
    frames
        ``n_frames`` structures.
    tolerance
        Largest difference of a distance, Angstrom.

    Returns
    -------
    NDArray
        Shape ``(n_frames,)``: for each frame the index of the first frame of its group; its own if it is unique.
    """
    first = np.arange(len(frames))
    # bitwise copies first: they would make the comparison below quadratic
    exact: dict[str, int] = {}
    for k, frame in enumerate(frames):
        first[k] = exact.setdefault(frame_hash(frame), k)
    classes: defaultdict[tuple[str, bytes], list[int]] = defaultdict(list)
    for k in np.unique(first):
        classes[frames[k].get_chemical_formula(), frames[k].pbc.tobytes()].append(int(k))
    links: list[tuple[int, int]] = [(k, int(first[k])) for k in range(len(frames))]
    for members in classes.values():
        if len(members) == 1:
            continue
        prints = np.array([_fingerprint(frames[k]) for k in members])
        # the mean moves by no more than the largest component does: only neighbours in its order can agree
        means = prints.mean(axis=1, dtype=np.float64) if prints.shape[1] else np.zeros(len(members))
        order = np.argsort(means, kind="stable")
        ends = np.searchsorted(means[order], means[order] + tolerance, side="right")
        for start, end in enumerate(ends):
            near = order[start + 1 : end]
            same = near[np.abs(prints[near] - prints[order[start]]).max(axis=1, initial=0.0) <= tolerance]
            links += [(members[order[start]], members[k]) for k in same]
    a, b = np.array(links, dtype=np.int64).reshape(-1, 2).T
    label = _clusters(a, b, len(frames))[1]
    _, representative, inverse = np.unique(label, return_index=True, return_inverse=True)
    return representative[inverse].astype(np.int64)


def is_crystal(frame: Atoms) -> bool:
    """Tell whether a frame is periodic in three directions and its atoms touch their images.

    An isolated molecule is often stored as periodic, in a box of vacuum. It is told from a crystal by whether contacts
    shorter than 6 Angstrom lead from an atom to one of its own images: in condensed matter they always do.
    """
    if not frame.pbc.all():
        return False
    first, second, shift, _ = contacts(frame)
    crossing = shift.any(axis=1)
    # atoms linked inside the cell that touch each other across its border too: so do nearly all crystals
    cluster = _clusters(first[~crossing], second[~crossing], len(frame))[1]
    if (cluster[first[crossing]] == cluster[second[crossing]]).any():
        return True
    # an atom is linked with its own image if and only if a 3 x 3 x 3 supercell has fewer than 27 times the clusters
    cells = np.indices((3, 3, 3)).reshape(3, 27).T
    image = np.ravel_multi_index(((cells[:, None] + shift) % 3).transpose(2, 0, 1), (3, 3, 3))
    n = len(frame)
    rows = (np.arange(27)[:, None] * n + first).ravel()
    columns = (image * n + second).ravel()
    return _clusters(rows, columns, 27 * n)[0] < 27 * _clusters(first, second, n)[0]


@equal_by_content
class Contacts(NamedTuple):
    """Pairs of atoms, images included, each once."""

    first: NDArray[np.int64]
    """Index of one atom, shape ``(n_pairs,)``."""
    second: NDArray[np.int64]
    """Index of the other, shape ``(n_pairs,)``."""
    shift: NDArray[np.int64]
    """Cells by which the second atom is moved, shape ``(n_pairs, 3)``."""
    distance: NDArray[np.float64]
    """Angstrom, shape ``(n_pairs,)``."""


def contacts(frame: Atoms, cutoff: float = _CONTACT) -> Contacts:
    """Find all pairs of atoms closer than `cutoff`, Angstrom, in cells of any size."""
    search = NeighborList(cutoff=cutoff, full_list=False)
    first, second, shift, distance = search.compute(frame.positions, box(frame), frame.pbc, "ijSd")
    return Contacts(first.astype(np.int64), second.astype(np.int64), shift.astype(np.int64), distance)


def box(frame: Atoms) -> NDArray[np.float64]:
    """Return three independent cell vectors, ``(3, 3)``, Angstrom; those that no periodicity needs are invented."""
    return np.asarray(frame.cell.complete().array if frame.pbc.any() else np.eye(3), dtype=np.float64)


def _fingerprint(frame: Atoms) -> NDArray[np.float32]:
    """Return sorted distances: a vector of a length set by the composition, moving no faster than the atoms do."""
    first, second, _, distance = contacts(frame)
    number = frame.numbers
    low, high = np.minimum(number[first], number[second]), np.maximum(number[first], number[second])
    parts = []
    elements, counts = np.unique(number, return_counts=True)
    for a, (low_number, low_count) in enumerate(zip(elements, counts, strict=True)):
        for high_number, high_count in zip(elements[a:], counts[a:], strict=True):
            part = np.full(_DISTANCES_PER_ATOM * min(low_count, high_count), _CONTACT, dtype=np.float32)
            found = np.sort(distance[(low == low_number) & (high == high_number)])[: len(part)]
            part[: len(found)] = found
            parts.append(part)
    return np.concatenate(parts)


def _clusters(rows: NDArray[np.int64], columns: NDArray[np.int64], size: int) -> tuple[int, NDArray[np.int64]]:
    """Return the number of connected sets of `size` nodes, and to which of them each belongs."""
    graph = coo_array((np.ones(len(rows)), (rows, columns)), shape=(size, size))
    count, label = connected_components(graph, directed=False)
    return int(count), label.astype(np.int64)
