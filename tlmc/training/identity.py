"""What makes two trainings the same one: everything that decides the result, and its hash, the key of a run."""

from __future__ import annotations

import hashlib
import json
import re
from typing import Any

from tlmc.data.dataset import Dataset
from tlmc.data.splits import Split
from tlmc.potentials.model import Potential
from tlmc.training.config import FinetuneConfig


def describe_start(model: Potential) -> dict[str, Any]:
    """Return what tells a start model from others, as JSON: name, weights and borrowed elements."""
    return {
        "name": model.name,
        "fingerprint": model.fingerprint,
        "element_map": dict(model.element_map),
        "weights": model.weights_hash(),
    }


def describe_run(model: Potential, dataset: Dataset, split: Split, config: FinetuneConfig) -> dict[str, Any]:
    """Return everything that decides the result of a training, as JSON.

    The name of a recipe is not part of it, only the settings it stands for: one training may be filed under several
    names.
    """
    return {
        "start_model": describe_start(model),
        "data": {"name": dataset.name, "hash": dataset.hash, "frames": len(dataset)},
        "split": {"hash": split.hash, "train": len(split.train), "validation": len(split.validation)},
        "config": config.model_dump(exclude={"recipe"}),
    }


def key_of(description: dict[str, Any]) -> str:
    """Return the hash of a description, twelve hexadecimal digits."""
    return hashlib.sha256(json.dumps(description, sort_keys=True).encode()).hexdigest()[:12]


def run_key(model: Potential, dataset: Dataset, split: Split, config: FinetuneConfig) -> str:
    """Return the key of a run: it changes with everything that decides the result, and with nothing else."""
    return key_of(describe_run(model, dataset, split, config))


def start_hash(model: Potential) -> str:
    """Return the hash of a start model: name, weights and borrowed elements."""
    return key_of(describe_start(model))


def run_name(model: Potential, dataset: Dataset, split: Split, config: FinetuneConfig) -> str:
    """Return a folder name that says what a run is and ends with its key.

    Names come from users and files: what would lead to another folder is replaced, and what is too long for a file
    system cut off.
    """
    names = (re.sub(r"[/\\\x00-\x1f\x7f]+", "-", name)[:60] for name in (dataset.name, model.name, config.recipe))
    return f"{'-'.join(names)}-{config.seed}-{run_key(model, dataset, split, config)}"
