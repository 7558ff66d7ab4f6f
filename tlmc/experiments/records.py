"""One machine-readable record of every result: a tidy table of numbers that runs append to and reports read from.

A row is one number of one run on one part of one data set. It carries hashes of the data, the split, the frames that
the number is of, and the start model: names do not tell two versions of a file, or two ways of splitting it, apart.
What is compared must agree in them (:func:`check_comparable`). The table lives in ``reports/metrics`` twice: as
``summary.parquet``, which is read back, and as ``summary.json``, one row a line, for eyes and for ``git diff``.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral, Real
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from filelock import FileLock, Timeout
from numpy.typing import NDArray

from tlmc.errors import ConfigError, DataError
from tlmc.evaluation.comparison import START, Part, Stage
from tlmc.evaluation.metrics import Metric
from tlmc.files import atomic_path, write_text
from tlmc.paths import reports_dir

if TYPE_CHECKING:
    from tlmc.data.dataset import Dataset
    from tlmc.data.splits import Split

SCHEMA: Final = pa.schema(
    [
        pa.field("study", pa.string(), nullable=False),
        pa.field("dataset", pa.string(), nullable=False),
        pa.field("start_model", pa.string(), nullable=False),
        pa.field("recipe", pa.string(), nullable=False),
        pa.field("seed", pa.int64(), nullable=False),
        pa.field("split", pa.string(), nullable=False),
        pa.field("quantity", pa.string(), nullable=False),
        pa.field("unit", pa.string(), nullable=False),
        pa.field("value", pa.float64(), nullable=False),
        pa.field("n_train", pa.int64(), nullable=False),
        pa.field("run_key", pa.string(), nullable=False),
        pa.field("data_hash", pa.string(), nullable=False),
        pa.field("split_hash", pa.string(), nullable=False),
        pa.field("split_method", pa.string(), nullable=False),
        pa.field("part_hash", pa.string(), nullable=False),
        pa.field("start_hash", pa.string(), nullable=False),
    ]
)
"""Columns of a record. ``seed`` is that of the split and the training, ``n_train`` the number of training frames (0 for
a start model as it is), ``unit`` is ``"1"`` for a pure number. ``data_hash`` is that of all frames
(:attr:`tlmc.data.dataset.Dataset.hash`), ``split_hash`` that of the three parts (:attr:`tlmc.data.splits.Split.hash`),
``split_method`` how they were drawn, ``part_hash`` says which frames the number is of, ``start_hash`` which weights and
borrowed elements the training began with, and ``run_key`` is the hash of all that with the settings."""

COLUMNS: Final[tuple[str, ...]] = tuple(SCHEMA.names)
IDENTITY: Final = ("data_hash", "split_hash", "split_method", "part_hash", "start_hash")
"""Columns that say what was evaluated, however it is called (:func:`identity`)."""
UNKNOWN: Final = "unknown"
"""Stands in those columns where nobody said, as in records of earlier versions."""
CELL: Final = (
    "study", "dataset", "start_model", "recipe", "seed", "split", "n_train", "data_hash", "part_hash", "start_hash",
)  # fmt: skip
"""What identifies an evaluation within the record: one run fills it, and a later one takes its place."""
NAMES: Final = ("study", "dataset", "start_model", "recipe", "seed", "split", "n_train")
"""What a table knows an evaluation by."""

RECIPES: Final = ("scratch", "start", "start, offset refitted", "thesis", "short", "quick")
"""The order of recipes in tables; others follow by name."""

_TABLE: Final = {
    "force_rmse_vector": ("F vector (eV/A)", "eV/A", 1.0),
    "force_rmse_component": ("F component (eV/A)", "eV/A", 1.0),
    "energy_rmse_per_atom": ("E (meV/atom)", "eV/atom", 1000.0),
}
_LOCK_SECONDS: Final = 60


def identity(dataset: Dataset, split: Split, part: str, start_hash: str) -> dict[str, str]:
    """Return the columns that say which frames were evaluated, and what the model began with.

    Parameters
    ----------
    dataset, split
        All frames and their parts.
    part
        ``"train"``, ``"validation"`` or ``"test"``; another name stands for frames of its own.
    start_hash
        As :func:`tlmc.training.identity.start_hash` returns it.

    Returns
    -------
    dict
        Values of :data:`IDENTITY`.
    """
    chosen = getattr(split, part).tolist() if part in ("train", "validation", "test") else part
    text = json.dumps([dataset.hash, chosen])
    return {
        "data_hash": dataset.hash,
        "split_hash": split.hash,
        # the number of training frames is a column of its own
        "split_method": re.sub(r", \d+ for training$", "", split.method),
        "part_hash": hashlib.sha256(text.encode()).hexdigest()[:12],
        "start_hash": start_hash,
    }


def rows_from_metrics(
    metrics: Mapping[str, Metric],
    *,
    study: str,
    dataset: str,
    start_model: str,
    recipe: str,
    seed: int,
    split: str,
    n_train: int,
    run_key: str,
    identity: Mapping[str, str] | None = None,
) -> list[dict[str, Any]]:
    """Turn the metrics of one evaluation into records.

    Parameters
    ----------
    metrics
        Quantity to value and unit, as :func:`tlmc.evaluation.evaluate` returns.
    study
        The study or profile the run belongs to.
    dataset, start_model, recipe, seed, split, n_train, run_key
        What was evaluated, see :data:`SCHEMA`.
    identity
        The frames and the start model (:func:`identity`); :data:`UNKNOWN` if None.

    Returns
    -------
    list of dict
        One row per quantity.
    """
    run = {
        "study": study,
        "dataset": dataset,
        "start_model": start_model,
        "recipe": recipe,
        "seed": seed,
        "split": split,
        "n_train": n_train,
        "run_key": run_key,
        **(dict.fromkeys(IDENTITY, UNKNOWN) if identity is None else identity),
    }
    return [
        run | {"quantity": quantity, "unit": metric.unit, "value": metric.value} for quantity, metric in metrics.items()
    ]


def rows_from_stages(
    stages: Mapping[str, Stage],
    *,
    study: str,
    dataset: str,
    start_model: str,
    seed: int,
    n_train: int,
    run_key: str,
    identity: Mapping[str, str],
    split: Part = "test",
) -> list[dict[str, Any]]:
    """Turn the stages of one run into records; the arguments are the columns of the record (`identity` several).

    The start model as it is has seen no frames, so its ``n_train`` is 0.
    """
    return [
        row
        for name, stage in stages.items()
        for row in rows_from_metrics(
            stage.metrics,
            study=study,
            dataset=dataset,
            start_model=start_model,
            recipe=name,
            seed=seed,
            split=split,
            n_train=0 if name == START else n_train,
            run_key=run_key,
            identity=identity,
        )
    ]


def append_records(rows: Iterable[Mapping[str, Any]] | pd.DataFrame, folder: Path | str | None = None) -> Path:
    """Merge rows into the record; an evaluation that is there already is replaced.

    Rows of one run add up. A run with other settings under the same study, recipe and seed takes the place of the old
    run, whose numbers stay in its run folder, so that every row of a table comes from one run. With other data, another
    split or another start model it stands beside the old one; tables then refuse to mix them.

    Safe beside other processes that append at the same time: the whole of reading, merging and writing is done under a
    file lock, and each file is replaced by an atomic rename. All rows are checked before anything is written.

    Parameters
    ----------
    rows
        Records with exactly the columns of :data:`SCHEMA`; those of :data:`IDENTITY` are :data:`UNKNOWN` if left out.
    folder
        Where ``summary.parquet`` and ``summary.json`` are; ``reports/metrics`` if None.

    Returns
    -------
    Path
        ``summary.parquet``.

    Raises
    ------
    ConfigError
        If a row lacks a column or has an unknown one.
    DataError
        If a value has the wrong type or is not finite, if the record cannot be read or half of it is missing, or if
        another process holds its lock for a minute.
    """
    if isinstance(rows, pd.DataFrame):
        rows = [{str(name): value for name, value in row.items()} for row in rows.to_dict("records")]
    checked = [_checked(row) for row in rows]
    folder = _folder(folder)
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / "summary.parquet"
    lock = folder / ".summary.lock"
    try:
        with FileLock(lock, timeout=_LOCK_SECONDS):
            if not target.exists() and (folder / "summary.json").exists():
                raise DataError(
                    f"{folder / 'summary.json'} is there without {target.name}, and would be replaced: "
                    "bring that back, or move the file away"
                )
            old = _read(target).to_pylist() if target.exists() else []
            replaced = {_cell(row): row["run_key"] for row in checked}
            kept = [row for row in old if replaced.get(_cell(row), row["run_key"]) == row["run_key"]]
            # what says nothing of its frames gives way to what does
            told = {tuple(row[name] for name in NAMES) for row in checked if row["part_hash"] != UNKNOWN}
            kept = [
                row for row in kept
                if row["part_hash"] != UNKNOWN or tuple(row[name] for name in NAMES) not in told
            ]  # fmt: skip
            merged = {(*_cell(row), row["quantity"]): row for row in [*kept, *checked]}
            ordered = [merged[key] for key in sorted(merged)]
            with atomic_path(target) as temporary:
                pq.write_table(pa.Table.from_pylist(ordered, schema=SCHEMA), temporary)
            lines = ",\n".join(" " + json.dumps(row, allow_nan=False) for row in ordered)
            write_text(folder / "summary.json", f"[\n{lines}\n]\n")
    except Timeout as error:
        raise DataError(f"{lock} is held by another process for more than {_LOCK_SECONDS} s") from error
    return target


def read_records(folder: Path | str | None = None, **filters: object) -> pd.DataFrame:
    """Read the record.

    Parameters
    ----------
    folder
        Where ``summary.parquet`` is; ``reports/metrics`` if None.
    **filters
        Column to the value, or the list of values, that rows must have.

    Returns
    -------
    DataFrame
        Columns of :data:`SCHEMA`, sorted by key; no rows if nothing matches.

    Raises
    ------
    ConfigError
        If a filter names no column.
    DataError
        If there is no record yet, or it cannot be read.
    """
    unknown = sorted(set(filters) - set(COLUMNS))
    if unknown:
        raise ConfigError(f"no column {', '.join(unknown)} in the record: columns are {', '.join(COLUMNS)}")
    target = _folder(folder) / "summary.parquet"
    if not target.is_file():
        raise DataError(f"{target} does not exist: no run has recorded a result there yet")
    records: pd.DataFrame = _read(target).to_pandas()
    for column, wanted in filters.items():
        values = list(wanted) if isinstance(wanted, list | tuple | set | frozenset) else [wanted]
        records = records[records[column].isin(values)]
    return records.reset_index(drop=True)


def check_comparable(records: pd.DataFrame, among: Sequence[str] = ("study", "dataset")) -> None:
    """Refuse records that would set errors on different frames side by side under one name.

    Parameters
    ----------
    records
        As :func:`read_records` returns, as many as are to be compared.
    among
        Columns whose values stand for one comparison.

    Raises
    ------
    DataError
        If, for one seed and part, the data or the frames differ; the sentence says which, and how to tell them apart.
    """
    records = _with_identity(records)
    for key, group in records.groupby([*among, "seed", "split"], sort=False):
        for column, word in (("data_hash", "data"), ("part_hash", "split")):
            if group[column].nunique() < 2:
                continue
            firsts = group.drop_duplicates(column).head(2)
            two = [
                f"{row['recipe']!r} ({column} {row[column][:12]}"
                + (f", {row['split_method']}, {row['n_train']} training frames)" if word == "split" else ")")
                for row in firsts.to_dict("records")
            ]
            named = ", ".join(f"{name} {value!r}" for name, value in zip([*among, "seed"], key, strict=False))
            raise DataError(
                f"errors on the {key[-1]} part cannot be compared, as the {word} under one name differ: {named}: "
                f"{' and '.join(two)}; record them under different studies (--record), choose one with "
                f"read_records(..., {column}=...), or name them apart with told_apart"
            )


def told_apart(records: pd.DataFrame) -> pd.DataFrame:
    """Return records in which the data set's name says what it hides, where errors could be mixed up by it.

    Parameters
    ----------
    records
        As :func:`read_records` returns.

    Returns
    -------
    DataFrame
        The same rows; where one name stands for several data, splits or start models, it is followed by what tells them
        apart, ``"urea (blocks)"``, and :func:`comparison_table` gives each of them rows of its own.
    """
    records = _with_identity(records)
    cell = ["study", "dataset", "seed", "split"]
    for column, word in (("data_hash", "data"), ("split_method", ""), ("part_hash", "frames"), ("start_hash", "start")):
        kind = "part_hash" if column == "split_method" else column
        counts = records.groupby(cell)[kind].transform("nunique")
        if column == "start_hash":
            counts = pd.Series(_disagreeing(records, NAMES), index=records.index).astype(int) + 1
        mixed = records.loc[counts > 1, ["study", "dataset"]].apply(tuple, axis=1).unique()
        for study, dataset in mixed:
            rows = (records["study"] == study) & (records["dataset"] == dataset)
            if records.loc[rows, column].nunique() > 1:
                text = records.loc[rows, column].map(lambda value, word=word: f"{word} {value[:8] if word else value}")
                records.loc[rows, "dataset"] = dataset + " (" + text.str.strip() + ")"
    return records


def comparison_table(records: pd.DataFrame, split: str = "test") -> pd.DataFrame:
    """Arrange records as tables 4.2 and 4.6 of the thesis: a row per recipe, energy and force errors beside it.

    Parameters
    ----------
    records
        As :func:`read_records` returns; quantities that the table does not show are ignored.
    split
        The part of the data the errors are of.

    Returns
    -------
    DataFrame
        A row per study, data set, start model, recipe (in the order of :data:`RECIPES`) and number of training frames,
        with ``n_seeds`` and, averaged over the seeds, ``F vector (eV/A)``, ``F component (eV/A)`` and ``E (meV/atom)``.
        A column with ``spread`` after each name is the sample standard deviation over the seeds, NaN where there is one
        seed only.

    Raises
    ------
    DataError
        If there is nothing to show, a quantity has another unit than the table, or errors on different data, frames or
        start models have one name (:func:`check_comparable`).
    """
    groups = ["study", "dataset", "start_model", "recipe", "n_train"]
    shown = records[(records["split"] == split) & records["quantity"].isin(list(_TABLE))]
    if shown.empty:
        raise DataError(f"no energy or force errors of the {split!r} part among {len(records)} records")
    for quantity, (_, unit, _) in _TABLE.items():
        found = set(shown.loc[shown["quantity"] == quantity, "unit"]) - {unit}
        if found:
            raise DataError(f"{quantity} is recorded in {', '.join(sorted(found))}, not {unit}")
    check_comparable(shown)
    shown = one_of_each(shown)
    values = shown.groupby([*groups, "quantity"])["value"]
    mean, spread = values.mean().unstack("quantity"), values.std().unstack("quantity")
    table = shown.groupby(groups)["seed"].nunique().rename("n_seeds").to_frame()
    for quantity, (title, _, factor) in _TABLE.items():
        table[title] = mean[quantity] * factor if quantity in mean else math.nan
        table[f"{title} spread"] = spread[quantity] * factor if quantity in spread else math.nan
    table = table.reset_index()
    rank = {recipe: f"{i:03d}" for i, recipe in enumerate(RECIPES)}
    order = table["recipe"].map(lambda recipe: (rank.get(recipe, "999"), recipe))
    return (
        table.assign(order=order)
        .sort_values(["study", "dataset", "start_model", "order", "n_train"])
        .drop(columns="order")
        .reset_index(drop=True)
    )


def one_of_each(records: pd.DataFrame) -> pd.DataFrame:
    """Keep one row of those that say the same: a start model comes with every run, borrowed elements or not.

    Raises
    ------
    DataError
        If rows of one name say different things, as two start models of one name do.
    """
    records = _with_identity(records)
    wrong = _disagreeing(records, NAMES)
    if wrong.any():
        row = records[wrong].iloc[0]
        same = records[wrong & (records[[*NAMES, "quantity"]] == row[[*NAMES, "quantity"]]).all(axis=1)]
        hashes = ", ".join(sorted(set(same["start_hash"])))
        raise DataError(
            f"study {row['study']!r}, {row['dataset']}: {row['recipe']!r} with seed {row['seed']} is recorded for "
            f"several start models of the name {row['start_model']} (start_hash {hashes}), "
            "which differ in weights or borrowed elements; record them under different studies (--record), choose one "
            "with read_records(..., start_hash=...), or name them apart with told_apart"
        )
    return records.drop_duplicates([*NAMES, "quantity"], keep="last")


def _disagreeing(records: pd.DataFrame, names: Sequence[str]) -> NDArray[np.bool_]:
    """Tell for each row whether others of its name and quantity have another value, to four digits."""
    groups = records.groupby([*names, "quantity"])["value"]
    largest, smallest = groups.transform("max"), groups.transform("min")
    result: NDArray[np.bool_] = (largest - smallest > 1e-4 * np.maximum(largest.abs(), smallest.abs())).to_numpy()
    return result


def _with_identity(records: pd.DataFrame) -> pd.DataFrame:
    """Return a copy in which rows of earlier versions say that they do not know."""
    return records.assign(**{name: UNKNOWN for name in IDENTITY if name not in records})


def format_comparison(table: pd.DataFrame) -> pd.DataFrame:
    """Return a comparison table as text for a README or a notebook.

    Parameters
    ----------
    table
        As :func:`comparison_table` returns.

    Returns
    -------
    DataFrame
        Strings, ``mean ± spread`` where there are several seeds, ``-`` where there is no value; the columns that tell
        studies, data sets, start models and training-set sizes apart are kept only where they differ.
    """
    text = pd.DataFrame({"recipe": table["recipe"]})
    for column in ("n_train", "start_model", "dataset", "study"):
        # start models have seen no frames, so their zero says nothing that the recipe does not
        trained = table.loc[table["n_train"] > 0, column] if column == "n_train" else table[column]
        if trained.nunique() > 1:
            text.insert(0, column, table[column].astype(str))
    for title, _, factor in _TABLE.values():
        digits = 4 if factor == 1.0 else 2
        text[title] = [
            _with_spread(mean, spread, digits)
            for mean, spread in zip(table[title], table[f"{title} spread"], strict=True)
        ]
    return text


def _with_spread(mean: float, spread: float, digits: int) -> str:
    if math.isnan(mean):
        return "-"
    return f"{mean:.{digits}f}" if math.isnan(spread) else f"{mean:.{digits}f} ± {spread:.{digits}f}"


def _folder(folder: Path | str | None) -> Path:
    return reports_dir() / "metrics" if folder is None else Path(folder)


def _cell(row: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(row[name] for name in CELL)


def _checked(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return the row with plain Python values in the order of the columns."""
    row = dict.fromkeys(IDENTITY, UNKNOWN) | dict(row)
    missing, unknown = set(COLUMNS) - set(row), set(row) - set(COLUMNS)
    if missing or unknown:
        problems = [
            f"{verb} {', '.join(sorted(map(str, names)))}"
            for verb, names in (("lacks", missing), ("has unknown", unknown))
            if names
        ]
        raise ConfigError(f"record {dict(row)} {' and '.join(problems)}: columns are {', '.join(COLUMNS)}")
    checked: dict[str, Any] = {}
    for field in SCHEMA:
        name, value = field.name, row[field.name]
        if field.type == pa.string():
            if not isinstance(value, str) or not value:
                raise DataError(f"record of {row['quantity']!r}: {name} must be text that is not empty, got {value!r}")
            checked[name] = value
        elif field.type == pa.int64():
            if isinstance(value, bool) or not isinstance(value, Integral) or int(value) < 0:
                raise DataError(f"record of {row['quantity']!r}: {name} must be an integer >= 0, got {value!r}")
            checked[name] = int(value)
        else:
            if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value):
                raise DataError(f"record of {row['quantity']!r}: {name} must be a finite number, got {value!r}")
            checked[name] = float(value)
    return checked


def _read(target: Path) -> pa.Table:
    try:
        table = pq.read_table(target)
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(f"{target} cannot be read as Parquet: {error}") from error
    earlier = [name for name in COLUMNS if name not in IDENTITY]
    if table.schema.names == earlier:
        for name in IDENTITY:
            table = table.append_column(SCHEMA.field(name), pa.array([UNKNOWN] * len(table), pa.string()))
    if table.schema.names != list(COLUMNS) or table.schema.types != SCHEMA.types:
        raise DataError(f"{target} is not a record of results: its columns are {', '.join(table.schema.names)}")
    return table
