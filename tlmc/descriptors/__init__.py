"""Descriptors of structures and of atoms' surroundings: numbers that know neither orientation, place nor numbering.

All share one interface, :class:`tlmc.descriptors.base.Descriptor`: ``descriptor(structures, centers=None)`` gives a
tensor, ``descriptor.derivatives(...)`` its exact derivatives, ``n_features`` and ``feature_names`` its columns.

Of whole structures: :class:`CoulombMatrix` (molecules), :class:`EwaldMatrix` (crystals). Of atoms, periodic or not:
:class:`SymmetryFunctions` (Behler and Parrinello), :class:`AtomicEnvironmentVector` (ANI), :class:`SOAP` (also averaged
over a structure), :class:`Bispectrum` (on the hypersphere).

The modules are loaded when a name is first used: training needs :mod:`tlmc.descriptors.aev` alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tlmc.lazy import loaded_at_use

if TYPE_CHECKING:
    from tlmc.descriptors.ani import AtomicEnvironmentVector
    from tlmc.descriptors.base import Descriptor
    from tlmc.descriptors.bispectrum import Bispectrum
    from tlmc.descriptors.coulomb import CoulombMatrix
    from tlmc.descriptors.ewald import EwaldMatrix
    from tlmc.descriptors.soap import SOAP
    from tlmc.descriptors.symmetry_functions import SymmetryFunctions

__all__ = [
    "SOAP",
    "AtomicEnvironmentVector",
    "Bispectrum",
    "CoulombMatrix",
    "Descriptor",
    "EwaldMatrix",
    "SymmetryFunctions",
]

__getattr__ = loaded_at_use(
    __name__,
    {
        "ani": ("AtomicEnvironmentVector",),
        "base": ("Descriptor",),
        "bispectrum": ("Bispectrum",),
        "coulomb": ("CoulombMatrix",),
        "ewald": ("EwaldMatrix",),
        "soap": ("SOAP",),
        "symmetry_functions": ("SymmetryFunctions",),
    },
)
