"""Whether a training diverged: what is no number any more, and what still is one but makes no sense."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tlmc.errors import ModelError

HOPELESS: Final = 100.0
"""Errors so many times :attr:`Guard.scales` end a training at once: no later epoch mends them."""
USELESS: Final = 10.0
"""A model with errors so many times these is no result."""

_FORCE, _ENERGY = "validation_force_rmse_vector", "validation_energy_rmse_per_atom"
_SMALL: Final = {_FORCE: 0.1, _ENERGY: 0.3}
"""eV/A and eV/atom. Smaller forces are of relaxed structures and say nothing about the size of errors; a loss of forces
alone leaves a constant of the energies free."""
_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Guard:
    """What a training may not end in.

    An error is too large by comparison with the model that the training began with and with a model that predicts no
    forces at all: a good start model leaves room for a worse result, which is said, but not for a senseless one.
    """

    start: Mapping[str, float]
    """Errors before the first step: ``validation_force_rmse_vector`` (eV/A), ``validation_energy_rmse_per_atom``
    (eV/atom)."""
    label_force: float
    """Root mean square of the labelled force vectors of the validation part, eV/A."""
    remedy: str
    """What to do about it, ``"lower lr (0.001)"``."""

    @property
    def scales(self) -> dict[str, float]:
        """The largest errors that have nothing to do with divergence."""
        floors = _SMALL | {_FORCE: max(_SMALL[_FORCE], self.label_force)}
        return {name: max(floor, self.start[name]) for name, floor in floors.items()}

    def check_losses(self, losses: Sequence[float], epoch: int, first_step: int) -> None:
        """Raise a ModelError if the loss of a step, counted from `first_step`, is not finite."""
        for step, loss in enumerate(losses, start=first_step):
            if not math.isfinite(loss):
                raise ModelError(f"the loss became {loss} in epoch {epoch}, step {step}: {self.remedy}")

    def check_epoch(self, row: Mapping[str, float], tensors: Mapping[str, Tensor]) -> None:
        """Raise a ModelError if weights or errors after an epoch are not finite, or the errors hopeless.

        The loss of a step tells what the step before it did: only this sees the last one.
        """
        epoch = int(row["epoch"])
        broken = [name for name, finite in zip(tensors, _finite(tensors.values()), strict=True) if not finite]
        if broken:
            raise ModelError(
                f"the training diverged: {', '.join(broken)} are not finite after epoch {epoch}: {self.remedy}"
            )
        for name, value in row.items():
            if not math.isfinite(value):
                raise ModelError(f"the training diverged: {name} is {value} after epoch {epoch}: {self.remedy}")
        self._check_size(row, HOPELESS)

    def check_end(self, row: Mapping[str, float]) -> None:
        """Raise a ModelError if the kept weights make no sense; warn if they are worse than those at the start."""
        self._check_size(row, USELESS)
        if row[_FORCE] * row[_ENERGY] > self.start[_FORCE] * self.start[_ENERGY]:
            _LOG.warning(
                "the training made the model worse: validation errors %s at the start, %s in epoch %d; %s",
                _errors(self.start), _errors(row), int(row["epoch"]), self.remedy,
            )  # fmt: skip

    def _check_size(self, row: Mapping[str, float], times: float) -> None:
        if any(row[name] > times * scale for name, scale in self.scales.items()):
            raise ModelError(
                f"the training diverged: validation errors {_errors(row)} after epoch {int(row['epoch'])}, "
                f"{_errors(self.start)} before it began: {self.remedy}"
            )


def force_rms(forces: Iterable[NDArray[np.float64]]) -> float:
    """Return the root mean square length of force vectors, eV/A, of arrays ``(n_atoms, 3)``."""
    return float(np.sqrt(np.square(np.concatenate(list(forces))).sum(axis=1).mean()))


def is_finite(tensors: Iterable[Tensor]) -> bool:
    """Tell whether no tensor holds infinity or NaN."""
    return all(_finite(tensors))


def _finite(tensors: Iterable[Tensor]) -> list[bool]:
    """Tell it of each of them, with one answer from the device on which they are."""
    flags = [torch.isfinite(tensor).all() for tensor in tensors]
    found: list[bool] = torch.stack(flags).tolist() if flags else []
    return found


def _errors(row: Mapping[str, Any]) -> str:
    return f"F {row[_FORCE]:.4g} eV/A, E {1e3 * row[_ENERGY]:.4g} meV/atom"
