"""The training loop: batches, schedules, averages, stopping, validation. It knows no architecture."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from typing import Any, Final, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.linalg import LinAlgError  # type: ignore[attr-defined]

from tlmc.data.splits import Split
from tlmc.equality import equal_by_content
from tlmc.errors import ModelError
from tlmc.potentials.model import Potential
from tlmc.training.config import FinetuneConfig
from tlmc.training.distributed import Group
from tlmc.training.divergence import Guard, force_rms, is_finite
from tlmc.training.learner import Learner
from tlmc.training.loss import LossAndSlopes, batch_loss
from tlmc.training.low_rank import LowRank
from tlmc.training.optimizer import Update, apply
from tlmc.training.replay import Replay

_PORTION: Final = 16
"""Structures that are evaluated together, without a step, by one process."""


@equal_by_content
@dataclass(eq=False)
class State:
    """Everything that changes while training; a checkpoint holds exactly this."""

    epoch: int
    step: int
    tensors: dict[str, Tensor]
    """flat weights, AdamW's moments, averaged and best weights; all shaped like the flat weights."""
    unseen: dict[str, float]
    """Decay of weights on which nothing in the frames depends, for the current, averaged and best weights."""
    plateau: dict[str, float]
    best_score: float
    best_epoch: int
    history: list[dict[str, float]]

    def is_stopped(self, config: FinetuneConfig) -> bool:
        """Tell whether early stopping ends the training here."""
        return config.early_stopping is not None and self.epoch - self.best_epoch >= config.early_stopping

    def scalars(self) -> dict[str, Any]:
        """Return all but the tensors."""
        return {key: value for key, value in vars(self).items() if key != "tensors"}

    def copy(self) -> State:
        """Return a state that further training leaves as it is."""
        return replace(
            self,
            tensors={name: tensor.clone() for name, tensor in self.tensors.items()},
            unseen=dict(self.unseen),
            plateau=dict(self.plateau),
            history=list(self.history),
        )


class _Labelled(NamedTuple):
    """A batch and its labels, as :meth:`tlmc.training.learner.Learner.loss_gradient` takes them."""

    batch: Any
    energies: Tensor
    forces: Tensor


class Trainer:
    """A learner, the labels in its order, and the optimiser of one run.

    Parameters
    ----------
    learner
        Made for the frames of the labels, and behind them those for replay.
    energies
        Labels for the energies of the learner's network, without offsets, eV, shape ``(n_frames,)``.
    forces
        Labels of every frame, eV/A, each of shape ``(n_atoms, 3)``.
    split
        Training and validation part.
    config
        Settings.
    replayed
        Places of the frames for replay.
    group
        The processes that train together.
    """

    def __init__(
        self,
        learner: Learner,
        energies: NDArray[np.float64],
        forces: Sequence[NDArray[np.float64]],
        split: Split,
        config: FinetuneConfig,
        replayed: Sequence[int],
        group: Group,
    ) -> None:
        self.learner, self.config, self.split, self.group = learner, config, split, group
        self.sizes = [len(force) for force in forces]
        self.forces = [learner.arranged(i, force) for i, force in enumerate(forces)]
        self.energies = torch.from_numpy(energies).to(group.device)
        self.loss = partial(batch_loss, lambda_=config.lambda_, kind=config.loss, delta=config.huber_delta)
        self.steps = self._count_steps()
        self.low_rank = LowRank(learner, config.rank, config.seed) if config.rank else None
        self.replay = (
            Replay(learner, replayed, config.replay, config.batch_size, self.loss, config.seed) if replayed else None
        )
        self.guard = Guard(
            self._errors(split.validation).summary("validation"),
            force_rms(forces[k] for k in split.validation),
            f"lower lr ({config.lr})" + (" or set clip_norm" if config.clip_norm is None else ""),
        )

    def start(self) -> State:
        """Return the state before the first step, after the warm start if there is one."""
        if self.config.warm_start == "ridge":
            try:
                self.learner.warm_start(
                    self.split.train.tolist(), self.energies, self.forces, self.config.lambda_, self.config.ridge
                )
                solved = is_finite([self.learner.flat])
            except LinAlgError:
                solved = False
            if not solved:
                raise ModelError(f"the warm start has no finite solution: raise ridge ({self.config.ridge})")
        return self.blank()

    def blank(self) -> State:
        """Return the state before the first step, without a warm start."""
        flat = self.learner.flat
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
        unseen = dict.fromkeys(("flat", "ema", "best"), 1.0)
        return State(
            0, 0, tensors, unseen, {"factor": 1.0, "best": sys.float_info.max, "bad": 0}, sys.float_info.max, 0, []
        )

    def restore(self, state: State) -> None:
        """Continue from a state: its weights become the learner's own."""
        self.learner.flat.copy_(state.tensors["flat"])
        state.tensors = {name: tensor.to(self.group.device) for name, tensor in state.tensors.items()}
        state.tensors["flat"] = self.learner.flat
        if self.low_rank is not None:
            self.low_rank.flat.copy_(state.tensors["factors"])
            state.tensors["factors"] = self.low_rank.flat

    def epoch(self, state: State) -> dict[str, float]:
        """Train one epoch, validate, and bring the state up to date; return the new row of the learning curve."""
        began, began_cpu, config = time.perf_counter(), time.process_time(), self.config
        # at the start all that a checkpoint held, later what unequal machines differ by; sorted, since a file has an
        # order of its own
        for name in sorted(state.tensors):
            self.group.follow_(state.tensors[name])
        train = _Errors()
        for indices, share in self._prepared(state.epoch):
            rate = self._rate(state)
            learned = self.learner if self.low_rank is None else self.low_rank
            update = Update(
                learned.flat, state.tensors["exp_avg"], state.tensors["exp_avg_sq"], learned.gradient,
                rate, config.weight_decay, state.step + 1,
            )  # fmt: skip
            self._step(len(indices), share, train, update)
            state.step += 1
            if self.low_rank is None:
                state.unseen["flat"] *= 1.0 - rate * config.weight_decay
            if config.ema_decay is not None:
                state.tensors["ema"].lerp_(self.learner.flat, 1.0 - config.ema_decay)
                state.unseen["ema"] += (1.0 - config.ema_decay) * (state.unseen["flat"] - state.unseen["ema"])
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
            state.unseen["best"] = state.unseen[source]
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
            self.learner.loss_gradient(*share, errors.watch(self.loss, n_structures), at_once)
        else:
            self.learner.gradient.zero_()
            errors.skip(self.learner.gradient, n_structures)
        if at_once is None:
            self._finish_step(update)

    def _finish_step(self, update: Update) -> None:
        """Take a step with the gradient that the learner holds, and whatever else the settings ask for."""
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
        """Return the batches of an epoch, each with this process' share of it, some of them made ready together."""
        batches = iter(self._batches(epoch))
        while ahead := list(islice(batches, self.learner.n_together)):
            shares = [self.group.share(indices) for indices in ahead]
            yield from zip(ahead, [self._batch(own) if len(own) else None for own in shares], strict=True)

    def _count_steps(self) -> int:
        """Return the number of steps of the whole training."""
        epochs = self.config.epochs
        if self.config.batch_atoms is None:
            return epochs * math.ceil(len(self.split.train) / self.config.batch_size)
        return sum(1 for epoch in range(epochs) for _ in self._batches(epoch))

    def potential(self, state: State, which: str) -> Potential:
        """Return the model with the current, averaged or best weights, without reference energies."""
        return self.learner.potential(state.tensors[which], state.unseen[which])

    def _rate(self, state: State) -> float:
        """Return the learning rate of the next step."""
        config, total = self.config, self.steps
        warmup = config.warmup_epochs * (total / config.epochs)
        rate = config.lr * min(1.0, (state.step + 1) / warmup) if warmup else config.lr
        if config.schedule == "cosine":
            return rate * 0.5 * (1.0 + math.cos(math.pi * state.step / total))
        return rate * state.plateau["factor"]

    def _plateau(self, state: State, loss: float) -> None:
        """Halve the rate after `plateau_patience` epochs in which the loss fell by less than 0.01 %."""
        plateau = state.plateau
        if loss < plateau["best"] * (1.0 - 1e-4):
            plateau |= {"best": loss, "bad": 0}
            return
        plateau["bad"] += 1
        if plateau["bad"] > self.config.plateau_patience:
            plateau |= {"factor": 0.5 * plateau["factor"], "bad": 0}

    def _validate(self, state: State) -> _Errors:
        """Return the errors of the validation part, with averaged weights if there are any."""
        if "ema" not in state.tensors:
            return self._errors(self.split.validation)
        trained = self.learner.flat.clone()
        self.learner.flat.copy_(state.tensors["ema"])
        errors = self._errors(self.split.validation)
        self.learner.flat.copy_(trained)
        return errors

    def _errors(self, indices: NDArray[np.int64]) -> _Errors:
        errors = _Errors()
        for part in portions(indices, self.sizes, self.config, self.group):
            own = self.group.share(part)
            if len(own) == 0:
                errors.skip(self.learner.flat, len(part))
                continue
            batch, energies, forces = self._batch(own)
            predicted = self.learner.energies_forces(batch)
            error = (predicted.energies - energies).to(forces.dtype)
            errors.watch(self.loss, len(part))(error, predicted.forces - forces, batch.n_atoms, batch.structure)
        errors.collect(self.group)
        return errors

    def _batch(self, indices: NDArray[np.int64]) -> _Labelled:
        batch = self.learner.batch(indices)
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


def network_energies(
    learner: Learner, indices: NDArray[np.int64], sizes: Sequence[int], config: FinetuneConfig, group: Group
) -> NDArray[np.float64]:
    """Return what a learner's network says about the energies of some frames, eV, every process by itself."""
    batches = map(learner.batch, portions(indices, sizes, config, group))
    energies: NDArray[np.float64] = torch.cat([learner.energies_forces(b).energies for b in batches]).cpu().numpy()
    return energies


def portions(
    indices: NDArray[np.int64], sizes: Sequence[int], config: FinetuneConfig, group: Group
) -> Iterator[NDArray[np.int64]]:
    """Return structures in portions for which there is memory."""
    if config.batch_atoms is None:
        return iter(np.array_split(indices, math.ceil(len(indices) / (_PORTION * group.size))))
    return _filled(indices, sizes, config.batch_atoms)


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
