"""Relax a structure with the method that labels it."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ase import Atoms
from ase.filters import FrechetCellFilter
from ase.optimize import BFGS

from tlmc.labelling.frames import bare, content_words, moved, plain, work_key
from tlmc.labelling.methods import Method
from tlmc.labelling.workers import structures_in_processes

logger = logging.getLogger(__name__)


def relax(
    structure: Atoms, method: Method, fmax: float = 0.02, steps: int = 300, cell: bool = False, pressure: float = 0.0
) -> Atoms:
    """Return the structure relaxed with BFGS, with its charge and spin and under its constraints.

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
    frame = method.attach(structure, structure.get_chemical_formula())
    frame.set_constraint(structure.constraints)
    with quiet_logarithms():
        optimizer = BFGS(FrechetCellFilter(frame, scalar_pressure=pressure) if cell else frame, logfile=None)  # type: ignore[arg-type]
        converged = optimizer.run(fmax=fmax, steps=steps)
    if not converged:
        logger.warning(
            "%s is not relaxed to %g eV/A after %d steps", structure.get_chemical_formula(), fmax, optimizer.nsteps
        )
    return moved(structure, frame)


@contextlib.contextmanager
def quiet_logarithms() -> Iterator[None]:
    """Silence SciPy's doubt about logarithms of deformations that are right to 1e-12, which comes at every step."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "logm result may be inaccurate", RuntimeWarning)
        yield


@dataclass(frozen=True)
class _Relaxation:
    structure: Atoms
    method: Method
    fmax: float
    cell: bool


def relaxed(structure: Atoms, method: Method, fmax: float, cell: bool, folder: Path) -> Atoms:
    """Return the structure relaxed in a process of one thread, from the work folder if it is there."""
    words = repr((method.identity, fmax, cell)) + content_words(structure) + str(plain(structure.constraints))
    path = folder / f"relaxed-{work_key(structure, words)}.extxyz"
    job = _Relaxation(structure, method, fmax, cell)
    return moved(structure, structures_in_processes(_relax_one, [job], [path], 1)[0][0])


def _relax_one(job: _Relaxation) -> list[Atoms]:
    return [bare(relax(job.structure, job.method, job.fmax, cell=job.cell))]
