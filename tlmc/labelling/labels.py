"""Label frames: every finished calculation is kept, so that a killed run goes on from there."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import shutil
import time
import warnings
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from subprocess import CalledProcessError
from typing import Any, NamedTuple

import ase.io
import numpy as np
from ase import Atoms
from ase.calculators.calculator import CalculatorSetupError
from ase.calculators.singlepoint import SinglePointCalculator
from ase.stress import full_3x3_to_voigt_6_stress
from numpy.typing import NDArray

from tlmc.errors import ConfigError, DataError
from tlmc.files import atomic_path, held, sha256_file, write_json
from tlmc.labelling.frames import content_words, rounded, work_key
from tlmc.labelling.identity import differences, identified
from tlmc.labelling.methods import Method, TBLiteFactory
from tlmc.labelling.screening import Rejection
from tlmc.labelling.states import State, for_tblite, states_of
from tlmc.labelling.workers import in_processes

logger = logging.getLogger(__name__)

_SUFFIXES = tuple(name + packed for name in (".extxyz", ".xyz") for packed in ("", ".xz", ".gz", ".bz2"))
_LABELS = frozenset({"energy", "free_energy", "forces", "stress", "stresses", "virial", "level_of_theory"})
"""Entries of the frames given that the file cannot hold beside the new labels of these names."""


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
    outdated: int = 0
    """Frames computed anew whose labels, kept in the work folder, are of another method or an earlier form of it."""


def label(
    frames: Sequence[Atoms],
    method: Method,
    target: Path | str,
    processes: int = 1,
    work: Path | None = None,
    retry_failed: bool = False,
    source: str = "",
) -> LabelReport:
    """Compute energy, forces and stress of every frame and write one extxyz file.

    Each label is kept in the work folder as soon as it is done, under a hash of the frame and of the method. A run that
    was killed goes on from there and writes the same file; so does one whose list of frames has grown. Each calculation
    runs in a process with one thread and in a folder of its own, where file-based codes leave their output.

    A label belongs to a geometry in a state: charge and spin that frames state (`tlmc.labelling.states`) are given to
    tblite, and to a method of your own with the atoms, as initial charges, initial magnetic moments and ``info``. It
    also belongs to the method as it is, not to its name: when a file of its or a setting changes
    (`tlmc.labelling.identity`), frames are labelled anew. Earlier labels stay in the work folder.

    Parameters
    ----------
    frames
        Crystals or molecules; their ``info``, arrays and constraints are kept. Labels are those of free atoms.
    method
        See `method`; any `Method` with a picklable factory.
    target
        File to write, ``.extxyz`` or ``.extxyz.xz``; it appears when all frames are done. A file that no earlier run
        wrote is never replaced.
    processes
        Calculations at a time.
    work
        Work folder; by default ``<target>.parts`` beside the target.
    retry_failed
        Compute frames again that failed in an earlier run.
    source
        Where the frames are from, for error messages.

    Returns
    -------
    LabelReport
        Failed calculations are counted in it and logged as warnings.

    Raises
    ------
    ConfigError
        If the calculator cannot be set up, lacks a property, or is set to another charge or spin than a frame has; the
        target is not a name of extxyz, or another's file.
    DataError
        If there are no frames, one cannot be computed as it is, its statements on charge and spin contradict each
        other, all of them fail, a process dies, or another process labels into the same folder.
    """
    target = Path(target)
    if not frames:
        raise DataError(f"no frames to label for {target}")
    check_name(target)
    names = [f"{source}: frame {k}" if source else f"frame {k}" for k in range(len(frames))]
    states = checked(frames, names)
    of_tblite = isinstance(method.make, TBLiteFactory)
    if of_tblite:
        for frame, state, name in zip(frames, states, names, strict=True):
            for_tblite(frame.copy(), state, name)
    folder = work_folder(target, work)
    with held(folder):
        if not of_tblite:
            _say_states(states, method)
        return _label(list(frames), states, identified(method, folder), target, folder, processes, retry_failed)


def _label(
    frames: list[Atoms],
    states: list[State],
    method: Method,
    target: Path,
    folder: Path,
    processes: int,
    retry_failed: bool,
) -> LabelReport:
    copies = [rounded(frame) for frame in frames]
    digests = [
        f"{work_key(copy, label_words(copy, state, method))}-{method.identity}"
        for copy, state in zip(copies, states, strict=True)
    ]
    # equal frames are computed once
    results: dict[str, _Label] = {}
    jobs: dict[str, _Calculation] = {}
    for index, (digest, copy) in enumerate(zip(digests, copies, strict=True)):
        job = _Calculation(index, copy, method, folder / digest)
        if digest not in results and (found := _found(job)) is not None and not (found.error and retry_failed):
            results[digest] = found
        if digest not in results:
            jobs.setdefault(digest, job)
    reused = sum(digest in results for digest in digests)
    outdated = _say_outdated(folder, list(jobs), digests, method)
    results.update(zip(jobs, in_processes(_label_one, list(jobs.values()), processes), strict=True))
    labelled, kept, failed = [], [], []
    for index, (copy, digest) in enumerate(zip(copies, digests, strict=True)):
        result = results[digest]
        if result.error:
            failed.append(Rejection(index, result.error))
            logger.warning("frame %d has no label: %s", index, result.error)
            continue
        for key in _LABELS:
            copy.info.pop(key, None)
            copy.arrays.pop(key, None)
        copy.info["level_of_theory"] = method.name
        stress = None if result.stress is None else np.array(result.stress)
        copy.calc = SinglePointCalculator(copy, energy=result.energy, forces=np.array(result.forces), stress=stress)
        labelled.append(copy)
        kept.append(digest)
    if not labelled:
        raise DataError(f"none of {len(frames)} frames could be labelled for {target}; frame 0: {failed[0].reason}")
    _write(labelled, kept, target, folder)
    report = LabelReport(
        target=target,
        sha256=sha256_file(target),
        level_of_theory=method.name,
        labelled=len(labelled),
        reused=reused,
        failed=tuple(failed),
        seconds_per_label=float(np.median([result.seconds for result in results.values() if not result.error])),
        outdated=outdated,
    )
    logger.info("%s: %d frames labelled, %d failed", target, report.labelled, len(failed))
    return report


def label_words(frame: Atoms, state: State, method: Method) -> str:
    """Return what a label depends on besides geometry and method: charge and spin, or all that the frame says."""
    if isinstance(method.make, TBLiteFactory):
        return "" if state.charge is None and state.unpaired is None else repr((state.charge or 0.0, state.unpaired))
    return content_words(frame)


# --- what is refused before work starts ---


def check_name(target: Path) -> None:
    """Refuse a file that is none of extxyz by its name."""
    if target.is_dir():
        raise ConfigError(f"{target} is a folder: name a file to write")
    if not target.name.endswith(_SUFFIXES):
        raise ConfigError(f"{target}: labels are written as extxyz, so name a file .extxyz or .extxyz.xz")


def check_free(target: Path, folder: Path) -> None:
    """Refuse to replace a file that no run with this work folder wrote, or that was changed since."""
    if target.exists() and written_before(target, folder) is None:
        raise ConfigError(f"{target} exists, was not labelled here, and would be replaced: name another file")


def checked(frames: Sequence[Atoms], names: Sequence[str]) -> list[State]:
    """Return the states of frames, all of which can be computed and written; names begin the messages.

    Raises
    ------
    DataError
        As in `label`.
    """
    for frame, name in zip(frames, names, strict=True):
        if not len(frame):
            raise DataError(f"{name} has no atoms")
        if not (np.isfinite(frame.positions).all() and np.isfinite(frame.cell.array).all()):
            raise DataError(f"{name} has positions or a cell that are not finite")
        if (~frame.cell.any(axis=1) & frame.pbc).any():
            raise DataError(f"{name} is periodic along a cell vector of no length")
    states = states_of(frames, names)
    for frame, name in zip(frames, names, strict=True):
        if not content_words(frame):
            continue
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("error", "Skipping unhashable information", UserWarning)
                ase.io.write(io.StringIO(), rounded(frame), format="extxyz")
        except (TypeError, ValueError, KeyError, UserWarning) as error:
            raise DataError(f"{name} cannot be written as extxyz for its info or arrays ({error})") from error
    return states


def work_folder(target: Path, work: Path | None) -> Path:
    """Return the folder that keeps what is done, made if need be.

    Raises
    ------
    ConfigError
        As `check_free`.
    """
    folder = (work or target.with_name(target.name + ".parts")).resolve()
    check_free(target, folder)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _say_states(states: Sequence[State], method: Method) -> None:
    """Remind of what only the user's method can see to."""
    charged = Counter(state.words() for state in states if state.charge or state.unpaired)
    if charged:
        logger.warning(
            "%d frames state a charge or a spin (%s): %s is given them in info, initial charges and moments, and must "
            "heed them itself",
            charged.total(), "; ".join(f"{n} with {words}" for words, n in charged.most_common(3)), method.name,
        )  # fmt: skip


# --- what is there ---


def _found(job: _Calculation) -> _Label | None:
    """Return the finished label of a calculation, None if there is none."""
    try:
        found = _Label(**json.loads(job.part.read_text(encoding="utf-8")))
        if found.error or np.shape(found.forces) == (len(job.frame), 3):
            return found
    except FileNotFoundError:
        return None
    except (TypeError, ValueError):
        pass
    logger.warning("%s holds no label and is computed again", job.part)
    return None


def _say_outdated(folder: Path, missing: Sequence[str], digests: Sequence[str], method: Method) -> int:
    """Return how many of the frames without a label have one of another method, and say why it is not used."""
    identities: defaultdict[str, set[str]] = defaultdict(set)
    for part in folder.glob("*-*.json"):
        frame, _, identity = part.stem.partition("-")
        identities[frame].add(identity)
    wanted = set(missing)
    found = Counter[str]()
    count = 0
    for digest in digests:
        if digest in wanted and (others := identities[digest.partition("-")[0]]):
            count += 1
            found.update(others)
    if count:
        [(latest, _)] = found.most_common(1)
        logger.warning(
            "%d frames have labels of another method or of an earlier form of %s (changed: %s): they are kept in %s "
            "but not used",
            count, method.name, differences(folder, latest, method.identity), folder,
        )  # fmt: skip
    return count


def written_before(target: Path, folder: Path) -> list[str] | None:
    """Return which labels the target holds if an earlier run wrote it as it is, else None."""
    if not target.is_file():
        return None
    entry = _written(folder).get(target.name, {}).get(sha256_file(target))
    return None if entry is None else list(entry)


def _written(folder: Path) -> dict[str, dict[str, list[str]]]:
    """Return, by file name and SHA-256, which labels the files hold that runs wrote from this folder."""
    try:
        known: dict[str, dict[str, list[str]]] = json.loads((folder / "written.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise DataError(f"{folder / 'written.json'} is damaged ({error}): move it away") from error
    return known


def _write(frames: list[Atoms], digests: list[str], target: Path, folder: Path) -> None:
    """Replace the target, of which a copy is kept if it holds labels that the new one lacks."""
    check_free(target, folder)
    before = written_before(target, folder)
    with atomic_path(target) as temporary:
        ase.io.write(temporary, frames, format="extxyz")
        if before is not None and not set(before) <= set(digests):
            old = sha256_file(target)
            copy = folder / f"{old[:12]}-{target.name}"
            if not copy.exists():
                with atomic_path(copy) as whole:
                    shutil.copyfile(target, whole)
            logger.warning("%s held labels that are no longer wanted: it is kept as %s", target, copy)
        # known before it is there: a run that is killed in between finds its own file
        known = _written(folder)
        known.setdefault(target.name, {})[sha256_file(temporary)] = digests
        write_json(folder / "written.json", known)


# --- calculations ---


@dataclass(frozen=True)
class _Calculation:
    number: int
    """Of the frame, for messages."""
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
        result = _calculate(job)
    result = result._replace(seconds=round(time.perf_counter() - started, 3))
    with contextlib.suppress(OSError):  # kept where the calculator left files
        job.folder.rmdir()
    write_json(job.part, result._asdict())
    return result


def _calculate(job: _Calculation) -> _Label:
    """Return the label, or the reason why a calculation that was set up well did not succeed."""
    where = f"frame {job.number}"
    frame = job.method.attach(job.frame, where)
    calculator: Any = frame.calc
    name = type(calculator).__name__
    wanted = ["energy", "forces"]
    if frame.pbc.all():
        wanted.append("stress")
    missing = [quantity for quantity in wanted if quantity not in calculator.implemented_properties]
    if missing:
        raise ConfigError(f"calculator {name} does not compute {', '.join(missing)}")
    try:
        # of the calculator itself: those of the frame would heed constraints, and assert shapes
        energy: Any = calculator.get_potential_energy(frame)
        forces: Any = calculator.get_forces(frame)
        stress: Any = calculator.get_stress(frame) if frame.pbc.all() else None
    except CalculatorSetupError as error:
        if isinstance(job.method.make, TBLiteFactory):  # its set-up is right, so the frame is not: atoms that coincide
            return _failure(f"{type(error).__name__}: {error}")
        raise ConfigError(f"{where}: calculator {name} cannot be set up: {error}") from error
    except (RuntimeError, ArithmeticError, CalledProcessError) as error:
        # what calculators raise when the SCF fails; mistakes in the set-up and in code are other classes
        return _failure(f"{type(error).__name__}: {error}")
    if unconverged(calculator):
        return _failure(f"{name} says that it is not converged")
    energy, forces, stress = (
        value if value is None else _array(value, shape, f"{where}: calculator {name} returned {quantity}")
        for quantity, value, shape in zip(
            ("energy", "forces", "stress"), (energy, forces, stress), ((), (len(frame), 3), (6,)), strict=True
        )
    )
    if not all(value is None or np.isfinite(value).all() for value in (energy, forces, stress)):
        return _failure("energy, forces or stress are not finite")
    return _Label(float(energy), forces.tolist(), None if stress is None else stress.tolist(), 0.0)


def _array(value: Any, shape: tuple[int, ...], what: str) -> NDArray[np.float64]:
    """Return numbers of the shape that they must have; one number may come in an array, a stress as a matrix."""
    try:
        array = np.asarray(value, dtype=np.float64)
    except (TypeError, ValueError):
        raise ConfigError(f"{what} {value!r:.60}, which are no numbers") from None
    if array.size == 1 and not shape:
        return array.reshape(())
    if shape == (6,) and array.shape in ((3, 3), (9,)):
        array = full_3x3_to_voigt_6_stress(array.reshape(3, 3))
    if array.shape != shape:
        raise ConfigError(f"{what} of shape {array.shape}, not {shape}")
    return array


def _failure(reason: str) -> _Label:
    return _Label(0.0, [], None, 0.0, " ".join(reason.split()))


def unconverged(calculator: Any) -> bool:
    """Tell whether a calculator says that its SCF did not converge, as VASP's does without raising."""
    results = getattr(calculator, "results", None) or {}
    says = [getattr(calculator, "converged", None), results.get("converged"), results.get("scf_converged")]
    says.append(getattr(getattr(calculator, "scf", None), "converged", None))
    return any(isinstance(word, bool | np.bool_) and not word for word in says)
