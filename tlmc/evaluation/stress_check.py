"""Stresses checked by physics: in which unit, sign and order they change from frame to frame as a model says."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Final, NamedTuple

import numpy as np
from ase import units
from numpy.typing import NDArray

from tlmc.data.dataset import Dataset
from tlmc.data.geometry import by_composition
from tlmc.units import BOHR, HARTREE

Floats = NDArray[np.float64]

# name -> eV/A^3; virials, which grow with the cell, and orders of the six components, as places in ASE's.
_VIRIAL, _ASE_ORDER = "eV (virials)", "xx yy zz yz xz xy"
_UNITS: Final[Mapping[str, float]] = MappingProxyType(
    {
        "eV/A^3": 1.0,
        "GPa": units.GPa,
        "kbar": 0.1 * units.GPa,
        "bar": 1e-4 * units.GPa,
        "Hartree/Bohr^3": HARTREE / BOHR**3,
        "Rydberg/Bohr^3": units.Rydberg / BOHR**3,
    }
)
_ORDERS: Final[Mapping[str, list[int]]] = MappingProxyType(
    {
        _ASE_ORDER: [0, 1, 2, 3, 4, 5],
        "xx yy zz xy yz zx": [0, 1, 2, 4, 5, 3],
        "xx yy zz xy xz yz": [0, 1, 2, 5, 4, 3],
        "xx xy xz yy yz zz": [0, 3, 5, 4, 2, 1],
    }
)
# Crystals of one composition, and how many in all, that decide.
_PER_COMPOSITION, _CRYSTALS, _FEW = 3, 4, 8
# eV/A^3 (rms): changes of the stress below this are the start model's error, mostly; whole sets have 0.009 or more.
_CALM = 0.004
# Correlations that right stresses have, that another form must have, and by which the best form must be better than the
# one at hand; the three shears, which tell most orders apart, by more.
_AGREES, _EXPLAINS, _MARGIN, _SHEAR_MARGIN = 0.5, 0.72, 0.08, 0.3
# Size relative to the model's: what is usual, and factors from it within which a unit is possible, and a good guess;
# eV/A^3 is far from all other units, and a few crystals may miss the model's size by more.
_USUAL_SIZE, _POSSIBLE, _LIKELY, _POSSIBLE_AS_READ = 0.9, 2.4, 1.6, 5.0


class StressReport(NamedTuple):
    """In which form stresses are."""

    finding: str
    """A sentence about what is wrong or undecided, empty if nothing is."""
    is_wrong: bool
    """Whether they are clearly in another form than eV/Angstrom^3 in ASE's sign and order."""
    stresses: tuple[Floats | None, ...]
    """Of all frames, in ASE's form if another was recognized, else as read."""


def check_stresses(
    dataset: Dataset, indices: NDArray[np.int64], predicted: Sequence[Floats | None], model: str, declared: float = 1.0
) -> StressReport:
    """Tell in which unit, sign and order the stresses fit those that a model predicts for some frames.

    A start model is off by some GPa for every crystal, but how the stress changes from frame to frame it knows well
    (correlation 0.75 to 0.99), in size too (0.7 to 1.1). So stresses are compared relative to the mean of their
    composition.

    Parameters
    ----------
    dataset
        All frames, of which any may lack stresses.
    indices, predicted
        Frames to compare, and their predicted stresses, eV/Angstrom^3 in ASE's form.
    model
        Name of the model.
    declared
        eV/Angstrom^3 of the unit that the stresses were read in.
    """
    if all(stress is None for stress in dataset.stresses):
        return StressReport("", False, dataset.stresses)
    compared = _compared(dataset, indices, predicted)
    count = sum(len(group.labels) for group in compared)
    fits = {form: _fit(compared, form, declared) for form in _FORMS} if count >= _CRYSTALS else {}
    best = max((fit.correlation for fit in fits.values()), default=0.0)
    own = _fit(compared, _AS_GIVEN, 1.0)
    who = f"{dataset.source}: the stresses of {count} crystals"
    near = [form for form, fit in fits.items() if fit.correlation > best - 2 * _MARGIN and fit.misfit < _POSSIBLE]
    shear = max((fits[form].shear for form in near), default=0.0)
    fits_in_size = own.correlation > max(_AGREES, best - _MARGIN) and own.misfit < _POSSIBLE_AS_READ
    # of a few crystals the shears are no proof of another order, nor is any change that is a model's error
    few = count < _FEW and own.correlation > _EXPLAINS
    changes = np.concatenate(
        [(group.predicted - group.predicted.mean(axis=0)).ravel() for group in compared] or [[0.0]]
    )
    calm = float(np.sqrt(np.square(changes).mean())) < _CALM and own.misfit < _POSSIBLE_AS_READ
    if calm or fits_in_size and (few or own.shear > shear - _SHEAR_MARGIN):
        return StressReport("", False, dataset.stresses)
    if best < _EXPLAINS:
        known = f"correlate {best:.2f} at best with those of {model}" if fits else "are too few to be compared"
        return StressReport(f"{who} {known}, their unit and sign are unchecked{_UNUSED}", False, dataset.stresses)
    near = [
        form for form in near if fits[form].shear > shear - _SHEAR_MARGIN and fits[form].correlation > best - _MARGIN
    ]
    # the form nearest to ASE's own, and of units the one that fits in size
    near.sort(key=lambda form: (form.order != _ASE_ORDER, fits[form].misfit))
    likely = near[:1] + [form for form in near[1:] if form.order == near[0].order and fits[form].misfit < _LIKELY]
    given = (
        f"not eV/A^3 in ASE's sign and order: as read they correlate {own.correlation:.2f} with those of {model} and "
        f"are {own.size:.3g} times as large"
    )
    if len(likely) != 1:
        words = f"they may be {' or '.join(form.words for form in likely)}" if likely else "their unit is unknown"
        return StressReport(f"{who} are {given}; {words}; they stay as read{_UNUSED}", True, dataset.stresses)
    form, fit = likely[0], fits[likely[0]]
    converted = tuple(
        None if stress is None else form.convert(stress, frame.cell.volume, declared)
        for stress, frame in zip(dataset.stresses, dataset.frames, strict=True)
    )
    return StressReport(
        f"{who} are {form.words}, {given}, converted {fit.correlation:.2f} and {fit.size:.2g} times; name the unit "
        f"in the file{_UNUSED}",
        True,
        converted,
    )


_UNUSED: Final = " (training does not use stresses)"


class _Form(NamedTuple):
    """A way to write stresses."""

    unit: str
    sign: int
    order: str

    @property
    def words(self) -> str:
        """Say it."""
        order = f", in the order {self.order}" if self.order != _ASE_ORDER else ""
        return f"{self.unit}, {'tension' if self.sign > 0 else 'pressure'} positive{order}"

    def convert(self, stress: Floats, volume: float, declared: float) -> Floats:
        """Return a stress of this form, ``(6,)``, read as if in units of `declared`, as ASE writes it."""
        unit = 1.0 / volume if self.unit == _VIRIAL else _UNITS[self.unit]
        converted: Floats = stress[_ORDERS[self.order]] * (self.sign * unit / declared)
        return converted


_AS_GIVEN: Final = _Form("eV/A^3", 1, _ASE_ORDER)
_FORMS: Final = tuple(_Form(unit, sign, order) for order in _ORDERS for sign in (1, -1) for unit in (*_UNITS, _VIRIAL))


class _Compared(NamedTuple):
    """Stresses of several crystals of one composition as read, as predicted, and their volumes."""

    labels: Floats
    predicted: Floats
    volumes: Floats


def _compared(dataset: Dataset, indices: NDArray[np.int64], predicted: Sequence[Floats | None]) -> list[_Compared]:
    rows = [
        (int(index), label, expected)
        for index, expected in zip(indices, predicted, strict=True)
        if (label := dataset.stresses[index]) is not None and expected is not None and dataset.is_crystal[index]
    ]
    groups = by_composition(dataset.frames[index] for index, _, _ in rows)
    return [
        _Compared(
            np.array([rows[k][1] for k in places]),
            np.array([rows[k][2] for k in places]),
            np.array([dataset.frames[rows[k][0]].cell.volume for k in places]),
        )
        for places in groups
        if len(places) >= _PER_COMPOSITION
    ]


class _Fit(NamedTuple):
    """How changes of the stress from frame to frame fit those of the model."""

    correlation: float
    shear: float
    """Correlation of the last three components."""
    size: float
    """Relative to the model's."""

    @property
    def misfit(self) -> float:
        """Factor, 1 or more, by which the size is off what is usual."""
        off = self.size / _USUAL_SIZE
        return max(off, 1 / off) if off else math.inf


def _fit(compared: Sequence[_Compared], form: _Form, declared: float) -> _Fit:
    labels, predicted = [np.empty((0, 6))], [np.empty((0, 6))]
    for group in compared:
        rows = zip(group.labels, group.volumes, strict=True)
        given = np.array([form.convert(label, volume, declared) for label, volume in rows])
        labels.append(given - given.mean(axis=0))
        predicted.append(group.predicted - group.predicted.mean(axis=0))
    a, b = np.concatenate(labels), np.concatenate(predicted)
    size = float(np.linalg.norm(b))
    return _Fit(_cosine(a, b), _cosine(a[:, 3:], b[:, 3:]), float(np.linalg.norm(a)) / size if size else 0.0)


def _cosine(a: Floats, b: Floats) -> float:
    size = float(np.linalg.norm(a) * np.linalg.norm(b))
    return float((a * b).sum()) / size if size else 0.0
