"""Reading (extended) XYZ files so that nothing in them is passed over: frame by frame, every line accounted for."""

from __future__ import annotations

import logging
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from functools import lru_cache
from io import StringIO
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from ase import Atoms
from ase.data import atomic_numbers
from ase.io import extxyz
from numpy.typing import NDArray

from tlmc.errors import DataError

logger = logging.getLogger(__name__)

# What ASE's reader raises on a frame it cannot take.
_ERRORS = (OSError, ValueError, TypeError, LookupError, AssertionError, AttributeError, StopIteration)
# Names of the nine numbers of a cell besides Lattice, which is right in any letter case.
_CELL_NAMES = ("cell", "unit_cell", "unitcell", "cell_vectors", "lattice_vectors")
# Columns whose names are right in any letter case, as ASE knows them.
_COLUMNS = {
    "species": "species", "symbols": "species", "element": "species", "z": "Z", "numbers": "Z",
    "pos": "pos", "position": "pos", "positions": "pos",
}  # fmt: skip
# Part of the largest component by which a symmetric matrix may miss its transpose.
_SYMMETRIC = 1e-3
# A header that says one of these twice, or swallows it in a quote that is not closed, is misunderstood.
_STRUCTURAL = re.compile(r"(?i)(?<![\w-])(lattice|properties|pbc|energy|stress|virial)\s*=")
# ASE refuses a frame whose stress is not of nine numbers, whatever it is read for; marked keys it leaves alone.
_MARK = "\0"
_SPECIAL = re.compile(r"(?<![\w-])(Lattice|stress|virial)(?=\s*=)")
_FORTRAN = re.compile(r"(?<=[\d.])[dD](?=[+-]?\d)")
_QUOTED = re.compile(r'"(?:[^"\\]|\\.)*"')


class _Frame(NamedTuple):
    """The lines of one frame."""

    where: str
    """File and frame, as sentences begin."""
    line: int
    """Number of the line with the number of atoms; the first of a file is 1."""
    header: str
    rows: list[str]
    """One line per atom."""
    vectors: list[str]
    """Lines with a cell vector, ``VEC1 x y z``, as some programs append."""


def read_xyz(path: Path, source: str) -> Iterator[Atoms]:
    """Read the frames of an (extended) XYZ file with ASE's reader, and what that misunderstands or passes over besides.

    ``Lattice``, ``Properties`` and ``pbc`` are taken in any letter case, ``cell`` as another name of ``Lattice``;
    blank lines between frames, a byte-order mark, UTF-16, Fortran exponents (1.0D+01) and the species D and T
    (hydrogen) are read and logged where they are no mere formatting. A stress or virial of any form goes to ``info``
    if it is not of six or nine numbers that make a symmetric matrix.

    Parameters
    ----------
    path
        A file that is not compressed.
    source
        How sentences call it.

    Raises
    ------
    DataError
        Naming file, frame, line and value: of lines between frames, wrong or missing atoms, a file that ends early,
        values that are no numbers, unknown elements, headers that contradict themselves.
    """
    notes: defaultdict[str, list[int]] = defaultdict(list)
    with path.open(encoding=_encoding(path), errors="replace") as stream:
        for k, frame in enumerate(_frames(stream, source)):
            yield _atoms(frame, k, notes)
    for sentence, frames in notes.items():
        others = f" (and {len(frames) - 1} more frame{'s' if len(frames) > 2 else ''})" if len(frames) > 1 else ""
        logger.warning("%s: frame %d%s: %s", source, frames[0], others, sentence)


def numbers(value: Any) -> NDArray[np.float64]:
    """Return what may be text as numbers: ``"-1.0D+02"``, ``"1 2 3"``, ``"[1, 2, 3]"``.

    Raises
    ------
    ValueError, TypeError
        If it is not numeric; a truth value is not.
    """
    if isinstance(value, str):
        found = np.array(re.findall(r"[^\s,\[\]]+", _FORTRAN.sub("e", value)), dtype=np.float64)
        return found.reshape(()) if found.size == 1 else found
    if np.asarray(value).dtype == bool:
        raise ValueError("is a truth value")
    return np.asarray(value, dtype=np.float64)


def _encoding(path: Path) -> str:
    with path.open("rb") as stream:
        return "utf-16" if stream.read(2) in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"


def _frames(stream: Iterator[str], source: str) -> Iterator[_Frame]:
    """Part a file into frames; every line that is not blank belongs to one."""
    lines = enumerate(stream, 1)
    k, n_atoms = 0, 0
    following = next(lines, None)
    while following is not None:
        number, line = following
        if not line.strip():
            following = next(lines, None)
            continue
        if not (line.strip().isascii() and line.strip().isdigit()):
            hint = f"; the frame before it has {n_atoms} atoms by its own number" if k else ""
            raise DataError(
                f"{source}: Expected xyz header: line {number} must be the number of atoms of frame {k}, got "
                f"{_shown(line)}{hint}"
            )
        n_atoms = int(line)
        where = f"{source}: frame {k}"
        rest = list(islice(lines, n_atoms + 1))
        if len(rest) <= n_atoms:
            raise DataError(
                f"{where}: Frame has {max(len(rest) - 1, 0)} atoms, expected {n_atoms}: the file ends before line "
                f"{number + n_atoms + 1}"
            )
        vectors = []
        following = next(lines, None)
        while following is not None and following[1].lstrip().startswith("VEC"):
            vectors.append(following[1])
            following = next(lines, None)
        yield _Frame(where, number, rest[0][1], [row for _, row in rest[1:]], vectors)
        k += 1


def _atoms(frame: _Frame, k: int, notes: defaultdict[str, list[int]]) -> Atoms:
    """Let ASE read a frame; what is wrong with one that it cannot read is found afterwards."""
    header = _header(frame)
    labels = {key: header.pop(key) for key in ("stress", "virial") if key in header}
    if (stress := _symmetric(labels.get("stress"))) is not None:
        header["stress"] = stress
        del labels["stress"]
    columns = _columns(frame, header)
    # ASE passes over what is too much; what is too little it refuses
    if len("".join(frame.rows).split()) > len(columns) * len(frame.rows):
        if "Properties" in header:
            _refuse_rows(frame, columns)
        notes["columns after the coordinates are not read, Properties does not name them"].append(k)
    rows = frame.rows
    try:
        atoms = _ase(rows, header)
    except _ERRORS as error:
        rows, repaired = _refuse_rows(frame, columns)
        for sentence in repaired:
            notes[sentence].append(k)
        reason = " ".join(str(error).split())
        try:
            if not repaired:
                raise error
            atoms = _ase(rows, header)
        except _ERRORS as again:
            raise DataError(
                f"{frame.where} (line {frame.line}): ASE cannot read it ({type(again).__name__}: {reason})"
            ) from again
    atoms.info |= labels
    if len(rows) > 1 and not rows[-1].endswith("\n") and _decimals(rows[-1]) < _decimals(rows[-2]):
        notes["the file ends without a line's end and with fewer digits than before: is it cut off?"].append(k)
    if atoms.cell.rank == 3 and not atoms.pbc.any():
        notes["has a cell but is periodic along nothing (pbc): it is read as a molecule"].append(k)
    return atoms


def _ase(rows: list[str], header: dict[str, Any]) -> Atoms:
    # the parser is not asked about a blank comment, and returns a copy, which ASE empties
    text = "".join([f"{len(rows)}\n", "header\n", *rows])
    atoms: Atoms = next(extxyz.read_xyz(StringIO(text), 0, properties_parser=lambda _: dict(header)))
    return atoms


def _header(frame: _Frame) -> dict[str, Any]:
    """Parse the second line as ASE does, with the keys that say the structure as ASE writes them."""
    line = frame.header.strip()
    _refuse_header(frame, line)
    try:
        found = extxyz.key_val_str_to_dict(_SPECIAL.sub(rf"\1{_MARK}", line)) if line else {}
    except ValueError as error:
        raise DataError(
            f"{frame.where}: line {frame.line + 1} cannot be understood ({error}): {_shown(line)}"
        ) from error
    header: dict[str, Any] = {}
    cells: dict[str, NDArray[np.float64]] = {}
    for marked, value in found.items():
        key = marked.replace(_MARK, "")
        value = value.replace(_MARK, "") if isinstance(value, str) else value
        name = key.lower()
        if name == "lattice" or name in _CELL_NAMES and _is_numeric(value):
            cells[key] = _nine(frame, key, value)
        elif name == "properties":
            header["Properties"] = value
        elif name == "pbc":
            header["pbc"] = _periodicity(frame, value)
        else:
            header[key] = value
    if frame.vectors:
        cells["VEC"] = _vectors(frame)
        header.setdefault("pbc", [len(frame.vectors) > axis for axis in range(3)])
    for key, cell in cells.items():
        name, first = next(iter(cells.items()))
        if key != name and not np.allclose(cell, first, atol=1e-4):
            raise DataError(f"{frame.where}: {name} and {key} are different cells")
        # ASE has it in Fortran's order
        header["Lattice"] = first.reshape(3, 3).T
    return header


def _refuse_header(frame: _Frame, line: str) -> None:
    """Refuse a header of which a part would go unread."""
    bare = _QUOTED.sub("", line)
    keys = [key.lower() for key in _STRUCTURAL.findall(bare)]
    twice = next((key for key in keys if keys.count(key) > 1), None)
    if twice is not None:
        raise DataError(f"{frame.where}: line {frame.line + 1} says {twice} twice: {_shown(line, 200)}")
    for opening, closing in ('""', "''", "[]", "{}"):
        unpaired = bare.count(opening) % 2 if opening == closing else bare.count(opening) != bare.count(closing)
        if unpaired and _STRUCTURAL.search(line):
            raise DataError(
                f"{frame.where}: line {frame.line + 1} has a {opening} that is not closed, so that its end cannot be "
                f"understood: {_shown(line, 200)}"
            )


def _nine(frame: _Frame, key: str, value: Any) -> NDArray[np.float64]:
    try:
        cell = numbers(value)
    except (TypeError, ValueError):
        cell = np.empty(0)
    if cell.size != 9:
        raise DataError(f"{frame.where}: {key} must be nine numbers, the three cell vectors, got {_shown(str(value))}")
    return cell.ravel()


def _vectors(frame: _Frame) -> NDArray[np.float64]:
    """Return the cell of lines ``VEC1 x y z`` after the atoms, the missing vectors zero."""
    cell = np.zeros((3, 3))
    for n, line in enumerate(frame.vectors):
        name, *values = line.split()
        if n > 2 or name != f"VEC{n + 1}" or len(values) != 3 or not all(_reads(float, value) for value in values):
            raise DataError(f"{frame.where}: cell vector {n + 1} after the atoms cannot be understood: {_shown(line)}")
        cell[n] = [float(value) for value in values]
    return cell.ravel()


def _is_numeric(value: Any) -> bool:
    try:
        return numbers(value).size in (3, 6, 9)
    except (TypeError, ValueError):
        return False


def _periodicity(frame: _Frame, value: Any) -> list[bool]:
    """Return the three truth values of pbc: ``T T F``, ``TTF``, ``1 1 0``, ``T``, ``true``."""
    words = re.findall(r"[^\s,]+", value) if isinstance(value, str) else [*np.atleast_1d(value)]
    if len(words) == 1 and isinstance(words[0], str):
        words = [*words[0]]
    meaning = {"t": True, "true": True, "1": True, "f": False, "false": False, "0": False}
    flags = [meaning.get(str(word).lower()) for word in words]
    if len(flags) not in (1, 3) or None in flags:
        raise DataError(f"{frame.where}: pbc must be three of T and F, got {_shown(str(value))}")
    return [bool(flag) for flag in (flags if len(flags) == 3 else flags * 3)]


class _Column(NamedTuple):
    name: str
    kind: str
    """S, R, I or L."""


def _columns(frame: _Frame, header: dict[str, Any]) -> tuple[_Column, ...]:
    """Return what the columns hold; Properties is rewritten as ASE spells it."""
    if "Properties" not in header:
        return (_Column("species", "S"), *[_Column("pos", "R")] * 3)
    try:
        header["Properties"], columns = _properties(str(header["Properties"]))
    except ValueError as error:
        raise DataError(f"{frame.where}: Properties {error}: {_shown(str(header['Properties']), 200)}") from error
    return columns


@lru_cache
def _properties(text: str) -> tuple[str, tuple[_Column, ...]]:
    """Return Properties as ASE spells it, and its columns."""
    fields = text.split(":")
    given = [name.lower() for name in fields[::3]]
    # a second name of the elements is a column like any other
    names = [
        _COLUMNS.get(low, name) if low != "element" or not {"species", "symbols", "z"} & {*given} else name
        for low, name in zip(given, fields[::3], strict=True)
    ]
    kinds, counts = [kind.upper() for kind in fields[1::3]], fields[2::3]
    if len(fields) % 3 or not {*kinds} <= {*"SRIL"} or not all(count.isdigit() for count in counts):
        raise ValueError("must be name:type:columns with a type of S, R, I or L")
    if not {"species", "Z"} & {*names} or "pos" not in names:
        raise ValueError("names no species or no positions (pos)")
    if len({*names}) < len(names):
        raise ValueError("names a column twice")
    parts = [*zip(names, kinds, counts, strict=True)]
    columns = tuple(_Column(name, kind) for name, kind, count in parts for _ in range(int(count)))
    return ":".join(":".join(part) for part in parts), columns


def _refuse_rows(frame: _Frame, columns: Sequence[_Column]) -> tuple[list[str], set[str]]:
    """Name what is wrong with the atoms of a frame, or repair it and say how."""
    repaired: set[str] = set()
    rows = []
    for i, row in enumerate(frame.rows):
        values = row.split()
        where = f"{frame.where}: line {frame.line + 2 + i}"
        if len(values) < len(columns) or (len(values) > len(columns) and "=" in frame.header):
            names = ", ".join(dict.fromkeys(column.name for column in columns))
            raise DataError(
                f"{where} must be atom {i} of {len(frame.rows)} in {len(columns)} columns ({names}), got {_shown(row)}"
            )
        for place, column in enumerate(columns):
            text = values[place]
            if column.kind == "R" and not _reads(float, text):
                values[place] = _FORTRAN.sub("e", text)
                if not _reads(float, values[place]):
                    hint = ": is it a decimal comma?" if "," in text else ""
                    raise DataError(f"{where}: {column.name} of atom {i} is no number: {_shown(text)}{hint}")
                repaired.add("exponents written with D (1.0D+01) are read as those of Fortran")
            elif column.kind == "I" and not _reads(int, text):
                raise DataError(f"{where}: {column.name} of atom {i} is no whole number: {_shown(text)}")
            elif column.name == "species" and text.capitalize() not in atomic_numbers:
                if text.capitalize() not in ("D", "T"):
                    hint = ": atomic numbers need Properties with Z:I:1" if text.isdigit() else ""
                    raise DataError(f"{where}: atom {i} is of an unknown element: {_shown(text)}{hint}")
                values[place] = "H"
                repaired.add(f"{text.capitalize()} ({'deuterium' if text in 'Dd' else 'tritium'}) is read as H")
        rows.append(" ".join(values) + "\n")
    return rows, repaired


def _decimals(row: str) -> int:
    """Count the digits after the decimal point of the last number of a line."""
    return len(row.split()[-1].partition(".")[2])


def _reads(convert: type, text: str) -> bool:
    try:
        convert(text)
    except ValueError:
        return False
    return True


def _symmetric(value: Any) -> NDArray[np.float64] | None:
    """Return a stress as ASE has it if there is no doubt about it: six numbers, or a symmetric matrix."""
    try:
        stress = numbers(value)
    except (TypeError, ValueError):
        return None
    if stress.shape == (6,):
        return stress
    if stress.size != 9:
        return None
    matrix = stress.reshape(3, 3)
    return matrix.T if np.abs(matrix - matrix.T).max() <= _SYMMETRIC * np.abs(matrix).max() else None


def _shown(text: str, length: int = 60) -> str:
    """Quote what a file says, shortened."""
    text = text.strip()
    return repr(text if len(text) <= length else f"{text[:length]}...")
