"""Fine-tuning of a start model on a labelled data set, whatever its family: in a run folder or in memory."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from tqdm.auto import tqdm

from tlmc.arguments import checked
from tlmc.data.dataset import Dataset
from tlmc.data.splits import Split
from tlmc.devices import find_device
from tlmc.equality import equal_by_content
from tlmc.errors import ConfigError, DataError, ModelError
from tlmc.potentials.model import Potential
from tlmc.potentials.reference import fit_reference
from tlmc.potentials.registry import family_of
from tlmc.progress import is_watched
from tlmc.training.config import FinetuneConfig
from tlmc.training.distributed import Group
from tlmc.training.divergence import force_rms
from tlmc.training.identity import describe_run
from tlmc.training.replay import isolated_molecules
from tlmc.training.run_folder import Kept, RunFolder
from tlmc.training.trainer import Trainer, network_energies

_LOG = logging.getLogger(__name__)


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
    run_key: str
    """Hash of start model, data, split and settings (:mod:`tlmc.training.identity`)."""
    run_dir: Path | None
    resumed_from: int
    """Epoch from which a killed run went on; 0 for a fresh one."""


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
        Start model; every element of the data must have a network (see
        :meth:`tlmc.potentials.Potential.with_elements`).
    dataset, split
        Labelled frames and their parts. The test part is not looked at. Labels are taken as they are: whoever calls
        this has compared them with the start model, as :func:`tlmc.experiments.run_experiment` does
        (:func:`tlmc.evaluation.label_check.check_labels`).
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
        Threads to train with. By default all of torch's, and one for a single network of ANI, whose steps are so
        short that a second thread gains a fifth on a quiet machine and costs a factor on a busy one.
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
        there is no such device, the family of the model has no use for a setting, or the processes of a group differ in
        what they were given.
    Interrupted
        On Ctrl-C or SIGTERM, after the last whole epoch is saved to `run_dir`: a `KeyboardInterrupt`.
    """
    config = config or FinetuneConfig()
    group = group or Group(device=find_device(device))
    _check_split(dataset, split)
    for frame in dataset.frames:
        model.check_elements(frame)  # an element without a network is an error before anything is written
    family_of(model).check(model, config)  # likewise
    if tensorboard and run_dir is None:
        raise ConfigError("tensorboard needs a run_dir to write to")
    folder = RunFolder(
        None if run_dir is None else Path(run_dir).expanduser(), describe_run(model, dataset, split, config)
    )
    group.check_same(folder.key, "settings, data or start weights")
    with ExitStack() as stack:
        if group.is_first:
            folder.claim(split)
            stack.enter_context(folder.held())
        if group.from_first(folder.has_model):
            label_force = force_rms(dataset.forces[k] for k in split.validation)
            done = folder.read_finished(label_force, tidy=group.is_first)
            return FinetuneResult(*done, config, folder.key, folder.path, len(done.history))
        if not group.is_first:
            folder, progress = RunFolder(None, folder.description), False
        keep = stack.enter_context(folder.kept_on_interrupt(config))
        return _train(
            model, dataset, split, config, folder, keep, progress, tensorboard, checkpoint_seconds, threads, group
        )


def _train(
    model: Potential,
    dataset: Dataset,
    split: Split,
    config: FinetuneConfig,
    folder: RunFolder,
    keep: Kept,
    progress: bool | None,
    tensorboard: bool,
    checkpoint_seconds: float,
    threads: int | None,
    group: Group,
) -> FinetuneResult:
    """Train, from the state in the folder if there is one, and write the result."""
    family = family_of(model)
    begin = family.first_model(model, dataset, split, config)
    replayed = isolated_molecules(dataset.elements, "replayed") if config.replay else []
    described = (*dataset.frames, *replayed)
    # shown only once there is something to compute: a cache that is there is opened at once
    with _bar(progress, len(described), "descriptors", delay=1e-9) as bar:
        learner = family.learner(begin, described, config, group, bar.update)
    group.check_same(learner.digest, "descriptors")
    threads = threads or learner.threads or torch.get_num_threads()
    train = dataset.subset(split.train)
    predicted = network_energies(learner, split.train, dataset.n_atoms.tolist(), config, group)
    bare = begin.with_reference(None).atomic_reference(train.frames).numpy()
    reference = fit_reference(train.frames, train.energies, predicted + bare)
    targets = dataset.energies - begin.with_reference(reference).atomic_reference(dataset.frames).numpy()
    replayed_at = range(len(dataset), len(described))
    trainer = Trainer(learner, targets, dataset.forces, split, config, replayed_at, group)
    if not group.is_first:
        state = trainer.blank()
    elif folder.has_state:
        state = folder.read_state()
        _LOG.info("resuming %s at epoch %d of %d", folder.path, state.epoch, config.epochs)
    else:
        with _threads(threads):
            state = trainer.start()
    vars(state).update(group.from_first(state.scalars()))
    resumed_from = state.epoch
    trainer.restore(state)
    keep(state)

    saved = time.monotonic()
    with (
        _threads(threads),
        _bar(progress, config.epochs, config.recipe) as bar,
        _events(folder.path if tensorboard else None) as write_event,
    ):
        bar.update(state.epoch)
        while state.epoch < config.epochs and not state.is_stopped(config):
            try:
                row = trainer.epoch(state)
            except ModelError as error:
                raise folder.without_result(error, state) from error
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
            if time.monotonic() - saved > checkpoint_seconds:
                folder.write_state(state)
                saved = time.monotonic()

    row = state.history[-1 if config.keep == "last" else state.best_epoch - 1]
    which = "best" if config.keep == "best" else "ema" if config.ema_decay else "flat"
    kept = trainer.potential(state, which).with_reference(reference)
    try:
        trainer.guard.check_end(row)
        kept.check_weights("the trained model")
    except ModelError as error:
        raise folder.without_result(error, state) from error
    kinds = {"crystals": int(dataset.is_crystal[split.train].sum())}
    kinds["molecules"] = len(split.train) - kinds["crystals"]
    folder.finish(state, kept, {"config": config.model_dump(), "metrics": row, "trained_on": kinds})
    history = pd.DataFrame(state.history)
    return FinetuneResult(kept, history, state.best_epoch, config, folder.key, folder.path, resumed_from)


def _check_split(dataset: Dataset, split: Split) -> None:
    for name in ("train", "validation"):
        indices = getattr(split, name)
        if len(indices) == 0:
            raise DataError(f"the {name} part of the split of {dataset.name} is empty")
        if indices.max() >= len(dataset):
            raise DataError(
                f"the {name} part of the split names frame {indices.max()}, but {dataset.name} holds {len(dataset)}"
            )


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
