"""The compiled sums over neighbours (``compiled_sums.c``): what torch does in a hundred calls is one pass here.

They give float64 numbers without a history. What is to be differentiated, other precisions, and machines without a
compiler take the torch operations in :mod:`tlmc.descriptors.soap` and :mod:`tlmc.descriptors.symmetry_functions`.
"""

from __future__ import annotations

import ctypes
import functools
from ctypes import POINTER, c_double, c_int, c_int64, c_void_p, sizeof
from pathlib import Path

import torch
from torch import Tensor
from torch.autograd import forward_ad

from tlmc import compiled
from tlmc.descriptors.base import Environments
from tlmc.descriptors.radial import RadialBasis

VALUE_PAIRS, SLOPE_PAIRS, TRIPLES = 2000, 200, 20_000
"""What one thread does in a quarter of a millisecond or more: for less, waking another one does not pay."""
_SOURCE = Path(__file__).with_name("compiled_sums.c")


class _Soap(ctypes.Structure):
    """``Soap`` of compiled_sums.c."""

    _fields_ = [
        *((name, c_int64) for name in ("n_species", "l_max", "n_max", "n_terms", "n_pairs")),
        *((name, c_double) for name in ("r_cut", "reach")),
        *((name, c_void_p) for name in ("radial", "slopes", "mixing", "own")),
        *((name, c_void_p) for name in ("centre", "neighbour_species", "species", "vectors")),
    ]


class _Symmetry(ctypes.Structure):
    """``Symmetry`` of compiled_sums.c."""

    _fields_ = [
        *((name, c_int64) for name in ("n_species", "n_radial", "n_near", "n_angular", "n_pairs")),
        ("r_cut", c_double),
        *((name, c_void_p) for name in ("radial", "angular", "centre", "neighbour_species", "vectors")),
    ]


@functools.cache
def library() -> ctypes.CDLL | None:
    """Return the compiled functions, or None; see :func:`tlmc.compiled.load`."""
    pointer, n = c_void_p, c_int64
    functions = {
        "soap_values": [POINTER(_Soap), n, pointer, n, pointer, pointer, c_int],
        "soap_slopes": [POINTER(_Soap), n, n, pointer, pointer, pointer, pointer, n, pointer, pointer, c_int],
        "symmetry_values": [POINTER(_Symmetry), n, n, pointer, pointer, c_int],
    }
    loss = "descriptors go on without the compiled code, several times slower for small structures"
    found = compiled.load(_SOURCE, torch.float64, functions, loss, [sizeof(_Soap), sizeof(_Symmetry)])
    if found is not None:
        found.soap_room.argtypes, found.symmetry_room.argtypes = [POINTER(_Soap)], [POINTER(_Symmetry)]
        found.soap_room.restype = found.symmetry_room.restype = n
    return found


def can_serve(environments: Environments) -> bool:
    """Tell whether compiled functions are there and may be used: float64 numbers, and nothing is to be differentiated.

    Parameters
    ----------
    environments
        What a descriptor is asked about.
    """
    vectors = environments.vectors
    if vectors.dtype != torch.float64 or vectors.device.type != "cpu":
        return False
    if vectors.requires_grad and torch.is_grad_enabled() or forward_ad.unpack_dual(vectors).tangent is not None:
        return False
    return library() is not None


class SoapSums:
    """The compiled counterpart of what :class:`tlmc.descriptors.soap.SOAP` computes of some environments.

    Parameters
    ----------
    environments
        For which :func:`can_serve` is true.
    n_species, n_features
        Number of elements with channels, and length of a row.
    radial
        The radial functions.
    r_cut
        Of the cosine cutoff, Angstrom; 0 for none.
    """

    def __init__(
        self, environments: Environments, n_species: int, n_features: int, radial: RadialBasis, r_cut: float
    ) -> None:
        self._n_features, self._n_centres = n_features, len(environments.species)
        pairs = environments.centre, environments.neighbour_species, environments.species, environments.vectors
        # held for as long as their addresses are
        self._tensors = [tensor.contiguous() for tensor in (*radial.filled, radial.own, *pairs)]
        n_terms = len(radial.table) if radial.table.ndim == 3 else 0
        sizes = n_species, radial.l_max, radial.n_max, n_terms, len(environments.centre)
        self._soap = _Soap(*sizes, r_cut, radial.reach, *(tensor.data_ptr() for tensor in self._tensors))

    def values(self, rows: Tensor | None = None) -> Tensor:
        """Return power spectra, ``(n_rows, n_features)``.

        Parameters
        ----------
        rows
            Row r is the spectrum of the mean coefficients of the centres ``rows[r] ... rows[r + 1]``, int64, shape
            ``(n_rows + 1,)``; every centre has its own if not given.
        """
        n_rows = self._n_centres if rows is None else len(rows) - 1
        result = torch.empty(n_rows, self._n_features, dtype=torch.float64)
        room, threads = _room(_library().soap_room(self._soap), n_rows, self._soap.n_pairs // VALUE_PAIRS)
        first = None if rows is None else rows.data_ptr()
        _library().soap_values(self._soap, n_rows, first, self._n_features, room.data_ptr(), result.data_ptr(), threads)
        return result

    def slopes(self, bounds: tuple[int, int, int, int], rows: Tensor, place: Tensor, own: Tensor) -> Tensor:
        """Return the derivatives of some centres' spectra, ``(n_entries, n_features, 3)``.

        Parameters
        ----------
        bounds
            First and last centre, first and last pair; see :func:`tlmc.descriptors.base.chunks`.
        rows
            The centre of every entry, counted from the first, ascending: an entry is an atom that may act on a centre.
        place
            The entry of the atom that a pair leads to, for every pair.
        own
            The entry of every centre as an atom, which its own images move with.
        """
        first, last, begin, end = bounds
        # the pairs by entry: images of one atom follow each other
        ordered, images = torch.sort(place, stable=True)
        images += begin
        image_starts = torch.searchsorted(ordered, torch.arange(len(rows) + 1))
        entries = torch.searchsorted(rows, torch.arange(last - first + 1))
        result = torch.empty(len(rows), self._n_features, 3, dtype=torch.float64)
        lists = (tensor.data_ptr() for tensor in (entries, own, image_starts, images))
        room, threads = _room(_library().soap_room(self._soap), last - first, (end - begin) // SLOPE_PAIRS)
        _library().soap_slopes(
            self._soap, first, last - first, *lists, self._n_features, room.data_ptr(), result.data_ptr(), threads
        )
        return result


def symmetry_values(
    environments: Environments,
    n_species: int,
    n_features: int,
    r_cut: float,
    radial: Tensor,
    angular: Tensor,
    n_near: int,
) -> Tensor:
    """Return symmetry functions, ``(n_centres, n_features)``.

    Parameters
    ----------
    environments
        For which :func:`can_serve` is true.
    n_species, n_features
        Number of elements with channels, and length of a row.
    r_cut
        Cutoff in Angstrom.
    radial, angular
        ``(eta, r_s)`` of every G2, ``(n, 2)``, and ``(eta, zeta, lambda_)`` of every G4, then of every G5, ``(n, 3)``.
    n_near
        How many of `angular` are G4.
    """
    n_centres, n_pairs = len(environments.species), len(environments.centre)
    pairs = environments.centre, environments.neighbour_species, environments.vectors
    tensors = [radial, angular, *(tensor.contiguous() for tensor in pairs)]
    sizes = n_species, len(radial), n_near, len(angular), n_pairs
    symmetry = _Symmetry(*sizes, r_cut, *(tensor.data_ptr() for tensor in tensors))
    room, threads = _room(_library().symmetry_room(symmetry), n_centres, n_pairs**2 // (2 * n_centres * TRIPLES))
    result = torch.empty(n_centres, n_features, dtype=torch.float64)
    _library().symmetry_values(symmetry, n_centres, n_features, room.data_ptr(), result.data_ptr(), threads)
    return result


def _room(per_thread: int, n_rows: int, useful: int) -> tuple[Tensor, int]:
    """Return room for the threads, float64, and their number."""
    threads = _threads(n_rows, useful)
    return torch.empty(threads * per_thread, dtype=torch.float64), threads


def _threads(n_rows: int, useful: int) -> int:
    return max(1, min(torch.get_num_threads(), n_rows, useful))


def _library() -> ctypes.CDLL:
    found = library()
    if found is None:
        raise RuntimeError("the compiled functions are missing: ask can_serve first")
    return found
