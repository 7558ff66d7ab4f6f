"""The ANI family as the rest of the package sees it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, cast

from tlmc.potentials.family import Family

if TYPE_CHECKING:
    from ase import Atoms

    from tlmc.data.dataset import Dataset
    from tlmc.data.splits import Split
    from tlmc.families.ani.learner import AniLearner
    from tlmc.families.ani.model import AniPotential
    from tlmc.potentials.model import Potential
    from tlmc.training.config import FinetuneConfig
    from tlmc.training.distributed import Group


class AniFamily(Family):
    """ANI-2x and ANI-2xt."""

    name: ClassVar[str] = "ani"
    start_models: ClassVar[Mapping[str, str]] = {
        "ani2x": "ANI-2x, ensemble of 8, wB97X/6-31G(d), H C N O S F Cl: the start model of the thesis (torchani)",
        "ani2xt": "ANI-2xt, one member, H C N O F S Cl: comes from the package index, inside the wheel of auto3d (MIT)",
    }

    unlearned: ClassVar[str] = "crystals: it was trained on molecules"

    def doi(self, name: str) -> str:
        """Return where a start model is described."""
        from tlmc.families.ani.pretrained import registered

        return str(registered(name)["doi"])

    def load(self, name: str) -> AniPotential:
        """Load a start model."""
        from tlmc.families.ani.pretrained import load_start_model

        return load_start_model(name)

    def weights_path(self, name: str) -> Path:
        """Return where its weights are kept."""
        from tlmc.families.ani.pretrained import weights_path

        return weights_path(name)

    def reachable(self, name: str) -> bool:
        """Tell whether it can be had."""
        from tlmc.families.ani.pretrained import reachable

        return reachable(name)

    @property
    def model(self) -> type[AniPotential]:
        """The class of its models."""
        from tlmc.families.ani.model import AniPotential

        return AniPotential

    def check(self, model: Potential, config: FinetuneConfig) -> None:
        """Refuse to take more members than there are, or some of those that are a model together only."""
        from tlmc.families.ani.transfer import first_members

        super().check(model, config)
        if config.members is not None:
            first_members(cast("AniPotential", model), config.members)

    def first_model(self, model: Potential, dataset: Dataset, split: Split, config: FinetuneConfig) -> AniPotential:
        """Return the members, first weights and columns that the settings ask for."""
        from tlmc.families.ani.learner import first_model

        return first_model(cast("AniPotential", model), dataset, split, config)

    def learner(
        self,
        model: Potential,
        frames: Sequence[Atoms],
        config: FinetuneConfig,
        group: Group,
        report: Callable[[int], object],
    ) -> AniLearner:
        """Return the exact engine on cached descriptors."""
        from tlmc.families.ani.learner import AniLearner

        return AniLearner(cast("AniPotential", model), frames, config, group, report)


FAMILY = AniFamily()
