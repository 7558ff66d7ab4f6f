"""Energies, forces and stress of a start or fine-tuned model, for lists of frames and as an ASE calculator."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from ase import Atoms
from ase.calculators.calculator import Calculator, all_changes
from numpy.typing import NDArray
from torch import Tensor

from tlmc.arguments import checked
from tlmc.data.dataset import CHARGE_WORDS, MULTIPLICITY_WORDS, UNPAIRED_WORDS, key_word
from tlmc.descriptors.pairs import Neighbours, neighbours
from tlmc.devices import find_device
from tlmc.errors import DataError
from tlmc.potentials.model import Evaluator, Potential, Predictions

_LOG = logging.getLogger(__name__)
_NEUTRAL = "the model knows neutral structures without unpaired electrons only, and answers as for such a one"

OVERLAP = 0.1
"""Distance in Angstrom below which two atoms count as one written twice."""
CLOSE = 0.6
"""Distance in Angstrom below which the descriptor sees less and less of a neighbour: repulsion gives way to a hole."""
_HOLE = f"closer than {CLOSE} A the descriptor hardly sees a neighbour, and energies fall instead of rising"


class _Result(NamedTuple):
    energies: NDArray[np.float64]
    forces: NDArray[np.float64]
    stress: NDArray[np.float64] | None
    closest: float
    """Smallest distance of two atoms within the cutoff, infinite if there is none."""


@checked
def predict(model: Potential, frames: Sequence[Atoms], device: str | torch.device = "cpu") -> Predictions:
    """Return energies, forces and stresses of frames, each evaluated by itself.

    Frames that say that they are charged or have unpaired electrons are counted in a warning: the model knows neither,
    and answers as for the neutral structure. So are frames with atoms closer than `CLOSE`.

    Parameters
    ----------
    model
        Its weights' precision is that of the computation; sums over atoms are float64 in any case.
    frames
        Molecules and crystals, of any size against the cutoff.
    device
        ``cpu``, ``cuda`` or ``cuda:N``. A GPU adds up in an order of its own, so that results are those of the
        processor to rounding; for single frames of a hundred atoms it is no faster.

    Raises
    ------
    ModelError
        If a frame holds an element that the model, or its fitted reference, does not cover.
    DataError
        If a frame has no atoms, positions or cell are not finite, a periodic direction has no cell vector or next to
        none, or two atoms coincide.
    ConfigError
        If there is no such device.
    """
    evaluator = model.evaluator(find_device(device))
    results = [_evaluate(model, frame, f"frame {k}", evaluator) for k, frame in enumerate(frames)]
    unusual = [(k, said) for k, frame in enumerate(frames) if (said := _charge_or_spin(frame))]
    if unusual:
        k, said = unusual[0]
        _LOG.warning("%d of %d frames are not neutral (frame %d: %s): %s", len(unusual), len(frames), k, said, _NEUTRAL)
    close = [(k, result.closest) for k, result in enumerate(results) if result.closest < CLOSE]
    if close:
        k, distance = close[0]
        _LOG.warning(
            "%d of %d frames hold atoms too close to each other (frame %d: %.2f A): %s",
            len(close), len(frames), k, distance, _HOLE,
        )  # fmt: skip
    return Predictions(
        np.array([result.energies.sum() for result in results], dtype=np.float64),
        tuple(result.forces for result in results),
        tuple(result.stress for result in results),
    )


class TlmcCalculator(Calculator):
    """ASE calculator of a potential: energy, energies of atoms, forces, and stress for 3D-periodic frames.

    Parameters
    ----------
    potential
        A start or fine-tuned model; convert it (``potential.to(torch.float64)``) where float32 is too coarse, e.g. for
        finite differences or tight relaxations.
    device
        ``cpu``, ``cuda`` or ``cuda:N``: where networks and descriptors are computed, whatever device the model was
        trained on. Neighbours are found on the processor. A GPU pays off for large cells and ensembles.

    Raises
    ------
    ConfigError
        If there is no such device.

    Notes
    -----
    Of a frame that says it is charged or has unpaired electrons (``info["charge"]``, initial charges, magnetic
    moments) a warning is given, once: the model knows neither, and answers as for the neutral structure. Another one
    tells, once, of atoms closer than `CLOSE`, where a relaxation or dynamics has fallen into a hole.

    ``free_energy`` equals ``energy``. Asking for the stress of a frame that is not periodic in three directions raises
    ASE's ``PropertyNotImplementedError``. Neighbours are kept from step to step (:class:`SkinNeighbours`), and so are
    the networks; assign no other potential to a calculator, make another one.
    """

    implemented_properties = ["energy", "free_energy", "energies", "forces", "stress"]

    @checked
    def __init__(self, potential: Potential, device: str | torch.device = "cpu") -> None:
        Calculator.__init__(self)
        self.potential = potential
        self.device = find_device(device)
        self._find = SkinNeighbours(potential.r_cut)
        self._evaluator = potential.evaluator(self.device)
        self._warned: set[str] = set()

    def calculate(
        self,
        atoms: Atoms | None = None,
        properties: Sequence[str] = ("energy",),
        system_changes: Sequence[str] = all_changes,
    ) -> None:
        """Evaluate a frame; all properties come out of one sweep (ASE calls this)."""
        Calculator.calculate(self, atoms, properties, system_changes)
        frame = cast(Atoms, self.atoms)
        result = _evaluate(self.potential, frame, "frame", self._evaluator, self._find)
        if said := _charge_or_spin(frame):
            self._warn(f"{frame.get_chemical_formula()} is not neutral ({said})", _NEUTRAL)
        if result.closest < CLOSE:
            self._warn(f"{frame.get_chemical_formula()} holds atoms {result.closest:.2f} A apart", _HOLE)
        energy = float(result.energies.sum())
        self.results: dict[str, Any] = {
            "energy": energy,
            "free_energy": energy,
            "energies": result.energies,
            "forces": result.forces,
        }
        if result.stress is not None:
            self.results["stress"] = result.stress

    def _warn(self, what: str, why: str) -> None:
        """Say something about a frame, once for each reason."""
        if why not in self._warned:
            self._warned.add(why)
            _LOG.warning("%s: %s", what, why)


class SkinNeighbours:
    """Neighbours of a frame that moves: a list somewhat too long serves until an atom has moved by half its skin.

    It is made when a frame resembles the one before, so that frames with nothing in common do not pay for it.

    Parameters
    ----------
    r_cut
        Cutoff in Angstrom.
    skin
        The list holds pairs up to ``r_cut + skin``; a wide skin is rebuilt seldom, but every step looks at more pairs.
    """

    def __init__(self, r_cut: float, skin: float = 0.5) -> None:
        self.r_cut, self.skin = r_cut, skin
        self.builds = 0
        """How often a list was made."""
        self._origin = Atoms()
        self._list: tuple[Neighbours, Tensor] | None = None

    def __call__(self, frame: Atoms, dtype: torch.dtype) -> Neighbours:
        """Return the pairs within the cutoff, as :func:`tlmc.descriptors.pairs.neighbours` does."""
        if not self._resembles(frame):
            self._origin, self._list = _geometry(frame), None
            return neighbours(frame, self.r_cut, dtype)
        x = torch.from_numpy(frame.positions)
        if self._list is None:
            self.builds += 1
            self._origin, pairs = _geometry(frame), neighbours(frame, self.r_cut + self.skin)
            # from the neighbour to its image, a constant while the cell is
            self._list = pairs, pairs.vectors - (x[pairs.neighbour] - x[pairs.centre])
        (centre, neighbour, _), shifts = self._list
        vectors = x.index_select(0, neighbour) - x.index_select(0, centre) + shifts
        near = torch.nonzero(vectors.square().sum(1) < self.r_cut**2).squeeze(1)
        return Neighbours(centre[near], neighbour[near], vectors.index_select(0, near).to(dtype))

    def _resembles(self, frame: Atoms) -> bool:
        origin = self._origin
        return (
            len(origin) == len(frame)
            and np.array_equal(origin.pbc, frame.pbc)
            and np.array_equal(origin.cell.array, frame.cell.array)
            and float(np.square(origin.positions - frame.positions).sum(1).max(initial=0.0)) < (0.5 * self.skin) ** 2
        )


def _geometry(frame: Atoms) -> Atoms:
    return Atoms(positions=frame.positions, cell=frame.cell, pbc=frame.pbc)


def _evaluate(
    model: Potential, frame: Atoms, label: str, evaluator: Evaluator, find: SkinNeighbours | None = None
) -> _Result:
    """Return energies of the atoms, forces and stress of one frame."""
    pairs, closest = checked_pairs(model, frame, label, find)
    offsets = model.offsets(frame)
    found = evaluator(frame, pairs)
    stress = None
    if frame.pbc.all():
        stress = (0.5 * (found.virial + found.virial.T) / frame.get_volume()).numpy()
        stress = stress[[0, 1, 2, 1, 0, 0], [0, 1, 2, 2, 2, 1]]
    return _Result((found.energies + offsets).numpy(), found.forces.numpy(), stress, closest)


def checked_pairs(
    model: Potential, frame: Atoms, label: str, find: SkinNeighbours | None = None
) -> tuple[Neighbours, float]:
    """Return the pairs within the cutoff of a model and the smallest distance, for a frame that passed the checks.

    The distance, in Angstrom, is infinite if there are no pairs.

    Raises
    ------
    ModelError, DataError
        As `predict`; the sentence begins with the label.
    """
    if not len(frame):
        raise DataError(f"{label} has no atoms")
    model.check_elements(frame)
    name = f"{label} ({frame.get_chemical_formula()})"
    for what, values in (("position", frame.positions), ("cell vector", frame.cell.array)):
        wrong = ~np.isfinite(values).all(1)
        if wrong.any():
            raise DataError(f"{name}: {what} {int(wrong.argmax())} is {values[wrong.argmax()].tolist()}")
    rank = int(np.linalg.matrix_rank(frame.cell.array[frame.pbc])) if frame.pbc.any() else 0
    if rank < frame.pbc.sum():
        raise DataError(
            f"{name}: periodic in {frame.pbc.sum()} directions, but the cell {frame.cell.array.tolist()} spans {rank}"
        )
    if rank:
        # heights of the cell, the distances between its faces; flat ones mean millions of images
        periodic = frame.cell.array[frame.pbc]
        height = float(1.0 / np.sqrt(np.linalg.inv(periodic @ periodic.T).diagonal().max()))
        if height < OVERLAP:
            raise DataError(f"{name}: the cell {frame.cell.array.tolist()} is only {height:.3g} A high")
    pairs = neighbours(frame, model.r_cut, model.dtype) if find is None else find(frame, model.dtype)
    if not len(pairs.vectors):
        return pairs, np.inf
    distance, k = torch.linalg.vector_norm(pairs.vectors, dim=1).min(0)
    if distance < OVERLAP:
        i, j = int(pairs.centre[k]), int(pairs.neighbour[k])
        raise DataError(f"{name}: atoms {i} and {j} are {float(distance):.3g} A apart")
    return pairs, float(distance)


def _charge_or_spin(frame: Atoms) -> str:
    """Say what makes a frame other than a neutral one without unpaired electrons; an empty text if nothing does."""
    for words, usual in ((CHARGE_WORDS, 0.0), (MULTIPLICITY_WORDS, 1.0), (UNPAIRED_WORDS, 0.0)):
        for key, value in frame.info.items():
            if key_word(str(key)) in words and (number := _number(value, usual)) != usual:
                return f"{key} {number:g}"
    # partial charges of atoms add up to a whole number
    if abs(charge := float(frame.get_initial_charges().sum())) > 0.5:
        return f"initial charges add up to {charge:g}"
    if abs(moment := float(frame.get_initial_magnetic_moments().sum())) > 0.5:
        return f"initial magnetic moments add up to {moment:g}"
    return ""


def _number(value: Any, usual: float) -> float:
    """Return a value of ``info`` as a number, the usual one for what is none."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        return usual
    return number if np.isfinite(number) else usual
