"""Sweeps: many runs from one short description, carried out one by one by any scheduler.

A description (``notebooks/sweeps/*.yml``) names what all runs share and what varies. :func:`plan` turns it into one
parameters file per run, :func:`carry_out` executes the notebook ``10_single_run`` with one of them, :func:`collect`
gathers the results and names the runs that failed. A sweep's folder holds ::

    parameters/<run>.yml           the plan
    results/<run>/metrics.json     what a finished run found; written last
    results/<run>/error.txt        what stopped it
    results/<run>/inputs.txt       what the run depends on
    results/<run>/written_by_tlmc.txt  the files that the run wrote
    results/<run>/                 the executed notebook, figures, model and state of the training

Only files that are known to come from here are removed or replaced: those of ``written_by_tlmc.txt``, and parameters
files that are as they were planned. Nothing here knows who calls it: the ``Snakefile`` calls it for one core, a Slurm
cluster or Kubernetes alike.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import os
import platform
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import pandas as pd
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from tlmc.data.loading import available, local_file
from tlmc.equality import equal_by_content
from tlmc.errors import ConfigError, DataError, StudyError, problems_of
from tlmc.experiments.records import CELL, COLUMNS, IDENTITY, UNKNOWN, read_records
from tlmc.experiments.run import Run, make_run, read_yaml
from tlmc.files import WRITTEN_LIST, claim, listed, note_written, sha256_file, write_json, write_text
from tlmc.paths import project_root
from tlmc.provenance import package_versions, program_hash
from tlmc.study.outcomes import metrics_file, read_metrics
from tlmc.study.profiles import Parameter, Step, read_notebook, read_step
from tlmc.study.runner import execute_notebook, kernel_environment

NOTEBOOK = "10_single_run"
"""The notebook that a run executes."""

_HEADER = "# planned by tlmc: one run, parameters of the notebook 10_single_run; what it depends on: "
_BODY = "; these lines: "
"""Before the hash of the lines below, by which a file that was changed by hand is known."""
_WRITTEN = "written_by_tlmc.txt"
_TABLES = ("table.csv", "unfinished.csv")


class Sweep(BaseModel):
    """What a description says. Every entry of `runs` is combined with every point of `grid`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    study: str = Field(min_length=1)
    """Name that the results are filed under."""
    base: dict[str, Any] = Field(default_factory=dict)
    """What all runs share, fields of :class:`tlmc.experiments.run.Run`."""
    runs: list[dict[str, Any]] = Field([{}], min_length=1)
    """What belongs together, e.g. a data set and its element map."""
    grid: dict[str, Annotated[list[Any], Field(min_length=1)]] = Field(default_factory=dict)
    """Field to its values; all combinations are run. ``settings`` add to those of `base` and `runs`."""


@equal_by_content
@dataclass(frozen=True)
class Collected:
    """How a sweep stands."""

    finished: tuple[str, ...]
    failed: dict[str, str]
    """Run to the sentence that says what stopped it."""
    waiting: tuple[str, ...]
    """Runs that have not been tried."""
    records: pd.DataFrame
    """The test errors of the finished runs, columns of :data:`tlmc.experiments.records.SCHEMA`."""


def read_sweep(description: Path) -> tuple[str, list[Run]]:
    """Read a description.

    Returns
    -------
    str
        The name that results are filed under.
    list of Run
        All runs, each once.

    Raises
    ------
    ConfigError
        If the file is not a description, a run of it has an unknown or wrong field or setting, or two different runs
        have one name.
    DataError
        If a data set is neither a known name nor a file; files are looked for from the description's folder.
    """
    try:
        sweep = Sweep.model_validate(read_yaml(description))
    except ValidationError as error:
        raise ConfigError(f"{description}: {problems_of(error)}") from error
    runs: dict[str, Run] = {}
    for fields in _combinations(sweep):
        run = make_run(fields, f"{description}, run {fields}")
        if run.dataset not in available():
            try:
                path = local_file(description.parent / run.dataset)
            except DataError:
                path = local_file(run.dataset)  # its sentence has the nearest names
            run = run.model_copy(update={"dataset": str(path and path.resolve())})
        runs[run.slug] = run
    _check_names(list(runs.values()), description)
    return sweep.study, list(runs.values())


def _check_names(runs: Sequence[Run], description: Path) -> None:
    """Refuse runs that tables could not tell apart."""
    names: dict[tuple[Any, ...], Run] = {}
    for run in runs:
        other = names.setdefault((run.dataset, run.start_model, run.name, run.n_train, run.seed), run)
        if other is not run:
            ours, theirs = run.model_dump(), other.model_dump()
            different = ", ".join(
                f"{key} ({theirs[key]!r}, {ours[key]!r})" for key in ours if key != "label" and ours[key] != theirs[key]
            )
            raise ConfigError(
                f"{description}: two runs on {run.dataset} are both called {run.name!r}, seed {run.seed}, and differ "
                f"in {different or 'nothing but the label'}: give them labels of their own"
            )


def parameters_of(run: Run, study: str) -> dict[str, Parameter]:
    """Return the parameters of the notebook for a run: its fields, mappings as text."""
    parameters: dict[str, Parameter] = {"profile_name": study}
    for name, value in run:
        if name == "recipe":
            parameters["recipe_name"] = value
        elif name == "element_map":
            parameters[name] = ", ".join(f"{new}={donor}" for new, donor in value.items())
        elif isinstance(value, dict):
            parameters[name] = yaml.safe_dump(value, default_flow_style=True, width=1_000_000).strip()
        else:
            parameters[name] = value
    return parameters


def plan(description: Path, folder: Path) -> list[str]:
    """Write one parameters file per run of a description; files that would not change are left alone.

    The first line of a file holds :func:`inputs_hash`, so that it changes when its run must be repeated. Parameters
    files of an earlier plan whose runs are gone are removed; results are not.

    Parameters
    ----------
    description
        YAML file, see :class:`Sweep`.
    folder
        Folder of the sweep.

    Returns
    -------
    list of str
        Names of the runs.

    Raises
    ------
    ConfigError, DataError
        As :func:`read_sweep`, or if a parameters file was changed by hand; nothing is written then.
    """
    study, runs = read_sweep(description)
    texts = {}
    for run in runs:
        path = parameters_file(folder, run.slug)
        parameters = parameters_of(run, study)
        body = yaml.safe_dump(parameters, sort_keys=False, width=1_000_000)
        text = f"{_HEADER}{inputs_hash(parameters)}{_BODY}{_digest(body)}\n{body}"
        there = path.read_text(encoding="utf-8") if path.is_file() else text
        if not (_is_as_planned(there) or there.partition("\n")[2] == body):
            raise ConfigError(
                f"{path} is not as it was planned, and planning would undo the change: put it into {description}, or "
                "give the file another name"
            )
        if there != text or not path.is_file():
            texts[path] = text
    for path, text in texts.items():
        write_text(path, text)
    names = [run.slug for run in runs]
    for path in listed(parameters_file(folder, "").parent, "*.yml"):
        if path.stem not in names and _is_as_planned(path.read_text(encoding="utf-8")):
            path.unlink()
    return names


def carry_out(parameters: Path, folder: Path, device: str = "cpu") -> Path:
    """Execute the notebook for one run.

    A training that was interrupted goes on from its last epoch, unless code, notebook or data have changed since.

    Parameters
    ----------
    parameters
        A parameters file of a plan.
    folder
        Where the results go; this run's own.
    device
        Where to train; not part of the run, as the weights are the same to rounding.

    Returns
    -------
    Path
        ``metrics.json``: name and parameters of the run, seconds, host, test errors as the notebook reports them and
        as records, data, start model and versions.

    Raises
    ------
    ConfigError
        If the parameters are wrong.
    StudyError
        If the notebook fails; ``error.txt`` says the same.
    """
    # the kernel works in the notebook's folder
    parameters, folder = parameters.resolve(), folder.resolve()
    step = read_step(_notebook(), parameters)
    dataset = str(step.parameters["dataset"])
    if dataset not in available():
        file = local_file(dataset)
        dataset = str(file and file.resolve())
    step = replace(step, changes=step.changes | {"dataset": dataset})
    digest = inputs_hash(step.changes)
    begun = folder / "inputs.txt"
    claim(folder, [_WRITTEN], "a run of a sweep")
    if not (begun.is_file() and begun.read_text(encoding="utf-8").strip() == digest):
        _remove_written(folder)
    with _noted(folder / _WRITTEN):
        return _carry_out(step, parameters.stem, folder, digest, device)


def _carry_out(step: Step, name: str, folder: Path, digest: str, device: str) -> Path:
    """Execute the notebook in a folder that is the run's own."""
    write_text(folder / "inputs.txt", f"{digest}\n")
    step = replace(step, changes=step.changes | {"device": device})
    target, error_file = folder / "metrics.json", folder / "error.txt"
    target.unlink(missing_ok=True)
    # a process that is killed cannot say so any more
    write_text(error_file, "was begun and did not end: killed, out of memory or out of time\n")
    try:
        with kernel_environment(folder):
            executed = folder / f"{NOTEBOOK}.ipynb"
            note_written(executed)  # papermill's own writing is not
            seconds = execute_notebook(step, executed, metrics_file(folder, NOTEBOOK))
    except StudyError as error:
        write_text(error_file, f"{error}\n")
        raise
    content = read_metrics(folder, NOTEBOOK) | {
        "run": name,
        "parameters": step.parameters,
        "inputs": digest,
        "seconds": round(seconds, 1),
        "host": platform.node(),
        "slurm_job": os.environ.get("SLURM_JOB_ID", ""),
        "records": read_records(folder / "metrics").to_dict("records"),
    }
    error_file.unlink(missing_ok=True)
    write_json(target, content)
    return target


def collect(folder: Path) -> Collected:
    """Gather the results of a sweep and name the runs that failed.

    Raises
    ------
    ConfigError
        If the folder holds no plan.
    """
    files = listed(parameters_file(folder, "").parent, "*.yml")
    names = [path.stem for path in files if path.read_text(encoding="utf-8").startswith(_HEADER)]
    if not names:
        raise ConfigError(f"{folder} holds no parameters/*.yml: make a plan first (tlmc sweep plan)")
    finished, waiting, rows = [], [], []
    failed: dict[str, str] = {}
    for name in names:
        results = folder / "results" / name
        if (results / "metrics.json").is_file():
            finished.append(name)
            rows += json.loads((results / "metrics.json").read_text(encoding="utf-8"))["records"]
        elif (results / "error.txt").is_file():
            failed[name] = (results / "error.txt").read_text(encoding="utf-8").strip()
        else:
            waiting.append(name)
    # every run tells the errors of its start model: those of one split are one result
    records = pd.DataFrame(rows, columns=list(COLUMNS)).fillna(dict.fromkeys(IDENTITY, UNKNOWN))
    records = records.drop_duplicates([*CELL, "quantity"], keep="last")
    return Collected(tuple(finished), failed, tuple(waiting), records.reset_index(drop=True))


def write_table(table: pd.DataFrame, folder: Path, complete: bool) -> Path:
    """Write the table of a sweep: ``table.csv`` if all runs are finished, else ``unfinished.csv``.

    An ``unfinished.csv`` of this sweep goes when the table is complete.

    Raises
    ------
    ConfigError
        If a file of that name is there which is not such a table; it is left alone.
    """
    heading = ",".join(table.columns)
    for name in _TABLES:
        path = folder / name
        if path.is_file():
            with path.open(encoding="utf-8", errors="replace") as stream:
                if stream.readline().strip().split(",")[:3] != heading.split(",")[:3]:
                    raise ConfigError(f"{path} is not the table of a sweep: move it, or plan the sweep elsewhere")
    target = folder / _TABLES[0 if complete else 1]
    write_text(target, table.to_csv(index=False))
    if complete:
        (folder / _TABLES[1]).unlink(missing_ok=True)
    return target


def parameters_file(folder: Path, run: str) -> Path:
    """Return where the parameters of a run are."""
    return folder / "parameters" / f"{run}.yml"


def inputs_hash(parameters: Mapping[str, Parameter]) -> str:
    """Return the SHA-256 over all that the result of a run depends on.

    These are its parameters, the cells of the notebook, what the code does that a run uses, the versions of packages,
    and the data.

    Parameters
    ----------
    parameters
        Those of a parameters file.
    """
    dataset = str(parameters["dataset"])
    file = local_file(dataset)
    data = sha256_file(file) if file else available()[dataset]["sha256"]
    own = {"parameters": dict(parameters), "data": data}
    return hashlib.sha256(json.dumps(own | _shared_inputs(), sort_keys=True).encode()).hexdigest()


@functools.cache
def _shared_inputs() -> dict[str, Any]:
    """Return what all runs depend on; asked for hundreds of runs at a time."""
    return {
        "notebook": [cell.source for cell in read_notebook(_notebook()).cells if cell.cell_type == "code"],
        "program": program_hash("tlmc.experiments.run"),
        "versions": package_versions(),
    }


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _is_as_planned(text: str) -> bool:
    """Tell whether the text of a parameters file is one that :func:`plan` wrote, every line of it."""
    head, _, body = text.partition("\n")
    return head.startswith(_HEADER) and head.rpartition(_BODY)[2] == _digest(body)


@contextmanager
def _noted(target: Path) -> Iterator[None]:
    """Note the names of all files that are written meanwhile, by this process and its kernels, in a list."""
    saved = os.environ.get(WRITTEN_LIST)
    os.environ[WRITTEN_LIST] = str(target)
    try:
        target.touch()
        yield
    finally:
        if saved is None:
            os.environ.pop(WRITTEN_LIST, None)
        else:
            os.environ[WRITTEN_LIST] = saved


def _remove_written(folder: Path) -> None:
    """Remove what a run wrote into its folder, and the folders that are empty then; all else stays."""
    notes = folder / _WRITTEN
    if not notes.is_file():
        return
    names = dict.fromkeys(notes.read_text(encoding="utf-8").splitlines())
    for name in names:
        parent = (folder / name).parent.resolve()
        path = parent / Path(name).name
        # a list that was tampered with, or a link, must not lead elsewhere
        if parent.is_relative_to(folder) and (path.is_file() or path.is_symlink()):
            path.unlink()
            while parent != folder and not any(parent.iterdir()):
                parent.rmdir()
                parent = parent.parent
    notes.unlink()


def _notebook() -> Path:
    return project_root() / "notebooks" / f"{NOTEBOOK}.ipynb"


def _combinations(sweep: Sweep) -> Iterator[dict[str, Any]]:
    """Yield the fields of every run."""
    for fields in sweep.runs:
        for point in itertools.product(*sweep.grid.values()):
            varied: Mapping[str, Any] = dict(zip(sweep.grid, point, strict=True))
            parts = (sweep.base, fields, varied)
            merged: dict[str, Any] = {key: value for part in parts for key, value in part.items()}
            layers = [part["settings"] for part in parts if "settings" in part]
            wrong = [layer for layer in layers if not isinstance(layer, dict)]
            if wrong:
                merged["settings"] = wrong[0]  # refused where the run is made, not hidden by another layer
            elif layers:
                merged["settings"] = {key: value for layer in layers for key, value in layer.items()}
            yield merged
