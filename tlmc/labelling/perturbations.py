"""Perturbed copies of a structure, each from a seed of its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
from ase import Atoms, units
from ase.md.velocitydistribution import Stationary
from ase.md.verlet import VelocityVerlet
from numpy.random import Generator, SeedSequence, default_rng
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

from tlmc.errors import ConfigError
from tlmc.labelling.frames import bare, content_words, moved, rounded, template, work_key
from tlmc.labelling.identity import identified
from tlmc.labelling.methods import Method
from tlmc.labelling.molecules import find_molecules, make_whole
from tlmc.labelling.workers import structures_in_processes

FloatArray = NDArray[np.float64]


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

    def run(self, crystal: Atoms, run: int, seed: int, sampler: Method) -> list[Atoms]:
        """Return the snapshots of one run, of the crystal in its charge and spin, without its constraints."""
        frame = sampler.attach(strained(crystal, (1 + self.strains[run]) * np.eye(3)), crystal.get_chemical_formula())
        thermal = np.sqrt(frame.get_masses() * (units.kB * 2 * self.temperatures[run]))
        frame.set_momenta(default_rng(seed).standard_normal((len(frame), 3)) * thermal[:, None])
        Stationary(frame)
        dynamics = VelocityVerlet(frame, timestep=self.timestep * units.fs)
        snapshots = []
        for _ in range(self.frames):
            dynamics.run(self.interval)
            snapshots.append(moved(crystal, frame))
        return snapshots


Perturbation = Rattle | RigidMotion | Strain | MolecularDynamics


def strained(crystal: Atoms, deformation: FloatArray) -> Atoms:
    """Return a copy with the cell multiplied by ``deformation``, shape ``(3, 3)``, molecules moved but not deformed."""
    frame: Atoms = crystal.copy()
    frame.cell[:] = crystal.cell.array @ deformation
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
    leaves the frames of the others as they were. Charges, moments and ``info`` are those of the structure, except
    labels and other entries that are true of its geometry only.

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
    whole = template(make_whole(crystal))
    whole.set_constraint()
    frames = [_tagged(whole, "start", seed, "none")]
    for part, step in enumerate(plan):
        if isinstance(step, MolecularDynamics):
            if sampler is None:
                raise ConfigError("molecular dynamics needs a sampler method, got None")
            if work is not None:
                sampler = identified(sampler, work)
            seeds = [_seed(seed, part, run) for run in range(len(step.temperatures))]
            jobs = [_Run(whole, step, run, seeds[run], sampler) for run in range(len(seeds))]
            keys = [
                work_key(whole, repr((step, job.run, job.seed, sampler.identity)) + content_words(whole))
                for job in jobs
            ]
            paths = [work / f"md-{key}.extxyz" if work else None for key in keys]
            runs = structures_in_processes(_run_dynamics, jobs, paths, processes)
            for job, snapshots in zip(jobs, runs, strict=True):
                frames += [
                    _tagged(
                        moved(whole, snapshot),
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


def _tagged(frame: Atoms, group: str, seed: int, words: str) -> Atoms:
    tagged = rounded(frame)
    tagged.info |= {"group": group, "seed": seed, "perturbation": words}
    return tagged


@dataclass(frozen=True)
class _Run:
    crystal: Atoms
    step: MolecularDynamics
    run: int
    seed: int
    sampler: Method


def _run_dynamics(job: _Run) -> list[Atoms]:
    return [bare(snapshot) for snapshot in job.step.run(job.crystal, job.run, job.seed, job.sampler)]
