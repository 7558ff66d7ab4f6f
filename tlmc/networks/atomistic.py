r"""What networks of atoms share: energies that are sums over atoms, forces that are their derivatives, and scales.

.. math:: E = \sum_i \left[ e_{Z_i} + s\,\varepsilon_i \right], \qquad F_k = -\partial E/\partial x_k

A network gives the numbers :math:`\varepsilon_i` of order one. The offsets :math:`e_Z` are fitted by linear regression
on the labels of the training part (:func:`tlmc.potentials.reference.fit_reference`), and the scale :math:`s`, in eV, is
the root mean square of its force components times one Angstrom, so that forces of the usual size are slopes of order
one. Since the sum goes over atoms that see a limited surrounding, twice the crystal has twice the energy (extensivity),
and the order of equal atoms does not matter.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Generic, NamedTuple, Protocol, Self, TypeVar

import numpy as np
import torch
from ase import Atoms
from ase.data import atomic_numbers, chemical_symbols
from numpy.typing import NDArray
from torch import Tensor

from tlmc.data.dataset import Dataset
from tlmc.equality import equal_by_content
from tlmc.errors import ConfigError, DataError
from tlmc.potentials.model import Predictions
from tlmc.potentials.reference import fit_reference

_FRAMES_AT_ONCE = 16


class Prepared(Protocol):
    """What of a frame stays the same while a network trains."""

    @property
    def species(self) -> Tensor:
        """Channel of every atom's element, int64, shape ``(n_atoms,)``."""


P = TypeVar("P", bound=Prepared)


@equal_by_content
class Output(NamedTuple):
    """What a network says about some frames, without the offsets."""

    atomic: Tensor
    """``s eps_i``, eV, shape ``(n_atoms,)``, the atoms of all frames below each other."""
    energies: Tensor
    """Their sums, eV, shape ``(n_frames,)``."""
    forces: Tensor
    """eV/Angstrom, shape ``(n_atoms, 3)``."""


class AtomisticNetwork(torch.nn.Module, ABC, Generic[P]):
    """A sum of energies of atoms, with exact forces.

    Parameters
    ----------
    species
        Elements it covers, symbols; kept by ascending atomic number.
    dtype
        Precision of weights and results.

    Raises
    ------
    ConfigError
        If there are no elements, or a symbol is unknown.
    """

    offsets: Tensor
    """``e_Z`` in eV, float64, one per element of `species`."""
    scale: Tensor
    """``s`` in eV."""

    def __init__(self, species: Sequence[str], dtype: torch.dtype) -> None:
        super().__init__()
        unknown = [symbol for symbol in species if symbol not in atomic_numbers]
        if unknown or not species:
            raise ConfigError(f"{type(self).__name__} needs chemical symbols, got {list(species)}")
        self.species = tuple(chemical_symbols[z] for z in sorted({atomic_numbers[symbol] for symbol in species}))
        self.dtype = dtype
        self.register_buffer("offsets", torch.zeros(len(self.species), dtype=torch.float64))
        self.register_buffer("scale", torch.ones((), dtype=dtype))

    @abstractmethod
    def prepare(self, frames: Sequence[Atoms]) -> list[P]:
        """Compute what depends on the geometry alone, once for all epochs.

        Raises
        ------
        DataError
            If a frame holds an element that the network does not cover.
        """

    @abstractmethod
    def forward(self, prepared: Sequence[P], *, create_graph: bool = False) -> Output:
        """Return energies and forces.

        Parameters
        ----------
        prepared
            Frames, as :meth:`prepare` returned them.
        create_graph
            Keep what is needed to differentiate the forces with respect to the weights, for training.
        """

    def fit_scales(self, dataset: Dataset, prepared: Sequence[P]) -> None:
        """Fit offsets and scale on labels; networks with inputs to standardise extend this.

        Parameters
        ----------
        dataset
            Labelled frames of the training part.
        prepared
            The same frames.

        Raises
        ------
        DataError
            If an element that the network covers does not occur, or all forces are zero.
        """
        reference = fit_reference(dataset.frames, dataset.energies, np.zeros(len(dataset)))
        missing = [symbol for symbol in self.species if symbol not in reference.offsets]
        if missing:
            raise DataError(
                f"{dataset.name}: the training part holds no {', '.join(missing)}, so nothing can be fitted"
            )
        force_rms = float(np.sqrt((np.concatenate(dataset.forces) ** 2).mean()))
        if force_rms == 0.0:
            raise DataError(f"{dataset.name}: all forces of the training part are zero")
        self.offsets.copy_(torch.tensor([reference.offsets[s] for s in self.species], dtype=torch.float64))
        self.scale.fill_(force_rms)

    def reference(self, prepared: Sequence[P]) -> Tensor:
        """Return the sums of the offsets, float64 eV, shape ``(n_frames,)``."""
        return torch.stack([self.offsets[frame.species].sum() for frame in prepared])

    def predict(self, prepared: Sequence[P]) -> Predictions:
        """Return energies (eV, offsets included) and forces (eV/Angstrom) of prepared frames."""
        energies: list[NDArray[np.float64]] = []
        forces: list[NDArray[np.float64]] = []
        for first in range(0, len(prepared), _FRAMES_AT_ONCE):
            part = prepared[first : first + _FRAMES_AT_ONCE]
            output = self(part)
            energies.append((output.energies.detach().double() + self.reference(part)).numpy())
            sizes = [len(frame.species) for frame in part]
            forces += [f.double().numpy() for f in output.forces.detach().split(sizes)]
        return Predictions(np.concatenate(energies), tuple(forces))

    def atomic_energies(self, frame: Atoms) -> NDArray[np.float64]:
        """Return what each atom contributes to the energy of a frame beyond its offset, eV, shape ``(n_atoms,)``."""
        result: NDArray[np.float64] = self(self.prepare([frame])).atomic.detach().double().numpy()
        return result

    def in_double(self) -> Self:
        """Return a copy in double precision, for finite differences and tight relaxations."""
        result = copy.deepcopy(self).double()
        result.dtype = torch.float64
        return result

    def channels(self, frame: Atoms) -> Tensor:
        """Return the channel of every atom, shape ``(n_atoms,)``.

        Raises
        ------
        DataError
            If the network does not cover an element.
        """
        index = {symbol: k for k, symbol in enumerate(self.species)}
        unknown = sorted(set(frame.symbols) - set(index))
        if unknown:
            raise DataError(
                f"{frame.get_chemical_formula()} holds {', '.join(unknown)}; "
                f"{type(self).__name__} covers {', '.join(self.species)}"
            )
        return torch.tensor([index[symbol] for symbol in frame.symbols])


def sum_by_structure(atomic: Tensor, sizes: Sequence[int]) -> Tensor:
    """Return the sums of atomic numbers over each frame, shape ``(n_frames,)``."""
    structure = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    return atomic.new_zeros(len(sizes)).index_add(0, structure, atomic)
