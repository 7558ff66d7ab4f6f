"""Forces that constraints have changed are no labels; a file that only marks fixed atoms is."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import ase.io
import numpy as np
import pytest
from ase import Atoms
from ase.build import molecule
from ase.calculators.lj import LennardJones
from ase.calculators.singlepoint import SinglePointCalculator
from ase.constraints import FixAtoms, FixBondLengths, FixCartesian, FixCom, FixedLine, FixedPlane, FixScaled, Hookean

from helpers.argon import argon, labelled
from tlmc.data.loading import dataset_from_frames, load_dataset
from tlmc.errors import DataError
from tlmc.labelling import Method, label
from tlmc.sampling import CalculatorPool
from tlmc.sampling.modes import hessian


def frames(n: int = 3) -> list[Atoms]:
    """Argon in doubled cells, eight atoms."""
    result = []
    for one in argon(n, seed=3):
        frame = one.repeat((2, 1, 1))
        frame.positions += np.random.default_rng(1).normal(scale=0.2, size=(8, 3))
        frame.calc = LennardJones(sigma=3.4, epsilon=0.2, rc=10.0, smooth=True)
        result.append(labelled(frame, frame.get_potential_energy(), frame.get_forces()))
    return result


CONSTRAINTS: dict[str, tuple[Callable[[], object], str]] = {
    "atoms": (lambda: FixAtoms([1, 3]), r"exactly zero on 2 of 8 atoms \(1 \(Ar\), 3 \(Ar\)\), which are fixed"),
    "one atom": (lambda: FixAtoms([2]), r"exactly zero on 1 of 8 atoms \(2 \(Ar\)\), which are fixed"),
    "plane": (lambda: FixedPlane([0, 4], (1, 1, 0)), r"as FixedPlane leaves them on 2 of 8 atoms"),
    "line": (lambda: FixedLine([0, 4], (0, 1, 1)), r"as FixedLine leaves them on 2 of 8 atoms"),
    "components": (lambda: FixCartesian([5, 6], (True, False, True)), "as FixCartesian leaves them on 2 of 8 atoms"),
    "selective dynamics": (lambda: FixScaled([2, 3, 4], (False, False, True)), "as FixScaled leaves them on 3 of 8"),
    "bonds": (lambda: FixBondLengths([(0, 1)]), "as FixBondLengths leaves them on 2 of 8 atoms"),
}


@pytest.mark.parametrize("kind", CONSTRAINTS)
def test_forces_that_constraints_have_changed_are_refused_and_true_ones_are_not(kind: str, tmp_path: Path) -> None:
    make, sentence = CONSTRAINTS[kind]
    true = frames()
    for frame in true:
        frame.set_constraint(make())
    changed = [frame.copy() for frame in true]
    for copy, frame in zip(changed, true, strict=True):
        copy.calc = SinglePointCalculator(copy, energy=frame.calc.results["energy"], forces=frame.get_forces())
    dataset = dataset_from_frames(true, name="a")
    assert dataset.forces[0] == pytest.approx(true[0].get_forces(apply_constraint=False))
    ase.io.write(tmp_path / "a.traj", true)
    load_dataset(tmp_path / "a.traj")
    match = rf"a.traj: frame \d has forces that constraints have changed: they are {sentence}.*eV/A; .*apply_constraint"
    with pytest.raises(DataError, match=match):
        dataset_from_frames(changed, name="a", source="a.traj")


def test_a_constraint_of_the_centre_of_mass_is_found_by_what_it_leaves() -> None:
    def with_forces(constrained: bool) -> list[Atoms]:
        result = []
        for seed in range(3):
            frame = molecule("CH3OH")
            frame.rattle(0.1, seed=seed)
            forces = np.random.default_rng(seed).normal(size=(6, 3))
            frame.set_constraint(FixCom())
            frame = labelled(frame, -30.0 + 0.1 * seed, forces - forces.mean(axis=0))
            result.append(labelled(frame, -30.0 + 0.1 * seed, frame.get_forces(apply_constraint=constrained)))
        return result

    dataset_from_frames(with_forces(False), name="a")
    with pytest.raises(DataError, match="as FixCom leaves them on 6 of 6 atoms"):
        dataset_from_frames(with_forces(True), name="a")


def test_a_spring_changes_nothing_that_is_read() -> None:
    true = frames()
    for frame in true:
        frame.set_constraint(Hookean(0, 1, rt=0.5, k=5.0))
    assert dataset_from_frames(true, name="a").forces[0] == pytest.approx(frames()[0].get_forces())


def write_columns(path: Path, column: np.ndarray, name: str, zeroed: np.ndarray) -> None:
    """Write an extxyz file by hand: ASE makes constraints of some columns."""
    lines = []
    for frame in frames():
        forces = np.where(zeroed[:, None], 0.0, frame.get_forces())
        lattice = " ".join(map(str, frame.cell.array.ravel()))
        kind = "L" if column.dtype == bool else "I"
        lines += [
            str(len(frame)),
            f'Lattice="{lattice}" Properties=species:S:1:pos:R:3:{name}:{kind}:1:forces:R:3 '
            f'energy={frame.get_potential_energy()} pbc="T T T"',
        ]
        for symbol, x, mark, f in zip(frame.symbols, frame.positions, column, forces, strict=True):
            word = ("T" if mark else "F") if column.dtype == bool else str(mark)
            lines.append(" ".join([symbol, *map(repr, map(float, x)), word, *map(repr, map(float, f))]))
    path.write_text("\n".join(lines) + "\n")


@pytest.mark.parametrize(
    ("name", "column"),
    [
        ("move_mask", np.arange(8) > 2),
        ("fixed", np.arange(8) <= 2),
        ("selective_dynamics", (np.arange(8) > 2).astype(int)),
        ("unheard_of", np.arange(8)),
    ],
)
def test_columns_that_mark_fixed_atoms(tmp_path: Path, name: str, column: np.ndarray) -> None:
    fixed = np.arange(8) <= 2
    write_columns(tmp_path / "right.extxyz", column, name, np.zeros(8, dtype=bool))
    load_dataset(tmp_path / "right.extxyz")
    write_columns(tmp_path / "zeroed.extxyz", column, name, fixed)
    # without a mark, the sum of the forces proves it
    with pytest.raises(DataError, match=r"zeroed.extxyz: frame \d has forces .*exactly zero on 3 of 8 atoms"):
        load_dataset(tmp_path / "zeroed.extxyz")


def test_single_components_of_zero_are_proven_by_the_sum_of_the_others() -> None:
    changed = frames()
    for frame in changed:
        frame.calc.results["forces"][:5, 2] = 0.0
    with pytest.raises(DataError, match=r"forces along z that are exactly zero on 5 of 8 atoms .* add up to"):
        dataset_from_frames(changed, name="a")


def test_zeros_by_symmetry_and_of_free_atoms_are_labels() -> None:
    # a planar molecule whose atoms are kept in their plane, an atom far from all others, one at a centre of symmetry
    water = molecule("H2O")
    forces = np.zeros((3, 3))
    forces[:, 1:] = [[0.0, -1.0], [0.4, 0.5], [-0.4, 0.5]]
    water.set_constraint(FixedPlane([0, 1, 2], (1, 0, 0)))
    far = molecule("H2O")
    far += Atoms("Ar", positions=[[50.0, 0.0, 0.0]])
    far.set_constraint(FixAtoms([3]))
    dioxide = molecule("CO2")
    dioxide.set_constraint(FixAtoms([0]))
    stretched = np.array([[0.0, 0.0, 0.0], [0.0, 0.0, 1.0], [0.0, 0.0, -1.0]])
    crystal = argon(1)[0]
    crystal.set_constraint(FixAtoms([0, 1]))
    for frame, labels in (
        (water, forces),
        (far, np.vstack([forces, np.zeros(3)])),
        (dioxide, stretched),
        (crystal, np.zeros((4, 3))),
    ):
        assert len(dataset_from_frames([labelled(frame, -14.0, labels)], name="a")) == 1


def test_a_large_sum_of_forces_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    pushed = frames()
    with caplog.at_level(logging.WARNING, "tlmc.data.checks"):
        dataset_from_frames(pushed, name="a", source="a.traj")
    assert not caplog.text
    for frame in pushed[1:]:
        frame.calc.results["forces"] = frame.calc.results["forces"] + [0.0, 0.1, 0.0]
    # a few meV/A per atom are usual
    pushed[0].calc.results["forces"] = pushed[0].calc.results["forces"] + [0.0, 0.005, 0.0]
    with caplog.at_level(logging.WARNING, "tlmc.data.checks"):
        dataset_from_frames(pushed, name="a", source="a.traj")
    assert "a.traj: the forces of frame 1 add up to 0.8 eV/A (and 1 more frame)" in caplog.text


def lennard_jones() -> LennardJones:
    return LennardJones(sigma=3.4, epsilon=0.2, rc=10.0, smooth=True)


@pytest.mark.slow
def test_own_labels_and_hessians_are_those_of_free_atoms(tmp_path: Path) -> None:
    free, fixed = frames(), frames()
    for frame in fixed:
        frame.set_constraint([FixAtoms([0, 1, 2]), Hookean(3, 4, rt=0.5, k=5.0)])
    label(fixed, Method("lj", lennard_jones), tmp_path / "labelled.extxyz")
    found = load_dataset(tmp_path / "labelled.extxyz")
    pooled = CalculatorPool(fixed, lennard_jones()).label([0, 1, 2])
    for k, frame in enumerate(free):
        assert found.forces[k] == pytest.approx(frame.get_forces(), abs=1e-4)
        assert pooled.forces[k] == pytest.approx(frame.get_forces())
        assert pooled.energies[k] == pytest.approx(frame.get_potential_energy())
    assert hessian(fixed[0], lennard_jones()) == pytest.approx(hessian(free[0], lennard_jones()))
