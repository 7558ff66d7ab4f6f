"""Data that no training could use: what is refused before any starts, and how it is said."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Iterator, Sequence

import numpy as np
from ase import Atoms
from ase.constraints import (
    FixAtoms,
    FixBondLengths,
    FixCartesian,
    FixCom,
    FixedLine,
    FixedPlane,
    FixInternals,
    FixLinearTriatomic,
    FixScaled,
    FixSubsetCom,
)
from ase.data import chemical_symbols, covalent_radii
from ase.stress import voigt_6_to_full_3x3_stress
from numpy.typing import NDArray

from tlmc.data.dataset import Dataset
from tlmc.data.geometry import box, contacts
from tlmc.errors import DataError
from tlmc.units import HARTREE

logger = logging.getLogger(__name__)

# Two atoms closer than this fraction of the sum of their covalent radii overlap; the shortest bond of the strongly
# compressed cells among the public sets is at 0.78.
_OVERLAP = 0.5
# No matter is this dense (Angstrom^3 per atom; hydrogen at 100 GPa has 3), so such a cell is a mistake.
_SMALLEST_VOLUME_PER_ATOM = 1.0
# Labelled frames reach 17 eV/A with a median of about 1 eV/A; in kcal/mol/A the same numbers are 23 times larger.
_LARGEST_FORCE, _LARGEST_MEDIAN_FORCE = 200.0, 10.0
# eV/atom above free atoms that no bound or colliding structure reaches, and between frames of one composition.
_LARGEST_ENERGY, _LARGEST_ENERGY_SPREAD = 100.0, 20.0
# eV/atom by which labels of one geometry may differ before they contradict each other.
_LABEL_CONFLICT = 0.01
# The same of forces (eV/A) and stress (eV/A^3): more than a calculation that is repeated, or turned, differs.
_FORCE_CONFLICT, _STRESS_CONFLICT = 0.01, 1e-3
# Angstrom within which atoms are in the same place, and over which bonds count.
_SAME_PLACE, _BOND = 1e-5, 1.0
# Pairs of frames on which energies are compared with the work of the forces: how far apart in the file, how alike
# (strain; Angstrom), how many and how well correlated they must be to decide, and the slopes that true labels can have.
_WORK_NEIGHBOURS, _WORK_STRAIN, _WORK_DISPLACEMENT = 20, 0.02, 0.6
_WORK_PAIRS, _WORK_CORRELATION, _WORK_SLOPES = 50, 0.7, (0.3, 1.6)

# Constraints that change the forces of single atoms, of bonds and angles, and of a centre of mass.
_OF_ATOMS = (FixAtoms, FixCartesian, FixScaled, FixedLine, FixedPlane)
_OF_BONDS, _OF_CENTRES = (FixBondLengths, FixInternals, FixLinearTriatomic), (FixCom, FixSubsetCom)
# Words in the names of columns that say which atoms are fixed, where ASE makes no constraint of them.
_FIXING = ("mask", "fix", "froze", "freeze", "constrain", "selective", "moveable", "movable")
# eV/A: the sum of a frame's forces that constraints leave at least where atoms are marked; that proves changed forces
# beside exact zeros; and that is worth a word, since forces add up to zero but for a few meV/A per atom.
_NET_FORCE, _NET_FORCE_WITH_ZEROS, _LARGE_NET_FORCE = 0.05, (0.1, 0.01), (0.2, 0.02)

# A problem is the index of a frame in the data set and what is wrong with it.
_Problems = list[tuple[int, str]]


def check_dataset(dataset: Dataset) -> None:
    """Refuse data that no training could use, before any starts.

    In this order: no frames, no atoms; shapes of labels; NaN or infinity; a cell that is missing or has no volume;
    atoms that overlap, images included, or have no neighbours at all; energies that no such atoms can have; forces
    that cannot be eV/Angstrom (too large, or doing another work than the energies say), or that are exactly zero on
    some atoms and do not add up to zero; equal geometries with different labels or charge states. A large sum of
    forces is logged, and so are equal geometries with equal labels, which `split_dataset` keeps in one part, and
    charge states that differ between geometries, which a model that knows no charge cannot tell apart.

    Raises
    ------
    DataError
        One sentence with the source, the number of the first offending frame in it, the value, and how many others.
    """
    if not len(dataset):
        raise DataError(f"{dataset.source}: holds no frames")
    for column in ("energies", "forces", "stresses", "frame_numbers"):
        if len(getattr(dataset, column)) != len(dataset):
            raise DataError(
                f"{dataset.source}: {len(dataset)} frames need as many {column}, got {len(getattr(dataset, column))}"
            )
    checks = (
        _empty, _wrong_shape, _not_finite, _no_cell, _overlapping, _scattered, _other_charge, _impossible_energy,
        _impossible_force,
    )  # fmt: skip
    for check in checks:
        _refuse(dataset, check(dataset))
    _refuse(dataset, _zeroed_forces(dataset))
    _warn_of_net_forces(dataset)
    _check_duplicates(dataset)
    _warn_of_missing_cells(dataset)


def check_unconstrained(frames: Sequence[Atoms], dataset: Dataset) -> None:
    """Refuse forces that constraints have changed; a file that marks fixed atoms and has their true forces passes.

    Which atoms are fixed is told by ASE's constraints, or by a column such as ``move_mask``. Constrained forces do not
    change when the constraint is applied once more.

    Parameters
    ----------
    frames
        As read, with constraints and columns, in the order of the data set.
    dataset
        The same frames with the labels that would be trained on.

    Raises
    ------
    DataError
        Naming the frame, the atoms and the sum of the forces, and how to get unconstrained ones.
    """
    found = []
    for k, frame in enumerate(frames):
        forces = dataset.forces[k]
        if forces.shape != (len(frame), 3) or not np.isfinite(forces).all():
            continue  # what is wrong is said by `check_dataset`
        net = float(np.linalg.norm(forces.sum(axis=0)))
        for marked, what in _marked(frame, forces):
            others = np.delete(forces, marked, axis=0)
            # where one atom is fixed, forces that add up to zero show that its own is zero; at rest all are
            if (others.any() if len(others) else forces.any()) and (len(marked) > 1 or net > _NET_FORCE):
                found.append((net, k, f"{what.format(_atoms(frame, marked))}; they add up to {net:.3g} eV/A"))
    _refuse(
        dataset,
        [
            (
                k,
                f"has forces that constraints have changed: {sentence}; train on the forces as computed (in ASE "
                "get_forces(apply_constraint=False), in other codes with all atoms free)",
            )
            for _, k, sentence in sorted(found, key=lambda one: -one[0])
        ],
    )


def _marked(frame: Atoms, forces: NDArray[np.float64]) -> Iterator[tuple[NDArray[np.int64], str]]:
    """Yield atoms whose forces are as some constraint leaves them, and a phrase about them."""
    for constraint in frame.constraints:
        name = type(constraint).__name__
        if not isinstance(constraint, _OF_ATOMS + _OF_BONDS + _OF_CENTRES):
            continue
        again = forces.copy()
        constraint.adjust_forces(frame, again)
        atoms = np.arange(len(frame))
        if not isinstance(constraint, FixCom):
            atoms = np.unique(np.asarray(constraint.get_indices(), dtype=np.int64))  # type: ignore[no-untyped-call]
        if np.abs(again - forces).max(initial=0.0) > 1e-6 + 1e-5 * np.abs(forces).max(initial=0.0):
            continue
        if isinstance(constraint, _OF_CENTRES):
            # symmetry can keep the centre of mass at rest, too
            if np.linalg.norm(forces.sum(axis=0)) > _NET_FORCE:
                yield atoms, f"they are as {name} leaves them on {{}}"
        elif isinstance(constraint, _OF_BONDS) or not _flat(frame, constraint):
            zeros = "they are exactly zero on {}, which are fixed"
            yield atoms, zeros if isinstance(constraint, FixAtoms) else f"they are as {name} leaves them on {{}}"
    zero = forces == 0
    for name, column in frame.arrays.items():
        if not any(word in name.lower() for word in _FIXING) or column.shape not in ((len(frame),), (len(frame), 3)):
            continue
        zeros = zero if column.ndim == 2 else zero.all(axis=1)
        if (
            zeros.any()
            and not zeros.all()
            and any(np.array_equal(column == value, zeros) for value in np.unique(column))
        ):
            marked = np.flatnonzero(zeros if column.ndim == 1 else zeros.any(axis=1))
            yield marked, f"they are exactly zero on {{}}, which the column {name} marks"


def _flat(frame: Atoms, constraint: object) -> bool:
    """Tell whether all atoms lie in a plane or line normal to the fixed directions: so does symmetry fix them."""
    if isinstance(constraint, FixAtoms):
        return False
    removed = []
    for axis in np.eye(3):
        field = np.tile(axis, (len(frame), 1))
        constraint.adjust_forces(frame, field)  # type: ignore[attr-defined]
        removed.append(axis - field)
    directions = np.array(removed).transpose(1, 0, 2).reshape(-1, 3)
    directions = directions[np.linalg.norm(directions, axis=1) > 1e-6]
    return bool(np.ptp(frame.positions @ directions.T, axis=0).max(initial=0.0) < 1e-3)


def _atoms(frame: Atoms, indices: NDArray[np.int64]) -> str:
    listed = ", ".join(f"{k} ({frame.symbols[k]})" for k in indices[:3])
    return f"{len(indices)} of {len(frame)} atoms ({listed}{', ...' if len(indices) > 3 else ''})"


def require_crystals(dataset: Dataset) -> None:
    """Check that every frame is a crystal, for tasks that need a periodic cell.

    Raises
    ------
    DataError
        Naming the first frame that is not, its periodicity and volume, and how many others there are.
    """
    problems = []
    for k in np.flatnonzero(~dataset.is_crystal):
        frame = dataset.frames[k]
        volume = f"{frame.cell.volume / len(frame):.0f} A^3 per atom" if frame.cell.rank == 3 else "no cell"
        periodic = "".join(axis for axis, on in zip("abc", frame.pbc, strict=True) if on) or "nothing"
        problems.append(
            (int(k), f"is no crystal (periodic along {periodic}, {volume}); dataset.crystals() keeps those that are")
        )
    _refuse(dataset, problems)


def and_others(count: int) -> str:
    """Say how many frames have the problem besides the one named."""
    return "" if count == 1 else f" (and {count - 1} more frame{'s' if count > 2 else ''})"


def _refuse(dataset: Dataset, problems: _Problems) -> None:
    """Raise for the first problem, if there is one."""
    if problems:
        k, sentence = problems[0]
        number = dataset.frame_numbers[k]
        affected = len({frame for frame, _ in problems})
        raise DataError(f"{dataset.source}: frame {number} {sentence}{and_others(affected)}")


def _empty(dataset: Dataset) -> _Problems:
    return [(k, "has no atoms") for k, frame in enumerate(dataset.frames) if not len(frame)]


def _wrong_shape(dataset: Dataset) -> _Problems:
    problems: _Problems = []
    for k, frame in enumerate(dataset.frames):
        stress = dataset.stresses[k]
        for label, found, expected in (
            ("energy", np.shape(dataset.energies[k]), ()),
            ("forces", np.shape(dataset.forces[k]), (len(frame), 3)),
            ("stress", (6,) if stress is None else np.shape(stress), (6,)),
        ):
            if found != expected:
                problems.append(
                    (k, f"({frame.get_chemical_formula()}): {label} must have shape {expected}, got {found}")
                )
    return problems


def _not_finite(dataset: Dataset) -> _Problems:
    problems: _Problems = []
    for k, frame in enumerate(dataset.frames):
        stress = dataset.stresses[k]
        for label, values in (
            ("position", frame.positions),
            ("cell", frame.cell.array),
            ("energy", dataset.energies[k : k + 1]),
            ("forces", dataset.forces[k]),
            ("stress", np.zeros(6) if stress is None else stress),
        ):
            if not np.isfinite(values).all():
                row = int(np.argwhere(~np.isfinite(values))[0, 0])
                atom = (
                    f" of atom {row} ({chemical_symbols[frame.numbers[row]]})"
                    if label in ("position", "forces")
                    else ""
                )
                problems.append((k, f"has a value that is not finite: {label}{atom} is {np.array2string(values[row])}"))
    return problems


def _no_cell(dataset: Dataset) -> _Problems:
    problems: _Problems = []
    for k, frame in enumerate(dataset.frames):
        axes = [
            axis for axis, on, length in zip("abc", frame.pbc, frame.cell.lengths(), strict=True) if on and not length
        ]
        if axes:
            problems.append((k, f"is periodic along {', '.join(axes)} but has no cell vector there"))
        elif frame.pbc.any():
            volume = abs(np.linalg.det(frame.cell.complete().array))
            if volume < _SMALLEST_VOLUME_PER_ATOM * len(frame):
                problems.append((k, f"has a cell of zero volume, or nearly: {volume:.3g} A^3 for {len(frame)} atoms"))
    return problems


def _overlapping(dataset: Dataset) -> _Problems:
    problems: _Problems = []
    for k, frame in enumerate(dataset.frames):
        i, j, shift, distance = contacts(frame, 2 * _OVERLAP * covalent_radii[frame.numbers].max())
        ratio = distance / (covalent_radii[frame.numbers[i]] + covalent_radii[frame.numbers[j]])
        if ratio.size and ratio.min() < _OVERLAP:
            worst = int(ratio.argmin())
            a, b = (f"{atom} ({chemical_symbols[frame.numbers[atom]]})" for atom in (i[worst], j[worst]))
            image = ", an image in a neighbouring cell" if shift[worst].any() else ""
            problems.append((k, f"has overlapping atoms: {a} and {b}{image} are {distance[worst]:.3f} A apart"))
    return problems


def _scattered(dataset: Dataset) -> _Problems:
    """Find atoms without any neighbour: of three or more in every frame, since a gas teaches nothing."""
    if not (dataset.n_atoms > 2).any() or any(len(contacts(frame).first) for frame in dataset.frames):
        return []
    hint = "no atom of any frame has a neighbour within 6 A: positions and cell must be in Angstrom"
    return [(int(k), f"({dataset.frames[k].symbols}): {hint}") for k in np.flatnonzero(dataset.n_atoms > 2)]


def _impossible_energy(dataset: Dataset) -> _Problems:
    if len(dataset) > 1 and not dataset.energies.any():
        return [(k, "has an energy of exactly 0 eV, as have all: are they labels?") for k in range(len(dataset))]
    hint = "units must be given if they are not eV, e.g. units='kcal/mol' (--units kcal/mol) or 'Hartree/Bohr'"
    per_atom = dataset.energies / dataset.n_atoms
    problems: _Problems = []
    by_composition: defaultdict[str, list[int]] = defaultdict(list)
    for k, frame in enumerate(dataset.frames):
        by_composition[frame.symbols.formula.reduce()[0].format("hill")].append(k)
        # the Thomas-Fermi energy, -0.7687 Z^(7/3) Hartree, lies below that of every real atom (by a fifth for iodine)
        lowest = float((-0.7687 * HARTREE * frame.numbers ** (7 / 3)).mean())
        if not lowest < per_atom[k] < _LARGEST_ENERGY:
            limits = f"the energy must lie within {lowest:.0f} and {_LARGEST_ENERGY:.0f}"
            problems.append((k, f"has {per_atom[k]:.6g} eV/atom, but {limits}; {hint}"))
    for formula, members in by_composition.items():
        middle = float(np.median(per_atom[members]))
        problems += [
            (k, f"has {per_atom[k]:.6g} eV/atom, but other frames of {formula} have about {middle:.6g}; {hint}")
            for k in members
            if abs(per_atom[k] - middle) > _LARGEST_ENERGY_SPREAD
        ]
    return problems


def _impossible_force(dataset: Dataset) -> _Problems:
    norms = [np.linalg.norm(forces, axis=1) for forces in dataset.forces]
    everywhere = np.concatenate([norm for norm in norms if len(norm) > 1] or [np.ones(1)])
    # symmetry can cancel every force of one frame, not of several different ones
    if len(dataset) > 1 and not everywhere.any():
        return [
            (k, "has forces that are all exactly 0 eV/A, as have all frames: are they labels?")
            for k, norm in enumerate(norms)
            if len(norm) > 1
        ]
    largest = [(k, int(norm.argmax()), float(norm.max())) for k, norm in enumerate(norms)]
    hint = "forces must be in eV/A, or units given, e.g. units='kcal/mol' (--units kcal/mol) or 'Hartree/Bohr'"
    problems = [
        (k, f"has a force of {value:.4g} eV/A on atom {atom} ({dataset.frames[k].symbols[atom]}); {hint}")
        for k, atom, value in largest
        if value > _LARGEST_FORCE
    ]
    median = float(np.median(everywhere))
    if not problems and median > _LARGEST_MEDIAN_FORCE:
        problems = [
            (k, f"has a force of {value:.4g} eV/A on atom {atom}, the median of all frames is {median:.4g}; {hint}")
            for k, atom, value in largest
        ]
    return problems or _forces_without_work(dataset)


def _zeroed_forces(dataset: Dataset) -> _Problems:
    """Find forces that are exactly zero on some atoms while the others do not add up to zero: fixed atoms, unmarked."""
    found = []
    for k, forces in enumerate(dataset.forces):
        zero, net = forces == 0, np.abs(forces.sum(axis=0))
        whole = zero.all(axis=1)
        base, per_atom = _NET_FORCE_WITH_ZEROS
        for axis in np.flatnonzero(net > max(base, per_atom * len(forces))):
            # a rounded component may be zero by chance, all three of an atom or those of several atoms are not
            atoms = np.flatnonzero(zero[:, axis])
            if (whole.any() or len(atoms) > max(2, len(forces) // 10)) and len(atoms) < len(forces):
                found.append((float(net[axis]), k, "xyz"[axis], atoms))
    return [
        (
            k,
            f"has forces along {axis} that are exactly zero on {_atoms(dataset.frames[k], atoms)} and add up to "
            f"{net:.3g} eV/A, where true forces add up to nearly zero: constraints have changed them; train on "
            "the forces as computed (in ASE get_forces(apply_constraint=False), in other codes with all atoms free)",
        )
        for net, k, axis, atoms in sorted(found, key=lambda one: -one[0])
    ]


def _warn_of_net_forces(dataset: Dataset) -> None:
    net = np.array([np.linalg.norm(forces.sum(axis=0)) for forces in dataset.forces])
    base, per_atom = _LARGE_NET_FORCE
    large = np.flatnonzero(net > np.maximum(base, per_atom * dataset.n_atoms))
    if len(large):
        worst = large[net[large].argmax()]
        logger.warning(
            "%s: the forces of frame %d add up to %.3g eV/A%s, where those of %d atoms should to nearly zero: no "
            "model of interatomic forces can learn that; are atoms fixed, outside the file, or in an external field?",
            dataset.source,
            dataset.frame_numbers[worst],
            net[worst],
            and_others(len(large)),
            dataset.n_atoms[worst],
        )


def _forces_without_work(dataset: Dataset) -> _Problems:
    """Compare energy differences of similar frames with the work of their forces.

    Between two frames of one cell that differ by displacements u, ``E_2 - E_1 = -(F_1 + F_2).u / 2`` up to third order.
    The slope of one side on the other is near 1 for any labels that belong together (0.81 to 1.03 on eight public
    sets, 0.39 to 1.24 on a dozen of their frames), -1 for gradients, 51 for forces in Hartree/Bohr beside eV. Frames
    that are too different decide nothing.
    """
    groups: defaultdict[tuple[bytes, bytes], list[int]] = defaultdict(list)
    for k, frame in enumerate(dataset.frames):
        groups[frame.numbers.tobytes(), frame.pbc.tobytes()].append(k)
    pairs: list[tuple[int, int, float, float]] = []
    for members in groups.values():
        frames = [dataset.frames[k] for k in members]
        cells = np.array([box(frame) for frame in frames])
        fractional = np.linalg.solve(cells.mT, np.array([frame.positions for frame in frames]).mT).mT
        forces = np.array([dataset.forces[k] for k in members])
        energies = dataset.energies[members]
        for gap in range(1, min(len(members), _WORK_NEIGHBOURS + 1)):
            strain = np.linalg.solve(cells[:-gap], cells[gap:]) - np.eye(3)
            moved = fractional[gap:] - fractional[:-gap]
            moved -= np.where(frames[0].pbc, np.rint(moved), 0.0)
            moved -= moved.mean(axis=1, keepdims=True)
            displacement = moved @ (0.5 * (cells[gap:] + cells[:-gap]))
            work = -0.5 * np.einsum("kic,kic->k", forces[gap:] + forces[:-gap], displacement)
            near = (np.abs(strain).max(axis=(1, 2)) < _WORK_STRAIN) & (
                np.abs(displacement).max(axis=(1, 2)) < _WORK_DISPLACEMENT
            )
            change = energies[gap:] - energies[:-gap]
            pairs += [(members[a], members[a + gap], float(work[a]), float(change[a])) for a in np.flatnonzero(near)]
    if len(pairs) < _WORK_PAIRS:
        return []
    work, change = np.array([pair[2:] for pair in pairs]).T
    if not work.std() or not change.std() or abs(np.corrcoef(work, change)[0, 1]) < _WORK_CORRELATION:
        return []
    slope = float(work @ change / (work @ work))
    if _WORK_SLOPES[0] < slope < _WORK_SLOPES[1]:
        return []
    first, second, one_work, one_change = pairs[int(np.abs(work).argmax())]
    return [
        (
            min(first, second),
            f"and frame {dataset.frame_numbers[max(first, second)]} differ by {one_change:.4g} eV, but moving the "
            f"atoms from one to the other against the forces takes {one_work:.4g} eV (ratio {slope:.3g}, {len(pairs)} "
            "pairs, must be near 1): energies are not in eV, forces not in eV/A, or their sign is reversed",
        )
    ]


def _other_charge(dataset: Dataset) -> _Problems:
    """Find geometries in two charge states; warn where different geometries have different ones."""
    states = _states(dataset)
    if len({*states}) < 2:
        return []
    first = dataset.duplicates
    problems = [
        (
            k,
            f"has the geometry of frame {dataset.frame_numbers[first[k]]} in another charge state "
            f"({_words(states[k])}; there {_words(states[first[k]])}): a model that knows no charge cannot learn both",
        )
        for k in range(len(dataset))
        if (differ := {*states[k]} ^ {*states[first[k]]})
        # an initial moment is a guess, which need not lead to another state
        and ({name for name, _ in differ} != {"magnetic moment"} or _conflict(dataset, k, int(first[k])))
    ]
    if not problems:
        by_formula: defaultdict[str, set[tuple[tuple[str, float], ...]]] = defaultdict(set)
        for frame, state in zip(dataset.frames, states, strict=True):
            by_formula[frame.get_chemical_formula()].add(state)
        mixed = [formula for formula, found in by_formula.items() if len(found) > 1]
        k = next(k for k, state in enumerate(states) if state != states[0])
        logger.warning(
            "%s: CHARGE STATES DIFFER between frames: %s in frame %d, %s in frame %d, %d of %d frames are in another "
            "than the first%s: no model here knows charge or spin, so that it learns a mixture: keep one state",
            dataset.source, _words(states[0]), dataset.frame_numbers[0], _words(states[k]), dataset.frame_numbers[k],
            sum(state != states[0] for state in states), len(dataset),
            f", among them frames of {mixed[0]}" if mixed else "",
        )  # fmt: skip
    return problems


def _states(dataset: Dataset) -> list[tuple[tuple[str, float], ...]]:
    """Return charge and spin of each frame; where one says nothing: neutral, no moment, and the first spin said."""
    usual: dict[str, float] = {}
    for state in dataset.charge_states:
        for name, value in state.items():
            usual.setdefault(name, value if name == "spin" else 0.0)
    return [tuple((name, state.get(name, usual[name])) for name in usual) for state in dataset.charge_states]


def _words(state: tuple[tuple[str, float], ...]) -> str:
    return ", ".join(f"{name} {value:g}" for name, value in state)


def _check_duplicates(dataset: Dataset) -> None:
    groups = dataset.duplicates
    copies = np.flatnonzero(groups != np.arange(len(groups)))
    if not len(copies):
        return
    problems = [
        (int(k), f"has the geometry of frame {dataset.frame_numbers[groups[k]]} but {conflict}")
        for k in copies
        if (conflict := _conflict(dataset, int(k), int(groups[k])))
    ]
    _refuse(dataset, problems)
    logger.warning(
        "%s: %d of %d frames repeat the geometry of another, the first is frame %d",
        dataset.source,
        len(copies),
        len(dataset),
        dataset.frame_numbers[copies[0]],
    )


def _warn_of_missing_cells(dataset: Dataset) -> None:
    """Warn where the same atoms are periodic in some frames and not in others, as if a lattice were missing."""
    periodic: dict[bytes, int] = {}
    for k, frame in enumerate(dataset.frames):
        if frame.pbc.any():
            periodic.setdefault(frame.numbers.tobytes(), k)
    bare = [k for k, frame in enumerate(dataset.frames) if not frame.pbc.any() and frame.numbers.tobytes() in periodic]
    if bare:
        logger.warning(
            "%s: frame %d%s: not periodic, but frame %d of the same atoms is: is a lattice missing?",
            dataset.source, dataset.frame_numbers[bare[0]], and_others(len(bare)),
            dataset.frame_numbers[periodic[dataset.frames[bare[0]].numbers.tobytes()]],
        )  # fmt: skip


def _conflict(dataset: Dataset, k: int, first: int) -> str:
    """Say how the labels of a frame contradict those of another with its geometry, empty if they agree.

    The same atoms in the same places are compared one by one; of a copy that is turned, moved or reordered, what that
    leaves unchanged is: the sizes of forces, how far they point along the sum of the bonds, the principal stresses.
    """
    energy = abs(dataset.energies[k] - dataset.energies[first]) / dataset.n_atoms[k]
    if energy > _LABEL_CONFLICT:
        return f"another energy, by {energy:.4g} eV/atom"
    one, other = dataset.frames[k], dataset.frames[first]
    in_place = (
        np.array_equal(one.numbers, other.numbers)
        and np.allclose(one.cell.array, other.cell.array, atol=_SAME_PLACE)
        and np.allclose(one.positions, other.positions, atol=_SAME_PLACE)
    )
    gap, atom = _force_gap(dataset, k, first, in_place)
    # small forces are noise in part; of a copy that is moved a little they also differ in truth
    largest = float(np.linalg.norm(dataset.forces[first], axis=1).max())
    if gap > (np.clip(0.1 * largest, 0.2 * _FORCE_CONFLICT, _FORCE_CONFLICT) if in_place else _FORCE_CONFLICT):
        where = f", by {gap:.4g} eV/A on atom {atom} ({one.symbols[atom]})" if in_place else f", by {gap:.4g} eV/A"
        return f"other forces{where}"
    stress, reference = dataset.stresses[k], dataset.stresses[first]
    if stress is not None and reference is not None:
        if not in_place:
            stress, reference = (np.linalg.eigvalsh(voigt_6_to_full_3x3_stress(s)) for s in (stress, reference))
        gap = float(np.abs(stress - reference).max())
        if gap > _STRESS_CONFLICT:
            return f"another stress, by {gap:.4g} eV/A^3"
    return ""


def _force_gap(dataset: Dataset, k: int, first: int, in_place: bool) -> tuple[float, int]:
    """Return the largest difference of forces, eV/A, and the atom where it is."""
    if in_place:
        gaps = np.linalg.norm(dataset.forces[k] - dataset.forces[first], axis=1)
        return float(gaps.max()), int(gaps.argmax())
    features = []
    for n in (k, first):
        frame, forces = dataset.frames[n], dataset.forces[n]
        i, j, shift, distance = contacts(frame)
        bonds = frame.positions[j] + shift @ box(frame) - frame.positions[i]
        bonds *= np.exp(-((distance / _BOND) ** 2) / 2)[:, None] / _BOND
        total = np.zeros((len(frame), 3))
        np.add.at(total, i, bonds)
        np.add.at(total, j, -bonds)
        total /= np.maximum(np.linalg.norm(total, axis=1, keepdims=True), 1)
        values = np.column_stack([np.linalg.norm(forces, axis=1), (forces * total).sum(axis=1)])
        order = np.argsort(frame.numbers, kind="stable")
        numbers = frame.numbers[order]
        features.append(np.concatenate([np.sort(values[order][numbers == z], axis=0) for z in np.unique(numbers)]))
    return float(np.abs(features[0] - features[1]).max()), -1
