"""One experiment: split, fine-tune, evaluate on the test part, record. The command line and the notebooks run this."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence, Sized
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

import numpy as np
import pandas as pd

from tlmc.arguments import checked
from tlmc.data.dataset import Dataset
from tlmc.data.splits import Split, SplitMethod, shrunk, split_dataset
from tlmc.equality import equal_by_content
from tlmc.errors import ConfigError
from tlmc.evaluation.comparison import REFITTED, START, Stage, before_and_after
from tlmc.evaluation.label_check import check_labels
from tlmc.evaluation.metrics import as_json, evaluate
from tlmc.experiments.records import NAMES, append_records, identity, rows_from_metrics, rows_from_stages
from tlmc.files import write_json, write_text
from tlmc.paths import reports_dir
from tlmc.potentials.calculator import predict
from tlmc.potentials.model import Potential
from tlmc.potentials.registry import family_of, load_start_model
from tlmc.training.config import FinetuneConfig, recipe
from tlmc.training.distributed import Group
from tlmc.training.fine_tuning import FinetuneResult, finetune
from tlmc.training.identity import run_name, start_hash
from tlmc.training.interrupts import interrupted

_LOG = logging.getLogger(__name__)


@equal_by_content
@dataclass(frozen=True)
class Experiment:
    """A fine-tuning and what it achieved."""

    dataset: Dataset
    split: Split
    result: FinetuneResult
    stages: dict[str, Stage]
    """Test part: predictions and errors under ``start``, ``start, offset refitted`` and the name of the recipe."""
    run_dir: Path

    @property
    def test(self) -> Dataset:
        """The frames that `stages` is about."""
        return self.dataset.subset(self.split.test)


@checked
def run_experiment(
    model: Potential,
    dataset: Dataset,
    config: FinetuneConfig,
    *,
    split: SplitMethod | Split = "random",
    n_train: int = 0,
    study: str = "",
    run_dir: Path | None = None,
    progress: bool | None = None,
    tensorboard: bool = False,
    device: str = "cpu",
    group: Group | None = None,
    trust_labels: bool = False,
) -> Experiment:
    """Fine-tune on the training part, evaluate on the test part; an unfinished run goes on, a finished one is read.

    Parameters
    ----------
    model, dataset, config
        Start model, all frames, and settings; ``config.seed`` also draws the split.
    split
        How frames are parted, 70/10/20; or the parts themselves.
    n_train
        Use so many frames of the training part, drawn by the seed; 0 for all.
    study
        File the test errors, and the validation errors of the result, under this name in ``metrics/summary.parquet``;
        empty for no record.
    run_dir
        Folder of the run; by default one under ``reports/runs`` with a name that changes with every setting.
    progress, tensorboard, device, group
        As in :func:`tlmc.training.finetune`. Of a group, only the first process evaluates and records; the
        others return without stages.
    trust_labels
        Go on with a warning where the start model shows that the labels cannot be those of the frames
        (:func:`tlmc.evaluation.label_check.check_labels`).

    Raises
    ------
    DataError, ModelError, ConfigError
        As the steps raise them, before training starts; ModelError also if the training diverges.
    Interrupted
        On Ctrl-C or SIGTERM; the same call goes on.
    """
    check_name(config.recipe)
    parts = split if isinstance(split, Split) else split_dataset(dataset, method=split, seed=config.seed)
    # every process of a group finds the same, only the first is heard
    check_labels(dataset, model, trust=trust_labels)
    if n_train:
        parts = shrunk(parts, n_train, config.seed, dataset)
    folder = run_dir.expanduser() if run_dir else reports_dir() / "runs" / run_name(model, dataset, parts, config)
    result = finetune(
        model, dataset, parts, config, folder, progress=progress, tensorboard=tensorboard, device=device, group=group
    )
    if group is not None and not group.is_first:
        return Experiment(dataset, parts, result, {}, folder)
    try:
        stages = _evaluate(model, dataset, parts, result, study)
    except KeyboardInterrupt as error:
        raise interrupted(
            error,
            f"interrupted while the result was evaluated: it is kept in {folder}, the same call goes on from there",
        ) from None
    return Experiment(dataset, parts, result, stages, folder)


def check_name(name: str) -> None:
    """Raise a ConfigError if the results of a training cannot be filed under a name."""
    if name in (START, REFITTED):
        raise ConfigError(f"{name!r} names the errors of the start model, which come with every run: choose another")


def _evaluate(model: Potential, dataset: Dataset, parts: Split, result: FinetuneResult, study: str) -> dict[str, Stage]:
    """Evaluate a result on the test part, leave ``metrics.json`` in its folder and, with a study, records."""
    config, folder = result.config, result.run_dir
    assert folder is not None
    if dataset.is_crystal[parts.train].all():
        _LOG.info(
            "%s: trained on crystals alone, so the model is not one for lattice energies, which need molecules, too",
            dataset.name,
        )
    stages = before_and_after(model, {config.recipe: result.potential}, dataset, parts)
    content: dict[str, Any] = {
        "run_key": result.run_key,
        "dataset": {"name": dataset.name, "source": dataset.source, "hash": dataset.hash},
        "start_model": {"name": model.name, "fingerprint": model.fingerprint},
        "n_train": len(parts.train),
        "test": {name: as_json(stage.metrics) for name, stage in stages.items()},
    }
    if any(stage.by_kind for stage in stages.values()):
        content["test_by_kind"] = {
            name: {kind: as_json(metrics) for kind, metrics in stage.by_kind.items()} for name, stage in stages.items()
        }
    write_json(folder / "metrics.json", content)
    if study:
        rows = rows_from_stages(
            stages,
            study=study,
            dataset=dataset.name,
            start_model=model.name,
            seed=config.seed,
            n_train=len(parts.train),
            run_key=result.run_key,
            identity=identity(dataset, parts, "test", start_hash(model)),
        )
        # settings are chosen by these, never by the test part
        validation = dataset.subset(parts.validation)
        metrics = evaluate(validation, predict(result.potential, validation.frames))
        cell: dict[str, Any] = {name: rows[-1][name] for name in (*NAMES, "run_key")} | {"split": "validation"}
        cell["identity"] = identity(dataset, parts, "validation", start_hash(model))
        append_records([*rows, *rows_from_metrics(metrics, **cell)])
    return stages


@checked
def run_recipes(
    model: Potential,
    dataset: Dataset,
    recipes: Sequence[str],
    n_seeds: int,
    *,
    first_seed: int = 0,
    study: str = "",
    progress: bool | None = None,
    trust_labels: bool = False,
    **changes: Any,
) -> list[Experiment]:
    """Run every recipe with ``n_seeds`` seeds from ``first_seed`` on, in the order recipes, then seeds.

    Parameters
    ----------
    model, dataset
        Start model and all frames.
    recipes
        Names of recipes (:data:`tlmc.training.RECIPES`).
    n_seeds
        Splits and trainings per recipe; a difference smaller than the spread over seeds says nothing.
    first_seed
        Of the first of them.
    study, progress, trust_labels
        As in :func:`run_experiment`.
    **changes
        Settings that differ from the recipes, e.g. ``epochs=5``.

    Raises
    ------
    DataError, ModelError, ConfigError
        As the steps raise them; all settings are checked before the first training starts.
    """
    _check_counts(n_seeds, recipes=recipes)
    # all settings are checked before the first run starts
    seeds = range(first_seed, first_seed + n_seeds)
    configs = [recipe(name, seed=seed, **changes) for name in recipes for seed in seeds]
    experiments = []
    for config in configs:
        _LOG.info("%s on %s, seed %d", config.recipe, dataset.name, config.seed)
        experiments.append(
            run_experiment(model, dataset, config, study=study, progress=progress, trust_labels=trust_labels)
        )
    return experiments


CONVERGENCE: Final[Mapping[str, Mapping[str, Any]]] = MappingProxyType(
    {
        # a plateau does not know how many epochs are to come: these are the first 30 of the protocol's 100
        "thesis": {"recipe": "thesis", "epochs": 30},
        "short": {},
        "short, half as long": {"epochs": 30},
        "short + ridge": {"warm_start": "ridge", "lr": 1e-4, "warmup_epochs": 3, "epochs": 20},
        "batch 4": {"batch_size": 4, "lr": 6e-4, "warmup_epochs": 1, "epochs": 30},
        "batch 4 + EMA": {
            "batch_size": 4, "lr": 6e-4, "warmup_epochs": 1, "epochs": 30, "schedule": "constant", "ema_decay": 0.99,
        },
    }
)  # fmt: skip
"""Settings to compare with :func:`convergence`: the thesis' protocol, and ways to visit each structure less often."""

COLUMNS: Final[Mapping[str, Mapping[str, Any]]] = MappingProxyType(
    {
        "AEV alone": {"recipe": "rich", "richer": None},
        "SOAP 4, 4": {"recipe": "rich"},
        "SOAP 4, 4, pairs": {"recipe": "rich", "richer": {"kind": "soap", "compression": "none"}},
        "SOAP 6, 6": {"recipe": "rich", "richer": {"kind": "soap", "parameters": {"n_max": 6, "l_max": 6}}},
    }
)
"""Columns behind the AEV to compare with :func:`convergence`, all else being the recipe ``rich``: how finely SOAP
resolves (``n_max``, ``l_max``), and whether the element of the second neighbour counts."""


@checked
def convergence(
    model: Potential,
    datasets: Sequence[Dataset],
    n_seeds: int,
    settings: Mapping[str, Mapping[str, Any]] = CONVERGENCE,
    *,
    first_seed: int = 0,
    share: float = 1.0,
    split: SplitMethod = "random",
    progress: bool | None = None,
    trust_labels: bool = False,
) -> pd.DataFrame:
    """Train with several settings and tell how the validation error falls with the processor time spent.

    Descriptors are computed, and C code is compiled, beforehand; a warm start counts. Runs of one seed share split and
    start. Processor time, unlike time on the clock, is comparable on a shared machine. Each run leaves its part of the
    table under ``reports/runs/convergence``, where another call finds it.

    Parameters
    ----------
    model, datasets
        Start model, and sets of all frames.
    n_seeds, first_seed
        Seeds of split and training.
    settings
        Under each name the ``recipe`` (``"short"`` if not given), the ``start_model`` if it is another one, such as
        ``"sevennet"``, whose recipe has the same name, and what differs from the recipe, e.g.
        ``{"ridge, batch 8": {"warm_start": "ridge", "batch_size": 8, "lr": 6e-4}}``.
    share
        Part of each setting's epochs (rounded, at least one) to train, for a trial of the whole; schedules end with it.
    split, progress, trust_labels
        As in :func:`run_experiment`.

    Raises
    ------
    DataError, ModelError, ConfigError
        As the steps raise them; all settings are checked before the first training starts.

    Returns
    -------
    DataFrame
        A row per epoch: ``dataset``, ``setting``, ``seed``, ``epoch``, ``cpu_seconds`` since the start of the run,
        ``validation_force_rmse_vector`` (eV/A) and ``validation_energy_rmse_per_atom`` (eV/atom).
    """
    _check_counts(n_seeds, datasets=datasets, settings=settings)
    if not share > 0:
        raise ConfigError(f"share must be above 0, got {share}")
    configs = {name: _shortened(setting, share) for name, setting in settings.items()}
    models = {
        name: load_start_model(setting["start_model"]) if "start_model" in setting else model
        for name, setting in settings.items()
    }
    for dataset in datasets:
        check_labels(dataset, model, trust=trust_labels)
    runs = [
        (dataset, name, config.model_copy(update={"seed": seed}))
        for seed in range(first_seed, first_seed + n_seeds)
        for dataset in datasets
        for name, config in configs.items()
    ]
    tables = []
    for dataset, name, config in runs:
        parts = split_dataset(dataset, method=split, seed=config.seed)
        target = reports_dir() / "runs" / "convergence" / f"{run_name(models[name], dataset, parts, config)}.csv"
        if not target.exists():
            _LOG.info("%s on %s, seed %d", name, dataset.name, config.seed)
            try:
                history = _timed_history(models[name], dataset, parts, config, progress)
            except KeyboardInterrupt as error:
                raise interrupted(
                    error,
                    f"interrupted in {name} on {dataset.name}, seed {config.seed}, which the same call begins anew; "
                    f"the runs before it are kept in {target.parent}",
                ) from None
            write_text(target, history.to_csv(index=False))
        labels: dict[str, Any] = {"dataset": dataset.name, "setting": name, "seed": config.seed}
        table = pd.read_csv(target)
        tables.append(table.assign(**labels)[[*labels, *table.columns]])
    return pd.concat(tables, ignore_index=True)


def _check_counts(n_seeds: int, **several: Sized) -> None:
    """Refuse to train nothing."""
    if n_seeds < 1:
        raise ConfigError(f"n_seeds must be at least 1, got {n_seeds}")
    for name, values in several.items():
        if not len(values):
            raise ConfigError(f"{name} must not be empty")


def _shortened(setting: Mapping[str, Any], share: float) -> FinetuneConfig:
    """Return the configuration of an entry of the settings of `convergence`, with a part of its epochs."""
    changes = {key: value for key, value in setting.items() if key not in ("recipe", "start_model")}
    config = recipe(setting.get("recipe", "short"), **changes)
    return config.model_copy(update={"epochs": max(1, round(share * config.epochs))})


def _timed_history(
    model: Potential, dataset: Dataset, parts: Split, config: FinetuneConfig, progress: bool | None
) -> pd.DataFrame:
    """Return epoch, processor time and validation errors of a training that is kept in memory."""
    family = family_of(model)
    family.learner(
        family.first_model(model, dataset, parts, config), dataset.frames, config, Group(), lambda count: None
    )
    began = time.process_time()
    history = finetune(model, dataset, parts, config, progress=progress).history
    epochs = history["cpu_seconds"].cumsum()
    before = time.process_time() - began - epochs.iloc[-1]
    columns = ["epoch", "validation_force_rmse_vector", "validation_energy_rmse_per_atom"]
    return history[columns].assign(cpu_seconds=before + epochs)


def convergence_table(table: pd.DataFrame, baseline: str = "short") -> pd.DataFrame:
    """Return where the settings of :func:`convergence` end, at what cost, and how that compares with one of them.

    Parameters
    ----------
    table
        As :func:`convergence` returns it.
    baseline
        Setting to compare with, run by run: same set, same seed.

    Returns
    -------
    pandas.DataFrame
        A row per setting, in the order of the table: epochs; geometric means over sets and seeds of processor time (s)
        and of the validation errors after the last epoch (RMSE of the force vectors, eV/A, and of the energies,
        meV/atom); then the same three relative to the baseline, the ratios of the errors each with the standard
        deviation of its logarithm over sets and seeds (NaN with one run).

    Raises
    ------
    ConfigError
        If no run has the setting `baseline`.
    """
    names = {
        "cpu_seconds": "processor time (s)",
        "validation_force_rmse_vector": "F vector (eV/A)",
        "validation_energy_rmse_per_atom": "E (meV/atom)",
    }
    order = list(dict.fromkeys(table["setting"]))
    if baseline not in order:
        raise ConfigError(f"there is no setting {baseline!r} to compare with among {', '.join(order)}")
    ends = table.groupby(["setting", "dataset", "seed"])[list(names)].last().rename(columns=names)
    logs = (ends * [1.0, 1.0, 1000.0]).apply(np.log)
    ratios = logs - logs.loc[baseline].reindex(logs.reset_index("setting").index).to_numpy()
    result = logs.groupby("setting").mean().apply(np.exp)
    result.insert(0, "epochs", table.groupby("setting")["epoch"].max().astype(int))
    for name, column in zip(("time", "F", "E"), names.values(), strict=True):
        result[f"{name} / {baseline}"] = np.exp(ratios.groupby("setting")[column].mean())
        if name != "time":
            result[f"{name} / {baseline}, sd"] = ratios.groupby("setting")[column].std()
    return result.loc[order]
