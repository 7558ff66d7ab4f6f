"""Profiles of the study: which notebooks run, in which order, with which parameters.

A profile is an ordered list of notebooks, parameters for each, and one pinned start model. ``smoke`` is every notebook
with the defaults of its ``parameters`` cell; any other profile is a folder ``notebooks/profiles/<profile>`` with one
``<notebook>.yml`` for every notebook it runs.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nbformat
import yaml
from pydantic import TypeAdapter, ValidationError

from tlmc.errors import ConfigError
from tlmc.files import listed
from tlmc.paths import project_root

Parameter = str | int | float | bool

SMOKE = "smoke"


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


def available_profiles() -> tuple[str, ...]:
    """Return the names of the profiles, ``smoke`` first."""
    folders = listed(project_root() / "notebooks" / "profiles", "*/")
    return (SMOKE, *sorted(folder.name for folder in folders if listed(folder, "*.yml")))


def notebook_defaults(notebook: Path) -> dict[str, Parameter]:
    """Return the parameters of a notebook with the values of its ``parameters`` cell.

    Raises
    ------
    ConfigError
        If the notebook does not have exactly one such cell, or the cell holds anything but ``name = literal`` lines.
    """
    tagged = [cell for cell in read_notebook(notebook).cells if "parameters" in cell.metadata.get("tags", [])]
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
    files = profile_files(folder, name)
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


def read_step(notebook: Path, changes_file: Path) -> Step:
    """Read the parameters of one notebook from a YAML file of ``name: value`` lines.

    Raises
    ------
    ConfigError
        If the file does not exist or is no such file, or names a parameter that the notebook lacks or a value of
        another type.
    """
    defaults = notebook_defaults(notebook)
    checked = _checked(_read_changes(changes_file), defaults, notebook.stem, changes_file)
    return Step(notebook, checked, defaults | checked)


def read_notebook(notebook: Path) -> Any:
    """Read a notebook.

    Raises
    ------
    ConfigError
        If it does not exist or is not a notebook.
    """
    if not notebook.is_file():
        raise ConfigError(f"{notebook} does not exist")
    try:
        return nbformat.read(notebook, as_version=4)
    except nbformat.reader.NotJSONError as error:
        raise ConfigError(f"{notebook} is not a notebook: {error}") from error


def profile_files(folder: Path, name: str) -> dict[str, Path | None]:
    """Return the notebooks of a profile in order, each with the file of its changes."""
    if name == SMOKE:
        found: dict[str, Path | None] = {path.stem: None for path in listed(folder, "[0-9]*.ipynb")}
    else:
        found = {path.stem: path for path in listed(folder / "profiles" / name, "*.yml")}
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
    except FileNotFoundError as error:
        raise ConfigError(f"{path} does not exist") from error
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
