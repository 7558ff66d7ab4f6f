"""Errors of predicted energies and forces against labels.

The force RMSE of the thesis (section 5) is the root mean square of the per-atom error *vector*; the one most papers
print is that of its components, smaller by the square root of three. Both are computed, and neither is called plainly
"force RMSE".
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from tlmc.equality import equal_by_content
from tlmc.errors import ConfigError, DataError

if TYPE_CHECKING:
    from tlmc.data.dataset import Dataset
    from tlmc.potentials.model import Predictions

Array = NDArray[np.float64]

FORCE_BOUND: Final = 2.0
"""RMS force of a frame, eV/Angstrom, between thermal frames (0.4 to 1.5) and compressed or strongly distorted ones
(2 to 6); in the public X23 sets about a third of the frames lie above it."""

_CONSTANT: Final = 1e-12
"""Relative spread below which values are constant to rounding, and a correlation with them means nothing."""


class Metric(NamedTuple):
    """One number and its unit (``"1"`` for a pure number)."""

    value: float
    unit: str


def as_json(metrics: Mapping[str, Metric]) -> dict[str, dict[str, Any]]:
    """Return metrics as plain JSON types, ``{quantity: {"value": ..., "unit": ...}}``."""
    return {quantity: metric._asdict() for quantity, metric in metrics.items()}


@equal_by_content
class Errors(NamedTuple):
    """Errors of a set of frames, predicted minus label, the atoms of all frames in one array."""

    energy: Array
    """Per atom, eV/atom, shape ``(n_frames,)``."""
    force: Array
    """eV/Angstrom, shape ``(n_atoms_total, 3)``."""
    frame: NDArray[np.int64]
    """Position in the data set of the frame each atom belongs to, shape ``(n_atoms_total,)``."""


def errors(dataset: Dataset, predictions: Predictions) -> Errors:
    """Subtract the labels from the predictions.

    Parameters
    ----------
    dataset
        Labels: energies in eV, forces in eV/Angstrom.
    predictions
        Energies in eV, shape ``(n_frames,)``, and one force array ``(n_atoms, 3)`` in eV/Angstrom per frame.

    Raises
    ------
    DataError
        If there is no frame, or the predictions have another shape than the labels or are not finite.
    """
    name = dataset.name
    n_frames = len(dataset)
    if n_frames == 0:
        raise DataError(f"{name}: no frames to evaluate")
    energies = np.asarray(predictions.energies, dtype=np.float64)
    if energies.shape != (n_frames,) or len(predictions.forces) != n_frames:
        raise DataError(
            f"{name}: {n_frames} labelled frames, but predicted energies of shape {energies.shape} "
            f"and forces for {len(predictions.forces)} frames"
        )
    force = []
    for i, (label, predicted) in enumerate(zip(dataset.forces, predictions.forces, strict=True)):
        number = dataset.frame_numbers[i]
        predicted = np.asarray(predicted, dtype=np.float64)
        if predicted.shape != label.shape:
            raise DataError(f"{name}, frame {number}: predicted forces have shape {predicted.shape}, not {label.shape}")
        if not (np.isfinite(energies[i]) and np.isfinite(predicted).all()):
            worst = predicted[~np.isfinite(predicted)]
            raise DataError(
                f"{name}, frame {number}: predicted energy {energies[i]} eV, {worst.size} force components not finite"
            )
        force.append(predicted - label)
    n_atoms = np.asarray(dataset.n_atoms)
    return Errors(
        energy=(energies - dataset.energies) / n_atoms,
        force=np.concatenate(force),
        frame=np.repeat(np.arange(n_frames), n_atoms),
    )


def evaluate(dataset: Dataset, predictions: Predictions, force_bound: float = FORCE_BOUND) -> dict[str, Metric]:
    """Compare predictions with labels.

    Parameters
    ----------
    dataset
        Labels: energies in eV, forces in eV/Angstrom.
    predictions
        Of the same frames, in the same order and units.
    force_bound
        eV/Angstrom; the force errors of frames with an RMS force (:func:`per_frame`) below it, and of the others, are
        given apart, since a few compressed cells dominate the RMSE of the whole set.

    Returns
    -------
    dict
        Quantity to value and unit. Always there:

        - ``energy_rmse_per_atom``, ``energy_mae_per_atom``, ``energy_max_error_per_atom``: of E/N, eV/atom;
        - ``energy_rmse_per_atom_centred``: after the mean error per atom is taken away, what no constant can mend;
        - ``force_rmse_vector``: root of the mean over atoms of the squared length of the error, eV/Angstrom;
        - ``force_rmse_component`` (smaller by the square root of 3), ``force_mae_component``;
        - ``force_max_error``: the longest error vector of an atom;
        - ``force_rmse_vector_<element>``: over the atoms of one element.

        Where it is defined:

        - ``force_rmse_vector_below_<bound>``, ``..._above_<bound>``: left out if no frame lies on that side;
        - ``energy_correlation`` (of E/N), ``force_correlation`` (of the lengths of forces) and
          ``force_component_correlation``: Pearson coefficients, left out if the labels or the predictions are constant.

    Raises
    ------
    ConfigError
        If the bound is not a positive number.
    DataError
        As :func:`errors`.
    """
    if not 0 < force_bound < np.inf:
        raise ConfigError(f"force_bound must be a positive number in eV/Angstrom, got {force_bound}")
    error = errors(dataset, predictions)
    squared = (error.force**2).sum(axis=1)
    values = {
        "energy_rmse_per_atom": _rms(error.energy),
        "energy_mae_per_atom": float(np.abs(error.energy).mean()),
        "energy_max_error_per_atom": float(np.abs(error.energy).max()),
        "energy_rmse_per_atom_centred": _rms(error.energy - error.energy.mean()),
        "force_rmse_vector": _rms_vector(squared),
        "force_rmse_component": _rms(error.force),
        "force_mae_component": float(np.abs(error.force).mean()),
        "force_max_error": float(np.sqrt(squared.max())),
    }
    symbols = np.concatenate([frame.get_chemical_symbols() for frame in dataset.frames])
    for element in sorted(set(symbols.tolist())):
        values[f"force_rmse_vector_{element}"] = _rms_vector(squared[symbols == element])

    below = (frame_force_rms(dataset) < force_bound)[error.frame]
    for side, chosen in (("below", below), ("above", ~below)):
        if chosen.any():
            values[f"force_rmse_vector_{side}_{force_bound:g}"] = _rms_vector(squared[chosen])

    labels, predicted = np.concatenate(dataset.forces), np.concatenate(predictions.forces)
    n_atoms = np.asarray(dataset.n_atoms)
    correlations = {
        "energy_correlation": correlation(dataset.energies / n_atoms, np.asarray(predictions.energies) / n_atoms),
        "force_correlation": correlation(np.linalg.norm(labels, axis=1), np.linalg.norm(predicted, axis=1)),
        "force_component_correlation": correlation(labels.ravel(), predicted.ravel()),
    }
    values |= {quantity: value for quantity, value in correlations.items() if value is not None}
    return {quantity: Metric(value, _unit(quantity)) for quantity, value in values.items()}


def by_kind(
    dataset: Dataset, predictions: Predictions, force_bound: float = FORCE_BOUND
) -> dict[str, dict[str, Metric]]:
    """Compare predictions with labels for crystals and isolated molecules apart.

    Parameters
    ----------
    dataset, predictions, force_bound
        As in :func:`evaluate`.

    Returns
    -------
    dict
        What :func:`evaluate` returns under ``"crystals"`` and under ``"molecules"``; empty if all frames are of one
        kind.

    Raises
    ------
    ConfigError, DataError
        As :func:`evaluate`.
    """
    if dataset.is_crystal.all() or not dataset.is_crystal.any():
        return {}
    kinds = {"crystals": dataset.is_crystal, "molecules": ~dataset.is_crystal}
    return {
        kind: evaluate(dataset.subset(chosen), _chosen(predictions, np.flatnonzero(chosen)), force_bound)
        for kind, chosen in kinds.items()
    }


def _chosen(predictions: Predictions, frames: NDArray[np.int64]) -> Predictions:
    """Return the predictions of some frames."""
    stresses = tuple(predictions.stresses[k] for k in frames) if predictions.stresses else ()
    energies = np.asarray(predictions.energies)[frames]
    return predictions._replace(
        energies=energies, forces=tuple(predictions.forces[k] for k in frames), stresses=stresses
    )


def per_frame(dataset: Dataset, predictions: Predictions) -> pd.DataFrame:
    """Return the errors of each frame.

    Parameters
    ----------
    dataset
        Labels: energies in eV, forces in eV/Angstrom.
    predictions
        Of the same frames, in the same order and units.

    Returns
    -------
    DataFrame
        A row per frame: ``frame`` (its number in the source file), ``n_atoms``, ``energy_error_per_atom`` (predicted
        minus label, eV/atom), and in eV/Angstrom ``force_rmse_vector``, ``force_rms`` (of the labels) and
        ``force_max_error``.

    Raises
    ------
    DataError
        As :func:`errors`.
    """
    error = errors(dataset, predictions)
    length = np.linalg.norm(error.force, axis=1)
    groups = [length[error.frame == i] for i in range(len(dataset))]
    return pd.DataFrame(
        {
            "frame": np.asarray(dataset.frame_numbers),
            "n_atoms": np.asarray(dataset.n_atoms),
            "energy_error_per_atom": error.energy,
            "force_rmse_vector": [_rms(group) for group in groups],
            "force_rms": frame_force_rms(dataset),
            "force_max_error": [float(group.max()) for group in groups],
        }
    )


def by_force_range(
    dataset: Dataset, predictions: Predictions, edges: Sequence[float] = (0.0, 1.0, 2.0, 3.0, np.inf)
) -> pd.DataFrame:
    """Return the errors of frames grouped by the RMS of their labelled forces.

    Parameters
    ----------
    dataset
        Labels: energies in eV, forces in eV/Angstrom.
    predictions
        Of the same frames, in the same order and units.
    edges
        Increasing bounds in eV/Angstrom; a range holds its lower bound and not its upper one.

    Returns
    -------
    DataFrame
        A row per range that holds frames: ``lower``, ``upper``, ``n_frames``, ``n_atoms``, ``energy_rmse_per_atom``
        (eV/atom), ``force_rmse_vector``, ``force_rmse_component`` (eV/Angstrom).

    Raises
    ------
    ConfigError
        If the edges do not increase or leave out a frame.
    DataError
        As :func:`errors`.
    """
    bounds = np.asarray(edges, dtype=np.float64)
    if bounds.size < 2 or not (np.diff(bounds) > 0).all():
        raise ConfigError(f"edges must be at least two increasing numbers in eV/Angstrom, got {list(edges)}")
    error = errors(dataset, predictions)
    force_rms = frame_force_rms(dataset)
    bins = np.searchsorted(bounds, force_rms, side="right") - 1
    outside = (bins < 0) | (bins >= bounds.size - 1)
    if outside.any():
        first = int(np.flatnonzero(outside)[0])
        raise ConfigError(
            f"edges {list(edges)} leave out frame {dataset.frame_numbers[first]} of {dataset.name}, "
            f"whose RMS force is {force_rms[first]:.4g} eV/Angstrom"
        )
    rows = []
    for i in np.unique(bins):
        force = error.force[(bins == i)[error.frame]]
        rows.append(
            {
                "lower": bounds[i],
                "upper": bounds[i + 1],
                "n_frames": int((bins == i).sum()),
                "n_atoms": len(force),
                "energy_rmse_per_atom": _rms(error.energy[bins == i]),
                "force_rmse_vector": _rms_vector((force**2).sum(axis=1)),
                "force_rmse_component": _rms(force),
            }
        )
    return pd.DataFrame(rows)


def frame_force_rms(dataset: Dataset) -> Array:
    """Return each frame's root mean square length of the labelled forces, eV/Angstrom, shape ``(n_frames,)``."""
    return np.array([_rms_vector((force**2).sum(axis=1)) for force in dataset.forces])


def correlation(labels: Array, predictions: Array) -> float | None:
    """Return Pearson's correlation coefficient, or None where it is undefined.

    Parameters
    ----------
    labels, predictions
        Same shape ``(n,)``.

    Returns
    -------
    float or None
        In [-1, 1]; None if either side is constant to rounding, a single value included.
    """
    for values in (labels, predictions):
        if np.ptp(values) <= _CONSTANT * np.abs(values).max():
            return None
    x, y = labels - labels.mean(), predictions - predictions.mean()
    # scaled first, so that squares of tiny or huge values neither vanish nor overflow
    x, y = x / np.abs(x).max(), y / np.abs(y).max()
    return float(np.clip((x @ y) / np.sqrt((x @ x) * (y @ y)), -1.0, 1.0))


def _rms(values: Array) -> float:
    return float(np.sqrt((values**2).mean()))


def _rms_vector(squared_lengths: Array) -> float:
    return float(np.sqrt(squared_lengths.mean()))


def _unit(quantity: str) -> str:
    if quantity.endswith("correlation"):
        return "1"
    return "eV/atom" if quantity.startswith("energy") else "eV/A"
