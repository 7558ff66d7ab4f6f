"""Unit constants; everything inside the package is in eV, Angstrom, eV/Angstrom and eV/Angstrom^3."""

from __future__ import annotations

import re
from typing import Final

from ase import units

HARTREE: Final[float] = units.Hartree
"""eV per Hartree (ASE's CODATA value)."""

BOHR: Final[float] = units.Bohr
"""Angstrom per Bohr."""

KCAL_PER_MOL: Final[float] = units.kcal / units.mol
"""eV per kcal/mol."""

_ENERGIES: Final = {
    **dict.fromkeys(("ev", "electronvolt", "electronvolts"), 1.0),
    "mev": 1e-3,
    **dict.fromkeys(("hartree", "hartrees", "ha", "eh", "e_h"), HARTREE),
    **dict.fromkeys(("rydberg", "rydbergs", "ry"), units.Rydberg),
    "kcalpermol": KCAL_PER_MOL,
    "kjpermol": units.kJ / units.mol,
}
_LENGTHS: Final = {
    **dict.fromkeys(("angstrom", "angstroms", "ang", "a"), 1.0),
    **dict.fromkeys(("bohr", "bohrs", "a0", "a_0"), BOHR),
    "nm": units.nm,
}
_PRESSURES: Final = {
    "gpa": units.GPa,
    "mpa": 1e-3 * units.GPa,
    "pa": units.Pascal,
    **dict.fromkeys(("kbar", "kb"), 1e3 * units.bar),
    "bar": units.bar,
}
_FACTOR: Final = re.compile(r"([/*]*)([a-z_]+0?)(?:\^?(-?\d))?")


def parse_unit(text: str, energy: int, length: int) -> float | None:
    """Return what one of a unit written in words is worth in eV and Angstrom.

    Parameters
    ----------
    text
        ``eV``, ``Ha/Bohr``, ``kcal/mol/A``, ``eV/A^3``, ``eV*Angstrom**-3``, ``GPa``, ``a.u.``, in any letter case.
    energy, length
        Powers that it must have: 1 and 0 of an energy, 1 and -1 of a force, 1 and -3 of a stress, 0 and 1 of a length.

    Returns
    -------
    float or None
        None if it is unknown, or the unit of another quantity.
    """
    plain = re.sub(r"\u00c5|\u212b|\u00e5", "angstrom", text).lower().replace("**", "^")
    plain = re.sub(r"[\s()]+", " ", plain).strip()
    plain = (
        re.sub(r"\b(kcal|kj) ?(?:/ ?mol|[*.]? ?mol ?\^?-1)", r"\1permol", plain).replace(" ", "*").replace("*/*", "/")
    )
    if plain in ("au", "a.u.", "a.u", "atomic"):
        return HARTREE**energy * BOHR**length
    if plain in _PRESSURES:
        return float(_PRESSURES[plain]) if (energy, length) == (1, -3) else None
    value, powers, place = 1.0, [0, 0], 0
    for part in _FACTOR.finditer(plain):
        if part.start() != place:
            return None
        place = part.end()
        power = int(part[3] or 1) * (-1 if "/" in part[1] else 1)
        if part[2] in _ENERGIES:
            value, powers[0] = value * _ENERGIES[part[2]] ** power, powers[0] + power
        elif part[2] in _LENGTHS:
            value, powers[1] = value * _LENGTHS[part[2]] ** power, powers[1] + power
        else:
            return None
    return float(value) if place == len(plain) and powers == [energy, length] else None
