"""Energy alignment: constant offsets between two energy scales, by linear regression."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import numpy as np
from ase import Atoms
from numpy.typing import ArrayLike, NDArray

from tlmc.equality import equal_by_content
from tlmc.errors import DataError, ModelError

ReferenceMode = Literal["per_atom", "per_element"]


@equal_by_content
@dataclass(frozen=True)
class ReferenceEnergies:
    """Offsets that move one energy scale onto another, ``E_label ~ E_prediction + sum_i offset(Z_i)``."""

    offsets: dict[str, float]
    """eV added for every atom of an element, by chemical symbol."""
    mode: ReferenceMode
    """``"per_atom"`` if one constant serves all elements, ``"per_element"`` if each has its own."""

    def energies(self, frames: Sequence[Atoms]) -> NDArray[np.float64]:
        """Sum the offsets over the atoms of each frame.

        Parameters
        ----------
        frames
            ``n_frames`` structures; only their elements matter.

        Returns
        -------
        NDArray
            Shape ``(n_frames,)``, eV.

        Raises
        ------
        DataError
            If a frame holds an element that the fit has not seen.
        """
        return _counts(frames, tuple(self.offsets)) @ np.array(list(self.offsets.values()), dtype=np.float64)

    def to_json(self) -> dict[str, Any]:
        """Return the offsets (eV) and the mode as plain JSON types; `from_json` reads them back exactly."""
        return {"mode": self.mode, "offsets": dict(self.offsets)}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> ReferenceEnergies:
        """Read what `to_json` wrote.

        Raises
        ------
        ModelError
            If a field is missing, the mode unknown or an offset not a finite number.
        """
        mode, offsets = content.get("mode"), content.get("offsets")
        if mode not in ("per_atom", "per_element"):
            raise ModelError(f"reference energies: mode must be per_atom or per_element, got {mode!r}")
        if not isinstance(offsets, Mapping) or not offsets:
            raise ModelError(f"reference energies: offsets must map elements to eV, got {offsets!r}")
        for symbol, value in offsets.items():
            if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
                raise ModelError(f"reference energies: the offset of {symbol} must be a finite number, got {value!r}")
        return cls({str(symbol): float(value) for symbol, value in offsets.items()}, cast(ReferenceMode, mode))


def fit_reference(
    frames: Sequence[Atoms],
    labels: ArrayLike,
    predictions: ArrayLike,
    mode: Literal["auto", "per_atom", "per_element"] = "auto",
) -> ReferenceEnergies:
    r"""Fit the offsets that align predicted with labelled energies (thesis chapter 3; "linear regression").

    The thesis aligns energies with one constant per atom, since all its frames of a crystal have one composition. With
    ``r_k = (label_k - prediction_k) / N_k`` for frame k of ``N_k`` atoms, what is minimised is the squared error of the
    energy per atom, the quantity in the training loss and in the tables:

    - ``"per_atom"``: :math:`\sum_k (r_k - c)^2`, solved by the mean of ``r_k``;
    - ``"per_element"``: :math:`\sum_k (r_k - \sum_e x_{ke} c_e)^2` with ``x_ke`` the fraction of element e in frame k,
      solved by `numpy.linalg.lstsq`. Compositions that do not determine every ``c_e`` leave a family of equal fits; the
      one of smallest norm is taken, so offsets are then right for mixtures of those compositions only.

    Fit on the training part only: an offset fitted on test labels leaks them.

    Parameters
    ----------
    frames
        ``n_frames`` structures.
    labels
        Reference energies, shape ``(n_frames,)``, eV.
    predictions
        Energies of the model to be aligned, shape ``(n_frames,)``, eV.
    mode
        ``"auto"`` takes ``"per_atom"`` if all frames share one composition (as a ratio: a molecule and its crystal
        do), else ``"per_element"``.

    Returns
    -------
    ReferenceEnergies
        One offset per element present.

    Raises
    ------
    DataError
        If there are no frames, a shape differs from ``(n_frames,)`` or an energy is not finite.
    ValueError
        If the mode is unknown.
    """
    if mode not in ("auto", "per_atom", "per_element"):
        raise ValueError(f"mode must be auto, per_atom or per_element, got {mode!r}")
    if not frames:
        raise DataError("reference energies need at least one frame, got none")
    columns = {"labels": np.asarray(labels, dtype=np.float64), "predictions": np.asarray(predictions, dtype=np.float64)}
    for name, values in columns.items():
        if values.shape != (len(frames),):
            raise DataError(f"reference energies: {name} must have shape ({len(frames)},), got {values.shape}")
        if not np.isfinite(values).all():
            k = int(np.argmin(np.isfinite(values)))
            raise DataError(f"reference energies: {name} of frame {k} is {values[k]} eV")
    elements = tuple(sorted({symbol for frame in frames for symbol in frame.get_chemical_symbols()}))
    counts = _counts(frames, elements)
    n_atoms = counts.sum(axis=1)
    if not n_atoms.all():
        raise DataError(f"reference energies: frame {int(np.argmin(n_atoms))} has no atoms")
    residual = (columns["labels"] - columns["predictions"]) / n_atoms
    if mode == "auto":
        # whole-number comparison: n_k * N_0 == n_0 * N_k for every element
        one_composition = np.array_equal(counts * n_atoms[0], counts[0] * n_atoms[:, None])
        mode = "per_atom" if one_composition else "per_element"
    if mode == "per_atom":
        constant = float(residual.mean())
        return ReferenceEnergies(dict.fromkeys(elements, constant), mode)
    solution = np.linalg.lstsq(counts / n_atoms[:, None], residual, rcond=None)[0]
    return ReferenceEnergies(dict(zip(elements, solution.tolist(), strict=True)), mode)


def _counts(frames: Sequence[Atoms], elements: tuple[str, ...]) -> NDArray[np.float64]:
    """Count the atoms of each element per frame, shape ``(n_frames, n_elements)``."""
    column = {symbol: i for i, symbol in enumerate(elements)}
    counts = np.zeros((len(frames), len(elements)), dtype=np.float64)
    for k, frame in enumerate(frames):
        for symbol, number in Counter(frame.get_chemical_symbols()).items():
            if symbol not in column:
                raise DataError(
                    f"frame {k} ({frame.get_chemical_formula()}) holds {number} {symbol}, for which no reference "
                    f"energy was fitted; there are offsets for {', '.join(elements)}"
                )
            counts[k, column[symbol]] = number
    return counts
