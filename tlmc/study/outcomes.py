"""What a notebook leaves behind: metrics, by which it counts as complete, and a record of the run that wrote them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import TypeAdapter

from tlmc.data.dataset import dataset_facts
from tlmc.errors import ConfigError
from tlmc.files import sha256_file, write_json
from tlmc.paths import reports_dir
from tlmc.provenance import git_revision, package_versions

if TYPE_CHECKING:
    from tlmc.data.dataset import Dataset
    from tlmc.potentials.model import Potential


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
    datasets: list[dict[str, Any]] = field(default_factory=list)
    """What is known of each set that the notebook's parameters name (`dataset_facts`)."""


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
        content["dataset"] = dataset_facts(dataset)
    if model is not None:
        content["start_model"] = {"name": model.name, "fingerprint": model.fingerprint}
    content |= {"versions": package_versions(), "git_revision": git_revision()}
    target = metrics_file(reports_dir(), notebook)
    try:
        write_json(target, content)
    except ValueError as error:
        raise ConfigError(f"{notebook}: a metric is not a finite number: {error}") from error
    return target


def read_record(reports: Path, profile: str, notebook: str) -> Record | None:
    """Return what is kept of a complete notebook.

    None if it has not been completed, or if another run has replaced its metrics since (profiles share the file).
    """
    path, metrics = record_file(reports / "executed" / profile, notebook), metrics_file(reports, notebook)
    if not (path.is_file() and metrics.is_file()):
        return None
    record = TypeAdapter(Record).validate_json(path.read_bytes())
    return record if record.metrics == sha256_file(metrics) else None


def read_metrics(reports: Path, notebook: str) -> dict[str, Any]:
    """Return the content of a notebook's metrics file."""
    content: dict[str, Any] = json.loads(metrics_file(reports, notebook).read_text(encoding="utf-8"))
    return content


def metrics_file(reports: Path, notebook: str) -> Path:
    """Return where a notebook writes its metrics; all profiles share the file."""
    return reports / "metrics" / f"{notebook.partition('_')[0]}.json"


def record_file(executed: Path, notebook: str) -> Path:
    """Return where the record of a complete notebook is kept, beside the executed notebook."""
    return executed / f"{notebook}.json"
