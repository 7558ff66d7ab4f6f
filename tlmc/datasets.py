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
import zlib
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, NamedTuple
from xml.etree.ElementTree import ParseError as XMLParseError

import ase.io
import numpy as np
import pooch
import requests
from ase import Atoms
from ase.io.formats import UnknownFileTypeError, filetype, get_compression, open_with_compression
from ase.stress import full_3x3_to_voigt_6_stress
from numpy.typing import NDArray

from tlmc.arguments import checked
from tlmc.checks import and_others, check_dataset
from tlmc.downloads import describe, first_to_answer
from tlmc.errors import DataError
from tlmc.files import sha256_file
from tlmc.labelled import Dataset
from tlmc.paths import PACKAGE_DIR, cache_dir, data_dir, mirror_dir
from tlmc.units import BOHR, HARTREE, KCAL_PER_MOL

logger = logging.getLogger(__name__)

_CONNECT_SECONDS, _READ_SECONDS = 5.0, 30.0

# name -> (units in words, eV per energy unit, Angstrom per length unit of forces and stress)
_UNITS: dict[str, tuple[str, float, float]] = {
    "eV": ("eV, eV/Angstrom", 1.0, 1.0),
    "eV/Angstrom": ("eV, eV/Angstrom", 1.0, 1.0),
    "Hartree/Bohr": ("Hartree, Hartree/Bohr", HARTREE, BOHR),
    "Hartree/Angstrom": ("Hartree, Hartree/Angstrom", HARTREE, 1.0),
    "kcal/mol": ("kcal/mol, kcal/mol/Angstrom", KCAL_PER_MOL, 1.0),
    "kcal/mol/Angstrom": ("kcal/mol, kcal/mol/Angstrom", KCAL_PER_MOL, 1.0),
}

# Prefixes of `<prefix>energy` and `<prefix>forces` that other codes write for reference labels.
_PREFIXES = ("", "REF_", "ref_", "DFT_", "dft_", "QM_", "qm_", "reference_")

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
    units: str = "eV",
) -> Dataset:
    """Read and check labelled structures.

    A name of the registry (``molcrys-mace/21_urea``) is looked up in the mirror ``TLMC_DATA_DIR``
    (``<mirror>/molcrys-mace/21_urea.traj``), then in the cache, then downloaded from its origin; all three must have
    the registered SHA-256. Any other name is an embedded set of ``data/``, or the path of a file that ASE reads (traj,
    extxyz, OUTCAR, vasprun.xml, db, ...; gz, bz2 and xz too). Nothing that holds pickles is opened.

    Labels are the calculator results of the file if it has energies and forces there, else a pair such as
    ``REF_energy`` and ``REF_forces``. To choose, name `energy_key` and `forces_key`; calculator results can be named
    too (``free_energy``).

    Parameters
    ----------
    source
        Registry name, embedded name, or path.
    energy_key, forces_key
        Names of the labels; both or neither.
    stress_key
        Name of the stress, ``(6,)`` Voigt or ``(3, 3)``, in ASE's sign; frames may lack it.
    units
        Units of the labels: ``eV`` (with eV/Angstrom), ``Hartree/Bohr``, ``Hartree/Angstrom`` or ``kcal/mol``
        (with kcal/mol/Angstrom). Stresses are in that energy unit per cubed length unit; positions are in Angstrom.

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
    dataset = dataset_from_frames(
        read_frames(path),
        name=name,
        source=origin,
        energy_key=energy_key,
        forces_key=forces_key,
        stress_key=stress_key,
        units=units,
        level_of_theory=level_of_theory,
    )
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
    """Read all structures of a file with ASE, with or without labels, unchecked.

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
        If the file is missing, empty, damaged, of a kind ASE does not know, or may hold pickles.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        raise DataError(f"{path}: is a folder, not a file with structures")
    try:
        with path.open("rb") as stream:
            size = os.fstat(stream.fileno()).st_size
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error
    if not size:
        raise DataError(f"{path}: is empty (0 bytes)")
    try:
        with TemporaryDirectory() as folder:
            plain = _decompressed(path, Path(folder))
            if _may_be_pickled(plain):
                raise DataError(
                    f"{path}: may hold Python objects (pickle), which run code when read: convert it to extxyz at its "
                    "origin"
                )
            frames = ase.io.read(str(plain), index=":", format=filetype(str(plain)), do_not_split_by_at_sign=True)
    except DataError:
        raise
    except _READ_ERRORS as error:
        reason = " ".join(str(error).split()) or "no reason given"
        raise DataError(f"{path}: ASE cannot read it ({type(error).__name__}: {reason})") from error
    if not frames:
        raise DataError(f"{path}: holds no frames")
    return list(frames)


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
    units: str = "eV",
    level_of_theory: str = "",
) -> Dataset:
    """Build a checked `Dataset` from structures that carry their labels; `load_dataset` describes the arguments.

    An empty `level_of_theory` is filled from the frames' ``info["level_of_theory"]`` where all agree.

    Raises
    ------
    DataError
        If the units are unknown, labels are missing or ambiguous, or `check_dataset` refuses the result.
    """
    if units not in _UNITS:
        raise DataError(f"{source}: units must be one of {', '.join(_UNITS)}, got {units!r}")
    if not frames:
        raise DataError(f"{source}: holds no frames")
    names = _label_names(frames, source, energy_key, forces_key, stress_key)
    energies = _collect(frames, source, names, "energy")
    forces = _collect(frames, source, names, "forces")
    stresses = _collect_stresses(frames, source, names, required=stress_key is not None)
    for k, energy in enumerate(energies):
        if energy.size != 1:
            raise DataError(
                f"{source}: frame {k}: energy {names.energy!r} must be one number, got shape {energy.shape}"
            )
    if not level_of_theory:
        said = {str(frame.info.get("level_of_theory", "")) for frame in frames}
        level_of_theory = said.pop() if len(said) == 1 else ""
    words, energy_unit, length_unit = _UNITS[units]
    dataset = Dataset(
        frames=tuple(_bare(frame, names) for frame in frames),
        energies=np.array([energy.item() for energy in energies]) * energy_unit,
        forces=tuple(force * (energy_unit / length_unit) for force in forces),
        stresses=tuple(None if stress is None else stress * (energy_unit / length_unit**3) for stress in stresses),
        name=name,
        source=source,
        units=words,
        level_of_theory=level_of_theory,
        frame_numbers=np.arange(len(frames)),
    )
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
        for path in sorted(folder.glob(f"*{suffix}")):
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


class _LabelNames(NamedTuple):
    """Which labels to read; those of a calculator are not looked for elsewhere."""

    energy: str
    forces: str
    stress: str | None
    computed: bool


def _results(frame: Atoms) -> dict[str, Any]:
    return {} if frame.calc is None else {key: value for key, value in frame.calc.results.items() if value is not None}


def _keys(frame: Atoms) -> str:
    """List what a frame holds besides its geometry."""
    arrays = [key for key in frame.arrays if key not in ("numbers", "positions")]
    groups = {"calculator results": [*_results(frame)], "info": [*frame.info], "arrays": arrays}
    return "; ".join(f"{group}: {', '.join(map(str, keys)) or 'nothing'}" for group, keys in groups.items())


def _label_names(
    frames: Sequence[Atoms], source: str, energy_key: str | None, forces_key: str | None, stress_key: str | None
) -> _LabelNames:
    """Decide which labels to use, for all frames alike."""
    if energy_key is not None and forces_key is not None:
        return _LabelNames(energy_key, forces_key, stress_key, computed=False)
    if energy_key is not None or forces_key is not None or stress_key is not None:
        raise DataError(
            f"{source}: name energy_key and forces_key, or no key at all, so that all labels are of one method (got "
            f"{energy_key!r}, {forces_key!r} and stress {stress_key!r}); frame 0 has {_keys(frames[0])}"
        )
    computed = {key for frame in frames for key in _results(frame)} & {"energy", "forces"}
    info = {key for frame in frames for key in frame.info}
    arrays = {key for frame in frames for key in frame.arrays}
    pairs = [prefix for prefix in _PREFIXES if f"{prefix}energy" in info and f"{prefix}forces" in arrays]
    if len(computed) == 2:
        for prefix in pairs:
            logger.warning("%s: labels are the calculator results, not %senergy and %sforces", source, prefix, prefix)
        return _LabelNames("energy", "forces", "stress", computed=True)
    if len(pairs) == 1 and not computed:
        names = _LabelNames(f"{pairs[0]}energy", f"{pairs[0]}forces", f"{pairs[0]}stress", computed=False)
        logger.info("%s: labels are %s and %s", source, names.energy, names.forces)
        return names
    if pairs:
        found = [f"{prefix}energy with {prefix}forces" for prefix in pairs] + [
            f"{key} of a calculator" for key in computed
        ]
        problem = f"labels are ambiguous ({', '.join(found)})"
    else:
        problem = f"has no {' and no '.join(sorted({'energy', 'forces'} - computed))}"
    raise DataError(f"{source}: {problem}: name energy_key and forces_key; frame 0 has {_keys(frames[0])}")


def _lookup(frame: Atoms, key: str, where: str, computed: bool) -> NDArray[np.float64] | None:
    """Find a label by name, None if there is none; two different values under one name are refused."""
    places = [_results(frame)] if computed else [_results(frame), frame.info, frame.arrays]
    found: list[NDArray[np.float64]] = []
    for place in places:
        value = place.get(key)
        if value is not None:
            try:
                found.append(np.asarray(value, dtype=np.float64))
            except (TypeError, ValueError) as error:
                raise DataError(f"{where} is not numeric: {value!r}") from error
    if any(other.shape != found[0].shape or not np.allclose(other, found[0], equal_nan=True) for other in found[1:]):
        raise DataError(f"{where} is ambiguous: calculator results, info or arrays disagree; it has {_keys(frame)}")
    return found[0] if found else None


def _collect(
    frames: Sequence[Atoms], source: str, names: _LabelNames, label: Literal["energy", "forces"]
) -> list[NDArray[np.float64]]:
    """Read one label of every frame, in the units of the file."""
    key: str = getattr(names, label)
    values = [
        _lookup(frame, key, f"{source}: frame {k}: {label} {key!r}", names.computed) for k, frame in enumerate(frames)
    ]
    missing = [k for k, value in enumerate(values) if value is None]
    if missing:
        k = missing[0]
        raise DataError(
            f"{source}: frame {k} has no {label} {key!r}{and_others(len(missing))}; it has {_keys(frames[k])}"
        )
    return [value for value in values if value is not None]


def _collect_stresses(
    frames: Sequence[Atoms], source: str, names: _LabelNames, required: bool
) -> list[NDArray[np.float64] | None]:
    """Read the stress, in the units of the file, of the frames that have one."""
    stresses: list[NDArray[np.float64] | None] = []
    for k, frame in enumerate(frames):
        where = f"{source}: frame {k}: stress {names.stress!r}"
        stress = None if names.stress is None else _lookup(frame, names.stress, where, names.computed)
        if stress is not None and stress.shape in ((3, 3), (9,)):
            stress = full_3x3_to_voigt_6_stress(stress.reshape(3, 3))
        stresses.append(stress)
    if required and all(stress is None for stress in stresses):
        raise DataError(f"{source}: no frame has the stress {names.stress!r}; frame 0 has {_keys(frames[0])}")
    return stresses


def _bare(frame: Atoms, names: _LabelNames) -> Atoms:
    """Copy a structure without calculator, constraints and labels."""
    labels = {names.energy, names.stress, *_results(frame)}
    info = {key: value for key, value in frame.info.items() if key not in labels}
    return Atoms(numbers=frame.numbers, positions=frame.positions, cell=frame.cell, pbc=frame.pbc, info=info)
