"""The study: the notebooks of a profile, run headless with papermill.

A notebook is complete only when it has written ``metrics/<NN>.json``, its last act: a kernel that was killed leaves a
notebook that looks fine. A complete notebook is not run again while its source, its parameters, the code, the data, the
start model and the results of the notebooks before it are the same.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tlmc.data.dataset import dataset_facts
from tlmc.errors import ConfigError, StudyError
from tlmc.files import listed, sha256_file, write_json
from tlmc.paths import project_root, reports_dir
from tlmc.provenance import code_hash, package_versions
from tlmc.study.outcomes import metrics_file, read_record, record_file
from tlmc.study.profiles import Parameter, Profile, Step, load_profile, profile_files, read_notebook

if TYPE_CHECKING:
    from tlmc.data.dataset import Dataset

log = logging.getLogger(__name__)

START_TIMEOUT = 300
"""Seconds a kernel may take to start."""
EXECUTION_TIMEOUT = 7200
"""Seconds a cell may take."""

_DATA = ("dataset", "others", "crystals", "borrow_dataset", "crystal", "molecule", "molecule_set")
"""Parameters that name data: a set, several parted by commas, or a folder."""

_FOLDERS = ("TLMC_ROOT", "TLMC_CACHE_DIR", "TLMC_DATA_DIR", "TORCHANI_DATA_DIR")
"""Variables that name folders, besides the reports."""

# run by every kernel: nobody watches a progress bar, so training says a line per epoch
_STARTUP = """
import logging
logging.getLogger("tlmc.training").setLevel(logging.INFO)
logging.getLogger("tlmc.training").addHandler(logging.StreamHandler())
del logging
"""


def run_study(
    profile: str = "laptop",
    notebooks: Sequence[str] | None = None,
    *,
    parameters: Mapping[str, Parameter] | None = None,
    output: Path | None = None,
    force: bool = False,
    data: Path | None = None,
) -> Path:
    """Run the notebooks of a profile in order and write the report.

    Everything that can be checked is checked first: the profile, its parameters, the start model (fetched if need be)
    and the data sets. Executed notebooks go to ``<output>/executed/<profile>``.

    Parameters
    ----------
    profile, notebooks, parameters
        See :func:`load_profile`.
    output
        The reports folder, new, empty or one of an earlier study; ``reports/`` of the checkout (or
        ``TLMC_REPORTS_DIR``) if None, ``own/<folder>`` in it with `data`.
    force
        Run notebooks again that are complete and unchanged.
    data
        Folder of trajectories, ``27.traj``, ``28.traj``, ..., to study instead of the profile's data, by default in the
        notebooks about data, start models, training and evaluation only (05 to 09).

    Returns
    -------
    Path
        ``index.html``, the front page of the report.

    Raises
    ------
    ConfigError
        If the profile or a parameter is wrong, or the reports folder holds somebody's files; nothing has run then.
    DataError, ModelError
        If a data set or the start model cannot be had; nothing has run then.
    StudyError
        If a notebook fails, or ends without writing its metrics.
    """
    # slow to import: what the notebooks themselves use, and the page templates
    from tlmc.data.loading import load_dataset
    from tlmc.study.parameters import check_data, check_values
    from tlmc.study.report import write_report

    given, own = dict(parameters or {}), Path()
    if data is not None:
        notebooks = notebooks or _chapter_four(profile)
        given = {**_own_data(data, profile, notebooks, given), **given}
        own = Path("own", data.resolve().name)
    loaded = load_profile(profile, notebooks, _with_absolute_files(given))
    for step in loaded.steps:
        check_values(step.name, step.parameters)
    reports = (output or reports_dir() / own).resolve()
    _check_reports(reports, loaded, chosen=output is not None)
    executed = reports / "executed" / profile
    load = cache(load_dataset)
    inputs, facts = _shared_inputs(loaded, load)
    for step in loaded.steps:
        check_data(step.name, step.parameters, load)
    order = list(profile_files(project_root() / "notebooks", profile))
    with kernel_environment(reports):
        for step in loaded.steps:
            earlier = order[: order.index(step.name)]
            digest = _digest(step, inputs, [metrics_file(reports, notebook) for notebook in earlier])
            record = read_record(reports, profile, step.name)
            if not force and record is not None and record.inputs == digest:
                log.info("%s: complete and unchanged, not run again", step.name)
                continue
            _run_step(step, digest, reports, executed, [facts[name] for name in _sets(step)])
    return write_report(loaded, reports)


def _check_reports(reports: Path, profile: Profile, chosen: bool) -> None:
    """Refuse a folder in which a study would replace files that none has written.

    Parameters
    ----------
    chosen
        Whether the folder was named for this study; one that is the reports folder of all commands may hold more.
    """
    if reports.exists() and not reports.is_dir():
        raise ConfigError(f"{reports} is a file, not a folder: name a folder for the report")
    index, parts = reports / "index.html", listed(reports / "metrics", "[0-9]*.json")
    for path in (index, *(metrics_file(reports, step.name) for step in profile.steps)):
        if path.is_file() and not _is_of_a_study(path):
            raise ConfigError(f"{path} is not of a study, and this one would replace it: name another --output folder")
    known = [index, reports / "metrics" / "summary.parquet", *filter(_is_of_a_study, parts)]
    known += [*reports.glob("executed/*/*.ipynb"), *reports.glob("runs/*/run.json")]
    if chosen and listed(reports, "*") and not any(path.is_file() for path in known):
        raise ConfigError(f"{reports} holds files, but none of a study: name another --output folder, new or empty")


def _is_of_a_study(path: Path) -> bool:
    """Tell whether a front page, or the metrics of a notebook, were written by a study."""
    text = path.read_text(encoding="utf-8", errors="replace")
    if path.suffix == ".html":
        return "<title>tlmc: " in text
    try:
        content = json.loads(text)
    except json.JSONDecodeError:
        return False
    return isinstance(content, dict) and (not content or "notebook" in content)


def _chapter_four(profile: str) -> list[str]:
    """Return the notebooks of a profile that are about a user's data."""
    order = profile_files(project_root() / "notebooks", profile)
    return [name for name in order if "05" <= name[:2] <= "09"]


def _own_data(
    folder: Path, profile: str, notebooks: Sequence[str], given: Mapping[str, Parameter]
) -> Mapping[str, Parameter]:
    """Check the trajectories of a folder and return the parameters that make notebooks use them.

    Notebooks about one crystal get the thesis' own choice, 32, or the first.
    """
    from tlmc.data.loading import load_dataset
    from tlmc.potentials.registry import load_start_model
    from tlmc.thesis.casestudy import CaseStudy, borrowed_elements, crystal_files, leading, load_crystals, short_name

    files = [str(path.resolve()) for path in crystal_files(folder)]
    crystals = load_crystals(files)
    loaded = load_profile(profile, notebooks)
    first, mapping, lacking = leading(files), {}, []
    name = given.get("start_model", loaded.start_model)
    if name:
        start = load_start_model(str(name))
        # elements without a donor, and sets too small to split, are said here
        CaseStudy(start, crystals)
        mapping = borrowed_elements(start, load_dataset(first))
        lacking = [path for path, crystal in zip(files, crystals, strict=True) if borrowed_elements(start, crystal)]
    log.info("%s: %d crystals, notebooks about one use %s", folder, len(files), Path(first).name)
    values: dict[str, Parameter] = {
        "dataset": first,
        "others": ",".join(name for name in files if name != first),
        "crystals": str(folder.resolve()),
        "element_map": ", ".join(f"{new}={donor}" for new, donor in mapping.items()),
        "borrow_dataset": lacking[0] if lacking else "",
    }
    known = {key: value for step in loaded.steps for key, value in step.parameters.items()}
    if known.get("left_out") != "all":
        # a name of the profile's own data
        values["left_out"] = short_name(crystals[files.index(first)])
    return {key: value for key, value in values.items() if key in known}


def _with_absolute_files(parameters: Mapping[str, Parameter]) -> dict[str, Parameter]:
    """Make files and folders that are named from the shell's folder findable from the notebooks' folder."""
    result = dict(parameters)
    for key in set(_DATA) & set(result):
        text = str(result[key])
        # an empty text names no data, though its path is the present folder
        parts = [text] if text and Path(text).exists() else text.split(",")
        result[key] = ",".join(str(Path(part).resolve()) if part and Path(part).exists() else part for part in parts)
    return result


def _sets(step: Step) -> list[str]:
    """Return the data sets that the parameters of a notebook name, each once."""
    from tlmc.thesis.casestudy import sources

    texts = [str(step.parameters[key]) for key in _DATA if key in step.parameters]
    return list(dict.fromkeys(name for text in texts for name in sources(text)))


def _shared_inputs(
    profile: Profile, load: Callable[[str], Dataset]
) -> tuple[dict[str, str], dict[str, dict[str, Any]]]:
    """Fetch the start model and load the data sets, so that what is missing is said before anything runs.

    Returns the code's, the model's and the data sets' fingerprints, and what a report says of the sets.
    """
    from tlmc.potentials.registry import load_start_model

    inputs = {"code": code_hash(), "versions": json.dumps(package_versions())}
    if profile.start_model:
        log.info("start model %s", profile.start_model)
        model = load_start_model(profile.start_model)
        inputs[f"start_model {profile.start_model}"] = model.fingerprint
    facts = {}
    for name in dict.fromkeys(name for step in profile.steps for name in _sets(step)):
        facts[name] = dataset_facts(load(name))
        inputs[f"data {name}"] = facts[name]["hash"]
    return inputs, facts


def _digest(step: Step, shared: Mapping[str, str], earlier: Sequence[Path]) -> str:
    """Return the SHA-256 over everything the result of a notebook depends on."""
    used = {f"data {name}" for name in _sets(step)} | {f"start_model {step.parameters.get('start_model')}"}
    content = {
        "source": [(cell.cell_type, cell.source) for cell in read_notebook(step.notebook).cells],
        "parameters": step.parameters,
        "shared": {key: value for key, value in shared.items() if key in used or key in ("code", "versions")},
        "earlier": {path.name: sha256_file(path) for path in earlier if path.is_file()},
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


@contextmanager
def kernel_environment(reports: Path) -> Iterator[None]:
    """Set for a while what the kernels inherit: the folders, this very interpreter, and none of the user's start-up.

    A user's kernelspec named ``python3``, or a ``JUPYTER_PATH`` that holds one, could name another interpreter; the
    first folder of ``JUPYTER_PATH`` wins, so it is one with a kernelspec written here.
    """
    from ipykernel.kernelspec import write_kernel_spec

    with tempfile.TemporaryDirectory(prefix="tlmc-jupyter-") as folder:
        write_kernel_spec(str(Path(folder, "kernels", "python3")))
        startup = Path(folder, "ipython", "profile_default", "startup")
        startup.mkdir(parents=True)
        (startup / "00_log.py").write_text(_STARTUP, encoding="utf-8")
        # the kernel works in the notebooks' folder, from where a relative path leads elsewhere
        changes = {name: str(Path(os.environ[name]).resolve()) for name in _FOLDERS if os.environ.get(name)}
        changes |= {
            "TLMC_REPORTS_DIR": str(reports.resolve()),
            "JUPYTER_PATH": os.pathsep.join(filter(None, [folder, os.environ.get("JUPYTER_PATH")])),
            "IPYTHONDIR": str(Path(folder, "ipython")),
            "MPLBACKEND": "module://matplotlib_inline.backend_inline",
        }
        saved = {name: os.environ.get(name) for name in changes}
        try:
            os.environ.update(changes)
            yield
        finally:
            for name, value in saved.items():
                if value is None:
                    os.environ.pop(name, None)
                else:
                    os.environ[name] = value


def _run_step(step: Step, digest: str, reports: Path, executed: Path, datasets: Sequence[Mapping[str, Any]]) -> None:
    """Execute one notebook; leave a record only if it wrote its metrics."""
    target, metrics = executed / step.notebook.name, metrics_file(reports, step.name)
    record_file(executed, step.name).unlink(missing_ok=True)
    log.info("%s: running", step.name)
    seconds = execute_notebook(step, target, metrics)
    write_json(
        record_file(executed, step.name),
        {
            "inputs": digest,
            "metrics": sha256_file(metrics),
            "seconds": round(seconds, 1),
            "finished": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "datasets": list(datasets),
        },
    )
    log.info("%s: complete in %.0f s", step.name, seconds)


def execute_notebook(step: Step, target: Path, metrics: Path) -> float:
    """Execute one notebook headless, within a :func:`kernel_environment`.

    Parameters
    ----------
    step
        The notebook and its parameters.
    target
        Where the executed notebook goes.
    metrics
        The file that the notebook must write, its last act.

    Returns
    -------
    float
        Seconds it took.

    Raises
    ------
    StudyError
        If a cell fails or takes too long, the kernel dies, or the notebook ends without writing its metrics.
    """
    # papermill is slow to import and needed nowhere else
    import papermill
    from nbclient.exceptions import CellTimeoutError, DeadKernelError
    from papermill.exceptions import PapermillExecutionError
    from traitlets.config import Config

    target.parent.mkdir(parents=True, exist_ok=True)
    before = _version(metrics)
    start = time.monotonic()
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
    if _version(metrics) in (None, before):
        raise StudyError(f"{step.name} ended without writing {metrics}, so its results are not complete; see {target}")
    return time.monotonic() - start


def _version(path: Path) -> tuple[int, int] | None:
    """Return what changes whenever a file is replaced, even by the same bytes."""
    if not path.is_file():
        return None
    status = path.stat()
    return status.st_ino, status.st_mtime_ns
