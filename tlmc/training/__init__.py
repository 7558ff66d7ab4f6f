"""Fine-tuning on cached descriptors: cache, exact engine, protocol, checkpoints."""

from __future__ import annotations

from tlmc.training.cache import DescriptorCache, build_cache
from tlmc.training.checkpoint import load_model, save_model
from tlmc.training.engine import Engine, merge
from tlmc.training.finetune import RECIPES, FinetuneConfig, FinetuneResult, finetune, recipe

__all__ = [
    "RECIPES",
    "DescriptorCache",
    "Engine",
    "FinetuneConfig",
    "FinetuneResult",
    "build_cache",
    "finetune",
    "load_model",
    "merge",
    "recipe",
    "save_model",
]
