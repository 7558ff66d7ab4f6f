"""Fine-tuning: settings, learner protocol, trainer, run folder."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tlmc.lazy import loaded_at_use

if TYPE_CHECKING:
    from tlmc.training.config import FinetuneConfig, RicherColumns, recipe
    from tlmc.training.fine_tuning import FinetuneResult, finetune
    from tlmc.training.recipes import RECIPES

__all__ = ["RECIPES", "FinetuneConfig", "FinetuneResult", "RicherColumns", "finetune", "recipe"]

__getattr__ = loaded_at_use(
    __name__,
    {
        "recipes": ("RECIPES",),
        "config": (
            "FinetuneConfig",
            "RicherColumns",
            "recipe",
        ),
        "fine_tuning": (
            "FinetuneResult",
            "finetune",
        ),
    },
)
