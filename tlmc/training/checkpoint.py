"""Models on disk: tensors as safetensors, everything else as JSON in the same file's header; nothing is executed."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from tlmc.arguments import checked
from tlmc.descriptors.aev import AEVParameters
from tlmc.descriptors.enrichment import Enrichment
from tlmc.errors import ConfigError, ModelError
from tlmc.files import atomic_path
from tlmc.potentials.model import Layer, Potential
from tlmc.provenance import git_revision, package_versions
from tlmc.reference import ReferenceEnergies
from tlmc.training.divergence import is_finite

FORMAT = "tlmc-model-1"
_ENRICHMENT = ("shift", "projection")
"""Tensors of an enrichment, kept under these names."""


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
    check_weights(potential, str(path))
    description = {
        "format": FORMAT,
        "model": {
            "name": potential.name,
            "symbols": potential.symbols,
            "aev": asdict(potential.aev),
            "self_energies": potential.self_energies,
            "fingerprint": potential.fingerprint,
            "element_map": potential.element_map,
            "reference": None if potential.reference is None else potential.reference.to_json(),
            "scale": potential.scale,
            "enrichment": None if potential.enrichment is None else potential.enrichment.to_json(),
            "committee": potential.committee,
        },
        "versions": package_versions(),
        "git_revision": git_revision(),
        "metadata": dict(metadata or {}),
    }
    tensors = {
        f"{symbol}.{number}.{part}": tensor
        for symbol, layers in potential.networks.items()
        for number, layer in enumerate(layers)
        for part, tensor in zip(("weight", "bias"), layer, strict=True)
    }
    if potential.enrichment is not None:
        tensors |= {f"enrichment.{name}": getattr(potential.enrichment, name) for name in _ENRICHMENT}
    save_tensors(path, tensors, description)


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
    try:
        content = description["model"]
        enrichment = None
        if content.get("enrichment") is not None:
            extra: dict[str, Any] = {name: tensors.pop(f"enrichment.{name}") for name in _ENRICHMENT}
            enrichment = Enrichment(**content["enrichment"], **extra)
            _ = enrichment.descriptor  # an unknown one is said now
        depth = 1 + max(int(name.split(".")[1]) for name in tensors)
        networks = {
            symbol: tuple(
                Layer(tensors[f"{symbol}.{number}.weight"], tensors[f"{symbol}.{number}.bias"])
                for number in range(depth)
            )
            for symbol in content["symbols"]
        }
        constants: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in content["aev"].items()}
        potential = Potential(
            name=content["name"],
            symbols=tuple(content["symbols"]),
            aev=AEVParameters(**constants),
            networks=networks,
            self_energies=content["self_energies"],
            fingerprint=content["fingerprint"],
            element_map=content["element_map"],
            reference=None if content["reference"] is None else ReferenceEnergies.from_json(content["reference"]),
            scale=content["scale"],
            enrichment=enrichment,
            # files written before this was kept may be fine-tuned, so they do not count as one
            committee=content.get("committee", False) is True,
        )
        _check_shapes(potential)
        metadata = {"versions": dict(description["versions"]), "git_revision": str(description["git_revision"])}
        metadata |= dict(description["metadata"])
    except (KeyError, IndexError, TypeError, ValueError, AttributeError, ConfigError) as error:
        raise ModelError(f"{path} lacks a part of the model or holds a wrong one: {error}") from error
    check_weights(potential, str(path))
    return potential, metadata


def _check_shapes(potential: Potential) -> None:
    """Make sure that the tensors are the networks of the model, all of one precision."""
    members, dtype = potential.members, potential.dtype
    for symbol in potential.symbols:
        n_in = potential.n_columns
        for number, (weight, bias) in enumerate(potential.networks[symbol]):
            n_out = weight.shape[-1] if number < len(potential.networks[symbol]) - 1 else 1
            shapes = {"weight": (members, n_in, n_out), "bias": (members, 1, n_out)}
            for (part, shape), tensor in zip(shapes.items(), (weight, bias), strict=True):
                name = f"{symbol}.{number}.{part}"
                if tuple(tensor.shape) != shape or tensor.dtype != dtype:
                    raise ValueError(f"{name} is {tuple(tensor.shape)} {tensor.dtype}, not {shape} {dtype}")
            n_in = n_out


def check_weights(potential: Potential, where: str) -> None:
    """Raise a ModelError if a weight is infinite or NaN, as a training that diverges leaves it."""
    parts = {
        f"weights of {symbol}": [x for layer in potential.networks[symbol] for x in layer]
        for symbol in potential.symbols
    }
    if potential.enrichment is not None:
        parts["enrichment"] = [getattr(potential.enrichment, name) for name in _ENRICHMENT]
    broken = [name for name, tensors in parts.items() if not is_finite(tensors)]
    if broken:
        raise ModelError(f"{where}: {', '.join(broken)} are infinite or NaN, as a training leaves them that diverged")
