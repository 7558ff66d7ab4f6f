"""Fine-tuning of SevenNet-0 with our splits, loss and optimiser, and what it costs in processor time."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

import numpy as np
import pandas as pd
import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from tlmc.equality import equal_by_content
from tlmc.errors import ConfigError, DataError, ModelError, nearest_first, problems_of
from tlmc.evaluation.comparison import Stage
from tlmc.evaluation.metrics import as_json, by_kind, evaluate
from tlmc.evaluation.records import append_records, identity, rows_from_metrics
from tlmc.files import atomic_path, claim, write_json
from tlmc.labelled import Dataset
from tlmc.paths import reports_dir
from tlmc.peer.sevennet import NAME, SevenNet, answer, load_sevennet, make_graph, predict, predict_graphs
from tlmc.provenance import git_revision, package_versions
from tlmc.reference import fit_reference
from tlmc.splits import Split, split_dataset
from tlmc.training.checkpoint import load_tensors, save_tensors
from tlmc.training.divergence import Guard, force_rms
from tlmc.training.interrupts import heeded, interrupted
from tlmc.training.loss import batch_loss
from tlmc.training.optimizer import Update, apply

_LOG = logging.getLogger(__name__)

UNMODIFIED: Final = "sevennet, unmodified"
"""Recipe in records: published weights, energy offset fitted on the training part."""
TUNED: Final = "sevennet, {epochs} epochs"
"""Recipe in records of a fine-tuned one."""


class PeerConfig(BaseModel):
    """How to fine-tune the peer: loss and optimiser of our recipe ``short``; `lr` is the peer's own."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    epochs: int = Field(8, ge=0)
    """0 leaves the published weights as they are."""
    batch_size: int = Field(2, ge=1)
    lambda_: float = Field(0.1, ge=0.0, le=1.0)
    """Weight of the forces in the loss (thesis eq. 3.46)."""
    lr: float = Field(1e-3, gt=0.0)
    """At the start; falls to zero along a cosine."""
    weight_decay: float = Field(0.01, ge=0.0)
    seed: int = Field(0, ge=0)
    """Of the split and the order of the batches."""

    @property
    def recipe(self) -> str:
        """Name that results are filed under."""
        return TUNED.format(epochs=self.epochs) if self.epochs else UNMODIFIED


def peer_config(**settings: Any) -> PeerConfig:
    """Return the settings of a run.

    Raises
    ------
    ConfigError
        If a setting is unknown, or a value is of the wrong type or out of range.
    """
    try:
        return PeerConfig(**settings)
    except ValidationError as error:
        unknown = [str(problem["loc"][0]) for problem in error.errors() if problem["type"] == "extra_forbidden"]
        known = f"; the settings are {', '.join(nearest_first(unknown[0], PeerConfig.model_fields))}" if unknown else ""
        raise ConfigError(f"peer: {problems_of(error)}{known}") from error


@equal_by_content
@dataclass(frozen=True)
class PeerExperiment:
    """The peer on one data set."""

    dataset: Dataset
    split: Split
    stages: dict[str, Stage]
    """Test part: predictions and errors under :data:`UNMODIFIED` and, after fine-tuning, the recipe's name."""
    history: pd.DataFrame
    """A row per epoch, from epoch 0, the published weights: ``epoch``, ``lr`` (of the last step), ``train_loss`` (eV^2,
    mean over the steps), ``validation_force_rmse_vector`` (eV/A), ``validation_energy_rmse_per_atom`` (eV/atom), and
    ``cpu_seconds`` of all threads since the start, graphs, offset and validation included."""
    run_dir: Path


@dataclass
class _State:
    """Everything that changes while training; a checkpoint holds exactly this."""

    epoch: int
    step: int
    tensors: dict[str, Tensor]
    """``flat`` weights and AdamW's moments, each of shape ``(n_weights,)``."""
    history: list[dict[str, float]]


def run_peer(
    dataset: Dataset, config: PeerConfig | None = None, *, study: str = "", run_dir: Path | None = None
) -> PeerExperiment:
    """Evaluate SevenNet-0 on the test part as it is and, if epochs are asked for, after fine-tuning.

    A killed run goes on at the last complete epoch; a finished one is read.

    Parameters
    ----------
    dataset
        All frames; split 70/10/20 as for our models.
    config
        Settings.
    study
        File the test errors under this name in ``metrics/summary.parquet``; empty for no record.
    run_dir
        Folder for ``run.json``, ``history.csv``, ``state.safetensors`` and ``metrics.json``; by default one under
        ``reports/runs``.

    Raises
    ------
    ConfigError
        If ``sevenn`` is not installed, or the folder holds another run.
    ModelError
        If an element is unknown to the peer, its weights are not the published ones, or the training diverges
        (:class:`tlmc.training.divergence.Guard`).
    Interrupted
        On Ctrl-C or SIGTERM, after the last whole epoch.
    """
    config = config or PeerConfig()
    model = load_sevennet()
    split = split_dataset(dataset, seed=config.seed)
    description = _describe(model, dataset, split, config)
    run_id = hashlib.sha256(json.dumps(description, sort_keys=True).encode()).hexdigest()[:12]
    name = f"{dataset.name.replace('/', '-')}-{NAME}-{config.epochs}-{config.seed}-{run_id}"
    folder = run_dir or reports_dir() / "runs" / name
    _claim(folder, description, split)

    trainer = _Trainer(model, dataset, split, config)
    state_file = folder / "state.safetensors"
    state = _load_state(state_file, run_id) if state_file.exists() else trainer.start()
    test = dataset.subset(split.test)
    model = trainer.model
    published = predict(model, test.frames)
    stages = {UNMODIFIED: Stage(published, evaluate(test, published), by_kind(test, published))}
    trainer.restore(state)
    _save(folder, state, run_id)
    with heeded():
        try:
            while state.epoch < config.epochs:
                row = trainer.epoch(state)
                _save(folder, state, run_id)
                _LOG.info(
                    "%s on %s, epoch %d/%d: lr %.1e, loss %.2e; validation F %.4f eV/A, E %.2f meV; %.0f s of "
                    "processor time", NAME, dataset.name, state.epoch, config.epochs, row["lr"], row["train_loss"],
                    row["validation_force_rmse_vector"], 1e3 * row["validation_energy_rmse_per_atom"],
                    row["cpu_seconds"],
                )  # fmt: skip
        except KeyboardInterrupt as error:
            raise interrupted(
                error,
                f"interrupted in epoch {min(state.epoch + 1, config.epochs)} of {config.epochs}: whole epochs are kept "
                f"in {folder}, the same call, or the same command, goes on from there",
            ) from None
    if config.epochs:
        trainer.guard(state).check_end(state.history[-1])
        tuned = predict(model, test.frames)
        stages[config.recipe] = Stage(tuned, evaluate(test, tuned), by_kind(test, tuned))
    history = pd.DataFrame(state.history)
    content = {
        "run_id": run_id,
        "dataset": {"name": dataset.name, "source": dataset.source, "hash": dataset.hash},
        "start_model": {"name": NAME, "fingerprint": model.fingerprint},
        "n_train": len(split.train),
        "cpu_seconds": state.history[-1]["cpu_seconds"],
        "test": {recipe: as_json(stage.metrics) for recipe, stage in stages.items()},
        "test_by_kind": {
            recipe: {kind: as_json(metrics) for kind, metrics in stage.by_kind.items()}
            for recipe, stage in stages.items()
            if stage.by_kind
        },
        "versions": package_versions() | {name: version(name) for name in ("sevenn", "e3nn")},
        "git_revision": git_revision(),
    }
    write_json(folder / "metrics.json", content)
    if study:
        start = hashlib.sha256(json.dumps(description["start_model"], sort_keys=True).encode()).hexdigest()[:12]
        frames = identity(dataset, split, "test", start)
        append_records(
            row
            for recipe, stage in stages.items()
            for row in rows_from_metrics(
                stage.metrics,
                study=study,
                dataset=dataset.name,
                start_model=NAME,
                recipe=recipe,
                seed=config.seed,
                split="test",
                n_train=len(split.train),
                run_id=run_id,
                identity=frames,
            )
        )
    return PeerExperiment(dataset, split, stages, history, folder)


def cost_table(experiments: Mapping[str, PeerExperiment]) -> pd.DataFrame:
    """Return the histories of fine-tunings in the shape of :func:`tlmc.experiments.convergence`, to be joined with it.

    Parameters
    ----------
    experiments
        By the name of the setting they are to have.
    """
    columns = ["epoch", "cpu_seconds", "validation_force_rmse_vector", "validation_energy_rmse_per_atom"]
    tables = [run.history[columns].assign(setting=name, seed=run.split.seed) for name, run in experiments.items()]
    return pd.concat(tables, ignore_index=True)


class _Trainer:
    """The network, its trainable weights as one flat buffer, and the labelled graphs of one run."""

    def __init__(self, model: SevenNet, dataset: Dataset, split: Split, config: PeerConfig) -> None:
        self.config, self.split = config, split
        self.cpu = time.process_time()
        self.graphs = [make_graph(model, frame) for frame in dataset.frames]
        self.validation = dataset.subset(split.validation)
        train = dataset.subset(split.train)
        predicted = predict_graphs(model, train.frames, [self.graphs[i] for i in split.train]).energies
        self.model = replace(model, reference=fit_reference(train.frames, train.energies, predicted))
        self.energies = torch.from_numpy(dataset.energies) - self.model.offsets(dataset.frames)
        self.forces = [torch.from_numpy(forces).to(torch.float32) for forces in dataset.forces]
        self.weights = [weight for weight in model.network.parameters() if weight.requires_grad]
        self.steps_per_epoch = math.ceil(len(split.train) / config.batch_size)

    def start(self) -> _State:
        """Return the state before the first step, with the validation errors of the published weights."""
        flat = torch.nn.utils.parameters_to_vector(self.weights).detach()
        tensors = {"flat": flat, "exp_avg": torch.zeros_like(flat), "exp_avg_sq": torch.zeros_like(flat)}
        state = _State(0, 0, tensors, [])
        state.history.append({"epoch": 0.0} | self._validate() | {"cpu_seconds": time.process_time() - self.cpu})
        return state

    def restore(self, state: _State) -> None:
        """Continue from a state: the network's weights become views of the flat buffer."""
        torch.nn.utils.vector_to_parameters(state.tensors["flat"], self.weights)

    def guard(self, state: _State) -> Guard:
        """Return what tells whether a training from the published weights diverged."""
        return Guard(state.history[0], force_rms(self.validation.forces), f"lower lr ({self.config.lr})")

    def epoch(self, state: _State) -> dict[str, float]:
        """Train one epoch and validate, bring the state up to date and return the new row of the history."""
        began, config = time.process_time(), self.config
        # seeded by the epoch, so that a resumed run meets the same batches
        order = np.random.default_rng([config.seed, state.epoch]).permutation(self.split.train)
        losses = []
        self.model.network.train()
        for first in range(0, len(order), config.batch_size):
            part = order[first : first + config.batch_size]
            total = config.epochs * self.steps_per_epoch
            rate = config.lr * 0.5 * (1.0 + math.cos(math.pi * state.step / total))
            loss = self._loss(part.tolist())
            losses.append(loss.item())
            if not math.isfinite(losses[-1]):
                raise ModelError(f"the loss became {losses[-1]} in epoch {state.epoch + 1}: lower lr ({config.lr})")
            slopes = torch.autograd.grad(loss, self.weights)
            tensors = state.tensors
            state.step += 1
            apply(
                Update(
                    tensors["flat"], tensors["exp_avg"], tensors["exp_avg_sq"],
                    torch.nn.utils.parameters_to_vector(slopes), rate, config.weight_decay, state.step,
                )
            )  # fmt: skip
        row = {"epoch": state.epoch + 1.0, "lr": rate, "train_loss": float(np.mean(losses))}
        guard = self.guard(state)
        try:
            row |= self._validate()
        except DataError as error:  # of predictions that are not finite
            raise ModelError(f"the training diverged in epoch {state.epoch + 1}: {error}: {guard.remedy}") from error
        guard.check_epoch(row, state.tensors)
        row["cpu_seconds"] = state.history[-1]["cpu_seconds"] + time.process_time() - began
        state.epoch += 1
        state.history.append(row)
        return row

    def _loss(self, frames: list[int]) -> Tensor:
        predicted = answer(self.model, [self.graphs[i] for i in frames])
        sizes = torch.tensor([len(self.forces[i]) for i in frames])
        energy_error = (predicted.energies - self.energies[frames]).to(torch.float32)
        force_error = predicted.forces - torch.cat([self.forces[i] for i in frames])
        structure = torch.repeat_interleave(torch.arange(len(frames)), sizes)
        return batch_loss(energy_error, force_error, sizes.to(torch.float32), structure, self.config.lambda_).loss

    def _validate(self) -> dict[str, float]:
        graphs = [self.graphs[i] for i in self.split.validation]
        metrics = evaluate(self.validation, predict_graphs(self.model, self.validation.frames, graphs))
        return {
            f"validation_{quantity}": metrics[quantity].value
            for quantity in ("force_rmse_vector", "energy_rmse_per_atom")
        }


def _describe(model: SevenNet, dataset: Dataset, split: Split, config: PeerConfig) -> dict[str, Any]:
    """Return everything that decides the result, as JSON."""
    return {
        "start_model": {"name": NAME, "fingerprint": model.fingerprint},
        "data": {"name": dataset.name, "hash": dataset.hash, "frames": len(dataset)},
        "split": {"hash": split.hash, "train": len(split.train), "validation": len(split.validation)},
        "config": config.model_dump(),
    }


def _claim(folder: Path, description: dict[str, Any], split: Split) -> None:
    """Write the description of a run into its folder, or check that the one there is the same."""
    claim(folder, ["run.json"], "a run")
    path = folder / "run.json"
    if path.exists():
        if json.loads(path.read_text(encoding="utf-8")) != description:
            raise ConfigError(f"{folder} holds another run, see run.json there: choose another folder or delete this")
    else:
        write_json(path, description)
    if not (folder / "split.json").exists():
        write_json(folder / "split.json", split.to_json())


def _save(folder: Path, state: _State, run_id: str) -> None:
    """Write the checkpoint, then the history."""
    scalars = {"epoch": state.epoch, "step": state.step, "history": state.history}
    save_tensors(folder / "state.safetensors", state.tensors, {"run_id": run_id, "state": scalars})
    with atomic_path(folder / "history.csv") as temporary:
        pd.DataFrame(state.history).to_csv(temporary, index=False)


def _load_state(path: Path, run_id: str) -> _State:
    tensors, metadata = load_tensors(path)
    if metadata.get("run_id") != run_id:
        raise ConfigError(f"{path} belongs to run {metadata.get('run_id')}, not to {run_id}: delete it to start anew")
    return _State(tensors=tensors, **metadata["state"])
