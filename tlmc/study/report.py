"""The report of a study: one HTML page per executed notebook and a front page with tables and figures.

Every number on the front page is read from a file that the study wrote; figures are embedded, so that ``index.html``
can be opened from disk and sent on by itself.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator, Mapping
from datetime import datetime
from importlib.resources import files
from pathlib import Path
from typing import Any, Final

import jinja2
import nbformat
import pandas as pd
from nbconvert import HTMLExporter
from PIL import Image

from tlmc.errors import DataError
from tlmc.experiments.records import comparison_table, format_comparison, read_records, told_apart
from tlmc.files import write_json, write_text
from tlmc.study.outcomes import Record, read_metrics, read_record
from tlmc.study.profiles import Profile, load_profile

MEDIA_TYPES: Final = {".png": "image/webp", ".svg": "image/svg+xml"}
"""How figures are embedded; those for print are made smaller."""
LARGEST: Final = (1300, 2600)
"""Width and height, in pixels, that an embedded figure has at most: a page is seldom shown wider."""


def write_report(profile: Profile, reports: Path) -> Path:
    """Write the HTML pages of a profile's complete notebooks, and over all of them ``index.html``.

    What its first page says of run times, parameters, data, models and versions also goes to
    ``metrics/study_<profile>.json``, for other texts to quote.

    Parameters
    ----------
    profile
        The run that has just ended; the front page also shows the profile's other notebooks, if complete.
    reports
        Folder of ``metrics``, ``figures`` and ``executed/<profile>``.

    Returns
    -------
    Path
        ``<reports>/index.html``.
    """
    parameters = {step.name: step.parameters for step in load_profile(profile.name).steps}
    parameters |= {step.name: step.parameters for step in profile.steps}
    notebooks: list[dict[str, Any]] = []
    contents: list[dict[str, Any]] = []
    named: list[dict[str, Any]] = []
    missing: list[str] = []
    for name in sorted(parameters):
        record = read_record(reports, profile.name, name)
        if record is None:
            missing.append(name)
            continue
        content = read_metrics(reports, name)
        contents.append(content)
        named += [{"dataset": facts} for facts in record.datasets]
        notebooks.append(
            {
                "name": name,
                "seconds": record.seconds,
                "finished": record.finished,
                "parameters": parameters[name],
                "link": _write_page(reports / "executed" / profile.name, name).relative_to(reports).as_posix(),
                "metrics": dict(_flattened(content["metrics"])),
                "figures": list(_figures(reports / "figures", name, record)),
            }
        )
    table, no_table = _results(profile.name, reports)
    page = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined).from_string(
        files("tlmc.study").joinpath("report.html").read_text(encoding="utf-8")
    )
    first_page = {
        "seconds": round(sum(notebook["seconds"] for notebook in notebooks), 1),
        "finished": max((notebook["finished"] for notebook in notebooks), default="never"),
        "models": _distinct(contents, "start_model"),
        "datasets": _distinct(contents + named, "dataset"),
        "revisions": _distinct(contents, "git_revision"),
        "version_sets": _distinct(contents, "versions"),
    }
    text = page.render(
        profile=profile, notebooks=notebooks, missing=missing, table=table, no_table=no_table, **first_page
    )
    times = [{key: notebook[key] for key in ("name", "seconds", "finished", "parameters")} for notebook in notebooks]
    summary = {"profile": profile.name, "notebooks": times, "not_run": missing} | first_page
    write_json(reports / "metrics" / f"study_{profile.name}.json", summary)
    target = reports / "index.html"
    write_text(target, text)
    return target


def _write_page(executed: Path, name: str) -> Path:
    """Write the HTML page of an executed notebook, unless it is newer than the notebook, and return its path."""
    source, target = executed / f"{name}.ipynb", executed / "html" / f"{name}.html"
    if not target.is_file() or target.stat().st_mtime_ns < source.stat().st_mtime_ns:
        text, _ = HTMLExporter(embed_images=True).from_notebook_node(nbformat.read(source, as_version=4))
        write_text(target, text)
    return target


def _results(study: str, reports: Path) -> tuple[pd.DataFrame | None, str]:
    """Return the table of the study's test errors, or None and the sentence that says why there is none."""
    try:
        return format_comparison(comparison_table(told_apart(read_records(reports / "metrics", study=study)))), ""
    except DataError as error:
        return None, str(error)


def _flattened(metrics: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in metrics.items():
        if isinstance(value, Mapping):
            yield from _flattened(value, f"{prefix}{key}, ")
        else:
            yield f"{prefix}{key}", f"{value:.5g}" if isinstance(value, float) else str(value)


def _distinct(contents: list[dict[str, Any]], key: str) -> list[Any]:
    """Return the different values that the notebooks recorded, in their order."""
    found: list[Any] = []
    for content in contents:
        if key in content and content[key] not in found:
            found.append(content[key])
    return found


def _figures(folder: Path, notebook: str, record: Record) -> Iterator[dict[str, str]]:
    """Yield the figures that a run of a notebook wrote: its number in front, and not older than the run."""
    # file systems and the record's clock are good to a second
    began = datetime.fromisoformat(record.finished).timestamp() - record.seconds - 1.0
    for path in sorted(folder.glob(f"{notebook.partition('_')[0]}_*")):
        if path.suffix in MEDIA_TYPES and path.stat().st_mtime >= began:
            data = base64.b64encode(path.read_bytes() if path.suffix == ".svg" else _for_screen(path)).decode()
            name = path.stem.replace("_", " ")
            yield {"name": name, "source": f"data:{MEDIA_TYPES[path.suffix]};base64,{data}"}


def _for_screen(path: Path) -> bytes:
    """Return a figure as WebP, as large as a screen needs it: a tenth of what the file for print takes."""
    buffer = io.BytesIO()
    with Image.open(path) as image:
        image.thumbnail(LARGEST)
        image.save(buffer, "webp", quality=85)
    return buffer.getvalue()
