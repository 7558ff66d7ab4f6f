"""Calculators that behave badly on request, in a module that worker processes import quickly."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms
from ase.calculators.calculator import Calculator, InputError, SCFError, all_changes
from ase.calculators.lj import LennardJones
from numpy.random import default_rng


class Springs(Calculator):
    """Atoms on springs to the origin; ``mood`` says what goes wrong for frames whose first atom has x > 1."""

    implemented_properties = ["energy", "forces", "stress"]

    def __init__(self, mood: str = "", pause: float = 0.0, mended: str = "") -> None:
        super().__init__()
        # private: no setting of the calculator by which labels are told apart
        self._mood, self.pause = "" if mended and Path(mended).exists() else mood, pause

    def calculate(
        self, atoms: Atoms | None = None, properties: Any = None, system_changes: list[str] = all_changes
    ) -> None:
        super().calculate(atoms, properties, system_changes)
        time.sleep(self.pause)
        with Path("calls").open("a") as log:
            log.write("called\n")
        self.results = {
            "energy": 0.5 * (self.atoms.positions**2).sum(),
            "forces": -self.atoms.positions,
            "stress": np.arange(6.0),
        }
        if self.atoms.positions[0, 0] > 1:
            if self._mood == "scf":
                raise SCFError("SCF not converged in 250 cycles")
            if self._mood == "nan":
                self.results["forces"][0, 1] = np.nan
            if self._mood == "setup":
                raise InputError("no such functional")
            if self._mood == "bug":
                raise TypeError("a defect of the calculator")
            if self._mood == "die":
                os._exit(3)


class Witness(Calculator):
    """Springs whose energy tells what the calculator was given: charge, magnetic moment, ``info["solvent"]``, tags."""

    implemented_properties = ["energy", "forces", "stress"]

    def calculate(
        self, atoms: Atoms | None = None, properties: Any = None, system_changes: list[str] = all_changes
    ) -> None:
        super().calculate(atoms, properties, system_changes)
        frame = self.atoms
        self.results = {
            "energy": 1000.0 * frame.get_initial_charges().sum()
            + 100.0 * frame.get_initial_magnetic_moments().sum()
            + 10.0 * len(frame.info.get("solvent", ""))
            + frame.get_tags().sum(),
            "forces": np.full((len(frame), 3), 0.5),
            "stress": np.zeros(6),
        }


def witness() -> Calculator:
    return Witness()


@dataclass(frozen=True)
class Wrong:
    """Factory of calculators whose results are no label."""

    results: str

    def __call__(self) -> Calculator:
        calculator = Springs()
        given = {
            "matrix": {"stress": np.diag([1.0, 2.0, 3.0])},
            "flat": {"forces": np.zeros(9)},
            "text": {"energy": "low"},
            "vasp": {},
        }[self.results]
        calculate = calculator.calculate

        def wrong(*arguments: Any) -> None:
            calculate(*arguments)
            calculator.results |= given
            calculator.converged = self.results != "vasp"

        calculator.calculate = wrong
        return calculator


class EnergyOnly(Springs):
    implemented_properties = ["energy"]


@dataclass(frozen=True)
class Make:
    mood: str = ""
    pause: float = 0.0
    energy_only: bool = False
    mended: str = ""
    """File whose presence lifts the mood, as a larger queue does."""

    def __call__(self) -> Calculator:
        return EnergyOnly() if self.energy_only else Springs(self.mood, self.pause, self.mended)


@dataclass(frozen=True)
class MakeArgon:
    def __call__(self) -> Calculator:
        return LennardJones(sigma=3.4, epsilon=0.0104, rc=8.0)


def atoms_in_a_box(count: int) -> list[Atoms]:
    """Frames of three atoms; the first atom is at x = 0.3, 0.6, 0.9, 1.2 ..."""
    rng = default_rng(3)
    frames = []
    for k in range(count):
        positions = rng.uniform(0, 10, (3, 3))
        positions[0, 0] = 0.3 * (k + 1)
        frames.append(Atoms("NHO", positions, cell=[10, 11, 12], pbc=True, info={"group": "rattle", "place": k}))
    return frames
