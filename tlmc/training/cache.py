"""Descriptors and their Jacobians, computed once per set of frames and read back through a memory map.

The geometry of a training set never changes, so its descriptors ``G`` and their Jacobian ``J = dG/dx`` are constants of
the training. One cache holds all frames of a data set; splits and ablations only pick frames from it.

Layout (version 1): a folder named by a hash of everything the numbers depend on, holding ``meta.json`` and raw
little-endian arrays over all frames one after the other. Atoms of a frame are sorted by species. ``J`` is stored as
dense blocks of :data:`BLOCK` columns by 3 coordinates (see :class:`tlmc.descriptors.aev.BlockJacobian`); nothing in the
layout is particular to AEVs, so columns of another local descriptor can follow them.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from ase import Atoms
from scipy.sparse import bsr_array
from torch import Tensor

from tlmc import paths
from tlmc.descriptors.aev import BLOCK, aev, aev_jacobian, neighbours
from tlmc.errors import ConfigError, DataError
from tlmc.files import write_json
from tlmc.geometry import frame_hash
from tlmc.potentials.model import Potential

LAYOUT_VERSION = 1
DEFAULT_LIMIT_GB = 10.0
"""Size of all descriptor caches together beyond which the oldest are removed; ``TLMC_CACHE_GB`` sets another."""
_LOG = logging.getLogger(__name__)
_ARRAYS = {
    "G": None,
    "values": None,
    "columns_of_blocks": torch.int32,
    "starts": torch.int32,
    "species": torch.int32,
    "order": torch.int32,
}


class Structure(NamedTuple):
    """Descriptors of one frame, atoms sorted by species."""

    species: Tensor
    """Network index of every atom, ascending, int32, shape ``(n_atoms,)``."""
    order: Tensor
    """Where each sorted atom stands in the frame: ``frame.positions[order]`` is in this structure's order."""
    G: Tensor
    """Active descriptor columns, shape ``(n_atoms, n_columns)``."""
    jacobian: bsr_array
    """``dG/dx``, shape ``(n_atoms * n_columns, 3 * n_atoms)``, blocks of ``BLOCK`` by 3."""
    rows: Tensor
    """Block row of every block, int64, for the transposed product."""
    by_atom: Tensor
    """Blocks sorted by the atom whose coordinates they belong to, int64."""
    atom_starts: Tensor
    """Where each atom begins in `by_atom`, int64, shape ``(n_atoms,)``."""
    values: Tensor
    """The blocks, shape ``(n_blocks, BLOCK, 3)``."""

    def forces(self, g: Tensor) -> Tensor:
        """Return ``-J^T g`` for ``g = dE/dG`` of shape ``(n_atoms, n_columns)``: forces, shape ``(n_atoms, 3)``."""
        blocks = g.view(-1, 1, BLOCK).index_select(0, self.rows)
        per_block = torch.bmm(blocks, self.values).squeeze(1)
        # sums over the blocks of each atom; several times faster than index_add
        return torch.nn.functional.embedding_bag(self.by_atom, per_block, self.atom_starts, mode="sum").neg_()

    def along(self, direction: Tensor) -> Tensor:
        """Return ``J r``, the change of G along a displacement ``r`` of shape ``(n_atoms, 3)``; shape as G."""
        return torch.from_numpy(self.jacobian @ direction.reshape(-1).numpy()).view(self.G.shape)


@dataclass(frozen=True)
class DescriptorCache:
    """Descriptors of a set of frames on disk."""

    folder: Path
    columns: Tensor
    """Descriptor columns that can differ from zero in this set, ascending, int64."""
    structures: tuple[Structure, ...]

    def __len__(self) -> int:
        return len(self.structures)

    def __getitem__(self, index: int) -> Structure:
        return self.structures[index]

    @property
    def present(self) -> list[int]:
        """Network indices that occur in the set, ascending."""
        return sorted({int(s) for structure in self.structures for s in structure.species.unique()})


def build_cache(
    model: Potential,
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
    """
    if not frames:
        raise DataError("there are no frames to describe")
    species = [model.species(frame) for frame in frames]
    folder = paths.cache_dir() / "descriptors" if folder is None else Path(folder)
    target = folder / _key(model, frames, species, dtype)
    if not _is_complete(target):
        folder.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(dir=folder, prefix=".partial-"))
        try:
            _write(partial, model, frames, species, dtype, report)
            shutil.rmtree(target, ignore_errors=True)
            partial.rename(target)
        except OSError as error:
            if error.errno == errno.ENOSPC:
                raise DataError(
                    f"no space left for the descriptor cache in {folder}: free some or set TLMC_CACHE_DIR"
                ) from error
            # another process may have finished the same cache in the meantime, which is as good
            if not _is_complete(target):
                raise
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        _evict(folder, keep=target)
    os.utime(target)
    return _open(target)


def _evict(folder: Path, keep: Path) -> None:
    """Remove the caches that have not been opened for longest while all together are larger than the limit."""
    given = os.environ.get("TLMC_CACHE_GB", str(DEFAULT_LIMIT_GB))
    try:
        limit = float(given) * 1e9
    except ValueError as error:
        raise ConfigError(f"TLMC_CACHE_GB must be a number of gigabytes, got {given!r}") from error
    by_age = sorted((path for path in folder.iterdir() if _is_complete(path)), key=lambda path: path.stat().st_mtime)
    sizes = {path: sum(file.stat().st_size for file in path.iterdir()) for path in by_age}
    for path in by_age:
        if path != keep and sum(sizes.values()) > limit:
            _LOG.info(
                "removing the descriptor cache %s, %.1f GB, to stay below %.1f GB",
                path,
                sizes.pop(path) / 1e9,
                limit / 1e9,
            )
            # a process that still reads it keeps its maps until it ends
            shutil.rmtree(path, ignore_errors=True)


def _key(model: Potential, frames: Sequence[Atoms], species: Sequence[Tensor], dtype: torch.dtype) -> str:
    """Return a hash of layout, descriptor constants, precision, channels and geometries."""
    head = {
        "layout": LAYOUT_VERSION,
        "block": BLOCK,
        "dtype": str(dtype),
        "aev": asdict(model.aev),
        "n_species": len(model.symbols),
    }
    digest = hashlib.sha256(json.dumps(head, sort_keys=True).encode())
    for frame, channels in zip(frames, species, strict=True):
        digest.update(frame_hash(frame).encode())
        digest.update(channels.numpy().astype("<i4").tobytes())
    return digest.hexdigest()[:32]


def _write(
    folder: Path,
    model: Potential,
    frames: Sequence[Atoms],
    species: Sequence[Tensor],
    dtype: torch.dtype,
    report: Callable[[int], object] | None,
) -> None:
    n_species = len(model.symbols)
    present = sorted({int(s) for channels in species for s in channels.unique()})
    columns = model.aev.columns(present, n_species)
    # AEV sub-blocks are multiples of BLOCK wide, so whole column blocks are active or not
    new_block = torch.full((model.aev.length(n_species) // BLOCK,), -1)
    new_block[columns[::BLOCK] // BLOCK] = torch.arange(len(columns) // BLOCK)
    per_atom_all, per_atom = len(new_block), len(columns) // BLOCK
    sizes = []
    streams: dict[str, BinaryIO] = {name: open(folder / f"{name}.bin", "wb") for name in _ARRAYS}  # noqa: SIM115
    try:
        for number, (frame, channels) in enumerate(zip(frames, species, strict=True)):
            order = torch.argsort(channels, stable=True)
            channels = channels[order]
            pairs = neighbours(frame[order.numpy()], model.aev.r_cut_radial)
            G = aev(model.aev, n_species, channels, pairs)[:, columns]
            J = aev_jacobian(model.aev, n_species, channels, pairs)
            rows = J.rows // per_atom_all * per_atom + new_block[J.rows % per_atom_all]
            starts = torch.searchsorted(rows, torch.arange(len(frame) * per_atom + 1))
            arrays = {
                "G": G,
                "values": J.values,
                "columns_of_blocks": J.atoms,
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


def _check_space(folder: Path, bytes_per_atom: float, frames: Sequence[Atoms]) -> None:
    needed = bytes_per_atom * sum(len(frame) for frame in frames)
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise DataError(
            f"the descriptor cache needs about {needed / 1e6:.0f} MB in {folder}, but {free / 1e6:.0f} MB are free: "
            "free some or set TLMC_CACHE_DIR"
        )


def _is_complete(folder: Path) -> bool:
    """Tell whether a cache is there with every file as long as its description says."""
    try:
        meta = json.loads((folder / "meta.json").read_text())
        complete = meta["layout"] == LAYOUT_VERSION and all(
            (folder / f"{name}.bin").stat().st_size == count * dtype.itemsize for name, dtype, count in _counts(meta)
        )
    except FileNotFoundError:
        return False
    except (json.JSONDecodeError, KeyError) as error:
        _LOG.warning("the descriptor cache %s is damaged (%s) and is computed again", folder, error)
        return False
    if not complete:
        _LOG.warning("the descriptor cache %s is damaged (sizes differ) and is computed again", folder)
    return complete


def _counts(meta: dict[str, Any]) -> Iterator[tuple[str, torch.dtype, int]]:
    """Yield name, type and number of elements of every array file."""
    n_columns = len(meta["columns"])
    atoms, blocks = (sum(frame[what] for frame in meta["frames"]) for what in ("atoms", "blocks"))
    counts = {
        "G": atoms * n_columns,
        "values": blocks * BLOCK * 3,
        "columns_of_blocks": blocks,
        "starts": atoms * (n_columns // BLOCK) + len(meta["frames"]),
        "species": atoms,
        "order": atoms,
    }
    for name, dtype in _ARRAYS.items():
        yield name, dtype or getattr(torch, meta["dtype"]), counts[name]


def _open(folder: Path) -> DescriptorCache:
    meta = json.loads((folder / "meta.json").read_text())
    n_columns = len(meta["columns"])
    # private (copy-on-write) maps: pages are read when touched and nothing can write back to the cache
    arrays = {
        name: torch.from_file(str(folder / f"{name}.bin"), shared=False, size=count, dtype=dtype)
        for name, dtype, count in _counts(meta)
    }
    structures, atom, block, start = [], 0, 0, 0
    for size in meta["frames"]:
        n, n_blocks = size["atoms"], size["blocks"]
        n_rows = n * (n_columns // BLOCK)
        values = arrays["values"][block * BLOCK * 3 : (block + n_blocks) * BLOCK * 3].view(n_blocks, BLOCK, 3)
        columns_of_blocks = arrays["columns_of_blocks"][block : block + n_blocks]
        starts = arrays["starts"][start : start + n_rows + 1]
        by_atom = torch.argsort(columns_of_blocks, stable=True)
        structures.append(
            Structure(
                species=arrays["species"][atom : atom + n],
                order=arrays["order"][atom : atom + n].long(),
                G=arrays["G"][atom * n_columns : (atom + n) * n_columns].view(n, n_columns),
                jacobian=bsr_array(
                    (values.numpy(), columns_of_blocks.numpy(), starts.numpy()),
                    shape=(n * n_columns, 3 * n),
                    copy=False,
                ),
                rows=torch.repeat_interleave(torch.arange(n_rows), starts.diff()),
                by_atom=by_atom,
                atom_starts=torch.searchsorted(columns_of_blocks[by_atom], torch.arange(n, dtype=torch.int32)),
                values=values,
            )
        )
        atom, block, start = atom + n, block + n_blocks, start + n_rows + 1
    return DescriptorCache(folder, torch.tensor(meta["columns"]), tuple(structures))
