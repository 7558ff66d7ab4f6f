"""Unit constants; everything inside the package is in eV, Angstrom, eV/Angstrom and eV/Angstrom^3."""

from __future__ import annotations

from typing import Final

from ase import units

HARTREE: Final[float] = units.Hartree
"""eV per Hartree (ASE's CODATA value)."""

BOHR: Final[float] = units.Bohr
"""Angstrom per Bohr."""

KCAL_PER_MOL: Final[float] = units.kcal / units.mol
"""eV per kcal/mol."""
