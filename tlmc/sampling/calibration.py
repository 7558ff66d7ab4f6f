r"""From the spread of a committee to error bars that hold: scaling, conformal intervals, and how to look at them.

Everything is fitted on a validation part and may be judged on other frames only. Two ways:

- **Scaling**: errors are assumed normal with standard deviation :math:`s \sigma`; the likelihood of the validation
  errors e is largest at :math:`s^2 = \langle e^2 / \sigma^2 \rangle`.
- **Conformal** intervals assume nothing about the distribution: with the scores :math:`|e_k| / \sigma_k` of n
  validation values, the interval :math:`\pm q \sigma`, q their :math:`\lceil (n + 1)(1 - \alpha) \rceil`-th smallest,
  covers a new value with probability at least :math:`1 - \alpha` (Vovk et al. 2005; Lei et al., JASA 113, 1094, 2018),
  provided new and validation values are exchangeable: drawn in the same way, in any order. Force components of one
  frame are not independent of each other, so what counts for them is the number of frames.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import erf, erfinv

from tlmc.equality import equal_by_content
from tlmc.errors import ConfigError, DataError

FloatArray = NDArray[np.float64]


@equal_by_content
class Calibration(NamedTuple):
    """What turns spreads into standard deviations and intervals."""

    scale: float
    """s: the standard deviation of an error is ``scale * spread``."""
    scores: FloatArray
    """``|error| / spread`` of the validation values, ascending, shape ``(n,)``."""

    def standard_deviations(self, spreads: ArrayLike) -> FloatArray:
        """Return ``scale * spread``, in the unit of the spreads."""
        return self.scale * np.asarray(spreads, dtype=np.float64)

    def quantile(self, coverage: float) -> float:
        """Return q, the factor of conformal intervals.

        Raises
        ------
        ConfigError
            If the coverage is not between 0 and 1.
        DataError
            If there are too few validation values for it: the largest of n promises no more than ``n / (n + 1)``.
        """
        _check_level(coverage)
        rank = math.ceil((len(self.scores) + 1) * coverage - 1e-9)
        if rank > len(self.scores):
            raise DataError(
                f"{len(self.scores)} validation values cannot promise a coverage of {coverage:g}; it needs "
                f"{math.ceil(coverage / (1 - coverage) - 1e-9)}"
            )
        return float(self.scores[max(rank, 1) - 1])

    def intervals(self, spreads: ArrayLike, coverage: float = 0.9) -> FloatArray:
        """Return half widths of conformal intervals about the prediction, in the unit of the spreads."""
        return self.quantile(coverage) * np.asarray(spreads, dtype=np.float64)


def calibrate(errors: ArrayLike, spreads: ArrayLike) -> Calibration:
    """Fit a calibration on validation values.

    Parameters
    ----------
    errors
        Predicted minus label, any shape with ``n`` numbers (energies per atom, or force components).
    spreads
        Spread of the committee for each, same shape and unit, positive.

    Raises
    ------
    DataError
        If the shapes differ, there is no value, or a spread is not positive.
    """
    e, sigma = _pairs(errors, spreads)
    scores = np.sort(np.abs(e) / sigma)
    return Calibration(float(np.sqrt((scores**2).mean())), scores)


def coverage(errors: ArrayLike, half_widths: ArrayLike) -> float:
    """Return the share of errors that lie within their intervals.

    Parameters
    ----------
    errors, half_widths
        Same shape and unit.

    Raises
    ------
    DataError
        If the shapes differ, there is no value, or a half width is not positive.
    """
    e, width = _pairs(errors, half_widths)
    return float((np.abs(e) <= width).mean())


@equal_by_content
class Reliability(NamedTuple):
    """Nominal and observed coverage of central intervals of normal distributions."""

    nominal: FloatArray
    """Shape ``(n_levels,)``."""
    observed: FloatArray
    """Share of the errors inside, same shape."""

    @property
    def miscalibration(self) -> float:
        """Area between the curve and the diagonal: 0 for perfect error bars, 1/2 for useless ones."""
        grid = np.concatenate([[0.0], self.nominal, [1.0]])
        gap = np.concatenate([[0.0], np.abs(self.observed - self.nominal), [0.0]])
        return float(np.trapezoid(gap, grid))


def reliability(errors: ArrayLike, standard_deviations: ArrayLike, n_levels: int = 19) -> Reliability:
    r"""Compare how often errors should lie within some standard deviations with how often they do.

    A share p of normal errors lies within :math:`\sqrt2\, \mathrm{erf}^{-1}(p)` of them.

    Parameters
    ----------
    errors
        Predicted minus label, any shape.
    standard_deviations
        Of each error, same shape and unit.
    n_levels
        Levels p, evenly between 0 and 1.

    Raises
    ------
    DataError
        If the shapes differ, there is no value, or a standard deviation is not positive.
    """
    e, sigma = _pairs(errors, standard_deviations)
    nominal = np.arange(1, n_levels + 1) / (n_levels + 1)
    # the level whose interval ends at the error itself
    levels = np.sort(erf(np.abs(e) / (sigma * math.sqrt(2.0))))
    return Reliability(nominal, np.searchsorted(levels, nominal, side="right") / len(levels))


def normal_quantile(level: float) -> float:
    """Return half the width of the central interval of a normal distribution, in standard deviations.

    Raises
    ------
    ConfigError
        If the level is not between 0 and 1.
    """
    _check_level(level)
    return float(math.sqrt(2.0) * erfinv(level))


@equal_by_content
class SpreadBins(NamedTuple):
    """Errors of values with similar spreads."""

    spread: FloatArray
    """Root mean square of the spreads of each bin, shape ``(n_bins,)``."""
    error: FloatArray
    """Root mean square of the errors, same shape."""
    n_values: NDArray[np.int64]
    """Values per bin."""


def error_against_spread(errors: ArrayLike, spreads: ArrayLike, n_bins: int = 8) -> SpreadBins:
    """Sort values by their spread into bins of equal number and compare with the errors made there.

    Parameters
    ----------
    errors, spreads
        Same shape and unit.
    n_bins
        At most one per value.

    Raises
    ------
    DataError
        If the shapes differ, there are fewer values than bins, or a spread is not positive.
    """
    e, sigma = _pairs(errors, spreads)
    if not 1 <= n_bins <= len(e):
        raise DataError(f"{len(e)} values cannot fill {n_bins} bins")
    parts = np.array_split(np.argsort(sigma, kind="stable"), n_bins)
    return SpreadBins(
        np.array([np.sqrt((sigma[part] ** 2).mean()) for part in parts]),
        np.array([np.sqrt((e[part] ** 2).mean()) for part in parts]),
        np.array([len(part) for part in parts], dtype=np.int64),
    )


def _check_level(level: float) -> None:
    if not 0 < level < 1:
        raise ConfigError(f"a coverage must lie between 0 and 1, got {level}")


def _pairs(errors: ArrayLike, spreads: ArrayLike) -> tuple[FloatArray, FloatArray]:
    e, sigma = np.asarray(errors, dtype=np.float64), np.asarray(spreads, dtype=np.float64)
    if e.shape != sigma.shape or not e.size:
        raise DataError(f"errors and spreads must have one shape and hold values, got {e.shape} and {sigma.shape}")
    if not (np.isfinite(e).all() and np.isfinite(sigma).all() and (sigma > 0).all()):
        raise DataError(
            f"errors must be finite and spreads positive, got errors to {np.abs(e).max()}, spreads from {sigma.min()}"
        )
    return e.ravel(), sigma.ravel()
