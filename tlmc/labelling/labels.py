"""Label frames: every finished calculation is kept, so that a killed run goes on from there."""

from __future__ import annotations

import contextlib
import json
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from subprocess import CalledProcessError
from typing import NamedTuple

import numpy as np
from ase import Atoms
from ase.calculators.calculator import BaseCalculator, CalculatorSetupError
from ase.calculators.singlepoint import SinglePointCalculator

from tlmc.errors import ConfigError, DataError
from tlmc.files import sha256_file, write_json
from tlmc.labelling.frames import rounded, work_key, write_frames
from tlmc.labelling.methods import Method
from tlmc.labelling.screening import Rejection
from tlmc.labelling.workers import in_processes

logger = logging.getLogger(__name__)


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
    discarded: tuple[Rejection, ...] = ()
    """Candidate crystals that `pack` tried and did not keep."""


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
    geometries = [rounded(frame) for frame in frames]
    digests = [work_key(geometry, method.name) for geometry in geometries]
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
    results.update(zip(jobs, in_processes(_label_one, list(jobs.values()), processes), strict=True))
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
    write_frames(target, labelled)
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
        # labels are what the method says of free atoms, whatever the structure is constrained to
        energy = float(frame.get_potential_energy(apply_constraint=False))
        forces = frame.get_forces(apply_constraint=False)
        stress = frame.get_stress(apply_constraint=False) if frame.pbc.all() else None
    except CalculatorSetupError as error:
        raise ConfigError(f"calculator {type(calculator).__name__} cannot be set up: {error}") from error
    except (RuntimeError, ArithmeticError, CalledProcessError) as error:
        # what calculators raise when the SCF fails; mistakes in the set-up and in code are other classes
        return _Label(0.0, [], None, 0.0, f"{type(error).__name__}: {error}")
    values = np.concatenate([[energy], forces.ravel(), [] if stress is None else stress])
    if not np.isfinite(values).all():
        return _Label(0.0, [], None, 0.0, "energy, forces or stress are not finite")
    return _Label(energy, forces.tolist(), None if stress is None else stress.tolist(), 0.0)
