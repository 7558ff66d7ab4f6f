"""What a family of potentials tells the rest of the package about itself."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from tlmc.errors import ConfigError

if TYPE_CHECKING:
    from ase import Atoms

    from tlmc.data.dataset import Dataset
    from tlmc.data.splits import Split
    from tlmc.potentials.model import Potential
    from tlmc.training.config import FinetuneConfig
    from tlmc.training.distributed import Group
    from tlmc.training.learner import Learner


class Family(ABC):
    """An architecture: its start models, its files, and what learns.

    Each folder of :mod:`tlmc.families` has a module ``family`` with one instance, ``FAMILY``. Importing that module
    must be quick: what is slow is imported by the methods.
    """

    name: ClassVar[str]
    """That of the folder."""
    start_models: ClassVar[Mapping[str, str]]
    """Name of a published model to a line about it."""
    unlearned: ClassVar[str]
    """What its start models have not learned, and why, ``"crystals: it was trained on molecules"``."""
    recipes: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    """Named settings that suit this family, as differences from the thesis protocol."""
    unsupported: ClassVar[frozenset[str]] = frozenset()
    """Settings (:class:`tlmc.training.config.FinetuneConfig`) of which it takes the default only."""

    @abstractmethod
    def load(self, name: str) -> Potential:
        """Load a start model; see :func:`tlmc.potentials.registry.load_start_model`."""

    @abstractmethod
    def weights_path(self, name: str) -> Path:
        """Return where its weights are kept, present or not."""

    @abstractmethod
    def reachable(self, name: str) -> bool:
        """Tell within seconds whether it is on this machine or its source answers."""

    @abstractmethod
    def doi(self, name: str) -> str:
        """Return where a start model is described."""

    @property
    @abstractmethod
    def model(self) -> type[Potential]:
        """The class of its models, which a model file is read with."""

    def check(self, model: Potential, config: FinetuneConfig) -> None:
        """Refuse settings that the family has no use for, or that the model cannot follow.

        Raises
        ------
        ConfigError
            If a setting of :attr:`unsupported` is not as it is by default.
        ModelError
            If the model cannot be made into what is asked for.
        """
        for name in sorted(self.unsupported):
            value, default = getattr(config, name), type(config).model_fields[name].default
            if value != default:
                raise ConfigError(
                    f"models of the family {self.name} train with {name} = {default!r} only, got {value!r}"
                )

    def first_model(self, model: Potential, dataset: Dataset, split: Split, config: FinetuneConfig) -> Potential:
        """Return what a training begins with: members, first weights and columns that the settings ask for.

        Raises
        ------
        ModelError
            If the model cannot be made into that.
        """
        return model

    @abstractmethod
    def learner(
        self,
        model: Potential,
        frames: Sequence[Atoms],
        config: FinetuneConfig,
        group: Group,
        report: Callable[[int], object],
    ) -> Learner:
        """Return what learns from these frames, all that never changes computed.

        Parameters
        ----------
        model
            As :meth:`first_model` returned it; it is not changed.
        frames
            All that will be trained on or evaluated.
        config
            Settings.
        group
            The processes that train together, with the device of this one. All of them call this.
        report
            To be called with 1 after every frame that had to be prepared.
        """
