"""Levels of theory: a name, and a factory of ASE calculators that worker processes can be sent."""

from __future__ import annotations

import importlib
import importlib.metadata
import runpy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ase.calculators.calculator import BaseCalculator

from tlmc.errors import ConfigError

CalculatorFactory = Callable[[], BaseCalculator]


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
