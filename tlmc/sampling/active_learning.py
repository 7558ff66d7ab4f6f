r"""Active learning: let the model say which structures should be labelled (thesis 2.4).

The loop starts from about 2 % of a pool, trains, tests on the rest, adds the worst, drops what is predicted well, and
stops when fewer than 5 % are predicted badly. "Worst" is said by the true error, where the whole pool has labels
already and the point is a small training set, or by a committee, which needs no labels: then only the structures that
are chosen get one, from a calculator on demand.

The spread of a committee is smaller than its error. Structures that were just labelled tell by how much: they were
predicted before they were trained on. The spread is multiplied by the ratio found on those of the last round.

Every round is written to a file as soon as it is done, and all randomness comes from the seed and the number of the
round, so a loop that was stopped goes on to the result that it would have had anyway.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final, Literal, Protocol, cast, get_args

import numpy as np
import pandas as pd
from ase import Atoms
from ase.calculators.calculator import BaseCalculator
from ase.calculators.singlepoint import SinglePointCalculator
from numpy.random import default_rng
from numpy.typing import ArrayLike, NDArray
from scipy.stats import t as student

from tlmc.data.dataset import Dataset
from tlmc.data.geometry import frame_hash
from tlmc.data.loading import dataset_from_frames
from tlmc.equality import equal_by_content
from tlmc.errors import ConfigError, DataError, ModelError
from tlmc.evaluation.metrics import evaluate, per_frame
from tlmc.files import write_json
from tlmc.labelling.frames import content_words
from tlmc.labelling.identity import settings_of
from tlmc.labelling.labels import unconverged
from tlmc.labelling.states import given_to, stated, states_of
from tlmc.progress import watched
from tlmc.sampling.committee import CommitteePredictions

FloatArray = NDArray[np.float64]
Strategy = Literal["committee", "error", "random"]
Target = float | Mapping[int, float] | pd.Series
"""A test error to reach: the same in all seeds, or one for each."""

logger = logging.getLogger(__name__)

_RECORDED: Final = ("force_rmse_vector", "force_rmse_component", "energy_rmse_per_atom", "energy_rmse_per_atom_centred")


class Learner(Protocol):
    """A model that the loop can train again and again.

    One with a ``description``, of JSON types, does not go on with a loop that another one began.
    """

    def fit(self, dataset: Dataset, seed: int) -> Any:
        """Train on all frames from the beginning; the same arguments give the same model."""

    def predict(self, frames: Sequence[Atoms]) -> CommitteePredictions:
        """Return energies and forces of frames, according to one member or several."""


class Pool(Protocol):
    """Structures that may be labelled, and who labels them."""

    @property
    def frames(self) -> Sequence[Atoms]:
        """All structures, labelled or not."""

    def label(self, indices: Sequence[int]) -> Dataset:
        """Return these structures with labels, in this order."""


@equal_by_content
@dataclass(frozen=True)
class LabelledPool:
    """A pool whose labels are known already."""

    dataset: Dataset

    @property
    def frames(self) -> Sequence[Atoms]:
        """All structures."""
        return self.dataset.frames

    @property
    def description(self) -> str:
        """What tells its labels from others."""
        return self.dataset.hash

    def label(self, indices: Sequence[int]) -> Dataset:
        """Look the labels up."""
        return self.dataset.subset(list(indices))


class CalculatorPool:
    """A pool that an ASE calculator labels on demand, each structure once.

    Parameters
    ----------
    frames
        Structures without labels. Charge and spin that they state reach the calculator as in `tlmc.labelling.label`.
    calculator
        With energy and forces.
    folder
        Where labels are kept, so that a loop that goes on does not compute them again; by default in memory. Labels of
        another name or of a calculator with other settings stay there and are not used.
    name
        Of the level of theory.

    Raises
    ------
    DataError
        If statements of a structure on its charge or spin contradict each other.
    """

    def __init__(
        self, frames: Sequence[Atoms], calculator: BaseCalculator, folder: Path | None = None, name: str = "calculator"
    ) -> None:
        self.frames: Sequence[Atoms] = tuple(frames)
        states_of(self.frames)
        self.calculator, self.folder, self.name = calculator, folder, name
        self.calls = 0
        """Calculations done so far."""
        # a calculator may change its attributes as it works
        self._settings = settings_of(calculator)
        self._labels: dict[str, dict[str, Any]] = {}

    @property
    def description(self) -> str:
        """What tells its labels from others."""
        return self.name

    def label(self, indices: Sequence[int]) -> Dataset:
        """Compute what is not known yet.

        Raises
        ------
        DataError
            If a label is not finite or not converged, or a file in the folder holds no label of this structure.
        """
        labelled = []
        for k in indices:
            frame = self.frames[k]
            label = self._label(frame)
            copy = frame.copy()
            copy.set_constraint()
            copy.calc = SinglePointCalculator(copy, energy=label["energy"], forces=np.array(label["forces"]))
            labelled.append(copy)
        return dataset_from_frames(labelled, name="pool", source=self.name, level_of_theory=self.name)

    def _label(self, frame: Atoms) -> dict[str, Any]:
        words = json.dumps([content_words(frame), self.name, self._settings], sort_keys=True)
        key = hashlib.sha256((frame_hash(frame) + words).encode()).hexdigest()
        if key in self._labels:
            return self._labels[key]
        path = None if self.folder is None else self.folder / f"{key[:32]}.json"
        if path is not None and path.is_file():
            label = self._read(path, frame)
        else:
            copy = given_to(self.calculator, frame, f"pool, {frame.get_chemical_formula()}")
            copy.calc = self.calculator
            label = {"energy": float(copy.get_potential_energy()), "forces": copy.get_forces().tolist()}
            if unconverged(self.calculator):
                raise DataError(f"{frame.get_chemical_formula()}: {self.name} is not converged")
            self.calls += 1
            if not (np.isfinite(label["energy"]) and np.isfinite(label["forces"]).all()):
                raise DataError(f"{frame.get_chemical_formula()}: {self.name} returned a label that is not finite")
            if path is not None:
                write_json(path, label)
        self._labels[key] = label
        return label

    def _read(self, path: Path, frame: Atoms) -> dict[str, Any]:
        """Return the label of a structure that an earlier loop computed."""
        try:
            label: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            values = np.array([label["energy"], *np.reshape(label["forces"], 3 * len(frame))], dtype=np.float64)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(
                f"{path} holds no label of {frame.get_chemical_formula()} ({error}): move it away"
            ) from error
        if not np.isfinite(values).all():
            raise DataError(f"{path} holds a label that is not finite: move it away")
        return label


@dataclass(frozen=True)
class LoopConfig:
    """How structures are chosen; the defaults are the thesis' (2.4)."""

    strategy: Strategy = "committee"
    """What "worst" means: the committee's spread, the true error (every structure gets a label), or chance."""
    bound: float = 0.2
    """Force error of a frame (vector RMSE, eV/Angstrom) above which it is predicted badly."""
    start_share: float = 0.02
    """Share of the pool in the first training, drawn at random; two structures at least."""
    add_share: float = 0.05
    """Share of the pool that a round adds; one structure at least."""
    drop_below: float = 0.5
    """Structures predicted with less than this times the bound leave the pool; 0 keeps all."""
    stop_share: float = 0.05
    """The loop stops when less than this share of the pool is predicted badly; 0 goes on."""
    max_labels: int = 0
    """Structures in the largest training; 0 for no limit."""
    seed: int = 0

    def __post_init__(self) -> None:
        if self.strategy not in get_args(Strategy):
            raise ConfigError(f"strategy must be one of {', '.join(get_args(Strategy))}, got {self.strategy!r}")
        if not self.bound > 0:
            raise ConfigError(f"bound must be positive, got {self.bound} eV/Angstrom")
        for name in ("start_share", "add_share", "drop_below", "stop_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name} must lie between 0 and 1, got {getattr(self, name)}")
        if self.max_labels < 0 or self.seed < 0:
            raise ConfigError(f"max_labels and seed must not be negative, got {self.max_labels} and {self.seed}")


@equal_by_content
@dataclass(frozen=True)
class LoopResult:
    """What the loop did."""

    rounds: tuple[dict[str, Any], ...]
    """Per round: ``train`` (indices into the pool), those ``gone`` before and ``added`` and ``dropped`` after it,
    ``bad_share``, ``scale`` of the spread and ``next_scale``, errors on the ``test`` set, if there is one, and why it
    ``stopped``, if it did."""
    stopped: str
    """Why it ended: ``well predicted``, ``pool exhausted`` or ``limit``."""

    @property
    def train(self) -> list[int]:
        """Indices of the structures of the last training."""
        chosen: list[int] = self.rounds[-1]["train"]
        return chosen

    def table(self) -> pd.DataFrame:
        """Return a row per round: ``round``, ``n_labels``, ``bad_share``, ``scale`` and test errors."""
        rows = [
            {"round": k, "n_labels": len(done["train"]), "bad_share": done["bad_share"], "scale": done["scale"]}
            | done["test"]
            for k, done in enumerate(self.rounds)
        ]
        return pd.DataFrame(rows)


def run_loop(
    learner: Learner, pool: Pool, config: LoopConfig, test: Dataset | None = None, path: Path | str | None = None
) -> LoopResult:
    """Run the loop, or go on with one that was stopped.

    Parameters
    ----------
    learner
        Trained anew in every round; after the last it holds that round's model, unless all rounds were read.
    pool
        Structures to choose from.
    config
        How.
    test
        Labelled frames on which every round is judged; nothing is chosen or stopped by them.
    path
        JSON file that is replaced after each round. If it holds rounds of the same loop, they are not repeated.

    Raises
    ------
    ConfigError
        If the file holds another loop: other settings, structures, labels or test set, or another learner.
    DataError
        If the pool has fewer than three structures.
    ModelError
        If the strategy needs a committee and the learner has one member, or members that all say the same.
    """
    if len(pool.frames) < 3:
        raise DataError(f"a pool needs at least three structures, got {len(pool.frames)}")
    description = _describe(learner, pool, config, test)
    rounds = [] if path is None else _read(Path(path), description)
    while not (rounds and rounds[-1]["stopped"]):
        rounds.append(_round(learner, pool, config, test, rounds))
        if path is not None:
            write_json(path, {"loop": description, "rounds": rounds})
        done = rounds[-1]
        logger.info("round %d: %d labels, %.1f %% bad", len(rounds) - 1, len(done["train"]), 100 * done["bad_share"])
    return LoopResult(tuple(rounds), rounds[-1]["stopped"])


def _round(
    learner: Learner, pool: Pool, config: LoopConfig, test: Dataset | None, before: list[dict[str, Any]]
) -> dict[str, Any]:
    """Train, look at the rest of the pool, and say which structures come and go."""
    n = len(pool.frames)
    rng = default_rng([config.seed, len(before)])
    if before:
        train, gone = before[-1]["train"] + before[-1]["added"], before[-1]["gone"] + before[-1]["dropped"]
        scale = before[-1]["next_scale"]
    else:
        train, gone = rng.choice(n, size=max(2, round(config.start_share * n)), replace=False).tolist(), []
        scale = 1.0
    # in the order of the pool, so that one set of structures is one model, however it was chosen
    learner.fit(pool.label(sorted(train)), config.seed)
    rest = np.setdiff1d(np.arange(n), [*train, *gone])
    measure = scale * _measure(learner, pool, rest, config.strategy)
    bad_share = float((measure > config.bound).sum() / n)
    # the first spread has no scale yet: nothing is dropped or believed by it
    trusted = bool(before) or config.strategy == "error"
    stopped = _stopped(len(train), len(rest), bad_share if trusted else 1.0, config)
    added: list[int] = []
    dropped: list[int] = []
    if not stopped:
        size = min(max(1, round(config.add_share * n)), len(rest), (config.max_labels or n) - len(train))
        order = rng.permutation(len(rest)) if config.strategy == "random" else np.argsort(-measure, kind="stable")
        added = rest[order[:size]].tolist()
        if trusted and config.strategy != "random":
            dropped = np.setdiff1d(rest[measure < config.drop_below * config.bound], added).tolist()
    return {
        "train": train,
        "gone": gone,
        "added": added,
        "dropped": dropped,
        "bad_share": bad_share,
        "scale": scale,
        "next_scale": _error_over_spread(learner, pool.label(added)) if added and config.strategy != "error" else scale,
        "test": {} if test is None else _judged(learner, test),
        "stopped": stopped,
    }


def _judged(learner: Learner, test: Dataset) -> dict[str, float]:
    errors = evaluate(test, learner.predict(test.frames).mean())
    return {name: errors[name].value for name in _RECORDED if name in errors}


def _measure(learner: Learner, pool: Pool, rest: NDArray[np.int64], strategy: Strategy) -> FloatArray:
    """Return the force error, or the spread that stands for it, of structures of the pool, eV/Angstrom."""
    if not len(rest):
        return np.zeros(0)
    if strategy == "error":
        return _force_errors(learner, pool.label(rest.tolist()))
    return learner.predict([pool.frames[k] for k in rest]).frame_force_spread()


def _force_errors(learner: Learner, labelled: Dataset) -> FloatArray:
    table = per_frame(labelled, learner.predict(labelled.frames).mean())
    return table["force_rmse_vector"].to_numpy(dtype=np.float64)


def _error_over_spread(learner: Learner, labelled: Dataset) -> float:
    """Return the ratio, over structures that the learner has not been trained on yet."""
    spread = learner.predict(labelled.frames).frame_force_spread()
    if not spread.any():
        raise ModelError(
            f"all members of the committee say the same about the {len(spread)} structures that were just labelled, so "
            "that their spread measures nothing"
        )
    return float(np.sqrt((_force_errors(learner, labelled) ** 2).mean() / (spread**2).mean()))


def _stopped(n_labels: int, n_rest: int, bad_share: float, config: LoopConfig) -> str:
    if bad_share < config.stop_share:
        return "well predicted"
    if not n_rest:
        return "pool exhausted"
    return "limit" if config.max_labels and n_labels >= config.max_labels else ""


_ROUND: Final = ("train", "gone", "added", "dropped", "bad_share", "scale", "next_scale", "test", "stopped")
"""What is kept of a round (:attr:`LoopResult.rounds`)."""
_IF_KNOWN: Final = ("labelling", "learner")
"""Parts of a loop's description that not every pool or learner, and no file of an earlier version, tells."""


def _describe(learner: Learner, pool: Pool, config: LoopConfig, test: Dataset | None) -> dict[str, Any]:
    digest = hashlib.sha256("".join(frame_hash(frame) + stated(frame) for frame in pool.frames).encode()).hexdigest()
    told = {key: getattr(of, "description", None) for key, of in zip(_IF_KNOWN, (pool, learner), strict=True)}
    # as it comes back from a file
    known: dict[str, Any] = json.loads(json.dumps(told))
    return {"config": asdict(config), "pool": digest, "test": None if test is None else test.hash} | known


def _read(path: Path, description: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the rounds of an earlier run of the same loop; what only the file knows is added to the description."""
    if not path.exists():
        return []
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        theirs, rounds = dict(content["loop"]), [dict(done) for done in content["rounds"]]
        for done in rounds:
            missing = [key for key in _ROUND if key not in done]
            if missing:
                raise KeyError(f"a round lacks {', '.join(missing)}")
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path} holds no active-learning loop ({error}): choose another file") from error
    for key in _IF_KNOWN:
        ours = description[key]
        description[key] = theirs.get(key) if ours is None else ours
        theirs[key] = description[key] if theirs.get(key) is None else theirs[key]
    different = [key for key in description if theirs.get(key) != description[key]]
    if different:
        raise ConfigError(f"{path} holds another loop, with another {' and '.join(different)}: choose another file")
    return rounds


def compare_strategies(
    learner: Callable[[], Learner],
    splits: Sequence[tuple[Pool, Dataset]],
    configs: Mapping[str, LoopConfig],
    folder: Path | None = None,
) -> pd.DataFrame:
    """Run several loops on the same pools, one pool per seed.

    Parameters
    ----------
    learner
        Makes a fresh one for each loop.
    splits
        Per seed a pool and the test set that it is judged on. The seed of a loop is its place here, the same for all
        strategies, which so begin with the same structures.
    configs
        Name to settings; their seed is replaced.
    folder
        Where rounds are recorded, ``<name>-<seed>.json``.

    Returns
    -------
    DataFrame
        `LoopResult.table` of all loops with columns ``name`` and ``seed`` before it.
    """
    tables = []
    for seed, (pool, test) in enumerate(splits):
        for name, config in watched(configs.items(), f"active learning, seed {seed}", len(configs)):
            path = None if folder is None else folder / f"{name}-{seed}.json"
            result = run_loop(learner(), pool, replace(config, seed=seed), test, path)
            tables.append(result.table().assign(name=name, seed=seed))
    table = pd.concat(tables, ignore_index=True)
    return table[["name", "seed", *table.columns.drop(["name", "seed"])]]


def learn_in_order(
    learner: Learner, pool: Pool, order: Sequence[int], sizes: Sequence[int], test: Dataset, seed: int
) -> pd.DataFrame:
    """Train on growing parts of an order that was chosen without a model, such as farthest points or CUR.

    Parameters
    ----------
    learner
        Trained anew for each size.
    pool
        Structures with labels, or a calculator for them.
    order
        Indices into the pool, the first to be labelled first.
    sizes
        Numbers of structures to train on.
    test
        Labelled frames on which every training is judged.
    seed
        Of the trainings; with that of a loop, equal sets of structures give equal models.

    Returns
    -------
    DataFrame
        A row per size: ``n_labels`` and test errors, as in `LoopResult.table`.

    Raises
    ------
    ConfigError
        If a size is not between 1 and the length of the order, or the order names a structure twice.
    """
    if len(set(order)) != len(order):
        raise ConfigError("an order must name each structure once")
    if not len(sizes) or min(sizes) < 1 or max(sizes) > len(order):
        raise ConfigError(f"sizes must lie in 1 to {len(order)}, got {list(sizes)}")
    rows = []
    for size in watched(sizes, "learning in order", len(sizes)):
        learner.fit(pool.label(sorted(int(k) for k in order[:size])), seed)
        rows.append({"n_labels": int(size)} | _judged(learner, test))
    return pd.DataFrame(rows)


def final_errors(table: pd.DataFrame, quantity: str = "force_rmse_vector") -> pd.Series:
    """Return, per seed, the test error with the most labels, averaged over the strategies.

    Where loops went on until their pool was exhausted, all strategies end there with the same model. Multiples of its
    error are targets that every strategy reaches, as hard in a seed with a hard test set as in one with an easy one.

    Parameters
    ----------
    table
        From `compare_strategies`.
    quantity
        Test error.
    """
    last = table[table["n_labels"] == table.groupby("seed")["n_labels"].transform("max")]
    return last.groupby("seed")[quantity].mean()


def structures_needed(
    table: pd.DataFrame,
    target: Target,
    quantity: str = "force_rmse_vector",
    confidence: float = 0.95,
) -> pd.DataFrame:
    """Return how many labels each strategy needs until the test error stays at a target or below.

    Parameters
    ----------
    table
        From `compare_strategies`.
    target
        In the unit of the quantity: one, or one per seed (see `final_errors`).
    quantity
        Test error.
    confidence
        Of the interval for the mean over seeds (Student's t).

    Returns
    -------
    DataFrame
        A row per name: ``name``, ``mean``, ``lower``, ``upper``, ``n_seeds`` that reached the target, and ``missed``,
        those that did not; mean and interval are NaN if any seed missed, since leaving it out would flatter.

    Notes
    -----
    Between two rounds the error is interpolated linearly in the number of labels. An error that falls below the target
    and rises again has not reached it.
    """
    rows = []
    for name, runs in table.groupby("name", sort=False):
        needed = _crossings(runs, target, quantity)
        mean, lower, upper = mean_interval(needed, confidence)
        missed = int(np.isnan(needed).sum())
        rows.append((name, mean, lower, upper, len(needed) - missed, missed))
    return pd.DataFrame(rows, columns=["name", "mean", "lower", "upper", "n_seeds", "missed"])


def labels_saved(
    table: pd.DataFrame,
    target: Target,
    name: str,
    than: str,
    quantity: str = "force_rmse_vector",
) -> tuple[float, float, float]:
    """Return how many labels fewer one strategy needs than another, seed by seed: mean and 95 % interval.

    Loops of one seed share pool, test set and first structures, so their difference is less noisy than either.

    Parameters
    ----------
    table, target, quantity
        As in `structures_needed`.
    name, than
        The strategy, and the one it is compared with.
    """
    needed = [_crossings(table[table["name"] == which], target, quantity) for which in (name, than)]
    return mean_interval(np.subtract(needed[1], needed[0]))


def mean_interval(values: ArrayLike, confidence: float = 0.95) -> tuple[float, float, float]:
    """Return mean, lower and upper bound of Student's t interval for the mean; bounds are NaN for a single value."""
    x = np.asarray(values, dtype=np.float64)
    if len(x) < 2:
        return float(x.mean()), np.nan, np.nan
    half = float(student.ppf(0.5 + 0.5 * confidence, len(x) - 1) * x.std(ddof=1) / np.sqrt(len(x)))
    return float(x.mean()), float(x.mean() - half), float(x.mean() + half)


def _crossings(runs: pd.DataFrame, target: Target, quantity: str) -> list[float]:
    """Return the labels needed in each seed."""
    return [
        _crossing(run, target if isinstance(target, int | float) else float(target[cast(int, seed)]), quantity)
        for seed, run in runs.groupby("seed")
    ]


def _crossing(run: pd.DataFrame, target: float, quantity: str) -> float:
    labels, error = (run[column].to_numpy(dtype=np.float64) for column in ("n_labels", quantity))
    above = np.flatnonzero(error > target)
    if not above.size:
        return float(labels[0])
    k = int(above[-1])
    if k + 1 == len(error):
        return float("nan")
    return float(labels[k] + (labels[k + 1] - labels[k]) * (error[k] - target) / (error[k] - error[k + 1]))
