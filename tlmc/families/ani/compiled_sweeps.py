"""The compiled sweeps (``compiled_sweeps.c``).

The same mathematics is written with torch operations in :mod:`tlmc.families.ani.engine`, which serves other devices and
machines without a compiler, and which the tests compare with.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Mapping, Sequence
from ctypes import POINTER, c_double, c_float, c_int, c_int64, c_void_p, sizeof
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tlmc import compiled
from tlmc.descriptors.aev import BLOCK
from tlmc.families.ani.batch import Batch
from tlmc.families.ani.model import Layer
from tlmc.families.ani.network import CELU_ALPHA
from tlmc.training.optimizer import BETA1, BETA2, EPS, Update

MAX_LAYERS = 8
"""Affine layers per network that the compiled sweeps have room for."""
_SOURCE = Path(__file__).with_name("compiled_sweeps.c")


class Net(ctypes.Structure):
    """``Net`` of compiled_sweeps.c: the networks of one element and what their sweeps keep."""

    _fields_ = [
        ("n_atoms", c_int64),
        ("first", c_int64),
        *((name, c_void_p * MAX_LAYERS) for name in ("weight", "bias", "weight_slope", "bias_slope", "A", "D")),
        ("width", c_int64 * MAX_LAYERS),
    ]


class Sparse(ctypes.Structure):
    """``Sparse`` of compiled_sweeps.c: the Jacobian of one structure of a batch."""

    _fields_ = [
        ("n_atoms", c_int64),
        ("first", c_int64),
        ("values", c_void_p),
        ("atoms", c_void_p),
        ("starts", c_void_p),
    ]


class AdamW(ctypes.Structure):
    """``Update`` of compiled_sweeps.c."""

    _fields_ = [
        *((name, c_void_p) for name in ("weight", "exp_avg", "exp_avg_sq")),
        *((name, c_double) for name in ("rate", "decay", "beta1", "beta2", "correction1", "correction2", "eps")),
    ]


class CompiledSweeps:
    """The compiled counterpart of :class:`tlmc.families.ani.engine.TorchSweeps`, with the same methods."""

    def __init__(
        self,
        functions: ctypes.CDLL,
        layers: Mapping[int, Sequence[Layer]],
        slots: Mapping[int, Sequence[Layer]],
        trainable: Sequence[bool],
        factor: float,
    ) -> None:
        self._c, self._factor, self._layers, self._trainable = functions, factor, layers, tuple(trainable)
        self._templates = {}
        for k, parts in layers.items():
            widths = [part.bias.shape[-1] for part in parts]
            if len(parts) > MAX_LAYERS:
                raise ValueError(f"networks of {len(parts)} layers, but the compiled code takes {MAX_LAYERS} at most")
            trained = [slot if on else None for slot, on in zip(slots[k], trainable, strict=True)]
            self._templates[k] = Net(
                weight=_pointers([part.weight for part in parts]),
                bias=_pointers([part.bias for part in parts]),
                weight_slope=_pointers([None if slot is None else slot.weight for slot in trained]),
                bias_slope=_pointers([None if slot is None else slot.bias for slot in trained]),
                width=(c_int64 * MAX_LAYERS)(*widths),
            )
        first = next(iter(layers.values()))
        self._members, self._hidden = len(first[0].weight), len(first) - 1
        # heaviest first, so that no thread is left with a long task at the end
        self._per_atom = {k: sum(part.weight[0].numel() for part in parts) for k, parts in layers.items()}
        self._largest = max(part.weight[0].numel() for parts in layers.values() for part in parts)
        self._workspace = first[0].weight.new_empty(0)
        self._kept: Any = None

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return energies ``(members, n_atoms)`` per unit of factor, and g ``(n_atoms, n_columns)``, merged order."""
        n, K = batch.separate.shape[0], batch.X.shape[1]
        nets = self._nets(batch)
        atomic = batch.X.new_empty(self._members, n)
        per_member = batch.X.new_empty(self._members, n, K) if self._members > 1 else batch.X.new_empty(0)
        g = batch.X.new_empty(n, K)
        self._c.forward(
            nets, len(nets), self._members, self._hidden, K, n, batch.X.data_ptr(), CELU_ALPHA, self._factor,
            atomic.data_ptr(), per_member.data_ptr() or g.data_ptr(), g.data_ptr(), torch.get_num_threads(),
        )  # fmt: skip
        self._kept = nets
        return atomic, g

    def forces(self, batch: Batch, g: Tensor) -> Tensor:
        """Return ``-J^T g``, structures following one another."""
        result = g.new_empty(g.shape[0], 3)
        self._c.jacobian_transposed(*self._products(batch), batch.separate.data_ptr(), g.data_ptr(), result.data_ptr(),
                                    torch.get_num_threads())  # fmt: skip
        return result

    def along(self, batch: Batch, r: Tensor) -> None:
        """Write ``v = -J r`` into the batch."""
        r = r.contiguous()
        self._c.jacobian(*self._products(batch), batch.v_rows.data_ptr(), r.data_ptr(), batch.X.data_ptr(),
                         torch.get_num_threads())  # fmt: skip

    def reverse(self, batch: Batch, c: Tensor, update: Update | None) -> None:
        """Fill the slots from `c` per merged atom, or update the weights; `forward` and `along` came before."""
        threads, nets = torch.get_num_threads(), self._kept
        adamw = None if update is None else _adamw(update)
        widest = max(max(net.width[: self._hidden]) for net in nets)
        upper = max(net.n_atoms for net in nets) * widest
        scratch = c.new_empty(threads, upper + self._largest)
        self._c.reverse(
            nets, len(nets), self._members, self._hidden, batch.X.shape[1], batch.X.data_ptr(), c.data_ptr(),
            CELU_ALPHA, self._factor, scratch.data_ptr(), scratch.shape[1], upper, adamw, threads,
        )  # fmt: skip
        if adamw is not None:
            # elements that the batch lacks: their gradient is zero, their moments and decay are not
            for k in self._templates.keys() - {k for k, _ in batch.slices}:
                for layer, on in zip(self._layers[k], self._trainable, strict=True):
                    for part in layer if on else ():
                        self._c.adamw_without_gradient(adamw, part.data_ptr(), part.numel(), threads)

    def _nets(self, batch: Batch) -> Any:
        """Return the elements of a batch, heaviest first, with room for what their sweeps keep."""
        slices = sorted(batch.slices, key=lambda part: -self._per_atom[part[0]] * (part[1].stop - part[1].start))
        nets = (Net * len(slices))(*(self._templates[k] for k, _ in slices))
        sizes = [
            2 * self._members * (atoms.stop - atoms.start) * net.width[number]
            for net, (_, atoms) in zip(nets, slices, strict=True)
            for number in range(self._hidden)
        ]
        if self._workspace.shape[0] < 2 * sum(sizes):
            self._workspace = batch.X.new_empty(2 * sum(sizes))
        address, itemsize = self._workspace.data_ptr(), self._workspace.element_size()
        places = iter(sizes)
        for net, (_, atoms) in zip(nets, slices, strict=True):
            net.first, net.n_atoms = atoms.start, atoms.stop - atoms.start
            for number in range(self._hidden):
                size = next(places) * itemsize
                net.A[number], net.D[number] = address, address + size
                address += 2 * size
        return nets

    def _products(self, batch: Batch) -> tuple[Any, int, int]:
        """Return the Jacobians of a batch as the compiled code wants them."""
        structures, first = (Sparse * len(batch.structures))(), 0
        for entry, s in zip(structures, batch.structures, strict=True):
            entry.n_atoms, entry.first = s.species.shape[0], first
            entry.values, entry.atoms, entry.starts = s.values.data_ptr(), s.atoms.data_ptr(), s.starts.data_ptr()
            first += entry.n_atoms
        return structures, len(structures), batch.X.shape[1]


def _adamw(update: Update) -> AdamW:
    tensors = (update.weight, update.exp_avg, update.exp_avg_sq)
    return AdamW(
        *(tensor.data_ptr() for tensor in tensors),
        update.rate,
        1.0 - update.rate * update.weight_decay,
        BETA1,
        BETA2,
        1.0 - BETA1**update.step,
        1.0 - BETA2**update.step,
        EPS,
    )


def _pointers(tensors: Sequence[Tensor | None]) -> Any:
    """Return the addresses of tensors as ``Net`` wants them; None becomes a null pointer."""
    return (c_void_p * MAX_LAYERS)(*(None if t is None else t.data_ptr() for t in tensors))


@functools.cache
def library(dtype: torch.dtype) -> ctypes.CDLL | None:
    """Return the functions of compiled_sweeps.c for one precision, or None; see :func:`tlmc.compiled.load`."""
    real, pointer = (c_double if dtype == torch.float64 else c_float), c_void_p
    nets, structures = [POINTER(Net)] + [c_int64] * 4, [POINTER(Sparse), c_int64, c_int64, pointer]
    functions: dict[str, list[Any]] = {
        "forward": [*nets, c_int64, pointer, real, real, pointer, pointer, pointer, c_int],
        "reverse": [*nets, pointer, pointer, real, real, pointer, c_int64, c_int64, POINTER(AdamW), c_int],
        "adamw_without_gradient": [POINTER(AdamW), pointer, c_int64, c_int],
        "jacobian_transposed": [*structures, pointer, pointer, c_int],
        "jacobian": [*structures, pointer, pointer, c_int],
    }
    loss = "training goes on without the compiled code, up to twice slower"
    layout = [BLOCK, MAX_LAYERS, *map(sizeof, (Net, Sparse, AdamW))]
    return compiled.load(_SOURCE, dtype, functions, loss, layout)
