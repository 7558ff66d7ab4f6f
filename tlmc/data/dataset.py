"""The labelled structures that everything else takes."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
from ase import Atoms
from numpy.typing import ArrayLike, NDArray

from tlmc.data.geometry import canonical_bytes, duplicate_groups, element_counts, frame_hash, is_crystal

CHARGE_WORDS = (
    "charge", "totalcharge", "netcharge", "totcharge", "chargetotal", "molecularcharge", "moleculecharge",
    "systemcharge",
)  # fmt: skip
"""Keys of ``info``, as `key_word` writes them, that say the total charge in elementary charges."""
MULTIPLICITY_WORDS = ("multiplicity", "spinmultiplicity", "mult", "spinmult")
"""The same of 2S+1."""
UNPAIRED_WORDS = ("unpairedelectrons", "nunpaired", "numunpaired", "uhf", "nuhf")
"""The same of the number of unpaired electrons, 2S."""
SPIN_WORDS = ("spin", "totalspin", "spintotal")
"""The same of 2S+1 in some data sets and 2S in others."""

_STATE_WORDS = {
    "charge": (*CHARGE_WORDS, "initialcharge"),
    "spin": SPIN_WORDS + MULTIPLICITY_WORDS + UNPAIRED_WORDS,
    "magnetic moment": ("initialmagmom",),
}


@dataclass(frozen=True, eq=False)
class Dataset:
    """Structures with energies and forces, in eV and Angstrom, checked by `tlmc.data.checks.check_dataset`.

    Two are equal if their content is (`hash`), wherever it came from.
    """

    frames: tuple[Atoms, ...]
    """``n_frames`` structures without a calculator; ``info`` keeps what the file says besides the labels."""
    energies: NDArray[np.float64]
    """Shape ``(n_frames,)``, eV."""
    forces: tuple[NDArray[np.float64], ...]
    """Per frame ``(n_atoms, 3)``, eV/Angstrom."""
    stresses: tuple[NDArray[np.float64] | None, ...]
    """Per frame ``(6,)`` in ASE's Voigt order and sign (xx, yy, zz, yz, xz, xy), eV/Angstrom^3, or None."""
    name: str
    """``molcrys-mace/21_urea``, ``naphthalene``, or the stem of the file."""
    source: str
    """Path or URL it was read from."""
    units: str
    """Units of the file, before conversion."""
    level_of_theory: str
    """Method of the labels, empty when unknown."""
    frame_numbers: NDArray[np.int64]
    """Position of each frame in the source, shape ``(n_frames,)``; some of those in it may be left out."""
    free_atoms: Mapping[str, float] = field(default_factory=dict)
    """Element -> energy of the isolated atom, eV, where the source has it; these are no frames of the set."""

    def __eq__(self, other: object) -> bool:
        """Compare contents."""
        return self.hash == other.hash if isinstance(other, Dataset) else NotImplemented

    def __hash__(self) -> int:
        """Return a number that goes with ``==``."""
        return hash(self.hash)

    def __len__(self) -> int:
        """Return the number of frames."""
        return len(self.frames)

    @cached_property
    def hash(self) -> str:
        """SHA-256 of geometries and labels in their order, independent of the path and the format they came from."""
        digest = hashlib.sha256()
        for frame, energy, forces, stress in zip(self.frames, self.energies, self.forces, self.stresses, strict=True):
            digest.update(bytes.fromhex(frame_hash(frame)))
            digest.update(
                canonical_bytes(energy)
                + canonical_bytes(forces)
                + (b"none" if stress is None else canonical_bytes(stress))
            )
        for symbol, energy in self.free_atoms.items():
            digest.update(symbol.encode() + canonical_bytes(energy))
        return digest.hexdigest()

    @cached_property
    def is_crystal(self) -> NDArray[np.bool_]:
        """True for frames that are crystals (`tlmc.data.geometry.is_crystal`), shape ``(n_frames,)``."""
        return np.array([is_crystal(frame) for frame in self.frames], dtype=np.bool_)

    @cached_property
    def duplicates(self) -> NDArray[np.int64]:
        """For each frame the first one with its geometry (`duplicate_groups`), itself if unique, ``(n_frames,)``."""
        return duplicate_groups(self.frames)

    @cached_property
    def charge_states(self) -> tuple[Mapping[str, float], ...]:
        """Per frame ``charge``, ``spin`` (or multiplicity) and initial ``magnetic moment``, those that it says."""
        return tuple(charge_state(frame.info) for frame in self.frames)

    @cached_property
    def elements(self) -> tuple[str, ...]:
        """Chemical symbols that occur, by atomic number."""
        return tuple(element_counts(self.frames))

    @cached_property
    def n_atoms(self) -> NDArray[np.int64]:
        """Number of atoms of each frame, shape ``(n_frames,)``."""
        return np.array([len(frame) for frame in self.frames], dtype=np.int64)

    def subset(self, indices: ArrayLike) -> Dataset:
        """Return the frames at `indices` (integers, or one boolean per frame), in that order.

        Raises
        ------
        IndexError
            If an index is out of range or the boolean mask has another length.
        """
        chosen = np.arange(len(self))[np.asarray(indices)] if np.size(indices) else np.empty(0, dtype=np.int64)
        return Dataset(
            frames=tuple(self.frames[k] for k in chosen),
            energies=self.energies[chosen],
            forces=tuple(self.forces[k] for k in chosen),
            stresses=tuple(self.stresses[k] for k in chosen),
            name=self.name,
            source=self.source,
            units=self.units,
            level_of_theory=self.level_of_theory,
            frame_numbers=self.frame_numbers[chosen],
            free_atoms=self.free_atoms,
        )

    def crystals(self) -> Dataset:
        """Return the frames that are crystals."""
        return self.subset(self.is_crystal)

    def molecules(self) -> Dataset:
        """Return the frames that are not crystals."""
        return self.subset(~self.is_crystal)


@lru_cache
def letters(key: str) -> str:
    """Return the letters of a key in lower case: keys are written ``scf_converged``, ``SCF-converged``, ..."""
    return "".join(re.findall("[a-z]", key.lower()))


@lru_cache
def key_word(key: str) -> str:
    """Return a key in lower case without blanks and signs: ``total_charge``, ``totalCharge``, ``Total charge``, ..."""
    return re.sub(r"[\W_]", "", key.lower())


def charge_state(info: Mapping[Any, Any]) -> dict[str, float]:
    """Return what the info of a frame says of its total charge and spin."""
    said = {key_word(str(key)): value for key, value in info.items()}
    state = {}
    for name, words in _STATE_WORDS.items():
        for word in words:
            value = said.get(word)
            if isinstance(value, (int, float, np.number)) and not isinstance(value, bool) and np.isfinite(value):
                # the sum of guesses per atom, which may be fractions
                state[name] = round(float(value), 0 if name == "magnetic moment" else 1) + 0.0
                break
    return state


def dataset_facts(dataset: Dataset) -> dict[str, Any]:
    """Return what a report says of a data set: name, source, level of theory, number of frames, hash."""
    return {
        "name": dataset.name,
        "source": dataset.source,
        "level_of_theory": dataset.level_of_theory,
        "frames": len(dataset),
        "hash": dataset.hash,
    }
