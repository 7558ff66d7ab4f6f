"""Levels of theory: a name, and a factory of ASE calculators that worker processes can be sent."""

from __future__ import annotations

import importlib
import importlib.metadata
import inspect
import runpy
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ase import Atoms
from ase.calculators.calculator import BaseCalculator

from tlmc.errors import ConfigError
from tlmc.labelling.states import given_to

CalculatorFactory = Callable[..., BaseCalculator]


@dataclass(frozen=True)
class Method:
    """A level of theory: its name, written into every frame, and a picklable factory of its ASE calculator."""

    name: str
    make: CalculatorFactory
    """Called without arguments, or, if it needs one, with the frame to compute: for codes whose calculators are made
    with a charge and a multiplicity."""
    identity: str = ""
    """Fingerprint of all that labels depend on, filled in by `tlmc.labelling.identity.identified`: labels kept under
    another one are not used."""

    def calculator(self, frame: Atoms) -> BaseCalculator:
        """Return a new calculator for a frame."""
        return self.make(frame) if takes_frame(self.make) else self.make()

    def attach(self, frame: Atoms, where: str = "structure") -> Atoms:
        """Return a copy of a frame with a calculator, which is given its charge and spin, and without constraints.

        Raises
        ------
        ConfigError, DataError
            As `tlmc.labelling.states.given_to`; ``where`` begins the sentence.
        """
        calculator = self.calculator(frame)
        copy = given_to(calculator, frame, where)
        copy.calc = calculator
        return copy


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

    def __call__(self, *frame: Atoms) -> BaseCalculator:
        """Return what the named function returns; it is given the frame if it needs an argument.

        Raises
        ------
        ConfigError
            As `function`, or if it returns something else than an ASE calculator.
        """
        make = self.function()
        calculator = make(*frame) if takes_frame(make) else make()
        if not isinstance(calculator, BaseCalculator):
            raise ConfigError(f"{self.target!r} must return an ASE calculator, got {type(calculator).__name__}")
        return calculator

    def function(self) -> CalculatorFactory:
        """Return the named function. Modules beside its file can be imported there, as in a script.

        Raises
        ------
        ConfigError
            If the module, file or function does not exist.
        """
        place, _, name = self.target.rpartition(":")
        folder = str(Path(place).parent)
        if place.endswith(".py") and folder not in sys.path:
            sys.path.insert(0, folder)
        try:
            found = runpy.run_path(place) if place.endswith(".py") else vars(importlib.import_module(place))
            make: CalculatorFactory = found[name]
        except (ModuleNotFoundError, FileNotFoundError, AttributeError, KeyError, SyntaxError) as error:
            raise ConfigError(f"no calculator at {self.target!r} ({error})") from error
        return make


def takes_frame(make: CalculatorFactory) -> bool:
    """Tell whether a factory must be given the frame: `ImportedFactory` passes it on where it is needed."""
    if isinstance(make, ImportedFactory):
        return True
    try:
        parameters = inspect.signature(make).parameters.values()
    except (TypeError, ValueError):  # some classes written in C
        return False
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return any(p.kind in positional and p.default is inspect.Parameter.empty for p in parameters)


def method(name: str, level_of_theory: str = "") -> Method:
    """Return a method by name: ``gfn2-xtb``, ``gfn1-xtb``, or ``module:function`` / ``file.py:function`` of your own.

    Parameters
    ----------
    name
        The function of your own takes no argument, or the frame, and returns an ASE calculator with energy and forces
        (and stress for crystals). Charge and spin reach it with the frame: initial charges and moments of the atoms,
        and ``info``, as the user stated them.
    level_of_theory
        What to call a method of your own in the frames, ``"r2SCAN, VASP 6.4, 440 eV"``; by default its name.

    Raises
    ------
    ConfigError
        If the name is neither, or the level of theory is named for one of the first two.
    """
    hamiltonians = {"gfn1-xtb": "GFN1-xTB", "gfn2-xtb": "GFN2-xTB"}
    if name.lower() in hamiltonians:
        factory = TBLiteFactory(hamiltonians[name.lower()])
        if level_of_theory:
            raise ConfigError(f"the level of theory of {name} has its own name, got {level_of_theory!r}")
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
