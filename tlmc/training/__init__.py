"""Fine-tuning: settings, learner protocol, trainer, run folder."""

from __future__ import annotations

from tlmc.training.config import RECIPES, FinetuneConfig, RicherColumns, recipe
from tlmc.training.fine_tuning import FinetuneResult, finetune

__all__ = ["RECIPES", "FinetuneConfig", "FinetuneResult", "RicherColumns", "finetune", "recipe"]
