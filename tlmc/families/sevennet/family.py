"""The SevenNet family as the rest of the package sees it."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, Final, cast

from tlmc.errors import ConfigError
from tlmc.potentials.family import Family

if TYPE_CHECKING:
    from ase import Atoms

    from tlmc.families.sevennet.learner import SevenNetLearner
    from tlmc.families.sevennet.model import SevenNetPotential
    from tlmc.potentials.model import Potential
    from tlmc.training.config import FinetuneConfig
    from tlmc.training.distributed import Group

CHECKPOINT: Final = "pretrained_potentials/SevenNet_0__11Jul2024/checkpoint_sevennet_0.pth"
"""Of SevenNet-0, inside the installed package."""


class SevenNetFamily(Family):
    """SevenNet-0."""

    name: ClassVar[str] = "sevennet"
    start_models: ClassVar[Mapping[str, str]] = {
        "sevennet": "SevenNet-0, equivariant message passing, 89 elements, PBE and PBE+U on inorganic crystals (sevenn)"
    }
    recipes: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        # loss and optimiser of the recipe short; the rate is the published one of its fine-tunings
        "sevennet": MappingProxyType(
            {"epochs": 8, "lambda_": 0.1, "lr": 1e-3, "weight_decay": 0.01, "schedule": "cosine"}
        )
    }
    unsupported: ClassVar[frozenset[str]] = frozenset(
        {"init", "members", "layers", "warm_start", "precision", "richer"}
    )

    unlearned: ClassVar[str] = "molecules and their crystals: it was trained on relaxations of inorganic crystals"

    def doi(self, name: str) -> str:
        """Return where SevenNet is described."""
        return "10.1021/acs.jctc.4c00190"

    def load(self, name: str) -> SevenNetPotential:
        """Load SevenNet-0."""
        self._check_installed()
        from tlmc.families.sevennet.model import load_sevennet

        return load_sevennet()

    def weights_path(self, name: str) -> Path:
        """Return where the checkpoint is in the installed package."""
        spec = importlib.util.find_spec("sevenn")
        folder = Path("sevenn") if spec is None or spec.origin is None else Path(spec.origin).parent
        return folder / CHECKPOINT

    def reachable(self, name: str) -> bool:
        """Tell whether the package is installed: its weights come with it."""
        return self.weights_path(name).is_file()

    @property
    def model(self) -> type[SevenNetPotential]:
        """The class of its models."""
        self._check_installed()
        from tlmc.families.sevennet.model import SevenNetPotential

        return SevenNetPotential

    def learner(
        self,
        model: Potential,
        frames: Sequence[Atoms],
        config: FinetuneConfig,
        group: Group,
        report: Callable[[int], object],
    ) -> SevenNetLearner:
        """Return the network with the graphs of these frames."""
        from tlmc.families.sevennet.learner import SevenNetLearner

        return SevenNetLearner(cast("SevenNetPotential", model), frames, group.device, report)

    @staticmethod
    def is_installed() -> bool:
        """Tell whether the package ``sevenn`` can be imported, without importing it."""
        return importlib.util.find_spec("sevenn") is not None

    def _check_installed(self) -> None:
        if not self.is_installed():
            raise ConfigError("SevenNet-0 needs the package sevenn: pip install 'tlmc[sevennet]'")


FAMILY = SevenNetFamily()
