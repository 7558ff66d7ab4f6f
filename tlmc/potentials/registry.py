"""Start models by name, of all families that have a folder in :mod:`tlmc.families`.

A model is fetched once and kept; a model that cannot be reached is an error that says where to put which file. One
start model never stands in for another.
"""

from __future__ import annotations

import functools
import importlib
import pkgutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, cast

from tlmc.arguments import checked
from tlmc.errors import ModelError, nearest_first
from tlmc.potentials.family import Family

if TYPE_CHECKING:
    from tlmc.potentials.model import Potential


@functools.cache
def families() -> Mapping[str, Family]:
    """Return the families by name: one for every folder of :mod:`tlmc.families` with a module ``family``."""
    found = {}
    package = importlib.import_module("tlmc.families")  # by name: what lies below knows none of them
    for folder in pkgutil.iter_modules(package.__path__):
        found[folder.name] = cast(Family, importlib.import_module(f"tlmc.families.{folder.name}.family").FAMILY)
    return found


def family_of(model: Potential) -> Family:
    """Return the family of a model."""
    return families()[model.family]


def start_models() -> dict[str, str]:
    """Return the names that `load_start_model` takes, each with a line about the model.

    Examples
    --------
    >>> "ani2xt" in start_models()
    True
    """
    return {name: line for family in families().values() for name, line in family.start_models.items()}


def family_with(name: str) -> Family:
    """Return the family that has a start model.

    Raises
    ------
    ModelError
        If none has one of this name.
    """
    for family in families().values():
        if name in family.start_models:
            return family
    raise ModelError(
        f"unknown start model {name!r}: choose one of {', '.join(nearest_first(str(name), start_models()))}"
    )


@checked
def load_start_model(name: str) -> Potential:
    """Load a published model, fetching its weights on first use.

    Parameters
    ----------
    name
        One of :func:`start_models`, such as ``"ani2x"``, ``"ani2xt"`` or ``"sevennet"``.

    Returns
    -------
    Potential
        Published weights, energies in eV.

    Raises
    ------
    ModelError
        If the name is unknown, the weights are neither here nor reachable (within seconds), or they are not the
        published ones.
    ConfigError
        If the family needs a package that is not installed.
    """
    return family_with(name).load(name)


def weights_path(name: str) -> Path:
    """Return where the weights of a start model are kept, present or not.

    Raises
    ------
    ModelError
        If the name is unknown.
    """
    return family_with(name).weights_path(name)


def reachable(name: str) -> bool:
    """Tell within seconds whether a start model is on this machine or its source answers; downloads nothing.

    Raises
    ------
    ModelError
        If the name is unknown.
    """
    return family_with(name).reachable(name)
