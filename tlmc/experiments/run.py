"""One run of a sweep as a small YAML file: which data, which start model, what differs from a recipe, which seed.

A sweep (ablations, several crystals, several seeds) is a list of runs. Each can be executed here, in this process, or
by any scheduler that hands a notebook the file's content as parameters.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from tlmc.data.dataset import Dataset
from tlmc.data.loading import load_dataset
from tlmc.data.splits import SplitMethod, only_crystals, shrunk, split_dataset
from tlmc.errors import ConfigError, problems_of
from tlmc.evaluation.forgetting import forgetting
from tlmc.experiments.experiment import Experiment, check_name, run_experiment
from tlmc.experiments.records import append_records, identity, rows_from_metrics
from tlmc.files import write_text
from tlmc.potentials.borrowing import Borrowing
from tlmc.potentials.model import Potential
from tlmc.potentials.registry import load_start_model
from tlmc.training.config import FinetuneConfig, recipe
from tlmc.training.identity import run_name, start_hash
from tlmc.training.replay import isolated_molecules

MOLECULES: Final = "molecules"
"""The part of the records that holds errors against the start model, on isolated molecules."""


class Run(BaseModel):
    """One fine-tuning of a sweep."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    dataset: str
    """Name or file, as `tlmc.data.loading.load_dataset` takes it."""
    crystals_only: bool = False
    """Leave isolated molecules out."""
    start_model: Literal["ani2x", "ani2xt"] = "ani2x"
    recipe: str = "short"
    settings: dict[str, Any] = Field(default_factory=dict)
    """What differs from the recipe, fields of :class:`tlmc.training.FinetuneConfig`; `seed` and the name of
    the recipe are fields of the run."""
    label: str = ""
    """Name that results are filed under; by default the recipe and what differs from it, in the data too."""
    n_train: int = Field(0, ge=0)
    """Training frames; 0 for the whole training part."""
    element_map: dict[str, str] = Field(default_factory=dict)
    """New element to donor."""
    borrow: Borrowing = "relabel"
    split: SplitMethod = "random"
    seed: int = Field(0, ge=0, lt=2**63)
    """Of split, training and choice of training frames."""
    trust_labels: bool = False
    """Train on labels that the start model shows to be wrong (:func:`tlmc.evaluation.label_check.check_labels`)."""

    @field_validator("settings")
    @classmethod
    def _check_settings(cls, settings: dict[str, Any]) -> dict[str, Any]:
        """Refuse what a field of the run would silently overrule."""
        for name in {"recipe", "seed"} & set(settings):
            raise ValueError(f"{name} is a field of the run, not one of its settings")
        return settings

    @property
    def name(self) -> str:
        """What results are filed under."""
        if self.label:
            return self.label
        words = [self.recipe, *(f"{key} {value}" for key, value in sorted(self.settings.items()))]
        words += ["crystals only"] if self.crystals_only else []
        words += [self.split] if self.split != "random" else []
        words += [f"{new}={donor}" for new, donor in self.element_map.items()]
        words += [self.borrow] if self.element_map and self.borrow != "relabel" else []
        return ", ".join(words)

    @property
    def config(self) -> FinetuneConfig:
        """The settings of the training.

        Raises
        ------
        ConfigError
            If the recipe or a setting is unknown or out of range.
        """
        return recipe(self.recipe, **(self.settings | {"recipe": self.name, "seed": self.seed}))

    @property
    def slug(self) -> str:
        """A file name that says what the run is and changes with every field."""
        # fields that came later stay out where they change nothing, as in the file
        digest = hashlib.sha256(self.model_dump_json(exclude_defaults=True).encode()).hexdigest()[:8]
        words = [Path(self.dataset).stem, self.start_model, self.name, str(self.n_train or ""), f"seed{self.seed}"]
        # a file system takes 255 letters for the whole
        words = [re.sub(r"[^A-Za-z0-9.]+", "_", word).strip("_")[:80] for word in words if word]
        return "-".join([*words, digest]).lstrip(".")


def execute(run: Run, study: str = "", progress: bool | None = None, device: str = "cpu") -> Experiment:
    """Carry out a run: split, fine-tune, evaluate on the test part, record; a finished one is read.

    Parameters
    ----------
    run
        What to do.
    study, progress, device
        As in :func:`tlmc.experiments.experiment.run_experiment`. With a study, what the model has forgotten is recorded
        too, as errors of the part ``molecules`` (:mod:`tlmc.evaluation.forgetting`).

    Raises
    ------
    DataError, ModelError, ConfigError
        As the steps raise them, before training starts.
    """
    config = run.config
    start, model, dataset = _prepared(run, only_crystals)
    experiment = run_experiment(
        model, dataset, config, split=run.split, n_train=run.n_train, study=study, progress=progress, device=device,
        trust_labels=run.trust_labels,
    )  # fmt: skip
    if study:
        result = experiment.result
        metrics = forgetting(start, result.potential, isolated_molecules(dataset.elements, "held out"))
        rows = rows_from_metrics(
            metrics, study=study, dataset=dataset.name, start_model=model.name, recipe=config.recipe, seed=run.seed,
            split=MOLECULES, n_train=len(experiment.split.train), run_key=result.run_key,
            identity=identity(dataset, experiment.split, MOLECULES, start_hash(model)),
        )  # fmt: skip
        append_records(rows)
    return experiment


def run_key(run: Run) -> str:
    """Return the hash of start model, data, split and settings that the results of a run are recorded with.

    Raises
    ------
    DataError, ModelError, ConfigError
        As :func:`execute`.
    """
    _, model, dataset = _prepared(run)
    parts = split_dataset(dataset, method=run.split, seed=run.seed)
    if run.n_train:
        parts = shrunk(parts, run.n_train, run.seed, dataset)
    return run_name(model, dataset, parts, run.config).rpartition("-")[2]


def _prepared(
    run: Run, crystals: Callable[[Dataset], Dataset] = Dataset.crystals
) -> tuple[Potential, Potential, Dataset]:
    """Return the start model, the same with borrowed elements, and the frames."""
    dataset = load_dataset(run.dataset)
    if run.crystals_only:
        dataset = crystals(dataset)
    start = load_start_model(run.start_model)
    return start, start.with_elements(run.element_map, run.borrow), dataset


def write_run(run: Run, path: Path | str) -> None:
    """Write a run as YAML; fields with their default value are left out."""
    write_text(path, yaml.safe_dump(run.model_dump(exclude_defaults=True), sort_keys=False))


def read_run(path: Path | str) -> Run:
    """Read what :func:`write_run` wrote, or somebody by hand.

    Raises
    ------
    ConfigError
        If the file does not exist, is not YAML, or a field is unknown or wrong.
    """
    return make_run(read_yaml(path), str(path))


def read_yaml(path: Path | str) -> Any:
    """Read a YAML file.

    Raises
    ------
    ConfigError
        If it does not exist or is not YAML.
    """
    try:
        return yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(f"{path} does not exist") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not YAML: {' '.join(str(error).split())}") from error


def make_run(content: Any, where: str) -> Run:
    """Check the fields of a run.

    Parameters
    ----------
    content
        Field to value.
    where
        Named in the sentence about what is wrong.

    Raises
    ------
    ConfigError
        If a field, the recipe or a setting is unknown or wrong.
    """
    try:
        run = Run.model_validate(content)
    except ValidationError as error:
        raise ConfigError(f"{where}: {problems_of(error)}") from error
    try:
        _ = run.config  # an unknown setting is said now, not after the data are loaded
        check_name(run.name)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error
    return run
