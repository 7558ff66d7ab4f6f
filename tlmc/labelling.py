"""Perturb a structure and label the frames with any ASE calculator: deterministic, parallel, resumable.

A `Recipe` is data: a structure, how it is relaxed, how it is perturbed, which method labels it. `build` follows it
stage by stage (relax, perturb, screen, label), and every stage is a public function for structures of your own.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import importlib.metadata
import importlib.util
import json
import logging
import multiprocessing
import os
import runpy
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from pathlib import Path
from subprocess import CalledProcessError
from typing import ClassVar, NamedTuple, TypeVar

import ase.io
import numpy as np
from ase import Atoms, units
from ase.calculators.calculator import BaseCalculator, CalculatorSetupError
from ase.calculators.singlepoint import SinglePointCalculator
from ase.data import covalent_radii
from ase.data.vdw_alvarez import vdw_radii
from ase.filters import FrechetCellFilter
from ase.md.velocitydistribution import Stationary
from ase.md.verlet import VelocityVerlet
from ase.neighborlist import neighbor_list
from ase.optimize import BFGS
from numpy.random import Generator, SeedSequence, default_rng
from numpy.typing import NDArray
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import breadth_first_order, connected_components
from scipy.spatial.transform import Rotation

from tlmc.errors import ConfigError, DataError
from tlmc.files import atomic_path, sha256_file, write_json

# tlmc.datasets and tlmc.geometry are imported where they are used: they load torch, for which every worker process
# would wait

logger = logging.getLogger(__name__)

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]
CalculatorFactory = Callable[[], BaseCalculator]
_Job = TypeVar("_Job")
_Result = TypeVar("_Result")

_DECIMALS = 8
"""Decimals of positions and cells. extxyz keeps as many, so a label belongs to exactly the geometry in the file."""


# --- methods -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Method:
    """A level of theory: its name, written into every frame, and a picklable factory of its ASE calculator."""

    name: str
    make: CalculatorFactory


@dataclass(frozen=True)
class TBLiteFactory:
    """Factory of quiet tblite calculators."""

    hamiltonian: str = "GFN2-xTB"
    accuracy: float = 0.1
    """Scales tblite's convergence thresholds; at 0.1 energies are converged to about 1e-10 eV."""

    def __call__(self) -> BaseCalculator:
        """Return a new calculator.

        Raises
        ------
        ConfigError
            If tblite is not installed.
        """
        try:
            from tblite.ase import TBLite  # optional dependency, and its OpenMP reads the thread count on import
        except ModuleNotFoundError as error:
            raise ConfigError(f"{self.hamiltonian} labels need tblite: pip install 'tlmc[label]'") from error
        return TBLite(method=self.hamiltonian, accuracy=self.accuracy, verbosity=0)


@dataclass(frozen=True)
class ImportedFactory:
    """Factory named by ``module:function`` or ``file.py:function``, looked up where it is called."""

    target: str

    def __call__(self) -> BaseCalculator:
        """Return what the named function returns.

        Raises
        ------
        ConfigError
            If the module, file or function does not exist or returns something else than an ASE calculator.
        """
        place, _, function = self.target.rpartition(":")
        try:
            if place.endswith(".py"):
                make = runpy.run_path(place)[function]
            else:
                make = getattr(importlib.import_module(place), function)
        except (ModuleNotFoundError, FileNotFoundError, AttributeError, KeyError) as error:
            raise ConfigError(f"no calculator at {self.target!r} ({error})") from error
        calculator = make()
        if not isinstance(calculator, BaseCalculator):
            raise ConfigError(f"{self.target!r} must return an ASE calculator, got {type(calculator).__name__}")
        return calculator


def method(name: str, level_of_theory: str = "") -> Method:
    """Return a method by name: ``gfn2-xtb``, ``gfn1-xtb``, or ``module:function`` / ``file.py:function`` of your own.

    Parameters
    ----------
    name
        The function of your own takes no argument and returns an ASE calculator with energy and forces (and stress
        for crystals).
    level_of_theory
        What to call a method of your own in the frames, ``"r2SCAN, VASP 6.4, 440 eV"``; by default its name.

    Raises
    ------
    ConfigError
        If the name is neither.
    """
    hamiltonians = {"gfn1-xtb": "GFN1-xTB", "gfn2-xtb": "GFN2-xTB"}
    if name.lower() in hamiltonians:
        factory = TBLiteFactory(hamiltonians[name.lower()])
        try:
            version = importlib.metadata.version("tblite")
        except importlib.metadata.PackageNotFoundError as error:
            raise ConfigError(f"{name} needs tblite: pip install 'tlmc[label]'") from error
        return Method(f"{factory.hamiltonian}, tblite {version}, Gamma point, accuracy {factory.accuracy}", factory)
    if ":" in name:
        if (file := Path(name.rpartition(":")[0])).suffix == ".py":
            # workers run in folders of their own
            name = f"{file.resolve()}:{name.rpartition(':')[2]}"
        return Method(level_of_theory or name, ImportedFactory(name))
    raise ConfigError(f"unknown method {name!r}: use gfn2-xtb, gfn1-xtb, module:function or file.py:function")


# --- molecules in a crystal --------------------------------------------------------------------------------------


class Bonds(NamedTuple):
    """Covalent bonds, each once; atom ``second`` is meant in the periodic image ``shift``."""

    first: IntArray
    second: IntArray
    shift: IntArray
    """Shape ``(n_bonds, 3)``."""

    def pairs(self) -> list[tuple[int, int]]:
        """Return the bonded pairs, sorted, whatever image they are in."""
        ordered = np.sort(np.column_stack([self.first, self.second]), axis=1)
        return sorted(map(tuple, ordered.tolist()))


def find_bonds(frame: Atoms, factor: float = 1.25) -> Bonds:
    """Return the pairs closer than ``factor`` times the sum of their covalent radii."""
    first, second, shift = neighbor_list("ijS", frame, factor * covalent_radii[frame.numbers])
    half = (first < second) | ((first == second) & (shift @ (10**8, 10**4, 1) > 0))
    return Bonds(first[half], second[half], shift[half])


def find_molecules(frame: Atoms, bonds: Bonds | None = None) -> list[IntArray]:
    """Return the atom indices of every molecule, the connected parts of the bond graph."""
    bonds = find_bonds(frame) if bonds is None else bonds
    graph = coo_matrix((np.ones(len(bonds.first)), (bonds.first, bonds.second)), shape=(len(frame), len(frame)))
    count, labels = connected_components(graph, directed=False)
    return [np.flatnonzero(labels == molecule) for molecule in range(count)]


def make_whole(frame: Atoms, bonds: Bonds | None = None) -> Atoms:
    """Return a copy whose molecules are not cut by the cell's faces, their centres inside the cell.

    Raises
    ------
    DataError
        If a bonded network runs through the whole crystal, so that it has no molecules.
    """
    bonds = find_bonds(frame) if bonds is None else bonds
    whole: Atoms = frame.copy()
    steps = {}
    for i, j, shift in zip(bonds.first.tolist(), bonds.second.tolist(), bonds.shift, strict=True):
        steps[i, j], steps[j, i] = shift, -shift
    pairs = np.array(list(steps) or np.empty((0, 2)), dtype=int)
    graph = coo_matrix((np.ones(len(pairs)), (pairs[:, 0], pairs[:, 1])), shape=(len(frame), len(frame))).tocsr()
    images = np.zeros((len(frame), 3), dtype=int)
    for molecule in find_molecules(frame, bonds):
        order, parents = breadth_first_order(graph, molecule[0])
        for atom in order[1:]:
            images[atom] = images[parents[atom]] + steps[int(parents[atom]), int(atom)]
        centre = (frame.positions[molecule] + images[molecule] @ frame.cell.array).mean(axis=0)
        if frame.pbc.any():
            images[molecule] -= (np.floor(frame.cell.scaled_positions(centre) + 1e-9) * frame.pbc).astype(int)
    gaps = images[bonds.first] - images[bonds.second] + bonds.shift
    if gaps.any():
        k = int(np.flatnonzero(gaps.any(axis=1))[0])
        raise DataError(
            f"atoms {bonds.first[k]} and {bonds.second[k]} of {frame.get_chemical_formula()} close a bonded network "
            "through the periodic cell: a molecular crystal is expected"
        )
    whole.positions += images @ frame.cell.array
    return whole


def isolated_molecules(crystal: Atoms, vacuum: float = 8.0) -> list[Atoms]:
    """Return the first molecule of each formula in a crystal, alone in a periodic cubic box.

    Parameters
    ----------
    vacuum
        Distance kept from the molecule to every face of the box, Angstrom.
    """
    whole = make_whole(crystal)
    found: dict[str, Atoms] = {}
    for members in find_molecules(whole):
        molecule = Atoms(whole.numbers[members], positions=whole.positions[members])
        edge = float(np.ptp(molecule.positions, axis=0).max()) + 2 * vacuum
        molecule.set_cell([edge] * 3)
        molecule.center()
        molecule.pbc = True
        found.setdefault(molecule.get_chemical_formula(), molecule)
    return list(found.values())


# --- perturbations -----------------------------------------------------------------------------------------------


def _smooth_field(frame: Atoms, correlation: float, rng: Generator) -> FloatArray:
    """Return Gaussian displacements of unit variance, shape ``(n_atoms, 3)``, alike within ``correlation`` Angstrom.

    White noise averaged over neighbours rather than a factorised covariance: no eigenvectors, whose signs and order
    differ between machines.
    """
    noise = rng.standard_normal((len(frame), 3))
    if correlation == 0:
        return noise
    weights = np.exp(-((frame.get_all_distances(mic=True) / correlation) ** 2))
    field_: FloatArray = weights @ noise / np.sqrt((weights**2).sum(axis=1, keepdims=True))
    return field_


@dataclass(frozen=True)
class Rattle:
    """Gaussian displacements of the atoms, independent or alike for near atoms, which bends molecules softly."""

    count: int
    widths: tuple[float, ...]
    """Standard deviations per component, Angstrom; frames take them in turn."""
    correlation: float = 0.0
    """Distance over which displacements are alike, Angstrom; 0 for independent atoms."""
    group: ClassVar[str] = "rattle"

    def draw(self, crystal: Atoms, index: int, rng: Generator) -> tuple[Atoms, str]:
        """Return frame ``index`` and a few words on it."""
        frame = crystal.copy()
        width = self.widths[index % len(self.widths)]
        frame.positions += width * _smooth_field(frame, self.correlation, rng)
        return frame, f"atoms {width:g} A, correlated over {self.correlation:g} A"


@dataclass(frozen=True)
class RigidMotion:
    """Molecules shifted and turned as rigid bodies, plus a small rattle."""

    count: int
    shifts: tuple[float, ...]
    """Standard deviations per component, Angstrom; frames take shifts and angles in turn."""
    angles: tuple[float, ...]
    """Standard deviations of the rotation vector's components, degrees; as many as shifts."""
    rattle: float = 0.0
    correlation: float = 0.0
    group: ClassVar[str] = "rattle"

    def draw(self, crystal: Atoms, index: int, rng: Generator) -> tuple[Atoms, str]:
        """Return frame ``index`` and a few words on it."""
        frame = crystal.copy()
        shift, angle = list(zip(self.shifts, self.angles, strict=True))[index % len(self.shifts)]
        for members in find_molecules(crystal):
            centre = frame.positions[members].mean(axis=0)
            turn = Rotation.from_rotvec(np.radians(angle) * rng.standard_normal(3))
            frame.positions[members] = (
                turn.apply(frame.positions[members] - centre) + centre + shift * rng.standard_normal(3)
            )
        frame.positions += self.rattle * _smooth_field(frame, self.correlation, rng)
        return frame, f"molecules {shift:g} A and {angle:g} degrees"


@dataclass(frozen=True)
class Strain:
    """Strained cells: isotropic steps from end to end of a range plus random strain; molecules keep their shape."""

    count: int
    linear: tuple[float, float]
    """First and last isotropic strain, ``(-0.03, 0.03)`` for edges 3 % shorter to 3 % longer."""
    random: float
    """Standard deviation of each component of the added symmetric strain (shear and uniaxial)."""
    rattle: float = 0.0
    """Standard deviation of an added rattle, Angstrom."""
    correlation: float = 0.0
    group: ClassVar[str] = "strain"

    def draw(self, crystal: Atoms, index: int, rng: Generator) -> tuple[Atoms, str]:
        """Return frame ``index`` and a few words on it."""
        isotropic = float(np.linspace(*self.linear, self.count)[index])
        noise = self.random * rng.standard_normal((3, 3))
        frame = strained(crystal, (1 + isotropic) * np.eye(3) + (noise + noise.T) / 2)
        frame.positions += self.rattle * _smooth_field(frame, self.correlation, rng)
        return frame, f"isotropic {isotropic:+.4f}, random {self.random:g}"


@dataclass(frozen=True)
class MolecularDynamics:
    """Snapshots of short constant-energy runs that start from the structure at rest with twice the kinetic energy.

    In a harmonic solid half of it becomes potential energy, which leaves the named temperature without a thermostat.
    """

    temperatures: tuple[float, ...]
    """One run per temperature, K."""
    strains: tuple[float, ...]
    """Isotropic strain of each run's cell, as many as temperatures."""
    frames: int
    """Snapshots per run."""
    interval: int
    """Steps from one snapshot to the next."""
    timestep: float = 1.0
    """Femtoseconds."""
    group: ClassVar[str] = "md"

    @property
    def count(self) -> int:
        """Number of snapshots of all runs."""
        return len(self.temperatures) * self.frames

    def run(self, crystal: Atoms, run: int, seed: int, make: CalculatorFactory) -> list[Atoms]:
        """Return the snapshots of one run."""
        frame = strained(crystal, (1 + self.strains[run]) * np.eye(3))
        frame.calc = make()
        thermal = np.sqrt(frame.get_masses() * (units.kB * 2 * self.temperatures[run]))
        frame.set_momenta(default_rng(seed).standard_normal((len(frame), 3)) * thermal[:, None])
        Stationary(frame)
        dynamics = VelocityVerlet(frame, timestep=self.timestep * units.fs)
        snapshots = []
        for _ in range(self.frames):
            dynamics.run(self.interval)
            snapshots.append(Atoms(frame.numbers, frame.positions, cell=frame.cell, pbc=frame.pbc))
        return snapshots


Perturbation = Rattle | RigidMotion | Strain | MolecularDynamics


def strained(crystal: Atoms, deformation: FloatArray) -> Atoms:
    """Return a copy with the cell multiplied by ``deformation``, shape ``(3, 3)``, molecules moved but not deformed."""
    frame: Atoms = crystal.copy()
    frame.set_cell(crystal.cell.array @ deformation)
    for members in find_molecules(crystal):
        centre = crystal.positions[members].mean(axis=0)
        frame.positions[members] += centre @ deformation - centre
    return frame


def perturb(
    crystal: Atoms,
    plan: Sequence[Perturbation],
    seed: int,
    sampler: Method | None = None,
    processes: int = 1,
    work: Path | None = None,
) -> list[Atoms]:
    """Return the structure itself followed by its perturbed copies, the same for the same arguments.

    Every frame's randomness comes from its own seed, written into ``info["seed"]``, so changing one part of a plan
    leaves the frames of the others as they were.

    Parameters
    ----------
    crystal
        Molecules are made whole first.
    plan
        Perturbations, each with its count of frames.
    seed
        Seed of the plan.
    sampler
        Method that drives `MolecularDynamics`; needed only by plans that hold one.
    processes
        Processes that molecular dynamics runs on.
    work
        Folder that keeps finished molecular dynamics runs, for resuming.

    Returns
    -------
    list of Atoms
        With ``info`` keys ``group`` (start, rattle, strain or md), ``seed`` and ``perturbation``.

    Raises
    ------
    ConfigError
        If the plan holds molecular dynamics and there is no sampler.
    DataError
        If the structure is not made of molecules.
    """
    whole = make_whole(crystal)
    whole.calc = None
    whole.info = {}
    frames = [_tagged(whole, "start", seed, "none")]
    for part, step in enumerate(plan):
        if isinstance(step, MolecularDynamics):
            if sampler is None:
                raise ConfigError("molecular dynamics needs a sampler method, got None")
            seeds = [_seed(seed, part, run) for run in range(len(step.temperatures))]
            jobs = [_Run(whole, step, run, seeds[run], sampler) for run in range(len(seeds))]
            keys = [_digest(whole, repr((step, job.run, job.seed, sampler.name))) for job in jobs]
            paths = [work / f"md-{key}.extxyz" if work else None for key in keys]
            runs = _structures_in_processes(_run_dynamics, jobs, paths, processes)
            for job, snapshots in zip(jobs, runs, strict=True):
                frames += [
                    _tagged(
                        snapshot,
                        step.group,
                        job.seed,
                        f"{step.temperatures[job.run]:g} K, strain {step.strains[job.run]:+g}, "
                        f"after {(k + 1) * step.interval * step.timestep:g} fs",
                    )
                    for k, snapshot in enumerate(snapshots)
                ]
        else:
            for index in range(step.count):
                frame_seed = _seed(seed, part, index)
                frame, words = step.draw(whole, index, default_rng(frame_seed))
                frames.append(_tagged(frame, step.group, frame_seed, words))
    return frames


def _seed(seed: int, part: int, index: int) -> int:
    return int(SeedSequence((seed, part, index)).generate_state(1)[0])


def _bare(frame: Atoms) -> Atoms:
    """Return the geometry alone, rounded as the file will hold it."""
    return Atoms(
        frame.numbers,
        frame.positions.round(_DECIMALS) + 0.0,  # no negative zeros
        cell=frame.cell.array.round(_DECIMALS) + 0.0,
        pbc=frame.pbc,
    )


def _tagged(frame: Atoms, group: str, seed: int, words: str) -> Atoms:
    bare = _bare(frame)
    bare.info = {"group": group, "seed": seed, "perturbation": words}
    return bare


@dataclass(frozen=True)
class _Run:
    crystal: Atoms
    step: MolecularDynamics
    run: int
    seed: int
    sampler: Method


def _run_dynamics(job: _Run) -> list[Atoms]:
    return [_bare(snapshot) for snapshot in job.step.run(job.crystal, job.run, job.seed, job.sampler.make)]


# --- screening ---------------------------------------------------------------------------------------------------


class Rejection(NamedTuple):
    """A frame left out: its place in the list and why."""

    frame: int
    reason: str


class Screened(NamedTuple):
    """Frames worth a label, and the others."""

    frames: list[Atoms]
    rejected: list[Rejection]


def screen(
    frames: Sequence[Atoms],
    reference: Atoms,
    bond_factor: float = 1.25,
    contact_factor: float = 0.5,
    duplicate_tolerance: float = 1e-3,
) -> Screened:
    """Leave out frames with broken or fused molecules, overlapping atoms, and duplicates.

    Parameters
    ----------
    frames
        Same atoms in the same order as the reference.
    reference
        Structure whose bonds every frame must have, no more and no fewer.
    bond_factor
        Atoms closer than this times the sum of covalent radii are bonded.
    contact_factor
        Atoms of different molecules closer than this times the sum of van der Waals radii overlap; so do any two
        closer than 0.65 times the sum of covalent radii.
    duplicate_tolerance
        See `tlmc.geometry.duplicate_groups`, Angstrom.
    """
    from tlmc.geometry import duplicate_groups

    bonded = Counter(find_bonds(reference, bond_factor).pairs())
    copy_of = duplicate_groups(frames, duplicate_tolerance)
    kept, rejected = [], []
    for index, frame in enumerate(frames):
        reason = _broken(frame, bonded, bond_factor) or _overlap(frame, bond_factor, contact_factor)
        if not reason and copy_of[index] != index:
            reason = f"duplicate of frame {copy_of[index]}"
        if reason:
            rejected.append(Rejection(index, reason))
            logger.info("frame %d left out: %s", index, reason)
        else:
            kept.append(frame)
    return Screened(kept, rejected)


def _broken(frame: Atoms, bonded: Counter[tuple[int, int]], factor: float) -> str:
    bonds = Counter(find_bonds(frame, factor).pairs())
    changed = {"formed": bonds - bonded, "broken": bonded - bonds}
    for what, pairs in changed.items():
        for i, j in pairs:
            return f"bond {what} between {frame.symbols[i]}{i} and {frame.symbols[j]}{j}"
    return ""


def _overlap(frame: Atoms, bond_factor: float, contact_factor: float) -> str:
    bonds = find_bonds(frame, bond_factor)
    try:
        whole = make_whole(frame, bonds)
    except DataError as error:
        return str(error)
    molecule_of = np.empty(len(frame), dtype=int)
    for k, members in enumerate(find_molecules(whole, bonds)):
        molecule_of[members] = k
    # elements without a tabulated van der Waals radius are held to the covalent limit alone
    vdw = np.nan_to_num(vdw_radii[whole.numbers])
    first, second, distances, shift = neighbor_list("ijdS", whole, 2 * contact_factor * max(vdw.max(), 1.0))
    apart = (molecule_of[first] != molecule_of[second]) | shift.any(axis=1)
    limits = 0.65 * (covalent_radii[whole.numbers][first] + covalent_radii[whole.numbers][second])
    limits = np.where(apart, np.maximum(limits, contact_factor * (vdw[first] + vdw[second])), limits)
    short = distances < limits
    if not short.any():
        return ""
    k = int(np.argmin(np.where(short, distances / limits, np.inf)))
    names = [f"{whole.symbols[atom]}{atom}" for atom in (int(first[k]), int(second[k]))]
    return f"{names[0]} and {names[1]} overlap at {distances[k]:.3f} A, limit {limits[k]:.3f} A"


# --- relaxation --------------------------------------------------------------------------------------------------


def relax(
    structure: Atoms, method: Method, fmax: float = 0.02, steps: int = 300, cell: bool = False, pressure: float = 0.0
) -> Atoms:
    """Return the structure relaxed with BFGS.

    Parameters
    ----------
    fmax
        Stop when no atom feels more, eV/Angstrom.
    steps
        Stop after so many steps all the same; a warning says so.
    cell
        Relax the cell too, under ``pressure``.
    pressure
        Hydrostatic pressure, eV/Angstrom^3.
    """
    frame = structure.copy()
    frame.calc = method.make()
    optimizer = BFGS(FrechetCellFilter(frame, scalar_pressure=pressure) if cell else frame, logfile=None)  # type: ignore[arg-type]
    if not optimizer.run(fmax=fmax, steps=steps):
        logger.warning(
            "%s is not relaxed to %g eV/A after %d steps", structure.get_chemical_formula(), fmax, optimizer.nsteps
        )
    return _bare(frame)


# --- labels ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LabelReport:
    """What a labelling run did."""

    target: Path
    sha256: str
    level_of_theory: str
    labelled: int
    reused: int
    """Labels found finished from an earlier run."""
    failed: tuple[Rejection, ...]
    """Frames whose calculation failed, and its message; they are not in the file."""
    seconds_per_label: float
    """Median over frames, also those of earlier runs."""
    rejected: tuple[Rejection, ...] = ()
    """Frames that `screen` left out."""


def label(
    frames: Sequence[Atoms],
    method: Method,
    target: Path | str,
    processes: int = 1,
    work: Path | None = None,
    retry_failed: bool = False,
) -> LabelReport:
    """Compute energy, forces and stress of every frame and write one extxyz file.

    Each label is kept in the work folder as soon as it is done, under a hash of geometry and method. A run that was
    killed goes on from there and writes the same file; so does one whose list of frames has grown. Each calculation
    runs in a process with one thread and in a folder of its own, where file-based codes leave their output.

    Parameters
    ----------
    frames
        Crystals or molecules; their ``info`` is kept.
    method
        See `method`; any `Method` with a picklable factory.
    target
        File to write, ``.extxyz`` or ``.extxyz.xz``; it appears when all frames are done.
    processes
        Calculations at a time.
    work
        Work folder; by default ``<target>.parts`` beside the target.
    retry_failed
        Compute frames again that failed in an earlier run.

    Returns
    -------
    LabelReport
        Failed calculations are counted in it and logged as warnings.

    Raises
    ------
    ConfigError
        If the calculator cannot be set up or lacks a property.
    DataError
        If there are no frames, all of them fail, or a process dies.
    """
    target = Path(target)
    if not frames:
        raise DataError(f"no frames to label for {target}")
    folder = (work or target.with_name(target.name + ".parts")).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    geometries = [_bare(frame) for frame in frames]
    digests = [_digest(geometry, method.name) for geometry in geometries]
    # equal geometries are computed once
    results: dict[str, _Label] = {}
    jobs = {}
    for digest, geometry in zip(digests, geometries, strict=True):
        job = _Calculation(geometry, method, folder / digest)
        if job.part.is_file():
            found = _Label(**json.loads(job.part.read_text()))
            if not (found.error and retry_failed):
                results[digest] = found
                continue
        jobs[digest] = job
    reused = sum(digest in results for digest in digests)
    results.update(zip(jobs, _in_processes(_label_one, list(jobs.values()), processes), strict=True))
    labelled, failed = [], []
    for index, (frame, copy, digest) in enumerate(zip(frames, geometries, digests, strict=True)):
        result = results[digest]
        if result.error:
            failed.append(Rejection(index, result.error))
            logger.warning("frame %d has no label: %s", index, result.error)
            continue
        copy.info = {**frame.info, "level_of_theory": method.name}
        stress = None if result.stress is None else np.array(result.stress)
        copy.calc = SinglePointCalculator(copy, energy=result.energy, forces=np.array(result.forces), stress=stress)
        labelled.append(copy)
    if not labelled:
        raise DataError(f"none of {len(frames)} frames could be labelled for {target}; frame 0: {failed[0].reason}")
    _write_frames(target, labelled)
    report = LabelReport(
        target=target,
        sha256=sha256_file(target),
        level_of_theory=method.name,
        labelled=len(labelled),
        reused=reused,
        failed=tuple(failed),
        seconds_per_label=float(np.median([result.seconds for result in results.values() if not result.error])),
    )
    logger.info("%s: %d frames labelled, %d failed", target, report.labelled, len(failed))
    return report


@dataclass(frozen=True)
class _Calculation:
    frame: Atoms
    method: Method
    folder: Path
    """Scratch."""

    @property
    def part(self) -> Path:
        """Where the label is kept."""
        return self.folder.with_suffix(".json")


class _Label(NamedTuple):
    energy: float
    forces: list[list[float]]
    stress: list[float] | None
    seconds: float
    error: str = ""


def _label_one(job: _Calculation) -> _Label:
    job.folder.mkdir(exist_ok=True)
    started = time.perf_counter()
    with contextlib.chdir(job.folder):
        result = _calculate(job.frame, job.method.make())
    result = result._replace(seconds=round(time.perf_counter() - started, 3))
    with contextlib.suppress(OSError):  # kept where the calculator left files
        job.folder.rmdir()
    write_json(job.part, result._asdict())
    return result


def _calculate(frame: Atoms, calculator: BaseCalculator) -> _Label:
    """Return the label, or the reason why a calculation that was set up well did not succeed."""
    wanted = ["energy", "forces"]
    if frame.pbc.all():
        wanted.append("stress")
    missing = [quantity for quantity in wanted if quantity not in calculator.implemented_properties]
    if missing:
        raise ConfigError(f"calculator {type(calculator).__name__} does not compute {', '.join(missing)}")
    frame = frame.copy()
    frame.calc = calculator
    try:
        energy = float(frame.get_potential_energy())
        forces = frame.get_forces()
        stress = frame.get_stress() if frame.pbc.all() else None
    except CalculatorSetupError as error:
        raise ConfigError(f"calculator {type(calculator).__name__} cannot be set up: {error}") from error
    except (RuntimeError, ArithmeticError, CalledProcessError) as error:
        # what calculators raise when the SCF fails; mistakes in the set-up and in code are other classes
        return _Label(0.0, [], None, 0.0, f"{type(error).__name__}: {error}")
    values = np.concatenate([[energy], forces.ravel(), [] if stress is None else stress])
    if not np.isfinite(values).all():
        return _Label(0.0, [], None, 0.0, "energy, forces or stress are not finite")
    return _Label(energy, forces.tolist(), None if stress is None else stress.tolist(), 0.0)


def _digest(frame: Atoms, words: str) -> str:
    from tlmc.geometry import frame_hash

    return hashlib.sha256((frame_hash(frame) + words).encode()).hexdigest()[:24]


def _write_frames(target: Path, frames: Sequence[Atoms]) -> None:
    with atomic_path(target) as temporary:
        ase.io.write(temporary, list(frames), format="extxyz")


# --- processes ---------------------------------------------------------------------------------------------------


def _structures_in_processes(
    work: Callable[[_Job], list[Atoms]], jobs: Sequence[_Job], paths: Sequence[Path | None], processes: int
) -> list[list[Atoms]]:
    """Return ``work(job)`` of every job, read from its file if that exists, else written there."""
    found = [list(ase.io.iread(path)) if path is not None and path.is_file() else None for path in paths]
    tasks = [(work, job, path) for job, path, frames in zip(jobs, paths, found, strict=True) if frames is None]
    new = iter(_in_processes(_work_and_write, tasks, processes))
    return [next(new) if frames is None else frames for frames in found]


def _work_and_write(task: tuple[Callable[[_Job], list[Atoms]], _Job, Path | None]) -> list[Atoms]:
    work, job, path = task
    frames = work(job)
    if path is not None:
        _write_frames(path, frames)
    return frames


def _in_processes(work: Callable[[_Job], _Result], jobs: Sequence[_Job], processes: int) -> list[_Result]:
    """Return ``work(job)`` of every job, computed in fresh processes of one thread each."""
    if processes < 1:
        raise ConfigError(f"processes must be at least 1, got {processes}")
    if not jobs:
        return []
    results: dict[int, _Result] = {}
    # spawned, not forked: a fork copies the parent's thread pools in whatever state they are
    context = multiprocessing.get_context("spawn")
    with (
        _one_thread(),
        ProcessPoolExecutor(min(processes, len(jobs)), context, initializer=_end_with_parent) as pool,
    ):
        futures = {pool.submit(work, job): index for index, job in enumerate(jobs)}
        try:
            for future in as_completed(futures):
                results[futures[future]] = future.result()
                logger.info("%d of %d done", len(results), len(jobs))
        except BrokenProcessPool as error:
            raise DataError(
                f"a process died, perhaps for lack of memory, with {len(results)} of {len(jobs)} calculations done; "
                "run again to go on from there"
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)
    return [results[index] for index in range(len(jobs))]


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Set the thread counts that children inherit; libraries read them once, when they are loaded."""
    names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
    before = {name: os.environ.get(name) for name in names}
    os.environ.update(dict.fromkeys(names, "1"))
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _end_with_parent() -> None:
    """End this process when its parent is killed, rather than wait for jobs that never come."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


# --- recipes -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Recipe:
    """How an embedded data set is made, as data."""

    name: str
    structure: str
    """``pyxtal:<name>`` for a CIF inside PyXtal's wheel, or the path of any file ASE reads."""
    plan: tuple[Perturbation, ...]
    molecule_plan: tuple[Perturbation, ...] = ()
    """Perturbations of each distinct molecule alone in a box; empty for none."""
    seed: int = 0
    method: str = "gfn2-xtb"
    """Labels and relaxes."""
    sampler: str = "gfn1-xtb"
    """Drives molecular dynamics, where the distribution matters less than the cost."""
    fmax: float = 0.02
    """Relaxation threshold, eV/Angstrom."""
    relax_cell: bool = False
    """Relax the cell too, or keep the experimental one."""
    vacuum: float = 8.0
    """Distance from an isolated molecule to the faces of its box, Angstrom."""


RECIPES: dict[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        Recipe(
            name="naphthalene",
            structure="pyxtal:naphthalene",
            seed=20221,
            plan=(
                RigidMotion(
                    count=16, shifts=(0.05, 0.1, 0.15, 0.2), angles=(2.0, 4.0, 6.0, 8.0), rattle=0.02, correlation=1.5
                ),
                Rattle(count=12, widths=(0.02, 0.04, 0.06), correlation=1.5),
                Rattle(count=8, widths=(0.01, 0.015, 0.02, 0.03)),
                Strain(count=43, linear=(-0.05, 0.06), random=0.02, rattle=0.035, correlation=1.5),
                MolecularDynamics(
                    temperatures=(150.0, 300.0, 450.0, 600.0, 150.0, 300.0, 450.0, 600.0),
                    strains=(0.0, 0.0, 0.0, 0.0, -0.03, -0.02, 0.02, 0.03),
                    frames=5,
                    interval=40,
                ),
            ),
            molecule_plan=(
                Rattle(count=6, widths=(0.02, 0.04, 0.06), correlation=1.5),
                Rattle(count=3, widths=(0.01, 0.02, 0.03)),
            ),
        ),
    )
}


def read_structure(source: str) -> Atoms:
    """Read a structure from ``pyxtal:<name>`` or, the last one, from a file.

    Raises
    ------
    ConfigError
        If PyXtal is not installed or has no CIF of this name.
    DataError
        If the file cannot be read.
    """
    from tlmc.datasets import read_frames

    if source.startswith("pyxtal:"):
        # found without importing PyXtal, which takes seconds
        spec = importlib.util.find_spec("pyxtal")
        if spec is None or spec.submodule_search_locations is None:
            raise ConfigError(f"{source} needs PyXtal: pip install 'tlmc[label]'")
        path = Path(spec.submodule_search_locations[0], "database", "cifs", source.partition(":")[2] + ".cif")
        if not path.is_file():
            known = ", ".join(sorted(file.stem for file in path.parent.glob("*.cif")))
            raise ConfigError(f"PyXtal has no CIF {source.partition(':')[2]!r}; it has {known}")
    else:
        path = Path(source)
    with warnings.catch_warnings():
        # the symmetry operations listed in the file are used, so the setting it names is not needed
        warnings.filterwarnings("ignore", "crystal system .* is not interpreted", UserWarning)
        found = read_frames(path)[-1]
    return Atoms(found.numbers, found.positions, cell=found.cell, pbc=found.pbc)


def build(
    recipe: Recipe | str, target: Path | str, processes: int = 1, work: Path | None = None, retry_failed: bool = False
) -> LabelReport:
    """Follow a recipe to a labelled file; a killed run goes on where it was.

    Parameters
    ----------
    recipe
        A recipe or the name of one in `RECIPES`.
    target, processes, work, retry_failed
        As in `label`.

    Returns
    -------
    LabelReport
        With the frames that `screen` left out.

    Raises
    ------
    ConfigError, DataError
        As in `read_structure`, `perturb` and `label`; unknown recipe.
    """
    if isinstance(recipe, str):
        if recipe not in RECIPES:
            raise ConfigError(f"unknown recipe {recipe!r}; known are {', '.join(RECIPES)}")
        recipe = RECIPES[recipe]
    target = Path(target)
    folder = (work or target.with_name(target.name + ".parts")).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    labels, sampler = method(recipe.method), method(recipe.sampler)
    structure = make_whole(read_structure(recipe.structure))
    crystal = _relaxed(structure, labels, recipe, recipe.relax_cell, folder)
    frames, rejected = screen(perturb(crystal, recipe.plan, recipe.seed, sampler, processes, folder), crystal)
    for index, molecule in enumerate(isolated_molecules(structure, recipe.vacuum) if recipe.molecule_plan else []):
        alone = _relaxed(molecule, labels, recipe, False, folder)
        drawn = perturb(alone, recipe.molecule_plan, recipe.seed + 1 + index, sampler, processes, folder)
        for frame in drawn:
            frame.info["group"] = "molecule"
        screened = screen(drawn, alone)
        rejected += [Rejection(len(frames) + len(rejected) + k, reason) for k, reason in screened.rejected]
        frames += screened.frames
    report = label(frames, labels, target, processes, folder, retry_failed)
    return replace(report, rejected=tuple(rejected))


@dataclass(frozen=True)
class _Relaxation:
    structure: Atoms
    method: Method
    fmax: float
    cell: bool


def _relaxed(structure: Atoms, labels: Method, recipe: Recipe, cell: bool, folder: Path) -> Atoms:
    """Return the structure relaxed in a process of one thread, from the work folder if it is there."""
    path = folder / f"relaxed-{_digest(structure, repr((labels.name, recipe.fmax, cell)))}.extxyz"
    job = _Relaxation(structure, labels, recipe.fmax, cell)
    return _structures_in_processes(_relax_one, [job], [path], 1)[0][0]


def _relax_one(job: _Relaxation) -> list[Atoms]:
    return [relax(job.structure, job.method, job.fmax, cell=job.cell)]
