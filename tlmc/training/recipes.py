"""Recipes: named settings, as differences from the protocol of the thesis (:mod:`tlmc.training.config`).

Importing this is quick: the command line's help lists them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from tlmc.potentials.registry import families

# at three times the rate single frames far from the others come out much worse
_RICH: dict[str, Any] = {
    "epochs": 60, "lambda_": 0.1, "lr": 1e-4, "weight_decay": 0.01, "schedule": "cosine", "warmup_epochs": 1,
    "loss": "huber", "huber_delta": 0.1, "richer": {"kind": "soap"},
}  # fmt: skip

RECIPES: Final[Mapping[str, Mapping[str, Any]]] = {
    "thesis": {},
    "short": {"epochs": 60, "lambda_": 0.1, "lr": 3e-4, "weight_decay": 0.01, "schedule": "cosine"},
    "quick": {
        "epochs": 30, "batch_size": 4, "lambda_": 0.1, "lr": 6e-4, "weight_decay": 0.01, "schedule": "cosine",
        "warmup_epochs": 1.0,
    },
    "scratch": {"init": "scratch"},
    "frozen": {"layers": "hidden"},
    "rich": _RICH,
    "thorough": _RICH | {"epochs": 150},
}  # fmt: skip
"""Those of this package that suit any family which takes their settings."""


def recipes() -> dict[str, Mapping[str, Any]]:
    """Return all named settings: :data:`RECIPES`, and those that families bring for their own models."""
    return {**RECIPES, **{name: r for family in families().values() for name, r in family.recipes.items()}}
