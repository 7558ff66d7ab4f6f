"""Fine-tuning of a start model on a labelled data set: protocol, options, progress and resume."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import re
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from torch import Tensor
from torch.linalg import LinAlgError  # type: ignore[attr-defined]
from tqdm.auto import tqdm

from tlmc.arguments import checked
from tlmc.descriptors.enrichment import Compression, fit_enrichment
from tlmc.equality import equal_by_content
from tlmc.errors import ConfigError, DataError, ModelError, nearest_first, problems_of
from tlmc.files import atomic_path, claim, held, write_json
from tlmc.labelled import Dataset
from tlmc.potentials.model import Potential
from tlmc.potentials.transfer import enrich, first_members, scratch, trainable_layers
from tlmc.progress import is_watched
from tlmc.reference import fit_reference
from tlmc.splits import Split
from tlmc.training.cache import DescriptorCache, build_cache
from tlmc.training.checkpoint import check_weights, load_model, load_tensors, save_model, save_tensors
from tlmc.training.devices import DeviceCache, find_device
from tlmc.training.distributed import ContactError, Group
from tlmc.training.divergence import HOPELESS, Guard, force_rms, is_finite
from tlmc.training.engine import Batch, Engine, merge
from tlmc.training.interrupts import heeded, interrupted, undisturbed
from tlmc.training.kernels import kernels
from tlmc.training.loss import LossAndSlopes, LossKind, batch_loss
from tlmc.training.low_rank import LowRank
from tlmc.training.optimizer import Update, apply
from tlmc.training.replay import Replay, isolated_molecules
from tlmc.training.warm_start import ridge_start

_MERGED_TOGETHER = 8
"""Batches whose merging pays off to do at once."""
_PORTION = 16
"""Structures that are evaluated together, without a step, by one process."""
_LOG = logging.getLogger(__name__)


class RicherColumns(BaseModel):
    """Columns of another descriptor behind the AEV (:mod:`tlmc.descriptors.enrichment`), fitted on training frames."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: str = "soap"
    parameters: dict[str, Any] = Field(default_factory=dict)
    """Arguments of the descriptor that differ from its defaults; elements are those of the data."""
    compression: Compression = "species"
    n_columns: int = Field(128, ge=1)
    """Principal components with ``compression="pca"``."""
    scale: float = Field(0.1, gt=0.0)
    """Standard deviation of the columns: the larger, the faster they learn; from 0.4 on the first steps do harm."""


class FinetuneConfig(BaseModel):
    """How to train. The defaults are the thesis protocol (section 3.5): AdamW, 100 epochs, batches of 2, lambda 0.9."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    recipe: str = Field("thesis", min_length=1)
    """Name that results are filed under."""
    init: Literal["start", "scratch"] = "start"
    """Begin from the start model's weights, or from N(0, 0.1)."""
    members: int | None = Field(None, ge=1)
    """Keep only so many members of the start model's ensemble, the first ones: the loss looks at their mean, so that
    fewer of them are a narrower network, cheaper by far to train and to use. As for any fine-tuned ensemble, only their
    mean is a prediction: they are no committee (:attr:`tlmc.potentials.Potential.committee`)."""
    layers: Literal["all", "hidden", "last"] = "all"
    """Which layers train; ``hidden`` is the thesis' "frozen input and output"."""
    warm_start: Literal["none", "ridge"] = "none"
    """``ridge`` first fits the output layers in closed form (:mod:`tlmc.training.warm_start`). The first steps of AdamW
    are as long as the rate allows, whatever the gradient: they undo the fit unless `lr` is low (1e-4) and
    `warmup_epochs` is a few."""
    ridge: float = Field(1e-2, gt=0.0)
    """Penalty per squared change of an output weight with ``warm_start="ridge"``, eV^2."""
    epochs: int = Field(100, ge=1)
    batch_size: int = Field(2, ge=1)
    batch_atoms: int | None = Field(None, ge=1)
    """If given, decides instead of `batch_size`: in the order drawn, a batch takes structures until the next one would
    bring it above so many atoms (and one that is larger alone). The loss stays a mean over structures."""
    lambda_: float = Field(0.9, ge=0.0, le=1.0)
    """Weight of the forces in the loss."""
    loss: LossKind = "mse"
    huber_delta: float = Field(1.0, gt=0.0)
    """Where the Huber loss becomes linear, eV/A and eV/atom."""
    lr: float = Field(1e-4, gt=0.0)
    weight_decay: float = Field(0.1, ge=0.0)
    schedule: Literal["plateau", "cosine", "constant"] = "plateau"
    """``plateau`` halves the rate when the validation loss has not improved for `plateau_patience` epochs."""
    plateau_patience: int = Field(5, ge=0)
    warmup_epochs: float = Field(0.0, ge=0.0)
    """Linear rise of the rate at the beginning."""
    early_stopping: int | None = Field(None, ge=1)
    """Stop after so many epochs without a better validation score; None trains to the end."""
    ema_decay: float | None = Field(None, gt=0.0, lt=1.0)
    """Decay per step of an exponential average of the weights; validation then looks at the average."""
    clip_norm: float | None = Field(None, gt=0.0)
    """Largest norm of the gradient, in units of the loss per weight."""
    keep: Literal["last", "best"] = "last"
    """Which weights the result, and the run folder, holds; the others are not kept. ``best`` has the lowest
    ``sqrt(force RMSE * energy RMSE)`` of the validation part: the forces alone are a trap, since a dozen frames contain
    outliers."""
    seed: int = Field(0, ge=0, lt=2**63)
    """Order of the batches, and the weights with ``init="scratch"``."""
    precision: Literal["float32", "float64"] = "float32"
    richer: RicherColumns | None = None
    """Columns that the model gets in addition; a model with such columns exports to our own format only."""
    rank: int | None = Field(None, ge=1)
    """Keep the start weights and learn products of thin matrices of this rank beside them
    (:mod:`tlmc.training.low_rank`); weight decay then pulls towards the start model."""
    replay: float = Field(0.0, ge=0.0)
    """Weight of staying as the start model is on small isolated molecules (:mod:`tlmc.training.replay`)."""

    @model_validator(mode="after")
    def _check_combinations(self) -> FinetuneConfig:
        if self.warm_start == "ridge" and self.layers == "hidden":
            raise ValueError("warm_start = 'ridge' fits the output layers, which layers = 'hidden' keeps frozen")
        if self.warm_start == "ridge" and self.rank is not None:
            raise ValueError("warm_start = 'ridge' changes the weights that rank keeps: choose one of them")
        if self.init == "scratch" and self.replay:
            raise ValueError("replay keeps what the start model knows, which init = 'scratch' throws away")
        return self


# at three times the rate single frames far from the others come out much worse
_RICH: dict[str, Any] = {
    "epochs": 60, "lambda_": 0.1, "lr": 1e-4, "weight_decay": 0.01, "schedule": "cosine", "warmup_epochs": 1,
    "loss": "huber", "huber_delta": 0.1, "richer": {"kind": "soap"},
}  # fmt: skip

RECIPES: dict[str, dict[str, Any]] = {
    "thesis": {},
    "short": {"epochs": 60, "lambda_": 0.1, "lr": 3e-4, "weight_decay": 0.01, "schedule": "cosine"},
    "quick": {
        "epochs": 30, "batch_size": 4, "lambda_": 0.1, "lr": 6e-4, "weight_decay": 0.01, "schedule": "cosine",
        "warmup_epochs": 1.0,
    },
    "scratch": {"init": "scratch"},
    "frozen": {"layers": "hidden"},
    "rich": _RICH,
    "thorough": _RICH | {"epochs": 150},
}  # fmt: skip
"""Named settings, as differences from the thesis protocol."""


@checked
def recipe(name: str, **changes: Any) -> FinetuneConfig:
    """Return the settings of a named recipe, with changes.

    Raises
    ------
    ConfigError
        If the recipe or a setting is unknown, or a value is of the wrong type or out of range. The sentence lists the
        names that there are, those most like an unknown one first.
    """
    if name not in RECIPES:
        raise ConfigError(f"there is no recipe {name!r}: choose one of {', '.join(nearest_first(name, RECIPES))}")
    try:
        return FinetuneConfig(**({"recipe": name} | RECIPES[name] | changes))
    except ValidationError as error:
        raise ConfigError(f"recipe {name}: {problems_of(error)}{_known_names(error)}") from error


def _known_names(error: ValidationError) -> str:
    """Return the settings that there are, if an unknown one is among the problems."""
    sentences = []
    for problem in error.errors():
        if problem["type"] == "extra_forbidden":
            *outer, name = map(str, problem["loc"])
            known = RicherColumns.model_fields if outer else FinetuneConfig.model_fields
            of = f" of {'.'.join(outer)}" if outer else ""
            sentences.append(f"; the settings{of} are {', '.join(nearest_first(name, known))}")
    return "".join(dict.fromkeys(sentences))


@equal_by_content
@dataclass(frozen=True)
class FinetuneResult:
    """A fine-tuned model and how it came about."""

    potential: Potential
    """Final weights with the reference energies fitted on the training part."""
    history: pd.DataFrame
    """A row per epoch: epoch, lr, train_loss and validation_loss (eV^2), energy RMSE per atom (eV/atom) and vector
    force RMSE (eV/A) of training (running, while weights change) and validation, validation_score, and the
    seconds and cpu_seconds that the epoch took."""
    best_epoch: int
    """Epoch with the lowest validation score."""
    config: FinetuneConfig
    run_id: str
    """Hash of start model, data, split and settings."""
    run_dir: Path | None
    resumed_from: int
    """Epoch from which a killed run went on; 0 for a fresh one."""


@dataclass
class _State:
    """Everything that changes while training; a checkpoint holds exactly this."""

    epoch: int
    step: int
    tensors: dict[str, Tensor]
    """flat weights, AdamW's moments, averaged and best weights; all shaped like the flat weights."""
    inactive: dict[str, float]
    """Decay of the first-layer weights of inactive columns, for the current, averaged and best weights."""
    plateau: dict[str, float]
    best_score: float
    best_epoch: int
    history: list[dict[str, float]]

    def copy(self) -> _State:
        """Return a state that further training leaves as it is."""
        return replace(
            self,
            tensors={name: tensor.clone() for name, tensor in self.tensors.items()},
            inactive=dict(self.inactive),
            plateau=dict(self.plateau),
            history=list(self.history),
        )


@checked
def finetune(
    model: Potential,
    dataset: Dataset,
    split: Split,
    config: FinetuneConfig | None = None,
    run_dir: Path | str | None = None,
    *,
    progress: bool | None = None,
    tensorboard: bool = False,
    checkpoint_seconds: float = 10.0,
    threads: int | None = None,
    device: str = "cpu",
    group: Group | None = None,
) -> FinetuneResult:
    """Fine-tune a start model on the training part of a data set.

    Parameters
    ----------
    model
        Start model; every element of the data must have a network (see :func:`tlmc.potentials.relabel`).
    dataset, split
        Labelled frames and their parts. The test part is not looked at. Labels are taken as they are: whoever calls
        this has compared them with the start model, as :func:`tlmc.experiments.run_experiment` does
        (:func:`tlmc.label_check.check_labels`).
    config
        Settings; the thesis protocol by default. See :func:`recipe`.
    run_dir
        Folder for settings (``run.json``, ``split.json``), learning curve (``history.csv``) and the model with the
        weights that `keep` asks for (``model.safetensors``). Until that is written there is ``state.safetensors`` to go
        on from, three to six times as large: if the folder holds an unfinished run with the same settings, that run
        goes on and ends with the weights it would have had anyway. A training is continued beyond its end by starting
        another from its model. None keeps everything in memory.
    progress
        Show a bar; by default at a terminal and in a notebook that somebody has open, not in one that is run headless.
        Without it one line per epoch goes to the log.
    tensorboard
        Also write TensorBoard events to ``run_dir/tensorboard``.
    checkpoint_seconds
        How much work a kill may cost. Ctrl-C and SIGTERM cost at most the epoch that is under way.
    threads
        Threads to train with. By default all of torch's for an ensemble, and one for a single network, whose steps are
        so short that a second thread gains a fifth on a quiet machine and costs a factor on a busy one.
    device
        ``cpu``, ``cuda`` or ``cuda:N``. A GPU keeps the descriptors as far as they fit. It adds up in an order of its
        own, so the weights are those of the processor to rounding. A run may go on on another device.
    group
        The processes that train together (:func:`tlmc.training.distributed.processes`); this one alone by default. All
        of them call this function with the same arguments; the group brings its own device. Only the first writes to
        `run_dir`.

    Raises
    ------
    ModelError
        If the model lacks an element or has fewer members than asked for; or if the training diverges: a loss, a weight
        or a validation error becomes infinite or NaN, or a validation error ends above ten times (or is after any epoch
        above a hundred times) that of the start model and that of predicting no forces, or 0.3 eV/atom. Nothing but
        the curve is kept then. A result that is merely worse than the start model is warned of.
    DataError
        If the split does not belong to the data set, or another process is training in `run_dir`.
    ConfigError
        If `run_dir` holds a run with other settings or data, or files but no run, TensorBoard is asked for but missing,
        there is no such device, or the processes of a group differ in what they were given.
    Interrupted
        On Ctrl-C or SIGTERM, after the last whole epoch is saved to `run_dir`: a `KeyboardInterrupt`.
    """
    config = config or FinetuneConfig()
    group = group or Group(device=find_device(device))
    _check_split(dataset, split)
    for frame in dataset.frames:
        model.species(frame)  # an element without a network is an error before anything is written
    ensemble = model if config.members is None else first_members(model, config.members)  # or an error, likewise
    if tensorboard and run_dir is None:
        raise ConfigError("tensorboard needs a run_dir to write to")
    description = _describe(model, dataset, split, config)
    run_id = _hash(description)
    group.check_same(run_id, "settings, data or start weights")
    folder = None if run_dir is None else Path(run_dir).expanduser()
    with ExitStack() as stack:
        if folder is not None:
            if group.is_first:
                _claim(folder, description, split)
                if not _has_model(folder):
                    stack.enter_context(held(folder))
            if group.from_first(_has_model(folder)):
                return _finished(folder, config, run_id, dataset.subset(split.validation), tidy=group.is_first)
        if not group.is_first:
            folder, progress = None, False
        keep = stack.enter_context(_kept_on_interrupt(folder, config, run_id))
        return _train(
            ensemble, dataset, split, config, folder, description | {"run_id": run_id}, keep,
            progress, tensorboard, checkpoint_seconds, threads, group,
        )  # fmt: skip


def _train(
    ensemble: Potential,
    dataset: Dataset,
    split: Split,
    config: FinetuneConfig,
    folder: Path | None,
    description: dict[str, Any],
    keep: _Kept,
    progress: bool | None,
    tensorboard: bool,
    checkpoint_seconds: float,
    threads: int | None,
    group: Group,
) -> FinetuneResult:
    """Train, from the state in the folder if there is one, and write the result."""
    run_id = description["run_id"]
    begin = first_model(ensemble, dataset, split, config)
    threads = threads or (1 if begin.members == 1 else torch.get_num_threads())
    dtype = cast(torch.dtype, getattr(torch, config.precision))
    replayed = isolated_molecules(dataset.elements, "replayed") if config.replay else []
    described = (*dataset.frames, *replayed)
    with group.first_alone():
        # shown only once there is something to compute: a cache that is there is opened at once
        with _bar(progress, len(described), "descriptors", delay=1e-9) as bar:
            cache = build_cache(begin, described, dtype, report=bar.update)
        if group.device.type == "cpu":
            kernels(dtype)  # compiled now, by one process
    group.check_same(cache.folder.name, "descriptors")
    n_layers = len(next(iter(begin.networks.values())))
    trainer = _Trainer(begin, dataset, split, config, cache, trainable_layers(config.layers, n_layers), group)
    if not group.is_first:
        state = trainer.blank()
    elif folder is None or not (folder / "state.safetensors").exists():
        with _threads(threads):
            state = trainer.start()
    else:
        state = _load_state(folder / "state.safetensors", run_id)
        _LOG.info("resuming %s at epoch %d of %d", folder, state.epoch, config.epochs)
    vars(state).update(group.from_first(_scalars(state)))
    resumed_from = state.epoch
    trainer.restore(state)
    keep(state)

    saved = time.monotonic()
    with (
        _threads(threads),
        _bar(progress, config.epochs, config.recipe) as bar,
        _events(folder if tensorboard else None) as write_event,
    ):
        bar.update(state.epoch)
        while state.epoch < config.epochs and not _is_stopped(state, config):
            try:
                row = trainer.epoch(state)
            except ModelError as error:
                raise _without_result(error, folder, state) from error
            keep(state)
            bar.update(1)
            bar.set_postfix(
                F=f"{row['validation_force_rmse_vector']:.3f}",
                E_meV=f"{1e3 * row['validation_energy_rmse_per_atom']:.2f}",
            )
            if bar.disable and group.is_first:
                _LOG.info(
                    "%s epoch %d/%d: lr %.1e, loss %.2e train, %.2e validation; validation F %.4f eV/A, E %.2f meV",
                    config.recipe, state.epoch, config.epochs, row["lr"], row["train_loss"], row["validation_loss"],
                    row["validation_force_rmse_vector"], 1e3 * row["validation_energy_rmse_per_atom"],
                )  # fmt: skip
            write_event(row)
            if folder is not None and time.monotonic() - saved > checkpoint_seconds:
                _save_state(folder, state, run_id)
                saved = time.monotonic()

    row = state.history[-1 if config.keep == "last" else state.best_epoch - 1]
    which = "best" if config.keep == "best" else "ema" if config.ema_decay else "flat"
    kept = trainer.potential(state, which)
    try:
        trainer.guard.check_end(row)
        check_weights(kept, "the trained model")
    except ModelError as error:
        raise _without_result(error, folder, state) from error
    if folder is not None:
        _save_state(folder, state, run_id)
        kinds = {"crystals": int(dataset.is_crystal[split.train].sum())}
        kinds["molecules"] = len(split.train) - kinds["crystals"]
        save_model(kept, folder / "model.safetensors", description | {"metrics": row, "trained_on": kinds})
        _tidy(folder)
    history = pd.DataFrame(state.history)
    return FinetuneResult(kept, history, state.best_epoch, config, run_id, folder, resumed_from)


def first_model(model: Potential, dataset: Dataset, split: Split, config: FinetuneConfig) -> Potential:
    """Return what :func:`finetune` begins with: the members, first weights and columns that the settings ask for.

    Raises
    ------
    ModelError
        If the model has fewer members than asked for.
    """
    result = model if config.members is None else first_members(model, config.members)
    if config.init == "scratch":
        result = scratch(result, config.seed)
    if config.richer is not None:
        train = [dataset.frames[k] for k in split.train]
        result = enrich(result, fit_enrichment(train, species=dataset.elements, **config.richer.model_dump()))
    return result


class _Labelled(NamedTuple):
    """Merged structures and their labels, as :meth:`tlmc.training.engine.Engine.loss_gradient` takes them."""

    batch: Batch
    energies: Tensor
    forces: Tensor


class _Trainer:
    """The engine, the labels in its order and the optimiser of one run."""

    def __init__(
        self,
        model: Potential,
        dataset: Dataset,
        split: Split,
        config: FinetuneConfig,
        cache: DescriptorCache,
        trainable: Sequence[bool],
        group: Group,
    ) -> None:
        self.config, self.split, self.group = config, split, group
        self.cache = cache if group.device.type == "cpu" else DeviceCache(cache, group.device)
        self.engine = Engine(model, self.cache, trainable)
        self.sizes = [len(frame) for frame in dataset.frames]
        self.forces = [
            torch.from_numpy(forces)[structure.order].to(self.engine.flat)
            for forces, structure in zip(dataset.forces, cache, strict=False)  # molecules for replay come after them
        ]
        train_frames = [dataset.frames[i] for i in split.train]
        predicted = self._network_energies(split.train) + model.with_reference(None).atomic_reference(train_frames)
        reference = fit_reference(train_frames, dataset.energies[split.train], predicted.numpy())
        self.engine.model = model.with_reference(reference)
        energies = torch.from_numpy(dataset.energies) - self.engine.model.atomic_reference(dataset.frames)
        self.energies = energies.to(group.device)
        self.loss = partial(batch_loss, lambda_=config.lambda_, kind=config.loss, delta=config.huber_delta)
        self.steps = self._count_steps()
        self.low_rank = LowRank(self.engine, config.rank, config.seed) if config.rank else None
        replayed = [self.cache[i] for i in range(len(dataset), len(cache))]
        self.replay = (
            Replay(self.engine, replayed, config.replay, config.batch_size, self.loss, config.seed)
            if replayed else None
        )  # fmt: skip
        self.trains_first = trainable[0] and self.low_rank is None
        self.guard = Guard(
            self._errors(split.validation).summary("validation"),
            force_rms(dataset.forces[k] for k in split.validation),
            f"lower lr ({config.lr})" + (" or set clip_norm" if config.clip_norm is None else ""),
        )

    def start(self) -> _State:
        """Return the state before the first step, after the warm start if there is one."""
        if self.config.warm_start == "ridge":
            try:
                ridge_start(
                    self.engine, self.cache, self.split.train, self.energies, self.forces,
                    self.config.lambda_, self.config.ridge,
                )  # fmt: skip
                solved = is_finite([self.engine.flat])
            except LinAlgError:
                solved = False
            if not solved:
                raise ModelError(f"the warm start has no finite solution: raise ridge ({self.config.ridge})")
        return self.blank()

    def blank(self) -> _State:
        """Return the state before the first step, without a warm start."""
        flat = self.engine.flat
        learned = flat if self.low_rank is None else self.low_rank.flat
        tensors = {
            "flat": flat,
            "exp_avg": torch.zeros_like(learned),
            "exp_avg_sq": torch.zeros_like(learned),
            "best": flat.clone(),
        }
        if self.low_rank is not None:
            tensors["factors"] = learned
        if self.config.ema_decay is not None:
            tensors["ema"] = flat.clone()
        inactive = dict.fromkeys(("flat", "ema", "best"), 1.0)
        return _State(
            0, 0, tensors, inactive, {"factor": 1.0, "best": sys.float_info.max, "bad": 0}, sys.float_info.max, 0, []
        )

    def restore(self, state: _State) -> None:
        """Continue from a state: its weights become the engine's own."""
        self.engine.flat.copy_(state.tensors["flat"])
        state.tensors = {name: tensor.to(self.group.device) for name, tensor in state.tensors.items()}
        state.tensors["flat"] = self.engine.flat
        if self.low_rank is not None:
            self.low_rank.flat.copy_(state.tensors["factors"])
            state.tensors["factors"] = self.low_rank.flat

    def epoch(self, state: _State) -> dict[str, float]:
        """Train one epoch, validate, and bring the state up to date; return the new row of the learning curve."""
        began, began_cpu, config = time.perf_counter(), time.process_time(), self.config
        # at the start all that a checkpoint held, later what unequal machines differ by; sorted, since a file has an
        # order of its own
        for name in sorted(state.tensors):
            self.group.follow_(state.tensors[name])
        train = _Errors()
        for indices, share in self._prepared(state.epoch):
            rate = self._rate(state)
            learned = self.engine if self.low_rank is None else self.low_rank
            update = Update(
                learned.flat, state.tensors["exp_avg"], state.tensors["exp_avg_sq"], learned.gradient,
                rate, config.weight_decay, state.step + 1,
            )  # fmt: skip
            self._step(len(indices), share, train, update)
            state.step += 1
            if self.trains_first:
                state.inactive["flat"] *= 1.0 - rate * config.weight_decay
            if config.ema_decay is not None:
                state.tensors["ema"].lerp_(self.engine.flat, 1.0 - config.ema_decay)
                state.inactive["ema"] += (1.0 - config.ema_decay) * (state.inactive["flat"] - state.inactive["ema"])
        train.collect(self.group)
        # after the epoch, since a GPU would have to wait at every step
        self.guard.check_losses(train.losses, state.epoch + 1, state.step - len(train.losses) + 1)
        validation = self._validate(state)
        row = {"epoch": float(state.epoch + 1), "lr": rate} | train.summary("train") | validation.summary("validation")
        score = math.sqrt(row["validation_force_rmse_vector"] * row["validation_energy_rmse_per_atom"])
        row |= {"validation_score": score, "seconds": time.perf_counter() - began}
        row |= {"cpu_seconds": time.process_time() - began_cpu}
        if score < state.best_score:
            source = "flat" if config.ema_decay is None else "ema"
            state.best_score, state.best_epoch = score, state.epoch + 1
            state.tensors["best"].copy_(state.tensors[source])
            state.inactive["best"] = state.inactive[source]
        if config.schedule == "plateau":
            self._plateau(state, row["validation_loss"])
        state.epoch += 1
        state.history.append(row)
        self.guard.check_epoch(row, state.tensors)
        return row

    def _step(self, n_structures: int, share: _Labelled | None, errors: _Errors, update: Update) -> None:
        """Take one step on a batch of so many structures, of which this process has a share, or none."""
        further = self.config.clip_norm, self.low_rank, self.replay
        at_once = update if self.group.size == 1 and further == (None, None, None) else None
        if share is not None:
            self.engine.loss_gradient(*share, errors.watch(self.loss, n_structures), at_once)
        else:
            self.engine.gradient.zero_()
            errors.skip(self.engine.gradient, n_structures)
        if at_once is None:
            self._finish_step(update)

    def _finish_step(self, update: Update) -> None:
        """Take a step with the gradient that the engine holds, and whatever else the settings ask for."""
        if self.replay is not None:
            self.replay.add_gradient(update.step, self.group)
        if self.low_rank is not None:
            self.low_rank.pull_back()
        self.group.sum_(update.slope)
        if self.config.clip_norm is not None:
            norm = torch.linalg.vector_norm(update.slope)
            update.slope.mul_((self.config.clip_norm / norm).clamp(max=1.0))
        apply(update)
        if self.low_rank is not None:
            self.low_rank.push()

    def _batches(self, epoch: int) -> Iterator[NDArray[np.int64]]:
        """Return the batches of an epoch."""
        # seeded by the epoch, so that a resumed run meets the same batches without stored generator states
        order = np.random.default_rng([self.config.seed, epoch]).permutation(self.split.train)
        if self.config.batch_atoms is None:
            return _chunks(order, self.config.batch_size)
        return _filled(order, self.sizes, self.config.batch_atoms)

    def _prepared(self, epoch: int) -> Iterator[tuple[NDArray[np.int64], _Labelled | None]]:
        """Return the batches of an epoch, each with this process' share of it, merged.

        Some are merged together: between two steps, which leave nothing else in the processor's cache, one costs four
        times as much.
        """
        batches = iter(self._batches(epoch))
        while ahead := list(islice(batches, _MERGED_TOGETHER)):
            shares = [self.group.share(indices) for indices in ahead]
            yield from zip(ahead, [self._batch(own) if len(own) else None for own in shares], strict=True)

    def _count_steps(self) -> int:
        """Return the number of steps of the whole training."""
        epochs = self.config.epochs
        if self.config.batch_atoms is None:
            return epochs * math.ceil(len(self.split.train) / self.config.batch_size)
        return sum(1 for epoch in range(epochs) for _ in self._batches(epoch))

    def potential(self, state: _State, which: str) -> Potential:
        """Return the model with the current, averaged or best weights."""
        return self.engine.potential(state.tensors[which], state.inactive[which])

    def _rate(self, state: _State) -> float:
        """Return the learning rate of the next step."""
        config, total = self.config, self.steps
        warmup = config.warmup_epochs * (total / config.epochs)
        rate = config.lr * min(1.0, (state.step + 1) / warmup) if warmup else config.lr
        if config.schedule == "cosine":
            return rate * 0.5 * (1.0 + math.cos(math.pi * state.step / total))
        return rate * state.plateau["factor"]

    def _plateau(self, state: _State, loss: float) -> None:
        """Halve the rate after `plateau_patience` epochs in which the loss fell by less than 0.01 %."""
        plateau = state.plateau
        if loss < plateau["best"] * (1.0 - 1e-4):
            plateau |= {"best": loss, "bad": 0}
            return
        plateau["bad"] += 1
        if plateau["bad"] > self.config.plateau_patience:
            plateau |= {"factor": 0.5 * plateau["factor"], "bad": 0}

    def _validate(self, state: _State) -> _Errors:
        """Return the errors of the validation part, with averaged weights if there are any."""
        if "ema" not in state.tensors:
            return self._errors(self.split.validation)
        trained = self.engine.flat.clone()
        self.engine.flat.copy_(state.tensors["ema"])
        errors = self._errors(self.split.validation)
        self.engine.flat.copy_(trained)
        return errors

    def _errors(self, indices: NDArray[np.int64]) -> _Errors:
        errors = _Errors()
        for part in self._portions(indices):
            own = self.group.share(part)
            if len(own) == 0:
                errors.skip(self.engine.flat, len(part))
                continue
            batch, energies, forces = self._batch(own)
            predicted = self.engine.energies_forces(batch)
            error = (predicted.energies - energies).to(forces.dtype)
            errors.watch(self.loss, len(part))(error, predicted.forces - forces, batch.n_atoms, batch.structure)
        errors.collect(self.group)
        return errors

    def _portions(self, indices: NDArray[np.int64]) -> Iterator[NDArray[np.int64]]:
        """Return structures in portions for which there is memory."""
        if self.config.batch_atoms is None:
            n_portions = math.ceil(len(indices) / (_PORTION * self.group.size))
            return iter(np.array_split(indices, n_portions))
        return _filled(indices, self.sizes, self.config.batch_atoms)

    def _network_energies(self, indices: NDArray[np.int64]) -> Tensor:
        batches = (merge([self.cache[i] for i in part]) for part in self._portions(indices))
        return torch.cat([self.engine.energies_forces(batch).energies for batch in batches]).cpu()

    def _batch(self, indices: NDArray[np.int64]) -> _Labelled:
        batch = merge([self.cache[i] for i in indices])
        # picked one by one: an index array would have to be sent to a GPU
        energies = torch.stack([self.energies[i] for i in indices])
        return _Labelled(batch, energies, torch.cat([self.forces[i] for i in indices]))


class _Errors:
    """Losses and errors of the batches of an epoch; they stay on the device, as they are, until :meth:`collect`."""

    def __init__(self) -> None:
        self._losses: list[Tensor] = []
        self._errors: list[tuple[Tensor, Tensor, Tensor]] = []
        """Energies, forces and atoms per structure."""
        self._structures: list[int] = []
        self._sums = [0.0] * 4
        self.losses: list[float] = []
        """Loss of every batch."""

    def watch(self, loss: partial[LossAndSlopes], n_structures: int) -> partial[LossAndSlopes]:
        """Return the loss function of a share of a batch of so many structures, made to note what it sees."""
        return partial(self._call, loss, n_structures)

    def skip(self, like: Tensor, n_structures: int) -> None:
        """Note a batch of which this process has no share."""
        self._losses.append(like.new_zeros(()))
        self._errors.append((like.new_zeros(0), like.new_zeros(0, 3), like.new_zeros(0)))
        self._structures.append(n_structures)

    def _call(
        self,
        loss: partial[LossAndSlopes],
        n_structures: int,
        energy_error: Tensor,
        force_error: Tensor,
        n_atoms: Tensor,
        structure: Tensor,
    ) -> LossAndSlopes:
        result = loss(energy_error, force_error, n_atoms, structure, n_structures=n_structures)
        self._losses.append(result.loss)
        self._errors.append((energy_error, force_error, n_atoms))
        self._structures.append(n_structures)
        return result

    def collect(self, group: Group) -> None:
        """Add up what all processes noted."""
        energies, forces, n_atoms = (torch.cat(parts).double() for parts in zip(*self._errors, strict=True))
        sums = torch.stack([(energies / n_atoms).square().sum(), forces.square().sum(), n_atoms.sum()])
        *self.losses, energy, force, atoms = group.sum_(torch.cat([torch.stack(self._losses).double(), sums])).tolist()
        weighted = sum(loss * n for loss, n in zip(self.losses, self._structures, strict=True))
        self._sums = [weighted, energy, force, atoms]
        self._errors.clear()

    def summary(self, part: str) -> dict[str, float]:
        """Return mean loss and RMSEs under the names of the learning curve."""
        loss, squared_energy, squared_force, atoms = self._sums
        structures = sum(self._structures)
        return {
            f"{part}_loss": loss / structures,
            f"{part}_energy_rmse_per_atom": math.sqrt(squared_energy / structures),
            f"{part}_force_rmse_vector": math.sqrt(squared_force / atoms),
        }


def run_name(model: Potential, dataset: Dataset, split: Split, config: FinetuneConfig) -> str:
    """Return a folder name that says what a run is and changes with everything that decides its result.

    Names come from users and files: what would lead to another folder is replaced, and what is too long for a file
    system cut off.
    """
    names = (re.sub(r"[/\\\x00-\x1f\x7f]+", "-", name)[:60] for name in (dataset.name, model.name, config.recipe))
    return f"{'-'.join(names)}-{config.seed}-{_hash(_describe(model, dataset, split, config))}"


def start_hash(model: Potential) -> str:
    """Return a hash of a start model: name, weights and borrowed elements."""
    return _hash(_describe_start(model))


def _hash(description: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(description, sort_keys=True).encode()).hexdigest()[:12]


def _chunks(indices: NDArray[np.int64], size: int) -> Iterator[NDArray[np.int64]]:
    return (indices[first : first + size] for first in range(0, len(indices), size))


def _filled(indices: NDArray[np.int64], sizes: Sequence[int], n_atoms: int) -> Iterator[NDArray[np.int64]]:
    """Yield runs of indices, each as long as `n_atoms` allows and at least one."""
    first, atoms = 0, 0
    for place, index in enumerate(indices):
        if place > first and atoms + sizes[index] > n_atoms:
            yield indices[first:place]
            first, atoms = place, 0
        atoms += sizes[index]
    yield indices[first:]


def _is_stopped(state: _State, config: FinetuneConfig) -> bool:
    return config.early_stopping is not None and state.epoch - state.best_epoch >= config.early_stopping


def _check_split(dataset: Dataset, split: Split) -> None:
    for name in ("train", "validation"):
        indices = getattr(split, name)
        if len(indices) == 0:
            raise DataError(f"the {name} part of the split of {dataset.name} is empty")
        if indices.max() >= len(dataset):
            raise DataError(
                f"the {name} part of the split names frame {indices.max()}, but {dataset.name} holds {len(dataset)}"
            )


def _describe(model: Potential, dataset: Dataset, split: Split, config: FinetuneConfig) -> dict[str, Any]:
    """Return everything that decides the result, as JSON."""
    digest = hashlib.sha256(json.dumps(split.to_json(), sort_keys=True).encode())
    return {
        "start_model": _describe_start(model),
        "data": {"name": dataset.name, "hash": dataset.hash, "frames": len(dataset)},
        "split": {"hash": digest.hexdigest(), "train": len(split.train), "validation": len(split.validation)},
        # settings that came later stay out where they change nothing, so that runs made before go on
        "config": config.model_dump(exclude=_later_settings(config)),
    }


def _describe_start(model: Potential) -> dict[str, Any]:
    return {
        "name": model.name,
        "fingerprint": model.fingerprint,
        "element_map": model.element_map,
        "weights": _weights_hash(model),
    }


def _later_settings(config: FinetuneConfig) -> set[str]:
    """Return the settings that did not exist once and that change nothing here."""
    unused = {"warm_start", "ridge"} if config.warm_start == "none" else set()
    later = ("members", "batch_atoms", "richer", "rank", "replay")
    return unused | {name for name in later if getattr(config, name) == FinetuneConfig.model_fields[name].default}


def _weights_hash(model: Potential) -> str:
    digest = hashlib.sha256()
    for symbol in model.symbols:
        for layer in model.networks[symbol]:
            for part in layer:
                digest.update(part.contiguous().numpy().tobytes())
    return digest.hexdigest()


def _claim(folder: Path, description: dict[str, Any], split: Split) -> None:
    """Write the description of a run into its folder, or check that the one there is the same."""
    claim(folder, ["run.json"], "a run")
    path = folder / "run.json"
    if not path.exists():
        write_json(path, description)
        write_json(folder / "split.json", split.to_json())
        return
    try:
        theirs = _flatten(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, AttributeError) as error:  # no text, no JSON, another JSON
        raise ConfigError(f"{path} is not readable ({error}): choose another run_dir or delete this one") from error
    ours = _flatten(description)
    different = [key for key in sorted(ours | theirs) if ours.get(key) != theirs.get(key)]
    if different:
        listed = ", ".join(f"{key} ({theirs.get(key)!r} there, {ours.get(key)!r} now)" for key in different[:4])
        raise ConfigError(f"{folder} holds another run: {listed}; choose another run_dir or delete this one")
    if not (folder / "split.json").exists():
        write_json(folder / "split.json", split.to_json())  # killed in between


def _flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def _finished(folder: Path, config: FinetuneConfig, run_id: str, validation: Dataset, *, tidy: bool) -> FinetuneResult:
    """Return the result of a run that had ended."""
    _LOG.info("%s holds this run, finished", folder)
    path = folder / "model.safetensors"
    potential, metadata = load_model(path)
    if metadata.get("run_id") != run_id:
        raise ConfigError(f"{path} belongs to run {metadata.get('run_id')}, not to {run_id}: delete it to train anew")
    error = float(metadata["metrics"]["validation_force_rmse_vector"])
    if error > HOPELESS * max(1.0, force_rms(validation.forces)):
        # of a version that kept whatever came out
        raise ModelError(f"{path} is of a training that diverged, force RMSE {error:.4g} eV/A: delete {folder}")
    history = _read_history(folder / "history.csv")
    best_epoch = int(history["epoch"].iloc[int(history["validation_score"].argmin())])
    if tidy:
        _tidy_later(folder, run_id)
    return FinetuneResult(potential, history, best_epoch, config, run_id, folder, len(history))


def _tidy(folder: Path) -> None:
    """Remove what a finished run has no use for: its state to go on from, never anything that it did not write."""
    (folder / "state.safetensors").unlink(missing_ok=True)
    with suppress(OSError):  # where open files cannot be removed
        (folder / ".lock").unlink(missing_ok=True)


def _tidy_later(folder: Path, run_id: str) -> None:
    """Remove the state of a run that was killed in the moment before, if it is this run's."""
    with suppress(OSError, ModelError):  # kept where nobody may write, perhaps, or not there
        if load_tensors(folder / "state.safetensors")[1].get("run_id") == run_id:
            _tidy(folder)


def _save_state(folder: Path, state: _State, run_id: str) -> None:
    """Write the checkpoint, then the learning curve."""
    save_tensors(folder / "state.safetensors", state.tensors, {"run_id": run_id, "state": _scalars(state)})
    _save_history(folder, state)


def _save_history(folder: Path, state: _State) -> None:
    with atomic_path(folder / "history.csv") as temporary:
        pd.DataFrame(state.history).to_csv(temporary, index=False)


def _read_history(path: Path) -> pd.DataFrame:
    """Return the learning curve of a finished run, to the last bit."""
    try:
        # numbers as Python reads them, which is exact
        history = pd.read_csv(path, dtype=str).astype(float)
        missing = {"epoch", "validation_score"} - set(history)
        problem = f"it has no {', '.join(sorted(missing))}" if missing else "" if len(history) else "it has no rows"
    except FileNotFoundError:
        problem = "it does not exist"
    except ValueError as error:  # of pandas, too
        problem = str(error)
    if problem:
        raise DataError(f"{path} is not the learning curve of the finished run beside it: {problem}")
    return history


def _without_result(error: ModelError, folder: Path | None, state: _State) -> ModelError:
    """Return the error of a training that diverged, with what is kept of it: the curve, no model."""
    if folder is None:
        return error
    if state.history:
        _save_history(folder, state)
    return ModelError(f"{error}; {folder} holds no finished run, so choose another run_dir or delete this one")


class _Kept:
    """The state after the last whole epoch, apart from the one that the training changes."""

    def __init__(self, wanted: bool) -> None:
        self._wanted = wanted
        self.state: _State | None = None

    def __call__(self, state: _State) -> None:
        """Keep a state, if anybody can write it down."""
        if self._wanted:
            # a new one every time: an interrupt in the midst of copying leaves the one before
            self.state = state.copy()


@contextmanager
def _kept_on_interrupt(folder: Path | None, config: FinetuneConfig, run_id: str) -> Iterator[_Kept]:
    """Save the last whole epoch if the block is interrupted, or loses contact to its other processes."""
    keep = _Kept(folder is not None)
    with heeded():
        try:
            yield keep
        except (KeyboardInterrupt, ContactError) as error:
            whole = keep.state
            if folder is not None and whole is not None and whole.epoch and not _has_model(folder):
                with undisturbed():
                    _save_state(folder, whole, run_id)
            if isinstance(error, ContactError):
                raise
            raise interrupted(error, _how_to_go_on(folder, whole, config)) from None


def _has_model(folder: Path) -> bool:
    return (folder / "model.safetensors").exists()


def _how_to_go_on(folder: Path | None, whole: _State | None, config: FinetuneConfig) -> str:
    if folder is None:
        return "interrupted: a training without a run_dir keeps nothing, the same call begins anew"
    if _has_model(folder):
        return f"interrupted: the training had ended and is kept in {folder}, the same call goes on from there"
    if whole is None and (folder / "state.safetensors").exists():
        return f"interrupted before {folder} went on: it is as it was, the same call goes on from there"
    if whole is None:
        return (
            f"interrupted before the first of {config.epochs} epochs: descriptors are kept once all of them are "
            "computed, the same call begins anew"
        )
    if whole.epoch == 0:
        return f"interrupted in the first epoch of {config.epochs}: nothing is kept yet, the same call begins anew"
    return (
        f"interrupted after epoch {whole.epoch} of {config.epochs}, which is kept in {folder}: "
        "the same call, or the same command, goes on from there"
    )


def _scalars(state: _State) -> dict[str, Any]:
    return {key: value for key, value in vars(state).items() if key != "tensors"}


def _load_state(path: Path, run_id: str) -> _State:
    tensors, metadata = load_tensors(path)
    if metadata.get("run_id") != run_id:
        raise ConfigError(f"{path} belongs to run {metadata.get('run_id')}, not to {run_id}: delete it to start anew")
    return _State(tensors=tensors, **metadata["state"])


def _bar(progress: bool | None, total: int, name: str, delay: float = 0.0) -> tqdm[Any]:
    """Return a progress bar, silent unless somebody watches; with a delay, not there before the first step."""
    if progress is None:
        progress = is_watched()
    return tqdm(total=total, desc=name, disable=not progress, leave=False, delay=delay)


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """Let torch use so many threads for a while."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _events(folder: Path | None) -> Iterator[Any]:
    """Yield a function that writes a row of the learning curve as TensorBoard scalars."""
    if folder is None:
        yield lambda row: None
        return
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ConfigError("tensorboard is not installed: pip install 'tlmc[tensorboard]'") from error
    writer = SummaryWriter(str(folder / "tensorboard"))

    def write(row: dict[str, float]) -> None:
        for key, value in row.items():
            if key != "epoch":
                writer.add_scalar(key, value, int(row["epoch"]))

    try:
        yield write
    finally:
        writer.close()
