"""Labelled structures: the registry of public data sets, reading, checking, and the `Dataset` everything else takes."""

from __future__ import annotations

import difflib
import errno
import hashlib
import json
import logging
import lzma
import sqlite3
import struct
import zlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple
from xml.etree.ElementTree import ParseError as XMLParseError

import ase.io
import numpy as np
import pooch
import requests
from ase import Atoms
from ase.data import chemical_symbols, covalent_radii
from ase.io.formats import UnknownFileTypeError, filetype
from ase.stress import full_3x3_to_voigt_6_stress
from numpy.typing import ArrayLike, NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from vesin import NeighborList

from tlmc.errors import DataError
from tlmc.files import sha256_file
from tlmc.paths import PACKAGE_DIR, cache_dir, data_dir, mirror_dir
from tlmc.units import BOHR, HARTREE, KCAL_PER_MOL

logger = logging.getLogger(__name__)

# All of a condensed phase is linked by contacts shorter than this; a molecule in a vacuum box is not (Angstrom).
_CONTACT = 6.0
# Two atoms closer than this fraction of the sum of their covalent radii overlap; the shortest bond of the strongly
# compressed cells among the public sets is at 0.78.
_OVERLAP = 0.5
# No matter is this dense (Angstrom^3 per atom; hydrogen at 100 GPa has 3), so such a cell is a mistake.
_SMALLEST_VOLUME_PER_ATOM = 1.0
# Labelled frames reach 17 eV/A with a median of about 1 eV/A; in kcal/mol/A the same numbers are 23 times larger.
_LARGEST_FORCE, _LARGEST_MEDIAN_FORCE = 200.0, 10.0
# eV/atom above free atoms that no bound or colliding structure reaches, and between frames of one composition.
_LARGEST_ENERGY, _LARGEST_ENERGY_SPREAD = 100.0, 20.0
# eV/atom by which labels of one geometry may differ before they contradict each other.
_LABEL_CONFLICT = 0.01
# Angstrom by which interatomic distances of one geometry may differ: what text formats round.
_DUPLICATE = 1e-4
# Shortest distances per atom and pair of elements that identify a geometry: the neighbours within about 4 Angstrom.
_DISTANCES_PER_ATOM = 16
# Pairs of frames on which energies are compared with the work of the forces: how far apart in the file, how alike
# (strain; Angstrom), how many and how well correlated they must be to decide, and the slopes that true labels can have.
_WORK_NEIGHBOURS, _WORK_STRAIN, _WORK_DISPLACEMENT = 20, 0.02, 0.6
_WORK_PAIRS, _WORK_CORRELATION, _WORK_SLOPES = 50, 0.7, (0.5, 1.6)

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


@dataclass(frozen=True)
class Dataset:
    """Structures with energies and forces, in eV and Angstrom, checked by `check_dataset`."""

    frames: tuple[Atoms, ...]
    """``n_frames`` structures without a calculator; ``info`` keeps what the file says besides the labels."""
    energies: NDArray[np.float64]
    """Shape ``(n_frames,)``, eV."""
    forces: tuple[NDArray[np.float64], ...]
    """Per frame ``(n_atoms, 3)``, eV/Angstrom."""
    stresses: tuple[NDArray[np.float64] | None, ...]
    """Per frame ``(6,)`` in ASE's Voigt order and sign (xx, yy, zz, yz, xz, xy), eV/Angstrom^3, or None."""
    name: str
    """``molcrys-mace/21_urea``, ``naphthalene``, or the stem of the file."""
    source: str
    """Path or URL it was read from."""
    units: str
    """Units of the file, before conversion."""
    level_of_theory: str
    """Method of the labels, empty when unknown."""
    frame_numbers: NDArray[np.int64]
    """Position of each frame in the source, shape ``(n_frames,)``."""

    def __len__(self) -> int:
        """Return the number of frames."""
        return len(self.frames)

    @cached_property
    def hash(self) -> str:
        """SHA-256 of geometries and labels in their order, independent of the path and the format they came from."""
        digest = hashlib.sha256()
        for frame, energy, forces, stress in zip(self.frames, self.energies, self.forces, self.stresses, strict=True):
            digest.update(bytes.fromhex(frame_hash(frame)))
            digest.update(_bytes(energy) + _bytes(forces) + (b"none" if stress is None else _bytes(stress)))
        return digest.hexdigest()

    @cached_property
    def is_crystal(self) -> NDArray[np.bool_]:
        """True for frames periodic in three directions whose atoms touch their images, shape ``(n_frames,)``.

        An isolated molecule is often stored as periodic, in a box of vacuum. It is told from a crystal by whether
        contacts shorter than 6 Angstrom lead from an atom to one of its own images: in condensed matter they always do.
        """
        return np.array([_is_crystal(frame) for frame in self.frames], dtype=np.bool_)

    @cached_property
    def duplicates(self) -> NDArray[np.int64]:
        """For each frame the first one with its geometry (`duplicate_groups`), itself if unique, ``(n_frames,)``."""
        return duplicate_groups(self.frames)

    @cached_property
    def elements(self) -> tuple[str, ...]:
        """Chemical symbols that occur, by atomic number."""
        return tuple(element_counts(self.frames))

    @cached_property
    def n_atoms(self) -> NDArray[np.int64]:
        """Number of atoms of each frame, shape ``(n_frames,)``."""
        return np.array([len(frame) for frame in self.frames], dtype=np.int64)

    def subset(self, indices: ArrayLike) -> Dataset:
        """Return the frames at `indices` (integers, or one boolean per frame), in that order.

        Raises
        ------
        IndexError
            If an index is out of range or the boolean mask has another length.
        """
        chosen = np.arange(len(self))[np.asarray(indices)] if np.size(indices) else np.empty(0, dtype=np.int64)
        return Dataset(
            frames=tuple(self.frames[k] for k in chosen),
            energies=self.energies[chosen],
            forces=tuple(self.forces[k] for k in chosen),
            stresses=tuple(self.stresses[k] for k in chosen),
            name=self.name,
            source=self.source,
            units=self.units,
            level_of_theory=self.level_of_theory,
            frame_numbers=self.frame_numbers[chosen],
        )

    def crystals(self) -> Dataset:
        """Return the frames that are crystals."""
        return self.subset(self.is_crystal)

    def molecules(self) -> Dataset:
        """Return the frames that are not crystals."""
        return self.subset(~self.is_crystal)


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
        origin = str(path)
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
        size = path.stat().st_size
        with path.open("rb") as stream:
            head = stream.read(16)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error
    if not size:
        raise DataError(f"{path}: is empty (0 bytes)")
    # a pickle starts with byte 0x80 and its protocol
    pickled = head[:2] in (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05") or head.startswith(
        (b"\x93NUMPY", b"PickleTrajectory")
    )
    if pickled or path.suffix.lower() in (".pckl", ".pickle", ".pkl", ".npy", ".npz", ".pt", ".pth"):
        raise DataError(
            f"{path}: may hold Python objects (pickle), which run code when read: convert it to extxyz at its origin"
        )
    try:
        frames = ase.io.read(str(path), index=":", format=filetype(str(path)), do_not_split_by_at_sign=True)
    except _READ_ERRORS as error:
        reason = " ".join(str(error).split()) or "no reason given"
        raise DataError(f"{path}: ASE cannot read it ({type(error).__name__}: {reason})") from error
    if not frames:
        raise DataError(f"{path}: holds no frames")
    return list(frames)


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


def element_counts(frames: Iterable[Atoms]) -> dict[str, int]:
    """Count the atoms of each element over all frames, by atomic number: ``{"H": 512, "C": 128}``."""
    counts: Counter[int] = Counter()
    for frame in frames:
        counts.update(frame.numbers.tolist())
    return {chemical_symbols[number]: counts[number] for number in sorted(counts)}


def frame_hash(frame: Atoms) -> str:
    """Return the SHA-256 of a geometry: elements, periodicity, cell and positions, to the last bit; no labels."""
    parts = (frame.numbers.astype("<i8"), frame.pbc.astype("u1"))
    return hashlib.sha256(
        b"".join(part.tobytes() for part in parts) + _bytes(frame.cell.array) + _bytes(frame.positions)
    ).hexdigest()


def duplicate_groups(frames: Sequence[Atoms], tolerance: float = _DUPLICATE) -> NDArray[np.int64]:
    """Find frames with the same geometry.

    Two frames are the same if they have the same composition and periodicity and their sorted interatomic distances
    (per pair of elements, the shortest 16 per atom, below 6 Angstrom) agree within `tolerance`. Rotating, translating,
    reflecting, wrapping and reordering therefore make no difference. Sameness is passed on: frames that agree
    with a third are in one group.

    Parameters
    ----------
    frames
        ``n_frames`` structures.
    tolerance
        Largest difference of a distance, Angstrom.

    Returns
    -------
    NDArray
        Shape ``(n_frames,)``: for each frame the index of the first frame of its group; its own if it is unique.
    """
    first = np.arange(len(frames))
    # bitwise copies first: they would make the comparison below quadratic
    exact: dict[str, int] = {}
    for k, frame in enumerate(frames):
        first[k] = exact.setdefault(frame_hash(frame), k)
    classes: defaultdict[tuple[str, bytes], list[int]] = defaultdict(list)
    for k in np.unique(first):
        classes[frames[k].get_chemical_formula(), frames[k].pbc.tobytes()].append(int(k))
    links: list[tuple[int, int]] = [(k, int(first[k])) for k in range(len(frames))]
    for members in classes.values():
        if len(members) == 1:
            continue
        prints = np.array([_fingerprint(frames[k]) for k in members])
        # the mean moves by no more than the largest component does: only neighbours in its order can agree
        means = prints.mean(axis=1, dtype=np.float64) if prints.shape[1] else np.zeros(len(members))
        order = np.argsort(means, kind="stable")
        ends = np.searchsorted(means[order], means[order] + tolerance, side="right")
        for start, end in enumerate(ends):
            near = order[start + 1 : end]
            same = near[np.abs(prints[near] - prints[order[start]]).max(axis=1, initial=0.0) <= tolerance]
            links += [(members[order[start]], members[k]) for k in same]
    a, b = np.array(links, dtype=np.int64).reshape(-1, 2).T
    label = _clusters(a, b, len(frames))[1]
    _, representative, inverse = np.unique(label, return_index=True, return_inverse=True)
    return representative[inverse].astype(np.int64)


def require_crystals(dataset: Dataset) -> None:
    """Check that every frame is a crystal, for tasks that need a periodic cell.

    Raises
    ------
    DataError
        Naming the first frame that is not, its periodicity and volume, and how many others there are.
    """
    problems = []
    for k in np.flatnonzero(~dataset.is_crystal):
        frame = dataset.frames[k]
        volume = f"{frame.cell.volume / len(frame):.0f} A^3 per atom" if frame.cell.rank == 3 else "no cell"
        periodic = "".join(axis for axis, on in zip("abc", frame.pbc, strict=True) if on) or "nothing"
        problems.append(
            (int(k), f"is no crystal (periodic along {periodic}, {volume}); dataset.crystals() keeps those that are")
        )
    _refuse(dataset, problems)


def check_dataset(dataset: Dataset) -> None:
    """Refuse data that no training could use, before any starts.

    In this order: no frames, no atoms; shapes of labels; NaN or infinity; a cell that is missing or has no volume;
    atoms that overlap, images included; energies that no such atoms can have; forces that cannot be eV/Angstrom (too
    large, or doing another work than the energies say); equal geometries with different labels. Equal geometries with
    equal labels are logged, and kept in one part by `split_dataset`.

    Raises
    ------
    DataError
        One sentence with the source, the number of the first offending frame in it, the value, and how many others.
    """
    if not len(dataset):
        raise DataError(f"{dataset.source}: holds no frames")
    for column in ("energies", "forces", "stresses", "frame_numbers"):
        if len(getattr(dataset, column)) != len(dataset):
            raise DataError(
                f"{dataset.source}: {len(dataset)} frames need as many {column}, got {len(getattr(dataset, column))}"
            )
    for check in (_empty, _wrong_shape, _not_finite, _no_cell, _overlapping, _impossible_energy, _impossible_force):
        _refuse(dataset, check(dataset))
    _check_duplicates(dataset)


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
    hint = f"did you mean {', '.join(near)}?" if near else f"known names: {', '.join(names)}"
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
    downloader = pooch.HTTPDownloader(timeout=(_CONNECT_SECONDS, _READ_SECONDS), chunk_size=1 << 16)
    try:
        pooch.retrieve(url, known_hash=f"sha256:{sha256}", fname=file_name, path=folder, downloader=downloader)
    except requests.RequestException as error:
        status = "" if error.response is None else f" {error.response.status_code}"
        reason = f"{type(error).__name__}{status}"
        raise DataError(f"cannot download {url} ({reason}): check the network, or {place}") from error
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
        raise DataError(f"{source}: frame {k} has no {label} {key!r}{_others(len(missing))}; it has {_keys(frames[k])}")
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


# A problem is the index of a frame in the data set and what is wrong with it.
_Problems = list[tuple[int, str]]


def _others(count: int) -> str:
    """Say how many frames have the problem besides the one named."""
    return "" if count == 1 else f" (and {count - 1} more frame{'s' if count > 2 else ''})"


def _refuse(dataset: Dataset, problems: _Problems) -> None:
    """Raise for the first problem, if there is one."""
    if problems:
        k, sentence = problems[0]
        number = dataset.frame_numbers[k]
        affected = len({frame for frame, _ in problems})
        raise DataError(f"{dataset.source}: frame {number} {sentence}{_others(affected)}")


def _empty(dataset: Dataset) -> _Problems:
    return [(k, "has no atoms") for k, frame in enumerate(dataset.frames) if not len(frame)]


def _wrong_shape(dataset: Dataset) -> _Problems:
    problems: _Problems = []
    for k, frame in enumerate(dataset.frames):
        stress = dataset.stresses[k]
        for label, found, expected in (
            ("energy", np.shape(dataset.energies[k]), ()),
            ("forces", np.shape(dataset.forces[k]), (len(frame), 3)),
            ("stress", (6,) if stress is None else np.shape(stress), (6,)),
        ):
            if found != expected:
                problems.append(
                    (k, f"({frame.get_chemical_formula()}): {label} must have shape {expected}, got {found}")
                )
    return problems


def _not_finite(dataset: Dataset) -> _Problems:
    problems: _Problems = []
    for k, frame in enumerate(dataset.frames):
        stress = dataset.stresses[k]
        for label, values in (
            ("position", frame.positions),
            ("cell", frame.cell.array),
            ("energy", dataset.energies[k : k + 1]),
            ("forces", dataset.forces[k]),
            ("stress", np.zeros(6) if stress is None else stress),
        ):
            if not np.isfinite(values).all():
                row = int(np.argwhere(~np.isfinite(values))[0, 0])
                atom = (
                    f" of atom {row} ({chemical_symbols[frame.numbers[row]]})"
                    if label in ("position", "forces")
                    else ""
                )
                problems.append((k, f"has a value that is not finite: {label}{atom} is {np.array2string(values[row])}"))
    return problems


def _no_cell(dataset: Dataset) -> _Problems:
    problems: _Problems = []
    for k, frame in enumerate(dataset.frames):
        axes = [
            axis for axis, on, length in zip("abc", frame.pbc, frame.cell.lengths(), strict=True) if on and not length
        ]
        if axes:
            problems.append((k, f"is periodic along {', '.join(axes)} but has no cell vector there"))
        elif frame.pbc.any():
            volume = abs(np.linalg.det(frame.cell.complete().array))
            if volume < _SMALLEST_VOLUME_PER_ATOM * len(frame):
                problems.append((k, f"has a cell of zero volume, or nearly: {volume:.3g} A^3 for {len(frame)} atoms"))
    return problems


def _overlapping(dataset: Dataset) -> _Problems:
    problems: _Problems = []
    for k, frame in enumerate(dataset.frames):
        i, j, shift, distance = _contacts(frame, 2 * _OVERLAP * covalent_radii[frame.numbers].max())
        ratio = distance / (covalent_radii[frame.numbers[i]] + covalent_radii[frame.numbers[j]])
        if ratio.size and ratio.min() < _OVERLAP:
            worst = int(ratio.argmin())
            a, b = (f"{atom} ({chemical_symbols[frame.numbers[atom]]})" for atom in (i[worst], j[worst]))
            image = ", an image in a neighbouring cell" if shift[worst].any() else ""
            problems.append((k, f"has overlapping atoms: {a} and {b}{image} are {distance[worst]:.3f} A apart"))
    return problems


def _impossible_energy(dataset: Dataset) -> _Problems:
    if len(dataset) > 1 and not dataset.energies.any():
        return [(k, "has an energy of exactly 0 eV, as have all: are they labels?") for k in range(len(dataset))]
    hint = "units must be given if they are not eV, e.g. units='kcal/mol' or 'Hartree/Bohr'"
    per_atom = dataset.energies / dataset.n_atoms
    problems: _Problems = []
    by_composition: defaultdict[str, list[int]] = defaultdict(list)
    for k, frame in enumerate(dataset.frames):
        by_composition[frame.symbols.formula.reduce()[0].format("hill")].append(k)
        # the Thomas-Fermi energy, -0.7687 Z^(7/3) Hartree, lies below that of every real atom (by a fifth for iodine)
        lowest = float((-0.7687 * HARTREE * frame.numbers ** (7 / 3)).mean())
        if not lowest < per_atom[k] < _LARGEST_ENERGY:
            limits = f"the energy must lie within {lowest:.0f} and {_LARGEST_ENERGY:.0f}"
            problems.append((k, f"has {per_atom[k]:.6g} eV/atom, but {limits}; {hint}"))
    for formula, members in by_composition.items():
        middle = float(np.median(per_atom[members]))
        problems += [
            (k, f"has {per_atom[k]:.6g} eV/atom, but other frames of {formula} have about {middle:.6g}; {hint}")
            for k in members
            if abs(per_atom[k] - middle) > _LARGEST_ENERGY_SPREAD
        ]
    return problems


def _impossible_force(dataset: Dataset) -> _Problems:
    norms = [np.linalg.norm(forces, axis=1) for forces in dataset.forces]
    everywhere = np.concatenate([norm for norm in norms if len(norm) > 1] or [np.ones(1)])
    # symmetry can cancel every force of one frame, not of several different ones
    if len(dataset) > 1 and not everywhere.any():
        return [
            (k, "has forces that are all exactly 0 eV/A, as have all frames: are they labels?")
            for k, norm in enumerate(norms)
            if len(norm) > 1
        ]
    largest = [(k, int(norm.argmax()), float(norm.max())) for k, norm in enumerate(norms)]
    hint = "forces must be in eV/A, or units given, e.g. units='kcal/mol' or 'Hartree/Bohr'"
    problems = [
        (k, f"has a force of {value:.4g} eV/A on atom {atom} ({dataset.frames[k].symbols[atom]}); {hint}")
        for k, atom, value in largest
        if value > _LARGEST_FORCE
    ]
    median = float(np.median(everywhere))
    if not problems and median > _LARGEST_MEDIAN_FORCE:
        problems = [
            (k, f"has a force of {value:.4g} eV/A on atom {atom}, the median of all frames is {median:.4g}; {hint}")
            for k, atom, value in largest
        ]
    return problems or _forces_without_work(dataset)


def _forces_without_work(dataset: Dataset) -> _Problems:
    """Compare energy differences of similar frames with the work of their forces.

    Between two frames of one cell that differ by displacements u, ``E_2 - E_1 = -(F_1 + F_2).u / 2`` up to third order.
    The slope of one side on the other is near 1 for any labels that belong together (0.81 to 1.03 on eight public
    sets), -1 for gradients instead of forces, 51 for forces in Hartree/Bohr beside energies in eV. Frames that are too
    different decide nothing.
    """
    groups: defaultdict[tuple[bytes, bytes], list[int]] = defaultdict(list)
    for k, frame in enumerate(dataset.frames):
        groups[frame.numbers.tobytes(), frame.pbc.tobytes()].append(k)
    pairs: list[tuple[int, int, float, float]] = []
    for members in groups.values():
        frames = [dataset.frames[k] for k in members]
        cells = np.array([_box(frame) for frame in frames])
        fractional = np.linalg.solve(cells.mT, np.array([frame.positions for frame in frames]).mT).mT
        forces = np.array([dataset.forces[k] for k in members])
        energies = dataset.energies[members]
        for gap in range(1, min(len(members), _WORK_NEIGHBOURS + 1)):
            strain = np.linalg.solve(cells[:-gap], cells[gap:]) - np.eye(3)
            moved = fractional[gap:] - fractional[:-gap]
            moved -= np.where(frames[0].pbc, np.rint(moved), 0.0)
            moved -= moved.mean(axis=1, keepdims=True)
            displacement = moved @ (0.5 * (cells[gap:] + cells[:-gap]))
            work = -0.5 * np.einsum("kic,kic->k", forces[gap:] + forces[:-gap], displacement)
            near = (np.abs(strain).max(axis=(1, 2)) < _WORK_STRAIN) & (
                np.abs(displacement).max(axis=(1, 2)) < _WORK_DISPLACEMENT
            )
            change = energies[gap:] - energies[:-gap]
            pairs += [(members[a], members[a + gap], float(work[a]), float(change[a])) for a in np.flatnonzero(near)]
    if len(pairs) < _WORK_PAIRS:
        return []
    work, change = np.array([pair[2:] for pair in pairs]).T
    if not work.std() or not change.std() or abs(np.corrcoef(work, change)[0, 1]) < _WORK_CORRELATION:
        return []
    slope = float(work @ change / (work @ work))
    if _WORK_SLOPES[0] < slope < _WORK_SLOPES[1]:
        return []
    first, second, one_work, one_change = pairs[int(np.abs(work).argmax())]
    return [
        (
            min(first, second),
            f"and frame {dataset.frame_numbers[max(first, second)]} differ by {one_change:.4g} eV, but moving the "
            f"atoms from one to the other against the forces takes {one_work:.4g} eV (ratio {slope:.3g}, {len(pairs)} "
            "pairs, must be near 1): energies are not in eV, forces not in eV/A, or their sign is reversed",
        )
    ]


def _check_duplicates(dataset: Dataset) -> None:
    groups = dataset.duplicates
    copies = np.flatnonzero(groups != np.arange(len(groups)))
    if not len(copies):
        return
    difference = np.abs(dataset.energies[copies] - dataset.energies[groups[copies]]) / dataset.n_atoms[copies]
    problems = [
        (
            int(k),
            f"has the geometry of frame {dataset.frame_numbers[groups[k]]} but another energy, by {gap:.4g} eV/atom",
        )
        for k, gap in zip(copies, difference, strict=True)
        if gap > _LABEL_CONFLICT
    ]
    _refuse(dataset, problems)
    logger.warning(
        "%s: %d of %d frames repeat the geometry of another, the first is frame %d",
        dataset.source,
        len(copies),
        len(dataset),
        dataset.frame_numbers[copies[0]],
    )


class _Contacts(NamedTuple):
    """Pairs of atoms, images included, each once: indices, cell shift of the second ``(n_pairs, 3)``, distance."""

    first: NDArray[np.int64]
    second: NDArray[np.int64]
    shift: NDArray[np.int64]
    distance: NDArray[np.float64]


def _contacts(frame: Atoms, cutoff: float = _CONTACT) -> _Contacts:
    """Find all pairs of atoms closer than `cutoff` Angstrom."""
    search = NeighborList(cutoff=cutoff, full_list=False)
    first, second, shift, distance = search.compute(frame.positions, _box(frame), frame.pbc, "ijSd")
    return _Contacts(first.astype(np.int64), second.astype(np.int64), shift.astype(np.int64), distance)


def _box(frame: Atoms) -> NDArray[np.float64]:
    """Return three independent cell vectors ``(3, 3)``; those that no periodicity needs are invented."""
    return np.asarray(frame.cell.complete().array if frame.pbc.any() else np.eye(3), dtype=np.float64)


def _is_crystal(frame: Atoms) -> bool:
    if not frame.pbc.all():
        return False
    first, second, shift, _ = _contacts(frame)
    crossing = shift.any(axis=1)
    # atoms linked inside the cell that touch each other across its border too: so do nearly all crystals
    cluster = _clusters(first[~crossing], second[~crossing], len(frame))[1]
    if (cluster[first[crossing]] == cluster[second[crossing]]).any():
        return True
    # an atom is linked with its own image if and only if a 3 x 3 x 3 supercell has fewer than 27 times the clusters
    cells = np.indices((3, 3, 3)).reshape(3, 27).T
    image = np.ravel_multi_index(((cells[:, None] + shift) % 3).transpose(2, 0, 1), (3, 3, 3))
    n = len(frame)
    rows = (np.arange(27)[:, None] * n + first).ravel()
    columns = (image * n + second).ravel()
    return _clusters(rows, columns, 27 * n)[0] < 27 * _clusters(first, second, n)[0]


def _clusters(rows: NDArray[np.int64], columns: NDArray[np.int64], size: int) -> tuple[int, NDArray[np.int64]]:
    """Return the number of connected sets of `size` nodes, and to which of them each belongs."""
    graph = coo_array((np.ones(len(rows)), (rows, columns)), shape=(size, size))
    count, label = connected_components(graph, directed=False)
    return int(count), label.astype(np.int64)


def _fingerprint(frame: Atoms) -> NDArray[np.float32]:
    """Return sorted distances: a vector of a length set by the composition, moving no faster than the atoms do."""
    first, second, _, distance = _contacts(frame)
    number = frame.numbers
    low, high = np.minimum(number[first], number[second]), np.maximum(number[first], number[second])
    parts = []
    elements, counts = np.unique(number, return_counts=True)
    for a, (low_number, low_count) in enumerate(zip(elements, counts, strict=True)):
        for high_number, high_count in zip(elements[a:], counts[a:], strict=True):
            part = np.full(_DISTANCES_PER_ATOM * min(low_count, high_count), _CONTACT, dtype=np.float32)
            found = np.sort(distance[(low == low_number) & (high == high_number)])[: len(part)]
            part[: len(found)] = found
            parts.append(part)
    return np.concatenate(parts)


def _bytes(values: ArrayLike) -> bytes:
    """Return float64 bytes that are the same on every machine; -0.0 counts as 0.0."""
    return (np.asarray(values, dtype="<f8") + 0.0).tobytes()
