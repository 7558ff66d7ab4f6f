"""Models on disk: tensors as safetensors, everything else as JSON in the same file's header; nothing is executed."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from tlmc.arguments import checked
from tlmc.errors import ModelError
from tlmc.files import atomic_path
from tlmc.potentials.model import Potential
from tlmc.potentials.registry import families
from tlmc.provenance import git_revision, package_versions

FORMAT = "tlmc-model-2"


def save_tensors(path: Path | str, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> None:
    """Write tensors and JSON metadata to one safetensors file, atomically."""
    with atomic_path(path) as temporary:
        save_file(
            {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()},
            temporary,
            metadata={"tlmc": json.dumps(metadata, allow_nan=False)},
        )


def load_tensors(path: Path | str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what :func:`save_tensors` wrote.

    Raises
    ------
    ModelError
        If the file is missing, damaged or not written by this package.
    """
    try:
        with safe_open(path, framework="pt") as stream:
            metadata = json.loads((stream.metadata() or {})["tlmc"])
            if not isinstance(metadata, dict):
                raise KeyError("tlmc")
            tensors = {name: stream.get_tensor(name) for name in stream.keys()}  # noqa: SIM118 - not a mapping
    except FileNotFoundError as error:
        raise ModelError(f"{path} does not exist") from error
    except (SafetensorError, struct.error, json.JSONDecodeError) as error:
        raise ModelError(f"{path} is not a readable safetensors file: {error}") from error
    except KeyError as error:
        raise ModelError(f"{path} is a safetensors file, but not one that tlmc wrote") from error
    # the file's memory map must not outlive the file's name: a resumed run replaces it
    return {name: tensor.clone() for name, tensor in tensors.items()}, metadata


@checked
def save_model(potential: Potential, path: Path | str, metadata: Mapping[str, Any] | None = None) -> None:
    """Write a model to one ``.safetensors`` file.

    Parameters
    ----------
    potential
        Model with its reference energies.
    path
        File to write; it appears whole or not at all.
    metadata
        Anything JSON can hold (configuration, data hash, metrics); package versions and git revision are added.

    Raises
    ------
    ModelError
        If a weight is infinite or NaN.
    """
    potential.check_weights(str(path))
    description = {
        "format": FORMAT,
        "family": potential.family,
        "model": potential.to_json(),
        "versions": package_versions(),
        "git_revision": git_revision(),
        "metadata": dict(metadata or {}),
    }
    save_tensors(path, potential.tensors(), description)


@checked
def load_model(path: Path | str) -> tuple[Potential, dict[str, Any]]:
    """Read a model and the metadata given to :func:`save_model`; ``versions`` and ``git_revision`` are added to it.

    Raises
    ------
    ModelError
        If the file is missing, damaged, not a model, of a layout this version does not know, or holds a weight that is
        infinite or NaN.
    """
    tensors, description = load_tensors(path)
    if description.get("format") != FORMAT:
        raise ModelError(f"{path} holds {description.get('format', 'no model')!r}, this version reads {FORMAT!r}")
    family = families().get(str(description.get("family")))
    if family is None:
        raise ModelError(f"{path} is of the family {description.get('family')!r}: there are {', '.join(families())}")
    try:
        potential = family.model.from_json(description["model"], tensors)
        metadata = {"versions": dict(description["versions"]), "git_revision": str(description["git_revision"])}
        metadata |= dict(description["metadata"])
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        raise ModelError(f"{path} lacks a part of the model or holds a wrong one: {error}") from error
    potential.check_weights(str(path))
    return potential, metadata
