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
from tlmc.descriptors.aev import Neighbours, aev, aev_backward, aev_terms, neighbours
from tlmc.devices import find_device
from tlmc.equality import equal_by_content
from tlmc.errors import DataError, ModelError
from tlmc.labelled import CHARGE_WORDS, MULTIPLICITY_WORDS, UNPAIRED_WORDS, key_word
from tlmc.potentials.model import Layer, Potential
from tlmc.potentials.network import backward, forward

_LOG = logging.getLogger(__name__)
_CPU = torch.device("cpu")
_NEUTRAL = "the model knows neutral structures without unpaired electrons only, and answers as for such a one"

OVERLAP = 0.1
"""Distance in Angstrom below which two atoms count as one written twice."""
CLOSE = 0.6
"""Distance in Angstrom below which the descriptor sees less and less of a neighbour: repulsion gives way to a hole."""
_HOLE = f"closer than {CLOSE} A the descriptor hardly sees a neighbour, and energies fall instead of rising"


@equal_by_content
class Predictions(NamedTuple):
    """What a model says about some frames."""

    energies: NDArray[np.float64]
    """eV, shape ``(n_frames,)``, self energies and fitted reference included."""
    forces: tuple[NDArray[np.float64], ...]
    """eV/Angstrom, each of shape ``(n_atoms, 3)``."""
    stresses: tuple[NDArray[np.float64] | None, ...] = ()
    """eV/Angstrom^3 in ASE's Voigt order (xx, yy, zz, yz, xz, xy), or None for a frame not periodic in 3 directions."""


class _Evaluation(NamedTuple):
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
    where = find_device(device)
    networks: dict[tuple[int, ...], _ActiveNetworks] = {}
    results = [_evaluate(model, frame, f"frame {k}", None, networks, where) for k, frame in enumerate(frames)]
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


@checked
def member_energies(model: Potential, frame: Atoms) -> NDArray[np.float64]:
    """Return the energy of a frame according to each member of the ensemble, eV, shape ``(members,)``.

    Only the mean of these numbers is a prediction, unless the members were trained each by itself
    (:attr:`Potential.committee`); for a spread, use `energy_spread`, which makes sure of that.

    Raises
    ------
    ModelError, DataError
        As in `predict`.
    """
    species, pairs = environment(model, frame, "frame")
    features = aev(model.aev, len(model.symbols), species, pairs)
    if model.enrichment is not None:
        features = torch.cat([features, model.enrichment.columns(frame).to(features.dtype)], dim=1)
    total = torch.zeros(model.members, dtype=torch.float64)
    for s, rows in _by_species(species):
        total += forward(model.networks[model.symbols[s]], features[rows])[0].to(torch.float64).sum(1)
    energies: NDArray[np.float64] = (model.scale * total + model.offsets(frame).sum()).numpy()
    return energies


@checked
def energy_spread(model: Potential, frames: Sequence[Atoms]) -> NDArray[np.float64]:
    r"""Return the disagreement of the members, :math:`\sigma / \sqrt{N}` (query by committee; thesis 2.4).

    :math:`\sigma` is the sample standard deviation (``members - 1``) of the energies of a frame of N atoms; dividing by
    the root of N follows ANI, since independent errors of atoms grow like that.

    Returns
    -------
    NDArray
        eV per root of an atom, shape ``(n_frames,)``.

    Raises
    ------
    ModelError
        If the model has one member, or members that are no committee, as those of a fine-tuned ensemble
        (:attr:`Potential.committee`), or as in `predict`.
    """
    if model.members < 2:
        raise ModelError(f"{model.name} has {model.members} member: a spread needs an ensemble, e.g. ani2x")
    model.check_committee()
    return np.array([member_energies(model, frame).std(ddof=1) / np.sqrt(len(frame)) for frame in frames])


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
        self._find = SkinNeighbours(potential.aev.r_cut_radial)
        self._networks: dict[tuple[int, ...], _ActiveNetworks] = {}
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
        result = _evaluate(self.potential, frame, "frame", self._find, self._networks, self.device)
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
        """Return the pairs within the cutoff, as :func:`tlmc.descriptors.aev.neighbours` does."""
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


class _ActiveNetworks:
    """Networks of the elements of one frame, first layers without the columns that are zero in it."""

    def __init__(self, model: Potential, present: Sequence[int], device: torch.device) -> None:
        columns = model.columns(present)
        self.layers = []
        for s in present:
            first, *others = model.networks[model.symbols[s]]
            layers = (Layer(first.weight[:, columns].contiguous(), first.bias), *others)
            self.layers.append(tuple(Layer(layer.weight.to(device), layer.bias.to(device)) for layer in layers))


def _evaluate(
    model: Potential,
    frame: Atoms,
    label: str,
    find: SkinNeighbours | None = None,
    networks: dict[tuple[int, ...], _ActiveNetworks] | None = None,
    device: torch.device = _CPU,
) -> _Evaluation:
    """Return energies of the atoms, forces and stress of one frame."""
    channels, pairs = environment(model, frame, label, find)
    # elements that are absent give columns of zeros: number those present, as if the model knew no others
    present, species = torch.unique(channels, return_inverse=True)
    n_species, key = len(present), tuple(present.tolist())
    networks = {} if networks is None else networks
    if key not in networks:
        networks[key] = _ActiveNetworks(model, key, device)
    species, pairs = species.to(device), Neighbours(*(part.to(device) for part in pairs))
    terms = aev_terms(model.aev, n_species, species, pairs)
    features, pull_back = aev(model.aev, n_species, species, pairs, terms), None
    if model.enrichment is not None:
        columns, pull_back = model.enrichment.columns_and_slopes(frame)
        features = torch.cat([features, columns.to(features)], dim=1)
    output = torch.zeros(len(frame), dtype=torch.float64, device=device)
    gradient = torch.zeros_like(features)
    for s, rows in _by_species(species):
        layers = networks[key].layers[s]
        energies, slopes = forward(layers, features[rows])
        output[rows] = energies.to(torch.float64).mean(0)
        gradient[rows] = backward(layers, slopes)
    # dE/dv of every pair; a pair vector is x_j + shift - x_i
    own, extra = gradient.split([model.aev.length(n_species), features.shape[1] - model.aev.length(n_species)], dim=1)
    slope = aev_backward(model.aev, n_species, species, pairs, own.contiguous(), terms).to(torch.float64) * model.scale
    forces = torch.zeros(len(frame), 3, dtype=torch.float64, device=device)
    forces.index_add_(0, pairs.centre, slope)
    forces.index_add_(0, pairs.neighbour, -slope)
    # a strain e turns every v into (1 + e) v; each pair is listed from both ends, so nothing is counted twice
    virial = slope.T @ pairs.vectors.to(torch.float64)
    forces, virial, output = forces.cpu(), virial.cpu(), output.cpu()
    if pull_back is not None:
        richer = pull_back(extra.cpu())
        forces += richer.forces * model.scale
        virial += richer.virial * model.scale
    stress = None
    if frame.pbc.all():
        stress = (0.5 * (virial + virial.T) / frame.get_volume()).numpy()
        stress = stress[[0, 1, 2, 1, 0, 0], [0, 1, 2, 2, 2, 1]]
    closest = float(terms.distances.min()) if len(terms.distances) else np.inf
    return _Evaluation((model.scale * output + model.offsets(frame)).numpy(), forces.numpy(), stress, closest)


def environment(
    model: Potential, frame: Atoms, label: str, find: SkinNeighbours | None = None
) -> tuple[Tensor, Neighbours]:
    """Return network indices and neighbours of a frame that passed the checks.

    Raises
    ------
    ModelError, DataError
        As `predict`; the sentence begins with the label.
    """
    if not len(frame):
        raise DataError(f"{label} has no atoms")
    species = model.species(frame)
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
    pairs = neighbours(frame, model.aev.r_cut_radial, model.dtype) if find is None else find(frame, model.dtype)
    if len(pairs.vectors):
        distance, k = torch.linalg.vector_norm(pairs.vectors, dim=1).min(0)
        if distance < OVERLAP:
            i, j = int(pairs.centre[k]), int(pairs.neighbour[k])
            raise DataError(f"{name}: atoms {i} and {j} are {float(distance):.3g} A apart")
    return species, pairs


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


def _by_species(species: Tensor) -> list[tuple[int, Tensor]]:
    """Return every species present with the atoms it has."""
    return [(int(s), torch.nonzero(species == s).squeeze(1)) for s in species.unique()]
