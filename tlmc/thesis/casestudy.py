"""The case study of the thesis (chapters 3 and 4) on any crystals: errors, rankings, sizes, one model for several.

A folder of trajectories, ``27.traj``, ``28.traj``, ..., is laid out as the thesis' own data were; names of public and
embedded sets do as well. All trainings leave their folder under ``reports/runs``, where a second call finds them.
"""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure, SubFigure
from numpy.typing import NDArray

from tlmc import plots
from tlmc.data.analysis import packings
from tlmc.data.dataset import Dataset, dataset_facts
from tlmc.data.loading import load_dataset
from tlmc.data.splits import Split, shrunk, split_dataset, warn_of_left_out
from tlmc.equality import equal_by_content
from tlmc.errors import ConfigError, DataError
from tlmc.evaluation.comparison import REFITTED, START, refit_offset
from tlmc.evaluation.label_check import check_labels
from tlmc.evaluation.metrics import Metric, evaluate
from tlmc.evaluation.ranking import packing_energies, ranking_table
from tlmc.experiments.experiment import Experiment, run_experiment
from tlmc.experiments.records import append_records, identity, rows_from_metrics
from tlmc.files import write_json, write_text
from tlmc.labelling.molecules import formula_unit
from tlmc.paths import reports_dir
from tlmc.potentials.borrowing import THESIS_DONORS, Borrowing
from tlmc.potentials.calculator import predict
from tlmc.potentials.model import Potential, Predictions
from tlmc.provenance import git_revision, package_versions
from tlmc.training.config import FinetuneConfig, recipe
from tlmc.training.fine_tuning import FinetuneResult, finetune
from tlmc.training.identity import run_name, start_hash

_LOG = logging.getLogger(__name__)

TUNED: Final = "fine-tuned"
"""What tables call a start model after its fine-tuning."""

THESIS_TABLE: Final[Mapping[str, Mapping[str, tuple[float, float]]]] = MappingProxyType(
    {
        "27": {START: (0.24389, 1.16029), TUNED: (0.00316, 0.06887)},
        "28": {START: (0.20383, 0.92840), TUNED: (0.00120, 0.06153)},
        "31": {START: (0.24265, 0.70421), TUNED: (0.00130, 0.08117)},
        "32": {START: (0.25930, 0.42062), TUNED: (0.00159, 0.06730)},
        "33": {START: (0.39590, 0.84202), TUNED: (0.00149, 0.09242)},
    }
)
"""Table 4.6 of the thesis: RMSE of the energy (eV/atom) and of the force vector (eV/Angstrom) of ANI-2x, as published
and fine-tuned, for five crystals of the 7th CCDC blind test (periodic DFT, r2SCAN; its 20 % test part also steered the
learning rate)."""

LITERATURE: Final[Mapping[str, float]] = MappingProxyType({"ANI-1": 0.0034, "TensorMol-0.1": 0.0023})
"""Energy RMSE of general potentials on their own test sets, eV/atom, as the thesis quotes them."""

USABLE: Final[Mapping[str, float]] = MappingProxyType({"force_rmse_vector": 0.05, "energy_per_molecule": 0.01})
"""The thesis' marks of a usable potential, eV/Angstrom and eV per molecule."""

LEADING: Final = "32"
"""The crystal that the thesis chooses its settings on (tables 4.2 to 4.5)."""

_SUFFIXES: Final = (".traj", ".extxyz", ".xyz", ".db", ".xml")
_PACKED: Final = (".gz", ".bz2", ".xz")


class Case(NamedTuple):
    """One training of the case study."""

    crystal: str
    borrowing: str
    """Way of borrowing elements, ``""`` where the start model lacks none."""
    seed: int


def sources(text: str | Path) -> list[str]:
    """Return the sets that a text names: the trajectories of a folder, or names and files parted by commas.

    Raises
    ------
    DataError
        If a folder holds no trajectory (`crystal_files`).
    """
    if str(text).strip() and Path(text).expanduser().is_dir():
        return [str(path) for path in crystal_files(text)]
    return [name.strip() for name in str(text).split(",") if name.strip()]


def crystal_files(folder: str | Path) -> list[Path]:
    """Return the trajectories in a folder, 9 before 27; other files, and folders, are left alone.

    Parameters
    ----------
    folder
        Holds a file per crystal, named after it: traj, extxyz, xyz, db or xml (vasprun), compressed or not.

    Raises
    ------
    DataError
        If there is none, or two are called the same.
    """
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise DataError(f"{folder}: is no folder")
    visible = [path for path in folder.iterdir() if path.is_file() and not path.name.startswith(".")]
    found: dict[str, Path] = {}
    for path in sorted(visible, key=lambda path: _natural(path.name)):
        plain = path.with_suffix("") if path.suffix in _PACKED else path
        if plain.suffix not in _SUFFIXES:
            _LOG.info("%s: not read, only files ending in %s are", path, ", ".join(_SUFFIXES))
            continue
        if plain.stem in found:
            raise DataError(f"{folder}: {found[plain.stem].name} and {path.name} name the same crystal, keep one")
        found[plain.stem] = path
    if not found:
        there = ", ".join(sorted(path.name for path in visible)[:5]) or "nothing"
        raise DataError(f"{folder}: holds no trajectory ({', '.join(_SUFFIXES)}), but {there}")
    return list(found.values())


def load_crystals(
    names: Sequence[str], *, max_frames: int = 0, load: Callable[[str], Dataset] = load_dataset
) -> tuple[Dataset, ...]:
    """Read the crystals of several sets; isolated molecules are left out.

    Parameters
    ----------
    names
        Names or files, as `tlmc.data.loading.load_dataset` takes them.
    max_frames
        Keep so many frames of each, evenly spaced, for a quick trial; 0 for all.
    load
        What reads a set.

    Raises
    ------
    DataError
        If a set cannot be used or holds no crystal, or two have the same name.
    """
    found: dict[str, Dataset] = {}
    left_out: dict[str, int] = {}
    for name in names:
        dataset = load(name)
        crystals = dataset.crystals()
        if not len(crystals):
            raise DataError(f"{dataset.source}: none of {len(dataset)} frames is a crystal")
        if max_frames and len(crystals) > max_frames:
            crystals = crystals.subset(np.linspace(0, len(crystals) - 1, max_frames).round().astype(int))
        if short_name(dataset) in found:
            raise DataError(f"{dataset.source} and {found[short_name(dataset)].source} have the same name, rename one")
        found[short_name(dataset)] = crystals
        left_out |= {short_name(dataset): n} if (n := int((~dataset.is_crystal).sum())) else {}
    if left_out:
        warn_of_left_out(left_out)
    return tuple(found.values())


def short_name(dataset: Dataset) -> str:
    """Return the name without the collection that it belongs to, ``21_urea``."""
    return dataset.name.rpartition("/")[2]


def leading(names: Sequence[str]) -> str:
    """Return the set to choose settings on: the thesis' crystal 32 if it is there, else the first."""
    return next((name for name in names if _thesis_number(Path(name).name) == LEADING), names[0])


def borrowed_elements(model: Potential, dataset: Dataset, donors: Mapping[str, str] = THESIS_DONORS) -> dict[str, str]:
    """Return the elements of a set that a model lacks, as far as they have a donor, each with its donor."""
    return {new: donor for new, donor in donors.items() if new in dataset.elements and new not in model.elements}


@equal_by_content
@dataclass(frozen=True)
class CaseStudy:
    """Crystals, a start model and how to train; everything is checked when it is made.

    Raises
    ------
    DataError, ModelError, ConfigError
        If there is no crystal, a set is too small to split, an element has no donor, a setting is wrong, or labels
        cannot be those of their frames (:func:`tlmc.evaluation.label_check.check_labels`).
    """

    start: Potential
    """Start model, without borrowed elements."""
    crystals: tuple[Dataset, ...]
    recipe_name: str = "short"
    changes: Mapping[str, Any] = field(default_factory=dict)
    """Settings that differ from the recipe, ``{"epochs": 5}``."""
    borrowings: tuple[Borrowing, ...] = ("relabel",)
    """Ways to give the start model elements that it lacks; one model for several crystals takes the first."""
    donors: Mapping[str, str] = field(default_factory=lambda: THESIS_DONORS)
    seeds: tuple[int, ...] = (0,)
    """Of splits and trainings."""
    n_train: int = 0
    """Training frames of each crystal; 0, or more than there are, for the whole training part."""
    study: str = ""
    """File test errors under this name in ``metrics/summary.parquet``, those with packings left out under the name and
    ``, packings left out 1 of 2``; empty for no record."""
    progress: bool | None = None
    trust_labels: bool = False
    """As in :func:`tlmc.experiments.experiment.run_experiment`."""

    def __post_init__(self) -> None:
        """Check everything that can be checked before a training starts."""
        if not (self.crystals and self.seeds and self.borrowings):
            raise ConfigError("a case study needs at least one crystal, one seed and one way to borrow elements")
        self.config("", self.seeds[0])
        for dataset in self.crystals:
            self.split(dataset, self.seeds[0])
            for model in self.models(dataset).values():
                for frame in dataset.frames:
                    model.check_elements(frame)
        for dataset in self.crystals:
            for model in self.models(dataset).values():
                check_labels(dataset, model, trust=self.trust_labels)

    def config(self, suffix: str, seed: int) -> FinetuneConfig:
        """Return the settings of a training, filed under the recipe's name and what else it is."""
        label = ", ".join(filter(None, (self.recipe_name, suffix)))
        return recipe(self.recipe_name, **({"recipe": label, "seed": seed} | dict(self.changes)))

    def split(self, dataset: Dataset, seed: int) -> Split:
        """Return the parts of a crystal, the training part as large as it is to be."""
        parts = split_dataset(dataset, seed=seed)
        return shrunk(parts, self.n_train, seed) if 0 < self.n_train < len(parts.train) else parts

    def models(self, dataset: Dataset) -> dict[str, Potential]:
        """Return the start model by way of borrowing; as it is, under ``""``, where no element is lacking."""
        mapping = borrowed_elements(self.start, dataset, self.donors)
        if not mapping:
            return {"": self.start}
        return {way: self.start.with_elements(mapping, way) for way in self.borrowings}

    def each(self) -> dict[Case, Experiment]:
        """Fine-tune one model per crystal, way of borrowing and seed."""
        experiments = {}
        for dataset in self.crystals:
            mapping = borrowed_elements(self.start, dataset, self.donors)
            if mapping:
                listed = ", ".join(f"{new} from {donor}" for new, donor in mapping.items())
                _LOG.info("%s: %s lacks elements, borrowed are %s", dataset.name, self.start.name, listed)
            for way, model in self.models(dataset).items():
                for seed in self.seeds:
                    config = self.config(way, seed)
                    _LOG.info("%s on %s, seed %d", config.recipe, dataset.name, seed)
                    experiments[Case(short_name(dataset), way, seed)] = run_experiment(
                        model,
                        dataset,
                        config,
                        split=self.split(dataset, seed),
                        study=self.study,
                        progress=self.progress,
                        trust_labels=self.trust_labels,
                    )
        return experiments

    def sizes(self, sizes: Sequence[int]) -> pd.DataFrame:
        """Fine-tune with growing training parts; the smaller are contained in the larger.

        Returns
        -------
        DataFrame
            A row per training: ``learner`` (crystal and way of borrowing), ``seed``, ``n_train``, and of the test part
            ``force_rmse_vector`` (eV/Angstrom) and ``energy_rmse_per_atom`` (eV/atom).
        """
        rows = {}
        for size in sizes:
            for case, experiment in replace(self, n_train=size).each().items():
                learner = ", ".join(filter(None, case[:2]))
                n_train = len(experiment.split.train)
                metrics = experiment.stages[experiment.result.config.recipe].metrics
                rows[learner, case.seed, n_train] = _two_errors(metrics)
        table = pd.DataFrame(rows).T
        table.index.names = ["learner", "seed", "n_train"]
        return table.reset_index()

    def shared(self, left_out: Sequence[str] = ()) -> pd.DataFrame:
        """Compare a model per crystal with one for all, and with one that never saw the crystal.

        One model for all learns from the training parts of all crystals at once, an epoch visits each frame once, and
        reference energies are fitted per element. A model that has not seen a crystal gets its energy offset, one
        constant, from that crystal's training part, as the start model does; its forces get nothing.

        Parameters
        ----------
        left_out
            Crystals to be left out in turn, ``("all",)`` for each.

        Returns
        -------
        DataFrame
            A row per crystal, seed and ``model`` (``start, offset refitted``, ``one per crystal``, ``one for all``,
            ``the others only``): ``n_train``, ``force_rmse_vector`` and ``energy_rmse_per_atom`` of the test part.

        Raises
        ------
        ConfigError
            If there are fewer than two crystals, or one to be left out is not among them.
        DataError
            If the labels are of several levels of theory.
        """
        names = [short_name(dataset) for dataset in self.crystals]
        unknown = [name for name in left_out if name not in (*names, "all")]
        if len(names) < 2 or unknown:
            raise ConfigError(
                f"one model for several crystals needs two at least, and only these can be left out: "
                f"{', '.join(names)}; got {', '.join(unknown) or 'one crystal'}"
            )
        chosen = names if "all" in left_out else [name for name in names if name in left_out]
        own = replace(self, borrowings=self.borrowings[:1])
        rows: list[dict[str, Any]] = []
        for case, experiment in own.each().items():
            for name, model in ((REFITTED, REFITTED), (experiment.result.config.recipe, "one per crystal")):
                head = {"crystal": case.crystal, "seed": case.seed, "model": model}
                rows.append(
                    head | {"n_train": len(experiment.split.train)} | _two_errors(experiment.stages[name].metrics)
                )
        for seed in self.seeds:
            tuned, n_train = own._trained_on(self.crystals, "one for all", seed)
            rows += [own._judged(tuned, dataset, "one for all", n_train, seed) for dataset in self.crystals]
        # descriptors of the others are computed once for all seeds
        for name in chosen:
            others = [dataset for dataset in self.crystals if short_name(dataset) != name]
            dataset = self.crystals[names.index(name)]
            for seed in self.seeds:
                tuned, n_train = own._trained_on(others, f"without {name}", seed)
                rows.append(own._judged(tuned, dataset, "the others only", n_train, seed))
        return pd.DataFrame(rows)

    def packings_left_out(self, crystal: str, n_folds: int = 2) -> pd.DataFrame:
        """Rank the packings of a crystal with models that have not seen them.

        The packings are dealt into folds; each is predicted by a model that was fine-tuned on the others, seven frames
        in eight, while the eighth validates. A packing is represented by its frame of lowest label.

        Parameters
        ----------
        crystal
            Its short name.
        n_folds
            Trainings, at most as many as packings.

        Returns
        -------
        DataFrame
            As :func:`tlmc.evaluation.packing_energies` returns, with columns for the start and the fine-tuned model.

        Raises
        ------
        DataError
            If the file does not say which packing each frame belongs to, or they are fewer than the folds.
        """
        dataset = next(dataset for dataset in self.crystals if short_name(dataset) == crystal)
        groups, seed = packings(dataset), self.seeds[0]
        distinct = sorted(set(groups))
        if "" in distinct or not 2 <= n_folds <= len(distinct):
            found = "a frame without one" if "" in distinct else f"{len(distinct)} packings"
            raise DataError(f"{dataset.source}: leaving packings out in {n_folds} folds needs their names, got {found}")
        fold_of = dict(zip(np.random.default_rng(seed).permutation(distinct), range(len(distinct)), strict=True))
        fold = np.array([fold_of[group] % n_folds for group in groups])
        [(way, model)] = replace(self, borrowings=self.borrowings[:1]).models(dataset).items()
        tuned = _Collected(len(dataset))
        for k in range(n_folds):
            parts = _folded(fold == k, seed)
            fold_name = f"packings left out {k + 1} of {n_folds}"
            config = self.config(", ".join(filter(None, (way, fold_name))), seed)
            # its test part is another one, and so is its study: the two are not to be compared
            study = self.study and f"{self.study}, {fold_name}"
            experiment = run_experiment(
                model, dataset, config, split=parts, study=study, progress=self.progress,
                trust_labels=self.trust_labels,
            )  # fmt: skip
            tuned.add(parts.test, experiment.stages[config.recipe].predictions)
        answers = {START: predict(model, dataset.frames), TUNED: tuned.predictions()}
        return packing_energies(dataset, answers, n_molecules(dataset), groups, "lowest")

    def _trained_on(self, crystals: Sequence[Dataset], suffix: str, seed: int) -> tuple[FinetuneResult, int]:
        """Train on the training parts of several crystals; return the result and the number of training frames."""
        model = self._joint_start()
        union, parts = join(crystals, [self.split(dataset, seed) for dataset in crystals])
        config = self.config(suffix, seed)
        folder = reports_dir() / "runs" / run_name(model, union, parts, config)
        _LOG.info("%s on %s, seed %d", config.recipe, union.name, seed)
        return finetune(model, union, parts, config, folder, progress=self.progress), len(parts.train)

    def _joint_start(self) -> Potential:
        """Return the start model with the elements of all crystals."""
        mapping: dict[str, str] = {}
        for dataset in self.crystals:
            mapping |= borrowed_elements(self.start, dataset, self.donors)
        return self.start.with_elements(mapping, self.borrowings[0])

    def _judged(self, tuned: FinetuneResult, dataset: Dataset, model: str, n_train: int, seed: int) -> dict[str, Any]:
        """Return the errors of a shared model on the test part of a crystal, and record them."""
        parts, potential = self.split(dataset, seed), tuned.potential
        if model != "one for all":
            potential = refit_offset(potential, dataset.subset(parts.train))
        test = dataset.subset(parts.test)
        metrics = evaluate(test, predict(potential, test.frames))
        if self.study:
            rows = rows_from_metrics(
                metrics,
                study=self.study,
                dataset=dataset.name,
                start_model=self.start.name,
                recipe=tuned.config.recipe,
                seed=seed,
                split="test",
                n_train=n_train,
                run_key=tuned.run_key,
                identity=identity(dataset, parts, "test", start_hash(self._joint_start())),
            )
            append_records(rows)
        head = {"crystal": short_name(dataset), "seed": seed, "model": model, "n_train": n_train}
        return head | _two_errors(metrics)


def join(datasets: Sequence[Dataset], splits: Sequence[Split]) -> tuple[Dataset, Split]:
    """Put the training and validation parts of several sets into one; there is no test part.

    Returns
    -------
    tuple
        The set, named after its parts, and its split.

    Raises
    ------
    DataError
        If the labels are of several levels of theory: no model can agree with both.
    """
    levels = {dataset.level_of_theory: dataset.source for dataset in datasets}
    if len(levels) > 1:
        listed = "; ".join(f"{source}: {level or 'unknown'}" for level, source in levels.items())
        raise DataError(f"labels of several levels of theory cannot train one model ({listed})")
    kept = [
        dataset.subset(np.concatenate([parts.train, parts.validation]))
        for dataset, parts in zip(datasets, splits, strict=True)
    ]
    train, validation, first = [], [], 0
    for dataset, parts in zip(kept, splits, strict=True):
        edge = first + len(parts.train)
        train.append(np.arange(first, edge))
        validation.append(np.arange(edge, first + len(dataset)))
        first += len(dataset)
    union = Dataset(
        frames=tuple(frame for dataset in kept for frame in dataset.frames),
        energies=np.concatenate([dataset.energies for dataset in kept]),
        forces=tuple(forces for dataset in kept for forces in dataset.forces),
        stresses=tuple(stress for dataset in kept for stress in dataset.stresses),
        name=f"{len(kept)} crystals",
        source=", ".join(dataset.source for dataset in datasets),
        units=kept[0].units,
        level_of_theory=kept[0].level_of_theory,
        frame_numbers=np.arange(first),
    )
    method = f"joined from {len(kept)} splits, {splits[0].method}"
    empty = np.empty(0, dtype=np.int64)
    return union, Split(np.concatenate(train), np.concatenate(validation), empty, method, splits[0].seed)


def n_molecules(dataset: Dataset) -> NDArray[np.float64]:
    """Return the formula units in each frame of one crystal, shape ``(n_frames,)``."""
    return dataset.n_atoms / formula_unit(dataset.frames)


def ranking_of_test(experiment: Experiment) -> pd.DataFrame:
    """Return the energies of the packings of a test part, the mean over its frames, by labels, start and fine-tuned.

    Where the file names no packings, every frame is a candidate of its own, as in the thesis' sets.
    """
    answers = {
        START: experiment.stages[START].predictions,
        TUNED: experiment.stages[experiment.result.config.recipe].predictions,
    }
    test, unit = experiment.test, formula_unit(experiment.dataset.frames)
    return packing_energies(test, answers, test.n_atoms / unit, packings(test))


def error_table(experiments: Mapping[Case, Experiment]) -> pd.DataFrame:
    """Return the errors of the test parts of all crystals (thesis, table 4.6).

    Parameters
    ----------
    experiments
        As :meth:`CaseStudy.each` returns.

    Returns
    -------
    DataFrame
        A row per crystal, way of borrowing and model (``start``, ``start, offset refitted``, ``fine-tuned``). RMSE,
        mean over seeds, of the energy in ``E (meV/atom)`` and ``E (meV/molecule)``, and of the forces in ``F vector
        (eV/Å)`` and ``F component (eV/Å)``; the standard deviation over seeds of each (``... spread``, NaN for one
        seed); ``seeds``; and what the thesis printed for the crystal of that number, NaN where there is none.
    """
    rows = []
    for case, experiment in experiments.items():
        unit = formula_unit(experiment.dataset.frames)
        for name, stage in experiment.stages.items():
            energy = 1000 * stage.metrics["energy_rmse_per_atom"].value
            rows.append(
                {
                    "crystal": case.crystal,
                    "borrowing": case.borrowing,
                    "model": name if name in (START, REFITTED) else TUNED,
                    "E (meV/atom)": energy,
                    "E (meV/molecule)": energy * unit,
                    "F vector (eV/Å)": stage.metrics["force_rmse_vector"].value,
                    "F component (eV/Å)": stage.metrics["force_rmse_component"].value,
                }
            )
    groups = pd.DataFrame(rows).groupby(["crystal", "borrowing", "model"], sort=False)
    table = pd.concat([groups.mean(), groups.std().add_suffix(" spread")], axis=1)
    table["seeds"] = groups.size()
    printed = [_printed(crystal, model) for crystal, _, model in table.index]
    table[["thesis E (meV/atom)", "thesis F vector (eV/Å)"]] = np.array(printed)
    return table


def format_errors(table: pd.DataFrame) -> pd.DataFrame:
    """Return the table of :func:`error_table` as text, ``mean ± spread`` where there are several seeds."""
    digits = {"E (meV/atom)": 2, "E (meV/molecule)": 1, "F vector (eV/Å)": 4, "F component (eV/Å)": 4}
    text = pd.DataFrame(index=table.index)
    for column, n in digits.items():
        spreads = table[f"{column} spread"]
        text[column] = [
            f"{mean:,.{n}f}" + ("" if math.isnan(spread) else f" ± {spread:,.{n}f}")
            for mean, spread in zip(table[column], spreads, strict=True)
        ]
    for column, n in (("thesis E (meV/atom)", 2), ("thesis F vector (eV/Å)", 4)):
        text[column] = ["" if math.isnan(value) else f"{value:.{n}f}" for value in table[column]]
    return text


def element_table(experiments: Mapping[Case, Experiment]) -> pd.DataFrame:
    """Return the vector force RMSE of each element (eV/Angstrom), mean over seeds, of start and fine-tuned models.

    Returns
    -------
    DataFrame
        A row per crystal, way of borrowing and model, a column per element, NaN where a crystal lacks it.
    """
    rows: dict[tuple[str, str, str, int], dict[str, float]] = {}
    for case, experiment in experiments.items():
        for name in (START, experiment.result.config.recipe):
            metrics = experiment.stages[name].metrics
            key = (*case[:2], START if name == START else TUNED, case.seed)
            rows[key] = {e: metrics[f"force_rmse_vector_{e}"].value for e in experiment.test.elements}
    table = pd.DataFrame(rows).T
    table.index.names = ["crystal", "borrowing", "model", "seed"]
    return table.groupby(level=["crystal", "borrowing", "model"], sort=False).mean()


def against_literature(table: pd.DataFrame) -> pd.DataFrame:
    """Return energy errors per atom of general potentials, of the thesis and of this study, largest first.

    Parameters
    ----------
    table
        As :func:`error_table` returns.

    Returns
    -------
    DataFrame
        Indexed by ``potential``: ``E (meV/atom)``, and ``source``.
    """
    rows = {name: (1000 * value, "quoted by the thesis") for name, value in LITERATURE.items()}
    for number, errors in THESIS_TABLE.items():
        rows[f"thesis, {number}"] = 1000 * errors[TUNED][0], "thesis, table 4.6"
    for (crystal, borrowing, model), value in zip(table.index.to_list(), table["E (meV/atom)"], strict=True):
        if model == TUNED:
            rows[", ".join(filter(None, (crystal, borrowing)))] = value, "this run"
    result = pd.DataFrame(rows, index=["E (meV/atom)", "source"]).T.rename_axis("potential")
    return result.astype({"E (meV/atom)": float}).sort_values("E (meV/atom)", ascending=False)


def parity_figures(experiments: Mapping[Case, Experiment], prefix: str) -> Figure:
    """Save a parity figure per crystal, ``<prefix>_parity_<crystal>``, and return all of them side by side.

    Parameters
    ----------
    experiments
        As :meth:`CaseStudy.each` returns; the first seed is drawn, the test part only.
    prefix
        Begin of the file names.
    """
    shown: dict[str, tuple[Dataset, Predictions, Predictions]] = {}
    for case, experiment in experiments.items():
        name = ", ".join(filter(None, case[:2]))
        if name in shown:
            continue
        before = experiment.stages[START].predictions
        after = experiment.stages[experiment.result.config.recipe].predictions
        shown[name] = experiment.test, before, after
        figure = plots.parity_grid(experiment.test, before, after, titles=(f"{name}: start model", TUNED))
        plots.save_figure(figure, f"{prefix}_parity_{'_'.join(filter(None, case[:2]))}")
        plt.close(figure)
    gallery = plots.parity_gallery(shown)
    plots.save_figure(gallery, f"{prefix}_parity_gallery")
    return gallery


def write_results(
    case: CaseStudy,
    prefix: str,
    *,
    sizes: Sequence[int] = (),
    shared: bool = False,
    left_out: Sequence[str] = (),
    n_folds: int = 0,
) -> pd.DataFrame:
    """Train what is not trained yet, and write the tables and figures of the case study under ``reports``.

    Parameters
    ----------
    case
        Crystals and settings.
    prefix
        Begin of all file names: ``tables/<prefix>_*.csv``, ``figures/<prefix>_*.png`` and ``metrics/<prefix>.json``,
        which says what they were made from.
    sizes
        Numbers of training frames for learning curves, the whole part included by itself; none for no curves.
    shared, left_out
        Whether to train one model for all crystals, and the crystals to be left out in turn (:meth:`CaseStudy.shared`).
    n_folds
        Folds of :meth:`CaseStudy.packings_left_out`, for the crystals whose files name packings; 0 for none.

    Returns
    -------
    DataFrame
        The table of errors (:func:`error_table`).

    Raises
    ------
    ConfigError
        If the prefix is no file name, or ``metrics/<prefix>.json`` is of something else; nothing has been trained then.
    """
    _check_prefix(prefix)
    tables, figures = reports_dir() / "tables", dict[str, Figure | SubFigure]()
    experiments = case.each()
    errors = error_table(experiments)
    results = {"errors": errors, "elements": element_table(experiments), "literature": against_literature(errors)}
    figures["literature"] = plots.energy_errors(results["literature"]).figure
    figures["parity"] = parity_figures(experiments, prefix)
    rankings = {}
    for key, experiment in experiments.items():
        if key.seed == case.seeds[0]:
            rankings[", ".join(filter(None, key[:2]))] = ranking_of_test(experiment)
    for dataset in case.crystals if n_folds else ():
        if "" not in packings(dataset):
            rankings[f"{short_name(dataset)}, packings left out"] = case.packings_left_out(short_name(dataset), n_folds)
    results["ranking"] = pd.concat({name: ranking_table(table) for name, table in rankings.items()}, names=["crystal"])
    results["packings"] = pd.concat(rankings, names=["crystal"])
    for name, table in rankings.items():
        figures[f"ranking_{re.sub(r'[^A-Za-z0-9-]+', '_', name)}"] = plots.ranking(table).figure
    if sizes:
        results["sizes"] = case.sizes([*sizes, 0])
        figures["sizes"] = plots.error_against_size(results["sizes"]).figure
        energy = plots.error_against_size(results["sizes"], quantity="energy_rmse_per_atom")
        figures["sizes_energy"] = energy.figure
    if shared or left_out:
        results["shared"] = case.shared(left_out)
        figures["shared"] = plots.shared_models(results["shared"])
    for name, table in results.items():
        write_text(tables / f"{prefix}_{name}.csv", table.to_csv())
    for name, figure in figures.items():
        whole = figure.figure if isinstance(figure, SubFigure) else figure
        if name != "parity":
            plots.save_figure(whole, f"{prefix}_{name}")
        plt.close(whole)
    write_json(reports_dir() / "metrics" / f"{prefix}.json", _provenance(case, experiments))
    return errors


def _check_prefix(prefix: str) -> None:
    """Refuse a begin of file names that leads to another folder, or to the files of something else."""
    if not re.fullmatch(r"\w[\w.-]*", prefix):
        raise ConfigError(
            f"the name of a case study begins its files and must be letters, digits, '_', '-', '.': {prefix!r}"
        )
    target = reports_dir() / "metrics" / f"{prefix}.json"
    try:
        content = json.loads(target.read_text(encoding="utf-8")) if target.exists() else {"crystals": []}
    except json.JSONDecodeError:
        content = None
    reserved = prefix == "summary" or prefix.isdigit() or prefix.startswith("study_")
    if reserved or not (isinstance(content, dict) and "crystals" in content):
        raise ConfigError(f"{target} is not of a case study, which would replace it: give the case study another name")


def _provenance(case: CaseStudy, experiments: Mapping[Case, Experiment]) -> dict[str, Any]:
    """Return what a set of tables was made from."""
    return {
        "recipe": case.config("", case.seeds[0]).model_dump(),
        "seeds": list(case.seeds),
        "start_model": {"name": case.start.name, "fingerprint": case.start.fingerprint},
        "crystals": [dataset_facts(dataset) for dataset in case.crystals],
        "runs": {" ".join(map(str, filter(None, key[:2]))) + f" {key.seed}": experiment.result.run_key
                 for key, experiment in experiments.items()},
        "versions": package_versions(),
        "git_revision": git_revision(),
    }  # fmt: skip


class _Collected:
    """Predictions for the frames of a set, put together from several models."""

    def __init__(self, n_frames: int) -> None:
        self._energies = np.full(n_frames, np.nan)
        self._forces: list[NDArray[np.float64]] = [np.empty((0, 3))] * n_frames

    def add(self, indices: NDArray[np.int64], predictions: Predictions) -> None:
        self._energies[indices] = predictions.energies
        for k, forces in zip(indices, predictions.forces, strict=True):
            self._forces[k] = forces

    def predictions(self) -> Predictions:
        return Predictions(self._energies, tuple(self._forces))


def _folded(is_test: NDArray[np.bool_], seed: int) -> Split:
    """Return a split with this test part, an eighth of the rest for validation."""
    rest = np.random.default_rng(seed).permutation(np.flatnonzero(~is_test))
    edge = max(1, len(rest) // 8)
    test = np.flatnonzero(is_test)
    return Split(np.sort(rest[edge:]), np.sort(rest[:edge]), test, "packings left out", seed)


def _two_errors(metrics: Mapping[str, Metric]) -> dict[str, float]:
    return {quantity: metrics[quantity].value for quantity in ("force_rmse_vector", "energy_rmse_per_atom")}


def _printed(crystal: str, model: str) -> tuple[float, float]:
    """Return what table 4.6 of the thesis says of a crystal, meV/atom and eV/Angstrom, NaN where it says nothing."""
    number = _thesis_number(crystal)
    if number is None or model == REFITTED:
        return math.nan, math.nan
    energy, force = THESIS_TABLE[number][model]
    return 1000 * energy, force


def _thesis_number(name: str) -> str | None:
    """Return the thesis' number of a crystal whose name begins with it, ``32-like`` or ``32.traj``."""
    number = re.match(r"\d+", name)
    # 27_something of a public collection is another crystal
    after = name[number.end() : number.end() + 1] if number else ""
    return number[0] if number and number[0] in THESIS_TABLE and after in ("", "-", ".") else None


def _natural(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]
