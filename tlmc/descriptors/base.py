"""The one interface of all descriptors, and what those that look at one atom's surroundings share.

A descriptor is called with one structure or a sequence of them. A *global* one (Coulomb and Ewald matrices, averaged
SOAP) gives one row per structure; a *local* one gives one row per centre, the rows of several structures below each
other. Local descriptors are functions of pair vectors ``v = x_j - x_i``, so that derivatives with respect to positions
and strain follow from the derivative with respect to the vectors: an atom's coordinates enter as a neighbour (plus) and
as a centre (minus), and a strain ``x -> (1 + e) x`` turns ``v`` into ``(1 + e) v``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from ase import Atoms
from ase.data import atomic_numbers, chemical_symbols
from numpy.typing import NDArray
from torch import Tensor

from tlmc.descriptors.aev import BLOCK, BlockJacobian
from tlmc.descriptors.pairs import pair_list
from tlmc.equality import equal_by_content
from tlmc.errors import ConfigError, DataError

Structures = Atoms | Sequence[Atoms]
Centers = Sequence[int] | Sequence[Sequence[int]] | None


@equal_by_content
class Environments(NamedTuple):
    """Surroundings of the centres of some structures; atoms are numbered through all structures."""

    species: Tensor
    """Channel of every centre's element, int64, shape ``(n_centres,)``."""
    atoms: Tensor
    """The atom that every centre is, int64, shape ``(n_centres,)``, ascending by structure."""
    structures: Tensor
    """Structure of every centre, int64, shape ``(n_centres,)``."""
    centre: Tensor
    """Row of the centre of every pair, int64, shape ``(n_pairs,)``, ascending."""
    neighbour: Tensor
    """The atom a pair leads to, int64, shape ``(n_pairs,)``."""
    neighbour_species: Tensor
    """Channel of its element, int64, shape ``(n_pairs,)``."""
    vectors: Tensor
    """``x_j + shift - x_i`` in Angstrom, shape ``(n_pairs, 3)``."""
    sizes: tuple[int, ...]
    """Number of atoms of every structure."""


@equal_by_content
class SparseJacobian(NamedTuple):
    """Derivatives of descriptor rows with respect to the atoms that act on them, sorted by row, then atom."""

    rows: Tensor
    """Row of the descriptor, int64, shape ``(n_entries,)``."""
    atoms: Tensor
    """Atom whose coordinates are varied, int64, shape ``(n_entries,)``; images of one atom are summed."""
    values: Tensor
    """Shape ``(n_entries, n_features, 3)``, feature per Angstrom."""

    def dense(self, n_rows: int, n_atoms: int) -> Tensor:
        """Return the full array, shape ``(n_rows, n_features, n_atoms, 3)``."""
        entries, shape = self.values, self.values.shape[1:]
        if len(entries) < n_rows * n_atoms:
            entries = self.values.new_zeros(n_rows * n_atoms, *shape)
            entries.index_copy_(0, self.rows * n_atoms + self.atoms, self.values)
        return entries.view(n_rows, n_atoms, *shape).transpose(1, 2)

    def blocks(self) -> BlockJacobian:
        """Return the same numbers in blocks of 16 columns, the last block filled up with zeros (a training cache)."""
        n_entries, n_features, _ = self.values.shape
        width = -(-n_features // BLOCK)
        padded = torch.nn.functional.pad(self.values, (0, 0, 0, width * BLOCK - n_features))
        rows = (self.rows[:, None] * width + torch.arange(width)).reshape(-1)
        order = torch.argsort(rows, stable=True)
        values = padded.reshape(n_entries * width, BLOCK, 3)
        return BlockJacobian(rows[order], self.atoms.repeat_interleave(width)[order], values[order])


class Descriptor(ABC):
    """Numbers that describe a structure or an atom's surroundings, with exact derivatives."""

    @property
    @abstractmethod
    def n_features(self) -> int:
        """Length of a row."""

    @property
    @abstractmethod
    def feature_names(self) -> list[str]:
        """Names of the columns, ``n_features`` of them."""

    @abstractmethod
    def __call__(self, structures: Structures, centers: Centers = None) -> Tensor:
        """Return the descriptor.

        Parameters
        ----------
        structures
            One structure or several.
        centers
            Indices of the atoms to describe, for several structures one sequence each; all atoms if not given.

        Returns
        -------
        Tensor
            Global descriptors: shape ``(n_features,)`` for one structure, ``(n_structures, n_features)`` for several.
            Local descriptors: ``(n_centres, n_features)``, for several structures below each other.
        """

    @abstractmethod
    def derivatives(self, structures: Structures, centers: Centers = None) -> Tensor | list[Tensor]:
        """Return the exact derivatives with respect to the positions, feature per Angstrom.

        Parameters
        ----------
        structures, centers
            As in a call.

        Returns
        -------
        Tensor or list of Tensor
            Global descriptors: shape ``(n_features, n_atoms, 3)``; local ones ``(n_centres, n_features, n_atoms, 3)``.
            Several structures give a list.
        """


class GlobalDescriptor(Descriptor):
    """A descriptor of whole structures; subclasses say how one batch and one structure's derivatives are made."""

    @abstractmethod
    def _batch(self, frames: list[Atoms]) -> Tensor:
        """Return ``(n_structures, n_features)``."""

    @abstractmethod
    def _derivative(self, frame: Atoms) -> Tensor:
        """Return ``(n_features, n_atoms, 3)``."""

    def __call__(self, structures: Structures, centers: Centers = None) -> Tensor:
        """Return one row per structure; see :class:`Descriptor`."""
        self._no_centers(centers)
        result = self._batch(as_list(structures))
        return result[0] if isinstance(structures, Atoms) else result

    def derivatives(self, structures: Structures, centers: Centers = None) -> Tensor | list[Tensor]:
        """Return exact derivatives with respect to the positions; see :class:`Descriptor`."""
        self._no_centers(centers)
        result = [self._derivative(frame) for frame in as_list(structures)]
        return result[0] if isinstance(structures, Atoms) else result

    def _no_centers(self, centers: Centers) -> None:
        if centers is not None:
            raise ConfigError(f"{type(self).__name__} describes whole structures and takes no centers, got {centers!r}")


class LocalDescriptor(Descriptor):
    """A descriptor of atoms' surroundings, a function of pair vectors.

    Parameters
    ----------
    species
        Elements that have channels, as symbols or atomic numbers; kept by ascending atomic number.
    dtype
        Precision of the result.
    """

    def __init__(self, species: Sequence[str | int], dtype: torch.dtype = torch.float64) -> None:
        numbers = sorted({atomic_number(element) for element in species})
        if not numbers:
            raise ConfigError(f"{type(self).__name__} needs at least one element, got {list(species)!r}")
        self.species = tuple(chemical_symbols[number] for number in numbers)
        self.dtype = dtype
        self._channel = np.full(len(chemical_symbols), -1)
        self._channel[numbers] = range(len(numbers))

    @property
    @abstractmethod
    def reach(self) -> float:
        """Distance in Angstrom beyond which atoms do not count."""

    @abstractmethod
    def values(self, environments: Environments) -> Tensor:
        """Return the rows of some environments, differentiable (twice) in ``environments.vectors``."""

    @abstractmethod
    def jacobian(self, environments: Environments) -> SparseJacobian:
        """Return the derivatives of the rows with respect to the positions of all atoms that act on them."""

    @property
    def averaged(self) -> bool:
        """Whether a row describes a whole structure."""
        return False

    def dense_jacobian(self, environments: Environments) -> Tensor:
        """Return the derivatives with respect to all atoms, ``(n_rows, n_features, n_atoms, 3)``."""
        n_rows = len(environments.sizes) if self.averaged else len(environments.species)
        return self.jacobian(environments).dense(n_rows, sum(environments.sizes))

    def environments(self, structures: Structures, centers: Centers = None) -> Environments:
        """List the neighbours of the centres, periodic images included.

        Parameters
        ----------
        structures, centers
            As in a call.

        Raises
        ------
        DataError
            If a structure holds an element without a channel.
        """
        frames = as_list(structures)
        chosen = center_lists(structures, centers)
        # of small structures most of the time goes into the start of operations, which arrays take much less of
        parts: list[tuple[NDArray[Any], ...]] = []
        first_row, first_atom = 0, 0
        for k, (frame, wanted) in enumerate(zip(frames, chosen, strict=True)):
            species = self._channel[frame.numbers]
            if -1 in species.tolist():
                unknown = sorted({s for s in frame.symbols if s not in self.species})
                raise DataError(f"structure {k} holds {unknown}; {type(self).__name__} has channels for {self.species}")
            pairs = pair_list(frame, self.reach)
            centre, neighbour, apart = pairs if centers is None else _select(*pairs, wanted, len(frame))
            parts.append(
                (
                    species[wanted],
                    wanted + first_atom,
                    np.full_like(wanted, k),
                    centre + first_row,
                    neighbour + first_atom,
                    species[neighbour],
                    apart,
                )
            )
            first_row += len(wanted)
            first_atom += len(frame)
        # most often there is one structure, whose columns need no copy
        arrays = parts[0] if len(parts) == 1 else [np.concatenate(column) for column in zip(*parts, strict=True)]
        *columns, vectors = map(torch.from_numpy, arrays)
        return Environments._make([*columns, vectors.to(self.dtype), tuple(map(len, frames))])

    def __call__(self, structures: Structures, centers: Centers = None) -> Tensor:
        """Return one row per centre; see :class:`Descriptor`."""
        result = self.values(self.environments(structures, centers))
        return result[0] if self.averaged and isinstance(structures, Atoms) else result

    def derivatives(self, structures: Structures, centers: Centers = None) -> Tensor | list[Tensor]:
        """Return exact derivatives with respect to the positions; see :class:`Descriptor`."""
        frames = as_list(structures)
        results = []
        for frame, wanted in zip(frames, center_lists(structures, centers), strict=True):
            environments = self.environments(frame, None if centers is None else wanted.tolist())
            result = self.dense_jacobian(environments)
            results.append(result[0] if self.averaged else result)
        return results[0] if isinstance(structures, Atoms) else results


def position_gradient(environments: Environments, vector_gradient: Tensor) -> Tensor:
    """Return the derivative with respect to all positions of a function of the pair vectors.

    Parameters
    ----------
    environments
        The pairs.
    vector_gradient
        Derivative with respect to every pair vector, shape ``(n_pairs, 3)``.

    Returns
    -------
    Tensor
        Shape ``(n_atoms, 3)``, atoms of all structures below each other.
    """
    result = vector_gradient.new_zeros(sum(environments.sizes), 3)
    result = result.index_add(0, environments.neighbour, vector_gradient)
    return result.index_add(0, environments.atoms[environments.centre], -vector_gradient)


def strain_gradient(environments: Environments, vector_gradient: Tensor) -> Tensor:
    """Return the derivative with respect to a strain of every structure, ``sum v (x) dE/dv``.

    Parameters
    ----------
    environments
        The pairs.
    vector_gradient
        Derivative with respect to every pair vector, shape ``(n_pairs, 3)``.

    Returns
    -------
    Tensor
        Shape ``(n_structures, 3, 3)``.
    """
    result = vector_gradient.new_zeros(len(environments.sizes), 3, 3)
    outer = environments.vectors[:, :, None] * vector_gradient[:, None, :]
    return result.index_add(0, environments.structures[environments.centre], outer)


def chunks(environments: Environments, n_pairs: int) -> Iterator[tuple[int, int, int, int]]:
    """Yield first and last centre and first and last pair of pieces with about so many pairs.

    Parameters
    ----------
    environments
        What is cut; a centre's pairs stay together.
    n_pairs
        Pairs of a piece at most, unless one centre has more.
    """
    n_centres = len(environments.species)
    ends = torch.searchsorted(environments.centre, torch.arange(n_centres), right=True).tolist()
    first, begin = 0, 0
    for row in range(n_centres):
        if row + 1 == n_centres or ends[row + 1] - begin > n_pairs:
            yield first, row + 1, begin, ends[row]
            first, begin = row + 1, ends[row]


def gather_slopes(
    environments: Environments, bounds: tuple[int, int, int, int], moved: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return what :class:`SparseJacobian` holds for some centres, from derivatives with respect to pair vectors.

    Parameters
    ----------
    environments
        The pairs.
    bounds
        First and last centre, first and last pair, as :func:`chunks` yields them.
    moved
        Derivative of the centre's row with respect to every pair vector, shape ``(n_pairs, n_features, 3)``.
    """
    first, last, begin, end = bounds
    n_atoms = sum(environments.sizes)
    centre, neighbour = environments.centre[begin:end], environments.neighbour[begin:end]
    rows = torch.arange(first, last)
    keys = torch.cat([centre * n_atoms + neighbour, rows * n_atoms + environments.atoms[first:last]])
    keys, place = torch.unique(keys, return_inverse=True)
    values = moved.new_zeros(len(keys), *moved.shape[1:]).index_add_(0, place[: end - begin], moved)
    own = moved.new_zeros(last - first, *moved.shape[1:]).index_add_(0, centre - first, moved)
    values[place[end - begin :]] -= own
    return keys // n_atoms, keys % n_atoms, values


def as_list(structures: Structures) -> list[Atoms]:
    """Return one structure or several as a list.

    Raises
    ------
    DataError
        If there is no structure, or one has no atoms.
    """
    frames = [structures] if isinstance(structures, Atoms) else list(structures)
    if not frames:
        raise DataError("there is no structure to describe")
    for k, frame in enumerate(frames):
        if len(frame) == 0:
            raise DataError(f"structure {k} has no atoms")
    return frames


def center_lists(structures: Structures, centers: Centers) -> list[NDArray[np.int64]]:
    """Return the indices of the centres of every structure; all atoms if ``centers`` is None.

    Raises
    ------
    ConfigError
        If the number of lists differs from that of the structures, or an index is out of range.
    """
    frames = as_list(structures)
    if centers is None:
        return [np.arange(len(frame)) for frame in frames]
    lists: list[Any] = [centers] if isinstance(structures, Atoms) else list(centers)
    if len(lists) != len(frames):
        raise ConfigError(f"{len(frames)} structures need as many lists of centers, got {len(lists)}")
    result = [np.array(list(indices), dtype=np.int64).reshape(-1) for indices in lists]
    for k, (frame, indices) in enumerate(zip(frames, result, strict=True)):
        if len(indices) == 0 or int(indices.min()) < 0 or int(indices.max()) >= len(frame):
            raise ConfigError(f"centers of structure {k} must lie in 0 to {len(frame) - 1}, got {indices.tolist()}")
    return result


def _select(
    centre: NDArray[np.int64],
    neighbour: NDArray[np.int64],
    vectors: NDArray[np.float64],
    wanted: NDArray[np.int64],
    n_atoms: int,
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]]:
    """Return the pairs of the wanted centres, in their order; a centre may be wanted twice."""
    counts = np.bincount(centre, minlength=n_atoms)
    start = np.cumsum(counts) - counts
    number = counts[wanted]
    row = np.repeat(np.arange(len(wanted)), number)
    within = np.arange(len(row)) - np.repeat(np.cumsum(number) - number, number)
    pick = start[wanted][row] + within
    return row, neighbour[pick], vectors[pick]


def atomic_number(element: str | int) -> int:
    """Return the atomic number of an element given by symbol or number.

    Raises
    ------
    ConfigError
        If there is no such element.
    """
    number = atomic_numbers.get(element) if isinstance(element, str) else element
    if number is None or not 0 < number < len(chemical_symbols):
        raise ConfigError(f"{element!r} is no chemical element")
    return int(number)
