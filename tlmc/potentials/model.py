"""What every potential is, whatever its architecture: energies and forces of frames, elements, files."""

from __future__ import annotations

import dataclasses
import hashlib
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Self

import numpy as np
import torch
from ase import Atoms
from numpy.typing import NDArray
from torch import Tensor

from tlmc.descriptors.pairs import Neighbours
from tlmc.equality import equal_by_content
from tlmc.errors import ConfigError, ModelError
from tlmc.potentials.reference import ReferenceEnergies

if TYPE_CHECKING:
    from tlmc.potentials.borrowing import Borrowing


@equal_by_content
class Predictions(NamedTuple):
    """What a model says about some frames."""

    energies: NDArray[np.float64]
    """eV, shape ``(n_frames,)``, energies of free atoms and fitted reference included."""
    forces: tuple[NDArray[np.float64], ...]
    """eV/Angstrom, each of shape ``(n_atoms, 3)``."""
    stresses: tuple[NDArray[np.float64] | None, ...] = ()
    """eV/Angstrom^3 in ASE's Voigt order (xx, yy, zz, yz, xz, xy), or None for a frame not periodic in 3 directions."""


@equal_by_content
class Evaluation(NamedTuple):
    """One frame according to the network of a model; float64, on the processor."""

    energies: Tensor
    """Of the atoms, eV, without :meth:`Potential.offsets`, shape ``(n_atoms,)``."""
    forces: Tensor
    """eV/Angstrom, shape ``(n_atoms, 3)``."""
    virial: Tensor
    """Derivative of the energy with respect to a strain, eV, shape ``(3, 3)``, symmetric or not."""


Evaluator = Callable[[Atoms, Neighbours], Evaluation]
"""Evaluates frames with their pairs within :attr:`Potential.r_cut`, and keeps what successive frames share."""


class Potential(ABC):
    """A start or fine-tuned model; a frozen dataclass of its family.

    ``E = sum_i [ network_i + offset(Z_i) ]``: offsets are the energies of free atoms that the family has, if any, and
    the reference that was fitted on training labels.
    """

    family: ClassVar[str]
    """Name of the family, which is that of its folder (:mod:`tlmc.potentials.registry`)."""
    advice: ClassVar[str] = ""
    """What to do about an element that it lacks."""

    name: str
    """Start model this one descends from."""
    fingerprint: str
    """SHA-256 that identifies the start model's weights."""
    reference: ReferenceEnergies | None
    """Offset fitted on training labels, added to every energy."""
    element_map: Mapping[str, str]
    """Borrowed elements, new element -> donor."""
    committee: bool
    """Whether its members are models of their own, whose spread means something."""

    @property
    @abstractmethod
    def elements(self) -> tuple[str, ...]:
        """Every element the model accepts, borrowed ones included."""

    @property
    @abstractmethod
    def r_cut(self) -> float:
        """Distance in Angstrom up to which it needs to know an atom's neighbours."""

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype:
        """Precision of the weights."""

    @property
    def reach(self) -> float:
        """Distance in Angstrom up to which the energy of an atom depends on others."""
        return self.r_cut

    @property
    def n_weights(self) -> int:
        """Number of weights."""
        return sum(tensor.numel() for tensor in self.tensors().values())

    @property
    def members(self) -> int:
        """Number of ensemble members."""
        return 1

    @abstractmethod
    def evaluator(self, device: torch.device) -> Evaluator:
        """Return what evaluates frames on a device."""

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """Return all weights by name, and whatever else a model file keeps as tensors."""

    @abstractmethod
    def to_json(self) -> dict[str, Any]:
        """Return all that is not a tensor as plain JSON types."""

    @classmethod
    @abstractmethod
    def from_json(cls, content: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Self:
        """Put a model together again.

        Raises
        ------
        ModelError, KeyError, IndexError, TypeError, ValueError, AttributeError
            If something is missing, or not what `to_json` and `tensors` give.
        """

    @abstractmethod
    def to(self, dtype: torch.dtype) -> Self:
        """Return a copy with weights in another precision."""

    def with_reference(self, reference: ReferenceEnergies | None) -> Self:
        """Return a copy that adds these reference energies."""
        return dataclasses.replace(self, reference=reference)  # type: ignore[type-var]

    def with_elements(self, mapping: Mapping[str, str], borrowing: Borrowing = "relabel") -> Self:
        """Return a copy in which new elements borrow from those that the model knows; an empty mapping changes nothing.

        Parameters
        ----------
        mapping
            New element to donor.
        borrowing
            How they borrow.

        Raises
        ------
        ModelError
            If the family has no way to borrow, a new element is none or known already, or a donor is unknown.
        ConfigError
            If there is no such way to borrow.
        """
        if borrowing not in ("relabel", "extend"):
            raise ConfigError(f"borrowing must be relabel or extend, got {borrowing!r}")
        if mapping:
            raise ModelError(f"{self.name} cannot let elements borrow from others, as asked for {', '.join(mapping)}")
        return self

    def check_elements(self, frame: Atoms) -> None:
        """Make sure that the model knows all elements of a frame.

        Raises
        ------
        ModelError
            If it does not; the sentence counts the atoms.
        """
        known = set(self.elements)
        missing = Counter(symbol for symbol in frame.get_chemical_symbols() if symbol not in known)
        if missing:
            listed = ", ".join(f"{symbol} ({count} atoms)" for symbol, count in sorted(missing.items()))
            raise ModelError(
                f"{self.name} has no network for {listed} in {frame.get_chemical_formula()}; it knows "
                f"{', '.join(self.elements)}{self.advice}"
            )

    def free_atoms(self, frame: Atoms) -> Tensor:
        """Return the energy of the free atom for every atom of a frame, float64 eV, shape ``(n_atoms,)``.

        Raises
        ------
        ModelError
            As :meth:`check_elements`.
        """
        self.check_elements(frame)
        return torch.zeros(len(frame), dtype=torch.float64)

    def offsets(self, frame: Atoms) -> Tensor:
        """Return energy of the free atom plus fitted reference of every atom, float64 eV, shape ``(n_atoms,)``.

        Raises
        ------
        ModelError
            If the model, or its fitted reference, does not cover an element of the frame.
        """
        total = self.free_atoms(frame)
        if self.reference is not None:
            fitted, symbols = self.reference.offsets, frame.get_chemical_symbols()
            missing = sorted(set(symbols) - set(fitted))
            if missing:
                raise ModelError(
                    f"the reference energies of this model were fitted for {', '.join(sorted(fitted))} only, not for "
                    f"{', '.join(missing)} in {frame.get_chemical_formula()}: fit them on frames of this composition"
                )
            total = total + torch.tensor([fitted[symbol] for symbol in symbols], dtype=torch.float64)
        return total

    def atomic_reference(self, frames: Sequence[Atoms]) -> Tensor:
        """Return `offsets` summed per frame, float64 eV, shape ``(n_frames,)``."""
        return torch.tensor([float(self.offsets(frame).sum()) for frame in frames], dtype=torch.float64)

    def weights_hash(self) -> str:
        """Return the SHA-256 of all tensors, in the order of :meth:`tensors`."""
        digest = hashlib.sha256()
        for tensor in self.tensors().values():
            digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()

    def check_weights(self, where: str) -> None:
        """Make sure that no weight is infinite or NaN, as a training that diverges leaves them.

        Parameters
        ----------
        where
            Begins the sentence.

        Raises
        ------
        ModelError
            If one is.
        """
        broken = sorted(
            {name.rpartition(".")[0] or name for name, x in self.tensors().items() if not bool(torch.isfinite(x).all())}
        )
        if broken:
            raise ModelError(
                f"{where}: {', '.join(broken)} are infinite or NaN, as a training leaves them that diverged"
            )
