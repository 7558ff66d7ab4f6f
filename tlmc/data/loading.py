"""Where labelled structures come from: the registry of public data sets, embedded sets, and files that ASE reads."""

from __future__ import annotations

import difflib
import errno
import json
import logging
import lzma
import os
import shutil
import sqlite3
import struct
import warnings
import zlib
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from xml.etree.ElementTree import ParseError as XMLParseError

import ase.db
import ase.io
import numpy as np
import pooch
import requests
from ase import Atoms
from ase.data import atomic_numbers
from ase.io.formats import UnknownFileTypeError, filetype, get_compression, open_with_compression

from tlmc.arguments import checked
from tlmc.data.checks import and_others, check_dataset, check_unconstrained
from tlmc.data.dataset import Dataset, charge_state
from tlmc.data.extxyz import read_xyz
from tlmc.data.labels import (
    LabelNames,
    collect,
    collect_stresses,
    find_names,
    flattened,
    is_free_atom,
    lattice_in_info,
    look_up,
    results,
    unconverged,
    unit_factors,
    unit_keys,
)
from tlmc.data.scf import read_convergence
from tlmc.downloads import describe, first_to_answer
from tlmc.errors import DataError
from tlmc.files import listed, sha256_file
from tlmc.paths import PACKAGE_DIR, cache_dir, data_dir, mirror_dir

logger = logging.getLogger(__name__)

_CONNECT_SECONDS, _READ_SECONDS = 5.0, 30.0

# eV by which energies of one free atom may differ.
_SAME_ATOM = 1e-3

_EMBEDDED_SUFFIXES = (".extxyz", ".extxyz.gz", ".extxyz.xz")

# What ASE's readers raise on a damaged file; anything else is a defect that must not look like bad data.
_READ_ERRORS = (
    OSError,
    UnknownFileTypeError,
    ase.io.ParseError,
    XMLParseError,
    sqlite3.Error,
    struct.error,
    zlib.error,
    lzma.LZMAError,
    EOFError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    AssertionError,
    StopIteration,
    RuntimeError,
    ImportError,
)


def available() -> dict[str, dict[str, Any]]:
    """Return what is known of every data set with a name: the public ones of the registry and the embedded ones.

    Returns
    -------
    dict
        Name -> facts. Public sets have ``url``, ``sha256``, ``frames``, ``crystal_frames``, ``formula``,
        ``level_of_theory``, ``citation``, ``doi`` and ``licence``; embedded ones have ``path``.
    """
    public = {
        f"{collection}/{name}": {
            "url": facts["base_url"] + entry["path"],
            **{key: value for key, value in entry.items() if key != "path"},
            **{key: facts[key] for key in ("level_of_theory", "citation", "doi", "licence")},
        }
        for collection, facts in _registry().items()
        for name, entry in facts["files"].items()
    }
    return public | {name: {"path": str(path)} for name, path in _embedded().items()}


@checked
def load_dataset(
    source: str | Path,
    *,
    energy_key: str | None = None,
    forces_key: str | None = None,
    stress_key: str | None = None,
    units: str | None = None,
) -> Dataset:
    """Read and check labelled structures.

    A name of the registry (``molcrys-mace/21_urea``) is looked up in the mirror ``TLMC_DATA_DIR``
    (``<mirror>/molcrys-mace/21_urea.traj``), then in the cache, then downloaded from its origin; all three must have
    the registered SHA-256. Any other name is an embedded set of ``data/``, or the path of a file that ASE reads (traj,
    extxyz, OUTCAR, vasprun.xml, db, ...; gz, bz2 and xz too). Nothing that holds pickles is opened.

    Labels are the calculator results of the file if it has energies and forces there, else a pair such as
    ``REF_energy`` and ``REF_forces``, in any letter case; those of rows of a database are looked for in key-value
    pairs and data, too. To choose, name `energy_key` and `forces_key`; calculator results can be named too
    (``free_energy``). Stresses are ``stress`` or ``virial`` (with the same prefix), of six or nine numbers; one that
    cannot be used is left out with a warning.

    Not learned from, and named in warnings: isolated atoms, whose energies go to ``free_atoms``, and frames whose
    electronic steps did not converge, as OUTCAR, vasprun.xml or ``scf_converged`` say.

    Parameters
    ----------
    source
        Registry name, embedded name, or path.
    energy_key, forces_key
        Names of the labels; both or neither.
    stress_key
        Name of the stress, ``(6,)`` in ASE's order or ``(3, 3)``, in ASE's sign, which must be usable then; frames may
        lack it. One with ``virial`` in its name is an energy, of the other sign.
    units
        Units of the labels: ``eV`` (with eV/Angstrom), ``Hartree/Bohr``, ``Hartree/Angstrom`` or ``kcal/mol``
        (with kcal/mol/Angstrom). Stresses are in that energy unit per cubed length unit; positions are in Angstrom.
        None takes what the file says (``energy-unit``, ``forces_unit``, ``stress-unit``, ``length_unit``, ``units``),
        else eV; what it says must not contradict `units`.

    Returns
    -------
    Dataset
        In eV and Angstrom.

    Raises
    ------
    DataError
        If the source is unknown or cannot be reached or read, its hash differs, or `check_dataset` refuses it.
    """
    name = str(source)
    embedded = _embedded()
    level_of_theory = ""
    public = _public(name)
    if public is not None:
        path, origin, level_of_theory = public
    elif name in embedded:
        path = embedded[name]
        origin = f"data/{path.name}"
    else:
        path = Path(source).expanduser()
        origin, name = str(path), path.name.removesuffix(".gz").removesuffix(".bz2").removesuffix(".xz")
        name = Path(name).stem
        if not path.exists():
            raise DataError(_unknown(str(source), embedded))
    frames, said = _read(path)
    dataset = _dataset(frames, said, name, origin, (energy_key, forces_key, stress_key), units, level_of_theory)
    logger.info("%s: %d frames (%d crystals) from %s", name, len(dataset), dataset.is_crystal.sum(), origin)
    return dataset


def local_file(source: str | Path) -> Path | None:
    """Return the file of an embedded set, or the path itself, unopened; None for a public set, known by its SHA-256.

    Raises
    ------
    DataError
        If the source is neither a known name nor a file.
    """
    facts, path = available().get(str(source)), Path(source).expanduser()
    if facts is not None:
        return Path(facts["path"]) if "path" in facts else None
    if not path.is_file():
        raise DataError(_unknown(str(source), _embedded()))
    return path


@checked
def read_frames(path: str | Path) -> list[Atoms]:
    """Read all structures of a file with ASE, with or without labels, unchecked; for XYZ, see `tlmc.data.extxyz`.

    Parameters
    ----------
    path
        Any file that ASE reads, compressed or not.

    Returns
    -------
    list of Atoms
        At least one.

    Raises
    ------
    DataError
        If the file is missing, empty, damaged, of a kind ASE does not know, or may hold pickles; or if a part of it
        would go unread.
    """
    return _read(Path(path))[0]


def _read(path: Path) -> tuple[list[Atoms], dict[int, str]]:
    """Read all structures, and which of them the file says are not converged."""
    path = path.expanduser()
    if path.is_dir():
        raise DataError(f"{path}: is a folder, not a file with structures")
    try:
        with path.open("rb") as stream:
            size = os.fstat(stream.fileno()).st_size
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error
    if not size:
        raise DataError(f"{path}: is empty (0 bytes)")
    frames: list[Atoms] = []
    try:
        with TemporaryDirectory() as folder, warnings.catch_warnings(record=True) as complaints:
            warnings.simplefilter("always")
            plain = _decompressed(path, Path(folder))
            if _may_be_pickled(plain):
                raise DataError(
                    f"{path}: may hold Python objects (pickle), which run code when read: convert it to extxyz at its "
                    "origin"
                )
            kind = filetype(str(plain))
            # one by one, so that an error tells where
            for frame in _each(plain, kind, str(path)):
                frames.append(frame)
            convergence = read_convergence(plain, kind)
    except DataError:
        raise
    except _READ_ERRORS as error:
        reason = " ".join(str(error).split()) or "no reason given"
        place = f" beyond frame {len(frames) - 1}" if frames else ""
        raise DataError(f"{path}: ASE cannot read it{place} ({type(error).__name__}: {reason})") from error
    if not frames:
        raise DataError(f"{path}: holds no frames, read as what ASE calls {kind}")
    said = convergence.unconverged
    # one frame, and a line that says it did not converge
    if len(frames) == 1 and convergence.remarks and kind not in ("vasp-out", "vasp-xml"):
        said = {0: convergence.remarks[-1]}
    else:
        for remark in convergence.remarks:
            logger.warning("%s: %s", path, remark)
    for sentence in dict.fromkeys(
        str(c.message) for c in complaints if issubclass(c.category, (UserWarning, RuntimeWarning))
    ):
        logger.warning("%s: ASE says: %s", path, sentence)
    return frames, said


def _each(path: Path, kind: str, source: str) -> Iterator[Atoms]:
    """Read the frames of a file one by one."""
    if kind in ("extxyz", "xyz"):
        yield from read_xyz(path, source)
    elif kind in ("db", "json"):
        # ase.io leaves the key-value pairs and data of the rows out
        with ase.db.connect(str(path), serial=True) as database:
            for row in database.select():
                yield flattened(row.toatoms(), {**row.key_value_pairs, **row.data})
    else:
        yield from ase.io.iread(str(path), index=":", format=kind, do_not_split_by_at_sign=True)


def _may_be_pickled(path: Path) -> bool:
    """Tell whether a file begins like a pickle (byte 0x80 and its protocol) or has the name of one."""
    with path.open("rb") as stream:
        head = stream.read(16)
    return (
        head[:2] in (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
        or head.startswith((b"\x93NUMPY", b"PickleTrajectory"))
        or path.suffix.lower() in (".pckl", ".pickle", ".pkl", ".npy", ".npz", ".pt", ".pth")
    )


def _decompressed(path: Path, folder: Path) -> Path:
    """Return the file, or a plain copy of a compressed one: ASE seeks in it, and every seek starts at the beginning."""
    plain, compression = get_compression(path.name)
    if compression is None:
        return path
    target = folder / plain
    with open_with_compression(str(path), "rb") as source, target.open("wb") as copy:
        shutil.copyfileobj(source, copy)
    return target


def dataset_from_frames(
    frames: Sequence[Atoms],
    *,
    name: str,
    source: str = "memory",
    energy_key: str | None = None,
    forces_key: str | None = None,
    stress_key: str | None = None,
    units: str | None = None,
    level_of_theory: str = "",
) -> Dataset:
    """Build a checked `Dataset` from structures that carry their labels; `load_dataset` describes the arguments.

    An empty `level_of_theory` is filled from the frames' ``info["level_of_theory"]`` where all agree.

    Raises
    ------
    DataError
        If the units are unknown, labels are missing or ambiguous, or `check_dataset` refuses the result.
    """
    return _dataset(frames, {}, name, source, (energy_key, forces_key, stress_key), units, level_of_theory)


def _dataset(
    frames: Sequence[Atoms],
    said: Mapping[int, str],
    name: str,
    source: str,
    keys: tuple[str | None, str | None, str | None],
    units: str | None,
    level_of_theory: str,
) -> Dataset:
    """Build a data set; `said` names frames of which the file says that they are not converged."""
    unit_factors([], [], source, units)
    if not frames:
        raise DataError(f"{source}: holds no frames")
    frames = [flattened(frame) for frame in frames]
    kept, atoms = _part(frames, source, said)
    chosen = [frames[k] for k in kept]
    names = find_names(chosen, source, *keys)
    factors = unit_factors(chosen, kept, source, units)
    energies = collect(chosen, kept, source, names, "energy")
    forces = collect(chosen, kept, source, names, "forces")
    for k, energy in zip(kept, energies, strict=True):
        if energy.size != 1:
            raise DataError(
                f"{source}: frame {k}: energy {names.energy!r} must be one number, got shape {energy.shape}"
            )
    stresses = collect_stresses(chosen, kept, source, names, factors)
    if not level_of_theory:
        theories = {str(frame.info.get("level_of_theory", "")) for frame in chosen}
        level_of_theory = theories.pop() if len(theories) == 1 else ""
    dataset = Dataset(
        frames=tuple(_bare(frame, names, factor.length) for frame, factor in zip(chosen, factors, strict=True)),
        energies=np.array([energy.item() * factor.energy for energy, factor in zip(energies, factors, strict=True)]),
        forces=tuple(force * factor.forces for force, factor in zip(forces, factors, strict=True)),
        stresses=tuple(stresses),
        name=name,
        source=source,
        units=factors[0].words,
        level_of_theory=level_of_theory,
        frame_numbers=np.array(kept),
        free_atoms=_free_atoms(frames, atoms, source, names, units),
    )
    check_unconstrained(chosen, dataset)
    check_dataset(dataset)
    return dataset


def _registry() -> dict[str, dict[str, Any]]:
    """Return the public collections."""
    content: dict[str, dict[str, Any]] = json.loads(_registry_text())["datasets"]
    return content


@cache
def _registry_text() -> str:
    return (PACKAGE_DIR / "registry.json").read_text(encoding="utf-8")


def _embedded() -> dict[str, Path]:
    """Return the data sets of the checkout's ``data/``; an installed package without a checkout has none."""
    try:
        folder = data_dir()
    except FileNotFoundError:
        return {}
    found: dict[str, Path] = {}
    for suffix in _EMBEDDED_SUFFIXES:
        for path in listed(folder, f"*{suffix}"):
            name = path.name.removesuffix(suffix)
            if name in found:
                raise DataError(f"{folder}: {found[name].name} and {path.name} are both called {name}: keep one")
            found[name] = path
    return dict(sorted(found.items()))


def _unknown(source: str, embedded: dict[str, Path]) -> str:
    """Say that a source is neither a name nor a file, with the nearest names."""
    names = [f"{collection}/{name}" for collection, facts in _registry().items() for name in facts["files"]] + [
        *embedded
    ]
    near = difflib.get_close_matches(source, names, n=3, cutoff=0.5)
    hint = f"did you mean {', '.join(near)}?" if near else "tlmc fetch --list shows the known names"
    try:
        data_dir()
    except FileNotFoundError:
        hint += f"{'' if near else '.'} The embedded sets come with the checkout of tlmc only: set TLMC_ROOT to one"
    return f"{source}: neither a file nor a known data set; {hint}"


def _public(name: str) -> tuple[Path, str, str] | None:
    """Return file, source and level of theory of a registry name, downloading it if need be."""
    collection, _, entry_name = name.partition("/")
    facts = _registry().get(collection)
    if facts is None or entry_name not in facts["files"]:
        return None
    entry = facts["files"][entry_name]
    file_name = entry_name + Path(entry["path"]).suffix
    mirror = mirror_dir()
    if mirror is not None and (mirror / collection / file_name).is_file():
        path = mirror / collection / file_name
        _check_sha256(path, entry["sha256"])
        return path, str(path), facts["level_of_theory"]
    url = facts["base_url"] + entry["path"]
    return _download(url, collection, file_name, entry["sha256"]), url, facts["level_of_theory"]


def _check_sha256(path: Path, expected: str) -> None:
    found = sha256_file(path)
    if found != expected:
        raise DataError(
            f"{path}: SHA-256 is {found}, expected {expected}: the file is damaged or not the registered one"
        )


def _download(url: str, collection: str, file_name: str, sha256: str) -> Path:
    """Fetch a public file into the cache; it appears there only once it is whole and its hash is right."""
    folder = cache_dir() / "datasets" / collection
    path = folder / file_name
    if path.is_file() and sha256_file(path) == sha256:
        return path
    place = f"place the file as <folder>/{collection}/{file_name} and set TLMC_DATA_DIR=<folder>"
    source, reasons = first_to_answer([url], _CONNECT_SECONDS)
    if source is None:
        raise DataError(f"cannot download {url} ({reasons[url]}): check the network, or {place}")
    downloader = pooch.HTTPDownloader(timeout=(_CONNECT_SECONDS, _READ_SECONDS), chunk_size=1 << 16)
    try:
        pooch.retrieve(url, known_hash=f"sha256:{sha256}", fname=file_name, path=folder, downloader=downloader)
    except requests.RequestException as error:
        raise DataError(f"cannot download {url} ({describe(error)}): check the network, or {place}") from error
    except ValueError as error:
        raise DataError(f"{url}: the download has not the registered SHA-256 {sha256} ({error}); {place}") from error
    except OSError as error:
        full = "no space left" if error.errno == errno.ENOSPC else error.strerror or str(error)
        raise DataError(f"cannot write {path} ({full}): free space, or set TLMC_CACHE_DIR to another folder") from error
    return path


def _bare(frame: Atoms, names: LabelNames, length: float) -> Atoms:
    """Copy a structure in Angstrom without calculator, constraints, labels and what says their units."""
    labels = {names.energy, *names.stresses, *results(frame), *unit_keys(frame.info)}
    info = {key: value for key, value in frame.info.items() if key not in labels}
    # what charge and spin a calculation was started with goes with the structure; the arrays do not
    for key, array in (("initial_charge", "initial_charges"), ("initial_magmom", "initial_magmoms")):
        total = float(frame.arrays[array].sum()) if array in frame.arrays else 0.0
        if abs(total) > 1e-6:
            info.setdefault(key, round(total, 6))
    positions, cell = (frame.positions, frame.cell) if length == 1 else (frame.positions * length, frame.cell * length)
    return Atoms(numbers=frame.numbers, positions=positions, cell=cell, pbc=frame.pbc, info=info)


def _part(frames: Sequence[Atoms], source: str, said: Mapping[int, str]) -> tuple[list[int], list[int]]:
    """Return which frames are structures to learn from and which free atoms; a warning names those left out.

    Raises
    ------
    DataError
        If none is left, or a frame has its cell where it is not looked for.
    """
    kept, atoms, suspicious, reasons = [], [], [], []
    for k, frame in enumerate(frames):
        key = lattice_in_info(frame)
        if key is not None:
            raise DataError(
                f"{source}: frame {k} has a cell in info[{key!r}] and none where ASE looks for it: set frame.cell and "
                "frame.pbc, or read the file with tlmc.read_frames"
            )
        flag = unconverged(frame.info)
        reason = said.get(k, flag[0] if flag is not None and flag[1] else "")
        if reason:
            reasons.append(f"frame {k} is left out, its electronic steps did not converge ({reason})")
        elif is_free_atom(frame):
            atoms.append(k)
        else:
            kept.append(k)
            if flag is not None:
                suspicious.append(f"frame {k} says {flag[0]}: are its energy and forces converged?")
    if not kept:
        if not reasons:
            formulas = ", ".join(dict.fromkeys(str(frames[k].symbols) for k in atoms))
            raise DataError(
                f"{source}: holds nothing but isolated atoms (frame {atoms[0]} is the first of {len(atoms)}; "
                f"{formulas}): their energies are no structures to learn from"
            )
        raise DataError(f"{source}: {reasons[0]}{and_others(len(reasons))}: nothing is left")
    for sentences in (reasons, suspicious):
        if sentences:
            logger.warning("%s: %s%s", source, sentences[0], and_others(len(sentences)))
    return kept, atoms


def _free_atoms(
    frames: Sequence[Atoms], atoms: Sequence[int], source: str, names: LabelNames, units: str | None
) -> dict[str, float]:
    """Return the energies of isolated atoms, eV; the lowest where an element has several.

    Raises
    ------
    DataError
        If an energy is not a finite number.
    """
    found: dict[str, tuple[float, int]] = {}
    for k, factor in zip(atoms, unit_factors([frames[k] for k in atoms], atoms, source, units), strict=True):
        symbol = str(frames[k].symbols[0])
        energy = look_up(frames[k], names.energy, f"{source}: frame {k}: energy {names.energy!r}", names.computed)
        if energy is None:
            logger.warning("%s: frame %d, an isolated %s atom, has no energy %r", source, k, symbol, names.energy)
            continue
        if energy.size != 1 or not np.isfinite(energy).all():
            raise DataError(f"{source}: frame {k}, an isolated {symbol} atom, has an energy of {energy.tolist()}")
        charge = charge_state(frames[k].info).get("charge", 0.0)
        if charge:
            logger.warning("%s: frame %d, an isolated %s atom, is charged (%g): left out", source, k, symbol, charge)
            continue
        value = float(energy.item() * factor.energy)
        if symbol in found and abs(found[symbol][0] - value) > _SAME_ATOM:
            first = found[symbol]
            logger.warning(
                "%s: frames %d and %d are both isolated %s atoms, with %.6g and %.6g eV: the lower energy is taken",
                source, first[1], k, symbol, first[0], value,
            )  # fmt: skip
        if symbol not in found or value < found[symbol][0]:
            found[symbol] = value, k
    energies = {symbol: found[symbol][0] for symbol in sorted(found, key=lambda symbol: atomic_numbers[symbol])}
    if atoms:
        logger.warning(
            "%s: frame %d%s: isolated atoms, taken as energies of free atoms (%s) and for nothing else",
            source, atoms[0], and_others(len(atoms)),
            ", ".join(f"{symbol} {energy:.6g} eV" for symbol, energy in energies.items()) or "none",
        )  # fmt: skip
    return energies
