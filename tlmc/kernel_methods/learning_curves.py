"""How the error falls with the number of training frames, and how the effort grows."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol, Self

import numpy as np
import pandas as pd
from ase import Atoms
from numpy.typing import ArrayLike, NDArray

from tlmc.data.dataset import Dataset
from tlmc.errors import ConfigError, DataError
from tlmc.evaluation.metrics import evaluate
from tlmc.potentials.model import Predictions
from tlmc.progress import watched


class Learner(Protocol):
    """What learns from labelled structures."""

    def fit(self, dataset: Dataset) -> Self:
        """Learn."""

    def predict(self, frames: Sequence[Atoms]) -> Predictions:
        """Return energies and forces."""


def learning_curve(
    learners: Mapping[str, Callable[[], Learner]],
    dataset: Dataset,
    train: NDArray[np.int64],
    judged: NDArray[np.int64],
    sizes: Sequence[int],
    seeds: Iterable[int] = (0,),
) -> pd.DataFrame:
    """Train on growing parts of the training frames and judge on others.

    For each seed the training frames are shuffled once, and a size takes the first so many: larger parts hold the
    smaller ones, and all learners see the same frames.

    Parameters
    ----------
    learners
        By name, functions that return one ready to be fitted.
    dataset
        Labelled frames.
    train
        Indices of the training part.
    judged
        Indices of the part that errors are computed on: validation to choose by, test to report.
    sizes
        Numbers of training frames.
    seeds
        Of the shuffling.

    Returns
    -------
    DataFrame
        A row per learner, size and seed: ``learner``, ``n_train``, ``seed``, ``energy_rmse_per_atom`` (eV/atom),
        ``force_rmse_vector`` (eV/Angstrom), ``fit_seconds``, ``predict_seconds`` (per frame).

    Raises
    ------
    ConfigError
        If a size is larger than the training part, or a frame is trained on and judged.
    """
    if not sizes or min(sizes) < 1 or max(sizes) > len(train):
        raise ConfigError(f"sizes must lie in 1 to {len(train)}, got {list(sizes)}")
    if np.isin(judged, train).any():
        raise ConfigError(f"frame {np.intersect1d(judged, train)[0]} is trained on and judged")
    asked = dataset.subset(judged)
    rows = []
    for seed in seeds:
        order = np.random.default_rng(seed).permutation(train)
        for n in sizes:
            part = dataset.subset(np.sort(order[:n]))
            for name, make in watched(learners.items(), f"{n} frames, seed {seed}", len(learners)):
                start = time.perf_counter()
                learner = make().fit(part)
                fitted = time.perf_counter()
                predictions = learner.predict(asked.frames)
                end = time.perf_counter()
                errors = evaluate(asked, predictions)
                rows.append(
                    {
                        "learner": name,
                        "n_train": n,
                        "seed": seed,
                        "energy_rmse_per_atom": errors["energy_rmse_per_atom"].value,
                        "force_rmse_vector": errors["force_rmse_vector"].value,
                        "fit_seconds": fitted - start,
                        "predict_seconds": (end - fitted) / len(asked),
                    }
                )
    return pd.DataFrame(rows)


def fit_seconds(
    estimators: Mapping[str, Callable[[], Any]], x: Any, y: Any, sizes: Sequence[int], repeats: int = 1
) -> pd.DataFrame:
    """Measure how long estimators take to fit the first so many points.

    Parameters
    ----------
    estimators
        By name, functions that return one with a method ``fit(x, y)``.
    x, y
        Points and labels, at least as many as the largest size.
    sizes
        Numbers of points.
    repeats
        Of which the shortest time counts: what else the machine does only adds to it.

    Returns
    -------
    DataFrame
        A row per estimator and size: ``estimator``, ``n``, ``seconds``.

    Raises
    ------
    ConfigError
        If a size exceeds the number of points.
    """
    if not sizes or max(sizes) > len(y) or min(sizes) < 1 or repeats < 1:
        raise ConfigError(f"sizes must lie in 1 to {len(y)} and repeats be positive, got {list(sizes)} and {repeats}")
    rows = []
    for name, make in estimators.items():
        for n in sizes:
            seconds = []
            for _ in range(repeats):
                start = time.perf_counter()
                make().fit(x[:n], y[:n])
                seconds.append(time.perf_counter() - start)
            rows.append({"estimator": name, "n": n, "seconds": min(seconds)})
    return pd.DataFrame(rows)


def power_law(sizes: ArrayLike, values: ArrayLike) -> float:
    """Return the exponent b of ``values ~ sizes^b``: the slope of a straight line in a log-log plot.

    Parameters
    ----------
    sizes, values
        Positive numbers, shape ``(n,)``, of at least two sizes.

    Raises
    ------
    DataError
        If fewer than two sizes differ, or a number is not positive.
    """
    x, y = np.asarray(sizes, dtype=np.float64), np.asarray(values, dtype=np.float64)
    if x.shape != y.shape or len(np.unique(x)) < 2 or not ((x > 0).all() and (y > 0).all()):
        raise DataError(f"a power law needs positive values at two sizes or more, got {x.tolist()} and {y.tolist()}")
    return float(np.polyfit(np.log(x), np.log(y), 1)[0])
