"""Candidate crystals of a molecule: random packings in common space groups, compressed and loosely relaxed."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from ase import Atoms, units
from numpy.random import SeedSequence
from numpy.typing import NDArray

from tlmc.errors import ConfigError, DataError
from tlmc.labelling.compression import compress
from tlmc.labelling.frames import bare, content_words, moved, rounded, work_key
from tlmc.labelling.identity import identified
from tlmc.labelling.methods import Method
from tlmc.labelling.molecules import find_bonds, find_molecules, make_whole, part
from tlmc.labelling.relaxation import relax
from tlmc.labelling.screening import Rejection
from tlmc.labelling.sources import molecules_from_smiles, read_structure
from tlmc.labelling.states import state_of, without_state
from tlmc.labelling.workers import structures_in_processes

logger = logging.getLogger(__name__)

_GPA = units.GPa


@dataclass(frozen=True)
class Packings:
    """Which candidate crystals are tried and which are kept."""

    tries: int
    """Random packings drawn."""
    keep: int
    """At most so many are kept, those of lowest energy per atom."""
    cells: tuple[tuple[int, int], ...]
    """Space group number and formula units per cell, taken in turn: ``(14, 4)`` is P2_1/c with Z' = 1, ``(1, 2)`` is
    P1 with Z' = 2."""
    conformers: int = 1
    """Conformers of the molecules, taken in turn once all cells had one."""
    pressure: float = 3.0
    """GPa, while molecules are brought together (`tlmc.labelling.compression`); the relaxation has none."""
    fmax: float = 0.1
    """The relaxation stops when no atom feels more, eV/Angstrom, ..."""
    steps: int = 40
    """... or after so many steps: packings need not be minima to be worth a label."""
    volume_per_atom: tuple[float, float] = (8.0, 18.0)
    """Physical range of volume per atom, Angstrom^3; organic crystals have 10 to 14, heavy elements a little more."""
    energy_window: float = 0.1
    """Candidates so far above the lowest are left out, eV/atom."""


class Packed(NamedTuple):
    """Candidates kept, lowest energy first, and why the others were not."""

    crystals: list[Atoms]
    """``info`` has ``packing`` (number of the try), ``space_group`` (as drawn) and ``energy_per_atom`` (eV)."""
    rejected: list[Rejection]
    """Numbers are those of the tries."""


def pack(
    source: str,
    plan: Packings,
    seed: int,
    sampler: Method,
    labels: Method | None = None,
    processes: int = 1,
    work: Path | None = None,
) -> Packed:
    """Draw, compress and relax candidate crystals; the same arguments give the same crystals.

    Every candidate has a seed of its own, so more tries leave the earlier ones as they were.

    Parameters
    ----------
    source
        Molecule, or molecules of a formula unit: ``smiles:<SMILES>`` or a file, as `read_structure` takes.
    plan
        What is tried and kept.
    seed
        Seed of the candidates.
    sampler
        Method that relaxes the crystals.
    labels
        Method that relaxes the molecule first, by default ``sampler``. The ions of a salt keep the geometry of the
        conformer: alone they would be charged.
    processes
        Candidates at a time.
    work
        Folder that keeps finished candidates, for resuming.

    Raises
    ------
    ConfigError
        If PyXtal or RDKit is not installed.
    DataError
        If no candidate is worth keeping, or the formula unit is charged.
    """
    if work is not None:
        sampler = identified(sampler, work)
        labels = None if labels is None else identified(labels, work)
    conformers = [_conformer(source, seed + k, labels or sampler, work) for k in range(plan.conformers)]
    jobs, paths = [], []
    for k in range(plan.tries):
        turn, place = divmod(k, len(plan.cells))
        own = int(SeedSequence((seed, k)).generate_state(1)[0])
        job = _Candidate(k, conformers[turn % len(conformers)], plan.cells[place], own, plan, sampler)
        row = rounded(_row(job.molecules))
        key = work_key(row, repr((job.cell, own, sampler.identity, _how(plan))) + content_words(row))
        jobs.append(job)
        paths.append(work / f"packing-{key}.extxyz" if work else None)
    found = [frames[0] for frames in structures_in_processes(_candidate, jobs, paths, processes)]
    for job, crystal in zip(jobs, found, strict=True):
        if "left_out" not in crystal.info and find_bonds(crystal).pairs() != _bonds(job):
            crystal.info["left_out"] = "bonds formed or broken"
    return _choose(found, plan, source)


def _choose(found: Sequence[Atoms], plan: Packings, source: str) -> Packed:
    """Keep intact, dense and distinct candidates of low energy."""
    rejected = []
    order = []
    for k, crystal in enumerate(found):
        reason = str(crystal.info.get("left_out", ""))
        lowest, highest = plan.volume_per_atom
        if not reason and not lowest <= crystal.get_volume() / len(crystal) <= highest:
            reason = f"{crystal.get_volume() / len(crystal):.1f} A^3 per atom"
        if reason:
            rejected.append(Rejection(k, reason))
        else:
            order.append(k)
    order.sort(key=lambda k: found[k].info["energy_per_atom"])
    kept: list[int] = []
    for k in order:
        energy, volume = _energy_volume(found[k])
        twin = [
            other
            for other in kept
            if abs(energy - _energy_volume(found[other])[0]) < 5e-4
            and abs(volume / _energy_volume(found[other])[1] - 1) < 5e-3
        ]
        if twin:
            rejected.append(Rejection(k, f"same energy and volume as {twin[0]}"))
        elif energy - _energy_volume(found[order[0]])[0] > plan.energy_window:
            rejected.append(Rejection(k, f"{energy - _energy_volume(found[order[0]])[0]:.3f} eV/atom above the lowest"))
        elif len(kept) == plan.keep:
            rejected.append(Rejection(k, f"not among the {plan.keep} of lowest energy"))
        else:
            kept.append(k)
    for rejection in rejected:
        logger.info("packing %d left out: %s", *rejection)
    if not kept:
        raise DataError(f"none of {plan.tries} packings of {source} is worth keeping; 0: {rejected[0].reason}")
    return Packed([found[k] for k in kept], sorted(rejected))


def _energy_volume(crystal: Atoms) -> tuple[float, float]:
    return float(crystal.info["energy_per_atom"]), crystal.get_volume() / len(crystal)


def _how(plan: Packings) -> tuple[float, float, int]:
    """Return what of a plan changes a single candidate."""
    return plan.pressure, plan.fmax, plan.steps


def _row(molecules: Sequence[Atoms]) -> Atoms:
    row = Atoms()
    for molecule in molecules:
        row += molecule
    return row


@dataclass(frozen=True)
class _Conformer:
    molecules: list[Atoms]
    method: Method


def _conformer(source: str, seed: int, method: Method, work: Path | None) -> list[Atoms]:
    """Return the molecules of a formula unit; one that is alone in it, and so neutral, is relaxed."""
    if source.startswith("smiles:"):
        molecules = molecules_from_smiles(source.removeprefix("smiles:"), seed)
    else:
        whole = make_whole(read_structure(source))
        molecules = [part(whole, members) for members in find_molecules(whole)]
        for molecule in molecules:
            molecule.info["bonds"] = find_bonds(molecule).pairs()
    unit = molecules[0] if len(molecules) == 1 else _row(molecules)
    if charge := state_of(unit, source).charge:
        raise DataError(f"{source} has charge {charge:+g}, and a crystal must be neutral: add the ions that balance it")
    if len(molecules) > 1:
        return molecules
    key = work_key(rounded(molecules[0]), repr(("conformer", method.identity)) + content_words(molecules[0]))
    path = work / f"conformer-{key}.extxyz" if work else None
    [relaxed] = structures_in_processes(_relax_conformer, [_Conformer(molecules, method)], [path], 1)[0]
    return [moved(molecules[0], relaxed)]


def _relax_conformer(job: _Conformer) -> list[Atoms]:
    return [bare(relax(molecule, job.method, fmax=0.1, steps=200)) for molecule in job.molecules]


@dataclass(frozen=True)
class _Candidate:
    number: int
    molecules: list[Atoms]
    cell: tuple[int, int]
    seed: int
    plan: Packings
    method: Method


def _candidate(job: _Candidate) -> list[Atoms]:
    """Return one relaxed candidate, or what there was of it with the reason why it is left out."""
    try:
        crystal, members, symbol = _random_packing(job)
    except RuntimeError as error:  # PyXtal gives up after some attempts
        nothing = _row(job.molecules)
        nothing.info = {"packing": job.number, "seed": job.seed, "left_out": f"PyXtal: {error}"}
        return [nothing]
    info = _said_of(job.molecules) | {"packing": job.number, "space_group": symbol, "seed": job.seed}
    crystal.info = info
    dense = compress(crystal, members, pressure=job.plan.pressure * _GPA)
    try:
        relaxed = relax(dense, job.method, fmax=job.plan.fmax, steps=job.plan.steps, cell=True)
        energy = job.method.attach(relaxed).get_potential_energy() / len(relaxed)
        whole = make_whole(relaxed)
    except (RuntimeError, ArithmeticError, DataError) as error:  # the SCF failed, or molecules became a network
        dense.info = info | {"left_out": f"{type(error).__name__}: {' '.join(str(error).split())}"}
        return [dense]
    result = rounded(whole)
    result.info = info | {"energy_per_atom": float(energy)}
    return [result]


def _said_of(molecules: Sequence[Atoms]) -> dict[str, Any]:
    """Return what the user's file says of the molecules, less their states, which those of a crystal are not."""
    return {key: value for key, value in without_state(molecules[0].info).items() if key != "bonds"}


def _bonds(job: _Candidate) -> list[tuple[int, int]]:
    """Return the bonded pairs of a cell of intact molecules, in the order of `_random_packing`."""
    pairs, start = [], 0
    for molecule in job.molecules:
        for _ in range(job.cell[1]):
            pairs += [(start + first, start + second) for first, second in molecule.info["bonds"]]
            start += len(molecule)
    return sorted(pairs)


def _random_packing(job: _Candidate) -> tuple[Atoms, list[NDArray[np.int64]], str]:
    """Return a loose crystal, the atoms of each molecule in it, and the symbol of its space group."""
    try:
        from pymatgen.core.structure import Molecule
        from pyxtal import pyxtal
    except ModuleNotFoundError as error:
        raise ConfigError("candidate packings need PyXtal: pip install 'tlmc[label]'") from error
    group, n_units = job.cell
    species = [Molecule(molecule.get_chemical_symbols(), molecule.positions) for molecule in job.molecules]
    drawn: Any = pyxtal(molecular=True)
    drawn.from_random(3, group, species, [n_units] * len(species), factor=1.2, random_state=job.seed)
    if not drawn.valid:
        raise RuntimeError(f"no packing of {n_units} formula units in space group {group} found")
    atoms = drawn.to_ase(resort=False)
    ends = np.cumsum([len(molecule) for molecule in job.molecules for _ in range(n_units)])
    members = [np.arange(end - size, end) for end, size in zip(ends, np.diff(ends, prepend=0), strict=True)]
    crystal = Atoms(atoms.numbers, atoms.positions, cell=atoms.cell, pbc=True)
    if any(molecule.get_initial_magnetic_moments().any() for molecule in job.molecules):
        crystal.set_initial_magnetic_moments(
            np.concatenate([np.tile(molecule.get_initial_magnetic_moments(), n_units) for molecule in job.molecules])
        )
    return crystal, members, str(drawn.group.symbol)
