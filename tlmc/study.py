"""The study: profiles of notebooks and parameters, run headless with papermill.

A profile is an ordered list of notebooks, parameters for each, and one pinned start model. ``smoke`` is every notebook
with the defaults of its ``parameters`` cell; any other profile is a folder ``notebooks/profiles/<profile>`` with one
``<notebook>.yml`` for every notebook it runs.

A notebook is complete only when it has written ``metrics/<NN>.json``, its last act: a kernel that was killed leaves a
notebook that looks fine. A complete notebook is not run again while its source, its parameters, the code, the data, the
start model and the results of the notebooks before it are the same.
"""

from __future__ import annotations

import ast
import hashlib
import json
import logging
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import nbformat
import yaml
from pydantic import TypeAdapter, ValidationError

from tlmc.errors import ConfigError, StudyError
from tlmc.files import sha256_file, write_json
from tlmc.paths import project_root, reports_dir
from tlmc.provenance import code_hash, git_revision, package_versions

if TYPE_CHECKING:
    from tlmc.datasets import Dataset
    from tlmc.potentials.model import Potential

log = logging.getLogger(__name__)

Parameter = str | int | float | bool

SMOKE = "smoke"
START_TIMEOUT = 300
"""Seconds a kernel may take to start."""
EXECUTION_TIMEOUT = 7200
"""Seconds a cell may take."""

# run by every kernel: nobody watches a progress bar, so training says a line per epoch
_STARTUP = """
import logging
logging.getLogger("tlmc.training").setLevel(logging.INFO)
logging.getLogger("tlmc.training").addHandler(logging.StreamHandler())
del logging
"""


@dataclass(frozen=True)
class Step:
    """One notebook of a profile."""

    notebook: Path
    changes: dict[str, Parameter]
    """Parameters that differ from, or repeat, the defaults; of the defaults' types."""
    parameters: dict[str, Parameter]
    """All parameters, defaults included."""

    @property
    def name(self) -> str:
        """File name without suffix, ``07_fine_tuning``."""
        return self.notebook.stem


@dataclass(frozen=True)
class Profile:
    """An ordered list of notebooks with their parameters."""

    name: str
    steps: tuple[Step, ...]
    start_model: str
    """The one start model all notebooks use; ``""`` if none of them names one."""


@dataclass(frozen=True)
class Record:
    """What is kept of a complete notebook, beside the executed notebook."""

    inputs: str
    """SHA-256 over everything the result depends on."""
    metrics: str
    """SHA-256 of the metrics file that this run wrote."""
    seconds: float
    finished: str
    """Local time, ISO 8601."""


def available_profiles() -> tuple[str, ...]:
    """Return the names of the profiles, ``smoke`` first."""
    folders = (project_root() / "notebooks" / "profiles").glob("*/")
    return (SMOKE, *sorted(folder.name for folder in folders if any(folder.glob("*.yml"))))


def notebook_defaults(notebook: Path) -> dict[str, Parameter]:
    """Return the parameters of a notebook with the values of its ``parameters`` cell.

    Raises
    ------
    ConfigError
        If the notebook does not have exactly one such cell, or the cell holds anything but ``name = literal`` lines.
    """
    tagged = [cell for cell in _read(notebook).cells if "parameters" in cell.metadata.get("tags", [])]
    if len(tagged) != 1:
        raise ConfigError(f"{notebook}: expected one cell tagged 'parameters', found {len(tagged)}")
    defaults: dict[str, Parameter] = {}
    for statement in ast.parse(tagged[0].source).body:
        line = ast.unparse(statement)
        if not (
            isinstance(statement, ast.Assign)
            and len(statement.targets) == 1
            and isinstance(statement.targets[0], ast.Name)
        ):
            raise ConfigError(f"{notebook}: the parameters cell may hold only 'name = literal', got {line!r}")
        try:
            value = ast.literal_eval(statement.value)
        except ValueError as error:
            raise ConfigError(f"{notebook}: the parameters cell may hold only literals, got {line!r}") from error
        if not isinstance(value, Parameter):
            raise ConfigError(f"{notebook}: a parameter is a str, int, float or bool, got {line!r}")
        defaults[statement.targets[0].id] = value
    return defaults


def load_profile(
    name: str, notebooks: Sequence[str] | None = None, parameters: Mapping[str, Parameter] | None = None
) -> Profile:
    """Read a profile and check every parameter against the notebooks before anything runs.

    Parameters
    ----------
    name
        ``smoke`` or a folder of ``notebooks/profiles``.
    notebooks
        The notebooks to keep, by name or number (``"07_fine_tuning"`` or ``"07"``); all of the profile if None.
    parameters
        Values that replace those of the profile in every notebook that has such a parameter.

    Raises
    ------
    ConfigError
        If the profile, a notebook or a parameter does not exist, a value has the wrong type, or two notebooks name
        different start models.
    """
    folder = project_root() / "notebooks"
    files = _profile_files(folder, name)
    if notebooks is not None:
        files = _selected(files, notebooks, name)
    overrides = dict(parameters or {})
    steps = []
    for notebook, changes_file in files.items():
        defaults = notebook_defaults(folder / f"{notebook}.ipynb")
        changes = _read_changes(changes_file) if changes_file else {}
        if name != SMOKE and "profile_name" in defaults:
            changes["profile_name"] = name
        changes |= {key: value for key, value in overrides.items() if key in defaults}
        checked = _checked(changes, defaults, notebook, changes_file)
        steps.append(Step(folder / f"{notebook}.ipynb", checked, defaults | checked))
    unknown = sorted(key for key in overrides if not any(key in step.parameters for step in steps))
    if unknown:
        known = sorted({key for step in steps for key in step.parameters})
        raise ConfigError(f"no notebook of this run has a parameter {', '.join(unknown)}; they have {', '.join(known)}")
    models = {step.name: str(step.parameters["start_model"]) for step in steps if "start_model" in step.parameters}
    if len(set(models.values())) > 1:
        listed = ", ".join(f"{notebook}: {model}" for notebook, model in models.items())
        raise ConfigError(f"profile {name!r} must name one start model, its notebooks name several ({listed})")
    return Profile(name, tuple(steps), next(iter(models.values()), ""))


def run_study(
    profile: str = "laptop",
    notebooks: Sequence[str] | None = None,
    *,
    parameters: Mapping[str, Parameter] | None = None,
    output: Path | None = None,
    force: bool = False,
) -> Path:
    """Run the notebooks of a profile in order and write the report.

    Everything that can be checked is checked first: the profile, its parameters, the start model (fetched if need be)
    and the data sets. Executed notebooks go to ``<output>/executed/<profile>``.

    Parameters
    ----------
    profile, notebooks, parameters
        See :func:`load_profile`.
    output
        The reports folder; ``reports/`` of the checkout (or ``TLMC_REPORTS_DIR``) if None.
    force
        Run notebooks again that are complete and unchanged.

    Returns
    -------
    Path
        ``index.html``, the front page of the report.

    Raises
    ------
    ConfigError
        If the profile or a parameter is wrong; nothing has run then.
    DataError, ModelError
        If a data set or the start model cannot be had; nothing has run then.
    StudyError
        If a notebook fails, or ends without writing its metrics.
    """
    from tlmc.report import write_report

    loaded = load_profile(profile, notebooks, _with_absolute_files(parameters or {}))
    reports = (output or reports_dir()).resolve()
    executed = reports / "executed" / profile
    inputs = _shared_inputs(loaded)
    order = list(_profile_files(project_root() / "notebooks", profile))
    with _kernel_environment(reports):
        for step in loaded.steps:
            earlier = order[: order.index(step.name)]
            digest = _digest(step, inputs, [_metrics_file(reports, notebook) for notebook in earlier])
            record = read_record(reports, profile, step.name)
            if not force and record is not None and record.inputs == digest:
                log.info("%s: complete and unchanged, not run again", step.name)
                continue
            _run_step(step, digest, reports, executed)
    return write_report(loaded, reports)


def write_metrics(
    notebook: str,
    metrics: Mapping[str, Any],
    dataset: Dataset | None = None,
    model: Potential | None = None,
) -> Path:
    """Write ``metrics/<NN>.json``, the last act of every notebook, by which it counts as complete.

    Parameters
    ----------
    notebook
        Name of the notebook, beginning with its number (``"07_fine_tuning"``).
    metrics
        Its results: names to numbers, texts, or nested mappings of them, with the unit in the name or value.
    dataset
        The data it used; name, source, number of frames and hash are kept.
    model
        The start model it used; name and fingerprint are kept.

    Returns
    -------
    Path
        The file.

    Raises
    ------
    ConfigError
        If the name has no number, or a value is not finite.
    """
    number, _, rest = notebook.partition("_")
    if not (number.isdigit() and rest):
        raise ConfigError(f"a notebook is named like '07_fine_tuning', got {notebook!r}")
    content: dict[str, Any] = {"notebook": notebook, "metrics": metrics}
    if dataset is not None:
        content["dataset"] = {
            "name": dataset.name,
            "source": dataset.source,
            "level_of_theory": dataset.level_of_theory,
            "frames": len(dataset),
            "hash": dataset.hash,
        }
    if model is not None:
        content["start_model"] = {"name": model.name, "fingerprint": model.fingerprint}
    content |= {"versions": package_versions(), "git_revision": git_revision()}
    target = _metrics_file(reports_dir(), notebook)
    try:
        write_json(target, content)
    except ValueError as error:
        raise ConfigError(f"{notebook}: a metric is not a finite number: {error}") from error
    return target


def read_record(reports: Path, profile: str, notebook: str) -> Record | None:
    """Return what is kept of a complete notebook.

    None if it has not been completed, or if another run has replaced its metrics since (profiles share the file).
    """
    path, metrics = _record_file(reports / "executed" / profile, notebook), _metrics_file(reports, notebook)
    if not (path.is_file() and metrics.is_file()):
        return None
    record = TypeAdapter(Record).validate_json(path.read_bytes())
    return record if record.metrics == sha256_file(metrics) else None


def read_metrics(reports: Path, notebook: str) -> dict[str, Any]:
    """Return the content of a notebook's metrics file."""
    content: dict[str, Any] = json.loads(_metrics_file(reports, notebook).read_text(encoding="utf-8"))
    return content


def _read(notebook: Path) -> Any:
    if not notebook.is_file():
        raise ConfigError(f"{notebook} does not exist")
    try:
        return nbformat.read(notebook, as_version=4)
    except nbformat.reader.NotJSONError as error:
        raise ConfigError(f"{notebook} is not a notebook: {error}") from error


def _profile_files(folder: Path, name: str) -> dict[str, Path | None]:
    """Return the notebooks of a profile in order, each with the file of its changes."""
    if name == SMOKE:
        found: dict[str, Path | None] = {path.stem: None for path in sorted(folder.glob("[0-9]*.ipynb"))}
    else:
        found = {path.stem: path for path in sorted((folder / "profiles" / name).glob("*.yml"))}
    if not found:
        raise ConfigError(f"no profile {name!r}: there are {', '.join(available_profiles())}")
    return found


def _selected(files: dict[str, Path | None], notebooks: Sequence[str], profile: str) -> dict[str, Path | None]:
    unknown = [wanted for wanted in notebooks if not any(_is_named(name, wanted) for name in files)]
    if unknown:
        raise ConfigError(f"profile {profile!r} has no notebook {', '.join(unknown)}; it has {', '.join(files)}")
    return {name: path for name, path in files.items() if any(_is_named(name, wanted) for wanted in notebooks)}


def _is_named(name: str, wanted: str) -> bool:
    return wanted.removesuffix(".ipynb") in (name, name.partition("_")[0])


def _read_changes(path: Path) -> dict[str, Parameter]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError(f"{path} must hold 'name: value' lines, got {content!r}")
    return {str(key): value for key, value in content.items()}


def _checked(
    changes: Mapping[str, Parameter], defaults: Mapping[str, Parameter], notebook: str, source: Path | None
) -> dict[str, Parameter]:
    """Return the changes with the types of the defaults (YAML reads ``1e-3`` as text)."""
    where = f"{source} ({notebook})" if source else notebook
    checked: dict[str, Parameter] = {}
    for key, value in changes.items():
        if key not in defaults:
            raise ConfigError(f"{where}: unknown parameter {key!r}; the notebook has {', '.join(defaults)}")
        kind = type(defaults[key])
        if isinstance(value, bool) and kind is not bool:
            raise ConfigError(f"{where}: {key} must be of type {kind.__name__}, got {value!r}")
        try:
            checked[key] = TypeAdapter(kind).validate_python(value)
        except ValidationError as error:
            raise ConfigError(f"{where}: {key} must be of type {kind.__name__}, got {value!r}") from error
    return checked


def _with_absolute_files(parameters: Mapping[str, Parameter]) -> dict[str, Parameter]:
    """Make a data file that is named from the shell's folder findable from the notebooks' folder."""
    result = dict(parameters)
    dataset = result.get("dataset")
    if isinstance(dataset, str) and Path(dataset).is_file():
        result["dataset"] = str(Path(dataset).resolve())
    return result


def _shared_inputs(profile: Profile) -> dict[str, str]:
    """Fetch the start model and load the data sets, so that what is missing is said before anything runs.

    Returns the code's, the model's and the data sets' fingerprints.
    """
    from tlmc.datasets import load_dataset
    from tlmc.potentials.pretrained import StartModelName, load_start_model

    inputs = {"code": code_hash(), "versions": json.dumps(package_versions())}
    if profile.start_model:
        log.info("start model %s", profile.start_model)
        model = load_start_model(cast(StartModelName, profile.start_model))
        inputs[f"start_model {profile.start_model}"] = model.fingerprint
    for name in sorted({str(step.parameters["dataset"]) for step in profile.steps if "dataset" in step.parameters}):
        inputs[f"dataset {name}"] = load_dataset(name).hash
    return inputs


def _digest(step: Step, shared: Mapping[str, str], earlier: Sequence[Path]) -> str:
    """Return the SHA-256 over everything the result of a notebook depends on."""
    used = {f"{key} {step.parameters[key]}" for key in ("dataset", "start_model") if key in step.parameters}
    content = {
        "source": [(cell.cell_type, cell.source) for cell in _read(step.notebook).cells],
        "parameters": step.parameters,
        "shared": {key: value for key, value in shared.items() if key in used or key in ("code", "versions")},
        "earlier": {path.name: sha256_file(path) for path in earlier if path.is_file()},
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _metrics_file(reports: Path, notebook: str) -> Path:
    return reports / "metrics" / f"{notebook.partition('_')[0]}.json"


def _record_file(executed: Path, notebook: str) -> Path:
    return executed / f"{notebook}.json"


@contextmanager
def _kernel_environment(reports: Path) -> Iterator[None]:
    """Set what the kernels inherit: the reports folder, this very interpreter, and none of the user's own start-up.

    A user's kernelspec named ``python3``, or a ``JUPYTER_PATH`` that holds one, could name another interpreter; the
    first folder of ``JUPYTER_PATH`` wins, so it is one with a kernelspec written here.
    """
    from ipykernel.kernelspec import write_kernel_spec

    with tempfile.TemporaryDirectory(prefix="tlmc-jupyter-") as folder:
        write_kernel_spec(str(Path(folder, "kernels", "python3")))
        startup = Path(folder, "ipython", "profile_default", "startup")
        startup.mkdir(parents=True)
        (startup / "00_log.py").write_text(_STARTUP, encoding="utf-8")
        changes = {
            "TLMC_REPORTS_DIR": str(reports),
            "JUPYTER_PATH": os.pathsep.join(filter(None, [folder, os.environ.get("JUPYTER_PATH")])),
            "IPYTHONDIR": str(Path(folder, "ipython")),
            "MPLBACKEND": "module://matplotlib_inline.backend_inline",
        }
        saved = {name: os.environ.get(name) for name in changes}
        os.environ.update(changes)
        try:
            yield
        finally:
            for name, value in saved.items():
                if value is None:
                    del os.environ[name]
                else:
                    os.environ[name] = value


def _run_step(step: Step, digest: str, reports: Path, executed: Path) -> None:
    """Execute one notebook; leave a record only if it wrote its metrics."""
    # papermill is slow to import and needed nowhere else
    import papermill
    from nbclient.exceptions import CellTimeoutError, DeadKernelError
    from papermill.exceptions import PapermillExecutionError
    from traitlets.config import Config

    executed.mkdir(parents=True, exist_ok=True)
    target, metrics = executed / step.notebook.name, _metrics_file(reports, step.name)
    _record_file(executed, step.name).unlink(missing_ok=True)
    before = _version(metrics)
    start = time.monotonic()
    log.info("%s: running", step.name)
    try:
        papermill.execute_notebook(
            step.notebook,
            target,
            parameters=step.changes,
            kernel_name="python3",
            cwd=step.notebook.parent,
            start_timeout=START_TIMEOUT,
            execution_timeout=EXECUTION_TIMEOUT,
            progress_bar=sys.stderr.isatty(),
            log_output=True,
            # others on this machine must not read the connection to the kernel
            config=Config({"KernelManager": {"transport_encryption": "auto"}}),
        )
    except PapermillExecutionError as error:
        first_line = error.source.strip().partition("\n")[0]
        raise StudyError(
            f"{step.name} failed in cell {error.cell_index} ({first_line}): {error.ename}: {error.evalue}; "
            f"the notebook up to there is {target}"
        ) from error
    except DeadKernelError as error:
        raise StudyError(f"{step.name}: the kernel died, as it does when memory runs out; see {target}") from error
    except CellTimeoutError as error:
        raise StudyError(f"{step.name}: a cell took longer than {EXECUTION_TIMEOUT} s; see {target}") from error
    seconds = time.monotonic() - start
    if _version(metrics) in (None, before):
        raise StudyError(f"{step.name} ended without writing {metrics}, so its results are not complete; see {target}")
    write_json(
        _record_file(executed, step.name),
        {
            "inputs": digest,
            "metrics": sha256_file(metrics),
            "seconds": round(seconds, 1),
            "finished": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        },
    )
    log.info("%s: complete in %.0f s", step.name, seconds)


def _version(path: Path) -> tuple[int, int] | None:
    """Return what changes whenever a file is replaced, even by the same bytes."""
    if not path.is_file():
        return None
    status = path.stat()
    return status.st_ino, status.st_mtime_ns
