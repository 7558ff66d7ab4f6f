"""Ablations: one thing at a time is changed in a recipe, over several seeds, beside the tables of the thesis.

Tables 4.2 to 4.5 of the thesis vary its own protocol; the others vary the recipe ``short``. All runs of a table and a
seed share one split, so that settings are compared on the same frames. Which setting is best is read from the
validation part; the test part decides nothing.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Literal

import numpy as np
import pandas as pd
import scipy.stats

from tlmc.data.dataset import Dataset
from tlmc.data.loading import load_dataset
from tlmc.data.splits import split_dataset
from tlmc.errors import ConfigError, DataError
from tlmc.evaluation.comparison import REFITTED, START
from tlmc.experiments.records import check_comparable, one_of_each, read_records
from tlmc.experiments.run import MOLECULES, Run, execute, run_key
from tlmc.potentials.borrowing import THESIS_DONORS
from tlmc.potentials.registry import load_start_model

_LOG = logging.getLogger(__name__)

F, F_COMPONENT, E = "F vector (eV/A)", "F component (eV/A)", "E (meV/atom)"
"""Columns of a table: test errors, averaged over the seeds; `` spread`` after them is the standard deviation."""
_QUANTITIES: Final = {
    F: ("force_rmse_vector", 1.0),
    F_COMPONENT: ("force_rmse_component", 1.0),
    E: ("energy_rmse_per_atom", 1000.0),
}
_WITH_SPREAD: Final = (F, F_COMPONENT, E, "F / baseline", "E / baseline", "drift F (eV/A)", "drift E (meV/atom)")


@dataclass(frozen=True)
class Setting:
    """One row of a table."""

    name: str
    changes: dict[str, Any] = field(default_factory=dict)
    """What differs from the recipe, fields of :class:`tlmc.training.FinetuneConfig`."""
    run: dict[str, Any] = field(default_factory=dict)
    """What differs in the run, fields of :class:`tlmc.experiments.run.Run`."""
    fraction: float = 1.0
    """Part of the training frames."""
    value: float | None = None
    """Place on the axis of a figure, where the settings are numbers."""
    thesis: tuple[float, float] | None = None
    """What the thesis reports for its crystal 32: RMSE of force vectors (eV/A) and of energies (meV/atom)."""
    trained: bool = True
    """False for rows that come with every run."""

    @property
    def is_baseline(self) -> bool:
        """True if this is the recipe as it is."""
        return self.trained and not self.changes and not self.run and self.fraction == 1.0


@dataclass(frozen=True)
class Ablation:
    """One table."""

    title: str
    recipe: Literal["thesis", "short"]
    settings: tuple[Setting, ...]
    thesis_table: str = ""
    """Number of the table in the thesis."""
    axis: str = ""
    """What :attr:`Setting.value` is; empty where the settings are not numbers."""
    log: bool = True
    """Whether a figure spaces the values by their ratios."""

    def label(self, setting: Setting) -> str:
        """Return the name that the results of a setting are filed under; tables share the runs of their recipe."""
        if not setting.trained:
            return setting.name
        return self.recipe if setting.is_baseline else f"{self.recipe}, {setting.name}"


ABLATIONS: Final[dict[str, Ablation]] = {
    "transfer": Ablation(
        "What pretraining is worth, and freezing",
        "thesis",
        (
            Setting("scratch", {"init": "scratch"}, thesis=(0.27907, 2.95)),
            Setting(START, trained=False, thesis=(0.42062, 259.30)),
            Setting(REFITTED, trained=False),
            Setting("all layers", thesis=(0.06730, 1.59)),
            Setting("frozen input and output", {"layers": "hidden"}, thesis=(0.07823, 1.67)),
        ),
        thesis_table="4.2",
    ),
    "batch": Ablation(
        "Batch size",
        "thesis",
        (
            Setting("batch 1", {"batch_size": 1}, value=1, thesis=(0.06845, 1.53)),
            Setting("batch 2", value=2, thesis=(0.06730, 1.59)),
            Setting("batch 4", {"batch_size": 4}, value=4, thesis=(0.07059, 1.57)),
            Setting("batch 8", {"batch_size": 8}, value=8, thesis=(0.07197, 1.57)),
            Setting("batch 16", {"batch_size": 16}, value=16, thesis=(0.07508, 1.60)),
        ),
        thesis_table="4.3",
        axis="batch size",
    ),
    "size": Ablation(
        "Number of training frames",
        "thesis",
        (
            Setting("a quarter of the frames", fraction=0.25, value=0.25, thesis=(0.07857, 1.63)),
            Setting("half of the frames", fraction=0.5, value=0.5, thesis=(0.07548, 1.61)),
            Setting("three quarters of the frames", fraction=0.75, value=0.75, thesis=(0.07002, 1.60)),
            Setting("all frames", value=1.0, thesis=(0.06730, 1.59)),
        ),
        thesis_table="4.4",
        axis="part of the training frames",
    ),
    "lambda": Ablation(
        "Weight of the forces in the loss",
        "thesis",
        (
            Setting("lambda 0", {"lambda_": 0.0}, value=0.0, thesis=(0.90252, 0.92)),
            Setting("lambda 0.1", {"lambda_": 0.1}, value=0.1, thesis=(0.06967, 1.48)),
            Setting("lambda 0.5", {"lambda_": 0.5}, value=0.5, thesis=(0.06804, 1.58)),
            Setting("lambda 0.9", value=0.9, thesis=(0.06730, 1.59)),
            Setting("lambda 1", {"lambda_": 1.0}, value=1.0, thesis=(0.07065, 267.78)),
        ),
        thesis_table="4.5",
        axis="weight of the forces, λ",
        log=False,
    ),
    "rate": Ablation(
        "Learning rate and schedule",
        "short",
        (
            Setting("rate 1e-4, cosine", {"lr": 1e-4}),
            Setting("rate 3e-4, cosine"),
            Setting("rate 1e-3, cosine", {"lr": 1e-3}),
            Setting("rate 3e-4, plateau", {"schedule": "plateau"}),
            Setting("rate 3e-4, constant", {"schedule": "constant"}),
        ),
    ),
    "decay": Ablation(
        "Weight decay",
        "short",
        (
            Setting("decay 0", {"weight_decay": 0.0}),
            Setting("decay 0.01"),
            Setting("decay 0.1", {"weight_decay": 0.1}),
            Setting("decay 1", {"weight_decay": 1.0}),
        ),
    ),
    "ema": Ablation(
        "Exponential average of the weights",
        "short",
        (
            Setting("cosine, no average"),
            Setting("cosine, average 0.99", {"ema_decay": 0.99}),
            Setting("constant rate, average 0.99", {"schedule": "constant", "ema_decay": 0.99}),
            Setting("constant rate, average 0.999", {"schedule": "constant", "ema_decay": 0.999}),
        ),
    ),
    "ridge": Ablation(
        "Closed-form fit of the output layers first",
        "short",
        (
            Setting("no fit"),
            Setting("fit", {"warm_start": "ridge"}),
            Setting("no fit, rate 1e-4, warm-up", {"lr": 1e-4, "warmup_epochs": 3}),
            Setting("fit, rate 1e-4, warm-up", {"warm_start": "ridge", "lr": 1e-4, "warmup_epochs": 3}),
        ),
    ),
    "borrow": Ablation(
        "New elements: borrowed network, or a copy of their own",
        "short",
        (Setting("relabel"), Setting("extend", run={"borrow": "extend"})),
    ),
    "members": Ablation(
        "Members of the ensemble",
        "short",
        (
            Setting("1 member", {"members": 1}, value=1),
            Setting("2 members", {"members": 2}, value=2),
            Setting("4 members", {"members": 4}, value=4),
            Setting("8 members", value=8),
        ),
        axis="members of the ensemble",
    ),
    "lora": Ablation(
        "Low-rank updates",
        "short",
        (
            Setting("output layer only", {"layers": "last"}),
            Setting("rank 1", {"rank": 1}, value=1),
            Setting("rank 4", {"rank": 4}, value=4),
            Setting("rank 16", {"rank": 16}, value=16),
            Setting("rank 64", {"rank": 64}, value=64),
            Setting("whole matrices"),
        ),
        axis="rank of the update",
    ),
    "replay": Ablation(
        "Replay of the start model's predictions",
        "short",
        (
            Setting("no replay"),
            Setting("replay 0.01", {"replay": 0.01}),
            Setting("replay 0.1", {"replay": 0.1}),
            Setting("replay 1", {"replay": 1.0}),
        ),
    ),
}
"""The tables by name. Numbers of the thesis: Tables 4.2 to 4.5, crystal 32, its 20 % test part."""


def runs(
    tables: Sequence[str],
    datasets: Sequence[str],
    start_model: Literal["ani2x", "ani2xt"],
    n_seeds: int,
    *,
    first_seed: int = 0,
    epochs: int = 0,
    **common: Any,
) -> list[Run]:
    """Return the runs that tables need, each once: by table, data set, setting and seed.

    Parameters
    ----------
    tables
        Names of :data:`ABLATIONS`.
    datasets
        Names or files, as `tlmc.data.loading.load_dataset` takes them. Elements that the start model lacks borrow as in
        the thesis (:data:`tlmc.potentials.THESIS_DONORS`).
    start_model
        Start model of all runs.
    n_seeds, first_seed
        Seeds of split and training.
    epochs
        Replaces the recipes' own; 0 keeps them.
    **common
        Fields of all runs (:class:`tlmc.experiments.run.Run`), e.g. ``crystals_only=True``.

    Raises
    ------
    ConfigError
        If a table is unknown, needs new elements where there are none, or an ensemble where there is one member.
    """
    unknown = [name for name in tables if name not in ABLATIONS]
    if unknown or not tables:
        raise ConfigError(f"there is no ablation {', '.join(unknown) or 'in an empty list'}: choose of {_names()}")
    model = load_start_model(start_model)
    if "members" in tables and model.members == 1:
        raise ConfigError(f"the ablation 'members' needs an ensemble, and {start_model} has one member: take ani2x")
    loaded = {name: load_dataset(name) for name in datasets}
    if common.get("crystals_only"):
        loaded = {name: dataset.crystals() for name, dataset in loaded.items()}
    found: dict[str, Run] = {}
    for name in tables:
        for source, dataset in loaded.items():
            donors = {e: THESIS_DONORS[e] for e in dataset.elements if e in THESIS_DONORS and e not in model.elements}
            if name == "borrow" and not donors:
                raise ConfigError(f"the ablation 'borrow' needs new elements, and {start_model} knows all of {source}")
            fields = {"dataset": source, "start_model": start_model, "element_map": donors} | common
            for setting in ABLATIONS[name].settings:
                for seed in range(first_seed, first_seed + n_seeds) if setting.trained else ():
                    run = _run(ABLATIONS[name], setting, dataset, seed, epochs, fields)
                    found.setdefault(run.slug, run)
    return list(found.values())


def _run(
    ablation: Ablation, setting: Setting, dataset: Dataset, seed: int, epochs: int, fields: Mapping[str, Any]
) -> Run:
    """Return one run; `fields` are those that all runs have in common."""
    n_train = 0
    if setting.fraction < 1.0:
        parts = split_dataset(dataset, method=fields.get("split", "random"), seed=seed)
        n_train = max(1, round(setting.fraction * len(parts.train)))
    changes = {
        "recipe": ablation.recipe,
        "label": ablation.label(setting),
        "settings": setting.changes | ({"epochs": epochs} if epochs else {}),
        "n_train": n_train,
        "seed": seed,
    }
    return Run.model_validate({**fields, **changes, **setting.run})


def description(planned: Sequence[Run], study: str) -> dict[str, Any]:
    """Return runs as the description of a sweep: what all share, one entry per setting, the seeds as a grid.

    Parameters
    ----------
    planned
        As :func:`runs` returns them.
    study
        Name that results are filed under.

    Raises
    ------
    ConfigError
        If the seeds of the settings differ, as they may where training frames are a fraction of parts of unequal size.
    """
    dumped = [run.model_dump(exclude_defaults=True) for run in planned]
    seeds = sorted({run.seed for run in planned})
    base = {
        key: value
        for key, value in dumped[0].items()
        if key != "seed" and all(other.get(key) == value for other in dumped)
    }
    entries: dict[str, dict[str, Any]] = {}
    for fields in dumped:
        rest = {key: value for key, value in fields.items() if key not in base and key != "seed"}
        entries[repr(rest)] = rest
    if len(entries) * len(seeds) != len(planned):
        raise ConfigError(f"{len(planned)} runs are not {len(entries)} settings with {len(seeds)} seeds each")
    return {"study": study, "base": base, "runs": list(entries.values()), "grid": {"seed": seeds}}


def carry_out(planned: Iterable[Run], study: str, progress: bool | None = None) -> None:
    """Execute the runs whose results a study does not hold yet, one after the other.

    Parameters
    ----------
    planned
        As :func:`runs` returns them.
    study
        Name that results are filed under; ablations of different lengths need different names.
    progress
        As in :func:`tlmc.experiments.run.execute`.

    Raises
    ------
    DataError, ModelError, ConfigError
        As the runs raise them.
    """
    missing = [run for run in planned if not _is_recorded(run, study)]
    for number, run in enumerate(missing, start=1):
        _LOG.info("run %d of %d: %s, %s, seed %d", number, len(missing), run.dataset, run.name, run.seed)
        execute(run, study, progress)


def _names() -> str:
    return ", ".join(ABLATIONS)


def _is_recorded(run: Run, study: str) -> bool:
    try:
        rows = read_records(study=study, recipe=run.name, seed=run.seed, split=MOLECULES)
    except DataError:
        return False
    # what a run is filed under last is what it forgot; cheap to ask before the hash of the whole run is computed
    return not rows.empty and run_key(run) in set(rows["run_key"])


def table(name: str, records: pd.DataFrame) -> pd.DataFrame:
    """Arrange records as one table, beside what the thesis reports.

    Parameters
    ----------
    name
        Of :data:`ABLATIONS`.
    records
        As :func:`tlmc.evaluation.read_records` returns them, of one study and one start model; what does not belong to
        the table is ignored, and settings that have not run yet are left out.

    Returns
    -------
    DataFrame
        A row per data set and setting:

        - ``dataset``, ``setting``, ``value`` (:attr:`Setting.value`), ``n_train``, ``n_seeds``;
        - test errors :data:`F`, :data:`F_COMPONENT` and :data:`E`, each with its ``spread``, the standard deviation
          over the seeds (NaN with one seed);
        - ``F / baseline``, ``E / baseline`` and their ``spread``: ratio to the recipe as it is, taken seed by seed, so
          that what one split makes harder than another drops out;
        - ``validation F (eV/A)``, ``validation E (meV/atom)`` and ``best on validation``: where the mean over the seeds
          of ``sqrt(F E)`` is lowest;
        - ``drift F (eV/A)``, ``drift E (meV/atom)``: difference from the start model on isolated molecules
          (:mod:`tlmc.evaluation.forgetting`), and their ``spread``;
        - ``thesis F (eV/A)``, ``thesis E (meV/atom)``: its crystal 32, NaN where it has no such row.

    Raises
    ------
    ConfigError
        If the table is unknown.
    DataError
        If there are no records of it, or of several studies or start models.
    """
    if name not in ABLATIONS:
        raise ConfigError(f"there is no ablation {name!r}: choose of {_names()}")
    ablation = ABLATIONS[name]
    labels = {ablation.label(setting): setting for setting in ablation.settings}
    seeds, n_train = _by_seed(name, ablation, records[records["recipe"].isin(list(labels))])
    groups = seeds.groupby(["dataset", "recipe"])
    mean, spread, n_seeds = groups.mean(), groups.std(), groups.size()
    rows = []
    for dataset in mean.index.unique("dataset"):
        scores = mean.loc[dataset, "validation score"].dropna()
        for label, setting in labels.items():
            key = (dataset, label)
            if key not in mean.index:
                continue
            row: dict[str, Any] = {"dataset": dataset, "setting": setting.name, "value": setting.value}
            row |= {"n_train": round(n_train[key]), "n_seeds": n_seeds[key]}
            for column in _WITH_SPREAD:
                row |= {column: mean.loc[key, column], f"{column} spread": spread.loc[key, column]}
            row |= {column: mean.loc[key, column] for column in ("validation F (eV/A)", "validation E (meV/atom)")}
            row["best on validation"] = bool(len(scores)) and label == scores.idxmin()
            force, energy = setting.thesis or (np.nan, np.nan)
            rows.append(row | {"thesis F (eV/A)": force, "thesis E (meV/atom)": energy})
    return pd.DataFrame(rows).astype({"value": np.float64})


def formatted(results: pd.DataFrame) -> pd.DataFrame:
    """Return a table as text for a notebook, ``mean ± spread``, columns without numbers left out; ``*`` marks the best.

    Parameters
    ----------
    results
        As :func:`table` returns it.
    """
    marks = np.where(results["best on validation"], " *", "")
    text = pd.DataFrame({"setting": results["setting"] + marks})
    if results["dataset"].nunique() > 1:
        text.insert(0, "dataset", results["dataset"])
    digits = {F: 4, F_COMPONENT: 4, E: 2, "F / baseline": 2, "E / baseline": 2, "drift F (eV/A)": 3}
    for column, places in digits.items():
        pairs = zip(results[column], results[f"{column} spread"], strict=True)
        text[column] = [_with_spread(mean, spread, places) for mean, spread in pairs]
    for column, places in (("thesis F (eV/A)", 4), ("thesis E (meV/atom)", 2)):
        text[column] = [_with_spread(value, np.nan, places) for value in results[column]]
    return text.loc[:, (text != "-").any()]


def finding(name: str, results: pd.DataFrame) -> str:
    """Say in a sentence what a table decides: the setting that the validation part chooses, and its test errors.

    Parameters
    ----------
    name, results
        Of the table, and what :func:`table` returned; one data set.

    Returns
    -------
    str
        Markdown. A ratio counts as different from one if the interval of Student's t at 95 % over the seeds says so.
    """
    chosen = results[results["best on validation"]]
    if chosen.empty:
        return f"- **{name}**: the validation part of no setting is known."
    row = chosen.iloc[0]
    text = f"- **{name}**: the validation part chooses *{row['setting']}*"
    if row["F / baseline"] == 1.0:
        return f"{text}, the recipe as it is."
    if np.isnan(row["F / baseline"]):
        return f"{text}."
    parts = [f"{word} {_ratio(row, column)}" for word, column in (("force", "F"), ("energy", "E"))]
    return f"{text}; test errors relative to the recipe, seed by seed: {', '.join(parts)}."


def _ratio(row: pd.Series, quantity: str) -> str:
    mean, spread = row[f"{quantity} / baseline"], row[f"{quantity} / baseline spread"]
    text, n = _with_spread(mean, spread, 2), row["n_seeds"]
    if n < 2:
        return f"{text} (one seed: no claim)"
    clear = abs(mean - 1.0) > scipy.stats.t.ppf(0.975, n - 1) * spread / n**0.5
    return f"{text} ({'clear' if clear else 'not clear'} with {n} seeds)"


def _with_spread(mean: float, spread: float, places: int) -> str:
    if np.isnan(mean):
        return "-"
    return f"{mean:.{places}f}" + ("" if np.isnan(spread) else f" ± {spread:.{places}f}")


def _by_seed(name: str, ablation: Ablation, shown: pd.DataFrame) -> tuple[pd.DataFrame, pd.Series]:
    """Return errors by data set, recipe and seed in the units of the table, and the number of training frames."""
    baseline = next(ablation.label(setting) for setting in ablation.settings if setting.is_baseline)
    shown = _without_other_starts(shown, ablation, baseline)
    if shown.empty:
        raise DataError(f"there are no results of the ablation {name!r} yet")
    check_comparable(shown)
    shown = one_of_each(shown)
    keys = ["dataset", "recipe", "seed"]
    double = shown[shown.duplicated([*keys, "split", "quantity"])]
    if not double.empty:
        row = double.iloc[0]
        raise DataError(
            f"{row['recipe']} of {row['dataset']}, seed {row['seed']}, is recorded more than once: studies "
            f"{', '.join(sorted(set(shown['study'])))}, start models {', '.join(sorted(set(shown['start_model'])))}; "
            "choose one of each"
        )
    wide = shown.pivot(index=keys, columns=["split", "quantity"], values="value")
    seeds = pd.DataFrame(index=wide.index)
    for split, word in (("test", ""), ("validation", "validation "), (MOLECULES, "drift ")):
        for title, (quantity, factor) in _QUANTITIES.items():
            column = f"{word}{title}" if split == "test" else f"{word}{title.replace(' vector', '')}"
            seeds[column] = factor * wide[split, quantity] if (split, quantity) in wide else np.nan
    seeds["validation score"] = np.sqrt(seeds["validation F (eV/A)"] * seeds["validation E (meV/atom)"])
    of_baseline = seeds[seeds.index.get_level_values("recipe") == baseline].droplevel("recipe")
    cells = pd.MultiIndex.from_arrays([seeds.index.get_level_values(level) for level in ("dataset", "seed")])
    for title, column in (("F / baseline", F), ("E / baseline", E)):
        seeds[title] = seeds[column] / of_baseline[column].reindex(cells).to_numpy()
    return seeds, shown.groupby(["dataset", "recipe"])["n_train"].mean()


def _without_other_starts(shown: pd.DataFrame, ablation: Ablation, baseline: str) -> pd.DataFrame:
    """Keep of the rows that come with every run those that came with the baseline: same model, same frames."""
    untrained = [setting.name for setting in ablation.settings if not setting.trained]
    starts = shown["recipe"].isin(untrained)
    if not starts.any():
        return shown
    same = ["study", "dataset", "start_model", "seed"]
    of_baseline = shown.loc[shown["recipe"] == baseline, [*same, "n_train"]].drop_duplicates()
    joined = shown[starts].merge(of_baseline, on=same, suffixes=("", "_baseline"))
    fits = (joined["n_train"] == 0) | (joined["n_train"] == joined["n_train_baseline"])
    return pd.concat([shown[~starts], joined.loc[fits, shown.columns]], ignore_index=True)
