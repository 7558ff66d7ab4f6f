"""Which labels structures carry, under which names, in which units: the border at which all become eV and Angstrom."""

from __future__ import annotations

import logging
import math
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from ase import Atoms
from ase.data import covalent_radii
from ase.stress import full_3x3_to_voigt_6_stress
from numpy.typing import NDArray

from tlmc.data.checks import and_others
from tlmc.data.dataset import letters
from tlmc.data.extxyz import numbers
from tlmc.data.geometry import contacts
from tlmc.errors import DataError
from tlmc.units import BOHR, HARTREE, KCAL_PER_MOL, parse_unit

logger = logging.getLogger(__name__)

# name -> (units in words, eV per energy unit, Angstrom per length unit of forces and stress)
UNITS: dict[str, tuple[str, float, float]] = {
    "eV": ("eV, eV/Angstrom", 1.0, 1.0),
    "eV/Angstrom": ("eV, eV/Angstrom", 1.0, 1.0),
    "Hartree/Bohr": ("Hartree, Hartree/Bohr", HARTREE, BOHR),
    "Hartree/Angstrom": ("Hartree, Hartree/Angstrom", HARTREE, 1.0),
    "kcal/mol": ("kcal/mol, kcal/mol/Angstrom", KCAL_PER_MOL, 1.0),
    "kcal/mol/Angstrom": ("kcal/mol, kcal/mol/Angstrom", KCAL_PER_MOL, 1.0),
}
NAME_BOTH = "name energy_key (--energy-key) and forces_key (--forces-key)"
"""What to do where labels are not found, in Python as on the command line."""

# Tags of `<tag>_energy` and `energy_<tag>`, and of forces and stress, that mark reference labels of other codes.
_TAGS = "ref|dft|qm|reference"
# Quantity -> powers of energy and length of its unit.
_POWERS = {"energy": (1, 0), "forces": (1, -1), "stress": (1, -3), "virial": (1, 0), "length": (0, 1)}
# Names of quantities in keys such as `energy-unit`, `forcesUnits`, `unit_of_length`.
_QUANTITIES = {
    "energy": "energy|energies", "forces": "forces?", "stress": "stress|stresses", "virial": "virials?",
    "length": "length|distance|positions?|pos|coordinates?|coords?|cell|lattice",
}  # fmt: skip
_UNIT_KEYS = {
    quantity: re.compile(rf"(?:{_TAGS})?(?:{words})(?:{_TAGS})?units?|units?(?:of)?(?:{words})")
    for quantity, words in _QUANTITIES.items()
}
# Keys, by their letters alone, that say whether the electronic steps converged, and those that may mean a relaxation.
_SCF_KEYS = re.compile(r"(?:is)?(?:scf|electronic|electronically|electrons|elec|dft)(?:un|not|non)?converged?(?:nce)?|"
                       r"(?:un|not|non)?converged(?:scf|electronic|electrons|elec)")  # fmt: skip
_CONVERGED_KEYS = re.compile(r"(?:is)?(?:un|not|non)?converged")
_NO, _YES = {"f", "false", "0", "no", "n", "0.0"}, {"t", "true", "1", "yes", "y", "1.0"}
# How much a stress may miss its transpose: part of its largest component, and eV/A^3.
_ASYMMETRY, _SMALL_STRESS = 0.01, 1e-4
# Bond lengths beyond which an atom has no neighbour, and elements without bonds.
_NEAR, _NOBLE = 3.0, (2, 10, 18, 36, 54, 86)
# Angstrom^3 below which there is no cell.
_NO_VOLUME = 1e-6


class LabelNames(NamedTuple):
    """Which labels to read."""

    energy: str
    forces: str
    stresses: tuple[str, ...]
    """In the order of preference; those with ``virial`` in the name are energies, of the other sign."""
    computed: bool
    """Energies and forces are those of calculators, and not looked for elsewhere."""
    stress_asked: bool
    """A stress that cannot be used is refused, else dropped."""


class UnitFactors(NamedTuple):
    """What one of each unit of a frame is worth in eV and Angstrom."""

    energy: float
    forces: float
    stress: float
    virial: float
    length: float
    words: str
    """The units as the file or the caller says them."""


def results(frame: Atoms) -> dict[str, Any]:
    """Return the results of a frame's calculator."""
    return {} if frame.calc is None else {key: value for key, value in frame.calc.results.items() if value is not None}


def held(frame: Atoms) -> str:
    """List what a frame holds besides its geometry."""
    arrays = [key for key in frame.arrays if key not in ("numbers", "positions")]
    groups = {"calculator results": [*results(frame)], "info": [*frame.info], "arrays": arrays}
    return "; ".join(f"{group}: {', '.join(map(str, keys)) or 'nothing'}" for group, keys in groups.items())


def flattened(frame: Atoms, extra: Mapping[str, Any] | None = None) -> Atoms:
    """Move the key-value pairs and data of a row of ASE's databases to where other formats have such things.

    They are `extra`, or lie in ``info["key_value_pairs"]`` and ``info["data"]``. Numbers per atom become arrays, the
    rest is info; nothing is replaced.
    """
    nested = [frame.info[key] for key in ("key_value_pairs", "data") if isinstance(frame.info.get(key), Mapping)]
    if not nested and not extra:
        return frame
    copy: Atoms = frame.copy()
    copy.calc = frame.calc
    if nested:
        copy.info = {key: value for key, value in frame.info.items() if key not in ("key_value_pairs", "data")}
    for pairs in [*nested, extra or {}]:
        for key, value in pairs.items():
            per_atom = np.shape(value)[:1] == (len(frame),) and isinstance(value, (list, np.ndarray)) and len(frame) > 1
            if per_atom and np.asarray(value).dtype.kind in "fi" and key not in copy.arrays:
                copy.arrays[key] = np.array(value)
            else:
                copy.info.setdefault(key, value)
    return copy


def is_free_atom(frame: Atoms) -> bool:
    """Tell whether a frame is an isolated atom, which gives the energy of its element: alone, with no image near.

    A cell of one atom, as metals have it, is none, unless ``config_type`` says so. Near is within 6 Angstrom and three
    bond lengths; atoms of noble gases are near without a bond.
    """
    if len(frame) != 1:
        return False
    said = letters(str(frame.info.get("config_type", "")))
    if said in ("isolatedatom", "isolatedatoms", "freeatom", "freeatoms"):
        return True
    periodic = frame.cell.lengths()[frame.pbc]
    distance = contacts(frame).distance if (periodic > 0).all() else np.zeros(1)
    reach = np.inf if frame.numbers[0] in _NOBLE else _NEAR * 2 * covalent_radii[frame.numbers[0]]
    return not len(distance) or float(distance.min()) > reach


def unconverged(info: Mapping[str, Any]) -> tuple[str, bool] | None:
    """Return what a frame says of electronic steps that did not converge, and whether it is surely about them.

    ``scf_converged=F`` is, ``converged=F`` can also be said of the steps of a relaxation.
    """
    for key, value in info.items():
        name = letters(str(key))
        sure = _SCF_KEYS.fullmatch(name) is not None
        if sure or _CONVERGED_KEYS.fullmatch(name):
            negated = re.search("un|no[tn]", name) is not None
            if np.ndim(value) == 0 and str(value).strip().lower() in (_YES if negated else _NO):
                return f"{key} = {value}", sure
        elif isinstance(value, str) and re.search("(?:un|no[tn])[ _-]?converged", value.lower()):
            return f"{key} = {value}", re.fullmatch(
                "(?:dft)?(?:scf|electronic|electrons)(?:status|state)?", name
            ) is not None
    return None


def find_names(
    frames: Sequence[Atoms], source: str, energy_key: str | None, forces_key: str | None, stress_key: str | None
) -> LabelNames:
    """Decide which labels to use, for all frames alike.

    Raises
    ------
    DataError
        If no energies or no forces are found, several of them, or only one of both is named.
    """
    info = [str(key) for key in dict.fromkeys(key for frame in frames for key in frame.info)]
    asked = () if stress_key is None else (stress_key,)
    if energy_key is not None and forces_key is not None:
        if stress_key is None and (unread := [key for key in info if _tag(key, "stress(?:es)?|virials?") is not None]):
            logger.info("%s: %s not read: name stress_key (--stress-key)", source, " and ".join(unread))
        return LabelNames(energy_key, forces_key, asked, computed=False, stress_asked=stress_key is not None)
    if energy_key is not None or forces_key is not None:
        raise DataError(
            f"{source}: {NAME_BOTH}, or no key at all, so that all labels are of one method (got "
            f"{energy_key!r}, {forces_key!r} and stress {stress_key!r}); frame 0 has {held(frames[0])}"
        )
    computed = {key for frame in frames for key in results(frame)} & {"energy", "forces"}
    arrays = [str(key) for key in dict.fromkeys(key for frame in frames for key in frame.arrays)]
    energies, forces = _by_tag(info, "energy|energies"), _by_tag(arrays, "forces?")
    pairs = [(one, other) for tag in energies for one in energies[tag] for other in forces.get(tag, [])]

    def names(energy: str, force: str, tags: Sequence[str], computed: bool) -> LabelNames:
        places = [*info, *arrays, *("stress" for frame in frames if "stress" in results(frame))]
        stresses, virials = _by_tag(places, "stress(?:es)?"), _by_tag(places, "virials?")
        found = [key for tag in tags for key in stresses.get(tag, []) + virials.get(tag, [])]
        # under another prefix it is of another method if energies or forces are there under that, too
        others = {*stresses, *virials} - {*energies, *forces} - ({""} if computed else set())
        if not found and len(others) == 1:
            other = others.pop()
            found = stresses.get(other, []) + virials.get(other, [])
            logger.info("%s: stress is %s", source, " or ".join(found))
        return LabelNames(energy, force, asked or tuple(dict.fromkeys(found)), computed, stress_key is not None)

    if len(computed) == 2:
        for one, other in pairs:
            logger.warning("%s: labels are the calculator results, not %s and %s", source, one, other)
        return names("energy", "forces", [""], computed=True)
    # half of the labels can be the calculator's: GPUMD writes energy, which ASE takes for one's, with a column force
    halves = [("energy", other) for other in forces.get("", []) if "energy" in computed]
    halves += [(one, "forces") for one in energies.get("", []) if "forces" in computed]
    if len(pairs + halves) == 1 and (halves or not computed):
        one, other = (pairs + halves)[0]
        logger.info("%s: labels are %s and %s", source, one, other)
        return names(one, other, [_tag(one, "energy|energies") or ""], computed=False)
    every = [key for keys in energies.values() for key in keys]
    if not pairs and not computed and len(every) == 1 and len(forces.get("", [])) == 1 and len(forces) == 1:
        one, other = every[0], forces[""][0]
        logger.warning("%s: labels are %s and %s; %s if they are not of one method", source, one, other, NAME_BOTH)
        return names(one, other, [_tag(one, "energy|energies") or "", ""], computed=False)
    if pairs or halves:
        found = [f"{one} with {other}" for one, other in pairs + halves] + [
            f"{key} of a calculator" for key in computed
        ]
        problem = f"labels are ambiguous ({', '.join(found)})"
    else:
        problem = f"has no {' and no '.join(sorted({'energy', 'forces'} - computed))}"
    raise DataError(f"{source}: {problem}: {NAME_BOTH}; frame 0 has {held(frames[0])}")


def _tag(key: str, word: str) -> str | None:
    """Return the tag of a label's key in lower case, empty for none, or None if it is not the word."""
    found = re.fullmatch(rf"(?:({_TAGS})_)?(?:{word})(?:_({_TAGS}))?", key, re.IGNORECASE)
    return None if found is None or (found[1] and found[2]) else (found[1] or found[2] or "").lower()


def _by_tag(keys: Sequence[str], word: str) -> dict[str, list[str]]:
    found: defaultdict[str, list[str]] = defaultdict(list)
    for key in keys:
        if (tag := _tag(key, word)) is not None:
            found[tag].append(key)
    return dict(found)


def _values(frame: Atoms, key: str, computed: bool) -> list[Any]:
    """Return all that a frame has under a name."""
    places: list[Mapping[str, Any]] = [results(frame)] if computed else [results(frame), frame.info, frame.arrays]
    return [place[key] for place in places if place.get(key) is not None]


def look_up(frame: Atoms, key: str, where: str, computed: bool) -> NDArray[np.float64] | None:
    """Find a label by name, None if there is none.

    Raises
    ------
    DataError
        If it is not numeric, or there are two different ones under the name.
    """
    found: list[NDArray[np.float64]] = []
    for value in _values(frame, key, computed):
        try:
            found.append(numbers(value))
        except (TypeError, ValueError) as error:
            raise DataError(f"{where} is not numeric: {value!r}") from error
    if any(other.shape != found[0].shape or not np.allclose(other, found[0], equal_nan=True) for other in found[1:]):
        raise DataError(f"{where} is ambiguous: calculator results, info or arrays disagree; it has {held(frame)}")
    return found[0] if found else None


def collect(
    frames: Sequence[Atoms],
    frame_numbers: Sequence[int],
    source: str,
    names: LabelNames,
    label: Literal["energy", "forces"],
) -> list[NDArray[np.float64]]:
    """Read one label of every frame, in the units of the file.

    Raises
    ------
    DataError
        Naming the first frame that lacks it, and what it has.
    """
    key: str = getattr(names, label)
    values = [
        look_up(frame, key, f"{source}: frame {k}: {label} {key!r}", names.computed)
        for k, frame in zip(frame_numbers, frames, strict=True)
    ]
    missing = [n for n, value in enumerate(values) if value is None]
    if missing:
        n = missing[0]
        raise DataError(
            f"{source}: frame {frame_numbers[n]} has no {label} {key!r}{and_others(len(missing))}; it has "
            f"{held(frames[n])}"
        )
    return [value for value in values if value is not None]


def collect_stresses(
    frames: Sequence[Atoms],
    frame_numbers: Sequence[int],
    source: str,
    names: LabelNames,
    factors: Sequence[UnitFactors],
) -> list[NDArray[np.float64] | None]:
    """Read the stress of the frames that have one, ``(6,)`` in ASE's order and sign, eV/Angstrom^3.

    One that cannot be used is refused if it was asked for by its name; else it is left out, and a warning says of
    which frames and why. That of a frame without periodicity means nothing, and is always left out.

    Raises
    ------
    DataError
        Naming frame and value; or if no frame has the one that was asked for.
    """
    stresses: list[NDArray[np.float64] | None] = []
    dropped: defaultdict[str, list[str]] = defaultdict(list)
    for k, frame, units in zip(frame_numbers, frames, factors, strict=True):
        places = (True, False) if names.computed and not names.stress_asked else (False,)
        options = [(key, v) for computed in places for key in names.stresses if (v := _values(frame, key, computed))]
        stress = None
        if options:
            key, values = options[0]
            try:
                # of less than a cell with a volume `check_dataset` says what is wrong
                if not frame.pbc.any() or abs(frame.cell.volume) < _NO_VOLUME:
                    raise ValueError("of a frame that is not periodic means nothing")
                stress = _stress(values, key, abs(frame.cell.volume), units)
                for other, more in options[1:]:
                    _agree(stress, more, key, other, abs(frame.cell.volume), units)
            except ValueError as error:
                if names.stress_asked and frame.pbc.any():
                    raise DataError(f"{source}: frame {k} ({frame.symbols}): stress {key!r} {error}") from error
                stress = None
                kind = "not periodic" if not frame.pbc.any() else ""
                dropped[kind].append(f"frame {k}: stress {key!r} {error}")
        stresses.append(stress)
    for sentences in dropped.values():
        logger.warning(
            "%s: %s%s: left out, energies and forces are kept", source, sentences[0], and_others(len(sentences))
        )
    if names.stress_asked and all(stress is None for stress in stresses):
        raise DataError(f"{source}: no frame has the stress {names.stresses[0]!r}; frame 0 has {held(frames[0])}")
    return stresses


def _stress(values: list[Any], key: str, volume: float, units: UnitFactors) -> NDArray[np.float64]:
    """Convert a stress or virial of any form.

    Raises
    ------
    ValueError
        With the rest of a sentence that begins with its name.
    """
    found = [_one_stress(value, key, volume, units) for value in values]
    if any(not np.allclose(other, found[0]) for other in found[1:]):
        raise ValueError("is ambiguous: calculator results, info or arrays disagree")
    return found[0]


def _agree(
    stress: NDArray[np.float64], values: list[Any], key: str, other: str, volume: float, units: UnitFactors
) -> None:
    """Refuse a stress beside another that can be used and is not the same.

    Raises
    ------
    ValueError
        With the rest of a sentence that begins with its name.
    """
    if other == key:
        return
    try:
        second = _stress(values, other, volume, units)
    except ValueError:
        return
    if np.abs(second - stress).max() > _ASYMMETRY * np.abs(stress).max() + _SMALL_STRESS:
        raise ValueError(f"and {other!r} contradict each other, by {np.abs(second - stress).max():.4g} eV/A^3")


def _one_stress(value: Any, key: str, volume: float, units: UnitFactors) -> NDArray[np.float64]:
    try:
        stress = numbers(value).squeeze()
    except (TypeError, ValueError) as error:
        raise ValueError(f"is not numeric: {value!r}") from error
    if stress.shape not in ((6,), (9,), (3, 3)):
        raise ValueError(f"must have shape (6,) or (3, 3), got {np.shape(value) or stress.shape}")
    if not np.isfinite(stress).all():
        raise ValueError(f"has a value that is not finite: {stress.ravel()[~np.isfinite(stress.ravel())][0]}")
    # an energy, and positive where the atoms push outwards
    factor = -units.virial / volume if "virial" in key.lower() else units.stress
    if stress.size == 9:
        matrix = stress.reshape(3, 3)
        gap = np.abs(matrix - matrix.T)
        i, j = np.unravel_index(gap.argmax(), (3, 3))
        if gap[i, j] > _ASYMMETRY * np.abs(matrix).max() and gap[i, j] * abs(factor) > _SMALL_STRESS:
            axes = "xyz"
            raise ValueError(
                f"is not symmetric: {axes[i]}{axes[j]} is {matrix[i, j]:.6g}, {axes[j]}{axes[i]} is {matrix[j, i]:.6g}"
            )
        stress = full_3x3_to_voigt_6_stress(matrix)
    return np.asarray(stress * factor, dtype=np.float64)


def unit_factors(
    frames: Sequence[Atoms], frame_numbers: Sequence[int], source: str, units: str | None
) -> list[UnitFactors]:
    """Return the units of every frame: what the file says (``energy-unit``, ``stress_unit``, ...), else `units`.

    Raises
    ------
    DataError
        If a unit is unknown, is not the one of `units`, or is said of energies and not of forces where it could be
        one of several.
    """
    if units is not None and units not in UNITS:
        raise DataError(f"{source}: units must be one of {', '.join(UNITS)} (--units), got {units!r}")
    known: dict[tuple[tuple[str, str, str], ...], UnitFactors] = {}
    factors = []
    for k, frame in zip(frame_numbers, frames, strict=True):
        said = tuple(_said_units(frame.info))
        if said not in known:
            known[said] = _factors(said, f"{source}: frame {k}", units)
            if said:
                logger.info("%s: units as frame %d says them: %s", source, k, known[said].words)
        factors.append(known[said])
    return factors


def unit_keys(info: Mapping[str, Any]) -> set[str]:
    """Return the keys that say units of labels or positions."""
    return {key for key, _, _ in _said_units(info)}


def _said_units(info: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Return key, quantity (empty for all) and text of what a frame says of units."""
    said = []
    for key, value in info.items():
        if not isinstance(key, str) or "unit" not in key.lower():
            continue
        name = letters(key)
        quantity = (
            "" if name in ("unit", "units") else next((q for q in _POWERS if _UNIT_KEYS[q].fullmatch(name)), None)
        )
        if quantity is not None:
            said.append((key, quantity, str(value)))
    return said


def _factors(said: Sequence[tuple[str, str, str]], where: str, units: str | None) -> UnitFactors:
    found: dict[str, float] = {}
    texts: dict[str, tuple[str, str]] = {}

    def add(key: str, quantity: str, text: str, factor: float | None) -> None:
        if factor is None:
            raise DataError(f"{where}: {key} = {text!r} is no unit of {quantity or 'labels'} that is known")
        if quantity in found and not math.isclose(found[quantity], factor, rel_tol=1e-3):
            raise DataError(f"{where}: {texts[quantity][0]} = {texts[quantity][1]!r} and {key} = {text!r} contradict")
        found[quantity], texts[quantity] = factor, (key, text)

    for key, quantity, text in said:
        if quantity:
            add(key, quantity, text, parse_unit(text, *_POWERS[quantity]))
            continue
        preset = next((UNITS[name] for name in UNITS if name.lower() == text.strip().lower()), None)
        preset = {"metal": UNITS["eV"], "ase": UNITS["eV"], "real": UNITS["kcal/mol"]}.get(text.strip().lower(), preset)
        if preset is not None:
            for quantity, words, factor in zip(
                ("energy", "forces"), preset[0].split(", "), (preset[1], preset[1] / preset[2]), strict=True
            ):
                add(key, quantity, words, factor)
            continue
        for part in re.split("[,;]", text):
            if part.strip().lower() in ("au", "a.u.", "a.u", "atomic"):
                raise DataError(f"{where}: {key} = {text!r} does not say whether positions are in Bohr: name each unit")
            meanings = {q: parse_unit(part, *_POWERS[q]) for q in ("energy", "forces", "stress", "length")}
            meant = next((q for q, factor in meanings.items() if factor is not None), "")
            add(key, meant, text, meanings.get(meant))
    words, energy, length = UNITS[units or "eV"]
    force = energy / length
    for quantity, expected in (("energy", energy), ("forces", force)):
        if units is not None and quantity in found and not math.isclose(found[quantity], expected, rel_tol=1e-3):
            key, text = texts[quantity]
            raise DataError(f"{where}: {key} = {text!r} contradicts units = {units!r} (--units)")
    if units is None and {"energy", "forces"} & {*found}:
        energy, force = _complete(found, texts, where)
        length = energy / force
        words = ", ".join(dict.fromkeys(texts[quantity][1] for quantity in ("energy", "forces") if quantity in texts))
    extra = [f"{quantity} in {texts[quantity][1]}" for quantity in ("stress", "virial") if quantity in found]
    if found.get("length", 1.0) != 1.0:
        extra.append(f"positions in {texts['length'][1]}")
    return UnitFactors(
        energy, force, found.get("stress", energy / length**3), found.get("virial", energy), found.get("length", 1.0),
        "; ".join([words, *extra]),
    )  # fmt: skip


def _complete(found: Mapping[str, float], texts: Mapping[str, tuple[str, str]], where: str) -> tuple[float, float]:
    """Return the units of energies and forces where the file says only one: if there is no choice."""
    if "energy" in found and "forces" in found:
        return found["energy"], found["forces"]
    if "forces" in found and math.isclose(found["forces"], 1.0, rel_tol=1e-3):
        return 1.0, found["forces"]
    lengths = {
        length for _, energy, length in UNITS.values() if math.isclose(energy, found.get("energy", 0.0), rel_tol=1e-3)
    }
    if len(lengths) == 1:
        return found["energy"], found["energy"] / lengths.pop()
    key, text = next(iter(texts.values())) if "energy" not in texts else texts["energy"]
    other = "forces" if "energy" in found else "energies"
    raise DataError(f"{where}: {key} = {text!r}, but nothing says the unit of the {other}: give units (--units)")


def lattice_in_info(frame: Atoms) -> str | None:
    """Return the key under which a frame without a cell has one, left there by a reader that did not know it."""
    if frame.cell.rank:
        return None
    for key, value in frame.info.items():
        if str(key).lower() in ("lattice", "cell", "unit_cell", "unitcell", "cell_vectors", "lattice_vectors"):
            try:
                if numbers(value).size == 9:
                    return str(key)
            except (TypeError, ValueError):
                continue
    return None
