"""Descriptors and their Jacobians, computed once per set of frames and read back through a memory map.

The geometry of a training set never changes, so its descriptors ``G`` and their Jacobian ``J = dG/dx`` are constants of
the training. One cache holds all frames of a data set; splits and ablations only pick frames from it.

Layout (version 2): a folder named by a hash of everything the numbers depend on, holding ``meta.json`` and raw
little-endian arrays over all frames one after the other. Atoms of a frame are sorted by species. ``J`` is stored as
dense blocks of 3 coordinates by :data:`BLOCK` columns (see :class:`tlmc.descriptors.aev.BlockJacobian`); nothing in the
layout is particular to AEVs, so columns of another local descriptor can follow them.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import itertools
import json
import logging
import math
import mmap
import os
import re
import secrets
import shutil
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, overload

import numpy as np
import torch
from ase import Atoms
from scipy.sparse import bsr_array
from torch import Tensor

from tlmc import paths
from tlmc.data.geometry import frame_hash
from tlmc.descriptors.aev import BLOCK, BlockJacobian, aev, aev_jacobian
from tlmc.descriptors.pairs import neighbours
from tlmc.equality import equal_by_content
from tlmc.errors import ConfigError, DataError
from tlmc.families.ani.model import AniPotential
from tlmc.files import write_json

LAYOUT_VERSION = 2
DEFAULT_LIMIT_GB = 10.0
"""Size of all descriptor caches together beyond which the oldest are removed; ``TLMC_CACHE_GB`` sets another."""
_LOG = logging.getLogger(__name__)
_ARRAYS = {
    "G": None,
    "values": None,
    "atoms": torch.int32,
    "starts": torch.int32,
    "species": torch.int32,
    "order": torch.int32,
}
_FILES = {"meta.json", *(f"{name}.bin" for name in (*_ARRAYS, "columns_of_blocks"))}
"""All that a cache is made of, layout 1 included: other files are somebody else's."""
_UNFINISHED = ".partial-", ".removed-"
"""Folders that a process fills or empties; one that was killed leaves them behind."""
_WEEK = 7 * 24 * 3600.0


@equal_by_content
class Structure(NamedTuple):
    """Descriptors of one frame, atoms sorted by species."""

    species: Tensor
    """Network index of every atom, ascending, int32, shape ``(n_atoms,)``."""
    order: Tensor
    """Where each sorted atom stands in the frame: ``frame.positions[order]`` is in this structure's order."""
    G: Tensor
    """Active descriptor columns, shape ``(n_atoms, n_columns)``."""
    values: Tensor
    """Blocks of ``dG/dx`` sorted by their rows, shape ``(n_blocks, 3, BLOCK)``."""
    atoms: Tensor
    """Atom whose coordinates each block belongs to, int32, shape ``(n_blocks,)``."""
    starts: Tensor
    """Where each row of blocks (atom times ``n_columns / BLOCK`` plus column block) begins and, last, ends, int32."""

    @property
    def jacobian(self) -> bsr_array:
        """``dG/dx`` as a sparse matrix, a copy: ``(n_atoms * n_columns, 3 * n_atoms)`` in blocks of ``BLOCK`` by 3."""
        blocks = self.values.transpose(1, 2).contiguous().numpy()
        shape = (self.G.numel(), 3 * len(self.G))
        return bsr_array((blocks, self.atoms.numpy(), self.starts.numpy()), shape=shape)

    def forces(self, g: Tensor) -> Tensor:
        """Return ``-J^T g`` for ``g = dE/dG`` of shape ``(n_atoms, n_columns)``: forces, shape ``(n_atoms, 3)``."""
        per_block = torch.bmm(self.values, g.reshape(-1, BLOCK)[self._rows()][:, :, None]).squeeze(2)
        return g.new_zeros(len(g), 3).index_add_(0, self.atoms, per_block).neg_()

    def along(self, direction: Tensor) -> Tensor:
        """Return ``J r``, the change of G along a displacement ``r`` of shape ``(n_atoms, 3)``; shape as G."""
        per_block = torch.bmm(direction[self.atoms][:, None], self.values).squeeze(1)
        result = direction.new_zeros(len(self.starts) - 1, BLOCK).index_add_(0, self._rows(), per_block)
        return result.view(self.G.shape)

    def _rows(self) -> Tensor:
        # a GPU that knows the size need not report it to the host first
        return torch.repeat_interleave(self.starts.diff(), output_size=len(self.atoms))


class DescriptorCache(Sequence[Structure]):
    """Descriptors of a set of frames on disk, mapped into memory: pages are read when touched and dropped at need.

    The files are mapped as wholes. Where the process may not address that much (``ulimit -v``), every structure is
    mapped when asked for and released with its last reference, so that sets of any size pass. Either way the files are
    open from the beginning, and may be removed by a process that makes room while this one reads.

    Attributes
    ----------
    folder
        Where the cache is.
    columns
        Descriptor columns that can differ from zero in this set, ascending, int64.
    present
        Network indices that occur in the set, ascending.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        meta = json.loads((folder / "meta.json").read_text())
        self.columns = torch.tensor(meta["columns"])
        self._dtype: torch.dtype = getattr(torch, meta["dtype"])
        sizes = [(frame["atoms"], frame["blocks"]) for frame in meta["frames"]]
        self._atoms, self._blocks = ([0, *itertools.accumulate(column)] for column in zip(*sizes, strict=True))
        counts = {name: (dtype, count) for name, dtype, count in _counts(meta)}
        self._whole: dict[str, Tensor] | None = None
        with contextlib.ExitStack() as stack:
            self._files = {name: stack.enter_context(open(folder / f"{name}.bin", "rb")) for name in _ARRAYS}
            self.present: list[int] = np.unique(np.fromfile(self._files["species"], dtype=np.int32)).tolist()
            if sum(dtype.itemsize * count for dtype, count in counts.values()) < 0.5 * _free_address_space():
                self._whole = {name: self._map(name, 0, count) for name, (_, count) in counts.items()}
            else:
                weakref.finalize(self, stack.pop_all().close)
        self._opened: list[Structure | None] = [None] * len(sizes)

    def __len__(self) -> int:
        return len(self._opened)

    @property
    def structures(self) -> tuple[Structure, ...]:
        """All structures."""
        return tuple(self)

    @overload
    def __getitem__(self, index: int) -> Structure: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[Structure, ...]: ...
    def __getitem__(self, index: int | slice) -> Structure | tuple[Structure, ...]:
        if isinstance(index, slice):
            return tuple(self[i] for i in range(*index.indices(len(self))))
        structure = self._opened[index]
        if structure is None:
            structure = self._open(range(len(self))[index])
            if self._whole is not None:
                self._opened[index] = structure
        return structure

    def _open(self, index: int) -> Structure:
        atom, block = self._atoms[index], self._blocks[index]
        n, n_blocks = self._atoms[index + 1] - atom, self._blocks[index + 1] - block
        n_columns = len(self.columns)
        per_atom = n_columns // BLOCK
        return Structure(
            species=self._array("species", atom, n),
            order=self._array("order", atom, n).long(),
            G=self._array("G", atom * n_columns, n * n_columns).view(n, n_columns),
            values=self._array("values", block * BLOCK * 3, n_blocks * BLOCK * 3).view(n_blocks, 3, BLOCK),
            atoms=self._array("atoms", block, n_blocks),
            # one more than rows in every frame before this one
            starts=self._array("starts", atom * per_atom + index, n * per_atom + 1),
        )

    def _array(self, name: str, first: int, count: int) -> Tensor:
        return self._map(name, first, count) if self._whole is None else self._whole[name][first : first + count]

    def _map(self, name: str, first: int, count: int) -> Tensor:
        """Map a part of a file privately (copy on write), so that nothing can write back to the cache."""
        dtype = _ARRAYS[name] or self._dtype
        if count == 0:
            return torch.empty(0, dtype=dtype)
        begin, end = first * dtype.itemsize, (first + count) * dtype.itemsize
        offset = begin - begin % mmap.ALLOCATIONGRANULARITY
        pages = mmap.mmap(self._files[name].fileno(), end - offset, access=mmap.ACCESS_COPY, offset=offset)
        return torch.frombuffer(pages, dtype=dtype, count=count, offset=begin - offset)


def _free_address_space() -> float:
    """Return how many more bytes this process may address."""
    try:
        import resource
    except ImportError:  # Windows
        return math.inf
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    statm = Path("/proc/self/statm")
    if limit == resource.RLIM_INFINITY:
        return math.inf
    used = int(statm.read_text().split()[0]) * mmap.PAGESIZE if statm.exists() else limit // 2
    return limit - used


def build_cache(
    model: AniPotential,
    frames: Sequence[Atoms],
    dtype: torch.dtype = torch.float32,
    folder: Path | None = None,
    report: Callable[[int], object] | None = None,
) -> DescriptorCache:
    """Open the cache of these frames, computing it first if it is not on disk yet.

    Parameters
    ----------
    model
        Supplies descriptor constants and maps elements to networks; its weights play no part.
    frames
        Molecules and crystals of any size, small cells included.
    dtype
        Precision of the stored numbers; they are computed in float64.
    folder
        Where caches live; the user's cache folder by default.
    report
        Called with 1 after every frame that is computed.

    Raises
    ------
    ModelError
        If a frame holds an element without a network.
    DataError
        If there are no frames or the disk is too small.
    ConfigError
        If ``TLMC_CACHE_GB`` is no size.
    """
    if not frames:
        raise DataError("there are no frames to describe")
    limit = _limit()
    species = [model.species(frame) for frame in frames]
    folder = paths.cache_dir() / "descriptors" if folder is None else Path(folder)
    target = folder / _key(model, frames, species, dtype)
    found = _reopened(target)
    if found is not None:
        return found
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / f"{_UNFINISHED[0]}{secrets.token_hex(8)}"
    partial.mkdir()
    try:
        _write(partial, model, frames, species, dtype, report)
        # a map outlives the name of its file, so nobody takes this cache away before it is used; Windows would not
        # rename what is mapped
        built = DescriptorCache(partial) if os.name == "posix" else None
        if not _publish(partial, target):
            return _reopened(target) or DescriptorCache(partial)
        if built is None:
            built = DescriptorCache(target)
        built.folder = target
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise DataError(
                f"no space left for the descriptor cache in {folder}: free some or set TLMC_CACHE_DIR"
            ) from error
        raise
    finally:
        _clear(partial)
    _evict(folder, target, limit)
    return built


def _limit() -> float:
    """Return how many bytes all caches together may have."""
    given = os.environ.get("TLMC_CACHE_GB") or str(DEFAULT_LIMIT_GB)
    try:
        limit = float(given) * 1e9
    except ValueError:
        limit = math.nan
    if not limit >= 0:
        raise ConfigError(f"TLMC_CACHE_GB must be a number of gigabytes, 0 or more, got {given!r}")
    return limit


def _reopened(target: Path) -> DescriptorCache | None:
    """Open a cache if it is there and whole, and note that it was."""
    try:
        if not _is_complete(target, _LOG.warning):
            return None
        cache = DescriptorCache(target)
    except FileNotFoundError:
        # another process has just removed it, to make room
        return None
    with contextlib.suppress(OSError):
        # it may be gone by now, which does no harm, or belong to another user
        os.utime(target)
    return cache


def _publish(partial: Path, target: Path) -> bool:
    """Give a cache its name; return False if another process has finished the same in the meantime."""
    if _is_complete(target):
        return False
    if target.exists():
        foreign = {path.name for path in target.iterdir()} - _FILES
        if foreign:
            raise DataError(f"{target} holds {min(foreign)}, which is no part of a descriptor cache: move it away")
        _remove(target)
    try:
        partial.rename(target)
    except OSError:
        if not _is_complete(target):
            raise
        return False
    return True


def _evict(folder: Path, keep: Path, limit: float) -> None:
    """Remove the caches that have not been opened for longest while all together are larger than the limit."""
    caches = []
    for path in folder.iterdir():
        # other processes make room, too
        with contextlib.suppress(OSError):
            if re.fullmatch(r"\.(partial|removed)-[a-z0-9_]{8,16}", path.name) and not path.is_symlink():
                if max(part.stat().st_mtime for part in (path, *path.iterdir())) < time.time() - _WEEK:
                    _clear(path)
            elif _is_cache(path):
                caches.append((path.stat().st_mtime, sum(file.stat().st_size for file in path.iterdir()), path))
    total = sum(size for _, size, _ in caches)
    for _, size, path in sorted(caches):
        if path != keep and total > limit and _remove(path):
            total -= size
            _LOG.info("removed the descriptor cache %s, %.1f GB, to stay below %.1f GB", path, size / 1e9, limit / 1e9)


def _is_cache(path: Path) -> bool:
    """Tell whether a folder is a cache, of an older layout perhaps, and holds nothing else."""
    if not re.fullmatch("[0-9a-f]{32}", path.name) or path.is_symlink() or not path.is_dir():
        return False
    if not {file.name for file in path.iterdir()} <= _FILES:
        return False
    try:
        meta = json.loads((path / "meta.json").read_text())
    except ValueError:
        return False
    return isinstance(meta, dict) and {"layout", "dtype", "columns", "frames"} <= meta.keys()


def _remove(cache: Path) -> bool:
    """Remove a cache, at once for all who look for it; tell whether it is gone. Who has it open can go on reading."""
    going = cache.with_name(f"{_UNFINISHED[1]}{secrets.token_hex(8)}")
    try:
        cache.rename(going)
    except FileNotFoundError:
        return True  # another process was first
    except OSError:
        return False  # of another user
    _clear(going)
    return True


def _clear(folder: Path) -> None:
    """Remove the files of a cache, and their folder if nothing else is in it."""
    for path in (*(folder / name for name in _FILES), *folder.glob(".meta-*.json")):
        with contextlib.suppress(OSError):
            path.unlink()
    with contextlib.suppress(OSError):
        folder.rmdir()


def _key(model: AniPotential, frames: Sequence[Atoms], species: Sequence[Tensor], dtype: torch.dtype) -> str:
    """Return a hash of layout, descriptor constants, precision, channels and geometries."""
    head = {
        "layout": LAYOUT_VERSION,
        "block": BLOCK,
        "dtype": str(dtype),
        "aev": asdict(model.aev),
        "n_species": len(model.symbols),
    }
    digest = hashlib.sha256(json.dumps(head, sort_keys=True).encode())
    if model.enrichment is not None:
        digest.update(model.enrichment.digest.encode())
    for frame, channels in zip(frames, species, strict=True):
        digest.update(frame_hash(frame).encode())
        digest.update(channels.numpy().astype("<i4").tobytes())
    return digest.hexdigest()[:32]


def _write(
    folder: Path,
    model: AniPotential,
    frames: Sequence[Atoms],
    species: Sequence[Tensor],
    dtype: torch.dtype,
    report: Callable[[int], object] | None,
) -> None:
    present = sorted({int(s) for channels in species for s in channels.unique()})
    columns = model.columns(present)
    # AEV sub-blocks are multiples of BLOCK wide, so whole column blocks are active or not
    new_block = torch.full((model.n_columns // BLOCK,), -1)
    new_block[columns[::BLOCK] // BLOCK] = torch.arange(len(columns) // BLOCK)
    per_atom = len(columns) // BLOCK
    sizes = []
    streams: dict[str, BinaryIO] = {name: open(folder / f"{name}.bin", "wb") for name in _ARRAYS}  # noqa: SIM115
    try:
        for number, (frame, channels) in enumerate(zip(frames, species, strict=True)):
            order = torch.argsort(channels, stable=True)
            channels = channels[order]
            G, J = _describe(model, frame[order.numpy()], channels)
            G = G[:, columns]
            rows = J.rows // len(new_block) * per_atom + new_block[J.rows % len(new_block)]
            starts = torch.searchsorted(rows, torch.arange(len(frame) * per_atom + 1))
            arrays = {
                "G": G,
                "values": J.values.transpose(1, 2),
                "atoms": J.atoms,
                "starts": starts,
                "species": channels,
                "order": order,
            }
            for name, array in arrays.items():
                streams[name].write(array.to(_ARRAYS[name] or dtype).contiguous().numpy().tobytes())
            sizes.append({"atoms": len(frame), "blocks": len(J.values)})
            if number == 0:
                _check_space(folder, sum(s.tell() for s in streams.values()) / len(frame), frames)
            if report is not None:
                report(1)
    finally:
        for stream in streams.values():
            stream.close()
    meta = {
        "layout": LAYOUT_VERSION,
        "dtype": str(dtype).removeprefix("torch."),
        "columns": columns.tolist(),
        "frames": sizes,
    }
    write_json(folder / "meta.json", meta)


def _describe(model: AniPotential, frame: Atoms, channels: Tensor) -> tuple[Tensor, BlockJacobian]:
    """Return all columns of a frame's atoms, and their Jacobian in blocks."""
    n_species = len(model.symbols)
    pairs = neighbours(frame, model.aev.r_cut_radial)
    G = aev(model.aev, n_species, channels, pairs)
    J = aev_jacobian(model.aev, n_species, channels, pairs)
    if model.enrichment is None:
        return G, J
    richer, blocks = model.enrichment.columns_and_jacobian(frame)
    own, extra = G.shape[1] // BLOCK, richer.shape[1] // BLOCK
    rows = torch.cat(
        [J.rows // own * (own + extra) + J.rows % own, blocks.rows // extra * (own + extra) + own + blocks.rows % extra]
    )
    order = torch.argsort(rows, stable=True)
    atoms, values = torch.cat([J.atoms, blocks.atoms]), torch.cat([J.values, blocks.values])
    return torch.cat([G, richer], dim=1), BlockJacobian(rows[order], atoms[order], values[order])


def _check_space(folder: Path, bytes_per_atom: float, frames: Sequence[Atoms]) -> None:
    needed = bytes_per_atom * sum(len(frame) for frame in frames)
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise DataError(
            f"the descriptor cache needs about {needed / 1e6:.0f} MB in {folder}, but {free / 1e6:.0f} MB are free: "
            "free some or set TLMC_CACHE_DIR"
        )


def _is_complete(folder: Path, say: Callable[[str, Path, object], None] | None = None) -> bool:
    """Tell whether a cache is there with every file as long as its description says; what is damaged can be said."""
    problem: object = "sizes differ"
    try:
        meta = json.loads((folder / "meta.json").read_text())
        complete = meta["layout"] == LAYOUT_VERSION and all(
            (folder / f"{name}.bin").stat().st_size == count * dtype.itemsize for name, dtype, count in _counts(meta)
        )
    except (FileNotFoundError, NotADirectoryError):
        return False
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        complete, problem = False, error
    if not complete and say is not None:
        say("the descriptor cache %s is damaged (%s) and is computed again", folder, problem)
    return complete


def _counts(meta: dict[str, Any]) -> Iterator[tuple[str, torch.dtype, int]]:
    """Yield name, type and number of elements of every array file."""
    n_columns = len(meta["columns"])
    atoms, blocks = (sum(frame[what] for frame in meta["frames"]) for what in ("atoms", "blocks"))
    counts = {
        "G": atoms * n_columns,
        "values": blocks * BLOCK * 3,
        "atoms": blocks,
        "starts": atoms * (n_columns // BLOCK) + len(meta["frames"]),
        "species": atoms,
        "order": atoms,
    }
    for name, dtype in _ARRAYS.items():
        yield name, dtype or getattr(torch, meta["dtype"]), counts[name]
