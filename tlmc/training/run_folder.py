"""The folder of a run: what it holds while it trains and once it has ended, and who may write there."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from tlmc.data.splits import Split
from tlmc.equality import equal_by_content
from tlmc.errors import ConfigError, DataError, ModelError
from tlmc.files import atomic_path, claim, held, write_json
from tlmc.potentials.model import Potential
from tlmc.potentials.model_files import load_model, load_tensors, save_model, save_tensors
from tlmc.training.config import FinetuneConfig
from tlmc.training.distributed import ContactError
from tlmc.training.divergence import HOPELESS
from tlmc.training.identity import key_of
from tlmc.training.interrupts import heeded, interrupted, undisturbed
from tlmc.training.trainer import State

_LOG = logging.getLogger(__name__)


@equal_by_content
class Finished(NamedTuple):
    """What a run folder holds in the end."""

    potential: Potential
    history: pd.DataFrame
    best_epoch: int


class RunFolder:
    """One run on disk: ``run.json``, ``split.json``, ``history.csv``, and a state to go on from or the model.

    Parameters
    ----------
    path
        The folder; None keeps nothing.
    description
        Of the run (:func:`tlmc.training.identity.describe_run`).
    """

    def __init__(self, path: Path | None, description: dict[str, Any]) -> None:
        self.path, self.description, self.key = path, description, key_of(description)

    @property
    def has_model(self) -> bool:
        """Whether the run has ended."""
        return self.path is not None and (self.path / "model.safetensors").exists()

    @property
    def has_state(self) -> bool:
        """Whether there is a state to go on from."""
        return self.path is not None and (self.path / "state.safetensors").exists()

    def claim(self, split: Split) -> None:
        """Write description and split into the folder, or check that those there are the same.

        Raises
        ------
        ConfigError
            If the folder holds another run, or files but no run.
        """
        if self.path is None:
            return
        claim(self.path, ["run.json"], "a run")
        path = self.path / "run.json"
        if not path.exists():
            write_json(path, self.description)
        try:
            theirs = _flatten(json.loads(path.read_text(encoding="utf-8")))
        except (ValueError, AttributeError) as error:  # no text, no JSON, another JSON
            raise ConfigError(f"{path} is not readable ({error}): choose another run_dir or delete this one") from error
        ours = _flatten(json.loads(json.dumps(self.description)))
        different = [key for key in sorted(ours | theirs) if ours.get(key) != theirs.get(key)]
        if different:
            listed = ", ".join(f"{key} ({theirs.get(key)!r} there, {ours.get(key)!r} now)" for key in different[:4])
            raise ConfigError(f"{self.path} holds another run: {listed}; choose another run_dir or delete this one")
        if not (self.path / "split.json").exists():
            write_json(self.path / "split.json", split.to_json())

    @contextmanager
    def held(self) -> Iterator[None]:
        """Keep other processes from training here, until the model is there."""
        if self.path is None or self.has_model:
            yield
            return
        with held(self.path):
            yield

    def read_state(self) -> State:
        """Return the state to go on from.

        Raises
        ------
        ModelError, ConfigError
            If it is damaged, or of another run.
        """
        assert self.path is not None
        path = self.path / "state.safetensors"
        tensors, metadata = load_tensors(path)
        if metadata.get("run_key") != self.key:
            raise ConfigError(
                f"{path} belongs to run {metadata.get('run_key')}, not to {self.key}: delete it to start anew"
            )
        return State(tensors=tensors, **metadata["state"])

    def write_state(self, state: State) -> None:
        """Write the checkpoint, then the learning curve."""
        if self.path is not None:
            content = {"run_key": self.key, "state": state.scalars()}
            save_tensors(self.path / "state.safetensors", state.tensors, content)
            self.write_history(state)

    def write_history(self, state: State) -> None:
        """Write the learning curve."""
        if self.path is not None:
            with atomic_path(self.path / "history.csv") as temporary:
                pd.DataFrame(state.history).to_csv(temporary, index=False)

    def finish(self, state: State, potential: Potential, metadata: dict[str, Any]) -> None:
        """Write the model, and remove the state, for which a finished run has no use."""
        if self.path is not None:
            self.write_state(state)
            content = self.description | {"run_key": self.key} | metadata
            save_model(potential, self.path / "model.safetensors", content)
            self._tidy()

    def read_finished(self, label_force: float, *, tidy: bool) -> Finished:
        """Return what a run left that had ended.

        Parameters
        ----------
        label_force
            Root mean square of the labelled forces of the validation part, eV/A.
        tidy
            Remove the state that a process left which was killed in the moment before.

        Raises
        ------
        ModelError, ConfigError, DataError
            If the model is damaged or of another run, or the learning curve is.
        """
        assert self.path is not None
        _LOG.info("%s holds this run, finished", self.path)
        path = self.path / "model.safetensors"
        potential, metadata = load_model(path)
        if metadata.get("run_key") != self.key:
            raise ConfigError(
                f"{path} belongs to run {metadata.get('run_key')}, not to {self.key}: delete it to train anew"
            )
        error = float(metadata["metrics"]["validation_force_rmse_vector"])
        if error > HOPELESS * max(1.0, label_force):
            raise ModelError(f"{path} is of a training that diverged, force RMSE {error:.4g} eV/A: delete {self.path}")
        history = _read_history(self.path / "history.csv")
        if tidy:
            # kept where nobody may write, perhaps, or not there
            with suppress(OSError, ModelError):
                if load_tensors(self.path / "state.safetensors")[1].get("run_key") == self.key:
                    self._tidy()
        return Finished(potential, history, int(history["epoch"].iloc[int(history["validation_score"].argmin())]))

    def without_result(self, error: ModelError, state: State) -> ModelError:
        """Return the error of a training that diverged, with what is kept of it: the curve, no model."""
        if self.path is None:
            return error
        if state.history:
            self.write_history(state)
        return ModelError(f"{error}; {self.path} holds no finished run, so choose another run_dir or delete this one")

    @contextmanager
    def kept_on_interrupt(self, config: FinetuneConfig) -> Iterator[Kept]:
        """Save the last whole epoch if the block is interrupted, or loses contact to its other processes."""
        keep = Kept(self.path is not None)
        with heeded():
            try:
                yield keep
            except (KeyboardInterrupt, ContactError) as error:
                whole = keep.state
                if whole is not None and whole.epoch and not self.has_model:
                    with undisturbed():
                        self.write_state(whole)
                if isinstance(error, ContactError):
                    raise
                raise interrupted(error, self._how_to_go_on(whole, config)) from None

    def _how_to_go_on(self, whole: State | None, config: FinetuneConfig) -> str:
        folder = self.path
        if folder is None:
            return "interrupted: a training without a run_dir keeps nothing, the same call begins anew"
        if self.has_model:
            return f"interrupted: the training had ended and is kept in {folder}, the same call goes on from there"
        if whole is None and self.has_state:
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

    def _tidy(self) -> None:
        """Remove what a finished run has no use for, never anything that it did not write."""
        assert self.path is not None
        (self.path / "state.safetensors").unlink(missing_ok=True)
        with suppress(OSError):  # where open files cannot be removed
            (self.path / ".lock").unlink(missing_ok=True)


class Kept:
    """The state after the last whole epoch, apart from the one that the training changes."""

    def __init__(self, wanted: bool) -> None:
        self._wanted = wanted
        self.state: State | None = None

    def __call__(self, state: State) -> None:
        """Keep a state, if anybody can write it down."""
        if self._wanted:
            # a new one every time: an interrupt in the midst of copying leaves the one before
            self.state = state.copy()


def _flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


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
